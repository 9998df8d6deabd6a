import numpy as np
import pytest
import tensorflow as tf
from measures import packed
from scipy.spatial.transform import Rotation
from tensorflow_graphics.geometry.transformation import quaternion as tfg_quaternion

from cryoem import descent, distances, evaluation, recovery, rotations
from cryoem.errors import InputError


def exact(n, seed):
    q = rotations.uniform(n, seed)
    pairs = distances.all_pairs(n)
    return q, pairs, rotations.pair_distances(q, pairs)


def error(found, true):
    return evaluation.errors(found, true, over="o4").mean_rad


# --------------------------------------------------------------------------------------
# Recovery


@pytest.mark.parametrize("seed", range(5))
def test_exact_distances_come_back(seed):
    q, pairs, d = exact(200, 0)
    found = recovery.recover(pairs, d, seed=seed)
    assert error(found.quaternions, q) < 1e-6
    assert found.loss < 1e-12
    assert found.residuals_rad.max() < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_any_set_of_orientations_comes_back(seed):
    q, pairs, d = exact(100, 100 + seed)
    assert error(recovery.recover(pairs, d, seed=0, starts=32).quaternions, q) < 1e-6


@pytest.mark.parametrize("coverage", ["half", "quarter", "preferred"])
def test_orientations_that_cover_little_come_back(coverage):
    q = rotations.sample(150, 1, coverage)
    pairs = distances.all_pairs(150)
    found = recovery.recover(pairs, rotations.pair_distances(q, pairs), polish=20)
    # The steps converge by a factor each, the slower the more alike the views are.
    assert error(found.quaternions, q) < 1e-5


@pytest.mark.parametrize("seed", range(2))
def test_noisy_distances_come_back_to_the_floor(seed):
    # The paper's noise of variance 0.8; nobody is better than the floor, which is a mean.
    q, pairs, d = exact(400, seed)
    sd = np.sqrt(0.8)
    noise = np.random.default_rng(seed).normal(0, sd, len(d))
    found = recovery.recover(pairs, np.clip(d + noise, 0, np.pi))
    floor = recovery.error_floor(400, sd)
    assert error(found.quaternions, q) < 1.25 * floor
    assert recovery.pair_loss(found.quaternions, pairs, np.clip(d + noise, 0, np.pi)) == (
        pytest.approx(found.loss, rel=1e-9)
    )


def test_the_floor_is_the_papers_arithmetic():
    # 0.92 x 3 sd / sqrt(n): 0.061 rad at n = 1,650 and sd 0.894.
    assert recovery.error_floor(1650, 0.894) == pytest.approx(0.061, abs=5e-4)


def test_a_third_of_the_pairs_is_enough():
    q = rotations.uniform(300, 3)
    pairs = distances.all_pairs(300)
    keep = np.random.default_rng(0).random(len(pairs)) < 0.3
    pairs = pairs[keep]
    found = recovery.recover(pairs, rotations.pair_distances(q, pairs))
    assert error(found.quaternions, q) < 1e-6


def test_a_few_of_the_pairs_at_random_are_enough():
    # 60 distances an item, as 3.6 % of the pairs of 1,650 would be: landmarks must be completed.
    q = rotations.uniform(300, 4)
    pairs = distances.all_pairs(300)
    pairs = pairs[np.random.default_rng(1).random(len(pairs)) < 0.2]
    found = recovery.recover(pairs, rotations.pair_distances(q, pairs))
    assert len(found.landmarks) > 80
    assert error(found.quaternions, q) < 1e-6


@pytest.mark.parametrize("n", [400, 2100])
def test_the_pairs_that_it_chooses_are_enough(n):
    # Above 2,000 items so few pairs are kept as a sparse table.
    q, pairs = rotations.uniform(n, 6), recovery.choose_pairs(n, 0)
    assert len(np.unique(np.sort(pairs, axis=1), axis=0)) == len(pairs) == 435 + 8 * (n - 30)
    found = recovery.recover(pairs, rotations.pair_distances(q, pairs))
    assert error(found.quaternions, q) < 1e-6


