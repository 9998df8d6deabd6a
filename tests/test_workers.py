"""Ab initio, refinement and reconstruction by the workers of a Dask scheduler."""

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from cryoem import (
    Search,
    ab_initio,
    classify,
    evaluation,
    matching,
    read_particles,
    reconstruct,
    refine,
    refine_halves,
    simulate,
    workers,
)
from cryoem.abinitio import Schedule
from cryoem.abinitio.coarse import coarsened
from cryoem.abinitio.starts import cut_out, race
from cryoem.errors import InputError
from cryoem.io.particles import write_particles
from cryoem.io.stacks import ImageStack, open_array
from cryoem.noise import Noise
from cryoem.preprocessing import Preprocessing

N = 90


@pytest.fixture(scope="module")
def density(phantom):
    return phantom.density(24, 9.0)


@pytest.fixture(scope="module")
def truth(density):
    seen = {"max_shift_px": 2.0, "defocus_range_angstrom": (2e4, 6e4)}
    return simulate(density, N, 1, snr=1.0, **seen).replace(noise=None)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("cryoem.refinement.search.POINTS_AT_ONCE", 4000)
    monkeypatch.setattr("cryoem.refinement.fit.SENT", 2)
    monkeypatch.setattr("cryoem.projection._POINTS_AT_ONCE", 3000)
    monkeypatch.setattr("cryoem.reconstruction.POINTS_AT_ONCE", 3000)
    monkeypatch.setattr("cryoem.reconstruction.SENT", 3)


def test_workers_refine_to_the_same_poses(cluster, truth, density):
    start = truth.with_poses(truth.quaternions, truth.shifts_px + 0.3)
    options = {"resolution_angstrom": 20.0, "search": Search(starts=2)}
    here = refine(start, density, **options)
    there = refine(start, density, scheduler=cluster.scheduler_address, **options)
    for name in ("quaternions", "shifts_px", "contrast", "covariances", "chi2", "gain"):
        np.testing.assert_allclose(
            getattr(there, name), getattr(here, name), rtol=2e-3, atol=2e-4, err_msg=name
        )


@pytest.mark.parametrize("symmetry", ["C1", "C3"])
def test_workers_back_project_to_the_same_map(cluster, truth, symmetry):
    here = reconstruct(truth, symmetry=symmetry)
    there = reconstruct(truth, symmetry=symmetry, scheduler=cluster.scheduler_address)
    np.testing.assert_allclose(there.values, here.values, atol=1e-4 * here.values.max())


def test_workers_match_to_the_same_candidates(cluster, truth, density, monkeypatch):
    monkeypatch.setattr("cryoem.matching.AT_ONCE", 16)
    reading = Preprocessing(24, 24, 20, density.voxel_size_angstrom)
    shifts = truth.shifts_px[:, None] + np.array([[0, 0], [2, 0], [0, 2]])
    options = {"count": 3, "apart_rad": 0.5, "shifts_px": shifts, "references": 512}
    here = matching.candidates(truth, density, reading, **options)
    away = matching.candidates(
        truth, density, reading, scheduler=cluster.scheduler_address, **options
    )
    for mine, others in zip(here, away, strict=True):
        np.testing.assert_allclose(others, mine, atol=1e-6)
    seen = matching.match(
        truth, density, reading, references=512, scheduler=cluster.scheduler_address
    )
    known = matching.match(truth, density, reading, references=512)
    np.testing.assert_array_equal(seen.quaternions, known.quaternions)


def test_halves_are_refined_by_workers(cluster, truth, monkeypatch):
    monkeypatch.undo()  # at once, all images of a half and many references
    monkeypatch.setattr("cryoem.refinement.fit.SENT", 1)
    options = {"rounds": 1, "resolution_angstrom": 20.0, "seed": 3}
    here, asked, ask = refine_halves(truth, **options), [], workers._by_workers
    monkeypatch.setattr(
        workers, "_by_workers", lambda job, *rest: (asked.append(job), ask(job, *rest))[1]
    )
    there = refine_halves(truth, scheduler=cluster.scheduler_address, **options)
    # Two maps before the round and after it; each half refined, held out twice, and tried elsewhere
    # on the sphere, coarsely and to the end, and where it is; all refined; those that are made of
    # the map refined, and each half of them tried elsewhere: at matches, in the frame and then on
    # the sphere.
    kinds = [type(job).__name__ for job in asked]
    assert kinds.count("_BackProjecting") == 4 and kinds.count("_Refining") == 13 + 1 + 6
    assert kinds.count("_Matching") == 2 * 4
    errors = evaluation.orientation_errors(
        there.particles.quaternions, here.particles.quaternions, over="none"
    )
    assert errors.median_rad < 1e-3 and errors.mean_rad < 5e-3
    fsc = there.fsc.corrected.values, here.fsc.corrected.values
    np.testing.assert_allclose(*fsc, atol=0.02)


class Deadly(ImageStack):
    """Images whose first reader in another process dies in the middle of it."""

    marker, home = None, None

    def _read(self, rows):
        if os.getpid() != self.home and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._read(rows)

    def __reduce__(self):
        _, (arguments, options) = super().__reduce__()
        return _deadly, (self.marker, self.home, arguments, options)


def _deadly(marker, home, arguments, options):
    stack = Deadly(*arguments, **options)
    stack.marker, stack.home = marker, home
    return stack


