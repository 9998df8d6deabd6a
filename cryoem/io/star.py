"""STAR files: tables of named columns, read and written with every digit.

A table is a dict of columns in the order of the file. A column holds numbers where that loses
nothing, and text elsewhere. RELION 3.0's particles are brought into the form of RELION 3.1: a table
of particles and one of optics groups.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError
from . import files
from .files import PathLike

if TYPE_CHECKING:
    import gemmi

__all__ = [
    "ORIGINS",
    "Table",
    "length",
    "numbers",
    "read_relion",
    "split_optics",
    "texts",
    "write_star",
]

#: Columns by name, all of one length.
Table = dict[str, np.ndarray]

ORIGINS = ("rlnOriginXAngst", "rlnOriginYAngst")

#: Columns that RELION 3.1 keeps once an optics group, and 3.0 on every row.
OPTICS = (
    "rlnVoltage",
    "rlnSphericalAberration",
    "rlnAmplitudeContrast",
    "rlnDetectorPixelSize",
    "rlnMagnification",
    "rlnImagePixelSize",
)

#: What a column may hold; beyond it a unit or a column has been mistaken.
BOUNDS = {
    "rlnVoltage": (10.0, 2000.0),
    "rlnSphericalAberration": (0.0, 100.0),
    "rlnAmplitudeContrast": (0.0, 0.999),
    "rlnDefocusU": (-2e5, 2e5),
    "rlnDefocusV": (-2e5, 2e5),
    "rlnImagePixelSize": (1e-2, 1e3),
    "rlnDetectorPixelSize": (1e-6, 1e3),
    "rlnMagnification": (1.0, 1e8),
    "rlnCtfScalefactor": (1e-6, 1e6),
}


def length(table: Mapping[str, np.ndarray]) -> int:
    """Number of rows of a table."""
    return len(next(iter(table.values()))) if table else 0


def numbers(path: Path, table: Mapping[str, np.ndarray], name: str, block: str = "") -> np.ndarray:
    """A column as an (n,) float64 array, finite and within its bounds.

    Raises
    ------
    InputError
        Naming file, block, row and column.
    """
    low, high = BOUNDS.get(name, (-np.inf, np.inf))
    column = table[name]
    values = np.full(len(column), np.nan)
    try:
        values[:] = column
        bad = ~(np.isfinite(values) & (values >= low) & (values <= high))
    except (ValueError, TypeError):
        bad = np.array([not _is_number(value) for value in column])
    if bad.any():
        row = int(np.argmax(bad))
        raise InputError(
            f"{path}: {block}row {row + 1}, column {name}: got {column[row]!s}, wanted a number"
            + (f" between {low:g} and {high:g}" if np.isfinite(low) else "")
        )
    return values


def _is_number(value: object) -> bool:
    try:
        return bool(np.isfinite(float(str(value))))
    except ValueError:
        return False


# --------------------------------------------------------------------------------------
# Writing


def write_star(
    path: PathLike, blocks: Mapping[str, Mapping[str, ArrayLike]], others: Iterable[str] = ()
) -> None:
    """Write a STAR file atomically, every number with all its digits.

    Parameters
    ----------
    path : path
    blocks : dict of str to tables
        Each becomes a loop of the block ``data_NAME``.
    others : list of str
        Further blocks, as they stand.
    """
    with (
        files.atomic(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as file,
    ):
        for name, table in blocks.items():
            file.write(f"\n# version 30001\n\ndata_{name}\n\nloop_\n")
            file.writelines(f"_{column} #{i + 1}\n" for i, column in enumerate(table))
            columns = [texts(np.asarray(column)) for column in table.values()]
            file.writelines("\t".join(row) + "\n" for row in zip(*columns, strict=True))
            file.write("\n")
        for block in others:
            file.write(f"\n{block}\n")


def texts(values: np.ndarray) -> list[str]:
    """Values as they stand in a STAR file: shortest decimals, quotation marks where needed."""
    if values.dtype.kind in "iuf":
        return [str(value) for value in (values.tolist() if values.itemsize == 8 else values)]
    return [text if _PLAIN.fullmatch(text) else _quoted(text) for text in map(str, values)]


#: What needs no quotation marks.
_PLAIN = re.compile(r"""[^\s_#$'";\[\]]\S*""")


def _quoted(text: str) -> str:
    for mark in "\"'":
        if mark not in text and len(text.splitlines()) < 2:
            return mark + text + mark
    raise InputError(
        f"{text!r} cannot stand in a STAR file: it holds both quotation marks or lines"
    )


# --------------------------------------------------------------------------------------
# Reading


def read_relion(path: Path) -> tuple[Table, Table, tuple[str, ...]]:
    """Read RELION's particles of any version.

    Returns
    -------
    optics, particles : Table
    others : tuple of str
        The other blocks, as they stand.
    """
    from gemmi import cif

    try:
        raw = path.read_text("utf-8").encode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a readable STAR file ({error})") from error
    # gemmi reads ASCII; other characters go through it in disguise.
    disguised = not raw.isascii()
    if disguised:
        raw = urllib.parse.quote_from_bytes(raw, safe=_ASCII).encode()
    try:
        blocks = {block.name.strip(): block for block in cif.read_string(raw)}
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a readable STAR file ({error})") from error
    name = "particles"
    if name not in blocks and "optics" not in blocks:  # RELION 3.0: one block of any name
        named = [n for n, b in blocks.items() if b.find_loop("_rlnImageName")]
        if len(named) != 1:
            if b"_cisTEM" in raw:
                raise InputError(
                    f"{path}: particles of cisTEM, whose names of images are not RELION's; wanted "
                    "RELION's particles, as cisTEM exports them, or cryoSPARC's"
                )
            raise InputError(
                f"{path}: no block data_particles; wanted RELION's particles, got "
                f"{', '.join('data_' + n for n in blocks) or 'an empty file'}"
            )
        name = named[0]
    for wanted in {name, "optics"} if "optics" in blocks else {name}:
        if wanted not in blocks:
            raise InputError(f"{path}: no block data_{wanted}; wanted a RELION 3.1 file")
    particles = _table(path, blocks.pop(name), disguised)
    if length(particles) == 0:
        raise InputError(f"{path}: no particles")
    if "optics" not in blocks:
        optics, particles = split_optics(particles)
    else:
        optics = _table(path, blocks.pop("optics"), disguised)
        if length(optics) == 0:
            raise InputError(f"{path}: data_optics is empty")
    others = [block.as_string().strip() + "\n" for block in blocks.values()]
    return optics, particles, tuple(map(_undisguised, others) if disguised else others)


_ASCII = bytes(c for c in range(128) if c != ord("%"))


def _undisguised(text: str) -> str:
    return urllib.parse.unquote(text)


def _table(path: Path, block: gemmi.cif.Block, disguised: bool) -> Table:
    """A block's loop, or its pairs as one row."""
    columns: dict[str, list[str]] = {}
    for item in block:
        if item.loop is not None:
            width, values = item.loop.width(), list(item.loop.values)
            columns.update({tag: values[i::width] for i, tag in enumerate(item.loop.tags)})
        elif item.pair is not None:
            columns[item.pair[0]] = [item.pair[1]]
    if len({len(column) for column in columns.values()}) > 1:
        raise InputError(f"{path}: data_{block.name} holds several tables; wanted one")
    return {tag[1:]: _typed(column, disguised) for tag, column in columns.items()}


def _typed(values: list[str], disguised: bool = False) -> np.ndarray:
    """Numbers where that loses nothing (7 and -1.50, but neither 007 nor 1_000), else text."""
    if set("".join(values)) <= set("+-.0123456789eE"):
        try:
            whole = np.array(values, np.int64)
            if list(map(str, whole.tolist())) == values:
                return whole
        except (ValueError, OverflowError):
            try:
                decimals = np.array(values, np.float64)
                if np.isfinite(decimals).all():
                    return decimals
            except ValueError:
                pass
    plain = [v[1:-1] if len(v) > 1 and v[0] in "'\"" else v for v in values]
    return np.array([_undisguised(t) for t in plain] if disguised else plain, object)


def split_optics(table: Table) -> tuple[Table, Table]:
    """Move what every row says of its optics into a table of optics groups.

    Returns
    -------
    optics, particles : Table
        Groups are numbered from 1 in the order of their first particles.
    """
    names = [name for name in OPTICS if name in table]
    groups: dict[tuple[object, ...], int] = {}
    rows = zip(*(table[name].tolist() for name in names), strict=True)
    number = [groups.setdefault(row, len(groups) + 1) for row in rows] or [1] * length(table)
    optics: Table = {
        "rlnOpticsGroup": np.arange(max(len(groups), 1)) + 1,
        "rlnOpticsGroupName": np.array(
            [f"opticsGroup{i + 1}" for i in range(max(len(groups), 1))], object
        ),
    }
    for i, name in enumerate(names):
        optics[name] = np.array([row[i] for row in groups], table[name].dtype)
    particles = {name: column for name, column in table.items() if name not in names}
    return optics, {**particles, "rlnOpticsGroup": np.array(number)}
