import gzip
import http.server
import re
import shutil
import threading
import warnings

import gemmi
import mrcfile
import numpy as np
import pytest
from measures import correlation, relative_error
from scipy.spatial.transform import Rotation

from cryoem import density, rotations, structures
from cryoem.density import Density
from cryoem.errors import CryoemError, DownloadError, InputError
from cryoem.io import files
from cryoem.symmetry import group

# --------------------------------------------------------------------------------------
# Files are written whole or not at all


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.atomic(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_write_replaces_the_old_file(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    for text in ("first", "second"):
        with files.atomic(path) as temporary:
            assert temporary.suffix == path.suffix
            temporary.write_text(text)
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_the_hash_of_abc_is_the_standards(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea")


# --------------------------------------------------------------------------------------
# A density is a finite array with a voxel size


@pytest.mark.parametrize(
    ("values", "voxel"),
    [
        (np.zeros((4, 4)), 1.0),
        (np.zeros((4, 0, 4)), 1.0),
        (np.full((2, 2, 2), np.nan), 1.0),
        (np.full((2, 2, 2), np.inf), 1.0),
        (np.zeros((2, 2, 2)), 0.0),
        (np.zeros((2, 2, 2)), -3.0),
        (np.zeros((2, 2, 2)), np.nan),
    ],
)
def test_what_is_no_density_is_refused(values, voxel):
    with pytest.raises(InputError):
        Density(values, voxel)


def test_a_slab_has_no_box():
    with pytest.raises(InputError, match="a cube"):
        _ = Density(np.zeros((4, 5, 6)), 1.0).box_px


@pytest.mark.parametrize("shape", [(5, 6, 7), (8, 8, 8), (9, 4, 11)])
@pytest.mark.parametrize("box", [3, 4, 10, 13])
def test_the_origin_stays_the_origin_in_another_box(shape, box):
    values = np.random.default_rng(0).random(shape)
    moved = Density(values, 2.0).in_box(box)
    assert moved.values.shape == (box,) * 3
    origin = tuple(n // 2 for n in shape)
    assert moved.values[box // 2, box // 2, box // 2] == np.float32(values[origin])


@pytest.mark.parametrize(("box", "size"), [(40, 32), (40, 33), (41, 32), (41, 33), (32, 40)])
def test_resampling_is_sampling_anew(phantom, box, size):
    voxel = 5.5 * 40 / box
    there = phantom.density(box, voxel).resampled(size)
    expected = phantom.density(size, voxel * box / size)
    assert there.voxel_size_angstrom == pytest.approx(expected.voxel_size_angstrom)
    # Interpolation: what the coarser of the two grids cannot carry is a few 1e-3.
    assert relative_error(there.values, expected.values) < 1e-2


def test_a_low_pass_removes_what_is_finer_and_keeps_what_is_coarser(phantom):
    noisy = phantom.density(40, 5.5)
    noise = np.random.default_rng(0).standard_normal((40,) * 3).astype(np.float32)
    passed = Density(noise, 5.5).low_passed(22.0)
    power = np.abs(np.fft.fftn(passed.values)) ** 2
    k = np.sqrt(sum(f**2 for f in np.meshgrid(*[np.fft.fftfreq(40, 5.5)] * 3, indexing="ij")))
    # float32: 1e-5 of the amplitude, squared, with room.
    assert power[k > 1 / 22.0].max() < 1e-8 * power.max()
    kept = np.abs(np.fft.fftn(noise))[k < 0.79 / 22.0]
    np.testing.assert_allclose(np.sqrt(power[k < 0.79 / 22.0]), kept, rtol=1e-3, atol=1e-2)
    assert noisy.low_passed(22.0).voxel_size_angstrom == 5.5


# --------------------------------------------------------------------------------------
# The phantom


def test_a_centred_blob_projects_to_the_same_disc_from_everywhere():
    blob = density.Phantom(np.zeros((1, 3)), np.array([9.0]), np.array([2.0]))
    q = np.random.default_rng(0).standard_normal((5, 4))
    images = blob.project(q / np.linalg.norm(q, axis=1, keepdims=True), 21, 4.0)
    np.testing.assert_allclose(images, np.broadcast_to(images[0], images.shape), atol=1e-12)
    assert images[0].max() == images[0, 10, 10]
    # The line through the centre: weight x sigma x sqrt(2 pi), in voxels.
    assert images[0, 10, 10] == pytest.approx(2 * 9 * np.sqrt(2 * np.pi) / 4, rel=1e-12)


@pytest.mark.parametrize("box", [40, 41])
def test_the_phantoms_sum_over_z_is_its_projection(phantom, box):
    image = phantom.project([[0, 0, 0, 1.0]], box, 5.5)[0]
    # A sum over samples of Gaussians at least 1.3 voxels wide: exact to 1e-4, in float32.
    assert relative_error(phantom.density(box, 5.5).values.sum(axis=0), image) < 1e-3


def test_a_phantom_depends_on_its_seed_alone():
    a, b, c = (density.Phantom.random(seed).centres_angstrom for seed in (3, 3, 4))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)


# --------------------------------------------------------------------------------------
# Atomic models


@pytest.mark.parametrize(("name", "atoms"), [("4jsv", 11_097), ("1i10", 4 * 2_622)])
def test_shipped_particles_have_their_atoms(name, atoms):
    assert structures.load(name).count_atom_sites() == atoms


def test_mtor_weighs_147_kda():
    assert structures.load("4JSV").calculate_mass() == pytest.approx(147e3, rel=5e-3)


@pytest.mark.parametrize("name", list(structures.SHIPPED))
def test_the_centre_of_mass_is_the_origin(shipped, name):
    values = shipped[name].values.astype(float)
    for axis in range(3):
        profile = values.sum(axis=tuple(a for a in range(3) if a != axis))
        centre = np.sum(np.arange(116) * profile) / profile.sum()
        # Electrons and mass are not quite proportional; the grid adds a few hundredths.
        assert centre == pytest.approx(58, abs=0.1)


def rotated_by_a_half_turn(values, axis):
    others = [a for a in range(3) if a != axis]
    return np.roll(np.flip(values, others), [1, 1], others)


def test_lactate_dehydrogenase_has_its_three_two_folds(shipped):
    values = shipped["1i10"].values
    for axis in range(3):
        assert correlation(rotated_by_a_half_turn(values, axis), values) > 0.999


def test_mtor_has_no_two_folds(shipped):
    values = shipped["4jsv"].values
    for axis in range(3):
        assert correlation(rotated_by_a_half_turn(values, axis), values) < 0.8


def test_the_box_may_be_odd(shipped):
    odd = structures.load_density("4jsv", box_px=99)
    assert relative_error(odd.values, shipped["4jsv"].in_box(99).values) < 1e-6


def test_the_sum_of_a_density_does_not_depend_on_its_sampling():
    model = structures.load("4jsv")
    totals = [
        density.from_atoms(model, voxel_size_angstrom=v, resolution_angstrom=14.0).values.sum(
            dtype=float
        )
        * v**3
        for v in (5.0, 7.0)
    ]
    # The grid under the atoms is cut at their edge: parts in a thousand.
    assert totals[0] == pytest.approx(totals[1], rel=3e-3)


def test_a_resolution_is_a_blur():
    model = structures.load("4jsv")
    sharp, blurred = (
        density.from_atoms(model, voxel_size_angstrom=5.0, resolution_angstrom=d, box_px=48)
        for d in (10.0, 30.0)
    )
    k = np.fft.fftfreq(48, 5.0)
    k2 = sum(f**2 for f in np.meshgrid(k, k, k, indexing="ij"))
    band = (k2 > 0) & (k2 < 0.03**2)
    ratio = np.abs(np.fft.fftn(blurred.values)[band]) / np.abs(np.fft.fftn(sharp.values)[band])
    expected = np.exp(-2 * np.pi**2 * 0.225**2 * (30.0**2 - 10.0**2) * k2[band])
    # Single weak frequencies carry rounding; the median does not.
    assert np.median(ratio / expected) == pytest.approx(1, abs=1e-2)


def test_loading_leaves_the_model_alone():
    model = structures.load("4jsv")
    before = [a.pos.tolist() for c in model for r in c for a in r][:5]
    density.from_atoms(model, voxel_size_angstrom=8.0)
    assert [a.pos.tolist() for c in model for r in c for a in r][:5] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"voxel_size_angstrom": 4.0, "box_px": 20}, "does not fit.*at least"),
        ({"voxel_size_angstrom": 4.0, "resolution_angstrom": 7.0}, "finer"),
        ({"voxel_size_angstrom": 0.0}, "positive"),
        ({"voxel_size_angstrom": -1.0}, "positive"),
    ],
)
def test_a_box_or_resolution_that_cannot_hold_the_particle_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        density.from_atoms(structures.load("4jsv"), **options)


