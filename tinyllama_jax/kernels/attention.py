"""Causal grouped-query attention: the definition in fp32, and implementations with its signature."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tinyllama_jax.config import UserError

QUERY_BLOCK = 512  # queries whose scores exist at one time in "xla": B x N x 512 x T, never S x T


def choose(impl: str, dtype: str, device: jax.Device | None = None) -> tuple[str, str]:
    """What "auto" means on `device` (the first one here if None): (implementation, reason).

    Raises UserError if a named one cannot run there.
    """
    device = device or jax.devices()[0]
    backend, capability = device.platform, getattr(device, "compute_capability", "0")
    flash = backend == "gpu" and float(capability or 0) >= 8.0 and dtype != "float32"
    if impl == "auto":
        if flash:
            return "cudnn", f"{dtype} on a GPU of compute capability {capability}"
        return "xla", f"no fused kernel here for {dtype} on the backend {backend}"
    if impl == "cudnn" and not flash:
        raise UserError(
            "--model.attention=cudnn: needs bf16 or fp16 on an NVIDIA GPU of compute capability 8.0 or more; "
            f"this is {dtype} on the backend {backend}"
        )
    return impl, "asked for"


def attention(q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *, impl: str, start: jax.Array | int = 0) -> jax.Array:
    """Query i stands at position `start` + i and sees keys 0 .. `start` + i; query head n uses key head n // (N / K).

    Returns [B, S, N, H] in q's dtype. `impl`: "reference", "xla" or "cudnn" (start = 0 and S = T only).
    """
    if impl == "reference":
        return reference(q_BSNH, k_BTKH, v_BTKH, start)
    if impl == "xla":
        return _in_query_blocks(q_BSNH, k_BTKH, v_BTKH, start)
    if impl == "cudnn":
        return jax.nn.dot_product_attention(q_BSNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn")
    raise ValueError(f"no attention implementation {impl!r}")


def reference(q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, start: jax.Array | int = 0) -> jax.Array:
    """The definition: softmax(q k' / sqrt(H) + mask) v, all in fp32."""
    f32 = partial(jnp.asarray, dtype=jnp.float32)
    return _attend(f32(q_BSNH), f32(k_BTKH), f32(v_BTKH), jnp.int32(start)).astype(q_BSNH.dtype)


def _attend(q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, start: jax.Array) -> jax.Array:
    B, S, N, H = q_BSNH.shape
    T, K = k_BTKH.shape[1:3]
    q_BSKGH = q_BSNH.reshape(B, S, K, N // K, H)
    # fp32 scores: bf16 has 8 bits, so two scores near 100 that differ by 0.5 would become equal
    scores_BKGST = jnp.einsum("bskgh,btkh->bkgst", q_BSKGH, k_BTKH, preferred_element_type=jnp.float32)
    visible_ST = jnp.arange(T)[None, :] <= start + jnp.arange(S)[:, None]
    scores_BKGST = jnp.where(visible_ST, scores_BKGST * jnp.float32(1 / math.sqrt(H)), jnp.float32(-jnp.inf))
    weights_BKGST = jax.nn.softmax(scores_BKGST, axis=-1).astype(v_BTKH.dtype)
    return jnp.einsum("bkgst,btkh->bskgh", weights_BKGST, v_BTKH).reshape(B, S, N, H)


def _in_query_blocks(q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, start: jax.Array | int) -> jax.Array:
    S = q_BSNH.shape[1]
    if S <= QUERY_BLOCK:
        return _attend(q_BSNH, k_BTKH, v_BTKH, jnp.int32(start))

    @jax.checkpoint  # backward computes a block's scores again rather than keep those of all blocks
    def block(i: jax.Array, q_block: jax.Array) -> jax.Array:
        return _attend(q_block, k_BTKH, v_BTKH, i + start)

    whole = S - S % QUERY_BLOCK
    blocks = jnp.moveaxis(q_BSNH[:, :whole].reshape(q_BSNH.shape[0], -1, QUERY_BLOCK, *q_BSNH.shape[2:]), 1, 0)
    out = lax.map(lambda args: block(*args), (jnp.arange(0, whole, QUERY_BLOCK), blocks))
    out_BSNH = jnp.moveaxis(out, 0, 1).reshape(q_BSNH.shape[0], whole, *q_BSNH.shape[2:])
    if whole == S:
        return out_BSNH
    return jnp.concatenate([out_BSNH, block(jnp.int32(whole), q_BSNH[:, whole:])], axis=1)
