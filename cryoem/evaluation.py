"""How good orientations are: alignment in closed form, errors, the random zero and the limit.

Distances are unchanged by ``q -> a q b`` and by inversion ``q -> q^-1``: all of O(4). The paper's
``E_OR`` fits all of it. A reconstruction forgives only ``a``, a rotation of the density, and
``b = Rz(pi)``, its mirror image; that error is called one-sided here.
"""

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from . import imaging, rotations
from .density import Density
from .errors import InputError
from .noise import Noise
from .projection import Projector
from .rotations import Seed
from .symmetry import Group, group

__all__ = [
    "Alignment",
    "OrientationErrors",
    "align",
    "cramer_rao",
    "mean_error_of",
    "orientation_errors",
    "random_error",
]


@dataclass(frozen=True)
class Alignment:
    """What was fitted to lay estimated orientations onto the true ones.

    Attributes
    ----------
    quaternions : (n, 4) array
        The aligned estimate.
    left, right : (4,) arrays
        ``aligned = left (q or q^-1) right``.
    inverted : bool
        Whether the inverse was taken first.
    """

    quaternions: Float[np.ndarray, "n 4"]
    left: Float[np.ndarray, " 4"]
    right: Float[np.ndarray, " 4"]
    inverted: bool


def _weights(angles: np.ndarray) -> np.ndarray:
    """Weights that turn a sum of squares into the mean angle (reweighted least squares)."""
    return 1 / np.sqrt(angles**2 + 1e-6)


