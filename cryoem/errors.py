"""The errors that this package raises on purpose."""

import numpy as np


class CryoemError(Exception):
    """Base of every error that the package raises on purpose."""


class InputError(CryoemError, ValueError):
    """An argument or a file is not what was wanted; the message says what was and what came."""


class UnusableImages(InputError):
    """Images show nothing: ``found`` says which of those that were read, by what is wrong."""

    def __init__(self, message: str, found: dict[str, np.ndarray] | None = None) -> None:
        super().__init__(message)
        self.found = found or {}


class MissingToolError(CryoemError, RuntimeError):
    """An optional tool (CUDA, ASTRA, ...) is not there; the message says what works without it."""


class DownloadError(CryoemError, OSError):
    """A file could not be fetched, or what came is not what was asked for."""


class StorageError(CryoemError, OSError):
    """A file could not be written; what stood there before is as it was."""
