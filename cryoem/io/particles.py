"""Particle files: RELION's STAR (3.0 and later) in and out, cryoSPARC's ``.cs`` in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .. import rotations
from ..errors import InputError
from ..half_sets import image_of
from ..particles import CtfParameters, ParticleFile, ParticleStack, files_of
from ..rotations import RELION_ANGLES
from . import files, stacks
from .aberrations import (
    EVEN,
    aberration_columns,
    aberrations,
    coefficient_column,
    forget_aberrations,
    magnified,
)
from .cryosparc import called, named, read_cryosparc
from .files import PathLike
from .names import (
    find_stack,
    folders_of,
    names_from,
    note_header_pixels,
    open_images,
    without_format,
)
from .optics import (
    CTF,
    MICROSCOPE,
    ctf_columns,
    ctf_parameters,
    note_contradictions,
    note_outside,
    note_unused,
    optics_rows,
    pixel_sizes,
    refuse_tomograms,
    same,
    tell_done,
    with_origins,
)
from .stacks import ImageStack, NoImages
from .star import ORIGINS, Table, length, numbers, numbers_of, read_relion, write_star

__all__ = ["read_particles", "write_particles"]

HALF_SET, CONTRAST, EXPECTED = "rlnRandomSubset", "cryoemContrast", "cryoemExpectedErrorRad"
#: What an image that stays where it is is multiplied by, 1 or -1: an optics group's or a row's.
SIGN = "cryoemSign"

SIZE = "rlnImageSize"
#: A half that is smaller than this share of the other is said.
UNEVEN = 0.2

#: Fields of a stack, and the columns without which a file does not tell them.
NEEDED = {
    "quaternions": RELION_ANGLES,
    "ctf_parameters": ("rlnDefocusU", "rlnDefocusV"),
    "half_set": (HALF_SET,),
    "contrast": (CONTRAST,),
    "expected_error_rad": (EXPECTED,),
}


# --------------------------------------------------------------------------------------
# Reading


def read_particles(
    path: PathLike, *, pixel_size_angstrom: float | None = None, images: bool = True
) -> ParticleStack:
    """Read the particles of RELION or cryoSPARC; their images are opened, not read.

    Parameters
    ----------
    path : path to a STAR file, or to a ``.cs`` file
        RELION 3.1 and later, with any number of optics groups; RELION 3.0 (one block, origins in
        pixels). Beside a ``.cs`` file the passthrough file of the same particles is read too,
        where there is one. Image names are relative to the file's folder, to any folder above it
        (RELION's and cryoSPARC's project), or to the working directory. An ``.mrcs`` file
        holds images alone, without a CTF (class averages, say), and so does an ``.npy`` file, an
        (n, size, size) array, by default of pixels of 1 A. Beam tilt, odd Zernike phases and the
        magnification matrix are undone on the images as they are read, and on their shifts.
    pixel_size_angstrom : float, optional
        Of a file that does not say it.
    images : bool
        False: the images need not be there, and cannot be read; their size is 0 where the file
        does not tell it.

    Returns
    -------
    ParticleStack

    Raises
    ------
    InputError
        Naming file, row and column: not such a file, a column or a stack that is missing or cut
        short, images or pixels of several sizes, values that are no numbers or absurd.
    """
    path = files.existing(path)
    if path.suffix in (".npy", ".mrcs"):
        return _images_alone(path, pixel_size_angstrom)
    if path.suffix in (".mrc", ".map"):
        raise InputError(
            f"{path}: a map by its name; wanted particles (.star, .cs) or images alone (.mrcs)"
        )
    optics, table, others = read_cryosparc(path) if path.suffix == ".cs" else read_relion(path)
    if "rlnImageName" not in table:
        raise InputError(f"{path}: no column rlnImageName in data_particles")
    table["rlnImageName"] = without_format(table["rlnImageName"])
    group = optics_rows(path, optics, table)
    refuse_tomograms(path, optics, table, group)
    opened: ImageStack | NoImages
    if images:
        opened = open_images(path, table["rlnImageName"])
        opened = opened.with_sign(_signs(path, optics, table, group))
        _check_sizes(path, optics, group, opened.shape[1])
    else:
        size = numbers(path, optics, SIZE, "data_optics: ")[group[0]] if SIZE in optics else 0
        opened = NoImages(path, len(group), int(size))
    sizes = pixel_sizes(path, optics, table, group, pixel_size_angstrom)
    table = with_origins(path, table, sizes)
    pixel_size = float(sizes[0])
    quaternions, shifts = None, np.zeros((len(group), 2))
    if all(name in table for name in RELION_ANGLES):
        quaternions = rotations.from_relion(*(numbers(path, table, n) for n in RELION_ANGLES))
    if ORIGINS[0] in table:
        shifts = -np.stack([numbers(path, table, n) for n in ORIGINS], axis=1) / pixel_size
    note_outside(path, shifts, opened.shape[1])
    note_unused(path, optics, table)
    note_contradictions(path, optics, table, group)
    found, which = aberrations(path, optics, table, group, pixel_size)
    if isinstance(opened, ImageStack):
        opened = opened.without_aberrations(found, which)
        note_header_pixels(path, opened, pixel_size)
    return ParticleStack(
        opened,
        pixel_size,
        quaternions=quaternions,
        shifts_px=magnified(shifts, found, which, undo=True),
        ctf_parameters=ctf_parameters(path, optics, table, group),
        half_set=_half_set(path, table),
        optics_group=group,
        contrast=numbers(path, table, CONTRAST) if CONTRAST in table else None,
        expected_error_rad=numbers(path, table, EXPECTED) if EXPECTED in table else None,
        columns=table,
        origin=ParticleFile(path, optics, others),
    )


def _images_alone(path: Path, given: float | None) -> ParticleStack:
    """Images of which nothing else is known, not even a CTF."""
    if path.suffix == ".npy":
        return ParticleStack(stacks.open_array(path), 1.0 if given is None else given)
    images = stacks.open_stack(path)
    told = images.layouts[0].pixel_size_angstrom
    if given is None and not told:
        raise InputError(f"{path}: the header gives no pixel size; wanted it, or --pixel-size")
    if given is not None and told and not np.isclose(given, told, rtol=1e-3):
        warnings.warn(
            f"{path}: a pixel size of {given:g} A was given and is used; the header says {told:g}",
            stacklevel=3,
        )
    return ParticleStack(images, told if given is None else given)


def _half_set(path: Path, table: Table) -> np.ndarray | None:
    """The half of each particle, 1 or 2, where the file says it."""
    half_set = numbers(path, table, HALF_SET) if HALF_SET in table else None
    if half_set is not None and (bad := ~np.isin(half_set, (1, 2))).any():
        raise InputError(
            f"{path}: row {np.argmax(bad) + 1}, column {HALF_SET}: got "
            f"{table[HALF_SET][np.argmax(bad)]!s}, wanted 1 or 2"
        )
    counts = np.bincount(np.zeros(0, int) if half_set is None else half_set.astype(int))[1:]
    if len(counts) == 2 and 0 < min(counts) < UNEVEN * max(counts):
        warnings.warn(
            f"{path}: {called(path, HALF_SET)}: {counts[0]:,} particles are in half 1, "
            f"{counts[1]:,} in half 2: their maps are hardly to be compared",
            stacklevel=3,
        )
    return half_set


def _check_sizes(path: Path, optics: Table, group: np.ndarray, size: int) -> None:
    """Refuse optics groups of other images than those that were opened, and add what is missing."""
    for name, wanted in ((SIZE, size), ("rlnImageDimensionality", 2)):
        if name not in optics:
            optics[name] = np.full(length(optics), wanted)
        found = numbers(path, optics, name, "data_optics: ")[group]
        if (bad := found != wanted).any():
            raise InputError(
                f"{path}: row {np.argmax(bad) + 1}: {named(path, name)} is {found[bad][0]:g} in "
                f"its optics group, {wanted} in its stack"
            )


def _signs(path: Path, optics: Table, table: Table, group: np.ndarray) -> np.ndarray | None:
    """What each image is multiplied by, or None where all are as they should be."""
    sign = numbers_of(path, optics, table, group, SIGN)
    if sign is None:
        return None
    if (bad := np.abs(sign) != 1).any():
        raise InputError(
            f"{path}: row {np.argmax(bad) + 1}, column {SIGN}: got {sign[bad][0]:g}, wanted 1 or -1"
        )
    return None if (sign == 1).all() else sign


# --------------------------------------------------------------------------------------
# Writing


def write_particles(path: PathLike, stack: ParticleStack) -> Path | None:
    """Write particles as a RELION 3.1 STAR file, atomically.

    Images that lie in files stay where they are: every row, column and other block of the particle
    file is kept, in order, but for what the stack knows otherwise or no longer knows, and image
    names stay as they are where they can be found from the new file. Images in memory, or in an
    ``.npy`` file, are written beside it, to a stack of the same name (``.mrcs``), without the
    aberrations that were undone as they were read.

    Parameters
    ----------
    path : path ending in ``.star``
    stack : ParticleStack

    Returns
    -------
    Path or None
        Of the stack, where one was written.
    """
    path = Path(path)
    if path.suffix != ".star":
        raise InputError(f"{path}: particles are written to a file that ends in .star")
    if len(stack) == 0:
        raise InputError(f"{path}: no particles to write; wanted at least one")
    optics = _optics(path, stack)
    table = dict(stack.columns)
    if stack.origin is None:  # these come first, as RELION writes them
        first = np.zeros(0)
        table = {"rlnImageName": first, "rlnOpticsGroup": first, **table}
    for name in [*_unknown(stack, optics)]:
        table.pop(name, None)
        optics.pop(name, None)
    table.update(_known_columns(stack, optics))
    blocks = {"optics": optics, "particles": table}
    others = () if stack.origin is None else stack.origin.other_blocks
    _tell_signs(path, stack, optics, table)
    tell_done(path, stack, optics, table)
    if isinstance(stack.images, ImageStack) and not stack.images.is_array:
        table["rlnImageName"] = names_from(path, stack.images, stack.columns.get("rlnImageName"))
        write_star(path, blocks, others)
        return None
    import mrcfile

    forget_aberrations(optics, table)

    beside = path.with_suffix(".mrcs")
    _refuse_to_overwrite(beside, stack)
    numbered = [f"{i + 1:06d}@{beside.name}" for i in range(len(stack))]
    table["rlnImageName"] = np.array(numbered, object)
    # Neither replaces its predecessor before both are whole.
    with files.atomic(beside) as temporary:
        with mrcfile.new(temporary, overwrite=True) as mrc:
            mrc.set_data(np.asarray(stack.images, np.float32))
            mrc.set_image_stack()
            mrc.voxel_size = stack.pixel_size_angstrom
        write_star(path, blocks, others)
    return beside


def _tell_signs(path: Path, stack: ParticleStack, optics: Table, table: Table) -> None:
    """Write the signs of images that stay where they are: of optics groups, where that does."""
    group, signs = stack.optics_group, np.ones(len(stack), int)
    if not isinstance(stack.images, ImageStack) or stack.images.is_array:
        table.pop(SIGN, None)
        optics.pop(SIGN, None)
        return
    if stack.images.sign is not None:
        signs = stack.images.sign.astype(int)
    of_groups = np.array(optics.get(SIGN, np.ones(length(optics))), float).astype(int)
    of_groups[group] = signs
    if SIGN in table or (of_groups[group] != signs).any():
        table[SIGN] = signs
        optics.pop(SIGN, None)
    elif SIGN in optics or (signs < 0).any():
        optics[SIGN] = of_groups
    if turned := int((signs < 0).sum()):
        warnings.warn(
            f"{path}: the files of {turned:,} of {len(stack):,} images show black particles on "
            f"white and stay as they are; column {SIGN} says so, which RELION does not know: "
            "invert them first for RELION",
            stacklevel=3,
        )


def _refuse_to_overwrite(beside: Path, stack: ParticleStack) -> None:
    """Refuse a stack that holds the images which the particles came from."""
    if not beside.exists():
        return
    made_from = [*stack.made_from, *files_of(stack.images)]
    if stack.origin is not None:  # images may have been given to particles read without theirs
        folders = [*folders_of(stack.origin.path), Path.cwd()]
        names = {image_of(str(n))[1] for n in stack.columns.get("rlnImageName", ())}
        made_from += [found for name in names if (found := find_stack(name, folders))]
    if any(path.exists() and path.samefile(beside) for path in made_from):
        whose = "" if stack.origin is None else f" of {stack.origin.path}"
        raise InputError(
            f"{beside}: holds the images{whose} that these were made from, and would be "
            "overwritten; wanted another name for the STAR file"
        )


def _unknown(stack: ParticleStack, optics: Table) -> Iterator[str]:
    """Columns of what the file told and the stack no longer knows."""
    for field, names in NEEDED.items():
        if getattr(stack, field) is None and {*names} <= {*stack.columns, *optics}:
            yield from names


def _known_columns(stack: ParticleStack, optics: Table) -> Table:
    """What the stack knows of each particle, as columns of its file.

    What a column says already stays as it stands there, to the last digit.
    """
    new: Table = {}
    grouped = stack.origin is None or "rlnOpticsGroup" in stack.columns
    if grouped and "rlnOpticsGroup" in optics:
        new["rlnOpticsGroup"] = optics["rlnOpticsGroup"][stack.optics_group]
    if stack.quaternions is not None and not _same_angles(stack):
        angles = rotations.to_relion(stack.quaternions)
        new.update(zip(RELION_ANGLES, angles.T, strict=True))
    told = stack.quaternions is not None and stack.origin is None
    if told or stack.shifts_px.any() or any(name in stack.columns for name in ORIGINS):
        # What is added to centre each particle, in angstrom; without negative zeros.
        origins = -_shifts_as_seen(stack) * stack.pixel_size_angstrom + 0.0
        new.update(zip(ORIGINS, origins.T, strict=True))
    pixel = stack.columns.get("rlnImagePixelSize")
    if pixel is not None and not np.allclose(
        pixel.astype(float), stack.pixel_size_angstrom, rtol=1e-3
    ):
        new["rlnImagePixelSize"] = np.full(len(stack), stack.pixel_size_angstrom)
    if stack.ctf_parameters is not None:
        new.update(ctf_columns(stack, stack.ctf_parameters, optics))
    for name, value in (
        (HALF_SET, stack.half_set),
        (CONTRAST, stack.contrast),
        (EXPECTED, stack.expected_error_rad),
    ):
        if value is not None:
            new[name] = value
    before = stack.columns
    return {
        name: before[name] if name in before and same(before[name], values) else values
        for name, values in new.items()
    }


def _shifts_as_seen(stack: ParticleStack) -> np.ndarray:
    """Shifts in the images as they are written: those in files with their aberrations."""
    images = stack.images
    if not isinstance(images, ImageStack) or images.is_array:
        return stack.shifts_px
    return magnified(stack.shifts_px, images.aberrations, images.aberration)


def _same_angles(stack: ParticleStack) -> bool:
    if not all(name in stack.columns for name in RELION_ANGLES):
        return False
    try:
        before = rotations.from_relion(*(stack.columns[name] for name in RELION_ANGLES))
    except (TypeError, ValueError):
        return False
    return bool((rotations.distance(before, stack.oriented()) < 1e-12).all())


def _optics(path: Path, stack: ParticleStack) -> Table:
    """The table of optics groups: the file's, with what the stack knows otherwise, or a new one."""
    group, parameters = stack.optics_group, stack.ctf_parameters
    if stack.origin is not None:
        table = dict(stack.origin.optics)
    else:
        number = np.arange(group.max() + 1) + 1
        names = np.array([f"opticsGroup{i}" for i in number], object)
        table = {"rlnOpticsGroup": number, "rlnOpticsGroupName": names}
        parameters = parameters or CtfParameters(np.zeros(len(stack)))
    groups = length(table)
    if group.max() >= groups:
        raise InputError(f"{path}: optics_group {group.max()} of {groups} groups, counted from 0")
    first = np.array([np.argmax(group == g) for g in range(groups)])
    for name in MICROSCOPE if parameters is not None else ():
        values = getattr(parameters, CTF[name][0])
        if stack.origin is None or name not in stack.columns:
            _check_alike(path, name, values, first[group])
        elif name not in table:
            continue
        if name not in table or not same(table[name][group], values):
            table[name] = values[first]
    if stack.origin is None:
        table.update(_new_aberrations(path, stack, first))
    pixel = stack.pixel_size_angstrom
    sizes = np.asarray(table.get("rlnImagePixelSize", np.zeros(groups)), float)
    # Groups may differ in the fourth digit, and stay as they are.
    if pixel not in sizes or not np.allclose(sizes[group], pixel, rtol=1e-4):
        table["rlnImagePixelSize"] = np.full(groups, pixel)
    for name, size in (("rlnImageSize", stack.box_px), ("rlnImageDimensionality", 2)):
        if name not in table or not same(table[name][group], np.full(len(stack), size)):
            table[name] = np.full(groups, size)
    return table


def _new_aberrations(path: Path, stack: ParticleStack, first: np.ndarray) -> Table:
    """Aberrations of a new table of optics groups, whose first particles these are."""
    group, images, parameters = stack.optics_group, stack.images, stack.ctf_parameters
    columns: Table = {}
    if parameters is not None and np.any(parameters.even_zernike):
        columns[EVEN] = coefficient_column(np.asarray(parameters.even_zernike))
    if isinstance(images, ImageStack) and not images.is_array and images.aberrations:
        columns |= aberration_columns(images.aberrations, images.aberration)
    for name, values in columns.items():
        _check_alike(path, name, values, first[group])
    return {name: values[first] for name, values in columns.items()}


def _check_alike(path: Path, name: str, values: np.ndarray, first: np.ndarray) -> None:
    """Refuse what is another than that of the first particle of its optics group."""
    if (bad := values != values[first]).any():
        kind = "g" if values.dtype.kind == "f" else ""
        raise InputError(
            f"{path}: row {np.argmax(bad) + 1}: {name} is {values[bad][0]:{kind}}, and "
            f"{values[first][bad][0]:{kind}} for others of its optics group"
        )
