"""Orientations as unit quaternions: sampling, distances and conversions.

The convention is in the package's docstring. Composition and conversion are SciPy's ``Rotation``;
what stands here is what the method needs beyond it.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation

from .errors import InputError

__all__ = [
    "COVERAGES",
    "RELION_ANGLES",
    "about",
    "check",
    "distance",
    "from_relion",
    "generator",
    "grid",
    "in_plane",
    "inverse",
    "mirror_x",
    "multiply",
    "other_hand",
    "pair_distances",
    "perturb",
    "preferred",
    "sample",
    "to_relion",
    "uniform",
    "view_directions",
]

#: What randomness may be given as.
Seed = int | Sequence[int] | np.random.Generator


def generator(seed: Seed, use: str) -> np.random.Generator:
    """Return the generator of one use of a seed, independent of its other uses.

    Without it two uses of one seed draw the same numbers: "random" orientations would be the true
    ones wherever the two were made with the same seed. A generator is returned as it is.
    """
    if isinstance(seed, np.random.Generator):
        return seed
    if np.min(seed, initial=0) < 0:
        raise InputError(f"seed must not be negative, got {seed}")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=tuple(use.encode())))


def check(quaternions: ArrayLike, name: str = "quaternions") -> Float[np.ndarray, "n 4"]:
    """Return ``quaternions`` as an (n, 4) float64 array, or say what is wrong with them.

    Parameters
    ----------
    quaternions : (n, 4) array_like, unit, xyzw
    name : str
        How the error calls them.

    Raises
    ------
    InputError
        Wrong shape, not finite, or a norm that is off 1 by more than 1e-3.
    """
    q = np.asarray(quaternions, dtype=np.float64)
    if q.ndim != 2 or q.shape[1] != 4:
        raise InputError(
            f"{name} must have shape (n, 4), xyzw, got {q.shape}; "
            "for RELION's angles see rotations.from_relion"
        )
    norms = np.linalg.norm(q, axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))  # NaN fails the comparison
    if len(bad):
        raise InputError(
            f"{name} must be unit: row {bad[0]} has norm {norms[bad[0]]:.4g} "
            f"({len(bad)} of {len(q)} rows are off)"
        )
    return q / norms[:, None]


# --------------------------------------------------------------------------------------
# The group


def multiply(q: ArrayLike, p: ArrayLike) -> Float[np.ndarray, "*n 4"]:
    """Compose ``q p`` (first ``p``, then ``q``); (n, 4) or (4,), broadcast over rows."""
    q, p = np.asarray(q, dtype=np.float64), np.asarray(p, dtype=np.float64)
    qv, qw, pv, pw = q[..., :3], q[..., 3:], p[..., :3], p[..., 3:]
    vector = qw * pv + pw * qv + np.cross(qv, pv)
    scalar = qw * pw - np.sum(qv * pv, axis=-1, keepdims=True)
    return np.concatenate([vector, scalar], axis=-1)


def inverse(q: ArrayLike) -> Float[np.ndarray, "*n 4"]:
    """Return the conjugate of unit quaternions, (..., 4)."""
    return np.asarray(q, dtype=np.float64) * np.array([-1.0, -1.0, -1.0, 1.0])


def about(axis: Literal["x", "y", "z"], angle: ArrayLike) -> Float[np.ndarray, "*n 4"]:
    """Return the quaternion(s) of a turn by ``angle`` radians about ``axis`` ('x', 'y' or 'z').

    Parameters
    ----------
    axis : {'x', 'y', 'z'}
    angle : float or (n,) array, radians

    Returns
    -------
    (4,) or (n, 4) array
    """
    angle = np.asarray(angle, dtype=np.float64)
    return Rotation.from_euler(axis, angle[..., None] if angle.ndim else angle).as_quat()


def in_plane(q: ArrayLike, angle: ArrayLike) -> Float[np.ndarray, "*n 4"]:
    """Orientation of the image turned in its plane by ``angle`` radians: ``R Rz(angle)``."""
    return multiply(q, about("z", angle))


def mirror_x(q: ArrayLike) -> Float[np.ndarray, "*n 4"]:
    """Orientation of the mirrored image ``P(-x, y)``, the view from behind: ``R Ry(pi)``."""
    return multiply(q, about("y", np.pi))


def other_hand(q: ArrayLike) -> Float[np.ndarray, "*n 4"]:
    """Orientations at which the mirror image of the density gives the same images: ``R Rz(pi)``."""
    return multiply(q, about("z", np.pi))


def view_directions(q: ArrayLike) -> Float[np.ndarray, "n 3"]:
    """Viewing directions in the density's frame, ``R z``: (n, 3) unit vectors."""
    return Rotation.from_quat(q).apply([0.0, 0.0, 1.0])


