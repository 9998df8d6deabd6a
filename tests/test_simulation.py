import numpy as np
import pytest
from measures import relative_error
from scipy import stats

from cryoem import Preprocessing, TrainingImages, imaging, rotations, simulate
from cryoem.errors import InputError
from cryoem.symmetry import group

VOXEL = 5.5


def orientations(targets):
    """Training targets hold the features of the orientation and the shift."""
    return group("C1").decode(targets[:, :10])


@pytest.fixture(scope="module")
def density(phantom):
    return phantom.density(48, VOXEL * 40 / 48)


# --------------------------------------------------------------------------------------
# Test images


def test_particles_are_the_phantom_at_their_orientations(phantom, density):
    made = simulate(density, 5, 1)
    expected = phantom.project(made.quaternions, 48, density.voxel_size_angstrom)
    assert relative_error(made.images, expected) < 1e-2
    assert made.noise is None and made.ctf_parameters is None
    assert made.pixel_size_angstrom == density.voxel_size_angstrom


def test_particles_have_the_snr_asked_for(density):
    clean = simulate(density, 40, 1)
    noisy = simulate(density, 40, 1, snr=0.1)
    noise = noisy.images - clean.images
    np.testing.assert_array_equal(noisy.quaternions, clean.quaternions)
    tolerance = 4 * np.sqrt(2 / noise.size)
    assert noise.var() == pytest.approx(noisy.noise.variance, rel=tolerance)
    assert clean.images.var() / noise.var() == pytest.approx(0.1, rel=tolerance)


def test_undoing_the_shifts_centres_the_particles(density):
    centred = simulate(density, 5, 1)
    moved = simulate(density, 5, 1, max_shift_px=4.0)
    assert np.abs(moved.shifts_px).max() > 1
    np.testing.assert_array_equal(moved.quaternions, centred.quaternions)
    assert relative_error(imaging.shift(moved.images, -moved.shifts_px), centred.images) < 1e-4


def test_particles_depend_on_their_seed_alone(density):
    a, b, c = (simulate(density, 3, seed, snr=1).images for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)


def test_particles_keep_their_coverage(density):
    made = simulate(density, 30, 0, coverage="half")
    assert (rotations.view_directions(made.quaternions)[:, 2] >= 0).all()


# --------------------------------------------------------------------------------------
# Preprocessing


@pytest.mark.parametrize("sizes", [(32, 16, 1), (32, 16, 17), (32, 33, 16), (16, 32, 8)])
def test_preprocessing_cannot_enlarge(sizes):
    with pytest.raises(InputError, match="crop_px <= down_px <= frame_px"):
        Preprocessing(*sizes, 1.0)


