"""Keras, and TensorFlow under it: imported here and nowhere else, quietly.

TensorFlow's core writes to the terminal as it is imported and as it starts. What it writes later
obeys ``TF_CPP_MIN_LOG_LEVEL``, which becomes 2 (errors alone) unless it was set; what it writes
during the import does not, and is made to here. 0 shows everything. oneDNN, which TensorFlow turns
on by itself on some CPUs alone, is on unless ``TF_ENABLE_ONEDNN_OPTS`` is 0: without it training
takes 1.7 times as long.

``keras`` runs on the backend that ``KERAS_BACKEND`` names; ``tf`` is TensorFlow, imported when it
is first asked for if Keras runs on another. Its threads are those of :mod:`cryoem.threads`.
"""

import contextlib
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import threads
from .errors import MissingToolError

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["keras", "tf"]

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

#: How a record of TensorFlow's core begins: severity, month and day, time, thread, file and line.
_RECORD = re.compile(rb"([IWEF])\d{4} [\d:.]+ +\d+ \S+:\d+\] ")
_HEADER = b"WARNING: All log messages before absl::InitializeLog() is called"


def _wanted(line: bytes, level: int) -> bool:
    """Whether a line is to be shown: no record of TensorFlow's core, or one of this level."""
    record = _RECORD.match(line)
    if record:
        return b"IWEF".index(record[1]) >= level
    return not line.startswith(_HEADER)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what is written to file descriptor 2, then show what is wanted.

    All of it, if the block raises.
    """
    level = os.environ["TF_CPP_MIN_LOG_LEVEL"]
    if level not in ("1", "2", "3") or sys.__stderr__ is None:  # no terminal, or all of it
        yield
        return
    terminal = os.dup(2)
    wanted = int(level)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            wanted = 0
            raise
        finally:
            sys.__stderr__.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            held.seek(0)
            lines = [line for line in held if wanted == 0 or _wanted(line, wanted)]
            with open(2, "wb", closefd=False) as stderr:
                stderr.writelines(lines)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    try:
        with _quiet():
            yield
    except ModuleNotFoundError as error:
        raise MissingToolError(
            f"networks and gradient descent need {error.name}, which is not installed: "
            "pip install 'cryoem[tensorflow]'. Everything else works without it"
        ) from error


def _import_tensorflow() -> Any:
    """TensorFlow, with as many threads as everything else unless it was told a number."""
    with _importing():
        import tensorflow
    config = tensorflow.config.threading
    try:
        if not config.get_intra_op_parallelism_threads():
            config.set_intra_op_parallelism_threads(threads.count())
        if not config.get_inter_op_parallelism_threads():
            config.set_inter_op_parallelism_threads(threads.count())
    except RuntimeError:  # it has started, with a thread a CPU
        if threads.VARIABLE in os.environ:
            warnings.warn(
                f"TensorFlow had started before cryoem: {threads.VARIABLE} does not hold for it",
                stacklevel=2,
            )
    return tensorflow


def __getattr__(name: str) -> Any:
    """Import ``tf`` where Keras did not."""
    if name != "tf":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["tf"] = _import_tensorflow()
    return globals()["tf"]


with _importing():
    import keras
if keras.backend.backend() == "tensorflow":
    globals()["tf"] = _import_tensorflow()
