import numpy as np
import pytest
from scipy import stats
from scipy.spatial.transform import Rotation

from cryoem import rotations
from cryoem.errors import InputError

Q, P, S = (rotations.uniform(2000, seed) for seed in range(3))


def random_angle_cdf(t):
    """The law of the angle of a uniform random rotation, density (1 - cos t) / pi."""
    return (t - np.sin(t)) / np.pi


# --------------------------------------------------------------------------------------
# The group


def test_composition_is_scipys():
    ours = rotations.multiply(Q, P)
    theirs = (Rotation.from_quat(Q) * Rotation.from_quat(P)).as_quat()
    assert rotations.distance(ours, theirs).max() < 1e-12


def test_one_quaternion_composes_with_many():
    np.testing.assert_allclose(
        rotations.multiply(S[0], Q), rotations.multiply(np.tile(S[0], (len(Q), 1)), Q), atol=1e-15
    )


def test_inverse_undoes():
    identity = np.array([0, 0, 0, 1.0])
    assert rotations.distance(rotations.multiply(Q, rotations.inverse(Q)), identity).max() < 1e-12


@pytest.mark.parametrize(("axis", "column"), [("x", 0), ("y", 1), ("z", 2)])
def test_a_turn_about_an_axis_keeps_it_and_turns_counterclockwise(axis, column):
    matrix = Rotation.from_quat(rotations.about(axis, 0.3)).as_matrix()
    np.testing.assert_allclose(matrix[:, column], np.eye(3)[column], atol=1e-15)
    after, last = (column + 1) % 3, (column + 2) % 3
    assert matrix[last, after] == pytest.approx(np.sin(0.3), abs=1e-15)


def test_many_angles_turn_many():
    angles = np.linspace(-3, 3, 7)
    turns = rotations.about("y", angles)
    np.testing.assert_allclose(turns, [rotations.about("y", a) for a in angles], atol=1e-15)
    turned = rotations.in_plane(Q[:7], angles)
    np.testing.assert_allclose(rotations.distance(turned, Q[:7]), np.abs(angles), atol=1e-12)


def test_perturbing_moves_by_the_length_of_the_vector():
    w = np.random.default_rng(3).standard_normal((len(Q), 3)) * 0.3
    moved = rotations.distance(rotations.perturb(Q, w), Q)
    np.testing.assert_allclose(moved, np.linalg.norm(w, axis=1), atol=1e-12)


def test_an_in_plane_turn_keeps_the_view():
    turned = rotations.in_plane(Q, 1.1)
    np.testing.assert_allclose(
        rotations.view_directions(turned), rotations.view_directions(Q), atol=1e-12
    )
    np.testing.assert_allclose(rotations.distance(turned, Q), 1.1, atol=1e-12)


def test_the_mirrored_image_is_seen_from_behind():
    np.testing.assert_allclose(
        rotations.view_directions(rotations.mirror_x(Q)), -rotations.view_directions(Q), atol=1e-12
    )


# --------------------------------------------------------------------------------------
# The distance is a metric on orientations


def test_the_triangle_inequality_holds():
    near = rotations.perturb(Q, np.full((len(Q), 3), 1e-4))
    for third in (S, near):
        detour = rotations.distance(Q, third) + rotations.distance(third, P)
        assert (rotations.distance(Q, P) <= detour + 1e-12).all()


def test_distance_is_symmetric_and_bounded():
    d = rotations.distance(Q, P)
    np.testing.assert_array_equal(d, rotations.distance(P, Q))
    assert (d >= 0).all() and (d <= np.pi).all()


def test_distance_does_not_see_the_sign():
    d = rotations.distance(Q, P)
    for q, p in [(-Q, P), (Q, -P), (-Q, -P)]:
        np.testing.assert_allclose(rotations.distance(q, p), d, atol=1e-12)


def test_distance_is_unchanged_by_all_of_o4():
    d = rotations.distance(Q, P)
    a, b = S[:2]
    for move in (
        lambda q: rotations.multiply(a, q),
        lambda q: rotations.multiply(q, b),
        rotations.inverse,
    ):
        np.testing.assert_allclose(rotations.distance(move(Q), move(P)), d, atol=1e-12)


def test_distance_is_scipys_magnitude():
    magnitude = (Rotation.from_quat(Q).inv() * Rotation.from_quat(P)).magnitude()
    np.testing.assert_allclose(rotations.distance(Q, P), magnitude, atol=1e-12)


def test_distance_is_the_papers_arccosine_away_from_its_ends():
    inner = np.abs(np.sum(Q * P, axis=1))
    use = (inner > 0.05) & (inner < 0.99)
    np.testing.assert_allclose(rotations.distance(Q, P)[use], 2 * np.arccos(inner[use]), atol=1e-12)


