"""Beam tilt, Zernike phases and an uneven magnification: undone where images are read."""

import json
import pickle

import numpy as np
import pytest
import starfile
from measures import relative_error
from particle_files import PIXEL, SHIFTS, in_memory, relion31
from typer.testing import CliRunner

from cryoem import (
    Density,
    ParticleStack,
    cli,
    fourier,
    imaging,
    maps,
    project,
    read_particles,
    reconstruct,
    refine,
    rotations,
    simulate,
    write_particles,
)
from cryoem.aberrations import UNITY, Aberration, beam_tilt, zernike
from cryoem.errors import InputError

MATRIX = (1.02, 0.015, -0.01, 0.985)
#: Trefoil among them, as large as the pixels of the tests need them.
ODD = (3.0, -2.0, 40.0, 0.0, 5.0, -30.0)
MAGNIFICATION = ("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11")


@pytest.fixture(scope="module")
def blobs():
    """A few blobs, with no symmetry, well within their box and well sampled."""
    rng = np.random.default_rng(3)
    z, y, x = np.mgrid[-16:16, -16:16, -16:16]
    values = np.zeros((32, 32, 32))
    for at in rng.uniform(-6, 6, (6, 3)):
        values += np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2) / 4)
    return Density(values.astype(np.float32), PIXEL)


# --------------------------------------------------------------------------------------
# Polynomials


@pytest.mark.parametrize(
    ("parity", "index", "polynomial"),
    [
        ("odd", 0, lambda x, y: y + 0 * x),
        ("odd", 1, lambda x, y: x + 0 * y),
        ("odd", 2, lambda x, y: 3 * x**2 * y - y**3),
        ("odd", 3, lambda x, y: (3 * (x**2 + y**2) - 2) * y),
        ("odd", 4, lambda x, y: (3 * (x**2 + y**2) - 2) * x),
        ("odd", 5, lambda x, y: x**3 - 3 * x * y**2),
        ("odd", 8, lambda x, y: (10 * (x**2 + y**2) ** 2 - 12 * (x**2 + y**2) + 3) * y),
        ("even", 0, lambda x, y: 1 + 0 * x * y),
        ("even", 1, lambda x, y: 2 * x * y),
        ("even", 2, lambda x, y: 2 * (x**2 + y**2) - 1),
        ("even", 3, lambda x, y: x**2 - y**2),
        ("even", 4, lambda x, y: 4 * x * y * (x**2 - y**2)),
        ("even", 6, lambda x, y: 6 * (x**2 + y**2) ** 2 - 6 * (x**2 + y**2) + 1),
        ("even", 8, lambda x, y: x**4 - 6 * x**2 * y**2 + y**4),
    ],
)
def test_zernike_polynomials_come_in_relions_order(parity, index, polynomial):
    x, y = np.linspace(-0.7, 0.7, 5)[None], np.linspace(-0.6, 0.6, 4)[:, None]
    coefficients = np.eye(9)[index] * 1.5
    found = zernike(parity, coefficients, x, y)
    assert found.shape == (4, 5)
    np.testing.assert_allclose(found, 1.5 * polynomial(x, y), atol=1e-12)


def test_coefficients_of_each_image_make_a_phase_each():
    x, y = np.linspace(0, 0.3, 5)[None], np.linspace(-0.2, 0.2, 4)[:, None]
    many = np.random.default_rng(0).standard_normal((3, 9))
    found = zernike("even", many, x, y)
    for one, phase in zip(many, found, strict=True):
        np.testing.assert_allclose(zernike("even", one, x, y), phase)


def test_a_tilted_beam_is_coma():
    """The phase is -2 pi Cs lambda^2 k^2 (k . tilt), in radians and angstrom."""
    wavelength, k = 0.0197, np.array([0.1, -0.15])
    odd = beam_tilt(0.8, -0.3, 2.7, wavelength)
    wanted = -2 * np.pi * 2.7e7 * wavelength**2 * (k @ k) * (k @ [0.8e-3, -0.3e-3])
    assert zernike("odd", odd, k[:1], k[1:, None]).item() == pytest.approx(wanted)


