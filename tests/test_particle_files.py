import copy
import dataclasses
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec

import gemmi
import mrcfile
import numpy as np
import numpy.lib.recfunctions
import pandas as pd
import pytest
import starfile
from particle_files import (
    DEFOCUS,
    HALF_SET,
    IMAGES,
    PIXEL,
    SHIFTS,
    Q,
    cryosparc,
    in_memory,
    relion30,
    relion31,
)

from cryoem import (
    ParticleStack,
    density,
    fourier,
    imaging,
    project,
    read_density,
    read_particles,
    rotations,
    simulate,
    write_density,
    write_particles,
)
from cryoem.cli.opening import open_oriented
from cryoem.errors import InputError, StorageError, UnusableImages
from cryoem.half_sets import particles_of
from cryoem.io import files, star
from cryoem.io.stacks import ImageStack
from cryoem.particles import CtfParameters


@pytest.fixture
def written(tmp_path):
    return relion31(tmp_path)


def rewritten(path, change):
    """The file with its blocks changed by ``change``, as RELION 3.1 again."""
    blocks = starfile.read(path, always_dict=True)
    for name, block in blocks.items():
        if isinstance(block, dict):
            blocks[name] = pd.DataFrame([block])
    change(blocks)
    starfile.write(blocks, path, overwrite=True)
    return path


# --------------------------------------------------------------------------------------
# Round trips


def test_particles_round_trip(written):
    back = read_particles(written)
    np.testing.assert_array_equal(back.images, IMAGES)
    # Every digit is written: what is lost is lost in the angles' arithmetic.
    assert rotations.distance(back.quaternions, Q).max() < 1e-13
    np.testing.assert_allclose(back.shifts_px, SHIFTS, atol=1e-14)
    assert back.pixel_size_angstrom == PIXEL and back.box_px == 12 and len(back) == 6
    assert list(back.half_set) == HALF_SET
    np.testing.assert_array_equal(back.ctf(), in_memory().ctf())


def test_the_file_is_relions(written):
    blocks = starfile.read(written)
    optics, particles = blocks["optics"].iloc[0], blocks["particles"]
    assert optics["rlnImagePixelSize"] == PIXEL
    assert optics["rlnImageSize"] == 12 and optics["rlnImageDimensionality"] == 2
    assert list(particles["rlnImageName"]) == [f"{i:06d}@particles.mrcs" for i in range(1, 7)]
    np.testing.assert_array_equal(
        particles[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]], rotations.to_relion(Q)
    )
    assert set(particles["rlnOpticsGroup"]) == {1}


def test_the_stack_is_a_stack(written):
    with mrcfile.open(written.with_suffix(".mrcs")) as mrc:
        assert mrc.is_image_stack() and int(mrc.header.mode) == 2
        assert float(mrc.voxel_size.x) == pytest.approx(PIXEL, rel=1e-5)


def test_optics_and_ctf_round_trip(tmp_path):
    microscope = {"voltage_kv": 200.0, "spherical_aberration_mm": 1.4, "amplitude_contrast": 0.07}
    back = read_particles(relion31(tmp_path, **microscope))
    wanted = imaging.ctf(12, PIXEL, *DEFOCUS.values(), **microscope)
    np.testing.assert_array_equal(back.ctf(), wanted)
    np.testing.assert_array_equal(back.ctf(slice(2, 4)), wanted[2:4])
    np.testing.assert_array_equal(back.ctf(np.array([5, 0])), wanted[[5, 0]])


def test_phase_shift_and_b_factor_enter_the_ctf(written):
    def change(blocks):
        blocks["particles"] = blocks["particles"].assign(rlnPhaseShift=90.0, rlnCtfBfactor=50.0)

    back = read_particles(rewritten(written, change))
    wanted = imaging.ctf(
        12, PIXEL, *DEFOCUS.values(), phase_shift_degrees=90.0, b_factor_angstrom2=50.0
    )
    np.testing.assert_allclose(back.ctf(), wanted, atol=1e-6)


def test_without_defocus_there_is_no_ctf(written):
    def change(blocks):
        blocks["particles"] = blocks["particles"].drop(columns=[*DEFOCUS])

    assert read_particles(rewritten(written, change)).ctf() is None


@pytest.mark.parametrize("other", [relion30, cryosparc, lambda f: cryosparc(f, passthrough=True)])
def test_the_same_particles_of_every_kind_are_equal(written, tmp_path, other):
    new, old = read_particles(written), read_particles(other(tmp_path))
    np.testing.assert_array_equal(old.images, new.images)
    # .cs keeps single precision: 1e-7 of an angle of pi.
    assert rotations.distance(old.quaternions, new.quaternions).max() < 1e-6
    np.testing.assert_allclose(old.shifts_px, new.shifts_px, atol=1e-6)
    assert old.pixel_size_angstrom == pytest.approx(new.pixel_size_angstrom, abs=1e-9)
    np.testing.assert_array_equal(old.half_set, new.half_set)
    np.testing.assert_allclose(old.ctf(), new.ctf(), atol=1e-4)


@pytest.mark.parametrize("kind", [relion30, cryosparc])
def test_what_came_otherwise_is_written_as_relion_31(written, tmp_path, kind):
    particles = read_particles(kind(tmp_path))
    write_particles(tmp_path / "new.star", particles)
    blocks = starfile.read(tmp_path / "new.star", always_dict=True)
    assert set(blocks) == {"optics", "particles"}
    assert "rlnOriginXAngst" in blocks["particles"] and "rlnOriginX" not in blocks["particles"]
    assert blocks["optics"]["rlnVoltage"].iloc[0] == 300
    back = read_particles(tmp_path / "new.star")
    np.testing.assert_array_equal(back.quaternions, particles.quaternions)
    np.testing.assert_array_equal(back.shifts_px, particles.shifts_px)
    np.testing.assert_array_equal(back.ctf(), particles.ctf())


def test_what_cryosparc_alone_knows_is_kept(written, tmp_path):
    table = read_particles(cryosparc(tmp_path)).columns
    assert list(table["uid"]) == [5, 3, 9, 1, 7, 11]
    assert list(table["blob/shape"]) == ["12,12"] * 6


def test_a_passthrough_of_other_particles_is_left_alone(written, tmp_path):
    path = cryosparc(tmp_path, passthrough=True)
    beside = tmp_path / "J1_passthrough_particles.cs"
    data = np.load(beside)
    data["uid"][0] = 1000
    with beside.open("wb") as file:
        np.save(file, data)
    with pytest.raises(InputError, match="blob/path"):
        read_particles(path)


def saved(path, data):
    with path.open("wb") as file:
        np.save(file, data)