def test_a_sparse_table_polishes_as_an_array_does():
    # The same 150 items and pairs, alone and beside 1,900 that are compared with few.
    q = rotations.uniform(2050, 7)
    few = recovery.choose_pairs(2050, 1, core=150, each=12)
    core = np.flatnonzero(np.bincount(few.ravel()) > 20)
    noise = np.random.default_rng(0).normal(0, 0.05, len(few))
    d = np.clip(rotations.pair_distances(q, few) + noise, 0, np.pi)
    inside = np.isin(few, core).all(axis=1)
    alone = recovery.recover(np.searchsorted(core, few[inside]), d[inside])
    whole = recovery.recover(few, d)
    floor = recovery.error_floor(150, 0.05)
    assert error(alone.quaternions, q[core]) < 1.25 * floor
    # The others add twelve each: the core is placed better than alone.
    assert error(whole.quaternions[core], q[core]) < error(alone.quaternions, q[core])
    np.testing.assert_array_equal(whole.used, np.bincount(few.ravel()))


@pytest.mark.parametrize("seed", range(2))
def test_wild_distances_do_not_matter(seed):
    q, pairs, d = exact(300, seed)
    rng = np.random.default_rng(seed)
    wild = rng.random(len(d)) < 0.2
    spoilt = np.where(wild, rng.uniform(0, np.pi, len(d)), d)
    found = recovery.recover(pairs, spoilt)
    # A wild distance may fall where the true one is; a plain fit would be off by 0.1 rad.
    assert error(found.quaternions, q) < 2e-3
    right = np.bincount(pairs[~wild].ravel(), minlength=300)
    assert np.abs(found.used - right).max() < 10


def test_expected_errors_are_what_noise_leaves():
    q, pairs, d = exact(300, 2)
    rng = np.random.default_rng(2)
    # The last hundred are seen three times as badly.
    sd = np.where((pairs >= 200).any(axis=1), 0.3, 0.1)
    found = recovery.recover(pairs, np.clip(d + rng.normal(0, sd), 0, np.pi))
    off = rotations.distance(evaluation.align(found.quaternions, q).quaternions, q)
    for some in (slice(0, 200), slice(200, 300)):
        # Clipping takes some of the noise.
        assert found.expected_error_rad[some].mean() == pytest.approx(off[some].mean(), rel=0.25)
    assert (found.used == 299).all()


def test_pairs_may_come_in_any_order_and_twice():
    q, pairs, d = exact(60, 0)
    order = np.random.default_rng(0).permutation(len(pairs))
    mixed = np.where(order[:, None] % 2 == 0, pairs[order], pairs[order][:, ::-1])
    twice, d_twice = (
        np.concatenate([mixed, mixed[:100]]),
        np.concatenate([d[order], d[order][:100]]),
    )
    assert error(recovery.recover(twice, d_twice).quaternions, q) < 1e-6


def test_one_wild_item_has_the_largest_residual():
    _, pairs, d = exact(80, 0)
    wild = (pairs == 17).any(axis=1)
    d[wild] = np.random.default_rng(0).uniform(0, np.pi, wild.sum())
    found = recovery.recover(pairs, d)
    assert np.argmax(found.residuals_rad) == 17
    np.testing.assert_array_equal(np.flatnonzero(found.outlier), [17])


def test_the_same_seed_recovers_the_same():
    _, pairs, d = exact(100, 0)
    a, b = (recovery.recover(pairs, d, seed=4) for _ in range(2))
    np.testing.assert_array_equal(a.quaternions, b.quaternions)
    np.testing.assert_array_equal(a.landmarks, b.landmarks)


def test_landmarks_alone_come_back():
    q = rotations.uniform(40, 5)
    found, loss, agreed = recovery.solve_landmarks(rotations.distance(q[:, None], q[None]), 0)
    assert error(found, q) < 1e-6 and loss < 1e-10 and agreed


