"""Train an estimator: ``make weights`` makes those that ship in ``data/``.

Continues from its checkpoint where it was interrupted. For a shipped particle it writes
``data/NAME.npz``, its training log ``data/NAME.json`` and the new hash into ``data/SHA256SUMS``;
for a map of your own (``--map``), ``results/weights/NAME.npz`` and its log.
"""

import argparse
import json
import time
from pathlib import Path

import keras
import records

from cryoem import estimator, files, simulation, structures

#: One model a particle for a range of noise, shifts and defocus.
RANGES = {
    "snr_range": (1 / 128, 1.0),
    "clean_fraction": 0.25,
    "max_shift_px": 8.0,
    "defocus_range_angstrom": (5_000.0, 30_000.0),
    "ctf_fraction": 0.4,
}
#: How far the frame of 116 px is reduced, and what is cut out of it: the particle and its shifts.
PARTICLES = {
    "4jsv": {"symmetry": "C1", "down_px": 80, "crop_px": 40},
    "1i10": {"symmetry": "D2", "down_px": 80, "crop_px": 40},
    "5j0n": {"symmetry": "C1", "down_px": 48, "crop_px": 36},
    "5a1a": {"symmetry": "D2", "down_px": 72, "crop_px": 36},
}
#: The peak of the learning rate.
RATE = 6e-3
#: The second training draws other images than the first, fewer of them far off their centre,
POLISH_SEED, POLISH_RATE = 6, 2e-3
FEWER_FAR = {"shifted_fraction": 0.15}
#: and where it is for moderate noise (``--moderate``), these.
MODERATE = {"snr_range": (1 / 32, 1.0), "clean_fraction": 0.25}
#: A second network (``--read``) learns from centred images: from noisy ones, then from those of a
#: middle noise, which teach most, then from clean ones. The last cost it little at SNR 1/16, more
#: at 1/64 and below. Each with its share.
CENTRED = {**RANGES, "max_shift_px": 0.0}
NOISY = {**CENTRED, "clean_fraction": 0.0}
READ = {
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
    """What is learned from, one after the other: (name, images, ranges, options of train)."""
    first = {k: RANGES[k] for k in ("snr_range", "clean_fraction")} if arguments.plain else RANGES
    again = first if arguments.plain else {**RANGES, **FEWER_FAR}
    end = {"learning_rate": POLISH_RATE, "noise_weight": 1.0}
    polish = ("polish", arguments.polish, again, end)
    if arguments.moderate:
        polish = ("polish", arguments.polish, MODERATE, {**end, "noise_weight": 0.2})
    whole = sum(share for share, _ in READ.values())
    return [
        ("", arguments.images, first, {"learning_rate": RATE}),
        polish,
        *(
            (f"read-{name}", arguments.read * share // whole, seen, end)
            for name, (share, seen) in READ.items()
        ),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PARTICLES)
    parser.add_argument("--map", type=Path, help="of a particle that does not ship: MRC or atoms")
    parser.add_argument("--images", type=int, default=640_000)
    parser.add_argument("--polish", type=int, default=0, help="images of a second training")
    parser.add_argument(
        "--read", type=int, default=0, help="images of a second network, for centred images"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--precision", default="mixed_bfloat16")
    parser.add_argument("--plain", action="store_true", help="noise only: no shifts, no CTF")
    parser.add_argument(
        "--moderate", action="store_true", help="the second training of --plain: SNR 1/32 and more"
    )
    arguments = parser.parse_args()
    settings = dict(PARTICLES[arguments.name])
    symmetry = settings.pop("symmetry")
    volume = records.volume_of(arguments.map or arguments.name, symmetry)
    preprocessing = simulation.Preprocessing(
        frame_px=116, pixel_size_angstrom=volume.voxel_size_angstrom, **settings
    )
    if arguments.moderate and not (arguments.plain and arguments.polish):
        parser.error("--moderate goes with --plain and --polish")
    if arguments.read and arguments.plain:
        parser.error("--read parts the finding of shifts from reading; --plain knows none")
    model = estimator.Estimator.create(
        preprocessing,
        symmetry=symmetry,
        looks=1 if arguments.plain else 2,
        seed=arguments.seed,
        precision=arguments.precision,
    )
    tag = arguments.name + ("-plain" if arguments.plain else "")
    folder = Path("results/weights")
    history = {}
    for number, (name, images, ranges, options) in enumerate(stages(arguments)):
        if not images:
            continue
        if name.startswith("read") and model.finder is None:
            model.divide()
        if arguments.moderate and name == "polish":
            tag = f"{arguments.name}-moderate"
        source = simulation.TrainingImages(volume, preprocessing, symmetry=symmetry, **ranges)
        run = estimator.train(
            model,
            source,
            images=images,
            seed=arguments.seed + number * POLISH_SEED,
            checkpoint=folder / (f"{tag}-{name}" if number else tag),
            callbacks=[Log()],
            progress=False,
            **options,
        )
        history = {key: history.get(key, []) + values for key, values in run.items()}
    if model.finder is not None:  # how far off it is on images that it centred itself
        source = simulation.TrainingImages(volume, preprocessing, symmetry=symmetry, **RANGES)
        estimator.calibrate(model, source, seed=arguments.seed)
    command = f"python benchmarks/train_weights.py {arguments.name} --images {arguments.images}"
    command += f" --polish {arguments.polish}" if arguments.polish else ""
    command += f" --read {arguments.read}" if arguments.read else ""
    command += " --plain" if arguments.plain else ""
    command += " --moderate" if arguments.moderate else ""
    model.notes = {
        "particle": arguments.name,
        "command": command + (f" --map {arguments.map.name}" if arguments.map else ""),
        "seed": arguments.seed,
        "images": arguments.images + arguments.polish + arguments.read,
        "learning_rate": RATE,
        "precision": arguments.precision,
        "train_minutes": round(sum(history["seconds"]) / 60, 1),
        "source": source.settings,
    }
    ships = not arguments.map and not arguments.plain
    path = (structures.DATA if ships else folder) / f"{tag}.npz"
    model.save(path)
    log = {**model.notes, **history}
    path.with_suffix(".json").write_text(json.dumps(log, indent=1) + "\n")
    if not ships:
        return
    sums = structures.DATA / "SHA256SUMS"
    lines = [line for line in sums.read_text().splitlines() if not line.endswith(f" {path.name}")]
    lines.append(f"{files.sha256(path)}  {path.name}")
    sums.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