def test_of_passthrough_files_those_with_the_particles_are_read(written, tmp_path):
    path = cryosparc(tmp_path, passthrough=True)
    data = np.load(tmp_path / "J1_passthrough_particles.cs")
    saved(tmp_path / "J1_passthrough_particles_excluded.cs", data[:0])
    other = data.copy()
    other["uid"] += 1000
    saved(tmp_path / "J1_passthrough_particles_other.cs", other)
    saved(tmp_path / "J1_passthrough_same.cs", data[::-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_particles(path).images[:], IMAGES)
    some = data.copy()
    some["uid"][:2] += 1000
    some["ctf/df1_A"] += 1
    saved(tmp_path / "J1_passthrough_some.cs", some)
    says = r"J1_passthrough_some\.cs: not used: it holds 4 of the 6 particles"
    with pytest.warns(UserWarning, match=says):
        read_particles(path)


@pytest.mark.parametrize(("field", "refused"), [("ctf/df1_A", True), ("ctf/exp_group_id", False)])
def test_passthrough_files_that_contradict_each_other_are_refused(
    written, tmp_path, field, refused
):
    path = cryosparc(tmp_path, passthrough=True)
    data = np.load(tmp_path / "J1_passthrough_particles.cs")
    data[field][2] += 1
    saved(tmp_path / "J1_passthrough_others.cs", data)
    if not refused:  # nothing comes of it
        read_particles(path)
        return
    says = rf"J1_particles\.cs: J1_passthrough_others\.cs and J1_passthrough_particles\.cs.*{field}"
    with pytest.raises(InputError, match=says):
        read_particles(path)


@pytest.mark.parametrize("field", ["alignments3D/psize_A", "blob/psize_A"])
@pytest.mark.parametrize("value", [0, np.nan, -3.67, np.inf])
def test_an_alignment_without_pixels_is_refused(written, tmp_path, value, field):
    path = cryosparc(tmp_path)
    data = np.load(path)
    data[field][2] = value
    if field == "blob/psize_A":
        fields = [name for name in data.dtype.names if name != "alignments3D/psize_A"]
        data = np.lib.recfunctions.repack_fields(data[fields])
    saved(path, data)
    says = rf"J1_particles\.cs: row 3, field {field}: got {value:g}, wanted"
    with pytest.raises(InputError, match=says):
        read_particles(path)


def test_where_nothing_was_shifted_no_pixels_are_wanted(written, tmp_path):
    path = cryosparc(tmp_path)
    data = np.load(path)
    data["alignments3D/psize_A"][:3], data["alignments3D/shift"][:3] = 0, 0
    saved(path, data)
    back = read_particles(path)
    np.testing.assert_array_equal(back.shifts_px[:3], 0)
    assert np.abs(back.shifts_px[3:]).max() > 0


def test_an_optics_group_may_stand_there_twice_alike(written):
    """As scripts that join files leave it."""
    before = read_particles(written)

    def change(blocks):
        blocks["optics"] = blocks["optics"].iloc[[0, 0]]

    rewritten(written, change)
    back = read_particles(written)
    np.testing.assert_array_equal(back.optics_group, before.optics_group)
    np.testing.assert_array_equal(back.ctf(), before.ctf())


@pytest.mark.parametrize("field", ["ctf/df1_A", "blob/path", "ctf/exp_group_id", None])
def test_a_particle_that_a_passthrough_holds_twice_is_told_alike(written, tmp_path, field):
    path = cryosparc(tmp_path, passthrough=True)
    beside = tmp_path / "J1_passthrough_particles.cs"
    data = np.load(beside)
    other = data[[2, 4]].copy()
    if field is not None:
        other[field][1] = b"other.mrcs" if field == "blob/path" else other[field][1] + 1
    saved(beside, np.concatenate([data, other]))
    if field in (None, "ctf/exp_group_id"):  # nothing comes of it
        np.testing.assert_array_equal(read_particles(path).images[:], IMAGES)
        return
    says = rf"passthrough_particles\.cs: rows 5 and 8 give different values of {field} to one.* 9;"
    with pytest.raises(InputError, match=says):
        read_particles(path)


@pytest.mark.parametrize("passthrough", [False, True])
def test_a_cryosparc_text_that_no_star_file_can_hold_is_refused(written, tmp_path, passthrough):
    names = np.array([b"m.mrc", b"a\nb.mrc", *[b"m.mrc"] * 4])
    more = {"location/micrograph_path": (names, "S16")}
    path = cryosparc(tmp_path, passthrough=passthrough, more=more)
    says = r"J1_particles\.cs: field location/micrograph_path, row 2: 'a\\nb\.mrc' cannot stand"
    with pytest.raises(InputError, match=says):
        read_particles(path)


def test_the_places_of_cryosparcs_particles_are_relions(written, tmp_path):
    more = {
        "location/micrograph_path": (np.full(6, b"m.mrc"), "S8"),
        "location/center_x_frac": (np.linspace(0, 0.5, 6), "f4"),
        "location/center_y_frac": (np.linspace(0.5, 1, 6), "f4"),
        "location/micrograph_shape": (np.full((6, 2), [4000, 6000]), ("u4", (2,))),
    }
    found = read_particles(cryosparc(tmp_path, more=more)).columns
    np.testing.assert_allclose(found["rlnCoordinateX"], np.linspace(0, 3000, 6), rtol=1e-6)
    np.testing.assert_allclose(found["rlnCoordinateY"], np.linspace(2000, 4000, 6), rtol=1e-6)
    assert set(found["rlnMicrographName"]) == {"m.mrc"}


@pytest.mark.parametrize("kind", ["cs", "star"])
def test_a_stack_that_relion_would_take_for_a_volume_is_marked(written, tmp_path, kind):
    mrcfile.write(tmp_path / "particles.mrc", IMAGES)
    mrcfile.write(tmp_path / "one.mrc", IMAGES[3])

    def change(blocks):
        names = [f"{i + 1:06d}@particles.mrc" for i in range(6)]
        blocks["particles"]["rlnImageName"] = [*names[:3], "one.mrc", *names[4:]]

    if kind == "star":
        path = rewritten(written, change)
    else:
        path = cryosparc(tmp_path, stack=b">particles.mrc")
    stack = read_particles(path)
    write_particles(tmp_path / "new.star", stack)
    told = list(starfile.read(tmp_path / "new.star")["particles"]["rlnImageName"])
    assert told[0] == "000001@particles.mrc:mrcs"
    assert told[3] == ("one.mrc" if kind == "star" else "000004@particles.mrc:mrcs")
    back = read_particles(tmp_path / "new.star")
    np.testing.assert_array_equal(back.images[:], IMAGES)
    np.testing.assert_array_equal(back.columns["rlnImageName"], stack.columns["rlnImageName"])
    write_particles(tmp_path / "again.star", back)
    assert list(starfile.read(tmp_path / "again.star")["particles"]["rlnImageName"]) == told


def two_groups(blocks):
    first = blocks["optics"]
    blocks["optics"] = pd.concat([first, first.assign(rlnOpticsGroup=7, rlnVoltage=200.0)])
    blocks["particles"]["rlnOpticsGroup"] = [7, 1, 1, 7, 1, 1]


def test_each_optics_group_has_its_microscope(written):
    back = read_particles(rewritten(written, two_groups))
    np.testing.assert_array_equal(back.ctf_parameters.voltage_kv, [200, 300, 300, 200, 300, 300])


def test_groups_of_a_relion_30_file_follow_its_rows(written, tmp_path):
    path = relion30(tmp_path)

    def change(blocks):
        blocks[""]["rlnVoltage"] = [200, 300, 300, 200, 300, 300]

    back = read_particles(rewritten(path, change))
    np.testing.assert_array_equal(back.ctf_parameters.voltage_kv, [200, 300, 300, 200, 300, 300])
    assert list(back.columns["rlnOpticsGroup"]) == [1, 2, 2, 1, 2, 2]
    assert list(back.optics_group) == [0, 1, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("own", "numbers", "groups", "names"),
    [
        ([4, 2, 4, 2, 9, 9], [4, 2, 4, 2, 9, 9], [4, 2, 9], ["4", "2", "9"]),
        ([1, 1, 1, 2, 2, 2], [1, 3, 3, 2, 4, 4], [1, 3, 2, 4], ["1", "1_3", "2", "2_4"]),
    ],
)
def test_groups_that_a_relion_30_file_has_are_kept(written, tmp_path, own, numbers, groups, names):
    def change(blocks):
        blocks[""]["rlnOpticsGroup"] = own
        blocks[""]["rlnVoltage"] = [200, 300, 300, 200, 300, 300]
        if own[0] == 4:
            blocks[""]["rlnVoltage"] = [200, 300, 200, 300, 200, 200]

    back = read_particles(rewritten(relion30(tmp_path), change))
    assert list(back.columns["rlnOpticsGroup"]) == numbers
    optics = back.origin.optics
    assert list(optics["rlnOpticsGroup"]) == groups
    assert list(optics["rlnOpticsGroupName"]) == [f"opticsGroup{name}" for name in names]
    wanted = [200, 300, 200, 300, 200, 200] if own[0] == 4 else [200, 300, 300, 200, 300, 300]
    np.testing.assert_array_equal(back.ctf_parameters.voltage_kv, wanted)


STRANGE = """# version 30001

data_general

_rlnCoarse  1
_myNote  'kept as it is'

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnImagePixelSize #3
_rlnUnknown #4
1 first 3.67 007
2 unused 1.5 x

data_particles

loop_
_myScore #1
_rlnImageName #2
_rlnGroupName #3
_rlnOpticsGroup #4
_myText #5
1e-12 000003@particles.mrcs 0012 1 "two words"
0.123456789012345 000001@particles.mrcs 0013 1 #7
-5 000003@particles.mrcs 0014 1 "it's"

data_empty

loop_
_a #1
_b #2

"""


def test_every_row_column_and_block_is_kept_in_order(written, tmp_path):
    source = tmp_path / "strange.star"
    source.write_text(STRANGE.replace("#7", "a#7").replace("two words", "zwei Wörter"), "utf-8")
    particles = read_particles(source)
    assert particles.quaternions is None
    new = tmp_path / "new.star"
    oriented = particles.with_poses(Q[:3]).with_columns({"cryoemResidualRad": [0.1, 0.2, 0.3]})
    assert write_particles(new, oriented) is None
    text = new.read_text("utf-8")
    assert "_myNote  'kept as it is'" in text and "data_empty" in text
    blocks = {b.name: b for b in gemmi.cif.read_string(text.replace("ö", "oe"))}
    loop = blocks["particles"].find_loop("_myScore").get_loop()
    assert loop.tags == [
        *("_myScore", "_rlnImageName", "_rlnGroupName", "_rlnOpticsGroup", "_myText"),
        *("_cryoemResidualRad", "_rlnAngleRot", "_rlnAngleTilt", "_rlnAnglePsi"),
    ]
    assert list(loop.values)[:5] == [
        "1e-12",
        "000003@particles.mrcs",
        "0012",
        "1",
        '"zwei Woerter"',
    ]
    assert list(loop.values)[9:14] == ["0.123456789012345", *loop.values[10:12], "1", "a#7"]
    assert [loop.values[i] for i in (18, 20, 22)] == ["-5.0", "0014", "it's"]
    optics = blocks["optics"].find_loop("_rlnUnknown").get_loop()
    assert list(optics.values)[:4] == ["1", "first", "3.67", "007"] and optics.length() == 2
    again = read_particles(new)
    assert rotations.distance(again.quaternions, Q[:3]).max() < 1e-13
    np.testing.assert_array_equal(again.images, IMAGES[[2, 0, 2]])
    assert list(again.columns["myText"]) == ["zwei Wörter", "a#7", "it's"]
    # What was read and is written again does not change any more.
    write_particles(tmp_path / "again.star", again)
    assert (tmp_path / "again.star").read_text("utf-8") == text


#: Names that a reader of STAR files may take for something else.
NASTY = (
    *("data_1/a.mrc", "data_", "DATA_x", "loop_", "loop_a", "save_a", "stop_", "global_"),
    *("_a", "#a", "#", "$a", ";a", ";", "[", "]a", "'", '"', "'a", '"a', "a'", 'a"', "''", '""'),
    *("a b", " a", "a ", "a\tb", "it's", "it's a 'b'", 'a "b" c', "\"'", "'a' \"b\"", "\"a 'b'c"),
    *("", "?", ".", "None", "nan", "1e5x", "007", "a#b", "a;b", "a,b", "a@b", "\\", "%20", "%"),
    *("Wörter", "名前 a", "a\xa0b", "a\u2028b", "\ufeffa", "\x85", "data_ö"),
)


@pytest.mark.parametrize("name", NASTY, ids=ascii)
def test_any_name_that_is_written_is_read(written, tmp_path, name):
    texts = np.array([name, "plain", name, name, name, "plain"], object)
    columns = {"myFirst": texts, **read_particles(written).columns, "myLast": texts}
    particles = dataclasses.replace(read_particles(written), columns=columns)
    write_particles(tmp_path / "a.star", particles)
    back = read_particles(tmp_path / "a.star")
    assert list(back.columns) == list(columns) and len(back) == 6
    for column in ("myFirst", "myLast"):
        assert list(back.columns[column]) == list(texts)
    if name.isascii():  # a reader of CIF takes it for the same
        block = gemmi.cif.read_file(str(tmp_path / "a.star")).find_block("particles")
        for column in ("_myFirst", "_myLast"):
            values = map(gemmi.cif.as_string, block.find_values(column))
            assert list(values) == ["" if t in "?." else t for t in texts]


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\0b", "\x0b", "\ud800", "a\" b' c"], ids=ascii)
def test_a_name_that_no_file_can_hold_is_refused(written, tmp_path, name):
    particles = read_particles(written).with_columns({"myName": ["a", name, *"bcde"]})
    with pytest.raises(InputError, match=r"a\.star: data_particles: column myName, row 2: .*stand"):
        write_particles(tmp_path / "a.star", particles)
    assert not (tmp_path / "a.star").exists()


@pytest.mark.parametrize(
    ("name", "texts", "kind"),
    [
        ("rlnGroupName", ["1.10", "1.1", "1e3", "1000", "2.0", "2"], "O"),
        ("rlnMicrographName", ["1.10", "1.1", "7", "007", "+7", "7."], "O"),
        ("rlnCtfImage", ["1", "2", "3", "4", "5", "6"], "O"),
        ("myLabel", ["1.10", "1.1", "1.2", "1.3", "1.4", "1.5"], "O"),
        ("myLabel", ["2.0", "2", "2.5", "3", "4", "5"], "O"),
        ("myLabel", ["0.1234567890123456789", "1.5", "2.5", "3.5", "4.5", "5.5"], "O"),
        ("uid", [str(2**64 - 1), str(2**63), "1", "2", "3", "4"], "u"),
        ("uid", [str(2**63), "-1", "1", "2", "3", "4"], "O"),
        ("uid", [str(2**64), "0", "1", "2", "3", "4"], "O"),
        ("myScore", ["0.5", "1e-12", "-2.25", "3.0", "1e+20", "0.1"], "f"),
    ],
)
def test_a_column_stays_as_it_stands_whatever_it_looks_like(written, tmp_path, name, texts, kind):
    lines = written.read_text().replace("#11\n", f"#11\n_{name} #12\n").split("\n")
    rows = iter(texts)
    lines = [f"{line}\t{next(rows)}" if "@" in line else line for line in lines]
    written.write_text("\n".join(lines))
    stack = read_particles(written)
    assert stack.columns[name].dtype.kind == kind
    for part, wanted in ((stack, texts), (stack.select(slice(2)), texts[:2])):
        write_particles(tmp_path / "new.star", part)
        found = columns_of((tmp_path / "new.star").read_text())["particles"][f"_{name}"]
        assert found == wanted


def test_decimals_of_relions_columns_are_numbers(written):
    text = written.read_text().replace("#11\n", "#11\n_rlnNormCorrection #12\n_cryoemScore #13\n")
    written.write_text(re.sub(r"(?m)^(\d+@.*)$", "\\1\t0.770000\t1.50", text))
    found = read_particles(written).columns
    assert (
        list(found["rlnNormCorrection"]) == [0.77] * 6 and list(found["cryoemScore"]) == [1.5] * 6
    )


