"""STAR files: tables of named columns, read and written with every digit.

A table is a dict of columns in the order of the file. A column holds numbers where that loses
nothing, and text elsewhere: names are text, RELION's other columns numbers. RELION 3.0's particles
are brought into the form of RELION 3.1: a table of particles and one of optics groups.

Files are read as RELION reads them, a line of a loop a row. To a reader of CIF a name such as
``data_1/a.mrc`` begins a block.
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError
from . import files
from .files import PathLike

__all__ = [
    "ORIGINS",
    "Table",
    "length",
    "numbers",
    "numbers_of",
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
    "rlnCtfBfactor": (-1e3, 1e4),
    "rlnPhaseShift": (-3600.0, 3600.0),
    **dict.fromkeys(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), (-3600.0, 3600.0)),
    **dict.fromkeys(("rlnOriginX", "rlnOriginY", *ORIGINS), (-1e5, 1e5)),
    "cryoemContrast": (0.0, 1e6),
}


def length(table: Mapping[str, np.ndarray]) -> int:
    """Number of rows of a table."""
    return len(next(iter(table.values()))) if table else 0


def numbers(
    path: Path, table: Mapping[str, np.ndarray], name: str, block: str = "", called: str = ""
) -> np.ndarray:
    """A column as an (n,) float64 array, finite and within its bounds.

    Raises
    ------
    InputError
        Naming file, block, row and column.
    """
    low, high = BOUNDS.get(name, (-np.inf, np.inf))
    column = table[name]
    if column.dtype.kind in "iuf":
        values = column.astype(np.float64)
    else:
        told = (str(value).strip() for value in column)
        values = np.array([float(text) if _NUMBER.fullmatch(text) else np.nan for text in told])
    bad = ~(np.isfinite(values) & (values >= low) & (values <= high))
    if bad.any():
        row = int(np.argmax(bad))
        got = f"{column[row]:.9g}" if column.dtype.kind == "f" else column[row]
        raise InputError(
            f"{path}: {block}row {row + 1}, {called or f'column {name}'}: got {got}, "
            "wanted a number" + (f" between {low:g} and {high:g}" if np.isfinite(low) else "")
        )
    return values


def numbers_of(
    path: Path, optics: Table, table: Table, group: np.ndarray, name: str
) -> np.ndarray | None:
    """A column of the particles, or of their optics groups, one number a particle; None: neither.

    ``group`` is each particle's row of ``optics``.
    """
    if name in table:
        return numbers(path, table, name)
    return numbers(path, optics, name, "data_optics: ")[group] if name in optics else None


#: Numbers as other programs write them; Python would take 1_0 for one, too.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


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
            columns = [
                texts(np.asarray(column), f"{path}: data_{name}: column {column_name}, ")
                for column_name, column in table.items()
            ]
            file.writelines("\t".join(row) + "\n" for row in zip(*columns, strict=True))
            file.write("\n")
        for block in others:
            file.write(f"\n{block}\n")


def texts(values: np.ndarray, where: str = "") -> list[str]:
    """Values as they stand in a STAR file: shortest decimals, quotation marks where needed.

    Raises
    ------
    InputError
        Naming ``where`` and the row of a text that a STAR file cannot hold.
    """
    if values.dtype.kind in "iuf":
        return [str(value) for value in (values.tolist() if values.itemsize == 8 else values)]
    return [
        text if _PLAIN.fullmatch(text) else _quoted(text, f"{where}row {row + 1}: ")
        for row, text in enumerate(map(str, values))
    ]


#: What needs no quotation marks: a program may take it for nothing but a value.
_PLAIN = re.compile(
    r"""(?!data_|loop_|save_|stop_|global_)[^\s_#$'";\[\]\x00-\x1f\ud800-\udfff]"""
    r"""[^\s\x00-\x1f\ud800-\udfff]*""",
    re.IGNORECASE,
)
#: What no quotation marks help.
_UNWRITABLE = re.compile(r"[\x00-\x08\x0a-\x1f\ud800-\udfff]")


