"""Images as the search sees them: the particle cut out, in coarse pixels, as transforms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Complex, Float, Int

from .. import imaging, projection
from ..errors import InputError
from ..imaging import CtfParameters
from ..particles import ParticleStack, Rows

__all__ = ["Coarse", "coarsened", "small_stack"]

#: Coarse pixels to the finest detail that is used.
PIXELS = 2.4
AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class Coarse:
    """Transforms of small images, the coarsest frequencies first.

    Attributes
    ----------
    slices : Slices
        Of the small images, to the finest frequency that is used.
    pixel_size_angstrom : float
    values : (n, k) array
        The images' transforms, phases flipped.
    transfer : (n, k) array or None
        Absolute value of the CTF; None: images without one.
    group : (n,) int array
        Optics group.
    power : (g, k) array
        What an image of each group has at each frequency on average: its noise and itself.
    """

    slices: projection.Slices
    pixel_size_angstrom: float
    values: Complex[np.ndarray, "n k"]
    transfer: Float[np.ndarray, "n k"] | None
    group: Int[np.ndarray, " n"]
    power: Float[np.ndarray, "g k"]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def box_px(self) -> int:
        """Edge of the small images."""
        return self.slices.box_px

    @property
    def extent_angstrom(self) -> float:
        """Edge of the small images."""
        return self.box_px * self.pixel_size_angstrom

    def count(self, resolution_angstrom: float) -> int:
        """How many frequencies are no finer than a resolution."""
        radius = np.linalg.norm(self.slices.frequencies, axis=1)
        return int(np.sum(radius <= self.extent_angstrom / resolution_angstrom + 1e-9))

    def select(self, rows: Rows) -> Coarse:
        """Some of the images."""
        return replace(
            self,
            values=self.values[rows],
            transfer=None if self.transfer is None else self.transfer[rows],
            group=self.group[rows],
        )


def small_stack(
    stack: ParticleStack, extent_angstrom: float, resolution_angstrom: float
) -> ParticleStack:
    """Cut the middle of the images out, in pixels that hold the resolution, phases flipped.

    Parameters
    ----------
    stack : ParticleStack
        Its shifts are undone.
    extent_angstrom : float
        Edge of what is cut out, at most the frame's.
    resolution_angstrom : float
        The finest detail that will be used.
    """
    box, pixel = stack.box_px, stack.pixel_size_angstrom
    small = min(box, 2 * int(np.ceil(box * pixel * PIXELS / resolution_angstrom / 2)))
    coarse = pixel * box / small
    edge = min(small, 2 * int(np.ceil(extent_angstrom / coarse / 2)))
    if edge < 8:
        raise InputError(
            f"what is cut out of the images, {extent_angstrom:g} A, is {edge} pixels of "
            f"{coarse:.1f} A: too few to tell orientations by"
        )
    images = np.empty((len(stack), edge, edge), np.float32)
    done = 0
    for part in stack.chunks(AT_ONCE):
        frames = part.images[:]
        if part.shifts_px.any():
            frames = imaging.shift(frames, -part.shifts_px)
        ctf = part.ctf()
        if ctf is not None:
            frames = imaging.flip_phases(frames, ctf)
        rows = slice(done, done + len(part))
        images[rows] = imaging.crop(imaging.downsample(frames, small), edge)
        done += len(part)
    return stack.replace(ctf_parameters=_flipped(stack.ctf_parameters), shifts_px=None).with_images(
        images, pixel_size_angstrom=coarse
    )


def _flipped(parameters: CtfParameters | None) -> CtfParameters | None:
    """The CTF of images whose phases have been flipped."""
    if parameters is None:
        return None
    images = np.where(parameters.images == "as seen", "phase flipped", parameters.images)
    return replace(parameters, images=images)


def coarsened(small: ParticleStack, resolution_angstrom: float) -> Coarse:
    """Transform small images, to a resolution; see :func:`small_stack`."""
    edge, coarse = small.box_px, small.pixel_size_angstrom
    slices = projection.Slices(edge, edge * coarse / resolution_angstrom)
    values = slices.from_images(small.images[:])
    transfer = None
    if small.ctf_parameters is not None:
        transfer = np.empty(values.shape, np.float32)
        for i in range(0, len(small), AT_ONCE):
            ctf = small.ctf(slice(i, i + AT_ONCE))
            assert ctf is not None
            transfer[i : i + AT_ONCE] = ctf[:, *slices.index]
    shell = np.rint(np.linalg.norm(slices.frequencies, axis=1)).astype(int)
    squares = np.abs(values) ** 2
    count = np.maximum(np.bincount(shell, slices.weights), 1)
    group = small.optics_group
    power = np.empty((small.optics_groups, len(shell)), np.float32)
    for g in range(len(power)):
        here = group == g if (group == g).any() else slice(None)
        mean = squares[here].mean(axis=0)
        power[g] = (np.bincount(shell, slices.weights * mean) / count)[shell]
    return Coarse(slices, coarse, values, transfer, group, power)
