"""Noise of known spectra: what is measured, drawn and whitened is what was put in."""

import numpy as np
import pytest
import scipy.fft
import starfile
from measures import relative_error

from cryoem import evaluation, fourier, imaging, projection, reconstruction, rotations, simulate
from cryoem.density import Phantom
from cryoem.errors import InputError
from cryoem.matching import match
from cryoem.noise import Noise, background_noise, coloured
from cryoem.particles import ParticleStack
from cryoem.preprocessing import Preprocessing
from cryoem.recovery.chunks import Job
from cryoem.refinement import Search, refine
from cryoem.refinement.halves import refine_each_half
from cryoem.simulation import TrainingImages
from cryoem.surveying import survey, with_noise, write_noise

BOX, VOXEL, N = 40, 5.0, 200
SHARP = Phantom.random(0, sigma_angstrom=6.0)
DENSITY = SHARP.density(BOX, VOXEL)
TRUE = rotations.uniform(N, 1)
CLEAN = SHARP.project(TRUE, BOX, VOXEL).astype(np.float32)
LENGTH = 40 / VOXEL


def shell_power(images):
    """Mean power of each shell, in the units of a variance."""
    n, size = images.shape[:2]
    power = (np.abs(scipy.fft.fft2(images)) ** 2).sum(axis=0).ravel() / (n * size**2)
    shells = np.rint(fourier.radius((size, size))).astype(int).ravel()
    return np.bincount(shells, power) / np.bincount(shells)


def outside(size, share):
    axis = np.arange(size) - size // 2
    return np.hypot(axis[:, None], axis) > share * size / 2


def in_noise(excess, snr, seed=2):
    """The phantom's images in coloured noise, and the noise."""
    noise = coloured(float(CLEAN.var()) / snr, excess, LENGTH)
    return CLEAN + noise.draw(N, BOX, seed), noise


@pytest.mark.parametrize("excess", [0.0, 3.0, 30.0])
def test_coloured_noise_is_as_loud_as_asked_for_at_every_frequency(excess):
    noise = coloured(2.5, excess, 8.0)
    assert noise.variance == pytest.approx(2.5) and noise.is_white == (excess == 0)
    k = np.array([0.02, 0.1, 0.4])
    a, _, c = noise.at(k)[0]
    assert a / c == pytest.approx(
        (1 + excess / (1 + 0.16**2)) / (1 + excess / (1 + 3.2**2)), rel=0.02
    )
    images = noise.draw(400, 48, 0)
    assert images.var() == pytest.approx(2.5, rel=0.02)
    found = shell_power(images)[1:24]
    wanted = noise.at(np.arange(1, 24) / 48)[0]
    np.testing.assert_allclose(found, wanted, rtol=0.12)  # shell 1 has 8 x 400 / 2 samples
    np.testing.assert_allclose(found[5:], wanted[5:], rtol=0.05)