# --------------------------------------------------------------------------------------
# The distance of the paper


def distance(q: ArrayLike, p: ArrayLike) -> Float[np.ndarray, "*n"]:
    """Geodesic distance ``d_q = 2 arccos |<q, p>|`` between orientations, in [0, pi].

    Evaluated as ``4 atan2(|p - s q|, |p + s q|)`` with ``s`` the sign of ``<q, p>``, which is exact
    to machine precision at both ends, where the arccosine loses half of the digits.

    Parameters
    ----------
    q, p : (..., 4) arrays, unit, xyzw
        Broadcast against each other.

    Returns
    -------
    (...) array, radians

    References
    ----------
    Banjac et al., arXiv 2104.06237, section 2.1.
    """
    q, p = np.asarray(q, dtype=np.float64), np.asarray(p, dtype=np.float64)
    s = np.where(np.sum(q * p, axis=-1, keepdims=True) < 0, -1.0, 1.0)
    return 4 * np.arctan2(np.linalg.norm(p - s * q, axis=-1), np.linalg.norm(p + s * q, axis=-1))


def pair_distances(q: np.ndarray, pairs: ArrayLike) -> Float[np.ndarray, " m"]:
    """Distances of the pairs ``pairs``, an (m, 2) array of indices into ``q``; (m,), radians."""
    pairs = np.asarray(pairs)
    return distance(q[pairs[:, 0]], q[pairs[:, 1]])


# --------------------------------------------------------------------------------------
# Sampling


def uniform(n: int, seed: Seed) -> Float[np.ndarray, "n 4"]:
    """Uniform random orientations on SO(3).

    Parameters
    ----------
    n : int
    seed : int or numpy.random.Generator

    Returns
    -------
    (n, 4) array, unit, xyzw
    """
    q = np.random.default_rng(seed).standard_normal((n, 4))
    return q / np.linalg.norm(q, axis=1, keepdims=True)


def _from_angles(rot: np.ndarray, tilt: np.ndarray, psi: np.ndarray) -> np.ndarray:
    return Rotation.from_euler("ZYZ", np.stack([rot, tilt, psi], axis=-1)).as_quat()


def _directions(
    n: int,
    rng: np.random.Generator,
    rot_range: tuple[float, float],
    tilt_range: tuple[float, float],
    euler: bool = False,
) -> Float[np.ndarray, "n 4"]:
    rot = rng.uniform(*rot_range, n)
    low, high = tilt_range
    tilt = (
        rng.uniform(low, high, n) if euler else np.arccos(rng.uniform(np.cos(high), np.cos(low), n))
    )
    return _from_angles(rot, tilt, rng.uniform(0, 2 * np.pi, n))


def preferred(
    n: int,
    seed: Seed,
    *,
    axis: ArrayLike = (0.0, 0.0, 1.0),
    half_angle: float = np.pi / 6,
    fraction: float = 0.9,
) -> Float[np.ndarray, "n 4"]:
    """Orientations with a preferred direction: most views lie in a cone about ``axis``.

    Parameters
    ----------
    n : int
    seed : int or numpy.random.Generator
    axis : (3,) array_like
        The preferred viewing direction in the density's frame.
    half_angle : float, radians
    fraction : float in [0, 1]
        The share of views in the cone; the others are uniform on the whole sphere.

    Returns
    -------
    (n, 4) array, unit, xyzw
    """
    if not 0 <= fraction <= 1:
        raise InputError(f"fraction must lie in [0, 1], got {fraction}")
    rng = np.random.default_rng(seed)
    tilt_max = np.where(rng.random(n) < fraction, half_angle, np.pi)
    tilt = np.arccos(rng.uniform(np.cos(tilt_max), 1.0))
    q = _from_angles(rng.uniform(0, 2 * np.pi, n), tilt, rng.uniform(0, 2 * np.pi, n))
    to_axis, _ = Rotation.align_vectors([axis], [[0.0, 0.0, 1.0]])
    return multiply(to_axis.as_quat(), q)


_TURN, _HALF = (0.0, 2 * np.pi), (0.0, np.pi)

