"""A GPU for the likelihoods of ab initio, where one is asked for: chosen here alone.

With the environment variable ``CRYOEM_DEVICE`` at ``gpu`` arrays are CuPy's and NUFFTs cufinufft's,
else NumPy's and finufft's, by the same calls. Networks go by Keras's own rules: a GPU that its
backend sees (``KERAS_BACKEND``) is used.
"""

import os
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from .errors import InputError, MissingToolError

__all__ = ["VARIABLE", "arrays", "gpu", "host", "nufft3d1", "nufft3d2", "sparse"]

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


def nufft3d1(points: list[Any], values: Any, shape: tuple[int, int, int], **options: Any) -> Any:
    """Sum points' values into a cube of modes, on one thread or a GPU."""
    if gpu():
        return import_module("cufinufft").nufft3d1(*points, values, shape, **options)
    import finufft

    return finufft.nufft3d1(*points, values, shape, nthreads=1, showwarn=0, **options)


def nufft3d2(points: list[Any], values: Any, **options: Any) -> Any:
    """Evaluate a cube of modes at points, on one thread or a GPU."""
    if gpu():
        return import_module("cufinufft").nufft3d2(*points, values, **options)
    import finufft

    return finufft.nufft3d2(*points, values, nthreads=1, showwarn=0, **options)
