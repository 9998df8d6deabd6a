"""Measures that the tests share."""

from types import SimpleNamespace

import numpy as np

from cryoem import rotations
from cryoem.projection import Projector


def relative_error(found, wanted):
    return np.linalg.norm(np.ravel(found - wanted)) / np.linalg.norm(np.ravel(wanted))


def correlation(a, b):
    return np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]


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

    def look(self, images, *, ctf=None):
        return SimpleNamespace(features=self.embed(images), shifts_px=None, expected_error_rad=None)
