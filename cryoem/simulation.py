"""Simulated particles: test images at full sampling, and training images at the network's.

The two come from different paths on purpose. Test images are projected at full sampling, degraded
there, and only then brought to what the network reads (:class:`Preprocessing`). Training images are
projected at the network's sampling directly, which is an order of magnitude cheaper.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from . import fourier, imaging, rotations
from .density import Density
from .errors import InputError
from .projection import Projector, check_images, project

__all__ = ["Particles", "Preprocessing", "TrainingImages", "particles"]


@dataclass(frozen=True)
class Particles:
    """Simulated images and the truth about them.

    Attributes
    ----------
    images : (n, size, size) float32 array
    quaternions : (n, 4) array, unit, xyzw
    shifts_px : (n, 2) array, pixels
        Where the particle was moved to, (x, y); what centres it is the opposite.
    noise_variance : float
    pixel_size_angstrom : float
    """

    images: np.ndarray
    quaternions: np.ndarray
    shifts_px: np.ndarray
    noise_variance: float
    pixel_size_angstrom: float


def particles(
    density: Density,
    n: int,
    seed: int | Sequence[int],
    *,
    snr: float = np.inf,
    max_shift_px: float = 0.0,
    coverage: str = "uniform",
) -> Particles:
    """Simulate particle images at the density's own sampling.

    Parameters
    ----------
    density : Density, a cube
    n : int
    seed : int
        Orientations depend on it alone, so that one seed under several SNR shows the same views.
    snr : float
        Infinity for clean images.
    max_shift_px : float
        Shifts follow the paper's triangular law up to this.
    coverage : str
        See :func:`cryoem.rotations.sample`.

    Returns
    -------
    Particles
    """
    if n < 1:
        raise InputError(f"n must be positive, got {n}")
    if not snr > 0:
        raise InputError(f"snr must be positive (infinity for clean images), got {snr}")
    views, moves, noise = (rotations.stream(seed, use) for use in ("views", "shifts", "noise"))
    q = rotations.sample(n, views, coverage)
    images = project(density, q)
    shifts = imaging.triangular_shifts(n, moves, max_shift_px)
    if max_shift_px:
        images = imaging.shift(images, shifts)
    variance = 0.0 if np.isinf(snr) else float(images.var()) / snr
    if variance:
        images = imaging.add_noise(images, noise, variance=variance)
    return Particles(images, q, shifts, variance, density.voxel_size_angstrom)


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the network reads it.

    Down-sample the frame of ``frame_px`` to ``down_px``, cut out the central ``crop_px``, bring to
    mean 0 and standard deviation 1.

    Attributes
    ----------
    frame_px : int
    down_px : int
    crop_px : int
    pixel_size_angstrom : float
        Of the frame.
    """

    frame_px: int
    down_px: int
    crop_px: int
    pixel_size_angstrom: float

    def __post_init__(self) -> None:
        if not 2 <= self.crop_px <= self.down_px <= self.frame_px:
            raise InputError(f"wanted 2 <= crop_px <= down_px <= frame_px, got {self}")

    def __call__(self, images: ArrayLike) -> np.ndarray:
        """Prepare (n, frame_px, frame_px) images: (n, crop_px, crop_px) float32."""
        images = check_images(images)
        if images.shape[1] != self.frame_px:
            raise InputError(
                f"wanted images of {self.frame_px} px "
                f"({self.pixel_size_angstrom} A each), got {images.shape[1]} px"
            )
        small = np.empty((len(images), self.crop_px, self.crop_px), np.float32)
        for i in range(0, len(images), 512):  # transforms of 512 frames at once are enough
            part = imaging.downsample(images[i : i + 512], self.down_px)
            small[i : i + 512] = imaging.crop(part, self.crop_px)
        return imaging.normalise(small)


