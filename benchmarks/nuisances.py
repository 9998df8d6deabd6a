"""What real images have beside noise, a row each: ``make bench-nuisances``.

4JSV with CTF and shifts at SNR 1/16 of the frame, from a particle file to a refined map by
``cryoem solve``, as a user goes: nothing else is known. The limit is that of the images without the
nuisance. It goes on where it was interrupted.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import records
from abinitio import MICROSCOPE

from cryoem import (
    ParticleStack,
    evaluation,
    imaging,
    load_density,
    project,
    read_particles,
    rotations,
    simulate,
    write_particles,
)
from cryoem.aberrations import Aberration

N, SNR = 600, 1 / 16
KEPT = Path("results/bench-nuisances")


class Seen:
    """Images before and after their noise; each nuisance changes a part of how they came about.

    Attributes
    ----------
    clean : (n, size, size) array
        Particles through the microscope.
    noise : (n, size, size) array
        Added to them, of variance 1 as they are given to the nuisance.
    truth : ParticleStack
        Poses and CTF as they are.
    told : CtfParameters
        As the file says.
    """

    def __init__(self, seed: int) -> None:
        self.density = load_density("4jsv")
        self.rng = np.random.default_rng([seed, 7])
        self.truth = simulate(self.density, N, seed, snr=SNR, **MICROSCOPE)
        self.scale = np.sqrt(self.truth.noise.variance)
        self.clean = simulate(self.density, N, seed, **MICROSCOPE).images / self.scale
        self.noise = self.truth.images / self.scale - self.clean
        self.told = self.truth.ctf_parameters

    def through(self, parameters, shifts=None):
        """The same particles through another CTF, or elsewhere in their frames."""
        images = project(self.density, self.truth.quaternions) / self.scale
        images = imaging.shift(images, self.truth.shifts_px if shifts is None else shifts)
        values = parameters.values(self.density.box_px, self.density.voxel_size_angstrom)
        return imaging.apply_ctf(images, values)

    def stack(self) -> ParticleStack:
        """What the user has, and the truth about its poses."""
        images = (self.clean + self.noise).astype(np.float32)
        return self.truth.replace(images=images, ctf_parameters=self.told, noise=None)


def nothing(seen):
    """The particles alone."""


def ramp(seen):
    """Ice of uneven thickness: a level to 1 sigma, a rise to 2 from edge to edge, either way."""
    x = np.linspace(-0.5, 0.5, seen.clean.shape[1])
    level, dx, dy = seen.rng.uniform(-1, 1, (3, N, 1, 1))
    seen.noise = seen.noise + level + 2 * dx * x + 2 * dy * x[:, None]


def carbon(seen):
    """A carbon film across a third of the frames: a step of 1 sigma, a texture of 0.7."""
    size = seen.clean.shape[1]
    x = np.arange(size) - size // 2
    angle = seen.rng.uniform(0, 2 * np.pi, (N, 1, 1))
    from_edge = (
        np.cos(angle) * x + np.sin(angle) * x[:, None] - seen.rng.uniform(-30, 58, (N, 1, 1))
    )
    film = (seen.rng.random((N, 1, 1)) < 1 / 3) / (1 + np.exp(-from_edge / 1.5))
    texture = imaging.downsample(seen.rng.standard_normal((N, 58, 58)), size)
    seen.noise = seen.noise - film * (1 + 0.7 * texture / texture.std())


def neighbours(seen):
    """Another particle in each frame, 130 to 210 angstrom from its middle, and two in some."""
    values = seen.told.values(seen.density.box_px, seen.density.voxel_size_angstrom)
    for share in (1.0, 0.3):
        far = seen.rng.uniform(130, 210, N) / seen.density.voxel_size_angstrom
        angle = seen.rng.uniform(0, 2 * np.pi, N)
        at = far[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        size = seen.clean.shape[1]
        # Moved in a frame of twice the size, so that nothing comes in at the other edge.
        images = project(seen.density, rotations.uniform(N, seen.rng)) / seen.scale
        images = imaging.crop(imaging.shift(imaging.crop(images, 2 * size), at), size)
        there = seen.rng.random((N, 1, 1)) < share
        seen.clean = seen.clean + there * imaging.apply_ctf(images, values)


def off_centre(seen):
    """Anywhere up to a tenth of the frame off the middle, along each axis."""
    limit = seen.clean.shape[1] / 10
    shifts = seen.rng.uniform(-limit, limit, (N, 2))
    seen.truth = seen.truth.replace(shifts_px=shifts)
    seen.clean = seen.through(seen.told)


def half_contrast(seen):
    """One particle in five is half as strong as the others."""
    seen.clean = seen.clean * np.where(seen.rng.random((N, 1, 1)) < 0.2, 0.5, 1)


def magnification(seen):
    """Half of the images are 2 % larger than their pixels say."""
    larger = seen.rng.random(N) < 0.5
    stretch = Aberration(seen.density.voxel_size_angstrom, (), (1.02, 0.0, 0.0, 1.02))
    seen.clean = np.where(larger[:, None, None], stretch.apply(seen.clean), seen.clean)


def defocus(seen):
    """The defocus is another than the file's, by up to 500 angstrom."""
    off = seen.rng.uniform(-500, 500, N)
    true = replace(
        seen.told,
        defocus_u_angstrom=seen.told.defocus_u_angstrom + off,
        defocus_v_angstrom=seen.told.defocus_v_angstrom + off,
    )
    seen.clean = seen.through(true)


