"""A seeded permutation of [0, size), asked for at any positions, many at once."""

from __future__ import annotations

import functools

import numpy as np

ROUNDS = 4  # what Grain takes too: not for secrets, enough for an order
LEAST = 16  # bits of a block of the cipher, at least: smaller ones leave patterns


def permuted(position: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Where each position [n] in [0, size) goes, [n] int64. `size` is at most 2^62; `seed` is a 32-bit number.

    Grain's index_shuffle, of arrays: four rounds of Simon (eprint.iacr.org/2013/404) on the fewest even number of bits, again
    and again for what falls outside. Grain's own takes too few bits where size = 4^k + 1 (k >= 8) and is no permutation there.
    """
    position = np.asarray(position, np.int64)
    if position.size and not 0 <= position.min() <= position.max() < size:
        raise IndexError(f"positions {position.min()} to {position.max()} of {size}")
    if size <= 1 << LEAST - 2:
        return _table(size, seed)[position]
    bits = (max((size - 1).bit_length(), LEAST) + 1) // 2
    keys = _keys(seed)
    out = _encrypted(position, bits, keys)
    outside = np.flatnonzero(out >= size)
    while outside.size:  # less than four times on average
        out[outside] = _encrypted(out[outside], bits, keys)
        outside = outside[out[outside] >= size]
    return out


@functools.lru_cache(maxsize=64)
def _table(size: int, seed: int) -> np.ndarray:
    """All of a small permutation, whose positions are far apart among the cipher's: each round doubles how far is walked."""
    out = _encrypted(np.arange(1 << LEAST), LEAST // 2, _keys(seed)) if size > 1 else np.zeros(1, np.int64)
    while ((outside := out >= size)[:size]).any():
        out = np.where(outside, out[out], out)
    return out[:size]


def _encrypted(value: np.ndarray, bits: int, keys: tuple[int, ...]) -> np.ndarray:
    """Simon's rounds on numbers of 2 x `bits` bits."""
    bits, mask = np.uint64(bits), np.uint64((1 << bits) - 1)
    left, right = value.astype(np.uint64) >> bits, value.astype(np.uint64) & mask
    for key in keys:
        twice = right << bits | right  # shifted, its low bits are the word turned round
        by_1, by_2, by_8 = (twice >> bits - np.uint64(by) for by in (1, 2, 8))
        left, right = right, ((by_1 & by_8) ^ by_2 ^ np.uint64(key) ^ left) & mask
    return (left << bits | right).astype(np.int64)


@functools.lru_cache(maxsize=1024)
def _keys(seed: int) -> tuple[int, ...]:
    """`ROUNDS` words as C++'s std::seed_seq{seed} generates them ([rand.util.seedseq] in the standard)."""
    n, given, last = ROUNDS, (seed,), (1 << 32) - 1
    t = (n - 1) // 2
    p = (n - t) // 2
    words = [0x8B8B8B8B] * n
    for k in range(2 * n):
        here, near, far = k % n, (k + p) % n, (k + p + t) % n
        if k < n:
            mixed = words[here] ^ words[near] ^ words[k - 1]
            a = 1664525 * (mixed ^ mixed >> 27) & last
            b = a + here + (given[k - 1] if 0 < k <= len(given) else len(given) if k == 0 else 0) & last
            words[near], words[far] = words[near] + a & last, words[far] + b & last
        else:
            mixed = words[here] + words[near] + words[here - 1] & last
            a = 1566083941 * (mixed ^ mixed >> 27) & last
            b = a - here & last
            words[near], words[far] = words[near] ^ a, words[far] ^ b
        words[here] = b
    return tuple(words)
