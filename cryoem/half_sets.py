"""Two halves of a set of particles, each particle in one of them however often it is there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from . import rotations
from .errors import InputError
from .rotations import Seed

__all__ = ["image_of", "particles_of", "random_half_sets", "split_particles"]

#: Pixels of a micrograph within which two images show one particle.
NEAR_PX = 1.0
PLACE = ("rlnCoordinateX", "rlnCoordinateY")


def random_half_sets(
    n: int, seed: Seed, particle: ArrayLike | None = None
) -> Int[np.ndarray, " n"]:
    """Split ``n`` images at random: (n,) ints, 1 or 2, as in ``rlnRandomSubset``.

    Half-maps judge a map only if the halves were separated before their orientations were found;
    so this stands at the beginning of a pipeline.

    Parameters
    ----------
    n : int
    seed : int or numpy.random.Generator
    particle : (n,) array of int, optional
        Which particle each image shows (:func:`particles_of`): all of one are in one half. By
        default each shows another one.
    """
    if n < 2:
        raise InputError(f"wanted at least 2 particles to split, got {n}")
    rng = rotations.generator(seed, "halves")
    which, counts = np.unique(
        np.arange(n) if particle is None else particle, return_inverse=True, return_counts=True
    )[1:]
    if len(counts) < 2:
        raise InputError(f"wanted at least 2 particles to split, got 1 in {n} rows")
    half_set = np.arange(len(counts)) % 2 + 1
    rng.shuffle(half_set)
    if counts.max() > 1:  # the halves are even in images: the more of a particle, the earlier
        order = np.lexsort((rng.random(len(counts)), -counts))
        half_set[order] = np.arange(len(counts)) % 2 + 1
    return half_set[which]


def particles_of(columns: Mapping[str, np.ndarray], n: int) -> Int[np.ndarray, " n"]:
    """Tell which rows of a particle file are of one particle: (n,) ints, alike where they are.

    Rows of one image name, or of one place: the same micrograph and coordinates within a pixel.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = []
    if "rlnImageName" in columns:
        edges.append(_alike(_images(columns["rlnImageName"])))
    if "rlnMicrographName" in columns and all(name in columns for name in PLACE):
        edges.append(_near(columns))
    first, second = np.concatenate([np.zeros((2, 0), int), *edges], axis=1)
    if not len(first):
        return np.arange(n)
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(n, n))
    return connected_components(graph, directed=False)[1]


def split_particles(
    particle: Int[np.ndarray, " n"], half_set: Int[np.ndarray, " n"]
) -> Int[np.ndarray, "k 2"]:
    """Rows of the particles that are in both halves: one in half 1, one in half 2."""
    halves = []
    for half in (1, 2):
        rows = np.flatnonzero(half_set == half)
        found, first = np.unique(particle[rows], return_index=True)
        halves.append(dict(zip(found.tolist(), rows[first].tolist(), strict=True)))
    both = [(row, halves[1][which]) for which, row in halves[0].items() if which in halves[1]]
    return np.array(both, int).reshape(-1, 2)


def image_of(name: str) -> tuple[str, str]:
    """The number and the stack of an image name as ``000001@stack.mrcs``; no number: ``""``.

    The first ``@`` ends the number, as RELION has it; paths may hold others.
    """
    digits, _, stack = name.partition("@")
    return (digits, stack) if digits.isdecimal() and digits.isascii() else ("", name)


def _images(names: Iterable[object]) -> np.ndarray:
    """Numbers of image names, alike for ``1@a.mrcs`` and ``000001@./a.mrcs``."""
    stacks: dict[str, str] = {}
    known: dict[tuple[str, str], int] = {}
    found = []
    for name in map(str, names):
        digits, stack = image_of(name)
        if stack not in stacks:
            stacks[stack] = os.path.normpath(stack)
        found.append(known.setdefault((digits.lstrip("0"), stacks[stack]), len(known)))
    return np.array(found, int)


def _alike(numbers: np.ndarray) -> np.ndarray:
    """Pairs of rows of the same number that hold together all that have it, (2, m)."""
    order = np.argsort(numbers, kind="stable")
    same = numbers[order[1:]] == numbers[order[:-1]]
    return np.stack([order[:-1][same], order[1:][same]])


def _near(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Pairs of rows that hold together those of one place, (2, m)."""
    from scipy.spatial import KDTree

    try:
        place = np.stack([columns[name].astype(np.float64) for name in PLACE], axis=1)
    except (TypeError, ValueError):
        return np.zeros((2, 0), int)
    # No box fits about a corner: zeros are where nothing was known.
    rows = np.flatnonzero(np.isfinite(place).all(axis=1) & place.any(axis=1))
    names = columns["rlnMicrographName"][rows].astype(str)
    micrograph = np.unique(names, return_inverse=True)[1]
    at = np.column_stack([place[rows], micrograph * 1e7])
    distinct, where = np.unique(at, axis=0, return_inverse=True)
    if len(distinct) < 2:
        return np.zeros((2, 0), int)
    first = np.zeros(len(distinct), int)
    first[where[::-1]] = rows[::-1]
    apart = KDTree(distinct).query_pairs(NEAR_PX, output_type="ndarray")
    return np.concatenate([rows[_alike(where)], first[apart.T]], axis=1)
