"""Weighted mixture of sources as a pure function: global sample index -> (source, which sample of it)."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from tinyllama_jax.config import UserError


class _Split(NamedTuple):
    """A node: of the first n samples that reach it, `left(n)` go to one side, the others to the other."""

    left: Callable[[np.ndarray], np.ndarray]  # non-decreasing, never by more than 1 a sample
    children: tuple[_Split | int, _Split | int]  # an int is a source


class Mixture:
    """Which source each sample of the run comes from, for sources with constant weights.

    A binary tree of two-way splits, each an integer count function, so that any index is answered at once and nothing is
    carried along. Of the first n samples a source with weight w (weights normalised) gets w n rounded: for two sources
    always within 1/2, for up to four within 1 (tests/data/test_mixture.py measures it).
    """

    def __init__(self, weights: list[float]):
        """`weights`: one positive number a source. Raises UserError otherwise."""
        if not weights or min(weights) <= 0:
            raise UserError(f"mixture weights must be positive: {weights}")
        self.n_sources = len(weights)
        exact = [Fraction(str(w)) for w in weights]  # 0.7 means 7/10, not the nearest binary fraction
        # lightest first, as in Huffman's code: the heavy sources end near the root, where rounding adds up least
        heap = [(w, j, j) for j, w in enumerate(exact)]
        heapq.heapify(heap)
        while len(heap) > 1:
            (w_a, order, a), (w_b, _, b) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (w_a + w_b, order, _Split(_rounded_share(w_a / (w_a + w_b)), (a, b))))
        self._root: _Split | int = heap[0][2]

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Global sample indices [n] -> (source [n], k [n]): sample `index` is the k-th (from 0) that its source gives."""
        index = np.asarray(index, np.int64)
        source, k = np.empty_like(index), np.empty_like(index)
        self._descend(self._root, index, np.arange(len(index)), source, k)
        return source, k

    def counts(self, n: int) -> np.ndarray:
        """How many of the first `n` samples come from each source [n_sources]; they add up to `n`."""
        out = np.zeros(self.n_sources, np.int64)
        waiting = [(self._root, n)]
        while waiting:
            node, count = waiting.pop()
            if isinstance(node, int):
                out[node] = count
            else:
                left = int(node.left(np.int64(count)))
                waiting += [(node.children[0], left), (node.children[1], count - left)]
        return out

    def _descend(self, node: _Split | int, n: np.ndarray, where: np.ndarray, source: np.ndarray, k: np.ndarray) -> None:
        if isinstance(node, int):
            source[where], k[where] = node, n
            return
        before = node.left(n)
        goes_left = node.left(n + 1) > before
        self._descend(node.children[0], before[goes_left], where[goes_left], source, k)
        self._descend(node.children[1], (n - before)[~goes_left], where[~goes_left], source, k)


def _rounded_share(share: Fraction) -> Callable[[np.ndarray], np.ndarray]:
    share = share.limit_denominator(10**8)  # 2 x 10^8 x n stays below 2^63 for n < 4.6 x 10^10 samples
    return lambda n: (2 * share.numerator * n + share.denominator) // (2 * share.denominator)
