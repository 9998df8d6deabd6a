"""Projection matching: the baseline that needs no training when the density is known."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from . import fourier, imaging, rotations, threads, workers
from .density import Density
from .errors import InputError
from .noise import Noise
from .particles import PER_PARTICLE, ParticleStack
from .preprocessing import Preprocessing, check_fits
from .projection import Projector
from .surveying import check_white, with_noise
from .symmetry import Group, group

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["MatchedStack", "candidates", "match", "orientations"]

#: References, and images, at most, that a thread works on together; and their correlations that are
#: held at once, by all threads.
AT_ONCE, SCORES = 128, 1 << 23
#: References, the best of each image's, among which its candidates are.
BEST = 500
#: A quarter turn of the image, and its mirror image: of one projection eight are known.
QUARTER, MIRROR = rotations.about("z", np.pi / 2), rotations.about("y", np.pi)
#: Orientations nearer to this one than all that show as much are projected; of no symmetry itself.
CENTRE = np.array([0.2, 0.31, 0.13, 1.0])


@dataclass(frozen=True, eq=False, kw_only=True)
class MatchedStack(ParticleStack):
    """Particles at the orientation of the reference that each matches best.

    Attributes
    ----------
    scores : (n,) array
        Correlation coefficient with the best reference.
    """

    quaternions: Float[np.ndarray, "n 4"] = field(metadata=PER_PARTICLE)
    scores: Float[np.ndarray, " n"] = field(metadata=PER_PARTICLE)


def match(
    stack: ParticleStack,
    density: Density,
    preprocessing: Preprocessing,
    *,
    references: int = 21_600,
    scheduler: str | Client | None = None,
    progress: bool = False,
) -> MatchedStack:
    """Give each image the orientation of the reference projection that it correlates with best.

    Parameters
    ----------
    stack : ParticleStack
        Its shifts are undone, no others are searched; phases are flipped by the CTF's sign, and the
        noise is whitened, in the references too. Images in files are read in chunks.
    density : Density, a cube of the images' box and pixels
    preprocessing : Preprocessing
        Images and references are compared after it.
    references : int
        About so many, spread evenly over SO(3); 21,600 are about 9 degrees apart.
    scheduler : str or distributed.Client, optional
        Whose workers match, each with references of its own, four bytes a pixel that is compared:
        0.3 GB of 60 px. See :func:`cryoem.orient`.
    progress : bool
        Show a bar of the references that this process projects.

    Returns
    -------
    MatchedStack

    Raises
    ------
    InputError
        Images or a density of another box than the preprocessing's, or voxels of another size than
        the images' pixels; a density that is black on white.
    """
    check_white(density)
    q, _, scores = candidates(
        stack, density, preprocessing, references=references, scheduler=scheduler, progress=progress
    )
    return stack.extended(
        MatchedStack,
        quaternions=q[:, 0],
        scores=scores[:, 0],
        # What was known of them belonged to other orientations.
        contrast=None,
        expected_error_rad=None,
    )


def candidates(
    stack: ParticleStack,
    density: Density,
    preprocessing: Preprocessing,
    *,
    count: int = 1,
    apart_rad: float = 0.0,
    symmetry: str = "C1",
    shifts_px: Float[np.ndarray, "n s 2"] | None = None,
    references: int = 21_600,
    scheduler: str | Client | None = None,
    progress: bool = False,
) -> tuple[Float[np.ndarray, "n c 4"], Float[np.ndarray, "n c 2"], Float[np.ndarray, "n c"]]:
    """The orientations of the references that each image correlates with best, and how well.

    Parameters
    ----------
    stack, density, preprocessing, references, scheduler, progress
        See :func:`match`.
    count : int
        How many of each image, the best first.
    apart_rad : float
        How far apart they are at least.
    symmetry : str
        In which this is counted; of the orientations of an orbit one is a reference.
    shifts_px : (n, s, 2) array, optional
        Of each image, that are tried at every orientation; by default the stack's own.

    Returns
    -------
    quaternions : (n, count, 4) array, unit, xyzw
    shifts_px : (n, count, 2) array
        Of those that were tried, where the image correlates best.
    scores : (n, count) array
        Correlation coefficients; -inf where there are no more.
    """
    if density.box_px != preprocessing.frame_px:
        raise InputError(
            f"wanted a density in a box of {preprocessing.frame_px}, as the images; "
            f"got {density.box_px}"
        )
    check_fits(density, stack.box_px, stack.pixel_size_angstrom)
    stack = with_noise(stack)
    known = orientations(references, symmetry)
    tried = stack.shifts_px[:, None] if shifts_px is None else shifts_px
    best, step = np.zeros((2, len(stack), count), int)
    scores = np.empty((len(stack), count), np.float32)
    # One set of references for all optics groups: whitened by their mean. They are projected in the
    # pixels in which they are compared.
    box, down = stack.box_px, preprocessing.down_px
    gain = gain_down = None
    if stack.noise is not None and not stack.noise.is_white:
        mean = Noise(stack.noise.power.mean(axis=0))
        gain = mean.whitening(box)[0]
        gain_down = mean.gain(fourier.radius((down, down), half=True) / box)[0]
    job = _Matching(
        known, density.resampled(down), preprocessing, gain, gain_down, count, apart_rad,
        symmetry, progress and scheduler is None,
    )  # fmt: skip
    if scheduler is None:
        job.projected()  # by all threads, which then share them
    working = threads.count() if scheduler is None else 1
    most = max(1, min(AT_ONCE, SCORES // (len(known) * working)))
    at_once = workers.shared_out(len(stack), most, scheduler)
    starts = range(0, len(stack), at_once)
    parts = (
        (start, (part, tried[start : start + at_once] * (down / box)))
        for start, part in zip(starts, stack.chunks(at_once), strict=True)
    )
    here = partial(threads.each, ahead=1)
    with contextlib.closing(workers.worked(job, parts, scheduler, here=here)) as matched:
        for start, found in matched:
            rows = slice(start, start + at_once)
            best[rows], step[rows], scores[rows] = found
    return known[best], np.take_along_axis(tried, step[..., None], axis=1), scores


#: Threads of one worker share its references.
_projecting = threading.Lock()


@dataclass(frozen=True, eq=False)
class _Matching:
    """What is done to each part of the images, by references that are projected where it is done.

    They are many megabytes, and sooner made than sent.
    """

    known: Float[np.ndarray, "r 4"]
    coarse: Density
    preprocessing: Preprocessing
    gain: np.ndarray | None
    gain_down: np.ndarray | None
    count: int
    apart_rad: float
    symmetry: str
    progress: bool

    @cached_property
    def _references(self) -> Float[np.ndarray, "r p"]:
        return _table(self.known, self.coarse, self.preprocessing, self.gain_down, self.progress)

    def projected(self) -> Float[np.ndarray, "r p"]:
        """The references, projected the first time."""
        with _projecting:
            return self._references

    def place(
        self, start: int, part: tuple[ParticleStack, Float[np.ndarray, "n s 2"]]
    ) -> tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each image its best references, at which of its shifts, and how well."""
        stack, shifts_px = part
        frames = stack.images[:]
        frames = frames if self.gain is None else imaging.apply_ctf(frames, self.gain)
        small = self.preprocessing.reduce(frames, ctf=stack.ctf())
        correlation, at_step = _over_shifts(small, self.preprocessing, self.projected(), shifts_px)
        best, scores = _best_apart(
            correlation, self.known, self.count, self.apart_rad, group(self.symmetry)
        )
        return start, (best, np.take_along_axis(at_step, best, axis=1), scores)


