import dataclasses
import json
import pickle
import zipfile

import numpy as np
import pytest
from measures import relative_error

from cryoem import imaging, load_estimator, rotations, structures
from cryoem.backend import keras
from cryoem.errors import InputError
from cryoem.estimator import Estimator
from cryoem.io import files
from cryoem.preprocessing import Preprocessing

RNG = np.random.default_rng(0)
HEADS = ("exact", "cosine", "euclidean")


def small(preprocessing, seed=0):
    return Estimator.create(
        preprocessing, architecture="paper", head="cosine", feature_dim=8, seed=seed
    )


def copied(estimator, **changes):
    """An estimator of its own networks."""
    return dataclasses.replace(pickle.loads(pickle.dumps(estimator)), **changes)


def output(network, images):
    return keras.ops.convert_to_numpy(network(images, training=False))


# --------------------------------------------------------------------------------------
# Networks


def test_the_papers_network_has_the_papers_size():
    prepare = Preprocessing(116, 116, 116, 3.67)
    network = Estimator.create(prepare, architecture="paper", head="cosine", feature_dim=512)
    assert network.encoder.count_params() == 4_551_936
    assert network.encoder.output_shape == (None, 512)


@pytest.mark.parametrize("architecture", ["paper", "resnet", "steerable"])
@pytest.mark.parametrize("head", HEADS)
def test_features_are_unit_but_for_the_euclidean_head(architecture, head):
    prepare = Preprocessing(32, 16, 15, 7.0)
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


@pytest.mark.parametrize("symmetry", ["C1", "D2", "C3", "T", "O"])
def test_the_steerable_network_turns_and_mirrors_with_the_image(symmetry):
    prepare = Preprocessing(32, 24, 20, 7.0)
    network = Estimator.create(prepare, symmetry=symmetry)
    images = bounded(RNG.standard_normal((5, 20, 20)))
    predicted = [
        network.predict(x, prepared=True)
        for x in (images, imaging.quarter_turn(images), imaging.mirror(images))
    ]
    f, turned, mirrored = (x.features for x in predicted)
    # In which way, the orientations of the group tell: the same in every inner product.
    np.testing.assert_allclose(turned @ turned.T, f @ f.T, atol=1e-4)
    np.testing.assert_allclose(mirrored @ mirrored.T, f @ f.T, atol=1e-4)
    cross = f @ turned.T
    assert not np.allclose(cross, f @ f.T, atol=1e-2)  # it does see the turn
    twice = network.embed(imaging.quarter_turn(imaging.quarter_turn(images)), prepared=True)
    np.testing.assert_allclose(turned @ twice.T, cross, atol=1e-4)  # a turn is a turn
    # A quarter turn of the image takes (x, y) to (y, -x), the mirror to (-x, y).
    s, s_turned, s_mirrored = (x.shifts_px for x in predicted)
    np.testing.assert_allclose(s_turned, s[:, ::-1] * [1, -1], atol=1e-4)
    np.testing.assert_allclose(s_mirrored, s * [-1, 1], atol=1e-4)
    for other in predicted[1:]:
        np.testing.assert_allclose(
            other.expected_error_rad, predicted[0].expected_error_rad, rtol=1e-4
        )


def test_rotations_by_any_angle_are_nearly_exact(phantom):
    network = Estimator.create(Preprocessing(32, 32, 32, 7.0))
    q = rotations.uniform(4, 0)
    seen = [phantom.project(rotations.in_plane(q, a), 32, 7.0) for a in (0.0, 0.3)]
    f, turned = (network.embed(x) for x in seen)
    np.testing.assert_allclose(turned @ turned.T, f @ f.T, atol=1e-2)
    assert np.abs(f - turned).max() > 5e-2


def test_unknown_choices_are_refused(preprocessing):
    with pytest.raises(InputError, match="steerable, resnet, paper"):
        Estimator.create(preprocessing, architecture="transformer")
    with pytest.raises(InputError, match="exact, cosine, euclidean"):
        Estimator.create(preprocessing, head="manhattan")


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
    assert not np.allclose(full, half, atol=1e-5)


