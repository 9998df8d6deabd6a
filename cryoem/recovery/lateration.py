"""Placing an item by its distances to items of known orientation, in closed form.

``cos^2(d_q / 2) = <v(q), v(p)>`` with the dyad ``v(q) = vec(q q^T)``, ten numbers: the dyad of an
unknown orientation is a least-squares solution, its top eigenvector the orientation.
"""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from .. import rotations
from ..errors import InputError
from ..symmetry import group

__all__ = ["ENOUGH", "complete", "dyads", "laterate", "laterate_rows", "nearest_orientations"]

#: Known distances that place an item in closed form: ten unknowns and a margin.
ENOUGH = 12

#: A symmetric 4 x 4 matrix by its upper triangle, scaled so that inner products stay.
_ROWS, _COLUMNS = np.triu_indices(4)
_SCALE = np.where(_ROWS == _COLUMNS, 1.0, np.sqrt(2.0))
_UPPER = np.triu_indices(10)


def dyads(q: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "... 10"]:
    """``v(q)``, scaled so that ``<v(q), v(p)> = <q, p>^2``: (..., 10)."""
    return (q[..., :, None] * q[..., None, :])[..., _ROWS, _COLUMNS] * _SCALE


def nearest_orientations(v: Float[np.ndarray, "... 10"]) -> Float[np.ndarray, "... 4"]:
    """Unit quaternions nearest to estimates of ``v(q)``: top eigenvectors, (..., 4)."""
    m = np.empty((*v.shape[:-1], 4, 4))
    m[..., _ROWS, _COLUMNS] = m[..., _COLUMNS, _ROWS] = v / _SCALE
    return np.linalg.eigh(m)[1][..., -1]


def _fit_rows(
    weights: Float[np.ndarray, "n m"],
    right: Float[np.ndarray, "n m"],
    v: Float[np.ndarray, "m 10"],
) -> Float[np.ndarray, "n 10"]:
    """Least squares row by row: what ``v`` takes to ``right`` over ``weights``, with these weights.

    ``right`` is multiplied by the weights already, so that it holds zeros where they do.
    """
    products = weights @ (v[:, _UPPER[0]] * v[:, _UPPER[1]])
    normal = np.empty((len(products), 10, 10))
    normal[:, _UPPER[0], _UPPER[1]] = normal[:, _UPPER[1], _UPPER[0]] = products
    # A whiff of ridge: rows may be known too little, or zero.
    ridge = 1e-9 * np.trace(normal, axis1=1, axis2=2)[:, None, None] + 1e-30
    return np.linalg.solve(normal + ridge * np.eye(10), (right @ v)[..., None])[..., 0]


def laterate_rows(
    distances: Float[np.ndarray, "n m"],
    weights: Float[np.ndarray, "n m"],
    landmarks: Float[np.ndarray, "m 4"],
) -> Float[np.ndarray, "n 4"]:
    """Place items of which each has weights of its own; see :func:`laterate`."""
    right = weights * np.cos(distances / 2) ** 2
    return nearest_orientations(_fit_rows(weights, right, dyads(landmarks)))


def laterate(
    distances: ArrayLike,
    landmarks: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    symmetry: str = "C1",
) -> Float[np.ndarray, "n 4"]:
    """Place particles against landmarks of known orientation, in closed form.

    Parameters
    ----------
    distances : (n, m) array, radians
        From each particle to each landmark.
    landmarks : (m, 4) array, unit, xyzw
        At least :data:`ENOUGH`, not all near each other.
    weights : (n, m) array, optional
        How much each distance counts; 0 where it is unknown. Without symmetry only.
    symmetry : str
        The particle's point group. Distances are kernel distances then
        (:mod:`cryoem.symmetry`), and one orientation of each orbit is found.

    Returns
    -------
    (n, 4) array, unit, xyzw
        Each row depends on its own distances alone.
    """
    landmarks = rotations.check(landmarks, "landmarks")
    d = np.asarray(distances, dtype=np.float64)
    w = None if weights is None else np.asarray(weights, dtype=np.float64)
    _check(d, landmarks, w)
    d = np.nan_to_num(d)
    orbits = group(symmetry)
    if w is not None:
        if orbits.order > 1:
            raise InputError(f"distances of symmetry {orbits.name} are laterated without weights")
        return laterate_rows(d, w, landmarks)
    s = np.cos(d / 2) ** 2
    if orbits.order > 1:
        return orbits.decode(s @ np.linalg.pinv(orbits.features(landmarks)).T)
    return nearest_orientations(s @ np.linalg.pinv(dyads(landmarks)).T)


def _check(d: np.ndarray, landmarks: np.ndarray, weights: np.ndarray | None) -> None:
    if d.ndim != 2 or d.shape[1] != len(landmarks):
        raise InputError(
            f"distances must have shape (n, {len(landmarks)}), one column a landmark, got {d.shape}"
        )
    if weights is not None and weights.shape != d.shape:
        raise InputError(f"weights must have the distances' shape {d.shape}, got {weights.shape}")
    unknown = ~np.isfinite(d) & (True if weights is None else weights > 0)
    if unknown.any():
        raise InputError(
            f"distances must be finite: row {np.argwhere(unknown)[0, 0]} has one that is not; "
            "weight 0 marks an unknown distance"
        )
    if len(landmarks) < ENOUGH:
        raise InputError(f"lateration needs at least {ENOUGH} landmarks, got {len(landmarks)}")


def complete(
    s: Float[np.ndarray, "m m"], known: Float[np.ndarray, "m m"], sweeps: int = 200
) -> Float[np.ndarray, "m m"]:
    """Fill in a symmetric table of ``cos^2(d / 2)`` from its known entries: it has rank ten.

    Alternating least squares on ``s = x v^T``, from the top ten eigenvectors of what is known.
    Without the orientations' constraint there is no local minimum to end in, given some forty known
    entries a row.

    Parameters
    ----------
    s : (m, m) array
        Zeros where nothing is known.
    known : (m, m) array of 0 and 1
    sweeps : int
        At most.
    """
    w, u = np.linalg.eigh(s)
    v = u[:, -10:] * np.sqrt(np.maximum(w[-10:] * known.size / known.sum(), 1e-9))
    before = np.inf
    for sweep in range(sweeps):
        x = _fit_rows(known, s, v)
        if sweep % 5 == 4:
            misfit = float(np.linalg.norm(known * (x @ v.T - s)))
            if before - misfit < 1e-3 * misfit or misfit < 1e-7 * np.sqrt(known.sum()):
                break
            before = misfit
        x, v = v, x
    filled = x @ v.T
    return np.where(known > 0, s, (filled + filled.T) / 2)