def test_symmetric_phases_enter_the_ctf_as_defocus_does():
    """The defocus' own polynomial, 2 k^2 - 1, and a constant."""
    wavelength, more = float(imaging.wavelength_angstrom(300.0)), 800.0
    second = -np.pi * wavelength * more / 2
    seen = imaging.ctf(24, 2.0, 9000.0, even_zernike=(second, 0, second))
    np.testing.assert_allclose(seen, imaging.ctf(24, 2.0, 9000.0 + more), atol=2e-5)
    both = imaging.ctf(24, 2.0, [9000.0, 9000.0], even_zernike=[(0, 0, 0), (second, 0, second)])
    np.testing.assert_array_equal(both[0], imaging.ctf(24, 2.0, 9000.0)[0])
    np.testing.assert_array_equal(both[1], seen[0])


# --------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("box", [32, 31])
def test_antisymmetric_phases_are_undone_exactly(blobs, box):
    images = imaging.crop(project(blobs, rotations.uniform(3, 0)), box)
    seen = Aberration(PIXEL, ODD).apply(images)
    assert relative_error(seen, images) > 0.1
    assert relative_error(Aberration(PIXEL, ODD).undo(seen), images) < 1e-6


@pytest.mark.parametrize("box", [32, 31])
def test_a_phase_along_x_is_a_shift_along_x(box):
    noise = np.random.default_rng(0).standard_normal((2, box, box)).astype(np.float32)
    images = fourier.low_pass(noise, 2, 15)
    # exp(-2 pi i k s) moves to larger indices, by s angstrom.
    seen = Aberration(2.0, (0.0, -2 * np.pi * 3.0)).apply(images)
    np.testing.assert_allclose(seen, fourier.shift(images, [[1.5, 0]] * 2), atol=2e-5)


@pytest.mark.parametrize("box", [48, 47])
def test_a_magnification_stretches_about_the_origin(box):
    """What is seen at k is the image at M k: in space the image at the inverse transpose of M."""
    y, x = np.indices((box, box)) - box // 2
    at = np.stack([x.ravel(), y.ravel()])

    def blob(matrix):
        u, v = matrix @ at - [[4.0], [-3.0]]
        return np.exp(-((u / 3) ** 2 + (v / 5) ** 2)).reshape(1, box, box).astype(np.float32)

    matrix = np.array(MATRIX).reshape(2, 2)
    stretched = np.linalg.inv(matrix).T
    wanted = blob(stretched) * np.linalg.det(stretched)
    found = Aberration(PIXEL, (), MATRIX).apply(blob(np.eye(2)))
    assert relative_error(blob(np.eye(2)), wanted) > 0.04
    assert relative_error(found, wanted) < 1e-5
    assert relative_error(Aberration(PIXEL, (), MATRIX).undo(wanted), blob(np.eye(2))) < 1e-5


def test_phases_belong_to_the_frequencies_before_magnification(blobs):
    images = project(blobs, rotations.uniform(3, 0))
    both = Aberration(PIXEL, ODD, MATRIX)
    in_turn = Aberration(PIXEL, (), MATRIX).apply(Aberration(PIXEL, ODD).apply(images))
    assert relative_error(both.apply(images), in_turn) < 1e-4
    assert relative_error(both.undo(in_turn), images) < 1e-3


def test_noise_stays_as_loud_and_as_white():
    noise = np.random.default_rng(0).standard_normal((200, 32, 32)).astype(np.float32)
    left = Aberration(PIXEL, ODD, MATRIX).undo(noise)
    power = np.mean(np.abs(np.fft.rfft2(left)) ** 2, axis=0) / 32**2
    inside = fourier.radius((32, 32), half=True) < 15
    assert abs(power[inside].mean() - 1) < 0.01 and power[inside].std() < 0.12


@pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (2, 0, 0, 2), (1, 0, 0, -1)])
def test_a_magnification_far_from_unity_is_refused(matrix):
    with pytest.raises(InputError, match=r"near unity, got \("):
        Aberration(PIXEL, (), matrix)


# --------------------------------------------------------------------------------------
# Files


def told(path, block="optics", **columns):
    """The file with more columns, one value for all rows, or a list."""
    blocks = starfile.read(path, always_dict=True)
    table = blocks[block]
    for name, value in columns.items():
        table[name] = value if isinstance(value, list) else [value] * len(table)
    starfile.write(blocks, path, overwrite=True)
    return path


def seen_by(stack, aberration, path, **columns):
    """The particles as a microscope sees them, in a file that tells its aberrations, or not."""
    seen = stack.replace(
        images=aberration.apply(stack.images),
        shifts_px=stack.shifts_px @ aberration.matrix,
    )
    write_particles(path, seen)
    return told(path, **columns) if columns else path


TOLD = {
    "rlnOddZernike": f"[{','.join(map(str, ODD))}]",
    **dict(zip(MAGNIFICATION, MATRIX, strict=True)),
}


def test_images_and_shifts_are_read_without_aberrations(tmp_path):
    aberration = Aberration(PIXEL, ODD, MATRIX)
    path = told(relion31(tmp_path), **TOLD)
    stack = read_particles(path)
    np.testing.assert_allclose(stack.images[:], aberration.undo(in_memory().images), atol=1e-6)
    np.testing.assert_allclose(stack.images[2], stack.images[:][2], atol=1e-6)
    wanted = SHIFTS @ np.linalg.inv(aberration.matrix)
    np.testing.assert_allclose(stack.shifts_px, wanted, atol=1e-12)
    np.testing.assert_allclose(
        read_particles(path, images=False).shifts_px, wanted, atol=1e-12
    )  # what is told without images is told of the same frame
    some = pickle.loads(pickle.dumps(stack.select(np.array([4, 1]))))
    np.testing.assert_allclose(some.images[:], stack.images[:][[4, 1]], atol=1e-6)


def test_what_stays_in_its_file_is_written_with_its_aberrations(tmp_path):
    path = told(relion31(tmp_path), **TOLD)
    stack = read_particles(path)
    write_particles(tmp_path / "same.star", stack)
    write_particles(tmp_path / "moved.star", stack.with_poses(stack.quaternions, SHIFTS))
    before, same = (starfile.read(p) for p in (path, tmp_path / "same.star"))
    assert before["particles"].equals(same["particles"])
    assert before["optics"].equals(same["optics"])
    moved = read_particles(tmp_path / "moved.star")
    np.testing.assert_allclose(moved.shifts_px, SHIFTS, atol=1e-12)
    np.testing.assert_array_equal(moved.images[:], stack.images[:])
    origin = starfile.read(tmp_path / "moved.star")["particles"]["rlnOriginXAngst"]
    wanted = -PIXEL * SHIFTS @ np.array(MATRIX).reshape(2, 2)
    np.testing.assert_allclose(origin, wanted[:, 0], atol=1e-9)


def test_a_stack_without_its_file_tells_what_its_images_have(tmp_path):
    stack = read_particles(told(relion31(tmp_path), **TOLD))
    bare = ParticleStack(stack.images, PIXEL, quaternions=stack.quaternions, shifts_px=SHIFTS)
    write_particles(tmp_path / "bare.star", bare)
    back = read_particles(tmp_path / "bare.star")
    np.testing.assert_array_equal(back.images[:], stack.images[:])
    np.testing.assert_allclose(back.shifts_px, SHIFTS, atol=1e-12)


