"""The mixture: every sample has one place, and the counts follow the weights."""

from fractions import Fraction

import numpy as np
import pytest

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data.mixture import Mixture

WEIGHTS = [
    [1.0],
    [0.7, 0.3],
    [0.693584, 0.306416],
    [0.75, 0.15, 0.10],
    [3, 1, 1, 2],
    [0.001, 0.999],
    [0.4, 0.25, 0.2, 0.1, 0.05],
    [1, 1, 1, 1, 1, 1, 1],
    [8, 0.3, 4, 2, 0.001, 1],
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_each_source_gives_its_samples_in_order_without_a_gap(weights):
    source, k = Mixture(weights).locate(np.arange(20_000))
    for j in range(len(weights)):
        np.testing.assert_array_equal(k[source == j], np.arange(np.sum(source == j)))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_counts_follow_the_weights_within_half_a_sample_a_level(weights):
    mixture = Mixture(weights)
    source, _ = mixture.locate(np.arange(20_000))
    exact = [Fraction(str(w)) for w in weights]
    for j, w in enumerate(exact):
        counts = np.cumsum(source == j)
        expected = np.arange(1, 20_001) * float(w / sum(exact))
        bound = (len(weights) - 1).bit_length() / 2  # 1 for up to four sources
        assert np.abs(counts - expected).max() <= bound + 1e-6


def test_many_sources_of_any_weights():
    rng = np.random.default_rng(0)
    for n in [3, 4, 5, 8, 12] * 8:
        weights = (rng.random(n) ** rng.choice([0.5, 1, 3]) + 0.001).round(4)
        source, _ = Mixture(weights.tolist()).locate(np.arange(20_000))
        counts = np.cumsum(source[:, None] == np.arange(n), 0)
        error = np.abs(counts - np.arange(1, 20_001)[:, None] * weights / weights.sum()).max()
        assert error <= (n - 1).bit_length() / 2 + 1e-6


def test_seven_to_three_by_hand():
    source, k = Mixture([0.7, 0.3]).locate(np.arange(10))
    assert np.bincount(source).tolist() == [7, 3]
    # round-half-up of 0.7 n is 0 1 1 2 3 4 4 5 6 6 7 for n = 0 .. 10: no sample of the first source at n = 2, 6, 9
    assert np.flatnonzero(source == 1).tolist() == [1, 5, 8]
    assert k[[1, 5, 8]].tolist() == [0, 1, 2]


def test_random_access_equals_the_sequence_far_out():
    mixture = Mixture([0.693584, 0.306416])
    far = 1_464_844_288  # the last sample of 3T tokens: 1,430,512 x 1,024
    source, k = mixture.locate(np.arange(far - 1_000, far))
    assert mixture.counts(far).sum() == far
    assert mixture.counts(far).tolist() == [round(far * Fraction("0.693584")), round(far * Fraction("0.306416"))]
    for j in range(2):
        np.testing.assert_array_equal(k[source == j], np.arange(mixture.counts(far - 1_000)[j], mixture.counts(far)[j]))


V1_1 = [((1_500, 1), (1_506, 0.75)), ((1_500, 0), (1_506, 0.15)), ((1_500, 0), (1_506, 0.1))]
OVER_TIME = {
    "v1.1": [tuple((4 * tokens, share) for tokens, share in knots) for knots in V1_1],
    "one gives way to the other": [((0, 1), (9_000, 0)), ((0, 0), (9_000, 1))],
    "each at its own time": [1.0, ((2_000, 0.1), (5_000, 0.5)), ((1_000, 0), (8_000, 2))],
    "a jump, and an end": [1.0, ((3_000, 0), (3_001, 1)), ((6_000, 1), (6_001, 0))],
    "four": [((0, 1), (7_000, 3)), 1.0, ((500, 0), (9_000, 4)), ((0, 0.02), (10_000, 0))],
    "seven": [
        ((0, 5), (9_000, 1)),
        ((0, 1), (9_000, 4)),
        0.3,
        ((100, 0), (200, 2), (300, 0)),
        2.0,
        0.01,
        ((0, 0), (9_000, 0.5)),
    ],
}


def integral(weights, n):
    """The integral of each normalised weight over the first 1 .. n samples [n, sources], by trapezia of floats."""
    knots = sorted({0, n} | {at for w in weights if isinstance(w, tuple) for at, _ in w})
    flat = lambda w: np.interp(knots, *zip(*w, strict=True)) if isinstance(w, tuple) else np.full(len(knots), w)
    shares = np.stack([flat(w) for w in weights])
    shares = np.stack([np.interp(np.arange(n + 1), knots, row) for row in shares / shares.sum(0)], 1)
    return np.cumsum((shares[1:] + shares[:-1]) / 2, 0)


@pytest.mark.parametrize("weights", OVER_TIME.values(), ids=OVER_TIME)
def test_weights_over_time_have_their_integral_and_no_gap(weights):
    n = 12_000
    mixture = Mixture(weights)
    source, k = mixture.locate(np.arange(n))
    counts = np.stack([np.cumsum(source == j) for j in range(len(weights))], 1)
    for j in range(len(weights)):
        np.testing.assert_array_equal(k[source == j], np.arange(counts[-1, j]))
    for i in (1, 777, 6_001, n):
        assert mixture.counts(i).tolist() == counts[i - 1].tolist()
        assert mixture.locate(np.array([i - 1])) == (source[i - 1], k[i - 1])
    bound = {2: 0.5, 3: 1.0, 4: 1.0, 7: 1.5}[len(weights)]
    assert np.abs(counts - integral(weights, n)).max() <= bound + 1e-6


def test_a_ramp_by_hand():
    """From all a to all b over 8 samples of 2 tokens: of the first n, b's share is n^2 / 16, rounded half up."""
    source, _ = Mixture([((0, 1), (16, 0)), ((0, 0), (16, 1))], tokens_per_sample=2).locate(np.arange(10))
    # n^2 / 16 for n = 0 .. 8: 0, .06, .25, .56, 1, 1.56, 2.25, 3.06, 4; a's, the left child's, is n less that: its halves go up
    assert np.cumsum(source == 1).tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 5, 6]


