"""Weighted mixture of sources as a pure function: global sample index -> (source, index within the source)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.mixture_weights import Weight, knots_of, weight_at

_Knots = tuple[tuple[int, float], ...]  # (sample, weight)


class _Curve(NamedTuple):
    """The integral of a share over samples: k samples after knot i it is values[i] + starts[i] k + bends[i] k^2."""

    knots: list[int]
    values: list[Fraction]
    starts: list[Fraction]
    bends: list[Fraction]

    def __add__(self, other: _Curve) -> _Curve:
        add = lambda a, b: [x + y for x, y in zip(a, b, strict=True)]
        return _Curve(self.knots, *map(add, self[1:], other[1:]))


class _Piece(NamedTuple):
    """For n >= `begin`: floor(c0 + c1 n + c2 n^2 +- sqrt(d0 + d1 n)) of the first n samples at a node go left."""

    begin: int
    c: tuple[int, int, int]  # all times `over`
    d: tuple[int, int]  # all times `over`^2
    sign: int
    over: int


class _Split(NamedTuple):
    """A node of the tree: of the first n samples that reach it, `left(n)` go to the left child, the others to the right."""

    pieces: list[_Piece]
    children: tuple[_Split | int, _Split | int]  # an int is a source

    def left(self, n: np.ndarray) -> np.ndarray:
        """Rises by 0 or 1 per sample, because the exact function that it rounds rises by 0 to 1."""
        n = np.asarray(n, np.int64)
        which = np.searchsorted([piece.begin for piece in self.pieces], n, side="right") - 1
        out = np.empty_like(n)
        for i in np.unique(which):
            rows = which == i
            out[rows] = _floor(self.pieces[i], n[rows])
        return out


class Mixture:
    """Which source each sample of the run comes from.

    A binary tree of two-way splits. Each split is an integer count function, so that any index is answered at once and no state
    is carried from sample to sample. Of the first n samples a source gets the integral of its normalised weight, rounded once
    at each level. A level adds at most 1/2 to the error: two sources are always within 1/2, up to four within 1, up to eight
    within 1.5. All arithmetic is exact.

    A bound of 1 - 1/(2n - 2) for n sources is possible, but only sample after sample and with all later weights known
    (Tijdeman, The chairman assignment problem, 1980).
    """

    def __init__(self, weights: list[Weight], tokens_per_sample: int = 1):
        """`weights`: for each source a positive number, or its weights over the run's tokens. Raises UserError otherwise.

        Knots are rounded up to whole samples. Between knots the normalised weights are linear.
        """
        if not weights or min(max(w for _, w in knots_of(weight)) for weight in weights) <= 0:
            raise UserError(f"mixture weights must be positive: {weights}")
        self.n_sources = len(weights)
        in_samples = tuple(_in_samples(weight, tokens_per_sample) for weight in weights)
        # sources that begin later come last: they do not change the order before they begin
        order = sorted(range(self.n_sources), key=lambda j: (_begin(in_samples[j]), j))
        self._root: _Split | int = _joined(order, _curves(in_samples))[1]

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Global sample indices [n] -> (source [n], k [n]): sample `index` is the k-th sample (from 0) of its source."""
        index = np.asarray(index, np.int64)
        source, k = np.empty_like(index), np.empty_like(index)
        self._descend(self._root, index, np.arange(len(index)), source, k)
        return source, k

    def counts(self, n: int) -> np.ndarray:
        """How many of the first `n` samples come from each source [n_sources]; the sum is `n`."""
        out = np.zeros(self.n_sources, np.int64)
        waiting = [(self._root, n)]
        while waiting:
            node, count = waiting.pop()
            if isinstance(node, int):
                out[node] = count
            else:
                left = int(node.left(np.array([count]))[0])
                waiting += [(node.children[0], left), (node.children[1], count - left)]
        return out

    def same_until(self, other: Mixture, n: int) -> bool:
        """Whether `other` gives the same first `n` samples from the same sources."""
        return _until(self._root, n) == _until(other._root, n)

    def _descend(self, node: _Split | int, n: np.ndarray, where: np.ndarray, source: np.ndarray, k: np.ndarray) -> None:
        if isinstance(node, int):
            source[where], k[where] = node, n
            return
        before = node.left(n)
        goes_left = node.left(n + 1) > before
        self._descend(node.children[0], before[goes_left], where[goes_left], source, k)
        self._descend(node.children[1], (n - before)[~goes_left], where[~goes_left], source, k)


