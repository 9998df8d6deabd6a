import dataclasses

import numpy as np
import pytest
from measures import packed
from scipy.stats import norm

from cryoem import distances, evaluation, recovery, rotations, symmetry
from cryoem.errors import InputError
from cryoem.recovery import gauss_newton, lateration, outcome, solve
from cryoem.recovery.table import DistanceTable


def exact(n, seed):
    q = rotations.uniform(n, seed)
    pairs = distances.all_pairs(n)
    return q, pairs, rotations.pair_distances(q, pairs)


def error(found, true):
    return evaluation.orientation_errors(found, true, over="o4").mean_rad


# --------------------------------------------------------------------------------------
# Recovery


@pytest.mark.parametrize("seed", range(5))
def test_exact_distances_come_back(seed):
    q, pairs, d = exact(200, 0)
    found = recovery.recover(pairs, d, seed=seed)
    assert error(found.quaternions, q) < 1e-6
    assert found.loss < 1e-12
    assert found.residuals_rad.max() < 1e-6
    assert len(found.landmarks) == 80 and (found.used == 199).all()


@pytest.mark.parametrize("seed", range(5))
def test_any_set_of_orientations_comes_back(seed):
    q, pairs, d = exact(100, 100 + seed)
    assert error(recovery.recover(pairs, d, seed=0, starts=32).quaternions, q) < 1e-6


@pytest.mark.parametrize("coverage", ["half", "quarter", "preferred"])
def test_orientations_that_cover_little_come_back(coverage):
    q = rotations.sample(150, 1, coverage)
    pairs = distances.all_pairs(150)
    found = recovery.recover(pairs, rotations.pair_distances(q, pairs), polish=20)
    # The steps converge by a factor each, the slower the more alike the views are.
    assert error(found.quaternions, q) < 1e-5


@pytest.mark.parametrize("seed", range(2))
def test_noisy_distances_come_back_to_the_floor(seed):
    # The paper's noise of variance 0.8; nobody is better than the floor, which is a mean.
    q, pairs, d = exact(400, seed)
    sd = np.sqrt(0.8)
    noise = np.random.default_rng(seed).normal(0, sd, len(d))
    found = recovery.recover(pairs, np.clip(d + noise, 0, np.pi))
    floor = recovery.error_floor(400, sd)
    assert error(found.quaternions, q) < 1.25 * floor
    assert recovery.pair_loss(found.quaternions, pairs, np.clip(d + noise, 0, np.pi)) == (
        pytest.approx(found.loss, rel=1e-9)
    )


def test_the_floor_is_the_papers_arithmetic():
    # 0.92 x 3 sd / sqrt(n): 0.061 rad at n = 1,650 and sd 0.894.
    assert recovery.error_floor(1650, 0.894) == pytest.approx(0.061, abs=5e-4)


def test_a_third_of_the_pairs_is_enough():
    q = rotations.uniform(300, 3)
    pairs = distances.all_pairs(300)
    keep = np.random.default_rng(0).random(len(pairs)) < 0.3
    pairs = pairs[keep]
    found = recovery.recover(pairs, rotations.pair_distances(q, pairs))
    assert error(found.quaternions, q) < 1e-6


def test_a_few_of_the_pairs_at_random_are_enough():
    # 60 distances an item, as 3.6 % of the pairs of 1,650 would be: landmarks must be completed.
    q = rotations.uniform(300, 4)
    pairs = distances.all_pairs(300)
    pairs = pairs[np.random.default_rng(1).random(len(pairs)) < 0.2]
    found = recovery.recover(pairs, rotations.pair_distances(q, pairs))
    assert len(found.landmarks) > 80
    assert error(found.quaternions, q) < 1e-6


@pytest.mark.parametrize("n", [400, 2100])
def test_the_pairs_that_it_chooses_are_enough(n):
    # Above 2,000 items so few pairs are kept as a sparse table.
    q, pairs = rotations.uniform(n, 6), recovery.choose_pairs(n, 0)
    assert len(np.unique(np.sort(pairs, axis=1), axis=0)) == len(pairs) == 435 + 8 * (n - 30)
    found = recovery.recover(pairs, rotations.pair_distances(q, pairs))
    assert error(found.quaternions, q) < 1e-6


