"""Refinement against the exact phantom: its images come from another path than the fit's slices."""

import dataclasses
import warnings
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from measures import correlation, made_symmetric, relative_error

from cryoem import evaluation, imaging, maps, projection, reconstruction, rotations, simulate
from cryoem.density import Density, Phantom
from cryoem.errors import InputError
from cryoem.maps.shells import Shells, half_spectrum
from cryoem.noise import Noise
from cryoem.particles import CtfParameters, ParticleStack
from cryoem.refinement import (
    Search,
    check_reference,
    check_symmetry,
    cross_check,
    elsewhere,
    expected_error,
    halves,
    in_frame_of,
    refine,
    refine_against,
    refine_halves,
    rounds,
)
from cryoem.refinement.reference import LOST as ASTRAY
from cryoem.refinement.search import distinct_first, plan
from cryoem.symmetry import group

BOX, VOXEL, N = 40, 5.0, 200
SHARP = Phantom.random(0, sigma_angstrom=6.0)
DENSITY = SHARP.density(BOX, VOXEL)
TRUE = rotations.uniform(N, 1)
SHIFTS = imaging.triangular_shifts(N, 2, 2.0)
CLEAN = imaging.shift(SHARP.project(TRUE, BOX, VOXEL).astype(np.float32), SHIFTS)
FINEST = 2 * VOXEL
ONE = Search(starts=1)
JUDGE = Search(starts=1, steps=0)


def particles(n=N, *, images=CLEAN, at=TRUE, **known):
    """The first ``n`` of the phantom's images at these orientations, shifts unknown."""
    return ParticleStack(images[:n], VOXEL, quaternions=at[:n], **known)


def off(q, angle, seed=3):
    """Every orientation turned by ``angle`` about a random axis of its own."""
    w = np.random.default_rng(seed).standard_normal((len(q), 3))
    return rotations.perturb(q, angle * w / np.linalg.norm(w, axis=1, keepdims=True))


def noisy(snr, seed=4, images=CLEAN):
    variance = float(images.var() / snr)
    return imaging.add_noise(images, seed, variance=variance), variance


def white(seed):
    return np.random.default_rng(seed).standard_normal((N, BOX, BOX), dtype=np.float32)


def rotation_vectors(found, true):
    """Small turns from true to found, in the detector's frame: (n, 3)."""
    w = rotations.multiply(rotations.inverse(true), found)
    return 2 * (w * np.sign(w[:, 3:]))[:, :3]


def normalised_square(errors, covariances):
    return float(np.einsum("ni,nij,nj->n", errors, np.linalg.inv(covariances), errors).mean())


def defocused(n):
    defoci = np.random.default_rng(5).uniform(8_000, 25_000, n)
    return CtfParameters(defoci, defoci - 600, 30.0)


def power(density):
    """Of each shell."""
    return Shells(density.box_px).sums(np.abs(half_spectrum(density.values)) ** 2)


