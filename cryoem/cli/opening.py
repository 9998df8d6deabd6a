"""Particles and maps as commands take them: opened, looked at, turned; and what is said of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from .. import threads
from ..errors import InputError, UnusableImages
from .options import say

if TYPE_CHECKING:
    from ..density import Density
    from ..io.stacks import ImageStack
    from ..particles import ParticleStack
    from ..single_images import ImageStatistics
    from ..surveying import Survey

__all__ = [
    "bad_told",
    "by_file",
    "check_views",
    "contrasts_told",
    "looked_at",
    "open_map",
    "open_oriented",
    "open_particles",
    "prepared",
]

#: Pixels of images that are looked at together.
AT_ONCE = 1 << 22
#: How many times louder than others images of an optics group are said to be.
UNLIKE = 3.0
#: Particles of which not all are seen from one direction.
SEVERAL = 20
#: How many rows, or files, a message lists.
LISTED = 20
#: Solvent that is farther off zero than this share of a map's peak is said to be.
LEVEL = 5e-3


def open_particles(path: Path, quiet: bool, pixel_size: float | None = None) -> ParticleStack:
    """Read a particle file, and say what it holds."""
    from ..io.particles import read_particles

    if path.suffix == ".gz":
        raise InputError(f"{path}: is compressed; wanted it unpacked (gunzip)")
    stack = read_particles(path, pixel_size_angstrom=pixel_size)
    box, pixel = stack.box_px, stack.pixel_size_angstrom
    say(quiet, f"{path}: {len(stack):,} particles of {box} px, {pixel:g} A each")
    return stack


def open_oriented(path: Path, quiet: bool, pixel_size: float | None = None) -> ParticleStack:
    """Read a particle file that has orientations."""
    stack = open_particles(path, quiet, pixel_size)
    if stack.quaternions is None:
        what = "columns rlnAngleRot, rlnAngleTilt, rlnAnglePsi"
        if path.suffix == ".cs":
            what = "field alignments3D/pose"
        raise InputError(f"{path}: no {what}; see orient")
    return stack


def check_views(path: Path, stack: ParticleStack) -> None:
    """Refuse orientations that are none: all of one direction, or angles that are radians."""
    from ..rotations import RELION_ANGLES, view_directions

    if len(stack) < SEVERAL:
        return
    directions = view_directions(stack.oriented())
    if np.linalg.eigvalsh(directions.T @ directions / len(stack))[-1] > 1 - 1e-6:
        raise InputError(
            f"{path}: all {len(stack):,} particles are seen from one direction by their angles, as "
            "after 2D classification; wanted orientations (abinitio and solve need none)"
        )
    told = [stack.columns[name] for name in RELION_ANGLES if name in stack.columns]
    if len(told) == 3 and np.abs(np.array(told, float)).max() <= 2 * np.pi:
        raise InputError(
            f"{path}: no angle of {len(stack):,} particles is beyond 6.28: they look like radians; "
            f"wanted {', '.join(RELION_ANGLES)} in degrees"
        )


def open_map(
    path: Path,
    voxel_size: float | None,
    particles: ParticleStack | None = None,
    *,
    centred: bool = False,
) -> Density:
    """Read a map as a cube, white on black, and say where its header may be wrong for particles.

    ``centred``: moved to the middle, where particles are sought, if what it shows is far off it.
    """
    from ..density import Density, read_density
    from ..surveying import is_black, to_the_middle

    cube = read_density(path, voxel_size_angstrom=voxel_size)
    if np.ptp(cube.values) == 0:
        raise InputError(
            f"{path}: is {cube.values.flat[0]:g} everywhere: no particle is to be seen in it"
        )
    level = cube.solvent_level
    if abs(level) > LEVEL * abs(cube.values - level).max():
        warnings.warn(
            f"{path}: its solvent is at {level:.3g}, not at zero; that is taken off", stacklevel=2
        )
        cube = Density(cube.values - level, cube.voxel_size_angstrom)
    pixel = 1.0 if particles is None else particles.pixel_size_angstrom
    if voxel_size is None and cube.voxel_size_angstrom == 1 and abs(pixel - 1) > 0.01:
        warnings.warn(
            f"{path}: its header says voxels of 1 A, as files do where the size was not told; the "
            f"particles' pixels are {pixel:g} A. See --voxel-size",
            stacklevel=2,
        )
    shape = cube.values.shape
    if len(set(shape)) > 1:
        warnings.warn(
            f"{path}: {' x '.join(map(str, shape[::-1]))} voxels; padded to a cube of {max(shape)} "
            "about their middle",
            stacklevel=2,
        )
        cube = cube.in_box(max(shape))
    if is_black(cube):
        warnings.warn(
            f"{path}: is negative where the particle is, black on white; it is inverted as it is "
            "read",
            stacklevel=2,
        )
        cube = Density(-cube.values, cube.voxel_size_angstrom)
    if centred and (move := to_the_middle(cube, particles)).any():
        voxel = cube.voxel_size_angstrom
        warnings.warn(
            f"{path}: its particle is {voxel * np.linalg.norm(move):.0f} A off the middle of the "
            "box, where particles are looked for; the map is moved there, by x, y, z = "
            f"{', '.join(f'{x * voxel:g}' for x in move[::-1])} A, and results are in that frame",
            stacklevel=2,
        )
        cube = Density(np.roll(cube.values, move, axis=(0, 1, 2)), voxel)
    return cube


def prepared(
    stack: ParticleStack, path: Path | None, invert: bool | None, quiet: bool, seed: int
) -> tuple[ParticleStack, Survey]:
    """Particles that are white on black, on a background of zero; and what some images said.

    Every image is looked at. Turned where the user says so, or where they are black; flattened
    where the background is uneven; refused where some would drown the others.
    """
    from .. import surveying
    from ..io.stacks import ImageStack

    seen, bad = looked_at(stack := stack.divided(), quiet)
    if bad:
        raise InputError(
            f"{path}: {bad_told(stack, bad)}; wanted the others alone, which cryoem info --good "
            "writes, or images that were mended and normalised"
        )
    assert seen is not None  # none was bad
    if seen.same is not None and isinstance(stack.images, ImageStack):
        stack = stack.replace(images=stack.images.with_pictures(seen.same))
    if seen.apart > UNLIKE:
        warnings.warn(
            f"{path}: the images of one optics group are {seen.apart:.2g} times louder than those "
            "of another; wanted images that were normalised alike",
            stacklevel=2,
        )
    if invert is None:
        stack = _turned(stack, path, seen)
    elif invert:
        say(quiet, f"{path}: the images are turned, as --invert says")
        stack = stack.inverted()
    if seen.uneven:
        level, ramp = seen.background
        warnings.warn(
            f"{path}: the background of the images is {level:.2g} standard deviations from zero "
            f"and rises by {ramp:.2g} across them; both are taken off as they are read",
            stacklevel=2,
        )
        stack = stack.flattened()
    found = surveying.survey(stack, images=300, seed=seed)
    if found.masked_fraction > 0:
        what = "their noise is not measured, and a reconstruction takes them for images without any"
        which = "the images"
        if found.masked_fraction <= 0.5:
            masked = round(found.masked_fraction * found.images)
            which = f"{masked} of {found.images} images that were looked at"
            what = "the noise is that of the others, and is told of all"
        warnings.warn(
            f"{path}: the corners of {which} are constant, as where they are masked or padded: "
            f"{what}",
            stacklevel=2,
        )
    return stack, found


def looked_at(
    stack: ParticleStack, quiet: bool
) -> tuple[ImageStatistics | None, dict[str, np.ndarray]]:
    """What each image shows by itself; some are in memory at a time.

    Returns
    -------
    statistics : ImageStatistics or None
        Of the images that are good, in order; None: none is.
    bad : dict of str to (r,) int array
        Rows of the others, by what is wrong with them.
    """
    from tqdm.auto import tqdm

    from ..imaging import check_images
    from ..single_images import FAR, HOT, MOST, ImageStatistics

    bad: dict[str, list[np.ndarray]] = {}

    def look(start: int) -> tuple[np.ndarray, list[ImageStatistics], dict[str, np.ndarray]]:
        part, none = stack.select(slice(start, start + step)), {}
        rows = np.arange(len(part))
        try:
            images = part.images[:]
        except UnusableImages as error:
            none = error.found
            rows = np.setdiff1d(rows, np.concatenate([*none.values()]))
            images = part.images[rows]
        told = 1.0 if part.ctf_parameters is None else part.ctf_parameters.select(rows).scale
        seen = ImageStatistics.of(check_images(images), part.optics_group[rows], told)
        return (
            start + rows,
            [seen] * (len(rows) > 0),
            {what: start + at for what, at in none.items()},
        )

    step = max(1, AT_ONCE // stack.box_px**2)
    good, parts = [], []
    with tqdm(total=len(stack), desc="images", unit="image", disable=quiet) as bar:
        for rows, found, none in threads.each(look, range(0, len(stack), step)):
            good.append(rows)
            parts += found
            for what, which in none.items():
                bad.setdefault(what, []).append(which)
            bar.update(len(rows) + sum(map(len, none.values())))
    told = {what: np.concatenate(rows) for what, rows in bad.items()}
    if not parts:
        return None, told
    seen, rows = ImageStatistics.joined(parts), np.concatenate(good)
    if len(seen.far):
        told[
            f"is over {FAR:g} times louder or fainter than the others, or has a pixel over {HOT:g} "
            f"times as far from the background, or one that holds {MOST:.0%} of its power"
        ] = rows[seen.far]
        seen = seen.select(np.delete(np.arange(len(rows)), seen.far))
    return seen, told


def bad_told(stack: ParticleStack, bad: Mapping[str, np.ndarray]) -> str:
    """Which images are good for nothing, by what is wrong with them."""
    each = "; ".join(f"each {what}: {_listed(stack, rows)}" for what, rows in bad.items())
    return f"{sum(map(len, bad.values())):,} of {len(stack):,} images cannot be used: {each}"


def contrasts_told(stack: ParticleStack, odd: np.ndarray) -> str:
    """Which images are the other way."""
    return (
        f"{len(odd):,} of {len(stack):,} images are black on white where the others are white on "
        f"black, or the reverse: {_listed(stack, odd)}"
    )


def by_file(stack: ParticleStack) -> np.ndarray:
    """Which file each image lies in."""
    return getattr(stack.images, "file", np.zeros(len(stack), int))


def _turned(stack: ParticleStack, path: Path | None, seen: ImageStatistics) -> ParticleStack:
    """The stack, white on black: what is black turned, where that is certain."""
    from ..io.cryosparc import called

    sign, odd, mixed = seen.contrasts(by_file(stack))
    if mixed:
        warnings.warn(
            f"{path}: {contrasts_told(stack, odd)}: either particles are dark in the middle in "
            "some views, or the contrasts are mixed, and the map will be wrong; a "
            f"{called(path, 'cryoemSign')} (1, or -1: black) tells them apart",
            stacklevel=3,
        )
    elif len(odd):
        warnings.warn(f"{path}: {contrasts_told(stack, odd)}; they stay as they are", stacklevel=3)
    if not sign.any():
        warnings.warn(
            f"{path}: whether the particles are white or black is not to be told; they are taken "
            "for white on black (--invert: turned)",
            stacklevel=3,
        )
    if len(black := np.flatnonzero(sign < 0)):
        every = len(black) == len(stack)
        which = "the" if every else f"{len(black):,} of {len(stack):,}"
        warnings.warn(
            f"{path}: {which} particles are black on white"
            f"{'' if every else f' ({_listed(stack, black)})'}; their images are turned as they "
            "are read (--no-invert: taken as they are)",
            stacklevel=3,
        )
        images = cast("ImageStack", stack.images)
        before = 1 if images.sign is None else images.sign
        stack = stack.replace(images=images.with_sign(np.where(sign < 0, -1, 1) * before))
    return stack


def _listed(stack: ParticleStack, rows: np.ndarray) -> str:
    """Rows, and the files that their images lie in: the first of each."""
    from ..io.stacks import ImageStack

    def first(what: str, values: Sequence[object]) -> str:
        more = f" and {len(values) - LISTED:,} more" if len(values) > LISTED else ""
        return f"{what}{'s' * (len(values) > 1)} {', '.join(map(str, values[:LISTED]))}{more}"

    if not isinstance(stack.images, ImageStack):
        return first("row", (rows + 1).tolist())
    found = first("row", (stack.images.row[rows] + 1).tolist())
    files = [stack.images.layouts[i].path.name for i in np.unique(stack.images.file[rows])]
    return f"{found} ({first('file', files)})"
