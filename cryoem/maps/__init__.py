"""Judging a map: shell correlation, half-maps, masks, coverage, registration, sharpening."""

from .axes import Axes, find_axes, has_symmetry, symmetry_of
from .bias import ReferenceBias, reference_bias
from .correlation import (
    Fsc,
    HalfMapFsc,
    HalfMaps,
    Resolution,
    fsc,
    half_map_fsc,
    write_fsc,
)
from .masks import soft_mask
from .registration import Registration, mirrored, register, turned
from .sampling import Coverage, coverage
from .sharpening import Sharpened, sharpened
from .shells import filtered

__all__ = [
    "Axes",
    "Coverage",
    "Fsc",
    "HalfMapFsc",
    "HalfMaps",
    "ReferenceBias",
    "Registration",
    "Resolution",
    "Sharpened",
    "coverage",
    "filtered",
    "find_axes",
    "fsc",
    "half_map_fsc",
    "has_symmetry",
    "mirrored",
    "reference_bias",
    "register",
    "sharpened",
    "soft_mask",
    "symmetry_of",
    "turned",
    "write_fsc",
]