def _fit_left(q: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The rotation ``a`` that maximises ``sum w <a q, p>^2``: an eigenvector of a 4 x 4 matrix."""
    # <a q, p> = <a, p q^-1>
    ratio = rotations.multiply(p, rotations.inverse(q))
    return np.linalg.eigh((ratio * weights[:, None]).T @ ratio)[1][:, -1]


def _first_left(q: np.ndarray, p: np.ndarray, orbit: Group) -> np.ndarray:
    """Where to start the fit of a left rotation: without symmetry its least squares.

    With symmetry no closed form: of the rotations that lay one of some images exactly, the one that
    lays all nearest. Onto which element of its orbit does not matter: then all lie on others.
    """
    if orbit.order == 1:
        return _fit_left(q, p, np.ones(len(q)))
    some = slice(0, 400)
    lefts = rotations.multiply(p[:60], rotations.inverse(q[:60]))
    off = [orbit.distance(rotations.multiply(a, q[some]), p[some]).mean() for a in lefts]
    return lefts[int(np.argmin(off))]


def _turns(q: np.ndarray, p: np.ndarray, proper: bool, steps: int = 30) -> np.ndarray:
    """The 4 x 4 rotation (or any orthogonal matrix) that minimises the mean angle to ``p``."""

    def nearest(m: np.ndarray) -> np.ndarray:
        u, _, vt = np.linalg.svd(m)
        if proper and np.linalg.det(u @ vt) < 0:
            u[:, -1] *= -1
        return u @ vt

    # <M q, p>^2 is quadratic in vec(M): its top eigenvector is near enough to start from.
    outer = (p[:, :, None] * q[:, None, :]).reshape(-1, 16)
    matrix = nearest(np.linalg.eigh(outer.T @ outer)[1][:, -1].reshape(4, 4))
    for _ in range(steps):
        moved = q @ matrix.T
        sign = np.sign(np.sum(moved * p, axis=1))
        w = _weights(rotations.distance(moved, p))
        matrix = nearest(((w * sign)[:, None] * p).T @ q)
    return matrix


def _split(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write a 4 x 4 rotation as ``q -> left q right``: a table of rank one."""
    table = np.empty((4, 4))
    for a, left in enumerate(np.eye(4)):
        for b, right in enumerate(np.eye(4)):
            turned = rotations.multiply(rotations.multiply(left, np.eye(4)), right)
            table[a, b] = np.sum(turned.T * matrix) / 4
    u, _, vt = np.linalg.svd(table)
    return u[:, 0], vt[0]


def align(
    estimated: ArrayLike,
    true: ArrayLike,
    *,
    over: Literal["o4", "rotations", "one-sided", "none"] = "o4",
    symmetry: str = "C1",
) -> Alignment:
    """Lay estimated orientations onto the true ones, in closed form.

    The top eigenvector of ``sum vec(q_i p_i^T) vec(q_i p_i^T)^T``, projected to O(4), starts a few
    reweighted Procrustes steps that minimise the mean angle. Deterministic.

    Parameters
    ----------
    estimated, true : (n, 4) arrays, unit, xyzw
    over : {'o4', 'rotations', 'one-sided', 'none'}
        ``'o4'``: everything that distances leave open (the paper's alignment); ``'rotations'``:
        the same without inversion;
        ``'one-sided'``: a rotation of the density and its hand (what a map forgives);
        ``'none'``: nothing.
    symmetry : str
        The particle's point group, under which of each estimate the nearest of its orbit counts;
        with ``'one-sided'`` and ``'none'`` only, as distances of orbits are not unchanged by O(4).

    Returns
    -------
    Alignment
    """
    q, p = rotations.check(estimated, "estimated"), rotations.check(true, "true")
    if len(q) != len(p) or len(q) == 0:
        raise InputError(
            f"wanted as many true as estimated, at least one; got {len(p)} and {len(q)}"
        )
    orbit = group(symmetry)
    if over in ("o4", "rotations") and orbit.order > 1:
        raise InputError(f"orientations up to {orbit.name} are not laid over by {over!r}")
    one = np.array([0.0, 0.0, 0.0, 1.0])
    if over == "none":
        return Alignment(orbit.nearest(q, p), one, one, False)
    if over == "one-sided":
        best: Alignment | None = None
        smallest = np.inf
        for right in (one, rotations.about("z", np.pi)):
            turned = rotations.multiply(q, right)
            left = _first_left(turned, p, orbit)
            for _ in range(30):
                moved = rotations.multiply(left, turned)
                near = orbit.nearest(p, moved)
                left = _fit_left(turned, near, _weights(rotations.distance(moved, near)))
            moved = orbit.nearest(rotations.multiply(left, turned), p)
            error = rotations.distance(moved, p).mean()
            if best is None or error < smallest:
                best, smallest = Alignment(moved, left, right, False), error
        assert best is not None
        return best
    if over in ("o4", "rotations"):
        matrix = _turns(q, p, proper=over == "rotations")
        inverted = bool(np.linalg.det(matrix) < 0)
        q = rotations.inverse(q) if inverted else q
        # Inversion is diag(-1, -1, -1, 1) on (x, y, z, w).
        left, right = _split(matrix * rotations.inverse(np.ones(4)) if inverted else matrix)
        moved = rotations.multiply(rotations.multiply(left, q), right)
        return Alignment(moved, left, right, inverted)
    raise InputError(f"over must be 'o4', 'rotations', 'one-sided' or 'none', got {over!r}")


@dataclass(frozen=True)
class OrientationErrors:
    """Orientation errors after an alignment, radians.

    Attributes
    ----------
    mean_rad, median_rad, p95_rad : float
    view_mean_rad, in_plane_mean_rad : float
        The angle between viewing directions, and the turn left in the image plane.
    far_fraction : float
        The share of orientations off by more than 0.3 rad.
    """

    mean_rad: float
    median_rad: float
    p95_rad: float
    view_mean_rad: float
    in_plane_mean_rad: float
    far_fraction: float

    @property
    def degrees(self) -> dict[str, float]:
        """The angles in degrees, by name."""
        return {
            key.replace("_rad", "_degrees"): float(np.rad2deg(value))
            for key, value in asdict(self).items()
            if key.endswith("_rad")
        }


def orientation_errors(
    estimated: ArrayLike,
    true: ArrayLike,
    *,
    over: Literal["o4", "rotations", "one-sided", "none"] = "one-sided",
    symmetry: str = "C1",
) -> OrientationErrors:
    """Errors of estimated orientations, after :func:`align` over the same freedom.

    Parameters
    ----------
    estimated, true : (n, 4) arrays, unit, xyzw
    over : {'o4', 'rotations', 'one-sided', 'none'}
    symmetry : str

    Returns
    -------
    OrientationErrors
    """
    aligned = align(estimated, true, over=over, symmetry=symmetry).quaternions
    p = rotations.check(true)
    angle = rotations.distance(aligned, p)
    # What is left, in the detector's frame: twist about z by in_plane, swing by view.
    x, y, z, w = np.abs(rotations.multiply(rotations.inverse(p), aligned)).T
    view = 2 * np.arctan2(np.hypot(x, y), np.hypot(z, w))
    in_plane = 2 * np.arctan2(z, w)
    return OrientationErrors(
        mean_rad=float(angle.mean()),
        median_rad=float(np.median(angle)),
        p95_rad=float(np.percentile(angle, 95)),
        view_mean_rad=float(view.mean()),
        in_plane_mean_rad=float(in_plane.mean()),
        far_fraction=float(np.mean(angle > 0.3)),
    )


def random_error(
    true: Float[np.ndarray, "n 4"],
    seed: Seed,
    *,
    over: Literal["o4", "rotations", "one-sided", "none"] = "one-sided",
    symmetry: str = "C1",
) -> float:
    """Mean error of random orientations against these true ones: the zero of the scale, radians."""
    return orientation_errors(
        rotations.uniform(len(true), rotations.generator(seed, "random")),
        true,
        over=over,
        symmetry=symmetry,
    ).mean_rad


# --------------------------------------------------------------------------------------
# The physical limit

#: The mean angle between random orientations, radians: nothing is known worse.
RANDOM = np.pi / 2 + 2 / np.pi


def mean_error_of(covariances: Float[np.ndarray, "n 3 3"]) -> Float[np.ndarray, " n"]:
    """Mean length of Gaussian rotation vectors with these covariances.

    Parameters
    ----------
    covariances : (n, 3, 3) array, radians squared

    Returns
    -------
    (n,) array, radians
    """
    parts = np.array_split(covariances, max(1, len(covariances) // 1000))
    return np.concatenate([_mean_lengths(part) for part in parts])


def _mean_lengths(covariances: np.ndarray) -> np.ndarray:
    variances = np.maximum(np.linalg.eigvalsh(covariances), 0)
    scale = variances.sum(axis=1, keepdims=True)
    # E|x| = 1 / (2 sqrt(pi)) * integral of (1 - prod (1 + 2 v t)^(-1/2)) t^(-3/2) dt, with
    # t = exp(u) / scale; the integrand decays as exp(-|u| / 2).
    u = np.linspace(-45, 45, 301)  # right to 1e-8
    t = np.exp(u)
    v = variances / np.where(scale > 0, scale, 1)
    product = np.prod(1 + 2 * v[:, :, None] * t, axis=1) ** -0.5
    integral = np.trapezoid((1 - product) * np.exp(-u / 2), u, axis=1)
    return integral / (2 * np.sqrt(np.pi)) * np.sqrt(scale[:, 0])


def cramer_rao(
    density: Density,
    quaternions: ArrayLike,
    noise: Noise | float,
    *,
    box_px: int | None = None,
    ctf: ArrayLike | None = None,
    shifts: bool = False,
    step: float = 1e-2,
) -> Float[np.ndarray, "n a a"]:
    """Cramer-Rao bound: the smallest error covariance of orientations from noisy images.

    The Fisher information of an image about its rotation vector ``w`` (detector frame,
    ``R exp([w])``) is ``I_ab = <W dP/dw_a, W dP/dw_b>``, with ``W`` what makes the noise white and
    of variance 1; no unbiased estimator that knows the density has a smaller covariance than its
    inverse.

    Parameters
    ----------
    density : Density, a cube
    quaternions : (n, 4) array, unit, xyzw
    noise : Noise or float
        Of the image that is used; a number is the variance per pixel of white noise. With several
        optics groups, that of the first.
    box_px : int, optional
        Edge of the images; see :func:`cryoem.projection.project`.
    ctf : (n, box_px, box_px // 2 + 1) array, optional
        See :func:`cryoem.imaging.ctf`.
    shifts : bool
        Whether the shift is unknown too.
    step : float, radians and pixels
        Half of the central difference.

    Returns
    -------
    (n, 3, 3) array, radians squared
        The mean error that it allows is ``mean_error_of(...)``. With ``shifts`` (n, 5, 5): the
        rotation vector, radians, and the shift (x, y), pixels.

    References
    ----------
    Any text on estimation, for instance Kay, "Fundamentals of Statistical Signal Processing", I.3.
    """
    if not isinstance(noise, Noise):
        if not noise > 0:
            raise InputError(f"the noise's variance must be positive, got {noise}")
        noise = Noise.white(noise)
    q = rotations.check(quaternions)
    projector = Projector(density, box_px)
    transfer = None if ctf is None else np.asarray(ctf)
    if not noise.is_white:
        gain = noise.whitening(box_px or density.box_px)[0]
        transfer = gain if transfer is None else gain * transfer

    def seen(rotation_vector: np.ndarray, shift_px: np.ndarray) -> np.ndarray:
        images = projector.project(rotations.perturb(q, np.tile(rotation_vector, (len(q), 1))))
        if shift_px.any():
            images = imaging.shift(images, np.tile(shift_px, (len(q), 1)))
        return images if transfer is None else imaging.apply_ctf(images, transfer)

    gradients = []
    for axis in step * np.eye(5)[: 5 if shifts else 3]:
        change = seen(axis[:3], axis[3:]) - seen(-axis[:3], -axis[3:])
        gradients.append((change / (2 * step)).reshape(len(q), -1))
    g = np.stack(gradients, axis=1).astype(np.float64)  # (n, 3 or 5, pixels)
    return np.linalg.inv(np.einsum("nap,nbp->nab", g, g) / noise.variances[0])
