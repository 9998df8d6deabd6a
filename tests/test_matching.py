"""Projection matching against a density that is known."""

import numpy as np
import pytest

from cryoem import evaluation, imaging, rotations
from cryoem.density import Density
from cryoem.errors import InputError
from cryoem.io.stacks import open_array
from cryoem.matching import candidates, match, orientations
from cryoem.noise import from_powers
from cryoem.particles import CtfParameters, ParticleStack
from cryoem.preprocessing import Preprocessing
from cryoem.projection import project
from cryoem.symmetry import group

BOX, VOXEL = 32, 7.0
WHOLE = Preprocessing(BOX, BOX, BOX, VOXEL)
#: 3000 balls of this radius fill SO(3).
BALL = (6 * np.pi / 3000) ** (1 / 3)


@pytest.fixture(scope="module")
def density(phantom):
    return phantom.density(BOX, VOXEL)


def test_a_reference_matches_itself(density):
    known = orientations(500)[::52]
    stack = ParticleStack(3 * project(density, known) + 1, VOXEL)
    found = match(stack, density, WHOLE, references=500)
    np.testing.assert_allclose(found.quaternions, known, atol=1e-12)
    np.testing.assert_allclose(found.scores, 1, atol=1e-5)
    assert found.images is stack.images


@pytest.mark.parametrize("symmetry", ["C1", "D2", "C7", "O"])
def test_references_cover_orientations_evenly(symmetry):
    """As an even grid of as many over the whole sphere does, and none twice."""
    points = group(symmetry)
    n = 1000 * max(6, points.order)
    known, true = orientations(n, symmetry), rotations.uniform(500, 3)
    assert len(known) == pytest.approx(n / points.order, rel=0.05)
    orbits = rotations.multiply(points.elements[:, None], known).reshape(-1, 4)
    off = 2 * np.arccos(np.clip(np.abs(true @ orbits.T).max(axis=1), 0, 1))
    even = 2 * np.arccos(np.clip(np.abs(true @ rotations.grid(n).T).max(axis=1), 0, 1))
    assert off.mean() < 1.05 * even.mean() and off.max() < 1.4 * even.max()
    between = np.abs(known @ orbits.T)
    np.put_along_axis(between, np.arange(len(known))[:, None], 0.0, axis=1)  # each is itself
    assert 2 * np.arccos(np.clip(between.max(), 0, 1)) > 0.05 * even.mean()


def test_every_reference_is_found_turned_and_mirrored_or_not(density):
    known = orientations(24)
    stack = ParticleStack(project(density, known), VOXEL)
    found = match(stack, density, WHOLE, references=24)
    np.testing.assert_allclose(found.quaternions, known, atol=1e-12)
    np.testing.assert_allclose(found.scores, 1, atol=1e-5)
    alone = match(stack, density, WHOLE, references=1)  # eight of one projection
    assert {*map(tuple, alone.quaternions.round(6))} <= {*map(tuple, orientations(1).round(6))}
    assert len(orientations(1)) == 8


def test_matching_is_right_to_its_grid(phantom, density):
    true = rotations.uniform(300, 3)  # more than are matched at once
    stack = ParticleStack(phantom.project(true, BOX, VOXEL), VOXEL)
    found = match(stack, density, WHOLE, references=3000)
    off = rotations.distance(found.quaternions, true)
    # The best correlation is near the nearest reference.
    assert off.mean() < BALL and off.max() < 3 * BALL
    assert (found.scores > 0.9).all() and (found.scores <= 1 + 1e-5).all()


def test_given_shifts_are_undone(density):
    known = rotations.uniform(8, 4)
    images, shifts = project(density, known), imaging.triangular_shifts(8, 1, 4.0)
    moved = ParticleStack(imaging.shift(images, shifts), VOXEL, shifts_px=shifts)
    plain = match(ParticleStack(images, VOXEL), density, WHOLE, references=500)
    found = match(moved, density, WHOLE, references=500)
    np.testing.assert_array_equal(found.quaternions, plain.quaternions)
    np.testing.assert_array_equal(found.shifts_px, shifts)


def test_each_images_shifts_are_tried_at_every_orientation(density):
    known = orientations(500)[::52]
    shifts = imaging.triangular_shifts(10, 1, 4.0)
    stack = ParticleStack(imaging.shift(project(density, known), shifts), VOXEL)
    tried = np.stack([shifts + 5, shifts, np.zeros((10, 2))], axis=1)
    q, at_px, scores = candidates(stack, density, WHOLE, shifts_px=tried, references=500)
    np.testing.assert_allclose(q[:, 0], known, atol=1e-12)
    np.testing.assert_array_equal(at_px[:, 0], shifts)
    np.testing.assert_allclose(scores, 1, atol=1e-4)