def _until(node: _Split | int, n: int) -> object:
    """Everything that determines the first `n` samples of a node, and nothing more."""
    if isinstance(node, int) or not n:
        return node if n else None
    left = int(node.left(np.array([n]))[0])
    parts = [_until(child, count) for child, count in zip(node.children, (left, n - left), strict=True)]
    alive = [part for part in parts if part is not None]
    if len(alive) == 1:  # all went to one side
        return alive[0]
    return [piece for piece in node.pieces if piece.begin < n], left, parts  # a piece that begins at n matters only in `left`


def _curves(in_samples: tuple[_Knots, ...]) -> list[_Curve]:
    """The integral of each normalised weight over samples."""
    knots = sorted({0}.union(at for weight in in_samples for at, _ in weight))
    at_knots = [[weight_at(weight, at) for at in knots] for weight in in_samples]
    sums = [sum(column) for column in zip(*at_knots, strict=True)]
    curves = []
    for row in at_knots:
        shares = [weight / total for weight, total in zip(row, sums, strict=True)]
        bends, values = [], [Fraction(0)]
        for (n0, n1), (s0, s1) in zip(itertools.pairwise(knots), itertools.pairwise(shares), strict=True):
            bends.append((s1 - s0) / (2 * (n1 - n0)))
            values.append(values[-1] + (s0 + s1) / 2 * (n1 - n0))
        curves.append(_Curve(knots, values, shares, [*bends, Fraction(0)]))
    return curves


def _in_samples(weight: Weight, tokens_per_sample: int) -> _Knots:
    """Knots at whole samples, never two at the same sample: a jump in weight takes one sample."""
    out: list[tuple[int, float]] = []
    for tokens, value in knots_of(weight):
        at = math.ceil(Fraction(str(tokens)) / tokens_per_sample)
        out.append((max(at, out[-1][0] + 1) if out else at, value))
    return tuple(out)


def _begin(knots: _Knots) -> int:
    """The first sample at which a weight is positive or grows."""
    first = next(i for i, (_, weight) in enumerate(knots) if weight > 0)
    return knots[first - 1][0] if first else 0


def _pieces(node: _Curve, left: _Curve) -> Iterator[_Piece]:
    """The integral of the left child's share as a function of the samples that have reached the node."""
    # k samples of the run after a knot: n = at + p k + q k^2 have reached the node, and value + pl k + ql k^2 go left
    for at, p, q, value, pl, ql in zip(*node[1:], *left[1:], strict=True):
        c, d, sign = [value, Fraction(0), Fraction(0)], [Fraction(0), Fraction(0)], 0
        if q:  # k^2 = (n - at - p k) / q, and k = (sqrt(p^2 + 4 q (n - at)) - p) / 2 q
            c[0], c[1] = value - ql / q * at, ql / q
            if of_k := (pl - ql * p / q) / (2 * q):
                c[0] -= of_k * p
                d = [of_k**2 * (p**2 - 4 * q * at), of_k**2 * 4 * q]
                sign = 1 if of_k > 0 else -1
        elif p:  # k = (n - at) / p
            square = ql / p**2
            c = [value - pl / p * at + square * at**2, pl / p - 2 * square * at, square]
        c[0] += Fraction(1, 2)  # rounded by the floor
        over = math.lcm(*(number.denominator for number in (*c, *d)))
        yield _Piece(math.ceil(at), tuple(int(x * over) for x in c), tuple(int(x * over**2) for x in d), sign, over)


def _floor(piece: _Piece, n: np.ndarray) -> np.ndarray:
    (c0, c1, c2), (d0, d1) = piece.c, piece.d
    if piece.sign:
        roots = (max(d0 + d1 * i, 0) for i in n.tolist())
        root = [math.isqrt(d) if piece.sign > 0 else -math.isqrt(d - 1) - 1 if d else 0 for d in roots]
        return np.array([(c0 + c1 * i + c2 * i * i + r) // piece.over for i, r in zip(n.tolist(), root, strict=True)], np.int64)
    most = max(int(n.max()), 1)  # at least 1: the coefficients must fit too
    if abs(c0) + abs(c1) * most + abs(c2) * most**2 >= 1 << 62:
        n = n.astype(object)  # Python's integers do not overflow
    return ((c0 + (c1 + c2 * n) * n) // piece.over).astype(np.int64)


def _joined(sources: list[int], curves: list[_Curve]) -> tuple[_Curve, _Split | int]:
    """(the integral of the total share of `sources`, their tree).

    The left child takes the first 2^k sources, for the largest k that leaves one for the right child. So a source added at the
    end does not change how the others are split.
    """
    if len(sources) == 1:
        return curves[sources[0]], sources[0]
    half = 1 << (len(sources) - 1).bit_length() - 1
    (a, left), (b, right) = (_joined(part, curves) for part in (sources[:half], sources[half:]))
    return a + b, _Split(list(_pieces(a + b, a)), (left, right))
