"""The noise of images: its power at every frequency, as drawn, measured, and undone by whitening.

A microscope's noise is louder where detail is coarse, by a factor of 3 to 30: ice, neighbours and
the detector make it so. Whoever weighs all frequencies alike believes the loudest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.fft
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from . import fourier, rotations
from .errors import InputError
from .imaging import apply_ctf, check_images, from_middle
from .rotations import Seed

__all__ = ["Noise", "background_noise", "coloured", "from_powers"]

#: The frequency of a square's corner, cycles per pixel.
CORNER = 0.5**0.5
#: No shell is taken to be quieter than this share of the mean: nothing is divided by next to none.
QUIETEST = 1e-3
#: Of how few images no spectrum is measured.
FEW = 20
#: How many images are transformed at once.
AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Noise:
    """The noise of a stack's images: Gaussian, with a radial power spectrum.

    Attributes
    ----------
    power : (g, m) array
        Of each optics group, or one row for all, at ``m`` frequencies from 0 to a pixel's corner,
        ``sqrt(1/2)`` cycles per pixel, evenly spaced. In the units of a variance: white noise of
        variance ``v`` per pixel has the power ``v`` everywhere.
    """

    power: Float[np.ndarray, "g m"]

    def __post_init__(self) -> None:
        power = np.atleast_2d(np.asarray(self.power, np.float64))
        if power.ndim != 2 or power.shape[1] < 2 or not (np.isfinite(power) & (power > 0)).all():
            raise InputError(
                f"power must be positive, (groups, frequencies), got shape {power.shape}"
            )
        object.__setattr__(self, "power", power)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Noise) and np.array_equal(self.power, other.power)

    def __hash__(self) -> int:
        return hash(self.power.tobytes())

    @classmethod
    def white(cls, variance: float) -> Noise:
        """Noise of one power everywhere: ``variance`` per pixel."""
        return cls(np.full((1, 2), variance))

    @property
    def is_white(self) -> bool:
        """Whether it is of one power everywhere, in each optics group."""
        return bool((self.power == self.power[:, :1]).all())

    @property
    def frequencies(self) -> Float[np.ndarray, " m"]:
        """Of the columns of ``power``, cycles per pixel."""
        return np.linspace(0, CORNER, self.power.shape[1])

    @cached_property
    def variances(self) -> Float[np.ndarray, " g"]:
        """Per pixel, of each optics group."""
        k = fourier.radius((256, 256)).ravel() / 256
        return self.at(k).mean(axis=1)

    @property
    def variance(self) -> float:
        """Per pixel, the mean of the optics groups."""
        return float(self.variances.mean())

    def at(self, frequencies: np.ndarray, groups: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The power of each optics group at some frequencies, cycles per pixel: (g, ...)."""
        rows = self.power[groups]
        return np.stack([np.interp(frequencies, self.frequencies, row) for row in rows])

    def gain(self, frequencies: np.ndarray, groups: slice | np.ndarray = slice(None)) -> np.ndarray:
        """What whitens the noise and keeps its variance, at frequencies in cycles per pixel.

        One for each optics group, (g, ...); white noise it leaves alone.
        """
        variances = self.variances[groups].reshape(-1, *[1] * np.ndim(frequencies))
        return np.sqrt(variances / self.at(frequencies, groups)).astype(np.float32)

    def whitening(self, box_px: int) -> Float[np.ndarray, "g y x"]:
        """The gain on the half grid of ``rfft2``, (g, box_px, box_px // 2 + 1)."""
        return self.gain(fourier.radius((box_px, box_px), half=True) / box_px)

    def of(self, group: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The row of ``power`` for each particle's optics group."""
        if len(self.power) > 1 and len(group) and group.max() >= len(self.power):
            raise InputError(
                f"optics_group {group.max()}, counted from 0, has no noise: it is known of "
                f"{len(self.power)} groups"
            )
        return group if len(self.power) > 1 else np.zeros_like(group)

    def of_each(self, group: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The variance, per pixel, for each particle's optics group."""
        return self.variances[self.of(group)]

    def for_groups(self, groups: int) -> Noise:
        """The same noise for so many optics groups: those that are missing have the mean power."""
        missing = groups - len(self.power)
        if missing <= 0:
            return self
        mean = np.tile(self.power.mean(axis=0), (missing, 1))
        return Noise(np.concatenate([self.power, mean]))

    def draw(
        self, n: int, box_px: int, seed: Seed, *, group: ArrayLike = 0
    ) -> Float[np.ndarray, "n y x"]:
        """Draw images of noise, (n, box_px, box_px) float32."""
        rng = rotations.generator(seed, "noise")
        images = rng.standard_normal((n, box_px, box_px), dtype=np.float32)
        k = fourier.radius((box_px, box_px), half=True) / box_px
        groups, of = np.unique(self.of(np.broadcast_to(group, n)), return_inverse=True)
        root = np.sqrt(self.at(k, groups)).astype(np.float32)
        return apply_ctf(images, root if len(groups) == 1 else root[of])


def coloured(variance: float, excess: float, length_px: float, *, frequencies: int = 64) -> Noise:
    """Noise that is louder at low frequencies: ``1 + excess / (1 + (length k)^2)``, scaled.

    Parameters
    ----------
    variance : float
        Per pixel.
    excess : float
        How much louder than the white part it is at frequency 0; micrographs lie between 3 and 30.
    length_px : float
        Where half of the excess is left, 40 A or so, in pixels.
    """
    k = np.linspace(0, CORNER, frequencies)
    shape = Noise(1 + excess / (1 + (length_px * k) ** 2))
    return Noise(shape.power * (variance / shape.variance))


def from_powers(shells: Float[np.ndarray, "g s"], box_px: int) -> Noise:
    """Noise of these powers at the shells 0, 1, 2, ... cycles per box; the last one beyond them."""
    shells = np.atleast_2d(shells)
    k = np.arange(shells.shape[1]) / box_px
    new = np.linspace(0, CORNER, int(np.ceil(box_px * CORNER)) + 1)
    power = np.stack([np.interp(new, k, row) for row in shells])
    return Noise(np.maximum(power, QUIETEST * power.mean(axis=1, keepdims=True)))


def background_noise(
    images: ArrayLike, background: Float[np.ndarray, "y x"], *, group: ArrayLike = 0
) -> Noise:
    """Measure the noise where no particle reaches: outside a circle, say.

    By the autocorrelation of the background, which asks for no whole image, to lags of a quarter of
    the box; finer features of the spectrum than four shells are smoothed away.

    Parameters
    ----------
    images : (n, size, size) array
        Some hundreds.
    background : (size, size) array of bool
        True where there is noise alone.
    group : (n,) int array, or 0
        Each image's optics group. A group of hardly any images is given the noise of all.

    Returns
    -------
    Noise
    """
    images = check_images(images)
    n, size = images.shape[:2]
    background = np.asarray(background, bool)
    if background.shape != (size, size) or background.sum() < 4:
        raise InputError(f"the background must hold some pixels of {size} x {size}")
    group = np.broadcast_to(np.asarray(group, int), n)
    padded, mask = (2 * size, 2 * size), background.astype(np.float32)
    sums = np.zeros((group.max() + 1, 2 * size, size + 1))
    for i in range(0, n, AT_ONCE):
        part = images[i : i + AT_ONCE]
        level = part[:, background].mean(axis=1)
        spectrum = scipy.fft.rfft2((part - level[:, None, None]) * mask, s=padded)
        for g in np.unique(group[i : i + AT_ONCE]):
            here = spectrum[group[i : i + AT_ONCE] == g]
            sums[g] += np.sum(here.real**2 + here.imag**2, axis=0)
    count = np.bincount(group)
    few = count < min(n, FEW)
    sums = np.where(few[:, None, None], sums.sum(axis=0), sums)
    count = np.where(few, n, count)
    pairs = _rolled(np.abs(scipy.fft.rfft2(mask, s=padded)) ** 2, size)
    taper = 0.5 * (1 + np.cos(np.pi * np.minimum(from_middle(size) / (size / 4), 1)))
    seen = np.where(pairs > 0.5, taper, 0)
    shells = np.rint(fourier.radius((size, size))).astype(int).ravel()
    powers = []
    for total, m in zip(sums, count, strict=True):
        correlation = seen * _rolled(total / m, size) / np.maximum(pairs, 0.5)
        # Each image's level was taken from the same pixels: that lowers all correlations alike.
        missing = np.sum(pairs * correlation) / (mask.sum() ** 2 - np.sum(pairs * seen))
        spectrum = scipy.fft.fft2(scipy.fft.ifftshift(correlation + missing * seen)).real
        powers.append(np.bincount(shells, spectrum.ravel()) / np.bincount(shells))
    return from_powers(np.stack(powers), size)


def _rolled(power: np.ndarray, size: int) -> np.ndarray:
    """The correlation that belongs to a power on twice the grid, to lags of half the box."""
    correlation = scipy.fft.fftshift(scipy.fft.irfft2(power, s=(2 * size, 2 * size)))
    return fourier.crop_or_pad(correlation, (size, size))
