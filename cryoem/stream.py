"""Orientations of sets larger than memory: chunk by chunk, resumable, on one machine or many.

Some hundred particles, drawn by seed from all of them, are the landmarks: they are recovered
jointly (:func:`cryoem.recovery.find_landmarks`), and copies of them fix the frame. Every other
orientation then depends on its own image and on the landmarks alone, so that the set is read,
embedded, laterated and written in chunks, by this process or by Dask's workers, and the outcome
depends on neither.

What is done lies in a work folder: ``landmarks.npz``, with all that the outcome depends on;
``particles.npy``, one row a particle; and ``done.json``, which rows those are. A run that finds
the three goes on where they end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import threading
import zipfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from . import __version__, files, imaging, recovery, rotations, star
from .errors import InputError, MissingToolError
from .files import PathLike
from .frame import Frame
from .orient import Anchors, Orientations, anchor, anchor_to
from .recovery import Landmarks

if TYPE_CHECKING:
    from distributed import Client

    from .density import Density
    from .estimator import Estimator

__all__ = ["Stack", "orient"]


class Stack(Protocol):
    """Images that are read when they are sliced: a memory map, or a particle file's images."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n, size, size)``."""

    def __getitem__(self, index: slice, /) -> ArrayLike:
        """Read the images of a slice."""


def orient(
    estimator: Estimator,
    particles: PathLike | Stack,
    work: PathLike,
    *,
    reference: Density | None = None,
    landmarks: int = 256,
    copies: int = 200,
    centred: bool = False,
    seed: int = 0,
    chunk: int = 1024,
    scheduler: str | Client | None = None,
    progress: bool = True,
) -> Orientations:
    """Orient particles that need not fit into memory, in a frame that a map can use.

    Interrupt it as you like: called again, it goes on with the chunks that are missing, on another
    scheduler or with another chunk size if need be. Neither changes the outcome.

    Parameters
    ----------
    estimator : Estimator
    particles : path or (n, size, size) stack
        A particle file (:func:`cryoem.star.read_particles`), an ``.npy`` file, or whatever has a
        shape and reads slices. With a scheduler the workers open the files, so that their paths
        must hold there too; the chunks of an array in memory travel to them instead.
    work : path
        Folder of this run, made if need be; what it holds is a few hundred bytes a particle.
    reference : Density, a cube of the images' box, optional
        Orient against its projections instead: frame and hand are the density's, and the particle
        may be symmetric.
    landmarks : int
        How many particles are recovered jointly, at most all.
    copies : int
        How many landmarks are copied to fix the frame, at most all.
    centred : bool
        Look for no shifts: those that a particle file has are undone, what has none is centred.
    seed : int
        Of the landmarks' choice and recovery.
    chunk : int
        Particles read at once: a few times their bytes are held, per thread.
    scheduler : str or distributed.Client, optional
        The address of a Dask scheduler, or a client of one, whose workers embed and laterate;
        without workers it waits for some. Default: this process does.
    progress : bool
        Show a bar.

    Returns
    -------
    Orientations
        Its arrays are mapped from the work folder, read-only.

    Raises
    ------
    InputError
        Malformed particles, or a work folder of another run: other particles (judged by those
        that are landmarks), another estimator, seed, number of landmarks or copies, or version.
    MissingToolError
        A scheduler was named and Dask is missing.
    """
    if chunk < 1:
        raise InputError(f"chunk must be positive, got {chunk}")
    source = _Source(particles, centred)
    if centred:
        estimator = replace(estimator, looks=1)
    n = source.n
    if n < 2 * recovery.ENOUGH:
        raise InputError(f"wanted at least {2 * recovery.ENOUGH} images to orient, got {n}")
    rng = rotations.stream(seed, "landmarks")
    chosen = np.sort(rng.choice(n, min(landmarks, n), replace=False, shuffle=False))
    images = np.concatenate([source.read(i, i + 1) for i in chosen])
    ctf = source.ctf(chosen)
    settings = {
        "version": __version__,
        "particles": [n, *images.shape[1:]],
        "particles_sha256": hashlib.sha256(np.ascontiguousarray(images).data).hexdigest(),
        "estimator": estimator.fingerprint,
        "reference_sha256": None
        if reference is None
        else hashlib.sha256(np.ascontiguousarray(reference.values).data).hexdigest(),
        "landmarks": len(chosen),
        "copies": copies,
        "seed": seed,
    }
    folder = _Folder(Path(work), settings)
    anchors = folder.anchors(estimator.head, estimator.symmetry)
    if anchors is None:
        if reference is None:
            anchors = anchor(estimator, images, ctf=ctf, copies=copies, seed=seed)
        else:
            anchors = anchor_to(estimator, reference, images, ctf=ctf)
        folder.keep(anchors)
    job = _Job(estimator, source, anchors)
    missing = folder.missing(n, chunk)
    with contextlib.ExitStack() as stack:
        placed: Iterator[tuple[int, np.ndarray]] = (
            (start, job.place(start, source.read(start, stop))) for start, stop in missing
        )
        if scheduler is not None:
            client = stack.enter_context(_client(scheduler))
            placed = stack.enter_context(contextlib.closing(_distributed(job, missing, client)))
        bar = stack.enter_context(_bar(n, folder.count, progress))
        for start, rows in placed:
            folder.write(start, rows, n)
            bar.update(len(rows))
    rows = folder.rows()
    return Orientations(
        frame=anchors.frame, **{name: rows[name] for name in rows.dtype.names or ()}
    )