def test_distance_is_exact_at_both_ends():
    assert (rotations.distance(Q, Q) == 0).all()
    assert (rotations.distance(Q, -Q) == 0).all()
    for axis in "xyz":
        opposite = rotations.multiply(Q, rotations.about(axis, np.pi))
        np.testing.assert_allclose(rotations.distance(Q, opposite), np.pi, rtol=0, atol=1e-12)


def test_tiny_distances_keep_their_digits():
    # 4 atan2 of differences of 1e-9: quaternions of size 1 leave 1e-16 / 1e-9 = 1e-7 relative.
    moved = rotations.perturb(Q, np.tile([1e-9, 0, 0], (len(Q), 1)))
    np.testing.assert_allclose(rotations.distance(Q, moved), 1e-9, rtol=1e-6)


def test_pair_distances_pick_their_pairs():
    pairs = np.array([[0, 5], [7, 2]])
    expected = [rotations.distance(Q[0], Q[5]), rotations.distance(Q[7], Q[2])]
    np.testing.assert_array_equal(rotations.pair_distances(Q, pairs), expected)


# --------------------------------------------------------------------------------------
# Sampling. Seeded draws; a right sampler fails a test at p = 0.001 once in a thousand seeds.


def test_uniform_orientations_follow_the_haar_law():
    one = np.array([0, 0, 0, 1.0])
    angles = rotations.distance(rotations.uniform(5000, 11), one)
    assert stats.kstest(angles, random_angle_cdf).pvalue > 1e-3


def test_random_pairs_are_126_degrees_apart_on_average():
    d = rotations.distance(rotations.uniform(20_000, 1), rotations.uniform(20_000, 2))
    # Four standard errors: the deviation of one distance is 0.65 rad.
    assert d.mean() == pytest.approx(np.pi / 2 + 2 / np.pi, abs=4 * 0.65 / np.sqrt(20_000))


@pytest.mark.parametrize(("coverage", "low"), [("uniform", -1.0), ("half", 0.0), ("quarter", 0.0)])
def test_views_are_uniform_where_they_are(coverage, low):
    z = rotations.view_directions(rotations.sample(4000, 5, coverage))[:, 2]
    assert z.min() >= low - 1e-12
    assert stats.kstest(z, "uniform", args=(low, 1 - low)).pvalue > 1e-3


def test_quarter_is_a_quarter_of_the_directions():
    x, y, z = rotations.view_directions(rotations.sample(4000, 5, "quarter")).T
    assert (y >= -1e-12).all() and (z >= -1e-12).all()
    assert (x > 0.9).any() and (x < -0.9).any()


def test_half_goes_all_the_way_round():
    x, y, _ = rotations.view_directions(rotations.sample(4000, 5, "half")).T
    assert stats.kstest(np.arctan2(y, x), "uniform", args=(-np.pi, 2 * np.pi)).pvalue > 1e-3


def test_euler_is_uniform_in_the_tilt():
    z = rotations.view_directions(rotations.sample(4000, 5, "euler"))[:, 2]
    assert stats.kstest(np.arccos(z), "uniform", args=(0, np.pi)).pvalue > 1e-3


@pytest.mark.parametrize("coverage", list(rotations.COVERAGES))
def test_every_coverage_turns_in_the_plane_uniformly(coverage):
    q = rotations.sample(3000, 8, coverage)
    psi = np.deg2rad(rotations.to_relion(q)[:, 2])
    assert stats.kstest(psi, "uniform", args=(-np.pi, 2 * np.pi)).pvalue > 1e-3