def atom_line(serial, name, residue, number, xyz, element, kind="ATOM"):
    x, y, z = xyz
    return (
        f"{kind:<6}{serial:>5} {name:<4} {residue:>3} A{number:>4}    "
        f"{x:8.3f}{y:8.3f}{z:8.3f}  1.00 20.00          {element:>2}\n"
    )


def test_old_pdb_files_name_themselves_where_elements_stand(tmp_path):
    lines = []
    for i, name in enumerate([" N", " CA", " C", " O"]):
        line = atom_line(i + 1, name, "GLY", 1, (i * 1.5, 0, 0), "").rstrip("\n")
        lines.append(f"{line[:72]:<72}1OLD{i + 1:4d}\n")
    path = tmp_path / "old.pdb"
    path.write_text("".join(lines) + "END\n")
    model = density.read_structure(path)
    assert [a.element.name for c in model for r in c for a in r] == ["N", "C", "C", "O"]


@pytest.mark.parametrize(
    ("filename", "content", "message"),
    [
        ("a.pdb", b"", "no atoms"),
        ("a.cif", b"", "a.cif"),
        ("a.pdb", b"This is a letter, not a structure.\n", "no atoms"),
        ("a.cif", b"This is a letter, not a structure.\n", "not a readable"),
        ("a.pdb.gz", b"not gzipped at all", "a.pdb.gz"),
        ("a.pdb", bytes(range(256)) * 40, "a.pdb"),
        ("a.pdb", atom_line(1, " O", "HOH", 1, (0, 0, 0), "O", "HETATM").encode(), "water"),
        ("a.pdb", atom_line(1, " Q", "UNK", 1, (0, 0, 0), "X").encode(), "no known element"),
    ],
)
def test_what_is_no_structure_is_refused_by_name(tmp_path, filename, content, message):
    path = tmp_path / filename
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        density.read_structure(path)


