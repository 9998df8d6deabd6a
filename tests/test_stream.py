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
from measures import Sees, packed

from cryoem import distances, evaluation, imaging, orient, rotations, simulation, star, stream
from cryoem.errors import InputError, MissingToolError
from cryoem.projection import check_images, project

N, OPTIONS = 120, {"landmarks": 50, "copies": 20, "progress": False}


class Oracle(Sees):
    """Stands in for a network: finds the most alike reference, and has its exact features."""

    def __init__(self, density, references=1500):
        self.known = rotations.grid(references)
        self.references = self.prepared(project(density, self.known))
        self.fingerprint = f"{references} references"

    @staticmethod
    def prepared(images):
        return imaging.normalise(check_images(images)).reshape(len(images), -1)

    def embed(self, images):
        best = np.argmax(self.prepared(images) @ self.references.T, axis=1)
        return packed(self.known[best]).astype(np.float32)

    def distances(self, features, others):
        return distances.from_features(features, others, self.head)


@pytest.fixture(scope="module")
def made(phantom):
    return simulation.particles(phantom.density(32, 7.0), N, 8)


@pytest.fixture(scope="module")
def path(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("particles") / "images.npy"
    np.save(path, made.images)
    return path


@pytest.fixture(scope="module")
def network(phantom):
    return Oracle(phantom.density(32, 7.0))


@pytest.fixture(scope="module")
def whole(network, path, tmp_path_factory):
    """All particles in one chunk, in this process."""
    return stream.orient(network, path, tmp_path_factory.mktemp("whole"), chunk=N, **OPTIONS)


def assert_same(found, wanted):
    # Features of float32 move by 1e-7 with the batch; small distances are the root of that.
    assert rotations.distance(found.quaternions, wanted.quaternions).max() < 1e-3
    np.testing.assert_allclose(found.residuals_rad, wanted.residuals_rad, atol=1e-3)
    np.testing.assert_allclose(found.features, wanted.features, atol=1e-5)


class Images:
    """A stack that notes what is read of it, and may do something when a particle is."""

    def __init__(self, path, at=None, then=None):
        self.path, self.at, self.then, self.reads = path, at, then, []
        self.shape = np.load(path, mmap_mode="r").shape

    def __getitem__(self, index):
        self.reads.append((index.start, index.stop))
        if index.stop - index.start > 1 and self.at in range(index.start, index.stop):
            self.then()
        return np.load(self.path, mmap_mode="r")[index]

    @property
    def chunks(self):
        """What was read besides landmarks, which are read one by one."""
        return [(start, stop) for start, stop in self.reads if stop - start > 1]


# --------------------------------------------------------------------------------------
# One process


def error(found, made):
    true = made.quaternions[: len(found.quaternions)]
    return evaluation.errors(np.array(found.quaternions), true, over="one-sided").mean_rad


def test_chunks_are_placed_as_well_as_all_together(network, made, whole):
    # 1,500 balls of this radius fill SO(3).
    assert error(whole, made) < (6 * np.pi / 1500) ** (1 / 3)
    assert error(whole, made) < 1.05 * error(orient.orient(network, made.images), made)
    assert whole.frame.certain and whole.features.shape == (N, 16)
    assert whole.residuals_rad.shape == (N,) and whole.residuals_rad.max() < 0.1
    assert 0.5 < whole.expected_error_rad.mean() / error(whole, made) < 2


@pytest.mark.parametrize("chunk", [8, 50, 1000])
def test_the_size_of_chunks_changes_nothing(network, path, whole, tmp_path, chunk):
    images = Images(path)
    assert_same(stream.orient(network, images, tmp_path, chunk=chunk, **OPTIONS), whole)
    assert max(stop - start for start, stop in images.reads) <= chunk
    assert sorted({i for each in images.chunks for i in range(*each)}) == list(range(N))


def test_a_file_is_as_good_as_its_array(network, made, whole, tmp_path):
    star.write_particles(
        tmp_path / "p.star", made.images, made.quaternions, pixel_size_angstrom=7.0
    )
    for name, particles in [("a", made.images), ("b", tmp_path / "p.star")]:
        assert_same(stream.orient(network, particles, tmp_path / name, **OPTIONS), whole)


def test_fewer_particles_than_landmarks_are_all_landmarks(network, made, tmp_path):
    found = stream.orient(network, made.images[:40], tmp_path, progress=False)
    assert found.quaternions.shape == (40, 4)
    assert error(found, made) < 1.05 * error(orient.orient(network, made.images[:40]), made)
    with pytest.raises(InputError, match="at least 24 images"):
        stream.orient(network, made.images[:23], tmp_path / "few")


def test_particles_that_fit_nowhere_are_flagged(network, path, tmp_path):
    class Torn(Oracle):
        def embed(self, images):
            features = super().embed(images)
            if len(images) == N:
                features[[7, 70]] = -features[[7, 70]]
            return features

    network = copy.copy(network)
    network.__class__ = Torn
    found = stream.orient(network, path, tmp_path, **OPTIONS)
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
        stream.orient(network, Images(path, 65, pull_the_plug), tmp_path, chunk=20, **OPTIONS)
    again = Images(path)
    found = stream.orient(network, again, tmp_path, chunk=30, **OPTIONS)
    assert again.chunks == [(60, 90), (90, 120)]
    assert_same(found, whole)
    # What is done stays done, and is returned.
    once_more = Images(path)
    kept = stream.orient(network, once_more, tmp_path, **OPTIONS)
    assert once_more.chunks == []
    np.testing.assert_array_equal(kept.quaternions, found.quaternions)
    assert vars(kept.frame).keys() == vars(found.frame).keys()
    np.testing.assert_array_equal(kept.frame.right, found.frame.right)


def test_chunks_finished_in_any_order_are_kept(network, path, whole, tmp_path):
    stream.orient(network, path, tmp_path, **OPTIONS)
    (tmp_path / "done.json").write_text("[[0, 10], [50, 60], [119, 120]]")
    rows = np.load(tmp_path / "particles.npy", mmap_mode="r+")
    rows["quaternions"][10:50] = rows["quaternions"][60:119] = 0
    again = Images(path)
    assert_same(stream.orient(network, again, tmp_path, chunk=45, **OPTIONS), whole)
    assert again.chunks == [(10, 50), (60, 105), (105, 119)]
    assert json.loads((tmp_path / "done.json").read_text()) == [[0, N]]


def test_a_killed_process_is_continued(network, path, tmp_path):
    (tmp_path / "run").write_bytes(pickle.dumps((network, Images(path, 65, die), OPTIONS)))
    work = tmp_path / "work"
    code = (
        "import pickle, sys; sys.path.insert(0, sys.argv[1]); from cryoem import stream; "
        "network, images, options = pickle.load(open(sys.argv[2], 'rb')); "
        "stream.orient(network, images, sys.argv[3], chunk=20, **options)"
    )
    arguments = [str(each) for each in (Path(__file__).parent, tmp_path / "run", work)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    again = Images(path)
    found = stream.orient(network, again, work, chunk=20, **OPTIONS)
    assert again.chunks == [(60, 80), (80, 100), (100, 120)]
    # Against the same landmarks, without a pause.
    (tmp_path / "fresh").mkdir()
    shutil.copy(work / "landmarks.npz", tmp_path / "fresh")
    assert_same(found, stream.orient(network, path, tmp_path / "fresh", **OPTIONS))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# --------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 1}, "particles_sha256"),
        ({"landmarks": 60}, "particles_sha256"),
        ({"copies": 10}, "copies 20, asked for 10"),
        ({"references": 100}, "estimator"),
        ({"particles": slice(1, None)}, "particles"),
        ({"particles": slice(None, None, -1)}, "particles_sha256"),
    ],
)
def test_the_folder_of_another_run_is_refused(network, phantom, made, tmp_path, other, named):
    stream.orient(network, made.images, tmp_path, **OPTIONS)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = dict(other)
    images = made.images[other.pop("particles", slice(None))]
    if "references" in other:
        network = Oracle(phantom.density(32, 7.0), other.pop("references"))
    with pytest.raises(InputError, match=f"{named}.*another folder"):
        stream.orient(network, images, tmp_path, **{**OPTIONS, **other})
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_results_without_their_landmarks_are_made_again(network, made, path, whole, tmp_path):
    stream.orient(network, made.images[:60], tmp_path, **OPTIONS)
    (tmp_path / "landmarks.npz").unlink()
    again = Images(path)
    assert_same(stream.orient(network, again, tmp_path, **OPTIONS), whole)
    assert again.chunks == [(0, N)]


