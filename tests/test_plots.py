import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from cryoem import maps, plots, rotations
from cryoem.density import Density

RNG = np.random.default_rng(0)
DISTANCES = RNG.uniform(0, np.pi, 500)
Q = rotations.uniform(200, 0)
CURVE = maps.Fsc(np.linspace(0.01, 0.1, 10), np.linspace(1, 0, 10))
DENSITY = Density(np.exp(-np.sum(np.indices((20,) * 3).T.astype(float) ** 2, -1) / 200), 3.0)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


FLAT = {
    "images": lambda ax: plots.images(RNG.random((5, 8, 8)), pixel_size_angstrom=5.0, ax=ax),
    "slices": lambda ax: plots.slices(DENSITY, ax=ax),
    "distances": lambda ax: plots.distance_histogram(DISTANCES, label="x", ax=ax),
    "predicted": lambda ax: plots.predicted_against_true(DISTANCES, DISTANCES[::-1], ax=ax),
    "curve": lambda ax: plots.curve([3, 2, 1], label="loss", ax=ax),
    "errors": lambda ax: plots.error_histogram(DISTANCES, label="x", ax=ax),
    "fsc": lambda ax: plots.fsc({"estimated": CURVE}, ax=ax),
}


@pytest.mark.parametrize("draw", FLAT.values(), ids=FLAT)
def test_each_draws_on_the_axes_it_is_given(draw):
    _, ax = plt.subplots()
    assert draw(ax) is ax
    assert ax.has_data()
    assert len(plt.get_fignums()) == 1
    ax.figure.canvas.draw()


@pytest.mark.parametrize("draw", FLAT.values(), ids=FLAT)
def test_each_makes_axes_where_it_is_given_none(draw):
    ax = draw(None)
    assert len(plt.get_fignums()) == 1
    assert ax.has_data()


@pytest.mark.parametrize("name", ["distances", "predicted", "errors", "fsc"])
def test_axes_carry_units(name):
    ax = FLAT[name](None)
    label = ax.get_xlabel()
    assert any(unit in label for unit in ("rad", "degrees", "1/Å"))


def test_images_stand_side_by_side_in_order():
    tiles = np.stack([np.full((4, 4), i) for i in range(5)])
    sheet = plots.images(tiles, columns=3).images[0].get_array()
    assert sheet.shape == (4 * 2 + 1, 4 * 3 + 2)
    assert [sheet[2, 2], sheet[2, 7], sheet[2, 12], sheet[7, 2], sheet[7, 7]] == [0, 1, 2, 3, 4]
    assert np.ma.masked_invalid(sheet).mask[7, 12]  # no sixth image


def test_the_scale_bar_is_as_long_as_it_says():
    ax = plots.images(RNG.random((1, 100, 100)), pixel_size_angstrom=4.0)
    (text,) = ax.texts
    start, end = ax.lines[0].get_xdata()
    assert text.get_text() == f"{(end - start) * 4.0:.0f} Å"


def test_the_law_of_chance_is_drawn_once_and_is_right():
    ax = plots.distance_histogram(DISTANCES, label="a")
    plots.distance_histogram(DISTANCES, label="b", ax=ax)
    (law,) = (line for line in ax.lines if line.get_gid() == "uniform")
    x, y = law.get_data()
    np.testing.assert_allclose(y, (1 - np.cos(x)) / np.pi)
    assert np.trapezoid(y, x) == pytest.approx(1, abs=1e-3)


def test_the_mean_error_is_said_in_degrees():
    ax = plots.error_histogram(np.deg2rad([1.0, 2.0, 6.0]))
    assert ax.lines[0].get_xdata()[0] == pytest.approx(3.0)
    assert "mean 3.00°" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_the_same_thing_has_the_same_colour():
    ax = plots.fsc({"estimated": CURVE, "baseline matched": CURVE, "true": CURVE})
    colours = [to_hex(line.get_color()) for line in ax.lines[:3]]
    assert colours == [plots.COLOURS[k] for k in ("estimated", "baseline", "true")]


def test_the_legend_gives_the_resolution():
    ax = plots.fsc({"estimated": CURVE, "true": maps.Fsc(CURVE.frequencies, np.ones(10))})
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    assert texts[0] == f"estimated: {CURVE.resolution(0.5).angstrom:.1f} Å"
    assert texts[1].startswith("true: ≤")


def test_coverage_is_relative_to_uniform():
    ax = plots.coverage(rotations.uniform(20_000, 0), bins=(6, 12))
    relative = ax.collections[0].get_array()
    # Counts of 278 a cell: four standard errors, and the mean is one by construction.
    assert relative.mean() == pytest.approx(1, abs=1e-9)
    assert np.abs(relative - 1).max() < 4 / np.sqrt(20_000 / 72)


def test_coverage_shows_views_where_they_are():
    rot, tilt = 100.0, 30.0
    q = rotations.from_relion([rot] * 50, [tilt] * 50, np.linspace(0, 90, 50))
    mesh = plots.coverage(q, bins=(4, 8)).collections[0]
    corners, relative = mesh.get_coordinates(), np.asarray(mesh.get_array())
    column = np.searchsorted(corners[0, :, 0], np.deg2rad(rot)) - 1
    row = np.searchsorted(corners[:, 0, 1], np.deg2rad(90 - tilt)) - 1
    # One cell of 32 holds everything.
    assert relative[row, column] == pytest.approx(32)
    assert np.mean(relative > 0) == pytest.approx(1 / 32)


@pytest.mark.parametrize("draw", [plots.isosurface3d, plots.density3d])
def test_densities_come_as_a_widget_and_a_picture(draw):
    import ipyvolume

    ball = Density(
        np.exp(-((np.indices((20,) * 3) - 10.0) ** 2).sum(0) / 20).astype(np.float32), 3.0
    )
    figure, ax = draw(ball)
    assert isinstance(figure, ipyvolume.Figure)
    assert len(figure.meshes) + len(figure.volumes) == 1
    assert ax.has_data()
    assert [t.get_text() for t in ax.texts if "along" in t.get_text()] == [
        "along z",
        "along y",
        "along x",
    ]


@pytest.mark.parametrize("frames", [1, 3])
def test_orientations_come_as_a_widget_and_a_picture(frames):
    import ipyvolume

    sets = [rotations.uniform(30, seed) for seed in range(frames)]
    figure, ax = plots.orientations3d(sets, reference=sets[0])
    assert isinstance(figure, ipyvolume.Figure)
    (scatter,) = figure.scatters
    np.testing.assert_allclose(
        np.reshape(scatter.z, (frames, 30))[-1],
        rotations.view_directions(sets[-1])[:, 2],
        atol=1e-6,
    )
    x, y, z = ax.collections[0]._offsets3d
    np.testing.assert_allclose(
        np.stack([x, y, z], axis=1), rotations.view_directions(sets[-1]), atol=1e-12
    )
