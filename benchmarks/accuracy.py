"""The estimator, cell by cell: particle x noise x perturbation (``make bench-accuracy``).

Each cell is 1,650 test images at full sampling from a seed that nothing was trained or tuned on.
A cell that was measured with the same weights is not measured again, so that an interrupted run
goes on; ``--again`` forgets. The shipped particles need nothing; another particle needs its map and
the weights that ``benchmarks/longer_training.py NAME --map PATH`` made:

    python benchmarks/accuracy.py 5j0n --map 5j0n.mrc --weights results/weights/5j0n.npz
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import records
from scipy import stats

from cryoem import (
    cross_check,
    distances,
    evaluation,
    imaging,
    load_estimator,
    maps,
    match,
    orient,
    reconstruct,
    simulate,
    structures,
)
from cryoem.io import files
from cryoem.symmetry import group

TEST_SEED, N_IMAGES = 90_210, 1650
CONDITIONS = {
    "plain": {},
    "shifts": {"max_shift_px": 8.0},
    "ctf": {"defocus_range_angstrom": (8_000.0, 25_000.0)},
    "preferred": {"coverage": "preferred"},
}
#: (SNR, condition) of a particle's cells, and what the paper has for its own.
SHIPPED_CELLS = [(math.inf, "plain"), (1 / 16, "plain")]
ALL_CELLS = [
    *SHIPPED_CELLS,
    (1 / 16, "shifts"),
    (1 / 100, "plain"),
    (1 / 16, "ctf"),
    (1 / 16, "preferred"),
]
#: What a model was trained for, by the end of its name.
FOR = {"plain": ", for noise alone", "moderate": ", for noise to 1/32 alone"}
PAPER = {
    ("5j0n", math.inf, "plain"): 0.20,
    ("5j0n", 1 / 16, "plain"): 0.25,
    ("5j0n", 1 / 16, "shifts"): 0.25,
    ("5a1a", math.inf, "plain"): 0.13,
    ("5a1a", 1 / 16, "plain"): 0.13,
}


def timed(function, *args, **kwargs):
    """The result, and the processor's seconds: other work on the machine does not add to them."""
    start = time.process_time()
    result = function(*args, **kwargs)
    return result, time.process_time() - start


def cell(mine, volume, model, snr, condition):
    """Measure one cell: a list of records, one a stage."""
    options = CONDITIONS[condition]
    seen = simulate(volume, N_IMAGES, TEST_SEED, snr=snr, **options)
    clean = simulate(volume, N_IMAGES, TEST_SEED, coverage=options.get("coverage", "uniform"))
    truth, symmetry = seen.quaternions, group(model.symmetry)
    unknown = seen.without_poses()
    bound = 0.0
    if seen.noise is not None:
        some = slice(0, 100)
        covariance = evaluation.cramer_rao(
            volume, truth[some], seen.noise.variance, ctf=seen.ctf(some)
        )
        bound = float(evaluation.mean_error_of(covariance).mean())
    common = {
        **mine,
        "symmetry": symmetry.name,
        "n": N_IMAGES,
        "seed": TEST_SEED,
        "box_px": volume.box_px,
        "voxel_size_angstrom": volume.voxel_size_angstrom,
        "bound_mean_rad": bound,
        "random_one_sided_error_rad": evaluation.random_error(truth, 0, symmetry=symmetry.name),
        "train_command": model.notes["command"],
        "images_seen": model.notes["images"],
        "train_minutes": model.notes.get("train_minutes"),
        "paper_rad": PAPER.get((mine["particle"], snr, condition)),
    }
    predicted, predicting = timed(model.predict, seen.images, ctf=seen.ctf())
    pairs = distances.all_pairs(N_IMAGES)
    estimated = model.distances(predicted.features, predicted.features)[pairs[:, 0], pairs[:, 1]]
    features = symmetry.features(truth)
    true = distances.from_features(features, features)[pairs[:, 0], pairs[:, 1]]
    learned = distances.compare(estimated, true)
    if symmetry.order == 1:
        found, seconds = timed(orient, model, unknown)
        stage = "estimator and recovery, frame from copies"
    else:
        found, seconds = timed(orient, model, unknown, reference=volume)
        stage = "estimator and recovery, frame from references"
    yield {
        **common,
        "stage": stage,
        **scores(found.quaternions, truth, symmetry.name),
        "distance_loss_rad2": learned.loss,
        "distance_mae_rad": learned.mae_rad,
        "distance_mae_small_rad": learned.mae_small_rad,
        "distance_mae_middle_rad": learned.mae_middle_rad,
        "distance_mae_large_rad": learned.mae_large_rad,
        "embedding_cpu_seconds": predicting,
        "cpu_seconds": seconds,
        **certainty(found, seen, model),
        **resolutions(volume, seen, clean, found, symmetry),
    }
    matched, seconds = timed(match, unknown, volume, model.preprocessing)
    yield {
        **common,
        "stage": "projection matching, 21,600 references, no training",
        **scores(matched.quaternions, truth, symmetry.name),
        "cpu_seconds": seconds,
    }


