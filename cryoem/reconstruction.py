"""The density from images at given orientations: least squares by conjugate gradients.

Minimise ``sum_i |a_i C_i S_i P_i V - y_i|^2 + |V|^2_prior`` over densities within a ball, with the
projector ``P``, shifts ``S``, CTFs ``C`` and contrasts ``a``. The prior is Wiener's, shell by
shell: noise over signal, both read off the images. The normal operator is a convolution: its kernel
is made once by a type-1 NUFFT on a grid of twice the edge, after which an iteration costs a few
FFTs whatever the number of images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Self

import numpy as np
import scipy.fft
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator, cg

from . import accelerator, fourier, projection, rotations, surveying, threads, workers
from .density import Density
from .errors import InputError
from .noise import Noise
from .particles import ParticleStack
from .projection import reconstruct_astra
from .symmetry import Group, exact_part, group, summed

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["kernel_edge", "least_squares", "reconstruct", "reconstruct_astra"]

#: The prior is at least so strong, over what all images see of a shell.
LEAST = 1e-4
#: Steps that are enough where there is noise, and where there is hardly any, above this SNR; and
#: what is left of the right-hand side when these end sooner.
NOISY, CLEAN, LOUD, LEFT = 12, 90, 30.0, 2e-5
#: Images in which noise is measured.
SURVEYED = 300
#: Frequencies that are laid down together, at least: each time a grid of twice the box, and a
#: quarter more, is transformed.
POINTS_AT_ONCE = 8_000_000
#: Bytes in which threads may lay down images beside each other.
TOGETHER = 1e8
#: How many times what is read, or laid down, at once a worker sums before it answers, at most.
SENT = 4
#: Width of the ball's soft edge, over the box.
EDGE = 1 / 32


def reconstruct(
    stack: ParticleStack,
    *,
    box_px: int | None = None,
    symmetry: str = "C1",
    iterations: int | None = None,
    ridge: float = 1.0,
    scheduler: str | Client | None = None,
    progress: bool = False,
) -> Density:
    """Reconstruct a density by least squares, within a ball that fills the box.

    Where the noise is louder than the particle, what few images have seen of a shell counts for
    less than what many have; each shell as a whole keeps its strength, so that half-maps and
    filters find the map unfiltered.

    Parameters
    ----------
    stack : ParticleStack
        With orientations; its shifts, CTF and contrasts are used, and its noise, which is measured
        in 300 of the images where it is unknown.
    box_px : int, optional
        Edge of the density, over the images' extent; smaller means coarser. Default: their box.
    symmetry : str
        The particle's point group, in the standard setting: each image is seen from all its orbit.
    iterations : int, optional
        Of conjugate gradients, at most; by default 12, and up to 90 of images of an SNR
        above 30, until the residual is 2e-5.
    ridge : float
        The prior is noise over signal, at most so many times what all images see of the shell.
    scheduler : str or distributed.Client, optional
        Whose workers back-project; see :func:`cryoem.orient`. Default: this process, all cores.
    progress : bool
        Show a bar.

    Returns
    -------
    Density, in a box of ``box_px`` voxels

    References
    ----------
    Scheres, J. Mol. Biol. 415 (2012), the prior.
    """
    from tqdm.auto import tqdm

    stack.oriented()
    if (iterations is not None and iterations < 1) or not ridge >= 0:
        got = f"got {iterations} and {ridge}"
        raise InputError(f"wanted at least one iteration, a ridge that is not negative; {got}")
    frame = stack.box_px
    if not 2 <= (size := frame if box_px is None else box_px) <= frame:
        raise InputError(f"box_px must lie between 2 and the images' {frame}, got {size}")
    sums, job = _back_projected(stack, size, group(symmetry), scheduler, progress)
    edge = len(sums.kernel)
    shells = _Shells(size, edge)
    # Of plane waves in the box: the kernel's own transform, cut off, is positive on average alone.
    weights = _transformed(sums.kernel, window=1 - np.abs(np.arange(edge) - edge // 2) / size)
    seen = shells.means(weights)
    if not seen.max() > 0:
        raise InputError("the images' contrasts, or their CTFs, are all zero: they show nothing")
    prior = np.clip(_noise_over_signal(sums, job), LEAST * seen, max(ridge, LEAST) * seen)
    kept = shells.means(weights, damping=prior)
    del weights
    spectrum = _transformed(sums.kernel)
    sums.kernel = np.empty((0, 0, 0), np.float32)  # it was the largest array of all
    left = 1e-6
    if iterations is None:
        iterations, left = (NOISY if _snr(sums, job, len(stack)) < LOUD else CLEAN), LEFT
    with tqdm(total=iterations, desc="conjugate gradients", disable=not progress) as bar:
        values = least_squares(
            sums.right, spectrum, prior, iterations=iterations, rtol=left, support=_ball(size),
            callback=bar.update,
        )  # fmt: skip
        bar.total = bar.n  # fewer were enough
    k = fourier.radius((size,) * 3, half=True)
    restored = scipy.fft.rfftn(values, workers=fourier.WORKERS)
    restored *= np.where(k < size / 2, 1 / np.interp(k, np.arange(len(kept)), kept), 0)
    restored *= size / frame  # lines of fewer voxels have the same sums
    restored = scipy.fft.irfftn(restored, s=values.shape, workers=fourier.WORKERS)
    return Density(restored, stack.pixel_size_angstrom * (frame / size))


def kernel_edge(size: int) -> int:
    """Edge of a normal operator's kernel: twice the box, or a little more, quick to transform."""
    return scipy.fft.next_fast_len(2 * size, real=True)


