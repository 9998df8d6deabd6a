"""Orientation of growing sets from a file: ``make bench-stream`` (an hour and 6 GB of disk).

Processor time by step (of all threads: it depends little on what else runs), wall time, peak memory
and error over n. Each n runs in a process of its own, so that its peak
is its own; the images, SNR 1/16, are simulated into one file from a seed that nothing was trained
or tuned on. ``python benchmarks/stream.py FOLDER`` keeps that file in FOLDER, and finds it there.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import records

from cryoem import evaluation, load_density, load_estimator, orient, report
from cryoem import simulate as simulated
from cryoem.estimator import Estimator
from cryoem.io.particles import read_particles
from cryoem.recovery import orienting
from cryoem.recovery.chunks import Job

PARTICLE, TEST_SEED, SNR = "4jsv", 90_212, 1 / 16
SIZES = (1_000, 10_000)
#: What the curve is extrapolated to.
TARGET = 10_000_000


def simulate(folder, n, part=1000):
    """Write ``images.npy`` and ``true.npy``, simulated in parts."""
    density = load_density(PARTICLE)
    shape = (n, density.box_px, density.box_px)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.float32, shape)
    true = np.empty((n, 4))
    for start in range(0, n, part):
        seen = simulated(density, part, [TEST_SEED, start], snr=SNR)
        images[start : start + part], true[start : start + part] = seen.images, seen.quaternions
    np.save(folder / "true.npy", true)


def clocked(owner, name):
    """Replace a function by one that notes its processor seconds in the list that is returned."""
    function, seconds = getattr(owner, name), []

    def run(*args, **kwargs):
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.process_time() - start)

    setattr(owner, name, run)
    return seconds


def measure(folder, n):
    """Orient the first n images."""
    network = load_estimator(PARTICLE)
    edge = network.preprocessing.frame_px
    network.embed(np.zeros((256, edge, edge)))  # TensorFlow's start-up is not the curve's
    resting = report.peak_memory_gb()
    embedding = clocked(Estimator, "predict")
    landmarks = clocked(orienting, "landmarks_from_copies")
    placing = clocked(Job, "place")
    stack = read_particles(folder / "images.npy").select(slice(n))
    with tempfile.TemporaryDirectory() as work:
        start, cpu = time.perf_counter(), time.process_time()
        found = orient(network, stack, work=work)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        peak = report.peak_memory_gb()
        true = np.load(folder / "true.npy")[:n]
        error = evaluation.orientation_errors(np.array(found.quaternions), true, over="one-sided")
    chunks = sum(embedding[3:])  # the first three are the landmarks and their copies
    return {
        "case": "stream",
        "n": n,
        "seed": TEST_SEED,
        "snr": SNR,
        "seconds": seconds,
        "landmarks_cpu_seconds": sum(landmarks),
        "embedding_cpu_seconds": chunks,
        "lateration_cpu_seconds": sum(placing) - chunks,
        "reading_writing_cpu_seconds": cpu - sum(landmarks) - sum(placing),
        "peak_memory_gb": peak,
        "resting_memory_gb": resting,
        "one_sided_error_rad": error.mean_rad,
        "expected_error_rad": float(found.expected_error_rad.mean()),
        "outliers": int(found.outlier.sum()),
    }


def table(found):
    def shown(seconds):
        return f"{seconds:,.3g} s" if seconds < 1000 else f"{seconds / 3600:,.2g} h"

    names = [
        f"{s}_cpu_seconds" for s in ("landmarks", "embedding", "lateration", "reading_writing")
    ]
    rows = [
        [
            f"{r['n']:,}",
            *(shown(r[name]) for name in names),
            shown(r["seconds"]),
            f"{r['peak_memory_gb']:.2f} GB",
            f"{r['one_sided_error_rad']:.3f} rad",
        ]
        for r in found
    ]
    last = found[-1]
    each = [1] + [TARGET / last["n"]] * 3  # landmarks are as many whatever n
    grown = [last[name] * times for name, times in zip(names, each, strict=True)]
    title = f"{TARGET:,}, **extrapolated** from {last['n']:,}"
    return [*rows, [title, *map(shown, grown), "", "", ""]]


def main(folder):
    if not (folder / "true.npy").exists():
        simulate(folder, SIZES[-1])
    found = []
    for n in SIZES:
        command = [sys.executable, __file__, str(folder), str(n)]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        found.append(json.loads(output.splitlines()[-1]))
        print(found[-1], flush=True)
    header = ["particles", "landmarks, core time", "embedding", "lateration", "reading, writing"]
    header += ["wall time", "peak memory", "error, frame fixed without the truth"]
    records.write("stream", found, header, table(found), "make bench-stream")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
    elif len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
