"""Refinement with a reference that must not be believed too far."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from .. import maps, rotations
from ..density import Density
from ..errors import InputError
from ..half_sets import check_enough
from ..maps.bias import shells_beyond
from ..particles import ParticleStack
from ..preprocessing import check_fits
from ..reconstruction import reconstruct
from ..rotations import Seed
from ..symmetry import group
from .check import SYMMETRIC, check_symmetry, coarse_sample
from .elsewhere import found_again, with_likely_errors
from .fit import DEFAULT, RefinedStack, refine
from .rounds import believed, half_maps
from .search import Search

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["ReferenceRefinement", "check_reference", "in_frame_of", "refine_against"]

#: The correlation, at 30 A, from which a map and a reference may lie alike, and from which they do;
#: and what share of the unlikeness goes, or how much likeness comes, where a turn makes them.
ALIKE, SURELY, LEFT, BETTER = 0.6, 0.95, 0.5, 0.2
#: Single precision holds what references of these values make of images.
SCALES = 1e-6, 1e10
#: Solvent that is farther off zero than this share of a reference's peak is said to be.
LEVEL = 0.05
#: Share of a reference's standard deviation that does not count as structure.
UNSEEN = 0.01
#: Share of the particles that is thought to lie wrongly, before anything is known.
LOST = 0.1
#: How many times larger than the reference a map may seem, by what lies above this share of its
#: peak: orientations that are at random blur it by less.
LARGER, SHOWN = 1.25, 0.3
#: Likeness from which a map shows a particle at all, this one or another.
SOMEWHAT = 0.4
#: How many particles make a map that tells the frame, and in pixels of how many angstrom.
ENOUGH, PIXEL = 5000, 6.0


@dataclass(frozen=True, eq=False)
class ReferenceRefinement:
    """Images refined against a reference, and whether they carry structure of their own.

    Attributes
    ----------
    particles : RefinedStack
        With its half-set. Expected errors count that the likeliest orientation may be a wrong one.
    moved_fraction : float
        Share of the particles that were likelier elsewhere than near where they began.
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
    moved_fraction: float
    half_maps: maps.HalfMaps
    mask: Float[np.ndarray, "m m m"]
    test: maps.ReferenceBias
    fsc: maps.HalfMapFsc
    density: Density | None

    @property
    def believable(self) -> bool:
        """Whether there is a map."""
        return self.density is not None


def refine_against(
    stack: ParticleStack,
    reference: Density,
    *,
    resolution_angstrom: float = 15.0,
    symmetry: str = "C1",
    search: Search = DEFAULT,
    seed: Seed = 0,
    scheduler: str | Client | None = None,
    progress: bool = False,
) -> ReferenceRefinement:
    """Refine against a reference used to a stated resolution; a map only where it is the images'.

    Pure noise refined against a reference gives the reference back ("Einstein from noise"), and its
    half-maps agree. But white noise beyond the resolution to which the reference was used knows
    nothing of the orientations: there its half-maps are independent, whereas those of particles go
    on agreeing. Where they do not (:func:`cryoem.maps.reference_bias`, five standard deviations) a
    warning says so and no map is given. Too few or too noisy particles end in the same warning: it
    says that nothing was shown, not that the images are empty.

    Particles that lie wrongly are brought to where they are likelier, elsewhere on the sphere or in
    their frames, by more than the odds against that beforehand: of one in ten, anywhere. In loud
    noise this leaves some that are lost, and a few that were not may be.

    Parameters
    ----------
    stack : ParticleStack
        With the orientations to start from, its shifts, and its half-sets or a random split.
    reference : Density, a cube of the images' box
    resolution_angstrom
        See :func:`cryoem.refine`.
    symmetry : str
        Of the maps; the reference must have it, in the standard setting.
    search
        See :func:`cryoem.refine`.
    seed : int or numpy.random.Generator
        Of the split, and of the random phases.
    scheduler : str or distributed.Client, optional
        See :func:`cryoem.refine`.
    progress : bool
        Show a bar.

    Returns
    -------
    ReferenceRefinement

    Raises
    ------
    InputError
        Fewer than 20 images; a reference of another box or voxel size, that is empty, that has not
        the symmetry, or of whose voxels too little is left beyond the resolution to tell its bias;
        before anything is refined.

    References
    ----------
    Henderson, PNAS 110 (2013).
    """
    stack.oriented()
    check_fits(reference, stack.box_px, stack.pixel_size_angstrom)
    check_reference(reference, resolution_angstrom, symmetry)
    check_enough(len(stack))
    check_symmetry(stack, symmetry, seed=seed)
    mask = maps.soft_mask(reference, resolution_angstrom=max(20.0, resolution_angstrom))
    refined, moved = _refined(
        stack.with_half_sets(seed), reference, mask, resolution_angstrom, symmetry, search,
        {"scheduler": scheduler, "progress": progress},
    )  # fmt: skip
    pair = half_maps(refined, independent=False, symmetry=symmetry, scheduler=scheduler)
    test = maps.reference_bias(pair, mask, resolution_angstrom, symmetry=symmetry)
    fsc = maps.half_map_fsc(pair, mask, seed=seed)
    if not test.believable:
        warnings.warn(
            f"beyond {resolution_angstrom:g} A, to which the reference was used, the half-maps do "
            f"not agree (correlation {test.correlation:.3f}, {test.z:.1f} standard deviations of "
            "noise): the map may be the reference alone, and is not given",
            stacklevel=2,
        )
    density = believed(pair, fsc) if test.believable else None
    return ReferenceRefinement(refined, moved, pair, mask, test, fsc, density)


