"""Beside RELION: the same job on the same particle files, in one run: ``make bench-peers``.

Needs Debian's package ``relion`` (3.1.3), which the target installs where it may. Reconstruction at
the true poses: stacks with CTF and shifts, written by us, read by both; each program by its
defaults. FSC is against the density: of the whole box; within a soft ball that fills it, since
RELION empties what lies beyond; and within a mask about the particle. Each is the mean over all
shells to Nyquist.
"""

import argparse
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import records

from cryoem import (
    Density,
    fourier,
    load_density,
    maps,
    read_density,
    read_particles,
    reconstruct,
    simulate,
    write_density,
)
from cryoem.io.particles import write_particles

#: Cells: particle, its symmetry, images, SNR.
CELLS = [
    ("4jsv", "C1", n, snr) for n in (200, 1000) for snr in (float("inf"), 1 / 4, 1 / 16, 1 / 64)
] + [("1i10", "D2", n, snr) for n in (200, 1000) for snr in (1 / 4, 1 / 16)]
SEEN = {"max_shift_px": 8.0, "defocus_range_angstrom": (5e3, 3e4)}
#: Width of the ball's edge, px.
EDGE = 4


def cpu_seconds():
    """Processor time of this process and of those that it ran."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def ours(star, output, symmetry):
    """From the file to a file, as the command line does; Python has started."""
    found = reconstruct(read_particles(star), symmetry=symmetry)
    write_density(output, found)
    return found


def relion(star, output, symmetry):
    """``relion_reconstruct`` with its defaults and the CTF."""
    code = ["relion_reconstruct", "--i", star.name, "--o", output.name, "--ctf", "--sym", symmetry]
    subprocess.run(code, check=True, capture_output=True, cwd=star.parent)
    return read_density(output)


def judged(found: Density, density: Density):
    """Mean FSC of the whole box, within a ball, and within a mask."""
    n, voxel = density.box_px, density.voxel_size_angstrom
    radius = np.fft.fftshift(fourier.radius((n,) * 3))
    ball = np.clip((n / 2 - 1 - radius) / EDGE, 0, 1)
    mask = maps.soft_mask(density)
    inside = [Density(mask * d.values, voxel) for d in (found, density)]
    whole = maps.fsc(found, density)
    return {
        "mean_fsc": whole.mean,
        "mean_fsc_in_ball": maps.fsc(Density(ball * found.values, voxel), density).mean,
        "mean_fsc_in_mask": maps.fsc(*inside).mean,
        "resolution_fsc05_angstrom": whole.resolution(0.5).angstrom,
    }


def run(cell, seed, folder):
    """A record a program."""
    particle, symmetry, n, snr = cell
    density = load_density(particle)
    star = folder / "seen.star"
    write_particles(star, simulate(density, n, seed, snr=snr, **SEEN))
    found = []
    for method, program in (("cryoem", ours), ("RELION 3.1.3", relion)):
        wall, cpu = time.monotonic(), cpu_seconds()
        volume = program(star, folder / "map.mrc", symmetry)
        found.append(
            {
                "job": "reconstruction",
                "method": method,
                "particle": particle,
                "symmetry": symmetry,
                "n": n,
                "snr": "inf" if np.isinf(snr) else snr,
                "seed": seed,
                "commit": records.commit(),
                "cpu_seconds": cpu_seconds() - cpu,
                "wall_seconds": time.monotonic() - wall,
                **judged(volume, density),
            }
        )
        print(found[-1], flush=True)
    return found


def table(found):
    """A row a cell: medians over seeds, ours and theirs."""
    rows = []
    keys = ("particle", "symmetry", "n", "snr")
    for cell in dict.fromkeys(tuple(r[k] for k in keys) for r in found):
        of_cell = [r for r in found if tuple(r[k] for k in keys) == cell]
        particle, symmetry, n, snr = cell
        told = "noiseless" if snr == "inf" else f"SNR 1/{1 / snr:.0f}"
        row = [f"{particle}, {symmetry}", f"{n:,}", told]
        for key, digits in (
            ("mean_fsc", 3), ("mean_fsc_in_ball", 3), ("mean_fsc_in_mask", 3), ("cpu_seconds", 1)
        ):  # fmt: skip
            of_both = [
                float(np.median([r[key] for r in of_cell if r["method"] == method]))
                for method in dict.fromkeys(r["method"] for r in of_cell)
            ]
            row.append(" / ".join(f"{value:.{digits}f}" for value in of_both))
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    header = [
        "particle", "images", "noise", "mean FSC, cryoem / RELION", "within a ball",
        "within a mask", "CPU s",
    ]  # fmt: skip
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for cell in CELLS:
            for seed in range(arguments.seeds):
                found += run(cell, seed, Path(folder))
            records.write("peers", found, header, table(found), "make bench-peers")


if __name__ == "__main__":
    main()
