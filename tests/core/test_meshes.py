"""The same loss and the same gradients whatever the mesh, and the optimizer's state lying where its parameter lies."""

import dataclasses
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import pytest

from tinyllama_jax.base import config as c
from tinyllama_jax.base import sharding
from tinyllama_jax.core import model, step
from tinyllama_jax.core.losses import Batch, NextToken
from tinyllama_jax.core.program import build
from tinyllama_jax.kernels import attention

FP32 = "params=float32,compute=float32,output=float32"
# every dimension that is split divides by 8 (fsdp) or 4 (tensor); 32 sequences in 2 micro-batches, the loss in chunks
MODEL = c.Model(2, 64, 8, 4, 96, 104, 16, precision=FP32, residual="float32", loss_chunk=8)


def gradients(mesh: tuple[int, int, int], model_config: c.Model = MODEL, eos_id: int | None = None) -> dict[str, np.ndarray]:
    """Loss and gradients of one step by (data, fsdp, tensor) on as many of the devices here."""
    data, fsdp, _ = mesh
    train = c.Train(10, 32 * MODEL.seq_len, 16 // (data * fsdp))
    config = c.Config(
        "x", model_config, c.Data({"x": 1}, document_mask=eos_id is not None), c.Optim(1e-3, 1e-4, 2, 0.1, 1.0), train,
        c.Checkpoint(1), c.Mesh(*mesh)
    )  # fmt: skip
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 104, (2, 16, 17)).astype(np.uint16)
    tokens[..., ::3] = 7  # a token that every device meets many times
    batch = Batch(tokens, rng.integers(2, 18, (2, 16)).astype(np.int32))
    devices = sharding.make_mesh(config.mesh, jax.devices()[: int(np.prod(mesh))])
    with jax.set_mesh(devices):
        program = build(config, devices)
        assert program.shape == (2, 16)
        where = jax.tree.map(lambda leaf: leaf.sharding, program.state)
        f = jax.jit(lambda s, b: step.gradients(s, b, config, NextToken(eos_id)), in_shardings=(where, program.batch))
        state = program.init()
        sums, grads = f(state, batch)
    return {k: np.asarray(v) for k, v in {"loss": sums.loss, **model.flatten(grads)}.items()}


@cache
def on_one_device() -> dict[str, np.ndarray]:
    return gradients((1, 1, 1))


def assert_same(got: dict[str, np.ndarray]) -> None:
    assert got.keys() == on_one_device().keys()
    for name, want in on_one_device().items():
        error = np.linalg.norm(got[name] - want) / np.linalg.norm(want)
        assert error < 2e-6, (name, error)  # fp32 has 6e-8; a sum over 8 devices in another order


def test_what_the_others_are_compared_with_is_not_nothing():
    assert all(np.linalg.norm(v) > 1e-4 for v in on_one_device().values())


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 4, 1), (8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_loss_and_gradients_are_those_of_one_device(mesh):
    assert_same(gradients(mesh))


@pytest.mark.parametrize("remat", ["none", "save_matmuls_and_attention"])
def test_a_kernel_runs_on_each_devices_part(remat, monkeypatch):
    """No compiler splits a kernel: heads over tensor, sequences over data and fsdp, documents along with them."""
    interpreted = partial(attention.attention, interpret=True)
    monkeypatch.setattr(attention, "attention", lambda *a, impl, **k: interpreted(*a, impl="pallas_triton", **k))
    monkeypatch.setattr(attention, "choose", lambda *_, **__: ("pallas_triton", "for the test"))
    cfg = dataclasses.replace(MODEL, attention="pallas_triton", remat=remat)
    assert_same(gradients((2, 2, 2), cfg))
    within = gradients((2, 2, 2), cfg, eos_id=7)
    assert abs(within["loss"] - on_one_device()["loss"]) > 1e-3  # 7 is every third token
    monkeypatch.undo()
    for name, want in gradients((1, 1, 1), MODEL, eos_id=7).items():
        assert np.linalg.norm(within[name] - want) / np.linalg.norm(want) < 2e-6, name


@pytest.mark.parametrize("mesh", [(2, 8, 1)])
def test_loss_and_gradients_on_16_devices(mesh, tmp_path):
    code = f"import numpy, test_meshes; numpy.savez({str(tmp_path / 'got.npz')!r}, **test_meshes.gradients({mesh}))"
    env = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=16",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)]),
    }
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    with np.load(tmp_path / "got.npz") as got:
        assert_same(dict(got))


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2)])
def test_the_optimizers_state_lies_where_its_parameter_lies(mesh):
    config = c.Config(
        "x", MODEL, c.Data({"x": 1}), c.Optim(1e-3, 1e-4, 2, 0.1, 1.0), c.Train(10, 256, 1), c.Checkpoint(1), c.Mesh(*mesh)
    )
    devices = sharding.make_mesh(config.mesh)
    with jax.set_mesh(devices):
        program = build(config, devices)
        A, B = program.shape
        state, _ = program.train(program.init(), Batch(np.ones((A, B, 17), np.uint16), np.full((A, B), 17, np.int32)))
    table, adam = sharding.parameter_shardings(devices, MODEL), state.opt_state[0]
    for tree in (state.params, adam.mu, adam.nu):
        for name, leaf in model.flatten(tree).items():
            assert leaf.sharding.is_equivalent_to(table[name], leaf.ndim), name
            parts = [devices.shape[axis] for axis in table[name].spec if axis]
            assert leaf.addressable_shards[0].data.size == leaf.size // np.prod(parts), name


def test_a_reduction_in_bfloat16_is_close_and_not_the_same():
    want, got = on_one_device(), gradients((2, 4, 1), dataclasses.replace(MODEL, reduce_dtype="bfloat16"))
    for name in want:
        error = np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name])
        if name == "loss" or name.endswith("scale"):  # sums of vectors stay in fp32: they cost nothing
            assert error < 2e-6, (name, error)
        else:
            assert 1e-4 < error < 1e-2, (name, error)
