"""Refinement against its limits: ``make bench-refinement`` (about a quarter of an hour).

Each finished row is kept in ``results/bench-refinement/``, so that an interrupted run goes on where
it stopped. ``--map NAME=PATH`` measures on a map of one's own too, and with ``--weights NAME=PATH``
refines from what that estimator finds. Test images are projections of a density at half the voxel
size, down-sampled; the fit sees it at the full one.
"""

import argparse
import math
import time
import warnings
from pathlib import Path

import numpy as np
import records

from cryoem import (
    Density,
    ParticleStack,
    Search,
    evaluation,
    imaging,
    load_density,
    maps,
    project,
    read_density,
    refine,
    refine_against,
    refine_halves,
    rotations,
    structures,
)
from cryoem.io import files

SEED = 90_311
FRAME, VOXEL = 116, 3.67
N_KNOWN, N_UNKNOWN, N_TIMED = 300, 1650, 10_000
KEPT = Path("results/bench-refinement")


class Particle:
    """A density at half the voxel size, and what the fit knows of it."""

    def __init__(self, name, path=None, weights=None):
        self.name, self.weights = name, weights
        if path is None:
            fine = load_density(name, voxel_size_angstrom=VOXEL / 2, box_px=2 * FRAME)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fine = read_density(path).in_box(FRAME).resampled(2 * FRAME)
        # Projections are counted in voxels: half of them make the images those of the coarse one.
        self.fine = Density(fine.values / 2, fine.voxel_size_angstrom)
        self.known = fine.resampled(FRAME)
        reach = np.argwhere(self.known.values > 0.02 * self.known.values.max()) - FRAME // 2
        radius = np.linalg.norm(reach, axis=1).max()
        #: Images are cut to what holds the particle and its shifts.
        self.box = min(FRAME, 2 * math.ceil(radius + 4))

    def images(self, n, snr, seed, max_shift_px):
        """Images of the whole frame's SNR, cut to the box; orientations, shifts and variance."""
        q = rotations.uniform(n, rotations.generator(seed, "views"))
        clean = project(self.fine, q, box_px=FRAME)
        shifts = imaging.triangular_shifts(n, rotations.generator(seed, "shifts"), max_shift_px)
        clean = imaging.shift(clean, shifts)
        variance = 0.0 if math.isinf(snr) else float(clean.var()) / snr
        if variance:
            clean = imaging.add_noise(clean, rotations.generator(seed, "noise"), variance=variance)
        return clean, q, shifts, variance

    def bound(self, q, variance):
        """Mean error and root-mean-square shift that the noise allows, from 100 of the views."""
        cut = self.known.in_box(self.box)
        limit = evaluation.cramer_rao(cut, q[:100], variance, shifts=True)
        shift = np.sqrt(np.trace(limit[:, 3:, 3:], axis1=1, axis2=2).mean())
        return float(evaluation.mean_error_of(limit[:, :3, :3]).mean()), float(shift)


def off(q, angle, seed):
    w = rotations.generator(seed, "start").standard_normal((len(q), 3))
    return rotations.perturb(q, angle * w / np.linalg.norm(w, axis=1, keepdims=True))


def ratio(snr):
    return "noiseless" if math.isinf(snr) else f"SNR 1/{1 / snr:g}"


def timed(function, *args, **kwargs):
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*args, **kwargs)
    return result, {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
    }


