"""Orienting in chunks: their size, an interruption and who works change nothing."""

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from measures import Lookup

from cryoem import evaluation, rotations, simulation
from cryoem.errors import InputError, MissingToolError
from cryoem.io.particles import read_particles, write_particles
from cryoem.io.stacks import ImageStack, open_array
from cryoem.particles import ParticleStack
from cryoem.recovery import orient

N, OPTIONS = 120, {"landmarks": 50, "copies": 20}


@pytest.fixture(scope="module")
def density(phantom):
    return phantom.density(32, 7.0)


@pytest.fixture(scope="module")
def made(density):
    return simulation.simulate(density, N, 8)


@pytest.fixture(scope="module")
def path(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("particles") / "images.npy"
    np.save(path, made.images)
    return path


@pytest.fixture(scope="module")
def in_file(path):
    return ParticleStack(open_array(path), 7.0)


@pytest.fixture(scope="module")
def network(density):
    return Lookup(density)


@pytest.fixture(scope="module")
def whole(network, in_file, tmp_path_factory):
    """All particles in one chunk, in this process."""
    return orient(network, in_file, work=tmp_path_factory.mktemp("whole"), chunk=N, **OPTIONS)


def assert_same(found, wanted):
    # Features of float32 move by 1e-7 with the batch; small distances are the root of that.
    assert rotations.distance(found.quaternions, wanted.quaternions).max() < 1e-3
    np.testing.assert_allclose(found.residuals_rad, wanted.residuals_rad, atol=1e-3)
    np.testing.assert_allclose(found.features, wanted.features, atol=1e-5)
    np.testing.assert_allclose(found.expected_error_rad, wanted.expected_error_rad, atol=2e-3)
    np.testing.assert_array_equal(found.outlier, wanted.outlier)
    np.testing.assert_array_equal(found.used, wanted.used)


class Watched:
    """Images of a file that note what is read of them, and may do something when a particle is."""

    def __init__(self, path, at=None, then=None):
        self.path, self.at, self.then, self.reads = path, at, then, []
        self.shape = np.load(path, mmap_mode="r").shape
        self.rows = np.arange(len(self))

    def __len__(self):
        return self.shape[0]

    def select(self, rows):
        some = copy.copy(self)  # which notes its reads in the same list
        some.rows = self.rows[rows]
        some.shape = (len(some.rows), *self.shape[1:])
        return some

    def __getitem__(self, index):
        rows = self.rows[index]
        self.reads.append(rows)
        if self.at in rows and in_a_row(rows):
            self.then()
        return np.load(self.path, mmap_mode="r")[rows]

    @property
    def chunks(self):
        """What was read beside landmarks, which do not stand in a row."""
        return [(int(rows[0]), int(rows[-1]) + 1) for rows in self.reads if in_a_row(rows)]


def in_a_row(rows):
    return (np.diff(rows) == 1).all()


def seen(*watched):
    """A stack of such images."""
    images = Watched(*watched)
    return ParticleStack(images, 7.0), images


# --------------------------------------------------------------------------------------
# One process


def error(found, made):
    true = made.quaternions[: len(found.quaternions)]
    aligned = evaluation.orientation_errors(np.array(found.quaternions), true, over="one-sided")
    return aligned.mean_rad


def test_chunks_are_placed_as_well_as_all_together(network, made, whole):
    # 1,500 balls of this radius fill SO(3).
    assert error(whole, made) < (6 * np.pi / 1500) ** (1 / 3)
    assert error(whole, made) < 1.05 * error(orient(network, made), made)
    assert whole.frame.certain and whole.features.shape == (N, 16)
    assert whole.residuals_rad.shape == (N,) and whole.residuals_rad.max() < 0.1
    assert 0.5 < whole.expected_error_rad.mean() / error(whole, made) < 2


@pytest.mark.parametrize("chunk", [8, 50, 1000])
@pytest.mark.parametrize("kept", [False, True])
def test_the_size_of_chunks_changes_nothing(network, path, whole, tmp_path, chunk, kept):
    stack, images = seen(path)
    work = tmp_path if kept else None
    assert_same(orient(network, stack, work=work, chunk=chunk, **OPTIONS), whole)
    assert max(stop - start for start, stop in images.chunks) <= chunk
    assert sorted(i for each in images.chunks for i in range(*each)) == list(range(N))


def test_a_file_is_as_good_as_its_array(network, made, whole, tmp_path):
    write_particles(tmp_path / "p.star", made)
    for stack in (made, read_particles(tmp_path / "p.star")):
        assert_same(orient(network, stack, **OPTIONS), whole)


def test_fewer_particles_than_landmarks_are_all_landmarks(network, made, tmp_path):
    found = orient(network, made.select(slice(40)), work=tmp_path)
    assert found.quaternions.shape == (40, 4) and (found.used <= 3 * 40).all()
    assert error(found, made) < 1.05 * error(orient(network, made.select(slice(40))), made)
    with pytest.raises(InputError, match="at least 24 images"):
        orient(network, made.select(slice(23)), work=tmp_path / "few")
    assert not (tmp_path / "few").exists()


class Torn(Lookup):
    def embed(self, images, *, ctf=None):
        features = super().embed(images)
        if len(images) == N:
            features[[7, 70]] = -features[[7, 70]]
        return features


def test_particles_that_fit_nowhere_are_flagged(network, in_file, tmp_path):
    found = orient(Torn(network.density), in_file, work=tmp_path, **OPTIONS)
    assert found.outlier.dtype == bool and found.outlier.shape == (N,)
    assert found.outlier[[7, 70]].all() and not found.outlier.all()
    assert (found.residuals_rad[[7, 70]] > 10 * np.median(found.residuals_rad)).all()
    assert (found.used > 50).all()


# --------------------------------------------------------------------------------------
# Interrupted


def pull_the_plug():
    raise KeyboardInterrupt


def test_an_interruption_loses_the_chunk_in_work(network, path, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        orient(network, seen(path, 65, pull_the_plug)[0], work=tmp_path, chunk=20, **OPTIONS)
    stack, images = seen(path)
    found = orient(network, stack, work=tmp_path, chunk=30, **OPTIONS)
    assert images.chunks == [(60, 90), (90, 120)]
    assert_same(found, whole)
    # What is done stays done, and is returned.
    stack, images = seen(path)
    kept = orient(network, stack, work=tmp_path, **OPTIONS)
    assert images.chunks == []
    np.testing.assert_array_equal(kept.quaternions, found.quaternions)
    assert vars(kept.frame).keys() == vars(found.frame).keys()
    np.testing.assert_array_equal(kept.frame.right, found.frame.right)


def test_chunks_finished_in_any_order_are_kept(network, path, whole, tmp_path):
    orient(network, seen(path)[0], work=tmp_path, **OPTIONS)
    (tmp_path / "done.json").write_text("[[0, 10], [50, 60], [119, 120]]")
    rows = np.load(tmp_path / "particles.npy", mmap_mode="r+")
    rows["quaternions"][10:50] = rows["quaternions"][60:119] = 0
    stack, images = seen(path)
    assert_same(orient(network, stack, work=tmp_path, chunk=45, **OPTIONS), whole)
    assert images.chunks == [(10, 50), (60, 105), (105, 119)]
    assert json.loads((tmp_path / "done.json").read_text()) == [[0, N]]


def test_a_killed_process_is_continued(network, path, tmp_path):
    stack, _ = seen(path, 65, die)
    (tmp_path / "run").write_bytes(pickle.dumps((network, stack, OPTIONS)))
    work = tmp_path / "work"
    code = (
        "import pickle, sys; sys.path.insert(0, sys.argv[1]); from cryoem import orient; "
        "network, stack, options = pickle.load(open(sys.argv[2], 'rb')); "
        "orient(network, stack, work=sys.argv[3], chunk=20, **options)"
    )
    arguments = [str(each) for each in (Path(__file__).parent, tmp_path / "run", work)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    stack, images = seen(path)
    found = orient(network, stack, work=work, chunk=20, **OPTIONS)
    assert images.chunks == [(60, 80), (80, 100), (100, 120)]
    # Against the same landmarks, without a pause.
    (tmp_path / "fresh").mkdir()
    shutil.copy(work / "landmarks.npz", tmp_path / "fresh")
    assert_same(found, orient(network, seen(path)[0], work=tmp_path / "fresh", **OPTIONS))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# --------------------------------------------------------------------------------------
# Refused


FEW = {"landmarks": 30, "copies": 20}


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def defocused(density):
    return simulation.simulate(density, 40, 8, max_shift_px=2.0, defocus_range_angstrom=(5e4, 1e5))


@pytest.mark.parametrize(
    ("changed", "options", "named"),
    [
        (None, {"seed": 1}, "particles_sha256"),
        (None, {"landmarks": 35}, "particles_sha256"),
        (None, {"copies": 10}, "copies 20, asked for 10"),
        (None, {"references": 100}, "estimator"),
        (None, {"reference": True}, "reference_sha256 None"),
        (None, {"centred": True}, "particles_sha256"),
        (lambda stack: stack.select(slice(1, None)), {}, "particles"),
        (lambda stack: stack.select(slice(None, None, -1)), {}, "particles_sha256"),
        (lambda stack: stack.replace(ctf_parameters=None), {}, "parameters_sha256"),
        # The CTF is a function of angstrom.
        (lambda stack: stack.replace(pixel_size_angstrom=6.9), {}, "parameters_sha256"),
    ],
)
def test_the_folder_of_another_run_is_refused(
    network, density, defocused, tmp_path, changed, options, named
):
    orient(network, defocused, work=tmp_path, **FEW)
    before, options = contents(tmp_path), dict(options)
    if "references" in options:
        network = Lookup(density, options.pop("references"))
    if "reference" in options:
        options["reference"] = density
    stack = defocused if changed is None else changed(defocused)
    with pytest.raises(InputError, match=f"{named}.*another folder"):
        orient(network, stack, work=tmp_path, **{**FEW, **options})
    assert before == contents(tmp_path)


def test_the_folder_of_another_reference_is_refused(network, density, defocused, tmp_path):
    orient(network, defocused, work=tmp_path, reference=density, **FEW)
    other = density.low_passed(30.0)
    for reference in (other, None):
        with pytest.raises(InputError, match=r"reference_sha256.*another folder"):
            orient(network, defocused, work=tmp_path, reference=reference, **FEW)


def test_the_folder_of_a_file_that_has_changed_is_refused(network, path, tmp_path):
    mine = tmp_path / path.name
    shutil.copy(path, mine)
    orient(network, ParticleStack(open_array(mine), 7.0), work=tmp_path / "work", **OPTIONS)
    rows = np.load(mine, mmap_mode="r+")
    rows[-1] = rows[0]
    rows.flush()
    os.utime(mine, ns=(0, 12_345))  # however quickly
    with pytest.raises(InputError, match=r"particles_sha256.*another folder"):
        orient(network, ParticleStack(open_array(mine), 7.0), work=tmp_path / "work", **OPTIONS)


def test_the_folder_of_images_that_are_now_turned_is_refused(network, path, tmp_path):
    """Their files are as they were; and the one that is turned is no landmark."""
    stack = open_array(path)
    orient(network, ParticleStack(stack, 7.0), work=tmp_path, **FEW)
    for row in range(0, len(stack), 50):
        sign = np.ones(len(stack))
        sign[row] = -1
        with pytest.raises(InputError, match=r"particles_sha256.*another folder"):
            orient(network, ParticleStack(stack.with_sign(sign), 7.0), work=tmp_path, **FEW)


def test_the_folder_of_other_images_is_refused_whichever_they_are(network, defocused, tmp_path):
    """Only those of the landmarks were looked at."""
    orient(network, defocused, work=tmp_path, **FEW)
    for row in range(len(defocused)):
        images = defocused.images[:].copy()
        images[row] = images[row, ::-1]
        with pytest.raises(InputError, match=r"particles_sha256.*another folder"):
            orient(network, defocused.with_images(images), work=tmp_path, **FEW)


@pytest.mark.parametrize(
    "field", ["defocus_u_angstrom", "defocus_angle_degrees", "phase_shift_degrees", "voltage_kv"]
)
def test_the_folder_of_another_ctf_is_refused(network, defocused, tmp_path, field):
    kept = orient(network, defocused, work=tmp_path, **FEW)
    parameters = defocused.ctf_parameters
    for row in range(len(defocused)):  # of landmarks and of the others
        values = getattr(parameters, field).copy()
        values[row] += 1
        other = copy.copy(parameters)
        object.__setattr__(other, field, values)
        with pytest.raises(InputError, match=r"parameters_sha256.*another folder"):
            orient(network, defocused.replace(ctf_parameters=other), work=tmp_path, **FEW)
    again = orient(network, defocused, work=tmp_path, **FEW)
    np.testing.assert_array_equal(again.quaternions, kept.quaternions)


def test_centred_the_folder_of_other_shifts_is_refused(network, defocused, tmp_path):
    options = {"centred": True, **FEW}
    orient(network, defocused, work=tmp_path, **options)
    for row in range(len(defocused)):
        shifts = defocused.shifts_px.copy()
        shifts[row] += 0.1
        with pytest.raises(InputError, match=r"(particles|parameters)_sha256.*another folder"):
            orient(network, defocused.replace(shifts_px=shifts), work=tmp_path, **options)
    with pytest.raises(InputError, match=r"_sha256.*another folder"):
        orient(network, defocused, work=tmp_path, **FEW)


def test_where_shifts_are_not_undone_they_do_not_matter(network, defocused, tmp_path):
    kept = orient(network, defocused, work=tmp_path, **FEW)
    moved = defocused.replace(shifts_px=defocused.shifts_px + 1)
    again = orient(network, moved, work=tmp_path, **FEW)
    np.testing.assert_array_equal(again.quaternions, kept.quaternions)
    np.testing.assert_array_equal(again.shifts_px, moved.shifts_px)


def test_results_without_their_landmarks_are_made_again(network, made, path, whole, tmp_path):
    orient(network, made.select(slice(60)), work=tmp_path, **OPTIONS)
    (tmp_path / "landmarks.npz").unlink()
    stack, images = seen(path)
    assert_same(orient(network, stack, work=tmp_path, **OPTIONS), whole)
    assert images.chunks == [(0, N)]


@pytest.mark.parametrize("name", ["particles.npy", "done.json"])
def test_what_somebody_else_keeps_there_is_not_written_onto(network, made, name, tmp_path):
    theirs = tmp_path / name
    if name == "particles.npy":
        np.save(theirs, np.zeros((3, 8, 8), np.float32))
    else:
        theirs.write_text("done")
    before = theirs.read_bytes()
    with pytest.raises(InputError, match=rf"{name}: not what a run keeps there"):
        orient(network, made.select(slice(60)), work=tmp_path, **OPTIONS)
    assert theirs.read_bytes() == before


def archive(**changes):
    """Rewrite a folder's ``landmarks.npz`` with some arrays changed."""

    def rewrite(path):
        with np.load(path) as file:
            arrays = dict(file)
        for name, change in changes.items():
            arrays[name] = change(arrays[name])
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})

    return rewrite


def state(change):
    """Rewrite what ``landmarks.npz`` says as JSON."""

    def rewritten(text):
        told = json.loads(str(text))
        change(told)
        return np.array(json.dumps(told))

    return archive(state=rewritten)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def write(content):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("landmarks.npz", write(b"no archive")),
        ("landmarks.npz", cut),
        ("landmarks.npz", archive(state=lambda _: None)),
        ("landmarks.npz", archive(features=lambda _: None)),
        ("landmarks.npz", archive(quaternions=lambda q: q[1:])),
        ("landmarks.npz", archive(state=lambda _: np.array("no JSON"))),
        ("landmarks.npz", archive(state=lambda _: np.array("[]"))),
        ("landmarks.npz", state(lambda told: told.pop("settings"))),
        ("landmarks.npz", state(lambda told: told.pop("error_scale"))),
        ("landmarks.npz", state(lambda told: told["frame"].pop("left"))),
        ("done.json", write(b"")),
        ("done.json", write(b"no JSON")),
        ("done.json", write(b"[0, 40]")),
        ("done.json", write(b"[[0, 41]]")),
        ("done.json", write(b"[[20, 10]]")),
        ("done.json", write(b"[[0, 20], [10, 40]]")),
        ("particles.npy", write(b"")),
        ("particles.npy", cut),
        ("particles.npy", lambda path: np.save(path, np.zeros(40))),
        ("particles.npy", lambda path: np.save(path, np.load(path)[1:])),
    ],
)
def test_a_spoilt_folder_is_refused(network, defocused, tmp_path, name, spoil):
    orient(network, defocused, work=tmp_path, **FEW)
    spoil(tmp_path / name)
    before = contents(tmp_path)
    # It is said where, and what to do.
    with pytest.raises(InputError, match=rf"{tmp_path}.*(not a run's landmarks|{name}.*remove)"):
        orient(network, defocused, work=tmp_path, **FEW)
    assert before == contents(tmp_path)


