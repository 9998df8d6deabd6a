"""Atomic models by name: those that ship in ``data/``, and any PDB entry from the network."""

from __future__ import annotations

import string
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import density
from .density import Density
from .errors import DownloadError, InputError
from .io import files
from .io.files import PathLike
from .symmetry import SOLIDS, Group, group

if TYPE_CHECKING:
    import gemmi

__all__ = ["SHIPPED", "Particle", "fetch", "load", "load_density", "standard"]

DATA = Path(__file__).resolve().parent.parent / "data"

#: Where a PDB entry comes from; ``{id}`` is its lower-case name.
PDB_URL = "https://files.rcsb.org/download/{id}.cif.gz"


@dataclass(frozen=True)
class Particle:
    """A particle that ships with the project.

    Attributes
    ----------
    title : str
    filenames : tuple of str
        In ``data/``; several files are the chains of one model.
    assembly : str or None
    symmetry : str
        Point group, in the standard setting of :func:`load`'s model.
    """

    title: str
    filenames: tuple[str, ...]
    assembly: str | None
    symmetry: str


#: The particles in ``data/``.
SHIPPED = {
    "4jsv": Particle("mTOR kinase with mLST8, 147 kDa", ("4JSV.pdb.gz",), "1", "C1"),
    "1i10": Particle(
        "human lactate dehydrogenase, 146 kDa",
        tuple(f"1i10_{chain}.pdb.gz" for chain in "ABCD"),
        None,
        "D2",
    ),
}


def shipped_file(filename: str) -> Path:
    """Path to a file of ``data/``, its hash checked against ``data/SHA256SUMS``."""
    if not (DATA / "SHA256SUMS").is_file():
        raise InputError(
            f"{DATA}: the shipped data is not here; install from a clone of the repository, "
            "with pip install -e ."
        )
    lines = (DATA / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split() for line in lines)}
    if filename not in sums:
        raise InputError(f"data/{filename} is not listed in data/SHA256SUMS")
    path = files.existing(DATA / filename)
    if (found := files.sha256(path)) != sums[filename]:
        raise InputError(
            f"data/{filename} is not the file that was shipped: "
            f"SHA-256 {found}, wanted {sums[filename]}"
        )
    return path


def load(name: str, *, assembly: str | None = "1", symmetry: str | None = None) -> gemmi.Model:
    """Load a particle's atomic model.

    Parameters
    ----------
    name : str
        A shipped particle (``"4jsv"``, ``"1i10"``), a path to a PDB or mmCIF file, or a PDB id,
        which is fetched from the network and cached.
    assembly : str or None
        The biological assembly of a file or an entry, see :func:`cryoem.density.read_structure`;
        that of a shipped particle is fixed.
    symmetry : str, optional
        Bring the model into the standard setting of this group, see :func:`standard`; that of a
        shipped particle is its own.

    Returns
    -------
    gemmi.Model
        The biological assembly without waters.

    Raises
    ------
    InputError
        Neither a shipped name, nor a file, nor a PDB id.
    """
    name = str(name)
    if name.lower() in SHIPPED:
        particle = SHIPPED[name.lower()]
        paths = [shipped_file(f) for f in particle.filenames]
        model = density.read_structure(paths[0], assembly=particle.assembly)
        for path in paths[1:]:
            for chain in density.read_structure(path, assembly=None):
                model.add_chain(chain)
        return standard(model, particle.symmetry)
    if Path(name).exists():
        path = Path(name)
    elif len(name) == 4 and name.isalnum() and name[0].isdigit():
        path = fetch(name)
    else:
        raise InputError(
            f"{name!r} is neither a file, nor a PDB id (a digit and three letters or digits), nor "
            f"one of the shipped particles: {', '.join(SHIPPED)}"
        )
    model = density.read_structure(path, assembly=assembly)
    return model if symmetry is None else standard(model, symmetry)


def load_density(
    name: str,
    *,
    assembly: str | None = "1",
    symmetry: str | None = None,
    voxel_size_angstrom: float = 3.67,
    resolution_angstrom: float = 8.0,
    box_px: int = 116,
) -> Density:
    """Density of a particle; the defaults are the paper's sampling, and what ships was made with.

    Parameters
    ----------
    name, assembly, symmetry
        See :func:`load`.
    voxel_size_angstrom, resolution_angstrom, box_px
        See :func:`cryoem.density.from_atoms`.

    Returns
    -------
    Density
    """
    return density.from_atoms(
        load(name, assembly=assembly, symmetry=symmetry),
        voxel_size_angstrom=voxel_size_angstrom,
        resolution_angstrom=resolution_angstrom,
        box_px=box_px,
    )


def fetch(
    pdb_id: str, *, url: str = PDB_URL, cache: PathLike | None = None, retries: int = 3
) -> Path:
    """Download a PDB entry, once.

    Parameters
    ----------
    pdb_id : str
    url : str
        With ``{id}`` where the lower-case id goes.
    cache : path, optional
        Folder; default: the operating system's cache for ``cryoem``.
    retries : int
        How often a failed download is tried again.

    Returns
    -------
    Path

    Raises
    ------
    DownloadError
        No network, an unknown id, or what came is not an mmCIF file with atoms.
    """
    import pooch
    import requests

    cache = Path(cache) if cache is not None else Path(pooch.os_cache("cryoem"))
    address = url.format(id=pdb_id.lower())
    target = cache / Path(address).name
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    downloader = pooch.HTTPDownloader(progressbar=False, timeout=30)
    last: Exception | None = None
    for attempt in range(retries + 1):
        time.sleep(0.2 * (2**attempt - 1))  # at once, then with growing patience
        try:
            with files.atomic(target) as temporary:
                downloader(address, str(temporary), None)
                density.read_structure(temporary)
            return target
        except requests.HTTPError as error:
            last = error
            if error.response is not None and error.response.status_code in (404, 410):
                raise DownloadError(f"PDB id {pdb_id!r}: unknown to {address}") from error
        except (requests.RequestException, ValueError, OSError) as error:
            last = error
    raise DownloadError(
        f"PDB id {pdb_id!r}: no readable structure from {address} "
        f"after {retries + 1} tries ({last})"
    ) from last


