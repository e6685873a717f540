"""The one command for a machine with a GPU: it checks the kernels, measures speed, and compares it with `plan`.

    python tools/bench_gpu.py [--minutes 10] [--size tiny] [--out runs/gpu]

Four parts, one after another, within --minutes together:

    check    every attention that this device can run, against fp64; our Triton kernel first (its assembly runs nowhere else)
    kernels  matmuls, attention including cuDNN's and PyTorch's, the loss head            (bench_kernels.py)
    step     the 1.1B's train step, and PyTorch's at its best                             (bench_train.py)
    trace    three steps under the profiler, and a table of their operations              (profile_step.py)

Meanwhile `plan` compiles the same step on the CPU; at the end its memory and time are compared with the measured ones.
OUT/gpu.json and OUT/gpu.md are written after each row, and each part writes its own report to OUT. If a part fails or runs
out of time, the report says so, and the next parts run. --size tiny rehearses all of it on a CPU in a few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import bench_common as common
import bench_train

from tinyllama_jax.base import config as c
from tinyllama_jax.planning import targets

TOOLS = Path(__file__).parent
SHARE = {"check": 0.15, "kernels": 0.3, "step": 0.4, "trace": 0.15}  # least shares of the time; unused time goes to later parts
GRACE = 20  # seconds that a part has to end by itself after its --minutes
COMPARED = {  # figure -> (its name, its value in plan's JSON, its value in the step's row)
    "peak": ("GiB at the peak", lambda plan: plan["peak_bytes_per_device"] / 2**30, lambda row: row["peak_bytes"] / 2**30),
    "rate": ("tokens/s", lambda plan: plan.get("tokens_per_second_per_device"), lambda row: row["tokens_per_second"]),
}


class Report:
    """OUT/gpu.json and OUT/gpu.md."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.lock = args, threading.Lock()
        self.content = common.header(args) | {"parts": {}, "plan": {}, "whole": False}

    def save(self) -> None:
        """Writes both files."""
        with self.lock:
            common.save(self.args.out / "gpu.json", self.content)
            (self.args.out / "gpu.md").write_text(page(self.content))

    def part(self, name: str, command: list[str], seconds: float) -> None:
        """Runs one part and records each line as it comes; kills it after `seconds` and `GRACE`."""
        part = self.content["parts"][name] = {"command": command[1:], "lines": [], "rc": None, "report": None}
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        timer = threading.Timer(seconds + GRACE, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                part["lines"].append(line.rstrip())
                self.save()
            part["rc"] = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
        part["seconds"] = time.monotonic() - began
        file = self.args.out / ("trace/table.json" if name == "trace" else f"{name}.json")
        part["report"] = json.loads(file.read_text()) if file.is_file() else None
        self.save()


def plan(report: Report, on: str, cell: dict, deadline: float) -> None:
    """Runs `plan` for each number of sequences of `cell` on one device of this kind; records its JSON or why it has none."""
    for seqs in map(int, common.parts(cell["seqs"])):
        cpu = on.startswith("cpu")
        one = bench_train.config_of(cell | {"seqs": seqs}, compute="float32" if cpu else "bfloat16")
        file = report.args.out / f"config-{seqs}.json"
        file.write_text(c.to_json(one))
        command = [sys.executable, "-m", "tinyllama_jax.plan", "--config", str(file), "--on", on, "--json"]
        env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(TOOLS.parent)}
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=max(1, deadline - time.monotonic()))
            result = json.loads(done.stdout) if done.stdout else {"left_out": (done.stderr.splitlines() or ["no result"])[-1]}
        except subprocess.TimeoutExpired:
            result = {"left_out": "not done in time"}
        report.content["plan"][seqs] = result
        report.save()


def beside(content: dict) -> list[str]:
    """Returns a Markdown table of memory and tokens/s, predicted by `plan` and measured, for each number of sequences."""
    rows = (content["parts"].get("step", {}).get("report") or {}).get("rows", [])
    measured = {row["seqs"]: row for row in rows if row["row"] == "jax" and row.get("ok")}
    out = ["| sequences | figure | plan | measured | measured / plan |", "|---|---|---|---|---|"]
    for seqs, predicted in content["plan"].items():
        if "left_out" in predicted:
            out.append(f"| {seqs} | plan | {predicted['left_out']} | | |")
            continue
        for what, of_plan, of_row in COMPARED.values():
            value = of_plan(predicted)
            low, middle, high = (value[k] for k in ("low", "middle", "high")) if isinstance(value, dict) else [value] * 3
            text = "none" if not middle else f"{middle:,.2f}" if low == high else f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"
            real = of_row(measured[int(seqs)]) if int(seqs) in measured else None
            ratio = f"{real / middle:.2f}" if real and middle else ""
            out.append(f"| {seqs} | {what} | {text} | {'' if real is None else f'{real:,.2f}'} | {ratio} |")
    return out