# --------------------------------------------------------------------------------------
# Prediction


def test_predictions_do_not_depend_on_the_batch(trained):
    network = copied(trained[0], passes=2)
    images = RNG.standard_normal((7, 32, 32))
    whole = network.predict(images)
    for some, rows in (
        (network.predict(images, batch_size=3), slice(None)),
        (network.predict(images[2:3]), slice(2, 3)),
    ):
        for name, found in vars(some).items():
            np.testing.assert_allclose(found, getattr(whole, name)[rows], atol=1e-4, rtol=1e-4)


def test_many_images_are_read_as_few_are(trained):
    """By a graph that is traced once, and follows the weights."""
    network = copied(trained[0], passes=2)
    images = RNG.standard_normal((300, 32, 32))
    for scale in (1.0, 0.5):
        network.encoder.set_weights([scale * w for w in network.encoder.get_weights()])
        whole = network.predict(images)
        for rows in (slice(120), slice(240, 300)):  # few by themselves
            few = network.predict(images[rows])
            for name, found in vars(few).items():
                np.testing.assert_allclose(found, getattr(whole, name)[rows], atol=1e-4, rtol=1e-4)
    before = network.encoder.traced
    network.predict(np.concatenate([images, images]), batch_size=280)  # the last 40 are few
    assert network.encoder.traced is before
    assert before.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_every_pass_but_the_last_undoes_the_shift_that_was_predicted(trained, passes):
    network = copied(trained[0], passes=passes)
    f = network.feature_dim
    images = RNG.standard_normal((4, 32, 32))
    small = network.preprocessing.reduce(images)
    shifts, read = np.zeros((4, 2)), network.preprocessing.cut(small)
    for number in range(passes):
        out = output(network.encoder, read)
        shifts = shifts + out[:, f : f + 2]
        if number < passes - 1:
            read = network.preprocessing.cut(small, shifts_px=shifts)
    found = network.predict(images)
    np.testing.assert_array_equal(found.features, out[:, :f])
    np.testing.assert_allclose(found.shifts_px, shifts * 32 / 16, rtol=1e-6)  # pixels of the frame
    centred = network.centre(small)
    np.testing.assert_array_equal(centred[1], read)
    # What is prepared is read once.
    once = network.predict(read, prepared=True)
    np.testing.assert_array_equal(once.features, out[:, :f])
    np.testing.assert_allclose(once.shifts_px, out[:, f : f + 2] * 32 / 16, rtol=1e-6)


def test_phases_are_flipped_image_by_image(trained):
    network, _ = trained
    images = RNG.standard_normal((5, 32, 32))
    ctf = RNG.standard_normal((5, 32, 17))  # of any sign: a real one has one where these pixels see
    found = network.embed(images, ctf=ctf, batch_size=2)
    np.testing.assert_allclose(found, network.embed(imaging.flip_phases(images, ctf)), atol=1e-4)
    assert not np.allclose(found, network.embed(images), atol=1e-2)


def test_the_expected_error_is_the_mean_angle_of_the_predicted_variance(preprocessing):
    network = Estimator.create(preprocessing)
    layer = network.encoder.get_layer("variance")
    kernel, bias = layer.get_weights()
    assert not kernel.any()
    layer.set_weights([kernel, np.full_like(bias, 2 * np.log(0.2))])
    found = network.predict(RNG.standard_normal((3, 32, 32))).expected_error_rad
    drawn = np.linalg.norm(0.2 * np.random.default_rng(1).standard_normal((100_000, 3)), axis=1)
    np.testing.assert_allclose(found, drawn.mean(), rtol=0.01)


def test_no_image_has_no_features(trained):
    found = trained[0].predict(np.zeros((0, 32, 32)))
    assert found.features.shape == (0, 18) and found.features.dtype == np.float32
    assert found.shifts_px.shape == (0, 2) and found.expected_error_rad.shape == (0,)