def test_a_truncated_archive_is_refused(tmp_path):
    path = tmp_path / "cut.pdb.gz"
    path.write_bytes((structures.DATA / "4JSV.pdb.gz").read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"cut\.pdb\.gz"):
        density.read_structure(path)


def test_an_unknown_assembly_is_refused_and_the_known_are_listed():
    with pytest.raises(InputError, match="no assembly '9'; it has 1"):
        density.read_structure(structures.DATA / "4JSV.pdb.gz", assembly="9")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        density.read_structure(tmp_path / "none.pdb")


# --------------------------------------------------------------------------------------
# Structures by name


def test_a_name_may_be_a_path():
    model = structures.load(structures.DATA / "1i10_A.pdb.gz")
    assert model.count_atom_sites() == 2_622


@pytest.mark.parametrize("name", ["ribosome", "abcd", "4jsvx", "no/such/file.pdb"])
def test_an_unknown_name_is_refused_and_the_shipped_are_listed(name):
    with pytest.raises(InputError, match="4jsv, 1i10"):
        structures.load(name)


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    shutil.copytree(structures.DATA, folder)
    monkeypatch.setattr(structures, "DATA", folder)
    path = folder / "1i10_A.pdb.gz"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InputError, match="not the file that was shipped"):
        structures.load("1i10")
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        structures.load("1i10")
    with pytest.raises(InputError, match="SHA256SUMS"):
        structures.shipped_file("other.pdb")


