"""Moving maps: mirrored, turned, and laid onto a reference."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.fft
from jaxtyping import Complex, Float
from scipy import ndimage
from scipy.optimize import least_squares, minimize
from scipy.spatial.transform import Rotation

from .. import accelerator, fourier, rotations, threads
from ..density import Density
from ..errors import InputError
from .shells import common_box, of_half_spectrum

__all__ = ["Registration", "mirrored", "register", "turned"]

#: By which slopes are taken, in tenths of a radian.
TURN = 0.1
#: Poses of the grid are glanced at by this share of the frequencies, and this share looked at.
GLANCE = 5
#: How many poses of the grid are looked at nearer, and how far apart these are, radians: a map that
#: nearly has a symmetry, or nearly is its mirror image, lies well in places that are far apart.
PLACES, APART = 12, 0.5
#: So many of these, of the best after a round of the fit, are fitted.
FITTED = 4
#: So many that fit nearly as well as the best one, by this correlation, are fitted to the end.
RIVALS, NEARLY = 3, 0.05


def mirrored(density: Density) -> Density:
    """Mirror image ``V(-r)`` about the origin voxel."""
    values = density.values
    for axis in range(3):
        values = fourier.flipped(values, axis)
    return Density(values, density.voxel_size_angstrom)


def centre_of(density: Density) -> Float[np.ndarray, " 3"]:
    """Centre of mass of what stands out of a map, from its origin; angstrom, xyz.

    Of a map that is nothing but noise it is near the middle.
    """
    n, v = density.box_px, density.values
    weight = np.maximum(v - 0.1 * np.percentile(v, 99.9), 0).astype(float)
    axis = np.arange(n) - n // 2
    middle = [
        float(axis @ weight.sum(axis=tuple({0, 1, 2} - {a})) / max(weight.sum(), 1e-30))
        for a in (2, 1, 0)
    ]
    return np.array(middle) * density.voxel_size_angstrom


def _transform(
    values: Float[np.ndarray, "n n n"], k: Float[np.ndarray, "m 3"]
) -> Complex[np.ndarray, " m"]:
    """Transform of a cube at frequencies xyz, cycles per box."""
    import finufft

    n = values.shape[0]
    z, y, x = (np.ascontiguousarray(2 * np.pi / n * k[:, a], np.float32) for a in (2, 1, 0))
    volume = np.ascontiguousarray(values, np.complex64)
    return finufft.nufft3d2(
        z, y, x, volume, eps=1e-5, isign=-1, nthreads=threads.count(), showwarn=0
    )


def _half_ball(n: int) -> tuple[tuple[np.ndarray, ...], Float[np.ndarray, "m 3"]]:
    """Indices and frequencies, xyz, of a half spectrum within Nyquist."""
    inside = np.nonzero(fourier.radius((n,) * 3, half=True) < n / 2)
    f = fourier.frequencies(n)
    return inside, np.stack([inside[2].astype(float), f[inside[1]], f[inside[0]]], axis=1)


def turned(
    density: Density,
    quaternion: Float[np.ndarray, "4"],
    shift_angstrom: Float[np.ndarray, "3"] | Sequence[float] = (0.0, 0.0, 0.0),
) -> Density:
    """Turn a density by ``A`` and then move it: ``V(A^-1 (r - t))``, in Fourier space.

    Parameters
    ----------
    density : Density, a cube
    quaternion : (4,) array
    shift_angstrom : (3,) array, xyz

    Returns
    -------
    Density
        Limited to the ball of frequencies below Nyquist.
    """
    n = density.box_px
    inside, k = _half_ball(n)
    values = _transform(density.values, Rotation.from_quat(quaternion).inv().apply(k))
    t = np.asarray(shift_angstrom, float) / (n * density.voxel_size_angstrom)
    spectrum = np.zeros((n, n, n // 2 + 1), np.complex64)
    spectrum[inside] = values * np.exp(-2j * np.pi * k @ t)
    real = scipy.fft.fftshift(of_half_spectrum(spectrum, n))
    return Density(real, density.voxel_size_angstrom)


# --------------------------------------------------------------------------------------
# Registration


@dataclass(frozen=True)
class Registration:
    """A map laid onto a reference.

    Attributes
    ----------
    density : Density
        The map after it.
    quaternion : (4,) array
        The rotation that was fitted.
    shift_angstrom : (3,) array, xyz
        Applied after the rotation.
    mirrored : bool
        Whether the mirror image fitted better; always False where it was not allowed.
    correlation : float
        In the band of frequencies that was fitted.
    """

    density: Density
    quaternion: Float[np.ndarray, "4"]
    shift_angstrom: Float[np.ndarray, "3"]
    mirrored: bool
    correlation: float


class Spectrum:
    """A cube's transform, interpolated: coarse and quick, for searches only."""

    def __init__(self, values: Float[np.ndarray, "n n n"]) -> None:
        self.n = values.shape[0]
        padded = fourier.crop_or_pad(values, (2 * self.n,) * 3)
        f = scipy.fft.fftshift(scipy.fft.fftn(scipy.fft.ifftshift(padded), workers=fourier.WORKERS))
        linear = [f.real.copy(), f.imag.copy()]
        cubic = [ndimage.spline_filter(part, output=np.float32) for part in linear]
        # What is interpolated, by the order of the splines.
        self._parts = {
            order: [accelerator.arrays().asarray(part) for part in parts]
            for order, parts in ((1, linear), (3, cubic))
        }

    def at(self, k: Float[np.ndarray, "*m 3"], *, quick: bool = False) -> Complex[np.ndarray, "*m"]:
        """Transform at frequencies xyz, cycles per box."""
        at = np.moveaxis(2 * k[..., ::-1] + self.n, -1, 0)
        order = 1 if quick else 3
        real, imaginary = (
            accelerator.map_coordinates(part, at, order=order) for part in self._parts[order]
        )
        return real + 1j * imaginary


