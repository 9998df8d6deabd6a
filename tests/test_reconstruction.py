"""Reconstruction from the exact phantom's images, which come from another path."""

import dataclasses

import numpy as np
import pytest
from measures import correlation, relative_error
from scipy.spatial.transform import Rotation

from cryoem import accelerator, imaging, maps, reconstruction, rotations, symmetry
from cryoem.density import Density, Phantom
from cryoem.errors import InputError
from cryoem.io.stacks import ImageStack, open_array
from cryoem.noise import Noise
from cryoem.particles import CtfParameters, ParticleStack
from cryoem.projection import project
from cryoem.reconstruction import reconstruct
from cryoem.simulation import simulate
from cryoem.symmetry import group

BOX, VOXEL, N = 32, 7.0, 400


@pytest.fixture(scope="module")
def views():
    return rotations.uniform(N, 1)


@pytest.fixture(scope="module")
def seen(phantom, views):
    """The phantom's images."""
    return ParticleStack(phantom.project(views, BOX, VOXEL), VOXEL, quaternions=views)


@pytest.fixture(scope="module")
def defocused(seen):
    defoci = np.random.default_rng(3).uniform(8_000, 30_000, N)
    parameters = CtfParameters(defoci, defoci - 500, 40.0)
    images = imaging.apply_ctf(seen.images, parameters.values(BOX, VOXEL))
    return seen.replace(images=images, ctf_parameters=parameters)


@pytest.mark.parametrize("box", [32, 33])
def test_exact_images_give_the_phantom_back(phantom, views, box):
    voxel = VOXEL * 32 / box
    stack = ParticleStack(phantom.project(views, box, voxel), voxel, quaternions=views)
    found = reconstruct(stack)
    expected = phantom.density(box, voxel)
    assert found.voxel_size_angstrom == voxel
    assert maps.fsc(found, expected).mean > 0.99
    assert correlation(found.values, expected.values) > 0.999
    # Not only the shape but the scale: interpolation and early stopping leave a percent.
    slope = np.vdot(found.values, expected.values) / np.vdot(expected.values, expected.values)
    assert slope == pytest.approx(1, abs=0.02)


def test_shifts_are_undone(phantom, seen):
    shifts = imaging.triangular_shifts(N, 2, 4.0)
    moved = seen.replace(images=imaging.shift(seen.images, shifts), shifts_px=shifts)
    expected = phantom.density(BOX, VOXEL)
    assert maps.fsc(reconstruct(moved, iterations=20), expected).mean > 0.99
    wrong = reconstruct(moved.replace(shifts_px=-shifts), iterations=20)
    assert maps.fsc(wrong, expected).mean < 0.9


def test_the_ctf_is_undone_where_several_defoci_fill_each_others_zeros(phantom, defocused):
    expected = phantom.density(BOX, VOXEL)
    assert maps.fsc(reconstruct(defocused), expected).mean > 0.99
    ignored = reconstruct(defocused.replace(ctf_parameters=None))
    assert maps.fsc(ignored, expected).mean < 0.9


@pytest.mark.parametrize("done", ["phase flipped", "premultiplied"])
def test_what_was_done_to_images_before_is_taken_into_account(phantom, defocused, done):
    expected, before = phantom.density(BOX, VOXEL), defocused.ctf_parameters
    by = {"phase flipped": np.sign, "premultiplied": np.asarray}[done](defocused.ctf())
    known = {"images": done, "scale": np.linspace(0.9, 1.1, N)}
    if done == "premultiplied":
        by = by * known["scale"][:, None, None]
    images = known["scale"][:, None, None] * imaging.apply_ctf(defocused.images, by)
    given = defocused.replace(images=images, ctf_parameters=dataclasses.replace(before, **known))
    assert maps.fsc(reconstruct(given), expected).mean > 0.98
    ignored = reconstruct(given.replace(ctf_parameters=before))
    assert maps.fsc(ignored, expected).mean < 0.9


