"""Aberrations of the microscope beyond the CTF's: phases by Zernike polynomials, magnification.

Antisymmetric phases (beam tilt, trefoil) and a magnification that is not the same along all axes
are undone on the images, as exactly as they were done: phases are turned, and the image's transform
is evaluated where its frequencies belong. Symmetric phases change the CTF.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial, isqrt
from typing import Literal

import numpy as np
import scipy.fft
from jaxtyping import Float
from numpy.typing import ArrayLike

from . import fourier, threads
from .errors import InputError

__all__ = ["Aberration", "beam_tilt", "zernike"]

Parity = Literal["odd", "even"]
#: Relative accuracy asked of the NUFFT.
ACCURACY = 1e-5
UNITY = (1.0, 0.0, 0.0, 1.0)


def _order(parity: Parity, index: int) -> tuple[int, int]:
    """The radial and the azimuthal order of a polynomial, as they are counted in a STAR file."""
    if parity == "even":
        k = isqrt(index)
        return 2 * k, 2 * (index - k * k - k)
    k = (isqrt(1 + 4 * index) - 1) // 2
    return 2 * k + 1, 2 * (index - k * k - k) - (2 * k + 1)


def zernike(
    parity: Parity, coefficients: ArrayLike, kx: ArrayLike, ky: ArrayLike
) -> Float[np.ndarray, "*n"]:
    """Sum Zernike polynomials of a spatial frequency.

    Parameters
    ----------
    parity : {'odd', 'even'}
    coefficients : (..., c) array, radians
        Of ``rlnOddZernike`` or ``rlnEvenZernike``: radial order by radial order, in each from the
        most negative azimuthal order (sines) to the most positive (cosines).
    kx, ky : arrays that broadcast to (y, x), or to (k,), 1/angstrom

    Returns
    -------
    (..., y, x) or (..., k) array, radians

    References
    ----------
    Zivanov, Nakane and Scheres, IUCrJ 7 (2020).
    """
    rho, phi = np.hypot(kx, ky), np.arctan2(ky, kx)
    coefficients = np.asarray(coefficients, np.float64)
    total = np.zeros((*coefficients.shape[:-1], *rho.shape))
    for index in np.flatnonzero(coefficients.any(axis=tuple(range(coefficients.ndim - 1)))):
        n, m = _order(parity, int(index))
        radial = np.zeros(rho.shape)
        for k in range((n - abs(m)) // 2 + 1):
            below = factorial(k) * factorial((n + m) // 2 - k) * factorial((n - m) // 2 - k)
            radial += (-1) ** k * factorial(n - k) / below * rho ** (n - 2 * k)
        term = radial * (np.cos(m * phi) if m >= 0 else np.sin(-m * phi))
        total += np.multiply.outer(coefficients[..., index], term)
    return total


def beam_tilt(
    x_mrad: float, y_mrad: float, spherical_aberration_mm: float, wavelength_angstrom: float
) -> Float[np.ndarray, " c"]:
    """Coefficients of odd Zernike polynomials that a tilt of the beam brings about, (6,) array.

    The phase is ``-2 pi Cs lambda^2 k^2 (k . tilt)``: axial coma.
    """
    scale = 2e4 * np.pi * spherical_aberration_mm * wavelength_angstrom**2 / 3
    x, y = -scale * x_mrad, -scale * y_mrad
    return np.array([2 * y, 2 * x, 0, y, x, 0])


@dataclass(frozen=True)
class Aberration:
    """What a microscope does to an image beyond the CTF: seen is ``exp(i phase(M k)) image(M k)``.

    Attributes
    ----------
    pixel_size_angstrom : float
    odd : tuple of float, radians
        Coefficients of the phase; see :func:`zernike`.
    magnification : (m00, m01, m10, m11)
        The matrix ``M``, as in ``rlnMagMat00`` and those after it; by default none.
    """

    pixel_size_angstrom: float
    odd: tuple[float, ...] = ()
    magnification: tuple[float, float, float, float] = UNITY

    def __post_init__(self) -> None:
        if not 0.5 < np.linalg.det(self.matrix) < 2:
            raise InputError(
                f"the magnification matrix must be near unity, got {self.magnification}"
            )

    @property
    def matrix(self) -> Float[np.ndarray, "2 2"]:
        """The magnification matrix."""
        return np.array(self.magnification, np.float64).reshape(2, 2)

    def undo(self, images: Float[np.ndarray, "n y x"]) -> Float[np.ndarray, "n y x"]:
        """Images as a microscope without the aberration sees them; their origin stays."""
        return self._turned(self._stretched(images, np.linalg.inv(self.matrix)), -1)

    def apply(self, images: Float[np.ndarray, "n y x"]) -> Float[np.ndarray, "n y x"]:
        """Images as this microscope sees those of one without: the inverse of :meth:`undo`."""
        return self._stretched(self._turned(images, 1), self.matrix)

    def _turned(self, images: np.ndarray, sign: int) -> np.ndarray:
        """The images, their phases turned."""
        if not any(self.odd):
            return images
        size = images.shape[-1]
        kx, ky = _frequencies(size)
        extent = size * self.pixel_size_angstrom
        phase = sign * zernike("odd", self.odd, kx / extent, ky / extent)
        # The Nyquist frequency has no sign: it cannot carry a phase.
        phase[2 * np.maximum(np.abs(kx), np.abs(ky)) == size] = 0
        return fourier.filtered(images, 2, np.exp(1j * phase).astype(np.complex64))

    def _stretched(self, images: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """Images whose transforms are those of these, about their origin, at ``matrix`` k."""
        if self.magnification == UNITY:
            return images
        import finufft

        size = images.shape[-1]
        kx, ky = _frequencies(size)
        at = 2 * np.pi / size * np.tensordot(matrix, np.stack([kx, ky]), 1)
        x, y = (np.ascontiguousarray(axis.ravel(), np.float32) for axis in at)
        spectra = finufft.nufft2d2(
            y,
            x,
            np.asarray(images, np.complex64),
            eps=ACCURACY,
            isign=-1,
            nthreads=threads.count(),
            showwarn=0,
        )
        # What would come from beyond the Nyquist frequency is not known.
        spectra = spectra.reshape(-1, *kx.shape) * (np.abs(at).max(axis=0) <= np.pi * (1 + 1e-6))
        found = scipy.fft.irfft2(spectra, s=(size, size), workers=fourier.WORKERS)
        return scipy.fft.fftshift(found, axes=(1, 2))


def _frequencies(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The frequencies x and y of ``rfft2``, cycles per box."""
    kx, ky = np.meshgrid(np.arange(size // 2 + 1), fourier.frequencies(size))
    return kx, ky
