"""Machines that are not here: their devices for a mesh to compile for, and what a compiled program sends between them."""

from __future__ import annotations

import importlib.util
import math
import re
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from tinyllama_jax.config import UserError

PLUGINS = {"cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "tpu": ("libtpu",)}


class Target(NamedTuple):
    """A kind of accelerator. What a compiler must know of it is in `config`, from published facts alone."""

    platform: str  # PJRT plugin: "cuda" or "tpu"
    memory: int  # bytes of one device
    shape: str  # how many of them, as an example of what follows the colon
    source: str
    config: str = ""  # GPUs: a GpuTargetConfigProto as text (field names: xla/stream_executor/device_description.proto)


TARGETS = {
    "a100-40g": Target(
        platform="cuda",
        memory=40_536 * 2**20,  # what the driver reports of the 40 GB
        shape="2x8",  # NODES x GPUS of each
        source="NVIDIA A100 datasheet (1,555 GB/s); A100 architecture whitepaper, table 4 (108 SMs x 64 FP32 lanes, 40 MB L2, "
        "1,410 MHz); CUDA C++ programming guide, compute capability 8.0 (164 KB of shared memory an SM, 163 KB a block)",
        config="""
            gpu_device_info {
              cuda_compute_capability { major: 8 }
              core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41
              memory_bandwidth: 1555000000000 l2_cache_size: 41943040 device_memory_size: 42505076736
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              shared_memory_per_block: 49152 shared_memory_per_block_optin: 166912 shared_memory_per_core: 167936
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            }
            platform_name: "CUDA"
            dnn_version_info { major: 9 minor: 8 }
        """,  # cuDNN: the oldest that jax's CUDA plugin takes
    ),
    "v5e": Target(
        platform="tpu",
        memory=16 * 2**30,
        shape="4x4",  # chips along each axis of the slice
        source="cloud.google.com/tpu/docs/v5e: 16 GB of HBM2 a chip, slices of 1x1 to 16x16 chips",
    ),
}


def devices(on: str) -> list[jax.Device]:
    """The devices of `on`, "a100-40g:2x8" (NODESxGPUS) or "v5e:4x4" (the slice), to make a mesh from and compile for.

    They hold no arrays and run nothing. The CUDA plugin stops a machine without a driver unless JAX_PLATFORMS=cpu is set
    before jax starts. Raises UserError for a target that is not known, not installed or not of a size that exists.
    """
    name, _, shape = on.partition(":")
    if name not in TARGETS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        known = ", ".join(f"{n}:{t.shape}" for n, t in TARGETS.items())
        raise UserError(f"--on={on}: not a known target and its size; choose one like {known}")
    target = TARGETS[name]
    if not any(importlib.util.find_spec(plugin) for plugin in PLUGINS[target.platform]):
        raise UserError(f"--on={on}: the compiler for {target.platform} is not installed; pip install '.[plan]'")
    try:
        if target.platform == "cuda":
            topology = topologies.get_topology_desc(platform="cuda", target_config=target.config, topology=f"1x{shape}")
        else:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=on)
    except (RuntimeError, ValueError) as e:  # jax's errors of the plugin are RuntimeErrors
        raise UserError(f"--on={on}: no such machine, says the compiler ({str(e).splitlines()[0]})") from e
    return list(topology.devices)