@pytest.mark.parametrize("head", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_rows_are_read_as_relion_reads_them(written, head, end):
    names = ["data_1/a.mrc", "loop_", "save_a", "_a", "$a", "#a"]
    more = ["'a b'", "a'b", "'it's a'", '"', "[a]", ";a"]
    text = """
data_particles

loop_
_myFirst #1
_rlnImageName #2
_rlnImagePixelSize
_myLast #4 what it is
_myText #5
"""
    for i, (name, other) in enumerate(zip(names, more, strict=True)):
        text += f"{name} {i + 1}@particles.mrcs  1.5\t{name} {other}  {'# a note' * (i == 1)}\n"
    text += "\n# the end\n\ndata_more\n\n_a 'data_ b'\n"
    written.write_bytes(head + end.join(text.encode().split(b"\n")))
    found = read_particles(written)
    assert len(found) == 6 and found.pixel_size_angstrom == 1.5
    assert list(found.columns["myFirst"]) == list(found.columns["myLast"]) == names
    assert list(found.columns["myText"]) == ["a b", "a'b", "it's a", '"', "[a]", ";a"]
    assert found.origin.other_blocks == ("data_more\n\n_a 'data_ b'\n",)


def test_the_images_are_never_read_for_writing(written, tmp_path, monkeypatch):
    particles = read_particles(written)
    monkeypatch.setattr(ImageStack, "_read", None)
    write_particles(tmp_path / "new.star", particles.with_poses(Q[::-1], -SHIFTS))
    back = read_particles(tmp_path / "new.star")
    assert rotations.distance(back.quaternions, Q[::-1]).max() < 1e-13
    np.testing.assert_allclose(back.shifts_px, -SHIFTS, atol=1e-14)
    assert list(back.columns) == list(particles.columns)


# --------------------------------------------------------------------------------------
# What is written of a file that was read

RELIONS = """# version 30001

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnVoltage #3
_rlnSphericalAberration #4
_rlnAmplitudeContrast #5
_rlnImagePixelSize #6
_rlnImageSize #7
_rlnMtfFileName #8
_rlnBeamTiltX #9
_myNumber #10
7 first 300 2.7 0.1 3.67 12 "a b.star" 0.0012 007
3 second 200 2.7 0.1 3.6701 12 - -0.5 08

data_particles

loop_
_rlnCoordinateX #1
_rlnImageName #2
_rlnAngleRot #3
_rlnAngleTilt #4
_rlnAnglePsi #5
_rlnRandomSubset #6
_rlnDefocusV #7
_rlnDefocusU #8
_rlnOpticsGroup #9
_rlnOriginYAngst #10
_rlnOriginXAngst #11
_rlnGroupName #12
_rlnAngleTiltPrior #13
_cryoemContrast #14
120.5 000004@particles.mrcs 370.0 90.0 -190.0 2 12000 11000 3 1.1 -0.3 007 12.5 1.01
3.0 1@particles.mrcs -12.34567 -40.0 725.0 1 13000 14000 7 -0.7 10.123456 1_000 0.0 0.9
7.25 000002@particles.mrcs 0.1 180.0 0.1 1 9000 9000 3 0.0 2.2 x -3.0 1.0

"""


def columns_of(text):
    return {
        block.name: {
            tag: list(item.loop.values)[i :: item.loop.width()]
            for item in block
            for i, tag in enumerate(item.loop.tags)
        }
        for block in gemmi.cif.read_string(text)
    }


@pytest.fixture
def relions(written):
    path = written.with_name("relions.star")
    path.write_text(RELIONS)
    return path


def test_what_nothing_has_changed_is_written_as_it_stands(relions, tmp_path):
    new = tmp_path / "new.star"
    write_particles(new, read_particles(relions))
    before, after = columns_of(RELIONS), columns_of(new.read_text())
    assert after["particles"] == before["particles"]
    assert list(after["particles"]) == list(before["particles"])  # in this order
    assert after["optics"].pop("_rlnImageDimensionality") == ["2", "2"]
    assert after["optics"] == before["optics"]
    write_particles(tmp_path / "again.star", read_particles(new))
    assert (tmp_path / "again.star").read_text() == new.read_text()


def test_some_rows_are_written_as_they_stand(relions, tmp_path):
    new = tmp_path / "new.star"
    write_particles(new, read_particles(relions).select(np.array([2, 0])))
    before, after = columns_of(RELIONS)["particles"], columns_of(new.read_text())["particles"]
    assert after == {name: [values[2], values[0]] for name, values in before.items()}


def test_only_what_has_changed_is_written_anew(relions, tmp_path):
    stack, new = read_particles(relions), tmp_path / "new.star"
    half_set, contrast = [1, 2, 2], [2.0, 3.0, 4.0]
    write_particles(
        new, stack.replace(half_set=half_set, contrast=contrast).with_poses(Q[:3], SHIFTS[:3])
    )
    before, after = columns_of(RELIONS)["particles"], columns_of(new.read_text())["particles"]
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {
        *("_rlnAngleRot", "_rlnAngleTilt", "_rlnAnglePsi", "_rlnOriginXAngst", "_rlnOriginYAngst"),
        *("_rlnRandomSubset", "_cryoemContrast"),
    }
    back = read_particles(new)
    assert rotations.distance(back.quaternions, Q[:3]).max() < 1e-13
    np.testing.assert_allclose(back.shifts_px, SHIFTS[:3], atol=1e-14)
    np.testing.assert_array_equal(back.half_set, half_set)
    np.testing.assert_array_equal(back.contrast, contrast)


def test_what_a_stack_has_forgotten_is_not_written(relions, tmp_path):
    new = tmp_path / "new.star"
    blind = read_particles(relions).without_poses().replace(half_set=None, ctf_parameters=None)
    write_particles(new, blind)
    back = read_particles(new)
    for name in ("quaternions", "half_set", "contrast", "ctf_parameters", "expected_error_rad"):
        assert getattr(back, name) is None
    assert not back.shifts_px.any()
    assert list(back.columns["rlnGroupName"]) == ["007", "1_000", "x"]


def test_a_file_without_origins_gets_none(written, tmp_path):
    def change(blocks):
        origins = ["rlnOriginXAngst", "rlnOriginYAngst"]
        blocks["particles"] = blocks["particles"].drop(columns=origins)

    back = read_particles(rewritten(written, change))
    write_particles(tmp_path / "new.star", back)
    assert list(read_particles(tmp_path / "new.star").columns) == list(back.columns)
    write_particles(tmp_path / "new.star", back.with_poses(Q, SHIFTS))
    np.testing.assert_allclose(read_particles(tmp_path / "new.star").shifts_px, SHIFTS, atol=1e-14)


def test_a_ctf_that_becomes_known_is_written(written, tmp_path):
    def change(blocks):
        blocks["particles"] = blocks["particles"].drop(columns=[*DEFOCUS])

    bare = read_particles(rewritten(written, change))
    assert bare.ctf_parameters is None
    parameters = CtfParameters(
        *DEFOCUS.values(), voltage_kv=200.0, phase_shift_degrees=np.linspace(0, 50, 6)
    )
    write_particles(tmp_path / "new.star", bare.replace(ctf_parameters=parameters))
    back = read_particles(tmp_path / "new.star")
    np.testing.assert_array_equal(back.ctf(), parameters.values(12, PIXEL))
    assert "rlnVoltage" not in back.columns and list(back.origin.optics["rlnVoltage"]) == [200]


def test_what_an_optics_group_says_is_said_again_only_where_it_has_changed(written, tmp_path):
    def change(blocks):
        blocks["optics"] = blocks["optics"].assign(rlnPhaseShift=90.0)

    stack, new = read_particles(rewritten(written, change)), tmp_path / "new.star"
    np.testing.assert_array_equal(stack.ctf_parameters.phase_shift_degrees, [90] * 6)
    write_particles(new, stack)
    assert "rlnPhaseShift" not in read_particles(new).columns
    other = CtfParameters(*DEFOCUS.values(), phase_shift_degrees=np.linspace(0, 50, 6))
    write_particles(new, stack.replace(ctf_parameters=other))
    np.testing.assert_array_equal(read_particles(new).ctf(), other.values(12, PIXEL))


@pytest.mark.parametrize("in_a_file", [False, True])
def test_each_group_of_a_new_stack_has_its_microscope(written, tmp_path, in_a_file):
    stack = read_particles(written) if in_a_file else in_memory()
    group, voltage = np.array([1, 0, 0, 1, 0, 1]), np.array([200.0, 300, 300, 200, 300, 200])
    mixed = stack.replace(ctf_parameters=CtfParameters(*DEFOCUS.values(), voltage_kv=voltage))
    new = tmp_path / "new.star"
    with pytest.raises(InputError, match=r"new\.star: row 2: rlnVoltage is 300, and 200"):
        write_particles(new, mixed)
    if in_a_file:  # whose one group is all that its table has
        with pytest.raises(InputError, match=r"new\.star: optics_group 1 of 1"):
            write_particles(new, mixed.replace(optics_group=group))
        return
    write_particles(new, mixed.replace(optics_group=group))
    back = read_particles(new)
    np.testing.assert_array_equal(back.ctf_parameters.voltage_kv, voltage)
    np.testing.assert_array_equal(back.optics_group, group)
    assert list(back.origin.optics["rlnVoltage"]) == [300, 200]


def test_a_pixel_size_that_was_corrected_is_written(written, tmp_path):
    better = read_particles(written).replace(pixel_size_angstrom=3.5)
    write_particles(tmp_path / "new.star", better)
    back = read_particles(tmp_path / "new.star")
    assert back.pixel_size_angstrom == 3.5
    np.testing.assert_allclose(back.shifts_px, SHIFTS, atol=1e-14)


def test_a_pixel_size_that_every_row_says_follows(written, tmp_path):
    stack = read_particles(rewritten(written, put("particles", "rlnImagePixelSize", PIXEL)))
    write_particles(tmp_path / "as_is.star", stack)
    write_particles(tmp_path / "new.star", stack.replace(pixel_size_angstrom=3.5))
    for name, pixel in (("as_is", PIXEL), ("new", 3.5)):
        back = read_particles(tmp_path / f"{name}.star")
        assert back.pixel_size_angstrom == pixel
        np.testing.assert_array_equal(back.columns["rlnImagePixelSize"], [pixel] * 6)


@pytest.mark.parametrize("box", [12, 8])
def test_images_that_were_changed_are_written_beside(relions, tmp_path, box):
    # As preprocessing does: cropped and inverted, then brought to fewer pixels.
    stack = read_particles(relions)
    images = -imaging.crop(stack.images[:], box)
    small = imaging.downsample(images, box // 2)
    for made, pixel in ((images, None), (small, 2 * 3.6701)):
        new = tmp_path / "new.star"
        changed = stack.with_images(made, pixel_size_angstrom=pixel)
        assert write_particles(new, changed) == tmp_path / "new.mrcs"
        back = read_particles(new)
        np.testing.assert_array_equal(back.images, made)
        assert back.box_px == made.shape[1]
        assert list(back.origin.optics["rlnImageSize"]) == [made.shape[1]] * 2
        assert back.pixel_size_angstrom == changed.pixel_size_angstrom
        assert list(back.columns["rlnImageName"]) == [f"{i:06d}@new.mrcs" for i in (1, 2, 3)]
        with mrcfile.open(tmp_path / "new.mrcs") as mrc:
            assert float(mrc.voxel_size.x) == pytest.approx(pixel or 3.6701, rel=1e-6)
        # All else is what it was; origins are in angstrom, and stay.
        assert rotations.distance(back.quaternions, stack.quaternions).max() < 1e-13
        origins = [back.columns[name] for name in ("rlnOriginXAngst", "rlnOriginYAngst")]
        np.testing.assert_allclose(origins, [[-0.3, 10.123456, 2.2], [1.1, -0.7, 0]], atol=1e-12)
        assert list(back.columns) == list(stack.columns)
        np.testing.assert_array_equal(back.ctf_parameters.voltage_kv, [200, 300, 200])
        assert list(back.columns["rlnGroupName"]) == ["007", "1_000", "x"]
    # The stack that the first file names is as it was.
    np.testing.assert_array_equal(read_particles(relions).images, stack.images[:])


def test_images_of_another_file_are_named_there(written, tmp_path):
    (tmp_path / "b").mkdir()
    write_particles(tmp_path / "b" / "other.star", in_memory().replace(images=-IMAGES))
    other = read_particles(tmp_path / "b" / "other.star").select(np.array([3, 1, 5, 0, 0, 2]))
    exchanged = read_particles(written).with_images(other.images)
    assert write_particles(tmp_path / "new.star", exchanged) is None
    back = read_particles(tmp_path / "new.star")
    np.testing.assert_array_equal(back.images, -IMAGES[[3, 1, 5, 0, 0, 2]])
    assert rotations.distance(back.quaternions, Q).max() < 1e-13
    # As they are where the stack was never in a particle file.
    bare = ParticleStack(other.images, PIXEL, quaternions=Q)
    assert write_particles(tmp_path / "bare.star", bare) is None
    np.testing.assert_array_equal(read_particles(tmp_path / "bare.star").images, back.images)


def test_an_array_in_a_file_is_a_stack_of_images(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    back = read_particles(tmp_path / "images.npy")
    np.testing.assert_array_equal(back.images, IMAGES)
    np.testing.assert_array_equal(back.select(np.array([4, 2])).images, IMAGES[[4, 2]])
    assert back.pixel_size_angstrom == 1 and back.quaternions is None and back.origin is None
    # A particle file cannot name it.
    assert write_particles(tmp_path / "a.star", back) == tmp_path / "a.mrcs"
    np.testing.assert_array_equal(read_particles(tmp_path / "a.star").images, IMAGES)


def test_a_stack_is_read_as_images_alone(tmp_path):
    def stack(name, pixel, images=IMAGES):
        with mrcfile.new(tmp_path / name) as mrc:
            mrc.set_data(images)
            mrc.set_image_stack()
            mrc.voxel_size = pixel
        return tmp_path / name

    path = stack("averages.mrcs", 3.5)
    back = read_particles(path)
    np.testing.assert_array_equal(back.images, IMAGES)
    assert back.pixel_size_angstrom == pytest.approx(3.5) and back.ctf_parameters is None
    # It stays where it is, and a particle file names it.
    assert write_particles(tmp_path / "averages.star", back.with_poses(Q)) is None
    np.testing.assert_array_equal(read_particles(tmp_path / "averages.star").images, IMAGES)
    with pytest.warns(UserWarning, match=r"4 A was given and is used; the header says 3\.5"):
        assert read_particles(path, pixel_size_angstrom=4).pixel_size_angstrom == 4
    silent = stack("silent.mrcs", 0)
    with pytest.raises(InputError, match="gives no pixel size; wanted it, or --pixel-size"):
        read_particles(silent)
    assert read_particles(silent, pixel_size_angstrom=2).pixel_size_angstrom == 2
    with pytest.raises(InputError, match="wanted square images, got"):
        read_particles(stack("wide.mrcs", 3, IMAGES[:, 1:]))
    with pytest.raises(InputError, match="a map by its name; wanted particles"):
        read_particles(stack("averages.mrc", 3))


# --------------------------------------------------------------------------------------
# Where images lie


def test_rows_may_come_in_any_order(written):
    order = [5, 1, 1, 3]

    def change(blocks):
        blocks["particles"] = blocks["particles"].iloc[order]

    back = read_particles(rewritten(written, change))
    np.testing.assert_array_equal(back.images, IMAGES[order])
    assert rotations.distance(back.quaternions, Q[order]).max() < 1e-6


def test_images_may_lie_in_many_files_of_many_kinds(written, tmp_path):
    (tmp_path / "a").mkdir()
    mrcfile.write(tmp_path / "a" / "one.mrc", IMAGES[4])  # a single image
    mrcfile.write(tmp_path / "two.mrcs", np.round(10 * IMAGES[:2]).astype(np.int16))
    mrcfile.write(tmp_path / "half.mrcs", IMAGES[2:4].astype(np.float16))
    big = mrcfile.read(tmp_path / "half.mrcs").astype(np.float32)
    raw = bytearray((tmp_path / "particles.mrcs").read_bytes())
    words = np.frombuffer(raw, "<i4").copy()
    words[:56] = words[:56].byteswap()  # the header's numbers and the values, not its texts
    words[256:] = words[256:].byteswap()
    (tmp_path / "big.mrcs").write_bytes(words.tobytes())
    names = [
        *("a/one.mrc", "2@two.mrcs", "000001@half.mrcs", "1@two.mrcs"),
        *("06@big.mrcs", "1@a/one.mrc"),
    ]

    def change(blocks):
        blocks["particles"]["rlnImageName"] = names

    back = read_particles(rewritten(written, change))
    wanted = np.stack(
        [IMAGES[4], np.round(10 * IMAGES[1]), big[0], np.round(10 * IMAGES[0]), *IMAGES[[5, 4]]]
    )
    assert back.images.shape == (6, 12, 12) and len(back.images) == 6
    assert back.images[:].dtype == np.float32
    np.testing.assert_array_equal(back.images, wanted)
    np.testing.assert_array_equal(back.images[1], wanted[1])
    np.testing.assert_array_equal(back.images[-2], wanted[-2])
    np.testing.assert_array_equal(back.images[1:4], wanted[1:4])
    np.testing.assert_array_equal(back.images[np.array([4, 0, 4])], wanted[[4, 0, 4]])
    assert back.images[3:3].shape == (0, 12, 12)
    with pytest.raises(IndexError):
        back.images[6]
    # Workers are sent the stack, not its images.
    assert len(pickle.dumps(back.images)) < 5000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(back.images)), wanted)


@pytest.mark.parametrize(
    "between",
    [lambda images: images, copy.copy, copy.deepcopy, lambda i: pickle.loads(pickle.dumps(i)),
     lambda images: images.inverted().inverted()],
    ids=["nothing", "copied", "deeply", "pickled", "inverted"],
)  # fmt: skip
def test_a_part_of_a_part_of_many_files_has_its_own_images(written, tmp_path, between):
    """A stack a micrograph, as RELION writes them: parts name few of the files."""
    for i, image in enumerate(IMAGES):
        mrcfile.write(tmp_path / f"m{i}.mrcs", image[None])

    def change(blocks):
        blocks["particles"]["rlnImageName"] = [f"1@m{i}.mrcs" for i in range(len(IMAGES))]

    found, rows = read_particles(rewritten(written, change)).images, np.arange(len(IMAGES))
    for part in ([4, 1, 3, 2, 1], slice(1, 4), [2, 0, 2], slice(1, 2)):
        found, rows = between(found).select(part), rows[part]
        np.testing.assert_array_equal(found[:], IMAGES[rows])


@pytest.mark.parametrize("place", ["Refine3D/job007", "working directory"])
def test_names_are_relative_as_users_have_them(written, tmp_path, monkeypatch, place):
    folder = tmp_path / "project" / "Refine3D" / "job007"
    folder.mkdir(parents=True)
    stack = tmp_path / ("project" if place != "working directory" else "elsewhere") / "Extract"
    stack.mkdir(parents=True)
    shutil.move(written.with_suffix(".mrcs"), stack / "particles.mrcs")
    moved = shutil.move(written, folder / "particles.star")

    def change(blocks):
        blocks["particles"]["rlnImageName"] = [f"{i}@Extract/particles.mrcs" for i in range(1, 7)]

    rewritten(moved, change)
    if place == "working directory":
        monkeypatch.chdir(tmp_path / "elsewhere")
    back = read_particles(moved)
    np.testing.assert_array_equal(back.images, IMAGES)
    # What is found from the new file keeps its name, for RELION; what is not is made to be.
    write_particles(folder / "new.star", back)
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(read_particles(folder / "new.star").images, IMAGES)
    kept = read_particles(folder / "new.star").columns["rlnImageName"][0]
    assert (kept == "1@Extract/particles.mrcs") == (place != "working directory")


@pytest.mark.parametrize("kind", ["star", "cs", "written", "one image"])
def test_the_first_at_sign_of_a_name_ends_its_number(written, tmp_path, kind):
    folder = tmp_path / "7@us@er"
    folder.mkdir()
    stack = folder / "p@1.mrcs"
    shutil.copy(written.with_suffix(".mrcs"), stack)
    wanted = IMAGES
    if kind == "star":
        path = rewritten(written, names([f"{i + 1:06d}@7@us@er/p@1.mrcs" for i in range(6)]))
    elif kind == "cs":
        path = cryosparc(tmp_path, stack=b">7@us@er/p@1.mrcs")
    elif kind == "written":
        path = folder / "sim@9A.star"
        write_particles(path, in_memory())
    else:
        mrcfile.write(tmp_path / "a@1.mrc", IMAGES[0])
        mrcfile.write(folder / "b.mrc", IMAGES[1])
        path = rewritten(written, names(["a@1.mrc", "1@7@us@er/b.mrc", *["a@1.mrc"] * 4]))
        wanted = IMAGES[[0, 1, 0, 0, 0, 0]]
    particles = read_particles(path)
    np.testing.assert_array_equal(particles.images[:], wanted)
    assert len(set(particles_of(particles.columns, 6))) == (2 if kind == "one image" else 6)
    for new in (tmp_path / "new@.star", tmp_path / "elsewhere" / "new.star"):
        write_particles(new, particles)
        np.testing.assert_array_equal(read_particles(new).images[:], wanted)
        told = starfile.read(new)["particles"]["rlnImageName"]
        assert all(re.match("[0-9]+@", name) for name in told)


def test_names_lead_from_where_a_linked_folder_is(written, tmp_path):
    """A way up from it does not lead to where the link stands."""
    (tmp_path / "else" / "deep" / "scratch").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    for name in ("particles.star", "particles.mrcs"):
        (tmp_path / name).rename(tmp_path / "data" / name)
    (tmp_path / "out").symlink_to(tmp_path / "else" / "deep" / "scratch")
    write_particles(tmp_path / "out" / "new.star", read_particles(tmp_path / "data/particles.star"))
    for folder in (tmp_path / "out", tmp_path / "else" / "deep" / "scratch"):
        np.testing.assert_array_equal(read_particles(folder / "new.star").images[:], IMAGES)


def test_another_stack_of_the_same_name_is_not_taken_for_the_right_one(written, tmp_path):
    (tmp_path / "b").mkdir()
    mrcfile.write(tmp_path / "b" / "particles.mrcs", -IMAGES)
    write_particles(tmp_path / "b" / "new.star", read_particles(written))
    np.testing.assert_array_equal(read_particles(tmp_path / "b" / "new.star").images, IMAGES)


def test_fifty_gigabytes_are_opened_not_read(written):
    n, box = 195_000, 256
    stack = written.with_suffix(".mrcs")
    with mrcfile.new(stack, overwrite=True) as mrc:
        mrc.set_data(np.ones((1, box, box), np.float32))
        mrc.set_image_stack()
        mrc.header.nz = mrc.header.mz = n
    os.truncate(stack, 1024 + 4 * n * box * box)  # sparse: 51 GB that take no room
    with stack.open("r+b") as file:
        file.seek(-4 * box * box, os.SEEK_END)
        file.write(np.arange(box * box, dtype=np.float32).tobytes())

    def change(blocks):
        blocks["optics"]["rlnImageSize"] = box
        blocks["particles"]["rlnImageName"] = [f"{n - i}@particles.mrcs" for i in range(6)]

    rewritten(written, change)
    before = time.process_time()
    back = read_particles(written)
    last = back.images[0]
    assert time.process_time() - before < 1
    np.testing.assert_array_equal(last.ravel(), np.arange(box * box))


# --------------------------------------------------------------------------------------
# Conventions: each fails when a sign, a centre or an axis is flipped


def test_an_origin_is_what_centres_the_particle(written):
    # A particle 1.5 pixels to the right is centred by moving it 1.5 pixels to the left.
    first = starfile.read(written)["particles"].iloc[0]
    assert first["rlnOriginXAngst"] == pytest.approx(-1.5 * PIXEL)
    assert first["rlnOriginYAngst"] == pytest.approx(2.0 * PIXEL)


@pytest.mark.parametrize("box", [25, 26])
def test_moving_by_the_origin_brings_the_particle_to_the_centre(tmp_path, box):
    # One bright pixel, 3 right of the centre and 2 below it, and nothing else to go by.
    image = np.zeros((1, box, box), np.float32)
    image[0, box // 2 + 2, box // 2 + 3] = 1
    path = tmp_path / "a.star"
    write_particles(path, ParticleStack(image, 2.0, quaternions=Q[:1], shifts_px=[[3, 2]]))
    row = starfile.read(path)["particles"].iloc[0]
    origin = np.array([[row["rlnOriginXAngst"], row["rlnOriginYAngst"]]]) / 2.0
    back = read_particles(path)
    centred = imaging.shift(back.images[:], origin)[0]
    assert np.unravel_index(centred.argmax(), centred.shape) == (box // 2, box // 2)
    np.testing.assert_allclose(origin, -back.shifts_px)


@pytest.mark.parametrize("box", [31, 32])
def test_a_simulated_stack_projected_again_agrees(tmp_path, box):
    # Simulated exactly, at RELION's angles; read, and projected by another code path.
    phantom, voxel = density.Phantom.random(3), 6.0
    angles = np.random.default_rng(1).uniform([0, 0, 0], [360, 180, 360], (8, 3))
    q = rotations.from_relion(*angles.T)
    shifts = np.random.default_rng(2).uniform(-3, 3, (8, 2))
    clean = imaging.shift(phantom.project(q, box, voxel), shifts)
    path = tmp_path / "a.star"
    write_particles(path, ParticleStack(clean, voxel, quaternions=q, shifts_px=shifts))
    table = starfile.read(path)["particles"]
    np.testing.assert_allclose(
        table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]] % 360, angles, atol=1e-6
    )
    back = read_particles(path)

    def agreement(q, shifts):
        again = imaging.shift(project(phantom.density(box, voxel), q), shifts)
        return min(
            np.corrcoef(a.ravel(), b.ravel())[0, 1]
            for a, b in zip(again, back.images[:], strict=True)
        )

    assert agreement(back.quaternions, back.shifts_px) > 0.999
    for wrong in (
        (back.quaternions, -back.shifts_px),
        (back.quaternions, back.shifts_px[:, ::-1]),
        (rotations.inverse(back.quaternions), back.shifts_px),
        (rotations.other_hand(back.quaternions), back.shifts_px),
        (back.quaternions, back.shifts_px + 0.5),
    ):
        assert agreement(*wrong) < 0.99


#: In a process of its own: ASPIRE imports half of the field, slowly.
ASPIRE = """
import sys, numpy as np
from aspire.source import RelionSource
s = RelionSource(sys.argv[1])
images = s.images[:]
np.savez(
    sys.argv[2], images=images.asnumpy(), angles=s.angles, offsets=s.offsets,
    pixel=s.pixel_size, centred=images.shift(-s.offsets).asnumpy(),
    defocus=[[f.defocus_u, f.defocus_v, f.defocus_ang] for f in s.unique_filters],
)
"""


@pytest.mark.skipif(find_spec("aspire") is None, reason="ASPIRE is an optional extra")
def test_aspire_reads_the_same(written, tmp_path):
    out = tmp_path / "aspire.npz"
    subprocess.run([sys.executable, "-c", ASPIRE, written, out], check=True, capture_output=True)
    found = np.load(out)
    np.testing.assert_array_equal(found["images"], IMAGES)
    assert found["pixel"] == PIXEL
    # ASPIRE keeps its rotations in single precision.
    q = rotations.from_relion(*np.rad2deg(found["angles"]).T)
    assert rotations.distance(q, Q).max() < 1e-5
    np.testing.assert_allclose(found["offsets"], -SHIFTS, atol=1e-6)
    # What undoes ASPIRE's offsets is the move by our origins; below Nyquist, where both agree.
    np.testing.assert_allclose(
        fourier.low_pass(found["centred"], 2, 5),
        fourier.low_pass(imaging.shift(IMAGES, -SHIFTS), 2, 5),
        atol=1e-5,
    )
    u, v, angle = (np.array(values) for values in DEFOCUS.values())
    np.testing.assert_allclose(found["defocus"], np.stack([u, v, np.deg2rad(angle)], axis=1))


def test_one_particle_round_trips(tmp_path):
    path = tmp_path / "one.star"
    write_particles(path, in_memory().select(slice(1)))
    back = read_particles(path)
    np.testing.assert_array_equal(back.images, IMAGES[:1])
    assert rotations.distance(back.quaternions, Q[:1]).max() < 1e-13


def test_without_angles_they_are_unknown_and_without_origins_zero(written):
    def change(blocks):
        blocks["particles"] = blocks["particles"][["rlnImageName"]]

    back = read_particles(rewritten(written, change))
    assert back.quaternions is None and back.half_set is None and back.ctf_parameters is None
    assert back.contrast is None and back.expected_error_rad is None
    assert (back.shifts_px == 0).all()


def test_simulated_particles_go_through_the_file(tmp_path):
    cube = density.Phantom.random(0).density(24, 8.0)
    seen = simulate(cube, 5, 0, max_shift_px=2, defocus_range_angstrom=(1e4, 2e4))
    path = tmp_path / "a.star"
    assert write_particles(path, seen) == tmp_path / "a.mrcs"
    back = read_particles(path)
    np.testing.assert_array_equal(back.images, seen.images)
    np.testing.assert_allclose(back.shifts_px, seen.shifts_px, atol=1e-14)
    np.testing.assert_array_equal(back.ctf(), seen.ctf())


@pytest.mark.parametrize("pixel", [3.67, 1.06, 0.8321, 2.489, 13.25])
def test_a_pixel_size_goes_from_a_map_to_particles_with_its_digits_and_no_more(tmp_path, pixel):
    write_density(tmp_path / "map.mrc", density.Phantom.random(0).density(16, pixel))
    seen = simulate(read_density(tmp_path / "map.mrc"), 2, 0)
    write_particles(tmp_path / "a.star", seen)
    text = (tmp_path / "a.star").read_text()
    optics = gemmi.cif.read_string(text)["optics"]
    assert list(optics.find_values("_rlnImagePixelSize")) == [str(pixel)]
    particles = gemmi.cif.read_string(text)["particles"]
    assert list(particles.find_values("_rlnOriginXAngst")) == ["0.0", "0.0"]
    assert not {"-0", "-0.0"} & set(text.split())
    assert read_particles(tmp_path / "a.star").pixel_size_angstrom == pixel


def test_contrasts_and_expected_errors_go_through_the_file(tmp_path):
    known = in_memory().replace(
        contrast=np.linspace(0.7, 1.3, 6), expected_error_rad=np.linspace(0.01, 2, 6) / 7
    )
    write_particles(tmp_path / "a.star", known)
    table = starfile.read(tmp_path / "a.star")["particles"]
    assert {"cryoemContrast", "cryoemExpectedErrorRad"} <= set(table)
    back = read_particles(tmp_path / "a.star")
    np.testing.assert_array_equal(back.contrast, known.contrast)
    np.testing.assert_array_equal(back.expected_error_rad, known.expected_error_rad)
    # And a second time, in place of the first ones and in the same columns.
    write_particles(tmp_path / "b.star", back.replace(contrast=known.contrast[::-1]))
    again = read_particles(tmp_path / "b.star")
    np.testing.assert_array_equal(again.contrast, known.contrast[::-1])
    np.testing.assert_array_equal(again.expected_error_rad, known.expected_error_rad)
    assert list(again.columns) == list(back.columns)


# --------------------------------------------------------------------------------------
# Black on white


def test_images_are_turned_as_they_are_read(written):
    stack = read_particles(written)
    turned = stack.inverted()
    np.testing.assert_array_equal(turned.images[:], -IMAGES)
    np.testing.assert_array_equal(turned.images[2], -IMAGES[2])
    np.testing.assert_array_equal(turned.inverted().images[:], IMAGES)
    some = turned.select(np.array([4, 1]))
    np.testing.assert_array_equal(some.images[:], -IMAGES[[4, 1]])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(some.images))[:], -IMAGES[[4, 1]])
    np.testing.assert_array_equal(in_memory().inverted().images, -IMAGES)
    for flat in (
        stack.flattened(),
        in_memory().flattened(),
        in_memory().select(np.arange(len(IMAGES))).flattened(),
    ):
        np.testing.assert_allclose(flat.images[:], imaging.flatten(IMAGES), atol=1e-5)
    both = stack.inverted().flattened().select(np.array([3, 0]))
    np.testing.assert_allclose(both.images[:], -imaging.flatten(IMAGES)[[3, 0]], atol=1e-5)
    lazily = in_memory().select(np.array([3, 0])).inverted()
    np.testing.assert_array_equal(lazily.images[:], -IMAGES[[3, 0]])
    np.testing.assert_array_equal(lazily.select(slice(1)).images[:], -IMAGES[[3]])


