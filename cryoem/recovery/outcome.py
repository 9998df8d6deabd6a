"""What a recovery says of itself: residuals, the errors that they leave, and who does not fit."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import median_abs_deviation

__all__ = ["Recovery", "error_floor", "expected_errors", "outliers"]

#: Mean length of a Gaussian vector in three dimensions over its standard deviation in each.
_MEAN_LENGTH = 2 * np.sqrt(2 / np.pi)


@dataclass(frozen=True, eq=False)
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
        :func:`cryoem.recovery.orient` scales them by what the copies show.
    outlier : (n,) bool array
        See :func:`outliers`.
    """

    quaternions: Float[np.ndarray, "n 4"]
    loss: float
    residuals_rad: Float[np.ndarray, " n"]
    landmarks: Int[np.ndarray, " m"]
    used: Int[np.ndarray, " n"]
    expected_error_rad: Float[np.ndarray, " n"]
    outlier: Bool[np.ndarray, " n"]


def outliers(residuals_rad: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Flag particles that fit far worse than most: (n,) bool array.

    Beyond the median by five standard deviations (taken from the median absolute deviation) and by
    a microradian.
    """
    spread = median_abs_deviation(residuals_rad, scale="normal")
    return residuals_rad > np.median(residuals_rad) + 5 * spread + 1e-6


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


def expected_errors(
    squares: Float[np.ndarray, " n"], used: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """:func:`error_floor` of each particle's own residuals, of which three are fitted.

    Parameters
    ----------
    squares : (n,) array
        Sum of each particle's squared residuals, radians squared.
    used : (n,) int array
        Of how many.
    """
    variance = squares / np.maximum(used - 3, 1)
    return _MEAN_LENGTH * np.sqrt(3 * variance / np.maximum(used, 1))
