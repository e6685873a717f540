"""Generation: requests join and leave a running batch of slots, whose tokens are computed on the device a chunk at a time."""

import collections
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import jax
import numpy as np

from tinyllama_jax.base import sharding
from tinyllama_jax.base.config import Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.inference import device
from tinyllama_jax.inference import sampling as sampling_lib
from tinyllama_jax.inference.device import CHUNK, STOPS, TOP, Chunk, Rows, State
from tinyllama_jax.inference.sampling import Sampling, Settings
from tinyllama_jax.inference.speculative import MARGIN, MOST_TOKENS, Draft
from tinyllama_jax.inference.weights import Loaded

# seconds that a chunk may take, or as long as the piece of a prompt before it: on a slow device it has fewer tokens, so that a
# stream does not stutter, and while prompts are read, answers still get half of the time
PATIENCE = 0.2
PREFILL = (16, 32, 64, 128, 256, 512)  # lengths of the pieces in which a prompt is computed; the last piece is padded to one
SHORTEST = 256  # positions of the cache at first; it doubles when a row needs more


@dataclass(eq=False)
class Request:
    """A prompt and how to continue it, and the results so far, to which the engine only appends."""

    prompt: list[int]  # ids, bos included
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    sample: int = 0  # number of the answer, where one prompt and seed have several
    stop_ids: tuple[int, ...] = ()  # the answer ends after one of these, which is part of `tokens`
    top_logprobs: int = -1  # how many of the most likely tokens to report beside each token; -1: none
    score_prompt: bool = False  # also give the log-probabilities of the prompt's own tokens

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of `tokens`, natural, under the model itself: before any filter
    top: list[list[tuple[int, float]]] = field(default_factory=list)  # (token, log-probability), the most likely first
    prompt_logprobs: list[float | None] = field(default_factory=list)  # the first token has none
    prompt_top: list[list[tuple[int, float]]] = field(default_factory=list)
    finish: str | None = None  # why it ended: "stop" (a stop id), "length" (max_new_tokens), "context" (full) or "cancelled"
    rounds: int = 0  # forward passes that gave `tokens`; with a draft fewer than there are tokens
    cached: int = 0  # tokens of the prompt whose keys and values were still in the slot from an earlier request


@dataclass(eq=False)
class _Slot:
    """A row of the batch."""

    index: int
    request: Request | None = None
    turn: int = 0  # order of admission
    held: list[int] = field(default_factory=list)  # tokens whose keys and values are in the cache, from position 0

    @property
    def size(self) -> int:
        """Number of tokens, prompt and answer."""
        return len(self.request.prompt) + len(self.request.tokens)

    @property
    def decoding(self) -> bool:
        """Whether all tokens but the newest are in the cache."""
        return self.request is not None and len(self.held) == self.size - 1


