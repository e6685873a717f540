"""Holds this repository to docs/errata.md: each test checks our own code or configs against the right value."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tinyllama_jax.base import cli, dims
from tinyllama_jax.base import config as c
from tinyllama_jax.core import model, optim
from tinyllama_jax.core.losses import Batch
from tinyllama_jax.core.step import gradients, new_state, train_step
from tinyllama_jax.planning import laws

ROOT = Path(__file__).parents[1]


def read(name: str) -> c.Config:
    """Returns a config of configs/."""
    return cli.read(str(ROOT / "configs" / name))


def abstract_state_and_batch(config: c.Config):
    """Returns shapes and dtypes of a train state, and of a batch of two micro-batches of one sequence."""
    state = jax.eval_shape(lambda: new_state(model.init(jax.random.key(0), config.model), config))
    tokens = jax.ShapeDtypeStruct((2, 1, config.model.seq_len + 1), jnp.uint16)
    source = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    return state, Batch(tokens, jax.ShapeDtypeStruct((2, 1), jnp.int32), source)


def test_every_row_names_a_test_of_this_file():
    rows = (ROOT / "docs" / "errata.md").read_text().splitlines()
    named = [re.findall(r"`(test_\w+)`", row)[-1] for row in rows if row.startswith('| "')]
    assert len(named) == 8 and all(callable(globals().get(name)) for name in named)


def test_shape():
    m = read("3t.py").model
    assert (m.n_layers, m.n_heads, m.n_kv_heads, m.d_head, m.d_model, m.d_ff) == (22, 32, 4, 64, 2_048, 5_632)
    assert dims.n_parameters(m) == 1_100_048_384


def test_architecture():
    config = read("3t.py")
    state, _ = abstract_state_and_batch(config)
    shapes = {name: leaf.shape for name, leaf in model.flatten(state.params).items()}
    assert {"layers/gate/kernel", "layers/up/kernel", "lm_head/kernel", "embed/embedding"} <= shapes.keys()  # SwiGLU, untied
    assert not any("bias" in name or "position" in name for name in shapes)
    assert config.model.vocab_size == 32_000


def test_no_dropout():
    assert not any("dropout" in key for key in c.keys())
    config = read("demo.py")
    step = jax.make_jaxpr(lambda state, batch: train_step(state, batch, config))(*abstract_state_and_batch(config))
    assert not re.search(r"\brandom_bits\b|\bthreefry", str(step)), "the train step draws random numbers"


def test_precision():
    config = read("3t.py")
    state, batch = abstract_state_and_batch(config)
    (_, grads) = jax.eval_shape(lambda state, batch: gradients(state, batch, config), state, batch)
    floats = [leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state, grads)) if leaf.ndim]
    assert set(floats) == {jnp.dtype("float32")}  # parameters, moments, gradients summed over micro-batches
    tokens = jax.ShapeDtypeStruct((1, config.model.seq_len), jnp.int32)
    assert jax.eval_shape(lambda p, t: model.hidden(p, t, config.model), state.params, tokens).dtype == jnp.bfloat16


def test_schedule_ends_at_its_floor():
    config = read("3t.py")
    lr = optim.schedule(config.optim, config.train)
    assert float(lr(config.train.steps)) == pytest.approx(4e-5, rel=1e-6)
    assert float(lr(config.train.steps * 99 // 100)) > 4e-5
    cooled = read("v1_1.py")  # by larger batches on the same cosine
    (_, _, before), (_, at, after) = cooled.train.stages
    assert after == 4 * before and at == pytest.approx(1.85e12, rel=1e-6) and cooled.optim == config.optim


def test_chinchilla():
    budgets = 1e20, 1e22
    small, large = (laws.compute_optimal(laws.LAWS["hoffmann"], flops) for flops in budgets)
    # how parameters grow with tokens: about as their first power, not as their square root
    exponent = math.log(large.size / small.size) / math.log(large.tokens / small.tokens)
    assert 0.8 < exponent < 1.2
    config = read("chinchilla.py")
    assert config.train.tokens / dims.n_parameters(config.model) == pytest.approx(20, abs=0.05)


def test_tokens_at_the_released_steps():
    config = read("3t.py")
    assert config.train.tokens_after(480_000) == pytest.approx(1.007e12, rel=1e-3)
    assert 480_000 / config.train.steps == pytest.approx(0.336, abs=0.001)
    assert 480_000 in config.checkpoint.kept and config.train.tokens == pytest.approx(3e12, rel=1e-4)
    assert config.train.steps * 3 // 10 // 1_000 == 429


def test_mfu():
    percent = {k: round(24_000 * f / 312e12 * 100, 1) for k, f in dims.flops_per_token(read("3t.py").model).items()}
    assert percent == {"palm": 59.3, "matmul": 56.3, "palm_causal": 55.0, "matmul_causal": 52.0}
