import dataclasses
import json
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from measures import packed

from cryoem import distances, estimator, evaluation, imaging, orient, rotations, simulation
from cryoem.errors import InputError
from cryoem.estimator import Estimator, Objective, PairLoss
from cryoem.symmetry import group

Q = rotations.uniform(60, 0)
RNG = np.random.default_rng(0)

# --------------------------------------------------------------------------------------
# Distances from features


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


@pytest.mark.parametrize("head", distances.HEADS)
def test_numpy_and_keras_heads_agree(head):
    f = RNG.standard_normal((20, 6)).astype(np.float32)
    f = np.abs(f) if head == "cosine" else f
    f /= 4 if head == "euclidean" else np.linalg.norm(f, axis=1, keepdims=True)
    ours = distances.from_features(f, f, head)
    theirs = ops.convert_to_numpy(estimator.pair_distances(ops.convert_to_tensor(f), head))
    off_diagonal = ~np.eye(20, dtype=bool) & (ours < 3.0) & (theirs < 3.0) & (ours > 0.05)
    assert off_diagonal.sum() > 100
    np.testing.assert_allclose(ours[off_diagonal], theirs[off_diagonal], atol=1e-4)


@pytest.mark.parametrize(
    "call",
    [
        distances.from_features,
        lambda f, g, h: Estimator.create(simulation.Preprocessing(32, 16, 16, 7.0), head=h),
    ],
)
def test_an_unknown_head_is_refused(call):
    with pytest.raises(InputError, match="exact, cosine, euclidean"):
        call(Q, Q, "manhattan")


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


# --------------------------------------------------------------------------------------
# The loss


def targets(q):
    return group("C1").features(q).astype("float32")


def brute_force_loss(q, f, head, pairs, power):
    table = group("C1").inverse_density(64)
    d_q = rotations.distance(q[:, None], q[None])
    inner = np.clip(f @ f.T, -1, 1)
    d_p = {
        "exact": lambda: np.arccos(np.clip(2 * inner - 1, -1, 1)),
        "cosine": lambda: 2 * np.arccos(inner),
        "euclidean": lambda: np.linalg.norm(f[:, None] - f[None], axis=2),
    }[head]()
    total = weight = 0.0
    for i in range(len(q)):
        for j in range(i + 1, len(q)):
            if pairs == "uniform" and not (i % 2 == 0 and j == i + 1):
                continue
            w = 1.0 if pairs == "uniform" else table[int(d_q[i, j] * 64 / (np.pi + 1e-3))]
            total += w * abs(d_p[i, j] - d_q[i, j]) ** power
            weight += w
    return total / weight


@pytest.mark.parametrize("head", distances.HEADS)
@pytest.mark.parametrize("pairs", ["all", "uniform"])
@pytest.mark.parametrize("power", [1, 2])
def test_the_loss_is_the_mean_over_pairs(head, pairs, power):
    q = np.concatenate([Q[:10], rotations.perturb(Q[:10], np.full((10, 3), 0.1))])
    f = RNG.standard_normal((20, 5))
    f = np.abs(f) if head == "exact" else f  # opposite features are clipped: another test's matter
    f /= 1 if head == "euclidean" else np.linalg.norm(f, axis=1, keepdims=True)
    loss = PairLoss(head, pairs)
    if power == 1:
        loss = estimator.Objective(loss, 5).mae_rad
    found = float(loss(targets(q), f.astype("float32")))
    # float32 arccosines: 1e-4 where a pair of features is nearly opposite.
    assert found == pytest.approx(brute_force_loss(q, f, head, pairs, power=power), rel=1e-4)


def test_noisy_images_count_for_less():
    f = np.abs(RNG.standard_normal((4, 10))).astype("float32")
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    known = np.concatenate([targets(Q[:4]), np.array([[0], [4], [16], [0]], "float32")], axis=1)
    weights, off = PairLoss("exact", noise_weight=0.5).compare(known, f)
    even, same = PairLoss("exact", noise_weight=0.0).compare(known, f)
    np.testing.assert_array_equal(off, same)
    expected = np.array(even)
    for i, j in np.argwhere(expected > 0):
        expected[i, j] /= 1 + 0.25 * (known[i, 10] + known[j, 10])
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-5)


def test_exact_features_have_no_loss():
    # float32 at the arccosine's ends and the clip there: about (1e-3)^2.
    assert float(PairLoss("exact")(targets(Q), packed(Q).astype("float32"))) < 1e-6


