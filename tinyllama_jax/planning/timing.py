"""Predicts the time of a step from its compiled program: what every kernel computes and moves, at the rates of `targets`."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from tinyllama_jax.planning import hlo, targets

LEVELS = ("low", "middle", "high")  # of milliseconds; the lowest time is the highest rate
CLASSES = ("matmuls", "attention", "elementwise", "copies", "exposed", "gaps")
# How many [S, S] x H matmuls each attention kernel executes per head: two forward, at least five in all backward kernels
ATTENTION = {"attention_forward": 2, "attention_dq": 3, "attention_dkv": 4, "splash_mha_fwd": 2, "splash_mha_dq": 3,
             "splash_mha_dkv": 4, "__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}  # fmt: skip
# Instructions that run no kernel, or overlap with all kernels (a TPU's copies and slices that end in "-start")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all",
        "opt-barrier", "copy-start", "copy-done", "slice-start", "slice-done"}  # fmt: skip
MOVES = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "reshape", "copy", "transpose", "convert", "slice",
         "dynamic-slice", "concatenate", "pad", "dynamic-update-slice", "broadcast", "iota"}  # fmt: skip
SLICES = ("slice", "dynamic-slice", "gather")


class Kernel(NamedTuple):
    """A kernel of a step on one device, or the start or end of a collective, in the order of execution."""

    kind: str  # matmuls, attention, elementwise, copies; send: a synchronous collective; start, done: an asynchronous one
    name: str  # for attention, a key of `ATTENTION`; for start and done, the start's name
    trips: int  # how often a step runs it
    flops: float = 0.0  # of one run
    bytes: float = 0.0  # read and written in the device's memory in one run
    sends: tuple[hlo.Collective, ...] = ()
    dots: tuple[str, ...] = ()  # JAX's names of the matmuls in it


# -- what a program runs ----------------------------------------------------------------------------------------------


def kernels(program: hlo.Program, mesh: jax.sharding.Mesh, seq_len: int) -> list[Kernel]:
    """Returns the kernels of a step in their order. `seq_len`: S of attention, whose FLOPs count only the causal half."""

    def walk(computation: str, trips: int) -> Iterator[Kernel]:
        inside = program.computations.get(computation, {})
        for one in inside.values():
            if one.op in ("while", "call", "conditional"):
                loop = one.op == "while"
                for callee in one.called("body") if loop else one.called():
                    yield from walk(callee, trips * program.trips(one) if loop else trips)
            elif one.op not in FREE:
                yield _kernel(program, computation, one, mesh, seq_len)._replace(trips=trips)

    return [kernel for kernel in walk(program.entry, 1) if kernel.kind]


def _kernel(program: hlo.Program, computation: str, one: hlo.Instruction, mesh, seq_len: int) -> Kernel:
    """Returns the kernel of an instruction that is not a loop; its kind is empty if it runs nothing."""
    inside = program.computations[computation]
    operands = [inside[name].type for name in one.operands if name in inside]
    kind = one.op.removesuffix("-start")
    if one.op.endswith("-done"):
        return Kernel("done", one.operands[0], 1)
    if kind in hlo.KINDS:
        return Kernel("send" if kind == one.op else "start", one.name, 1, sends=(*hlo.sends(program, computation, one, mesh),))
    fused = {}
    if one.op in ("fusion", "async-start"):
        (called,) = one.called("calls")
        fused = program.computations[called]
        collective = next((i for i in fused.values() if i.op in hlo.KINDS), None)
        if collective and one.op == "async-start":
            return Kernel("start", one.name, 1, sends=(*hlo.sends(program, called, collective, mesh),))
        if collective and "all-reduce-scatter" in called:
            return Kernel("send", one.name, 1, sends=(*hlo.sends(program, called, collective, mesh),))
    elif one.op == "custom-call":
        if name := re.search("|".join(map(re.escape, sorted(ATTENTION, reverse=True))), one.name + one.attributes):
            largest = max(math.prod(shape) for kind in operands for _, shape, _ in hlo.arrays(kind))  # q: [B, S, N, H]
            return Kernel("attention", name[0], 1, ATTENTION[name[0]] * largest * seq_len)
        target = re.search('custom_call_target="([^"]*)"', one.attributes)[1]
        if "matmul" not in target and "gemm" not in target:
            return Kernel("unknown" if re.search("triton|mosaic|tpu_custom|cudnn", target) else "", target, 1)
    dots = list(matmuls(program, computation, one))
    moved = _fused_bytes(fused, operands) if fused else _bytes(one.type, operands, one.op)
    of_arrays = {i.op for i in (fused or {one.name: one}).values() if any(shape for _, shape, _ in hlo.arrays(i.type))}
    kind = "matmuls" if dots else "copies" if of_arrays <= MOVES else "elementwise"
    return Kernel(kind, one.name, 1, sum(flops for _, flops in dots), moved, dots=tuple(name for name, _ in dots))


def _size(kind: str) -> int:  # bytes of a type in the device's memory
    return sum(hlo.n_bytes(dtype, shape) for dtype, shape, layout in hlo.arrays(kind) if "S(" not in layout)


def _bytes(kind: str, operands: list[str], op: str) -> int:
    """Returns the bytes that an instruction reads and writes. If it slices or updates an array, only that slice counts."""
    if op == "dynamic-update-slice":
        return 2 * _size(operands[1])
    return _size(kind) + (_size(kind) if op in SLICES else 0 if op == "broadcast" else sum(map(_size, operands)))


def _fused_bytes(fused: dict[str, hlo.Instruction], operands: list[str]) -> int:
    """Returns the bytes that a fusion reads and writes. If it slices or updates an array in place, only that slice counts."""
    users = defaultdict(list)
    for one in fused.values():
        for name in one.operands:
            users[name].append(one)

    def read(name: str, whole: int) -> int:
        total = 0
        for user in users[name]:
            first = user.operands[0] == name
            if user.op in SLICES and first:
                total += _size(user.type) or whole
            elif user.op in ("bitcast", "reshape"):
                total += read(user.name, whole)
            elif not (user.op == "dynamic-update-slice" and first):
                return whole
        return min(total, whole)

    def written(one: hlo.Instruction) -> int:
        inner = one
        while inner.op in ("bitcast", "reshape", "copy", "convert") and inner.operands[0] in fused:
            inner = fused[inner.operands[0]]
        return _size(fused[inner.operands[1]].type if inner.op == "dynamic-update-slice" else one.type)

    root = next(one for one in fused.values() if one.root)
    outputs = [fused[name] for name in root.operands] if root.op == "tuple" else [root]
    parameters = [one for one in fused.values() if one.op == "parameter"]
    return sum(map(written, outputs)) + sum(read(one.name, _size(operands[int(one.given)])) for one in parameters)


def matmuls(program: hlo.Program, computation: str, one: hlo.Instruction) -> Iterator[tuple[str, float]]:
    """Yields (JAX's name, FLOPs) of each matmul of an instruction or fusion."""
    contracted = re.search(r'lhs_contracting_dim\w*"?[=:][{[]([\d,"]*)', one.attributes)  # a dot's, or a library's matmul's
    if contracted or one.op == "convolution":
        shapes = [hlo.arrays(program.computations[computation][name].type)[0][1] for name in one.operands]
        out = hlo.arrays(one.type)[0][1]
        if contracted:
            summed = math.prod(shapes[0][int(n)] for n in re.findall(r"\d+", contracted[1]))
            yield one.op_name, 2.0 * math.prod(out) * summed
        else:
            yield one.op_name, _convolution(one.attributes, *shapes, out)
    for callee in one.called("calls"):
        for inner in program.computations[callee].values():
            yield from matmuls(program, callee, inner)


def _convolution(attributes: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> float:
    """Returns the FLOPs of a matmul that a TPU compiler writes as a convolution. Products with padding do not count."""
    labels = re.split("_|->", re.search(r"dim_labels=([\w>-]+)", attributes)[1])
    sizes = [dict(zip(names, shape, strict=True)) for names, shape in zip(labels, (left, right, out), strict=True)]
    axes = sorted(label for label in labels[0] if label.isdigit())
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", attributes) or [""])[0]))
    of = lambda name, default: window[name].split("x") if name in window else [default] * len(axes)
    total = 2.0 * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"]
    for axis, stride, pad, holes, apart in zip(
        axes, of("stride", "1"), of("pad", "0_0"), of("lhs_dilate", "1"), of("rhs_dilate", "1"), strict=True
    ):
        place = np.add.outer(np.arange(sizes[2][axis]) * int(stride), np.arange(sizes[1][axis]) * int(apart))
        place -= int(pad.split("_")[0])
        real = (place % int(holes) == 0) & (place >= 0) & (place // int(holes) < sizes[0][axis])
        total *= int(real.sum())
    return total


def executed(run: list[Kernel], devices: int) -> Counter:
    """Returns the "flops" of all matmuls and of attention on all devices, and how often each `direction` runs a matmul."""
    out = Counter({"flops": devices * sum(k.trips * k.flops for k in run)})
    for k in run:
        for name in k.dots:
            out[direction(name)] += k.trips
    return out


def direction(name: str) -> str:
    """Returns "forward" or "backward" by JAX's name of a matmul; "other" if it does not involve a layer's weights."""
    einsum = re.search(r"layers/+([a-z]+),([a-z]+)->([a-z]+)", name)
    if not einsum or set(einsum[1]) & set(einsum[2]) & set(einsum[3]):  # attention's are batched over sequences
        return "other"
    return "backward" if "transpose(" in name else "forward"


# -- how long it takes ----------------------------------------------------------------------------------------------------


def wire_seconds(collectives, mesh: jax.sharding.Mesh, machine: targets.Machine) -> float:
    """Returns the seconds that a step's collectives take as rings, one after another, at the links' full bandwidth."""
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
        if len(members) > 1:  # a ring leaves each node once; all groups of a node share its network
            slowest = max(slowest, sent * machine.per_node / max(members.values()) / target.between)
        seconds += c.trips * slowest
    return seconds


def milliseconds(run: list[Kernel], mesh: jax.sharding.Mesh, machine: targets.Machine, mfu: float | None = None) -> dict:
    """Predicts a step's milliseconds by class (of `CLASSES`) and level (of `LEVELS`).

    `mfu`: the achieved fraction of peak of matmuls, instead of the table's range. Raises KeyError for an attention kernel whose
    speed the table lacks.
    """
    wires = [wire_seconds(k.sends, mesh, machine) for k in run]
    levels = [_seconds(run, wires, machine.target, level, mfu) for level in (2, 1, 0)]  # the fastest rates give the lowest time
    return {kind: {name: 1e3 * at[kind] for name, at in zip(LEVELS, levels, strict=True)} for kind in CLASSES}


def _seconds(run: list[Kernel], wires: list[float], target: targets.Target, level: int, mfu: float | None) -> dict[str, float]:
    """Simulates a step. Collectives use the links one after another; the time for which a kernel must wait for one is exposed.
    Times are in seconds."""
    rates, out = target.rates, dict.fromkeys(CLASSES, 0.0)
    matmul, memory = (mfu or rates.matmul[level]) * target.flops, rates.memory[level] * target.bandwidth
    clock = links = 0.0
    ends = {}
    for k, wire in zip(run, wires, strict=True):
        spent, kind = 0.0, k.kind
        if kind in ("start", "send"):
            links = max(clock, links) + k.trips * (wire / rates.links[level] + rates.latency[level] * (wire > 0))
            ends[k.name] = links
        if kind in ("done", "send"):
            kind, spent = "exposed", max(0.0, ends.pop(k.name, 0.0) - clock)
        elif kind == "matmuls":
            spent = k.trips * max(k.flops / matmul, k.bytes / memory)
        elif kind == "attention":
            spent = k.trips * k.flops / (rates.attention[k.name] * 1e12 * (1 + (level - 1) * rates.error))
        elif kind != "start":
            spent = k.trips * k.bytes / memory
        if kind in out:
            out[kind] += spent
            gap = k.trips * rates.gap[level] * (kind != "exposed")
            out["gaps"] += gap
            clock += spent + gap
    return out
