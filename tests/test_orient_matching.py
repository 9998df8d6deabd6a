"""Orienting images. An oracle stands in for the network: it finds orientations by refinement
against the density and hands out features that represent their distances exactly, so that what is
tested is everything after the network."""

import numpy as np
import pytest
from measures import Sees, gauss_newton, packed

from cryoem import distances, evaluation, imaging, matching, orient, rotations, simulation
from cryoem.errors import InputError
from cryoem.projection import project

BOX, VOXEL = 32, 7.0


@pytest.fixture(scope="module")
def density(phantom):
    return phantom.density(BOX, VOXEL)


@pytest.fixture(scope="module")
def whole():
    return simulation.Preprocessing(BOX, BOX, BOX, VOXEL)


class Oracle(Sees):
    def __init__(self, density, preprocessing):
        self.density, self.preprocessing = density, preprocessing

    def embed(self, images):
        start = matching.match(images, self.density, self.preprocessing, references=3000)
        return packed(gauss_newton(images, self.density, start.quaternions, 4)).astype(np.float32)

    def distances(self, features, others):
        return distances.from_features(features, others, self.head)


# --------------------------------------------------------------------------------------
# Projection matching


def test_a_reference_matches_itself(density, whole):
    known = rotations.grid(500)[::50]
    found = matching.match(3 * project(density, known) + 1, density, whole, references=500)
    np.testing.assert_array_equal(found.quaternions, known)
    np.testing.assert_allclose(found.scores, 1, atol=1e-5)


def test_matching_is_right_to_its_grid(phantom, density, whole):
    true = rotations.uniform(200, 3)
    images = phantom.project(true, BOX, VOXEL)
    found = matching.match(images, density, whole, references=3000)
    error = evaluation.errors(found.quaternions, true, over="none")
    # 3000 balls of this radius fill SO(3); the best correlation is near the nearest reference.
    assert error.mean_rad < (6 * np.pi / 3000) ** (1 / 3)
    assert (found.scores > 0.9).all() and (found.scores <= 1 + 1e-5).all()


def test_given_shifts_are_undone_and_rows_chosen(density, whole):
    known = rotations.uniform(8, 4)
    images, rows = project(density, known), np.array([5, 2])
    plain = matching.match(images, density, whole, references=500)
    shifts = imaging.triangular_shifts(8, 1, 4.0)
    moved = imaging.shift(images, shifts)
    asked = []
    found = matching.match(
        moved,
        density,
        whole,
        rows=rows,
        shifts_px=shifts,
        ctf=lambda these: asked.append(these.tolist()),
        references=500,
    )
    np.testing.assert_array_equal(found.quaternions, plain.quaternions[rows])
    assert asked == [rows.tolist()]


def test_noise_matches_badly(density, whole):
    images = np.random.default_rng(0).standard_normal((20, BOX, BOX))
    found = matching.match(images, density, whole, references=500)
    assert found.scores.max() < 0.5
    np.testing.assert_allclose(np.linalg.norm(found.quaternions, axis=1), 1, atol=1e-12)


def test_no_image_has_no_match(density, whole):
    found = matching.match(np.zeros((0, BOX, BOX)), density, whole, references=20)
    assert found.quaternions.shape == (0, 4) and found.scores.shape == (0,)


# --------------------------------------------------------------------------------------
# Orienting


def test_images_alone_fix_all_but_the_density_and_its_hand(phantom, density, whole):
    true = rotations.uniform(150, 4)
    found = orient.orient(
        Oracle(density, whole), phantom.project(true, BOX, VOXEL), copies=60, anchors=90
    )
    assert found.quaternions.shape == (150, 4) and found.residuals_rad.shape == (150,)
    assert found.frame.certain and not found.frame.hand_known
    # The oracle's own error is an interpolation's; float32 distances near 0 add 1e-3.
    assert evaluation.errors(found.quaternions, true, over="one-sided").median_rad < 0.01
    assert np.median(found.residuals_rad) < 0.01
    # What no projection tells is left to the user: two sets, the second of the other hand.
    first, second = found.hands
    np.testing.assert_array_equal(first, found.quaternions)
    np.testing.assert_array_equal(second, rotations.other_hand(first))


