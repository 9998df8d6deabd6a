"""Projection matching: the baseline that needs no training when the density is known."""

from dataclasses import dataclass

import numpy as np

from . import rotations
from .density import Density
from .projection import project
from .simulation import Preprocessing

__all__ = ["Match", "match"]


@dataclass(frozen=True)
class Match:
    """Best reference of each image.

    Attributes
    ----------
    quaternions : (n, 4) array, unit, xyzw
    scores : (n,) array
        Correlation coefficient with the best reference.
    """

    quaternions: np.ndarray
    scores: np.ndarray


def match(
    images: np.ndarray,
    density: Density,
    preprocessing: Preprocessing,
    *,
    ctf: np.ndarray | None = None,
    references: int = 21_600,
    progress: bool = False,
) -> Match:
    """Give each image the orientation of the reference projection that it correlates with best.

    Parameters
    ----------
    images : (n, frame_px, frame_px) array
    density : Density, a cube of ``frame_px``
    preprocessing : Preprocessing
        Images and references are compared after it.
    ctf : (n, frame_px, frame_px // 2 + 1) array, optional
        See :func:`cryoem.imaging.ctf`; phases are flipped by its sign.
    references : int
        Spread evenly over SO(3); 21,600 are about 9 degrees apart.
    progress : bool
        Show a bar.

    Returns
    -------
    Match
    """
    known = rotations.grid(references)
    table = np.empty((references, preprocessing.crop_px**2), np.float32)
    from tqdm.auto import tqdm

    starts = range(0, references, 512)
    for i in tqdm(starts, desc="references", unit="batch", disable=not progress):
        frames = project(density, known[i : i + 512])
        table[i : i + 512] = preprocessing(frames).reshape(-1, table.shape[1])
    best, scores = np.empty(len(images), int), np.empty(len(images), np.float32)
    for i in range(0, len(images), 256):
        part = slice(i, i + 256)
        prepared = preprocessing(images[part], ctf=None if ctf is None else ctf[part])
        prepared = prepared.reshape(len(prepared), -1)
        correlation = prepared @ table.T / table.shape[1]
        best[i : i + 256] = correlation.argmax(axis=1)
        scores[i : i + 256] = correlation.max(axis=1)
    return Match(known[best], scores)
