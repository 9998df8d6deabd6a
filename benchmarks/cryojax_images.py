"""Images as cryoJAX makes them: ``python cryojax_images.py FOLDER NOISE``, in its environment.

FOLDER holds ``map.mrc`` and ``angles.star``, which tells poses and CTF as RELION 3.1 does; written
are ``clean.mrcs``, and ``noisy.mrcs`` with white noise of standard deviation NOISE times the clean
images', each with its particle file.
"""

import sys
from pathlib import Path

import cryojax.simulator as cxs
import jax
import mrcfile
import numpy as np
import starfile


def image_of(volume, config, optics, row):
    """The model of one particle's image."""
    # The pose turns the particle, where RELION's undoes that: each angle the other way.
    pose = cxs.EulerAnglePose(
        -row["rlnOriginXAngst"], -row["rlnOriginYAngst"],
        -row["rlnAngleRot"], -row["rlnAngleTilt"], -row["rlnAnglePsi"],
    )  # fmt: skip
    u, v = row["rlnDefocusU"], row["rlnDefocusV"]
    ctf = cxs.AstigmaticCTF(
        (u + v) / 2, u - v, row["rlnDefocusAngle"], optics["rlnSphericalAberration"]
    )
    theory = cxs.ContrastTransferTheory(
        ctf, amplitude_contrast_ratio=optics["rlnAmplitudeContrast"]
    )
    # Padded, for a CTF that does not wrap; in its own sign, dark particles are negative.
    return cxs.make_image_model(volume, config, pose, theory)


def main():
    folder, noise = Path(sys.argv[1]), float(sys.argv[2])
    tables = starfile.read(folder / "angles.star")
    optics, particles = tables["optics"].iloc[0], tables["particles"]
    values = mrcfile.read(folder / "map.mrc")
    volume = cxs.FourierVoxelGridVolume.from_real_voxel_grid(values, interp="cubic", pad_scale=2.0)
    config = cxs.BasicImageConfig(
        values.shape[:2], optics["rlnImagePixelSize"], optics["rlnVoltage"],
        precompute_mode="rfft",
    )  # fmt: skip
    names = ["rlnOriginXAngst", "rlnOriginYAngst", "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi",
             "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"]  # fmt: skip
    told = {name: jax.numpy.asarray(particles[name].to_numpy(float)) for name in names}
    shared = {k: float(optics[k]) for k in ("rlnSphericalAberration", "rlnAmplitudeContrast")}

    @jax.jit
    def simulated(row):
        return image_of(volume, config, shared, row).simulate()

    rows = [{k: v[i] for k, v in told.items()} for i in range(len(particles))]
    clean = np.stack([np.asarray(simulated(row)) for row in rows])
    sigma = noise * clean.std()

    @jax.jit
    def noisy(row, key):
        model = image_of(volume, config, shared, row)
        return cxs.GaussianWhiteNoiseModel(model, sigma**2).sample(key)

    keys = jax.random.split(jax.random.key(0), len(rows))
    seen = np.stack([np.asarray(noisy(row, key)) for row, key in zip(rows, keys, strict=True)])
    for name, images in (("clean", clean), ("noisy", seen)):
        with mrcfile.new(folder / f"{name}.mrcs", overwrite=True) as stack:
            stack.set_data(images.astype(np.float32))
            stack.set_image_stack()
            stack.voxel_size = float(optics["rlnImagePixelSize"])
        tables["particles"]["rlnImageName"] = [f"{i + 1:06d}@{name}.mrcs" for i in range(len(rows))]
        starfile.write(tables, folder / f"{name}.star", overwrite=True)


if __name__ == "__main__":
    main()
