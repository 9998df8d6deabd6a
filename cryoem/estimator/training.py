"""Training: the recipe for particles at hand, and the single run that it is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float

from ..backend import keras
from ..density import Density
from ..errors import InputError
from ..io.files import PathLike
from ..preprocessing import preprocessing_for
from ..simulation import TrainingImages
from ..surveying import TrainingRanges, check_white
from .calibration import IMAGES, calibrate
from .loss import Objective, PairLoss, Pairs
from .model import Estimator
from .record import History, Record

__all__ = ["broad_ranges", "fit", "train", "train_on"]

#: What is learned from 60 % of the images at the first rate, from the others at the second, where
#: pairs of noisy images count for less.
FIRST_SHARE, FIRST_RATE, SECOND_RATE, SECOND_NOISE_WEIGHT = 0.6, 6e-3, 2e-3, 1.0

Optimizer: TypeAlias = Literal["adam", "rmsprop"]
Schedule: TypeAlias = Literal["cosine", "constant"]


def broad_ranges(box_px: int) -> TrainingRanges:
    """What the shipped estimators were trained on, and ``cryoem train`` takes where it is not told.

    A quarter of the images without noise, the others at SNR 1 to 1/128; shifts of up to 8 px in a
    frame of 116, in proportion for others; two fifths with a CTF, 0.5 to 3 micrometres under focus.
    The noise is coloured as micrographs' is.

    Parameters
    ----------
    box_px : int
        Edge of the frame.

    Returns
    -------
    dict
        Arguments of :class:`cryoem.simulation.TrainingImages`.
    """
    return {
        "snr_range": (1 / 128, 1.0),
        "clean_fraction": 0.25,
        "max_shift_px": 8.0 * box_px / 116,
        "defocus_range_angstrom": (5_000.0, 30_000.0),
        "ctf_fraction": 0.4,
        "noise": "coloured",
    }


def train_on(
    density: Density,
    ranges: TrainingRanges,
    *,
    images: int,
    symmetry: str = "C1",
    precision: str = "float32",
    seed: int = 0,
    checkpoint: PathLike | None = None,
    progress: bool = True,
) -> tuple[Estimator, History]:
    """Make an estimator for a density, and train it.

    Parameters
    ----------
    density : Density
        In the box and the pixels of the images that it is for.
    ranges : dict
        How these were imaged (:meth:`cryoem.surveying.Survey.training`), or :func:`broad_ranges`.
        Where there are shifts the estimator centres images first.
    images : int
    symmetry : str
    precision : str
        See :func:`cryoem.estimator.networks.build`.
    seed, checkpoint, progress
        See :func:`train`.

    Returns
    -------
    estimator : Estimator
        Its notes say how it was trained.
    history : dict
    """
    shifted = ranges["max_shift_px"]
    preprocessing = preprocessing_for(density, max_shift_px=shifted)
    source = TrainingImages(density, preprocessing, symmetry=symmetry, **ranges)
    estimator = Estimator.create(
        preprocessing,
        symmetry=symmetry,
        passes=2 if shifted else 1,
        seed=seed,
        precision=precision,
    )
    history = train(
        estimator, source, images=images, seed=seed, checkpoint=checkpoint, progress=progress
    )
    estimator.notes = {
        "images": images,
        "seed": seed,
        "precision": precision,
        "train_minutes": round(sum(history["seconds"]) / 60, 1),
        "source": source.settings,
    }
    return estimator, history


def train(
    estimator: Estimator,
    source: TrainingImages,
    *,
    images: int,
    seed: int = 0,
    checkpoint: PathLike | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    progress: bool = True,
) -> History:
    """Train an estimator in place: what ``cryoem train`` does, and what made those that ship.

    Two runs (:func:`fit`), the first of three fifths of the images at a high rate, the second at a
    lower one. Between them an estimator that centres images splits off its shift network
    (:meth:`Estimator.split_off_shift_network`): from then on its encoder learns from centred images
    alone.

    Parameters
    ----------
    estimator : Estimator
        Untrained, with ``passes=2`` where ``source`` shifts its images.
    source : TrainingImages
    images, seed, checkpoint, callbacks, progress
        See :func:`fit`; the second run draws other images and keeps its checkpoint in the folder's
        ``second``.

    Returns
    -------
    dict
        That of :func:`fit`, both runs in turn.
    """
    folder = None if checkpoint is None else Path(checkpoint)
    first = math.ceil(FIRST_SHARE * images)
    history = fit(
        estimator,
        source,
        images=first,
        seed=seed,
        learning_rate=FIRST_RATE,
        checkpoint=folder,
        callbacks=callbacks,
        progress=progress,
    )
    if images == first:
        return history
    split = estimator.centres_images and source.max_shift_px > 0
    if split:
        estimator.split_off_shift_network()
    end = fit(
        estimator,
        source.centred() if split else source,
        images=images - first,
        seed=seed + 1,
        learning_rate=SECOND_RATE,
        noise_weight=SECOND_NOISE_WEIGHT,
        checkpoint=folder and folder / "second",
        callbacks=callbacks,
        progress=progress,
    )
    if split:  # how far off it is on what its own shift network centred
        calibrate(estimator, source, images=min(images, IMAGES), seed=seed + 1)
    return {key: values + end[key] for key, values in history.items()}


def fit(
    estimator: Estimator,
    source: TrainingImages,
    *,
    images: int,
    seed: int = 0,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    optimizer: Optimizer = "adam",
    schedule: Schedule = "cosine",
    pairs: Pairs = "all",
    noise_weight: float = 0.0,
    images_per_epoch: int = 25_600,
    checkpoint: PathLike | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    progress: bool = True,
) -> History:
    """One run of training on fresh images, in place, with a calibration at its end.

    Parameters
    ----------
    estimator, source
    images : int
        How many in all, rounded up to whole epochs; the length of training is this, not minutes.
    seed : int
        Batch ``step`` depends on (seed, step) alone.
    batch_size, images_per_epoch : int
        After every epoch Keras' epoch callbacks run and the checkpoint is written.
    learning_rate : float, the peak
    optimizer : {'adam', 'rmsprop'}
        The paper's is RMSProp at 1e-3.
    schedule : {'cosine', 'constant'}
        Cosine: a short warm-up, then down to zero at the end.
    pairs, noise_weight
        See :class:`PairLoss`; the paper's are ``'uniform'`` and 0.
    checkpoint : path, optional
        A folder. Where it holds a run of these same settings, that run is continued exactly: the
        optimizer's state, the schedule and the batches go on as if nothing had happened.
    callbacks : sequence of keras.callbacks.Callback
        TensorBoard and the like.
    progress : bool
        Show a bar of epochs and one of batches.

    Returns
    -------
    dict
        ``loss``, ``mae_rad`` (weighted as the loss is) and ``seconds``, a list with one value an
        epoch, those of an interrupted run included.
    """
    check_white(source.density)
    epochs, steps = _epochs(images, batch_size, images_per_epoch)
    loss = PairLoss(estimator.head, pairs, symmetry=estimator.symmetry, noise_weight=noise_weight)
    encoder, objective = estimator.encoder, Objective(loss, estimator.feature_dim)
    encoder.compile(
        optimizer=_optimizer(optimizer, schedule, learning_rate, epochs * steps),
        loss=objective,
        metrics=[keras.metrics.MeanMetricWrapper(objective.mae_rad, name="mae_rad")],
        jit_compile=False,
    )
    encoder.optimizer.build(encoder.trainable_variables)  # else each step is traced twice
    settings = {
        "images": images, "seed": seed, "batch_size": batch_size, "learning_rate": learning_rate,
        "optimizer": optimizer, "schedule": schedule, "pairs": pairs, "noise_weight": noise_weight,
        "images_per_epoch": images_per_epoch, "precision": estimator.precision,
        **estimator.settings, "source": source.settings,
    }  # fmt: skip
    run = Record(checkpoint, settings)
    done = run.restore(encoder)
    if done < epochs:
        encoder.fit(
            _batches(source, seed, range(done * steps, epochs * steps), batch_size, pairs),
            steps_per_epoch=steps,
            epochs=epochs,
            initial_epoch=done,
            verbose=0,
            shuffle=False,
            callbacks=[run, *callbacks, *_bars(progress)],
        )
    calibrate(estimator, source, images=min(images, IMAGES), seed=seed)
    return run.history


def _batches(
    source: TrainingImages, seed: int, steps: range, batch_size: int, pairs: Pairs
) -> Iterator[tuple[Float[np.ndarray, "n px px"], Float[np.ndarray, "n t"]]]:
    for step in steps:
        yield source.batch(seed, step, batch_size, pairs=pairs)


def _epochs(images: int, batch_size: int, images_per_epoch: int) -> tuple[int, int]:
    """How many epochs a run has, and how many steps each."""
    if images < 1 or batch_size < 2:
        raise InputError(
            f"wanted at least one image, in batches of two or more; got {images} images in batches "
            f"of {batch_size}"
        )
    steps = math.ceil(images / batch_size)
    epochs = math.ceil(steps / max(1, images_per_epoch // batch_size))
    return epochs, math.ceil(steps / epochs)


def _optimizer(
    name: Optimizer, schedule: Schedule, learning_rate: float, steps: int
) -> keras.optimizers.Optimizer:
    """An optimizer, not yet used, for a run of so many steps."""
    makers = {"adam": keras.optimizers.Adam, "rmsprop": keras.optimizers.RMSprop}
    if name not in makers:
        raise InputError(f"optimizer must be one of {', '.join(makers)}, got {name!r}")
    if schedule not in ("cosine", "constant"):
        raise InputError(f"schedule must be 'cosine' or 'constant', got {schedule!r}")
    rate = learning_rate
    if schedule == "cosine":
        warm = max(1, min(500, steps // 20))
        rate = keras.optimizers.schedules.CosineDecay(
            learning_rate / 20, max(1, steps - warm), warmup_target=learning_rate, warmup_steps=warm
        )
    return makers[name](rate, clipnorm=1.0)


def _bars(progress: bool) -> list[keras.callbacks.Callback]:
    if not progress:
        return []
    from tqdm.keras import TqdmCallback  # which imports Keras

    return [TqdmCallback()]
