"""What a run costs besides its steps: starting, resuming, saving.

    python tools/bench_run.py [--data DIR] [--model 15m|120m|250m|400m] [--saves FOLDER] [--json OUT]

The time from the command to its first step, resumed at steps 10, 10^4 and 10^6, over that of a fresh start; where that time
goes, with and without compiled programs kept; the time that the loop stands still for a checkpoint, over that of saving it
synchronously; what the first steps of a larger batch (`train.batch_ramp`) cost. `make demo` makes the default data.

`--saves FOLDER` measures only saves, on the disk of FOLDER and without data: the part that holds the loop, the whole until the
checkpoint is sealed, and what this disk does with a plain file of the same size. It needs memory for three states and room on
the disk for one; what it wrote is deleted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from tinyllama_jax.base import config as c
from tinyllama_jax.base import sharding
from tinyllama_jax.core.program import build
from tinyllama_jax.data import feed
from tinyllama_jax.planning import measured
from tinyllama_jax.run import checkpoint, initialize, seals
from tinyllama_jax.run import folder as run_folder

SHAPES = {  # as c.Model's first fields
    "15m": (6, 288, 6, 6, 768, 32000),
    "120m": (12, 768, 12, 1, 2048, 32000),
    "250m": (11, 1280, 20, 4, 3584, 32000),
    "400m": (17, 1408, 22, 2, 3840, 32000),
}
FP32 = "params=float32,compute=float32,output=float32"


def config_of(workdir: Path, data: Path, shape: tuple) -> c.Config:
    """A run of a little over 10^6 steps of one sequence each."""
    seq_len, steps = feed.Blocks(data, "train").seq_len, 1_000_100
    return c.Config(str(workdir), c.Model(*shape, seq_len, precision=FP32, residual="float32"), c.Data({str(data): 1.0}),
                    c.Optim(4e-4, 4e-5, 10, 0.1, 1.0), c.Train(steps, seq_len, 1), c.Checkpoint(10**9),
                    log=c.Log(eval_every=10**9))  # fmt: skip


def training(config: c.Config, **how) -> subprocess.Popen:
    """The command that trains what `config` describes, started; `how`: as Popen takes it."""
    path = Path(config.workdir + ".py")
    path.write_text("from tinyllama_jax.base.config import *\nconfig = " + repr(config) + "\n")
    command = [sys.executable, "-m", "tinyllama_jax.train", "--config", str(path)]
    return subprocess.Popen(command, cwd=Path(__file__).resolve().parents[1], **how)


def first_step(config: c.Config, step: int) -> float:
    """Seconds from the command to the line of `step` + 1 in metrics.jsonl."""
    began = time.perf_counter()
    process = training(config, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), (Path(config.workdir) / "metrics.jsonl").open("rb") as f:
                f.seek(max(0, f.seek(0, 2) - 200_000))
                if f'{{"step": {step + 1},'.encode() in f.read():
                    return time.perf_counter() - began
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    raise SystemExit("the run ended before its first step")


def resume(folder: Path, data: Path, shape: tuple) -> dict[str, list[float]]:
    """Seconds to the first step, three times each: fresh, and resumed at three steps with a metrics file that long."""
    out: dict[str, list[float]] = {}
    for _ in range(3):
        for step in (0, 10, 10_000, 1_000_000):
            config = config_of(folder / f"run{step}", data, shape)
            shutil.rmtree(config.workdir, ignore_errors=True)
            if step:
                _as_if_run_to(config, step)
            out.setdefault(f"at step {step}", []).append(first_step(config, step))
    return out


def _as_if_run_to(config: c.Config, step: int) -> None:
    """A run folder whose newest checkpoint is of `step`, with a line of metrics for each step before."""
    sources = feed.open_sources(config)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        state = build(config, mesh).init()
        run_folder.open_run(config, initialize.described(sources), sources[0].tokenizer)
        checkpoints = checkpoint.Checkpoints(config)
        checkpoints.save(step, dataclasses.replace(state, step=jnp.int32(step)))
        checkpoints.close()
    line = json.dumps({"loss": 3.14159265358979, "grad_norm": 0.123456789, "checksum": 2**32 - 1, "padding": "x" * 600})[1:]
    with (Path(config.workdir) / "metrics.jsonl").open("w") as f:
        f.writelines(f'{{"step": {s}, {line}\n' for s in range(1, step + 1))


def phases(folder: Path, data: Path, shape: tuple) -> dict[str, str]:
    """What `train` says of where the time of a start goes: resumed at step 10, without and with compiled programs kept."""
    out = {}
    for what in ("compiling", "filling the cache", "from the cache"):
        config = config_of(folder / "phases", data, shape)
        shutil.rmtree(config.workdir, ignore_errors=True)
        _as_if_run_to(config, 10)
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        env = os.environ | (cache if "cache" in what else {})
        with training(config, stdout=subprocess.PIPE, env=env, text=True) as process:
            for line in process.stdout:
                if line.startswith("started in: "):
                    out[what] = line.strip()
                    process.kill()
    return out


def stall(folder: Path, data: Path, shape: tuple) -> dict[str, list[float]]:
    """Seconds that `save` holds the loop, and seconds until the same save is on disk, five times each."""
    config = config_of(folder / "stall", data, shape)
    mesh = sharding.make_mesh(config.mesh)
    out: dict[str, list[float]] = {"blocks": [], "until on disk": []}
    with jax.set_mesh(mesh):
        state = jax.block_until_ready(build(config, mesh).init())
        for i in range(6):  # the first makes the folders
            checkpoints = checkpoint.Checkpoints(config)
            began = time.perf_counter()
            checkpoints.save(i + 1, state)
            blocks = time.perf_counter() - began
            checkpoints.close()
            if i:
                out["blocks"].append(blocks)
                out["until on disk"].append(time.perf_counter() - began)
    return out


def saves(folder: Path, shape: tuple) -> dict[str, float | list[float]]:
    """Bytes of a state, and seconds of its saves as the run makes them, beside those of a plain file of as many bytes."""
    config = c.Config(str(folder / "run"), c.Model(*shape, 64, precision=FP32, residual="float32"), c.Data({"x": 1.0}),
                      c.Optim(4e-4, 4e-5, 10, 0.1, 1.0), c.Train(10, 64, 1), c.Checkpoint(10**9))  # fmt: skip
    mesh = sharding.make_mesh(config.mesh)
    out: dict = {"plain write": [], "plain read": []}
    with jax.set_mesh(mesh):
        state = build(config, mesh).init()
        noise = lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape) if leaf.ndim else leaf
        state = jax.block_until_ready(jax.tree.map(noise, state))  # moments of 0 would be compressed to nothing
        out["bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        for i in range(4):  # the first is not counted: it makes the folders and threads
            os.sync()
            checkpoints = checkpoint.Checkpoints(config)
            began, worked = time.perf_counter(), time.process_time()
            checkpoints.save(i + 1, state)
            blocks = time.perf_counter() - began
            checkpoints.check(wait=True)
            times = [blocks, time.perf_counter() - began, time.process_time() - worked]
            began, sealed = time.perf_counter(), next((folder / "run" / "checkpoints").iterdir())
            assert seals.damage(sealed) is None  # reads and hashes all of it, as sealing does
            times.append(time.perf_counter() - began)
            out["on disk"] = sum(path.stat().st_size for path in sealed.rglob("*") if path.is_file())
            checkpoints.close()
            shutil.rmtree(folder / "run")
            for what, seconds in zip(("blocks", "until sealed", "processor time", "sealing alone"), times, strict=True):
                out.setdefault(what, []).extend([seconds] * (i > 0))
    del state
    for _ in range(3):
        for what, rate in zip(("plain write", "plain read"), measured.of_disk(folder, out["bytes"]), strict=True):
            out[what].append(out["bytes"] / rate)
    out["most memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024
    return out


def boundary(folder: Path, data: Path, shape: tuple) -> dict[str, list[float]]:
    """Seconds that three steps take beyond as many usual ones: the first of a larger batch, and those after a checkpoint."""
    out: dict[str, list[float]] = {"boundary": [], "checkpoint": []}
    for i in range(2):
        config = config_of(folder / f"boundary{i}", data, shape)
        seq_len = config.model.seq_len
        train = dataclasses.replace(config.train, steps=240, batch_ramp=f"{220 * seq_len}:{4 * seq_len}")
        config = dataclasses.replace(config, train=train, checkpoint=c.Checkpoint(100))
        with training(config, stdout=subprocess.DEVNULL) as process:
            process.wait()
        rows = [json.loads(line) for line in (Path(config.workdir) / "metrics.jsonl").read_text().splitlines()]
        seconds = {row["step"]: row["step_seconds"] for row in rows if "loss" in row}
        for what, first, usual in ("boundary", 221, range(224, 239)), ("checkpoint", 101, range(80, 95)):
            one = sorted(seconds[step] for step in usual)[7]
            out[what].append(sum(seconds[step] - one for step in range(first, first + 3)))
    return out


def main() -> None:
    """Prints the four figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="15m")
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data/text").resolve(), help="a prepared folder")
    parser.add_argument("--saves", type=Path, metavar="FOLDER", help="measure only saves, in a new folder within this one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    median = lambda values: sorted(values)[len(values) // 2]
    out: dict = {"platform": platform.platform(), "versions": run_folder.versions(), "model": args.model}
    if args.saves:
        with tempfile.TemporaryDirectory(dir=args.saves) as name:
            out |= saves(Path(name), SHAPES[args.model])
        for what, seconds in ((k, median(v)) for k, v in out.items() if isinstance(v, list)):
            print(f"{args.model}, {out['bytes'] / 1e9:.2f} GB: {what} {seconds:.2f} s, {out['bytes'] / seconds / 1e9:.2f} GB/s")
        print(
            f"{args.model}: at most {out['most memory'] / 1e9:.1f} GB of memory, {out['most memory'] / out['bytes']:.1f} states"
        )
        if args.json:
            args.json.write_text(json.dumps(out, indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as name:
        out["first step seconds"] = resume(Path(name), args.data, SHAPES[args.model])
        fresh = median(out["first step seconds"]["at step 0"])
        for what, seconds in out["first step seconds"].items():
            print(f"start to first step {what}: {median(seconds):.2f} s, {median(seconds) / fresh:.2f} of a fresh start")
        out["phases of a start resumed at step 10"] = phases(Path(name), args.data, SHAPES[args.model])
        for what, line in out["phases of a start resumed at step 10"].items():
            print(f"{what}: {line}")
        out["checkpoint seconds"] = stall(Path(name), args.data, SHAPES[args.model])
        blocks, whole = (median(v) for v in out["checkpoint seconds"].values())
        print(f"checkpoint: the loop stands still for {blocks:.3f} s of {whole:.3f} s, {blocks / whole:.3f}")
        out["batch four times as large"] = boundary(Path(name), args.data, SHAPES[args.model])
        stalls = [median(v) for v in out["batch four times as large"].values()]
        print(f"a batch four times as large: {stalls[0]:.3f} s beyond usual steps; a checkpoint {stalls[1]:.3f} s")
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
