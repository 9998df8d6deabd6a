"""From the images alone: orientations and a map without a model, and whether to believe them."""

from .annealing import Schedule
from .initial import AbInitio, Verdict, ab_initio
from .learning import Placed, learn, place
from .sorting import Classes, classify

__all__ = [
    "AbInitio",
    "Classes",
    "Placed",
    "Schedule",
    "Verdict",
    "ab_initio",
    "classify",
    "learn",
    "place",
]
