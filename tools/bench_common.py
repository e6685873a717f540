"""What the benchmarks share: shapes, weights and tokens that are alike in every process, timing, workers with a deadline."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ml_dtypes  # noqa: F401  numpy then knows "bfloat16"
import numpy as np

from tinyllama_jax.base import config as c
from tinyllama_jax.base import dims

SHAPES = {  # layers, width, heads, kv heads, ffn, vocabulary
    "tiny": (2, 64, 4, 2, 128, 256),
    "demo": (4, 256, 8, 4, 704, 4096),
    "15m": (6, 288, 6, 6, 768, 32000),
    "120m": (12, 768, 12, 1, 2048, 32000),
    "1b": (22, 2048, 32, 4, 5632, 32000),
}
OPTIM = c.Optim(peak_lr=4e-4, min_lr=4e-5, warmup_steps=10, weight_decay=0.1, clip_norm=1.0)
WARM_UP = 3  # steps before those that are timed: the first ones allocate, and choose algorithms
TORCH = str(Path(__file__).with_name("bench_torch.py"))
OOM = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "OutOfMemory", "MemoryError", "Unable to allocate")


class Ended(Exception):
    """A worker ended without a result; the message says why."""


def model_of(cell: dict, compute: str, **fields) -> c.Model:
    """The architecture of `cell` (its "model" and "seq_len"), computed in `compute`, with a residual stream of that dtype."""
    precision = f"params=float32,compute={compute},output=float32"
    return c.Model(*SHAPES[cell["model"]], cell["seq_len"], precision=precision, residual=compute, **fields)


def weights(model: c.Model) -> dict:
    """Initial weights as nested numpy arrays, the same in every process and framework.

    Uniform, with the standard deviation of `dims.init_std`: normal draws take five times as long, 10 s for 1.1B on one core.
    """

    def draw(p: dims.Parameter) -> np.ndarray:
        if p.kind == "norm":
            return np.ones(dims.shape(p, model), np.float32)
        out = np.random.Generator(np.random.SFC64(zlib.crc32(p.name.encode()))).random(dims.shape(p, model), np.float32)
        out -= np.float32(0.5)
        out *= np.float32(math.sqrt(12) * dims.init_std(p, model))
        return out

    params: dict = {}
    with ThreadPoolExecutor() as pool:
        for p, array in zip(dims.PARAMETERS, pool.map(draw, dims.PARAMETERS), strict=True):
            *parents, last = p.name.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = array
    return params


def tokens(cell: dict) -> np.ndarray:
    """Uniform tokens [seqs, S + 1]: the first sequence is the same for any number of them."""
    vocab = SHAPES[cell["model"]][-1]
    return np.random.default_rng(0).integers(0, vocab, (cell["seqs"], cell["seq_len"] + 1), np.uint16)


def first_loss(model: c.Model, n: int) -> tuple[float, float]:
    """What the loss of `n` uniform tokens is under `weights`, worked out by hand, and how far from it chance takes it.

    The final norm's output has mean square 1 and the head's entries variance 2 / (5 D): logits of variance 0.4. Then
    E[log sum exp] is ln V + 0.4 / 2, and the label's logit has mean 0.
    """
    return math.log(model.vocab_size) + 0.2, 0.02 + 4 * math.sqrt(0.4 / n)


# -- time ---------------------------------------------------------------------------------------------------------------


def windows(run: Callable, sync: Callable, steps: int, n: int = 4) -> list[float]:
    """Seconds of one `run` in each of `n` windows: the device is waited for at the end of a window only, as in training."""
    size, out = max(1, steps // n), []
    for _ in range(min(n, steps)):
        began = time.perf_counter()
        for _ in range(size):
            run()
        sync()
        out.append((time.perf_counter() - began) / size)
    return out


def seconds_of(run: Callable, sync: Callable, least: float = 0.1) -> float:
    """Seconds of one `run`, warm: the median of five windows of at least `least` seconds (or one run, if that is longer)."""
    for _ in range(2):
        run()
    sync()
    once = windows(run, sync, 1, 1)[0]
    return median(windows(run, sync, 5 * max(1, min(500, math.ceil(least / max(once, 1e-6)))), 5))


def median(values: list[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]


# -- workers ------------------------------------------------------------------------------------------------------------


def is_oom(text: object) -> bool:
    """Whether an exception, or what a process wrote before it died, speaks of memory that was not to be had."""
    if isinstance(text, BaseException):
        text = f"{type(text).__name__}: {text}"
    return any(word in text for word in OOM)


def why(e: BaseException) -> str:
    """An exception as a row says it: "out of memory" and what it was about, or its type and first line."""
    line = (str(e).strip().splitlines() or [""])[0][:300]
    return f"out of memory ({line})" if is_oom(e) else f"{type(e).__name__}: {line}"


def stream(command: list[str], seconds: float, quiet: float = math.inf) -> Iterator[dict]:
    """The rows that `command` prints (its lines that are JSON objects), as they come. Raises Ended unless it ends well.

    It is killed with all its children after `seconds`, after `quiet` seconds without a row, and when the caller stops reading.
    GPU memory goes with a process, so that one framework's is free when the next one starts. JAX may take 0.9 of it, for torch
    takes what it needs.
    """
    ours = {} if "XLA_PYTHON_CLIENT_MEM_FRACTION" in os.environ else {"XLA_CLIENT_MEM_FRACTION": "0.9"}
    env, late = ours | os.environ, threading.Event()
    end = time.monotonic() + max(seconds, 1)
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True, env=env
        )

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

        def alarm() -> threading.Timer:
            timer = threading.Timer(max(0, min(end - time.monotonic(), quiet)), lambda: (late.set(), kill()))
            timer.start()
            return timer

        timer = alarm()
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    timer.cancel()
                    yield json.loads(line)
                    timer = alarm()
            process.wait()
        finally:
            timer.cancel()
            kill()
            process.wait()
            process.stdout.close()
        if late.is_set():
            raise Ended("not done in time")
        if process.returncode:
            errors.seek(0)
            lines = [line for line in errors.read().splitlines() if line.strip()]
            about = next((line for line in reversed(lines) if is_oom(line)), lines[-1] if lines else "")
            reason = about.strip()[:300] or f"ended with {process.returncode}"
            killed = process.returncode == -signal.SIGKILL
            raise Ended(f"out of memory ({reason})" if killed or is_oom(reason) else reason)


def save(path: Path, report: dict) -> None:
    """Writes `report` as a whole or not at all; called after each row, so that a run that is killed keeps what it did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def header(args) -> dict:
    """What a report opens with."""
    settings = {k: v for k, v in os.environ.items() if k == "XLA_FLAGS" or k.startswith(("JAX_", "XLA_PYTHON", "NVIDIA_TF32"))}
    return {
        "command": sys.argv,
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "environment": settings,
    }


