"""Beside RELION: the same job on the same particle files, in one run: ``make bench-peers``.

Needs Debian's package ``relion`` (3.1.3), which the target installs where it may. Stacks with CTF
and shifts are written by us and read by both. FSC is against the density: of the whole box; within
a soft ball that fills it, since RELION empties what lies beyond; and within a mask about the
particle. Each is the mean over all shells to Nyquist.

projection
    Of a phantom whose projections are known exactly, each program on one thread, in an environment
    of its own: ``projecting.py``. RELION's time is of ``relion_project`` from its start to the
    files that it writes.
reconstruction
    At the true poses, each program by its defaults.
refinement
    From a map at 40 A, nothing else known: RELION's auto-refine as its tutorial runs it
    (``relion_refine_mpi --auto_refine``, a leader and two followers on two cores), and ``cryoem
    solve --reference``. Of the particles' poses at the end, of the half-maps and of the time. The
    images are few and small, for RELION to end. Beside them what is found where the density is
    known: matching and the network that ships, each alone and refined as ``cryoem refine --map``.
simulation
    ``relion_project``, and cryoJAX, make the images: projector, CTF, shifts and noise are none of
    ours, and cryoJAX' particles are dark. What their likeness with ours is, and where particles
    end: from near the truth, the density known, and from the images alone.
aberrations
    ``relion_project`` makes the images, which then are given aberrations, and noise; reconstructed
    by both, with and without the columns that tell of them. (``relion_project`` gives its images
    those of the CTF alone, whatever its file tells.)
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mrcfile
import numpy as np
import records
from scipy.spatial.transform import Rotation

from cryoem import (
    Density,
    ab_initio,
    evaluation,
    fourier,
    load_density,
    load_estimator,
    maps,
    matching,
    orient,
    read_density,
    read_particles,
    reconstruct,
    refine,
    refine_against,
    refine_halves,
    rotations,
    simulate,
    survey,
    write_density,
)
from cryoem.density import Phantom
from cryoem.io.particles import write_particles
from cryoem.noise import Noise
from cryoem.particles import ParticleFile
from cryoem.preprocessing import preprocessing_for

#: Cells: particle, its symmetry, images, SNR.
CELLS = [
    ("4jsv", "C1", n, snr) for n in (200, 1000) for snr in (float("inf"), 1 / 4, 1 / 16, 1 / 64)
] + [("1i10", "D2", n, snr) for n in (200, 1000) for snr in (1 / 4, 1 / 16)]
SEEN = {"max_shift_px": 8.0, "defocus_range_angstrom": (5e3, 3e4)}
#: Width of the ball's edge, px.
EDGE = 4
#: Cells of the refinement: particle, its symmetry, images, SNR, box; and what the map begins with.
REFINED = [("1i10", "D2", 300, 1 / 16, 64), ("4jsv", "C1", 300, 1 / 16, 64)]
KNOWN, DIAMETER = 40.0, 150.0
#: Pixels from one shift that is matched to the next.
STEP = 2
#: RELION's auto-refine as its tutorial has it, for a reference that is not on the images' scale.
AUTO_REFINE = f"""
    relion_refine_mpi --auto_refine --split_random_halves
    --i seen.star --ref known.mrc --o relion/run --firstiter_cc --ini_high {KNOWN:g} --ctf
    --particle_diameter {DIAMETER:g} --flatten_solvent --zero_mask --oversampling 1
    --healpix_order 2 --auto_local_healpix_order 4 --offset_range 5 --offset_step 2
    --low_resol_join_halves 40 --norm --scale --pad 2 --dont_combine_weights_via_disc
    --preread_images --pool 30 --j 1 --random_seed 1
