"""The step as compiled for machines that are not here: what it sends between devices, in what dtype, and what lies where.

Needs the compilers of the extra "plan"; without them all but the errors and the reader of HLO is skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tinyllama_jax import config as c
from tinyllama_jax import sharding, targets

TESTS = Path(__file__).parent
MB = 2**20
# elements of the seven matrices of a layer of compile_for.MODEL, of embedding and head, and of a norm: D=256 F=768 V=32,000
LAYER = sorted([256 * 256] * 2 + [256 * 128] * 2 + [256 * 768] * 3)
TABLE, NORM = 32_000 * 256, 256
LAYERS, ACCUMULATION = 3, 2
A100 = ("2,8,float32", "1,16,float32", "2,8,bfloat16")


def installed(on: str) -> bool:
    """Whether there is a compiler for the target."""
    return any(importlib.util.find_spec(p) for p in targets.PLUGINS[targets.TARGETS[on.split(":")[0]].platform])


def compile_for(on: str, *cases: str) -> tuple[dict, str]:
    """What compile_for.py says of each case, and what the compiler wrote. Two processes may use libtpu at one time."""
    if not installed(on):
        pytest.skip(f"no compiler for {on} here: pip install '.[plan]'")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "PYTHONPATH": str(TESTS.parent),
    }
    command = [sys.executable, TESTS / "compile_for.py", on, *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3_000:]
    results = json.loads(done.stdout.splitlines()[-1])
    for result in results.values():
        result["collectives"] = [targets.Collective(**r | {"axes": tuple(r["axes"])}) for r in result["collectives"]]
    return results, done.stderr


@pytest.fixture(scope="module")
def a100():
    return compile_for("a100-40g:2x8", *A100)


@pytest.fixture(scope="module")
def v5e():
    return compile_for("v5e:2x4", "1,8,float32")


@pytest.fixture(scope="module")
def v5e_4x4():
    return compile_for("v5e:4x4", "1,16,float32")


def elements(found: list[targets.Collective]) -> list[int]:
    """How many elements each has, in all devices' order of size."""
    return sorted(r.bytes // {"bf16": 2, "f32": 4}[r.dtype] for r in found)


def weights(result: dict, kind: str, **more) -> list[targets.Collective]:
    """The collectives of a kind that move whole weights or their gradients: whatever is larger than a norm's scale."""
    found = [r for r in result["collectives"] if r.kind == kind and r.bytes > 4 * NORM]
    return [r for r in found if all(getattr(r, name) == value for name, value in more.items())]


def gathered_in_bf16(result: dict) -> bool:
    """Whether weights come to a layer in the compute dtype, at once or shard by shard around a ring."""
    kinds = ("all-gather", "collective-permute")
    return any(r.layers and r.kind in kinds and r.dtype == "bf16" and r.bytes > 4 * NORM for r in result["collectives"])


def no_leaf_is_whole(result: dict, fsdp: int) -> None:
    large = [(path, n, here) for path, n, here in result["state"] if 4 * n > 64 * 1024]
    assert len(large) == 3 * (len(LAYER) + 2)  # weights and two moments
    assert all(here == n // fsdp for _, n, here in large), large


@pytest.mark.xdist_group("a100")
@pytest.mark.parametrize("case", A100)
def test_a100_gathers_a_layer_at_a_time_and_scatters_its_gradient(a100, case):
    result, (_, fsdp, reduce_dtype) = a100[0][case], case.split(",")
    wire = {"float32": "f32", "bfloat16": "bf16"}[reduce_dtype]
    gathers = weights(result, "all-gather", layers=True)
    assert elements(gathers) == sorted(2 * LAYER)  # forward and backward
    assert {r.dtype for r in gathers} == {"bf16"}  # the compute dtype, not the parameters' fp32
    scatters = weights(result, "reduce-scatter", layers=True)
    assert elements(scatters) == LAYER
    assert {r.dtype for r in scatters} == {wire}
    for r in gathers + scatters:
        assert (r.axes, r.size, r.trips) == (("fsdp",), int(fsdp), LAYERS * ACCUMULATION)


@pytest.mark.xdist_group("a100")
@pytest.mark.parametrize("case", A100)
def test_a100_moves_embedding_and_head_once_a_micro_batch(a100, case):
    result, wire = a100[0][case], {"float32": "f32", "bfloat16": "bf16"}[case.split(",")[2]]
    for kind, dtype in (("all-gather", "bf16"), ("reduce-scatter", wire)):
        found = weights(result, kind, layers=False)
        assert elements(found) == [TABLE, TABLE]  # not in each of the 2 chunks of the loss
        assert {(r.dtype, r.axes, r.trips) for r in found} == {(dtype, ("fsdp",), ACCUMULATION)}


@pytest.mark.xdist_group("a100")
@pytest.mark.parametrize("case", A100)
def test_a100_all_reduces_no_whole_gradient(a100, case):
    result, (data, fsdp, reduce_dtype) = a100[0][case], case.split(",")
    all_reduces = weights(result, "all-reduce")
    assert all(r.axes == ("data",) for r in all_reduces)  # within fsdp only norms, the loss, the gradients' norm
    if data == "1":
        assert not all_reduces
        return
    assert {r.dtype for r in all_reduces} == {{"float32": "f32", "bfloat16": "bf16"}[reduce_dtype]}
    assert sum(elements([r for r in all_reduces if r.layers])) == pytest.approx(sum(LAYER) // int(fsdp), rel=0.01)
    assert sum(elements([r for r in all_reduces if not r.layers])) == pytest.approx(2 * TABLE // int(fsdp), rel=0.01)


@pytest.mark.xdist_group("a100")
@pytest.mark.parametrize("case", A100)
def test_a100_leaves_nothing_large_on_every_device(a100, case):
    result = a100[0][case]
    no_leaf_is_whole(result, int(case.split(",")[1]))
    kinds = {r.kind for r in result["collectives"] if r.bytes > 4 * NORM}
    assert kinds <= {"all-gather", "reduce-scatter", "all-reduce"}  # no activation changes hands
    assert all(r.dtype in ("bf16", "f32") for r in result["collectives"] if r.kind == "all-gather")  # no tokens
    # the embedding's gradient and the head's copy, gradient and its conversion in fp32, and less than that for all else
    assert result["peak"] < 5 * 4 * TABLE


@pytest.mark.xdist_group("a100")
def test_a100_nothing_is_rematerialised_to_change_its_layout(a100):
    assert "nvoluntary full rematerialization" not in a100[1]


@pytest.mark.xdist_group("v5e")
def test_v5e_gathers_a_layer_at_a_time_and_scatters_gradients(v5e):
    """8 chips. Next to a matmul its compiler makes rings of permutes; it scatters after the accumulation where it can."""
    (result,), log = v5e[0].values(), v5e[1]
    assert "nvoluntary full rematerialization" not in log
    no_leaf_is_whole(result, 8)
    assert [
        r for r in result["collectives"] if r.layers and r.kind in ("all-gather", "collective-permute") and r.dtype == "bf16"
    ]
    assert not weights(result, "all-reduce")
    assert elements(weights(result, "all-gather", layers=False)) == [TABLE, TABLE]
    scatters = weights(result, "reduce-scatter")
    assert elements(scatters)[-2:] == [TABLE, TABLE]
    assert {r.dtype for r in scatters} == {"f32"}
    assert elements([r for r in scatters if r.layers]) == LAYER


@pytest.mark.xdist_group("v5e")
def test_v5e_4x4_all_reduces_what_it_is_told_to_scatter_but_moves_nothing_else(v5e_4x4):
    """On a 4x4 torus this libtpu makes an all-reduce and a slice even of a lone `psum_scatter` (docs/log.md)."""
    (result,), log = v5e_4x4[0].values(), v5e_4x4[1]
    assert "nvoluntary full rematerialization" not in log
    no_leaf_is_whole(result, 16)
    assert elements(weights(result, "all-gather", layers=False)) == [TABLE, TABLE]
    assert [
        r for r in result["collectives"] if r.layers and r.kind in ("all-gather", "collective-permute") and r.dtype == "bf16"
    ]
    reduced = weights(result, "all-reduce") + weights(result, "reduce-scatter")
    assert elements([r for r in reduced if not r.layers]) in ([TABLE, TABLE], sorted([*LAYER, TABLE, TABLE]))
    assert {r.axes for r in reduced} == {("fsdp",)}


# -- without a compiler --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["h100:1x8", "a100-40g", "a100-40g:16", "v5e:4", "v5e:4x4x", "v5e:0x4", ""])
def test_an_unknown_target_lists_the_known_ones(on):
    with pytest.raises(c.UserError, match=f"--on={on}: not a known target and its size; choose one like a100-40g:2x8, v5e:4x4"):
        targets.devices(on)


@pytest.mark.parametrize("on", ["a100-40g:2x8", "v5e:4x4"])
def test_a_missing_compiler_says_what_to_install(on, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(c.UserError, match=rf"--on={on}: .* is not installed; pip install '.\[plan\]'"):
        targets.devices(on)


def test_every_target_says_where_its_facts_are_from():
    for name, target in targets.TARGETS.items():
        assert target.source and target.memory > 2**30 and "x" in target.shape, name
        assert (f"device_memory_size: {target.memory}" in target.config) == (target.platform == "cuda"), name


def test_collectives_of_a_program_compiled_here():
    """By hand: what a program sends whose collectives are written out, in a loop of 5, for the CPU."""
    mesh = sharding.make_mesh(c.Mesh(2, 2, 2))

    def f(x):  # [8, 4] bf16 and fp32 on each device
        gathered = jax.lax.all_gather(x, ("fsdp",), axis=0, tiled=True)  # 16 x 4
        step = lambda total, _: (total + jax.lax.psum(total, ("data", "tensor")) / 8, None)
        return jax.lax.scan(step, gathered.astype(jnp.float32), None, length=5)[0]

    x = jax.ShapeDtypeStruct((16, 4), jnp.int8, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    program = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec(), check_vma=False))
    gather, reduce = sorted(targets.collectives(program.lower(x).compile().as_text(), mesh))
    assert gather[:7] == ("all-gather", "s8", 64, ("fsdp",), 2, 1, False)
    assert reduce[:7] == ("all-reduce", "f32", 256, ("data", "tensor"), 4, 5, False)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1,2,3,4,5,6,7}}", ("data", "fsdp", "tensor")),
        ("replica_groups={}", ("data", "fsdp", "tensor")),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}, use", ("fsdp",)),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", ("data",)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("fsdp", "tensor")),
        ("source_target_pairs={{0,4},{4,0}}", ("data",)),
    ],
)
def test_replica_groups_in_every_form_that_xla_writes(groups, axes):
    assert targets._axes(f", channel_id=1, {groups}", sharding.make_mesh(c.Mesh(2, 2, 2))) == axes
