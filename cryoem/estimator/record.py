"""The record of a training run: its history, and where it is to be continued, its checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from ..backend import keras
from ..errors import InputError
from ..io import files
from ..io.files import PathLike
from .weights import Json

__all__ = ["History", "Record"]

#: ``loss``, ``mae_rad`` and ``seconds``, a list with one value an epoch.
History: TypeAlias = dict[str, list[float]]


class Record(keras.callbacks.Callback):
    """Keeps a run's history, and in a folder weights, optimizer and history after every epoch.

    Parameters
    ----------
    folder : path or None
        None: nothing is written.
    settings : dict
        What a checkpoint must have been made with; JSON.

    Attributes
    ----------
    history : dict
    """

    def __init__(self, folder: PathLike | None, settings: Mapping[str, Json]) -> None:
        super().__init__()
        self.path = None if folder is None else Path(folder) / "checkpoint.npz"
        self.settings = dict(settings)
        self.history: History = {"loss": [], "mae_rad": [], "seconds": []}

    def restore(self, encoder: keras.Model) -> int:
        """Set weights, optimizer and history where a run is found; return the epochs done."""
        if self.path is None or not self.path.exists():
            return 0
        what = "a whole checkpoint"
        arrays = files.read_npz(self.path, what, needed=["state"])
        try:
            state = json.loads(str(arrays["state"]))
            if state["settings"] == json.loads(json.dumps(self.settings)):
                for name, variable in _variables(encoder).items():
                    variable.assign(arrays[name])
                self.history = state["history"]
                return state["epochs"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path}: not {what} ({error})") from error
        raise InputError(
            f"{self.path}: made with {state['settings']}, asked for {self.settings}; "
            "name another folder or remove this one"
        )

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Add the seconds to what is known of the epoch, and keep all of it."""
        assert logs is not None
        logs["seconds"] = time.perf_counter() - self._start
        for key, values in self.history.items():
            values.append(float(logs[key]))
        if self.path is None:
            return
        arrays = {
            name: keras.ops.convert_to_numpy(variable)
            for name, variable in _variables(self.model).items()
        }
        state = {"settings": self.settings, "epochs": epoch + 1, "history": self.history}
        files.write_npz(self.path, state, arrays)


def _variables(encoder: keras.Model) -> dict[str, keras.Variable]:
    """All that a run must find again, by its name in the checkpoint."""
    parts = {"model": encoder.weights, "optimizer": encoder.optimizer.variables}
    return {f"{part}_{i}": v for part, found in parts.items() for i, v in enumerate(found)}
