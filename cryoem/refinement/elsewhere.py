"""Particles that are likelier elsewhere than where refinement has left them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from .. import evaluation, imaging, matching, rotations
from ..density import Density
from ..particles import ParticleStack
from ..preprocessing import Preprocessing
from ..projection import project
from ..symmetry import group
from .fit import LEAST_CONTRAST, RefinedStack, refine
from .search import Search

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["asked", "by_chance", "found_again", "surely_astray", "with_likely_errors"]

#: Of more particles than this a random sample is asked; then those whose contrast is no higher than
#: what this percentage of the sample's have that are brought elsewhere.
ASKED, LOW = 4000, 95

#: Detail that is matched: between these, angstrom, in this many periods of the mask's reach. What
#: tells the sides of a small particle apart is finer. And the coarsest that anything is refined
#: against, in periods of the box.
COARSE, PERIODS, COARSEST = (10.0, 15.0), 6, 4
#: Among how many orientations, spread evenly.
REFERENCES = 21_600
#: Where in its frame a particle lies, wherever others do, is asked of coarser detail (angstrom), so
#: far apart in it, among fewer orientations; the likeliest few places are then tried.
LOCATED, APART, FEW, LIKELY = 20.0, 3 / 8, 4608, 5
#: At how many places on the sphere, at most, a particle is tried, and how much less likely than the
#: best of them, in logarithm, one may be: coarse detail does not say which of a few is right.
PLACES, WORTH = 6, 8.0
#: Percentage of the particles that lie no farther off the middle of their frames.
MOST = 95
#: Radians: nearer than the references lie apart there is no other place.
LEAST_REACH = 0.1
#: Where another place must be surely likelier, it explains more by this share at least: where there
#: is hardly any noise, what interpolation leaves is not to be taken for a reason.
MORE = 1e-3
#: How many times as much another place explains of an image that is surely astray.
FAR_BETTER = 1.2
#: Particles that are tried together.
AT_ONCE = 4000
#: How many particles are made of a map to see how far off they end.
MADE = 200


def found_again(
    stack: ParticleStack,
    given: ParticleStack,
    references: Sequence[Density],
    mask: Float[np.ndarray, "m m m"],
    resolution_angstrom: float,
    *,
    search: Search,
    symmetry: str,
    scheduler: str | Client | None,
    lost: float | None = None,
) -> tuple[ParticleStack, float]:
    """Bring particles to where they are likelier, on the sphere and in their frames.

    Tried is where they match best, and about as well: of a particle that looks much the same from
    behind, coarse detail does not say which. What then is about as likely by detail of twice the
    resolution is refined to the end. Shifts that are tried are the given one, and those that coarse
    detail finds likely, as far from the middle as particles lie.
    Of more than 4,000 particles so many at random are asked, then those alone that show as little
    of what they are thought to show as those of the sample that are brought elsewhere.

    Parameters
    ----------
    stack : ParticleStack
        With half-sets, where refinement has left them, at the contrasts that it has found.
    given : ParticleStack
        The same with the shifts of the beginning: where a particle wrongly lies, its shift has been
        led astray too, by then or already there.
    references : two of Density
        That half-set 1 and half-set 2 are judged by.
    mask : (m, m, m) array
        Of the references.
    resolution_angstrom : float
        The finest detail of them that is used.
    search : Search
        How places are refined; nearer than its spread there is nothing to be tried.
    symmetry : str
    scheduler : str or distributed.Client, optional
    lost : float, optional
        Share of the particles that may be thought to lie wrongly, beforehand. A particle is brought
        elsewhere where the likelihood outweighs these odds (:func:`by_chance`), for which the
        stack's noise must be known; by default wherever it is likelier.

    Returns
    -------
    stack : ParticleStack
    moved : float
        Share of the particles that were brought elsewhere.
    """
    given = given.replace(noise=stack.noise)
    q, shifts, contrast = stack.oriented().copy(), stack.shifts_px.copy(), stack.contrast
    # Of all: those that are tried are mostly odd ones, and what is usual they do not tell.
    least = [
        None if contrast is None else LEAST_CONTRAST * float(np.median(contrast[stack.half(half)]))
        for half in (1, 2)
    ]
    everywhere = _positions(shifts, LOCATED * APART / stack.pixel_size_angstrom)
    margin = None if lost is None else by_chance(search, symmetry, lost, len(everywhere))
    likelier = partial(
        _likelier, references=references, least_contrasts=least, mask=mask, search=search,
        resolution_angstrom=resolution_angstrom, symmetry=symmetry, scheduler=scheduler,
        margin=margin, everywhere_px=everywhere,
    )  # fmt: skip

    def bring(rows: Int[np.ndarray, " r"]) -> np.ndarray:
        q[rows], shifts[rows] = likelier(stack.select(rows), given.select(rows))
        apart = group(symmetry).distance(q[rows], stack.oriented()[rows])
        return np.asarray(apart > _reach(search))

    sample = asked(stack)
    moved = bring(sample)
    total = moved.sum()
    others = np.setdiff1d(np.arange(len(stack)), sample)
    if moved.any() and contrast is not None:
        # An image that lies astray shows little of what it is thought to show.
        low = np.percentile(contrast[sample][moved], LOW)
        others = others[contrast[others] <= low]
    if moved.any() and len(others):
        total += bring(others).sum()
    return stack.with_poses(q, shifts), float(total / len(stack))


def surely_astray(
    stack: ParticleStack,
    found: ParticleStack,
    references: Sequence[Density],
    resolution_angstrom: float,
    search: Search,
    scheduler: str | Client | None,
) -> float:
    """Share of 4,000 particles, or all, that are explained far better where they were found.

    Not just as well: mates of a symmetric particle are, and noise chooses among them.
    """
    rows, better = asked(stack), []
    for half, reference in zip((1, 2), references, strict=True):
        mine = np.intersect1d(rows, stack.half(half))
        here, there = (
            refine(
                one.select(mine), reference, resolution_angstrom=resolution_angstrom,
                search=search.near, scheduler=scheduler,
            ).gain
            for one in (stack, found)
        )  # fmt: skip
        better.append(there > FAR_BETTER * here)
    return float(np.concatenate(better).mean())


def with_likely_errors(
    particles: RefinedStack,
    reference: Density,
    mask: Float[np.ndarray, "m m m"],
    search: Search,
    symmetry: str,
    scheduler: str | Client | None,
    lost: float | None = None,
) -> RefinedStack:
    """The errors to expect, by how far off particles end that are made of the reference.

    A covariance tells how wide one place is. In loud noise the likeliest orientation may be another
    one, which only images of known orientations show: 200, as these particles were found, in their
    noise, are refined and sought elsewhere as they were. What they are off beyond what their own
    covariances let expect, in the mean, every particle is thought to be, too.
    """
    if search.steps == 0:
        return particles
    rng = rotations.generator(0, "made of the map")
    rows = np.sort(np.resize(rng.permutation(len(particles)), MADE))
    some = particles.select(rows)
    images = imaging.shift(project(reference, some.oriented()), some.shifts_px)
    if (ctf := some.ctf()) is not None:
        images = imaging.apply_ctf(images, ctf)
    images *= some.contrast[:, None, None].astype(np.float32)
    assert some.noise is not None  # refinement has estimated it
    images += some.noise.draw(MADE, some.box_px, rng, group=some.optics_group)
    made = some.with_images(images).replace(half_set=np.arange(MADE) % 2 + 1)
    again: dict[str, Any] = {
        "resolution_angstrom": particles.resolution_angstrom, "scheduler": scheduler
    }  # fmt: skip
    near = refine(made, reference, search=search, **again)
    brought, moved = found_again(
        near, made, (reference, reference), mask, search=search, symmetry=symmetry, lost=lost,
        **again,
    )  # fmt: skip
    if moved:
        near = refine(brought, reference, search=search.near, **again)
    off = group(symmetry).distance(near.oriented(), some.oriented())
    beyond = max(0.0, float(off.mean() - near.expected_error_rad.mean()))
    likely = np.minimum(particles.expected_error_rad + beyond, evaluation.RANDOM)
    return particles.replace(expected_error_rad=likely)


def by_chance(search: Search, symmetry: str, lost: float, positions: int = 1) -> float:
    """How much likelier, in logarithm, another place must be to be believed: the odds beforehand.

    Where it lies now a particle lies rightly in all but this share of the cases; else anywhere
    among as many places as orientations have room for balls of what is searched about one, and at
    any of the positions in the frame.
    """
    ball = 4 / 3 * math.pi * _reach(search) ** 3
    places = max(8 * math.pi**2 / len(group(symmetry).elements) / ball, 1.0)
    return math.log(places * positions * (1 - lost) / lost)


def _reach(search: Search) -> float:
    """Radians: within it refinement has searched, and there is no other place."""
    return max(search.spread_rad, LEAST_REACH)


def asked(stack: ParticleStack) -> Int[np.ndarray, " r"]:
    """Rows of 4,000 particles at random, as a mean wants at most, half of them of either half."""
    if len(stack) <= ASKED:
        return np.arange(len(stack))
    rng = rotations.generator(0, "asked")
    halves = [rng.permutation(stack.half(half))[: ASKED // 2] for half in (1, 2)]
    return np.sort(np.concatenate(halves))


def _likelier(
    stack: ParticleStack,
    given: ParticleStack,
    *,
    references: Sequence[Density],
    least_contrasts: Sequence[float | None],
    mask: Float[np.ndarray, "m m m"],
    resolution_angstrom: float,
    search: Search,
    symmetry: str,
    scheduler: str | Client | None,
    margin: float | None,
    everywhere_px: Float[np.ndarray, "s 2"],
) -> tuple[Float[np.ndarray, "n 4"], Float[np.ndarray, "n 2"]]:
    """Where particles are likeliest: there, or where they are."""
    q, shifts, points = stack.oriented().copy(), stack.shifts_px.copy(), group(symmetry)
    for half, reference, least in zip((1, 2), references, least_contrasts, strict=True):
        mine = np.flatnonzero(stack.half_set == half)
        if len(mine) == 0:
            continue
        places, there_px, likely = _places(
            given.select(mine), reference, mask, search, symmetry, resolution_angstrom,
            everywhere_px, scheduler,
        )  # fmt: skip
        refined = partial(refine, density=reference, least_contrast=least, scheduler=scheduler)
        for start in range(0, len(mine), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            here = mine[part]
            known = np.broadcast_to(q[here][:, None], places[part].shape)
            apart = points.distance(places[part].reshape(-1, 4), known.reshape(-1, 4))
            worth = likely[part] > likely[part, :1] - WORTH
            worth &= apart.reshape(worth.shape) > _reach(search)
            image, place = np.nonzero(worth)
            if len(image) == 0:
                continue
            at = given.select(here[image])
            at = at.with_poses(places[part][image, place], there_px[part][image, place])
            found = _better(
                stack.select(here), at, image, refined, resolution_angstrom, search, margin
            )
            q[here[found[0]]], shifts[here[found[0]]] = found[1:]
    return q, shifts


def _better(
    stack: ParticleStack,
    tried: ParticleStack,
    image: Int[np.ndarray, " t"],
    refined: Callable[..., RefinedStack],
    resolution_angstrom: float,
    search: Search,
    margin: float | None,
) -> tuple[Int[np.ndarray, " f"], Float[np.ndarray, "f 4"], Float[np.ndarray, "f 2"]]:
    """Which particles are likelier elsewhere, and where: the last of several is the likeliest."""
    # Where a particle is, it has been refined; elsewhere it will have been, by coarse detail.
    extent = stack.box_px * stack.pixel_size_angstrom
    coarse = max(resolution_angstrom, min(2 * resolution_angstrom, extent / COARSEST))
    first = refined(tried, resolution_angstrom=coarse, search=replace(search, starts=1))
    worth = _likeliest(image, first.gain / 2)
    tried = tried.with_poses(first.oriented(), first.shifts_px).select(worth)
    others, of = np.unique(image[worth], return_inverse=True)
    here, there = (
        refined(
            start,
            resolution_angstrom=resolution_angstrom,
            search=search.near,
            noise_variance=_typical(start),
        )
        for start in (stack.select(others), tried)
    )
    least = here.gain if margin is None else (1 + MORE) * here.gain + 2 * margin
    order = np.argsort(there.gain)
    order = order[there.gain[order] > least[of[order]]]
    return others[of[order]], there.quaternions[order], there.shifts_px[order]


def _typical(stack: ParticleStack) -> float:
    """The variance of the noise, the mean over the particles; 1 where it is not known."""
    return 1.0 if stack.noise is None else float(stack.noise.of_each(stack.optics_group).mean())


def _likeliest(
    image: Int[np.ndarray, " t"], likely: Float[np.ndarray, " t"]
) -> Int[np.ndarray, " w"]:
    """Which tries are about as likely as the best of their image."""
    best = np.full(image.max() + 1, -np.inf)
    np.maximum.at(best, image, likely)
    return np.flatnonzero(likely > best[image] - WORTH)


def _positions(shifts_px: Float[np.ndarray, "n 2"], step_px: float) -> Float[np.ndarray, "s 2"]:
    """Where in their frames particles lie, all but a few of them: a grid about the middle."""
    middle = np.median(shifts_px, axis=0)
    reach = np.percentile(np.linalg.norm(shifts_px - middle, axis=1), MOST)
    most = int(reach / step_px + 0.5)
    steps = np.arange(-most, most + 1) * step_px
    grid = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    return middle + grid[np.linalg.norm(grid, axis=1) <= reach + step_px / 2]


def _places(
    stack: ParticleStack,
    reference: Density,
    mask: Float[np.ndarray, "m m m"],
    search: Search,
    symmetry: str,
    resolution_angstrom: float,
    everywhere_px: Float[np.ndarray, "s 2"],
    scheduler: str | Client | None,
) -> tuple[Float[np.ndarray, "n c 4"], Float[np.ndarray, "n c 2"], Float[np.ndarray, "n c"]]:
    """Where particles match best, and the logarithm of the likelihood there; -inf: no place."""
    box, voxel = stack.box_px, stack.pixel_size_angstrom
    # Beyond the mask hardly anything of a reference is to be compared.
    reach = np.abs(np.argwhere(mask) - len(mask) // 2).max() * box / len(mask)
    reference = reference.resampled(box)

    def by_detail(angstrom: float) -> Preprocessing:
        small = min(box, max(16, 2 * int(np.ceil(box * voxel / angstrom))))
        crop = min(small, 2 * int(np.ceil(1.1 * reach * small / box)) + 2)
        return Preprocessing(box, small, crop, voxel)

    told: dict[str, Any] = {
        "apart_rad": 2 * _reach(search), "symmetry": symmetry, "scheduler": scheduler
    }  # fmt: skip
    shifts = stack.shifts_px[:, None]
    tried = np.broadcast_to(everywhere_px, (len(stack), *everywhere_px.shape))
    if len(everywhere_px) > LIKELY:
        coarse = by_detail(max(resolution_angstrom, LOCATED))
        _, tried, _ = matching.candidates(
            stack, reference, coarse, count=LIKELY, shifts_px=tried, references=FEW, **told
        )
    if not np.allclose(tried, shifts):
        shifts = np.concatenate([shifts, tried], axis=1)
    detail = max(resolution_angstrom, float(np.clip(reach * voxel / PERIODS, *COARSE)))
    finer = by_detail(detail)
    places, shifts, scores = matching.candidates(
        stack, reference, finer, count=PLACES, shifts_px=shifts, references=REFERENCES, **told
    )
    # Of normalised images in noise.
    likely = finer.crop_px**2 / 2 * np.maximum(scores, 0) ** 2
    return places, shifts, np.where(np.isfinite(scores), likely, -np.inf)
