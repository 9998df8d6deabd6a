"""Judging a map: Fourier shell correlation, resolution, registration onto a reference."""

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike
from scipy import ndimage
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from . import fourier, rotations
from .density import Density
from .errors import InputError

__all__ = ["Fsc", "Registration", "Resolution", "fsc", "mirrored", "register", "turned"]


@dataclass(frozen=True)
class Resolution:
    """Where an FSC curve falls below a threshold.

    Attributes
    ----------
    angstrom : float
    nyquist_limited : bool
        The curve never falls below; ``angstrom`` is Nyquist.
    """

    angstrom: float
    nyquist_limited: bool


@dataclass(frozen=True)
class Fsc:
    """Fourier shell correlation of two maps.

    Attributes
    ----------
    frequencies : (k,) array, 1/angstrom
        Of the shells 1, 2, ... below Nyquist.
    values : (k,) array
    nyquist : float, 1/angstrom, optional
        Where the curve ends; default: its last shell.
    """

    frequencies: np.ndarray
    values: np.ndarray
    nyquist: float | None = None

    @property
    def mean(self) -> float:
        """Mean over the shells up to Nyquist."""
        return float(self.values.mean())

    def resolution(self, threshold: float) -> Resolution:
        """Resolution at the first crossing of ``threshold``, linearly interpolated."""
        below = np.flatnonzero(self.values < threshold)
        if len(below) == 0:
            return Resolution(float(1 / (self.nyquist or self.frequencies[-1])), True)
        i = below[0]
        if i == 0:
            return Resolution(float(1 / self.frequencies[0]), False)
        f0, f1 = self.frequencies[i - 1 : i + 1]
        v0, v1 = self.values[i - 1 : i + 1]
        return Resolution(float(1 / (f0 + (v0 - threshold) / (v0 - v1) * (f1 - f0))), False)


def _common_box(a: Density, b: Density) -> int:
    n = a.box_px
    if b.box_px != n or not np.isclose(a.voxel_size_angstrom, b.voxel_size_angstrom, rtol=1e-3):
        raise InputError(
            f"two maps must share box and voxel size, got {n} x {a.voxel_size_angstrom} A "
            f"and {b.box_px} x {b.voxel_size_angstrom} A"
        )
    return n


