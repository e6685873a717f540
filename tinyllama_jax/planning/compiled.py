"""Compiles the train step for another machine, and reads off its memory, FLOPs, network traffic and time."""

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

LARGE = 4 * 2**20  # bytes; a smaller collective costs little more than its latency


class Compiled(NamedTuple):
    """A compiled train step. All bytes are those of one device."""

    config: Config
    machine: targets.Machine
    mesh: jax.sharding.Mesh
    accumulation: int
    attention: str
    peak: int
    live: int  # bytes in use at the peak; the remainder of `peak` is fragmentation
    memory: dict[str, int | None]  # `peak` by kind; None if the compiler refused the step
    expected: dict[str, int]  # `memory`, by arithmetic
    collectives: list[hlo.Collective]
    flops: float  # all matmuls of a step on all devices, with those that remat executes again
    notes: list[str]  # warnings about unwanted communication
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the step fits a device's memory."""
        return self.peak <= self.machine.budget


# -- compiling ------------------------------------------------------------------------------------------------------------


def compile_step(config: Config, machine: targets.Machine) -> Compiled:
    """Compiles the train step for `machine`. Raises UserError, also for a kernel that the machine cannot run."""
    began = time.perf_counter()
    mesh = sharding.make_mesh(config.mesh, machine.devices)
    with jax.set_mesh(mesh):
        program = build(config, mesh, NextToken(eos_id=2))  # the id does not matter: it is a constant of the program
        traced = program.train.trace(program.state, shape_of_batch(program, config.model.seq_len))
        lowered = traced.lower()
    text, buffers, peak, refusal, options = "", [], 0, "", {"xla_dump_hlo_as_text": True}
    if machine.target and machine.target.sm:
        # In a run, XLA may use 95% of what JAX has reserved (jaxlib's py_client.cc tells it); without a device, 95% of 80% of
        # the memory. Above this limit it computes matmuls twice, and sends while nothing is computed.
        options["xla_gpu_memory_limit_slop_factor"] = round(95 * machine.budget / (0.8 * machine.target.memory))
    with tempfile.TemporaryDirectory() as dump, messages() as written:
        try:
            executable = lowered.compile(compiler_options={"xla_dump_to": dump} | options)
            text, stats = executable.as_text(), executable.memory_analysis()
            peak = stats.peak_memory_in_bytes
            if machine.target is None:  # on a CPU this peak leaves out the temporaries
                peak = stats.argument_size_in_bytes + stats.temp_size_in_bytes
            dumped = lambda kind: "".join(path.read_text() for path in Path(dump).glob(f"*-{kind}.txt"))
            buffers = hlo.at_peak(dumped("buffer-assignment"), dumped("live-range"))
        except jax.errors.JaxRuntimeError as error:
            refusal = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:3])[:500]
            peak = _refused_memory(refusal, _on_device(program.state))
        warned = "nvoluntary full rematerialization" in written()
    if not text and not peak:
        raise UserError(f"--on={machine.on}: its compiler refuses the step: {refusal}")
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
    """Hides what compilers write to file descriptor 2, which is mostly noise. Gives a function that returns it."""
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


def _refused_memory(refusal: str, arguments: int) -> int:
    """Returns the bytes that a TPU compiler wanted but the device does not have, or 0 if it refused for another reason."""
    if m := re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", refusal):
        arguments = 0
    elif not (m := re.search(r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM", refusal)):
        return 0
    return arguments + int(float(m[1]) * 2 ** (10 * (1 + "KMGT".index(m[2]))))


# -- memory -----------------------------------------------------------------------------------------------------------


def _on_device(tree) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def measured_memory(config: Config, program: Program, buffers: list[hlo.Buffer], peak: int) -> dict[str, int]:
    """Splits `peak` by kind: parameters, optimizer, gradients, activations, temporaries."""
    parts = Counter()
    shards = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(program.state.params)]
    like_a_parameter = {tuple(sorted(n for n in shape if n > 1)) for shape in shards}
    for buffer in buffers:
        shape = tuple(sorted(n for n in buffer.shape if n > 1))
        if shape in like_a_parameter and buffer.dtype == "f32":
            parts["gradients"] += buffer.bytes
        elif len(buffer.shape) > 2 and buffer.shape[0] == config.model.n_layers:
            parts["activations"] += buffer.bytes
    params, optimizer = _on_device(program.state.params), _on_device(program.state.opt_state)
    known = {"params": params, "optimizer": optimizer, "gradients": parts["gradients"], "activations": parts["activations"]}
    return known | {"temporaries": max(peak - sum(known.values()), 0)}


def expected_memory(config: Config, mesh: jax.sharding.Mesh, program: Program, jaxpr) -> dict[str, int]:
    """Computes `measured_memory` by arithmetic, without the temporaries; as if `tensor` did not split activations."""
    params = _on_device(program.state.params)
    copies = 1 if program.shape[0] == 1 else 2  # a micro-batch's gradients, and the sum
    activations = saved_by_layers(jaxpr.jaxpr, config.model.n_layers) // sharding.batch_devices(mesh)
    return {
        "params": params,
        "optimizer": _on_device(program.state.opt_state),
        "gradients": copies * params,
        "activations": activations,
    }


def _inner(eqn) -> Iterator:
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item := getattr(item, "jaxpr", item), "eqns"):
                yield item


