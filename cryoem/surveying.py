"""What a set of particles says of how it was imaged: contrast, noise, shifts, defocus.

Training for it takes its ranges from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from . import imaging, rotations
from .particles import ParticleStack
from .rotations import Seed

__all__ = ["Survey", "TrainingRanges", "contrast", "survey"]

#: Standard errors at which a sign, or a signal, is believed.
CERTAIN = 5.0


class TrainingRanges(TypedDict, total=False):
    """Ranges for :class:`cryoem.simulation.TrainingImages`, whose parameters say what they are."""

    snr_range: tuple[float, float]
    clean_fraction: float
    max_shift_px: float
    defocus_range_angstrom: tuple[float, float]
    ctf_fraction: float


@dataclass(frozen=True)
class Survey:
    """How particles were imaged.

    Attributes
    ----------
    images : int
        How many were looked at.
    contrast : {'white on black', 'black on white', 'not to be told'}
    noise_variance : float
        Per pixel, mean over the images.
    snr : float
        (Variance of the whole frame - noise variance) / noise variance.
    snr_error : float
        Its standard error over the images.
    max_shift_px : float
        The largest component of any particle's shift; 0 where the file says none.
    defocus_range_angstrom : (low, high) or None
        Of all particles; None where the file has no defocus.
    """

    images: int
    contrast: str
    noise_variance: float
    snr: float
    snr_error: float
    max_shift_px: float
    defocus_range_angstrom: tuple[float, float] | None

    def training(self) -> TrainingRanges:
        """Ranges for :class:`cryoem.simulation.TrainingImages`, wider than what was seen.

        SNR from a quarter of the mean to four times it: single particles differ by their thickness
        of ice. Shifts are those of the file, and at least 2 px, for what centred particles by is
        known to a pixel or two. No image is clean.
        """
        snr = max(self.snr, self.snr_error)
        found: TrainingRanges = {
            "snr_range": (snr / 4, snr * 4),
            "clean_fraction": 0.0,
            "max_shift_px": max(2.0, self.max_shift_px),
        }
        if self.defocus_range_angstrom is not None:
            found["defocus_range_angstrom"] = self.defocus_range_angstrom
            found["ctf_fraction"] = 1.0
        return found


def survey(stack: ParticleStack, *, images: int = 1000, seed: Seed = 0) -> Survey:
    """Look at some images, drawn at random, and at what is known of all particles.

    The noise is what varies outside the circle that the frame holds, where no particle reaches; the
    signal is what the whole frame varies beyond that. So the background must be flat, as after
    RELION's extraction, and the noise of one strength all over the frame. At SNR 1/100 a thousand
    images of 116 px tell the SNR to about a tenth of it.

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
    sign, _ = contrast(seen)
    outside = _radius(stack.box_px) > stack.box_px / 2
    noise = seen[:, outside].var(axis=1, dtype=np.float64)
    whole = seen.var(axis=(1, 2), dtype=np.float64)
    ratio = (whole - noise) / noise.mean()
    parameters = stack.ctf_parameters
    defocus = None
    if parameters is not None:
        mean = (parameters.defocus_u_angstrom + parameters.defocus_v_angstrom) / 2
        defocus = (float(mean.min()), float(mean.max()))
    return Survey(
        images=len(rows),
        contrast={1: "white on black", -1: "black on white", 0: "not to be told"}[sign],
        noise_variance=float(noise.mean()),
        snr=float(ratio.mean()),
        snr_error=float(ratio.std() / np.sqrt(len(rows))),
        max_shift_px=float(np.abs(stack.shifts_px).max()),
        defocus_range_angstrom=defocus,
    )


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
    radius, size = _radius(images.shape[1]), images.shape[1]
    inner, outer = radius < size / 6, radius > size / 2
    difference = images[:, inner].mean(axis=1) - images[:, outer].mean(axis=1)
    # Noise of the pixels besides the scatter of the images, which one image does not show.
    scatter = images[:, outer].std() * np.sqrt(1 / inner.sum() + 1 / outer.sum())
    error = max(float(difference.std()), float(scatter)) / np.sqrt(len(images))
    z = float(difference.mean()) / max(error, 1e-30)
    return int(np.sign(z)) * (abs(z) > CERTAIN), z


def _radius(size: int) -> np.ndarray:
    axis = np.arange(size) - size // 2
    return np.hypot(axis[:, None], axis)
