"""Orientations from distances: landmarks, lateration, polish. The method's second step.

With ``v(q) = vec(q q^T)``, ten numbers, ``cos^2(d_q / 2) = <v(q_i), v(q_j)>``: linear in the
unknown ``v(q_i)`` once the ``q_j`` are known. A small set of landmarks is solved jointly from many
random starts by alternating this least-squares step over its members; everyone else is placed
against it in closed form; all are then swept against all they have a distance to, and polished by
Gauss-Newton steps on the paper's loss, to the optimum that its gradient descent
(:mod:`cryoem.descent`) creeps up to.

    L_OR = mean over pairs of (d_p(p_i, p_j) - d_q(q_i, q_j))^2

Distances leave all of O(4) open; :mod:`cryoem.frame` closes it.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
from numpy.typing import ArrayLike

from . import rotations
from .errors import InputError
from .rotations import Seed

__all__ = [
    "Recovery",
    "check_pairs",
    "error_floor",
    "laterate",
    "pair_loss",
    "recover",
    "solve_landmarks",
]

_ROWS, _COLUMNS = np.triu_indices(4)
_PACK = np.where(_ROWS == _COLUMNS, 1.0, np.sqrt(2.0))
#: Known neighbours that place a particle: ten unknowns and a margin.
ENOUGH = 12


@dataclass(frozen=True)
class Recovery:
    """Recovered orientations, in an unknown frame of O(4).

    Attributes
    ----------
    quaternions : (n, 4) array, unit, xyzw
    loss : float
        ``L_OR`` over all pairs given, radians squared.
    residuals_rad : (n,) array
        Mean absolute difference of each particle's distances to those induced.
    landmarks : (m,) int array
    """

    quaternions: np.ndarray
    loss: float
    residuals_rad: np.ndarray
    landmarks: np.ndarray


def check_pairs(
    pairs: ArrayLike, distances: ArrayLike, n: int | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Check pairs and their distances; return (pairs, distances, n).

    Parameters
    ----------
    pairs : (m, 2) int array
        Indices i != j.
    distances : (m,) array, radians in [0, pi]
    n : int, optional
        Number of items; default: the largest index + 1.

    Raises
    ------
    InputError
        Wrong shapes, pairs (i, i), indices outside, distances that are not finite or outside.
    """
    pairs, distances = np.asarray(pairs), np.asarray(distances, dtype=np.float64)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise InputError(
            f"pairs must be an (m, 2) array of integers, got {pairs.dtype} {pairs.shape}"
        )
    if distances.shape != (len(pairs),):
        raise InputError(f"wanted {len(pairs)} distances, one a pair, got {distances.shape}")
    if len(pairs) == 0:
        raise InputError("no pairs: wanted at least one distance")
    n = int(pairs.max()) + 1 if n is None else n
    if pairs.min() < 0 or pairs.max() >= n:
        raise InputError(f"pairs must index {n} items, got {pairs.min()} to {pairs.max()}")
    same = np.flatnonzero(pairs[:, 0] == pairs[:, 1])
    if len(same):
        raise InputError(f"pair {same[0]} compares item {pairs[same[0], 0]} with itself")
    bad = np.flatnonzero(~((distances >= 0) & (distances <= np.pi + 1e-5)))
    if len(bad):
        raise InputError(
            f"distances must lie in [0, pi] radians: pair {bad[0]} has {distances[bad[0]]} "
            f"({len(bad)} do not)"
        )
    return pairs, distances, n


def pair_loss(quaternions: np.ndarray, pairs: ArrayLike, distances: np.ndarray) -> float:
    """``L_OR`` over the pairs, radians squared."""
    return float(np.mean((rotations.pair_distances(quaternions, pairs) - distances) ** 2))


