"""Attention of others: cuDNN's, JAX's splash attention for TPU, tokamax's for Hopper and later."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tinyllama_jax.base.errors import UserError

SPLASH_BLOCK = 512  # queries and keys of a block in splash attention, as MaxText has it by default for v4 to v6e (`sa_block_q`)


def cudnn(q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids_BS: jax.Array | None) -> jax.Array:
    """cuDNN's flash attention, as JAX calls it. It knows no segments: they become a mask [B, 1, S, S] in memory."""
    f = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return _named(lambda q, k, v, mask: f(q, k, v, mask=mask))(q_BSNH, k_BSKH, v_BSKH, _mask(ids_BS))


def tokamax(q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids_BS: jax.Array | None) -> jax.Array:
    """tokamax's kernel in Pallas for Mosaic GPU, with such a mask too. Raises UserError if it refuses the case."""
    import tokamax

    f = partial(tokamax.dot_product_attention, is_causal=True, implementation="mosaic_gpu")
    try:
        return _named(lambda q, k, v, mask: f(q, k, v, mask=mask))(q_BSNH, k_BSKH, v_BSKH, _mask(ids_BS))
    except NotImplementedError as error:
        raise UserError(f"--model.attention=pallas_mosaic_gpu: tokamax {tokamax.__version__} refuses: {error}") from None


def _mask(ids_BS: jax.Array | None) -> jax.Array | None:
    return None if ids_BS is None else (ids_BS[:, :, None] == ids_BS[:, None, :])[:, None]


def _named(f: Callable) -> Callable:
    """`f`(q, k, v, mask) with what its backward needs of its forward named "attention": its output and the rows' logsumexp.

    To name the output alone would not do: forward would run again for the rest.
    """

    @jax.custom_vjp
    def attend(q, k, v, mask):
        return f(q, k, v, mask)

    def forward(q, k, v, mask):
        out, vjp = jax.vjp(lambda q, k, v: f(q, k, v, mask), q, k, v)
        named = checkpoint_name(out, "attention")

        def keep(x):
            if x is out:
                return named
            again = any(x is known for known in (q, k, v)) or x.shape[-2:] == 2 * q.shape[1:2]  # of a mask: made again
            return x if again else checkpoint_name(x, "attention")

        return named, jax.tree.map(keep, vjp)

    attend.defvjp(forward, lambda vjp, dout: (*vjp(dout), None))
    return attend


def splash(
    q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids_BS: jax.Array | None, interpret: bool = False
) -> jax.Array:
    """JAX's splash attention: flash attention in Pallas for TPU, which skips blocks that the mask hides, with GQA."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    S, N, H = q_BSNH.shape[1:]
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((S, S))] * N),
        block_sizes=kernels.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), math.gcd(S, SPLASH_BLOCK))),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",  # the output and the rows' logsumexp
        interpret=interpret,
    )
    heads_first = lambda x: jnp.swapaxes(x, 1, 2)
    scaled_BSNH = q_BSNH.astype(jnp.float32) * jnp.float32(1 / math.sqrt(H))  # 1/8 for H = 64: exact in q's dtype too
    arrays = heads_first(scaled_BSNH.astype(q_BSNH.dtype)), heads_first(k_BSKH), heads_first(v_BSKH)
    with jax.numpy_dtype_promotion("standard"):  # its own code counts on it
        if ids_BS is None:
            return heads_first(jax.vmap(kernel)(*arrays))
        return heads_first(jax.vmap(lambda q, k, v, ids: kernel(q, k, v, kernels.SegmentIds(ids, ids)))(*arrays, ids_BS))