@pytest.mark.parametrize("n", [8, 50])
def test_the_less_noise_the_better_the_map(phantom, n):
    """Where noise is no matter for orientations, and of few images, it is one for the map."""
    expected, found = phantom.density(BOX, VOXEL), []
    for snr in (1 / 4, 1, 4, 9, 12, 30, 100, 1e4, np.inf):
        stack = simulate(expected, n, 3, snr=snr).replace(noise=None)
        found.append(correlation(reconstruct(stack).values, expected.values))
    assert (np.diff(found) > -0.005).all(), found
    assert found[1] > {8: 0.35, 50: 0.65}[n], found
    # Steps that are enough in noise are not without it.
    few = reconstruct(stack, iterations=12)
    assert 1 - found[-1] < 0.8 * (1 - correlation(few.values, expected.values))


def test_images_that_passed_their_ctf_twice_are_undone_in_noise_too(phantom, defocused):
    """Divided by their CTF: with its square as what is seen, twelve steps leave it too smooth."""
    expected, images = phantom.density(BOX, VOXEL), np.asarray(defocused.images)
    variance = images.var()
    noise = np.random.default_rng(2).normal(0, variance**0.5, images.shape).astype(np.float32)
    twice = imaging.apply_ctf(images + noise, defocused.ctf())
    known = dataclasses.replace(defocused.ctf_parameters, images="premultiplied")
    found = reconstruct(defocused.replace(images=twice, ctf_parameters=known))
    once = reconstruct(defocused.replace(images=images + noise))
    scores = [maps.fsc(one, expected).mean for one in (once, found)]
    assert scores[1] > 0.9 * scores[0]
    # Shell by shell it shows hardly: smooth is what it is as a whole. Undivided 0.85.
    like = [np.corrcoef(one.values.ravel(), expected.values.ravel())[0, 1] for one in (once, found)]
    assert like[1] > 0.98 * like[0]


def test_contrasts_are_undone(phantom, seen):
    contrast = np.random.default_rng(4).uniform(0.2, 2, N).astype(np.float32)
    images = contrast[:, None, None] * seen.images
    given = seen.replace(images=images, contrast=contrast)
    expected = phantom.density(BOX, VOXEL)
    found = reconstruct(given, iterations=15)
    assert relative_error(found.values, expected.values) < 0.03
    ignored = reconstruct(given.replace(contrast=None), iterations=15)
    assert relative_error(ignored.values, expected.values) > 0.1


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_the_unit_of_the_contrasts_does_not_matter(defocused, scale):
    contrast = np.linspace(0.5, 1.5, N)
    images = np.asarray(defocused.images) * contrast[:, None, None].astype(np.float32)
    variance = 4 * images.var()
    images += np.random.default_rng(2).normal(0, variance**0.5, images.shape).astype(np.float32)
    known = defocused.replace(images=images, contrast=contrast, noise=Noise.white(variance))
    scaled = known.replace(
        images=np.float32(scale) * images,
        contrast=scale * contrast,
        noise=Noise.white(scale**2 * variance),
    )
    # So much of a ridge that it tells.
    a, b, none = (
        reconstruct(x, ridge=ridge).values
        for x, ridge in ((known, 1.0), (scaled, 1.0), (known, 1e-4))
    )
    assert relative_error(b, a) < 1e-3
    assert relative_error(none, a) > 0.05


@pytest.mark.parametrize("snr", [1 / 4, 1.0])
@pytest.mark.parametrize("box", [32, 33])
def test_noise_is_weighed_against_what_many_images_have_seen(phantom, box, snr):
    """Nearer to the density than without a prior, shell by shell as strong, nothing in corners."""
    density = phantom.density(box, VOXEL)
    stack = simulate(density, 60, 1, snr=snr, defocus_range_angstrom=(8_000, 30_000))
    found, plain = reconstruct(stack), reconstruct(stack, ridge=0.0)
    assert maps.fsc(found, density).mean > maps.fsc(plain, density).mean + 0.01
    off = [relative_error(x.values, density.values) for x in (found, plain)]
    assert off[0] < 0.85 * off[1]
    finest = 30.0
    a, b = found.low_passed(finest).values, density.low_passed(finest).values
    assert np.vdot(a, b) / np.vdot(b, b) == pytest.approx(1, abs=0.05)
    axis = np.arange(box) - box // 2
    radius = np.sqrt(sum(x**2 for x in np.meshgrid(axis, axis, axis)))
    assert np.abs(found.values[radius > box / 2 + 1]).max() < 0.1 * np.abs(found.values).max()


