"""Refinement with the density only reconstructed, half against half: the gold-standard protocol.

Two halves of the particles are kept apart, each refined against the map of its own, and only as far
as the two maps agree: noise then builds no structure.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from .. import maps, rotations
from ..density import Density
from ..errors import InputError
from ..half_sets import check_enough
from ..io.files import PathLike
from ..particles import ParticleStack
from ..rotations import Seed
from .elsewhere import asked, found_again, surely_astray, with_likely_errors
from .fit import DEFAULT, RefinedStack, noise_of, refine
from .kept import Kept, Rounds, rescaled
from .rounds import RoundMaps, believed, finer, maps_of_round, masked
from .search import Search

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["HalvesRefinement", "refine_halves"]

#: Rounds, where none are told, and the share of the expected error by which orientations that have
#: settled still move.
FEWEST, MOST, SETTLED = 5, 15, 0.1
#: Of twice so many particles and more, so many at random settle first, and all begin with their
#: maps; all are then refined in so many rounds at least.
PART, LAST = 10_000, 2
#: Share of the particles, found elsewhere, of which maps are made anew; and up to which a map is to
#: be believed: more than half of those of noise lie elsewhere by the other half's map.
ASTRAY, BELIEVED = 0.01, 0.5


@dataclass(frozen=True, eq=False)
class HalvesRefinement:
    """What refining two halves against their own maps ends with.

    Attributes
    ----------
    particles : RefinedStack
        Every particle against the map of all, at the end; with its half-set. The errors to expect
        count that the likeliest orientation may be a wrong one.
    separate : RefinedStack
        Every particle against the map of its own half, as the half-maps were made.
    half_maps : HalfMaps
        At the separate parameters; independent beyond ``joined_angstrom``.
    mask : (m, m, m) array
    fsc : HalfMapFsc
    density : Density
        The mean of the half-maps, filtered by ``sqrt(2 FSC / (1 + FSC))``. Its mirror image
        (:func:`cryoem.maps.mirrored`, at :func:`cryoem.rotations.other_hand`) explains the images
        as well: no projection tells the hand.
    held_out_correlation : float
        Mean correlation of 4,000 images, or all, with projections of what is finer than
        ``joined_angstrom`` in the map of the *other* half, to which they did not contribute; 1 is
        out of reach where there is noise. NaN where the rounds, or the half-maps, went hardly
        beyond ``joined_angstrom``: there is then nothing to judge by.
    chance_correlation : float
        The same with every image at another one's orientation.
    astray_fraction : float
        Share of the particles that were likelier elsewhere by the map of the other half; where
        these are most, only those that it explains far better there.
    resolutions_angstrom : tuple of float
        To which each round of all particles refined.
    joined_angstrom : float
    """

    particles: RefinedStack
    separate: RefinedStack
    half_maps: maps.HalfMaps
    mask: Float[np.ndarray, "m m m"]
    fsc: maps.HalfMapFsc
    density: Density
    held_out_correlation: float
    chance_correlation: float
    astray_fraction: float
    resolutions_angstrom: tuple[float, ...]
    joined_angstrom: float

    @property
    def believable(self) -> bool:
        """Whether half of the particles lie where the other half's map has them, too."""
        return self.astray_fraction <= BELIEVED