def oligomer(symmetry, noise=0.0):
    """Random chains, each turned into the next by a group about axes of no particular direction."""
    rng = np.random.default_rng(3)
    turns = Rotation.from_quat(group(symmetry).elements)
    tilt = Rotation.from_quat(rotations.uniform(1, 5)[0])
    atoms = rng.normal((25, 7, 4), 10, (12, 3))
    model = gemmi.Model(1)
    for i, turn in enumerate(turns):
        chain = gemmi.Chain(str(i))
        for k, at in enumerate(tilt.apply(turn.apply(atoms)) + np.array([30, -20, 10])):
            residue, atom = gemmi.Residue(), gemmi.Atom()
            residue.name, residue.seqid = "ALA", gemmi.SeqId(k + 1, " ")
            atom.name, atom.element = "CA", gemmi.Element("C")
            atom.pos = gemmi.Position(*(at + rng.normal(0, noise, 3)))
            residue.add_atom(atom)
            chain.add_residue(residue)
        model.add_chain(chain)
    return model


def positions(model):
    return np.array([[a.pos.tolist() for r in c for a in r] for c in model])


@pytest.mark.parametrize("symmetry", ["C2", "C3", "C4", "D2", "D3", "D4", "T", "O", "I"])
def test_an_oligomer_is_laid_on_its_axes(symmetry):
    given = oligomer(symmetry, noise=0.1)
    found = positions(structures.standard(given, symmetry))
    for element in group(symmetry).elements:
        turned = Rotation.from_quat(element).apply(found.reshape(-1, 3))
        away = np.linalg.norm(turned[:, None] - found.reshape(-1, 3), axis=2).min(axis=1)
        assert away.max() < 1e-6
    # Nothing but moved: chains are as far from each other as they were.
    spread = [np.linalg.norm(p.mean(axis=1) - p.mean(axis=(0, 1)), axis=1) for p in
              (positions(given), found)]  # fmt: skip
    np.testing.assert_allclose(*spread, atol=0.3)
    assert not np.allclose(found, found[:, :, ::-1])


def test_what_is_no_such_oligomer_is_refused():
    with pytest.raises(InputError, match="4 like chains, got 2"):
        structures.standard(structures.load("4jsv"), "D2")
    with pytest.raises(InputError, match="not related by D2"):
        structures.standard(oligomer("C4"), "D2")
    with pytest.raises(InputError, match="not related by C4"):
        structures.standard(oligomer("D2"), "C4")
    with pytest.raises(InputError, match="not related by T"):
        structures.standard(oligomer("D6"), "T")
    lacking = oligomer("C2")
    for residue in lacking[1]:
        residue[0].name = "CB"
    with pytest.raises(InputError, match="share 0 C-alpha"):
        structures.standard(lacking, "C2")


def small_cif():
    lines = [atom_line(i + 1, f" {e}", "GLY", 1, (1.5 * i, 0, 0), e) for i, e in enumerate("NC")]
    return gemmi.read_pdb_string("".join(lines)).make_mmcif_document().as_string()


