"""Projection matching: the baseline that needs no training when the density is known."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from . import imaging, rotations
from .density import Density
from .particles import PER_PARTICLE, ParticleStack
from .preprocessing import Preprocessing
from .projection import project
from .surveying import with_noise

__all__ = ["MatchedStack", "match"]


@dataclass(frozen=True, eq=False, kw_only=True)
class MatchedStack(ParticleStack):
    """Particles at the orientation of the reference that each matches best.

    Attributes
    ----------
    scores : (n,) array
        Correlation coefficient with the best reference.
    """

    quaternions: Float[np.ndarray, "n 4"] = field(metadata=PER_PARTICLE)
    scores: Float[np.ndarray, " n"] = field(metadata=PER_PARTICLE)


def match(
    stack: ParticleStack,
    density: Density,
    preprocessing: Preprocessing,
    *,
    references: int = 21_600,
    progress: bool = False,
) -> MatchedStack:
    """Give each image the orientation of the reference projection that it correlates with best.

    Parameters
    ----------
    stack : ParticleStack
        Its shifts are undone, no others are searched; phases are flipped by the CTF's sign, and the
        noise is whitened, in the references too. Images in files are read in chunks.
    density : Density, a cube of the images' box
    preprocessing : Preprocessing
        Images and references are compared after it.
    references : int
        Spread evenly over SO(3); 21,600 are about 9 degrees apart.
    progress : bool
        Show a bar.

    Returns
    -------
    MatchedStack
    """
    stack = with_noise(stack)
    known = rotations.grid(references)
    best, scores = np.empty(len(stack), int), np.empty(len(stack), np.float32)
    gains: list[np.ndarray | None] = [None]
    if stack.noise is not None and not stack.noise.is_white:
        gains = [*stack.noise.whitening(stack.box_px)]
        group = stack.noise.of(stack.optics_group)
    for g, gain in enumerate(gains):
        rows = np.flatnonzero(group == g) if len(gains) > 1 else np.arange(len(stack))
        if len(rows):
            table = _table(density, known, preprocessing, gain, progress)
            best[rows], scores[rows] = _best(stack.select(rows), table, preprocessing, gain)
    return stack.extended(
        MatchedStack,
        quaternions=known[best],
        scores=scores,
        # What was known of them belonged to other orientations.
        contrast=None,
        expected_error_rad=None,
    )


def _table(
    density: Density,
    known: np.ndarray,
    preprocessing: Preprocessing,
    gain: np.ndarray | None,
    progress: bool,
) -> np.ndarray:
    """Prepared projections at the ``known`` orientations, (references, pixels)."""
    from tqdm.auto import tqdm

    table = np.empty((len(known), preprocessing.crop_px**2), np.float32)
    starts = range(0, len(known), 512)
    for i in tqdm(starts, desc="references", unit="batch", disable=not progress):
        frames = project(density, known[i : i + 512])
        frames = frames if gain is None else imaging.apply_ctf(frames, gain)
        table[i : i + 512] = preprocessing(frames).reshape(-1, table.shape[1])
    return table


def _best(
    stack: ParticleStack, table: np.ndarray, preprocessing: Preprocessing, gain: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The row of ``table`` that each image correlates with best, and how well."""
    best, scores = np.empty(len(stack), int), np.empty(len(stack), np.float32)
    done = 0
    for part in stack.chunks(256):
        frames = imaging.shift(part.images[:], -part.shifts_px)
        frames = frames if gain is None else imaging.apply_ctf(frames, gain)
        prepared = preprocessing(frames, ctf=part.ctf()).reshape(len(part), -1)
        correlation = prepared @ table.T / table.shape[1]
        rows = slice(done, done + len(part))
        best[rows], scores[rows] = correlation.argmax(axis=1), correlation.max(axis=1)
        done += len(part)
    return best, scores
