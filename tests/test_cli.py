import contextlib
import dataclasses
import filecmp
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import dask
import distributed
import mrcfile
import numpy as np
import pytest
import starfile
from measures import QUICK
from typer.testing import CliRunner

from cryoem import (
    ParticleStack,
    abinitio,
    cli,
    estimator,
    evaluation,
    half_sets,
    imaging,
    load_estimator,
    read_density,
    read_particles,
    rotations,
    simulate,
    write_density,
    write_particles,
)
from cryoem.cli import initial, opening, options, orienting, solving
from cryoem.density import Density, Phantom
from cryoem.errors import InputError, StorageError
from cryoem.io import files
from cryoem.particles import ParticleFile
from cryoem.refinement import halves
from cryoem.surveying import is_black

COMMANDS = (
    "density",
    "simulate",
    "train",
    "orient",
    "reconstruct",
    "refine",
    "evaluate",
    "info",
    "abinitio",
    "solve",
)


def run(*arguments, code=0):
    done = CliRunner().invoke(cli.app, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory, phantom):
    """A map, particles of it (SNR 4, shifted), and worse orientations of them."""
    folder = tmp_path_factory.mktemp("cli")
    write_density(folder / "map.mrc", phantom.density(32, 7.0))
    run("simulate", folder / "map.mrc", "-n", 300, "--snr", 4, "--shift", 1, "-o",
        folder / "particles.star")  # fmt: skip
    true = read_particles(folder / "particles.star")
    off = rotations.perturb(true.quaternions, np.random.default_rng(0).normal(0, 0.1, (300, 3)))
    write_particles(folder / "off.star", true.with_poses(off))
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Ab initio in few rounds."""
    for name in ("ab_initio", "classify"):
        few = functools.partial(getattr(abinitio, name), schedule=QUICK)
        monkeypatch.setattr(abinitio, name, few)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_says_what_there_is(command):
    text = run(*command, "--help").output
    assert "Usage" in text
    for name in () if command else COMMANDS:
        assert name in text


#: What a Python programmer would write: names_with_underscores, CamelCase, calls, modules, roles.
PYTHON = re.compile(
    r"\b[a-z]+_[a-z]\w*|\b[A-Z][a-z]+[A-Z]\w*|\w\(|\bcryoem\.\w|:[a-z]+:`|``|"
    r"\b(None|True|False|numpy|array|tuple|dict|str)\b"
)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_is_for_those_who_know_no_python(command):
    text = run(*command, "--help").output
    # What Typer says of a value's kind, and a precision's name.
    text = re.sub(r"<\w+>|mixed_bfloat16", "", text)
    assert PYTHON.findall(text) == []


def test_without_training_tensorflow_is_not_imported(folder):
    code = (
        "import sys; from typer.testing import CliRunner; from cryoem import cli; "
        f"done = CliRunner().invoke(cli.app, ['info', {str(folder / 'particles.star')!r}]); "
        "assert done.exit_code == 0, done.output; "
        "sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_density_of_a_model(tmp_path):
    run("density", "4jsv", "-o", tmp_path / "a.mrc", "--voxel-size", 8, "--resolution", 20)
    made = read_density(tmp_path / "a.mrc")
    assert made.voxel_size_angstrom == 8 and made.box_px > 20
    found = json.loads(run("info", tmp_path / "a.mrc", "--json").stdout)
    assert found["kind"] == "map" and found["voxel_size_angstrom"] == 8


def test_simulated_particles_are_those_that_were_asked_for(folder, tmp_path):
    run("simulate", folder / "map.mrc", "-n", 20, "--defocus", 1e4, 2e4, "--coverage", "half",
        "--seed", 3, "-o", tmp_path / "a.star")  # fmt: skip
    seen = read_particles(tmp_path / "a.star")
    assert len(seen) == 20 and seen.box_px == 32 and seen.pixel_size_angstrom == 7
    assert (rotations.view_directions(seen.quaternions)[:, 2] > 0).all()
    defocus = seen.ctf_parameters.defocus_u_angstrom
    assert ((defocus > 1e4) & (defocus < 2e4)).all() and np.ptp(defocus) > 1e3
    run("simulate", folder / "map.mrc", "-n", 20, "--defocus", 1e4, 2e4, "--coverage", "half",
        "--seed", 4, "-o", tmp_path / "b.star")  # fmt: skip
    other = read_particles(tmp_path / "b.star")
    assert rotations.distance(seen.quaternions, other.quaternions).min() > 0


def test_info_tells_what_real_particles_hide(folder):
    found = json.loads(run("info", folder / "particles.star", "--json").stdout)
    assert found["particles"] == 300 and found["box_px"] == 32 and found["angles"] is True
    assert found["contrast"] == "white on black"
    assert 3 < found["snr"] < 5 and found["max_shift_px"] <= 1
    assert "white on black" in run("info", folder / "particles.star").stdout
    assert found["half_sets"] is False and found["defocus_range_angstrom"] is None
    assert found["stacks"] == found["optics_groups"] == 1
    assert "rlnAngleRot" in found["columns"] and found["pixel_size_angstrom"] == 7


def test_premultiplied_images_are_seen_as_the_microscope_saw_them(folder, tmp_path):
    run("simulate", folder / "map.mrc", "-n", 200, "--snr", 0.5, "--defocus", 1e4, 2e4, "--seed", 3,
        "-o", tmp_path / "a.star")  # fmt: skip
    stack = read_particles(tmp_path / "a.star")
    twice = stack.replace(
        images=imaging.apply_ctf(stack.images[:], stack.ctf()),
        ctf_parameters=dataclasses.replace(stack.ctf_parameters, images="premultiplied"),
    )
    write_particles(tmp_path / "b.star", twice)
    once, other = (
        json.loads(run("info", tmp_path / f"{name}.star", "--json").stdout) for name in "ab"
    )
    assert other["snr"] == pytest.approx(once["snr"], rel=0.1)
    assert other["noise_variance"] == pytest.approx(once["noise_variance"], rel=0.1)
    run("reconstruct", tmp_path / "b.star", "-o", tmp_path / "b.mrc")
    run("reconstruct", tmp_path / "a.star", "-o", tmp_path / "a.mrc")
    a, b = (read_density(tmp_path / f"{name}.mrc").values.ravel() for name in "ab")
    assert np.corrcoef(a, b)[0, 1] > 0.98


def test_little_noise_is_no_mask(folder, tmp_path):
    run("simulate", folder / "map.mrc", "-n", 60, "--snr", 30, "-o", tmp_path / "a.star")
    done = run("info", tmp_path / "a.star", "--json")
    assert json.loads(done.stdout)["snr"] == pytest.approx(30, rel=0.1)
    assert "constant" not in done.stderr


def test_info_tells_what_a_file_says_without_its_images(folder, tmp_path):
    text = (folder / "particles.star").read_text()
    (tmp_path / "alone.star").write_text(text.replace("rlnImagePixelSize", "rlnPixelSize"))
    alone = tmp_path / "alone.star"
    assert "--pixel-size" in run("info", alone, code=1).stderr
    done = run("info", alone, "--pixel-size", 7, "--json")
    assert "images: not found" in done.stderr and "particles.mrcs" in done.stderr
    found = json.loads(done.stdout)
    whole = json.loads(run("info", folder / "particles.star", "--json").stdout)
    for name in ("particles", "box_px", "stacks", "angles", "half_sets", "pixel_size_angstrom"):
        assert found[name] == whole[name]
    assert found["max_shift_px"] == pytest.approx(whole["max_shift_px"]) and "snr" not in found


def test_info_tells_what_other_files_hold(folder, trained, tmp_path):
    def info(path):
        return json.loads(run("info", path, "--json").stdout)

    found = info(folder / "particles.mrcs")
    assert found["kind"] == "images alone" and found["particles"] == 300 and found["box_px"] == 32
    assert found["pixel_size_angstrom"] == 7 and 3 < found["snr"] < 5
    found = info(folder / "map.mrc")
    assert found["kind"] == "map" and found["shape_zyx"] == [32] * 3
    assert found["voxel_size_angstrom"] == 7 and found["maximum"] > 0
    network = dataclasses.replace(trained[0], notes={"density": "a phantom"})
    network.save(tmp_path / "model.npz")
    found = info(tmp_path / "model.npz")
    assert found["kind"] == "estimator" and found["symmetry"] == "C1"
    assert found["preprocessing"] == dataclasses.asdict(network.preprocessing)
    assert found["notes"] == {"density": "a phantom"}
    np.savez(tmp_path / "other.npz", a=[1])
    assert "not an estimator" in run("info", tmp_path / "other.npz", code=1).stderr


def test_constant_corners_are_said(folder, tmp_path):
    few = read_particles(folder / "particles.star").select(slice(8))
    n = few.box_px
    disc = np.hypot(*np.mgrid[:n, :n] - n // 2) < n / 2 - 1
    write_particles(tmp_path / "masked.star", few.with_images(few.images[:] * disc))
    done = run("info", tmp_path / "masked.star", "--json")
    assert json.loads(done.stdout)["snr"] is None
    assert "masked.star: the corners of its images are constant" in done.stderr
    done = run("reconstruct", tmp_path / "masked.star", "-o", tmp_path / "a.mrc")
    assert "masked.star: the corners of the images are constant, as where they" in done.stderr
    assert "constant" not in run("info", folder / "particles.star").stderr


def test_what_is_no_number_is_null_in_json_and_words_in_print(capsys):
    nan, inf = float("nan"), float("inf")
    found = {"snr": inf, "error": np.float64(nan), "range": (nan, -inf), "n": 3, "none": None,
             "deep": {"of": [1.5, nan, {"a": inf}]}, "text": "nan", "shift_px": 1.25}  # fmt: skip
    options.print_figures(found, as_json=True)
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told == found | {"snr": None, "error": None, "range": [None, None]} | {
        "deep": {"of": [1.5, None, {"a": None}]}
    }
    options.print_figures({"snr": inf, "of_it": (1.0, nan), "text": "nan", "px": 1.25}, False)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "snr    not to be told",
        "of it  1 to not to be told",
        "text   nan",
        "px     1.25",
    ]


def test_from_particles_to_orientations(folder, trained, tmp_path):
    network, _ = trained
    network.save(tmp_path / "model.npz")
    assert json.loads(run("info", tmp_path / "model.npz", "--json").stdout)["kind"] == "estimator"
    orient = ("orient", folder / "particles.star", "--model", tmp_path / "model.npz", "-q")
    run(*orient, "-o", tmp_path / "oriented.star")
    found = read_particles(tmp_path / "oriented.star")
    assert len(found) == 300 and "cryoemResidualRad" in found.columns
    assert (found.expected_error_rad > 0).all()
    judge = ("evaluate", "--truth", folder / "particles.star", "--json")
    first = json.loads(run(*judge, tmp_path / "oriented.star").stdout)
    assert first["one_sided_mean_rad"] < 0.8 * first["random_mean_rad"]
    # Done already: nothing is computed again, and the other hand is as good.
    run(*orient, "-o", tmp_path / "oriented.star", "--other-hand")
    other = read_particles(tmp_path / "oriented.star")
    turned = rotations.other_hand(found.quaternions)
    assert rotations.distance(other.quaternions, turned).max() < 1e-6
    second = json.loads(run(*judge, tmp_path / "oriented.star").stdout)
    assert second["one_sided_mean_rad"] == pytest.approx(first["one_sided_mean_rad"], rel=1e-3)


def test_no_shift_is_looked_for_where_origins_are_known(folder, trained, tmp_path):
    dataclasses.replace(trained[0], passes=2).save(tmp_path / "model.npz")
    true = read_particles(folder / "particles.star")
    middle = imaging.shift(true.images[:], -true.shifts_px)
    centred = true.with_images(middle).with_poses(true.quaternions, np.zeros((300, 2)))
    write_particles(tmp_path / "middle.star", centred)
    found = {}
    for name, particles, *flags in (
        ("moved", folder / "particles.star"),
        ("known", folder / "particles.star", "--centred"),
        ("middle", tmp_path / "middle.star", "--centred"),
    ):
        out = tmp_path / f"{name}_oriented.star"
        run("orient", particles, "--model", tmp_path / "model.npz", "-q", *flags, "-o", out)
        found[name] = read_particles(out)
    np.testing.assert_allclose(found["known"].shifts_px, true.shifts_px, atol=1e-4)
    assert not found["middle"].shifts_px.any()
    q = found["middle"].quaternions
    assert rotations.distance(found["known"].quaternions, q).max() < 1e-3
    assert np.abs(found["moved"].shifts_px - true.shifts_px).max() > 0.1
    assert rotations.distance(found["moved"].quaternions, q).max() > 2e-2


def test_images_that_the_estimator_does_not_know_are_not_oriented(folder, trained, tmp_path):
    trained[0].save(tmp_path / "model.npz")
    noise = np.random.default_rng(0).standard_normal((300, 32, 32), dtype=np.float32)
    path = tmp_path / "noise.star"
    write_particles(path, ParticleStack(noise, 7.0))
    out = tmp_path / "out.star"
    done = run("orient", path, "--model", tmp_path / "model.npz", "-o", out, "-q", code=1)
    assert "noise.star" in done.stderr and "as if at random" in done.stderr
    assert not out.exists() and (tmp_path / "out.work").is_dir()


def test_from_orientations_to_a_map(folder, tmp_path):
    run("reconstruct", folder / "particles.star", "-o", tmp_path / "m.mrc", "--half-maps", "-q")
    names = {"m.mrc", "m_half1.mrc", "m_half2.mrc", "m_fsc.star"}
    assert {path.name for path in tmp_path.iterdir()} == names
    found = json.loads(
        run("evaluate", folder / "off.star", "--truth", folder / "particles.star", "--map",
            tmp_path / "m.mrc", "--reference", folder / "map.mrc", "--json").stdout
    )  # fmt: skip
    # Blobs of 9 A have little beyond 25 A that stands out of the noise.
    assert found["resolution_fsc05_angstrom"] < 25 and not found["mirrored"]
    # Normal turns of 0.1 rad an axis are 0.16 rad in the mean.
    assert found["unaligned_mean_rad"] == pytest.approx(0.16, abs=0.01)


def with_names(folder, path, change, rows=None):
    """The particles of a folder under other image names, in other rows."""
    true = read_particles(folder / "particles.star").select(slice(30))
    write_particles(path, true if rows is None else true.select(rows))
    path.write_text(re.sub(r"\S+@\S+", lambda name: change(*name[0].split("@")), path.read_text()))
    return path


def test_orientations_are_compared_image_by_image(folder, tmp_path):
    stack = (folder / "particles.mrcs").read_bytes()
    for name in ("particles", "other", "job/a/p", "job/b/p", "a/p", "b/p"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / f"{name}.mrcs").write_bytes(stack)

    def compare(first, second):
        done = run("evaluate", first, "--truth", second, "--json")
        return json.loads(done.stdout)["unaligned_mean_rad"], done.stderr

    def halves(within):
        def change(number, _):
            return f"{number}@{within}{'a' if int(number) > 15 else 'b'}/p.mrcs"

        return change

    order = np.random.default_rng(0).permutation(30)
    rows = with_names(folder, tmp_path / "1.star", lambda n, s: f"{n}@particles.mrcs")
    moved = with_names(
        folder, tmp_path / "2.star", lambda n, s: f"{int(n)}@./particles.mrcs", order
    )
    far = with_names(folder, tmp_path / "job/3.star", lambda n, s: f"{n}@../particles.mrcs", order)
    near = with_names(folder, tmp_path / "4.star", halves(""))
    deep = with_names(folder, tmp_path / "5.star", halves("job/"), order)
    for first, second in ((moved, rows), (rows, far), (deep, near)):
        assert compare(first, second) == (0, "")
    # No name in common, or one that stands twice: by row, as is said.
    other = with_names(folder, tmp_path / "6.star", lambda n, s: f"{n}@other.mrcs")
    off, note = compare(other, rows)
    assert off == 0 and "note" in note and "by row: they share no image name" in note
    twice = with_names(folder, tmp_path / "7.star", lambda n, s: "1@other.mrcs")
    off, note = compare(twice, twice)
    assert off == 0 and "by row: image names are not unique" in note


def test_orientations_of_other_images_are_not_compared(folder, tmp_path):
    shutil.copy(folder / "particles.mrcs", tmp_path)
    rows = with_names(folder, tmp_path / "1.star", lambda n, s: f"{n}@particles.mrcs")
    fewer = with_names(
        folder, tmp_path / "2.star", lambda n, s: f"{n}@particles.mrcs", np.arange(29, 3, -1)
    )
    # Some of those whose truth is known, a class say, are judged; it is said that they are some.
    done = run("evaluate", fewer, "--truth", rows, "--json")
    assert json.loads(done.stdout)["unaligned_mean_rad"] == 0
    assert "has 26 of the 30 particles of" in done.stderr
    said = run("evaluate", rows, "--truth", fewer, code=1).stderr
    assert "4 images are only in" in said and "0 only in" in said and "1.star shows 0000" in said


@pytest.mark.parametrize("kind", ["reversed", "smaller", "blurred", "last", "turned"])
def test_images_of_one_name_in_two_folders_are_told_apart(folder, tmp_path, kind):
    images = mrcfile.read(folder / "particles.mrcs")[:30]
    noise = np.random.default_rng(0).standard_normal(images.shape, dtype=np.float32)
    images = images + 5 * images.std() * noise
    other = {
        "reversed": images[::-1],
        "smaller": images[:, 4:-4, 4:-4],
        "blurred": images + np.roll(images, 1, axis=2),
        "last": np.concatenate([images[:-1], images[:1]]),
        "turned": (7 - 2 * images).astype(np.float16),
    }[kind]
    for name, values in (("A", images), ("B", other)):
        (tmp_path / name).mkdir()
        with mrcfile.new(tmp_path / name / "x.mrcs") as mrc:
            mrc.set_data(values)
            mrc.set_image_stack()
            mrc.voxel_size = read_particles(folder / "particles.star").pixel_size_angstrom
    first, second = (
        with_names(folder, tmp_path / f"{name}.star", lambda n, s, name=name: f"{n}@{name}/x.mrcs")
        for name in "AB"
    )
    size = re.compile(rf"\b{images.shape[1]}\b(?=\t2\n)")
    second.write_text(size.sub(str(other.shape[1]), second.read_text(), count=1))
    if kind == "turned":  # moved and written anew
        done = run("evaluate", first, "--truth", second, "--json")
        assert json.loads(done.stdout)["unaligned_mean_rad"] == 0 and done.stderr == ""
        return
    row = 30 if kind == "last" else 1
    done = run("evaluate", first, "--truth", second, "--json")
    assert json.loads(done.stdout)["unaligned_mean_rad"] == 0
    rows = f"row {row} of {first} and row {row} of {second} have one image name, but "
    assert rows in done.stderr and "hold different images; they are paired by name" in done.stderr


def test_what_a_map_does_not_say_is_noted_and_can_be_told(folder, tmp_path):
    cube = read_density(folder / "map.mrc")
    write_density(tmp_path / "one.mrc", dataclasses.replace(cube, voxel_size_angstrom=1.0))
    with mrcfile.new(tmp_path / "none.mrc") as mrc:
        mrc.set_data(cube.values)
    true = folder / "particles.star"
    commands = (
        ("refine", true, "--resolution", 30, "-q", "-o", tmp_path / "a.star", "--map"),
        ("evaluate", true, "--truth", true, "--map", folder / "map.mrc", "--json", "--reference"),
        ("simulate", "-n", 3, "-o", tmp_path / "b.star"),
    )
    for command in commands:
        said = run(*command, tmp_path / "none.mrc", code=1).stderr
        assert "none.mrc: its header gives no voxel size" in said and "--voxel-size" in said
        if command[0] != "simulate":  # whose particles are what the map says
            said = run(*command, tmp_path / "one.mrc").stderr
            assert "voxels of 1 A" in said and "pixels are 7 A. See --voxel-size" in said
        for name in ("none.mrc", "one.mrc"):
            assert "voxels of" not in run(*command, tmp_path / name, "--voxel-size", 7).stderr
        said = run(*command, tmp_path / "one.mrc", "--voxel-size", 0, code=1).stderr
        assert "--voxel-size: wanted a positive number of angstrom, got 0" in said
    assert read_particles(tmp_path / "b.star").pixel_size_angstrom == 7
    assert read_density(tmp_path / "a.mrc").voxel_size_angstrom == 7
    said = run("train", "4jsv", "-o", tmp_path / "m.npz", "--voxel-size", 2, code=1).stderr
    assert "--voxel-size" in said and "4jsv has its own" in said


def test_a_map_that_is_no_cube_is_padded_to_one(folder, tmp_path):
    cube = read_density(folder / "map.mrc")
    path = tmp_path / "flat.mrc"
    write_density(path, dataclasses.replace(cube, values=cube.values[4:28]))
    true = folder / "particles.star"
    note = "flat.mrc: 32 x 32 x 24 voxels; padded to a cube of 32 about their middle"
    assert note in run("simulate", path, "-n", 3, "-o", tmp_path / "b.star").stderr
    assert read_particles(tmp_path / "b.star").box_px == 32
    done = run("evaluate", true, "--truth", true, "--map", folder / "map.mrc", "--json",
               "--reference", path)  # fmt: skip
    assert note in done.stderr and json.loads(done.stdout)["mean_fsc"] > 0.95
    assert json.loads(run("info", path, "--json").stdout)["shape_zyx"] == [24, 32, 32]


def test_solvent_that_is_not_at_zero_is_taken_off(folder, tmp_path):
    """It bent every pose, and nobody was told."""
    cube = read_density(folder / "map.mrc")
    for name, level in (("off.mrc", 0.1 * cube.values.max()), ("as_it_was.mrc", 0.0)):
        write_density(tmp_path / name, dataclasses.replace(cube, values=cube.values + level))
    with pytest.warns(UserWarning, match=r"off\.mrc: its solvent is at .*, not at zero; that is"):
        found = opening.open_map(tmp_path / "off.mrc", None)
    np.testing.assert_allclose(found.values, cube.values, atol=1e-4 * cube.values.max())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = opening.open_map(tmp_path / "as_it_was.mrc", None)
    np.testing.assert_array_equal(found.values, cube.values)
    refine = ("refine", folder / "particles.star", "-o", tmp_path / "r.star", "-q",
              "--resolution", 30, "--map")  # fmt: skip
    assert "its solvent is at" in run(*refine, tmp_path / "off.mrc").stderr
    off = read_particles(tmp_path / "r.star").quaternions
    run(*refine, tmp_path / "as_it_was.mrc")
    apart = rotations.distance(off, read_particles(tmp_path / "r.star").quaternions)
    assert apart.max() < 1e-3


def test_a_map_that_is_black_on_white_is_turned_and_it_is_said(folder, tmp_path, monkeypatch):
    """A network was trained on black particles, and figures were given of an inverted map."""
    cube = read_density(folder / "map.mrc")
    black, level = tmp_path / "black.mrc", 0.1 * cube.values.max()
    write_density(black, dataclasses.replace(cube, values=level - cube.values))
    note = "black.mrc: is negative where the particle is, black on white"
    true = folder / "particles.star"
    evaluate = ("evaluate", true, "--truth", true, "--json", "--map", folder / "map.mrc",
                "--reference")  # fmt: skip
    done, plain = run(*evaluate, black), run(*evaluate, folder / "map.mrc")
    assert note in done.stderr and note not in plain.stderr
    found, wanted = (json.loads(one.stdout)["mean_fsc"] for one in (done, plain))
    assert found == pytest.approx(wanted, abs=1e-3)
    assert note in run("info", black).stderr and run("info", folder / "map.mrc").stderr == ""
    asked = []

    def train(network, source, **_):
        asked.append(is_black(source.density))
        return {"loss": [1.0], "mae_rad": [0.5], "seconds": [1.0]}

    monkeypatch.setattr(estimator.training, "train", train)
    done = run("train", black, "-o", tmp_path / "m.npz", "--images", 8, "--quiet")
    assert note in done.stderr and asked == [False]


@pytest.mark.usefixtures("quick")
def test_a_reference_that_is_off_the_middle_is_moved_there_and_it_is_said(
    folder, trained, tmp_path, phantom, monkeypatch
):
    """Ab initio ended in a map all the same, with wrong poses."""
    cube, off = phantom.density(40, 7.0), tmp_path / "off.mrc"
    noise = 0.02 * cube.values.max() * np.random.default_rng(0).standard_normal((40,) * 3)
    aside = Density(np.roll(cube.values, (3, -8, 6), axis=(0, 1, 2)) + noise, 7.0)
    write_density(off, aside)
    seen = simulate(phantom.density(32, 7.0), 200, 1, snr=1.0, max_shift_px=2)
    write_particles(tmp_path / "seen.star", seen)
    done = run("abinitio", tmp_path / "seen.star", "-o", tmp_path / "found.star", "-q",
               "--symmetry", "C1", "--reference", off)  # fmt: skip
    assert "off.mrc: its particle is" in done.stderr and "x, y, z = -35, 49, -35 A" in done.stderr
    judged = run("evaluate", tmp_path / "found.star", "--truth", tmp_path / "seen.star", "--json")
    assert json.loads(judged.stdout)["unaligned_mean_rad"] < 0.15
    moved, asked = opening.open_map(off, None, centred=True), []
    move = (-5, 7, -5)  # the phantom is a bit off the middle itself
    np.testing.assert_array_equal(moved.values, np.roll(aside.values, move, (0, 1, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it stays
        opening.open_map(folder / "map.mrc", None, centred=True)

    def train(network, source, **_):
        asked.append(source.settings["density_sha256"])
        return {"loss": [1.0], "mae_rad": [0.5], "seconds": [1.0]}

    monkeypatch.setattr(estimator.training, "train", train)
    done = run("train", off, "-o", tmp_path / "m.npz", "--images", 8, "--quiet")
    assert "off.mrc: its particle is" in done.stderr and asked == [files.sha256_of([moved.values])]
    trained[0].save(tmp_path / "model.npz")
    done = run("orient", tmp_path / "seen.star", "--model", tmp_path / "model.npz", "--reference",
               off, "-o", tmp_path / "o.star", "-q")  # fmt: skip
    assert "off.mrc: its particle is" in done.stderr


def test_a_map_has_the_symmetry_that_was_asked_for(folder, tmp_path):
    done = run("reconstruct", folder / "particles.star", "-o", tmp_path / "m.mrc", "--symmetry",
               "c2", "-q")  # fmt: skip
    assert "has not the symmetry C2" in done.stderr
    values = read_density(tmp_path / "m.mrc").values[:, 1:, 1:]  # about voxel n // 2
    at = np.indices(values.shape) - np.array([s // 2 for s in values.shape])[:, None, None, None]
    ball = np.linalg.norm(at, axis=0) < 0.4 * len(values)  # the cube's corners are not seen
    off = (values - values[:, ::-1, ::-1])[ball]
    assert np.linalg.norm(off) < 0.1 * np.linalg.norm(values[ball])


def test_refinement_brings_orientations_nearer(folder, tmp_path):
    done = run("refine", folder / "off.star", "--map", folder / "map.mrc", "--resolution", 30, "-o",
               tmp_path / "refined.star", "-q")  # fmt: skip
    assert "expected error" in done.stdout
    judge = ("evaluate", "--truth", folder / "particles.star", "--json")
    after = json.loads(run(*judge, tmp_path / "refined.star").stdout)
    assert after["unaligned_mean_rad"] < 0.08  # from 0.16
    refined = read_particles(tmp_path / "refined.star")
    true = read_particles(folder / "particles.star")
    assert np.abs(refined.shifts_px - true.shifts_px).mean() < 0.2
    assert sorted(set(refined.half_set)) == [1, 2]
    assert (tmp_path / "refined.html").exists() and (tmp_path / "refined.mrc").exists()
    noise = starfile.read(tmp_path / "refined_noise.star")["rlnSigma2Noise"]
    told = json.loads(run("info", folder / "particles.star", "--json").stdout)["noise_variance"]
    assert 2 * 32**2 * noise[5:].mean() == pytest.approx(told, rel=0.1)


def test_a_reference_that_particles_were_laid_on_stays(tmp_path, phantom):
    """Shifts as large as the map is off belong to it as it stands."""
    cube, off = phantom.density(40, 7.0), tmp_path / "off.mrc"
    aside = Density(np.roll(cube.values, (3, -8, 6), axis=(0, 1, 2)), 7.0)
    write_density(off, aside)
    seen = simulate(phantom.density(40, 7.0), 20, 1, snr=1.0)
    shifts = aside.box_px * 0.02 * np.random.default_rng(0).standard_normal((20, 2))
    for far, stays in ((1, False), (8, True)):  # 0.8 and 6.4 px, where the map is 10 px off
        laid = seen.with_poses(seen.quaternions, far * shifts)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = opening.open_map(off, None, laid, centred=True)
        assert np.array_equal(found.values, aside.values) == stays and bool(said) != stays


def test_few_particles_make_no_half_maps(folder, tmp_path):
    """A map of two particles had a resolution."""
    few = read_particles(folder / "off.star").select(slice(0, 2))
    write_particles(tmp_path / "few.star", few)
    refine, coarse = ("refine", "-o", tmp_path / "r.star"), ("--resolution", 30)
    against = (*refine, *coarse, "--map", folder / "map.mrc")
    for command in (refine, against, ("reconstruct", "-o", tmp_path / "r.mrc", "--half-maps")):
        done = run(*command, tmp_path / "few.star", "-q", code=1)
        assert "wanted at least 20 images" in done.stderr and "got 2" in done.stderr
    run("reconstruct", tmp_path / "few.star", "-o", tmp_path / "r.mrc", "-q")
    assert (tmp_path / "r.mrc").exists()


def test_refinement_goes_without_a_reference(folder, tmp_path):
    run("refine", folder / "off.star", "--rounds", 1, "-o", tmp_path / "refined.star", "-q")
    judge = ("evaluate", "--truth", folder / "particles.star", "--json")
    before = json.loads(run(*judge, folder / "off.star").stdout)
    after = json.loads(run(*judge, tmp_path / "refined.star").stdout)
    assert after["one_sided_mean_rad"] < before["one_sided_mean_rad"]
    report = (tmp_path / "refined.html").read_text()
    assert "Power of the images&#x27; noise" in report or "Power of the images' noise" in report
    assert "hand is open" in report and "hardly beyond 40 A" in report  # one round, to 30 A


def test_an_interrupted_refinement_goes_on(folder, tmp_path, monkeypatch):
    out, work = tmp_path / "refined.star", tmp_path / "refined.work"
    command = ("refine", folder / "off.star", "--rounds", 2, "-o", out, "-q")
    each, calls = halves.refine_each_half, []

    def refined(*args, **options):
        calls.append(options["resolution_angstrom"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return each(*args, **options)

    monkeypatch.setattr(halves, "refine_each_half", refined)
    run(*command, code=130)
    assert [path.name for path in tmp_path.rglob("*")] == ["refined.work", "rounds.npz"]
    run(*command)
    assert not work.exists() and len(calls) == 2 + 3  # the second round, and two that judge
    assert calls[2] == calls[1] < calls[0]
    # A file of another's in the folder stays, as what is asked anew does.
    work.mkdir()
    (work / "notes.txt").touch()
    run(*command)
    assert [path.name for path in work.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("command", ["refine", "reconstruct"])
def test_noise_that_is_there_twice_makes_no_resolution(folder, tmp_path, command):
    noise = np.random.default_rng(0).standard_normal((40, 16, 16), dtype=np.float32)
    path = tmp_path / "noise.star"
    stack = ParticleStack(noise, 14.0, quaternions=rotations.uniform(40, 1))
    write_particles(path, stack)
    twice = read_particles(path).select(np.arange(80) % 40)
    write_particles(path, twice)
    rest = {"refine": ("--rounds", 1), "reconstruct": ("--half-maps",)}[command]
    out = tmp_path / {"refine": "out.star", "reconstruct": "out.mrc"}[command]
    done = run(command, path, *rest, "-o", out, "-q")
    assert done.stderr.count("80 rows are of 40 particles") == 1
    assert float(re.search(r"([\d.]+) A at FSC 0.143", done.stdout)[1]) > 40
    if command == "refine":  # the same of given halves, and slow
        return
    write_particles(path, twice.replace(half_set=np.repeat([1, 2], 40)))
    done = run(command, path, *rest, "-o", out, "-q")
    assert done.stderr.count("40 particles stand in both half-sets") == 1


def test_training_takes_its_ranges_from_particles(folder, tmp_path):
    run("train", folder / "map.mrc", "-o", tmp_path / "m.npz", "--images", 128, "--like",
        folder / "particles.star", "--quiet")  # fmt: skip
    found = json.loads(run("info", tmp_path / "m.npz", "--json").stdout)
    assert found["preprocessing"]["frame_px"] == 32
    source = found["notes"]["source"]
    assert source["snr_range"][0] < 4 < source["snr_range"][1] and source["max_shift_px"] == 2


def test_training_takes_a_particle_that_ships(tmp_path, monkeypatch):
    # The training itself is that of the test above; here it is what it is given and what it leaves.
    asked = {}

    def train(network, source, **options):
        asked.update(options, network=network, source=source)
        return {"loss": [2.0, 1.0], "mae_rad": [1.0, 0.5], "seconds": [1.0, 2.0]}

    monkeypatch.setattr(estimator.training, "train", train)
    out = tmp_path / "m.npz"
    done = run("train", "4JSV", "-o", out, "--images", 8, "--seed", 5, "--quiet")
    assert "mean absolute error of distances 0.500 rad" in done.stdout and done.stderr == ""
    assert (asked["images"], asked["seed"], asked["checkpoint"]) == (8, 5, None)
    assert asked["network"].passes == 2 and asked["source"].max_shift_px == 8
    assert {path.name for path in tmp_path.iterdir()} == {"m.npz", "m.json"}
    told = json.loads((tmp_path / "m.json").read_text())
    command = "cryoem train 4JSV -o m.npz --symmetry C1 --images 8 --seed 5"
    assert told["command"].startswith(command)
    assert told["source"]["snr_range"] == [1 / 128, 1] and told["mae_rad"] == [1.0, 0.5]
    model = load_estimator(out)
    assert model.preprocessing.frame_px == 116 and model.symmetry == "C1"
    assert model.notes.items() <= told.items()
    found = json.loads(run("info", out, "--json").stdout)
    assert found["kind"] == "estimator" and found["notes"] == model.notes


# --------------------------------------------------------------------------------------
# What goes wrong


@pytest.fixture
def black(folder, tmp_path):
    true = read_particles(folder / "particles.star")
    write_particles(tmp_path / "black.star", true.with_images(-true.images[:]))
    return tmp_path / "black.star"


def test_black_particles_are_turned_and_it_is_said(folder, black, tmp_path, monkeypatch):
    before = black.with_suffix(".mrcs").read_bytes()
    true = read_density(folder / "map.mrc")

    def likeness(name):
        values = read_density(tmp_path / name).values
        return np.corrcoef(values.ravel(), true.values.ravel())[0, 1]

    done = run("reconstruct", black, "-o", tmp_path / "found.mrc", "-q")
    assert "black on white" in done.stderr and "turned" in done.stderr and likeness("found.mrc") > 0
    for flag, sign in (("--invert", 1), ("--no-invert", -1)):
        done = run("reconstruct", black, flag, "-o", tmp_path / "told.mrc", "-q")
        assert done.stderr == "" and likeness("told.mrc") * sign > 0
    white = folder / "particles.star"
    assert "black" not in run("reconstruct", white, "-o", tmp_path / "white.mrc").stderr
    assert likeness("found.mrc") == pytest.approx(likeness("white.mrc"), abs=1e-3)
    # What is written says so, and needs no second turn.
    map_too = ("--map", folder / "map.mrc", "--resolution", 30)
    done = run("refine", black, *map_too, "-o", tmp_path / "refined.star", "-q")
    assert "cryoemSign" in done.stderr and "RELION" in done.stderr
    done = run("reconstruct", tmp_path / "refined.star", "-o", tmp_path / "again.mrc", "-q")
    assert done.stderr == "" and likeness("again.mrc") > 0
    assert black.with_suffix(".mrcs").read_bytes() == before
    assert "turn" in run("info", black).stderr
    assert "turn" not in run("info", tmp_path / "refined.star").stderr
    history = {"loss": [1.0], "mae_rad": [1.0], "seconds": [1.0]}
    monkeypatch.setattr(estimator.training, "train", lambda *_, **__: history)
    given = run("train", folder / "map.mrc", "--like", black, "-o", tmp_path / "m.npz", "--images",
                64, "-q")  # fmt: skip
    assert "turned" in given.stderr


def test_stacks_of_the_other_contrast_are_turned_and_mixed_ones_said(folder, tmp_path):
    true = read_particles(folder / "particles.star")
    plain = run("reconstruct", folder / "particles.star", "-o", tmp_path / "plain.mrc", "-q")
    assert plain.stderr == ""
    images = true.images[:].copy()
    images[200:] *= -1
    names = [f"{i % 200 + 1}@{'white' if i < 200 else 'black'}.mrcs" for i in range(300)]
    mrcfile.write(tmp_path / "white.mrcs", images[:200])
    mrcfile.write(tmp_path / "black.mrcs", images[200:])
    write_particles(tmp_path / "two.star", true)
    text = (tmp_path / "two.star").read_text()
    rename = iter(names)
    text = re.sub(r"\S+@\S+", lambda _: next(rename), text)
    (tmp_path / "two.star").write_text(text)
    done = run("reconstruct", tmp_path / "two.star", "-o", tmp_path / "two.mrc", "-q")
    assert "100 of 300 particles are black on white (rows 201" in done.stderr
    assert "black.mrcs" in done.stderr and "white.mrcs" not in done.stderr
    a, b = (read_density(tmp_path / f"{name}.mrc").values for name in ("two", "plain"))
    np.testing.assert_allclose(a, b, atol=1e-4 * b.max())
    # In one stack there is nothing to turn them by, but what the user says.
    write_particles(tmp_path / "one.star", true.with_images(images))
    done = run("reconstruct", tmp_path / "one.star", "-o", tmp_path / "x.mrc", "-q")
    assert "100 of 300 images are black" in done.stderr and "rows 201, 202" in done.stderr
    assert "cryoemSign" in done.stderr and "the map will be wrong" in done.stderr
    told = run("info", tmp_path / "one.star")
    assert "rows 201, 202" in told.stderr and "contrast" in told.stdout and "mixed" in told.stdout
    given = ("reconstruct", tmp_path / "one.star", "--no-invert", "-o", tmp_path / "x.mrc", "-q")
    assert run(*given).stderr == ""


def test_a_contrast_that_is_not_told_is_said(tmp_path):
    noise = np.random.default_rng(0).standard_normal((40, 16, 16), np.float32)
    q = rotations.uniform(40, 1)
    write_particles(tmp_path / "a.star", ParticleStack(noise, 4.0, quaternions=q))
    given = ("reconstruct", tmp_path / "a.star", "-o", tmp_path / "a.mrc", "-q")
    assert "not to be told" in run(*given).stderr
    assert run(*given, "--invert").stderr == run(*given, "--no-invert").stderr == ""


@pytest.mark.parametrize("command", ["reconstruct", "refine"])
def test_orientations_that_are_none_are_refused(folder, tmp_path, command):
    """Those of 2D classification, and angles in radians."""
    text = (folder / "particles.star").read_text()
    columns = [line.split()[0][1:] for line in text.splitlines() if line.startswith("_rln")]
    columns = columns[columns.index("rlnImageName") :]
    at = [columns.index(f"rlnAngle{name}") for name in ("Rot", "Tilt", "Psi")]
    shutil.copy(folder / "particles.mrcs", tmp_path)
    rows = {"flat.star": lambda rot, tilt, psi: (0.0, 0.0, psi),
            "radians.star": lambda *angles: np.radians(angles)}  # fmt: skip
    for name, change in rows.items():
        lines = []
        for line in text.splitlines():
            words = line.split()
            if len(words) == len(columns):
                new = change(*(float(words[i]) for i in at))
                for i, value in zip(at, new, strict=True):
                    words[i] = repr(float(value))
            lines.append(" ".join(words) if words else line)
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    out = tmp_path / ("x.mrc" if command == "reconstruct" else "x.star")
    said = run(command, tmp_path / "flat.star", "-o", out, "-q", code=1).stderr
    assert "flat.star: all 300 particles are seen from one direction" in said
    said = run(command, tmp_path / "radians.star", "-o", out, "-q", code=1).stderr
    assert "radians.star: no angle of 300 particles is beyond 6.28" in said
    assert not out.exists()


def test_masks_are_noticed_beneath_what_is_undone(folder, tmp_path):
    """A mask's constant corners are none after a division by the CTF, or a beam's tilt."""
    run("simulate", folder / "map.mrc", "-n", 60, "--snr", 0.5, "--defocus", 1e4, 2e4, "--seed", 3,
        "-o", tmp_path / "a.star")  # fmt: skip
    stack = read_particles(tmp_path / "a.star")
    disc = np.hypot(*np.mgrid[:32, :32] - 16) < 14
    parameters = dataclasses.replace(stack.ctf_parameters, images="premultiplied")
    twice = imaging.apply_ctf(stack.images[:], stack.ctf()) * disc
    write_particles(tmp_path / "b.star",
                    stack.replace(images=twice, ctf_parameters=parameters))  # fmt: skip
    write_particles(tmp_path / "c.star", stack.replace(images=stack.images[:] * disc))
    tilted = starfile.read(tmp_path / "c.star")
    tilted["optics"]["rlnBeamTiltX"], tilted["optics"]["rlnBeamTiltY"] = 0.3, -0.2
    starfile.write(tilted, tmp_path / "c.star", overwrite=True)
    some = np.arange(60) < 20
    write_particles(
        tmp_path / "d.star",
        stack.replace(
            images=np.where(some[:, None, None], stack.images[:] * disc, stack.images[:])
        ),
    )
    whole = json.loads(run("info", tmp_path / "a.star", "--json").stdout)
    for name in "bc":
        found = json.loads(run("info", tmp_path / f"{name}.star", "--json").stdout)
        assert found["snr"] is None and found["masked_fraction"] == 1
        done = run("reconstruct", tmp_path / f"{name}.star", "-o", tmp_path / "x.mrc", "-q")
        assert f"{name}.star: the corners of the images are constant" in done.stderr
    found = json.loads(run("info", tmp_path / "d.star", "--json").stdout)
    assert found["snr"] == pytest.approx(whole["snr"], rel=0.15)
    assert found["masked_fraction"] == pytest.approx(1 / 3)
    done = run("reconstruct", tmp_path / "d.star", "-o", tmp_path / "x.mrc", "-q")
    assert "d.star: the corners of 20 of 60 images that were looked at are constant" in done.stderr


def test_names_as_long_as_they_may_be_are_written(folder, tmp_path):
    longest = tmp_path / f"{'a' * 251}.mrc"
    run("reconstruct", folder / "particles.star", "-o", longest, "-q")
    assert longest.exists()
    longer = tmp_path / f"{'a' * 248}.star"  # its half-maps would be
    said = run("refine", folder / "particles.star", "-o", longer, "-q", code=1).stderr
    assert "File name too long" in said and not [*tmp_path.glob("*.star")]
    with pytest.raises(StorageError, match="File name too long"):
        files.check_writable(tmp_path / ("a" * 256))


def test_images_that_would_drown_the_others_are_named_at_once(folder, tmp_path):
    true = read_particles(folder / "particles.star")
    images = true.images[:].copy()
    images[3] *= 1000
    images[5, 16, 16] = 1e18
    write_particles(tmp_path / "a.star", true.with_images(images))
    given = (tmp_path / "a.star", "-o")
    for command in (("reconstruct", *given, tmp_path / "x.mrc"), ("refine", *given,
                    tmp_path / "x.star")):  # fmt: skip
        done = run(*command, "-q", code=1)
        assert "a.star: 2 of 300 images" in done.stderr and "rows 4, 6 (file" in done.stderr
    assert "rows 4, 6 (file" in run("info", tmp_path / "a.star").stderr


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (1e20, "reaches beyond 1e+12"),
        (1e13, "reaches beyond 1e+12"),
        (1e-15, "reaches no further than 1e-12"),
        (1e-20, "reaches no further than 1e-12"),
    ],
)
def test_images_beyond_single_precision_are_named(folder, tmp_path, scale, says):
    """Of noise that overflowed it was said that its power must be positive."""
    few = read_particles(folder / "particles.star").select(slice(40))
    images = few.images[:]
    write_particles(tmp_path / "a.star", few.with_images(images))
    images *= np.float32(scale)
    mrcfile.write(tmp_path / "a.mrcs", images, overwrite=True, voxel_size=7.0)
    for command in (("info",), ("reconstruct", "-o", tmp_path / "x.mrc"),
                    ("abinitio", "-o", tmp_path / "x.star")):  # fmt: skip
        done = run(*command, tmp_path / "a.star", code=1)
        assert f"40 of 40 images cannot be used: each {says}" in done.stderr
    with pytest.raises(InputError, match=rf"images: image 0 {re.escape(says)}.*scale them"):
        ParticleStack(images, 7.0)


def test_all_bad_images_are_named_and_the_others_are_written_where_one_asks(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(opening, "AT_ONCE", 32**2 * 50)  # some chunks hold none
    true = read_particles(folder / "particles.star")
    images = true.images[:].copy()
    images[60] *= 100
    path, good = tmp_path / "a.star", tmp_path / "good.star"
    write_particles(path, true.with_images(images).with_half_sets(0))
    with mrcfile.open(path.with_suffix(".mrcs"), "r+") as mrc:
        mrc.data[[3, 250]], mrc.data[7, 2, 2], mrc.data[100:150] = 0, np.nan, 5
    for command in (("reconstruct", path, "-o", tmp_path / "m.mrc"),
                    ("refine", path, "-o", tmp_path / "r.star"),
                    ("abinitio", path, "-o", tmp_path / "i.star"),
                    ("solve", path, "-o", tmp_path / "s")):  # fmt: skip
        said = run(*command, "-q", code=1).stderr
        assert "a.star: 54 of 300 images cannot be used: " in said
        assert "constant: rows 4, 101, 102, " in said and "and 32 more (file a.mrcs)" in said
        assert "not finite: row 8 (file" in said and "louder" in said and ": row 61 (file" in said
        assert "cryoem info --good" in said
    assert not [*tmp_path.glob("[mri].*")] and not (tmp_path / "s").exists()
    before = path.read_bytes()
    assert "--good: " in run("info", path, "--good", path, code=1).stderr
    assert "--good" in run("info", path, "--good", tmp_path / "a.mrc", code=1).stderr
    assert "--good" in run("info", folder / "map.mrc", "--good", good, code=1).stderr
    assert path.read_bytes() == before and not good.exists()
    done = run("info", path, "--good", good, "--json")
    assert json.loads(done.stdout)["particles"] == 300 and "54 of 300 images" in done.stderr
    assert "good.star: 246 of 300 particles" in done.stderr
    left = np.setdiff1d(np.arange(300), [3, 7, 60, *range(100, 150), 250])
    kept = read_particles(good)
    np.testing.assert_array_equal(kept.images[:], images[left])
    np.testing.assert_array_equal(kept.half_set, read_particles(path).half_set[left])
    assert "cannot be used" not in run("info", good).stderr
    run("reconstruct", good, "-o", tmp_path / "m.mrc")
    with mrcfile.open(path.with_suffix(".mrcs"), "r+") as mrc:
        mrc.data[:] = 0
    said = run("info", path, code=1).stderr
    assert "300 of 300 images cannot be used" in said
    assert "none is left" in run("info", path, "--good", tmp_path / "d.star", code=1).stderr
    assert not (tmp_path / "d.star").exists()


@pytest.mark.parametrize("level", [0.3, 0.99, 3.0])
def test_a_level_of_all_or_some_images_is_taken_off_and_flat_ones_are_untouched(
    folder, tmp_path, level
):
    true = read_particles(folder / "particles.star")
    flat = opening.prepared(true, None, None, True, 0)[0]
    assert flat.images is true.images
    raised = true.images[:].copy()
    raised[:: 10 if level > 1 else 1] += level * raised.std()
    write_particles(tmp_path / "a.star", true.with_images(raised))
    with pytest.warns(UserWarning, match="background .* taken off"):
        found = opening.prepared(read_particles(tmp_path / "a.star"), None, None, True, 0)[0]
    np.testing.assert_allclose(found.images[:], imaging.flatten(raised), atol=1e-5)


def test_halves_that_share_particles_are_not_called_independent(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).standard_normal((20, 16, 16), np.float32)
    q = rotations.uniform(20, 1)
    write_particles(tmp_path / "a.star", ParticleStack(noise, 14.0, quaternions=q))
    twice = read_particles(tmp_path / "a.star").select(np.arange(40) % 20)
    write_particles(tmp_path / "twice.star", twice.replace(half_set=np.repeat([1, 2], 20)))
    done = run("refine", tmp_path / "twice.star", "-o", tmp_path / "r.star", "--rounds", 1, "-q")
    page = (tmp_path / "r.html").read_text()
    for text in (done.stdout, page):
        assert "share 20 particles" in text and "independently" not in text
    assert "20 particles stand in both" in done.stderr
    halves = ("reconstruct", tmp_path / "twice.star", "--half-maps", "-o", tmp_path / "m.mrc", "-q")
    assert "share 20 particles" in run(*halves).stdout
    # Where orientations are found anew, so are the halves.
    assert len(half_sets.shared_particles(read_particles(tmp_path / "twice.star"))) == 20
    split = []

    def begun(stack, *_):
        split.append(stack)
        raise InputError("begun")

    monkeypatch.setattr("cryoem.abinitio.initial.cut_out", begun)
    with (
        pytest.warns(UserWarning, match="of 20 particles.*put into one half"),
        pytest.raises(InputError, match="begun"),
    ):
        abinitio.ab_initio(read_particles(tmp_path / "twice.star"))
    assert len(half_sets.shared_particles(split[0])) == 0


def test_raw_counts_on_a_ramp_give_the_same_map(folder, tmp_path):
    true = read_particles(folder / "particles.star")
    ramp = np.linspace(0, 40, true.box_px, dtype=np.float32)
    scale = true.images[:].std()
    raw = 3 * true.images[:] + scale * (200 + ramp)
    write_particles(tmp_path / "raw.star", true.with_images(raw))
    done = run("reconstruct", tmp_path / "raw.star", "-o", tmp_path / "raw.mrc", "-q")
    assert "background of the images" in done.stderr and "taken off" in done.stderr
    plain = run("reconstruct", folder / "particles.star", "-o", tmp_path / "plain.mrc", "-q")
    assert plain.stderr == ""
    a, b = (read_density(tmp_path / f"{name}.mrc").values.ravel() for name in ("raw", "plain"))
    assert np.corrcoef(a, b)[0, 1] > 0.99
    told = json.loads(run("info", tmp_path / "raw.star", "--json").stdout)
    assert told["background_level"] > 5 and told["background_ramp"] > 2
    plain = json.loads(run("info", folder / "particles.star", "--json").stdout)
    assert told["snr"] == pytest.approx(plain["snr"], rel=0.05)


def test_black_particles_are_oriented_as_white_ones(folder, black, trained, tmp_path):
    trained[0].save(tmp_path / "model.npz")
    for name, particles in (("white", folder / "particles.star"), ("turned", black)):
        run("orient", particles, "--model", tmp_path / "model.npz", "-o",
            tmp_path / f"{name}.star", "-q")  # fmt: skip
    white, turned = (read_particles(tmp_path / f"{name}.star") for name in ("white", "turned"))
    assert rotations.distance(white.quaternions, turned.quaternions).max() < 1e-3
    np.testing.assert_array_equal(turned.images[:5], white.images[:5])
    kept = {path.name for path in (tmp_path / "white.work").iterdir()}
    assert kept == set(orienting.WORK)  # what no output may replace


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("info", "nothing.star"), 1, "nothing.star: no such file"),
        (("reconstruct", "{}/bare.star", "-o", "{}/x.mrc"), 1, "rlnAngleRot"),
        (("refine", "{}/cut.star", "-o", "{}/x.star"), 1, "cut.mrcs"),
        (("orient", "{}/bare.star", "--model", "4jsv", "-o", "{}/x.star"), 1, "116 px"),
        (("simulate", "{}/map.mrc", "-o", "{}/x.mrc"), 1, "ends in .star"),
        (("simulate", "{}/map.mrc", "--snr", "-1", "-o", "{}/x.star"), 1, "snr"),
        (("simulate", "{}/map.mrc", "-o", "/proc/x.star"), 1, "/proc/x"),
        (
            ("simulate", "{}/map.mrc", "--defocus", "20000", "10000", "-o", "{}/x.star"),
            1,
            "--defocus: wanted LOW HIGH, got 20000 10000",
        ),
        (("train", "{}/no.mrc", "-o", "{}/x.npz"), 1, "no.mrc: no such file"),
        (
            ("refine", "{}/few.star", "--resolution", "0", "-o", "{}/x.star"),
            1,
            "--resolution: wanted a positive number of angstrom, got 0",
        ),
        (("density", "4jsv", "--voxel-size", "nan", "-o", "{}/x.mrc"), 1, "--voxel-size: wanted"),
        (("density", "4jsv", "--resolution", "7", "-o", "{}/x.mrc"), 1, "at least 7.34 A"),
        (("density", "4jsv", "--box", "5", "-o", "{}/x.mrc"), 1, "a box of at least 42"),
        (("evaluate", "{}/few.star", "--truth", "{}/particles.star"), 1, "10 rows"),
        (("density", "nonsense", "-o", "{}/x.mrc"), 1, "nonsense"),
        (("reconstruct", "{}/few.star", "-o", "{}/x.mrc", "--symmetry", "Q3"), 1, "Q3"),
        *(
            (("simulate", "{}/map.mrc", "-o", "{}/x.star", *more), 1, says)
            for more, says in (
                (("--seed", "-1"), "--seed: wanted a whole number that is not negative, got -1"),
                (("--defocus", "0", "inf"), "--defocus: wanted LOW HIGH, got 0 inf"),
                (("--defocus", "1", "2"), "wanted angstrom (1 micrometre is 10000), got 1 2"),
                (("--noise-excess", "5"), "--noise-excess: without --snr there is no noise"),
            )
        ),
        (("info", "{}/few.star", "--seed", "-3"), 1, "--seed: wanted"),
        (("info", "{}/list.npz"), 1, "list.npz: not an estimator's file"),
        (("info", "{}/notes.txt"), 1, "notes.txt: not a kind that is known by its name"),
        (("info", "{}/few.star.gz"), 1, "few.star.gz: is compressed"),
        (("reconstruct", "{}/few.star.gz", "-o", "{}/x.mrc"), 1, "few.star.gz: is compressed"),
        # Options that would change nothing.
        (("info", "{}/map.mrc", "--pixel-size", "4"), 1, "--pixel-size: is told of particles"),
        *(
            ((command, "{}/few.star", "-o", "{}/x.star", *more), 1, says)
            for command, more, says in (
                ("refine", ("--map", "{}/map.mrc", "--rounds", "2"), "--rounds: "),
                ("refine", ("--resolution", "12"), "--resolution: is told of a map"),
                ("refine", ("--voxel-size", "7"), "--voxel-size: is told of a map"),
                ("orient", ("--model", "x.npz", "--voxel-size", "7"), "--voxel-size: is told"),
                (
                    "orient",
                    ("--model", "x.npz", "--reference", "{}/map.mrc", "--other-hand"),
                    "--other-hand: a --reference has its own hand",
                ),
                ("refine", ("--map", "{}/flat.mrc"), "flat.mrc: is 2 everywhere"),
                ("refine", ("--map", "{}/map.mrc"), "nothing is left beyond 15 A in voxels of"),
                (
                    "refine",
                    ("--map", "{}/map.mrc", "--symmetry", "D2", "--resolution", "30"),
                    "the reference has not the symmetry D2, its axes where",
                ),
                ("orient", ("--model", "4jsv", "--reference", "{}/flat.mrc"), "flat.mrc: is 2"),
                ("abinitio", ("--reference", "{}/flat.mrc"), "flat.mrc: is 2 everywhere"),
            )
        ),
        (("train", "{}/map.mrc", "--invert", "-o", "{}/x.npz"), 1, "--invert: is told of part"),
        (("train", "{}/map.mrc", "--pixel-size", "7", "-o", "{}/x.npz"), 1, "--pixel-size: is"),
        # Maps of nothing, and of no size.
        (("simulate", "{}/flat.mrc", "-o", "{}/x.star"), 1, "flat.mrc: is 2 everywhere"),
        (("simulate", "{}/vast.mrc", "-o", "{}/x.star"), 1, "vast.mrc: its header says voxels of"),
        *(
            (("evaluate", "{}/few.star", "--truth", "{}/few.star", *more), 1, says)
            for more, says in (
                (("--voxel-size", "7"), "--voxel-size: is told of a map"),
                (("--map", "{}/flat.mrc", "--reference", "{}/map.mrc"), "flat.mrc: is 2"),
                (("--map", "{}/map.mrc", "--reference", "{}/flat.mrc"), "flat.mrc: is 2"),
                (
                    ("--map", "{}/map.mrc", "--reference", "{}/twice.mrc", "--voxel-size", "7"),
                    "their headers say 7 A",
                ),
            )
        ),
        (("orient", "{}/few.star", "-o", "{}/x.star"), 2, "--model"),
        (("orient", "{}/few.star", "--bogus"), 2, "bogus"),
        (("nothing",), 2, "nothing"),
    ],
)
def test_errors_are_messages(folder, tmp_path, arguments, code, says):
    (tmp_path / "map.mrc").write_bytes((folder / "map.mrc").read_bytes())
    true = read_particles(folder / "particles.star")
    write_particles(tmp_path / "particles.star", true)
    few = true.select(slice(10))
    for name in ("few", "bare", "cut"):
        write_particles(tmp_path / f"{name}.star", few.with_images(few.images[:]))
    text = (tmp_path / "bare.star").read_text()
    (tmp_path / "bare.star").write_text(text.replace("rlnAngleRot", "rlnAngleWrong"))
    shutil.copy(tmp_path / "few.star", tmp_path / "few.star.gz")
    (tmp_path / "notes.txt").write_text("notes")
    np.savez(tmp_path / "list.npz", settings="[1]")
    cube = read_density(folder / "map.mrc").values
    for name, values, voxel in (("flat", 0 * cube + 2, 7.0), ("twice", cube, 14.0),
                                ("vast", cube, 1e4)):  # fmt: skip
        write_density(tmp_path / f"{name}.mrc", Density(values, voxel))
    stack = tmp_path / "cut.mrcs"
    stack.write_bytes(stack.read_bytes()[:-100])
    before = sorted(tmp_path.iterdir())
    done = run(*(a.replace("{}", str(tmp_path)) for a in arguments), code=code)
    assert says in done.stderr and "Traceback" not in done.output
    assert sorted(tmp_path.iterdir()) == before


def test_a_map_whose_header_is_wrong_is_taken_with_the_size_that_is_told(folder, tmp_path):
    cube = read_density(folder / "map.mrc").values
    for name, voxel in (("vast", 1e4), ("unsaid", 1.0)):
        write_density(tmp_path / f"{name}.mrc", Density(cube, voxel))
        run("simulate", tmp_path / f"{name}.mrc", "--voxel-size", 7, "-n", 3, "-o",
            tmp_path / "x.star")  # fmt: skip
        assert read_particles(tmp_path / "x.star").pixel_size_angstrom == 7
    particles = folder / "particles.star"
    run("evaluate", particles, "--truth", particles, "--map", tmp_path / "unsaid.mrc",
        "--reference", folder / "map.mrc", "--voxel-size", 7)  # fmt: skip


def test_what_a_file_holds_is_told_by_its_name_in_capitals_and_of_arrays(folder, tmp_path):
    true = read_particles(folder / "particles.star").select(slice(40))
    write_particles(tmp_path / "a.star", true.with_images(true.images[:]))
    shutil.copy(tmp_path / "a.star", tmp_path / "A2.STAR")
    np.save(tmp_path / "a.npy", true.images[:])
    for name, more in (("A2.STAR", ()), ("a.npy", ("--pixel-size", 7))):
        found = json.loads(run("info", tmp_path / name, *more, "--json").stdout)
        assert found["particles"] == 40 and found["pixel_size_angstrom"] == 7


def test_training_takes_the_pixel_size_that_is_told(folder, tmp_path, monkeypatch):
    seen = []

    def as_seen(cube, stack, seed):
        seen.append(stack.pixel_size_angstrom)
        raise InputError("begun")

    monkeypatch.setattr(orienting, "_as_seen", as_seen)
    np.save(tmp_path / "a.npy", read_particles(folder / "particles.star").images[:])
    run("train", folder / "map.mrc", "--like", tmp_path / "a.npy", "--pixel-size", 6.5, "-o",
        tmp_path / "x.npz", "-q", code=1)  # fmt: skip
    assert seen == [6.5]


def test_a_map_of_an_earlier_run_does_not_pass_for_this_ones(folder, tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((60, 32, 32), np.float32)
    stack = ParticleStack(noise, 7.0, quaternions=rotations.uniform(60, 1))
    write_particles(tmp_path / "noise.star", stack)
    maps = ["r.mrc", "r_half1.mrc", "r_half2.mrc", "r_fsc.star", "r_sharpened.mrc"]
    (tmp_path / "r.work").mkdir()
    for name in (*maps, "r_other.mrc", "r.work/rounds.npz"):
        (tmp_path / name).write_text("of an earlier run")
    done = run("refine", tmp_path / "noise.star", "--map", folder / "map.mrc", "--resolution", 40,
               "-o", tmp_path / "r.star", "-q")  # fmt: skip
    assert "no map" in done.stdout and (tmp_path / "r.star").exists()
    assert not any((tmp_path / name).exists() for name in maps)
    assert all(name in done.stderr for name in maps) and ".earlier behind" in done.stderr
    for name in maps:
        assert (tmp_path / f"{name}.earlier").read_text() == "of an earlier run"
    # What was put aside before stays, and may be the reference.
    shutil.copy(folder / "map.mrc", tmp_path / "r.mrc.earlier.2")
    for name in maps:
        (tmp_path / name).write_text("of another run")
    run("refine", tmp_path / "noise.star", "--map", tmp_path / "r.mrc.earlier.2", "--voxel-size", 7,
        "--resolution", 40, "-o", tmp_path / "r.star", "-q")  # fmt: skip
    for name in maps:
        assert (tmp_path / f"{name}.earlier").read_text() == "of an earlier run"
    assert (tmp_path / "r.mrc.earlier.3").read_text() == "of another run"
    assert (tmp_path / "r_fsc.star.earlier.2").read_text() == "of another run"
    assert filecmp.cmp(tmp_path / "r.mrc.earlier.2", folder / "map.mrc", shallow=False)
    # Neither another's file nor the rounds of a refinement without a map.
    for name in ("r_other.mrc", "r.work/rounds.npz"):
        assert (tmp_path / name).read_text() == "of an earlier run"
    (tmp_path / "m_half1.mrc").write_text("of an earlier run")
    done = run("reconstruct", tmp_path / "noise.star", "-o", tmp_path / "m.mrc", "-q")
    assert "m_half1.mrc beside" in done.stderr and (tmp_path / "m_half1.mrc").exists()


def test_an_image_that_is_none_is_named(folder, tmp_path):
    true = read_particles(folder / "particles.star")
    path = tmp_path / "a.star"
    write_particles(path, true.with_images(true.images[:]).select(slice(9)))
    with mrcfile.open(path.with_suffix(".mrcs"), "r+") as mrc:
        mrc.data[4] = 0
    done = run("reconstruct", path, "-o", tmp_path / "m.mrc", code=1)
    assert "row 5" in done.stderr and "constant" in done.stderr
    assert not (tmp_path / "m.mrc").exists()


@pytest.fixture
def inputs(folder, trained, tmp_path):
    """A map, an estimator and particles in every kind of file, their stack a link to another."""
    few = read_particles(folder / "off.star").select(slice(40))
    write_particles(tmp_path / "p.star", few.with_images(few.images[:]))
    text = (tmp_path / "p.star").read_text()
    stack = (tmp_path / "p.mrcs").read_bytes()
    (tmp_path / "one.mrc").write_bytes(stack)
    (tmp_path / "one.star").write_text(text.replace("p.mrcs", "one.mrc"))
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "two.mrcs").write_bytes(stack)
    (tmp_path / "two.mrcs").symlink_to("far/two.mrcs")
    (tmp_path / "two.star").write_text(text.replace("p.mrcs", "two.mrcs"))
    (tmp_path / "hard.mrc").hardlink_to(tmp_path / "far" / "two.mrcs")
    (tmp_path / "linked.star").symlink_to("p.star")
    (tmp_path / "map.mrc").write_bytes((folder / "map.mrc").read_bytes())
    (tmp_path / "map.mrcs").write_bytes((folder / "map.mrc").read_bytes())
    (tmp_path / "map_half2.mrc").write_bytes((folder / "map.mrc").read_bytes())
    (tmp_path / "run").mkdir()
    np.save(tmp_path / "run" / "particles.npy", few.images[:])
    trained[0].save(tmp_path / "run" / "landmarks.npz")
    trained[0].save(tmp_path / "model.npz")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("reconstruct one.star -o one.mrc", ("one.mrc", "the input")),
        ("reconstruct p.star -o p.mrcs", ("--output p.mrcs", ".mrc or .map")),
        ("reconstruct two.star -o hard.mrc", ("hard.mrc", "two.mrcs")),
        ("reconstruct p.star -o p.star", ("--output p.star", ".mrc or .map")),
        ("refine one.star -o one.star --rounds 1", ("one.star", "the input")),
        ("refine two.star -o hard.star --rounds 1", ("hard.mrc", "two.mrcs")),
        ("refine p.star -o linked.star --rounds 1", ("linked.star", "p.star")),
        ("refine p.star -o map.star --map map.mrc", ("map.mrc", "the input")),
        ("refine p.star -o map.star --map map_half2.mrc", ("map_half2.mrc", "the input")),
        ("refine p.star -o out.mrc", ("--output out.mrc", ".star")),
        ("orient p.star --model model.npz -o p.star", ("p.star", "the input")),
        ("orient p.star --model model.npz -o out.npz", ("--output out.npz", ".star")),
        ("orient run/particles.npy --model model.npz -o a.star --work run",
         ("--work: run/particles.npy", "the input")),
        ("orient p.star --model run/landmarks.npz -o a.star --work run", ("--work", "the input")),
        ("orient p.star --model model.npz -o a.star --work a.star", ("where a.star does",)),
        ("orient p.star --model model.npz -o a.star --work p.star", ("p.star", "cannot be")),
        ("orient p.star --model model.npz -o far", ("--output far", ".star")),
        ("simulate map.mrcs -o map.star", ("map.mrcs", "the input")),
        ("train map.mrc -o map.mrc", ("--output map.mrc", ".npz")),
        ("train map.mrc -o a.npz --checkpoint a.npz", ("where a.npz does",)),
        ("density 4jsv -o a.star", ("--output a.star", ".mrc or .map")),
        ("refine p.star -o nowhere.star/a.star", ()),
        ("refine p.star -o map.mrc/a.star", ("map.mrc/a.star: cannot be written",)),
        ("reconstruct p.star -o /proc/a.mrc", ("/proc/a.mrc: cannot be written",)),
    ],
)  # fmt: skip
def test_outputs_never_replace_inputs(inputs, monkeypatch, arguments, says):
    monkeypatch.chdir(inputs)
    for name in ("cryoem.reconstruction.reconstruct", "cryoem.refinement.refine_halves",
                 "cryoem.refinement.refine_against", "cryoem.recovery.orient",
                 "cryoem.simulation.simulate", "cryoem.estimator.train_on"):  # fmt: skip
        monkeypatch.setattr(name, lambda *_, name=name, **__: pytest.fail(f"{name} was begun"))
    before = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    if not says:
        with pytest.raises(pytest.fail.Exception, match="was begun"):
            CliRunner().invoke(cli.app, [*arguments.split(), "-q"], catch_exceptions=False)
    else:
        quiet = [] if arguments.startswith(("simulate", "density")) else ["-q"]
        done = run(*arguments.split(), *quiet, code=1)
        assert all(text in done.stderr for text in says), done.stderr
        assert "Traceback" not in done.output
    assert {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "arguments",
    [
        "density 4jsv -o /proc/a.mrc",
        "simulate map.mrc -o /proc/a.star",
        "train map.mrc -o /proc/a.npz -q",
        "train map.mrc -o a.npz --checkpoint /proc/a -q",
        "orient p.star --model model.npz -o /proc/a.star -q",
        "orient p.star --model model.npz -o a.star --work /proc/a -q",
        "reconstruct p.star -o /proc/a.mrc -q",
        "refine p.star -o /proc/a.star -q",
    ],
)
def test_where_nothing_can_be_written_nothing_is_begun(inputs, monkeypatch, arguments):
    monkeypatch.chdir(inputs)
    before = sorted(inputs.rglob("*"))
    done = run(*arguments.split(), code=1)
    assert re.fullmatch(r"cryoem: /proc/a\S*: cannot be written \(.*\)\n", done.stderr)
    assert done.stdout == "" and sorted(inputs.rglob("*")) == before


def test_paths_may_hold_blanks_and_stacks_may_be_links(folder, trained, tmp_path, monkeypatch):
    home, far = tmp_path / "my  data [1]", tmp_path / "it's far"
    home.mkdir()
    far.mkdir()
    monkeypatch.chdir(home)
    shutil.copy(folder / "map.mrc", home / "a map.mrc")
    trained[0].save(home / "a model.npz")
    run("simulate", "a map.mrc", "-n", 60, "--snr", 4, "-o", "some particles.star")
    shutil.move("some particles.mrcs", far / "a stack.mrcs")
    (home / "some particles.mrcs").symlink_to(far / "a stack.mrcs")
    run("orient", "some particles.star", "--model", "a model.npz", "-o", "oriented 1.star", "-q")
    run("refine", "some particles.star", "--map", "a map.mrc", "--resolution", 30, "-q",
        "-o", far / "refined 1.star")  # fmt: skip
    for found in (home / "oriented 1.star", far / "refined 1.star"):
        assert run("evaluate", found, "--truth", "some particles.star", "--json").stderr == ""
        run("reconstruct", found, "--half-maps", "-o", home / "new folder" / "a map.mrc", "-q")
        assert json.loads(run("info", found, "--json").stdout)["particles"] == 60


@pytest.mark.parametrize("command", ["abinitio", "reconstruct", "refine", "solve"])
def test_a_scheduler_that_does_not_answer_is_named(folder, tmp_path, command):
    assert distributed.config  # its defaults lie below what is set here
    out = tmp_path / {"reconstruct": "map.mrc", "solve": "out"}.get(command, "out.star")
    with dask.config.set({"distributed.comm.timeouts.connect": "500ms"}):
        refused = run(command, folder / "off.star", "-o", out, "-q",
                      "--scheduler", "tcp://127.0.0.1:1", code=1)  # fmt: skip
    assert "no Dask scheduler answers at tcp://127.0.0.1:1" in refused.stderr
    assert not out.exists()


def in_many_stacks(path, each):
    """Lay a particle file's images into stacks of so many, as RELION's are: one a micrograph."""
    stack, text = path.with_suffix(".mrcs"), path.read_text()
    images = mrcfile.read(stack)
    for i in range(len(images)):
        name = f"{i % each + 1:06d}@{path.stem}_{i // each}.mrcs"
        text = text.replace(f"{i + 1:06d}@{stack.name}", name)
    for k, start in enumerate(range(0, len(images), each)):
        mrcfile.write(path.with_name(f"{path.stem}_{k}.mrcs"), images[start : start + each])
    path.write_text(text)
    stack.unlink()


def test_the_images_alone_give_a_map_and_a_network_that_places_the_others(
    tmp_path, phantom, quick, narrow, monkeypatch
):
    """``solve`` from black particles to a refined map, no model anywhere; it goes on."""
    truth = simulate(phantom.density(32, 7.0), 300, 1, snr=3.0, max_shift_px=1)
    seen, out = tmp_path / "seen.star", tmp_path / "out"
    write_particles(seen, truth.replace(images=-truth.images))
    in_many_stacks(seen, 30)
    solve = ["solve", seen, "-o", out, "--starts", "2", "--rounds", "1", "--shift", "14",
             "--symmetry", "C1", "--images", "160", "--learn", "5120"]  # fmt: skip
    done = run(*solve)
    assert "black on white" in done.output and "places the other 140" in done.stderr
    made = {path.name for path in out.iterdir()}
    assert {"initial.star", "initial.mrc", "initial.html", "refined.star", "refined.mrc"} <= made
    part, placed = (read_particles(out / f"{name}.star") for name in ("initial", "oriented"))
    assert len(part) == 160 and len(placed) == 300
    names = placed.columns["rlnImageName"]
    assert (names == read_particles(seen).columns["rlnImageName"]).all()
    known = np.isin(names, part.columns["rlnImageName"])  # these stay where they made the map
    assert known.sum() == 160
    np.testing.assert_allclose(placed.quaternions[known], part.quaternions, atol=1e-6)
    for name, most in (("oriented", 1.2), ("refined", 0.15)):  # of the others; 2.1 by chance
        others = read_particles(out / f"{name}.star").select(~known)
        errors = evaluation.orientation_errors(others.quaternions, truth.quaternions[~known])
        assert errors.median_rad < most
    values = read_density(out / "refined.mrc").values
    assert abs(values.max()) > 3 * abs(values.min())  # the particle is white
    steps = ("initial.star", "network.npz", "oriented.star")
    before = [(out / name).stat().st_mtime_ns for name in steps]
    (out / "refined.star").unlink()
    run(*solve)
    assert [(out / name).stat().st_mtime_ns for name in steps] == before
    assert (out / "refined.star").exists()
    assert "refined.star: is there already" in run(*solve).stderr
    with monkeypatch.context() as patch:
        again = []
        patch.setattr(solving, "refine_particles", lambda start, *_, **__: again.append(start))
        kept = (out / "refined.mrc").read_bytes()
        (out / "refined.mrc").unlink()  # what goes with the particles is made again
        run(*solve, code=3)  # no map, by what stands in for the step
        assert again == [out / "oriented.star"]
        (out / "refined.mrc").write_bytes(kept)
    text = (out / "refined.star").read_text()
    (out / "refined.star").write_text(text.replace("data_particles", "\ndata_particles"))
    assert "refined.star: is not what solve wrote there" in run(*solve, code=1).output
    (out / "refined.star").write_text(text)
    with monkeypatch.context() as patch:  # so is the map's
        patch.setattr(solving, "find_maps", lambda some, initial, *_: again.append(initial) or [])
        (out / "initial.star").rename(out / "moved.star")
        assert "network.npz beside it was made of it" in run(*solve, code=1).output
        for name in ("network.npz", "oriented.star"):
            (out / name).rename(out / f"moved_{name}")
        run(*solve, code=3)  # no map, by what stands in for the step
        assert again[-1] == out / "initial.star"
        (out / "moved.star").rename(out / "initial.star")
        for name in ("network.npz", "oriented.star"):
            (out / f"moved_{name}").rename(out / name)
    with monkeypatch.context() as patch:  # what it began from was made anew
        again = []
        patch.setattr(solving, "refine_particles", lambda start, *_, **__: again.append(start))
        oriented = (out / "oriented.star").read_text()
        (out / "oriented.star").write_text(oriented + "\n")
        run(*solve)
        assert again == [out / "oriented.star"]
        (out / "oriented.star").write_text(oriented)
    assert "seed differ" in run(*solve, "--seed", "7", code=1).output
    for more, told in (
        (["--images", "400"], "are all of the 300 particles"),
        (["--classes", "2"], "no --classes beside it"),
    ):
        assert told in run(*solve, *more, code=1).output


def test_noise_ends_in_no_map_of_its_own(tmp_path, narrow):
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((120, 32, 32), np.float32)
    write_particles(
        tmp_path / "n.star", ParticleStack(noise, 7.0, quaternions=rotations.uniform(120, 1))
    )
    (tmp_path / "r.mrc").write_text("of an earlier run")
    done = run("refine", tmp_path / "n.star", "-o", tmp_path / "r.star", "--rounds", 2)
    assert "no map: see the note" in done.stdout and "of the other half" in done.stderr
    assert (tmp_path / "r.star").exists() and not (tmp_path / "r.mrc").exists()
    assert "No map: " in (tmp_path / "r.html").read_text()
    assert (tmp_path / "r.mrc.earlier").exists() and not (tmp_path / "r.work").exists()


def test_what_solve_goes_on_from_knows_what_the_images_are(folder, tmp_path):
    """Whatever their sizes and times."""
    for name in ("particles.star", "particles.mrcs"):
        shutil.copy(folder / name, tmp_path)
    path, images = tmp_path / "particles.star", tmp_path / "particles.mrcs"
    times, raw = os.stat(images), bytearray(images.read_bytes())
    before = solving._state(path, None, read_particles(path))
    images.touch()
    assert solving._state(path, None, read_particles(path)) == before
    raw[-4:] = np.array([1.5], "<f4").tobytes()
    images.write_bytes(raw)
    os.utime(images, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert solving._state(path, None, read_particles(path)) != before


def test_copies_of_images_are_in_one_half(folder, tmp_path):
    """Whatever their names: half-maps would agree on their noise."""
    stack = read_particles(folder / "particles.star").select(np.tile(np.arange(40), 2))
    bare = ParticleStack(np.asarray(stack.images), 7.0, quaternions=stack.quaternions)
    for name, half_set, told in (
        ("a", None, "80 rows are of 40 particles, by their names, places or pictures"),
        ("b", np.repeat([1, 2], 40), "40 particles stand in both half-sets, such as those of rows"),
    ):
        write_particles(tmp_path / f"{name}.star", bare.replace(half_set=half_set))
        done = run("reconstruct", tmp_path / f"{name}.star", "--half-maps", "-q", "-o",
                   tmp_path / f"{name}.mrc")  # fmt: skip
        assert done.stderr.count(told) == 1


@pytest.mark.parametrize(
    ("command", "option", "value", "told"),
    [
        ("abinitio", "--shift", "inf", "0 to 100000 angstrom, got inf"),
        ("abinitio", "--shift", "-1", "0 to 100000 angstrom, got -1"),
        ("simulate", "--shift", "inf", "0 to 100000 pixels, got inf"),
        ("simulate", "--voxel-size", "1e6", "0.1 to 100 angstrom"),
        ("density", "--voxel-size", "0.001", "0.1 to 100 angstrom"),
        ("density", "--resolution", "1e9", "0.1 to 100 angstrom"),
    ],
)
def test_an_option_beyond_its_bounds_is_refused(folder, tmp_path, command, option, value, told):
    first = {"abinitio": folder / "particles.star", "simulate": folder / "map.mrc"}
    output = tmp_path / ("a.mrc" if command == "density" else "a.star")
    done = run(command, first.get(command, "4jsv"), "-o", output, f"{option}={value}", code=1)
    assert f"{option}: wanted {told}" in done.output and not output.exists()


def test_what_solve_goes_on_from_knows_the_passthrough_files(tmp_path):
    """The CTF may stand there; of a STAR file nothing is read beside it."""
    particles, beside = tmp_path / "J1_particles.cs", tmp_path / "J1_passthrough_particles.cs"
    for path in (particles, beside, tmp_path / "particles.star"):
        path.write_text("some")
    stack = ParticleStack(np.ones((2, 8, 8)), 4.0, origin=ParticleFile(particles, {}, ()))
    before = solving._state(particles, None, stack)
    files = [str(particles.resolve()), str(beside.resolve()), "images"]
    assert [name for name, *_ in before] == files
    beside.write_text("others")
    assert solving._state(particles, None, stack) != before
    assert len(solving._state(tmp_path / "particles.star", None, stack)) == 2


@pytest.mark.parametrize(
    ("asked", "keras", "classes", "learned"),
    [
        (None, True, 1, solving.IMAGES),
        (None, False, 1, 0),  # TensorFlow is an extra: what ran before still runs
        (None, True, 2, 0),
        (0, True, 1, 0),
        (500, True, 1, 500),
    ],
)
def test_a_network_learns_where_it_pays_and_can(asked, keras, classes, learned, monkeypatch):
    monkeypatch.setattr(solving.importlib.util, "find_spec", lambda name: keras or None)
    told = initial.Told(None, 8, classes, None, None, None, 1000, None, 0)
    many, few = range(1000 + solving.WORTH), range(999 + solving.WORTH)
    missing = not keras and asked is None
    says = pytest.warns(UserWarning, match="Keras is not") if missing else contextlib.nullcontext()
    with says:
        assert solving._images_to_learn(asked, told, many) == learned
    if asked is None:
        assert solving._images_to_learn(None, told, few) == 0


def test_masked_images_are_refused_before_anything_is_computed(tmp_path, phantom):
    stack = simulate(phantom.density(32, 7.0), 60, 1, snr=1.0)
    middle = np.hypot(*np.mgrid[-16:16, -16:16]) < 13
    write_particles(tmp_path / "masked.star", stack.replace(images=stack.images * middle))
    refused = run("solve", tmp_path / "masked.star", "-o", tmp_path / "out", "--images", 30,
                  "--learn", 100, "-q", code=1)  # fmt: skip
    assert "cannot learn their noise" in refused.output
    assert not (tmp_path / "out" / "initial.star").exists()


def test_noise_ends_in_no_map(tmp_path, quick):
    """An exit code of its own, the reasons, and nothing that looks like a result."""
    noise = np.random.default_rng(0).standard_normal((120, 32, 32)).astype(np.float32)
    write_particles(tmp_path / "noise.star", ParticleStack(noise, 5.0))
    earlier = [tmp_path / name for name in ("none.star", "none.mrc", "none_half2.mrc")]
    (tmp_path / "none.mrcs").write_text("images that a particle file names")
    for path in earlier:
        path.write_text("of an earlier run")
    done = run(
        "abinitio", tmp_path / "noise.star", "-o", tmp_path / "none.star", "--starts", "2",
        "--diameter", "110", "--shift", "0", "-q", code=3,
    )  # fmt: skip
    assert "no map" in done.output
    page = (tmp_path / "none.html").read_text()
    (alike,) = {int(share) for share in re.findall(r"(\d+)% of the images alike", page)}
    assert alike < 20 and "<img" not in page
    assert not (tmp_path / "none.star").exists() and not (tmp_path / "none.mrc").exists()
    assert all(path.with_name(f"{path.name}.earlier").exists() for path in earlier)
    assert (tmp_path / "none.mrcs").exists()


def test_two_particles_in_one_file_are_sorted_and_solved(tmp_path, phantom, quick):
    """``--classes``: every row stands in one of the files, and the largest class is refined."""
    densities = phantom.density(32, 7.0), Phantom.random(4).density(32, 7.0)
    stacks = [simulate(d, n, 1, snr=3.0) for d, n in zip(densities, (200, 120), strict=True)]
    images = np.concatenate([stack.images / stack.images.std() for stack in stacks])
    both = ParticleStack(images, 7.0).with_columns({"cryoemTruth": np.repeat([1, 2], [200, 120])})
    write_particles(tmp_path / "both.star", both)
    out = tmp_path / "out"
    solve = ["solve", tmp_path / "both.star", "-o", out, "--starts", "2", "--rounds", "1", "-q"]
    run(*solve, "--classes", "2", "--shift", "0", "--symmetry", "C1")
    parts = {
        number: read_particles(path)
        for number in (0, 1, 2)
        if (path := out / f"initial_class{number}.star").exists()
    }
    assert sum(map(len, parts.values())) == len(both)
    for number in (1, 2):
        columns = parts[number].columns
        assert set(columns["rlnClassNumber"]) == {number}
        assert np.mean(columns["cryoemTruth"] == number) > 0.9
        assert 0.9 < columns["cryoemClassProbability"].mean() <= 1
        assert (out / f"initial_class{number}.mrc").exists()
    assert len(read_particles(out / "refined.star")) == len(parts[1])
    assert "is there already" in run(*[a for a in solve if a != "-q"], "--classes", "2",
                                     "--shift", "0", "--symmetry", "C1").stderr  # fmt: skip
    refused = run(*solve, "--classes", "2", "--reference", "4jsv", code=1)
    assert "no --classes beside it" in refused.output


def test_a_map_at_hand_is_begun_with(tmp_path, phantom, quick):
    """``--reference``: its frame and its hand, whatever its scale; the images say the rest."""
    density = phantom.density(32, 7.0)
    known = dataclasses.replace(density, values=500 * density.low_passed(30).values)
    write_density(tmp_path / "known.mrc", known)
    write_particles(tmp_path / "seen.star", simulate(density, 200, 1, snr=1.0, max_shift_px=2))
    run("abinitio", tmp_path / "seen.star", "-o", tmp_path / "found.star", "-q",
        "--reference", tmp_path / "known.mrc")  # fmt: skip
    judged = run("evaluate", tmp_path / "found.star", "--truth", tmp_path / "seen.star", "--json")
    assert json.loads(judged.stdout)["unaligned_mean_rad"] < 0.15
    page = (tmp_path / "found.html").read_text()
    assert "Begun with known.mrc" in page and "2 of 2 starts" in page
    assert "The hand is that of the reference" in page
    gone = run("abinitio", tmp_path / "seen.star", "-o", tmp_path / "x.star", "--reference",
               "nowhere.pdb", code=1)  # fmt: skip
    assert "nowhere.pdb: no such file" in gone.output
    told = run("abinitio", tmp_path / "seen.star", "-o", tmp_path / "x.star", "--voxel-size", 7,
               code=1)  # fmt: skip
    assert "--voxel-size" in told.output