# -- what a compiled program sends ---------------------------------------------------------------------------------------

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.+?) ([\w-]+)\(([^)]*)\)(.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?((?:%[\w.-]+(?:, )?)+)")


class Collective(NamedTuple):
    """One array that a program sends between devices (XLA packs several into one operation)."""

    kind: str  # of KINDS. TPU compilers make rings of collective-permutes out of gathers and reduce-scatters next to a matmul
    dtype: str  # as in HLO: "bf16"
    bytes: int  # of the whole array, before it is split or after it is gathered; of a permute, what one device sends
    axes: tuple[str, ...]  # the mesh axes whose devices take part together
    size: int  # how many devices that is
    trips: int  # how often a step does it: the product of the loops around it
    layers: bool  # inside the loop over layers
    op_name: str  # where jax made it, as far as the compiler kept that; also says which loop


def collectives(hlo: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """Every collective in `hlo`, the text of a program compiled for `mesh` (`compiled.as_text()`)."""
    types, called_by, found, bounds, computation = {}, {}, {}, {}, ""
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%(\S+) \(", line):
            computation = header[1]
        if not (m := _INSTRUCTION.match(line)):
            continue
        name, types[name], op, operands, rest = m[1], m[2], m[3], m[4], m[5]
        if op == "constant" and operands.isdigit():
            bounds.setdefault(computation, []).append(int(operands))
        for callee in re.findall(r"%([\w.-]+)", " ".join(_CALLED.findall(rest))):
            called_by.setdefault(callee, (computation, op, rest))
        kind = op.removesuffix("-start")
        if kind in KINDS:
            # TPU compilers write the parts of one operation that runs beside others, each with its channel, shape and name
            part = (kind, re.search(r"channel_id=\d+|$", rest)[0] or name, types[name].split("{")[0], _op_name(rest))
            found.setdefault(part, (operands, rest, computation))

    def loops(inner: str) -> list[tuple[int, str]]:  # (trips, op_name) of each loop around a computation
        out = []
        while inner in called_by:
            inner, op, rest = called_by[inner]
            if op == "while":
                trips = re.search(
                    r'"known_trip_count":\{"n":"(\d+)"', rest
                )  # TPU compilers leave it to the condition's constant
                limit = max(bounds.get(re.search(r"condition=%([\w.-]+)", rest)[1], [1]))
                out.append((int(trips[1]) if trips else limit, _op_name(rest)))
        return out

    out = []
    for (kind, *_), (operands, rest, computation) in found.items():
        axes = _axes(rest, mesh)
        size = math.prod(mesh.shape[a] for a in axes)
        around = loops(computation)
        if "all-reduce-scatter" in computation:  # how TPU compilers write a reduce-scatter: an all-reduce fused with a slice
            kind = "reduce-scatter"
        for operand in re.findall(r"%([\w.-]+)", operands):
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", types[operand]):
                n_bytes = math.prod(int(d) for d in dims.split(",") if d) * _bits(dtype) // 8
                out.append(
                    Collective(
                        kind=kind,
                        dtype=dtype,
                        bytes=n_bytes * (size if kind == "all-gather" else 1),
                        axes=axes,
                        size=size,
                        trips=math.prod(trips for trips, _ in around),
                        layers=any(re.search(r"Llama[^/]*/while", name) for _, name in around),
                        op_name=_op_name(rest) or (around[0][1] if around else ""),
                    )
                )
    return out


def _op_name(rest: str) -> str:
    name = re.search(r'op_name="([^"]*)"', rest)
    return name[1] if name else ""


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])


def _axes(rest: str, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """The mesh axes that differ within a group of devices (which HLO counts in the order of the mesh)."""
    names, sizes = mesh.axis_names, mesh.devices.shape
    number = lambda text: [int(n) for n in re.findall(r"\d+", text)]
    if m := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", rest):
        groups = [number(group) for group in re.findall(r"\{([\d,]+)\}", m[1])]
    elif m := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        order = np.arange(math.prod(sizes)).reshape(number(m[3])).transpose(number(m[4]) if m[4] else None)
        groups = order.reshape(int(m[1]), int(m[2]))
    elif m := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", rest):
        order = np.arange(math.prod(sizes))
        if m[2]:
            order = order.reshape(number(m[2])).transpose(number(m[3]) if m[3] else None)
        own = dict(re.findall(r"'(\w+)'=(\d+)", m[1]))
        joined = re.findall(r"'(\w+)'", m[4])
        order = order.reshape([int(n) for n in own.values()])
        groups = np.moveaxis(order, [list(own).index(a) for a in joined], range(-len(joined), 0))
        groups = groups.reshape(-1, math.prod(int(own[a]) for a in joined))
    else:
        return tuple(names)  # replica_groups={}: all devices
    places = np.stack([np.stack(np.unravel_index(np.asarray(group), sizes)) for group in groups])  # [group, axis, member]
    differ = (places != places[:, :, :1]).any(axis=(0, 2))
    return tuple(name for name, d in zip(names, differ, strict=True) if d)