def test_a_sparse_table_polishes_as_an_array_does():
    # The same 150 items and pairs, alone and beside 1,900 that are compared with few.
    q = rotations.uniform(2050, 7)
    few = recovery.choose_pairs(2050, 1, core=150, each=12)
    core = np.flatnonzero(np.bincount(few.ravel()) > 20)
    noise = np.random.default_rng(0).normal(0, 0.05, len(few))
    d = np.clip(rotations.pair_distances(q, few) + noise, 0, np.pi)
    inside = np.isin(few, core).all(axis=1)
    alone = recovery.recover(np.searchsorted(core, few[inside]), d[inside])
    whole = recovery.recover(few, d)
    floor = recovery.error_floor(150, 0.05)
    assert error(alone.quaternions, q[core]) < 1.25 * floor
    # The others add twelve each: the core is placed better than alone.
    assert error(whole.quaternions[core], q[core]) < error(alone.quaternions, q[core])
    np.testing.assert_array_equal(whole.used, np.bincount(few.ravel()))


@pytest.mark.parametrize("seed", range(2))
def test_wild_distances_do_not_matter(seed):
    q, pairs, d = exact(300, seed)
    rng = np.random.default_rng(seed)
    wild = rng.random(len(d)) < 0.2
    spoilt = np.where(wild, rng.uniform(0, np.pi, len(d)), d)
    found = recovery.recover(pairs, spoilt)
    # A wild distance may fall where the true one is; a plain fit would be off by 0.1 rad.
    assert error(found.quaternions, q) < 2e-3
    right = np.bincount(pairs[~wild].ravel(), minlength=300)
    assert np.abs(found.used - right).max() < 10


def test_wild_distances_cost_little_beside_noise():
    q, pairs, d = exact(300, 4)
    rng = np.random.default_rng(4)
    d = np.clip(d + rng.normal(0, 0.05, len(d)), 0, np.pi)
    wild = rng.random(len(d)) < 0.2
    spoilt = np.where(wild, rng.uniform(0, np.pi, len(d)), d)
    found = recovery.recover(pairs, spoilt)
    without = recovery.recover(pairs[~wild], d[~wild])
    # Tukey's weights are 95 % efficient; some wild ones fall near the true distances.
    assert error(found.quaternions, q) < 1.1 * error(without.quaternions, q)
    # A median that the wild ones lift takes 0.05 rad for 0.066: the cut is 4.685 of these, 0.31.
    off = np.abs(rotations.pair_distances(found.quaternions, pairs) - spoilt)
    assert (found.used >= np.bincount(pairs[off < 0.25].ravel(), minlength=300)).all()
    assert (found.used <= np.bincount(pairs[off < 0.37].ravel(), minlength=300)).all()
    # What to expect comes from the distances that count.
    laid = rotations.distance(evaluation.align(found.quaternions, q).quaternions, q)
    assert found.expected_error_rad.mean() == pytest.approx(laid.mean(), rel=0.25)


def test_expected_errors_are_what_noise_leaves():
    q, pairs, d = exact(300, 2)
    rng = np.random.default_rng(2)
    # The last hundred are seen three times as badly.
    sd = np.where((pairs >= 200).any(axis=1), 0.3, 0.1)
    found = recovery.recover(pairs, np.clip(d + rng.normal(0, sd), 0, np.pi))
    off = rotations.distance(evaluation.align(found.quaternions, q).quaternions, q)
    for some in (slice(0, 200), slice(200, 300)):
        # Clipping takes some of the noise.
        assert found.expected_error_rad[some].mean() == pytest.approx(off[some].mean(), rel=0.25)
    assert (found.used == 299).all()


def test_pairs_may_come_in_any_order_and_twice():
    q, pairs, d = exact(60, 0)
    order = np.random.default_rng(0).permutation(len(pairs))
    mixed = np.where(order[:, None] % 2 == 0, pairs[order], pairs[order][:, ::-1])
    twice, d_twice = (
        np.concatenate([mixed, mixed[:100]]),
        np.concatenate([d[order], d[order][:100]]),
    )
    found = recovery.recover(twice, d_twice)
    assert error(found.quaternions, q) < 1e-6
    assert (found.used == 59).all()


