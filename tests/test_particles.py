"""The particle stack itself: what every step takes and returns."""

import pickle
import re
import shutil
import warnings
from dataclasses import FrozenInstanceError, dataclass, field, fields
from pathlib import Path

import numpy as np
import pytest
from measures import Lookup
from particle_files import DEFOCUS, HALF_SET, IMAGES, PIXEL, SHIFTS, Q, in_memory, relion31

from cryoem import (
    ParticleStack,
    Preprocessing,
    Search,
    half_sets,
    imaging,
    match,
    orient,
    read_particles,
    reconstruct,
    refine,
    rotations,
    simulate,
    survey,
    write_particles,
)
from cryoem.errors import InputError
from cryoem.particles import PER_PARTICLE, CtfParameters, Noise, ParticleFile, random_half_sets


@dataclass(frozen=True, eq=False, kw_only=True)
class Scored(ParticleStack):
    """A stack of which a step knows more."""

    scores: np.ndarray = field(metadata=PER_PARTICLE)
    level: float = 0.5


def full():
    """A stack of which everything is known."""
    return in_memory().replace(
        optics_group=np.arange(6),
        contrast=np.linspace(0.5, 1.5, 6),
        expected_error_rad=np.linspace(0.1, 0.6, 6),
        noise=Noise.white(2.0),
        columns={"a": np.arange(6), "b": list("uvwxyz")},
    )


def scored():
    return full().extended(Scored, scores=np.arange(6) / 10)


def per_particle(stack):
    """All that a stack says of each particle, by name."""
    found = {
        f.name: np.asarray(getattr(stack, f.name))
        for f in fields(stack)
        if f.metadata == PER_PARTICLE and f.name not in ("columns", "ctf_parameters")
        if getattr(stack, f.name) is not None
    }
    found |= {f"column {name}": values for name, values in stack.columns.items()}
    ctf = stack.ctf_parameters
    return found | {f.name: getattr(ctf, f.name) for f in fields(ctf)}


def assert_rows(stack, whole, rows):
    found, wanted = per_particle(stack), per_particle(whole)
    assert found.keys() == wanted.keys() and len(stack) == len(np.arange(6)[rows])
    for name, values in found.items():
        np.testing.assert_array_equal(values, wanted[name][rows], err_msg=name)


class Watched:
    """Images that write down what is read of them."""

    def __init__(self, images=IMAGES):
        self.images, self.shape, self.read = images, images.shape, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        self.read.append(rows)
        return self.images[rows]


# --------------------------------------------------------------------------------------
# What it holds


def test_what_is_not_said_is_unknown():
    stack = ParticleStack(IMAGES, PIXEL)
    assert len(stack) == 6 and stack.box_px == 12 and stack.pixel_size_angstrom == PIXEL
    for name in ("quaternions", "ctf_parameters", "half_set", "contrast", "expected_error_rad"):
        assert getattr(stack, name) is None
    assert stack.noise is None and stack.origin is None and stack.columns == {}
    assert stack.ctf() is None
    np.testing.assert_array_equal(stack.shifts_px, np.zeros((6, 2)))
    np.testing.assert_array_equal(stack.optics_group, np.zeros(6))


