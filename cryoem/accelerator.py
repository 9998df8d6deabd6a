"""A GPU for ab initio and reconstruction, where one is asked for: chosen here alone.

With the environment variable ``CRYOEM_DEVICE`` at ``gpu`` arrays are CuPy's and NUFFTs cufinufft's,
else NumPy's and finufft's, by the same calls: of likelihoods, of back-projection and the conjugate
gradients after it, and of the search for how maps lie on each other. Networks go by Keras's own
rules: a GPU that its backend sees (``KERAS_BACKEND``) is used.
"""

import os
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
    "gpu",
    "host",
    "irfftn",
    "map_coordinates",
    "nufft3d1",
    "nufft3d2",
    "rfftn",
    "sparse",
]

#: The environment variable that asks for it: cpu, the default, or gpu.
VARIABLE = "CRYOEM_DEVICE"


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


def rfftn(array: Any, *, workers: int) -> Any:
    """Transform a real array, which may be overwritten."""
    if gpu():
        return import_module("cupyx.scipy.fft").rfftn(array)
    return scipy.fft.rfftn(array, workers=workers, overwrite_x=True)


def irfftn(array: Any, shape: tuple[int, ...], *, workers: int) -> Any:
    """Transform back to a real array of some shape; what is transformed may be overwritten."""
    if gpu():
        return import_module("cupyx.scipy.fft").irfftn(array, s=shape)
    return scipy.fft.irfftn(array, s=shape, workers=workers, overwrite_x=True)


def map_coordinates(array: Any, at: np.ndarray, *, order: int) -> np.ndarray:
    """Interpolate an array's spline, its coefficients given, at points in the computer's memory."""
    if gpu():
        theirs = import_module("cupyx.scipy.ndimage")
        at = arrays().asarray(at)
        return host(theirs.map_coordinates(array, at, order=order, prefilter=False))
    from scipy import ndimage  # not by all that imports this module

    return ndimage.map_coordinates(array, at, order=order, prefilter=False)
