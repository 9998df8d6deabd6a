"""Symmetric particles over the whole sphere: features that the group leaves unchanged.

A particle with point group G looks the same at ``R`` and at ``g R``, so an image determines the
orbit ``G R`` alone, and the distance between two images is that between orbits,

    d_G(R, S) = min over g of d_q(R, g S).

No finite features with inner products represent ``d_G`` without error, and a code of ``R`` itself
must tear somewhere. What can be represented, and by a continuous network, are functions on the
quotient. The coefficients of the rotation of degree l, ``D^l_{mu m}(R)``, transform among
themselves under a rotation of the particle (index ``mu``) and by ``exp(-i m a)`` under an in-plane
rotation by ``a`` of the image (index ``m``). Those combinations over ``mu`` that G leaves unchanged
are features of the orbit:

* the axis of Cn: ``mu = 0`` of degree 1, of Dn: of degree 2 (its dyad, as it has no sign);
* the phase about the axis: ``mu = +-n`` of degree n, two real combinations for Cn, one for Dn;
* of T, O and I the first combination that they leave unchanged, of degree 3, 4 and 6: no other
  rotation does.

With a constant they make a unit vector ``phi(R)``, and ``K(R, S) = <phi(R), phi(S)>`` lies in
[0, 1]. ``delta = arccos(2 K - 1)`` is the kernel distance: zero on the same orbit and nowhere
else, and isotropic near zero. For the trivial group, C1, these are the nine entries of the rotation
matrix and a constant, and ``delta`` is the distance ``d_q`` itself, exactly: the asymmetric
particle is not a special case of the code. For D2 they are the dyads of the particle's three axes.
"""

from __future__ import annotations

import functools
import re

import numpy as np
import scipy.linalg
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation

from . import fourier, rotations
from .errors import InputError

__all__ = ["Group", "exact_part", "group", "summed"]

#: What generates the groups of solids, folds and axes, as RELION lays them: T with a three-fold on
#: z, O with a four-fold, I with two-folds on x, y and z. And the degree of their features.
GOLDEN = (1 + 5**0.5) / 2
SOLIDS = {
    "T": (((3, (0, 0, 1)), (2, (0, 2**0.5, 1))), 3),
    "O": (((4, (0, 0, 1)), (3, (1, 1, 1))), 4),
    "I": (((2, (0, 0, 1)), (5, (1, 0, GOLDEN))), 6),
}


def _spin(l: int) -> tuple[np.ndarray, np.ndarray]:
    """The generators ``(J_x, J_y)`` of degree ``l``, in the basis of m = -l ... l."""
    m = np.arange(-l, l)
    raising = np.diag(np.sqrt(l * (l + 1) - m * (m + 1)), -1)
    return (raising + raising.T) / 2, (raising - raising.T) / 2j


