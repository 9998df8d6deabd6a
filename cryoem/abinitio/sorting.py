"""Images of several particles, sorted by the maps that they make themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import softmax

from .. import rotations
from ..density import Density
from ..errors import InputError
from ..particles import ParticleStack
from ..rotations import Seed
from .annealing import DEFAULT, Schedule
from .coarse import coarsened
from .starts import cut_out, race, ranked

__all__ = ["Classes", "classify"]


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
    diameter_angstrom, shift_angstrom, images, schedule, seed, progress
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
    cut = cut_out(stack, diameter_angstrom, shift_angstrom, schedule, seed)
    coarse = coarsened(cut.stack, cut.finest_angstrom)
    rng = rotations.generator(seed, "classes")
    some = coarse.select(np.sort(rng.permutation(len(stack))[:images]))
    tasks = [(int(s), 0) for s in rng.integers(2**31, size=starts)]
    (found,) = race([some], cut, tasks, schedule, classes=classes, progress=progress)
    best = ranked([start for start in found if start.done >= schedule.rounds])[0].on(coarse)
    rows, grid = np.arange(len(stack)), best.random_grid()
    maps = [Density(volume * best.mask(), cut.stack.pixel_size_angstrom) for volume in best.volumes]
    evidence = np.stack(
        [
            best.on(coarse)
            .look(
                rows,
                grid,
                volumes=density.values[None],
                resolution_angstrom=best.resolution_angstrom,
            )
            .evidence
            for density in maps
        ],
        axis=1,
    )
    size = np.bincount(Classes(evidence, ()).number, minlength=classes + 1)[1:]
    order = np.argsort(-size, kind="stable")
    return Classes(evidence[:, order], tuple(maps[i] for i in order))
