"""Projection matching: the baseline that needs no training when the density is known."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from . import imaging, rotations
from .density import Density
from .projection import project
from .reconstruction import Ctf, observed
from .simulation import Preprocessing
from .stacks import ImageStack

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
    images: ArrayLike | ImageStack,
    density: Density,
    preprocessing: Preprocessing,
    *,
    rows: np.ndarray | None = None,
    shifts_px: ArrayLike | None = None,
    ctf: Ctf = None,
    references: int = 21_600,
    progress: bool = False,
) -> Match:
    """Give each image the orientation of the reference projection that it correlates with best.

    Parameters
    ----------
    images : (n, frame_px, frame_px) array
        Or a stack of files; it is read in chunks.
    density : Density, a cube of ``frame_px``
    preprocessing : Preprocessing
        Images and references are compared after it.
    rows : (m,) int array, optional
        Which of the images are matched, and returned; default: all.
    shifts_px : (n, 2) array, optional
        Where each particle was moved to, (x, y), pixels; it is undone. No shift is searched.
    ctf : (n, frame_px, frame_px // 2 + 1) array, optional
        See :func:`cryoem.imaging.ctf`; phases are flipped by its sign. Or a function that gives
        those of some rows, or None.
    references : int
        Spread evenly over SO(3); 21,600 are about 9 degrees apart.
    progress : bool
        Show a bar.

    Returns
    -------
    Match
    """
    seen = observed(images, shifts_px=shifts_px, ctf=ctf)
    known = rotations.grid(references)
    table = np.empty((references, preprocessing.crop_px**2), np.float32)
    from tqdm.auto import tqdm

    starts = range(0, references, 512)
    for i in tqdm(starts, desc="references", unit="batch", disable=not progress):
        frames = project(density, known[i : i + 512])
        table[i : i + 512] = preprocessing(frames).reshape(-1, table.shape[1])
    rows = np.arange(len(seen)) if rows is None else np.asarray(rows)
    best, scores = np.empty(len(rows), int), np.empty(len(rows), np.float32)
    for i in range(0, len(rows), 256):
        part = rows[i : i + 256]
        frames = imaging.shift(seen.images[part], -seen.shifts_px[part])
        prepared = preprocessing(frames, ctf=seen.ctf(part)).reshape(len(part), -1)
        correlation = prepared @ table.T / table.shape[1]
        best[i : i + 256] = correlation.argmax(axis=1)
        scores[i : i + 256] = correlation.max(axis=1)
    return Match(known[best], scores)
