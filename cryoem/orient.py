"""From images to orientations with a trained estimator, in a frame that a map can use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from . import frame, imaging, projection, recovery, rotations
from .density import Density
from .errors import InputError
from .recovery import Landmarks

if TYPE_CHECKING:
    from .estimator import Estimator

__all__ = ["Orientations", "error_scale", "orient", "orient_by_references"]


@dataclass(frozen=True)
class Orientations:
    """Orientations of images.

    Attributes
    ----------
    quaternions : (n, 4) array, unit, xyzw
        In the frame's frame: an overall rotation of the density is left open unless references
        fixed it, and the hand unless ``frame.hand_known``.
    residuals_rad : (n,) array
        Mean absolute difference between an image's estimated distances and those induced.
    frame : Frame
        ``None`` where references fixed it from the start.
    features : (n, f) array
    used : (n,) int array
        How many landmarks placed each image.
    expected_error_rad : (n,) array
        Mean error to expect of an image with such residuals: on average right where copies told
        the scale (:func:`orient`), merely in order where not (:func:`orient_by_references`).
    outlier : (n,) bool array
        Images that fit far worse than most: not this particle, or nothing that can be seen.
    shifts_px : (n, 2) array, pixels
        Where the estimator saw the particle moved to, (x, y); zeros where it does not say.
    """

    quaternions: np.ndarray
    residuals_rad: np.ndarray
    frame: frame.Frame | None
    features: np.ndarray
    used: np.ndarray
    expected_error_rad: np.ndarray
    outlier: np.ndarray
    shifts_px: np.ndarray

    @property
    def hands(self) -> tuple[np.ndarray, ...]:
        """The sets of orientations that explain the images: both hands where none is known.

        The maps reconstructed from the two are mirror images, and no projection tells them apart:
        they are equally good.
        """
        if self.frame is None or self.frame.hand_known:
            return (self.quaternions,)
        return (self.quaternions, rotations.other_hand(self.quaternions))

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """What :func:`cryoem.star.write_particles` keeps of each image beside its orientation."""
        return {
            "cryoemResidualRad": self.residuals_rad,
            "cryoemLandmarksUsed": self.used,
            "cryoemExpectedErrorRad": self.expected_error_rad,
            "cryoemOutlier": self.outlier.astype(int),
        }


@dataclass(frozen=True)
class Anchors:
    """All that places one more image: landmarks in a frame, and the scale of expected errors.

    Attributes
    ----------
    landmarks : Landmarks
        Their orientations in the frame.
    frame : Frame
    scale : (slope, start)
        Of :func:`error_scale`; of no use to an estimator that says itself what to expect.
    """

    landmarks: Landmarks
    frame: frame.Frame | None
    scale: tuple[float, float]

    def place(
        self, estimator: Estimator, images: np.ndarray, *, ctf: np.ndarray | None = None
    ) -> Orientations:
        """Orient images, each by its own alone."""
        look = estimator.look(images, ctf=ctf)
        found = self.landmarks.place(look.features)
        expected = look.expected_error_rad
        if expected is None:
            slope, start = self.scale
            expected = np.maximum(start + slope * found.expected_error_rad, 0)
        return Orientations(
            found.quaternions,
            found.residuals_rad,
            self.frame,
            look.features,
            found.used,
            expected,
            found.outlier,
            np.zeros((len(images), 2)) if look.shifts_px is None else look.shifts_px,
        )


def anchor(
    estimator: Estimator,
    images: np.ndarray,
    *,
    ctf: np.ndarray | None = None,
    copies: int = 200,
    seed: int = 0,
) -> Anchors:
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
    Anchors
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
    marks = recovery.find_landmarks(features, estimator.head, seed=seed, landmarks=len(features))
    found = marks.place(features)
    q = found.quaternions
    fixed = frame.from_copies(q[:c], q[n : n + c], q[n + c :])
    q, fit = fixed.apply(q), np.flatnonzero(~found.outlier[:c])
    expected = found.expected_error_rad[fit]
    scale = error_scale(q[fit], q[n + fit], q[n + c + fit], expected)
    return Anchors(replace(marks, quaternions=fixed.apply(marks.quaternions)), fixed, scale)


def orient(
    estimator: Estimator,
    images: ArrayLike,
    *,
    ctf: np.ndarray | None = None,
    copies: int = 200,
    anchors: int = 256,
    seed: int = 0,
) -> Orientations:
    """Orient images against each other: no density, no truth.

    Some images and in-plane-turned and mirrored copies of them are recovered jointly; the copies
    fix the frame, and all images are placed against these landmarks.
    :func:`cryoem.stream.orient` does the same for sets that do not fit into memory.

    Parameters
    ----------
    estimator : Estimator
    images : (n, size, size) array
        As the microscope gives them; the estimator prepares them.
    ctf : (n, size, size // 2 + 1) array, optional
        See :func:`cryoem.imaging.ctf`.
    copies : int
        How many images are copied, at most all anchors.
    anchors : int
        How many images are landmarks, at most all; their copies are landmarks too.
    seed : int

    Returns
    -------
    Orientations
        With a warning where the frame cannot be told (``frame.certain`` is False then).
    """
    images = projection.check_images(images)
    n = len(images)
    if n < 2 * recovery.ENOUGH:
        raise InputError(f"wanted at least {2 * recovery.ENOUGH} images to orient, got {n}")
    rng = rotations.stream(seed, "landmarks")
    some = np.sort(rng.choice(n, min(anchors, n), replace=False, shuffle=False))
    placed = anchor(
        estimator,
        images[some],
        ctf=None if ctf is None else ctf[some],
        copies=copies,
        seed=seed,
    )
    return placed.place(estimator, images, ctf=ctf)


def error_scale(
    quaternions: np.ndarray, turned: np.ndarray, mirrored: np.ndarray, expected: np.ndarray
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
    slope, start = np.polyfit(expected, off / np.sqrt(2), 1)
    if slope < 0:
        return 0.0, float(off.mean() / np.sqrt(2))
    return float(slope), float(start)


def anchor_to(
    estimator: Estimator,
    density: Density,
    images: np.ndarray,
    *,
    ctf: np.ndarray | None = None,
    references: int = 2000,
) -> Anchors:
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
    Anchors
    """
    known = rotations.grid(references)
    embedded = estimator.embed(projection.project(density, known))
    landmarks = Landmarks(embedded, known, estimator.head, np.inf, np.arange(0), estimator.symmetry)
    residuals = landmarks.place(estimator.look(images, ctf=ctf).features).residuals_rad
    largest = float(residuals[~recovery.outliers(residuals)].max(initial=0.0))
    return Anchors(replace(landmarks, outlier_above_rad=largest), None, (1.0, 0.0))


def orient_by_references(
    estimator: Estimator,
    images: np.ndarray,
    density: Density,
    *,
    ctf: np.ndarray | None = None,
    references: int = 2000,
) -> Orientations:
    """Orient images against projections of a known density: frame and hand are the density's.

    Parameters
    ----------
    estimator : Estimator
    images : (n, size, size) array
    density : Density, a cube of the images' box
    ctf : (n, size, size // 2 + 1) array, optional
        See :func:`cryoem.imaging.ctf`.
    references : int
        Projections spread evenly over SO(3).

    Returns
    -------
    Orientations
        Of a symmetric particle, one of each orbit.
    """
    some = slice(0, 256)
    anchors = anchor_to(
        estimator,
        density,
        images[some],
        ctf=None if ctf is None else ctf[some],
        references=references,
    )
    return anchors.place(estimator, images, ctf=ctf)
