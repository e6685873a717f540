"""Training data in a bucket beside the same on this disk: the first batch, the time until all shards are here, the rate after.

    python tools/bench_bucket.py [--tokenizer FILE] [--gb 1.5] [--blocks 16384] [--folder DIR] [--json OUT]

The bucket is moto's S3 server (extra `dev`), a process on this machine. The data and the loader are those of bench_loading.py.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from bench_loading import BATCH, S, config_of, make, rate

from tinyllama_jax.base import store
from tinyllama_jax.data import feed

TURNS = 6
STEP = 5.0  # seconds that a step of 2 M tokens takes: 1.1B parameters on 16 A100 at 24 k tokens/s each


@contextlib.contextmanager
def server() -> Iterator[None]:
    """A local server in place of S3, with an empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL)
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "any")
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"} | keys
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.2)
        store.filesystem("s3://bucket").mkdir("bucket")
        yield
    finally:
        process.kill()


def measure(path: str, url: str, cache: str) -> dict[str, float]:
    """Of the source `url` in a bucket, whose files are also at `path`."""
    began, config = time.perf_counter(), config_of(url)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=cache))
    (source,) = sources = feed.open_sources(config)
    out = {"files": len(source.files()), "GB": sum(source.shards.sizes) / 1e9, "open, s": time.perf_counter() - began}
    batches = feed.training(config, sources, BATCH, np.arange(BATCH), 0)
    next(batches)
    out["first batch, s"] = time.perf_counter() - began
    n, waited = 1, 0.0
    while not all(map(source.shards.whole, range(len(source.files())))):
        time.sleep(STEP)
        last = time.perf_counter()
        next(batches)
        n, waited = n + 1, waited + time.perf_counter() - last
    out |= {"all shards, s": time.perf_counter() - began, "batches by then": n, "of it waited for a batch, s": waited}
    out["MB/s"] = (source.shards.whole_bytes + source.shards.range_bytes) / 1e6 / out["all shards, s"]
    local = feed.training(config_of(path), feed.open_sources(config_of(path)), BATCH, np.arange(BATCH), 0)
    turns = {"bucket": [], "local": []}
    for _ in range(TURNS):  # other work on the machine changes both
        for name, loader in (("bucket", batches), ("local", local)):
            turns[name].append(rate(lambda loader=loader: next(loader)[0].shape[1]))
    for unit in ("tokens/s", "tokens/cpu s"):  # the first turn fills the page cache
        for name, each in turns.items():
            out[f"{name}, {unit}"] = statistics.median(turn[unit] for turn in each[1:])
        ratios = [a[unit] / b[unit] for a, b in zip(turns["bucket"][1:], turns["local"][1:], strict=True)]
        out[f"bucket over local, {unit}"] = statistics.median(ratios)
        out[f"each turn, {unit}"] = ratios
    print("\n".join(source.shards.news(last=True)), flush=True)
    return out


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/demo/tokenizer/tokenizer.model"))
    parser.add_argument("--gb", type=float, default=1.5, help="of tokens, in each format")
    parser.add_argument("--blocks", type=int, default=16_384, help="in each file")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (a temporary one)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder, out = Path(tempfile.mkdtemp(dir=args.folder)), {}
    context = multiprocessing.get_context("spawn")
    try:
        sources = make(folder / "data", max(int(args.gb * 2**30 / (args.blocks * 2 * (S + 1))), 1), args.blocks, args.tokenizer)
        with server():
            for name, path in sources.items():
                is_folder = Path(path).is_dir()
                where = Path(path) if is_folder else Path(path).parent
                store.filesystem("s3://bucket").put(f"{where}/", f"bucket/{where.name}/", recursive=True)
                url = f"s3://bucket/{where.name}" + ("" if is_folder else f"/{Path(path).name}")
                with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
                    out[name] = pool.submit(measure, path, url, f"{folder / 'cache'}:100").result()
                print("\n".join(f"{name}: {what} {value}" for what, value in out[name].items()), flush=True)
                shutil.rmtree(folder / "cache")
    finally:
        shutil.rmtree(folder)
    if args.json:
        packages = ("array-record", "grain", "numpy", "s3fs", "aiobotocore", "moto")
        versions = {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}
        machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg(), "versions": versions}
        args.json.write_text(json.dumps({**machine, "gb": args.gb, "blocks": args.blocks, "figures": out}, indent=1) + "\n")


if __name__ == "__main__":
    main()
