"""cryoSPARC's ``.cs`` files, and the passthrough files beside them, as RELION's tables."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from .. import rotations
from ..errors import InputError
from .star import ORIGINS, Table, length, numbers, split_optics, texts

__all__ = ["called", "named", "read_cryosparc"]

#: Fields of a ``.cs`` file that are RELION's columns but for the name and the unit.
NUMBERS = {
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
#: What a ``.cs`` file calls the columns that are made of its fields.
FIELDS = {
    **{column: field for field, (column, _) in NUMBERS.items()},
    **dict.fromkeys(rotations.RELION_ANGLES, "alignments3D/pose"),
    **dict.fromkeys(ORIGINS, "alignments3D/shift"),
    "rlnImageSize": "blob/shape",
    "rlnRandomSubset": "alignments3D/split",
    "cryoemSign": "blob/sign",
}
PLACE = ("location/center_x_frac", "location/center_y_frac", "location/micrograph_shape")
#: All fields that are more than kept.
READ = {
    *NUMBERS,
    *PLACE,
    "alignments3D/class",
    "alignments3D/pose",
    "alignments3D/psize_A",
    "alignments3D/shift",
    "alignments3D/split",
    "blob/idx",
    "blob/path",
    "blob/sign",
    "location/micrograph_path",
}


def read_cryosparc(path: Path) -> tuple[Table, Table, tuple[str, ...]]:
    """Read the particles of a ``.cs`` file and its passthrough file.

    Returns
    -------
    optics, particles : Table
    others : tuple of str
        No other blocks.
    """
    fields = _Fields(path)
    columns: Table = {"rlnImageName": _image_names(fields)}
    if "location/micrograph_path" in fields.values:
        columns["rlnMicrographName"] = _column(fields.values.pop("location/micrograph_path"))
    if all(name in fields.values for name in PLACE):
        x, y, shape = (fields.values[name].astype(float) for name in PLACE)
        if x.shape == y.shape == (len(shape),) and shape.shape[1:] == (2,):
            columns |= {"rlnCoordinateX": x * shape[:, 1], "rlnCoordinateY": y * shape[:, 0]}
    for name, (column, factor) in NUMBERS.items():
        if name in fields.values:
            told = {column: fields.numbers(name) * factor}
            unit = "" if factor == 1 else " (in degrees)"
            columns[column] = numbers(path, told, column, called=f"field {name}{unit}")
    _add_alignment(fields, columns)
    for name, column in (
        ("alignments3D/split", "rlnRandomSubset"),
        ("alignments3D/class", "rlnClassNumber"),
    ):
        if name in fields.values:
            columns[column] = fields.counted(name)
    if (bad := ~np.isin(columns.get("rlnRandomSubset", 1), (1, 2))).any():
        row = int(np.argmax(bad))
        raise InputError(
            f"{path}: row {row + 1}, field alignments3D/split: got "
            f"{columns['rlnRandomSubset'][row] - 1}, wanted 0 or 1"
        )
    if not any(name in columns for name in ("rlnDefocusU", "rlnDefocusV")):
        warnings.warn(
            f"{path}: no field ctf/df1_A, neither here nor in a passthrough file beside it that "
            "holds all of its particles: they are taken for images without a CTF",
            stacklevel=3,
        )
    sign, box = _signs(fields), fields.values.get("blob/shape")
    columns.update({name: _column(values) for name, values in fields.values.items()})
    optics, particles = split_optics(columns)
    if sign is not None:
        place = optics if (sign == sign[0]).all() else particles
        place["cryoemSign"] = np.resize(sign, length(place))
    whole = box is not None and box.ndim == 2 and box.dtype.kind in "iuf" and box.shape[1]
    if box is not None and whole and (box == box[0, 0]).all() and 0 < box[0, 0] < 1e6:
        optics["rlnImageSize"] = np.full(length(optics), int(box[0, 0]))
    return optics, particles, ()


def named(path: Path | None, column: str) -> str:
    """The name of a column in the file at ``path``: of a ``.cs`` file its field's."""
    cryosparcs = path is not None and path.suffix == ".cs"
    return FIELDS.get(column, column) if cryosparcs else column


def called(path: Path | None, column: str) -> str:
    """What a message calls a column of the file at ``path``: a column, or a field."""
    name = named(path, column)
    return f"{'column' if name == column else 'field'} {name}"


class _Fields:
    """The fields that are left to be read, those of the passthrough file among them."""

    def __init__(self, path: Path) -> None:
        self.path, self.values = path, _read(path)
        if len(next(iter(self.values.values()))) == 0:
            raise InputError(f"{path}: no particles")
        self.values = _with_passthroughs(path, self.values)
        for name, column in self.values.items():
            if len(name.split()) != 1:
                raise InputError(f"{path}: field {name!r}: wanted a name without blanks")
            if column.dtype.kind in "SU":  # before anything is computed
                texts(_column(column), f"{path}: field {name}, ")
        for name in ("blob/path", "blob/idx", "blob/psize_A"):
            if name not in self.values:
                raise InputError(f"{path}: no field {name}, neither here nor in a passthrough file")

    def numbers(self, name: str, *shape: int, kinds: str = "iuf") -> np.ndarray:
        """Take a field of numbers, as float64."""
        values = self.values.pop(name)
        if values.dtype.kind not in kinds or values.shape[1:] != shape:
            raise InputError(
                f"{self.path}: field {name}: wanted numbers of shape {('n', *shape)}, "
                f"got {values.dtype} of shape {values.shape}"
            )
        # The shortest decimal is what was meant: 1.1, not 1.10000002384.
        return np.array(texts(values.ravel()), np.float64).reshape(values.shape)

    def counted(self, name: str) -> np.ndarray:
        """Take a field of integers that counts from 0 there, from 1 here."""
        return self.numbers(name, kinds="iu").astype(np.int64) + 1


