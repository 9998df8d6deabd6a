import numpy as np
import pytest
from measures import relative_error

from cryoem import fourier, imaging, rotations
from cryoem.errors import InputError

RANDOM = np.random.default_rng(0).standard_normal((3, 24, 24)).astype(np.float32)

# --------------------------------------------------------------------------------------
# Images


def test_images_are_single_precision_whatever_they_came_as():
    found = imaging.check_images(RANDOM.astype(float).tolist())
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, RANDOM)
    assert imaging.check_images(np.zeros((0, 8, 8))).shape == (0, 8, 8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (RANDOM[0], r"views must have shape \(n, size, size\), got \(24, 24\)"),
        (RANDOM[:, 1:], r"got \(3, 23, 24\)"),
        (np.where(np.arange(3)[:, None, None] > 0, np.nan, RANDOM), r"image 1 is not \(2 are not"),
        (np.where(np.arange(3)[:, None, None] > 1, np.inf, RANDOM), r"image 2 is not \(1 are not"),
    ],
)
def test_what_is_no_image_is_named(images, message):
    with pytest.raises(InputError, match=message):
        imaging.check_images(images, "views")


# --------------------------------------------------------------------------------------
# Grids


@pytest.mark.parametrize("n", [8, 9])
def test_the_radius_is_the_length_of_the_frequency(n):
    f = fourier.frequencies(n)
    np.testing.assert_array_equal(np.sort(f), np.arange(-(n // 2), n - n // 2))
    full = fourier.radius((n, n))
    np.testing.assert_allclose(full, np.hypot(f[:, None], f), atol=1e-12)
    # The half grid names its Nyquist frequency +n/2: the same length.
    np.testing.assert_allclose(fourier.radius((n, n), half=True), full[:, : n // 2 + 1], atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(8, 4), (8, 5), (9, 4), (9, 5), (8, 16), (9, 17), (7, 7)])
def test_cropping_undoes_padding(n, m):
    low, high = min(n, m), max(n, m)
    small = RANDOM[:, :low, :low]
    padded = fourier.crop_or_pad(small, (high, high))
    assert padded[0, high // 2, high // 2] == small[0, low // 2, low // 2]
    np.testing.assert_array_equal(fourier.crop_or_pad(padded, (low, low)), small)
    assert padded.sum() == pytest.approx(small.sum(), abs=1e-4)


@pytest.mark.parametrize(("n", "m"), [(24, 16), (24, 15), (23, 16), (23, 15), (16, 24), (15, 23)])
def test_resizing_a_wave_samples_it_anew(n, m):
    def wave(size):
        x = (np.arange(size) - size // 2) / size
        return 3 + np.cos(2 * np.pi * (2 * x[None, :] + 3 * x[:, None]) + 0.4)

    np.testing.assert_allclose(fourier.resize(wave(n)[None], m, 2)[0], wave(m), atol=1e-12)


def test_resizing_to_the_same_size_changes_nothing():
    np.testing.assert_array_equal(fourier.resize(RANDOM, 24, 2), RANDOM)


def test_resizing_a_rectangle_is_refused():
    with pytest.raises(InputError, match="equal"):
        fourier.resize(np.zeros((2, 8, 9)), 4, 2)


def test_a_sharp_low_pass_is_a_projection():
    once = fourier.low_pass(RANDOM, 2, 8)
    np.testing.assert_allclose(fourier.low_pass(once, 2, 8), once, atol=1e-5)
    power = np.abs(np.fft.fft2(once)) ** 2
    assert power[:, fourier.radius((24, 24)) >= 8].max() < 1e-8 * power.max()


# --------------------------------------------------------------------------------------
# Shifts


@pytest.mark.parametrize("box", [24, 25])
def test_a_whole_shift_is_a_roll(box):
    image = np.random.default_rng(1).standard_normal((1, box, box))
    smooth = fourier.low_pass(image, 2, box / 2)
    moved = imaging.shift(smooth, [[3.0, -2.0]])
    np.testing.assert_allclose(moved, np.roll(smooth, (-2, 3), axis=(1, 2)), atol=1e-12)


@pytest.mark.parametrize("box", [40, 41])
def test_a_sub_pixel_shift_is_a_shifted_particle(phantom, box):
    q = rotations.uniform(4, 2)
    shifts = np.array([[0.3, -1.7], [2.25, 0.5], [-0.1, 0.1], [0.0, 0.0]])
    moved = imaging.shift(phantom.project(q, box, 5.5), shifts)
    for i, (dx, dy) in enumerate(shifts):
        # Moving the density along the detector's axes moves its image.
        offset = 5.5 * rotations_apply(q[i], [dx, dy, 0])
        other = type(phantom)(
            phantom.centres_angstrom + offset, phantom.sigmas_angstrom, phantom.weights
        )
        # Blobs of 1.3 pixels: beyond Nyquist, and so wrongly moved, is less than 1e-3.
        assert relative_error(moved[i], other.project(q[i : i + 1], box, 5.5)[0]) < 1e-3


def rotations_apply(q, vector):
    from scipy.spatial.transform import Rotation

    return Rotation.from_quat(q).apply(vector)


def test_triangular_shifts_keep_their_law():
    shifts = imaging.triangular_shifts(20_000, 0, 4.0)
    assert shifts.shape == (20_000, 2)
    assert np.abs(shifts).max() <= 4.0
    # Variance a^2 / 6; four standard errors of it (kurtosis 2.4: sd 1.18 var / sqrt(n)).
    assert shifts.var() == pytest.approx(16 / 6, rel=4 * 1.18 / np.sqrt(40_000))
    assert (imaging.triangular_shifts(3, 0, 0) == 0).all()


# --------------------------------------------------------------------------------------
# Noise


@pytest.mark.parametrize("asked", [{"variance": 4.0}, {"snr": 0.25}])
def test_noise_has_the_variance_asked_for(asked):
    clean = np.random.default_rng(5).random((50, 24, 24)).astype(np.float32)
    noise = imaging.add_noise(clean, 3, **asked) - clean
    wanted = asked.get("variance") or float(clean.var()) / asked["snr"]
    # Four standard errors of a variance: sqrt(2 / n) each.
    tolerance = 4 * np.sqrt(2 / clean.size)
    assert noise.var() == pytest.approx(wanted, rel=tolerance)
    assert noise.mean() == pytest.approx(0, abs=4 * np.sqrt(wanted / clean.size))
    neighbours = np.mean(noise[:, :, 1:] * noise[:, :, :-1]) / wanted
    assert abs(neighbours) < 4 / np.sqrt(clean.size)


def test_noise_depends_on_its_seed_alone():
    a, b, c = (imaging.add_noise(RANDOM, seed, snr=1) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)


def test_infinite_snr_adds_nothing():
    np.testing.assert_array_equal(imaging.add_noise(RANDOM, 0, snr=np.inf), RANDOM)


@pytest.mark.parametrize(
    "asked", [{}, {"snr": 1, "variance": 1}, {"snr": 0}, {"snr": -1}, {"variance": -1}]
)
def test_senseless_noise_is_refused(asked):
    with pytest.raises(InputError):
        imaging.add_noise(RANDOM, 0, **asked)


@pytest.mark.parametrize(("box", "down"), [(64, 32), (63, 32), (64, 24)])
def test_down_sampling_divides_the_variance_of_white_noise(box, down):
    noise = np.random.default_rng(2).standard_normal((200, box, box)).astype(np.float32)
    small = imaging.downsample(noise, down)
    kept = np.sum(fourier.radius((down, down)) < down / 2) / down**2  # the disc below Nyquist
    expected = (down / box) ** 2 * kept
    assert small.var() == pytest.approx(expected, rel=4 * np.sqrt(2 / small.size / kept))


# --------------------------------------------------------------------------------------
# Normalisation and symmetries of the pixel grid


def test_normalised_images_have_mean_0_and_deviation_1():
    images = imaging.normalise(5 + 3 * RANDOM)
    np.testing.assert_allclose(images.mean(axis=(1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(images.std(axis=(1, 2)), 1, atol=1e-5)


def test_the_background_is_normalised_as_relion_does():
    images = 5 + 3 * RANDOM
    images[:, 10:15, 10:15] += 100  # a particle that the background must not see
    images = imaging.normalise(images, radius_px=8)
    axis = np.arange(24) - 12
    outside = np.hypot(axis[:, None], axis) > 8
    np.testing.assert_allclose(images[:, outside].mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(images[:, outside].std(axis=1), 1, atol=1e-5)


def test_a_constant_image_becomes_zero():
    assert (imaging.normalise(np.full((1, 8, 8), 3.0)) == 0).all()


def test_a_circle_beyond_the_frame_leaves_no_background():
    with pytest.raises(InputError, match="no background"):
        imaging.normalise(RANDOM, radius_px=100)


def test_flipping_contrast_twice_is_nothing():
    np.testing.assert_array_equal(imaging.flip_contrast(imaging.flip_contrast(RANDOM)), RANDOM)
    assert imaging.flip_contrast(RANDOM)[0, 0, 0] == -RANDOM[0, 0, 0]


@pytest.mark.parametrize("box", [40, 41])
def test_a_quarter_turn_is_the_particle_turned(phantom, box):
    q = rotations.uniform(3, 7)
    turned = imaging.quarter_turn(phantom.project(q, box, 5.5))
    expected = phantom.project(rotations.in_plane(q, np.pi / 2), box, 5.5)
    # Exact, but for the even box's outermost line, where the phantom is 1e-7.
    np.testing.assert_allclose(turned, expected, atol=1e-5 * expected.max())


@pytest.mark.parametrize("box", [40, 41])
def test_a_mirrored_image_is_the_view_from_behind(phantom, box):
    q = rotations.uniform(3, 7)
    flipped = imaging.mirror(phantom.project(q, box, 5.5))
    expected = phantom.project(rotations.mirror_x(q), box, 5.5)
    np.testing.assert_allclose(flipped, expected, atol=1e-5 * expected.max())


@pytest.mark.parametrize("box", [24, 23])
def test_pixels_turn_and_flip_about_the_origin_pixel(box):
    image = np.zeros((1, box, box))
    image[0, box // 2, box // 2] = 1
    np.testing.assert_array_equal(imaging.quarter_turn(image), image)
    np.testing.assert_array_equal(imaging.mirror(image), image)
    images = RANDOM[:, :box, :box]
    four = images
    for _ in range(4):
        four = imaging.quarter_turn(four)
    np.testing.assert_array_equal(four, images)
    np.testing.assert_array_equal(imaging.mirror(imaging.mirror(images)), images)


# --------------------------------------------------------------------------------------
# Contrast transfer function

BOX, PIXEL = 64, 2.0


def k_and_theta(box=BOX, pixel=PIXEL):
    kx = np.fft.rfftfreq(box, pixel)[None, :]
    ky = np.fft.fftfreq(box, pixel)[:, None]
    return np.hypot(kx, ky), np.arctan2(ky, kx)


@pytest.mark.parametrize(("voltage", "wavelength"), [(300, 0.01969), (200, 0.02508), (100, 0.0370)])
def test_electrons_have_their_wavelength(voltage, wavelength):
    assert imaging.wavelength_angstrom(voltage) == pytest.approx(wavelength, rel=1e-3)


@pytest.mark.parametrize("w", [0.07, 0.1])
def test_without_frequency_only_amplitude_contrast_is_left(w):
    # -sin(-atan(w / sqrt(1 - w^2))) = w, RELION's sign: particles white on black.
    found = imaging.ctf(BOX, PIXEL, 15_000, amplitude_contrast=w)[0, 0, 0]
    assert found == pytest.approx(w, rel=1e-6)


def test_underfocus_starts_positive_and_first_vanishes_where_it_should():
    # Without aberration and amplitude contrast: sin(pi lambda dF k^2), zero at k^2 = 1/(lambda dF).
    defocus, k = 15_000.0, k_and_theta()[0][0]
    curve = imaging.ctf(BOX, PIXEL, defocus, spherical_aberration_mm=0, amplitude_contrast=0)[0, 0]
    first = 1 / np.sqrt(imaging.wavelength_angstrom(300) * defocus)
    assert (curve[(k > 0) & (k < first)] > 0).all()
    assert (curve[(k > first) & (k < first * np.sqrt(2))] < 0).all()
    np.testing.assert_allclose(curve, np.sin(np.pi * (k / first) ** 2), atol=1e-5)


def test_spherical_aberration_works_against_underfocus():
    # At k^2 = 2 dF / (Cs lambda^2) the two phases cancel: choose dF so that it is Nyquist.
    wavelength, nyquist = imaging.wavelength_angstrom(300), 1 / (2 * PIXEL)
    defocus = 2.7e7 * wavelength**2 * nyquist**2 / 2
    curve = imaging.ctf(BOX, PIXEL, defocus, amplitude_contrast=0)[0, 0]
    assert curve[-1] == pytest.approx(0, abs=1e-5)
    assert curve[BOX // 4] > 0


def test_along_the_astigmatic_angle_the_defocus_is_u():
    u, v, angle = 20_000.0, 12_000.0, 30.0
    astigmatic = imaging.ctf(BOX, PIXEL, u, v, angle)[0]
    _, theta = k_and_theta()
    along = np.isclose(theta, np.deg2rad(angle), atol=5e-3)
    across = np.isclose(theta, np.deg2rad(angle - 90), atol=5e-3)
    at_u, at_v = imaging.ctf(BOX, PIXEL, [u, v])
    assert along.sum() > 1 and across.sum() > 1
    # The grid meets the angle to 5e-3 rad: the defocus is then within 1e-4 of it.
    np.testing.assert_allclose(astigmatic[along], at_u[along], atol=0.02)
    np.testing.assert_allclose(astigmatic[across], at_v[across], atol=0.02)
    assert np.abs(astigmatic[along] - at_v[along]).max() > 0.2


def test_the_envelope_is_a_b_factor():
    k, _ = k_and_theta()
    plain = imaging.ctf(BOX, PIXEL, 15_000)
    damped = imaging.ctf(BOX, PIXEL, 15_000, b_factor_angstrom2=80.0)
    np.testing.assert_allclose(damped[0], plain[0] * np.exp(-80 * k**2 / 4), atol=1e-6)


def test_a_phase_plate_turns_sine_into_cosine():
    k = k_and_theta()[0][0]
    options = {"spherical_aberration_mm": 0, "amplitude_contrast": 0, "phase_shift_degrees": 90}
    found = imaging.ctf(BOX, PIXEL, 10_000, **options)[0, 0]
    wavelength = imaging.wavelength_angstrom(300)
    np.testing.assert_allclose(found, np.cos(np.pi * wavelength * 1e4 * k**2), atol=1e-5)


def test_each_image_has_its_own_ctf():
    together = imaging.ctf(BOX, PIXEL, [1e4, 2e4], [1.1e4, 2e4], [10, 0], voltage_kv=[300, 200])
    alone = imaging.ctf(BOX, PIXEL, 2e4, 2e4, 0, voltage_kv=200)
    assert together.shape == (2, BOX, BOX // 2 + 1) and together.dtype == np.float32
    np.testing.assert_array_equal(together[1], alone[0])


@pytest.mark.parametrize("more", [{}, {"even_zernike": (0.1, 0.2, 0, 0.3, 0, 0, -0.2)}])
@pytest.mark.parametrize("v", [1e4, 1.2e4])
def test_a_ctf_at_some_frequencies_is_that_of_all(v, more):
    options = {"b_factor_angstrom2": [0.0, 50.0], "phase_shift_degrees": 20.0, **more}
    all_of_it = imaging.ctf(BOX, PIXEL, [1e4, 2e4], [v, 2e4], [10, 0], **options)
    at = np.array([0, 3, BOX - 1]), np.array([2, 0, BOX // 2])
    some = imaging.ctf(BOX, PIXEL, [1e4, 2e4], [v, 2e4], [10, 0], **options, at=at)
    np.testing.assert_allclose(some, all_of_it[:, *at], atol=1e-6)


@pytest.mark.parametrize("box", [24, 25])
def test_a_ctf_of_one_changes_nothing_and_of_minus_one_flips(box):
    images = np.random.default_rng(0).standard_normal((2, box, box)).astype(np.float32)
    ones = np.ones((1, box, box // 2 + 1))
    np.testing.assert_allclose(imaging.apply_ctf(images, ones), images, atol=1e-5)
    np.testing.assert_allclose(imaging.apply_ctf(images, -ones), -images, atol=1e-5)


def test_a_round_ctf_does_not_move_the_particle():
    image = np.zeros((1, 24, 24), np.float32)
    image[0, 12, 12] = 1
    spread = imaging.apply_ctf(image, imaging.ctf(24, 4.0, 15_000))
    np.testing.assert_allclose(imaging.mirror(spread), spread, atol=1e-6)
    np.testing.assert_allclose(imaging.quarter_turn(spread), spread, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 24, 24), (3, 24, 12), (3, 13, 24)])
def test_a_ctf_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(InputError, match=r"\(n, 24, 13\)"):
        imaging.apply_ctf(RANDOM, np.ones(shape))


@pytest.mark.parametrize("size", [31, 32])
def test_level_and_ramp_of_a_background_are_taken_off(size):
    x = (np.arange(size) - size // 2) / size
    middle = np.hypot(x, x[:, None]) < 0.3
    rng = np.random.default_rng(0)
    planes = rng.uniform(-5, 5, (6, 3))
    inside = rng.standard_normal((6, size, size)) * middle
    ramp = planes[:, 0, None, None] + planes[:, 1, None, None] * x
    uneven = inside + ramp + planes[:, 2, None, None] * x[:, None]
    np.testing.assert_allclose(imaging.background_planes(uneven), planes, atol=1e-5)
    np.testing.assert_allclose(imaging.flatten(uneven), inside, atol=1e-5)
