"""One round of expectation-maximisation: where every image may lie, and the map that follows.

An image is ``y = S_t C P_R V + noise``. Of every image the likelihood of all orientations of a grid
is one row of a matrix product; its posterior weighs the image at each of them, and the map is the
least-squares solution of all that, with a ridge. References, images in work and sums are arrays of
:func:`cryoem.accelerator.arrays`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
from jaxtyping import Complex, Float, Int

from .. import accelerator
from ..projection import slice_points
from ..reconstruction import kernel_edge, least_squares
from .coarse import Coarse

__all__ = ["Expected", "Sums", "expect", "slices_of", "solve"]

#: Entries of the table of likelihoods that are held at once.
ENTRIES = 8_000_000
#: Posterior probabilities below this share of the image's largest are left out.
LEAST = 1e-3
#: Share of the table from which a matrix product is quicker than a sparse one.
SPARSE = 0.03
#: Of how many orientations, at most, shifts about the known one are tried.
TOP = 48
#: Relative accuracy of the NUFFT.
ACCURACY = 1e-3


@dataclass(frozen=True, eq=False)
class Expected:
    """Where images lie, by the references of a round.

    Attributes
    ----------
    evidence : (n,) array
        Logarithm of the likelihood, the mean over references and shifts, over an empty image's.
    reference : (n,) int array
        The most probable one,
    step : (n,) int array
        and its shift's number.
    """

    evidence: Float[np.ndarray, " n"]
    reference: Int[np.ndarray, " n"]
    step: Int[np.ndarray, " n"]


class Sums:
    """What images add to each orientation's slice: the right-hand side and its weights.

    Attributes
    ----------
    right : (r, k) complex array
    weight : (r, k) array
    """

    def __init__(self, references: int, frequencies: int) -> None:
        xp = accelerator.arrays()
        self._right = xp.zeros((references, 2 * frequencies), np.float32)
        self.weight = xp.zeros((references, frequencies), np.float32)

    @property
    def right(self) -> Complex[np.ndarray, "r k"]:
        """Sums of the images, as complex numbers."""
        return self._right.view(np.complex64)

    def of(self, rows: slice) -> Sums:
        """Those of some orientations."""
        some = object.__new__(Sums)
        some._right, some.weight = self._right[rows], self.weight[rows]
        return some

    def add(self, at: Any, images: Any) -> None:
        """Add images, (m, 2 k) real, with posterior weights (r, m), sparse or not."""
        self._right += at @ images

    def add_weights(self, at: Any, squares: Any) -> None:
        """Add squared transfer functions, (m, k), with posterior weights (r, m)."""
        self.weight += at @ squares


def slices_of(
    volume: Float[np.ndarray, "m m m"],
    frequencies: Float[np.ndarray, "k 2"],
    quaternions: Float[np.ndarray, "r 4"],
) -> Complex[np.ndarray, "r k"]:
    """Central slices of a small density."""
    xp = accelerator.arrays()
    points = slice_points(frequencies, quaternions, len(volume), xp)
    found = accelerator.nufft3d2(points, xp.asarray(volume, np.complex64), eps=ACCURACY, isign=-1)
    return found.reshape(len(quaternions), -1)


def expect(
    images: Coarse,
    gain: Float[np.ndarray, "g k"],
    offsets_px: Float[np.ndarray, "n 2"],
    references: Complex[np.ndarray, "r k"],
    steps_px: Float[np.ndarray, "s 2"],
    sums: Sums | None,
    *,
    spread_px: float,
    quick: bool,
) -> Expected:
    """Compare every image with every reference, at some shifts, and share it out among them.

    Parameters
    ----------
    images : Coarse
    gain : (g, k) array
        What whitens the noise of each optics group, at the frequencies that are used.
    offsets_px : (n, 2) array
        Where each particle has been found so far.
    references : (r, k) complex array
    steps_px : (s, 2) array
        Shifts about there that are tried, the first of them none.
    spread_px : float
        Standard deviation that shifts are expected to have along each axis.
    sums : Sums or None
        To which the images are added.
    quick : bool
        Try the shifts only at the orientations that match best without.
    """
    xp, n, used = accelerator.arrays(), len(images), gain.shape[1]
    frequencies = xp.asarray(images.slices.frequencies[:used] * (2j * np.pi / images.box_px))
    gain, steps = xp.asarray(gain), xp.asarray(steps_px)
    ramps = xp.exp(steps @ frequencies.T).astype(np.complex64)
    flat = xp.ascontiguousarray(references).view(np.float32)
    squares = (references.real**2 + references.imag**2).T.copy()
    found = Expected(np.empty(n), np.empty(n, int), np.empty(n, int))
    quick = quick and len(steps_px) > 1
    top = min(TOP, len(references)) if quick else len(references)
    at_once = max(1, ENTRIES // (len(references) * (1 if quick else len(steps_px))))
    for start in range(0, n, at_once):
        rows = slice(start, start + at_once)
        whitening = gain[xp.asarray(images.group[rows])]
        offsets = xp.asarray(offsets_px[rows])
        seen = xp.asarray(images.values[rows, :used]) * whitening
        if offsets_px.any():
            seen *= xp.exp(offsets @ frequencies.T).astype(np.complex64)
        transfer = whitening
        if images.transfer is not None:
            transfer = whitening * xp.asarray(images.transfer[rows, :used])
        seen *= transfer
        transfer = transfer**2
        lost = transfer @ squares
        lost *= 0.5
        far = xp.sum((offsets[:, None] + steps) ** 2, axis=2) / (2 * spread_px**2)
        _share(rows, seen, transfer, lost, far, flat, ramps, sums, found, top)
    return found


def _share(
    rows: slice,
    seen: Any,
    transfer: Any,
    lost: Any,
    far: Any,
    references: Any,
    ramps: Any,
    sums: Sums | None,
    found: Expected,
    each: int,
) -> None:
    """Share a chunk of images out among shifts and orientations, or the best of these for each."""
    xp = accelerator.arrays()
    m, s, r = len(seen), len(ramps), len(references)
    quick = each < r
    moved = (seen[:, None] * ramps).view(np.float32)
    if quick:
        plain = seen.view(np.float32) @ references.T
        plain -= lost
        chosen = xp.argpartition(plain, r - each, axis=1)[:, r - each :]
        likelihood = moved @ references[chosen].transpose(0, 2, 1)
        lost = xp.take_along_axis(lost, chosen, axis=1)
    else:
        chosen = xp.broadcast_to(xp.arange(r), (m, r))
        likelihood = (moved.reshape(m * s, -1) @ references.T).reshape(m, s, r)
    likelihood -= lost[:, None]
    likelihood -= far[:, :, None].astype(np.float32)
    table = likelihood.reshape(m, s * each)
    step, at = np.divmod(_normalised(rows, table, s * r, found), each)
    found.step[rows] = accelerator.host(step)
    found.reference[rows] = accelerator.host(chosen[xp.arange(m), at])
    if sums is None:
        return
    moved = moved.reshape(m * s, -1)
    image, column = xp.nonzero(table > LEAST * table.max(axis=1, keepdims=True))
    if not quick and len(image) > SPARSE * table.size:
        sums.add(likelihood.reshape(m * s, r).T, moved)
        sums.add_weights(likelihood.sum(axis=1).T, transfer)
        return
    weight = table[image, column]
    step, at = np.divmod(column, each)
    reference, matrix = chosen[image, at], accelerator.sparse().csr_matrix
    to_moved, to_image = (
        matrix((weight, (reference, number)), shape=(r, count))
        for number, count in ((image * s + step, m * s), (image, m))
    )
    sums.add(to_moved, moved)
    sums.add_weights(to_image, transfer)


def _normalised(rows: slice, table: Any, tried: int, found: Expected) -> Any:
    """Turn logarithms of likelihoods, (m, ...), into posteriors in place; the best column."""
    xp = accelerator.arrays()
    best = table.argmax(axis=1)
    top = table[xp.arange(len(table)), best]
    table -= top[:, None]
    xp.exp(table, out=table)
    total = table.sum(axis=1)
    table /= total[:, None]
    found.evidence[rows] = accelerator.host(top + xp.log(total)) - np.log(tried)
    return best


def solve(
    sums: Sums,
    frequencies: Float[np.ndarray, "k 2"],
    quaternions: Float[np.ndarray, "r 4"],
    box_px: int,
    *,
    ridge: float = 1e-2,
    iterations: int = 6,
) -> Float[np.ndarray, "m m m"]:
    """The density that the sums ask for, by least squares with a ridge.

    Parameters
    ----------
    sums : Sums
    frequencies : (k, 2) array, cycles per box
    quaternions : (r, 4) array, unit, xyzw
        Orientations of the sums.
    box_px : int
    ridge : float
        Relative to the mean weight of the frequencies that are used.
    iterations : int
        Of conjugate gradients.

    Returns
    -------
    (m, m, m) array of float32
        Zero where no image lies: a class may lose all that it had.
    """
    xp = accelerator.arrays()
    used = accelerator.host(sums.weight.any(axis=1)).nonzero()[0]
    if not len(used):
        return np.zeros((box_px,) * 3, np.float32)
    points = slice_points(frequencies, quaternions[used], box_px, xp)
    rows, wide = xp.asarray(used), (kernel_edge(box_px),) * 3
    right = accelerator.nufft3d1(
        points, sums.right[rows].ravel(), (box_px,) * 3, eps=ACCURACY, isign=+1
    )
    weight = sums.weight[rows].astype(np.complex64).ravel()
    kernel = accelerator.nufft3d1(points, weight, wide, eps=ACCURACY, isign=+1, upsampfac=1.25)
    right, kernel = accelerator.host(right.real), accelerator.host(kernel.real)
    spectrum = scipy.fft.rfftn(scipy.fft.ifftshift(kernel)).real.astype(np.float32)
    finest = np.linalg.norm(frequencies, axis=1).max()
    mean = kernel[(wide[0] // 2,) * 3] * box_px**3 / (4 / 3 * np.pi * finest**3)
    return least_squares(
        right.astype(np.float32),
        spectrum,
        ridge * mean,
        iterations=iterations,
        rtol=1e-4,
        workers=1,
    )
