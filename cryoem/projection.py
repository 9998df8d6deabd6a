"""Projections of a density: central slices on the CPU, ASTRA's projector on CUDA.

By the projection-slice theorem the transform of ``P(x, y) = integral of V(R (x, y, z)) dz`` is the
slice ``R (kx, ky, 0)`` of the density's transform. The slice is evaluated by a type-2 non-uniform
FFT (finufft) on the disc below Nyquist, and its adjoint by a type-1.
"""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Literal

import numpy as np
import scipy.fft
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation

from . import accelerator, fourier, rotations, threads
from .density import Density
from .errors import InputError, MissingToolError
from .imaging import check_images

__all__ = ["Projector", "backproject", "project"]

#: Relative accuracy asked of the NUFFT; the images are then off by about as much.
ACCURACY = 1e-4
#: Voxels on an edge up to which sums are laid down on the finer of finufft's grids: on the coarser
#: one the last digits of single precision are lost.
SMALL = 64
_POINTS_AT_ONCE = 4_000_000


class Slices:
    """The half of a central slice's frequencies that a real image needs.

    Parameters
    ----------
    box_px : int
    finest : float, optional
        No finer frequencies than this, cycles per box, and the coarsest first.

    Attributes
    ----------
    index : tuple of two (k,) int arrays
        Where each frequency sits in the array ``[ky, kx]`` of ``rfft2``.
    frequencies : (k, 2) array
        (kx, ky), cycles per box, ``kx >= 0``, within the disc below Nyquist.
    weights : (k,) array
        2 where the frequency stands for its conjugate too, else 1.
    """

    def __init__(self, box_px: int, finest: float | None = None) -> None:
        self.box_px = box_px
        radius = fourier.radius((box_px, box_px), half=True)
        self.index: tuple[np.ndarray, np.ndarray] = np.nonzero(radius < box_px / 2)  # type: ignore[assignment]
        if finest is not None:
            length = radius[self.index]
            order = np.argsort(length, kind="stable")
            order = order[(length[order] > 0) & (length[order] <= finest)]
            self.index = (self.index[0][order], self.index[1][order])
        ky, kx = fourier.frequencies(box_px)[self.index[0]], self.index[1].astype(float)
        self.frequencies = np.stack([kx, ky], axis=1)
        self.weights = np.where(kx > 0, 2.0, 1.0).astype(np.float32)

    def points(
        self,
        quaternions: ArrayLike,
        density_box_px: int,
        xp: ModuleType = np,
        each: Callable[..., Iterable[None]] = map,
    ) -> list[Any]:
        """Where slices lie in the density's transform: float32 arrays z, y, x in radians."""
        return slice_points(self.frequencies, quaternions, density_box_px, xp, each)

    def to_images(self, coefficients: np.ndarray) -> Float[np.ndarray, "n y x"]:
        """Turn (n, k) slice coefficients into (n, box, box) float32 images."""
        m = self.box_px
        spectra = np.zeros((len(coefficients), m, m // 2 + 1), np.complex64)
        ky, kx = self.index
        spectra[:, ky, kx] = coefficients
        images = scipy.fft.irfft2(spectra, s=(m, m), workers=fourier.WORKERS)
        return scipy.fft.fftshift(images, axes=(1, 2))

    def index_in(self, images_px: int) -> tuple[np.ndarray, np.ndarray]:
        """Where frequencies sit in ``rfft2`` of images of the same extent, of so many pixels."""
        return self.frequencies[:, 1].astype(int) % images_px, self.index[1]

    def from_images(self, images: ArrayLike) -> np.ndarray:
        """Turn images into (n, k) slice coefficients; larger ones are down-sampled to the box."""
        images = np.asarray(images, dtype=np.float32)
        if (edge := images.shape[-1]) < self.box_px:
            raise InputError(f"wanted images of {self.box_px} px or more, got {edge}")
        spectra = scipy.fft.rfft2(scipy.fft.ifftshift(images, axes=(1, 2)), workers=fourier.WORKERS)
        ky, kx = self.index_in(edge)
        found = spectra[:, ky, kx]
        return found if edge == self.box_px else found * np.float32((self.box_px / edge) ** 2)

    def backproject(
        self,
        coefficients: ArrayLike,
        quaternions: ArrayLike,
        density_box_px: int,
        *,
        modes: int | None = None,
        alone: bool = True,
    ) -> Float[np.ndarray, "z y x"]:
        """Adjoint of slicing a density: type-1 NUFFT of (n, k) slice coefficients.

        Parameters
        ----------
        coefficients : (n, k) array
        quaternions : (n, 4) array, unit, xyzw
        density_box_px : int
        modes : int, optional
            The number of voxels that come out on an edge; default: the density's box.
        alone : bool
            Nothing runs beside it: all threads sum, in any order.

        Returns
        -------
        (modes, modes, modes) float32 array
        """
        modes = density_box_px if modes is None else modes
        xp = accelerator.arrays()
        strengths = np.ascontiguousarray(coefficients, np.complex64).ravel()
        found = accelerator.nufft3d1(
            self.points(
                quaternions, density_box_px, xp, threads.each if alone and xp is np else map
            ),
            xp.asarray(strengths),
            (modes,) * 3,
            alone=alone,
            eps=ACCURACY,
            isign=+1,
            # The coarser of finufft's grids: sooner, and less memory, where that matters.
            upsampfac=2.0 if modes <= SMALL else 1.25,
        )
        return accelerator.host(found.real)

    @property
    def at_once(self) -> int:
        """Of how many images the slices fit into memory together."""
        return max(1, _POINTS_AT_ONCE // len(self.weights))

    def chunks(self, n: int) -> list[slice]:
        """Ranges of so many images."""
        step = self.at_once
        return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def slice_points(
    frequencies: Float[np.ndarray, "k 2"],
    quaternions: ArrayLike,
    density_box_px: int,
    xp: ModuleType = np,
    each: Callable[..., Iterable[None]] = map,
) -> list[Any]:
    """Where frequencies of slices lie in a density's transform: float32 z, y, x in radians.

    ``xp`` makes the arrays (:func:`cryoem.accelerator.arrays`); ``each`` maps over parts of them.
    """
    turned = xp.asarray(Rotation.from_quat(quaternions).as_matrix()[:, ::-1, :2])
    there = xp.asarray(frequencies) * (2 * np.pi / density_box_px)
    points = xp.empty((3, len(turned), len(frequencies)), np.float32)

    def fill(some: slice) -> None:
        points[:, some] = xp.einsum("nij,kj->ink", turned[some], there)

    step = max(1, _POINTS_AT_ONCE // (8 * max(1, len(frequencies))))
    for _ in each(fill, (slice(i, i + step) for i in range(0, len(turned), step))):
        pass
    return [axis.ravel() for axis in points]


class Projector:
    """Projects one density again and again.

    Parameters
    ----------
    density : Density, a cube
    box_px : int, optional
        Edge of the images, over the same extent: smaller than the density's box for down-sampled
        images, free of aliasing. Default: the density's box.
    """

    def __init__(self, density: Density, box_px: int | None = None) -> None:
        full = density.box_px
        box_px = full if box_px is None else box_px
        if not 2 <= box_px <= full:
            raise InputError(f"box_px must lie between 2 and the density's {full}, got {box_px}")
        # Coarse images need only the density's coarse part, but on a grid half again as fine:
        # the transform between its samples is then right to 1e-3.
        grid = min(full, 2 * int(np.ceil(0.75 * box_px)))
        self.box_px = box_px
        self.slices = Slices(box_px)
        self._volume = np.ascontiguousarray(density.resampled(grid).values, dtype=np.complex64)
        self._scale = np.float32(full * box_px**2 / grid**3)

    def project(self, quaternions: ArrayLike) -> Float[np.ndarray, "n y x"]:
        """Project at each orientation.

        Parameters
        ----------
        quaternions : (n, 4) array, unit, xyzw

        Returns
        -------
        (n, box_px, box_px) float32 array
            Line integrals in units of (density) x (the density's voxel size).
        """
        import finufft

        q = rotations.check(quaternions)
        images = np.empty((len(q), self.box_px, self.box_px), np.float32)
        plan = finufft.Plan(
            2,
            self._volume.shape,
            eps=ACCURACY,
            isign=-1,
            dtype="complex64",
            nthreads=threads.count(),
            showwarn=0,
        )
        for part in self.slices.chunks(len(q)):
            plan.setpts(*self.slices.points(q[part], self._volume.shape[0]))
            coefficients = plan.execute(self._volume).reshape(-1, len(self.slices.weights))
            images[part] = self.slices.to_images(coefficients * self._scale)
        return images


def project(
    density: Density,
    quaternions: ArrayLike,
    *,
    box_px: int | None = None,
    backend: Literal["nufft", "astra"] = "nufft",
) -> Float[np.ndarray, "n y x"]:
    """Project a density at many orientations: ``P(x, y) = integral of V(R (x, y, z)) dz``.

    Parameters
    ----------
    density : Density, a cube
    quaternions : (n, 4) array, unit, xyzw
    box_px : int, optional
        Edge of the images, over the same extent; smaller means down-sampled.
    backend : {'nufft', 'astra'}
        The CPU's central slices, or ASTRA's CUDA projector.

    Returns
    -------
    (n, box_px, box_px) float32 array
        Line integrals in units of (density) x (the density's voxel size).

    Raises
    ------
    InputError
        Wrong shapes, or an unknown backend.
    MissingToolError
        ASTRA was asked for where it or a CUDA GPU is missing.
    """
    if backend == "nufft":
        return Projector(density, box_px).project(quaternions)
    if backend == "astra":
        images = _astra_project(density, rotations.check(quaternions))
        return images if box_px is None else fourier.resize(images, box_px, 2)
    raise InputError(f"backend must be 'nufft' or 'astra', got {backend!r}")


def backproject(
    images: ArrayLike,
    quaternions: ArrayLike,
    *,
    backend: Literal["nufft", "astra"] = "nufft",
    voxel_size_angstrom: float = 1.0,
) -> Density:
    """Back-project images into a density: the adjoint of :func:`project` at equal boxes.

    Parameters
    ----------
    images : (n, size, size) array
    quaternions : (n, 4) array, unit, xyzw
    backend : {'nufft', 'astra'}
    voxel_size_angstrom : float

    Returns
    -------
    Density
        ``size`` voxels on an edge.
    """
    images, q = check_images(images), rotations.check(quaternions)
    if len(images) != len(q):
        raise InputError(f"{len(images)} images but {len(q)} quaternions")
    if backend == "astra":
        return Density(_astra_backproject(images, q), voxel_size_angstrom)
    if backend != "nufft":
        raise InputError(f"backend must be 'nufft' or 'astra', got {backend!r}")
    size = images.shape[1]
    slices = Slices(size)
    total = np.zeros((size,) * 3, np.float32)
    for part in slices.chunks(len(q)):
        coefficients = slices.from_images(images[part]) * (slices.weights / size**2)
        total += slices.backproject(coefficients, q[part], size)
    return Density(total, voxel_size_angstrom)


# --------------------------------------------------------------------------------------
# ASTRA


def _astra() -> ModuleType:
    """Import ASTRA with CUDA, or raise: without CUDA its 3D calls end the whole process."""
    try:
        import astra
    except ImportError as error:
        raise MissingToolError(
            "ASTRA is not installed: pip install 'cryoem[astra]', or use backend='nufft'"
        ) from error
    if not astra.use_cuda():
        raise MissingToolError(
            "ASTRA's 3D projector needs a CUDA GPU and none is there; use backend='nufft'"
        )
    return astra


def astra_vectors(quaternions: ArrayLike, box_px: int) -> Float[np.ndarray, "n 12"]:
    """ASTRA's ``parallel3d_vec`` geometry of this package's convention: an (n, 12) array.

    Rows are the ray direction, the detector's centre and the steps to the next column and the next
    row. ASTRA's origin is the middle of the grid, half a voxel off ours at even boxes.
    """
    x, y, z = np.moveaxis(Rotation.from_quat(quaternions).as_matrix(), 2, 0)
    offset = 0.5 if box_px % 2 == 0 else 0.0
    centre = offset * (1.0 - x - y)
    return np.concatenate([z, centre, x, y], axis=1)


def _astra_geometries(astra: ModuleType, quaternions: ArrayLike, box_px: int) -> tuple[Any, Any]:
    return (
        astra.create_proj_geom(
            "parallel3d_vec", box_px, box_px, astra_vectors(quaternions, box_px)
        ),
        astra.create_vol_geom(box_px, box_px, box_px),
    )


def _astra_project(density: Density, q: np.ndarray) -> np.ndarray:
    astra = _astra()
    projections, volume = _astra_geometries(astra, q, density.box_px)
    handle, sinogram = astra.create_sino3d_gpu(density.values, projections, volume)
    astra.data3d.delete(handle)
    return np.ascontiguousarray(sinogram.transpose(1, 0, 2))  # from [row, image, column]


def _astra_backproject(images: np.ndarray, q: np.ndarray) -> np.ndarray:
    astra = _astra()
    projections, volume = _astra_geometries(astra, q, images.shape[1])
    sinogram = np.ascontiguousarray(images.transpose(1, 0, 2))
    handle, values = astra.create_backprojection3d_gpu(sinogram, projections, volume)
    astra.data3d.delete(handle)
    return values


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
    astra = _astra()
    projections, volume = _astra_geometries(astra, q, images.shape[1])
    sinogram = np.ascontiguousarray(images.transpose(1, 0, 2))
    data = astra.data3d.create("-sino", projections, sinogram)
    result = astra.data3d.create("-vol", volume)
    config = astra.astra_dict("CGLS3D_CUDA")
    config["ProjectionDataId"], config["ReconstructionDataId"] = data, result
    algorithm = astra.algorithm.create(config)
    try:
        astra.algorithm.run(algorithm, iterations)
        return Density(astra.data3d.get(result), voxel_size_angstrom)
    finally:
        astra.algorithm.delete(algorithm)
        astra.data3d.delete([data, result])
