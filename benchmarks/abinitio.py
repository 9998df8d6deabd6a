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

from cryoem import (
    Density,
    ParticleStack,
    ab_initio,
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
    "two proteins": (1000, 1 / 16, {}),
}
BOX, VOXEL = 116, 3.67
KEPT = Path("results/bench-abinitio")


def density_of(source):
    """The density of a particle that ships, of a model or of a map, in one box of one voxel."""
    if source.endswith((".mrc", ".map", ".mrc.gz")):
        return records.volume_of(source).sampled_as(BOX, VOXEL)
    return load_density(source, box_px=BOX)


def seen(density: Density, name: str, cell: str, seed: int) -> ParticleStack:
    """Particles of a cell, with the truth."""
    n, snr, options = CELLS[cell]
    if cell == "noise":  # no particle at all
        rng = np.random.default_rng(seed)
        images = rng.standard_normal((n, BOX, BOX)).astype(np.float32)
        return ParticleStack(images, VOXEL, quaternions=np.tile([0, 0, 0, 1.0], (n, 1)))
    if cell == "two proteins":
        other = load_density("4jsv" if name == "1i10" else "1i10")
        halves = [simulate(d, n // 2, seed + i, snr=snr) for i, d in enumerate((density, other))]
        images, q = (
            np.concatenate([getattr(h, field) for h in halves])
            for field in ("images", "quaternions")
        )
        order = np.random.default_rng(seed).permutation(n)
        return ParticleStack(images[order], VOXEL, quaternions=q[order])
    return simulate(density, n, seed, snr=snr, **options)


def run(source: str, cell: str, seed: int, refined: bool) -> dict:
    """One record: ab initio, and where asked for the refinement that follows."""
    name, _, symmetry = source.partition(":")
    symmetry = symmetry or "C1"
    density = density_of(name)
    truth = seen(density, name, cell, seed)
    unknown = truth.without_poses().replace(noise=None)
    wall, cpu = time.monotonic(), time.process_time()
    found = ab_initio(unknown, seed=seed)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    record = {
        "particle": Path(name).name.partition(".")[0],
        "n": len(truth),
        "snr": CELLS[cell][1],
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
    }
    if cell in ("noise", "two proteins"):
        return {**record, "success": not found.verdict.found}
    errors = evaluation.orientation_errors(
        found.particles.quaternions, truth.quaternions, symmetry=symmetry
    )
    record |= {"one_sided_error_rad": errors.mean_rad, "median_rad": errors.median_rad}
    record["far_fraction"] = errors.far_fraction
    bound = np.nan if truth.noise is None else records.limit(density, truth)
    record["bound_mean_rad"] = bound
    if refined:
        at_end = refine_halves(found.particles, symmetry=found.axes.symmetry, seed=seed)
        errors = evaluation.orientation_errors(
            at_end.particles.quaternions, truth.quaternions, symmetry=symmetry
        )
        record |= {
            "refined_error_rad": errors.mean_rad,
            "refined_median_rad": errors.median_rad,
            "success": bool(found.verdict.found and errors.mean_rad < 2 * bound),
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
    made = run(source, cell, seed, refined)
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
            values = [r[key] for r in of_cell if np.isfinite(r.get(key, np.nan))]
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
