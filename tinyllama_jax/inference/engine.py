"""Generation: requests join and leave a running batch of slots, whose tokens are computed on the device a chunk at a time."""

import collections
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from tinyllama_jax.base import sharding
from tinyllama_jax.base.config import Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.inference import sampling as sampling_lib
from tinyllama_jax.inference.forward import Cache, forward, init_cache, logits, longer
from tinyllama_jax.inference.sampling import Sampling, Settings, draw, filtered
from tinyllama_jax.inference.weights import Loaded, Weights

CHUNK = 16  # the most tokens of a row between two looks of the host
PATIENCE = 0.2  # seconds: on a slow device a chunk has fewer tokens, so that text flows
PREFILL = (16, 32, 64, 128, 256, 512)  # prompts are computed in pieces of these lengths, the last one padded
SHORTEST = 256  # positions of the cache at first; it doubles when a row needs more
MARGIN = 16  # positions at the end of the cache that belong to no request: rows with nothing to compute write there
TOP = 20  # most likely tokens that can be reported beside each token
STOPS = 16  # ids that can end a request
# of the cache [B, K, T, H] and the tokens seen [B, V]; left to XLA it would change, and every program be compiled twice
_ROWS = PartitionSpec(sharding.BATCH, "tensor")


@dataclass(eq=False)
class Request:
    """What is asked for, and what has come of it so far. The engine only appends to the results."""

    prompt: list[int]  # ids, bos included
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    sample: int = 0  # several answers to one prompt and seed differ in it
    stop_ids: tuple[int, ...] = ()  # the answer ends after one of these, which is part of `tokens`
    top_logprobs: int = -1  # how many of the most likely tokens to report beside each token; -1: none
    score_prompt: bool = False  # also give the log-probabilities of the prompt's own tokens

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of `tokens`, natural, under the model itself: before any filter
    top: list[list[tuple[int, float]]] = field(default_factory=list)  # (token, log-probability), the most likely first
    prompt_logprobs: list[float | None] = field(default_factory=list)  # the first token has none
    prompt_top: list[list[tuple[int, float]]] = field(default_factory=list)
    finish: str | None = None  # "stop": a stop id; "length": max_new_tokens; "context": it is full; "cancelled"
    cached: int = 0  # tokens of the prompt whose keys and values an earlier request had left in the slot


class Rows(NamedTuple):
    """One row a slot, rebuilt on the host before each chunk: [B] or [B, ...]."""

    token: np.ndarray  # the newest token, whose key and value are not in the cache yet
    position: np.ndarray  # its position
    left: np.ndarray  # tokens still to come; 0: nothing is computed for this row
    stop_ids: np.ndarray  # [B, STOPS], -1 where there is none
    key: np.ndarray  # [B, 2], of the random numbers
    settings: Settings


class Chunk(NamedTuple):
    """What a chunk has computed, [B, CHUNK] and [B, CHUNK, TOP]; entries after `n` tokens of a row mean nothing."""

    n: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


# -- on the device -----------------------------------------------------------------------------------------------------