def check_reference(
    reference: Density, resolution_angstrom: float = 15.0, symmetry: str = "C1"
) -> None:
    """Refuse a reference by which nothing is to be refined.

    That is empty; of whose voxels too little is left beyond the resolution to tell its bias; or
    that has not the symmetry, which its maps would be made to have nonetheless. Solvent that is
    not at zero is said.
    """
    if not np.ptp(reference.values) > 0:
        raise InputError("the reference is the same everywhere: no particle is to be seen in it")
    peak = float(np.abs(reference.values).max())
    if not SCALES[0] < peak < SCALES[1]:
        raise InputError(
            f"the reference's values reach {peak:.2g}; wanted between {SCALES[0]:g} and "
            f"{SCALES[1]:g}, so that it can be computed with: scale it"
        )
    level = reference.solvent_level
    if abs(level) > LEVEL * abs(reference.values - level).max():
        warnings.warn(
            f"the reference's solvent is at {level:.3g}, not at zero, which bends every pose: take "
            "it off",
            stacklevel=3,
        )
    shells_beyond(reference.box_px, reference.voxel_size_angstrom, resolution_angstrom)
    if group(symmetry).name == "C1":
        return
    # Noise of its own in either, so that shells where there is hardly anything are not asked.
    least = UNSEEN * float(reference.values.std())
    rng = rotations.generator(0, "symmetry")
    first, second = (
        Density(
            reference.values - level + least * rng.standard_normal(reference.values.shape),
            reference.voxel_size_angstrom,
        )
        for _ in range(2)
    )
    ratio = maps.has_symmetry(
        maps.HalfMaps(first, second, independent=True), symmetry,
        resolution_angstrom=max(20.0, resolution_angstrom),
    )  # fmt: skip
    if ratio < SYMMETRIC:
        raise InputError(
            f"the reference has not the symmetry {group(symmetry).name}, its axes where the "
            f"standard setting has them: turned by it, it is {ratio:.2f} times as like itself as "
            "unturned"
        )


def _refined(
    stack: ParticleStack,
    reference: Density,
    mask: Float[np.ndarray, "m m m"],
    resolution_angstrom: float,
    symmetry: str,
    search: Search,
    run: dict[str, Any],
) -> tuple[RefinedStack, float]:
    """Near where particles began, and elsewhere; and the share that was brought there."""

    def fit(stack: ParticleStack, search: Search) -> RefinedStack:
        return refine(
            stack, reference, resolution_angstrom=resolution_angstrom, search=search, **run
        )

    near = fit(stack, search)
    if search.steps == 0:
        return near, 0.0
    brought, moved = found_again(
        near, stack, (reference, reference), mask, near.resolution_angstrom, search=search,
        symmetry=symmetry, scheduler=run["scheduler"], lost=LOST,
    )  # fmt: skip
    found = fit(brought.replace(noise=stack.noise), search.near) if moved else near
    found = with_likely_errors(found, reference, mask, search, symmetry, run["scheduler"], LOST)
    return found, moved


def in_frame_of(stack: ParticleStack, reference: Density, *, seed: Seed = 0) -> ParticleStack:
    """Bring orientations into the frame and hand of a reference, where they are in another one.

    Orientations from the images alone leave an overall rotation and the hand open. The map that
    they give is laid onto the reference; if that makes it far more like it, orientations and
    shifts follow, with a warning that says so. Another says where it is of another size.

    Parameters
    ----------
    stack : ParticleStack
        With orientations.
    reference : Density, a cube of the images' box
    seed : int or numpy.random.Generator
        Of the choice of the particles that the map is made from, at most 5,000.

    Returns
    -------
    ParticleStack
        The same one where the orientations are in the reference's frame already.
    """
    stack.oriented()
    check_fits(reference, stack.box_px, stack.pixel_size_angstrom)
    own = reconstruct(coarse_sample(stack, ENOUGH, PIXEL, seed)).resampled(stack.box_px)
    before = _likeness(own, reference)
    larger = _size(own) / _size(reference)
    if before > SOMEWHAT and not 1 / LARGER < larger < LARGER:
        warnings.warn(
            f"the map that these orientations give is {larger:.2f} times as large as the "
            "reference: that may be another particle, or of voxels of another size (--voxel-size)",
            stacklevel=2,
        )
    if before > SURELY:
        return stack
    laid = maps.register(own, reference, resolution_angstrom=20.0)
    after = _likeness(laid.density, reference)
    # Compact symmetric particles are like themselves however they lie.
    better = after > before + BETTER or 1 - after < LEFT * (1 - before)
    if not (after > ALIKE and better):
        return stack
    angle = rotations.distance(laid.quaternion, np.array([0.0, 0, 0, 1]))
    warnings.warn(
        "the orientations are in another frame than the reference: they were turned by "
        f"{np.rad2deg(float(angle)):.0f} degrees and moved by "
        f"{np.linalg.norm(laid.shift_angstrom):.0f} A"
        + (", and their hand exchanged" if laid.mirrored else "")
        + f" (correlation of their map with it {before:.2f}, then {after:.2f})",
        stacklevel=2,
    )
    return stack.moved(laid.quaternion, laid.shift_angstrom, other_hand=laid.mirrored)


def _size(density: Density) -> float:
    """Edge of a cube as large as what a map shows at 30 A, in angstrom."""
    coarse = density.low_passed(30.0).values
    return float(np.cbrt(np.sum(coarse > SHOWN * coarse.max()))) * density.voxel_size_angstrom


def _likeness(density: Density, reference: Density) -> float:
    """Correlation of two maps at 30 A."""
    a, b = (d.low_passed(30.0).values.ravel() for d in (density, reference))
    return float(np.corrcoef(a, b)[0, 1])
