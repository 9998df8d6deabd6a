import numpy as np
import pytest
import starfile
from measures import correlation, made_symmetric, relative_error
from scipy.spatial.transform import Rotation

from cryoem import fourier, maps, report, rotations
from cryoem.cli.mapping import write_halves
from cryoem.density import Density, Phantom, from_atoms, read_density
from cryoem.errors import InputError
from cryoem.maps.sharpening import FIRST, PROTEIN, STEP
from cryoem.maps.shells import Shells
from cryoem.structures import load
from cryoem.symmetry import group


def noise(seed, box=40, voxel=5.0):
    return Density(np.random.default_rng(seed).standard_normal((box,) * 3), voxel)


def radius(box):
    """Distance of each voxel from the origin, voxels."""
    axis = np.arange(box) - box // 2
    return np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)


def whole_shells(box):
    """``round(|k|)`` of the whole transform."""
    return np.rint(fourier.radius((box,) * 3)).astype(int)


def noisy(signal, *, seed, voxel=5.0):
    """Half-maps of a signal: white noise of deviation 1 of its own in each."""
    rng = np.random.default_rng(seed)
    pair = (Density(signal + rng.standard_normal(signal.shape), voxel) for _ in range(2))
    return maps.HalfMaps(*pair, independent=True)


# --------------------------------------------------------------------------------------
# Shells, and the Fourier shell correlation


