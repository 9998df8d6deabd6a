import astra
import numpy as np
import pytest
from measures import correlation, relative_error
from scipy.spatial.transform import Rotation

from cryoem import imaging, maps, projection, reconstruction, rotations, threads
from cryoem.density import Density, Phantom
from cryoem.errors import InputError, MissingToolError

VOXEL = 5.5
Q = rotations.uniform(6, 0)


# --------------------------------------------------------------------------------------
# Against the exact phantom. Interpolation: what the grid cannot carry is below 1 %.


@pytest.mark.parametrize("box", [40, 41, 63, 64])
def test_projections_are_the_phantoms(phantom, box):
    voxel = VOXEL * 40 / box
    found = projection.project(phantom.density(box, voxel), Q)
    assert found.dtype == np.float32
    assert relative_error(found, phantom.project(Q, box, voxel)) < 1e-2


@pytest.mark.parametrize(("box", "down"), [(64, 40), (64, 39), (63, 40), (63, 39)])
def test_down_sampled_projections_are_the_phantoms(phantom, box, down):
    voxel = VOXEL * 40 / box
    found = projection.project(phantom.density(box, voxel), Q, box_px=down)
    coarse = voxel * box / down
    # Line integrals stay in units of the density's voxel, the phantom's are in the image's.
    expected = phantom.project(Q, down, coarse) * coarse / voxel
    assert relative_error(found, expected) < 1e-2


def test_projecting_coarsely_is_projecting_and_then_down_sampling(shipped):
    density = shipped["4jsv"]
    fine = imaging.downsample(projection.project(density, Q), 32)
    assert relative_error(projection.project(density, Q, box_px=32), fine) < 1e-2


@pytest.mark.parametrize("box", [40, 41])
def test_a_projection_sums_to_the_densitys_sum(phantom, box):
    density = phantom.density(box, VOXEL)
    sums = projection.project(density, Q).sum(axis=(1, 2), dtype=float)
    # The NUFFT is asked for 1e-4.
    np.testing.assert_allclose(sums, density.values.sum(dtype=float), rtol=3e-4)


@pytest.mark.parametrize("box", [40, 41])
def test_the_identity_looks_along_z(phantom, box):
    density = phantom.density(box, VOXEL)
    image = projection.project(density, [[0, 0, 0, 1.0]])[0]
    assert relative_error(image, density.values.sum(axis=0)) < 1e-2


@pytest.mark.parametrize("box", [32, 33])
def test_a_voxel_lands_where_the_convention_says(box):
    # A blob at (x, y, z) of the density is seen at R^T (x, y, z).
    at = np.array([4.0, -3.0, 6.0])
    values = Phantom(at[None], np.array([1.5]), np.ones(1)).density(box, 1.0)
    for image, r in zip(
        projection.project(values, Q), Rotation.from_quat(Q).as_matrix(), strict=True
    ):
        axis = np.arange(box) - box // 2
        centre = [np.sum(image * axis), np.sum(image * axis[:, None])] / image.sum()
        np.testing.assert_allclose(centre, (r.T @ at)[:2], atol=1e-2)


# --------------------------------------------------------------------------------------
# What turning and mirroring do


@pytest.mark.parametrize("box", [40, 41])
def test_turning_the_density_multiplies_from_the_left(phantom, box):
    a = rotations.uniform(1, 5)[0]
    turned = Phantom(
        Rotation.from_quat(a).apply(phantom.centres_angstrom),
        phantom.sigmas_angstrom,
        phantom.weights,
    )
    there = turned.project(rotations.multiply(a, Q), box, VOXEL)
    np.testing.assert_allclose(there, phantom.project(Q, box, VOXEL), atol=1e-9)
    found = projection.project(turned.density(box, VOXEL), rotations.multiply(a, Q))
    assert relative_error(found, there) < 1e-2


@pytest.mark.parametrize("box", [40, 41])
def test_the_mirrored_density_gives_the_same_images_at_the_other_hand(phantom, box):
    density = phantom.density(box, VOXEL)
    other = maps.mirrored(density)
    exact = Phantom(-phantom.centres_angstrom, phantom.sigmas_angstrom, phantom.weights)
    np.testing.assert_allclose(
        other.values, exact.density(box, VOXEL).values, atol=1e-4 * other.values.max()
    )
    found = projection.project(other, rotations.other_hand(Q))
    assert relative_error(found, projection.project(density, Q)) < 1e-2
    assert relative_error(projection.project(other, Q), projection.project(density, Q)) > 0.1