@pytest.mark.parametrize("head", distances.HEADS)
@pytest.mark.parametrize("pairs", ["all", "uniform"])
def test_gradients_are_finite_where_features_coincide_or_oppose(head, pairs):
    e = np.eye(3, dtype=np.float32)
    features = tf.Variable(np.stack([e[0], e[0], -e[0], -e[0], e[1], e[0]]))
    q = Q[:6].astype("float32")
    q[1], q[2] = q[0], -q[0]  # coinciding orientations too
    with tf.GradientTape() as tape:
        loss = PairLoss(head, pairs)(targets(q), features)
    assert np.isfinite(tape.gradient(loss, features).numpy()).all()
    assert np.isfinite(float(loss))


# --------------------------------------------------------------------------------------
# Networks


def test_the_papers_network_has_the_papers_size():
    prepare = simulation.Preprocessing(116, 116, 116, 3.67)
    network = Estimator.create(prepare, architecture="paper", head="cosine", feature_dim=512)
    assert network.encoder.count_params() == 4_551_936
    assert network.encoder.output_shape == (None, 512)


@pytest.mark.parametrize("architecture", ["paper", "resnet", "steerable"])
@pytest.mark.parametrize("head", distances.HEADS)
def test_features_are_unit_but_for_the_euclidean_head(architecture, head):
    prepare = simulation.Preprocessing(32, 16, 15, 7.0)
    network = Estimator.create(prepare, architecture=architecture, head=head, feature_dim=6)
    f = network.embed(RNG.standard_normal((3, 32, 32)))
    assert f.shape == (3, 18 if architecture == "steerable" else 6)
    unit = np.allclose(np.linalg.norm(f, axis=1), 1, atol=1e-5)
    assert unit == (head != "euclidean")


def bounded(images):
    """Free of what a turn by a pixel grid changes: nothing in the first row and column."""
    images = images.copy()
    images[:, 0], images[:, :, 0] = 0, 0
    return images


@pytest.mark.parametrize("symmetry", ["C1", "D2", "C3"])
def test_the_steerable_network_turns_and_mirrors_with_the_image(symmetry):
    prepare = simulation.Preprocessing(32, 24, 20, 7.0)
    network = Estimator.create(prepare, symmetry=symmetry)
    images = bounded(RNG.standard_normal((5, 20, 20)))
    looks = [
        network.look(x, prepared=True)
        for x in (images, imaging.quarter_turn(images), imaging.mirror(images))
    ]
    f, turned, mirrored = (x.features for x in looks)
    # In which way, the orientations of the group tell: the same in every inner product.
    np.testing.assert_allclose(turned @ turned.T, f @ f.T, atol=1e-4)
    np.testing.assert_allclose(mirrored @ mirrored.T, f @ f.T, atol=1e-4)
    cross = f @ turned.T
    assert not np.allclose(cross, f @ f.T, atol=1e-2)  # it does see the turn
    twice = network.embed(imaging.quarter_turn(imaging.quarter_turn(images)), prepared=True)
    np.testing.assert_allclose(turned @ twice.T, cross, atol=1e-4)  # a turn is a turn
    # A quarter turn of the image takes (x, y) to (y, -x), the mirror to (-x, y).
    s, s_turned, s_mirrored = (x.shifts_px for x in looks)
    np.testing.assert_allclose(s_turned, s[:, ::-1] * [1, -1], atol=1e-4)
    np.testing.assert_allclose(s_mirrored, s * [-1, 1], atol=1e-4)
    for other in looks[1:]:
        np.testing.assert_allclose(other.expected_error_rad, looks[0].expected_error_rad, rtol=1e-4)


def test_rotations_by_any_angle_are_nearly_exact(phantom):
    network = Estimator.create(simulation.Preprocessing(32, 32, 32, 7.0))
    q = rotations.uniform(4, 0)
    seen = [phantom.project(rotations.in_plane(q, a), 32, 7.0) for a in (0.0, 0.3)]
    f, turned = (network.embed(x) for x in seen)
    np.testing.assert_allclose(turned @ turned.T, f @ f.T, atol=1e-2)
    assert np.abs(f - turned).max() > 5e-2


