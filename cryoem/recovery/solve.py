"""From distances to orientations: landmarks jointly, everyone else against them, then a polish."""

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from .. import rotations
from ..errors import InputError
from ..rotations import Seed
from .gauss_newton import minimise_loss, residuals, search
from .lateration import ENOUGH, complete, dyads, laterate_rows, nearest_orientations
from .outcome import Recovery, expected_errors, outliers
from .pairs import FEWEST, check_pairs
from .table import DistanceTable

__all__ = ["recover", "solve_landmarks"]

#: Known distances to the other landmarks that let theirs be completed.
COMPLETABLE = 40
#: Landmarks whose distances are completed, at most: the cost is the cube of it.
MOST_COMPLETED = 3072


def solve_landmarks(
    distances: ArrayLike, seed: Seed, *, starts: int = 64, sweeps: int = 100
) -> tuple[Float[np.ndarray, "m 4"], float, bool]:
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
    distances = np.asarray(distances, np.float64)
    m = len(distances)
    if distances.shape != (m, m):
        raise InputError(f"distances must have shape (m, m), got {distances.shape}")
    if starts < 2:
        raise InputError(f"wanted at least 2 starts, got {starts}")
    others = ~np.eye(m, dtype=bool)
    s = np.where(others, np.cos(distances / 2) ** 2, 1.0)
    rng = np.random.default_rng(seed)

    def losses(q: np.ndarray) -> np.ndarray:
        differences = residuals(q @ np.swapaxes(q, -1, -2), distances)
        return np.mean(differences**2, axis=(-1, -2), where=others)

    best, found = np.zeros((m, 4)), np.zeros(0)
    agreed = False
    while not agreed and len(found) < starts // 2:
        q = rng.standard_normal((16, m, 4))
        q /= np.linalg.norm(q, axis=-1, keepdims=True)
        for sweep in range(sweeps):
            q = _laterate_each_against_others(q, s)
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


def _laterate_each_against_others(
    q: Float[np.ndarray, "starts m 4"], s: Float[np.ndarray, "m m"]
) -> Float[np.ndarray, "starts m 4"]:
    """Lateration of every member of a set, of each start, by its ``cos^2(d / 2)`` to the others.

    Normal equations for all members at once; then each is left out of its own fit by its leverage:
    its distance to itself, 0, would hold it where it is.
    """
    v = dyads(q)
    inverse = np.linalg.inv(np.swapaxes(v, -1, -2) @ v + 1e-9 * len(s) * np.eye(10))
    fit, influence = (s @ v) @ inverse, v @ inverse
    leverage = np.sum(v * influence, axis=-1, keepdims=True)
    excess = np.sum(v * fit, axis=-1, keepdims=True) - 1
    return nearest_orientations(fit + influence * excess / np.maximum(1 - leverage, 1e-6))


def _choose_landmarks(
    table: DistanceTable, landmarks: int, rng: np.random.Generator
) -> Int[np.ndarray, " m"]:
    """Choose those with most distances, as many as know each other or can be completed."""
    order = np.lexsort([rng.random(table.n), -table.counts])

    def fewest_known(size: int) -> float:
        return table.among(order[:size], order[:size])[1].sum(axis=1).min()

    size = min(table.n, 2 * ENOUGH)
    if fewest_known(size) >= size - 1:
        while size < min(table.n, landmarks):
            larger = min(table.n, landmarks, size + ENOUGH)
            if fewest_known(larger) < larger - 1:
                break
            size = larger
        return np.sort(order[:size])
    while size < table.n and (known := fewest_known(size)) < COMPLETABLE:
        if size >= MOST_COMPLETED:
            raise InputError(
                f"too few pairs to begin with: the {size} items with most distances have as few as "
                f"{int(known)} to each other, {COMPLETABLE} are wanted; see recovery.choose_pairs"
            )
        size = min(table.n, 2 * size)
    return np.sort(order[:size])


