import numpy as np
import pytest
from measures import packed

from cryoem import distances, rotations
from cryoem.errors import InputError

Q = rotations.uniform(60, 0)
RNG = np.random.default_rng(0)


def test_ten_numbers_represent_every_distance_exactly():
    found = distances.from_features(packed(Q), packed(Q), "exact")
    true = rotations.distance(Q[:, None], Q[None])
    # float32 before an arccosine: 1e-7 in the middle, its root at the ends.
    np.testing.assert_allclose(found, true, atol=2e-3)
    inner = (true > 0.1) & (true < np.pi - 0.1)
    np.testing.assert_allclose(found[inner], true[inner], atol=2e-5)


def test_the_cosine_head_is_the_papers():
    found = distances.from_features(Q[:5], Q[5:9], "cosine")
    expected = 2 * np.arccos(np.clip(Q[:5] @ Q[5:9].T, 0, 1))
    assert found.shape == (5, 4)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_euclidean_head_is_a_norm_up_to_pi():
    f, g = RNG.standard_normal((5, 3)), RNG.standard_normal((7, 3))
    expected = np.minimum(np.linalg.norm(f[:, None] - g, axis=2), np.pi)
    np.testing.assert_allclose(distances.from_features(f, g, "euclidean"), expected, atol=1e-5)


@pytest.mark.parametrize("head", distances.HEADS)
def test_distances_stay_within_0_and_pi(head):
    f = np.concatenate([Q, -Q, 1.0001 * Q]) * (5 if head == "euclidean" else 1)
    d = distances.from_features(f, f, head)
    assert np.isfinite(d).all() and d.min() >= 0 and d.max() <= np.float32(np.pi) + 1e-6


def test_an_unknown_head_is_refused():
    with pytest.raises(InputError, match="exact, cosine, euclidean"):
        distances.from_features(Q, Q, "manhattan")


def test_all_pairs_are_all_pairs_once():
    pairs = distances.all_pairs(7)
    assert len({tuple(p) for p in pairs}) == len(pairs) == 21
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert distances.all_pairs(1).shape == (0, 2)


def test_sampled_pairs_are_uniform_and_never_of_one_item():
    pairs = distances.sample_pairs(5, 20_000, 0)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(pairs.T), 1)
    expected = 1000  # 20 ordered pairs; four standard errors
    assert np.abs(counts[~np.eye(5, dtype=bool)] - expected).max() < 4 * np.sqrt(expected)
    with pytest.raises(InputError, match="two items"):
        distances.sample_pairs(1, 3, 0)


def test_image_distances_are_norms():
    images = RNG.standard_normal((10, 6, 6))
    pairs = distances.sample_pairs(10, 5000, 1)
    found = distances.image_distance(images, pairs)
    for k in (0, 4095, 4096, 4999):
        i, j = pairs[k]
        assert found[k] == pytest.approx(np.linalg.norm(images[i] - images[j]), rel=1e-5)


def test_a_comparison_by_hand():
    true = np.array([0.5, 0.6, 2.0, np.pi])
    found = distances.compare(true + np.array([0.1, -0.3, 0.2, -0.4]), true)
    assert found.loss == pytest.approx((0.01 + 0.09 + 0.04 + 0.16) / 4)
    assert found.mae_rad == pytest.approx(0.25)
    assert found.mae_small_rad == pytest.approx(0.2)
    assert found.mae_middle_rad == pytest.approx(0.2)
    assert found.mae_large_rad == pytest.approx(0.4)
    assert np.isnan(distances.compare([0.1], [0.1]).mae_large_rad)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_a_comparison_needs_two_like_arrays(a, b):
    with pytest.raises(InputError):
        distances.compare(a, b)