@pytest.mark.parametrize("box", [40, 41])
@pytest.mark.parametrize(
    ("move_image", "move"),
    [
        (imaging.quarter_turn, lambda q: rotations.in_plane(q, np.pi / 2)),
        (imaging.mirror, rotations.mirror_x),
    ],
)
def test_moving_pixels_is_moving_the_orientation(phantom, box, move_image, move):
    density = phantom.density(box, VOXEL)
    found = projection.project(density, move(Q))
    assert relative_error(move_image(projection.project(density, Q)), found) < 1e-2


def test_an_in_plane_turn_turns_the_image_counterclockwise(phantom):
    # P(Rz(a) (x, y)) has the orientation R Rz(a): sampled by hand at one angle.
    a, n = 0.7, 81
    image = phantom.project(Q[:1], n, 3.0)[0]
    axis = np.arange(n) - n // 2
    x, y = np.meshgrid(axis, axis)
    from scipy.ndimage import map_coordinates

    xr, yr = np.cos(a) * x - np.sin(a) * y, np.sin(a) * x + np.cos(a) * y
    turned = map_coordinates(image, [yr + n // 2, xr + n // 2], order=3)
    expected = phantom.project(rotations.in_plane(Q[:1], a), n, 3.0)[0]
    assert relative_error(turned, expected) < 1e-2


# --------------------------------------------------------------------------------------
# Another projector


@pytest.mark.parametrize("box", [48, 49])
@pytest.mark.parametrize("kind", ["linear", "strip"])
def test_astras_projector_agrees(box, kind):
    smooth = Phantom.random(4, blobs=12, radius_angstrom=12.0, sigma_angstrom=3.0)
    density = smooth.density(box, 1.0)
    angles = np.array([0.0, 0.4, 1.1, 2.0, 3.5])
    found = projection.project(density, np.array([rotations.about("y", t) for t in angles]))

    # R = Ry(t): detector x runs along (cos t, -sin t) in (x, z), so row y of the image is a 2D
    # projection of the slice y. ASTRA's rows run against its y axis, so that z is its -y, and its
    # detector runs along (cos t, sin t): the same angle. Its origin is the middle of the grid:
    # ours only where the edge is odd, so an even slice gets one more row and column.
    odd = box + 1 - box % 2
    geometry = astra.create_proj_geom("parallel", 1.0, odd, angles)
    projector = astra.create_projector(kind, geometry, astra.create_vol_geom(odd, odd))
    try:
        for row in range(box // 2 - 10, box // 2 + 11, 5):
            flat = np.pad(density.values[:, row], (0, odd - box))
            handle, sinogram = astra.create_sino(flat, projector)
            astra.data2d.delete(handle)
            # Two interpolations of blobs three voxels wide.
            assert relative_error(found[:, row], sinogram[:, :box]) < 1e-2
    finally:
        astra.projector.delete(projector)


@pytest.mark.parametrize("box", [8, 9])
def test_astras_geometry_is_the_packages_convention(box):
    # ASTRA puts voxel i at i - (n - 1) / 2, and detector pixel (row, column) likewise from the
    # detector's centre; ours is measured from voxel and pixel n // 2.
    vectors = projection.astra_vectors(Q, box)
    assert vectors.shape == (6, 12)
    middle = (box - 1) / 2
    for (ray, centre, column, row), r in zip(
        vectors.reshape(6, 4, 3), Rotation.from_quat(Q).as_matrix(), strict=True
    ):
        np.testing.assert_allclose(ray, r @ [0, 0, 1], atol=1e-12)
        for i in range(box):
            for j in range(box):
                pixel = centre + (j - middle) * column + (i - middle) * row
                voxel = pixel + middle  # index x, y, z
                ours = r @ [j - box // 2, i - box // 2, 0] + box // 2
                np.testing.assert_allclose(voxel, ours, atol=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda d, i: projection.project(d, Q, backend="astra"),
        lambda d, i: projection.backproject(i, Q, backend="astra"),
        lambda d, i: reconstruction.reconstruct_astra(i, Q, voxel_size_angstrom=1.0),
    ],
)
def test_without_cuda_astra_is_refused_before_it_ends_the_process(monkeypatch, call):
    monkeypatch.setattr(astra, "use_cuda", lambda: False)
    with pytest.raises(MissingToolError, match="nufft"):
        call(Density(np.zeros((8, 8, 8)), 1.0), np.zeros((6, 8, 8)))


def test_without_astra_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "astra", None)
    with pytest.raises(MissingToolError, match=r"cryoem\[astra\]"):
        projection.project(Density(np.zeros((8, 8, 8)), 1.0), Q, backend="astra")


# --------------------------------------------------------------------------------------
# The adjoint


@pytest.mark.parametrize("box", [24, 25])
def test_back_projection_is_the_adjoint(box):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((box,) * 3).astype(np.float32)
    images = rng.standard_normal((6, box, box)).astype(np.float32)
    ahead = np.vdot(projection.project(Density(values, 1.0), Q), images)
    back = np.vdot(values, projection.backproject(images, Q).values)
    # Relative to the norms: the inner product of random arrays is itself small.
    scale = np.linalg.norm(images) * np.linalg.norm(values)
    assert abs(ahead - back) < 1e-4 * scale
    assert abs(ahead) > 1e-3 * scale  # and not because both vanish


def test_back_projection_keeps_its_voxel_size():
    back = projection.backproject(np.zeros((6, 8, 8)), Q, voxel_size_angstrom=3.5)
    assert back.voxel_size_angstrom == 3.5 and back.box_px == 8


# --------------------------------------------------------------------------------------
# Ends


def test_no_orientation_gives_no_image(phantom):
    assert projection.project(phantom.density(16, 14.0), np.zeros((0, 4))).shape == (0, 16, 16)


def test_images_do_not_depend_on_their_chunk(phantom, monkeypatch):
    density = phantom.density(24, 9.0)
    whole = projection.project(density, Q)
    back = projection.backproject(whole, Q)
    monkeypatch.setattr(projection, "_POINTS_AT_ONCE", 1000)
    # The NUFFT's grid sums in another order: its accuracy, 1e-4.
    np.testing.assert_allclose(projection.project(density, Q), whole, atol=1e-3 * whole.max())
    assert relative_error(projection.backproject(whole, Q).values, back.values) < 1e-3


def test_opposite_quaternions_give_the_same_image(phantom):
    density = phantom.density(24, 9.0)
    assert correlation(projection.project(density, Q), projection.project(density, -Q)) > 1 - 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: projection.project(d, Q, backend="cuda"), "'nufft' or 'astra'"),
        (lambda d: projection.backproject(np.zeros((6, 8, 8)), Q, backend="cuda"), "'nufft' or"),
        (lambda d: projection.project(d, Q, box_px=9), "between 2 and"),
        (lambda d: projection.project(d, Q, box_px=1), "between 2 and"),
        (lambda d: projection.project(d, Q[:, :3]), r"\(n, 4\)"),
        (lambda d: projection.project(Density(np.zeros((8, 8, 9)), 1.0), Q), "cube"),
        (lambda d: projection.backproject(np.zeros((5, 8, 8)), Q), "5 images but 6"),
        (lambda d: projection.backproject(np.zeros((6, 8, 9)), Q), r"\(n, size, size\)"),
        (lambda d: projection.backproject(np.full((6, 8, 8), np.nan), Q), "finite: image 0"),
        (lambda d: projection.Slices(8).from_images(np.zeros((6, 7, 7))), "8 px or more, got 7"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(Density(np.zeros((8, 8, 8)), 1.0))


def test_points_of_slices_are_those_of_each_by_itself(monkeypatch):
    """They are made in parts, by several threads."""
    slices, q = projection.Slices(12), rotations.uniform(7, 0)
    whole = slices.points(q, 12)
    k = np.einsum("nij,kj->ink", Rotation.from_quat(q).as_matrix()[:, :, :2], slices.frequencies)
    monkeypatch.setattr(projection, "_POINTS_AT_ONCE", 16 * len(slices.frequencies))
    parts = slices.points(q, 12, each=threads.each)
    for axis, wanted, found in zip(k[::-1] * 2 * np.pi / 12, whole, parts, strict=True):
        np.testing.assert_allclose(wanted, axis.ravel(), atol=1e-6)
        np.testing.assert_array_equal(found, wanted)