def _transformed(
    kernel: Float[np.ndarray, "e e e"], window: Float[np.ndarray, " e"] | None = None
) -> Float[np.ndarray, "e e k"]:
    """The real transform of a kernel, within a window along each axis."""
    if window is not None:
        w = np.maximum(window, 0).astype(np.float32)
        kernel = kernel * w[:, None, None] * w[:, None] * w
    moved = scipy.fft.ifftshift(kernel)
    return scipy.fft.rfftn(moved, workers=fourier.WORKERS, overwrite_x=True).real.copy()


def _ball(size: int) -> Float[np.ndarray, "m m m"]:
    """1 within the largest ball of a box, with a soft edge, 0 beyond."""
    radius = scipy.fft.fftshift(fourier.radius((size,) * 3))
    edge = max(1.0, EDGE * size)
    return np.clip((size / 2 - radius) / edge, 0, 1).astype(np.float32)


def least_squares(
    right: Float[np.ndarray, "m m m"],
    spectrum: Float[np.ndarray, "e e k"],
    damping: float | Float[np.ndarray, " shells"],
    *,
    iterations: int,
    rtol: float,
    support: Float[np.ndarray, "m m m"] | None = None,
    workers: int = fourier.WORKERS,
    callback: Callable[[], object] = lambda: None,
) -> Float[np.ndarray, "m m m"]:
    """Solve the normal equations of a reconstruction by conjugate gradients.

    Parameters
    ----------
    right : (m, m, m) array
        Back-projection of the images.
    spectrum : (e, e, e // 2 + 1) array
        Of the normal operator's kernel: half of its transform, which is real. Overwritten.
    damping : float or (shells,) array
        Added to the operator; of shells, from 0 to Nyquist, in cycles per box.
    iterations : int
    rtol : float
        Residual, relative to the right-hand side, at which to stop.
    support : (m, m, m) array, optional
        How large the density may be at each voxel, relative to others; 0: none.
    workers : int
        Threads of the transforms.
    callback : callable
        Called after each iteration.
    """
    size = len(right)
    edge = len(spectrum)
    # Both near 1, that products of them are not beyond single precision: by powers of two, exactly.
    peaks = (max(a.max(), -a.min()) for a in (right, spectrum))
    loud, strong = (2.0 ** int(np.frexp(peak)[1]) for peak in peaks)
    right, damping = right / loud, damping / strong
    spectrum /= strong
    if isinstance(damping, np.ndarray):
        _Shells(size, edge).add(spectrum, damping)
    else:
        spectrum += np.float32(damping)
    within = np.float32(1) if support is None else support
    convolved = accelerator.convolution(spectrum, size, workers=workers)

    def normal(v: np.ndarray) -> np.ndarray:
        return (within * convolved(within * v.reshape(right.shape))).ravel()

    values, _ = cg(
        LinearOperator((right.size,) * 2, matvec=normal, dtype=np.float32),
        (within * right).ravel(),
        rtol=rtol,
        maxiter=iterations,
        callback=lambda _: callback(),
    )
    return within * values.reshape(right.shape) * (loud / strong)