@pytest.mark.parametrize("seed", range(3))
def test_landmarks_without_a_solution_do_not_agree(seed):
    d = np.random.default_rng(seed).uniform(0, np.pi, (40, 40))
    _, loss, agreed = recovery.solve_landmarks(np.triu(d, 1) + np.triu(d, 1).T, 0, starts=32)
    assert loss > 0.1 and not agreed


# --------------------------------------------------------------------------------------
# Lateration


@pytest.mark.parametrize("weighted", [False, True])
def test_lateration_is_exact(weighted):
    landmarks, q = rotations.uniform(40, 0), rotations.uniform(50, 1)
    d = rotations.distance(q[:, None], landmarks)
    weights = np.random.default_rng(2).uniform(0.5, 2, d.shape) if weighted else None
    found = recovery.laterate(d, landmarks, weights=weights)
    # Weighted by normal equations with a ridge of 1e-9: its square root at worst.
    assert rotations.distance(found, q).max() < (1e-6 if weighted else 1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_each_row_depends_on_its_own_distances_alone(weighted):
    rng = np.random.default_rng(0)
    landmarks = rotations.uniform(40, 0)
    d = rng.uniform(0, np.pi, (30, 40))
    w = rng.uniform(0, 1, d.shape) if weighted else None
    whole = recovery.laterate(d, landmarks, weights=w)
    part = recovery.laterate(d[7:9], landmarks, weights=None if w is None else w[7:9])
    # Random distances leave eigenvectors near each other: 1e-9 instead of 1e-12.
    assert rotations.distance(part, whole[7:9]).max() < 1e-9


def test_entries_of_no_weight_are_ignored():
    landmarks, q = rotations.uniform(40, 0), rotations.uniform(50, 1)
    d = rotations.distance(q[:, None], landmarks)
    rng = np.random.default_rng(2)
    bad = rng.random(d.shape) < 0.4
    spoilt = np.where(bad, rng.uniform(0, np.pi, d.shape), d)
    found = recovery.laterate(spoilt, landmarks, weights=(~bad).astype(float))
    assert rotations.distance(found, q).max() < 1e-6
    assert rotations.distance(recovery.laterate(spoilt, landmarks), q).mean() > 0.05


@pytest.mark.parametrize(
    ("d", "landmarks", "message"),
    [
        (np.zeros((3, 8)), rotations.uniform(8, 0), "at least"),
        (np.zeros((3, 20)), rotations.uniform(21, 0), r"\(n, 21\)"),
        (np.zeros(20), rotations.uniform(20, 0), r"\(n, 20\)"),
        (np.zeros((3, 20)), np.zeros((20, 4)), "unit"),
    ],
)
def test_landmarks_that_cannot_place_are_refused(d, landmarks, message):
    with pytest.raises(InputError, match=message):
        recovery.laterate(d, landmarks)


# --------------------------------------------------------------------------------------
# From features


def test_features_that_hold_orientations_give_them_back():
    q = rotations.uniform(500, 0)
    found = recovery.recover_features(packed(q), landmarks=60)
    # Distances of float32 features: 3e-4 rad where they are 0 or pi.
    assert error(found.quaternions, q) < 1e-3
    assert len(found.landmarks) == 60 and (found.used == 60).all()


def test_neither_chunks_nor_the_others_change_a_particle():
    rng = np.random.default_rng(1)
    f = packed(rotations.uniform(300, 1)) + rng.normal(0, 0.03, (300, 16))
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    whole = recovery.recover_features(f, landmarks=60)
    parts = recovery.recover_features(f, landmarks=60, chunk=7)
    marks = recovery.find_landmarks(f, landmarks=60)
    alone = marks.place(f[123:124])
    # float32 products, summed in another order.
    assert rotations.distance(whole.quaternions, parts.quaternions).max() < 1e-3
    assert rotations.distance(whole.quaternions[123], alone.quaternions[0]) < 1e-3
    np.testing.assert_allclose(whole.residuals_rad, parts.residuals_rad, atol=1e-3)
    assert whole.loss == pytest.approx(parts.loss, rel=1e-3)


def test_particles_that_are_something_else_are_flagged_and_place_nobody():
    rng = np.random.default_rng(2)
    f = packed(rotations.uniform(400, 2)) + rng.normal(0, 0.02, (400, 16))
    f[:40] = rng.standard_normal((40, 16))
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    found = recovery.recover_features(f, landmarks=200)
    assert found.outlier[:40].all() and found.outlier[40:].mean() < 0.05
    assert found.landmarks.min() >= 40


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.ones((23, 16)), "at least 24"),
        (np.ones(30), r"\(n, f\)"),
        (np.full((30, 16), np.nan), "finite"),
    ],
)
def test_features_that_place_nobody_are_refused(features, message):
    with pytest.raises(InputError, match=message):
        recovery.recover_features(features)


