"""What the microscope does to a projection: CTF, shifts, noise; and what is undone before use.

Each is a function of arrays and a generator. Images are (n, size, size), ``[y, x]``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import scipy.fft
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from . import aberrations, fourier
from .errors import InputError
from .rotations import Seed

__all__ = [
    "CtfParameters",
    "add_noise",
    "apply_ctf",
    "background_planes",
    "check_images",
    "check_stack",
    "crop",
    "ctf",
    "divisor",
    "downsample",
    "flatten",
    "flip_contrast",
    "from_middle",
    "mirror",
    "normalise",
    "quarter_turn",
    "shift",
    "triangular_shifts",
    "unusable",
    "wavelength_angstrom",
]

shift = fourier.shift


#: Values of which single precision holds sums of squares, a single pixel's, and what else may be.
SCALES, HOTTEST, NOT_FINITE = (1e-12, 1e12), 1e18, "holds values that are not finite"


def check_images(images: ArrayLike, name: str = "images") -> Float[np.ndarray, "n y x"]:
    """Return images as an (n, size, size) float32 array, or say what is wrong with them."""
    images = np.asarray(images, dtype=np.float32)
    if images.ndim != 3 or images.shape[1] != images.shape[2]:
        raise InputError(f"{name} must have shape (n, size, size), got {images.shape}")
    ends = (end(images, axis=(1, 2), initial=0) for end in (np.min, np.max))
    for what, bad in unusable(*ends).items():
        rows = np.flatnonzero(bad)
        if len(rows) and what == NOT_FINITE:
            raise InputError(f"{name} must be finite: image {rows[0]} is not ({len(rows)} are not)")
        if len(rows):
            raise InputError(f"{name}: image {rows[0]} {what} ({len(rows)} are so): scale them")
    return images


def unusable(
    low: Float[np.ndarray, " n"], high: Float[np.ndarray, " n"]
) -> dict[str, Bool[np.ndarray, " n"]]:
    """Which images cannot be computed with, by what is wrong; from each one's extremes."""
    peak = np.maximum(-low, high)  # NaN where one pixel is
    finite, (least, most) = np.isfinite(peak), SCALES
    far = (np.minimum(-low, high) > most) | (peak > HOTTEST)
    return {
        NOT_FINITE: ~finite,
        f"reaches beyond {most:g}, too far to be computed with": finite & far,
        f"reaches no further than {least:g}, too little to be computed with": (peak > 0)
        & (peak < least),
    }


def check_stack(images: Any) -> Any:
    """Return the images of a stack: arrays as :func:`check_images`, others by their shape alone."""
    if images is None:
        raise InputError("a particle stack needs images")
    if isinstance(images, (np.ndarray, list, tuple)) and not isinstance(images, np.memmap):
        return check_images(images)
    shape = images.shape
    if len(shape) != 3 or shape[1] != shape[2]:
        raise InputError(f"images must have shape (n, size, size), got {tuple(shape)}")
    return images


def add_noise(
    images: ArrayLike, seed: Seed, *, snr: float | None = None, variance: float | None = None
) -> Float[np.ndarray, "n y x"]:
    """Add white Gaussian noise.

    Parameters
    ----------
    images : (n, size, size) array
    seed : int or numpy.random.Generator
    snr : float, optional
        (Variance of the clean images, all pixels of all images together) / (noise variance).
        Infinity adds nothing.
    variance : float, optional
        The noise variance itself. Exactly one of the two.

    Returns
    -------
    (n, size, size) float32 array
    """
    if (snr is None) == (variance is None):
        raise InputError("give either snr or variance")
    if snr is not None:
        if not snr > 0:
            raise InputError(f"snr must be positive, got {snr}")
        variance = float(np.var(np.asarray(images))) / snr
    if variance is None or not variance >= 0:
        raise InputError(f"variance must not be negative, got {variance}")
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(np.shape(images), dtype=np.float32)
    return np.asarray(images, np.float32) + np.float32(np.sqrt(variance)) * noise


def triangular_shifts(n: int, seed: Seed, max_px: float) -> Float[np.ndarray, "n 2"]:
    """Draw (n, 2) shifts in pixels from the paper's triangular law, nothing beyond ``max_px``."""
    if not max_px >= 0:
        raise InputError(f"the largest shift must not be negative, got {max_px}")
    if max_px == 0:
        return np.zeros((n, 2))
    return np.random.default_rng(seed).triangular(-max_px, 0, max_px, (n, 2))


def downsample(images: ArrayLike, box_px: int) -> Float[np.ndarray, "n y x"]:
    """Fourier-crop images to ``box_px`` pixels over the same extent, free of aliasing."""
    return fourier.resize(images, box_px, 2)


