"""Attention against its definition in float64, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tinyllama_jax.config import UserError
from tinyllama_jax.kernels import attention

QUERY_BLOCK = 8
CASES = {  # name: (B, S, T, N, K, H, start)
    "one block": (2, 8, 8, 4, 4, 6, 0),
    "whole blocks": (2, 24, 24, 6, 2, 4, 0),
    "one query head a key head (K = N)": (2, 16, 16, 3, 3, 4, 0),
    "one key head (K = 1)": (1, 17, 17, 4, 1, 8, 0),
    "a last block of one": (2, 25, 25, 4, 2, 2, 0),
    "one token after eleven": (2, 1, 20, 4, 2, 4, 11),
    "a chunk after five": (1, 19, 30, 4, 1, 4, 5),
    "the end of a full cache": (1, 3, 12, 2, 2, 4, 9),
}
IMPLEMENTATIONS = ("reference", "xla")  # "cudnn" needs a GPU


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", QUERY_BLOCK)


def inputs(case, dtype=np.float32, scale=1.0):
    B, S, T, N, K, H, start = CASES[case]
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) * scale for shape in ((B, S, N, H), (B, T, K, H), (B, T, K, H), (B, S, N, H))]
    return [jnp.asarray(a, dtype) for a in arrays], start


def float64(q, k, v, cotangent, start):
    """Output and the gradients of q, k, v, from the textbook formulas, one head at a time."""
    q, k, v, cotangent = (np.asarray(a, np.float64) for a in (q, k, v, cotangent))
    B, S, N, H = q.shape
    T, K = k.shape[1:3]
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    hidden = np.arange(T)[None, :] > start + np.arange(S)[:, None]
    for b in range(B):
        for n in range(N):
            j = n * K // N  # the first N / K query heads use key head 0, ...
            scores = np.where(hidden, -np.inf, q[b, :, n] @ k[b, :, j].T / np.sqrt(H))
            p = np.exp(scores - scores.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            out[b, :, n] = p @ v[b, :, j]
            dp = cotangent[b, :, n] @ v[b, :, j].T
            dscores = p * (dp - (dp * p).sum(1, keepdims=True)) / np.sqrt(H)
            dq[b, :, n] = dscores @ k[b, :, j]
            dk[b, :, j] += dscores.T @ q[b, :, n]
            dv[b, :, j] += p.T @ cotangent[b, :, n]
    return out, dq, dk, dv


@partial(jax.jit, static_argnames=("impl", "start"))
def ours(impl, q, k, v, cotangent, start):
    out, vjp = jax.vjp(lambda q, k, v: attention.attention(q, k, v, impl=impl, start=start), q, k, v)
    return out, *vjp(cotangent)


def agree(got, want, tolerance):
    for name, a, b in zip(("output", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=tolerance * np.abs(b).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_fp32(case, impl):
    arrays, start = inputs(case)
    agree(ours(impl, *arrays, start), float64(*arrays, start), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["a last block of one", "a chunk after five"])
def test_half_precision(case, impl, dtype, tolerance):
    arrays, start = inputs(case, dtype)
    got = ours(impl, *arrays, start)
    assert {a.dtype for a in got} == {jnp.dtype(dtype)}
    agree(got, float64(*arrays, start), tolerance)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scores_of_bf16_inputs_are_fp32(impl):
    """Products of 400 and 401 (scores 200 and 200.5) differ in fp32; in bf16 both are 400: weights 0.378 and 0.622, or 1/2."""
    q = jnp.full((1, 1, 1, 4), 1.0, jnp.bfloat16)
    k = jnp.asarray([[100.0, 100, 100, 100], [100, 100, 100, 101]], jnp.bfloat16)[None, :, None]
    v = jnp.asarray([[0.0] * 4, [1.0] * 4], jnp.bfloat16)[None, :, None]
    out = attention.attention(q, k, v, impl=impl, start=1)
    np.testing.assert_allclose(np.asarray(out, np.float32), 1 / (1 + np.exp(-0.5)), atol=4e-3)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_traced_start_is_the_same(impl):
    (q, k, v, _), start = inputs("a chunk after five")
    jitted = jax.jit(lambda start: attention.attention(q, k, v, impl=impl, start=start))
    np.testing.assert_allclose(
        jitted(jnp.int32(start)), attention.attention(q, k, v, impl=impl, start=start), atol=1e-6, rtol=0
    )


def sizes(jaxpr):
    """Number of elements of every array that a jaxpr or one within it computes."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


def test_xla_never_holds_all_scores():
    (q, *_), _ = arrays, start = inputs("whole blocks")
    B, S, N, _ = q.shape
    largest = {impl: max(sizes(jax.make_jaxpr(partial(ours, impl, start=start))(*arrays).jaxpr)) for impl in IMPLEMENTATIONS}
    assert largest == {"reference": B * N * S * S, "xla": B * N * QUERY_BLOCK * S}  # of the first: the check can see it


def test_choose_says_what_runs_and_why():
    assert attention.choose("auto", "bfloat16") == ("xla", "no fused kernel here for bfloat16 on the backend cpu")
    assert attention.choose("reference", "float32") == ("reference", "asked for")
    with pytest.raises(UserError, match=r"--model.attention=cudnn: needs bf16 or fp16 on an NVIDIA GPU .* on the backend cpu"):
        attention.choose("cudnn", "bfloat16")
