"""How the orientations near a start are searched: many starts, coarse to fine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .. import projection, rotations
from ..density import Density
from ..errors import InputError
from .least_squares import SlicesWithGradient

__all__ = ["Plan", "Search", "Stage", "distinct_first", "plan"]

#: Candidates this close to each other have found the same maximum; radians and pixels.
SAME = 0.02, 0.2
#: Steps shorter than this end a stage, and the last stage; radians and pixels.
SHORT, SHORTEST = (2e-3, 2e-2), (1e-4, 1e-3)
#: Frequencies of candidates that a thread looks up together.
POINTS_AT_ONCE = 100_000


@dataclass(frozen=True)
class Search:
    """How far, and how densely, orientations are sought about the given ones.

    Attributes
    ----------
    starts : int
        How many orientations within ``spread_rad`` of the given one are tried; the likelihood
        chooses. A few mend what single starts miss; below SNR 1/50, where the likelihood has
        several maxima, take tens, from a wider ball. The denser they lie, the finer the detail
        that they begin with.
    spread_rad : float
    coarse_to_fine : bool
        Raise the resolution in stages, because far from the truth only coarse detail points towards
        it. False: near the answer, go to the finest at once.
    steps : int
        The most that a stage may take; 0 only judges the given parameters.
    """

    starts: int = 4
    spread_rad: float = 0.3
    coarse_to_fine: bool = True
    steps: int = 15

    def __post_init__(self) -> None:
        if self.starts < 1 or self.steps < 0:
            raise InputError(
                f"wanted starts >= 1 and steps >= 0, got {self.starts} and {self.steps}"
            )

    @property
    def near(self) -> Search:
        """The same of orientations that are near the answer."""
        return replace(self, starts=1, coarse_to_fine=False)

    def offsets(self) -> np.ndarray:
        """Rotation vectors (starts, 3) of a ball, the first of them none."""
        rng = rotations.generator(0, "starts")
        w = rng.standard_normal((self.starts, 3))
        length = self.spread_rad * rng.random((self.starts, 1)) ** (1 / 3)
        w *= length / np.linalg.norm(w, axis=1, keepdims=True)
        w[0] = 0
        return w


@dataclass(frozen=True)
class Stage:
    """One resolution of a search.

    Attributes
    ----------
    count : int
        How many of the plan's frequencies it uses, the coarsest first.
    slices : SlicesWithGradient
    candidates : int
        How many of a particle's candidates enter it,
    keep : int
        and how many outlive it.
    short : (float, float)
        Steps shorter than this end it, radians and pixels.
    """

    count: int
    slices: SlicesWithGradient
    candidates: int
    keep: int
    short: tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """The stages of a search against one density.

    Attributes
    ----------
    slices : Slices
    order : (k,) int array
        Frequencies of ``slices`` that are used, the coarsest first.
    stages : tuple of Stage
    resolution_angstrom : float
        Of the last stage.
    """

    slices: projection.Slices
    order: np.ndarray
    stages: tuple[Stage, ...]
    resolution_angstrom: float

    @property
    def frequencies(self) -> np.ndarray:
        """(k, 2), cycles per box."""
        return self.slices.frequencies[self.order]

    @property
    def weights(self) -> np.ndarray:
        """(k,)."""
        return self.slices.weights[self.order]

    @property
    def particles_at_once(self) -> int:
        """How many a thread refines together: as many as its caches hold, in the heaviest stage."""
        load = max(stage.count * stage.candidates for stage in self.stages)
        return max(1, POINTS_AT_ONCE // load)


def plan(density: Density, box_px: int, resolution_angstrom: float, search: Search) -> Plan:
    """Lay out the stages of a search against a density, up to a resolution."""
    extent = density.box_px * density.voxel_size_angstrom
    if not extent / resolution_angstrom >= 2:
        raise InputError(f"the resolution must be below {extent / 2:g} A, half the box's edge")
    slices = projection.Slices(box_px)
    radius = np.linalg.norm(slices.frequencies, axis=1)
    finest = min(extent / resolution_angstrom, float(radius.max()))
    order = np.argsort(radius, kind="stable")
    order = order[(radius[order] > 0) & (radius[order] <= finest)]
    # Points of a ball that are as many as the starts are this far apart.
    off_rad = search.spread_rad / search.starts ** (1 / 3)
    staged = search.coarse_to_fine and search.steps
    limits = _limits(density, finest, off_rad) if staged else [finest]
    stages, keep = [], search.starts
    for limit in limits:
        count = int(np.sum(radius[order] <= limit))
        last = limit == limits[-1]
        entering, keep = keep, 1 if last else -(-keep // 2)
        with_gradient = SlicesWithGradient(density, slices.frequencies[order[:count]], box_px)
        stages.append(Stage(count, with_gradient, entering, keep, SHORTEST if last else SHORT))
    return Plan(slices, order, tuple(stages), extent / finest)


def _limits(density: Density, finest: float, off_rad: float) -> list[float]:
    """Frequency limits of the stages, cycles per box of the density: doubling up to ``finest``.

    The first period follows from how far off the starts are: an error of 0.3 rad moves the rim by
    a third of the radius of gyration, which then is the period. Where a start is nearer, coarser
    detail would only say less, and lead the starts together.
    """
    weight = np.maximum(density.values, 0).astype(float)
    n = density.box_px
    square = (np.arange(n) - n // 2) ** 2
    total = sum(np.tensordot(square, weight.sum(axis=tuple({0, 1, 2} - {a})), 1) for a in range(3))
    gyration = np.sqrt(total / max(weight.sum(), 1e-30))
    limits = [finest]
    while limits[0] * gyration * off_rad > 0.3 * 1.5 * n:
        limits.insert(0, limits[0] / 2)
    return limits


def _same_place(q: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Which of each particle's candidates, (m, s, 4) and (m, s, 2), meet: (m, s, s)."""
    apart = np.linalg.norm(shifts[:, :, None] - shifts[:, None], axis=-1) / SAME[1]
    turn = np.minimum(1, np.abs(q @ q.transpose(0, 2, 1)))
    return np.asarray((2 * np.arccos(turn) < SAME[0]) & (apart < 1))


def distinct_first(
    gain: np.ndarray, q: np.ndarray, shifts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Order each particle's candidates, (m, starts), the best first; and which are worth keeping.

    Those that ended where a better one did come last, lest one maximum crowd out the others. They,
    and those whose gain is not finite, are not worth keeping.
    """
    rows = np.arange(len(gain))[:, None]
    order = np.argsort(-gain, axis=1, kind="stable")
    twice = np.tril(_same_place(q[rows, order], shifts[rows, order]), -1).any(axis=2)
    last = np.argsort(twice, axis=1, kind="stable")
    order = np.take_along_axis(order, last, axis=1)
    return order, ~np.take_along_axis(twice, last, axis=1) & np.isfinite(gain[rows, order])
