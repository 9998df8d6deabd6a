"""What several test files share: a phantom that is known exactly, and a small trained network."""

import fcntl
import os
import pickle

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["MPLBACKEND"] = "Agg"
# Many small matrices: on two cores BLAS threads wait for each other longer than they work.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # each test has one of the cores
    os.environ.setdefault("CRYOEM_THREADS", "1")

import pytest

from cryoem import density, simulation, structures
from cryoem.preprocessing import Preprocessing


@pytest.fixture(scope="session", autouse=True)
def coarse_search():
    """Where particles may lie astray is sought 15 degrees apart: most of a small refinement."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cryoem.refinement.elsewhere.REFERENCES", 4608)
        yield


@pytest.fixture(scope="session")
def phantom():
    return density.Phantom.random(0)


@pytest.fixture(scope="session")
def shipped():
    """The shipped densities at the paper's sampling."""
    return {name: structures.load_density(name) for name in structures.SHIPPED}


@pytest.fixture(scope="session")
def preprocessing():
    return Preprocessing(32, 16, 16, 7.0)


@pytest.fixture(scope="session")
def source(phantom, preprocessing):
    return simulation.TrainingImages(phantom.density(32, 7.0), preprocessing, clean_fraction=1.0)


@pytest.fixture
def narrow(monkeypatch):
    """A steerable network of few channels: hardly anything is computed."""
    from cryoem.estimator import networks

    layers = tuple((harmonics, angles, 16) for harmonics, angles, _ in networks.STEERABLE)
    monkeypatch.setattr(networks, "STEERABLE", layers)


@pytest.fixture(scope="session")
def trained(source, preprocessing, tmp_path_factory):
    """A small network, trained once for all processes that test: (estimator, history)."""
    from cryoem import estimator

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the folder of this run, above those of the workers
        folder = folder.parent
    with (folder / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (kept := folder / "trained.pickle").exists():
            network = estimator.Estimator.create(preprocessing, seed=1)
            history = estimator.fit(
                network, source, images=4800, batch_size=64, images_per_epoch=1600, progress=False
            )
            kept.write_bytes(pickle.dumps((network, history)))
    return pickle.loads(kept.read_bytes())


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two workers of Dask, of one thread each."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        dashboard_address=None,
        memory_limit=0,
        local_directory=str(tmp_path_factory.mktemp("dask")),
    ) as cluster:
        yield cluster
