"""Projection matching: the baseline that needs no training when the density is known."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from . import fourier, imaging, rotations
from .density import Density
from .errors import InputError
from .noise import Noise
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

    Raises
    ------
    InputError
        Images or a density of another box than the preprocessing's.
    """
    from tqdm.auto import tqdm

    if density.box_px != preprocessing.frame_px:
        raise InputError(
            f"wanted a density in a box of {preprocessing.frame_px}, as the images; "
            f"got {density.box_px}"
        )
    stack = with_noise(stack)
    known = rotations.grid(references)
    best, scores = np.empty(len(stack), int), np.empty(len(stack), np.float32)
    # One set of references for all optics groups: whitened by their mean. They are projected in the
    # pixels in which they are compared.
    box, down = stack.box_px, preprocessing.down_px
    gain = gain_down = None
    if stack.noise is not None and not stack.noise.is_white:
        mean = Noise(stack.noise.power.mean(axis=0))
        gain = mean.whitening(box)[0]
        gain_down = mean.gain(fourier.radius((down, down), half=True) / box)[0]
    coarse = density.resampled(down)
    table = np.empty((references, preprocessing.crop_px**2), np.float32)
    starts = range(0, references, 512)
    for i in tqdm(starts, desc="references", unit="batch", disable=not progress):
        frames = project(coarse, known[i : i + 512])
        frames = frames if gain_down is None else imaging.apply_ctf(frames, gain_down)
        table[i : i + 512] = preprocessing.cut(frames).reshape(-1, table.shape[1])
    done = 0
    for part in stack.chunks(256):
        frames = imaging.shift(part.images[:], -part.shifts_px)
        frames = frames if gain is None else imaging.apply_ctf(frames, gain)
        prepared = preprocessing(frames, ctf=part.ctf()).reshape(len(part), -1)
        correlation = prepared @ table.T / table.shape[1]
        rows = slice(done, done + len(part))
        best[rows], scores[rows] = correlation.argmax(axis=1), correlation.max(axis=1)
        done += len(part)
    return stack.extended(
        MatchedStack,
        quaternions=known[best],
        scores=scores,
        # What was known of them belonged to other orientations.
        contrast=None,
        expected_error_rad=None,
    )
