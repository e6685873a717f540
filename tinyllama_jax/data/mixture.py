"""Weighted mixture of sources as a pure function: global sample index -> (source, which sample of it)."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.mixture_weights import Weight, knots_of, weight_at


class _Curve(NamedTuple):
    """The integral of a share over samples: from knot i on it is values[i] + starts[i] k + bends[i] k^2, k samples later."""

    knots: list[int]
    values: list[Fraction]
    starts: list[Fraction]
    bends: list[Fraction]

    def __add__(self, other: _Curve) -> _Curve:
        add = lambda a, b: [x + y for x, y in zip(a, b, strict=True)]
        return _Curve(self.knots, *map(add, self[1:], other[1:]))


class _Piece(NamedTuple):
    """Of the first n samples at a node, floor(c0 + c1 n + c2 n^2 +- sqrt(d0 + d1 n)) go left, for n >= `begin`."""

    begin: int
    c: tuple[int, int, int]  # all times `over`
    d: tuple[int, int]  # all times `over`^2
    sign: int
    over: int


class _Split(NamedTuple):
    """A node: of the first n samples that reach it, `left(n)` go to one side, the others to the other."""

    pieces: list[_Piece]
    children: tuple[_Split | int, _Split | int]  # an int is a source

    def left(self, n: np.ndarray) -> np.ndarray:
        """Non-decreasing, never by more than 1 a sample: the rounded exact value of a function that is so."""
        n = np.asarray(n, np.int64)
        which = np.searchsorted([piece.begin for piece in self.pieces], n, side="right") - 1
        out = np.empty_like(n)
        for i in np.unique(which):
            here = which == i
            out[here] = _floor(self.pieces[i], n[here])
        return out


class Mixture:
    """Which source each sample of the run comes from.

    A binary tree of two-way splits, each an integer count function, so that any index is answered at once and nothing is
    carried along. Of the first n samples a source gets the integral of its weight (weights normalised), rounded once at each
    level: for two sources always within 1/2, for up to four within 1. For more it depends on the weights: a level adds 1/2 to
    the part of the error above it that falls to a source, and the tree is chosen for that to be small (see `_arranged`): with
    random constant weights most of 5 to 12 sources stay within 1, the worst within 1.15; whatever they become, up to eight
    within 2.
    Within 1 - 1/(2n - 2), always, is possible (Tijdeman, The chairman assignment problem, 1980), but sample after sample and
    knowing what is to come.
    All arithmetic is exact.
    """

    def __init__(self, weights: list[Weight], tokens_per_sample: int = 1):
        """`weights`: a positive number a source, or its weights over the run's tokens. Raises UserError otherwise.

        Where they change, they do so from whole samples on, and it is the normalised weights that go in straight lines.
        """
        if not weights or min(max(w for _, w in knots_of(weight)) for weight in weights) <= 0:
            raise UserError(f"mixture weights must be positive: {weights}")
        self.n_sources = len(weights)
        in_samples = tuple(_in_samples(weight, tokens_per_sample) for weight in weights)
        self._root: _Split | int = _joined(_arranged(in_samples), _curves(in_samples))[1]

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
                left = int(node.left(np.array([count]))[0])
                waiting += [(node.children[0], left), (node.children[1], count - left)]
        return out

    def same_until(self, other: Mixture, n: int) -> bool:
        """Whether the first `n` samples are those of `other`, sources with the same number being the same."""
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
    """What decides about the first `n` samples of a node, and nothing else."""
    if isinstance(node, int) or not n:
        return node if n else None
    left = int(node.left(np.array([n]))[0])
    parts = [_until(child, count) for child, count in zip(node.children, (left, n - left), strict=True)]
    alive = [part for part in parts if part is not None]
    if len(alive) == 1:  # all went to one side
        return alive[0]
    return [piece for piece in node.pieces if piece.begin < n], left, parts  # of one that begins here, no more than its value


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
    """Knots at whole samples, no two at one: a jump takes one sample."""
    out: list[tuple[int, float]] = []
    for tokens, value in knots_of(weight):
        at = math.ceil(Fraction(str(tokens)) / tokens_per_sample)
        out.append((max(at, out[-1][0] + 1) if out else at, value))
    return tuple(out)


def _pieces(node: _Curve, left: _Curve) -> Iterator[_Piece]:
    """The integral of the left child's share, as a function of how many samples have reached the node."""
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
    most = max(int(n.max()), 1)  # the coefficients themselves are to fit, too
    if abs(c0) + abs(c1) * most + abs(c2) * most**2 >= 1 << 62:
        n = n.astype(object)  # Python's integers
    return ((c0 + (c1 + c2 * n) * n) // piece.over).astype(np.int64)


def _joined(tree: _Tree, curves: list[_Curve]) -> tuple[_Curve, _Split | int]:
    """The tree with its splits, and the integral of what all its sources share."""
    if isinstance(tree, int):
        return curves[tree], tree
    (a, left), (b, right) = (_joined(child, curves) for child in tree)
    return a + b, _Split(list(_pieces(a + b, a)), (left, right))


# -- which tree ---------------------------------------------------------------------------------------------------------

_Tree = int | tuple["_Tree", "_Tree"]  # an int is a source
_Knots = tuple[tuple[int, float], ...]


@functools.lru_cache
def _arranged(in_samples: tuple[_Knots, ...]) -> _Tree:
    """The tree of these sources: each is put, and put again, where the errors are smallest.

    By the weights when it begins, for what comes has no say in what was: a source that begins later joins the tree as it is,
    and one that begins from 0 is taken to become an average one.
    """
    begins = {}
    for j, knots in enumerate(in_samples):
        first = next(i for i, (_, weight) in enumerate(knots) if weight > 0)
        begins.setdefault(knots[first - 1][0] if first else 0, []).append(j)
    tree: _Tree | None = None
    for at, new in sorted(begins.items()):
        weights = [float(weight_at(knots, at)) for knots in in_samples]
        alive = [weight for weight in weights if weight] or [1.0]
        weights = [weight or (sum(alive) / len(alive) if j in new else 0.0) for j, weight in enumerate(weights)]
        for _ in range(3 if len(new) <= 16 else 1):  # more change little
            for j in sorted(new, key=lambda j: (weights[j], j)):
                tree = min(_with(_without(tree, j), j), key=lambda tree: _cost(tree, weights))
    return tree


def _with(tree: _Tree | None, j: int) -> Iterator[_Tree]:
    """The trees that have source `j` at one place more."""
    yield j if tree is None else (tree, j)
    if isinstance(tree, tuple):
        yield from ((left, tree[1]) for left in _with(tree[0], j))
        yield from ((tree[0], right) for right in _with(tree[1], j))


def _cost(tree: _Tree, weights: list[float]) -> list[float]:
    """For each source the most of its error beyond the 1/2 of its own level, in halves, the largest first.

    Before them, how much too deep they lie: the errors are within half the depth, whatever the weights become.
    """
    found = [source for child in tree for source in _beyond(child, weights)] if isinstance(tree, tuple) else []
    levels = 1 + max((depth for _, _, depth in found), default=0)
    allowed = 2 if len(found) <= 4 else 1 + (len(found) - 1).bit_length()
    return [max(0, levels - allowed), *sorted((beyond for _, beyond, _ in found), reverse=True)]


def _beyond(tree: _Tree, weights: list[float]) -> list[tuple[float, float, int]]:
    """For each source its weight, the sum of its parts of the nodes that it is below, and how many these are."""
    if isinstance(tree, int):
        return [(weights[tree], 0.0, 0)]
    found = [source for child in tree for source in _beyond(child, weights)]
    total = sum(weight for weight, _, _ in found)
    return [(weight, beyond + (weight / total if total else 0), depth + 1) for weight, beyond, depth in found]


def _without(tree: _Tree | None, j: int) -> _Tree | None:
    if not isinstance(tree, tuple):
        return None if tree == j else tree
    left, right = (_without(child, j) for child in tree)
    return right if left is None else left if right is None else (left, right)
