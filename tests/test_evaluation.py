import numpy as np
import pytest
from measures import gauss_newton, relative_error

from cryoem import evaluation, rotations
from cryoem.density import Density
from cryoem.errors import InputError
from cryoem.projection import project
from cryoem.symmetry import group

TRUE = rotations.uniform(100, 0)
NOISE = np.random.default_rng(1).normal(0, 0.05, (100, 3))
A, B = rotations.uniform(2, 3)
ONE = np.array([0, 0, 0, 1.0])


def moved(q, *, left=ONE, right=ONE, inverted=False):
    q = rotations.inverse(q) if inverted else q
    return rotations.multiply(rotations.multiply(left, q), right)


# --------------------------------------------------------------------------------------
# Alignment


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("n", [5, 20, 100])
def test_everything_that_distances_leave_open_is_found(inverted, n):
    estimated = moved(TRUE[:n], left=A, right=B, inverted=inverted)
    found = evaluation.align(estimated, TRUE[:n], over="o4")
    assert rotations.distance(found.quaternions, TRUE[:n]).max() < 1e-7
    assert found.inverted == inverted
    # What is reported is what was done.
    again = moved(estimated, left=found.left, right=found.right, inverted=found.inverted)
    assert rotations.distance(again, found.quaternions).max() < 1e-7


@pytest.mark.parametrize("over", ["o4", "rotations"])
def test_the_alignment_minimises_the_mean_angle(over):
    estimated = moved(rotations.perturb(TRUE, NOISE), left=A, right=B)
    found = evaluation.align(estimated, TRUE, over=over)
    best = rotations.distance(found.quaternions, TRUE).mean()
    assert best <= np.linalg.norm(NOISE, axis=1).mean() + 1e-6
    for seed in range(20):
        a, b = np.random.default_rng(seed).normal(0, 0.01, (2, 3))
        nudged = rotations.perturb(rotations.perturb(found.quaternions, b[None]), a[None])
        # The weights round off the mean angle below 1e-3 rad.
        assert rotations.distance(nudged, TRUE).mean() > best - 1e-5


def test_the_sign_of_a_quaternion_does_not_matter():
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (100, 1))
    estimated = signs * moved(TRUE, left=A, right=B)
    assert evaluation.orientation_errors(estimated, TRUE, over="o4").mean_rad < 1e-7


def test_outliers_do_not_move_the_alignment():
    estimated = moved(rotations.perturb(TRUE, NOISE / 10), left=A, right=B)
    estimated[:20] = rotations.uniform(20, 9)
    assert evaluation.orientation_errors(estimated, TRUE, over="o4").median_rad < 0.02


@pytest.mark.parametrize("hand", [False, True])
def test_the_one_sided_error_forgives_the_density_and_its_hand(hand):
    estimated = moved(rotations.other_hand(TRUE) if hand else TRUE, left=A)
    assert evaluation.orientation_errors(estimated, TRUE, over="one-sided").mean_rad < 1e-7


@pytest.mark.parametrize("change", [{"right": rotations.about("x", np.pi)}, {"inverted": True}])
def test_the_one_sided_error_forgives_nothing_else(change):
    assert evaluation.orientation_errors(moved(TRUE, **change), TRUE, over="one-sided").mean_rad > 1
    assert evaluation.orientation_errors(moved(TRUE, **change), TRUE, over="o4").mean_rad < 1e-7


def test_rotations_do_not_invert():
    found = evaluation.align(moved(TRUE, inverted=True), TRUE, over="rotations")
    assert not found.inverted and rotations.distance(found.quaternions, TRUE).mean() > 1


def test_nothing_is_fitted_where_nothing_is_asked():
    estimated = rotations.perturb(TRUE, np.full((100, 3), 0.1))
    found = evaluation.align(estimated, TRUE, over="none")
    np.testing.assert_allclose(found.quaternions, estimated, atol=1e-15)
    error = evaluation.orientation_errors(estimated, TRUE, over="none")
    assert error.mean_rad == pytest.approx(0.1 * np.sqrt(3), abs=1e-12)


def test_one_image_is_aligned_perfectly():
    for over in ("o4", "rotations", "one-sided"):
        assert evaluation.orientation_errors(TRUE[:1], TRUE[5:6], over=over).mean_rad < 1e-6


