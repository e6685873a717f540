"""The forward pass of inference: tokens at any positions of each row, with a cache of the keys and values before them."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jmp
from jax import lax

from tinyllama_jax.base import dims, sharding
from tinyllama_jax.base.config import Model
from tinyllama_jax.core import model as model_lib
from tinyllama_jax.inference.quantize import lookup, matmul
from tinyllama_jax.inference.weights import Stack, Weights, in_stack

Cache = tuple[tuple[jax.Array, jax.Array], ...]  # k and v of each layer, [B, K, T, H] in the compute dtype


def init_cache(model: Model, rows: int, length: int) -> Cache:
    """An empty cache of `length` positions for each row."""
    shape = (rows, model.n_kv_heads, length, model.d_head)
    new = lambda: sharding.constrain(jnp.zeros(shape, model.compute_dtype), "BKTH")
    return tuple((new(), new()) for _ in range(model.n_layers))


def longer(cache: Cache, length: int) -> Cache:
    """The cache with room for `length` positions."""
    grow = lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, length - a.shape[2]), (0, 0)))
    return jax.tree.map(lambda a: sharding.constrain(grow(a), "BKTH"), cache)


def forward(
    weights: Weights, tokens_BS: jax.Array, positions_BS: jax.Array, cache: Cache, model: Model
) -> tuple[jax.Array, Cache]:
    """The head's input [B, S, D] for tokens at `positions_BS`, and the cache with their keys and values.

    A token sees the positions up to its own. The positions of a row are consecutive and lie within the cache.
    """
    new_cache = []

    def attend(q_BSNH, k_BSKH, v_BSKH):
        old = cache[len(new_cache)]
        new_cache.append(tuple(_put(c, x, positions_BS) for c, x in zip(old, (k_BSKH, v_BSKH), strict=True)))
        return over_cache(q_BSNH, *new_cache[-1], positions_BS)

    return through_layers(weights, tokens_BS, positions_BS, model, attend), tuple(new_cache)


def through_layers(
    weights: Weights, tokens_BS: jax.Array, positions_BS: jax.Array, model: Model, attend: Callable[..., jax.Array]
) -> jax.Array:
    """The head's input [B, S, D]. `attend`: (q, k, v) of a layer, from the first on, -> its attention's output [B, S, N, H].

    The layers are written out, not scanned, since a scan would copy each layer's weights out of a stack; but those of a trainer
    are scanned, so that the cast and merged matrices of only one layer are in memory.
    """
    policy, (B, S) = jmp.get_policy(model.precision), tokens_BS.shape
    sizes = dims.sizes(model) | {"B": B, "S": S}
    x_BSD = sharding.constrain(lookup(weights.embed_VD, tokens_BS, model.residual_dtype), "BSD")
    table = model_lib.rope_table(positions_BS, model)

    def one(x_BSD, layer):
        def project(name, einsum, x):
            y = matmul(x.reshape(B, S, -1), layer[name])
            return y.reshape(*(sizes[letter] for letter in einsum.partition("->")[2].upper()))

        def down(gate_BSF, up_BSF):
            return matmul(jax.nn.silu(gate_BSF) * up_BSF, layer["down"])

        return model_lib.layer(x_BSD, table, model_lib.Parts(layer.__getitem__, project, down, attend), model)

    if isinstance(stack := weights.layers, Stack):
        in_turn = lambda x, arrays: (one(x, in_stack(stack._replace(arrays=arrays), model)), None)
        x_BSD, _ = lax.scan(in_turn, x_BSD, stack.arrays)
    else:
        for layer in weights.layers:
            x_BSD = one(x_BSD, layer)
    return policy.cast_to_compute(model_lib.rms_norm(x_BSD, weights.final_norm_D, model.norm_eps))


def logits(weights: Weights, x_BSD: jax.Array) -> jax.Array:
    """Logits [B, S, V] in fp32. `x_BSD`: the output of `forward`."""
    return matmul(x_BSD, weights.head_DV, jnp.float32)


def _put(cache_BKTH: jax.Array, new_BSKH: jax.Array, positions_BS: jax.Array) -> jax.Array:
    """The cache with `new_BSKH` at `positions_BS`, which are consecutive in each row."""
    new_BKSH, start_B = jnp.moveaxis(new_BSKH, 1, 2).astype(cache_BKTH.dtype), positions_BS[:, 0]
    if jax.default_backend() == "cpu":  # where a scatter would copy the whole cache
        put = lambda b, cache: lax.dynamic_update_slice(cache, lax.dynamic_slice_in_dim(new_BKSH, b, 1), (b, 0, start_B[b], 0))
        cache_BKTH = lax.fori_loop(0, len(start_B), put, cache_BKTH)
    else:
        cache_BKTH = jax.vmap(lambda cache, new, at: lax.dynamic_update_slice(cache, new, (0, at, 0)))(
            cache_BKTH, new_BKSH, start_B
        )
    return sharding.constrain(cache_BKTH, "BKTH")


def over_cache(q_BSNH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, positions_BS: jax.Array) -> jax.Array:
    """Attention [B, S, N, H] of queries at `positions_BS` over the cache."""
    return attention(q_BSNH, k_BKTH, v_BKTH, jnp.arange(k_BKTH.shape[2]) <= positions_BS[:, :, None])


def attention(q_BSNH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, visible_BST: jax.Array) -> jax.Array:
    """Attention [B, S, N, H] over the keys that are visible to each query; the scores in fp32 as in training."""
    B, S, N, H = q_BSNH.shape
    q_BSKGH = q_BSNH.reshape(B, S, k_BKTH.shape[1], -1, H)
    scores_BKGST = jnp.einsum("bskgh,bkth->bkgst", q_BSKGH, k_BKTH, preferred_element_type=jnp.float32)
    scores_BKGST = jnp.where(visible_BST[:, None, None], scores_BKGST * jnp.float32(1 / math.sqrt(H)), -jnp.inf)
    weights_BKGST = jax.nn.softmax(scores_BKGST, axis=-1).astype(q_BSNH.dtype)
    # bkgsh, the batched matmul's own order: with any other, XLA's CPU backend refuses bf16 for more than one row
    out_BKGSH = jnp.einsum("bkgst,bkth->bkgsh", weights_BKGST, v_BKTH, preferred_element_type=jnp.float32)
    return jnp.moveaxis(out_BKGSH, 3, 1).reshape(B, S, N, H).astype(q_BSNH.dtype)
