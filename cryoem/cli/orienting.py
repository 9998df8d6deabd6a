"""From particles to orientations: ``train``, ``orient``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from ..errors import InputError
from .opening import open_map, open_particles, prepared
from .options import (
    OF_MAP,
    EstimatorOut,
    Invert,
    MapVoxelSize,
    Particles,
    PixelSize,
    Quiet,
    Scheduler,
    Seed,
    StarOut,
    app,
    check_outputs,
    json_of,
    refuse_alone,
    say,
    star_files,
)

if TYPE_CHECKING:
    from ..density import Density
    from ..particles import ParticleStack
    from ..surveying import TrainingRanges

#: Radians between copies of one image, from which they are nowhere: 2.1 where all is chance.
AT_RANDOM = 1.0

#: What a run keeps in the folders of --work and --checkpoint.
WORK = ("landmarks.npz", "particles.npy", "done.json")
CHECKPOINTS = ("checkpoint.npz", "second/checkpoint.npz")


@app.command("train")
def train_estimator(
    density: Annotated[
        str, typer.Argument(metavar="MAP", help="MRC map, or 4jsv, 1i10: as they ship.")
    ],
    output: EstimatorOut,
    images: Annotated[int, typer.Option(help="How many images to train on.")] = 640_000,
    like: Annotated[
        Path | None,
        typer.Option(help="Particles whose box, pixels, noise, shifts and defocus are taken."),
    ] = None,
    symmetry: Annotated[
        str | None, typer.Option(help="Point group: C1, C4, D2, O, ...; default: C1.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder that keeps the run; it goes on from there.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="float32 or mixed_bfloat16 (on CPUs that have it).")
    ] = "float32",
    voxel_size: MapVoxelSize = None,
    invert: Invert = None,
    pixel_size: PixelSize = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Train an estimator of distances on projections of a density.

    With --like, the noise is measured outside the particles' circle, shifts and defocus are the
    file's. Without it the estimator is a broad one: no noise and SNR 1 to 1/128 in noise of many
    spectra, shifts to 7 % of the box, defocus 0.5 to 3 micrometres and none, as those that ship.
    Where there are shifts, one network learns to find them, from three fifths of the images, and a
    second one to read what is centred: a bar for each. The bar shows the time to expect. Some
    25,000 images give a first idea, the default a model worth keeping. Its training is told in
    OUTPUT.json beside it.
    """
    from ..estimator import train_on
    from ..io import files
    from ..structures import SHIPPED, load_density

    given = {"--invert": invert, "--pixel-size": pixel_size}
    refuse_alone(given if like is None else {}, "is told of particles; see --like")
    stack = None if like is None else open_particles(like, quiet, pixel_size)
    told = output.with_suffix(".json")
    kept = [checkpoint / name for name in CHECKPOINTS] if checkpoint else []
    check_outputs({"--output": [output, told], "--checkpoint": kept}, [density, like], stack)
    shipped = SHIPPED.get(density.lower())
    if shipped and voxel_size:
        raise InputError(f"--voxel-size: is told of an MRC map; {density} has its own")
    if shipped:
        cube = load_density(density)
    else:
        cube = open_map(Path(density), voxel_size, stack, centred=True)
    symmetry = symmetry or (shipped.symmetry if shipped else "C1")
    if stack is not None:
        stack, _ = prepared(stack, like, invert, quiet, seed)
    cube, ranges = _as_seen(cube, stack, seed)
    say(quiet, _ranges_told(ranges))
    model, history = train_on(
        cube,
        ranges,
        images=images,
        symmetry=symmetry,
        precision=precision,
        seed=seed,
        checkpoint=checkpoint,
        progress=not quiet,
    )
    command = (
        f"cryoem train {Path(density).name} -o {output.name} --symmetry {symmetry} "
        f"--images {images}{_more_options(voxel_size, like, invert, pixel_size)} --seed {seed} "
        f"--precision {precision}"
    )
    model.notes = {"command": command, **model.notes}
    model.save(output)
    with files.atomic(told) as temporary:
        temporary.write_text(json_of({**model.notes, **history}) + "\n")
    typer.echo(f"{output}: mean absolute error of distances {history['mae_rad'][-1]:.3f} rad")


