"""Orienting images. An oracle stands in for the network: it finds orientations by refinement
against the density and hands out features that represent their distances exactly, so that what is
tested is everything after the network."""

from dataclasses import dataclass, fields
from types import SimpleNamespace

import numpy as np
import pytest
from measures import Lookup, Sees, gauss_newton, packed

from cryoem import evaluation, imaging, rotations, simulation
from cryoem.abinitio import place
from cryoem.density import Density
from cryoem.errors import InputError
from cryoem.matching import match
from cryoem.particles import CtfParameters, ParticleStack
from cryoem.preprocessing import Preprocessing
from cryoem.recovery import landmarks_from_copies, landmarks_from_references, orient
from cryoem.recovery.orienting import OrientedStack

BOX, VOXEL = 32, 7.0
#: 1500 balls of this radius fill SO(3).
BALL = (6 * np.pi / 1500) ** (1 / 3)


@pytest.fixture(scope="module")
def density(phantom):
    return phantom.density(BOX, VOXEL)


@pytest.fixture(scope="module")
def lookup(density):
    return Lookup(density)


class Oracle(Sees):
    def __init__(self, density):
        self.density = density
        self.preprocessing = Preprocessing(BOX, BOX, BOX, VOXEL)

    def embed(self, images, *, ctf=None):
        start = match(
            ParticleStack(images, VOXEL), self.density, self.preprocessing, references=3000
        )
        return packed(gauss_newton(images, self.density, start.quaternions, 4)).astype(np.float32)


def error(found, true, over="one-sided"):
    return evaluation.orientation_errors(np.array(found.quaternions), true, over=over).mean_rad


# --------------------------------------------------------------------------------------
# The frame


def test_images_alone_fix_all_but_the_density_and_its_hand(phantom, density):
    true = rotations.uniform(150, 4)
    stack = ParticleStack(phantom.project(true, BOX, VOXEL), VOXEL)
    found = orient(Oracle(density), stack, copies=60, landmarks=90)
    assert found.quaternions.shape == (150, 4) and found.residuals_rad.shape == (150,)
    assert found.frame.certain and not found.frame.hand_known
    # The oracle's own error is an interpolation's; float32 distances near 0 add 1e-3.
    errors = evaluation.orientation_errors(found.quaternions, true, over="one-sided")
    assert errors.median_rad < 0.01
    assert np.median(found.residuals_rad) < 0.01
    # What no projection tells is left to the user: two stacks, the second of the other hand.
    first, second = found.hands
    assert first is found
    np.testing.assert_allclose(
        second.quaternions, rotations.other_hand(found.quaternions), atol=1e-12
    )


def test_references_fix_everything(phantom, density, lookup):
    true = rotations.uniform(60, 5)
    images = phantom.project(true, BOX, VOXEL)
    oracle = Oracle(density)
    placed = landmarks_from_references(oracle, density, images, references=200)
    rows = placed.place(oracle, images)
    off = rotations.distance(rows["quaternions"], true)
    assert np.median(off) < 0.01 and np.median(rows["residuals_rad"]) < 0.01
    found = orient(lookup, ParticleStack(images, VOXEL), reference=density)
    assert found.frame is None and len(found.hands) == 1
    assert error(found, true, over="none") < BALL


def test_images_that_fit_no_reference_are_flagged(density):
    class Torn(Lookup):
        def embed(self, images, *, ctf=None):
            features = super().embed(images)
            # What is not the particle: its image is dark.
            return np.where(images.mean(axis=(1, 2))[:, None] < 0, -features, features)

    made = simulation.simulate(density, 60, 8)
    images = np.array(made.images)
    images[[7, 50]] *= -1
    found = orient(Torn(density), made.with_images(images), reference=density, landmarks=60)
    assert found.outlier[[7, 50]].all() and found.outlier.sum() <= 4