def error_floor(n: int, sd: float) -> float:
    """Mean error over O(4) that nobody beats: every other orientation known, ``n`` noisy distances.

    Each distance of standard deviation ``sd`` measures one direction of a rotation vector; ``n`` of
    them leave a covariance ``3 sd^2 / n`` in each of three, whose mean length is 0.92 x sqrt(3) of
    its standard deviation.

    Parameters
    ----------
    n : int
    sd : float, radians

    Returns
    -------
    float, radians
    """
    return float(2 * np.sqrt(2 / np.pi) * np.sqrt(3) * sd / np.sqrt(n))


# --------------------------------------------------------------------------------------
# Lateration


def _vectors(q: np.ndarray) -> np.ndarray:
    """``v(q)``, scaled so that ``<v(q), v(p)> = <q, p>^2``: (..., 10)."""
    return (q[..., :, None] * q[..., None, :])[..., _ROWS, _COLUMNS] * _PACK


def _top(v: np.ndarray) -> np.ndarray:
    """Unit quaternions nearest to estimates of ``v(q)``: top eigenvectors, (..., 4)."""
    m = np.empty((*v.shape[:-1], 4, 4))
    m[..., _ROWS, _COLUMNS] = m[..., _COLUMNS, _ROWS] = v / _PACK
    return np.linalg.eigh(m)[1][..., -1]