def orientations(references: int, symmetry: str = "C1") -> Float[np.ndarray, "r 4"]:
    """About so many orientations over SO(3), spread evenly; of a symmetric particle one an orbit.

    The first eighth is to be projected: the others are its quarter turns and their mirror images.
    """
    known = rotations.grid(references)
    alike = _eight(rotations.multiply(group(symmetry).elements, CENTRE / np.linalg.norm(CENTRE)))
    nearest = np.abs(known @ alike.T)
    own = nearest[:, 0] >= nearest.max(axis=1)
    return _eight(known[own] if own.any() else known[:1])


def _eight(q: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "m 4"]:
    """Orientations, then those of their quarter turns, then those of all their mirror images."""
    turned = [q]
    for _ in range(3):
        turned.append(rotations.multiply(turned[-1], QUARTER))
    return np.concatenate([*turned, *(rotations.multiply(each, MIRROR) for each in turned)])


def _table(
    known: Float[np.ndarray, "r 4"],
    coarse: Density,
    preprocessing: Preprocessing,
    gain: np.ndarray | None,
    progress: bool,
) -> Float[np.ndarray, "r p"]:
    """Projections at all of :func:`orientations`, filtered, as images are compared with them."""
    from tqdm.auto import tqdm

    count, pixels = len(known) // 8, preprocessing.crop_px**2
    table = np.empty((len(known), pixels), np.float32)
    by_turn, projector = table.reshape(8, count, pixels), Projector(coarse)

    def turn(part: tuple[int, np.ndarray]) -> None:
        start, frames = part
        frames = frames if gain is None else imaging.apply_ctf(frames, gain)
        for turned, images in zip(by_turn, _turned(preprocessing.cut(frames)), strict=True):
            turned[start : start + AT_ONCE] = images.reshape(-1, pixels)

    starts = range(0, count, AT_ONCE)
    frames = ((i, projector.project(known[:count][i : i + AT_ONCE])) for i in starts)
    with tqdm(total=len(starts), desc="references", unit="batch", disable=not progress) as bar:
        for _ in threads.each(turn, frames, ahead=1):
            bar.update()
    return table


