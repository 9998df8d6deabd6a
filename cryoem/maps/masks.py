"""Masks around a particle, found in the map itself."""

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage
from scipy.stats import median_abs_deviation

from ..density import Density
from ..errors import InputError

__all__ = ["soft_mask"]


def _soft(
    inside: Bool[np.ndarray, "n n n"], extend_px: float, edge_px: float
) -> Float[np.ndarray, "n n n"]:
    """Extend a region and let it fall to 0 as a raised cosine."""
    found, reach = np.zeros(inside.shape, np.float32), int(np.ceil(extend_px + edge_px))
    near = tuple(
        slice(max(0, along.start - reach), along.stop + reach)
        for along in ndimage.find_objects(inside.astype(np.int8))[0]
    )  # beyond there is nothing
    distance = ndimage.distance_transform_edt(~inside[near]) - extend_px
    fall = np.clip(distance / edge_px, 0, 1)
    found[near] = 0.5 * (1 + np.cos(np.pi * fall))
    return found


def soft_mask(
    density: Density,
    *,
    resolution_angstrom: float = 20.0,
    extend_angstrom: float = 8.0,
    edge_angstrom: float = 20.0,
    noise: Density | None = None,
) -> Float[np.ndarray, "n n n"]:
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
    noise : Density, optional
        A map of noise as loud as the density's, such as half of the difference of half-maps. What
        stands out is then all that is above two and a half of its standard deviations, and above a
        hundredth of the height.

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
    if noise is None:
        middle = np.median(v[sphere])
        above, share = 5 * median_abs_deviation(v[sphere], scale="normal"), 0.1
    else:
        middle = 0.0
        above, share = 2.5 * noise.low_passed(finest, edge=0.3).values[sphere].std(), 0.01
    height = np.percentile(v, 99.9) - middle
    inside = sphere & (v > middle + max(above, share * height))
    pieces, count = ndimage.label(inside)
    sizes = np.bincount(pieces.ravel())[1:]
    if count == 0 or sizes.max() < 2 * (finest / voxel) ** 3:
        return _soft(radius < 0.4 * n, 0, 0.1 * n)
    largest = sizes.argmax() + 1
    filled = ndimage.binary_fill_holes(pieces == largest)
    return _soft(filled, extend_angstrom / voxel, max(edge_angstrom / voxel, 3))
