"""What inference runs on the device: a piece of a prompt, and a chunk of tokens of every row."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from tinyllama_jax.base import sharding
from tinyllama_jax.base.config import Model
from tinyllama_jax.inference.forward import Cache, forward, init_cache, logits, longer
from tinyllama_jax.inference.sampling import Settings
from tinyllama_jax.inference.speculative import MOST_TOKENS, Draft, Proposal, distributions, look_up, propose, verified
from tinyllama_jax.inference.weights import Weights

CHUNK = 16  # the most tokens of a row between two looks of the host
# positions at the end of the cache that belong to no request: rows with nothing to compute write there
MARGIN = MOST_TOKENS + 1
TOP = 20  # most likely tokens that can be reported beside each token
STOPS = 16  # ids that can end a request
# of the cache [B, K, T, H] and the tokens seen [B, V]; left to XLA it would change, and every program be compiled twice
_ROWS = PartitionSpec(sharding.BATCH, "tensor")


class Rows(NamedTuple):
    """One row a slot, rebuilt on the host before each chunk: [B] or [B, ...]."""

    token: np.ndarray  # the newest token, whose key and value are not in the cache yet
    position: np.ndarray  # its position
    left: np.ndarray  # tokens still to come; 0: nothing is computed for this row
    stop_ids: np.ndarray  # [B, STOPS], -1 where there is none
    key: np.ndarray  # [B, 2], of the random numbers
    settings: Settings
    history: np.ndarray | None  # [B, T], the tokens at each position, for prompt lookup


class State(NamedTuple):
    """What a chunk takes over from the one before, on the device; donated."""

    cache: Cache
    draft_cache: Cache | None
    seen_BV: jax.Array  # whether a token is in the prompt or the answer, for the repetition penalty


class Chunk(NamedTuple):
    """What a chunk has computed, [B, C] and [B, C, TOP]; entries after `n` tokens of a row mean nothing."""

    n: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array
    rounds: jax.Array  # [B], passes of the target


def _scored(logits_XV: jax.Array, token_X: jax.Array, want_top: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities [X] of the tokens, and the TOP most likely tokens with theirs."""
    X, n = len(token_X), min(TOP, logits_XV.shape[1])
    total_X = jax.nn.logsumexp(logits_XV, axis=1)
    none = lambda x: (jnp.zeros((X, n), jnp.float32), jnp.zeros((X, n), jnp.int32))
    values_XT, tokens_XT = lax.cond(want_top, lambda x: tuple(lax.top_k(x, n)), none, logits_XV)
    pad = partial(jnp.pad, pad_width=((0, 0), (0, TOP - n)))
    own_X = jnp.take_along_axis(logits_XV, token_X[:, None], axis=1)[:, 0]
    top = pad(tokens_XT), pad(values_XT - total_X[:, None], constant_values=-jnp.inf)  # the engine leaves these out
    return own_X - total_X, *top


