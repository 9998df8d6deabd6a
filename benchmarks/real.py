"""Particles that a real microscope saw: ``make bench-real ARGS=FOLDER``.

FOLDER holds beta-galactosidase of EMPIAR-10204, RELION's tutorial set, as particle files of 64 and
128 px, with RELION's poses for most of them, and its class averages: they do not ship. What RELION
found is no truth, it has some degrees of error itself. The protein's atomic model, ``maps`` beside
FOLDER, is not looked at before the end. Errors are modulo D2. It goes on where it was interrupted.
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
    maps,
    read_particles,
    reconstruct,
    refine_halves,
    report,
)

KEPT = Path("results/bench-real")
HALVES = "half_map_resolution_angstrom"
CLASSES, MODEL = "betagal_10204_class_averages/job014_classes_64.mrcs", "maps/5a1a.pdb.gz"


def against(found: ParticleStack, theirs: ParticleStack, name: str) -> dict:
    """How far orientations are from RELION's, modulo D2; and how far they are said to be."""
    errors = evaluation.orientation_errors(found.quaternions, theirs.quaternions, symmetry="D2")
    return {
        f"{name}_error_rad": errors.mean_rad,
        f"{name}_median_rad": errors.median_rad,
        f"{name}_far_fraction": errors.far_fraction,
        f"{name}_expected_rad": float(found.expected_error_rad.mean()),
    }


def solved(stack: ParticleStack, seed: int) -> tuple[dict, object]:
    """Ab initio, told nothing."""
    wall, cpu = time.monotonic(), time.process_time()
    found = ab_initio(stack, seed=seed)
    record = {
        "n": len(stack),
        "box_px": stack.box_px,
        "seed": seed,
        "verdict": str(found.verdict),
        "map": found.verdict.found,
        "symmetry": found.axes.symmetry,
        "agreement": found.verdict.agreement,
        "half_map_resolution_angstrom": found.verdict.resolution_angstrom,
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.monotonic() - wall,
    }
    return record, found


def refined(found, seed: int) -> tuple[dict, object]:
    """Half against half, with the symmetry that was found."""
    wall, cpu = time.monotonic(), time.process_time()
    end = refine_halves(found.particles, symmetry=found.axes.symmetry, seed=seed)
    resolution = end.fsc.corrected.resolution(0.143).angstrom
    return {
        "refined_half_map_resolution_angstrom": resolution,
        "refinement_cpu_seconds": time.process_time() - cpu,
        "refinement_wall_seconds": time.monotonic() - wall,
        "peak_memory_gb": report.peak_memory_gb(),
    }, end


def posed(folder: Path, seed: int) -> dict:
    """Particles that RELION has placed: how far from there they end."""
    theirs = read_particles(folder / "betagal_10204/job018_64_posed_clean.star")
    record, found = solved(theirs.without_poses(), seed)
    record |= against(found.particles, theirs, "ab_initio")
    more, end = refined(found, seed)
    more |= like_the_model(end.density, folder)
    return record | more | against(end.particles, theirs, "refined")


def everything(folder: Path, seed: int) -> dict:
    """All particles, in fine pixels: the map, beside that of the particles at RELION's poses."""
    stack = read_particles(folder / "betagal_10204/job018_128_all_ctf.star")
    record, found = solved(stack.without_poses(), seed)
    more, end = refined(found, seed)
    theirs = reconstruct(
        read_particles(folder / "betagal_10204/job018_128_posed.star"), symmetry="D2"
    )
    return {
        **record,
        **more,
        **like_the_model(end.density, folder),
        "relion_model_fsc05_angstrom": like_the_model(theirs, folder)["model_fsc05_angstrom"],
    }


def averages(folder: Path, seed: int) -> dict:
    """Class averages: few images, hardly any noise, and no CTF."""
    record, found = solved(read_particles(folder / CLASSES), seed)
    return record | like_the_model(found.density, folder)


def like_the_model(density, folder: Path) -> dict:
    """How like the protein's atomic model a map is, which is laid onto it."""
    box, voxel = density.box_px, density.voxel_size_angstrom
    model = load_density(
        str(folder.parent / MODEL), box_px=box, voxel_size_angstrom=voxel,
        resolution_angstrom=max(8.0, 2 * voxel),
    )  # fmt: skip
    laid = maps.register(model, density, resolution_angstrom=max(8.0, 2.5 * voxel)).density
    coarse = [d.low_passed(20.0).values.ravel() for d in (laid, density)]
    mask = maps.soft_mask(laid)
    fsc = maps.fsc(*(Density(mask * d.values, voxel) for d in (laid, density)))
    at = fsc.resolution(0.5)
    return {
        "correlation_with_model_20A": float(np.corrcoef(*coarse)[0, 1]),
        "model_fsc05_angstrom": at.angstrom,
        "pixels_limit_that": at.nyquist_limited,
    }


CASES = {"posed": posed, "all, 128 px": everything, "class averages": averages}


def told(values, digits: int = 3) -> str:
    """Median, and from which to which."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    text = f"{np.median(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text


def table(found):
    """A row a case: medians over the seeds, and their range."""
    rows = []
    for case in dict.fromkeys(r["case"] for r in found):
        runs = [r for r in found if r["case"] == case]

        def of(key, runs=runs):
            return [r.get(key) for r in runs]

        rows.append(
            [
                case,
                f"{runs[0]['n']:,}",
                f"{sum(r['map'] for r in runs)} of {len(runs)}",
                f"{sum(r['symmetry'] == 'D2' for r in runs)}",
                told(of("ab_initio_error_rad")),
                told(of("refined_error_rad")),
                told(of("refined_expected_rad")),
                told([r.get("refined_" + HALVES, r[HALVES]) for r in runs], 1),
                told(of("model_fsc05_angstrom"), 1),
                told(of("correlation_with_model_20A"), 2),
                told([r["cpu_seconds"] + r.get("refinement_cpu_seconds", 0) for r in runs], 0),
            ]
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    header = [
        "particles", "images", "maps", "D2 found", "from RELION's poses, ab initio, rad",
        "refined, rad", "expects, rad", "half-maps agree to, A", "map like the model to, A",
        "correlation with it at 20 A", "CPU s",
    ]  # fmt: skip
    for seed in range(arguments.seeds):
        for case in arguments.cases:
            records.kept(
                KEPT / f"{case.replace(' ', '-').replace(',', '')}-{seed}.json",
                lambda c=case, s=seed: {
                    "case": c, "commit": records.commit(), **CASES[c](arguments.folder, s)
                },
            )  # fmt: skip
            found = [json.loads(p.read_text()) for p in sorted(KEPT.glob("*.json"))]
            order = list(CASES)
            found.sort(key=lambda r: (order.index(r["case"]), r["seed"]))
            records.write("real", found, header, table(found), "make bench-real ARGS=FOLDER")


if __name__ == "__main__":
    main()
