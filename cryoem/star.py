"""Particles as RELION 3.1 STAR files with their image stacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from . import files, rotations
from .errors import InputError
from .files import PathLike
from .projection import check_images

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ParticleSet", "read_particles", "write_particles"]


@dataclass(frozen=True)
class ParticleSet:
    """A STAR file's particles.

    Attributes
    ----------
    images : (n, size, size) array
        Memory-mapped: read from the stack when they are used.
    quaternions : (n, 4) array, unit, xyzw
        The identity where the file has no angles.
    shifts_px : (n, 2) array, pixels
        Where each particle was moved to, (x, y): the opposite of the file's origins, which are
        what centres it.
    pixel_size_angstrom : float
    table : pandas.DataFrame
        The block ``particles`` as it stands.
    """

    images: np.ndarray
    quaternions: np.ndarray
    shifts_px: np.ndarray
    pixel_size_angstrom: float
    table: pd.DataFrame


def write_particles(
    path: PathLike,
    images: ArrayLike,
    quaternions: ArrayLike,
    *,
    pixel_size_angstrom: float,
    shifts_px: ArrayLike | None = None,
    columns: Mapping[str, ArrayLike] | None = None,
) -> Path:
    """Write particles: ``path`` (STAR) and the stack beside it (``.mrcs``), each atomically.

    The optics block names a usual microscope (300 kV, 2.7 mm, amplitude contrast 0.1) because
    RELION wants one; without defocus columns the images carry no CTF.

    Parameters
    ----------
    path : path ending in ``.star``
    images : (n, size, size) array
    quaternions : (n, 4) array, unit, xyzw
    pixel_size_angstrom : float
    shifts_px : (n, 2) array, optional
        Where each particle was moved to, (x, y).
    columns : dict of str to (n,) arrays, optional
        Further columns, by their names in the file.

    Returns
    -------
    Path
        Of the stack.
    """
    import mrcfile
    import pandas as pd
    import starfile

    path = Path(path)
    if path.suffix != ".star":
        raise InputError(f"{path}: particles are written to a file that ends in .star")
    images, q = check_images(images), rotations.check(quaternions)
    if len(images) != len(q) or len(q) == 0:
        raise InputError(
            f"{len(images)} images but {len(q)} quaternions; wanted at least one of each"
        )
    shifts = np.zeros((len(q), 2)) if shifts_px is None else np.asarray(shifts_px, float)
    if shifts.shape != (len(q), 2):
        raise InputError(f"shifts_px must have shape ({len(q)}, 2), got {shifts.shape}")
    for name, values in (columns or {}).items():
        if np.shape(values) != (len(q),):
            raise InputError(f"column {name} must hold {len(q)} values, got {np.shape(values)}")
    if not (np.isfinite(pixel_size_angstrom) and pixel_size_angstrom > 0):
        raise InputError(f"pixel_size_angstrom must be positive, got {pixel_size_angstrom}")
    stack = path.with_suffix(".mrcs")
    rot, tilt, psi = rotations.to_relion(q).T
    optics = pd.DataFrame(
        {
            "rlnOpticsGroup": [1],
            "rlnOpticsGroupName": ["opticsGroup1"],
            "rlnVoltage": [300.0],
            "rlnSphericalAberration": [2.7],
            "rlnAmplitudeContrast": [0.1],
            "rlnImagePixelSize": [pixel_size_angstrom],
            "rlnImageSize": [images.shape[1]],
            "rlnImageDimensionality": [2],
        }
    )
    particles = pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@{stack.name}" for i in range(len(q))],
            "rlnOpticsGroup": 1,
            "rlnAngleRot": rot,
            "rlnAngleTilt": tilt,
            "rlnAnglePsi": psi,
            "rlnOriginXAngst": -shifts[:, 0] * pixel_size_angstrom,
            "rlnOriginYAngst": -shifts[:, 1] * pixel_size_angstrom,
            **(columns or {}),
        }
    )
    with files.atomic(stack) as temporary, mrcfile.new(temporary, overwrite=True) as mrc:
        mrc.set_data(images)
        mrc.set_image_stack()
        mrc.voxel_size = pixel_size_angstrom
    with files.atomic(path) as temporary:
        starfile.write({"optics": optics, "particles": particles}, temporary, overwrite=True)
    return stack


def read_particles(path: PathLike) -> ParticleSet:
    """Read a RELION 3.1 STAR file and its one stack.

    Parameters
    ----------
    path : path to a ``.star`` file
        Image names are relative to its folder or to the working directory.

    Returns
    -------
    ParticleSet

    Raises
    ------
    InputError
        Not such a file, a column or the stack is missing, more than one stack or pixel size, or
        an image number beyond the stack's end.
    """
    import mrcfile
    import starfile

    path = files.existing(path)
    try:
        blocks = starfile.read(path, always_dict=True)
    except Exception as error:  # starfile raises whatever its parser met
        raise InputError(f"{path}: not a readable STAR file ({error})") from error
    for block in ("optics", "particles"):
        if block not in blocks:
            raise InputError(f"{path}: no block data_{block}; wanted a RELION 3.1 file")
    optics, table = blocks["optics"], blocks["particles"]
    for block, wanted in (("optics", "rlnImagePixelSize"), ("particles", "rlnImageName")):
        if wanted not in blocks[block]:
            raise InputError(f"{path}: no column {wanted} in data_{block}")
    if len(table) == 0:
        raise InputError(f"{path}: no particles")
    sizes = np.unique(np.asarray(optics["rlnImagePixelSize"], float))
    if len(sizes) != 1:
        raise InputError(f"{path}: wanted one pixel size, got {sizes} A")
    names = [str(name).partition("@") for name in table["rlnImageName"]]
    bad = [row for row, (number, at, _) in enumerate(names) if not at or not number.isdigit()]
    if bad:
        raise InputError(
            f"{path}: row {bad[0] + 1}: rlnImageName must read 000001@stack.mrcs, "
            f"got {table['rlnImageName'].iloc[bad[0]]!r}"
        )
    stacks = sorted({stack for _, _, stack in names})
    if len(stacks) != 1:
        raise InputError(
            f"{path}: wanted one stack, got {len(stacks)}: {', '.join(stacks[:3])}, ..."
        )
    stack = path.parent / stacks[0]
    stack = stack if stack.exists() else files.existing(stacks[0])
    try:
        with mrcfile.mmap(stack, permissive=True) as mrc:
            data = mrc.data
    except (ValueError, OSError) as error:
        raise InputError(f"{stack}: not a readable image stack ({error})") from error
    if data is None:
        raise InputError(f"{stack}: not a whole image stack")
    data = data[None] if data.ndim == 2 else data
    numbers = np.array([int(number) for number, _, _ in names])
    beyond = np.flatnonzero((numbers < 1) | (numbers > len(data)))
    if len(beyond):
        raise InputError(
            f"{path}: row {beyond[0] + 1} names image {numbers[beyond[0]]} of {stack.name}, "
            f"which holds {len(data)}"
        )
    if not np.array_equal(numbers, np.arange(1, len(data) + 1)):
        data = data[numbers - 1]

    def column(name: str) -> np.ndarray:
        if name not in table:
            return np.zeros(len(table))
        try:
            return np.asarray(table[name], float)
        except ValueError as error:
            raise InputError(f"{path}: column {name} holds what is no number ({error})") from error

    q = rotations.from_relion(*(column(f"rlnAngle{a}") for a in ("Rot", "Tilt", "Psi")))
    origins = np.stack([column("rlnOriginXAngst"), column("rlnOriginYAngst")], axis=1)
    return ParticleSet(data, q, -origins / sizes[0], float(sizes[0]), table)