def test_a_pair_that_comes_twice_counts_once():
    # Twelve distances to others, but only to four: an item cannot be placed by these.
    _, pairs, d = exact(30, 0)
    mine = np.flatnonzero((pairs == 29).any(axis=1))
    rest = np.setdiff1d(np.arange(len(pairs)), mine)
    kept = np.r_[rest, mine[:4], mine[:4], mine[:4]]
    with pytest.raises(InputError, match="item 29 has distances to 4 others"):
        recovery.recover(pairs[kept], d[kept])


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_an_outcome_is_what_its_orientations_say(share):
    _, pairs, d = exact(150, 8)
    rng = np.random.default_rng(8)
    d = np.clip(d + rng.normal(0, 0.1, len(d)), 0, np.pi)
    some = rng.random(len(pairs)) < share
    pairs, d = pairs[some], d[some]
    found = recovery.recover(pairs, d, 150)
    off = rotations.pair_distances(found.quaternions, pairs) - d
    counts = np.bincount(pairs.ravel(), minlength=150)

    def per_item(values):
        return np.bincount(pairs[:, 0], values, 150) + np.bincount(pairs[:, 1], values, 150)

    np.testing.assert_allclose(found.residuals_rad, per_item(np.abs(off)) / counts, atol=1e-7)
    np.testing.assert_array_equal(found.used, counts)
    assert found.loss == pytest.approx(np.mean(off**2), rel=1e-6)
    sd = np.sqrt(per_item(off**2) / (counts - 3))
    floors = [recovery.error_floor(n, s) for n, s in zip(counts, sd, strict=True)]
    np.testing.assert_allclose(found.expected_error_rad, floors, rtol=1e-6)


def test_one_wild_item_has_the_largest_residual():
    _, pairs, d = exact(80, 0)
    wild = (pairs == 17).any(axis=1)
    d[wild] = np.random.default_rng(0).uniform(0, np.pi, wild.sum())
    found = recovery.recover(pairs, d)
    assert np.argmax(found.residuals_rad) == 17
    np.testing.assert_array_equal(np.flatnonzero(found.outlier), [17])


def test_the_same_seed_recovers_the_same():
    _, pairs, d = exact(100, 0)
    a, b = (recovery.recover(pairs, d, seed=4) for _ in range(2))
    np.testing.assert_array_equal(a.quaternions, b.quaternions)
    np.testing.assert_array_equal(a.landmarks, b.landmarks)


@pytest.mark.parametrize("seed", range(3))
def test_landmarks_alone_come_back(seed):
    q = rotations.uniform(40, 5 + seed)
    d = rotations.distance(q[:, None], q[None])
    found, loss, agreed = recovery.solve_landmarks(d, seed)
    assert error(found, q) < 1e-6 and loss < 1e-10 and agreed
    # A third of all random starts arrive: of the eight that are kept of sixteen, at least one.
    assert recovery.solve_landmarks(d, seed, starts=2)[1] < 1e-10


def test_landmarks_are_laterated_by_the_others_alone():
    # Many starts and all members at once, as one at a time.
    starts = rotations.uniform(60, 0).reshape(2, 30, 4)
    d = rotations.distance(starts[0][:, None], starts[0])
    d = np.clip(d + np.random.default_rng(0).normal(0, 0.3, d.shape), 0, np.pi)
    np.fill_diagonal(d, 0)
    moved = solve._laterate_each_against_others(starts, np.cos(d / 2) ** 2)
    for q, found in zip(starts, moved, strict=True):
        for k in range(30):
            others = np.arange(30) != k
            alone = recovery.laterate(d[k : k + 1, others], q[others])
            assert rotations.distance(alone[0], found[k]) < 1e-6


def test_landmarks_with_noise_are_solved_together():
    q = rotations.uniform(30, 1)
    d = rotations.distance(q[:, None], q[None])
    d = np.clip(d + np.random.default_rng(1).normal(0, 0.3, d.shape), 0, np.pi)
    d = np.triu(d, 1) + np.triu(d, 1).T
    found, loss, agreed = recovery.solve_landmarks(d, 0)
    assert agreed
    pairs = distances.all_pairs(30)
    assert loss == pytest.approx(recovery.pair_loss(found, pairs, d[tuple(pairs.T)]), rel=1e-6)
    # What a landmark's distance to itself is said to be changes nothing.
    again, same, _ = recovery.solve_landmarks(d + np.eye(30), 0)
    np.testing.assert_array_equal(again, found)
    assert same == loss