""".split()
#: A leader, which only waits, as busily as the others work, and two that do; each tells its time.
LED = ["mpirun", "--oversubscribe", "-n", "3", "sh", "-c"]
LED += ['"$@" && times > relion/times$OMPI_COMM_WORLD_RANK', "rank"]
#: Cells of the simulation: particle, symmetry, images, SNR, and who makes them; and how far off, in
#: each component, those that know the density begin: radians and pixels.
SIMULATED = [
    (particle, symmetry, 1000, 1 / 16, simulator)
    for particle, symmetry in (("4jsv", "C1"), ("1i10", "D2"))
    for simulator in ("RELION", "cryoJAX")
]
OFF = 0.1, 1.0
#: cryoJAX' environment, which the target makes.
CRYOJAX = Path("results/cryojax/bin/python").absolute()
#: Aberrations, as columns: about two radians at the finest detail, or a pixel at the frame's edge.
ABERRATED = {
    "beam tilt": {"rlnBeamTiltX": 12.0, "rlnBeamTiltY": -6.0},
    "trefoil": {"rlnOddZernike": "[0,0,700,0,0,-400]"},
    "symmetric": {"rlnEvenZernike": "[0,0,0,0,5000,0,0,0,-4000]"},
    "magnification": {
        "rlnMagMat00": 1.02, "rlnMagMat01": 0.01, "rlnMagMat10": -0.008, "rlnMagMat11": 0.985,
    },
}  # fmt: skip
ABERRATED["all of them"] = {k: v for columns in ABERRATED.values() for k, v in columns.items()}
#: Cells of the projection: box, images; how often each is timed; and by which interpreter. Their
#: versions are those that the target installs.
PROJECTED, TIMES = [(64, 1000), (128, 1000)], 5
THEIRS = Path("results/projectors/bin/python").absolute()
NAMES = {
    "cryoem": "cryoem", "aspire": "ASPIRE 0.14.3",
    "torch_fourier_slice": "torch-fourier-slice 0.6.0", "relion": "RELION 3.1.3",
}  # fmt: skip
PROJECTORS = {"cryoem": sys.executable, "aspire": THEIRS, "torch_fourier_slice": THEIRS}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "CRYOEM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
#: Runs that have ended: it goes on where it was interrupted.
KEPT = Path("results/bench-peers")
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


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


def normalised(images, radius_px):
    """Lay the background of a stack at 0, with a standard deviation of 1, as RELION wants it."""
    code = ["relion_preprocess", "--operate_on", images.name, "--operate_out", "normalised.mrcs"]
    code += ["--norm", "--bg_radius", f"{radius_px:.0f}"]
    subprocess.run(code, check=True, capture_output=True, cwd=images.parent)
    images.with_name("normalised.mrcs").replace(images)


def auto_refined(folder, symmetry):
    """RELION's poses and half-maps, from what stands in a folder, and CPU s of those that work."""
    (folder / "relion").mkdir()
    code = [*LED, *AUTO_REFINE, "--sym", symmetry]
    subprocess.run(code, check=True, capture_output=True, cwd=folder, env={**os.environ, **AS_ROOT})
    halves = [folder / "relion" / f"run_half{h}_class001_unfil.mrc" for h in (1, 2)]
    times = [(folder / "relion" / f"times{rank}").read_text().split()[-2:] for rank in (1, 2)]
    seconds = [told.partition("m") for told in itertools.chain(*times)]
    cpu = sum(60 * int(minutes) + float(rest.rstrip("s")) for minutes, _, rest in seconds)
    return folder / "relion" / "run_data.star", halves, cpu


def solved(folder, symmetry):
    """The same by ``cryoem solve``."""
    program = Path(sys.executable).with_name("cryoem")
    code = [program, "solve", "seen.star", "-o", "ours", "--symmetry", symmetry, "-q"]
    code += ["--reference", "known.mrc"]
    cpu = cpu_seconds()
    subprocess.run(code, check=True, capture_output=True, cwd=folder)
    halves = [folder / "ours" / f"refined_half{h}.mrc" for h in (1, 2)]
    return folder / "ours" / "refined.star", halves, cpu_seconds() - cpu


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


def project_code(density, name):
    """``relion_project`` of ``angles.star`` and ``map.mrc``."""
    code = ["relion_project", "--i", "map.mrc", "--ang", "angles.star", "--o", name]
    return [*code, "--angpix", f"{density.voxel_size_angstrom}"]


