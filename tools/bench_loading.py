"""Loading at speed: blocks read at random, from cache and from disk, of few files and of 10,000, beside the original's loader.

    python tools/bench_loading.py [--tokenizer FILE] [--gb 2] [--files 10000] [--original FILE] [--folder DIR] [--json OUT]

Tokens are drawn by Zipf's law, and compress as text's do. Each rate stands twice: by the clock, and by the processor time of
the whole process, which other work on the machine changes less. `--original` is the original's lit_gpt/packed_dataset.py, which
takes torch; without it, a loop of ours does what that does. `make demo` makes the default tokenizer.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import platform
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from array_record.python import array_record_module

from tinyllama_jax.base import config as c
from tinyllama_jax.base import files
from tinyllama_jax.data import blocks, feed, litpkds
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.export import litpkds as export_litpkds

S = 2048
BATCH = 1024  # sequences of a step: 2 M tokens
SECONDS = 4.0
WINDOW = 8  # files that the original has open, and shuffles over


def make(folder: Path, n_files: int, per_file: int, model: Path) -> dict[str, str]:
    """Tokens in both formats, `n_files` files of `per_file` blocks each; what names them as sources."""
    spm, rng = tokenizer_lib.load(model), np.random.default_rng(0)
    packed, prepared = folder / "packed", folder / "prepared"
    for where in (packed, prepared):
        spm.save(where / "tokenizer")
    pool = np.minimum(rng.zipf(1.2, 1 << 20) + 2, spm.vocab_size - 1).astype(np.uint16)
    tokens = lambda: np.stack([pool[at : at + S + 1] for at in rng.integers(0, len(pool) - S, per_file)])
    export_litpkds.write((tokens().ravel() for _ in range(n_files)), packed, "train_x", per_file * (S + 1), "uint16", 1)
    record, shards = blocks.Record(S, "uint16"), []
    for i in range(n_files):
        file = prepared / f"blocks-train.array_record-{i:05d}-of-{n_files:05d}"
        writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
        for block in tokens():
            writer.write(record.encode(block, S + 1))
        writer.close()
        counts = {"blocks": per_file, "tokens": per_file * (S + 1), "bytes": file.stat().st_size}
        shards.append({"file": file.name, "sha256": files.sha256(file), **counts})
    vocabulary = {"sha256": spm.sha256, "vocab_size": spm.vocab_size, "bos_id": spm.bos_id, "eos_id": spm.eos_id}
    manifest = {"format": blocks.FORMAT, "seq_len": S, "dtype": "uint16", "bos": False, "eos": True, "tokenizer": vocabulary}
    whole = {
        "documents": 1,
        "tokens": n_files * per_file * (S + 1),
        "blocks": n_files * per_file,
        "sources": [],
        "shards": shards,
    }
    (prepared / blocks.MANIFEST).write_text(json.dumps(manifest | {"splits": {"train": whole}}))
    os.sync()
    return {"ArrayRecord": str(prepared), "LITPKDS": str(packed / "train_x")}


def config_of(path: str) -> c.Config:
    """A run of 1,024 sequences a step on one source."""
    model = c.Model(1, 8, 1, 1, 8, 1 << 16, S)
    return c.Config(
        "unused", model, c.Data({path: 1.0}), c.Optim(1, 1, 0, 0, 1), c.Train(10**6, BATCH * S, BATCH), c.Checkpoint(1)
    )


def rate(sequences: Callable[[], int]) -> dict[str, float]:
    """Tokens a second of a function that says how many sequences it has read, by the clock and by processor time."""
    began, cpu, n = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() < began + SECONDS:
        n += sequences()
    return {"tokens/s": n * S / (time.perf_counter() - began), "tokens/cpu s": n * S / (time.process_time() - cpu)}


def in_cache(path: str) -> dict[str, dict]:
    """Of one source: reading at random alone, the order alone, and the batches as `train` gets them."""
    config = config_of(path)
    (source,) = sources = feed.open_sources(config)
    for first in range(0, len(source), BATCH):
        source.read(np.arange(first, min(first + BATCH, len(source))))
    rng, order = np.random.default_rng(0), feed.order(config, sources)
    steps = iter(range(10**9))
    out = {"read": rate(lambda: len(source.read(rng.integers(0, len(source), BATCH))[0]))}
    out["order"] = rate(lambda: len(order.locate(np.arange(BATCH) + next(steps) * BATCH)[0]))
    batches = feed.training(config, sources, BATCH, np.arange(BATCH), 0)
    next(batches)
    out["loader"] = rate(lambda: next(batches)[0].shape[1])
    return out


def cold(path: str) -> dict[str, float]:
    """The batches of a source that is not in the page cache, as long as no block comes twice."""
    config = config_of(path)
    sources = feed.open_sources(config)
    for file, _, _ in sources[0].files():
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    batches = feed.training(config, sources, BATCH, np.arange(BATCH), 0)
    left = iter(range(len(sources[0]) // BATCH // 2))  # half of them: what comes late finds neighbours in the cache
    began, cpu, n = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() < began + 2 * SECONDS and next(left, None) is not None:
        n += next(batches)[0].shape[1]
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"tokens/s": n * S / wall, "tokens/cpu s": n * S / cpu, "of the blocks": n / len(sources[0])}


def many(path: str) -> dict[str, float]:
    """Seconds to open a source of many files and to its first batch, and MiB of memory when each file has been read from."""

    def memory() -> dict[str, float]:
        fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if "Rss" in line)
        return {name.rstrip(":"): int(kib) / 1024 for name, kib, _ in fields}

    config, before = config_of(path), memory()
    began = time.perf_counter()
    (source,) = sources = feed.open_sources(config)
    opened = time.perf_counter() - began
    next(feed.training(config, sources, BATCH, np.arange(BATCH), 0))
    first = time.perf_counter() - began
    firsts = np.array([begin for _, begin, _ in source.files()])
    for part in np.array_split(firsts, 100):
        source.read(part)
    after = memory()
    grown = {f"{key}, MiB": after[key] - before[key] for key in ("RssAnon", "RssFile")}
    return {"files": len(firsts), "open, s": opened, "first batch, s": first, **grown}


def as_the_original(path: str, file: Path | None) -> dict[str, float]:
    """The original's loader in cache: shuffled over `WINDOW` files, each sample copied out of the map as int64."""
    files = [str(f) for f in litpkds.files_of(path)]
    for f in files:
        Path(f).read_bytes()
    original = file and runpy.run_path(str(file))["PackedDataset"](files, WINDOW, S + 1, seed=1)
    samples = iter(original) if original else window(files)
    return rate(lambda: sum(len(next(samples)) > S for _ in range(BATCH)))