@functools.cache
def _tilting(l: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (integers) and eigenvectors of ``J_y``."""
    values, vectors = np.linalg.eigh(_spin(l)[1])
    return np.round(values), vectors


def _wigner(l: int, q: np.ndarray) -> np.ndarray:
    """``D^l_{mu m}``, ``exp(-i mu rot) d^l_{mu m}(tilt) exp(-i m psi)``: (n, 2 l + 1, 2 l + 1)."""
    values, vectors = _tilting(l)
    tilt = 2 * np.arctan2(np.hypot(q[:, 0], q[:, 1]), np.hypot(q[:, 2], q[:, 3]))
    small = (vectors * np.exp(-1j * tilt[:, None] * values)[:, None, :]) @ vectors.conj().T
    half_sum = np.arctan2(q[:, 2], q[:, 3])
    half_difference = np.arctan2(-q[:, 0], q[:, 1])
    m = np.arange(-l, l + 1)
    rot, psi = half_sum + half_difference, half_sum - half_difference
    left, right = np.exp(-1j * np.outer(rot, m)), np.exp(-1j * np.outer(psi, m))
    return left[:, :, None] * small * right[:, None, :]


#: A degree l, the combination over mu, and its share of the features.
Combination = tuple[int, np.ndarray, float]


def _about_an_axis(kind: str, n: int) -> tuple[np.ndarray, list[Combination]]:
    """Elements of Cn or Dn, and the combinations that they leave unchanged."""
    turns = rotations.about("z", 2 * np.pi * np.arange(n) / n)
    flip = rotations.multiply(rotations.about("x", np.pi), turns)
    axis = 1 if kind == "C" else 2
    # Isotropic near zero: turning about the axis changes the features as turning it over does.
    # |L_z|^2 = n^2 of the phase; |L_x|^2 = l (l + 1) / 2 of the axis and n / 2 of the phase.
    ratio = axis * (axis + 1) / 2 / (n**2 - n / 2)  # phase : axis
    weights = np.array([1, ratio]) / (1 + ratio)
    straight = np.zeros(2 * axis + 1, complex)
    straight[axis] = 1
    combinations: list[Combination] = [(axis, straight, weights[0])]
    for phase in (1, 1j) if kind == "C" else (1,):
        # Real under conj(D_{mu m}) = (-1)^(mu - m) D_{-mu, -m}; for Dn also unchanged by the
        # two-fold on x, which takes mu to -mu with the sign (-1)^l, here l = n.
        around = np.zeros(2 * n + 1, complex)
        around[-1], around[0] = phase, (-1) ** n * np.conj(phase)
        share = weights[1] / (2 if kind == "C" else 1)
        combinations.append((n, around / np.sqrt(2), share))
    return turns if kind == "C" else np.concatenate([turns, flip]), combinations


def _solid(
    axes: tuple[tuple[int, tuple[float, ...]], ...], degree: int
) -> tuple[np.ndarray, list[Combination]]:
    """All that turns about some axes generate, and the one combination that they leave unchanged.

    It is isotropic near zero: no direction is told from another by what has such a symmetry.
    """
    directions = [np.array(axis) / np.linalg.norm(axis) for _, axis in axes]
    turns = [2 * np.pi / fold * d for (fold, _), d in zip(axes, directions, strict=True)]
    generators = Rotation.from_rotvec(turns).as_quat()
    known = [np.array([0, 0, 0, 1.0])]
    for q in known:  # it grows as it is gone through
        for new in rotations.multiply(generators, q):
            if rotations.distance(np.array(known), new).min() > 0.1:
                known.append(new)
    elements = np.array(known)
    mean = _wigner(degree, elements).mean(axis=0)  # all rows alike, but for a factor
    mix = mean[np.linalg.norm(mean, axis=1).argmax()]
    mix /= np.linalg.norm(mix)
    # Real, as above: as its conjugate is, but for a phase.
    mu = np.arange(-degree, degree + 1)
    mix *= np.sqrt(np.vdot(mix, (-1.0) ** mu * mix[::-1].conj()))
    return elements, [(degree, mix, 1.0)]


class Group:
    """A point group and the features of its orbits; made by :func:`group`.

    Attributes
    ----------
    name : str
        ``"C1"``, ``"C4"``, ``"D2"``, ..., ``"T"``, ``"O"``, ``"I"``
    elements : (order, 4) array, unit quaternions
        Cn about z; Dn with a two-fold on x besides; T, O and I as RELION has them (its I2).
    harmonics : (f,) int array
        The features' in-plane index m: under an in-plane rotation by ``a`` a pair of features with
        the same m > 0 turns by ``m a``, and those of m = 0 stand still.
    """

    def __init__(self, name: str) -> None:
        self.name = str(name).upper()
        if self.name in SOLIDS:
            self.elements, combinations = _solid(*SOLIDS[self.name])
        else:
            found = re.fullmatch(r"([CD])([1-9]\d?)", self.name)
            if not found or self.name == "D1":
                raise InputError(
                    f"symmetry must be Cn or Dn (C1, C4, D2, ...), T, O or I, got {name!r}"
                )
            self.elements, combinations = _about_an_axis(found[1], int(found[2]))
        harmonics = [0]
        self.blocks: list[tuple[int, np.ndarray, np.ndarray]] = []
        generators = [np.zeros((3, 1, 1))]
        for l, mix, share in combinations:
            m = np.arange(-l, l + 1)
            # From coefficients of all m to real numbers: m = 0, then the two parts of each m > 0.
            real = np.zeros((2 * l + 1, 2 * l + 1), complex)
            real[0, l] = 1
            for k in range(1, l + 1):
                sign = (-1) ** k
                real[2 * k - 1, [l + k, l - k]] = np.array([1, sign]) / np.sqrt(2)
                real[2 * k, [l + k, l - k]] = np.array([1, -sign]) / (1j * np.sqrt(2))
            spins = [*_spin(l), np.diag(m).astype(complex)]
            turn = [(real @ (-1j * spin).T @ np.linalg.inv(real)).real for spin in spins]
            generators.append(np.stack(turn))
            harmonics += [0] + [k for k in range(1, l + 1) for _ in range(2)]
            self.blocks.append((l, mix, np.sqrt(share) * real.T))
        self.harmonics = np.array(harmonics)
        along = zip(*generators, strict=True)  # by axis
        self._generators = np.stack([scipy.linalg.block_diag(*blocks) for blocks in along])
        # The constant lifts the smallest inner product to zero; for C1 a half-turn's, -1/3.
        self._constant = 0.0
        half_circle = np.linspace(0, np.pi, 721)
        flips = [rotations.about(axis, half_circle) for axis in ("x", "y", "z")]
        others = self.features(np.concatenate([rotations.grid(8000), *flips]))
        lowest = float((others @ self.features(np.array([[0, 0, 0, 1.0]])).T).min())
        self._constant = -lowest / (1 - lowest)

    def __repr__(self) -> str:
        return f"Group({self.name!r})"

    @property
    def order(self) -> int:
        """How many orientations show the same image."""
        return len(self.elements)

    def features(self, quaternions: ArrayLike) -> Float[np.ndarray, "n f"]:
        """``phi(R)``: unit vectors, the same all over an orbit.

        Parameters
        ----------
        quaternions : (n, 4) array, unit, xyzw

        Returns
        -------
        (n, f) array
        """
        q = rotations.check(quaternions)
        parts = [np.full((len(q), 1), np.sqrt(self._constant))]
        scale = np.sqrt(1 - self._constant)
        for l, mix, real in self.blocks:
            parts.append(scale * (mix @ _wigner(l, q) @ real).real)
        return np.concatenate(parts, axis=1)

    def inverse_density(self, bins: int, *, highest: float = 20.0) -> Float[np.ndarray, " bins"]:
        """Weights that even out the kernel distances of uniform orientations, in bins of [0, pi].

        Without symmetry ``1 / sin^2(d_q / 2)``; capped at ``highest``.
        """
        q = rotations.uniform(200_000, rotations.generator(0, "density of distances"))
        delta = self.kernel_distance(q, np.array([[0, 0, 0, 1.0]]))
        density = np.histogram(delta, bins, (0, np.pi), density=True)[0]
        return 1 / np.maximum(density * np.pi / 2, 1 / highest)

    def decode(
        self, features: ArrayLike, *, candidates: int = 4000, steps: int = 6
    ) -> Float[np.ndarray, "n 4"]:
        """One orientation of the orbit whose features are nearest, by inner product.

        The best of a grid over SO(3), then Gauss-Newton steps.

        Parameters
        ----------
        features : (n, f) array
            Estimates of ``phi``; their length does not matter, the constant is not used.
        candidates, steps : int

        Returns
        -------
        (n, 4) array, unit, xyzw
        """
        f = np.asarray(features, np.float64)
        if f.ndim != 2 or f.shape[1] != len(self.harmonics):
            raise InputError(
                f"features of {self.name} must have shape (n, {len(self.harmonics)}), got {f.shape}"
            )
        f = f[:, 1:]
        known = rotations.grid(candidates)
        table = self.features(known)[:, 1:].astype(np.float32)
        q = np.empty((len(f), 4))
        for i in range(0, len(f), 1024):
            q[i : i + 1024] = known[(f[i : i + 1024].astype(np.float32) @ table.T).argmax(axis=1)]
        generators = self._generators[:, 1:, 1:]
        # The features of an orbit span one length; the estimate is brought to it.
        length = np.sqrt(1 - self._constant)
        f = f * (length / np.maximum(np.linalg.norm(f, axis=1, keepdims=True), 1e-12))
        for _ in range(steps):
            phi = self.features(q)[:, 1:]
            slopes = np.einsum("aij,nj->nai", generators, phi)
            normal = np.einsum("nai,nbi->nab", slopes, slopes)
            right = np.einsum("nai,ni->na", slopes, f - phi)
            step = np.linalg.solve(normal, right[..., None])[..., 0]
            longest = np.linalg.norm(step, axis=1, keepdims=True)
            q = rotations.perturb(q, step * np.minimum(1, 0.3 / np.maximum(longest, 1e-12)))
        return q

    def kernel_distance(
        self, quaternions: ArrayLike, others: ArrayLike
    ) -> Float[np.ndarray, "n m"]:
        """``delta = arccos(2 K - 1)`` of all pairs, (n, m), radians; for C1 it is ``d_q``."""
        product = self.features(quaternions) @ self.features(others).T
        return np.arccos(np.clip(2 * product - 1, -1, 1))

    def nearest(self, quaternions: ArrayLike, others: ArrayLike) -> Float[np.ndarray, "n 4"]:
        """That ``g q`` of each orbit which lies nearest to another orientation, (n, 4)."""
        q, p = rotations.check(quaternions), rotations.check(others, "others")
        orbit = rotations.multiply(self.elements[:, None], q)  # (order, n, 4)
        best = rotations.distance(orbit, p).argmin(axis=0)
        return orbit[best, np.arange(len(q))]

    def distance(self, quaternions: ArrayLike, others: ArrayLike) -> Float[np.ndarray, " n"]:
        """``d_G``, the distance of orbits, element by element: (n,), radians."""
        return rotations.distance(self.nearest(quaternions, others), others)


@functools.cache
def group(name: str) -> Group:
    """Return a point group by its name: C1, C2, ..., D2, D3, ..., T, O, I.

    Cn has its axis on z, Dn a two-fold on x besides; T, O and I lie as RELION has them (its I2).
    """
    return Group(name)


def exact_part(orbit: Group) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Split a group into rotations that exchange axes of the grid, and what is left to do.

    Returns
    -------
    matrices : list of (3, 3) arrays
        The rotations that exchange axes, or turn them round: a subgroup, exact on a grid.
    elements : list of quaternions
        One of each coset: those, turned by each of the matrices, are the group.
    """
    matrices = Rotation.from_quat(orbit.elements).as_matrix()
    rounded = np.rint(matrices)
    exact = [m for m, near in zip(rounded, matrices, strict=True) if np.abs(m - near).max() < 1e-6]
    left, others = list(range(orbit.order)), []
    while left:
        others.append(orbit.elements[left[0]])
        done = np.stack([m @ matrices[left[0]] for m in exact])
        left = [i for i in left if np.abs(done - matrices[i]).max(axis=(1, 2)).min() > 1e-6]
    return exact, others


def _exchanged(
    values: Float[np.ndarray, "m m m"], matrix: Float[np.ndarray, "3 3"]
) -> Float[np.ndarray, "m m m"]:
    """A cube turned by a rotation that exchanges its axes, or turns them round, about ``m // 2``.

    The first plane of an even cube has no counterpart, and goes to itself.
    """
    to = np.argmax(np.abs(matrix), axis=0)  # axis x, y, z of the source lies along this one
    axes = [0, 0, 0]
    for i, j in enumerate(to):
        axes[2 - j] = 2 - i
    turned = values.transpose(axes)
    for i, j in enumerate(to):
        if matrix[j, i] < 0:
            turned = fourier.flipped(turned, 2 - j)
    return turned


def summed(
    values: Float[np.ndarray, "m m m"], matrices: list[np.ndarray]
) -> Float[np.ndarray, "m m m"]:
    """The sum of a cube's copies, turned by each of the matrices."""
    if len(matrices) == 1:
        return values
    total = np.zeros_like(values)
    for matrix in matrices:
        total += _exchanged(values, matrix)
    return total
