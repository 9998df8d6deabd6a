"""The least-squares problem of images against a density's slices, and how it is descended.

With white noise the most likely rotation and shift minimise ``|y - a S_t C P_R V|^2`` with the best
contrast ``a`` put in, which is known in closed form (variable projection). The slope of a slice
``V^(R (kx, ky, 0))`` in a rotation vector ``w`` (``R exp([w])``) follows from the gradient of
``V^``, the transforms of ``x V``, ``y V`` and ``z V``, which one NUFFT plan evaluates with ``V``
itself.
"""

from __future__ import annotations

import threading

import numpy as np
import scipy.fft
from scipy.spatial.transform import Rotation

from .. import fourier, rotations
from ..density import Density

__all__ = ["LeastSquares", "SlicesWithGradient", "descend_each"]

#: The longest step, radians and pixels.
LONGEST = 0.15, 2.0
#: A step that would gain less than this, in twice the logarithm of the likelihood, is the last.
LITTLE = 2e-3
#: Relative accuracy asked of the NUFFT: a kernel of four nodes. Of noiseless images it costs 1e-5
#: rad.
ACCURACY = 4e-3
#: How much finer than the density's transform needs the grid is in which it is looked up.
UPSAMPLED = 1.25
#: Nodes that hold the kernel, and points between two of them at which it is sampled.
KERNEL, BETWEEN = 16, 8


