"""The one command for generation: its speed, each row with whether what it generates is right.

    python tools/bench_generate.py [--size tiny] [--only decode,int8] [--demo runs/demo/run] [--output OUT.json]

    decode       batch 1 in fp32 at the 1.1B shape, ours and Transformers' generate by turns
    bfloat16 int8 int4 llama.cpp   batch 1 with small weights, and llama.cpp with a Q4_0 file of the same model
    speculative  a draft of one layer that agrees with the target 70% of the time
    ngram        SmolLM2 with prompt lookup, on a text to be summarised
    perplexity   what int8 and int4 cost against bf16, for SmolLM2 and for the model of --demo
    server       16 clients at once against one after the other; the first token while 16 others decode
    gpu          bf16 at batch 1 and 100; on a CPU only with --size tiny

Each part runs in a process of its own, one after another, within --minutes together. OUT.json and OUT.md are written after each
row. A part that fails leaves the others, and the command then ends with 1; a missed aim is a figure, not a failure. On a GPU it
takes at most 6 minutes, begins with the parts that have an aim there, and leaves out those of a CPU (llama.cpp, perplexity).
--size tiny rehearses all of it on a CPU in less than a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import bench_common as common

TOOLS = Path(__file__).parent
# least shares of the time; a part that takes less leaves it to the later ones
SHARE = {"decode": 0.2, "bfloat16": 0.08, "int8": 0.09, "int4": 0.09, "llama.cpp": 0.1, "speculative": 0.14, "ngram": 0.06,
         "perplexity": 0.08, "server": 0.1, "gpu": 0.06}  # fmt: skip
ON_GPU = ("gpu", "server", "decode", "speculative", "int8", "int4", "bfloat16", "ngram")  # in the order of their importance
MARKS = "<!-- {}: written by tools/bench_generate.py -->", "<!-- end -->"


def command(names: list[str], args: argparse.Namespace) -> list[str]:
    """The worker of some parts."""
    arguments = {"size": args.size, "demo": args.demo}
    return [str(TOOLS / "bench_generate_rows.py"), ",".join(names), json.dumps(arguments)]


def verdict(row: dict) -> str:
    """The correctness column."""
    return (
        "left out"
        if "left_out" in row
        else "FAILED"
        if row.get("failed")
        else {True: "right", False: "WRONG", None: ""}[row["ok"]]
    )


def cells(row: dict) -> list[str]:
    """The columns of a row: verdict, name, value and spread, memory, aim, notes."""
    number = lambda x: f"{x:,.0f}" if x >= 1_000 else f"{x:.4g}"
    value = f"{number(row['value'])} {row['unit']}" if "value" in row else ""
    value += f" ({number(row['low'])} to {number(row['high'])})" if "low" in row else ""
    sizes = [f"{row['gb']:.3g} GB"] if "gb" in row else []
    sizes += [f"{row['gb_per_s']:.4g} GB/s"] if "gb_per_s" in row else []
    goal, notes = "", [row[key] for key in ("note", "left_out") if row.get(key)] + (row.get("wrong") or [])
    if aim := row.get("aim"):
        reached = "not known here" if aim["value"] is None else number(aim["value"])
        goal = f"{aim['figure']}: {reached}" + (f", {'met' if aim['met'] else 'missed'} ({aim['aim']})" if aim["aim"] else "")
    if "first_token_seconds" in row:
        notes.append(f"first token after {row['first_token_seconds']:.3g} s")
    if row.get("programs"):
        notes.append(f"{row['programs']} programs compiled in {row['compile_seconds']:.3g} s")
    return [verdict(row), row["row"], value, ", ".join(sizes), goal, "; ".join(notes)]


def table(content: dict) -> str:
    """The Markdown of OUT.md: machine, command, and a table of the rows so far."""
    device = content.get("machine", {}).get("device", {})
    load = content.get("machine", {}).get("load", [math.nan])[0]
    versions = ", ".join(f"{k} {v}" for k, v in content.get("machine", {}).get("versions", {}).items() if v)
    head = ["right?", "row", "measured (median, least to most)", "weights", "aim", "notes"]
    lines = [
        f"`python {' '.join(content['command'])}`, {content['time']}: {device.get('kind', 'no device yet')}, "
        f"{content['cpus']} cores, load {load:.1f} at the start; Python {content['python']}, {versions}.",
        "",
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
    ]
    return "\n".join(lines + [f"| {' | '.join(cells(row))} |" for row in content["rows"]]) + "\n"


def save(content: dict, args: argparse.Namespace) -> None:
    """Writes OUT.json and OUT.md, and fills the part of --page for this kind of device."""
    common.save(args.output, content)
    args.output.with_suffix(".md").write_text(table(content))
    if args.page and (platform := content.get("machine", {}).get("device", {}).get("platform")):
        before, after, text = MARKS[0].format(platform), MARKS[1], args.page.read_text()
        start = text.index(before) + len(before)
        args.page.write_text(text[:start] + "\n" + table(content) + text[text.index(after, start) :])


def measure(names: list[str], seconds: float, content: dict, args: argparse.Namespace) -> None:
    """Runs some parts in one process and takes their rows as they come. What did not get to its end is a failed row."""
    pending = list(names)
    try:
        for row in common.stream(command(names, args), seconds):
            if "machine" in row:
                content.setdefault("machine", row["machine"])
                pending = names[names.index(row["part"]) + 1 :]
            else:
                add(row, content, args)
    except common.Ended as e:
        done = {row["part"] for row in content["rows"]}
        for name in [n for n in names if n not in done] or [names[-1]]:
            add({"part": name, "row": name, "ok": False, "wrong": [str(e)], "failed": True}, content, args)
        pending = []
    for name in pending:
        add({"part": name, "row": name, "ok": False, "wrong": ["did not run"], "failed": True}, content, args)


def add(row: dict, content: dict, args: argparse.Namespace) -> None:
    """Prints a row and writes the report."""
    content["rows"].append(row)
    mark, name, value, *others = cells(row)
    print(f"{mark:8}  {name:44}  {value:44}  {'; '.join(filter(None, others))}", flush=True)
    save(content, args)


def on_gpu() -> bool:
    """Whether there is one, by its driver: JAX in this process would take the GPU's memory from the parts."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("1b", "tiny"), default="1b", help="tiny: a rehearsal on any machine (1b)")
    parser.add_argument("--only", type=common.some_of(*SHARE), help="parts to run (all; on a GPU all but llama.cpp,perplexity)")
    parser.add_argument("--demo", metavar="RUN", help="a run folder, for the perplexity of its model, such as make demo writes")
    parser.add_argument("--minutes", type=common.positive, help="minutes for all parts together (6 on a GPU, 45 on a CPU)")
    parser.add_argument(
        "--output", type=common.output, help="the report (benchmarks/DATE_generate.json, tiny: runs/generate.json)"
    )
    parser.add_argument("--page", type=Path, help="a Markdown page whose table for this device is replaced (none)")
    args = parser.parse_args()
    if args.page and not (args.page.is_file() and MARKS[1] in args.page.read_text()):
        parser.error(f"--page {args.page}: no such file, or without the marks of a table as in benchmarks/generate.md")
    if args.demo and not (Path(args.demo) / "checkpoints").is_dir():
        parser.error(f"--demo {args.demo}: not a run folder with checkpoints; make demo writes runs/demo/run")
    dated = Path(__file__).parents[1] / "benchmarks" / f"{time.strftime('%Y-%m-%d')}_generate.json"
    args.output = args.output or (dated if args.size == "1b" else common.output("runs/generate.json"))
    common.end_on_sigterm()
    content = common.header(args) | {"rows": [], "whole": False}
    order = list(ON_GPU) if on_gpu() else list(SHARE)
    names = [name for name in dict.fromkeys([*order, *SHARE]) if name in (common.parts(args.only) if args.only else order)]
    deadline = time.monotonic() + 60 * (args.minutes or (6 if on_gpu() else 45))
    began, shares = time.monotonic(), sum(SHARE[name] for name in names)
    total, later = deadline - began, shares
    with contextlib.ExitStack() as at_the_end:
        if on_gpu() and "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # some programs are those of several parts
            os.environ["JAX_COMPILATION_CACHE_DIR"] = at_the_end.enter_context(tempfile.TemporaryDirectory())
        # tiny models start in less time than their processes
        for some in [names] if args.size == "tiny" else [[name] for name in names]:
            later -= sum(SHARE[name] for name in some)
            measure(some, max(5, deadline - time.monotonic() - later / shares * total), content, args)
    wrong = [row for row in content["rows"] if row["ok"] is False]
    content["whole"], content["seconds"] = not wrong, time.monotonic() - began
    save(content, args)
    print(f"{len(wrong)} rows are wrong or failed; {args.output.with_suffix('.md')} has the table", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