def _bar(n: int, done: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=n, initial=done, unit="particle", desc="orienting", disable=not progress)


# --------------------------------------------------------------------------------------
# A chunk


class _Source:
    """Particles, by path or as they are; a path is opened where it is read first."""

    def __init__(self, particles: PathLike | Stack, centred: bool) -> None:
        self.given, self.centred = particles, centred
        if isinstance(particles, str | os.PathLike):
            self.given = Path(particles).resolve()
        shape = self.stack.shape
        if len(shape) != 3 or shape[1] != shape[2]:
            raise InputError(f"particles must have shape (n, size, size), got {tuple(shape)}")
        self.n = int(shape[0])

    @property
    def stack(self) -> Stack:
        if not isinstance(self.given, Path):
            return self.given  # type: ignore[return-value]
        if self.given.suffix == ".npy":
            # Mapped for each chunk: pages that were read leave the process with their map.
            return np.load(files.existing(self.given), mmap_mode="r")
        return self._file.images

    @cached_property
    def _file(self) -> star.ParticleSet:
        return star.read_particles(self.given)  # type: ignore[arg-type]

    @property
    def in_memory(self) -> bool:
        """Whether chunks must be sent to who works on them."""
        return isinstance(self.given, np.ndarray)

    def __getstate__(self) -> dict[str, Any]:
        given = None if self.in_memory else self.given
        return {"given": given, "centred": self.centred, "n": self.n}

    def ctf(self, rows: slice | np.ndarray) -> np.ndarray | None:
        """The CTF that a particle file tells of, if any."""
        return self._file.ctf(rows) if self._has_table else None

    @property
    def _has_table(self) -> bool:
        return isinstance(self.given, Path) and self.given.suffix != ".npy"

    def read(self, start: int, stop: int) -> np.ndarray:
        images = np.asarray(self.stack[start:stop], dtype=np.float32)
        shifts = self._file.shifts_px[start:stop] if self.centred and self._has_table else None
        return images if shifts is None or not shifts.any() else imaging.shift(images, -shifts)


@dataclass(frozen=True)
class _Job:
    """All that a chunk needs besides its images."""

    estimator: Estimator
    source: _Source
    anchors: Anchors

    def place(self, start: int, images: np.ndarray) -> np.ndarray:
        """Embed and laterate: one record a particle, each by its own image alone."""
        ctf = self.source.ctf(slice(start, start + len(images)))
        try:
            found = vars(self.anchors.place(self.estimator, images, ctf=ctf))
        except InputError as error:
            raise InputError(f"in the chunk that begins at particle {start}: {error}") from error
        columns = {name: column for name, column in found.items() if name != "frame"}
        kinds = [(name, column.dtype, column.shape[1:]) for name, column in columns.items()]
        rows = np.empty(len(images), kinds)
        for name, column in columns.items():
            rows[name] = column
        return rows


# --------------------------------------------------------------------------------------
# The work folder


