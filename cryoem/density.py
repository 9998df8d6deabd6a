"""Densities: from atomic models, from and to MRC maps, resampled, and an exact phantom."""

from __future__ import annotations

import gzip
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation

from . import fourier
from .errors import InputError
from .io import files, stacks
from .io.files import PathLike
from .rotations import Seed

if TYPE_CHECKING:
    import gemmi

__all__ = [
    "Density",
    "Phantom",
    "from_atoms",
    "read_density",
    "read_structure",
    "write_density",
]


@dataclass(frozen=True)
class Density:
    """A density on a grid.

    Attributes
    ----------
    values : (nz, ny, nx) float32 array
        The origin is voxel ``n // 2`` on every axis.
    voxel_size_angstrom : float
    """

    values: Float[np.ndarray, "z y x"]
    voxel_size_angstrom: float

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float32)
        if values.ndim != 3 or 0 in values.shape:
            raise InputError(f"a density must have shape (nz, ny, nx), got {values.shape}")
        if not np.isfinite(values).all():
            raise InputError(
                f"a density must be finite: {np.sum(~np.isfinite(values))} values are not"
            )
        if not (np.isfinite(self.voxel_size_angstrom) and self.voxel_size_angstrom > 0):
            raise InputError(
                f"voxel_size_angstrom must be positive, got {self.voxel_size_angstrom}"
            )
        object.__setattr__(self, "values", values)

    @property
    def box_px(self) -> int:
        """Edge of the cube in voxels; ``InputError`` where the density is no cube."""
        if len(set(self.values.shape)) != 1:
            raise InputError(
                f"the density must be a cube here, got {self.values.shape}; wanted it padded to one"
            )
        return self.values.shape[0]

    @property
    def solvent_level(self) -> float:
        """The median of the outermost voxels, where there is no particle."""
        v = self.values
        faces = (v[0], v[-1], v[:, 0], v[:, -1], v[:, :, 0], v[:, :, -1])
        return float(np.median(np.concatenate([face.ravel() for face in faces])))

    def in_box(self, box_px: int) -> Density:
        """Return the density cropped or zero-padded about its origin to a cube of ``box_px``."""
        values = fourier.crop_or_pad(self.values, (box_px,) * 3)
        return Density(values, self.voxel_size_angstrom)

    def resampled(self, box_px: int) -> Density:
        """Return the density Fourier-resampled to ``box_px`` voxels over the same extent."""
        voxel_size = self.voxel_size_angstrom * self.box_px / box_px
        return Density(fourier.resize(self.values, box_px, 3), voxel_size)

    def sampled_as(self, box_px: int, voxel_size_angstrom: float) -> Density:
        """Return the density in another box of other voxels, its origin at the origin.

        The voxel size is right to 1e-3: boxes are whole, so an edge is sought that fits both.
        """
        n, ratio = max(self.values.shape), self.voxel_size_angstrom / voxel_size_angstrom
        edges = np.arange(n, n + 60)
        edge = int(edges[np.argmin(np.abs(np.round(edges * ratio) / (edges * ratio) - 1))])
        fine = self.in_box(edge).resampled(round(edge * ratio))
        return Density(fine.in_box(box_px).values, voxel_size_angstrom)

    def low_passed(self, resolution_angstrom: float, *, edge: float = 0.2) -> Density:
        """Return the density without what is finer than ``resolution_angstrom`` (soft edge)."""
        cutoff = self.box_px * self.voxel_size_angstrom / resolution_angstrom
        return Density(
            fourier.low_pass(self.values, 3, cutoff, edge=edge), self.voxel_size_angstrom
        )


# --------------------------------------------------------------------------------------
# Atomic models


