"""What a particle file says of its optics: pixels, the CTF, aberrations, what is not used here."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..imaging import CtfParameters
from ..particles import ParticleStack
from ..rotations import RELION_ANGLES
from .aberrations import EVEN, UNDONE, even_zernike
from .cryosparc import called, named
from .star import OPTICS, ORIGINS, Table, length, numbers, numbers_of

__all__ = [
    "CTF",
    "MICROSCOPE",
    "ctf_columns",
    "ctf_parameters",
    "note_contradictions",
    "note_outside",
    "note_unused",
    "optics_rows",
    "pixel_sizes",
    "refuse_tomograms",
    "same",
    "tell_done",
    "told_aberrations",
    "with_origins",
]

#: The columns of a CTF and the fields of :class:`cryoem.particles.CtfParameters`, with what RELION
#: takes where a column is missing (None: it must be there).
CTF = {
    "rlnDefocusU": ("defocus_u_angstrom", None),
    "rlnDefocusV": ("defocus_v_angstrom", None),
    "rlnDefocusAngle": ("defocus_angle_degrees", 0.0),
    "rlnVoltage": ("voltage_kv", None),
    "rlnSphericalAberration": ("spherical_aberration_mm", None),
    "rlnAmplitudeContrast": ("amplitude_contrast", None),
    "rlnPhaseShift": ("phase_shift_degrees", 0.0),
    "rlnCtfBfactor": ("b_factor_angstrom2", 0.0),
    "rlnCtfScalefactor": ("scale", 1.0),
}
#: Those of them that an optics group has; the others are each particle's.
MICROSCOPE = ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")

#: What was done to the images, and the column of an optics group or of a particle that says it.
DONE = {
    "phase flipped": "rlnCtfDataArePhaseFlipped",  # divided ones too, but about the zeros
    "premultiplied": "rlnCtfDataAreCtfPremultiplied",
}

#: Columns that are not used, and what they say where that changes nothing.
UNUSED: dict[str, float | tuple[float, ...]] = {
    "rlnIsFlip": 0.0,
    "rlnOriginZ": 0.0,
    "rlnOriginZAngst": 0.0,
    "alignments2D/shift": 0.0,
    "alignments3D/alpha": 1.0,
    "ctf/scale": 1.0,
    "ctf/scale_const": (0.0, 1.0),
    "ctf/shift_A": 0.0,
    "ctf/tilt_A": 0.0,
    "ctf/trefoil_A": 0.0,
    "ctf/tetra_A": 0.0,
    "ctf/anisomag": 0.0,
}
#: Columns that a particle may have of its own, beside its optics group's.
OWN = (*CTF, *DONE.values(), *UNDONE, EVEN, "cryoemSign")
#: All columns that are used, by their names in small letters.
USED = {
    name.lower(): name
    for name in (
        *OWN, *ORIGINS, *OPTICS, *RELION_ANGLES, "rlnOriginX", "rlnOriginY", "rlnImageName",
        "rlnImageSize", "rlnOpticsGroup", "rlnRandomSubset", "cryoemContrast",
    )
}  # fmt: skip
#: Defocus in U and V that differs no further is round, angstrom.
ROUND = 1.0
#: Names by which other programs may say what was done to the images.
TOLD_OTHERWISE = re.compile("phase_?flip|premultipl", re.IGNORECASE)
#: What only particles of tomograms have.
TOMOGRAMS = ("rlnTomoVisibleFrames", "rlnIsTomo", "rlnTomoSubTomosAre2DStacks")


def optics_rows(path: Path, optics: Table, table: Table) -> np.ndarray:
    """The row of ``optics`` for each particle, (n,) int array."""
    if "rlnOpticsGroup" not in optics or "rlnOpticsGroup" not in table:
        if length(optics) == 1:
            return np.zeros(length(table), int)
        block = "data_particles" if "rlnOpticsGroup" in optics else "data_optics"
        raise InputError(f"{path}: no column rlnOpticsGroup in {block}")
    groups = numbers(path, optics, "rlnOpticsGroup", "data_optics: ")
    wanted = numbers(path, table, "rlnOpticsGroup")
    order = np.argsort(groups, kind="stable")
    for first, second in itertools.pairwise(order):
        differs = [name for name, column in optics.items() if column[first] != column[second]]
        if groups[first] == groups[second] and differs:
            raise InputError(
                f"{path}: data_optics: rows {first + 1} and {second + 1}, column rlnOpticsGroup: "
                f"got {groups[first]:g} in both, and {differs[0]} differs; wanted one row a group"
            )
    place = order[np.minimum(np.searchsorted(groups, wanted, sorter=order), len(groups) - 1)]
    if (bad := groups[place] != wanted).any():
        raise InputError(
            f"{path}: row {np.argmax(bad) + 1}, column rlnOpticsGroup: group {wanted[bad][0]:g} "
            "is not in data_optics"
        )
    return place


def pixel_sizes(
    path: Path, optics: Table, table: Table, group: np.ndarray, given: float | None = None
) -> np.ndarray:
    """The pixel size of each particle's image, angstrom: alike but for the fourth digit.

    Where ``optics`` does not say it, it is computed as RELION 3.0 has it, or ``given``; and put
    there.
    """
    told_of = "rlnImagePixelSize" in optics
    if not told_of:
        found = _magnified(path, optics, table, group)
        if found is None and given is None:
            raise InputError(
                f"{path}: no column rlnImagePixelSize in data_optics, nor rlnDetectorPixelSize and "
                "rlnMagnification; wanted one of them, or --pixel-size"
            )
        optics["rlnImagePixelSize"] = np.full(length(optics), given) if found is None else found
    sizes = numbers(path, optics, "rlnImagePixelSize", "data_optics: ")[group]
    if (other := ~np.isclose(sizes, sizes[0], rtol=1e-4)).any():
        row = int(np.argmax(other))
        names = optics.get("rlnOpticsGroupName", np.arange(length(optics)) + 1)
        raise InputError(
            f"{path}: row {row + 1}: {named(path, 'rlnImagePixelSize')} is {sizes[row]:g} A in its "
            f"optics group ({names[group[row]]}), {sizes[0]:g} A in that of row 1 "
            f"({names[group[0]]}); wanted one pixel size"
        )
    if given is not None and not np.isclose(sizes[0], given, rtol=1e-4):
        raise InputError(
            f"{path}: a pixel size of {given:g} A was given, and the file says {sizes[0]:g} A; "
            "wanted one where the file has none"
        )
    if "rlnImagePixelSize" in table:
        told = numbers(path, table, "rlnImagePixelSize")
        if (other := ~np.isclose(sizes, told, rtol=1e-3)).any():
            raise InputError(
                f"{path}: row {np.argmax(other) + 1}, column rlnImagePixelSize: got "
                f"{told[other][0]:g} A, and {sizes[other][0]:g} A in its optics group"
            )
    if told_of:
        _note_magnified(path, optics, table, group, sizes)
    return sizes


def _note_magnified(
    path: Path, optics: Table, table: Table, group: np.ndarray, sizes: np.ndarray
) -> None:
    """Say where detector and magnification, of before images were scaled, tell other pixels."""
    try:
        found = _magnified(path, optics, table, group)
    except InputError:  # not one of each group: not of these images
        return
    if found is not None and (other := ~np.isclose(found[group], sizes, rtol=5e-3)).any():
        warnings.warn(
            f"{path}: rlnDetectorPixelSize and rlnMagnification make pixels of "
            f"{found[group][other][0]:g} A, rlnImagePixelSize {sizes[other][0]:g} A, which is used",
            stacklevel=3,
        )


def _magnified(path: Path, optics: Table, table: Table, group: np.ndarray) -> np.ndarray | None:
    """The pixel size of each optics group by the detector's and the magnification, where told."""
    parts = []
    for name in ("rlnDetectorPixelSize", "rlnMagnification"):
        if name in optics:
            parts.append(numbers(path, optics, name, "data_optics: "))
        elif name in table:
            of_groups = np.ones(length(optics))
            of_groups[group] = values = numbers(path, table, name)
            if (bad := of_groups[group] != values).any():
                raise InputError(
                    f"{path}: row {np.argmax(bad) + 1}, column {name}: got {values[bad][0]:g}, and "
                    f"{of_groups[group][bad][0]:g} for others of its optics group"
                )
            parts.append(of_groups)
        else:
            return None
    return np.round(1e4 * parts[0] / parts[1], 9)


