"""Data at speed: preparing it against a bare SentencePiece loop, reading blocks at random, loading batches.

    python tools/bench_data.py [--tokenizer PATH] [--mb 128] [--workers N] [--json OUT]

The text is Python's own library, 128 MB of it. `make demo` makes the default tokenizer.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import platform
import sys
import sysconfig
import tempfile
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import sentencepiece

from tinyllama_jax import config as c
from tinyllama_jax.data import feed
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.data.prepare import prepare

S = 2048


def make_text(path: Path, size: int) -> None:
    """`size` bytes of modules, one a line, over and over if need be."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
    modules = [text for file in files if "site-packages" not in file.parts and (text := file.read_text("utf-8", "ignore"))]
    written = 0
    with path.open("w", encoding="utf-8") as out:
        for text in itertools.cycle(modules):
            written += out.write(json.dumps({"text": text}) + "\n")
            if written >= size:
                return


def bare(path: Path, model: Path, rank: int, workers: int, begin, seconds) -> None:
    """One of `workers` processes that tokenise every `workers`-th document, held in memory, and do nothing else."""
    spm = sentencepiece.SentencePieceProcessor(model_file=str(model))
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, rank, None, workers)]
    begin.wait()
    began = time.perf_counter()
    for text in texts:
        spm.encode(text)
    seconds[rank] = time.perf_counter() - began


def bare_seconds(path: Path, model: Path, workers: int) -> float:
    """Seconds of the slowest of the processes, their start left out."""
    context = multiprocessing.get_context("spawn")
    begin, seconds = context.Barrier(workers), context.Array("d", workers)
    processes = [context.Process(target=bare, args=(path, model, r, workers, begin, seconds)) for r in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(seconds)


def prepare_seconds(path: Path, model: Path, workers: int, output: Path) -> float:
    """Seconds of the whole of it: planning, starting the workers, checksums, metadata."""
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(train=[path], tokenizer=model, output=output, seq_len=S, workers=workers)
    return time.perf_counter() - began


def reading(data: Path) -> float:
    """Tokens/s of `Blocks.read` in this process, 1,024 blocks at random at a time, from the page cache."""
    blocks, rng = Blocks(data, "train"), np.random.default_rng(0)
    blocks.read(np.arange(len(blocks)))
    began, n = time.perf_counter(), 0
    while time.perf_counter() < began + 3:
        n += len(blocks.read(rng.integers(0, len(blocks), 1024))[0])
    return n * S / (time.perf_counter() - began)


def loading(data: Path) -> float:
    """Tokens/s of the batches that `train` gets, in this process: order, reading, stacking; 1,024 sequences a step."""
    model = c.Model(1, 8, 1, 1, 8, 1 << 16, S)
    config = c.Config(
        "unused", model, c.Data({str(data): 1.0}), c.Optim(1, 1, 0, 0, 1), c.Train(10**6, 1024 * S, 1024), c.Checkpoint(1)
    )
    batches = feed.training(config, feed.open_sources(config), (1, 1024), np.arange(1024), 0)
    next(batches)
    began, n = time.perf_counter(), 0
    while time.perf_counter() < began + 3:
        n += next(batches)[0].shape[1]
    return n * S / (time.perf_counter() - began)


def main() -> None:
    """Prints the three figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", type=Path, default=Path("runs/demo/tokenizer/tokenizer.model"), help="SentencePiece file"
    )
    parser.add_argument("--mb", type=int, default=128, help="starting the workers takes two seconds whatever the size")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {"prepare": [], "bare": []}
    with tempfile.TemporaryDirectory() as name:
        text = Path(name) / "text.jsonl"
        make_text(text, args.mb << 20)
        for i in range(args.repeat):  # turn about, so that what else the machine does meets both
            seconds["bare"].append(bare_seconds(text, args.tokenizer, args.workers))
            seconds["prepare"].append(prepare_seconds(text, args.tokenizer, args.workers, Path(name) / f"data{i}"))
        data = Path(name) / "data0"
        tokens = Blocks(data, "train").manifest["splits"]["train"]["tokens"]
        best = {what: tokens / min(values) for what, values in seconds.items()}
        read, load = reading(data), loading(data)
    ratio = best["prepare"] / best["bare"]
    print(f"{args.mb} MB, {tokens:,} tokens, {args.workers} processes on {platform.processor() or platform.machine()}")
    print(f"prepare: {best['prepare']:,.0f} tokens/s, bare SentencePiece loop {best['bare']:,.0f}, ratio {ratio:.2f}")
    print(f"Blocks.read at random: {read:,.0f} tokens/s in one process")
    print(f"loader: {load:,.0f} tokens/s in one process")
    if args.json:
        packages = ("apache-beam", "sentencepiece", "array-record", "grain", "numpy", "pyarrow", "tensorflow-datasets")
        out = {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
            "mb": args.mb,
            "workers": args.workers,
            "tokens": tokens,
            "seconds": seconds,
            "tokens/s": {**best, "read": read, "loader": load},
            "prepare over bare": ratio,
        }
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