@pytest.mark.parametrize(
    ("estimated", "over", "message"),
    [
        (TRUE[:5], "o4", "as many"),
        (TRUE[:0], "o4", "as many"),
        (TRUE, "o3", "'o4', 'rotations'"),
        (TRUE[:, :3], "o4", r"estimated must have shape \(n, 4\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(estimated, over, message):
    with pytest.raises(InputError, match=message):
        evaluation.align(estimated, TRUE, over=over)


# --------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("angle", [0.2, 3.0])
def test_an_in_plane_turn_is_no_error_of_view(angle):
    error = evaluation.orientation_errors(rotations.in_plane(TRUE, angle), TRUE, over="none")
    assert error.view_mean_rad == pytest.approx(0, abs=1e-7)
    assert error.in_plane_mean_rad == pytest.approx(angle, abs=1e-7)


@pytest.mark.parametrize("angle", [0.2, 3.0])
@pytest.mark.parametrize("axis", [[1, 0, 0], [0, 1, 0], [0.6, -0.8, 0]])
def test_a_tilt_is_no_error_in_the_plane(angle, axis):
    tilted = rotations.perturb(TRUE, np.tile(angle * np.array(axis), (100, 1)))
    error = evaluation.orientation_errors(tilted, TRUE, over="none")
    assert error.in_plane_mean_rad == pytest.approx(0, abs=1e-7)
    assert error.view_mean_rad == pytest.approx(angle, abs=1e-7)


def test_the_view_error_is_the_angle_between_views():
    other = rotations.uniform(100, 8)
    cosine = np.sum(rotations.view_directions(other) * rotations.view_directions(TRUE), axis=1)
    error = evaluation.orientation_errors(other, TRUE, over="none")
    assert error.view_mean_rad == pytest.approx(np.arccos(cosine).mean(), abs=1e-9)


def test_summaries_are_those_of_the_angles():
    angles = np.linspace(0, 1, 101)[1:]
    found = evaluation.orientation_errors(
        rotations.perturb(TRUE, angles[:, None] * np.eye(3)[:1]), TRUE, over="none"
    )
    assert found.mean_rad == pytest.approx(angles.mean(), abs=1e-12)
    assert found.median_rad == pytest.approx(np.median(angles), abs=1e-12)
    assert found.p95_rad == pytest.approx(np.percentile(angles, 95), abs=1e-12)
    assert found.far_fraction == pytest.approx(0.7, abs=0.011)
    assert found.degrees["mean_degrees"] == pytest.approx(np.rad2deg(angles.mean()))
    assert set(found.degrees) == {
        f"{name}_degrees" for name in ("mean", "median", "p95", "view_mean", "in_plane_mean")
    }


@pytest.mark.parametrize(("n", "degrees"), [(50, 104), (150, 115)])
def test_random_orientations_score_the_random_zero(n, degrees):
    true = rotations.uniform(n, 4)
    zeros = [np.rad2deg(evaluation.random_error(true, s, over="o4")) for s in range(10, 18)]
    # Measured by others (method.md) to a degree; one draw scatters by about three.
    assert np.mean(zeros) == pytest.approx(degrees, abs=3)


def test_chance_does_not_know_the_truth():
    # The truth may have been drawn by the same function from the same seed.
    assert evaluation.random_error(rotations.uniform(100, 3), 3) > 1


def test_the_more_is_fitted_the_smaller_the_random_zero():
    o4, rotation, nothing = (
        evaluation.orientation_errors(rotations.uniform(100, 9), TRUE, over=over).mean_rad
        for over in ("o4", "one-sided", "none")
    )
    assert o4 < rotation < nothing


# --------------------------------------------------------------------------------------
# The mean length of a Gaussian vector


def test_the_mean_length_of_an_isotropic_vector_is_maxwells():
    for sigma in (1e-3, 0.1, 5.0):
        found = evaluation.mean_error_of(sigma**2 * np.eye(3)[None])
        # A trapezoid over an analytic integrand: 1e-6 with room.
        assert found[0] == pytest.approx(2 * np.sqrt(2 / np.pi) * sigma, rel=1e-6)


def test_the_mean_length_of_a_number_is_the_half_normals():
    flat = np.diag([0.04, 0, 0])[None]
    assert evaluation.mean_error_of(flat)[0] == pytest.approx(0.2 * np.sqrt(2 / np.pi), rel=1e-4)
    assert evaluation.mean_error_of(np.zeros((1, 3, 3)))[0] == 0


def test_the_mean_length_agrees_with_chance():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((3, 3, 3)) * [1, 0.3, 0.1]
    covariances = root @ root.transpose(0, 2, 1)
    draws = np.einsum("nij,mj->nmi", root, rng.standard_normal((400_000, 3)))
    expected = np.linalg.norm(draws, axis=2).mean(axis=1)
    # Half a standard error of 400,000 draws is 6e-4.
    np.testing.assert_allclose(evaluation.mean_error_of(covariances), expected, rtol=5e-3)


# --------------------------------------------------------------------------------------
# The physical limit


def test_an_efficient_estimate_attains_the_bound(phantom):
    # Images from the exact phantom, orientations by least squares from the truth onwards.
    n, voxel = 240, 6.5
    density = phantom.density(34, voxel)
    true = rotations.uniform(n, 5)
    clean = phantom.project(true, 34, voxel)
    variance = clean.var() / 0.25
    rng = np.random.default_rng(6)
    noisy = clean + rng.normal(0, np.sqrt(variance), clean.shape)
    found = gauss_newton(noisy, density, true, 4)
    covariances = evaluation.cramer_rao(density, true, variance)
    bound = evaluation.mean_error_of(covariances).mean()
    # 240 lengths, each scattering by about half of its mean: 3 % standard error.
    error = evaluation.orientation_errors(found, true, over="none").mean_rad
    assert error == pytest.approx(bound, rel=0.1)
    # And direction by direction: chi squared with 3 n degrees of freedom.
    ratio = rotations.multiply(rotations.inverse(true), found)
    w = 2 * ratio[:, :3] * np.sign(ratio[:, 3:])
    chi2 = np.einsum("na,nab,nb->", w, np.linalg.inv(covariances), w)
    assert chi2 / (3 * n) == pytest.approx(1, abs=4 * np.sqrt(2 / (3 * n)))


def test_the_bound_is_proportional_to_the_noise(phantom):
    density = phantom.density(24, 9.0)
    one, four = (evaluation.cramer_rao(density, TRUE[:5], v) for v in (1.0, 4.0))
    np.testing.assert_allclose(four, 4 * one, rtol=1e-5)
    np.testing.assert_allclose(
        evaluation.mean_error_of(four), 2 * evaluation.mean_error_of(one), rtol=1e-5
    )
    brighter = Density(3 * density.values, density.voxel_size_angstrom)
    # The NUFFT is asked for 1e-4.
    assert relative_error(evaluation.cramer_rao(brighter, TRUE[:5], 9.0), one) < 1e-3


def test_a_bound_is_a_covariance(phantom):
    bound = evaluation.cramer_rao(phantom.density(24, 9.0), TRUE[:5], 1.0)
    np.testing.assert_allclose(bound, bound.transpose(0, 2, 1), rtol=1e-9)
    assert (np.linalg.eigvalsh(bound) > 0).all()


def test_an_in_plane_turn_of_the_frame_turns_the_bound(phantom):
    # Turning an image keeps its information: x and y components of the rotation change places.
    density = phantom.density(32, 7.0)
    q = TRUE[:5]
    straight = evaluation.cramer_rao(density, q, 1.0)
    turned = evaluation.cramer_rao(density, rotations.in_plane(q, np.pi / 2), 1.0)
    np.testing.assert_allclose(turned[:, 0, 0], straight[:, 1, 1], rtol=2e-2)
    np.testing.assert_allclose(turned[:, 2, 2], straight[:, 2, 2], rtol=2e-2)


def test_down_sampling_noise_and_all_keeps_the_bound(phantom):
    density = phantom.density(64, 3.4)
    full = evaluation.mean_error_of(evaluation.cramer_rao(density, TRUE[:5], 1.0))
    # White noise of half the pixels has a quarter of the variance; no signal is lost here.
    small = evaluation.mean_error_of(evaluation.cramer_rao(density, TRUE[:5], 0.25, box_px=32))
    np.testing.assert_allclose(small, full, rtol=2e-2)


def test_the_gradients_are_those_of_the_images(phantom):
    density = phantom.density(32, 7.0)
    inverse = np.linalg.inv(evaluation.cramer_rao(density, TRUE[:3], 1.0))
    step = np.tile([0.02, 0, 0], (3, 1))
    change = project(density, rotations.perturb(TRUE[:3], step)) - project(density, TRUE[:3])
    # A one-sided difference of 0.02 rad: a few percent.
    np.testing.assert_allclose(
        np.sum(change.astype(float) ** 2, axis=(1, 2)) / 0.02**2, inverse[:, 0, 0], rtol=0.1
    )


@pytest.mark.parametrize("variance", [0.0, -1.0, np.nan])
def test_a_bound_without_noise_is_refused(phantom, variance):
    with pytest.raises(InputError, match="positive"):
        evaluation.cramer_rao(phantom.density(16, 14.0), TRUE[:2], variance)


@pytest.mark.parametrize("symmetry", ["C2", "D2", "D3", "O"])
def test_errors_of_a_symmetric_particle_are_those_of_orbits(symmetry):
    orbit = group(symmetry)
    rng = rotations.generator(0, "test of orbits")
    p = rotations.uniform(300, rng)
    tilt = 0.05 * rng.standard_normal((300, 3))
    q = rotations.perturb(p, tilt)
    q = rotations.multiply(orbit.elements[rng.integers(orbit.order, size=300)], q)
    wanted = np.linalg.norm(tilt, axis=1).mean()
    none = evaluation.orientation_errors(q, p, over="none", symmetry=symmetry)
    assert none.mean_rad == pytest.approx(wanted, rel=1e-6)
    assert evaluation.orientation_errors(q, p, over="none").mean_rad > 0.5
    # A rotation of the density that is no element of the group, and the other hand.
    for right in (np.array([0, 0, 0, 1.0]), rotations.about("z", np.pi)):
        moved = rotations.multiply(rotations.multiply(rotations.uniform(1, rng), q), right)
        one = evaluation.orientation_errors(moved, p, symmetry=symmetry)
        assert one.mean_rad == pytest.approx(wanted, rel=0.02)
    zero = evaluation.random_error(p, 0, symmetry=symmetry)
    assert 0.5 < zero < evaluation.random_error(p, 0)


def test_orbits_cannot_be_laid_over_by_all_of_o4():
    with pytest.raises(InputError, match="D2"):
        evaluation.orientation_errors(np.eye(4), np.eye(4), over="o4", symmetry="D2")


def test_an_unknown_shift_costs_little_and_has_a_bound_of_its_own(phantom):
    density = phantom.density(32, 7.0)
    alone = evaluation.cramer_rao(density, TRUE[:10], 1.0)
    both = evaluation.cramer_rao(density, TRUE[:10], 1.0, shifts=True)
    assert both.shape == (10, 5, 5)
    information = np.linalg.inv(both)
    np.testing.assert_allclose(information[:, :3, :3], np.linalg.inv(alone), rtol=1e-5)
    # Another unknown never makes the rest better known.
    assert (np.linalg.eigvalsh(both[:, :3, :3] - alone) > -1e-6 * alone.max()).all()
    # The information about a shift in x is the image's squared slope in x, by Parseval.
    spectra = np.fft.fft2(project(density, TRUE[:10]))
    kx = 2 * np.pi * np.fft.fftfreq(32)
    expected = np.sum(np.abs(kx * spectra) ** 2, axis=(1, 2)) / 32**2
    np.testing.assert_allclose(information[:, 3, 3], expected, rtol=1e-3)


def test_the_bound_knows_the_ctf(phantom):
    density = phantom.density(32, 7.0)
    plain = evaluation.cramer_rao(density, TRUE[:5], 1.0, shifts=True)
    half = evaluation.cramer_rao(
        density, TRUE[:5], 1.0, shifts=True, ctf=np.full((5, 32, 17), 0.5, np.float32)
    )
    np.testing.assert_allclose(half, 4 * plain, rtol=1e-3)
