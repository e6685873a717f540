"""Reads a compiled program's collectives and memory from XLA's text dumps."""

import math
import re
from typing import NamedTuple

import jax
import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.+?) ([\w-]+)\(([^)]*)\)(.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?((?:%[\w.-]+(?:, )?)+)")


class Collective(NamedTuple):
    """An array that a program sends between devices. XLA packs several into one operation."""

    kind: str  # of KINDS; next to a matmul, TPU compilers turn gathers and reduce-scatters into rings of permutes
    dtype: str  # as in HLO: "bf16"
    bytes: int  # of the whole array, before a scatter or after a gather; for a permute, of what one device sends
    axes: tuple[str, ...]  # the mesh axes along which the devices of a group differ
    size: int  # devices in a group
    trips: int  # how often a step runs it: the product of the loops around it
    layers: bool  # whether it is inside the loop over layers
    op_name: str  # JAX's name of the operation or of the loop around it; empty if the compiler dropped it


def collectives(hlo: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """Returns every collective in `hlo`, the text (`compiled.as_text()`) of a program compiled for `mesh`."""
    types, called_by, calls, inside, computation = {}, {}, {}, {}, ""
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%(\S+) \(", line):
            computation = header[1]
        if not (m := _INSTRUCTION.match(line)):
            continue
        name, types[name], op, operands, attributes = m[1], m[2], m[3], m[4], m[5]
        inside.setdefault(computation, {})[name] = (op, operands, line)
        for callee in re.findall(r"%([\w.-]+)", " ".join(_CALLED.findall(attributes))):
            called_by.setdefault(callee, (computation, op, attributes))
        kind = op.removesuffix("-start")
        if kind in KINDS:
            # TPU compilers write the parts of one operation that runs beside others, each with its channel, shape and name.
            # one line for the start and end of a GPU's collective; one that pipelining moved out of a loop keeps its channel
            channel = re.search(r"channel_id=\d+|$", attributes)[0]
            one = name if op != kind and kind != "collective-permute" else channel or name
            part = (kind, one, types[name].split("{")[0], _op_name(attributes))
            calls.setdefault(part, (operands, attributes, computation))

    def loops(inner: str) -> list[tuple[int, str]]:  # (trips, op_name) of each loop around a computation
        out = []
        while inner in called_by:
            inner, op, attributes = called_by[inner]
            if op == "while":
                condition, body = (inside[re.search(rf"{part}=%([\w.-]+)", attributes)[1]] for part in ("condition", "body"))
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes)
                out.append((int(known[1]) if known else _trips(condition, body), _op_name(attributes)))
        return out

    out = []
    for (kind, *_), (operands, attributes, computation) in calls.items():
        axes = _axes(attributes, mesh)
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
                        op_name=_op_name(attributes) or (around[0][1] if around else ""),
                    )
                )
    return out


def _trips(condition: dict[str, tuple[str, str, str]], body: dict[str, tuple[str, str, str]]) -> int:
    """Returns the trips of a loop that counts from 0: the condition's constant over the body's increment (2 in TPU rings)."""
    numbers = lambda part: {
        name: int(operands) for name, (op, operands, _) in part.items() if op == "constant" and operands.isdigit()
    }
    counters = [re.search(r"index=(\d+)", line)[1] for op, _, line in condition.values() if op == "get-tuple-element"]
    step = 1
    for op, operands, line in body.values():
        if op == "tuple" and line.lstrip().startswith("ROOT") and len(counters) == 1:
            counter = re.findall(r"%([\w.-]+)", operands)[int(counters[0])]
            added = [numbers(body)[name] for name in re.findall(r"%([\w.-]+)", body[counter][1]) if name in numbers(body)]
            step = added[0] if added else 1
    return -(-max([1, *numbers(condition).values()]) // max(step, 1))


def _op_name(attributes: str) -> str:
    name = re.search(r'op_name="([^"]*)"', attributes)
    return name[1] if name else ""


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])


def _axes(attributes: str, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """Returns the mesh axes that differ within a group of devices. HLO numbers devices in mesh order."""
    names, sizes = mesh.axis_names, mesh.devices.shape
    number = lambda text: [int(n) for n in re.findall(r"\d+", text)]
    if m := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", attributes):
        groups = [number(group) for group in re.findall(r"\{([\d,]+)\}", m[1])]
    elif m := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        order = np.arange(math.prod(sizes)).reshape(number(m[3])).transpose(number(m[4]) if m[4] else None)
        groups = order.reshape(int(m[1]), int(m[2]))
    elif m := re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", attributes
    ):
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


# -- memory -----------------------------------------------------------------------------------------------------------


class Buffer(NamedTuple):
    """A buffer that is alive at a program's peak of memory."""

    bytes: int
    dtype: str
    shape: tuple[int, ...]  # on one device


_ALLOCATION = re.compile(r"allocation (\d+): size \d+, (parameter )?")
_VALUE = re.compile(r"\s*value: <\d+ (\S+)(?: \(phi\))? @0> \(size=(\d+),offset=(\d+)\): (\w+)\[([\d,]*)\]")  # @1: VMEM


def at_peak(assignment: str, live_range: str) -> list[Buffer]:
    """Returns the buffers that are alive at a program's peak of memory, without its arguments.

    The texts are XLA's dumps (`xla_dump_to`) ...-buffer-assignment.txt and ...-live-range.txt. Because of fragmentation a
    program needs more than the sum of these buffers and its arguments.
    """
    places, values, allocation = {}, {}, ("", None)
    for line in assignment.splitlines():
        if m := _ALLOCATION.match(line):
            allocation = m.groups()
        elif (m := _VALUE.match(line)) and not allocation[1]:
            name, size, offset, dtype, dims = m.groups()
            values[name] = allocation[0], offset
            places[name] = Buffer(int(size), dtype, tuple(int(d) for d in dims.split(",") if d))
    peak = live_range[live_range.find("(peak):") :].partition("\n")[2]
    out = {}  # each place once: a value that a loop carries has another name inside the loop
    for line in peak.splitlines():
        if not (m := re.match(r"\s+(\S+?)(?:\{\})?: \d+ bytes", line)):
            break
        if m[1] in values:
            out.setdefault(values[m[1]], places[m[1]])
    return list(out.values())