@dataclass(frozen=True)
class _Pose:
    """How a map lies on a reference, and how well."""

    mirrored: bool
    quaternion: Float[np.ndarray, "4"]
    shift_angstrom: Float[np.ndarray, "3"]
    correlation: float


class _Comparison:
    """A map and a reference, compared at random frequencies."""

    def __init__(
        self, density: Density, reference: Density, hands: Sequence[bool], small: int, seed: int
    ) -> None:
        self.extent = reference.box_px * reference.voxel_size_angstrom
        self.phase = -2j * np.pi / self.extent  # of a shift by an angstrom, at frequency 1
        self.finest = 2 * reference.voxel_size_angstrom
        self.rng = np.random.default_rng(seed)
        self.target = Spectrum(reference.resampled(small).values)
        self.middle = centre_of(reference)
        maps = {hand: mirrored(density) if hand else density for hand in hands}
        self.sources = {hand: Spectrum(d.resampled(small).values) for hand, d in maps.items()}
        self.middles = {hand: centre_of(d) for hand, d in maps.items()}

    def band(
        self, cutoff_angstrom: float, count: int
    ) -> tuple[Float[np.ndarray, "m 3"], Complex[np.ndarray, " m"]]:
        """Random frequencies of a ball, and the reference's transform there, of unit norm."""
        k = self.rng.standard_normal((count, 3))
        k *= self.rng.random((count, 1)) ** (1 / 3) / np.linalg.norm(k, axis=1, keepdims=True)
        k *= self.extent / max(cutoff_angstrom, self.finest)
        f = self.target.at(k)
        return k, f / np.linalg.norm(f)

    def search(self, cutoff_angstrom: float, count: int) -> list[_Pose]:
        """The best poses of all rotations that lie apart, middle on middle, the best first."""
        k, wanted = self.band(cutoff_angstrom, count)
        # By few of the frequencies first: most rotations are far from any that fits.
        grid, few = rotations.grid(6000), count // GLANCE
        poses = []
        for hand in self.sources:
            at_first = self._scores(hand, grid, k[:few], wanted[:few])
            some = grid[np.argsort(at_first)[-(len(grid) // GLANCE) :]]
            scores = self._scores(hand, some, k, wanted)
            shifts = self._middled(hand, some)
            poses += [_Pose(hand, *each) for each in zip(some, shifts, scores, strict=True)]
        return _apart(poses, APART)

    def _middled(self, hand: bool, q: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "m 3"]:
        """Shifts that lay the turned map's middle on the reference's."""
        return self.middle - Rotation.from_quat(q).apply(self.middles[hand])

    def _scores(
        self,
        hand: bool,
        q: Float[np.ndarray, "m 4"],
        k: Float[np.ndarray, "c 3"],
        wanted: Complex[np.ndarray, " c"],
    ) -> Float[np.ndarray, " m"]:
        """Correlation of the turned map, middle on middle, at some frequencies."""
        scores = np.empty(len(q))
        for part in np.array_split(np.arange(len(q)), -(-len(q) * len(k) // 300_000)):
            turned_k = Rotation.from_quat(q[part]).inv().as_matrix() @ k.T
            f = self.sources[hand].at(turned_k.transpose(0, 2, 1), quick=True)
            norm = np.linalg.norm(f, axis=1)
            f *= np.exp(self.phase * (self._middled(hand, q[part]) @ k.T))
            scores[part] = (f @ wanted.conj()).real / norm
        return scores

    def fit(
        self,
        start: _Pose,
        k: Float[np.ndarray, "m 3"],
        wanted: Complex[np.ndarray, " m"],
        rounds: int | None = None,
    ) -> _Pose:
        """The best pose near ``start`` at the frequencies of a band, roughly."""

        def loss(p: np.ndarray) -> float:
            return -float((self._laid(start, p, k, quick=True) @ wanted.conj()).real)

        p0 = np.r_[0, 0, 0, start.shift_angstrom]
        # Powell's line searches leap over the hollows that noise makes.
        options = {"xtol": 1e-2, "ftol": 1e-3, "maxiter": rounds}
        best = minimize(loss, p0, method="Powell", options=options)
        return self._pose(start, best.x, -best.fun)

    def polish(self, start: _Pose, cutoff_angstrom: float) -> _Pose:
        """The best pose at ``start``, by all frequencies of the ball."""
        _, k = _half_ball(self.target.n)
        k = k[np.linalg.norm(k, axis=1) < self.extent / max(cutoff_angstrom, self.finest)]
        wanted = self.target.at(k)
        wanted /= np.linalg.norm(wanted)

        def residuals(p: np.ndarray) -> np.ndarray:
            return _as_real(self._laid(start, p, k) - wanted)

        def slopes(p: np.ndarray) -> np.ndarray:
            here = self._laid(start, p, k)
            ahead = (self._laid(start, p + TURN * axis, k) for axis in np.eye(6)[:3])
            turns = [(there - here) / TURN for there in ahead]
            return _as_real(np.stack([*turns, *(here * self.phase * k.T)])).T

        p0 = np.r_[0, 0, 0, start.shift_angstrom]
        best = least_squares(residuals, p0, jac=slopes, xtol=1e-3, ftol=1e-4, gtol=1e-5)
        return self._pose(start, best.x, float(1 - best.cost))  # of two of unit norm

    def _laid(
        self,
        start: _Pose,
        p: Float[np.ndarray, "6"],
        k: Float[np.ndarray, "m 3"],
        *,
        quick: bool = False,
    ) -> Complex[np.ndarray, " m"]:
        """Transform, of unit norm, of the map as it lies: the turn times 10, and the shift."""
        turn = _turned_by(start, p)
        f = self.sources[start.mirrored].at(turn.inv().apply(k), quick=quick)
        f *= np.exp(self.phase * (k @ p[3:]))
        return f / np.linalg.norm(f)

    def _pose(self, start: _Pose, p: Float[np.ndarray, "6"], correlation: float) -> _Pose:
        return _Pose(start.mirrored, _turned_by(start, p).as_quat(), p[3:], correlation)


def _apart(poses: Sequence[_Pose], radians: float) -> list[_Pose]:
    """The best of the poses, none of them near a better one; the best first."""
    found: list[_Pose] = []
    for pose in sorted(poses, key=lambda pose: -pose.correlation):
        near = (
            pose.mirrored == other.mirrored
            and rotations.distance(pose.quaternion, other.quaternion) < radians
            for other in found
        )
        if not any(near):
            found.append(pose)
        if len(found) == PLACES:
            break
    return found


def _turned_by(start: _Pose, p: Float[np.ndarray, "6"]) -> Rotation:
    return Rotation.from_rotvec(p[:3] / 10) * Rotation.from_quat(start.quaternion)


def _as_real(f: Complex[np.ndarray, "*m"]) -> Float[np.ndarray, "*r"]:
    return np.concatenate([f.real, f.imag], axis=-1)


def register(
    density: Density,
    reference: Density,
    *,
    allow_mirror: bool = True,
    resolution_angstrom: float = 15.0,
    seed: int = 0,
) -> Registration:
    """Lay a map onto a reference by rotation, shift and, where allowed, hand.

    A coarse search over all rotations, at twice ``resolution_angstrom``; a local fit of the best
    that lie apart, so that what nearly is a symmetry, or the mirror image, does not hide the right
    one; and of the best of those once more, to ``resolution_angstrom``.

    Parameters
    ----------
    density, reference : Density, cubes of the same box and voxel size
    allow_mirror : bool
        Try the mirror image too: images alone cannot tell the hand.
    resolution_angstrom : float
        The finest detail that is fitted.
    seed : int
        Of the frequencies that the coarse search looks at.

    Returns
    -------
    Registration
    """
    n, voxel = common_box(reference, density), reference.voxel_size_angstrom
    if not (density.values.any() and reference.values.any()):
        raise InputError("a map that is zero everywhere cannot be registered")
    # The finest detail stands at two thirds of the coarser sampling's Nyquist.
    small = min(n, 4 * int(np.ceil(0.75 * n * voxel / resolution_angstrom)))
    hands = [False, True] if allow_mirror else [False]
    comparison = _Comparison(density, reference, hands, small, seed)
    candidates = comparison.search(2 * resolution_angstrom, count=600)
    band = comparison.band(1.5 * resolution_angstrom, count=800)
    begun = _apart([comparison.fit(pose, *band, rounds=1) for pose in candidates], APART / 2)
    fits = _apart([comparison.fit(pose, *band) for pose in begun[:FITTED]], APART / 2)
    rivals = [fit for fit in fits if fit.correlation > fits[0].correlation - NEARLY]
    ends = [comparison.polish(fit, resolution_angstrom) for fit in rivals[:RIVALS]]
    pose = max(ends, key=lambda pose: pose.correlation)
    source = mirrored(density) if pose.mirrored else density
    return Registration(
        turned(source, pose.quaternion, pose.shift_angstrom),
        pose.quaternion,
        pose.shift_angstrom,
        pose.mirrored,
        pose.correlation,
    )
