"""What a set of particles says of how it was imaged: contrast, noise, shifts, defocus.

Training for it takes its ranges from here. A density has a contrast, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
from jaxtyping import Int

from . import imaging, rotations
from .density import Density
from .errors import InputError
from .io.files import PathLike
from .io.star import write_star
from .noise import Noise, background_noise
from .particles import ParticleStack
from .rotations import Seed
from .single_images import ImageStatistics, beyond_circle, seen_share

__all__ = [
    "Survey",
    "TrainingRanges",
    "check_sought_by",
    "check_white",
    "contrast",
    "is_black",
    "survey",
    "to_the_middle",
    "told",
    "with_noise",
    "write_noise",
]

#: What a sign of the contrast means.
CONTRASTS = {1: "white on black", -1: "black on white", 0: "not to be told"}
#: A density is asked for its contrast at this resolution, in angstrom; black is one of whose third
#: moment so much is negative. Of a protein without what is coarser than 25 A it is less.
COARSE, BLACK = 20.0, 0.75
#: A map's particle is what, at so many angstrom, is above this share of the peak; and the share of
#: the frame that it may be off the middle: shifts are looked for so far.
SEEN_AT, OFF = (20.0, 0.1), 0.1
#: Shifts of particles that were laid on such a map are about 0.8 of that, root mean square.
LAID = 0.5
#: Rings that differ by this share are equally quiet.
LITTLE = 2e-3
#: Share of what a particle adds at its loudest ring that is next to nothing.
FAINT = 0.02
#: Pixels of background from which a spectrum can be measured; by fewer it is thought to be white.
ENOUGH = 20_000
#: SNR below which no image shows a particle to anybody.
FAINTEST = 1e-6
#: SNR from which orientations do not hang on the noise, and its spectrum is not looked for.
LOUD = 10.0


class TrainingRanges(TypedDict, total=False):
    """Ranges for :class:`cryoem.simulation.TrainingImages`, whose parameters say what they are."""

    snr_range: tuple[float, float]
    clean_fraction: float
    max_shift_px: float
    defocus_range_angstrom: tuple[float, float]
    ctf_fraction: float
    noise: Literal["white", "coloured"] | Noise


class Told(TypedDict):
    """What is known of all particles; see :class:`Survey`."""

    max_shift_px: float
    defocus_range_angstrom: tuple[float, float] | None


@dataclass(frozen=True)
class Survey:
    """How particles were imaged.

    Attributes
    ----------
    images : int
        How many were looked at.
    masked_fraction : float
        Share of these that were masked, or padded, with a constant: of more than half of them no
        noise is to be seen, else it is that of the others.
    contrast : {'white on black', 'black on white', 'mixed', 'not to be told'}
    noise_variance : float
        Per pixel, where it is quietest.
    noise : Noise or None
        Its spectrum; None where no noise is to be seen beside the particles, or nothing else is.
    snr : float
        Variance that the particles add, over the whole frame, / noise variance.
    snr_error : float
        Its standard error over the images.
    background_level, background_ramp : float
        How far outside the particles images are from zero, and by how much they rise from one edge
        to the other: root mean squares, in standard deviations of the images.
    particle_diameter_angstrom : float
        Of the circle, wherever the particles lie in the frame, outside which next to nothing of
        them is left.
    max_shift_px : float
        The largest component of any particle's shift; 0 where the file says none.
    defocus_range_angstrom : (low, high) or None
        Of all particles; None where the file has no defocus.
    """

    images: int
    masked_fraction: float
    contrast: str
    noise_variance: float
    noise: Noise | None
    snr: float
    snr_error: float
    background_level: float
    background_ramp: float
    particle_diameter_angstrom: float
    max_shift_px: float
    defocus_range_angstrom: tuple[float, float] | None

    def training(self) -> TrainingRanges:
        """Ranges for :class:`cryoem.simulation.TrainingImages`, wider than what was seen.

        SNR from a quarter of the mean to four times it: single particles differ by their thickness
        of ice. Shifts are those of the file, and at least 2 px, for what centred particles by is
        known to a pixel or two. No image is clean.

        Raises
        ------
        InputError
            There is no noise to be seen.
        """
        if not self.noise_variance > 0:
            raise InputError(
                "the corners of the images are constant: their noise cannot be measured, so that "
                "nothing can be trained for it; wanted images as they were extracted, not masked"
            )
        snr = max(self.snr, self.snr_error)
        if not snr > FAINTEST:
            raise InputError(
                f"no particle is to be seen in the images: SNR {self.snr:.2g}; "
                "nothing can be trained for it"
            )
        found: TrainingRanges = {
            "snr_range": (snr / 4, snr * 4),
            "clean_fraction": 0.0,
            "max_shift_px": max(2.0, self.max_shift_px),
        }
        if self.noise is not None:
            found["noise"] = self.noise
        if self.defocus_range_angstrom is not None:
            found["defocus_range_angstrom"] = self.defocus_range_angstrom
            found["ctf_fraction"] = 1.0
        return found


def survey(
    stack: ParticleStack, *, images: int = 1000, seed: Seed = 0, loudest: float = LOUD
) -> Survey:
    """Look at some images, drawn at random, and at what is known of all particles.

    A particle adds to the variance of the pixels that it covers. So the noise is what varies in the
    quietest ring about the centre: in the corners others may stand. At SNR 1/100 a thousand images
    of 116 px tell the SNR to about a tenth of it.

    Parameters
    ----------
    stack : ParticleStack
    images : int
        How many to look at, at most all.
    seed : int or numpy.random.Generator
    loudest : float
        SNR above which the noise's spectrum is not looked for: what lies about such a particle may
        be its own.

    Returns
    -------
    Survey
    """
    n = len(stack)
    rows = np.sort(rotations.generator(seed, "survey").choice(n, min(images, n), replace=False))
    given = stack.select(rows)  # as it was masked, before anything is divided
    seen = np.asarray(given.divided().images[:])
    single = ImageStatistics.of(seen, stack.optics_group[rows])
    sign, _ = single.contrast(slice(None))
    level, ramp = single.background
    signs, _, mixed = single.contrasts(np.zeros(len(rows), int))
    mixed |= {-1, 1} <= set(signs.tolist())
    if single.uneven:
        seen = imaging.flatten(seen)
    masked = seen_share(given.images) < 1
    if 0 < masked.mean() <= 0.5:  # the others tell
        rows, seen = rows[~masked], seen[~masked]
    quiet = _Rings(seen, masked=bool(masked.mean() > 0.5))
    noise = None
    if quiet.noise > 0 and quiet.signal.mean() < loudest * quiet.noise:
        noise = Noise.white(quiet.noise)
        if len(rows) * quiet.background.sum() >= ENOUGH:
            noise = background_noise(seen, quiet.background, group=stack.optics_group[rows])
            noise = noise.for_groups(stack.optics_groups)
    ratio = quiet.signal / quiet.noise if quiet.noise > 0 else np.full(len(rows), np.inf)
    return Survey(
        images=len(masked),
        masked_fraction=float(masked.mean()),
        contrast="mixed" if mixed else CONTRASTS[sign],
        noise_variance=quiet.noise,
        noise=noise,
        snr=float(ratio.mean()),
        snr_error=float(ratio.std() / np.sqrt(len(rows))) if quiet.noise > 0 else np.nan,
        background_level=level,
        background_ramp=ramp,
        particle_diameter_angstrom=2 * quiet.radius_px * stack.pixel_size_angstrom,
        **told(stack),
    )


def told(stack: ParticleStack) -> Told:
    """What is known of all particles, without a look at their images."""
    parameters, defocus = stack.ctf_parameters, None
    if parameters is not None:
        mean = (parameters.defocus_u_angstrom + parameters.defocus_v_angstrom) / 2
        defocus = (float(mean.min()), float(mean.max()))
    return {
        "max_shift_px": float(np.abs(stack.shifts_px).max()),
        "defocus_range_angstrom": defocus,
    }


def with_noise(stack: ParticleStack, *, images: int = 1000, loudest: float = LOUD) -> ParticleStack:
    """The stack with a noise: its own, or what some images show where no particle reaches.

    Of premultiplied images, which are divided, it is that which was seen.
    """
    divided = stack.divided()
    if stack.noise is not None or len(stack) == 0:
        return divided
    return divided.replace(noise=survey(stack, images=images, loudest=loudest).noise)


def write_noise(path: PathLike, stack: ParticleStack) -> None:
    """Write the noise of each optics group as RELION's model files do, atomically.

    ``rlnSigma2Noise`` is the variance of either part of a coefficient, in an image of ``N`` px
    transformed with the factor ``1 / N^2``: the variance per pixel over ``2 N^2``.

    Raises
    ------
    InputError
        The stack's noise is unknown.
    """
    if stack.noise is None:
        raise InputError(f"{path}: the noise of the particles is not known; see with_noise")
    box = stack.box_px
    index = np.arange(box // 2 + 1)
    power = stack.noise.for_groups(stack.optics_groups).at(index / box)
    write_star(
        path,
        {
            f"model_optics_group_{group + 1}": {
                "rlnSpectralIndex": index,
                "rlnResolution": index / (box * stack.pixel_size_angstrom),
                "rlnSigma2Noise": of_group / (2 * box**2),
            }
            for group, of_group in enumerate(power)
        },
    )


class _Rings:
    """How loud images are at each distance from their centre.

    Attributes
    ----------
    noise : float
        The variance of the quietest rings.
    radius_px : float
        Of the circle that holds the particles, but for what is faint.
    background : (size, size) array of bool
        Those rings.
    signal : (n,) array
        What is louder than that within, over the whole frame.
    """

    def __init__(self, images: np.ndarray, *, masked: bool) -> None:
        n, size = images.shape[:2]
        radius = imaging.from_middle(size)
        # Rings of equal width out to where a circle still fits; the corners are the last one.
        width = max(1.0, size / 32)
        number = np.minimum(radius / width, size / 2 / width).astype(int)
        count = np.bincount(number.ravel())
        corners = images[:, beyond_circle(radius)]
        # The mean of a frame is known better than that of its corners, which it is above alike.
        level = images.mean(axis=(1, 2), dtype=np.float64)
        above = float(np.mean(level - corners.mean(axis=1, dtype=np.float64)))
        squares = np.zeros((n, len(count)))
        for i, image in enumerate(images):
            square = (image - (level[i] - above)) ** 2
            squares[i] = np.bincount(number.ravel(), square.ravel())
        loud = squares.mean(axis=0) / count
        error = squares.std(axis=0) / count / np.sqrt(n)
        enough = count * n >= 1000 if (count * n >= 1000).any() else count > 0
        quietest = int(np.argmin(np.where(enough, loud, np.inf)))
        # Not to be told from the quietest: by their errors, or by what hardly matters.
        near = loud <= loud[quietest] * (1 + LITTLE) + 2 * np.hypot(error, error[quietest])
        first = last = quietest
        while first > 0 and near[first - 1]:
            first -= 1
        while last + 1 < len(near) and near[last + 1]:
            last += 1
        ring = slice(first, last + 1)
        self.noise = float(squares[:, ring].sum() / n / count[ring].sum())
        if masked:
            self.noise = 0.0
        # The particle ends where hardly any of what it adds in the middle is left.
        faint = np.maximum(FAINT * (loud[:first].max(initial=0) - self.noise), 2 * error)
        beyond = np.flatnonzero(loud[:first] - self.noise < faint[:first])
        middle = int(np.argmax(loud[:first])) if first else 0
        beyond = beyond[beyond > middle]
        self.radius_px = float((beyond[0] + 1 if len(beyond) else first) * width)
        self.background = number >= first
        inside = squares[:, :first] - self.noise * count[:first]
        self.signal = inside.sum(axis=1) / count.sum() - above**2


def contrast(images: np.ndarray) -> tuple[int, float]:
    """Tell whether particles are white on black, as RELION keeps them, or black on white.

    Particles are brighter or darker than what surrounds them, with a CTF too as long as it is under
    focus: the mean of the central disc, a third of the frame across, against that of the corners.

    Parameters
    ----------
    images : (n, size, size) array
        A few hundred for particles that no eye sees.

    Returns
    -------
    sign : {1, -1, 0}
        1: white on black; 0: the two do not differ by five standard errors.
    z : float
        The difference in standard errors.
    """
    images = imaging.check_images(images)
    return ImageStatistics.of(images, np.zeros(len(images), int)).contrast(slice(None))


def is_black(density: Density) -> bool:
    """Tell whether a density is black on white: negative where the particle is, solvent being zero.

    What stands out most is the particle: dark rings about it, or coarse detail that is missing, are
    fainter. The third moment tells: of the whole box, and of the ball in it by its own level, for
    what lies beyond a ball may have been set to zero.
    """
    edge, voxel = max(density.values.shape), density.voxel_size_angstrom
    above = Density(density.values - density.solvent_level, voxel).in_box(edge)
    coarse = above.low_passed(max(COARSE, 3 * voxel)).values
    inside = coarse[np.linalg.norm(np.indices(coarse.shape) - edge // 2, axis=0) < edge / 2 - 2]
    return _is_dark(coarse) and len(inside) > 0 and _is_dark(inside - np.median(inside))


def _is_dark(values: np.ndarray) -> bool:
    """Whether what stands out most is negative."""
    cubes = (values / max(float(np.abs(values).max()), 1e-30)) ** 3
    return bool(-cubes[cubes < 0].sum() > BLACK * np.abs(cubes).sum())


def check_white(density: Density) -> None:
    """Refuse a density that is black on white: no particle looks like it."""
    if is_black(density):
        raise InputError(
            "the density is negative where the particle is, black on white, and particles are "
            "taken for white ones; wanted it inverted: its values times -1"
        )


def to_the_middle(density: Density, stack: ParticleStack | None = None) -> Int[np.ndarray, " 3"]:
    """By how many voxels, along z, y and x, a map is to be moved: its particle to the middle.

    By none where it is less than a tenth of the frame off, or where particles are known to lie as
    far off the middle of theirs.
    """
    box, voxel = density.box_px, density.voxel_size_angstrom
    above = Density(density.values - density.solvent_level, voxel)
    shown = above.low_passed(max(SEEN_AT[0], 3 * voxel)).values
    shown = np.maximum(shown - SEEN_AT[1] * shown.max(), 0)
    if not shown.any():
        return np.zeros(3, int)
    planes = [shown.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    off = np.array([plane @ (np.arange(box) - box // 2) / plane.sum() for plane in planes])
    far, frame, shifted = float(np.linalg.norm(off)) * voxel, box * voxel, 0.0
    if stack is not None:
        frame = stack.box_px * stack.pixel_size_angstrom
        squares = np.sum(stack.shifts_px**2, axis=1)
        shifted = stack.pixel_size_angstrom * float(np.sqrt(np.mean(squares)))
    near = far <= OFF * frame or shifted > LAID * far
    return np.zeros(3, int) if near else -np.round(off).astype(int)


def check_sought_by(density: Density, stack: ParticleStack) -> None:
    """Refuse a map that particles cannot be sought by: black on white, or far off the middle."""
    check_white(density)
    if (move := to_the_middle(density, stack)).any():
        raise InputError(
            f"the particle is {density.voxel_size_angstrom * np.linalg.norm(move):.0f} A off the "
            "middle of the density's box, where particles are looked for; wanted it moved there, "
            f"by {', '.join(map(str, move))} voxels along z, y and x"
        )
