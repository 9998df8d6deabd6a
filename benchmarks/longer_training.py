"""Train an estimator of one of the paper's particles, longer than ``cryoem train`` does.

``results/weights/NAME.npz`` and its log; what ships comes from ``make weights``. A run that was
interrupted goes on from its checkpoint. Beside the first training there may be a second one at a
lower rate (``--low-rate``), and one of a second network with centred images (``--centred``).
"""

import argparse
import json
import time
from pathlib import Path

import records

from cryoem import Estimator, Preprocessing, TrainingImages
from cryoem.backend import keras
from cryoem.estimator import broad_ranges, calibrate, fit

FRAME_PX = 116
#: One model a particle for a range of noise, shifts and defocus.
RANGES = broad_ranges(FRAME_PX)
#: How far the frame is reduced, and what is cut out of it: the particle and its shifts.
PARTICLES = {
    "5j0n": {"symmetry": "C1", "down_px": 48, "crop_px": 36},
    "5a1a": {"symmetry": "D2", "down_px": 72, "crop_px": 36},
}
#: The peak of the learning rate.
RATE = 6e-3
#: Every training after the first draws other images, at a lower rate,
SEED_STEP, LOW_RATE = 6, 2e-3
#: the second one with fewer of them far off their centre,
FEWER_FAR = {"shifted_fraction": 0.15}
#: and where it is for moderate noise (``--moderate``), these.
MODERATE = {"snr_range": (1 / 32, 1.0), "clean_fraction": 0.25}
#: A second network learns from centred images: from noisy ones, then from those of a middle noise,
#: which teach most, then from clean ones. The last cost it little at SNR 1/16, more at 1/64 and
#: below. Each with its share.
CENTRED = {**RANGES, "max_shift_px": 0.0}
NOISY = {**CENTRED, "clean_fraction": 0.0}
CENTRED_STAGES = {
    "noisy": (5, {**NOISY, "snr_range": (1 / 100, 1 / 4), "ctf_fraction": 0.5}),
    "middle": (8, {**NOISY, "snr_range": (1 / 25, 1 / 10), "ctf_fraction": 0.7}),
    "clean": (7, {**CENTRED, "clean_fraction": 1.0, "ctf_fraction": 0.2}),
}


class Log(keras.callbacks.Callback):
    """Print a line an epoch."""

    def on_epoch_end(self, epoch, logs=None):
        """Print it."""
        print(f"{time.strftime('%H:%M:%S')} epoch {epoch + 1} {logs}", flush=True)


def stages(arguments):
    """What is learned from, one after the other: (name, images, ranges, options of fit)."""
    first = {k: RANGES[k] for k in ("snr_range", "clean_fraction")} if arguments.plain else RANGES
    again = first if arguments.plain else {**RANGES, **FEWER_FAR}
    low = {"learning_rate": LOW_RATE, "noise_weight": 1.0}
    second = ("low-rate", arguments.low_rate, again, low)
    if arguments.moderate:
        second = ("low-rate", arguments.low_rate, MODERATE, {**low, "noise_weight": 0.2})
    whole = sum(share for share, _ in CENTRED_STAGES.values())
    return [
        ("", arguments.images, first, {"learning_rate": RATE}),
        second,
        *(
            (f"centred-{name}", arguments.centred * share // whole, ranges, low)
            for name, (share, ranges) in CENTRED_STAGES.items()
        ),
    ]


def parsed():
    """Arguments that go together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PARTICLES)
    parser.add_argument("--map", type=Path, required=True, help="its density or atoms")
    parser.add_argument("--images", type=int, default=640_000)
    parser.add_argument("--low-rate", type=int, default=0, help="images of a second training")
    parser.add_argument(
        "--centred", type=int, default=0, help="images of a second network, for centred images"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--precision", default="mixed_bfloat16")
    parser.add_argument("--plain", action="store_true", help="noise only: no shifts, no CTF")
    parser.add_argument(
        "--moderate", action="store_true", help="the second training of --plain: SNR 1/32 and more"
    )
    arguments = parser.parse_args()
    if arguments.moderate and not (arguments.plain and arguments.low_rate):
        parser.error("--moderate goes with --plain and --low-rate")
    if arguments.centred and arguments.plain:
        parser.error("--centred splits off a network of shifts; --plain knows none")
    return arguments


def main():
    arguments = parsed()
    settings = dict(PARTICLES[arguments.name])
    symmetry = settings.pop("symmetry")
    volume = records.volume_of(arguments.map, symmetry, FRAME_PX)
    preprocessing = Preprocessing(
        frame_px=FRAME_PX, pixel_size_angstrom=volume.voxel_size_angstrom, **settings
    )
    model = Estimator.create(
        preprocessing,
        symmetry=symmetry,
        passes=1 if arguments.plain else 2,
        seed=arguments.seed,
        precision=arguments.precision,
    )
    tag = arguments.name + ("-plain" if arguments.plain else "")
    folder = Path("results/weights")
    history = {}
    for number, (name, images, ranges, options) in enumerate(stages(arguments)):
        if not images:
            continue
        if name.startswith("centred") and model.shift_network is None:
            model.split_off_shift_network()
        if arguments.moderate and name == "low-rate":
            tag = f"{arguments.name}-moderate"
        source = TrainingImages(volume, preprocessing, symmetry=symmetry, **ranges)
        run = fit(
            model,
            source,
            images=images,
            seed=arguments.seed + number * SEED_STEP,
            checkpoint=folder / (f"{tag}-{name}" if number else tag),
            callbacks=[Log()],
            progress=False,
            **options,
        )
        history = {key: history.get(key, []) + values for key, values in run.items()}
    if model.shift_network is not None:  # how far off it is on images that it centred itself
        source = TrainingImages(volume, preprocessing, symmetry=symmetry, **RANGES)
        calibrate(model, source, seed=arguments.seed)
    command = f"python benchmarks/longer_training.py {arguments.name} --map {arguments.map.name}"
    command += f" --images {arguments.images}"
    command += f" --low-rate {arguments.low_rate}" if arguments.low_rate else ""
    command += f" --centred {arguments.centred}" if arguments.centred else ""
    command += " --plain" if arguments.plain else ""
    command += " --moderate" if arguments.moderate else ""
    model.notes = {
        "particle": arguments.name,
        "command": command,
        "seed": arguments.seed,
        "images": arguments.images + arguments.low_rate + arguments.centred,
        "learning_rate": RATE,
        "precision": arguments.precision,
        "train_minutes": round(sum(history["seconds"]) / 60, 1),
        "source": source.settings,
    }
    path = folder / f"{tag}.npz"
    model.save(path)
    path.with_suffix(".json").write_text(json.dumps({**model.notes, **history}, indent=1) + "\n")


if __name__ == "__main__":
    main()