def _scored(logits_BV: jax.Array, token_B: jax.Array, want_top: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Log-probabilities [B] of the tokens, and the TOP most likely tokens with theirs."""
    n = min(TOP, logits_BV.shape[1])
    total_B = jax.nn.logsumexp(logits_BV, axis=1)
    none = lambda x: (jnp.zeros((len(x), n), jnp.float32), jnp.zeros((len(x), n), jnp.int32))
    values_BT, tokens_BT = lax.cond(want_top, lambda x: tuple(lax.top_k(x, n)), none, logits_BV)
    pad = partial(jnp.pad, pad_width=((0, 0), (0, TOP - n)))
    top = pad(tokens_BT), pad(values_BT - total_B[:, None], constant_values=-jnp.inf)  # `_pairs` leaves these out
    return jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0] - total_B, top


@partial(jax.jit, static_argnames="model", donate_argnames=("cache", "seen_BV"), out_shardings=(_ROWS, _ROWS, None))
def _decode(weights: Weights, cache: Cache, seen_BV, rows: Rows, n, want_top, model: Model) -> tuple[Cache, jax.Array, Chunk]:
    """At most `n` tokens for every row that has some left."""
    B, idle = len(rows.token), cache[0][0].shape[2] - MARGIN
    empty = lambda dtype, *shape: jnp.zeros((B, CHUNK, *shape), dtype)
    out = Chunk(jnp.zeros(B, jnp.int32), empty(jnp.int32), empty(jnp.float32), empty(jnp.int32, TOP), empty(jnp.float32, TOP))

    def body(carry):
        i, token, position, left, cache, seen_BV, out = carry
        active = left > 0
        x_BSD, cache = forward(weights, token[:, None], jnp.where(active, position, idle)[:, None], cache, model)
        logits_BV = logits(weights, x_BSD)[:, 0]
        drawn = draw(filtered(logits_BV, seen_BV, rows.settings), rows.key, position, rows.settings)
        logprob, top = _scored(logits_BV, drawn, want_top)
        put = lambda buffer, new: lax.dynamic_update_index_in_dim(buffer, new, i, 1)
        out = Chunk(out.n + active, *map(put, out[1:], (drawn, logprob, *top)))
        seen_BV = seen_BV.at[jnp.arange(B), drawn].max(active)
        ended = jnp.any(drawn[:, None] == rows.stop_ids, axis=1)
        return i + 1, drawn, position + 1, jnp.where(ended, 0, jnp.maximum(left - 1, 0)), cache, seen_BV, out

    carry = (jnp.int32(0), rows.token, rows.position, rows.left, cache, seen_BV, out)
    *_, cache, seen_BV, out = lax.while_loop(lambda c: (c[0] < n) & jnp.any(c[3] > 0), body, carry)
    return cache, seen_BV, out


@partial(jax.jit, static_argnames=("model", "score"), donate_argnames="cache", out_shardings=(_ROWS, None))
def _prefill(weights: Weights, cache: Cache, slot, tokens_S, start, want_top, model: Model, score: bool):
    """The cache with `tokens_S` at the positions from `start` of a slot. Padding at their end is overwritten before it is read.

    `score`: also the log-probability [S] of each token that follows one of them, with the most likely tokens; tokens_S then
    has one token more.
    """
    S = len(tokens_S) - score
    row = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, slot, 1), cache)
    x_1SD, row = forward(weights, tokens_S[None, :S], (start + jnp.arange(S))[None], row, model)
    cache = jax.tree.map(lambda a, new: lax.dynamic_update_slice_in_dim(a, new, slot, 0), cache, row)
    return cache, _scored(logits(weights, x_1SD)[0], tokens_S[1:], want_top) if score else None


@partial(jax.jit, donate_argnames="seen_BV", out_shardings=_ROWS)
def _seen(seen_BV, slot, row_V):
    return seen_BV.at[slot].set(row_V)


_new_cache = jax.jit(init_cache, static_argnums=(0, 1, 2), out_shardings=_ROWS)
_none_seen = jax.jit(lambda *shape: jnp.zeros(shape, bool), static_argnums=(0, 1), out_shardings=_ROWS)
_longer = jax.jit(longer, static_argnums=1, out_shardings=_ROWS)  # not donated: no buffer of the old size fits the new one


# -- on the host -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Slot:
    """A row of the batch. `held`: the tokens whose keys and values are in the cache, from position 0."""

    index: int
    request: Request | None = None
    turn: int = 0  # when the request was admitted
    held: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many tokens there are, prompt and answer."""
        return len(self.request.prompt) + len(self.request.tokens)

    @property
    def decoding(self) -> bool:
        """Whether all tokens but the newest are in the cache."""
        return self.request is not None and len(self.held) == self.size - 1


class Engine:
    """Runs requests. Not thread-safe: one thread calls everything.

    The number of programs compiled is bounded by the lengths of the cache (SHORTEST, doubled up to the context) and the lengths
    in PREFILL: for each length of the cache one that decodes, and two (with scores and without) for each length of a piece.
    """

    def __init__(self, loaded: Loaded, slots: int = 1):
        """`slots`: how many requests run at a time; rounded up to what the mesh's copies share evenly."""
        self._weights, self._model, self._mesh = loaded.weights, loaded.model, loaded.mesh
        copies = loaded.mesh.shape["data"]
        n = -(-slots // copies) * copies
        self._slots = [_Slot(i) for i in range(n)]
        self._queue: collections.deque[Request] = collections.deque()
        self._changed: list[Request] = []
        self._admitted = 0
        self._seconds = 0.0  # what a token took in the last chunk
        with jax.set_mesh(self._mesh):
            self._cache = _new_cache(self._model, n, min(SHORTEST, self._model.seq_len + MARGIN))
            self._seen_BV = _none_seen(n, self._model.vocab_size)

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self._model.seq_len

    @property
    def busy(self) -> bool:
        """Whether any request is queued or running."""
        return bool(self._queue) or any(slot.request for slot in self._slots)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises UserError if it cannot be run, and ValueError if it has been run before."""
        check(request, self._model)
        if request.finish or request.tokens:
            raise ValueError("this request has been run; make another")
        self._queue.append(request)

    def cancel(self, request: Request) -> None:
        """Ends a request, queued or running; its slot is free for the next one at once."""
        if request.finish:
            return
        if request in self._queue:
            self._queue.remove(request)
        self._end(request, "cancelled")

    def _end(self, request: Request, why: str) -> None:
        request.finish = why
        self._changed.append(request)
        for slot in self._slots:
            if slot.request is request:
                slot.request = None

    def step(self) -> list[Request]:
        """Admits what fits, computes one piece of a prompt and one chunk of every answer; returns the requests with news."""
        with jax.set_mesh(self._mesh):
            self._admit()
            waiting = [slot for slot in self._slots if slot.request and not slot.decoding]
            if waiting:
                self._prefill(min(waiting, key=lambda slot: slot.turn))
            for slot in self._slots:
                if slot.decoding and slot.request.max_new_tokens == 0:
                    self._end(slot.request, "length")
            if any(slot.decoding for slot in self._slots):
                self._decode()
        changed, self._changed = list(dict.fromkeys(self._changed)), []
        return changed

    def stream(self, request: Request) -> Iterator[list[int]]:
        """Runs a request to its end; yields its new tokens as they come. Raises UserError before the first one."""
        self.submit(request)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[list[int]]:
        given = 0
        try:
            while request.finish is None:
                self.step()
                if len(request.tokens) > given:
                    new, given = request.tokens[given:], len(request.tokens)
                    yield new
        finally:
            self.cancel(request)

    def _admit(self) -> None:
        """Gives free slots to queued requests: the slot that holds the longest beginning of the prompt."""
        while self._queue and (free := [slot for slot in self._slots if slot.request is None]):
            request = self._queue.popleft()
            # at equal lengths the slot that holds least, so that other prompts' beginnings stay
            slot = max(free, key=lambda s: (_common(s.held, request.prompt), -len(s.held)))
            kept = 0 if request.score_prompt else min(_common(slot.held, request.prompt), len(request.prompt) - 1)
            self._admitted += 1
            slot.held, slot.request, slot.turn, request.cached = slot.held[:kept], request, self._admitted, kept
            if request.score_prompt:
                request.prompt_logprobs.append(None)
                request.prompt_top.append([])
            row_V = np.zeros(self._model.vocab_size, bool)
            row_V[request.prompt] = True
            self._seen_BV = _seen(self._seen_BV, slot.index, row_V)

    def _prefill(self, slot: _Slot) -> None:
        """Computes one piece of a prompt, all of it but the last token."""
        request, start, score = slot.request, len(slot.held), slot.request.score_prompt
        left = len(request.prompt) - 1 - start
        fitting = [n for n in PREFILL if start + n <= self.context + MARGIN]
        size = next((n for n in fitting if n >= left), fitting[-1])
        n = min(size, left)
        tokens = np.zeros(size + score, np.int32)
        tokens[: n + score] = request.prompt[start : start + n + score]
        self._grow(max(start + size, start + n + MARGIN))  # rows without work write to the margin while others decode
        arguments = (self._weights, self._cache, slot.index, tokens, start, request.top_logprobs > 0, self._model, score)
        self._cache, scored = _prefill(*arguments)
        slot.held += request.prompt[start : start + n]
        if score:
            logprobs, (top_tokens, top_logprobs) = jax.device_get(scored)
            for i in range(n):
                request.prompt_logprobs.append(float(logprobs[i]))
                request.prompt_top.append(_pairs(request, top_tokens[i], top_logprobs[i]))
            self._changed.append(request)

    def _decode(self) -> None:
        slots = [slot for slot in self._slots if slot.decoding]
        first = any(not slot.request.tokens for slot in slots)  # a first token is given at once
        n = 1 if first else int(np.clip(PATIENCE / self._seconds if self._seconds else 1, 1, CHUNK))
        self._grow(max(min(slot.size + n, self.context) for slot in slots) + MARGIN)
        began = time.perf_counter()
        rows, want_top = self._rows(slots), any(slot.request.top_logprobs > 0 for slot in slots)
        self._cache, self._seen_BV, out = _decode(self._weights, self._cache, self._seen_BV, rows, n, want_top, self._model)
        out = jax.device_get(out)
        self._seconds = (time.perf_counter() - began) / max(out.n.max(), 1)
        for slot in slots:
            self._take(slot, out)

    def _take(self, slot: _Slot, out: Chunk) -> None:
        """Appends a chunk's tokens to the slot's request, and ends it if it is at its end."""
        request, row = slot.request, slot.index
        slot.held.append((request.tokens or request.prompt)[-1])
        for i in range(out.n[row]):
            request.tokens.append(int(out.tokens[row, i]))
            request.logprobs.append(float(out.logprobs[row, i]))
            request.top.append(_pairs(request, out.top_tokens[row, i], out.top_logprobs[row, i]))
        slot.held += request.tokens[len(request.tokens) - int(out.n[row]) : -1]
        self._changed.append(request)
        if request.tokens[-1] in request.stop_ids:
            self._end(request, "stop")
        elif len(request.tokens) == request.max_new_tokens:
            self._end(request, "length")
        elif slot.size == self.context:
            self._end(request, "context")

    def _rows(self, slots: list[_Slot]) -> Rows:
        B = len(self._slots)
        zeros = lambda dtype=np.int32, *shape: np.zeros((B, *shape), dtype)
        settings = Settings(*(np.full(B, value, type(value)) for value in Sampling(temperature=0.0)))
        settings = Settings(*(a.astype(np.int32 if a.dtype.kind == "i" else np.float32) for a in settings))
        rows = Rows(zeros(), zeros(), zeros(), np.full((B, STOPS), -1, np.int32), zeros(np.uint32, 2), settings)
        for slot in slots:
            request, b = slot.request, slot.index
            rows.token[b], rows.position[b] = (request.tokens or request.prompt)[-1], slot.size - 1
            rows.left[b] = min(request.max_new_tokens - len(request.tokens), self.context - slot.size)
            rows.stop_ids[b, : len(request.stop_ids)] = request.stop_ids
            rows.key[b] = request.seed, request.sample
            for array, value in zip(settings, request.sampling, strict=True):
                array[b] = value
        return rows

    def _grow(self, length: int) -> None:
        """Makes every slot's cache at least `length` positions long."""
        room = before = self._cache[0][0].shape[2]
        while room < length:
            room = min(2 * room, self.context + MARGIN)
        if room > before:
            self._cache = _longer(self._cache, room)


def check(request: Request, model: Model) -> None:
    """Raises UserError if `request` cannot be run."""
    if not request.prompt:
        raise UserError("the prompt has no tokens; begin with the tokenizer's bos or eos")
    if request.max_new_tokens < 0:
        raise UserError(f"max_new_tokens {request.max_new_tokens}: must be 0 or more")
    if not 0 <= request.seed < 2**32:
        raise UserError(f"seed {request.seed}: must lie in [0, 2^32)")
    # a request without new tokens may fill the context: only its prompt is scored
    most = model.seq_len - (request.max_new_tokens > 0)
    if len(request.prompt) > most:
        raise UserError(
            f"the prompt has {len(request.prompt):,} tokens, and the model's context is {model.seq_len:,}; "
            f"shorten it to {most:,} or fewer"
        )
    if not all(0 <= token < model.vocab_size for token in request.prompt):
        raise UserError(f"the prompt has a token outside the vocabulary of {model.vocab_size:,}")
    if len(request.stop_ids) > STOPS:
        raise UserError(f"{len(request.stop_ids)} ids are to end the answer; at most {STOPS} can")
    if request.top_logprobs > TOP:
        raise UserError(f"top_logprobs {request.top_logprobs}: at most {TOP}")
    sampling_lib.check(request.sampling)


def _common(a: list[int], b: list[int]) -> int:
    """The length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _pairs(request: Request, tokens: np.ndarray, logprobs: np.ndarray) -> list[tuple[int, float]]:
    n = max(request.top_logprobs, 0)
    return [(int(t), float(p)) for t, p in zip(tokens[:n], logprobs[:n], strict=True) if np.isfinite(p)]