def test_a_trained_network_orients_better_than_chance(phantom, trained):
    network, _ = trained
    made = simulation.simulate(phantom.density(32, 7.0), 150, 8)
    found = orient(network, made, reference=phantom.density(32, 7.0))
    chance = evaluation.random_error(made.quaternions, 99, over="none")
    assert error(found, made.quaternions, over="none") < 0.8 * chance
    assert found.features.shape == (150, 18)


def test_those_that_made_the_map_judge_a_network_that_places_the_others(phantom, trained):
    """They stay where they are; what it is off on them scales the errors that it expects."""
    network, _ = trained
    density = phantom.density(32, 7.0)
    truth = simulation.simulate(density, 80, 5, snr=float("inf"))
    rows = np.arange(0, 80, 2)
    known = truth.select(rows).replace(expected_error_rad=np.full(40, 0.01))
    found = place(network, truth.without_poses(), rows, known, density, seed=1)
    bare = orient(network, truth.without_poses(), reference=density, seed=1)
    at, others = found.particles, np.arange(1, 80, 2)
    np.testing.assert_allclose(at.quaternions[rows], known.quaternions, atol=1e-12)
    np.testing.assert_allclose(at.quaternions[others], bare.quaternions[others], atol=1e-12)
    off = rotations.distance(bare.quaternions[rows], known.quaternions)
    assert found.mean_rad == pytest.approx(off.mean())
    assert found.median_rad == pytest.approx(np.median(off))
    assert 1.8 < found.chance_rad < 2.8 and found.median_rad < found.chance_rad / 2
    np.testing.assert_array_equal(at.expected_error_rad[rows], 0.01)
    scale = at.expected_error_rad[others] / bare.expected_error_rad[others]
    np.testing.assert_allclose(scale, off.mean() / bare.expected_error_rad[rows].mean())
    with_group = place(network, truth.without_poses(), rows, known, density, symmetry="D2", seed=1)
    assert with_group.chance_rad < found.chance_rad - 0.3  # the nearest of four


def test_orienting_is_reproducible(phantom, trained):
    network, _ = trained
    stack = ParticleStack(phantom.project(rotations.uniform(40, 1), 32, 7.0), 7.0)
    a, b = (orient(network, stack, copies=20, landmarks=40, seed=3) for _ in range(2))
    np.testing.assert_array_equal(a.quaternions, b.quaternions)


def test_a_symmetric_particle_needs_references(density, lookup):
    symmetric = Lookup(density)
    object.__setattr__(symmetric, "symmetry", "D2")
    made = simulation.simulate(density, 30, 1)
    with pytest.raises(InputError, match=r"D2.*references of its density"):
        orient(symmetric, made)


# --------------------------------------------------------------------------------------
# Where and by whom it is done


def test_in_memory_is_as_good_as_in_a_work_folder(density, lookup, tmp_path):
    made = simulation.simulate(density, 60, 8, max_shift_px=1.0)
    options = {"landmarks": 40, "copies": 20, "chunk": 25}
    for reference in (None, density):
        work = tmp_path / str(reference is None)
        in_memory, fresh, again = (
            orient(lookup, made, reference=reference, work=folder, **options)
            for folder in (None, work, work)
        )
        for found in (fresh, again):
            for f in fields(OrientedStack):
                one, other = getattr(in_memory, f.name), getattr(found, f.name)
                if isinstance(one, np.ndarray):
                    np.testing.assert_array_equal(one, other, err_msg=f.name)
            assert in_memory.columns.keys() == found.columns.keys()
            if reference is None:
                for name, value in vars(in_memory.frame).items():
                    np.testing.assert_array_equal(value, vars(found.frame)[name])


def test_the_truth_is_not_used(density, lookup):
    made = simulation.simulate(density, 40, 8)
    known = made.replace(contrast=np.full(40, 2.0), expected_error_rad=np.zeros(40))
    blind, seeing = (orient(lookup, x, landmarks=30) for x in (made.without_poses(), known))
    np.testing.assert_array_equal(blind.quaternions, seeing.quaternions)
    np.testing.assert_array_equal(blind.expected_error_rad, seeing.expected_error_rad)
    # A contrast belonged to another pose.
    assert seeing.contrast is None


