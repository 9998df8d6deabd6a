"""From a particle file to a refined map: ``solve``."""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from .. import rotations, workers
from ..abinitio.learning import IMAGES
from ..errors import InputError
from ..half_sets import unshared
from ..version import __version__
from .initial import (
    ClassesWanted,
    Diameter,
    Found,
    Images,
    Reference,
    Shift,
    Starts,
    Told,
    WantedSymmetry,
    find_maps,
)
from .mapping import NO_MAP, beside, map_files, noise_file, refine_particles
from .opening import open_particles, prepared
from .options import (
    Invert,
    MapVoxelSize,
    Particles,
    PixelSize,
    Quiet,
    Rounds,
    Scheduler,
    Seed,
    app,
    check_outputs,
    say,
    star_files,
)
from .orienting import CHECKPOINTS, WORK

if TYPE_CHECKING:
    from ..particles import ParticleStack


#: A network that is off by more than this share of what chance is has learned next to nothing.
LOST = 0.7
#: Particles beyond those that make the map from which a network that learns from it pays.
WORTH = 100_000

Learn = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="IMAGES",
        help="How many projections of the images' own map a network learns from, to place the "
        f"particles beyond --images; 0: the likelihood places them. Default: {IMAGES:,} where "
        f"these are {WORTH:,} or more, else 0.",
    ),
]