def test_images_that_are_written_anew_have_none_left(tmp_path):
    stack = read_particles(told(relion31(tmp_path), rlnEvenZernike="[0,0,2]", **TOLD))
    images = stack.images[:]
    write_particles(tmp_path / "new.star", stack.replace(images=images))
    new = read_particles(tmp_path / "new.star")
    assert not {*TOLD} & {*starfile.read(tmp_path / "new.star")["optics"]}
    np.testing.assert_array_equal(new.images[:], images)
    np.testing.assert_allclose(new.shifts_px, stack.shifts_px, atol=1e-12)
    np.testing.assert_array_equal(new.ctf(), stack.ctf())  # with its symmetric aberration


def test_groups_and_particles_have_their_own(tmp_path):
    stack = in_memory().replace(optics_group=[0, 0, 1, 1, 2, 2])
    path = tmp_path / "particles.star"
    write_particles(path, stack)
    told(path, rlnBeamTiltX=[0.0, 8.0, 0.0], rlnBeamTiltY=[0.0, -3.0, 0.0])
    told(path, "particles", rlnMagMat00=[1, 1, 1, 1, 1, 1.01])
    images = read_particles(path).images[:]
    odd = tuple(beam_tilt(8.0, -3.0, 2.7, float(imaging.wavelength_angstrom(300.0))))
    np.testing.assert_array_equal(images[[0, 1, 4]], stack.images[[0, 1, 4]])
    np.testing.assert_allclose(
        images[2:4], Aberration(PIXEL, odd).undo(stack.images[2:4]), atol=1e-6
    )
    wanted = Aberration(PIXEL, (), (1.01, 0, 0, 1)).undo(stack.images[5:])
    np.testing.assert_allclose(images[5:], wanted, atol=1e-6)


def test_tilt_adds_to_the_odd_polynomials(tmp_path):
    path = told(relion31(tmp_path), rlnBeamTiltX=4.0, rlnOddZernike="[1,2]")
    tilt = beam_tilt(4.0, 0.0, 2.7, float(imaging.wavelength_angstrom(300.0)))
    assert read_particles(path).images.aberrations == (
        Aberration(PIXEL, tuple((tilt + np.array([1, 2, 0, 0, 0, 0])).tolist())),
    )


@pytest.mark.parametrize(
    "columns",
    [
        dict(zip(MAGNIFICATION, UNITY, strict=True)),
        {"rlnBeamTiltX": 0.0, "rlnBeamTiltY": "None", "rlnOddZernike": "[0,0,0]"},
        {"rlnOddZernike": "[]", "rlnMagMat11": "None", "rlnEvenZernike": "None"},
        {"rlnBeamTiltX": "nan", "rlnMagMat00": "nan"},
    ],
)
def test_where_nothing_is_to_be_undone_images_are_what_the_file_holds(tmp_path, columns):
    stack = read_particles(told(relion31(tmp_path), **columns))
    assert stack.images.aberrations == ()
    np.testing.assert_array_equal(stack.images[:], in_memory().images)
    np.testing.assert_array_equal(
        stack.shifts_px, read_particles(tmp_path / "particles.star").shifts_px
    )
    np.testing.assert_array_equal(stack.ctf(), in_memory().ctf())