def projection(cell, seed, folder):
    """A record a program: how long projections take, and how far off they are."""
    box, n = cell
    phantom, voxel = Phantom.random(seed), 200 / box
    density, q = phantom.density(box, voxel), rotations.uniform(n, seed)
    truth, found = phantom.project(q, box, voxel), []
    np.save(folder / "volume.npy", density.values)
    np.save(folder / "matrices.npy", Rotation.from_quat(q).as_matrix())
    write_density(folder / "map.mrc", density)
    like = simulate(density, n, seed, snr=float("inf")).with_poses(q)
    write_particles(folder / "angles.star", like)
    for program in (*PROJECTORS, "relion"):
        if program == "relion":
            seconds = []
            for _ in range(TIMES):
                start = time.perf_counter()
                subprocess.run(
                    project_code(density, "clean"), check=True, capture_output=True, cwd=folder
                )
                seconds.append(time.perf_counter() - start)
            images = read_particles(folder / "clean.star").images[:]
        else:
            code = [PROJECTORS[program], Path(__file__).absolute().with_name("projecting.py")]
            code += [program, folder, f"{TIMES}"]
            subprocess.run(code, check=True, env=os.environ | ONE_THREAD, cwd=folder)
            images = np.load(folder / f"{program}.npy")
            seconds = json.loads((folder / f"{program}.json").read_text())
        scale = np.vdot(images, truth) / np.vdot(images, images)  # units are theirs
        found.append(
            {
                "job": "projection",
                "method": NAMES[program],
                "box_px": box,
                "n": n,
                "seed": seed,
                "commit": records.commit(),
                "repeats": TIMES,
                "seconds": float(np.median(seconds)),
                "least_seconds": min(seconds),
                "most_seconds": max(seconds),
                "relative_error": float(np.linalg.norm(scale * images - truth))
                / float(np.linalg.norm(truth)),
            }
        )
        print(found[-1], flush=True)
    return found


def projection_table(found):
    """A row a program: seconds and error by box, medians over seeds."""
    rows = []
    for method in dict.fromkeys(r["method"] for r in found):
        row = [method]
        for box, _ in PROJECTED:
            mine = [r for r in found if (r["method"], r["box_px"]) == (method, box)]
            if mine:
                row.append(f"{np.median([r['seconds'] for r in mine]):.2f}")
                row.append(f"{np.median([r['relative_error'] for r in mine]):.0e}")
        rows.append(row)
    return rows


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


def matched(stack, density):
    """Where each image matches best, over orientations and shifts to 8 px."""
    axis = np.arange(-8, 9, STEP)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    grid = grid[np.linalg.norm(grid, axis=1) <= 8]
    tried = np.broadcast_to(grid, (len(stack), *grid.shape)).astype(float)
    reading = preprocessing_for(density, max_shift_px=8)
    q, shifts, _ = matching.candidates(stack, density, reading, shifts_px=tried)
    return stack.with_poses(q[:, 0], shifts[:, 0])