def test_a_stack_does_not_change():
    with pytest.raises(FrozenInstanceError):
        in_memory().quaternions = Q


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "images"),
        ({"images": IMAGES[0]}, r"images.*\(n, size, size\), got \(12, 12\)"),
        ({"images": IMAGES[:, 1:]}, r"images.*\(6, 11, 12\)"),
        ({"images": np.where(np.arange(6)[:, None, None] == 2, np.nan, IMAGES)}, "image 2 is not"),
        ({"images": Watched(IMAGES[:, 1:])}, r"images.*\(6, 11, 12\)"),
        ({"images": IMAGES[:5]}, "images.*6.*5"),
        ({"images": Watched(IMAGES[:5])}, "images.*6.*5"),
        ({"pixel_size_angstrom": 0}, "pixel_size_angstrom.*got 0"),
        ({"pixel_size_angstrom": -1.5}, "pixel_size_angstrom.*got -1.5"),
        ({"pixel_size_angstrom": np.nan}, "pixel_size_angstrom.*nan"),
        ({"pixel_size_angstrom": np.inf}, "pixel_size_angstrom.*inf"),
        ({"pixel_size_angstrom": None}, "pixel_size_angstrom.*got None"),
        ({"pixel_size_angstrom": "2"}, "pixel_size_angstrom.*got '2'"),
        ({"pixel_size_angstrom": [1, 2]}, "pixel_size_angstrom.*got"),
        ({"noise": 1.0}, "noise must be Noise or None, got 1.0"),
        ({"ctf_parameters": 1e4}, "ctf_parameters must be CtfParameters or None, got 10000.0"),
        ({"quaternions": Q[:5]}, "quaternions.*5.*6 images"),
        ({"quaternions": Q[:, :3]}, r"quaternions.*\(n, 4\).*\(6, 3\)"),
        ({"quaternions": 2 * Q}, "quaternions must be unit: row 0"),
        ({"shifts_px": SHIFTS[:5]}, r"shifts_px.*\(6, 2\), got \(5, 2\)"),
        ({"shifts_px": SHIFTS.T}, r"shifts_px.*\(6, 2\), got \(2, 6\)"),
        ({"shifts_px": SHIFTS[0]}, "shifts_px"),
        ({"shifts_px": np.full((6, 2), np.inf)}, "shifts_px must be finite"),
        ({"ctf_parameters": CtfParameters(np.full(5, 1e4))}, "ctf_parameters.*6.*5"),
        ({"half_set": HALF_SET[:5]}, "half_set must hold 6"),
        ({"half_set": [0, 1, 0, 1, 0, 1]}, "half_set must hold 6 values, 1 or 2"),
        ({"half_set": [1.5, 1, 2, 1, 2, 1]}, "half_set must hold 6 values, 1 or 2"),
        ({"optics_group": np.zeros(5, int)}, "optics_group must hold 6 integers"),
        ({"optics_group": np.zeros(6)}, "optics_group must hold 6 integers"),
        ({"optics_group": np.full(6, -1)}, "optics_group must hold 6 integers from 0"),
        ({"contrast": np.ones(5)}, r"contrast.*\(6,\), got \(5,\)"),
        ({"contrast": np.full(6, np.nan)}, "contrast must be finite"),
        ({"expected_error_rad": np.ones((6, 1))}, r"expected_error_rad.*\(6,\), got \(6, 1\)"),
        ({"columns": {"a": [1]}}, r"column a must hold 6 values, got \(1,\)"),
        ({"columns": {"a": 1}}, "column a must hold 6"),
        *(
            ({"columns": {name: np.arange(6)}}, "is no name; wanted one without blanks")
            for name in ("my col", "", "a\tb", "x\ny", " a", "a\0", "\ud800")
        ),
        ({"columns": {"a": np.zeros((6, 2))}}, r"column a must hold 6 values, got \(6, 2\)"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        in_memory().replace(**changes)
    with pytest.raises(InputError, match=message):
        in_memory().extended(Scored, scores=np.zeros(6), **changes)
    if "6.*5" in message and "images" in changes:  # five images are a stack of five
        return
    with pytest.raises(InputError, match=message):
        ParticleStack(**{"images": IMAGES, "pixel_size_angstrom": PIXEL, **changes})


def test_what_a_stack_does_not_have_cannot_be_replaced():
    with pytest.raises(InputError, match="no scores"):
        in_memory().replace(scores=np.zeros(6))


# --------------------------------------------------------------------------------------
# Some of the particles

ROWS = [
    slice(None),
    slice(1, 4),
    slice(0, 0),
    slice(None, None, -2),
    np.array([5, 0, 0, 3]),
    np.array([-1, 2]),
    np.array([], int),
    np.array([True, False, False, True, True, False]),
    np.zeros(6, bool),
]


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_a_selection_has_the_rows_of_everything(rows, tmp_path):
    assert_rows(scored().select(rows), scored(), rows)
    assert_rows(full().select(rows).select(slice(None)), full(), rows)
    from_file = read_particles(relion31(tmp_path))
    assert_rows(from_file.select(rows), from_file, rows)
    some = scored().select(rows)
    assert type(some) is Scored and some.level == 0.5 and some.noise == Noise.white(2.0)


def test_lists_of_rows_may_be_lists():
    assert_rows(full().select([4, 1]), full(), [4, 1])
    assert len(full().select([])) == 0


@pytest.mark.parametrize("kind", ["array", "file", "watched"])
def test_selections_of_selections_are_selections(tmp_path, kind):
    whole = full()
    if kind == "file":
        whole = read_particles(relion31(tmp_path))
    elif kind == "watched":
        whole = whole.replace(images=Watched())
    order = np.arange(6)
    some = whole
    for rows in (slice(None, None, -1), np.array([4, 0, 3, 3, 1]), slice(1, None), [2, 0]):
        some, order = some.select(rows), order[rows]
    np.testing.assert_array_equal(some.images[:], IMAGES[order])
    np.testing.assert_array_equal(some.images[1], IMAGES[order[1]])
    np.testing.assert_array_equal(some.images[np.array([1, 0])], IMAGES[order[::-1]])
    np.testing.assert_array_equal(np.asarray(some.images), IMAGES[order])
    assert some.images.shape == (2, 12, 12) and len(some) == len(some.images) == 2
    assert rotations.distance(some.quaternions, Q[order]).max() < 1e-12
    assert list(some.half_set) == [HALF_SET[i] for i in order]


@pytest.mark.parametrize("rows", [slice(1, 5), np.array([4, 1])], ids=str)
def test_images_are_read_when_they_are_asked_for_and_no_others(rows):
    images = Watched()
    stack = full().replace(images=images)
    assert images.read == []
    some = stack.select(rows).with_poses(Q[rows]).select(slice(1, 2))
    parts = list(stack.chunks(4))
    stack.with_half_sets(0), stack.without_poses(), stack.ctf(), pickle.dumps(stack.columns)
    assert images.read == []
    np.testing.assert_array_equal(some.images[:], IMAGES[np.arange(6)[rows]][1:2])
    np.testing.assert_array_equal(parts[1].images[0], IMAGES[4])
    assert [np.atleast_1d(rows).tolist() for rows in images.read] == [
        [np.arange(6)[rows][1]],
        [4],
    ]


def test_images_in_memory_are_not_copied():
    stack = full()
    assert np.shares_memory(stack.select(slice(1, 5)).images, stack.images)
    assert np.shares_memory(stack.with_poses(Q).images, stack.images)
    many = np.broadcast_to(np.arange(6), (10**6, 6)).ravel()
    assert stack.select(many).images.shape == (6 * 10**6, 12, 12)  # 3.5 GB, if they were read


@pytest.mark.parametrize("rows", [slice(10, 13), np.array([4, 99, 7])], ids=str)
@pytest.mark.parametrize("in_a_file", [False, True])
def test_other_processes_are_sent_the_rows_of_a_selection_alone(rows, in_a_file, tmp_path):
    rng = np.random.default_rng(0)
    stack = ParticleStack(
        rng.standard_normal((2000, 12, 12)),
        1.0,
        quaternions=rotations.uniform(2000, 0),
        ctf_parameters=CtfParameters(np.full(2000, 1e4)),
        columns={"a": rng.random(2000), "b": np.full(2000, "text", object)},
    )
    if in_a_file:
        write_particles(tmp_path / "a.star", stack)
        stack = read_particles(tmp_path / "a.star")
    some = stack.select(rows)
    sent = pickle.dumps(some)
    assert len(sent) < 10_000  # of 1.2 MB
    back = pickle.loads(sent)
    np.testing.assert_array_equal(back.images, stack.images[rows])
    np.testing.assert_array_equal(back.quaternions, stack.quaternions[rows])
    np.testing.assert_array_equal(back.ctf(), some.ctf())
    np.testing.assert_array_equal(back.columns["a"], stack.columns["a"][rows])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array([1.0, 2.0]), "integers"),
        (np.array([[1, 2]]), "integers"),
        (3, "integers"),
        (["a"], "integers"),
        (np.array([True, False]), "6 truth values"),
    ],
)
def test_rows_that_are_none_are_refused(rows, message):
    with pytest.raises(InputError, match=message):
        full().select(rows)


