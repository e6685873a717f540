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

from tinyllama_jax.base import sharding
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import lora
from tinyllama_jax.core.losses import NextToken
from tinyllama_jax.core.program import Program, build, choose_attention, shape_of_batch
from tinyllama_jax.planning import hlo, targets, timing

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
    asked: Counter  # as traced, remat included: "flops" of a step's matmuls on all devices; "forward" and "backward": how many
    # matmuls a layer executes for a micro-batch
    executed: Counter  # the same as compiled: to save memory, XLA may recompute more matmuls
    run: list[timing.Kernel]  # the kernels of one device; empty if the compiler refused the step
    notes: list[str]  # warnings about unwanted communication
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the step fits a device's memory."""
        return self.peak <= self.machine.budget

    @property
    def recomputed(self) -> float:
        """The FLOPs that XLA recomputes of its own accord to save memory, as a fraction of those traced; 0 if below 1%."""
        part = self.executed["flops"] / self.asked["flops"] - 1
        return part if part >= 0.01 else 0.0


# -- compiling ------------------------------------------------------------------------------------------------------------


def compile_step(config: Config, machine: targets.Machine) -> Compiled:
    """Compiles the train step for `machine`. Raises UserError, also for a kernel that the machine cannot run."""
    began = time.perf_counter()
    mesh = sharding.make_mesh(config.mesh, machine.devices)
    device = jax.default_device(machine.devices[0])  # tokamax looks at the default device, and writes warnings
    with jax.set_mesh(mesh), device if config.model.attention == "pallas_mosaic_gpu" else contextlib.nullcontext(), messages():
        program = build(config, mesh, NextToken(eos_id=2))  # the id does not matter: it is a constant of the program
        traced = program.train.trace(program.state, shape_of_batch(program, config.model.seq_len))
        lowered = traced.lower()
    text, buffers, peak, refusal, options = "", [], 0, "", {"xla_dump_hlo_as_text": True}
    if machine.target and machine.target.sm:
        # In a run, XLA may use 95% of what JAX has reserved (jaxlib's py_client.cc passes it on); without a device, 95% of 80%
        # of the memory. For a step that needs more, it recomputes matmuls and exposes more communication.
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
    parsed = hlo.parse(text)
    collectives = hlo.collectives(parsed, mesh)
    notes = [*unwanted(collectives, mesh), *(["an array is gathered whole to change its layout"] if warned else [])]
    run = timing.kernels(parsed, mesh, config.model.seq_len)
    each = program.shape[0] * config.model.n_layers
    wanted, executed = (Counter({k: n / (1 if k == "flops" else each) for k, n in of.items()}) for of in (
        asked(traced.jaxpr.jaxpr), timing.executed(run, mesh.size)))  # fmt: skip
    live = _on_device(program.state) + sum(buffer.bytes for buffer in buffers)
    impl = choose_attention(config, machine.devices[0])[0]
    return Compiled(config, machine, mesh, program.shape[0], impl, peak, live, memory, expected, collectives,
                    wanted, executed if run else wanted, run, notes, time.perf_counter() - began)  # fmt: skip