@pytest.mark.parametrize("seed", range(3))
def test_landmarks_without_a_solution_do_not_agree(seed):
    d = np.random.default_rng(seed).uniform(0, np.pi, (40, 40))
    _, loss, agreed = recovery.solve_landmarks(np.triu(d, 1) + np.triu(d, 1).T, 0, starts=32)
    assert loss > 0.1 and not agreed


# --------------------------------------------------------------------------------------
# Lateration


@pytest.mark.parametrize("weighted", [False, True])
def test_lateration_is_exact(weighted):
    landmarks, q = rotations.uniform(40, 0), rotations.uniform(50, 1)
    d = rotations.distance(q[:, None], landmarks)
    weights = np.random.default_rng(2).uniform(0.5, 2, d.shape) if weighted else None
    found = recovery.laterate(d, landmarks, weights=weights)
    # Weighted by normal equations with a ridge of 1e-9: its square root at worst.
    assert rotations.distance(found, q).max() < (1e-6 if weighted else 1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_each_row_depends_on_its_own_distances_alone(weighted):
    rng = np.random.default_rng(0)
    landmarks = rotations.uniform(40, 0)
    d = rng.uniform(0, np.pi, (30, 40))
    w = rng.uniform(0, 1, d.shape) if weighted else None
    whole = recovery.laterate(d, landmarks, weights=w)
    part = recovery.laterate(d[7:9], landmarks, weights=None if w is None else w[7:9])
    # Random distances leave eigenvectors near each other: 1e-9 instead of 1e-12.
    assert rotations.distance(part, whole[7:9]).max() < 1e-9


def test_entries_of_no_weight_are_ignored():
    landmarks, q = rotations.uniform(40, 0), rotations.uniform(50, 1)
    d = rotations.distance(q[:, None], landmarks)
    rng = np.random.default_rng(2)
    bad = rng.random(d.shape) < 0.4
    spoilt = np.where(bad, rng.uniform(0, np.pi, d.shape), d)
    found = recovery.laterate(spoilt, landmarks, weights=(~bad).astype(float))
    assert rotations.distance(found, q).max() < 1e-6
    assert rotations.distance(recovery.laterate(spoilt, landmarks), q).mean() > 0.05


def test_a_landmark_of_weight_two_is_two_landmarks():
    landmarks, q = rotations.uniform(40, 0), rotations.uniform(50, 1)
    d = rotations.distance(q[:, None], landmarks) + np.random.default_rng(3).normal(
        0, 0.2, (50, 40)
    )
    weights = np.ones_like(d)
    weights[:, :7] = 2
    weighted = recovery.laterate(d, landmarks, weights=weights)
    twice = recovery.laterate(np.c_[d, d[:, :7]], np.r_[landmarks, landmarks[:7]])
    assert rotations.distance(weighted, twice).max() < 1e-6
    assert rotations.distance(weighted, recovery.laterate(d, landmarks)).mean() > 1e-3


def test_an_unknown_distance_may_be_nan_where_it_has_no_weight():
    landmarks, q = rotations.uniform(40, 0), rotations.uniform(50, 1)
    d = rotations.distance(q[:, None], landmarks)
    known = np.random.default_rng(2).random(d.shape) < 0.7
    weights = known.astype(float)
    found = recovery.laterate(np.where(known, d, np.nan), landmarks, weights=weights)
    assert rotations.distance(found, q).max() < 1e-6
    for unknown in (None, np.ones_like(d)):
        with pytest.raises(InputError, match="row 0 has one that is not"):
            recovery.laterate(np.where(known, d, np.nan), landmarks, weights=unknown)
    with pytest.raises(InputError, match=r"\(50, 40\), got \(40,\)"):
        recovery.laterate(d, landmarks, weights=np.ones(40))


@pytest.mark.parametrize("name", ["C3", "D2"])
def test_kernel_distances_place_one_of_each_orbit(name):
    orbits = symmetry.group(name)
    landmarks, q = rotations.uniform(60, 0), rotations.uniform(50, 1)
    d = orbits.kernel_distance(q, landmarks)
    found = recovery.laterate(d, landmarks, symmetry=name)
    assert orbits.distance(found, q).max() < 1e-4
    with pytest.raises(InputError, match=f"{name} are laterated without weights"):
        recovery.laterate(d, landmarks, symmetry=name, weights=np.ones_like(d))


@pytest.mark.parametrize(
    ("d", "landmarks", "message"),
    [
        (np.zeros((3, 8)), rotations.uniform(8, 0), "at least"),
        (np.zeros((3, 20)), rotations.uniform(21, 0), r"\(n, 21\)"),
        (np.zeros(20), rotations.uniform(20, 0), r"\(n, 20\)"),
        (np.zeros((3, 20)), np.zeros((20, 4)), "unit"),
    ],
)
def test_landmarks_that_cannot_place_are_refused(d, landmarks, message):
    with pytest.raises(InputError, match=message):
        recovery.laterate(d, landmarks)


# --------------------------------------------------------------------------------------
# From features


def test_features_that_hold_orientations_give_them_back():
    q = rotations.uniform(500, 0)
    found = recovery.recover_features(packed(q), landmarks=60)
    # Distances of float32 features: 3e-4 rad where they are 0 or pi.
    assert error(found.quaternions, q) < 1e-3
    assert len(found.landmarks) == 60 and (found.used == 60).all()


def test_neither_chunks_nor_the_others_change_a_particle():
    rng = np.random.default_rng(1)
    f = packed(rotations.uniform(300, 1)) + rng.normal(0, 0.03, (300, 16))
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    whole = recovery.recover_features(f, landmarks=60)
    parts = recovery.recover_features(f, landmarks=60, chunk=7)
    marks = recovery.find_landmarks(f, landmarks=60)
    alone = marks.place(f[123:124])
    # float32 products, summed in another order.
    assert rotations.distance(whole.quaternions, parts.quaternions).max() < 1e-3
    assert rotations.distance(whole.quaternions[123], alone.quaternions[0]) < 1e-3
    np.testing.assert_allclose(whole.residuals_rad, parts.residuals_rad, atol=1e-3)
    assert whole.loss == pytest.approx(parts.loss, rel=1e-3)


def test_particles_that_are_something_else_are_flagged_and_place_nobody():
    rng = np.random.default_rng(2)
    f = packed(rotations.uniform(400, 2)) + rng.normal(0, 0.02, (400, 16))
    f[:40] = rng.standard_normal((40, 16))
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    found = recovery.recover_features(f, landmarks=200)
    assert found.outlier[:40].all() and found.outlier[40:].mean() < 0.05
    assert found.landmarks.min() >= 40


def test_an_outcome_from_features_is_what_its_orientations_say():
    rng = np.random.default_rng(3)
    f = packed(rotations.uniform(300, 3)) + rng.normal(0, 0.03, (300, 16))
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    marks = recovery.find_landmarks(f, landmarks=60)
    np.testing.assert_array_equal(marks.features, f[marks.index])
    found = recovery.recover_features(f, landmarks=60)
    np.testing.assert_array_equal(found.landmarks, marks.index)
    off = rotations.distance(found.quaternions[:, None], marks.quaternions)
    off = distances.from_features(f, marks.features) - off
    # float32 inner products near 1.
    np.testing.assert_allclose(found.residuals_rad, np.abs(off).mean(axis=1), atol=1e-4)
    assert found.loss == pytest.approx(np.mean(off**2), rel=1e-3)
    sd = np.sqrt((off**2).sum(axis=1) / (len(marks.index) - 3))
    floors = [recovery.error_floor(len(marks.index), s) for s in sd]
    np.testing.assert_allclose(found.expected_error_rad, floors, rtol=1e-2)
    np.testing.assert_array_equal(found.outlier, found.residuals_rad > marks.outlier_above_rad)


def test_features_of_the_papers_head_give_orientations_too():
    # 2 arccos <q, p> is the distance where no two are more than half a turn apart.
    rng = np.random.default_rng(4)
    q = rotations.perturb(np.tile([0.0, 0, 0, 1], (200, 1)), rng.uniform(-0.7, 0.7, (200, 3)))
    found = recovery.recover_features(q, "cosine", landmarks=60)
    assert error(found.quaternions, q) < 2e-3


def test_landmarks_of_a_symmetric_particle_place_orbits():
    orbits = symmetry.group("D2")
    known, q = rotations.grid(200), rotations.uniform(50, 1)
    marks = recovery.Landmarks(orbits.features(known), known, "exact", 1e-3, np.arange(200), "D2")
    found = marks.place(orbits.features(q))
    assert orbits.distance(found.quaternions, q).max() < 1e-2
    assert found.residuals_rad.max() < 1e-3 and not found.outlier.any()
    # An orientation that is not of the orbit is no such particle's image.
    f = np.random.default_rng(2).standard_normal((1, known.shape[0]))[:, : len(orbits.harmonics)]
    assert marks.place(f / np.linalg.norm(f)).outlier.all()


def test_another_seed_chooses_other_landmarks():
    f = packed(rotations.uniform(100, 5))
    a, b, c = (recovery.find_landmarks(f, seed=seed, landmarks=30).index for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert len(np.intersect1d(a, c)) < 25


def test_no_features_are_no_particles():
    marks = recovery.find_landmarks(packed(rotations.uniform(50, 0)))
    none = marks.place(np.zeros((0, 16)))
    assert none.quaternions.shape == (0, 4) and none.loss == 0


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.ones((23, 16)), "at least 24"),
        (np.ones(30), r"\(n, f\)"),
        (np.full((30, 16), np.nan), "finite"),
    ],
)
def test_features_that_place_nobody_are_refused(features, message):
    with pytest.raises(InputError, match=message):
        recovery.recover_features(features)


