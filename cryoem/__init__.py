"""Orientations of cryo-EM particles from learned distances between their projections.

The convention, written here once and used everywhere:

* Quaternions are ``(x, y, z, w)``, unit, as in SciPy and TensorFlow Graphics; ``q`` and ``-q`` are
  the same orientation.
* A density is an array ``[z, y, x]`` with a voxel size in angstrom; an image is ``[y, x]``. The
  origin of both is the element ``n // 2`` on every axis, for odd and even ``n`` alike.
* An orientation ``R`` maps detector coordinates to density coordinates, all vectors ``(x, y, z)``:
  ``P(x, y) = integral of V(R (x, y, z)) dz``.
* Consequently: turning an image in its plane by ``a`` gives ``R Rz(a)``; its x-mirror has
  ``R Ry(pi)``; turning the density by ``A`` turns every orientation into ``A R``; the mirror image
  of the density, ``V(-r)``, gives the same images at ``R Rz(pi)``.
* RELION's angles are ``R = Rz(rot) Ry(tilt) Rz(psi)``, in degrees.
* Angles are radians, except at file borders and where a name says degrees.
* SNR is (variance of the clean images) / (variance of the noise), over the whole frame, at the
  sampling at which the noise is added.

Public names come from this package itself, ``from cryoem import read_particles``, and are loaded
when they are first used; :data:`PUBLIC` lists them with a line each. The modules, from the lowest
to the highest, each of which imports from those before it:

* :mod:`~cryoem.errors`, :mod:`~cryoem.threads`, :mod:`~cryoem.fourier`;
* how particles are seen: :mod:`~cryoem.rotations`, :mod:`~cryoem.symmetry`,
  :mod:`~cryoem.distances`, :mod:`~cryoem.imaging`, :mod:`~cryoem.noise`;
* :mod:`~cryoem.half_sets`, and :mod:`~cryoem.particles`, the particle stack that every step takes
  and returns, and :mod:`~cryoem.io`, its files;
* what is seen: :mod:`~cryoem.density`, :mod:`~cryoem.structures` (atomic models),
  :mod:`~cryoem.projection`, :mod:`~cryoem.preprocessing`, :mod:`~cryoem.simulation`, and
  :mod:`~cryoem.surveying`, how a stack was imaged;
* :mod:`~cryoem.evaluation`, how good orientations are, and the physical limit;
* the first step, distances: :mod:`~cryoem.estimator`;
* the second, orientations: :mod:`~cryoem.recovery`;
* :mod:`~cryoem.matching`, the baseline, and :mod:`~cryoem.reconstruction`, the map;
* :mod:`~cryoem.maps`, which judges maps, and :mod:`~cryoem.refinement`, which brings poses to the
  limit;
* :mod:`~cryoem.abinitio`, orientations and a map from the images alone;
* :mod:`~cryoem.plots`, :mod:`~cryoem.report`, :mod:`~cryoem.demo`, and :mod:`~cryoem.cli`.

Only :mod:`~cryoem.estimator` and :mod:`cryoem.recovery.descent` import TensorFlow, by
:mod:`~cryoem.backend`.
"""

import importlib
from typing import Any

from .version import __version__

#: The public names: where each is defined, and what it is.
PUBLIC = {
    # particles and their files
    "ParticleStack": ("particles", "images with all that is known of each"),
    "read_particles": ("io.particles", "a stack from RELION's STAR or cryoSPARC's .cs"),
    "write_particles": ("io.particles", "a stack as RELION 3.1 STAR"),
    "survey": ("surveying", "contrast, noise, shifts and defocus of a stack"),
    # densities
    "Density": ("density", "a density on a grid"),
    "read_density": ("density", "a density from an MRC map"),
    "write_density": ("density", "a density as an MRC map"),
    "load_density": ("structures", "the density of an atomic model, by name, file or PDB id"),
    # imaging
    "project": ("projection", "projections of a density at many orientations"),
    "simulate": ("simulation", "a stack of simulated particles, with the truth"),
    # step 1: distances
    "Preprocessing": ("preprocessing", "what is done to an image before a network reads it"),
    "TrainingImages": ("simulation", "an endless source of fresh training images"),
    "Estimator": ("estimator", "the Siamese network with all that its use needs"),
    "train": ("estimator", "train an estimator"),
    "load_estimator": ("estimator", "an estimator that ships, or from a file"),
    # step 2: orientations
    "recover": ("recovery", "orientations from pairwise distances"),
    "descend": ("recovery.descent", "the same by the paper's gradient descent"),
    "orient": ("recovery", "a stack's orientations, by an estimator"),
    "match": ("matching", "a stack's orientations, by projection matching"),
    # from the images alone
    "ab_initio": ("abinitio", "orientations and a map without a model, with a verdict"),
    "classify": ("abinitio", "images of several particles, sorted by maps of their own"),
    # the map, and poses to the limit
    "reconstruct": ("reconstruction", "the density of an oriented stack"),
    "Search": ("refinement", "how orientations are sought about given ones"),
    "refine": ("refinement", "poses refined against a density"),
    "refine_halves": ("refinement", "poses refined half against half, no density needed"),
    "refine_against": ("refinement", "poses refined against a reference, tested for its bias"),
    "cross_check": ("refinement", "expected errors from the images' own half-maps"),
    "check_symmetry": ("refinement", "whether the images' own half-maps have a symmetry"),
    # how good it is
    "orientation_errors": ("evaluation", "errors of orientations, after alignment"),
    "cramer_rao": ("evaluation", "the physical limit of orientation errors"),
    "fsc": ("maps", "Fourier shell correlation"),
    "register": ("maps", "a map laid onto a reference"),
}

__all__ = ["PUBLIC", "__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{PUBLIC[name][0]}"), name)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
