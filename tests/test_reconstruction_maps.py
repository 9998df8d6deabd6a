import numpy as np
import pytest
from measures import correlation, relative_error
from scipy.spatial.transform import Rotation

from cryoem import imaging, maps, reconstruction, report, rotations
from cryoem.density import Density, Phantom
from cryoem.errors import InputError
from cryoem.projection import project
from cryoem.symmetry import group

BOX, VOXEL, N = 32, 7.0, 400


def noise(seed, box=40, voxel=5.0):
    return Density(np.random.default_rng(seed).standard_normal((box,) * 3), voxel)


# --------------------------------------------------------------------------------------
# Reconstruction from the exact phantom's images


@pytest.fixture(scope="module")
def views():
    return rotations.uniform(N, 1)


@pytest.mark.parametrize("box", [32, 33])
def test_exact_images_give_the_phantom_back(phantom, views, box):
    voxel = VOXEL * 32 / box
    images = phantom.project(views, box, voxel)
    found = reconstruction.reconstruct(images, views, voxel_size_angstrom=voxel)
    expected = phantom.density(box, voxel)
    assert found.voxel_size_angstrom == voxel
    assert maps.fsc(found, expected).mean > 0.99
    assert correlation(found.values, expected.values) > 0.999
    # Not only the shape but the scale: interpolation and early stopping leave a percent.
    slope = np.vdot(found.values, expected.values) / np.vdot(expected.values, expected.values)
    assert slope == pytest.approx(1, abs=0.02)


def test_shifts_are_undone(phantom, views):
    shifts = imaging.triangular_shifts(N, 2, 4.0)
    images = imaging.shift(phantom.project(views, BOX, VOXEL), shifts)
    expected = phantom.density(BOX, VOXEL)
    found = reconstruction.reconstruct(
        images, views, voxel_size_angstrom=VOXEL, shifts_px=shifts, iterations=20
    )
    assert maps.fsc(found, expected).mean > 0.99
    wrong = reconstruction.reconstruct(
        images, views, voxel_size_angstrom=VOXEL, shifts_px=-shifts, iterations=20
    )
    assert maps.fsc(wrong, expected).mean < 0.9


def test_the_ctf_is_undone_where_several_defoci_fill_each_others_zeros(phantom, views):
    defoci = np.random.default_rng(3).uniform(8_000, 30_000, N)
    ctf = imaging.ctf(BOX, VOXEL, defoci, defoci - 500, 40.0)
    images = imaging.apply_ctf(phantom.project(views, BOX, VOXEL), ctf)
    expected = phantom.density(BOX, VOXEL)
    found = reconstruction.reconstruct(images, views, voxel_size_angstrom=VOXEL, ctf=ctf)
    assert maps.fsc(found, expected).mean > 0.99
    ignored = reconstruction.reconstruct(images, views, voxel_size_angstrom=VOXEL)
    assert maps.fsc(ignored, expected).mean < 0.9


def test_contrasts_are_undone(phantom, views):
    contrast = np.random.default_rng(4).uniform(0.2, 2, N).astype(np.float32)
    images = contrast[:, None, None] * phantom.project(views, BOX, VOXEL)
    expected = phantom.density(BOX, VOXEL)
    found = reconstruction.reconstruct(
        images, views, voxel_size_angstrom=VOXEL, contrast=contrast, iterations=15
    )
    assert relative_error(found.values, expected.values) < 0.03
    ignored = reconstruction.reconstruct(images, views, voxel_size_angstrom=VOXEL, iterations=15)
    assert relative_error(ignored.values, expected.values) > 0.1


def test_a_turned_set_of_orientations_gives_the_turned_density(phantom, views):
    a = rotations.uniform(1, 9)[0]
    images = phantom.project(views, BOX, VOXEL)
    found = reconstruction.reconstruct(
        images, rotations.multiply(a, views), voxel_size_angstrom=VOXEL, iterations=20
    )
    turned = Phantom(
        Rotation.from_quat(a).apply(phantom.centres_angstrom),
        phantom.sigmas_angstrom,
        phantom.weights,
    )
    assert maps.fsc(found, turned.density(BOX, VOXEL)).mean > 0.99


