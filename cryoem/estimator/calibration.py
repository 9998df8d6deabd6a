"""How far off an estimator's orientations are to be expected: learned last, from fresh images."""

from __future__ import annotations

import copy
import math

import numpy as np
from jaxtyping import Float

from .. import simulation
from ..backend import keras
from ..simulation import TrainingImages
from ..symmetry import group
from .model import Estimator
from .networks import Tensor

__all__ = ["calibrate"]

#: How many are enough.
IMAGES = 20_480

#: The first step of the batches that are drawn: no training reaches it.
BEYOND = 2**31


def calibrate(
    estimator: Estimator, source: TrainingImages, *, images: int = IMAGES, seed: int = 0
) -> None:
    """Teach an estimator how far off its orientations are, in place; its features stay.

    Fresh images are oriented by their features, and the network's log variance is fitted to the
    likelihood of the angles by which they are off, those of a Gaussian rotation vector. The end of
    :func:`cryoem.estimator.fit`; of no effect on a network that predicts no variance.

    Parameters
    ----------
    estimator : Estimator
    source : TrainingImages
        Shifted images are centred by the shift network where there is one.
    images : int
    seed : int
        Other images than those of training with the same seed.
    """
    encoder, f = estimator.encoder, estimator.feature_dim
    if encoder.output_shape[1] == f:
        return
    seen, targets = _drawn(estimator, source, images, seed)
    hidden, last = encoder.get_layer("variance_hidden"), encoder.get_layer("variance")
    both = keras.Model(encoder.inputs, [encoder.outputs[0], hidden.input])
    out, level = both.predict(seen, batch_size=256, verbose=0)
    square = _angles(out[:, :f], targets, estimator.symmetry) ** 2
    last.set_weights([np.zeros_like(w) for w in last.get_weights()])
    inputs = keras.Input(level.shape[1:])
    variance = keras.Model(inputs, last(hidden(inputs)))  # the encoder's own last layers
    variance.compile(optimizer=keras.optimizers.Adam(3e-3), loss=_unlikeliness)
    variance.optimizer.build(variance.trainable_variables)  # else each step is traced twice
    variance.fit(level, square[:, None], batch_size=256, epochs=6, shuffle=False, verbose=0)


def _drawn(
    estimator: Estimator, source: TrainingImages, images: int, seed: int
) -> tuple[Float[np.ndarray, "n px px"], Float[np.ndarray, "n t"]]:
    """Fresh images as the encoder reads them in its last pass, and their targets."""
    source = copy.copy(source)
    if estimator.shift_network is None:  # as if images were centred: they are, in the last pass
        little = simulation.LITTLE * source.preprocessing.frame_px
        source.max_shift_px = min(source.max_shift_px, little)
    batches = [source.batch(seed, BEYOND + i, 512) for i in range(math.ceil(images / 512))]
    if estimator.shift_network is not None and source.max_shift_px:
        batches = [(estimator.centre(seen)[1], targets) for seen, targets in batches]
    seen, targets = (np.concatenate(part) for part in zip(*batches, strict=True))
    return seen, targets


def _angles(
    features: Float[np.ndarray, "n f"], targets: Float[np.ndarray, "n t"], symmetry: str
) -> Float[np.ndarray, " n"]:
    """By what angle the orientations are off that a linear map of the features gives, radians."""
    orbits = group(symmetry)
    phi = targets[:, : len(orbits.harmonics)]
    found = orbits.decode(features @ np.linalg.lstsq(features, phi, rcond=None)[0])
    return orbits.distance(found, orbits.decode(phi))


def _unlikeliness(
    square: Float[Tensor, "n 1"], log_variance: Float[Tensor, "n 1"]
) -> Float[Tensor, ""]:
    """Twice the negative log likelihood of squared lengths of Gaussian rotation vectors."""
    return keras.ops.mean(square * keras.ops.exp(-log_variance) + 3 * log_variance)
