"""The programs of inference: one prefills a piece of a prompt, one decodes a chunk of tokens in every row."""

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
from tinyllama_jax.inference.speculative import MARGIN, Draft, Proposal, distributions, look_up, propose, verified
from tinyllama_jax.inference.weights import Weights

CHUNK = 16  # the most tokens that a row decodes before the host sees them
TOP = 20  # how many of the most likely tokens can be reported with each token
STOPS = 16  # ids that can end a request
# Sharding of the cache [B, K, T, H] and of seen_BV. XLA would choose another for outputs, and so compile every program twice
_ROWS = PartitionSpec(sharding.BATCH, "tensor")


class Rows(NamedTuple):
    """The inputs of a chunk, one row per slot, [B] or [B, ...]; the host makes them anew for each chunk."""

    token: np.ndarray  # the newest token, whose key and value are not in the cache yet
    position: np.ndarray  # its position
    left: np.ndarray  # tokens still to come; 0: the row is idle
    stop_ids: np.ndarray  # [B, STOPS], -1 where there is none
    key: np.ndarray  # [B, 2], the random key of each row
    settings: Settings
    history: np.ndarray | None  # [B, T], the tokens at each position, for prompt lookup


class State(NamedTuple):
    """What stays on the device from chunk to chunk; donated."""

    cache: Cache
    draft_cache: Cache | None
    seen_BV: jax.Array  # whether a token is in the prompt or the answer, for the repetition penalty


class Chunk(NamedTuple):
    """The results of a chunk, [B, C] and [B, C, TOP]; only the first `n` tokens of a row count."""

    n: jax.Array  # [B]
    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array
    rounds: jax.Array  # [B], forward passes


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
    """Decodes `n` tokens in every row, or as many as it has left; a draft's last round can add up to K more."""
    B, K = len(rows.token), draft.tokens
    C = CHUNK + K + (K + 1)  # the most tokens of a row, and room for the K + 1 that a finished row still writes
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
        before_BS = jnp.cumsum(is_stop_BS, axis=1) - is_stop_BS  # stop ids before each token; a token after one does not count
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
    """(cache, scores): the cache with `tokens_S` at the positions from `start` on in the row `slot`.

    Padding at the end of `tokens_S` is overwritten before it is read. `score`: whether to compute the log-probability [S] of
    the token after each position, and the most likely tokens; tokens_S then has one token more. Otherwise scores is None.
    """
    S = len(tokens_S) - score
    row = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, slot, 1), cache)
    x_1SD, row = forward(weights, tokens_S[None, :S], (start + jnp.arange(S))[None], row, model)
    cache = jax.tree.map(lambda a, new: lax.dynamic_update_slice_in_dim(a, new, slot, 0), cache, row)
    return cache, _scored(logits(weights, x_1SD)[0], tokens_S[1:], want_top) if score else None


@partial(jax.jit, donate_argnums=0, out_shardings=_ROWS)
def with_seen(seen_BV, slot, row_V):
    """`seen_BV` with `row_V` in the row `slot`."""
    return seen_BV.at[slot].set(row_V)


new_cache = jax.jit(init_cache, static_argnums=(0, 1, 2), out_shardings=_ROWS)
none_seen = jax.jit(lambda *shape: jnp.zeros(shape, bool), static_argnums=(0, 1), out_shardings=_ROWS)
longer_cache = jax.jit(longer, static_argnums=1, out_shardings=_ROWS)  # not donated: no old buffer fits the new one
