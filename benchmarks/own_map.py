"""A network that learned from the images' own map, beside one that knew the density.

``make bench-own_map``. 1,000 images (SNR 1/16, CTF, shifts) give a map by themselves. One network
is trained on projections of it as ab initio leaves it, one of it refined, one of the true density,
all over what the images were surveyed to be; each orients 1,000 new images, whose truth is then
looked at. ``python benchmarks/own_map.py 4jsv model.pdb.gz map.mrc`` takes others.
"""

import argparse
import json
import pickle
import time
from pathlib import Path

import records
from abinitio import MICROSCOPE, density_of

from cryoem import ab_initio, evaluation, orient, refine_halves, simulate
from cryoem.abinitio import learn
from cryoem.io import files

N, SNR = 1000, 1 / 16
KEPT = Path("results/bench-own_map")
#: What networks learn from: the images' own map, as it is found and refined, and the true one.
MAPS = ("as found", "refined", "density")


def own_maps(density, seed, particle):
    """Particles, their map and their error, as ab initio leaves them and refined; the verdict."""
    path = KEPT / f"{particle}-{seed}-ab-initio.pickle"
    stack = simulate(density, N, seed, snr=SNR, **MICROSCOPE)
    found, symmetry, verdict = pickled(path, lambda: as_found(stack, seed))
    refined = pickled(
        KEPT / f"{particle}-{seed}-refined.pickle", lambda: as_refined(found[0], symmetry, seed)
    )
    errors = [
        evaluation.orientation_errors(p.quaternions, stack.quaternions) for p, _ in (found, refined)
    ]
    return found, refined, [e.mean_rad for e in errors], verdict


def as_found(stack, seed):
    """What the images alone give."""
    found = ab_initio(stack.without_poses().replace(noise=None), seed=seed)
    return (found.particles, found.density), found.axes.symmetry, str(found.verdict)


def as_refined(particles, symmetry, seed):
    """The same half against half."""
    refined = refine_halves(particles, symmetry=symmetry, seed=seed)
    return refined.particles, refined.density


def pickled(path, make):
    """What ``make()`` gave, now or in an interrupted run."""
    if not path.exists():
        made = make()
        with files.atomic(path) as temporary:
            temporary.write_bytes(pickle.dumps(made))
    return pickle.loads(path.read_bytes())


def run(particle, density, told, learned_from, images, seed):
    """The record of a network that learned from one map."""
    from cryoem.backend import keras

    new = simulate(density, N, [seed, 1], snr=SNR, **MICROSCOPE)
    start = time.monotonic()
    folder = KEPT / f"{particle}-{told.replace(' ', '-')}-{images}-{seed}"
    model = learn(*learned_from, images=images, seed=seed, checkpoint=folder)
    seconds = time.monotonic() - start
    placed = orient(model, new.without_poses().replace(noise=None), seed=seed)
    errors = evaluation.orientation_errors(placed.quaternions, new.quaternions)
    return {
        "particle": particle,
        "n": N,
        "snr": SNR,
        "trained_on": told,
        "images": images,
        "seed": seed,
        "one_sided_error_rad": errors.mean_rad,
        "median_rad": errors.median_rad,
        "far_fraction": errors.far_fraction,
        "expected_error_rad": float(placed.expected_error_rad.mean()),
        "frame_certain": bool(placed.frame.certain),
        "training_seconds": seconds,
        "keras_backend": keras.backend.backend(),
        "commit": records.commit(),
    }


def table(found):
    """A row a particle and a map: what not knowing the density costs."""
    rows = []
    of = {(r["particle"], r["images"], r["seed"], r["trained_on"]): r for r in found}
    for run_of in dict.fromkeys((r["particle"], r["images"], r["seed"]) for r in found):
        known = of.get((*run_of, "density"))
        for told in MAPS:
            if (r := of.get((*run_of, told))) is None:
                continue
            error = r.get("map_orientation_error_rad")
            ratio = r["one_sided_error_rad"] / known["one_sided_error_rad"] if known else None
            rows.append(
                [
                    r["particle"],
                    f"{r['images']:,}",
                    told,
                    "-" if error is None else f"{error:.3f}",
                    f"{r['one_sided_error_rad']:.3f} ({r['median_rad']:.3f})",
                    f"{r['far_fraction']:.1%}",
                    "-" if ratio is None or told == "density" else f"{ratio:.2f}",
                ]
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("particles", nargs="*", default=["4jsv"])
    parser.add_argument("--images", type=int, default=38_400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    images, seed = arguments.images, arguments.seed
    KEPT.mkdir(parents=True, exist_ok=True)
    for source in arguments.particles:
        density, particle = density_of(source), Path(source).name.partition(".")[0]
        found, refined, errors, verdict = own_maps(density, seed, particle)
        learned_from = (found, refined, (refined[0], density))
        for told, known, error in zip(MAPS, learned_from, [*errors, None], strict=True):
            path = KEPT / f"{particle}-{told.replace(' ', '-')}-{images}-{seed}.json"
            of_map = {"map_orientation_error_rad": error, "verdict": verdict}
            records.kept(
                path,
                lambda t=told, k=known, m=of_map, p=particle, d=density: (
                    run(p, d, t, k, images, seed) | m
                ),
            )
            every = [json.loads(p.read_text()) for p in sorted(KEPT.glob("*.json"))]
            header = [
                "particle", "images", "of the map", "its own images are off, rad",
                "new images, mean (median), rad", "off by > 0.3 rad", "of the density's",
            ]  # fmt: skip
            records.write("own_map", every, header, table(every), "make bench-own_map")


if __name__ == "__main__":
    main()