# --------------------------------------------------------------------------------------
# CTF and shifts


def defocused(phantom, n=150):
    """Images of strongly astigmatic CTFs, and their orientations."""
    true = rotations.uniform(n, 4)
    defoci = np.random.default_rng(5).uniform(50_000, 100_000, n)
    parameters = CtfParameters(defoci, defoci + 50_000, np.linspace(0, 180, n))
    images = imaging.apply_ctf(phantom.project(true, BOX, VOXEL), parameters.values(BOX, VOXEL))
    return ParticleStack(images, VOXEL, ctf_parameters=parameters), true


def test_phases_are_flipped_by_the_ctf(phantom, density, lookup):
    stack, true = defocused(phantom)
    found = orient(lookup, stack, landmarks=100, chunk=40)
    assert found.frame.certain and error(found, true) < 1.5 * BALL
    referred = orient(lookup, stack, reference=density, landmarks=100)
    assert error(referred, true, over="none") < 1.5 * BALL
    assert referred.outlier.mean() < 0.1
    ignored = orient(lookup, stack.replace(ctf_parameters=None), reference=density)
    assert error(ignored, true, over="none") > 2 * error(referred, true, over="none")


def test_phases_are_flipped_before_copies_are_turned(phantom, lookup):
    # An astigmatic CTF does not turn with the image.
    stack, _ = defocused(phantom, 100)
    flipped = imaging.flip_phases(stack.images, stack.ctf())
    placed = landmarks_from_copies(lookup, stack.images, ctf=stack.ctf(), copies=60)
    wanted = landmarks_from_copies(lookup, flipped, copies=60)
    assert placed.frame.spread_rad == pytest.approx(wanted.frame.spread_rad, rel=1e-3)


def test_outliers_are_told_from_images_whose_phases_are_flipped(phantom, density):
    class Rough(Lookup):
        """What it sees of an image is off by what the image shows."""

        def embed(self, images, *, ctf=None):
            images = images if ctf is None else imaging.flip_phases(images, ctf)
            features = super().embed(images) + 0.05 * self.prepared(images)[:, 500:516]
            return features / np.linalg.norm(features, axis=1, keepdims=True)

    stack, _ = defocused(phantom, 100)
    flipped = imaging.flip_phases(stack.images, stack.ctf())
    largest, wanted, ignored = (
        landmarks_from_references(
            Rough(density), density, images, ctf=ctf
        ).landmarks.outlier_above_rad
        for images, ctf in ((stack.images, stack.ctf()), (flipped, None), (stack.images, None))
    )
    assert largest == pytest.approx(wanted, rel=1e-3) != pytest.approx(ignored, rel=0.01)


@dataclass(frozen=True)
class Centring(Lookup):
    """Predicts a shift where it is asked to centre images, and how far off it is."""

    passes: int = 2

    @property
    def centres_images(self):
        return self.passes > 1

    def predict(self, images, *, ctf=None):
        n = len(images)
        return SimpleNamespace(
            features=self.embed(images, ctf=ctf),
            shifts_px=np.tile([self.passes, -1.0], (n, 1)),
            expected_error_rad=self.passes * np.linspace(0.1, 0.2, n),
        )