def read_structure(path: PathLike, *, assembly: str | None = "1") -> gemmi.Model:
    """Read an atomic model, build its biological assembly and strip the waters.

    Parameters
    ----------
    path : path to a PDB or mmCIF file, gzipped or not
    assembly : str or None
        Name of the biological assembly; None, or a file that names none, takes all atoms as they
        stand.

    Returns
    -------
    gemmi.Model

    Raises
    ------
    InputError
        Not a structure, no atoms, an unknown assembly, or atoms of unknown element.
    """
    import gemmi

    path = files.existing(path)
    try:
        structure = gemmi.read_structure(str(path))
        if structure.input_format == gemmi.CoorFormat.Pdb and _is_old_pdb(path):
            structure = gemmi.read_pdb(str(path), max_line_length=72)
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        raise InputError(f"{path}: not a readable PDB or mmCIF file ({error})") from error
    if len(structure) == 0 or structure[0].count_atom_sites() == 0:
        raise InputError(f"{path}: holds no atoms; wanted a PDB or mmCIF atomic model")
    model = structure[0]
    if assembly is not None and len(structure.assemblies) > 0:
        names = [a.name for a in structure.assemblies]
        if assembly not in names:
            raise InputError(f"{path}: no assembly {assembly!r}; it has {', '.join(names)}")
        model = gemmi.make_assembly(
            structure.assemblies[names.index(assembly)],
            model,
            gemmi.HowToNameCopiedChain.AddNumber,
        )
    else:
        model = model.clone()
    model.remove_waters()
    if model.count_atom_sites() == 0:
        raise InputError(f"{path}: holds nothing but water")
    unknown = [a for c in model for r in c for a in r if a.element == gemmi.Element("X")]
    if unknown:
        raise InputError(
            f"{path}: {len(unknown)} atoms have no known element, the first is {unknown[0].name!r}"
        )
    return model


def _is_old_pdb(path: Path) -> bool:
    """Whether columns 73-80 hold the entry's name and a line number, as before 1996."""
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", errors="replace") as file:
        for line in file:
            if line.startswith("ATOM"):
                return line[72:76].strip().isalnum() and line[76:80].strip().isdigit()
    return False


def from_atoms(
    model: gemmi.Model,
    *,
    voxel_size_angstrom: float,
    resolution_angstrom: float | None = None,
    box_px: int | None = None,
) -> Density:
    """Density of an atomic model at a resolution, its centre of mass at the origin.

    Every atom is a sum of Gaussians (electron form factors) with the B factor
    ``8 pi^2 (0.225 d)^2`` of resolution ``d``, computed on a grid three times as fine and
    Fourier-cropped with a soft low-pass at Nyquist.

    Parameters
    ----------
    model : gemmi.Model
        See :func:`read_structure`.
    voxel_size_angstrom : float
    resolution_angstrom : float, optional
        Default: twice the voxel size, the finest that the grid can carry.
    box_px : int, optional
        Edge of the cube; by default the smallest even one that holds the particle with a margin.

    Returns
    -------
    Density

    Raises
    ------
    InputError
        The particle does not fit into the box, or the resolution is beyond Nyquist.
    """
    import gemmi

    d = 2 * voxel_size_angstrom if resolution_angstrom is None else resolution_angstrom
    if not voxel_size_angstrom > 0:
        raise InputError(f"the voxel size must be positive, got {voxel_size_angstrom:g} A")
    if not d >= 2 * voxel_size_angstrom:
        raise InputError(
            f"a resolution of {d:g} A is finer than voxels of {voxel_size_angstrom:g} A can carry; "
            f"wanted at least {2 * voxel_size_angstrom:g} A"
        )
    model = model.clone()
    positions = np.array([a.pos.tolist() for c in model for r in c for a in r])
    centre = np.array(model.calculate_center_of_mass().tolist())
    reach = np.linalg.norm(positions - centre, axis=1).max()
    # 0.225 d is the blur's standard deviation: 5 of them beyond the last atom on either side.
    compact = int(np.ceil(2 * (reach + 1.2 * d + 3) / voxel_size_angstrom / 2)) * 2
    box = compact if box_px is None else box_px
    if box < 2 * reach / voxel_size_angstrom:
        raise InputError(
            f"the particle is {2 * reach:.0f} A across and does not fit into a box of {box} voxels "
            f"of {voxel_size_angstrom} A; wanted a box of at least {compact}"
        )
    edge = compact * voxel_size_angstrom
    move = gemmi.Position(*(edge / 2 - centre))
    b_factor = 8 * np.pi**2 * (0.225 * d) ** 2
    for chain in model:
        for residue in chain:
            for atom in residue:
                atom.pos += move
                atom.b_iso = b_factor
                atom.aniso = gemmi.SMat33f(0, 0, 0, 0, 0, 0)
    calculator = gemmi.DensityCalculatorE()
    calculator.grid.unit_cell = gemmi.UnitCell(edge, edge, edge, 90, 90, 90)
    calculator.grid.spacegroup = gemmi.SpaceGroup("P1")
    calculator.grid.set_size(3 * compact, 3 * compact, 3 * compact)
    calculator.put_model_density_on_grid(model)
    fine = np.array(calculator.grid, copy=True).transpose(2, 1, 0)  # [x, y, z] to [z, y, x]
    fine = fourier.low_pass(fine, 3, compact / 2, edge=0.15)
    values = fourier.resize(fine, compact, 3)
    return Density(values, voxel_size_angstrom).in_box(box)


