"""Refinement of poses and contrasts against a density, to the limit.

An image is ``y = a S_t C P_R V + noise``: contrast ``a``, shift ``t``, CTF ``C``. Each particle
takes damped Gauss-Newton steps (Levenberg-Marquardt) with analytic derivatives
(:mod:`cryoem.refinement.least_squares`), from several starts and at rising resolution
(:mod:`cryoem.refinement.search`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from .. import evaluation, rotations, threads, workers
from ..density import Density
from ..errors import InputError
from ..noise import Noise, from_powers
from ..particles import PER_PARTICLE, ParticleStack
from ..single_images import seen_share
from .least_squares import LeastSquares, descend_each
from .search import Plan, Search, Stage, distinct_first, plan

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["RefinedStack", "noise_of", "refine"]

#: No particle's contrast falls below this share of the median; at zero an image says nothing.
LEAST_CONTRAST = 0.1
#: From how many images, at most, the median contrast is taken.
SAMPLE = 150
#: How many images tell how much of them was masked.
LOOKED_AT = 30
#: How many images of an optics group tell the noise's spectrum, how many are too few to, and of how
#: many groups so many are taken; of more groups fewer, if no more than this share of all.
NOISE_SAMPLE, ENOUGH, GROUPS, SHARE = 60, 30, 20, 1 / 10
#: Noise below this share of the images' power is as good as none.
CLEAN = 1e-2
#: How many times what a thread refines together is sent to a worker, at most; and in how many parts
#: at least every worker has its share, since some are slower.
SENT, SLOWER = 32, 4
DEFAULT = Search()


@dataclass(frozen=True, eq=False, kw_only=True)
class RefinedStack(ParticleStack):
    """Refined particles: poses, contrasts, and how well each is known.

    ``expected_error_rad`` is the mean angle that each covariance lets expect, at most that of
    random orientations; that a wrong orientation may be likelier is no part of it here.

    Attributes
    ----------
    covariances : (n, 3, 3) array, radians squared
        Of the rotation vector ``w`` in ``R exp([w])``, the shift and the contrast being unknown.
    shift_covariances : (n, 2, 2) array, pixels squared
    chi2 : (n,) array
        Squared residual over what the noise lets expect: 1 where model and noise are right.
    gain : (n,) array
        Twice the logarithm of the likelihood of the fit over that of an empty image.
    correlation : (n,) array
        Of each image with its projection, over the frequencies that were used.
    noise_variance : float
        Per pixel, the mean over the particles: what was given, or estimated from the residuals. The
        stack's ``noise`` has the spectra.
    resolution_angstrom : float
        The finest detail that was used.
    """

    quaternions: Float[np.ndarray, "n 4"] = field(metadata=PER_PARTICLE)
    contrast: Float[np.ndarray, " n"] = field(metadata=PER_PARTICLE)
    expected_error_rad: Float[np.ndarray, " n"] = field(metadata=PER_PARTICLE)
    covariances: Float[np.ndarray, "n 3 3"] = field(metadata=PER_PARTICLE)
    shift_covariances: Float[np.ndarray, "n 2 2"] = field(metadata=PER_PARTICLE)
    chi2: Float[np.ndarray, " n"] = field(metadata=PER_PARTICLE)
    gain: Float[np.ndarray, " n"] = field(metadata=PER_PARTICLE)
    correlation: Float[np.ndarray, " n"] = field(metadata=PER_PARTICLE)
    noise_variance: float
    resolution_angstrom: float

    def with_images(self, images: ArrayLike, *, pixel_size_angstrom: float | None = None) -> Self:
        """The same particles in other images; in other pixels the noise is not known (NaN)."""
        new = super().with_images(images, pixel_size_angstrom=pixel_size_angstrom)
        scale = self.pixel_size_angstrom / new.pixel_size_angstrom
        if scale == 1:
            return new
        return new.replace(
            shift_covariances=scale**2 * self.shift_covariances, noise_variance=np.nan
        )


def refine(
    stack: ParticleStack,
    density: Density,
    *,
    resolution_angstrom: float = 15.0,
    search: Search = DEFAULT,
    noise_variance: float | None = None,
    least_contrast: float | None = None,
    scheduler: str | Client | None = None,
    progress: bool = False,
) -> RefinedStack:
    """Refine orientations, shifts and contrasts against a density.

    Converges from about 0.3 rad. Every frequency counts by its noise; an image's mean is not used.

    Parameters
    ----------
    stack : ParticleStack
        With the orientations and shifts to start from. Images in files are read in chunks. Where
        its noise is not known, the spectrum is estimated from the residuals of a random sample.
    density : Density, a cube
        Of the images' extent, in a larger or smaller box that holds the detail that is used.
        Contrast is 1 for images that are sums of its voxels (:func:`cryoem.projection.project`).
    resolution_angstrom : float
        The finest detail of the density that is used. A density that was not made from these
        images is used to 15 A only: what appears beyond is their own (:func:`refine_against`).
    search : Search
        How orientations are sought about the given ones.
    noise_variance : float, optional
        Per pixel, the mean over the particles; scales the spectrum, and by it the covariances. By
        default from the residuals, over the pixels that are not masked (of 30 images, the mean).
    least_contrast : float, optional
        No particle's falls below it. By default a tenth of the median of a random sample's where
        they start, which must not be negative.
    scheduler : str or distributed.Client, optional
        The address of a Dask scheduler, or a client of one, whose workers refine; see
        :func:`cryoem.orient`. Default: this process, on all cores.
    progress : bool
        Show a bar.

    Returns
    -------
    RefinedStack

    Raises
    ------
    InputError
        Shapes that do not fit, no orientations, or images of inverted contrast.

    References
    ----------
    Golub and Pereyra, Inverse Problems 19 (2003), variable projection; Kay, "Fundamentals of
    Statistical Signal Processing", I.3, covariances; Scheres, J. Struct. Biol. 180 (2012).
    """
    from tqdm.auto import tqdm

    few = stack.select(np.linspace(0, len(stack) - 1, min(len(stack), LOOKED_AT)).astype(int))
    _check(stack := stack.divided(), density, resolution_angstrom, noise_variance)
    share = float(seen_share(few.images).mean())
    n, box = len(stack), stack.box_px
    stages = plan(density, box, resolution_angstrom, search)
    if stack.noise is None:
        stack = stack.replace(noise=_residual_noise(stages, stack, search, least_contrast))
    least = _least_contrast(stages, stack, search, least_contrast)
    q, shifts, grams = np.empty((n, 4)), np.empty((n, 2)), np.empty((n, 7, 7))
    job = _Refining(stages, search, least)
    at_once = stages.particles_at_once
    if scheduler is not None:
        at_once = workers.shared_out(n, SENT * at_once, scheduler, each=SLOWER, least=at_once)
    parts = zip(range(0, n, at_once), stack.chunks(at_once), strict=True)
    with (
        contextlib.closing(workers.worked(job, parts, scheduler, here=threads.each)) as refined,
        tqdm(total=n, desc="refinement", unit="particle", disable=not progress) as bar,
    ):
        for start, found in refined:
            rows = slice(start, start + len(found[0]))
            q[rows], shifts[rows], grams[rows] = found
            bar.update(len(found[0]))
    fit = _problem(stages, stages.stages[-1], np.empty((0, len(stages.order))), None, least)
    return _judged(stack, q, shifts, grams, fit, share, noise_variance, stages.resolution_angstrom)


def _check(
    stack: ParticleStack,
    density: Density,
    resolution_angstrom: float,
    noise_variance: float | None,
) -> None:
    """Refuse before anything is refined."""
    stack.oriented()
    wide = density.box_px * density.voxel_size_angstrom
    frame = stack.box_px * stack.pixel_size_angstrom
    if not np.isclose(wide, frame, rtol=0.01):
        raise InputError(
            f"the density is {wide:g} A wide, the images {frame:g} A; wanted one extent"
        )
    finest = 2 * density.voxel_size_angstrom
    if density.box_px < stack.box_px and resolution_angstrom < finest * (1 - 1e-6):
        raise InputError(
            f"the density's voxels hold detail of {finest:g} A and coarser, not of "
            f"{resolution_angstrom:g} A; wanted a density of the images' {stack.box_px} px, or a "
            "coarser resolution"
        )
    if noise_variance is not None and not noise_variance > 0:
        raise InputError(f"noise_variance must be positive, got {noise_variance}")
    if stack.noise is not None:
        stack.noise.of(stack.optics_group)


@dataclass(frozen=True, eq=False)
class _Refining:
    """What a worker refines particles with."""

    plan: Plan
    search: Search
    least_contrast: float

    def place(
        self, start: int, stack: ParticleStack
    ) -> tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Orientations, shifts and Gram matrices of a chunk's particles."""
        parts = stack.chunks(self.plan.particles_at_once)
        found = [_refined(self.plan, part, self.search, self.least_contrast)[:3] for part in parts]
        q, shifts, grams = (np.concatenate(each) for each in zip(*found, strict=True))
        return start, (q, shifts, grams)


