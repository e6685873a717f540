"""Causal grouped-query attention as XLA compiles it: the definition in fp32, and a block of queries at a time."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

QUERY_BLOCK = 512  # queries whose scores exist at one time in "xla": B x N x 512 x T, never S x T


def reference(
    q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BS: jax.Array | None = None, start: jax.Array | int = 0
) -> jax.Array:
    """The definition: softmax(q k' / sqrt(H) + mask) v, all in fp32."""
    f32 = partial(jnp.asarray, dtype=jnp.float32)
    return _attend(f32(q_BSNH), f32(k_BTKH), f32(v_BTKH), ids_BS, ids_BS, jnp.int32(start)).astype(q_BSNH.dtype)


def _attend(q_BSNH, k_BTKH, v_BTKH, q_ids_BS: jax.Array | None, k_ids_BT: jax.Array | None, start: jax.Array) -> jax.Array:
    B, S, N, H = q_BSNH.shape
    T, K = k_BTKH.shape[1:3]
    q_BSKGH = q_BSNH.reshape(B, S, K, N // K, H)
    # fp32 scores: bf16 has 8 bits, so two scores near 100 that differ by 0.5 would become equal
    scores_BKGST = jnp.einsum("bskgh,btkh->bkgst", q_BSKGH, k_BTKH, preferred_element_type=jnp.float32)
    visible_BST = (jnp.arange(T)[None, :] <= start + jnp.arange(S)[:, None])[None]
    if q_ids_BS is not None:
        visible_BST &= q_ids_BS[:, :, None] == k_ids_BT[:, None, :]
    scores_BKGST *= jnp.float32(1 / math.sqrt(H))
    scores_BKGST = jnp.where(visible_BST[:, None, None], scores_BKGST, jnp.float32(-jnp.inf))
    weights_BKGST = jax.nn.softmax(scores_BKGST, axis=-1).astype(v_BTKH.dtype)
    return jnp.einsum("bkgst,btkh->bskgh", weights_BKGST, v_BTKH).reshape(B, S, N, H)


def in_query_blocks(
    q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BS: jax.Array | None = None, start: jax.Array | int = 0
) -> jax.Array:
    """The same, its matmuls in the inputs' dtype and its scores never all at one time."""
    S = q_BSNH.shape[1]
    if S <= QUERY_BLOCK:
        return _attend(q_BSNH, k_BTKH, v_BTKH, ids_BS, ids_BS, jnp.int32(start))

    @jax.checkpoint  # backward computes a block's scores again rather than keep those of all blocks
    def block(i: jax.Array, q_block: jax.Array) -> jax.Array:
        q_ids = None if ids_BS is None else lax.dynamic_slice_in_dim(ids_BS, i, q_block.shape[1], axis=1)
        return _attend(q_block, k_BTKH, v_BTKH, q_ids, ids_BS, i + start)

    whole = S - S % QUERY_BLOCK
    blocks = jnp.moveaxis(q_BSNH[:, :whole].reshape(q_BSNH.shape[0], -1, QUERY_BLOCK, *q_BSNH.shape[2:]), 1, 0)
    out = lax.map(lambda args: block(*args), (jnp.arange(0, whole, QUERY_BLOCK), blocks))
    out_BSNH = jnp.moveaxis(out, 0, 1).reshape(q_BSNH.shape[0], whole, *q_BSNH.shape[2:])
    if whole == S:
        return out_BSNH
    return jnp.concatenate([out_BSNH, block(jnp.int32(whole), q_BSNH[:, whole:])], axis=1)