# --------------------------------------------------------------------------------------
# MRC maps


def read_density(path: PathLike, *, voxel_size_angstrom: float | None = None) -> Density:
    """Read an MRC map.

    Parameters
    ----------
    path : path to a ``.mrc`` or ``.map`` file, gzipped or not
    voxel_size_angstrom : float, optional
        Overrides the header.

    Returns
    -------
    Density
        In the file's own shape, which need not be a cube; the axes are brought into the order
        z, y, x; a header's origin or start is not used. What had to be assumed is said in a
        warning.

    Raises
    ------
    InputError
        Not an MRC file, truncated, not real, not finite, or without an isotropic voxel size.
    """
    import mrcfile

    path = files.existing(path)
    try:
        _check_header(path)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            with mrcfile.open(path, permissive=True) as mrc:
                header, data = mrc.header, mrc.data
                values = None if data is None else np.array(data)
                if values is not None and values.dtype == np.int8 and stacks.unsigned(header):
                    values = values.view(np.uint8)
    except (ValueError, OSError, EOFError, MemoryError, zlib.error) as error:
        raise InputError(f"{path}: not a readable MRC file ({error})") from error
    if values is None:
        raise InputError(
            f"{path}: not a whole MRC file ({notes[-1].message if notes else 'no data'})"
        )
    if values.ndim != 3:
        raise InputError(f"{path}: wanted a three-dimensional map, got shape {values.shape}")
    for note in notes:
        if issubclass(note.category, RuntimeWarning):  # mrcfile's own; others only passed by
            warnings.warn(f"{path}: {note.message}", stacklevel=2)
    angles = np.array([float(header.cellb[a]) for a in ("alpha", "beta", "gamma")])
    if (np.abs(angles[angles > 10] - 90) > 0.1).any():  # others say nothing
        raise InputError(f"{path}: cell angles of {angles} degrees; wanted a grid of right angles")
    order = tuple(int(header[name]) for name in ("mapc", "mapr", "maps"))
    if sorted(order) != [1, 2, 3]:
        warnings.warn(f"{path}: axis order {order} is none; read as 1, 2, 3", stacklevel=2)
    if sorted(order) == [1, 2, 3] and order != (1, 2, 3):
        # Array axes are (section, row, column); bring them to (z, y, x) = (3, 2, 1).
        axes = [order[::-1].index(axis) for axis in (3, 2, 1)]
        values = values.transpose(axes)
        warnings.warn(f"{path}: axis order {order} was brought to z, y, x", stacklevel=2)
    if voxel_size_angstrom is None:
        cell = np.array([header.cella[a] for a in "xyz"], dtype=float)
        samples = np.array([int(header[a]) for a in ("mx", "my", "mz")], dtype=float)
        sizes = np.divide(cell, samples, out=np.zeros(3), where=samples > 0)
        if not (np.isfinite(sizes).all() and (sizes > 0).all()):
            raise InputError(f"{path}: its header gives no voxel size; wanted {_TOLD}")
        if np.ptp(sizes) > 0.01 * sizes.mean():
            raise InputError(f"{path}: voxels must be cubes, got {sizes} A; wanted {_TOLD}")
        voxel_size_angstrom = _shortest(float(sizes.mean()), cell, samples)
        if not VOXELS_ANGSTROM[0] <= voxel_size_angstrom <= VOXELS_ANGSTROM[1]:
            low, high = VOXELS_ANGSTROM
            raise InputError(
                f"{path}: its header says voxels of {voxel_size_angstrom:g} A, of no map; wanted "
                f"{low:g} to {high:g} A, or {_TOLD}"
            )
    if int(header.ispg) == 0:
        warnings.warn(f"{path}: the header says a stack (ispg 0); read as one map", stacklevel=2)
    if starts := _starts(header, values.shape[::-1], voxel_size_angstrom):
        warnings.warn(f"{path}: {starts} is not used: its middle is the origin", stacklevel=2)
    try:
        return Density(values, voxel_size_angstrom)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


#: Voxels that maps of particles have.
VOXELS_ANGSTROM = (0.1, 100.0)
#: Who may tell the voxel size otherwise: the command line's option, the function's argument.
_TOLD = "it there, or told (--voxel-size, voxel_size_angstrom)"