def with_origins(path: Path, table: Table, sizes: np.ndarray) -> Table:
    """The particles with origins in angstrom, where the file has them in pixels."""
    pixels = ("rlnOriginX", "rlnOriginY")
    told = [name for name in (*pixels, *ORIGINS) if name in table]
    if len({name.removesuffix("Angst") for name in told}) == 1:
        other = told[0].translate(str.maketrans("XY", "YX"))
        raise InputError(f"{path}: has {told[0]}, but no column {other}")
    for old, new in zip(pixels, ORIGINS, strict=True):
        if old not in table:
            continue
        origin = numbers(path, table, old) * sizes
        if new not in table:
            table = {
                new if name == old else name: origin if name == old else column
                for name, column in table.items()
            }
            continue
        if (bad := np.abs(origin - numbers(path, table, new)) > 0.01 * sizes).any():
            row = int(np.argmax(bad))
            raise InputError(
                f"{path}: row {row + 1}, column {new}: got {table[new][row]!s} A, and {old} says "
                f"{table[old][row]!s} px, {origin[row]:g} A; wanted one of the two columns"
            )
        table = {name: column for name, column in table.items() if name != old}
    return table


def note_outside(path: Path, shifts_px: np.ndarray, box_px: int) -> None:
    """Say which particles' origins lie outside their images."""
    outside = (np.abs(shifts_px) > box_px / 2).any(axis=1)
    if box_px and outside.any():
        row = int(np.argmax(outside))
        x, y = -shifts_px[row]
        warnings.warn(
            f"{path}: origins of {outside.sum():,} of {len(outside):,} particles lie outside their "
            f"images of {box_px} px, such as that of row {row + 1}, ({x:g}, {y:g}) px from the "
            "middle",
            stacklevel=3,
        )


