"""What training minimises: how far the distances of a batch's pairs are off.

Both sides of a pair share one encoder, so a batch of ``n`` images is embedded once and all its
``n (n - 1) / 2`` pairs are compared.
"""

from __future__ import annotations

import functools
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float

from ..backend import keras
from ..symmetry import group
from .networks import Tensor

__all__ = ["Objective", "PairLoss", "Pairs", "pair_distances"]

ops = keras.ops

#: Which pairs of a batch are compared.
Pairs: TypeAlias = Literal["all", "uniform"]


def pair_distances(features: Float[Tensor, "n f"], head: str) -> Float[Tensor, "n n"]:
    """Distances of all pairs of a batch in the backend's tensors, with finite gradients.

    The NumPy twin is :func:`cryoem.distances.from_features`; here the arguments of the arccosines
    and of the root are clipped, so that neither the diagonal nor coinciding or opposite features
    give infinite gradients.

    Parameters
    ----------
    features : (n, f) tensor
    head : {'exact', 'cosine', 'euclidean'}

    Returns
    -------
    (n, n) tensor, radians
    """
    product = ops.matmul(features, ops.transpose(features))
    if head == "euclidean":
        square = ops.sum(features**2, axis=1)
        return ops.sqrt(ops.maximum(square[:, None] + square - 2 * product, 1e-6))
    if head == "cosine":
        return 2 * ops.arccos(ops.clip(product, -1 + 1e-6, 1 - 1e-6))
    return ops.arccos(ops.clip(2 * product - 1, -1 + 1e-6, 1 - 1e-6))


@functools.cache
def _evening(symmetry: str) -> Float[np.ndarray, " bins"]:
    """The weights of distances, in bins: a second's work."""
    return group(symmetry).inverse_density(64).astype(np.float32)


class PairLoss(keras.losses.Loss):
    """``L_DE``: weighted mean of ``(d_p - d)^2`` over the pairs of a batch.

    The true distance ``d`` is the kernel distance of the group's features, which is ``d_q`` for a
    particle without symmetry.

    Parameters
    ----------
    head : {'exact', 'cosine', 'euclidean'}
    pairs : {'all', 'uniform'}
        All pairs i < j, each weighted by the inverse density of its distance under uniform
        orientations (``1 / sin^2(d_q / 2)`` without symmetry), capped; or, as the paper, the
        consecutive pairs (0, 1), (2, 3), ..., drawn uniform in distance, with equal weight.
    symmetry : str
    noise_weight : float
        A pair counts by ``1 / (1 + noise_weight (r_i + r_j) / 2)`` of its images' noise-to-signal
        ratios: at 1 the noisiest, which are off whatever one does, do not drown the others.
    """

    def __init__(
        self,
        head: str,
        pairs: Pairs = "all",
        *,
        symmetry: str = "C1",
        noise_weight: float = 0.0,
        name: str = "pair_loss",
    ) -> None:
        super().__init__(name=name)
        self.head, self.pairs, self.noise_weight = head, pairs, noise_weight
        self.group = group(symmetry)
        self.table = _evening(symmetry)

    def compare(
        self, targets: Float[Tensor, "n t"], features: Float[Tensor, "n f"]
    ) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
        """Weights and errors ``d_p - d`` of all pairs of a batch, two (n, n) tensors."""
        f = len(self.group.harmonics)
        d = pair_distances(targets[:, :f], "exact")
        n = ops.shape(d)[0]
        i = ops.arange(n)
        if self.pairs == "all":
            bins = ops.cast(d * (len(self.table) / (np.pi + 1e-3)), "int32")
            weights = ops.cast(i[:, None] < i, "float32") * ops.take(self.table, bins)
        else:
            weights = ops.cast((i[:, None] % 2 == 0) & (i[:, None] + 1 == i), "float32")
        if self.noise_weight:
            ratio = self.noise_weight * targets[:, f] / 2
            weights = weights / (1 + ratio[:, None] + ratio)
        return weights / ops.sum(weights), pair_distances(features, self.head) - d

    def call(self, y_true: Float[Tensor, "n t"], y_pred: Float[Tensor, "n f"]) -> Float[Tensor, ""]:
        """Compare targets, of which the first are the group's features, with features."""
        weights, off = self.compare(y_true, y_pred)
        return ops.sum(weights * off**2)


class Objective(keras.losses.Loss):
    """What training minimises: ``L_DE``, and, where a shift is predicted, how far off that is.

    The shift counts by a tenth of its squared error, in pixels of what the network reads.

    Parameters
    ----------
    loss : PairLoss
    feature_dim : int
    """

    def __init__(self, loss: PairLoss, feature_dim: int) -> None:
        super().__init__(name="objective")
        self.loss, self.feature_dim = loss, feature_dim

    def call(
        self, y_true: Float[Tensor, "n t"], y_pred: Float[Tensor, "n out"]
    ) -> Float[Tensor, ""]:
        """Compare targets, (n, f + 3), with what the encoder gives, (n, f') or (n, f' + 3)."""
        f = self.feature_dim
        total = self.loss.call(y_true, y_pred[:, :f])
        if y_pred.shape[1] == f:
            return total
        shift = ops.mean(ops.sum((y_pred[:, f : f + 2] - y_true[:, -2:]) ** 2, axis=1))
        return total + 0.1 * shift

    def mae_rad(
        self, y_true: Float[Tensor, "n t"], y_pred: Float[Tensor, "n out"]
    ) -> Float[Tensor, ""]:
        """Mean absolute error of the distances, weighted as the loss is: a metric."""
        weights, off = self.loss.compare(y_true, y_pred[:, : self.feature_dim])
        return ops.sum(weights * ops.abs(off))
