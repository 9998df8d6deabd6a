"""Measures that the tests share."""

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import numpy as np

from cryoem import distances, imaging, maps, rotations
from cryoem.abinitio import Schedule
from cryoem.density import Density
from cryoem.projection import Projector, project
from cryoem.symmetry import group

#: Few rounds, as many as particles that are seen well need.
QUICK = Schedule(rounds=24, images=(100, 400), orientations=(500, 2500), finest_angstrom=14.0)


def relative_error(found, wanted):
    return np.linalg.norm(np.ravel(found - wanted)) / np.linalg.norm(np.ravel(wanted))


def correlation(a, b):
    return np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]


def made_symmetric(density, name):
    """The mean of a density turned by the elements of a group."""
    turned = [maps.turned(density, g).values for g in group(name).elements]
    return Density(np.mean(turned, axis=0), density.voxel_size_angstrom)


def packed(q):
    """``vec(q q^T)``: features that hold an orientation exactly."""
    return (q[:, :, None] * q[:, None, :]).reshape(len(q), 16)


def gauss_newton(images, density, q, steps, *, delta=1e-2):
    """Least-squares orientations of images of a known density, from a start near them."""
    projector = Projector(density)
    for _ in range(steps):
        slopes = []
        for axis in np.eye(3):
            w = np.tile(delta * axis, (len(q), 1))
            ahead, behind = (projector.project(rotations.perturb(q, s * w)) for s in (1, -1))
            slopes.append(((ahead - behind) / (2 * delta)).reshape(len(q), -1))
        g = np.stack(slopes, axis=1).astype(float)
        off = (images - projector.project(q)).reshape(len(q), -1)
        step = np.linalg.solve(g @ g.transpose(0, 2, 1), (g @ off[..., None]))[..., 0]
        longest = np.linalg.norm(step, axis=1, keepdims=True)
        q = rotations.perturb(q, step * np.minimum(1, 0.15 / np.maximum(longest, 1e-12)))
    return q


class Sees:
    """Stands in for an estimator that says no more of an image than its features."""

    head = "exact"
    symmetry = "C1"
    passes = 1
    centres_images = False
    fingerprint = "a stand-in"

    def reading(self, box_px, pixel_size_angstrom):
        return self

    def embed(self, images, *, ctf=None):
        raise NotImplementedError

    def predict(self, images, *, ctf=None):
        features = self.embed(images, ctf=ctf)
        return SimpleNamespace(features=features, shifts_px=None, expected_error_rad=None)

    def distances(self, features, others):
        return distances.from_features(features, others, self.head)


@dataclass(frozen=True)
class Lookup(Sees):
    """Finds the most alike of some projections, and has its features exactly."""

    density: Density
    references: int = 1500
    passes: int = 1

    @property
    def fingerprint(self):
        return f"{self.references} references"

    @cached_property
    def known(self):
        return rotations.grid(self.references)

    @cached_property
    def table(self):
        return self.prepared(project(self.density, self.known))

    @staticmethod
    def prepared(images):
        return imaging.normalise(imaging.check_images(images)).reshape(len(images), -1)

    def embed(self, images, *, ctf=None):
        if ctf is not None:
            images = imaging.flip_phases(images, ctf)
        best = np.argmax(self.prepared(images) @ self.table.T, axis=1)
        return packed(self.known[best]).astype(np.float32)
