"""From orientations to a map: ``reconstruct``, ``refine``."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from ..half_sets import check_enough, shared_particles
from .opening import check_views, open_map, open_oriented, prepared
from .options import (
    OF_MAP,
    Invert,
    MapOut,
    MapVoxelSize,
    Particles,
    PixelSize,
    Quiet,
    Rounds,
    Scheduler,
    Seed,
    StarOut,
    Symmetry,
    app,
    check_outputs,
    positive,
    refuse_alone,
    star_files,
)

if TYPE_CHECKING:
    from ..density import Density
    from ..maps import HalfMapFsc, HalfMaps, Sharpened
    from ..particles import ParticleStack
    from ..refinement import HalvesRefinement, ReferenceRefinement

#: Exit code where the images do not agree on any map.
NO_MAP = 3
#: Angstrom to which a reference is used.
COARSE = 15.0


@app.command("reconstruct")
def reconstruct_map(
    particles_file: Particles,
    output: MapOut,
    half_maps: Annotated[
        bool,
        typer.Option(
            "--half-maps",
            help="Also OUTPUT_half1, _half2, their FSC (.star) and, to 7 A or finer, _sharpened.",
        ),
    ] = False,
    symmetry: Symmetry = "C1",
    invert: Invert = None,
    pixel_size: PixelSize = None,
    scheduler: Scheduler = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Reconstruct the density by least squares, the CTF corrected where the file has defocus.

    Half-maps are of the file's rlnRandomSubset, else of a random split; the orientations are shared
    unless each half was oriented alone.
    """
    from ..density import write_density
    from ..maps import HalfMaps, half_map_fsc, soft_mask
    from ..reconstruction import reconstruct
    from ..refinement import check_symmetry

    stack = open_oriented(particles_file, quiet, pixel_size)
    written = [output, *_half_files(output)] if half_maps else [output]
    check_outputs({"--output": written}, [particles_file], stack)
    check_views(particles_file, stack)
    if half_maps:
        check_enough(len(stack))
    stack, _ = prepared(stack, particles_file, invert, quiet, seed)
    check_symmetry(stack, symmetry, seed=seed)
    if not half_maps:
        found = reconstruct(stack, symmetry=symmetry, scheduler=scheduler, progress=not quiet)
        write_density(output, found)
        if there := [path.name for path in _half_files(output) if os.path.exists(path)]:
            warnings.warn(
                f"{', '.join(there)} beside {output}: of an earlier run, not of this map",
                stacklevel=1,
            )
        typer.echo(f"{output}: from {len(stack):,} particles")
        return
    stack = stack.with_half_sets(seed)
    first, second = (
        reconstruct(
            stack.select(stack.half(half)),
            symmetry=symmetry,
            scheduler=scheduler,
            progress=not quiet,
        )
        for half in (1, 2)
    )
    pair = HalfMaps(first, second, independent=False, shared=len(shared_particles(stack)))
    mask = soft_mask(pair.mean)
    curves = half_map_fsc(pair, mask, seed=seed)
    write_halves(output, pair, curves, mask)
    typer.echo(
        f"{output}: from {len(stack):,} particles; "
        f"{curves.corrected.resolution(0.143).angstrom:.1f} A at FSC 0.143 of {pair.wording}"
    )


def map_files(output: Path, stack: ParticleStack) -> list[Path]:
    """What is written of particles and their map: a STAR file, maps, their FSC and a report."""
    return [*star_files(output, stack), *beside(output)]


def beside(output: Path) -> list[Path]:
    """What of that stands beside the STAR file."""
    map_path = output.with_suffix(".mrc")
    return [map_path, *_half_files(map_path), output.with_suffix(".html")]


def noise_file(output: Path) -> Path:
    """The noise of the particles."""
    return output.with_name(f"{output.stem}_noise.star")


