"""Simulated particles: test images at full sampling, and training images at the network's.

The two come from different paths on purpose. Test images are projected at full sampling, degraded
there, and only then brought to what the network reads (:class:`Preprocessing`). Training images are
projected at the network's sampling directly, which is an order of magnitude cheaper.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from . import fourier, imaging, rotations
from .density import Density
from .errors import InputError
from .projection import Projector, check_images, project
from .symmetry import group

#: By what share of the frame an image may still be off its centre when it has been centred.
LITTLE = 0.02

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
    defocus_angstrom : (n,) array or None
        Positive underfocus, no astigmatism; None: images without a CTF.
    """

    images: np.ndarray
    quaternions: np.ndarray
    shifts_px: np.ndarray
    noise_variance: float
    pixel_size_angstrom: float
    defocus_angstrom: np.ndarray | None = None

    def ctf(self) -> np.ndarray | None:
        """The images' CTF, (n, size, size // 2 + 1), or None."""
        if self.defocus_angstrom is None:
            return None
        return imaging.ctf(self.images.shape[1], self.pixel_size_angstrom, self.defocus_angstrom)


def particles(
    density: Density,
    n: int,
    seed: int | Sequence[int],
    *,
    snr: float = np.inf,
    max_shift_px: float = 0.0,
    defocus_range_angstrom: tuple[float, float] | None = None,
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
        Variance of the images as they would be without noise (CTF included) over the noise's, over
        the whole frame; infinity for clean images.
    max_shift_px : float
        Shifts follow the paper's triangular law up to this.
    defocus_range_angstrom : (low, high), optional
        Draw a defocus for each image, uniformly, and apply its CTF (300 kV, 2.7 mm, amplitude
        contrast 0.1).
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
    defocus = None
    if defocus_range_angstrom is not None:
        defocus = rotations.stream(seed, "defocus").uniform(*defocus_range_angstrom, n)
        values = imaging.ctf(density.box_px, density.voxel_size_angstrom, defocus)
        images = imaging.apply_ctf(images, values)
    variance = 0.0 if np.isinf(snr) else float(images.var()) / snr
    if variance:
        images = imaging.add_noise(images, noise, variance=variance)
    return Particles(images, q, shifts, variance, density.voxel_size_angstrom, defocus)


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

    def __call__(self, images: ArrayLike, *, ctf: np.ndarray | None = None) -> np.ndarray:
        """Prepare (n, frame_px, frame_px) images: (n, crop_px, crop_px) float32."""
        return self.cut(self.reduce(images, ctf=ctf))

    def reduce(self, images: ArrayLike, *, ctf: np.ndarray | None = None) -> np.ndarray:
        """Flip phases where a CTF is given, and down-sample: (n, down_px, down_px) float32.

        ``ctf``, (n, frame_px, frame_px // 2 + 1): see :func:`cryoem.imaging.ctf`.
        """
        images = check_images(images)
        if images.shape[1] != self.frame_px:
            raise InputError(
                f"wanted images of {self.frame_px} px "
                f"({self.pixel_size_angstrom} A each), got {images.shape[1]} px"
            )
        if ctf is not None and len(ctf) != len(images):
            raise InputError(f"wanted a CTF for each of {len(images)} images, got {len(ctf)}")
        small = np.empty((len(images), self.down_px, self.down_px), np.float32)
        for i in range(0, len(images), 512):  # transforms of 512 frames at once are enough
            part = images[i : i + 512]
            if ctf is not None:
                part = imaging.flip_phases(part, ctf[i : i + 512])
            small[i : i + 512] = imaging.downsample(part, self.down_px)
        return small

    def cut(self, small: np.ndarray, *, shifts_px: np.ndarray | None = None) -> np.ndarray:
        """Centre what :meth:`reduce` gave by undoing shifts (pixels of it), crop and normalise."""
        if shifts_px is not None:
            small = imaging.shift(small, -shifts_px)
        return imaging.normalise(imaging.crop(small, self.crop_px))


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
        Pixels of the full frame. Some images are shifted by the triangular law up to this, the
        others by a little (2 % of the frame at most): these are what a network sees after it has
        centred an image by its own estimate.
    shifted_fraction : float
        The share of the former, from which only the shift has to be learned.
    defocus_range_angstrom : (low, high), optional
        Draw a defocus for each image and apply the absolute value of its CTF, which is what
        flipping phases leaves of it.
    ctf_fraction : float
        The share of images with a CTF, where there is a range of defocus.
    coverage : str
        See :func:`cryoem.rotations.sample`.
    symmetry : str
        The density's point group: what is to be learned are the features of its orbits.
    """

    def __init__(
        self,
        density: Density,
        preprocessing: Preprocessing,
        *,
        snr_range: tuple[float, float] = (1 / 64, 1.0),
        clean_fraction: float = 0.3,
        max_shift_px: float = 0.0,
        shifted_fraction: float = 0.5,
        defocus_range_angstrom: tuple[float, float] | None = None,
        ctf_fraction: float = 0.5,
        coverage: str = "uniform",
        symmetry: str = "C1",
    ) -> None:
        p = preprocessing
        low, high = snr_range
        if not 0 < low <= high:
            raise InputError(f"snr_range must be (low, high), both positive, got {snr_range}")
        for name, share in (
            ("clean_fraction", clean_fraction),
            ("shifted_fraction", shifted_fraction),
            ("ctf_fraction", ctf_fraction),
        ):
            if not 0 <= share <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {share}")
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
        self.shifted_fraction = shifted_fraction
        self.defocus_range_angstrom = defocus_range_angstrom
        self.ctf_fraction = ctf_fraction
        self.coverage = coverage
        self.group = group(symmetry)
        self._projector = Projector(density.in_box(int(extent)), p.crop_px)
        frames = project(density, rotations.grid(64), box_px=p.down_px)
        #: Variance of the whole frame's clean images, without and with a CTF.
        self.signal_variance = float(frames.var())
        self.ctf_signal_variance = self.signal_variance
        if defocus_range_angstrom is not None:
            frames = project(density, rotations.grid(64))
            defocus = np.linspace(*defocus_range_angstrom, 64)
            values = imaging.ctf(p.frame_px, p.pixel_size_angstrom, defocus)
            self.ctf_signal_variance = float(imaging.apply_ctf(frames, values).var())
        #: What a checkpoint must find unchanged to be continued.
        self.settings = {
            "preprocessing": asdict(p),
            "snr_range": list(snr_range),
            "clean_fraction": clean_fraction,
            "max_shift_px": max_shift_px,
            "shifted_fraction": shifted_fraction,
            "defocus_range_angstrom": defocus_range_angstrom and list(defocus_range_angstrom),
            "ctf_fraction": ctf_fraction,
            "coverage": coverage,
            "symmetry": self.group.name,
            "signal_variance": float(f"{self.signal_variance:.5g}"),
        }

    def centred(self) -> TrainingImages:
        """The same, with every particle in the middle of its image."""
        other = copy.copy(self)
        other.max_shift_px = 0.0
        other.settings = {**self.settings, "max_shift_px": 0.0}
        return other

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
        targets : (n, f + 3) float32 array
            The group's features of the orientation (:meth:`cryoem.symmetry.Group.features`), the
            noise-to-signal ratio, 1 / SNR, and the shift (x, y), in pixels of what the network
            reads.
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
        shifts = np.zeros((n, 2))
        if self.max_shift_px:
            shifts = imaging.triangular_shifts(n, rng, self.max_shift_px)
            little = imaging.triangular_shifts(n, rng, min(self.max_shift_px, LITTLE * p.frame_px))
            far = rng.random((n, 1)) < self.shifted_fraction
            shifts = np.where(far, shifts, little) * p.down_px / p.frame_px
            images = imaging.shift(images, shifts)
        signal = np.full(n, self.signal_variance)
        if self.defocus_range_angstrom is not None:
            defocus = rng.uniform(*self.defocus_range_angstrom, n)
            pixel = p.pixel_size_angstrom * p.frame_px / p.down_px
            seen = (rng.random(n) < self.ctf_fraction)[:, None, None]
            values = np.abs(imaging.ctf(p.crop_px, pixel, defocus))
            images = imaging.apply_ctf(images, np.where(seen, values, 1))
            signal = np.where(seen[:, 0, 0], self.ctf_signal_variance, signal)
        low, high = np.log(self.snr_range)
        # White noise of variance s2 at full sampling has s2 (down / frame)^2 after down-sampling,
        # on the disc of frequencies that the down-sampling keeps.
        ratio = 1 / np.exp(rng.uniform(low, high, n))
        ratio *= rng.random(n) >= self.clean_fraction
        variance = ratio * signal * (p.down_px / p.frame_px) ** 2
        noise = rng.standard_normal(images.shape, dtype=np.float32)
        noise = fourier.low_pass(noise, 2, p.crop_px / 2)
        images += noise * np.sqrt(variance, dtype=np.float32)[:, None, None]
        targets = np.concatenate([self.group.features(q), ratio[:, None], shifts], axis=1)
        return imaging.normalise(images), targets.astype(np.float32)