def _observed(plan: Plan, stack: ParticleStack) -> tuple[np.ndarray, np.ndarray | None]:
    """The images' transforms at the plan's frequencies, (n, k), and what multiplies the model.

    Both are whitened. Where the noise is white, the latter is the CTF, or None.
    """
    images = plan.slices.from_images(stack.images[:])[:, plan.order]
    ky, kx = plan.slices.index
    transfer = stack.ctf(at=(ky[plan.order], kx[plan.order]))
    if stack.noise is not None and not stack.noise.is_white:
        radius = np.linalg.norm(plan.frequencies, axis=1) / stack.box_px
        groups, of = np.unique(stack.noise.of(stack.optics_group), return_inverse=True)
        gain = stack.noise.gain(radius, groups)[of]
        images = images * gain
        transfer = gain if transfer is None else gain * transfer
    return images, transfer


def _residual_noise(plan: Plan, stack: ParticleStack, search: Search, least: float | None) -> Noise:
    """The noise's spectrum, from what refining a random sample leaves of its images.

    Beyond the plan's resolution, all of them.
    """
    groups = stack.optics_groups
    sample = stack.replace(noise=Noise.white(1.0))
    order = rotations.generator(0, "noise").permutation(len(stack))
    each, of = max(ENOUGH, NOISE_SAMPLE * GROUPS // groups), stack.optics_group[order]
    if groups * each > max(NOISE_SAMPLE * GROUPS, SHARE * len(stack)):
        rows = order[: NOISE_SAMPLE * GROUPS]  # of all together
    else:
        nth = np.empty(len(of), int)  # of its group, in this order
        by_group = np.argsort(of, kind="stable")
        nth[by_group] = np.arange(len(of)) - np.searchsorted(of[by_group], of[by_group])
        rows = order[nth < min(NOISE_SAMPLE, each)]
    if len(rows) < len(stack):
        sample = sample.select(np.sort(rows))
    least = _least_contrast(plan, sample, search, least)
    shells = np.rint(np.linalg.norm(plan.slices.frequencies, axis=1)).astype(int)
    weights, box = plan.slices.weights, stack.box_px
    left, count, loud = np.zeros((groups, shells.max() + 1)), np.zeros(groups), 0.0

    def left_of(part: ParticleStack) -> tuple[np.ndarray, np.ndarray, float]:
        q, shifts, grams, fit = _refined(plan, part, search, least)
        power = np.abs(plan.slices.from_images(part.images[:])) ** 2 / box**2
        loud = float((power @ weights).sum())
        power[:, plan.order] = fit.residuals(q, shifts, fit.normal(grams)[1])
        left = np.zeros((groups, shells.max() + 1))
        for g in np.unique(part.optics_group):
            here = power[part.optics_group == g].sum(axis=0)
            left[g] = np.bincount(shells, weights * here)
        return left, np.bincount(part.optics_group, minlength=groups), loud

    for more in threads.each(left_of, sample.chunks(plan.particles_at_once)):
        left, count, loud = left + more[0], count + more[1], loud + more[2]
    if groups > 1:  # groups that few images are of are given what all have
        left = np.where(count[:, None] >= ENOUGH, left, left.sum(axis=0))
        count = np.where(count >= ENOUGH, count, count.sum())
    left /= count[:, None] * np.bincount(shells, weights)
    left[:, 0] = left[:, 1]  # an image's mean is not used
    # Where hardly any noise is, none is quieter than another.
    return from_powers(np.maximum(left, CLEAN * loud / (len(sample) * weights.sum())), box)


def _problem(
    plan: Plan, stage: Stage, observed: np.ndarray, ctf: np.ndarray | None, least_contrast: float
) -> LeastSquares:
    c = stage.count
    return LeastSquares(
        stage.slices,
        plan.frequencies[:c],
        plan.weights[:c],
        observed[:, :c],
        None if ctf is None else ctf[:, :c],
        plan.slices.box_px,
        least_contrast,
    )


def _refined(
    plan: Plan, stack: ParticleStack, search: Search, least_contrast: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, LeastSquares]:
    """Take a chunk of particles through all stages: (q, shifts, gram, last problem)."""
    m = len(stack)
    observed, ctf = _observed(plan, stack)
    given_q = stack.oriented()[:, None]
    given_shifts = stack.shifts_px[:, None]
    # Candidates of each particle: (m, starts, ...).
    q = rotations.perturb(given_q, search.offsets())
    shifts = np.repeat(given_shifts, search.starts, axis=1)
    live = np.ones(q.shape[:2], bool)
    for stage in plan.stages:
        fit = _problem(plan, stage, observed, ctf, least_contrast)
        owner, _ = np.nonzero(live)
        gain, grams = np.full(live.shape, -np.inf), np.zeros((*live.shape, 7, 7))
        q[live], shifts[live], grams[live] = descend_each(
            fit, owner, q[live], shifts[live], search.steps, stage.short
        )
        gain[live] = fit.normal(grams[live])[0]
        order, worth = distinct_first(gain, q, shifts)
        best = np.arange(m)[:, None], order[:, : stage.keep]
        q, shifts, grams, live = q[best], shifts[best], grams[best], worth[:, : stage.keep]
    q, shifts, grams = q[:, 0], shifts[:, 0], grams[:, 0]
    if len(plan.stages) > 1:
        # Coarse detail may lead astray: where it ends less likely than it was given.
        given = given_q[:, 0], given_shifts[:, 0]
        gain = fit.normal(fit.gram(np.arange(m), *given))[0]
        astray = np.flatnonzero(gain > fit.normal(grams)[0])
        if len(astray):
            q[astray], shifts[astray], grams[astray] = descend_each(
                fit, astray, given[0][astray], given[1][astray], search.steps, stage.short
            )
    return q, shifts, grams, fit


def _least_contrast(plan: Plan, stack: ParticleStack, search: Search, told: float | None) -> float:
    """The floor of the contrasts: as told, or by how a random sample correlates where it starts."""
    if told is not None:
        return told
    n = len(stack)
    rows = np.arange(n)
    if n > SAMPLE:
        rows = np.sort(rotations.generator(0, "contrast").choice(n, SAMPLE, replace=False))
    stage = plan.stages[0]

    def at_start(part: ParticleStack) -> np.ndarray:
        fit = _problem(plan, stage, *_observed(plan, part), least_contrast=0.0)
        return fit.gram(np.arange(len(part)), part.oriented(), part.shifts_px)

    sample = stack.select(rows).chunks(plan.particles_at_once)
    gram = np.concatenate(list(threads.each(at_start, sample)))
    mm, my, yy = gram[:, 0, 0], gram[:, 0, 6], gram[:, 6, 6]
    if not mm.sum() > 0:
        raise InputError("the density is zero at the resolution that is used")
    # Beside what noise of the images' own power would give, in standard deviations.
    z = my.sum() / max(np.sqrt(np.sum(mm * yy) / plan.weights[: stage.count].sum()), 1e-30)
    if search.steps > 0 and z < -6:
        raise InputError(
            "the images correlate negatively with the density: black and white are exchanged, in "
            "the images or in the density; wanted white particles (--invert, or "
            "ParticleStack.inverted, turns them) and a density that is positive"
        )
    typical = np.median(my / np.maximum(mm, 1e-30))
    return LEAST_CONTRAST * max(typical, 0.01 * float(np.sqrt(yy.sum() / mm.sum())))


def _judged(
    stack: ParticleStack,
    q: np.ndarray,
    shifts: np.ndarray,
    grams: np.ndarray,
    fit: LeastSquares,
    share: float,
    noise_variance: float | None,
    resolution_angstrom: float,
) -> RefinedStack:
    """How well each particle's parameters are known, from a share of the images' pixels."""
    gain, contrast, matrix, _ = fit.normal(grams)
    left = np.maximum(grams[:, 6, 6] - gain, 0) / (share * fit.samples - 6)  # six parameters
    spectrum = stack.noise
    assert spectrum is not None  # told, or estimated by now
    # Whitened, the noise of each optics group has its own variance.
    own = spectrum.of_each(stack.optics_group)
    typical = float(own.mean())
    own /= typical
    left /= own
    noise = float(left.mean()) if noise_variance is None else float(noise_variance)
    scale = np.sqrt(np.maximum(np.einsum("nii->ni", matrix), 1e-30))
    scale = 1 / (scale[:, :, None] * scale[:, None])
    # What the image says nothing about gets a variance that is large, not infinite.
    covariances = np.linalg.inv(matrix * scale + 1e-9 * np.eye(5)) * scale
    covariances *= noise * own[:, None, None]
    power = np.sqrt(np.maximum(grams[:, 0, 0] * grams[:, 6, 6], 1e-30))
    safe = noise if noise > 0 else 1.0
    if noise > 0:
        spectrum = Noise(spectrum.power * (noise / typical))
    return stack.extended(
        RefinedStack,
        noise=spectrum,
        quaternions=q,
        shifts_px=shifts,
        contrast=contrast,
        expected_error_rad=np.minimum(
            evaluation.mean_error_of(covariances[:, :3, :3]), evaluation.RANDOM
        ),
        covariances=covariances[:, :3, :3],
        shift_covariances=covariances[:, 3:, 3:],
        chi2=left / safe,
        gain=gain / (safe * own),
        correlation=grams[:, 0, 6] / power,
        noise_variance=noise,
        resolution_angstrom=resolution_angstrom,
    )


def noise_of(parts: Sequence[RefinedStack]) -> Noise:
    """The noise of each optics group, by each part as many of its images are in it."""
    known = [part.noise for part in parts if part.noise is not None]
    groups = max(*(len(n.power) for n in known), *(part.optics_groups for part in parts))
    power, count = np.zeros(1), np.zeros((groups, 1))
    for part, noise in zip(parts, known, strict=True):
        mine = np.bincount(part.optics_group, minlength=groups)[:, None] + 1e-9  # of none: the mean
        power = power + mine * noise.for_groups(groups).power
        count += mine
    return Noise(power / count)
