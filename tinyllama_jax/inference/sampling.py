"""Draws the next token: filters over logits, for a batch whose rows have different settings."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tinyllama_jax.base.errors import UserError


class Sampling(NamedTuple):
    """Settings of one request; the defaults draw from the model's own distribution."""

    temperature: float = 1.0  # 0: greedy, the most likely token
    top_k: int = 0  # only the k most likely tokens; 0: all
    top_p: float = 1.0  # only the most likely tokens that together reach this probability; 1: all
    min_p: float = 0.0  # only tokens at least this likely, relative to the most likely one; 0: all
    repetition_penalty: float = 1.0  # logits of tokens seen before are divided by it, or multiplied if negative; 1: none


_BOUNDS = {
    "temperature": (lambda x: x == 0 or 1e-3 <= x <= 1e3, "must be 0 (greedy) or lie between 0.001 and 1,000"),
    "top_k": (lambda x: 0 <= x < 2**31, "must be 0 (all) or more, and less than 2^31"),
    "top_p": (lambda x: 0 < x <= 1, "must lie in (0, 1]"),
    "min_p": (lambda x: 0 <= x <= 1, "must lie in [0, 1]"),
    "repetition_penalty": (lambda x: 1e-2 <= x <= 1e2, "must lie between 0.01 and 100; 1 is none"),
}


def check(sampling: Sampling, name=lambda field: field) -> None:
    """Raises UserError for the first setting out of bounds. `name`: field -> what the user calls it."""
    for field, value in sampling._asdict().items():
        fits, remedy = _BOUNDS[field]
        if not fits(value):
            raise UserError(f"{name(field)} {value}: {remedy}")


class Settings(NamedTuple):
    """`Sampling` of every row of a batch, as arrays [B]."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    penalty_B: jax.Array


def filtered(logits_BV: jax.Array, seen_BV: jax.Array, settings: Settings) -> jax.Array:
    """Logits [B, V] of the distribution that is drawn from; -inf where a token cannot be drawn.

    As Transformers' processors, in its order: repetition penalty (on tokens in `seen_BV`), temperature, top-k, top-p, min-p.
    Tokens as likely as the k-th are kept, and so is the one that crosses top_p. A greedy row keeps only its most likely token.
    """
    temperature_B1, top_k_B1, top_p_B1, min_p_B1, penalty_B1 = (a[:, None] for a in settings)
    penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    greedy_B1 = temperature_B1 == 0
    best_BV = jnp.arange(logits_BV.shape[1]) == jnp.argmax(logits_BV, axis=1)[:, None]
    scaled_BV = logits_BV / jnp.where(greedy_B1, 1, temperature_B1)
    cuts = (top_k_B1 > 0) | (top_p_B1 < 1)  # these need a sort of the tokens, which takes longer than everything else here
    scaled_BV = lax.cond(jnp.any(cuts & ~greedy_B1), _most_likely, lambda x, *_: x, scaled_BV, top_k_B1, top_p_B1)
    least_B1 = jnp.max(scaled_BV, axis=1, keepdims=True) + jnp.log(min_p_B1)
    return jnp.where(jnp.where(greedy_B1, best_BV, scaled_BV >= least_B1), scaled_BV, -jnp.inf)


def _most_likely(logits_BV: jax.Array, top_k_B1: jax.Array, top_p_B1: jax.Array) -> jax.Array:
    """Top-k, then top-p: logits [B, V], -inf where a token is cut. The settings are [B, 1]."""
    V = logits_BV.shape[1]
    order_BV = jnp.argsort(logits_BV, axis=1, descending=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=1)
    kth_B1 = jnp.take_along_axis(sorted_BV, jnp.where(top_k_B1 > 0, jnp.minimum(top_k_B1, V), V) - 1, axis=1)
    sorted_BV = jnp.where(sorted_BV < kth_B1, -jnp.inf, sorted_BV)
    p_BV = jax.nn.softmax(sorted_BV, axis=1)
    before_BV = jnp.cumsum(p_BV, axis=1) - p_BV  # the probability of all more likely tokens
    sorted_BV = jnp.where((before_BV < top_p_B1) | (top_p_B1 >= 1), sorted_BV, -jnp.inf)
    return jax.vmap(lambda row_V, order_V: jnp.zeros_like(row_V).at[order_V].set(row_V))(sorted_BV, order_BV)


def draw(logits_BV: jax.Array, key_B2: jax.Array, position_B: jax.Array, settings: Settings) -> jax.Array:
    """A token [B] for each row of `filtered` logits. Its random number depends only on the row's key and position."""

    def sample(key_2: jax.Array, position: jax.Array, logits_V: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.wrap_key_data(key_2), position), logits_V)

    greedy = lambda: jnp.argmax(logits_BV, axis=1)
    drawn = lambda: jax.vmap(sample)(key_B2, position_B, logits_BV)
    return lax.cond(jnp.all(settings.temperature_B == 0), greedy, drawn).astype(jnp.int32)