@pytest.mark.parametrize("options", [{"each": 5}, {"core": 20}, {"core": 90}])
def test_a_choice_that_cannot_work_is_refused(options):
    with pytest.raises(InputError, match="wanted"):
        recovery.choose_pairs(80, 0, **options)


# --------------------------------------------------------------------------------------
# What is refused


def broken(change):
    pairs = distances.all_pairs(20)
    d = np.full(len(pairs), 1.0)
    return change(pairs, d)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, d: (np.r_[p, [[3, 3]]], np.r_[d, 0.0]), "item 3 with itself"),
        (lambda p, d: (np.r_[p, [[3, 99]]], np.r_[d, 1.0], 20), "index 20 items"),
        (lambda p, d: (np.r_[p, [[-1, 3]]], np.r_[d, 1.0]), "index"),
        (lambda p, d: (p, np.r_[np.nan, d[1:]]), "pair 0 has nan"),
        (lambda p, d: (p, np.r_[d[1:], -0.1]), "has -0.1"),
        (lambda p, d: (p, np.rad2deg(d)), "radians"),
        (lambda p, d: (p, d[1:]), "one a pair"),
        (lambda p, d: (p[:0], d[:0]), "no pairs"),
        (lambda p, d: (p.astype(float), d), "integers"),
        (lambda p, d: (p[:, 0], d), r"\(m, 2\)"),
        (lambda p, d: (p[:, [0, 1, 1]], d), r"\(m, 2\)"),
    ],
)
@pytest.mark.parametrize("solve", [recovery.recover, descent.descend])
def test_malformed_pairs_are_refused(change, message, solve):
    with pytest.raises(InputError, match=message):
        solve(*broken(change))


def test_an_item_with_too_few_distances_is_named():
    _, pairs, d = exact(30, 0)
    keep = ~(pairs == 29).any(axis=1)
    keep[np.flatnonzero(~keep)[:5]] = True
    with pytest.raises(InputError, match="item 29 has distances to 5 others"):
        recovery.recover(pairs[keep], d[keep])
    with pytest.raises(InputError, match="item 30 has distances to 0 others"):
        recovery.recover(pairs, d, 31)