def window(files: list[str]) -> Iterator[np.ndarray]:
    """Blocks of `WINDOW` files at a time, in an order of their own, for ever."""
    rng = np.random.default_rng(1)
    while True:
        for first in range(0, len(files) - WINDOW + 1, WINDOW):
            maps = [memoryview(np.memmap(f, np.uint8, "r", litpkds.HEADER.size)) for f in files[first : first + WINDOW]]
            per_file = len(maps[0]) // (2 * (S + 1))
            for block in rng.permutation(WINDOW * per_file):
                at = block % per_file * 2 * (S + 1)
                yield np.frombuffer(maps[block // per_file], np.uint16, S + 1, at).astype(np.int64)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/demo/tokenizer/tokenizer.model"))
    parser.add_argument(
        "--gb", type=float, default=2, help="of each format, to read from; give more than the memory if you can"
    )
    parser.add_argument("--files", type=int, default=10_000, help="small ones, of 4 blocks, to open")
    parser.add_argument("--original", type=Path, help="the original's lit_gpt/packed_dataset.py")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (a temporary one)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    # a process of its own for each figure, so that none begins with what another left in memory
    context = multiprocessing.get_context("spawn")
    run = lambda f, *arguments: concurrent.futures.ProcessPoolExecutor(1, context).submit(f, *arguments).result()
    try:
        few = make(folder / "few", max(int(args.gb * 2**30 / (1024 * 2 * (S + 1))), WINDOW), 1024, args.tokenizer)
        out = {name: run(in_cache, path) for name, path in few.items()}
        out["original"] = run(as_the_original, few["LITPKDS"], args.original)
        for name, path in few.items():
            out[name]["cold"] = run(cold, path)
        small = make(folder / "many", args.files, 4, args.tokenizer)
        for name, path in small.items():
            out[name]["many files"] = run(many, path)
    finally:
        shutil.rmtree(folder)
    print(f"{'':28}{'M tokens/s':>14}{'M a CPU second':>18}")
    rows = [(f"{name}: {what}", out[name][what]) for name in few for what in ("read", "order", "loader", "cold")]
    for what, row in [*rows, (f"original{'' if args.original else ', as a loop of ours'}", out["original"])]:
        print(f"{what:28}{row['tokens/s'] / 1e6:14,.1f}{row['tokens/cpu s'] / 1e6:18,.1f}")
    for name in few:
        ratios = {what: out[name][what]["tokens/cpu s"] / out["original"]["tokens/cpu s"] for what in ("read", "loader")}
        out[name]["over original"] = ratios
        print(
            f"{name}: {ratios['read']:.2f} of the original's rate a CPU second for reading, {ratios['loader']:.2f} for batches"
        )
        print(f"{name}: " + ", ".join(f"{key} {value:,.2f}" for key, value in out[name]["many files"].items()))
    if args.json:
        packages = ("array-record", "grain", "numpy", "jax")
        versions = {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}
        machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg(), "versions": versions}
        settings = {"gb": args.gb, "files": args.files, "original": bool(args.original)}
        args.json.write_text(json.dumps({**machine, **settings, "figures": out}, indent=1) + "\n")


if __name__ == "__main__":
    main()