def _image_names(fields: _Fields) -> np.ndarray:
    stacks = (name.lstrip(">") for name in map(str, _column(fields.values.pop("blob/path"))))
    index = fields.counted("blob/idx")
    return np.array([f"{i:06d}@{s}" for i, s in zip(index, stacks, strict=True)], object)


def _signs(fields: _Fields) -> np.ndarray | None:
    """What each image is multiplied by; None: all are as they should be."""
    if "blob/sign" not in fields.values:
        return None
    sign = fields.numbers("blob/sign")
    if (bad := np.abs(sign) != 1).any():
        raise InputError(
            f"{fields.path}: row {np.argmax(bad) + 1}, field blob/sign: got {sign[bad][0]:g}, "
            "wanted 1 or -1"
        )
    return None if (sign == 1).all() else sign.astype(np.int64)


def _add_alignment(fields: _Fields, columns: Table) -> None:
    """Poses, where the file has them."""
    if "alignments3D/pose" in fields.values:
        # The rotation vector of R itself; RELION's matrix is its transpose.
        pose = fields.numbers("alignments3D/pose", 3)
        if (bad := ~np.isfinite(pose).all(axis=1)).any():
            raise InputError(
                f"{fields.path}: row {np.argmax(bad) + 1}, field alignments3D/pose: no number"
            )
        angles = rotations.to_relion(Rotation.from_rotvec(pose).as_quat())
        columns.update(zip(rotations.RELION_ANGLES, angles.T, strict=True))
    if "alignments3D/shift" in fields.values:
        pixel, scale = "blob/psize_A", columns["rlnImagePixelSize"]
        if "alignments3D/psize_A" in fields.values:
            pixel = "alignments3D/psize_A"
            scale = fields.numbers(pixel)
        shift = fields.numbers("alignments3D/shift", 2)
        if (bad := ~(np.isfinite(scale) & (scale > 0)) & shift.any(axis=1)).any():
            raise InputError(
                f"{fields.path}: row {np.argmax(bad) + 1}, field {pixel}: got {scale[bad][0]:g}, "
                "wanted the pixel size of alignments3D/shift, angstrom"
            )
        shift = np.where(shift != 0, shift * scale[:, None], 0.0)
        for name, values in zip(ORIGINS, shift.T, strict=True):
            said = f"field alignments3D/shift times {pixel}"
            columns[name] = numbers(fields.path, {name: values}, name, called=said)


def _with_passthroughs(path: Path, fields: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add the fields of the passthrough files beside a file, of those that hold its particles."""
    uid = fields.get("uid")
    added: dict[str, np.ndarray] = {}
    source: dict[str, str] = {}
    for beside in sorted(path.parent.glob("*passthrough*.cs")):
        more = {} if beside == path or uid is None else _read(beside)
        known = more.get("uid")
        if uid is None or known is None or not len(known) or not uid.ndim == known.ndim == 1:
            continue
        order = np.argsort(known, kind="stable")
        place = order[np.minimum(np.searchsorted(known, uid, sorter=order), len(known) - 1)]
        if (here := known[place] == uid).any() and not here.all():
            warnings.warn(
                f"{beside}: not used: it holds {here.sum():,} of the {len(uid):,} particles of "
                f"{path}",
                stacklevel=2,
            )
        if not here.all():
            continue
        twice = np.flatnonzero(known[order][1:] == known[order][:-1])
        for name in more:
            values = more[name][place]
            if name in fields:
                continue
            first, second = order[twice], order[twice + 1]
            if name in READ and not _equal(more[name][first], more[name][second]):
                rows = zip(first, second, strict=True)
                one, other = next(r for r in rows if not _equal(*more[name][list(r)]))
                raise InputError(
                    f"{beside}: rows {one + 1} and {other + 1} give different values of {name} to "
                    f"one particle, uid {known[one]}; wanted it once"
                )
            if name not in added:
                added[name], source[name] = values, beside.name
            elif name in READ and not _equal(added[name], values):
                raise InputError(
                    f"{path}: {source[name]} and {beside.name} beside it give different values of "
                    f"{name} to the same particles; wanted one of them, the other elsewhere"
                )
    return added | fields


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    return np.array_equal(first, second, equal_nan=first.dtype.kind == second.dtype.kind == "f")


def _read(path: Path) -> dict[str, np.ndarray]:
    """The fields of a ``.cs`` file, by name, in its order."""
    try:
        # Mapped, not read: an array that the header invents does not fit into the file.
        data = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy raises whatever the parser of its header met
        raise InputError(f"{path}: not a readable .cs file ({error})") from error
    if data.ndim != 1 or not data.dtype.names:
        raise InputError(f"{path}: wanted a table with named fields, got {data.dtype}")
    return {name: np.array(data[name]) for name in data.dtype.names}


def _column(values: np.ndarray) -> np.ndarray:
    """A field as a column: text decoded, vectors as ``1,2,3``, numbers as they are."""
    if values.ndim > 1:
        rows = values.reshape(len(values), -1)
        return np.array([",".join(texts(row)) for row in rows], object)
    if values.dtype.kind == "S":
        return np.array([v.decode("utf-8", "replace") for v in values], object)
    return values