def scores(q, truth, symmetry):
    one = evaluation.orientation_errors(q, truth, symmetry=symmetry)
    off = {
        "one_sided_error_rad": one.mean_rad,
        "median_rad": one.median_rad,
        "p95_rad": one.p95_rad,
        "view_mean_rad": one.view_mean_rad,
        "in_plane_mean_rad": one.in_plane_mean_rad,
        "far_fraction": one.far_fraction,
    }
    if symmetry == "C1":
        off["e_or_rad"] = evaluation.orientation_errors(q, truth, over="o4").mean_rad
    return off


def certainty(found, seen, model):
    """What the expected errors are worth: rank correlation, and the error of the surer part.

    Those of the network, and those of a check against the images' own half-maps.
    """
    truth, p = seen.quaternions, model.preprocessing
    laid = evaluation.align(
        found.quaternions, truth, over="one-sided", symmetry=model.symmetry
    ).quaternions
    off = group(model.symmetry).distance(laid, truth)
    said = {"": found.expected_error_rad}
    if seen.noise is not None and model.symmetry == "C1":
        # Centred where the network saw it and cut to what the network reads: the same, sooner.
        box = p.crop_px * p.frame_px // p.down_px
        centred = imaging.crop(imaging.shift(seen.images, -found.shifts_px), box)
        small = found.with_images(centred).replace(shifts_px=None)
        checked, seconds = timed(cross_check, small)
        said["checked_"] = checked.expected_error_rad
    out = {}
    for name, expected in said.items():
        order = np.argsort(expected)
        tenths = np.array_split(order, 10)
        out |= {
            f"{name}expected_error_rad": float(expected.mean()),
            f"{name}spearman": float(stats.spearmanr(expected, off).statistic),
            f"{name}gain_of_surest_75_percent": float(
                off.mean() / off[order[: int(0.75 * len(off))]].mean()
            ),
            f"{name}tenths_expected_rad": [float(expected[t].mean()) for t in tenths],
            f"{name}tenths_error_rad": [float(off[t].mean()) for t in tenths],
        }
    if len(said) > 1:
        out["check_cpu_seconds"] = seconds
    return out


def resolutions(volume, seen, clean, found, symmetry):
    """FSC against the density of maps from clean and from noisy images, true and found poses."""
    out = {}
    shifts = found.shifts_px if seen.shifts_px.any() else None
    for images, stack in (("noiseless", clean), ("noisy", seen)):
        if images == "noisy" and seen.noise is None:
            continue
        for poses, q in (("true", seen.quaternions), ("found", found.quaternions)):
            posed = stack.with_poses(q)
            if images == "noisy" and poses == "found":
                posed = posed.replace(shifts_px=shifts)
            v = reconstruct(posed, symmetry=symmetry.name)
            if poses == "found":
                v = maps.register(v, volume).density
            curve = maps.fsc(v, volume)
            key = f"{images}_{poses}"
            out[f"mean_fsc_{key}"] = curve.mean
            at = curve.resolution(0.5)
            out[f"resolution_fsc05_{key}_angstrom"] = at.angstrom
            out[f"nyquist_limited_{key}"] = at.nyquist_limited
    return out


