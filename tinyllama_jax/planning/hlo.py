"""Reads a compiled program's collectives and memory from XLA's text dumps."""

import math
import re
from typing import NamedTuple

import jax
import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (.+?) ([\w-]+)\(([^)]*)\)(.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?((?:%[\w.-]+(?:, )?)+)")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    """An instruction of a program."""

    name: str
    type: str
    op: str
    operands: list[str]
    given: str  # the text between the parentheses: the operands, or a constant's value
    attributes: str  # the text after the parentheses
    root: bool  # whether its computation returns its result

    @property
    def op_name(self) -> str:
        """JAX's name of the operation, or an empty string if the compiler dropped it."""
        name = re.search(r'op_name="([^"]*)"', self.attributes)
        return name[1] if name else ""

    def called(self, *how: str) -> list[str]:
        """Returns the names of the computations that it calls; with `how`, only those called as, say, "body"."""
        if how:
            return [m[1] for part in how if (m := re.search(rf"\b{part}=%([\w.-]+)", self.attributes))]
        return re.findall(r"%([\w.-]+)", " ".join(_CALLED.findall(self.attributes)))


class Program(NamedTuple):
    """A compiled program, read from its text."""

    computations: dict[str, dict[str, Instruction]]  # name -> its instructions by name, in the order of execution
    entry: str  # the name of the computation that runs first

    def trips(self, loop: Instruction) -> int:
        """Returns the trip count of a loop, an instruction "while"."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        condition, body = (self.computations[part] for part in loop.called("condition", "body"))
        return int(known[1]) if known else _trips(condition, body)


def parse(text: str) -> Program:
    """Reads the text of a program, `compiled.as_text()`."""
    computations, entry, computation = {}, "", ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%(\S+) \(", line):
            computation, entry = header[2], header[2] if header[1] else entry
        elif m := _INSTRUCTION.match(line):
            root, name, kind, op, given, attributes = m.groups()
            operands = re.findall(r"%([\w.-]+)", given)
            one = Instruction(name, kind, op, operands, given, attributes, bool(root))
            computations.setdefault(computation, {})[name] = one
    return Program(computations, entry)


def arrays(kind: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Returns (dtype, shape, layout) of each array of a type. An array whose layout has S(1) is in a TPU's VMEM."""
    sizes = lambda dims: tuple(int(n) for n in dims.split(",") if n)
    return [(dtype, sizes(dims), layout or "") for dtype, dims, layout in _ARRAY.findall(kind) if dtype != "token"]


def n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Returns the bytes of an array."""
    return math.prod(shape) * (8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])) // 8


class Collective(NamedTuple):
    """An array that a program sends between devices. XLA packs several into one operation."""

    kind: str  # of KINDS; next to a matmul, TPU compilers turn gathers and reduce-scatters into rings of permutes
    dtype: str  # as in HLO: "bf16"
    bytes: int  # of the whole array, before a scatter or after a gather; for a permute, of the part that one device sends
    axes: tuple[str, ...]  # the mesh axes along which the devices of a group differ
    size: int  # devices in a group
    trips: int  # how often a step runs it: the product of the loops around it
    layers: bool  # whether it is inside the loop over layers
    op_name: str  # JAX's name of the operation or of the loop around it; empty if the compiler dropped it


def collectives(program: Program, mesh: jax.sharding.Mesh) -> list[Collective]:
    """Returns every collective of a program compiled for `mesh`."""
    called_by, calls = {}, {}
    for computation, inside in program.computations.items():
        for one in inside.values():
            for callee in one.called():
                called_by.setdefault(callee, (computation, one))
            kind = one.op.removesuffix("-start")
            if kind in KINDS:
                # TPU compilers write an asynchronous collective in parts, each with its channel, shape and name. GPU compilers
                # write one line for its start and one for its end; if pipelined out of a loop it keeps its channel
                channel = re.search(r"channel_id=\d+|$", one.attributes)[0]
                name = one.name if one.op != kind and kind != "collective-permute" else channel or one.name
                calls.setdefault((kind, name, one.type.split("{")[0], one.op_name), (one, computation))

    def loops(inner: str) -> list[Instruction]:  # around a computation
        out = []
        while inner in called_by:
            inner, caller = called_by[inner]
            out += [caller] * (caller.op == "while")
        return out

    out = []
    for one, computation in calls.values():
        around = loops(computation)
        trips = math.prod(map(program.trips, around))
        layers = any(re.search(r"Llama[^/]*/while", loop.op_name) for loop in around)
        op_name = one.op_name or (around[0].op_name if around else "")
        out += [sent._replace(trips=trips, layers=layers, op_name=op_name) for sent in sends(program, computation, one, mesh)]
    return out


def sends(program: Program, computation: str, one: Instruction, mesh: jax.sharding.Mesh) -> list[Collective]:
    """Returns what one run of a collective sends, array by array."""
    axes, kind = _axes(one.attributes, mesh), one.op.removesuffix("-start")
    size = math.prod(mesh.shape[a] for a in axes)
    whole = size if kind == "all-gather" else 1
    if "all-reduce-scatter" in computation:  # TPU compilers write a reduce-scatter as an all-reduce fused with a slice
        kind = "reduce-scatter"
    sent = [array for name in one.operands for array in arrays(program.computations[computation][name].type)]
    return [Collective(kind, dtype, n_bytes(dtype, shape) * whole, axes, size, 1, False, "") for dtype, shape, _ in sent]


def _trips(condition: dict[str, Instruction], body: dict[str, Instruction]) -> int:
    """Returns the trip count of a loop that counts from 0: the condition's limit / the body's increment (2 in TPU rings)."""
    numbers = lambda part: {i.name: int(i.given) for i in part.values() if i.op == "constant" and i.given.isdigit()}
    counters = [re.search(r"index=(\d+)", i.attributes)[1] for i in condition.values() if i.op == "get-tuple-element"]
    step = 1
    for one in body.values():
        if one.op == "tuple" and one.root and len(counters) == 1:
            counter = body[one.operands[int(counters[0])]]
            added = [numbers(body)[name] for name in counter.operands if name in numbers(body)]
            step = added[0] if added else 1
    return -(-max([1, *numbers(condition).values()]) // max(step, 1))


def _axes(attributes: str, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of a group differ. HLO numbers devices in mesh order."""
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

    The texts are XLA's dumps (`xla_dump_to`) ...-buffer-assignment.txt and ...-live-range.txt. Because of fragmentation the
    peak is more than the sum of these buffers and the arguments.
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
    out = {}  # each place counts once: inside a loop, a value that it carries has another name
    for line in peak.splitlines():
        if not (m := re.match(r"\s+(\S+?)(?:\{\})?: \d+ bytes", line)):
            break
        if m[1] in values:
            out.setdefault(values[m[1]], places[m[1]])
    return list(out.values())
