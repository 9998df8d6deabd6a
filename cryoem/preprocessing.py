"""What is done to an image before a network reads it, or before images are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from . import imaging
from .density import Density
from .errors import InputError
from .imaging import check_images

__all__ = ["Preprocessing", "check_fits", "preprocessing_for"]

#: Voxels that differ from the images' pixels by no more than this share are as large.
SAME_SIZE = 0.01


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the network reads it.

    Down-sample the frame of ``frame_px`` to ``down_px``, cut out the central ``crop_px``, bring to
    mean 0 and standard deviation 1.

    Attributes
    ----------
    frame_px : int
    down_px : int
    crop_px : int
    pixel_size_angstrom : float
        Of the frame.
    """

    frame_px: int
    down_px: int
    crop_px: int
    pixel_size_angstrom: float

    def __post_init__(self) -> None:
        if not 2 <= self.crop_px <= self.down_px <= self.frame_px:
            raise InputError(f"wanted 2 <= crop_px <= down_px <= frame_px, got {self}")

    def __call__(
        self, images: ArrayLike, *, ctf: np.ndarray | None = None
    ) -> Float[np.ndarray, "n y x"]:
        """Prepare (n, frame_px, frame_px) images: (n, crop_px, crop_px) float32."""
        return self.cut(self.reduce(images, ctf=ctf))

    def reduce(
        self, images: ArrayLike, *, ctf: np.ndarray | None = None
    ) -> Float[np.ndarray, "n y x"]:
        """Flip phases where a CTF is given, and down-sample: (n, down_px, down_px) float32.

        ``ctf``, (n, frame_px, frame_px // 2 + 1): see :func:`cryoem.imaging.ctf`.
        """
        images = check_images(images)
        if images.shape[1] != self.frame_px:
            raise InputError(
                f"wanted images of {self.frame_px} px "
                f"({self.pixel_size_angstrom} A each), got {images.shape[1]} px"
            )
        if ctf is not None and len(ctf) != len(images):
            raise InputError(f"wanted a CTF for each of {len(images)} images, got {len(ctf)}")
        small = np.empty((len(images), self.down_px, self.down_px), np.float32)
        for i in range(0, len(images), 512):  # transforms of 512 frames at once are enough
            part = images[i : i + 512]
            if ctf is not None:
                part = imaging.flip_phases(part, ctf[i : i + 512])
            small[i : i + 512] = imaging.downsample(part, self.down_px)
        return small

    def cut(
        self, small: np.ndarray, *, shifts_px: np.ndarray | None = None
    ) -> Float[np.ndarray, "n y x"]:
        """Centre what :meth:`reduce` gave by undoing shifts (pixels of it), crop and normalise."""
        if shifts_px is not None:
            small = imaging.shift(small, -shifts_px)
        return imaging.normalise(imaging.crop(small, self.crop_px))


def preprocessing_for(
    density: Density, *, max_shift_px: float = 0.0, crop_px: int = 40
) -> Preprocessing:
    """Find the window that holds a density and its shifts, and brings it down to few pixels.

    Parameters
    ----------
    density : Density, a cube
    max_shift_px : float
    crop_px : int
        The most pixels that the network is to read; fewer where that makes the sampling exact.

    Returns
    -------
    Preprocessing
    """
    frame = density.box_px
    axis = np.arange(frame) - frame // 2
    far = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    solid = density.values > 0.05 * density.values.max()
    if not solid.any():
        raise InputError("a density without a voxel above zero has no extent")
    wanted = min(frame, int(np.ceil(2 * (far[solid].max() + max_shift_px + 1))))
    for crop in range(min(crop_px, frame), 1, -1):
        for extent in range(max(wanted, crop), frame + 1):
            # crop / extent = down / frame, all whole: both samplings then agree exactly.
            if crop * frame % extent == 0:
                down = crop * frame // extent
                return Preprocessing(frame, down, crop, density.voxel_size_angstrom)
    raise AssertionError("the whole frame always fits")


def check_fits(density: Density, box_px: int, pixel_size_angstrom: float) -> None:
    """Refuse a density of another box, or of other voxels, than the images' pixels."""
    if density.box_px != box_px:
        raise InputError(f"wanted a density of the images' {box_px} px, got {density.box_px}")
    voxel = density.voxel_size_angstrom
    if abs(voxel - pixel_size_angstrom) > SAME_SIZE * pixel_size_angstrom:
        raise InputError(
            f"wanted a density in voxels of the images' {pixel_size_angstrom:g} A, got {voxel:g} "
            "A; Density.sampled_as brings it there"
        )
