"""Small particle files of every kind, all of the same six particles, for several test files."""

import numpy as np
import pandas as pd
import starfile
from scipy.spatial.transform import Rotation

from cryoem import ParticleStack, rotations, write_particles
from cryoem.particles import CtfParameters

IMAGES = np.random.default_rng(0).standard_normal((6, 12, 12)).astype(np.float32)
Q = rotations.uniform(6, 1)
SHIFTS = np.array([[1.5, -2.0], [0, 0], [0.25, 3], [-1, -1], [2, 0], [0, 0.5]])
PIXEL = 3.67
DEFOCUS = {
    "rlnDefocusU": np.linspace(1e4, 2e4, 6),
    "rlnDefocusV": np.linspace(1.1e4, 1.9e4, 6),
    "rlnDefocusAngle": np.linspace(0, 150, 6),
}
HALF_SET = [1, 2, 1, 2, 1, 2]


def in_memory(**microscope):
    """The particles as a stack that was never in a file."""
    return ParticleStack(
        IMAGES,
        PIXEL,
        quaternions=Q,
        shifts_px=SHIFTS,
        ctf_parameters=CtfParameters(*DEFOCUS.values(), **microscope),
        half_set=HALF_SET,
    )


def relion31(folder, **microscope):
    path = folder / "particles.star"
    write_particles(path, in_memory(**microscope))
    return path


def relion30(folder):
    """The same particles as RELION 3.0 has them, beside the stack that is there."""
    path = folder / "old.star"
    rot, tilt, psi = rotations.to_relion(Q).T
    table = pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@particles.mrcs" for i in range(6)],
            "rlnVoltage": 300.0,
            "rlnSphericalAberration": 2.7,
            "rlnAmplitudeContrast": 0.1,
            "rlnMagnification": 1e4,
            "rlnDetectorPixelSize": PIXEL,
            "rlnAngleRot": rot,
            "rlnAngleTilt": tilt,
            "rlnAnglePsi": psi,
            "rlnOriginX": -SHIFTS[:, 0],
            "rlnOriginY": -SHIFTS[:, 1],
            "rlnRandomSubset": HALF_SET,
            **DEFOCUS,
        }
    )
    starfile.write({"": table}, path)
    return path


def cryosparc(folder, *, passthrough=False, sign=None, more=None, stack=b">particles.mrcs"):
    """The same particles as cryoSPARC has them, beside the stack that is there."""
    n = len(Q)
    uid = np.array([5, 3, 9, 1, 7, 11], np.uint64)
    blob = {
        "blob/path": (np.full(n, stack), "S32"),
        "blob/idx": (np.arange(n), "u4"),
        "blob/shape": (np.full((n, 2), 12), ("u4", (2,))),
        "blob/psize_A": (np.full(n, PIXEL), "f4"),
    }
    if sign is not None:
        blob["blob/sign"] = np.array(sign), "f4"
    ctf = {
        "ctf/exp_group_id": (np.zeros(n), "u4"),
        "ctf/accel_kv": (np.full(n, 300.0), "f4"),
        "ctf/cs_mm": (np.full(n, 2.7), "f4"),
        "ctf/amp_contrast": (np.full(n, 0.1), "f4"),
        "ctf/df1_A": (DEFOCUS["rlnDefocusU"], "f4"),
        "ctf/df2_A": (DEFOCUS["rlnDefocusV"], "f4"),
        "ctf/df_angle_rad": (np.deg2rad(DEFOCUS["rlnDefocusAngle"]), "f4"),
        "ctf/phase_shift_rad": (np.zeros(n), "f4"),
    }
    ctf |= more or {}
    alignment = {
        "alignments3D/pose": (Rotation.from_quat(Q).as_rotvec(), ("f4", (3,))),
        # Aligned at twice the pixel size.
        "alignments3D/psize_A": (np.full(n, 2 * PIXEL), "f4"),
        "alignments3D/shift": (-SHIFTS / 2, ("f4", (2,))),
        "alignments3D/split": (np.array(HALF_SET) - 1, "u4"),
    }

    def save(name, fields, order):
        fields = {"uid": (uid, "u8"), **fields}
        dtype = [(k, *(d if isinstance(d, tuple) else (d,))) for k, (_, d) in fields.items()]
        data = np.zeros(n, dtype)
        for key, (values, _) in fields.items():
            data[key] = values
        with open(folder / name, "wb") as file:
            np.save(file, data[order])
        return folder / name

    if passthrough:
        save("J1_passthrough_particles.cs", {**blob, **ctf}, np.argsort(uid))
        return save("J1_particles.cs", alignment, np.arange(n))
    return save("J1_particles.cs", {**blob, **ctf, **alignment}, np.arange(n))
