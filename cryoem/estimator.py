"""The distance estimator: a Siamese network, its training, its file.

Both sides of a pair share one encoder, so a batch of ``n`` images is embedded once and all its
``n (n - 1) / 2`` pairs are compared.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
from keras import ops
from numpy.typing import ArrayLike

from . import distances, files, networks, simulation, structures
from .errors import InputError
from .files import PathLike
from .simulation import Preprocessing, TrainingImages
from .symmetry import group

__all__ = [
    "Estimator",
    "Look",
    "Objective",
    "PairLoss",
    "Progress",
    "calibrate",
    "learn",
    "pair_distances",
    "shipped",
    "train",
]

#: Written into every file. Files of version 2 (float16, no finder) are read too, others refused.
FORMAT_VERSION = 3


def pair_distances(features: Any, head: str) -> Any:
    """Distances of all pairs of a batch in the backend's tensors, with finite gradients.

    The NumPy twin is :func:`cryoem.distances.from_features`; here the arguments of the arccosines
    and of the root are clipped, so that neither the diagonal nor coinciding or opposite features
    give infinite gradients.

    Parameters
    ----------
    features : (n, f) tensor
    head : {'exact', 'cosine', 'euclidean'}

    Returns
    -------
    (n, n) tensor, radians
    """
    product = ops.matmul(features, ops.transpose(features))
    if head == "euclidean":
        square = ops.sum(features**2, axis=1)
        return ops.sqrt(ops.maximum(square[:, None] + square - 2 * product, 1e-6))
    if head == "cosine":
        return 2 * ops.arccos(ops.clip(product, -1 + 1e-6, 1 - 1e-6))
    return ops.arccos(ops.clip(2 * product - 1, -1 + 1e-6, 1 - 1e-6))


class PairLoss(keras.losses.Loss):
    """``L_DE``: weighted mean of ``(d_p - d)^2`` over the pairs of a batch.

    The true distance ``d`` is the kernel distance of the group's features, which is ``d_q`` for a
    particle without symmetry.

    Parameters
    ----------
    head : {'exact', 'cosine', 'euclidean'}
    pairs : {'all', 'uniform'}
        All pairs i < j, each weighted by the inverse density of its distance under uniform
        orientations (``1 / sin^2(d_q / 2)`` without symmetry), capped; or, as the paper, the
        consecutive pairs (0, 1), (2, 3), ..., drawn uniform in distance, with equal weight.
    symmetry : str
    noise_weight : float
        See :func:`train`.
    """

    def __init__(
        self,
        head: str,
        pairs: Literal["all", "uniform"] = "all",
        *,
        symmetry: str = "C1",
        noise_weight: float = 0.0,
        name: str = "pair_loss",
    ) -> None:
        super().__init__(name=name)
        self.head, self.pairs, self.noise_weight = head, pairs, noise_weight
        self.group = group(symmetry)
        self.table = self.group.inverse_density(64).astype(np.float32)

    def compare(self, targets: Any, features: Any) -> tuple[Any, Any]:
        """Weights and errors ``d_p - d`` of all pairs of a batch, two (n, n) tensors."""
        f = len(self.group.harmonics)
        d = pair_distances(targets[:, :f], "exact")
        n = ops.shape(d)[0]
        i = ops.arange(n)
        if self.pairs == "all":
            bins = ops.cast(d * (len(self.table) / (np.pi + 1e-3)), "int32")
            weights = ops.cast(i[:, None] < i, "float32") * ops.take(self.table, bins)
        else:
            weights = ops.cast((i[:, None] % 2 == 0) & (i[:, None] + 1 == i), "float32")
        if self.noise_weight:
            ratio = self.noise_weight * targets[:, f] / 2
            weights = weights / (1 + ratio[:, None] + ratio)
        return weights / ops.sum(weights), pair_distances(features, self.head) - d

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Compare targets, (n, f ...), with features, (n, f')."""
        weights, off = self.compare(y_true, y_pred)
        return ops.sum(weights * off**2)


