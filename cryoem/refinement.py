"""Refinement: orientations, shifts and contrasts of images against a density, to the limit.

An image is ``y = a S_t C P_R V + noise``: contrast ``a``, shift ``t``, CTF ``C``. With white noise
the most likely ``(R, t)`` minimises ``|y - a S_t C P_R V|^2`` with the best ``a`` put in, which is
known in closed form (variable projection). Each particle takes damped Gauss-Newton steps
(Levenberg-Marquardt) with analytic derivatives: the slope of a slice ``V^(R (kx, ky, 0))`` in a
rotation vector ``w`` (``R exp([w])``) follows from the gradient of ``V^``, the transforms of
``x V``, ``y V`` and ``z V``, which one NUFFT plan evaluates with ``V`` itself. Resolution rises in
stages, because far from the truth only coarse detail points towards it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import scipy.fft
import scipy.special
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation

from . import evaluation, fourier, maps, matching, projection, reconstruction, rotations
from .density import Density
from .errors import InputError
from .reconstruction import Ctf, Observed
from .rotations import Seed
from .simulation import Preprocessing
from .stacks import ImageStack

__all__ = [
    "Alternated",
    "FromReference",
    "Refined",
    "alternate",
    "cross_check",
    "expected_error",
    "from_reference",
    "refine",
]

#: The longest step, radians and pixels.
_LONGEST = 0.15, 2.0
#: Steps shorter than this end a stage, and the last stage; radians and pixels.
_SHORT, _SHORTEST = (2e-3, 2e-2), (1e-4, 1e-3)
#: So does a step that would gain less than this, in twice the logarithm of the likelihood.
_LITTLE = 2e-3
#: Candidates this close to each other have found the same maximum; radians and pixels.
_SAME = 0.05, 0.5
#: No particle's contrast falls below this share of the median; at zero an image says nothing.
_LEAST_CONTRAST = 0.1
#: Relative accuracy asked of the NUFFT: noiseless images come out 1e-4 rad off.
_ACCURACY = 1e-3
_POINTS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Refined:
    """Refined particles.

    Attributes
    ----------
    quaternions : (n, 4) array, unit, xyzw
    shifts_px : (n, 2) array, pixels
        Where each particle was moved to, (x, y).
    contrast : (n,) array
        How strongly each image shows the density.
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
        Per pixel: what was given, or estimated from the residuals.
    resolution_angstrom : float
        The finest detail that was used.
    """

    quaternions: np.ndarray
    shifts_px: np.ndarray
    contrast: np.ndarray
    covariances: np.ndarray
    shift_covariances: np.ndarray
    chi2: np.ndarray
    gain: np.ndarray
    correlation: np.ndarray
    noise_variance: float
    resolution_angstrom: float

    @property
    def expected_error_rad(self) -> np.ndarray:
        """Mean angle between refined and true orientation that each covariance lets expect."""
        return evaluation.mean_error_of(self.covariances)


def _trimmed(values: np.ndarray, lost: float = 1e-7) -> np.ndarray:
    """The smallest centred cube that holds all but ``lost`` of the energy: smaller transforms."""
    n = values.shape[0]
    reach = np.abs(np.arange(n) - n // 2)
    energy = np.zeros(n // 2 + 1)
    cube = np.maximum(np.maximum(reach[:, None, None], reach[:, None]), reach)
    np.add.at(energy, cube.ravel(), values.ravel().astype(float) ** 2)
    beyond = energy.sum() - np.cumsum(energy)
    half = int(np.argmax(beyond <= lost * energy.sum())) + 1
    return fourier.crop_or_pad(values, (min(n, 2 * half),) * 3)


class _Slopes:
    """Slices of a density's transform and of its gradient."""

    def __init__(self, density: Density, frequencies: np.ndarray, box_px: int) -> None:
        import finufft

        full = density.box_px
        values = _trimmed(density.values)
        extent = values.shape[0]
        limit = float(np.linalg.norm(frequencies, axis=1).max())
        # As in projection.Projector: a grid half again as fine as the frequencies need.
        grid = min(extent, 2 * int(np.ceil(1.5 * limit * extent / full)))
        values = fourier.resize(values, grid, 3)
        step = extent / grid  # voxels of the density
        axis = ((np.arange(grid) - grid // 2) * step).astype(np.float32)
        values = values * np.float32(step**3 * (box_px / full) ** 2)
        slope = np.complex64(-2j * np.pi / full)
        self._volumes = np.empty((4, grid, grid, grid), np.complex64)
        self._volumes[0] = values
        self._volumes[1] = slope * values * axis
        self._volumes[2] = slope * values * axis[:, None]
        self._volumes[3] = slope * values * axis[:, None, None]
        self._frequencies = (2 * np.pi * step / full * frequencies.T).astype(np.float32)  # (2, k)
        self._plan = finufft.Plan(2, (grid,) * 3, 4, eps=_ACCURACY, isign=-1, dtype="complex64")

    def at(self, matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slices (n, k) at rotations (n, 3, 3), and their gradients (3, n, k), detector frame."""
        n = len(matrices)
        m = matrices.astype(np.float32)
        points = m[:, :, :2].transpose(1, 0, 2) @ self._frequencies  # (3, n, k), x y z
        x, y, z = points.reshape(3, -1)
        self._plan.setpts(z, y, x)
        found = self._plan.execute(self._volumes).reshape(4, n, -1)
        # Density coordinates to detector coordinates: R^T.
        gradient = np.einsum("nij,ink->jnk", m, found[1:])
        return found[0], gradient


class _Fit:
    """The least-squares problem of some particles, up to one frequency limit."""

    def __init__(
        self,
        slopes: _Slopes,
        frequencies: np.ndarray,
        weights: np.ndarray,
        observed: np.ndarray,
        ctf: np.ndarray | None,
        box_px: int,
    ) -> None:
        self.slopes, self.observed, self.ctf = slopes, observed, ctf
        self.least = 0.0
        self._kx, self._ky = frequencies.T.astype(np.float32)
        self._turn = np.complex64(-2j * np.pi / box_px)
        # Parseval: sums over these are sums over pixels.
        self.samples = float(weights.sum())
        self._root = np.sqrt(weights).astype(np.float32) / box_px

    def gram(self, who: np.ndarray, q: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        """Inner products of image, model and its five slopes: (m, 7, 7), float64."""
        value, gradient = self.slopes.at(Rotation.from_quat(q).as_matrix())
        kx, ky = self._kx, self._ky
        phase = np.exp(
            -self._turn
            * (shifts[:, :1].astype(np.float32) * kx + shifts[:, 1:].astype(np.float32) * ky)
        )
        columns = np.empty((len(q), 7, len(kx)), np.complex64)
        columns[:, 0] = value
        # w x k for the three unit vectors w: (0, 0, ky), (0, 0, -kx), (-ky, kx, 0).
        columns[:, 1] = ky * gradient[2]
        columns[:, 2] = -kx * gradient[2]
        columns[:, 3] = kx * gradient[1] - ky * gradient[0]
        columns[:, 4] = self._turn * kx * value
        columns[:, 5] = self._turn * ky * value
        if self.ctf is not None:
            columns[:, :6] *= self.ctf[who][:, None]
        # The shift is taken out of the image, not put into the model.
        columns[:, 6] = self.observed[who] * phase
        columns *= self._root
        real = columns.view(np.float32)
        return (real @ real.transpose(0, 2, 1)).astype(np.float64)

    def normal(self, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Gain (m,), contrast (m,), normal matrix (m, 5, 5) and slope (m, 5) of the best contrast.

        Gain is ``|y|^2 - |y - a M|^2``.
        """
        mm, my = gram[:, 0, 0], gram[:, 0, 6]
        safe = np.where(mm > 0, mm, 1)
        a = np.maximum(my / safe, self.least)
        dm, dd = gram[:, 1:6, 0], gram[:, 1:6, 1:6]
        gain = 2 * a * my - a**2 * mm
        slope = a[:, None] * (gram[:, 1:6, 6] - a[:, None] * dm)
        matrix = dd - dm[:, :, None] * dm[:, None] / safe[:, None, None]
        return gain, a, a[:, None, None] ** 2 * matrix, slope


def _moved(q: np.ndarray, shifts: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rotations.perturb(q, step[:, :3]), shifts + step[:, 3:]


def _climb(
    fit: _Fit,
    owner: np.ndarray,
    q: np.ndarray,
    shifts: np.ndarray,
    steps: int,
    short: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levenberg-Marquardt: (q, shifts, gram) of every particle."""
    n = len(q)
    q, shifts = q.copy(), shifts.copy()
    gram = fit.gram(owner, q, shifts)
    damping = np.full(n, 1e-2)
    active = np.arange(n)
    for _ in range(steps):
        gain, _, matrix, slope = fit.normal(gram[active])
        diagonal = np.einsum("nii->ni", matrix)
        diagonal = diagonal + 1e-9 * diagonal.max(axis=1, keepdims=True) + 1e-30
        damped = matrix.copy()
        np.einsum("nii->ni", damped)[:] = diagonal * (1 + damping[active, None])
        step = np.linalg.solve(damped, slope[..., None])[..., 0]
        lengths = np.linalg.norm(step[:, :3], axis=1), np.linalg.norm(step[:, 3:], axis=1)
        over = np.maximum(lengths[0] / _LONGEST[0], lengths[1] / _LONGEST[1])
        step /= np.maximum(1, over)[:, None]
        moved = _moved(q[active], shifts[active], step)
        tried = fit.gram(owner[active], *moved)
        better = fit.normal(tried)[0] >= gain - 1e-6 * tried[:, 6, 6]
        taken = active[better]
        q[taken], shifts[taken], gram[taken] = moved[0][better], moved[1][better], tried[better]
        damping[active] *= np.where(better, 0.2, 10.0)
        # What is still to be gained, beside the noise of one pixel.
        noise = (tried[:, 6, 6] - gain) / fit.samples
        done = (lengths[0] < short[0]) & (lengths[1] < short[1])
        done |= better & (np.einsum("ni,ni->n", step, slope) < _LITTLE * noise)
        active = active[~done & (damping[active] < 1e4)]
        if len(active) == 0:
            break
    return q, shifts, gram


@dataclass(frozen=True)
class _Stage:
    """How far in resolution a stage goes, and how many of a particle's starts outlive it."""

    count: int
    slopes: _Slopes
    keep: int
    short: tuple[float, float]


def _distinct(gain: np.ndarray, q: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Order each particle's candidates, (m, starts), the best first.

    Those that ended where a better one did come last, lest one maximum crowd out the others.
    """
    m, starts = gain.shape
    order = np.argsort(-gain, axis=1, kind="stable")
    if starts == 1:
        return order
    rows = np.arange(m)[:, None]
    q, shifts = q[rows, order], shifts[rows, order]
    apart = np.linalg.norm(shifts[:, :, None] - shifts[:, None], axis=-1) / _SAME[1]
    turn = np.minimum(1, np.abs(q @ q.transpose(0, 2, 1)))
    same = (2 * np.arccos(turn) < _SAME[0]) & (apart < 1)
    twice = np.tril(same, -1).any(axis=2)
    return np.take_along_axis(order, np.argsort(twice, axis=1, kind="stable"), axis=1)


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


def _offsets(starts: int, spread_rad: float) -> np.ndarray:
    """Rotation vectors (starts, 3) of a ball, the first of them none."""
    rng = rotations.stream(0, "starts")
    w = rng.standard_normal((starts, 3))
    w *= spread_rad * rng.random((starts, 1)) ** (1 / 3) / np.linalg.norm(w, axis=1, keepdims=True)
    w[0] = 0
    return w


def refine(
    images: ArrayLike | ImageStack,
    density: Density,
    quaternions: ArrayLike,
    *,
    rows: np.ndarray | None = None,
    shifts_px: ArrayLike | None = None,
    ctf: Ctf = None,
    noise_variance: float | None = None,
    resolution_angstrom: float = 15.0,
    starts: int = 4,
    spread_rad: float = 0.3,
    coarse_to_fine: bool = True,
    steps: int = 15,
    progress: bool = False,
) -> Refined:
    """Refine orientations, shifts and contrasts against a density.

    Converges from about 0.3 rad. The noise is taken as white; an image's mean is not used.

    Parameters
    ----------
    images : (n, size, size) array
        Or a stack of files; it is read in chunks.
    density : Density, a cube
        Of the images' extent; its box may be larger, where the images are down-sampled. Contrast is
        1 for images in the units of :func:`cryoem.projection.project`.
    quaternions : (n, 4) array, unit, xyzw
        Where to start.
    rows : (m,) int array, optional
        Which of the images are refined, and returned; default: all.
    shifts_px : (n, 2) array, optional
        Where each particle was moved to, (x, y), pixels: where to start; default 0.
    ctf : (n, size, size // 2 + 1) array, optional
        See :func:`cryoem.imaging.ctf`; or a function that gives those of some rows, or None.
    noise_variance : float, optional
        Per pixel. By default estimated from the residuals of all images; the refined parameters do
        not depend on it, their covariances do.
    resolution_angstrom : float
        The finest detail of the density that is used. A density that was not made from these
        images is used to 15 A only: what appears beyond is their own (:func:`from_reference`).
    starts : int
        How many orientations within ``spread_rad`` of the given one are tried; the likelihood
        chooses. A few mend what single starts miss; below SNR 1/50, where the likelihood has
        several maxima, take tens, from a wider ball. The denser they lie, the finer the detail
        that they begin with.
    spread_rad : float
    coarse_to_fine : bool
        Raise the resolution in stages. False: near the answer, go to the finest at once.
    steps : int
        The most that a stage may take; 0 only judges the given parameters.
    progress : bool
        Show a bar.

    Returns
    -------
    Refined

    Raises
    ------
    InputError
        Shapes that do not fit, or images of inverted contrast.

    References
    ----------
    Golub and Pereyra, Inverse Problems 19 (2003), variable projection; Kay, "Fundamentals of
    Statistical Signal Processing", I.3, covariances; Scheres, J. Struct. Biol. 180 (2012).
    """
    from tqdm.auto import tqdm

    seen = reconstruction.observed(images, quaternions, shifts_px, ctf)
    rows = np.arange(len(seen)) if rows is None else np.asarray(rows)
    if rows.ndim != 1 or len(rows) == 0:
        raise InputError(f"wanted at least one image, rows being a list; got shape {rows.shape}")
    n, box, q, shifts = len(rows), seen.box_px, seen.quaternions[rows], seen.shifts_px[rows]
    if box > density.box_px:
        raise InputError(f"images of {box} px are wider than the density's {density.box_px} voxels")
    if starts < 1 or steps < 0:
        raise InputError(f"wanted starts >= 1 and steps >= 0, got {starts} and {steps}")
    if noise_variance is not None and not noise_variance > 0:
        raise InputError(f"noise_variance must be positive, got {noise_variance}")
    extent = density.box_px * density.voxel_size_angstrom
    if not extent / resolution_angstrom >= 2:
        raise InputError(f"resolution_angstrom must be below {extent / 2:g}, half the box's edge")
    slices = projection.Slices(box)
    radius = np.linalg.norm(slices.frequencies, axis=1)
    finest = min(extent / resolution_angstrom, float(radius.max()))
    order = np.argsort(radius, kind="stable")
    order = order[(radius[order] > 0) & (radius[order] <= finest)]
    frequencies, weights = slices.frequencies[order], slices.weights[order]
    # Points of a ball that are as many as the starts are this far apart.
    off_rad = spread_rad / starts ** (1 / 3)
    limits = _limits(density, finest, off_rad) if coarse_to_fine and steps else [finest]
    stages, keep = [], starts
    for limit in limits:
        count = int(np.sum(radius[order] <= limit))
        last = limit == limits[-1]
        keep = 1 if last else -(-keep // 2)
        slopes = _Slopes(density, frequencies[:count], box)
        stages.append(_Stage(count, slopes, keep, _SHORTEST if last else _SHORT))

    refined_q, refined_shifts, grams = np.empty((n, 4)), np.empty((n, 2)), np.empty((n, 7, 7))
    least: float | None = None
    offsets = _offsets(starts, spread_rad)
    at_once = max(1, _POINTS_AT_ONCE // max(s.count * k for s, k in _load(stages, starts)))
    bar = tqdm(total=n, desc="refinement", unit="particle", disable=not progress)
    for i in range(0, n, at_once):
        part = slice(i, min(i + at_once, n))
        m = part.stop - part.start
        observed = slices.from_images(seen.images[rows[part]])[:, order]
        gains = seen.ctf(rows[part])
        if gains is not None:
            gains = gains[:, *slices.index][:, order]

        # Candidates of each particle: (m, starts, ...).
        trial_q = rotations.perturb(q[part][:, None], offsets)
        trial_shifts = np.repeat(shifts[part][:, None], starts, axis=1)
        for stage in stages:
            c = stage.count
            fit = _Fit(
                stage.slopes,
                frequencies[:c],
                weights[:c],
                observed[:, :c],
                None if gains is None else gains[:, :c],
                box,
            )
            if least is None:
                given = fit.gram(np.arange(m), q[part], shifts[part])
                least = _least_contrast(given, fit.samples, wanted_positive=steps > 0)
            fit.least = least
            if stage is stages[-1] and stage is not stages[0]:
                # Coarse detail may lead astray: what was given stays a candidate.
                trial_q = np.concatenate([trial_q, q[part][:, None]], axis=1)
                trial_shifts = np.concatenate([trial_shifts, shifts[part][:, None]], axis=1)
            owner = np.repeat(np.arange(m), trial_q.shape[1])
            climbed = _climb(
                fit, owner, trial_q.reshape(-1, 4), trial_shifts.reshape(-1, 2), steps, stage.short
            )
            trial_q, trial_shifts, gram = (x.reshape(m, -1, *x.shape[1:]) for x in climbed)
            gain = fit.normal(climbed[2])[0].reshape(m, -1)
            best = _distinct(gain, trial_q, trial_shifts)[:, : stage.keep]
            trial_q, trial_shifts, gram = (
                x[np.arange(m)[:, None], best] for x in (trial_q, trial_shifts, gram)
            )
        refined_q[part], refined_shifts[part] = trial_q[:, 0], trial_shifts[:, 0]
        grams[part] = gram[:, 0]
        bar.update(m)
    bar.close()
    gain, contrast, matrix, _ = fit.normal(grams)
    left = np.maximum(grams[:, 6, 6] - gain, 0) / (fit.samples - 6)  # six parameters
    noise = float(left.mean()) if noise_variance is None else float(noise_variance)
    scale = np.sqrt(np.maximum(np.einsum("nii->ni", matrix), 1e-30))
    scale = 1 / (scale[:, :, None] * scale[:, None])
    # What the image says nothing about gets a variance that is large, not infinite.
    covariances = np.linalg.inv(matrix * scale + 1e-9 * np.eye(5)) * scale * noise
    power = np.sqrt(np.maximum(grams[:, 0, 0] * grams[:, 6, 6], 1e-30))
    safe = noise if noise > 0 else 1.0
    return Refined(
        quaternions=refined_q,
        shifts_px=refined_shifts,
        contrast=contrast,
        covariances=covariances[:, :3, :3],
        shift_covariances=covariances[:, 3:, 3:],
        chi2=left / safe,
        gain=gain / safe,
        correlation=grams[:, 0, 6] / power,
        noise_variance=noise,
        resolution_angstrom=extent / finest,
    )


def _load(stages: Sequence[_Stage], starts: int) -> list[tuple[_Stage, int]]:
    """Each stage with the number of candidates that enter it."""
    entering = [starts, *(s.keep for s in stages[:-1])]
    entering[-1] += len(stages) > 1  # what was given
    return list(zip(stages, entering, strict=True))


def _least_contrast(gram: np.ndarray, samples: float, *, wanted_positive: bool) -> float:
    """The floor of the contrasts, from how the images correlate where they start."""
    mm, my, yy = gram[:, 0, 0], gram[:, 0, 6], gram[:, 6, 6]
    if not mm.sum() > 0:
        raise InputError("the density is zero at the resolution that is used")
    # Beside what noise of the images' own power would give, in standard deviations.
    z = my.sum() / max(np.sqrt(np.sum(mm * yy) / samples), 1e-30)
    if wanted_positive and z < -6:
        raise InputError(
            "the images correlate negatively with the density: black and white are exchanged; "
            "see imaging.flip_contrast"
        )
    typical = np.median(my / np.maximum(mm, 1e-30))
    return _LEAST_CONTRAST * max(typical, 0.01 * float(np.sqrt(yy.sum() / mm.sum())))


# --------------------------------------------------------------------------------------
# With the density only reconstructed


@dataclass(frozen=True)
class Alternated:
    """What alternating reconstruction and refinement ends with.

    Attributes
    ----------
    refined : Refined
        Every particle against the map of all, at the end.
    separate : Refined
        Every particle against the map of its own half, as the half-maps were made.
    subset : (n,) int array, 1 or 2
    half_maps : HalfMaps
        At the separate parameters; independent beyond ``joined_angstrom``.
    mask : (m, m, m) array
    fsc : HalfMapFsc
    density : Density
        The mean of the half-maps, filtered by ``sqrt(2 FSC / (1 + FSC))``. Its mirror image
        (:func:`cryoem.maps.mirrored`, at :func:`cryoem.rotations.other_hand`) explains the images
        as well: no projection tells the hand.
    held_out_correlation : float
        Mean correlation of images with projections of what is finer than ``joined_angstrom`` in the
        map of the *other* half, to which they did not contribute; 1 is out of reach where there is
        noise.
    chance_correlation : float
        The same with every image at another one's orientation.
    resolutions_angstrom : list of float
        To which each round refined.
    joined_angstrom : float
    """

    refined: Refined
    separate: Refined
    subset: np.ndarray
    half_maps: maps.HalfMaps
    mask: np.ndarray
    fsc: maps.HalfMapFsc
    density: Density
    held_out_correlation: float
    chance_correlation: float
    resolutions_angstrom: list[float]
    joined_angstrom: float


def _filtered(density: Density, gain: np.ndarray) -> Density:
    """Multiply shells 1, 2, ... by ``gain``; shell 0 as shell 1, nothing beyond."""
    n = density.box_px
    full = np.zeros(n + 1, np.float32)
    full[1 : len(gain) + 1] = gain
    full[0] = full[1]
    shell = fourier.radius((n,) * 3, half=True)
    spectrum = scipy.fft.rfftn(density.values, workers=fourier.WORKERS)
    spectrum *= np.interp(shell, np.arange(n + 1), full)
    values = scipy.fft.irfftn(spectrum, s=(n,) * 3, workers=fourier.WORKERS)
    return Density(values, density.voxel_size_angstrom)


def _until(curve: maps.Fsc, threshold: float) -> np.ndarray:
    """The curve up to where it first falls below ``threshold``, 0 from there on."""
    below = np.flatnonzero(curve.values < threshold)
    values = np.clip(curve.values, 0, 1)
    if len(below):
        values[below[0] :] = 0
    return values


def _joined(pair: maps.HalfMaps, resolution_angstrom: float) -> maps.HalfMaps:
    """Let half-maps share what is coarser, so that their frames do not drift apart."""
    low = pair.mean.low_passed(resolution_angstrom).values
    first, second = (
        Density(d.values - d.low_passed(resolution_angstrom).values + low, d.voxel_size_angstrom)
        for d in (pair.first, pair.second)
    )
    return maps.HalfMaps(first, second, pair.independent)


def _half_maps(
    seen: Observed,
    subset: np.ndarray,
    voxel_size_angstrom: float,
    contrast: np.ndarray,
    independent: bool,
) -> maps.HalfMaps:
    first, second = (
        reconstruction.reconstruct(
            seen.images,
            seen.quaternions,
            voxel_size_angstrom=voxel_size_angstrom,
            rows=np.flatnonzero(subset == half),
            shifts_px=seen.shifts_px,
            ctf=seen.ctf,
            contrast=contrast,
            iterations=10,
            ridge=1e-2,
        )
        for half in (1, 2)
    )
    return maps.HalfMaps(first, second, independent)


def _halved(subset: ArrayLike | None, n: int, seed: Seed) -> np.ndarray:
    subset = maps.halves(n, seed) if subset is None else np.asarray(subset)
    if subset.shape != (n,) or not all(np.sum(subset == half) for half in (1, 2)):
        raise InputError(f"subset must hold {n} values, 1 and 2 and both, got {subset!r}")
    return subset


def alternate(
    images: ArrayLike | ImageStack,
    quaternions: ArrayLike,
    *,
    voxel_size_angstrom: float,
    shifts_px: ArrayLike | None = None,
    ctf: Ctf = None,
    subset: ArrayLike | None = None,
    rounds: int = 5,
    resolution_angstrom: float = 30.0,
    joined_angstrom: float = 40.0,
    starts: int = 4,
    spread_rad: float = 0.3,
    seed: Seed = 0,
    progress: bool = False,
) -> Alternated:
    """Alternate reconstruction and refinement, without letting noise build structure.

    Two halves of the particles are kept apart: each is refined against the map of its own, masked,
    every shell weighted by the FSC of the two (the Wiener filter of a half-map), and only to the
    resolution at which the FSC, corrected for the mask, falls below 0.143. What is coarser than
    ``joined_angstrom`` the references share, so that their frames stay together; there the FSC
    proves nothing. At the end the few particles that match the map of the other half better
    elsewhere on the sphere are brought there, and all are refined once more, against the map of
    all.

    Parameters
    ----------
    images : (n, size, size) array
    quaternions : (n, 4) array, unit, xyzw
        Where to start, in any frame that a map can use (:func:`cryoem.orient.orient`).
    voxel_size_angstrom : float
        Of the images, and of the maps.
    shifts_px, ctf
        See :func:`refine`.
    subset : (n,) array, 1 or 2, optional
        See :func:`cryoem.maps.halves`, which is the default.
    rounds : int
    resolution_angstrom : float
        Of the first round; later rounds go as far as the FSC.
    joined_angstrom : float
    starts, spread_rad
        Of the first round and the end; see :func:`refine`. The others start where the last ended.
    seed : int or numpy.random.Generator
        Of the split.
    progress : bool
        Show a bar.

    Returns
    -------
    Alternated

    References
    ----------
    Scheres and Chen, Nat. Methods 9 (2012), the two halves; Scheres, J. Struct. Biol. 180 (2012),
    joining them at low resolution; Rosenthal and Henderson, J. Mol. Biol. 333 (2003), the weights.
    """
    from tqdm.auto import tqdm

    seen = reconstruction.observed(images, quaternions, shifts_px, ctf)
    subset = _halved(subset, len(seen), seed)
    if rounds < 1:
        raise InputError(f"rounds must be positive, got {rounds}")
    given_px, contrast = seen.shifts_px, np.ones(len(seen))
    used = []
    for turn in tqdm(range(rounds + 1), desc="rounds", disable=not progress):
        pair = _half_maps(seen, subset, voxel_size_angstrom, contrast, True)
        mask = maps.soft_mask(pair.mean)
        curve = maps.half_map_fsc(pair, mask, seed=seed)
        weight = _until(curve.corrected, 0.143)
        coarse = curve.corrected.frequencies <= 1 / joined_angstrom
        weight[coarse] = np.clip(curve.corrected.values[coarse], 0.143, 1)
        shared = _joined(pair, joined_angstrom)
        references = [
            Density(mask * _filtered(d, weight).values, voxel_size_angstrom)
            for d in (shared.first, shared.second)
        ]
        if turn == rounds:
            break
        limit = min(curve.corrected.resolution(0.143).angstrom, joined_angstrom)
        limit = max(limit, resolution_angstrom) if turn == 0 else limit
        used.append(limit)
        separate = _against(
            seen,
            references,
            subset,
            resolution_angstrom=limit,
            starts=starts if turn == 0 else 1,
            spread_rad=spread_rad,
            coarse_to_fine=turn == 0,
        )
        seen = replace(seen, quaternions=separate.quaternions, shifts_px=separate.shifts_px)
        # The scale of contrast and density together is free.
        contrast = separate.contrast / np.median(separate.contrast)
    # To the map of the other half an image did not contribute; nor to what was not shared of it.
    fine = [
        _filtered(d, weight).values - _filtered(d.low_passed(0.8 * joined_angstrom), weight).values
        for d in (pair.second, pair.first)
    ]
    others = [Density(mask * values, voxel_size_angstrom) for values in fine]
    held_out, chance = (
        _against(at, others, subset, resolution_angstrom=used[-1], starts=1, steps=0)
        for at in (seen, replace(seen, quaternions=np.roll(seen.quaternions, 1, axis=0)))
    )
    final: dict[str, Any] = {
        "resolution_angstrom": used[-1],
        "starts": starts,
        "spread_rad": spread_rad,
    }
    seen = _found_again(seen, given_px, references[::-1], subset, **final)
    # The halves have said how far the map can be believed; so far, all may now use all of it.
    whole = _filtered(pair.mean, 2 * weight / (1 + weight)).values
    refined = refine(
        seen.images,
        Density(mask * whole, voxel_size_angstrom),
        seen.quaternions,
        shifts_px=seen.shifts_px,
        ctf=seen.ctf,
        **final,
    )
    f = _until(curve.corrected, 0.0)
    return Alternated(
        refined=refined,
        separate=separate,
        subset=subset,
        half_maps=pair,
        mask=mask,
        fsc=curve,
        density=_filtered(pair.mean, np.sqrt(2 * f / (1 + f))),
        held_out_correlation=float(held_out.correlation.mean()),
        chance_correlation=float(chance.correlation.mean()),
        resolutions_angstrom=used,
        joined_angstrom=joined_angstrom,
    )


def _found_again(
    seen: Observed,
    given_px: np.ndarray,
    others: Sequence[Density],
    subset: np.ndarray,
    *,
    spread_rad: float,
    **options: Any,
) -> Observed:
    """Bring back particles that match better elsewhere on the sphere, with their given shifts.

    Judged by the map of the half that a particle is not in: to that of its own it has contributed,
    where it wrongly is; and there its shift has been led astray too.
    """
    q, shifts = seen.quaternions.copy(), seen.shifts_px.copy()
    box, voxel = others[0].box_px, others[0].voxel_size_angstrom
    small = min(box, max(16, 2 * int(np.ceil(box * voxel / 15.0))))  # detail of 15 A is enough
    for half, other in zip((1, 2), others, strict=True):
        mine = np.flatnonzero(subset == half)
        matched = matching.match(
            seen.images,
            other,
            Preprocessing(box, small, small, voxel),
            rows=mine,
            shifts_px=given_px,
            ctf=seen.ctf,
        )
        rows = mine[rotations.distance(matched.quaternions, q[mine]) > 2 * spread_rad]
        if len(rows) == 0:
            continue
        elsewhere = q.copy()
        elsewhere[mine] = matched.quaternions
        here, there = (
            refine(
                seen.images,
                other,
                start,
                rows=rows,
                shifts_px=moved,
                ctf=seen.ctf,
                noise_variance=1.0,  # of no effect on where they end
                spread_rad=spread_rad,
                **options,
            )
            for start, moved in ((q, shifts), (elsewhere, given_px))
        )
        better = there.gain > here.gain
        q[rows[better]] = there.quaternions[better]
        shifts[rows[better]] = there.shifts_px[better]
    return replace(seen, quaternions=q, shifts_px=shifts)


def expected_error(quaternions: ArrayLike, refined: Refined) -> np.ndarray:
    """Mean angle by which orientations are expected to be off, now that refinement moved them.

    The truth is taken to lie about the refined orientation as its covariance says, alike in all
    directions, and the given orientation as far from there as refinement moved it: the mean length
    of a normal vector (standard deviation ``s`` an axis) about the displacement ``m``,
    ``s (sqrt(2 / pi) exp(-x^2 / 2) + (x + 1 / x) erf(x / sqrt(2)))`` with ``x = m / s``.

    Parameters
    ----------
    quaternions : (n, 4) array, unit, xyzw
        What the refinement started from.
    refined : Refined

    Returns
    -------
    (n,) array, radians, at most pi
    """
    moved = rotations.distance(rotations.check(quaternions), refined.quaternions)
    s = np.sqrt(np.trace(refined.covariances, axis1=1, axis2=2) / 3)
    x = np.maximum(moved / np.maximum(s, 1e-12), 1e-3)
    mean = np.sqrt(2 / np.pi) * np.exp(-(x**2) / 2) + (x + 1 / x) * scipy.special.erf(x / 2**0.5)
    return np.minimum(s * mean, np.pi)


def cross_check(
    images: ArrayLike | ImageStack,
    quaternions: ArrayLike,
    *,
    voxel_size_angstrom: float,
    shifts_px: ArrayLike | None = None,
    ctf: Ctf = None,
    subset: ArrayLike | None = None,
    seed: Seed = 0,
) -> np.ndarray:
    """Tell good orientations from bad by a few steps of refinement against the images' own map.

    Every image is compared with the map of the half that it is not in, to the resolution to which
    the half-maps agree, and so cannot confirm itself. No density is needed, and the orientations
    stay as they are.

    Parameters
    ----------
    images : (n, size, size) array
    quaternions : (n, 4) array, unit, xyzw
        In a frame that a map can use (:func:`cryoem.orient.orient`).
    voxel_size_angstrom : float
    shifts_px, ctf
        See :func:`refine`.
    subset : (n,) array, 1 or 2, optional
        See :func:`cryoem.maps.halves`, which is the default.
    seed : int or numpy.random.Generator

    Returns
    -------
    (n,) array, radians
        :func:`expected_error` of the given orientations.
    """
    seen = reconstruction.observed(images, quaternions, shifts_px, ctf)
    subset = _halved(subset, len(seen), seed)
    pair = _half_maps(seen, subset, voxel_size_angstrom, np.ones(len(seen)), False)
    mask = maps.soft_mask(pair.mean)
    curve = maps.half_map_fsc(pair, mask, seed=seed).corrected
    weight = _until(curve, 0.143)
    others = [
        Density(mask * _filtered(d, weight).values, voxel_size_angstrom)
        for d in (pair.second, pair.first)
    ]
    checked = _against(
        seen,
        others,
        subset,
        resolution_angstrom=curve.resolution(0.143).angstrom,
        starts=1,
        coarse_to_fine=False,
        steps=5,
    )
    return expected_error(seen.quaternions, checked)


def _against(
    seen: Observed, references: Sequence[Density], subset: np.ndarray, **options: Any
) -> Refined:
    """Refine the first half against the first reference, the second against the second."""
    parts = [
        refine(
            seen.images,
            reference,
            seen.quaternions,
            rows=np.flatnonzero(subset == half),
            shifts_px=seen.shifts_px,
            ctf=seen.ctf,
            **options,
        )
        for half, reference in zip((1, 2), references, strict=True)
    ]
    together: dict[str, Any] = {}
    for field in fields(Refined):  # in the particles' own order
        values = [getattr(part, field.name) for part in parts]
        if np.ndim(values[0]) == 0:
            together[field.name] = float(np.mean(values))
            continue
        together[field.name] = np.empty((len(subset), *values[0].shape[1:]))
        for half, value in zip((1, 2), values, strict=True):
            together[field.name][subset == half] = value
    return Refined(**together)


# --------------------------------------------------------------------------------------
# With a reference that must not be believed too far


@dataclass(frozen=True)
class FromReference:
    """Images refined against a reference, and whether they carry structure of their own.

    Attributes
    ----------
    refined : Refined
    half_maps : HalfMaps
        With shared poses: both halves followed the one reference.
    mask : (m, m, m) array
        Around the reference.
    test : Beyond
        Whether the half-maps agree beyond the resolution to which the reference was used.
    fsc : HalfMapFsc
    density : Density or None
        The mean of the half-maps, filtered by their FSC; None where they do not agree, because
        then what they show may be the reference alone.
    """

    refined: Refined
    half_maps: maps.HalfMaps
    mask: np.ndarray
    test: maps.Beyond
    fsc: maps.HalfMapFsc
    density: Density | None


def from_reference(
    images: ArrayLike | ImageStack,
    reference: Density,
    quaternions: ArrayLike,
    *,
    shifts_px: ArrayLike | None = None,
    ctf: Ctf = None,
    subset: ArrayLike | None = None,
    resolution_angstrom: float = 15.0,
    starts: int = 4,
    seed: Seed = 0,
    progress: bool = False,
) -> FromReference:
    """Refine against a reference used to a stated resolution; a map only where it is the images'.

    Pure noise refined against a reference gives the reference back ("Einstein from noise"), and its
    half-maps agree. But white noise beyond the resolution to which the reference was used knows
    nothing of the orientations: there its half-maps are independent, whereas those of particles go
    on agreeing. Where they do not (:func:`cryoem.maps.beyond`, five standard deviations) a warning
    says so and no map is given. Too few or too noisy particles end in the same warning: it says
    that nothing was shown, not that the images are empty.

    Parameters
    ----------
    images : (n, size, size) array
    reference : Density, a cube of the images' box
    quaternions : (n, 4) array, unit, xyzw
    shifts_px, ctf, resolution_angstrom, starts
        See :func:`refine`.
    subset : (n,) array, 1 or 2, optional
        See :func:`cryoem.maps.halves`, which is the default.
    seed : int or numpy.random.Generator
        Of the split.
    progress : bool
        Show a bar.

    Returns
    -------
    FromReference

    References
    ----------
    Henderson, PNAS 110 (2013).
    """
    seen = reconstruction.observed(images, quaternions, shifts_px, ctf)
    subset = _halved(subset, len(seen), seed)
    if seen.box_px != reference.box_px:
        raise InputError(
            f"wanted a reference of the images' {seen.box_px} px, got {reference.box_px}"
        )
    refined = refine(
        seen.images,
        reference,
        seen.quaternions,
        shifts_px=seen.shifts_px,
        ctf=seen.ctf,
        resolution_angstrom=resolution_angstrom,
        starts=starts,
        progress=progress,
    )
    seen = replace(seen, quaternions=refined.quaternions, shifts_px=refined.shifts_px)
    pair = _half_maps(seen, subset, reference.voxel_size_angstrom, refined.contrast, False)
    mask = maps.soft_mask(reference, resolution_angstrom=max(20.0, resolution_angstrom))
    test = maps.beyond(pair, mask, resolution_angstrom)
    curve = maps.half_map_fsc(pair, mask, seed=seed)
    if not test.believable:
        warnings.warn(
            f"beyond {resolution_angstrom:g} A, to which the reference was used, the half-maps do "
            f"not agree (correlation {test.correlation:.3f}, {test.z:.1f} standard deviations of "
            "noise): the map may be the reference alone, and is not given",
            stacklevel=2,
        )
        return FromReference(refined, pair, mask, test, curve, None)
    f = _until(curve.corrected, 0.0)
    density = _filtered(pair.mean, np.sqrt(2 * f / (1 + f)))
    return FromReference(refined, pair, mask, test, curve, density)
