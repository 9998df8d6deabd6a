"""Orientations from distances: landmarks, lateration, polish. The method's second step.

With ``v(q) = vec(q q^T)``, ten numbers, ``cos^2(d_q / 2) = <v(q_i), v(q_j)>``: linear in the
unknown ``v(q_i)`` once the ``q_j`` are known. A small set of landmarks is solved jointly from many
random starts by alternating this least-squares step over its members; everyone else is placed
against it in closed form; all are then polished by Gauss-Newton steps on the paper's loss, to the
optimum that its gradient descent (:mod:`cryoem.descent`) creeps up to.

    L_OR = mean over pairs of (d_p(p_i, p_j) - d_q(q_i, q_j))^2

Where few pairs are known, those of the landmarks are first completed: a table of ``cos^2(d / 2)``
has rank ten. Where more distances lie far off than errors of one size explain, the polish is
robust: Tukey's weights take the wild ones out.

:func:`recover` takes pairs. :func:`recover_features` takes features, never forms all pairs, and
costs the same for each particle. Distances leave all of O(4) open; :mod:`cryoem.frame` closes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
from numpy.typing import ArrayLike

from . import distances as distances_
from . import rotations
from .errors import InputError
from .rotations import Seed
from .symmetry import group

__all__ = [
    "Landmarks",
    "Recovery",
    "check_pairs",
    "choose_pairs",
    "error_floor",
    "find_landmarks",
    "laterate",
    "outliers",
    "pair_loss",
    "recover",
    "recover_features",
    "solve_landmarks",
]

_ROWS, _COLUMNS = np.triu_indices(4)
_PACK = np.where(_ROWS == _COLUMNS, 1.0, np.sqrt(2.0))
_UPPER = np.triu_indices(10)
#: Known neighbours that place a particle in closed form: ten unknowns and a margin.
ENOUGH = 12
#: Known neighbours that place a particle by search: three unknowns and a margin.
FEWEST = 6
#: Landmarks whose distances are completed, at most: the cost is the cube of it.
MOST = 3072
#: Where Tukey's weights reach zero, in standard deviations: 95 % efficient on Gaussian errors.
CUT = 4.685
#: Mean length of a Gaussian vector in three dimensions over its standard deviation in each.
_MEAN_LENGTH = 2 * np.sqrt(2 / np.pi)


@dataclass(frozen=True)
class Recovery:
    """Recovered orientations, in an unknown frame of O(4), and how each came out.

    Attributes
    ----------
    quaternions : (n, 4) array, unit, xyzw
    loss : float
        ``L_OR`` over all distances used, radians squared.
    residuals_rad : (n,) array
        Mean absolute difference of each particle's distances to those induced.
    landmarks : (m,) int array
        The particles that were solved jointly.
    used : (n,) int array
        How many distances placed each particle.
    expected_error_rad : (n,) array
        Mean error that each particle's residuals leave if the errors of its distances are
        independent. Those of learned distances are not: there the numbers rank, and
        :func:`cryoem.orient.orient` scales them by what the copies show.
    outlier : (n,) bool array
        See :func:`outliers`.
    """

    quaternions: np.ndarray
    loss: float
    residuals_rad: np.ndarray
    landmarks: np.ndarray
    used: np.ndarray
    expected_error_rad: np.ndarray
    outlier: np.ndarray


def outliers(residuals_rad: np.ndarray) -> np.ndarray:
    """Flag particles that fit far worse than most: (n,) bool array.

    Beyond the median by five standard deviations (taken from the median absolute deviation) and by
    a microradian.
    """
    middle = np.median(residuals_rad)
    spread = 1.4826 * np.median(np.abs(residuals_rad - middle))
    return residuals_rad > middle + 5 * spread + 1e-6


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


def choose_pairs(n: int, seed: Seed, *, core: int = 30, each: int = 8) -> np.ndarray:
    """Choose the pairs to measure where measuring is dear: a core, and a few of it for each other.

    Parameters
    ----------
    n : int
    seed : int or numpy.random.Generator
    core : int
        Items of which all pairs are measured.
    each : int
        How many members of the core every other item is compared with.

    Returns
    -------
    (core (core - 1) / 2 + (n - core) each, 2) int array
        At 1,650 items and the defaults 0.98 % of all pairs.
    """
    if not FEWEST <= each <= core <= n or core < 2 * ENOUGH:
        raise InputError(
            f"wanted {FEWEST} <= each <= core <= n and a core of at least {2 * ENOUGH}, "
            f"got each={each}, core={core}, n={n}"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    members, others = order[:core], order[core:]
    drawn = np.argsort(rng.random((n - core, core)), axis=1)[:, :each]
    return np.concatenate(
        [
            members[distances_.all_pairs(core)],
            np.stack([np.repeat(others, each), members[drawn].ravel()], axis=1),
        ]
    )


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
    return float(_MEAN_LENGTH * np.sqrt(3) * sd / np.sqrt(n))


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


def _fit_rows(weights: np.ndarray, right: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Least squares row by row: (n, 10) that ``v`` (m, 10) takes to ``right``, an (n, m) table.

    ``right`` holds zeros where ``weights`` does.
    """
    products = weights @ (v[:, _UPPER[0]] * v[:, _UPPER[1]])
    normal = np.empty((len(products), 10, 10))
    normal[:, _UPPER[0], _UPPER[1]] = normal[:, _UPPER[1], _UPPER[0]] = products
    return _solve(normal, right @ v)