def test_the_other_hand_gives_the_mirror_image_and_an_inversion_garbage(phantom, views):
    images = phantom.project(views, BOX, VOXEL)
    expected = phantom.density(BOX, VOXEL)
    hand, garbage = (
        reconstruction.reconstruct(images, q, voxel_size_angstrom=VOXEL, iterations=15)
        for q in (rotations.other_hand(views), rotations.inverse(views))
    )
    assert maps.fsc(hand, maps.mirrored(expected)).mean > 0.99
    # What is left is the envelope, in the first shells.
    assert maps.fsc(garbage, expected).mean < 0.5
    assert maps.fsc(garbage, expected).values[8:].max() < 0.5


def test_no_signal_gives_no_density(views):
    found = reconstruction.reconstruct(np.zeros((N, 16, 16)), views, voxel_size_angstrom=1.0)
    assert (found.values == 0).all()


def test_one_image_is_explained(phantom, views):
    image = phantom.project(views[:1], 24, 9.0)
    found = reconstruction.reconstruct(image, views[:1], voxel_size_angstrom=9.0)
    again = Density(found.values, 9.0)
    from cryoem.projection import project

    assert relative_error(project(again, views[:1]), image) < 0.02


@pytest.mark.parametrize(
    ("images", "count", "options", "message"),
    [
        (5, 4, {}, "one quaternion an image"),
        (0, 0, {}, "at least one"),
        (5, 5, {"shifts_px": np.zeros((5, 3))}, r"\(5, 2\)"),
        (5, 5, {"ctf": np.ones((1, 8, 5))}, r"\(5, 8, 5\)"),
        (5, 5, {"ctf": np.ones((5, 8, 8))}, r"\(5, 8, 5\)"),
        (5, 5, {"contrast": np.ones(4)}, r"\(5,\)"),
    ],
)
def test_what_does_not_fit_is_refused(images, count, options, message):
    with pytest.raises(InputError, match=message):
        reconstruction.reconstruct(
            np.zeros((images, 8, 8)),
            rotations.uniform(count, 0),
            voxel_size_angstrom=1.0,
            **options,
        )


# --------------------------------------------------------------------------------------
# Fourier shell correlation