@pytest.fixture
def server(monkeypatch):
    """A web server on loopback: (address, replies by path, paths asked for)."""
    replies, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            queue = replies.get(self.path, [(404, b"")])
            status, body = queue.pop(0) if len(queue) > 1 else queue[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/{{id}}.cif.gz", replies, asked
    running.shutdown()
    running.server_close()
    thread.join()


GOOD = gzip.compress(small_cif().encode())


def test_an_entry_is_downloaded_once(server, tmp_path):
    url, replies, asked = server
    replies["/1abc.cif.gz"] = [(200, GOOD)]
    path = structures.fetch("1ABC", url=url, cache=tmp_path)
    assert density.read_structure(path).count_atom_sites() == 2
    assert structures.fetch("1abc", url=url, cache=tmp_path) == path
    assert asked == ["/1abc.cif.gz"]


def test_a_failing_server_is_asked_again(server, tmp_path):
    url, replies, asked = server
    replies["/1abc.cif.gz"] = [(500, b""), (200, GOOD)]
    assert structures.fetch("1abc", url=url, cache=tmp_path).exists()
    assert len(asked) == 2


def test_an_unknown_entry_is_not_asked_for_again(server, tmp_path):
    url, _, asked = server
    with pytest.raises(DownloadError, match=r"'9zzz'.*unknown"):
        structures.fetch("9zzz", url=url, cache=tmp_path)
    assert len(asked) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "reply",
    [
        (200, b"<html>Please log in</html>"),
        (200, gzip.compress(b"<html>Please log in</html>")),
        (200, gzip.compress(b"")),
        (200, GOOD[:-20]),
        (500, b""),
    ],
    ids=["html", "gzipped html", "nothing", "cut short", "always 500"],
)
def test_what_is_no_structure_is_not_kept(server, tmp_path, reply):
    url, replies, asked = server
    replies["/1abc.cif.gz"] = [reply]
    with pytest.raises(DownloadError, match="after 2 tries"):
        structures.fetch("1abc", url=url, cache=tmp_path, retries=1)
    assert len(asked) == 2
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(DownloadError):
        structures.fetch("1abc", url="http://127.0.0.1:9/{id}.cif.gz", cache=tmp_path, retries=0)


def test_all_errors_have_one_base():
    assert issubclass(InputError, CryoemError) and issubclass(InputError, ValueError)
    assert issubclass(DownloadError, CryoemError) and issubclass(DownloadError, OSError)


# --------------------------------------------------------------------------------------
# MRC maps

VALUES = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)


def write(path, values, voxel=3.0, **header):
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(values)
        if values.ndim == 3:
            mrc.set_volume()
        mrc.voxel_size = voxel
        for key, value in header.items():
            mrc.header[key] = value
    return path


def test_a_map_round_trips(tmp_path):
    path = tmp_path / "deep" / "a.mrc"
    density.write_density(path, Density(VALUES, 3.67))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = density.read_density(path)
    np.testing.assert_array_equal(back.values, VALUES)
    assert back.voxel_size_angstrom == 3.67
    with mrcfile.open(path) as mrc:
        assert (int(mrc.header.mode), int(mrc.header.ispg)) == (2, 1)
        assert mrcfile.validate(path)


def test_a_map_on_a_skewed_grid_is_refused(tmp_path):
    path = write(tmp_path / "a.mrc", VALUES)
    raw = bytearray(path.read_bytes())
    raw[60:64] = np.array(120, "<f4").tobytes()
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"a\.mrc: cell angles of .*120.*grid of right angles"):
        density.read_density(path)


@pytest.mark.parametrize("voxel", [1.06, 0.8321, 0.9912, 2.489, 3.67, 13.25])
def test_a_voxel_size_keeps_its_digits_and_gets_no_more(tmp_path, voxel):
    # The header has it in single precision, times the edge: 3.6700000105 for 3.67.
    for box in (5, 32, 34, 41, 116):
        path = tmp_path / "a.mrc"
        density.write_density(path, Density(np.zeros((box, 1, 1)), voxel))
        assert density.read_density(path).voxel_size_angstrom == voxel


def test_a_gzipped_map_is_read(tmp_path):
    plain = write(tmp_path / "a.mrc", VALUES)
    packed = tmp_path / "a.mrc.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    np.testing.assert_array_equal(density.read_density(packed).values, VALUES)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.float16])
def test_maps_of_other_numbers_are_read(tmp_path, dtype):
    values = (VALUES * 100).astype(dtype)
    np.testing.assert_array_equal(
        density.read_density(write(tmp_path / "a.mrc", values)).values, values
    )


