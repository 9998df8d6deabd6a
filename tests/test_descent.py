"""The paper's descent: its geodesic, what it arrives at, and what it refuses."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.spatial.transform import Rotation
from tensorflow_graphics.geometry.transformation import quaternion as tfg_quaternion

from cryoem import distances, evaluation, recovery, rotations
from cryoem.errors import InputError
from cryoem.recovery import descent


def exact(n, seed):
    q = rotations.uniform(n, seed)
    pairs = distances.all_pairs(n)
    return q, pairs, rotations.pair_distances(q, pairs)


def error(found, true):
    return evaluation.orientation_errors(found, true, over="o4").mean_rad


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


def test_every_step_draws_its_own_pairs():
    # Where nothing moves, a batch's loss tells which pairs were drawn.
    q, (_, pairs, d) = rotations.uniform(60, 3), exact(60, 1)
    still = {"init": q, "steps": 120, "learning_rate": 1e-12}
    losses, other = (descent.descend(pairs, d, seed=seed, **still).losses for seed in (0, 1))
    assert len(np.unique(losses)) == 120
    assert len(np.intersect1d(losses, other)) < 5
    whole = descent.descend(pairs, d, batch_pairs=len(pairs), **still).losses
    np.testing.assert_allclose(whole, recovery.pair_loss(q, pairs, d), rtol=1e-4)
    assert losses.mean() == pytest.approx(whole[0], rel=0.02)


def test_a_cosine_schedule_comes_to_rest():
    _, pairs, d = exact(60, 1)
    usual, slowing = (
        descent.descend(
            pairs, d, steps=100, learning_rate=0.1, schedule=schedule, snapshot_every=90
        )
        for schedule in ("constant", "cosine")
    )

    def last_move(found):
        return rotations.distance(found.snapshots[1], found.quaternions).mean()

    np.testing.assert_array_equal(usual.snapshots[0], slowing.snapshots[0])
    assert last_move(slowing) < 0.2 * last_move(usual)


def test_another_seed_starts_elsewhere():
    _, pairs, d = exact(60, 1)
    a, b = (descent.descend(pairs, d, seed=seed, steps=0).quaternions for seed in (0, 1))
    assert rotations.distance(a, b).min() > 1e-3


def test_another_backend_of_keras_is_refused(monkeypatch):
    monkeypatch.setattr(descent.keras.backend, "backend", lambda: "jax")
    with pytest.raises(InputError, match="KERAS_BACKEND is 'jax'"):
        descent.descend([[0, 1]], [1.0])


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


def test_malformed_pairs_are_refused():
    _, pairs, d = exact(20, 1)
    with pytest.raises(InputError, match="pair 0 has nan"):
        descent.descend(pairs, np.r_[np.nan, d[1:]])
    with pytest.raises(InputError, match="index 19 items"):
        descent.descend(pairs, d, 19)
