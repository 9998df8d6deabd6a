"""What a set of particles says of how it was imaged: contrast, noise, shifts, defocus.

Training for it takes its ranges from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, TypedDict

import numpy as np

from . import imaging, rotations
from .errors import InputError
from .noise import Noise, background_noise
from .particles import ParticleStack, Rows
from .rotations import Seed

__all__ = [
    "ImageStatistics",
    "Survey",
    "TrainingRanges",
    "contrast",
    "survey",
    "told",
    "with_noise",
]

#: What a sign of the contrast means.
CONTRASTS = {1: "white on black", -1: "black on white", 0: "not to be told"}
#: Standard errors at which a sign, or a signal, is believed.
CERTAIN = 5.0
#: Rings that differ by this share are equally quiet.
LITTLE = 2e-3
#: Share of what particles stand out by from which a level, or a ramp, of all images is a matter.
MATTERS = 0.05
#: Standard deviations of an image to which a background is flat, however quiet it is.
FLAT = 1e-3
#: An image this many times as loud as others, or as faint, is of another scale.
FAR = 5.0
#: A pixel this many times as far from the background as the farthest of other images is hot.
HOT = 10.0
#: Images by which an optics group, or a stack, is judged by itself.
FEW = 20
#: Share of images of the other contrast from which images are mixed, not a few of them bad.
MIXED = 0.02
#: Root mean squares beyond a frame's circle: of 1, x and y, edges 1 apart, and of x times y.
RAMP, SADDLE = np.array([1, 0.4, 0.4]), 0.15
#: What noise makes of the middle against the corners, over what it makes of the corners alone.
MIDDLE = 1.86
#: Share of what a particle adds at its loudest ring that is next to nothing.
FAINT = 0.02
#: Pixels of background from which a spectrum can be measured.
ENOUGH = 20_000
#: SNR from which noise is no matter, and its spectrum is not looked for.
LOUD = 10.0


class TrainingRanges(TypedDict, total=False):
    """Ranges for :class:`cryoem.simulation.TrainingImages`, whose parameters say what they are."""

    snr_range: tuple[float, float]
    clean_fraction: float
    max_shift_px: float
    defocus_range_angstrom: tuple[float, float]
    ctf_fraction: float
    noise: Literal["white", "coloured"] | Noise


class Told(TypedDict):
    """What is known of all particles; see :class:`Survey`."""

    max_shift_px: float
    defocus_range_angstrom: tuple[float, float] | None


@dataclass(frozen=True)
class Survey:
    """How particles were imaged.

    Attributes
    ----------
    images : int
        How many were looked at.
    contrast : {'white on black', 'black on white', 'mixed', 'not to be told'}
    noise_variance : float
        Per pixel, where it is quietest.
    noise : Noise or None
        Its spectrum; None where no noise is to be seen beside the particles, or nothing else is.
    snr : float
        Variance that the particles add, over the whole frame, / noise variance.
    snr_error : float
        Its standard error over the images.
    background_level, background_ramp : float
        How far outside the particles images are from zero, and by how much they rise from one edge
        to the other: root mean squares, in standard deviations of the images.
    particle_diameter_angstrom : float
        Of the circle, wherever the particles lie in the frame, outside which next to nothing of
        them is left.
    max_shift_px : float
        The largest component of any particle's shift; 0 where the file says none.
    defocus_range_angstrom : (low, high) or None
        Of all particles; None where the file has no defocus.
    """

    images: int
    contrast: str
    noise_variance: float
    noise: Noise | None
    snr: float
    snr_error: float
    background_level: float
    background_ramp: float
    particle_diameter_angstrom: float
    max_shift_px: float
    defocus_range_angstrom: tuple[float, float] | None

    def training(self) -> TrainingRanges:
        """Ranges for :class:`cryoem.simulation.TrainingImages`, wider than what was seen.

        SNR from a quarter of the mean to four times it: single particles differ by their thickness
        of ice. Shifts are those of the file, and at least 2 px, for what centred particles by is
        known to a pixel or two. No image is clean.

        Raises
        ------
        InputError
            There is no noise to be seen.
        """
        if not self.noise_variance > 0:
            raise InputError(
                "the corners of the images are constant: their noise cannot be measured, so that "
                "nothing can be trained for it; wanted images as they were extracted, not masked"
            )
        snr = max(self.snr, self.snr_error)
        found: TrainingRanges = {
            "snr_range": (snr / 4, snr * 4),
            "clean_fraction": 0.0,
            "max_shift_px": max(2.0, self.max_shift_px),
        }
        if self.noise is not None:
            found["noise"] = self.noise
        if self.defocus_range_angstrom is not None:
            found["defocus_range_angstrom"] = self.defocus_range_angstrom
            found["ctf_fraction"] = 1.0
        return found


def survey(stack: ParticleStack, *, images: int = 1000, seed: Seed = 0) -> Survey:
    """Look at some images, drawn at random, and at what is known of all particles.

    A particle adds to the variance of the pixels that it covers. So the noise is what varies in the
    quietest ring about the centre: in the corners others may stand. At SNR 1/100 a thousand images
    of 116 px tell the SNR to about a tenth of it.

    Parameters
    ----------
    stack : ParticleStack
    images : int
        How many to look at, at most all.
    seed : int or numpy.random.Generator

    Returns
    -------
    Survey
    """
    n = len(stack)
    rows = np.sort(rotations.generator(seed, "survey").choice(n, min(images, n), replace=False))
    seen = np.asarray(stack.images[rows])
    single = ImageStatistics.of(seen, stack.optics_group[rows])
    sign, _ = single.contrast(slice(None))
    level, ramp = single.background
    signs, _, mixed = single.contrasts(np.zeros(len(rows), int))
    mixed |= {-1, 1} <= set(signs)
    if single.uneven:
        seen = imaging.flatten(seen)
    quiet = _Rings(seen)
    noise = None
    enough = len(rows) * quiet.background.sum() >= ENOUGH
    if enough and quiet.noise > 0 and quiet.signal.mean() < LOUD * quiet.noise:
        noise = background_noise(seen, quiet.background, group=stack.optics_group[rows])
        noise = noise.for_groups(stack.optics_groups)
    ratio = quiet.signal / quiet.noise if quiet.noise > 0 else np.full(len(rows), np.inf)
    return Survey(
        images=len(rows),
        contrast="mixed" if mixed else CONTRASTS[sign],
        noise_variance=quiet.noise,
        noise=noise,
        snr=float(ratio.mean()),
        snr_error=float(ratio.std() / np.sqrt(len(rows))) if quiet.noise > 0 else np.nan,
        background_level=level,
        background_ramp=ramp,
        particle_diameter_angstrom=2 * quiet.radius_px * stack.pixel_size_angstrom,
        **told(stack),
    )


def told(stack: ParticleStack) -> Told:
    """What is known of all particles, without a look at their images."""
    parameters, defocus = stack.ctf_parameters, None
    if parameters is not None:
        mean = (parameters.defocus_u_angstrom + parameters.defocus_v_angstrom) / 2
        defocus = (float(mean.min()), float(mean.max()))
    return {
        "max_shift_px": float(np.abs(stack.shifts_px).max()),
        "defocus_range_angstrom": defocus,
    }


def with_noise(stack: ParticleStack, *, images: int = 1000) -> ParticleStack:
    """The stack with a noise: its own, or what some images show where no particle reaches."""
    if stack.noise is not None or len(stack) == 0:
        return stack
    return stack.replace(noise=survey(stack, images=images).noise)


def _corners(radius: np.ndarray) -> np.ndarray:
    """Pixels beyond the largest circle of a frame; of one that has none, the farthest."""
    beyond = radius > len(radius) / 2
    return beyond if beyond.any() else radius == radius.max()


@dataclass(frozen=True, eq=False)
class ImageStatistics:
    """What each image shows by itself; all but the first three in standard deviations of it.

    Attributes
    ----------
    group, scale, peak : (n,) arrays
        Optics group, standard deviation, distance of the farthest pixel from the background.
    middle : (n,) array
        What the central disc is brighter by than the corners.
    plane, saddle, grain : (n, 3), (n,) and (n,) arrays
        The background's level and ramps (:func:`cryoem.imaging.background_planes`); its rise to two
        opposite corners, which is but noise; and what white noise makes of a level.
    """

    group: np.ndarray
    scale: np.ndarray
    peak: np.ndarray
    middle: np.ndarray
    plane: np.ndarray
    saddle: np.ndarray
    grain: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray, group: np.ndarray) -> ImageStatistics:
        """Look at images of some optics groups."""
        size = images.shape[1]
        radius = imaging.from_middle(size)
        inner, outer = radius < size / 6, _corners(radius)
        y, x = (np.argwhere(outer) - size // 2).T / size
        patterns = np.stack([np.ones_like(x), x, y, x * y], axis=1)
        corners = images[:, outer].astype(np.float64)
        found = corners @ np.linalg.pinv(patterns).T
        scale = np.maximum(images.std(axis=(1, 2), dtype=np.float64), 1e-30)
        grain = (corners - found @ patterns.T).std(axis=1) / np.sqrt(outer.sum()) / scale
        middle = images[:, inner].mean(axis=1, dtype=np.float64) - corners.mean(axis=1)
        low, high = (np.float64(end(images, axis=(1, 2))) for end in (np.min, np.max))
        return cls(
            group=np.asarray(group),
            scale=scale,
            peak=np.maximum(high - found[:, 0], found[:, 0] - low),
            middle=middle / scale,
            plane=found[:, :3] / scale[:, None],
            saddle=np.abs(found[:, 3] * SADDLE) / scale,
            grain=grain,
        )

    @classmethod
    def joined(cls, parts: Sequence[ImageStatistics]) -> ImageStatistics:
        """Those of parts of the images, as one."""
        return cls(
            **{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)}
        )

    @property
    def groups(self) -> list[np.ndarray]:
        """The rows of each optics group."""
        return [np.flatnonzero(self.group == group) for group in np.unique(self.group)]

    def _usual(self, values: np.ndarray) -> np.ndarray:
        """For each image the median of its optics group, or of all where that is small."""
        found = np.full(len(values), np.quantile(values, 0.5, method="lower"))
        for rows in self.groups:
            if len(rows) >= FEW:
                found[rows] = np.quantile(values[rows], 0.5, method="lower")
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
        """Rows of images of another scale than those of their optics group, or a hot pixel."""
        loud, peak = (values / self._usual(values) for values in (self.scale, self.peak))
        return np.flatnonzero((loud > FAR) | (loud < 1 / FAR) | (peak > HOT))

    def contrasts(self, stack: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Tell white from black by optics groups, and by stacks where those of one group differ.

        Takes which stack holds each image. Returns signs, 1: white on black, -1: black on white, 0:
        not to be told; rows of the other sign, as far as single images tell; and whether they are
        more than a few bad images, or chance, make.
        """
        sign = np.zeros(len(stack), int)
        for rows in self.groups:
            rows = rows[np.argsort(stack[rows], kind="stable")]
            parts = np.split(rows, np.flatnonzero(np.diff(stack[rows])) + 1)
            told = [self.contrast(part)[0] for part in parts]
            sure = {s for s, part in zip(told, parts, strict=True) if s and len(part) >= FEW}
            sign[rows] = self.contrast(rows)[0] or max(sure, default=0)
            if len(sure) > 1:
                sign[rows] = np.repeat(told, [len(part) for part in parts])
        found = np.unique(sign[sign != 0])
        for rows in self.groups if len(found) == 1 else ():
            sign[rows] = found[0]  # too few of them, and nothing says otherwise
        return sign, *self._odd(np.where(sign == 0, 1, sign))

    def contrast(self, rows: Rows) -> tuple[int, float]:
        """Of some images together; see :func:`contrast`."""
        middle, noise = self.middle[rows], MIDDLE * self.error[rows]
        # Noise besides the scatter of the images, which one image does not show.
        error = max(float(middle.std()), float(np.sqrt(np.mean(noise**2))), 1e-30)
        z = float(middle.mean() / error * np.sqrt(len(middle)))
        return int(np.sign(z)) * (abs(z) > CERTAIN), z

    def _odd(self, sign: np.ndarray) -> tuple[np.ndarray, bool]:
        """Rows about the opposite of where images lie; whether a valley parts them from those."""
        odd, mixed = [], False
        for rows in self.groups:
            middle = self.middle[rows] * sign[rows]
            usual = np.median(np.abs(middle))
            other = (middle < -usual / 2) & (middle > -1.5 * usual)
            between = np.sum(np.abs(middle) <= usual / 2)
            sure = other & (middle < -CERTAIN * MIDDLE * self.error[rows])
            peak = other.sum() - between > 3 * np.sqrt(other.sum() + between)
            peak |= sure.sum() > 2 * between
            now = bool(peak and other.sum() > MIXED * len(rows))
            odd.append(rows[other if now else sure])
            mixed |= now
        return np.sort(np.concatenate(odd)), mixed


