"""The encoders: Keras 3 on any backend, images in, features out."""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from .errors import InputError

__all__ = ["ARCHITECTURES", "build"]


def paper(
    image: keras.KerasTensor, feature_dim: int, dtype: keras.DTypePolicy
) -> keras.KerasTensor:
    """Seven times convolution, ReLU and 2 x 2 max-pooling; 4,551,936 weights at 512 features.

    Banjac et al., arXiv 2104.06237, figure 3. ``feature_dim`` other than 512 adds a linear layer.
    """
    x = image
    for filters, kernel in [(32, 7), (64, 5), (128, 3), (256, 3), (256, 3), (512, 3), (512, 3)]:
        x = layers.Conv2D(filters, kernel, padding="same", activation="relu", dtype=dtype)(x)
        x = layers.MaxPooling2D(padding="same", dtype=dtype)(x)
    x = layers.GlobalAveragePooling2D(dtype="float32")(x)
    return x if feature_dim == 512 else layers.Dense(feature_dim, dtype="float32")(x)


def resnet(
    image: keras.KerasTensor, feature_dim: int, dtype: keras.DTypePolicy
) -> keras.KerasTensor:
    """A residual network that keeps where things are: the last map is flattened, not averaged.

    No batch normalisation: branches start at zero instead, so that a feature never depends on the
    other images of its batch, and half precision stays fast on CPUs.
    """

    def convolve(
        x: keras.KerasTensor, filters: int, kernel: int = 3, strides: int = 1, **options: Any
    ) -> keras.KerasTensor:
        return layers.Conv2D(filters, kernel, strides, padding="same", dtype=dtype, **options)(x)

    x = convolve(image, 32, kernel=5, strides=2, activation="relu")
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
    return layers.Dense(feature_dim, dtype="float32")(x)


#: The named choices of :func:`build`.
ARCHITECTURES: dict[
    str, Callable[[keras.KerasTensor, int, keras.DTypePolicy], keras.KerasTensor]
] = {"resnet": resnet, "paper": paper}


def build(
    architecture: str,
    crop_px: int,
    feature_dim: int,
    *,
    normalise: bool,
    precision: str = "float32",
) -> keras.Model:
    """Build an encoder.

    Parameters
    ----------
    architecture : {'resnet', 'paper'}
    crop_px : int
        Edge of the images that it reads.
    feature_dim : int
    normalise : bool
        Bring features to unit length (all heads but the Euclidean).
    precision : str
        ``"mixed_bfloat16"`` trains about twice as fast on CPUs with AVX512-BF16.

    Returns
    -------
    keras.Model
        From (n, crop_px, crop_px) to (n, feature_dim).
    """
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}"
        )
    image = keras.Input((crop_px, crop_px), name="image")
    x = layers.Reshape((crop_px, crop_px, 1))(image)
    x = ARCHITECTURES[architecture](x, feature_dim, keras.DTypePolicy(precision))
    if normalise:
        x = layers.UnitNormalization(dtype="float32")(x)
    return keras.Model(image, x, name=architecture)
