"""The command line: thin over the package, one command a step from particles to a map."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from .errors import CryoemError, InputError

if TYPE_CHECKING:
    from .density import Density
    from .maps import HalfMaps
    from .star import ParticleSet

__all__ = ["app"]


class _Commands(typer.core.TyperGroup):
    """Errors of ours are messages, not tracebacks; so are warnings."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""

        def show(message: Warning | str, *_: object, **__: object) -> None:
            typer.echo(f"cryoem: note: {message}", err=True)

        # A run that is told to stop ends as one that is interrupted: nothing half-written stays.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("always", category=UserWarning, module="cryoem")
                warnings.showwarning = show
                return super().invoke(ctx)
        except CryoemError as error:
            typer.echo(f"cryoem: {error}", err=True)
            raise typer.Exit(1) from error
        finally:
            signal.signal(signal.SIGTERM, before)


app = typer.Typer(
    cls=_Commands,
    help="""Orientations of cryo-EM particles from learned distances, and the map they give.

    A way from particles to a map: `density`, `train --like`, `orient`, `reconstruct`, `refine`;
    `simulate` and `evaluate` show how well it does where the truth is known. Particle files are
    RELION's (.star, 3.0 and later) and cryoSPARC's (.cs); written is RELION 3.1, every row and
    column kept. Exit code 0: done; 1: an input was refused, and says which; 2: wrong usage.""",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars; warnings stay.")]
Seed = Annotated[int, typer.Option(help="Of all that is drawn at random.")]
Particles = Annotated[
    Path, typer.Argument(metavar="PARTICLES", help="Particle file: .star or .cs.")
]
MapFile = Annotated[Path, typer.Argument(metavar="MAP", help="Density: an MRC map.")]
StarOut = Annotated[Path, typer.Option("--output", "-o", help="STAR file to write.")]
MapOut = Annotated[Path, typer.Option("--output", "-o", help="MRC map to write.")]
Symmetry = Annotated[str, typer.Option(help="Point group: C1, C4, D2, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

#: Radians between copies of one image, from which they are nowhere: 2.1 where all is chance.
_AT_RANDOM = 1.0


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        typer.echo(text, err=True)


def _print(found: Mapping[str, Any], as_json: bool) -> None:
    """Print figures, one a line or as JSON."""
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    width = max(map(len, found))
    for name, value in found.items():
        values = value if isinstance(value, tuple) else (value,)
        texts = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)
        typer.echo(f"{name.replace('_', ' '):{width}}  {' to '.join(texts)}")


def _particles(path: Path, quiet: bool) -> ParticleSet:
    from . import star

    particles = star.read_particles(path)
    box, pixel = particles.box_px, particles.pixel_size_angstrom
    _say(quiet, f"{path}: {len(particles):,} particles of {box} px, {pixel:g} A each")
    return particles


def _oriented(path: Path, quiet: bool) -> ParticleSet:
    particles = _particles(path, quiet)
    if not particles.has_angles:
        raise InputError(f"{path}: no columns rlnAngleRot, rlnAngleTilt, rlnAnglePsi; see orient")
    return particles


# --------------------------------------------------------------------------------------
# What is seen


@app.command()
def density(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="PDB or mmCIF file, PDB id, or 4jsv, 1i10.")
    ],
    output: MapOut,
    voxel_size: Annotated[float, typer.Option(help="Angstrom.")] = 3.67,
    resolution: Annotated[float, typer.Option(help="Angstrom, at least two voxels.")] = 8.0,
    assembly: Annotated[str, typer.Option(help="Biological assembly; 'none': as it stands.")] = "1",
    symmetry: Annotated[
        str | None,
        typer.Option(help="Lay the axes of its like chains as this point group has them."),
    ] = None,
    box: Annotated[int | None, typer.Option(help="Voxels; default: what holds it.")] = None,
) -> None:
    """Density of an atomic model, its centre of mass at the origin."""
    from . import density as densities
    from . import structures

    assembled = None if assembly.lower() == "none" else assembly
    atoms = structures.load(model, assembly=assembled, symmetry=symmetry)
    made = densities.from_atoms(
        atoms, voxel_size_angstrom=voxel_size, resolution_angstrom=resolution, box_px=box
    )
    densities.write_mrc(output, made)
    typer.echo(f"{output}: {made.box_px} voxels of {voxel_size:g} A on an edge")


