"""Orientations and a map from the images alone, no model, no training: ``make bench-abinitio``.

A cell is a condition of imaging; each particle and seed of it is a record (images and starts depend
on the seed). Nothing but the images enters; the truth is looked at when all is done. Particles are
those that ship and whatever models or maps are named: ``python benchmarks/abinitio.py 4jsv
complex.pdb.gz:C2 map.mrc``, or a model's copies side by side: ``unit.pdb.gz:C7-ring``, ``:O-ring``.
With ``--aspire`` noiseless images of particles without symmetry are also oriented by ASPIRE's
common lines (``CLSync3N``, its settings as they come), then refined as ours are. With ``--relion``
RELION makes its initial model of the same images, binned to half their box, as its tutorial has it
(``relion_refine --sgd --denovo_3dref``, its schedule in full; many hours of a core), and its
orientations are refined as ours are. ``--known`` adds how far off images are likeliest where the
density is known, at least: who believes the likelihood cannot do better. It goes on where it was
interrupted.
"""

import argparse
import json
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import gemmi
import mrcfile
import numpy as np
import peers
import records
from scipy.spatial.transform import Rotation
from scipy.stats import rankdata

from cryoem import (
    Density,
    ParticleStack,
    ab_initio,
    classify,
    evaluation,
    load_density,
    read_particles,
    refine,
    refine_halves,
    report,
    rotations,
    simulate,
    structures,
    write_particles,
)
from cryoem.density import from_atoms
from cryoem.io import files
from cryoem.maps import soft_mask
from cryoem.refinement import Search
from cryoem.refinement.elsewhere import found_again
from cryoem.symmetry import group

#: Cells: images, SNR, and how they were seen.
MICROSCOPE = {"max_shift_px": 8.0, "defocus_range_angstrom": (5e3, 3e4)}
CELLS = {
    "centred": (1000, 1 / 16, {}),
    "shifts": (1000, 1 / 16, {"max_shift_px": 8.0}),
    "ctf": (1000, 1 / 16, MICROSCOPE),
    "coloured": (1000, 1 / 16, {**MICROSCOPE, "noise_excess": 10.0}),
    "few": (300, 1 / 16, {}),
    "noiseless": (200, float("inf"), {}),
    "preferred": (1000, 1 / 16, {"coverage": "preferred"}),
    "weak": (10_000, 1 / 64, {}),
    "noise": (1000, 0.0, {}),
    "two proteins": (1000, 1 / 16, MICROSCOPE),
    "contaminants": (1000, 1 / 16, MICROSCOPE),
}
#: Share of another particle, and of images of noise alone.
JUNK = {"two proteins": (0.5, 0.0), "contaminants": (0.15, 0.15)}
BOX, VOXEL = 116, 3.67
#: Mean error after refinement, radians, below which a run without noise is right.
NOISELESS = 0.005
#: Box that common lines and RELION's initial model are sought in: half of the images'.
BINNED = 58
#: RELION's initial model with the settings of its tutorial.
DIAMETER = 200
INITIAL_MODEL = f"""
    relion_refine --i binned.star --o ./run --sgd --denovo_3dref --sgd_ini_iter 50
    --sgd_inbetween_iter 200 --sgd_fin_iter 50 --sgd_write_iter 10 --sgd_ini_resol 35
    --sgd_fin_resol 15 --sgd_ini_subset 100 --sgd_fin_subset 500 --K 1 --sym C1
    --flatten_solvent --zero_mask --dont_combine_weights_via_disc --preread_images --pool 3 --pad 1
    --skip_gridding --particle_diameter {DIAMETER} --oversampling 1 --healpix_order 1
    --offset_range 6 --offset_step 2 --j 1
""".split()
KIND = "cryoemKind"
#: Marks a ring, or shell, of copies; and how far from each other they touch, in radii of gyration.
RING, TOUCHING = "-ring", 1.2
KEPT = Path("results/bench-abinitio")
#: Detail to which a known density is used, angstrom.
FINEST = 8.0
#: What the table shows of the cells' runs: medians.
SHOWN = (
    "one_sided_error_rad", "median_rad", "refined_error_rad", "bound_mean_rad",
    "likeliest_error_rad",
)  # fmt: skip


def density_of(source, symmetry="C1"):
    """The density of a particle that ships, of a model or of a map, in one box of one voxel.

    A model is laid on the axes of its symmetry, by which errors are counted.
    """
    if symmetry.endswith(RING):
        ring = ring_of(structures.load(source), symmetry.removesuffix(RING))
        return from_atoms(ring, voxel_size_angstrom=VOXEL, resolution_angstrom=8.0, box_px=BOX)
    return records.volume_of(source, symmetry, BOX).sampled_as(BOX, VOXEL)