def test_v1_1_at_its_size():
    """2T tokens: the counts at the end, by hand, and the sample far out that random access gives."""
    weights = [tuple((tokens * 1e9, share) for tokens, share in knots) for knots in V1_1]
    mixture, S = Mixture(weights, 2_048), 2_048
    n = 2 * 10**12 // S
    # the ramp is 2,929,687.5 samples long, to a whole one, from sample 732,421,875 on; on average a share is half of its last
    ramp, after = 2_929_688, n - 732_421_875 - 2_929_688
    for j, share in ((1, Fraction("0.15")), (2, Fraction("0.1"))):
        assert abs(mixture.counts(n)[j] - share * (Fraction(ramp, 2) + after)) <= 1
    source, k = mixture.locate(np.arange(n - 5_000, n))
    for j in range(3):
        np.testing.assert_array_equal(k[source == j], np.arange(mixture.counts(n - 5_000)[j], mixture.counts(n)[j]))


@pytest.mark.parametrize(
    ("other", "until"),
    [
        ([1.0], 1_500),  # before the ramp there was one source
        ([((1_500, 1), (1_506, 0.5)), ((1_500, 0), (1_506, 0.5))], 1_500),
        ([*V1_1[:2], ((1_500, 0), (1_506, 0.1), (2_000, 0.1), (2_001, 1))], 2_000),
        (V1_1, 10_000),
    ],
    ids=["one", "two", "later", "the same"],
)
def test_up_to_which_sample_two_mixtures_are_the_same(other, until):
    ours, theirs = Mixture(V1_1), Mixture(other)
    same = [np.array_equal(*(m.locate(np.arange(n)) for m in (ours, theirs))) for n in (until, until + 50)]
    assert same == [True, other is V1_1]
    assert [ours.same_until(theirs, n) for n in (0, until, until + 50)] == [True, True, other is V1_1]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("later", ["another share", "another source"])
def test_later_weights_do_not_change_earlier_samples(n, later):
    """Equal shares, so that all ties in the order occur; from sample 1,000 on the weights change."""
    changed = [((0, 1), (1_000, 1), (2_000, 3)), *[1.0] * (n - 1)] if later == "another share" else [1.0] * n
    if later == "another source":
        changed.append(((1_000, 0), (2_000, 1)))
    before, after = Mixture([1.0] * n), Mixture(changed)
    np.testing.assert_array_equal(before.locate(np.arange(1_000)), after.locate(np.arange(1_000)))
    assert before.same_until(after, 1_000) and before.same_until(after, 1_100) == (n == 1 and later == "another share")


def test_two_changes_within_a_sample_take_one_each():
    """Another source from token 10 on, as a jump within one sample of 16 tokens: the jump takes one sample."""
    source, _ = Mixture([((10, 1), (11, 0)), ((10, 0), (11, 1))], tokens_per_sample=16).locate(np.arange(6))
    assert source.tolist() == [0, 0, 1, 1, 1, 1]  # half a sample of each from 1 to 2: a is to the left, and half rounds up


def test_weights_must_be_positive():
    with pytest.raises(UserError, match="must be positive"):
        Mixture([1.0, 0.0])


def test_a_change_that_would_alter_past_samples_is_noticed():
    """A rounded count at a node can reach a knot one sample before the run does: rare, but it must be noticed."""
    before, after = Mixture([0.7, 0.75, 0.85]), Mixture([((231, 0.7), (232, 3)), 0.75, 0.85])
    at = np.arange(231)
    assert not np.array_equal(before.locate(at), after.locate(at)) and not before.same_until(after, 231)
    np.testing.assert_array_equal(before.locate(at[:-1]), after.locate(at[:-1]))
    assert before.same_until(after, 230)


def test_mixtures_with_different_samples_are_never_the_same():
    rng, same = np.random.default_rng(0), 0
    for _ in range(300):
        n, at = rng.integers(3, 7), int(rng.integers(20, 300))
        weights = (rng.integers(20, 100, n) / 100).tolist()
        changed = [((at, weights[0]), (at + int(rng.integers(1, 50)), float(rng.integers(0, 4)))), *weights[1:]]
        before, after = Mixture(weights), Mixture(changed)
        equal = np.array_equal(before.locate(np.arange(at)), after.locate(np.arange(at)))
        assert before.same_until(after, at) == equal
        same += equal
    assert same > 280


def test_a_ramp_whose_end_is_changed_on_the_way():
    """Shares are those of the whole ramp until sample 200."""
    whole = Mixture([((0, 500), (400, 250)), ((0, 800), (400, 400)), ((0, 0), (400, 650))])
    bent = Mixture([((0, 500), (200, 375)), ((0, 800), (200, 600)), ((0, 0), (200, 325))])
    np.testing.assert_array_equal(whole.locate(np.arange(190)), bent.locate(np.arange(190)))
    assert whole.same_until(bent, 190) and not whole.same_until(bent, 300)


def test_coefficients_beyond_64_bits():
    weights = [((11, 7.229),), ((0, 1), (2, 3)), ((3, 0.004354296322861699),), ((0, 1), (1, 0))]
    source, k = Mixture(weights).locate(np.arange(250))
    for j in range(4):
        np.testing.assert_array_equal(k[source == j], np.arange(np.sum(source == j)))