@app.command()
def simulate(
    map_file: MapFile,
    output: StarOut,
    n: Annotated[int, typer.Option("-n", "--number", help="How many particles.")] = 1000,
    snr: Annotated[float, typer.Option(help="Over the whole frame; inf: clean.")] = float("inf"),
    shift: Annotated[float, typer.Option(help="Largest shift, pixels (triangular law).")] = 0.0,
    defocus: Annotated[
        tuple[float, float] | None, typer.Option(help="Range, angstrom; default: no CTF.")
    ] = None,
    coverage: Annotated[
        str, typer.Option(help="uniform, euler, half, quarter or preferred.")
    ] = "uniform",
    seed: Seed = 0,
) -> None:
    """Simulate particles with known orientations: a STAR file and its stack beside it."""
    from . import density as densities
    from . import simulation, star

    cube = densities.read_mrc(map_file)
    seen = simulation.particles(
        cube,
        n,
        seed,
        snr=snr,
        max_shift_px=shift,
        defocus_range_angstrom=defocus,
        coverage=coverage,
    )
    columns = {}
    if seen.defocus_angstrom is not None:
        columns = {f"rlnDefocus{axis}": seen.defocus_angstrom for axis in "UV"}
        columns["rlnDefocusAngle"] = np.zeros(n)
    stack = star.write_particles(
        output,
        seen.images,
        seen.quaternions,
        pixel_size_angstrom=seen.pixel_size_angstrom,
        shifts_px=seen.shifts_px,
        columns=columns,
    )
    typer.echo(f"{output}: {n:,} particles of {cube.box_px} px; images in {stack.name}")


# --------------------------------------------------------------------------------------
# From particles to orientations


