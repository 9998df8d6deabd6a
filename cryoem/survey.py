"""What a set of particles says of how it was imaged: contrast, noise, shifts, defocus.

Training for it takes its ranges from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import projection, rotations
from .errors import InputError
from .rotations import Seed

if TYPE_CHECKING:
    from .density import Density
    from .star import ParticleSet

__all__ = ["Survey", "contrast", "preprocessing_for", "survey"]

#: Standard errors at which a sign, or a signal, is believed.
CERTAIN = 5.0


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

    def training(self) -> dict[str, Any]:
        """Ranges for :class:`cryoem.simulation.TrainingImages`, wider than what was seen.

        SNR from a quarter of the mean to four times it: single particles differ by their thickness
        of ice. Shifts are those of the file, and at least 2 px, for what centred particles by is
        known to a pixel or two. No image is clean.
        """
        snr = max(self.snr, self.snr_error)
        found: dict[str, Any] = {
            "snr_range": (snr / 4, snr * 4),
            "clean_fraction": 0.0,
            "max_shift_px": max(2.0, self.max_shift_px),
        }
        if self.defocus_range_angstrom is not None:
            found["defocus_range_angstrom"] = self.defocus_range_angstrom
            found["ctf_fraction"] = 1.0
        return found


def survey(particles: ParticleSet, *, images: int = 1000, seed: Seed = 0) -> Survey:
    """Look at some images, drawn at random, and at every row of the file.

    The noise is what varies outside the circle that the frame holds, where no particle reaches; the
    signal is what the whole frame varies beyond that. So the background must be flat, as after
    RELION's extraction, and the noise of one strength all over the frame. At SNR 1/100 a thousand
    images of 116 px tell the SNR to about a tenth of it.

    Parameters
    ----------
    particles : ParticleSet
    images : int
        How many to look at, at most all.
    seed : int or numpy.random.Generator

    Returns
    -------
    Survey
    """
    n = len(particles)
    rows = np.sort(rotations.stream(seed, "survey").choice(n, min(images, n), replace=False))
    seen = particles.images[rows]
    sign, _ = contrast(seen)
    outside = _radius(particles.box_px) > particles.box_px / 2
    noise = seen[:, outside].var(axis=1, dtype=np.float64)
    whole = seen.var(axis=(1, 2), dtype=np.float64)
    ratio = (whole - noise) / noise.mean()
    parameters = particles.ctf_parameters
    defocus = None
    if parameters is not None:
        mean = (parameters["defocus_u_angstrom"] + parameters["defocus_v_angstrom"]) / 2
        defocus = (float(mean.min()), float(mean.max()))
    return Survey(
        images=len(rows),
        contrast={1: "white on black", -1: "black on white", 0: "not to be told"}[sign],
        noise_variance=float(noise.mean()),
        snr=float(ratio.mean()),
        snr_error=float(ratio.std() / np.sqrt(len(rows))),
        max_shift_px=float(np.abs(particles.shifts_px).max()),
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
    images = projection.check_images(images)
    radius, size = _radius(images.shape[1]), images.shape[1]
    inner, outer = radius < size / 6, radius > size / 2
    difference = images[:, inner].mean(axis=1) - images[:, outer].mean(axis=1)
    # Noise of the pixels besides the scatter of the images, which one image does not show.
    scatter = images[:, outer].std() * np.sqrt(1 / inner.sum() + 1 / outer.sum())
    error = max(float(difference.std()), float(scatter)) / np.sqrt(len(images))
    z = float(difference.mean()) / max(error, 1e-30)
    return int(np.sign(z)) * (abs(z) > CERTAIN), z


def preprocessing_for(density: Density, *, max_shift_px: float = 0.0, crop_px: int = 40) -> Any:
    """Find the window that holds a density and its shifts, and brings it down to few pixels.

    Parameters
    ----------
    density : Density, a cube
    max_shift_px : float
    crop_px : int
        The most pixels that the network is to read; fewer where that makes the sampling exact.

    Returns
    -------
    cryoem.simulation.Preprocessing
    """
    from .simulation import Preprocessing

    frame = density.box_px
    axis = np.arange(frame) - frame // 2
    far = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    solid = density.values > 0.05 * density.values.max()
    if not solid.any():
        raise InputError("a density without a voxel above zero has no extent")
    wanted = min(frame, int(np.ceil(2 * (far[solid].max() + max_shift_px + 1))))
    for crop in range(min(crop_px, frame), 1, -1):
        for extent in range(max(wanted, crop), frame + 1):
            # crop / extent = down / frame, all whole: both samplings then agree exactly.
            if crop * frame % extent == 0:
                down = crop * frame // extent
                return Preprocessing(frame, down, crop, density.voxel_size_angstrom)
    raise AssertionError("the whole frame always fits")


def _radius(size: int) -> np.ndarray:
    axis = np.arange(size) - size // 2
    return np.hypot(axis[:, None], axis)