@pytest.mark.parametrize("size", [47, 48])
def test_whitening_makes_it_white_and_keeps_its_variance(size):
    noise = coloured(2.0, 10.0, 8.0)
    white = imaging.apply_ctf(noise.draw(400, size, 1), noise.whitening(size)[0])
    np.testing.assert_allclose(shell_power(white)[1 : size // 2], 2.0, rtol=0.1)
    np.testing.assert_array_equal(Noise.white(3.0).whitening(size), 1)


@pytest.mark.parametrize("size", [63, 64])
@pytest.mark.parametrize("excess", [0.0, 10.0])
def test_a_spectrum_is_measured_where_no_particle_is(size, excess):
    noise = coloured(2.0, excess, 8.0)
    images = noise.draw(400, size, 3) + 5
    images[:, ~outside(size, 0.8)] += 40  # what stands in the middle is of no account
    found = background_noise(images, outside(size, 0.8))
    k = np.arange(1, size // 2) / size
    ratio = found.at(k)[0] / noise.at(k)[0]
    np.testing.assert_allclose(ratio, 1, atol=0.15)
    np.testing.assert_allclose(ratio[5:], 1, atol=0.04)


def test_each_optics_group_has_a_spectrum_of_its_own():
    loud, quiet = coloured(4.0, 10.0, 8.0), coloured(1.0, 0.0, 8.0)
    both = Noise(np.concatenate([loud.power, quiet.power]))
    group = np.arange(400) % 2
    found = background_noise(both.draw(400, 48, 0, group=group), outside(48, 0.7), group=group)
    assert found.variances == pytest.approx([4.0, 1.0], rel=0.05)
    low, high = found.at(0.02), found.at(0.4)
    assert low[0] / high[0] > 4 and low[1] == pytest.approx(high[1], rel=0.15)
    # Group 1 of 0, 1, 2 is not there: it is given what all have.
    apart = background_noise(both.draw(400, 48, 0, group=group), outside(48, 0.7), group=2 * group)
    assert apart.variances[1] == pytest.approx(2.5, rel=0.05)
    stack = ParticleStack(np.ones((3, 8, 8)), 1.0, optics_group=[0, 1, 2], noise=found)
    with pytest.raises(InputError, match="optics_group 2, counted from 0, has no noise"):
        stack.whitening()


@pytest.mark.parametrize(
    "power", [np.zeros((1, 4)), np.full((1, 4), np.nan), np.ones((1, 1)), -1.0]
)
def test_a_power_that_is_none_is_refused(power):
    with pytest.raises(InputError, match="power must be positive"):
        Noise(power)


def test_a_background_without_pixels_is_refused():
    with pytest.raises(InputError, match="background must hold some pixels"):
        background_noise(np.ones((2, 8, 8)), np.zeros((8, 8), bool))


# --------------------------------------------------------------------------------------
# What the steps of the method make of it


def test_the_limit_counts_every_frequency_by_its_noise():
    q, step = TRUE[:5], 1e-3
    noise = coloured(1e3, 10.0, LENGTH)
    found = evaluation.cramer_rao(DENSITY, q, noise)
    power = noise.at(fourier.radius((BOX, BOX)) / BOX)[0]
    for i in range(5):
        slopes = []
        for axis in np.eye(3):
            w = step * axis * np.array([[-1.0], [1.0]])
            before, after = projection.project(DENSITY, rotations.perturb(q[[i, i]], w))
            slopes.append(scipy.fft.fft2(after - before) / (2 * step))
        fisher = [[np.sum(a * b.conj() / power).real / BOX**2 for b in slopes] for a in slopes]
        np.testing.assert_allclose(found[i], np.linalg.inv(fisher), rtol=0.02)
    white = evaluation.cramer_rao(DENSITY, q, Noise.white(7.0))
    np.testing.assert_allclose(white, evaluation.cramer_rao(DENSITY, q, 7.0))


def test_refinement_ends_at_the_limit_of_coloured_noise():
    images, noise = in_noise(30.0, 1.0)
    w = np.random.default_rng(3).standard_normal((N, 3))
    start = rotations.perturb(TRUE, 0.2 * w / np.linalg.norm(w, axis=1, keepdims=True))
    stack = ParticleStack(images, VOXEL, quaternions=start)
    limit = evaluation.cramer_rao(DENSITY, TRUE, noise, shifts=True)[:, :3, :3]
    bound = evaluation.mean_error_of(limit).mean()
    error, expected, found = {}, {}, {}
    for name, known in (("white", Noise.white(1.0)), ("unknown", None), ("known", noise)):
        found[name] = refine(stack.replace(noise=known), DENSITY, resolution_angstrom=2 * VOXEL)
        error[name] = rotations.distance(found[name].quaternions, TRUE).mean()
        expected[name] = found[name].expected_error_rad.mean()
    # Who takes it for white is further off, and does not know.
    assert error["white"] > 1.1 * bound and expected["white"] < 0.75 * error["white"]
    for name in ("unknown", "known"):  # 200 particles: the mean is known to 3 %
        assert error[name] < 1.08 * bound
        assert expected[name] == pytest.approx(error[name], rel=0.1)
    for name in ("unknown", "known"):
        assert found[name].noise.variance == pytest.approx(found[name].noise_variance)
        assert found[name].noise_variance == pytest.approx(noise.variance, rel=0.05)
    k = np.arange(1, BOX // 2) / BOX
    np.testing.assert_allclose(found["unknown"].noise.at(k)[0] / noise.at(k)[0], 1, atol=0.25)


def test_matching_whitens_images_and_references():
    noise = coloured(float(CLEAN.var()) * 8, 200.0, 20.0)
    stack = ParticleStack(CLEAN + noise.draw(N, BOX, 2), VOXEL)
    whole = Preprocessing(BOX, BOX, BOX, VOXEL)
    white, unknown, known = (
        rotations.distance(
            match(stack.replace(noise=noise), DENSITY, whole, references=4000).quaternions, TRUE
        ).mean()
        for noise in (Noise.white(1.0), None, noise)
    )
    assert known < 0.75 * white and unknown < 0.75 * white


def test_a_group_that_was_not_looked_at_has_the_noise_of_all():
    both = Noise(np.array([[1.0, 3.0], [3.0, 5.0]]))
    np.testing.assert_array_equal(both.for_groups(3).power, [[1, 3], [3, 5], [2, 4]])
    assert both.for_groups(2) is both
    np.testing.assert_array_equal(Noise.white(2.0).for_groups(3).power, np.full((3, 2), 2.0))
    # One particle alone is of group 2, and the survey does not meet it.
    images, _ = in_noise(3.0, 1.0)
    group = np.zeros(N, int)
    group[7] = 2
    stack = ParticleStack(images, VOXEL, quaternions=TRUE, optics_group=group)
    assert stack.optics_groups == 3
    assert len(survey(stack, images=50).noise.power) == 3
    # And in halves only one has it.
    halves = stack.replace(half_set=np.arange(N) % 2 + 1)
    refined = refine_each_half(
        halves, [DENSITY, DENSITY], resolution_angstrom=20.0, search=Search(1, 0.1, False, 2)
    )
    assert refined.noise.power.shape[0] == 3 and refined.whitening().shape[0] == N


def test_a_small_group_that_is_loud_has_its_own_noise():
    group = (np.arange(N) % 5 == 0).astype(int)  # 40 of 200
    scale = np.sqrt(CLEAN.var() * np.where(group, 16.0, 1.0))[:, None, None]
    images = CLEAN + scale * np.random.default_rng(4).standard_normal(CLEAN.shape)
    stack = ParticleStack(images, VOXEL, quaternions=TRUE, optics_group=group)
    found = refine(stack, DENSITY, resolution_angstrom=12.0, search=Search(starts=1).near)
    quiet, loud = found.noise.power.mean(axis=1)
    assert loud / quiet == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_of_many_groups_each_has_its_own_noise_where_they_are_large_enough(monkeypatch, share):
    """Beyond forty of them all were given the mean."""
    monkeypatch.setattr("cryoem.refinement.fit.GROUPS", 1)
    monkeypatch.setattr("cryoem.refinement.fit.SHARE", share)
    group = np.arange(N) % 5
    scale = np.sqrt(CLEAN.var() * np.where(group == 0, 16.0, 1.0))[:, None, None]
    images = CLEAN + scale * np.random.default_rng(4).standard_normal(CLEAN.shape)
    stack = ParticleStack(images, VOXEL, quaternions=TRUE, optics_group=group)
    found = refine(stack, DENSITY, resolution_angstrom=12.0, search=Search(starts=1).near)
    loud, *quiet = found.noise.power.mean(axis=1)
    # Where so many would be too large a share of the particles, all have one.
    assert loud / np.mean(quiet) == pytest.approx(16 if share == 1 else 1, rel=0.1)


def test_a_map_believes_quiet_images_more():
    loud = Noise(np.array([[1.0, 1.0], [25.0, 25.0]]) * float(CLEAN.var()))
    group = np.arange(N) % 2
    images = CLEAN + loud.draw(N, BOX, 5, group=group)
    stack = ParticleStack(images, VOXEL, quaternions=TRUE, optics_group=group)
    alike = Noise.white(float(loud.power.mean()))
    maps = [
        reconstruction.reconstruct(stack.replace(noise=noise)).low_passed(20.0)
        for noise in (alike, loud, None)
    ]
    wanted = DENSITY.low_passed(20.0).values
    apart, weighted, measured = (relative_error(found.values, wanted) for found in maps)
    assert weighted < 0.6 * apart
    assert measured < 1.1 * weighted


def test_the_noise_is_told_from_the_particle_with_neighbours_about():
    rng = np.random.default_rng(0)
    noise = coloured(float(CLEAN.var()) / 0.05, 10.0, LENGTH)
    images = 0.0
    for x, y in ((0, 0), (14, 26), (-27, 9)):  # neighbours are cut off by the frame's edge
        views = SHARP.project(rotations.uniform(1000, rng), 64, VOXEL)
        images = images + np.roll(views, (x, y), axis=(1, 2)) * (1 if x == 0 else 0.7)
    alone = SHARP.project(TRUE, 64, VOXEL).var()
    images = (images + noise.draw(1000, 64, 1)).astype(np.float32)
    found = survey(ParticleStack(images, VOXEL))
    assert found.snr == pytest.approx(alone / noise.variance, rel=0.4)
    assert found.noise.at(0.02)[0] / found.noise.at(0.4)[0] > 5
    assert with_noise(ParticleStack(images, VOXEL)).noise == found.noise


def test_images_without_noise_have_no_spectrum():
    assert survey(ParticleStack(CLEAN, VOXEL)).noise is None
    assert simulate(DENSITY, 10, 0).noise is None
    made = simulate(DENSITY, 10, 0, snr=1, noise_excess=5)
    assert made.noise.at(0.01) > 4 * made.noise.at(0.5)
    assert made.noise.variance == pytest.approx(simulate(DENSITY, 10, 0, snr=1).noise.variance)
    with pytest.raises(InputError, match="noise_excess must not be negative"):
        simulate(DENSITY, 10, 0, snr=1, noise_excess=-1)


def test_noise_is_written_as_relion_keeps_it(tmp_path):
    """Of white noise of variance 1 ``relion_refine`` finds 1 / (2 N^2) in images of N px."""
    stack = ParticleStack(CLEAN, VOXEL, optics_group=np.arange(N) % 2)
    with pytest.raises(InputError, match=r"a\.star: the noise of the particles is not known"):
        write_noise(tmp_path / "a.star", stack)
    one, two = Noise.white(3.0), coloured(1.0, 10.0, LENGTH)
    power = np.stack([one.at(two.frequencies)[0], two.power[0]])
    write_noise(tmp_path / "a.star", stack.replace(noise=Noise(power)))
    found = starfile.read(tmp_path / "a.star")
    assert list(found) == ["model_optics_group_1", "model_optics_group_2"]
    white, louder = found.values()
    np.testing.assert_allclose(white["rlnSigma2Noise"], 3 / (2 * BOX**2))
    np.testing.assert_allclose(white["rlnResolution"], np.arange(BOX // 2 + 1) / (BOX * VOXEL))
    assert louder["rlnSigma2Noise"][1] > 3 * louder["rlnSigma2Noise"][BOX // 2]


def test_masked_images_cannot_be_trained_for():
    images = CLEAN + np.random.default_rng(0).standard_normal(CLEAN.shape)
    images[:, outside(BOX, 0.9)] = 0
    with pytest.raises(InputError, match="corners of the images are constant"):
        survey(ParticleStack(images, VOXEL)).training()


def test_training_images_are_whitened_as_particles_are():
    p = Preprocessing(BOX, 32, 24, VOXEL)
    k = fourier.radius((24, 24), half=True) / 24 * 32 / BOX
    told = coloured(1.0, 10.0, LENGTH)
    images = {
        name: TrainingImages(DENSITY, p, snr_range=(1e6, 1e6), clean_fraction=0.0, noise=noise)
        for name, noise in (("white", "white"), ("told", told), ("coloured", "coloured"))
    }
    made = {name: source.batch(0, 0, 8)[0] for name, source in images.items()}
    # Hardly any noise: what is left is what whitening does to the particle.
    wanted = imaging.normalise(imaging.apply_ctf(made["white"], told.gain(k)[0]))
    assert relative_error(made["told"], wanted) < 0.01
    assert relative_error(made["white"], wanted) > 0.1
    rng = np.random.default_rng(0)
    gains = images["coloured"]._whitening(rng, 200)
    rng = np.random.default_rng(0)
    excess = np.exp(rng.uniform(*np.log([1, 40]), 200)) * (rng.random(200) < 0.7)
    length = np.exp(rng.uniform(*np.log([25, 80]), 200)) / VOXEL
    for i in (0, 1, 2, 3, 4, 5):
        one = coloured(1.0, excess[i], length[i], frequencies=2000).gain(k)[0]
        np.testing.assert_allclose(gains[i], one, rtol=5e-3)
    assert images["told"].settings["noise"][0] == pytest.approx(told.power[0, 0], rel=1e-3)
    assert images["coloured"].settings["noise"] == "coloured"
    with pytest.raises(InputError, match="noise must be 'white', 'coloured' or a Noise"):
        TrainingImages(DENSITY, p, noise="pink")


def test_an_estimator_reads_whitened_images():
    images, noise = in_noise(10.0, 1.0)
    stack = ParticleStack(images[:20], VOXEL, noise=noise)
    gain = stack.whitening()
    assert gain.shape == (BOX, BOX // 2 + 1) and stack.replace(noise=None).whitening() is None
    both = Noise(np.concatenate([noise.power, noise.power[:, ::-1]]))
    of_each = stack.replace(noise=both, optics_group=np.arange(20) % 2).whitening()
    np.testing.assert_allclose(of_each[::2], np.broadcast_to(gain, (10, *gain.shape)))
    assert (of_each[1] > of_each[0]).any()
    assert stack.replace(noise=Noise.white(2.0)).whitening() is None
    read = Job(None, False).images(stack)
    np.testing.assert_allclose(read, imaging.apply_ctf(images[:20], gain), rtol=1e-5)
