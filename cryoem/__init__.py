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

The rooms, in the order of the method:

* what is seen: :mod:`~cryoem.structures` (atomic models), :mod:`~cryoem.density`;
* how it is seen: :mod:`~cryoem.rotations`, :mod:`~cryoem.symmetry`, :mod:`~cryoem.projection`,
  :mod:`~cryoem.imaging`, and :mod:`~cryoem.simulation`, which puts them together;
* the first step, distances: :mod:`~cryoem.distances`, :mod:`~cryoem.networks`,
  :mod:`~cryoem.estimator`;
* the second, orientations: :mod:`~cryoem.recovery`, :mod:`~cryoem.descent` (the paper's), and
  :mod:`~cryoem.frame`; :mod:`~cryoem.orient` goes from images to orientations, and
  :mod:`~cryoem.stream` does so for sets larger than memory or one machine;
* the map: :mod:`~cryoem.reconstruction`, :mod:`~cryoem.refinement`, which brings the orientations
  to the limit and alternates with it, and :mod:`~cryoem.maps`, which judges it;
* how good it all is: :mod:`~cryoem.evaluation`, :mod:`~cryoem.matching` (the baseline);
* real particles: :mod:`~cryoem.star` and :mod:`~cryoem.stacks` (their files),
  :mod:`~cryoem.survey` (how they were imaged), :mod:`~cryoem.cli` (the command line);
* :mod:`~cryoem.plots`, :mod:`~cryoem.demo`, :mod:`~cryoem.report`; below them all
  :mod:`~cryoem.fourier`, :mod:`~cryoem.files`, :mod:`~cryoem.errors`.

Only :mod:`~cryoem.networks`, :mod:`~cryoem.estimator` and :mod:`~cryoem.descent` import TensorFlow.
"""

__version__ = "0.1.0"