def test_too_few_pairs_to_begin_with_are_refused():
    # Everyone has twelve neighbours on a ring: no set of landmarks can be completed.
    n = 3200
    pairs = np.stack(
        [np.repeat(np.arange(n), 6), (np.arange(6 * n) // 6 + np.tile(range(1, 7), n))]
    )
    with pytest.raises(InputError, match="choose_pairs"):
        recovery.recover(pairs.T % n, np.ones(6 * n))


def test_two_sets_without_a_bridge_are_refused():
    # Nothing ties their frames together: any answer would be wrong and have no loss.
    _, pairs, d = exact(200, 0)
    together = (pairs < 100).all(axis=1) | (pairs >= 100).all(axis=1)
    with pytest.raises(InputError, match="pairs"):
        recovery.recover(pairs[together], d[together], landmarks=40, starts=4)


# --------------------------------------------------------------------------------------
# The paper's descent


def test_tensorflow_graphics_composes_like_scipy():
    q, p = rotations.uniform(50, 0), rotations.uniform(50, 1)
    theirs = tfg_quaternion.multiply(tf.constant(q), tf.constant(p)).numpy()
    scipys = (Rotation.from_quat(q) * Rotation.from_quat(p)).as_quat()
    assert rotations.distance(theirs, scipys).max() < 1e-12
    conjugate = tfg_quaternion.conjugate(tf.constant(q)).numpy()
    np.testing.assert_allclose(conjugate, rotations.inverse(q), atol=1e-15)


@pytest.mark.parametrize("angle", [1e-5, 1e-4, 1e-3, 0.1, 1.0, 3.0, np.pi])
def test_the_geodesic_is_the_distance(angle):
    q = rotations.uniform(200, 0)
    axis = np.random.default_rng(1).standard_normal((200, 3))
    p = rotations.perturb(q, angle * axis / np.linalg.norm(axis, axis=1, keepdims=True))
    p[::2] *= -1
    found = descent.geodesic(tf.constant(q, tf.float32), tf.constant(p, tf.float32))
    # float32, and a floor of 2e-6 rad under the root.
    np.testing.assert_allclose(found.numpy(), angle, atol=1e-5)


def test_the_geodesic_has_finite_gradients_at_its_ends():
    q = rotations.uniform(3, 0)
    p = np.stack([q[0], -q[1], rotations.multiply(q[2], rotations.about("x", np.pi))])
    variable = tf.Variable(q, dtype=tf.float32)
    with tf.GradientTape() as tape:
        d = descent.geodesic(variable, tf.constant(p, tf.float32))
        loss = tf.reduce_sum((d - 1.0) ** 2)
    assert np.isfinite(tape.gradient(loss, variable).numpy()).all()
    np.testing.assert_allclose(d.numpy(), [0, 0, np.pi], atol=1e-5)


def test_descent_from_near_the_truth_arrives():
    q, pairs, d = exact(60, 0)
    start = rotations.perturb(q, np.random.default_rng(0).normal(0, 0.2, (60, 3)))
    found = descent.descend(
        pairs,
        d,
        init=start,
        steps=300,
        batch_pairs=len(pairs),
        learning_rate=0.02,
        schedule="cosine",
    )
    assert error(found.quaternions, q) < 1e-2
    assert len(found.losses) == 300 and found.losses[-1] < 1e-3 * found.losses[0]
    np.testing.assert_allclose(np.linalg.norm(found.quaternions, axis=1), 1, atol=1e-12)


def test_descent_with_the_papers_settings_lowers_the_loss():
    _, pairs, d = exact(60, 1)
    found = descent.descend(pairs, d, steps=300, snapshot_every=100)
    assert found.losses[-50:].mean() < 0.7 * found.losses[:5].mean()
    assert len(found.snapshots) == 3
    start = descent.descend(pairs, d, steps=0).quaternions  # the same seed
    np.testing.assert_allclose(found.snapshots[0], start, atol=1e-6)
    assert not np.allclose(found.snapshots[1], found.snapshots[2], atol=1e-2)
    again = descent.descend(pairs, d, steps=300)  # snapshots change nothing
    np.testing.assert_allclose(again.quaternions, found.quaternions, atol=1e-4)
    assert again.snapshots == []


def test_no_step_changes_nothing():
    q, pairs, d = exact(20, 1)
    found = descent.descend(pairs, d, init=q, steps=0)
    np.testing.assert_allclose(found.quaternions, q, atol=1e-6)
    assert len(found.losses) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step"}, "'constant' or 'cosine'"),
        ({"init": np.zeros((20, 4))}, "unit"),
        ({"init": rotations.uniform(19, 0)}, "20 orientations"),
    ],
)
def test_a_descent_that_cannot_start_is_refused(options, message):
    _, pairs, d = exact(20, 1)
    with pytest.raises(InputError, match=message):
        descent.descend(pairs, d, **options)