def ring_of(model, symmetry):
    """Copies of a model about the axes of a group, so far out that they just touch."""
    orbit = group(symmetry)
    turns = Rotation.from_quat(orbit.elements)
    at = np.array([a.atom.pos.tolist() for a in model.all()])
    outwards = np.array([[1.0, 0, 0]])
    if orbit.name[0] != "C":  # a place that is far from its copies
        outwards = np.random.default_rng(0).standard_normal((1000, 3))
        outwards /= np.linalg.norm(outwards, axis=1, keepdims=True)
    away = np.min([np.linalg.norm(g.apply(outwards) - outwards, axis=1) for g in turns[1:]], axis=0)
    far = 2 * TOUCHING * at.std(axis=0).dot(at.std(axis=0)) ** 0.5 / away.max()
    place = far * outwards[away.argmax()]
    ring = gemmi.Model(1)
    for i, turn in enumerate(turns):
        for j, chain in enumerate(model):
            copy = chain.clone()
            copy.name = f"{i}-{j}"
            for residue in copy:
                for atom in residue:
                    moved = atom.pos.tolist() - at.mean(axis=0) + place
                    atom.pos = gemmi.Position(*turn.apply(moved))
            ring.add_chain(copy)
    return ring


def seen(density: Density, name: str, cell: str, seed: int) -> ParticleStack:
    """Particles of a cell, with the truth."""
    n, snr, options = CELLS[cell]
    if cell == "noise":  # no particle at all
        rng = np.random.default_rng(seed)
        images = rng.standard_normal((n, BOX, BOX)).astype(np.float32)
        return ParticleStack(images, VOXEL, quaternions=np.tile([0, 0, 0, 1.0], (n, 1)))
    stack = simulate(density, n, seed, snr=snr, **options)
    if cell not in JUNK:
        return stack
    # Another particle in the same noise, through the same microscope, and noise alone.
    other = simulate(
        load_density("4jsv" if name == "1i10" else "1i10"), n, seed, snr=snr, **options
    )
    rng = np.random.default_rng([seed, 3])
    kind = rng.choice(3, n, p=[1 - sum(JUNK[cell]), *JUNK[cell]])
    sigma = np.sqrt(stack.noise.variance)
    images = np.where(
        kind[:, None, None] == 1, other.images / np.sqrt(other.noise.variance), stack.images / sigma
    )
    images[kind == 2] = rng.standard_normal((np.sum(kind == 2), BOX, BOX))
    return stack.replace(images=(sigma * images).astype(np.float32)).with_columns({KIND: kind})


def sorted_well(classes, kind):
    """How well the largest class holds the particle and nothing else."""
    others = np.delete(classes.evidence, 0, axis=1).max(axis=1)
    score = rankdata(classes.evidence[:, 0] - np.maximum(others, 0))
    own = kind == 0
    wins = score[own].sum() - own.sum() * (own.sum() + 1) / 2
    return {
        "auroc": wins / (own.sum() * (~own).sum()),
        "kept_fraction": float(np.mean(classes.number[own] == 1)),
        "junk_fraction": float(np.mean(~own[classes.number == 1])),
    }


def by_common_lines(source: str, cell: str, seed: int, refined: bool) -> dict:
    """The record of ASPIRE's synchronised common lines; the refinement after it is ours."""
    from aspire.abinitio import CLSync3N
    from aspire.source import OrientedSource, RelionSource

    density = density_of(source)
    truth = seen(density, source, cell, seed)
    unknown = truth.without_poses().replace(noise=None)
    wall, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "seen.star"
        write_particles(images, unknown)
        theirs = RelionSource(str(images), data_folder=folder, pixel_size=VOXEL)
        theirs = theirs.downsample(BINNED).normalize_background().cache()
        # The STAR file that it writes has the box of the images before they were binned.
        matrices = OrientedSource(theirs, CLSync3N(theirs, seed=seed)).rotations
    q = Rotation.from_matrix(matrices).as_quat()
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    record = {
        **told(source, cell, seed, truth, "common lines (ASPIRE)"), "cpu_seconds": cpu,
        "wall_seconds": wall, "peak_memory_gb": report.peak_memory_gb(),
    }  # fmt: skip
    return judged(record, unknown.with_poses(q), truth, density, "C1", "C1", refined)