#: How views can be spread: the named choices of :func:`sample`.
COVERAGES: dict[str, Callable[[int, Seed], np.ndarray]] = {
    "uniform": uniform,
    "euler": lambda n, seed: _directions(n, np.random.default_rng(seed), _TURN, _HALF, euler=True),
    "half": lambda n, seed: _directions(n, np.random.default_rng(seed), _TURN, (0, np.pi / 2)),
    "quarter": lambda n, seed: _directions(n, np.random.default_rng(seed), _HALF, (0, np.pi / 2)),
    "preferred": preferred,
}


def sample(
    n: int, seed: Seed, coverage: str = "uniform", *, tilt_range: tuple[float, float] | None = None
) -> Float[np.ndarray, "n 4"]:
    """Random orientations with a given coverage of the viewing directions.

    Parameters
    ----------
    n : int
    seed : int or numpy.random.Generator
    coverage : str
        ``"uniform"`` on SO(3); ``"euler"``, uniform in the three angles (denser at the poles, as in
        the paper); ``"half"`` and ``"quarter"`` of the directions, uniform within; ``"preferred"``,
        90 % within 30 degrees of z (see :func:`preferred`).
    tilt_range : (low, high), radians, optional
        Uniform on the band of directions with this tilt; excludes ``coverage``.

    Returns
    -------
    (n, 4) array, unit, xyzw
    """
    if n < 0:
        raise InputError(f"n must not be negative, got {n}")
    if tilt_range is not None:
        low, high = tilt_range
        if coverage != "uniform" or not 0 <= low < high <= np.pi:
            raise InputError(
                "tilt_range must be (low, high) within [0, pi] and comes without a coverage, "
                f"got {tilt_range} and coverage {coverage!r}"
            )
        return _directions(n, np.random.default_rng(seed), _TURN, tilt_range)
    if coverage not in COVERAGES:
        raise InputError(f"coverage must be one of {', '.join(COVERAGES)}, got {coverage!r}")
    return COVERAGES[coverage](n, seed)


def grid(n: int) -> Float[np.ndarray, "n 4"]:
    """``n`` orientations spread evenly over SO(3): a super-Fibonacci spiral, deterministic.

    Returns
    -------
    (n, 4) array, unit, xyzw

    References
    ----------
    Alexa, "Super-Fibonacci Spirals", CVPR 2022.
    """
    phi, psi = np.sqrt(2.0), 1.533751168755204288118041  # psi^4 = psi + 4
    s = np.arange(n) + 0.5
    t = s / n
    alpha, beta = 2 * np.pi * s / phi, 2 * np.pi * s / psi
    r, big_r = np.sqrt(t), np.sqrt(1 - t)
    return np.stack(
        [r * np.sin(alpha), r * np.cos(alpha), big_r * np.sin(beta), big_r * np.cos(beta)], axis=1
    )


def perturb(q: ArrayLike, rotation_vectors: ArrayLike) -> Float[np.ndarray, "*n 4"]:
    """Turn each orientation by a small rotation vector of its own, in the detector's frame.

    ``R exp([w])``: the third component of ``w`` is an in-plane turn.

    Parameters
    ----------
    q : (n, 4) array, unit, xyzw
    rotation_vectors : (n, 3) array, radians
    """
    return multiply(q, Rotation.from_rotvec(rotation_vectors).as_quat())


# --------------------------------------------------------------------------------------
# RELION's angles

#: Their names in STAR files, in the order of :func:`from_relion`.
RELION_ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")


def from_relion(rot: ArrayLike, tilt: ArrayLike, psi: ArrayLike) -> Float[np.ndarray, "n 4"]:
    """Quaternions of RELION's angles ``rlnAngleRot``, ``rlnAngleTilt``, ``rlnAnglePsi``, degrees.

    Parameters
    ----------
    rot, tilt, psi : (n,) arrays, degrees

    Returns
    -------
    (n, 4) array, unit, xyzw
    """
    angles = np.stack(np.broadcast_arrays(rot, tilt, psi), axis=-1).astype(np.float64)
    if not np.isfinite(angles).all():
        raise InputError("RELION angles must be finite")
    return Rotation.from_euler("ZYZ", angles, degrees=True).as_quat().reshape(-1, 4)


def to_relion(q: ArrayLike) -> Float[np.ndarray, "n 3"]:
    """RELION's angles of quaternions: an (n, 3) array of rot, tilt, psi in degrees.

    At tilt 0 and 180 only one combination of rot and psi is defined; rot takes all of it or psi is
    0, as SciPy chooses, and the orientation is the same.
    """
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Gimbal lock")
        return Rotation.from_quat(q).as_euler("ZYZ", degrees=True).reshape(-1, 3)
