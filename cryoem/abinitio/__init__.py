"""From the images alone: orientations and a map without a model, and whether to believe them."""

from .annealing import Schedule
from .initial import AbInitio, Verdict, ab_initio
from .sorting import Classes, classify

__all__ = ["AbInitio", "Classes", "Schedule", "Verdict", "ab_initio", "classify"]
