"""Where the time of a train step goes: a trace of some steps, and a table of their operations by time.

    python tools/profile_step.py [--model 1b] [--seqs 8] [--remat none] [--attention auto] [--steps 5] [--out runs/profile]

Synthetic tokens, the step that `train` runs, one device. OUT gets the trace (xprof, TensorBoard's profile plugin and
ui.perfetto.dev read it), the compiled program's text, and the whole table as JSON. The table is read from the trace with jax
alone: each operation's own time (a loop's is not that of its body), percent of the steps' time, times it ran, what kind it is,
and the part of the source that it comes from. On a CPU operations run side by side: the percents are of all of them together.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import bench_common as common
import bench_train

from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError

KINDS = (  # the first whose words stand in an instruction, the computation that it calls, or its kernel's name
    ("collective", r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|send|recv)(-start|-done)?\(|nccl"),
    ("attention", r"__cudnn\$fmha|fmha|flash|splash|sdpa|custom-call\([^\n]*attention"),
    ("matmul", r"\b(dot|convolution)\(|__cublas|__triton_gemm|gemm|nvjet|cutlass|xmma"),
    ("kernel", r"custom-call\("),
    ("scatter, gather", r"\b(scatter|gather)\("),
    ("sort, random", r"\b(sort|rng|rng-bit-generator)\("),
    ("copy", r"^[^\n]* (copy|copy-start|copy-done|transpose|broadcast)\(|memcpy|memset"),
    ("fusion", r"\bfusion\("),
)
MOVES = {"parameter", "constant", "copy", "transpose", "bitcast", "broadcast", "slice", "dynamic-slice", "dynamic-update-slice",
         "reshape", "concatenate", "pad", "iota", "tuple", "get-tuple-element", "convert"}  # fmt: skip


def instructions(hlo: str) -> dict[str, tuple[str, str]]:
    """Name -> (its line, then those of the computation that a fusion calls; the source scope in its metadata or theirs)."""
    bodies: dict[str, list[str]] = {}
    lines, inside = {}, None
    for line in hlo.splitlines():
        if opens := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            bodies[inside := opens[1]] = []
        elif inside and (named := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)):
            bodies[inside].append(line)
            lines[named[1]] = line
    out = {}
    for name, line in lines.items():
        called = re.search(r" fusion\(.*calls=%?([\w.\-]+)", line)
        body = bodies.get(called[1], []) if called else []
        # a fusion with a matmul is where the matmul is from, whatever stands at its root
        order = [*(x for x in body if " dot(" in x), line, *reversed(body)]
        scope = next((match[1] for x in order if (match := re.search(r'op_name="([^"]*)"', x))), "")
        out[name] = out[name.replace(".", "_")] = ("\n".join([line, *body]), scope)  # GPU kernels' names have no dots
    return out


def kind_of(text: str, kernel: str) -> str:
    """What sort of work an instruction is; a fusion that only moves and converts values is a copy."""
    kind = next((kind for kind, words in KINDS if re.search(words, f"{text}\n{kernel}", re.IGNORECASE)), "other")
    steps = re.findall(r"\n[^\n=]* = \S+ ([\w\-]+)\(", text)
    return "copy" if kind == "fusion" and steps and set(steps) <= MOVES else kind


def short(scope: str) -> str:
    """The scope without what every operation has: "jit(<lambda>)/jvp(...)/while/body/closed_call/checkpoint/"."""
    back = "transpose(jvp" in scope
    while (bare := re.sub(r"\b(jit|jvp|transpose|vmap|custom_vjp)\(([^()]*)\)", r"\2", scope)) != scope:
        scope = bare
    noise = (
        "while",
        "body",
        "closed_call",
        "checkpoint",
        "<lambda>",
        "cond",
        "rematted_computation",
        "custom_vjp_call",
        "remat",
    )
    return ("backward " if back else "") + "/".join([part for part in scope.split("/") if part and part not in noise][-4:])


def result_of(text: str) -> str:
    """The type of an instruction's result, for one that does not say where it is from."""
    match = re.match(r"[^=]* = (\(.*?\)|\S+) ", text)
    return match[1] if match else ""


def own_times(events: Iterable[tuple[float, float, str]]) -> list[tuple[str, float]]:
    """(name, its own time) of the (start, end, name) of one line: what runs within an event is taken off it."""
    out, stack = [], []  # stack: [end, index in out]
    for start, end, name in sorted(events, key=lambda e: (e[0], -e[1])):
        while stack and stack[-1][0] <= start:
            stack.pop()
        if stack:
            out[stack[-1][1]][1] -= min(end, stack[-1][0]) - start
        stack.append((end, len(out)))
        out.append([name, end - start])
    return [(name, max(own, 0.0)) for name, own in out]