def saved_by_layers(jaxpr, n_layers: int) -> int:
    """Returns the bytes, over all devices, that the forward loop over layers saves for the backward loop."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan" and eqn.params["length"] == n_layers:
            stacked = [v.aval for v in eqn.outvars[eqn.params["num_carry"] :]]
            return sum(a.size * a.dtype.itemsize for a in stacked if a.ndim > 2)
        for inner in _inner(eqn):
            if saved := saved_by_layers(inner, n_layers):
                return saved
    return 0


# -- time ----------------------------------------------------------------------------------------------------------------


def executed_flops(jaxpr) -> float:
    """Returns the FLOPs of every matmul in a jaxpr, times its loops. Attention kernels count the causal half."""
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
            if read.isdisjoint(map(id, eqn.outvars)):  # its results are unused; XLA removes it
                continue
            if cost := eqn.params.get("cost_estimate"):
                total += cost.flops
            elif "splash" in str(eqn.params.get("name")):  # it has no cost estimate
                B, N, S, H = next(v.aval.shape for v in eqn.invars if v.aval.ndim == 4)
                matmuls = next(n for part, n in (("fwd", 2), ("dkv", 4), ("dq", 3)) if part in eqn.params["name"])
                total += matmuls * 2 * B * N * H * S * S / 2
        else:
            times = eqn.params["length"] if name == "scan" else eqn.params["mesh"].size if name == "shard_map" else 1
            total += times * sum(executed_flops(inner) for inner in _inner(eqn))
    return total


def wire_seconds(collectives: list[hlo.Collective], mesh: jax.sharding.Mesh, machine: targets.Machine) -> float:
    """Returns the seconds that a step's collectives take: as rings, one after another, at the full rate of the links."""
    target, seconds = machine.target, 0.0
    node = {device: i // machine.per_node for i, device in enumerate(machine.devices)}
    for c in collectives:
        if c.size == 1:
            continue
        sent = c.bytes * (c.size - 1) / c.size * (2 if c.kind == "all-reduce" else 1)
        if c.kind in ("collective-permute", "collective-broadcast"):
            sent = c.bytes
        first = mesh.devices[tuple(slice(None) if axis in c.axes else 0 for axis in mesh.axis_names)]
        members = Counter(node[device] for device in first.flat)
        slowest = sent / target.link
        if len(members) > 1:  # a ring leaves each node once; all groups of a node share its way out
            slowest = max(slowest, sent * machine.per_node / max(members.values()) / target.between)
        seconds += c.trips * slowest
    return seconds


def step_seconds(compiled: Compiled, mfu: float | None = None) -> dict[str, float] | None:
    """Returns the seconds of a step spent on matmuls (at `mfu` of the peak), links and memory (at their full rate).

    `mfu`: None takes the target's. Returns None on a CPU, in fp32 (the table has no rate) and if the compiler refused the step.
    """
    config, target = compiled.config, compiled.machine.target
    if target is None or config.model.compute_dtype == "float32" or compiled.memory["params"] is None:
        return None
    shard = dims.n_parameters(config.model) / (compiled.mesh.shape["fsdp"] * compiled.mesh.shape["tensor"])
    whole = dims.n_parameters(config.model) / compiled.mesh.shape["tensor"]
    saved = compiled.memory["activations"] or compiled.expected["activations"]
    # AdamW reads the parameter, gradient and two moments and writes three of them. A micro-batch reads the bf16 weights three
    # times, adds to the sum of gradients, and writes and reads the saved activations. A lower bound: the others move too.
    moved = 7 * 4 * shard + compiled.accumulation * (3 * 2 * whole + 3 * 4 * shard + 2 * saved)
    return {
        "compute": compiled.flops / compiled.mesh.size / (target.flops * (mfu or target.mfu)),
        "wire": wire_seconds(compiled.collectives, compiled.mesh, compiled.machine),
        "memory": moved / target.bandwidth,
    }


def unwanted(collectives: list[hlo.Collective], mesh: jax.sharding.Mesh) -> list[str]:
    """Returns a line for each kind of collective that a well-sharded step would not need."""
    out = Counter()
    for c in collectives:
        if c.bytes < LARGE or c.size == 1:
            continue
        collective = f"{c.kind} of {c.dtype} over {' x '.join(c.axes)}"
        if c.kind == "all-reduce" and "fsdp" in c.axes and "tensor" not in c.axes:
            out[f"{collective}: a whole gradient, where a reduce-scatter would send half"] += c.bytes * c.trips
        elif c.kind == "all-to-all" or (c.kind == "all-gather" and not c.dtype.startswith(("bf", "f"))):
            out[f"{collective}: moves tokens or activations, which should stay where they are"] += c.bytes * c.trips
    return [f"{line} ({gib(n)} a step)" for line, n in out.items()]


def gib(n: float | None) -> str:
    """Formats bytes as GiB or MiB."""
    return "" if n is None else f"{n / 2**30:,.2f} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"