def _solve(normal: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Least squares from normal equations (..., 10, 10) and (..., 10), with a whiff of ridge."""
    ridge = 1e-9 * np.trace(normal, axis1=-2, axis2=-1)[..., None, None] + 1e-30
    return np.linalg.solve(normal + ridge * np.eye(10), right[..., None])[..., 0]


def laterate(
    distances: ArrayLike, landmarks: ArrayLike, *, weights: np.ndarray | None = None
) -> np.ndarray:
    """Place particles against landmarks of known orientation, in closed form.

    Parameters
    ----------
    distances : (n, m) array, radians
        From each particle to each landmark.
    landmarks : (m, 4) array, unit, xyzw
        At least :data:`ENOUGH`, not all near each other.
    weights : (n, m) array, optional
        How much each distance counts; 0 where it is unknown.

    Returns
    -------
    (n, 4) array, unit, xyzw
        Each row depends on its own distances alone.
    """
    landmarks = rotations.check(landmarks, "landmarks")
    d = np.asarray(distances, dtype=np.float64)
    if d.ndim != 2 or d.shape[1] != len(landmarks):
        raise InputError(
            f"distances must have shape (n, {len(landmarks)}), one column a landmark, got {d.shape}"
        )
    if weights is not None and np.shape(weights) != d.shape:
        raise InputError(
            f"weights must have the distances' shape {d.shape}, got {np.shape(weights)}"
        )
    unknown = ~np.isfinite(d) & (True if weights is None else np.asarray(weights) > 0)
    if unknown.any():
        raise InputError(
            f"distances must be finite: row {np.argwhere(unknown)[0, 0]} has one that is not; "
            "weight 0 marks an unknown distance"
        )
    if len(landmarks) < ENOUGH:
        raise InputError(f"lateration needs at least {ENOUGH} landmarks, got {len(landmarks)}")
    s = np.cos(np.nan_to_num(d) / 2) ** 2
    vectors = _vectors(landmarks)
    if weights is None:
        return _top(s @ np.linalg.pinv(vectors).T)
    outer = (vectors[:, :, None] * vectors[:, None, :]).reshape(len(vectors), 100)
    normal = (weights @ outer).reshape(-1, 10, 10)
    return _top(_solve(normal, (weights * s) @ vectors))


class _Graph:
    """The pairs as sparse matrices, for one step of lateration of everyone at once."""

    def __init__(self, pairs: np.ndarray, distances: np.ndarray, n: int) -> None:
        i, j = pairs.T
        s = np.cos(distances / 2) ** 2
        both, other = np.concatenate([i, j]), np.concatenate([j, i])
        shape = (n, n)
        self.known = scipy.sparse.csr_array((np.ones(2 * len(s)), (both, other)), shape)
        self.s = scipy.sparse.csr_array((np.concatenate([s, s]), (both, other)), shape)
        self.upper = np.triu_indices(10)

    def step(self, q: np.ndarray, members: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Laterate ``rows`` against those ``members`` that they have a distance to."""
        vectors = _vectors(q[members])
        packed = vectors[:, self.upper[0]] * vectors[:, self.upper[1]]
        counts = self.known[rows][:, members]
        summed = counts @ packed
        normal = np.empty((len(summed), 10, 10))
        normal[:, self.upper[0], self.upper[1]] = normal[:, self.upper[1], self.upper[0]] = summed
        return _top(_solve(normal, self.s[rows][:, members] @ vectors))

    def neighbours(self, members: np.ndarray) -> np.ndarray:
        """How many members each item has a distance to: (n,)."""
        chosen = np.zeros(self.known.shape[0])
        chosen[members] = 1
        return self.known @ chosen


def solve_landmarks(
    distances: np.ndarray,
    seed: Seed,
    *,
    known: np.ndarray | None = None,
    starts: int = 64,
    sweeps: int = 100,
) -> tuple[np.ndarray, float]:
    """Orient a small set jointly, from many random starts; the lowest loss wins.

    Each sweep laterates every member against all the others at once. About one random start in
    four ends in the global minimum, so that 64 fail together once in 10^8.

    Parameters
    ----------
    distances : (m, m) array, radians, symmetric
    seed : int or numpy.random.Generator
    known : (m, m) bool array, optional
        Which distances are given; default: all but the diagonal.
    starts, sweeps : int
        The worse three quarters of the starts are dropped after a quarter of the sweeps.

    Returns
    -------
    quaternions : (m, 4) array
    loss : float
        ``L_OR`` among the landmarks.
    """
    m = len(distances)
    known = ~np.eye(m, dtype=bool) if known is None else known
    w, s = known.astype(np.float64), np.cos(distances / 2) ** 2
    q = np.random.default_rng(seed).standard_normal((starts, m, 4))
    q /= np.linalg.norm(q, axis=-1, keepdims=True)

    def losses(q: np.ndarray) -> np.ndarray:
        cosine = np.abs(q @ np.swapaxes(q, -1, -2))
        off = 2 * np.arccos(np.minimum(cosine, 1)) - distances
        return np.sum(w * off**2, axis=(-1, -2)) / w.sum()

    for sweep in range(sweeps):
        v = _vectors(q).swapaxes(0, 1)  # (m, starts, 10): one product serves all starts
        outer = (v[..., :, None] * v[..., None, :]).reshape(m, -1)
        normal = (w @ outer).reshape(*v.shape, 10)
        right = ((w * s) @ v.reshape(m, -1)).reshape(v.shape)
        q = _top(_solve(normal, right)).swapaxes(0, 1)
        if sweep == sweeps // 4:
            q = q[np.argsort(losses(q))[: max(1, starts // 4)]]
    final = losses(q)
    best = int(np.argmin(final))
    return q[best], float(final[best])


# --------------------------------------------------------------------------------------
# Everyone


def _gauss_newton(q: np.ndarray, pairs: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """One Gauss-Newton step on ``L_OR``: every particle against the others as they stand."""
    i, j = pairs.T
    n = len(q)
    relative = rotations.multiply(rotations.inverse(q[i]), q[j])
    relative *= np.where(relative[:, 3:] < 0, -1.0, 1.0)
    length = np.linalg.norm(relative[:, :3], axis=1)
    off = distances - 2 * np.arctan2(length, relative[:, 3])
    # d_q grows by <u, w_j> - <u, w_i> with the rotation vectors w; no direction where i = j.
    u = relative[:, :3] / np.where(length > 1e-12, length, 1)[:, None] * (length > 1e-12)[:, None]
    normal, right = np.empty((n, 3, 3)), np.empty((n, 3))
    for a in range(3):
        pull = u[:, a] * off
        right[:, a] = np.bincount(j, pull, n) - np.bincount(i, pull, n)
        for b in range(a, 3):
            product = u[:, a] * u[:, b]
            summed = np.bincount(i, product, n) + np.bincount(j, product, n)
            normal[:, a, b] = normal[:, b, a] = summed
    ridge = 1e-6 * np.trace(normal, axis1=1, axis2=2)[:, None, None] + 1e-12
    step = np.linalg.solve(normal + ridge * np.eye(3), right[..., None])[..., 0]
    longest = np.linalg.norm(step, axis=1, keepdims=True)
    return rotations.perturb(q, step * np.minimum(1, 0.3 / np.maximum(longest, 1e-12)))


def recover(
    pairs: ArrayLike,
    distances: ArrayLike,
    n: int | None = None,
    *,
    seed: int = 0,
    landmarks: int = 80,
    starts: int = 64,
    sweeps: int = 2,
    polish: int = 20,
) -> Recovery:
    """Find the orientations whose distances are the given ones.

    Parameters
    ----------
    pairs : (m, 2) int array
    distances : (m,) array, radians
        Exact, perturbed or learned.
    n : int, optional
        Number of items; default: the largest index + 1.
    seed : int
    landmarks : int
        How many are solved jointly; more where few pairs are known.
    starts : int
        Random starts of the landmarks.
    sweeps : int
        Laterations of everyone against everyone after the first placement.
    polish : int
        Gauss-Newton steps on ``L_OR`` at the end, at most: they stop once it falls no more. Three
        or four do on distances with noise.

    Returns
    -------
    Recovery

    Raises
    ------
    InputError
        Malformed pairs, or items with too few of them to be placed.
    """
    pairs, distances, n = check_pairs(pairs, distances, n)
    graph = _Graph(pairs, distances, n)
    rng = rotations.stream(seed, "recovery")
    degree = np.diff(graph.known.indptr)
    if (degree < ENOUGH).any():
        few = np.flatnonzero(degree < ENOUGH)
        raise InputError(
            f"item {few[0]} has distances to {degree[few[0]]} others; {ENOUGH} are needed to place "
            f"it ({len(few)} items have too few)"
        )
    parts = scipy.sparse.csgraph.connected_components(graph.known, directed=False)[0]
    if parts > 1:
        raise InputError(f"the pairs fall into {parts} sets that no pair connects; wanted one")
    # The members with most distances, in random order where they have as many.
    density = len(pairs) / (n * (n - 1) / 2)
    m = min(n, max(landmarks, int(np.ceil(25 / density)) if density < 0.3 else 0))
    chosen = np.sort(np.lexsort([rng.random(n), -degree])[:m])
    known = graph.known[chosen][:, chosen].toarray()
    s = graph.s[chosen][:, chosen].toarray() / np.maximum(known, 1)
    q = np.zeros((n, 4))
    q[chosen], _ = solve_landmarks(
        2 * np.arccos(np.sqrt(np.clip(s, 0, 1))), rng, known=known > 0, starts=starts
    )
    placed = np.zeros(n, bool)
    placed[chosen] = True
    while not placed.all():
        members = np.flatnonzero(placed)
        ready = np.flatnonzero(~placed & (graph.neighbours(members) >= ENOUGH))
        if len(ready) == 0:
            raise InputError(
                f"{np.sum(~placed)} items have too few distances to those that were placed; "
                "more pairs or more landmarks are needed"
            )
        q[ready] = graph.step(q, members, ready)
        placed[ready] = True
    everyone = np.arange(n)
    for _ in range(sweeps):
        q = graph.step(q, everyone, everyone)
    best, q_best = np.inf, q
    for _ in range(polish + 1):
        loss = pair_loss(q, pairs, distances)
        gain = best - loss
        if gain > 0:
            best, q_best = loss, q
        if gain < 1e-5 * loss or loss < 1e-16:
            break
        q = _gauss_newton(q, pairs, distances)
    q = q_best
    off = np.abs(rotations.pair_distances(q, pairs) - distances)
    totals = np.bincount(pairs[:, 0], off, n) + np.bincount(pairs[:, 1], off, n)
    counts = np.bincount(pairs.ravel(), minlength=n)
    return Recovery(q, float(np.mean(off**2)), totals / counts, chosen)