def fsc(a: Density, b: Density) -> Fsc:
    """Fourier shell correlation, shell by shell of ``round(|k|)``.

    ``Re sum(F1* F2) / sqrt(sum |F1|^2 sum |F2|^2)`` (Harauz and van Heel, Optik 73 (1986)). No mask
    is applied, nothing is aligned.

    Parameters
    ----------
    a, b : Density, cubes of the same box and voxel size

    Returns
    -------
    Fsc
    """
    n = _common_box(a, b)
    f1, f2 = (scipy.fft.rfftn(d.values, workers=fourier.WORKERS) for d in (a, b))
    shell = np.rint(fourier.radius((n,) * 3, half=True)).astype(int)
    # A half grid holds every other frequency twice; both halves give the same real part.
    weight = np.full(f1.shape, 2.0, np.float32)
    weight[..., 0] = 1
    if n % 2 == 0:
        weight[..., -1] = 1

    def total(x: np.ndarray) -> np.ndarray:
        return np.bincount(shell.ravel(), (weight * x).ravel())[1 : (n + 1) // 2]

    cross = total((np.conj(f1) * f2).real)
    power = np.sqrt(total(np.abs(f1) ** 2) * total(np.abs(f2) ** 2))
    values = np.divide(cross, power, out=np.zeros_like(cross), where=power > 0)
    shells = np.arange(1, (n + 1) // 2)
    voxel = a.voxel_size_angstrom
    return Fsc(shells / (n * voxel), values, 1 / (2 * voxel))


# --------------------------------------------------------------------------------------
# Moving maps


def mirrored(density: Density) -> Density:
    """Mirror image ``V(-r)`` about the origin voxel."""
    values = density.values
    for axis in range(3):
        values = np.flip(values, axis)
        if density.values.shape[axis] % 2 == 0:
            values = np.roll(values, 1, axis)
    return Density(values, density.voxel_size_angstrom)


def _transform(values: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Transform of a cube at frequencies (m, 3), xyz, cycles per box; complex (m,)."""
    import finufft

    n = values.shape[0]
    z, y, x = (np.ascontiguousarray(2 * np.pi / n * k[:, a], np.float32) for a in (2, 1, 0))
    volume = np.ascontiguousarray(values, np.complex64)
    return finufft.nufft3d2(z, y, x, volume, eps=1e-5, isign=-1)


class _Spectrum:
    """A cube's transform, interpolated: coarse and quick, for searches only."""

    def __init__(self, values: np.ndarray) -> None:
        self.n = values.shape[0]
        padded = fourier.crop_or_pad(values, (2 * self.n,) * 3)
        f = scipy.fft.fftshift(scipy.fft.fftn(scipy.fft.ifftshift(padded), workers=fourier.WORKERS))
        self._linear = [f.real.copy(), f.imag.copy()]
        self._cubic = [ndimage.spline_filter(part, output=np.float32) for part in self._linear]

    def at(self, k: np.ndarray, *, quick: bool = False) -> np.ndarray:
        """Transform at frequencies (..., 3), xyz, cycles per box."""
        at = np.moveaxis(2 * k[..., ::-1] + self.n, -1, 0)
        parts, order = (self._linear, 1) if quick else (self._cubic, 3)
        real, imaginary = (
            ndimage.map_coordinates(part, at, order=order, prefilter=False) for part in parts
        )
        return real + 1j * imaginary


def _half_ball(n: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Indices and (m, 3) frequencies, xyz, of a half grid within Nyquist."""
    inside = np.nonzero(fourier.radius((n,) * 3, half=True) < n / 2)
    f = fourier.frequencies(n)
    return inside, np.stack([inside[2].astype(float), f[inside[1]], f[inside[0]]], axis=1)


def turned(
    density: Density, quaternion: ArrayLike, shift_angstrom: ArrayLike = (0.0, 0.0, 0.0)
) -> Density:
    """Turn a density by ``A`` and then move it: ``V(A^-1 (r - t))``, in Fourier space.

    Parameters
    ----------
    density : Density, a cube
    quaternion : (4,) array
    shift_angstrom : (3,) array, xyz

    Returns
    -------
    Density
        Limited to the ball of frequencies below Nyquist.
    """
    n = density.box_px
    inside, k = _half_ball(n)
    values = _transform(density.values, Rotation.from_quat(quaternion).inv().apply(k))
    t = np.asarray(shift_angstrom, float) / (n * density.voxel_size_angstrom)
    spectrum = np.zeros((n, n, n // 2 + 1), np.complex64)
    spectrum[inside] = values * np.exp(-2j * np.pi * k @ t)
    real = scipy.fft.fftshift(scipy.fft.irfftn(spectrum, s=(n,) * 3, workers=fourier.WORKERS))
    return Density(real, density.voxel_size_angstrom)


@dataclass(frozen=True)
class Registration:
    """A map laid onto a reference.

    Attributes
    ----------
    density : Density
        The map after it.
    quaternion : (4,) array
        The rotation that was fitted.
    shift_angstrom : (3,) array, xyz
        Applied after the rotation.
    mirrored : bool
        Whether the mirror image fitted better; always False where it was not allowed.
    correlation : float
        In the band of frequencies that was fitted.
    """

    density: Density
    quaternion: np.ndarray
    shift_angstrom: np.ndarray
    mirrored: bool
    correlation: float


def register(
    density: Density,
    reference: Density,
    *,
    allow_mirror: bool = True,
    resolution_angstrom: float = 15.0,
    seed: int = 0,
) -> Registration:
    """Lay a map onto a reference by rotation, shift and, where allowed, hand.

    A coarse search over all rotations at 30 A or so, then a local fit of the best few at
    ``resolution_angstrom``.

    Parameters
    ----------
    density, reference : Density, cubes of the same box and voxel size
    allow_mirror : bool
        Try the mirror image too: images alone cannot tell the hand.
    resolution_angstrom : float
        The finest detail that is fitted.
    seed : int
        Of the frequencies that the coarse search looks at.

    Returns
    -------
    Registration
    """
    n, voxel = _common_box(reference, density), reference.voxel_size_angstrom
    if not (density.values.any() and reference.values.any()):
        raise InputError("a map that is zero everywhere cannot be registered")
    extent = n * voxel
    rng = np.random.default_rng(seed)
    small = min(n, 2 * int(np.ceil(extent / resolution_angstrom * 1.5 / 2)) * 2)
    target = _Spectrum(reference.resampled(small).values)
    hands = [False, True] if allow_mirror else [False]
    sources = {
        h: _Spectrum((mirrored(density) if h else density).resampled(small).values) for h in hands
    }

    def band(cutoff_angstrom: float, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Random frequencies of a ball, and the reference's transform there, of unit norm."""
        k = rng.standard_normal((count, 3))
        k *= rng.random((count, 1)) ** (1 / 3) / np.linalg.norm(k, axis=1, keepdims=True)
        k *= extent / max(cutoff_angstrom, 2 * voxel)
        f = target.at(k)
        return k, f / np.linalg.norm(f)

    k, wanted = band(2 * resolution_angstrom, 600)
    candidates = []
    for hand in hands:
        grid = rotations.grid(6000)
        for part in np.array_split(grid, 12):
            turned_k = Rotation.from_quat(rotations.inverse(part)).as_matrix() @ k.T  # (g, 3, m)
            f = sources[hand].at(turned_k.transpose(0, 2, 1), quick=True)
            score = (f @ wanted.conj()).real / np.linalg.norm(f, axis=1)
            candidates += [(s, hand, q) for s, q in zip(score, part, strict=True)]
    candidates.sort(key=lambda c: -c[0])

    def fit(
        hand: bool, q: np.ndarray, cutoff: float, count: int, start: np.ndarray
    ) -> tuple[float, bool, np.ndarray, np.ndarray]:
        k, wanted = band(cutoff, count)
        source = sources[hand]

        def loss(p: np.ndarray) -> float:
            spin = Rotation.from_rotvec(p[:3] / 10) * Rotation.from_quat(q)
            f = source.at(spin.inv().apply(k)) * np.exp(-2j * np.pi * k @ p[3:] / extent)
            return -float((f @ wanted.conj()).real / np.linalg.norm(f))

        best = minimize(loss, np.r_[0, 0, 0, start], method="Powell", options={"xtol": 1e-3})
        spin = Rotation.from_rotvec(best.x[:3] / 10) * Rotation.from_quat(q)
        return -best.fun, hand, spin.as_quat(), best.x[3:]

    fits = [fit(h, q, 1.5 * resolution_angstrom, 800, np.zeros(3)) for _, h, q in candidates[:6]]
    _, hand, q, shift = max(fits, key=lambda f: f[0])
    score, hand, q, shift = fit(hand, q, resolution_angstrom, 4000, shift)
    source = mirrored(density) if hand else density
    return Registration(turned(source, q, shift), q, shift, hand, score)