def page(content: dict) -> str:
    """Returns the text of OUT/gpu.md."""
    device = next((r["device"] for p in content["parts"].values() if (r := p["report"] or {}).get("device")), {})
    kind = device if isinstance(device, str) else device.get("kind", "not known yet")
    out = [
        f"# Figures of {kind}, {content['time']}",
        "",
        f"`python {' '.join(content['command'])}`, Python {content['python']}.",
    ]
    for name, part in content["parts"].items():
        ended = "" if part["rc"] == 0 else ", still running" if part["rc"] is None else f", ended with {part['rc']}"
        spent = f" ({part['seconds']:.0f} s{ended})" if "seconds" in part else ended
        out += ["", f"## {name}{spent}", "", "```", *part["lines"], "```"]
    if content["plan"]:
        out += ["", "## predicted by plan and measured", "", *beside(content)]
    return "\n".join(out) + "\n"


def commands(args: argparse.Namespace, seqs: str) -> dict[str, list[str]]:
    """Returns the command of each part, without its --minutes."""
    kernels, out = str(TOOLS / "bench_kernels.py"), args.out
    size = ["--size", args.size]
    of_model = ["--model", args.size, "--seq-len", str(args.seq_len)]
    return {
        "check": [kernels, *size, "--only", "check", "--json", str(out / "check.json")],
        "kernels": [kernels, *size, "--only", "matmul,attention,loss", "--json", str(out / "kernels.json")],
        "step": [str(TOOLS / "bench_train.py"), *of_model, "--seqs", seqs, "--json", str(out / "step.json")],
        "trace": [str(TOOLS / "profile_step.py"), *of_model, "--seqs", common.parts(seqs)[0], "--steps", "3",
                  "--out", str(out / "trace")],
    }  # fmt: skip


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=common.positive, default=10, help="minutes for all parts together (10)")
    parser.add_argument("--size", choices=("1b", "tiny"), default="1b", help="tiny: a rehearsal on any machine (1b)")
    parser.add_argument("--seqs", type=common.counts, help="sequences of a step (by memory: 16,8,32 on an H200, 8,16 on 80 GB)")
    parser.add_argument(
        "--out", type=lambda text: common.output(text + "/gpu.json").parent, default="runs/gpu", help="folder (runs/gpu)"
    )
    args = parser.parse_args()
    args.out, args.seq_len = Path(args.out), 2048 if args.size == "1b" else 32
    common.end_on_sigterm()
    args.out.mkdir(parents=True, exist_ok=True)
    report, deadline, planner = Report(args), time.monotonic() + 60 * args.minutes, None
    seqs, later = args.seqs or "2", sum(SHARE.values())
    for name in SHARE:
        later -= SHARE[name]
        seconds = max(5, deadline - time.monotonic() - later * 60 * args.minutes)
        command = commands(args, seqs)[name]
        if name != "trace":  # three steps take no --minutes
            command += ["--minutes", f"{max(seconds - GRACE, 5) / 60:.3f}"]
        report.part(name, command, seconds - GRACE)
        if name == "check":
            device = (report.content["parts"]["check"]["report"] or {}).get("device") or {}
            target = targets.of(device.get("kind", ""))
            if args.size == "1b" and not args.seqs:
                seqs = next(some for memory, some in bench_train.SEQS if (target.memory if target else 0) >= memory)
            on = next((f"{key}:1x1" for key, t in targets.TARGETS.items() if t is target), "cpu:1")
            cell = {"model": args.size, "seq_len": args.seq_len, "seqs": seqs, "remat": "none", "attention": "auto",
                    "loss_chunk": 2048}  # fmt: skip
            planner = threading.Thread(target=plan, args=(report, on, cell, deadline), daemon=True)
            planner.start()
    planner.join(max(0, deadline - time.monotonic()))
    rows = (report.content["parts"]["check"]["report"] or {}).get("rows", [])
    right = sum(bool(row["ok"]) for row in rows)
    report.content["whole"] = right > 0 and all(part["rc"] == 0 for part in report.content["parts"].values())
    report.save()
    print("\n".join(beside(report.content)))
    print(f"{args.out / 'gpu.md'} has everything")
    sys.exit(0 if report.content["whole"] else 1)


if __name__ == "__main__":
    main()