@app.command("solve")
def solve_particles(
    particles_file: Particles,
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")],
    symmetry: WantedSymmetry = None,
    starts: Starts = 8,
    classes: ClassesWanted = 1,
    reference: Reference = None,
    diameter: Diameter = None,
    shift: Shift = None,
    images: Images = 10_000,
    learn: Learn = None,
    rounds: Rounds = None,
    voxel_size: MapVoxelSize = None,
    invert: Invert = None,
    pixel_size: PixelSize = None,
    scheduler: Scheduler = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """From a particle file to a refined map in one command, by the images alone.

    It is `abinitio` (FOLDER/initial.star, .mrc, .html) and then `refine`, half against half, with
    the symmetry that was found (FOLDER/refined.star, .mrc, .html); of several classes the largest
    that has a map is refined.

    Of a large set (see --learn) the map is found from --images of the particles, drawn at random; a
    network learns distances of orientations from projections of that map (network.npz) and places
    all the others (oriented.star).

    Interrupted and called again, it goes on after what is done. Where the images do not agree on a
    map, the exit code is 3. With --scheduler its workers compare images, refine and back-project.
    """
    asked = Told(symmetry, starts, classes, reference, diameter, shift, images, voxel_size, seed)
    stack = asked.checked(open_particles(particles_file, quiet, pixel_size))
    learned = _images_to_learn(learn, asked, stack)
    plan = _Plan(folder, learned, seed, scheduler, quiet)
    initial, note = plan.at("initial.star"), plan.at("solve.json")
    check_outputs(
        {"--output": [*plan.files(stack), *asked.files(initial, stack)]},
        [particles_file, reference],
        stack,
    )
    told = {
        "version": __version__,
        "files": _state(particles_file, reference, stack),
        **asdict(asked),
        "learn": learned,
        "invert": invert,
        "pixel_size": pixel_size,
    }
    known = _known(note, told)
    if known is None or (learned and not plan.at("oriented.star").exists()):
        stack, seen = prepared(stack, particles_file, invert, quiet, seed)
        if learned and not seen.noise_variance > 0:
            raise InputError(
                f"{particles_file}: the corners of its images are constant: a network cannot learn "
                "their noise; wanted images that are not masked, or --learn 0"
            )
    rows = np.arange(len(stack))
    if learned:
        stack = unshared(stack).with_half_sets(seed)
        rows = np.sort(rotations.generator(seed, "part").permutation(len(stack))[:images])
        say(
            quiet,
            f"{particles_file}: a map is found from {len(rows):,} of the particles; a network "
            f"learns from {learned:,} projections of it, and places the other "
            f"{len(stack) - len(rows):,}",
        )
    if known is None:
        some = stack.select(rows)
        if not (found := find_maps(some, initial, particles_file.name, asked, scheduler, quiet)):
            raise typer.Exit(NO_MAP)
        known = found[0]
        _remember(note, {**told, "found": known})
    else:
        say(quiet, f"{folder / known.file}: is there already")
    start = plan.at(known.file)
    if learned:
        start = _placed(stack, rows, start, known.symmetry, plan)
    _refined(start, known.symmetry, rounds, plan)


def _images_to_learn(learn: int | None, asked: Told, stack: ParticleStack) -> int:
    """How many images a network is trained on; 0: there is none, the likelihood places all."""
    others = len(stack) - asked.images
    if learn is None:
        if others < WORTH or asked.classes > 1:
            return 0
        if importlib.util.find_spec("keras") is not None:
            return IMAGES
        warnings.warn(
            f"{others:,} particles are placed by their likelihood, in memory and slowly: Keras is "
            "not installed, and no network learns to place them; pip install 'cryoem[tensorflow]'",
            stacklevel=2,
        )
        return 0
    if learn and asked.classes > 1:
        raise InputError("--learn: a network knows one map; wanted no --classes beside it")
    if learn and others < 1:
        raise InputError(
            f"--learn: --images {asked.images:,} are all of the {len(stack):,} particles; wanted "
            "fewer, so that some are left for the network"
        )
    return learn


@dataclass(frozen=True)
class _Plan:
    """Where the steps write, and what all are told."""

    folder: Path
    learned: int
    seed: int
    scheduler: str | None
    quiet: bool

    def __post_init__(self) -> None:
        workers.reached(self.scheduler)  # before the survey of a large file

    def at(self, name: str) -> Path:
        """A file in the folder."""
        return self.folder / name

    def files(self, stack: ParticleStack) -> list[Path]:
        """All that is written, but for the first step."""
        from ..refinement.kept import FILES

        refined = self.at("refined.star")
        found = [self.at("solve.json"), *map_files(refined, stack), noise_file(refined)]
        found += [self.at("refined.work") / name for name in FILES]
        if self.learned:
            found += [self.at("network.npz"), *star_files(self.at("oriented.star"), stack)]
            found += [self.at("network") / name for name in CHECKPOINTS]
            found += [self.at("oriented.work") / name for name in WORK]
        return found


def _refined(start: Path, symmetry: str, rounds: int | None, plan: _Plan) -> None:
    """Refine what an earlier step wrote; its images have been turned as they should be."""
    from ..io import files

    refined, note = plan.at("refined.star"), plan.at("solve.json")
    before = json.loads(note.read_text(encoding="utf-8"))
    asked = {"start_sha256": files.sha256(start), "rounds": rounds}
    done = before.pop("refined", None)
    if isinstance(done, dict) and refined.exists():
        if done["sha256"] != files.sha256(refined):
            raise InputError(
                f"{refined}: is not what solve wrote there; wanted it elsewhere, or another folder"
            )
        there = all(plan.at(name).exists() for name in done["beside"])
        if there and {name: done[name] for name in asked} == asked:
            say(plan.quiet, f"{refined}: is there already")
            raise typer.Exit(done["code"])
    _remember(note, before)  # it is written anew from here on
    refine_particles(
        start, refined, rounds=rounds, symmetry=symmetry, invert=False,
        scheduler=plan.scheduler, seed=plan.seed, quiet=plan.quiet,
    )  # fmt: skip
    code = 0 if refined.with_suffix(".mrc").exists() else NO_MAP
    done = {**asked, "sha256": files.sha256(refined), "code": code}
    made = [*beside(refined), noise_file(refined)]
    done["beside"] = [path.name for path in made if path.exists()]
    _remember(note, {**before, "refined": done})
    raise typer.Exit(code)


def _placed(
    stack: ParticleStack, rows: np.ndarray, start: Path, symmetry: str, plan: _Plan
) -> Path:
    """Let a network learn from the map of a part of the particles, and place the others."""
    from ..abinitio.learning import learn, place
    from ..density import read_density
    from ..estimator import load_estimator
    from ..io.particles import read_particles, write_particles

    oriented, network = plan.at("oriented.star"), plan.at("network.npz")
    if oriented.exists():
        say(plan.quiet, f"{oriented}: is there already")
        return oriented
    part, density = read_particles(start), read_density(start.with_suffix(".mrc"))
    if network.exists():
        model = load_estimator(network)
    else:
        model = learn(
            part, density, symmetry=symmetry, images=plan.learned, seed=plan.seed,
            checkpoint=plan.at("network"), progress=not plan.quiet,
        )  # fmt: skip
        model.save(network)
    found = place(
        model, stack, rows, part, density, symmetry=symmetry, seed=plan.seed,
        work=plan.at("oriented.work"), scheduler=plan.scheduler, progress=not plan.quiet,
    )  # fmt: skip
    typer.echo(
        f"{network}: lays the {len(rows):,} images that made the map within "
        f"{found.mean_rad:.3f} rad (median {found.median_rad:.3f}) of where they lie in it"
    )
    if found.median_rad > LOST * found.chance_rad:
        raise InputError(
            f"{network}: has not learned to place these particles ({found.chance_rad:.2f} rad "
            "is chance); wanted another folder and --learn of more images, or 0: the likelihood "
            "places all"
        )
    write_particles(oriented, found.particles)
    return oriented


def _state(particles_file: Path, reference: str | None, stack: ParticleStack) -> list[list[str]]:
    """Which files are read, and what is in them."""
    from ..io import files
    from ..io.stacks import ImageStack, told_apart, told_whole

    known = [Path(reference)] if reference and os.path.exists(reference) else []
    if stack.origin is not None:  # not images alone
        known.append(particles_file)
    if particles_file.suffix == ".cs":  # it is read with these
        known += particles_file.parent.glob("*passthrough*.cs")
    paths = sorted({os.path.realpath(path) for path in known})
    found = [[path, files.sha256(path)] for path in paths]
    found.append(["images", files.sha256_of(told_apart(stack.images))])
    if isinstance(stack.images, ImageStack) and not told_whole(stack.images):
        stacks = sorted({os.path.realpath(layout.path) for layout in stack.images.layouts})
        found += [[path, str(os.stat(path).st_mtime_ns)] for path in stacks]
    return found


def _known(note: Path, told: Mapping[str, object]) -> Found | None:
    """What an earlier run of the same kind has found, or None: there was none."""
    if not note.exists():
        return None
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
        found = Found(*map(str, before.pop("found")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{note}: not what solve writes ({error})") from error
    differing = [name for name in told if before.get(name) != told[name]]
    if differing:
        raise InputError(
            f"{note.parent}: holds the results of another run ({', '.join(differing)} differ); "
            "wanted another folder"
        )
    if (note.parent / found.file).exists():
        return found
    made = [name for name in ("network.npz", "oriented.star") if (note.parent / name).exists()]
    if told["learn"] and made:
        raise InputError(
            f"{note.parent / found.file}: was taken away, and {made[0]} beside it was made of it; "
            "wanted it back, or another folder"
        )
    return None  # it is made again


def _remember(note: Path, told: Mapping[str, object]) -> None:
    """Write down what was done, and with what."""
    from ..io import files

    with files.atomic(note) as temporary:
        temporary.write_text(json.dumps(told, indent=1), encoding="utf-8")