class TrainingImages:
    """An endless source of fresh training images; a batch depends on (seed, step) alone.

    Parameters
    ----------
    density : Density, a cube of ``preprocessing.frame_px``
    preprocessing : Preprocessing
    snr_range : (low, high)
        SNR of the full frame, log-uniform image by image.
    clean_fraction : float
        The share of images without noise.
    max_shift_px : float
        Pixels of the full frame; triangular law.
    coverage : str
        See :func:`cryoem.rotations.sample`.
    """

    def __init__(
        self,
        density: Density,
        preprocessing: Preprocessing,
        *,
        snr_range: tuple[float, float] = (1 / 64, 1.0),
        clean_fraction: float = 0.3,
        max_shift_px: float = 0.0,
        coverage: str = "uniform",
    ) -> None:
        p = preprocessing
        low, high = snr_range
        if not 0 < low <= high:
            raise InputError(f"snr_range must be (low, high), both positive, got {snr_range}")
        if not 0 <= clean_fraction <= 1:
            raise InputError(f"clean_fraction must lie in [0, 1], got {clean_fraction}")
        if density.box_px != p.frame_px:
            raise InputError(f"the density has {density.box_px} voxels, the frame {p.frame_px} px")
        # The crop's extent in the density's voxels; integer, so that both samplings agree exactly.
        extent = p.crop_px * p.frame_px / p.down_px
        if extent != int(extent):
            raise InputError(f"crop_px * frame_px / down_px must be whole, got {extent} for {p}")
        self.preprocessing = p
        self.snr_range = snr_range
        self.clean_fraction = clean_fraction
        self.max_shift_px = max_shift_px
        self.coverage = coverage
        self._projector = Projector(density.in_box(int(extent)), p.crop_px)
        frames = project(density, rotations.grid(64), box_px=p.down_px)
        self.signal_variance = float(frames.var())
        #: What a checkpoint must find unchanged to be continued.
        self.settings = {
            "preprocessing": asdict(p),
            "snr_range": list(snr_range),
            "clean_fraction": clean_fraction,
            "max_shift_px": max_shift_px,
            "coverage": coverage,
            "signal_variance": float(f"{self.signal_variance:.5g}"),
        }

    def batch(
        self, seed: int, step: int, n: int, *, pairs: Literal["all", "uniform"] = "all"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw a batch.

        Parameters
        ----------
        seed, step, n : int
        pairs : {'all', 'uniform'}
            Independent orientations; or, as the paper samples, consecutive pairs (0, 1), (2, 3),
            ... whose distances are uniform over [0, pi].

        Returns
        -------
        images : (n, crop_px, crop_px) float32 array
        quaternions : (n, 4) float32 array
        """
        rng = np.random.default_rng([seed, step])
        p = self.preprocessing
        q = rotations.sample(n, rng, self.coverage)
        if pairs == "uniform":
            if n % 2:
                raise InputError(f"pairs='uniform' needs an even batch, got {n}")
            axis = rng.standard_normal((n // 2, 3))
            axis /= np.linalg.norm(axis, axis=1, keepdims=True)
            q[1::2] = rotations.perturb(q[::2], axis * rng.uniform(0, np.pi, (n // 2, 1)))
        elif pairs != "all":
            raise InputError(f"pairs must be 'all' or 'uniform', got {pairs!r}")
        images = self._projector.project(q)
        if self.max_shift_px:
            shifts = imaging.triangular_shifts(n, rng, self.max_shift_px) * p.down_px / p.frame_px
            images = imaging.shift(images, shifts)
        low, high = np.log(self.snr_range)
        # White noise of variance s2 at full sampling has s2 (down / frame)^2 after down-sampling,
        # on the disc of frequencies that the down-sampling keeps.
        variance = self.signal_variance / np.exp(rng.uniform(low, high, n))
        variance *= (p.down_px / p.frame_px) ** 2 * (rng.random(n) >= self.clean_fraction)
        noise = rng.standard_normal(images.shape, dtype=np.float32)
        noise = fourier.low_pass(noise, 2, p.crop_px / 2)
        images += noise * np.sqrt(variance, dtype=np.float32)[:, None, None]
        return imaging.normalise(images), q.astype(np.float32)