def _half_files(output: Path) -> tuple[Path, Path, Path, Path]:
    """The half-maps of a map, their FSC, and the map sharpened."""
    first, second, sharp = (
        output.with_stem(f"{output.stem}_{name}") for name in ("half1", "half2", "sharpened")
    )
    return first, second, output.with_name(f"{output.stem}_fsc.star"), sharp


def put_aside(paths: Iterable[Path], instead: str = "no map") -> None:
    """Rename what an earlier run has written where this one has nothing to write, and say so.

    Stacks of images stay: particle files name them.
    """
    there = [path for path in paths if path.exists() and path.suffix != ".mrcs"]
    for path in there:
        path.rename(_free(path.with_name(f"{path.name}.earlier")))
    if there:
        warnings.warn(
            f"{', '.join(map(str, there))}: of an earlier run; this one has {instead} to put in "
            "their place, and they have .earlier behind their names now (.earlier.2 and so on, if "
            "there is one)",
            stacklevel=2,
        )


def _free(path: Path) -> Path:
    """The path, or the first of path.2, path.3 and so on where nothing stands."""
    names = (path if i == 1 else path.with_name(f"{path.name}.{i}") for i in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def write_halves(
    output: Path, pair: HalfMaps, curves: HalfMapFsc, mask: np.ndarray
) -> Sharpened | None:
    """Write the mean of two half-maps, the two, their FSC, and the mean sharpened, if it can be."""
    from ..density import write_density
    from ..maps import sharpened, write_fsc

    found = sharpened(pair, curves, mask)
    write_density(output, pair.mean)
    first, second, table, sharp = _half_files(output)
    write_density(first, pair.first)
    write_density(second, pair.second)
    write_fsc(table, curves, b_factor_angstrom2=None if found is None else found.b_factor_angstrom2)
    if found is None:
        put_aside([sharp], "too little detail for one")
    else:
        write_density(sharp, found.density)
    return found


@app.command("refine")
def refine_particles(
    particles_file: Particles,
    output: StarOut,
    map_file: Annotated[
        Path | None,
        typer.Option("--map", help="Reference; default: the particles' own maps, half by half."),
    ] = None,
    resolution: Annotated[
        float | None,
        typer.Option(
            help="Angstrom; the reference is used to this and no finer; default: 15.",
            callback=positive("--resolution"),
        ),
    ] = None,
    rounds: Rounds = None,
    symmetry: Symmetry = "C1",
    voxel_size: MapVoxelSize = None,
    invert: Invert = None,
    pixel_size: PixelSize = None,
    scheduler: Scheduler = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Refine orientations, shifts and contrasts, and say what the map may be believed to.

    Particles that lie wrongly are sought on the whole sphere, and in their frames.

    Writes OUTPUT (.star, with rlnRandomSubset and cryoemExpectedErrorRad), the map and half-maps
    (.mrc; to 7 A or finer _sharpened, too), their FSC (_fsc.star), the noise (_noise.star) and a
    report (.html). A reference is used to --resolution only; where the images do not agree beyond
    it, there is a warning and no map.

    Without one there is no map where the halves do not show one particle. Interrupted and called
    again, it then goes on after the rounds that are done, kept in OUTPUT with .work until the end.
    """
    from .. import report
    from ..refinement import check_reference, check_symmetry, kept, refine_halves

    if map_file is None:
        refuse_alone({"--resolution": resolution, "--voxel-size": voxel_size}, OF_MAP)
    else:
        refuse_alone({"--rounds": rounds}, "goes without --map only")
    stack = open_oriented(particles_file, quiet, pixel_size)
    map_path, page = output.with_suffix(".mrc"), output.with_suffix(".html")
    work = output.with_suffix(".work")
    rounds_kept = [work / name for name in kept.FILES] if map_file is None else []
    written = {"--output": [*map_files(output, stack), noise_file(output), *rounds_kept]}
    check_outputs(written, [particles_file, map_file], stack)
    check_views(particles_file, stack)
    reference = None
    if map_file is not None:
        reference = open_map(map_file, voxel_size, stack)
        reference = reference.sampled_as(stack.box_px, stack.pixel_size_angstrom)
        check_reference(reference, resolution or COARSE, symmetry)
    stack = prepared(stack, particles_file, invert, quiet, seed)[0].with_half_sets(seed)
    found: HalvesRefinement | ReferenceRefinement
    if reference is None:
        check_symmetry(stack, symmetry, seed=seed)
        found = refine_halves(
            stack, rounds=rounds, symmetry=symmetry, seed=seed, work=work, scheduler=scheduler,
            progress=not quiet,
        )  # fmt: skip
        test, notes = None, [_held_out(found)]
    else:
        found = _against(reference, stack, resolution or COARSE, symmetry, seed, scheduler, quiet)
        test, notes = found.test, [_moved(found)]
    refined, sharp = found.particles, _write(output, found)
    pair = replace(found.half_maps, shared=len(shared_particles(stack)))
    summary = report.write_map(
        page, f"{len(stack):,} particles of {particles_file.name}", pair, found.fsc, found.mask,
        refined.oriented(), symmetry=symmetry, test=test, noise=refined.noise, notes=notes,
        sharp=sharp,
    )  # fmt: skip
    typer.echo(
        f"{output}: expected error {np.mean(refined.expected_error_rad):.3f} rad; "
        f"{summary['resolution_fsc0143_angstrom']:.1f} A at FSC 0.143, {summary['half_maps']}; "
        + (f"{map_path}" if found.believable else "no map: see the note")
    )
    if reference is None:
        _over(work)


def _against(
    reference: Density,
    stack: ParticleStack,
    resolution: float,
    symmetry: str,
    seed: int,
    scheduler: str | None,
    quiet: bool,
) -> ReferenceRefinement:
    """Refine against a reference, in its frame."""
    from ..refinement import in_frame_of, refine_against

    check_enough(len(stack))
    return refine_against(
        in_frame_of(stack, reference, seed=seed), reference, resolution_angstrom=resolution,
        symmetry=symmetry, seed=seed, scheduler=scheduler, progress=not quiet,
    )  # fmt: skip


def _moved(found: ReferenceRefinement) -> str:
    """How many particles were brought elsewhere."""
    return (
        f"{found.moved_fraction:.1%} of the particles were likelier elsewhere than near where they "
        "began, and were brought there."
    )


def _write(output: Path, found: HalvesRefinement | ReferenceRefinement) -> Sharpened | None:
    """Write particles and noise; and the map, where there is one, else none stays in its place."""
    from ..density import write_density
    from ..io.particles import write_particles
    from ..surveying import write_noise

    map_path = output.with_suffix(".mrc")
    write_particles(output, found.particles)
    write_noise(noise_file(output), found.particles)
    if not found.believable:
        put_aside([map_path, *_half_files(map_path)])
        return None
    sharp = write_halves(map_path, found.half_maps, found.fsc, found.mask)
    assert found.density is not None
    write_density(map_path, found.density)
    return sharp


def _over(work: Path) -> None:
    """Remove what an interrupted run would have gone on from."""
    from ..refinement.kept import FILES

    for name in FILES:
        (work / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there is none, or it holds something else
        work.rmdir()


def _held_out(found: HalvesRefinement) -> str:
    """What to mind: the hand, and whether images match the map of the half they are not in."""
    open_hand = "No reference: the hand is open; the mirror image explains the images as well. "
    if not found.believable:
        return (
            f"No map: {found.astray_fraction:.0%} of the particles are likelier elsewhere by the "
            "map of the other half. What is shown here is not to be believed."
        )
    if np.isnan(found.held_out_correlation):
        return open_hand + (
            f"The halves agree hardly beyond {found.joined_angstrom:.0f} A, which they share: "
            "nothing else tells structure from noise."
        )
    return open_hand + (
        "Correlation with projections of the other half's map "
        f"{found.held_out_correlation:.3f}, by chance {found.chance_correlation:.3f}."
    )
