"""Shells of Fourier space, and what every judgement asks of the maps it compares."""

import numpy as np
import scipy.fft
from jaxtyping import Complex, Float

from .. import fourier
from ..density import Density
from ..errors import InputError

__all__ = [
    "Shells",
    "check_mask",
    "common_box",
    "filtered",
    "half_spectrum",
    "of_half_spectrum",
]


def common_box(a: Density, b: Density) -> int:
    """Edge in voxels of two cubes, or ``InputError`` where they are not sampled alike."""
    n = a.box_px
    if b.box_px != n or not np.isclose(a.voxel_size_angstrom, b.voxel_size_angstrom, rtol=1e-3):
        raise InputError(
            f"two maps must share box and voxel size, got {n} x {a.voxel_size_angstrom} A "
            f"and {b.box_px} x {b.voxel_size_angstrom} A"
        )
    return n


def check_mask(mask: Float[np.ndarray, "n n n"], n: int) -> None:
    """Refuse a mask that is not of the maps' shape."""
    if np.shape(mask) != (n,) * 3:
        raise InputError(f"the mask must have the maps' shape {(n,) * 3}, got {np.shape(mask)}")


def half_spectrum(values: Float[np.ndarray, "n n n"]) -> Complex[np.ndarray, "n n h"]:
    """Transform of a real cube, without the frequencies that follow from the others."""
    return scipy.fft.rfftn(values, workers=fourier.WORKERS)


def of_half_spectrum(spectrum: Complex[np.ndarray, "n n h"], n: int) -> Float[np.ndarray, "n n n"]:
    """The real cube of ``n`` voxels that has this half spectrum."""
    return scipy.fft.irfftn(spectrum, s=(n,) * 3, workers=fourier.WORKERS)


class Shells:
    """The shells of a cube's half spectrum.

    Attributes
    ----------
    number : (n, n, n // 2 + 1) int array
        ``round(|k|)``, cycles per box.
    weight : (n, n, n // 2 + 1) array
        How often each frequency stands in the whole spectrum: 1 or 2.
    """

    def __init__(self, n: int) -> None:
        self.number = np.rint(fourier.radius((n,) * 3, half=True)).astype(int)
        weight = np.full(n // 2 + 1, 2.0, np.float32)
        weight[0] = 1
        if n % 2 == 0:
            weight[-1] = 1
        self.weight = np.broadcast_to(weight, self.number.shape)

    def sums(self, x: Float[np.ndarray, "n n h"]) -> Float[np.ndarray, " shells"]:
        """Sums over the shells 0, 1, 2, ... of the whole spectrum."""
        return np.bincount(self.number.ravel(), (self.weight * x).ravel())


def filtered(density: Density, gain: Float[np.ndarray, " k"]) -> Density:
    """Multiply the shells of a density by a gain, as of a filter that an FSC gives.

    Between shells the gain is interpolated.

    Parameters
    ----------
    density : Density, a cube
    gain : (k,) array
        Of the shells 1, 2, ..., ``k``, as :class:`~cryoem.maps.Fsc` has them. Shell 0 has the gain
        of shell 1; what is beyond shell ``k`` falls to 0 within one shell.

    Returns
    -------
    Density
    """
    n = density.box_px
    if not 1 <= len(gain) <= n:
        raise InputError(f"wanted gains of 1 to {n} shells, got {len(gain)}")
    by_shell = np.zeros(n + 1, np.float32)
    by_shell[1 : len(gain) + 1] = gain
    by_shell[0] = by_shell[1]
    k = fourier.radius((n,) * 3, half=True)
    spectrum = half_spectrum(density.values)
    spectrum *= np.interp(k, np.arange(n + 1), by_shell)
    return Density(of_half_spectrum(spectrum, n), density.voxel_size_angstrom)