@app.command()
def train(
    map_file: MapFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Estimator to write (.npz).")],
    images: Annotated[int, typer.Option(help="How many images to train on.")] = 640_000,
    like: Annotated[
        Path | None,
        typer.Option(help="Particles whose box, pixels, noise, shifts and defocus are taken."),
    ] = None,
    symmetry: Symmetry = "C1",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder that keeps the run; it goes on from there.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="float32 or mixed_bfloat16 (on CPUs that have it).")
    ] = "float32",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Train an estimator of distances on projections of a density.

    With --like, the noise is measured outside the particles' circle, shifts and defocus are the
    file's. Where there are shifts, one network learns to find them, from three fifths of the
    images, and a second one to read what is centred: a bar for each. The bar shows the time to
    expect. Some 25,000 images give a first idea, the default a model worth keeping.
    """
    from . import density as densities
    from . import simulation, survey

    cube = densities.read_mrc(map_file)
    ranges: dict[str, Any] = {}
    if like is None:
        cube = cube.in_box(max(cube.values.shape))
    else:
        particles = _particles(like, quiet)
        cube = cube.sampled_as(particles.box_px, particles.pixel_size_angstrom)
        found = survey.survey(particles, seed=seed)
        _refuse_black(like, found)
        ranges = found.training()
        _say(quiet, "; ".join(f"{k} {v}" for k, v in ranges.items()))
    preprocessing = survey.preprocessing_for(cube, max_shift_px=ranges.get("max_shift_px", 0.0))
    source = simulation.TrainingImages(cube, preprocessing, symmetry=symmetry, **ranges)

    from . import estimator

    model = estimator.Estimator.create(
        preprocessing,
        symmetry=symmetry,
        looks=2 if ranges.get("max_shift_px") else 1,
        seed=seed,
        precision=precision,
    )
    history = estimator.learn(
        model, source, images=images, seed=seed, checkpoint=checkpoint, progress=not quiet
    )
    model.notes = {"map": map_file.name, "images": images, "seed": seed, **source.settings}
    model.save(output)
    typer.echo(f"{output}: mean absolute error of distances {history['mae_rad'][-1]:.3f} rad")


def _refuse_black(path: Path, found: Any) -> None:
    if found.contrast == "black on white":
        raise InputError(
            f"{path}: the particles are black on white; wanted white on black, as RELION extracts "
            "them with 'invert contrast' (imaging.flip_contrast turns them)"
        )


@app.command()
def orient(
    particles_file: Particles,
    model: Annotated[Path, typer.Option(help="Estimator that train wrote, or 4jsv.")],
    output: StarOut,
    reference: Annotated[
        Path | None,
        typer.Option(help="Map: orient in its frame and hand. A symmetric particle needs it."),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler; default: this process.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of the run; default: OUTPUT with .work.")
    ] = None,
    other_hand: Annotated[
        bool, typer.Option("--other-hand", help="The mirror image, which explains them as well.")
    ] = False,
    centred: Annotated[
        bool,
        typer.Option(
            "--centred", help="Look for no shifts: the file's origins, if it has any, are right."
        ),
    ] = False,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Orient particles against each other: no density, no truth; or against a map's projections.

    Without a map an overall rotation and the hand are left open, as images leave them. Interrupt it
    as you like: called again, it goes on, and a run that is done is only written again.
    """
    from . import density as densities
    from . import rotations, survey

    particles = _particles(particles_file, quiet)
    found = survey.survey(particles, images=300, seed=seed)
    _say(quiet, f"{particles_file}: particles {found.contrast}, SNR about {found.snr:.2g}")
    _refuse_black(particles_file, found)

    from . import estimator, stream, structures

    shipped = str(model).lower() in structures.SHIPPED
    network = estimator.shipped(str(model).lower()) if shipped else estimator.Estimator.load(model)
    wanted = network.preprocessing
    pixel = particles.pixel_size_angstrom
    if particles.box_px != wanted.frame_px or abs(pixel / wanted.pixel_size_angstrom - 1) > 0.01:
        raise InputError(
            f"{model}: made for images of {wanted.frame_px} px of {wanted.pixel_size_angstrom:g} "
            f"A; {particles_file} has {particles.box_px} px of {pixel:g} A; see train --like"
        )
    known = None if reference is None else densities.read_mrc(reference)
    folder = output.with_suffix(".work") if work is None else work
    placed = stream.orient(
        network,
        particles_file,
        folder,
        reference=known and known.sampled_as(particles.box_px, pixel),
        centred=centred,
        seed=seed,
        scheduler=scheduler,
        progress=not quiet,
    )
    if placed.frame is not None and placed.frame.spread_rad > _AT_RANDOM:
        raise InputError(
            f"{particles_file}: {model} orients these images as if at random: in-plane turned "
            f"copies of them land {placed.frame.spread_rad:.1f} rad from where they belong. It "
            "was trained on another particle, or they show too little through their noise. No STAR "
            f"file is written; what was computed is in {folder}"
        )
    q = rotations.other_hand(placed.quaternions) if other_hand else placed.quaternions
    shifts = placed.shifts_px if network.says_shifts and not centred else None
    particles.write(output, quaternions=q, shifts_px=shifts, columns=placed.columns)
    typer.echo(
        f"{output}: {len(particles):,} orientations, expected error "
        f"{np.median(placed.expected_error_rad):.3f} rad (median), "
        f"{placed.outlier.sum():,} outliers"
    )


# --------------------------------------------------------------------------------------
# From orientations to a map


