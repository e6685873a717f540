"""Training data in a bucket beside the same on this disk: the first batch, the time until all shards are here, the rate after.

    python tools/bench_bucket.py [--tokenizer FILE] [--gb 1.5] [--blocks 16384] [--folder DIR] [--json OUT]

The bucket is a small server of ours, a process on this machine, which answers lists and byte ranges from files as S3 does.
moto's, which the tests use, takes the longer for a range the larger the object is. Data and loader: bench_loading.py.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import http.server
import json
import multiprocessing
import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_loading
import numpy as np
from bench_loading import BATCH, S, config_of, make, rate

from tinyllama_jax.data import feed

TURNS = 24
bench_loading.SECONDS = 1.0  # of a turn
STEP = 5.0  # seconds that a step of 2 M tokens takes: 1.1B parameters on 16 A100 at 24 k tokens/s each


class Bucket(http.server.BaseHTTPRequestHandler):
    """Answers what reading needs of S3 from the files of `FOLDER`: one page of a list, and bytes of an object."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """A list, or an object."""
        url = urllib.parse.urlsplit(self.path)
        query, path = dict(urllib.parse.parse_qsl(url.query)), Path(os.environ["FOLDER"], url.path.strip("/"))
        if "list-type" in query:
            folder = path / query.get("prefix", "")
            files = sorted(f for f in folder.iterdir() if f.is_file()) if folder.is_dir() else []
            date = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            key = lambda f: f"<Key>{f.relative_to(path)}</Key><Size>{f.stat().st_size}</Size>{date}"
            each = "".join(f"<Contents>{key(f)}</Contents>" for f in files)
            self.answer(200, f"<ListBucketResult>{each}<IsTruncated>false</IsTruncated></ListBucketResult>".encode())
        elif not path.is_file():
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            size = path.stat().st_size
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            with path.open("rb") as file:
                file.seek(int(first))
                content = file.read(min(int(last or size - 1), size - 1) + 1 - int(first))
            self.answer(206, content, {"Content-Range": f"bytes {first}-{int(first) + len(content) - 1}/{size}"})

    def answer(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        """Sends one response."""
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def serve(port: int) -> None:
    """Until it is killed."""
    http.server.ThreadingHTTPServer.request_queue_size = 256
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Bucket).serve_forever()


@contextlib.contextmanager
def server(folder: Path) -> Iterator[None]:
    """A local server in place of S3, whose buckets are the folders in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "any")
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"} | keys
    os.environ["FOLDER"] = str(folder)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(port,), daemon=True)
    process.start()
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.2)
        yield
    finally:
        process.kill()


def measure(path: str, url: str, cache: str) -> dict[str, float]:
    """Of the source `url` in a bucket, whose files are also at `path`."""
    began, cpu, config = time.perf_counter(), time.process_time(), config_of(url)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=cache))
    (source,) = sources = feed.open_sources(config)
    out = {"files": len(source.files()), "GB": sum(source.shards.sizes) / 1e9, "open, s": time.perf_counter() - began}
    batches = feed.training(config, sources, BATCH, np.arange(BATCH), 0)
    next(batches)
    out |= {"first batch, s": time.perf_counter() - began, "of it cpu s": time.process_time() - cpu}
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
        out[f"a quarter and three of the turns, {unit}"] = np.quantile(ratios, [0.25, 0.75]).tolist()
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
        with server(folder):
            for name, path in sources.items():
                url = f"s3://{Path(path).relative_to(folder)}"
                with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
                    out[name] = pool.submit(measure, path, url, f"{folder / 'cache'}:100").result()
                print("\n".join(f"{name}: {what} {value}" for what, value in out[name].items()), flush=True)
                shutil.rmtree(folder / "cache")
    finally:
        shutil.rmtree(folder)
    if args.json:
        packages = ("array-record", "grain", "numpy", "s3fs", "aiobotocore")
        versions = {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}
        machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg(), "versions": versions}
        args.json.write_text(json.dumps({**machine, "gb": args.gb, "blocks": args.blocks, "figures": out}, indent=1) + "\n")


if __name__ == "__main__":
    main()
