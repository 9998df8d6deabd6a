"""Image stacks: files that are opened by their headers and read where they are used."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .. import imaging
from ..aberrations import Aberration
from ..errors import InputError, UnusableImages
from ..lazy_images import Premultiplied
from . import files
from .files import PathLike

__all__ = [
    "ImageStack",
    "Layout",
    "NoImages",
    "layout",
    "layout_of_images",
    "open_array",
    "open_stack",
    "told_apart",
    "told_whole",
]


#: Bytes of images up to which all are looked at to tell them from others; images read at once.
WHOLE, TOGETHER = 1 << 29, 256


@dataclass(frozen=True)
class Layout:
    """Where an MRC file keeps its values.

    Attributes
    ----------
    path : Path
    shape : (nz, ny, nx)
    dtype : numpy.dtype
        With the file's byte order.
    offset : int
        Bytes before the values.
    pixel_size_angstrom : float
        As the header has it; 0 where it says nothing of use.
    axes : (int, int, int)
        Which of x, y, z (1, 2, 3) columns, rows and sections are, as the header has it.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: np.dtype
    offset: int
    pixel_size_angstrom: float = 0.0
    axes: tuple[int, int, int] = (1, 2, 3)

    def mapped(self) -> np.ndarray:
        """Map the values into memory, read-only: a (nz, ny, nx) array."""
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def layout(path: PathLike) -> Layout:
    """Read the header of an MRC file, and nothing more.

    What the header says must fit into the file: that decides its byte order, whatever the machine
    stamp says, and bounds the memory that anybody asks for by the file's size.

    Parameters
    ----------
    path : path to an MRC file, not compressed

    Returns
    -------
    Layout

    Raises
    ------
    InputError
        No such file, not an MRC file of real values, or one that is shorter than its header says.
    """
    path = files.existing(path)
    length = path.stat().st_size
    with path.open("rb") as file:
        raw = file.read(1024)
    return fitting(raw, length, path)


def layout_of_images(path: PathLike) -> Layout:
    """Read the header of an MRC stack: of images whose rows are rows, one behind the other."""
    found = layout(path)
    if sorted(found.axes) == [1, 2, 3] and found.axes != (1, 2, 3):
        raise InputError(
            f"{path}: columns, rows and sections are axes {found.axes} by its header; wanted "
            "images, (1, 2, 3)"
        )
    return found


def fitting(raw: bytes, length: int, path: Path) -> Layout:
    """Return the layout that the header ``raw`` of a file of ``length`` bytes describes."""
    from mrcfile.dtypes import HEADER_DTYPE
    from mrcfile.utils import dtype_from_mode

    if len(raw) < HEADER_DTYPE.itemsize:
        raise InputError(f"{path}: not a whole MRC file: it ends within the header of 1024 bytes")
    failures = []
    for order in "<>":
        header = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order))[0]
        nz, ny, nx = (int(header[name]) for name in ("nz", "ny", "nx"))
        mode, extended = int(header["mode"]), int(header["nsymbt"])
        try:
            dtype = dtype_from_mode(mode).newbyteorder(order)
        except ValueError:
            failures.append((False, f"mode {mode}, wanted 0, 1, 2, 6 or 12"))
            continue
        if dtype == np.int8 and unsigned(header):
            dtype = np.dtype(np.uint8)
        wanted = len(raw) + extended + nz * ny * nx * dtype.itemsize
        if dtype.kind == "c":
            what = "a transform (mode 4), wanted real values"
        elif min(nz, ny, nx) < 1 or extended < 0:
            what = f"{nx} x {ny} x {nz} values after {extended} more bytes of header"
        elif wanted > length:
            what = (
                f"{nx} x {ny} x {nz} values of {dtype.itemsize} bytes, in all {wanted:,} bytes, "
                f"and it has {length:,}"
            )
        elif bytes(header["map"])[:3] != b"MAP" and wanted != length:
            what = "no MAP, the mark of an MRC file"
        else:
            cell, intervals = float(header["cella"]["x"]), int(header["mx"])
            known = np.isfinite(cell) and cell > 0 and intervals > 0
            pixel = float(f"{cell / intervals:.6g}") if known else 0.0
            column, row, section = (int(header[name]) for name in ("mapc", "mapr", "maps"))
            return Layout(
                path, (nz, ny, nx), dtype, len(raw) + extended, pixel, (column, row, section)
            )
        failures.append((True, what))
    # The byte order is the one in which the mode makes sense.
    _, what = max(failures, key=lambda failure: failure[0])
    raise InputError(f"{path}: not a whole MRC file: the header says {what}")