@app.command()
def reconstruct(
    particles_file: Particles,
    output: MapOut,
    half_maps: Annotated[
        bool, typer.Option("--half-maps", help="Also OUTPUT_half1, _half2 and their FSC (.star).")
    ] = False,
    symmetry: Symmetry = "C1",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Reconstruct the density by least squares, the CTF corrected where the file has defocus.

    Half-maps are of the file's rlnRandomSubset, else of a random split; the orientations are shared
    unless each half was oriented alone.
    """
    from . import density as densities
    from . import maps

    particles = _oriented(particles_file, quiet)
    if not half_maps:
        densities.write_mrc(output, _map(particles, None, symmetry, quiet))
        typer.echo(f"{output}: from {len(particles):,} particles")
        return
    subset = particles.random_subset
    subset = maps.halves(len(particles), seed) if subset is None else subset
    first, second = (
        _map(particles, np.flatnonzero(subset == half), symmetry, quiet) for half in (1, 2)
    )
    curves = _write_halves(output, maps.HalfMaps(first, second, independent=False), seed)
    typer.echo(
        f"{output}: from {len(particles):,} particles; "
        f"{curves.corrected.resolution(0.143).angstrom:.1f} A at FSC 0.143 of half-maps with "
        "shared poses"
    )


def _map(particles: ParticleSet, rows: np.ndarray | None, symmetry: str, quiet: bool) -> Density:
    """Map of some particles."""
    from . import reconstruction

    return reconstruction.reconstruct(
        particles.images,
        particles.quaternions,
        voxel_size_angstrom=particles.pixel_size_angstrom,
        rows=rows,
        shifts_px=particles.shifts_px,
        ctf=particles.ctf,
        symmetry=symmetry,
        progress=not quiet,
    )


def _write_halves(output: Path, pair: HalfMaps, seed: int) -> Any:
    """Write the mean of two half-maps, the two, and their FSC, which is returned."""
    from . import density as densities
    from . import maps

    curves = maps.half_map_fsc(pair, maps.soft_mask(pair.mean), seed=seed)
    densities.write_mrc(output, pair.mean)
    densities.write_mrc(output.with_stem(f"{output.stem}_half1"), pair.first)
    densities.write_mrc(output.with_stem(f"{output.stem}_half2"), pair.second)
    maps.write_fsc(output.with_name(f"{output.stem}_fsc.star"), curves)
    return curves


@app.command()
def refine(
    particles_file: Particles,
    output: StarOut,
    map_file: Annotated[
        Path | None,
        typer.Option("--map", help="Reference; default: the particles' own maps, half by half."),
    ] = None,
    resolution: Annotated[
        float, typer.Option(help="Angstrom; the reference is used to this and no finer.")
    ] = 15.0,
    rounds: Annotated[int, typer.Option(help="Of alternation, without a reference.")] = 5,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Refine orientations, shifts and contrasts, and say what the map may be believed to.

    Writes OUTPUT (.star, with rlnRandomSubset and cryoemExpectedErrorRad), the map and half-maps
    (.mrc), their FSC (_fsc.star) and a report (.html). A reference is used to --resolution only;
    where the images do not agree beyond it, there is a warning and no map.
    """
    from . import density as densities
    from . import maps, refinement, report

    particles = _oriented(particles_file, quiet)
    subset = particles.random_subset
    subset = maps.halves(len(particles), seed) if subset is None else subset
    options: dict[str, Any] = {
        "shifts_px": particles.shifts_px,
        "ctf": particles.ctf,
        "subset": subset,
        "seed": seed,
        "progress": not quiet,
    }
    pixel, test, notes = particles.pixel_size_angstrom, None, []
    if map_file is None:
        found: Any = refinement.alternate(
            particles.images,
            particles.quaternions,
            voxel_size_angstrom=pixel,
            rounds=rounds,
            **options,
        )
        notes = [
            "No reference: the hand is open; the mirror image explains the images as well. "
            f"Correlation with projections of the other half's map {found.held_out_correlation:.3f}"
            f", by chance {found.chance_correlation:.3f}."
        ]
    else:
        reference = densities.read_mrc(map_file).sampled_as(particles.box_px, pixel)
        found = refinement.from_reference(
            particles.images,
            reference,
            particles.quaternions,
            resolution_angstrom=resolution,
            **options,
        )
        test = found.test
    particles.write(
        output,
        quaternions=found.refined.quaternions,
        shifts_px=found.refined.shifts_px,
        columns={
            "rlnRandomSubset": subset,
            "cryoemContrast": found.refined.contrast,
            "cryoemExpectedErrorRad": found.refined.expected_error_rad,
        },
    )
    map_path = output.with_suffix(".mrc")
    if found.density is not None:
        _write_halves(map_path, found.half_maps, seed)
        densities.write_mrc(map_path, found.density)
    summary = report.write_map(
        output.with_suffix(".html"),
        f"{len(particles):,} particles of {particles_file.name}",
        found.half_maps,
        found.fsc,
        found.mask,
        found.refined.quaternions,
        test=test,
        notes=notes,
    )
    typer.echo(
        f"{output}: expected error {np.mean(found.refined.expected_error_rad):.3f} rad; "
        f"{summary['resolution_fsc0143_angstrom']:.1f} A at FSC 0.143, {summary['half_maps']}; "
        + (f"{map_path}" if found.density is not None else "no map: see the note")
    )


# --------------------------------------------------------------------------------------
# How good it is


@app.command()
def evaluate(
    particles_file: Particles,
    truth: Annotated[Path, typer.Option(help="Particle file with the true orientations.")],
    map_file: Annotated[Path | None, typer.Option("--map", help="Map to judge.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Map to judge it by.")] = None,
    symmetry: Symmetry = "C1",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare orientations with true ones, row by row, and a map with a reference.

    Errors are angles: after a rotation of the density and its hand are fitted (one-sided: what a
    map forgives) and with nothing fitted; random orientations set the scale.
    """
    from . import density as densities
    from . import evaluation, maps

    q, true = (_oriented(p, True).quaternions for p in (particles_file, truth))
    if len(q) != len(true):
        raise InputError(f"{particles_file} has {len(q)} rows, {truth} has {len(true)}")
    if (map_file is None) != (reference is None):
        raise InputError("--map and --reference come together")
    found: dict[str, Any] = {"particles": len(q), "symmetry": symmetry}
    one_sided = evaluation.errors(q, true, over="one-sided", symmetry=symmetry)
    unaligned = evaluation.errors(q, true, over="none", symmetry=symmetry)
    for name, off in (("one_sided", one_sided), ("unaligned", unaligned)):
        found |= {
            f"{name}_mean_rad": off.mean_rad,
            f"{name}_median_rad": off.median_rad,
            f"{name}_p95_rad": off.p95_rad,
        }
    found["random_mean_rad"] = evaluation.random_error(true, seed, symmetry=symmetry)
    if map_file is not None and reference is not None:
        wanted = densities.read_mrc(reference)
        judged = densities.read_mrc(map_file).sampled_as(wanted.box_px, wanted.voxel_size_angstrom)
        laid = maps.register(judged, wanted, seed=seed)
        curve = maps.fsc(laid.density, wanted)
        for threshold in (0.5, 0.143):
            at = curve.resolution(threshold)
            found[f"resolution_fsc{threshold:g}_angstrom".replace("0.", "0")] = at.angstrom
            found["nyquist_limited"] = at.nyquist_limited
        found |= {"mean_fsc": curve.mean, "mirrored": laid.mirrored}
    _print(found, as_json)


@app.command()
def info(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Particles, map, stack, model or estimator.")
    ],
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Say what a file holds; of particles also their contrast, noise, shifts and defocus."""
    from . import density as densities
    from . import files, stacks, star, survey

    path = files.existing(file)
    name = path.name.removesuffix(".gz")
    if name.endswith((".star", ".cs")):
        particles = star.read_particles(path)
        found: dict[str, Any] = {
            "kind": "particles",
            "particles": len(particles),
            "box_px": particles.box_px,
            "pixel_size_angstrom": particles.pixel_size_angstrom,
            "stacks": len(particles.images.layouts),
            "optics_groups": len(particles.optics),
            "angles": particles.has_angles,
            "half_sets": particles.random_subset is not None,
            "columns": ", ".join(particles.table),
            **vars(survey.survey(particles, seed=seed)),
        }
    elif name.endswith(".mrcs"):
        nz, ny, nx = stacks.layout(path).shape
        found = {"kind": "image stack", "images": nz, "height_px": ny, "width_px": nx}
    elif name.endswith((".mrc", ".map")):
        cube = densities.read_mrc(path)
        found = {
            "kind": "map",
            "shape_zyx": list(cube.values.shape),
            "voxel_size_angstrom": cube.voxel_size_angstrom,
            "minimum": float(cube.values.min()),
            "maximum": float(cube.values.max()),
            "standard_deviation": float(cube.values.std()),
        }
    elif name.endswith(".npz"):
        found = {"kind": "estimator", **_settings(path)}
    else:
        model = densities.read_structure(path)
        found = {
            "kind": "atomic model",
            "atoms": model.count_atom_sites(),
            "chains": len(model),
            "mass_kda": model.calculate_mass() / 1000,
        }
    _print(found, as_json)


def _settings(path: Path) -> dict[str, Any]:
    """What an estimator's file says of itself, read without its network."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            settings: dict[str, Any] = json.loads(str(archive["settings"]))
    except Exception as error:  # NumPy and zipfile raise whatever their parsers met
        raise InputError(f"{path}: not an estimator's file ({error})") from error
    return settings


if __name__ == "__main__":
    app()
