"""Weights in 4-bit NormalFloat with doubly quantised scales: QLoRA's format (arXiv:2305.14314), as in bitsandbytes.

A matrix [I, O] is cut into blocks of 64 inputs of one output. Each weight is one of 16 levels times
the largest magnitude of its block. These magnitudes, less their mean, are themselves 8-bit codes in groups of 256, in
bitsandbytes' order: all blocks of an output, then those of the next. That makes 4.127 bits a weight.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.base.lora import NF4_BLOCK

BLOCK, GROUP = NF4_BLOCK, 256
# quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (the paper's appendix E)
LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
          -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
          0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip

# One matrix. "codes": uint8, shaped as the matrix, but its last input dimension halved: a byte holds two inputs, the first one
# high; "scale": uint8 [blocks]; "scale_scale": fp32 [groups]; "scale_mean": fp32
Nf4 = dict[str, jax.Array]


def dynamic_levels() -> np.ndarray:
    """The 256 levels of bitsandbytes' dynamic 8-bit type (arXiv:2110.02861): 7 decades, each twice as fine as the last."""
    levels, first = [0.0, 1.0], np.float64(np.float32(0.1))
    for exponent in range(7):
        n, step = 2**exponent, np.float64(np.float32(0.9) / np.float32(2**exponent))
        i = np.arange(n + 1)  # the bounds as torch.linspace computes them: from both ends, by fused multiply-add in fp32
        bounds = np.where(2 * i < n + 1, first + step * i, 1 - step * (n - i)).astype(np.float32)
        middle = (bounds[:-1] + bounds[1:]) / np.float32(2)
        levels += [sign * np.float32(10.0 ** (exponent - 6)) * x for x in middle for sign in (1, -1)]
    return np.sort(np.array(levels, np.float32))


def _nearest(x: jax.Array, levels: np.ndarray) -> jax.Array:
    middle = (levels[:-1] + levels[1:]) / np.float32(2)
    return jnp.searchsorted(middle, x).astype(jnp.uint8)  # a number halfway between two levels gets the lower one


def _blockwise(x_XB: jax.Array, levels: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(codes [X, B] of each row over its largest magnitude, these magnitudes [X])."""
    largest_X = jnp.max(jnp.abs(x_XB), axis=1)
    inverse_X = jnp.where(largest_X > 0, 1 / jnp.where(largest_X > 0, largest_X, 1), 0)
    return _nearest(jnp.clip(x_XB * inverse_X[:, None], -1, 1), levels), largest_X


def quantize(w: jax.Array, n_inputs: int) -> Nf4:
    """Rounds a matrix whose first `n_inputs` dimensions are inputs; their product must be a multiple of 64."""
    inputs, outputs = w.shape[:n_inputs], w.shape[n_inputs:]
    w_OI = w.astype(jnp.float32).reshape(math.prod(inputs), -1).T
    codes_XB, scale_X = _blockwise(w_OI.reshape(-1, BLOCK), np.array(LEVELS, np.float32))
    mean = jnp.mean(scale_X)
    padded = jnp.pad(scale_X - mean, (0, -len(scale_X) % GROUP))
    scale_codes, scale_scale = _blockwise(padded.reshape(-1, GROUP), dynamic_levels())
    codes_OJ2 = codes_XB.reshape(len(w_OI), -1, 2)
    codes_JO = (codes_OJ2[..., 0] << 4 | codes_OJ2[..., 1]).T
    return {
        "codes": codes_JO.reshape(*inputs[:-1], inputs[-1] // 2, *outputs),
        "scale": scale_codes.reshape(-1)[: len(scale_X)],
        "scale_scale": scale_scale,
        "scale_mean": mean,
    }


def dequantize(w: Nf4, n_inputs: int, dtype: jnp.dtype) -> jax.Array:
    """The matrix in `dtype`, computed in fp32; shape as given to `quantize`."""
    *before, last = w["codes"].shape[:n_inputs]
    outputs = w["codes"].shape[n_inputs:]
    codes_JO = w["codes"].reshape(math.prod((*before, last)), -1)
    codes_IO = jnp.stack([codes_JO >> 4, codes_JO & 15], axis=1).reshape(-1, codes_JO.shape[1])
    scale_X = _take(dynamic_levels(), w["scale"]) * jnp.repeat(w["scale_scale"], GROUP)[: len(w["scale"])] + w["scale_mean"]
    scale_GO = scale_X.reshape(codes_IO.shape[1], -1).T  # G: blocks of an output
    w_GBO = _take(np.array(LEVELS, np.float32), codes_IO).reshape(len(scale_GO), BLOCK, -1) * scale_GO[:, None]
    return w_GBO.astype(dtype).reshape(*before, 2 * last, *outputs)


def _take(levels: np.ndarray, codes: jax.Array) -> jax.Array:
    return jnp.asarray(levels)[codes.astype(jnp.int32)]
