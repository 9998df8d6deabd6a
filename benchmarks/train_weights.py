"""Make the weights that ship in ``data/``: ``make weights`` (a little over an hour on two cores).

Continues from its checkpoint where it was interrupted. Writes ``data/NAME.npz``, its training log
``data/NAME.json``, and the new hash into ``data/SHA256SUMS``.
"""

import argparse
import json
import time
from pathlib import Path

import keras

from cryoem import estimator, files, simulation, structures

SETTINGS = {
    "snr_range": (1 / 32, 1.0),
    "clean_fraction": 0.3,
    "images": 1_280_000,
    "seed": 1,
    "precision": "mixed_bfloat16",
}


class Log(keras.callbacks.Callback):
    """Print a line an epoch."""

    def on_epoch_end(self, epoch, logs=None):
        """Print it."""
        print(f"{time.strftime('%H:%M:%S')} epoch {epoch + 1} {logs}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="4jsv", choices=["4jsv"])
    name = parser.parse_args().name
    density = structures.load_density(name)
    preprocessing = simulation.Preprocessing(
        frame_px=density.box_px,
        down_px=80,
        crop_px=40,
        pixel_size_angstrom=density.voxel_size_angstrom,
    )
    source = simulation.TrainingImages(
        density,
        preprocessing,
        snr_range=SETTINGS["snr_range"],
        clean_fraction=SETTINGS["clean_fraction"],
    )
    model = estimator.Estimator.create(
        preprocessing, seed=SETTINGS["seed"], precision=SETTINGS["precision"]
    )
    start = time.perf_counter()
    history = estimator.train(
        model,
        source,
        images=SETTINGS["images"],
        seed=SETTINGS["seed"],
        checkpoint=Path("results/weights") / name,
        callbacks=[Log()],
        progress=False,
    )
    minutes = (time.perf_counter() - start) / 60
    command = f"python benchmarks/train_weights.py {name}"
    model.notes = {"particle": name, "command": command, **SETTINGS}
    path = structures.DATA / f"{name}.npz"
    model.save(path)
    log = {**model.notes, "minutes_of_the_last_run": round(minutes, 1), **history}
    path.with_suffix(".json").write_text(json.dumps(log, indent=1) + "\n")
    sums = structures.DATA / "SHA256SUMS"
    lines = [line for line in sums.read_text().splitlines() if not line.endswith(f" {path.name}")]
    lines.append(f"{files.sha256(path)}  {path.name}")
    sums.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