def refinement(cell, seed, folder):
    """A record a program, of a refinement from a coarse map, or with the density known; kept."""
    particle, symmetry, n, snr, box = cell
    whole = load_density(particle)
    density = whole.in_box(box)
    truth = simulate(density, n, seed, snr=snr, **SEEN)
    seen = truth.without_poses().replace(noise=None)
    write_particles(folder / "seen.star", seen)
    normalised(folder / "seen.mrcs", DIAMETER / 2 / density.voxel_size_angstrom)
    write_density(folder / "known.mrc", density.low_passed(KNOWN))
    limit = records.limit(density, truth)

    def in_wider_frames():
        """The same images, with what lies about them: the network wants as much."""
        wide = simulate(whole, n, seed, snr=float("inf"), **SEEN)
        assert np.array_equal(wide.quaternions, truth.quaternions)
        noise = truth.noise.draw(n, whole.box_px, np.random.default_rng([seed, 2]))
        images, middle = wide.images[:] + noise, slice((whole.box_px - box) // 2, None)
        images[:, middle, middle][:, :box, :box] = truth.images[:]
        return wide.without_poses().replace(noise=None).with_images(images)

    def judged_poses(q, over="none"):
        errors = evaluation.orientation_errors(q, truth.quaternions, over=over, symmetry=symmetry)
        return {
            "error_rad": errors.mean_rad,
            "median_rad": errors.median_rad,
            "far_fraction": errors.far_fraction,
            "bound_mean_rad": limit,
        }

    cell_told = {
        "job": "refinement", "particle": particle, "symmetry": symmetry, "n": n, "snr": snr,
        "box_px": box, "seed": seed, "commit": records.commit(),
    }  # fmt: skip

    def from_coarse(method, program):
        wall = time.monotonic()
        star, halves, cpu = program(folder, symmetry)
        wall = time.monotonic() - wall
        stack, pair = read_particles(star), maps.HalfMaps(*map(read_density, halves), True)
        q = np.empty((n, 4))  # RELION sorts the rows
        q[[int(name.partition("@")[0]) - 1 for name in stack.columns["rlnImageName"]]] = (
            stack.oriented()
        )
        agree = maps.half_map_fsc(pair, maps.soft_mask(pair.mean), seed=seed)
        laid = maps.register(pair.mean, density, allow_mirror=False).density
        return cell_told | {
            "method": method,
            **judged_poses(q, "one-sided"),
            "half_map_resolution_angstrom": agree.corrected.resolution(0.143).angstrom,
            "cpu_seconds": cpu,
            "wall_seconds": wall,
            **judged(laid, density),
        }

    def known(begins):
        """Two records: where images begin, and refined from there."""
        wide, made = in_wider_frames() if begins == "network" else None, []
        wall, cpu = time.monotonic(), cpu_seconds()
        if wide is None:
            stack = matched(seen, density)
        else:
            stack = orient(load_estimator(particle), wide, reference=whole)
            stack = seen.with_poses(stack.oriented(), stack.shifts_px)
        for method in (begins, f"{begins}, refined"):
            if method != begins:
                stack = refine_against(stack, density, symmetry=symmetry, seed=seed).particles
            made.append(
                cell_told
                | {
                    "method": f"cryoem: {method}",
                    **judged_poses(stack.oriented()),
                    "cpu_seconds": cpu_seconds() - cpu,
                    "wall_seconds": time.monotonic() - wall,
                }
            )
        return made

    name = f"{particle}-{n}-{seed}"
    programs = {"ours": ("cryoem", solved), "relion": ("RELION 3.1.3", auto_refined)}
    found = [
        records.kept(KEPT / f"{name}-{who}.json", lambda told=told: from_coarse(*told))
        for who, told in programs.items()
    ]
    for begins in ("matching", "network"):
        found += records.kept(KEPT / f"{name}-{begins}.json", lambda begins=begins: known(begins))
    return found


def refinement_table(found):
    """A row a run."""

    def told(record, key, digits):
        return f"{record[key]:.{digits}f}" if key in record else "-"

    return [
        [
            f"{r['particle']}, {r['symmetry']}",
            f"{r['n']:,}, SNR 1/{1 / r['snr']:.0f}, {r['box_px']} px",
            f"a map at {KNOWN:g} A" if "mean_fsc" in r else "the density",
            r["method"],
            f"{r['error_rad']:.3f} ({r['median_rad']:.3f})",
            f"{r['bound_mean_rad']:.3f}",
            f"{r['far_fraction']:.1%}",
            told(r, "half_map_resolution_angstrom", 1),
            told(r, "mean_fsc_in_mask", 3),
            f"{r['cpu_seconds']:.0f}",
        ]
        for r in found
    ]


def projected(folder, density, name, noise=0.0):
    """What ``relion_project`` makes of ``angles.star`` and ``map.mrc``, in so wide a noise."""
    code = [*project_code(density, name), "--ctf"]
    code += ["--add_noise", "--white_noise", f"{noise}"] if noise else []
    subprocess.run(code, check=True, capture_output=True, cwd=folder)
    return read_particles(folder / f"{name}.star")


def imagined(folder, density, noise):
    """What cryoJAX makes of the same, clean and in noise of so many times its images' width."""
    code = [CRYOJAX, Path(__file__).with_name("cryojax_images.py"), folder, f"{noise}"]
    subprocess.run(code, check=True, capture_output=True)
    return [read_particles(folder / f"{name}.star") for name in ("clean", "noisy")]


def simulation(cell, seed, folder):
    """A record: another program's images, and where they end; kept."""
    particle, symmetry, n, snr, simulator = cell

    def made():
        density = load_density(particle)
        own = simulate(density, n, seed, snr=float("inf"), **SEEN)
        write_particles(folder / "angles.star", own)
        write_density(folder / "map.mrc", density)
        if simulator == "RELION":
            clean = projected(folder, density, "clean")
            theirs = projected(folder, density, "noisy", float(clean.images[:].std() / snr**0.5))
        else:
            clean, theirs = imagined(folder, density, 1 / snr**0.5)
        clean, seen = clean.images[:], theirs.images[:]
        contrast = float((clean * own.images).sum() / (own.images[:] ** 2).sum())
        both = zip(clean * np.sign(contrast), own.images, strict=True)
        alike = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in both]
        noise = float(np.var(seen - clean)) / contrast**2
        truth = own.replace(noise=Noise.white(noise))
        unknown = theirs.replace(noise=None)
        black = survey(unknown, seed=seed).contrast == "black on white"
        if black:
            unknown = unknown.inverted()
        rng = np.random.default_rng(seed)
        near = unknown.with_poses(
            rotations.perturb(own.quaternions, OFF[0] * rng.standard_normal((n, 3))),
            own.shifts_px + OFF[1] * rng.standard_normal((n, 2)),
        )
        known = refine(near, density)
        cpu = time.process_time()
        first = ab_initio(unknown.without_poses(), seed=seed)
        end = refine_halves(first.particles, symmetry=first.axes.symmetry, seed=seed)
        cpu = time.process_time() - cpu

        def off(stack, over):
            return evaluation.orientation_errors(
                stack.quaternions, own.quaternions, over=over, symmetry=symmetry
            )

        alone = off(end.particles, "one-sided")
        return {
            "job": "simulation",
            "method": "cryoem",
            "simulator": simulator,
            "particle": particle,
            "symmetry": symmetry,
            "n": n,
            "snr": snr,
            "seed": seed,
            "commit": records.commit(),
            "least_image_correlation": min(alike),
            "contrast": contrast,
            "turned_white": black,
            "bound_mean_rad": records.limit(density, truth),
            "known_error_rad": off(known, "none").mean_rad,
            "known_expected_rad": float(known.expected_error_rad.mean()),
            "verdict": str(first.verdict),
            "found_symmetry": first.axes.symmetry,
            "error_rad": alone.mean_rad,
            "median_rad": alone.median_rad,
            "far_fraction": alone.far_fraction,
            "expected_rad": float(end.particles.expected_error_rad.mean()),
            "cpu_seconds": cpu,
        }

    name = f"simulation-{simulator.lower()}-{particle}-{n}-{seed}.json"
    return [records.kept(KEPT / name, made)]