def test_a_network_of_features_alone_predicts_no_more(preprocessing):
    found = dataclasses.replace(small(preprocessing), passes=2).predict(np.ones((2, 32, 32)))
    assert found.features.shape == (2, 8)
    assert found.shifts_px is None and found.expected_error_rad is None


def test_brightness_and_contrast_do_not_matter(trained):
    network, _ = trained
    images = RNG.standard_normal((3, 32, 32))
    np.testing.assert_allclose(network.embed(5 + 3 * images), network.embed(images), atol=1e-4)


def test_images_of_another_box_are_refused(trained):
    with pytest.raises(InputError, match="32 px"):
        trained[0].embed(np.zeros((2, 40, 40)))


# --------------------------------------------------------------------------------------
# The shift network


@pytest.fixture
def whole(trained):
    return copied(trained[0], passes=2)


@pytest.fixture
def split(whole):
    """An estimator whose encoder went its own way after its shift network was split off."""
    parted = copied(whole)
    parted.split_off_shift_network()
    parted.encoder.set_weights([0.9 * w for w in parted.encoder.get_weights()])
    return parted


def test_one_network_predicts_the_shift_and_the_other_reads(split, whole):
    images = RNG.standard_normal((4, 32, 32))
    small = whole.preprocessing.reduce(images)
    # The shift network makes as many passes as the whole did, and predicts the whole's shifts.
    shifts, centred = split.centre(small)
    np.testing.assert_allclose(
        shifts, whole.predict(images).shifts_px * 16 / 32, atol=1e-5 * np.abs(shifts).max()
    )
    read = output(split.encoder, centred)
    found = split.predict(images)
    np.testing.assert_array_equal(found.features, read[:, : split.feature_dim])
    last = read[:, split.feature_dim : split.feature_dim + 2]
    np.testing.assert_allclose(found.shifts_px, (shifts + last) * 2, rtol=1e-5)
    assert not np.allclose(found.features, whole.embed(images), atol=1e-2)


