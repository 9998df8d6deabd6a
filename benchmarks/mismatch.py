"""One model for a range of noise, or one a condition: ``make bench-mismatch``.

Models of one SNR each and one of the whole range see the same number of images (``--images``) and
are judged on 300 unseen images of every SNR by E_OR, the error of the orientations that linear
algebra finds in their distances (nothing of the truth but O(4)). A model that is in the results
for as many images is not trained again.

What a model for noise, shifts and defocus (one that has a shift network) owes to each of its
conditions is measured by training its encoder on for that condition alone, beside as many more
images of all. For one condition alone it may also know whether images are centred; so the model for
all is told too, as ``cryoem orient --centred`` tells it, but for the row "as it is":

    python benchmarks/mismatch.py --map 5j0n.mrc --weights results/weights/5j0n.npz
"""

import argparse
import json
import math
from pathlib import Path

import accuracy
import architecture
import longer_training
import records

from cryoem import (
    Estimator,
    Preprocessing,
    TrainingImages,
    load_density,
    load_estimator,
    orient,
    orientation_errors,
    simulate,
)
from cryoem.estimator import fit
from cryoem.io import files

SEED, N_IMAGES, TEST_SEED = 1, 300, 70_111
SNR = {"noiseless": math.inf, "1/4": 1 / 4, "1/16": 1 / 16, "1/64": 1 / 64}
TRAINED = {
    **{name: {"snr_range": (snr, snr), "clean_fraction": 0.0} for name, snr in SNR.items()},
    "noiseless": {"clean_fraction": 1.0},
    "1/64 to 1, and noiseless": {"snr_range": (1 / 64, 1.0), "clean_fraction": 0.25},
}
#: How test images of a condition are made, and what is learned from for it alone. For shifted
#: images that is an encoder of centred ones behind the same shift network.
NOISY = {"snr_range": (1 / 16, 1 / 16), "clean_fraction": 0.0}
SHIFTS, CTF = (accuracy.CONDITIONS[name] for name in ("shifts", "ctf"))
CONDITIONS = {
    "noiseless": {},
    "1/16": {"snr": 1 / 16},
    "1/16, shifts": {"snr": 1 / 16, **SHIFTS},
    "1/16, ctf": {"snr": 1 / 16, **CTF},
}
#: What is trained on for one condition goes far from where it is, what is for all does not.
RATE, LOW, LOWER = longer_training.LOW_RATE, 1e-3, 7e-4
AS_IT_IS, TOLD, MORE = "as it is", "as it is, told what is centred", "as much more of all"
ENCODERS = {
    AS_IT_IS: [],
    TOLD: [],
    MORE: [
        (1, LOWER, longer_training.CENTRED_STAGES["middle"][1]),
        (1, LOW, longer_training.CENTRED_STAGES["clean"][1]),
    ],
    "noiseless": [(1, RATE, {"clean_fraction": 1.0})],
    "1/16": [(1, RATE, NOISY)],
    "1/16, ctf": [(1, RATE, {**NOISY, **CTF, "ctf_fraction": 1.0})],
}


def breadth(weights, source, images):
    """Train a model on, for one condition at a time; judge each and the model itself."""
    model = load_estimator(weights)
    if model.symmetry != "C1" or model.shift_network is None:
        raise SystemExit(f"{weights}: wanted a particle without symmetry, and a shift network")
    name, seed = model.notes["particle"], SEED + 9 * longer_training.SEED_STEP  # images of its own
    volume = records.volume_of(source or name, model.symmetry)
    tests = {tested: simulate(volume, 1000, TEST_SEED, **how) for tested, how in CONDITIONS.items()}
    path = records.RESULTS / "breadth.json"
    found = json.loads(path.read_text()) if path.exists() else []
    common = {"particle": name, "weights_sha256": files.sha256(weights), "images_more": images}
    if source:
        common["map_sha256"] = files.sha256(source)
    found = [
        r for r in found if r["particle"] != name or all(r.get(k) == v for k, v in common.items())
    ]
    for title, stages in ENCODERS.items():
        if any(r["trained_on"] == title and r["particle"] == name for r in found):
            continue
        model = load_estimator(weights, precision=model.notes["precision"])
        for stage, (share, rate, seen) in enumerate(stages):
            fit(
                model,
                TrainingImages(volume, model.preprocessing, **seen),
                images=images * share // sum(share for share, _, _ in stages),
                seed=seed + stage,
                learning_rate=rate,
                noise_weight=1.0,
                progress=False,
            )
        for tested, seen in tests.items():
            known = title != AS_IT_IS and not seen.shifts_px.any()
            q = orient(model, seen.without_poses(), centred=known).quaternions
            record = {
                **common,
                "trained_on": title,
                "tested_on": tested,
                "n": len(q),
                "seed": seed,
                "test_seed": TEST_SEED,
                "e_or_rad": orientation_errors(q, seen.quaternions, over="o4").mean_rad,
            }
            found.append(record)
            print(record, flush=True)
        header = ["particle", "trained on", *(f"E_OR at {tested}, rad" for tested in CONDITIONS)]
        rows = [
            [particle, *row]
            for particle in dict.fromkeys(r["particle"] for r in found)
            for row in table([r for r in found if r["particle"] == particle], ENCODERS, CONDITIONS)
        ]
        command = f"python benchmarks/mismatch.py --weights {weights}"
        command += f" --map {source.name}" if source else ""
        records.write("breadth", found, header, rows, command)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--images", type=int, help="that each model sees: 25,600, or 102,400 more with --weights"
    )
    parser.add_argument("--weights", type=Path, help="train this model on, for one at a time")
    parser.add_argument("--map", type=Path, help="of a particle that does not ship")
    arguments = parser.parse_args()
    if arguments.weights:
        breadth(arguments.weights, arguments.map, arguments.images or 102_400)
        return
    images = arguments.images or 25_600
    volume = load_density(architecture.PARTICLE)
    preprocessing = Preprocessing(116, 58, 30, volume.voxel_size_angstrom)
    tests = {name: simulate(volume, N_IMAGES, TEST_SEED, snr=snr) for name, snr in SNR.items()}
    path = records.RESULTS / "mismatch.json"
    found = json.loads(path.read_text()) if path.exists() else []
    found = [r for r in found if r["trained_on"] in TRAINED and r["images_seen"] == images]
    for name, ranges in TRAINED.items():
        if any(r["trained_on"] == name for r in found):
            continue
        model = Estimator.create(preprocessing, seed=SEED, precision="mixed_bfloat16")
        fit(
            model,
            TrainingImages(volume, preprocessing, **ranges),
            images=images,
            seed=SEED,
            learning_rate=6e-3,
            progress=False,
        )
        for tested, seen in tests.items():
            found.append(
                {
                    "particle": architecture.PARTICLE,
                    "trained_on": name,
                    "tested_on": tested,
                    "images_seen": images,
                    "n": N_IMAGES,
                    "seed": SEED,
                    "test_seed": TEST_SEED,
                    **architecture.judge(model, seen, SEED),
                }
            )
            print(found[-1], flush=True)
        header = ["trained on (SNR)", *(f"E_OR at {tested}, rad" for tested in SNR)]
        records.write("mismatch", found, header, table(found, TRAINED, SNR), "make bench-mismatch")


def table(found, trained, conditions):
    return [
        [
            name,
            *(
                f"{r['e_or_rad']:.3f}"
                for tested in conditions
                for r in found
                if r["trained_on"] == name and r["tested_on"] == tested
            ),
        ]
        for name in trained
        if any(r["trained_on"] == name for r in found)
    ]


if __name__ == "__main__":
    main()
