"""The permutation: every position once, whatever the size and seed, and no pattern in the order."""

import numpy as np
import pytest

from tinyllama_jax.data.shuffle import SMALL, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 100, SMALL, SMALL + 1, 65_535, 65_536, 65_537, 65_538, 262_145])
@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
def test_every_position_once(size, seed):
    out = permuted(np.arange(size), size, seed)
    assert out.dtype == np.int64 and np.array_equal(np.sort(out), np.arange(size))


@pytest.mark.parametrize("size", [100, 10**6, 2**32 + 7, 10**12, 2**62])
def test_a_single_position_maps_as_it_does_among_others(size):
    positions = np.random.default_rng(0).integers(0, size, 1_000)
    out = permuted(positions, size, 12_345)
    assert 0 <= out.min() <= out.max() < size and len(set(out.tolist())) == len(set(positions.tolist()))
    assert [int(permuted(np.array([p]), size, 12_345)[0]) for p in positions[:50]] == out[:50].tolist()


@pytest.mark.parametrize("size", [10_000, 20_000, 10**9])  # below and above `SMALL`
def test_the_order_has_no_pattern(size):
    """Chi-squared over 100 bins, of mean 99 and standard deviation 14: what follows what, in one order and over seeds."""
    in_one = permuted(np.arange(10_000), size, 1)
    over_seeds = np.concatenate([permuted(np.arange(3), size, seed) for seed in range(5_000)]).reshape(-1, 3)
    for values in (in_one, np.diff(in_one) % size, over_seeds[:, 0], np.diff(over_seeds[:, :2])[:, 0] % size):
        counts = np.histogram(values, 100, (0, size))[0]
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 99 + 5 * 14
    a, b = (permuted(np.arange(10_000), size, seed) for seed in (1, 2))
    assert (a == b).sum() < 10 and abs(np.corrcoef(a, b)[0, 1]) < 0.05


def test_no_positions():
    assert permuted(np.arange(0), 10, 1).shape == permuted(np.arange(0), 10**6, 1).shape == (0,)


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_out_of_range(position):
    with pytest.raises(IndexError, match="of 10"):
        permuted([0, position], 10, 1)
