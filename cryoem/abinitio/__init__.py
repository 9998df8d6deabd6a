"""From the images alone: orientations and a map without a model, and whether to believe them."""

from .annealing import Schedule
from .initial import AbInitio, Verdict, ab_initio

__all__ = ["AbInitio", "Schedule", "Verdict", "ab_initio"]
