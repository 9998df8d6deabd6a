"""What orientations are worth, judged by the images' own half-maps."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.special
from jaxtyping import Float
from numpy.typing import ArrayLike

from .. import imaging, maps, rotations
from ..errors import InputError
from ..half_sets import check_enough, particles_in, random_half_sets
from ..particles import ParticleStack
from ..rotations import Seed
from ..symmetry import group
from .fit import RefinedStack
from .halves import refine_each_half
from .rounds import half_maps, masked
from .search import Search

__all__ = ["check_symmetry", "cross_check", "expected_error"]

#: Of how many particles a map tells its symmetry, in pixels of about how many angstrom; and how
#: well its halves agree when one is turned by it, beside unturned, at least. Where more than this
#: share of the directions is unseen it is not asked.
FEW, PIXEL, SYMMETRIC, UNSEEN = 2000, 6.0, 0.8, 0.02


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
    check_enough(len(stack))
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


def check_symmetry(stack: ParticleStack, symmetry: str, *, seed: Seed = 0) -> float:
    """Warn where the map that orientations give has not a symmetry, or not on its standard axes.

    Made symmetric nonetheless it would agree with itself, whatever the particle: half-maps that
    were both made so do not tell.

    Parameters
    ----------
    stack : ParticleStack
        With orientations; 2,000 of them, or all, are asked.
    symmetry : str
    seed : int or numpy.random.Generator
        Of the choice, and of the split.

    Returns
    -------
    float
        How well half-maps without symmetry agree when one of them is turned by its elements, beside
        unturned (:func:`cryoem.maps.has_symmetry`): 1 where the particle has it. NaN where nothing
        is to be told: half-maps that do not agree, or views that leave directions unseen, as where
        all orientations lie in one asymmetric unit.
    """
    points = group(symmetry)
    if points.name == "C1":
        return 1.0
    some = coarse_sample(stack, FEW, PIXEL, seed)
    particle = particles_in(some)
    if len(np.unique(particle)) < 2 or maps.coverage(some.oriented()).unseen > UNSEEN:
        return float("nan")
    # A split of its own: a file may hold one half alone.
    some = some.replace(half_set=random_half_sets(len(some), seed, particle))
    try:
        pair = half_maps(some, independent=False)
    except InputError:  # a half that shows nothing, such as of contrasts that are zero
        return float("nan")
    ratio = maps.has_symmetry(pair, symmetry)
    if ratio < SYMMETRIC:
        warnings.warn(
            f"the map that these orientations give has not the symmetry {points.name}, its axes "
            f"where the standard setting has them: turned by it, its halves agree {ratio:.2f} "
            "times as well as unturned",
            stacklevel=2,
        )
    return ratio


def coarse_sample(
    stack: ParticleStack, count: int, pixel_size_angstrom: float, seed: Seed
) -> ParticleStack:
    """So many particles at random, or all, in coarser pixels of about this size."""
    n, box = len(stack), stack.box_px
    rng = rotations.generator(seed, "frame")
    some = stack.select(np.sort(rng.choice(n, min(count, n), replace=False)))
    small = 2 * int(np.ceil(box * stack.pixel_size_angstrom / (2 * pixel_size_angstrom)))
    if small >= box:
        return some
    images = [imaging.downsample(part.images[:], small) for part in some.chunks(256)]
    pixel = stack.pixel_size_angstrom * box / small
    return some.with_images(np.concatenate(images), pixel_size_angstrom=pixel)