def test_splitting_off_changes_nothing_by_itself(whole):
    parted = copied(whole)
    parted.split_off_shift_network()
    images = RNG.standard_normal((4, 32, 32))
    thrice = dataclasses.replace(whole, passes=3)
    np.testing.assert_array_equal(parted.embed(images), thrice.embed(images))
    # and the encoder's weights are no longer the shift network's
    before = parted.shift_network.get_weights()
    parted.encoder.set_weights([0.5 * w for w in parted.encoder.get_weights()])
    for now, then in zip(parted.shift_network.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_an_estimator_that_does_not_centre_or_has_a_shift_network_splits_none_off(
    split, preprocessing
):
    for other in (split, Estimator.create(preprocessing), small(preprocessing)):
        with pytest.raises(InputError, match="centres images"):
            other.split_off_shift_network()


# --------------------------------------------------------------------------------------
# Pickles and fingerprints


def test_an_estimator_is_pickled_whole(split):
    split.notes = {"particle": "phantom"}
    back = pickle.loads(pickle.dumps(split))
    images = RNG.standard_normal((4, 32, 32))
    for name, found in vars(back.predict(images)).items():
        np.testing.assert_array_equal(found, getattr(split.predict(images), name))
    assert back.fingerprint == split.fingerprint
    assert (back.settings, back.notes) == (split.settings, split.notes)
    half = Estimator.create(split.preprocessing, precision="mixed_bfloat16")
    assert pickle.loads(pickle.dumps(half)).precision == "mixed_bfloat16"


def test_the_fingerprint_is_of_all_that_features_depend_on(split):
    others = [
        dataclasses.replace(split, **change)
        for change in (
            {"passes": 2},
            {"precision": "mixed_bfloat16"},
            {"head": "cosine"},
            {"preprocessing": Preprocessing(32, 16, 16, 8.0)},
        )
    ]
    for number in (0, 1):  # a weight of the encoder, one of the shift network
        other = copied(split)
        network = (other.encoder, other.shift_network)[number]
        network.set_weights([*network.get_weights()[:-1], np.ones(1, np.float32)])
        others.append(other)
    assert len({split.fingerprint, *(other.fingerprint for other in others)}) == 7
    assert dataclasses.replace(split, notes={"a": 1}).fingerprint == split.fingerprint


# --------------------------------------------------------------------------------------
# The file


def test_an_estimator_round_trips(trained, tmp_path):
    network = copied(trained[0], notes={"particle": "phantom"})
    network.save(tmp_path / "weights.npz")
    back = load_estimator(tmp_path / "weights.npz")
    assert (back.settings, back.notes) == (network.settings, {"particle": "phantom"})
    assert (back.head, back.architecture, back.feature_dim) == ("exact", "steerable", 18)
    assert back.preprocessing == network.preprocessing
    images = RNG.standard_normal((4, 32, 32))
    # Weights are kept in eight bits.
    np.testing.assert_allclose(back.embed(images), network.embed(images), atol=1e-2)
    half = load_estimator(str(tmp_path / "weights.npz"), precision="mixed_bfloat16")
    assert half.precision == "mixed_bfloat16"
    assert not np.allclose(back.embed(images), half.embed(images), atol=1e-5)


def test_the_file_keeps_eight_bits(split, tmp_path):
    split.save(tmp_path / "weights.npz")
    back = load_estimator(tmp_path / "weights.npz")
    assert back.passes == 3
    for kept, whole in (
        (back.encoder, split.encoder),
        (back.shift_network, split.shift_network),
    ):
        for found, weight in zip(kept.get_weights(), whole.get_weights(), strict=True):
            step = 2e-3 * np.abs(weight)  # float16, and half a step of the largest in a column
            if weight.ndim > 2:
                step = np.abs(weight).max(axis=-2, keepdims=True) / 253
            assert (np.abs(found - weight) <= step + 1e-7).all()
    with np.load(tmp_path / "weights.npz") as archive:
        sizes = dict.fromkeys("bef", 0)  # int8, float16, float32 (the scales)
        for values in (archive[name] for name in archive.files if name != "settings"):
            sizes[values.dtype.char] += values.size
    assert sizes["b"] > 20 * (sizes["e"] + sizes["f"])


def test_what_ships_is_loaded_by_name():
    estimator = load_estimator("4JSV", precision="mixed_bfloat16")
    again = load_estimator(structures.DATA / "4jsv.npz", precision="mixed_bfloat16")
    assert estimator.fingerprint == again.fingerprint
    assert estimator.precision == "mixed_bfloat16" and estimator.passes > 1
    assert estimator.preprocessing.frame_px == 116


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


def test_arrays_that_are_not_scaled_are_read_too(saved):
    def unscaled(settings, arrays):
        for name in [name for name in arrays if name.endswith("_scale")]:
            scale = arrays.pop(name)
            whole = name.removesuffix("_scale")
            arrays[whole] = (arrays[whole] * scale).astype(np.float16)

    images = RNG.standard_normal((2, 32, 32))
    before = load_estimator(saved).embed(images)
    rewritten(saved, unscaled)
    np.testing.assert_allclose(load_estimator(saved).embed(images), before, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, a: s.update(format_version=99), "format 99, .* reads 4 alone$"),
        (lambda s, a: s.update(format_version=3), "format 3, .* reads 4 alone: train it again"),
        (lambda s, a: s.update(format_version=2), "format 2, .* reads 4 alone: train it again"),
        (lambda s, a: s.pop("format_version"), "format None, .* reads 4 alone$"),
        (lambda s, a: a.pop("settings"), "not an estimator's file .*settings"),
        (lambda s, a: a.pop("weight_003"), "do not fit a paper network"),
        (lambda s, a: a.pop("weight_002_scale"), "not whole .*weight_002_scale"),
        (lambda s, a: s.update(feature_dim=9), "do not fit a paper network"),
        (lambda s, a: s.update(shift_network=True), "do not fit a paper network"),
        (lambda s, a: s.update(architecture="unknown"), "steerable, resnet, paper"),
        (lambda s, a: s.pop("shift_network"), "not a whole estimator .*shift_network"),
        (lambda s, a: s.pop("head"), "not a whole estimator .*head"),
        (lambda s, a: s.pop("notes"), "not a whole estimator .*notes"),
        (lambda s, a: s["preprocessing"].pop("crop_px"), "not a whole estimator .*crop_px"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(saved, change, message):
    rewritten(saved, change)
    with pytest.raises(InputError, match=message) as caught:
        load_estimator(saved)
    assert str(caught.value).startswith(f"{saved}: ")


def test_the_file_of_an_estimator_needs_its_shift_network(split, tmp_path):
    path = tmp_path / "weights.npz"
    split.save(path)
    rewritten(path, lambda s, a: [a.pop(k) for k in list(a) if k.startswith("shift_network_")])
    with pytest.raises(InputError, match="do not fit"):
        load_estimator(path)


def test_a_truncated_file_is_refused(saved):
    saved.write_bytes(saved.read_bytes()[:-5000])
    with pytest.raises(InputError, match="not an estimator's file"):
        load_estimator(saved)


@pytest.mark.parametrize("at", [0.01, 0.3, 0.5, 0.9])
def test_a_damaged_file_is_refused(saved, at):
    content = bytearray(saved.read_bytes())
    start = int(at * len(content))
    content[start : start + 200] = bytes(200)
    saved.write_bytes(content)
    with pytest.raises(InputError, match="not an estimator's file"):
        load_estimator(saved)


class Trap:
    """Would leave a trace if it were unpickled."""

    def __reduce__(self):
        return (open, ("trapped", "w"))


@pytest.mark.parametrize("kind", ["pickle", "npz", "npy", "text", "empty", "header"])
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
        elif kind == "header":  # what NumPy's parser raises is none of its usual errors
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("settings.npy", b"\x93NUMPY\x01\x00\x03\x00(((")
    for read in (load_estimator, lambda path: files.read_npz(path, "an estimator's file")):
        with pytest.raises(InputError, match="not an estimator's file"):
            read(path)
    assert not (tmp_path / "trapped").exists()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_estimator(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("box", "pixel"), [(64, 3.5), (48, 4.67), (40, 7.0), (36, 7.0), (16, 14.0)]
)
def test_images_of_other_pixels_and_boxes_are_read_alike(trained, phantom, box, pixel):
    network, q = trained[0], rotations.uniform(40, 7)
    own = network.predict(phantom.project(q, 32, 7.0))
    other = network.reading(box, pixel)
    images = phantom.project(q, box, pixel)
    defocus = {"defocus_u_angstrom": np.full(40, 3e4)}
    found = other.predict(images)
    assert relative_error(found.features, own.features) < 0.05
    np.testing.assert_allclose(found.shifts_px * pixel, own.shifts_px * 7.0, atol=1.5)
    through = [
        est.embed(imaging.apply_ctf(seen, values), ctf=values)
        for est, seen, values in (
            (network, phantom.project(q, 32, 7.0), imaging.ctf(32, 7.0, **defocus)),
            (other, images, imaging.ctf(box, pixel, **defocus)),
        )
    ]
    assert relative_error(through[1], through[0]) < 0.1


def test_images_like_its_own_are_read_by_the_estimator_itself(trained):
    network = trained[0]
    assert network.reading(32, 7.0) is network and network.reading(32, 7.05) is network
    assert network.reading(64, 3.5).preprocessing == Preprocessing(64, 16, 16, 3.5)
    assert network.reading(64, 7.0).preprocessing == Preprocessing(64, 32, 16, 7.0)
