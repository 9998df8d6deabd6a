"""Pairs of items and their distances: what is accepted, what to measure, and the paper's loss."""

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from .. import rotations
from ..distances import all_pairs
from ..errors import InputError
from ..rotations import Seed
from .lateration import ENOUGH

__all__ = ["FEWEST", "check_pairs", "choose_pairs", "pair_loss"]

#: Known distances that place an item by search: three unknowns and a margin.
FEWEST = 6


def check_pairs(
    pairs: ArrayLike, distances: ArrayLike, n: int | None = None
) -> tuple[Int[np.ndarray, "m 2"], Float[np.ndarray, " m"], int]:
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


def choose_pairs(n: int, seed: Seed, *, core: int = 30, each: int = 8) -> Int[np.ndarray, "m 2"]:
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
            members[all_pairs(core)],
            np.stack([np.repeat(others, each), members[drawn].ravel()], axis=1),
        ]
    )


def pair_loss(quaternions: ArrayLike, pairs: ArrayLike, distances: ArrayLike) -> float:
    """``L_OR`` over the pairs, radians squared.

    Parameters
    ----------
    quaternions : (n, 4) array, unit, xyzw
    pairs : (m, 2) int array
    distances : (m,) array, radians
    """
    induced = rotations.pair_distances(np.asarray(quaternions), pairs)
    return float(np.mean((induced - np.asarray(distances)) ** 2))