def known(particle, snr, n=N_KNOWN):
    """The density is known: from 0.3 rad off to the end."""
    images, q, shifts, variance = particle.images(n, snr, SEED, 2.0)
    images = imaging.crop(images, particle.box)
    cut = particle.known.in_box(particle.box)
    start = off(q, 0.3, SEED)
    # Where the likelihood has several maxima: many starts, from a wider ball.
    search = Search(starts=64, spread_rad=0.45) if snr < 1 / 50 else Search()
    stack = ParticleStack(images, VOXEL, quaternions=start)
    found, seconds = timed(refine, stack, cut, resolution_angstrom=2 * VOXEL, search=search)
    error = rotations.distance(found.quaternions, q)
    bound, shift_bound = particle.bound(q, variance) if variance else (0.0, 0.0)
    record = {
        "case": "known density",
        "particle": particle.name,
        "snr": ratio(snr),
        "n": n,
        "box_px": particle.box,
        "starts": search.starts,
        "spread_rad": search.spread_rad,
        "start_error_rad": 0.3,
        "error_rad": float(error.mean()),
        "bound_rad": bound,
        "converged_share": float(np.mean(error < 4 * (bound or 0.002))),
        "shift_error_px": float(np.linalg.norm(found.shifts_px - shifts, axis=1).mean()),
        "shift_bound_rms_px": shift_bound,
        **seconds,
    }
    if variance:
        w = rotations.multiply(rotations.inverse(q), found.quaternions)
        w = 2 * (w * np.sign(w[:, 3:]))[:, :3]
        square = np.einsum("ni,nij,nj->n", w, np.linalg.inv(found.covariances), w)
        record["normalised_square"] = float(square.mean())
        record["normalised_square_median"] = float(np.median(square))  # 2.37 of three
    if snr < 1 / 50:
        best = refine(
            stack.with_poses(q, shifts),
            cut,
            resolution_angstrom=2 * VOXEL,
            search=Search(starts=2 * search.starts),
        )
        likeliest = records.likelier(found, best)
        record["likeliest_error_rad"] = float(rotations.distance(likeliest, q).mean())
    yield record


