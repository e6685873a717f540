"""Flash attention for NVIDIA GPUs of compute capability 8.0 and later, in Pallas' Triton language.

FlashAttention-2 (Dao 2023, arXiv:2307.08691): a block of queries visits one block of keys after another and keeps a running
maximum and sum, so that scores exist only on the chip. Backward recomputes the scores from q, k and each row's logsumexp. It
has two kernels, one for dq and one for dk and dv. They need no atomic additions, so the same input gives the same bits.

JAX 0.11 deprecates this language; docs/log.md says when and how to replace this file.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# A hidden pair's score. Finite, because -inf - -inf is NaN where a whole row of a block is hidden. A power of two, so that its
# product with the scale is exact: the FMA in `_exp2` would keep that product's rounding error, which is huge.
HIDDEN = -(2.0**100)
LOG2_E = math.log2(math.e)  # scores are multiplied by it, because a GPU has exp2, not exp


class Tuning(NamedTuple):
    """A kernel's tile sizes, in rows that a program keeps and rows that its loop loads, and Triton's warps and stages."""

    own: int
    other: int
    warps: int
    stages: int


# By the widest H of each, chosen by the instructions that the loops execute on sm_80 (benchmarks/attention.md). dkv spills up
# to 108 bytes, none of them in a loop. The tiles fit into an RTX 3090's 99 KB of shared memory.
TUNINGS = {
    64: {"forward": Tuning(128, 64, 4, 3), "dq": Tuning(128, 32, 4, 3), "dkv": Tuning(128, 32, 4, 4)},
    128: {"forward": Tuning(128, 64, 8, 2), "dq": Tuning(64, 64, 4, 2), "dkv": Tuning(64, 64, 4, 2)},
}
LARGEST = 128  # a multiple of every block size


def _cut(kernel: str, S: int, H: int, documents: bool) -> Tuning:
    cut = TUNINGS[min(width for width in TUNINGS if H <= width)][kernel]
    if kernel == "dkv" and documents:
        cut = cut._replace(stages=2)  # with 4, ptxas spills 204 bytes, some in a loop; with 2, 100 bytes, none in a loop
    return cut._replace(own=min(cut.own, S), other=min(cut.other, S))


def flash(
    q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids_BS: jax.Array | None, interpret: bool = False
) -> jax.Array:
    """Causal grouped-query attention [B, S, N, H] in q's dtype, within segments; any S, and H up to 128."""
    S, H = q_BSNH.shape[1], q_BSNH.shape[3]
    rows = min(LARGEST, max(16, pl.next_power_of_2(S)))  # tensor cores take 16 rows or more
    width = max(16, pl.next_power_of_2(H))
    # padding keys come after all queries, so the causal mask hides them; columns of zeros do not change a product
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -S % rows), (0, 0), (0, width - H)))
    if ids_BS is not None:
        ids_BS = jnp.pad(ids_BS.astype(jnp.int32), ((0, 0), (0, -S % rows)), mode="edge")
    return _flash(pad(q_BSNH), pad(k_BSKH), pad(v_BSKH), ids_BS, 1 / math.sqrt(H), interpret)[:, :S, :, :H]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _flash(q_BSNH, k_BSKH, v_BSKH, ids_BS, scale, interpret):
    return _forward(q_BSNH, k_BSKH, v_BSKH, ids_BS, scale, interpret)[0]