@pytest.mark.parametrize("in_a_file", [False, True])
def test_rows_beyond_the_last_are_refused(in_a_file, tmp_path):
    stack = read_particles(relion31(tmp_path)) if in_a_file else ParticleStack(IMAGES, PIXEL)
    with pytest.raises(IndexError):
        stack.select(np.array([2, 6]))


@pytest.mark.parametrize(("size", "lengths"), [(4, [4, 2]), (6, [6]), (100, [6]), (1, [1] * 6)])
def test_chunks_are_all_particles_in_order(size, lengths):
    parts = list(scored().chunks(size))
    assert [len(part) for part in parts] == lengths
    start = 0
    for part in parts:
        assert_rows(part, scored(), slice(start, start + len(part)))
        start += len(part)


def test_chunks_hold_something():
    assert list(full().select(slice(0)).chunks(3)) == []
    for size in (0, -1):
        with pytest.raises(InputError, match="at least one"):
            list(full().chunks(size))


# --------------------------------------------------------------------------------------
# More, or less, of the same particles


def test_poses_come_with_or_without_shifts():
    stack = scored()
    turned = stack.with_poses(Q[::-1])
    np.testing.assert_allclose(turned.quaternions, Q[::-1], atol=1e-15)
    np.testing.assert_array_equal(turned.shifts_px, SHIFTS)
    moved = stack.with_poses(Q[::-1], -SHIFTS)
    np.testing.assert_array_equal(moved.shifts_px, -SHIFTS)
    assert type(moved) is Scored and (moved.scores == stack.scores).all()
    np.testing.assert_allclose(stack.quaternions, Q, atol=1e-15)
    with pytest.raises(InputError, match="shifts_px"):
        stack.with_poses(Q, SHIFTS[:2])