def ctf_parameters(
    path: Path, optics: Table, table: Table, group: np.ndarray
) -> CtfParameters | None:
    """The parameters of each particle's CTF, or None where the file has no defocus."""
    even, done = even_zernike(path, optics, table, group), _done(path, optics, table, group)
    if not any(name in told for name in ("rlnDefocusU", "rlnDefocusV") for told in (optics, table)):
        if (changed := done != "as seen").any():
            warnings.warn(
                f"{path}: images are {done[changed][0]} (row {np.argmax(changed) + 1}), and no "
                "column rlnDefocusU says by which CTF; they are taken for images without one",
                stacklevel=3,
            )
        return None
    parameters: dict[str, np.ndarray] = {}
    for name, (argument, default) in CTF.items():
        if (values := numbers_of(path, optics, table, group, name)) is not None:
            parameters[argument] = values
        elif default is None:
            raise InputError(f"{path}: has defocus, but no {called(path, name)}")
    defocus = called(path, "rlnDefocusU")
    largest = np.abs(parameters["defocus_u_angstrom"]).max()
    if largest < 100:
        raise InputError(
            f"{path}: {defocus}: nothing above {largest:g} A; wanted angstrom (1 micrometre is "
            "10000), or no defocus for images without CTF"
        )
    if np.median(parameters["defocus_u_angstrom"]) < 0:
        warnings.warn(
            f"{path}: {defocus}: most are negative, over focus, and taken so; under focus is "
            "positive",
            stacklevel=3,
        )
    apart = np.abs(parameters["defocus_u_angstrom"] - parameters["defocus_v_angstrom"]).max()
    if "defocus_angle_degrees" not in parameters and apart > ROUND:
        warnings.warn(
            f"{path}: no {called(path, 'rlnDefocusAngle')}, and {named(path, 'rlnDefocusU')} and "
            f"{named(path, 'rlnDefocusV')} are up to {apart:g} A apart; an angle of 0 is taken",
            stacklevel=3,
        )
    return CtfParameters(**parameters, even_zernike=even, images=done)


def _done(path: Path, optics: Table, table: Table, group: np.ndarray) -> np.ndarray:
    """What was done to each image already."""
    done = np.full(len(group), "as seen", "U13")
    for what, name in DONE.items():
        if (flags := numbers_of(path, optics, table, group, name)) is not None:
            done[flags != 0] = what
    return done


# --------------------------------------------------------------------------------------
# What is not used


def refuse_tomograms(path: Path, optics: Table, table: Table, group: np.ndarray) -> None:
    """Refuse particles whose images are tilt series, or volumes."""
    name = "rlnImageDimensionality"
    if name in optics:
        found = numbers(path, optics, name, "data_optics: ")[group]
        if (bad := found != 2).any():
            raise InputError(
                f"{path}: row {np.argmax(bad) + 1}: {name} is {found[bad][0]:g} in its optics "
                "group; wanted 2, images"
            )
    for name in TOMOGRAMS:
        for told in (optics, table):
            if name in told and any(str(value) not in ("0", "0.0") for value in told[name]):
                raise InputError(
                    f"{path}: column {name}: particles of tomograms; wanted one image a particle"
                )