def test_the_objective_asks_for_the_shift():
    wanted = np.concatenate([targets(Q), RNG.standard_normal((60, 2))], axis=1).astype("float32")
    features = packed(rotations.perturb(Q, 0.1 * RNG.standard_normal((60, 3))))
    objective = Objective(PairLoss("exact"), 16)

    def value(shift):
        said = np.concatenate([features, shift, np.zeros((60, 1))], axis=1)
        return float(objective(wanted, said.astype("float32")))

    right = wanted[:, -2:]
    assert value(right + 1) == pytest.approx(value(right) + 0.2, rel=1e-3)
    assert float(objective(wanted, features.astype("float32"))) == pytest.approx(value(right))


def test_calibration_tells_good_images_from_bad_and_moves_no_feature(trained, phantom):
    network, _ = trained
    density = phantom.density(32, 7.0)
    source = simulation.TrainingImages(
        density, network.preprocessing, snr_range=(0.01, 0.01), clean_fraction=0.5
    )
    clean = simulation.particles(density, 200, 5)
    noisy = imaging.add_noise(clean.images, 0, snr=0.01)
    before = network.embed(clean.images)
    estimator.calibrate(network, source, images=4096, seed=1)
    np.testing.assert_array_equal(network.embed(clean.images), before)
    expected = [network.look(x).expected_error_rad.mean() for x in (clean.images, noisy)]
    assert expected[1] > 1.3 * expected[0]
    found = orient.orient_by_references(network, clean.images, density, references=1000)
    off = evaluation.errors(found.quaternions, clean.quaternions, over="none").mean_rad
    assert expected[0] == pytest.approx(off, rel=0.4)


def test_an_unknown_architecture_is_refused(preprocessing):
    with pytest.raises(InputError, match="steerable, resnet, paper"):
        Estimator.create(preprocessing, architecture="transformer")


def test_the_seed_sets_the_initial_weights(preprocessing):
    images = RNG.standard_normal((2, 32, 32))
    a, b, c = (Estimator.create(preprocessing, seed=s).embed(images) for s in (3, 3, 4))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c, atol=1e-2)


def test_half_precision_gives_nearly_the_same_features(preprocessing):
    images = RNG.standard_normal((2, 32, 32))
    full, half = (
        Estimator.create(preprocessing, seed=3, precision=p).embed(images)
        for p in ("float32", "mixed_bfloat16")
    )
    assert half.dtype == np.float32
    # bfloat16 keeps eight bits, 4e-3, a layer.
    np.testing.assert_allclose(full, half, atol=0.05)


# --------------------------------------------------------------------------------------
# Embedding


def test_embedding_does_not_depend_on_the_batch(trained):
    network, _ = trained
    images = RNG.standard_normal((7, 32, 32))
    whole = network.embed(images)
    np.testing.assert_allclose(network.embed(images, batch_size=3), whole, atol=1e-5)
    np.testing.assert_allclose(network.embed(images[2:3]), whole[2:3], atol=1e-5)
    small = network.preprocessing(images)
    np.testing.assert_allclose(network.embed(small, prepared=True), whole, atol=1e-5)


def test_no_image_has_no_features(trained):
    assert trained[0].embed(np.zeros((0, 32, 32))).shape == (0, 18)


def test_brightness_and_contrast_do_not_matter(trained):
    network, _ = trained
    images = RNG.standard_normal((3, 32, 32))
    np.testing.assert_allclose(network.embed(5 + 3 * images), network.embed(images), atol=1e-4)


def test_images_of_another_box_are_refused(trained):
    with pytest.raises(InputError, match="32 px"):
        trained[0].embed(np.zeros((2, 40, 40)))


# --------------------------------------------------------------------------------------
# Training


def test_training_lowers_the_loss(trained):
    _, history = trained
    assert len(history["loss"]) == len(history["mae_rad"]) == 3
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    assert history["mae_rad"][-1] < history["mae_rad"][0]


def test_training_teaches_unseen_images(trained, phantom):
    network, _ = trained
    made = simulation.particles(phantom.density(32, 7.0), 100, 77)
    f = network.embed(made.images)
    i, j = distances.all_pairs(100).T
    estimated = network.distances(f, f)[i, j]
    true = rotations.distance(made.quaternions[i], made.quaternions[j])
    # A few seconds do not teach much, but a network that has learned nothing has 0 +- 0.05.
    assert np.corrcoef(estimated, true)[0, 1] > 0.25


def small(preprocessing, seed=0):
    return Estimator.create(
        preprocessing, architecture="paper", head="cosine", feature_dim=8, seed=seed
    )


