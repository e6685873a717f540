"""Weights in 8 or 4 bits: how they are rounded and multiplied, in plain jnp."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tinyllama_jax.base import sharding

GROUP = 32  # inputs that share a scale in 4 bits
# Inputs whose weights are converted at a time on a CPU. XLA would convert the whole matrix first, or each number within the
# product: for 2,048 x 5,632 weights that took 14 to 25 times as long
BLOCKS = (128, 64, 32)


class Int8(NamedTuple):
    """A matrix [I, O] as q x scale, one scale per column (output channel); 8 bits per weight."""

    q_IO: jax.Array  # int8
    scale_O: jax.Array  # fp32


class Int4(NamedTuple):
    """A matrix [I, O] as (q - 8) x scale, one scale per GROUP inputs of a column; 4.5 bits per weight, as in GGUF's Q4_0.

    A byte holds inputs j (its low half) and j + 16 of a group, in Q4_0's order.
    """

    q_GJO: jax.Array  # uint8 [I / 32, 16, O]
    scale_GO: jax.Array  # fp16 [I / 32, O]


@jax.jit
def int8(w_IO: jax.Array) -> Int8:
    """Rounds to the nearest of 255 values; a column's number of largest magnitude is exact."""
    scale_O = jnp.max(jnp.abs(w_IO), axis=0) / 127
    return Int8(jnp.round(w_IO / jnp.where(scale_O == 0, 1, scale_O)).astype(jnp.int8), scale_O)


@jax.jit
def int4(w_IO: jax.Array) -> Int4:
    """Rounds as Q4_0 does (ggml-quants.c), so that weights read from a Q4_0 file stay as they are.

    A group's number of largest magnitude becomes -8 x scale, whatever its sign.
    """
    w_GIO = w_IO.reshape(-1, GROUP, w_IO.shape[1])
    largest_GO = jnp.take_along_axis(w_GIO, jnp.argmax(jnp.abs(w_GIO), axis=1, keepdims=True), axis=1)[:, 0]
    scale_GO = largest_GO / -8
    inverse_GO = jnp.where(scale_GO == 0, 0, 1 / jnp.where(scale_GO == 0, 1, scale_GO))
    q_GIO = jnp.clip(jnp.trunc(w_GIO * inverse_GO[:, None] + 8.5), 0, 15).astype(jnp.uint8)
    low_GJO, high_GJO = jnp.split(q_GIO, 2, axis=1)
    return Int4(low_GJO | high_GJO << 4, scale_GO.astype(jnp.float16))


def matmul(x_BSI: jax.Array, kernel: jax.Array | Int8 | Int4, dtype: jnp.dtype | None = None) -> jax.Array:
    """x times the matrix, [B, S, O] in `dtype`, by default x's."""
    dtype, inputs = dtype or x_BSI.dtype, x_BSI.shape[2]
    if isinstance(kernel, Int8):  # whole numbers up to 127 are exact in bf16; the scales come after the sum
        return (matmul(x_BSI, kernel.q_IO, jnp.float32) * kernel.scale_O).astype(dtype)
    n = next((n for n in BLOCKS if inputs % n == 0), None)
    converted = isinstance(kernel, Int4) or kernel.dtype != x_BSI.dtype
    if n is None or not converted or jax.default_backend() != "cpu":
        return _product(x_BSI, kernel, dtype)

    def add(i: jax.Array, y_BSO: jax.Array) -> jax.Array:  # of n inputs, whose converted weights fit the processor's cache
        part = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, i * (len(a) * n // inputs), len(a) * n // inputs), kernel)
        return y_BSO + _product(lax.dynamic_slice_in_dim(x_BSI, i * n, n, 2), part, jnp.float32)

    zeros_BSO = jnp.zeros((*x_BSI.shape[:2], jax.tree.leaves(kernel)[0].shape[-1]), jnp.float32)
    return lax.fori_loop(0, inputs // n, add, zeros_BSO).astype(dtype)


def _product(x_BSI: jax.Array, kernel: jax.Array | Int4, dtype: jnp.dtype) -> jax.Array:
    einsum = lambda x_BSI, w_IO: jnp.einsum("bsi,io->bso", x_BSI, numbers(w_IO, x_BSI.dtype), preferred_element_type=dtype)
    if not isinstance(kernel, Int4):
        return einsum(x_BSI, kernel)
    x_BSGhJ = x_BSI.reshape(*x_BSI.shape[:2], -1, 2, GROUP // 2)  # h: the halves of a group, which are the halves of a byte
    low_BSI, high_BSI = (x_BSGhJ[..., h, :].reshape(*x_BSI.shape[:2], -1) for h in (0, 1))
    low_IO, high_IO = (q.reshape(-1, q.shape[2]) for q in _halves(kernel, x_BSI.dtype))
    return einsum(low_BSI, low_IO) + einsum(high_BSI, high_IO)


def numbers(w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`w` in `dtype`. A uint16 array holds the bits of bf16: XLA's CPU backend converts these 20 times as fast as bf16."""
    if w.dtype == jnp.uint16:
        w = lax.bitcast_convert_type(w.astype(jnp.uint32) << 16, jnp.float32)
    return w.astype(dtype)


def _halves(kernel: Int4, dtype: jnp.dtype) -> list[jax.Array]:
    """[weights of the low halves of the bytes, weights of the high halves], each [I / 32, 16, O]."""
    scale_GO = kernel.scale_GO[:, None].astype(dtype)
    return [(q.astype(jnp.int8) - 8).astype(dtype) * scale_GO for q in (kernel.q_GJO & 15, kernel.q_GJO >> 4)]


def lookup(table: jax.Array | Int8 | Int4, tokens_BS: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of an embedding, [B, S, D]. A table in 8 or 4 bits is kept as the matrix [D, V]."""
    if isinstance(table, jax.Array):
        return numbers(sharding.constrain(table, "VD")[tokens_BS], dtype)
    columns = type(table)(*(a[..., tokens_BS.ravel()] for a in table))
    w_DX = columns.q_IO * columns.scale_O if isinstance(table, Int8) else jnp.concatenate(_halves(columns, jnp.float32), axis=1)
    return w_DX.reshape(-1, tokens_BS.size).T.reshape(*tokens_BS.shape, -1).astype(dtype)
