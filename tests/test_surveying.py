import dataclasses

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
from cryoem.errors import InputError
from cryoem.noise import coloured
from cryoem.particles import CtfParameters
from cryoem.preprocessing import preprocessing_for
from cryoem.single_images import ImageStatistics

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


def statistics(images, group=0, told=1.0):
    images = np.asarray(images, np.float32)
    return ImageStatistics.of(images, np.broadcast_to(group, len(images)), told)


def noisy(clean, snr, excess=0.0):
    images = imaging.apply_ctf(clean, imaging.ctf(BOX, VOXEL, DEFOCUS))
    noise = coloured(images.var() / snr, excess, 40 / VOXEL)
    return images + noise.draw(len(images), BOX, 5)


@pytest.mark.parametrize(
    ("snr", "excess", "share", "mixed"),
    [(4, 0, 0.3, True), (4, 0, 0.05, True), (4, 0, 0.01, False), (4, 0, 0, False),
     (1 / 16, 0, 0.3, True), (1 / 16, 0, 0.5, True), (1 / 16, 0, 0, False), (4, 10, 0, False),
     # No image tells its own sign: nothing is claimed.
     (1 / 64, 10, 0.5, False)],
)  # fmt: skip
def test_images_of_both_contrasts_are_told_where_single_ones_tell(clean, snr, excess, share, mixed):
    images, black = noisy(clean, snr, excess), np.arange(300) < share * 300
    images[black] *= -1
    sign, odd, told = statistics(images).contrasts(np.zeros(300, int))
    assert told == mixed and sign[0] == (1 if share < 0.5 else 0)
    assert len(odd) == 0 or np.isin(odd, np.flatnonzero(black)).mean() > 0.9
    if mixed and share < 0.5:
        assert len(odd) > 0.8 * black.sum()
    if snr == 4:
        found = survey(ParticleStack(images, VOXEL)).contrast
        assert found == ("mixed" if mixed else "white on black")
    if share == 0:
        assert len(odd) == 0


