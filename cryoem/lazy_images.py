"""Images that are read where they are indexed, and changed as they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from .imaging import CtfParameters, apply_ctf, divisor

__all__ = ["Images", "Premultiplied", "Rows", "SomeImages", "changed", "selected_images"]

#: Which particles: a range, or indices in any order.
Rows = slice | np.ndarray
#: Changes images, given their rows.
Change = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Images(Protocol):
    """Images that are read where they are indexed: an array, or an ``ImageStack`` of files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n, size, size)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: int | Rows, /) -> np.ndarray: ...


class SomeImages:
    """Some rows of images, which are read or copied, and changed, where they are indexed."""

    def __init__(
        self, base: Images, rows: np.ndarray, change: Change = lambda images, _: images
    ) -> None:
        self.base, self.rows, self.change = base, rows, change
        self.shape = (len(rows), *base.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        rows = self.rows[index]
        images = self.change(np.asarray(self.base[np.atleast_1d(rows)]), np.atleast_1d(rows))
        return images if np.ndim(rows) else images[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        images = self[:]
        return images if dtype is None else images.astype(dtype, copy=False)

    def select(self, rows: Rows) -> SomeImages:
        """Some of them."""
        return SomeImages(self.base, self.rows[rows], self.change)

    def __reduce__(self) -> tuple[Any, ...]:
        return np.array, (self[:],)  # other processes are sent these images, not all


def selected_images(images: Any, rows: Rows) -> Images:
    """Some of the images; nothing is read or copied but where they are in memory already."""
    if hasattr(images, "select"):
        return images.select(rows)
    if isinstance(images, np.ndarray) and isinstance(rows, slice):
        return images[rows]  # a view
    return SomeImages(images, np.arange(len(images))[rows])


def changed(images: Any, change: Change, later: str, *told: object) -> Images:
    """Images changed at once where they are in memory, else by ``later()`` as they are read."""
    if isinstance(images, np.ndarray) and not isinstance(images, np.memmap):
        return change(images, np.arange(len(images)))
    if hasattr(images, later):
        return getattr(images, later)(*told)
    return SomeImages(images, np.arange(len(images)), change)


@dataclass(frozen=True, eq=False)
class Premultiplied:
    """What images were multiplied by when they were extracted, to be divided by its absolute value.

    Their noise, which the CTF has coloured, is then as it was seen. About the zeros of the CTF they
    stay next to nothing: what rounding or another box has left there is not blown up.

    Attributes
    ----------
    ctf : CtfParameters
        Of all images; those that are 'premultiplied' are divided.
    pixel_size_angstrom : float
    """

    ctf: CtfParameters
    pixel_size_angstrom: float

    def select(self, rows: slice | np.ndarray) -> Premultiplied:
        """That of some images."""
        return Premultiplied(self.ctf.select(rows), self.pixel_size_angstrom)

    def divided(self, images: ArrayLike) -> Float[np.ndarray, "n y x"]:
        """These images, as many as it is of, divided."""
        images = np.array(images, np.float32)
        rows = np.flatnonzero(self.ctf.images == "premultiplied")
        step = max(1, (1 << 24) // max(1, images[0].size)) if len(images) else 1
        for start in range(0, len(rows), step):
            here = rows[start : start + step]
            part = self.ctf.select(here)
            once = replace(part, images="as seen", scale=1.0)
            by = divisor(once.values(images.shape[1], self.pixel_size_angstrom))
            by *= np.maximum(np.abs(part.scale), 1e-6).astype(np.float32)[:, None, None]
            images[here] = apply_ctf(images[here], 1 / by)
        return images