def note_contradictions(path: Path, optics: Table, table: Table, group: np.ndarray) -> None:
    """Say where a particle's own columns say otherwise than those of its optics group."""
    found = []
    for name in OWN:
        if name not in optics or name not in table:
            continue
        own, groups = table[name], optics[name][group]
        try:
            off = ~np.isclose(own.astype(float), groups.astype(float), rtol=1e-6)
        except ValueError:
            off = own.astype(str) != groups.astype(str)
        if off.any():
            row = int(np.argmax(off))
            found.append(f"{name} ({own[row]!s} in row {row + 1}, {groups[row]!s} in its group)")
    if found:
        warnings.warn(
            f"{path}: data_particles says otherwise than data_optics, and is followed: "
            f"{', '.join(found)}",
            stacklevel=3,
        )


def note_unused(path: Path, optics: Table, table: Table) -> None:
    """Say once which columns would matter and are not used."""
    found = []
    for told in (optics, table):
        for name, column in told.items():
            usual, known = UNUSED.get(name), USED.get(name.lower(), name)
            if known != name:
                found.append(f"{name} ({known} is)")
            if name in DONE.values() or (name == "alignments2D/shift" and ORIGINS[0] in table):
                continue
            if usual is None and TOLD_OTHERWISE.search(name):
                usual = 0.0
            if name == "rlnNormCorrection":
                values = _all_numbers(column)
                if np.ptp(values) > 0.01 * np.abs(values).max():
                    found.append(f"{name} ({values.min():g} to {values.max():g})")
            elif usual is not None:
                found += _unusual({name: column}, {name: usual})
    if found:
        warnings.warn(f"{path}: columns that are not used: {', '.join(found)}", stacklevel=3)


def told_aberrations(optics: Mapping[str, np.ndarray], table: Mapping[str, np.ndarray]) -> str:
    """Name the aberrations that a file tells, by columns, each with its largest value."""
    usual = {**UNDONE, EVEN: 0.0}
    return ", ".join(_unusual(optics, usual) + _unusual(table, usual)) or "none"


def _unusual(
    told: Mapping[str, np.ndarray], usual: Mapping[str, float | tuple[float, ...]]
) -> list[str]:
    """Columns that say something else than usual, with the value that is farthest from it."""
    found = []
    for name, column in told.items():
        if name not in usual:
            continue
        values = _all_numbers(column)
        off = np.min([np.abs(values - one) for one in np.atleast_1d(usual[name])], axis=0)
        if off.max() > 1e-4:
            found.append(f"{name} ({values[off.argmax()]:g})")
    return found


def _all_numbers(column: np.ndarray) -> np.ndarray:
    """The numbers that a column holds, lists of them among them; at least one."""
    if column.dtype.kind in "iuf":
        return column
    words = [word for text in {*map(str, column)} for word in re.split(r"[\s,\[\]()]+", text)]
    values = []
    for word in words:
        try:
            values.append(float(word))
        except ValueError:
            values += [1.0] if word.lower() == "true" else []
    return np.array(values or [0.0])


# --------------------------------------------------------------------------------------
# Writing


def same(before: np.ndarray, values: np.ndarray) -> bool:
    """Whether a column says these numbers already, but for their last digit."""
    try:
        return np.allclose(before.astype(float), values.astype(float), rtol=1e-14, atol=1e-13)
    except (TypeError, ValueError):
        return False


def ctf_columns(stack: ParticleStack, parameters: CtfParameters, optics: Table) -> Table:
    """Parameters that columns have, and those that the optics groups do not say.

    What the groups say otherwise is taken out of ``optics``.
    """
    columns: Table = {}
    for name, (field, default) in CTF.items():
        values = getattr(parameters, field)
        other = name in optics and not same(optics[name][stack.optics_group], values)
        if other and name not in MICROSCOPE:
            del optics[name]
        if name in stack.columns:
            told = True
        elif other or name in optics:
            told = other
        else:
            usual = name == "rlnDefocusAngle" and stack.origin is None
            told = default is None or usual or bool((values != default).any())
        if told:
            columns[name] = values
    return columns


def tell_done(path: Path, stack: ParticleStack, optics: Table, table: Table) -> None:
    """Write what was done to the images already, where the file does not say so."""
    group, parameters = stack.optics_group, stack.ctf_parameters
    if parameters is None:
        return
    done = getattr(stack.images, "as_kept", np.asarray)(parameters.images)
    if np.array_equal(done, _done(path, optics, table, group)):
        return
    for what, name in DONE.items():
        flags = (np.where(done == "divided", "phase flipped", done) == what).astype(int)
        of_groups = np.zeros(length(optics), int)
        of_groups[group] = flags
        optics.pop(name, None)
        table.pop(name, None)
        if (of_groups[group] == flags).all():
            optics[name] = of_groups
        else:
            table[name] = flags
