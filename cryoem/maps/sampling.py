"""How evenly views sample the directions of Fourier space."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from .. import rotations
from ..errors import InputError
from ..symmetry import group

__all__ = ["Coverage", "coverage"]


#: Evenness below which the resolution of a map is no longer one figure.
UNEVEN = 0.4


@dataclass(frozen=True)
class Coverage:
    """How evenly views sample the directions of Fourier space.

    Attributes
    ----------
    evenness : float
        Harmonic over arithmetic mean of the sampling (the sampling compensation factor): 1 where
        all directions are seen alike; the map's SSNR falls by it.
    unseen : float
        The share of directions that no view sees.
    anisotropy : float
        Largest over smallest of the mean squared components of the viewing directions along their
        principal axes: 1 where views come from everywhere alike.
    """

    evenness: float
    unseen: float
    anisotropy: float

    @property
    def uneven(self) -> bool:
        """Whether the map is likely to be smeared along some directions."""
        return self.evenness < UNEVEN


def _half_sphere(n: int) -> Float[np.ndarray, "n 3"]:
    """Directions of the half sphere, evenly: a Fibonacci spiral."""
    i = np.arange(n) + 0.5
    z, angle = i / n, np.pi * (1 + np.sqrt(5)) * i
    r = np.sqrt(1 - z**2)
    return np.stack([r * np.cos(angle), r * np.sin(angle), z], axis=1)


def coverage(
    quaternions: Float[np.ndarray, "n 4"], *, symmetry: str = "C1", half_thickness: float = 0.1
) -> Coverage:
    """How evenly views cover the directions.

    A view from ``d`` sees the Fourier directions ``u`` with ``|<d, u>| < half_thickness``.

    Parameters
    ----------
    quaternions : (n, 4) array, unit, xyzw
    symmetry : str
        Point group, in the standard setting: a view is one from every equivalent direction.
    half_thickness : float
        Sine of half the angle that a slice is thick.

    Returns
    -------
    Coverage

    References
    ----------
    Baldwin and Lyumkis, Prog. Biophys. Mol. Biol. 150 (2020).
    """
    q, elements = rotations.check(quaternions), group(symmetry).elements
    if len(q) == 0:
        raise InputError("no orientations, no coverage")
    directions = _half_sphere(1000)
    seen, moment = np.zeros(len(directions)), np.zeros((3, 3))
    for copy in elements:
        views = rotations.view_directions(rotations.multiply(copy, q)).reshape(-1, 3)
        moment += views.T @ views / len(q)
        for part in np.array_split(views, -(-len(views) // 10_000)):
            seen += np.sum(np.abs(directions @ part.T) < half_thickness, axis=1)
    # Harmonic over arithmetic mean; unseen counts as seen once.
    evenness = 1 / (np.mean(1 / np.maximum(seen, 1)) * seen.mean()) if seen.any() else 0
    axes = np.linalg.eigvalsh(moment / len(elements))
    return Coverage(
        evenness=float(evenness),
        unseen=float(np.mean(seen == 0)),
        anisotropy=float(axes[-1] / max(axes[0], 1e-12)),
    )
