"""What a second worker is worth: ``make bench-workers`` (a quarter of an hour, on a quiet machine).

Refinement against a density, reconstruction and ab initio, each in this process on one thread, then
by one Dask worker and by two, of one thread each, on the same images in a file: 4JSV at SNR 1/16,
with CTF and shifts. Medians of the repeats; and what the results differ by.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["CRYOEM_THREADS"] = "1"  # before cryoem is loaded; the workers inherit it

import numpy as np
import records
from distributed import Client, LocalCluster

from cryoem import (
    ab_initio,
    load_density,
    read_particles,
    reconstruct,
    refine,
    rotations,
    simulate,
    write_particles,
)

PARTICLE, SEED, SNR = "4jsv", 90_731, 1 / 16
MICROSCOPE = {"max_shift_px": 8.0, "defocus_range_angstrom": (5e3, 3e4)}
OFF_RAD = 0.1
#: Job: images, and how often it is done.
JOBS = {
    "refine": (2000, 3),
    "reconstruct, few": (2000, 3),
    "reconstruct": (10_000, 2),
    "ab initio": (1000, 1),
}
WORKERS = (0, 1, 2)


def done(job, stack, density, client):
    """The job's result: what is to be compared."""
    if job == "refine":
        return refine(stack, density, scheduler=client)
    if job == "ab initio":
        return ab_initio(stack.without_poses(), seed=SEED, scheduler=client).particles
    return reconstruct(stack, scheduler=client)


def apart(job, found, other):
    """Of poses the largest angle, radians; of maps the largest difference beside the peak."""
    if job.startswith("reconstruct"):
        return float(abs(found.values - other.values).max() / abs(other.values).max())
    return float(rotations.distance(found.quaternions, other.quaternions).max())


def measure(job, stack, density, client, workers, repeats):
    """A record, and what was found."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = done(job, stack, density, client)
        seconds.append(time.perf_counter() - start)
    record = {
        "job": job,
        "n": len(stack),
        "workers": workers,
        "repeats": repeats,
        "seed": SEED,
        "snr": SNR,
        "commit": records.commit(),
        "wall_seconds": statistics.median(seconds),
        "least_wall_seconds": min(seconds),
        "most_wall_seconds": max(seconds),
    }
    return record, found


def table(found):
    """A row a job: seconds by workers, and how much the second is worth."""
    rows = []
    for job in dict.fromkeys(r["job"] for r in found):
        of = {r["workers"]: r for r in found if r["job"] == job}
        if set(of) == set(WORKERS):
            one, two = (of[n]["wall_seconds"] for n in (1, 2))
            off = max(r["apart"] for r in of.values())
            unit = " of the peak" if job.startswith("reconstruct") else " rad"
            rows.append(
                [
                    job.partition(",")[0],
                    f"{of[0]['n']:,}",
                    *(f"{of[n]['wall_seconds']:.1f}" for n in WORKERS),
                    f"{one / two:.2f}",
                    f"{off:.0e}{unit}",
                ]
            )
    return rows


def main(jobs):
    """Every job, with no worker, one and two."""
    header = ["job", "images", "this process, s", "one worker, s", "two workers, s"]
    header += ["one over two", "results differ by at most"]
    density, found = load_density(PARTICLE), []
    most = max(JOBS[job][0] for job in jobs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "particles.star"
        seen = simulate(density, most, SEED, snr=SNR, **MICROSCOPE)
        rng = np.random.default_rng(SEED)
        off = rng.standard_normal((most, 3)) * OFF_RAD / np.sqrt(3)
        write_particles(path, seen.with_poses(rotations.perturb(seen.quaternions, off)))
        stack, first = read_particles(path), {}
        for workers in WORKERS:
            with LocalCluster(
                n_workers=max(workers, 1), threads_per_worker=1, memory_limit=0,
                dashboard_address=None,
            ) as cluster, Client(cluster) as client:  # fmt: skip
                client.run(_warm)
                for job in jobs:
                    n, repeats = JOBS[job]
                    some = stack.select(slice(n))
                    asked = client if workers else None
                    record, result = measure(job, some, density, asked, workers, repeats)
                    record["apart"] = apart(job, result, first.setdefault(job, result))
                    print(record, flush=True)
                    found.append(record)
    records.write("workers", found, header, table(found), "make bench-workers")


def _warm():
    """What a worker loads but once."""
    import finufft  # noqa: F401

    import cryoem  # noqa: F401


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    main(parser.parse_args().jobs)
