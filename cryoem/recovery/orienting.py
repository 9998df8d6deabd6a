"""From images to orientations with a trained estimator, in a frame that a map can use.

Some hundred particles, drawn by seed from all of them, are the landmarks: they are recovered
jointly, and copies of them fix the frame (:mod:`cryoem.recovery.placement`). Every other
orientation then depends on its own image and on the landmarks alone, so that the set is read,
embedded and placed in chunks (:mod:`cryoem.recovery.chunks`), by this process or by Dask's workers,
in memory or in a work folder, and the outcome depends on none of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from .. import rotations, surveying, workers
from ..density import Density
from ..errors import InputError
from ..io.files import PathLike, sha256_of
from ..io.stacks import told_apart
from ..particles import PER_PARTICLE, ParticleStack
from ..preprocessing import check_fits
from ..version import __version__
from .chunks import InMemory, Job, JsonValue, WorkFolder
from .frame import Frame
from .lateration import ENOUGH
from .placement import FramedLandmarks, landmarks_from_copies, landmarks_from_references

if TYPE_CHECKING:
    from distributed import Client

    from ..estimator import Estimator

__all__ = ["OrientedStack", "orient"]


@dataclass(frozen=True, eq=False, kw_only=True)
class OrientedStack(ParticleStack):
    """Particles that an estimator oriented.

    Orientations are in the frame's frame: an overall rotation of the density is left open unless
    references fixed it, and the hand unless ``frame.hand_known``. ``expected_error_rad`` is on
    average right, or merely in order where neither the estimator nor copies told its scale.
    ``shifts_px`` are those that the estimator predicted; the stack's own with ``centred``, and
    where the estimator predicts none.

    Attributes
    ----------
    residuals_rad : (n,) array
        Mean absolute difference between an image's estimated distances and those induced.
    features : (n, f) array
    used : (n,) int array
        How many landmarks placed each image.
    outlier : (n,) bool array
        Images that fit far worse than most: not this particle, or nothing that can be seen.
    frame : Frame or None
        None where references fixed it from the start.
    """

    quaternions: Float[np.ndarray, "n 4"] = field(metadata=PER_PARTICLE)
    expected_error_rad: Float[np.ndarray, " n"] = field(metadata=PER_PARTICLE)
    residuals_rad: Float[np.ndarray, " n"] = field(metadata=PER_PARTICLE)
    features: Float[np.ndarray, "n f"] = field(metadata=PER_PARTICLE)
    used: Int[np.ndarray, " n"] = field(metadata=PER_PARTICLE)
    outlier: Bool[np.ndarray, " n"] = field(metadata=PER_PARTICLE)
    frame: Frame | None = None

    @property
    def hands(self) -> tuple[OrientedStack, ...]:
        """The stacks that explain the images: both hands where none is known.

        The maps reconstructed from the two are mirror images, and no projection tells them apart:
        they are equally good.
        """
        if self.frame is None or self.frame.hand_known:
            return (self,)
        return (self, self.with_poses(rotations.other_hand(self.oriented())))


def orient(
    estimator: Estimator,
    stack: ParticleStack,
    *,
    reference: Density | None = None,
    centred: bool = False,
    landmarks: int = 256,
    copies: int = 200,
    seed: int = 0,
    work: PathLike | None = None,
    scheduler: str | Client | None = None,
    chunk: int = 1024,
    progress: bool = False,
) -> OrientedStack:
    """Orient particles against each other, or against projections of a known density.

    Interrupt a run that has a work folder as you like: called again, it goes on with the chunks
    that are missing, on another scheduler or with another chunk size if need be.

    Parameters
    ----------
    estimator : Estimator
    stack : ParticleStack
        Its images, CTF, noise (measured where it is unknown) and, with ``centred``, its shifts are
        used; its orientations are not.
    reference : Density, a cube of the images' box and pixels, optional
        Orient against its projections: frame and hand are the density's, and the particle may be
        symmetric.
    centred : bool
        Search no shifts: the stack's own are right, and are undone.
    landmarks, copies : int
        How many particles are recovered jointly, and how many of these are copied to fix the frame;
        at most all.
    seed : int
        Of the landmarks' choice and recovery.
    work : path, optional
        Folder that keeps what is done, a few hundred bytes a particle; made if need be. By default
        it is kept in memory.
    scheduler : str or distributed.Client, optional
        The address of a Dask scheduler, or a client of one, whose workers embed and place; without
        workers it waits for some. Default: this process does. Workers open images that lie in
        files, so that their paths must hold there too; images in memory travel to them.
    chunk : int
        Particles read at once: a few times their bytes are held, per thread.
    progress : bool
        Show a bar.

    Returns
    -------
    OrientedStack
        With a warning where the frame cannot be told (``frame.certain`` is False then).

    Raises
    ------
    InputError
        Too few particles, images that the estimator cannot read (its ``reading``), a reference of
        another box or voxel size than theirs, black on white or, but with ``centred``, far off the
        middle of its box, or a work folder of another run: particles, CTFs, estimator, reference,
        seed, landmarks, copies, or version.
    MissingToolError
        A scheduler was named and Dask is missing.
    """
    _check(stack := stack.divided(), reference, centred, chunk)
    estimator = estimator.reading(stack.box_px, stack.pixel_size_angstrom)
    job = Job(replace(estimator, passes=1) if centred else estimator, centred)
    some = _drawn(job, stack, landmarks, seed)
    stack = stack.replace(noise=some.noise)
    images = replace(job, centred=False).images(some)
    kept: InMemory | WorkFolder = InMemory()
    if work is not None:
        settings = _settings(job, stack, images, reference)
        kept = WorkFolder(Path(work), {**settings, "copies": copies, "seed": seed})
    if (known := kept.landmarks(estimator.head, estimator.symmetry)) is None:
        known = _framed(job.estimator, images, some.ctf(), reference, copies, seed)
        kept.keep(known)
    job = replace(job, landmarks=known)
    for start, placed in _placed(job, stack, kept, chunk, scheduler, progress):
        kept.write(start, placed, len(stack))
    return _oriented(stack, kept.rows(), known, estimator.centres_images and not centred)


def _check(stack: ParticleStack, reference: Density | None, centred: bool, chunk: int) -> None:
    if chunk < 1:
        raise InputError(f"chunk must be positive, got {chunk}")
    if len(stack) < 2 * ENOUGH:
        raise InputError(f"wanted at least {2 * ENOUGH} images to orient, got {len(stack)}")
    if reference is not None:
        check_fits(reference, stack.box_px, stack.pixel_size_angstrom)
        if centred:
            surveying.check_white(reference)
        else:
            surveying.check_sought_by(reference, stack)


def _drawn(job: Job, stack: ParticleStack, landmarks: int, seed: int) -> ParticleStack:
    """The particles that are recovered jointly, their images read, centred if they are to be.

    With the noise of the stack, or what is measured in these images.
    """
    rng = rotations.generator(seed, "landmarks")
    n = len(stack)
    rows = np.sort(rng.choice(n, min(landmarks, n), replace=False, shuffle=False))
    some = stack.select(rows)
    some = surveying.with_noise(some.with_images(job.images(some.replace(noise=None))))
    noise = some.noise and some.noise.for_groups(stack.optics_groups)
    return some.replace(noise=noise)


def _settings(
    job: Job, stack: ParticleStack, images: np.ndarray, reference: Density | None
) -> dict[str, JsonValue]:
    """What a work folder is checked by: all that the outcome depends on, but for two numbers."""
    return {
        "version": __version__,
        "particles": [len(stack), *images.shape[1:]],
        "particles_sha256": sha256_of(chain([images], told_apart(stack.images))),
        "parameters_sha256": sha256_of(_parameters(stack, job.centred)),
        "estimator": job.estimator.fingerprint,
        "reference_sha256": None if reference is None else sha256_of(reference.values),
        "landmarks": len(images),
    }


def _framed(
    estimator: Estimator,
    images: np.ndarray,
    ctf: np.ndarray | None,
    reference: Density | None,
    copies: int,
    seed: int,
) -> FramedLandmarks:
    if reference is None:
        return landmarks_from_copies(estimator, images, ctf=ctf, copies=copies, seed=seed)
    return landmarks_from_references(estimator, reference, images, ctf=ctf)


def _placed(
    job: Job,
    stack: ParticleStack,
    kept: InMemory | WorkFolder,
    chunk: int,
    scheduler: str | Client | None,
    progress: bool,
) -> Iterator[tuple[int, np.ndarray]]:
    """Place the missing chunks, here or by a scheduler's workers: (start, rows)."""
    from tqdm.auto import tqdm

    missing = kept.missing(len(stack), chunk)
    unplaced = stack.replace(quaternions=None)
    parts = ((start, unplaced.select(slice(start, stop))) for start, stop in missing)
    with (
        contextlib.closing(workers.worked(job, parts, scheduler)) as placed,
        tqdm(
            total=len(stack),
            initial=kept.count,
            unit="particle",
            desc="orienting",
            disable=not progress,
        ) as bar,
    ):
        for start, rows in placed:
            yield start, rows
            bar.update(len(rows))


def _oriented(
    stack: ParticleStack, rows: np.ndarray, known: FramedLandmarks, shifted: bool
) -> OrientedStack:
    found = {name: rows[name] for name in rows.dtype.names or ()}
    if not shifted:
        found["shifts_px"] = stack.shifts_px
    told = stack.with_columns(
        {
            "cryoemResidualRad": rows["residuals_rad"],
            "cryoemLandmarksUsed": rows["used"],
            "cryoemOutlier": rows["outlier"].astype(int),
        }
    )
    return told.extended(OrientedStack, **found, frame=known.frame, contrast=None)


def _parameters(stack: ParticleStack, centred: bool) -> Iterator[np.ndarray]:
    """What the outcome depends on beside the images."""
    if stack.ctf_parameters is not None:
        yield np.array(stack.pixel_size_angstrom)
        for f in fields(stack.ctf_parameters):
            yield getattr(stack.ctf_parameters, f.name)
    if centred:
        yield stack.shifts_px
    if stack.noise is not None and not stack.noise.is_white:
        yield stack.noise.power
        yield stack.optics_group
