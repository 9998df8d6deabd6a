"""How good it is, and what a file holds: ``evaluate``, ``info``."""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from .. import rotations
from ..errors import InputError
from ..half_sets import image_of
from .opening import (
    bad_told,
    by_file,
    contrasts_told,
    looked_at,
    open_map,
    open_oriented,
    open_particles,
)
from .options import (
    OF_MAP,
    Json,
    MapVoxelSize,
    Particles,
    PixelSize,
    Seed,
    Symmetry,
    app,
    check_outputs,
    ending_in,
    print_figures,
    refuse_alone,
    say,
    star_files,
)

if TYPE_CHECKING:
    from ..density import Density
    from ..particles import ParticleStack

#: How the names of atomic models end.
MODELS = (".pdb", ".pdb1", ".ent", ".cif", ".mmcif")
#: Images that ``info`` looks at.
LOOKED_AT = 1000


@app.command("evaluate")
def evaluate_particles(
    particles_file: Particles,
    truth: Annotated[Path, typer.Option(help="Particle file with the true orientations.")],
    map_file: Annotated[Path | None, typer.Option("--map", help="Map to judge.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Map to judge it by.")] = None,
    voxel_size: MapVoxelSize = None,
    symmetry: Symmetry = "C1",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare orientations with true ones, image by image, and a map with a reference.

    Rows are paired by image names, whatever their folders; where names do not tell, by their order.

    Errors are angles: after a rotation of the density and its hand are fitted (one-sided: what a
    map forgives) and with nothing fitted; random orientations set the scale.
    """
    from .. import evaluation

    if (map_file is None) != (reference is None):
        raise InputError("--map and --reference come together")
    refuse_alone({"--voxel-size": voxel_size} if map_file is None else {}, OF_MAP)
    found_there, known = open_oriented(particles_file, True), open_oriented(truth, True)
    q = found_there.oriented()
    maps = None
    if map_file is not None and reference is not None:
        if voxel_size is not None:
            _check_voxels(map_file, reference, voxel_size)
        maps = open_map(map_file, voxel_size, known), open_map(reference, voxel_size, known)
    true = known.oriented()[paired(particles_file, found_there, truth, known)]
    found: dict[str, object] = {"particles": len(q), "symmetry": symmetry}
    one_sided = evaluation.orientation_errors(q, true, over="one-sided", symmetry=symmetry)
    unaligned = evaluation.orientation_errors(q, true, over="none", symmetry=symmetry)
    for name, off in (("one_sided", one_sided), ("unaligned", unaligned)):
        found |= {
            f"{name}_mean_rad": off.mean_rad,
            f"{name}_median_rad": off.median_rad,
            f"{name}_p95_rad": off.p95_rad,
        }
    found["random_mean_rad"] = evaluation.random_error(true, seed, symmetry=symmetry)
    if maps is not None:
        found |= _compare_maps(*maps, seed)
    print_figures(found, as_json)


def _check_voxels(map_file: Path, reference: Path, voxel_size: float) -> None:
    """Refuse one voxel size for two maps of which each says another one."""
    from ..density import read_density

    said = []
    for path in (map_file, reference):
        with contextlib.suppress(InputError):
            said.append(read_density(path).voxel_size_angstrom)
    if 1 not in said and len(said) == 2 and not math.isclose(*said, rel_tol=0.01):
        raise InputError(
            f"--voxel-size: {voxel_size:g} A would be that of both maps, and their headers say "
            f"{said[0]:g} A ({map_file}) and {said[1]:g} A ({reference}); wanted headers that are "
            "right"
        )


def paired(path: Path, particles: ParticleStack, truth: Path, known: ParticleStack) -> np.ndarray:
    """For each particle, the row of ``known`` that shows the same image."""
    names, others = _image_names(particles), _image_names(known)
    why = "image names are not unique"
    # As few of the folders as tell images apart: on another machine files lie elsewhere.
    for depth in range(2, max(map(len, (*names, *others)), default=1) + 1):
        mine, theirs = ([name[:depth] for name in n] for n in (names, others))
        row = {name: i for i, name in enumerate(theirs)}
        if len(row) < len(theirs) or len(set(mine)) < len(mine):
            continue
        alone = [i for i, name in enumerate(mine) if name not in row]
        missing = sorted(row[name] for name in set(row).difference(mine))
        if not alone:
            if missing:
                warnings.warn(
                    f"{path}: has {len(mine):,} of the {len(others):,} particles of {truth}; those "
                    "are judged",
                    stacklevel=2,
                )
            rows = np.array([row[name] for name in mine])
            _note_other_images(path, particles, truth, known, rows)
            return rows
        if len(alone) == len(mine):
            why = "they share no image name"
            break
        where, only, stack = (path, alone, particles) if alone else (truth, missing, known)
        raise InputError(
            f"{len(alone)} images are only in {path}, {len(missing)} only in {truth}; row "
            f"{only[0] + 1} of {where} shows {stack.columns['rlnImageName'][only[0]]}"
        )
    if len(particles) != len(known):
        raise InputError(f"{path} has {len(particles)} rows, {truth} has {len(known)}, and {why}")
    warnings.warn(f"{path} and {truth} are paired by row: {why}", stacklevel=2)
    return np.arange(len(particles))


#: Correlation above which two images are one, whatever was done to it.
SAME = 0.99


def _note_other_images(
    path: Path, particles: ParticleStack, truth: Path, known: ParticleStack, rows: np.ndarray
) -> None:
    """Say where pairs of one name show other images: the first and the last of every two files.

    They may have been extracted anew, or filtered; in noise nothing tells that from another
    particle.
    """
    from ..io.stacks import ImageStack

    mine, theirs = particles.images, known.images
    if not (isinstance(mine, ImageStack) and isinstance(theirs, ImageStack)):
        return
    files = np.stack([mine.file, theirs.file[rows]], axis=1)
    first = np.unique(files, axis=0, return_index=True)[1]
    last = len(rows) - 1 - np.unique(files[::-1], axis=0, return_index=True)[1]
    for i in np.concatenate([first, last]).tolist():
        here, there = mine.layouts[mine.file[i]], theirs.layouts[theirs.file[rows[i]]]
        if here.path.samefile(there.path):
            continue
        if not _alike(here.mapped()[mine.section[i]], there.mapped()[theirs.section[rows[i]]]):
            warnings.warn(
                f"row {i + 1} of {path} and row {rows[i] + 1} of {truth} have one image name, but "
                f"{here.path} and {there.path} hold different images; they are paired by name, "
                "which is right where those were extracted anew or filtered",
                stacklevel=3,
            )
            return


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether these are one image, whatever its sign and grey values."""
    if one.shape != other.shape:
        return False
    one, other = (image - image.mean(dtype=float) for image in (one, other))
    bound = SAME * float(np.linalg.norm(one) * np.linalg.norm(other))
    return abs(float(np.vdot(one, other))) >= bound


def _image_names(particles: ParticleStack) -> list[tuple[object, ...]]:
    """The number of each image in its stack, the stack's name, and its folders from within."""
    found: list[tuple[object, ...]] = []
    parts: dict[str, tuple[str, ...]] = {}
    for name in map(str, particles.columns.get("rlnImageName", ())):
        number, stack = image_of(name)
        if stack not in parts:
            parts[stack] = Path(os.path.normpath(stack)).parts[::-1]
        found.append((int(number or 1), *parts[stack]))
    return found


def _compare_maps(found: Density, wanted: Density, seed: int) -> dict[str, object]:
    """Figures of a map that is laid onto a reference."""
    from .. import maps

    judged = found.sampled_as(wanted.box_px, wanted.voxel_size_angstrom)
    laid = maps.register(judged, wanted, seed=seed)
    curve = maps.fsc(laid.density, wanted)
    half, fine = curve.resolution(0.5), curve.resolution(0.143)
    return {
        "resolution_fsc05_angstrom": half.angstrom,
        "resolution_fsc0143_angstrom": fine.angstrom,
        "nyquist_limited": fine.nyquist_limited,
        "mean_fsc": curve.mean,
        "mirrored": laid.mirrored,
    }


@app.command("info")
def describe(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Particles, map, stack, model or estimator.")
    ],
    pixel_size: PixelSize = None,
    good: Annotated[
        Path | None,
        typer.Option(
            help="STAR file to write: the particles without images that no command takes (constant "
            "ones, some that are no numbers, or far louder or fainter than others). All are read.",
            callback=ending_in(".star", option="--good"),
        ),
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Say what a file holds; of particles also their contrast, noise, shifts and defocus."""
    from ..io import files

    path = files.existing(file)
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".star", ".cs", ".mrcs", ".npy")):
        if good is not None:
            _write_good(path, good, pixel_size)
        print_figures(_of_particles(path, seed, pixel_size), as_json)
        return
    refuse_alone(
        {"--pixel-size": pixel_size, "--good": good},
        f"is told of particles, which {path} does not hold",
    )
    if name.endswith((".mrc", ".map")):
        found = _of_map(path)
    elif name.endswith(".npz"):
        found = _of_estimator(path)
    elif name.endswith(MODELS):
        found = _of_model(path)
    else:
        raise InputError(
            f"{path}: not a kind that is known by its name; wanted particles (.star, .cs), images "
            "(.mrcs, .npy), a map (.mrc, .map), an estimator (.npz) or a model (.pdb, .cif)"
        )
    print_figures(found, as_json)


def _write_good(path: Path, good: Path, pixel_size: float | None) -> None:
    """Write the particles whose images can be used, and say which are left out."""
    from ..io.particles import write_particles

    stack = open_particles(path, True, pixel_size)
    check_outputs({"--good": star_files(good, stack)}, [path], stack)
    seen, bad = looked_at(stack.divided(), False)
    if seen is None:
        raise InputError(f"{path}: {bad_told(stack, bad)}: none is left to be written")
    left = np.arange(len(stack))
    if bad:
        left = np.setdiff1d(left, np.concatenate([*bad.values()]))
        warnings.warn(f"{path}: {bad_told(stack, bad)}; they are left out", stacklevel=2)
    write_particles(good, stack.select(left))
    say(False, f"{good}: {len(left):,} of {len(stack):,} particles")


def _of_particles(path: Path, seed: int, pixel_size: float | None) -> dict[str, object]:
    from ..io.names import NoSuchStackError
    from ..io.particles import read_particles

    try:
        stack = open_particles(path, True, pixel_size)
    except NoSuchStackError as error:
        warnings.warn(f"images: not found ({error})", stacklevel=2)
        stack = read_particles(path, pixel_size_angstrom=pixel_size, images=False)
        return _told_of(stack)
    found = _surveyed(stack, path, seed)
    if not found["noise_variance"]:
        warnings.warn(
            f"{path}: the corners of its images are constant: their noise cannot be measured",
            stacklevel=2,
        )
    return {**_told_of(stack), **found}


def _told_of(stack: ParticleStack) -> dict[str, object]:
    """What a particle file says, without its images."""
    from ..io.optics import told_aberrations
    from ..surveying import told

    optics = {} if stack.origin is None else stack.origin.optics
    names = {image_of(str(name))[1] for name in stack.columns.get("rlnImageName", [""])}
    return {
        "kind": "particles" if stack.origin else "images alone",
        "particles": len(stack),
        "box_px": stack.box_px or "not told",
        "pixel_size_angstrom": stack.pixel_size_angstrom,
        "stacks": len(names),
        "optics_groups": stack.optics_groups,
        "angles": stack.quaternions is not None,
        "half_sets": stack.half_set is not None,
        "aberrations": told_aberrations(optics, stack.columns),
        "columns": ", ".join(stack.columns),
        **told(stack),
    }


def _surveyed(stack: ParticleStack, path: Path, seed: int) -> dict[str, object]:
    """What a survey says of some images, the noise as its power at some resolutions."""
    from ..surveying import survey

    drawn = rotations.generator(seed, "info").permutation(len(stack))[:LOOKED_AT]
    some = stack.select(np.sort(drawn)).divided()
    seen, bad = looked_at(some, True)
    if bad:
        told = bad_told(some, bad)
        if seen is None:
            raise InputError(f"{path}: {told}")
        warnings.warn(f"{path}: of those that were looked at {told}", stacklevel=2)
        some = some.select(np.setdiff1d(np.arange(len(some)), np.concatenate([*bad.values()])))
    assert seen is not None
    _, odd, mixed = seen.contrasts(by_file(some))
    if len(odd):
        warnings.warn(f"{path}: {contrasts_told(some, odd)}", stacklevel=2)
    found = dict(vars(survey(some, images=LOOKED_AT, seed=seed)))
    if found["contrast"] in ("black on white", "mixed") and not mixed:
        warnings.warn(f"{path}: the commands turn black images as they read them", stacklevel=2)
    noise = found.pop("noise")
    if noise is not None:
        pixel = stack.pixel_size_angstrom
        periods = [p for p in (200, 100, 50, 30, 20, 15, 10, 7, 5, 4, 3) if p >= 2 * pixel]
        power = noise.at(np.array([pixel / p for p in periods])).mean(axis=0)
        found["noise_power_by_angstrom"] = {
            str(p): float(f"{value:.4g}") for p, value in zip(periods, power, strict=True)
        }
    return found


def _of_map(path: Path) -> dict[str, object]:
    from ..density import read_density
    from ..surveying import is_black

    cube = read_density(path)
    if is_black(cube):
        warnings.warn(
            f"{path}: is negative where the particle is, black on white; the commands invert it",
            stacklevel=2,
        )
    return {
        "kind": "map",
        "shape_zyx": list(cube.values.shape),
        "voxel_size_angstrom": cube.voxel_size_angstrom,
        "minimum": float(cube.values.min()),
        "maximum": float(cube.values.max()),
        "standard_deviation": float(cube.values.std()),
    }


def _of_estimator(path: Path) -> dict[str, object]:
    """What an estimator's file says of itself, read without its network."""
    from ..io.files import read_npz

    what = "an estimator's file"
    try:
        return {"kind": "estimator", **dict(json.loads(str(read_npz(path, what)["settings"])))}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not {what} ({error})") from error


def _of_model(path: Path) -> dict[str, object]:
    from ..density import read_structure

    model = read_structure(path)
    return {
        "kind": "atomic model",
        "atoms": model.count_atom_sites(),
        "chains": len(model),
        "mass_kda": model.calculate_mass() / 1000,
    }
