"""The symmetry that a map has: its axes found, and laid as the standard setting has them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from ..symmetry import SOLIDS, group
from .correlation import HalfMaps, fsc
from .registration import Spectrum, centre_of
from .shells import common_box

__all__ = ["Axes", "find_axes", "has_symmetry", "symmetry_of"]

#: What is left of the half-maps' agreement when one of them is turned by a symmetry that both have.
ENOUGH = 0.9
#: Half-maps that agree less than this, over so many shells at least, tell no symmetry.
LEAST, LEAST_SHELLS = 0.4, 4
#: Axes of more than this fold are not looked for.
FOLDS = 12
#: So many of the elements of T, O or I, the first, which generate the others, tell where it lies.
GENERATE = 8
#: Axes that the first look tries, and frequencies that it compares.
AXES, FREQUENCIES = 1000, 800
#: Ratio at the best axis of the grid from which one is looked for nearby; and the finest detail by
#: which the grid is compared, angstrom: its axes are four degrees apart.
NEARLY, SEARCHED = 0.5, 20.0


@dataclass(frozen=True)
class Axes:
    """How a point group lies in a map.

    Attributes
    ----------
    symmetry : str
    quaternion : (4,) array
        Turns the map so that the group's axes are where the standard setting has them,
    shift_angstrom : (3,) array, xyz
        and then moves it so that they meet at the origin.
    ratio : float
        Correlation of one half-map with the other one turned by the group's elements, over that
        without a turn; every shell of frequencies counts alike. Of Dn the mean of the turns about
        the axis, or that of the two-folds across it, whichever is less; of T, O and I the least of
        the means of the turns by each angle. About 1 where the particle has the symmetry; 0 where
        the half-maps do not agree.
    """

    symmetry: str
    quaternion: Float[np.ndarray, " 4"]
    shift_angstrom: Float[np.ndarray, " 3"]
    ratio: float

    @property
    def believed(self) -> bool:
        """Whether the map has the symmetry."""
        return self.ratio > ENOUGH


#: No symmetry: nothing is turned.
NONE = Axes("C1", np.array([0, 0, 0, 1.0]), np.zeros(3), 1.0)


class _Turns:
    """Half-maps, one of them turned about the other."""

    def __init__(self, pair: HalfMaps, resolution_angstrom: float, seed: int) -> None:
        n = common_box(pair.first, pair.second)
        self.extent = n * pair.first.voxel_size_angstrom
        # No finer than the half-maps agree: beyond, nothing has any symmetry.
        agreed = fsc(pair.first, pair.second).resolution(0.5).angstrom
        resolution_angstrom = min(max(resolution_angstrom, agreed), self.extent / LEAST_SHELLS)
        small = min(n, 4 * int(np.ceil(0.75 * self.extent / resolution_angstrom)))
        self.first, self.second = (
            Spectrum(d.resampled(small).values) for d in (pair.first, pair.second)
        )
        rng = np.random.default_rng(seed)
        k = rng.standard_normal((FREQUENCIES, 3))
        k /= np.linalg.norm(k, axis=1, keepdims=True)
        finest = min(self.extent / resolution_angstrom, small / 2 - 1)
        low = min(self.extent / 100, finest / 2)
        radius = (rng.random((FREQUENCIES, 1)) * (finest**3 - low**3) + low**3) ** (1 / 3)
        self.k = k * radius
        shell = np.rint(radius[:, 0]).astype(int)

        def even(f: np.ndarray) -> np.ndarray:
            power = np.bincount(shell, np.abs(f) ** 2) / np.maximum(np.bincount(shell), 1)
            return 1 / np.sqrt(np.maximum(power[shell], 1e-30))

        at = self.first.at(self.k)
        self.wanted = at * even(at)
        self.even = even(self.second.at(self.k))
        self.plain = self.score(np.array([[0, 0, 0, 1.0]]), np.zeros(3))[0]

    def score(
        self,
        turns: Float[np.ndarray, "m 4"],
        centre: Float[np.ndarray, " 3"],
        *,
        quick: bool = False,
    ) -> Float[np.ndarray, " m"]:
        """Correlation of the first with the second turned about a centre, angstrom."""
        matrices = Rotation.from_quat(turns).as_matrix()
        found = np.empty(len(turns))
        for part in np.array_split(np.arange(len(turns)), -(-len(turns) // 200)):
            k = self.k @ matrices[part]  # R^-1 k
            f = self.second.at(k, quick=quick) * self.even
            phase = np.exp(-2j * np.pi * (self.k - k) @ centre / self.extent)
            found[part] = ((f * phase) @ self.wanted.conj()).real / len(self.k)
        return found


def find_axes(
    pair: HalfMaps, symmetry: str, *, resolution_angstrom: float = 20.0, seed: int = 0
) -> Axes:
    """Find how a point group lies in a map, and how well the map has it.

    Parameters
    ----------
    pair : HalfMaps
        In one frame.
    symmetry : str
        Cn, Dn, T, O or I.
    resolution_angstrom : float
        The finest detail that is compared.
    seed : int
        Of the frequencies that are compared.
    """
    if group(symmetry).order == 1:
        return NONE
    search = _Search(pair, resolution_angstrom, seed)
    return search.laid(symmetry, search.first_axis(_axis(symmetry)[0])[0])


def has_symmetry(
    pair: HalfMaps, symmetry: str, *, resolution_angstrom: float = 20.0, seed: int = 0
) -> float:
    """How well a map has a symmetry whose axes lie as the standard setting has them.

    Parameters
    ----------
    pair, symmetry, resolution_angstrom, seed
        See :func:`find_axes`.

    Returns
    -------
    float
        The ``ratio`` of :class:`Axes`: 1 of C1, which all have; else NaN where the half-maps do not
        agree, and tell nothing.
    """
    name = group(symmetry).name
    if name == "C1":
        return 1.0
    turns = _Turns(pair, resolution_angstrom, seed)
    if turns.plain < LEAST:
        return float("nan")
    return _ratio(turns, name, Rotation.identity(), np.zeros(3))


def symmetry_of(pair: HalfMaps, *, resolution_angstrom: float = 20.0, seed: int = 0) -> Axes:
    """Tell the point group that a map has, and how it lies there.

    A symmetry is believed where a half-map turned by it agrees with the other half-map at least
    nine tenths as well as it does unturned, the finest shells included; of those the group with the
    most elements.

    Parameters
    ----------
    pair, resolution_angstrom, seed
        See :func:`find_axes`.

    Returns
    -------
    Axes
        Of C1 where there is none: nothing is to be turned.
    """
    search, best = _Search(pair, resolution_angstrom, seed), NONE
    if search.fine.plain < LEAST:
        return best
    found: list[Axes] = []
    directions = {}
    for n in range(2, FOLDS + 1):
        # An axis of six-fold symmetry has two-fold and three-fold symmetry too.
        if all(any(a.symmetry == f"C{m}" for a in found) for m in range(2, n) if n % m == 0):
            direction, ratio = search.first_axis(n)
            if ratio > NEARLY and (axes := search.laid(f"C{n}", direction)).believed:
                found += [axes, search.laid(f"D{n}", direction)]
                directions[n] = direction
    if {2, 3} <= set(directions):
        folds = {name: _axis(name)[0] for name in SOLIDS}
        found += [search.laid(s, directions[n]) for s, n in folds.items() if n in directions]
    for one in found:
        if one.believed and group(one.symmetry).order > group(best.symmetry).order:
            best = one
    return best


class _Search:
    """Where symmetries lie: looked for by coarse detail, laid and judged by all of it."""

    def __init__(self, pair: HalfMaps, resolution_angstrom: float, seed: int) -> None:
        self.centre = centre_of(pair.mean)
        self.coarse = _Turns(pair, max(resolution_angstrom, SEARCHED), seed)
        finer = resolution_angstrom < SEARCHED
        self.fine = _Turns(pair, resolution_angstrom, seed) if finer else self.coarse

    def first_axis(self, fold: int) -> tuple[Float[np.ndarray, " 3"], float]:
        """The direction of the best axis of a grid, and its ratio."""
        i = np.arange(AXES) + 0.5
        z = 1 - i / AXES  # half a sphere: a spiral
        around = i * np.pi * (1 + 5**0.5)
        directions = np.stack([*(np.sqrt(1 - z**2) * [np.cos(around), np.sin(around)]), z], axis=1)
        q = Rotation.from_rotvec(2 * np.pi / fold * directions).as_quat()
        scores = self.coarse.score(q, self.centre, quick=True)
        return directions[scores.argmax()], float(scores.max() / self.coarse.plain)

    def laid(self, symmetry: str, direction: np.ndarray) -> Axes:
        """The group where it fits best, by a local fit from an axis of the grid."""
        name, elements = group(symmetry).name, group(symmetry).elements[1:]
        fold, axis = _axis(name)
        few = elements[:GENERATE] if name in SOLIDS else elements
        start = Rotation.align_vectors([axis], [direction])[0]
        if name[0] != "C":  # what else there is: anywhere about that axis
            all_round = (np.pi if name[0] == "D" else 2 * np.pi) / fold
            turns = np.outer(all_round * np.arange(24) / 24, np.array(axis) / np.linalg.norm(axis))
            tries = Rotation.from_rotvec(turns) * start
            scores = [_each(self.coarse, few, t, self.centre).mean() for t in tries]
            start = tries[int(np.argmax(scores))]
        there, centre = _fitted(self.coarse, few, start, self.centre)
        if self.fine is not self.coarse:
            there, centre = _fitted(self.fine, few, there, centre)
        ratio = _ratio(self.fine, name, there, centre)
        return Axes(name, there.as_quat(), -there.apply(centre), ratio)


def _ratio(turns: _Turns, name: str, there: Rotation, centre: np.ndarray) -> float:
    """See :class:`Axes`."""
    elements = group(name).elements[1:]
    alike = _each(turns, elements, there, centre, quick=False)
    if name in SOLIDS:
        kind = np.rint(100 * np.abs(elements[:, 3]))  # by the angle
    else:  # Dn's two-folds, or not
        kind = np.abs(elements[:, 3]) + np.abs(elements[:, 2]) < 1e-6
    least = min(alike[kind == k].mean() for k in np.unique(kind))
    # Of half-maps that do not agree unturned, none can be said to have the symmetry.
    return float(least / turns.plain) if turns.plain > LEAST else 0.0


def _axis(symmetry: str) -> tuple[int, tuple[float, ...]]:
    """The axis of a group, of those that generate it, with the most folds, and where it lies."""
    name = group(symmetry).name
    return max(SOLIDS[name][0]) if name in SOLIDS else (int(name[1:]), (0.0, 0.0, 1.0))


def _fitted(
    turns: _Turns, elements: np.ndarray, start: Rotation, centre: np.ndarray
) -> tuple[Rotation, Float[np.ndarray, " 3"]]:
    """Turn to the standard setting, and the axes' common point, where most is alike nearby."""

    def loss(p: np.ndarray) -> float:
        turned = Rotation.from_rotvec(p[:3] / 10) * start
        return -float(_each(turns, elements, turned, p[3:]).mean())

    found = minimize(
        loss, np.r_[0, 0, 0, centre], method="Powell", options={"xtol": 1e-2, "ftol": 1e-3}
    )
    return Rotation.from_rotvec(found.x[:3] / 10) * start, found.x[3:]


def _each(
    turns: _Turns,
    elements: np.ndarray,
    to_standard: Rotation,
    centre: np.ndarray,
    *,
    quick: bool = True,
) -> Float[np.ndarray, " m"]:
    """Correlation by each element of a group that lies as ``to_standard`` says."""
    here = (to_standard.inv() * Rotation.from_quat(elements) * to_standard).as_quat()
    return turns.score(here, centre, quick=quick)
