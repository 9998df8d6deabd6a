"""A map from the images alone: ``abinitio``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import typer

from ..errors import InputError
from ..half_sets import FEWEST
from .mapping import NO_MAP, map_files, put_aside, write_halves
from .opening import open_map, open_particles, prepared
from .options import (
    FARTHEST,
    Invert,
    MapVoxelSize,
    Particles,
    PixelSize,
    Quiet,
    Scheduler,
    Seed,
    StarOut,
    app,
    between,
    check_outputs,
    positive,
)

if TYPE_CHECKING:
    from ..density import Density
    from ..particles import ParticleStack


WantedSymmetry = Annotated[
    str | None,
    typer.Option("--symmetry", help="Point group: C1, C4, D2, O, ...; default: found out."),
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
        help="Angstrom, how far particles may be off-centre; default: a tenth of the frame.",
        callback=between("--shift", 0, FARTHEST),
    ),
]
Images = Annotated[
    int,
    typer.Option(min=20, help="How many images, at random, the starts look at; all are placed."),
]
ClassesWanted = Annotated[
    int,
    typer.Option(
        "--classes", min=1, help="How many maps, solved together; the images are sorted by them."
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        metavar="MAP",
        help="Begin with this map, or atomic model, to 30 A, in place of random starts.",
    ),
]


@app.command("abinitio")
def find_map(
    particles_file: Particles,
    output: StarOut,
    symmetry: WantedSymmetry = None,
    starts: Starts = 8,
    classes: ClassesWanted = 1,
    reference: Reference = None,
    diameter: Diameter = None,
    shift: Shift = None,
    images: Images = 10_000,
    voxel_size: MapVoxelSize = None,
    invert: Invert = None,
    pixel_size: PixelSize = None,
    scheduler: Scheduler = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Find orientations, shifts and a map from the images alone: no model, no training.

    Writes OUTPUT (.star, with rlnRandomSubset and cryoemExpectedErrorRad), the map and half-maps
    (.mrc), their FSC (_fsc.star) and a report (.html), as refine does. Each half of the images is
    solved by itself; where the two do not agree there is no map: the report says why, nothing else
    is written, what an earlier run has left is renamed, and the exit code is 3.

    With --classes K, images of several particles, or of one and of junk, are sorted first by K maps
    that are solved together. All that is said above is then written of each class, as
    OUTPUT_class1 and so on, the largest first (rlnClassNumber); images that no map explains, and
    those of classes without a map, are written without new poses. Exit code 3: no class has a map.
    """
    told = Told(symmetry, starts, classes, reference, diameter, shift, images, voxel_size, seed)
    stack = told.checked(open_particles(particles_file, quiet, pixel_size))
    check_outputs({"--output": told.files(output, stack)}, [particles_file, reference], stack)
    stack, _ = prepared(stack, particles_file, invert, quiet, seed)
    if not find_maps(stack, output, particles_file.name, told, scheduler, quiet):
        raise typer.Exit(NO_MAP)


@dataclass(frozen=True)
class Told:
    """What a user said of how to find a map."""

    symmetry: str | None
    starts: int
    classes: int
    reference: str | None
    diameter: float | None
    shift: float | None
    images: int
    voxel_size: float | None
    seed: int

    def __post_init__(self) -> None:
        if self.classes > 1 and self.reference:
            raise InputError("--reference: one map is begun with; wanted no --classes beside it")
        if self.voxel_size and not self._is_map:
            raise InputError("--voxel-size: is told of an MRC map that is the --reference")

    @property
    def _is_map(self) -> bool:
        """Whether the reference is a map; otherwise an atomic model, or there is none."""
        name = (self.reference or "").lower().removesuffix(".gz")
        return name.endswith((".mrc", ".map"))

    def outputs(self, output: Path) -> list[Path]:
        """The STAR files of the classes; of one class only, ``output``. First that of no class."""
        if self.classes == 1:
            return [output]
        return [output.with_stem(f"{output.stem}_class{i}") for i in range(self.classes + 1)]

    def files(self, output: Path, stack: ParticleStack) -> list[Path]:
        """All that is written."""
        return [path for out in self.outputs(output) for path in map_files(out, stack)]

    def checked(self, stack: ParticleStack) -> ParticleStack:
        """The particles; the map can be read, which is seen before anything is computed."""
        self.known(stack)
        return stack

    def known(self, stack: ParticleStack) -> Density | None:
        """The map to begin with."""
        from ..structures import SHIPPED, load_density

        if self.reference is None:
            return None
        path = Path(self.reference)
        if self._is_map:
            return open_map(path, self.voxel_size, stack, centred=True)
        if self.reference.lower() not in SHIPPED and not path.exists():
            raise InputError(f"--reference: {path}: no such file")
        pixel = stack.pixel_size_angstrom
        return load_density(
            self.reference,
            box_px=stack.box_px,
            voxel_size_angstrom=pixel,
            resolution_angstrom=max(8.0, 2 * pixel),
        )