@pytest.mark.parametrize("lost", ["done.json", "particles.npy"])
def test_half_of_what_is_kept_is_made_again(network, defocused, tmp_path, lost):
    kept = orient(network, defocused, work=tmp_path, **FEW)
    wanted = np.array(kept.quaternions)
    (tmp_path / lost).unlink()
    found = orient(network, defocused, work=tmp_path, chunk=17, **FEW)
    assert rotations.distance(found.quaternions, wanted).max() < 1e-3


def test_bad_particles_are_named(network, made, tmp_path):
    images = np.array(made.images)
    images[77, 3, 3] = np.nan
    np.save(tmp_path / "bad.npy", images)
    stack = read_particles(tmp_path / "bad.npy")
    with pytest.raises(InputError, match=r"begins at particle 60: .*image 78 of .*not finite"):
        orient(network, stack, work=tmp_path / "work", landmarks=30, seed=3, chunk=20)
    with pytest.raises(InputError, match="chunk must be positive"):
        orient(network, made, chunk=0)


# --------------------------------------------------------------------------------------
# Dask


@pytest.mark.parametrize("in_memory", [False, True])
def test_workers_find_what_one_process_finds(
    cluster, network, made, in_file, whole, tmp_path, in_memory, monkeypatch
):
    here, read = [], ImageStack._read
    monkeypatch.setattr(
        ImageStack, "_read", lambda self, rows: (here.extend(rows), read(self, rows))[1]
    )
    found = orient(
        network,
        made if in_memory else in_file,
        work=None if in_memory else tmp_path,
        chunk=10,
        scheduler=cluster.scheduler_address,
        **OPTIONS,
    )
    assert_same(found, whole)
    # Workers open files themselves: here only the landmarks are read.
    assert len(here) == (0 if in_memory else OPTIONS["landmarks"])


