"""Two halves of a set of particles, each particle in one of them however often it is there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from . import rotations
from .errors import InputError
from .rotations import Seed

if TYPE_CHECKING:
    from .particles import ParticleStack

Stack = TypeVar("Stack", bound="ParticleStack")

__all__ = [
    "FEWEST",
    "check_enough",
    "image_of",
    "particles_in",
    "particles_of",
    "random_half_sets",
    "shared_particles",
    "split_particles",
    "unshared",
]

#: Particles of which two halves are made: maps of fewer agree, or do not, by chance.
FEWEST = 20
#: Pixels of a micrograph, or angstrom, within which two images show one particle.
NEAR_PX, NEAR_ANGSTROM = 2.0, 10.0
#: The same of segments of filaments, which lie near each other; of whose tube columns tell; and to
#: what share, at most, particles that were picked twice come down.
SAME_PX, HELICAL, CHAINED = 1.0, ("rlnHelicalTubeID", "filament/"), 0.4
#: The pixels of micrographs, where a table of optics groups tells them.
MICROGRAPH_PIXEL = "rlnMicrographOriginalPixelSize"
#: What stands for an identifier that there is none of.
NOTHING = ("", "0", "0.0", "None", "none")
PLACE = ("rlnCoordinateX", "rlnCoordinateY")


def check_enough(images: int) -> None:
    """Refuse so few images that the maps of two halves mean nothing."""
    if images < FEWEST:
        raise InputError(
            f"wanted at least {FEWEST} images, so that two half-maps mean something; got {images}"
        )


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


def particles_in(stack: ParticleStack) -> Int[np.ndarray, " n"]:
    """Tell which images of a stack show one particle, by all that is known of it."""
    optics = {} if stack.origin is None else stack.origin.optics
    pixel = np.array([stack.pixel_size_angstrom])
    if MICROGRAPH_PIXEL in optics:
        with contextlib.suppress(TypeError, ValueError):
            told = optics[MICROGRAPH_PIXEL].astype(np.float64)[stack.optics_group]
            pixel = np.where(told > 0, told, pixel)
    return particles_of(
        stack.columns,
        len(stack),
        image=_opened(stack.images),
        picture=getattr(stack.images, "picture", None),
        moved_px=stack.shifts_px * (stack.pixel_size_angstrom / pixel)[:, None],
        near_px=max(NEAR_PX, NEAR_ANGSTROM / float(pixel.max())),
    )


def shared_particles(stack: ParticleStack) -> Int[np.ndarray, "k 2"]:
    """Rows of the particles that are in both halves of a stack; see :func:`split_particles`."""
    if stack.half_set is None:
        return np.zeros((0, 2), int)
    return split_particles(particles_in(stack), stack.half_set)


def unshared(stack: Stack) -> Stack:
    """The stack, without halves where they share particles: before orientations are found anew."""
    return stack.replace(half_set=None) if len(shared_particles(stack)) else stack


def particles_of(
    columns: Mapping[str, np.ndarray],
    n: int,
    *,
    image: Int[np.ndarray, " n"] | None = None,
    picture: Int[np.ndarray, " n"] | None = None,
    moved_px: np.ndarray | float = 0.0,
    near_px: float = NEAR_PX,
) -> Int[np.ndarray, " n"]:
    """Tell which rows of a particle file are of one particle: (n,) ints, alike where they are.

    Rows of one image, by its file or else its name, or of one original image; of one identifier;
    or of one place: the same micrograph, and nearer than any two particles are.

    Parameters
    ----------
    columns : dict of str to (n,) arrays
    n : int
    image : (n,) int array, optional
        Alike where rows are of one image of one opened file, whatever its names; by default names
        are compared.
    picture : (n,) int array, optional
        Alike where images are, pixel by pixel.
    moved_px : (n, 2) array, optional
        Where each particle lies from its coordinates, pixels of the micrograph.
    near_px : float
        Of the micrograph, within which two images show one particle.
    """
    edges = []
    if image is None and "rlnImageName" in columns:
        image = _images(columns["rlnImageName"])
    edges += [_alike(numbers) for numbers in (image, picture) if numbers is not None]
    for name, alike in (("rlnImageOriginalName", _images), ("uid", _numbered)):
        if name in columns:
            known = np.flatnonzero(~np.isin(columns[name].astype(str), NOTHING))
            edges.append(known[_alike(alike(columns[name][known]))])
    if "rlnMicrographName" in columns and all(name in columns for name in PLACE):
        edges.append(_near(columns, moved_px, near_px, image))
    return _held_together(n, np.concatenate([np.zeros((2, 0), int), *edges], axis=1))


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
    """Numbers of image names, alike for ``1@a.mrcs`` and ``000001@./a.mrcs``, ``a`` and ``1@a``."""
    stacks: dict[str, str] = {}
    known: dict[tuple[str, str], int] = {}
    found = []
    for name in map(str, names):
        digits, stack = image_of(name)
        if stack not in stacks:
            stacks[stack] = os.path.normpath(stack)
        found.append(known.setdefault((digits.lstrip("0") or "1", stacks[stack]), len(known)))
    return np.array(found, int)


def _numbered(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]


def _opened(images: Any) -> np.ndarray | None:
    """Numbers of the images of opened files, alike whatever links and folders name them by."""
    if not hasattr(images, "layouts"):
        return None
    places = [
        (status.st_dev, status.st_ino) for status in (os.stat(at.path) for at in images.layouts)
    ]
    number = {place: i for i, place in enumerate(dict.fromkeys(places))}
    file = np.array([number[place] for place in places], np.int64)[images.file]
    return file << 32 | images.section


def _micrographs(names: np.ndarray) -> np.ndarray:
    """Numbers of micrographs, alike for ``M/m.mrc``, ``./M/m.mrc`` and ``/x/M/m.mrc``."""
    distinct, which = np.unique(names, return_inverse=True)
    parts = [Path(os.path.normpath(name)).parts for name in distinct]
    parts = [tuple(part for part in one if part != "..") for one in parts]
    told = {one for one in parts if one[:1] != ("/",)}
    found: dict[tuple[str, ...], int] = {}
    numbers = []
    for one in parts:
        ends = (one[i:] for i in range(len(one)) if one[i:] in told)
        numbers.append(found.setdefault(next(ends, one), len(found)))
    return np.array(numbers, int)[which]


def _alike(numbers: np.ndarray) -> np.ndarray:
    """Pairs of rows of the same number that hold together all that have it, (2, m)."""
    order = np.argsort(numbers, kind="stable")
    same = numbers[order[1:]] == numbers[order[:-1]]
    return np.stack([order[:-1][same], order[1:][same]])


def _near(
    columns: Mapping[str, np.ndarray],
    moved_px: np.ndarray | float,
    near_px: float,
    image: np.ndarray | None,
) -> np.ndarray:
    """Pairs of rows that hold together those of one place, (2, m)."""
    from scipy.spatial import KDTree

    try:
        place = np.stack([columns[name].astype(np.float64) for name in PLACE], axis=1)
    except (TypeError, ValueError):
        return np.zeros((2, 0), int)
    # No box fits about a corner: zeros are where nothing was known.
    rows = np.flatnonzero(np.isfinite(place).all(axis=1) & place.any(axis=1))
    if image is not None:  # one image is one particle already
        rows = rows[np.unique(image[rows], return_index=True)[1]]
    micrograph = _micrographs(columns["rlnMicrographName"][rows].astype(str))
    at = np.column_stack([(place + moved_px)[rows], micrograph * 1e7])
    distinct, where = np.unique(at, axis=0, return_inverse=True)
    if len(distinct) < 2:
        return np.zeros((2, 0), int)
    first = np.zeros(len(distinct), int)
    first[where[::-1]] = rows[::-1]
    tree = KDTree(distinct)
    helical = any(name == HELICAL[0] or name.startswith(HELICAL[1]) for name in columns)
    apart = tree.query_pairs(SAME_PX if helical else near_px, output_type="ndarray")
    if _held_together(len(distinct), apart.T).max() + 1 < CHAINED * len(distinct):  # no pairs
        apart = tree.query_pairs(SAME_PX, output_type="ndarray")
    return np.concatenate([rows[_alike(where)], first[apart.T]], axis=1)


def _held_together(n: int, edges: np.ndarray) -> np.ndarray:
    """Numbers of ``n`` things, (n,), alike where edges, (2, m), hold them together."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not edges.size:
        return np.arange(n)
    graph = coo_array((np.ones(edges.shape[1], bool), tuple(edges)), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1])
