"""The mixture: every sample has one place, and the counts follow the weights."""

from fractions import Fraction

import numpy as np
import pytest

from tinyllama_jax.config import UserError
from tinyllama_jax.data.mixture import Mixture

WEIGHTS = [
    [1.0],
    [0.7, 0.3],
    [0.693584, 0.306416],
    [0.75, 0.15, 0.10],
    [3, 1, 1, 2],
    [0.001, 0.999],
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_each_source_gives_its_samples_in_order_without_a_gap(weights):
    source, k = Mixture(weights).locate(np.arange(20_000))
    for j in range(len(weights)):
        np.testing.assert_array_equal(k[source == j], np.arange(np.sum(source == j)))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_counts_never_leave_the_weights_by_more_than_one(weights):
    mixture = Mixture(weights)
    source, _ = mixture.locate(np.arange(20_000))
    exact = [Fraction(str(w)) for w in weights]
    for j, w in enumerate(exact):
        counts = np.cumsum(source == j)
        expected = np.arange(1, 20_001) * float(w / sum(exact))
        bound = 0.5 if len(weights) <= 2 else 1.0
        assert np.abs(counts - expected).max() <= bound + 1e-6


def test_seven_to_three_by_hand():
    source, k = Mixture([0.7, 0.3]).locate(np.arange(10))
    assert np.bincount(source).tolist() == [7, 3]
    # round-half-up of 0.3 n (the lighter source is the left child): 0 1 1 1 2 2 2 2 3 3 3 for n = 0 .. 10 has its steps at
    # 0.3 n = 0.5, 1.5, 2.5, so at n = 2, 5, 9
    assert np.flatnonzero(source == 1).tolist() == [1, 4, 8]
    assert k[[1, 4, 8]].tolist() == [0, 1, 2]


def test_random_access_equals_the_sequence_far_out():
    mixture = Mixture([0.693584, 0.306416])
    far = 1_464_844_288  # the last sample of 3T tokens: 1,430,512 x 1,024
    source, k = mixture.locate(np.arange(far - 1_000, far))
    assert mixture.counts(far).sum() == far
    assert mixture.counts(far).tolist() == [round(far * Fraction("0.693584")), round(far * Fraction("0.306416"))]
    for j in range(2):
        np.testing.assert_array_equal(k[source == j], np.arange(mixture.counts(far - 1_000)[j], mixture.counts(far)[j]))


def test_no_weight_is_no_mixture():
    with pytest.raises(UserError, match="must be positive"):
        Mixture([1.0, 0.0])
