import warnings

import numpy as np
import pytest
from scipy.stats import norm

from cryoem import evaluation, rotations
from cryoem.errors import InputError
from cryoem.recovery import frame

N = 200


def recovered(seed, inverted, noise_rad):
    """Orientations and their copies as distances give them: in a frame of O(4), with noise."""
    rng = np.random.default_rng(seed)
    true = rotations.uniform(N, rng)
    sets = [true, rotations.in_plane(true, np.pi / 2), rotations.mirror_x(true)]
    a, b = rotations.uniform(2, rng)
    out = []
    for q in sets:
        q = rotations.perturb(q, rng.normal(0, noise_rad, (N, 3)))
        q = rotations.inverse(q) if inverted else q
        signs = rng.choice([-1.0, 1.0], (N, 1))
        out.append(signs * rotations.multiply(rotations.multiply(a, q), b))
    return true, out


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_without_noise_the_copies_fix_the_frame_exactly(inverted, seed):
    true, sets = recovered(seed, inverted, 0.0)
    fixed = frame.from_copies(*sets)
    assert fixed.inverted == inverted and fixed.certain and not fixed.hand_known
    assert fixed.spread_rad < 1e-6
    # The eigenvectors of one-sided alignment: its reweighting stops at 1e-3 rad.
    assert (
        evaluation.orientation_errors(fixed.apply(sets[0]), true, over="one-sided").mean_rad < 1e-6
    )


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("noise_rad", [0.05, 0.2])
def test_with_noise_the_frame_costs_little(inverted, noise_rad):
    true, sets = recovered(5, inverted, noise_rad)
    fixed = frame.from_copies(*sets)
    assert fixed.inverted == inverted and fixed.certain
    one_sided = evaluation.orientation_errors(fixed.apply(sets[0]), true, over="one-sided").mean_rad
    best = evaluation.orientation_errors(sets[0], true, over="o4").mean_rad
    # The frame is known to noise / sqrt(200), which adds in squares.
    assert best <= one_sided < 1.1 * best


def test_without_the_frame_a_map_is_garbage():
    true, sets = recovered(5, False, 0.05)
    assert evaluation.orientation_errors(sets[0], true, over="one-sided").mean_rad > 0.3


def test_some_bad_copies_do_not_move_the_frame():
    true, (q, turned, mirrored) = recovered(6, False, 0.05)
    turned[:40] = rotations.uniform(40, 1)
    mirrored[60:100] = rotations.uniform(40, 2)
    fixed = frame.from_copies(q, turned, mirrored)
    one_sided = evaluation.orientation_errors(fixed.apply(q), true, over="one-sided").mean_rad
    assert one_sided < 1.1 * evaluation.orientation_errors(q, true, over="o4").mean_rad


def test_copies_that_are_all_off_alike_do_not_move_the_frame():
    # Thirty of a hundred, turned by the same radian: a mean would follow them by 0.3 rad.
    true, (q, turned, mirrored) = recovered(6, False, 0.02)
    turned[:60] = rotations.perturb(turned[:60], np.tile([1.0, 0, 0], (60, 1)))
    mirrored[:60] = rotations.perturb(mirrored[:60], np.tile([1.0, 0, 0], (60, 1)))
    fixed = frame.from_copies(q, turned, mirrored)
    one_sided = evaluation.orientation_errors(fixed.apply(q), true, over="one-sided").mean_rad
    assert one_sided < 1.5 * evaluation.orientation_errors(q, true, over="o4").mean_rad


@pytest.mark.parametrize("seed", range(5))
def test_garbage_is_not_certain(seed):
    with pytest.warns(UserWarning, match="the frame cannot be told"):
        fixed = frame.from_copies(*rotations.uniform(3 * N, seed).reshape(3, N, 4))
    assert not fixed.certain


def test_one_copy_cannot_tell_inversion():
    # A single quarter-turn and half-turn about perpendicular axes fit both verdicts exactly.
    _, (q, turned, mirrored) = recovered(1, False, 0.0)
    with pytest.warns(UserWarning, match="the frame cannot be told"):
        fixed = frame.from_copies(q[:1], turned[:1], mirrored[:1])
    assert fixed.spread_rad < 1e-6 and fixed.other_spread_rad < 1e-6
    assert not fixed.certain and fixed.confidence == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("noise_rad", [0.1, 0.5, 1.0])
