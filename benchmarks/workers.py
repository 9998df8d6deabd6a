"""What a second core is worth: ``make bench-workers`` (40 minutes, with nothing else beside it).

Refinement against a density and half against half, reconstruction and ab initio, each in this
process on one thread, in another one on two, then by one Dask worker and by two, of one thread
each, on the same images in a file: 4JSV at SNR 1/16, with CTF and shifts. Medians of the repeats;
and what the results differ by.
"""

import argparse
import contextlib
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("CRYOEM_THREADS", "1")  # before cryoem is loaded; the workers inherit it

import numpy as np
import records
from distributed import Client, LocalCluster

from cryoem import (
    ab_initio,
    load_density,
    read_particles,
    reconstruct,
    refine,
    refine_halves,
    rotations,
    simulate,
    threads,
    write_particles,
)

PARTICLE, SEED, SNR = "4jsv", 90_731, 1 / 16
MICROSCOPE = {"max_shift_px": 8.0, "defocus_range_angstrom": (5e3, 3e4)}
OFF_RAD = 0.1
#: Job: images, and how often it is done.
JOBS = {
    "refine": (2000, 3),
    "refine, halves": (4000, 1),
    "reconstruct, few": (2000, 3),
    "reconstruct": (10_000, 2),
    "ab initio": (1000, 1),
}
#: Rounds of the halves: told, that all have as many.
ROUNDS = 4
#: Threads of the process, and Dask workers beside it; without any it works itself.
WAYS = ((1, 0), (2, 0), (1, 1), (1, 2))


def done(job, stack, density, client):
    """The job's result: what is to be compared."""
    if job == "refine":
        return refine(stack, density, scheduler=client)
    if job == "refine, halves":
        return refine_halves(stack, rounds=ROUNDS, scheduler=client).particles
    if job == "ab initio":
        return ab_initio(stack.without_poses(), seed=SEED, scheduler=client).particles
    return reconstruct(stack, scheduler=client)


def apart(job, found, other):
    """Of poses the largest angle, radians; of maps the largest difference beside the peak."""
    if job.startswith("reconstruct"):
        return float(abs(found.values - other.values).max() / abs(other.values).max())
    return float(rotations.distance(found.quaternions, other.quaternions).max())


def measure(job, path, workers):
    """A record of this process, with so many workers; and what was found."""
    density, (n, repeats), seconds = load_density(PARTICLE), JOBS[job], []
    stack = read_particles(path).select(slice(n))
    with contextlib.ExitStack() as opened:
        client = None
        if workers:
            cluster = opened.enter_context(
                LocalCluster(
                    n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address=None
                )
            )
            client = opened.enter_context(Client(cluster))
            client.run(_warm)
        for _ in range(repeats):
            start = time.perf_counter()
            found = done(job, stack, density, client)
            seconds.append(time.perf_counter() - start)
    record = {
        "job": job,
        "n": n,
        "threads": threads.count(),
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


def measured(job, path, count, workers):
    """The same by a process of so many threads of its own."""
    told = path.with_name("measured.pickle")
    subprocess.run(
        [sys.executable, __file__, "--jobs", job, "--child", path, told, f"{workers}"],
        env=os.environ | {"CRYOEM_THREADS": str(count)}, check=True,
    )  # fmt: skip
    return pickle.loads(told.read_bytes())


def table(found):
    """A row a job: seconds by threads and by workers, and how much the second is worth."""
    rows = []
    for job in dict.fromkeys(r["job"] for r in found):
        of = {(r["threads"], r["workers"]): r for r in found if r["job"] == job}
        if set(of) == set(WAYS):
            seconds = [of[way]["wall_seconds"] for way in WAYS]
            off = max(r["apart"] for r in of.values())
            unit = " of the peak" if job.startswith("reconstruct") else " rad"
            rows.append(
                [
                    job.removesuffix(", few"),
                    f"{of[WAYS[0]]['n']:,}",
                    *(f"{s:.1f}" for s in seconds[:2]),
                    f"{seconds[0] / seconds[1]:.2f}",
                    *(f"{s:.1f}" for s in seconds[2:]),
                    f"{seconds[2] / seconds[3]:.2f}",
                    f"{off:.0e}{unit}",
                ]
            )
    return rows


def main(jobs):
    """Every job in every way."""
    header = ["job", "images", "one thread, s", "two threads, s", "one over two"]
    header += ["one worker, s", "two workers, s", "one over two", "results differ by at most"]
    found = []
    most = max(JOBS[job][0] for job in jobs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "particles.star"
        seen = simulate(load_density(PARTICLE), most, SEED, snr=SNR, **MICROSCOPE)
        rng = np.random.default_rng(SEED)
        off = rng.standard_normal((most, 3)) * OFF_RAD / np.sqrt(3)
        write_particles(path, seen.with_poses(rotations.perturb(seen.quaternions, off)))
        for job in jobs:
            first = None
            for way in WAYS:
                record, result = measured(job, path, *way)
                first = result if first is None else first
                record["apart"] = apart(job, result, first)
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
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        read, told, workers = arguments.child
        record, found = measure(arguments.jobs[0], Path(read), int(workers))
        Path(told).write_bytes(pickle.dumps((record, found)))
    else:
        main(arguments.jobs)
