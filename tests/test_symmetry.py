"""Point groups: features of orbits, their kernel, and back to orientations."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryoem import rotations, symmetry
from cryoem.errors import InputError

NAMES = ["C1", "C2", "C3", "C7", "D2", "D3", "D7", "T", "O", "I"]
Q = rotations.uniform(200, rotations.generator(0, "test"))
P = rotations.uniform(200, rotations.generator(1, "test"))


ORDERS = [("C1", 1), ("C4", 4), ("D2", 4), ("D7", 14), ("T", 12), ("O", 24), ("I", 60)]


@pytest.mark.parametrize(("name", "order"), ORDERS)
def test_a_group_has_its_elements(name, order):
    group = symmetry.group(name)
    assert group.order == order
    # Closed: the product of any two is one of them.
    products = rotations.multiply(group.elements[:, None], group.elements).reshape(-1, 4)
    off = rotations.distance(products[:, None], group.elements).min(axis=1)
    assert off.max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_features_are_of_the_orbit_and_tell_orbits_apart(name):
    group = symmetry.group(name)
    f = group.features(Q)
    np.testing.assert_allclose(np.linalg.norm(f, axis=1), 1)
    for g in group.elements:
        np.testing.assert_allclose(group.features(rotations.multiply(g, Q)), f, atol=1e-12)
    apart = np.linalg.norm(f - group.features(P), axis=1)
    d = group.distance(Q, P)
    assert (apart > 0.1 * np.minimum(d, 1)).all()
    assert (apart < 2 * group.order * d).all()


@pytest.mark.parametrize(
    ("name", "folds"),
    [  # relion_refine --print_symmetry_ops
        ("T", {3: [0, 0, 1], 2: [0, 0.81650, 0.57735]}),
        ("O", {4: [0, 0, 1], 3: [0.57735, 0.57735, 0.57735], 2: [0.70711, 0.70711, 0]}),
        ("I", {2: [1, 0, 0], 5: [0.52573, 0, 0.85065], 3: [0, 0.35682, 0.93417]}),
    ],
)
def test_solids_lie_as_relion_has_them(name, folds):
    elements = symmetry.group(name).elements
    for fold, axis in folds.items():
        turn = Rotation.from_rotvec(2 * np.pi / fold * np.array(axis)).as_quat()
        assert rotations.distance(elements, turn).min() < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_is_isotropic_near_zero(name):
    group = symmetry.group(name)
    small = 1e-4
    moved = [rotations.perturb(Q, np.tile(small * axis, (len(Q), 1))) for axis in np.eye(3)]
    slopes = [np.linalg.norm(group.features(m) - group.features(Q), axis=1) / small for m in moved]
    assert np.ptp(slopes) < 1e-3 * np.mean(slopes)


def test_without_symmetry_the_kernel_distance_is_the_distance():
    group = symmetry.group("C1")
    d = rotations.distance(Q[:, None], P)
    np.testing.assert_allclose(group.kernel_distance(Q, P), d, atol=1e-7)
    np.testing.assert_allclose(group.distance(Q, P), np.diagonal(d))
    weights = group.inverse_density(64)
    centres = (np.arange(64) + 0.5) * np.pi / 64
    wanted = np.minimum(1 / np.sin(centres / 2) ** 2, 20)
    np.testing.assert_allclose(weights[8:], wanted[8:], rtol=0.1)


def test_features_of_d2_are_the_dyads_of_its_axes():
    # u_k u_k^T of the three two-folds, seen in the detector's frame: rows of R.
    matrices = Rotation.from_quat(Q).as_matrix()
    dyads = (matrices[:, :, :, None] * matrices[:, :, None, :]).reshape(len(Q), -1)
    f = symmetry.group("D2").features(Q)
    design = np.concatenate([dyads, np.ones((len(Q), 1))], axis=1)
    fitted = design @ np.linalg.lstsq(design, f, rcond=None)[0]
    np.testing.assert_allclose(fitted, f, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_finds_the_orbit(name):
    group = symmetry.group(name)
    f = group.features(Q)
    assert group.distance(group.decode(f), Q).max() < 1e-6
    noisy = f + rotations.generator(2, "test").normal(0, 0.02, f.shape)
    assert group.distance(group.decode(noisy), Q).mean() < 0.06
    np.testing.assert_allclose(group.decode(3 * f), group.decode(f), atol=1e-9)


@pytest.mark.parametrize("name", ["C1", "C3", "D2", "T", "I"])
def test_features_turn_with_the_image(name):
    group = symmetry.group(name)
    turned = group.features(rotations.in_plane(Q, 0.7))
    f = group.features(Q)
    still = group.harmonics == 0
    np.testing.assert_allclose(turned[:, still], f[:, still], atol=1e-12)
    for m in range(1, group.harmonics.max() + 1):
        pairs = f[:, group.harmonics == m].reshape(len(Q), -1, 2) @ [1, 1j]
        after = turned[:, group.harmonics == m].reshape(len(Q), -1, 2) @ [1, 1j]
        ratio = after / pairs
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1, :1], ratio.shape), atol=1e-6)
        turn = np.abs(np.angle(ratio[0, 0]))
        np.testing.assert_allclose(turn, np.arccos(np.cos(0.7 * m)), atol=1e-6)


def test_the_nearest_of_an_orbit():
    group = symmetry.group("D2")
    near = rotations.perturb(Q, np.tile([0.05, 0, 0], (len(Q), 1)))
    moved = rotations.multiply(group.elements[np.arange(len(Q)) % 4], near)
    np.testing.assert_allclose(rotations.distance(group.nearest(moved, Q), Q), 0.05, atol=1e-9)


@pytest.mark.parametrize("name", ["D1", "C0", "", "C100", "d", "I5", "OO", 4, None])
def test_other_names_are_refused(name):
    with pytest.raises(InputError, match="Cn or Dn"):
        symmetry.group(name)


def test_features_of_another_group_are_refused():
    with pytest.raises(InputError, match=r"\(n, 11\)"):
        symmetry.group("D2").decode(np.ones((3, 10)))