def _as_seen(
    cube: Density, stack: ParticleStack | None, seed: int
) -> tuple[Density, TrainingRanges]:
    """The density as particles show it, and the ranges to train over: theirs, or broad ones."""
    from ..estimator import broad_ranges
    from ..surveying import survey

    if stack is None:
        return cube, broad_ranges(cube.box_px)
    cube = cube.sampled_as(stack.box_px, stack.pixel_size_angstrom)
    return cube, survey(stack, seed=seed).training()


def _ranges_told(ranges: TrainingRanges) -> str:
    texts = {
        **ranges,
        "noise": noise if isinstance(noise := ranges.get("noise"), str) else "theirs",
    }
    return "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in texts.items())


def _more_options(
    voxel_size: float | None, like: Path | None, invert: bool | None, pixel_size: float | None
) -> str:
    """The options that say which map and which particles, as they are typed."""
    of_map = f" --voxel-size {voxel_size:g}" if voxel_size else ""
    if like is None:
        return of_map
    turned = {None: "", True: " --invert", False: " --no-invert"}[invert]
    of_pixel = f" --pixel-size {pixel_size:g}" if pixel_size else ""
    return f"{of_map} --like {like.name}{turned}{of_pixel}"


@app.command("orient")
def orient_particles(
    particles_file: Particles,
    model: Annotated[Path, typer.Option(help="Estimator that train wrote, or 4jsv.")],
    output: StarOut,
    reference: Annotated[
        Path | None,
        typer.Option(help="Map: orient in its frame and hand. A symmetric particle needs it."),
    ] = None,
    scheduler: Scheduler = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of the run; default: OUTPUT with .work.")
    ] = None,
    other_hand: Annotated[
        bool, typer.Option("--other-hand", help="The mirror image, which explains them as well.")
    ] = False,
    centred: Annotated[
        bool,
        typer.Option(
            "--centred", help="Search no shifts: the file's origins, if it has any, are right."
        ),
    ] = False,
    voxel_size: MapVoxelSize = None,
    invert: Invert = None,
    pixel_size: PixelSize = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Orient particles by an estimator that was trained on this particle.

    Images may have finer pixels, or wider frames, than those that it was trained on.
    Against each other, or with --reference against a map's projections. Without a map an overall
    rotation and the hand are left open, as images leave them. Interrupt it
    as you like: called again, it goes on, and a run that is done is only written again.
    """
    refuse_alone({"--voxel-size": voxel_size} if reference is None else {}, OF_MAP)
    if reference is not None and other_hand:
        raise InputError("--other-hand: a --reference has its own hand; wanted one of the two")
    stack = open_particles(particles_file, quiet, pixel_size)
    folder = output.with_suffix(".work") if work is None else work
    written = {"--output": star_files(output, stack), "--work": [folder / name for name in WORK]}
    check_outputs(written, [particles_file, model, reference], stack)
    known = None
    if reference is not None:
        known = open_map(reference, voxel_size, stack, centred=not centred)
    stack, found = prepared(stack, particles_file, invert, quiet, seed)
    say(quiet, f"{particles_file}: particles {found.contrast}, SNR about {found.snr:.2g}")

    from ..estimator import load_estimator
    from ..io.particles import write_particles
    from ..recovery import orient

    estimator = load_estimator(model)
    try:
        estimator.reading(stack.box_px, stack.pixel_size_angstrom)
    except InputError as error:
        raise InputError(f"{model}: {error} in {particles_file}; see train --like") from error
    oriented = orient(
        estimator,
        stack,
        reference=known and known.sampled_as(stack.box_px, stack.pixel_size_angstrom),
        centred=centred,
        seed=seed,
        work=folder,
        scheduler=scheduler,
        progress=not quiet,
    )
    if oriented.frame is not None and oriented.frame.spread_rad > AT_RANDOM:
        raise InputError(
            f"{particles_file}: {model} orients these images as if at random: in-plane turned "
            f"copies of them land {oriented.frame.spread_rad:.1f} rad from where they belong. It "
            "was trained on another particle, or they show too little through their noise. No STAR "
            f"file is written; what was computed is in {folder}"
        )
    write_particles(output, oriented.hands[-1] if other_hand else oriented)
    typer.echo(
        f"{output}: {len(oriented):,} orientations, expected error "
        f"{np.median(oriented.expected_error_rad):.3f} rad (median), "
        f"{oriented.outlier.sum():,} outliers"
    )
