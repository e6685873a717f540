"""Weights in 8 and 4 bits, and in bf16 on a CPU: how they are rounded, multiplied and looked up, and how much they take."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import FP32, GREEDY, ids, run, some_params

from tinyllama_jax.base import config as c
from tinyllama_jax.base import dims
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import model
from tinyllama_jax.inference import weights
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.quantize import Int4, Int8, int4, int8, lookup, matmul

CFG = c.Model(2, 64, 4, 2, 96, 53, 64, precision=FP32, residual="float32")
KINDS = {"float32": lambda w: w, "bfloat16": lambda w: w.astype(jnp.bfloat16), "int8": int8, "int4": int4}


def some(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def value(w) -> np.ndarray:
    """The matrix that quantised weights stand for, by their definition."""
    if isinstance(w, Int8):
        return np.asarray(w.q_IO, np.float32) * np.asarray(w.scale_O)
    if isinstance(w, Int4):
        q, scale = np.asarray(w.q_GJO), np.asarray(w.scale_GO, np.float32)
        columns = [[(q[i // 32, i % 16] >> 4 * (i % 32 // 16)) & 15] for i in range(32 * len(q))]
        return (np.concatenate(columns).astype(np.float32) - 8) * np.repeat(scale, 32, axis=0)
    return np.asarray(w, np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [256, 96, 40])  # two blocks of 128 on a CPU; three of 32; none
def test_a_product_is_that_of_the_rounded_weights(kind, inputs):
    if kind == "int4" and inputs % 32:
        pytest.skip("4 bits need groups of 32")
    x, w = some(3, 5, inputs, seed=1), KINDS[kind](some(inputs, 9))
    want = np.asarray(x, np.float64) @ value(w)
    np.testing.assert_allclose(jax.jit(matmul)(x, w), want, rtol=0, atol=2e-4)
    assert matmul(x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16


def test_rounding_errors_are_within_half_a_step():
    w = some(64, 7)
    eight, four = int8(w), int4(w)
    assert (np.abs(value(eight) - w) <= np.asarray(eight.scale_O) * 0.501).all()
    step = np.repeat(np.abs(np.asarray(four.scale_GO, np.float32)), 32, axis=0)
    assert (np.abs(value(four) - w) <= step * 1.01).all()  # the far end of the range has 7 steps, the other 8
    assert np.mean(np.abs(value(four) - w) <= step * 0.505) > 0.9
    zero = jnp.zeros((32, 2))
    assert not value(int8(zero)).any() and not value(int4(zero)).any()


def test_four_bits_are_q4_0_of_gguf():
    gguf = pytest.importorskip("gguf", reason="the reference is the package gguf")
    w = np.asarray(some(96, 11))
    raw = gguf.quants.quantize(np.ascontiguousarray(w.T), gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(value(int4(w)).T, gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_0))
    again = int4(jnp.asarray(value(int4(w))))  # what a Q4_0 file holds stays as it is
    np.testing.assert_array_equal(value(again), value(int4(w)))


@pytest.mark.parametrize("kind", KINDS)
def test_lookup_gives_rows_of_the_rounded_table(kind):
    table, tokens = some(53, 64), jnp.asarray([[1, 52], [0, 7]])
    placed = KINDS[kind](table.T) if kind.startswith("int") else KINDS[kind](table)
    rows = value(placed).T if kind.startswith("int") else value(placed)
    np.testing.assert_allclose(lookup(placed, tokens, jnp.float32), rows[np.asarray(tokens)], rtol=1e-6)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_a_model_computes_with_the_rounded_weights(kind):
    """The engine's answer and log-probabilities are those of the trainer's model with the weights rounded."""
    params, mesh = some_params(CFG), weights.make_mesh(CFG)
    placed = weights.place(weights._unstacked(jax.tree.map(np.asarray, params)), CFG, mesh, kind)
    flat = {}
    for p in dims.PARAMETERS:
        name = p.name.split("/")[-2]
        table = {"embed": placed.embed_VD, "final_norm": placed.final_norm_D, "lm_head": placed.head_DV}
        layers = [layer[name] for layer in placed.layers] if p.dims.startswith("L") else [table[name]]
        values = [
            value(w.view(jnp.bfloat16) if w.dtype == jnp.uint16 else w) if isinstance(w, jax.Array) else value(w)
            for w in layers
        ]
        values = [v.T if name == "embed" and kind.startswith("int") else v for v in values]
        flat[p.name] = jnp.asarray(np.stack(values) if p.dims.startswith("L") else values[0]).reshape(dims.shape(p, CFG))
    rounded = model.unflatten(flat)
    (request,) = run(Engine(weights.Loaded(placed, CFG, None, False, None, mesh)), Request(ids(9), 30, GREEDY))
    everything = request.prompt + request.tokens
    logits = jax.nn.log_softmax(model.logits(rounded, jnp.asarray([everything]), CFG)[0])
    assert logits[8:-1].argmax(1).tolist() == request.tokens
    np.testing.assert_allclose(request.logprobs, logits[np.arange(8, 38), request.tokens], atol=1e-4)
    exact = jax.nn.log_softmax(model.logits(params, jnp.asarray([everything]), CFG)[0])
    assert np.abs(exact - logits).max() > 1e-3  # they are rounded


def test_the_original_takes_637_MB_in_4_bits_and_this_no_more_than_640():
    cfg = c.Model(22, 2048, 32, 4, 5632, 32_000, 2048)
    total = 0
    for p in dims.PARAMETERS:
        n = dims.n_elements(p, cfg)
        shape = jax.eval_shape(int4, jax.ShapeDtypeStruct((32, n // 32), jnp.float32)) if p.kind != "norm" else None
        total += sum(a.size * a.dtype.itemsize for a in shape) if shape else 4 * n
    assert 600e6 < total <= 640e6


def test_groups_that_do_not_fit_are_refused():
    odd = dataclasses.replace(CFG, d_ff=40)
    arrays = weights._unstacked(jax.tree.map(np.asarray, some_params(odd)))
    with pytest.raises(UserError, match="--weights int4: layers/down/kernel has 40 inputs.*groups of 32; use --weights int8"):
        weights.place(arrays, odd, weights.make_mesh(odd), "int4")