def end_on_sigterm() -> None:
    """Makes a request to end, Ctrl-C too, an exception without a traceback, so that workers end with the run."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def parts(text: str) -> list[str]:
    """The items of a list as an option gives it."""
    return [part for part in text.split(",") if part]


def some_of(*known: str) -> Callable[[str], str]:
    """An option's type: a list of `known`."""

    def check(text: str) -> str:
        if wrong := [part for part in parts(text) or [text] if part not in known]:
            raise argparse.ArgumentTypeError(f"no such one: {', '.join(wrong)!r}; choose of {', '.join(known)}")
        return text

    return check


def positive(text: str) -> float:
    """An option's type: a number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def counts(text: str) -> str:
    """An option's type: a list of whole numbers from 1 on."""
    if not parts(text) or not all(part.isdigit() and int(part) > 0 for part in parts(text)):
        raise argparse.ArgumentTypeError(f"must be whole numbers above 0, such as 8,16, not {text}")
    return text


def output(text: str) -> Path:
    """An option's type: a file that can be written."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise PermissionError
    except OSError:
        raise argparse.ArgumentTypeError(f"cannot write a file {text}") from None
    return path


def steps_of(cell: dict, seconds: float) -> int:
    """How many steps of `seconds` each to time: as many as asked for, but for no longer than the cell has."""
    return max(1, min(cell["steps"], int(cell["seconds"] / max(seconds, 1e-9))))


# -- correctness --------------------------------------------------------------------------------------------------------


ATTENTION = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}  # root mean square of the error over that of the values


def against_reference(measured: np.ndarray, cell: dict) -> dict:
    """How far the losses of the first sequence's tokens are from those in fp32 by the definition, before any step."""
    return {"token_loss_error": rms(measured.ravel() - np.load(cell["reference"]).ravel())}