def test_phases_are_flipped_by_each_images_ctf(phantom, density, tmp_path):
    n = 60
    true = rotations.uniform(n, 5)
    defoci = np.random.default_rng(6).uniform(50_000, 120_000, n)
    parameters = CtfParameters(defoci, defoci - 2_000, 30.0)
    images = imaging.apply_ctf(phantom.project(true, BOX, VOXEL), parameters.values(BOX, VOXEL))
    np.save(tmp_path / "images.npy", images)
    stack = ParticleStack(open_array(tmp_path / "images.npy"), VOXEL, ctf_parameters=parameters)
    found, ignored = (
        evaluation.orientation_errors(
            match(x, density, WHOLE, references=3000).quaternions, true, over="none"
        ).mean_rad
        for x in (stack, stack.replace(ctf_parameters=None))
    )
    assert found < 1.2 * BALL
    assert ignored > 1.5 * found
    some = np.array([41, 3])
    np.testing.assert_array_equal(
        match(stack.select(some), density, WHOLE, references=500).quaternions,
        match(stack, density, WHOLE, references=500).quaternions[some],
    )


def test_what_was_known_of_other_orientations_is_forgotten(density):
    stack = ParticleStack(
        project(density, rotations.uniform(3, 4)),
        VOXEL,
        contrast=np.ones(3),
        expected_error_rad=np.full(3, 0.1),
    )
    found = match(stack, density, WHOLE, references=50)
    assert found.contrast is None and found.expected_error_rad is None


def test_candidates_are_places_of_their_own(density):
    known = orientations(500)[::52]
    stack = ParticleStack(project(density, known), VOXEL)
    options = {"count": 3, "apart_rad": 0.8, "references": 500}
    q, _, scores = candidates(stack, density, WHOLE, **options)
    assert q.shape == (10, 3, 4) and (np.diff(scores, axis=1) < 0).all()
    np.testing.assert_allclose(q[:, 0], known, atol=1e-12)
    np.testing.assert_allclose(q[:, 0], match(stack, density, WHOLE, references=500).quaternions)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (rotations.distance(q[:, a], q[:, b]) > 0.8).all()
    # Those that the symmetry makes one are one; where there are no more, the score says so.
    q, _, scores = candidates(stack, density, WHOLE, symmetry="D2", **options)
    more = np.isfinite(scores[:, 1])
    assert more.any() and (group("D2").distance(q[:, 0], q[:, 1])[more] > 0.8).all()
    *_, scores = candidates(stack, density, WHOLE, count=2, apart_rad=4.0, references=500)
    assert (scores[:, 1] == -np.inf).all()


def test_coarse_references_are_the_projections_made_coarse(density):
    """References are projected in the pixels in which they are compared, and images made coarse."""
    known = orientations(500)[::25]
    images = project(density, known)
    noisy = images + np.random.default_rng(1).normal(0, 0.3 * images.std(), images.shape)
    coarse = Preprocessing(BOX, BOX // 2, BOX // 2 - 2, VOXEL)
    for noise in (None, from_powers(np.geomspace(8, 1, BOX // 2 + 1)[None], BOX)):
        stack = ParticleStack(noisy, VOXEL, noise=noise)
        found = match(stack, density, coarse, references=500)
        np.testing.assert_allclose(found.quaternions, known, atol=1e-12)
    with pytest.raises(InputError, match="density in a box of 32, as the images; got 24"):
        match(stack, density.in_box(24), coarse, references=20)


def test_noise_matches_badly(density):
    noise = np.random.default_rng(0).standard_normal((20, BOX, BOX))
    found = match(ParticleStack(noise, VOXEL), density, WHOLE, references=500)
    assert found.scores.max() < 0.5
    np.testing.assert_allclose(np.linalg.norm(found.quaternions, axis=1), 1, atol=1e-12)


def test_a_density_that_is_not_as_the_images_are_is_refused(density):
    """Its orientations had been wrong, and nothing was said."""
    stack = ParticleStack(project(density, rotations.uniform(3, 0)), VOXEL)
    with pytest.raises(InputError, match=r"in voxels of the images' 7 A, got 8 A; .*sampled_as"):
        match(stack, Density(density.values, 8.0), WHOLE, references=24)
    with pytest.raises(InputError, match="black on white"):
        match(stack, Density(-density.values, VOXEL), WHOLE, references=24)
    near = Density(density.values, 1.005 * VOXEL)  # as headers are rounded
    assert match(stack, near, WHOLE, references=24).quaternions.shape == (3, 4)


def test_no_image_has_no_match(density):
    none = ParticleStack(np.zeros((0, BOX, BOX)), VOXEL)
    found = match(none, density, WHOLE, references=20)
    assert found.quaternions.shape == (0, 4) and found.scores.shape == (0,)