class Objective(keras.losses.Loss):
    """What training minimises: ``L_DE``, and where the network says a shift, how right that is.

    The shift counts by a tenth of its squared error, in pixels of what the network reads.
    """

    def __init__(self, loss: PairLoss, feature_dim: int) -> None:
        super().__init__(name="objective")
        self.loss, self.feature_dim = loss, feature_dim

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Compare targets, (n, f + 3), with what the encoder gives, (n, f') or (n, f' + 3)."""
        f = self.feature_dim
        total = self.loss.call(y_true, y_pred[:, :f])
        if y_pred.shape[1] == f:
            return total
        shift = ops.mean(ops.sum((y_pred[:, f : f + 2] - y_true[:, -2:]) ** 2, axis=1))
        return total + 0.1 * shift

    def mae_rad(self, y_true: Any, y_pred: Any) -> Any:
        """Mean absolute error of the distances, weighted as the loss is: a metric."""
        weights, off = self.loss.compare(y_true, y_pred[:, : self.feature_dim])
        return ops.sum(weights * ops.abs(off))


@dataclass(frozen=True)
class Look:
    """What an estimator says of images.

    Attributes
    ----------
    features : (n, f) float32 array
    shifts_px : (n, 2) array or None
        Where the particle was moved to, (x, y), pixels of the frame; None from a network that does
        not say.
    expected_error_rad : (n,) array or None
        Mean angle by which the orientation is expected to be off.
    """

    features: np.ndarray
    shifts_px: np.ndarray | None
    expected_error_rad: np.ndarray | None


@dataclass
class Estimator:
    """An encoder with all that its use needs.

    Attributes
    ----------
    encoder : keras.Model
        From prepared images to features.
    head : {'exact', 'cosine', 'euclidean'}
    preprocessing : Preprocessing
    architecture : str
    feature_dim : int
    symmetry : str
        The particle's point group.
    looks : int
        How often an image is looked at: after each look but the last it is centred by the shift
        that was seen.
    precision : str
        See :func:`cryoem.networks.build`.
    notes : dict
        What made the weights: particle, seed, images seen, and so on.
    finder : keras.Model or None
        A network of its own for all looks but the last (:meth:`divide`): it finds the shift, so
        that the encoder need only know centred images. None: the encoder looks every time.
    """

    encoder: keras.Model
    head: str
    preprocessing: Preprocessing
    architecture: str
    feature_dim: int
    symmetry: str = "C1"
    looks: int = 1
    precision: str = "float32"
    notes: dict[str, Any] = field(default_factory=dict)
    finder: keras.Model | None = None

    @classmethod
    def create(
        cls,
        preprocessing: Preprocessing,
        *,
        architecture: str = "steerable",
        head: str = "exact",
        feature_dim: int = 16,
        symmetry: str = "C1",
        looks: int = 1,
        seed: int | None = 0,
        precision: str = "float32",
    ) -> Estimator:
        """Build an untrained estimator.

        ``seed`` sets Keras' global seed, and by it the initial weights; None leaves it alone. The
        paper's is ``architecture="paper", head="cosine", feature_dim=512``.
        """
        if head not in distances.HEADS:
            raise InputError(f"head must be one of {', '.join(distances.HEADS)}, got {head!r}")
        if seed is not None:
            keras.utils.set_random_seed(seed)
        settings = (head, preprocessing, architecture, feature_dim, symmetry, looks, precision)
        estimator = cls(None, *settings)
        estimator.encoder, estimator.feature_dim = estimator._network()
        return estimator

    def divide(self) -> None:
        """Part finding from reading: a copy of the encoder becomes the finder, in place.

        The encoder can then be trained on, with centred images alone. It reads them once the
        finder has looked as often as the encoder had to.
        """
        if self.finder is not None or not self.says_shifts:
            raise InputError("wanted an estimator that finds shifts (looks > 1) and is undivided")
        self.finder, _ = self._network()
        self.finder.set_weights(self.encoder.get_weights())
        self.looks += 1

    def _network(self) -> tuple[keras.Model, int]:
        """An untrained network of these settings, and how many features it gives."""
        return networks.build(
            self.architecture,
            self.preprocessing.crop_px,
            self.feature_dim,
            normalise=self.head != "euclidean",
            symmetry=self.symmetry,
            precision=self.precision,
        )

    @property
    def _networks(self) -> dict[str, keras.Model]:
        """All that has weights, by its name in the file."""
        found = {"weight": self.encoder}
        return found if self.finder is None else {**found, "finder": self.finder}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle settings and weights, for the workers of a cluster, and not Keras' own objects."""
        settings = {
            name: getattr(self, name)
            for name in (
                "architecture", "head", "feature_dim", "symmetry", "looks", "precision",
            )
        }  # fmt: skip
        weights = {name: network.get_weights() for name, network in self._networks.items()}
        return _rebuilt, (self.preprocessing, settings, weights, self.notes)

    def embed(
        self,
        images: np.ndarray,
        *,
        ctf: np.ndarray | None = None,
        prepared: bool = False,
        batch_size: int = 256,
    ) -> np.ndarray:
        """Features of images, (n, feature_dim) float32: those of :meth:`look`."""
        return self.look(images, ctf=ctf, prepared=prepared, batch_size=batch_size).features

    def look(
        self,
        images: np.ndarray,
        *,
        ctf: np.ndarray | None = None,
        prepared: bool = False,
        batch_size: int = 256,
    ) -> Look:
        """What the network says of images.

        Parameters
        ----------
        images : (n, frame_px, frame_px) array
            Or (n, crop_px, crop_px) where ``prepared``; these are looked at once.
        ctf : (n, frame_px, frame_px // 2 + 1) array, optional
            See :func:`cryoem.imaging.ctf`; phases are flipped by its sign.
        prepared : bool
            The preprocessing has been done.
        batch_size : int

        Returns
        -------
        Look
        """
        p, f = self.preprocessing, self.feature_dim
        parts, moved = [], []
        for i in range(0, len(images), batch_size):
            batch = slice(i, i + batch_size)
            small, shifts = images[batch], np.zeros((len(images[batch]), 2))
            if not prepared:
                small = p.reduce(small, ctf=None if ctf is None else ctf[batch])
                shifts, small = self.centre(small)
            out = ops.convert_to_numpy(self.encoder(small, training=False))
            if out.shape[1] > f:
                shifts = shifts + out[:, f : f + 2]
            parts.append(out)
            moved.append(shifts)
        if not parts:
            parts, moved = (
                [np.zeros((0, self.encoder.output_shape[1]), np.float32)],
                [np.zeros((0, 2))],
            )
        out, shifts = np.concatenate(parts), np.concatenate(moved)
        if out.shape[1] == f:
            return Look(out, None, None)
        # Mean length of a Gaussian rotation vector with this variance an axis.
        error = 2 * np.sqrt(2 / np.pi) * np.exp(np.clip(out[:, f + 2], -16, 3) / 2)
        return Look(out[:, :f], shifts * p.frame_px / p.down_px, error)

    def centre(self, small: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the shifts of reduced images, in all looks but the last, and undo them.

        Parameters
        ----------
        small : (n, down_px, down_px) array
            See :meth:`Preprocessing.reduce <cryoem.simulation.Preprocessing.reduce>`.

        Returns
        -------
        shifts : (n, 2) array
            (x, y), pixels of ``small``.
        images : (n, crop_px, crop_px) array
            What is left to read.
        """
        p, f = self.preprocessing, self.feature_dim
        finder = self.encoder if self.finder is None else self.finder
        shifts, images = np.zeros((len(small), 2)), p.cut(small)
        for _ in range(self.looks - 1 if self.says_shifts else 0):
            shifts = shifts + ops.convert_to_numpy(finder(images, training=False))[:, f : f + 2]
            images = p.cut(small, shifts_px=shifts)
        return shifts, images

    def distances(self, features: ArrayLike, others: ArrayLike) -> np.ndarray:
        """Distances between two sets of features, (n, m), radians."""
        return distances.from_features(features, others, self.head)

    @property
    def says_shifts(self) -> bool:
        """Whether the network says shifts and was asked to: it looks again after centring."""
        return self.looks > 1 and self.encoder.output_shape[1] > self.feature_dim

    @property
    def fingerprint(self) -> str:
        """SHA-256 of weights and settings: equal where features are, whatever the notes say."""
        settings = [
            self.architecture,
            self.head,
            self.symmetry,
            self.looks,
            self.precision,
            asdict(self.preprocessing),
        ]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for network in self._networks.values():
            for weight in network.get_weights():
                digest.update(weight.tobytes())
        return digest.hexdigest()

    # ----------------------------------------------------------------------------------
    # The file

    def save(self, path: PathLike) -> None:
        """Write weights and settings to one ``.npz`` file, atomically.

        It holds arrays and a JSON text, nothing that could be executed on loading. Matrices are
        kept as 8-bit integers with a scale a column, all else as float16.
        """
        settings = {
            "format_version": FORMAT_VERSION,
            "architecture": self.architecture,
            "head": self.head,
            "feature_dim": self.feature_dim,
            "symmetry": self.symmetry,
            "looks": self.looks,
            "finder": self.finder is not None,
            "preprocessing": asdict(self.preprocessing),
            "notes": self.notes,
        }
        weights: dict[str, Any] = {
            f"{name}_{i:03d}{part}": values
            for name, network in self._networks.items()
            for i, weight in enumerate(network.get_weights())
            for part, values in _packed(weight).items()
        }
        with files.atomic(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, settings=np.array(json.dumps(settings)), **weights)

    @classmethod
    def load(cls, path: PathLike, *, precision: str = "float32") -> Estimator:
        """Read an estimator that :meth:`save` wrote.

        Raises
        ------
        InputError
            Not such a file, one of another version, or weights that do not fit the network.
        """
        path = files.existing(path)
        try:
            with np.load(path, allow_pickle=False) as archive:
                settings = json.loads(str(archive["settings"]))
                arrays = {name: archive[name] for name in sorted(archive.files)}
        except (ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: not an estimator's file ({error})") from error
        if settings.get("format_version") not in (2, FORMAT_VERSION):
            raise InputError(
                f"{path}: written in format {settings.get('format_version')}, "
                f"this version of cryoem reads 2 and {FORMAT_VERSION}"
            )
        try:
            estimator = cls.create(
                Preprocessing(**settings["preprocessing"]),
                architecture=settings["architecture"],
                head=settings["head"],
                feature_dim=settings["feature_dim"],
                symmetry=settings["symmetry"],
                looks=settings["looks"],
                seed=None,
                precision=precision,
            )
            estimator.notes = dict(settings["notes"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: incomplete settings ({error})") from error
        if settings.get("finder"):
            estimator.finder, _ = estimator._network()
        for prefix, network in estimator._networks.items():
            try:
                weights = [
                    values * arrays[f"{name}_scale"] if values.dtype == np.int8 else values
                    for name, values in arrays.items()
                    if name.startswith(f"{prefix}_") and not name.endswith("_scale")
                ]
                network.set_weights([w.astype(np.float32) for w in weights])
            except (KeyError, ValueError) as error:
                raise InputError(
                    f"{path}: the weights do not fit its {settings['architecture']} network"
                ) from error
        return estimator


def _packed(weight: np.ndarray) -> dict[str, np.ndarray]:
    """What a file keeps of an array of weights, by the end of its name."""
    if weight.ndim < 3 or weight.shape[-2] == 1:
        return {"": weight.astype(np.float16)}
    scale = np.maximum(np.abs(weight).max(axis=-2, keepdims=True) / 127, 1e-12)
    return {"": np.round(weight / scale).astype(np.int8), "_scale": scale.astype(np.float32)}


def _rebuilt(
    preprocessing: Preprocessing,
    settings: dict[str, Any],
    weights: dict[str, list[np.ndarray]],
    notes: dict[str, Any],
) -> Estimator:
    estimator = Estimator.create(preprocessing, seed=None, **settings)
    if "finder" in weights:
        estimator.finder, _ = estimator._network()
    for name, network in estimator._networks.items():
        network.set_weights(weights[name])
    estimator.notes = notes
    return estimator


def shipped(name: str, *, precision: str = "float32") -> Estimator:
    """Load the trained estimator that ships for a particle, its hash checked.

    Parameters
    ----------
    name : str
        ``"4jsv"``, or ``"1i10"`` (D2): trained on fresh projections of the density that
        :func:`cryoem.structures.load_density` makes, without noise and at SNR 1 to 1/128, shifted
        by up to 8 px, with and without a CTF. Their ``notes`` say how.
    precision : str
        See :func:`cryoem.networks.build`.

    Returns
    -------
    Estimator
    """
    return Estimator.load(structures.shipped_file(f"{name}.npz"), precision=precision)


# --------------------------------------------------------------------------------------
# Training


class Progress(keras.callbacks.Callback):
    """A tqdm bar over the images of a training run."""

    def __init__(self, images: int, batch_size: int, *, start: int = 0) -> None:
        super().__init__()
        self.images, self.batch_size, self.start = images, batch_size, start

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Open the bar."""
        from tqdm.auto import tqdm

        self.bar = tqdm(total=self.images, initial=self.start, unit="image", desc="training")

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Advance it."""
        self.bar.update(self.batch_size)
        if logs and batch % 10 == 0:
            self.bar.set_postfix(mae_rad=f"{logs.get('mae_rad', math.nan):.3f}")

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Close it."""
        self.bar.close()


def train(
    estimator: Estimator,
    source: TrainingImages,
    *,
    images: int,
    seed: int = 0,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    optimizer: Literal["adam", "rmsprop"] = "adam",
    schedule: Literal["cosine", "constant"] = "cosine",
    pairs: Literal["all", "uniform"] = "all",
    noise_weight: float = 0.0,
    images_per_epoch: int = 25_600,
    checkpoint: PathLike | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    progress: bool = True,
) -> dict[str, list[float]]:
    """Train an estimator in place on fresh images.

    Parameters
    ----------
    estimator : Estimator
    source : TrainingImages
        Anything with ``batch(seed, step, n, pairs=...)``.
    images : int
        How many images to see in all, rounded up to whole epochs; the length of training is this,
        not minutes.
    seed : int
        Batch ``step`` depends on (seed, step) alone.
    batch_size : int
    learning_rate : float
        The peak.
    optimizer : {'adam', 'rmsprop'}
        The paper's is RMSProp at 1e-3.
    schedule : {'cosine', 'constant'}
        Cosine: a short warm-up, then down to zero at the end.
    pairs : {'all', 'uniform'}
        See :class:`PairLoss`; the paper's is ``'uniform'``.
    noise_weight : float
        A pair counts by ``1 / (1 + noise_weight (r_i + r_j) / 2)`` of its images' noise-to-signal
        ratios: at 1 the noisiest, which err whatever one does, do not drown the others.
    images_per_epoch : int
        How often Keras' epoch callbacks run and a checkpoint is written.
    checkpoint : path, optional
        A folder. Where it holds a run of these same settings, that run is continued exactly: the
        optimizer's state, the schedule and the batches go on as if nothing had happened.
    callbacks : sequence of keras.callbacks.Callback
        TensorBoard and the like.
    progress : bool
        Show a bar.

    Returns
    -------
    dict
        ``loss``, ``mae_rad`` (weighted as the loss is) and ``seconds``, a list with one value an
        epoch, those of an interrupted run included.
    """
    if images < 1 or batch_size < 2:
        raise InputError(
            f"wanted at least one image, in batches of two or more; got images={images}, "
            f"batch_size={batch_size}"
        )
    steps = math.ceil(images / batch_size)
    epochs = math.ceil(steps / max(1, images_per_epoch // batch_size))
    per_epoch = math.ceil(steps / epochs)
    steps = epochs * per_epoch
    rate = learning_rate
    if schedule == "cosine":
        warm = max(1, min(500, steps // 20))
        rate = keras.optimizers.schedules.CosineDecay(
            learning_rate / 20, max(1, steps - warm), warmup_target=learning_rate, warmup_steps=warm
        )
    elif schedule != "constant":
        raise InputError(f"schedule must be 'cosine' or 'constant', got {schedule!r}")
    makers = {"adam": keras.optimizers.Adam, "rmsprop": keras.optimizers.RMSprop}
    if optimizer not in makers:
        raise InputError(f"optimizer must be one of {', '.join(makers)}, got {optimizer!r}")
    encoder = estimator.encoder
    loss = PairLoss(estimator.head, pairs, symmetry=estimator.symmetry, noise_weight=noise_weight)
    objective = Objective(loss, estimator.feature_dim)
    encoder.compile(
        optimizer=makers[optimizer](rate, clipnorm=1.0),
        loss=objective,
        metrics=[objective.mae_rad],
        jit_compile=False,
    )
    settings = {
        "images": images,
        "seed": seed,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "optimizer": optimizer,
        "schedule": schedule,
        "pairs": pairs,
        "noise_weight": noise_weight,
        "images_per_epoch": images_per_epoch,
        "architecture": estimator.architecture,
        "head": estimator.head,
        "feature_dim": estimator.feature_dim,
        "symmetry": estimator.symmetry,
        "source": getattr(source, "settings", None),
    }
    keeper = None if checkpoint is None else _Checkpoint(Path(checkpoint), settings)
    history: dict[str, list[float]] = {"loss": [], "mae_rad": [], "seconds": []}
    first = 0
    if keeper is not None:
        encoder.optimizer.build(encoder.trainable_variables)
        first, history = keeper.restore(encoder, history)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for step in range(first * per_epoch, epochs * per_epoch):
            yield source.batch(seed, step, batch_size, pairs=pairs)

    hooks = [_Clock(), *callbacks]
    if progress:
        total, seen = epochs * per_epoch * batch_size, first * per_epoch * batch_size
        hooks.append(Progress(total, batch_size, start=seen))
    if keeper is not None:
        keeper.history = history
        hooks.append(keeper)
    if first < epochs:
        fitted = encoder.fit(
            batches(),
            steps_per_epoch=per_epoch,
            epochs=epochs,
            initial_epoch=first,
            verbose=0,
            shuffle=False,
            callbacks=hooks,
        )
        if keeper is None:
            history = {key: fitted.history[key] for key in history}
    calibrate(estimator, source, images=min(images, 20_480), seed=seed)
    return history


def learn(
    estimator: Estimator,
    source: TrainingImages,
    *,
    images: int,
    seed: int = 0,
    checkpoint: PathLike | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    progress: bool = True,
) -> dict[str, list[float]]:
    """Train an estimator in place, as is best for particles at hand: what ``cryoem train`` does.

    Two trainings (:func:`train`), the first of three fifths of the images at a high rate, the
    second at a lower one. Between them an estimator that finds shifts is divided
    (:meth:`Estimator.divide`): from then on its encoder learns from centred images alone.

    Parameters
    ----------
    estimator : Estimator
        Untrained, with ``looks=2`` where ``source`` shifts its images.
    source : TrainingImages
    images, seed, checkpoint, callbacks, progress
        See :func:`train`; the second training draws other images and keeps its checkpoint in the
        folder's ``second``.

    Returns
    -------
    dict
        That of :func:`train`, both trainings in turn.
    """
    options: dict[str, Any] = {"callbacks": callbacks, "progress": progress}
    folder = None if checkpoint is None else Path(checkpoint)
    first = math.ceil(0.6 * images)
    history = train(
        estimator,
        source,
        images=first,
        seed=seed,
        learning_rate=6e-3,
        checkpoint=folder,
        **options,
    )
    if images == first:
        return history
    shifted = estimator.says_shifts and source.max_shift_px > 0
    if shifted:
        estimator.divide()
    end = train(
        estimator,
        source.centred() if shifted else source,
        images=images - first,
        seed=seed + 1,
        learning_rate=2e-3,
        noise_weight=1.0,
        checkpoint=folder and folder / "second",
        **options,
    )
    if shifted:  # how far off it is on what its own finder centred
        calibrate(estimator, source, images=min(images, 20_480), seed=seed + 1)
    return {key: values + end[key] for key, values in history.items()}


def calibrate(
    estimator: Estimator, source: TrainingImages, *, images: int = 20_480, seed: int = 0
) -> None:
    """Teach an estimator how far off its orientations are, in place; its features stay.

    Fresh images are oriented by their features, and the network's log variance is fitted to the
    likelihood of the angles by which they are off, those of a Gaussian rotation vector. The end of
    :func:`train`; of no effect on a network that says no variance.

    Parameters
    ----------
    estimator : Estimator
    source : TrainingImages
        Shifted images are centred by the finder where there is one.
    images : int
    seed : int
        Other images than those of training with the same seed.
    """
    encoder, f = estimator.encoder, estimator.feature_dim
    if encoder.output_shape[1] == f:
        return
    orbits = group(estimator.symmetry)
    source = copy.copy(source)
    if estimator.finder is None:  # as if images were centred: they are, before their last look
        source.max_shift_px = min(
            source.max_shift_px, simulation.LITTLE * source.preprocessing.frame_px
        )
    beyond = 2**31  # steps that no training reaches
    batches = [source.batch(seed, beyond + i, 512) for i in range(math.ceil(images / 512))]
    if estimator.finder is not None and source.max_shift_px:
        batches = [(estimator.centre(seen)[1], targets) for seen, targets in batches]
    seen, targets = (np.concatenate(part) for part in zip(*batches, strict=True))
    hidden, last = encoder.get_layer("variance_hidden"), encoder.get_layer("variance")
    reader = keras.Model(encoder.inputs, [encoder.outputs[0], hidden.input])
    out, level = reader.predict(seen, batch_size=256, verbose=0)
    phi = targets[:, : len(orbits.harmonics)]
    found = orbits.decode(out[:, :f] @ np.linalg.lstsq(out[:, :f], phi, rcond=None)[0])
    square = orbits.distance(found, orbits.decode(phi)) ** 2

    def unlikely(y_true: Any, y_pred: Any) -> Any:
        return ops.mean(y_true * ops.exp(-y_pred) + 3 * y_pred)

    last.set_weights([np.zeros_like(w) for w in last.get_weights()])
    inputs = keras.Input(level.shape[1:])
    variance = keras.Model(inputs, last(hidden(inputs)))  # the encoder's own last layers
    variance.compile(optimizer=keras.optimizers.Adam(3e-3), loss=unlikely)
    variance.fit(level, square[:, None], batch_size=256, epochs=6, shuffle=False, verbose=0)


class _Clock(keras.callbacks.Callback):
    """Adds the seconds that an epoch took to what is known of it."""

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Start."""
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Stop."""
        assert logs is not None
        logs["seconds"] = time.perf_counter() - self._start


class _Checkpoint(keras.callbacks.Callback):
    """Keeps weights, optimizer and history after every epoch, and finds them again."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        super().__init__()
        self.folder, self.settings = folder, settings
        self.history: dict[str, list[float]] = {}

    @property
    def _path(self) -> Path:
        return self.folder / "checkpoint.npz"

    def restore(
        self, encoder: keras.Model, history: dict[str, list[float]]
    ) -> tuple[int, dict[str, list[float]]]:
        """Return (epochs done, history), with weights and optimizer set where a run is found."""
        if not self._path.exists():
            return 0, history
        try:
            with np.load(self._path, allow_pickle=False) as archive:
                state = json.loads(str(archive["state"]))
                arrays = {name: archive[name] for name in archive.files}
        except (ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{self._path}: not a whole checkpoint ({error})") from error
        if state["settings"] != json.loads(json.dumps(self.settings)):
            raise InputError(
                f"{self._path}: made with {state['settings']}, asked for {self.settings}; "
                "name another folder or remove this one"
            )
        for prefix, variables in self._variables(encoder):
            for i, variable in enumerate(variables):
                variable.assign(arrays[f"{prefix}_{i}"])
        return state["epochs"], state["history"]

    @staticmethod
    def _variables(encoder: keras.Model) -> list[tuple[str, list[keras.Variable]]]:
        return [("model", encoder.weights), ("optimizer", encoder.optimizer.variables)]

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Write the checkpoint."""
        assert logs is not None
        for key, values in self.history.items():
            values.append(float(logs[key]))
        arrays = {
            f"{prefix}_{i}": ops.convert_to_numpy(variable)
            for prefix, variables in self._variables(self.model)
            for i, variable in enumerate(variables)
        }
        state = {"settings": self.settings, "epochs": epoch + 1, "history": self.history}
        with files.atomic(self._path) as temporary, open(temporary, "wb") as file:
            np.savez(file, state=np.array(json.dumps(state)), **arrays)
