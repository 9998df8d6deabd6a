"""Orientations from features, one particle at a time: landmarks that place any number of others."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from .. import distances, rotations
from ..errors import InputError
from ..symmetry import group
from .gauss_newton import residuals
from .lateration import ENOUGH, laterate
from .outcome import Recovery, error_floor, expected_errors
from .solve import recover

__all__ = ["Landmarks", "find_landmarks", "recover_features"]

#: What rounding may leave of a distance between features of float32, radians: the root of what it
#: leaves of a cosine.
ROUNDED = 1e-3


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Particles of known orientation, against which any number of others are placed.

    Attributes
    ----------
    features : (m, f) array
    quaternions : (m, 4) array, unit, xyzw
    head : {'exact', 'cosine', 'euclidean'}
        How distances come from features; see :mod:`cryoem.distances`.
    outlier_above_rad : float
        Particles with a larger residual are flagged, if it is larger than what rounding leaves.
    index : (m,) int array
        Which particles they are.
    symmetry : str
        The particle's point group.
    """

    features: Float[np.ndarray, "m f"]
    quaternions: Float[np.ndarray, "m 4"]
    head: str
    outlier_above_rad: float
    index: Int[np.ndarray, " m"]
    symmetry: str = "C1"

    def place(self, features: ArrayLike, *, chunk: int = 8192) -> Recovery:
        """Laterate particles, (n, f) features: each by its own alone, ``chunk`` at once.

        A Gauss-Newton polish after it brings nothing: what is off in a learned distance is the
        particle's own feature, in all its distances alike.
        """
        features = np.asanyarray(features)
        n, m = len(features), len(self.quaternions)
        q, residuals_rad, squares = np.empty((n, 4)), np.empty(n), np.empty(n)
        for i in range(0, n, chunk):
            rows = slice(i, i + chunk)
            table = distances.from_features(features[rows], self.features, self.head)
            q[rows] = laterate(table, self.quaternions, symmetry=self.symmetry)
            differences = self._residuals(q[rows], table)
            residuals_rad[rows] = np.abs(differences).mean(axis=1)
            squares[rows] = np.einsum("nm,nm->n", differences, differences)
        used = np.full(n, m)
        return Recovery(
            quaternions=q,
            loss=float(squares.mean() / m) if n else 0.0,
            residuals_rad=residuals_rad,
            landmarks=self.index,
            used=used,
            expected_error_rad=np.maximum(expected_errors(squares, used), error_floor(m, ROUNDED)),
            outlier=residuals_rad > max(self.outlier_above_rad, ROUNDED),
        )

    def _residuals(
        self, q: Float[np.ndarray, "n 4"], table: Float[np.ndarray, "n m"]
    ) -> Float[np.ndarray, "n m"]:
        """Distances to the landmarks minus those that orientations induce, radians."""
        orbits = group(self.symmetry)
        if orbits.order > 1:
            return table - orbits.kernel_distance(q, self.quaternions)
        return residuals(q.astype(np.float32) @ self.quaternions.astype(np.float32).T, table)


def find_landmarks(
    features: ArrayLike, head: str = "exact", *, seed: int = 0, landmarks: int = 256
) -> Landmarks:
    """Choose particles at random, recover them jointly, keep those that fit.

    Parameters
    ----------
    features : (n, f) array
    head : {'exact', 'cosine', 'euclidean'}
    seed : int
    landmarks : int
        How many are chosen, at most all.

    Returns
    -------
    Landmarks
    """
    features = np.asanyarray(features)
    if features.ndim != 2 or len(features) < 2 * ENOUGH:
        raise InputError(
            f"features must have shape (n, f) with at least {2 * ENOUGH} particles, "
            f"got {features.shape}"
        )
    rng = rotations.generator(seed, "landmarks")
    index = np.sort(rng.choice(len(features), min(landmarks, len(features)), replace=False))
    chosen = features[index]
    if not np.isfinite(chosen).all():
        raise InputError("features must be finite")
    pairs = distances.all_pairs(len(index))
    table = distances.from_features(chosen, chosen, head)
    found = recover(pairs, table[tuple(pairs.T)], seed=seed)
    fit = ~found.outlier
    largest = float(found.residuals_rad[fit].max())
    return Landmarks(chosen[fit], found.quaternions[fit], head, largest, index[fit])


def recover_features(
    features: ArrayLike,
    head: str = "exact",
    *,
    seed: int = 0,
    landmarks: int = 256,
    chunk: int = 8192,
) -> Recovery:
    """Find orientations from features, at a cost that is linear in their number.

    Parameters
    ----------
    features : (n, f) array
        In memory or mapped; read in chunks.
    head : {'exact', 'cosine', 'euclidean'}
    seed : int
    landmarks : int
    chunk : int
        Particles placed at once; the result does not depend on it.

    Returns
    -------
    Recovery
        ``loss`` over all distances to landmarks.
    """
    found = find_landmarks(features, head, seed=seed, landmarks=landmarks)
    return found.place(features, chunk=chunk)