def refine_halves(
    stack: ParticleStack,
    *,
    rounds: int | None = None,
    resolution_angstrom: float = 30.0,
    joined_angstrom: float = 40.0,
    search: Search = DEFAULT,
    symmetry: str = "C1",
    seed: Seed = 0,
    work: PathLike | None = None,
    scheduler: str | Client | None = None,
    progress: bool = False,
) -> HalvesRefinement:
    """Reconstruct and refine in turns, without letting noise build structure.

    Two halves of the particles are kept apart: each is refined against the map of its own, in a
    mask that leaves out what noise hides, every shell weighted by the FSC of the two (the Wiener
    filter of a half-map), and only to where the FSC, corrected for its own mask, falls below 0.143.
    What is coarser than ``joined_angstrom`` the references share, so that their frames stay
    together. Where orientations have settled, particles that are likelier elsewhere, on the sphere
    and in their frames, are brought there, by the map of their own half, and the rounds go on, if
    they are more than one in a hundred of 4,000. At the end it is by the other half's map, and all
    are refined against the map of all. Of 20,000 particles and more a random part of 10,000 settles
    first; all are then refined from where they were given, first against its maps. Rounds' maps
    are in boxes of 128 voxels, or larger where the halves agree to more; the last in the images'.

    Parameters
    ----------
    stack : ParticleStack
        20 or more, with the orientations to start from, in any frame that a map can use
        (:func:`cryoem.orient`), its shifts, and its half-sets or a random split.
    rounds : int, optional
        By default five, and up to fifteen until half of the orientations move by less than a tenth
        of their expected error, and hardly a particle is found elsewhere. Where a part settles
        first, so of the part; and then two to fifteen of all. If told, so many of each.
    resolution_angstrom, joined_angstrom : float
        The former of the first round; later rounds go as far as the FSC.
    search : Search
        Of the first round, and of what is tried elsewhere. The others start where the last ended.
    symmetry : str
        The particle's point group, in whose standard setting the orientations are.
    seed : int or numpy.random.Generator
        Of the split, and of the random phases.
    work : path, optional
        A folder in which the rounds are kept: interrupted and called again, it goes on.
    scheduler : str or distributed.Client, optional
        Whose workers match, refine and back-project; see :func:`cryoem.orient`.
    progress : bool
        Show bars, of the rounds and of what follows them.

    Returns
    -------
    HalvesRefinement

    References
    ----------
    Scheres and Chen, Nat. Methods 9 (2012); Rosenthal and Henderson, J. Mol. Biol. 333 (2003).
    """
    _check(stack, rounds, work, seed)
    given = stack.divided().with_half_sets(seed).replace(contrast=None)
    told: dict[str, object] = {"rounds": rounds, "symmetry": symmetry, "seed": seed}
    told |= {"resolution_angstrom": resolution_angstrom, "joined_angstrom": joined_angstrom}
    maps_of = partial(maps_of_round, joined_angstrom=joined_angstrom, symmetry=symmetry, seed=seed)
    maps_of = partial(maps_of, scheduler=scheduler)
    again = partial(found_again, search=search, symmetry=symmetry, scheduler=scheduler)
    steps = _Steps(maps_of, again, search, rounds, scheduler, progress)
    kept = Kept(work, given, told | {"search": asdict(search)})
    so_far = steps.of_many(Rounds(None, given, (resolution_angstrom,)), kept, seed)
    separate, used = so_far.separate, so_far.used
    assert separate is not None  # there was at least one round
    last = maps_of(now := rescaled(separate), progress=progress)
    held_out = _held_out(last, now, used[-1], joined_angstrom, scheduler)
    if not so_far.sought:
        found, astray = again(now, given, last.references[::-1], last.snug, used[-1])
        if astray > BELIEVED:
            astray = surely_astray(now, found, last.references[::-1], used[-1], search, scheduler)
        so_far = replace(so_far, now=found, ended=True, sought=True, astray=astray)
        kept.write(so_far)
    everyone = _against_all(so_far.now, last, used[-1], search, symmetry, scheduler, progress)
    return _ended(everyone, separate, last, held_out, so_far, joined_angstrom)


def _check(stack: ParticleStack, rounds: int | None, work: PathLike | None, seed: Seed) -> None:
    if rounds is not None and rounds < 1:
        raise InputError(f"rounds must be positive, got {rounds}")
    if work is not None and not isinstance(seed, int):
        raise InputError("a run that is kept wants a whole number as its seed, not a generator")
    stack.oriented()
    check_enough(len(stack))


@dataclass(frozen=True, eq=False)
class _Steps:
    """What all rounds of a refinement do alike."""

    maps_of: Callable[..., RoundMaps]
    again: Callable[..., tuple[ParticleStack, float]]
    search: Search
    rounds: int | None
    scheduler: str | Client | None
    progress: bool

    def of_many(self, begin: Rounds, kept: Kept, seed: Seed) -> Rounds:
        """Those of all; of many a part settles first, and all begin with its maps."""
        so_far, many, first = kept.read(), len(begin.now) >= 2 * PART, None
        if many and so_far is None:
            rng = rotations.generator(seed, "settles first")
            rows = np.sort(rng.permutation(len(begin.now))[:PART])
            some = replace(begin, now=begin.now.select(rows))
            kept_part = kept.of_part(some.now)
            few = self.settled(some.now, kept_part.read() or some, kept_part, FEWEST)
            first = self.maps_of(few.now, refined_angstrom=few.used[-1])
            begin = replace(begin, used=few.used[-1:])
        return self.settled(begin.now, so_far or begin, kept, LAST if many else FEWEST, first)

    def settled(
        self,
        given: ParticleStack,
        so_far: Rounds,
        kept: Kept,
        least: int,
        first: RoundMaps | None = None,
    ) -> Rounds:
        """Rounds until orientations have settled; the first by maps that are there already."""
        from tqdm.auto import tqdm

        most, silent = self.rounds or MOST, not self.progress
        with tqdm(total=most, initial=so_far.count, desc="rounds", disable=silent) as bar:
            while so_far.count < most and not so_far.ended:
                known = first if so_far.count == 0 else None
                known = known or self.maps_of(so_far.now, refined_angstrom=so_far.used[-1])
                so_far = self._refined(so_far, given, known, least)
                kept.write(so_far)
                bar.update()
            bar.total = so_far.count  # fewer were enough
        return so_far

    def _refined(self, so_far: Rounds, given: ParticleStack, now: RoundMaps, least: int) -> Rounds:
        """One more round: each half is refined against its map."""
        begins, limit = so_far.count == 0, now.finest_angstrom
        used = (*so_far.used, max(limit, so_far.used[0]) if begins else limit)
        separate = refine_each_half(
            so_far.now.replace(noise=given.noise),  # estimated in every round, or given
            now.references, resolution_angstrom=used[-1],
            search=self.search if begins else self.search.near, scheduler=self.scheduler,
        )  # fmt: skip
        done = Rounds(separate, rescaled(separate), used)
        settled = self.rounds is None and least <= done.count < MOST
        if settled and _settled(so_far.now, separate):
            found, astray = self.again(done.now, given, now.references, now.snug, used[-1])
            return replace(done, ended=True) if astray < ASTRAY else replace(done, now=found)
        return done