def test_workers_flip_phases_and_undo_shifts(cluster, network, defocused):
    options = {"centred": True, **FEW}
    found = orient(network, defocused, chunk=9, scheduler=cluster.scheduler_address, **options)
    assert_same(found, orient(network, defocused, **options))


def test_a_network_embeds_alike_everywhere(cluster, preprocessing, in_file, tmp_path):
    from cryoem.estimator import Estimator

    untrained = Estimator.create(preprocessing, seed=5)
    found = orient(
        untrained,
        in_file,
        work=tmp_path,
        chunk=40,
        scheduler=cluster.scheduler_address,
        **OPTIONS,
    )
    np.testing.assert_allclose(found.features, untrained.embed(in_file.images[:]), atol=1e-5)
    fingerprints = {
        each.fingerprint for each in (untrained, Estimator.create(preprocessing, seed=5))
    }
    assert len(fingerprints) == 1
    for other in ({"seed": 6}, {"seed": 5, "head": "cosine"}, {"seed": 5, "precision": "float16"}):
        assert Estimator.create(preprocessing, **other).fingerprint not in fingerprints


class Deadly(Watched):
    """Images whose first reader in another process dies in the middle of it."""

    def __init__(self, path, marker):
        super().__init__(path, 65, None)
        self.marker, self.home = marker, os.getpid()

    def __getitem__(self, index):
        self.then = self.once
        return super().__getitem__(index)

    def once(self):
        if os.getpid() != self.home and not self.marker.exists():
            self.marker.touch()
            die()


