"""A large set from the images alone, end to end: ``make bench-large`` (hours, and 7 GB of disk).

100,000 particles of 4JSV at SNR 1/16, with CTF and shifts, in frames of 128 px, are written as
RELION's files and given to ``cryoem solve --learn 38400``, which is told nothing of the particle: a
map from 10,000 of them, a network that learns from it, all placed by that, refinement (not with
``--poses``). Time, memory so far and error of each step; the truth is looked at when it is done.
``python benchmarks/large.py FOLDER`` keeps everything in FOLDER, and goes on there.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import records
from abinitio import MICROSCOPE

from cryoem import (
    evaluation,
    load_density,
    maps,
    read_density,
    read_particles,
    simulate,
    threads,
    write_particles,
)
from cryoem.cli.judging import paired
from cryoem.io import files

PARTICLE, BOX, SNR, PART = "4jsv", 128, 1 / 16, 10_000
#: Each step, what it writes last, and the particles that it places.
STEPS = {
    "ab initio, of a part": ("initial.html", "initial.star"),
    "a network learns": ("network.npz", None),
    "all are placed": ("oriented.star", "oriented.star"),
    "refinement of all": ("refined.html", "refined.star"),
}
#: With these the orientations are there; the first two take as long of more particles.
POSES, FIXED = list(STEPS)[:3], 2
TOTALS = {"from the file to poses": 3, "from the file to a refined map": 4}
NETWORK = "network_error_rad", "network_median_rad"
#: What they are extrapolated to.
TARGET = 1_000_000


def density():
    return load_density(PARTICLE, box_px=BOX)


def written(folder, n, seed):
    """Write ``seen.star`` with its stacks, and ``true.npy``, in parts of 10,000."""
    star, lines, true = folder / "seen.star", [], []
    for start in range(0, n, PART):
        stack = simulate(density(), min(PART, n - start), [seed, start], snr=SNR, **MICROSCOPE)
        part = folder / f"seen_{start}.star"
        write_particles(part, stack.without_poses().replace(noise=None))
        true.append(stack.quaternions)
        rows = part.read_text().rstrip("\n").split("\n")
        labels = max(i for i, line in enumerate(rows) if line.startswith("_"))
        lines += rows if not lines else rows[labels + 1 :]
        part.unlink()
    np.save(folder / "true.npy", np.concatenate(true))
    with files.atomic(star) as temporary:  # last: it says that all is there
        temporary.write_text("\n".join(lines) + "\n")


def spent(process):
    """Processor seconds of a process so far, and its peak memory, GB."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    ticks = sum(int(fields[i]) for i in (11, 12))  # utime, stime
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return ticks / os.sysconf("SC_CLK_TCK"), int(peak.split()[1]) / 1e6


def code_of(old, commit):
    """The code that a step has run: all of them, where it was interrupted between two."""
    return ", ".join(dict.fromkeys([*filter(None, old.get("commit", "").split(", ")), commit]))


def solved(folder, seed, images, learn, steps):
    """Run ``cryoem solve``, and note what each step takes: those of an earlier run stay."""
    note, out = folder / "steps.json", folder / "solved"
    took = json.loads(note.read_text()) if note.exists() else {}
    program, commit = Path(sys.executable).with_name("cryoem"), records.commit()
    code = [program, "solve", "seen.star", "-o", "solved", "--seed", str(seed)]
    code += ["--images", str(images), "--learn", str(learn)]
    with (folder / "solve.log").open("a") as log:
        process = subprocess.Popen(code, cwd=folder, stdout=log, stderr=log)
        before, running = (time.monotonic(), 0.0), True
        while running and any(not (out / STEPS[step][0]).exists() for step in steps):
            step = next(step for step in steps if not (out / STEPS[step][0]).exists())
            time.sleep(2)
            running = process.poll() is None
            try:
                cpu, peak = spent(process)
            except (OSError, StopIteration):  # it has just ended
                cpu, peak = before[1], 0.0
            now = (time.monotonic(), cpu)
            old = took.get(step, {"wall_seconds": 0, "cpu_seconds": 0, "peak_memory_gb": 0})
            took[step] = {
                "wall_seconds": old["wall_seconds"] + now[0] - before[0],
                "cpu_seconds": old["cpu_seconds"] + now[1] - before[1],
                "peak_memory_gb": max(old["peak_memory_gb"], peak),
                "commit": code_of(old, commit),
            }
            before = now
            with files.atomic(note) as temporary:
                temporary.write_text(json.dumps(took, indent=1))
        if running and len(steps) == len(STEPS):
            process.wait()
        elif running:
            process.terminate()
            process.wait()
    if any(not (out / STEPS[step][0]).exists() for step in steps):
        raise RuntimeError(f"cryoem solve has ended early; see {folder / 'solve.log'}")
    return took


def resolutions(star):
    """Of a step's map: of its half-maps, and beside the density, laid onto it; angstrom."""
    halves = (read_density(star.with_name(f"{star.stem}_half{half}.mrc")) for half in (1, 2))
    pair = maps.HalfMaps(*halves, independent=True)
    alike = maps.half_map_fsc(pair, maps.soft_mask(pair.mean)).corrected.resolution(0.143)
    known = density()
    laid = maps.register(read_density(star.with_suffix(".mrc")), known)
    return {
        "half_map_resolution_angstrom": alike.angstrom,
        "density_fsc05_angstrom": maps.fsc(laid.density, known).resolution(0.5).angstrom,
    }


