"""The particle stack: images with all that is known of each. Every step takes it and returns it.

A stack comes from :func:`cryoem.simulate` or :func:`cryoem.read_particles`; the steps of the method
return it with more known: orientations, shifts, contrasts, expected errors. Images may be an array
or lie in files; what is asked for is read when it is asked for.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation

from . import imaging, rotations
from .errors import InputError
from .half_sets import particles_in, random_half_sets, split_particles
from .imaging import CtfParameters
from .lazy_images import Images, Premultiplied, Rows, changed, selected_images
from .noise import Noise
from .rotations import Seed

__all__ = [
    "PER_PARTICLE",
    "CtfParameters",
    "Images",
    "ParticleFile",
    "ParticleStack",
    "Rows",
    "random_half_sets",
]

#: Of a field with one row a particle: what selects particles selects its rows.
PER_PARTICLE = {"rows": True}


@dataclass(frozen=True, eq=False)
class ParticleFile:
    """What a particle file says beside its rows.

    Attributes
    ----------
    path : Path
    optics : dict of str to (g,) arrays
        The table of optics groups, with every column, in order.
    other_blocks : tuple of str
        The file's other blocks, as they stand.
    """

    path: Path
    optics: Mapping[str, np.ndarray]
    other_blocks: tuple[str, ...] = ()


#: Zeros, as many as there are particles.
ZEROS = cast(np.ndarray, None)


@dataclass(frozen=True, eq=False)
class ParticleStack:
    """Particle images and all that is known of each.

    Attributes
    ----------
    images : (n, size, size) array
        Or images in files (:class:`cryoem.io.stacks.ImageStack`), read where they are indexed.
    pixel_size_angstrom : float
    quaternions : (n, 4) array, unit, xyzw, or None
        Orientations; None: unknown.
    shifts_px : (n, 2) array, pixels
        Where each particle was moved to, (x, y): the opposite of a STAR file's origin, which is
        what centres it. By default zeros.
    ctf_parameters : CtfParameters or None
        None: images without a CTF.
    half_set : (n,) int array or None
        1 or 2, as in ``rlnRandomSubset``.
    optics_group : (n,) int array
        Row of the table of optics groups, from 0. By default zeros.
    contrast : (n,) array or None
        How strongly each image shows the density; None: all alike.
    expected_error_rad : (n,) array or None
        Mean angle by which each orientation is expected to be off.
    noise : Noise or None
    columns : dict of str to (n,) arrays
        Further columns of a particle file, by their names there, in order.
    origin : ParticleFile or None
        Where the stack was read from.
    made_from : tuple of Path
        Files of the images that these replaced, which no writer replaces.
    """

    images: Images = field(metadata=PER_PARTICLE)
    pixel_size_angstrom: float
    quaternions: Float[np.ndarray, "n 4"] | None = field(default=None, metadata=PER_PARTICLE)
    shifts_px: Float[np.ndarray, "n 2"] = field(default=ZEROS, metadata=PER_PARTICLE)
    ctf_parameters: CtfParameters | None = field(default=None, metadata=PER_PARTICLE)
    half_set: Int[np.ndarray, " n"] | None = field(default=None, metadata=PER_PARTICLE)
    optics_group: Int[np.ndarray, " n"] = field(default=ZEROS, metadata=PER_PARTICLE)
    contrast: Float[np.ndarray, " n"] | None = field(default=None, metadata=PER_PARTICLE)
    expected_error_rad: Float[np.ndarray, " n"] | None = field(default=None, metadata=PER_PARTICLE)
    noise: Noise | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict, metadata=PER_PARTICLE)
    origin: ParticleFile | None = None
    made_from: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        for f in fields(ParticleStack):
            object.__setattr__(self, f.name, self._checked(f.name, getattr(self, f.name)))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def box_px(self) -> int:
        """Edge of the images."""
        return self.images.shape[1]

    @property
    def optics_groups(self) -> int:
        """How many optics groups there are: those of the file, or up to the last that is used."""
        told = {} if self.origin is None else self.origin.optics
        return max(int(self.optics_group.max(initial=0)) + 1, *map(len, told.values()), 0)

    def _checked(self, name: str, value: Any) -> Any:
        """A field's value as it is kept, or what is wrong with it."""
        if name == "images":
            return imaging.check_stack(value)
        if name == "pixel_size_angstrom":
            kind = np.asarray(value).dtype.kind
            if kind not in "iuf" or np.ndim(value) or not 0 < value < np.inf:
                raise InputError(f"pixel_size_angstrom must be positive, got {value!r}")
            return float(value)
        n = len(self)
        kinds: dict[str, type] = {"noise": Noise, "ctf_parameters": CtfParameters}
        if name in kinds and not isinstance(value, kinds[name] | None):
            raise InputError(f"{name} must be {kinds[name].__name__} or None, got {value!r}")
        if name == "shifts_px":
            return _finite(name, np.zeros((n, 2)) if value is None else value, (n, 2))
        if name == "optics_group":
            value = np.zeros(n, int) if value is None else np.asarray(value)
            if value.shape != (n,) or value.dtype.kind not in "iu" or (value < 0).any():
                raise InputError(f"optics_group must hold {n} integers from 0, got {value!r}")
        elif name == "columns":
            value = {column: np.asarray(values) for column, values in (value or {}).items()}
            for column, values in value.items():
                if not re.fullmatch(r"[^\s\x00-\x1f\x7f\ud800-\udfff]+", column, re.ASCII):
                    raise InputError(f"columns: {column!r} is no name; wanted one without blanks")
                if values.shape != (n,):
                    raise InputError(f"column {column} must hold {n} values, got {values.shape}")
        elif value is None:
            return None
        elif name == "quaternions":
            value = rotations.check(value)
            if len(value) != n:
                raise InputError(
                    f"quaternions: wanted one quaternion an image; got {len(value)} and {n} images"
                )
        elif name == "ctf_parameters" and len(value) != n:
            if len(value) != 1:
                raise InputError(f"ctf_parameters must be of {n} images, got {len(value)}")
            value = value.select(np.zeros(n, int))
        elif name == "half_set":
            value = np.asarray(value)
            if value.shape != (n,) or not np.isin(value, (1, 2)).all():
                raise InputError(f"half_set must hold {n} values, 1 or 2, got {value!r}")
            value = value.astype(int)
        elif name in ("contrast", "expected_error_rad"):
            value = _finite(name, value, (n,))
        return value

    # ----------------------------------------------------------------------------------
    # Other stacks of the same particles, or of some of them

    def replace(self, **changes: object) -> Self:
        """The same stack with other values of some fields, which are checked."""
        new = copy.copy(self)
        for name, value in changes.items():
            if name not in {f.name for f in fields(self)}:
                raise InputError(f"a particle stack has no {name}")
            object.__setattr__(new, name, self._checked(name, value))
        if "images" in changes:
            object.__setattr__(new, "made_from", (*{*self.made_from, *files_of(self.images)},))
        if len(new) != len(self):
            raise InputError(f"images: wanted {len(self)}, one a particle, got {len(new)}")
        return new

    def extended(self, kind: type[Kind], **more: object) -> Kind:
        """Return this stack as one of a kind that knows more: all its fields, some new or replaced.

        Parameters
        ----------
        kind : subclass of ParticleStack
            Its own fields are taken as they are given.
        """
        names = {f.name for f in fields(ParticleStack)}
        known = self.replace(**{name: more[name] for name in more.keys() & names})
        new = object.__new__(kind)
        own = {name: more[name] for name in more.keys() - names}
        vars(new).update({name: getattr(known, name) for name in names} | own)
        return new

    def select(self, rows: Rows) -> Self:
        """Some of the particles, in the order of ``rows``; their images are not read.

        Parameters
        ----------
        rows : slice, or (m,) array of int or bool
        """
        if not isinstance(rows, slice):
            rows = np.asarray(rows)
            if rows.dtype == bool and rows.shape != (len(self),):
                raise InputError(f"rows must hold {len(self)} truth values, got {rows.shape}")
            rows = np.flatnonzero(rows) if rows.dtype == bool else rows
            if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
                raise InputError(f"rows must be a list of integers, got {rows.dtype} {rows.shape}")
            rows = rows.astype(int)
        new = copy.copy(self)
        object.__setattr__(new, "images", selected_images(self.images, rows))
        for f in fields(self):
            if "rows" in f.metadata and f.name != "images":
                object.__setattr__(new, f.name, _selected(getattr(self, f.name), rows))
        return new

    def chunks(self, size: int) -> Iterator[Self]:
        """The stack in parts of ``size`` particles, the last one shorter."""
        if size < 1:
            raise InputError(f"a chunk must hold at least one particle, got {size}")
        for start in range(0, len(self), size):
            yield self.select(slice(start, start + size))

    def with_poses(self, quaternions: ArrayLike, shifts_px: ArrayLike | None = None) -> Self:
        """The same particles at other orientations, and where given at other shifts."""
        moved = {} if shifts_px is None else {"shifts_px": shifts_px}
        return self.replace(quaternions=quaternions, **moved)

    def moved(
        self, quaternion: ArrayLike, shift_angstrom: ArrayLike, *, other_hand: bool = False
    ) -> Self:
        """The same particles after their density was turned, and then moved.

        Parameters
        ----------
        quaternion : (4,) array
            Turns the density.
        shift_angstrom : (3,) array, xyz
        other_hand : bool
            It was mirrored first.
        """
        q = self.oriented()
        q = rotations.multiply(quaternion, rotations.other_hand(q) if other_hand else q)
        # The images stay: what is seen of the density's move is no longer the particle's.
        matrices = Rotation.from_quat(q).as_matrix()
        seen = matrices[:, :, :2].transpose(0, 2, 1) @ np.asarray(shift_angstrom, np.float64)
        return self.with_poses(q, self.shifts_px - seen / self.pixel_size_angstrom)

    def without_poses(self) -> Self:
        """What a user has: the same particles, orientations, shifts and contrasts unknown."""
        return self.replace(
            quaternions=None, shifts_px=None, contrast=None, expected_error_rad=None
        )

    def with_images(self, images: ArrayLike, *, pixel_size_angstrom: float | None = None) -> Self:
        """The same particles in other images: cropped, centred or resampled.

        Shifts are kept in angstrom; what is kept of the noise is dropped where pixels change.
        """
        new = self.replace(images=images)
        if pixel_size_angstrom is None:
            return new
        scale = self.pixel_size_angstrom / pixel_size_angstrom
        return new.replace(
            pixel_size_angstrom=pixel_size_angstrom, shifts_px=self.shifts_px * scale, noise=None
        )

    def inverted(self) -> Self:
        """The same particles, black turned to white: images in files are turned as they are read.

        A particle file that names them says so in its column ``cryoemSign``.
        """
        images = changed(self.images, lambda some, _: imaging.flip_contrast(some), "inverted")
        return self.replace(images=images)

    def flattened(self) -> Self:
        """The same particles, each image's level and ramp taken off: in files, as they are read.

        See :func:`cryoem.imaging.flatten`.
        """
        images = changed(self.images, lambda some, _: imaging.flatten(some), "flattened")
        return self.replace(images=images)

    def divided(self) -> Self:
        """The same particles, premultiplied images divided by their CTF, in files as they are read.

        By its absolute value: they are then as if phase flipped, and their noise is as it was seen.
        What needs to know the noise does it by itself.
        """
        ctf = self.ctf_parameters
        if ctf is None or "premultiplied" not in (before := np.asarray(ctf.images)):
            return self
        by = Premultiplied(ctf, self.pixel_size_angstrom)
        images = changed(self.images, lambda some, i: by.select(i).divided(some), "divided", by)
        done = np.where(before == "premultiplied", "divided", before)
        return self.replace(images=images, ctf_parameters=replace(ctf, images=done))

    def with_half_sets(self, seed: Seed) -> Self:
        """The same particles in two halves: those that the stack has, else at random.

        Images of one particle (:func:`cryoem.half_sets.particles_in`) are put into one half, with a
        warning; so there is one where the halves that the stack has part them.
        """
        name = "the particles" if self.origin is None else self.origin.path
        particle = particles_in(self)
        known = len(np.unique(particle))
        if self.half_set is None:
            if known < len(self):
                warnings.warn(
                    f"{name}: {len(self):,} rows are of {known:,} particles, by their names, "
                    "places or pictures; those of one were put into one half",
                    stacklevel=2,
                )
            return self.replace(half_set=random_half_sets(len(self), seed, particle))
        if known < len(self) and len(both := split_particles(particle, self.half_set)):
            warnings.warn(
                f"{name}: {len(both):,} particles stand in both half-sets, such as those of rows "
                f"{both[0, 0] + 1} and {both[0, 1] + 1}: the halves are not independent, and agree "
                "further than the map can be believed",
                stacklevel=2,
            )
        return self

    def with_columns(self, columns: Mapping[str, ArrayLike]) -> Self:
        """The same particles with further columns, new or in place of those of the same name."""
        return self.replace(columns={**self.columns, **columns})

    # ----------------------------------------------------------------------------------

    def ctf(
        self, rows: Rows = slice(None), *, at: tuple[np.ndarray, np.ndarray] | None = None
    ) -> Float[np.ndarray, "m ..."] | None:
        """Contrast transfer functions of some particles, (m, size, size // 2 + 1), or None.

        By default of all, more than memory may hold. ``at``: those rows and columns alone, (m, k).
        """
        some = None if self.ctf_parameters is None else self.ctf_parameters.select(rows)
        return None if some is None else some.values(self.box_px, self.pixel_size_angstrom, at=at)

    def whitening(self) -> Float[np.ndarray, "*n y x"] | None:
        """What whitens the images' noise, or None: unknown, or white.

        (n, size, size // 2 + 1), or one for all where all optics groups have one noise. Whatever
        compares a whitened image with projections must whiten these too.
        """
        if self.noise is None or self.noise.is_white:
            return None
        gain = self.noise.whitening(self.box_px)
        return gain[0] if len(gain) == 1 else gain[self.noise.of(self.optics_group)]

    def oriented(self) -> Float[np.ndarray, "n 4"]:
        """The orientations, or ``InputError`` where they are unknown or there is no particle."""
        if len(self) == 0:
            raise InputError("wanted at least one image, got none")
        if self.quaternions is None:
            raise InputError("the particles have no orientations; see orient, or with_poses")
        return self.quaternions

    def half(self, number: int) -> Int[np.ndarray, " m"]:
        """The rows of half-set 1 or 2, at least one."""
        chosen = [] if self.half_set is None else self.half_set == number
        rows = np.flatnonzero(chosen)
        if len(rows) == 0:
            raise InputError(f"no particle is in half-set {number} (rlnRandomSubset); wanted both")
        return rows


Kind = TypeVar("Kind", bound=ParticleStack)


# --------------------------------------------------------------------------------------


def _selected(value: Any, rows: Rows) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {name: values[rows] for name, values in value.items()}
    return value.select(rows) if hasattr(value, "select") else value[rows]


def files_of(images: Any) -> tuple[Path, ...]:
    """The files that images lie in."""
    return tuple(layout.path for layout in getattr(images, "layouts", ()))


def _finite(name: str, values: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    found = np.asarray(values, np.float64)
    if found.shape != shape or not np.isfinite(found).all():
        raise InputError(f"{name} must be finite and have shape {shape}, got {found.shape}")
    return found
