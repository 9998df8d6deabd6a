"""The density from images at given orientations: least squares by conjugate gradients.

Minimise ``sum_i |a_i C_i S_i P_i V - y_i|^2 + ridge |V|^2`` with the projector ``P``, shifts ``S``,
CTFs ``C`` and contrasts ``a``. The normal operator is a convolution: its kernel is made once by a
type-1 NUFFT on a grid of twice the edge, after which an iteration costs two FFTs whatever the
number of images.
"""

from collections.abc import Callable

import numpy as np
import scipy.fft
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.sparse.linalg import LinearOperator, cg

from . import fourier, projection, rotations
from .density import Density
from .errors import InputError
from .imaging import check_images
from .particles import ParticleStack
from .symmetry import Group, group

__all__ = ["least_squares", "reconstruct", "reconstruct_astra"]


def reconstruct(
    stack: ParticleStack,
    *,
    symmetry: str = "C1",
    iterations: int = 30,
    ridge: float = 1e-4,
    progress: bool = False,
) -> Density:
    """Reconstruct a density by least squares.

    Parameters
    ----------
    stack : ParticleStack
        With orientations; its shifts, CTF and contrasts are used, and the noise, where optics
        groups differ in it. Images in files are read in chunks.
    symmetry : str
        The particle's point group, in the standard setting: each image is seen from every
        orientation of its orbit.
    iterations : int
        Of conjugate gradients, at most; early stopping is a regularisation too.
    ridge : float
        Relative to what all images together see of a frequency at Nyquist.
    progress : bool
        Show a bar.

    Returns
    -------
    Density
        Of the images' box and pixel size.
    """
    from tqdm.auto import tqdm

    stack.oriented()
    orbit = group(symmetry)
    right, kernel = _normal_equations(stack, orbit, progress)
    spectrum = scipy.fft.rfftn(scipy.fft.ifftshift(kernel), workers=fourier.WORKERS).real.copy()
    del kernel
    # A plane wave of frequency k is seen by n / (2 |k|) images, each of which gives `size` times
    # its squared contrast to the operator: n at Nyquist.
    seen = len(stack) if stack.contrast is None else float(np.sum(stack.contrast**2))
    damping = ridge * seen * orbit.order
    with tqdm(total=iterations, desc="conjugate gradients", disable=not progress) as bar:
        values = least_squares(
            right, spectrum, damping, iterations=iterations, rtol=1e-6, callback=bar.update
        )
    return Density(values, stack.pixel_size_angstrom)


def least_squares(
    right: Float[np.ndarray, "m m m"],
    spectrum: Float[np.ndarray, "2m 2m k"],
    damping: float,
    *,
    iterations: int,
    rtol: float,
    workers: int = fourier.WORKERS,
    callback: Callable[[], object] = lambda: None,
) -> Float[np.ndarray, "m m m"]:
    """Solve the normal equations of a reconstruction by conjugate gradients.

    Parameters
    ----------
    right : (m, m, m) array
        Back-projection of the images.
    spectrum : (2 m, 2 m, m + 1) array
        Of the normal operator's kernel: half of its transform, which is real.
    damping : float
        Added to the operator.
    iterations : int
    rtol : float
        Residual, relative to the right-hand side, at which to stop.
    workers : int
        Threads of the transforms.
    callback : callable
        Called after each iteration.
    """
    size, strength = len(right), np.float32(damping)

    def normal(v: np.ndarray) -> np.ndarray:
        padded = np.zeros((2 * size,) * 3, np.float32)
        padded[:size, :size, :size] = v.reshape(right.shape)
        transformed = scipy.fft.rfftn(padded, workers=workers, overwrite_x=True)
        transformed *= spectrum
        back = scipy.fft.irfftn(transformed, s=padded.shape, workers=workers, overwrite_x=True)
        return back[:size, :size, :size].ravel() + strength * v.ravel()

    values, _ = cg(
        LinearOperator((right.size, right.size), matvec=normal, dtype=np.float32),
        right.ravel(),
        rtol=rtol,
        maxiter=iterations,
        callback=lambda _: callback(),
    )
    return values.reshape(right.shape)


def _normal_equations(
    stack: ParticleStack, orbit: Group, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Back-projection of the images, (size,) * 3, and the normal operator's kernel, at twice it."""
    from tqdm.auto import tqdm

    size = stack.box_px
    slices = projection.Slices(size)
    weights = np.broadcast_to(slices.weights / size**2, (1, len(slices.weights)))
    if stack.noise is not None and len(stack.noise.power) > 1:
        # What all images have alike changes nothing but the meaning of the ridge.
        power = stack.noise.at(np.linalg.norm(slices.frequencies, axis=1) / size)
        weights = (weights * power.mean(axis=0) / power).astype(np.float32)
    right = np.zeros((size,) * 3, np.float32)
    kernel = np.zeros((2 * size,) * 3, np.float32)
    parts = slices.chunks(len(stack))
    for rows in tqdm(parts, desc="back-projection", unit="chunk", disable=not progress):
        part = stack.select(rows)
        y = slices.from_images(part.images[:])
        gain = (
            weights[stack.noise.of(part.optics_group)]
            if stack.noise and len(weights) > 1
            else weights
        )
        a = np.ones((1, 1), np.float32)
        if part.contrast is not None:
            a = part.contrast.astype(np.float32)[:, None]
        if part.shifts_px.any():
            y = y * np.exp(2j * np.pi / size * part.shifts_px @ slices.frequencies.T)
        ctf = part.ctf()
        if ctf is not None:
            a = a * ctf[:, *slices.index]
        y, squared = y * gain * a, np.broadcast_to(gain * a**2, y.shape)
        for g in orbit.elements:
            q = rotations.multiply(g, part.oriented())
            right += slices.backproject(y, q, size)
            kernel += slices.backproject(squared, q, size, modes=2 * size)
    return right, kernel


def reconstruct_astra(
    images: ArrayLike, quaternions: ArrayLike, *, voxel_size_angstrom: float, iterations: int = 30
) -> Density:
    """Reconstruct by ASTRA's CGLS on CUDA (no CTF, no shifts).

    Raises
    ------
    MissingToolError
        ASTRA or a CUDA GPU is missing.
    """
    images, q = check_images(images), rotations.check(quaternions)
    if len(q) != len(images) or len(q) == 0:
        raise InputError(
            f"wanted one quaternion an image, at least one; got {len(q)} and {len(images)}"
        )
    return Density(projection.astra_cgls(images, q, iterations), voxel_size_angstrom)