def crop(images: ArrayLike, box_px: int) -> Float[np.ndarray, "n y x"]:
    """Cut the central ``box_px`` pixels out (or pad with zeros); the origin stays the origin."""
    return fourier.crop_or_pad(images, (box_px, box_px))


def from_middle(size: int) -> Float[np.ndarray, "y x"]:
    """Distance of each pixel of a frame from its origin, (size, size), pixels."""
    axis = np.arange(size) - size // 2
    return np.hypot(axis[:, None], axis)


def normalise(images: ArrayLike, *, radius_px: float | None = None) -> Float[np.ndarray, "n y x"]:
    """Bring each image to mean 0 and standard deviation 1.

    Parameters
    ----------
    images : (n, size, size) array
    radius_px : float, optional
        Measure mean and deviation outside this circle only, as RELION does; by default over the
        whole frame. A constant image becomes zero.
    """
    images = np.asarray(images, np.float32)
    size = images.shape[-1]
    use = np.ones((size, size), bool)
    if radius_px is not None:
        use = from_middle(size) > radius_px
        if not use.any():
            raise InputError(f"radius_px {radius_px} leaves no background in {size} px")
    background = images[:, use]
    mean = background.mean(axis=1)[:, None, None]
    deviation = background.std(axis=1)[:, None, None]
    return (images - mean) / np.where(deviation > 0, deviation, 1)


def background_planes(images: ArrayLike) -> Float[np.ndarray, "n 3"]:
    """Level and slopes of each image's background: the plane through what is outside the circle.

    The circle is the one that the frame holds.

    Parameters
    ----------
    images : (n, size, size) array

    Returns
    -------
    (n, 3) array
        The level at the centre, and by how much it rises from one edge to the other, along x and y.
    """
    images = check_images(images)
    outside, planes = _planes(images.shape[1])
    return images[:, outside].astype(np.float64) @ np.linalg.pinv(planes[outside]).T


def flatten(images: ArrayLike) -> Float[np.ndarray, "n y x"]:
    """Take each image's background plane off: its level and its ramp, as RELION's extraction does.

    See :func:`background_planes`.
    """
    images = check_images(images)
    _, planes = _planes(images.shape[1])
    plane = np.einsum("nc,yxc->nyx", background_planes(images), planes)
    return images - plane.astype(np.float32)


