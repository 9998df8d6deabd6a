"""The paper's orientation recovery: gradient descent on unit quaternions over sampled pairs.

One vectorised TensorFlow variable and a compiled step; the quaternion algebra is TensorFlow
Graphics'. Its own ``relative_angle`` never falls below 2.8e-3 rad in float32, so the angle is taken
from its product instead, as ``2 atan2(|vector|, |scalar|)``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from .. import rotations
from ..backend import keras, tf
from ..errors import InputError, MissingToolError
from .pairs import check_pairs

try:  # after the backend, so that TensorFlow is imported quietly
    from tensorflow_graphics.geometry.transformation import quaternion as tfg_quaternion
except ModuleNotFoundError as error:
    raise MissingToolError(
        "the paper's descent needs TensorFlow Graphics: pip install --no-deps tensorflow-graphics"
    ) from error

__all__ = ["Descent", "descend", "geodesic"]


@dataclass(frozen=True, eq=False)
class Descent:
    """What the descent found.

    Attributes
    ----------
    quaternions : (n, 4) array, unit, xyzw
    losses : (steps,) array
        ``L_OR`` of each step's batch, radians squared.
    snapshots : list of (n, 4) arrays
        The orientations along the way, where they were asked for.
    """

    quaternions: Float[np.ndarray, "n 4"]
    losses: Float[np.ndarray, " steps"]
    snapshots: list[Float[np.ndarray, "n 4"]]


def geodesic(q: Float[tf.Tensor, "m 4"], p: Float[tf.Tensor, "m 4"]) -> Float[tf.Tensor, " m"]:
    """``d_q`` of unit quaternion tensors (m, 4), radians, with finite gradients everywhere."""
    relative = tfg_quaternion.multiply(tfg_quaternion.conjugate(q), p)
    vector, scalar = relative[..., :3], tf.abs(relative[..., 3])
    # The floor of 1e-6 keeps the root's gradient finite where q = p.
    return 2 * tf.atan2(tf.sqrt(tf.reduce_sum(vector**2, -1) + 1e-12), scalar)


def descend(
    pairs: ArrayLike,
    distances: ArrayLike,
    n: int | None = None,
    *,
    init: ArrayLike | None = None,
    seed: int = 0,
    steps: int = 5000,
    batch_pairs: int = 256,
    learning_rate: float = 0.5,
    schedule: Literal["constant", "cosine"] = "constant",
    snapshot_every: int = 0,
    progress: bool = False,
) -> Descent:
    """Minimise ``L_OR`` by Adam over random batches of pairs. The defaults are the paper's.

    Random starts can end in local minima; :func:`cryoem.recovery.recover` does not.

    Parameters
    ----------
    pairs : (m, 2) int array
    distances : (m,) array, radians
    n : int, optional
    init : (n, 4) array, optional
        Where to start; default: uniform random orientations.
    seed : int
    steps : int
    batch_pairs : int
        All pairs, every step, where it is at least their number.
    learning_rate : float
    schedule : {'constant', 'cosine'}
    snapshot_every : int
        Keep the orientations every so many steps; 0 for never.
    progress : bool

    Returns
    -------
    Descent
    """
    from tqdm.auto import tqdm

    pairs, distances, n = check_pairs(pairs, distances, n)
    if keras.backend.backend() != "tensorflow":
        raise InputError(
            "the paper's descent wants Keras on TensorFlow, KERAS_BACKEND is "
            f"{keras.backend.backend()!r}"
        )
    if schedule not in ("constant", "cosine"):
        raise InputError(f"schedule must be 'constant' or 'cosine', got {schedule!r}")
    start = (
        rotations.uniform(n, rotations.generator(seed, "start"))
        if init is None
        else rotations.check(init, "init")
    )
    if len(start) != n:
        raise InputError(f"init must hold {n} orientations, got {len(start)}")
    rate = (
        learning_rate
        if schedule == "constant"
        else keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    )
    variable = tf.Variable(start, dtype=tf.float32)
    run = _compiled(variable, rate, pairs, distances, batch_pairs, seed)
    losses, snapshots = [], []
    stride = snapshot_every or max(1, steps // 50)
    with tqdm(total=steps, unit="step", desc="descent", disable=not progress) as bar:
        for first in range(0, steps, stride):
            if snapshot_every:
                snapshots.append(_unit(variable))
            count = min(stride, steps - first)
            losses.append(run(tf.constant(first), tf.constant(count)).numpy())
            bar.update(count)
            bar.set_postfix(L_OR=f"{losses[-1][-1]:.2e}")
    return Descent(_unit(variable), np.concatenate(losses or [np.zeros(0)]), snapshots)


def _compiled(
    variable: tf.Variable,
    rate: float | keras.optimizers.schedules.LearningRateSchedule,
    pairs: np.ndarray,
    distances: np.ndarray,
    batch_pairs: int,
    seed: int,
) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Compile steps of the descent: from the first and how many, to the loss of each."""
    optimizer = keras.optimizers.Adam(rate)
    optimizer.build([variable])
    i, j = (tf.constant(column, tf.int32) for column in pairs.T)
    target = tf.constant(distances, tf.float32)
    everything = batch_pairs >= len(pairs)

    @tf.function
    def run(first: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        losses = tf.TensorArray(tf.float32, count)
        for k in tf.range(count):
            if everything:
                a, b, d_p = i, j, target
            else:
                draw = tf.random.stateless_uniform(
                    [batch_pairs], [seed, first + k], 0, len(pairs), tf.int32
                )
                a, b, d_p = tf.gather(i, draw), tf.gather(j, draw), tf.gather(target, draw)
            with tf.GradientTape() as tape:
                q = tf.math.l2_normalize(variable, axis=-1)
                d_q = geodesic(tf.gather(q, a), tf.gather(q, b))
                loss = tf.reduce_mean((d_p - d_q) ** 2)  # L_OR
            gradient = tf.convert_to_tensor(tape.gradient(loss, variable))
            optimizer.apply([gradient], [variable])
            losses = losses.write(k, loss)
        return losses.stack()

    return run


def _unit(variable: tf.Variable) -> Float[np.ndarray, "n 4"]:
    q = variable.numpy().astype(np.float64)
    return q / np.linalg.norm(q, axis=1, keepdims=True)