@pytest.mark.parametrize("options", [{"each": 5}, {"core": 20}, {"core": 90}])
def test_a_choice_that_cannot_work_is_refused(options):
    with pytest.raises(InputError, match="wanted"):
        recovery.choose_pairs(80, 0, **options)


# --------------------------------------------------------------------------------------
# What they are made of


@pytest.mark.parametrize(("n", "dense"), [(60, True), (2100, False)])
def test_a_table_tells_the_known_distances(n, dense):
    pairs = recovery.choose_pairs(n, 0)
    rng = np.random.default_rng(0)
    q, d = rotations.uniform(n, 0), rng.uniform(0.1, np.pi, len(pairs))
    table = DistanceTable(pairs, d, n)
    assert table.dense == dense
    full = np.zeros((n, n))
    full[tuple(pairs.T)] = full[tuple(pairs.T[::-1])] = d
    known = full > 0
    np.testing.assert_array_equal(table.counts, known.sum(axis=1))
    members, rows = rng.permutation(n)[:50], rng.permutation(n)[:40]
    np.testing.assert_array_equal(table.counts_to(members), known[:, members].sum(axis=1))
    some, weights = table.among(rows, members)
    np.testing.assert_array_equal(some, full[np.ix_(rows, members)])
    np.testing.assert_array_equal(weights, known[np.ix_(rows, members)])
    sums = np.zeros((n, 4))
    for block in table.blocks(1000):
        entries, weights = table.entries(block)
        sums[block] = table.sums(weights * entries * table.cosines(q, block), q, block)
    np.testing.assert_allclose(sums, (full * (q @ q.T)) @ q, atol=1e-12)


