"""The maps of a round: half-maps, and the references that each half is refined against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import scipy.fft

from .. import maps, reconstruction
from ..density import Density
from ..particles import ParticleStack
from ..rotations import Seed

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["RoundMaps", "believed", "finer", "half_maps", "maps_of_round", "masked"]

#: The mask of references: low-pass in which the particle is seen, extension, edge; angstrom. The
#: edge is three voxels at least, and so wider in a small box of a wide frame.
SNUG = 12.0, 0.0, 8.0
#: The maps of a round show so much finer detail than the one before refined to, in no smaller boxes
#: than this, which would win nothing. A box is too small where halves agree to more than this share
#: of what it can hold: a larger one is taken; and not worth its while where it is as large as this
#: share of the images'.
BEYOND, WIDE, SEEN = 1.4, 128, 0.95


@dataclass(frozen=True, eq=False)
class RoundMaps:
    """The half-maps of a round, and what each half is refined against next."""

    pair: maps.HalfMaps
    mask: np.ndarray
    snug: np.ndarray
    fsc: maps.HalfMapFsc
    weight: np.ndarray
    references: list[Density]
    finest_angstrom: float


def maps_of_round(
    stack: ParticleStack,
    *,
    refined_angstrom: float | None = None,
    joined_angstrom: float,
    symmetry: str,
    seed: Seed,
    scheduler: str | Client | None,
    progress: bool = False,
) -> RoundMaps:
    """Reconstruct the halves, see how far they agree, and filter them to that.

    In a box that shows more than they were refined to and agree to, or, where the former is not
    told, in the images'.
    """
    in_box = partial(
        _in_box, stack, joined_angstrom=joined_angstrom, symmetry=symmetry, seed=seed,
        scheduler=scheduler, progress=progress,
    )  # fmt: skip
    if refined_angstrom is None:
        return in_box(stack.box_px)
    made = in_box(box := _box(stack, refined_angstrom))
    extent = stack.box_px * stack.pixel_size_angstrom
    while box < stack.box_px and SEEN * made.finest_angstrom < 2 * extent / box:
        made = in_box(box := _box(stack, made.finest_angstrom))
    return made


def _in_box(
    stack: ParticleStack,
    box: int,
    *,
    joined_angstrom: float,
    symmetry: str,
    seed: Seed,
    scheduler: str | Client | None,
    progress: bool,
) -> RoundMaps:
    pair = half_maps(
        stack, independent=True, symmetry=symmetry, box_px=box, scheduler=scheduler,
        progress=progress,
    )  # fmt: skip
    mask = maps.soft_mask(pair.mean)
    fsc = maps.half_map_fsc(pair, mask, seed=seed)
    weight = fsc.corrected.up_to_crossing(0.143)
    joined = fsc.corrected.frequencies <= 1 / joined_angstrom
    weight[joined] = np.clip(fsc.corrected.values[joined], 0.143, 1)
    # Noise about the particle costs orientations; to judge the maps by, a mask must be wide.
    finest = max(SNUG[0], fsc.corrected.resolution(0.143).angstrom)
    snug = maps.soft_mask(
        pair.mean,
        resolution_angstrom=min(finest, 20.0),
        extend_angstrom=SNUG[1],
        edge_angstrom=SNUG[2],
        noise=Density((pair.first.values - pair.second.values) / 2, pair.mean.voxel_size_angstrom),
    )
    seen = weight * (stack.box_px / box)  # of the images' contrast: sums over fewer voxels
    one, two = (masked(snug, maps.filtered(d, seen)) for d in (pair.first, pair.second))
    # Within the mask already: it would spread what is shared over finer shells.
    shared = _share_low_resolution(maps.HalfMaps(one, two, independent=True), joined_angstrom)
    limit = min(fsc.corrected.resolution(0.143).angstrom, joined_angstrom)
    return RoundMaps(pair, mask, snug, fsc, weight, [shared.first, shared.second], limit)


def _box(stack: ParticleStack, angstrom: float) -> int:
    """Edge of a map that shows somewhat finer detail than this, or else the images'."""
    extent = stack.box_px * stack.pixel_size_angstrom
    edge = 2 * scipy.fft.next_fast_len(max(WIDE // 2, int(np.ceil(BEYOND * extent / angstrom))))
    return edge if edge < SEEN * stack.box_px else stack.box_px


def masked(mask: np.ndarray, density: Density) -> Density:
    """A density within a mask."""
    return Density(mask * density.values, density.voxel_size_angstrom)


def half_maps(
    stack: ParticleStack,
    *,
    independent: bool,
    symmetry: str = "C1",
    box_px: int | None = None,
    scheduler: str | Client | None = None,
    progress: bool = False,
) -> maps.HalfMaps:
    """Reconstruct each half-set."""
    first, second = (
        reconstruction.reconstruct(
            stack.select(stack.half(half)),
            box_px=box_px,
            symmetry=symmetry,
            scheduler=scheduler,
            progress=progress,
        )
        for half in (1, 2)
    )
    return maps.HalfMaps(first, second, independent)


def believed(pair: maps.HalfMaps, fsc: maps.HalfMapFsc) -> Density:
    """The mean of half-maps, each shell by what correlates: ``sqrt(2 FSC / (1 + FSC))``."""
    f = fsc.corrected.up_to_crossing(0.0)
    return maps.filtered(pair.mean, np.sqrt(2 * f / (1 + f)))


def finer(density: Density, resolution_angstrom: float) -> Density:
    """Leave out what is coarser than ``resolution_angstrom``."""
    coarse = density.low_passed(resolution_angstrom).values
    return Density(density.values - coarse, density.voxel_size_angstrom)


def _share_low_resolution(pair: maps.HalfMaps, resolution_angstrom: float) -> maps.HalfMaps:
    """Let half-maps share what is coarser, so that their frames do not drift apart."""
    low = pair.mean.low_passed(resolution_angstrom).values
    first, second = (
        Density(finer(d, resolution_angstrom).values + low, d.voxel_size_angstrom)
        for d in (pair.first, pair.second)
    )
    return maps.HalfMaps(first, second, pair.independent)