def astigmatism(seen):
    """So it is, and by another 500 angstrom along some axis than across it."""
    off = seen.rng.uniform(-500, 500, N)
    true = replace(
        seen.told,
        defocus_u_angstrom=seen.told.defocus_u_angstrom + off + 250,
        defocus_v_angstrom=seen.told.defocus_v_angstrom + off - 250,
        defocus_angle_degrees=seen.rng.uniform(0, 180, N),
    )
    seen.clean = seen.through(true)


def envelope(seen):
    """A detector that passes 0.4 of the signal at the finest detail (B = 200 square angstrom)."""
    seen.clean = seen.through(replace(seen.told, b_factor_angstrom2=200.0))


NUISANCES = {
    "none": nothing,
    "ice gradient": ramp,
    "carbon edge": carbon,
    "neighbours in the frame": neighbours,
    "off-centre by 10 %": off_centre,
    "a fifth at half contrast": half_contrast,
    "half of them 2 % larger": magnification,
    "defocus off by 500 A": defocus,
    "defocus and astigmatism off": astigmatism,
    "envelope": envelope,
}


def solved(nuisance: str, seed: int) -> dict:
    """The record of one nuisance."""
    seen = Seen(seed)
    limit = records.limit(seen.density, seen.truth)
    NUISANCES[nuisance](seen)
    given = seen.stack()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_particles(work / "seen.star", given.without_poses())
        wall = time.monotonic()
        program = Path(sys.executable).with_name("cryoem")
        code = [program, "solve", "seen.star", "-o", "out", "--seed", str(seed)]
        done = subprocess.run(code, cwd=work, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 3):
            raise RuntimeError(done.stderr)
        said = done.stdout + done.stderr
        found = {"verdict": re.findall(r"(?:no map|a map)\b[^\n]*", said)[-1].strip()}
        for step in ("initial", "refined"):
            if not (star := work / "out" / f"{step}.star").exists():
                continue
            stack = read_particles(star)
            error = evaluation.orientation_errors(
                stack.quaternions, given.quaternions, over="one-sided"
            )
            figures = {
                "error_rad": error.mean_rad,
                "median_rad": error.median_rad,
                "far_fraction": error.far_fraction,
                "expected_rad": float(stack.expected_error_rad.mean()),
            }
            found |= {f"{step}_{name}": value for name, value in figures.items()}
    return {
        "nuisance": nuisance,
        "n": N,
        "snr": SNR,
        "seed": seed,
        "commit": records.commit(),
        "exit_code": done.returncode,
        "bound_mean_rad": limit,
        "wall_seconds": time.monotonic() - wall,
        **found,
    }


def table(found):
    """A row a run."""
    rows = []
    for r in found:
        row = [r["nuisance"], r["verdict"].partition(":")[0]]
        for step in ("initial", "refined"):
            known = f"{step}_error_rad" in r
            row.append(
                f"{r[f'{step}_error_rad']:.3f} ({r[f'{step}_median_rad']:.3f})" if known else "-"
            )
        known = "refined_error_rad" in r
        row.append(f"{r['refined_expected_rad']:.3f}" if known else "-")
        row.append(f"{r['refined_far_fraction']:.1%}" if known else "-")
        rows.append([*row, f"{r['bound_mean_rad']:.3f}"])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nuisances", nargs="*", default=list(NUISANCES), choices=list(NUISANCES))
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in range(arguments.seeds):
        for name in arguments.nuisances:
            path = KEPT / f"{re.sub(r'[^a-z0-9]+', '-', name)}-{seed}.json"
            found.append(records.kept(path, lambda n=name, s=seed: solved(n, s)))
            header = [
                "nuisance", "verdict", "from the images alone, rad", "refined, rad", "expects, rad",
                "off by > 0.3 rad", "limit, rad",
            ]  # fmt: skip
            records.write("nuisances", found, header, table(found), "make bench-nuisances")


if __name__ == "__main__":
    main()
