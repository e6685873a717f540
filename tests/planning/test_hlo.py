"""What is read from the text of a compiled program: by hand, and of programs compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tinyllama_jax.base import config as c
from tinyllama_jax.base import sharding
from tinyllama_jax.planning import hlo


def test_collectives_of_a_program_compiled_here():
    """By hand: what a program sends whose collectives are written out, in a loop of 5, for the CPU."""
    mesh = sharding.make_mesh(c.Mesh(2, 2, 2))

    def f(x):  # [8, 4] bf16 and fp32 on each device
        gathered = jax.lax.all_gather(x, ("fsdp",), axis=0, tiled=True)  # 16 x 4
        step = lambda total, _: (total + jax.lax.psum(total, ("data", "tensor")) / 8, None)
        return jax.lax.scan(step, gathered.astype(jnp.float32), None, length=5)[0]

    x = jax.ShapeDtypeStruct((16, 4), jnp.int8, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    program = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec(), check_vma=False))
    gather, reduce = sorted(hlo.collectives(hlo.parse(program.lower(x).compile().as_text()), mesh))
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
    assert hlo._axes(f", channel_id=1, {groups}", sharding.make_mesh(c.Mesh(2, 2, 2))) == axes


ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, parameter 3, shape |f32[4,256]| at ShapeIndex {}, maybe-live-out:
 value: <1 param.7 @0> (size=4096,offset=0): f32[4,256]{1,0}
allocation 1: size 12288, preallocated-temp:
 value: <2 fusion.1 @0> (size=4096,offset=0): bf16[8,256]{1,0}
 value: <3 loop.2{1} (phi) @0> (size=4096,offset=0): bf16[8,256]{1,0}
 value: <4 fusion.9{0} @0> (size=8192,offset=4096): f32[2,1024]{1,0}
 value: <5 fusion.8 @0> (size=8192,offset=4096): f32[2048]{0}
 value: <6 fusion.5 @1> (size=512,offset=0): f32[128]{0}
"""
LIVE_RANGE = """  BufferLiveRange:
    fusion.8{}:1-2
  Live ranges at 7 (peak):
    param.7{}: 4096 bytes (cumulative: 4096 bytes)
    fusion.1{}: 4096 bytes (cumulative: 8192 bytes)
    loop.2{1}: 4096 bytes (cumulative: 12288 bytes)
    fusion.9{0}: 8192 bytes (cumulative: 20480 bytes)
    fusion.5{}: 512 bytes (cumulative: 20992 bytes)

  Stack trace breakdown for peak usage: 20 992 bytes
    fusion.8{}: 8192 bytes
"""


def test_buffers_at_the_peak_count_once_and_without_arguments():
    """By hand: one place under two names, one that is not in use at the peak, one in a TPU's VMEM."""
    assert hlo.at_peak(ASSIGNMENT, LIVE_RANGE) == [(4096, "bf16", (8, 256)), (8192, "f32", (2, 1024))]
    assert hlo.at_peak("", "") == []


RING = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %two = s32[] constant(STEP)
  %next = s32[] add(%i, %two)
  %sent = f32[8]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (s32[], f32[8]{0}) tuple(%next, %sent)
}

%condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]{0}) parameter(0)
  ROOT %loop = (s32[], f32[8]{0}) while(%a), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(("step", "trips"), [(1, 7), (2, 4), (7, 1)])
def test_the_trip_count_of_a_loop_without_a_known_one(step, trips):
    mesh = sharding.make_mesh(c.Mesh(2, 1, 1), jax.devices()[:2])
    (found,) = hlo.collectives(hlo.parse(RING.replace("STEP", str(step))), mesh)
    assert (found.kind, found.bytes, found.axes, found.trips) == ("collective-permute", 32, ("data",), trips)