def test_shifts_are_those_predicted_or_the_stacks_own(density):
    network = Centring(density)
    made = simulation.simulate(density, 60, 8, max_shift_px=5.0)
    predicted = orient(network, made, landmarks=40)
    np.testing.assert_array_equal(predicted.shifts_px, np.tile([2.0, -1.0], (60, 1)))
    # Centred: what the stack says is undone, and nothing is predicted in its place.
    centred = orient(network, made, landmarks=40, centred=True)
    np.testing.assert_array_equal(centred.shifts_px, made.shifts_px)
    np.testing.assert_allclose(centred.expected_error_rad, np.linspace(0.1, 0.2, 60))  # read once
    assert error(centred, made.quaternions) < 1.5 * BALL < error(predicted, made.quaternions)
    # A network that reads once predicts no shift that could be undone.
    once = orient(Lookup(density), made, landmarks=40)
    np.testing.assert_array_equal(once.shifts_px, made.shifts_px)


# --------------------------------------------------------------------------------------
# Expected errors


class Noisy(Sees):
    """Features of known orientations; the i-th image is worth ``noise[i]``, copies alike."""

    def __init__(self, true, noise, seed):
        self.true, self.noise, self.rng = true, noise, np.random.default_rng(seed)

    def embed(self, images, *, ctf=None):
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
    stack = ParticleStack(images, VOXEL, columns={"mine": np.arange(n)})
    found = orient(Noisy(true, noise, 2), stack, copies=200, landmarks=128)
    aligned = evaluation.align(found.quaternions, true, over="one-sided").quaternions
    off = rotations.distance(aligned, true)
    # Here the errors of copies are independent, as the scale supposes.
    assert found.expected_error_rad.mean() == pytest.approx(off.mean(), rel=0.25)
    bad = noise > 0.05
    assert found.expected_error_rad[bad].mean() > 1.5 * found.expected_error_rad[~bad].mean()
    assert list(found.columns) == [
        "mine",
        "cryoemResidualRad",
        "cryoemLandmarksUsed",
        "cryoemOutlier",
    ]
    np.testing.assert_array_equal(found.columns["cryoemResidualRad"], found.residuals_rad)
    np.testing.assert_array_equal(found.columns["cryoemOutlier"], found.outlier)


def test_what_a_network_expects_of_itself_is_taken(density):
    found = orient(Centring(density), simulation.simulate(density, 40, 8), landmarks=30)
    np.testing.assert_allclose(found.expected_error_rad, 2 * np.linspace(0.1, 0.2, 40))


# --------------------------------------------------------------------------------------
# Refused


def test_too_few_images_are_refused(trained):
    with pytest.raises(InputError, match="at least 24 images"):
        orient(trained[0], ParticleStack(np.zeros((23, 32, 32)), 7.0))


def test_images_of_another_box_are_refused(trained):
    """Where something would be lost: narrower than what is read, or coarser."""
    for box, pixel in ((30, 7.0), (28, 7.0), (32, 6.0), (15, 15.0), (12, 14.0)):
        with pytest.raises(
            InputError, match=f"made for images of 32 px.*got {box} px of {pixel:g} A"
        ):
            orient(trained[0], ParticleStack(np.zeros((30, box, box)), pixel))


def test_a_reference_of_another_box_is_refused(trained):
    with pytest.raises(InputError, match="32 px"):
        orient(
            trained[0],
            ParticleStack(np.zeros((30, 32, 32)), 7.0),
            reference=Density(np.ones((40,) * 3), 7.0),
        )


def test_a_reference_that_is_not_as_the_images_are_is_refused(phantom, trained):
    """Orientations had been wrong, and nothing was said."""
    cube = phantom.density(32, 7.0)
    stack = ParticleStack(np.zeros((30, 32, 32)), 7.0)
    with pytest.raises(InputError, match=r"in voxels of the images' 7 A, got 8 A; .*sampled_as"):
        orient(trained[0], stack, reference=Density(cube.values, 8.0))
    with pytest.raises(InputError, match="black on white"):
        orient(trained[0], stack, reference=Density(-cube.values, 7.0))
    aside = Density(np.roll(cube.values, (3, -8, 6), axis=(0, 1, 2)), 7.0)
    with pytest.raises(InputError, match=r"off the middle.*wanted it moved there, by -5, 7, -5"):
        orient(trained[0], stack, reference=aside)