def cost(record):
    """Processor time, which records of before 2026-11-23 do not have."""
    return (
        f"{record['cpu_seconds']:.0f} s CPU"
        if "cpu_seconds" in record
        else f"{record['seconds']:.0f} s"
    )


def place(record):
    """Where a cell stands in the table: shipped particles first, then cells in their order."""
    snr = math.inf if record["snr"] == "inf" else record["snr"]
    shipped = [*structures.SHIPPED, record["particle"]].index(record["particle"])
    return shipped, record["particle"], record["model"], ALL_CELLS.index((snr, record["condition"]))


def table(found):
    """The README's rows: one a cell."""
    rows = []
    for r in sorted((r for r in found if r["stage"].startswith("estimator")), key=place):
        key = ("particle", "model", "snr", "condition")
        same = [m for m in found if all(m[k] == r[k] for k in key)]
        matched = next(m for m in same if m["stage"].startswith("projection matching"))
        noise = "noiseless" if r["snr"] == "inf" else f"SNR 1/{1 / r['snr']:.0f}"
        title = r["particle"] + ("" if r["symmetry"] == "C1" else f" ({r['symmetry']})")
        title += f", {r['train_minutes']:.0f} min of training"
        title += FOR.get(r["model"].rpartition("-")[2], "")
        true, here = (r[f"mean_fsc_noiseless_{p}"] for p in ("true", "found"))
        rows.append(
            [
                title,
                noise + ("" if r["condition"] == "plain" else f", {r['condition']}"),
                f"{r['paper_rad']:.2f}" if r["paper_rad"] else "-",
                f"**{r['one_sided_error_rad']:.3f}** ({r['median_rad']:.3f})",
                f"{r['bound_mean_rad']:.3f}" if r["bound_mean_rad"] else "0",
                f"{matched['one_sided_error_rad']:.3f}, {cost(matched)}",
                f"{100 * r['far_fraction']:.1f} %",
                f"{here / true:.3f}",
                f"{r['spearman']:.2f}"
                + (f", {r['checked_spearman']:.2f}" if "checked_spearman" in r else ""),
                cost(r),
            ]
        )
    return rows


HEADER = [
    "particle",
    "images",
    "paper, rad",
    "mean (median) error, rad",
    "limit, rad",
    "projection matching",
    "off by > 0.3 rad",
    "mean FSC, of true poses'",
    "confidence (Spearman), checked",
    "time",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", help="default: the shipped particles")
    parser.add_argument("--map", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--again", action="store_true", help="measure all cells anew")
    arguments = parser.parse_args()
    path = records.RESULTS / "accuracy.json"
    found = json.loads(path.read_text()) if path.exists() else []
    for name in [arguments.name] if arguments.name else list(structures.SHIPPED):
        weights = arguments.weights or structures.shipped_file(f"{name}.npz")
        model = load_estimator(weights)
        volume = records.volume_of(arguments.map or name, model.symmetry)
        extra = {"weights_sha256": files.sha256(weights)}
        if arguments.map:
            extra["map_sha256"] = files.sha256(arguments.map)
        cells = ALL_CELLS if model.symmetry == "C1" else SHIPPED_CELLS
        trained = model.notes["source"]  # what a model was not trained for is another's to do
        known = {"plain", "preferred"}
        known |= {"shifts"} if trained["max_shift_px"] else set()
        known |= {"ctf"} if trained["defocus_range_angstrom"] else set()
        cells = [c for c in cells if c[1] in known and c[0] >= trained["snr_range"][0]]
        for snr, condition in cells:
            mine = {
                "particle": name,
                "model": Path(weights).stem,
                "snr": snr if math.isfinite(snr) else "inf",
                "condition": condition,
            }
            old = [r for r in found if all(r[k] == v for k, v in mine.items())]
            if old and not arguments.again and old[0]["weights_sha256"] == extra["weights_sha256"]:
                continue
            found = [r for r in found if r not in old]
            for record in cell(mine, volume, model, snr, condition):
                print({**record, **extra}, flush=True)
                found.append({**record, **extra})
            records.write("accuracy", found, HEADER, table(found), "make bench-accuracy")


if __name__ == "__main__":
    main()