def laterate(
    distances: ArrayLike,
    landmarks: ArrayLike,
    *,
    weights: np.ndarray | None = None,
    symmetry: str = "C1",
) -> np.ndarray:
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
    orbits = group(symmetry)
    if orbits.order > 1:
        if weights is not None:
            raise InputError(f"distances of symmetry {orbits.name} are laterated without weights")
        return orbits.decode(s @ np.linalg.pinv(orbits.features(landmarks)).T)
    vectors = _vectors(landmarks)
    if weights is None:
        return _top(s @ np.linalg.pinv(vectors).T)
    return _top(_fit_rows(np.asarray(weights), weights * s, vectors))


def _complete(s: np.ndarray, known: np.ndarray, sweeps: int = 200) -> np.ndarray:
    """Fill in a symmetric table of ``cos^2(d / 2)`` from its known entries: it has rank ten.

    Alternating least squares on ``s = x v^T``, from the top ten eigenvectors of what is known.
    Without the orientations' constraint there is no local minimum to end in, given some forty known
    entries a row.
    """
    w, u = np.linalg.eigh(s)
    v = u[:, -10:] * np.sqrt(np.maximum(w[-10:] * known.size / known.sum(), 1e-9))
    before = np.inf
    for sweep in range(sweeps):
        x = _fit_rows(known, s, v)
        if sweep % 5 == 4:
            off = float(np.linalg.norm(known * (x @ v.T - s)))
            if before - off < 1e-3 * off or off < 1e-7 * np.sqrt(known.sum()):
                break
            before = off
        x, v = v, x
    filled = x @ v.T
    return np.where(known > 0, s, (filled + filled.T) / 2)


