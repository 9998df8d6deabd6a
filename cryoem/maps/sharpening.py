"""Undoing what blurs a map as a whole: its B factor, beside what a protein shows."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ..density import Density
from ..errors import InputError
from .correlation import HalfMapFsc, HalfMaps
from .shells import Shells, check_mask, common_box, filtered, half_spectrum

__all__ = ["Sharpened", "protein_amplitude", "sharpened"]

#: The detail that a B factor is fitted to, angstrom: from where a particle's shape no longer counts
#: to where the protein's amplitudes are known; a map that ends before the second has none.
FROM, NEEDED, TO = 10.0, 7.0, 3.0
#: Shells between them, at least; and to what share of Nyquist: maps and images that were made
#: coarser fall off towards it.
SHELLS, BELOW = 5, 0.85
#: Logarithm of a protein's amplitude without any B factor, less its mean, at 1 / d from 0.06 on in
#: steps of 0.01 per angstrom: of what ships, 4JSV and 1I10, each smoothed (a test makes it anew).
FIRST, STEP = 0.06, 0.01
PROTEIN = np.array(
    [
        0.586, 0.509, 0.439, 0.367, 0.278, 0.163, 0.044, -0.052, -0.097, -0.109, -0.109, -0.106,
        -0.063, 0.034, 0.114, 0.132, 0.14, 0.102, 0.013, -0.045, -0.094, -0.149, -0.208, -0.254,
        -0.314, -0.379, -0.435, -0.506,
    ]
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sharpened:
    """A map with its fall-off undone.

    Attributes
    ----------
    density : Density
        The mean of the half-maps, each shell times ``sqrt(2 FSC / (1 + FSC)) exp(-B / (4 d^2))``,
        to where the FSC falls below 0.143.
    b_factor_angstrom2 : float
        ``B``: negative where the map is blurred, as RELION's.
    frequencies : (k,) array, 1/angstrom
        Of the shells of the fit.
    logarithms : (k,) array
        Of the particle's amplitude in them,
    fitted : (k,) array
        and of a protein's that is blurred as much.
    """

    density: Density
    b_factor_angstrom2: float
    frequencies: Float[np.ndarray, " k"]
    logarithms: Float[np.ndarray, " k"]
    fitted: Float[np.ndarray, " k"]


def sharpened(
    maps: HalfMaps, curves: HalfMapFsc, mask: Float[np.ndarray, "n n n"]
) -> Sharpened | None:
    """Find the B factor of a map, and undo it.

    The logarithm of the particle's amplitude, by the half-maps within the mask, falls off with
    ``B / (4 d^2)`` beside a protein's that is not blurred, from 10 A to where the FSC falls below
    0.143, or to 0.85 of Nyquist. A straight line alone (Rosenthal and Henderson) takes the dip that
    proteins have between 10 and 5 A for blur. Proteins differ, and near 7 A the figure is a rough
    one. Neither a mask nor a detector's MTF is applied.

    Parameters
    ----------
    maps : HalfMaps
    curves : HalfMapFsc
    mask : (n, n, n) array
        In which they were correlated.

    Returns
    -------
    Sharpened, or None
        Where the fit would end before 7 A, or with fewer than five shells.

    References
    ----------
    Rosenthal and Henderson, J. Mol. Biol. 333 (2003); Jakobi, Wilmanns and Sachse, eLife 6 (2017),
    amplitudes beside a model's.
    """
    n = common_box(maps.first, maps.second)
    check_mask(mask, n)
    f, mean = curves.corrected, maps.mean
    if len(f.values) != (n + 1) // 2 - 1:
        raise InputError(f"wanted FSC curves of the maps' {n} voxels, got {len(f.values)} shells")
    nyquist = f.nyquist or f.frequencies[-1]
    finest = max(f.resolution(0.143).angstrom, 1 / (BELOW * nyquist), TO)
    spectrum, shells = half_spectrum(mean.values * mask), Shells(n)
    power = shells.sums(np.abs(spectrum) ** 2) / shells.sums(np.ones(spectrum.shape))
    agree = np.clip(f.values, 0, 1)
    power = power[1 : len(agree) + 1] * 2 * agree / (1 + agree)
    used = (f.frequencies >= 1 / FROM) & (f.frequencies <= 1 / finest) & (power > 0)
    if finest > NEEDED or used.sum() < SHELLS:
        return None
    seen = 0.5 * np.log(power[used])
    squares = f.frequencies[used] ** 2
    slope, height = np.polyfit(squares, seen - protein_amplitude(f.frequencies[used]), 1)
    kept = f.up_to_crossing(0.143)  # what lies beyond would be raised most
    gain = np.sqrt(2 * kept / (1 + kept)) * np.exp(-slope * f.frequencies**2)
    return Sharpened(
        filtered(mean, gain),
        4 * float(slope),
        f.frequencies[used],
        seen,
        protein_amplitude(f.frequencies[used]) + slope * squares + height,
    )


def protein_amplitude(frequencies: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Logarithm of a protein's mean amplitude, up to a constant, without any B factor.

    Parameters
    ----------
    frequencies : (k,) array, 1/angstrom
        From 1/16 to 1/3.
    """
    return np.interp(frequencies, FIRST + STEP * np.arange(len(PROTEIN)), PROTEIN)