class Found(NamedTuple):
    """A class that has a map: its STAR file's name, and its symmetry."""

    file: str
    symmetry: str


def find_maps(
    stack: ParticleStack,
    output: Path,
    name: str,
    told: Told,
    scheduler: str | None,
    quiet: bool,
) -> list[Found]:
    """Find a map, or sort the images and find one of each class; those that have one."""
    from ..abinitio import classify
    from ..io.particles import write_particles

    if told.classes == 1:
        found = _one(stack, output, f"{len(stack):,} particles of {name}", told, scheduler, quiet)
        if found is None:
            put_aside(map_files(output, stack)[:-1])
        return [found] if found else []
    classes = classify(
        stack, told.classes, diameter_angstrom=told.diameter, shift_angstrom=told.shift,
        starts=max(1, told.starts // 2), images=told.images, seed=told.seed,
        scheduler=scheduler, progress=not quiet,
    )  # fmt: skip
    number = classes.number
    rows = np.arange(len(stack))
    stack = stack.with_columns(
        {
            "rlnClassNumber": number,
            "cryoemClassProbability": classes.probabilities[rows, number],
        }
    )
    with_map = []
    for i, out in enumerate(told.outputs(output)):
        part = stack.select(number == i)
        title = f"{len(part):,} of {len(stack):,} particles of {name}, " + (
            f"class {i}" if i else "which no map explains"
        )
        found = None
        if i and len(part) >= FEWEST:
            found = _one(part, out, title, told, scheduler, quiet)
        elif len(part):
            typer.echo(f"{out}: {title}" + (": too few for a map" if i else ""))
        elif i:
            typer.echo(f"{title}: no map")
        if found:
            with_map.append(found)
            continue
        earlier = map_files(out, part)
        reported = i and len(part) >= FEWEST
        put_aside(path for path in (earlier[:-1] if reported else earlier) if path != out)
        if len(part):
            write_particles(out, part)
        else:
            put_aside([out])
    return with_map


def _one(
    stack: ParticleStack,
    output: Path,
    title: str,
    told: Told,
    scheduler: str | None,
    quiet: bool,
) -> Found | None:
    """Find a map, write it where there is one, and a report in any case."""
    from .. import report
    from ..abinitio import ab_initio
    from ..density import write_density
    from ..io.particles import write_particles

    found = ab_initio(
        stack,
        symmetry=told.symmetry,
        starts=told.starts,
        diameter_angstrom=told.diameter,
        shift_angstrom=told.shift,
        images=told.images,
        reference=told.known(stack),
        seed=told.seed,
        scheduler=scheduler,
        progress=not quiet,
    )
    map_path, page = output.with_suffix(".mrc"), output.with_suffix(".html")
    if found.verdict.found:
        write_particles(output, found.particles)
        sharp = write_halves(map_path, found.half_maps, found.fsc, found.mask)
        write_density(map_path, found.density)
    said = str(found.verdict)
    if not found.verdict.found:  # no picture of what is not there
        report.write(page, title, [("Result", [said[0].upper() + said[1:] + "."])])
        typer.echo(f"{page}: {said}")
        return None
    came = "From the images alone"
    hand = "The hand is open: the mirror image explains the images as well."
    if told.reference is not None:
        came = f"Begun with {Path(told.reference).name} to 30 A, in its frame"
        hand = "The hand is that of the reference: no image tells it."
    report.write_map(
        page,
        title,
        found.half_maps,
        found.fsc,
        found.mask,
        found.particles.oriented(),
        symmetry=found.axes.symmetry,
        notes=[
            said[0].upper() + said[1:] + ".",
            f"{came}; symmetry {found.axes.symmetry}, diameter {found.diameter_angstrom:.0f} A. "
            + hand,
        ],
        growth=found.history,
        sharp=sharp,
    )
    typer.echo(
        f"{output}: {said}; symmetry {found.axes.symmetry}, "
        f"diameter {found.diameter_angstrom:.0f} A"
    )
    return Found(output.name, found.axes.symmetry)
