"""Image names: which image of which file they mean, and names by which it is found again."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..half_sets import image_of
from . import stacks
from .stacks import ImageStack

__all__ = [
    "NoSuchStackError",
    "find_stack",
    "folders_of",
    "names_from",
    "note_header_pixels",
    "open_images",
    "without_format",
]

#: What RELION takes for stacks by their names; the format of others is told after a colon.
STACKS = (".mrcs", ".st")
FORMAT = re.compile(":(mrcs?|st)$")


class NoSuchStackError(InputError):
    """A particle file names a stack that is not there."""


def without_format(names: np.ndarray) -> np.ndarray:
    """Image names without RELION's mark of a format: ``000001@stack.mrc:mrcs``."""
    return np.array([FORMAT.sub("", str(name)) for name in names], object)


def open_images(path: Path, names: Iterable[object]) -> ImageStack:
    """Open the stacks of image names as ``000001@stack.mrcs``, or ``image.mrc`` for single ones."""
    folders = [*folders_of(path), Path.cwd()]
    called = "blob/path, blob/idx" if path.suffix == ".cs" else "column rlnImageName"
    layouts: list[stacks.Layout] = []
    index: dict[str, int] = {}
    file, section = [], []
    for row, name in enumerate(map(str, names)):
        where = f"{path}: row {row + 1}, {called}: "
        digits, stack = image_of(name)
        if stack not in index:
            found = find_stack(stack, folders)
            if found is None and "@" in stack and not digits:
                raise NoSuchStackError(f"{where}got {name!r}, wanted 000001@stack.mrcs")
            if found is None:
                raise NoSuchStackError(
                    f"{where}{stack!r}: no such file in the folder of the particles, in one above "
                    "it, or in the working directory"
                )
            index[stack] = len(layouts)
            layouts.append(stacks.layout_of_images(found))
        layout = layouts[index[stack]]
        held, *edges = layout.shape
        if not (re.fullmatch("[0-9]{1,9}", digits) if digits else held == 1):
            raise InputError(
                f"{where}got {name!r}, wanted 000001@stack.mrcs ({stack} holds {held} images)"
            )
        number = int(digits or 1)
        if not 1 <= number <= held:
            raise InputError(f"{where}image {number} of {layout.path}, which holds {held}")
        if edges[0] != edges[1] or edges != [*layouts[0].shape[1:]]:
            raise InputError(
                f"{where}the images of {layout.path} have {edges[1]} x {edges[0]} px; wanted "
                f"squares, all of the size of row 1 ({layouts[0].shape[2]} px)"
            )
        file.append(index[stack])
        section.append(number - 1)
    return ImageStack(layouts, file, section, source=path)


def folders_of(path: Path) -> list[Path]:
    """The folder of the file at ``path`` and those above it."""
    return [*path.absolute().parents]


def find_stack(stack: str, folders: Iterable[Path]) -> Path | None:
    """The file ``stack`` of the first folder that has it."""
    paths = (folder / stack for folder in folders)
    return next((path for path in paths if os.path.isfile(path)), None)


def names_from(path: Path, images: ImageStack, names: np.ndarray | None) -> np.ndarray:
    """Image names that can be found from the file at ``path``: those that were, where they can.

    A stack that RELION would take for a volume is marked as one.
    """
    folders = folders_of(path)
    renamed: dict[tuple[int, str], str] = {}
    found = []
    for row, (file, section) in enumerate(zip(images.file, images.section, strict=True)):
        digits, stack = image_of("" if names is None else str(names[row]))
        layout = images.layouts[file]
        if (file, stack) not in renamed:
            there, here = layout.path.absolute(), find_stack(stack, folders)
            same = here is not None and here.samefile(there)
            # A way up leads from where the folder is, whatever links lead there.
            way = os.path.relpath(there.parent.resolve() / there.name, folders[0].resolve())
            renamed[file, stack] = stack if same else way
        numbered = digits or layout.shape[0] > 1 or "@" in renamed[file, stack]
        if numbered and int(digits or 0) != section + 1:
            digits = f"{section + 1:06d}"
        of_many = layout.shape[0] > 1 and layout.path.suffix not in STACKS
        end = ":mrcs" if of_many else ""
        found.append(f"{digits}{'@' if digits else ''}{renamed[file, stack]}{end}")
    return np.array(found, object)


def note_header_pixels(path: Path, images: ImageStack, pixel_size: float) -> None:
    """Say where the stacks themselves tell another pixel size than the particle file."""
    said = np.array([layout.pixel_size_angstrom for layout in images.layouts])
    other = ~np.isin(said, (0.0, 1.0)) & ~np.isclose(said, pixel_size, rtol=5e-3)
    if other.any():
        warnings.warn(
            f"{path}: pixels of {pixel_size:g} A; the headers of {other.sum()} of {len(said)} "
            f"stacks say otherwise, such as {said[other][0]:g} A in "
            f"{images.layouts[np.argmax(other)].path}, and are not used",
            stacklevel=3,
        )
