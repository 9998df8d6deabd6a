"""The application, the options that several commands share, and what they print."""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from ..errors import CryoemError, InputError

if TYPE_CHECKING:
    from ..particles import ParticleStack

__all__ = ["app"]


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
Seed = Annotated[int, typer.Option(help="Random seed.")]
Particles = Annotated[
    Path, typer.Argument(metavar="PARTICLES", help="Particle file: .star or .cs.")
]
MapFile = Annotated[Path, typer.Argument(metavar="MAP", help="Density: an MRC map.")]
StarOut = Annotated[Path, typer.Option("--output", "-o", help="STAR file to write.")]
MapOut = Annotated[Path, typer.Option("--output", "-o", help="MRC map to write.")]
Symmetry = Annotated[str, typer.Option(help="Point group: C1, C4, D2, ...")]
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


def say(quiet: bool, text: str) -> None:
    """Tell on the terminal what is going on."""
    if not quiet:
        typer.echo(text, err=True)


def print_figures(found: Mapping[str, object], as_json: bool) -> None:
    """Print figures, one a line or as JSON."""
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    width = max(map(len, found))
    for name, value in found.items():
        values = value if isinstance(value, tuple) else (value,)
        texts = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)
        typer.echo(f"{name.replace('_', ' '):{width}}  {' to '.join(texts)}")


def open_particles(path: Path, quiet: bool, pixel_size: float | None = None) -> ParticleStack:
    """Read a particle file, and say what it holds."""
    from ..io.particles import read_particles

    stack = read_particles(path, pixel_size_angstrom=pixel_size)
    box, pixel = stack.box_px, stack.pixel_size_angstrom
    say(quiet, f"{path}: {len(stack):,} particles of {box} px, {pixel:g} A each")
    return stack


def open_oriented(path: Path, quiet: bool, pixel_size: float | None = None) -> ParticleStack:
    """Read a particle file that has orientations."""
    stack = open_particles(path, quiet, pixel_size)
    if stack.quaternions is None:
        raise InputError(f"{path}: no columns rlnAngleRot, rlnAngleTilt, rlnAnglePsi; see orient")
    return stack


def in_white(
    stack: ParticleStack, path: Path, invert: bool | None, quiet: bool, seed: int
) -> ParticleStack:
    """Particles that are white on black: turned where the user says so, or where they are black."""
    if invert is None and not shown_black(stack, seed):
        return stack
    if invert is None:
        warnings.warn(
            f"{path}: the particles are black on white; their images are turned as they are read "
            "(--no-invert: taken as they are)",
            stacklevel=2,
        )
    elif invert:
        say(quiet, f"{path}: the images are turned, as --invert says")
    return stack.inverted() if invert is not False else stack


def shown_black(stack: ParticleStack, seed: int) -> bool:
    """Whether the particles are black on white, by some of their images."""
    from ..rotations import generator
    from ..surveying import contrast

    n = len(stack)
    rows = np.sort(generator(seed, "contrast").choice(n, min(300, n), replace=False))
    return contrast(stack.images[rows])[0] < 0
