"""Poses to the limit: against a density, half against half, or against a reference."""

from .check import check_symmetry, cross_check, expected_error
from .fit import RefinedStack, refine
from .halves import HalvesRefinement, refine_halves
from .reference import ReferenceRefinement, check_reference, in_frame_of, refine_against
from .search import Search

__all__ = [
    "HalvesRefinement",
    "ReferenceRefinement",
    "RefinedStack",
    "Search",
    "check_reference",
    "check_symmetry",
    "cross_check",
    "expected_error",
    "in_frame_of",
    "refine",
    "refine_against",
    "refine_halves",
]
