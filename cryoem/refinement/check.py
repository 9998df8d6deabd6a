"""What orientations are worth, judged by the images' own half-maps."""

from __future__ import annotations

import numpy as np
import scipy.special
from jaxtyping import Float
from numpy.typing import ArrayLike

from .. import maps, rotations
from ..particles import ParticleStack
from ..rotations import Seed
from .fit import RefinedStack
from .halves import half_maps, masked, refine_each_half
from .search import Search

__all__ = ["cross_check", "expected_error"]


def expected_error(quaternions: ArrayLike, refined: RefinedStack) -> Float[np.ndarray, " n"]:
    """Mean angle by which orientations are expected to be off, now that refinement moved them.

    The truth is taken to lie about the refined orientation as its covariance says, alike in all
    directions, and the given orientation as far from there as refinement moved it: the mean length
    of a normal vector (standard deviation ``s`` an axis) about the displacement ``m``,
    ``s (sqrt(2 / pi) exp(-x^2 / 2) + (x + 1 / x) erf(x / sqrt(2)))`` with ``x = m / s``.

    Parameters
    ----------
    quaternions : (n, 4) array, unit, xyzw
        What the refinement started from.
    refined : RefinedStack

    Returns
    -------
    (n,) array, radians, at most pi
    """
    moved = rotations.distance(rotations.check(quaternions), refined.oriented())
    s = np.sqrt(np.trace(refined.covariances, axis1=1, axis2=2) / 3)
    x = np.maximum(moved / np.maximum(s, 1e-12), 1e-3)
    mean = np.sqrt(2 / np.pi) * np.exp(-(x**2) / 2) + (x + 1 / x) * scipy.special.erf(x / 2**0.5)
    return np.minimum(s * mean, np.pi)


def cross_check(stack: ParticleStack, *, seed: Seed = 0) -> ParticleStack:
    """Tell good orientations from bad by a few steps of refinement against the images' own map.

    Every image is compared with the map of the half that it is not in, to the resolution to which
    the half-maps agree, and so cannot confirm itself. No density is needed, and the orientations
    stay as they are.

    Parameters
    ----------
    stack : ParticleStack
        With orientations in a frame that a map can use (:func:`cryoem.orient`), its shifts, and its
        half-sets or a random split.
    seed : int or numpy.random.Generator
        Of the split, and of the random phases.

    Returns
    -------
    ParticleStack
        With ``expected_error_rad``, the :func:`expected_error` of its orientations.
    """
    q = stack.oriented()
    halves = stack.with_half_sets(seed).replace(contrast=None)
    pair = half_maps(halves, independent=False)
    mask = maps.soft_mask(pair.mean)
    curve = maps.half_map_fsc(pair, mask, seed=seed).corrected
    weight = curve.up_to_crossing(0.143)
    others = [masked(mask, maps.filtered(d, weight)) for d in (pair.second, pair.first)]
    coarsest = stack.box_px * stack.pixel_size_angstrom / 2  # halves of noise agree nowhere
    checked = refine_each_half(
        halves,
        others,
        resolution_angstrom=min(curve.resolution(0.143).angstrom, coarsest),
        search=Search(starts=1, coarse_to_fine=False, steps=5),
    )
    return stack.replace(expected_error_rad=expected_error(q, checked))
