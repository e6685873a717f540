"""Causal grouped-query attention in plain JAX: the definition in fp32, and the same a block of queries at a time."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

QUERY_BLOCK = 256  # queries in a block of "xla": its scores take B x N x 256 x T, never S x T
PIECES = 8  # the most groups of blocks; a group reads the keys up to its last query and is compiled separately


def reference(q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids_BS: jax.Array | None = None) -> jax.Array:
    """The definition: softmax(q k' / sqrt(H) + mask) v, in fp32."""
    q_BSKGH, k_BTKH, v_BTKH = (x.astype(jnp.float32) for x in (_grouped(q_BSNH, k_BSKH), k_BSKH, v_BSKH))
    weights_BKGST = _weights(q_BSKGH, k_BTKH, ids_BS, ids_BS, jnp.int32(0))
    return jnp.einsum("bkgst,btkh->bskgh", weights_BKGST, v_BTKH).reshape(q_BSNH.shape).astype(q_BSNH.dtype)


def _grouped(q_BSNH: jax.Array, k_BTKH: jax.Array) -> jax.Array:
    return q_BSNH.reshape(*q_BSNH.shape[:2], k_BTKH.shape[2], -1, q_BSNH.shape[3])


def _weights(q_BSKGH, k_BTKH, q_ids_BS: jax.Array | None, k_ids_BT: jax.Array | None, start: jax.Array) -> jax.Array:
    """The attention weights of each query over the keys, [B, K, G, S, T] in fp32."""
    S, T = q_BSKGH.shape[1], k_BTKH.shape[1]
    # fp32 scores: bf16 has 8 bits, so two scores near 100 that differ by 0.5 would become equal
    scores_BKGST = jnp.einsum("bskgh,btkh->bkgst", q_BSKGH, k_BTKH, preferred_element_type=jnp.float32)
    visible_BST = (jnp.arange(T)[None, :] <= start + jnp.arange(S)[:, None])[None]
    if q_ids_BS is not None:
        visible_BST &= q_ids_BS[:, :, None] == k_ids_BT[:, None, :T]
    scores_BKGST *= jnp.float32(1 / math.sqrt(q_BSKGH.shape[-1]))
    return jax.nn.softmax(jnp.where(visible_BST[:, None, None], scores_BKGST, jnp.float32(-jnp.inf)), axis=-1)


def in_query_blocks(q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids_BS: jax.Array | None = None) -> jax.Array:
    """Computes `reference` a block of queries at a time. Matmuls take the inputs' dtype and accumulate in fp32.

    A piece skips the keys after its last query: with n pieces, 1/2 + 1/(2n) of the work remains.
    """
    pieces = partial(_in_pieces, ids_BS=ids_BS)
    return jax.checkpoint(pieces, prevent_cse=False)(q_BSNH, k_BSKH, v_BSKH)  # backward saves only q, k and v


def _in_pieces(q_BSNH, k_BTKH, v_BTKH, ids_BS):
    S = q_BSNH.shape[1]
    n = -(-S // QUERY_BLOCK)
    k_f32, v_f32 = k_BTKH.astype(jnp.float32), v_BTKH.astype(jnp.float32)  # so that their gradients are summed in fp32
    size, pieces, first, out = -(-S // n), min(n, PIECES), 0, []
    # pads the last block with copies of the last query; jnp.pad's "edge" would send activations between devices
    padded = lambda x: jnp.concatenate([x, jnp.repeat(x[:, -1:], n * size - S, axis=1)], axis=1)
    cut = lambda x: jnp.stack(jnp.split(padded(x), n, axis=1))
    q = cut(_grouped(q_BSNH, k_BTKH))  # blocks, B, S of a block, K, G, H
    q_ids, at = None if ids_BS is None else cut(ids_BS), size * jnp.arange(n, dtype=jnp.int32)
    for last in (n * (j + 1) // pieces for j in range(pieces)):
        sees = min(last * size, S)
        block = lambda of, sees=sees: _attend(of[0], k_f32, v_f32, of[1], ids_BS, of[2], sees)
        out.append(lax.map(block, jax.tree.map(lambda x, part=slice(first, last): x[part], (q, q_ids, at))))
        first = last
    out_BSKGH = jnp.moveaxis(jnp.concatenate(out), 0, 1).reshape(len(q_BSNH), n * size, *q.shape[3:])
    return out_BSKGH[:, :S].reshape(q_BSNH.shape)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q_BSKGH, k_BTKH, v_BTKH, q_ids_BS, k_ids_BT, start, sees: int) -> jax.Array:
    """Attention of a block of queries to the first `sees` keys. k and v are fp32, for the sake of their gradients."""
    return _forward(q_BSKGH, k_BTKH, v_BTKH, q_ids_BS, k_ids_BT, start, sees)[0]


def _forward(q_BSKGH, k_BTKH, v_BTKH, q_ids_BS, k_ids_BT, start, sees):
    k_BTKH, v_BTKH = k_BTKH.astype(q_BSKGH.dtype), v_BTKH.astype(q_BSKGH.dtype)
    weights_BKGST = _weights(q_BSKGH, k_BTKH[:, :sees], q_ids_BS, k_ids_BT, start).astype(q_BSKGH.dtype)
    out_BSKGH = jnp.einsum("bkgst,btkh->bskgh", weights_BKGST, v_BTKH[:, :sees], preferred_element_type=jnp.float32)
    return out_BSKGH.astype(q_BSKGH.dtype), (q_BSKGH, k_BTKH, v_BTKH, q_ids_BS, k_ids_BT, start)


def _backward(sees, residuals, dout_BSKGH):
    """Computes the scores again. Their gradient is cast to q's dtype for its two matmuls, as in the GPU kernel."""
    (q, k, v, *mask), einsum = residuals, partial(jnp.einsum, preferred_element_type=jnp.float32)
    k, v, hidden = k[:, :sees], v[:, :sees], ((0, 0), (0, k.shape[1] - sees), (0, 0), (0, 0))
    weights = _weights(q, k, *mask)
    dweights = einsum("bskgh,btkh->bkgst", dout_BSKGH, v)
    dscores = (weights * (dweights - jnp.sum(weights * dweights, axis=-1, keepdims=True))).astype(q.dtype)
    scale = jnp.float32(1 / math.sqrt(q.shape[-1]))
    dq, dk = einsum("bkgst,btkh->bskgh", dscores, k) * scale, einsum("bkgst,bskgh->btkh", dscores, q) * scale
    dv = einsum("bkgst,bskgh->btkh", weights.astype(q.dtype), dout_BSKGH)
    return dq.astype(q.dtype), jnp.pad(dk, hidden), jnp.pad(dv, hidden), None, None, None


_attend.defvjp(_forward, _backward)
