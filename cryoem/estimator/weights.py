"""An estimator's file: one ``.npz`` of arrays and a JSON text, nothing that could be executed.

Arrays of matrices are kept as 8-bit integers with a scale for each column, all else as float16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from ..errors import InputError
from ..io import files
from ..io.files import PathLike

__all__ = ["FORMAT_VERSION", "Json", "read", "write"]

#: What JSON can hold.
Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"

#: Written into every file; those of other versions are refused.
FORMAT_VERSION = 4


def write(
    path: PathLike,
    settings: Mapping[str, Json],
    weights: Mapping[str, Sequence[np.ndarray]],
) -> None:
    """Write settings and weights to one file, atomically.

    Parameters
    ----------
    path : path
    settings : dict
    weights : dict of sequences of arrays
        By the name of the network.
    """
    arrays: dict[str, Any] = {  # to mypy any of them could be savez's own argument
        f"{name}_{i:03d}{part}": values
        for name, network in weights.items()
        for i, weight in enumerate(network)
        for part, values in _packed(weight).items()
    }
    text = np.array(json.dumps({"format_version": FORMAT_VERSION, **settings}))
    with files.atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, settings=text, **arrays)


def read(path: PathLike) -> tuple[dict[str, Json], dict[str, list[np.ndarray]]]:
    """Read what :func:`write` wrote: (settings, weights by the name of the network).

    Raises
    ------
    InputError
        Not such a file, one of another version, or an array is missing.
    """
    what = "an estimator's file"
    arrays = files.read_npz(path, what, needed=["settings"])
    try:
        settings = json.loads(str(arrays.pop("settings")))
        version = settings.pop("format_version", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: not {what} ({error})") from error
    if version != FORMAT_VERSION:
        older = isinstance(version, int) and version < FORMAT_VERSION
        raise InputError(
            f"{path}: written in format {version}, this version of cryoem reads "
            f"{FORMAT_VERSION} alone{': train it again' if older else ''}"
        )
    weights: dict[str, list[np.ndarray]] = {}
    try:
        for name in sorted(name for name in arrays if not name.endswith("_scale")):
            network, _, _ = name.rpartition("_")
            weights.setdefault(network, []).append(_unpacked(name, arrays))
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: its weights are not whole ({error})") from error
    return settings, weights


def _packed(weight: np.ndarray) -> dict[str, np.ndarray]:
    """What a file keeps of an array of weights, by the end of its name."""
    if weight.ndim < 3 or weight.shape[-2] == 1:
        return {"": weight.astype(np.float16)}
    scale = np.maximum(np.abs(weight).max(axis=-2, keepdims=True) / 127, 1e-12)
    return {"": np.round(weight / scale).astype(np.int8), "_scale": scale.astype(np.float32)}


def _unpacked(name: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The float32 array whose parts :func:`_packed` gave."""
    values = arrays[name]
    if values.dtype == np.int8:
        values = values * arrays[f"{name}_scale"]
    return values.astype(np.float32)