def test_signs_and_lengths_of_quaternions_are_brought_in_order():
    np.testing.assert_allclose(in_memory().with_poses(1.0005 * Q).quaternions, Q, atol=1e-12)


def test_without_poses_nothing_is_known_of_them():
    blind = full().without_poses()
    assert blind.quaternions is None and blind.contrast is None
    assert blind.expected_error_rad is None and not blind.shifts_px.any()
    # The rest is the microscope's, and stays.
    np.testing.assert_array_equal(blind.ctf(), full().ctf())
    assert list(blind.half_set) == HALF_SET and list(blind.columns) == ["a", "b"]
    with pytest.raises(InputError, match="no orientations"):
        blind.oriented()
    with pytest.raises(InputError, match="at least one"):
        full().select(slice(0)).oriented()
    np.testing.assert_allclose(full().oriented(), Q, atol=1e-15)


def test_other_images_keep_shifts_in_angstrom():
    stack = scored()
    cropped = stack.with_images(imaging.crop(IMAGES, 8))
    assert cropped.box_px == 8 and cropped.pixel_size_angstrom == PIXEL
    np.testing.assert_array_equal(cropped.shifts_px, SHIFTS)
    assert cropped.noise == Noise.white(2.0)
    small = stack.with_images(imaging.downsample(IMAGES, 6), pixel_size_angstrom=2 * PIXEL)
    assert small.box_px == 6 and small.pixel_size_angstrom == 2 * PIXEL
    np.testing.assert_allclose(small.shifts_px * small.pixel_size_angstrom, SHIFTS * PIXEL)
    assert small.noise is None  # down-sampling changes its variance
    assert small.ctf().shape == (6, 6, 4)
    assert type(small) is Scored and (small.scores == stack.scores).all()
    with pytest.raises(InputError, match=r"images.*6.*4"):
        stack.with_images(IMAGES[:4])
    with pytest.raises(InputError, match="pixel_size_angstrom"):
        stack.with_images(IMAGES, pixel_size_angstrom=-1)


