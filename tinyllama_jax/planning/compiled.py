"""A train step as compiled for a machine that is not here: its memory by kind, its FLOPs, what it sends, how long it takes."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from tinyllama_jax.base import dims, sharding
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core.losses import NextToken
from tinyllama_jax.core.program import Program, build, choose_attention, shape_of_batch
from tinyllama_jax.planning import hlo, targets

LARGE = 4 * 2**20  # bytes: a collective that small costs its latency alone


class Compiled(NamedTuple):
    """A train step as the machine's compiler makes it. Bytes are of one device."""

    config: Config
    machine: targets.Machine
    mesh: jax.sharding.Mesh
    accumulation: int
    attention: str
    peak: int
    live: int  # what is alive where the most is; the rest of the peak is room between, or an allocator's other peak
    memory: dict[str, int | None]  # by kind; None where the compiler refused and so said nothing
    expected: dict[str, int]  # the same by arithmetic
    collectives: list[hlo.Collective]
    flops: float  # of all matmuls that a step executes, what is computed again included; of all devices
    notes: list[str]  # of what the compiler should not have had to do
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.peak <= self.machine.budget


# -- compiling ------------------------------------------------------------------------------------------------------------


def compile_step(config: Config, machine: targets.Machine) -> Compiled:
    """Compiles the train step for `machine`. Raises UserError, also for a kernel that the machine cannot run."""
    began = time.perf_counter()
    mesh = sharding.make_mesh(config.mesh, machine.devices)
    with jax.set_mesh(mesh):
        program = build(config, mesh, NextToken(eos_id=2))  # any: it is a constant of the program
        traced = program.train.trace(program.state, shape_of_batch(program, config.model.seq_len))
        lowered = traced.lower()
    text, buffers, peak, said = "", [], 0, ""
    with tempfile.TemporaryDirectory() as dump, messages() as written:
        try:
            executable = lowered.compile(compiler_options={"xla_dump_to": dump, "xla_dump_hlo_as_text": True})
            text, stats = executable.as_text(), executable.memory_analysis()
            peak = stats.peak_memory_in_bytes
            if machine.target is None:  # a CPU's leaves the temporaries out
                peak = stats.argument_size_in_bytes + stats.temp_size_in_bytes
            dumped = lambda what: "".join(path.read_text() for path in Path(dump).glob(f"*-{what}.txt"))
            buffers = hlo.at_peak(dumped("buffer-assignment"), dumped("live-range"))
        except jax.errors.JaxRuntimeError as error:
            said = _one_line(error)
            peak = _refused_memory(said, _on_device(program.state))
        warned = "nvoluntary full rematerialization" in written()
    if not text and not peak:
        raise UserError(f"--on={machine.on}: its compiler refuses the step: {said}")
    expected = expected_memory(config, mesh, program, traced.jaxpr)
    memory = measured_memory(config, program, buffers, peak) if text else dict.fromkeys(expected)
    collectives = hlo.collectives(text, mesh)
    notes = [*unwanted(collectives, mesh), *(["an array is gathered whole to change its layout"] if warned else [])]
    live = _on_device(program.state) + sum(buffer.bytes for buffer in buffers)
    impl = choose_attention(config, machine.devices[0])[0]
    return Compiled(config, machine, mesh, program.shape[0], impl, peak, live, memory, expected, collectives,
                    executed_flops(traced.jaxpr.jaxpr), notes, time.perf_counter() - began)  # fmt: skip


@contextlib.contextmanager
def messages() -> Iterator[Callable[[], str]]:
    """Keeps what compilers write to file descriptor 2, which is mostly noise, and gives it to who asks."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        real = os.dup(2)
        os.dup2(file.fileno(), 2)

        def read() -> str:
            return os.pread(file.fileno(), 1 << 24, 0).decode(errors="replace")

        try:
            yield read
        finally:
            os.dup2(real, 2)
            os.close(real)


def _refused_memory(said: str, arguments: int) -> int:
    """Bytes that a TPU compiler would have needed of a memory that has less, or 0 if it refused for something else."""
    if m := re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", said):
        arguments = 0
    elif not (m := re.search(r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM", said)):
        return 0
    return arguments + int(float(m[1]) * 2 ** (10 * (1 + "KMGT".index(m[2]))))


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:500]


# -- what is in memory ---------------------------------------------------------------------------------------------------


def _on_device(tree) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def measured_memory(config: Config, program: Program, buffers: list[hlo.Buffer], peak: int) -> dict[str, int]:
    """`peak` by kind, as the compiled program has it where it needs the most."""
    parts = Counter()
    shards = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(program.state.params)]
    like_a_parameter = {tuple(sorted(n for n in shape if n > 1)) for shape in shards}
    for buffer in buffers:
        shape = tuple(sorted(n for n in buffer.shape if n > 1))
        if shape in like_a_parameter and buffer.dtype == "f32":
            parts["gradients"] += buffer.bytes
        elif len(buffer.shape) > 2 and buffer.shape[0] == config.model.n_layers:
            parts["activations"] += buffer.bytes
    params, rest = _on_device(program.state.params), _on_device(program.state.opt_state)
    known = {"params": params, "optimizer": rest, "gradients": parts["gradients"], "activations": parts["activations"]}
    return known | {"temporaries": max(peak - sum(known.values()), 0)}


def expected_memory(config: Config, mesh: jax.sharding.Mesh, program: Program, jaxpr) -> dict[str, int]:
    """The same by arithmetic, but for the temporaries, which only a compiler knows; activations as if tensor split none."""
    params = _on_device(program.state.params)
    copies = 1 if program.shape[0] == 1 else 2  # a micro-batch's gradients, and the sum
    kept = kept_by_layers(jaxpr.jaxpr, config.model.n_layers) // sharding.batch_devices(mesh)
    return {
        "params": params,
        "optimizer": _on_device(program.state.opt_state),
        "gradients": copies * params,
        "activations": kept,
    }


def _inner(eqn) -> Iterator:
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item := getattr(item, "jaxpr", item), "eqns"):
                yield item


def kept_by_layers(jaxpr, n_layers: int) -> int:
    """Bytes, over all devices, that the first loop over the layers hands on, layer by layer, to the one that goes back."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan" and eqn.params["length"] == n_layers:
            stacked = [v.aval for v in eqn.outvars[eqn.params["num_carry"] :]]
            return sum(a.size * a.dtype.itemsize for a in stacked if a.ndim > 2)
        for inner in _inner(eqn):
            if kept := kept_by_layers(inner, n_layers):
                return kept
    return 0


