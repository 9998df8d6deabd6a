"""The frame that distances leave open, fixed without the truth.

Distances are unchanged by ``q -> a q b`` and by inversion. Only ``a`` (a rotation of the density)
and ``b = Rz(pi)`` (its mirror image) are harmless: with any other ``b``, or inverted, a
reconstruction is garbage. Two ways to fix ``b`` from what a user has:

* **Copies.** An image turned by 90 degrees in its plane has the orientation ``R Rz(90)``, its
  x-mirror ``R Ry(180)``. Recovered with the others, they give ``q_i^-1 q_i' = b^-1 rz b`` for all
  i: a constant turn about ``b^-1 z``; and the mirrors one about ``b^-1 y``, whose sign is the hand,
  which no projection can tell. If the set is inverted it is ``q_i q_i'^-1`` that is constant.
* **References.** Projections of a known density at known orientations, recovered with the others,
  fix everything.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation
from scipy.stats import norm

from .. import evaluation, rotations
from ..errors import InputError

__all__ = ["Frame", "from_copies", "from_references"]


@dataclass(frozen=True, eq=False)
class Frame:
    """How recovered orientations are brought into a frame that a reconstruction can use.

    Attributes
    ----------
    left, right : (4,) arrays
        ``q -> left (q or q^-1) right``.
    inverted : bool
        Whether the recovered set was the inverse.
    spread_rad : float
        Mean angle between what single copies say of the frame and the frame: how well it is known
        is about this over the root of the number of copies.
    other_spread_rad : float
        The same under the opposite verdict on inversion. The verdict is safe where it is much
        larger.
    confidence : float
        Probability that other copies, as good as these, would give the same verdict on inversion:
        the normal law of the mean difference of the two spreads.
    hand_known : bool
        Whether the hand is fixed too; if not, the mirror image is as good
        (:func:`cryoem.rotations.other_hand`).
    """

    left: Float[np.ndarray, "4"]
    right: Float[np.ndarray, "4"]
    inverted: bool
    spread_rad: float
    other_spread_rad: float
    confidence: float
    hand_known: bool

    @property
    def certain(self) -> bool:
        """Whether the verdict on inversion can be relied on."""
        # A single copy fits both verdicts to the last digit: it decides nothing. And copies that
        # are all alike off, as of images that show nothing, can favour one by a steady trifle.
        return self.confidence > 0.999 and self.spread_rad < 0.8 * self.other_spread_rad

    def apply(self, quaternions: ArrayLike) -> Float[np.ndarray, "n 4"]:
        """Bring recovered orientations, (n, 4), into the frame."""
        q = rotations.inverse(quaternions) if self.inverted else quaternions
        return rotations.multiply(rotations.multiply(self.left, q), self.right)


def _verdict(angles: list[Float[np.ndarray, " n"]]) -> tuple[bool, float, float, float]:
    """Verdict on inversion from how far single particles are off without and with it.

    Returns (inverted, spread, other spread, confidence).
    """
    spreads = [float(a.mean()) for a in angles]
    inverted = spreads[1] < spreads[0]
    difference = angles[not inverted] - angles[inverted]
    # What is off by less than a microradian on both sides is equal.
    error = max(float(difference.std()), 1e-6) / np.sqrt(len(difference))
    return (
        inverted,
        spreads[inverted],
        spreads[not inverted],
        float(norm.cdf(difference.mean() / error)),
    )


def _warn_unless_certain(frame: Frame) -> Frame:
    """Warn where the frame cannot be relied on."""
    if not frame.certain:
        warnings.warn(
            "the frame cannot be told: single copies or references disagree with it by "
            f"{frame.spread_rad:.2f} rad, with the opposite verdict on inversion by "
            f"{frame.other_spread_rad:.2f} rad (confidence {frame.confidence:.3f}); a "
            "reconstruction may be meaningless. More copies or less noise are needed, or an "
            "estimator that was trained on this particle",
            stacklevel=3,
        )
    return frame


def _fit_copies(
    turns: Float[np.ndarray, "n 4"], mirrors: Float[np.ndarray, "n 4"], steps: int = 20
) -> tuple[Float[np.ndarray, "4"], Float[np.ndarray, " n"]]:
    """Axes ``b^-1 z`` and ``b^-1 y`` of the copies' constant turns, robustly.

    Parameters
    ----------
    turns, mirrors : (n, 4) arrays
        From each image's orientation to those of its two copies.
    steps : int
        Of reweighted least squares: the sum of angles, not of squares, becomes least.

    Returns
    -------
    right : (4,) array
        The rotation ``b^-1``, which takes z and y to them.
    off : (n,) array, radians
        How far each image's two copies are from it, on average.
    """
    turn_matrices = Rotation.from_quat(turns).as_matrix()
    mirror_matrices = Rotation.from_quat(mirrors).as_matrix()
    w_turn, w_mirror = np.ones(len(turns)), np.ones(len(mirrors))
    right, off = Rotation.identity(), np.zeros(len(turns))
    for _ in range(steps):
        mean = np.einsum("n,nij->ij", w_turn, turn_matrices) / w_turn.sum()
        # The antisymmetric part of a turn by 90 degrees about u is [u]x.
        u = np.array([mean[2, 1] - mean[1, 2], mean[0, 2] - mean[2, 0], mean[1, 0] - mean[0, 1]])
        half = np.einsum("n,nij->ij", w_mirror, mirror_matrices) / w_mirror.sum()
        # A half-turn about v is 2 v v^T - 1.
        v = np.linalg.eigh(half + half.T)[1][:, -1]
        u /= max(np.linalg.norm(u), 1e-12)
        # The nearest orthonormal pair, each believed as much as the other.
        p, _, qt = np.linalg.svd(np.stack([v, u], axis=1), full_matrices=False)
        v, u = (p @ qt).T
        right = Rotation.from_matrix(np.stack([np.cross(v, u), v, u], axis=1))
        back = right.inv()
        turn = right * Rotation.from_euler("z", np.pi / 2) * back
        mirror = right * Rotation.from_euler("y", np.pi) * back
        off_turn = rotations.distance(turns, turn.as_quat())
        off_mirror = rotations.distance(mirrors, mirror.as_quat())
        off = (off_turn + off_mirror) / 2
        w_turn, w_mirror = 1 / np.maximum(off_turn, 1e-3), 1 / np.maximum(off_mirror, 1e-3)
    return right.as_quat(), off


def from_copies(originals: ArrayLike, turned: ArrayLike, mirrored: ArrayLike) -> Frame:
    """Fix the frame from in-plane-turned and mirrored copies, recovered with their originals.

    Parameters
    ----------
    originals : (n, 4) array
        Recovered orientations of the images that were copied.
    turned : (n, 4) array
        Of :func:`cryoem.imaging.quarter_turn` of them.
    mirrored : (n, 4) array
        Of :func:`cryoem.imaging.mirror` of them.

    Returns
    -------
    Frame
        With the hand open, ``left`` the identity.
    """
    q, t, m = (
        rotations.check(x, name)
        for x, name in ((originals, "originals"), (turned, "turned"), (mirrored, "mirrored"))
    )
    if not len(q) == len(t) == len(m) or len(q) == 0:
        raise InputError(f"wanted as many copies as originals, got {len(q)}, {len(t)}, {len(m)}")
    fits = []
    for inverted in (False, True):
        a, b, c = (rotations.inverse(x) if inverted else x for x in (q, t, m))
        back = rotations.inverse(a)
        fits.append(_fit_copies(rotations.multiply(back, b), rotations.multiply(back, c)))
    inverted, spread, other, confidence = _verdict([off for _, off in fits])
    identity, right = np.array([0.0, 0.0, 0.0, 1.0]), fits[inverted][0]
    return _warn_unless_certain(
        Frame(identity, right, inverted, spread, other, confidence, hand_known=False)
    )


def from_references(recovered: ArrayLike, known: ArrayLike) -> Frame:
    """Fix frame and hand from references of known orientation, recovered with the others.

    Parameters
    ----------
    recovered, known : (n, 4) arrays, unit, xyzw
        Of the references.

    Returns
    -------
    Frame
        ``other_spread_rad`` is that of the best fit with the opposite inversion.
    """
    known = rotations.check(known, "known")
    recovered = rotations.check(recovered, "recovered")
    fits = [
        evaluation.align(q, known, over="rotations")
        for q in (recovered, rotations.inverse(recovered))
    ]
    inverted, spread, other, confidence = _verdict(
        [rotations.distance(fit.quaternions, known) for fit in fits]
    )
    fit = fits[inverted]
    return _warn_unless_certain(
        Frame(fit.left, fit.right, inverted, spread, other, confidence, hand_known=True)
    )
