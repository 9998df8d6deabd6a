"""Refinement against the exact phantom: its images come from another path than the fit's slices."""

import warnings

import numpy as np
import pytest
from measures import correlation

from cryoem import evaluation, imaging, maps, projection, reconstruction, refinement, rotations
from cryoem.density import Density, Phantom
from cryoem.errors import InputError

BOX, VOXEL, N = 40, 5.0, 200
SHARP = Phantom.random(0, sigma_angstrom=6.0)
DENSITY = SHARP.density(BOX, VOXEL)
TRUE = rotations.uniform(N, 1)
SHIFTS = imaging.triangular_shifts(N, 2, 2.0)
CLEAN = imaging.shift(SHARP.project(TRUE, BOX, VOXEL).astype(np.float32), SHIFTS)
FINEST = 2 * VOXEL


def off(q, angle, seed=3):
    """Every orientation turned by ``angle`` about a random axis of its own."""
    w = np.random.default_rng(seed).standard_normal((len(q), 3))
    return rotations.perturb(q, angle * w / np.linalg.norm(w, axis=1, keepdims=True))


def noisy(snr, seed=4, images=CLEAN):
    variance = float(images.var() / snr)
    return imaging.add_noise(images, seed, variance=variance), variance


def rotation_vectors(found, true):
    """Small turns from true to found, in the detector's frame: (n, 3)."""
    w = rotations.multiply(rotations.inverse(true), found)
    return 2 * (w * np.sign(w[:, 3:]))[:, :3]


def normalised_square(errors, covariances):
    return float(np.einsum("ni,nij,nj->n", errors, np.linalg.inv(covariances), errors).mean())


def defocused(n, box=BOX):
    defoci = np.random.default_rng(5).uniform(8_000, 25_000, n)
    return imaging.ctf(box, VOXEL, defoci, defoci - 600, 30.0)


# --------------------------------------------------------------------------------------
# The density is known


@pytest.mark.parametrize("with_ctf", [False, True])
def test_noiseless_images_are_placed_exactly(with_ctf):
    n = 100
    contrast = np.random.default_rng(6).uniform(0.5, 2, n)
    ctf = defocused(n) if with_ctf else None
    images = CLEAN[:n] if ctf is None else imaging.apply_ctf(CLEAN[:n], ctf)
    found = refinement.refine(
        images * contrast[:, None, None].astype(np.float32),
        DENSITY,
        off(TRUE[:n], 0.3),
        ctf=ctf,
        resolution_angstrom=FINEST,
    )
    error = rotations.distance(found.quaternions, TRUE[:n])
    assert error.mean() < 0.002 and np.mean(error < 0.008) >= 0.99
    assert np.abs(found.shifts_px - SHIFTS[:n]).max() < 0.05
    np.testing.assert_allclose(found.contrast, contrast, rtol=1e-2)


@pytest.fixture(scope="module")
def at_snr_1():
    images, variance = noisy(1)
    return variance, refinement.refine(images, DENSITY, off(TRUE, 0.3), resolution_angstrom=FINEST)


def test_noisy_images_are_placed_to_the_limit(at_snr_1):
    variance, found = at_snr_1
    limit = evaluation.cramer_rao(DENSITY, TRUE, variance, shifts=True)
    bound = evaluation.mean_error_of(limit[:, :3, :3])
    error = rotations.distance(found.quaternions, TRUE)
    # 200 particles: the mean is known to 3 %.
    assert 0.9 < error.mean() / bound.mean() < 1.1
    assert np.mean(error < 4 * bound) >= 0.99
    shift_bound = np.sqrt(np.trace(limit[:, 3:, 3:], axis1=1, axis2=2).mean())
    shift_error = np.sqrt(np.mean(np.sum((found.shifts_px - SHIFTS) ** 2, axis=1)))
    assert 0.85 < shift_error / shift_bound < 1.15


