"""One model for a range of noise, or one a condition: ``make bench-mismatch``.

Models of one SNR each and one of the whole range see the same number of images (``--images``) and
are judged on 300 unseen images of every SNR by E_OR, the error of the orientations that linear
algebra finds in their distances (nothing of the truth but O(4)). A model that is in the results
for as many images is not trained again.
"""

import argparse
import json
import math

import architecture
import records

from cryoem import estimator, simulation, structures

SEED, N_IMAGES, TEST_SEED = 1, 300, 70_111
SNR = {"noiseless": math.inf, "1/4": 1 / 4, "1/16": 1 / 16, "1/64": 1 / 64}
TRAINED = {
    **{name: {"snr_range": (snr, snr), "clean_fraction": 0.0} for name, snr in SNR.items()},
    "noiseless": {"clean_fraction": 1.0},
    "1/64 to 1, and noiseless": {"snr_range": (1 / 64, 1.0), "clean_fraction": 0.25},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=25_600)
    images = parser.parse_args().images
    volume = structures.load_density(architecture.PARTICLE)
    preprocessing = simulation.Preprocessing(116, 58, 30, volume.voxel_size_angstrom)
    tests = {
        name: simulation.particles(volume, N_IMAGES, TEST_SEED, snr=snr)
        for name, snr in SNR.items()
    }
    path = records.RESULTS / "mismatch.json"
    found = json.loads(path.read_text()) if path.exists() else []
    found = [r for r in found if r["trained_on"] in TRAINED and r["images_seen"] == images]
    for name, ranges in TRAINED.items():
        if any(r["trained_on"] == name for r in found):
            continue
        model = estimator.Estimator.create(preprocessing, seed=SEED, precision="mixed_bfloat16")
        estimator.train(
            model,
            simulation.TrainingImages(volume, preprocessing, **ranges),
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
        records.write("mismatch", found, header, table(found), "make bench-mismatch")


def table(found):
    return [
        [
            name,
            *(
                f"{r['e_or_rad']:.3f}"
                for tested in SNR
                for r in found
                if r["trained_on"] == name and r["tested_on"] == tested
            ),
        ]
        for name in TRAINED
        if any(r["trained_on"] == name for r in found)
    ]


if __name__ == "__main__":
    main()
