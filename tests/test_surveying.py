import numpy as np
import pytest

from cryoem import (
    ParticleStack,
    TrainingImages,
    density,
    imaging,
    read_particles,
    rotations,
    simulate,
    survey,
    surveying,
    write_particles,
)
from cryoem.particles import CtfParameters
from cryoem.preprocessing import preprocessing_for

BOX, VOXEL = 40, 6.0


@pytest.fixture(scope="module")
def cube(phantom):
    return phantom.density(BOX, VOXEL)


@pytest.fixture(scope="module")
def clean(phantom):
    images = phantom.project(rotations.uniform(300, 5), BOX, VOXEL)
    return imaging.shift(images, np.random.default_rng(1).uniform(-2, 2, (300, 2)))


DEFOCUS = np.linspace(8_000, 25_000, 300)


@pytest.mark.parametrize("with_ctf", [False, True])
@pytest.mark.parametrize("snr", [np.inf, 1 / 10])
def test_the_sign_of_the_contrast_is_told(clean, with_ctf, snr):
    images = clean
    if with_ctf:
        images = imaging.apply_ctf(images, imaging.ctf(BOX, VOXEL, DEFOCUS))
    images = imaging.add_noise(images, 2, snr=snr) + 100  # whatever the background's level
    assert surveying.contrast(images)[0] == 1
    assert surveying.contrast(-images)[0] == -1
    assert surveying.contrast(-images)[1] == pytest.approx(-surveying.contrast(images)[1], rel=1e-3)


def test_noise_has_no_sign():
    noise = np.random.default_rng(3).standard_normal((300, BOX, BOX)).astype(np.float32)
    sign, z = surveying.contrast(noise)
    assert sign == 0 and abs(z) < 4
    assert surveying.contrast(noise[:1])[0] == 0


@pytest.mark.parametrize("snr", [1.0, 1 / 8, 1 / 40])
def test_noise_shifts_and_defocus_are_measured(tmp_path, clean, snr):
    images = imaging.apply_ctf(clean, imaging.ctf(BOX, VOXEL, DEFOCUS))
    variance = images.var() / snr
    path = tmp_path / "a.star"
    shifts = np.random.default_rng(0).uniform(-3, 3, (300, 2))
    stack = ParticleStack(
        imaging.add_noise(images, 4, variance=variance) + 7,
        VOXEL,
        shifts_px=shifts,
        ctf_parameters=CtfParameters(DEFOCUS + 100, DEFOCUS - 100),
    )
    write_particles(path, stack)
    found = survey(read_particles(path), images=250)
    assert found == survey(stack, images=250)
    assert found.images == 250 and found.contrast == "white on black"
    # What the CTF spreads beyond the circle counts as noise: a few per cent of the signal.
    assert found.noise_variance == pytest.approx(variance, rel=0.02 + 0.1 * snr)
    assert abs(found.snr - snr) < 4 * found.snr_error + 0.15 * snr
    assert found.snr_error < 0.2 * snr
    assert found.max_shift_px == pytest.approx(np.abs(shifts).max())
    assert found.defocus_range_angstrom == pytest.approx((8_000, 25_000))
    ranges = found.training()
    low, high = ranges["snr_range"]
    assert low < snr < high and ranges["clean_fraction"] == 0
    assert ranges["max_shift_px"] == found.max_shift_px
    assert ranges["defocus_range_angstrom"] == found.defocus_range_angstrom


def test_noise_alone_gives_ranges_too():
    noise = np.random.default_rng(0).standard_normal((50, 24, 24))
    ranges = survey(ParticleStack(noise, 4.0)).training()
    assert 0 < ranges["snr_range"][0] < ranges["snr_range"][1]
    assert ranges["max_shift_px"] == 2 and "defocus_range_angstrom" not in ranges


def test_as_many_images_are_looked_at_as_were_asked_for_and_there_are(cube):
    stack = simulate(cube, 60, 0, snr=1 / 2)
    assert [survey(stack, images=n).images for n in (10, 60, 1000)] == [10, 60, 60]
    assert survey(stack, images=10) == survey(stack, images=10, seed=0)
    assert survey(stack, images=10).snr != survey(stack, images=10, seed=1).snr


@pytest.mark.parametrize("box", [24, 40, 116, 117])
@pytest.mark.parametrize("shift", [0.0, 4.0])
def test_the_window_holds_the_particle(phantom, box, shift):
    made = phantom.density(box, 7.0)
    found = preprocessing_for(made, max_shift_px=shift)
    extent = found.crop_px * found.frame_px / found.down_px
    # Blobs of 9 A lie within 60 A, and 5 % of their peak within 2.4 standard deviations more.
    assert extent == int(extent) and extent >= min(box, 2 * (60 / 7.0 + shift))
    assert found.crop_px <= 40
    if box == 116:
        assert extent <= max(40, 2 * ((60 + 3 * 9 * 1.2) / 7.0 + shift + 2)) + 4
    TrainingImages(made, found)


def test_a_density_is_sampled_as_the_particles_are(phantom):
    # Exactly known on either grid; the box holds all of it.
    found = phantom.density(60, 4.0).sampled_as(36, 6.7)
    assert found.box_px == 36 and found.voxel_size_angstrom == 6.7
    wanted = phantom.density(36, 6.7).values
    assert np.abs(found.values - wanted).max() < 0.01 * wanted.max()
    assert isinstance(found, density.Density)


@pytest.mark.parametrize("n", [150, 500])
def test_the_diameter_is_the_particles_not_that_of_the_quietest_ring(shipped, n):
    """4JSV, 132 A across, and moved by up to 29 A each way: noise makes any ring the quietest."""
    for seed in (11, 12):
        stack = simulate(shipped["4jsv"], n, seed, snr=1 / 16, max_shift_px=8)
        assert 125 < survey(stack.without_poses()).particle_diameter_angstrom < 195