def _starts(header: Any, shape: Sequence[int], voxel_size: float) -> str:
    """What a header says of where the map starts, unless that is 0 or puts 0 into the middle."""
    first = [int(header[f"n{axis}start"]) for axis in "xyz"]  # of columns, rows and sections
    edges = [int(header[f"n{axis}"]) for axis in "xyz"]
    if any(first) and (np.abs(first + np.array(edges) / 2) > 1).any():
        return f"the start of its header, voxel {first},"
    origin = [float(header.origin[axis]) for axis in "xyz"]
    off = np.array(origin) + np.array(shape) / 2 * voxel_size
    if any(origin) and not (np.abs(off) <= voxel_size).all():
        return f"the origin of its header, ({', '.join(f'{x:g}' for x in origin)}) A,"
    return ""


def _shortest(size: float, cell: np.ndarray, samples: np.ndarray) -> float:
    """The voxel size with the fewest digits that gives the header's cell, of single precision."""
    tries = (float(f"{size:.{digits}g}") for digits in range(1, 10))
    return next((t for t in tries if (np.float32(t * samples) == np.float32(cell)).all()), size)


def _check_header(path: Path) -> None:
    """Refuse a header that asks for more than the file can hold."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as file:
        # Deflate packs 1032 bytes into one at best.
        stacks.fitting(file.read(1024), path.stat().st_size * (1032 if packed else 1), path)


def write_density(path: PathLike, density: Density) -> None:
    """Write a density as an MRC map (mode 2, ispg 1), atomically."""
    import mrcfile

    with files.atomic(path) as temporary, mrcfile.new(temporary, overwrite=True) as mrc:
        mrc.set_data(density.values)
        mrc.voxel_size = density.voxel_size_angstrom
        mrc.set_volume()


# --------------------------------------------------------------------------------------
# The phantom


@dataclass(frozen=True)
class Phantom:
    """A sum of Gaussian blobs, whose density and projections are known exactly.

    Attributes
    ----------
    centres_angstrom : (m, 3) array, xyz
    sigmas_angstrom : (m,) array
    weights : (m,) array
        Peak value of each blob.
    """

    centres_angstrom: Float[np.ndarray, "m 3"]
    sigmas_angstrom: Float[np.ndarray, " m"]
    weights: Float[np.ndarray, " m"]

    @classmethod
    def random(
        cls,
        seed: Seed,
        *,
        blobs: int = 40,
        radius_angstrom: float = 60.0,
        sigma_angstrom: float = 9.0,
    ) -> Phantom:
        """Return an asymmetric phantom of ``blobs`` blobs within a ball."""
        rng = np.random.default_rng(seed)
        direction = rng.standard_normal((blobs, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        centres = direction * radius_angstrom * rng.random((blobs, 1)) ** (1 / 3)
        sigmas = sigma_angstrom * rng.uniform(0.8, 1.2, blobs)
        return cls(centres, sigmas, rng.uniform(0.5, 1.5, blobs))

    @staticmethod
    def _axis(box_px: int, voxel_size: float) -> np.ndarray:
        return (np.arange(box_px) - box_px // 2) * voxel_size

    def density(self, box_px: int, voxel_size_angstrom: float) -> Density:
        """Sample the density: a :class:`Density` of ``box_px`` voxels on an edge."""
        axis = self._axis(box_px, voxel_size_angstrom)
        # (m, box) profiles along each axis; a blob is their outer product.
        profiles = np.exp(
            -((axis - self.centres_angstrom[:, :, None]) ** 2)
            / (2 * self.sigmas_angstrom[:, None, None] ** 2)
        )
        x, y, z = profiles.transpose(1, 0, 2)
        return Density(
            np.einsum("m,mz,my,mx->zyx", self.weights, z, y, x, optimize=True), voxel_size_angstrom
        )

    def project(
        self, quaternions: ArrayLike, box_px: int, voxel_size_angstrom: float
    ) -> np.ndarray:
        """Exact projections in the units of :func:`cryoem.projection.project`.

        Returns
        -------
        (n, box_px, box_px) float64 array
        """
        axis = self._axis(box_px, voxel_size_angstrom)
        # Detector coordinates of the centres are R^T c.
        matrices = Rotation.from_quat(quaternions).as_matrix()
        centres = np.einsum("nij,mi->nmj", matrices, self.centres_angstrom)
        two_var = 2 * self.sigmas_angstrom[None, :, None] ** 2
        x = np.exp(-((axis - centres[:, :, :1]) ** 2) / two_var)
        y = np.exp(-((axis - centres[:, :, 1:2]) ** 2) / two_var)
        mass = self.weights * self.sigmas_angstrom * np.sqrt(2 * np.pi) / voxel_size_angstrom
        return np.einsum("m,nmy,nmx->nyx", mass, y, x, optimize=True)
