"""Data at speed: preparing it against a bare SentencePiece loop, reading blocks at random, loading batches.

    python tools/bench_data.py [--tokenizer PATH] [--mb 128] [--workers N] [--json OUT]
    python tools/bench_data.py --hours|--memory [--tokenizer PATH] [--mb 128] [--json OUT]

The text is Python's own library, 128 MB of it. `make demo` makes the default tokenizer. --hours: processor time on prose
(this machine's documentation, as jsonl.zst) and on code (Python modules, as parquet), by which the hours of SlimPajama and
StarCoder are estimated: a busy machine matters little. --memory: what a worker takes with files of 1 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow
import pyarrow.parquet
import sentencepiece

from tinyllama_jax import config as c
from tinyllama_jax.data import feed
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.data.prepare import prepare

S = 2048
# SlimPajama without its GitHub part, and starcoderdata. Bytes of text: SlimPajama's 893 GB of jsonl.zst hold about 2.7 TB,
# 95% of it not GitHub; starcoderdata is 783 GB of code. Tokens (Llama 2): the original's 950 G, by its weights.
CORPORA = {"prose": {"bytes": 0.95 * 2.7e12, "tokens": 0.693584 * 950e9}, "code": {"bytes": 783e9, "tokens": 0.306416 * 950e9}}
PROSE = (".txt", ".md", ".rst", ".html", ".gz", "copyright", "README", "LICENSE", "METADATA")


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


def documents(kind: str, size: int) -> list[str]:
    """`size` bytes of texts of 0.5 to 200 kB that lie on this machine: documentation and licences, or Python modules."""
    roots, ends = (["/usr/share", sys.prefix], PROSE) if kind == "prose" else ([sys.base_prefix, sys.prefix], (".py",))
    paths = [
        Path(folder, name) for root in roots for folder, _, names in os.walk(root) for name in names if name.endswith(ends)
    ]
    texts = []
    for path in sorted(paths):
        with contextlib.suppress(OSError, EOFError, UnicodeDecodeError), path.open("rb") as file:
            data = file.read()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
            if 500 < len(text) < 200_000 and not path.is_symlink():
                texts.append(text)
                size -= len(text.encode())
        if size <= 0:
            return texts
    return texts


def below(pid: int) -> list[int]:
    """`pid` and its processes, at any depth."""
    with contextlib.suppress(OSError):
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        return [pid, *(p for task in tasks for c in task.read_text().split() for p in below(int(c)))]
    return []


def watched(*arguments: object) -> dict[str, float]:
    """Runs `prepare`: seconds, processor seconds of all its processes, and the most bytes that one of them had in memory."""
    began, cpu, peak = time.perf_counter(), {}, 0
    words = [sys.executable, "-m", "tinyllama_jax.data.prepare", *map(str, arguments)]
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    while child.poll() is None:
        for pid in below(child.pid):
            with contextlib.suppress(OSError, StopIteration):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                cpu[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                status = Path(f"/proc/{pid}/status").read_text().splitlines()
                peak = max(peak, next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM")))
        time.sleep(0.05)
    if child.returncode:
        raise SystemExit(f"{' '.join(words)} failed")
    return {"seconds": time.perf_counter() - began, "cpu seconds": sum(cpu.values()), "peak bytes": peak}


def hours(model: Path, mb: int, folder: Path) -> dict:
    """Processor time and memory on prose and code, and the core-hours that the two corpora would take."""
    out: dict = {}
    spm = sentencepiece.SentencePieceProcessor(model_file=str(model))
    (folder / "tiny.jsonl").write_text('{"text": "x"}')
    words = ["--tokenizer", model, "--seq-len", S, "--shard-mb", 512]
    start = watched("--train", folder / "tiny.jsonl", *words, "--workers", 1, "--output", folder / "tiny")
    out["start"] = start  # taken off below: what a job of hours does not notice
    for kind, corpus in CORPORA.items():
        texts = documents(kind, mb * 10**6)
        size = sum(len(text.encode()) for text in texts)
        file = folder / (f"{kind}.jsonl.zst" if kind == "prose" else f"{kind}.parquet")
        if kind == "prose":
            lines = "".join(json.dumps({"text": text, "meta": {"redpajama_set_name": "X"}}) + "\n" for text in texts).encode()
            file.write_bytes(pyarrow.compress(lines, codec="zstd", asbytes=True))
        else:
            pyarrow.parquet.write_table(pyarrow.table({"content": texts}), file, row_group_size=500)
        row = out[kind] = {"bytes": size, "documents": len(texts)}
        began = time.process_time()
        tokens = sum(len(spm.encode(text)) for text in texts)
        row |= {"tokens": tokens, "sentencepiece cpu seconds": time.process_time() - began}
        # two files of the same, so that two workers have something to do
        (folder / f"2{file.name}").write_bytes(file.read_bytes())
        key = ["--text-key", "text" if kind == "prose" else "content"]
        for workers, files in ((1, [file]), (2, [file, folder / f"2{file.name}"])):
            to = folder / f"{kind}{workers}"
            row[f"{workers} workers"] = watched("--train", *files, *words, *key, "--workers", workers, "--output", to)
            cpu = (row[f"{workers} workers"]["cpu seconds"] - workers * start["cpu seconds"]) / len(files)
            row[f"{workers} workers"] |= {"bytes/s per core": size / cpu, "tokens/s per core": tokens / cpu}
        for what, all_ in corpus.items():
            row[f"core-hours by {what}"] = all_ / row["1 workers"][f"{what}/s per core"] / 3600
            row[f"of SentencePiece by {what}"] = all_ / row[what] * row["sentencepiece cpu seconds"] / 3600
        print(kind, json.dumps(row, indent=1))
    for what in ("core-hours by bytes", "core-hours by tokens", "of SentencePiece by bytes", "of SentencePiece by tokens"):
        out[what] = sum(out[kind][what] for kind in CORPORA)
        print(f"{what}: {out[what]:.0f}")
    return out


def memory(model: Path, folder: Path) -> dict:
    """The most that a process takes with a file of 1 GB: of jsonl, and of text, which is one document."""
    out, texts = {}, documents("code", 20 * 10**6)
    words = ["--tokenizer", model, "--seq-len", S, "--workers", 1]
    for name in ("1gb.jsonl", "1gb.txt"):
        with (folder / name).open("w") as file:
            while file.tell() < 10**9:
                file.writelines(json.dumps({"text": text}) + "\n" if name.endswith("jsonl") else text for text in texts)
        out[name] = watched("--train", folder / name, *words, "--output", folder / f"from {name}")
        print(name, out[name])
    return out


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
    batches = feed.training(config, feed.open_sources(config), 1024, np.arange(1024), 0)
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
    parser.add_argument("--hours", action="store_true", help="processor time on prose and code instead")
    parser.add_argument("--memory", action="store_true", help="memory that a worker takes, instead")
    args = parser.parse_args()
    args.tokenizer = args.tokenizer.absolute()
    if args.hours or args.memory:
        with tempfile.TemporaryDirectory() as name:
            write(args, hours(args.tokenizer, args.mb, Path(name)) if args.hours else memory(args.tokenizer, Path(name)))
        return
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
    figures = {"workers": args.workers, "tokens": tokens, "seconds": seconds}
    write(args, {**figures, "tokens/s": {**best, "read": read, "loader": load}, "prepare over bare": ratio})


def write(args: argparse.Namespace, figures: dict) -> None:
    if args.json:
        packages = ("apache-beam", "sentencepiece", "array-record", "grain", "numpy", "pyarrow", "tensorflow-datasets")
        out = {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
            "mb": args.mb,
            **figures,
        }
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