def solve_landmarks(
    distances: np.ndarray, seed: Seed, *, starts: int = 64, sweeps: int = 100
) -> tuple[np.ndarray, float, bool]:
    """Orient a small set jointly, from many random starts; the lowest loss wins.

    Each sweep laterates every member against all the others at once. About one random start in
    three ends in the global minimum: starts are added, sixteen at a time and 32 at least, until
    three agree on the lowest loss, or one has none.

    Parameters
    ----------
    distances : (m, m) array, radians, symmetric
    seed : int or numpy.random.Generator
    starts, sweeps : int
        At most. The worse half of each sixteen is dropped after a quarter of the sweeps.

    Returns
    -------
    quaternions : (m, 4) array
    loss : float
        ``L_OR`` among the landmarks.
    agreed : bool
        Whether three starts agreed on it; if not, it may be a local minimum.
    """
    m = len(distances)
    others = ~np.eye(m, dtype=bool)
    s = np.where(others, np.cos(distances / 2) ** 2, 1.0)
    ridge = 1e-9 * m * np.eye(10)
    rng = np.random.default_rng(seed)

    def losses(q: np.ndarray) -> np.ndarray:
        off = _off(q @ np.swapaxes(q, -1, -2), distances)
        return np.mean(off**2, axis=(-1, -2), where=others)

    best, found = np.zeros((m, 4)), np.zeros(0)
    agreed = False
    while not agreed and len(found) < starts // 2:
        q = rng.standard_normal((16, m, 4))
        q /= np.linalg.norm(q, axis=-1, keepdims=True)
        for sweep in range(sweeps):
            v = _vectors(q)
            # Normal equations for all members at once; then each is left out of its own fit by
            # its leverage: its distance to itself, 0, would hold it where it is.
            inverse = np.linalg.inv(np.swapaxes(v, -1, -2) @ v + ridge)
            fit, influence = (s @ v) @ inverse, v @ inverse
            leverage = np.sum(v * influence, axis=-1, keepdims=True)
            excess = np.sum(v * fit, axis=-1, keepdims=True) - 1
            q = _top(fit + influence * excess / np.maximum(1 - leverage, 1e-6))
            if sweep == sweeps // 4:
                q = q[np.argsort(losses(q))[:8]]
        final = losses(q)
        if final.min() < found.min(initial=np.inf):
            best = q[np.argmin(final)]
        found = np.append(found, final)
        lowest = found.min()
        alike = np.sum(found < 1.01 * lowest)
        agreed = bool(lowest < 1e-10 or (alike >= 3 and len(found) >= 16))
    return best, float(found.min()), agreed


# --------------------------------------------------------------------------------------
# The known distances, and one step against them


