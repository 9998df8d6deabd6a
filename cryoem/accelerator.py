"""A GPU for ab initio and reconstruction, where one is asked for: chosen here alone.

With the environment variable ``CRYOEM_DEVICE`` at ``gpu`` arrays are CuPy's and NUFFTs cufinufft's,
else NumPy's and finufft's, by the same calls: of likelihoods, of back-projection and the conjugate
gradients after it, and of the search for how maps lie on each other. Networks go by Keras's own
rules: a GPU that its backend sees (``KERAS_BACKEND``) is used.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import scipy.fft

from . import threads
from .errors import InputError, MissingToolError

__all__ = [
    "VARIABLE",
    "arrays",
    "convolution",
    "gpu",
    "host",
    "map_coordinates",
    "nufft3d1",
    "nufft3d2",
    "sparse",
]

#: The environment variable that asks for it: cpu, the default, or gpu.
VARIABLE = "CRYOEM_DEVICE"
#: Frequencies that a core's cache holds.
IN_CACHE = 1 << 18


@cache
def gpu() -> bool:
    """Whether a GPU is asked for; it is there.

    Raises
    ------
    InputError
        The environment variable has a value of no meaning.
    MissingToolError
        It asks for a GPU, and none can be used.
    """
    asked = os.environ.get(VARIABLE, "").strip().lower()
    if asked not in ("", "cpu", "gpu"):
        raise InputError(f"the environment variable {VARIABLE} must be cpu or gpu, got {asked!r}")
    if asked != "gpu":
        return False
    why = "CuPy sees none"
    try:
        cupy = import_module("cupy")  # first: it loads the CUDA libraries of its wheel
        import_module("cufinufft")
        if cupy.cuda.is_available():
            return True
    except ImportError as error:
        why = f"{error} (pip install cupy-cuda12x cufinufft)"
    raise MissingToolError(f"{VARIABLE} asks for a GPU: {why}; without it all works on the CPU")


def arrays() -> Any:
    """NumPy, or CuPy."""
    return import_module("cupy") if gpu() else np


def sparse() -> Any:
    """SciPy's sparse matrices, or CuPy's."""
    return import_module("cupyx.scipy.sparse" if gpu() else "scipy.sparse")


def host(array: Any) -> np.ndarray:
    """An array in the computer's memory."""
    return import_module("cupy").asnumpy(array) if gpu() else np.asarray(array)


def nufft3d1(
    points: list[Any],
    values: Any,
    shape: tuple[int, int, int],
    *,
    alone: bool = False,
    **options: Any,
) -> Any:
    """Sum points' values into a cube of modes, on one thread, or all, or a GPU.

    ``alone``: nothing else runs beside it.
    """
    if gpu():
        return import_module("cufinufft").nufft3d1(*points, values, shape, **options)
    import finufft

    given = (*points, values, shape)
    if alone:
        return finufft.nufft3d1(*given, nthreads=threads.count(), showwarn=0, **options)
    return finufft.nufft3d1(*given, nthreads=1, showwarn=0, **options)


def nufft3d2(points: list[Any], values: Any, **options: Any) -> Any:
    """Evaluate a cube of modes at points, on one thread or a GPU."""
    if gpu():
        return import_module("cufinufft").nufft3d2(*points, values, **options)
    import finufft

    return finufft.nufft3d2(*points, values, nthreads=1, showwarn=0, **options)


def convolution(
    spectrum: np.ndarray, size: int, *, workers: int
) -> Callable[[np.ndarray], np.ndarray]:
    """What convolves cubes, by a spectrum of a box at least twice as wide.

    Parameters
    ----------
    spectrum : (e, e, e // 2 + 1) array of float32
        Real: half of the kernel's transform, whose origin is at its first voxel.
    size : int
        Edge of the cubes; in the box zeros lie about them.
    workers : int
        Threads that transform.

    Returns
    -------
    callable
        Of a (size, size, size) array of float32, to another one.
    """
    edge = len(spectrum)
    if gpu():
        cupy, fft = arrays(), import_module("cupyx.scipy.fft")
        there = cupy.asarray(spectrum)

        def on_device(values: np.ndarray) -> np.ndarray:
            padded = cupy.zeros((edge,) * 3, np.float32)
            padded[:size, :size, :size] = cupy.asarray(values)
            transformed = fft.rfftn(padded)
            transformed *= there
            return host(fft.irfftn(transformed, s=padded.shape)[:size, :size, :size])

        return on_device
    planes = np.ascontiguousarray(spectrum.transpose(2, 0, 1))
    rows = np.empty((edge // 2 + 1, size, size), np.complex64)
    each = map if workers == 1 else ThreadPoolExecutor(workers).map

    def convolved(values: np.ndarray) -> np.ndarray:
        # Few planes at once; lines of zeros are not transformed, nor those that are cut off.
        result = np.empty((size,) * 3, np.float32)

        def forth(some: slice) -> None:
            rows[:, some] = scipy.fft.rfft(values[some], edge, axis=2).transpose(2, 0, 1)

        def across(some: slice) -> None:
            wide = scipy.fft.fft(rows[some], edge, axis=2)
            plane = scipy.fft.fft(wide, edge, axis=1)
            plane *= planes[some]
            back = scipy.fft.ifft(plane, axis=1, overwrite_x=True)[:, :size]
            rows[some] = scipy.fft.ifft(back, axis=2)[:, :, :size]

        def back(some: slice) -> None:
            lines = rows[:, some].transpose(1, 2, 0)
            result[some] = scipy.fft.irfft(lines, edge, axis=2)[:, :, :size]

        for step, count, line in (
            (forth, size, size),
            (across, len(rows), edge),
            (back, size, size),
        ):
            at_once = max(1, min(IN_CACHE // (edge * line), -(-count // workers)))
            for _ in each(step, (slice(i, i + at_once) for i in range(0, count, at_once))):
                pass
        return result

    return convolved


def map_coordinates(array: Any, at: np.ndarray, *, order: int) -> np.ndarray:
    """Interpolate an array's spline, its coefficients given, at points in the computer's memory."""
    if gpu():
        theirs = import_module("cupyx.scipy.ndimage")
        at = arrays().asarray(at)
        return host(theirs.map_coordinates(array, at, order=order, prefilter=False))
    from scipy import ndimage  # not by all that imports this module

    return ndimage.map_coordinates(array, at, order=order, prefilter=False)