def by_initial_model(source: str, cell: str, seed: int, refined: bool) -> dict:
    """The record of RELION's initial model; the refinement after it is ours."""
    name, _, symmetry = source.partition(":")
    symmetry = symmetry or "C1"
    density = density_of(name, symmetry)
    symmetry = symmetry.removesuffix(RING)
    truth = seen(density, name, cell, seed)
    unknown = truth.without_poses().replace(noise=None)
    folder = KEPT / f"relion-{Path(name).name.partition('.')[0]}-{cell}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    write_particles(folder / "seen.star", unknown)
    code = ["relion_preprocess", "--operate_on", "seen.mrcs", "--operate_out", "binned.mrcs"]
    code += ["--scale", f"{BINNED}", "--norm", "--bg_radius", f"{DIAMETER / 4 / VOXEL:.0f}"]
    subprocess.run(code, check=True, capture_output=True, cwd=folder)
    with mrcfile.open(folder / "binned.mrcs") as file:
        binned = unknown.with_images(file.data.copy(), pixel_size_angstrom=VOXEL * BOX / BINNED)
    write_particles(folder / "binned.star", binned)
    code = [*INITIAL_MODEL, "--random_seed", f"{seed + 1}"]
    code += ["--ctf"] if unknown.ctf_parameters is not None else []
    if before := sorted(folder.glob("run_it*_optimiser.star")):
        code += ["--continue", before[-1].name]
    wall, cpu = time.monotonic(), peers.cpu_seconds()
    try:
        with (folder / "log.txt").open("a") as log:
            subprocess.run(code, check=True, stdout=log, stderr=log, cwd=folder)
    finally:
        with (folder / "seconds.txt").open("a") as seconds:
            seconds.write(f"{peers.cpu_seconds() - cpu:.1f} {time.monotonic() - wall:.1f}\n")
    cpu, wall = np.loadtxt(folder / "seconds.txt", ndmin=2).sum(axis=0)
    theirs = read_particles(folder / "run_it300_data.star")
    rows = [int(image.partition("@")[0]) - 1 for image in theirs.columns["rlnImageName"]]
    q, shifts = np.empty((len(truth), 4)), np.empty((len(truth), 2))
    q[rows], shifts[rows] = theirs.oriented(), theirs.shifts_px * BOX / BINNED
    record = {
        **told(name, cell, seed, truth, "initial model (RELION)"),
        "cpu_seconds": cpu, "wall_seconds": wall,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
    }  # fmt: skip
    found = unknown.with_poses(q, shifts)
    return judged(record, found, truth, density, symmetry, "C1", refined)


def told(name, cell, seed, truth, method):
    """What a record is of."""
    return {
        "particle": Path(name).name.partition(".")[0],
        "n": len(truth),
        "snr": "inf" if cell == "noiseless" else CELLS[cell][1],
        "condition": cell,
        "method": method,
        "seed": seed,
    }


def judged(record, found, truth, density, symmetry, assumed, refined):
    """A record, and how far off the orientations are: as they were found, and refined."""
    own = truth.columns[KIND] == 0 if KIND in truth.columns else slice(None)

    def errors_of(stack):
        return evaluation.orientation_errors(
            stack.quaternions[own], truth.quaternions[own], symmetry=symmetry
        )

    errors = errors_of(found)
    record |= {"one_sided_error_rad": errors.mean_rad, "median_rad": errors.median_rad}
    record["far_fraction"] = errors.far_fraction
    right = NOISELESS
    if truth.noise is not None:
        record["bound_mean_rad"] = records.limit(density, truth)
        right = 2 * record["bound_mean_rad"]
    if refined:
        errors = errors_of(refine_halves(found, symmetry=assumed, seed=record["seed"]).particles)
        record |= {
            "refined_error_rad": errors.mean_rad,
            "refined_median_rad": errors.median_rad,
            "success": bool(record.get("map", True) and errors.mean_rad < right),
        }
    return record


def likeliest(source: str, cell: str, seed: int) -> dict:
    """How far off particles of a cell are likeliest where the density is known: of 1,000 of them.

    Sought from random orientations and the true shifts, and from the truth; of each image the
    likelier of the two. The search is no full one: what it misses would be farther off.
    """
    name, _, symmetry = source.partition(":")
    symmetry = symmetry or "C1"
    density = density_of(name, symmetry)
    symmetry = symmetry.removesuffix(RING)
    truth = seen(density, name, cell, seed).select(slice(0, 1000)).with_half_sets(seed)
    start = truth.with_poses(rotations.uniform(len(truth), seed), truth.shifts_px)
    near = refine(truth, density, resolution_angstrom=FINEST, search=Search().near)
    found = refine(start, density, resolution_angstrom=FINEST)
    brought, _ = found_again(
        found, start, [density] * 2, soft_mask(density), FINEST, search=Search(),
        symmetry=symmetry, scheduler=None,
    )  # fmt: skip
    found = refine(brought, density, resolution_angstrom=FINEST, search=Search().near)
    errors = evaluation.orientation_errors(
        records.likelier(found, near), truth.quaternions, symmetry=symmetry
    )
    return {
        "likeliest_error_rad": errors.mean_rad,
        "likeliest_far_fraction": errors.far_fraction,
        "likeliest_commit": records.commit(),
    }