def unsigned(header: Any) -> bool:
    """Whether bytes (mode 0) are 0 to 255: IMOD wrote them, and does not flag them as signed."""
    of_imod = header["extra2"].tobytes()[40:48]  # imodStamp, imodFlags
    lowest = {b"IMOD": 4, b"DOMI": 7}.get(of_imod[:4])  # the byte order is the stamp's
    return lowest is not None and not of_imod[lowest] & 1


def open_array(path: PathLike) -> ImageStack:
    """Open the images of an ``.npy`` file, an (n, size, size) array, without reading them."""
    path = files.existing(path)
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        offset, order = mapped.offset, mapped.flags.c_contiguous
    except Exception as error:  # NumPy raises whatever the parser of its header met
        raise InputError(f"{path}: not a readable .npy file ({error})") from error
    shape = mapped.shape
    if mapped.ndim != 3 or shape[1] != shape[2] or mapped.dtype.kind not in "iuf" or not order:
        raise InputError(f"{path}: wanted (n, size, size) images, got {mapped.dtype} {shape}")
    n = len(mapped)
    at = Layout(path.resolve(), (n, shape[1], shape[2]), mapped.dtype, offset)
    return ImageStack([at], np.zeros(n), np.arange(n))


def open_stack(path: PathLike) -> ImageStack:
    """Open the images of an MRC stack, without reading them."""
    at = layout_of_images(path)
    n, height, width = at.shape
    if height != width:
        raise InputError(f"{path}: wanted square images, got {width} x {height} pixels")
    return ImageStack([at], np.zeros(n), np.arange(n))


class NoImages:
    """In place of the images of a particle file that are not there: how many, and of what size."""

    def __init__(self, path: Path, n: int, box_px: int) -> None:
        self.path, self.shape = path, (n, box_px, box_px)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        raise InputError(f"{self.path}: read without its images")

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:]

    def select(self, rows: slice | np.ndarray) -> NoImages:
        """Some of the images that are not there."""
        return NoImages(self.path, len(np.arange(len(self))[rows]), self.shape[1])


