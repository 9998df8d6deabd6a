"""Particle files: RELION's STAR (3.0 and later) in and out, cryoSPARC's ``.cs`` in.

Whatever comes in is held as RELION 3.1 has it: a table of particles and one of optics groups,
origins in angstrom. A column holds numbers where that loses nothing, and text elsewhere.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation

from . import files, imaging, rotations, stacks
from .errors import InputError
from .files import PathLike
from .projection import check_images
from .stacks import ImageStack

if TYPE_CHECKING:
    import gemmi
    import pandas as pd

__all__ = ["ParticleSet", "read_particles", "write_particles"]

ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
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
}

#: The columns of a CTF and the arguments of :func:`cryoem.imaging.ctf`, with what RELION takes
#: where a column is missing (None: it must be there).
CTF = {
    "rlnDefocusU": ("defocus_u_angstrom", None),
    "rlnDefocusV": ("defocus_v_angstrom", None),
    "rlnDefocusAngle": ("defocus_angle_degrees", 0.0),
    "rlnVoltage": ("voltage_kv", None),
    "rlnSphericalAberration": ("spherical_aberration_mm", None),
    "rlnAmplitudeContrast": ("amplitude_contrast", None),
    "rlnPhaseShift": ("phase_shift_degrees", 0.0),
    "rlnCtfBfactor": ("b_factor_angstrom2", 0.0),
}


@dataclass(frozen=True)
class ParticleSet:
    """The particles of a file.

    Attributes
    ----------
    path : Path
        The file.
    images : ImageStack, (n, size, size)
        Read from the stacks when they are used.
    has_angles : bool
    quaternions : (n, 4) array, unit, xyzw
        The identity where the file has no angles.
    shifts_px : (n, 2) array, pixels
        Where each particle was moved to, (x, y): the opposite of the file's origins, which are
        what centres it.
    pixel_size_angstrom : float
    ctf_parameters : dict of str to (n,) arrays, or None
        Arguments of :func:`cryoem.imaging.ctf`; None where the file has no defocus.
    optics, table : pandas.DataFrame
        The optics groups and the particles, with every column of the file, in its order.
    others : tuple of str
        The file's other blocks, as they stand.
    """

    path: Path
    images: ImageStack
    has_angles: bool
    quaternions: np.ndarray
    shifts_px: np.ndarray
    pixel_size_angstrom: float
    ctf_parameters: dict[str, np.ndarray] | None
    optics: pd.DataFrame
    table: pd.DataFrame
    others: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def box_px(self) -> int:
        """Edge of the images in pixels."""
        return self.images.shape[1]

    @property
    def random_subset(self) -> np.ndarray | None:
        """The half set of each particle, 1 or 2, an (n,) int array; None where there is none."""
        if "rlnRandomSubset" not in self.table:
            return None
        return _numbers(self.path, self.table, "rlnRandomSubset").astype(int)

    def ctf(self, rows: slice | np.ndarray = slice(None)) -> np.ndarray | None:
        """Contrast transfer functions of some particles.

        Parameters
        ----------
        rows : slice or array of int
            By default all, which for many particles is more than memory holds.

        Returns
        -------
        (n, size, size // 2 + 1) float32 array, or None where the file has no defocus
        """
        if self.ctf_parameters is None:
            return None
        part = {name: values[rows] for name, values in self.ctf_parameters.items()}
        return imaging.ctf(self.box_px, self.pixel_size_angstrom, **part)

    def write(
        self,
        path: PathLike,
        *,
        quaternions: ArrayLike | None = None,
        shifts_px: ArrayLike | None = None,
        columns: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """Write the particles as a RELION 3.1 STAR file, atomically, beside the images as they are.

        Every row, every column and every other block is kept, in order; image names stay as they
        are where they can be found from the new file, and are made relative to it elsewhere.

        Parameters
        ----------
        path : path ending in ``.star``
        quaternions : (n, 4) array, unit, xyzw, optional
        shifts_px : (n, 2) array, optional
            Where each particle was moved to, (x, y).
        columns : dict of str to (n,) arrays, optional
            Further columns, new or in place of those of the same name.
        """
        path = _star_path(path)
        table = self.table.copy()
        table["rlnImageName"] = self._names_from(path)
        new = _columns(len(self), self.pixel_size_angstrom, quaternions, shifts_px, columns)
        for name, values in new.items():
            table[name] = values
        _write(path, {"optics": self.optics, "particles": table}, self.others)

    def _names_from(self, path: Path) -> list[str]:
        """Image names that can be found from the file at ``path``."""
        folders = _folders(path)
        renamed: dict[str, str] = {}
        names = []
        for name, i in zip(self.table["rlnImageName"], self.images.file, strict=True):
            number, at, stack = str(name).rpartition("@")
            if stack not in renamed:
                there = self.images.layouts[i].path.absolute()
                found = _find(stack, folders)
                same = found is not None and found.samefile(there)
                renamed[stack] = stack if same else os.path.relpath(there, folders[0])
            names.append(f"{number}{at}{renamed[stack]}")
        return names


# --------------------------------------------------------------------------------------
# Writing


def write_particles(
    path: PathLike,
    images: ArrayLike,
    quaternions: ArrayLike,
    *,
    pixel_size_angstrom: float,
    shifts_px: ArrayLike | None = None,
    columns: Mapping[str, ArrayLike] | None = None,
    voltage_kv: float = 300.0,
    spherical_aberration_mm: float = 2.7,
    amplitude_contrast: float = 0.1,
) -> Path:
    """Write new particles: ``path`` (STAR) and the stack beside it (``.mrcs``), atomically.

    Parameters
    ----------
    path : path ending in ``.star``
    images : (n, size, size) array
    quaternions : (n, 4) array, unit, xyzw
    pixel_size_angstrom : float
    shifts_px : (n, 2) array, optional
        Where each particle was moved to, (x, y).
    columns : dict of str to (n,) arrays, optional
        Further columns, by their names in the file: ``rlnDefocusU``, ``rlnRandomSubset``, ...
    voltage_kv, spherical_aberration_mm, amplitude_contrast : float
        Of the one optics group, which RELION wants; by default a usual microscope's. Without
        defocus columns the images carry no CTF.

    Returns
    -------
    Path
        Of the stack.
    """
    import mrcfile
    import pandas as pd

    path = _star_path(path)
    images, q = check_images(images), rotations.check(quaternions)
    if len(images) != len(q) or len(q) == 0:
        raise InputError(
            f"{len(images)} images but {len(q)} quaternions; wanted at least one of each"
        )
    if not (np.isfinite(pixel_size_angstrom) and pixel_size_angstrom > 0):
        raise InputError(f"pixel_size_angstrom must be positive, got {pixel_size_angstrom}")
    shifts = np.zeros((len(q), 2)) if shifts_px is None else shifts_px
    new = _columns(len(q), pixel_size_angstrom, q, shifts, columns)
    stack = path.with_suffix(".mrcs")
    particles = pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@{stack.name}" for i in range(len(q))],
            "rlnOpticsGroup": 1,
            **new,
        }
    )
    optics = pd.DataFrame(
        {
            "rlnOpticsGroup": [1],
            "rlnOpticsGroupName": ["opticsGroup1"],
            "rlnVoltage": [voltage_kv],
            "rlnSphericalAberration": [spherical_aberration_mm],
            "rlnAmplitudeContrast": [amplitude_contrast],
            "rlnImagePixelSize": [pixel_size_angstrom],
            "rlnImageSize": [images.shape[1]],
            "rlnImageDimensionality": [2],
        }
    )
    # Neither replaces its predecessor before both are whole.
    with files.atomic(stack) as temporary:
        with mrcfile.new(temporary, overwrite=True) as mrc:
            mrc.set_data(images)
            mrc.set_image_stack()
            mrc.voxel_size = pixel_size_angstrom
        _write(path, {"optics": optics, "particles": particles})
    return stack


def _star_path(path: PathLike) -> Path:
    path = Path(path)
    if path.suffix != ".star":
        raise InputError(f"{path}: particles are written to a file that ends in .star")
    return path


def _columns(
    n: int,
    pixel_size: float,
    quaternions: ArrayLike | None,
    shifts_px: ArrayLike | None,
    columns: Mapping[str, ArrayLike] | None,
) -> dict[str, np.ndarray]:
    """The columns of ``n`` particles' orientations, shifts and the rest."""
    new: dict[str, np.ndarray] = {}
    if quaternions is not None:
        q = rotations.check(quaternions)
        if len(q) != n:
            raise InputError(f"wanted one quaternion for each of {n} particles, got {len(q)}")
        new.update(zip(ANGLES, rotations.to_relion(q).T, strict=True))
    if shifts_px is not None:
        shifts = np.asarray(shifts_px, float)
        if shifts.shape != (n, 2) or not np.isfinite(shifts).all():
            raise InputError(f"shifts_px must be finite, of shape ({n}, 2), got {shifts.shape}")
        new.update(zip(ORIGINS, (-shifts * pixel_size).T, strict=True))
    for name, values in (columns or {}).items():
        if np.shape(values) != (n,):
            raise InputError(f"column {name} must hold {n} values, got {np.shape(values)}")
        new[name] = np.asarray(values)
    return new


def _write(path: Path, blocks: Mapping[str, pd.DataFrame], others: Iterable[str] = ()) -> None:
    """Write a STAR file, every number with all its digits."""
    with (
        files.atomic(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as file,
    ):
        for name, table in blocks.items():
            file.write(f"\n# version 30001\n\ndata_{name}\n\nloop_\n")
            file.writelines(f"_{column} #{i + 1}\n" for i, column in enumerate(table))
            texts = [_texts(table[column].to_numpy()) for column in table]
            file.writelines("\t".join(row) + "\n" for row in zip(*texts, strict=True))
            file.write("\n")
        for block in others:
            file.write(f"\n{block}\n")


def _texts(values: np.ndarray) -> list[str]:
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


def read_particles(path: PathLike) -> ParticleSet:
    """Read the particles of RELION or cryoSPARC; their images are opened, not read.

    Parameters
    ----------
    path : path to a STAR file, or to a ``.cs`` file
        RELION 3.1 and later, with any number of optics groups; RELION 3.0 (one block, origins in
        pixels). Beside a ``.cs`` file the passthrough file of the same particles is read too,
        where there is one. Image names are relative to the file's folder, to any folder above it
        (RELION's and cryoSPARC's project), or to the working directory.

    Returns
    -------
    ParticleSet

    Raises
    ------
    InputError
        Naming file, row and column: not such a file, a column or a stack that is missing or cut
        short, images or pixels of several sizes, values that are no numbers or absurd.
    """
    path = files.existing(path)
    optics, table, others = _read_cs(path) if path.suffix == ".cs" else _read_star(path)
    if "rlnImageName" not in table:
        raise InputError(f"{path}: no column rlnImageName in data_particles")
    images = _open_images(path, table["rlnImageName"])
    group = _optics_rows(path, optics, table)
    for name, wanted in (("rlnImageSize", images.shape[1]), ("rlnImageDimensionality", 2)):
        if name not in optics:
            optics[name] = wanted
        found = _numbers(path, optics, name, "data_optics: ")[group]
        if (bad := found != wanted).any():
            raise InputError(
                f"{path}: row {np.argmax(bad) + 1}: {name} is {found[bad][0]:g} in its optics "
                f"group, {wanted} in its stack"
            )
    if "rlnImagePixelSize" not in optics:
        raise InputError(f"{path}: no column rlnImagePixelSize in data_optics")
    sizes = _numbers(path, optics, "rlnImagePixelSize", "data_optics: ")[group]
    if (other := ~np.isclose(sizes, sizes[0], rtol=1e-4)).any():
        raise InputError(
            f"{path}: row {np.argmax(other) + 1}: rlnImagePixelSize is {sizes[other][0]:g} A in "
            f"its optics group, {sizes[0]:g} A in that of row 1; wanted one pixel size"
        )
    pixel_size = float(sizes[0])
    has_angles = all(name in table for name in ANGLES)
    angles = [
        _numbers(path, table, name) if has_angles else np.zeros(len(table)) for name in ANGLES
    ]
    origins = [
        _numbers(path, table, name) if name in table else np.zeros(len(table)) for name in ORIGINS
    ]
    return ParticleSet(
        path,
        images,
        has_angles,
        rotations.from_relion(*angles),
        -np.stack(origins, axis=1) / pixel_size,
        pixel_size,
        _ctf_parameters(path, optics, table, group),
        optics,
        table,
        others,
    )


def _numbers(path: Path, table: pd.DataFrame, name: str, block: str = "") -> np.ndarray:
    """A column as an (n,) float64 array, finite and within its bounds."""
    low, high = BOUNDS.get(name, (-np.inf, np.inf))
    values = np.full(len(table), np.nan)
    column = table[name].to_numpy()
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


def _optics_rows(path: Path, optics: pd.DataFrame, table: pd.DataFrame) -> np.ndarray:
    """The row of ``optics`` for each particle, (n,) int array."""
    if "rlnOpticsGroup" not in optics or "rlnOpticsGroup" not in table:
        if len(optics) == 1:
            return np.zeros(len(table), int)
        block = "data_particles" if "rlnOpticsGroup" in optics else "data_optics"
        raise InputError(f"{path}: no column rlnOpticsGroup in {block}")
    groups = _numbers(path, optics, "rlnOpticsGroup", "data_optics: ")
    wanted = _numbers(path, table, "rlnOpticsGroup")
    order = np.argsort(groups)
    place = order[np.minimum(np.searchsorted(groups, wanted, sorter=order), len(groups) - 1)]
    if (bad := groups[place] != wanted).any():
        raise InputError(
            f"{path}: row {np.argmax(bad) + 1}, column rlnOpticsGroup: group {wanted[bad][0]:g} "
            "is not in data_optics"
        )
    return place


def _ctf_parameters(
    path: Path, optics: pd.DataFrame, table: pd.DataFrame, group: np.ndarray
) -> dict[str, np.ndarray] | None:
    if "rlnDefocusU" not in table:
        return None
    parameters = {}
    for name, (argument, default) in CTF.items():
        if name in table:
            parameters[argument] = _numbers(path, table, name)
        elif name in optics:
            parameters[argument] = _numbers(path, optics, name, "data_optics: ")[group]
        elif default is None:
            raise InputError(f"{path}: has defocus, but no column {name}")
        else:
            parameters[argument] = np.full(len(table), default)
    largest = np.abs(parameters["defocus_u_angstrom"]).max()
    if largest < 100:
        raise InputError(
            f"{path}: column rlnDefocusU: nothing above {largest:g} A; wanted angstrom "
            "(1 micrometre is 10000), or no defocus columns for images without CTF"
        )
    return parameters


# --------------------------------------------------------------------------------------
# STAR


def _read_star(path: Path) -> tuple[pd.DataFrame, pd.DataFrame, tuple[str, ...]]:
    """Optics, particles and the other blocks of a STAR file."""
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
            raise InputError(
                f"{path}: no block data_particles; wanted RELION's particles, got "
                f"{', '.join('data_' + n for n in blocks) or 'an empty file'}"
            )
        name = named[0]
    for wanted in {name, "optics"} if "optics" in blocks else {name}:
        if wanted not in blocks:
            raise InputError(f"{path}: no block data_{wanted}; wanted a RELION 3.1 file")
    table = _table(path, blocks.pop(name), disguised)
    if len(table) == 0:
        raise InputError(f"{path}: no particles")
    optics = _table(path, blocks.pop("optics"), disguised) if "optics" in blocks else None
    if optics is None:
        table = _with_pixel_size(path, table)
        optics, table = _split_optics(table)
    elif len(optics) == 0:
        raise InputError(f"{path}: data_optics is empty")
    others = [block.as_string().strip() + "\n" for block in blocks.values()]
    return optics, table, tuple(map(_undisguised, others) if disguised else others)


_ASCII = bytes(c for c in range(128) if c != ord("%"))


def _undisguised(text: str) -> str:
    return urllib.parse.unquote(text)


def _table(path: Path, block: gemmi.cif.Block, disguised: bool) -> pd.DataFrame:
    """A block's loop, or its pairs as one row."""
    import pandas as pd

    columns: dict[str, list[str]] = {}
    for item in block:
        if item.loop is not None:
            width, values = item.loop.width(), list(item.loop.values)
            columns.update({tag: values[i::width] for i, tag in enumerate(item.loop.tags)})
        elif item.pair is not None:
            columns[item.pair[0]] = [item.pair[1]]
    if len({len(column) for column in columns.values()}) > 1:
        raise InputError(f"{path}: data_{block.name} holds several tables; wanted one")
    return pd.DataFrame({tag[1:]: _typed(column, disguised) for tag, column in columns.items()})


def _typed(values: list[str], disguised: bool = False) -> np.ndarray:
    """Numbers where that loses nothing (7 and -1.50, but neither 007 nor 1_000), else text."""
    if set("".join(values)) <= set("+-.0123456789eE"):
        try:
            whole = np.array(values, np.int64)
            if list(map(str, whole.tolist())) == values:
                return whole
        except (ValueError, OverflowError):
            try:
                numbers = np.array(values, np.float64)
                if np.isfinite(numbers).all():
                    return numbers
            except ValueError:
                pass
    texts = [v[1:-1] if len(v) > 1 and v[0] in "'\"" else v for v in values]
    return np.array([_undisguised(t) for t in texts] if disguised else texts, object)


def _with_pixel_size(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """RELION 3.0's particles with a pixel size on every row and origins in angstrom."""
    if "rlnImagePixelSize" not in table:
        for name in ("rlnDetectorPixelSize", "rlnMagnification"):
            if name not in table:
                raise InputError(
                    f"{path}: no column {name}, and no block data_optics; wanted one of them for "
                    "the pixel size"
                )
        detector, magnification = (
            _numbers(path, table, n) for n in ("rlnDetectorPixelSize", "rlnMagnification")
        )
        table["rlnImagePixelSize"] = np.round(1e4 * detector / magnification, 9)
    for old, new in zip(("rlnOriginX", "rlnOriginY"), ORIGINS, strict=True):
        if old in table and new not in table:
            table[old] = _numbers(path, table, old) * _numbers(path, table, "rlnImagePixelSize")
            table = table.rename(columns={old: new})
    return table


def _split_optics(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Move what every row says of its optics into a table of optics groups."""
    import pandas as pd

    names = [name for name in OPTICS if name in table]
    if names:
        groups = table.groupby(names, sort=False, dropna=False)
        number = groups.ngroup().to_numpy() + 1
        optics = table[names].loc[~groups.cumcount().astype(bool)].reset_index(drop=True)
    else:
        number, optics = np.ones(len(table), int), pd.DataFrame(index=[0])
    optics.insert(0, "rlnOpticsGroup", np.arange(len(optics)) + 1)
    optics.insert(1, "rlnOpticsGroupName", [f"opticsGroup{i + 1}" for i in range(len(optics))])
    table = table.drop(columns=names)
    table["rlnOpticsGroup"] = number
    return optics, table


# --------------------------------------------------------------------------------------
# cryoSPARC

#: Fields of a ``.cs`` file that are RELION's columns but for the name and the unit.
_CS_NUMBERS = {
    "ctf/df1_A": ("rlnDefocusU", 1.0),
    "ctf/df2_A": ("rlnDefocusV", 1.0),
    "ctf/df_angle_rad": ("rlnDefocusAngle", 180 / np.pi),
    "ctf/phase_shift_rad": ("rlnPhaseShift", 180 / np.pi),
    "ctf/bfactor": ("rlnCtfBfactor", 1.0),
    "ctf/accel_kv": ("rlnVoltage", 1.0),
    "ctf/cs_mm": ("rlnSphericalAberration", 1.0),
    "ctf/amp_contrast": ("rlnAmplitudeContrast", 1.0),
    "blob/psize_A": ("rlnImagePixelSize", 1.0),
}


def _read_cs(path: Path) -> tuple[pd.DataFrame, pd.DataFrame, tuple[str, ...]]:
    """Optics and particles of a cryoSPARC file and its passthrough."""
    import pandas as pd

    fields = _cs_fields(path)
    for beside in sorted(path.parent.glob("*passthrough*.cs")):
        if beside != path:
            fields = _joined(fields, _cs_fields(beside))
    for name in ("blob/path", "blob/idx", "blob/psize_A"):
        if name not in fields:
            raise InputError(f"{path}: no field {name}, neither here nor in a passthrough file")

    def numbers(name: str, *shape: int, kinds: str = "iuf") -> np.ndarray:
        values = fields.pop(name)
        if values.dtype.kind not in kinds or values.shape[1:] != shape:
            raise InputError(
                f"{path}: field {name}: wanted numbers of shape {('n', *shape)}, "
                f"got {values.dtype} of shape {values.shape}"
            )
        # The shortest decimal is what was meant: 1.1, not 1.10000002384.
        return np.array(_texts(values.ravel()), np.float64).reshape(values.shape)

    def counted(name: str) -> np.ndarray:
        return numbers(name, kinds="iu").astype(np.int64) + 1  # from 0 there, from 1 here

    stack = (name.lstrip(">") for name in map(str, _cs_column(fields.pop("blob/path"))))
    columns: dict[str, ArrayLike] = {
        "rlnImageName": [f"{i:06d}@{s}" for i, s in zip(counted("blob/idx"), stack, strict=True)]
    }
    if "location/micrograph_path" in fields:
        columns["rlnMicrographName"] = _cs_column(fields.pop("location/micrograph_path"))
    for name, (column, factor) in _CS_NUMBERS.items():
        if name in fields:
            columns[column] = numbers(name) * factor
    if "alignments3D/pose" in fields:
        # The rotation vector of R itself; RELION's matrix is its transpose.
        pose = numbers("alignments3D/pose", 3)
        if (bad := ~np.isfinite(pose).all(axis=1)).any():
            raise InputError(
                f"{path}: row {np.argmax(bad) + 1}, field alignments3D/pose: no number"
            )
        q = Rotation.from_rotvec(pose).as_quat()
        columns.update(zip(ANGLES, rotations.to_relion(q).T, strict=True))
    if "alignments3D/shift" in fields:
        pixel = "alignments3D/psize_A"
        scale = numbers(pixel) if pixel in fields else np.asarray(columns["rlnImagePixelSize"])
        shift = numbers("alignments3D/shift", 2) * scale[:, None]
        columns.update(zip(ORIGINS, shift.T, strict=True))
    for name, column in (
        ("alignments3D/split", "rlnRandomSubset"),
        ("alignments3D/class", "rlnClassNumber"),
    ):
        if name in fields:
            columns[column] = counted(name)
    columns.update({name: _cs_column(values) for name, values in fields.items()})
    return *_split_optics(pd.DataFrame(columns)), ()


def _joined(fields: dict[str, np.ndarray], more: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add the fields of a passthrough file, if it holds the same particles."""
    uid, known = fields.get("uid"), more.get("uid")
    if uid is None or known is None or not len(known) or not uid.ndim == known.ndim == 1:
        return fields
    order = np.argsort(known)
    place = order[np.minimum(np.searchsorted(known, uid, sorter=order), len(known) - 1)]
    if (known[place] != uid).any():
        return fields
    return {name: values[place] for name, values in more.items()} | fields


def _cs_fields(path: Path) -> dict[str, np.ndarray]:
    """The fields of a ``.cs`` file, by name, in its order."""
    try:
        # Mapped, not read: an array that the header invents does not fit into the file.
        data = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy raises whatever the parser of its header met
        raise InputError(f"{path}: not a readable .cs file ({error})") from error
    if data.ndim != 1 or data.dtype.names is None:
        raise InputError(f"{path}: wanted a table with named fields, got {data.dtype}")
    if len(data) == 0:
        raise InputError(f"{path}: no particles")
    return {name: np.array(data[name]) for name in data.dtype.names}


def _cs_column(values: np.ndarray) -> np.ndarray:
    """A field as a column: text decoded, vectors as ``1,2,3``, numbers as they are."""
    if values.ndim > 1:
        rows = values.reshape(len(values), -1)
        return np.array([",".join(_texts(row)) for row in rows], object)
    if values.dtype.kind == "S":
        return np.array([v.decode("utf-8", "replace") for v in values], object)
    return values


# --------------------------------------------------------------------------------------
# Stacks


def _open_images(path: Path, names: Iterable[object]) -> ImageStack:
    """Open the stacks of image names as ``000001@stack.mrcs``, or ``image.mrc`` for single ones."""
    folders = [*_folders(path), Path.cwd()]
    layouts: list[stacks.Layout] = []
    index: dict[str, int] = {}
    file, section = [], []
    for row, name in enumerate(map(str, names)):
        where = f"{path}: row {row + 1}, column rlnImageName: "
        digits, at, stack = name.rpartition("@")
        if stack not in index:
            found = _find(stack, folders)
            if found is None:
                raise InputError(
                    f"{where}{stack!r}: no such file in the folder of the particles, in one above "
                    "it, or in the working directory"
                )
            index[stack] = len(layouts)
            layouts.append(stacks.layout(found))
        layout = layouts[index[stack]]
        held, *edges = layout.shape
        if not (re.fullmatch("[0-9]{1,9}", digits) if at else held == 1):
            raise InputError(
                f"{where}got {name!r}, wanted 000001@stack.mrcs ({stack} holds {held} images)"
            )
        number = int(digits or 1)
        if not 1 <= number <= held:
            raise InputError(f"{where}image {number} of {layout.path}, which holds {held}")
        if edges[0] != edges[1] or edges != [*layouts[0].shape[1:]]:
            raise InputError(
                f"{where}the images of {layout.path} have {edges[1]} x {edges[0]} px; wanted "
                f"squares, all of the size of row 1 ({layouts[0].shape[2]} px)"
            )
        file.append(index[stack])
        section.append(number - 1)
    return ImageStack(layouts, file, section, source=path)


def _folders(path: Path) -> list[Path]:
    """The folder of the file at ``path`` and those above it."""
    return [*path.absolute().parents]


def _find(stack: str, folders: Iterable[Path]) -> Path | None:
    """The file ``stack`` of the first folder that has it."""
    paths = (folder / stack for folder in folders)
    return next((path for path in paths if os.path.isfile(path)), None)
