"""The command line: thin over the package, one command a step from particles to a map."""

import sys

from ..errors import InputError

try:
    from . import imaging, initial, judging, mapping, orienting, solving  # each adds its commands
    from .options import app
except InputError as error:  # what the environment says of threads is read by who imports
    sys.exit(f"cryoem: {error}")

__all__ = ["app", "imaging", "initial", "judging", "mapping", "orienting", "solving"]
