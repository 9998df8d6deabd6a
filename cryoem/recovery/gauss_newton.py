"""Gauss-Newton steps on the paper's loss, for each item by its distances to the others.

``d_q = 2 arccos |<q, p>|`` falls along ``p`` by ``2 sign<q, p> / sqrt(1 - <q, p>^2)``.
"""

import numpy as np
from jaxtyping import Float
from scipy.stats import median_abs_deviation

from .. import rotations
from .table import DistanceTable

__all__ = ["TUKEY_CUT", "gauss_newton_step", "minimise_loss", "residuals", "search"]

#: Where Tukey's weights reach zero, in standard deviations: 95 % efficient on Gaussian errors.
TUKEY_CUT = 4.685

_ROWS, _COLUMNS = np.triu_indices(4)


def residuals(cosines: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Distances given minus those that the inner products ``<q, p>`` induce, radians."""
    return distances - 2 * np.arccos(np.minimum(np.abs(cosines), 1))


def _normal_terms(
    cosines: np.ndarray, differences: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Factors of ``p p^T`` and of ``p`` in the normal equations, one a distance.

    Squared slopes of the induced distances, and slopes times residuals, both weighted.
    """
    square = np.maximum(1 - cosines**2, 1e-12)
    weighted = weights / square
    return 4 * weighted, -2 * np.sign(cosines) * weighted * differences * np.sqrt(square)


def _upper_dyads(q: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 10"]:
    """Upper triangles of ``q q^T``."""
    return q[:, _ROWS] * q[:, _COLUMNS]


def gauss_newton_step(
    q: Float[np.ndarray, "n 4"],
    normal: Float[np.ndarray, "n 10"],
    right: Float[np.ndarray, "n 4"],
) -> Float[np.ndarray, "n 4"]:
    """Gauss-Newton step on the sphere.

    Parameters
    ----------
    q : (n, 4) array
    normal : (n, 10) array
        Upper triangles of the sums of ``squared slope x p p^T``.
    right : (n, 4) array
        Sums of ``slope x residual x p``.

    Returns
    -------
    (n, 4) array, unit
    """
    full = np.empty((len(q), 4, 4))
    full[:, _ROWS, _COLUMNS] = full[:, _COLUMNS, _ROWS] = normal
    # Along q nothing can move: three directions are left, half rotation vectors.
    x, y, z, w = q.T
    tangent = np.stack([[w, z, -y, -x], [-z, w, x, -y], [y, -x, w, -z]]).transpose(2, 0, 1)
    inner = tangent @ full @ tangent.transpose(0, 2, 1)
    trace = np.trace(inner, axis1=1, axis2=2)[:, None, None]
    inner += (1e-6 * trace + 1e-12) * np.eye(3)
    step = np.linalg.solve(inner, tangent @ right[..., None])[..., 0]
    longest = np.linalg.norm(step, axis=1, keepdims=True)
    step *= np.minimum(1, 0.15 / np.maximum(longest, 1e-12))  # at most 0.3 rad
    q = q + np.einsum("nk,nkl->nl", step, tangent)
    return q / np.linalg.norm(q, axis=1, keepdims=True)


def search(
    distances: Float[np.ndarray, "n m"],
    weights: Float[np.ndarray, "n m"],
    placed: Float[np.ndarray, "m 4"],
    *,
    candidates: int = 2000,
    starts: int = 16,
    steps: int = 20,
) -> Float[np.ndarray, "n 4"]:
    """Place items that have too few distances for lateration: the best of a grid, polished.

    Parameters
    ----------
    distances, weights : (n, m) arrays
        To items that are placed; weight 0 where there is none.
    placed : (m, 4) array, unit, xyzw
    candidates : int
        Of the grid over SO(3), from which the best ``starts`` take ``steps`` Gauss-Newton steps.

    Returns
    -------
    (n, 4) array, unit, xyzw
    """
    grid = rotations.grid(candidates)
    induced = rotations.distance(grid[:, None], placed)
    upper = _upper_dyads(placed)
    out = np.empty((len(distances), 4))
    for first in range(0, len(distances), 512):
        rows = slice(first, first + 512)
        d, w = distances[rows], weights[rows]
        costs = w @ (induced**2).T - 2 * (w * d) @ induced.T  # but for the sum of w d^2
        q = grid[np.argpartition(costs, starts)[:, :starts]].reshape(-1, 4)
        d, w = np.repeat(d, starts, axis=0), np.repeat(w, starts, axis=0)
        for _ in range(steps):
            cosines = q @ placed.T
            squares, pulls = _normal_terms(cosines, residuals(cosines, d), w)
            q = gauss_newton_step(q, squares @ upper, pulls @ placed)
        losses = np.sum(w * residuals(q @ placed.T, d) ** 2, axis=1).reshape(-1, starts)
        out[rows] = q[losses.argmin(axis=1) + starts * np.arange(len(losses))]
    return out


def _sweep(
    table: DistanceTable, q: Float[np.ndarray, "n 4"], cut: float
) -> tuple[Float[np.ndarray, "n 4"], float, Float[np.ndarray, " k"]]:
    """Every item a Gauss-Newton step against the others as they stand.

    Parameters
    ----------
    table : DistanceTable
    q : (n, 4) array
    cut : float, radians
        Where Tukey's weights reach zero; infinite for least squares.

    Returns
    -------
    moved : (n, 4) array
    loss : float
        ``L_OR`` before the step.
    sample : (k,) array
        Residuals of about 10^5 of the pairs before the step.
    """
    upper = _upper_dyads(q)
    moved, total, sample = np.empty_like(q), 0.0, []
    stride = max(1, int(table.counts.sum()) // 100_000)
    for rows in table.blocks():
        distances, weights = table.entries(rows)
        cosines = table.cosines(q, rows)
        differences = residuals(cosines, distances) * weights
        total += float(np.sum(differences**2))
        sample.append(differences[weights > 0][::stride])
        if np.isfinite(cut):
            weights = weights * np.maximum(1 - (differences / cut) ** 2, 0) ** 2
        squares, pulls = _normal_terms(cosines, differences, weights)
        moved[rows] = gauss_newton_step(
            q[rows], table.sums(squares, upper, rows), table.sums(pulls, q, rows)
        )
    return moved, total / table.counts.sum(), np.concatenate(sample)


def _zero(sample: np.ndarray, axis: int) -> float:
    """The centre of residuals."""
    return 0.0


def minimise_loss(
    table: DistanceTable, q: Float[np.ndarray, "n 4"], steps: int
) -> tuple[Float[np.ndarray, "n 4"], float]:
    """Minimise ``L_OR``, then its robust form where distances are wild.

    Gaussian errors leave one in 10^5 beyond :data:`TUKEY_CUT` standard deviations, and clipped ones
    none: with more than one in a hundred the errors are not of one kind.

    Parameters
    ----------
    table : DistanceTable
    q : (n, 4) array, unit, xyzw
        Where to start.
    steps : int
        At most.

    Returns
    -------
    q : (n, 4) array, unit, xyzw
    cut : float, radians
        Distances that are off by more were given no weight; infinite for least squares.
    """
    cut, best, q_best = np.inf, np.inf, q
    for _ in range(steps + 1):
        moved, loss, sample = _sweep(table, q, cut)
        sd = float(median_abs_deviation(sample, center=_zero, scale="normal"))
        measure = np.sqrt(loss) if np.isinf(cut) else sd
        gain = (best - measure) / max(measure, 1e-12)
        if gain > 0:
            best, q_best = measure, q
        if np.isinf(cut):
            wild = np.mean(np.abs(sample) > TUKEY_CUT * sd) > 0.01
            if gain < 0.05 and loss > 1e-14 and wild:
                cut, best = TUKEY_CUT * sd, np.inf
                moved = _sweep(table, q, cut)[0]
            elif gain < 5e-6 or loss < 1e-16:
                break
        elif gain < 1e-3 or sd < 1e-9:
            break
        else:
            # Slowly, so that the last to arrive are not left out.
            cut = max(TUKEY_CUT * sd, cut / 2)
        q = moved
    return q_best, cut