@pytest.mark.parametrize("box", [40, 41])
def test_a_density_against_itself_has_fsc_one(box):
    d = noise(0, box)
    curve = maps.fsc(d, d)
    np.testing.assert_allclose(curve.values, 1, atol=1e-5)
    scaled = Density(-3 * d.values, 5.0)
    np.testing.assert_allclose(maps.fsc(d, scaled).values, -1, atol=1e-5)
    # Shells 1, 2, ... below Nyquist.
    assert len(curve.values) == (box - 1) // 2
    np.testing.assert_allclose(curve.frequencies * box * 5.0, np.arange(1, (box + 1) // 2))


def test_independent_noise_has_no_fsc():
    curve = maps.fsc(noise(1), noise(2))
    shells = np.arange(1, 20)
    # A shell of 4 pi k^2 voxels, half of them independent: four standard errors each.
    assert (np.abs(curve.values) < 4 / np.sqrt(2 * np.pi * shells**2)).all()


@pytest.mark.parametrize("box", [20, 21])
def test_the_fsc_is_its_formula(box):
    a, b = noise(3, box), noise(4, box)
    b = Density(a.values + b.values, 5.0)
    f1, f2 = np.fft.fftn(a.values), np.fft.fftn(b.values)
    k = np.fft.fftfreq(box, 1 / box)
    shell = np.rint(np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2))
    for i, found in enumerate(maps.fsc(a, b).values):
        s = shell == i + 1
        cross = np.sum(np.conj(f1[s]) * f2[s]).real
        expected = cross / np.sqrt(np.sum(abs(f1[s]) ** 2) * np.sum(abs(f2[s]) ** 2))
        assert found == pytest.approx(expected, abs=1e-5)


def test_an_empty_map_has_no_fsc():
    empty = Density(np.zeros((20,) * 3), 5.0)
    assert (maps.fsc(noise(0, 20), empty).values == 0).all()


def test_the_resolution_is_interpolated():
    curve = maps.Fsc(np.array([0.01, 0.02, 0.03, 0.04]), np.array([1.0, 0.8, 0.2, 0.6]))
    at = curve.resolution(0.5)
    assert at.angstrom == pytest.approx(1 / 0.025) and not at.nyquist_limited
    assert curve.resolution(0.143 + 0.1).angstrom == pytest.approx(1 / (0.02 + 0.557 / 60))
    assert curve.mean == pytest.approx(0.65)


def test_a_curve_that_starts_below_resolves_no_shell():
    curve = maps.Fsc(np.array([0.01, 0.02]), np.array([0.3, 0.9]))
    at = curve.resolution(0.5)
    assert at.angstrom == pytest.approx(100) and not at.nyquist_limited


@pytest.mark.parametrize("box", [40, 41])
def test_a_curve_that_never_falls_is_limited_by_nyquist(box):
    d = noise(0, box, 3.0)
    at = maps.fsc(d, d).resolution(0.5)
    assert at.nyquist_limited
    assert at.angstrom == pytest.approx(6.0)


@pytest.mark.parametrize("other", [noise(1, 41), noise(1, 40, 5.1)])
def test_maps_of_different_sampling_are_refused(other):
    with pytest.raises(InputError, match="share box and voxel size"):
        maps.fsc(noise(0), other)


# --------------------------------------------------------------------------------------
# Moving maps


@pytest.mark.parametrize("box", [40, 41])
def test_turning_and_moving_a_map_is_the_phantom_turned_and_moved(phantom, box):
    a, shift = rotations.uniform(1, 2)[0], np.array([6.0, -3.0, 1.5])
    expected = Phantom(
        Rotation.from_quat(a).apply(phantom.centres_angstrom) + shift,
        phantom.sigmas_angstrom,
        phantom.weights,
    ).density(box, 6.0)
    found = maps.turned(phantom.density(box, 6.0), a, shift)
    assert relative_error(found.values, expected.values) < 1e-2


@pytest.mark.parametrize("box", [7, 8])
def test_mirroring_keeps_the_origin_and_twice_is_nothing(box):
    d = noise(0, box)
    other = maps.mirrored(d)
    assert other.values[(box // 2,) * 3] == d.values[(box // 2,) * 3]
    assert other.values[(box // 2 + 1,) * 3] == d.values[(box // 2 - 1,) * 3]
    np.testing.assert_array_equal(maps.mirrored(other).values, d.values)


@pytest.mark.parametrize("hand", [False, True])
def test_a_planted_turn_and_shift_is_found(phantom, hand):
    reference = phantom.density(40, 6.0)
    source = maps.mirrored(reference) if hand else reference
    a, shift = rotations.uniform(1, 3)[0], np.array([7.0, -4.0, 2.0])
    found = maps.register(maps.turned(source, a, shift), reference, resolution_angstrom=20.0)
    assert found.mirrored == hand
    assert found.correlation > 0.999
    assert correlation(found.density.values, reference.values) > 0.999
    # What was fitted is what was done: for the same hand, the inverse of what was planted.
    if not hand:
        assert rotations.distance(found.quaternion, rotations.inverse(a)) < 0.01
        undone = -Rotation.from_quat(a).inv().apply(shift)
        np.testing.assert_allclose(found.shift_angstrom, undone, atol=0.3)


def test_where_the_hand_is_known_no_mirror_is_tried(phantom):
    reference = phantom.density(40, 6.0)
    found = maps.register(
        maps.mirrored(reference), reference, allow_mirror=False, resolution_angstrom=25.0
    )
    assert not found.mirrored and found.correlation < 0.99


def test_a_map_of_another_box_is_refused():
    with pytest.raises(InputError, match="share box and voxel size"):
        maps.register(noise(0, 41), noise(0))


# --------------------------------------------------------------------------------------
# Half-maps

SHARP = Phantom.random(0, sigma_angstrom=5.0, radius_angstrom=50.0).density(48, 4.0)


def noisy_halves(level, seed=0, signal=SHARP, independent=True):
    """A density in both halves, and white noise of its own in each: ``level`` x the maximum."""
    rng = np.random.default_rng(seed)
    scale = level * np.abs(SHARP.values).max()
    pair = (
        Density(signal.values + scale * rng.standard_normal(signal.values.shape), 4.0)
        for _ in range(2)
    )
    return maps.HalfMaps(*pair, independent)


NOTHING = Density(np.full((48,) * 3, 1e-9), 4.0)


def test_a_mask_holds_the_particle_and_little_else():
    mask = maps.soft_mask(noisy_halves(0.1).mean)
    assert mask.shape == SHARP.values.shape and mask.min() == 0 and mask.max() == 1
    inside = SHARP.values > 0.1 * SHARP.values.max()
    assert mask[inside].mean() > 0.98
    axis = np.arange(48) - 24
    radius = 4.0 * np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    assert mask[radius > 92].max() < 0.01
    # Soft: the edge's steepest step is that of a cosine over 20 A, five voxels.
    assert 0.1 < np.abs(np.diff(mask, axis=0)).max() < 0.45


def test_a_map_of_noise_gets_a_sphere_for_a_mask():
    mask = maps.soft_mask(noisy_halves(1.0, signal=NOTHING).mean)
    assert mask[24, 24, 24] == 1 and mask[:, 0, 0].max() == 0
    assert mask.mean() == pytest.approx(4 / 3 * np.pi * 0.45**3, rel=0.1)
    with pytest.raises(InputError, match="zero everywhere"):
        maps.soft_mask(Density(np.zeros((16,) * 3), 4.0))


def test_what_the_mask_brings_is_taken_off():
    # Particle to 24 A, beyond it nothing but independent noise, in a tight mask.
    halves = noisy_halves(0.05, signal=SHARP.low_passed(24.0, edge=0.05))
    tight = (SHARP.values > 0.3 * SHARP.values.max()).astype(np.float32)
    found = maps.half_map_fsc(halves, tight)
    beyond = found.masked.frequencies > 1 / 19
    assert found.masked.values[beyond].mean() > 0.9
    assert abs(found.corrected.values[beyond].mean()) < 0.15
    within = found.masked.frequencies < 1 / 30
    assert found.corrected.values[within].min() > 0.8
    assert found.masked.resolution(0.143).nyquist_limited
    # Two shells beyond the last that was left as it is.
    assert 19 < found.corrected.resolution(0.143).angstrom < 24
    # Chen's formula from two shells after the phases became random.
    start = np.flatnonzero(found.unmasked.values < 0.8)[0]
    assert found.randomised_from == pytest.approx(found.unmasked.frequencies[start])
    t, r = found.masked.values[start + 2 :], found.randomised.values[start + 2 :]
    np.testing.assert_allclose(found.corrected.values[start + 2 :], (t - r) / (1 - r), rtol=1e-5)
    np.testing.assert_array_equal(
        found.corrected.values[: start + 2], found.masked.values[: start + 2]
    )


def test_perfect_halves_are_limited_by_nyquist():
    found = maps.half_map_fsc(noisy_halves(0.0), np.ones_like(SHARP.values))
    at = found.corrected.resolution(0.143)
    assert at.nyquist_limited and at.angstrom == pytest.approx(8.0)


def test_halves_are_even_and_seeded():
    subset = maps.halves(101, 3)
    assert sorted(np.bincount(subset)) == [0, 50, 51]
    np.testing.assert_array_equal(subset, maps.halves(101, 3))
    assert (subset != maps.halves(101, 4)).any()
    with pytest.raises(InputError, match="at least 2"):
        maps.halves(1, 0)


def test_half_maps_say_whether_they_are_independent():
    assert noisy_halves(0.1, independent=False).wording == "half-maps with shared poses"
    assert "independent" in noisy_halves(0.1).wording
    pair = noisy_halves(0.1)
    np.testing.assert_allclose(pair.mean.values, (pair.first.values + pair.second.values) / 2)


def test_independent_noise_does_not_agree_beyond_a_reference():
    mask = maps.soft_mask(SHARP, resolution_angstrom=30.0)
    z = np.array([maps.beyond(noisy_halves(1.0, i, NOTHING), mask, 25.0).z for i in range(40)])
    # Of 40 standard normal numbers: mean 0 +- 0.16, deviation 1 +- 0.11.
    assert abs(z.mean()) < 0.6 and 0.65 < z.std() < 1.4 and np.abs(z).max() < 4.5


def test_what_halves_share_is_seen_beyond_a_reference_and_only_there():
    mask = maps.soft_mask(SHARP, resolution_angstrom=30.0)
    assert maps.beyond(noisy_halves(0.1), mask, 25.0).believable
    coarse = noisy_halves(0.1, signal=SHARP.low_passed(25.0))
    assert not maps.beyond(coarse, mask, 25.0).believable
    with pytest.raises(InputError, match="nothing is left"):
        maps.beyond(coarse, mask, 8.5)


def test_the_curves_are_read_back_from_their_star_file(tmp_path):
    import starfile

    found = maps.half_map_fsc(noisy_halves(0.3), maps.soft_mask(SHARP))
    maps.write_fsc(tmp_path / "fsc.star", found)
    blocks = starfile.read(tmp_path / "fsc.star", always_dict=True)
    table = blocks["fsc"]
    assert list(table["rlnSpectralIndex"]) == list(range(1, 24))
    for column, curve in (
        ("rlnFourierShellCorrelationCorrected", found.corrected),
        ("rlnFourierShellCorrelationUnmaskedMaps", found.unmasked),
        ("rlnFourierShellCorrelationMaskedMaps", found.masked),
        ("rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps", found.randomised),
    ):
        np.testing.assert_allclose(table[column], curve.values, atol=1e-5)
    np.testing.assert_allclose(
        table["rlnAngstromResolution"] * table["rlnResolution"], 1, atol=1e-4
    )
    assert [p.name for p in tmp_path.iterdir()] == ["fsc.star"]


def test_coverage_tells_even_from_preferred_views():
    even = maps.coverage(rotations.uniform(3000, 1))
    assert even.evenness > 0.98 and even.unseen == 0 and even.anisotropy < 1.2
    # In-plane turns and the view from behind change nothing.
    q = rotations.preferred(3000, 2)
    preferred, same = (
        maps.coverage(q),
        maps.coverage(rotations.mirror_x(rotations.in_plane(q, 1.0))),
    )
    assert preferred.evenness == same.evenness
    assert preferred.anisotropy == pytest.approx(same.anisotropy)
    assert preferred.evenness < 0.7 and preferred.anisotropy > 2
    # One direction only: its slices all lie in one plane, of sine 0.1 half-thickness.
    one = maps.coverage(rotations.about("z", np.linspace(0, 6, 50)))
    assert one.unseen == pytest.approx(0.9, abs=0.01) and one.anisotropy > 1e6
    with pytest.raises(InputError, match="no orientations"):
        maps.coverage(np.zeros((0, 4)))


@pytest.mark.parametrize("level", [0.3, 3.0])
def test_the_page_about_a_map_reads_offline_and_says_what_to_doubt(tmp_path, level):
    halves = noisy_halves(level, independent=False, signal=SHARP.low_passed(25.0))
    mask = maps.soft_mask(SHARP)
    curves = maps.half_map_fsc(halves, mask)
    test = maps.beyond(halves, mask, 25.0)
    summary = report.write_map(
        tmp_path / "report.html", "A map", halves, curves, mask, rotations.uniform(100, 0),
        test=test, notes=["simulated"],
    )  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert "http://" not in page and "https://" not in page
    assert page.count("data:image/png;base64,") == 3
    for text in ("simulated", "half-maps with shared poses", "WARNING", "coverage_evenness"):
        assert text in page
    assert summary["resolution_fsc0143_angstrom"] == curves.corrected.resolution(0.143).angstrom
    assert summary["z_beyond_reference"] == test.z and summary["believable"] is False


def test_a_symmetric_map_needs_a_view_of_each_orbit(phantom):
    size, voxel = 32, 7.0
    one = phantom.density(size, voxel)
    copies = [maps.turned(one, g).values for g in group("D2").elements]
    symmetric = Density(np.mean(copies, axis=0), voxel)
    q = rotations.uniform(60, 3)
    images = project(symmetric, q)
    options = {"voxel_size_angstrom": voxel, "iterations": 20}
    with_it = reconstruction.reconstruct(images, q, symmetry="D2", **options)
    without = reconstruction.reconstruct(images, q, **options)
    off = [relative_error(v.values, symmetric.values) for v in (with_it, without)]
    assert off[0] < 0.8 * off[1]
    for g in group("D2").elements:
        assert relative_error(maps.turned(with_it, g).values, with_it.values) < 0.05


def test_a_speck_of_noise_is_no_particle_to_mask():
    # One voxel stands out: the mask is the sphere that it is where nothing does.
    values = np.random.default_rng(0).normal(0, 2e-2, (40, 40, 40)).astype(np.float32)
    values[20, 20, 20] = 1
    wide = maps.soft_mask(Density(values, 5.0))
    axis = np.arange(40) - 20
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    assert (wide[radius < 15] > 0.99).all()