def test_bad_particles_are_named(network, made, tmp_path):
    images = made.images.copy()
    images[77, 3, 3] = np.nan
    work = tmp_path / "work"
    with pytest.raises(InputError, match=r"begins at particle 60: .*image 17 "):
        stream.orient(network, images, work, landmarks=30, seed=3, chunk=20, progress=False)
    for bad, wanted in [
        (made.images[:, :16], r"\(n, size, size\)"),
        (tmp_path / "none.npy", "no such file"),
    ]:
        with pytest.raises(InputError, match=wanted):
            stream.orient(network, bad, tmp_path / "bad")
    with pytest.raises(InputError, match="chunk must be positive"):
        stream.orient(network, made.images, tmp_path / "bad", chunk=0)
    (work / "landmarks.npz").write_bytes(b"no archive")
    with pytest.raises(InputError, match="not a run's landmarks"):
        stream.orient(network, images, work)


# --------------------------------------------------------------------------------------
# Dask


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        dashboard_address=None,
        memory_limit=0,
        local_directory=str(tmp_path_factory.mktemp("dask")),
    ) as cluster:
        yield cluster


@pytest.mark.parametrize("in_memory", [False, True])
def test_workers_find_what_one_process_finds(
    cluster, network, made, path, whole, tmp_path, in_memory
):
    particles = made.images if in_memory else path
    found = stream.orient(
        network, particles, tmp_path, chunk=10, scheduler=cluster.scheduler_address, **OPTIONS
    )
    assert_same(found, whole)


