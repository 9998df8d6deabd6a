"""What each image shows by itself: scale, background, and which way the particle stands out.

Of all images of a file, so that none drowns the others; :mod:`cryoem.surveying` looks at some of
them together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from . import imaging
from .particles import Rows

__all__ = ["CERTAIN", "FAR", "HOT", "MOST", "ImageStatistics", "beyond_circle", "seen_share"]

#: Standard errors at which a sign, or a signal, is believed.
CERTAIN = 5.0
#: Share of what particles stand out by from which a level, or a ramp, of all images is a matter.
MATTERS = 0.05
#: Standard deviations of an image to which a background is flat, however quiet it is.
FLAT = 1e-3
#: An image this many times as loud as others, or as faint, is of another scale.
FAR = 5.0
#: A pixel this many times as far from the background as the farthest of other images is hot, and
#: one that holds this share of its image's power, whatever others hold.
HOT, MOST = 10.0, 0.2
#: Images by which the contrast of an optics group, or a stack, is judged by itself; and its scale.
FEW, SOME = 20, 5
#: Share of images of the other contrast from which images are mixed, not a few of them bad.
MIXED = 0.02
#: Share of what stacks show on average that all show, and of what those of one sign show that those
#: of the other do, where they are of two contrasts.
GAP, SYMMETRIC = 0.5, 0.7
#: Root mean squares beyond a frame's circle: of 1, x and y, edges 1 apart, and of x times y.
RAMP, SADDLE = np.array([1, 0.4, 0.4]), 0.15
#: What noise makes of the middle against the corners, over what it makes of the corners alone.
MIDDLE = 1.86


def beyond_circle(radius: np.ndarray) -> np.ndarray:
    """Pixels beyond the largest circle of a frame; of one that has none, the farthest."""
    beyond = radius > len(radius) / 2
    return beyond if beyond.any() else radius == radius.max()


def seen_share(images: Any) -> np.ndarray:
    """Share of each image's pixels that were not masked, or padded, with a constant: (n,) array.

    Of images in files as these keep them: what is undone as they are read reaches into the mask.
    """
    images = (images.as_they_lie() if hasattr(images, "as_they_lie") else images)[:]
    corners = images[:, beyond_circle(imaging.from_middle(images.shape[1]))]
    share = np.mean(images != corners[:, :1, None], axis=(1, 2))
    return np.where((np.ptp(corners, axis=1) == 0) & (share > 0), share, 1.0)


@dataclass(frozen=True, eq=False)
class ImageStatistics:
    """What each image shows by itself; levels and ramps in standard deviations of it.

    Attributes
    ----------
    group, told : (n,) arrays
        Optics group, and the scale of its CTF.
    scale, peak, alone : (n,) arrays
        Standard deviation, distance of the farthest pixel from the background, and the share of
        the image's power that this pixel holds.
    middle : (n,) array
        What the central disc is brighter by than the corners.
    plane, saddle, grain : (n, 3), (n,) and (n,) arrays
        The background's level and ramps (:func:`cryoem.imaging.background_planes`); its rise to two
        opposite corners, which is but noise; and what white noise makes of a level.
    picture : (n,) array of uint64
        Alike where images are, pixel by pixel.
    """

    group: np.ndarray
    told: np.ndarray
    scale: np.ndarray
    peak: np.ndarray
    alone: np.ndarray
    middle: np.ndarray
    plane: np.ndarray
    saddle: np.ndarray
    grain: np.ndarray
    picture: np.ndarray

    @classmethod
    def of(
        cls, images: np.ndarray, group: np.ndarray, told: np.ndarray | float = 1.0
    ) -> ImageStatistics:
        """Look at images of some optics groups, whose CTFs are scaled as told."""
        size = images.shape[1]
        radius = imaging.from_middle(size)
        inner, outer = radius < size / 6, beyond_circle(radius)
        y, x = (np.argwhere(outer) - size // 2).T / size
        patterns = np.stack([np.ones_like(x), x, y, x * y], axis=1)
        corners = images[:, outer].astype(np.float64)
        found = corners @ np.linalg.pinv(patterns).T
        scale = np.maximum(images.std(axis=(1, 2), dtype=np.float64), 1e-30)
        grain = (corners - found @ patterns.T).std(axis=1) / np.sqrt(outer.sum()) / scale
        middle = images[:, inner].mean(axis=1, dtype=np.float64) - corners.mean(axis=1)
        low, high = (np.float64(end(images, axis=(1, 2))) for end in (np.min, np.max))
        peak = np.maximum(high - found[:, 0], found[:, 0] - low)
        return cls(
            group=np.asarray(group),
            told=np.broadcast_to(np.maximum(np.abs(told), 1e-30), len(images)),
            scale=scale,
            peak=peak,
            alone=(peak / scale / size) ** 2,
            middle=middle / scale,
            plane=found[:, :3] / scale[:, None],
            saddle=np.abs(found[:, 3] * SADDLE) / scale,
            grain=grain,
            picture=np.array([_digest(image) for image in images], np.uint64),
        )

    @cached_property
    def same(self) -> np.ndarray | None:
        """Numbers of the pictures, (n,), alike where images are; None: all differ."""
        found, number = np.unique(self.picture, return_inverse=True)
        return None if len(found) == len(number) else number

    def select(self, rows: Rows) -> ImageStatistics:
        """Those of some images."""
        return ImageStatistics(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @classmethod
    def joined(cls, parts: Sequence[ImageStatistics]) -> ImageStatistics:
        """Those of parts of the images, as one."""
        return cls(
            **{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)}
        )

    @cached_property
    def groups(self) -> list[np.ndarray]:
        """The rows of each optics group."""
        return _parts(np.arange(len(self.group)), self.group)

    def pooled(self, few: int) -> list[np.ndarray]:
        """The rows of each optics group of so many images, and of all that are smaller together."""
        small = [rows for rows in self.groups if len(rows) < few]
        large = [rows for rows in self.groups if len(rows) >= few]
        return [*large, np.sort(np.concatenate(small))] if small else large

    def _usual(
        self, values: np.ndarray, few: int = FEW, among: np.ndarray | None = None
    ) -> np.ndarray:
        """For each image the median of its optics group, of small ones, or of all: of some."""
        among = np.full(len(values), True) if among is None or not among.any() else among
        found = np.full(len(values), np.quantile(values[among], 0.5, method="lower"))
        for rows in self.pooled(few):
            if len(some := rows[among[rows]]) >= few:
                found[rows] = np.quantile(values[some], 0.5, method="lower")
        return np.maximum(found, 1e-30)

    @cached_property
    def error(self) -> np.ndarray:
        """What noise makes of a level: more than white noise would where it is coarse."""
        usual = self._usual(self.saddle) / 0.6745  # the median of a normal law, from its centre
        return self.grain * np.maximum(usual / self._usual(self.grain), 1)

    @property
    def background(self) -> tuple[float, float]:
        """Level and ramp: root mean squares over the images of the group where they are largest."""
        squares = np.array([np.mean(self.plane[rows] ** 2, axis=0) for rows in self.groups])
        level, ramp = squares[:, 0].max(), squares[:, 1:].sum(axis=1).max()
        return float(np.sqrt(level)), float(np.sqrt(ramp))

    @property
    def uneven(self) -> bool:
        """Whether the background of an optics group has a level or ramp beyond its noise.

        In all images together, and it is a matter beside what particles stand out by, or in some.
        """
        plane = self.plane * RAMP
        z = plane / np.maximum(self.error, FLAT)[:, None]
        for rows in self.groups:
            mean = np.abs(plane[rows].mean(axis=0))
            certain = np.abs(z[rows].mean(axis=0)) * np.sqrt(len(rows)) > CERTAIN
            matters = mean > MATTERS * np.abs(self.middle[rows]).mean()
            if (certain & matters).any() or np.mean(z[rows] ** 2, axis=0).max() > CERTAIN**2:
                return True
        return False

    @property
    def far(self) -> np.ndarray:
        """Rows of images of another scale than those of their optics group, or a hot pixel.

        By a few images beside other groups it is not to be told, and without noise a pixel is hot
        where a particle is seen from its end.
        """
        hot = (self.alone > MOST) & self.noisy
        loud, seen, peak = (
            values / self._usual(values, SOME, ~hot)
            for values in (self.scale, self.scale / self.told, self.peak)
        )
        # What is fainter may be told so: all of the image, or the particle alone.
        off = ((loud > FAR) & (seen > FAR)) | ((loud < 1 / FAR) & (seen < 1 / FAR))
        far = off | ((peak > HOT) & self.noisy)
        for rows in self.pooled(SOME) if len(self.groups) > 1 else ():
            far[rows] &= len(rows) >= SOME
        return np.flatnonzero(far | hot)

    @property
    def noisy(self) -> np.ndarray:
        """Whether there is noise in each image, beside what its brightest pixel holds: (n,)."""
        return self.error > FLAT * np.sqrt(np.maximum(1 - self.alone, 0))

    @property
    def apart(self) -> float:
        """How many times louder the images of one optics group are than those of another.

        However that is counted: with what is told of the particles' scales, or without.
        """
        usual = [self._usual(values, SOME) for values in (self.scale, self.scale / self.told)]
        return min(float(values.max() / values.min()) for values in usual)

    def contrasts(self, stack: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Tell white from black by optics groups, and by stacks where those of one group differ.

        Takes which stack holds each image. Stacks differ where some are as far one way as others
        are the other, and none lies between: else it is views, or defocus, by which the middle of a
        particle is dark in some. Returns signs, 1: white on black, -1: black on white, 0: all are
        not to be told; rows of the other sign; and whether these are more than a few bad images, or
        chance, make.
        """
        sign, odd, mixed = np.zeros(len(stack), int), [np.zeros(0, int)], False
        for rows in self.pooled(SOME):
            sign[rows] = self.contrast(rows)[0]
            parts = [part for part in _parts(rows, stack[rows]) if len(part) >= FEW]
            told = np.array([self.contrast(part)[0] for part in parts])
            if not {-1, 1} <= set(told):
                continue
            means = np.array([self.middle[part].mean() for part in parts])
            if _mirrored(means):
                for part, mean in zip(parts, means, strict=True):
                    sign[part] = np.sign(mean)
            else:
                other = told == -(sign[rows[0]] or 1)
                odd += [part for part, is_other in zip(parts, other, strict=True) if is_other]
                mixed = True
        for rows in self.pooled(FEW):
            sign[rows] = np.where(sign[rows] == 0, self.contrast(rows)[0], sign[rows])
        sign[sign == 0] = np.sign(sign.sum())  # too few of them, and nothing says otherwise
        more, peak = self._odd(np.where(sign == 0, 1, sign))
        return sign, np.unique(np.concatenate([*odd, more])), mixed or peak

    def contrast(self, rows: Rows) -> tuple[int, float]:
        """Of some images together; see :func:`contrast`."""
        middle, noise = self.middle[rows], MIDDLE * self.error[rows]
        # Noise besides the scatter of the images, which one image does not show.
        error = max(float(middle.std()), float(np.sqrt(np.mean(noise**2))), 1e-30)
        z = float(middle.mean() / error * np.sqrt(len(middle)))
        return int(np.sign(z)) * (abs(z) > CERTAIN), z

    def _odd(self, sign: np.ndarray) -> tuple[np.ndarray, bool]:
        """Rows about the opposite of where images lie; whether a valley parts them from those."""
        odd, mixed = [np.zeros(0, int)], False
        for rows in self.pooled(FEW):
            if len(rows) < FEW:
                continue
            middle = self.middle[rows] * sign[rows]
            usual = np.median(np.abs(middle))
            other = (middle < -usual / 2) & (middle > -1.5 * usual)
            between = np.sum(np.abs(middle) <= usual / 2)
            sure = other & (middle < -CERTAIN * MIDDLE * np.maximum(self.error[rows], FLAT))
            peak = other.sum() - between > 3 * np.sqrt(other.sum() + between)
            peak |= sure.sum() > 2 * between
            now = bool(peak and other.sum() > MIXED * len(rows))
            odd.append(rows[other if now else sure])
            mixed |= now
        return np.concatenate(odd), mixed


def _digest(image: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest())


def _parts(rows: np.ndarray, which: np.ndarray) -> list[np.ndarray]:
    """Rows by what they belong to."""
    order = np.argsort(which, kind="stable")
    return np.split(rows[order], np.flatnonzero(np.diff(which[order])) + 1)


def _mirrored(means: np.ndarray) -> bool:
    """Whether some are as far one way as the others are the other, and none lies between."""
    white, black = (np.median(np.abs(means[side])) for side in (means > 0, means < 0))
    gap = np.abs(means).min() > GAP * np.median(np.abs(means))
    return bool(gap and SYMMETRIC < white / black < 1 / SYMMETRIC)