def test_the_covariances_are_the_errors(at_snr_1):
    variance, found = at_snr_1
    # A mean of 200 chi squares of 3 and of 2: 0.17 and 0.14 are a standard deviation.
    w = rotation_vectors(found.quaternions, TRUE)
    assert normalised_square(w, found.covariances) == pytest.approx(3, abs=0.6)
    moves = found.shifts_px - SHIFTS
    assert normalised_square(moves, found.shift_covariances) == pytest.approx(2, abs=0.5)
    assert found.expected_error_rad.mean() == pytest.approx(
        np.linalg.norm(w, axis=1).mean(), rel=0.1
    )
    assert found.noise_variance == pytest.approx(variance, rel=0.02)
    assert found.chi2.mean() == pytest.approx(1, abs=0.02)
    assert found.contrast.mean() == pytest.approx(1, abs=0.02)


def test_ctf_images_are_refined_and_reconstructed_without_bias():
    ctf = defocused(N)
    images, variance = noisy(1, images=imaging.apply_ctf(CLEAN, ctf))
    found = refinement.refine(
        images, DENSITY, off(TRUE, 0.1), ctf=ctf, resolution_angstrom=FINEST, starts=1
    )
    limit = evaluation.cramer_rao(DENSITY, TRUE, variance, ctf=ctf, shifts=True)
    bound = evaluation.mean_error_of(limit[:, :3, :3])
    assert rotations.distance(found.quaternions, TRUE).mean() < 1.15 * bound.mean()
    assert found.contrast.mean() == pytest.approx(1, abs=0.03)
    volume = reconstruction.reconstruct(
        images,
        found.quaternions,
        voxel_size_angstrom=VOXEL,
        shifts_px=found.shifts_px,
        ctf=ctf,
        contrast=found.contrast,
        iterations=10,
    )
    coarse, expected = volume.low_passed(20.0).values, DENSITY.low_passed(20.0).values
    assert np.vdot(coarse, expected) / np.vdot(expected, expected) == pytest.approx(1, abs=0.05)


def test_under_strong_noise_many_starts_find_the_likeliest():
    n = 100
    images, variance = noisy(1 / 8, images=CLEAN[:n])

    def refined(start):
        return refinement.refine(
            images, DENSITY, start, resolution_angstrom=FINEST, starts=16, noise_variance=variance
        )

    found, best = refined(off(TRUE[:n], 0.3)), refined(TRUE[:n])
    error, least = (rotations.distance(x.quaternions, TRUE[:n]).mean() for x in (found, best))
    assert error < 1.1 * least
    # Against the truth itself a fit of five parameters gains five, and some where the likelihood
    # is not a parabola.
    given = refinement.refine(
        images,
        DENSITY,
        TRUE[:n],
        shifts_px=SHIFTS[:n],
        resolution_angstrom=FINEST,
        starts=1,
        steps=0,
        noise_variance=variance,
    )
    assert (best.gain > given.gain - 0.1).all()
    assert 4 < (best.gain - given.gain).mean() < 10


def test_coarse_to_fine_catches_what_fine_alone_misses():
    start = off(TRUE[:100], 0.8)
    errors = [
        rotations.distance(
            refinement.refine(
                CLEAN[:100],
                DENSITY,
                start,
                resolution_angstrom=FINEST,
                starts=1,
                coarse_to_fine=staged,
            ).quaternions,
            TRUE[:100],
        )
        for staged in (True, False)
    ]
    assert np.mean(errors[0] < 0.01) > np.mean(errors[1] < 0.01) + 0.05


def test_nothing_finer_than_the_resolution_is_used():
    images = CLEAN[:20]
    coarse = imaging.fourier.low_pass(images, 2, BOX * VOXEL / 25.0)
    options = {"resolution_angstrom": 27.0, "starts": 1}
    q = off(TRUE[:20], 0.1)
    found, same = (refinement.refine(x, DENSITY, q, **options) for x in (images, coarse))
    assert found.resolution_angstrom == pytest.approx(27.0)
    assert rotations.distance(found.quaternions, same.quaternions).max() < 1e-3


def test_a_finer_density_serves_down_sampled_images():
    fine = SHARP.density(2 * BOX, VOXEL / 2)
    images = projection.project(fine, TRUE[:20], box_px=BOX)
    found = refinement.refine(images, fine, off(TRUE[:20], 0.2), resolution_angstrom=FINEST)
    assert rotations.distance(found.quaternions, TRUE[:20]).max() < 0.002
    np.testing.assert_allclose(found.contrast, 1, rtol=1e-2)