class _Folder:
    """What a run has done, kept so that a process may end at any moment."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.done: list[tuple[int, int]] = []
        if self._particles.exists() and self._done.exists():
            self.done = [(start, stop) for start, stop in json.loads(self._done.read_text())]

    @property
    def _landmarks(self) -> Path:
        return self.path / "landmarks.npz"

    @property
    def _particles(self) -> Path:
        return self.path / "particles.npy"

    @property
    def _done(self) -> Path:
        return self.path / "done.json"

    @property
    def count(self) -> int:
        return sum(stop - start for start, stop in self.done)

    def anchors(self, head: str, symmetry: str) -> Anchors | None:
        """Return what an earlier run with these settings kept, if any."""
        if not self._landmarks.exists():
            return None
        try:
            with np.load(self._landmarks, allow_pickle=False) as archive:
                state = json.loads(str(archive["state"]))
                arrays = {name: archive[name] for name in ("features", "quaternions", "index")}
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{self._landmarks}: not a run's landmarks ({error})") from error
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                raise InputError(
                    f"{self.path}: the folder of a run with {name} "
                    f"{state['settings'].get(name)}, asked for {value}; name another folder or "
                    "remove this one"
                )
        fixed = state["frame"] and {
            name: np.array(value) if name in ("left", "right") else value
            for name, value in state["frame"].items()
        }
        marks = Landmarks(head=head, symmetry=symmetry, **state["landmarks"], **arrays)
        return Anchors(marks, Frame(**fixed) if fixed else None, tuple(state["scale"]))

    def keep(self, anchors: Anchors) -> None:
        """Keep landmarks and the settings that they stand for; nothing is done against them."""
        marks = anchors.landmarks
        for path in (self._done, self._particles):
            path.unlink(missing_ok=True)
        self.done = []
        state = {
            "settings": self.settings,
            "frame": anchors.frame
            and {k: np.asarray(v).tolist() for k, v in vars(anchors.frame).items()},
            "scale": anchors.scale,
            "landmarks": {"outlier_above_rad": marks.outlier_above_rad},
        }
        with files.atomic(self._landmarks) as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                state=np.array(json.dumps(state)),
                features=marks.features,
                quaternions=marks.quaternions,
                index=marks.index,
            )

    def missing(self, n: int, chunk: int) -> Iterator[tuple[int, int]]:
        """Chunks (start, stop) of what is not done when the run begins."""
        ends = [(0, 0), *self.done, (n, n)]
        for (_, before), (after, _) in pairwise(ends):
            for start in range(before, after, chunk):
                yield start, min(start + chunk, after)

    def write(self, start: int, rows: np.ndarray, n: int) -> None:
        """Write a chunk's rows, and only then that they are done."""
        if not self._particles.exists():
            with files.atomic(self._particles) as temporary:
                np.lib.format.open_memmap(temporary, "w+", rows.dtype, (n,))
        with open(self._particles, "r+b") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            file.seek(start * rows.itemsize, os.SEEK_CUR)
            file.write(rows.tobytes())
            file.flush()
            os.fsync(file.fileno())
        merged: list[tuple[int, int]] = []
        for first, last in sorted([*self.done, (start, start + len(rows))]):
            if merged and first <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
            else:
                merged.append((first, last))
        self.done = merged
        with files.atomic(self._done) as temporary:
            temporary.write_text(json.dumps(merged))

    def rows(self) -> np.ndarray:
        """All particles' records, mapped."""
        return np.load(self._particles, mmap_mode="r")


# --------------------------------------------------------------------------------------
# Dask


@contextlib.contextmanager
def _client(scheduler: str | Client) -> Iterator[Client]:
    """Yield a client of the scheduler, closed at the end if it was made here."""
    try:
        from distributed import Client
    except ImportError as error:
        raise MissingToolError(
            "Dask is not installed: pip install 'cryoem[dask]', or name no scheduler to work in "
            "this process"
        ) from error
    if isinstance(scheduler, Client):
        yield scheduler
        return
    try:
        client = Client(scheduler)
    except (OSError, ValueError) as error:
        raise InputError(f"no Dask scheduler answers at {scheduler} ({error})") from error
    with client:
        yield client


def _distributed(
    job: _Job, missing: Iterator[tuple[int, int]], client: Client
) -> Generator[tuple[int, np.ndarray], None, None]:
    """Yield (start, rows) of the missing chunks, in the order in which workers finish them.

    The scheduler knows how to make everything again that is lost with a worker, the job included.
    """
    import dask
    from distributed import as_completed

    # The job (11 MB with the shipped weights) is sent once, and to each worker once.
    running = as_completed(loop=client.loop)
    failed: InputError | None = None
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GiB"}):
        sent = client.submit(bytes, pickle.dumps(job), pure=False)
        try:
            while True:
                # Two a thread: one in work, one waiting. Workers may join at any time.
                ahead = max(4, 2 * sum(client.nthreads().values())) - running.count()
                for start, stop in islice(missing, max(ahead, 0)):
                    images = job.source.read(start, stop) if job.source.in_memory else None
                    running.add(client.submit(_work, sent, start, stop, images, pure=False))
                if running.is_empty():
                    break
                try:
                    done = next(running).result()
                except InputError as error:
                    # What is in work beside it is waited for, and kept; nothing new is begun.
                    failed, missing = failed or error, iter(())
                    continue
                yield done
            if failed is not None:
                raise failed
        finally:
            client.cancel(list(running.futures))


_opening = threading.Lock()


@lru_cache(maxsize=1)
def _job(sent: bytes) -> _Job:
    return pickle.loads(sent)


def _work(sent: bytes, start: int, stop: int, images: np.ndarray | None) -> tuple[int, np.ndarray]:
    """A worker's part: one chunk."""
    with _opening:  # threads of one worker share the job
        job = _job(sent)
    return start, job.place(start, job.source.read(start, stop) if images is None else images)