def _planes(size: int) -> tuple[np.ndarray, np.ndarray]:
    """What is outside the circle, (size, size), and (1, x, y) of each pixel, edges 1 apart."""
    x = (np.arange(size) - size // 2) / size
    planes = np.stack(np.broadcast_arrays(1.0, x, x[:, None]), axis=-1)
    return from_middle(size) > size / 2, planes


def flip_contrast(images: ArrayLike) -> Float[np.ndarray, "n y x"]:
    """Turn black particles on white into white on black, or back."""
    return -np.asarray(images)


def _indexed(images: ArrayLike, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.asarray(images)[:, y, x]


def quarter_turn(images: ArrayLike) -> Float[np.ndarray, "n y x"]:
    """Turn images by +90 degrees in their plane about pixel ``n // 2``: orientation ``R Rz(pi/2)``.

    Exact: pixels are moved, not interpolated (at even boxes the outermost line wraps round).
    """
    size = np.shape(images)[-1]
    i = np.arange(size) - size // 2
    # P'(x, y) = P(Rz(90) (x, y)) = P(-y, x)
    return _indexed(images, (i[None, :] + size // 2) % size, (-i[:, None] + size // 2) % size)


def mirror(images: ArrayLike) -> Float[np.ndarray, "n y x"]:
    """Mirror images in x about pixel ``n // 2``, ``P(-x, y)``: orientation ``R Ry(pi)``."""
    size = np.shape(images)[-1]
    i = np.arange(size) - size // 2
    return _indexed(images, np.arange(size)[:, None], (-i[None, :] + size // 2) % size)


# --------------------------------------------------------------------------------------
# Contrast transfer function


def wavelength_angstrom(voltage_kv: ArrayLike) -> Float[np.ndarray, "*n"]:
    """Electron wavelength in angstrom, relativistic."""
    volts = 1e3 * np.asarray(voltage_kv, dtype=np.float64)
    return 12.2643 / np.sqrt(volts + 0.97845e-6 * volts**2)


def ctf(
    box_px: int,
    pixel_size_angstrom: float,
    defocus_u_angstrom: ArrayLike,
    defocus_v_angstrom: ArrayLike | None = None,
    defocus_angle_degrees: ArrayLike = 0.0,
    *,
    voltage_kv: ArrayLike = 300.0,
    spherical_aberration_mm: ArrayLike = 2.7,
    amplitude_contrast: ArrayLike = 0.1,
    phase_shift_degrees: ArrayLike = 0.0,
    b_factor_angstrom2: ArrayLike = 0.0,
    even_zernike: ArrayLike = (),
    at: tuple[np.ndarray, np.ndarray] | None = None,
) -> Float[np.ndarray, "n ..."]:
    """Contrast transfer function with RELION's signs, on the half grid of ``rfft2``.

    Parameters
    ----------
    box_px : int
    pixel_size_angstrom : float
    defocus_u_angstrom, defocus_v_angstrom : float or (n,) array, angstrom, positive underfocus
    defocus_angle_degrees : float or (n,) array
        From +x (columns) to +y (rows).
    voltage_kv, spherical_aberration_mm : float or (n,) array
    amplitude_contrast, phase_shift_degrees : float or (n,) array
    b_factor_angstrom2 : float or (n,) array
        Envelope ``exp(-B k^2 / 4)``.
    even_zernike : (c,) or (n, c) array, radians
        Of symmetric aberrations beyond these; see :func:`cryoem.aberrations.zernike`.
    at : two (k,) int arrays, optional
        Rows and columns of the grid that are wanted; by default all.

    Returns
    -------
    (n, box_px, box_px // 2 + 1) or (n, k) float32 array
        Positive at low frequency when under focus: for particles that are white on black, as
        RELION keeps them (recorded images are flipped first, :func:`flip_contrast`).

    References
    ----------
    RELION's ``ctf.h``; Rohou and Grigorieff, J. Struct. Biol. 192 (2015).
    """
    if defocus_v_angstrom is None:
        defocus_v_angstrom = defocus_u_angstrom

    ky, kx = np.meshgrid(fourier.frequencies(box_px), np.arange(box_px // 2 + 1), indexing="ij")
    if at is not None:
        ky, kx = ky[at], kx[at]

    def per_image(value: ArrayLike) -> np.ndarray:
        return np.atleast_1d(np.asarray(value, dtype=np.float64)).reshape(-1, *[1] * ky.ndim)

    du, dv, angle = map(per_image, (defocus_u_angstrom, defocus_v_angstrom, defocus_angle_degrees))
    wavelength = per_image(wavelength_angstrom(voltage_kv))
    aberration = per_image(spherical_aberration_mm) * 1e7
    w = per_image(amplitude_contrast)
    if not ((w >= 0) & (w < 1)).all():
        raise InputError(f"amplitude_contrast must lie in [0, 1), got {amplitude_contrast!r}")
    extent = box_px * pixel_size_angstrom
    k2 = (kx**2 + ky**2) / extent**2
    z = -(du + dv) / 2
    if (du != dv).any():
        z = z - (du - dv) / 2 * np.cos(2 * (np.arctan2(ky, kx) - np.deg2rad(angle)))
    phase = (
        np.pi * wavelength * z * k2
        + np.pi / 2 * aberration * wavelength**3 * k2**2
        - np.deg2rad(per_image(phase_shift_degrees))
        - np.arctan(w / np.sqrt(1 - w**2))
    )
    if np.any(even_zernike):
        phase = phase + aberrations.zernike("even", even_zernike, kx / extent, ky / extent)
    found = -np.sin(phase)
    if np.any(b_factor_angstrom2):
        found *= np.exp(-per_image(b_factor_angstrom2) * k2 / 4)
    return found.astype(np.float32)


#: What may have been done to images already: see :class:`CtfParameters`.
DONE = ("as seen", "phase flipped", "premultiplied", "divided")
#: By less than this no image is divided: a CTF is below it at one frequency in sixteen.
NEXT_TO_NOTHING = 0.1


@dataclass(frozen=True, eq=False)
class CtfParameters:
    """Parameters of each particle's contrast transfer function, in RELION's conventions.

    One number stands for all particles.

    Attributes
    ----------
    defocus_u_angstrom, defocus_v_angstrom : (n,) arrays
        Positive under focus; ``defocus_v_angstrom`` is by default ``defocus_u_angstrom``.
    defocus_angle_degrees : (n,) array
        From +x (columns) to +y (rows).
    voltage_kv, spherical_aberration_mm, amplitude_contrast : (n,) arrays
        The microscope's: alike within an optics group.
    phase_shift_degrees : (n,) array
    b_factor_angstrom2 : (n,) array
        Envelope ``exp(-B k^2 / 4)``.
    scale : (n,) array
        Factor of the whole function.
    even_zernike : (n, c) array, radians
        Coefficients of symmetric aberrations beyond these, by default none; see
        :func:`cryoem.aberrations.zernike`.
    images : (n,) array of {'as seen', 'phase flipped', 'premultiplied', 'divided'}
        What was done to the images already. What they show of the density is then the CTF, its
        absolute value, or its square. The noise of premultiplied images is coloured by the absolute
        value of the CTF; divided (:meth:`cryoem.particles.ParticleStack.divided`) they are as if
        phase flipped, but next to nothing about the zeros.
    """

    defocus_u_angstrom: Float[np.ndarray, " n"]
    defocus_v_angstrom: Float[np.ndarray, " n"] | None = None
    defocus_angle_degrees: Float[np.ndarray, " n"] | float = 0.0
    voltage_kv: Float[np.ndarray, " n"] | float = 300.0
    spherical_aberration_mm: Float[np.ndarray, " n"] | float = 2.7
    amplitude_contrast: Float[np.ndarray, " n"] | float = 0.1
    phase_shift_degrees: Float[np.ndarray, " n"] | float = 0.0
    b_factor_angstrom2: Float[np.ndarray, " n"] | float = 0.0
    scale: Float[np.ndarray, " n"] | float = 1.0
    even_zernike: Float[np.ndarray, "n c"] | tuple[float, ...] = ()
    images: np.ndarray | str = "as seen"

    def __post_init__(self) -> None:
        u = np.atleast_1d(np.asarray(self.defocus_u_angstrom, np.float64))
        if self.defocus_v_angstrom is None:
            object.__setattr__(self, "defocus_v_angstrom", u)
        for f in fields(self):
            values = np.asarray(getattr(self, f.name), None if f.name == "images" else np.float64)
            shape = u.shape
            if f.name == "even_zernike":
                shape = (*u.shape, values.shape[-1] if values.ndim else 0)
                if values.shape not in (shape, shape[-1:]) or not np.isfinite(values).all():
                    raise InputError(
                        f"even_zernike must be finite: (c,) coefficients, or ({len(u)}, c); got "
                        f"shape {values.shape}"
                    )
            elif f.name == "images":
                if values.shape not in ((), u.shape) or not np.isin(values, DONE).all():
                    raise InputError(
                        f"images must be {', '.join(map(repr, DONE))}: one of them, or one for "
                        f"each of {len(u)} particles; got {values!r}"
                    )
            elif values.shape not in ((), u.shape) or u.ndim != 1 or not np.isfinite(values).all():
                raise InputError(
                    f"{f.name} must be finite: one number, or one for each of {len(u)} particles; "
                    f"got shape {values.shape}"
                )
            object.__setattr__(self, f.name, np.broadcast_to(values, shape))

    def __len__(self) -> int:
        return len(self.defocus_u_angstrom)

    def select(self, rows: slice | np.ndarray) -> CtfParameters:
        """Those of some particles."""
        return CtfParameters(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def values(
        self,
        box_px: int,
        pixel_size_angstrom: float,
        *,
        at: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Float[np.ndarray, "n ..."]:
        """What of the density the images show, on the half grid of ``rfft2``; see :func:`ctf`."""
        parameters = {f.name: getattr(self, f.name) for f in fields(self)}
        scale, images = parameters.pop("scale"), parameters.pop("images")
        found = ctf(box_px, pixel_size_angstrom, at=at, **parameters)
        if (rows := images == "divided").any():  # about the zeros less of it is left
            found[rows] = np.square(found[rows]) / divisor(found[rows])
        if (scale != 1).any():
            found *= scale.reshape(-1, *[1] * (found.ndim - 1)).astype(np.float32)
        for done, shown in (
            ("phase flipped", np.abs),
            ("divided", np.abs),
            ("premultiplied", np.square),
        ):
            if (rows := images == done).any():
                found[rows] = shown(found[rows])
        return found


def divisor(ctf_values: np.ndarray) -> np.ndarray:
    """What images are divided by that were multiplied by these."""
    return np.maximum(np.abs(ctf_values), NEXT_TO_NOTHING)


def apply_ctf(images: ArrayLike, ctf_values: ArrayLike) -> Float[np.ndarray, "n y x"]:
    """Multiply each image's transform by its CTF; (n, size, size // 2 + 1) or one for all."""
    images = np.asarray(images, np.float32)
    size = images.shape[-1]
    if np.shape(ctf_values)[-2:] != (size, size // 2 + 1):
        raise InputError(
            f"the CTF of {size} px images must have shape (n, {size}, {size // 2 + 1}), "
            f"got {np.shape(ctf_values)}"
        )
    spectra = scipy.fft.rfft2(images, workers=fourier.WORKERS) * ctf_values
    return scipy.fft.irfft2(spectra, s=(size, size), workers=fourier.WORKERS)


def flip_phases(images: ArrayLike, ctf_values: ArrayLike) -> Float[np.ndarray, "n y x"]:
    """Undo the sign of the CTF; what is left of it is its absolute value. See :func:`apply_ctf`."""
    return apply_ctf(images, np.where(np.asarray(ctf_values) < 0, -1, 1))
