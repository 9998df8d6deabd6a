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

__all__ = ["Orientations", "orient", "orient_by_references"]


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
    """

    quaternions: np.ndarray
    residuals_rad: np.ndarray
    frame: frame.Frame | None
    features: np.ndarray


def orient(
    estimator: Estimator, images: ArrayLike, *, copies: int = 200, anchors: int = 256, seed: int = 0
) -> Orientations:
    """Orient images against each other: no density, no truth.

    In-plane-turned and mirrored copies of some images are embedded with the images; all are
    recovered together from the distances to a set of anchors, and the copies fix the frame.

    Parameters
    ----------
    estimator : Estimator
    images : (n, size, size) array
        As the microscope gives them; the estimator prepares them.
    copies : int
        How many images are copied, at most all.
    anchors : int
        Every image is compared with this many others.
    seed : int

    Returns
    -------
    Orientations
    """
    images = projection.check_images(images)
    n = len(images)
    if n < 2 * recovery.ENOUGH:
        raise InputError(f"wanted at least {2 * recovery.ENOUGH} images to orient, got {n}")
    rng = np.random.default_rng(seed)
    copied = rng.choice(n, min(copies, n), replace=False)
    features = np.concatenate(
        [
            estimator.embed(images),
            estimator.embed(imaging.quarter_turn(images[copied])),
            estimator.embed(imaging.mirror(images[copied])),
        ]
    )
    total, c = len(features), len(copied)
    anchor = np.sort(rng.choice(total, min(anchors, total), replace=False))
    table = estimator.distances(features, features[anchor])
    i, j = np.divmod(np.arange(table.size), len(anchor))
    # An anchor meets another once, and never itself.
    rank = np.full(total, -1)
    rank[anchor] = np.arange(len(anchor))
    keep = (rank[i] < 0) | (rank[i] < j)
    pairs = np.stack([i, anchor[j]], axis=1)[keep]
    found = recovery.recover(pairs, table.ravel()[keep], total, seed=seed)
    q = found.quaternions
    fixed = frame.from_copies(q[copied], q[n : n + c], q[n + c :])
    return Orientations(fixed.apply(q[:n]), found.residuals_rad[:n], fixed, features[:n])


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
    landmarks = estimator.embed(projection.project(density, known))
    features = estimator.embed(images)
    table = estimator.distances(features, landmarks)
    q = recovery.laterate(table, known)
    residuals = np.empty(len(q))
    for i in range(0, len(q), 256):
        induced = rotations.distance(q[i : i + 256, None], known)
        residuals[i : i + 256] = np.abs(induced - table[i : i + 256]).mean(axis=1)
    return Orientations(q, residuals, None, features)
