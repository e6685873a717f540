"""XLA's settings: what they are on each platform, that the user's own win, and that they are said."""

import dataclasses
import os
import types

import jax
import numpy as np
import pytest

from tinyllama_jax.base import cli, sharding
from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import xla
from tinyllama_jax.core.program import build, shape_of_batch

assert len(jax.devices()) == 8  # asked for here, before a test takes XLA_FLAGS out of the environment


PIPELINED = (
    {"xla_gpu_pipeline_all_reduce": "COLLECTIVE_PIPELINING_MODE_ON"}
    if jax.__version_info__ >= (0, 11, 1)
    else {"xla_gpu_enable_pipelined_all_reduce": True}
)


def mesh_of(platform, tensor=1):
    """What `xla` asks of a mesh of devices that are not here."""
    return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]), shape={"tensor": tensor})


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", *xla.MEMORY_NAMES):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config():
    return cli.read("configs/3t.py")


def test_a_gpus_options_are_sized_to_a_layer(config):
    options = xla.compiler_options(config, mesh_of("gpu"))
    layer = 44_044_288  # 2 x 2,048 x 2,048 + 2 x 2,048 x 256 + 3 x 2,048 x 5,632 + 2 norms of 2,048
    assert options == {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        **PIPELINED,
        "xla_gpu_all_gather_combine_threshold_bytes": int(0.55 * 2 * layer),  # bf16; two of three MLP matrices are 46 MB
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 4 * layer,
        "xla_gpu_all_reduce_combine_threshold_bytes": 4 * layer,
        "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
    }
    assert all(option.reason for option in xla.options(config, mesh_of("gpu")))
    half = xla.compiler_options(cli.override(config, {"model.reduce_dtype": "bfloat16"}), mesh_of("gpu", tensor=2))
    assert half["xla_gpu_all_reduce_combine_threshold_bytes"] == layer
    assert half["xla_gpu_all_gather_combine_threshold_bytes"] == pytest.approx(0.55 * layer, abs=1)


def test_this_xla_knows_every_option(config):
    """A CPU's compiler rejects an unknown name or value of a GPU's option too."""
    deterministic = cli.override(config, {"train.deterministic": "true"})
    options = xla.compiler_options(deterministic, mesh_of("gpu"))
    assert len(options) == 7
    jax.jit(lambda: 1).lower().compile(compiler_options=options)
    for name, value in (("xla_gpu_no_such_option", True), (next(iter(PIPELINED)), "maybe")):
        with pytest.raises(jax.errors.JaxRuntimeError, match=name):
            jax.jit(lambda: 1).lower().compile(compiler_options={name: value})


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_elsewhere_there_are_none(config, platform):
    deterministic = cli.override(config, {"train.deterministic": "true"})
    assert xla.compiler_options(deterministic, mesh_of(platform)) == {}
    assert xla.lines(config, mesh_of(platform))[0].startswith("xla: no options of ours, compiled programs ")


def test_deterministic_is_an_option_of_every_program(config, monkeypatch, tiny_config):
    assert "xla_gpu_deterministic_ops" not in xla.compiler_options(config, mesh_of("gpu"))
    config = cli.override(config, {"train.deterministic": "true"})
    assert xla.compiler_options(config, mesh_of("gpu"))["xla_gpu_deterministic_ops"] is True
    # what any option does, by one that a CPU has
    monkeypatch.setattr(xla, "compiler_options", lambda config, mesh: {"xla_no_such_option": True})
    mesh = sharding.make_mesh(tiny_config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = build(tiny_config, mesh)
        micro = jax.eval_shape(lambda b: jax.tree.map(lambda x: x[0], b), shape_of_batch(program, tiny_config.model.seq_len))
        arguments = {
            "init": (),
            "start": (program.state.params,),
            "train": (program.state, shape_of_batch(program, tiny_config.model.seq_len)),
            "evaluate": (program.state.params, micro),
            "token_losses": (program.state.params, micro),
        }
        for name, given in arguments.items():
            with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_no_such_option'"):
                getattr(program, name).lower(*given).compile()


def test_the_users_own_flag_wins_and_is_said(config, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_pipelined_all_reduce=false --xla_dump_to=/tmp/x")
    mesh = mesh_of("gpu")
    assert not PIPELINED.keys() & xla.compiler_options(config, mesh).keys()  # XLA takes the older name in XLA_FLAGS too
    assert "xla_gpu_enable_latency_hiding_scheduler" in xla.compiler_options(config, mesh)
    first, *rest = xla.lines(config, mesh)
    assert "the environment's own xla_gpu_enable_pipelined_all_reduce xla_dump_to" in first
    assert first.startswith("xla: 0.92 of a device's memory, ") and len(rest) == 5
    assert all(line.startswith("xla: xla_gpu_") and line.endswith(")") for line in rest)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=98304")
    assert xla.lines(config, mesh_of("tpu"))[0].count("xla_tpu_scoped_vmem_limit_kib") == 1


def test_a_model_larger_than_the_memory_is_refused():
    small, mesh = cli.read("configs/demo.py"), sharding.make_mesh(c.Mesh(1, 4, 2))
    xla.check_memory(small, mesh)
    large = dataclasses.replace(small, model=dataclasses.replace(small.model, d_model=2**19, d_ff=2**19))
    parameters = 2**19 * (4 * (2 * 2**19 + 2 * 2**18 + 3 * 2**19) + 2 * 4_096 + 2 * 4 + 1)
    gib = 12 * parameters / 8 / 2**30
    with pytest.raises(UserError, match=f"of {parameters:,} parameters .* = 8 devices take {gib:,.1f} GiB of each, which has "):
        xla.check_memory(large, mesh)


def test_the_part_of_the_memory(monkeypatch):
    new, old = xla.MEMORY_NAMES
    monkeypatch.setenv(new, "")  # so that what is set here is undone
    xla.reserve_memory()
    assert float(os.environ[new]) == xla.memory_fraction() == xla.MEMORY
    monkeypatch.setenv(new, "")
    monkeypatch.setenv(old, "0.5")  # jax refuses both
    xla.reserve_memory()
    assert not os.environ[new] and xla.memory_fraction() == 0.5
