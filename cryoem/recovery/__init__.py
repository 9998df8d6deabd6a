"""Orientations from distances: landmarks, lateration, polish. The method's second step.

With ``v(q) = vec(q q^T)``, ten numbers, ``cos^2(d_q / 2) = <v(q_i), v(q_j)>``: linear in the
unknown ``v(q_i)`` once the ``q_j`` are known. A small set of landmarks is solved jointly from many
random starts by alternating this least-squares step over its members; everyone else is placed
against it in closed form (:mod:`~cryoem.recovery.lateration`); all are then polished by
Gauss-Newton steps (:mod:`~cryoem.recovery.gauss_newton`) on the paper's loss, to the optimum that
its gradient descent (:mod:`~cryoem.recovery.descent`) creeps up to.

    L_OR = mean over pairs of (d_p(p_i, p_j) - d_q(q_i, q_j))^2

Where few pairs are known, those of the landmarks are first completed: a table of ``cos^2(d / 2)``
has rank ten. Where more distances lie far off than errors of one size explain, the polish is
robust: Tukey's weights take the wild ones out.

:func:`recover` takes pairs. :func:`recover_features` takes features, never forms all pairs, and
costs the same for each particle. Distances leave all of O(4) open;
:mod:`~cryoem.recovery.frame` closes it, and :mod:`~cryoem.recovery.orienting` goes from images to
orientations.
"""

from .frame import Frame, from_copies, from_references
from .landmarks import Landmarks, find_landmarks, recover_features
from .lateration import ENOUGH, laterate
from .orienting import OrientedStack, orient
from .outcome import Recovery, error_floor, outliers
from .pairs import check_pairs, choose_pairs, pair_loss
from .placement import (
    FramedLandmarks,
    error_scale,
    landmarks_from_copies,
    landmarks_from_references,
)
from .solve import recover, solve_landmarks

__all__ = [
    "ENOUGH",
    "Frame",
    "FramedLandmarks",
    "Landmarks",
    "OrientedStack",
    "Recovery",
    "check_pairs",
    "choose_pairs",
    "error_floor",
    "error_scale",
    "find_landmarks",
    "from_copies",
    "from_references",
    "landmarks_from_copies",
    "landmarks_from_references",
    "laterate",
    "orient",
    "outliers",
    "pair_loss",
    "recover",
    "recover_features",
    "solve_landmarks",
]
