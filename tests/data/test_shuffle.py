"""The permutation: Grain's, of many positions at once, and one where Grain's is none."""

import grain
import numpy as np
import pytest

from tinyllama_jax.data.shuffle import permuted

SIZES = [
    1,
    2,
    3,
    17,
    255,
    256,
    257,
    65_535,
    65_536,
    65_538,
    131_072,
    131_073,
    262_144,
    10**6,
    10**9,
    2**32 - 5,
    2**32 + 7,
    10**12,
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 12_345, 2**32 - 1])
def test_as_grain_does_one_by_one(size, seed):
    position = np.random.default_rng(seed).integers(0, size, 30)
    one = lambda p: grain.experimental.index_shuffle(int(p), max_index=size - 1, seed=seed, rounds=4)
    assert permuted(position, size, seed).tolist() == [one(p) for p in position]


@pytest.mark.parametrize("size", [1, 2, 3, 100, 16_384, 16_385, 65_535, 65_536, 65_537, 65_538, 262_145])
def test_every_position_once(size):
    out = permuted(np.arange(size), size, 5)
    assert out.dtype == np.int64 and np.array_equal(np.sort(out), np.arange(size))


def test_another_seed_is_another_order():
    a, b = (permuted(np.arange(10_000), 10_000, seed) for seed in (1, 2))
    assert (a == b).sum() < 10 and np.abs(np.corrcoef(a, np.arange(10_000))[0, 1]) < 0.05
    assert permuted(np.arange(0), 10, 1).shape == (0,)


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_outside(position):
    with pytest.raises(IndexError, match="of 10"):
        permuted([0, position], 10, 1)
