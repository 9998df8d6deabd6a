"""The known distances of each item: an array where many are known, sparse where few are."""

from collections.abc import Iterator

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

__all__ = ["DistanceTable"]


class DistanceTable:
    """The known distances of each item, symmetric.

    Parameters
    ----------
    pairs, distances, n
        Of :func:`cryoem.recovery.check_pairs`.

    Attributes
    ----------
    n : int
        Number of items.
    counts : (n,) int array
        How many distances each item has.
    dense : bool
        Kept as an array, not sparse.
    """

    def __init__(
        self, pairs: Int[np.ndarray, "m 2"], distances: Float[np.ndarray, " m"], n: int
    ) -> None:
        i, j = pairs.T
        self.n = n
        self.dense = n * n <= max(4 * 2 * len(pairs), 4_000_000)
        if self.dense:
            self._distances = np.zeros((n, n))
            self._weights = np.zeros((n, n))
            self._distances[i, j] = self._distances[j, i] = distances
            self._weights[i, j] = self._weights[j, i] = 1
            self.counts = np.count_nonzero(self._weights, axis=1)
        else:
            self.counts = np.bincount(pairs.ravel(), minlength=n)
            rows, columns = np.concatenate([i, j]), np.concatenate([j, i])
            order = np.argsort(rows, kind="stable")
            self._columns = columns[order]
            self._distances = np.concatenate([distances, distances])[order]
            self._starts = np.concatenate([[0], np.cumsum(self.counts)])

    def blocks(self, entries: int = 1 << 18) -> Iterator[slice]:
        """Runs of rows with about so many entries, so that what is made of them stays in cache."""
        per_row = self.n if self.dense else max(1, int(self.counts.mean()))
        step = max(1, entries // per_row)
        for first in range(0, self.n, step):
            yield slice(first, min(first + step, self.n))

    def _span(self, rows: slice) -> slice:
        return slice(self._starts[rows.start], self._starts[rows.stop])

    def cosines(self, q: Float[np.ndarray, "n 4"], rows: slice) -> np.ndarray:
        """``<q_i, q_j>`` of the rows' entries."""
        if self.dense:
            return q[rows] @ q.T
        own = np.repeat(q[rows], self.counts[rows], axis=0)
        return np.einsum("nk,nk->n", own, q[self._columns[self._span(rows)]])

    def entries(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """The rows' distances and their weights, 1, or 0 where there is none."""
        if self.dense:
            return self._distances[rows], self._weights[rows]
        distances = self._distances[self._span(rows)]
        return distances, np.ones_like(distances)

    def sums(
        self, values: np.ndarray, table: Float[np.ndarray, "n k"], rows: slice
    ) -> Float[np.ndarray, "r k"]:
        """Sum over j of ``values_ij table_j``: (rows, k)."""
        if self.dense:
            return values @ table
        span = self._span(rows)
        starts = self._starts[rows.start : rows.stop + 1] - span.start
        shape = (rows.stop - rows.start, self.n)
        return scipy.sparse.csr_array((values, self._columns[span], starts), shape) @ table

    def among(
        self, rows: Int[np.ndarray, " r"], members: Int[np.ndarray, " m"]
    ) -> tuple[Float[np.ndarray, "r m"], Float[np.ndarray, "r m"]]:
        """Distances and weights of ``rows`` to ``members``, as arrays."""
        if self.dense:
            where = np.ix_(rows, members)
            return self._distances[where], self._weights[where]
        rank = np.full(self.n, -1)
        rank[members] = np.arange(len(members))
        distances, weights = np.zeros((2, len(rows), len(members)))
        for k, row in enumerate(rows):
            span = self._span(slice(row, row + 1))
            at = rank[self._columns[span]]
            distances[k, at[at >= 0]] = self._distances[span][at >= 0]
            weights[k, at[at >= 0]] = 1
        return distances, weights

    def counts_to(self, members: Int[np.ndarray, " m"]) -> Float[np.ndarray, " n"]:
        """How many members each item has a distance to: (n,)."""
        chosen = np.zeros((self.n, 1))
        chosen[members] = 1
        out = np.empty(self.n)
        for rows in self.blocks():
            _, weights = self.entries(rows)
            out[rows] = self.sums(weights, chosen, rows)[:, 0]
        return out
