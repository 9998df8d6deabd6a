"""The encoders: Keras 3 on any backend, images in, features out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from ..backend import keras
from ..errors import InputError
from ..symmetry import Group, group

__all__ = ["ARCHITECTURES", "Tensor", "build"]

layers, ops = keras.layers, keras.ops

#: Of each layer of the steerable network: harmonics that it reads, angles, pairs of channels.
STEERABLE = (0, 72, 256), (12, 32, 128), (10, 24, 128), (8, 20, 128), (8, 20, 128)

#: A tensor of Keras' backend.
Tensor: TypeAlias = keras.KerasTensor


def paper(
    image: Float[Tensor, "n px px"], feature_dim: int, symmetry: Group, dtype: keras.DTypePolicy
) -> tuple[Float[Tensor, "n _"], ...]:
    """Seven times convolution, ReLU and 2 x 2 max-pooling; 4,551,936 weights at 512 features.

    Banjac et al., arXiv 2104.06237, figure 3. ``feature_dim`` other than 512 adds a linear layer.
    """
    x = layers.Reshape((*image.shape[1:], 1))(image)
    for filters, kernel in [(32, 7), (64, 5), (128, 3), (256, 3), (256, 3), (512, 3), (512, 3)]:
        x = layers.Conv2D(filters, kernel, padding="same", activation="relu", dtype=dtype)(x)
        x = layers.MaxPooling2D(padding="same", dtype=dtype)(x)
    x = layers.GlobalAveragePooling2D(dtype="float32")(x)
    return (x if feature_dim == 512 else layers.Dense(feature_dim, dtype="float32")(x),)


def resnet(
    image: Float[Tensor, "n px px"], feature_dim: int, symmetry: Group, dtype: keras.DTypePolicy
) -> tuple[Float[Tensor, "n _"], ...]:
    """A residual network that keeps where things are: the last map is flattened, not averaged.

    No batch normalisation: branches start at zero instead, so that a feature never depends on the
    other images of its batch, and half precision stays fast on CPUs.
    """

    def convolve(
        x: Tensor, filters: int, kernel: int = 3, strides: int = 1, **options: object
    ) -> Tensor:
        return layers.Conv2D(filters, kernel, strides, padding="same", dtype=dtype, **options)(x)

    x = layers.Reshape((*image.shape[1:], 1))(image)
    x = convolve(x, 32, kernel=5, strides=2, activation="relu")
    for filters, blocks, first_strides in [(64, 1, 1), (128, 1, 2), (256, 2, 2)]:
        for strides in [first_strides] + [1] * (blocks - 1):
            y = convolve(x, filters, strides=strides, activation="relu")
            y = convolve(y, filters, kernel_initializer="zeros")
            if x.shape[-1] != filters or strides != 1:
                x = convolve(x, filters, kernel=1, strides=strides)
            x = layers.Activation("relu", dtype=dtype)(layers.Add(dtype=dtype)([x, y]))
    x = convolve(x, 64, kernel=1, activation="relu")
    x = layers.Flatten(dtype=dtype)(x)
    x = layers.Dense(256, activation="relu", dtype=dtype)(x)
    return (layers.Dense(feature_dim, dtype="float32")(x),)


# --------------------------------------------------------------------------------------
# The steerable network


def _interpolation(positions: np.ndarray, size: int) -> np.ndarray:
    """Rows that read a band-limited signal of ``size`` samples at positions from its origin."""
    k = np.arange(-(size - 1) // 2 if size % 2 else -size // 2 + 1, (size + 1) // 2)
    away = positions[:, None] - (np.arange(size) - size // 2)
    return np.cos(2 * np.pi * away[:, :, None] * k / size).sum(axis=-1) / size


class _Rings(keras.layers.Layer):
    """Images to angular harmonics on rings: (n, size, size) to (n, harmonics, 2 rings).

    Coefficients of ``exp(i m t)`` with the angle t from +y, so that the mirror in x conjugates
    them; real parts, then imaginary ones; times the root of the radius, which keeps white noise
    white.
    """

    def __init__(self, size: int, harmonics: int, **options: object) -> None:
        super().__init__(**options)
        rings = size // 2
        radius = size / 2 - 1
        self.harmonics, self.rings = harmonics, rings
        samples = 4 * int(np.ceil((np.pi * radius + harmonics) / 2))
        angle = 2 * np.pi * np.arange(samples) / samples
        wave = np.exp(-1j * np.outer(np.arange(harmonics), angle)) / samples
        table = np.empty((size * size, harmonics, rings), complex)
        for ring, r in enumerate((np.arange(rings) + 0.5) * radius / rings):
            rows = _interpolation(r * np.cos(angle), size)
            columns = _interpolation(-r * np.sin(angle), size)
            pixels = (rows[:, :, None] * columns[:, None, :]).reshape(samples, -1)
            table[:, :, ring] = np.sqrt(r) * (wave @ pixels).T
        parts = np.concatenate([table.real, table.imag], axis=2)
        self.table = parts.reshape(size * size, -1).astype(np.float32)

    def call(self, images: Float[Tensor, "n size size"]) -> Float[Tensor, "n m c"]:
        flat = ops.reshape(images, (-1, images.shape[1] * images.shape[2]))
        out = ops.matmul(flat, ops.convert_to_tensor(self.table, flat.dtype))
        return ops.reshape(out, (-1, self.harmonics, 2 * self.rings))


class _ToAngles(keras.layers.Layer):
    """Harmonics (n, m, 2 channels) to values at ``angles`` angles, (n, angles, channels)."""

    def __init__(self, angles: int, **options: object) -> None:
        super().__init__(**options)
        self.angles = angles

    def build(self, shape: tuple[int, ...]) -> None:
        m = np.arange(shape[1])
        phase = np.outer(2 * np.pi * np.arange(self.angles) / self.angles, m)
        scale = np.where(m == 0, 1.0, 2.0) / np.sqrt(2 * shape[1])
        parts = np.concatenate([np.cos(phase) * scale, -np.sin(phase) * scale], axis=1)
        self.table = parts.astype(np.float32)

    def call(self, x: Float[Tensor, "n m c"]) -> Float[Tensor, "n angles half"]:
        half = x.shape[2] // 2
        table = ops.convert_to_tensor(self.table, x.dtype)
        return ops.matmul(table, ops.concatenate([x[:, :, :half], x[:, :, half:]], axis=1))


class _ToHarmonics(keras.layers.Layer):
    """Values at angles (n, angles, channels) to harmonics 0 ... m - 1, (n, m, 2 channels)."""

    def __init__(self, harmonics: int, **options: object) -> None:
        super().__init__(**options)
        self.harmonics = harmonics

    def build(self, shape: tuple[int, ...]) -> None:
        phase = np.outer(np.arange(self.harmonics), 2 * np.pi * np.arange(shape[1]) / shape[1])
        parts = np.concatenate([np.cos(phase), -np.sin(phase)]) / np.sqrt(shape[1])
        self.table = parts.astype(np.float32)

    def call(self, x: Float[Tensor, "n angles half"]) -> Float[Tensor, "n m c"]:
        y = ops.matmul(ops.convert_to_tensor(self.table, x.dtype), x)
        return ops.concatenate([y[:, : self.harmonics], y[:, self.harmonics :]], axis=2)


class _Correlate(keras.layers.Layer):
    """One complex matrix a harmonic: correlation with learned templates at every in-plane angle.

    Channels come in pairs (a, a') that the mirror in x swaps and conjugates. So do the templates:
    ``b = A a + B a'`` and ``b' = conj(A) a' + conj(B) a``; of an image, which is its own pair,
    ``b = A x`` and ``b' = conj(A) x``.
    """

    def __init__(self, pairs: int, *, image: bool, **options: object) -> None:
        super().__init__(**options)
        self.pairs, self.image = pairs, image

    def build(self, shape: tuple[int, ...]) -> None:
        channels = shape[2] // 2
        inputs = channels if self.image else channels // 2
        self.matrices = self.add_weight(
            shape=(2 if self.image else 4, shape[1], inputs, self.pairs),
            initializer=keras.initializers.RandomNormal(stddev=channels**-0.5),
            name="matrices",
        )

    def call(self, x: Float[Tensor, "n m c"]) -> Float[Tensor, "n m out"]:
        w = ops.cast(self.matrices, x.dtype)
        # Columns: real parts of b and b', then imaginary ones; rows: the same of a and a'.
        if self.image:
            blocks = [(w[0], w[0], w[1], -w[1]), (-w[1], w[1], w[0], w[0])]
        else:
            blocks = [
                (w[0], w[2], w[1], -w[3]),
                (w[2], w[0], w[3], -w[1]),
                (-w[1], w[3], w[0], w[2]),
                (-w[3], w[1], w[2], w[0]),
            ]
        full = ops.concatenate([ops.concatenate(row, axis=-1) for row in blocks], axis=1)
        return ops.transpose(ops.matmul(ops.transpose(x, (1, 0, 2)), full), (1, 0, 2))


class _PairBias(keras.layers.Layer):
    """The same bias for both of a pair."""

    def build(self, shape: tuple[int, ...]) -> None:
        self.bias = self.add_weight(shape=(shape[-1] // 2,), initializer="zeros", name="bias")

    def call(self, x: Float[Tensor, "n angles c"]) -> Float[Tensor, "n angles c"]:
        return x + ops.cast(ops.concatenate([self.bias, self.bias]), x.dtype)


class _Readout(keras.layers.Layer):
    """Harmonics to features that turn and mirror as those of orientations do.

    ``even`` and ``odd`` numbers that stand still under in-plane rotation, and ``turning[k]``
    complex ones that turn by ``k + 1`` times its angle.
    """

    def __init__(self, even: int, odd: int, turning: list[int], **options: object) -> None:
        super().__init__(**options)
        self.even, self.odd, self.turning = even, odd, turning

    def build(self, shape: tuple[int, ...]) -> None:
        pairs = shape[2] // 4
        start = keras.initializers.RandomNormal(stddev=(2 * pairs) ** -0.5)
        if self.even:
            self.w_even = self.add_weight(shape=(pairs, self.even), initializer=start, name="even")
            self.bias = self.add_weight(shape=(self.even,), initializer="zeros", name="bias")
        if self.odd:
            self.w_odd = self.add_weight(shape=(pairs, self.odd), initializer=start, name="odd")
        self.w_turning = [
            self.add_weight(shape=(2, pairs, count), initializer=start, name=f"turning_{k + 1}")
            for k, count in enumerate(self.turning)
        ]

    def call(self, x: Float[Tensor, "n m c"]) -> Float[Tensor, "n f"]:
        a, a_mirrored, b, b_mirrored = ops.split(x, 4, axis=2)
        out = []
        if self.even:
            out.append(ops.matmul(a[:, 0] + a_mirrored[:, 0], self.w_even) + self.bias)
        if self.odd:
            out.append(ops.matmul(a[:, 0] - a_mirrored[:, 0], self.w_odd))
        for m, weights in enumerate(self.w_turning, start=1):
            real, imaginary = weights[0], weights[1]
            even, odd = a[:, m] + a_mirrored[:, m], b[:, m] - b_mirrored[:, m]
            out.append(ops.matmul(even, real) - ops.matmul(odd, imaginary))
            even, odd = b[:, m] + b_mirrored[:, m], a[:, m] - a_mirrored[:, m]
            out.append(ops.matmul(even, real) + ops.matmul(odd, imaginary))
        return ops.concatenate(out, axis=1)


def steerable(
    image: Float[Tensor, "n px px"], feature_dim: int, symmetry: Group, dtype: keras.DTypePolicy
) -> tuple[Float[Tensor, "n _"], ...]:
    """A network that knows what an in-plane rotation and a mirror do to an orientation.

    On rings about the image's centre a rotation is a shift of the angle, so that matrices between
    harmonics (correlation with learned templates at all angles at once) and functions of the
    values at each angle commute with it; pairs of channels make them commute with the mirror. Only
    the views of half a sphere are left to learn. The features turn and mirror exactly as the
    group's do (:mod:`cryoem.symmetry`), with two more of each kind than it has; ``feature_dim``
    has no say. Two more outputs: the particle's shift (x, y), and the log variance of its
    orientation.
    """
    degrees = [l for l, _, _ in symmetry.blocks]
    highest = max(degrees)
    x = _Rings(image.shape[1], min(36, image.shape[1] - 2), dtype=dtype)(image)
    h = x
    for layer, (harmonics, angles, pairs) in enumerate(STEERABLE):
        if layer:
            x = _ToHarmonics(max(harmonics, highest + 1), dtype=dtype)(h)
        x = _Correlate(pairs, image=layer == 0, dtype=dtype)(x)
        x = _ToAngles(max(angles, 2 * highest + 4), dtype=dtype)(x)
        h = layers.Activation("relu", dtype=dtype)(_PairBias(dtype=dtype)(x))
    last = layers.Activation("linear", dtype="float32")(
        _ToHarmonics(max(2, highest + 1), dtype=dtype)(h)
    )
    turning = [2 + sum(l >= m for l in degrees) for m in range(1, highest + 1)]
    odd = sum(l % 2 for l in degrees)
    features = _Readout(3 + len(degrees) - odd, 2 + odd, turning, dtype="float32")(last)
    # The mirror takes (x, y) to (-x, y), and the angle is from +y: y is the real part.
    shift = keras.ops.flip(_Readout(0, 0, [1], dtype="float32")(last), axis=1)
    # How far off depends on the image, not on its angle.
    quarter = last.shape[2] // 4
    level = last[:, 0, :quarter] + last[:, 0, quarter : 2 * quarter]
    power = ops.sqrt(ops.sum(last[:, 1] ** 2, axis=1, keepdims=True) + 1e-6)
    x = ops.log1p(ops.concatenate([level, power], axis=1))
    x = layers.Dense(64, activation="relu", dtype="float32", name="variance_hidden")(x)
    variance = layers.Dense(1, kernel_initializer="zeros", dtype="float32", name="variance")(x)
    return features, shift, variance


#: The named choices of :func:`build`.
ARCHITECTURES: dict[
    str,
    Callable[[Tensor, int, Group, keras.DTypePolicy], tuple[Tensor, ...]],
] = {"steerable": steerable, "resnet": resnet, "paper": paper}


def build(
    architecture: str,
    crop_px: int,
    feature_dim: int,
    *,
    normalise: bool,
    symmetry: str = "C1",
    precision: str = "float32",
) -> tuple[keras.Model, int]:
    """Build an encoder.

    Parameters
    ----------
    architecture : {'steerable', 'resnet', 'paper'}
    crop_px : int
        Edge of the images that it reads.
    feature_dim : int
        Of ``resnet`` and ``paper``; a steerable network's follows from the symmetry.
    normalise : bool
        Bring features to unit length (all heads but the Euclidean).
    symmetry : str
        The particle's point group.
    precision : str
        ``"mixed_bfloat16"`` trains about twice as fast on CPUs with AVX512-BF16.

    Returns
    -------
    encoder : keras.Model
        From (n, crop_px, crop_px) to (n, feature_dim), or to (n, feature_dim + 3) where the
        network also predicts the particle's shift (x, y), in pixels of what it reads, and the
        log variance of its orientation, radians squared an axis.
    feature_dim : int
    """
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}"
        )
    image = keras.Input((crop_px, crop_px), name="image")
    features, *more = ARCHITECTURES[architecture](
        image, feature_dim, group(symmetry), keras.DTypePolicy(precision)
    )
    if normalise:
        features = layers.UnitNormalization(dtype="float32")(features)
    out = layers.Concatenate(dtype="float32")([features, *more]) if more else features
    return keras.Model(image, out, name=architecture), features.shape[1]
