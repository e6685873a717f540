"""Third-party attention kernels: cuDNN's, JAX's splash attention for TPU, tokamax's for Hopper and later."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tinyllama_jax.base.errors import UserError

SPLASH_BLOCK = 512  # queries and keys in a block of splash attention; MaxText's default for v4 to v6e (`sa_block_q`)


def cudnn(q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids_BS: jax.Array | None) -> jax.Array:
    """cuDNN's flash attention, through JAX. Segments become a mask [B, 1, S, S] in memory."""
    f = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return _named(lambda q, k, v, mask: f(q, k, v, mask=mask))(q_BSNH, k_BSKH, v_BSKH, _mask(ids_BS))


def tokamax(q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids_BS: jax.Array | None) -> jax.Array:
    """tokamax's Pallas kernel for Mosaic GPU; segments as in `cudnn`. Raises UserError if tokamax refuses the arguments."""
    import tokamax

    f = partial(tokamax.dot_product_attention, is_causal=True, implementation="mosaic_gpu")
    try:
        return _named(lambda q, k, v, mask: f(q, k, v, mask=mask))(q_BSNH, k_BSKH, v_BSKH, _mask(ids_BS))
    except NotImplementedError as error:
        raise UserError(f"--model.attention=pallas_mosaic_gpu: tokamax {tokamax.__version__} refuses: {error}") from None


def _mask(ids_BS: jax.Array | None) -> jax.Array | None:
    return None if ids_BS is None else (ids_BS[:, :, None] == ids_BS[:, None, :])[:, None]


def _named(f: Callable) -> Callable:
    """Returns `f`(q, k, v, mask) with everything that backward needs from forward named "attention".

    That is the output and each row's logsumexp. With the output alone, backward would run forward again.
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
            is_input = any(x is known for known in (q, k, v))
            is_mask = x.shape[-2:] == 2 * q.shape[1:2]  # recomputed from the segments
            return x if is_input or is_mask else checkpoint_name(x, "attention")

        return named, jax.tree.map(keep, vjp)

    attend.defvjp(forward, lambda vjp, dout: (*vjp(dout), None))
    return attend


def splash(
    q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids_BS: jax.Array | None, interpret: bool = False
) -> jax.Array:
    """JAX's splash attention for TPU: flash attention in Pallas with GQA, which skips blocks that the mask hides."""
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
    with jax.numpy_dtype_promotion("standard"):  # splash attention's code needs it
        if ids_BS is None:
            return heads_first(jax.vmap(kernel)(*arrays))
        return heads_first(jax.vmap(lambda q, k, v, ids: kernel(q, k, v, kernels.SegmentIds(ids, ids)))(*arrays, ids_BS))
