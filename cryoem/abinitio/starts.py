"""Starts beside each other: what they look at, and which of them makes the images likeliest."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import threadpoolctl
from jaxtyping import Int

from .. import rotations, surveying, threads
from ..density import Density
from ..errors import InputError
from ..particles import ParticleStack
from ..rotations import Seed
from .annealing import COARSEST, DETAIL, FIRST, Schedule, Start
from .coarse import Coarse, small_stack

__all__ = ["Cut", "cut_out", "judges", "race", "ranked"]

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
#: Images from which a map is sought.
FEWEST = 20
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
    if len(stack) < FEWEST:
        raise InputError(f"wanted at least {FEWEST} images; got {len(stack)}")
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
    progress : bool

    Returns
    -------
    list of lists of Start
        Those of each set, in the order of ``tasks``.
    """
    from tqdm.auto import tqdm

    count = [sum(at == i for _, at in tasks) for i in range(len(images))]
    last = schedule.rounds - schedule.rising
    total = len(tasks) * schedule.rising + sum(min(FINALISTS, n) for n in count) * last
    given_up = threading.Event()
    with (
        threadpoolctl.threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(threads.count()) as pool,
        tqdm(total=total, desc="ab initio", unit="round", disable=not progress) as bar,
    ):

        def run(start: Start, rounds: int) -> Start:
            while start.done < rounds and not given_up.is_set():
                start.advance()
                bar.update()
            return start

        def begin(task: tuple[int, int]) -> Start:
            seed, at = task
            start = Start(
                images[at], cut.diameter_angstrom, cut.shift_angstrom, seed,
                classes=classes, schedule=schedule,
            )  # fmt: skip
            if first is not None:
                bar.update(start.begin_with(first))
            return run(start, schedule.rising)

        def finish(start: Start) -> None:
            evidence = _evidence(run(start, schedule.rounds))
            while start.done < LONGEST * schedule.rounds:
                bar.total += SETTLING
                before, evidence = evidence, _evidence(run(start, start.done + SETTLING))
                if evidence < before + GAIN * abs(before):
                    break

        try:
            begun = list(pool.map(begin, tasks))
            found = [
                [start for start, (_, at) in zip(begun, tasks, strict=True) if at == i]
                for i in range(len(images))
            ]
            list(pool.map(finish, [s for starts in found for s in ranked(starts)[:FINALISTS]]))
        except BaseException:  # told before the pool waits: Ctrl-C waits for the rounds under way
            given_up.set()
            raise
    return found


def ranked(starts: list[Start]) -> list[Start]:
    """Starts of the same images, the one whose maps make these likeliest first."""
    if len(starts) < 2:
        return starts
    coarsest = max(start.resolution_angstrom for start in starts)
    evidence = [_evidence(start, coarsest) for start in starts]
    return [starts[i] for i in np.argsort(evidence)[::-1]]


def _evidence(start: Start, resolution_angstrom: float | None = None) -> float:
    """How likely a start's maps make its images."""
    grid = rotations.grid(start.schedule.orientations[1])
    resolution = resolution_angstrom or start.resolution_angstrom
    return float(start.look(judges(start), grid, resolution_angstrom=resolution).evidence.mean())


def judges(start: Start) -> Int[np.ndarray, " m"]:
    """Rows of the images by which maps are compared."""
    n = len(start.images)
    return np.sort(rotations.generator(0, "judges").choice(n, min(n, JUDGES), replace=False))