class ImageStack:
    """Images in the order of their rows, from any number of MRC files.

    ``stack[i]`` is a (size, size) float32 array; ``stack[a:b]`` and ``stack[rows]`` are
    (n, size, size) float32 arrays. Only what is asked for is read, and it is checked then.
    ``numpy.asarray(stack)`` reads all.

    Parameters
    ----------
    layouts : sequence of Layout
        The files.
    file : (n,) int array
        Which of them holds a row's image.
    section : (n,) int array
        Where in it, from 0.
    source : path, optional
        The particle file, which errors name.
    row : (n,) int array, optional
        Rows of the particle file, from 0, which errors name; by default all.
    sign : (n,) array of 1 and -1, optional
        What each image is multiplied by as it is read; by default nothing.
    flat : bool
        Whether each image's background is then brought to zero (:func:`cryoem.imaging.flatten`).
    aberrations : sequence of Aberration
        That some images have, and that are then undone.
    aberration : (n,) int array, optional
        Which of them each image has, -1: none.
    premultiplied : Premultiplied, optional
        The CTF by whose absolute value images are divided at last.
    picture : (n,) int array, optional
        Alike where images are the same picture; by default nobody has looked.

    Raises
    ------
    InputError
        On reading: an image that is not finite or that is constant, or a file that has changed.
    """

    dtype = np.dtype(np.float32)
    ndim = 3

    def __init__(
        self,
        layouts: Sequence[Layout],
        file: ArrayLike,
        section: ArrayLike,
        *,
        source: PathLike | None = None,
        row: ArrayLike | None = None,
        sign: ArrayLike | None = None,
        flat: bool = False,
        aberrations: Sequence[Aberration] = (),
        aberration: ArrayLike | None = None,
        premultiplied: Premultiplied | None = None,
        picture: np.ndarray | None = None,
    ) -> None:
        self.layouts = tuple(layouts)
        self.file, self.section = np.asarray(file, np.int32), np.asarray(section, np.int32)
        self.source = source
        self.row = np.arange(len(self.file), dtype=np.int32) if row is None else np.asarray(row)
        self.sign = None if sign is None else np.asarray(sign, np.int8)
        self.flat = flat
        self.aberrations = tuple(aberrations)
        self.aberration = np.full(len(self.file), -1, np.int32)
        if aberration is not None:
            self.aberration[:] = aberration
        self.premultiplied, self.picture = premultiplied, picture
        #: (n, size, size)
        self.shape = (len(self.file), *self.layouts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def is_array(self) -> bool:
        """Whether some images lie in an ``.npy`` file, which a particle file cannot name."""
        return any(layout.path.suffix == ".npy" for layout in self.layouts)

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        rows = np.arange(len(self))[index]
        images = self._read(np.atleast_1d(rows))
        return images if np.ndim(rows) else images[0]

    def select(self, rows: slice | np.ndarray) -> ImageStack:
        """Some of the images, as a stack; nothing is read."""
        some = copy.copy(self)
        some.file, some.section, some.row = self.file[rows], self.section[rows], self.row[rows]
        some.sign = None if self.sign is None else self.sign[rows]
        some.aberration = self.aberration[rows]
        some.premultiplied = self.premultiplied and self.premultiplied.select(rows)
        some.picture = None if self.picture is None else self.picture[rows]
        some.shape = (len(some.file), *self.shape[1:])
        return some

    def _with(self, **changes: object) -> ImageStack:
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def with_sign(self, sign: ArrayLike | None) -> ImageStack:
        """The same images, each multiplied by its sign, 1 or -1, as it is read."""
        return self._with(sign=None if sign is None else np.asarray(sign, np.int8))

    def without_aberrations(
        self, aberrations: Sequence[Aberration], aberration: ArrayLike
    ) -> ImageStack:
        """The same images, each one's aberration undone as it is read; see :class:`ImageStack`."""
        which = np.asarray(aberration, np.int32)
        return self._with(aberrations=tuple(aberrations), aberration=which)

    def with_pictures(self, picture: ArrayLike) -> ImageStack:
        """The same images, of which it is known which are the same picture."""
        return self._with(picture=np.asarray(picture))

    def flattened(self) -> ImageStack:
        """The same images, each one's background brought to zero as it is read."""
        return self._with(flat=True)

    def divided(self, premultiplied: Premultiplied) -> ImageStack:
        """The same images, divided by the CTF that they were multiplied by, as they are read."""
        return self._with(premultiplied=premultiplied)

    def as_kept(self, done: np.ndarray) -> np.ndarray:
        """What was done to the images as files keep them, of what was done to those that one reads.

        See :class:`cryoem.imaging.CtfParameters`.
        """
        if self.premultiplied is None or self.is_array:
            return done
        before = self.premultiplied.ctf.images
        return np.where(before == "premultiplied", before, done)

    def as_they_lie(self) -> ImageStack:
        """The same images as files keep them, but for their signs."""
        none = np.full(len(self), -1, np.int32)
        return self._with(flat=False, premultiplied=None, aberration=none)

    def inverted(self) -> ImageStack:
        """The same images, black turned to white as they are read."""
        return self.with_sign(-np.ones(len(self)) if self.sign is None else -self.sign)

    def __copy__(self) -> ImageStack:
        # Not as it is pickled: rows of files that are left out would name others.
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers are sent the files of these images, not of all.
        used, file = np.unique(self.file, return_inverse=True)
        arguments = [self.layouts[i] for i in used] or self.layouts[:1], file, self.section
        options = (
            "source", "row", "sign", "flat", "aberrations", "aberration", "premultiplied",
            "picture",
        )  # fmt: skip
        return _rebuilt, (arguments, {name: getattr(self, name) for name in options})

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def _read(self, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self.shape[1:]), np.float32)
        for i in np.unique(self.file[rows]):
            here = np.flatnonzero(self.file[rows] == i)
            try:
                images[here] = self.layouts[i].mapped()[self.section[rows[here]]]
            except (OSError, ValueError) as error:
                raise InputError(
                    f"{self.layouts[i].path}: has changed since it was opened ({error})"
                ) from error
        if self.sign is not None:
            images *= self.sign[rows, None, None]
        low, high = images.min(axis=(1, 2)), images.max(axis=(1, 2))  # NaN where one pixel is
        found = imaging.unusable(low, high)
        found["is constant"] = (low == high) & ~np.any([*found.values()], axis=0)
        self._refuse(rows, {what: np.flatnonzero(bad) for what, bad in found.items() if bad.any()})
        images = imaging.flatten(images) if self.flat else images
        for which in np.unique(self.aberration[rows]):
            if which >= 0:
                here = self.aberration[rows] == which
                images[here] = self.aberrations[which].undo(images[here])
        if self.premultiplied is not None:
            images = self.premultiplied.select(rows).divided(images)
            images = imaging.flatten(images) if self.flat else images  # its mean has grown
        return images

    def _refuse(self, rows: np.ndarray, found: dict[str, np.ndarray]) -> None:
        """Refuse some of the images that were read, by what is wrong with them."""
        if not found:
            return
        what, bad = next(iter(found.items()))
        row, others = rows[bad[0]], sum(map(len, found.values())) - 1
        where = "" if self.source is None else f"{self.source}: row {self.row[row] + 1}: "
        end = "mend it or take its row out"
        if others:
            end = f"and {others:,} more that were read with it are none; take their rows out"
        raise UnusableImages(
            f"{where}image {self.section[row] + 1} of {self.layouts[self.file[row]].path} "
            f"{what}; {end}",
            found,
        )