def test_the_sign_of_images_that_stay_goes_through_the_file(written, tmp_path):
    stack = read_particles(written)
    with pytest.warns(UserWarning, match=r"a\.star: .*6 of 6 images.*cryoemSign.*RELION"):
        write_particles(tmp_path / "a.star", stack.inverted())
    blocks = starfile.read(tmp_path / "a.star")
    assert set(blocks["optics"]["cryoemSign"]) == {-1} and "cryoemSign" not in blocks["particles"]
    back = read_particles(tmp_path / "a.star")
    np.testing.assert_array_equal(back.images[:], -IMAGES)
    # Turned again, they are as they were, and nothing need be said.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_particles(tmp_path / "b.star", back.inverted())
    np.testing.assert_array_equal(read_particles(tmp_path / "b.star").images[:], IMAGES)
    # Some only: each row says it.
    signs = np.array([1, -1, 1, 1, -1, 1])
    with pytest.warns(UserWarning, match="2 of 6"):
        write_particles(tmp_path / "c.star", back.replace(images=stack.images.with_sign(signs)))
    blocks = starfile.read(tmp_path / "c.star")
    assert list(blocks["particles"]["cryoemSign"]) == list(signs)
    some = read_particles(tmp_path / "c.star")
    np.testing.assert_array_equal(some.images[:], signs[:, None, None] * IMAGES)
    # Images that are written anew are white there.
    write_particles(tmp_path / "d.star", some.with_images(some.images[:]))
    assert "cryoemSign" not in (tmp_path / "d.star").read_text()
    np.testing.assert_array_equal(read_particles(tmp_path / "d.star").images[:], some.images[:])


