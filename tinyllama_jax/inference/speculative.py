"""Speculative decoding: a draft proposes tokens, the target checks them in one pass, and the output is the target's alone.

Leviathan et al. 2023, arXiv:2211.17192. The draft is a smaller model or the text itself (prompt lookup: what followed the last
tokens when they occurred before).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tinyllama_jax.base.config import Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.inference.forward import Cache, forward, logits
from tinyllama_jax.inference.sampling import Settings, draw, filtered
from tinyllama_jax.inference.weights import Weights

MOST_TOKENS = 15  # of a draft
MARGIN = MOST_TOKENS + 1  # positions at the end of the cache that belong to no request: idle rows write a round there
LONGEST_MATCH = 3  # of prompt lookup: the last 3 tokens, or else 2, or else 1


class Draft(NamedTuple):
    """How tokens are proposed. A static argument: it decides what is compiled."""

    tokens: int = 0  # K, how many in a round; 0: none, each token is computed by itself
    model: Model | None = None  # the draft's; None: prompt lookup


class Proposal(NamedTuple):
    """Tokens proposed after the newest one of each row."""

    tokens_BK: jax.Array
    n_B: jax.Array  # how many of them count
    p_BKV: jax.Array | None  # the distributions they were drawn from; None: probability 1 each


def check_vocabulary(target: Tokenizer, draft: Tokenizer, name: str) -> None:
    """Raises UserError unless both have the same token for each id."""
    if target.sha256 == draft.sha256:
        return
    a, b = target.pieces(), draft.pieces()
    if a != b:
        i = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        which = f"id {i} is {a[i]!a} and {b[i]!a}" if i < min(len(a), len(b)) else f"{len(a):,} and {len(b):,} tokens"
        raise UserError(f"--draft {name}: its vocabulary differs from the model's ({which}); name a draft with the same one")


def distributions(logits_BSV: jax.Array, tokens_BS: jax.Array, seen_BV: jax.Array, settings: Settings) -> jax.Array:
    """`filtered` logits [B, S, V] after each of `tokens_BS`; the repetition penalty counts the tokens up to it."""
    B, S, V = logits_BSV.shape
    new_BSV = jnp.cumsum(tokens_BS[:, :, None] == jnp.arange(V), axis=1) > 0 if S > 1 else False  # one token: already seen
    seen_BSV = jnp.broadcast_to(seen_BV[:, None] | new_BSV, logits_BSV.shape)
    repeated = Settings(*(jnp.repeat(a, S) for a in settings))
    return filtered(logits_BSV.reshape(-1, V), seen_BSV.reshape(-1, V), repeated).reshape(B, S, V)


def look_up(history_BT: jax.Array, position_B: jax.Array, K: int) -> Proposal:
    """What followed the latest earlier occurrence of the last tokens. `history_BT`: tokens up to `position_B`."""

    def row(history_T: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        at_T = jnp.arange(len(history_T))
        same_T, best = at_T < position, jnp.int32(-1)
        for i in range(LONGEST_MATCH):  # `same_T`: whether the i + 1 tokens that end here are the last ones
            shifted_T = jnp.where(at_T >= i, jnp.roll(history_T, i), -1)
            same_T &= shifted_T == history_T[jnp.maximum(position - i, 0)]
            best = jnp.where(jnp.any(same_T), jnp.max(jnp.where(same_T, at_T, -1)), best)
        tokens_K = lax.dynamic_slice(jnp.pad(history_T, (0, K)), (best + 1,), (K,))
        return tokens_K, jnp.where(best >= 0, jnp.minimum(position - best, K), 0)

    return Proposal(*jax.vmap(row)(history_BT, position_B), None)


def propose(
    weights: Weights, cache: Cache, token_B, position_B, active_B, seen_BV, key_B2, settings: Settings, draft: Draft
) -> tuple[Proposal, Cache]:
    """K tokens of the draft model, one after the other, and its cache with all of them."""
    B, K, idle = len(token_B), draft.tokens, cache[0][0].shape[2] - MARGIN
    V = seen_BV.shape[1]

    def one(i, carry):
        token_B, seen_BV, cache, tokens_BK, p_BKV = carry
        x_BSD, cache = forward(
            weights, token_B[:, None], jnp.where(active_B, position_B + i, idle)[:, None], cache, draft.model
        )
        logits_BV = filtered(logits(weights, x_BSD)[:, 0], seen_BV, settings)
        token_B = draw(logits_BV, key_B2 ^ jnp.uint32(0x9E3779B9), position_B + i, settings)  # not the target's random numbers
        put = lambda buffer, new: lax.dynamic_update_index_in_dim(buffer, new, i, 1)  # the last step is for the cache alone
        tokens_BK, p_BKV = put(tokens_BK, token_B), put(p_BKV, jax.nn.softmax(logits_BV))
        return token_B, seen_BV.at[jnp.arange(B), token_B].set(True), cache, tokens_BK, p_BKV

    empty = (jnp.zeros((B, K + 1), jnp.int32), jnp.zeros((B, K + 1, V)))
    *_, cache, tokens_BK, p_BKV = lax.fori_loop(0, K + 1, one, (token_B, seen_BV, cache, *empty))
    return Proposal(tokens_BK[:, :K], jnp.full(B, K), p_BKV[:, :K]), cache


def verified(logits_BSV: jax.Array, proposal: Proposal, key_B2, position_B, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """(tokens [B, K + 1], how many of them count [B]): the accepted proposals and one more, distributed as the target's own.

    `logits_BSV`: the target's `distributions` after the newest token and after each proposed one. A proposal x is accepted with
    probability min(1, p(x) / q(x)). After the first one that is not, the next token is drawn from max(p - q, 0).
    """
    B, S, V = logits_BSV.shape
    rows, K = jnp.arange(B), S - 1
    accepted_B = jnp.zeros(B, jnp.int32)
    final_BV = logits_BSV[:, 0]
    if K:
        p_BSV = jax.nn.softmax(logits_BSV, axis=2)
        q_BKV = jax.nn.one_hot(proposal.tokens_BK, V) if proposal.p_BKV is None else proposal.p_BKV
        at_proposed = lambda p_BKV: jnp.take_along_axis(p_BKV, proposal.tokens_BK[:, :, None], axis=2)[:, :, 0]
        u_BK = jax.vmap(_uniform, (0, 0, None))(key_B2, position_B, K)
        fits_BK = (u_BK * at_proposed(q_BKV) < at_proposed(p_BSV[:, :K])) & (jnp.arange(K) < proposal.n_B[:, None])
        accepted_B = jnp.sum(jnp.cumprod(fits_BK, axis=1), axis=1)
        rejected_B = accepted_B < proposal.n_B
        q_BV = q_BKV[rows, jnp.minimum(accepted_B, K - 1)] * rejected_B[:, None]
        excess_BV = jnp.maximum(p_BSV[rows, accepted_B] - q_BV, 0)
        # where p and q are equal, rounding can reject a token and leave no excess; p itself is then right
        difference_BV = jnp.where(
            jnp.sum(excess_BV, axis=1, keepdims=True) > 0, jnp.log(excess_BV), logits_BSV[rows, accepted_B]
        )
        final_BV = jnp.where(rejected_B[:, None], difference_BV, logits_BSV[rows, accepted_B])
    last_B = draw(final_BV, key_B2, position_B + accepted_B, settings)
    tokens_BS = jnp.concatenate([proposal.tokens_BK, jnp.zeros((B, 1), jnp.int32)], axis=1)
    return tokens_BS.at[rows, accepted_B].set(last_B), accepted_B + 1


def _uniform(key_2: jax.Array, position: jax.Array, n: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(key_2 ^ jnp.uint32(0x85EBCA6B)), position)
    return jax.random.uniform(key, (n,))