def curves(*, corrected):
    """Half-maps that agree to this resolution, in angstrom; the mask alone, to finer ones."""
    frequencies = np.arange(1, BOX // 2) / (BOX * VOXEL)

    def curve(until_angstrom):
        values = np.where(frequencies < 1 / until_angstrom, 0.9, 0.0)
        return maps.Fsc(frequencies, values, 1 / FINEST)

    return maps.HalfMapFsc(
        unmasked=curve(30.0),
        masked=curve(12.0),
        randomised=curve(14.0),
        corrected=curve(corrected),
        randomised_from=1 / 30,
    )


BEYOND_20_A = slice(int(BOX * VOXEL / 20) + 2, BOX // 2)


def share_beyond(density):
    """What lies beyond 20 A, but for the shell or two that a mask smears."""
    return power(density)[BEYOND_20_A].sum() / power(density).sum()


def assert_nearer(reference, own, other):
    """Of two half-maps, a reference is made from the first: their noise up to 20 A differs."""
    near, far = (maps.fsc(reference, x).values[6:9] for x in (own, other))
    assert (near > far).all() and near.mean() > far.mean() + 0.05


# --------------------------------------------------------------------------------------
# The density is known


@pytest.mark.parametrize("with_ctf", [False, True])
def test_noiseless_images_are_placed_exactly(with_ctf):
    n = 100
    contrast = np.random.default_rng(6).uniform(0.5, 2, n)
    images, ctf = CLEAN[:n], None
    if with_ctf:
        ctf = defocused(n)
        images = imaging.apply_ctf(images, ctf.values(BOX, VOXEL))
    images = images * contrast[:, None, None].astype(np.float32)
    given = particles(n, images=images, at=off(TRUE, 0.3), ctf_parameters=ctf)
    found = refine(given, DENSITY, resolution_angstrom=FINEST)
    error = rotations.distance(found.quaternions, TRUE[:n])
    assert error.mean() < 0.002 and np.mean(error < 0.008) >= 0.99
    assert np.abs(found.shifts_px - SHIFTS[:n]).max() < 0.05
    np.testing.assert_allclose(found.contrast, contrast, rtol=1e-2)
    # All that was known beside the pose is still known.
    assert found.images is given.images and found.ctf_parameters is given.ctf_parameters


def test_premultiplied_images_are_refined_as_those_that_were_seen():
    """Their noise, which the CTF has coloured, is not taken for white."""
    ctf = defocused(N)
    seen = imaging.apply_ctf(CLEAN, ctf.values(BOX, VOXEL))
    images, _ = noisy(0.3, images=seen)
    given = particles(images=images, at=off(TRUE, 0.2), ctf_parameters=ctf)
    twice = given.replace(
        images=imaging.apply_ctf(images, given.ctf()),
        ctf_parameters=dataclasses.replace(ctf, images="premultiplied"),
    )
    one, other = (refine(stack, DENSITY, resolution_angstrom=FINEST) for stack in (given, twice))
    errors = [rotations.distance(found.quaternions, TRUE).mean() for found in (one, other)]
    assert errors[1] < 1.1 * errors[0]
    assert other.expected_error_rad.mean() == pytest.approx(one.expected_error_rad.mean(), rel=0.1)
    assert other.images is not twice.images  # but divided
    assert set(other.ctf_parameters.images) == {"divided"}


def test_a_density_of_another_extent_is_refused():
    for other in (Density(DENSITY.values, 1.2 * VOXEL), DENSITY.in_box(BOX + 8)):
        with pytest.raises(InputError, match=r"the density is 24. A wide, the images 200 A"):
            refine(particles(5), other)


@pytest.mark.parametrize("share", [0.7, 0.9])
def test_masked_images_are_not_taken_for_quieter_than_they_are(at_snr_1, share):
    """What a mask has put to a constant has no noise, and says nothing of it."""
    middle = np.hypot(*np.mgrid[:BOX, :BOX] - BOX // 2) < share * BOX / 2
    _, seen = at_snr_1
    given = particles(images=np.where(middle, seen.images, 0), at=off(TRUE, 0.3))
    found = refine(given, DENSITY, resolution_angstrom=FINEST)
    ratio = [np.mean(stack.expected_error_rad / rotations.distance(stack.quaternions, TRUE).mean())
             for stack in (seen, found)]  # fmt: skip
    assert ratio[1] == pytest.approx(ratio[0], rel=0.15)


@pytest.fixture(scope="module")
def at_snr_1():
    images, variance = noisy(1)
    given = particles(images=images, at=off(TRUE, 0.3))
    return variance, refine(given, DENSITY, resolution_angstrom=FINEST)


def test_in_other_pixels_shifts_are_as_well_known_as_before(at_snr_1):
    _, found = at_snr_1
    assert found.with_images(found.images).noise_variance == found.noise_variance
    half = imaging.downsample(found.images[:], BOX // 2)
    small = found.with_images(half, pixel_size_angstrom=2 * VOXEL)
    np.testing.assert_allclose(small.shifts_px, found.shifts_px / 2)
    np.testing.assert_allclose(small.shift_covariances, found.shift_covariances / 4)
    np.testing.assert_array_equal(small.covariances, found.covariances)
    assert np.isnan(small.noise_variance)


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


def test_the_covariances_are_those_of_an_unknown_contrast():
    # Turning a rod changes how bright it looks: what contrast explains says nothing of the turn.
    rod = Phantom(
        SHARP.centres_angstrom * [0.6, 0.1, 0.1], SHARP.sigmas_angstrom, SHARP.weights
    ).density(BOX, VOXEL)
    n, step, projector = 20, 1e-2, projection.Projector(rod)

    def seen(w, shift):
        images = projector.project(rotations.perturb(TRUE[:n], np.tile(w, (n, 1))))
        images = imaging.shift(
            images - images.mean(axis=(1, 2), keepdims=True), np.tile(shift, (n, 1))
        )
        return images.reshape(n, -1).astype(float)

    slopes = [(seen(d[:3], d[3:]) - seen(-d[:3], -d[3:])) / (2 * step) for d in step * np.eye(5)]
    g = np.stack([*slopes, seen(np.zeros(3), np.zeros(2))], axis=1)
    wanted, known = (np.linalg.inv(x @ x.transpose(0, 2, 1)) for x in (g, g[:, :5]))
    images = projector.project(TRUE[:n])
    found = refine(
        particles(n, images=images),
        rod,
        resolution_angstrom=FINEST,
        search=JUDGE,
        noise_variance=1.0,
    )

    def off(covariances):
        return relative_error(np.linalg.inv(found.covariances), np.linalg.inv(covariances))

    assert off(wanted[:, :3, :3]) < 0.01 < 0.05 < off(known[:, :3, :3])
    assert relative_error(found.shift_covariances, wanted[:, 3:5, 3:5]) < 0.03


def test_a_given_noise_scales_what_is_expected_and_moves_nothing():
    given = particles(9, images=noisy(1)[0])
    once, twice = (
        refine(given, DENSITY, resolution_angstrom=FINEST, search=ONE, noise_variance=v)
        for v in (1.0, 4.0)
    )
    assert twice.noise_variance == 4.0
    np.testing.assert_array_equal(twice.quaternions, once.quaternions)
    np.testing.assert_allclose(twice.covariances, 4 * once.covariances)
    np.testing.assert_allclose(twice.shift_covariances, 4 * once.shift_covariances)
    np.testing.assert_allclose(twice.expected_error_rad, 2 * once.expected_error_rad)
    np.testing.assert_allclose(4 * twice.chi2, once.chi2)
    np.testing.assert_allclose(4 * twice.gain, once.gain)


def test_ctf_images_are_refined_and_reconstructed_without_bias():
    parameters = defocused(N)
    ctf = parameters.values(BOX, VOXEL)
    images, variance = noisy(1, images=imaging.apply_ctf(CLEAN, ctf))
    given = particles(images=images, at=off(TRUE, 0.1), ctf_parameters=parameters)
    found = refine(given, DENSITY, resolution_angstrom=FINEST, search=ONE)
    limit = evaluation.cramer_rao(DENSITY, TRUE, variance, ctf=ctf, shifts=True)
    bound = evaluation.mean_error_of(limit[:, :3, :3])
    assert rotations.distance(found.quaternions, TRUE).mean() < 1.15 * bound.mean()
    assert found.contrast.mean() == pytest.approx(1, abs=0.03)
    volume = reconstruction.reconstruct(found, iterations=10)
    coarse, expected = volume.low_passed(20.0).values, DENSITY.low_passed(20.0).values
    assert np.vdot(coarse, expected) / np.vdot(expected, expected) == pytest.approx(1, abs=0.05)


def test_under_strong_noise_many_starts_find_the_likeliest():
    n = 100
    images, variance = noisy(1 / 8, images=CLEAN[:n])

    def refined(at, search, **known):
        return refine(
            particles(n, images=images, at=at, noise=Noise.white(variance), **known),
            DENSITY,
            resolution_angstrom=FINEST,
            search=search,
            noise_variance=variance,
        )

    many = Search(starts=16)
    found, best = refined(off(TRUE[:n], 0.3), many), refined(TRUE, many)
    error, least = (rotations.distance(x.quaternions, TRUE[:n]).mean() for x in (found, best))
    assert error < 1.1 * least
    # Against the truth itself a fit of five parameters gains five, and some where the likelihood
    # is not a parabola.
    given = refined(TRUE, JUDGE, shifts_px=SHIFTS[:n])
    assert (best.gain > given.gain - 0.1).all()
    assert 4 < (best.gain - given.gain).mean() < 10


def test_what_was_given_is_never_left_for_worse():
    # Under so much noise coarse detail leads away from a start that is right.
    images, variance = noisy(1 / 30)
    given = particles(images=images, shifts_px=SHIFTS, noise=Noise.white(variance))
    judged, found = (
        refine(given, DENSITY, resolution_angstrom=FINEST, search=search, noise_variance=variance)
        for search in (JUDGE, ONE)
    )
    assert (found.gain > judged.gain - 0.1).all()


def test_coarse_to_fine_catches_what_fine_alone_misses():
    given = particles(100, at=off(TRUE[:100], 0.8))
    errors = [
        rotations.distance(
            refine(
                given,
                DENSITY,
                resolution_angstrom=FINEST,
                search=Search(starts=1, coarse_to_fine=staged),
            ).quaternions,
            TRUE[:100],
        )
        for staged in (True, False)
    ]
    assert np.mean(errors[0] < 0.01) > np.mean(errors[1] < 0.01) + 0.05


def test_nothing_finer_than_the_resolution_is_used():
    images = CLEAN[:20]
    coarse = imaging.fourier.low_pass(images, 2, BOX * VOXEL / 25.0)
    found, same = (
        refine(
            particles(20, images=x, at=off(TRUE[:20], 0.1)),
            DENSITY,
            resolution_angstrom=27.0,
            search=ONE,
        )
        for x in (images, coarse)
    )
    assert found.resolution_angstrom == pytest.approx(27.0)
    assert rotations.distance(found.quaternions, same.quaternions).max() < 1e-3


def test_a_finer_density_serves_down_sampled_images():
    fine = SHARP.density(2 * BOX, VOXEL / 2)
    images = projection.project(fine, TRUE[:20], box_px=BOX)
    given = particles(20, images=images, at=off(TRUE[:20], 0.2))
    found = refine(given, fine, resolution_angstrom=FINEST)
    assert rotations.distance(found.quaternions, TRUE[:20]).max() < 0.002
    np.testing.assert_allclose(found.contrast, 1, rtol=1e-2)


def test_a_coarser_density_serves_where_it_holds_the_detail_that_is_used():
    coarse = DENSITY.resampled(24)
    given = particles(20, at=off(TRUE[:20], 0.2), shifts_px=SHIFTS[:20])
    limit = 2 * coarse.voxel_size_angstrom
    found, same = (
        refine(given, density, resolution_angstrom=limit) for density in (coarse, DENSITY)
    )
    assert rotations.distance(found.quaternions, same.quaternions).max() < 2e-3
    np.testing.assert_allclose(found.contrast * 24 / BOX, same.contrast, rtol=1e-2)
    with pytest.raises(InputError, match=r"16.6667 A and coarser, not of 16 A.*images' 40 px"):
        refine(given, coarse, resolution_angstrom=16.0)


def test_no_steps_only_judge():
    given = particles(9, shifts_px=SHIFTS[:9])
    found = refine(given, DENSITY, resolution_angstrom=FINEST, search=JUDGE)
    np.testing.assert_allclose(found.quaternions, TRUE[:9], atol=1e-15)
    np.testing.assert_array_equal(found.shifts_px, SHIFTS[:9])
    assert found.correlation.min() > 0.999
    wrong = refine(
        particles(9, at=off(TRUE[:9], 0.3)), DENSITY, resolution_angstrom=FINEST, search=JUDGE
    )
    assert (wrong.correlation < found.correlation).all()


def test_a_particle_does_not_depend_on_its_company(monkeypatch):
    given = particles(9, at=off(TRUE[:9], 0.2))
    together = refine(given, DENSITY, resolution_angstrom=FINEST)
    monkeypatch.setattr("cryoem.refinement.search.POINTS_AT_ONCE", 1)
    alone = refine(given, DENSITY, resolution_angstrom=FINEST)
    assert rotations.distance(together.quaternions, alone.quaternions).max() < 1e-3


@pytest.mark.parametrize("bright", [[0], [7], [0, 1, 2, 3, 4]])
def test_contrasts_do_not_depend_on_who_comes_first(bright, monkeypatch):
    # The floor of the contrasts is a share of what is typical of all.
    monkeypatch.setattr("cryoem.refinement.search.POINTS_AT_ONCE", 1)
    monkeypatch.setattr("cryoem.refinement.fit.SAMPLE", 9)
    contrast = np.ones(12)
    contrast[bright] = 20
    images = contrast[:, None, None].astype(np.float32) * CLEAN[:12]
    given = particles(12, images=images, at=off(TRUE[:12], 0.1))
    found = refine(given, DENSITY, resolution_angstrom=FINEST, search=ONE)
    np.testing.assert_allclose(found.contrast, contrast, rtol=1e-2)


def test_white_particles_are_not_taken_for_black_by_what_is_fine_alone():
    images, variance = noisy(2)
    fine = Density(DENSITY.values - DENSITY.low_passed(25.0).values, DENSITY.voxel_size_angstrom)
    given = particles(images=images, shifts_px=SHIFTS, noise=Noise.white(variance))
    found = refine(given, fine, resolution_angstrom=16.0, search=Search(steps=1).near)
    assert np.median(found.contrast) == pytest.approx(1, abs=0.2)


def test_an_image_that_shows_nothing_keeps_the_least_contrast():
    # At zero, or below, it would say nothing of its orientation, or the opposite.
    images = np.concatenate([-CLEAN[:1], CLEAN[1:12]])
    given = particles(12, images=images, shifts_px=SHIFTS[:12])
    found = refine(given, DENSITY, resolution_angstrom=FINEST, search=JUDGE)
    assert found.contrast[0] == pytest.approx(0.1, rel=0.01)
    np.testing.assert_allclose(found.contrast[1:], 1, rtol=1e-2)


def test_inverted_contrast_is_said():
    with pytest.raises(InputError, match="black and white are exchanged"):
        refine(particles(images=-CLEAN, at=off(TRUE, 0.1)), DENSITY)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (particles(0), {}, "at least one"),
        (particles(5).without_poses(), {}, "no orientations"),
        (particles(5), {"noise_variance": 0.0}, "positive"),
        (particles(5), {"resolution_angstrom": 150.0}, "below 100"),
        (particles(5, images=np.zeros((5, 64, 64))), {}, "200 A wide, the images 320 A"),
        (particles(5), {"density": Density(np.zeros((BOX,) * 3), VOXEL)}, "zero"),
    ],
)
def test_what_does_not_fit_is_refused(given, options, message):
    with pytest.raises(InputError, match=message):
        refine(given, **{"density": DENSITY, **options})


@pytest.mark.parametrize("options", [{"starts": 0}, {"steps": -1}])
def test_a_search_that_is_none_is_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Search(**options)


def test_the_first_start_is_the_given_one_and_none_is_farther_than_the_spread():
    w = Search(starts=500, spread_rad=0.4).offsets()
    np.testing.assert_array_equal(w[0], 0)
    length = np.linalg.norm(w, axis=1)
    assert length.max() <= 0.4
    # The ball is filled evenly: half of its volume lies within this radius.
    assert np.mean(length < 0.4 / 2 ** (1 / 3)) == pytest.approx(0.5, abs=0.07)


def test_every_stage_doubles_the_resolution_and_drops_half_of_the_candidates():
    stages = plan(DENSITY, BOX, FINEST, Search(starts=7, spread_rad=0.6)).stages
    assert [(s.candidates, s.keep) for s in stages] == [(7, 4), (4, 2), (2, 1)]
    # Frequencies of a disc, less its centre, grow with its area.
    for coarse, fine in pairwise(stages):
        assert fine.count / coarse.count == pytest.approx(4, rel=0.15)


def test_one_maximum_does_not_crowd_out_the_others():
    a, b = rotations.uniform(2, 0)
    near = rotations.perturb(a[None], np.array([[0.01, 0, 0]]))[0]
    q = np.array([[b, a, near, -a, a, a]])
    shifts = np.array([[[0, 0], [0, 0], [0.1, 0], [0, 0], [0, 3.0], [9.0, 0]]])
    gain = np.array([[1.0, 5.0, 4.0, 3.0, 2.0, -np.inf]])
    # Candidates 2 and 3 ended where 1 did; 4 is as oriented but elsewhere; 5 was given up before.
    order, worth = distinct_first(gain, q, shifts)
    np.testing.assert_array_equal(order, [[1, 4, 0, 5, 2, 3]])
    np.testing.assert_array_equal(worth, [[True, True, True, False, False, False]])


# --------------------------------------------------------------------------------------
# What orientations are worth


@pytest.mark.parametrize("moved", [0.0, 0.02, 0.05, 0.3])
def test_the_expected_error_is_the_mean_length_about_the_displacement(moved, at_snr_1):
    spread = 0.05
    w = np.random.default_rng(0).normal((moved, 0, 0), spread, (200_000, 3))
    one = at_snr_1[1].select([0])
    one = one.with_poses(rotations.perturb(TRUE[:1], np.array([[0, moved, 0]])))
    object.__setattr__(one, "covariances", np.eye(3)[None] * spread**2)
    expected = expected_error(TRUE[:1], one)
    assert expected[0] == pytest.approx(np.linalg.norm(w, axis=1).mean(), rel=5e-3)


def test_the_images_own_map_tells_good_orientations_from_bad():
    images, _ = noisy(2)
    size = np.random.default_rng(7).uniform(0, 0.3, N)
    w = np.random.default_rng(3).standard_normal((N, 3))
    given = rotations.perturb(TRUE, size[:, None] * w / np.linalg.norm(w, axis=1, keepdims=True))
    error = rotations.distance(given, TRUE)
    stack = particles(images=images, at=given, shifts_px=SHIFTS)
    checked = cross_check(stack)
    expected = checked.expected_error_rad
    assert np.corrcoef(expected, error)[0, 1] > 0.8
    assert expected.mean() == pytest.approx(error.mean(), rel=0.25)
    # It judges, and changes nothing.
    assert checked.quaternions is stack.quaternions and checked.shifts_px is stack.shifts_px


def test_no_image_is_checked_by_the_map_that_it_is_in(monkeypatch):
    calls = []

    def noted(stack, others, *, resolution_angstrom, **options):
        calls.append((others, resolution_angstrom))
        options = {"resolution_angstrom": resolution_angstrom, **options}
        return halves.refine_each_half(stack, others, **options)

    monkeypatch.setattr("cryoem.refinement.check.refine_each_half", noted)
    judged = curves(corrected=20.0)
    monkeypatch.setattr(maps, "half_map_fsc", lambda *_, **__: judged)
    images, _ = noisy(1 / 2)
    given = particles(images=images, shifts_px=SHIFTS, half_set=np.arange(N) % 2 + 1)
    cross_check(given)
    (((one, two), resolution),) = calls
    pair = rounds.half_maps(given, independent=False)
    assert_nearer(one, pair.second, pair.first)
    assert_nearer(two, pair.first, pair.second)
    # Nor beyond where the curve that is corrected for the mask says that the maps agree.
    assert resolution == judged.corrected.resolution(0.143).angstrom
    assert share_beyond(one) < 0.1 * share_beyond(pair.second)


def test_pure_noise_is_expected_to_be_anywhere():
    expected = cross_check(particles(images=white(8))).expected_error_rad
    assert np.median(expected) > 1


# --------------------------------------------------------------------------------------
# The density is only reconstructed


LOST = 6


@pytest.fixture(scope="module")
def from_halves():
    images, variance = noisy(1)
    start = rotations.perturb(TRUE, 0.1 * np.random.default_rng(7).standard_normal((N, 3)))
    start[:LOST] = rotations.uniform(LOST, 12)
    a = rotations.uniform(1, 8)[0]
    start = rotations.multiply(a, start)
    found = refine_halves(particles(images=images, at=start), rounds=3, seed=9)
    return variance, start, found


def test_halves_approach_the_limit_that_knows_the_density(from_halves):
    variance, start, found = from_halves
    limit = evaluation.cramer_rao(DENSITY, TRUE, variance, shifts=True)[:, :3, :3]
    bound = evaluation.mean_error_of(limit).mean()
    before, after = (
        evaluation.align(q, TRUE, over="one-sided").quaternions
        for q in (start, found.particles.quaternions)
    )
    assert rotations.distance(before, TRUE)[LOST:].mean() > 5 * bound
    # With references in the wide mask by which the maps are judged: 1.16.
    assert rotations.distance(after, TRUE).mean() < 1.14 * bound
    # Those that started anywhere were found again.
    assert np.median(rotations.distance(before, TRUE)[:LOST]) > 1
    assert rotations.distance(after, TRUE)[:LOST].max() < 6 * bound


def test_the_map_of_halves_is_the_particles(from_halves):
    _, _, found = from_halves
    q = evaluation.align(found.particles.quaternions, TRUE, over="one-sided")
    assert not np.allclose(q.left, [0, 0, 0, 1], atol=0.1)  # in its own frame
    turned = maps.turned(found.density, q.left)
    assert correlation(turned.values, DENSITY.values) > 0.9
    assert found.half_maps.independent and found.fsc.corrected.resolution(0.143).angstrom < 20
    assert found.held_out_correlation > found.chance_correlation + 0.15
    assert set(found.particles.half_set) == {1, 2} and len(found.resolutions_angstrom) == 3
    assert found.resolutions_angstrom[0] >= 30.0


def assert_weighted_by_what_agrees(density, pair, fsc):
    """Every shell of a map is that of the mean times ``sqrt(2 FSC / (1 + FSC))``."""
    f = fsc.corrected.values.copy()
    f[np.argmax(f < 0) if (f < 0).any() else len(f) :] = 0
    gain = np.sqrt(2 * f / (1 + f))
    assert gain.min() < 0.3  # else there is nothing to filter
    shells = slice(1, len(f) + 1)
    found = np.sqrt(power(density) / power(pair.mean))[shells]
    # Between shells the gain is interpolated.
    np.testing.assert_allclose(found, gain, atol=0.1)


def test_the_map_shows_only_what_the_halves_agree_on(from_halves):
    _, _, found = from_halves
    assert_weighted_by_what_agrees(found.density, found.half_maps, found.fsc)


class Asked(list):
    """What is asked of ``refine``, (stack, density, resolution) each time; and of matching."""

    def __init__(self):
        self.matched = []

    def refine(self, stack, density, *, resolution_angstrom, **options):
        self.append((stack, density, resolution_angstrom))
        return refine(stack, density, resolution_angstrom=resolution_angstrom, **options)

    def candidates(self, stack, density, *_, **__):
        """Nobody is found elsewhere on the sphere."""
        self.matched.append(density)
        return stack.oriented()[:, None], stack.shifts_px[:, None], np.ones((len(stack), 1))


@pytest.fixture
def asked(monkeypatch):
    calls = Asked()
    for module in (halves, elsewhere):
        monkeypatch.setattr(module, "refine", calls.refine)
    monkeypatch.setattr("cryoem.matching.candidates", calls.candidates)
    return calls


@pytest.fixture
def steered(asked, monkeypatch):
    """Two rounds that change no pose, on half-maps that are said to agree to 20 A."""
    judged = curves(corrected=20.0)
    monkeypatch.setattr(maps, "half_map_fsc", lambda *_, **__: judged)
    images, _ = noisy(1 / 2)
    found = refine_halves(particles(images=images), rounds=2, search=JUDGE, seed=9)
    return found, judged, asked


def test_the_curve_that_is_corrected_for_the_mask_steers(steered):
    found, judged, asked = steered
    crossing = judged.corrected.resolution(0.143).angstrom
    assert 20 < crossing < 23
    assert found.resolutions_angstrom == (30.0, crossing)
    assert [resolution for *_, resolution in asked] == [30.0] * 2 + [crossing] * 7
    for _, reference, _ in (*asked[:4], asked[-1]):
        assert share_beyond(reference) < 0.1 * share_beyond(found.half_maps.mean)
    # At the end all are refined against all of the map: the halves' mean, by its Wiener filter.
    gain = np.where(judged.corrected.values > 0, 2 * 0.9 / (1 + 0.9), 0)
    pair = found.half_maps.first, found.half_maps.second
    noise = Density((pair[0].values - pair[1].values) / 2, VOXEL)
    mask = maps.soft_mask(found.half_maps.mean, extend_angstrom=0.0, edge_angstrom=8.0, noise=noise)
    wanted = mask * maps.filtered(found.half_maps.mean, gain).values
    assert relative_error(asked[-1][1].values, wanted) < 1e-3
    # Up to there each half is refined against its own map.
    for i, (_, reference, _) in enumerate(asked[:4]):
        assert_nearer(reference, pair[i % 2], pair[(i + 1) % 2])


def test_particles_are_judged_and_found_again_by_the_map_that_they_are_not_in(steered):
    found, _, asked = steered
    pair = found.half_maps.first, found.half_maps.second
    held_out, by_chance = asked[4:6], asked[6:8]
    for i in (0, 1):
        assert_nearer(asked.matched[i], pair[1 - i], pair[i])
        (stack, judge, _), (exchanged, same, _) = held_out[i], by_chance[i]
        assert set(stack.half_set) == {i + 1}
        assert_nearer(judge, pair[1 - i], pair[i])
        # Nor by what the halves share: shells up to four are coarser than 40 A.
        assert power(judge)[:5].sum() < 0.2 * power(judge).sum()
        np.testing.assert_array_equal(same.values, judge.values)
        assert (rotations.distance(exchanged.quaternions, stack.quaternions) > 1e-6).all()


def found_again(stack, given, resolution_angstrom=15.0, **options):
    """By the density itself, in either half."""
    options = {"search": Search(starts=1), "symmetry": "C1", "scheduler": None, **options}
    everywhere = np.ones(DENSITY.values.shape)
    return elsewhere.found_again(
        stack, given, [DENSITY] * 2, everywhere, resolution_angstrom, **options
    )


def test_what_matches_second_best_may_be_the_place(monkeypatch):
    """Matching is coarse: of a particle much the same from behind it may prefer the wrong side."""
    images, _ = noisy(1.0)
    half_set = np.arange(N) % 2 + 1
    wrong = rotations.multiply(TRUE, rotations.about("y", np.pi))
    now = particles(images=images, at=wrong, shifts_px=SHIFTS, half_set=half_set)

    def candidates(stack, *_, count, **__):
        """The wrong place first, then the right one, then one that is not worth a try."""
        mine = stack.half_set[0] == half_set
        other = rotations.multiply(TRUE[mine], rotations.about("x", np.pi))
        places = np.stack([wrong[mine], TRUE[mine], other], axis=1)
        shifts = np.repeat(stack.shifts_px[:, None], 3, axis=1)
        return places[:, :count], shifts, np.tile([0.5, 0.49, 0.1], (len(stack), 1))

    tried = Asked()
    monkeypatch.setattr("cryoem.refinement.elsewhere.refine", tried.refine)
    monkeypatch.setattr("cryoem.matching.candidates", candidates)
    found, moved = found_again(now, now)
    assert rotations.distance(found.oriented(), TRUE).mean() < 0.2
    # Coarsely where they match, then there and where they are.
    assert [(len(stack), resolution) for stack, _, resolution in tried] == [
        (N // 2, resolution) for resolution in (30.0, 15.0, 15.0)
    ] * 2
    assert moved > 0.9
    # A few at a time, and against detail of which a box has hardly any: from its own coarsest.
    tried.clear()
    monkeypatch.setattr(elsewhere, "AT_ONCE", 40)
    again, moved = found_again(now, now, resolution_angstrom=60.0)
    assert moved > 0.5 and rotations.distance(again.oriented(), TRUE).mean() < 0.8
    assert [(len(stack), resolution) for stack, _, resolution in tried] == [
        (size, 60.0) for size in (40, 40, 20) for _ in range(3)
    ] * 2
    # What is there already stays.
    right = particles(images=images, shifts_px=SHIFTS, half_set=half_set)
    kept, moved = found_again(right, now)
    np.testing.assert_allclose(kept.oriented(), TRUE, atol=1e-14)
    assert moved == 0


def test_refinements_end_with_the_errors_that_are_likely(monkeypatch):
    given, asked = particles(40, images=noisy(1)[0], at=off(TRUE, 0.1)), []

    def likely(found, reference, mask, *how):
        asked.append(how[1:])
        return found.replace(expected_error_rad=np.full(len(found), 1.5))

    monkeypatch.setattr("cryoem.refinement.reference.with_likely_errors", likely)
    monkeypatch.setattr("cryoem.refinement.halves.with_likely_errors", likely)
    against = refine_against(given, DENSITY)
    halves = refine_halves(given, rounds=1)
    for found in (against.particles, halves.particles):
        np.testing.assert_array_equal(found.expected_error_rad, 1.5)
    # Against a reference particles are sought elsewhere by the odds, half against half not.
    assert asked == [("C1", None, ASTRAY), ("C1", None)]


def test_errors_to_expect_are_told_where_one_half_is_small():
    half = np.where(np.arange(N) == 0, 2, 1)
    images, _ = noisy(1)
    given = particles(images=images, shifts_px=SHIFTS, half_set=half)
    found = refine(given, DENSITY, resolution_angstrom=FINEST, search=ONE)
    mask = maps.soft_mask(DENSITY)
    likely = elsewhere.with_likely_errors(found.select(slice(1, N)), DENSITY, mask, ONE, "C1", None)
    assert likely.expected_error_rad.mean() < 0.03


@pytest.mark.parametrize(("snr", "least", "most"), [(1.0, 0.99, 1.03), (1 / 16, 2.0, 3.5)])
def test_errors_to_expect_count_that_a_wrong_orientation_may_be_likeliest(snr, least, most):
    images, _ = noisy(snr)
    given = particles(images=images, shifts_px=SHIFTS, half_set=np.arange(N) % 2 + 1)
    mask, search = maps.soft_mask(DENSITY), Search()
    again = {"search": search, "symmetry": "C1", "scheduler": None}
    near = refine(given, DENSITY, resolution_angstrom=FINEST)
    brought, _ = elsewhere.found_again(near, given, (DENSITY, DENSITY), mask, FINEST, **again)
    found = refine(brought, DENSITY, resolution_angstrom=FINEST, search=search.near)
    counted = elsewhere.with_likely_errors(found, DENSITY, mask, **again)
    likely = counted.expected_error_rad.mean()
    off_by = rotations.distance(found.quaternions, TRUE).mean()
    assert 0.8 * off_by < likely < 1.25 * off_by
    assert least < likely / found.expected_error_rad.mean() < most


def test_of_many_places_all_that_are_about_as_likely_are_refined():
    """Coarse detail may rank the right place of a small particle fourth, or sixth."""
    image = np.array([4, 1, 4, 4, 1, 4, 4, 7])
    likely = np.array([9.0, 3.0, 11.0, 10.5, 30.0, 8.0, 1.0, -5.0])
    few = elsewhere._likeliest(image, likely)
    # Of images 4 and 1 what is not far below their best, of image 7 the one.
    np.testing.assert_array_equal(few, [0, 2, 3, 4, 5, 7])


@pytest.mark.parametrize("coarser", [1, 2])
@pytest.mark.parametrize(
    ("reach", "resolution", "detail"),
    [(42, 8.0, 10.0), (72, 8.0, 12.0), (96, 8.0, 15.0), (42, 13.0, 13.0)],
)
def test_small_particles_are_matched_by_finer_detail(
    monkeypatch, reach, resolution, detail, coarser
):
    """But never by finer than the maps hold, in whatever box these and their mask are."""
    asked = []

    def candidates(stack, reference, preprocessing, **_):
        asked.append(preprocessing.down_px)
        return np.zeros((1, 1, 4)), np.zeros((1, 1, 2)), np.zeros((1, 1))

    monkeypatch.setattr(elsewhere.matching, "candidates", candidates)
    box, voxel = 80, 3.0
    one = ParticleStack(np.zeros((1, box, box)), voxel, quaternions=TRUE[:1])
    edge, wide = box // coarser, coarser * voxel
    mask = np.zeros((edge,) * 3)
    mask[edge // 2 + int(reach / wide), edge // 2, edge // 2] = 1
    elsewhere._places(one, Density(mask, wide), mask, ONE, "C1", resolution, np.zeros((1, 2)), None)
    assert asked == [2 * int(np.ceil(box * voxel / detail))]


def test_a_place_beyond_the_reach_of_the_search_is_tried_however_near(monkeypatch):
    """What lies between one and two times as far as refinement looks was left astray."""
    images, _ = noisy(1.0)
    half_set = np.arange(N) % 2 + 1
    off = rotations.perturb(TRUE, np.tile([0.0, 0.45, 0.0], (N, 1)))
    now = particles(images=images, at=off, shifts_px=SHIFTS, half_set=half_set)

    def candidates(stack, *_, **__):
        there = TRUE[stack.half_set[0] == half_set][:, None]
        return there, stack.shifts_px[:, None], np.ones((len(stack), 1))

    monkeypatch.setattr("cryoem.matching.candidates", candidates)
    search = Search(starts=1, spread_rad=0.3, steps=0)
    found, _ = found_again(now, now, search=search)
    np.testing.assert_allclose(found.oriented(), TRUE, atol=1e-14)


def test_a_particle_is_sought_wherever_in_the_frame_others_are():
    """One that began at a wrong shift was never found: only the sphere was searched."""
    far = np.random.default_rng(7).uniform(-7, 7, (N, 2))
    images = imaging.shift(SHARP.project(TRUE, BOX, VOXEL).astype(np.float32), far)
    images, _ = noisy(1.0, images=images)
    lost = np.arange(N) % 9 == 0
    at = np.where(lost[:, None], off(TRUE, 2.0), TRUE)
    shifts = np.where(lost[:, None], -far, far)
    half_set = np.arange(N) % 2 + 1
    now = particles(images=images, at=at, shifts_px=shifts, half_set=half_set)
    found, _ = found_again(now, now)
    error = rotations.distance(found.oriented(), TRUE)
    assert np.mean(error[lost] < 0.2) > 0.9
    assert np.median(np.linalg.norm(found.shifts_px - far, axis=1)[lost]) < 0.5
    np.testing.assert_allclose(error[~lost], 0, atol=1e-7)  # those stay


@pytest.mark.parametrize(("reach", "tried"), [(0.9, 1), (1.9, 9), (4.0, 21), (8.0, 69)])
def test_shifts_are_tried_as_far_as_particles_lie_off_the_middle(reach, tried):
    angle = np.linspace(0, 2 * np.pi, 100)
    shifts = reach * np.column_stack([np.cos(angle), np.sin(angle)])
    shifts[:4] = 30.0  # however far a few lie
    positions = elsewhere._positions(np.array([1.0, -2.0]) + shifts, 2.0)
    assert len(positions) == tried
    assert (np.linalg.norm(positions - [1, -2], axis=1) < reach + 1.5).all()


def test_halves_are_refined_apart_but_share_what_is_coarse(asked):
    # Half 2 shows the particle turned, as if its frame had drifted.
    half_set = np.arange(N) % 2 + 1
    drift = rotations.about("x", 0.6)
    turned = np.where(half_set[:, None] == 2, rotations.multiply(drift, TRUE), TRUE)
    given = particles(at=turned, shifts_px=SHIFTS, half_set=half_set)
    found = refine_halves(given, rounds=1, search=JUDGE)
    (first, one, _), (second, two, _) = asked[:2]
    assert set(first.half_set) == {1} and set(second.half_set) == {2}
    apart, joined = (
        maps.fsc(a, b).values
        for a, b in ((found.half_maps.first, found.half_maps.second), (one, two))
    )
    # What is coarser than 40 A are the shells up to five, the last of them in part.
    coarse = slice(1, 4)
    assert (1 - joined[coarse] < 0.2 * (1 - apart[coarse])).all()
    assert joined[7:10].max() < 0.9


def test_given_half_sets_are_kept_and_others_drawn_by_seed(asked):
    half_set = np.repeat([1, 2], N // 2)
    kept = refine_halves(particles(half_set=half_set), rounds=1, search=JUDGE)
    np.testing.assert_array_equal(kept.particles.half_set, half_set)
    np.testing.assert_allclose(asked[0][0].quaternions, TRUE[: N // 2], atol=1e-12)
    drawn = [
        refine_halves(particles(), rounds=1, search=JUDGE, seed=seed).particles.half_set
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


@pytest.mark.parametrize(("restless", "rounds"), [(0, 5), (6, 7), (99, 8)])
def test_rounds_go_on_while_orientations_move(asked, monkeypatch, restless, rounds):
    """Five of them at least; here at most eight."""
    monkeypatch.setattr(halves, "MOST", 8)
    turns, apart = [], halves.refine_each_half

    def refined(stack, references, **options):
        found = apart(stack, references, **options)
        turns.append(found)
        slow = 0.2 if len(turns) <= restless else 0.05  # of the expected error
        moved = rotations.about("z", slow * np.median(found.expected_error_rad))
        q = rotations.multiply(moved, stack.oriented())
        return dataclasses.replace(found, quaternions=q)

    monkeypatch.setattr(halves, "refine_each_half", refined)
    monkeypatch.setattr(halves, "_held_out", lambda *_: (0.0, 0.0))
    images, _ = noisy(1 / 2)
    found = refine_halves(particles(images=images), search=JUDGE, seed=9)
    assert len(found.resolutions_angstrom) == len(turns) == rounds


def test_nothing_is_known_worse_than_random_orientations_are():
    """Of a point no view tells anything."""
    point = np.zeros((BOX,) * 3, np.float32)
    point[BOX // 2, BOX // 2, BOX // 2] = 1
    found = refine(particles(images=white(3)), Density(point, VOXEL), search=JUDGE)
    random = rotations.distance(rotations.uniform(20_000, 1), rotations.uniform(20_000, 2)).mean()
    assert evaluation.mean_error_of(found.covariances).max() > 10
    assert found.expected_error_rad.max() == pytest.approx(random, 0.01)


def test_halves_of_noise_are_not_believed(from_halves):
    """However well their maps agree: by the other half's map most lie elsewhere."""
    *_, particle = from_halves
    assert particle.believable and particle.astray_fraction < 0.1
    for seed in (3, 4):
        with pytest.warns(UserWarning, match="likelier elsewhere by the map of the other half"):
            found = refine_halves(particles(images=white(seed)), rounds=2, seed=9)
        assert not found.believable and found.astray_fraction > 0.5
    # A symmetric particle without its symmetry: its mates explain an image as well.
    cube = made_symmetric(DENSITY, "D2")
    seen = simulate(cube, 200, 1, snr=0.1)
    found = refine_halves(seen.replace(noise=None), rounds=2, seed=9)
    assert found.believable and found.astray_fraction < 0.2


@pytest.mark.parametrize(("shares", "rounds"), [([0.3, 0.005], 6), ([0.3] * 3, 8)])
def test_rounds_go_on_where_particles_lie_astray(asked, monkeypatch, shares, rounds):
    """Sought by the map of their own half, for the halves to stay independent; here to eight."""
    monkeypatch.setattr(halves, "MOST", 8)
    monkeypatch.setattr(halves, "_settled", lambda *_: True)
    monkeypatch.setattr(halves, "_held_out", lambda *_: (0.0, 0.0))
    made, reconstructed, sought = [], halves.maps_of_round, []

    def one_round(*args, **options):
        made.append(reconstructed(*args, **options))
        return made[-1]

    def found_again(stack, given, references, *_, **__):
        own = [a is b for a, b in zip(references, made[-1].references, strict=True)]
        sought.append((len(made), all(own), not any(own), stack))
        q = rotations.multiply(rotations.about("z", 0.01), stack.oriented())
        share = shares[len(sought) - 1] if len(sought) <= len(shares) else 0.3
        return stack.with_poses(q, stack.shifts_px), share

    monkeypatch.setattr(halves, "maps_of_round", one_round)
    monkeypatch.setattr(halves, "found_again", found_again)
    found = refine_halves(particles(half_set=np.arange(N) % 2 + 1), search=JUDGE, seed=9)
    assert len(found.resolutions_angstrom) == rounds
    *between, end = sought
    assert [number for number, *_ in sought] == [*range(5, 5 + len(shares)), rounds + 1]
    assert all(own for _, own, *_ in between) and end[2]
    # The rounds go on from where particles were found, and end with what is settled.
    taken = sum(share > 0.01 for share in shares)
    turned = [np.mean(rotations.distance(stack.oriented(), TRUE)) for *_, stack in sought]
    np.testing.assert_allclose(turned, 0.01 * np.minimum(range(len(sought)), taken), atol=1e-6)


def test_what_is_held_out_is_asked_of_some_of_many(asked, monkeypatch):
    judged = curves(corrected=20.0)
    monkeypatch.setattr(maps, "half_map_fsc", lambda *_, **__: judged)
    monkeypatch.setattr(elsewhere, "ASKED", 20)
    refine_halves(particles(half_set=np.arange(N) % 2 + 1), rounds=2, search=JUDGE, seed=9)
    *held_out, last = (stack for stack, *_ in asked[-5:])
    assert [len(stack) for stack in (*held_out, last)] == [10, 10, 10, 10, N]
    assert [set(stack.half_set) for stack in held_out] == [{1}, {2}] * 2
    # Of few of one half, as many as there are.
    uneven = np.where(np.arange(N) < 7, 2, 1)
    some = elsewhere.asked(particles(half_set=uneven))
    assert list(some[:7]) == [*range(7)] and len(some) == 17 and (np.diff(some) > 0).all()


def test_a_dark_image_does_not_end_a_search_for_particles_that_lie_astray():
    """Of those that are tried most are odd: what is black they do not tell."""
    images, _ = noisy(1.0)
    images[:2] = -images[:2]  # one of either half
    now = particles(images=images, shifts_px=SHIFTS, half_set=np.arange(N) % 2 + 1)
    now = now.replace(contrast=np.ones(N))
    found, moved = found_again(now, now)
    assert moved < 0.05
    np.testing.assert_allclose(rotations.distance(found.oriented(), TRUE)[2:], 0, atol=0.1)


@pytest.mark.parametrize("known", ["contrast", "nothing"])
def test_a_sample_tells_who_is_asked_whether_they_lie_astray(monkeypatch, known):
    images, _ = noisy(1.0)
    lost = np.arange(N) % 4 == 1
    contrast = np.where(lost, 0.5, 1.0) + np.linspace(0, 0.2, N)
    now = particles(
        images=images, at=np.where(lost[:, None], off(TRUE, 2.0), TRUE), shifts_px=SHIFTS,
        half_set=np.arange(N) // 2 % 2 + 1,
    )  # fmt: skip
    if known == "contrast":
        now = now.replace(contrast=contrast)
    monkeypatch.setattr(elsewhere, "ASKED", 40)
    asked, likelier = [], elsewhere._likelier

    def asking(stack, given, **options):
        asked.append(stack)
        return likelier(stack, given, **options)

    monkeypatch.setattr(elsewhere, "_likelier", asking)
    found, moved = found_again(now, now)
    sample, others = asked
    assert len(sample) == 40
    error = rotations.distance(found.oriented(), TRUE)
    assert (error[~lost] < 0.1).all()
    if known == "contrast":  # of the lost a few may stay: those of the highest contrasts
        assert others.contrast.max() < 0.71 and len(others) + 40 < 0.6 * N
        assert np.mean(error[lost] < 0.2) > 0.8
    else:
        assert len(others) == N - 40 and (error[lost] < 0.2).all()
    assert moved == np.mean(rotations.distance(found.oriented(), now.oriented()) > 0.3)
    # Where none of them lies astray nobody else is asked.
    asked.clear()
    right = particles(images=images, shifts_px=SHIFTS, half_set=now.half_set)
    assert found_again(right, right)[1] == 0
    assert [len(stack) for stack in asked] == [40]


def test_of_many_a_part_settles_first(monkeypatch):
    """All begin with its maps, each with that of its half."""
    many, few = 120, 40
    monkeypatch.setattr(halves, "PART", few)
    monkeypatch.setattr(halves, "_settled", lambda *_: True)
    monkeypatch.setattr(halves, "found_again", lambda stack, *_, **__: (stack, 0.0))
    monkeypatch.setattr(halves, "_held_out", lambda *_: (0.0, 0.0))
    apart, reconstructed, refined, made = halves.refine_each_half, halves.maps_of_round, [], []

    def one_round(stack, **options):
        found = reconstructed(stack, **options)
        made.append((len(stack), found.references))
        return found

    def each_half(stack, references, **options):
        refined.append((len(stack), references, stack.half_set))
        return apart(stack, references, **options)

    monkeypatch.setattr(halves, "maps_of_round", one_round)
    monkeypatch.setattr(halves, "refine_each_half", each_half)
    images, start = noisy(1 / 2)[0], rotations.perturb(TRUE, np.tile([0.1, 0.0, 0.0], (N, 1)))
    found = refine_halves(particles(many, images=images, at=start), search=Search(starts=1), seed=9)
    assert [n for n, *_ in refined] == [few] * 5 + [many] * 2
    assert [n for n, _ in made] == [few] * 6 + [many] * 2
    for round_number, (_, references, _) in enumerate(refined):
        assert references is made[round_number][1]
    rows = np.sort(rotations.generator(9, "settles first").permutation(many)[:few])
    np.testing.assert_array_equal(refined[0][2], refined[-1][2][rows])  # in the half that they were
    # Two rounds of all, after them, are as good as five.
    monkeypatch.setattr(halves, "PART", N)
    whole = refine_halves(particles(many, images=images, at=start), search=Search(starts=1), seed=9)
    error, other = (
        evaluation.orientation_errors(end.particles.quaternions, TRUE[:many]).mean_rad
        for end in (found, whole)
    )
    assert len(refined) == 7 + 5 and error < 1.1 * other


def test_maps_of_the_rounds_are_no_larger_than_they_need_to_be(monkeypatch):
    """Those that show hardly more than they are refined to; the last is of the images' box."""
    fine = 80
    density = SHARP.density(fine, BOX * VOXEL / fine)
    clean = simulate(density, N, 3, max_shift_px=3.0, defocus_range_angstrom=(8e3, 25e3))
    start = rotations.perturb(clean.quaternions, np.tile([0.1, 0.0, 0.0], (N, 1)))
    images = imaging.add_noise(clean.images, 5, variance=8 * float(clean.images.var()))
    given = clean.replace(images=images, quaternions=start, noise=None)
    reconstructed, seen, made = halves.maps_of_round, [], []

    def one_round(*args, **options):
        made.append(reconstructed(*args, **options))
        return made[-1]

    monkeypatch.setattr(halves, "maps_of_round", one_round)
    monkeypatch.setattr(
        halves,
        "found_again",
        lambda *a, **k: (seen.append(a[2][0].box_px), elsewhere.found_again(*a, **k))[1],
    )
    whole = refine_halves(given, seed=9)
    assert {m.pair.mean.box_px for m in made} == set(seen) == {fine}
    made.clear()
    seen.clear()
    monkeypatch.setattr(rounds, "WIDE", 20)
    found = refine_halves(given, seed=9)
    boxes = [m.pair.mean.box_px for m in made]
    used = (30.0, *found.resolutions_angstrom)
    for box, angstrom, m in zip(boxes[:-1], used, made, strict=False):
        assert box == fine or 2 * BOX * VOXEL / box < angstrom / 1.39
        # What would be seen in a larger box is looked for there.
        assert box == fine or m.finest_angstrom > 2.1 * BOX * VOXEL / box
    assert boxes[0] < 0.95 * fine and boxes[-1] == fine
    assert min(seen) < 0.95 * fine
    one, other = (
        evaluation.orientation_errors(r.particles.quaternions, clean.quaternions).mean_rad
        for r in (found, whole)
    )
    assert one < 1.05 * other
    assert found.density.box_px == fine
    np.testing.assert_allclose(np.median(found.separate.contrast), 1, atol=0.1)
    ends = [r.fsc.corrected.resolution(0.143).angstrom for r in (found, whole)]
    assert ends[0] == pytest.approx(ends[1], rel=0.05)


def test_small_boxes_hold_no_round_back(monkeypatch):
    """Few rounds that are told go as far as in the images' box: where more is seen it is larger."""
    given, told = particles(shifts_px=SHIFTS), {"seed": 9, "search": ONE, "rounds": 2}
    whole = refine_halves(given, **told)
    monkeypatch.setattr(rounds, "WIDE", 16)
    found = refine_halves(given, **told)
    assert found.resolutions_angstrom[-1] < 2 * BOX * VOXEL / 16
    np.testing.assert_allclose(found.resolutions_angstrom, whole.resolutions_angstrom, rtol=0.02)


def test_boxes_hold_all_that_halves_share(monkeypatch):
    """However fine that is: round 2 was refused."""
    monkeypatch.setattr(rounds, "WIDE", 16)
    told = {"seed": 9, "search": ONE, "rounds": 2, "joined_angstrom": 15.0}
    found = refine_halves(particles(shifts_px=SHIFTS), **told)
    assert max(found.resolutions_angstrom[1:]) <= 15


class Stopped(Exception):
    """A process ends."""


def refined_in_pieces(given, folder, monkeypatch, stops, **options):
    """Stopped in the middle of several of its steps, and called again."""
    apart, begun = halves.refine_each_half, []

    def refined(*args, **more):
        begun.append(args)
        if len(begun) in stops:
            raise Stopped
        return apart(*args, **more)

    monkeypatch.setattr(halves, "refine_each_half", refined)
    for _ in stops:
        with pytest.raises(Stopped):
            refine_halves(given, work=folder, **options)
    found = refine_halves(given, work=folder, **options)
    monkeypatch.setattr(halves, "refine_each_half", apart)
    return found, len(begun)


def test_interrupted_and_called_again_it_goes_on(tmp_path, monkeypatch):
    images, start = noisy(1 / 2)[0], rotations.perturb(TRUE, np.tile([0.1, 0.0, 0.0], (N, 1)))
    given = particles(images=images, at=start, shifts_px=SHIFTS)
    options = {"rounds": 3, "search": Search(starts=1), "seed": 4}
    whole = refine_halves(given, **options)
    # In the second round, in the third, and when the maps are judged.
    found, calls = refined_in_pieces(given, tmp_path, monkeypatch, (2, 4, 6), **options)
    assert calls == 3 + 2 + 3
    for name in ("quaternions", "shifts_px", "expected_error_rad"):
        for one, other in ((found.particles, whole.particles), (found.separate, whole.separate)):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-6)
    np.testing.assert_allclose(found.density.values, whole.density.values, atol=1e-6)
    assert found.resolutions_angstrom == whole.resolutions_angstrom
    assert [path.name for path in tmp_path.iterdir()] == ["rounds.npz"]
    monkeypatch.setattr(halves, "PART", 20)
    some, folder = given.select(slice(60)), tmp_path / "many"
    options["rounds"] = 2
    monkeypatch.setattr(halves, "found_again", lambda stack, *_, **__: (stack, 0.0))
    whole = refine_halves(some, **options)
    # In the second round of the part, in the first of all, and in the second.
    found, calls = refined_in_pieces(some, folder, monkeypatch, (2, 4, 6), **options)
    assert calls == 2 + 2 + 2 + 3
    np.testing.assert_allclose(found.particles.quaternions, whole.particles.quaternions, atol=1e-6)
    assert found.resolutions_angstrom == whole.resolutions_angstrom
    assert sorted(path.name for path in folder.iterdir()) == ["part.npz", "rounds.npz"]
    (folder / "rounds.npz").unlink()
    with pytest.raises(InputError, match=r"run with seed .* asked for"):
        refine_halves(some, work=folder, **{**options, "seed": 5})
    monkeypatch.setattr(halves, "PART", N)
    options["rounds"] = 3
    for differing in (
        {"rounds": 2}, {"seed": 5}, {"search": Search(starts=2)}, {"symmetry": "C2"},
        {"resolution_angstrom": 25.0}, {"joined_angstrom": 50.0},
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"run with {next(iter(differing))} .* asked for"):
            refine_halves(given, work=tmp_path, **{**options, **differing})
    for row in (1, N // 2):  # whichever it is
        other = given.images[:].copy()
        other[row] = -other[row]
        with pytest.raises(InputError, match="run with images_sha256"):
            refine_halves(given.with_images(other), work=tmp_path, **options)
    (tmp_path / "rounds.npz").write_bytes(b"not an archive")
    with pytest.raises(InputError, match=r"rounds\.npz: not rounds of a refinement"):
        refine_halves(given, work=tmp_path, **options)
    with pytest.raises(InputError, match="a whole number as its seed"):
        refine_halves(given, work=tmp_path, **{**options, "seed": np.random.default_rng(1)})


def test_what_was_brought_elsewhere_is_kept(asked, tmp_path, monkeypatch):
    """Of rounds until orientations settle."""
    monkeypatch.setattr(halves, "FEWEST", 1)
    monkeypatch.setattr(halves, "_settled", lambda *_: True)
    monkeypatch.setattr(halves, "_held_out", lambda *_: (0.0, 0.0))
    turn, sought = rotations.about("z", 0.1), []

    def found_again(stack, *_, **__):
        sought.append(stack)
        q = rotations.multiply(turn, stack.oriented())
        return stack.with_poses(q, stack.shifts_px + 0.5), 0.5 if len(sought) < 3 else 0.0

    monkeypatch.setattr(halves, "found_again", found_again)
    options = {"search": JUDGE, "seed": 4}
    found, calls = refined_in_pieces(particles(), tmp_path, monkeypatch, (2, 4), **options)
    assert calls == 3 + 2 and len(sought) == 4
    moved = [rotations.distance(stack.oriented(), TRUE).mean() for stack in sought]
    np.testing.assert_allclose(moved, [0.0, 0.1, 0.2, 0.2], atol=1e-6)
    assert len(found.resolutions_angstrom) == 3
    # Settled, and sought a last time: called again, it only ends.
    again, calls = refined_in_pieces(particles(), tmp_path, monkeypatch, (), **options)
    assert calls == 0 and again.resolutions_angstrom == found.resolutions_angstrom
    assert len(sought) == 4
    np.testing.assert_allclose(again.particles.quaternions, found.particles.quaternions, atol=1e-6)
    assert rotations.distance(again.particles.quaternions, TRUE).mean() > 0.25


def test_what_follows_the_rounds_is_shown_too(asked, capsys):
    """Of many images it takes as long as a round or two: the maps of all, and all against them."""
    refine_halves(particles(half_set=np.arange(N) % 2 + 1), rounds=1, progress=True, seed=9)
    shown = capsys.readouterr().err
    after = shown[shown.rindex("rounds:") :]
    assert after.count("back-projection: 100%") == 2 and "refinement: 100%" in after
    assert "back-projection" not in shown[: shown.rindex("rounds:")]


def test_a_bar_is_full_where_fewer_rounds_or_steps_were_enough(asked, capsys, monkeypatch):
    monkeypatch.setattr(halves, "_settled", lambda *_: True)
    refine_halves(particles(half_set=np.arange(N) % 2 + 1), progress=True, seed=9)
    shown = capsys.readouterr().err
    ends = [shown.rindex(bar) for bar in ("rounds: 100%", "conjugate gradients: 100%")]
    assert "5/5" in shown[ends[0] :].split("\r")[0]
    assert "/90" not in shown[ends[1] :].split("\r")[0]


def test_told_rounds_are_that_many(asked, monkeypatch):
    """Wherever particles lie, they are sought at the end only."""
    monkeypatch.setattr(halves, "FEWEST", 1)
    monkeypatch.setattr(halves, "_settled", lambda *_: True)
    found = refine_halves(particles(), rounds=2, search=JUDGE, seed=9)
    assert len(found.resolutions_angstrom) == 2 and len(asked.matched) == 2


def test_noise_builds_no_structure():
    noise = np.random.default_rng(10).standard_normal((N, BOX, BOX)).astype(np.float32)
    found = refine_halves(particles(images=noise), rounds=2, seed=9)
    # Nothing below the resolution at which the halves are joined.
    curve = found.fsc.corrected
    assert curve.resolution(0.143).angstrom > 25
    assert abs(curve.values[curve.frequencies > 1 / 25].mean()) < 0.06
    # And where the rounds did not go beyond that, there is nothing to judge by.
    assert np.isnan(found.held_out_correlation) and np.isnan(found.chance_correlation)


@pytest.mark.parametrize("half_set", [np.ones(N, int), np.full(N, 2)])
def test_a_split_that_is_none_is_refused(half_set):
    with pytest.raises(InputError, match="half-set"):
        refine_halves(particles(half_set=half_set))


def test_few_images_are_refused():
    """A map of two images had a resolution."""
    for few in (particles(2), particles(19)):
        for refined in (refine_halves, cross_check, partial(refine_against, reference=DENSITY)):
            with pytest.raises(InputError, match=f"at least 20 images.*got {len(few)}"):
                refined(few)


def test_no_round_is_refused():
    with pytest.raises(InputError, match="rounds must be positive"):
        refine_halves(particles(), rounds=0)


# --------------------------------------------------------------------------------------
# Reference bias


def test_noise_refined_against_a_reference_ends_in_a_warning_not_a_map():
    with pytest.warns(UserWarning, match="may be the reference alone"):
        found = refine_against(
            particles(images=white(11)), DENSITY, resolution_angstrom=30.0, seed=1
        )
    assert found.density is None and not found.test.believable
    # The bias itself: where the reference was used, the halves do agree.
    assert maps.fsc(found.half_maps.first, found.half_maps.second).values[2:5].mean() > 0.2
    assert not found.half_maps.independent


def test_particles_refined_against_a_reference_give_a_map():
    # An image of 116 px says as much at SNR 1/16 as one of 40 px at 1/2.
    images, _ = noisy(1 / 2)
    given = particles(images=images, shifts_px=SHIFTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = refine_against(given, DENSITY, resolution_angstrom=30.0, search=ONE, seed=1)
    assert found.test.believable and found.density is not None
    assert found.test.resolution_angstrom == found.particles.resolution_angstrom == 30.0
    assert set(found.particles.half_set) == {1, 2}
    assert correlation(found.density.values, DENSITY.values) > 0.5
    assert_weighted_by_what_agrees(found.density, found.half_maps, found.fsc)


def test_particles_that_lie_wrongly_are_brought_to_where_a_reference_says():
    images, _ = noisy(1 / 2)
    lost = np.arange(N) % 6 == 0
    at = np.where(lost[:, None], off(TRUE, 2.0), off(TRUE, 0.1))
    given = particles(images=images, at=at, shifts_px=SHIFTS)
    found = refine_against(given, DENSITY, resolution_angstrom=30.0, search=ONE, seed=1)
    error = rotations.distance(found.particles.quaternions, TRUE)
    assert np.mean(error < 0.3) > 0.97
    assert 0.8 * lost.mean() < found.moved_fraction <= lost.mean()  # a few come back by themselves
    # All were refined there, too.
    assert found.particles.expected_error_rad[lost].mean() < 0.2


def test_in_loud_noise_particles_stay_unless_they_are_surely_likelier_elsewhere():
    """By chance one of the many places on the sphere is a little likelier than the right one."""
    images, _ = noisy(1 / 30)
    given = particles(images=images, shifts_px=SHIFTS, half_set=np.arange(N) % 2 + 1)
    _, by_chance = found_again(given, given, resolution_angstrom=30.0)
    with pytest.warns(UserWarning, match="may be the reference alone"):
        found = refine_against(given, DENSITY, resolution_angstrom=30.0, search=ONE)
    assert by_chance > 0.1 and found.moved_fraction < by_chance / 5


def test_what_another_place_must_be_likelier_by_are_the_odds_against_it():
    wide, point = Search(spread_rad=0.3), Search(spread_rad=0.0)
    places = 8 * np.pi**2 / (4 / 3 * np.pi * 0.3**3)
    assert elsewhere.by_chance(wide, "C1", 0.1) == pytest.approx(np.log(9 * places))
    assert elsewhere.by_chance(wide, "D2", 0.1) == pytest.approx(np.log(9 * places / 4))
    assert elsewhere.by_chance(wide, "C1", 0.01, 12) == pytest.approx(np.log(99 * 12 * places))
    # However near the given one is searched, as another place counts what lies apart from it.
    assert elsewhere.by_chance(point, "C1", 0.5) == pytest.approx(np.log(27 * places))


def test_of_loud_and_quiet_optics_groups_as_many_are_brought_back():
    """Judged by the mean of their noise the quiet ones were left, and the loud ones led astray."""
    images, _ = noisy(1 / 4)
    optics_group = np.arange(N) % 2
    scale = np.where(optics_group, 6.0, 1.0)
    lost = np.arange(N) % 6 < 2
    at = np.where(lost[:, None], off(TRUE, 2.0), off(TRUE, 0.1))
    given = particles(
        images=images * scale[:, None, None].astype(np.float32),
        at=at, shifts_px=SHIFTS, optics_group=optics_group,
    )  # fmt: skip
    found = refine_against(given, DENSITY, resolution_angstrom=30.0, search=ONE).particles
    wrong = rotations.distance(found.quaternions, TRUE) > 0.3
    for here in (optics_group == 0, optics_group == 1):
        assert wrong[here & lost].mean() < 0.2
        # And what is expected, how well they fit, and what they tell are alike.
        for of, value in (("chi2", 1.0), ("expected_error_rad", None), ("gain", None)):
            alike = np.median(getattr(found, of)) if value is None else value
            assert np.median(getattr(found, of)[here]) == pytest.approx(alike, rel=0.15)


def test_halves_tell_the_noise_of_the_optics_groups_that_they_hold():
    """A group that one half has none of was given the mean of all."""
    images, variance = noisy(1.0)
    group_of = np.arange(N) % 2
    images = np.where(group_of[:, None, None], 2, 1) * images
    given = particles(
        images=images.astype(np.float32), shifts_px=SHIFTS, optics_group=group_of,
        half_set=group_of + 1,
    )  # fmt: skip
    found = halves.refine_each_half(given, [DENSITY] * 2, resolution_angstrom=30.0, search=ONE)
    np.testing.assert_allclose(found.noise.variances, [variance, 4 * variance], rtol=0.1)
    # What is known of groups that none of the particles is of stays known; one row is of all.
    three = Noise(np.array([[1.0], [4.0], [9.0]]) * variance * np.ones(2))
    for noise, rows in ((three, 3), (Noise.white(variance), 2)):
        more = halves.refine_each_half(
            given.replace(noise=noise), [DENSITY] * 2, resolution_angstrom=30.0, search=JUDGE
        )
        assert len(more.noise.power) == rows
    # And of particles of one group, another one's noise is nothing to them.
    loud = found.select(group_of == 1)
    again = refine(loud, DENSITY, resolution_angstrom=30.0, search=ONE, noise_variance=4 * variance)
    assert np.median(again.chi2) == pytest.approx(1.0, rel=0.15)
    few = given.replace(noise=Noise(np.ones((2, 2))), optics_group=group_of + 1)
    with pytest.raises(InputError, match="optics_group 2, counted from 0, has no noise"):
        refine(few, DENSITY, resolution_angstrom=30.0)


@pytest.mark.parametrize("low_pass", [None, 40.0])
def test_a_reference_with_a_symmetry_gives_a_map_with_it(low_pass):
    alike = made_symmetric(DENSITY, "D2")
    images, _ = noisy(1 / 2, images=imaging.shift(projection.project(alike, TRUE), SHIFTS))
    given = particles(images=images, at=off(TRUE, 0.1), shifts_px=SHIFTS)
    # What is coarser than is used is enough, and its symmetry is asked of no finer detail.
    reference = alike if low_pass is None else alike.low_passed(low_pass)
    against = partial(refine_against, given, resolution_angstrom=low_pass or 30.0, search=ONE)
    plain, found = against(reference), against(reference, symmetry="D2")
    assert maps.has_symmetry(plain.half_maps, "D2") < maps.has_symmetry(found.half_maps, "D2")
    for half in (found.half_maps.first, found.half_maps.second):
        turned = maps.turned(half, group("D2").elements[1])
        np.testing.assert_allclose(turned.values, half.values, atol=1e-3)
    assert correlation(found.density.values, alike.values) > correlation(
        plain.density.values, alike.values
    )
    for other in (DENSITY, DENSITY.low_passed(30.0)):
        with pytest.raises(InputError, match=r"reference has not the symmetry D2, its axes where"):
            refine_against(given, other, resolution_angstrom=30.0, symmetry="D2")


def test_every_step_against_a_reference_is_told_its_symmetry(monkeypatch):
    module, told = "cryoem.refinement.reference", {}

    def spied(name, function):
        def spy(*arguments, **options):
            told[name] = options["symmetry"]
            return function(*arguments, **options)

        return spy

    monkeypatch.setattr(f"{module}.found_again", spied("again", elsewhere.found_again))
    monkeypatch.setattr(f"{module}.maps.reference_bias", spied("bias", maps.reference_bias))
    alike = made_symmetric(DENSITY, "C2")
    given = particles(images=projection.project(alike, TRUE), at=off(TRUE, 0.1))
    found = refine_against(given, alike, resolution_angstrom=30.0, symmetry="C2", search=ONE)
    assert told == {"again": "C2", "bias": "C2"}
    assert found.moved_fraction == 0
    # Where there is hardly any noise another of the orbit is likelier by rounding alone.
    found = refine_against(given, alike, resolution_angstrom=30.0, search=ONE)
    assert found.moved_fraction == 0


def test_particles_that_have_not_the_symmetry_of_their_reference_are_said():
    """Half-maps that are both made symmetric agree, beyond the reference too."""
    given = particles(images=noisy(1.0)[0], at=off(TRUE, 0.1), shifts_px=SHIFTS)
    alike = made_symmetric(DENSITY, "C2")
    with pytest.warns(UserWarning, match="has not the symmetry C2"):
        refine_against(given, alike, resolution_angstrom=30.0, symmetry="C2", search=ONE)


def test_a_compact_symmetric_particle_is_brought_into_the_references_frame():
    """It is like itself however it lies."""
    alike = made_symmetric(DENSITY, "D2")
    images, _ = noisy(1 / 2, images=projection.project(alike, TRUE))
    lies = rotations.multiply(rotations.uniform(1, 8)[0], TRUE)
    with pytest.warns(UserWarning, match="in another frame than the reference"):
        found = in_frame_of(particles(images=images, at=lies), alike)
    assert group("D2").distance(found.oriented(), TRUE).max() < 0.1


@pytest.mark.parametrize("mirrored", [False, True])
def test_orientations_in_another_frame_are_brought_into_the_references(mirrored):
    images, _ = noisy(1 / 2)
    elsewhere = rotations.multiply(rotations.uniform(1, 8)[0], TRUE)
    if mirrored:
        elsewhere = rotations.other_hand(elsewhere)
    given = particles(images=images, at=elsewhere, shifts_px=SHIFTS)
    with pytest.warns(UserWarning, match="in another frame than the reference") as told:
        found = in_frame_of(given, DENSITY)
    assert ("hand exchanged" in str(told[0].message)) == mirrored
    assert rotations.distance(found.quaternions, TRUE).max() < 0.1
    assert np.abs(found.shifts_px - SHIFTS).max() < 0.5


@pytest.mark.parametrize("voxel", [0.5, 0.75, 1.0, 1.4])
def test_a_reference_of_another_size_is_said(shipped, voxel):
    """Its header's voxels may be wrong."""
    reference = shipped["4jsv"].resampled(40)
    other = Density(reference.values, voxel * reference.voxel_size_angstrom)
    other = other.sampled_as(40, reference.voxel_size_angstrom)
    given = simulate(reference, 100, 1, snr=1.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        in_frame_of(given, other)
    sizes = [text for text in map(str, (w.message for w in said)) if "times as large" in text]
    assert len(sizes) == (voxel != 1), said


def test_orientations_in_the_references_frame_stay():
    images, _ = noisy(1 / 2)
    given = particles(images=images, at=off(TRUE, 0.2), shifts_px=SHIFTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert in_frame_of(given, DENSITY) is given
        assert in_frame_of(noise := particles(images=white(3)), DENSITY) is noise


def test_a_shift_between_the_frames_moves_the_images_too():
    moved = maps.turned(DENSITY, np.array([0.0, 0, 0, 1]), np.array([10.0, -15.0, 5.0]))
    given = particles(images=noisy(1)[0], shifts_px=SHIFTS)
    with pytest.warns(UserWarning, match="in another frame"):
        found = in_frame_of(given, moved)
    again = projection.project(moved, found.quaternions)
    again = imaging.shift(again, found.shifts_px)
    assert relative_error(again, CLEAN) < 0.2


@pytest.mark.parametrize("scale", [1e-10, 1e8])
def test_the_scale_of_the_images_does_not_matter(scale):
    """Half-maps of large contrasts were not finite, of small ones they did not agree."""
    images, _ = noisy(1)
    given = particles(images=images, shifts_px=SHIFTS)
    plain, scaled = (
        refine_against(one, DENSITY, resolution_angstrom=30.0, search=ONE)
        for one in (given, given.with_images(images * np.float32(scale)))
    )
    assert scaled.test.correlation == pytest.approx(plain.test.correlation, abs=1e-3)
    np.testing.assert_allclose(scaled.particles.contrast, scale * plain.particles.contrast, 1e-3)


def test_a_reference_of_another_box_is_refused():
    with pytest.raises(InputError, match="40 px, got 80"):
        refine_against(particles(5), SHARP.density(2 * BOX, VOXEL / 2))


def test_a_reference_that_does_not_fit_or_is_empty_is_refused():
    given = particles(5)
    other, empty = Density(DENSITY.values, 1.2 * VOXEL), Density(0 * DENSITY.values, VOXEL)
    with pytest.raises(InputError, match="voxels of the images' 5 A, got 6 A"):
        refine_against(given, other, resolution_angstrom=30.0)
    with pytest.raises(InputError, match="40 px, got 80"):
        in_frame_of(given, SHARP.density(2 * BOX, VOXEL))
    with pytest.raises(InputError, match="the same everywhere"):
        check_reference(empty, 30.0)
    for scale in (1e-20, 1e20):  # of which single precision makes nothing, or infinities
        with pytest.raises(InputError, match=r"the reference's values reach .*: scale it"):
            check_reference(Density(scale * DENSITY.values, VOXEL), 30.0)
    raised = Density(made_symmetric(DENSITY, "D2").values + 0.2 * DENSITY.values.max(), VOXEL)
    with pytest.warns(UserWarning, match="solvent is at"):
        check_reference(raised, 30.0, "D2")  # not refused: it has the symmetry


def test_a_resolution_beyond_which_no_bias_is_to_be_told_is_refused_at_once(monkeypatch):
    """After the refinement, that is minutes, it had been."""
    monkeypatch.setattr("cryoem.refinement.reference.refine", None)
    with pytest.raises(InputError, match=r"nothing is left beyond 10 A in voxels of 5 A"):
        refine_against(particles(5), DENSITY, resolution_angstrom=FINEST)


def test_a_symmetry_that_the_particles_have_not_is_said():
    symmetric = made_symmetric(DENSITY, "D2")
    lies = maps.turned(symmetric, rotations.uniform(1, 8)[0])
    for density, said in ((symmetric, False), (lies, True), (DENSITY, True)):
        clean = projection.project(density, TRUE)
        images = clean + clean.std() * np.random.default_rng(4).standard_normal(clean.shape)
        seen = particles(images=images.astype(np.float32), at=off(TRUE, 0.05))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            ratio = check_symmetry(seen, "D2")
        assert ratio < 0.6 if said else ratio > 0.9
        assert ["has not the symmetry D2" in str(w.message) for w in told] == [True] * said
    # What half-maps that do not agree show has no symmetry, nor lacks one.
    assert np.isnan(check_symmetry(particles(images=white(3)), "D2"))
    assert np.isnan(check_symmetry(seen.select(slice(1)), "D2"))


@pytest.mark.parametrize("name", ["D3", "O"])
def test_orientations_of_one_asymmetric_unit_tell_no_symmetry(name):
    """As RELION leaves them: without the others of their orbits most of the map is unseen."""
    elements, alike = group(name).elements, made_symmetric(DENSITY, name)
    orbits = rotations.multiply(elements[:, None], TRUE)
    towards = rotations.view_directions(orbits.reshape(-1, 4)).reshape(*orbits.shape[:2], 3)
    nearest = (towards @ np.array([0.5, 0.2, 0.84])).argmax(axis=0)
    unit = orbits[nearest, np.arange(N)]
    seen = particles(images=projection.project(alike, unit), at=unit)
    pair = rounds.half_maps(seen.with_half_sets(0), independent=False)
    assert maps.has_symmetry(pair, name) < 0.8  # though the particle has it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(check_symmetry(seen, name))


def test_what_shows_nothing_tells_no_symmetry():
    one = particles().select(np.zeros(4, int))
    assert np.isnan(check_symmetry(one, "D2"))
    two = particles().select(slice(2)).replace(contrast=np.array([1.0, 0.0]))
    assert np.isnan(check_symmetry(two, "D2"))
    with pytest.raises(InputError, match="symmetry must be"):
        check_symmetry(one, "banana")