def _trimmed(values: np.ndarray, lost: float = 1e-7) -> np.ndarray:
    """The smallest centred cube that holds all but ``lost`` of the energy: smaller transforms."""
    n = values.shape[0]
    reach = np.abs(np.arange(n) - n // 2)
    energy = np.zeros(n // 2 + 1)
    cube = np.maximum(np.maximum(reach[:, None, None], reach[:, None]), reach)
    np.add.at(energy, cube.ravel(), values.ravel().astype(float) ** 2)
    beyond = energy.sum() - np.cumsum(energy)
    half = int(np.argmax(beyond <= lost * energy.sum())) + 1
    return fourier.crop_or_pad(values, (min(n, 2 * half),) * 3)


class SlicesWithGradient:
    """Slices of a density's transform and of its gradient, looked up in what is transformed once.

    Safe to use from several threads; sent to another process as what it is made of.
    """

    def __init__(self, density: Density, frequencies: np.ndarray, box_px: int) -> None:
        self._made_of = density, frequencies, box_px
        full = density.box_px
        values = _trimmed(density.values)
        extent = values.shape[0]
        limit = float(np.linalg.norm(frequencies, axis=1).max())
        # As in projection.Projector: a grid half again as fine as the frequencies need.
        grid = min(extent, 2 * int(np.ceil(1.5 * limit * extent / full)))
        values = fourier.resize(values, grid, 3)
        step = extent / grid  # voxels of the density
        axis = ((np.arange(grid) - grid // 2) * step).astype(np.float32)
        values = values * np.float32(step**3 * (box_px / full) ** 2)
        slope = np.complex64(-2j * np.pi / full)
        fine = 2 * scipy.fft.next_fast_len(max(int(np.ceil(UPSAMPLED * grid / 2)), KERNEL // 2))
        kernel = _kernel_transform(grid, fine)
        self._transforms = np.zeros((4, fine, fine, fine), np.complex64)
        places = (-(grid // 2) + np.arange(grid)) % fine
        for new, by in zip(
            self._transforms,
            (1.0, slope * axis, slope * axis[:, None], slope * axis[:, None, None]),
            strict=True,
        ):
            new[np.ix_(places, places, places)] = by * values / kernel
            new[:] = scipy.fft.fftn(new, workers=fourier.WORKERS, overwrite_x=True)
        self._frequencies = (2 * np.pi * step / full * frequencies.T).astype(np.float32)  # (2, k)
        self._plans = threading.local()  # a plan keeps the points that it was given

    def __reduce__(self) -> tuple[type[SlicesWithGradient], tuple[Density, np.ndarray, int]]:
        return SlicesWithGradient, self._made_of

    def at(self, matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slices (n, k) at rotations (n, 3, 3), and their gradients (3, n, k), detector frame."""
        import finufft

        n = len(matrices)
        if not hasattr(self._plans, "plan"):
            self._plans.plan = finufft.Plan(
                2, self._transforms.shape[1:], 4,
                eps=ACCURACY, isign=-1, dtype="complex64", nthreads=1, showwarn=0,
                upsampfac=UPSAMPLED, spreadinterponly=1,
            )  # fmt: skip
        m = matrices.astype(np.float32)
        points = m[:, :, :2].transpose(1, 0, 2) @ self._frequencies  # (3, n, k), x y z
        x, y, z = points.reshape(3, -1)
        self._plans.plan.setpts(z, y, x)
        found = self._plans.plan.execute(self._transforms).reshape(4, n, -1)
        # Density coordinates to detector coordinates: R^T.
        gradient = np.einsum("nij,ink->jnk", m, found[1:])
        return found[0], gradient


def _kernel_transform(grid: int, fine: int) -> np.ndarray:
    """The transform of finufft's kernel, (grid, grid, grid): what looking up multiplies by.

    The kernel is laid on a small cube about points between two nodes in turn: the mean over them
    is without what a single one would alias. Its zero is at the middle of the fine grid.
    """
    import finufft

    k, origin = np.arange(grid) - grid // 2, np.zeros(1, np.float32)
    line = np.zeros(grid, complex)
    for between in np.arange(BETWEEN, dtype=np.float32) / BETWEEN:
        cube = finufft.nufft3d1(
            origin, origin, 2 * np.pi / KERNEL * between[None], np.ones(1, np.complex64),
            (KERNEL,) * 3, eps=ACCURACY, isign=-1, nthreads=1, showwarn=0,
            upsampfac=UPSAMPLED, spreadinterponly=1,
        )  # fmt: skip
        at = np.arange(KERNEL) - KERNEL // 2 - between
        line += np.exp(-2j * np.pi / fine * np.outer(k, at)) @ cube[KERNEL // 2, KERNEL // 2]
    line *= (-1.0) ** k / BETWEEN
    return (line[:, None, None] * line[:, None] * line).astype(np.complex64)


class LeastSquares:
    """The least-squares problem of some particles, up to one frequency limit."""

    def __init__(
        self,
        slices: SlicesWithGradient,
        frequencies: np.ndarray,
        weights: np.ndarray,
        observed: np.ndarray,
        ctf: np.ndarray | None,
        box_px: int,
        least_contrast: float,
    ) -> None:
        self.slices, self.observed, self.ctf = slices, observed, ctf
        self.least_contrast = least_contrast
        self._kx, self._ky = frequencies.T.astype(np.float32)
        self._turn = np.complex64(-2j * np.pi / box_px)
        # Parseval: sums over these are sums over pixels.
        self.samples = float(weights.sum())
        self._box_px = box_px
        self._root = np.sqrt(weights).astype(np.float32) / box_px

    def _columns(self, who: np.ndarray, q: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        """Model, its five slopes and image at every frequency, (m, 7, k)."""
        value, gradient = self.slices.at(Rotation.from_quat(q).as_matrix())
        kx, ky = self._kx, self._ky
        phase = np.exp(
            -self._turn
            * (shifts[:, :1].astype(np.float32) * kx + shifts[:, 1:].astype(np.float32) * ky)
        )
        columns = np.empty((len(q), 7, len(kx)), np.complex64)
        columns[:, 0] = value
        # w x k for the three unit vectors w: (0, 0, ky), (0, 0, -kx), (-ky, kx, 0).
        columns[:, 1] = ky * gradient[2]
        columns[:, 2] = -kx * gradient[2]
        columns[:, 3] = kx * gradient[1] - ky * gradient[0]
        columns[:, 4] = self._turn * kx * value
        columns[:, 5] = self._turn * ky * value
        if self.ctf is not None:
            columns[:, :6] *= self.ctf[who][:, None]
        # The shift is taken out of the image, not put into the model.
        columns[:, 6] = self.observed[who] * phase
        columns *= self._root
        return columns

    def gram(self, who: np.ndarray, q: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        """Inner products of model, its five slopes and image: (m, 7, 7), float64."""
        real = self._columns(who, q, shifts).view(np.float32)
        return (real @ real.transpose(0, 2, 1)).astype(np.float64)

    def residuals(self, q: np.ndarray, shifts: np.ndarray, contrast: np.ndarray) -> np.ndarray:
        """What is left of every particle's image, (m, k): squares, as variances per pixel."""
        columns = self._columns(np.arange(len(q)), q, shifts)
        left = columns[:, 6] - contrast[:, None].astype(np.float32) * columns[:, 0]
        return np.abs(left) ** 2 / (self._root * self._box_px) ** 2

    def normal(self, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Gain (m,), contrast (m,), normal matrix (m, 5, 5) and slope (m, 5) of the best contrast.

        Gain is ``|y|^2 - |y - a M|^2``.
        """
        mm, my = gram[:, 0, 0], gram[:, 0, 6]
        safe = np.where(mm > 0, mm, 1)
        a = np.maximum(my / safe, self.least_contrast)
        dm, dd = gram[:, 1:6, 0], gram[:, 1:6, 1:6]
        gain = 2 * a * my - a**2 * mm
        slope = a[:, None] * (gram[:, 1:6, 6] - a[:, None] * dm)
        matrix = dd - dm[:, :, None] * dm[:, None] / safe[:, None, None]
        return gain, a, a[:, None, None] ** 2 * matrix, slope


def descend_each(
    fit: LeastSquares,
    owner: np.ndarray,
    q: np.ndarray,
    shifts: np.ndarray,
    steps: int,
    short: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levenberg-Marquardt: (q, shifts, gram) of every particle; gram as before its last step."""
    n = len(q)
    q, shifts = q.copy(), shifts.copy()
    gram = fit.gram(owner, q, shifts)
    damping = np.full(n, 1e-2)
    active = np.arange(n)
    for _ in range(steps):
        gain, _, matrix, slope = fit.normal(gram[active])
        diagonal = np.einsum("nii->ni", matrix)
        diagonal = diagonal + 1e-9 * diagonal.max(axis=1, keepdims=True) + 1e-30
        damped = matrix.copy()
        np.einsum("nii->ni", damped)[:] = diagonal * (1 + damping[active, None])
        step = np.linalg.solve(damped, slope[..., None])[..., 0]
        lengths = np.linalg.norm(step[:, :3], axis=1), np.linalg.norm(step[:, 3:], axis=1)
        over = np.maximum(lengths[0] / LONGEST[0], lengths[1] / LONGEST[1])
        step /= np.maximum(1, over)[:, None]
        moved = rotations.perturb(q[active], step[:, :3]), shifts[active] + step[:, 3:]
        # What is still to be gained, beside the noise of one pixel. The last step is not looked at.
        noise = (gram[active, 6, 6] - gain) / fit.samples
        last = (lengths[0] < short[0]) & (lengths[1] < short[1])
        last |= np.einsum("ni,ni->n", step, slope) < LITTLE * noise
        ended = active[last]
        q[ended], shifts[ended] = moved[0][last], moved[1][last]
        active, gain, moved = active[~last], gain[~last], (moved[0][~last], moved[1][~last])
        if len(active) == 0:
            break
        tried = fit.gram(owner[active], *moved)
        better = fit.normal(tried)[0] >= gain - 1e-6 * tried[:, 6, 6]
        taken = active[better]
        q[taken], shifts[taken], gram[taken] = moved[0][better], moved[1][better], tried[better]
        damping[active] *= np.where(better, 0.2, 10.0)
        active = active[damping[active] < 1e4]
        if len(active) == 0:
            break
    return q, shifts, gram
