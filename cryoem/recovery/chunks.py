"""Placing particles chunk by chunk, so that a run may be interrupted.

What is done lies in a work folder: ``landmarks.npz``, with all that the outcome depends on;
``particles.npy``, one row a particle; and ``done.json``, which rows those are. A run that finds the
three goes on where they end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from .. import imaging
from ..errors import InputError
from ..io import files
from ..particles import ParticleStack
from .frame import Frame
from .landmarks import Landmarks
from .placement import FramedLandmarks

if TYPE_CHECKING:
    from ..estimator import Estimator

__all__ = ["InMemory", "Job", "JsonValue", "WorkFolder"]

JsonValue = str | int | None | list[int]

_LANDMARK_ARRAYS = ("features", "quaternions", "index")


@dataclass(frozen=True, eq=False)
class Job:
    """All that a chunk needs besides its particles.

    Attributes
    ----------
    estimator : Estimator
    centred : bool
        Undo the particles' shifts.
    landmarks : FramedLandmarks
    """

    estimator: Estimator
    centred: bool
    landmarks: FramedLandmarks | None = None

    def images(self, stack: ParticleStack) -> np.ndarray:
        """Read the images of a chunk, centred if they are to be, and whitened."""
        images = np.asarray(stack.images[:], np.float32)
        if self.centred and stack.shifts_px.any():
            images = imaging.shift(images, -stack.shifts_px)
        whitening = stack.whitening()
        return images if whitening is None else imaging.apply_ctf(images, whitening)

    def place(self, start: int, stack: ParticleStack) -> tuple[int, np.ndarray]:
        """Embed and place: one record a particle, each by its own image alone."""
        assert self.landmarks is not None
        try:
            rows = self.landmarks.place(self.estimator, self.images(stack), ctf=stack.ctf())
        except InputError as error:
            raise InputError(f"in the chunk that begins at particle {start}: {error}") from error
        return start, rows


# --------------------------------------------------------------------------------------
# What is done


class InMemory:
    """What a run has done, gone with the process."""

    count = 0

    def landmarks(self, head: str, symmetry: str) -> FramedLandmarks | None:
        """None: there was no earlier run."""
        return None

    def keep(self, known: FramedLandmarks) -> None:
        """Nothing to keep."""

    def missing(self, n: int, chunk: int) -> Iterator[tuple[int, int]]:
        """All chunks (start, stop)."""
        for start in range(0, n, chunk):
            yield start, min(start + chunk, n)

    def write(self, start: int, rows: np.ndarray, n: int) -> None:
        """Keep a chunk's rows."""
        if not hasattr(self, "_rows"):
            self._rows = np.empty(n, rows.dtype)
        self._rows[start : start + len(rows)] = rows

    def rows(self) -> np.ndarray:
        """All particles' records."""
        return self._rows


class WorkFolder:
    """What a run has done, kept so that a process may end at any moment.

    Parameters
    ----------
    path : Path
    settings : dict
        All that the outcome depends on.
    """

    def __init__(self, path: Path, settings: dict[str, JsonValue]) -> None:
        self.path, self.settings = path, settings
        self.done: list[tuple[int, int]] = []

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
        """How many particles are done."""
        return sum(stop - start for start, stop in self.done)

    def landmarks(self, head: str, symmetry: str) -> FramedLandmarks | None:
        """Return what an earlier run with these settings kept, if any, and go on where it ended."""
        if not self._landmarks.exists():
            return None
        arrays = files.read_npz(
            self._landmarks, "a run's landmarks", needed=("state", *_LANDMARK_ARRAYS)
        )
        try:
            state = json.loads(str(arrays["state"]))
            files.same_run(self.path, dict(state["settings"]), self.settings)
            fixed = state["frame"] and {
                name: np.array(value) if name in ("left", "right") else value
                for name, value in state["frame"].items()
            }
            marks = Landmarks(
                head=head,
                symmetry=symmetry,
                outlier_above_rad=float(state["outlier_above_rad"]),
                **{name: arrays[name] for name in _LANDMARK_ARRAYS},
            )
            slope, start = state["error_scale"]
            frame = Frame(**fixed) if fixed else None
        except InputError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self._landmarks}: not a run's landmarks ({error})") from error
        m = len(marks.quaternions)
        if marks.quaternions.shape != (m, 4) or marks.features.shape[:-1] != (m,):
            raise InputError(
                f"{self._landmarks}: not a run's landmarks: {m} of them, with orientations "
                f"{marks.quaternions.shape} and features {marks.features.shape}"
            )
        self.done = self._kept(marks.features.shape[1])
        return FramedLandmarks(marks, frame, (slope, start))

    def _kept(self, feature_dim: int) -> list[tuple[int, int]]:
        """Which particles an earlier run has written."""
        if not (self._particles.exists() and self._done.exists()):
            return []
        n = cast(list[int], self.settings["particles"])[0]
        try:
            done = [(int(start), int(stop)) for start, stop in json.loads(self._done.read_text())]
            ends = [0, *chain.from_iterable(done), n]
            if ends != sorted(ends):
                raise ValueError(f"{done} done")
            rows = self.rows()
            if rows.shape != (n,) or rows.dtype["features"].shape != (feature_dim,):
                raise ValueError(f"{rows.shape} rows of {rows.dtype}")
        except (EOFError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path}: done.json and particles.npy are not of a run of {n} particles "
                f"({error}); name another folder or remove this one"
            ) from error
        return done

    def keep(self, known: FramedLandmarks) -> None:
        """Keep landmarks and the settings that they stand for; nothing is done against them."""
        marks = known.landmarks
        self._refuse_others()
        for path in (self._done, self._particles):
            path.unlink(missing_ok=True)
        self.done = []
        state = {
            "settings": self.settings,
            "frame": known.frame
            and {k: np.asarray(v).tolist() for k, v in vars(known.frame).items()},
            "error_scale": known.error_scale,
            "outlier_above_rad": marks.outlier_above_rad,
        }
        arrays = {name: getattr(marks, name) for name in _LANDMARK_ARRAYS}
        files.write_npz(self._landmarks, state, arrays)

    def _refuse_others(self) -> None:
        """Refuse to write onto files of the same names that are not a run's."""
        theirs = self._done if self._done.exists() and not self._particles.exists() else None
        if self._particles.exists():
            try:
                ours = "features" in (self.rows().dtype.names or ())
            except (AttributeError, EOFError, OSError, ValueError):
                ours = False
            theirs = None if ours else self._particles
        if theirs is not None:
            raise InputError(f"{theirs}: not what a run keeps there; wanted another folder")

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
