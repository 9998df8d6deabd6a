"""The density from images at given orientations: least squares by conjugate gradients.

Minimise ``sum_i |a_i C_i S_i P_i V - y_i|^2 + ridge |V|^2`` with the projector ``P``, shifts ``S``,
CTFs ``C`` and contrasts ``a``. The normal operator is a convolution: its kernel is made once by a
type-1 NUFFT on a grid of twice the edge, after which an iteration costs two FFTs whatever the
number of images.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike

from . import fourier, projection, rotations
from .density import Density
from .errors import InputError
from .stacks import ImageStack
from .symmetry import group

__all__ = ["Ctf", "Observed", "observed", "reconstruct", "reconstruct_astra"]

#: Those of all images, or a function that gives those of some rows, or None.
Ctf = ArrayLike | Callable[[np.ndarray], np.ndarray | None] | None


@dataclass(frozen=True)
class Observed:
    """Images with what is given of each; in memory, or in files and read when they are used.

    Attributes
    ----------
    images : (n, size, size) array or ImageStack
    quaternions : (n, 4) array, unit, xyzw
        The identity where none were given.
    shifts_px : (n, 2) array, pixels
    ctf : function
        Of rows: their CTF, (m, size, size // 2 + 1), or None.
    """

    images: np.ndarray | ImageStack
    quaternions: np.ndarray
    shifts_px: np.ndarray
    ctf: Callable[[np.ndarray], np.ndarray | None]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def box_px(self) -> int:
        """Edge of the images."""
        return self.images.shape[1]


def observed(
    images: ArrayLike | ImageStack,
    quaternions: ArrayLike | None = None,
    shifts_px: ArrayLike | None = None,
    ctf: Ctf = None,
) -> Observed:
    """Images and what is given of each, of equal length, or what is wrong with them.

    Raises
    ------
    InputError
        Shapes that do not fit, no images, or values that are not finite.
    """
    stack = images if isinstance(images, ImageStack) else projection.check_images(images)
    n, size = len(stack), stack.shape[1]
    if quaternions is None:
        quaternions = np.tile([0.0, 0, 0, 1], (n, 1))
    q = rotations.check(quaternions)
    if len(q) != n:
        raise InputError(f"wanted one quaternion an image; got {len(q)} and {n} images")
    shifts = np.zeros((n, 2)) if shifts_px is None else np.asarray(shifts_px, float)
    if shifts.shape != (n, 2) or not np.isfinite(shifts).all():
        raise InputError(f"shifts_px must be finite and have shape ({n}, 2), got {shifts.shape}")
    if ctf is None:
        return Observed(stack, q, shifts, lambda rows: None)
    if callable(ctf):
        return Observed(stack, q, shifts, ctf)
    given = np.asarray(ctf)
    if given.shape != (n, size, size // 2 + 1):
        raise InputError(f"ctf must have shape ({n}, {size}, {size // 2 + 1}), got {given.shape}")
    return Observed(stack, q, shifts, lambda rows: given[rows])


def reconstruct(
    images: ArrayLike | ImageStack,
    quaternions: ArrayLike,
    *,
    voxel_size_angstrom: float,
    rows: np.ndarray | None = None,
    shifts_px: ArrayLike | None = None,
    ctf: Ctf = None,
    contrast: ArrayLike | None = None,
    symmetry: str = "C1",
    iterations: int = 30,
    ridge: float = 1e-4,
    progress: bool = False,
) -> Density:
    """Reconstruct a density by least squares.

    Parameters
    ----------
    images : (n, size, size) array
        Or a stack of files; it is read in chunks.
    quaternions : (n, 4) array, unit, xyzw
    voxel_size_angstrom : float
        Of the images, and of the density.
    rows : (m,) int array, optional
        Which of the images are used; default: all.
    shifts_px : (n, 2) array, optional
        Where each particle was moved to, (x, y), pixels.
    ctf : (n, size, size // 2 + 1) array, optional
        See :func:`cryoem.imaging.ctf`; or a function that gives those of some rows, or None.
    contrast : (n,) array, optional
        How strongly each image shows the density; see :func:`cryoem.refinement.refine`.
    symmetry : str
        The particle's point group, in the standard setting: each image is seen from every
        orientation of its orbit.
    iterations : int
        Of conjugate gradients; early stopping is a regularisation too.
    ridge : float
        Relative to what all images together see of a frequency at Nyquist.
    progress : bool
        Show a bar.

    Returns
    -------
    Density
    """
    from tqdm.auto import tqdm

    seen = observed(images, quaternions, shifts_px, ctf)
    n, size = len(seen), seen.box_px
    scale = np.ones(n, np.float32) if contrast is None else np.asarray(contrast, np.float32)
    if scale.shape != (n,) or not np.isfinite(scale).all():
        raise InputError(f"contrast must be finite and have shape ({n},), got {scale.shape}")
    rows = np.arange(n) if rows is None else np.asarray(rows)
    if rows.ndim != 1 or len(rows) == 0:
        raise InputError(f"wanted at least one image, rows being a list; got shape {rows.shape}")
    n = len(rows)
    slices, orbit = projection.Slices(size), group(symmetry)
    right = np.zeros((size,) * 3, np.float32)
    kernel = np.zeros((2 * size,) * 3, np.float32)
    for part in tqdm(slices.chunks(n), desc="back-projection", unit="chunk", disable=not progress):
        here = rows[part]
        y = slices.from_images(seen.images[here])
        gain = np.broadcast_to(slices.weights / size**2, y.shape)
        a = scale[here, None]
        if seen.shifts_px[here].any():
            y = y * np.exp(2j * np.pi / size * seen.shifts_px[here] @ slices.frequencies.T)
        values = seen.ctf(here)
        if values is not None:
            ky, kx = slices.index
            a = a * values[:, ky, kx]
        y, squared = y * gain * a, gain * a**2
        for g in orbit.elements:
            q = rotations.multiply(g, seen.quaternions[here])
            right += projection.smear(slices, y, q, size)
            kernel += projection.smear(slices, squared, q, size, modes=2 * size)
    spectrum = scipy.fft.rfftn(scipy.fft.ifftshift(kernel), workers=fourier.WORKERS).real.copy()
    del kernel

    def normal(v: np.ndarray) -> np.ndarray:
        padded = np.zeros((2 * size,) * 3, np.float32)
        padded[:size, :size, :size] = v
        transformed = scipy.fft.rfftn(padded, workers=fourier.WORKERS, overwrite_x=True)
        transformed *= spectrum
        back = scipy.fft.irfftn(
            transformed, s=padded.shape, workers=fourier.WORKERS, overwrite_x=True
        )
        return back[:size, :size, :size] + damping * v

    # A plane wave of frequency k is seen by n / (2 |k|) images, each of which gives `size` to the
    # operator: n at Nyquist.
    damping = np.float32(ridge * n * orbit.order)
    v = np.zeros_like(right)
    residual = right.copy()
    direction = residual.copy()
    square = float(np.vdot(residual, residual))
    start = square
    for _ in tqdm(range(iterations), desc="conjugate gradients", disable=not progress):
        if square <= 1e-12 * start:
            break
        image = normal(direction)
        step = np.float32(square / float(np.vdot(direction, image)))
        v += step * direction
        residual -= step * image
        previous, square = square, float(np.vdot(residual, residual))
        direction = residual + np.float32(square / previous) * direction
    return Density(v, voxel_size_angstrom)


def reconstruct_astra(
    images: ArrayLike, quaternions: ArrayLike, *, voxel_size_angstrom: float, iterations: int = 30
) -> Density:
    """Reconstruct by ASTRA's CGLS on CUDA (no CTF, no shifts).

    Raises
    ------
    MissingToolError
        ASTRA or a CUDA GPU is missing.
    """
    images, q = projection.check_images(images), rotations.check(quaternions)
    if len(q) != len(images) or len(q) == 0:
        raise InputError(
            f"wanted one quaternion an image, at least one; got {len(q)} and {len(images)}"
        )
    return Density(projection.astra_cgls(images, q, iterations), voxel_size_angstrom)