def test_a_table_is_completed_and_what_is_known_stays():
    q = rotations.uniform(200, 9)
    s = np.sum(q[:, None] * q, axis=-1) ** 2
    rng = np.random.default_rng(9)
    known = np.triu(rng.random((200, 200)) < 0.4, 1)
    known = (known | known.T | np.eye(200, dtype=bool)).astype(float)
    np.testing.assert_allclose(lateration.complete(known * s, known), s, atol=1e-4)
    noise = rng.normal(0, 0.02, s.shape)
    noisy = known * (s + noise + noise.T)
    filled = lateration.complete(noisy, known)
    np.testing.assert_array_equal(filled[known > 0], noisy[known > 0])
    # Ten numbers of 80 known ones: what is filled in is about as good as what is known.
    assert np.std((filled - s)[known == 0]) < np.std((noisy - s)[known > 0])


def test_landmarks_know_enough_of_each_other():
    # Each of 600 knows 60: of 24 each knows two or three, of 384 some know less than 40.
    pairs = distances.all_pairs(600)
    pairs = pairs[np.random.default_rng(0).random(len(pairs)) < 0.1]
    table = DistanceTable(pairs, np.ones(len(pairs)), 600)
    chosen = solve._choose_landmarks(table, 80, np.random.default_rng(1))
    known = table.among(chosen, chosen)[1].sum(axis=1)
    assert known.min() >= 40 or len(chosen) == 600
    # All of a core know each other: these and no others, as many as were asked for.
    core = recovery.choose_pairs(300, 0, core=70)
    table = DistanceTable(core, np.ones(len(core)), 300)
    for wanted, size in ((40, 40), (60, 60), (200, 60)):
        chosen = solve._choose_landmarks(table, wanted, np.random.default_rng(1))
        assert len(chosen) == size and (table.counts[chosen] >= 69).all()