@pytest.mark.parametrize("signs", [[-1] * 6, [1, -1, 1, 1, 1, -1], [1] * 6])
def test_the_sign_of_cryosparcs_images_is_theirs(written, tmp_path, signs):
    path = cryosparc(tmp_path, sign=signs)
    stack = read_particles(path)
    np.testing.assert_array_equal(stack.images[:], np.array(signs)[:, None, None] * IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_particles(tmp_path / "a.star", stack)
    np.testing.assert_array_equal(read_particles(tmp_path / "a.star").images[:], stack.images[:])
    assert ("cryoemSign" in (tmp_path / "a.star").read_text()) == (-1 in signs)
    with pytest.raises(InputError, match=r"J1_particles\.cs: row 3, field blob/sign: got 0"):
        read_particles(cryosparc(tmp_path, sign=[1, 1, 0, 1, 1, 1]))


# --------------------------------------------------------------------------------------
# What was done to images, and what is not used


@pytest.mark.parametrize("block", ["optics", "particles"])
@pytest.mark.parametrize(
    ("columns", "done"),
    [
        ({}, "as seen"),
        ({"rlnCtfDataAreCtfPremultiplied": 0, "rlnCtfDataArePhaseFlipped": 0}, "as seen"),
        ({"rlnCtfDataArePhaseFlipped": 1}, "phase flipped"),
        ({"rlnCtfDataAreCtfPremultiplied": 1}, "premultiplied"),
        ({"rlnCtfDataAreCtfPremultiplied": 1, "rlnCtfDataArePhaseFlipped": 1}, "premultiplied"),
    ],
)
def test_what_was_done_to_the_images_is_in_their_ctf(written, tmp_path, block, columns, done):
    plain = read_particles(written).ctf()
    for column, value in columns.items():
        rewritten(written, put(block, column, value))
    stack = read_particles(written)
    wanted = {"as seen": plain, "phase flipped": abs(plain), "premultiplied": plain**2}[done]
    np.testing.assert_allclose(stack.ctf(), wanted, rtol=1e-6)
    write_particles(tmp_path / "new.star", stack)
    told = starfile.read(tmp_path / "new.star")[block]
    assert {name: told[name].iloc[0] for name in columns} == columns
    # The file follows what is known otherwise.
    flipped = CtfParameters(*DEFOCUS.values(), images=[*["phase flipped"] * 3, *[done] * 3])
    for given in (stack, in_memory()):
        write_particles(tmp_path / "other.star", given.replace(ctf_parameters=flipped))
        back = read_particles(tmp_path / "other.star").ctf_parameters
        np.testing.assert_array_equal(back.images, flipped.images)


def premultiplied(folder, rows=slice(None)):
    """The particles in a file, some of them multiplied by their CTF as they were extracted."""
    path = relion31(folder)
    once, ctf = np.array(IMAGES), read_particles(path).ctf()
    once[rows] = imaging.apply_ctf(once[rows], ctf[rows])
    with mrcfile.open(folder / "particles.mrcs", "r+") as mrc:
        mrc.data[:] = once
    flags = np.zeros(len(IMAGES), int)
    flags[rows] = 1
    return rewritten(path, lambda b: b["particles"].insert(0, MULTIPLIED, flags)), once, ctf, flags


MULTIPLIED = "rlnCtfDataAreCtfPremultiplied"


def test_the_scale_of_a_premultiplied_image_is_no_zero_of_its_ctf(tmp_path):
    """However faint it is said to be: all but what lies about the zeros is divided."""
    path, once, ctf, _ = premultiplied(tmp_path)
    rewritten(path, lambda b: b["particles"].insert(0, "rlnCtfScalefactor", 0.01))
    stack = read_particles(path).divided()
    np.testing.assert_allclose(
        stack.images[:], imaging.apply_ctf(once, 100 / np.maximum(abs(ctf), 0.1)), atol=0.01
    )
    wanted = 0.01 * ctf**2 / np.maximum(abs(ctf), 0.1)
    np.testing.assert_allclose(stack.ctf(), wanted, rtol=1e-5)


def away_from_zeros(images, ctf):
    kept = np.abs(ctf) > 0.11
    kept[:, :, -1] = kept[:, kept.shape[1] // 2] = False  # where astigmatism cannot be undone
    return imaging.apply_ctf(images, kept)


@pytest.mark.parametrize("rows", [slice(None), slice(2, 5)])
def test_premultiplied_images_are_divided_as_they_are_read(tmp_path, rows):
    path, once, ctf, flags = premultiplied(tmp_path, rows)
    given = read_particles(path)
    np.testing.assert_array_equal(given.images[:], once)
    stack = given.divided()
    assert stack.divided() is stack
    flipped = np.where(flags[:, None, None] == 1, np.sign(ctf), 1)
    wanted = away_from_zeros(imaging.apply_ctf(IMAGES, flipped), ctf)
    for images, of in (
        (stack.images, slice(None)),
        (given.replace(images=once).divided().images, slice(None)),  # in memory
        (given.replace(images=np.lib.format.open_memmap(
            tmp_path / "a.npy", "w+", np.float32, once.shape)).divided().images, None),
        (stack.select(np.array([3, 0, 2])).images, [3, 0, 2]),
        (pickle.loads(pickle.dumps(stack.images)), slice(None)),
        (given.select(np.array([4, 4])).divided().images, [4, 4]),
    ):  # fmt: skip
        if of is None:
            assert not np.asarray(images).any()
        else:
            np.testing.assert_allclose(away_from_zeros(images[:], ctf[of]), wanted[of], atol=1e-4)
            np.testing.assert_allclose(images[1], np.asarray(images)[1], atol=1e-6)
    # What they show of a density is what the division leaves of it, about the zeros too.
    shown = np.where(flags[:, None, None] == 1, ctf**2 / np.maximum(abs(ctf), 0.1), ctf)
    np.testing.assert_allclose(stack.ctf(), shown, rtol=1e-5)
    # A ramp is one before images are divided; afterwards their means have grown.
    flat = given.replace(images=imaging.flatten(once)).divided().images
    black = stack.inverted().flattened()
    np.testing.assert_allclose(black.images[:], -imaging.flatten(flat), atol=1e-4)
    # As it was found there is written of images that stay; not of those that are written anew.
    write_particles(tmp_path / "b.star", stack)
    assert list(starfile.read(tmp_path / "b.star")["particles"][MULTIPLIED]) == list(flags)
    np.testing.assert_array_equal(read_particles(tmp_path / "b.star").images[:], once)
    write_particles(tmp_path / "c.star", stack.replace(images=stack.images[:]))
    anew = read_particles(tmp_path / "c.star")
    np.testing.assert_allclose(anew.images[:], stack.images[:], atol=1e-6)
    assert set(anew.ctf_parameters.images[rows]) == {"phase flipped"}
    np.testing.assert_allclose(
        away_from_zeros(anew.images[:], anew.ctf()), away_from_zeros(stack.images[:], stack.ctf()),
        atol=1e-5,
    )  # fmt: skip


def test_the_scale_of_the_ctf_is_used(written, tmp_path):
    plain = read_particles(written).ctf()
    rewritten(written, put("particles", "rlnCtfScalefactor", 0.5))
    rewritten(written, put("particles", "rlnCtfScalefactor", 2.0, row=3))
    scale = np.array([0.5, 0.5, 0.5, 2, 0.5, 0.5])[:, None, None]
    np.testing.assert_allclose(read_particles(written).ctf(), scale * plain, rtol=1e-6)
    rewritten(written, put("optics", "rlnCtfDataAreCtfPremultiplied", 1))
    stack = read_particles(written)
    np.testing.assert_allclose(stack.ctf(), (scale * plain) ** 2, rtol=1e-5)
    np.testing.assert_array_equal(stack.ctf(np.array([3, 0])), stack.ctf()[[3, 0]])
    scaled = CtfParameters(*DEFOCUS.values(), scale=np.linspace(0.5, 1, 6))
    write_particles(tmp_path / "a.star", in_memory().replace(ctf_parameters=scaled))
    np.testing.assert_array_equal(
        read_particles(tmp_path / "a.star").ctf_parameters.scale, scaled.scale
    )


def flagged_without_defocus(blocks):
    drop("particles", *DEFOCUS)(blocks)
    put("optics", "rlnCtfDataAreCtfPremultiplied", 1)(blocks)


def contradicting(blocks):
    put("particles", "rlnVoltage", 200.0)(blocks)
    put("particles", "rlnCtfDataAreCtfPremultiplied", 1, row=4)(blocks)
    put("optics", "rlnCtfDataAreCtfPremultiplied", 1)(blocks)
    put("particles", "rlnOddZernike", "[0,0.5]")(blocks)
    put("optics", "rlnOddZernike", "[0,0.5]")(blocks)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flagged_without_defocus, "images are premultiplied (row 1), and no column rlnDefocusU"),
        (lambda b: drop("particles", "rlnDefocusAngle")(b), "rlnDefocusV are up to 1000 A apart"),
        (contradicting, "followed: rlnVoltage (200.0 in row 1, 300.0 in its group), "
         "rlnCtfDataAreCtfPremultiplied (0 in row 1, 1 in its group)"),
    ],
)  # fmt: skip
def test_a_ctf_that_is_told_in_part_or_twice_is_said(written, tmp_path, change, said):
    with pytest.warns(UserWarning, match=re.escape(said)) as caught:
        stack = read_particles(rewritten(written, change))
    assert len(caught) == 1 and str(written) in str(caught[0].message)
    if change is contradicting:
        assert set(stack.ctf_parameters.voltage_kv) == {200}
        assert list(stack.ctf_parameters.images) == [*["as seen"] * 4, "premultiplied", "as seen"]
        write_particles(tmp_path / "new.star", stack)
        assert list(starfile.read(tmp_path / "new.star")["optics"]["rlnVoltage"]) == [200]
    elif change is flagged_without_defocus:
        assert stack.ctf_parameters is None
    else:
        assert not stack.ctf_parameters.defocus_angle_degrees.any()