@pytest.mark.parametrize("box", [8, 9])
def test_a_half_spectrum_is_summed_as_the_whole_one(box):
    values = noise(0, box).values
    power = np.abs(np.fft.fftn(values)) ** 2
    expected = np.bincount(whole_shells(box).ravel(), power.ravel())
    found = Shells(box).sums(np.abs(np.fft.rfftn(values)) ** 2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def wave(box, *k):
    """A cosine of ``k`` cycles per box along z, y and x."""
    axis = 2 * np.pi / box * (np.arange(box) - box // 2)
    phase = k[0] * axis[:, None, None] + k[1] * axis[:, None] + k[2] * axis
    return np.cos(phase).astype(np.float32)


@pytest.mark.parametrize("box", [24, 25])
@pytest.mark.parametrize(
    ("k", "wanted"),
    [
        ((0, 0, 0), 0.9),  # as shell 1
        ((0, 1, 0), 0.9),
        ((3, 4, 0), 0.2),
        ((0, 0, 5), 0.2),
        ((1, 0, 1), 0.9 + (np.sqrt(2) - 1) * (0.8 - 0.9)),  # between shells 1 and 2
        ((4, 4, 2), 0.0),  # beyond the last
        ((5, 1, 0), 0.2 * (6 - np.sqrt(26))),  # falling to it
    ],
)
def test_a_filter_multiplies_each_frequency_by_its_shells_gain(box, k, wanted):
    gain = np.array([0.9, 0.8, 0.7, 0.6, 0.2])
    d = Density(wave(box, *k), 4.0)
    found = maps.filtered(d, gain)
    assert found.voxel_size_angstrom == 4.0
    np.testing.assert_allclose(found.values, wanted * d.values, atol=1e-5)


@pytest.mark.parametrize("count", [0, 11])
def test_a_filter_of_more_shells_than_there_are_is_refused(count):
    with pytest.raises(InputError, match=f"1 to 10 shells, got {count}"):
        maps.filtered(noise(0, 10), np.ones(count))


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
@pytest.mark.parametrize("masked", [False, True])
def test_the_fsc_is_its_formula(box, masked):
    a, b = noise(3, box), noise(4, box)
    b = Density(a.values + b.values, 5.0)
    mask = np.random.default_rng(5).random((box,) * 3) if masked else None
    f1, f2 = (np.fft.fftn(d.values * (mask if masked else 1)) for d in (a, b))
    shell = whole_shells(box)
    for i, found in enumerate(maps.fsc(a, b, mask=mask).values):
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


def test_a_mask_of_another_shape_is_refused():
    pair = maps.HalfMaps(noise(0), noise(1), True)
    for use in (
        lambda mask: maps.fsc(pair.first, pair.second, mask=mask),
        lambda mask: maps.half_map_fsc(pair, mask),
        lambda mask: maps.reference_bias(pair, mask, 50.0),
    ):
        with pytest.raises(InputError, match=r"shape \(40, 40, 40\), got \(40, 40\)"):
            use(np.ones((40, 40)))


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


def test_phases_are_random_from_the_stated_shell_on_and_from_there_alone():
    # One shell has an FSC of 0.6, all others of 1; no mask.
    box, drop = 40, 9
    own = np.where(whole_shells(box) == drop, 0.4, 0.0)
    f, *noises = (np.fft.fftn(noise(seed, box).values) for seed in (1, 2, 3))
    first, second = (
        Density(np.fft.ifftn(np.sqrt(1 - own) * f + np.sqrt(own) * g).real, 5.0) for g in noises
    )
    whole = np.ones((box,) * 3)
    found = maps.half_map_fsc(maps.HalfMaps(first, second, True), whole)
    assert found.randomised_from == pytest.approx(drop / (box * 5.0))
    np.testing.assert_allclose(found.randomised.values[: drop - 1], 1, atol=1e-4)
    shells = np.arange(drop, 20)
    # Half of a shell's 4 pi k^2 frequencies are independent: four standard errors each.
    assert (np.abs(found.randomised.values[drop - 1 :]) < 4 / np.sqrt(2 * np.pi * shells**2)).all()
    again, other = (
        maps.half_map_fsc(maps.HalfMaps(first, second, True), whole, seed=seed) for seed in (0, 1)
    )
    np.testing.assert_array_equal(again.randomised.values, found.randomised.values)
    assert (other.randomised.values[drop:] != found.randomised.values[drop:]).all()


def test_the_correction_leaves_what_the_particle_has():
    # White signal of three times the noise's power in a ball and nowhere else: in the ball
    # FSC = SNR / (1 + SNR) in every shell, of which the mask has made nothing.
    ball = (radius(40) < 12).astype(np.float32)
    signal = np.sqrt(3) * ball * np.random.default_rng(0).standard_normal((40,) * 3)
    found = maps.half_map_fsc(noisy(signal, seed=1), ball)
    # 14 shells hold 30,000 frequencies, of which a ball of a ninth of the box lets 1,700 vary
    # freely: four standard errors of (1 - 0.75^2) / sqrt(1,700).
    assert found.corrected.values[5:].mean() == pytest.approx(0.75, abs=0.045)
    assert found.unmasked.values[5:].mean() < 0.4


def test_perfect_halves_are_limited_by_nyquist():
    found = maps.half_map_fsc(noisy_halves(0.0), np.ones_like(SHARP.values))
    at = found.corrected.resolution(0.143)
    assert at.nyquist_limited and at.angstrom == pytest.approx(8.0)


def test_half_maps_say_whether_they_are_independent():
    assert noisy_halves(0.1, independent=False).wording == "half-maps with shared poses"
    assert "independent" in noisy_halves(0.1).wording
    pair = noisy_halves(0.1)
    np.testing.assert_allclose(pair.mean.values, (pair.first.values + pair.second.values) / 2)


def test_the_curves_are_read_back_from_their_star_file(tmp_path):
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
        np.testing.assert_allclose(table[column], curve.values, rtol=1e-6)
    np.testing.assert_allclose(table["rlnResolution"], found.corrected.frequencies, rtol=1e-12)
    np.testing.assert_allclose(table["rlnAngstromResolution"] * table["rlnResolution"], 1)
    # The starfile package reads one row as a table or as a list of values.
    general = {name: float(np.ravel(value)[0]) for name, value in blocks["general"].items()}
    resolution = found.corrected.resolution(0.143)
    assert general["rlnFinalResolution"] == pytest.approx(resolution.angstrom)
    assert general["rlnRandomiseFrom"] == pytest.approx(1 / found.randomised_from)
    assert [p.name for p in tmp_path.iterdir()] == ["fsc.star"]


# --------------------------------------------------------------------------------------
# Sharpening

ATOMS_ANGSTROM = 4.0


def blur(resolution_angstrom):
    """The B factor of an atomic model's density at a resolution."""
    return 8 * np.pi**2 * (0.225 * resolution_angstrom) ** 2


@pytest.fixture(scope="module")
def protein():
    return from_atoms(
        load("1i10"), voxel_size_angstrom=1.8, resolution_angstrom=ATOMS_ANGSTROM, box_px=80
    )


def blurred_halves(density, b_factor, noise, seed=3):
    """Half-maps of a density with more of a B factor, and where they differ."""
    n, voxel = density.box_px, density.voxel_size_angstrom
    shells = np.arange(1, n) / (n * voxel)
    soft = maps.filtered(density, np.exp(-b_factor * shells**2 / 4))
    rng = np.random.default_rng(seed)
    pair = maps.HalfMaps(
        *(Density(soft.values + noise * rng.standard_normal((n,) * 3), voxel) for _ in range(2)),
        independent=True,
    )
    mask = maps.soft_mask(soft)
    return pair, maps.half_map_fsc(pair, mask), mask


def shell_amplitudes(density):
    spectrum, shells = np.abs(np.fft.rfftn(density.values)) ** 2, Shells(density.box_px)
    power = shells.sums(spectrum) / shells.sums(np.ones(spectrum.shape))
    return np.sqrt(power[1 : (density.box_px + 1) // 2])


@pytest.mark.parametrize(
    ("b_factor", "noise", "end", "off"), [(100, 0.1, 4.3, 10), (100, 0.2, 5.8, 20)]
)
def test_the_b_factor_of_a_map_is_found_and_undone(protein, b_factor, noise, end, off):
    pair, curves, mask = blurred_halves(protein, b_factor, noise * protein.values.max())
    found = maps.sharpened(pair, curves, mask)
    finest = curves.corrected.resolution(0.143).angstrom
    assert finest == pytest.approx(end, abs=0.5)
    true = -(b_factor + blur(ATOMS_ANGSTROM))
    assert found.b_factor_angstrom2 == pytest.approx(true, abs=off)
    # The particle is as strong in every shell as one that nothing has blurred; nothing is beyond.
    k = curves.corrected.frequencies
    still = shell_amplitudes(protein) * np.exp(blur(ATOMS_ANGSTROM) * k**2 / 4)
    seen = shell_amplitudes(Density(found.density.values * mask, protein.voxel_size_angstrom))
    used = (k > 0.1) & (k < 1 / finest - 0.01)
    np.testing.assert_allclose((seen / still)[used], np.median((seen / still)[used]), rtol=0.25)
    assert shell_amplitudes(found.density)[k > 1 / finest + 0.02].max() < 1e-3 * seen[used].min()
    # A straight line would take a protein's dip for blur.
    line = 4 * np.polyfit(found.frequencies**2, found.logarithms, 1)[0]
    assert line < true - 3 * off or end < 5


@pytest.mark.parametrize("seed", range(4))
def test_the_b_factor_is_roughly_right_near_seven_angstrom(protein, seed):
    pair, curves, mask = blurred_halves(protein, 200, 0.14 * protein.values.max(), seed)
    assert 6.3 < curves.corrected.resolution(0.143).angstrom < 7
    found = maps.sharpened(pair, curves, mask)
    assert found.b_factor_angstrom2 == pytest.approx(-(200 + blur(ATOMS_ANGSTROM)), abs=40)


@pytest.mark.parametrize("box", [72, 63])
def test_what_falls_off_towards_nyquist_is_no_blur(box):
    """Atoms, and images that were made coarser, do."""
    density = from_atoms(load("1i10"), voxel_size_angstrom=2.2, box_px=box)
    pair, curves, mask = blurred_halves(density, 60, 1e-3 * density.values.max())
    assert curves.corrected.resolution(0.143).nyquist_limited
    found = maps.sharpened(pair, curves, mask)
    assert found.b_factor_angstrom2 == pytest.approx(-(60 + blur(4.4)), abs=15)


def test_what_a_protein_shows_is_what_the_shipped_ones_show():
    logarithms = []
    at = FIRST + STEP * np.arange(len(PROTEIN))
    for name in ("4jsv", "1i10"):
        d = from_atoms(load(name), voxel_size_angstrom=1.3, resolution_angstrom=ATOMS_ANGSTROM)
        shells = np.arange(1, d.box_px // 2)
        k = shells / (d.box_px * d.voxel_size_angstrom)
        found = np.log(shell_amplitudes(d)) + blur(ATOMS_ANGSTROM) * k**2 / 4
        near = np.exp(-0.5 * ((at[:, None] - k) / 0.005) ** 2) * shells**2
        found = near @ found / near.sum(axis=1)
        logarithms.append(found - found.mean())
    np.testing.assert_allclose(PROTEIN, np.mean(logarithms, axis=0), atol=2e-3)
    # One protein is as the other where a B factor is fitted.
    assert np.abs(np.subtract(*logarithms))[at >= 0.1].max() < 0.1


@pytest.mark.parametrize(("voxel", "box"), [(3.0, 80), (1.8, 14)])
def test_a_map_without_fine_detail_is_not_sharpened(voxel, box):
    """Well below Nyquist, of 7 A and finer; and of shells enough."""
    pair = noisy(9 * noise(0, box).values, seed=1, voxel=voxel)
    mask = np.ones((box,) * 3)
    curves = maps.half_map_fsc(pair, mask)
    assert curves.corrected.resolution(0.143).nyquist_limited
    assert maps.sharpened(pair, curves, mask) is None


def test_curves_of_other_maps_do_not_sharpen(protein):
    pair, curves, _ = blurred_halves(protein, 100, 0.003)
    small = maps.HalfMaps(pair.first.resampled(60), pair.second.resampled(60), independent=True)
    with pytest.raises(InputError, match="of the maps' 60 voxels, got 39 shells"):
        maps.sharpened(small, curves, np.ones((60,) * 3))


def test_an_empty_mask_shows_no_b_factor(protein):
    pair, curves, mask = blurred_halves(protein, 100, 0.1 * protein.values.max())
    assert maps.sharpened(pair, curves, 0 * mask) is None


def test_a_sharpened_map_is_written_beside_the_others(protein, tmp_path):
    """And shown; where there is none any more, that of an earlier run is put aside."""
    pair, curves, mask = blurred_halves(protein, 100, 0.1 * protein.values.max())
    found = write_halves(tmp_path / "m.mrc", pair, curves, mask)
    written = read_density(tmp_path / "m_sharpened.mrc")
    np.testing.assert_array_equal(written.values, maps.sharpened(pair, curves, mask).density.values)
    general = starfile.read(tmp_path / "m_fsc.star", always_dict=True)["general"]
    used = float(np.ravel(general["rlnBfactorUsedForSharpening"])[0])
    assert used == pytest.approx(found.b_factor_angstrom2)
    shown = [pair, curves, mask, rotations.uniform(100, 0)]
    told = report.write_map(tmp_path / "m.html", "A map", *shown, sharp=found)
    assert told["b_factor_angstrom2"] == found.b_factor_angstrom2
    assert "<h2>Sharpened</h2>" in (tmp_path / "m.html").read_text()
    assert "b_factor_angstrom2" not in report.write_map(tmp_path / "m.html", "A map", *shown)
    assert "<h2>Sharpened</h2>" not in (tmp_path / "m.html").read_text()
    coarse, ball = noisy(np.zeros((24,) * 3), seed=1), np.ones((24,) * 3)
    with pytest.warns(UserWarning, match=r"m_sharpened.mrc: of an earlier run.* too little detail"):
        write_halves(tmp_path / "m.mrc", coarse, maps.half_map_fsc(coarse, ball), ball)
    names = {"m.mrc", "m.html", "m_half1.mrc", "m_half2.mrc", "m_fsc.star"}
    assert {p.name for p in tmp_path.iterdir()} == names | {"m_sharpened.mrc.earlier"}


# --------------------------------------------------------------------------------------
# Masks


def test_a_mask_holds_the_particle_and_little_else():
    mask = maps.soft_mask(noisy_halves(0.1).mean)
    assert mask.shape == SHARP.values.shape and mask.min() == 0 and mask.max() == 1
    inside = SHARP.values > 0.1 * SHARP.values.max()
    assert mask[inside].mean() > 0.98
    assert mask[radius(48) > 23].max() < 0.01


def ball(reach, at=(0, 0, 0), box=48):
    axes = np.ogrid[tuple(slice(-(box // 2) - c, box - box // 2 - c) for c in at)]
    return np.sqrt(sum(axis**2 for axis in axes)) < reach


@pytest.mark.parametrize(("extend", "edge"), [(0.0, 20.0), (8.0, 20.0), (16.0, 12.0), (8.0, 2.0)])
def test_a_mask_is_extended_and_falls_as_a_raised_cosine(extend, edge):
    d = Density(ball(8), 4.0)
    profile = maps.soft_mask(d, extend_angstrom=extend, edge_angstrom=edge)[24, 24, 24:]
    bare = maps.soft_mask(d, extend_angstrom=0.0, edge_angstrom=4.0)[24, 24, 24:]
    end = np.sum(bare == 1) - 1  # the last voxel of the ball as the low-passed map has it
    assert 8 <= end <= 10
    beyond = np.arange(24) - end - extend / 4.0
    fall = np.clip(beyond / max(edge / 4.0, 3), 0, 1)  # of three voxels at least
    np.testing.assert_allclose(profile, 0.5 * (1 + np.cos(np.pi * fall)), atol=1e-6)


def test_a_mask_holds_the_largest_piece_with_its_holes_and_nothing_of_the_corners():
    # A hollow particle, a brighter companion, and the brightest outside of the inscribed sphere.
    values = np.where(ball(10) & ~ball(6), 1.0, 0.0)
    companion, corners = ball(3, (-20, 0, 0)), radius(48) > 25
    values[companion], values[corners] = 2, 3
    mask = maps.soft_mask(Density(values, 4.0))
    assert (mask[ball(10)] == 1).all()
    assert mask[companion].max() < 0.01 and mask[corners].max() == 0


def test_a_mask_leaves_out_what_is_less_than_a_tenth_of_the_height():
    values = np.where(ball(8), 1.0, np.where(ball(16), 0.05, 0.0))
    assert maps.soft_mask(Density(values, 4.0))[24, 24, 24 + 16] == 0
    values = np.where(ball(8), 1.0, np.where(ball(16), 0.2, 0.0))
    assert maps.soft_mask(Density(values, 4.0))[24, 24, 24 + 16] == 1


@pytest.mark.parametrize("background", [0.0, -30.0])
def test_a_mask_holds_what_stands_out_of_the_solvent_by_five_deviations(background):
    # Solvent without anything finer than 30 A, which the mask's own low-pass leaves as it is.
    solvent = fourier.low_pass(noise(0, 48).values, 3, 48 * 4.0 / 30.0)
    solvent /= solvent.std()
    weak, strong = (
        maps.soft_mask(Density(np.where(ball(10), level, solvent) + background, 4.0))
        for level in (4.0, 6.5)
    )
    sphere = 4 / 3 * np.pi * 0.45**3  # of four tenths of the box, and its edge
    assert weak.mean() == pytest.approx(sphere, rel=0.1)
    assert (strong[ball(9)] == 1).all() and strong[radius(48) > 18].max() < 0.01


@pytest.mark.parametrize(("loud", "held"), [(0.002, True), (0.05, False)])
def test_where_noise_is_known_a_mask_holds_what_stands_out_of_it(loud, held):
    """However weak beside the height: the halo is a twentieth of it."""
    values = np.where(ball(8), 1.0, np.where(ball(16), 0.05, 0.0))
    rng = np.random.default_rng(4)
    first, second = (values + rng.normal(0, 20 * loud, values.shape) for _ in range(2))
    noise = Density((first - second) / 2, 4.0)
    shape = {"extend_angstrom": 0.0, "edge_angstrom": 12.0}
    mask = maps.soft_mask(Density((first + second) / 2, 4.0), noise=noise, **shape)
    assert mask[24, 24, 24] == 1 and mask[24, 24, 24 + 22] == 0
    assert (mask[24, 24, 24 + 12] == 1) == held
    assert maps.soft_mask(Density(values, 4.0), **shape)[24, 24, 24 + 14] == 0


def test_what_a_mask_is_made_from_is_no_finer_than_three_voxels():
    values = ball(9) + 0.3 * noise(0, 48).values
    fine, coarse = (
        maps.soft_mask(Density(values, 10.0), resolution_angstrom=r) for r in (10.0, 30.0)
    )
    np.testing.assert_array_equal(fine, coarse)


def test_a_map_of_noise_gets_a_sphere_for_a_mask():
    mask = maps.soft_mask(noisy_halves(1.0, signal=NOTHING).mean)
    assert mask[24, 24, 24] == 1 and mask[:, 0, 0].max() == 0
    assert mask.mean() == pytest.approx(4 / 3 * np.pi * 0.45**3, rel=0.1)
    with pytest.raises(InputError, match="zero everywhere"):
        maps.soft_mask(Density(np.zeros((16,) * 3), 4.0))


def test_a_speck_of_noise_is_no_particle_to_mask():
    # One voxel stands out: the mask is the sphere that it is where nothing does.
    values = np.random.default_rng(0).normal(0, 2e-2, (40, 40, 40)).astype(np.float32)
    values[20, 20, 20] = 1
    wide = maps.soft_mask(Density(values, 5.0))
    assert (wide[radius(40) < 15] > 0.99).all()


# --------------------------------------------------------------------------------------
# Reference bias


@pytest.mark.parametrize("mask", [radius(24) < 8, np.exp(-((radius(24) / 5) ** 2) / 2)])
def test_independent_noise_does_not_agree_beyond_a_reference(mask):
    nothing = np.zeros((24,) * 3)
    z = np.array([maps.reference_bias(noisy(nothing, seed=i), mask, 40.0).z for i in range(200)])
    # 200 numbers of mean 0 +- 0.07 and deviation 1 +- 0.05, which a sharp edge makes 0.9.
    assert abs(z.mean()) < 0.28 and 0.75 < z.std() < 1.2 and np.abs(z).max() < 4.5


def test_independent_noise_that_was_made_symmetric_does_not_agree_either():
    nothing, mask = np.zeros((25,) * 3), radius(25) < 8
    z = []
    for seed in range(60):
        pair = noisy(nothing, seed=seed)
        halves = (made_symmetric(half, "D2") for half in (pair.first, pair.second))
        pair = maps.HalfMaps(*halves, independent=False)
        z.append(maps.reference_bias(pair, mask, 40.0, symmetry="D2").z)
    # Taken for independent voxels they would scatter by 2. Of 60: a deviation of 1 +- 0.09.
    assert 0.7 < np.std(z) < 1.3 and np.abs(z).max() < 4.5


def test_what_halves_share_is_seen_beyond_a_reference_and_only_there():
    mask = maps.soft_mask(SHARP, resolution_angstrom=30.0)
    assert maps.reference_bias(noisy_halves(0.1), mask, 25.0).believable
    coarse = noisy_halves(0.1, signal=SHARP.low_passed(25.0))
    assert not maps.reference_bias(coarse, mask, 25.0).believable


def test_what_an_edge_mixes_beyond_a_reference_is_not_taken_for_the_images_own():
    # Half-maps that are one beyond all doubt to shell 7.75, and tapered towards the box's edge.
    # The taper is one cosine along each axis and so carries what they share by one shell along
    # each, to 7.75 + sqrt(3) = 9.48 and no further; the noise is white and each half's own. The
    # reference was used to shell 8: two shells beyond it start at 9.5.
    box = 48
    cosine = 0.5 * (1 + np.cos(2 * np.pi * (np.arange(box) - box // 2) / box))
    shared = fourier.low_pass(noise(0, box).values, 3, 7.75)
    shared *= cosine[:, None, None] * cosine[:, None] * cosine
    shared *= 10 / shared.std()
    mask = np.clip((0.5 - radius(box) / box) / 0.1, 0, 1)
    z = [
        maps.reference_bias(noisy(shared, seed=i, voxel=4.0), mask, box * 4.0 / 8).z
        for i in range(8)
    ]
    # Standard normal; with one shell left out they are above 12, with none above 28.
    assert np.abs(z).max() < 4


@pytest.mark.parametrize("shell", [8, 12, 17])
def test_beyond_a_reference_every_shell_counts_alike(shell):
    # One shell agrees, and stands above the others a hundredfold: it is one of twelve all the same.
    box = 40
    mine = whole_shells(box) == shell
    agreed = 100 * np.fft.ifftn(np.where(mine, np.fft.fftn(noise(0, box).values), 0)).real
    found = maps.reference_bias(noisy(agreed, seed=1), np.ones((box,) * 3), box * 5.0 / 5)
    # Of shells 5 + 2 to 18; four standard deviations of noise.
    assert found.correlation == pytest.approx(1 / 12, abs=4 * found.correlation / found.z)
    assert found.z > 8


def test_beyond_a_reference_two_shells_are_left_out_and_so_are_the_last():
    pair, mask = noisy(np.zeros((48,) * 3), seed=0, voxel=4.0), np.ones((48,) * 3)
    # Of shells 1 to 23, 22 is the last that is used: the first beyond shell 20.
    assert np.isfinite(maps.reference_bias(pair, mask, 48 * 4.0 / 19.9).z)
    with pytest.raises(InputError, match="nothing is left") as said:
        maps.reference_bias(pair, mask, 48 * 4.0 / 20.1)
    coarser = float(str(said.value).rpartition("resolution of ")[2].partition(" A")[0])
    assert np.isfinite(maps.reference_bias(pair, mask, coarser).z)


def test_five_deviations_are_believed_and_empty_maps_are_not():
    assert maps.ReferenceBias(0.1, 5.1, 20.0).believable
    assert not maps.ReferenceBias(0.1, 4.9, 20.0).believable
    empty = Density(np.zeros((24,) * 3), 5.0)
    found = maps.reference_bias(maps.HalfMaps(empty, empty, False), np.ones((24,) * 3), 40.0)
    assert found.correlation == found.z == 0 and not found.believable


# --------------------------------------------------------------------------------------
# Coverage


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
    # A symmetric particle shows the same from elsewhere.
    cap = rotations.sample(3000, 3, tilt_range=(1.3, 1.5))
    around = cap[np.abs(rotations.view_directions(cap)[:, 1]) < 0.3]
    alone, all_round = maps.coverage(around), maps.coverage(around, symmetry="C4")
    assert 0 < all_round.unseen < 0.5 * alone.unseen
    with pytest.raises(InputError, match="no orientations"):
        maps.coverage(np.zeros((0, 4)))


def test_views_from_one_direction_see_one_plane():
    q = rotations.in_plane(rotations.uniform(1, 0), np.linspace(0, 6, 50))
    one = maps.coverage(q)
    # Directions within 0.1 of the plane are a tenth of all; the others count as seen once.
    assert one.unseen == pytest.approx(0.9, abs=0.01) and one.anisotropy > 1e6
    # In units of the mean a tenth is seen 10-fold, and nine tenths 1 / (50 x 0.1)-fold.
    assert one.evenness == pytest.approx(1 / (0.1 / 10 + 0.9 * 5), rel=0.02)
    assert maps.coverage(q, half_thickness=0.2).unseen == pytest.approx(0.8, abs=0.01)


def test_anisotropy_is_the_ratio_of_the_views_second_moments():
    along = {"x": rotations.about("y", np.pi / 2), "y": rotations.about("x", np.pi / 2)}
    q = [along["x"]] * 3 + [along["y"]] * 2 + [rotations.about("z", 0.0)]
    assert maps.coverage(np.array(q)).anisotropy == pytest.approx(3)


def test_coverage_of_many_views_is_that_of_a_few_repeated():
    q = rotations.preferred(3000, 1)
    few, many = maps.coverage(q), maps.coverage(np.tile(q, (7, 1)))
    assert few.unseen == 0
    assert many.evenness == pytest.approx(few.evenness)


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
def test_a_planted_turn_and_shift_is_found(hand):
    source = maps.mirrored(SHARP) if hand else SHARP
    a, shift = rotations.uniform(1, 3)[0], np.array([7.0, -4.0, 2.0])
    found = maps.register(maps.turned(source, a, shift), SHARP, resolution_angstrom=12.0)
    assert found.mirrored == hand
    assert found.correlation > 0.9999
    assert correlation(found.density.values, SHARP.values) > 0.999
    # What was fitted is the inverse of what was done, to a few thousandths of a voxel; the mirror
    # image of the moved map is moved the other way.
    assert rotations.distance(found.quaternion, rotations.inverse(a)) < 1e-3
    undone = Rotation.from_quat(a).inv().apply(shift if hand else -shift)
    assert np.linalg.norm(found.shift_angstrom - undone) < 0.015


def test_a_map_is_not_laid_onto_what_only_looks_alike(phantom):
    # Four orientations fit well, D2's, and one of them fits exactly.
    one = phantom.density(32, 7.0)
    alike = made_symmetric(one, "D2").values
    reference = Density(alike + 0.15 * one.values, 7.0)
    a = rotations.uniform(1, 3)[0]
    found = maps.register(
        maps.turned(reference, a), reference, allow_mirror=False, resolution_angstrom=20.0
    )
    assert rotations.distance(found.quaternion, rotations.inverse(a)) < 1e-3


@pytest.mark.parametrize("seed", [2, 5])
def test_what_nearly_is_a_symmetry_does_not_hide_where_a_map_lies(seed):
    """Nor that it was solved off the middle: by coarse detail it lies well in eight places."""
    wide = Phantom.random(seed, blobs=8, sigma_angstrom=16.0).density(32, 7.0)
    hands = wide, maps.mirrored(wide)
    alike = np.mean([maps.turned(d, g).values for g in group("D2").elements for d in hands], axis=0)
    reference = Density(alike + Phantom.random(seed).density(32, 7.0).values, 7.0)
    a, hand = rotations.uniform(1, seed)[0], seed % 2 == 1
    other = maps.turned(maps.mirrored(reference) if hand else reference, a, (20.0, -12.0, 16.0))
    found = maps.register(other, reference, resolution_angstrom=20.0)
    assert found.mirrored == hand
    assert rotations.distance(found.quaternion, rotations.inverse(a)) < 0.05
    assert found.correlation > 0.99


def test_the_correlation_of_a_registered_map_is_that_of_its_band(phantom):
    reference = phantom.density(32, 7.0)
    scale = 5 * reference.values.std()
    map_ = Density(reference.values + scale * noise(1, 32).values, 7.0)
    found, other = (
        maps.register(map_, reference, allow_mirror=False, resolution_angstrom=20.0, seed=seed)
        for seed in (0, 1)
    )
    a, b = (fourier.low_pass(d.values, 3, 32 * 7 / 20) for d in (found.density, reference))
    expected = np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
    assert 0.3 < expected < 0.6
    # Of all frequencies of the band, interpolated; to 30 A it is above by a quarter.
    assert found.correlation == pytest.approx(expected, abs=0.08)
    assert other.correlation != found.correlation
    assert rotations.distance(other.quaternion, found.quaternion) < 0.2


def test_noisy_maps_are_laid_by_all_that_they_have_in_common():
    """Fitted at 4,000 random frequencies, they ended twice as far off."""
    signal, off = Phantom.random(3).density(32, 7.0), []
    for seed in range(3):
        one, two = (
            Density(signal.values + signal.values.std() * noise(s, 32).values, 7.0)
            for s in (2 * seed, 2 * seed + 1)
        )
        a = rotations.uniform(1, seed)[0]
        laid = maps.register(maps.turned(two, a, (4.0, -3.0, 2.0)), one)
        off.append(float(rotations.distance(laid.quaternion, rotations.inverse(a))))
        assert not laid.mirrored
    assert max(off) < 0.03


def test_nothing_finer_than_nyquist_is_fitted(phantom):
    reference = phantom.density(24, 10.0)
    a = rotations.uniform(1, 3)[0]
    found = maps.register(
        maps.turned(reference, a), reference, allow_mirror=False, resolution_angstrom=2.0
    )
    assert rotations.distance(found.quaternion, rotations.inverse(a)) < 0.01


@pytest.mark.parametrize("empty", [0, 1])
def test_an_empty_map_cannot_be_registered(empty):
    pair = [noise(0, 16), noise(1, 16)]
    pair[empty] = Density(np.zeros((16,) * 3), 5.0)
    with pytest.raises(InputError, match="zero everywhere"):
        maps.register(*pair)


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
# Report


@pytest.mark.parametrize("level", [0.3, 3.0])
def test_the_page_about_a_map_reads_offline_and_says_what_to_doubt(tmp_path, level):
    halves = noisy_halves(level, independent=False, signal=SHARP.low_passed(25.0))
    mask = maps.soft_mask(SHARP)
    curves = maps.half_map_fsc(halves, mask)
    test = maps.reference_bias(halves, mask, 25.0)
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