def simulation_table(found):
    """A row a run."""
    return [
        [
            r["simulator"],
            f"{r['particle']}, {r['symmetry']}",
            f"{r['n']:,}, SNR 1/{1 / r['snr']:.0f}",
            f"{r['least_image_correlation']:.5f}",
            f"{r['contrast']:.5f}",
            f"{r['bound_mean_rad']:.4f}",
            f"{r['known_error_rad']:.4f}, expects {r['known_expected_rad']:.4f}",
            f"{r['error_rad']:.3f} ({r['median_rad']:.3f}), expects {r['expected_rad']:.3f}",
            f"{r['far_fraction']:.1%}",
            f"{r['cpu_seconds']:.0f}",
        ]
        for r in found
    ]


def with_columns(path, stack, columns):
    """Write particles whose images stay where they are, with columns for their optics group."""
    optics = stack.origin.optics | {k: np.array([v], object) for k, v in columns.items()}
    write_particles(path, stack.replace(origin=ParticleFile(stack.origin.path, optics)))


def aberrated(kind, seed, folder, n=1000, snr=1 / 4):
    """Records: RELION's images of 4JSV with an aberration, by both, told of it and not."""
    density = load_density("4jsv")
    write_particles(folder / "seen.star", simulate(density, n, seed, snr=float("inf"), **SEEN))
    stack, columns = read_particles(folder / "seen.star"), ABERRATED[kind]
    of_ctf = {name: value for name, value in columns.items() if name == "rlnEvenZernike"}
    with_columns(folder / "angles.star", stack, of_ctf)
    write_density(folder / "map.mrc", density)
    images = projected(folder, density, "clean").images[:]
    with_columns(folder / "told.star", stack, columns)
    for aberration in read_particles(folder / "told.star").images.aberrations:
        images = aberration.apply(images)
        stack = stack.replace(shifts_px=stack.shifts_px @ aberration.matrix)
    noise = np.random.default_rng([seed, 1]).standard_normal(images.shape, np.float32)
    images += noise * images.std() / np.sqrt(snr)
    with mrcfile.open(folder / "seen.mrcs", "r+") as mrc:
        mrc.set_data(images)
    found = []
    for what, told in (("told", columns), ("not told", {})):
        with_columns(folder / "told.star", stack, told)
        for method, program in (("cryoem", ours), ("RELION 3.1.3", relion)):
            volume = program(folder / "told.star", folder / "map.mrc", "C1")
            found.append(
                {
                    "job": "aberrations",
                    "method": method,
                    "particle": "4jsv",
                    "n": n,
                    "snr": snr,
                    "aberration": kind,
                    "file": what,
                    "seed": seed,
                    "commit": records.commit(),
                    **judged(volume, density),
                }
            )
    print(*found, sep="\n", flush=True)
    return found