def standard(model: gemmi.Model, symmetry: str) -> gemmi.Model:
    """Bring an oligomer of like chains into its group's standard setting, exactly symmetric.

    The rotations that carry the first chain onto the others are found by superposition of their
    C-alpha atoms, and their axes laid where :func:`cryoem.symmetry.group` has them. The first
    chain's copies under the exact group then replace the others.

    Parameters
    ----------
    model : gemmi.Model
        One chain for each of the group's elements.
    symmetry : str
        Cn, Dn, T, O or I.

    Returns
    -------
    gemmi.Model

    Raises
    ------
    InputError
        Another number of chains, or chains that are not related by such a group.
    """
    import gemmi
    from scipy.spatial.transform import Rotation

    orbits = group(symmetry)
    if orbits.order == 1:
        return model
    if len(model) != orbits.order:
        raise InputError(
            f"a particle of symmetry {orbits.name} has {orbits.order} like chains, got {len(model)}"
        )

    def alphas(chain: gemmi.Chain) -> dict[Any, list[float]]:
        return {r.seqid.num: a.pos.tolist() for r in chain for a in r if a.name == "CA"}

    chains = [alphas(chain) for chain in model]
    shared = sorted(set.intersection(*(set(c) for c in chains)))
    if len(shared) < 3:
        raise InputError(f"the chains share {len(shared)} C-alpha atoms, wanted three or more")
    first, *others = (np.array([c[s] for s in shared]) for c in chains)
    centre = np.mean([first, *others], axis=(0, 1))
    turns = Rotation.concatenate(
        [Rotation.align_vectors(o - o.mean(0), first - first.mean(0))[0] for o in others]
    )
    frame = _axes(turns.as_rotvec(), orbits)  # rows: model to standard coordinates
    exact = Rotation.from_quat(orbits.elements).as_matrix()
    found = frame @ turns.as_matrix() @ frame.T
    off = np.linalg.norm(found[:, None] - exact[None], axis=(2, 3)).min(axis=1) / np.sqrt(2)
    if off.max() > 0.2:
        raise InputError(
            f"the chains are not related by {orbits.name}: off by up to {off.max():.2f} rad"
        )
    symmetric = gemmi.Model(1)
    for i, element in enumerate(exact):
        chain = model[0].clone()
        chain.name = string.ascii_uppercase[i % 26] + (str(i // 26) if i >= 26 else "")
        for residue in chain:
            for atom in residue:
                atom.pos = gemmi.Position(*(element @ frame @ (atom.pos.tolist() - centre)))
        symmetric.add_chain(chain)
    return symmetric


def _axes(turns: np.ndarray, orbits: Group) -> np.ndarray:
    """The frame, rows x, y, z, in which rotation vectors (m, 3) are a group's."""
    angles = np.linalg.norm(turns, axis=1)
    axes = turns / angles[:, None]
    if orbits.name in SOLIDS:
        return _axes_of_solid(turns, orbits)
    if orbits.name == "D2":
        u, _, vt = np.linalg.svd(axes)
        frame = u @ vt  # the nearest orthogonal axes
    else:
        # Those about z are, of Cn, all; of Dn the ones that are not half-turns, if any.
        main = axes if orbits.name[0] == "C" else axes[np.abs(angles - np.pi) > 0.2]
        if len(main) == 0:
            main = axes
        z = np.linalg.eigh(main.T @ main)[1][:, -1]
        x = axes[np.abs(axes @ z).argmin()] if orbits.name[0] == "D" else np.eye(3)[z.argmin()]
        x = x - (x @ z) * z
        x /= np.linalg.norm(x)
        frame = np.array([x, np.cross(z, x), z])
    frame[2] *= np.sign(np.linalg.det(frame))
    return frame


def _axes_of_solid(turns: np.ndarray, orbits: Group) -> np.ndarray:
    """The same for T, O and I: by two of the axes that generate them, of all the best two."""
    from scipy.spatial.transform import Rotation

    (one, other), _ = SOLIDS[orbits.name]
    exact = Rotation.from_quat(orbits.elements).as_matrix()
    found = Rotation.from_rotvec(turns).as_matrix()
    angles = np.linalg.norm(turns, axis=1)

    def about(fold: int) -> np.ndarray:
        axes = turns[np.abs(angles - 2 * np.pi / fold) < 0.2]
        axes = axes / np.linalg.norm(axes, axis=1, keepdims=True)
        return np.concatenate([axes, -axes]) if fold == 2 else axes  # half a turn is both

    def off(frame: np.ndarray) -> float:
        apart = np.linalg.norm((frame @ found @ frame.T)[:, None] - exact, axis=(2, 3))
        return float(apart.min(axis=1).max())

    wanted = np.array([one[1], other[1]]) / np.linalg.norm([one[1], other[1]], axis=1)[:, None]
    pairs = [np.array([a, b]) for a in about(one[0]) for b in about(other[0])]
    alike = [pair for pair in pairs if abs(pair[0] @ pair[1] - wanted[0] @ wanted[1]) < 0.2]
    frames = [Rotation.align_vectors(wanted, pair)[0].as_matrix() for pair in alike]
    return min(frames, key=off, default=np.eye(3))