def test_half_sets_that_are_known_are_kept():
    assert list(full().with_half_sets(1).half_set) == HALF_SET
    free = full().replace(half_set=None)
    np.testing.assert_array_equal(free.with_half_sets(1).half_set, random_half_sets(6, 1))
    np.testing.assert_array_equal(full().half(1), [0, 2, 4])
    np.testing.assert_array_equal(full().half(2), [1, 3, 5])
    for stack in (free, full().replace(half_set=[1] * 6)):
        with pytest.raises(InputError, match="half-set 2"):
            stack.half(2)


NAMES = ["1@a.mrcs", "2@a.mrcs", "1@b.mrcs", "000001@./a.mrcs", "3@a.mrcs", "2@a.mrcs"]
PLACES = {
    "rlnMicrographName": np.array(["m1", "m1", "m1", "m2", "m2", "m2"], object),
    "rlnCoordinateX": np.array([100.0, 100.9, 300, 100, 0, 0]),
    "rlnCoordinateY": np.array([50.0, 50, 50, 50, 0, 0]),
}


SAME_SPOT = {
    "rlnMicrographName": np.array(["m"] * 6, object),
    "rlnCoordinateX": np.full(6, 100.0),
    "rlnCoordinateY": np.full(6, 50.0),
}


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"rlnImageName": NAMES}, [0, 1, 2, 0, 3, 1]),
        (PLACES, [0, 0, 1, 2, 3, 4]),
        # Of one name, or of one place, or both: what holds together is one.
        ({"rlnImageName": NAMES, **PLACES}, [0, 0, 1, 0, 2, 0]),
        (PLACES | {"rlnCoordinateX": np.zeros(6), "rlnCoordinateY": np.zeros(6)}, range(6)),
        (PLACES | {"rlnCoordinateX": np.full(6, "nowhere", object)}, range(6)),
        (
            {"rlnImageName": ["a.mrc", "1@a.mrc", "1@./a.mrc", "2@a.mrc", "b.mrc", "c.mrc"]},
            [0, 0, 0, 1, 2, 3],
        ),
        (
            {"rlnImageOriginalName": ["1@z", "000001@./z", "2@z", "None", "None", "3@z"]},
            [0, 0, 1, 2, 3, 4],
        ),
        ({"rlnImageName": [*NAMES[:5], "9@a.mrcs"], "uid": [7, 8, 8, 9, 0, 0]}, [0, 1, 1, 0, 2, 3]),
        (
            {**SAME_SPOT, "rlnMicrographName": ["M/m", "./M/m", "/x/M/m", "../M/m", "N/m", "/y/m"]},
            [0, 0, 0, 0, 1, 2],
        ),
        (
            {
                **SAME_SPOT,
                "rlnCoordinateX": [0, 1.5, 10, 13.5, 20, 29],
                "rlnCoordinateY": np.ones(6),
            },
            [0, 0, 1, 2, 3, 4],
        ),
    ],
)
def test_rows_of_one_particle_are_told(columns, wanted):
    found = half_sets.particles_of({name: np.asarray(c) for name, c in columns.items()}, 6)
    _, first, where = np.unique(found, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(np.argsort(np.argsort(first))[where], wanted)


@pytest.mark.parametrize("step", [4.75, 9.5, 14.2])
@pytest.mark.parametrize("told", [False, True])
def test_segments_of_filaments_are_particles_of_their_own(step, told):
    """They lie near each other, and filaments cross."""
    along = np.arange(100)[:, None] * step
    lines = [(0, 500, 1, 0), (480, 0, 0.02, 1), (0, 0, 0.7, 0.7), (900, 10, -0.6, 0.8)]
    place = np.concatenate([[x, y] + along * np.array([u, v]) for x, y, u, v in lines])
    n = len(place)
    columns = {
        "rlnMicrographName": np.array(["m.mrc"] * n),
        "rlnCoordinateX": place[:, 0],
        "rlnCoordinateY": place[:, 1] + 2000,
        "rlnImageName": np.array([f"{i + 1}@a.mrcs" for i in range(n)]),
    }
    if told:
        columns["rlnHelicalTubeID"] = np.repeat(np.arange(4), 100)
    found = half_sets.particles_of(columns, n, near_px=10.0)
    assert len(np.unique(found)) > (0.98 if told else 0.96) * n
    # Those that were picked twice are found all the same, where they are no segments.
    twice = {name: np.concatenate([c, c]) for name, c in columns.items()}
    twice["rlnImageName"] = np.array([f"{i + 1}@a.mrcs" for i in range(2 * n)])
    assert len(np.unique(half_sets.particles_of(twice, 2 * n, near_px=10.0))) <= n


def test_a_particle_that_is_there_twice_stays_in_one_half():
    stack = full().replace(half_set=None).with_columns({"rlnImageName": np.array(NAMES, object)})
    for seed in range(10):
        with pytest.warns(UserWarning, match="6 rows are of 4 particles.*one half"):
            half = stack.with_half_sets(seed).half_set
        assert half[0] == half[3] and half[1] == half[5] and half.sum() == 9
    with pytest.warns(UserWarning, match="1 particles stand in both half-sets.*rows 1 and 4"):
        stack.replace(half_set=[1, 2, 1, 2, 1, 2]).with_half_sets(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack.replace(half_set=[1, 2, 1, 1, 2, 2]).with_half_sets(0)
        full().replace(half_set=None).with_half_sets(0)
    with pytest.raises(InputError, match="1 in 6 rows"):
        random_half_sets(6, 0, np.zeros(6))


def test_links_and_folders_do_not_hide_that_a_particle_is_there_twice(tmp_path):
    (tmp_path / "job").mkdir()
    write_particles(tmp_path / "job" / "a.star", in_memory())
    (tmp_path / "job" / "link.mrcs").symlink_to("a.mrcs")
    shutil.copy(tmp_path / "job" / "a.mrcs", tmp_path / "job" / "other.mrcs")
    names = ["1@a.mrcs", f"1@{tmp_path}/job/a.mrcs", "1@../job/a.mrcs", "01@link.mrcs",
             "1@other.mrcs", "2@a.mrcs"]  # fmt: skip
    given, path = iter(names), tmp_path / "job" / "a.star"
    path.write_text(re.sub(r"\S+@\S+", lambda _: next(given), path.read_text()))
    found = half_sets.particles_in(read_particles(path))
    np.testing.assert_array_equal(found == found[0], [True, True, True, True, False, False])
    assert found[4] != found[5]


def test_a_particles_place_is_where_its_origin_puts_it():
    """Picked 30 px apart, and centred: the same particle; and the other way round."""
    x, y = np.array([100.0, 130, 200, 201, 300, 308]), np.full(6, 50.0)
    columns = {"rlnMicrographName": np.array(["m"] * 6, object), "rlnCoordinateX": x,
               "rlnCoordinateY": y}  # fmt: skip
    moved = np.zeros((6, 2))
    moved[:4, 0] = 7.5, -7.5, 20, -20  # pixels of the particles: twice those of the micrograph
    group = np.zeros(6, int)
    stack = full().replace(columns=columns, shifts_px=moved, optics_group=group)
    pixel = np.full(1, stack.pixel_size_angstrom / 2)
    optics = {"rlnMicrographOriginalPixelSize": pixel}
    for origin, wanted in (
        (ParticleFile(Path("a.star"), optics), [0, 0, 1, 2, 3, 4]),
        (None, [0, 1, 2, 3, 4, 5]),
    ):
        found = half_sets.particles_in(stack.replace(origin=origin))
        first = np.unique(found, return_index=True, return_inverse=True)[1:]
        np.testing.assert_array_equal(np.argsort(np.argsort(first[0]))[first[1]], wanted)


def test_duplicates_of_many_sizes_leave_the_halves_even():
    particle = np.repeat(np.arange(300), np.random.default_rng(0).integers(1, 6, 300))
    half = random_half_sets(len(particle), 1, particle)
    assert abs((half == 1).sum() - (half == 2).sum()) <= 5
    assert len(half_sets.split_particles(particle, half)) == 0
    first = np.unique(particle, return_index=True)[1]
    assert 0.4 < np.mean(half[first[:-1]] == half[first[1:]]) < 0.6


def test_half_sets_are_even_and_seeded():
    half_set = random_half_sets(101, 3)
    assert sorted(np.bincount(half_set)) == [0, 50, 51]
    np.testing.assert_array_equal(half_set, random_half_sets(101, 3))
    assert (half_set != random_half_sets(101, 4)).any()
    # Of their own: not what another use of the seed draws.
    assert abs(np.mean(half_set[:-1] == half_set[1:]) - 0.5) < 0.2
    with pytest.raises(InputError, match="at least 2"):
        random_half_sets(1, 0)


def test_columns_are_added_and_replaced():
    stack = scored().with_columns({"c": [1.5] * 6, "a": np.arange(6)[::-1]})
    assert list(stack.columns) == ["a", "b", "c"] and type(stack) is Scored
    np.testing.assert_array_equal(stack.columns["a"], [5, 4, 3, 2, 1, 0])
    assert list(full().columns["b"]) == list("uvwxyz")
    with pytest.raises(InputError, match="column d"):
        stack.with_columns({"d": [1, 2]})


def test_a_step_adds_what_it_knows():
    stack = full().extended(Scored, scores=np.arange(6), quaternions=Q[::-1], level=2.0)
    assert type(stack) is Scored and stack.level == 2.0
    np.testing.assert_allclose(stack.quaternions, Q[::-1], atol=1e-15)
    np.testing.assert_array_equal(stack.contrast, full().contrast)
    # And all rows stay together through another choice, another value and another step.
    order = np.array([3, 1])
    some = stack.select(order).replace(contrast=[1, 2]).with_poses(Q[:2])
    np.testing.assert_array_equal(some.scores, order)
    np.testing.assert_array_equal(some.contrast, [1, 2])
    again = some.extended(Scored, scores=some.scores + 1)
    np.testing.assert_array_equal(again.scores, order + 1)
    assert again.level == 0.5
    plain = some.extended(ParticleStack)
    assert type(plain) is ParticleStack and not hasattr(plain, "scores")
    np.testing.assert_array_equal(plain.columns["a"], order)


# --------------------------------------------------------------------------------------
# The CTF


def test_one_number_stands_for_all_particles():
    parameters = CtfParameters([1e4, 2e4, 3e4], voltage_kv=200.0, phase_shift_degrees=[0, 1, 2])
    assert len(parameters) == 3
    np.testing.assert_array_equal(parameters.defocus_v_angstrom, [1e4, 2e4, 3e4])
    np.testing.assert_array_equal(parameters.voltage_kv, [200] * 3)
    np.testing.assert_array_equal(parameters.spherical_aberration_mm, [2.7] * 3)
    some = parameters.select(np.array([2, 0]))
    np.testing.assert_array_equal(some.defocus_u_angstrom, [3e4, 1e4])
    np.testing.assert_array_equal(some.phase_shift_degrees, [2, 0])
    assert len(CtfParameters(1e4)) == 1
    shared = ParticleStack(IMAGES, PIXEL, ctf_parameters=CtfParameters(1e4, 1.2e4, 30.0))
    assert len(shared.ctf_parameters) == 6
    np.testing.assert_array_equal(shared.ctf_parameters.defocus_v_angstrom, [1.2e4] * 6)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"defocus_u_angstrom": [[1e4]]}, "defocus_u_angstrom"),
        ({"defocus_v_angstrom": [1e4]}, r"defocus_v_angstrom.*3 particles.*\(1,\)"),
        ({"defocus_angle_degrees": np.zeros(2)}, "defocus_angle_degrees"),
        ({"voltage_kv": np.nan}, "voltage_kv must be finite"),
        ({"b_factor_angstrom2": [0, 0, np.inf]}, "b_factor_angstrom2 must be finite"),
        ({"images": "flipped"}, "'as seen', 'phase flipped', 'premultiplied'.*'flipped'"),
        ({"images": ["as seen"] * 2}, "images must be.*each of 3"),
    ],
)
def test_parameters_that_do_not_fit_are_named(parameters, message):
    with pytest.raises(InputError, match=message):
        CtfParameters(**{"defocus_u_angstrom": np.full(3, 1e4), **parameters})