def _rebuilt(arguments: tuple[Any, ...], options: dict[str, Any]) -> ImageStack:
    return ImageStack(*arguments, **options)


def told_whole(images: ImageStack) -> bool:
    """Whether all images are looked at to tell them from others."""
    return 4 * math.prod(images.shape) <= WHOLE


def told_apart(images: Any) -> Iterator[np.ndarray]:
    """What tells images from others, part by part: they themselves; of large files, some of each.

    And what is done to each of them as it is read.

    Of files beyond that, sizes, which of their sections are which images, and the first, the
    middle and the last image that is used of each. Nothing where images are of another kind.
    """
    if type(images) is np.ndarray:
        yield images
    if not isinstance(images, ImageStack):
        return
    used, file = np.unique(images.file, return_inverse=True)
    yield np.array([images.layouts[i].path.stat().st_size for i in used])
    yield file
    yield images.section
    if images.sign is not None:
        yield images.sign
    if images.aberrations:
        yield images.aberration
        for aberration in images.aberrations:
            yield from (np.asarray(getattr(aberration, f.name)) for f in fields(aberration))
    if images.premultiplied is not None:
        yield np.asarray(images.premultiplied.ctf.images)
    whole = told_whole(images)
    order = np.argsort(file, kind="stable")
    parts = np.split(images.section[order], np.flatnonzero(np.diff(file[order])) + 1)
    for i, part in zip(used, parts, strict=True):
        sections, values = np.unique(part), images.layouts[i].mapped()
        if not whole:
            sections = sections[[0, len(sections) // 2, -1]]
        for start in range(0, len(sections), TOGETHER):
            yield values[sections[start : start + TOGETHER]]  # as they stand, whatever they hold
