import mrcfile
import numpy as np
import pytest
import starfile

from cryoem import rotations, star
from cryoem.errors import InputError

IMAGES = np.random.default_rng(0).standard_normal((6, 12, 12)).astype(np.float32)
Q = rotations.uniform(6, 1)
SHIFTS = np.array([[1.5, -2.0], [0, 0], [0.25, 3], [-1, -1], [2, 0], [0, 0.5]])


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "particles.star"
    star.write_particles(
        path,
        IMAGES,
        Q,
        pixel_size_angstrom=3.67,
        shifts_px=SHIFTS,
        columns={"rlnRandomSubset": [1, 2, 1, 2, 1, 2]},
    )
    return path


def test_particles_round_trip(written):
    back = star.read_particles(written)
    np.testing.assert_array_equal(back.images, IMAGES)
    # Angles and origins are written with six decimals: 1e-6 degrees, 1e-6 A.
    assert rotations.distance(back.quaternions, Q).max() < 1e-6
    np.testing.assert_allclose(back.shifts_px, SHIFTS, atol=1e-5)
    assert back.pixel_size_angstrom == pytest.approx(3.67)
    assert list(back.table["rlnRandomSubset"]) == [1, 2, 1, 2, 1, 2]


def test_the_file_is_relions(written):
    blocks = starfile.read(written)
    optics, particles = blocks["optics"], blocks["particles"]
    assert len(particles) == 6
    row = (optics.iloc[0] if hasattr(optics, "iloc") else optics).to_dict()
    assert row["rlnImagePixelSize"] == pytest.approx(3.67)
    assert row["rlnImageSize"] == 12 and row["rlnImageDimensionality"] == 2
    assert particles["rlnImageName"].iloc[2] == "000003@particles.mrcs"
    angles = rotations.to_relion(Q)
    for i, name in enumerate(("Rot", "Tilt", "Psi")):
        np.testing.assert_allclose(particles[f"rlnAngle{name}"], angles[:, i], atol=1e-5)
    assert set(particles["rlnOpticsGroup"]) == {1}


def test_an_origin_is_what_centres_the_particle(written):
    # A particle 1.5 pixels to the right is centred by moving it 1.5 pixels to the left.
    first = starfile.read(written)["particles"].iloc[0]
    assert first["rlnOriginXAngst"] == pytest.approx(-1.5 * 3.67, abs=1e-5)
    assert first["rlnOriginYAngst"] == pytest.approx(2.0 * 3.67, abs=1e-5)


def test_the_stack_is_a_stack(written):
    with mrcfile.open(written.with_suffix(".mrcs")) as mrc:
        assert mrc.is_image_stack() and int(mrc.header.mode) == 2
        assert float(mrc.voxel_size.x) == pytest.approx(3.67, rel=1e-5)


def test_one_particle_round_trips(tmp_path):
    path = tmp_path / "one.star"
    star.write_particles(path, IMAGES[:1], Q[:1], pixel_size_angstrom=2.0)
    back = star.read_particles(path)
    np.testing.assert_array_equal(back.images, IMAGES[:1])
    assert rotations.distance(back.quaternions, Q[:1]).max() < 1e-6


def rewritten(path, change):
    blocks = starfile.read(path, always_dict=True)
    change(blocks)
    starfile.write(blocks, path, overwrite=True)
    return path


def name_images(names):
    def change(blocks):
        blocks["particles"]["rlnImageName"] = names

    return change


def drop(block, column):
    def change(blocks):
        blocks[block] = blocks[block].drop(columns=column)

    return change


def two_pixel_sizes(blocks):
    import pandas as pd

    second = blocks["optics"].assign(rlnOpticsGroup=2, rlnImagePixelSize=2.0)
    blocks["optics"] = pd.concat([blocks["optics"], second])


def test_rows_may_come_in_any_order(written):
    order = [5, 1, 1, 3]

    def change(blocks):
        blocks["particles"] = blocks["particles"].iloc[order]

    back = star.read_particles(rewritten(written, change))
    np.testing.assert_array_equal(back.images, IMAGES[order])
    assert rotations.distance(back.quaternions, Q[order]).max() < 1e-6


def test_without_angles_and_origins_they_are_zero(written):
    def change(blocks):
        blocks["particles"] = blocks["particles"][["rlnImageName"]]

    back = star.read_particles(rewritten(written, change))
    np.testing.assert_allclose(back.quaternions, np.tile([0, 0, 0, 1.0], (6, 1)), atol=1e-12)
    assert (back.shifts_px == 0).all()


def test_image_names_may_be_relative_to_the_working_directory(written, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "particles.star"
    written.rename(moved)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(star.read_particles(moved).images, IMAGES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("optics"), "data_optics"),
        (lambda b: b.pop("particles"), "data_particles"),
        (drop("optics", "rlnImagePixelSize"), "rlnImagePixelSize"),
        (drop("particles", "rlnImageName"), "rlnImageName"),
        (two_pixel_sizes, "one pixel size"),
        (name_images([f"{i + 2:06d}@particles.mrcs" for i in range(6)]), "row 6.*holds 6"),
        (name_images([f"{i:06d}@particles.mrcs" for i in range(6)]), "row 1 names image 0"),
        (name_images(["particles.mrcs"] * 6), "row 1.*000001@stack"),
        (name_images(["one@particles.mrcs"] * 6), "row 1.*000001@stack"),
        (name_images([f"{i + 1}@{i % 2}.mrcs" for i in range(6)]), "one stack"),
        (name_images([f"{i + 1}@missing.mrcs" for i in range(6)]), "missing.mrcs"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(written, change, message):
    rewritten(written, change)
    with pytest.raises(InputError, match=message):
        star.read_particles(written)


@pytest.mark.parametrize("content", [b"", b"not a star file\n", bytes(range(256))])
def test_what_is_no_star_file_is_refused(tmp_path, content):
    path = tmp_path / "a.star"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.star"):
        star.read_particles(path)


@pytest.mark.parametrize("keep", [-40, 1024, 100, 0])
def test_a_truncated_stack_is_refused(written, keep):
    stack = written.with_suffix(".mrcs")
    stack.write_bytes(stack.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"particles\.mrcs"):
        star.read_particles(written)


def test_angles_that_are_no_numbers_are_refused(written):
    def change(blocks):
        blocks["particles"]["rlnAngleRot"] = "north"

    with pytest.raises(InputError, match=r"particles\.star"):
        star.read_particles(rewritten(written, change))


@pytest.mark.parametrize(
    ("name", "images", "q", "options", "message"),
    [
        ("a.txt", IMAGES, Q, {}, r"\.star"),
        ("a.star", IMAGES, Q[:5], {}, "6 images but 5"),
        ("a.star", IMAGES[:0], Q[:0], {}, "at least one"),
        ("a.star", IMAGES[0], Q, {}, r"\(n, size, size\)"),
        ("a.star", IMAGES, Q, {"shifts_px": SHIFTS[:3]}, "shifts_px"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, images, q, options, message):
    with pytest.raises(InputError, match=message):
        star.write_particles(tmp_path / name, images, q, pixel_size_angstrom=1.0, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_particles(written, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(starfile, "write", fail)
    before = written.read_bytes()
    with pytest.raises(OSError, match="disk full"):
        star.write_particles(written, IMAGES, -Q, pixel_size_angstrom=9.0)
    assert written.read_bytes() == before
