"""A seeded permutation of [0, size), evaluated at any positions."""

import functools

import numpy as np

ROUNDS = 4  # a Luby-Rackoff cipher needs four; more do not make the order better
SMALL = 1 << 14  # up to this size, positions are sorted by a hash: on few positions the cipher leaves patterns


def permuted(position: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Where each position [n] in [0, size) goes, [n] int64. `size` is at most 2^62; `seed` is a 32-bit number.

    A Feistel cipher on the fewest even number of bits, applied again to results that are not below `size`. Raises IndexError.
    """
    position = np.asarray(position, np.int64)
    if position.size and not 0 <= position.min() <= position.max() < size:
        raise IndexError(f"positions {position.min()} to {position.max()} of {size}")
    if size <= SMALL:
        return _table(size, seed)[position]
    bits = np.uint64(((size - 1).bit_length() + 1) // 2)
    out = _encrypted(position.astype(np.uint64), bits, seed)
    while (outside := np.flatnonzero(out >= size)).size:  # fewer than four passes on average
        out[outside] = _encrypted(out[outside], bits, seed)
    return out.astype(np.int64)


@functools.lru_cache(maxsize=64)
def _table(size: int, seed: int) -> np.ndarray:
    return np.argsort(_hash(np.arange(size, dtype=np.uint64), _keys(seed)[0]), kind="stable")


def _encrypted(value: np.ndarray, bits: np.uint64, seed: int) -> np.ndarray:
    left, right = value >> bits, value & (np.uint64(1) << bits) - np.uint64(1)
    for key in _keys(seed):
        left, right = right, left ^ _hash(right, key) >> np.uint64(64) - bits
    return left << bits | right


def _hash(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """SplitMix64's output function of `value` + `key`; a bijection of 64 bits."""
    value = value + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ value >> np.uint64(shift)) * np.uint64(factor)
    return value ^ value >> np.uint64(31)


@functools.lru_cache(maxsize=1024)
def _keys(seed: int) -> np.ndarray:
    return np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)