SHORT = {"images": 64, "batch_size": 8, "images_per_epoch": 32, "progress": False}


def untimed(history):
    return {key: values for key, values in history.items() if key != "seconds"}


@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "rmsprop", "schedule": "constant", "pairs": "uniform"}]
)
def test_the_same_seed_gives_the_same_weights(preprocessing, source, options):
    runs = []
    for seed in (5, 5, 6):
        network = small(preprocessing)
        history = estimator.train(network, source, seed=seed, **SHORT, **options)
        runs.append((network.encoder.get_weights(), history))
    (a, h), (b, again), (c, _) = runs
    assert untimed(h) == untimed(again)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
    assert not all(np.array_equal(x, y) for x, y in zip(a, c, strict=True))


class Interrupt(keras.callbacks.Callback):
    """Pulls the plug in the second epoch, after the first one's checkpoint."""

    def on_train_batch_begin(self, batch, logs=None):
        if len(self.epochs) == 2:
            raise KeyboardInterrupt

    epochs: tuple = ()

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs = (*self.epochs, epoch)


@pytest.mark.parametrize("options", [{}, {"optimizer": "rmsprop", "pairs": "uniform"}])
def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(
    preprocessing, source, tmp_path, options
):
    whole = small(preprocessing)
    expected = estimator.train(whole, source, **SHORT, **options)

    with pytest.raises(KeyboardInterrupt):
        estimator.train(
            small(preprocessing),
            source,
            checkpoint=tmp_path,
            callbacks=[Interrupt()],
            **SHORT,
            **options,
        )
    resumed = small(preprocessing, seed=9)  # its own weights must not matter
    history = estimator.train(resumed, source, checkpoint=tmp_path, **SHORT, **options)
    assert untimed(history) == untimed(expected)
    assert len(history["seconds"]) == 2 and min(history["seconds"]) > 0
    for x, y in zip(whole.encoder.get_weights(), resumed.encoder.get_weights(), strict=True):
        np.testing.assert_array_equal(x, y)
    finished = small(preprocessing, seed=9)
    again = estimator.train(finished, source, checkpoint=tmp_path, **SHORT, **options)
    assert again == history
    np.testing.assert_array_equal(finished.encoder.get_weights()[0], whole.encoder.get_weights()[0])


@pytest.fixture
def shifted(phantom, preprocessing):
    return simulation.TrainingImages(
        phantom.density(32, 7.0), preprocessing, snr_range=(1 / 2, 2), max_shift_px=4.0
    )


def test_learning_ends_with_a_reader_of_centred_images(preprocessing, shifted, tmp_path):
    def fresh(seed=2):
        return Estimator.create(preprocessing, looks=2, seed=seed)

    class Plug(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            if (tmp_path / "checkpoint.npz").exists():  # of the first training
                raise KeyboardInterrupt

    options = {"images": 640, "seed": 3, "progress": False}
    whole = fresh()
    expected = estimator.learn(whole, shifted, **options)
    assert whole.looks == 3 and len(expected["loss"]) == 2

    with pytest.raises(KeyboardInterrupt):
        estimator.learn(fresh(), shifted, checkpoint=tmp_path, callbacks=[Plug()], **options)
    resumed = fresh(seed=9)
    history = estimator.learn(resumed, shifted, checkpoint=tmp_path, **options)
    assert untimed(history) == untimed(expected)
    assert resumed.fingerprint == whole.fingerprint
    with np.load(tmp_path / "second" / "checkpoint.npz") as kept:
        second = json.loads(str(kept["state"]))["settings"]
    assert (second["images"], second["source"]["max_shift_px"]) == (256, 0)


def test_what_is_not_shifted_needs_one_network(preprocessing, source):
    network = Estimator.create(preprocessing)
    history = estimator.learn(network, source, images=256, progress=False)
    assert network.finder is None and len(history["loss"]) == 2


def test_a_checkpoint_of_other_settings_is_refused(preprocessing, source, tmp_path):
    estimator.train(small(preprocessing), source, checkpoint=tmp_path, **SHORT)
    for other in ({"seed": 3}, {"learning_rate": 1e-4}, {"pairs": "uniform"}):
        with pytest.raises(InputError, match="another folder"):
            estimator.train(small(preprocessing), source, checkpoint=tmp_path, **{**SHORT, **other})


def test_callbacks_are_called(preprocessing, source):
    seen = []
    hook = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append((epoch, sorted(logs)))
    )
    estimator.train(small(preprocessing), source, callbacks=[hook], **SHORT)
    assert seen == [(epoch, ["loss", "mae_rad", "seconds"]) for epoch in (0, 1)]