def _turned(images: Float[np.ndarray, "n y x"]) -> list[np.ndarray]:
    """The images that belong to :func:`_eight`."""
    turned = [images]
    for _ in range(3):
        turned.append(imaging.quarter_turn(turned[-1]))
    return [*turned, *map(imaging.mirror, turned)]


def _best_apart(
    correlation: Float[np.ndarray, "n r"],
    known: Float[np.ndarray, "r 4"],
    count: int,
    apart_rad: float,
    points: Group,
) -> tuple[Int[np.ndarray, "n c"], Float[np.ndarray, "n c"]]:
    """Which references each image correlates with best, so far apart from each other, and how well.

    The best first; -inf where there are no more.
    """
    most = min(BEST, len(known))
    at = np.argpartition(correlation, -most, axis=1)[:, -most:]
    left, q = np.take_along_axis(correlation, at, axis=1), known[at]
    rows = np.arange(len(at))
    found = np.empty((len(at), count), int)
    scores = np.empty((len(at), count), np.float32)
    for i in range(count):
        best = left.argmax(axis=1)
        found[:, i], scores[:, i] = at[rows, best], left[rows, best]
        if i == count - 1:
            break
        orbit = rotations.multiply(points.elements, q[rows, best][:, None])
        cosine = np.abs(q @ orbit.transpose(0, 2, 1)).max(axis=2)  # of half the distance
        left[cosine > np.cos(apart_rad / 2)] = -np.inf
        left[rows, best] = -np.inf
    return found, scores


def _over_shifts(
    small: Float[np.ndarray, "n y x"],
    preprocessing: Preprocessing,
    table: Float[np.ndarray, "r p"],
    shifts_px: Float[np.ndarray, "n s 2"],
) -> tuple[Float[np.ndarray, "n r"], Int[np.ndarray, "n r"]]:
    """Correlation with each reference at the best of an image's shifts, and which of them it is."""

    def at(shift_px: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n r"]:
        prepared = preprocessing.cut(small, shifts_px=shift_px).reshape(len(small), -1)
        return (prepared / np.float32(table.shape[1])) @ table.T

    best = at(shifts_px[:, 0])
    step = np.zeros(best.shape, np.int16)
    for i in range(1, shifts_px.shape[1]):
        correlation = at(shifts_px[:, i])
        step[correlation > best] = i
        np.maximum(best, correlation, out=best)
    return best, step
