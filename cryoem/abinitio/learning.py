"""A network that learns from the images' own map, to place the many that did not make it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from .. import maps, surveying
from ..density import Density
from ..io.files import PathLike
from ..particles import ParticleStack
from ..recovery import orient
from ..symmetry import group

if TYPE_CHECKING:
    from distributed import Client

    from ..estimator import Estimator

__all__ = ["IMAGES", "Placed", "learn", "place"]

#: Projections of the map that a network learns from.
IMAGES = 38_400


@dataclass(frozen=True, eq=False)
class Placed:
    """Particles that a network placed, and how well it did.

    Attributes
    ----------
    particles : ParticleStack
        Those of the map as they were, the others by the network; with expected errors, the
        network's scaled by what it is off on those of the map.
    mean_rad, median_rad : float
        How far off it is on these: between its orientations and those that made the map.
    chance_rad : float
        The median if every image had another one's orientation.
    """

    particles: ParticleStack
    mean_rad: float
    median_rad: float
    chance_rad: float


def learn(
    particles: ParticleStack,
    density: Density,
    *,
    symmetry: str = "C1",
    images: int = IMAGES,
    seed: int = 0,
    checkpoint: PathLike | None = None,
    progress: bool = False,
) -> Estimator:
    """Train an estimator of distances on a map that the images made themselves.

    Where the paper trains on a structure that is known, this one is found from a part of the images
    (:func:`cryoem.ab_initio`).

    Parameters
    ----------
    particles : ParticleStack
        That made the map, with their shifts: noise, SNR, shifts and defocus are drawn as theirs.
    density : Density
        The map; noise outside the particle is masked off.
    symmetry : str
    images : int
        To train on.
    seed, checkpoint, progress
        See :func:`cryoem.train`.

    Returns
    -------
    Estimator
    """
    from ..estimator import train_on

    density = density.sampled_as(particles.box_px, particles.pixel_size_angstrom)
    cube = Density(maps.soft_mask(density) * density.values, density.voxel_size_angstrom)
    ranges = surveying.survey(particles, seed=seed).training()
    model, _ = train_on(
        cube,
        ranges,
        images=images,
        symmetry=symmetry,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )
    return model


def place(
    estimator: Estimator,
    stack: ParticleStack,
    rows: Int[np.ndarray, " m"],
    known: ParticleStack,
    density: Density,
    *,
    symmetry: str = "C1",
    seed: int = 0,
    work: PathLike | None = None,
    scheduler: str | Client | None = None,
    progress: bool = False,
) -> Placed:
    """Place all particles by a network, in the frame of a map that some of them made.

    Parameters
    ----------
    estimator : Estimator
    stack : ParticleStack
    rows : (m,) array of int
        Which of them made the map,
    known : ParticleStack
        and where they lie in it: they stay there, and judge the network.
    density : Density
    symmetry : str
    seed, work, scheduler, progress
        See :func:`cryoem.orient`.

    Returns
    -------
    Placed
    """
    reference = density.sampled_as(stack.box_px, stack.pixel_size_angstrom)
    found = orient(
        estimator,
        stack,
        reference=reference,
        seed=seed,
        work=work,
        scheduler=scheduler,
        progress=progress,
    )
    points, there = group(symmetry), known.oriented()
    off = points.distance(found.oriented()[rows], there)
    chance = np.median(points.distance(np.roll(there, 1, axis=0), there))
    scale = off.mean() / found.expected_error_rad[rows].mean()
    q, shifts = found.oriented().copy(), found.shifts_px.copy()
    expected = scale * found.expected_error_rad
    q[rows], shifts[rows] = there, known.shifts_px
    if known.expected_error_rad is not None:
        expected[rows] = known.expected_error_rad
    particles = stack.with_poses(q, shifts).replace(expected_error_rad=expected, contrast=None)
    return Placed(particles, float(off.mean()), float(np.median(off)), float(chance))