def run(source: str, cell: str, seed: int, refined: bool) -> dict:
    """One record: ab initio, and where asked for the refinement that follows."""
    name, _, symmetry = source.partition(":")
    symmetry = symmetry or "C1"
    density = density_of(name, symmetry)
    symmetry = symmetry.removesuffix(RING)
    truth = seen(density, name, cell, seed)
    unknown = truth.without_poses().replace(noise=None)
    wall, cpu = time.monotonic(), time.process_time()
    sorting = {}
    if cell == "contaminants":
        classes = classify(unknown, 2, seed=seed)
        sorting = sorted_well(classes, truth.columns[KIND])
        main = classes.number == 1
        truth, unknown = truth.select(main), unknown.select(main)
    found = ab_initio(unknown, seed=seed)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    record = {
        **told(name, cell, seed, truth, "ab_initio"),
        "verdict": str(found.verdict),
        "map": found.verdict.found,
        "agreement": found.verdict.agreement,
        "same_answer": found.verdict.same_answer,
        "starts": found.verdict.starts,
        "symmetry": found.axes.symmetry,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "peak_memory_gb": report.peak_memory_gb(),
        **sorting,
    }
    if cell in ("noise", "two proteins"):
        return {**record, "success": not found.verdict.found}
    return judged(record, found.particles, truth, density, symmetry, found.axes.symmetry, refined)


def kept(source, cell, seed, refined, make=run, name="", known=False):
    """The record of a particle, cell and seed, made now or in an interrupted run.

    One that was made without refinement is made again where that is asked for, and what a known
    density would give is added.
    """
    particle = Path(source.partition(":")[0]).name.partition(".")[0]
    path = KEPT / f"{particle}-{cell.replace(' ', '-')}{name}-{seed}.json"
    made = json.loads(path.read_text()) if path.exists() else {}
    if not made or (refined and "success" not in made):
        made = {**make(source, cell, seed, refined), "commit": records.commit()}
    if known and "likeliest_error_rad" not in made:
        made |= likeliest(source, cell, seed)
    print(made, flush=True)
    with files.atomic(path) as temporary:
        temporary.write_text(json.dumps(made))


def table(found):
    """A row a cell and method: how many ended right, errors before and after refinement, time."""
    rows = []
    for cell, method in dict.fromkeys((r["condition"], r["method"]) for r in found):
        of_cell = [r for r in found if (r["condition"], r["method"]) == (cell, method)]
        maps = sum(r["map"] for r in of_cell) if "map" in of_cell[0] else "-"
        title = cell if method == "ab_initio" else f"{cell}, {method}"
        row = [title, f"{of_cell[0]['n']:,}", f"{len(of_cell)}", f"{maps}"]
        for key in SHOWN:
            values = [r[key] for r in of_cell if key in r]
            whole = values and (key != "likeliest_error_rad" or len(values) == len(of_cell))
            row.append(f"{np.median(values):.3f}" if whole else "-")
        wanted = [r for r in of_cell if "success" in r]
        row.append(f"{sum(r['success'] for r in wanted)} of {len(wanted)}" if wanted else "-")
        row.append(f"{np.median([r['cpu_seconds'] for r in of_cell]):.0f}")
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("particles", nargs="*", default=["4jsv", "1i10:D2"])
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--no-refinement", action="store_true")
    parser.add_argument("--known", action="store_true", help="beside where a known density is")
    parser.add_argument("--aspire", action="store_true")
    parser.add_argument("--relion", action="store_true")
    arguments = parser.parse_args()
    header = [
        "cell", "images", "runs", "maps", "mean error, rad", "median error, rad", "refined, rad",
        "limit, rad", "likeliest, rad", "right", "CPU s",
    ]  # fmt: skip
    for seed in range(arguments.seeds):
        for cell in arguments.cells:
            some = arguments.particles[:1] if cell == "noise" else arguments.particles
            for source in some:
                known = arguments.known and cell not in ("noise", "noiseless", *JUNK)
                kept(source, cell, seed, not arguments.no_refinement, known=known)
                if arguments.aspire and cell == "noiseless" and ":" not in source:
                    refined = not arguments.no_refinement
                    kept(source, cell, seed, refined, by_common_lines, "-aspire")
                if arguments.relion and cell != "noise" and cell not in JUNK:
                    refined = not arguments.no_refinement
                    kept(source, cell, seed, refined, by_initial_model, "-relion")
                found = [json.loads(p.read_text()) for p in sorted(KEPT.glob("*.json"))]
                order = {name: i for i, name in enumerate(CELLS)}
                found.sort(
                    key=lambda r: (order[r["condition"]], r["method"], r["particle"], r["seed"])
                )
                records.write("abinitio", found, header, table(found), "make bench-abinitio")


if __name__ == "__main__":
    main()
