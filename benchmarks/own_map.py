"""A network that learned from the images' own map, beside one that knew the density.

``make bench-own_map``. 1,000 images (SNR 1/16, CTF, shifts) give a map by themselves: ab initio,
then refinement, masked. One network is trained on projections of that map, one on those of the
true density, both over what the images were surveyed to be; each orients 1,000 new images, whose
truth is then looked at. ``python benchmarks/own_map.py 4jsv model.pdb.gz map.mrc`` takes others.
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


def own_map(density, seed, kept):
    """Particles refined by themselves, their map, their error, and the verdict."""
    if kept.exists():
        return pickle.loads(kept.read_bytes())
    stack = simulate(density, N, seed, snr=SNR, **MICROSCOPE)
    found = ab_initio(stack.without_poses().replace(noise=None), seed=seed)
    refined = refine_halves(found.particles, symmetry=found.axes.symmetry, seed=seed)
    error = evaluation.orientation_errors(refined.particles.quaternions, stack.quaternions).mean_rad
    made = (refined.particles, refined.density, error, found.verdict)
    with files.atomic(kept) as temporary:
        temporary.write_bytes(pickle.dumps(made))
    return made


def run(source, images, seed):
    """Two records: by the own map, and by the density."""
    from cryoem.backend import keras

    density = density_of(source)
    particle = Path(source).name.partition(".")[0]
    new = simulate(density, N, [seed, 1], snr=SNR, **MICROSCOPE)
    kept = KEPT / f"{particle}-{seed}-refined.pickle"
    particles, own, map_error, verdict = own_map(density, seed, kept)
    print(f"{particle}: {verdict}; refined {map_error:.3f} rad", flush=True)
    found = []
    for told, known in (("own map", own), ("density", density)):
        start = time.monotonic()
        folder = KEPT / f"{particle}-{told.replace(' ', '-')}-{images}-{seed}"
        model = learn(particles, known, images=images, seed=seed, checkpoint=folder)
        seconds = time.monotonic() - start
        placed = orient(model, new.without_poses().replace(noise=None), seed=seed)
        errors = evaluation.orientation_errors(placed.quaternions, new.quaternions)
        found.append(
            {
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
                "map_orientation_error_rad": map_error,
                "verdict": str(verdict),
                "training_seconds": seconds,
                "keras_backend": keras.backend.backend(),
                "commit": records.commit(),
            }
        )
        print(found[-1], flush=True)
    return found


def table(found):
    """A row a particle: both errors, and what not knowing the density costs."""
    rows = []
    for own, true in zip(found[::2], found[1::2], strict=True):
        ratio = own["one_sided_error_rad"] / true["one_sided_error_rad"]
        means = [f"{r['one_sided_error_rad']:.3f}" for r in (own, true)]
        medians = [f"{r['median_rad']:.3f}" for r in (own, true)]
        rows.append(
            [own["particle"], f"{own['images']:,}", f"{own['map_orientation_error_rad']:.3f}"]
            + [f"{m} / {d}" for m, d in zip(means, medians, strict=True)]
            + [f"{ratio:.2f}"]
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("particles", nargs="*", default=["4jsv"])
    parser.add_argument("--images", type=int, default=38_400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for source in arguments.particles:
        particle = Path(source).name.partition(".")[0]
        path = KEPT / f"{particle}-{arguments.images}-{arguments.seed}.json"
        records.kept(path, lambda s=source: run(s, arguments.images, arguments.seed))
        kept = sorted(KEPT.glob("*.json"))
        found = [record for p in kept for record in json.loads(p.read_text())]
        header = [
            "particle", "trained on, images", "the map's own images, rad", "own map, rad",
            "density, rad", "ratio of the means",
        ]  # fmt: skip
        records.write("own_map", found, header, table(found), "make bench-own_map")


if __name__ == "__main__":
    main()