def speed(particle, n=N_TIMED, box=64):
    """Many small images: the time."""
    if particle.box > box:
        return
    images, q, _, _ = particle.images(n // 10, 1 / 16, SEED + 1, 2.0)
    images = np.tile(imaging.crop(images, box), (10, 1, 1))
    q = np.tile(q, (10, 1))
    stack = ParticleStack(images, VOXEL, quaternions=off(q, 0.15, SEED + 1))
    found, seconds = timed(refine, stack, particle.known.in_box(box), resolution_angstrom=2 * VOXEL)
    error = rotations.distance(found.quaternions, q)
    yield {
        "case": "speed",
        "particle": particle.name,
        "snr": ratio(1 / 16),
        "n": len(q),
        "box_px": box,
        "start_error_rad": 0.15,
        "error_rad": float(error.mean()),
        **seconds,
    }


def unknown(particle, snr=1 / 16, n=N_UNKNOWN):
    """The density only reconstructed from the same images."""
    images, q, _, variance = particle.images(n, snr, SEED + 2, 0.0)
    if particle.weights is None:
        return
    from cryoem import load_estimator, orient

    start = orient(load_estimator(particle.weights), ParticleStack(images, VOXEL)).quaternions
    stack = ParticleStack(imaging.crop(images, particle.box), VOXEL, quaternions=start)
    found, seconds = timed(refine_halves, stack, seed=SEED)
    refined = found.particles.quaternions
    after = evaluation.orientation_errors(refined, q)
    bound, _ = particle.bound(q, variance)
    aligned = evaluation.align(refined, q, over="one-sided").quaternions
    laid = maps.register(found.density, particle.known.in_box(particle.box))
    against = maps.fsc(laid.density, particle.known.in_box(particle.box), mask=None)
    yield {
        "case": "density reconstructed",
        "particle": particle.name,
        "snr": ratio(snr),
        "n": n,
        "box_px": particle.box,
        "start": "the estimator, frame from copies",
        "weights_sha256": files.sha256(particle.weights),
        "start_error_rad": evaluation.orientation_errors(start, q).mean_rad,
        "error_rad": after.mean_rad,
        "median_error_rad": after.median_rad,
        "bound_rad": bound,
        "converged_share": float(np.mean(rotations.distance(aligned, q) < 4 * bound)),
        "shift_error_px": None,
        "resolutions_angstrom": [float(x) for x in found.resolutions_angstrom],
        "half_map_resolution_angstrom": found.fsc.corrected.resolution(0.143).angstrom,
        "nyquist_limited": found.fsc.corrected.resolution(0.143).nyquist_limited,
        "resolution_against_density_fsc05_angstrom": against.resolution(0.5).angstrom,
        "hand_mirrored": laid.mirrored,
        "held_out_correlation": found.held_out_correlation,
        "chance_correlation": found.chance_correlation,
        **seconds,
    }


def bias(particle, n=500):
    """Pure noise and particles, oriented against the density to 15 A and judged beyond it."""
    cut = particle.known.in_box(particle.box)
    for what in ("noise", "particles"):
        for seed in range(SEED, SEED + 2):
            images, q, _, _ = particle.images(n, 1 / 16, seed, 0.0)
            if what == "noise":
                rng = rotations.generator(seed, "pure noise")
                images = rng.standard_normal(images.shape, dtype=np.float32)
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always")
                stack = ParticleStack(
                    imaging.crop(images, particle.box), VOXEL, quaternions=off(q, 0.15, seed)
                )
                found, seconds = timed(refine_against, stack, cut, seed=seed)
            yield {
                "case": "reference bias",
                "particle": particle.name,
                "what": what,
                "seed": seed,
                "snr": ratio(1 / 16) if what == "particles" else "no signal",
                "n": n,
                "box_px": particle.box,
                "start_error_rad": 0.15,
                "error_rad": evaluation.orientation_errors(
                    found.particles.quaternions, q, over="none"
                ).mean_rad,
                "correlation_beyond": found.test.correlation,
                "z_beyond": found.test.z,
                "warned": any("reference alone" in str(note.message) for note in notes),
                **seconds,
            }


def table(found):
    rows = []
    for r in found:
        what = f"{r['particle'].upper()}, {r['case']}, {r['snr']}, n = {r['n']:,}, {r['box_px']} px"
        took = f"{r['seconds']:.0f} s ({r['cpu_seconds']:.0f} s CPU)"
        bound = r.get("bound_rad")
        start, end = f"{r['start_error_rad']:.3f}", f"{r['error_rad']:.5f}"
        limit = f"{bound:.4f}" if bound else "-"
        of = f"{r['error_rad'] / bound:.2f}" if bound else "-"
        share = f"{100 * r['converged_share']:.1f} %" if "converged_share" in r else "-"
        shift = r.get("shift_error_px")
        shift = "-" if shift is None else f"{shift:.4f}"
        if "likeliest_error_rad" in r:
            of += f"; {r['error_rad'] / r['likeliest_error_rad']:.2f} x the likeliest's"
        if r["case"] == "reference bias":
            what += f": z = {r['z_beyond']:.1f} beyond 15 A, " + (
                "warned" if r["warned"] else "no warning"
            )
        if r["case"] == "density reconstructed":
            what += (
                f"; half-maps {r['half_map_resolution_angstrom']:.1f} A, held-out correlation "
                f"{r['held_out_correlation']:.3f} (chance {r['chance_correlation']:.3f})"
            )
        rows.append([what, start, end, limit, of, share, shift, took])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--map", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--weights", action="append", default=[], metavar="NAME=PATH")
    arguments = parser.parse_args()
    weights = dict(argument.split("=", 1) for argument in arguments.weights)
    particles = [Particle("4jsv", weights=structures.shipped_file("4jsv.npz"))]
    for name, path in (argument.split("=", 1) for argument in arguments.map):
        particles.append(Particle(name, path, weights.get(name)))
    rows = {
        "noiseless": lambda p: known(p, math.inf),
        "sixteenth": lambda p: known(p, 1 / 16),
        "reconstructed": unknown,
        "bias": bias,
        "hundredth": lambda p: known(p, 1 / 100, 200),
        "speed": speed,
    }
    header = [
        "what", "start (rad)", "end (rad)", "bound (rad)", "ratio", "within 4 bounds",
        "shift error (px)", "time",
    ]  # fmt: skip
    found = []
    for name, make in rows.items():
        for particle in particles:
            path = KEPT / f"{particle.name}-{name}.json"
            found += records.kept(path, lambda m=make, p=particle: list(m(p)))
            records.write("refinement", found, header, table(found), "make bench-refinement")


if __name__ == "__main__":
    main()