def aberrations_table(found):
    """A row an aberration: medians over seeds, ours and theirs."""
    rows = []
    for kind in dict.fromkeys(r["aberration"] for r in found):
        row = [kind]
        for key, what in itertools.product(("mean_fsc", "mean_fsc_in_mask"), ("told", "not told")):
            of_both = [
                np.median([
                    r[key]
                    for r in found
                    if (r["aberration"], r["file"], r["method"]) == (kind, what, method)
                ])
                for method in ("cryoem", "RELION 3.1.3")
            ]  # fmt: skip
            row.append(" / ".join(f"{value:.3f}" for value in of_both))
        rows.append(row)
    return rows


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
    jobs = ["projection", "reconstruction", "refinement", "simulation", "aberrations"]
    parser.add_argument("--jobs", nargs="*", default=jobs, choices=jobs)
    arguments = parser.parse_args()
    boxes = [f"{n:,} of {box} px, s" for box, n in PROJECTED]
    seen = ["program", *(what for box in boxes for what in (box, "off the exact ones"))]
    header = [
        "particle", "images", "noise", "mean FSC, cryoem / RELION", "within a ball",
        "within a mask", "CPU s",
    ]  # fmt: skip
    refined = [
        "particle", "images", "known", "program", "mean (median) error, rad", "limit, rad",
        "off by > 0.3 rad", "half-maps agree to, A", "mean FSC within a mask", "CPU s",
    ]  # fmt: skip
    simulated = [
        "images by", "particle", "images", "least correlation with ours", "contrast", "limit, rad",
        "the density known, to 15 A, rad", "from the images alone, mean (median), rad",
        "off by > 0.3 rad", "CPU s",
    ]  # fmt: skip
    told = [
        "aberration", "mean FSC, cryoem / RELION", "the file silent", "within a mask",
        "the file silent",
    ]  # fmt: skip
    for job, cells, one, head, rows, name in (
        ("projection", PROJECTED, projection, seen, projection_table, "peers_projection"),
        ("reconstruction", CELLS, run, header, table, "peers"),
        ("refinement", REFINED, refinement, refined, refinement_table, "peers_refinement"),
        ("simulation", SIMULATED, simulation, simulated, simulation_table, "peers_simulation"),
        ("aberrations", ABERRATED, aberrated, told, aberrations_table, "peers_aberrations"),
    ):
        found, seeds = [], range(arguments.seeds if job in arguments.jobs else 0)
        for seed, cell in itertools.product(seeds, cells):
            with tempfile.TemporaryDirectory() as folder:
                found += one(cell, seed, Path(folder))
            records.write(name, found, head, rows(found), "make bench-peers")


if __name__ == "__main__":
    main()
