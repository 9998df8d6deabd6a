"""Refinement with a reference that must not be believed too far."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from .. import maps
from ..density import Density
from ..errors import InputError
from ..particles import ParticleStack
from ..rotations import Seed
from .fit import DEFAULT, RefinedStack, refine
from .halves import believed, half_maps
from .search import Search

__all__ = ["ReferenceRefinement", "refine_against"]


@dataclass(frozen=True, eq=False)
class ReferenceRefinement:
    """Images refined against a reference, and whether they carry structure of their own.

    Attributes
    ----------
    particles : RefinedStack
        With its half-set.
    half_maps : HalfMaps
        With shared poses: both halves followed the one reference.
    mask : (m, m, m) array
        Around the reference.
    test : ReferenceBias
        Whether the half-maps agree beyond the resolution to which the reference was used.
    fsc : HalfMapFsc
    density : Density or None
        The mean of the half-maps, filtered by their FSC; None where they do not agree, because
        then what they show may be the reference alone.
    """

    particles: RefinedStack
    half_maps: maps.HalfMaps
    mask: Float[np.ndarray, "m m m"]
    test: maps.ReferenceBias
    fsc: maps.HalfMapFsc
    density: Density | None


def refine_against(
    stack: ParticleStack,
    reference: Density,
    *,
    resolution_angstrom: float = 15.0,
    search: Search = DEFAULT,
    seed: Seed = 0,
    progress: bool = False,
) -> ReferenceRefinement:
    """Refine against a reference used to a stated resolution; a map only where it is the images'.

    Pure noise refined against a reference gives the reference back ("Einstein from noise"), and its
    half-maps agree. But white noise beyond the resolution to which the reference was used knows
    nothing of the orientations: there its half-maps are independent, whereas those of particles go
    on agreeing. Where they do not (:func:`cryoem.maps.reference_bias`, five standard deviations) a
    warning says so and no map is given. Too few or too noisy particles end in the same warning: it
    says that nothing was shown, not that the images are empty.

    Parameters
    ----------
    stack : ParticleStack
        With the orientations to start from, its shifts, and its half-sets or a random split.
    reference : Density, a cube of the images' box
    resolution_angstrom, search
        See :func:`cryoem.refine`.
    seed : int or numpy.random.Generator
        Of the split, and of the random phases.
    progress : bool
        Show a bar.

    Returns
    -------
    ReferenceRefinement

    References
    ----------
    Henderson, PNAS 110 (2013).
    """
    stack.oriented()
    if stack.box_px != reference.box_px:
        raise InputError(
            f"wanted a reference of the images' {stack.box_px} px, got {reference.box_px}"
        )
    refined = refine(
        stack.with_half_sets(seed),
        reference,
        resolution_angstrom=resolution_angstrom,
        search=search,
        progress=progress,
    )
    pair = half_maps(refined, independent=False)
    mask = maps.soft_mask(reference, resolution_angstrom=max(20.0, resolution_angstrom))
    test = maps.reference_bias(pair, mask, resolution_angstrom)
    fsc = maps.half_map_fsc(pair, mask, seed=seed)
    if not test.believable:
        warnings.warn(
            f"beyond {resolution_angstrom:g} A, to which the reference was used, the half-maps do "
            f"not agree (correlation {test.correlation:.3f}, {test.z:.1f} standard deviations of "
            "noise): the map may be the reference alone, and is not given",
            stacklevel=2,
        )
        return ReferenceRefinement(refined, pair, mask, test, fsc, None)
    return ReferenceRefinement(refined, pair, mask, test, fsc, believed(pair, fsc))