def test_a_killed_worker_costs_time_only(cluster, network, path, whole, tmp_path):
    from distributed import Client

    with Client(cluster) as client:
        before = set(client.run(os.getpid).values())
        found = orient(
            network,
            ParticleStack(Deadly(path, tmp_path / "died"), 7.0),
            work=tmp_path / "work",
            chunk=10,
            scheduler=client,
            **OPTIONS,
        )
        assert (tmp_path / "died").exists()
        client.wait_for_workers(2)
        assert len(before & set(client.run(os.getpid).values())) == 1
    assert_same(found, whole)


def test_a_workers_error_arrives_and_what_was_done_stays(cluster, network, made, tmp_path):
    images = np.array(made.images)
    images[77, 3, 3] = np.nan
    np.save(tmp_path / "bad.npy", images)
    with pytest.raises(InputError, match="image 78 of"):
        orient(
            network,
            read_particles(tmp_path / "bad.npy"),
            work=tmp_path / "work",
            landmarks=30,
            seed=3,
            chunk=20,
            scheduler=cluster.scheduler_address,
        )
    done = json.loads((tmp_path / "work" / "done.json").read_text())
    assert 0 < sum(stop - start for start, stop in done) < N


def test_without_dask_the_extra_is_named(network, in_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingToolError, match=r"cryoem\[dask\]"):
        orient(network, in_file, work=tmp_path, scheduler="tcp://127.0.0.1:1", **OPTIONS)


def test_a_scheduler_that_is_not_there_is_named(network, in_file, tmp_path):
    import dask

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "500ms"}),
        pytest.raises(InputError, match="answers at tcp"),
    ):
        orient(network, in_file, work=tmp_path, scheduler="tcp://127.0.0.1:1", **OPTIONS)
