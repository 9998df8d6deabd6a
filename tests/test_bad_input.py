import numpy as np
import pytest

from cryoem import (
    distances,
    imaging,
    maps,
    reconstruction,
    recovery,
    rotations,
    simulation,
    star,
)
from cryoem.density import Density, Phantom
from cryoem.errors import InputError

CUBE = Phantom.random(0).density(24, 8.0)
IMAGES = np.ones((3, 8, 8), np.float32)
Q = rotations.uniform(3, 0)
PREPROCESSING = simulation.Preprocessing(24, 24, 12, 8.0)


def training(**options):
    return simulation.TrainingImages(CUBE, PREPROCESSING, **options)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: simulation.particles(CUBE, 2, 0, snr=0), "snr"),
        (lambda: simulation.particles(CUBE, 2, 0, snr=-1), "snr"),
        (lambda: simulation.particles(CUBE, 0, 0), "n must be positive"),
        (lambda: simulation.particles(CUBE, 2, 0, max_shift_px=-1), "shift"),
        (lambda: training(snr_range=(0, 1)), "snr_range"),
        (lambda: training(snr_range=(1, 0.5)), "snr_range"),
        (lambda: training(clean_fraction=2), "clean_fraction"),
        (lambda: training(shifted_fraction=-0.1), "shifted_fraction"),
        (lambda: training().batch(0, 0, 5, pairs="uniform"), "even"),
        (lambda: imaging.shift(IMAGES, np.full((3, 2), np.nan)), "shifts_px"),
        (lambda: imaging.shift(IMAGES, np.zeros((2, 2))), "shifts_px"),
        (lambda: imaging.ctf(8, 4.0, 1e4, amplitude_contrast=1.5), "amplitude_contrast"),
        (lambda: distances.compare([1.0, np.nan], [1.0, 1.0]), "finite"),
        (
            lambda: reconstruction.reconstruct(
                IMAGES, Q, voxel_size_angstrom=4.0, shifts_px=np.full((3, 2), np.nan)
            ),
            "shifts_px",
        ),
        (lambda: reconstruction.reconstruct_astra(IMAGES, Q[:2], voxel_size_angstrom=4.0), "one"),
        (
            lambda: recovery.laterate(
                np.ones((2, 20)), rotations.uniform(20, 1), weights=np.ones(20)
            ),
            "weights",
        ),
        (lambda: maps.register(CUBE, Density(CUBE.values, 4.0)), "voxel size"),
        (lambda: maps.register(Density(0 * CUBE.values, 8.0), CUBE), "zero"),
    ],
)
def test_bad_arguments_are_named(call, says):
    with pytest.raises(InputError, match=says):
        call()


@pytest.mark.parametrize("options", [{"columns": {"a": [1]}}, {"pixel_size_angstrom": np.nan}])
def test_what_cannot_be_written_leaves_no_file(tmp_path, options):
    options = {"pixel_size_angstrom": 4.0, **options}
    with pytest.raises(InputError, match=r"column a|pixel_size_angstrom"):
        star.write_particles(tmp_path / "a.star", IMAGES, Q, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_particle_set_knows_what_made_its_training():
    assert training().settings == training().settings
    assert training().settings != training(snr_range=(1 / 8, 1)).settings