# -- how long ------------------------------------------------------------------------------------------------------------


def executed_flops(jaxpr) -> float:
    """FLOPs of every matmul in a jaxpr, loops multiplied out; of attention kernels, those of the causal half."""
    total = 0.0
    read = {id(v) for v in (*jaxpr.outvars, *(v for eqn in jaxpr.eqns for v in eqn.invars))}
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif name.startswith("dot_product_attention"):  # cuDNN's: q k' and p v forward; five matmuls backward
            B, S, N, H = eqn.invars[0].aval.shape
            total += (2 if "fwd" in name else 5) * 2 * B * N * H * S * S / 2
        elif name == "pallas_call":
            if read.isdisjoint(map(id, eqn.outvars)):  # JAX leaves in what backward need not do again, and XLA takes it out
                continue
            if cost := eqn.params.get("cost_estimate"):
                total += cost.flops
            elif "splash" in str(eqn.params.get("name")):  # says nothing of its cost
                B, N, S, H = next(v.aval.shape for v in eqn.invars if v.aval.ndim == 4)
                matmuls = next(n for part, n in (("fwd", 2), ("dkv", 4), ("dq", 3)) if part in eqn.params["name"])
                total += matmuls * 2 * B * N * H * S * S / 2
        else:
            times = eqn.params["length"] if name == "scan" else eqn.params["mesh"].size if name == "shard_map" else 1
            total += times * sum(executed_flops(inner) for inner in _inner(eqn))
    return total


def wire_seconds(found: list[hlo.Collective], mesh: jax.sharding.Mesh, machine: targets.Machine) -> float:
    """Seconds a step that the collectives take at the links' full rate, one after the other, as rings."""
    target, seconds = machine.target, 0.0
    node = {device: i // machine.per_node for i, device in enumerate(machine.devices)}
    for c in found:
        if c.size == 1:
            continue
        sent = c.bytes * (c.size - 1) / c.size * (2 if c.kind == "all-reduce" else 1)
        if c.kind in ("collective-permute", "collective-broadcast"):
            sent = c.bytes
        first = mesh.devices[tuple(slice(None) if axis in c.axes else 0 for axis in mesh.axis_names)]
        members = Counter(node[device] for device in first.flat)
        slowest = sent / target.link
        if len(members) > 1:  # a ring leaves a node once, and as many rings share its way out as there are groups in it
            slowest = max(slowest, sent * machine.per_node / max(members.values()) / target.between)
        seconds += c.trips * slowest
    return seconds


def step_seconds(compiled: Compiled, mfu: float | None = None) -> dict[str, float] | None:
    """Seconds of one step by what could hold it up: matmuls at `mfu` of the peak, links and memory at their full rate.

    `mfu`: the target's if None. None where nothing is known: on a CPU, in fp32, which the table has no rate for, and where the
    compiler refused.
    """
    config, target = compiled.config, compiled.machine.target
    if target is None or config.model.compute_dtype == "float32" or compiled.memory["params"] is None:
        return None
    shard = dims.n_parameters(config.model) / (compiled.mesh.shape["fsdp"] * compiled.mesh.shape["tensor"])
    whole = dims.n_parameters(config.model) / compiled.mesh.shape["tensor"]
    saved = compiled.memory["activations"] or compiled.expected["activations"]
    # AdamW reads parameter, gradient and two moments and writes three; a micro-batch reads the weights in bf16 three times,
    # adds to its gradients' sum, writes and reads what it keeps. A lower bound: what is not kept is written and read too.
    moved = 7 * 4 * shard + compiled.accumulation * (3 * 2 * whole + 3 * 4 * shard + 2 * saved)
    return {
        "compute": compiled.flops / compiled.mesh.size / (target.flops * (mfu or target.mfu)),
        "wire": wire_seconds(compiled.collectives, compiled.mesh, compiled.machine),
        "memory": moved / target.bandwidth,
    }


def unwanted(found: list[hlo.Collective], mesh: jax.sharding.Mesh) -> list[str]:
    """Collectives that a step sharded like this one has no use for, a line each."""
    out = Counter()
    for c in found:
        if c.bytes < LARGE or c.size == 1:
            continue
        what = f"{c.kind} of {c.dtype} over {' x '.join(c.axes)}"
        if c.kind == "all-reduce" and "fsdp" in c.axes and "tensor" not in c.axes:
            out[f"{what}: a whole gradient, where a reduce-scatter would send half"] += c.bytes * c.trips
        elif c.kind == "all-to-all" or (c.kind == "all-gather" and not c.dtype.startswith(("bf", "f"))):
            out[f"{what}: moves tokens or activations, which should stay where they are"] += c.bytes * c.trips
    return [f"{line} ({gib(n)} a step)" for line, n in out.items()]


def gib(n: float | None) -> str:
    """Bytes in GiB or MiB, for a person."""
    return "" if n is None else f"{n / 2**30:,.2f} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"
