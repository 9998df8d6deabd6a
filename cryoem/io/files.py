"""Files: written atomically, checked by hash."""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, StorageError

__all__ = [
    "atomic",
    "check_writable",
    "existing",
    "read_npz",
    "same_run",
    "sha256",
    "sha256_of",
    "write_npz",
]

#: What a path may be given as.
PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def atomic(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block ends without error.

    What stood at ``path`` before stays whole until then, and for good if the block raises.

    Raises
    ------
    StorageError
        The folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays at the end: writers and readers choose the format by it.
        suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".cryoem-", suffix=suffix)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageError(
            f"{path}: not written ({error.strerror}); nothing there has changed"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


#: What the operating system says when a file may not grow, or not stand there.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EISDIR}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(path: PathLike) -> None:
    """Raise ``StorageError`` where no file can be put at ``path``; nothing is left there."""
    path = Path(path)
    try:
        if path.is_dir():
            raise StorageError(f"{path}: is a folder; wanted the name of a file")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
        path.exists()  # not where its name is longer than names may be
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error


def existing(path: PathLike) -> Path:
    """Return ``path`` as a ``Path`` to a file that exists, or raise ``InputError``."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return path


def read_npz(path: PathLike, what: str, *, needed: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Read all arrays of an ``.npz`` file by their names; nothing is unpickled.

    Parameters
    ----------
    path : path
    what : str
        What the file ought to be, for the message: ``"an estimator's file"``.
    needed : sequence of str
        Names that it must have.

    Raises
    ------
    InputError
        No such file, or ``PATH: not WHAT``.
    """
    path = existing(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # NumPy, zipfile, zlib and tokenize raise a dozen kinds
        raise InputError(f"{path}: not {what} ({error})") from error
    if missing := [name for name in needed if name not in arrays]:
        raise InputError(f"{path}: not {what} (it has no {', '.join(missing)})")
    return arrays


def write_npz(
    path: PathLike, state: Mapping[str, object], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write an ``.npz`` file that :func:`read_npz` reads, atomically.

    Parameters
    ----------
    path : path
    state : dict
        Kept as JSON, under the name ``state``.
    arrays : dict of arrays
        By their names.
    """
    named: dict[str, Any] = dict(arrays)  # to mypy any of them could be savez's own argument
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, state=np.array(json.dumps(state)), **named)


def same_run(
    folder: PathLike, before: Mapping[str, object], settings: Mapping[str, object]
) -> None:
    """Raise ``InputError`` where a folder holds what a run of other settings has done."""
    for name, value in settings.items():
        if before.get(name) != value:
            raise InputError(
                f"{folder}: the folder of a run with {name} {before.get(name)}, asked for {value}; "
                "name another folder or remove this one"
            )


def sha256(path: PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of(arrays: Iterable[np.ndarray]) -> str:
    """Hexadecimal SHA-256 of what arrays hold, one after another."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
