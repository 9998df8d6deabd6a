"""One start: from random orientations to a map, coarse detail first."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from .. import accelerator, maps, rotations
from ..density import Density
from .coarse import Coarse
from .expectation import Expected, Sums, expect, slices_of, solve

__all__ = ["Schedule", "Start"]


@dataclass(frozen=True)
class Schedule:
    """How a start goes from coarse to fine.

    Attributes
    ----------
    rounds : int
    finest_angstrom : float
        Of the last, at best: it is a share of the particle's diameter, and 20 A at worst.
    images : (int, int)
        How many, at random, a round looks at: the first, and the last at most.
    orientations : (int, int)
        Of the grid: 24 and 15 degrees apart.
    """

    rounds: int = 60
    finest_angstrom: float = 10.0
    images: tuple[int, int] = (200, 2000)
    orientations: tuple[int, int] = (1000, 4608)

    @property
    def rising(self) -> int:
        """Rounds over which the resolution rises; the rest are at the finest."""
        return round(RISING * self.rounds)


DEFAULT = Schedule()
#: Share of the rounds over which the resolution rises, and where it begins, angstrom.
RISING, FIRST = 0.75, 60.0
#: Share of the last round's map that is kept meanwhile.
MOMENTUM = 0.5
#: The finest detail over the particle's diameter: what a grid of 15 degrees resolves at its rim.
DETAIL = 1 / 8
#: Resolution that is always gone to.
COARSEST = 20.0
#: A map that is begun with is used to here and no finer, angstrom; and the scales tried for it.
KNOWN, SCALES = 30.0, 2.0 ** np.arange(-3, 4)
#: No particle is taken for smaller, however little of it a map shows; angstrom.
LEAST_DIAMETER = FIRST / 2
#: Shifts are tried this far apart, over the resolution, and at least so far; angstrom.
STEP, LEAST_STEP = 1 / 6, 2.0
#: Steps finer than this are tried only about the known shift.
NEAR = 7.0
#: Orientations by which images are located, and the share of these that each round locates anew:
#: where an early map wanted them, they would stay.
LOCATING, ANEW = 1500, 1 / 8
#: Every so many rounds the maps, seen along z, are kept for a picture.
PICTURE = 6
#: Slices by which the power of a map is measured, and the least share of the images' that is noise.
SLICES, QUIETEST = 500, 0.1


class Start:
    """One start: the maps of its classes, and where each image has been found.

    Parameters
    ----------
    images : Coarse
    diameter_angstrom : float
        Of the ball that holds the particle, wherever it was shifted to.
    shift_angstrom : float
        How far off its centre a particle may be; 0: they are centred.
    seed : int
    classes : int
    schedule : Schedule

    Attributes
    ----------
    volumes : (c, m, m, m) array
    offsets_px : (n, 2) array
        Where particles were found, in pixels of ``images``.
    spread_px : float
        Standard deviation of the shifts along each axis, as far as they are known.
    noise : (g, k) array
        Its power; until the last rounds all that the images have.
    diameter_angstrom : float
        As the map shows it.
    resolution_angstrom : float
        Of the last round.
    """

    def __init__(
        self,
        images: Coarse,
        diameter_angstrom: float,
        shift_angstrom: float,
        seed: int,
        *,
        classes: int = 1,
        schedule: Schedule = DEFAULT,
    ) -> None:
        self.images, self.schedule = images, schedule
        self.widest_angstrom = self.diameter_angstrom = diameter_angstrom
        self.shift_px = shift_angstrom / images.pixel_size_angstrom
        self.rng = rotations.generator(seed, "ab initio")
        self.spread_px = max(self.shift_px / 2, 1e-3)
        self.offsets_px = np.zeros((len(images), 2))
        self.located = np.zeros(len(images), bool)
        self.thorough = False
        self.noise = self.images.power.copy()
        self.done = 0
        self.centre_px = np.zeros(3)
        self.history: list[tuple[float, np.ndarray]] = []
        self.resolution_angstrom = FIRST
        self.volumes = self._first(classes)

    def _first(self, classes: int) -> np.ndarray:
        """Back-projections of random images at random orientations."""
        images, schedule = self.images, self.schedule
        used = images.count(FIRST)
        n = min(len(images), classes * schedule.images[0])
        rows = self.rng.permutation(len(images))[:n]
        volumes = []
        for some in np.array_split(rows, classes):
            views = rotations.uniform(len(some), self.rng)
            part, sums = images.select(some), Sums(len(some), used)
            gain = self._gain(used)[part.group]
            transfer = gain if part.transfer is None else gain * part.transfer[:, :used]
            seen = part.values[:, :used] * gain * transfer
            xp = accelerator.arrays()
            identity = xp.eye(len(some), dtype=np.float32)
            sums.add(identity, xp.asarray(np.ascontiguousarray(seen).view(np.float32)))
            sums.add_weights(identity, xp.asarray(transfer**2))
            frequencies = images.slices.frequencies[:used]
            volumes.append(solve(sums, frequencies, views, images.box_px))
        return np.stack(volumes)

    def begin_with(self, density: Density) -> int:
        """Begin with a map, to 30 A, in place of random orientations.

        Its scale is what makes the images likeliest.

        Returns
        -------
        int
            Rounds that are saved.
        """
        images = self.images
        known = density.low_passed(KNOWN).sampled_as(images.box_px, images.pixel_size_angstrom)
        volume = (known.values * self.mask()).astype(np.float32)
        # Resolution rises linearly in its inverse: the round that has come to where the map ends.
        coarse, fine = 1 / FIRST, 1 / self.finest_angstrom
        progress = min(1.0, (1 / KNOWN - coarse) / (fine - coarse))
        self.done = min(round(progress * self.schedule.rising), self.schedule.rising - 1)
        self.resolution_angstrom = KNOWN
        few, _ = self.schedule.images
        rows = np.sort(self.rng.choice(len(images), min(few, len(images)), replace=False))
        grid = self.random_grid(self.schedule.orientations[0])
        seen = slices_of(volume, images.slices.frequencies[: images.count(KNOWN)], grid[:SLICES])
        ratio = images.power[:, : seen.shape[1]].mean() / float((abs(seen) ** 2).mean())
        tries = np.sqrt(ratio) * SCALES
        evidence = []
        for scale in tries:
            found = self.look(rows, grid, volumes=(scale * volume)[None])
            evidence.append(found.evidence.mean())
            self.located[:] = False  # by a map of another scale
        self.volumes = (tries[int(np.argmax(evidence))] * volume)[None]
        return self.done

    # ----------------------------------------------------------------------------------

    def on(self, images: Coarse) -> Start:
        """The same maps for other images, of which nothing is known: to place them once."""
        other = copy.copy(self)
        other.images, other.thorough = images, True
        other.offsets_px, other.located = np.zeros((len(images), 2)), np.zeros(len(images), bool)
        return other

    def joined(self, second: Start, images: Coarse) -> Start:
        """The maps of two starts for some images, to go on with, as classes."""
        other = self.on(images)
        other.volumes = np.concatenate([self.volumes, second.volumes])
        other.thorough, other.noise, other.history = False, self.noise.copy(), []
        sizes = [  # of a ball about the middle that holds either
            one.diameter_angstrom
            + 2 * float(np.linalg.norm(one.centre_px)) * images.pixel_size_angstrom
            for one in (self, second)
        ]
        other.diameter_angstrom = min(self.widest_angstrom, max(sizes))
        other.centre_px = np.zeros(3)
        return other

    def advance(self) -> None:
        """One round."""
        self.done += 1
        progress = min(1.0, self.done / self.schedule.rising)
        schedule, n = self.schedule, len(self.images)
        if progress >= 0.5 and progress < 1:
            self._look_at_map()
        finest = self.finest_angstrom
        coarse, fine = 1 / FIRST, 1 / finest
        self.resolution_angstrom = 1 / ((1 - progress) * coarse + progress * fine)
        few, many = (min(n, m * len(self.volumes)) for m in schedule.images)
        count = round(few * (many / few) ** progress)
        rows = np.sort(self.rng.choice(n, count, replace=False))
        few, many = schedule.orientations
        grid = self.random_grid(round(few * (many / few) ** progress))
        used, each = self.images.count(self.resolution_angstrom), len(grid)
        if progress >= 0.5:
            self.located &= self.rng.random(n) >= ANEW
        sums = Sums(len(self.volumes) * each, used)
        self.look(rows, grid, sums)
        if self.shift_px:
            found = np.sqrt(np.mean(self.offsets_px[rows] ** 2))
            self.spread_px = min(max(found, 1.0), self.shift_px / 2)
        if progress == 1:
            self._take_off_signal(grid[:SLICES], used)
        keep = MOMENTUM if progress < 1 else 0.0
        for c, volume in enumerate(self.volumes):
            one = sums.of(slice(c * each, (c + 1) * each))
            frequencies = self.images.slices.frequencies[:used]
            new = solve(one, frequencies, grid, self.images.box_px)
            self.volumes[c] = keep * volume + (1 - keep) * new
        if self.done % PICTURE == 0:
            self.history.append((self.resolution_angstrom, self.volumes.sum(axis=1)))

    def _gain(self, used: int, *, judged: bool = False) -> np.ndarray:
        """What whitens the noise; to judge starts, that of all that the images have."""
        power = self.images.power if judged else self.noise
        return np.sqrt(self.images.slices.weights[:used] / power[:, :used])

    def _take_off_signal(self, views: np.ndarray, used: int) -> None:
        """Take what the maps let expect off the images' power: what is left is noise."""
        frequencies, mask = self.images.slices.frequencies[:used], self.mask()
        slices = _slices_of_each(self.volumes * mask, frequencies, views)
        signal = accelerator.host((abs(slices) ** 2).mean(axis=0))
        shell = np.rint(np.linalg.norm(frequencies, axis=1)).astype(int)
        for g, power in enumerate(self.images.power):
            here = self.images.group == g
            left = signal
            if self.images.transfer is not None and here.any():
                left = signal * np.mean(self.images.transfer[here, :used] ** 2, axis=0)
            mean = np.bincount(shell, left) / np.maximum(np.bincount(shell), 1)
            self.noise[g, :used] = np.maximum(power[:used] - mean[shell], QUIETEST * power[:used])

    @property
    def finest_angstrom(self) -> float:
        """How fine the last rounds go."""
        limit = min(COARSEST, DETAIL * self.diameter_angstrom)
        return max(limit, self.schedule.finest_angstrom)

    def random_grid(self, orientations: int | None = None) -> Float[np.ndarray, "r 4"]:
        """Orientations spread evenly, turned at random: the lattice never shows in a map."""
        turns = rotations.uniform(2, self.rng)
        grid = rotations.grid(orientations or self.schedule.orientations[1])
        return rotations.multiply(rotations.multiply(turns[0], grid), turns[1])

    def look(
        self,
        rows: Int[np.ndarray, " m"],
        grid: Float[np.ndarray, "r 4"],
        sums: Sums | None = None,
        *,
        volumes: Float[np.ndarray, "c m m m"] | None = None,
        resolution_angstrom: float | None = None,
        judged: bool = False,
    ) -> Expected:
        """Find where some images lie, and keep their shifts.

        Parameters
        ----------
        rows : (m,) array of int
        grid : (r, 4) array, unit, xyzw
            Orientations that are tried; references are counted through them for each class in turn.
        sums : Sums, optional
            To which the images are added.
        volumes : (c, m, m, m) array, optional
            By default the maps as they are, within their mask.
        resolution_angstrom : float, optional
            By default that of the last round.
        judged : bool
            Maps are to be compared: all that the images have counts as noise, whatever each map
            explains of it.
        """
        finest = resolution_angstrom or self.resolution_angstrom
        part, used = self.images.select(rows), self.images.count(finest)
        if volumes is None:
            volumes = self.volumes * self.mask()
        frequencies = self.images.slices.frequencies[:used]
        references = _slices_of_each(volumes, frequencies, grid)
        gain = self._gain(used, judged=judged)
        steps = self._steps(near=False)
        near = self._steps(near=True)
        spread = self.spread_px
        if len(near) == len(steps):
            zero = np.zeros((len(rows), 2))
            found = expect(part, gain, zero, references, steps, sums, spread_px=spread, quick=False)
            self.offsets_px[rows] = steps[found.step]
            self.located[rows] = True
        else:
            lost = rows[~self.located[rows]]
            if len(lost):
                self._locate(lost, volumes)
            known = self.offsets_px[rows]
            found = expect(part, gain, known, references, near, sums, spread_px=spread, quick=True)
            moved = known + near[found.step]
            length = np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-9)
            self.offsets_px[rows] = moved * np.minimum(1, self.shift_px / length)
        return found

    def _locate(self, rows: Int[np.ndarray, " m"], volumes: Float[np.ndarray, "c m m m"]) -> None:
        """Find the shifts of some images, wherever they may be; by coarse detail, or by all."""
        orientations, finest = self.schedule.orientations[1], self.resolution_angstrom
        if not self.thorough:
            orientations, finest = min(orientations, LOCATING), max(finest, COARSEST)
        grid, used = self.random_grid(orientations), self.images.count(finest)
        frequencies = self.images.slices.frequencies[:used]
        references = _slices_of_each(volumes, frequencies, grid)
        zero, steps = np.zeros((len(rows), 2)), self._steps(near=False)
        found = expect(
            self.images.select(rows), self._gain(used), zero, references, steps, None,
            spread_px=self.spread_px, quick=False,
        )  # fmt: skip
        self.offsets_px[rows] = steps[found.step]
        self.located[rows] = True

    def _steps(self, *, near: bool) -> Float[np.ndarray, "s 2"]:
        """Shifts that are tried at this resolution, the first of them none; pixels."""
        if self.shift_px == 0:
            return np.zeros((1, 2))
        pixel = self.images.pixel_size_angstrom
        step = max(STEP * self.resolution_angstrom, LEAST_STEP)
        if not near:
            step = max(step, NEAR)
        elif step > NEAR:
            near = False
        radius = 1.5 * step / pixel if near else self.shift_px
        axis = np.arange(-int(radius * pixel / step), int(radius * pixel / step) + 1) * step / pixel
        grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
        length = np.linalg.norm(grid, axis=1)
        order = np.argsort(length, kind="stable")
        return grid[order[length[order] <= radius + 1e-9]]

    # ----------------------------------------------------------------------------------

    def mask(self) -> Float[np.ndarray, "m m m"]:
        """A soft ball about the particle."""
        n, pixel = self.images.box_px, self.images.pixel_size_angstrom
        axes = [np.arange(n) - n // 2 - c for c in self.centre_px[::-1]]
        z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
        radius = self.diameter_angstrom / 2 / pixel
        beyond = (np.sqrt(x**2 + y**2 + z**2) - radius) / max(2.0, 0.2 * radius)
        return (0.5 * (1 + np.cos(np.pi * np.clip(beyond, 0, 1)))).astype(np.float32)

    def _look_at_map(self) -> None:
        """How large the particle is, and where, as far as the map shows it."""
        pixel = self.images.pixel_size_angstrom
        n = self.images.box_px
        diameter, centre = 0.0, np.zeros(3)
        for volume in self.volumes:
            density = Density(volume * self.mask(), pixel)
            inside = maps.soft_mask(density, resolution_angstrom=self.resolution_angstrom) > 0.99
            at = np.argwhere(inside)[:, ::-1] - n // 2
            middle = (at.min(axis=0) + at.max(axis=0)) / 2
            size = 2 * np.linalg.norm(at - middle, axis=1).max() * pixel
            if size > diameter:
                diameter, centre = size, middle
        self.diameter_angstrom = min(self.widest_angstrom, max(diameter, LEAST_DIAMETER))
        self.centre_px = centre * (diameter < self.widest_angstrom)


def _slices_of_each(volumes: np.ndarray, frequencies: np.ndarray, grid: np.ndarray) -> Any:
    """Slices of each class in turn, one after the other."""
    slices = [slices_of(volume, frequencies, grid) for volume in volumes]
    return slices[0] if len(slices) == 1 else accelerator.arrays().concatenate(slices)