def test_references_fix_everything(phantom, density, whole):
    true = rotations.uniform(60, 5)
    found = orient.orient_by_references(
        Oracle(density, whole), phantom.project(true, BOX, VOXEL), density, references=200
    )
    assert found.frame is None and len(found.hands) == 1
    assert evaluation.errors(found.quaternions, true, over="none").median_rad < 0.01
    assert np.median(found.residuals_rad) < 0.01


def test_a_trained_network_orients_better_than_chance(phantom, trained):
    network, _ = trained
    made = simulation.particles(phantom.density(32, 7.0), 150, 8)
    found = orient.orient_by_references(
        network, made.images, phantom.density(32, 7.0), references=400
    )
    error = evaluation.errors(found.quaternions, made.quaternions, over="none").mean_rad
    chance = evaluation.random_error(made.quaternions, 99, over="none")
    assert error < 0.8 * chance
    assert found.features.shape == (150, 18)


def test_orienting_is_reproducible(phantom, trained):
    network, _ = trained
    images = phantom.project(rotations.uniform(40, 1), 32, 7.0)
    a, b = (orient.orient(network, images, copies=20, anchors=40, seed=3) for _ in range(2))
    np.testing.assert_array_equal(a.quaternions, b.quaternions)


class Noisy(Sees):
    """Features of known orientations; the i-th image is worth ``noise[i]``, copies alike."""

    def __init__(self, true, noise, seed):
        self.true, self.noise, self.rng = true, noise, np.random.default_rng(seed)

    def embed(self, images):
        # An image shows its number at the centre; beside it, its value there before it was moved.
        number = images[:, BOX // 2, BOX // 2].astype(int)
        q = self.true[number]
        if images[0, BOX // 2, BOX // 2 + 1] == -1:  # the pixel beside it, turned by 90 degrees
            q = rotations.in_plane(q, np.pi / 2)
        elif images[0, BOX // 2, BOX // 2 + 1] == -2:  # from the left, mirrored
            q = rotations.mirror_x(q)
        w = self.rng.standard_normal((len(q), 3)) * self.noise[number][:, None]
        f = packed(rotations.perturb(q, w))
        f += self.rng.standard_normal(f.shape) * self.noise[number][:, None] / 4
        return (f / np.linalg.norm(f, axis=1, keepdims=True)).astype(np.float32)


def test_copies_tell_how_large_errors_are():
    n = 400
    true = rotations.uniform(n, 0)
    noise = np.random.default_rng(1).choice([0.02, 0.1], n)
    images = np.zeros((n, BOX, BOX))
    c = BOX // 2
    images[:, c, c] = np.arange(n)
    for (y, x), mark in {(0, 1): 0, (0, -1): -2, (1, 0): -1, (-1, 0): -1}.items():
        images[:, c + y, c + x] = mark
    found = orient.orient(Noisy(true, noise, 2), images, copies=200, anchors=128)
    aligned = evaluation.align(found.quaternions, true, over="one-sided").quaternions
    off = rotations.distance(aligned, true)
    # Here the errors of copies are independent, as the scale supposes.
    assert found.expected_error_rad.mean() == pytest.approx(off.mean(), rel=0.25)
    bad = noise > 0.05
    assert found.expected_error_rad[bad].mean() > 1.5 * found.expected_error_rad[~bad].mean()
    assert set(found.columns) == {
        "cryoemResidualRad",
        "cryoemLandmarksUsed",
        "cryoemExpectedErrorRad",
        "cryoemOutlier",
    }
    assert all(len(column) == n for column in found.columns.values())


def test_too_few_images_are_refused(trained):
    with pytest.raises(InputError, match="at least 24 images"):
        orient.orient(trained[0], np.zeros((23, 32, 32)))


def test_images_of_another_box_are_refused(trained):
    with pytest.raises(InputError, match="32 px"):
        orient.orient(trained[0], np.zeros((30, 40, 40)))