def test_a_worker_that_dies_costs_time_only(cluster, truth, density, tmp_path):
    write_particles(tmp_path / "seen.star", truth)
    stack = read_particles(tmp_path / "seen.star")
    images = stack.images.select(slice(None))
    images.__class__, images.marker, images.home = Deadly, tmp_path / "died", os.getpid()
    mortal = stack.replace(images=images)
    there = reconstruct(mortal, scheduler=cluster.scheduler_address)
    assert images.marker.exists()
    images.marker.unlink()
    refined = refine(mortal, density, resolution_angstrom=20.0, scheduler=cluster.scheduler_address)
    assert images.marker.exists()
    here = reconstruct(stack)
    np.testing.assert_allclose(there.values, here.values, atol=1e-4 * here.values.max())
    wanted = refine(stack, density, resolution_angstrom=20.0)
    np.testing.assert_allclose(refined.shifts_px, wanted.shifts_px, atol=1e-2)


@dataclasses.dataclass(frozen=True)
class DeadlySchedule(Schedule):
    """A schedule that kills the first other process that asks for it."""

    marker: Path = Path()
    home: int = 0

    @property
    def rising(self):
        if os.getpid() != self.home and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().rising


#: Too few rounds for a map, for which no test here asks.
FEW = {"rounds": 5, "images": (60, 60), "orientations": (200, 500), "finest_angstrom": 20.0}


def test_workers_run_starts_to_the_same_maps(cluster, truth, tmp_path):
    """One dies on the way, which costs time only."""
    unknown, options = truth.without_poses(), {"scheduler": cluster.scheduler_address}
    deadly = DeadlySchedule(**FEW, marker=tmp_path / "died", home=os.getpid())
    cut = cut_out(unknown, 150.0, 0.0, deadly, 0)
    halves = [coarsened(cut.stack.select(np.arange(h, N, 2)), cut.finest_angstrom) for h in (0, 1)]
    tasks = [(1, 0), (2, 1), (3, 0), (4, 0)]
    here = race(halves, cut, tasks, Schedule(**FEW))
    there = race(halves, cut, tasks, deadly, **options)
    assert deadly.marker.exists()
    assert [len(starts) for starts in there] == [3, 1]
    for one, other in zip(np.concatenate(here), np.concatenate(there), strict=True):
        assert other.done == one.done and len(other.images) == N // 2
        np.testing.assert_allclose(other.volumes, one.volumes, atol=1e-3 * one.volumes.max())


def test_ab_initio_is_done_by_workers(cluster, truth, density, monkeypatch):
    options = {"diameter_angstrom": 150.0, "shift_angstrom": 0.0, "reference": density}
    options |= {"schedule": Schedule(**FEW), "symmetry": "C1", "seed": 4}
    here, asked, ask = ab_initio(truth.without_poses(), **options), [], workers._by_workers
    monkeypatch.setattr(
        workers, "_by_workers", lambda job, *rest: (asked.append(job), ask(job, *rest))[1]
    )
    there = ab_initio(truth.without_poses(), scheduler=cluster.scheduler_address, **options)
    # Starts are begun and ended, those of each half refined, and both back-projected.
    kinds = [type(job).__name__ for job in asked]
    assert kinds == ["_Running"] * 2 + ["_Refining"] * 2 + ["_BackProjecting"] * 2
    assert there.verdict.agreement == pytest.approx(here.verdict.agreement, abs=0.03)
    errors = evaluation.orientation_errors(
        there.particles.quaternions, here.particles.quaternions, over="none"
    )
    assert errors.median_rad < 1e-2


def test_workers_sort_images_alike(cluster, truth):
    options = {"shift_angstrom": 0.0, "schedule": Schedule(**FEW), "seed": 5, "starts": 2}
    here = classify(truth.without_poses(), 2, **options)
    there = classify(truth.without_poses(), 2, scheduler=cluster.scheduler_address, **options)
    np.testing.assert_allclose(there.evidence, here.evidence, atol=1e-2)


def test_a_workers_error_arrives(cluster, truth, density, tmp_path):
    images = np.array(truth.images)
    images[77, 3, 3] = np.nan
    np.save(tmp_path / "bad.npy", images)
    # Nothing is measured in the images here: only a worker reads the spoilt one.
    bad = truth.replace(images=open_array(tmp_path / "bad.npy"), noise=Noise.white(1.0))
    with pytest.raises(InputError, match=r"image 78 of .*not finite"):
        reconstruct(bad, scheduler=cluster.scheduler_address)


@pytest.mark.parametrize(
    ("items", "most", "options", "size"),
    [
        (2000, 5000, {}, 1000),  # one part of all would leave one of two workers idle
        (10_000, 4000, {}, 2500),  # as large as they may be, but none of them small
        (2000, 5000, {"each": 4}, 250),
        (100, 5000, {"each": 4, "least": 60}, 60),
        (1, 5000, {}, 1),
        (0, 5000, {}, 1),
    ],
)
def test_parts_are_shared_out_among_all_workers(cluster, items, most, options, size):
    with cluster.get_client() as client:
        assert sum(client.nthreads().values()) == 2
        assert workers.shared_out(items, most, client, **options) == size
    assert workers.shared_out(items, most, cluster.scheduler_address, **options) == size


def test_few_images_are_back_projected_by_every_worker(cluster, truth, monkeypatch):
    monkeypatch.undo()  # all images would be laid down together
    asked, ask = [], workers._by_workers

    def heard(job, parts, client):
        parts = list(parts)
        asked.append([len(part) for _, part in parts])
        return ask(job, iter(parts), client)

    monkeypatch.setattr(workers, "_by_workers", heard)
    reconstruct(truth, scheduler=cluster.scheduler_address)
    assert asked == [[N // 2, N // 2]]