@pytest.mark.parametrize(("agreed", "draws"), [(False, 2), (True, 1)])
def test_landmarks_that_do_not_agree_are_drawn_anew_once(monkeypatch, agreed, draws):
    made = []

    def doubtful(d, rng, **options):
        q, loss, _ = solve_landmarks(d, rng, **options)
        made.append(loss)
        return q, loss, agreed

    solve_landmarks = solve.solve_landmarks
    monkeypatch.setattr(solve, "solve_landmarks", doubtful)
    q, pairs, d = exact(100, 0)
    assert error(recovery.recover(pairs, d, landmarks=40).quaternions, q) < 1e-6
    assert len(made) == draws


@pytest.mark.parametrize("angle", [1e-3, 1e-2])
def test_a_step_against_others_that_are_right_is_newtons(angle):
    # What is left of an error is its square.
    q, pairs, d = exact(100, 1)
    table = DistanceTable(pairs, d, 100)
    for k, axis in enumerate(np.eye(3)):
        off = q.copy()
        off[k] = -rotations.perturb(q[k], angle * axis)
        moved, loss, _ = gauss_newton._sweep(table, off, np.inf)
        assert rotations.distance(moved[k], q[k]) < 5 * angle**2
        assert loss == pytest.approx(recovery.pair_loss(off, pairs, d), rel=1e-6)


def test_a_step_is_no_longer_than_it_is_good_for():
    q, pairs, d = exact(100, 1)
    table = DistanceTable(pairs, d, 100)
    off = rotations.perturb(q, np.random.default_rng(0).normal(0, 1, (100, 3)))
    moved = gauss_newton._sweep(table, off, np.inf)[0]
    # 0.15 along the tangent of half a turn's sphere.
    assert rotations.distance(moved, off).max() < 2 * np.arctan(0.15) + 1e-9
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1)


def test_an_item_with_six_distances_is_found_by_search():
    placed, q = rotations.uniform(9, 1), rotations.uniform(200, 2)
    d = rotations.distance(q[:, None], placed)
    rng = np.random.default_rng(3)
    weights = (np.argsort(rng.random(d.shape), axis=1) < 6).astype(float)
    spoilt = np.where(weights > 0, d, rng.uniform(0, np.pi, d.shape))
    found = gauss_newton.search(spoilt, weights, placed)
    assert (rotations.distance(found, q) < 1e-6).mean() > 0.97
    # Wherever the starts arrive, all that is known agrees.
    off = weights * (rotations.distance(found[:, None], placed) - d)
    assert (np.abs(off).max(axis=1) < 1e-6).mean() > 0.99


def test_the_polish_never_returns_worse_than_it_saw():
    _, pairs, d = exact(100, 1)
    noisy = np.clip(d + np.random.default_rng(0).normal(0, 1.5, len(d)), 0, np.pi)
    table = DistanceTable(pairs, noisy, 100)
    q = rotations.uniform(100, 5)
    losses = [
        recovery.pair_loss(gauss_newton.minimise_loss(table, q, steps)[0], pairs, noisy)
        for steps in range(8)
    ]
    assert losses[0] == pytest.approx(recovery.pair_loss(q, pairs, noisy))
    assert (np.diff(losses) <= 1e-12).all()


def test_outliers_lie_five_standard_deviations_out():
    # The quantiles of a normal law, whose standard deviation the median tells to 1 %.
    usual = 1 + 0.1 * norm.ppf((np.arange(1001) + 0.5) / 1001)
    flags = recovery.outliers(np.r_[usual, 1.49, 1.51])
    np.testing.assert_array_equal(np.flatnonzero(flags), [1002])
    # Rounding is no reason, where all fit exactly.
    alike = np.r_[np.full(50, 1e-9), 9e-7, 2e-6]
    np.testing.assert_array_equal(np.flatnonzero(recovery.outliers(alike)), [51])


