"""Kill commands at random moments: nothing half-written stays, and called again they end alike.

``python tests/kills.py [times]``, by default five times each of ``refine``, ``orient``, ``train``
and ``solve``, on particles that it simulates. Each run is killed (SIGKILL) once, all that it has
left is read, but for temporary files, and the same command is called again; what that gives is
compared with what an uninterrupted run gave.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cryoem import evaluation, load_density, read_density, read_particles, simulate
from cryoem.density import write_density
from cryoem.io.particles import write_particles

#: Each command, and what is compared at its end.
COMMANDS = {
    "refine": ("refine seen.star -o out.star --rounds 1", "out.star"),
    "train": ("train map.mrc --like seen.star -o net.npz --images 1600 --checkpoint run", None),
    "orient": ("orient blind.star --model 4jsv -o out.star", "out.star"),
    "solve": ("solve blind.star -o found --starts 2 --rounds 1", "found/refined.star"),
}
#: Of what two runs may differ by: sums in another order.
ALIKE_RAD = 0.01


def made(folder: Path) -> None:
    """Particles, their map, and the same ones without poses."""
    density = load_density("4jsv")  # as the network that ships for it wants it
    truth = simulate(density, 200, 5, snr=1 / 4, max_shift_px=2.0)
    write_density(folder / "map.mrc", density)
    write_particles(folder / "seen.star", truth)
    write_particles(folder / "blind.star", truth.without_poses())


def begun(command: str, folder: Path) -> subprocess.Popen:
    """The command, in a process group of its own."""
    code = [Path(sys.executable).with_name("cryoem"), *command.split(), "--quiet"]
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(code, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def ended(command: str, folder: Path) -> float:
    """Run a command to its end: seconds."""
    start = time.monotonic()
    if begun(command, folder).wait():
        sys.exit(f"{command}: failed\n" + (folder / "log.txt").read_text()[-3000:])
    return time.monotonic() - start


def unreadable(folder: Path) -> list[str]:
    """Files that are not whole."""
    found = []
    for path in sorted(folder.rglob("[!.]*")):
        try:
            match path.suffix:
                case ".star" if not path.stem.endswith("_fsc"):
                    read_particles(path)
                case ".mrc":
                    read_density(path)
                case ".npz" | ".npy":
                    np.load(path)
                case ".json":
                    json.loads(path.read_text())
                case ".html":
                    assert path.read_text().rstrip().endswith("</html>")
        except Exception as error:
            found.append(f"{path.relative_to(folder)}: {error}")
    return found


def main() -> None:
    """Kill, read, call again, compare."""
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    rng, wrong, killed = random.Random(7), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        clean = root / "clean"
        clean.mkdir()
        made(clean)
        inputs = [path.name for path in clean.iterdir()]
        for name, (command, compared) in COMMANDS.items():
            took = ended(command, clean)
            for i in range(times):
                folder = root / f"{name}-{i}"
                folder.mkdir()
                for file in inputs:
                    shutil.copy(clean / file, folder)
                process = begun(command, folder)
                moment = rng.uniform(0.1, 1.0) * took
                time.sleep(moment)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    killed += 1
                process.wait()
                faults = unreadable(folder)
                again = ended(command, folder)
                if compared:
                    a, b = (read_particles(x / compared) for x in (folder, clean))
                    off = evaluation.orientation_errors(a.quaternions, b.quaternions).median_rad
                    if off > ALIKE_RAD:
                        faults.append(f"orientations {off:.3f} rad from the uninterrupted run's")
                wrong += faults
                print(
                    f"{name} killed after {moment:.1f} of {took:.1f} s, again {again:.1f} s: "
                    + ("; ".join(faults) or "as if it had not been"),
                    flush=True,
                )
                shutil.rmtree(folder)
            if compared:
                (clean / compared).unlink()
    print(f"{killed} killed, {len(wrong)} faults")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
