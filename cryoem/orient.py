"""From images to orientations with a trained estimator, in a frame that a map can use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from . import frame, imaging, projection, recovery, rotations
from .density import Density
from .errors import InputError

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
    """

    quaternions: np.ndarray
    residuals_rad: np.ndarray
    frame: frame.Frame | None
    features: np.ndarray
    used: np.ndarray
    expected_error_rad: np.ndarray
    outlier: np.ndarray

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


def orient(
    estimator: Estimator, images: ArrayLike, *, copies: int = 200, anchors: int = 256, seed: int = 0
) -> Orientations:
    """Orient images against each other: no density, no truth.

    In-plane-turned and mirrored copies of some images are embedded with the images; all are placed
    against landmarks drawn from all, and the copies fix the frame and tell how large errors are.

    Parameters
    ----------
    estimator : Estimator
    images : (n, size, size) array
        As the microscope gives them; the estimator prepares them.
    copies : int
        How many images are copied, at most all.
    anchors : int
        How many landmarks every image is compared with.
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
    copied = rotations.stream(seed, "copies").choice(n, min(copies, n), replace=False)
    c = len(copied)
    features = np.concatenate(
        [
            estimator.embed(images),
            estimator.embed(imaging.quarter_turn(images[copied])),
            estimator.embed(imaging.mirror(images[copied])),
        ]
    )
    found = recovery.recover_features(features, estimator.head, seed=seed, landmarks=anchors)
    q = found.quaternions
    fixed = frame.from_copies(q[copied], q[n : n + c], q[n + c :])
    q, turned, mirrored = (fixed.apply(part) for part in (q[:n], q[n : n + c], q[n + c :]))
    fit = ~found.outlier[copied]
    expected = found.expected_error_rad[:n]
    slope, start = error_scale(q[copied][fit], turned[fit], mirrored[fit], expected[copied][fit])
    return Orientations(
        q,
        found.residuals_rad[:n],
        fixed,
        features[:n],
        found.used[:n],
        np.maximum(start + slope * expected, 0),
        found.outlier[:n],
    )


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


def orient_by_references(
    estimator: Estimator, images: np.ndarray, density: Density, *, references: int = 2000
) -> Orientations:
    """Orient images against projections of a known density: frame and hand are the density's.

    Parameters
    ----------
    estimator : Estimator
    images : (n, size, size) array
    density : Density, a cube of the images' box
    references : int
        Projections spread evenly over SO(3).

    Returns
    -------
    Orientations
    """
    known = rotations.grid(references)
    landmarks = recovery.Landmarks(
        estimator.embed(projection.project(density, known)),
        known,
        estimator.head,
        np.inf,
        np.arange(0),
    )
    features = estimator.embed(images)
    found = landmarks.place(features, chunk=1024)
    return Orientations(
        found.quaternions,
        found.residuals_rad,
        None,
        features,
        found.used,
        found.expected_error_rad,
        recovery.outliers(found.residuals_rad),
    )