def test_the_confidence_is_kept(noise_rad):
    # Thirty copies of ever worse images: a verdict that is sure of itself is right.
    sure = right = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(30):
            _, sets = recovered(seed, bool(seed % 2), noise_rad)
            fixed = frame.from_copies(*(q[:30] for q in sets))
            sure += fixed.certain
            right += fixed.certain and fixed.inverted == bool(seed % 2)
    assert right == sure
    assert sure == 30 or noise_rad > 0.1


def test_spreads_are_what_single_copies_are_off():
    # Two noisy orientations make a turn: what is off is root 2 of a Gaussian vector's mean length.
    _, sets = recovered(3, False, 0.1)
    fixed = frame.from_copies(*sets)
    assert fixed.spread_rad == pytest.approx(np.sqrt(2) * 2 * np.sqrt(2 / np.pi) * 0.1, rel=0.1)
    assert fixed.other_spread_rad > 0.5
    inverses = frame.from_copies(*(rotations.inverse(q) for q in sets))
    assert inverses.inverted
    assert inverses.spread_rad == pytest.approx(fixed.spread_rad, rel=1e-6)
    assert inverses.other_spread_rad == pytest.approx(fixed.other_spread_rad, rel=1e-6)


def test_the_confidence_is_the_normal_law_of_the_mean_difference():
    # Off by 0.1 and 0.3 in turn, against 0.3 and 0.2: a difference of 0.05 +- 0.15 / sqrt(n).
    n = 36
    angles = [np.tile([0.1, 0.3], n // 2), np.tile([0.3, 0.2], n // 2)]
    for verdict in (False, True):
        inverted, spread, other, confidence = frame._verdict(angles[::-1] if verdict else angles)
        assert inverted == verdict
        assert (spread, other) == pytest.approx((0.2, 0.25))
        assert confidence == pytest.approx(norm.cdf(0.05 / (0.15 / 6)))


@pytest.mark.parametrize(
    ("confidence", "spread_rad", "certain"),
    [(1.0, 0.2, True), (0.99, 0.2, False), (1.0, 0.9, False)],
)
def test_a_verdict_must_be_both_likely_and_large(confidence, spread_rad, certain):
    one = np.array([0.0, 0, 0, 1])
    assert frame.Frame(one, one, False, spread_rad, 1.0, confidence, False).certain == certain


def test_the_warning_names_the_callers_line():
    with pytest.warns(UserWarning, match="the frame cannot be told") as caught:
        frame.from_copies(*rotations.uniform(3 * N, 0).reshape(3, N, 4))
    assert caught[0].filename == __file__


def test_a_certain_frame_warns_of_nothing():
    _, sets = recovered(1, True, 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame.from_copies(*sets)


@pytest.mark.parametrize("inverted", [False, True])
def test_references_fix_frame_and_hand(inverted):
    true, (q, *_) = recovered(2, inverted, 0.05)
    fixed = frame.from_references(q[:50], true[:50])
    assert fixed.inverted == inverted and fixed.hand_known and fixed.certain
    unaligned = evaluation.orientation_errors(fixed.apply(q), true, over="none").mean_rad
    # Fifty references leave a frame of noise / sqrt(50), in squares.
    assert unaligned < 1.1 * evaluation.orientation_errors(q, true, over="o4").mean_rad


@pytest.mark.parametrize(
    ("sizes", "message"), [((5, 5, 4), "5, 5, 4"), ((5, 4, 5), "5, 4, 5"), ((0, 0, 0), "0, 0, 0")]
)
def test_copies_must_match_their_originals(sizes, message):
    with pytest.raises(InputError, match=message):
        frame.from_copies(*(rotations.uniform(n, 0) for n in sizes))


def test_references_must_match():
    with pytest.raises(InputError, match="as many"):
        frame.from_references(rotations.uniform(5, 0), rotations.uniform(4, 0))