@pytest.mark.parametrize("order", [(3, 2, 1), (2, 3, 1), (3, 1, 2), (1, 3, 2), (2, 1, 3)])
def test_axes_are_brought_into_order(tmp_path, order):
    # Columns, rows and sections of the file run along the axes `order` (1 is x).
    stored = VALUES.transpose([3 - axis for axis in reversed(order)])
    mapc, mapr, maps = order
    path = write(tmp_path / "a.mrc", stored, mapc=mapc, mapr=mapr, maps=maps)
    with pytest.warns(UserWarning, match="axis order"):
        found = density.read_density(path)
    np.testing.assert_array_equal(found.values, VALUES)


def test_a_stack_is_read_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="ispg 0"):
        found = density.read_density(write(tmp_path / "a.mrc", VALUES, ispg=0))
    np.testing.assert_array_equal(found.values, VALUES)


def test_a_voxel_size_overrides_the_header(tmp_path):
    path = write(tmp_path / "a.mrc", VALUES, voxel=0.0)
    assert density.read_density(path, voxel_size_angstrom=2.5).voxel_size_angstrom == 2.5


def spoilt(values):
    values = values.copy()
    values[1, 2, 3] = np.nan
    return values


@pytest.mark.parametrize(
    ("values", "voxel", "message"),
    [
        (VALUES, 0.0, "no voxel size"),
        (VALUES, (3.0, 3.0, 4.0), "must be cubes"),
        (VALUES[0], 3.0, "three-dimensional"),
        (VALUES.astype(np.complex64), 3.0, "real values"),
        (spoilt(VALUES), 3.0, "finite"),
    ],
    ids=["no voxel size", "bricks", "an image", "a transform", "NaN"],
)
def test_a_map_that_is_no_density_is_refused_by_name(tmp_path, values, voxel, message):
    path = write(tmp_path / "a.mrc", values, voxel)
    with pytest.raises(InputError, match=rf"a\.mrc.*{message}"):
        density.read_density(path)


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 5000], ids=["empty", "short", "text"])
def test_what_is_no_map_is_refused(tmp_path, content):
    path = tmp_path / "a.mrc"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.mrc"):
        density.read_density(path)


@pytest.mark.parametrize("name", ["a.mrc", "a.mrc.gz"])
def test_a_truncated_map_is_refused(tmp_path, name):
    whole = write(tmp_path / "whole.mrc", VALUES).read_bytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(whole)[:-40] if name.endswith("gz") else whole[:-40])
    with pytest.raises(InputError, match=r"a\.mrc"):
        density.read_density(path)


@pytest.mark.parametrize(
    ("start", "origin", "says"),
    [
        ((0, 0, 0), (0, 0, 0), None),
        ((-3, -2, -2), (0, 0, 0), None),
        ((0, 0, 0), (-9, -7.5, -6), None),
        ((-3, -3, -2), (-9, -6, -6), None),
        ((7, 0, 0), (0, 0, 0), r"voxel \[7, 0, 0\]"),
        ((-3, -2, 2), (0, 0, 0), r"voxel \[-3, -2, 2\]"),
        ((0, 0, 0), (30, 30.5, 30), r"origin of its header, \(30, 30.5, 30\) A"),
        ((0, 0, 0), (0, 0, np.nan), r"origin of its header, \(0, 0, nan\) A"),
    ],
)
def test_a_start_that_is_not_used_is_said(tmp_path, start, origin, says):
    fields = dict(zip(("nxstart", "nystart", "nzstart"), start, strict=True))
    write(tmp_path / "a.mrc", VALUES, **fields)
    with mrcfile.open(tmp_path / "a.mrc", "r+") as mrc:
        mrc.header.origin = origin
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        density.read_density(tmp_path / "a.mrc")
    assert len(notes) == (says is not None)
    for note in notes:
        assert re.search(f"a.mrc: .*{says}.* is not used", str(note.message))
