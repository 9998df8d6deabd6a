"""What is seen, and how: ``density``, ``simulate``."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from ..errors import InputError
from .opening import open_map
from .options import (
    FARTHEST,
    VOXELS,
    MapFile,
    MapOut,
    MapVoxelSize,
    Seed,
    StarOut,
    app,
    between,
    check_outputs,
    star_files,
)

#: Angstrom of defocus below which a particle file is taken for one in other units.
FOCUSED = 100.0


@app.command("density")
def make_density(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="PDB or mmCIF file, PDB id, or 4jsv, 1i10.")
    ],
    output: MapOut,
    voxel_size: Annotated[
        float, typer.Option(help="Angstrom.", callback=between("--voxel-size", *VOXELS))
    ] = 3.67,
    resolution: Annotated[
        float,
        typer.Option(
            help="Angstrom, at least two voxels.", callback=between("--resolution", *VOXELS)
        ),
    ] = 8.0,
    assembly: Annotated[str, typer.Option(help="Biological assembly; 'none': as it stands.")] = "1",
    symmetry: Annotated[
        str | None,
        typer.Option(help="Lay the axes of its like chains as this point group has them."),
    ] = None,
    box: Annotated[int | None, typer.Option(help="Voxels; default: what holds it.")] = None,
) -> None:
    """Density of an atomic model, its centre of mass at the origin."""
    from .. import density as densities
    from .. import structures

    check_outputs({"--output": [output]}, [model])
    assembled = None if assembly.lower() == "none" else assembly
    atoms = structures.load(model, assembly=assembled, symmetry=symmetry)
    made = densities.from_atoms(
        atoms, voxel_size_angstrom=voxel_size, resolution_angstrom=resolution, box_px=box
    )
    densities.write_density(output, made)
    typer.echo(f"{output}: {made.box_px} voxels of {voxel_size:g} A on an edge")


@app.command("simulate")
def simulate_particles(
    map_file: MapFile,
    output: StarOut,
    n: Annotated[int, typer.Option("-n", "--number", help="How many particles.")] = 1000,
    snr: Annotated[float, typer.Option(help="Over the whole frame; inf: clean.")] = float("inf"),
    shift: Annotated[
        float,
        typer.Option(
            help="Largest shift, pixels (triangular law).",
            callback=between("--shift", 0, FARTHEST, f"0 to {FARTHEST:g} pixels"),
        ),
    ] = 0.0,
    defocus: Annotated[
        tuple[float, float] | None, typer.Option(help="Range, angstrom; default: no CTF.")
    ] = None,
    noise_excess: Annotated[
        float,
        typer.Option(
            help="How much louder the noise is at low frequencies; 0: white, micrographs: 3 to 30."
        ),
    ] = 0.0,
    coverage: Annotated[
        str, typer.Option(help="uniform, euler, half, quarter or preferred.")
    ] = "uniform",
    voxel_size: MapVoxelSize = None,
    seed: Seed = 0,
) -> None:
    """Simulate particles with known orientations: a STAR file and its stack beside it."""
    from ..io.particles import write_particles
    from ..simulation import simulate

    if defocus is not None:
        got = f"got {defocus[0]:g} {defocus[1]:g}"
        if not -math.inf < defocus[0] <= defocus[1] < math.inf:
            raise InputError(f"--defocus: wanted LOW HIGH, {got}")
        if max(map(abs, defocus)) < FOCUSED:
            raise InputError(f"--defocus: wanted angstrom (1 micrometre is 10000), {got}")
    if noise_excess and math.isinf(snr):
        raise InputError("--noise-excess: without --snr there is no noise")
    check_outputs({"--output": star_files(output)}, [map_file])
    cube = open_map(map_file, voxel_size)
    stack = simulate(
        cube,
        n,
        seed,
        snr=snr,
        max_shift_px=shift,
        defocus_range_angstrom=defocus,
        noise_excess=noise_excess,
        coverage=coverage,
    )
    images = write_particles(output, stack)
    assert images is not None
    typer.echo(
        f"{output}: {n:,} particles of {cube.box_px} px of {cube.voxel_size_angstrom:g} A; "
        f"images in {images.name}"
    )