def test_prepared_images_are_small_and_normalised():
    prepare = Preprocessing(48, 24, 20, 4.6)
    images = prepare(np.random.default_rng(0).random((3, 48, 48)))
    assert images.shape == (3, 20, 20) and images.dtype == np.float32
    np.testing.assert_allclose(images.mean(axis=(1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(images.std(axis=(1, 2)), 1, atol=1e-5)
    assert prepare(np.zeros((0, 48, 48))).shape == (0, 20, 20)


def test_images_of_another_box_are_refused():
    with pytest.raises(InputError, match=r"48 px.*got 40 px"):
        Preprocessing(48, 24, 20, 4.6)(np.zeros((3, 40, 40)))


# --------------------------------------------------------------------------------------
# Training images come by another path and must be the same


@pytest.mark.parametrize("sizes", [(48, 24, 24), (48, 32, 28), (48, 48, 48)])
def test_clean_training_images_are_prepared_test_images(phantom, density, sizes):
    prepare = Preprocessing(*sizes, density.voxel_size_angstrom)
    source = TrainingImages(density, prepare, clean_fraction=1.0)
    images, targets = source.batch(3, 0, 12)
    q = orientations(targets)
    exact = phantom.project(q, 48, density.voxel_size_angstrom)
    # The coarse path crops the density instead of the image and interpolates on a finer grid.
    assert relative_error(images, prepare(exact)) < 3e-2


def test_centred_training_images_are_not_shifted(density):
    prepare = Preprocessing(48, 24, 20, density.voxel_size_angstrom)
    shifted = TrainingImages(density, prepare, clean_fraction=1.0, max_shift_px=6.0)
    centred = shifted.centred()
    assert shifted.max_shift_px == 6 and shifted.settings["max_shift_px"] == 6
    direct = TrainingImages(density, prepare, clean_fraction=1.0)
    assert centred.settings == direct.settings
    for found, expected in zip(centred.batch(1, 2, 8), direct.batch(1, 2, 8), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_shifted_training_images_are_shifted_by_what_the_frame_says(phantom, density):
    prepare = Preprocessing(48, 24, 24, density.voxel_size_angstrom)
    source = TrainingImages(density, prepare, clean_fraction=1.0, max_shift_px=6.0)
    images, targets = source.batch(3, 0, 200)
    still = prepare(phantom.project(orientations(targets), 48, density.voxel_size_angstrom))
    positive = np.maximum(images - images.min(axis=(1, 2), keepdims=True), 0) ** 4
    base = np.maximum(still - still.min(axis=(1, 2), keepdims=True), 0) ** 4
    axis = np.arange(24) - 12

    def centre(x):
        return (x * axis).sum(axis=(1, 2)) / x.sum(axis=(1, 2))

    def centre_y(x):
        return centre(x.swapaxes(1, 2))

    moved = np.stack([centre(positive) - centre(base), centre_y(positive) - centre_y(base)], axis=1)
    told = targets[:, -2:]
    np.testing.assert_allclose(moved, told, atol=0.35)
    # Half triangular within 6 px of the frame, 3 px of these; half within 2 % of the frame.
    variance = (3**2 + 0.48**2) / 6 / 2
    assert told.std() == pytest.approx(np.sqrt(variance), rel=0.15)
    assert np.abs(told).max() < 3
    few = TrainingImages(
        density, prepare, clean_fraction=1.0, max_shift_px=6.0, shifted_fraction=0.1
    )
    told = few.batch(3, 0, 400)[1][:, -2:]
    variance = 0.1 * 3**2 / 6 + 0.9 * 0.48**2 / 6
    assert told.std() == pytest.approx(np.sqrt(variance), rel=0.2)


def test_a_ctf_leaves_its_absolute_value(phantom, density):
    prepare = Preprocessing(48, 24, 24, density.voxel_size_angstrom)
    source = TrainingImages(
        density, prepare, clean_fraction=1.0, defocus_range_angstrom=(6e4, 6e4), ctf_fraction=1
    )
    images, targets = source.batch(3, 0, 12)
    values = imaging.ctf(48, density.voxel_size_angstrom, 6e4)
    exact = phantom.project(orientations(targets), 48, density.voxel_size_angstrom)
    seen = imaging.apply_ctf(exact, values)
    prepared = prepare(seen, ctf=np.repeat(values, 12, axis=0))
    assert relative_error(images, prepared) < 5e-2
    assert relative_error(images, prepare(seen)) > 0.2  # phases that were not flipped


def test_particles_with_a_defocus_carry_their_ctf(density):
    plain = simulate(density, 5, 3)
    made = simulate(density, 5, 3, defocus_range_angstrom=(8e3, 25e3))
    defocus = made.ctf_parameters.defocus_u_angstrom
    assert ((defocus >= 8e3) & (defocus <= 25e3)).all() and np.ptp(defocus) > 1e3
    np.testing.assert_array_equal(made.ctf_parameters.defocus_v_angstrom, defocus)
    np.testing.assert_array_equal(made.quaternions, plain.quaternions)
    np.testing.assert_allclose(
        made.images, imaging.apply_ctf(plain.images, made.ctf()), atol=1e-5 * plain.images.max()
    )
    assert plain.ctf() is None


def test_noise_is_measured_against_images_with_their_ctf(density):
    # Which takes most of their variance: amplitude contrast alone shows what is large.
    plain = simulate(density, 40, 3)
    clean = simulate(density, 40, 3, defocus_range_angstrom=(8e3, 25e3))
    noisy = simulate(density, 40, 3, defocus_range_angstrom=(8e3, 25e3), snr=0.5)
    assert clean.images.var() < 0.5 * plain.images.var()
    assert noisy.noise.variance == pytest.approx(clean.images.var() / 0.5, rel=1e-5)
    noise = noisy.images - clean.images
    assert noise.var() == pytest.approx(noisy.noise.variance, rel=4 * np.sqrt(2 / noise.size))


@pytest.mark.parametrize("limits", [(25e3, 8e3), (np.nan, 1e4), (0, np.inf)])
def test_a_range_of_defocus_goes_upwards(density, limits):
    prepare = Preprocessing(48, 24, 24, density.voxel_size_angstrom)
    for make in (
        lambda **options: simulate(density, 2, 0, **options),
        lambda **options: TrainingImages(density, prepare, **options),
    ):
        with pytest.raises(InputError, match=r"defocus_range_angstrom must be \(low, high\)"):
            make(defocus_range_angstrom=limits)


@pytest.mark.parametrize("ctf_fraction", [1.0, 0.5])
def test_training_noise_is_that_of_images_with_their_ctf_too(density, ctf_fraction):
    # How much of a prepared image is signal, by its correlation with the clean one.
    def share(clean, noisy):
        return 1 / np.mean(clean * noisy, axis=(1, 2)).mean() ** 2 - 1

    n, limits = 300, (1e4, 2e4)
    prepare = Preprocessing(48, 24, 24, density.voxel_size_angstrom)
    seen = {"defocus_range_angstrom": limits, "ctf_fraction": ctf_fraction}
    clean, noisy = (
        TrainingImages(density, prepare, snr_range=(0.3, 0.3), clean_fraction=c, **seen)
        for c in (1.0, 0.0)
    )
    a, b = clean.batch(5, 0, n)[0], noisy.batch(5, 0, n)[0]
    bare = TrainingImages(density, prepare, clean_fraction=1.0, defocus_range_angstrom=limits,
                          ctf_fraction=0.0).batch(5, 0, n)[0]  # fmt: skip
    untouched = np.abs(a - bare).max(axis=(1, 2)) < 1e-3
    assert untouched.mean() == pytest.approx(1 - ctf_fraction, abs=0.12)
    for these, given in ((~untouched, {"defocus_range_angstrom": limits}), (untouched, {})):
        if these.any():
            made = simulate(density, n, 5, snr=0.3, **given)
            still = simulate(density, n, 5, **given)
            tested = share(*(prepare(s.images, ctf=s.ctf()) for s in (still, made)))
            assert share(a[these], b[these]) == pytest.approx(tested, rel=0.12)


@pytest.mark.parametrize("sizes", [(48, 24, 24), (48, 32, 28)])
def test_training_noise_is_prepared_test_noise(density, sizes):
    # At SNR 1/1000 images are noise; compare how their normalised signal has shrunk.
    prepare = Preprocessing(*sizes, density.voxel_size_angstrom)
    clean = TrainingImages(density, prepare, clean_fraction=1.0)
    noisy = TrainingImages(density, prepare, clean_fraction=0.0, snr_range=(0.1, 0.1))
    n = 300
    a, q = clean.batch(5, 0, n)
    b, same = noisy.batch(5, 0, n)
    np.testing.assert_array_equal(q[:, :10], same[:, :10])
    assert (q[:, 10] == 0).all() and same[:, 10] == pytest.approx(10)
    made = simulate(density, n, 5)
    tested = prepare(imaging.add_noise(made.images, 0, snr=0.1))
    still = prepare(made.images)
    trained_share = np.mean(a * b)  # correlation with the clean image: sqrt(S / (S + N))
    tested_share = np.mean(still * tested)
    ratio = (1 / trained_share**2 - 1) / (1 / tested_share**2 - 1)
    # Signal variance is averaged over 64 views here and 300 there: a few percent.
    assert ratio == pytest.approx(1, abs=0.06)
    spectrum = [np.mean(np.abs(np.fft.fft2(x)) ** 2, axis=0) for x in (b, tested)]
    assert relative_error(*spectrum) < 0.1


def test_a_batch_depends_on_seed_and_step_alone(source):
    a, q = source.batch(1, 7, 16)
    source.batch(1, 8, 4)
    again, q_again = source.batch(1, 7, 16)
    np.testing.assert_array_equal(a, again)
    np.testing.assert_array_equal(q, q_again)
    for other in ((1, 8), (2, 7)):
        assert not np.allclose(source.batch(*other, 16)[1], q)


def test_some_images_are_clean(density):
    prepare = Preprocessing(48, 24, 24, density.voxel_size_angstrom)
    mixed = TrainingImages(density, prepare, clean_fraction=0.3, snr_range=(1e-3, 1e-3))
    clean = TrainingImages(density, prepare, clean_fraction=1.0)
    share = np.mean(mixed.batch(0, 0, 400)[0] * clean.batch(0, 0, 400)[0], axis=(1, 2))
    assert np.mean(share > 0.99) == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / 400))


def test_all_pairs_follow_the_haar_law_and_uniform_pairs_the_flat_one(source):
    q = orientations(source.batch(0, 0, 4000, pairs="all")[1])
    d = rotations.distance(q[::2], q[1::2])
    assert stats.kstest(d, lambda t: (t - np.sin(t)) / np.pi).pvalue > 1e-3
    q = orientations(source.batch(0, 0, 4000, pairs="uniform")[1])
    d = rotations.distance(q[::2], q[1::2])
    assert stats.kstest(d, "uniform", args=(0, np.pi)).pvalue > 1e-3


def test_sources_that_cannot_be_are_refused(phantom, source):
    with pytest.raises(InputError, match="32 voxels, the frame 48"):
        TrainingImages(phantom.density(32, 7.0), Preprocessing(48, 24, 24, 4.6))
    with pytest.raises(InputError, match="voxels of the images' 8 A, got 7 A"):
        TrainingImages(phantom.density(32, 7.0), Preprocessing(32, 16, 16, 8.0))
    with pytest.raises(InputError, match="whole"):
        TrainingImages(phantom.density(32, 7.0), Preprocessing(32, 20, 16, 7.0))
    with pytest.raises(InputError, match="'all' or 'uniform'"):
        source.batch(0, 0, 4, pairs="some")