def test_the_bar_counts_the_images(preprocessing, source, capsys):
    estimator.train(small(preprocessing), source, **{**SHORT, "progress": True})
    assert "64/64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, "adam, rmsprop"),
        ({"schedule": "step"}, "'cosine' or 'constant'"),
        ({"pairs": "some"}, "'all' or 'uniform'"),
    ],
)
def test_unknown_settings_are_refused(preprocessing, source, options, message):
    with pytest.raises(InputError, match=message):
        estimator.train(small(preprocessing), source, **SHORT, **options)


# --------------------------------------------------------------------------------------
# The file


def test_an_estimator_round_trips(trained, tmp_path):
    network, _ = trained
    network.notes["particle"] = "phantom"
    network.save(tmp_path / "weights.npz")
    back = Estimator.load(tmp_path / "weights.npz")
    assert back.preprocessing == network.preprocessing
    assert (back.head, back.architecture, back.feature_dim) == ("exact", "steerable", 18)
    assert back.notes == {"particle": "phantom"}
    images = RNG.standard_normal((4, 32, 32))
    # Weights are kept in eight bits.
    np.testing.assert_allclose(back.embed(images), network.embed(images), atol=1e-2)


@pytest.fixture
def divided(trained):
    """An estimator whose encoder went its own way after it was divided; and the undivided one."""
    network, _ = trained
    whole = dataclasses.replace(network, looks=2)
    parted = pickle.loads(pickle.dumps(whole))
    parted.divide()
    parted.encoder.set_weights([0.9 * w for w in parted.encoder.get_weights()])
    return parted, whole


def test_a_divided_estimator_finds_with_one_network_and_reads_with_the_other(divided):
    parted, whole = divided
    images = RNG.standard_normal((4, 32, 32))
    small = whole.preprocessing.reduce(images)
    # The finder looks as often as the whole did; what it says of shifts is the whole's.
    shifts, centred = parted.centre(small)
    np.testing.assert_allclose(
        shifts, whole.look(images).shifts_px * 16 / 32, atol=1e-5 * np.abs(shifts).max()
    )
    read = ops.convert_to_numpy(parted.encoder(centred))
    np.testing.assert_array_equal(parted.embed(images), read[:, : parted.feature_dim])
    assert not np.allclose(parted.embed(images), whole.embed(images), atol=1e-2)


def test_dividing_changes_nothing_by_itself(divided):
    _, whole = divided
    parted = pickle.loads(pickle.dumps(whole))
    parted.divide()
    images = RNG.standard_normal((4, 32, 32))
    thrice = dataclasses.replace(whole, looks=3)
    np.testing.assert_array_equal(parted.embed(images), thrice.embed(images))


def test_an_estimator_without_shifts_and_a_divided_one_are_not_divided(divided, preprocessing):
    parted, _ = divided
    for other in (parted, Estimator.create(preprocessing), small(preprocessing)):
        with pytest.raises(InputError, match="finds shifts"):
            other.divide()


def test_a_divided_estimator_is_calibrated_on_what_its_finder_leaves(divided, phantom):
    parted, _ = divided
    source = simulation.TrainingImages(
        phantom.density(32, 7.0), parted.preprocessing, clean_fraction=1.0, max_shift_px=3.0
    )
    seen, _ = source.batch(1, 0, 200)
    found = []
    for turn in (0, 1):  # what the finder leaves is the particle's image, or another one's
        parted.centre = lambda small, turn=turn: (
            np.zeros((len(small), 2)),
            np.roll(Estimator.centre(parted, small)[1], turn, axis=0),
        )
        estimator.calibrate(parted, source, images=4096)
        found.append(parted.look(seen, prepared=True).expected_error_rad.mean())
    assert found[0] < 1 and found[1] > 1.5


def test_a_divided_estimators_file_keeps_eight_bits(divided, tmp_path):
    parted, _ = divided
    parted.save(tmp_path / "weights.npz")
    back = Estimator.load(tmp_path / "weights.npz")
    assert back.looks == 3
    for kept, whole in ((back.encoder, parted.encoder), (back.finder, parted.finder)):
        for found, weight in zip(kept.get_weights(), whole.get_weights(), strict=True):
            step = 2e-3 * np.abs(weight)  # float16, and half a step of the largest in a column
            if weight.ndim > 2:
                step = np.abs(weight).max(axis=-2, keepdims=True) / 253
            assert (np.abs(found - weight) <= step + 1e-7).all()


