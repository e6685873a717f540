"""Causal grouped-query attention: one function, and the choice of its implementation."""

import importlib.util

import jax
from jax.ad_checkpoint import checkpoint_name

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.kernels.attention import library, plain

# opaque to the SPMD partitioner, so they run under shard_map
KERNELS = ("pallas_triton", "pallas_mosaic_gpu", "pallas_tpu", "cudnn")
LANES = 128  # the lanes of a TPU's vector unit


def attention(
    q_BSNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BS: jax.Array | None = None,
    *,
    impl: str,
    interpret: bool = False,
) -> jax.Array:
    """Returns the attention output [B, S, N, H] in q's dtype.

    Query i sees keys 0 .. i. Query head n uses key head n // (N / K). With `segment_ids_BS` (int32) a query sees only keys of
    its own segment. `impl`: "reference", "xla" or one of KERNELS. `interpret` runs "pallas_triton" and "pallas_tpu" on any
    device, slowly. Backward saves q, k, v and values named "attention". Kernels have neither forward-mode nor second
    derivatives. A NaN can reach other documents: 0 x NaN is NaN. Raises ValueError unless there are as many keys as queries.
    """
    if q_BSNH.shape[1] != k_BSKH.shape[1]:
        raise ValueError(f"{q_BSNH.shape[1]} queries and {k_BSKH.shape[1]} keys: attention over a cache is inference's own")
    arrays = q_BSNH, k_BSKH, v_BSKH, segment_ids_BS
    if impl in ("reference", "xla"):
        f = plain.reference if impl == "reference" else plain.in_query_blocks
        return checkpoint_name(f(*arrays), "attention")
    if impl == "pallas_triton":
        from tinyllama_jax.kernels.attention import triton  # imported here: later versions of JAX drop this language

        return triton.flash(*arrays, interpret)
    if impl == "pallas_tpu":
        return library.splash(*arrays, interpret)
    if impl == "cudnn":
        return library.cudnn(*arrays)
    if impl == "pallas_mosaic_gpu":
        return library.tokamax(*arrays)
    raise ValueError(f"no attention implementation {impl!r}")


def choose(
    impl: str,
    dtype: str,
    device: jax.Device | None = None,
    *,
    seq_len: int = LANES,
    head_dim: int = 64,
    segments: bool = False,
) -> tuple[str, str]:
    """Chooses the implementation on `device` (None: the first device) and returns it with the reason.

    Raises UserError if `impl` names one that cannot run on this device or with these sequences and heads.
    """
    device = device or jax.devices()[0]
    lacking = {name: _lacks(name, dtype, device, seq_len, head_dim) for name in KERNELS}
    if impl != "auto":
        if lacking.get(impl):
            raise UserError(f"--model.attention={impl}: {lacking[impl]}; auto takes what can run")
        return impl, "asked for"
    if device.platform == "tpu" and not lacking["pallas_tpu"]:
        return "pallas_tpu", "splash attention, on a TPU"
    if device.platform == "gpu":
        capability = device.compute_capability
        # cuDNN uses Hopper's own instructions; for segments it needs an [S, S] mask, which the Triton kernel does not
        first, second = ("cudnn", "pallas_triton") if float(capability) >= 9.0 and not segments else ("pallas_triton", "cudnn")
        for name in (first, second):
            if not lacking[name]:
                return name, f"{dtype} on a GPU of compute capability {capability}{', with segments' if segments else ''}"
    reason = next((lacking[name] for name in KERNELS if device.platform == _PLATFORM[name]), "")
    return "xla", f"no kernel for {dtype} on the backend {device.platform}" + (f": {reason}" if reason else "")


_PLATFORM = {"pallas_triton": "gpu", "pallas_mosaic_gpu": "gpu", "cudnn": "gpu", "pallas_tpu": "tpu"}


def _lacks(impl: str, dtype: str, device: jax.Device, seq_len: int, head_dim: int) -> str:
    """Returns why `impl` cannot run; empty if it can."""
    if impl == "pallas_tpu":
        if device.platform != "tpu":
            return f"needs a TPU; this is the backend {device.platform}"
        return f"needs a seq_len that is a multiple of {LANES}; this is {seq_len}" if seq_len % LANES else ""
    lowest = 9.0 if impl == "pallas_mosaic_gpu" else 8.0
    capability = float(getattr(device, "compute_capability", 0) or 0)
    if device.platform != "gpu" or capability < lowest or dtype == "float32":
        backend = f"compute capability {capability}" if device.platform == "gpu" else f"the backend {device.platform}"
        return f"needs bf16 or fp16 on an NVIDIA GPU of compute capability {lowest} or more; this is {dtype} on {backend}"
    if head_dim > 128 or (impl != "pallas_triton" and head_dim % 8):
        return f"needs heads of at most 128{'' if impl == 'pallas_triton' else ', a multiple of 8'}; these are {head_dim} wide"
    if impl == "pallas_triton" and importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return "needs a JAX that still has Pallas' Triton language; cudnn is its successor"
    if impl == "pallas_mosaic_gpu" and importlib.util.find_spec("tokamax") is None:
        return "needs tokamax: pip install tokamax"
    return ""