def _settled(before: ParticleStack, after: RefinedStack) -> bool:
    """Whether half of the orientations have moved by little of what they may be off."""
    moved = rotations.distance(after.oriented(), before.oriented())
    return bool(np.median(moved) < SETTLED * np.median(after.expected_error_rad))


def _against_all(
    stack: ParticleStack,
    last: RoundMaps,
    resolution_angstrom: float,
    search: Search,
    symmetry: str,
    scheduler: str | Client | None,
    progress: bool,
) -> RefinedStack:
    """Refine all against the map of all: so far as the halves say that it can be believed."""
    whole = masked(last.snug, maps.filtered(last.pair.mean, 2 * last.weight / (1 + last.weight)))
    found = refine(
        stack, whole, resolution_angstrom=resolution_angstrom, search=search.near,
        scheduler=scheduler, progress=progress,
    )  # fmt: skip
    return with_likely_errors(found, whole, last.snug, search, symmetry, scheduler)


def _ended(
    particles: RefinedStack,
    separate: RefinedStack,
    last: RoundMaps,
    held_out: tuple[float, float],
    so_far: Rounds,
    joined_angstrom: float,
) -> HalvesRefinement:
    """What the last round ends with; said where it is not to be believed."""
    ended = HalvesRefinement(
        particles=particles,
        separate=separate,
        half_maps=last.pair,
        mask=last.mask,
        fsc=last.fsc,
        density=believed(last.pair, last.fsc),
        held_out_correlation=held_out[0],
        chance_correlation=held_out[1],
        astray_fraction=so_far.astray,
        resolutions_angstrom=so_far.used[1:],
        joined_angstrom=joined_angstrom,
    )
    if not ended.believable:
        warnings.warn(
            f"{so_far.astray:.0%} of the particles are likelier elsewhere by the map of the other "
            "half: the map is not to be believed",
            stacklevel=3,
        )
    return ended


def refine_each_half(
    stack: ParticleStack,
    references: Sequence[Density],
    *,
    resolution_angstrom: float,
    search: Search,
    scheduler: str | Client | None = None,
) -> RefinedStack:
    """Refine half-set 1 against the first reference, half-set 2 against the second."""
    rows = [stack.half(half) for half in (1, 2)]
    parts = [
        refine(
            stack.select(here), reference, resolution_angstrom=resolution_angstrom, search=search,
            scheduler=scheduler,
        )
        for here, reference in zip(rows, references, strict=True)
    ]  # fmt: skip
    order = np.argsort(np.concatenate(rows))
    found: dict[str, object] = {}
    for f in fields(RefinedStack):  # in the particles' own order
        values = [getattr(part, f.name) for part in parts]
        if f.name in ("noise_variance", "resolution_angstrom"):
            found[f.name] = float(np.mean(values))
        elif "rows" in f.metadata and isinstance(values[0], np.ndarray) and f.name != "images":
            found[f.name] = np.concatenate(values)[order]
    found["noise"] = noise_of(parts)
    return stack.extended(RefinedStack, **found)


def _held_out(
    last: RoundMaps,
    stack: ParticleStack,
    resolution_angstrom: float,
    joined_angstrom: float,
    scheduler: str | Client | None,
) -> tuple[float, float]:
    """Correlation with the map of the other half, to which an image did not contribute.

    Nor to what was not shared of it. By chance: with every image at another one's orientation.
    """
    finest = max(resolution_angstrom, last.fsc.corrected.resolution(0.143).angstrom)
    cutoff = 0.8 * joined_angstrom  # with an edge that begins where what is shared ends
    if finest > cutoff / 1.2:
        return np.nan, np.nan
    others = []
    for half_map in (last.pair.second, last.pair.first):
        fine = masked(last.mask, finer(maps.filtered(half_map, last.weight), cutoff))
        others.append(finer(fine, cutoff))  # the mask spreads over shells
    stack = stack.select(asked(stack))
    exchanged = stack.with_poses(np.roll(stack.oriented(), 1, axis=0))
    judge = Search(starts=1, steps=0)
    held_out, chance = (
        refine_each_half(
            at, others, resolution_angstrom=resolution_angstrom, search=judge, scheduler=scheduler
        )
        for at in (stack, exchanged)
    )
    return float(held_out.correlation.mean()), float(chance.correlation.mean())