def _quoted(text: str, where: str) -> str:
    if not _UNWRITABLE.search(text):
        # A mark ends a text where a blank follows it; RELION knows that, others only plain cases.
        for within in ("", "[ \t]"):
            for mark in "\"'":
                if not re.search(mark + within, text):
                    return mark + text + mark
    raise InputError(
        f"{where}{text!r} cannot stand in a STAR file: it holds a line's end, a control character, "
        "or both quotation marks before blanks"
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
    blocks = _blocks(path)
    name = "particles"
    if name not in blocks and "optics" not in blocks:  # RELION 3.0: one block of any name
        named = [n for n, lines in blocks.items() if any(map(_IMAGE_NAME.match, lines))]
        if len(named) != 1:
            if any(b"_cisTEM" in line for lines in blocks.values() for line in lines):
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
    try:
        particles = _table(f"{path}: data_{name}: ", blocks.pop(name))
        if length(particles) == 0:
            raise InputError(f"{path}: no particles")
        if "optics" not in blocks:
            if "rlnOpticsGroup" in particles:
                groups = numbers(path, particles, "rlnOpticsGroup")
                whole = groups.astype(np.int64)
                particles["rlnOpticsGroup"] = whole if (whole == groups).all() else groups
            for name in ("rlnImagePixelSize", *OPTICS[:3] * ("rlnDefocusU" in particles)):
                if name in particles:
                    numbers(path, particles, name)  # by its row, while it has one
            optics, particles = split_optics(particles)
        else:
            optics = _table(f"{path}: data_optics: ", blocks.pop("optics"))
            if length(optics) == 0:
                raise InputError(f"{path}: data_optics is empty")
        return optics, particles, tuple(map(_as_it_stands, blocks.values()))
    except UnicodeDecodeError as error:
        lines = enumerate(path.read_bytes().splitlines(), 1)
        bad_ones = [(i, x) for i, x in lines if x != x.decode(errors="ignore").encode()]
        at, bad = min(bad_ones, key=lambda one: one[1].lstrip().startswith(b"#"))
        told = bad.decode(errors="replace")[:40]
        raise InputError(f"{path}: line {at}: not UTF-8: {told!r}") from error


_IMAGE_NAME = re.compile(rb"\s*_rlnImageName(\s|$)")
_BLOCK = re.compile(rb"\s*data_(\S*)\s*(#.*)?", re.IGNORECASE)


def _blocks(path: Path) -> dict[str, list[bytes]]:
    """The lines of each block, the first of them its name's."""
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    starts = [
        i for i, line in enumerate(lines) if b"data_" in line.lower() and _BLOCK.fullmatch(line)
    ]
    for i, line in enumerate(lines[: starts[0] if starts else None]):
        if line.strip() and not line.lstrip().startswith(b"#"):
            raise InputError(
                f"{path}: not a readable STAR file (line {i + 1}: wanted a block's name, data_..., "
                f"got {line[:40].decode(errors='replace')!r})"
            )
    blocks: dict[str, list[bytes]] = {}
    for start, stop in itertools.pairwise([*starts, len(lines)]):
        found = _BLOCK.fullmatch(lines[start])
        assert found is not None
        name = found[1].decode(errors="replace")
        if name in blocks:
            raise InputError(f"{path}: not a readable STAR file (two blocks data_{name})")
        blocks[name] = lines[start:stop]
    return blocks


def _as_it_stands(lines: list[bytes]) -> str:
    """A block without the comment before the next one."""
    last = max(i for i, line in enumerate(lines) if line.strip() and not line.startswith(b"#"))
    return b"\n".join(lines[: last + 1]).decode() + "\n"


def _table(where: str, lines: Sequence[bytes]) -> Table:
    """A block's loop, or its pairs as one row."""
    columns: dict[str, list[bytes]] = {}
    at = 1
    while at < len(lines):
        first, *more = lines[at].split(None, 1) or [b"#"]
        at += 1
        if first.lower() == b"loop_":
            labels, at = _labels(lines, at)
            values, at = _rows(where, lines, at, len(labels))
            found = {label: values[i :: len(labels)] for i, label in enumerate(labels)}
        elif first.startswith(b"_") and more and not more[0].startswith(b"#"):
            labels, found = [first], {first: _values(more[0])[:1]}
        elif first.startswith(b"#"):
            continue
        else:
            raise InputError(
                f"{where}not readable: wanted loop_, or a column's name and value, got "
                f"{lines[at - 1][:40].decode(errors='replace')!r}"
            )
        names = [label[1:].decode() for label in labels]
        if "" in names:
            raise InputError(f"{where}a column has no name: got '_'")
        if twice := [n for i, n in enumerate(names) if n in names[:i] or n in columns]:
            raise InputError(f"{where}two columns {twice[0]}")
        columns |= {name: found[label] for name, label in zip(names, labels, strict=True)}
    if len({len(column) for column in columns.values()}) > 1:
        raise InputError(f"{where}holds several tables; wanted one")
    return {name: _typed(name, column) for name, column in columns.items()}


def _labels(lines: Sequence[bytes], at: int) -> tuple[list[bytes], int]:
    """The names of a loop's columns, from line ``at``, and the line that follows them."""
    labels: list[bytes] = []
    for at in range(at, len(lines)):  # noqa: B020
        first, *more = lines[at].split(None, 1) or [b"#"]
        named = first.startswith(b"_") and (not more or more[0].startswith(b"#"))
        if not named and not first.startswith(b"#"):
            return labels, at
        if named:
            labels.append(first)
    return labels, len(lines)


def _rows(where: str, lines: Sequence[bytes], at: int, width: int) -> tuple[list[bytes], int]:
    """The values of a loop, from line ``at``, row after row, and the line that follows them.

    What follows a blank line may be more rows, as CIF has it, or no part of the loop.
    """
    values: list[bytes] = []
    apart = False
    for at in range(at, len(lines)):  # noqa: B020
        row = _values(lines[at])
        if len(row) != width or width == 1 or apart:
            bare = lines[at].lstrip()
            if not row or (bare.startswith(b"#") and (apart or len(row) != width)):
                apart = apart or not row
                continue
            row = _values(lines[at], comments=True)
            if bare.lower().split() == [b"loop_"] or (bare[:1] == b"_" and apart and len(row) < 3):
                return values, at
            if len(row) != width:
                raise InputError(
                    f"{where}row {len(values) // max(width, 1) + 1}: holds {len(row)} values, "
                    f"wanted {width}, one for each column"
                )
            apart = False
        values += row
    return values, len(lines)


#: A quotation mark ends a value where a blank follows it.
_VALUE = re.compile(rb"""'((?:[^']|'(?=\S))*)'(?=\s|$)|"((?:[^"]|"(?=\S))*)"(?=\s|$)|(\S+)""")


def _values(line: bytes, *, comments: bool = False) -> list[bytes]:
    """Split a line at blanks that are not within quotation marks; it may end in a comment."""
    if not (comments or b"'" in line or b'"' in line):
        return line.split()
    found: Iterable[re.Match[bytes]] = _VALUE.finditer(line)
    if comments:
        found = itertools.takewhile(lambda value: not value[0].startswith(b"#"), found)
    return [value[value.lastindex or 0] for value in found]


#: RELION's columns of text, whatever it looks like, and all others that end in Name.
_TEXT = re.compile(
    ".*Name|rln.*(NameNoDW|File|Image|Stack|Metadata|Coordinates|Comment|PowerSpectrum)"
)


#: Digits behind the point that a label has at most.
LABEL = 3


def _typed(name: str, values: list[bytes]) -> np.ndarray:
    """Numbers where that loses nothing (7 and -1.5, but neither 007 nor 1_000), else text."""
    found = None
    if not _TEXT.fullmatch(name) and not b"".join(values).translate(None, b"+-.0123456789eE"):
        with contextlib.suppress(ValueError, OverflowError):
            found = _as_numbers(name, values)
    return np.array([v.decode() for v in values], object) if found is None else found


def _as_numbers(name: str, values: list[bytes]) -> np.ndarray | None:
    """The numbers of a column, or None where they are text.

    RELION's decimals and ours are numbers, and what has as many digits throughout. Others may be
    labels: 1.50 is text, and so are 2 and 2.0 in one column.
    """
    try:
        whole = list(map(int, values))
    except ValueError:
        decimals = np.array(list(map(float, values)))
        if not np.isfinite(decimals).all():
            return None
        digits = {len(value.partition(b".")[2]) for value in values}
        if name.startswith(("rln", "cryoem")) or (len(digits) == 1 and min(digits) > LABEL):
            return decimals
        told = {
            v.decode(): str(number) for v, number in zip(values, decimals.tolist(), strict=True)
        }
        same = all(new in (text, f"{text}.0") for text, new in told.items())
        return decimals if same and len({*told.values()}) == len(told) else None
    if list(map(str, whole)) != [value.decode() for value in values]:
        return None
    return np.array(whole, np.uint64 if max(whole, default=0) >= 2**63 else np.int64)


def split_optics(table: Table) -> tuple[Table, Table]:
    """Move what every row says of its optics into a table of optics groups.

    Returns
    -------
    optics, particles : Table
        Groups have the numbers that rows give them. A group of several microscopes is split: all
        but its first, and groups without numbers, are numbered on in the order of their first
        particles.
    """
    names = [name for name in OPTICS if name in table]
    numbered = table.get("rlnOpticsGroup", np.zeros(length(table), int)).tolist()
    rows = list(zip(numbered, *(table[name].tolist() for name in names), strict=True))
    free = itertools.count(int(max(numbered)) + 1)
    groups: dict[tuple[Any, ...], tuple[Any, str]] = {}
    taken = set() if "rlnOpticsGroup" in table else {0}
    for row in dict.fromkeys(rows):
        number = next(free) if row[0] in taken else row[0]
        within = f"{row[0]}_" if row[0] in taken and "rlnOpticsGroup" in table else ""
        groups[row] = number, f"opticsGroup{within}{number}"
        taken.add(row[0])
    found = list(zip(*groups.values(), strict=True))
    optics: Table = {
        "rlnOpticsGroup": np.array(found[0]),
        "rlnOpticsGroupName": np.array(found[1], object),
    }
    for i, name in enumerate(names):
        optics[name] = np.array([row[i + 1] for row in groups], table[name].dtype)
    particles = {name: column for name, column in table.items() if name not in names}
    return optics, {**particles, "rlnOpticsGroup": np.array([groups[row][0] for row in rows])}