class Engine:
    """Runs requests. Not thread-safe: one thread calls everything.

    The number of compiled programs is bounded. For each length of the cache (SHORTEST, doubled up to the context) one decodes,
    and for each length in PREFILL two prefill: one with log-probabilities, one without.
    """

    def __init__(self, loaded: Loaded, slots: int = 1, draft: Loaded | None = None, draft_tokens: int = 0):
        """`slots`: how many requests run at a time; rounded up to a multiple of the mesh's data-parallel copies.

        `draft_tokens`: how many tokens `draft`, or without one prompt lookup, proposes in a round; 0: no speculation.
        """
        if not 0 <= draft_tokens <= MOST_TOKENS:
            raise UserError(f"--draft-tokens {draft_tokens}: must lie between 1 and {MOST_TOKENS}, or be 0 for no draft")
        self._weights, self._model, self._mesh = loaded.weights, loaded.model, loaded.mesh
        self._draft, self._draft_weights = Draft(draft_tokens, draft and draft.model), draft and draft.weights
        copies = sharding.batch_devices(loaded.mesh)
        n = -(-slots // copies) * copies
        self._slots = [_Slot(i) for i in range(n)]
        self._queue: collections.deque[Request] = collections.deque()
        self._changed: list[Request] = []
        self._admitted = 0
        self._seconds = 0.0  # per token, in the last chunk
        with jax.set_mesh(self._mesh):
            new = lambda model: model and device.new_cache(model, n, min(SHORTEST, self.context + MARGIN))
            seen_BV = device.none_seen(n, self._model.vocab_size)
            self._state = State(new(self._model), new(self._draft.model), seen_BV)

    @property
    def context(self) -> int:
        """The most tokens that a prompt and its answer can have together."""
        return self._model.seq_len

    @property
    def draft_tokens(self) -> int:
        """How many tokens the draft proposes in a round; 0 without one."""
        return self._draft.tokens

    @property
    def has_draft_model(self) -> bool:
        """Whether a model drafts, and not prompt lookup."""
        return self._draft.model is not None

    @property
    def busy(self) -> bool:
        """Whether any request is queued or running."""
        return bool(self._queue) or any(slot.request for slot in self._slots)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises UserError if it cannot be run, and ValueError if it has been run before."""
        if request.finish or request.tokens:
            raise ValueError("this request has been run; make another")
        check(request, self._model)
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
        """Admits requests, computes one piece of a prompt and one chunk of every answer; returns the requests that changed."""
        with jax.set_mesh(self._mesh):
            self._admit()
            began = time.perf_counter()
            waiting = [slot for slot in self._slots if slot.request and not slot.decoding]
            if waiting:
                self._prefill(min(waiting, key=lambda slot: slot.turn))
                jax.block_until_ready(self._state)  # else its time would be taken for that of the answers' tokens
            patience = max(PATIENCE, time.perf_counter() - began)
            for slot in self._slots:
                if slot.decoding and slot.request.max_new_tokens == 0:
                    self._end(slot.request, "length")
            if any(slot.decoding for slot in self._slots):
                self._decode(patience)
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
        """Gives each queued request, while slots are free, the one that holds the longest prefix of its prompt."""
        while self._queue and (free := [slot for slot in self._slots if slot.request is None]):
            request = self._queue.popleft()
            # of equal prefixes the slot that holds the fewest tokens, so that longer prefixes stay for other prompts
            slot = max(free, key=lambda s: (_common(s.held, request.prompt), -len(s.held)))
            kept = 0 if request.score_prompt else min(_common(slot.held, request.prompt), len(request.prompt) - 1)
            self._admitted += 1
            slot.held, slot.request, slot.turn, request.cached = slot.held[:kept], request, self._admitted, kept
            if request.score_prompt:
                request.prompt_logprobs.append(None)
                request.prompt_top.append([])
            row_V = np.zeros(self._model.vocab_size, bool)
            row_V[request.prompt] = True
            self._state = self._state._replace(seen_BV=device.with_seen(self._state.seen_BV, slot.index, row_V))

    def _prefill(self, slot: _Slot) -> None:
        """Computes the next piece of a prompt. The prompt's last token is left to `_decode`."""
        request, start, score = slot.request, len(slot.held), slot.request.score_prompt
        left = len(request.prompt) - 1 - start
        fitting = [n for n in PREFILL if start + n <= self.context + MARGIN]
        size = next((n for n in fitting if n >= left), fitting[-1])
        n = min(size, left)
        tokens = np.zeros(size + score, np.int32)
        tokens[: n + score] = request.prompt[start : start + n + score]
        self._grow(max(start + size, start + n + MARGIN))  # while others decode, this row writes into the margin
        want_top, state = request.top_logprobs > 0, self._state
        cache, scored = device.prefill(self._weights, state.cache, slot.index, tokens, start, want_top, self._model, score)
        self._state = state._replace(cache=cache)
        if self._draft.model:
            piece = (slot.index, tokens[:size], start, False)
            cache, _ = device.prefill(self._draft_weights, state.draft_cache, *piece, self._draft.model, False)
            self._state = self._state._replace(draft_cache=cache)
        slot.held += request.prompt[start : start + n]
        if score:
            logprobs, top_tokens, top_logprobs = jax.device_get(scored)
            for i in range(n):
                request.prompt_logprobs.append(float(logprobs[i]))
                request.prompt_top.append(_pairs(request, top_tokens[i], top_logprobs[i]))
            self._changed.append(request)

    def _decode(self, patience: float) -> None:
        slots = [slot for slot in self._slots if slot.decoding]
        first = any(not slot.request.tokens for slot in slots)  # so that a first token arrives at once
        n = 1 if first else int(np.clip(patience / self._seconds if self._seconds else 1, 1, CHUNK))
        n = CHUNK if jax.process_count() > 1 else n  # all processes run the same program, whatever their clocks say
        self._grow(max(min(slot.size + n + self._draft.tokens, self.context) for slot in slots) + MARGIN)
        began = time.perf_counter()
        rows, want_top = self._rows(slots), any(slot.request.top_logprobs > 0 for slot in slots)
        arguments = (self._weights, self._draft_weights, self._state, rows, n, want_top, self._model, self._draft)
        self._state, out = device.decode(*arguments)
        out = jax.device_get(out)
        self._seconds = (time.perf_counter() - began) / max(out.n.max(), 1)
        for slot in slots:
            self._take(slot, out)

    def _take(self, slot: _Slot, out: Chunk) -> None:
        """Appends a chunk's tokens to the slot's request, and ends it if it is at its end."""
        request, row, n = slot.request, slot.index, out.n[slot.index]
        new = out.tokens[row, :n].tolist()  # whole rows take 0.6 us a token, one number at a time 7
        slot.held += [(request.tokens or request.prompt)[-1], *new[:-1]]
        request.tokens += new
        request.logprobs += out.logprobs[row, :n].tolist()
        if request.top_logprobs > 0:
            request.top += map(partial(_pairs, request), out.top_tokens[row, :n], out.top_logprobs[row, :n])
        else:
            request.top += ([] for _ in new)
        request.rounds += int(out.rounds[row])
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
        dtype = {int: np.int32, float: np.float32}
        settings = Settings(*(np.full(B, value, dtype[type(value)]) for value in Sampling(temperature=0.0)))
        lookup = self._draft.tokens and not self._draft.model
        history = zeros(np.int32, self._state.cache[0][0].shape[2]) if lookup else None
        rows = Rows(zeros(), zeros(), zeros(), np.full((B, STOPS), -1, np.int32), zeros(np.uint32, 2), settings, history)
        for slot in slots:
            request, b = slot.request, slot.index
            rows.token[b], rows.position[b] = (request.tokens or request.prompt)[-1], slot.size - 1
            rows.left[b] = min(request.max_new_tokens - len(request.tokens), self.context - slot.size)
            rows.stop_ids[b, : len(request.stop_ids)] = request.stop_ids
            rows.key[b] = request.seed, request.sample
            if history is not None:
                history[b, : slot.size] = request.prompt + request.tokens
            for array, value in zip(settings, request.sampling, strict=True):
                array[b] = value
        return rows

    def _grow(self, length: int) -> None:
        """Makes the cache at least `length` positions long, for all slots."""
        room = before = self._state.cache[0][0].shape[2]
        while room < length:
            room = min(2 * room, self.context + MARGIN)
        if room > before:
            caches = (c and device.longer_cache(c, room) for c in self._state[:2])
            self._state = State(*caches, self._state.seen_BV)


def check(request: Request, model: Model) -> None:
    """Raises UserError, which names the value, if `model` cannot run `request`."""
    if not request.prompt:
        raise UserError("the prompt has no tokens; begin with the tokenizer's bos or eos")
    # a request without new tokens may fill the context: only its prompt is scored
    most = model.seq_len - (request.max_new_tokens > 0)
    if len(request.prompt) > most:
        raise UserError(
            f"the prompt has {len(request.prompt):,} tokens, and the model's context is {model.seq_len:,}; "
            f"shorten it to {most:,} or fewer"
        )
    if not all(0 <= token < model.vocab_size for token in request.prompt):
        raise UserError(f"the prompt has a token outside the vocabulary of {model.vocab_size:,}")
    if request.max_new_tokens < 0:
        raise UserError(f"max_new_tokens {request.max_new_tokens}: must be 0 or more")
    if not (0 <= request.seed < 2**32 and 0 <= request.sample < 2**32):
        raise UserError(f"seed {request.seed}, sample {request.sample}: both must lie in [0, 2^32)")
    if len(request.stop_ids) > STOPS:
        raise UserError(f"stop_ids has {len(request.stop_ids)} ids, and at most {STOPS} can end an answer")
    if request.top_logprobs > TOP:
        raise UserError(f"top_logprobs {request.top_logprobs}: must be at most {TOP}")
    sampling_lib.check(request.sampling)


def _common(a: list[int], b: list[int]) -> int:
    """The length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _pairs(request: Request, tokens: np.ndarray, logprobs: np.ndarray) -> list[tuple[int, float]]:
    n = max(request.top_logprobs, 0)
    return [(int(t), float(p)) for t, p in zip(tokens[:n], logprobs[:n], strict=True) if np.isfinite(p)]