@pytest.mark.parametrize("coverage", list(rotations.COVERAGES))
@pytest.mark.parametrize("n", [0, 1, 7])
def test_every_coverage_gives_as_many_unit_quaternions_as_asked(coverage, n):
    q = rotations.sample(n, 0, coverage)
    assert q.shape == (n, 4)
    np.testing.assert_allclose(np.linalg.norm(q, axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("coverage", list(rotations.COVERAGES))
def test_the_same_seed_gives_the_same_orientations(coverage):
    first, again, other = (rotations.sample(20, seed, coverage) for seed in (4, 4, 5))
    np.testing.assert_array_equal(first, again)
    assert rotations.distance(first, other).min() > 1e-3


def test_each_use_of_a_seed_has_its_own_numbers():
    first, again, other = (rotations.generator(3, use).random(8) for use in ("a", "a", "b"))
    np.testing.assert_array_equal(first, again)
    assert not np.isclose(first, other).any()
    assert not np.isclose(first, np.random.default_rng(3).random(8)).any()
    generator = np.random.default_rng(0)
    assert rotations.generator(generator, "a") is generator


def test_a_tilt_range_is_kept_and_filled_uniformly():
    low, high = np.deg2rad([30, 60])
    z = rotations.view_directions(rotations.sample(4000, 6, tilt_range=(low, high)))[:, 2]
    a, b = np.cos(high), np.cos(low)
    assert z.min() >= a - 1e-12 and z.max() <= b + 1e-12
    assert stats.kstest(z, "uniform", args=(a, b - a)).pvalue > 1e-3


@pytest.mark.parametrize("axis", [(0, 0, 1.0), (1.0, 0, 0), (0.6, 0, -0.8)])
def test_preferred_views_lie_in_their_cone(axis):
    q = rotations.preferred(4000, 2, axis=axis, half_angle=np.pi / 6, fraction=0.9)
    share = np.mean(rotations.view_directions(q) @ np.array(axis) >= np.cos(np.pi / 6))
    # The uniform tenth hits the cone too; four binomial standard errors.
    expected = 0.9 + 0.1 * (1 - np.cos(np.pi / 6)) / 2
    assert share == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 4000))


def test_the_grid_covers_all_orientations_evenly():
    grid = rotations.grid(4000)
    np.testing.assert_allclose(np.linalg.norm(grid, axis=1), 1, atol=1e-12)
    inner = np.abs(rotations.uniform(500, 9) @ grid.T)
    nearest = 2 * np.arccos(inner.max(axis=1))
    # 4000 balls of radius r, each r^3 / (6 pi) of SO(3), fill it at r = 0.168; random points
    # would leave orientations twice as far from all of them.
    filled = (6 * np.pi / 4000) ** (1 / 3)
    assert nearest.mean() < filled
    assert nearest.max() < 2 * filled
    np.testing.assert_array_equal(grid, rotations.grid(4000))


# --------------------------------------------------------------------------------------
# RELION's angles


def test_relion_angles_compose_as_the_convention_says():
    rot, tilt, psi = 25.0, 70.0, -110.0
    by_hand = rotations.multiply(
        rotations.multiply(
            rotations.about("z", np.deg2rad(rot)), rotations.about("y", np.deg2rad(tilt))
        ),
        rotations.about("z", np.deg2rad(psi)),
    )
    assert rotations.distance(rotations.from_relion(rot, tilt, psi)[0], by_hand) < 1e-12


def test_relions_view_is_given_by_rot_and_tilt():
    rot, tilt = np.deg2rad(25.0), np.deg2rad(70.0)
    view = rotations.view_directions(rotations.from_relion([25.0], [70.0], [33.0]))[0]
    expected = [np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)]
    np.testing.assert_allclose(view, expected, atol=1e-12)


def test_relion_angles_round_trip():
    assert rotations.distance(rotations.from_relion(*rotations.to_relion(Q).T), Q).max() < 1e-12


@pytest.mark.parametrize("tilt", [0.0, 180.0])
@pytest.mark.filterwarnings("error")
def test_relion_angles_round_trip_at_the_poles(tilt):
    q = rotations.from_relion(np.linspace(-180, 180, 25), tilt, np.linspace(-90, 200, 25))
    angles = rotations.to_relion(q)
    # At the poles the tilt is an arccosine's end: half of the digits.
    np.testing.assert_allclose(angles[:, 1], tilt, atol=1e-5)
    assert rotations.distance(rotations.from_relion(*angles.T), q).max() < 1e-7


# --------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((5, 3)), r"\(n, 4\).*from_relion"),
        (np.zeros(4), r"\(n, 4\)"),
        ([[0, 0, 0, 1.0], [np.nan, 0, 0, 1]], "row 1"),
        ([[0, 0, 0, 2.0]], "norm 2"),
        ([[0, 0, 0, 0.0]], "norm 0"),
    ],
)
def test_what_is_no_set_of_orientations_is_refused(bad, message):
    with pytest.raises(InputError, match=message):
        rotations.check(bad)


def test_rounded_quaternions_are_made_unit():
    q = rotations.check(Q.astype(np.float16))
    np.testing.assert_allclose(np.linalg.norm(q, axis=1), 1, atol=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda: rotations.sample(5, 0, "everywhere"),
        lambda: rotations.sample(-1, 0),
        lambda: rotations.sample(5, 0, tilt_range=(1.0, 0.5)),
        lambda: rotations.sample(5, 0, "half", tilt_range=(0.0, 0.5)),
        lambda: rotations.preferred(5, 0, fraction=1.5),
        lambda: rotations.from_relion([np.nan], [0.0], [0.0]),
    ],
)
def test_senseless_requests_are_refused(call):
    with pytest.raises(InputError):
        call()
