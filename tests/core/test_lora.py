"""Adapters: a step against one written out by hand, what is frozen, what is kept in memory, and wrong settings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.base import cli, dims, sharding
from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import lora, model
from tinyllama_jax.core.losses import Batch, NextToken
from tinyllama_jax.core.program import build, shape_of_batch

MODEL = c.Model(2, 64, 4, 2, 128, 104, 16, precision="params=float32,compute=float32,output=float32", residual="float32")
CONFIG = c.Config("x", MODEL, c.Data({"x": 1}), c.Optim(1e-2, 1e-2, 0, 0.1, 0.5), c.Train(9, 8 * 16, 2), c.Checkpoint(1),
                  mesh=c.Mesh(2, 2, 2), lora=c.Lora(4, 8.0))  # fmt: skip
PLAIN = dataclasses.replace(CONFIG, lora=c.Lora())


def with_(config=CONFIG, **changes):
    return cli.override(config, {key.replace("__", "."): str(value) for key, value in changes.items()})


def batches(config, n=3):
    rng, (A, B) = np.random.default_rng(0), (config.accumulation(4 if config.mesh.data == 2 else 1)[0], 8)
    length = np.full((A, B // A), 17, np.int32)
    length[0, 0] = 9
    return [Batch(rng.integers(0, 104, (A, B // A, 17)).astype(np.uint16), length) for _ in range(n)]


def weights():
    return jax.tree.map(lambda w: 3 * w, model.init(jax.random.key(7), MODEL))


@functools.cache
def trained_as(text):
    """(the parameters before, the parameters after 3 steps, the metrics of each step, the moments)."""
    config = c.from_json(text)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[: 8 if config.mesh.data == 2 else 1])
    history = []
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        state = program.start(jax.device_put(weights(), jax.tree.map(lambda a: a.sharding, program.weights)))
        before = jax.device_get(state.params)
        for batch in batches(config):
            state, metrics = program.train(state, Batch(*map(jax.device_put, batch, program.batch)))
            history.append(jax.device_get(metrics))
    return before, jax.device_get(state.params), history, jax.device_get(state.opt_state[0])


def trained(config):
    return trained_as(c.to_json(config))


def by_hand(before, config):
    """The same steps: autodiff through the model without adapters, whose matrices are W + scale x A B, then AdamW in numpy."""
    frozen = lora.merge(zeroed(before), MODEL, config.lora)
    flat = {name: np.array(a) for name, a in model.flatten(lora.split(before)[0]).items()}
    m, v = ({name: np.zeros_like(a) for name, a in flat.items()} for _ in range(2))
    einsums = {"q": "ldr,lrnh->ldnh", "k": "ldr,lrkh->ldkh", "v": "ldr,lrkh->ldkh", "o": "lnhr,lrd->lnhd",
               "gate": "ldr,lrf->ldf", "up": "ldr,lrf->ldf", "down": "lfr,lrd->lfd"}  # fmt: skip
    plain, losses = dataclasses.replace(PLAIN, train=config.train, mesh=config.mesh), []

    def loss(flat, batch):
        layers = dict(frozen["layers"])
        for name in config.lora.names:
            product = jnp.einsum(einsums[name], flat[f"layers/{name}/lora_a"], flat[f"layers/{name}/lora_b"])
            layers[name] = {"kernel": layers[name]["kernel"] + config.lora.alpha / config.lora.rank * product}
        whole = Batch(batch.tokens.reshape(-1, 17), batch.length.ravel())
        return NextToken().sums(frozen | {"layers": layers}, whole, plain).loss / NextToken().predicted(whole, plain).sum()

    differentiate = jax.jit(jax.value_and_grad(loss))
    for t, batch in enumerate(batches(config), 1):
        value, grads = jax.device_get(differentiate(flat, batch))
        losses.append(float(value))
        norm = np.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        for name, g in grads.items():
            g = g * min(1, config.optim.clip_norm / (norm + 1e-6))
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.95 * v[name] + 0.05 * g**2
            step = (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8) + 0.1 * flat[name]
            flat[name] = flat[name] - 1e-2 * step
    return flat, losses


def zeroed(params):
    """The parameters with adapters whose product is 0."""
    out, others = lora.split(params)
    return lora.join(jax.tree.map(jnp.zeros_like, out), others)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora__base": "nf4", "model__remat": "save_matmuls"},
        {"lora__base": "bfloat16", "lora__targets": "v,q", "model__remat": "full", "mesh__data": 1, "mesh__fsdp": 1,
         "mesh__tensor": 1},
        {"lora__base": "nf4", "lora__targets": "down", "train__seqs_per_device": 1, "optim__decay": "matrices"},
    ],
    ids=str,
)  # fmt: skip
def test_steps_are_those_by_hand_and_the_base_stays_bit_for_bit(changes):
    """With weight decay, clipping and padding; on a mesh and alone, in one micro-batch and several, with remat and without."""
    config = with_(**changes)
    before, after, history, moments = trained(config)
    flat, losses = by_hand(before, config)
    assert [float(row["loss"]) for row in history] == pytest.approx(losses, rel=1e-5)
    ours, kept = model.flatten(after), model.flatten(before)
    assert {name for name in ours if "lora" in name} == set(flat)
    assert {name.split("/")[1] for name in flat} == set(config.lora.names)
    for name, array in ours.items():
        if "lora" in name:
            moved = np.linalg.norm(flat[name] - kept[name])  # Adam divides by its moments: a tiny gradient's rounding is large
            assert np.linalg.norm(array - flat[name]) < 0.01 * moved, name
            assert np.abs(array - kept[name]).max() > 1e-3
        else:
            np.testing.assert_array_equal(array.view(np.uint8), kept[name].view(np.uint8), err_msg=name)
    assert set(model.flatten(moments.mu)) == set(model.flatten(moments.nu)) == set(flat)


def test_adapters_begin_as_in_peft_and_change_nothing():
    before, _, history, _ = trained(CONFIG)
    for name, a in model.flatten(lora.split(before)[0]).items():
        inputs = dims.matrix(dims.BY_NAME[name.rpartition("/")[0] + "/kernel"], MODEL)[0]
        if name.endswith("lora_b"):
            assert not a.any()
        else:  # uniform in +-1/sqrt(inputs)
            assert inputs**-0.5 * 0.9 < np.abs(a).max() <= inputs**-0.5
            assert a.std() == pytest.approx((3 * inputs) ** -0.5, rel=0.15) and abs(a.mean()) < 0.1 * inputs**-0.5
    assert not np.array_equal(before["layers"]["gate"]["lora_a"], before["layers"]["up"]["lora_a"])
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(lora.merge(before, MODEL, CONFIG.lora)), jax.device_get(weights())
    )
    assert history[0]["loss"] == pytest.approx(trained(PLAIN)[2][0]["loss"], rel=1e-6)


@pytest.mark.parametrize("base", ["", "nf4"])
def test_merged_weights_give_the_same_losses(base):
    """In the model without adapters, whose matrices are W + scale x A B."""
    config = with_(lora__base=base, **({"model__remat": "save_matmuls"} if base else {}))
    _, after, _, _ = trained(config)
    merged = jax.device_get(lora.merge(after, MODEL, config.lora))
    assert {name: a.shape for name, a in model.flatten(merged).items()} == {
        p.name: dims.shape(p, MODEL) for p in dims.PARAMETERS
    }
    batch = jax.tree.map(lambda a: a[0], batches(config, 1)[0])
    with jax.set_mesh(sharding.make_mesh(c.Mesh(), jax.devices()[:1])):
        ours, plain = (NextToken().token_losses(p, batch, of) for p, of in ((after, config), (merged, PLAIN)))
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)
    base_only = NextToken().token_losses(zeroed(after), batch, config)
    assert np.abs(np.asarray(base_only) - np.asarray(ours)).max() > 0.01


def test_a_step_that_is_not_finite_changes_nothing():
    """All-finite looks at the adapters: a base weight that is infinite makes their gradients so."""
    mesh = sharding.make_mesh(CONFIG.mesh)
    with jax.set_mesh(mesh):
        program = build(CONFIG, mesh)
        ruined = weights()
        ruined["layers"]["q"]["kernel"] = ruined["layers"]["q"]["kernel"].at[0, 0].set(jnp.inf)
        state = program.start(jax.device_put(ruined, jax.tree.map(lambda a: a.sharding, program.weights)))
        before = jax.device_get(state.params)
        state, metrics = program.train(state, Batch(*map(jax.device_put, batches(CONFIG, 1)[0], program.batch)))
    assert not metrics["finite"] and metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))


def test_the_compiled_step_holds_no_gradient_and_no_moment_of_the_base():
    """The 4-bit base of 1.6 million weights is neither in memory whole in fp32 nor in bf16."""
    config = with_(lora__base="nf4", model__d_model=256, model__d_ff=512, model__n_layers=4, mesh__data=1, mesh__fsdp=1,
                   mesh__tensor=1, train__tokens_per_step=16, train__seqs_per_device=1)  # fmt: skip
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        compiled = program.train.lower(program.state, shape_of_batch(program, 16)).compile()
    size = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    stats, n = compiled.memory_analysis(), sum(dims.n_elements(p, config.model) for p in dims.PARAMETERS if p.dims[0] == "L")
    adapters = size(lora.split(program.state.params)[0])
    assert size(program.state.opt_state) == 2 * adapters + 4
    assert stats.argument_size_in_bytes < 0.6 * n + 3 * adapters + 2 * 2 * 104 * 256 + 50_000
    assert stats.temp_size_in_bytes < 2 * n  # a layer's matrices, a quarter, are expanded at a time, in fp32 on a CPU


def test_without_adapters_the_state_is_as_ever():
    mesh = sharding.make_mesh(c.Mesh())
    program = build(with_(PLAIN, mesh__data=1, mesh__fsdp=-1, mesh__tensor=1, train__seqs_per_device=1), mesh)
    assert set(model.flatten(program.state.params)) == {p.name for p in dims.PARAMETERS}
    assert jax.tree.map(str, program.weights) == jax.tree.map(str, program.state.params)
    assert lora.split(program.state.params) == (program.state.params, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora__targets": "q,gate_proj"}, "--lora.targets=gate_proj: must be one of q, k, v, .* did you mean gate"),
        ({"lora__targets": ""}, "--lora.targets=: must be one of q, k"),
        ({"lora__targets": "q,k,q"}, "--lora.targets=q,k,q: names a matrix twice"),
        ({"lora__rank": 0, "lora__base": "nf4"}, "--lora.base=nf4: needs adapters: add --lora.rank=16"),
        ({"lora__rank": 0}, "--lora.rank=0: does not go with the config's lora.alpha=8.0: needs adapters"),
        ({"lora__rank": -1}, "--lora.rank=-1: must be at least 0"),
        ({"lora__alpha": 0}, "--lora.alpha=0: must be at least 1e-30"),
        ({"lora__base": "int4"}, "--lora.base=int4: must be bfloat16, nf4, or empty"),
        (
            {"lora__base": "nf4", "model__d_ff": 96},
            "--model.d_ff=96: 96 inputs are not whole blocks of 64, which --lora.base=nf4 needs",
        ),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        with_(**changes)
