"""A map from the images alone: two halves, each solved by itself, and whether they agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from .. import maps, rotations, workers
from ..density import Density
from ..errors import InputError
from ..half_sets import unshared
from ..maps import Axes, Coverage, HalfMapFsc, HalfMaps
from ..maps.axes import NONE
from ..particles import ParticleStack
from ..reconstruction import reconstruct
from ..refinement import Search, refine
from ..refinement.rounds import believed, half_maps
from ..rotations import Seed
from ..surveying import check_sought_by
from ..symmetry import group
from .annealing import DEFAULT, KNOWN, Schedule, Start
from .coarse import coarsened
from .sorting import second_particle
from .starts import Cut, cut_out, judges, likeliest, race

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["AbInitio", "Verdict", "ab_initio"]

#: Poses from the two halves' maps that differ by less than this agree, in steps of the grid.
SAME_POSE = 1.4
#: And only images count that either map makes likelier than emptiness does: by e to this.
SEEN = 1.0
#: Share of the images whose poses must agree.
ENOUGH = 0.5
#: Maps of two starts that correlate so well are one answer.
SAME_MAP = 0.8
#: Share of the images that must agree for a map without a doubt.
PLAIN = 0.75
#: Share of the images that agree from which no further starts are tried; and how often they are.
WELL, BATCHES = 0.85, 2
#: Where fewer agree, a second particle is looked for; one of this share of the images is refused.
SURE, SECOND = 0.9, 0.3
#: Halves that began with one reference must agree on detail this much finer than it.
BEYOND = 0.8


@dataclass(frozen=True)
class Verdict:
    """Whether there is a map, and why.

    Attributes
    ----------
    found : bool
    agreement : float
        Share of the images that lie alike by the map of either half: within 1.4 steps of the grid
        of orientations (0.36 rad), up to the symmetry; an image that a map does not explain, being
        no likelier by it than if there were no particle, lies nowhere.
    by_chance : float
        The same where every image is exchanged for another one.
    second : float
        Share of the images that are of another particle, where two maps explain images that they
        have not seen better than one does. Looked for where the agreement leaves doubts; else 0.
    resolution_angstrom : float
        FSC 0.143 of the halves, each solved by itself, corrected for the mask.
    nyquist_limited : bool
        They agree to the finest detail that the pixels hold: finer ones would show more.
    coverage : Coverage
        How evenly the particles were seen, the symmetry counted in.
    starts, same_answer : int
        How many starts there were, and how many of them came to the map that was chosen.
    reasons : tuple of str
        Why there is no map.
    """

    found: bool
    agreement: float
    by_chance: float
    second: float
    resolution_angstrom: float
    nyquist_limited: bool
    coverage: Coverage
    starts: int
    same_answer: int
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        if not self.found:
            said = f"no map: {'; '.join(self.reasons)}. "
        elif self.second:
            said = f"a map with doubts ({self.second:.0%} of the images are of something else: "
            said += "classes sort them): "
        elif self.agreement < PLAIN:
            said = "a map with doubts (too few or too noisy images, or some of nothing, which "
            said += "classes sort): "
        else:
            said = "a map: "
        return (
            said + f"{self.agreement:.0%} of the images lie alike by the map of either half "
            f"({self.by_chance:.0%} by chance), half-maps agree to {self.resolution_angstrom:.1f} "
            f"A{', the finest that the pixels hold' if self.nyquist_limited else ''}, "
            f"{self.same_answer} of {self.starts} starts gave this answer"
            + (
                "; the particles were seen mostly from some directions (evenness "
                f"{self.coverage.evenness:.2f} of 1): the map is smeared along others"
                if self.found and self.coverage.uneven
                else ""
            )
        )


@dataclass(frozen=True, eq=False)
class AbInitio:
    """What the images alone give.

    Attributes
    ----------
    particles : ParticleStack
        With poses, expected errors and half-sets.
    density : Density
        The mean of the half-maps, filtered as far as they agree. Its mirror image explains the
        images as well: no projection tells the hand.
    half_maps : HalfMaps
        Of halves that were solved each by itself, laid onto each other.
    mask : (m, m, m) array
    fsc : HalfMapFsc
    axes : Axes
        The symmetry, in whose standard setting everything is.
    diameter_angstrom : float
    verdict : Verdict
    history : list of (float, (m, m) array)
        The map of the best start as it grew: its resolution in angstrom, and its projection.
    """

    particles: ParticleStack
    density: Density
    half_maps: HalfMaps
    mask: Float[np.ndarray, "m m m"]
    fsc: HalfMapFsc
    axes: Axes
    diameter_angstrom: float
    verdict: Verdict
    history: list[tuple[float, Float[np.ndarray, "m m"]]]


def ab_initio(
    stack: ParticleStack,
    *,
    symmetry: str | None = None,
    starts: int = 8,
    diameter_angstrom: float | None = None,
    shift_angstrom: float | None = None,
    images: int = 10_000,
    reference: Density | None = None,
    schedule: Schedule = DEFAULT,
    seed: Seed = 0,
    scheduler: str | Client | None = None,
    progress: bool = False,
) -> AbInitio:
    """Find orientations, shifts and a map from the images alone: no model, no training.

    Each half of the particles is solved by itself, from several random starts, by
    expectation-maximisation over a grid of orientations and shifts, from coarse detail to an eighth
    of the particle's diameter. The poses of the likeliest start are refined against its map, and
    the halves are laid onto each other: only their agreement tells a map from noise.

    Parameters
    ----------
    stack : ParticleStack
        White on black, on a background of zero; its shifts and half-sets are used.
    symmetry : str, optional
        Where it is known. By default the map is asked; ``"C1"``: it is not.
    starts : int
        At least two, shared out among the halves.
    diameter_angstrom : float, optional
        Of the particle; by default what the images say (:func:`cryoem.survey`).
    shift_angstrom : float, optional
        How far particles may lie off the middle; by default a tenth of the frame.
    images : int
        How many, at random, the starts look at. All are placed, and held in memory: cut out, small.
    reference : Density, optional
        A map of this particle, or of one like it, to begin with to 30 A in place of random starts:
        one start a half; white on black, and central. The result lies in its frame and hand.
    schedule : Schedule
    seed : int or numpy.random.Generator
    scheduler : str or distributed.Client, optional
        Whose workers run the starts, refine and back-project; see :func:`cryoem.orient`.
    progress : bool
        Show a bar.

    Returns
    -------
    AbInitio
        With a verdict; where it is against the map, look at nothing else.

    Raises
    ------
    InputError
        Fewer than 20 images, a particle or frames of less than 60 A, an unfit reference.

    References
    ----------
    Scheres, J. Mol. Biol. 415 (2012), expectation-maximisation; Punjani et al., Nat. Methods 14
    (2017), random starts; Scheres and Chen, Nat. Methods 9 (2012), halves.
    """
    _check(stack, starts, symmetry, reference, scheduler)
    how: dict[str, Any] = {"scheduler": scheduler, "progress": progress}
    stack = unshared(stack.divided()).with_half_sets(seed)
    cut = cut_out(stack, diameter_angstrom, shift_angstrom, schedule, seed)
    halves = [cut.stack.select(cut.stack.half(h)) for h in (1, 2)]
    coarse = [coarsened(half, cut.finest_angstrom) for half in halves]
    rng, few = rotations.generator(seed, "ab initio"), -(-images // 2)
    some = [one.select(np.sort(rng.permutation(len(one))[:few])) for one in coarse]
    solved: list[list[Start]] = [[], []]
    batches, each = (BATCHES, starts) if reference is None else (1, 2)
    for _ in range(batches):
        tasks = [(int(s), i % 2) for i, s in enumerate(rng.integers(2**31, size=each))]
        more = race(some, cut, tasks, schedule, first=reference, **how)
        solved = [old + new for old, new in zip(solved, more, strict=True)]
        best = [likeliest(s).on(c) for s, c in zip(solved, coarse, strict=True)]
        if (found := _laid(best, halves, symmetry, reference, scheduler)).agreement > WELL:
            break
    doubtful = ENOUGH <= found.agreement < SURE
    second = second_particle(best, some, cut, schedule, seed, **how) if doubtful else 0.0
    return _judged(stack, cut, solved, found, second, seed, scheduler)


def _check(
    stack: ParticleStack,
    starts: int,
    symmetry: str | None,
    reference: Density | None,
    scheduler: str | Client | None,
) -> None:
    """Refuse before anything is computed."""
    if starts < 2:
        raise InputError(f"wanted at least 2 starts, one a half; got {starts}")
    group(symmetry or "C1")
    if reference is not None:
        check_sought_by(reference, stack)
    workers.reached(scheduler)


@dataclass(frozen=True, eq=False)
class _Laid:
    """The best starts of the halves, laid onto each other."""

    best: list[Start]
    polished: list[ParticleStack]
    pair: HalfMaps
    axes: Axes
    referred: bool
    agreement: float
    by_chance: float


def _polished(half: ParticleStack, start: Start, scheduler: str | Client | None) -> ParticleStack:
    """Poses of a half off the grid: refined against its own map."""
    grid = start.random_grid()
    found = start.look(np.arange(len(half)), grid)
    placed = half.with_poses(grid[found.reference], start.offsets_px).replace(noise=None)
    density = Density(start.volumes[0] * start.mask(), half.pixel_size_angstrom)
    search = Search(starts=2, spread_rad=0.2, coarse_to_fine=False)
    return refine(
        placed,
        density,
        resolution_angstrom=start.resolution_angstrom,
        search=search,
        scheduler=scheduler,
    )


def _laid(
    best: list[Start],
    halves: list[ParticleStack],
    symmetry: str | None,
    reference: Density | None,
    scheduler: str | Client | None,
) -> _Laid:
    """Lay the halves onto each other, find the symmetry, and see how many images agree."""
    polished = [_polished(half, start, scheduler) for half, start in zip(halves, best, strict=True)]
    pixel = halves[0].pixel_size_angstrom
    own = [Density(start.volumes[0] * start.mask(), pixel) for start in best]
    finest = max(start.resolution_angstrom for start in best)
    onto = None if reference is None else reference.sampled_as(own[0].box_px, pixel)
    for h in (0, 1):
        if onto is not None:
            laid = maps.register(
                own[h], onto, allow_mirror=reference is None, resolution_angstrom=finest
            )
            polished[h] = polished[h].moved(
                laid.quaternion, laid.shift_angstrom, other_hand=laid.mirrored
            )
            own[h] = laid.density
        onto = own[0]
    pair = HalfMaps(own[0], own[1], independent=True)
    axes = _axes(polished, symmetry, scheduler)
    agreement, by_chance = _agreement(best, pair, axes, finest)
    return _Laid(best, polished, pair, axes, reference is not None, agreement, by_chance)


def _axes(
    polished: list[ParticleStack], symmetry: str | None, scheduler: str | Client | None
) -> Axes:
    """The symmetry, by the finest detail of the cut images: by less, many nearly have one."""
    if symmetry is not None and group(symmetry).order == 1:
        return NONE
    first, second = (reconstruct(half, scheduler=scheduler) for half in polished)
    mask = maps.soft_mask(HalfMaps(first, second, independent=True).mean)
    pixel = first.voxel_size_angstrom
    one, other = (Density(mask * half.values, pixel) for half in (first, second))
    pair = HalfMaps(one, other, independent=True)
    if symmetry is None:
        return maps.symmetry_of(pair, resolution_angstrom=2 * pixel)
    return maps.find_axes(pair, symmetry, resolution_angstrom=2 * pixel)


def _judged(
    stack: ParticleStack,
    cut: Cut,
    solved: list[list[Start]],
    found: _Laid,
    second: float,
    seed: Seed,
    scheduler: str | Client | None,
) -> AbInitio:
    """Bring everything into the standard setting and the particle file's pixels, and judge."""
    axes, pixel = found.axes, cut.stack.pixel_size_angstrom
    q, shifts = np.empty((len(stack), 4)), np.empty((len(stack), 2))
    error = np.empty(len(stack))
    for h, part in zip((1, 2), found.polished, strict=True):
        rows, at = stack.half(h), part.moved(axes.quaternion, axes.shift_angstrom)
        q[rows], error[rows] = at.oriented(), at.expected_error_rad
        shifts[rows] = at.shifts_px * (pixel / stack.pixel_size_angstrom) + stack.shifts_px[rows]
    placed = stack.with_poses(q, shifts).replace(expected_error_rad=error, contrast=None)
    pair = half_maps(placed, independent=True, symmetry=axes.symmetry, scheduler=scheduler)
    mask = maps.soft_mask(pair.mean)
    fsc = maps.half_map_fsc(pair, mask, seed=seed)
    everyone = [start for half in solved for start in half]
    finest = 2 * max(start.resolution_angstrom for start in found.best)
    same = 0
    for start in everyone:
        volume = Density(start.volumes[0] * start.mask(), pixel)
        laid = maps.register(volume, found.pair.first, resolution_angstrom=finest)
        same += laid.correlation > SAME_MAP
    reasons = []
    if found.agreement < ENOUGH:
        reasons.append(f"the halves lay only {found.agreement:.0%} of the images alike")
    if second > SECOND:
        reasons.append(
            f"two maps explain images that they have not seen better than one, and {second:.0%} "
            "are of the smaller class: these are two particles or more, which classes sort"
        )
    resolution = fsc.corrected.resolution(0.143)
    if found.referred and resolution.angstrom > BEYOND * KNOWN:
        reasons.append(
            f"the halves agree to {resolution.angstrom:.1f} A, hardly beyond the {KNOWN:.0f} A "
            "that the reference gave both"
        )
    if not axes.believed:
        reasons.append(
            f"it has not the symmetry {axes.symmetry}: turned by it, the half-maps agree "
            f"{axes.ratio:.2f} times as well"
        )
    verdict = Verdict(
        found=not reasons,
        agreement=found.agreement,
        by_chance=found.by_chance,
        second=second,
        resolution_angstrom=resolution.angstrom,
        nyquist_limited=resolution.nyquist_limited,
        coverage=maps.coverage(q, symmetry=axes.symmetry),
        starts=len(everyone),
        same_answer=same,
        reasons=tuple(reasons),
    )
    return AbInitio(
        particles=placed,
        density=believed(pair, fsc),
        half_maps=pair,
        mask=mask,
        fsc=fsc,
        axes=axes,
        diameter_angstrom=max(start.diameter_angstrom for start in found.best),
        verdict=verdict,
        history=[(resolution, seen[0]) for resolution, seen in found.best[0].history],
    )


def _agreement(
    best: list[Start], pair: HalfMaps, axes: Axes, resolution_angstrom: float
) -> tuple[float, float]:
    """Share of the images that lie alike by the map of either half; and by chance."""
    points, same, exchanged = group(axes.symmetry), [], []
    for start in best:
        rows, grid, q, seen = judges(start), start.random_grid(), [], []
        for density in (pair.first, pair.second):
            volumes = density.values[None]
            found = start.look(rows, grid, volumes=volumes, resolution_angstrom=resolution_angstrom)
            q.append(rotations.multiply(axes.quaternion, grid[found.reference]))
            seen.append(found.evidence > SEEN)
        near = SAME_POSE * (8 * np.pi**2 / len(grid)) ** (1 / 3)
        both = seen[0] & seen[1]
        same.append(both & (points.distance(q[0], q[1]) < near))
        exchanged.append(both & (points.distance(np.roll(q[0], 1, axis=0), q[1]) < near))
    return float(np.concatenate(same).mean()), float(np.concatenate(exchanged).mean())
