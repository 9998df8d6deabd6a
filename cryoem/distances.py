"""Distances between projections: from features, from pixels, and how good they are.

Three ways from unit features ``f`` to a distance in [0, pi]:

* ``exact``: ``d = arccos(2 <f_i, f_j> - 1)``. As ``cos^2(d_q / 2) = <q_i, q_j>^2`` is the inner
  product of ``vec(q_i q_i^T)`` and ``vec(q_j q_j^T)``, ten numbers represent every set of
  orientations without error.
* ``cosine``: ``d = 2 arccos <f_i, f_j>``, the paper's.
* ``euclidean``: ``d = |f_i - f_j|`` of features that are not normalised, the paper's other.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from .errors import InputError
from .rotations import Seed

__all__ = [
    "HEADS",
    "DistanceErrors",
    "all_pairs",
    "compare",
    "from_features",
    "image_distance",
    "sample_pairs",
]

HEADS = ("exact", "cosine", "euclidean")


def from_features(
    features: ArrayLike, others: ArrayLike, head: str = "exact"
) -> Float[np.ndarray, "n m"]:
    """Distances between two sets of features.

    Parameters
    ----------
    features : (n, f) array
    others : (m, f) array
    head : {'exact', 'cosine', 'euclidean'}

    Returns
    -------
    (n, m) float32 array, radians
    """
    if head not in HEADS:
        raise InputError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    f, g = np.asarray(features, np.float32), np.asarray(others, np.float32)
    product = f @ g.T
    if head == "euclidean":
        square = (f**2).sum(1)[:, None] + (g**2).sum(1) - 2 * product
        return np.minimum(np.sqrt(np.maximum(square, 0)), np.float32(np.pi))
    if head == "cosine":
        return 2 * np.arccos(np.clip(product, 0, 1))
    return np.arccos(np.clip(2 * product - 1, -1, 1))


def all_pairs(n: int) -> Int[np.ndarray, "m 2"]:
    """Every pair i < j: an (n (n - 1) / 2, 2) int array."""
    return np.stack(np.triu_indices(n, 1), axis=1)


def sample_pairs(n: int, m: int, seed: Seed) -> Int[np.ndarray, "m 2"]:
    """``m`` random pairs (i, j), i != j, of ``n`` items, with replacement: an (m, 2) int array."""
    if n < 2:
        raise InputError(f"pairs need at least two items, got {n}")
    rng = np.random.default_rng(seed)
    i = rng.integers(n, size=m)
    j = (i + rng.integers(1, n, size=m)) % n
    return np.stack([i, j], axis=1)


def image_distance(images: np.ndarray, pairs: np.ndarray) -> Float[np.ndarray, " m"]:
    """Euclidean distance between images, the paper's baseline: (m,) array, no unit.

    Parameters
    ----------
    images : (n, size, size) array
    pairs : (m, 2) int array
    """
    flat = np.asarray(images, np.float32).reshape(len(images), -1)
    out = np.empty(len(pairs), np.float32)
    for i in range(0, len(pairs), 4096):
        a, b = np.asarray(pairs[i : i + 4096]).T
        out[i : i + 4096] = np.linalg.norm(flat[a] - flat[b], axis=1)
    return out


@dataclass(frozen=True)
class DistanceErrors:
    """How far estimated distances are from the true ones.

    Attributes
    ----------
    loss : float
        The paper's ``L_DE``, mean squared error, radians squared.
    mae_rad : float
        Mean absolute error.
    mae_small_rad, mae_middle_rad, mae_large_rad : float
        The same by true distance: the thirds of [0, pi].
    """

    loss: float
    mae_rad: float
    mae_small_rad: float
    mae_middle_rad: float
    mae_large_rad: float


def compare(estimated: ArrayLike, true: ArrayLike) -> DistanceErrors:
    """Compare estimated with true distances, (m,) arrays in radians: :class:`DistanceErrors`."""
    estimated, true = np.asarray(estimated, float), np.asarray(true, float)
    if estimated.shape != true.shape or estimated.ndim != 1 or len(true) == 0:
        raise InputError(
            f"wanted two (m,) arrays of distances, got {estimated.shape} and {true.shape}"
        )
    off = np.abs(estimated - true)
    if not np.isfinite(off).all():
        raise InputError(f"distances must be finite: {np.sum(~np.isfinite(off))} pairs are not")
    third = np.minimum((true / (np.pi / 3)).astype(int), 2)
    by_third = [float(off[third == k].mean()) if (third == k).any() else np.nan for k in range(3)]
    return DistanceErrors(float(np.mean(off**2)), float(off.mean()), *by_third)
