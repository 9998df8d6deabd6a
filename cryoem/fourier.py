"""Where the Fourier origin sits: centred grids, resizing, low-pass filters, shells.

Real arrays have their origin at index ``n // 2`` of every axis. Frequencies are counted in cycles
per box: an axis of ``n`` samples carries the integers from ``-(n // 2)``.
"""

from collections.abc import Sequence

import numpy as np
import scipy.fft
from jaxtyping import Float
from numpy.typing import ArrayLike

from . import threads
from .errors import InputError

__all__ = [
    "crop_or_pad",
    "filtered",
    "flipped",
    "frequencies",
    "low_pass",
    "radius",
    "resize",
    "shift",
]

#: Threads of every transform.
WORKERS = threads.count()


def frequencies(n: int) -> Float[np.ndarray, " n"]:
    """Integer frequencies of an axis, in the order of ``fft``: (n,) array, cycles per box."""
    return np.fft.fftfreq(n, 1 / n)


def radius(shape: Sequence[int], *, half: bool = False) -> np.ndarray:
    """Length of each frequency of a grid, cycles per box, in the order of ``fftn``.

    Parameters
    ----------
    shape : tuple of int
        All axes alike in length: a square or a cube.
    half : bool
        The last axis holds only the frequencies of ``rfftn``.
    """
    axes = [frequencies(n) for n in shape]
    if half:
        axes[-1] = np.arange(shape[-1] // 2 + 1)
    return np.sqrt(sum(a**2 for a in np.meshgrid(*axes, indexing="ij", sparse=True)))


def crop_or_pad(array: ArrayLike, shape: Sequence[int]) -> np.ndarray:
    """Crop or zero-pad the last axes to ``shape``; index ``n // 2`` stays the origin."""
    array = np.asarray(array)
    lead = array.ndim - len(shape)
    source, target = [slice(None)] * lead, [slice(None)] * lead
    for n, m in zip(array.shape[lead:], shape, strict=True):
        low = n // 2 - m // 2  # index of the target's first element in the source
        source.append(slice(max(low, 0), min(low + m, n)))
        target.append(slice(max(-low, 0), max(-low, 0) + min(low + m, n) - max(low, 0)))
    out = np.zeros((*array.shape[:lead], *shape), array.dtype)
    out[tuple(target)] = array[tuple(source)]
    return out


def flipped(array: np.ndarray, axis: int) -> np.ndarray:
    """Turn an axis round about ``n // 2``; the first element of an even one goes to itself."""
    turned = np.flip(array, axis)
    return np.roll(turned, 1, axis) if array.shape[axis] % 2 == 0 else turned


def filtered(array: np.ndarray, ndim: int, gain: np.ndarray) -> np.ndarray:
    """Multiply the transform of the last ``ndim`` axes of a real array, as of ``rfftn``."""
    axes = tuple(range(-ndim, 0))
    shape = array.shape[-ndim:]
    spectrum = scipy.fft.rfftn(array, axes=axes, workers=WORKERS)
    spectrum *= gain
    real = scipy.fft.irfftn(spectrum, s=shape, axes=axes, workers=WORKERS)
    return np.ascontiguousarray(real, dtype=array.dtype)


def low_pass(array: ArrayLike, ndim: int, cutoff: float, *, edge: float = 0.0) -> np.ndarray:
    """Keep the frequencies below ``cutoff`` cycles per box on the last ``ndim`` axes.

    Parameters
    ----------
    array : (..., n, ..., n) array
    ndim : int
    cutoff : float, cycles per box
    edge : float
        Width of a raised-cosine edge that ends at ``cutoff``, as a fraction of it; 0: sharp.
    """
    array = np.asarray(array)
    k = radius(array.shape[-ndim:], half=True)
    start = cutoff * (1 - edge)
    if edge > 0:
        gain = 0.5 * (1 + np.cos(np.pi * np.clip((k - start) / (cutoff - start), 0, 1)))
    else:
        gain = (k < cutoff).astype(float)
    return filtered(array, ndim, gain.astype(array.dtype))


def resize(array: ArrayLike, size: int, ndim: int) -> np.ndarray:
    """Resample the last ``ndim`` axes, all equal, to ``size`` samples over the same extent.

    Cropping keeps only the ball of frequencies below the new Nyquist, so that nothing wraps round
    later; the values (not the sum) are kept, and so is the origin.

    Parameters
    ----------
    array : (..., n, ..., n) array
    size : int
    ndim : int

    Returns
    -------
    (..., size, ..., size) array
    """
    array = np.asarray(array)
    shape = array.shape[-ndim:]
    n = shape[0]
    if any(m != n for m in shape):
        raise InputError(f"the last {ndim} axes must be equal to be resized, got {shape}")
    if size == n:
        return array.copy()
    axes = tuple(range(-ndim, 0))
    spectrum = scipy.fft.fftshift(
        scipy.fft.fftn(scipy.fft.ifftshift(array, axes=axes), axes=axes, workers=WORKERS),
        axes=axes,
    )
    spectrum = crop_or_pad(spectrum, (size,) * ndim)
    keep = np.fft.fftshift(radius((size,) * ndim)) < min(n, size) / 2
    spectrum *= keep.astype(spectrum.real.dtype) * spectrum.real.dtype.type((size / n) ** ndim)
    real = scipy.fft.ifftn(
        scipy.fft.ifftshift(spectrum, axes=axes), axes=axes, workers=WORKERS
    ).real
    return np.ascontiguousarray(scipy.fft.fftshift(real, axes=axes), dtype=array.dtype)


def shift(images: ArrayLike, shifts_px: ArrayLike) -> Float[np.ndarray, "n y x"]:
    """Move each image by a sub-pixel amount, as a phase ramp (periodic at the borders).

    Parameters
    ----------
    images : (n, size, size) array
    shifts_px : (n, 2) array, pixels
        (x, y); a positive shift moves the content to larger indices.
    """
    images = np.asarray(images)
    if np.shape(shifts_px) != (len(images), 2) or not np.isfinite(shifts_px).all():
        raise InputError(
            f"shifts_px must be finite and have shape ({len(images)}, 2), got {np.shape(shifts_px)}"
        )
    size = images.shape[-1]
    kx = np.arange(size // 2 + 1)
    ky = frequencies(size)
    if size % 2 == 0:  # the Nyquist frequency has no sign: it cannot carry a phase
        ky = np.where(np.abs(ky) == size // 2, 0, ky)
        kx = np.where(kx == size // 2, 0, kx)
    shifts = np.asarray(shifts_px, dtype=np.float64)
    ramp_x = np.exp(-2j * np.pi / size * shifts[:, :1] * kx)[:, None, :]
    ramp_y = np.exp(-2j * np.pi / size * shifts[:, 1:] * ky)[:, :, None]
    return filtered(images, 2, (ramp_x * ramp_y).astype(np.result_type(images, np.complex64)))
