"""From the images alone: the likelihood, the map, the axes, and the verdict."""

import dataclasses
import signal
import sys
import threading
import time
import types

import finufft
import numpy as np
import pytest
import scipy.fft
import scipy.sparse
from measures import QUICK
from scipy import ndimage
from scipy.spatial.transform import Rotation

from cryoem import (
    Density,
    ParticleStack,
    ab_initio,
    accelerator,
    classify,
    evaluation,
    imaging,
    load_density,
    maps,
    project,
    reconstruct,
    rotations,
    simulate,
    threads,
)
from cryoem.abinitio import initial, sorting
from cryoem.abinitio.annealing import Start
from cryoem.abinitio.coarse import coarsened, small_stack
from cryoem.abinitio.expectation import Sums, expect, slices_of, solve
from cryoem.abinitio.initial import _axes
from cryoem.errors import InputError, MissingToolError
from cryoem.particles import CtfParameters
from cryoem.symmetry import group

BOX, VOXEL = 32, 5.0


def phantom(symmetry: str = "C1", seed: int = 3) -> Density:
    """Blobs off the middle, copied by a group's elements."""
    rng = np.random.default_rng(seed)
    order = group(symmetry).order
    centres = rng.uniform(-34, 34, (max(3, 14 // order), 3))
    centres[:, 0] += 12 if order > 1 else 0
    heights = rng.uniform(0.5, 1.5, len(centres))
    axis = (np.arange(BOX) - BOX // 2) * VOXEL
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    values = np.zeros((BOX,) * 3)
    for g in Rotation.from_quat(group(symmetry).elements):
        for (cx, cy, cz), height in zip(g.apply(centres), heights, strict=True):
            values += height * np.exp(-((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / (2 * 64))
    return Density(values, VOXEL)


# --------------------------------------------------------------------------------------
# One round


@pytest.fixture(scope="module")
def few():
    """Four particles with CTF and shifts, as the search sees them, and five references."""
    stack = simulate(phantom(), 4, 0, snr=2.0, max_shift_px=2, defocus_range_angstrom=(8e3, 2e4))
    small = small_stack(stack.without_poses(), 160.0, 15.0)
    images = coarsened(small, 15.0)
    frequencies = images.slices.frequencies
    views = rotations.uniform(5, 1)
    values = phantom().resampled(images.box_px).values
    return images, slices_of(values, frequencies, views)


class OnDevice(np.ndarray):
    """An array that refuses to meet one of NumPy's, as CuPy's do."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **options):
        on_device(*inputs, *out)
        plain = [a.view(np.ndarray) if isinstance(a, OnDevice) else a for a in inputs]
        if out:
            options["out"] = tuple(a.view(np.ndarray) for a in out)
        done = getattr(ufunc, method)(*plain, **options)
        return out[0] if out else moved_to_device(done)


def on_device(*values):
    arrays = [a for a in values if isinstance(a, np.ndarray) and a.ndim]
    if not all(isinstance(a, OnDevice) for a in arrays):
        raise TypeError("arrays of the GPU and of the computer")


def moved_to_device(done):
    if isinstance(done, tuple):
        return tuple(moved_to_device(one) for one in done)
    return np.asarray(done).view(OnDevice)


class Cupy:
    """NumPy under the name of CuPy, with arrays of its own."""

    def __getattr__(self, name):
        function = getattr(np, name)

        def called(*arguments, **options):
            if name != "asarray":
                on_device(*arguments)
            return moved_to_device(function(*arguments, **options))

        return called

    @staticmethod
    def asnumpy(array):
        return np.asarray(array).view(np.ndarray)


def called_on_device(function, used, **always):
    """A function of arrays of the GPU, and of no other; ``used`` has its name once it is called."""

    def called(*arguments, **options):
        used.add(function.__name__)
        on_device(*arguments)
        plain = [a.view(np.ndarray) if isinstance(a, OnDevice) else a for a in arguments]
        return moved_to_device(function(*plain, **options, **always))

    return called


def nufft_on_device(function, used):
    """With the options alone that both libraries have."""
    called = called_on_device(function, used, nthreads=1, showwarn=0)
    return lambda *arguments, eps, isign, upsampfac=2.0: called(
        *arguments, eps=eps, isign=isign, upsampfac=upsampfac
    )


class OnDeviceCsr(scipy.sparse.csr_matrix):
    """A sparse matrix of theirs."""

    def __matmul__(self, other):
        on_device(other)
        return moved_to_device(super().__matmul__(other.view(np.ndarray)))


@pytest.fixture
def gpu(monkeypatch):
    """NumPy and finufft under the names of CuPy and cufinufft, and with their calls: those used."""
    used = set()
    cufinufft = types.SimpleNamespace(
        nufft3d1=nufft_on_device(finufft.nufft3d1, used),
        nufft3d2=nufft_on_device(finufft.nufft3d2, used),
    )
    sparse = types.SimpleNamespace(csr_matrix=OnDeviceCsr)
    transforms = types.SimpleNamespace(
        rfftn=called_on_device(scipy.fft.rfftn, used),
        irfftn=called_on_device(scipy.fft.irfftn, used),
    )
    splines = types.SimpleNamespace(map_coordinates=called_on_device(ndimage.map_coordinates, used))
    monkeypatch.setitem(sys.modules, "cupyx.scipy.fft", transforms)
    monkeypatch.setitem(sys.modules, "cupyx.scipy.ndimage", splines)
    monkeypatch.setitem(sys.modules, "cupy", Cupy())
    monkeypatch.setitem(sys.modules, "cufinufft", cufinufft)
    monkeypatch.setitem(sys.modules, "cupyx.scipy.sparse", sparse)
    monkeypatch.setattr(accelerator, "gpu", lambda: True)
    return used


@pytest.mark.parametrize("quick", [False, True])
def test_posteriors_are_those_of_the_model(few, quick):
    images, references = few
    gain = np.sqrt(images.slices.weights / images.power)
    offsets = np.array([[0.5, -1.0], [0, 0], [2.0, 1.0], [-1.0, 0.3]])
    steps = np.array([[0, 0], [1.0, 0], [0, -0.5]])
    sums = Sums(len(references), images.values.shape[1])
    found = expect(images, gain, offsets, references, steps, sums, spread_px=1.5, quick=quick)
    # The same, term by term.
    k = 2j * np.pi / images.box_px * images.slices.frequencies
    right = np.zeros_like(sums.right, complex)
    weight = np.zeros_like(sums.weight, float)
    for i in range(4):
        y = images.values[i] * gain[0]
        model = references * images.transfer[i] * gain[0]
        logs = np.empty((3, 5))
        moved = [y * np.exp(k @ (offsets[i] + step)) for step in steps]
        for s, step in enumerate(steps):
            distance = np.sum(np.abs(moved[s] - model) ** 2, axis=1)
            far = np.sum((offsets[i] + step) ** 2) / (2 * 1.5**2)
            logs[s] = -0.5 * distance + 0.5 * np.sum(np.abs(y) ** 2) - far
        posterior = np.exp(logs - logs.max())
        assert np.isclose(
            found.evidence[i], logs.max() + np.log(posterior.sum() / 15), rtol=1e-4, atol=1e-3
        )
        posterior /= posterior.sum()
        assert (found.step[i], found.reference[i]) == divmod(int(logs.argmax()), 5)
        transfer = images.transfer[i] * gain[0]
        for s in range(3):
            right += posterior[s][:, None] * (moved[s] * transfer)
        weight += posterior.sum(axis=0)[:, None] * transfer**2
    assert np.allclose(sums.right, right, atol=2e-3 * np.abs(right).max())
    assert np.allclose(sums.weight, weight, atol=2e-3 * weight.max())


def started(images, rounds):
    slow = dataclasses.replace(QUICK, rounds=32)  # rounding would lead hurried rounds elsewhere
    start = Start(images, 150.0, 6.0, 1, schedule=slow)
    for _ in range(rounds):
        start.advance()
    return start


def test_a_gpu_goes_the_same_way(request):
    stack = simulate(phantom(), 150, 0, snr=2.0, max_shift_px=1, defocus_range_angstrom=(8e3, 2e4))
    images = coarsened(small_stack(stack.without_poses(), 160.0, 15.0), 15.0)
    here = started(images, 28)  # shifts tried everywhere, then nearby; noise told from signal
    request.getfixturevalue("gpu")
    there = started(images, 28)
    assert type(there.volumes) is np.ndarray
    assert np.corrcoef(here.volumes.ravel(), there.volumes.ravel())[0, 1] > 0.99
    assert np.median(np.abs(there.offsets_px - here.offsets_px).max(axis=1)) < 1e-6


def test_maps_are_made_and_laid_the_same_way_on_a_gpu(request):
    stack = simulate(phantom(), 60, 0, snr=1.0, max_shift_px=1, defocus_range_angstrom=(8e3, 2e4))
    turned = maps.turned(phantom(), rotations.uniform(1, 0)[0])

    def made():
        density = reconstruct(stack)
        return density.values, maps.register(turned, density, allow_mirror=False)

    here, laid = made()
    used = request.getfixturevalue("gpu")
    there, again = made()
    assert used == {"nufft3d1", "rfftn", "irfftn", "map_coordinates"}
    assert type(there) is np.ndarray
    assert np.allclose(there, here, atol=1e-3 * np.abs(here).max())
    assert rotations.distance(again.quaternion, laid.quaternion) < 1e-2
    assert again.correlation == pytest.approx(laid.correlation, abs=1e-3)


def test_where_a_gpu_is_asked_for_and_not_there(monkeypatch):
    def asked(value):
        monkeypatch.setenv("CRYOEM_DEVICE", value)
        accelerator.gpu.cache_clear()
        return accelerator.gpu()

    assert asked("") is asked("cpu") is False
    with pytest.raises(MissingToolError, match=r"asks for a GPU: No module .*cupy"):
        asked("gpu")
    with pytest.raises(InputError, match="must be cpu or gpu, got 'cuda'"):
        asked("cuda")
    accelerator.gpu.cache_clear()


def test_the_map_of_images_that_are_placed_right_is_the_density():
    density = phantom().resampled(24)
    q = rotations.uniform(400, 2)
    images = coarsened(
        ParticleStack(project(density, q), density.voxel_size_angstrom), 2.2 * 160 / 24
    )
    sums = Sums(400, images.values.shape[1])
    identity = np.eye(400, dtype=np.float32)
    sums.add(identity, np.ascontiguousarray(images.values).view(np.float32))
    sums.add_weights(identity, np.ones(images.values.shape, np.float32))
    found = solve(sums, images.slices.frequencies, q, 24, ridge=1e-4, iterations=20)
    wanted = density.low_passed(2.2 * 160 / 24, edge=0.0).values
    axis = np.arange(24) - 12
    ball = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < 11**2
    assert np.corrcoef(found[ball], wanted[ball])[0, 1] > 0.995
    assert np.isclose(found[ball].std(), wanted[ball].std(), rtol=0.1)
    nothing = Sums(400, images.values.shape[1])  # a class may lose all images
    assert not solve(nothing, images.slices.frequencies, q, 24).any()


def test_small_images_show_the_middle_with_phases_flipped():
    density = phantom()
    q = rotations.uniform(3, 4)
    parameters = CtfParameters(np.array([9e3, 15e3, 22e3]))
    stack = simulate(density, 3, 0, defocus_range_angstrom=(9e3, 22e3))
    stack = stack.with_poses(q).replace(ctf_parameters=parameters)
    frames = imaging.apply_ctf(project(density, q), stack.ctf())
    shifts = np.array([[1.0, 2.0], [-3.0, 0.5], [0, 0]])
    seen = stack.replace(images=imaging.shift(frames, shifts), shifts_px=shifts)
    small = small_stack(seen, 120.0, 16.0)
    assert small.box_px < BOX and not small.shifts_px.any()
    assert (small.ctf_parameters.images == "phase flipped").all()
    n = round(BOX * VOXEL / small.pixel_size_angstrom)
    wanted = imaging.downsample(imaging.flip_phases(frames, stack.ctf()), n)
    assert np.allclose(small.images, imaging.crop(wanted, small.box_px), atol=2e-3 * frames.max())


def test_images_too_small_to_tell_are_refused():
    stack = simulate(phantom(), 30, 0)
    with pytest.raises(InputError, match="a particle of 10 A has no detail"):
        ab_initio(stack, diameter_angstrom=10.0, shift_angstrom=0.0)
    black = dataclasses.replace(phantom(), values=-phantom().values)
    with pytest.raises(InputError, match="black on white"):
        ab_initio(ParticleStack(np.zeros((30, 32, 32)), 7.0), reference=black)
    aside = dataclasses.replace(phantom(), values=np.roll(phantom().values, (0, 0, 8), (0, 1, 2)))
    # Its blobs are off the middle by themselves, by 1, -2 and -1 voxels.
    with pytest.raises(InputError, match=r"off the middle.*by -1, 2, -7 voxels along z, y and x"):
        ab_initio(ParticleStack(np.zeros((30, 32, 32)), 7.0), reference=aside)
    with pytest.raises(InputError, match="at least 20 images"):
        ab_initio(stack.select(slice(0, 5)))
    with pytest.raises(InputError, match="symmetry"):
        ab_initio(stack, symmetry="banana")


# --------------------------------------------------------------------------------------
# Frames


def test_particles_follow_their_density():
    density, q = phantom(), rotations.uniform(20, 5)
    stack = ParticleStack(project(density, q), VOXEL, quaternions=q)
    turn, move = rotations.uniform(1, 6)[0], np.array([7.0, -4.0, 11.0])
    for hand in (False, True):
        source = maps.mirrored(density) if hand else density
        there = maps.turned(source, turn, move)
        found = stack.moved(turn, move, other_hand=hand)
        again = imaging.shift(project(there, found.quaternions), found.shifts_px)
        assert np.corrcoef(again.ravel(), stack.images.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("symmetry", ["C1", "C2", "C3", "D2", "D3", "C7", "T", "O", "I"])
def test_the_symmetry_of_a_map_is_found_wherever_it_lies(symmetry):
    rng = np.random.default_rng(8)
    turn, move = rotations.uniform(1, 9)[0], np.array([6.0, -9.0, 4.0])
    lies = maps.turned(phantom(symmetry), turn, move)
    noise = 0.1 * lies.values.std() * rng.standard_normal((2, BOX, BOX, BOX))
    pair = maps.HalfMaps(*(Density(lies.values + n, VOXEL) for n in noise), independent=True)
    found = maps.symmetry_of(pair)
    assert found.symmetry == symmetry
    standard = maps.turned(lies, found.quaternion, found.shift_angstrom)
    for g in group(symmetry).elements[1:]:
        copy = maps.turned(standard, g)
        assert np.corrcoef(copy.values.ravel(), standard.values.ravel())[0, 1] > 0.97
    wrong = {"C1": ["C2"], "C2": ["C3"], "C3": ["C2"], "D2": ["D3", "T"], "D3": ["D4"]}
    wrong |= {"C7": ["C5"], "T": ["O"], "O": ["I"], "I": ["O"]}
    assert not any(maps.find_axes(pair, other).believed for other in wrong[symmetry])
    assert maps.find_axes(pair, symmetry).believed


def nearly(symmetry: str, truly: str, share: float, finer_than: float = 0.0) -> Density:
    """What has a symmetry, but for a share of finer detail that has another one."""
    a, b = phantom(symmetry).values, phantom(truly)
    b = b.values - (b.low_passed(finer_than).values if finer_than else 0)
    return Density(a / a.std() + share * b / b.std(), VOXEL)


def test_a_symmetry_that_some_turns_have_is_not_that_of_all():
    """The three-folds of what is nearly D3 agree in full: they do not make up for its two-folds."""
    lies = maps.turned(nearly("D3", "C3", 0.45), rotations.uniform(1, 9)[0], (6.0, -9.0, 4.0))
    pair = maps.HalfMaps(lies, lies, independent=True)
    assert maps.symmetry_of(pair, resolution_angstrom=12.0).symmetry == "C3"
    assert maps.find_axes(pair, "D3").ratio == pytest.approx(0.88, abs=0.02)


def test_the_symmetry_is_that_of_the_finest_detail():
    density, q = nearly("D3", "C3", 0.6, finer_than=20.0), rotations.uniform(400, 4)
    seen = ParticleStack(project(density, q), VOXEL, quaternions=q)
    pair = maps.HalfMaps(density, density, independent=True)
    assert maps.symmetry_of(pair, resolution_angstrom=25.0).symmetry == "D3"
    halves = [seen.select(slice(h, None, 2)) for h in (0, 1)]
    assert _axes(halves, None, None).symmetry == "C3"
    assert not _axes(halves, "D3", None).believed


def test_maps_that_do_not_agree_have_no_symmetry():
    noise = np.random.default_rng(10).standard_normal((2, BOX, BOX, BOX))
    pair = maps.HalfMaps(*(Density(n, VOXEL) for n in noise), independent=True)
    assert maps.symmetry_of(pair).symmetry == "C1"
    # Nor one that is asked for: nothing is divided by a correlation that is none.
    assert not any(maps.find_axes(pair, name).believed for name in ("C2", "C3", "D2"))


def test_an_image_that_lies_anywhere_alike_counts_in_full(few):
    """However many places there are: none of them is probable, all together are one image."""
    images, _ = few
    used = len(images.slices.frequencies)
    gain = np.ones_like(images.power)
    nothing = np.zeros((3000, used), np.complex64)
    steps = np.stack(np.meshgrid([0, 1, -1, 2], [0, 1, -1]), axis=-1).reshape(-1, 2).astype(float)
    sums = Sums(len(nothing), used)
    expect(
        images, gain, np.zeros((len(images), 2)), nothing, steps, sums, spread_px=1e3, quick=False
    )
    np.testing.assert_allclose(sums.weight.sum(axis=0), (images.transfer**2).sum(axis=0), rtol=1e-3)


def test_images_put_elsewhere_by_an_early_map_are_found_again():
    truth = simulate(phantom(), 200, 19, snr=1.0)
    small = small_stack(truth.without_poses(), 160.0, 14.0)
    start = Start(coarsened(small, 14.0), 130.0, 30.0, 5, schedule=QUICK)
    pixel = small.pixel_size_angstrom
    values = phantom().sampled_as(small.box_px, pixel).values.astype(np.float32)
    start.begin_with(Density(values, pixel))
    start.done = QUICK.rising  # nothing is located from here on but what is looked for anew
    start.offsets_px[:], start.located[:] = (20 / pixel, 0), True
    for _ in range(24):
        start.advance()
    assert np.mean(np.linalg.norm(start.offsets_px, axis=1) * pixel < 7) > 0.9


# --------------------------------------------------------------------------------------
# From the images alone


def test_orientations_and_shifts_are_found_from_the_images_alone():
    density = phantom()
    truth = simulate(
        density, 400, 11, snr=0.6, max_shift_px=2, defocus_range_angstrom=(8e3, 2e4),
        noise_excess=3.0,
    )  # fmt: skip
    unknown = truth.without_poses().replace(noise=None)
    found = ab_initio(unknown, starts=4, schedule=QUICK, seed=1)
    assert found.verdict.found and found.verdict.agreement > 0.75
    assert found.axes.symmetry == "C1"
    at = found.fsc.corrected.resolution(0.143)
    assert found.verdict.nyquist_limited == at.nyquist_limited
    for limited in (False, True):
        said = str(dataclasses.replace(found.verdict, nyquist_limited=limited))
        assert f"agree to {at.angstrom:.1f} A, " in said
        assert ("the finest that the pixels hold" in said) == limited
    q = found.particles.quaternions
    error = evaluation.orientation_errors(q, truth.quaternions)
    assert error.median_rad < 0.12 and error.mean_rad < 0.2
    expected = found.particles.expected_error_rad
    assert 0.4 < np.median(expected) / error.median_rad < 1.5
    laid = maps.register(found.density, density)
    assert laid.correlation > 0.9
    # Shifts too, once the map lies where the density does.
    there = found.particles.moved(laid.quaternion, laid.shift_angstrom, other_hand=laid.mirrored)
    assert np.median(np.linalg.norm(there.shifts_px - truth.shifts_px, axis=1)) < 0.5


def test_a_part_of_the_images_is_enough_to_place_all(monkeypatch):
    """The particle is smaller than it was said to be; and there is no second one."""
    truth = simulate(phantom(), 400, 12, snr=1.5)
    monkeypatch.setattr("cryoem.abinitio.initial.SURE", 1.1)  # it is looked for in any case

    def solved():
        return ab_initio(
            truth.without_poses(),
            starts=2,
            images=200,
            diameter_angstrom=155.0,
            shift_angstrom=0.0,
            schedule=QUICK,
            seed=2,
        )

    found = solved()
    error = evaluation.orientation_errors(found.particles.quaternions, truth.quaternions)
    assert len(found.particles) == 400 and error.median_rad < 0.12
    assert 90 < found.diameter_angstrom < 145
    assert found.verdict.found and found.verdict.second == 0
    monkeypatch.undo()
    again = solved()
    assert np.allclose(again.particles.quaternions, found.particles.quaternions)
    assert len(again.history) == len(found.history)  # of the one map's rounds alone


def test_a_symmetric_particle_ends_in_the_standard_setting():
    density = load_density("1i10", voxel_size_angstrom=5.0, resolution_angstrom=10.0, box_px=32)
    truth = simulate(density, 400, 13, snr=1.0)
    found = ab_initio(truth.without_poses(), starts=2, shift_angstrom=0.0, schedule=QUICK, seed=3)
    assert found.axes.symmetry == "D2" and found.verdict.found
    for g in group("D2").elements[1:]:
        copy = maps.turned(found.half_maps.mean, g)
        assert np.corrcoef(copy.values.ravel(), found.half_maps.mean.values.ravel())[0, 1] > 0.9


def test_a_symmetry_that_the_particle_has_not_is_noticed():
    truth = simulate(phantom(), 300, 14, snr=1.5)
    found = ab_initio(
        truth.without_poses(), symmetry="C3", starts=2, shift_angstrom=0.0, schedule=QUICK, seed=4
    )
    assert not found.verdict.found
    assert any("C3" in reason for reason in found.verdict.reasons)


def test_classes_part_two_particles():
    stacks = [simulate(phantom(seed=s), 200, 15, snr=1.0) for s in (3, 21)]
    images = np.concatenate([s.images for s in stacks])
    small = small_stack(ParticleStack(images, VOXEL), 160.0, 14.0)
    start = Start(coarsened(small, 14.0), 130.0, 0.0, 5, classes=2, schedule=QUICK)
    for _ in range(QUICK.rounds):
        start.advance()
    grid = start.random_grid()
    which = start.look(np.arange(400), grid).reference // len(grid)
    first = which[:200].mean()
    assert abs(first - which[200:].mean()) > 0.8


def test_two_particles_and_noise_are_sorted():
    """Each with a map of its own; of noise none explains anything."""
    one, two = (simulate(phantom(seed=s), 200, 15, snr=1.0) for s in (3, 21))
    noise = np.random.default_rng(16).standard_normal((60, BOX, BOX)) * one.images.std() / 2**0.5
    images = np.concatenate([one.images, two.images[:120], noise])
    label = np.repeat([1, 2, 0], [200, 120, 60])
    found = classify(
        ParticleStack(images, VOXEL), 2, starts=2, diameter_angstrom=130.0, shift_angstrom=0.0,
        schedule=QUICK, seed=6,
    )  # fmt: skip
    assert np.mean(found.number == label) > 0.9
    assert found.probabilities.shape == (380, 3)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1)
    # The larger class first, and its map is that particle's.
    density = phantom(seed=3)
    own = maps.register(
        density.sampled_as(found.maps[0].box_px, found.maps[0].voxel_size_angstrom), found.maps[0]
    )
    other = maps.register(
        density.sampled_as(found.maps[1].box_px, found.maps[1].voxel_size_angstrom), found.maps[1]
    )
    assert own.correlation > 0.85 > other.correlation


def test_two_particles_give_no_map_of_one():
    """Not even where their mean pleases both halves; the verdict says what they are."""
    images = np.concatenate([simulate(phantom(seed=s), 200, 21, snr=1.0).images for s in (3, 21)])
    found = ab_initio(
        ParticleStack(images, VOXEL), starts=2, diameter_angstrom=130.0, shift_angstrom=0.0,
        schedule=QUICK, seed=6,
    )  # fmt: skip
    assert found.verdict.agreement > 0.5  # which alone would be a map
    assert not found.verdict.found and found.verdict.second > 0.3
    assert "two particles" in str(found.verdict)
    some = dataclasses.replace(found.verdict, reasons=(), found=True, second=0.15)
    assert "15% of the images are of something else" in str(some)
    assert "too few or too noisy" in str(dataclasses.replace(some, second=0.0, agreement=0.6))


def test_clean_images_of_one_particle_are_not_two(monkeypatch):
    """Two maps are asked at more orientations than one, and one may be better than the first."""
    truth = simulate(phantom(), 400, 12, snr=200)
    monkeypatch.setattr("cryoem.abinitio.initial.SURE", 1.1)  # a second one is looked for
    found = ab_initio(
        truth.without_poses(), starts=2, diameter_angstrom=155.0, shift_angstrom=0.0,
        schedule=QUICK, seed=2,
    )  # fmt: skip
    assert found.verdict.found and found.verdict.second == 0


def test_noise_does_not_become_the_map_that_it_was_begun_with():
    images = np.random.default_rng(18).standard_normal((300, BOX, BOX))
    found = ab_initio(
        ParticleStack(images, VOXEL), reference=phantom(), diameter_angstrom=110.0,
        shift_angstrom=0.0, schedule=QUICK, seed=0,
    )  # fmt: skip
    assert not found.verdict.found


@pytest.fixture
def interruptible():
    """Ctrl-C counts, even where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_the_rounds_under_way_alone(monkeypatch, interruptible):
    rounds = []

    def advance(start):
        rounds.append(start)
        if len(rounds) == 5:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.02)
        start.done += 1

    monkeypatch.setattr(Start, "advance", advance)
    images = simulate(phantom(), 40, 1, snr=1.0).without_poses()
    with pytest.raises(KeyboardInterrupt):
        ab_initio(images, starts=8, shift_angstrom=0.0, schedule=QUICK)
    assert len(rounds) <= 5 + 2 * threads.count()


@pytest.mark.parametrize("module", [initial, sorting])
def test_premultiplied_images_are_divided_before_they_are_cut_out(monkeypatch, module):
    """Their noise, which the CTF has coloured, would be taken for white."""

    def cut(stack, *_):
        raise RuntimeError(set(stack.ctf_parameters.images))

    images = np.random.default_rng(0).standard_normal((40, 32, 32)).astype(np.float32)
    known = CtfParameters(np.full(40, 1.5e4), images="premultiplied")
    stack = ParticleStack(images, 7.0, ctf_parameters=known)
    monkeypatch.setattr(module, "cut_out", cut)
    with pytest.raises(RuntimeError, match="'divided'"):
        ab_initio(stack) if module is initial else classify(stack, 2)
