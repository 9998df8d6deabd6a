"""The application, the options that several commands share, and what they print."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CryoemError, InputError

if TYPE_CHECKING:
    from ..particles import ParticleStack

__all__ = ["app"]

#: Voxels of maps, angstrom; and how far a particle may lie off, beyond which nobody means it.
VOXELS, FARTHEST = (0.1, 100.0), 1e5
#: Why an option is refused.
OF_MAP = "is told of a map, and none is given"
POSITIVE = "a positive number of angstrom"


class _Commands(typer.core.TyperGroup):
    """Errors of ours are messages, not tracebacks; so are warnings."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        said: set[str] = set()

        def show(message: Warning | str, *_: object, **__: object) -> None:
            if str(message) in said:
                return
            said.add(str(message))
            typer.echo(f"cryoem: note: {message}", err=True)

        # A run that is told to stop ends as one that is interrupted: nothing half-written stays.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("always", category=UserWarning, module="cryoem")
                warnings.filterwarnings("ignore", message="constrained_layout")  # matplotlib's
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

    From the images alone: `solve`, which is `abinitio` and `refine`. Where the density of the
    particle is known: `density`, `train --like`, `orient`, `reconstruct`, `refine`. `simulate` and
    `evaluate` show how well it does where the truth is known. Particle files are RELION's (.star,
    3.0 and later) and cryoSPARC's (.cs); written is RELION 3.1, every row and column kept. Exit
    code 0: done; 1: an input was refused, and says which; 2: wrong usage; 3: the images do not
    agree on a map.""",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)


def ending_in(*suffixes: str, option: str = "--output") -> Callable[[Path | None], Path | None]:
    """A check of a file to write: by its name's end it is what is written."""

    def checked(output: Path | None) -> Path | None:
        if output is not None and output.suffix not in suffixes:
            raise InputError(
                f"{option} {output}: wanted a name that ends in {' or '.join(suffixes)}"
            )
        return output

    return checked


def between(
    name: str, low: float, high: float, wanted: str = ""
) -> Callable[[float | None], float | None]:
    """A check of an option that has bounds; without other words, in angstrom."""

    def checked(value: float | None) -> float | None:
        if value is not None and not low <= value <= high:
            told = f"{low:g} to {high:g} angstrom" if value > 0 or low == 0 else POSITIVE
            raise InputError(f"{name}: wanted {wanted or told}, got {value:g}")
        return value

    return checked


def positive(name: str) -> Callable[[float | None], float | None]:
    """A check of an option in angstrom."""
    return between(name, 1e-300, sys.float_info.max, POSITIVE)


def _not_negative(seed: int) -> int:
    if seed < 0:
        raise InputError(f"--seed: wanted a whole number that is not negative, got {seed}")
    return seed


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars; warnings stay.")]
Seed = Annotated[int, typer.Option(help="Random seed.", callback=_not_negative)]
Scheduler = Annotated[
    str | None, typer.Option(help="Address of a Dask scheduler; default: this process.")
]
Particles = Annotated[
    Path, typer.Argument(metavar="PARTICLES", help="Particles: .star or .cs; images alone: .mrcs.")
]
MapFile = Annotated[Path, typer.Argument(metavar="MAP", help="Density: an MRC map.")]
StarOut = Annotated[
    Path, typer.Option("--output", "-o", help="STAR file to write.", callback=ending_in(".star"))
]
MapOut = Annotated[
    Path,
    typer.Option("--output", "-o", help="MRC map to write.", callback=ending_in(".mrc", ".map")),
]
EstimatorOut = Annotated[
    Path,
    typer.Option("--output", "-o", help="Estimator to write (.npz).", callback=ending_in(".npz")),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        help="Of refinement half against half; default: until orientations settle, 5 to 15. Of "
        "20,000 particles and more: of a part of 10,000, then of all, by default 2 to 15."
    ),
]
Symmetry = Annotated[str, typer.Option(help="Point group: C1, C4, D2, O, ...")]
MapVoxelSize = Annotated[
    float | None,
    typer.Option(
        "--voxel-size",
        help="Angstrom, of the map; default: what its header says.",
        callback=between("--voxel-size", *VOXELS),
    ),
]
Invert = Annotated[
    bool | None,
    typer.Option(
        "--invert/--no-invert",
        help="Turn black particles white, or take images as the file has them; default: found out.",
    ),
]
PixelSize = Annotated[
    float | None,
    typer.Option(min=0.01, max=1000, help="Angstrom, of a particle file that does not say it."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def refuse_alone(given: Mapping[str, object], why: str) -> None:
    """Refuse options that would change nothing: those that are not None."""
    for option, value in given.items():
        if value is not None:
            raise InputError(f"{option}: {why}")


def say(quiet: bool, text: str) -> None:
    """Tell on the terminal what is going on."""
    if not quiet:
        typer.echo(text, err=True)


def print_figures(found: Mapping[str, object], as_json: bool) -> None:
    """Print figures, one a line or as JSON."""
    if as_json:
        typer.echo(json_of(found))
        return
    width = max(map(len, found))
    for name, value in found.items():
        values = value if isinstance(value, tuple) else (value,)
        typer.echo(f"{name.replace('_', ' '):{width}}  {' to '.join(map(_figure, values))}")


def _figure(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_figure(v)}" for name, v in value.items())
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if math.isfinite(value) else "not to be told"


def json_of(found: object) -> str:
    """Figures as JSON, which knows no infinity and no number that is none: null."""

    def plain(value: object) -> object:
        if isinstance(value, Mapping):
            return {str(key): plain(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(found), indent=1, allow_nan=False)


def check_outputs(
    written: Mapping[str, Iterable[Path]],
    read: Iterable[str | Path | None],
    particles: ParticleStack | None = None,
) -> None:
    """Refuse to write onto what is read, or two files onto one, before anything is computed.

    Parameters
    ----------
    written : dict of str to paths
        The files that an option says are written.
    read : iterable of paths
        Files that are read; what is none (None, a shipped particle's name) is passed over.
    particles : ParticleStack, optional
        Its image stacks are read.
    """
    from ..io import files
    from ..io.stacks import ImageStack

    outputs = [(option, path) for option, paths in written.items() for path in paths]
    places: dict[Path, Path] = {}
    for option, path in outputs:
        place = Path(os.path.realpath(path))
        if other := next((places[p] for p in (place, *place.parents) if p in places), None):
            raise InputError(f"{option}: {path} would stand where {other} does; wanted two names")
        places[place] = path
        files.check_writable(path)
    there = {_identity(path): (option, path) for option, path in outputs if path.exists()}
    images = None if particles is None else particles.images
    stacks = [layout.path for layout in images.layouts] if isinstance(images, ImageStack) else []
    for name in (*read, *stacks) if there else ():
        if name is not None and os.path.exists(name) and (found := there.get(_identity(name))):
            raise InputError(
                f"{found[0]}: {found[1]} would be written, and is the input {name}; "
                "wanted another name"
            )


def _identity(path: str | Path) -> tuple[int, int]:
    """What all links to a file share."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def star_files(output: Path, particles: ParticleStack | None = None) -> list[Path]:
    """What is written of particles: the STAR file and, of images that it cannot name, a stack."""
    from ..io.stacks import ImageStack

    images = None if particles is None else particles.images
    named = isinstance(images, ImageStack) and not images.is_array
    return [output] if named else [output, output.with_suffix(".mrcs")]
