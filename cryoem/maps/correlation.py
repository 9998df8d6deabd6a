"""Fourier shell correlation, of two maps and of half-maps in a mask."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from .. import rotations
from ..density import Density
from ..io.files import PathLike
from ..io.star import write_star
from ..rotations import Seed
from .shells import Shells, check_mask, common_box, half_spectrum, of_half_spectrum

__all__ = [
    "Fsc",
    "HalfMapFsc",
    "HalfMaps",
    "Resolution",
    "fsc",
    "half_map_fsc",
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

    frequencies: Float[np.ndarray, " k"]
    values: Float[np.ndarray, " k"]
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

    def up_to_crossing(self, threshold: float) -> Float[np.ndarray, " k"]:
        """Values, 0 to 1, to where they first fall below ``threshold``; 0 from there on."""
        below = np.flatnonzero(self.values < threshold)
        values = np.clip(self.values, 0, 1)
        if len(below):
            values[below[0] :] = 0
        return values


def fsc(a: Density, b: Density, *, mask: Float[np.ndarray, "n n n"] | None = None) -> Fsc:
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
    n, voxel = common_box(a, b), a.voxel_size_angstrom
    if mask is not None:
        check_mask(mask, n)
    f1, f2 = (half_spectrum(d.values if mask is None else d.values * mask) for d in (a, b))
    shells = Shells(n)
    below_nyquist = np.arange(1, (n + 1) // 2)
    cross, power1, power2 = (
        shells.sums(x)[below_nyquist]
        for x in ((np.conj(f1) * f2).real, np.abs(f1) ** 2, np.abs(f2) ** 2)
    )
    power = np.sqrt(power1 * power2)
    values = np.divide(cross, power, out=np.zeros_like(cross), where=power > 0)
    return Fsc(below_nyquist / (n * voxel), values, 1 / (2 * voxel))


# --------------------------------------------------------------------------------------
# Half-maps


@dataclass(frozen=True)
class HalfMaps:
    """Maps of two half-sets of the particles.

    Attributes
    ----------
    first, second : Density
    independent : bool
        Whether the half-sets were separated before their poses were refined, each against its own
        map.
    shared : int
        Particles that are in both.
    """

    first: Density
    second: Density
    independent: bool
    shared: int = 0

    @property
    def wording(self) -> str:
        """What a report must call them."""
        if self.shared:
            return f"half-maps that share {self.shared:,} particles, not independent"
        if self.independent:
            return "half-maps of independently refined halves"
        return "half-maps with shared poses"

    @property
    def mean(self) -> Density:
        """The map of all particles."""
        common_box(self.first, self.second)
        return Density((self.first.values + self.second.values) / 2, self.first.voxel_size_angstrom)


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


def _phases_randomised(density: Density, first: int, rng: np.random.Generator) -> Density:
    """Exchange the phases of the shells from ``first`` on for those of white noise."""
    n = density.box_px
    f = half_spectrum(density.values)
    noise = half_spectrum(rng.standard_normal((n,) * 3, dtype=np.float32))
    phases = noise / np.maximum(np.abs(noise), 1e-20)
    f = np.where(Shells(n).number >= first, np.abs(f) * phases, f)
    return Density(of_half_spectrum(f, n), density.voxel_size_angstrom)


def half_map_fsc(maps: HalfMaps, mask: Float[np.ndarray, "n n n"], *, seed: Seed = 0) -> HalfMapFsc:
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
    n = common_box(maps.first, maps.second)
    unmasked, masked = (fsc(maps.first, maps.second, mask=m) for m in (None, mask))
    below = np.flatnonzero(unmasked.values < 0.8)
    start = int(below[0]) + 1 if len(below) else len(unmasked.values)  # a shell
    rng = rotations.generator(seed, "phases")
    first, second = (_phases_randomised(d, start, rng) for d in (maps.first, maps.second))
    randomised = fsc(first, second, mask=mask)
    values = masked.values.copy()
    t, r = masked.values[start + 1 :], randomised.values[start + 1 :]
    values[start + 1 :] = (t - r) / np.maximum(1 - r, 1e-6)
    corrected = Fsc(masked.frequencies, values, masked.nyquist)
    at = start / (n * maps.first.voxel_size_angstrom)
    return HalfMapFsc(unmasked, masked, randomised, corrected, at)


def write_fsc(
    path: PathLike, found: HalfMapFsc, *, b_factor_angstrom2: float | None = None
) -> None:
    """Write the curves as RELION's post-processing does: a STAR file, atomically.

    With the B factor of :func:`~cryoem.maps.sharpened`, where there is one.
    """
    frequencies = found.corrected.frequencies
    general = {
        "rlnFinalResolution": [found.corrected.resolution(0.143).angstrom],
        "rlnRandomiseFrom": [1 / found.randomised_from],
    }
    if b_factor_angstrom2 is not None:
        general["rlnBfactorUsedForSharpening"] = [b_factor_angstrom2]
    curves = {
        "rlnSpectralIndex": np.arange(1, len(frequencies) + 1),
        "rlnResolution": frequencies,
        "rlnAngstromResolution": 1 / frequencies,
        "rlnFourierShellCorrelationCorrected": found.corrected.values,
        "rlnFourierShellCorrelationUnmaskedMaps": found.unmasked.values,
        "rlnFourierShellCorrelationMaskedMaps": found.masked.values,
        "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps": found.randomised.values,
    }
    write_star(path, {"general": general, "fsc": curves})