def test_a_contrast_is_that_of_an_optics_group_or_of_a_stack(clean):
    images, part = noisy(clean, 1 / 16), np.repeat([0, 1, 2, 3], [140, 100, 57, 3])
    images[part == 1] *= -1
    wanted = np.where(part == 1, -1, 1)
    for group, stack in ((part, 0 * part), (0 * part, np.minimum(part, 2)), (part // 2, part)):
        sign, odd, mixed = statistics(images, group).contrasts(stack)
        known = sign != 0
        np.testing.assert_array_equal(sign[known], wanted[known])
        assert not mixed and len(odd) == 0 and known[part < 3].all()
    # What a few images do not tell, the others of their group do, or the other groups.
    for group, stack in ((0 * part, part // 3), (part // 3, 0 * part)):
        some = part != 1
        sign = statistics(images[some], group[some]).contrasts(stack[some])[0]
        assert (sign == 1).all()


@pytest.mark.parametrize("snr", [np.inf, 0.3, 0.1, 0.03])
@pytest.mark.parametrize("shape", ["tube", "dumbbell"])
def test_a_particle_that_is_dark_in_the_middle_is_not_turned_by_its_views(shape, snr):
    """Seen from the top in some micrographs, from the side in others."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ring = np.stack([50 * np.cos(angle), 50 * np.sin(angle), 0 * angle], axis=1)
    centres = [ring + np.array([0, 0, z]) for z in range(-40, 41, 10)]
    if shape == "dumbbell":
        centres = [np.array([[60.0, 0, 0], [-60.0, 0, 0]])]
    at = np.concatenate(centres)
    phantom = density.Phantom(at, np.full(len(at), 9.0), np.ones(len(at)))
    stack, side = np.repeat(np.arange(20), 50), np.repeat(np.arange(20) % 5 > 1, 50)
    spin = rotations.about("z", 2 * np.pi * np.random.default_rng(0).random(1000))
    tip = np.where(side[:, None], rotations.about("y", np.pi / 2), [0.0, 0, 0, 1])
    images = phantom.project(rotations.multiply(tip, spin), BOX, VOXEL)
    values = imaging.ctf(BOX, VOXEL, np.linspace(8_000, 25_000, 20)[stack])
    images = imaging.apply_ctf(images, values)
    if np.isfinite(snr):
        images = imaging.add_noise(images, 1, snr=snr)
    sign, _, _ = statistics(images).contrasts(stack)
    assert len(set(sign)) == 1
    # But all of some micrographs black is seen, where each shows views enough.
    if snr > 0.1:
        mixed = np.random.default_rng(1).permutation(1000)
        images = images[mixed] * np.where(stack % 3 == 0, -1, 1)[:, None, None]
        sign, _, told = statistics(images).contrasts(stack)
        assert told or (sign == np.where(stack % 3 == 0, -1, 1)).all()


@pytest.mark.parametrize("snr", [1e6, 4, 1 / 16])
@pytest.mark.parametrize("excess", [0, 10])
def test_a_background_is_flat_or_it_is_not(clean, snr, excess):
    flat = noisy(clean, snr, excess)
    assert not statistics(flat).uneven
    assert not statistics(flat[:5]).uneven
    scale, x = flat.std(), (np.arange(BOX) - BOX // 2) / BOX
    some, group = np.arange(300) < 12, np.arange(300) // 297
    for level in (0.1, 0.95, -0.99, 30):
        assert statistics(flat + scale * level).uneven
        assert statistics(flat + 3 * scale * level * x).uneven
    assert statistics(flat + 3 * scale * some[:, None, None]).uneven
    # Three images in a group of their own.
    assert statistics(flat + 3 * scale * group[:, None, None], group).uneven


def test_images_of_another_scale_and_hot_pixels_are_found(clean):
    images, group = noisy(clean, 1 / 4), np.arange(300) % 2
    assert len(statistics(images).far) == 0
    assert len(statistics(images + 100).far) == 0
    assert len(statistics(images * np.where(group, 100, 1)[:, None, None], group).far) == 0
    some = images[:20] * np.where(np.arange(20) < 10, 1, 50)[:, None, None]
    assert len(statistics(some).far) == 10
    images[3] *= 1000
    images[7] /= 1000
    images[50, 20, 20] = 1e5
    images[60, 0, 0] = 1e30
    np.testing.assert_array_equal(statistics(images).far, [3, 7, 50, 60])
    np.testing.assert_array_equal(statistics(images, group).far, [3, 7, 50, 60])


@pytest.mark.parametrize("times", [100, 1e3, 1e4, 1e6])
def test_pixels_that_hold_most_of_an_image_are_hot_whatever_others_hold(clean, times):
    """Where most of the images have one, the usual image has one too; the others are good."""
    images = noisy(clean, 1 / 4)
    rows = np.arange(0, 300, 5)
    hot = np.delete(np.arange(300), rows)
    images[hot, hot % BOX, 20] = times * images.std()
    np.testing.assert_array_equal(statistics(images).far, hot)


@pytest.mark.parametrize("each", [1, 2, 7, 10])
def test_small_optics_groups_are_looked_at_too(clean, each):
    """Of a micrograph each, say: those of a few images by themselves, smaller ones together."""
    images, group = noisy(clean, 1 / 4), np.arange(300) // each
    assert len(statistics(images, group).far) == 0
    images[37, 10, 12] = 1000 * images.std()
    images[99] *= 100
    np.testing.assert_array_equal(statistics(images, group).far, [37, 99])
    images = noisy(clean, 4)
    images[::3] *= -1
    _, odd, mixed = statistics(images, group).contrasts(np.zeros(300, int))
    assert mixed and len(np.intersect1d(odd, np.arange(0, 300, 3))) > 80


def test_by_a_few_images_beside_others_no_scale_is_told(clean):
    images = noisy(clean, 1 / 4)
    images[:2] *= 100
    assert len(statistics(images, np.arange(300) < 4).far) == 0
    np.testing.assert_array_equal(statistics(images, np.arange(300) < 5).far, [0, 1])


@pytest.mark.parametrize("with_noise", [False, True])
def test_images_that_are_told_to_be_fainter_are_not_far(clean, with_noise):
    """All of the image, or its particle alone."""
    told = np.where(np.arange(300) % 3, 0.1, 1.0)
    images = clean * told[:, None, None]
    if with_noise:
        images = noisy(clean, 1 / 4)
        assert len(statistics(images, told=told).far) == 0
    else:
        assert len(statistics(images).far) > 50
        assert len(statistics(images, told=told).far) == 0
    # And of groups.
    images, group = noisy(clean, 1 / 4), np.arange(300) % 2
    for scale in (1.0, 1 / 5):
        images[1::2] *= scale
        assert statistics(images, group, told=np.where(group, 1 / 5, 1.0)).apart < 1.2


def test_small_groups_tell_their_contrast_together(clean):
    images, group = -noisy(clean, 1 / 1000), np.arange(300) // 7
    seen = statistics(images, group)
    assert not any(seen.contrast(rows)[0] for rows in seen.groups)
    sign, odd, mixed = seen.contrasts(np.zeros(300, int))
    assert (sign == -1).all() and len(odd) == 0 and not mixed


def test_masks_of_premultiplied_images_in_memory_are_seen(clean):
    """Divided, what lay beyond the mask is no constant any more."""
    disc = np.hypot(*np.mgrid[:BOX, :BOX] - BOX // 2) < 0.4 * BOX
    known = CtfParameters(np.full(300, DEFOCUS), images="premultiplied")
    images = imaging.apply_ctf(noisy(clean, 1 / 4), imaging.ctf(BOX, VOXEL, DEFOCUS)) * disc
    stack = ParticleStack(images, VOXEL, ctf_parameters=known)
    assert survey(stack).masked_fraction == 1 and survey(stack).noise_variance == 0
    assert surveying.with_noise(stack).noise is None
    assert set(surveying.with_noise(stack).ctf_parameters.images) == {"divided"}


def test_groups_of_other_scales_are_told(clean):
    images, group = noisy(clean, 1 / 4), np.arange(300) % 2
    assert statistics(images, group).apart < 1.1
    images[1::2] *= 30
    assert statistics(images, group).apart == pytest.approx(30, rel=0.1)
    assert len(statistics(images, group).far) == 0


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


def test_nothing_is_trained_for_images_that_show_nothing():
    seen = survey(ParticleStack(np.random.default_rng(0).standard_normal((50, 24, 24)), 4.0))
    with pytest.raises(InputError, match="no particle is to be seen in the images: SNR 1e-22"):
        dataclasses.replace(seen, snr=1e-22, snr_error=3e-22).training()


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


def test_a_density_is_black_or_it_is_not(shipped):
    """Rings about a particle, noise and coarse detail that is missing make none black."""
    cube = shipped["4jsv"]
    noise = np.random.default_rng(0).standard_normal(cube.values.shape)
    told = [(density.Density(cube.values + 0.5 * cube.values.max(), 3.67), True)]
    told.append((density.Density(cube.values + 8 * cube.values.std() * noise, 3.67), True))
    middle = np.linalg.norm(np.indices(cube.values.shape) - 58, axis=0) < 56
    dark = np.where(middle, cube.values - 0.2 * cube.values.max(), 0)  # masked, solvent below 0
    assert not surveying.is_black(density.Density(dark, 3.67))
    for missing, sure in ((100, True), (40, False), (25, False)):
        fine = cube.values - cube.low_passed(missing).values
        assert fine.min() < -0.1 * fine.max()
        told.append((density.Density(fine, 3.67), sure))
    for white, sure in told:
        black = density.Density(-white.values, white.voxel_size_angstrom)
        assert (surveying.is_black(white), surveying.is_black(black)) == (False, sure)
    assert not surveying.is_black(density.Density(np.zeros((8, 8, 8)), 4.0))
    flat = cube.values[20:96]
    assert surveying.is_black(density.Density(0.1 - flat, 3.67))


@pytest.mark.parametrize("n", [150, 500])
def test_the_diameter_is_the_particles_not_that_of_the_quietest_ring(shipped, n):
    """4JSV, 132 A across, and moved by up to 29 A each way: noise makes any ring the quietest."""
    for seed in (11, 12):
        stack = simulate(shipped["4jsv"], n, seed, snr=1 / 16, max_shift_px=8)
        assert 125 < survey(stack.without_poses()).particle_diameter_angstrom < 195


def test_a_map_is_moved_to_the_middle_whatever_its_solvent_is():
    """Off by 24 of 96 A, one was taken as it stood, or moved by astronomical lengths."""
    cube = np.zeros((24, 24, 24), np.float32)
    cube[12:15, 12:15, 18:21] = 1.0
    for scale, level in ((1, 0), (1, 0.5), (1, -2), (1e-6, 1e-6)):
        one = density.Density(scale * cube + level, 4.0)
        assert surveying.to_the_middle(one).tolist() == [-1, -1, -7]
    for flat in (np.zeros_like(cube), np.full_like(cube, -1)):
        assert not surveying.to_the_middle(density.Density(flat, 4.0)).any()
