"""Log-probabilities of given tokens, computed for many texts at a time.

Texts are packed into rows of one length, as documents are in training, so a task needs few compiled programs and little
padding. Texts in succession that begin alike, such as a question with each of its answers, share that beginning:

    row:      beginning | answer 1 | answer 2 | beginning' | answer 1' | ...

A token sees the beginning of its own group and its own branch, no other; its position is that in its own text.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from tinyllama_jax.base import sharding
from tinyllama_jax.base.config import Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.inference.forward import attention, logits, through_layers
from tinyllama_jax.inference.weights import Loaded, Weights

SHORTEST = 256  # tokens of a row; doubled for longer texts. Attention over 256 keys is 8% of the work of a 135M model
TOKENS = {"cpu": 1_024}  # of all rows computed at a time, by backend
MANY_TOKENS = 16_384  # on other backends
HEAD = 256  # tokens whose logits [HEAD, V] are in memory at a time


class Text(NamedTuple):
    """Token ids, of which the last `n` are scored."""

    ids: list[int]
    n: int


class Scores(NamedTuple):
    """Log-probability of each scored token of a text, and whether it is the most likely one, [n]."""

    logprobs: np.ndarray  # natural logarithms, fp32
    greedy: np.ndarray  # whether each is the most likely token


class _Group(NamedTuple):
    """Texts that share a beginning: `shared` input tokens."""

    shared: int
    members: list[int]  # indices of the texts

    def length(self, texts: Sequence[Text]) -> int:
        """Input tokens in its row."""
        return self.shared + sum(len(texts[i].ids) - 1 - self.shared for i in self.members)


class _Rows(NamedTuple):
    """The inputs of one call, [B, S]."""

    tokens: np.ndarray
    positions: np.ndarray
    group: np.ndarray  # from 1; 0: padding
    branch: np.ndarray  # from 1; 0: the shared beginning


class Scorer:
    """Scores texts with a loaded model. For each length of row (SHORTEST, doubled) two programs are compiled."""

    def __init__(self, loaded: Loaded, batch: int | None = None):
        """`batch`: rows computed at a time; None: as many as fit TOKENS. Rounded up to the mesh's data-parallel copies."""
        self._weights, self._model, self._mesh, self._batch = loaded.weights, loaded.model, loaded.mesh, batch
        self._copies = sharding.batch_devices(loaded.mesh)

    @property
    def context(self) -> int:
        """The most tokens that a text can have before its last one."""
        return self._model.seq_len

    def rows(self, length: int) -> int:
        """How many rows of `length` tokens are computed at a time."""
        wanted = self._batch or max(1, TOKENS.get(jax.default_backend(), MANY_TOKENS) // length)
        return -(-wanted // self._copies) * self._copies

    def __call__(self, texts: Sequence[Text], done: Callable[[int], None] = lambda n: None) -> list[Scores]:
        """The scores of each text. `done` is told how many more texts are finished. Raises UserError for a wrong text."""
        for text in texts:
            _check(text, self._model)
        groups, out = _grouped(texts), [Scores(np.zeros(t.n, np.float32), np.zeros(t.n, bool)) for t in texts]
        for length, rows in _packed(groups, texts):
            B = self.rows(length)
            for start in range(0, len(rows), B):
                some = rows[start : start + B]
                self._score(some, length, B, texts, out)
                done(sum(len(group.members) for row in some for group in row))
        return out

    def _score(self, rows: list[list[_Group]], length: int, B: int, texts: Sequence[Text], out: list[Scores]) -> None:
        """Computes some rows and writes the scores of their texts into `out`."""
        inputs, sources, targets, owners = _laid_out(rows, length, B, texts)
        with jax.set_mesh(self._mesh):
            x_XD = _hidden(self._weights, inputs, self._model)
            parts = []
            for start in range(0, len(sources), HEAD):
                pad = (0, max(0, start + HEAD - len(sources)))
                part = (np.pad(a[start : start + HEAD], pad) for a in (sources, targets))
                parts.append(_head(self._weights, x_XD, *part, self._model.vocab_size))
            logprobs, greedy = (np.concatenate(a)[: len(sources)] for a in zip(*jax.device_get(parts), strict=True))
        at = 0
        for i in owners:
            end = at + texts[i].n
            out[i].logprobs[:], out[i].greedy[:] = logprobs[at:end], greedy[at:end]
            at = end


@partial(jax.jit, static_argnames="model")
def _hidden(weights: Weights, rows: _Rows, model: Model) -> jax.Array:
    """The head's input of every token, [B x S, D]."""
    pair = lambda a_BS: (a_BS[:, :, None], a_BS[:, None, :])  # of each query and of each key
    (group_q, group_k), (branch_q, branch_k) = pair(rows.group), pair(rows.branch)
    order = jnp.arange(rows.tokens.shape[1])
    visible_BST = (group_q == group_k) & ((branch_k == 0) | (branch_q == branch_k)) & (order[:, None] >= order)

    def attend(q_BSNH, k_BSKH, v_BSKH):
        return attention(q_BSNH, jnp.moveaxis(k_BSKH, 1, 2), jnp.moveaxis(v_BSKH, 1, 2), visible_BST)

    x_BSD = through_layers(weights, rows.tokens, rows.positions, model, attend)
    return x_BSD.reshape(-1, x_BSD.shape[2])


@partial(jax.jit, static_argnames="vocab_size", out_shardings=PartitionSpec())
def _head(
    weights: Weights, x_XD: jax.Array, sources_M: jax.Array, targets_M: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of `targets_M` after the tokens `sources_M`, and whether each is the most likely token, both [M].

    A trainer's vocabulary may be filled up with rows that stand for no token; those from `vocab_size` on are left out.
    """
    logits_MV = logits(weights, x_XD[sources_M][None])[0, :, :vocab_size]
    own_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=1)[:, 0]
    return own_M - jax.nn.logsumexp(logits_MV, axis=1), jnp.argmax(logits_MV, axis=1) == targets_M


def _check(text: Text, model: Model) -> None:
    if not 1 <= text.n < len(text.ids):
        raise UserError(f"{text.n} of a text's {len(text.ids)} tokens cannot be scored: at least one has to come before them")
    if len(text.ids) > model.seq_len + 1:
        raise UserError(f"a text has {len(text.ids):,} tokens, and the model's context is {model.seq_len:,}; shorten it")
    if not 0 <= min(text.ids) <= max(text.ids) < model.vocab_size:
        raise UserError(f"a text has a token outside the vocabulary of {model.vocab_size:,}")


def _grouped(texts: Sequence[Text]) -> list[_Group]:
    """Groups neighbours where that saves a tenth of their tokens, and the group fits in a row of twice the longest text."""
    most, out = max(SHORTEST, 2 * max((len(text.ids) for text in texts), default=0)), []
    for i, text in enumerate(texts):
        inputs = len(text.ids) - 1
        if out:
            last = out[-1]
            ids = texts[last.members[-1]].ids
            end = min(last.shared, inputs)
            same = next((k for k in range(end) if ids[k] != text.ids[k]), end)
            joined = _Group(same, [*last.members, i])
            if joined.length(texts) <= min(most, 0.9 * (last.length(texts) + inputs)):
                out[-1] = joined
                continue
        out.append(_Group(inputs, [i]))
    return out


def _packed(groups: list[_Group], texts: Sequence[Text]) -> list[tuple[int, list[list[_Group]]]]:
    """(length, rows of groups) by length: the longest groups first, each in the first row that has room for it."""
    lengths = {id(group): group.length(texts) for group in groups}
    rows: list[tuple[int, list[_Group]]] = []
    room: list[int] = []
    first = 0  # rows before it are full
    for group in sorted(groups, key=lambda g: -lengths[id(g)]):
        n = lengths[id(group)]
        at = next((i for i in range(first, len(rows)) if room[i] >= n), None)
        if at is None:
            size = SHORTEST
            while size < n:
                size *= 2
            rows.append((size, []))
            room.append(size)
            at = len(rows) - 1
        rows[at][1].append(group)
        room[at] -= n
        while first < len(rows) and (room[first] < 8 or len(rows) - first > 256):  # so that the search stays short
            first += 1
    sizes = sorted({size for size, _ in rows}, reverse=True)
    return [(size, [row for other, row in rows if other == size]) for size in sizes]


def _laid_out(
    rows: list[list[_Group]], length: int, B: int, texts: Sequence[Text]
) -> tuple[_Rows, np.ndarray, np.ndarray, list[int]]:
    """(inputs, for each scored token the index of the input before it, the scored tokens, the texts in this order)."""
    inputs = _Rows(*(np.zeros((B, length), np.int32) for _ in _Rows._fields))
    sources, targets, owners = [], [], []
    for b, row in enumerate(rows):
        start = 0
        for number, group in enumerate(row, start=1):
            shared, at = group.shared, start + group.shared
            inputs.tokens[b, start:at] = texts[group.members[0]].ids[:shared]
            inputs.positions[b, start:at] = np.arange(shared)
            for branch, i in enumerate(group.members, start=1):
                ids, n = texts[i]
                own = ids[shared:-1]
                end = at + len(own)
                inputs.tokens[b, at:end], inputs.branch[b, at:end] = own, branch
                inputs.positions[b, at:end] = shared + np.arange(len(own))
                place = np.concatenate([np.arange(start, start + shared), np.arange(at, end)])[-n:]
                sources.append(b * length + place)
                targets.append(ids[-n:])
                owners.append(i)
                at = end
            inputs.group[b, start:at] = number
            start = at
    return inputs, np.concatenate(sources).astype(np.int32), np.concatenate(targets).astype(np.int32), owners
