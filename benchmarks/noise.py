"""What coloured noise costs, beside the limit that it sets: ``make bench-noise``.

4JSV as it ships, at SNR 1/16 of the frame, in noise that is louder at low frequencies by an excess
of 0 (white), 3, 10 and 30. No step is told the spectrum: each measures it. ``--weights`` takes
another estimator.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import records

from cryoem import (
    Density,
    ParticleStack,
    Preprocessing,
    evaluation,
    imaging,
    load_density,
    load_estimator,
    match,
    orient,
    refine,
    refine_halves,
    rotations,
    simulate,
)
from cryoem.maps import soft_mask
from cryoem.refinement import Search
from cryoem.refinement.elsewhere import found_again, with_likely_errors
from cryoem.refinement.reference import LOST

SEED = 90_417
SNR, N, N_HALVES, REFERENCES, BOX = 1 / 16, 500, 1650, 10_000, 48
EXCESSES = (0, 3, 10, 30)
CASES = {"plain": None, "ctf": (10_000.0, 25_000.0)}
SEARCH = Search()
KEPT = Path("results/bench-noise")


def seen(density: Density, case: str, excess: float, n: int) -> ParticleStack:
    """Particles whose noise is known to nobody but the limit."""
    return simulate(
        density, n, SEED, snr=SNR, defocus_range_angstrom=CASES[case], noise_excess=excess
    )


def cell(density, estimator, case, excess):
    """Every step on the same particles: a record each."""
    truth = seen(density, case, excess, N)
    unknown = truth.without_poses().replace(noise=None)
    bound = records.limit(density, truth)

    def record(step, found, start, true=truth.quaternions, q=None):
        q = found.quaternions if q is None else q
        error = rotations.distance(q, true)
        expected = found.expected_error_rad
        return {
            "case": case,
            "noise_excess": excess,
            "step": step,
            "snr": SNR,
            "n": len(q),
            "seed": SEED,
            "error_rad": float(error.mean()),
            "median_error_rad": float(np.median(error)),
            "expected_error_rad": None if expected is None else float(expected.mean()),
            "bound_rad": bound,
            "cpu_seconds": time.process_time() - start,
        }

    start = time.process_time()
    yield record("network", orient(estimator, unknown, reference=density), start)
    start = time.process_time()
    whole = density.box_px
    matched = match(
        unknown, density, Preprocessing(whole, 80, 40, density.voxel_size_angstrom),
        references=REFERENCES,
    ).with_half_sets(SEED)  # fmt: skip
    yield record("matching", matched, start)
    start = time.process_time()
    finest = 2 * density.voxel_size_angstrom
    refined = refine(matched, density, resolution_angstrom=finest)
    yield record("refined from matching", refined, start)
    start = time.process_time()
    brought, _ = found_again(
        refined, matched, [density] * 2, soft_mask(density), finest, search=SEARCH,
        symmetry="C1", scheduler=None, lost=LOST,
    )  # fmt: skip
    found = refine(brought, density, resolution_angstrom=finest, search=SEARCH.near)
    found = with_likely_errors(found, density, soft_mask(density), SEARCH, "C1", None, LOST)
    done = record("and sought elsewhere", found, start)
    # What no search could better: the truth is not far from where the likelihood is highest.
    near = refine(
        brought.with_poses(truth.quaternions, truth.shifts_px), density, resolution_angstrom=finest
    )
    likeliest = records.likelier(found, near)
    best = float(rotations.distance(likeliest, truth.quaternions).mean())
    yield {**done, "likeliest_error_rad": best}
    if case == "ctf":  # half against half takes a quarter of an hour where images cannot be cut
        return
    # The density known to nobody: from the network's orientations.
    truth = seen(density, case, excess, N_HALVES)
    start = time.process_time()
    found = orient(estimator, truth.without_poses().replace(noise=None)).replace(noise=None)
    halves = refine_halves(found.with_images(imaging.crop(truth.images, BOX)), seed=SEED)
    q = evaluation.align(
        halves.particles.quaternions, truth.quaternions, over="one-sided"
    ).quaternions
    done = record("halves", halves.particles, start, truth.quaternions, q)
    yield {**done, "half_map_resolution_angstrom": halves.fsc.corrected.resolution(0.143).angstrom}


def table(found):
    """A row a case and step, a column an excess: error, its ratio to the bound, expected error."""
    rows = []
    for case in CASES:
        for step in dict.fromkeys(r["step"] for r in found):
            of = {r["noise_excess"]: r for r in found if (r["case"], r["step"]) == (case, step)}
            if of:
                name = {"plain": "no CTF", "ctf": "CTF"}[case]
                rows.append([f"{step}, {name}", *(_told(of.get(e)) for e in EXCESSES)])
    return rows


def _told(r):
    if r is None:
        return "-"
    expected, likeliest = r["expected_error_rad"], r.get("likeliest_error_rad")
    return (
        f"{r['error_rad']:.3f}, {r['error_rad'] / r['bound_rad']:.2f} x bound"
        + ("" if likeliest is None else f", {r['error_rad'] / likeliest:.2f} x the likeliest's")
        + ("" if expected is None else f", expects {expected:.3f}")
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="4jsv")
    arguments = parser.parse_args()
    density, estimator = load_density("4jsv"), load_estimator(arguments.weights)
    found = []
    for case, excess in ((case, excess) for excess in EXCESSES for case in CASES):
        name = f"{case}-{excess}-{estimator.fingerprint[:8]}"
        found += records.kept(
            KEPT / f"{name}.json",
            lambda c=case, e=excess: list(cell(density, estimator, c, e)),
        )
        header = ["SNR 1/16", "white", *(f"excess {e}" for e in EXCESSES[1:])]
        records.write("noise", found, header, table(found), "make bench-noise")


if __name__ == "__main__":
    main()