def test_what_rounding_leaves_flags_nobody_and_ranks_no_errors():
    """Whatever the largest residual of exact features was: it depends on the CPU."""
    features = packed(rotations.uniform(40, 8)).astype(np.float32)
    marks = dataclasses.replace(recovery.find_landmarks(features), outlier_above_rad=0.0)
    found = marks.place(features)
    assert 0 < found.residuals_rad.max() < 1e-4
    assert not found.outlier.any() and np.ptp(found.expected_error_rad) == 0
    # Copies that disagree by 0.1 rad then leave that to expect of all alike.
    q = found.quaternions
    turned = rotations.perturb(rotations.in_plane(q, np.pi / 2), np.tile([0.1, 0, 0], (40, 1)))
    mirrored = rotations.perturb(rotations.mirror_x(q), np.tile([0.1, 0, 0], (40, 1)))
    scale = recovery.error_scale(q, turned, mirrored, found.expected_error_rad)
    assert scale == pytest.approx((0.0, 0.1 / np.sqrt(2)))


def test_three_of_an_items_residuals_are_fitted():
    # Residuals of 8 distances of unit variance have 5 degrees of freedom.
    found = outcome.expected_errors(np.array([5 * 0.2**2]), np.array([8]))
    assert found[0] == pytest.approx(recovery.error_floor(8, 0.2))


# --------------------------------------------------------------------------------------
# What is refused


def broken(change):
    pairs = distances.all_pairs(20)
    d = np.full(len(pairs), 1.0)
    return change(pairs, d)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, d: (np.r_[p, [[3, 3]]], np.r_[d, 0.0]), "item 3 with itself"),
        (lambda p, d: (np.r_[p, [[3, 99]]], np.r_[d, 1.0], 20), "index 20 items"),
        (lambda p, d: (np.r_[p, [[-1, 3]]], np.r_[d, 1.0]), "index"),
        (lambda p, d: (p, np.r_[np.nan, d[1:]]), "pair 0 has nan"),
        (lambda p, d: (p, np.r_[d[1:], -0.1]), "has -0.1"),
        (lambda p, d: (p, np.rad2deg(d)), "radians"),
        (lambda p, d: (p, d[1:]), "one a pair"),
        (lambda p, d: (p[:0], d[:0]), "no pairs"),
        (lambda p, d: (p.astype(float), d), "integers"),
        (lambda p, d: (p[:, 0], d), r"\(m, 2\)"),
        (lambda p, d: (p[:, [0, 1, 1]], d), r"\(m, 2\)"),
    ],
)
def test_malformed_pairs_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        recovery.recover(*broken(change))


def test_a_distance_of_a_half_turn_may_be_rounded_up():
    pairs = distances.all_pairs(2)
    recovery.check_pairs(pairs, np.array([np.pi], np.float32))
    with pytest.raises(InputError, match="radians"):
        recovery.check_pairs(pairs, [np.pi + 1e-3])


def test_a_table_of_landmarks_is_square():
    with pytest.raises(InputError, match=r"\(m, m\), got \(20, 19\)"):
        recovery.solve_landmarks(np.ones((20, 19)), 0)


@pytest.mark.parametrize("options", [{"landmarks": 11}, {"starts": 1}])
def test_too_few_landmarks_or_starts_are_refused(options):
    _, pairs, d = exact(30, 0)
    with pytest.raises(InputError, match="wanted at least"):
        recovery.recover(pairs, d, **options)


def test_an_item_with_too_few_distances_is_named():
    _, pairs, d = exact(30, 0)
    keep = ~(pairs == 29).any(axis=1)
    keep[np.flatnonzero(~keep)[:5]] = True
    with pytest.raises(InputError, match="item 29 has distances to 5 others"):
        recovery.recover(pairs[keep], d[keep])
    with pytest.raises(InputError, match="item 30 has distances to 0 others"):
        recovery.recover(pairs, d, 31)


def test_too_few_pairs_to_begin_with_are_refused():
    # Everyone has twelve neighbours on a ring: no set of landmarks can be completed.
    n = 3200
    pairs = np.stack(
        [np.repeat(np.arange(n), 6), (np.arange(6 * n) // 6 + np.tile(range(1, 7), n))]
    )
    with pytest.raises(InputError, match="choose_pairs"):
        recovery.recover(pairs.T % n, np.ones(6 * n))


def test_two_sets_without_a_bridge_are_refused():
    # Nothing ties their frames together: any answer would be wrong and have no loss.
    _, pairs, d = exact(200, 0)
    together = (pairs < 100).all(axis=1) | (pairs >= 100).all(axis=1)
    with pytest.raises(InputError, match="pairs"):
        recovery.recover(pairs[together], d[together], landmarks=40, starts=4)