@partial(jax.jit, static_argnames=("model", "draft"), donate_argnames="state", out_shardings=(_ROWS, PartitionSpec()))
def decode(
    weights: Weights, draft_weights, state: State, rows: Rows, n, want_top, model: Model, draft: Draft
) -> tuple[State, Chunk]:
    """At least `n` tokens for every row that has so many left; a round of a draft can add up to K more."""
    B, K = len(rows.token), draft.tokens
    C = CHUNK + K + (K + 1)  # what a row can have, and room for what a row that has enough writes after it
    idle = state.cache[0][0].shape[2] - MARGIN
    empty = lambda dtype, *shape: jnp.zeros((B, C, *shape), dtype)
    zeros = jnp.zeros(B, jnp.int32)
    out = Chunk(zeros, empty(jnp.int32), empty(jnp.float32), empty(jnp.int32, TOP), empty(jnp.float32, TOP), zeros)
    working = lambda left, out: (left > 0) & (out.n < n)

    def body(carry):
        token, position, left, history, (cache, draft_cache, seen_BV), out = carry
        active = working(left, out)
        proposal = Proposal(jnp.zeros((B, 0), jnp.int32), zeros, None)
        if K and draft.model is None:
            proposal = look_up(history, position, K)
        elif K:
            proposal, draft_cache = propose(
                draft_weights, draft_cache, token, position, active, seen_BV, rows.key, rows.settings, draft
            )
        tokens_BS = jnp.concatenate([token[:, None], proposal.tokens_BK], axis=1)
        at_BS = jnp.where(active, position, idle)[:, None] + jnp.arange(K + 1)
        x_BSD, cache = forward(weights, tokens_BS, at_BS, cache, model)
        logits_BSV = logits(weights, x_BSD)
        allowed_BSV = distributions(logits_BSV, tokens_BS, seen_BV, rows.settings)
        new_BS, n_new = verified(allowed_BSV, proposal, rows.key, position, rows.settings)
        is_stop_BS = jnp.any(new_BS[:, :, None] == rows.stop_ids[:, None], axis=2)
        before_BS = jnp.cumsum(is_stop_BS, axis=1) - is_stop_BS  # stop ids before a token: it does not count then
        counts_BS = (jnp.arange(K + 1) < jnp.minimum(n_new, left)[:, None]) & (before_BS == 0) & active[:, None]
        n_new = jnp.sum(counts_BS, axis=1, dtype=jnp.int32)
        scores = _scored(logits_BSV.reshape(B * (K + 1), -1), new_BS.ravel(), want_top)
        put = jax.vmap(lambda buffer, new, at: lax.dynamic_update_slice_in_dim(buffer, new, at, 0))
        values = (new_BS, *(a.reshape(B, K + 1, *a.shape[1:]) for a in scores))
        written = [put(buffer, new, out.n) for buffer, new in zip(out[1:5], values, strict=True)]
        out = Chunk(out.n + n_new, *written, out.rounds + active)
        if history is not None:
            at = jnp.where(counts_BS, position[:, None] + 1 + jnp.arange(K + 1), history.shape[1])
            history = history.at[jnp.arange(B)[:, None], at].set(new_BS, mode="drop")
        seen_BV = seen_BV.at[jnp.arange(B)[:, None], new_BS].max(counts_BS)
        last = jnp.take_along_axis(new_BS, jnp.maximum(n_new - 1, 0)[:, None], axis=1)[:, 0]
        left = jnp.where(jnp.any(is_stop_BS & counts_BS, axis=1), 0, left - n_new)
        return jnp.where(active, last, token), position + n_new, left, history, State(cache, draft_cache, seen_BV), out

    carry = (rows.token, rows.position, rows.left, rows.history, state, out)
    *_, state, out = lax.while_loop(lambda carry: jnp.any(working(carry[2], carry[-1])), body, carry)
    return state, out


@partial(jax.jit, static_argnames=("model", "score"), donate_argnames="cache", out_shardings=(_ROWS, PartitionSpec()))
def prefill(weights: Weights, cache: Cache, slot, tokens_S, start, want_top, model: Model, score: bool):
    """The cache with `tokens_S` at the positions from `start` of a slot. Padding at their end is overwritten before it is read.

    `score`: also the log-probability [S] of each token that follows one of them, with the most likely tokens; tokens_S then
    has one token more.
    """
    S = len(tokens_S) - score
    row = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, slot, 1), cache)
    x_1SD, row = forward(weights, tokens_S[None, :S], (start + jnp.arange(S))[None], row, model)
    cache = jax.tree.map(lambda a, new: lax.dynamic_update_slice_in_dim(a, new, slot, 0), cache, row)
    return cache, _scored(logits(weights, x_1SD)[0], tokens_S[1:], want_top) if score else None


@partial(jax.jit, donate_argnums=0, out_shardings=_ROWS)
def with_seen(seen_BV, slot, row_V):
    return seen_BV.at[slot].set(row_V)


new_cache = jax.jit(init_cache, static_argnums=(0, 1, 2), out_shardings=_ROWS)
none_seen = jax.jit(lambda *shape: jnp.zeros(shape, bool), static_argnums=(0, 1), out_shardings=_ROWS)
longer_cache = jax.jit(longer, static_argnums=1, out_shardings=_ROWS)  # not donated: no old buffer fits the new one