def test_no_steps_only_judge():
    found = refinement.refine(
        CLEAN[:9],
        DENSITY,
        TRUE[:9],
        shifts_px=SHIFTS[:9],
        resolution_angstrom=FINEST,
        starts=1,
        steps=0,
    )
    np.testing.assert_allclose(found.quaternions, TRUE[:9], atol=1e-15)
    np.testing.assert_array_equal(found.shifts_px, SHIFTS[:9])
    assert found.correlation.min() > 0.999
    wrong = refinement.refine(
        CLEAN[:9], DENSITY, off(TRUE[:9], 0.3), resolution_angstrom=FINEST, starts=1, steps=0
    )
    assert (wrong.correlation < found.correlation).all()


def test_a_particle_does_not_depend_on_its_company(monkeypatch):
    together = refinement.refine(CLEAN[:9], DENSITY, off(TRUE[:9], 0.2), resolution_angstrom=FINEST)
    monkeypatch.setattr(refinement, "_POINTS_AT_ONCE", 1)
    alone = refinement.refine(CLEAN[:9], DENSITY, off(TRUE[:9], 0.2), resolution_angstrom=FINEST)
    assert rotations.distance(together.quaternions, alone.quaternions).max() < 1e-3


def test_inverted_contrast_is_said():
    with pytest.raises(InputError, match="flip_contrast"):
        refinement.refine(-CLEAN, DENSITY, off(TRUE, 0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quaternions": TRUE[:4]}, "one quaternion an image"),
        ({"images": np.zeros((0, BOX, BOX)), "quaternions": TRUE[:0]}, "at least one"),
        ({"shifts_px": np.zeros((5, 3))}, r"\(5, 2\)"),
        ({"shifts_px": np.full((5, 2), np.nan)}, "finite"),
        ({"ctf": np.ones((5, BOX, BOX))}, r"\(5, 40, 21\)"),
        ({"noise_variance": 0.0}, "positive"),
        ({"starts": 0}, "starts"),
        ({"resolution_angstrom": 150.0}, "below 100"),
        ({"images": np.zeros((5, 64, 64))}, "wider"),
        ({"density": Density(np.zeros((BOX,) * 3), VOXEL)}, "zero"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    given = {"images": CLEAN[:5], "density": DENSITY, "quaternions": TRUE[:5], **options}
    with pytest.raises(InputError, match=message):
        refinement.refine(**given)


# --------------------------------------------------------------------------------------
# What orientations are worth


@pytest.mark.parametrize("moved", [0.0, 0.02, 0.05, 0.3])
def test_the_expected_error_is_the_mean_length_about_the_displacement(moved):
    spread = 0.05
    w = np.random.default_rng(0).normal((moved, 0, 0), spread, (200_000, 3))
    fields = dict.fromkeys(refinement.Refined.__dataclass_fields__)
    fields["quaternions"] = rotations.perturb(TRUE[:1], np.array([[0, moved, 0]]))
    fields["covariances"] = np.eye(3)[None] * spread**2
    one = refinement.Refined(**fields)
    expected = refinement.expected_error(TRUE[:1], one)
    assert expected[0] == pytest.approx(np.linalg.norm(w, axis=1).mean(), rel=5e-3)


def test_the_images_own_map_tells_good_orientations_from_bad():
    images, _ = noisy(2)
    size = np.random.default_rng(7).uniform(0, 0.3, N)
    w = np.random.default_rng(3).standard_normal((N, 3))
    given = rotations.perturb(TRUE, size[:, None] * w / np.linalg.norm(w, axis=1, keepdims=True))
    error = rotations.distance(given, TRUE)
    expected = refinement.cross_check(images, given, voxel_size_angstrom=VOXEL, shifts_px=SHIFTS)
    assert np.corrcoef(expected, error)[0, 1] > 0.8
    assert expected.mean() == pytest.approx(error.mean(), rel=0.25)


def test_pure_noise_is_expected_to_be_anywhere():
    noise = np.random.default_rng(8).standard_normal((N, BOX, BOX), dtype=np.float32)
    expected = refinement.cross_check(noise, TRUE, voxel_size_angstrom=VOXEL)
    assert np.median(expected) > 1


# --------------------------------------------------------------------------------------
# The density is only reconstructed


LOST = 6


@pytest.fixture(scope="module")
def alternated():
    images, variance = noisy(1)
    start = rotations.perturb(TRUE, 0.1 * np.random.default_rng(7).standard_normal((N, 3)))
    start[:LOST] = rotations.uniform(LOST, 12)
    a = rotations.uniform(1, 8)[0]
    start = rotations.multiply(a, start)
    found = refinement.alternate(images, start, voxel_size_angstrom=VOXEL, rounds=3, seed=9)
    return variance, start, found


def test_alternating_approaches_the_limit_that_knows_the_density(alternated):
    variance, start, found = alternated
    limit = evaluation.cramer_rao(DENSITY, TRUE, variance, shifts=True)[:, :3, :3]
    bound = evaluation.mean_error_of(limit).mean()
    before, after = (
        evaluation.align(q, TRUE, over="one-sided").quaternions
        for q in (start, found.refined.quaternions)
    )
    assert rotations.distance(before, TRUE)[LOST:].mean() > 5 * bound
    assert rotations.distance(after, TRUE).mean() < 1.6 * bound
    # Those that started anywhere were found again.
    assert np.median(rotations.distance(before, TRUE)[:LOST]) > 1
    assert rotations.distance(after, TRUE)[:LOST].max() < 6 * bound


def test_the_alternated_map_is_the_particles(alternated):
    _, _, found = alternated
    q = evaluation.align(found.refined.quaternions, TRUE, over="one-sided")
    assert not np.allclose(q.left, [0, 0, 0, 1], atol=0.1)  # in its own frame
    turned = maps.turned(found.density, q.left)
    assert correlation(turned.values, DENSITY.values) > 0.9
    assert found.half_maps.independent and found.fsc.corrected.resolution(0.143).angstrom < 20
    assert found.held_out_correlation > found.chance_correlation + 0.05
    assert set(found.subset) == {1, 2} and len(found.resolutions_angstrom) == 3
    assert found.resolutions_angstrom[0] >= 30.0


def test_noise_builds_no_structure():
    noise = np.random.default_rng(10).standard_normal((N, BOX, BOX)).astype(np.float32)
    found = refinement.alternate(noise, TRUE, voxel_size_angstrom=VOXEL, rounds=2, seed=9)
    # Nothing below the resolution at which the halves are joined.
    curve = found.fsc.corrected
    assert curve.resolution(0.143).angstrom > 25
    assert abs(curve.values[curve.frequencies > 1 / 25].mean()) < 0.06
    assert abs(found.held_out_correlation - found.chance_correlation) < 0.02


# --------------------------------------------------------------------------------------
# Reference bias


def test_noise_refined_against_a_reference_ends_in_a_warning_not_a_map():
    noise = np.random.default_rng(11).standard_normal((N, BOX, BOX)).astype(np.float32)
    with pytest.warns(UserWarning, match="may be the reference alone"):
        found = refinement.from_reference(
            noise, DENSITY, TRUE, resolution_angstrom=30.0, starts=4, seed=1
        )
    assert found.density is None and not found.test.believable
    # The bias itself: where the reference was used, the halves do agree.
    assert maps.fsc(found.half_maps.first, found.half_maps.second).values[2:5].mean() > 0.2
    assert not found.half_maps.independent


def test_particles_refined_against_a_reference_give_a_map():
    # An image of 116 px says as much at SNR 1/16 as one of 40 px at 1/2.
    images, _ = noisy(1 / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = refinement.from_reference(
            images, DENSITY, TRUE, shifts_px=SHIFTS, resolution_angstrom=30.0, starts=1, seed=1
        )
    assert found.test.believable and found.density is not None
    assert correlation(found.density.values, DENSITY.values) > 0.5


@pytest.mark.parametrize("subset", [np.ones(N, int), np.ones(3, int)])
def test_a_split_that_is_none_is_refused(subset):
    with pytest.raises(InputError, match="subset"):
        refinement.alternate(CLEAN, TRUE, voxel_size_angstrom=VOXEL, subset=subset)