@contextlib.contextmanager
def messages() -> Iterator[Callable[[], str]]:
    """Hides what compilers write to file descriptor 2, mostly noise. Yields a function that returns this text."""
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
    shards = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(lora.split(program.state.params)[0])]
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
    """Computes `measured_memory` by arithmetic, without the temporaries and as if `tensor` did not split activations."""
    params = _on_device(program.state.params)
    copies = 1 if program.shape[0] == 1 else 2  # a micro-batch's gradients, and the sum
    activations = saved_by_layers(jaxpr.jaxpr, config.model.n_layers) // sharding.batch_devices(mesh)
    return {
        "params": params,
        "optimizer": _on_device(program.state.opt_state),
        "gradients": copies * _on_device(lora.split(program.state.params)[0]),
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
            pairs = zip(eqn.outvars, eqn.params["jaxpr"].jaxpr.outvars, strict=True)
            stacked = [out.aval for out, each in pairs if out.aval.ndim > each.aval.ndim]  # what is carried has no L
            return sum(a.size * a.dtype.itemsize for a in stacked if a.ndim > 2)
        for inner in _inner(eqn):
            if saved := saved_by_layers(inner, n_layers):
                return saved
    return 0


# -- time ----------------------------------------------------------------------------------------------------------------


def asked(jaxpr, name: str = "") -> Counter:
    """Counts the matmuls of a jaxpr times their trip counts: "flops" of all; numbers of layers' "forward" and "backward" ones.

    Of attention kernels, the causal half counts. `name`: that of the operation around `jaxpr`.
    """
    total = Counter()
    read = {id(v) for v in (*jaxpr.outvars, *(v for eqn in jaxpr.eqns for v in eqn.invars))}
    for eqn in jaxpr.eqns:
        kind, inside = eqn.primitive.name, f"{name}/{eqn.source_info.name_stack}"
        if kind == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total["flops"] += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total[timing.direction(inside)] += 1
        elif kind.startswith("dot_product_attention"):  # cuDNN's: q k' and p v forward; five matmuls backward
            B, S, N, H = eqn.invars[0].aval.shape
            total["flops"] += (2 if "fwd" in kind else 5) * 2 * B * N * H * S * S / 2
        elif kind == "pallas_call":
            if read.isdisjoint(map(id, eqn.outvars)):  # its results are unused; XLA removes it
                continue
            if cost := eqn.params.get("cost_estimate"):
                total["flops"] += cost.flops
            elif "splash" in str(eqn.params.get("name")):  # it has no cost estimate
                floats = [v.aval.shape for v in eqn.invars if "float" in str(v.aval.dtype)]
                *B, N, S, H = max(floats, key=len)  # the queries come first; a single sequence has no B
                matmuls = next(n for part, n in timing.ATTENTION.items() if part in eqn.params["name"])
                total["flops"] += matmuls * 2 * math.prod(B) * N * H * S * S / 2
        else:
            times = eqn.params["length"] if kind == "scan" else 1
            devices = eqn.params["mesh"].size if kind == "shard_map" else 1
            for inner in _inner(eqn):
                for key, n in asked(inner, inside).items():
                    total[key] += times * n * (devices if key == "flops" else 1)
    return total


def no_prediction(compiled: Compiled) -> str:
    """Returns why no time can be predicted, or an empty string."""
    target = compiled.machine.target
    if target is None:
        return "nothing is known of this computer's speed"
    if not compiled.run:
        return "the compiler refused this step"
    if compiled.config.model.compute_dtype == "float32":
        return "the table has no rates for fp32"
    unknown = {k.name for k in compiled.run if k.kind == "attention"} - target.rates.attention.keys()
    unknown |= {k.name for k in compiled.run if k.kind == "unknown"}
    return f"the table lacks the speed of {', '.join(sorted(unknown))}" if unknown else ""


def step_milliseconds(compiled: Compiled, mfu: float | None = None) -> dict[str, dict[str, float]] | None:
    """Returns `timing.milliseconds` of the step, or None if there is `no_prediction`. `mfu`: None takes the target's range."""
    known = not no_prediction(compiled)
    return timing.milliseconds(compiled.run, compiled.mesh, compiled.machine, mfu) if known else None


def tokens_per_second(compiled: Compiled, mfu: float | None = None) -> dict[str, float] | None:
    """Returns the low, middle and high tokens/s per device, or None, as `step_milliseconds` does."""
    if not (parts := step_milliseconds(compiled, mfu)):
        return None
    tokens = compiled.config.train.tokens_per_step / compiled.mesh.size
    total = [sum(part[level] for part in parts.values()) / 1e3 for level in reversed(timing.LEVELS)]
    return {level: tokens / seconds for level, seconds in zip(timing.LEVELS, total, strict=True)}


def unwanted(collectives: list[hlo.Collective], mesh: jax.sharding.Mesh) -> list[str]:
    """Returns a warning for each kind of large collective that a well-sharded step does not need."""
    out = Counter()
    for c in collectives:
        if c.bytes < LARGE or c.size == 1:
            continue
        collective = f"{c.kind} of {c.dtype} over {' x '.join(c.axes)}"
        if c.kind == "all-reduce" and "fsdp" in c.axes and "tensor" not in c.axes:
            out[f"{collective}: a whole gradient, where a reduce-scatter would send half"] += c.bytes * c.trips
        elif c.kind == "all-to-all" or (c.kind == "all-gather" and not c.dtype.startswith(("bf", "f", "u8"))):
            out[f"{collective}: moves tokens or activations, which should stay where they are"] += c.bytes * c.trips
    return [f"{line} ({gib(n)} a step)" for line, n in out.items()]


def gib(n: float | None) -> str:
    """Formats bytes as GiB or MiB."""
    return "" if n is None else f"{n / 2**30:,.2f} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"