def test_a_network_embeds_alike_everywhere(cluster, preprocessing, path, tmp_path):
    from cryoem.estimator import Estimator

    untrained = Estimator.create(preprocessing, seed=5)
    found = stream.orient(
        untrained, path, tmp_path, chunk=40, scheduler=cluster.scheduler_address, **OPTIONS
    )
    np.testing.assert_allclose(found.features, untrained.embed(np.load(path)), atol=1e-5)
    fingerprints = {
        each.fingerprint for each in (untrained, Estimator.create(preprocessing, seed=5))
    }
    assert len(fingerprints) == 1
    for other in ({"seed": 6}, {"seed": 5, "head": "cosine"}, {"seed": 5, "precision": "float16"}):
        assert Estimator.create(preprocessing, **other).fingerprint not in fingerprints


class Deadly(Images):
    """Images whose first reader in another process dies in the middle of it."""

    def __init__(self, path, marker):
        super().__init__(path, 65, self.once)
        self.marker, self.home = marker, os.getpid()

    def once(self):
        if os.getpid() != self.home and not self.marker.exists():
            self.marker.touch()
            die()


def test_a_killed_worker_costs_time_only(cluster, network, path, whole, tmp_path):
    from distributed import Client

    with Client(cluster) as client:
        before = set(client.run(os.getpid).values())
        found = stream.orient(
            network,
            Deadly(path, tmp_path / "died"),
            tmp_path / "work",
            chunk=10,
            scheduler=client,
            **OPTIONS,
        )
        assert (tmp_path / "died").exists()
        client.wait_for_workers(2)
        assert len(before & set(client.run(os.getpid).values())) == 1
    assert_same(found, whole)


def test_a_workers_error_arrives_and_what_was_done_stays(cluster, network, made, tmp_path):
    images = made.images.copy()
    images[77, 3, 3] = np.nan
    options = {"landmarks": 30, "seed": 3, "progress": False}
    with pytest.raises(InputError, match="image 17 "):
        stream.orient(
            network, images, tmp_path, chunk=20, scheduler=cluster.scheduler_address, **options
        )
    done = json.loads((tmp_path / "done.json").read_text())
    assert 0 < sum(stop - start for start, stop in done) < N


def test_without_dask_the_extra_is_named(network, path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingToolError, match=r"cryoem\[dask\]"):
        stream.orient(network, path, tmp_path, scheduler="tcp://127.0.0.1:1", **OPTIONS)


def test_a_scheduler_that_is_not_there_is_named(network, path, tmp_path):
    import dask

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "500ms"}),
        pytest.raises(InputError, match="answers at tcp"),
    ):
        stream.orient(network, path, tmp_path, scheduler="tcp://127.0.0.1:1", **OPTIONS)
