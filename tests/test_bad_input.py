import numpy as np
import pytest

from cryoem import (
    Density,
    ParticleStack,
    Preprocessing,
    TrainingImages,
    distances,
    imaging,
    maps,
    reconstruction,
    recovery,
    rotations,
    simulate,
    write_particles,
)
from cryoem.density import Phantom
from cryoem.errors import InputError

CUBE = Phantom.random(0).density(24, 8.0)
IMAGES = np.ones((3, 8, 8), np.float32)
Q = rotations.uniform(3, 0)
PREPROCESSING = Preprocessing(24, 24, 12, 8.0)


def training(**options):
    return TrainingImages(CUBE, PREPROCESSING, **options)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: simulate(CUBE, 2, 0, snr=0), "snr"),
        (lambda: simulate(CUBE, 2, 0, snr=-1), "snr"),
        (lambda: simulate(CUBE, 2, 0, snr=1, noise_excess=np.inf), "noise_excess.*infinite"),
        (lambda: simulate(CUBE, 2, -1), "seed must not be negative, got -1"),
        (lambda: simulate(CUBE, 0, 0), "n must be positive"),
        (lambda: simulate(CUBE, 2, 0, max_shift_px=-1), "shift"),
        (lambda: simulate(CUBE, 2, 0, defocus_range_angstrom=(2e4, 1e4)), "defocus_range"),
        (lambda: training(defocus_range_angstrom=(2e4, 1e4)), "defocus_range"),
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
            lambda: ParticleStack(IMAGES, 4.0, quaternions=Q, shifts_px=np.full((3, 2), np.nan)),
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


def test_what_cannot_be_written_leaves_no_file(tmp_path):
    stack = ParticleStack(IMAGES, 4.0, columns={"a": ["a\" b' c"] * 3})
    with pytest.raises(InputError, match=r"cannot stand in a STAR file"):
        write_particles(tmp_path / "a.star", stack)
    assert list(tmp_path.iterdir()) == []


def test_a_source_of_training_images_knows_what_made_them():
    assert training().settings == training().settings
    assert training().settings != training(snr_range=(1 / 8, 1)).settings
    # Of the same variance: of the other contrast, and of the other hand.
    for values in (-CUBE.values, CUBE.values[::-1]):
        other = TrainingImages(Density(values, CUBE.voxel_size_angstrom), PREPROCESSING)
        assert other.settings != training().settings
