"""Projections by one program, for ``peers.py``: ``python projecting.py PROGRAM FOLDER REPEATS``.

FOLDER holds ``volume.npy``, (z, y, x), and ``matrices.npy``, (n, 3, 3), which turn the coordinates
(x, y, z) of a detector into the particle's; written are the images, ``PROGRAM.npy``, and seconds of
every time, ``PROGRAM.json``. Each program as its documentation has it, in its own environment, on
one thread.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

#: How many times finer the transform is that slices are interpolated in, as is their default.
PADDED = 2


def cryoem(volume, matrices):
    """The package beside this folder: NUFFT."""
    from scipy.spatial.transform import Rotation

    from cryoem import Density, project

    density, q = Density(volume, 1.0), Rotation.from_matrix(matrices).as_quat()
    return lambda: project(density, q)


def torch_fourier_slice(volume, matrices):
    """Trilinear interpolation."""
    import torch
    from torch_fourier_slice import project_3d_to_2d

    torch.set_num_threads(1)
    volume, matrices = torch.tensor(volume), torch.tensor(matrices, dtype=torch.float32)
    return lambda: project_3d_to_2d(volume, matrices, pad_factor=PADDED).numpy()


def aspire(volume, matrices):
    """NUFFT."""
    from aspire.utils import Rotation
    from aspire.volume import Volume

    volume, rotations = Volume(volume), Rotation(matrices.astype(np.float32))
    return lambda: volume.project(rotations).asnumpy()


def main():
    program, folder, repeats = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    volume, matrices = (np.load(folder / f"{name}.npy") for name in ("volume", "matrices"))
    project, seconds = globals()[program](volume, matrices), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        images = project()
        seconds.append(time.perf_counter() - start)
    np.save(folder / f"{program}.npy", images)
    (folder / f"{program}.json").write_text(json.dumps(seconds[1:]))  # the first one warms it


if __name__ == "__main__":
    main()
