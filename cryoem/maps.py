"""Judging a map: Fourier shell correlation, half-maps, coverage, registration onto a reference."""

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike
from scipy import ndimage
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from . import files, fourier, rotations
from .density import Density
from .errors import InputError
from .files import PathLike
from .rotations import Seed

__all__ = [
    "Beyond",
    "Coverage",
    "Fsc",
    "HalfMapFsc",
    "HalfMaps",
    "Registration",
    "Resolution",
    "beyond",
    "coverage",
    "fsc",
    "half_map_fsc",
    "halves",
    "mirrored",
    "register",
    "soft_mask",
    "turned",
    "write_fsc",
]


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


def _shells(n: int) -> np.ndarray:
    """``round(|k|)`` of the half grid of a cube of ``n``."""
    return np.rint(fourier.radius((n,) * 3, half=True)).astype(int)


def _hermitian(n: int) -> np.ndarray:
    """How often each frequency of a half grid stands in the whole one: 1 or 2."""
    weight = np.full(n // 2 + 1, 2.0, np.float32)
    weight[0] = 1
    if n % 2 == 0:
        weight[-1] = 1
    return weight


def fsc(a: Density, b: Density, *, mask: np.ndarray | None = None) -> Fsc:
    """Fourier shell correlation, shell by shell of ``round(|k|)``.

    ``Re sum(F1* F2) / sqrt(sum |F1|^2 sum |F2|^2)`` (Harauz and van Heel, Optik 73 (1986)). Nothing
    is aligned.

    Parameters
    ----------
    a, b : Density, cubes of the same box and voxel size
    mask : (n, n, n) array, optional
        Both are multiplied by it; see :func:`soft_mask`, and :func:`half_map_fsc`, which corrects
        for what a mask adds.

    Returns
    -------
    Fsc
    """
    n = _common_box(a, b)
    if mask is not None and np.shape(mask) != (n,) * 3:
        raise InputError(f"the mask must have the maps' shape {(n,) * 3}, got {np.shape(mask)}")
    f1, f2 = (
        scipy.fft.rfftn(d.values if mask is None else d.values * mask, workers=fourier.WORKERS)
        for d in (a, b)
    )
    shell = _shells(n)
    weight = np.broadcast_to(_hermitian(n), shell.shape)

    def total(x: np.ndarray) -> np.ndarray:
        return np.bincount(shell.ravel(), (weight * x).ravel())[1 : (n + 1) // 2]

    cross = total((np.conj(f1) * f2).real)
    power = np.sqrt(total(np.abs(f1) ** 2) * total(np.abs(f2) ** 2))
    values = np.divide(cross, power, out=np.zeros_like(cross), where=power > 0)
    shells = np.arange(1, (n + 1) // 2)
    voxel = a.voxel_size_angstrom
    return Fsc(shells / (n * voxel), values, 1 / (2 * voxel))


# --------------------------------------------------------------------------------------
# Half-maps


def halves(n: int, seed: Seed) -> np.ndarray:
    """Split ``n`` particles at random: (n,) ints, 1 or 2, as in ``rlnRandomSubset``.

    Half-maps judge a map only if the halves were separated before their orientations were found;
    so this stands at the beginning of a pipeline.
    """
    if n < 2:
        raise InputError(f"wanted at least 2 particles to split, got {n}")
    subset = np.arange(n) % 2 + 1
    rotations.stream(seed, "halves").shuffle(subset)
    return subset


@dataclass(frozen=True)
class HalfMaps:
    """Maps of two halves of the particles.

    Attributes
    ----------
    first, second : Density
    independent : bool
        Whether the halves were separated before their orientations were refined, each against its
        own map.
    """

    first: Density
    second: Density
    independent: bool

    @property
    def wording(self) -> str:
        """What a report must call them."""
        if self.independent:
            return "half-maps of independently refined halves"
        return "half-maps with shared poses"

    @property
    def mean(self) -> Density:
        """The map of all particles."""
        _common_box(self.first, self.second)
        return Density((self.first.values + self.second.values) / 2, self.first.voxel_size_angstrom)


def _soft(inside: np.ndarray, extend_px: float, edge_px: float) -> np.ndarray:
    """Extend a region and let it fall to 0 as a raised cosine."""
    distance = ndimage.distance_transform_edt(~inside) - extend_px
    fall = np.clip(distance / edge_px, 0, 1)
    return (0.5 * (1 + np.cos(np.pi * fall))).astype(np.float32)


def soft_mask(
    density: Density,
    *,
    resolution_angstrom: float = 20.0,
    extend_angstrom: float = 8.0,
    edge_angstrom: float = 20.0,
) -> np.ndarray:
    """A mask around the particle, found in the map itself.

    The map is low-passed; what stands out of the solvent is kept: voxels of the inscribed sphere
    above the median by five standard deviations (from the median absolute deviation, which a
    particle that fills less than a quarter hardly touches) and by a tenth of the map's height; the
    largest piece, its holes filled. That is extended and falls to 0 as a raised cosine. Where
    nothing stands out, or a speck of less than two cubes of the low-pass' resolution, which noise
    makes too, the mask is a sphere of four tenths of the box.

    Parameters
    ----------
    density : Density, a cube
        The mean of two half-maps.
    resolution_angstrom : float
        Of the low-pass; at least three voxels.
    extend_angstrom, edge_angstrom : float

    Returns
    -------
    (n, n, n) float32 array, from 0 to 1
    """
    n, voxel = density.box_px, density.voxel_size_angstrom
    finest = max(resolution_angstrom, 3 * voxel)
    v = density.low_passed(finest, edge=0.3).values
    if not v.any():
        raise InputError("a map that is zero everywhere has no mask")
    axis = np.arange(n) - n // 2
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    sphere = radius < n / 2
    middle = np.median(v[sphere])
    deviation = 1.4826 * np.median(np.abs(v[sphere] - middle))
    height = np.percentile(v, 99.9) - middle
    inside = sphere & (v > middle + max(5 * deviation, 0.1 * height))
    pieces, count = ndimage.label(inside)
    sizes = np.bincount(pieces.ravel())[1:]
    if count == 0 or sizes.max() < 2 * (finest / voxel) ** 3:
        return _soft(radius < 0.4 * n, 0, 0.1 * n)
    largest = sizes.argmax() + 1
    filled = ndimage.binary_fill_holes(pieces == largest)
    return _soft(filled, extend_angstrom / voxel, max(edge_angstrom / voxel, 3))


@dataclass(frozen=True)
class HalfMapFsc:
    """Fourier shell correlation of half-maps, corrected for the mask.

    Attributes
    ----------
    unmasked, masked, randomised, corrected : Fsc
        Without and with the mask; with the mask after the phases beyond ``randomised_from`` were
        exchanged for random ones; and what is left of ``masked`` when that is taken off.
    randomised_from : float, 1/angstrom
    """

    unmasked: Fsc
    masked: Fsc
    randomised: Fsc
    corrected: Fsc
    randomised_from: float


def half_map_fsc(maps: HalfMaps, mask: np.ndarray, *, seed: Seed = 0) -> HalfMapFsc:
    """Correlate half-maps in a mask, and take off what the mask itself brings.

    A mask that both share correlates them. Beyond the shell where the unmasked curve falls below
    0.8 the phases of both are made random; the correlation ``FSC_n`` that is left under the mask is
    the mask's, and ``(FSC_t - FSC_n) / (1 - FSC_n)`` the particle's, from two shells further on.

    Parameters
    ----------
    maps : HalfMaps
    mask : (n, n, n) array
        See :func:`soft_mask`.
    seed : int or numpy.random.Generator
        Of the random phases.

    Returns
    -------
    HalfMapFsc

    References
    ----------
    Chen et al., Ultramicroscopy 135 (2013).
    """
    first, second = maps.first, maps.second
    n = _common_box(first, second)
    unmasked, masked = fsc(first, second), fsc(first, second, mask=mask)
    below = np.flatnonzero(unmasked.values < 0.8)
    start = int(below[0]) + 1 if len(below) else len(unmasked.values)  # a shell
    rng = rotations.stream(seed, "phases")
    shell = _shells(n)

    def scrambled(d: Density) -> Density:
        f = scipy.fft.rfftn(d.values, workers=fourier.WORKERS)
        noise = scipy.fft.rfftn(
            rng.standard_normal(d.values.shape, dtype=np.float32), workers=fourier.WORKERS
        )
        phases = noise / np.maximum(np.abs(noise), 1e-20)
        f = np.where(shell >= start, np.abs(f) * phases, f)
        values = scipy.fft.irfftn(f, s=d.values.shape, workers=fourier.WORKERS)
        return Density(values, d.voxel_size_angstrom)

    randomised = fsc(scrambled(first), scrambled(second), mask=mask)
    values = masked.values.copy()
    t, r = masked.values[start + 1 :], randomised.values[start + 1 :]
    values[start + 1 :] = (t - r) / np.maximum(1 - r, 1e-6)
    corrected = Fsc(masked.frequencies, values, masked.nyquist)
    at = start / (n * first.voxel_size_angstrom)
    return HalfMapFsc(unmasked, masked, randomised, corrected, at)


def write_fsc(path: PathLike, found: HalfMapFsc) -> None:
    """Write the curves as RELION's post-processing does: a STAR file, atomically."""
    import pandas as pd
    import starfile

    frequencies = found.corrected.frequencies
    table = pd.DataFrame(
        {
            "rlnSpectralIndex": np.arange(1, len(frequencies) + 1),
            "rlnResolution": frequencies,
            "rlnAngstromResolution": 1 / frequencies,
            "rlnFourierShellCorrelationCorrected": found.corrected.values,
            "rlnFourierShellCorrelationUnmaskedMaps": found.unmasked.values,
            "rlnFourierShellCorrelationMaskedMaps": found.masked.values,
            "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps": found.randomised.values,
        }
    )
    general = pd.DataFrame(
        {
            "rlnFinalResolution": [found.corrected.resolution(0.143).angstrom],
            "rlnRandomiseFrom": [1 / found.randomised_from],
        }
    )
    with files.atomic(path) as temporary:
        starfile.write({"general": general, "fsc": table}, temporary, overwrite=True)


@dataclass(frozen=True)
class Beyond:
    """Whether half-maps agree beyond the resolution to which a reference was used.

    Attributes
    ----------
    correlation : float
        Of the half-maps, high-passed and masked, every shell counting alike.
    z : float
        The same in standard deviations of what independent noise gives.
    resolution_angstrom : float
        Beyond which they were compared.
    """

    correlation: float
    z: float
    resolution_angstrom: float

    @property
    def believable(self) -> bool:
        """Whether the images carry structure of their own: five standard deviations."""
        return self.z > 5


def beyond(maps: HalfMaps, mask: np.ndarray, resolution_angstrom: float) -> Beyond:
    """Compare half-maps beyond the resolution to which their reference was used.

    Noise that was oriented against a reference reproduces it, in both halves ("Einstein from
    noise"), but only to the resolution that steered the orientations: beyond it the halves of pure
    noise are independent. So: take off what is coarser (and two shells more, which the box's edge
    mixes in), make every shell alike in power, mask, correlate. White noise under a mask ``m``
    gives a standard deviation of ``sqrt(sum m^4 / (sum m^2)^2 * voxels / N)`` with ``N`` the
    frequencies that take part, ``(sum P)^2 / sum P^2`` for powers ``P``.

    Parameters
    ----------
    maps : HalfMaps
    mask : (n, n, n) array
        Made without what lies beyond, as :func:`soft_mask` at ``resolution_angstrom`` or coarser.
    resolution_angstrom : float

    Returns
    -------
    Beyond

    References
    ----------
    Henderson, PNAS 110 (2013); Shatsky et al., J. Struct. Biol. 166 (2009).
    """
    n = _common_box(maps.first, maps.second)
    if np.shape(mask) != (n,) * 3:
        raise InputError(f"the mask must have the maps' shape {(n,) * 3}, got {np.shape(mask)}")
    first = int(np.ceil(n * maps.first.voxel_size_angstrom / resolution_angstrom)) + 2
    last = (n - 1) // 2 - 1
    if first > last:
        raise InputError(
            f"nothing is left beyond {resolution_angstrom} A in voxels of "
            f"{maps.first.voxel_size_angstrom} A; wanted a coarser resolution_angstrom"
        )
    shell = _shells(n)
    use = (shell >= first) & (shell <= last)
    weight = np.broadcast_to(_hermitian(n), shell.shape)
    power = np.where(use, 1 / np.maximum(shell, 1.0) ** 2, 0)
    count = (weight * power).sum() ** 2 / (weight * power**2).sum()

    def filtered(d: Density) -> np.ndarray:
        f = scipy.fft.rfftn(d.values, workers=fourier.WORKERS)
        total = np.bincount(shell.ravel(), (weight * np.abs(f) ** 2).ravel())
        seen = total / np.bincount(shell.ravel(), weight.ravel())
        f *= np.sqrt(power / np.maximum(seen[shell], 1e-30))
        return mask * scipy.fft.irfftn(f, s=(n,) * 3, workers=fourier.WORKERS)

    a, b = filtered(maps.first), filtered(maps.second)
    scale = np.sqrt(np.sum(a**2, dtype=float) * np.sum(b**2, dtype=float))
    correlation = float(np.sum(a * b, dtype=float) / scale) if scale > 0 else 0.0
    m2 = np.asarray(mask, float) ** 2
    deviation = np.sqrt((m2**2).sum() / m2.sum() ** 2 * n**3 / count)
    return Beyond(correlation, float(correlation / deviation), resolution_angstrom)


@dataclass(frozen=True)
class Coverage:
    """How evenly views sample the directions of Fourier space.

    Attributes
    ----------
    evenness : float
        Harmonic over arithmetic mean of the sampling (the sampling compensation factor): 1 where
        all directions are seen alike; the map's SSNR falls by it.
    unseen : float
        The share of directions that no view sees.
    anisotropy : float
        Largest over smallest of the mean squared components of the viewing directions along their
        principal axes: 1 where views come from everywhere alike.
    """

    evenness: float
    unseen: float
    anisotropy: float


def coverage(quaternions: ArrayLike, *, half_thickness: float = 0.1) -> Coverage:
    """How evenly views cover the directions.

    A view from ``d`` sees the Fourier directions ``u`` with ``|<d, u>| < half_thickness``.

    Parameters
    ----------
    quaternions : (n, 4) array, unit, xyzw
    half_thickness : float
        Sine of half the angle that a slice is thick.

    Returns
    -------
    Coverage

    References
    ----------
    Baldwin and Lyumkis, Prog. Biophys. Mol. Biol. 150 (2020).
    """
    views = rotations.view_directions(rotations.check(quaternions)).reshape(-1, 3)
    if len(views) == 0:
        raise InputError("no orientations, no coverage")
    # A Fibonacci spiral of directions on the half sphere.
    i = np.arange(1000) + 0.5
    z, angle = i / 1000, np.pi * (1 + np.sqrt(5)) * i
    r = np.sqrt(1 - z**2)
    directions = np.stack([r * np.cos(angle), r * np.sin(angle), z], axis=1)
    seen = np.zeros(1000)
    for part in np.array_split(views, -(-len(views) // 10_000)):
        seen += np.sum(np.abs(directions @ part.T) < half_thickness, axis=1)
    sampling = seen / (len(views) * half_thickness)
    floor = 1 / (len(views) * half_thickness)  # unseen counts as seen once
    evenness = sampling.mean() ** -1 / np.mean(1 / np.maximum(sampling, floor)) if seen.any() else 0
    axes = np.linalg.eigvalsh(views.T @ views / len(views))
    return Coverage(
        evenness=float(evenness),
        unseen=float(np.mean(seen == 0)),
        anisotropy=float(axes[-1] / max(axes[0], 1e-12)),
    )


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
