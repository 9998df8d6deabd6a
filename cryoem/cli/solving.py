"""From the images alone: ``abinitio``, ``solve``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..version import __version__
from .mapping import map_files, refine_particles, write_halves
from .options import (
    Invert,
    Particles,
    PixelSize,
    Quiet,
    Seed,
    StarOut,
    app,
    check_outputs,
    open_particles,
    positive,
    prepared,
    say,
)

if TYPE_CHECKING:
    from ..abinitio import AbInitio
    from ..particles import ParticleStack

#: Exit code where the images do not agree on any map.
NO_MAP = 3

WantedSymmetry = Annotated[
    str | None,
    typer.Option("--symmetry", help="Point group: C1, C4, D2, ...; default: found out."),
]
Starts = Annotated[int, typer.Option(help="Random starts, shared out among the halves.")]
Diameter = Annotated[
    float | None,
    typer.Option(
        help="Angstrom, of the particle; default: as the images say.",
        callback=positive("--diameter"),
    ),
]
Shift = Annotated[
    float | None,
    typer.Option(
        min=0, help="Angstrom, how far particles may be off-centre; default: a tenth of the frame."
    ),
]
Images = Annotated[
    int,
    typer.Option(min=20, help="How many images, at random, the starts look at; all are placed."),
]


@app.command("abinitio")
def find_map(
    particles_file: Particles,
    output: StarOut,
    symmetry: WantedSymmetry = None,
    starts: Starts = 8,
    diameter: Diameter = None,
    shift: Shift = None,
    images: Images = 10_000,
    invert: Invert = None,
    pixel_size: PixelSize = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Find orientations, shifts and a map from the images alone: no model, no training.

    Writes OUTPUT (.star, with rlnRandomSubset and cryoemExpectedErrorRad), the map and half-maps
    (.mrc), their FSC (_fsc.star) and a report (.html). Each half of the images is solved by itself;
    where the two do not agree there is no map: the report says why, nothing else is written, and
    the exit code is 3.
    """
    stack = open_particles(particles_file, quiet, pixel_size)
    check_outputs({"--output": map_files(output, stack)}, [particles_file], stack)
    stack, _ = prepared(stack, particles_file, invert, quiet, seed)
    found = _found(
        stack, output, f"{len(stack):,} particles of {particles_file.name}", quiet,
        symmetry=symmetry, starts=starts, diameter=diameter, shift=shift, images=images, seed=seed,
    )  # fmt: skip
    if not found.verdict.found:
        raise typer.Exit(NO_MAP)


@app.command("solve")
def solve_particles(
    particles_file: Particles,
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")],
    symmetry: WantedSymmetry = None,
    starts: Starts = 8,
    diameter: Diameter = None,
    shift: Shift = None,
    images: Images = 10_000,
    rounds: Annotated[int, typer.Option(help="Of refinement.")] = 5,
    invert: Invert = None,
    pixel_size: PixelSize = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """From a particle file to a refined map in one command, by the images alone.

    It is `abinitio` (FOLDER/initial.star, .mrc, .html) and then `refine`, half against half, with
    the symmetry that was found (FOLDER/refined.star, .mrc, .html). Interrupted and called again, it
    goes on after what is done. Where the images do not agree on a map, the exit code is 3.
    """
    stack = open_particles(particles_file, quiet, pixel_size)
    initial, refined = folder / "initial.star", folder / "refined.star"
    note = folder / "solve.json"
    check_outputs(
        {"--output": [note, *map_files(initial, stack), *map_files(refined, stack)]},
        [particles_file],
        stack,
    )
    told = {
        "version": __version__,
        "particles": _state(particles_file, stack),
        "symmetry": symmetry,
        "starts": starts,
        "diameter": diameter,
        "shift": shift,
        "images": images,
        "invert": invert,
        "pixel_size": pixel_size,
        "seed": seed,
    }
    known = _known(note, told)
    if known is None:
        stack, _ = prepared(stack, particles_file, invert, quiet, seed)
        found = _found(
            stack, initial, f"{len(stack):,} particles of {particles_file.name}", quiet,
            symmetry=symmetry, starts=starts, diameter=diameter, shift=shift, images=images,
            seed=seed,
        )  # fmt: skip
        if not found.verdict.found:
            raise typer.Exit(NO_MAP)
        known = found.axes.symmetry
        _remember(note, told, known)
    else:
        say(quiet, f"{initial}: is there already")
    refine_particles(
        initial, refined, rounds=rounds, symmetry=known, invert=False, pixel_size=pixel_size,
        seed=seed, quiet=quiet,
    )  # fmt: skip


def _found(
    stack: ParticleStack,
    output: Path,
    title: str,
    quiet: bool,
    *,
    symmetry: str | None,
    starts: int,
    diameter: float | None,
    shift: float | None,
    images: int,
    seed: int,
) -> AbInitio:
    """Find a map, write it where there is one, and a report in any case."""
    from .. import report
    from ..abinitio import ab_initio
    from ..density import write_density
    from ..io.particles import write_particles

    found = ab_initio(
        stack,
        symmetry=symmetry,
        starts=starts,
        diameter_angstrom=diameter,
        shift_angstrom=shift,
        images=images,
        seed=seed,
        progress=not quiet,
    )
    map_path, page = output.with_suffix(".mrc"), output.with_suffix(".html")
    if found.verdict.found:
        write_particles(output, found.particles)
        write_halves(map_path, found.half_maps, seed)
        write_density(map_path, found.density)
    said = str(found.verdict)
    if not found.verdict.found:  # no picture of what is not there
        report.write(page, title, [("Result", [said[0].upper() + said[1:] + "."])])
        typer.echo(f"{page}: {said}")
        return found
    report.write_map(
        page,
        title,
        found.half_maps,
        found.fsc,
        found.mask,
        found.particles.oriented(),
        notes=[
            said[0].upper() + said[1:] + ".",
            f"From the images alone; symmetry {found.axes.symmetry}, diameter "
            f"{found.diameter_angstrom:.0f} A. The hand is open: the mirror image explains the "
            "images as well.",
        ],
        growth=found.history,
    )
    typer.echo(
        f"{output}: {said}; symmetry {found.axes.symmetry}, "
        f"diameter {found.diameter_angstrom:.0f} A"
    )
    return found


def _state(particles_file: Path, stack: ParticleStack) -> list[list[object]]:
    """Which files are read, and how they stand: names, sizes and times."""
    from ..io.stacks import ImageStack

    images = stack.images
    stacks = [layout.path for layout in images.layouts] if isinstance(images, ImageStack) else []
    paths = sorted({os.path.realpath(path) for path in (particles_file, *stacks)})
    return [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths]


def _known(note: Path, told: Mapping[str, object]) -> str | None:
    """The symmetry that an earlier run of the same kind has found, or None: there was none."""
    if not note.exists():
        return None
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
        symmetry = str(before.pop("found"))
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{note}: not what solve writes ({error})") from error
    differing = [name for name in told if before.get(name) != told[name]]
    if differing:
        raise InputError(
            f"{note.parent}: holds the results of another run ({', '.join(differing)} differ); "
            "wanted another folder"
        )
    return symmetry


def _remember(note: Path, told: Mapping[str, object], symmetry: str) -> None:
    """Write down what was found, and with what."""
    from ..io import files

    with files.atomic(note) as temporary:
        temporary.write_text(json.dumps({**told, "found": symmetry}, indent=1), encoding="utf-8")