class _Shells:
    """The shells of a normal operator's spectrum, counted in cycles per box.

    In slabs: one array of that size is enough.
    """

    def __init__(self, size: int, edge: int) -> None:
        self.size, self.edge = size, edge
        self.count = size // 2 + 1

    def _slabs(self) -> Iterator[tuple[set[int], np.ndarray]]:
        """Planes of the spectrum, z and -z: their numbers, and their frequencies' lengths."""
        scale = self.size / self.edge
        axis = scale * fourier.frequencies(self.edge)
        half = scale * np.arange(self.edge // 2 + 1)
        plane = axis[:, None] ** 2 + half**2
        for z in range(self.edge // 2 + 1):
            yield {z, -z % self.edge}, np.sqrt(axis[z] ** 2 + plane)

    def means(
        self, spectrum: np.ndarray, *, damping: np.ndarray | None = None
    ) -> Float[np.ndarray, " shells"]:
        """Means over the shells to Nyquist; with a damping, of the share that it leaves."""
        total, number = np.zeros(self.count), np.zeros(self.count)
        for planes, k in self._slabs():
            here = k <= self.size / 2
            shell = np.minimum(np.rint(k[here]).astype(int), self.count - 1)
            for z in planes:
                values = spectrum[z][here]
                if damping is not None:
                    values = values / (values + damping[shell])
                total += np.bincount(shell, values, minlength=self.count)
            number += len(planes) * np.bincount(shell, minlength=self.count)
        found = total / number
        return np.maximum(found, LEAST * found.max())

    def add(self, spectrum: np.ndarray, damping: np.ndarray) -> None:
        """Add a damping in place; what is finer than its last shell has that of this."""
        for planes, k in self._slabs():
            more = np.interp(k, np.arange(len(damping)), damping)
            for z in planes:
                spectrum[z] += more


@dataclass
class _Sums:
    """What images say of a density.

    Attributes
    ----------
    right : (m, m, m) array
        Their back-projection.
    kernel : (e, e, e) array
        Of the normal operator; see :func:`kernel_edge`.
    power, transfer : (k,) array
        What the images have at each frequency of a slice beyond their noise, and how much of the
        particle they transfer.
    """

    right: np.ndarray
    kernel: np.ndarray
    power: np.ndarray
    transfer: np.ndarray

    @classmethod
    def of_nothing(cls, size: int, frequencies: int) -> Self:
        """Sums to add to."""
        right = np.zeros((size,) * 3, np.float32)
        kernel = np.zeros((kernel_edge(size),) * 3, np.float32)
        return cls(right, kernel, np.zeros(frequencies), np.zeros(frequencies))

    def add(self, other: _Sums) -> None:
        """Add those of other images in place."""
        self.right += other.right
        self.kernel += other.kernel
        self.power += other.power
        self.transfer += other.transfer


@dataclass(frozen=True, eq=False)
class _BackProjecting:
    """What images are back-projected with: at every orientation of one of each coset.

    Into a box of ``size``, from images of ``frame`` pixels; ``alone``: with nothing else beside it.
    """

    size: int
    frame: int
    noise: Noise | None
    others: list[np.ndarray]
    alone: bool = True

    @cached_property
    def slices(self) -> projection.Slices:
        return projection.Slices(self.size)

    @cached_property
    def loud(self) -> np.ndarray:
        """Power of the noise at each frequency, (groups, k)."""
        if self.noise is None:
            return np.zeros((1, len(self.slices.weights)))
        k = np.linalg.norm(self.slices.frequencies, axis=1) / self.frame
        return self.noise.at(k) * (self.size / self.frame) ** 2

    @cached_property
    def weights(self) -> np.ndarray:
        """What each frequency counts, (groups, k)."""
        same = np.broadcast_to(self.slices.weights / self.size**2, (1, len(self.slices.weights)))
        if len(self.loud) == 1:
            return same
        # What all images have alike changes nothing but the meaning of the ridge.
        return (same * self.loud.mean(axis=0) / self.loud).astype(np.float32)

    @property
    def at_once(self) -> int:
        """How many images are laid down together: they take no more memory than that grid."""
        return max(1, max(POINTS_AT_ONCE, 2 * self.size**3) // len(self.slices.weights))

    def beside(self, n: int) -> bool:
        """Whether each thread may lay down its share of so many images.

        Where there is room for the grids, what comes off them and the points: such grids are small,
        and a transform more of them is next to nothing.
        """
        edge, points = kernel_edge(self.size), len(self.slices.weights)
        grids = threads.count() * (8 * (1.25 * edge) ** 3 + 12 * edge**3)
        room = grids + 24 * min(self.at_once, n) * points
        return room < TOGETHER and not accelerator.gpu()

    def place(self, start: int, stack: ParticleStack) -> tuple[int, _Sums]:
        """Sums over a chunk's images."""
        sums = self._sums(stack.select(slice(self.at_once)))
        for i in range(self.at_once, len(stack), self.at_once):
            sums.add(self._sums(stack.select(slice(i, i + self.at_once))))
        return start, sums

    def _sums(self, stack: ParticleStack) -> _Sums:
        slices, size, shape = self.slices, self.size, (len(stack), len(self.slices.weights))
        y, squared = np.empty(shape, np.complex64), np.empty(shape, np.float32)
        sums = _Sums.of_nothing(size, shape[1])

        def fill(rows: slice) -> tuple[np.ndarray, np.ndarray]:
            y[rows], squared[rows], *powers = self._weighted(stack.select(rows))
            return powers[0], powers[1]

        each, parts = (threads.each, 4 * threads.count()) if self.alone else (map, 1)
        step = max(1, min(slices.at_once * size**2 // self.frame**2, len(stack) // parts))
        for power, transfer in each(fill, (slice(i, i + step) for i in range(0, len(stack), step))):
            sums.power += power
            sums.transfer += transfer
        edge = kernel_edge(size)
        for g in self.others:
            q = rotations.multiply(g, stack.oriented())
            sums.right += slices.backproject(y, q, size, alone=self.alone)
            sums.kernel += slices.backproject(squared, q, size, modes=edge, alone=self.alone)
        return sums

    def _weighted(
        self, part: ParticleStack
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What is back-projected, and the weights that it has; and the sums of the powers."""
        slices, size = self.slices, self.size
        y = slices.from_images(part.images[:])
        gain, loud, a = self.weights, self.loud, np.ones((1, 1), np.float32)
        if self.noise is not None and len(loud) > 1:
            groups = self.noise.of(part.optics_group)
            gain, loud = gain[groups], loud[groups]
        if part.contrast is not None:
            a = part.contrast.astype(np.float32)[:, None]
        if part.shifts_px.any():
            turn = 2 * np.pi / self.frame * part.shifts_px @ slices.frequencies.T
            y = y * np.exp(np.complex64(1j) * turn.astype(np.float32))
        ctf = part.ctf(at=slices.index_in(self.frame))
        if ctf is not None:
            a = a * ctf
        squared = np.broadcast_to(gain * a**2, y.shape)
        power = np.sum(gain * (np.abs(y) ** 2 - size**2 * loud), axis=0)
        return y * gain * a, squared, power, squared.sum(axis=0)


def _snr(sums: _Sums, job: _BackProjecting, images: int) -> float:
    """Power of the particle over that of the noise, in the frames."""
    noise = images * job.size**2 * float(np.sum(job.weights * job.loud, axis=1).mean())
    in_disc = np.pi / 4  # of a frame's frequencies; the particle has none beyond
    return in_disc * float(sums.power.sum()) / noise if noise > 0 else np.inf


def _noise_over_signal(sums: _Sums, job: _BackProjecting) -> Float[np.ndarray, " shells"]:
    """Wiener's prior, shell by shell to Nyquist; infinite where no signal is seen."""
    slices, nyquist = job.slices, job.size // 2
    shell = np.rint(np.linalg.norm(slices.frequencies, axis=1)).astype(int)

    def of_shells(values: np.ndarray) -> np.ndarray:
        return np.bincount(np.minimum(shell, nyquist), values, minlength=nyquist + 1)

    noise = of_shells(job.loud.mean(axis=0) * slices.weights)
    noise /= np.maximum(of_shells(slices.weights), 1)
    signal = of_shells(sums.power) / np.maximum(of_shells(sums.transfer), 1e-30) / job.size**3
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(signal > 0, noise / signal, np.inf)
    return np.where(noise > 0, ratio, 0)


def _back_projected(
    stack: ParticleStack, size: int, orbit: Group, scheduler: str | Client | None, progress: bool
) -> tuple[_Sums, _BackProjecting]:
    """Back-project the images, and see how loud they are."""
    from tqdm.auto import tqdm

    n = len(stack)
    stack = surveying.with_noise(stack, images=SURVEYED, loudest=np.inf)
    exact, others = exact_part(orbit)
    job = _BackProjecting(size, stack.box_px, stack.noise, others)
    sums = _Sums.of_nothing(size, len(job.slices.weights))
    at_once = job.at_once
    here: Callable[..., Iterable[tuple[int, _Sums]]] = map
    if scheduler is not None:
        most = max(at_once, SENT * job.slices.at_once * size**2 // stack.box_px**2)
        at_once = workers.shared_out(n, most, scheduler)
        job = replace(job, alone=False)  # a worker uses one core
    elif job.beside(n):
        # Each thread sums its images in their order: again and again to the last digit.
        at_once = workers.shared_out(n, max(1, at_once // threads.count()), None)
        job, here = replace(job, alone=False), partial(threads.each, ahead=1)
    parts = zip(range(0, n, at_once), stack.chunks(at_once), strict=True)
    with (
        contextlib.closing(workers.worked(job, parts, scheduler, here=here)) as worked,
        tqdm(total=n, desc="back-projection", unit="particle", disable=not progress) as bar,
    ):
        for start, more in worked:
            sums.add(more)
            bar.update(min(at_once, n - start))
    sums.right, sums.kernel = summed(sums.right, exact), summed(sums.kernel, exact)
    return sums, job
