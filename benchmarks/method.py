"""The tools of the method: projection and alignment (``make bench-method``, seconds).

The rest has benchmarks of its own: ``accuracy``, ``recovery``, ``refinement``, ``stream``.
"""

import time

import numpy as np
import records

from cryoem import (
    density,
    evaluation,
    projection,
    rotations,
)


def timed(function, *args, **kwargs):
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - start


def alignment(n=1650):
    q = rotations.uniform(n, 3)
    a, b = rotations.uniform(2, 4)
    tilt = 0.1 * np.random.default_rng(5).standard_normal((n, 3))
    moved = rotations.multiply(rotations.multiply(a, rotations.inverse(q)), b)
    moved = rotations.perturb(moved, tilt)
    first, seconds = timed(evaluation.align, moved, q)
    again = evaluation.align(moved, q)
    yield {
        "case": "alignment",
        "n": n,
        "seed": 3,
        "e_or_rad": float(rotations.distance(first.quaternions, q).mean()),
        "deterministic": bool(np.array_equal(first.quaternions, again.quaternions)),
        "seconds": seconds,
    }


def projector():
    for box in (64, 128):
        phantom = density.Phantom.random(0)
        d = phantom.density(box, 200 / box)
        q = rotations.uniform(256_000 // box, 1)
        some = projection.project(d, q[:32])
        truth = phantom.project(q[:32], box, 200 / box)
        one = projection.Projector(d)
        _, seconds = timed(one.project, q)
        yield {
            "case": "projector",
            "box_px": box,
            "n": len(q),
            "seed": 1,
            "relative_error": float(np.linalg.norm(some - truth) / np.linalg.norm(truth)),
            "projections_per_second": len(q) / seconds,
        }


def table(found):
    def of(case):
        return [r for r in found if r["case"] == case]

    rows = []
    for r in of("alignment"):
        same = "deterministic" if r["deterministic"] else "NOT deterministic"
        rows.append(["alignment over O(4)", "50 min", f"{1e3 * r['seconds']:.0f} ms, {same}"])
    for r in of("projector"):
        rows.append(
            [
                f"projections of {r['box_px']} px",
                "-",
                f"{r['projections_per_second']:,.0f} a second, {r['relative_error']:.0e} off the "
                "exact phantom",
            ]
        )
    return rows


def main():
    found = []
    for make in (projector, alignment):
        for record in make():
            print(record, flush=True)
            found.append(record)
    header = ["what", "paper", "here"]
    records.write("method", found, header, table(found), "make bench-method")


if __name__ == "__main__":
    main()