def _orient_landmarks(
    distances: Float[np.ndarray, "m m"],
    known: Float[np.ndarray, "m m"],
    landmarks: int,
    starts: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "m 4"]:
    """Orient landmarks whose distances to each other are all known, or enough to complete them."""
    m = len(distances)
    s = np.where(known > 0, np.cos(distances / 2) ** 2, 0.0) + np.eye(m)
    if known.sum() < m * (m - 1):
        s = np.clip(complete(s, known + np.eye(m)), 0, 1)
    completed = 2 * np.arccos(np.sqrt(s))
    lowest, best = np.inf, np.zeros((m, 4))
    for _ in range(2):  # a set on which no three starts agree is drawn anew, once
        some = rng.permutation(m)[:landmarks]
        q, loss, agreed = solve_landmarks(completed[np.ix_(some, some)], rng, starts=starts)
        if loss < lowest:
            lowest, best = loss, nearest_orientations(s[:, some] @ np.linalg.pinv(dyads(q)).T)
        if agreed:
            break
    return best


def _place_others(
    table: DistanceTable, landmarks: Int[np.ndarray, " m"], q_landmarks: Float[np.ndarray, "m 4"]
) -> Float[np.ndarray, "n 4"]:
    """Place everyone against landmarks of known orientation, and against each other in turn."""
    q = np.zeros((table.n, 4))
    q[landmarks] = q_landmarks
    placed = np.zeros(table.n, bool)
    placed[landmarks] = True
    while not placed.all():
        members = np.flatnonzero(placed)
        counts = np.where(placed, 0, table.counts_to(members))
        ready = np.flatnonzero(counts >= ENOUGH)
        place = laterate_rows if len(ready) else search
        if len(ready) == 0:
            ready = np.flatnonzero(counts >= FEWEST)
        if len(ready) == 0:
            raise InputError(
                f"{np.sum(~placed)} items have too few distances to those that were placed; "
                "more pairs or more landmarks are needed"
            )
        for first in range(0, len(ready), 4096):
            rows = ready[first : first + 4096]
            q[rows] = place(*table.among(rows, members), q[members])
        placed[ready] = True
    return q


def _outcome(
    table: DistanceTable, q: Float[np.ndarray, "n 4"], cut: float, landmarks: Int[np.ndarray, " m"]
) -> Recovery:
    """Judge every item by its distances."""
    absolute, squares, used = np.zeros((3, table.n))
    one = np.ones((table.n, 1))
    total = 0.0
    for rows in table.blocks():
        distances, weights = table.entries(rows)
        differences = residuals(table.cosines(q, rows), distances) * weights
        kept = weights * (np.abs(differences) < cut)
        total += float(np.sum(differences**2))
        absolute[rows] = table.sums(np.abs(differences), one, rows)[:, 0]
        squares[rows] = table.sums(kept * differences**2, one, rows)[:, 0]
        used[rows] = table.sums(kept, one, rows)[:, 0]
    residuals_rad = absolute / table.counts
    return Recovery(
        quaternions=q,
        loss=total / float(table.counts.sum()),
        residuals_rad=residuals_rad,
        landmarks=landmarks,
        used=used.astype(int),
        expected_error_rad=expected_errors(squares, used),
        outlier=outliers(residuals_rad),
    )


def _check_placeable(table: DistanceTable, pairs: Int[np.ndarray, "m 2"]) -> None:
    """Every item needs distances enough, and a chain of them to every other."""
    few = np.flatnonzero(table.counts < FEWEST)
    if len(few):
        raise InputError(
            f"item {few[0]} has distances to {table.counts[few[0]]} others; {FEWEST} are needed to "
            f"place it ({len(few)} items have too few)"
        )
    graph = scipy.sparse.coo_array((np.ones(len(pairs)), tuple(pairs.T)), (table.n, table.n))
    parts = scipy.sparse.csgraph.connected_components(graph, directed=False)[0]
    if parts > 1:
        raise InputError(f"the pairs fall into {parts} sets that no pair connects; wanted one")


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
    if landmarks < ENOUGH:
        raise InputError(f"wanted at least {ENOUGH} landmarks, got {landmarks}")
    table = DistanceTable(pairs, distances, n)
    _check_placeable(table, pairs)
    rng = rotations.generator(seed, "recovery")
    chosen = _choose_landmarks(table, landmarks, rng)
    q = _orient_landmarks(*table.among(chosen, chosen), landmarks, starts, rng)
    q, cut = minimise_loss(table, _place_others(table, chosen, q), polish)
    return _outcome(table, q, cut, chosen)