class _Known:
    """The known distances of each item: an array where many are known, sparse where few are."""

    def __init__(self, pairs: np.ndarray, distances: np.ndarray, n: int) -> None:
        i, j = pairs.T
        self.n = n
        self.counts = np.bincount(pairs.ravel(), minlength=n)
        self.dense = n * n <= max(4 * 2 * len(pairs), 4_000_000)
        if self.dense:
            self.d = np.zeros((n, n))
            self.weight = np.zeros((n, n))
            self.d[i, j] = self.d[j, i] = distances
            self.weight[i, j] = self.weight[j, i] = 1
        else:
            rows, columns = np.concatenate([i, j]), np.concatenate([j, i])
            order = np.argsort(rows, kind="stable")
            self.columns = columns[order]
            self.d = np.concatenate([distances, distances])[order]
            self.start = np.concatenate([[0], np.cumsum(self.counts)])

    def blocks(self, entries: int = 1 << 18) -> Iterator[slice]:
        """Runs of rows with about so many entries, so that what is made of them stays in cache."""
        per_row = self.n if self.dense else max(1, int(self.counts.mean()))
        step = max(1, entries // per_row)
        for first in range(0, self.n, step):
            yield slice(first, min(first + step, self.n))

    def _span(self, rows: slice) -> slice:
        return slice(self.start[rows.start], self.start[rows.stop])

    def cosines(self, q: np.ndarray, rows: slice) -> np.ndarray:
        """``<q_i, q_j>`` of the rows' entries."""
        if self.dense:
            return q[rows] @ q.T
        span = self._span(rows)
        mine = np.repeat(q[rows], self.counts[rows], axis=0)
        return np.einsum("nk,nk->n", mine, q[self.columns[span]])

    def given(self, rows: slice) -> tuple[np.ndarray, np.ndarray | float]:
        """The rows' distances and their weights: 1, or 0 where there is none."""
        if self.dense:
            return self.d[rows], self.weight[rows]
        return self.d[self._span(rows)], 1.0

    def sums(self, values: np.ndarray, table: np.ndarray, rows: slice) -> np.ndarray:
        """Sum over j of ``values_ij table_j``: (rows, k)."""
        if self.dense:
            return values @ table
        span = self._span(rows)
        start = self.start[rows.start : rows.stop + 1] - span.start
        shape = (rows.stop - rows.start, self.n)
        return scipy.sparse.csr_array((values, self.columns[span], start), shape) @ table

    def among(self, rows: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances and weights of ``rows`` to ``members``, as arrays."""
        if self.dense:
            where = np.ix_(rows, members)
            return self.d[where], self.weight[where]
        rank = np.full(self.n, -1)
        rank[members] = np.arange(len(members))
        d, weight = np.zeros((2, len(rows), len(members)))
        for k, row in enumerate(rows):
            span = slice(self.start[row], self.start[row + 1])
            at = rank[self.columns[span]]
            d[k, at[at >= 0]], weight[k, at[at >= 0]] = self.d[span][at >= 0], 1
        return d, weight

    def to(self, members: np.ndarray) -> np.ndarray:
        """How many members each item has a distance to: (n,)."""
        chosen = np.zeros((self.n, 1))
        chosen[members] = 1
        out = np.empty(self.n)
        for rows in self.blocks():
            d, weight = self.given(rows)
            out[rows] = self.sums(weight * np.ones_like(d), chosen, rows)[:, 0]
        return out


def _off(cosines: np.ndarray, d: np.ndarray) -> np.ndarray:
    """What is given minus what is induced."""
    return d - 2 * np.arccos(np.minimum(np.abs(cosines), 1))


def _pulls(
    cosines: np.ndarray, off: np.ndarray, weights: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """Squared slopes of the induced distances, and slopes times what is off, both weighted.

    ``d_q = 2 arccos |<q, p>|`` falls along ``p`` by ``2 sign<q, p> / sqrt(1 - <q, p>^2)``.
    """
    square = np.maximum(1 - cosines**2, 1e-12)
    weighted = weights / square
    return 4 * weighted, -2 * np.sign(cosines) * weighted * off * np.sqrt(square)


def _moved(q: np.ndarray, normal: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Gauss-Newton step on the sphere.

    Parameters
    ----------
    q : (n, 4) array
    normal : (n, 10) array
        Upper triangles of the sums of ``squared slope x p p^T``.
    right : (n, 4) array
        Sums of ``slope x off x p``.
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


def _search(d: np.ndarray, weight: np.ndarray, placed: np.ndarray) -> np.ndarray:
    """Place items that have fewer than :data:`ENOUGH` distances: the best of a grid, polished.

    Parameters
    ----------
    d, weight : (n, m) arrays
    placed : (m, 4) array

    Returns
    -------
    (n, 4) array
    """
    grid, starts = rotations.grid(2000), 16
    induced = rotations.distance(grid[:, None], placed)
    packed = placed[:, _ROWS] * placed[:, _COLUMNS]
    out = np.empty((len(d), 4))
    for first in range(0, len(d), 512):
        d_p, w = d[first : first + 512], weight[first : first + 512]
        costs = w @ (induced**2).T - 2 * (w * d_p) @ induced.T
        q = grid[np.argpartition(costs, starts)[:, :starts]].reshape(-1, 4)
        d_p, w = np.repeat(d_p, starts, axis=0), np.repeat(w, starts, axis=0)
        for _ in range(20):
            cosines = q @ placed.T
            slopes, pulls = _pulls(cosines, _off(cosines, d_p), w)
            q = _moved(q, slopes @ packed, pulls @ placed)
        losses = np.sum(w * _off(q @ placed.T, d_p) ** 2, axis=1).reshape(-1, starts)
        best = losses.argmin(axis=1) + starts * np.arange(len(losses))
        out[first : first + 512] = q[best]
    return out


# --------------------------------------------------------------------------------------
# Everyone


def _choose(known: _Known, landmarks: int, rng: np.random.Generator) -> np.ndarray:
    """Landmarks: those with most distances, as many as know each other or can be completed."""
    order = np.lexsort([rng.random(known.n), -known.counts])
    size, best = min(known.n, 2 * ENOUGH), None
    while True:
        members = order[:size]
        among = known.among(members, members)[1].sum(axis=1)
        if among.min() >= size - 1:
            best = members
        elif best is not None:
            return np.sort(best)
        if size == known.n or (best is None and among.min() >= 40):
            return np.sort(members)
        if best is None and size >= MOST:
            raise InputError(
                f"too few pairs to begin with: the {MOST} items with most distances have as few as "
                f"{int(among.min())} to each other, 40 are wanted; see recovery.choose_pairs"
            )
        if best is not None and size >= landmarks:
            return np.sort(best)
        size = min(known.n, 2 * size if best is None else min(landmarks, size + ENOUGH))


def _solve_members(
    d: np.ndarray, weight: np.ndarray, landmarks: int, starts: int, rng: np.random.Generator
) -> np.ndarray:
    """Orient landmarks whose distances to each other are all known, or enough to complete them."""
    m = len(d)
    s = np.where(weight > 0, np.cos(d / 2) ** 2, 0.0) + np.eye(m)
    if weight.sum() < m * (m - 1):
        s = np.clip(_complete(s, weight + np.eye(m)), 0, 1)
    full = 2 * np.arccos(np.sqrt(s))
    lowest, best = np.inf, np.zeros((m, 4))
    for _ in range(2):  # a set on which no three starts agree is drawn anew, once
        some = rng.permutation(m)[:landmarks]
        q, loss, agreed = solve_landmarks(full[np.ix_(some, some)], rng, starts=starts)
        if loss < lowest:
            lowest, best = loss, _top(s[:, some] @ np.linalg.pinv(_vectors(q)).T)
        if agreed:
            break
    return best


def _place(known: _Known, members: np.ndarray, q_members: np.ndarray) -> np.ndarray:
    """Place everyone against members of known orientation, and against each other in turn."""
    q = np.zeros((known.n, 4))
    q[members] = q_members
    placed = np.zeros(known.n, bool)
    placed[members] = True
    while not placed.all():
        members = np.flatnonzero(placed)
        count = np.where(placed, 0, known.to(members))
        ready = np.flatnonzero(count >= ENOUGH)
        few = len(ready) == 0
        if few:
            ready = np.flatnonzero(count >= FEWEST)
        if len(ready) == 0:
            raise InputError(
                f"{np.sum(~placed)} items have too few distances to those that were placed; "
                "more pairs or more landmarks are needed"
            )
        for first in range(0, len(ready), 4096):
            rows = ready[first : first + 4096]
            d, weight = known.among(rows, members)
            if few:
                q[rows] = _search(d, weight, q[members])
            else:
                right = weight * np.cos(d / 2) ** 2
                q[rows] = _top(_fit_rows(weight, right, _vectors(q[members])))
        placed[ready] = True
    return q


def _sweep(known: _Known, q: np.ndarray, cut: float) -> tuple[np.ndarray, float, np.ndarray]:
    """Every item a Gauss-Newton step against the others as they stand.

    Parameters
    ----------
    known : _Known
    q : (n, 4) array
    cut : float, radians
        Where Tukey's weights reach zero; infinite for least squares.

    Returns
    -------
    moved : (n, 4) array
    loss : float
        ``L_OR`` before the step.
    sample : (k,) array
        Absolute differences of about 10^5 of the pairs before the step.
    """
    packed = q[:, _ROWS] * q[:, _COLUMNS]
    moved, total, sample = np.empty_like(q), 0.0, []
    stride = max(1, int(known.counts.sum()) // 100_000)
    for rows in known.blocks():
        d, weight = known.given(rows)
        cosines = known.cosines(q, rows)
        off = _off(cosines, d) * weight
        total += float(np.sum(off**2))
        sample.append(np.abs(off[weight > 0] if known.dense else off)[::stride])
        if np.isfinite(cut):
            weight = weight * np.maximum(1 - (off / cut) ** 2, 0) ** 2
        slopes, pulls = _pulls(cosines, off, weight)
        moved[rows] = _moved(q[rows], known.sums(slopes, packed, rows), known.sums(pulls, q, rows))
    return moved, total / known.counts.sum(), np.concatenate(sample)


def _polish(known: _Known, q: np.ndarray, steps: int) -> tuple[np.ndarray, float]:
    """Descend ``L_OR``, then its robust form where distances are wild; (orientations, cut).

    Gaussian errors leave one in 10^5 beyond :data:`CUT` standard deviations, and clipped ones none:
    with more than one in a hundred the errors are not of one kind.
    """
    cut, best, q_best = np.inf, np.inf, q
    for _ in range(steps + 1):
        moved, loss, sample = _sweep(known, q, cut)
        sd = 1.4826 * float(np.median(sample))
        measure = np.sqrt(loss) if np.isinf(cut) else sd
        gain = (best - measure) / max(measure, 1e-12)
        if gain > 0:
            best, q_best = measure, q
        if np.isinf(cut):
            if gain < 0.05 and loss > 1e-14 and np.mean(sample > CUT * sd) > 0.01:
                cut, best = CUT * sd, np.inf
                moved = _sweep(known, q, cut)[0]
            elif gain < 5e-6 or loss < 1e-16:
                break
        elif gain < 1e-3 or sd < 1e-9:
            break
        else:
            cut = max(CUT * sd, cut / 2)  # slowly, so that the last to arrive are not left out
        q = moved
    return q_best, cut


def _outcome(known: _Known, q: np.ndarray, cut: float, landmarks: np.ndarray) -> Recovery:
    """Judge every item by its distances."""
    absolute, square, used = np.zeros((3, known.n))
    one = np.ones((known.n, 1))
    total = 0.0
    for rows in known.blocks():
        d, weight = known.given(rows)
        off = _off(known.cosines(q, rows), d) * weight
        kept = weight * (np.abs(off) < cut)
        total += float(np.sum(off**2))
        absolute[rows] = known.sums(np.abs(off), one, rows)[:, 0]
        square[rows] = known.sums(kept * off**2, one, rows)[:, 0]
        used[rows] = known.sums(kept, one, rows)[:, 0]
    residuals = absolute / known.counts
    return Recovery(
        q,
        total / float(known.counts.sum()),
        residuals,
        landmarks,
        used.astype(int),
        _expected(square, used),
        outliers(residuals),
    )


def _expected(square: np.ndarray, used: np.ndarray) -> np.ndarray:
    """:func:`error_floor` of each particle's own residuals, of which three are fitted."""
    left = np.maximum(used - 3, 1)
    return _MEAN_LENGTH * np.sqrt(3 * square / left / np.maximum(used, 1))


def recover(
    pairs: ArrayLike,
    distances: ArrayLike,
    n: int | None = None,
    *,
    seed: int = 0,
    landmarks: int = 80,
    starts: int = 64,
    polish: int = 40,
) -> Recovery:
    """Find the orientations whose distances are the given ones.

    Parameters
    ----------
    pairs : (m, 2) int array
        All, 5 % of them at random, or those of :func:`choose_pairs`. Of a pair that comes twice
        one distance may be ignored.
    distances : (m,) array, radians
        Exact, perturbed, partly wild, or learned.
    n : int, optional
        Number of items; default: the largest index + 1.
    seed : int
    landmarks : int
        How many are solved jointly, at most.
    starts : int
        Random starts of the landmarks, at most.
    polish : int
        Gauss-Newton steps on ``L_OR`` at the end, at most: they stop once it falls no more. Three
        or four do on distances with noise, thirty where some are wild.

    Returns
    -------
    Recovery

    Raises
    ------
    InputError
        Malformed pairs, or items with too few of them to be placed.
    """
    pairs, distances, n = check_pairs(pairs, distances, n)
    known = _Known(pairs, distances, n)
    rng = rotations.stream(seed, "recovery")
    if (known.counts < FEWEST).any():
        few = np.flatnonzero(known.counts < FEWEST)
        raise InputError(
            f"item {few[0]} has distances to {known.counts[few[0]]} others; {FEWEST} are needed to "
            f"place it ({len(few)} items have too few)"
        )
    graph = scipy.sparse.coo_array((np.ones(len(pairs)), tuple(pairs.T)), (n, n))
    parts = scipy.sparse.csgraph.connected_components(graph, directed=False)[0]
    if parts > 1:
        raise InputError(f"the pairs fall into {parts} sets that no pair connects; wanted one")
    chosen = _choose(known, landmarks, rng)
    q = _solve_members(*known.among(chosen, chosen), landmarks, starts, rng)
    q, cut = _polish(known, _place(known, chosen, q), polish)
    return _outcome(known, q, cut, chosen)


# --------------------------------------------------------------------------------------
# From features, one particle at a time


@dataclass(frozen=True)
class Landmarks:
    """Particles of known orientation, against which any number of others are placed.

    Attributes
    ----------
    features : (m, f) array
    quaternions : (m, 4) array, unit, xyzw
    head : {'exact', 'cosine', 'euclidean'}
        How distances come from features; see :mod:`cryoem.distances`.
    outlier_above_rad : float
        Particles with a larger residual are flagged.
    index : (m,) int array
        Which particles they are.
    symmetry : str
        The particle's point group.
    """

    features: np.ndarray
    quaternions: np.ndarray
    head: str
    outlier_above_rad: float
    index: np.ndarray
    symmetry: str = "C1"

    def place(self, features: ArrayLike, *, chunk: int = 8192) -> Recovery:
        """Laterate particles, (n, f) features: each by its own alone, ``chunk`` at once.

        A Gauss-Newton polish after it brings nothing: what is off in a learned distance is the
        particle's own feature, in all its distances alike.
        """
        features = np.asanyarray(features)
        n, m = len(features), len(self.quaternions)
        orbits = group(self.symmetry)
        known = self.quaternions.astype(np.float32)
        q, residuals, square = np.empty((n, 4)), np.empty(n), np.empty(n)
        for i in range(0, n, chunk):
            rows = slice(i, i + chunk)
            table = distances_.from_features(features[rows], self.features, self.head)
            q[rows] = laterate(table, self.quaternions, symmetry=self.symmetry)
            if orbits.order == 1:
                off = _off(q[rows].astype(np.float32) @ known.T, table)
            else:
                off = table - orbits.kernel_distance(q[rows], self.quaternions)
            residuals[rows] = np.abs(off).mean(axis=1)
            square[rows] = np.einsum("nm,nm->n", off, off)
        used = np.full(n, m)
        return Recovery(
            q,
            float(square.mean() / m) if n else 0.0,
            residuals,
            self.index,
            used,
            _expected(square, used),
            residuals > self.outlier_above_rad,
        )


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
    rng = rotations.stream(seed, "landmarks")
    index = np.sort(rng.choice(len(features), min(landmarks, len(features)), replace=False))
    chosen = features[index]
    if not np.isfinite(chosen).all():
        raise InputError("features must be finite")
    pairs = distances_.all_pairs(len(index))
    table = distances_.from_features(chosen, chosen, head)
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
    marks = find_landmarks(features, head, seed=seed, landmarks=landmarks)
    return marks.place(features, chunk=chunk)
