import dataclasses
import json
import pickle

import numpy as np
import pytest
from measures import packed

from cryoem import distances, estimator, imaging, rotations, simulation
from cryoem.backend import keras, tf
from cryoem.errors import InputError
from cryoem.estimator import Estimator, Objective, PairLoss
from cryoem.simulation import TrainingImages
from cryoem.symmetry import group

Q = rotations.uniform(60, 0)
RNG = np.random.default_rng(0)


def small(preprocessing, seed=0):
    return Estimator.create(
        preprocessing, architecture="paper", head="cosine", feature_dim=8, seed=seed
    )


SHORT = {"images": 64, "batch_size": 8, "images_per_epoch": 32, "progress": False}


def untimed(history):
    return {key: values for key, values in history.items() if key != "seconds"}


@pytest.fixture
def shifted(phantom, preprocessing):
    return TrainingImages(
        phantom.density(32, 7.0), preprocessing, snr_range=(1 / 2, 2), max_shift_px=4.0
    )


@pytest.fixture
def untraced():
    """Of a few steps, tracing them is most of the time."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def drawn(monkeypatch):
    """What batches were drawn: (seed, step, n, pairs, max_shift_px)."""
    calls, batch = [], TrainingImages.batch

    def recorded(self, seed, step, n, *, pairs="all"):
        calls.append((seed, step, n, pairs, self.max_shift_px))
        return batch(self, seed, step, n, pairs=pairs)

    monkeypatch.setattr(TrainingImages, "batch", recorded)
    return calls


# --------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("head", distances.HEADS)
def test_numpy_and_keras_heads_agree(head):
    f = RNG.standard_normal((20, 6)).astype(np.float32)
    f = np.abs(f) if head == "cosine" else f
    f /= 4 if head == "euclidean" else np.linalg.norm(f, axis=1, keepdims=True)
    ours = distances.from_features(f, f, head)
    tensor = keras.ops.convert_to_tensor(f)
    theirs = keras.ops.convert_to_numpy(estimator.pair_distances(tensor, head))
    off_diagonal = ~np.eye(20, dtype=bool) & (ours < 3.0) & (theirs < 3.0) & (ours > 0.05)
    assert off_diagonal.sum() > 100
    np.testing.assert_allclose(ours[off_diagonal], theirs[off_diagonal], atol=1e-4)


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
        loss = Objective(loss, 5).mae_rad
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
    features = tf.Variable(np.stack([e[0], e[0], -e[0], 0.8 * e[2] - 0.6 * e[0], e[1], e[0]]))
    q = Q[:6].copy()
    q[1], q[2] = q[0], -q[0]  # coinciding orientations too
    with tf.GradientTape() as tape:
        loss = PairLoss(head, pairs)(targets(q), features)
    gradient = tape.gradient(loss, features).numpy()
    assert np.isfinite(gradient).all() and gradient.any()
    assert np.isfinite(float(loss))


def test_the_objective_asks_for_the_shift():
    wanted = np.concatenate([targets(Q), RNG.standard_normal((60, 2))], axis=1).astype("float32")
    features = packed(rotations.perturb(Q, 0.1 * RNG.standard_normal((60, 3))))
    objective = Objective(PairLoss("exact"), 16)

    def value(shift):
        predicted = np.concatenate([features, shift, np.zeros((60, 1))], axis=1)
        return float(objective(wanted, predicted.astype("float32")))

    right = wanted[:, -2:]
    assert value(right + 1) == pytest.approx(value(right) + 0.2, rel=1e-3)
    assert float(objective(wanted, features.astype("float32"))) == pytest.approx(value(right))


# --------------------------------------------------------------------------------------
# One run


def test_training_lowers_the_loss(trained):
    _, history = trained
    assert len(history["loss"]) == len(history["mae_rad"]) == 3
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    assert history["mae_rad"][-1] < history["mae_rad"][0]


def test_training_teaches_unseen_images(trained, phantom):
    network, _ = trained
    made = simulation.simulate(phantom.density(32, 7.0), 100, 77)
    f = network.embed(made.images)
    i, j = distances.all_pairs(100).T
    estimated = network.distances(f, f)[i, j]
    true = rotations.distance(made.quaternions[i], made.quaternions[j])
    # A few seconds do not teach much, but a network that has learned nothing has 0 +- 0.05.
    assert np.corrcoef(estimated, true)[0, 1] > 0.25


@pytest.mark.parametrize(
    ("symmetry", "options"),
    [
        ("C1", {"pairs": "uniform"}),
        ("C1", {"noise_weight": 1.0}),
        ("D2", {"noise_weight": 0.3}),
    ],
)
@pytest.mark.usefixtures("narrow", "untraced")
def test_the_history_is_the_mean_of_what_is_minimised(phantom, preprocessing, symmetry, options):
    source = TrainingImages(
        phantom.density(32, 7.0),
        preprocessing,
        snr_range=(0.02, 2),
        max_shift_px=2.0,
        symmetry=symmetry,
    )
    network = Estimator.create(preprocessing, symmetry=symmetry)
    loss = PairLoss("exact", symmetry=symmetry, **options)
    objective = Objective(loss, network.feature_dim)
    expected = {"loss": [], "mae_rad": []}
    for step in range(4):
        seen, wanted = source.batch(7, step, 16, pairs=options.get("pairs", "all"))
        predicted = network.encoder(seen)
        expected["loss"].append(float(objective.call(wanted, predicted)))
        expected["mae_rad"].append(float(objective.mae_rad(wanted, predicted)))
    history = estimator.fit(
        network,
        source,
        images=64,
        batch_size=16,
        seed=7,
        learning_rate=0.0,
        progress=False,
        **options,
    )
    for key, values in expected.items():
        assert history[key] == [pytest.approx(np.mean(values), rel=1e-4)]


@pytest.mark.usefixtures("narrow", "untraced")
@pytest.mark.parametrize("pairs", ["all", "uniform"])
def test_batches_are_drawn_in_order_and_others_calibrate(preprocessing, source, drawn, pairs):
    network = Estimator.create(preprocessing)
    estimator.fit(network, source, images=50, batch_size=16, seed=6, pairs=pairs, progress=False)
    training = [call[:4] for call in drawn if call[1] < 2**31]
    assert training[: 4 + 1] == [(6, step, 16, pairs) for step in range(4)]
    assert [call[:3] for call in drawn if call[1] >= 2**31] == [(6, 2**31, 512)]
    assert network.encoder.get_layer("variance").get_weights()[0].any()  # calibrated


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rate_warms_up_and_falls_to_zero(preprocessing, source, schedule):
    rates = []
    network = small(preprocessing)
    hook = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: rates.append(
            float(network.encoder.optimizer.learning_rate)
        )
    )
    estimator.fit(
        network,
        source,
        images=160,
        batch_size=4,
        learning_rate=3e-3,
        schedule=schedule,
        callbacks=[hook],
        progress=False,
    )
    assert len(rates) == 40 and network.encoder.optimizer.clipnorm == 1.0
    if schedule == "constant":
        np.testing.assert_allclose(rates, 3e-3, rtol=1e-6)
        return
    # What the next step has: two steps of warm-up, from a twentieth, then half a cosine.
    assert rates[0] == pytest.approx(3e-3 * (1 / 20 + 1) / 2, rel=1e-3)
    assert rates[1] == pytest.approx(3e-3, rel=1e-3) and max(rates) < 3.001e-3
    assert rates[20] == pytest.approx(1.5e-3, rel=1e-3) and rates[-1] == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "rmsprop", "schedule": "constant", "pairs": "uniform"}]
)
def test_the_same_seed_gives_the_same_weights(preprocessing, source, options):
    runs = []
    for seed in (5, 5, 6):
        network = small(preprocessing)
        history = estimator.fit(network, source, seed=seed, **SHORT, **options)
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
    preprocessing, source, tmp_path, capsys, options
):
    whole = small(preprocessing)
    expected = estimator.fit(whole, source, **SHORT, **options)

    with pytest.raises(KeyboardInterrupt):
        estimator.fit(
            small(preprocessing),
            source,
            checkpoint=tmp_path,
            callbacks=[Interrupt()],
            **SHORT,
            **options,
        )
    resumed = small(preprocessing, seed=9)  # its own weights must not matter
    again = {**SHORT, **options, "progress": True, "checkpoint": tmp_path}
    history = estimator.fit(resumed, source, **again)
    bars = capsys.readouterr().err
    assert "2/2" in bars and "3/2" not in bars
    assert untimed(history) == untimed(expected)
    assert len(history["seconds"]) == 2 and min(history["seconds"]) > 0
    for x, y in zip(whole.encoder.get_weights(), resumed.encoder.get_weights(), strict=True):
        np.testing.assert_array_equal(x, y)
    finished = small(preprocessing, seed=9)
    assert estimator.fit(finished, source, **again) == history
    np.testing.assert_array_equal(finished.encoder.get_weights()[0], whole.encoder.get_weights()[0])


def test_a_checkpoint_of_other_settings_is_refused(preprocessing, source, shifted, tmp_path):
    estimator.fit(small(preprocessing), source, checkpoint=tmp_path, **SHORT)
    other = {"seed": 3, "learning_rate": 1e-4, "pairs": "uniform", "noise_weight": 1.0}
    for name, value in other.items():
        with pytest.raises(InputError, match="another folder"):
            estimator.fit(
                small(preprocessing), source, checkpoint=tmp_path, **{**SHORT, name: value}
            )
    half = Estimator.create(
        preprocessing,
        architecture="paper",
        head="cosine",
        feature_dim=8,
        precision="mixed_bfloat16",
    )
    for network, images in ((half, source), (small(preprocessing), shifted)):
        with pytest.raises(InputError, match="another folder"):
            estimator.fit(network, images, checkpoint=tmp_path, **SHORT)


@pytest.mark.parametrize("kind", ["cut", "state", "arrays"])
def test_a_checkpoint_that_is_not_whole_is_refused(preprocessing, source, tmp_path, kind):
    estimator.fit(small(preprocessing), source, checkpoint=tmp_path, **SHORT)
    path = tmp_path / "checkpoint.npz"
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-5000])
    else:
        with np.load(path) as archive:
            arrays = {
                k: archive[k] for k in archive.files if k != "optimizer_0" or kind != "arrays"
            }
        if kind == "state":
            arrays["state"] = np.array("[1]")
        np.savez(path, **arrays)
    with pytest.raises(InputError, match=r"checkpoint\.npz: not a whole checkpoint"):
        estimator.fit(small(preprocessing), source, checkpoint=tmp_path, **SHORT)


def test_callbacks_are_called(preprocessing, source):
    seen = []
    hook = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append((epoch, sorted(logs)))
    )
    estimator.fit(small(preprocessing), source, callbacks=[hook], **SHORT)
    assert seen == [(epoch, ["loss", "mae_rad", "seconds"]) for epoch in (0, 1)]


def test_the_bars_count_epochs_and_batches(preprocessing, source, capsys):
    estimator.fit(small(preprocessing), source, **{**SHORT, "progress": True})
    bars = capsys.readouterr().err
    assert "2/2" in bars and "/4.00 " in bars and "mae_rad=" in bars
    estimator.fit(small(preprocessing), source, **SHORT)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, "adam, rmsprop"),
        ({"schedule": "step"}, "'cosine' or 'constant'"),
        ({"pairs": "some"}, "'all' or 'uniform'"),
        ({"images": 0}, "got 0 images"),
        ({"batch_size": 1}, "batches of 1"),
    ],
)
def test_unknown_settings_are_refused(preprocessing, source, options, message):
    with pytest.raises(InputError, match=message):
        estimator.fit(small(preprocessing), source, **{**SHORT, **options})


def test_nothing_is_trained_for_a_density_that_is_black_on_white(phantom, preprocessing):
    cube = phantom.density(32, 7.0)
    black = TrainingImages(dataclasses.replace(cube, values=-cube.values), preprocessing)
    with pytest.raises(InputError, match="black on white"):
        estimator.train(small(preprocessing), black, images=64, progress=False)


# --------------------------------------------------------------------------------------
# The recipe


@pytest.mark.usefixtures("narrow", "untraced")
def test_the_recipe_ends_with_an_encoder_of_centred_images(preprocessing, shifted, tmp_path, drawn):
    def fresh(seed=2):
        return Estimator.create(preprocessing, passes=2, seed=seed)

    class Plug(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            if (tmp_path / "checkpoint.npz").exists():  # of the first run
                raise KeyboardInterrupt

    options = {"images": 640, "seed": 3, "progress": False}
    whole = fresh()
    expected = estimator.train(whole, shifted, **options)
    assert whole.passes == 3 and len(expected["loss"]) == 2
    # Both runs draw their own images, the second centred ones, and so do the three calibrations.
    runs = {}
    for seed, step, _, _, shift in drawn:
        runs.setdefault((seed, step >= 2**31, shift), []).append(step)
    assert list(runs) == [
        (3, False, 4.0),
        (3, True, 0.02 * 32),
        (4, False, 0.0),
        (4, True, 0.0),
        (4, True, 4.0),
    ]

    with pytest.raises(KeyboardInterrupt):
        estimator.train(fresh(), shifted, checkpoint=tmp_path, callbacks=[Plug()], **options)
    resumed = fresh(seed=9)
    history = estimator.train(resumed, shifted, checkpoint=tmp_path, **options)
    assert untimed(history) == untimed(expected)
    assert resumed.fingerprint == whole.fingerprint
    names = ("images", "seed", "learning_rate", "noise_weight", "passes", "shift_network")
    kept = []
    for folder in (tmp_path, tmp_path / "second"):
        with np.load(folder / "checkpoint.npz") as archive:
            settings = json.loads(str(archive["state"]))["settings"]
        kept.append(tuple(settings[name] for name in names))
    assert kept == [(384, 3, 6e-3, 0.0, 2, False), (256, 4, 2e-3, 1.0, 3, True)]


@pytest.mark.usefixtures("narrow")
def test_what_is_not_shifted_needs_one_network(preprocessing, source, monkeypatch):
    step, traced = keras.Model.train_step, []
    monkeypatch.setattr(
        keras.Model, "train_step", lambda model, data: traced.append(model) or step(model, data)
    )
    network = Estimator.create(preprocessing)
    history = estimator.train(network, source, images=256, progress=False)
    assert network.shift_network is None and len(history["loss"]) == 2
    assert len(estimator.train(network, source, images=1, progress=False)["loss"]) == 1
    assert len(traced) == 6  # three runs and their calibrations, each once: seconds every time


def test_the_broad_ranges_are_those_of_what_ships():
    assert estimator.broad_ranges(116) == {
        "snr_range": (1 / 128, 1.0),
        "clean_fraction": 0.25,
        "max_shift_px": 8.0,
        "defocus_range_angstrom": (5_000.0, 30_000.0),
        "ctf_fraction": 0.4,
        "noise": "coloured",
    }
    assert estimator.broad_ranges(58)["max_shift_px"] == 4.0
    for name in ("4jsv", "1i10"):
        made = estimator.load_estimator(name).notes["source"]
        for key, value in estimator.broad_ranges(116).items():
            assert made[key] == (list(value) if isinstance(value, tuple) else value)


# --------------------------------------------------------------------------------------
# Calibration


def test_calibration_tells_good_images_from_bad_and_moves_no_feature(trained, phantom):
    network = pickle.loads(pickle.dumps(trained[0]))
    density = phantom.density(32, 7.0)
    source = TrainingImages(
        density, network.preprocessing, snr_range=(0.01, 0.01), clean_fraction=0.5
    )
    clean = simulation.simulate(density, 200, 5)
    noisy = imaging.add_noise(clean.images, 0, snr=0.01)
    before = network.embed(clean.images)
    # What was predicted before must not matter.
    last = network.encoder.get_layer("variance")
    last.set_weights([w + 5 for w in last.get_weights()])
    estimator.calibrate(network, source, images=16_384, seed=1)
    np.testing.assert_array_equal(network.embed(clean.images), before)
    expected = [network.predict(x).expected_error_rad.mean() for x in (clean.images, noisy)]
    # Their orientations, by the linear map of features that other such images give.
    others, wanted = source.batch(99, 0, 2000)
    orbits = group("C1")
    learned = network.embed(others, prepared=True)
    linear, *_ = np.linalg.lstsq(learned, wanted[:, : len(orbits.harmonics)])
    for seen, angle in zip((clean.images, noisy), expected, strict=True):
        found = orbits.decode(network.embed(seen) @ linear)
        off = rotations.distance(found, clean.quaternions).mean()
        assert angle == pytest.approx(off, rel=0.2)
    assert expected[1] > 5 * expected[0]


def test_what_is_calibrated_on_is_what_the_encoder_reads(trained, shifted, drawn):
    """All but centred images from a network alone, and what is left by a shift network."""
    whole = pickle.loads(pickle.dumps(trained[0]))
    whole.passes = 2
    estimator.calibrate(whole, shifted, images=600, seed=8)
    split = pickle.loads(pickle.dumps(whole))
    split.split_off_shift_network()
    estimator.calibrate(split, shifted, images=100, seed=8)
    steps = [2**31, 2**31 + 1, 2**31]
    assert drawn == [
        (8, step, 512, "all", shift) for step, shift in zip(steps, (0.64, 0.64, 4.0), strict=True)
    ]
    assert shifted.max_shift_px == 4.0


def test_an_estimator_is_calibrated_on_what_its_shift_network_leaves(trained, phantom):
    split = pickle.loads(pickle.dumps(trained[0]))
    split.passes = 2
    split.split_off_shift_network()
    split.encoder.set_weights([0.9 * w for w in split.encoder.get_weights()])
    source = TrainingImages(
        phantom.density(32, 7.0), split.preprocessing, clean_fraction=1.0, max_shift_px=3.0
    )
    seen, _ = source.batch(1, 0, 200)
    found = []
    for turn in (0, 1):  # what it leaves is the particle's image, or another one's
        split.centre = lambda small, turn=turn: (
            np.zeros((len(small), 2)),
            np.roll(Estimator.centre(split, small)[1], turn, axis=0),
        )
        estimator.calibrate(split, source, images=4096)
        found.append(split.predict(seen, prepared=True).expected_error_rad.mean())
    # How well so small a network learns depends on the last digits, and so on the processor.
    assert found[0] < 0.6 * found[1] and found[1] > 1.5


def test_there_is_nothing_to_calibrate_in_a_network_of_features_alone(preprocessing, source, drawn):
    estimator.calibrate(small(preprocessing), source)
    assert drawn == []