@pytest.mark.parametrize("tilt", [None, 0.1])
def test_under_noise_a_few_steps_are_enough(phantom, tilt):
    """Also of particles seen from the top alone."""
    density, q = phantom.density(32, VOXEL), rotations.uniform(300, 0)
    if tilt is not None:
        rng = np.random.default_rng(0)
        tilted = Rotation.from_rotvec(rng.normal(0, tilt, (300, 3)) * [1, 1, 0])
        q = (tilted * Rotation.from_euler("z", 2 * np.pi * rng.random((300, 1)))).as_quat()
    clean = project(density, q)
    variance = 4 * clean.var()
    images = clean + np.random.default_rng(2).normal(0, variance**0.5, clean.shape)
    stack = ParticleStack(images.astype(np.float32), VOXEL, quaternions=q)
    stack = stack.replace(noise=Noise.white(variance))
    few, many = reconstruct(stack).values, reconstruct(stack, iterations=60).values
    assert relative_error(few, many) < 0.35


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("edge", [10, 15, 300])
def test_a_convolution_is_that_of_the_padded_cube(edge, workers):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((5, 5, 5)).astype(np.float32)
    spectrum = rng.random((edge, edge, edge // 2 + 1)).astype(np.float32)
    padded = np.zeros((edge,) * 3, np.float32)
    padded[:5, :5, :5] = values
    wanted = np.fft.irfftn(np.fft.rfftn(padded) * spectrum, s=padded.shape, axes=(0, 1, 2))
    found = accelerator.convolution(spectrum, 5, workers=workers)(values)
    np.testing.assert_allclose(found, wanted[:5, :5, :5], atol=1e-5)


def test_images_in_files_give_the_map_of_those_in_memory(defocused, tmp_path, monkeypatch):
    contrast = np.linspace(0.5, 1.5, N)
    shifts = imaging.triangular_shifts(N, 5, 2.0)
    known = defocused.replace(contrast=contrast, shifts_px=shifts, noise=Noise.white(1e-6))
    wanted = reconstruct(known, iterations=5).values
    np.save(tmp_path / "images.npy", known.images)
    most, read = [], ImageStack._read
    monkeypatch.setattr(
        ImageStack, "_read", lambda self, rows: (most.append(len(rows)), read(self, rows))[1]
    )
    monkeypatch.setattr("cryoem.projection._POINTS_AT_ONCE", 20_000)
    in_file = known.replace(images=open_array(tmp_path / "images.npy"))
    for together in (20_000, 50_000, 10**8):  # read chunk by chunk, some of them laid down together
        monkeypatch.setattr(reconstruction, "POINTS_AT_ONCE", together)
        found = reconstruct(in_file, iterations=5)
        assert sum(most) == N and max(most) < N / 4
        np.testing.assert_allclose(found.values, wanted, atol=1e-3 * np.abs(wanted).max())
        most.clear()


@pytest.mark.parametrize("in_files", [False, True])
def test_a_half_set_is_reconstructed_from_its_own_images_alone(defocused, in_files, tmp_path):
    halves = defocused.replace(contrast=np.linspace(0.5, 1.5, N)).with_half_sets(3)
    rows = halves.half(2)
    apart = halves.replace(half_set=None).select(np.arange(N)[rows])
    alone = ParticleStack(
        np.asarray(halves.images)[rows],
        VOXEL,
        quaternions=halves.quaternions[rows],
        ctf_parameters=halves.ctf_parameters.select(rows),
        contrast=halves.contrast[rows],
    )
    if in_files:
        np.save(tmp_path / "images.npy", halves.images)
        apart = halves.replace(images=open_array(tmp_path / "images.npy")).select(rows)
    found, wanted = (reconstruct(x, iterations=5).values for x in (apart, alone))
    np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("box", [24, 19])
def test_a_map_of_a_smaller_box_is_the_coarse_part_of_the_whole(defocused, box, monkeypatch):
    """Its scale, its CTF and shifts, and noise of two groups that few images see through."""
    monkeypatch.setattr(reconstruction, "POINTS_AT_ONCE", 10_000)  # in several parts
    shifts = imaging.triangular_shifts(N, 2, 3.0)
    group_of = np.arange(N) % 2
    k = np.linspace(0, 1, 20)
    noise = Noise(defocused.images.var() * np.stack([3 / (1 + 9 * k), 0.1 + k]))
    images = imaging.shift(defocused.images, shifts)
    images = images + noise.draw(N, BOX, 6, group=group_of)
    stack = defocused.replace(images=images, shifts_px=shifts, optics_group=group_of, noise=noise)
    found = reconstruct(stack, box_px=box)
    wanted = reconstruct(stack).resampled(box)
    assert found.voxel_size_angstrom == pytest.approx(VOXEL * BOX / box)
    assert (
        maps.fsc(found, wanted).values[: box // 2 - 2].min() > 0.98
    )  # at its rim they end otherwise
    slope = np.vdot(found.values, wanted.values) / np.vdot(wanted.values, wanted.values)
    assert slope == pytest.approx(1, abs=0.02)
    same = imaging.downsample(images, box)
    small = stack.with_images(same, pixel_size_angstrom=VOXEL * BOX / box)
    known = Noise(noise.at(np.linspace(0, 0.5**0.5 * box / BOX, 60)) * (box / BOX) ** 2)
    of_small = reconstruct(small.replace(noise=known)).values * (box / BOX)
    assert relative_error(found.values, of_small) < 1e-3


def test_voxels_are_exactly_the_images_pixels():
    """To the last digit, whatever they are."""
    images = imaging.add_noise(np.zeros((9, 12, 12)), 1, variance=1.0)
    stack = ParticleStack(images, 1.4, quaternions=rotations.uniform(9, 0))
    assert reconstruct(stack, iterations=1).voxel_size_angstrom == 1.4


@pytest.mark.parametrize("box", [1, BOX + 1])
def test_a_map_of_a_larger_box_than_the_images_is_refused(seen, box):
    with pytest.raises(InputError, match=f"between 2 and the images' {BOX}, got {box}"):
        reconstruct(seen, box_px=box)


def test_a_turned_set_of_orientations_gives_the_turned_density(phantom, seen):
    a = rotations.uniform(1, 9)[0]
    found = reconstruct(seen.with_poses(rotations.multiply(a, seen.quaternions)), iterations=20)
    turned = Phantom(
        Rotation.from_quat(a).apply(phantom.centres_angstrom),
        phantom.sigmas_angstrom,
        phantom.weights,
    )
    assert maps.fsc(found, turned.density(BOX, VOXEL)).mean > 0.99


def test_the_other_hand_gives_the_mirror_image_and_an_inversion_garbage(phantom, seen, views):
    expected = phantom.density(BOX, VOXEL)
    hand, garbage = (
        reconstruct(seen.with_poses(q), iterations=15)
        for q in (rotations.other_hand(views), rotations.inverse(views))
    )
    assert maps.fsc(hand, maps.mirrored(expected)).mean > 0.99
    # What is left is the envelope, in the first shells.
    assert maps.fsc(garbage, expected).mean < 0.5
    assert maps.fsc(garbage, expected).values[8:].max() < 0.5


def test_no_signal_gives_no_density(views):
    found = reconstruct(ParticleStack(np.zeros((N, 16, 16)), 1.0, quaternions=views))
    assert (found.values == 0).all()


def test_one_image_is_explained(phantom, views):
    image = phantom.project(views[:1], 24, 9.0)
    found = reconstruct(ParticleStack(image, 9.0, quaternions=views[:1]))
    assert relative_error(project(found, views[:1]), image) < 0.02


def test_on_several_threads_sums_are_the_same_each_time(defocused, monkeypatch):
    """Of small boxes: each sums its images in their order, and all parts are added in theirs."""
    wanted = reconstruct(defocused, iterations=5).values
    for threads in (2, 3, 12):
        monkeypatch.setattr("cryoem.threads.count", lambda threads=threads: threads)
        first, second = (reconstruct(defocused, iterations=5).values for _ in range(2))
        np.testing.assert_array_equal(first, second)
        assert relative_error(first, wanted) < 1e-3


def test_what_has_no_orientations_is_refused(seen):
    with pytest.raises(InputError, match="no orientations"):
        reconstruct(seen.without_poses())
    with pytest.raises(InputError, match="at least one image"):
        reconstruct(seen.select(slice(0)))
    with pytest.raises(InputError, match=r"at least one iteration.*got 0 and"):
        reconstruct(seen, iterations=0)
    with pytest.raises(InputError, match=r"not negative; got None and -1"):
        reconstruct(seen, ridge=-1.0)


def test_images_that_show_nothing_are_refused(seen):
    with pytest.raises(InputError, match="contrasts, or their CTFs, are all zero"):
        reconstruct(seen.replace(contrast=np.zeros(N)))


def test_the_smallest_boxes_have_a_map_too():
    stack = ParticleStack(np.ones((4, 3, 3)), 1.0, quaternions=rotations.uniform(4, 0))
    assert reconstruct(stack).box_px == 3


def test_a_symmetric_map_needs_a_view_of_each_orbit(phantom):
    one = phantom.density(BOX, VOXEL)
    copies = [maps.turned(one, g).values for g in group("D2").elements]
    symmetric = Density(np.mean(copies, axis=0), VOXEL)
    q = rotations.uniform(60, 3)
    stack = ParticleStack(project(symmetric, q), VOXEL, quaternions=q)
    with_it = reconstruct(stack, symmetry="D2", iterations=20)
    without = reconstruct(stack, iterations=20)
    off = [relative_error(v.values, symmetric.values) for v in (with_it, without)]
    assert off[0] < 0.8 * off[1]
    for g in group("D2").elements:
        assert relative_error(maps.turned(with_it, g).values, with_it.values) < 0.05


@pytest.mark.parametrize("name", ["D2", "T", "O"])
def test_an_orbit_is_as_good_as_its_images(phantom, name):
    # The ridge is relative to all that is seen, so that it is the same too.
    q, elements = rotations.uniform(30, 3), group(name).elements
    stack = ParticleStack(phantom.project(q, 16, 14.0), 14.0, quaternions=q)
    orbits = stack.select(np.tile(np.arange(30), len(elements)))
    orbits = orbits.with_poses(np.concatenate([rotations.multiply(g, q) for g in elements]))
    options = {"iterations": 10, "ridge": 0.1}
    found = reconstruct(stack, symmetry=name, **options).values
    assert relative_error(found, reconstruct(orbits, **options).values) < 0.01


@pytest.mark.parametrize("size", [16, 17])
@pytest.mark.parametrize(
    ("name", "exact", "others"),
    [
        *[("D2", 4, 1), ("C4", 4, 1), ("D4", 8, 1), ("D3", 2, 3), ("C7", 1, 7), ("C2", 2, 1)],
        *[("O", 24, 1), ("I", 12, 5), ("T", 1, 12)],
    ],
)
def test_rotations_that_exchange_axes_are_exact(name, exact, others, size):
    """Together with one of each coset they are the group; and they turn as a density turns."""
    matrices, elements = symmetry.exact_part(group(name))
    assert (len(matrices), len(elements)) == (exact, others)
    all_of = [m @ Rotation.from_quat(g).as_matrix() for m in matrices for g in elements]
    wanted = Rotation.from_quat(group(name).elements).as_matrix()
    for w in wanted:
        assert sum(np.allclose(w, m, atol=1e-6) for m in all_of) == 1
    values = np.zeros((size,) * 3, np.float32)
    values[1:, 1:, 1:] = np.random.default_rng(0).random((size - 1,) * 3)
    axis = np.arange(size) - size // 2
    points = np.stack(np.meshgrid(axis[1:], axis[1:], axis[1:], indexing="ij"), -1)[..., ::-1]
    for m in matrices:
        x, y, z = np.moveaxis((points @ m).astype(int) + size // 2, -1, 0)  # m transposed, r
        inside = np.all([(c >= 1) & (c < size) for c in (x, y, z)], axis=0)
        turned = symmetry._exchanged(values, m)[1:, 1:, 1:]
        np.testing.assert_array_equal(turned[inside], values[z[inside], y[inside], x[inside]])
        assert inside.mean() > 0.8