class _Rings:
    """How loud images are at each distance from their centre.

    Attributes
    ----------
    noise : float
        The variance of the quietest rings.
    radius_px : float
        Of the circle that holds the particles, but for what is faint.
    background : (size, size) array of bool
        Those rings.
    signal : (n,) array
        What is louder than that within, over the whole frame.
    """

    def __init__(self, images: np.ndarray) -> None:
        n, size = images.shape[:2]
        radius = imaging.from_middle(size)
        # Rings of equal width out to where a circle still fits; the corners are the last one.
        width = max(1.0, size / 32)
        number = np.minimum(radius / width, size / 2 / width).astype(int)
        count = np.bincount(number.ravel())
        corners = images[:, _corners(radius)]
        # The mean of a frame is known better than that of its corners, which it is above alike.
        level = images.mean(axis=(1, 2), dtype=np.float64)
        above = float(np.mean(level - corners.mean(axis=1, dtype=np.float64)))
        squares = np.zeros((n, len(count)))
        for i, image in enumerate(images):
            square = (image - (level[i] - above)) ** 2
            squares[i] = np.bincount(number.ravel(), square.ravel())
        loud = squares.mean(axis=0) / count
        error = squares.std(axis=0) / count / np.sqrt(n)
        enough = count * n >= 1000 if (count * n >= 1000).any() else count > 0
        quietest = int(np.argmin(np.where(enough, loud, np.inf)))
        # Not to be told from the quietest: by their errors, or by what hardly matters.
        near = loud <= loud[quietest] * (1 + LITTLE) + 2 * np.hypot(error, error[quietest])
        first = last = quietest
        while first > 0 and near[first - 1]:
            first -= 1
        while last + 1 < len(near) and near[last + 1]:
            last += 1
        ring = slice(first, last + 1)
        self.noise = float(squares[:, ring].sum() / n / count[ring].sum())
        if np.mean(np.ptp(corners, axis=1) == 0) > 0.5:  # they have been masked
            self.noise = 0.0
        # The particle ends where hardly any of what it adds in the middle is left.
        faint = np.maximum(FAINT * (loud[:first].max(initial=0) - self.noise), 2 * error)
        beyond = np.flatnonzero(loud[:first] - self.noise < faint[:first])
        middle = int(np.argmax(loud[:first])) if first else 0
        beyond = beyond[beyond > middle]
        self.radius_px = float((beyond[0] + 1 if len(beyond) else first) * width)
        self.background = number >= first
        inside = squares[:, :first] - self.noise * count[:first]
        self.signal = inside.sum(axis=1) / count.sum() - above**2


def contrast(images: np.ndarray) -> tuple[int, float]:
    """Tell whether particles are white on black, as RELION keeps them, or black on white.

    Particles are brighter or darker than what surrounds them, with a CTF too as long as it is under
    focus: the mean of the central disc, a third of the frame across, against that of the corners.

    Parameters
    ----------
    images : (n, size, size) array
        A few hundred for particles that no eye sees.

    Returns
    -------
    sign : {1, -1, 0}
        1: white on black; 0: the two do not differ by five standard errors.
    z : float
        The difference in standard errors.
    """
    images = imaging.check_images(images)
    return ImageStatistics.of(images, np.zeros(len(images), int)).contrast(slice(None))