def test_over_focus_is_said(written):
    rewritten(written, put("particles", "rlnDefocusU", -1e4))
    with pytest.warns(UserWarning, match=r"particles\.star: column rlnDefocusU: most are negative"):
        read_particles(written)


def test_a_small_astigmatism_needs_no_angle(written):
    def change(blocks):
        put("particles", "rlnDefocusV", 1e4)(blocks)
        put("particles", "rlnDefocusU", 10000.5)(blocks)
        drop("particles", "rlnDefocusAngle")(blocks)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_particles(rewritten(written, change))


def test_the_defocus_of_an_optics_group_is_its_particles(written, tmp_path):
    def change(blocks):
        drop("particles", *DEFOCUS)(blocks)
        two_groups(blocks)
        blocks["optics"] = blocks["optics"].assign(
            rlnDefocusU=[1e4, 2e4], rlnDefocusV=[1.1e4, 2.1e4], rlnDefocusAngle=[10.0, 20.0]
        )

    stack, new = read_particles(rewritten(written, change)), tmp_path / "new.star"
    first = np.array([2e4, 1e4, 1e4, 2e4, 1e4, 1e4])
    np.testing.assert_array_equal(stack.ctf_parameters.defocus_u_angstrom, first)
    np.testing.assert_array_equal(stack.ctf_parameters.defocus_v_angstrom, first + 1000)
    write_particles(new, stack)
    assert "rlnDefocusU" not in read_particles(new).columns
    # What the particles say otherwise stands in one place, and what is forgotten in none.
    other = CtfParameters(*DEFOCUS.values(), voltage_kv=stack.ctf_parameters.voltage_kv)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_particles(new, stack.replace(ctf_parameters=other))
        np.testing.assert_array_equal(read_particles(new).ctf(), other.values(12, PIXEL))
        write_particles(new, stack.replace(ctf_parameters=None))
        assert read_particles(new).ctf_parameters is None


def in_pixels(blocks):
    table = blocks["particles"]
    for axis in "XY":
        table[f"rlnOrigin{axis}"] = table[f"rlnOrigin{axis}Angst"] / PIXEL


def test_origins_in_pixels_are_taken_wherever_they_stand(written, tmp_path):
    def only(blocks):
        in_pixels(blocks)
        drop("particles", "rlnOriginXAngst", "rlnOriginYAngst")(blocks)

    stack = read_particles(rewritten(written, only))
    np.testing.assert_allclose(stack.shifts_px, SHIFTS, atol=1e-6)
    write_particles(tmp_path / "new.star", stack.with_poses(Q, 2 * SHIFTS))
    told = starfile.read(tmp_path / "new.star")["particles"]
    assert "rlnOriginX" not in told
    np.testing.assert_allclose(told["rlnOriginYAngst"], -2 * SHIFTS[:, 1] * PIXEL, atol=1e-6)


def test_origins_that_contradict_each_other_are_refused(written, tmp_path):
    stack = read_particles(rewritten(written, in_pixels))
    np.testing.assert_allclose(stack.shifts_px, SHIFTS, atol=1e-6)
    write_particles(tmp_path / "new.star", stack.with_poses(Q, 2 * SHIFTS))
    again = read_particles(tmp_path / "new.star")  # no column of before stands in its way
    np.testing.assert_allclose(again.shifts_px, 2 * SHIFTS, atol=1e-6)
    rewritten(written, put("particles", "rlnOriginY", 7.0, row=2))
    says = r"particles\.star: row 3, column rlnOriginYAngst: got -11.01 A, and rlnOriginY says 7"
    with pytest.raises(InputError, match=says):
        read_particles(written)


@pytest.mark.parametrize("kind", [relion31, relion30, cryosparc])
def test_an_origin_outside_its_image_is_said(written, tmp_path, kind):
    path = kind(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_particles(path)
    if kind is cryosparc:
        data = np.load(path)
        data["alignments3D/shift"][4] = 0, -3.01  # of twice the size
        saved(path, data)
    else:
        name, unit = ("rlnOriginYAngst", PIXEL) if kind is relion31 else ("rlnOriginY", 1)
        block = "particles" if kind is relion31 else ""
        rewritten(path, put(block, name, -6.02 * unit, row=4))
    says = r"\.(star|cs): origins of 1 of 6 particles lie outside.* 12 px.*row 5, .*-6.02\) px"
    with pytest.warns(UserWarning, match=says):
        read_particles(path)


@pytest.mark.parametrize(
    ("block", "columns", "noted"),
    [
        ("particles", {"rlnOriginZAngst": 4.0}, ["rlnOriginZAngst (4)"]),
        ("particles", {"rlnOriginZ": -2, "rlnOriginZAngst": 0}, ["rlnOriginZ (-2)"]),
        ("optics", {"ctf/trefoil_A": "0,-3.5", "ctf/tilt_A": "0,0"}, ["ctf/trefoil_A (-3.5)"]),
        ("optics", {"rlnBeamTiltX": 0.3, "rlnOddZernike": "[0,0,-3.5,0]", "rlnMagMat00": 1.007,
                    "rlnEvenZernike": "[0,1]"}, []),
        ("particles", {"rlnIsFlip": 1}, ["rlnIsFlip (1)"]),
        ("particles", {"rlnOriginxAngst": 3.0}, ["rlnOriginxAngst (rlnOriginXAngst is)"]),
        ("particles", {"RLNDEFOCUSU": 9e3}, ["RLNDEFOCUSU (rlnDefocusU is)"]),
        ("particles", {"rlnIsFlip": 0}, []),
        ("particles", {"otherIsPhaseFlipped": "True"}, ["otherIsPhaseFlipped (1)"]),
        ("particles", {"rlnAnglePsiFlipRatio": 0.5, "rlnNormCorrection": 0.7}, []),
        ("optics", {"rlnBeamTiltX": 0.0, "rlnBeamTiltY": "None", "rlnMagMat11": 1,
                    "rlnMagMat00": "None"}, []),
    ],
)  # fmt: skip
def test_what_is_not_used_is_said_once(written, block, columns, noted):
    for column, value in columns.items():
        rewritten(written, put(block, column, value))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        read_particles(written)
    texts = [str(w.message) for w in said]
    assert len(texts) == bool(noted)
    for name in noted:
        assert str(written) in texts[0] and name in texts[0] and texts[0].count("(") == len(noted)


def test_factors_of_images_that_are_not_used_are_said(written):
    rewritten(written, put("particles", "rlnNormCorrection", 0.7))
    rewritten(written, put("particles", "rlnNormCorrection", 0.9, row=3))
    rewritten(written, put("optics", "ctf/scale", 1.5))
    says = r"particles\.star: .*ctf/scale \(1.5\), rlnNormCorrection \(0.7 to 0.9\)"
    with pytest.warns(UserWarning, match=says) as said:
        read_particles(written)
    assert len(said) == 1


def test_what_cryosparc_knows_and_is_not_used_is_said(written, tmp_path):
    n = len(Q)
    more = {
        "ctf/tilt_A": (np.full((n, 2), [0, 0.4]), ("f4", (2,))),
        "ctf/anisomag": (np.zeros((n, 4)), ("f4", (4,))),
    }
    with pytest.warns(UserWarning, match=r"J1_particles\.cs: .*not used: ctf/tilt_A \(0.4\)$"):
        read_particles(cryosparc(tmp_path, more=more))
    more = {
        "ctf/scale_const": (np.arange(n) % 2, "f4"),
        "alignments3D/alpha": (np.linspace(0.8, 1.1, n), "f4"),
        "alignments2D/shift": (np.full((n, 2), [0, -3]), ("f4", (2,))),
    }
    path = cryosparc(tmp_path, more=more)
    with pytest.warns(UserWarning, match=r"not used: alignments3D/alpha \(0.8\)$"):
        read_particles(path)
    data = np.load(path)
    data["ctf/scale_const"] = 5
    fields = [name for name in data.dtype.names if name != "alignments3D/shift"]
    saved(path, np.lib.recfunctions.repack_fields(data[fields]))
    says = r"ctf/scale_const \(5\), alignments3D/alpha \(0.8\), alignments2D/shift \(-3\)$"
    with pytest.warns(UserWarning, match=says):
        read_particles(path)


# --------------------------------------------------------------------------------------
# MRC files, pixel sizes, images that are not there


def mrc_bytes(values, order, mode, *, extended=0, pixel=PIXEL):
    """An MRC file, put together by its definition."""
    nz, ny, nx = values.shape
    header = np.zeros(1024, np.uint8)

    def put_at(word, values, kind):
        raw = np.array(values, order + kind).tobytes()
        header[4 * word - 4 : 4 * word - 4 + len(raw)] = np.frombuffer(raw, np.uint8)

    put_at(1, [nx, ny, nz, mode], "i4")
    put_at(8, [nx, ny, nz], "i4")
    put_at(11, [nx * pixel, ny * pixel, nz * pixel, 90, 90, 90], "f4")
    put_at(24, [extended], "i4")
    header[208:216] = np.frombuffer(
        b"MAP " + (b"DD\0\0" if order == "<" else b"\x11\x11\0\0"), "u1"
    )
    kind = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}[mode]
    return header.tobytes() + b"x" * extended + values.astype(order + kind).tobytes()


@pytest.mark.parametrize("extended", [0, 80, 1000])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("mode", [0, 1, 2, 6, 12])
def test_every_kind_of_mrc_file_is_read(written, mode, order, extended):
    values = np.round(20 * IMAGES) + (100 if mode == 6 else 0)
    stack = written.with_suffix(".mrcs")
    stack.write_bytes(mrc_bytes(values, order, mode, extended=extended))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_particles(written).images
    assert found[:].dtype == np.float32 and found.layouts[0].pixel_size_angstrom == PIXEL
    np.testing.assert_array_equal(found[:], values)


