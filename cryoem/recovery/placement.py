"""Landmarks in a frame that a map can use: what places one more image by itself alone.

Landmarks are particles of known orientation. Their frame comes from copies of them, turned in their
plane and mirrored, or from projections of a density that is known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from .. import imaging, projection, rotations
from ..density import Density
from ..errors import InputError
from . import frame
from .landmarks import Landmarks, find_landmarks
from .outcome import outliers

if TYPE_CHECKING:
    from ..estimator import Estimator

__all__ = ["FramedLandmarks", "error_scale", "landmarks_from_copies", "landmarks_from_references"]


@dataclass(frozen=True, eq=False)
class FramedLandmarks:
    """All that places one more image: landmarks in a frame, and the scale of expected errors.

    Attributes
    ----------
    landmarks : Landmarks
        Their orientations in the frame.
    frame : Frame or None
        None where references are the landmarks: the frame is the density's.
    error_scale : (slope, start)
        See :func:`error_scale`; of no use to an estimator that predicts its errors itself.
    """

    landmarks: Landmarks
    frame: frame.Frame | None
    error_scale: tuple[float, float]

    def place(
        self, estimator: Estimator, images: np.ndarray, *, ctf: np.ndarray | None = None
    ) -> np.ndarray:
        """Orient images, each by its own alone.

        Returns
        -------
        (n,) structured array
            ``quaternions``, ``shifts_px``, ``residuals_rad``, ``features``, ``used``,
            ``expected_error_rad`` and ``outlier``; see :class:`cryoem.recovery.OrientedStack`.
        """
        predicted = estimator.predict(images, ctf=ctf)
        found = self.landmarks.place(predicted.features)
        expected = predicted.expected_error_rad
        if expected is None:
            slope, start = self.error_scale
            expected = np.maximum(start + slope * found.expected_error_rad, 0)
        shifts = predicted.shifts_px
        columns = {
            "quaternions": found.quaternions,
            "shifts_px": np.zeros((len(images), 2)) if shifts is None else shifts,
            "residuals_rad": found.residuals_rad,
            "features": predicted.features,
            "used": found.used,
            "expected_error_rad": expected,
            "outlier": found.outlier,
        }
        kinds = [(name, column.dtype, column.shape[1:]) for name, column in columns.items()]
        rows = np.empty(len(images), kinds)
        for name, column in columns.items():
            rows[name] = column
        return rows


def landmarks_from_copies(
    estimator: Estimator,
    images: np.ndarray,
    *,
    ctf: np.ndarray | None = None,
    copies: int = 200,
    seed: int = 0,
) -> FramedLandmarks:
    """Recover some images jointly with copies of the first of them, which fix the frame.

    Parameters
    ----------
    estimator : Estimator
    images : (n, size, size) array
    ctf : (n, size, size // 2 + 1) array, optional
    copies : int
        How many images are turned in their plane and mirrored, at most all.
    seed : int

    Returns
    -------
    FramedLandmarks
    """
    if estimator.symmetry != "C1":
        raise InputError(
            f"a copy of a particle of symmetry {estimator.symmetry} may be recovered as any of its "
            "orbit, so that copies fix no frame: orient against references of its density"
        )
    if ctf is not None:  # before they are turned: an astigmatic CTF does not turn with the image
        images = imaging.flip_phases(images, ctf)
    n, c = len(images), min(copies, len(images))
    features = np.concatenate(
        [
            estimator.embed(images),
            estimator.embed(imaging.quarter_turn(images[:c])),
            estimator.embed(imaging.mirror(images[:c])),
        ]
    )
    marks = find_landmarks(features, estimator.head, seed=seed, landmarks=len(features))
    found = marks.place(features)
    q = found.quaternions
    fixed = frame.from_copies(q[:c], q[n : n + c], q[n + c :])
    q, fit = fixed.apply(q), np.flatnonzero(~found.outlier[:c])
    expected = found.expected_error_rad[fit]
    scale = error_scale(q[fit], q[n + fit], q[n + c + fit], expected)
    in_frame = replace(marks, quaternions=fixed.apply(marks.quaternions))
    return FramedLandmarks(in_frame, fixed, scale)


def landmarks_from_references(
    estimator: Estimator,
    density: Density,
    images: np.ndarray,
    *,
    ctf: np.ndarray | None = None,
    references: int = 2000,
) -> FramedLandmarks:
    """Take projections of a known density as landmarks: frame and hand are the density's.

    Parameters
    ----------
    estimator : Estimator
    density : Density, a cube of the images' box
    images : (n, size, size) array
        Some of those that will be placed: they tell which residuals are an outlier's.
    ctf : (n, size, size // 2 + 1) array, optional
    references : int
        Spread evenly over SO(3).

    Returns
    -------
    FramedLandmarks
    """
    known = rotations.grid(references)
    embedded = estimator.embed(projection.project(density, known))
    landmarks = Landmarks(embedded, known, estimator.head, np.inf, np.arange(0), estimator.symmetry)
    residuals = landmarks.place(estimator.embed(images, ctf=ctf)).residuals_rad
    largest = float(residuals[~outliers(residuals)].max(initial=0.0))
    return FramedLandmarks(replace(landmarks, outlier_above_rad=largest), None, (1.0, 0.0))


def error_scale(
    quaternions: Float[np.ndarray, "n 4"],
    turned: Float[np.ndarray, "n 4"],
    mirrored: Float[np.ndarray, "n 4"],
    expected: Float[np.ndarray, " n"],
) -> tuple[float, float]:
    """Scale of expected errors, from how far images and their copies disagree.

    Parameters
    ----------
    quaternions, turned, mirrored : (n, 4) arrays, unit, xyzw
        Of images, of their quarter-turns and of their mirrors, in the frame.
    expected : (n,) array
        Expected errors of the images, in order but not to scale.

    Returns
    -------
    slope, start : float
        ``start + slope * expected``, at least 0, is to scale.
    """
    off = (
        rotations.distance(rotations.in_plane(quaternions, np.pi / 2), turned)
        + rotations.distance(rotations.mirror_x(quaternions), mirrored)
    ) / 2
    if len(off) < 3:
        return 1.0, 0.0
    # Two independent errors make a disagreement: one is a root of two smaller.
    off = off / np.sqrt(2)
    slope, start = np.polyfit(expected, off, 1) if np.ptp(expected) else (0.0, off.mean())
    if slope < 0:
        return 0.0, float(off.mean())
    return float(slope), float(start)