def test_a_stack_gives_the_ctf_of_its_rows():
    u, v, angle = DEFOCUS.values()
    options = {"voltage_kv": 200.0, "amplitude_contrast": 0.07, "b_factor_angstrom2": 20.0}
    stack = in_memory(**options)
    wanted = imaging.ctf(12, PIXEL, u, v, angle, **options)
    np.testing.assert_array_equal(stack.ctf(), wanted)
    for rows in (slice(1, 3), np.array([4, 0])):
        np.testing.assert_array_equal(stack.ctf(rows), wanted[rows])
        np.testing.assert_array_equal(stack.select(rows).ctf(), wanted[rows])
    np.testing.assert_array_equal(stack.ctf_parameters.values(12, PIXEL), wanted)


# --------------------------------------------------------------------------------------
# In memory or in files, read in one piece or in many: the same

BOX, VOXEL = 24, 9.0


@pytest.fixture(scope="module")
def density(phantom):
    return phantom.density(BOX, VOXEL)


@pytest.fixture(scope="module")
def seen(density):
    stack = simulate(
        density, 48, 0, snr=2.0, max_shift_px=1.0, defocus_range_angstrom=(1e4, 2e4)
    ).replace(contrast=np.linspace(0.8, 1.2, 48), noise=None)  # which files do not tell
    return stack.with_half_sets(0)