@pytest.mark.parametrize(
    ("stamp", "unsigned"),
    [
        (b"IMOD\0\0\0\0", True),
        (b"IMOD\1\0\0\0", False),
        (b"DOMI\0\0\0\2", True),
        (b"DOMI\0\0\0\3", False),
        (bytes(8), False),
    ],
)
def test_bytes_that_imod_wrote_are_unsigned_unless_it_says_otherwise(written, stamp, unsigned):
    raw = bytearray(mrc_bytes(np.round(20 * IMAGES), "<", 0))
    raw[152:160] = stamp
    values = np.frombuffer(raw[1024:], "u1" if unsigned else "i1").reshape(IMAGES.shape)
    stack, cube = written.with_suffix(".mrcs"), written.with_name("cube.mrc")
    stack.write_bytes(raw)
    np.testing.assert_array_equal(read_particles(written).images[:], values)
    cube.write_bytes(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is marked as a stack
        np.testing.assert_array_equal(read_density(cube).values, values)


def test_a_stack_of_turned_images_is_refused(written):
    raw = bytearray(mrc_bytes(IMAGES, "<", 2))
    raw[64:76] = np.array([2, 1, 3], "<i4").tobytes()
    written.with_suffix(".mrcs").write_bytes(raw)
    with pytest.raises(InputError, match=r"particles\.mrcs: .* are axes \(2, 1, 3\) by its header"):
        read_particles(written)


@pytest.mark.parametrize(
    ("pixel", "noted"),
    [(0.0, False), (1.0, False), (PIXEL, False), (PIXEL * 1.001, False), (2.5, True), (7.34, True)],
)
def test_another_pixel_size_in_the_stack_is_said_and_not_used(written, pixel, noted):
    written.with_suffix(".mrcs").write_bytes(mrc_bytes(IMAGES, "<", 2, pixel=pixel))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert read_particles(written).pixel_size_angstrom == PIXEL
    assert len(said) == noted
    if noted:
        text = str(said[0].message)
        assert str(written) in text and f"{pixel:g} A in" in text and "particles.mrcs" in text


@pytest.mark.parametrize("block", ["optics", "particles"])
def test_a_pixel_size_is_computed_as_relion_30_does(written, block):
    drop_pixel = drop("optics", "rlnImagePixelSize")
    rewritten(written, drop_pixel)
    rewritten(written, put(block, "rlnDetectorPixelSize", 5.0))
    rewritten(written, put(block, "rlnMagnification", 38168.0))
    stack = read_particles(written)
    assert stack.pixel_size_angstrom == pytest.approx(5e4 / 38168, rel=1e-8)
    write_particles(written.with_name("new.star"), stack)
    back = read_particles(written.with_name("new.star"))
    assert back.pixel_size_angstrom == stack.pixel_size_angstrom


@pytest.mark.parametrize(("magnification", "noted"), [(1e4, False), (1.001e4, False), (5e3, True)])
def test_a_magnification_that_tells_other_pixels_is_said(written, magnification, noted):
    rewritten(written, put("particles", "rlnDetectorPixelSize", PIXEL))
    rewritten(written, put("particles", "rlnMagnification", magnification))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert read_particles(written).pixel_size_angstrom == PIXEL
    text = "".join(str(w.message) for w in said)
    assert ("make pixels of 7.34 A, rlnImagePixelSize 3.67 A, which is used" in text) == noted
    assert bool(text) == noted


def test_a_magnification_of_no_particle_is_not_asked(written):
    def unused_group(blocks):
        other = blocks["optics"].assign(rlnOpticsGroup=2, rlnOpticsGroupName="second")
        blocks["optics"] = pd.concat([blocks["optics"], other])

    rewritten(written, unused_group)
    rewritten(written, put("particles", "rlnDetectorPixelSize", PIXEL))
    rewritten(written, put("particles", "rlnMagnification", 1e4))
    assert len(read_particles(written).origin.optics["rlnOpticsGroup"]) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_particles(written).pixel_size_angstrom == PIXEL


@pytest.mark.parametrize("kind", [relion31, relion30])
def test_a_pixel_size_that_the_file_lacks_can_be_given(written, tmp_path, kind):
    with pytest.raises(InputError, match=r"2\.5 A was given, and the file says 3\.67 A"):
        read_particles(kind(tmp_path), pixel_size_angstrom=2.5)
    assert read_particles(kind(tmp_path), pixel_size_angstrom=PIXEL).pixel_size_angstrom == PIXEL
    path = kind(tmp_path)
    lines = path.read_text().replace("rlnImagePixelSize", "myPixelSize")
    path.write_text(lines.replace("rlnMagnification", "myMagnification"))
    with pytest.raises(InputError, match=r"no column rlnImagePixelSize.*--pixel-size"):
        read_particles(path)
    stack = read_particles(path, pixel_size_angstrom=2.5)
    assert stack.pixel_size_angstrom == 2.5
    in_angstrom = kind is relion31
    np.testing.assert_allclose(
        stack.shifts_px, SHIFTS * (PIXEL / 2.5 if in_angstrom else 1), atol=1e-6
    )
    write_particles(tmp_path / "new.star", stack)
    assert read_particles(tmp_path / "new.star").pixel_size_angstrom == 2.5


@pytest.mark.parametrize("kind", [relion31, relion30, cryosparc])
def test_a_file_is_read_without_its_images(written, tmp_path, kind):
    path = kind(tmp_path)
    whole = read_particles(path)
    (tmp_path / "particles.mrcs").unlink()
    with pytest.raises(InputError, match="no such file"):
        read_particles(path)
    stack = read_particles(path, images=False)
    assert len(stack) == 6 and stack.box_px == (0 if kind is relion30 else 12)
    assert rotations.distance(stack.quaternions, whole.quaternions).max() < 1e-6
    np.testing.assert_array_equal(stack.shifts_px, whole.shifts_px)
    assert len(stack.select(slice(2, 4))) == 2
    with pytest.raises(InputError, match=rf"{path.name}: read without its images"):
        stack.images[0]
    with pytest.raises(InputError, match="read without its images"):
        write_particles(tmp_path / "new.star", stack)


def test_particles_of_cistem_are_named(tmp_path):
    path = tmp_path / "a.star"
    path.write_text("data_\n\nloop_\n_cisTEMPositionInStack #1\n_cisTEMAnglePsi #2\n1 3.5\n")
    with pytest.raises(InputError, match=r"a\.star: particles of cisTEM"):
        read_particles(path)


# --------------------------------------------------------------------------------------
# Bad input


def names(values):
    def change(blocks):
        blocks["particles"]["rlnImageName"] = values

    return change


def drop(block, *columns):
    def change(blocks):
        blocks[block] = blocks[block].drop(columns=[*columns])

    return change


def put(block, column, value, row=None):
    def change(blocks):
        table = blocks[block]
        values = list(table[column]) if column in table else [0] * len(table)
        blocks[block][column] = [value if row in (None, i) else v for i, v in enumerate(values)]

    return change


def other_pixel_size(blocks):
    two_groups(blocks)
    blocks["optics"]["rlnImagePixelSize"] = [PIXEL, 2.0]
    blocks["optics"]["rlnOpticsGroupName"] = ["opticsGroup1", "second"]


def repeated_group(blocks):
    two_groups(blocks)
    blocks["optics"] = blocks["optics"].iloc[[0, 1, 0]].copy()
    blocks["optics"]["rlnVoltage"] = [300.0, 300.0, 200.0]


def only_x_in_pixels(blocks):
    in_pixels(blocks)
    drop("particles", "rlnOriginY", "rlnOriginXAngst", "rlnOriginYAngst")(blocks)


def no_rows(blocks):
    blocks["particles"] = blocks["particles"].iloc[:0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("optics"), "rlnDetectorPixelSize"),
        (lambda b: b.pop("particles"), "data_particles"),
        (no_rows, "no particles"),
        (drop("optics", "rlnImagePixelSize"), "rlnImagePixelSize"),
        (drop("particles", "rlnImageName"), "rlnImageName"),
        (drop("optics", "rlnVoltage"), "rlnVoltage"),
        (drop("particles", "rlnDefocusV"), "rlnDefocusV"),
        (
            drop("particles", "rlnOriginXAngst"),
            "has rlnOriginYAngst, but no column rlnOriginXAngst",
        ),
        (only_x_in_pixels, "has rlnOriginX, but no column rlnOriginY"),
        (drop("particles", "rlnDefocusU"), "has defocus, but no column rlnDefocusU"),
        (
            repeated_group,
            "data_optics: rows 1 and 3, column rlnOpticsGroup: got 1 in both, and rlnVoltage",
        ),
        (
            other_pixel_size,
            r"row 2: rlnImagePixelSize is 3.67 A.*\(opticsGroup1\).*1 \(second\).*one pixel size",
        ),
        (put("optics", "rlnImageSize", 64), "row 1: rlnImageSize is 64.*12 in its stack"),
        (put("optics", "rlnImageDimensionality", 3), "row 1: rlnImageDimensionality"),
        (put("particles", "rlnOpticsGroup", 5, row=3), "row 4, column rlnOpticsGroup: group 5"),
        (put("particles", "rlnAngleTilt", "north", row=2), "row 3, column rlnAngleTilt.*north"),
        (put("particles", "rlnAnglePsi", float("nan"), row=5), "row 6, column rlnAnglePsi"),
        (put("particles", "rlnOriginXAngst", "inf", row=0), "row 1, column rlnOriginXAngst"),
        (put("particles", "rlnDefocusU", 3e7, row=1), "row 2, column rlnDefocusU: got 3"),
        (put("particles", "rlnDefocusU", 1.5), "column rlnDefocusU.*micrometre"),
        (put("optics", "rlnAmplitudeContrast", 7), "data_optics: row 1, column rlnAmplitudeC"),
        (put("optics", "rlnVoltage", 300000), "data_optics: row 1, column rlnVoltage"),
        (put("optics", "rlnImagePixelSize", -1), "data_optics: row 1, column rlnImagePixelSize"),
        (put("particles", "rlnRandomSubset", 3, row=4), "row 5, column rlnRandomSubset: got 3"),
        (put("particles", "rlnRandomSubset", 0, row=0), "row 1, column rlnRandomSubset: got 0"),
        (put("particles", "rlnRandomSubset", 1.5, row=1), "row 2, column rlnRandomSubset: got 1.5"),
        (put("particles", "rlnRandomSubset", "x", row=2), "row 3, column rlnRandomSubset: got x"),
        (put("particles", "rlnCtfScalefactor", 0.0), "row 1, column rlnCtfScalefactor"),
        (put("optics", "rlnCtfDataAreCtfPremultiplied", "x"), "optics: row 1.*Premultiplied"),
        (put("particles", "rlnTomoVisibleFrames", "[1,1]"), "rlnTomoVisibleFrames.*tomograms"),
        (put("optics", "rlnTomoSubTomosAre2DStacks", 1), "Are2DStacks.*tomograms"),
        (put("particles", "rlnImagePixelSize", 2.0), "row 1, column rlnImagePixelSize: got 2 A"),
        (put("particles", "cryoemSign", 2, row=1), "row 1, column cryoemSign: got 0"),
        (put("optics", "cryoemSign", "black"), "data_optics: row 1, column cryoemSign: got black"),
        (put("particles", "cryoemContrast", "nan", row=2), "row 3, column cryoemContrast"),
        (put("particles", "cryoemExpectedErrorRad", "x", row=1), "row 2, column cryoemExpected"),
        (put("particles", "cryoemContrast", -1, row=2), "row 3, column cryoemContrast: got -1"),
        (put("particles", "rlnAngleTilt", 1e300, row=1), "row 2, column rlnAngleTilt: got 1e.300"),
        (put("particles", "rlnAngleTilt", "1_0", row=1), "row 2, column rlnAngleTilt: got 1_0"),
        (put("particles", "rlnOriginXAngst", 1e300, row=1), "row 2, column rlnOriginXAngst"),
        (put("particles", "rlnCtfBfactor", -5000, row=3), "row 4, column rlnCtfBfactor: got -5000"),
        (put("particles", "rlnPhaseShift", 1e9), "row 1, column rlnPhaseShift"),
        (names([f"{i + 2:06d}@particles.mrcs" for i in range(6)]), "row 6.*holds 6"),
        (names([f"{i:06d}@particles.mrcs" for i in range(6)]), "row 1.*image 0"),
        (names(["particles.mrcs"] * 6), "row 1.*000001@stack"),
        (names(["one@particles.mrcs"] * 6), "row 1.*000001@stack"),
        (names([f"{'9' * 5000}@particles.mrcs"] * 6), "row 1.*000001@stack"),
        (names([*[f"{i + 1}@particles.mrcs" for i in range(5)], "1@gone.mrcs"]), r"row 6.*gone"),
        (names([*[f"{i + 1}@particles.mrcs" for i in range(5)], "1@ten.mrcs"]), "row 6.*10 x 10"),
        (names([*["1@particles.mrcs"] * 5, "1@oblong.mrcs"]), "row 6.*12 x 10"),
        (names(["1@text.mrcs"] * 6), "not a whole MRC"),
        (names(["1@particles.star"] * 6), "not a whole MRC"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(written, tmp_path, change, message):
    mrcfile.write(tmp_path / "ten.mrcs", IMAGES[:, 1:11, 1:11])
    mrcfile.write(tmp_path / "oblong.mrcs", IMAGES[:, 1:11])
    (tmp_path / "text.mrcs").write_text("not an image\n" * 200)
    rewritten(written, change)
    with pytest.raises(InputError, match=rf"(?s)(particles|text)\.(star|mrcs): .*{message}"):
        read_particles(written)


@pytest.mark.parametrize("content", [b"", b"not a star file\n", bytes(range(256)), b"data_\n"])
def test_what_is_no_star_file_is_refused(tmp_path, content):
    path = tmp_path / "a.star"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.star"):
        read_particles(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("data_particles", "data_optics", "two blocks data_optics"),
        ("_rlnAngleRot", "_rlnAngleTilt", "data_particles: two columns rlnAngleTilt"),
        ("_rlnAngleRot", "_", "data_particles: a column has no name"),
        ("data_optics", "1 2\ndata_optics", "line 4: wanted a block's name, data_..., got '1 2'"),
        ("loop_\n_rlnImageName", "1 2\n_rlnImageName", "wanted loop_, or a column's name"),
        ("000003@", "one 000003@", "data_particles: row 3: holds 12 values, wanted 11"),
    ],
)
def test_what_is_no_table_is_refused(written, old, new, message):
    written.write_text(written.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=re.escape(message)):
        read_particles(written)


def test_text_that_is_not_utf_8_is_refused_by_its_line(written):
    text = written.read_text()
    lines = text.splitlines()
    row = next(i for i, line in enumerate(lines) if "000004@" in line)
    mu = "\N{MICRO SIGN}".encode("latin-1")
    written.write_bytes(text.replace("000004@", "x4x@").encode().replace(b"x4x@", mu + b"4@"))
    with pytest.raises(InputError, match=rf"particles\.star: line {row + 1}: not UTF-8: "):
        read_particles(written)


def test_a_relion_30_file_is_refused_by_its_own_rows(written, tmp_path):
    old = relion30(tmp_path)
    table = starfile.read(old)
    table["rlnVoltage"] = [300, 300, 300, 3e5, 300, 300]
    starfile.write({"": table}, old, overwrite=True)
    with pytest.raises(InputError, match=r"old\.star: row 4, column rlnVoltage: got 3"):
        read_particles(old)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("ctf/accel_kv", np.nan, "row 3, field ctf/accel_kv: got nan"),
        ("ctf/df1_A", 3e7, "row 3, field ctf/df1_A: got 3"),
        ("ctf/phase_shift_rad", 100, r"row 3, field ctf/phase_shift_rad \(in degrees\): got 5729"),
        ("alignments3D/shift", np.nan, "row 3, field alignments3D/shift times .*/psize_A: got nan"),
        ("alignments3D/shift", 1e8, "row 3, field alignments3D/shift times .*/psize_A: got"),
        ("blob/psize_A", 2, "row 3: blob/psize_A is 2 A in its"),
        ("blob/shape", 64, "row 1: blob/shape is 64 .* 12 in its stack"),
        ("blob/path", b"a.mrcs", "row 3, blob/path, blob/idx: 'a.mrcs': no such file"),
        ("blob/idx", 60, "row 3, blob/path, blob/idx: image 61 of"),
        ("ctf/df1_A", 20, "field ctf/df1_A: nothing above 20 A; wanted angstrom"),
        ("alignments3D/split", 2, "row 3, field alignments3D/split: got 2, wanted 0 or 1"),
    ],
)
def test_a_cryosparc_file_is_refused_by_its_own_fields(written, tmp_path, field, value, says):
    path = cryosparc(tmp_path)
    data = np.load(path)
    everywhere = field == "blob/shape" or says.startswith("field")
    data[field][slice(None) if everywhere else 2] = value
    saved(path, data)
    with pytest.raises(InputError, match=rf"J1_particles\.cs: {says}") as error:
        read_particles(path)
    assert "rln" not in str(error.value)


