"""Starts beside each other: what they look at, and which of them makes the images likeliest."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import threadpoolctl
from jaxtyping import Int

from .. import rotations, surveying, threads, workers
from ..density import Density
from ..errors import InputError
from ..half_sets import check_enough
from ..particles import ParticleStack
from ..rotations import Seed
from .annealing import COARSEST, DETAIL, FIRST, Schedule, Start
from .coarse import Coarse, small_stack

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Cut", "cut_out", "judges", "likeliest", "race", "ranked"]

#: Edge of what is cut out of the images: so many diameters, and some room for shifts, angstrom.
ROOM, MORE = 1.1, 30.0
#: The particle may turn out to be smaller than the images say by this factor.
SMALLER = 0.7
#: How many starts of one set of images go on when the resolution has risen: the likeliest.
FINALISTS = 2
#: A start goes on past its rounds, so many at a time, while they make the images likelier by this
#: share; and to so many times its rounds at most.
SETTLING, GAIN, LONGEST = 6, 0.005, 2
#: At least so much is cut out: some frequencies at the coarsest detail; angstrom.
LEAST = 2 * FIRST
#: Images by which starts are compared.
JUDGES = 2000


@dataclass(frozen=True, eq=False)
class Cut:
    """The particles, cut out of their images.

    Attributes
    ----------
    stack : ParticleStack
        In pixels that hold the finest detail, phases flipped.
    finest_angstrom : float
    diameter_angstrom, shift_angstrom : float
        Of the particle, and how far it may lie off the middle.
    """

    stack: ParticleStack
    finest_angstrom: float
    diameter_angstrom: float
    shift_angstrom: float


def cut_out(
    stack: ParticleStack,
    diameter_angstrom: float | None,
    shift_angstrom: float | None,
    schedule: Schedule,
    seed: Seed,
) -> Cut:
    """Cut the particles out; None: by the diameter that the images say, and a tenth of the frame.

    Raises
    ------
    InputError
        Fewer than 20 images, or a particle or frames of less than 60 A.
    """
    check_enough(len(stack))
    frame = stack.box_px * stack.pixel_size_angstrom
    if diameter_angstrom is None:  # of images that show no particle it may be next to nothing
        seen = surveying.survey(stack, seed=seed).particle_diameter_angstrom
        diameter_angstrom = max(seen, FIRST)
    elif diameter_angstrom < FIRST:
        raise InputError(
            f"a particle of {diameter_angstrom:g} A has no detail of {FIRST:g} A, to begin with"
        )
    diameter = min(diameter_angstrom, frame)
    shift = 0.1 * frame if shift_angstrom is None else shift_angstrom
    finest = max(schedule.finest_angstrom, SMALLER * DETAIL * diameter)
    finest = max(min(finest, COARSEST), 2 * stack.pixel_size_angstrom)
    extent = min(max(ROOM * diameter + min(MORE, shift), LEAST), frame)
    if extent < FIRST:
        raise InputError(f"images of {frame:g} A show no detail of {FIRST:g} A, to begin with")
    return Cut(small_stack(stack, extent, finest), finest, diameter, shift)


def race(
    images: Sequence[Coarse],
    cut: Cut,
    tasks: Sequence[tuple[int, int]],
    schedule: Schedule,
    *,
    classes: int = 1,
    first: Density | None = None,
    scheduler: str | Client | None = None,
    progress: bool = False,
) -> list[list[Start]]:
    """Run starts of several sets of images, of each the likeliest few until they settle.

    Parameters
    ----------
    images : sequence of Coarse
    cut : Cut
        What they were made of.
    tasks : sequence of (int, int)
        Seed of a start, and which images it looks at.
    schedule : Schedule
    classes : int
    first : Density, optional
        A map to begin with; see :meth:`Start.begin_with`.
    scheduler : str or distributed.Client, optional
        Whose workers run the starts, one in a thread; see :func:`cryoem.orient`.
    progress : bool

    Returns
    -------
    list of lists of Start
        Those of each set, in the order of ``tasks``.
    """
    from tqdm.auto import tqdm

    count = np.bincount([at for _, at in tasks])
    rising, last = schedule.rising, schedule.rounds - schedule.rising
    total = len(tasks) * rising + int(np.minimum(count, FINALISTS).sum()) * last
    given_up = threading.Event()
    with (
        threadpoolctl.threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(threads.count()) as pool,
        tqdm(total=total, desc="ab initio", unit="round", disable=not progress) as bar,
    ):

        def told(done: int, settling: int) -> bool:
            bar.total += settling
            bar.update(done)
            return not given_up.is_set()

        # Workers' rounds are heard of when a start comes back.
        tell = told if scheduler is None else None
        job = _Running(images, cut, schedule, classes, first, tell)

        def run(parts: Sequence[tuple[int | Start, int]]) -> list[Start]:
            found: list[Any] = [None] * len(parts)
            before = [0 if isinstance(given, int) else given.done for given, _ in parts]
            worked = workers.worked(job, enumerate(parts), scheduler, here=pool.map)
            with contextlib.closing(worked):
                for number, start in worked:
                    start.images = images[parts[number][1]]
                    found[number] = start
                    if tell is None:
                        told(start.done - before[number], max(0, start.done - schedule.rounds))
            return found

        try:
            begun = run(tasks)
            sets = _by_set(begun, tasks, len(images))
            best = [begun.index(s) for some in sets for s in ranked(some)[:FINALISTS]]
            ended = run([(begun[i], tasks[i][1]) for i in best])
        except BaseException:  # told before the pool waits: Ctrl-C waits for the rounds under way
            given_up.set()
            raise
        for i, start in zip(best, ended, strict=True):
            begun[i] = start
        return _by_set(begun, tasks, len(images))


def _by_set(
    starts: Sequence[Start], tasks: Sequence[tuple[int, int]], sets: int
) -> list[list[Start]]:
    found: list[list[Start]] = [[] for _ in range(sets)]
    for start, (_, at) in zip(starts, tasks, strict=True):
        found[at].append(start)
    return found


@dataclass(frozen=True, eq=False)
class _Running:
    """What starts are begun with, and those that go on are ended with.

    ``tell`` takes rounds that are done, and others that will be; False: no more are wanted.
    """

    images: Sequence[Coarse]
    cut: Cut
    schedule: Schedule
    classes: int
    first: Density | None
    tell: Callable[[int, int], bool] | None

    def place(self, number: int, part: tuple[int | Start, int]) -> tuple[int, Start]:
        """Begin a start of a seed, or end one; it comes without its images, which are large."""
        given, at = part
        if isinstance(given, Start):
            start = given
            start.images = self.images[at]
            self._end(start)
        else:
            start = self._begin(given, self.images[at])
        del start.images
        return number, start

    def _begin(self, seed: int, images: Coarse) -> Start:
        start = Start(
            images, self.cut.diameter_angstrom, self.cut.shift_angstrom, seed,
            classes=self.classes, schedule=self.schedule,
        )  # fmt: skip
        if self.first is not None:
            self._told(start.begin_with(self.first), 0)
        self._run(start, self.schedule.rising)
        return start

    def _end(self, start: Start) -> None:
        rounds = self.schedule.rounds
        self._run(start, rounds)
        evidence = _evidence(start)
        while start.done < LONGEST * rounds and self._told(0, SETTLING):
            self._run(start, start.done + SETTLING)
            before, evidence = evidence, _evidence(start)
            if evidence < before + GAIN * abs(before):
                break

    def _run(self, start: Start, rounds: int) -> None:
        while start.done < rounds and self._told(0, 0):
            start.advance()
            self._told(1, 0)

    def _told(self, done: int, settling: int) -> bool:
        return self.tell is None or self.tell(done, settling)


def ranked(starts: list[Start]) -> list[Start]:
    """Starts of the same images, the one whose maps make these likeliest first."""
    if len(starts) < 2:
        return starts
    coarsest = max(start.resolution_angstrom for start in starts)
    evidence = [_evidence(start, coarsest) for start in starts]
    return [starts[i] for i in np.argsort(evidence)[::-1]]


def likeliest(starts: list[Start]) -> Start:
    """The likeliest of the starts that went on to the end."""
    return ranked([start for start in starts if start.done >= start.schedule.rounds])[0]


def _evidence(start: Start, resolution_angstrom: float | None = None) -> float:
    """How likely a start's maps make its images."""
    grid = rotations.grid(start.schedule.orientations[1])
    found = start.look(judges(start), grid, resolution_angstrom=resolution_angstrom, judged=True)
    return float(found.evidence.mean())


def judges(start: Start) -> Int[np.ndarray, " m"]:
    """Rows of the images by which maps are compared."""
    n = len(start.images)
    return np.sort(rotations.generator(0, "judges").choice(n, min(n, JUDGES), replace=False))
