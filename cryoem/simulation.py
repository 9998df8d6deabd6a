"""Simulated particles: test images at full sampling, and training images at the network's.

The two come from different paths on purpose. Test images are projected at full sampling, degraded
there, and only then brought to what the network reads
(:class:`~cryoem.preprocessing.Preprocessing`). Training images are
projected at the network's sampling directly, which is an order of magnitude cheaper.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Literal

import numpy as np
from jaxtyping import Float

from . import fourier, imaging, rotations
from .density import Density
from .errors import InputError
from .io import files
from .noise import Noise, coloured
from .particles import CtfParameters, ParticleStack
from .preprocessing import Preprocessing, check_fits
from .projection import Projector, project
from .symmetry import group

#: By what share of the frame an image may still be off its centre when it has been centred.
LITTLE = 0.02

__all__ = ["TrainingImages", "simulate"]

#: Coloured noise for training: its share, its excess at low frequencies, and the length where half
#: of that is left (:func:`cryoem.noise.coloured`).
COLOURED, EXCESS, LENGTH_ANGSTROM = 0.7, (1.0, 40.0), (25.0, 80.0)

#: What JSON can hold of a setting.
Settings = float | str | list[float] | Mapping[str, float] | None


def simulate(
    density: Density,
    n: int,
    seed: int | Sequence[int],
    *,
    snr: float = np.inf,
    max_shift_px: float = 0.0,
    defocus_range_angstrom: tuple[float, float] | None = None,
    noise_excess: float = 0.0,
    coverage: str = "uniform",
) -> ParticleStack:
    """Simulate particle images at the density's own sampling, with the truth about them.

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
    noise_excess : float
        How much louder than the white part the noise is at low frequencies, half of it gone at 40 A
        (:func:`cryoem.noise.coloured`); 0: white. Micrographs have 3 to 30.
    coverage : str
        See :func:`cryoem.rotations.sample`.

    Returns
    -------
    ParticleStack
        With the true poses (:meth:`ParticleStack.without_poses` forgets them), the CTF's parameters
        and the noise.
    """
    if n < 1:
        raise InputError(f"n must be positive, got {n}")
    if not snr > 0:
        raise InputError(f"snr must be positive (infinity for clean images), got {snr}")
    if not 0 <= noise_excess < np.inf:
        raise InputError(f"noise_excess must not be negative, or infinite, got {noise_excess}")
    _check_defocus(defocus_range_angstrom)
    views, moves, noise = (rotations.generator(seed, u) for u in ("views", "shifts", "noise"))
    q = rotations.sample(n, views, coverage)
    images = project(density, q)
    shifts = imaging.triangular_shifts(n, moves, max_shift_px)
    if max_shift_px:
        images = imaging.shift(images, shifts)
    parameters = None
    if defocus_range_angstrom is not None:
        defocus = rotations.generator(seed, "defocus").uniform(*defocus_range_angstrom, n)
        parameters = CtfParameters(defocus)
        values = parameters.values(density.box_px, density.voxel_size_angstrom)
        images = imaging.apply_ctf(images, values)
    variance = 0.0 if np.isinf(snr) else float(images.var()) / snr
    spectrum = None
    if variance and noise_excess:
        spectrum = coloured(variance, noise_excess, 40 / density.voxel_size_angstrom)
        images = images + spectrum.draw(n, density.box_px, noise)
    elif variance:
        spectrum = Noise.white(variance)
        images = imaging.add_noise(images, noise, variance=variance)
    return ParticleStack(
        images,
        density.voxel_size_angstrom,
        quaternions=q,
        shifts_px=shifts,
        ctf_parameters=parameters,
        noise=spectrum,
    )


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
    noise : {'white', 'coloured'} or Noise
        Its spectrum. Coloured: another one for each image, as micrographs have them, from white to
        forty times louder at low frequencies. Images with noise are then whitened, as
        :func:`cryoem.orient` does before a network reads them.
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
        noise: Literal["white", "coloured"] | Noise = "white",
        coverage: str = "uniform",
        symmetry: str = "C1",
    ) -> None:
        if not (isinstance(noise, Noise) or noise in ("white", "coloured")):
            raise InputError(f"noise must be 'white', 'coloured' or a Noise, got {noise!r}")
        _check_ranges(
            snr_range,
            clean_fraction=clean_fraction,
            shifted_fraction=shifted_fraction,
            ctf_fraction=ctf_fraction,
        )
        _check_defocus(defocus_range_angstrom)
        self.preprocessing = preprocessing
        self.snr_range = snr_range
        self.clean_fraction = clean_fraction
        self.max_shift_px = max_shift_px
        self.shifted_fraction = shifted_fraction
        self.defocus_range_angstrom = defocus_range_angstrom
        self.ctf_fraction = ctf_fraction
        self.noise = noise
        self.coverage = coverage
        self.group = group(symmetry)
        self._projector = _projector(density, preprocessing)
        self.density = density
        self._density_sha256 = files.sha256_of([density.values])
        #: Variance of the whole frame's clean images, without and with a CTF.
        self.signal_variance, self.ctf_signal_variance = _signal_variances(
            density, preprocessing, defocus_range_angstrom
        )

    @property
    def settings(self) -> dict[str, Settings]:
        """What a checkpoint must find unchanged to be continued."""
        return {
            "preprocessing": asdict(self.preprocessing),
            "snr_range": list(self.snr_range),
            "clean_fraction": self.clean_fraction,
            "max_shift_px": self.max_shift_px,
            "shifted_fraction": self.shifted_fraction,
            "defocus_range_angstrom": self.defocus_range_angstrom
            and list(self.defocus_range_angstrom),
            "ctf_fraction": self.ctf_fraction,
            "noise": [float(f"{x:.4g}") for x in self.noise.power.mean(axis=0)]
            if isinstance(self.noise, Noise)
            else self.noise,
            "coverage": self.coverage,
            "symmetry": self.group.name,
            "density_sha256": self._density_sha256,
        }

    def centred(self) -> TrainingImages:
        """The same, with every particle in the middle of its image."""
        other = copy.copy(self)
        other.max_shift_px = 0.0
        return other

    def batch(
        self, seed: int, step: int, n: int, *, pairs: Literal["all", "uniform"] = "all"
    ) -> tuple[Float[np.ndarray, "n y x"], Float[np.ndarray, "n f"]]:
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
        q = self._views(rng, n, pairs)
        images = self._projector.project(q)
        images, shifts = self._shifted(rng, images)
        images, signal = self._with_ctf(rng, images)
        images, ratio = self._noisy(rng, images, signal)
        targets = np.concatenate([self.group.features(q), ratio[:, None], shifts], axis=1)
        return imaging.normalise(images), targets.astype(np.float32)

    def _views(self, rng: np.random.Generator, n: int, pairs: str) -> np.ndarray:
        q = rotations.sample(n, rng, self.coverage)
        if pairs == "uniform":
            if n % 2:
                raise InputError(f"pairs='uniform' needs an even batch, got {n}")
            axis = rng.standard_normal((n // 2, 3))
            axis /= np.linalg.norm(axis, axis=1, keepdims=True)
            q[1::2] = rotations.perturb(q[::2], axis * rng.uniform(0, np.pi, (n // 2, 1)))
        elif pairs != "all":
            raise InputError(f"pairs must be 'all' or 'uniform', got {pairs!r}")
        return q

    def _shifted(
        self, rng: np.random.Generator, images: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images moved, and by how much, in their pixels."""
        n, p = len(images), self.preprocessing
        if not self.max_shift_px:
            return images, np.zeros((n, 2))
        shifts = imaging.triangular_shifts(n, rng, self.max_shift_px)
        little = imaging.triangular_shifts(n, rng, min(self.max_shift_px, LITTLE * p.frame_px))
        far = rng.random((n, 1)) < self.shifted_fraction
        shifts = np.where(far, shifts, little) * p.down_px / p.frame_px
        return imaging.shift(images, shifts), shifts

    def _with_ctf(
        self, rng: np.random.Generator, images: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images as flipping the phases of a CTF leaves them, and their frames' signal variance."""
        n, p = len(images), self.preprocessing
        if self.defocus_range_angstrom is None:
            return images, np.full(n, self.signal_variance)
        defocus = rng.uniform(*self.defocus_range_angstrom, n)
        pixel = p.pixel_size_angstrom * p.frame_px / p.down_px
        seen = rng.random(n) < self.ctf_fraction
        values = np.abs(imaging.ctf(p.crop_px, pixel, defocus))
        images = imaging.apply_ctf(images, np.where(seen[:, None, None], values, 1))
        return images, np.where(seen, self.ctf_signal_variance, self.signal_variance)

    def _noisy(
        self, rng: np.random.Generator, images: np.ndarray, signal: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images with noise, and their noise-to-signal ratios."""
        n, p = len(images), self.preprocessing
        ratio = 1 / _log_uniform(rng, self.snr_range, n)
        ratio *= rng.random(n) >= self.clean_fraction
        noisy = ratio > 0
        if self.noise != "white" and noisy.any():
            gain = self._whitening(rng, int(noisy.sum()))
            images[noisy] = imaging.apply_ctf(images[noisy], gain)
        # White noise of variance s2 at full sampling has s2 (down / frame)^2 after down-sampling,
        # on the disc of frequencies that the down-sampling keeps.
        variance = ratio * signal * (p.down_px / p.frame_px) ** 2
        noise = rng.standard_normal(images.shape, dtype=np.float32)
        noise = fourier.low_pass(noise, 2, p.crop_px / 2)
        images += noise * np.sqrt(variance, dtype=np.float32)[:, None, None]
        return images, ratio

    def _whitening(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """What whitening the frame does to what the network reads of ``n`` images."""
        p = self.preprocessing
        k = fourier.radius((p.crop_px, p.crop_px), half=True) / p.crop_px
        k *= p.down_px / p.frame_px  # cycles per pixel of the frame
        if isinstance(self.noise, Noise):
            return self.noise.gain(k).mean(axis=0)
        excess = _log_uniform(rng, EXCESS, n) * (rng.random(n) < COLOURED)
        length = _log_uniform(rng, LENGTH_ANGSTROM, n) / p.pixel_size_angstrom
        # A table of the mean over the frame, which is what its variance is.
        frame = fourier.radius((64, 64)).ravel() / 64
        squares = np.bincount(np.rint(frame * 256).astype(int)) / frame.size
        radii = np.arange(len(squares)) / 256
        mean = (1 / (1 + (length[:, None] * radii) ** 2)) @ squares
        grid = 1 / (1 + (length[:, None, None] * k) ** 2)
        power = (1 + excess[:, None, None] * grid) / (1 + excess * mean)[:, None, None]
        return np.asarray(power**-0.5, np.float32)


def _log_uniform(rng: np.random.Generator, limits: tuple[float, float], n: int) -> np.ndarray:
    return np.exp(rng.uniform(np.log(limits[0]), np.log(limits[1]), n))


def _check_defocus(defocus_range_angstrom: tuple[float, float] | None) -> None:
    if defocus_range_angstrom is not None:
        low, high = defocus_range_angstrom
        if not (low <= high and np.isfinite([low, high]).all()):
            raise InputError(
                f"defocus_range_angstrom must be (low, high), both finite, got {low:g} and {high:g}"
            )


def _check_ranges(snr_range: tuple[float, float], **shares: float) -> None:
    low, high = snr_range
    if not 0 < low <= high:
        raise InputError(f"snr_range must be (low, high), both positive, got {snr_range}")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise InputError(f"{name} must lie in [0, 1], got {share}")


def _projector(density: Density, p: Preprocessing) -> Projector:
    """Projects what the network reads, at its sampling."""
    if density.box_px != p.frame_px:
        raise InputError(f"the density has {density.box_px} voxels, the frame {p.frame_px} px")
    check_fits(density, p.frame_px, p.pixel_size_angstrom)
    # The crop's extent in the density's voxels; integer, so that both samplings agree exactly.
    extent = p.crop_px * p.frame_px / p.down_px
    if extent != int(extent):
        raise InputError(f"crop_px * frame_px / down_px must be whole, got {extent} for {p}")
    return Projector(density.in_box(int(extent)), p.crop_px)


def _signal_variances(
    density: Density, p: Preprocessing, defocus_range_angstrom: tuple[float, float] | None
) -> tuple[float, float]:
    """Variance of whole frames, without and with a CTF."""
    frames = project(density, rotations.grid(64), box_px=p.down_px)
    plain = float(frames.var())
    if defocus_range_angstrom is None:
        return plain, plain
    frames = project(density, rotations.grid(64))
    values = imaging.ctf(
        p.frame_px, p.pixel_size_angstrom, np.linspace(*defocus_range_angstrom, 64)
    )
    return plain, float(imaging.apply_ctf(frames, values).var())