def without(path, *fields):
    """The same ``.cs`` file without some of its fields."""
    data = np.load(path)
    left = [name for name in data.dtype.names if name not in fields]
    saved(path, np.lib.recfunctions.repack_fields(data[left]))


def test_what_a_cryosparc_file_has_not_is_told_in_its_own_fields(written, tmp_path):
    path = cryosparc(tmp_path)
    without(path, "ctf/df_angle_rad")
    with pytest.warns(UserWarning, match="no field ctf/df_angle_rad, and ctf/df1_A and ctf/df2_A"):
        read_particles(path)
    without(path, "ctf/accel_kv")
    with pytest.raises(InputError, match=r"cs: has defocus, but no field ctf/accel_kv$"):
        read_particles(path)
    without(path, "alignments3D/pose", *(f"ctf/df{i}_A" for i in (1, 2)))
    with (
        pytest.warns(UserWarning, match="without a CTF"),
        pytest.raises(InputError, match=r"cs: no field alignments3D/pose; see orient"),
    ):
        open_oriented(path, True)
    data = np.repeat(np.load(cryosparc(tmp_path)), 3)
    data["ctf/df1_A"] *= -1
    data["alignments3D/split"] = np.arange(18) == 0
    saved(path, data)
    with pytest.warns(UserWarning) as said:
        read_particles(path)
    told = " ".join(str(note.message) for note in said)
    assert "field ctf/df1_A: most are negative" in told and "rln" not in told
    assert "field alignments3D/split: 17 particles are in half 1, 1 in half 2" in told


def test_sizes_of_cryosparcs_images_that_are_none_are_passed_over(written, tmp_path):
    more = {"blob/shape": (np.full((6, 2), np.inf), ("f4", (2,)))}
    path = cryosparc(tmp_path, more=more)
    np.testing.assert_array_equal(read_particles(path).images[:], IMAGES)
    saved(path, np.zeros(3, []))
    with pytest.raises(InputError, match=r"J1_particles\.cs: wanted a table with named fields"):
        read_particles(path)


def test_a_cryosparc_field_that_no_column_can_be_is_refused(written, tmp_path):
    path = cryosparc(tmp_path, more={"x y": (np.zeros(6), "f4")})
    with pytest.raises(InputError, match=r"J1_particles\.cs: field 'x y': wanted a name"):
        read_particles(path)


def test_particles_of_cryosparc_without_a_ctf_are_said(written, tmp_path):
    path = cryosparc(tmp_path)
    data = np.load(path)
    fields = [name for name in data.dtype.names if not name.startswith("ctf/")]
    saved(path, np.lib.recfunctions.repack_fields(data[fields]))
    with pytest.warns(UserWarning, match=r"J1_particles\.cs: no field ctf/df1_A, .* without a CTF"):
        assert read_particles(path).ctf_parameters is None


def test_halves_of_which_one_is_hardly_there_are_said(written):
    rewritten(written, put("particles", "rlnRandomSubset", 1))
    rewritten(written, put("particles", "rlnRandomSubset", 2, row=5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one of six is no such share
        assert len(read_particles(written).half(2)) == 1
    rows = np.repeat(np.arange(6), 3)
    rewritten(written, lambda b: b.update(particles=b["particles"].iloc[rows]))
    rewritten(written, put("particles", "rlnRandomSubset", 1))
    rewritten(written, put("particles", "rlnRandomSubset", 2, row=17))
    with pytest.warns(
        UserWarning, match="rlnRandomSubset: 17 particles are in half 1, 1 in half 2"
    ):
        read_particles(written)


def test_a_row_that_is_too_short_is_refused(written):
    text = written.read_text().rstrip()
    written.write_text(text[: text.rindex("\t")])
    with pytest.raises(InputError, match=r"particles\.star.*values"):
        read_particles(written)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"\x80\x04K\x01."])
def test_what_is_no_cs_file_is_refused(tmp_path, content):
    path = tmp_path / "a.cs"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.cs"):
        read_particles(path)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ([("uid", "u8")], "blob/path"),
        ([("blob/path", "S9"), ("blob/idx", "f4"), ("blob/psize_A", "f4")], "blob/idx"),
        ([("blob/path", "S9"), ("blob/idx", "u4"), ("blob/psize_A", "f4", 2)], "blob/psize_A"),
        ("f4", "named fields"),
    ],
)
def test_a_cs_file_without_its_fields_is_refused(tmp_path, dtype, message):
    with (tmp_path / "a.cs").open("wb") as file:
        np.save(file, np.zeros(3, dtype))
    with pytest.raises(InputError, match=rf"a\.cs.*{message}"):
        read_particles(tmp_path / "a.cs")


def test_pickles_are_not_opened(tmp_path):
    with (tmp_path / "a.cs").open("wb") as file:
        np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"a\.cs"):
        read_particles(tmp_path / "a.cs")


@pytest.mark.parametrize("keep", [-40, 1024, 100, 0])
def test_a_truncated_stack_is_refused(written, keep):
    stack = written.with_suffix(".mrcs")
    stack.write_bytes(stack.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"particles\.mrcs"):
        read_particles(written)


@pytest.mark.parametrize(
    ("value", "what"), [(np.nan, "not finite"), (np.inf, "not finite"), (0.0, "constant")]
)
def test_an_image_that_is_none_is_named_when_it_is_read(written, value, what):
    spoilt = IMAGES.copy()
    spoilt[3] = value
    with mrcfile.open(written.with_suffix(".mrcs"), "r+") as mrc, np.errstate(invalid="ignore"):
        mrc.data[:] = spoilt
    back = read_particles(written)
    np.testing.assert_array_equal(back.images[:3], IMAGES[:3])
    with pytest.raises(InputError, match=rf"row 4: image 4 of .*particles\.mrcs.*{what}"):
        back.images[2:]
    with mrcfile.open(written.with_suffix(".mrcs"), "r+") as mrc:
        mrc.data[5] = 1
    with pytest.raises(UnusableImages, match=r"row 4: .* and 1 more that were") as said:
        back.images[2:]
    assert sorted(row for rows in said.value.found.values() for row in rows) == [1, 3]


def test_a_stack_that_shrank_is_named(written):
    back = read_particles(written)
    os.truncate(written.with_suffix(".mrcs"), 2000)
    with pytest.raises(InputError, match=r"particles\.mrcs: has changed"):
        back.images[5]


@pytest.mark.parametrize(
    ("name", "stack", "message"),
    [
        ("a.txt", in_memory(), r"a\.txt.*\.star"),
        ("a.mrcs", in_memory(), r"a\.mrcs.*\.star"),
        ("a.star", in_memory().select(slice(0)), r"a\.star.*at least one"),
        ("a.star", in_memory().with_columns({"a": ["x\ny"] * 6}), "cannot stand"),
        ("a.star", in_memory().with_columns({"a": ["a\" b' c"] * 6}), "cannot stand"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, stack, message):
    with pytest.raises(InputError, match=message):
        write_particles(tmp_path / name, stack)
    assert list(tmp_path.iterdir()) == []


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def full_disk(limit):
    """No file of this process may grow beyond ``limit`` bytes; without this it dies of SIGXFSZ."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


@pytest.mark.parametrize("limit", [0, 1500, 4500])  # in the stack's header, in it, in the STAR
def test_a_full_disk_leaves_what_was_there(written, limit):
    before = contents(written.parent)
    assert len(before["particles.star"]) > 800 and len(before["particles.mrcs"]) == 4480
    many = {f"column{i}": np.arange(6) / 7 for i in range(40)}
    other = in_memory().replace(images=-IMAGES).with_columns(many)
    full_disk(limit)
    try:
        with pytest.raises(StorageError, match=r"particles\.(star|mrcs): not written"):
            write_particles(written, other)
    finally:
        full_disk(resource.RLIM_INFINITY)
    assert contents(written.parent) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("gone")])
def test_an_interrupted_write_leaves_what_was_there(written, monkeypatch, error):
    def stop(*_):
        raise error

    before = contents(written.parent)
    monkeypatch.setattr(star, "texts", stop)
    with pytest.raises((KeyboardInterrupt, OSError)):
        write_particles(written, in_memory().replace(images=-IMAGES))
    with pytest.raises((KeyboardInterrupt, OSError)):
        write_particles(written, read_particles(written).with_poses(Q[::-1]))
    assert contents(written.parent) == before


def test_a_folder_that_cannot_be_written_to_is_named(written):
    with (
        pytest.raises(StorageError, match=r"particles\.star.a: cannot be written"),
        files.atomic(written / "a"),
    ):
        pass


def test_changed_images_never_replace_those_that_they_were_made_from(written):
    stack = read_particles(written)
    before = written.with_suffix(".mrcs").read_bytes(), written.read_bytes()
    with pytest.raises(InputError, match="would be overwritten"):
        write_particles(written, stack.with_images(-stack.images[:]))
    assert (written.with_suffix(".mrcs").read_bytes(), written.read_bytes()) == before
    write_particles(written, stack)  # images that stay where they are
    write_particles(written.with_name("turned.star"), stack.with_images(-stack.images[:]))
    turned = read_particles(written.with_name("turned.star"))
    np.testing.assert_array_equal(turned.images[:], -stack.images[:])


@pytest.mark.parametrize("kind", ["stack alone", "some rows", "another's images"])
def test_files_of_images_are_never_replaced_by_what_was_made_of_them(written, tmp_path, kind):
    (tmp_path / "b").mkdir()
    other = tmp_path / "b" / "other.mrcs"
    shutil.copy(written.with_suffix(".mrcs"), other)
    if kind == "stack alone":
        stack = read_particles(other)
    elif kind == "some rows":  # none of which lies in the file
        apart = [f"{i + 1}@{'b/other' if i > 3 else 'particles'}.mrcs" for i in range(6)]
        stack = read_particles(rewritten(written, names(apart))).select(slice(4))
    else:
        stack = read_particles(written).with_images(read_particles(other).images)
    before = other.read_bytes()
    for made in (
        stack.with_images(-stack.images[:]),
        stack.select(slice(3)).with_images(IMAGES[:3]),
    ):
        again = made.with_poses(Q[: len(made)]).select(slice(2)).with_images(made.images[:2])
        for changed in (made, again):
            with pytest.raises(InputError, match=r"other\.mrcs: holds .*would be overwritten"):
                write_particles(tmp_path / "b" / "other.star", changed)
            assert write_particles(tmp_path / "new.star", changed) == tmp_path / "new.mrcs"
    assert other.read_bytes() == before