def union(spans: list[tuple[float, float]]) -> float:
    """Length of what the spans cover together."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def operations(planes: Iterable) -> Iterable[list[tuple[float, float, str, str]]]:
    """Of each line of the trace on which a device's operations stand: (start, end in ns, HLO name, kernel's name)."""
    planes = list(planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and "CUSTOM" not in plane.name]
    for plane in devices or [plane for plane in planes if plane.name == "/host:CPU"]:
        lines = list(plane.lines)
        named = [line for line in lines if line.name == "XLA Ops"]  # TPU; the other lines there say the same once more
        for line in named or [line for line in lines if not devices or line.name.startswith("Stream")]:
            out = []
            for event in line.events:
                stats = {k: v for k, v in event.stats if k == "hlo_op"}
                name = str(stats.get("hlo_op", event.name if devices else ""))  # a CPU's lines are threads, which do much else
                if name and event.duration_ns:
                    name = re.match(r"%?([\w.\-]+)", name)[1] if re.match(r"%?[\w.\-]+", name) else name
                    out.append((event.start_ns, event.start_ns + event.duration_ns, name, event.name))
            yield out


def table(planes: Iterable, hlo: str, steps: int, seconds: float) -> dict:
    """Rows by time, and sums by kind. `seconds`: that the `steps` took in all."""
    known, rows, spans = instructions(hlo), {}, []
    for line in operations(planes):
        kernels = {name: kernel for _, _, name, kernel in line}
        for name, own in own_times(event[:3] for event in line):
            text, scope = known.get(name, ("", ""))
            kind = kind_of(text, kernels[name])
            row = rows.setdefault(
                name,
                {
                    "name": name,
                    "kind": kind,
                    "scope": short(scope) or result_of(text),
                    "kernel": kernels[name],
                    "ns": 0.0,
                    "times": 0,
                },
            )
            row["ns"] += own
            row["times"] += 1
        spans += [event[:2] for event in line if not event[2].startswith(("while", "call", "conditional"))]
    total = sum(row["ns"] for row in rows.values()) or 1.0
    busy, kinds = union(spans) / 1e9, {}
    for row in rows.values():
        row |= {"ms_per_step": row["ns"] / 1e6 / steps, "percent": 100 * row.pop("ns") / total, "times": row["times"] / steps}
        kinds[row["kind"]] = kinds.get(row["kind"], 0.0) + row["percent"]
    return {
        "steps": steps,
        "step_ms": seconds / steps * 1e3,
        "busy_percent": 100 * busy / seconds,
        "idle_percent": 100 * max(0.0, 1 - busy / seconds),
        "kinds": dict(sorted(kinds.items(), key=lambda kv: -kv[1])),
        "rows": sorted(rows.values(), key=lambda row: -row["percent"]),
    }


def trace(cell: dict, out: Path) -> dict:
    """Runs the steps, warm, under the profiler; writes OUT; returns the table."""
    import jax

    from tinyllama_jax.core.program import choose_attention

    config = bench_train.config_of(cell)
    program, compiled, batch, params, _ = bench_train.prepare(config, cell)
    impl, reason = choose_attention(config, jax.devices()[0])
    state = program.start(params)
    del params
    for _ in range(common.WARM_UP):
        state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    out.mkdir(parents=True, exist_ok=True)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's frames are most of a trace, and slow it down
    with jax.profiler.trace(str(out), profiler_options=options):
        began = time.perf_counter()
        for i in range(cell["steps"]):
            with jax.profiler.StepTraceAnnotation("train", step_num=i):
                state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - began
    hlo = compiled.as_text()
    (out / "step.hlo.txt").write_text(hlo)
    newest = max(out.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    result = table(jax.profiler.ProfileData.from_file(str(newest)).planes, hlo, cell["steps"], seconds)
    result |= {"trace": str(newest), "device": jax.devices()[0].device_kind, "jax": jax.__version__, "cell": cell}
    result["attention"] = f"{impl} ({reason})"
    common.save(out / "table.json", result)
    return result


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=common.SHAPES, default="1b")
    parser.add_argument("--seq-len", type=int, help="2048 unless said; 256 for the small models")
    parser.add_argument("--seqs", type=lambda text: int(common.counts(text)), default=8, help="sequences on the device")
    parser.add_argument("--remat", choices=c.REMAT, default="none")
    parser.add_argument("--attention", choices=c.ATTENTION, default="auto")
    parser.add_argument("--loss-chunk", type=int, default=2048)
    parser.add_argument("--steps", type=lambda text: int(common.counts(text)), default=5)
    parser.add_argument("--top", type=int, default=25)
    parser.add_argument("--out", type=lambda text: common.output(text + "/table.json").parent, default="runs/profile")
    args = parser.parse_args()
    args.seq_len = args.seq_len or (2048 if args.model == "1b" else 256)
    try:
        result = trace({k: v for k, v in vars(args).items() if k not in ("out", "top")}, args.out)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.code)
    print(f"{result['device']}, {result['step_ms']:.1f} ms a step with the profiler on; busy {result['busy_percent']:.1f}%, "
          f"idle {result['idle_percent']:.1f}%. Of the operations' time:")  # fmt: skip
    print(f"  attention: {result['attention']}")
    print("  " + ", ".join(f"{kind} {percent:.1f}%" for kind, percent in result["kinds"].items()))
    for row in result["rows"][: args.top]:
        what = f"{row['kind']:15} {row['name'][:36]:36} {row['scope'] or row['kernel']}"
        print(f"{row['percent']:5.1f}% {row['ms_per_step']:9.3f} ms {row['times']:6.0f} x  {what}")
    print(json.dumps({"table": str(args.out / "table.json"), "trace": result["trace"]}))


if __name__ == "__main__":
    main()