def qkv(shape: dict) -> list[np.ndarray]:
    """Normal q [B, S, N, H] (times `spread`), k, v [B, S, K, H] and the cotangent of the output, fp32."""
    B, S, N, K, H = (shape[x] for x in "BSNKH")
    rng = np.random.default_rng(0)
    q, *others = [rng.standard_normal((B, S, heads, H), np.float32) for heads in (N, K, K, N)]
    return [q * np.float32(shape.get("spread", 1)), *others]


def segments(shape: dict) -> np.ndarray | None:
    """Segment ids [B, S], from 1, of `documents` documents of unequal length in each sequence, or None."""
    if not shape.get("documents"):
        return None
    rng = np.random.default_rng(1)
    cuts = [np.sort(rng.choice(np.arange(1, shape["S"]), shape["documents"] - 1, replace=False)) for _ in range(shape["B"])]
    return np.stack([1 + np.searchsorted(cut, np.arange(shape["S"]), side="right") for cut in cuts]).astype(np.int32)


def visible_pairs(shape: dict) -> int:
    """(query, key) pairs that attention has to look at, over the batch: the causal half, within a document."""
    ids = segments(shape)
    if ids is None:
        return shape["B"] * shape["S"] * (shape["S"] + 1) // 2
    lengths = np.concatenate([np.unique(row, return_counts=True)[1] for row in ids])
    return int((lengths * (lengths + 1) // 2).sum())


def few_heads(shape: dict) -> np.ndarray:
    """1 for the first and the last query head of the last key head, else 0 [N]: the reference need not compute the others."""
    out = np.zeros(shape["N"], np.float32)
    out[[shape["N"] - shape["N"] // shape["K"], -1]] = 1
    return out


def attention_errors(measured: list[np.ndarray], shape: dict, dtype: str) -> dict:
    """Errors of (out, dq, dk, dv) of the last sequence, [1, S, heads, H] each, given a cotangent of `few_heads` alone.

    Relative: root mean square of the error over that of the values.
    """
    heads, row = np.flatnonzero(few_heads(shape)), {"ok": True, "errors": {}}
    values = attention_values(json.dumps(shape), dtype)
    for (name, want), got in zip(values.items(), measured, strict=True):
        error = np.abs(got[0][:, heads if name in ("out", "dq") else [-1]] - want)
        row["errors"][name] = {"max_abs": float(error.max()), "relative": rms(error) / rms(want)}
        row["ok"] &= row["errors"][name]["relative"] <= ATTENTION[dtype]  # False for NaN too
    return row


def rms(a: np.ndarray) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.square(np.asarray(a, np.float64)).mean()))


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Root mean square of the error over that of the values."""
    return rms(np.asarray(got, np.float64) - want) / rms(want)


def loss_values(x: np.ndarray, kernel: np.ndarray, labels: np.ndarray) -> dict:
    """Summed cross-entropy of x [n, D] and kernel [D, V] and its gradients, in fp64 numpy."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    logits, chosen = x @ kernel, (np.arange(len(x)), labels)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    loss = -np.log(p[chosen]).sum()
    p[chosen] -= 1
    return {"loss": loss, "dx": p @ kernel.T, "dkernel": x.T @ p}


@functools.cache
def attention_values(shape: str, dtype: str) -> dict[str, np.ndarray]:
    """The definition in fp64 numpy, and its derivative written out: of the last sequence and `few_heads`, [S, heads, H] each.

    `dtype`: what the inputs were rounded to.
    """
    shape = json.loads(shape)
    q, k, v, do = (a[-1].astype(dtype).astype(np.float64) for a in qkv(shape))
    ids, place, scale = segments(shape), np.arange(shape["S"]), 1 / math.sqrt(shape["H"])
    visible = place[None] <= place[:, None]
    if ids is not None:
        visible &= ids[-1][None] == ids[-1][:, None]
    k, v, out, dq, dk, dv = k[:, -1], v[:, -1], [], [], [], []
    for n in np.flatnonzero(few_heads(shape)):
        p = np.where(visible, np.exp(q[:, n] @ k.T * scale), 0)  # scores of normal values: no maximum to take off
        p /= p.sum(-1, keepdims=True)
        dp = do[:, n] @ v.T
        ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
        for to, value in ((out, p @ v), (dq, ds @ k), (dk, ds.T @ q[:, n]), (dv, p.T @ do[:, n])):
            to.append(value)
    return {"out": np.stack(out, 1), "dq": np.stack(dq, 1), "dk": sum(dk)[:, None], "dv": sum(dv)[:, None]}
