"""Reference bias: whether half-maps agree where their reference cannot have made them."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ..density import Density
from ..errors import InputError
from ..symmetry import group
from .correlation import HalfMaps
from .shells import Shells, check_mask, common_box, half_spectrum, of_half_spectrum

__all__ = ["ReferenceBias", "reference_bias"]


@dataclass(frozen=True)
class ReferenceBias:
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


def reference_bias(
    maps: HalfMaps,
    mask: Float[np.ndarray, "n n n"],
    resolution_angstrom: float,
    *,
    symmetry: str = "C1",
) -> ReferenceBias:
    """Compare half-maps beyond the resolution to which their reference was used.

    Noise that was oriented against a reference reproduces it, in both halves ("Einstein from
    noise"), but only to the resolution that steered the orientations: beyond it the halves of pure
    noise are independent. So: take off what is coarser (and two shells more, which the box's edge
    mixes in), make every shell alike in power, mask, correlate. White noise under a mask ``m``
    gives a standard deviation of ``sqrt(sum m^4 / (sum m^2)^2 * voxels / N)`` with ``N`` the
    frequencies that take part, ``(sum P)^2 / sum P^2`` for powers ``P``, of which those that
    symmetry makes equal count once.

    Parameters
    ----------
    maps : HalfMaps
    mask : (n, n, n) array
        Made without what lies beyond, as :func:`soft_mask` at ``resolution_angstrom`` or coarser.
    resolution_angstrom : float
    symmetry : str
        That both maps were made to have.

    Returns
    -------
    ReferenceBias

    References
    ----------
    Henderson, PNAS 110 (2013); Shatsky et al., J. Struct. Biol. 166 (2009).
    """
    n = common_box(maps.first, maps.second)
    check_mask(mask, n)
    first, last = shells_beyond(n, maps.first.voxel_size_angstrom, resolution_angstrom)
    shells = Shells(n)
    shell, weight = shells.number, shells.weight
    taken = (shell >= first) & (shell <= last)
    power = np.where(taken, 1 / np.maximum(shell, 1.0) ** 2, 0)
    frequencies = (weight * power).sum() ** 2 / (weight * power**2).sum()
    frequencies /= len(group(symmetry).elements)
    in_shell = shells.sums(np.ones(shell.shape, np.float32))

    def masked(density: Density) -> np.ndarray:
        f = half_spectrum(density.values)
        mean_power = shells.sums(np.abs(f) ** 2) / in_shell
        f *= np.sqrt(power / np.maximum(mean_power[shell], 1e-30))
        return mask * of_half_spectrum(f, n)

    a, b = masked(maps.first), masked(maps.second)
    scale = np.sqrt(np.sum(a**2, dtype=float) * np.sum(b**2, dtype=float))
    correlation = float(np.sum(a * b, dtype=float) / scale) if scale > 0 else 0.0
    m2 = np.asarray(mask, float) ** 2
    deviation = np.sqrt((m2**2).sum() / m2.sum() ** 2 * n**3 / frequencies)
    return ReferenceBias(correlation, float(correlation / deviation), resolution_angstrom)


def shells_beyond(
    box_px: int, voxel_size_angstrom: float, resolution_angstrom: float
) -> tuple[int, int]:
    """The first and the last shell in which half-maps are compared; refused where none is left."""
    first = int(np.ceil(box_px * voxel_size_angstrom / resolution_angstrom)) + 2
    last = (box_px - 1) // 2 - 1
    if first > last:
        finest = (
            np.ceil(100 * box_px * voxel_size_angstrom / (last - 2)) / 100 if last > 2 else np.inf
        )
        raise InputError(
            f"nothing is left beyond {resolution_angstrom:g} A in voxels of "
            f"{voxel_size_angstrom:g} A to tell a map from its reference by; wanted a resolution "
            f"of {finest:.2f} A or coarser"
        )
    return first, last