def _forward(q_BSNH, k_BSKH, v_BSKH, ids_BS, scale, interpret):
    (B, S, N, H), K = q_BSNH.shape, k_BSKH.shape[2]
    cut = _cut("forward", S, H, ids_BS is not None)
    own, own_row, every = _by_queries(cut, S, H, N // K)
    outputs = _call(_forward_kernel, "forward", (q_BSNH, k_BSKH, v_BSKH), (N, B, S // cut.own), cut, [own, every, every],
                    [own, own_row], (q_BSNH, jax.ShapeDtypeStruct((B, N, S), jnp.float32)), ids_BS,
                    2 * S * S * H * N * B, scale, interpret)  # fmt: skip
    out_BSNH, lse_BNS = (checkpoint_name(x, "attention") for x in outputs)  # if saved, backward does not rerun forward
    return out_BSNH, (q_BSNH, k_BSKH, v_BSKH, ids_BS, out_BSNH, lse_BNS)


def _backward(scale, interpret, residuals, do_BSNH):
    q_BSNH, k_BSKH, v_BSKH, ids_BS, out_BSNH, lse_BNS = residuals
    (B, S, N, H), K = q_BSNH.shape, k_BSKH.shape[2]
    # the sum of p dp over a row equals the sum of out dout
    delta_BNS = jnp.einsum("bsnh,bsnh->bns", *(x.astype(jnp.float32) for x in (out_BSNH, do_BSNH)))
    inputs = q_BSNH, k_BSKH, v_BSKH, do_BSNH, lse_BNS, delta_BNS

    cut = _cut("dq", S, H, ids_BS is not None)
    own, own_row, every = _by_queries(cut, S, H, N // K)
    dq = _call(_dq_kernel, "dq", inputs, (N, B, S // cut.own), cut, [own, every, every, own, own_row, own_row], [own],
               (q_BSNH,), ids_BS, 3 * S * S * H * N * B, scale, interpret)  # fmt: skip

    cut = _cut("dkv", S, H, ids_BS is not None)
    own = pl.BlockSpec((None, cut.own, None, H), lambda k, b, j: (b, j, k, 0))
    every = pl.BlockSpec((None, S, N // K, H), lambda k, b, j: (b, 0, k, 0))
    every_row = pl.BlockSpec((None, N // K, S), lambda k, b, j: (b, k, 0))
    dkv = _call(_dkv_kernel, "dkv", inputs, (K, B, S // cut.own), cut, [every, own, own, every, every_row, every_row],
                [own, own], (k_BSKH, v_BSKH), ids_BS, 4 * S * S * H * N * B, scale, interpret)  # fmt: skip
    return *dq, *dkv, None


_flash.defvjp(_forward, _backward)


def _by_queries(cut: Tuning, S: int, H: int, group: int) -> tuple[pl.BlockSpec, ...]:
    """Returns block specs of program (n, b, i): its queries (last block first), a number per query, all keys of its head."""
    block = lambda i: S // cut.own - 1 - i
    return (
        pl.BlockSpec((None, cut.own, None, H), lambda n, b, i: (b, block(i), n, 0)),
        pl.BlockSpec((None, None, cut.own), lambda n, b, i: (b, n, block(i))),
        pl.BlockSpec((None, S, None, H), lambda n, b, i: (b, 0, n // group, 0)),
    )


def _call(kernel, name, arrays, grid, cut, in_specs, out_specs, outputs, ids_BS, flops, scale, interpret) -> list[jax.Array]:
    """Runs `kernel` on `arrays` and the segments (or None, None).

    Blocks of rows are the slowest axis of `grid`: concurrent programs have equally many blocks to visit, so no SM idles.
    """
    segments, specs = (None, None), [None, None]
    if ids_BS is not None:
        segments = ids_BS, _end(ids_BS, cut.own, cut.other, last=name == "dkv")
        specs = [pl.BlockSpec((None, *a.shape[1:]), lambda n, b, i, n_zeros=a.ndim - 1: (b, *(0,) * n_zeros)) for a in segments]
    return pl.pallas_call(
        partial(kernel, cut=cut, scale=scale, exp2=partial(_exp2, interpret=interpret)),
        grid=grid,
        in_specs=[*in_specs, *specs],
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=0),  # `plan` reads only flops
        interpret=interpret,
        name=f"attention_{name}",
    )(*arrays, *segments)


def _end(ids_BS: jax.Array, own: int, other: int, last: bool) -> jax.Array:
    """Returns, for each block of `own` rows, the first block of `other` rows that may share a segment with it: [B, S / own].

    With `last`, the one after the last such block. Blocks meet if their ranges of ids do: exact for consecutive documents;
    otherwise it may be too many blocks, never too few.
    """
    low, high = ([f(ids_BS.reshape(len(ids_BS), -1, n), -1) for n in (own, other)] for f in (jnp.min, jnp.max))
    meet_BIJ = (low[0][:, :, None] <= high[1][:, None, :]) & (low[1][:, None, :] <= high[0][:, :, None])
    if last:
        return jnp.int32(meet_BIJ.shape[2]) - jnp.argmax(meet_BIJ[:, :, ::-1], -1).astype(jnp.int32)
    return jnp.argmax(meet_BIJ, -1).astype(jnp.int32)


# -- the kernels -------------------------------------------------------------------------------------------------------
#
# O: rows of the block that a program keeps. T: rows of a block that its loop loads.


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def _scores(a_OH: jax.Array, b_TH: jax.Array, hidden_OT: jax.Array | None) -> jax.Array:
    """Returns the scores before scaling; `_exp2` applies the scale."""
    scores_OT = _dot(a_OH, b_TH, (1, 1))
    return scores_OT if hidden_OT is None else jnp.where(hidden_OT, HIDDEN, scores_OT)


def _exp2(x: jax.Array, scale: float, minus: jax.Array, interpret: bool) -> jax.Array:
    """Returns 2 ** (scale * x - minus) in two GPU instructions; a multiplication, a subtraction and XLA's exp2 take six.

    ex2.approx: relative error 2**-22, 0 for a denormal result (PTX ISA). From scale * x = 2**31 on `minus` is too coarse: inf.
    """
    minus = jnp.broadcast_to(minus, x.shape)
    if interpret:
        return jnp.exp2(x * scale - minus)
    factor, out = np.float32(scale).view(np.uint32), [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    asm = f"{{ .reg .f32 t; neg.f32 t, $2; fma.rn.f32 t, $1, 0f{factor:08X}, t; ex2.approx.ftz.f32 $0, t; }}"
    return plgpu.elementwise_inline_asm(asm, args=[x, minus], constraints="=f,f,f", pack=1, result_shape_dtypes=out)[0]


def _hidden(query, key, diagonal: bool, ids: tuple | None) -> jax.Array | None:
    """Returns which pairs are hidden, by positions and segments that broadcast; None if no pair is."""
    out = query < key if diagonal else None
    if ids is None:
        return out
    return ids[0] != ids[1] if out is None else out | (ids[0] != ids[1])


def _over_keys(k_ref, v_ref, ids_ref, end_ref, cut: Tuning, block: Callable, carry):
    """Runs `block(carry, k_TH, v_TH, hidden_OT)` over the blocks of keys that a program's queries may see, to the diagonal."""
    i = pl.num_programs(2) - 1 - pl.program_id(2)  # the longest programs first
    own = i * cut.own + jnp.arange(cut.own)
    ids_O = None if ids_ref is None else plgpu.load(ids_ref.at[pl.ds(i * cut.own, cut.own)])

    def step(j, carry, diagonal):
        at = pl.ds(j * cut.other, cut.other)
        k_TH, v_TH = plgpu.load(k_ref.at[at, :]), plgpu.load(v_ref.at[at, :])
        ids = None if ids_O is None else (ids_O[:, None], plgpu.load(ids_ref.at[at])[None, :])
        hidden_OT = _hidden(own[:, None], (j * cut.other + jnp.arange(cut.other))[None, :], diagonal, ids)
        return block(carry, k_TH, v_TH, hidden_OT)

    first = 0 if end_ref is None else plgpu.load(end_ref.at[i])
    carry = lax.fori_loop(first, i * cut.own // cut.other, partial(step, diagonal=False), carry)
    return lax.fori_loop(i * cut.own // cut.other, (i + 1) * cut.own // cut.other, partial(step, diagonal=True), carry)


def _forward_kernel(q_ref, k_ref, v_ref, ids_ref, end_ref, out_ref, lse_ref, *, cut, scale, exp2):
    q_OH = plgpu.load(q_ref)

    def block(carry, k_TH, v_TH, hidden_OT):
        out_OH, max_O, sum_O = carry
        scores_OT = _scores(q_OH, k_TH, hidden_OT)
        new_max_O = jnp.maximum(max_O, jnp.max(scores_OT, 1) * (scale * LOG2_E))
        shrink_O = exp2(max_O, 1.0, new_max_O)
        p_OT = exp2(scores_OT, scale * LOG2_E, new_max_O[:, None])
        out_OH = out_OH * shrink_O[:, None] + _dot(p_OT.astype(v_TH.dtype), v_TH, (1, 0))
        return out_OH, new_max_O, sum_O * shrink_O + jnp.sum(p_OT, 1)

    zeros = jnp.zeros(q_OH.shape, jnp.float32), jnp.full((cut.own,), HIDDEN, jnp.float32), jnp.zeros((cut.own,), jnp.float32)
    out_OH, max_O, sum_O = _over_keys(k_ref, v_ref, ids_ref, end_ref, cut, block, zeros)
    plgpu.store(out_ref, (out_OH / sum_O[:, None]).astype(out_ref.dtype))
    plgpu.store(lse_ref, max_O + jnp.log2(sum_O))


def _dq_kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ids_ref, end_ref, dq_ref, *, cut, scale, exp2):
    q_OH, do_OH, lse_O, delta_O = (plgpu.load(ref) for ref in (q_ref, do_ref, lse_ref, delta_ref))
    minus_delta_O = -delta_O  # added, not subtracted, so that the tensor core accumulates onto it

    def block(dq_OH, k_TH, v_TH, hidden_OT):
        p_OT = exp2(_scores(q_OH, k_TH, hidden_OT), scale * LOG2_E, lse_O[:, None])
        ds_OT = p_OT * (_dot(do_OH, v_TH, (1, 1)) + minus_delta_O[:, None])
        return dq_OH + _dot(ds_OT.astype(k_TH.dtype), k_TH, (1, 0))

    dq_OH = _over_keys(k_ref, v_ref, ids_ref, end_ref, cut, block, jnp.zeros(q_OH.shape, jnp.float32))
    plgpu.store(dq_ref, (dq_OH * scale).astype(dq_ref.dtype))


def _dkv_kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ids_ref, end_ref, dk_ref, dv_ref, *, cut, scale, exp2):
    j = pl.program_id(2)
    k_OH, v_OH = plgpu.load(k_ref), plgpu.load(v_ref)
    own = j * cut.own + jnp.arange(cut.own)
    ids_O = None if ids_ref is None else plgpu.load(ids_ref.at[pl.ds(j * cut.own, cut.own)])
    last = q_ref.shape[0] // cut.other if end_ref is None else plgpu.load(end_ref.at[j])

    def block(i, carry, g, diagonal):  # everything transposed: keys are rows
        dk_OH, dv_OH = carry
        at = pl.ds(i * cut.other, cut.other)
        q_TH, do_TH = plgpu.load(q_ref.at[at, g, :]), plgpu.load(do_ref.at[at, g, :])
        lse_T, delta_T = plgpu.load(lse_ref.at[g, at]), plgpu.load(delta_ref.at[g, at])
        ids = None if ids_O is None else (plgpu.load(ids_ref.at[at])[None, :], ids_O[:, None])
        hidden_OT = _hidden((i * cut.other + jnp.arange(cut.other))[None, :], own[:, None], diagonal, ids)
        p_OT = exp2(_scores(k_OH, q_TH, hidden_OT), scale * LOG2_E, lse_T[None, :])
        dv_OH += _dot(p_OT.astype(do_TH.dtype), do_TH, (1, 0))
        ds_OT = p_OT * (_dot(v_OH, do_TH, (1, 1)) - delta_T[None, :])
        return dk_OH + _dot(ds_OT.astype(q_TH.dtype), q_TH, (1, 0)), dv_OH

    def head(g, carry):  # one of the query heads that share this key head
        first = j * cut.own // cut.other
        carry = lax.fori_loop(first, (j + 1) * cut.own // cut.other, partial(block, g=g, diagonal=True), carry)
        return lax.fori_loop((j + 1) * cut.own // cut.other, last, partial(block, g=g, diagonal=False), carry)

    zeros = jnp.zeros(k_OH.shape, jnp.float32)
    dk_OH, dv_OH = lax.fori_loop(0, q_ref.shape[1], head, (zeros, zeros))
    plgpu.store(dk_ref, (dk_OH * scale).astype(dk_ref.dtype))
    plgpu.store(dv_ref, dv_OH.astype(dv_ref.dtype))
