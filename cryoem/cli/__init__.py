"""The command line: thin over the package, one command a step from particles to a map."""

from . import imaging, initial, judging, mapping, orienting, solving  # each adds its commands
from .options import app

__all__ = ["app", "imaging", "initial", "judging", "mapping", "orienting", "solving"]
