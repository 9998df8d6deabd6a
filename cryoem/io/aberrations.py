"""Aberrations in particle files: beam tilt, Zernike coefficients, the magnification matrix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..aberrations import UNITY, Aberration, beam_tilt
from ..errors import InputError
from ..imaging import wavelength_angstrom
from .star import Table, length, numbers_of

__all__ = [
    "EVEN",
    "UNDONE",
    "aberration_columns",
    "aberrations",
    "coefficient_column",
    "even_zernike",
    "forget_aberrations",
    "magnified",
]

#: Aberrations beyond the CTF's: the beam's tilt, mrad; coefficients of Zernike polynomials, in
#: radians; the magnification matrix.
TILT = ("rlnBeamTiltX", "rlnBeamTiltY")
ODD, EVEN = "rlnOddZernike", "rlnEvenZernike"
MAGNIFICATION = ("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11")
#: Those that are undone on the images as they are read, and what they say where there is none.
UNDONE = {
    **dict.fromkeys(TILT, 0.0),
    ODD: 0.0,
    **dict(zip(MAGNIFICATION, UNITY, strict=True)),
}
#: What a file says where it has no value.
NOTHING = ("", "none", "<na>", "nan", "null")


def aberrations(
    path: Path, optics: Table, table: Table, group: np.ndarray, pixel_size: float
) -> tuple[list[Aberration], np.ndarray]:
    """What is to be undone on the images, and which of it each has, (n,) int array, -1: none."""
    where, columns, which = _where_told(path, optics, table, group, UNDONE)
    if not columns:
        return [], np.full(len(group), -1)
    tilt = np.stack([_number(where, columns, name, 0.0) for name in TILT], axis=1)
    matrix = np.stack(
        [_number(where, columns, *one) for one in zip(MAGNIFICATION, UNITY, strict=True)], axis=1
    )
    odd = _coefficients(where, columns, ODD)
    if tilt.any():
        odd = np.pad(odd, ((0, 0), (0, max(0, 6 - odd.shape[1]))))
        odd[:, :6] += _tilted(path, optics, table, group, tilt, which)
    told = np.hstack([matrix, odd])
    unique, number = np.unique(told, axis=0, return_inverse=True)
    row_of = number.ravel()[which]
    found: list[Aberration] = []
    place = np.full(len(unique), -1)
    for i, (m00, m01, m10, m11, *phases) in enumerate(unique.tolist()):
        magnification = (m00, m01, m10, m11)
        if not any(phases) and magnification == UNITY:
            continue
        place[i] = len(found)
        try:
            found.append(Aberration(pixel_size, tuple(phases), magnification))
        except InputError as error:
            first = int(np.argmax(row_of == i))
            raise InputError(f"{path}: row {first + 1}, rlnMagMat00 to 11: {error}") from error
    return found, place[row_of]


def even_zernike(
    path: Path, optics: Table, table: Table, group: np.ndarray
) -> np.ndarray | tuple[float, ...]:
    """Coefficients of each particle's symmetric aberrations, (n, c), or none."""
    where, columns, which = _where_told(path, optics, table, group, [EVEN])
    found = _coefficients(where, columns, EVEN) if columns else np.zeros(0)
    return found[which] if found.any() else ()


def aberration_columns(found: Sequence[Aberration], which: np.ndarray) -> Table:
    """Columns that say what is to be undone on images."""
    each = [Aberration(1.0) if i < 0 else found[i] for i in which]
    widest = max(len(aberration.odd) for aberration in each)
    odd = np.array([(*a.odd, *[0.0] * (widest - len(a.odd))) for a in each])
    matrices = np.array([aberration.magnification for aberration in each])
    return {ODD: coefficient_column(odd), **dict(zip(MAGNIFICATION, matrices.T, strict=True))}


def coefficient_column(coefficients: np.ndarray) -> np.ndarray:
    """The column that says coefficients, (rows, c)."""
    return np.array([f"[{','.join(map(repr, row.tolist()))}]" for row in coefficients], object)


def _tilted(
    path: Path,
    optics: Table,
    table: Table,
    group: np.ndarray,
    tilt: np.ndarray,
    which: np.ndarray,
) -> np.ndarray:
    """The odd coefficients of tilts of the beam, (rows, 6)."""
    microscope = np.ones((2, len(tilt)))
    for values, name in zip(microscope, ("rlnSphericalAberration", "rlnVoltage"), strict=True):
        found = numbers_of(path, optics, table, group, name)
        if found is None:
            raise InputError(f"{path}: has a beam tilt, but no column {name}")
        values[which] = found
    tilted = zip(tilt, microscope[0], wavelength_angstrom(microscope[1]), strict=True)
    return np.array([beam_tilt(x, y, aberration, length) for (x, y), aberration, length in tilted])


def _where_told(
    path: Path, optics: Table, table: Table, group: np.ndarray, names: Iterable[str]
) -> tuple[str, Table, np.ndarray]:
    """Columns of some names, of the optics groups or of all particles, and each particle's row."""
    if not any(name in table for name in names):
        found = {name: optics[name] for name in names if name in optics}
        return f"{path}: data_optics", found, group
    found = {name: optics[name][group] for name in names if name in optics}
    found |= {name: table[name] for name in names if name in table}
    return str(path), found, np.arange(len(group))


def _coefficients(where: str, columns: Table, name: str, usual: float = 0.0) -> np.ndarray:
    """The numbers of a column, lists such as ``[0,0.5]`` among them: (rows, c), at least one."""
    if name not in columns:
        return np.full((length(columns), 1), usual)
    if columns[name].dtype.kind in "iuf":
        return columns[name].astype(np.float64)[:, None]
    lists = []
    for row, text in enumerate(map(str, columns[name])):
        words = [w for w in re.split(r"[\s,\[\]()]+", text) if w.lower() not in NOTHING]
        try:
            lists.append([float(word) for word in words])
        except ValueError:
            lists.append([np.nan])
        if not np.isfinite(lists[-1]).all():
            raise InputError(
                f"{where}: row {row + 1}, column {name}: got {text}, wanted numbers such as [0,0.5]"
            )
    found = np.full((len(lists), max([1, *map(len, lists)])), usual)
    for row, values in enumerate(lists):
        found[row, : len(values)] = values
    return found


def _number(where: str, columns: Table, name: str, usual: float) -> np.ndarray:
    """A column of one number a row, (rows,), what is usual where it says nothing."""
    found = _coefficients(where, columns, name, usual)
    if found.shape[1] > 1:
        row = int(np.argmax((found[:, 1:] != usual).any(axis=1)))
        raise InputError(
            f"{where}: row {row + 1}, column {name}: got {columns[name][row]}, wanted a number"
        )
    return found[:, 0]


def magnified(
    shifts_px: np.ndarray, found: Sequence[Aberration], which: np.ndarray, *, undo: bool = False
) -> np.ndarray:
    """Shifts of particles as a microscope with these aberrations sees them, or the reverse."""
    shifts_px = shifts_px.copy()
    for i, aberration in enumerate(found):
        matrix = np.linalg.inv(aberration.matrix) if undo else aberration.matrix
        shifts_px[which == i] = shifts_px[which == i] @ matrix
    return shifts_px


def forget_aberrations(*tables: Table) -> None:
    """Take out what was undone on images that are written anew."""
    for told in tables:
        for name in UNDONE:
            told.pop(name, None)