def measured(folder, n, seed, images, learn, took):
    """A record a step."""
    true, found = np.load(folder / "true.npy"), []
    seen = folder / "seen.star"
    stack, rows = read_particles(seen), {}
    some = simulate(density(), 200, [seed, 0], snr=SNR, **MICROSCOPE)
    limit = records.limit(density(), some)
    for step, spent_there in took.items():
        record = {
            "step": step, "particle": PARTICLE, "n": n, "box_px": BOX, "snr": SNR, "seed": seed,
            "images_of_the_part": images, "images_learned": learn, "threads": threads.count(),
            "bound_mean_rad": limit, **spent_there,
        }  # fmt: skip
        star = STEPS[step][1] and folder / "solved" / STEPS[step][1]
        if star and star.exists():
            placed = read_particles(star)
            rows[step] = paired(star, placed, seen, stack)
            error = evaluation.orientation_errors(placed.quaternions, true[rows[step]])
            record |= {
                "placed": len(placed),
                "error_rad": error.mean_rad,
                "median_rad": error.median_rad,
                "far_fraction": error.far_fraction,
                "expected_rad": float(placed.expected_error_rad.mean()),
            }
            if star.with_suffix(".mrc").exists():
                record |= resolutions(star)
            if step == POSES[-1]:  # the part keeps the orientations that made the map
                others = ~np.isin(rows[step], rows[POSES[0]])
                error = evaluation.orientation_errors(
                    placed.quaternions[others], true[rows[step][others]]
                )
                record |= {
                    "network_error_rad": error.mean_rad,
                    "network_median_rad": error.median_rad,
                }
        found.append(record)
    return found + [
        total(found, name, n, n) for name, steps in TOTALS.items() if len(found) >= steps
    ]


def total(found, name, n, placed):
    """All steps in one record; of more particles than were placed, extrapolated."""
    steps = found[: TOTALS[name]]
    spent_on = {
        f"{kind}_minutes": sum(
            r[f"{kind}_seconds"] / 60 * (1 if i < FIXED else n / placed)
            for i, r in enumerate(steps)
        )
        for kind in ("wall", "cpu")
    }
    same = {key: steps[-1][key] for key in ("particle", "box_px", "snr", "seed", "threads")}
    errors = {key: found[len(POSES) - 1][key] for key in NETWORK}
    peak = max(r["peak_memory_gb"] for r in steps)
    return {"step": name, "n": n, **same, **errors, **spent_on, "peak_memory_gb": peak}


def table(found):
    """A row a step, and what more particles would take."""
    rows, steps = [], [r for r in found if r["step"] not in TOTALS]
    for r in steps:
        known = "error_rad" in r
        resolution = r.get("half_map_resolution_angstrom")
        rows.append(
            [
                r["step"],
                f"{r['placed']:,}" if known else "-",
                f"{r['wall_seconds'] / 60:.1f}",
                f"{r['cpu_seconds'] / 60:.1f}",
                f"{r['peak_memory_gb']:.1f}",
                f"{r['error_rad']:.3f} ({r['median_rad']:.3f})" if known else "-",
                f"{r['far_fraction']:.1%}" if known else "-",
                f"{r['bound_mean_rad']:.3f}",
                f"{resolution:.1f} ({r['density_fsc05_angstrom']:.1f})" if resolution else "-",
            ]
        )
    there = steps[0]["n"]
    for name, last in TOTALS.items():
        for n in sorted({there, TARGET}) if len(steps) >= last else ():
            r = total(steps, name, n, there)
            more = n > there
            minutes = [f"{r[key]:,.0f}" for key in ("wall_minutes", "cpu_minutes")]
            peak = "-" if more else f"{r['peak_memory_gb']:.1f}"
            title = f"{name}, **extrapolated**" if more else name
            rows.append([title, f"{n:,}", *minutes, peak, *"----"])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("results/bench-large"))
    parser.add_argument("--particles", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=10_000, help="Of the part.")
    parser.add_argument("--learn", type=int, default=38_400, help="What the network learns from.")
    parser.add_argument("--poses", action="store_true", help="End before the refinement of all.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, n, seed = arguments.folder, arguments.particles, arguments.seed
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "seen.star").exists():
        written(folder, n, seed)
    elif (there := len(np.load(folder / "true.npy"))) != n:
        raise ValueError(f"{folder}: holds {there:,} particles; wanted another folder for {n:,}")
    steps = POSES if arguments.poses else list(STEPS)
    took = solved(folder, seed, arguments.images, arguments.learn, steps)
    found = measured(folder, n, seed, arguments.images, arguments.learn, took)
    print(json.dumps(found, indent=1))
    header = [
        "step", "particles", "min", "CPU min", "peak memory so far, GB", "mean (median) error, rad",
        "off by > 0.3 rad", "limit, rad", "half-maps (beside the density at 0.5), A",
    ]  # fmt: skip
    code = f"make bench-large{' ARGS=--poses' * arguments.poses}"
    records.write("large", found, header, table(found), code)


if __name__ == "__main__":
    main()