def test_symmetric_phases_are_read_and_written(tmp_path):
    even = [0, 0.5, -2.0, 0, 30.0, 0, 0, 0, -25.0]
    wanted = in_memory(even_zernike=even)
    assert not np.allclose(wanted.ctf(), in_memory().ctf(), atol=0.01)
    path = tmp_path / "particles.star"
    write_particles(path, wanted)
    np.testing.assert_array_equal(read_particles(path).ctf(), wanted.ctf())
    write_particles(tmp_path / "again.star", read_particles(path))
    np.testing.assert_array_equal(read_particles(tmp_path / "again.star").ctf(), wanted.ctf())
    mixed = in_memory(even_zernike=[[0.0], *[[1.0]] * 5])
    with pytest.raises(InputError, match=r"row 2: rlnEvenZernike is \[1.0\], and \[0.0\]"):
        write_particles(tmp_path / "mixed.star", mixed)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"rlnOddZernike": "[0,x]"},
            r"data_optics: row 1, column rlnOddZernike: got \[0,x\], wanted numbers",
        ),
        (
            {"rlnEvenZernike": "[0,inf]"},
            r"data_optics: row 1, column rlnEvenZernike: got \[0,inf\]",
        ),
        (
            {"rlnBeamTiltY": "[1,2]"},
            r"data_optics: row 1, column rlnBeamTiltY: got \[1,2\], wanted a number",
        ),
        ({"rlnBeamTiltX": "inf"}, r"data_optics: row 1, column rlnBeamTiltX: got inf, wanted"),
        ({"rlnMagMat00": "-inf"}, r"data_optics: row 1, column rlnMagMat00: got -inf, wanted"),
        ({"rlnMagMat00": 0.1}, r"row 1, rlnMagMat00 to 11: .*near unity, got \(0.1, 0"),
        ({"rlnMagMat00": "a"}, r"data_optics: row 1, column rlnMagMat00: got a, wanted"),
    ],
)
def test_what_cannot_be_undone_is_named(tmp_path, columns, message):
    path = told(relion31(tmp_path), **columns)
    with pytest.raises(InputError, match=rf"particles\.star: {message}"):
        read_particles(path)


def test_a_tilt_needs_the_microscope(tmp_path):
    path = told(relion31(tmp_path), rlnBeamTiltX=1.0)
    blocks = starfile.read(path, always_dict=True)
    blocks["optics"] = blocks["optics"].drop(columns="rlnSphericalAberration")
    starfile.write(blocks, path, overwrite=True)
    with pytest.raises(InputError, match="has a beam tilt, but no column rlnSphericalAberration"):
        read_particles(path)


# --------------------------------------------------------------------------------------
# The method


@pytest.fixture(scope="module")
def imaged(blobs):
    return simulate(
        blobs, 150, 0, snr=4.0, max_shift_px=2.0, defocus_range_angstrom=(5e3, 1e4)
    )  # fmt: skip


def test_a_map_of_aberrated_images_is_as_good_as_one_without(blobs, imaged, tmp_path):
    aberration = Aberration(PIXEL, ODD, MATRIX)
    path = seen_by(imaged, aberration, tmp_path / "seen.star")
    clean = maps.fsc(reconstruct(imaged), blobs).mean
    untold = maps.fsc(reconstruct(read_particles(path)), blobs).mean
    found = maps.fsc(reconstruct(read_particles(told(path, **TOLD))), blobs).mean
    assert untold < clean - 0.02
    assert found > clean - 0.004


def test_refined_poses_of_aberrated_images_are_as_good_as_those_without(blobs, imaged, tmp_path):
    aberration = Aberration(PIXEL, ODD, MATRIX)
    path = seen_by(imaged, aberration, tmp_path / "seen.star")

    def error(stack):
        found = refine(stack.replace(noise=None), blobs, resolution_angstrom=9.0)
        return rotations.distance(found.quaternions, imaged.quaternions).mean()

    clean, untold = error(imaged), error(read_particles(path))
    found = error(read_particles(told(path, **TOLD)))
    assert untold > 1.2 * clean
    assert found < 1.05 * clean


def test_info_names_them(tmp_path):
    path = told(relion31(tmp_path), rlnBeamTiltX=0.25, rlnEvenZernike="[0,0.5]", rlnMagMat00=1.01)
    said = CliRunner().invoke(cli.app, ["info", str(path), "--json"])
    aberrations = json.loads(said.stdout)["aberrations"]
    assert aberrations == "rlnBeamTiltX (0.25), rlnEvenZernike (0.5), rlnMagMat00 (1.01)"
