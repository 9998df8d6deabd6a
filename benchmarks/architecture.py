"""Which network, which head, how many features: ``make bench-architecture`` (resumable).

Every case is trained on the same fresh noiseless images for the same processor time, three seeds
each: a few steps tell how many images that is, and the learning rate falls to zero at the last.
Judged on 300 unseen images by the error of the distances and by E_OR, the error of the orientations
that linear algebra finds in them (nothing of the truth but O(4)). ``--minutes`` sets the processor
time (the whole takes some thirty times as long); a case that is in the results for the same minutes
is not run again.
"""

import argparse
import json
import time

import numpy as np
import records

from cryoem import (
    Estimator,
    Preprocessing,
    TrainingImages,
    distances,
    load_density,
    orientation_errors,
    recover,
    rotations,
    simulate,
)
from cryoem.backend import keras
from cryoem.estimator import fit

PARTICLE, TEST_SEED, N_IMAGES, SEEDS = "4jsv", 70_110, 300, (1, 2, 3)
#: name: (architecture, head, feature dimension, learning rate, optimizer, pairs)
CASES = {
    "the paper's network, head, optimizer and pairs": (
        "paper", "cosine", 512, 1e-3, "rmsprop", "uniform",
    ),
    "the paper's network and head, all pairs of a batch": (
        "paper", "cosine", 512, 1e-3, "adam", "all",
    ),
    "residual network, cosine head": ("resnet", "cosine", 16, 1e-3, "adam", "all"),
    "residual network, Euclidean head": ("resnet", "euclidean", 16, 1e-3, "adam", "all"),
    "residual network, exact head, 4 features": ("resnet", "exact", 4, 1e-3, "adam", "all"),
    "residual network, exact head": ("resnet", "exact", 16, 1e-3, "adam", "all"),
    "residual network, exact head, 64 features": ("resnet", "exact", 64, 1e-3, "adam", "all"),
    "steerable network, cosine head": ("steerable", "cosine", 0, 6e-3, "adam", "all"),
    "steerable network, exact head (the default)": ("steerable", "exact", 0, 6e-3, "adam", "all"),
}  # fmt: skip


class Clock(keras.callbacks.Callback):
    """The processor's time at the end of every epoch."""

    def __init__(self):
        super().__init__()
        self.cpu = []

    def on_epoch_end(self, epoch, logs=None):
        """Read it."""
        self.cpu.append(time.process_time())


def run(case, seed, minutes, source, test):
    architecture, head, feature_dim, rate, optimizer, pairs = CASES[case]

    def trained(images, count):
        model = Estimator.create(
            source.preprocessing,
            architecture=architecture,
            head=head,
            feature_dim=feature_dim or 16,
            seed=seed,
            precision="mixed_bfloat16",
        )
        clock = Clock()
        fit(
            model,
            source,
            images=images,
            seed=seed,
            learning_rate=rate,
            optimizer=optimizer,
            pairs=pairs,
            images_per_epoch=images // count,
            callbacks=[clock],
            progress=False,
        )
        return model, clock

    _, clock = trained(3840, 3)  # the first third traces
    cpu = clock.cpu[-1] - clock.cpu[0]
    images = int(2560 / cpu * 60 * minutes) // 1280 * 1280
    model, clock = trained(images, 10)
    record = {
        "case": case,
        "architecture": architecture,
        "head": head,
        "feature_dim": model.feature_dim,
        "weights": model.encoder.count_params(),
        "seed": seed,
        "minutes": minutes,
        "images_seen": images,
        "cpu_minutes": (clock.cpu[-1] - clock.cpu[0]) / 54,  # without the first tenth, which traces
    }
    return record | judge(model, test, seed)


def judge(model, seen, seed):
    """Mean absolute error of the distances, and E_OR of what is recovered from them."""
    features = model.embed(seen.images)
    every = distances.all_pairs(len(features))
    estimated = model.distances(features, features)[tuple(every.T)]
    true = rotations.pair_distances(seen.quaternions, every)
    found = recover(every, estimated, len(features), seed=seed)
    error = orientation_errors(found.quaternions, seen.quaternions, over="o4")
    return {"mae_rad": distances.compare(estimated, true).mae_rad, "e_or_rad": error.mean_rad}


def table(found):
    rows = []
    for case in CASES:
        mine = [r for r in found if r["case"] == case]
        if not mine:
            continue

        def spread(key, mine=mine):
            values = np.array([r[key] for r in mine])
            return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"

        rows.append(
            [
                case,
                f"{mine[0]['weights'] / 1e6:.1f} M",
                f"{mine[0]['feature_dim']}",
                f"{np.mean([r['images_seen'] for r in mine]):,.0f}",
                spread("mae_rad"),
                spread("e_or_rad"),
            ]
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="of processor time a training")
    minutes = parser.parse_args().minutes
    volume = load_density(PARTICLE)
    preprocessing = Preprocessing(116, 58, 30, volume.voxel_size_angstrom)
    source = TrainingImages(volume, preprocessing, clean_fraction=1.0)
    test = simulate(volume, N_IMAGES, TEST_SEED)
    path = records.RESULTS / "architecture.json"
    found = json.loads(path.read_text()) if path.exists() else []
    found = [r for r in found if r["case"] in CASES and r["minutes"] == minutes]
    header = [
        f"{minutes:g} processor minutes each",
        "weights",
        "features",
        "images seen",
        "distances off, rad (least to most of three seeds)",
        "E_OR, rad",
    ]
    for seed in SEEDS:
        for case in CASES:
            if any(r["case"] == case and r["seed"] == seed for r in found):
                continue
            found.append(run(case, seed, minutes, source, test))
            print(found[-1], flush=True)
            records.write("architecture", found, header, table(found), "make bench-architecture")


if __name__ == "__main__":
    main()
