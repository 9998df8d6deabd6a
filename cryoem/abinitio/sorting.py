"""Images of several particles, sorted by the maps that they make themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from scipy.special import logsumexp, softmax

from .. import rotations, workers
from ..density import Density
from ..errors import InputError
from ..particles import ParticleStack
from ..rotations import Seed
from .annealing import DEFAULT, Schedule, Start
from .coarse import Coarse, coarsened
from .starts import Cut, cut_out, likeliest, race

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Classes", "classify", "second_particle"]

#: Starts of a second map, of each half; and rounds for which it and the first share the images out.
SECOND_STARTS, TOGETHER = 2, 12


@dataclass(frozen=True, eq=False)
class Classes:
    """Which map explains which image.

    Attributes
    ----------
    evidence : (n, c) array
        Logarithm of the likelihood of each image by each class's map, over an empty image's: the
        mean over orientations and shifts. Classes are in the order of their number of images.
    maps : tuple of Density
        Coarse, of the cut-out particles; half-maps of a class tell whether to believe it
        (:func:`cryoem.ab_initio` of its images).
    """

    evidence: Float[np.ndarray, "n c"]
    maps: tuple[Density, ...]

    @property
    def number(self) -> Int[np.ndarray, " n"]:
        """Class of each image, from 1; 0: none of the maps explains it, it is empty or junk."""
        return np.where(self.evidence.max(axis=1) > 0, self.evidence.argmax(axis=1) + 1, 0)

    @property
    def probabilities(self) -> Float[np.ndarray, "n c+1"]:
        """Of each class, all being equally frequent; the first is that of none."""
        return softmax(np.pad(self.evidence, ((0, 0), (1, 0))), axis=1)


def classify(
    stack: ParticleStack,
    classes: int,
    *,
    starts: int = 4,
    diameter_angstrom: float | None = None,
    shift_angstrom: float | None = None,
    images: int = 10_000,
    schedule: Schedule = DEFAULT,
    seed: Seed = 0,
    scheduler: str | Client | None = None,
    progress: bool = False,
) -> Classes:
    """Sort images of several particles, or of one and of junk, without a model of any.

    Expectation-maximisation as in :func:`cryoem.ab_initio`, of several maps at once: each image is
    shared out among orientations, shifts and maps. All images together make the maps, not each half
    by itself: whether a class is a particle is told by the halves of its images.

    Parameters
    ----------
    stack : ParticleStack
        White on black, on a background of zero.
    classes : int
        How many maps: one more than there are particles leaves room for junk.
    starts : int
        Random starts; the likeliest is kept.
    diameter_angstrom, shift_angstrom, images, schedule, seed, scheduler, progress
        See :func:`cryoem.ab_initio`.

    Returns
    -------
    Classes

    References
    ----------
    Scheres, J. Mol. Biol. 415 (2012); Punjani et al., Nat. Methods 14 (2017).
    """
    if classes < 1 or starts < 1:
        raise InputError(f"wanted at least 1 class and 1 start; got {classes} and {starts}")
    workers.reached(scheduler)
    cut = cut_out(stack.divided(), diameter_angstrom, shift_angstrom, schedule, seed)
    coarse = coarsened(cut.stack, cut.finest_angstrom)
    rng = rotations.generator(seed, "classes")
    some = coarse.select(np.sort(rng.permutation(len(stack))[:images]))
    tasks = [(int(s), 0) for s in rng.integers(2**31, size=starts)]
    (found,) = race(
        [some], cut, tasks, schedule, classes=classes, scheduler=scheduler, progress=progress
    )
    best = likeliest(found).on(coarse)
    pixel, mask = cut.stack.pixel_size_angstrom, best.mask()
    maps = [Density(volume * mask, pixel) for volume in best.volumes]
    evidence = _evidence_of(best, coarse, best.resolution_angstrom)
    size = np.bincount(Classes(evidence, ()).number, minlength=classes + 1)[1:]
    order = np.argsort(-size, kind="stable")
    return Classes(evidence[:, order], tuple(maps[i] for i in order))


def second_particle(
    best: list[Start],
    images: list[Coarse],
    cut: Cut,
    schedule: Schedule,
    seed: Seed,
    *,
    scheduler: str | Client | None = None,
    progress: bool = False,
) -> float:
    """Share of the images that are of another particle, where two maps explain images better.

    Of each half, the images that its map explains worst are solved by themselves; that map and the
    first one then share out all images of the half, and the other half's are asked, which neither
    has seen. Where all images are of one particle, one of the three maps, asked at as many
    orientations as two are, explains them better than two from as many images, which are worse ones
    of it; where they are of two, each has its own.

    Parameters
    ----------
    best : list of two Start
        That gave the halves their maps.
    images : list of two Coarse
        The halves.
    cut : Cut
        What these were made of.
    schedule : Schedule
    seed : int or numpy.random.Generator
    scheduler : str or distributed.Client, optional
    progress : bool
        Show a bar.

    Returns
    -------
    float
        Of the smaller class, the mean over the halves; 0 where one map explains as much as two.
    """
    worst = []
    for start, half in zip(best, images, strict=True):
        evidence = _evidence_of(start, half, start.resolution_angstrom)[:, 0]
        worst.append(half.select(np.sort(np.argsort(evidence)[: len(half) // 2])))
    rng = rotations.generator(seed, "second map")
    seeds = rng.integers(2**31, size=2 * SECOND_STARTS)
    tasks = [(int(s), i % 2) for i, s in enumerate(seeds)]
    gains, shares = [], []
    raced = race(worst, cut, tasks, schedule, scheduler=scheduler, progress=progress)
    for h, starts in enumerate(raced):
        second = likeliest(starts)
        both = best[h].joined(second, images[h])
        for _ in range(TOGETHER):
            both.advance()
        finest = max(best[h].resolution_angstrom, both.resolution_angstrom)
        two, again = (_evidence_of(both, images[1 - h], finest) for _ in range(2))
        first = [_evidence_of(best[h], images[1 - h], finest) for _ in range(2)]
        # A map in two frames has as many orientations to choose from as two maps in one.
        alone = [np.hstack(first)] + [np.stack(e, axis=1) for e in zip(two.T, again.T, strict=True)]
        gains.append(_mean_of(two) - max(map(_mean_of, alone)))
        shares.append(np.mean(two[:, 0] > two[:, 1]))
    return float(np.mean(np.minimum(shares, 1 - np.array(shares)))) if np.mean(gains) > 0 else 0.0


def _mean_of(evidence: Float[np.ndarray, "n c"]) -> float:
    """Mean evidence of images, by whichever of the maps, or at whichever orientations."""
    return float(logsumexp(evidence, axis=1).mean())


def _evidence_of(
    start: Start, images: Coarse, resolution_angstrom: float
) -> Float[np.ndarray, "n c"]:
    """Evidence of images by each map of a start, wherever they lie."""
    rows, grid, found = np.arange(len(images)), start.random_grid(), []
    for volume in start.volumes * start.mask():
        at = start.on(images)  # of which nothing is known
        seen = at.look(
            rows, grid, volumes=volume[None], resolution_angstrom=resolution_angstrom, judged=True
        )
        found.append(seen.evidence)
    return np.stack(found, axis=1)