def test_a_divided_estimator_is_pickled_whole(divided):
    parted, whole = divided
    back = pickle.loads(pickle.dumps(parted))
    images = RNG.standard_normal((4, 32, 32))
    seen, before = back.look(images), parted.look(images)
    np.testing.assert_array_equal(seen.features, before.features)
    np.testing.assert_array_equal(seen.shifts_px, before.shifts_px)
    assert back.fingerprint == parted.fingerprint
    back.finder.set_weights([*whole.encoder.get_weights()[:-1], np.ones(1, np.float32)])
    assert back.fingerprint != parted.fingerprint


def test_a_divided_estimators_file_needs_its_finder(divided, tmp_path):
    parted, _ = divided
    path = tmp_path / "weights.npz"
    parted.save(path)
    rewritten(path, lambda s, a: [a.pop(k) for k in list(a) if k.startswith("finder_")])
    with pytest.raises(InputError, match="do not fit"):
        Estimator.load(path)


def test_files_of_format_2_are_read(trained, tmp_path):
    network, _ = trained
    path = tmp_path / "weights.npz"
    network.save(path)

    def older(settings, arrays):
        settings["format_version"] = 2
        del settings["finder"]
        for name in [k for k in arrays if k.startswith("weight_")]:
            del arrays[name]
        for i, weight in enumerate(network.encoder.get_weights()):
            arrays[f"weight_{i:03d}"] = weight.astype(np.float16)

    rewritten(path, older)
    images = RNG.standard_normal((4, 32, 32))
    back = Estimator.load(path)
    assert back.finder is None
    np.testing.assert_allclose(back.embed(images), network.embed(images), atol=1e-2)


@pytest.fixture
def saved(preprocessing, tmp_path):
    path = tmp_path / "weights.npz"
    small(preprocessing).save(path)
    return path


def rewritten(path, change):
    """The same file with its arrays and settings changed."""
    with np.load(path) as archive:
        arrays = dict(archive)
    settings = json.loads(str(arrays["settings"]))
    change(settings, arrays)
    if "settings" in arrays:
        arrays["settings"] = np.array(json.dumps(settings))
    with open(path, "wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, a: s.update(format_version=99), "format 99"),
        (lambda s, a: s.pop("format_version"), "format None"),
        (lambda s, a: a.pop("settings"), "not an estimator's file"),
        (lambda s, a: a.pop("weight_003"), "do not fit"),
        (lambda s, a: a.pop("weight_002_scale"), "do not fit"),
        (lambda s, a: s.update(feature_dim=9), "do not fit"),
        (lambda s, a: s.update(architecture="unknown"), "steerable, resnet, paper"),
        (lambda s, a: s.pop("head"), "weights.npz"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(saved, change, message):
    rewritten(saved, change)
    with pytest.raises(InputError, match=message):
        Estimator.load(saved)


def test_a_truncated_file_is_refused(saved):
    saved.write_bytes(saved.read_bytes()[:-5000])
    with pytest.raises(InputError, match="not an estimator's file"):
        Estimator.load(saved)


def test_a_damaged_file_is_refused(saved):
    content = bytearray(saved.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    saved.write_bytes(content)
    with pytest.raises(InputError, match="not an estimator's file"):
        Estimator.load(saved)


class Trap:
    """Would leave a trace if it were unpickled."""

    def __reduce__(self):
        return (open, ("trapped", "w"))


@pytest.mark.parametrize("kind", ["pickle", "npz", "npy", "text", "empty"])
def test_nothing_is_unpickled_and_other_files_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.npz"
    with open(path, "wb") as file:
        if kind == "pickle":
            pickle.dump(Trap(), file)
        elif kind == "npz":
            np.savez(file, settings=np.array([Trap()], dtype=object))
        elif kind == "npy":
            np.save(file, np.zeros(3))
        elif kind == "text":
            file.write(b"not weights")
    with pytest.raises(InputError, match="not an estimator's file"):
        Estimator.load(path)
    assert not (tmp_path / "trapped").exists()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Estimator.load(tmp_path / "none.npz")