@pytest.fixture(scope="module", params=["file", "selection", "selection of a file", "watched"])
def other(request, seen, tmp_path_factory):
    """The same particles, their images somewhere else."""
    order = np.random.default_rng(0).permutation(48)
    if request.param == "watched":
        return seen.replace(images=Watched(seen.images))
    stack = seen
    if request.param.startswith("selection"):
        stack = seen.select(order)
    if request.param.endswith("file"):
        path = tmp_path_factory.mktemp("stack") / "a.star"
        write_particles(path, stack)
        stack = read_particles(path)
    return stack.select(np.argsort(order)) if request.param.startswith("selection") else stack


WHOLE = Preprocessing(BOX, BOX, BOX, VOXEL)
STEPS = {
    "survey": lambda stack, density: survey(stack, images=20),
    "orient": lambda stack, density: orient(
        Lookup(density, references=300), stack, reference=density, landmarks=30, chunk=7
    ),
    "match": lambda stack, density: match(stack, density, WHOLE, references=300),
    "reconstruct": lambda stack, density: reconstruct(stack, iterations=2),
    "refine": lambda stack, density: refine(
        stack, density, resolution_angstrom=30.0, search=Search(1, 0.1, False, 2)
    ),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_every_step_reads_images_wherever_they_are(step, seen, other, density):
    found, wanted = step(other, density), step(seen, density)
    assert type(found) is type(wanted)
    for f in fields(wanted):
        if f.name not in ("columns", "origin", "noise", "ctf_parameters", "frame"):
            a, b = (np.asarray(getattr(x, f.name)) for x in (found, wanted))
            if f.name == "quaternions":  # of either sign
                a = a * np.sign(np.sum(a * b, axis=1, keepdims=True))
            if a.dtype.kind == "f":
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=f.name)
            else:
                np.testing.assert_array_equal(a, b, err_msg=f.name)
