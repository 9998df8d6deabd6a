"""Orientations and a map from the images alone, no model, no training: ``make bench-abinitio``.

A cell is a condition of imaging; each particle and seed of it is a record (images and starts depend
on the seed). Nothing but the images enters; the truth is looked at when all is done. Particles are
those that ship and whatever models or maps are named: ``python benchmarks/abinitio.py 4jsv
complex.pdb.gz:C2 map.mrc``. It goes on where it was interrupted.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import records
from scipy.stats import rankdata

from cryoem import (
    Density,
    ParticleStack,
    ab_initio,
    classify,
    evaluation,
    load_density,
    refine_halves,
    report,
    simulate,
)
from cryoem.io import files

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
KIND = "cryoemKind"
KEPT = Path("results/bench-abinitio")


def density_of(source, symmetry="C1"):
    """The density of a particle that ships, of a model or of a map, in one box of one voxel.

    A model is laid on the axes of its symmetry, by which errors are counted.
    """
    return records.volume_of(source, symmetry, BOX).sampled_as(BOX, VOXEL)


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


def run(source: str, cell: str, seed: int, refined: bool) -> dict:
    """One record: ab initio, and where asked for the refinement that follows."""
    name, _, symmetry = source.partition(":")
    symmetry = symmetry or "C1"
    density = density_of(name, symmetry)
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
        "particle": Path(name).name.partition(".")[0],
        "n": len(truth),
        "snr": "inf" if cell == "noiseless" else CELLS[cell][1],
        "condition": cell,
        "method": "ab_initio",
        "seed": seed,
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
    own = truth.columns[KIND] == 0 if sorting else slice(None)
    errors = evaluation.orientation_errors(
        found.particles.quaternions[own], truth.quaternions[own], symmetry=symmetry
    )
    record |= {"one_sided_error_rad": errors.mean_rad, "median_rad": errors.median_rad}
    record["far_fraction"] = errors.far_fraction
    right = NOISELESS
    if truth.noise is not None:
        record["bound_mean_rad"] = records.limit(density, truth)
        right = 2 * record["bound_mean_rad"]
    if refined:
        at_end = refine_halves(found.particles, symmetry=found.axes.symmetry, seed=seed)
        errors = evaluation.orientation_errors(
            at_end.particles.quaternions[own], truth.quaternions[own], symmetry=symmetry
        )
        record |= {
            "refined_error_rad": errors.mean_rad,
            "refined_median_rad": errors.median_rad,
            "success": bool(found.verdict.found and errors.mean_rad < right),
        }
    return record


def kept(source, cell, seed, refined):
    """The record of a particle, cell and seed, made now or in an interrupted run.

    One that was made without refinement is made again where that is asked for.
    """
    particle = Path(source.partition(":")[0]).name.partition(".")[0]
    path = KEPT / f"{particle}-{cell.replace(' ', '-')}-{seed}.json"
    if path.exists():
        before = json.loads(path.read_text())
        if "success" in before or not refined:
            return before
    made = {**run(source, cell, seed, refined), "commit": records.commit()}
    print(made, flush=True)
    with files.atomic(path) as temporary:
        temporary.write_text(json.dumps(made))
    return made


def table(found):
    """A row a cell: how many ended right, errors before and after refinement, time."""
    rows = []
    for cell in dict.fromkeys(r["condition"] for r in found):
        of_cell = [r for r in found if r["condition"] == cell]
        maps = sum(r["map"] for r in of_cell)
        row = [cell, f"{of_cell[0]['n']:,}", f"{len(of_cell)}", f"{maps}"]
        for key in ("one_sided_error_rad", "median_rad", "refined_error_rad", "bound_mean_rad"):
            values = [r[key] for r in of_cell if key in r]
            row.append(f"{np.median(values):.3f}" if values else "-")
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
    arguments = parser.parse_args()
    header = [
        "cell", "images", "runs", "maps", "mean error, rad", "median error, rad", "refined, rad",
        "limit, rad", "right", "CPU s",
    ]  # fmt: skip
    for seed in range(arguments.seeds):
        for cell in arguments.cells:
            some = arguments.particles[:1] if cell == "noise" else arguments.particles
            for source in some:
                kept(source, cell, seed, not arguments.no_refinement)
                found = [json.loads(p.read_text()) for p in sorted(KEPT.glob("*.json"))]
                order = {name: i for i, name in enumerate(CELLS)}
                found.sort(key=lambda r: (order[r["condition"]], r["particle"], r["seed"]))
                records.write("abinitio", found, header, table(found), "make bench-abinitio")


if __name__ == "__main__":
    main()
