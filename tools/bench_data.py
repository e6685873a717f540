"""Data at speed: preparing it against a bare SentencePiece loop, reading blocks at random, loading batches.

    python tools/bench_data.py [--tokenizer PATH] [--mb 128] [--workers N] [--json OUT]
    python tools/bench_data.py --hours|--memory|--bombs [--tokenizer PATH] [--mb 128] [--json OUT]

The text is Python's own library, 128 MB of it. `make demo` makes the default tokenizer. --hours: processor time on prose
(this machine's documentation, as jsonl.zst) and on code (Python modules, as parquet), by which the hours of SlimPajama and
StarCoder are estimated: a busy machine matters little. --memory: what a worker takes with files of 1 GB. --bombs: with what
is made to take much.
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
import shutil
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
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from tinyllama_jax.base import config as c
from tinyllama_jax.data import feed
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.data.prepare.pipeline import prepare

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


def watched(*arguments: object, may_fail: bool = False, limit: float = 1e9) -> dict:
    """Runs `prepare`: seconds, processor seconds of all its processes, and the most bytes that one of them had in memory."""
    began, cpu, peak = time.perf_counter(), {}, 0
    words = [sys.executable, "-m", "tinyllama_jax.prepare", *map(str, arguments)]
    errors = tempfile.TemporaryFile()  # noqa: SIM115  closed below
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors, cwd=Path(__file__).parents[1])
    while child.poll() is None:
        for pid in below(child.pid):
            with contextlib.suppress(OSError, StopIteration):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                cpu[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                status = Path(f"/proc/{pid}/status").read_text().splitlines()
                peak = max(peak, next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM")))
        time.sleep(0.05)
        if time.perf_counter() > began + limit:
            child.terminate()
    out = {"seconds": time.perf_counter() - began, "cpu seconds": sum(cpu.values()), "peak bytes": peak}
    with errors:
        errors.seek(0)
        message = errors.read().decode(errors="replace").strip()
    if child.returncode and not may_fail:
        raise SystemExit(f"{' '.join(words)} failed: {message}")
    return out | ({"exit code": child.returncode, "said": message[-400:]} if may_fail else {})


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


def bombs(model: Path, folder: Path) -> dict:
    """What a worker takes with small files that unpack to much, and with documents that are hard to hold."""
    mb, emoji = 10**6, "\U0001f600"

    def write_gz(path: Path, *parts: bytes | int) -> None:
        with gzip.open(path, "wb", 1) as file:
            for part in parts:
                for _ in range(part) if isinstance(part, int) else ():
                    file.write(b"x" * mb)
                if isinstance(part, bytes):
                    file.write(part)

    def write_parquet(path: Path, text: str, n: int, **options) -> None:
        column = pyarrow.array([text], pyarrow.large_string()).dictionary_encode()
        schema = pyarrow.schema([("text", pyarrow.large_string())])
        with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd", write_batch_size=8, **options) as writer:
            for _ in range(n):
                writer.write_table(pyarrow.table({"text": column.dictionary}, schema=schema))

    def write_dictionary(path: Path, text: str, n: int) -> None:
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * n, pyarrow.int32()), pyarrow.array([text]))
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd")

    def write_tfds(path: Path, text: str) -> None:
        data = folder / "tfds/bomb/1.0.0"
        data.mkdir(parents=True)
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        writer = array_record_module.ArrayRecordWriter(str(data / "bomb-train.array_record-00000-of-00001"), "group_size:1")
        record = text.encode()
        for before in (b"", b"", b"\x0a\x04text", b"", b""):  # a tf.train.Example, whose library would take 20 GB for it
            length, number = b"", len(record)
            while True:
                length, number = length + bytes([number & 127 | (number > 127) << 7]), number >> 7
                if not number:
                    break
            record = before + (b"\x12" if before else b"\x0a") + length + record
        writer.write(record)
        writer.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=data, dataset_name="bomb", split="train", filetype_suffix="array_record"
        )
        info = tfds.core.SplitInfo(name="train", shard_lengths=[1], num_bytes=0, filename_template=template)
        tfds.folder_dataset.write_metadata(data_dir=data, features=features, split_infos=[info], check_data=False)
        path.write_text("")

    def line(text: bytes) -> bytes:
        return b'{"text": "%s"}\n' % text

    cases = {
        "small.jsonl": lambda p: p.write_bytes(line(b"x") * 9),
        "50 MB of words, escaped emoji between.jsonl": lambda p: p.write_bytes(line(b"word \\ud83d\\ude00 " * (50 * mb // 17))),
        "128 MB of words and an emoji.jsonl": lambda p: p.write_bytes(line(b"word " * (26 * mb) + emoji.encode())),
        "60 MB without a space.jsonl": lambda p: p.write_bytes(line(b"x" * 60 * mb)),
        "60 MB without a space.txt": lambda p: p.write_bytes(b"x" * 60 * mb),
        "60 MB of Chinese.txt": lambda p: p.write_text("\u5b57\u6f22" * (10 * mb)),
        "130 MB of empty lists.jsonl": lambda p: p.write_bytes(b'{"a": [%s[]], "text": "x"}\n' % (b"[]," * (43 * mb))),
        "8 MB of empty lists.jsonl": lambda p: p.write_bytes(b'{"a": [%s[]], "text": "x"}\n' % (b"[]," * (8 * mb // 3))),
        "a line of 1 GB.jsonl": lambda p: p.write_bytes(b"x" * (1000 * mb)),
        "a line of 1 GB.jsonl.gz": lambda p: write_gz(p, b'{"text": "', 1000, b'"}\n'),
        "a line of 4 GB.jsonl.zst": lambda p: p.write_bytes(
            b"".join(pyarrow.compress(b"x" * 500 * mb, codec="zstd", asbytes=True) for _ in range(8))
        ),
        "640 times 50 MB, a dictionary.parquet": lambda p: write_dictionary(p, "x" * 50 * mb, 640),
        "64 times 50 MB.parquet": lambda p: write_parquet(p, "x " * 25 * mb, 64, use_dictionary=False),
        "64 times 50 MB, as differences.parquet": lambda p: write_parquet(
            p, "x " * 25 * mb, 64, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}
        ),
        "a text of 1.9 GB.parquet": lambda p: write_parquet(p, "x" * 1900 * mb, 1, use_dictionary=False),
        "a record of 100 MB": lambda p: write_tfds(p, "words " * (100 * mb // 6)),
        "a record of 1 GB": lambda p: write_tfds(p, "x" * 1000 * mb),
    }
    out = {}
    for name, make in cases.items():
        path, tfds_ = folder / name, "record" in name
        make(path)
        words = [
            "--train",
            "tfds:bomb" if tfds_ else path,
            "--tokenizer",
            model,
            "--seq-len",
            S,
            "--workers",
            1,
            "--held-out",
            0,
        ]
        words += ["--data-dir", folder / "tfds"] if tfds_ else []
        row = watched(*words, "--output", folder / "out", may_fail=True, limit=90)  # it could go on for hours
        row["said"] = row["said"].replace(f"{folder}/", "")
        out[name] = {"bytes": path.stat().st_size, **row}
        print(name, json.dumps(out[name]), flush=True)
        for each in ("out", "out.partial", "tfds"):
            shutil.rmtree(folder / each, ignore_errors=True)
        path.unlink()
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
    parser.add_argument("--bombs", action="store_true", help="the same, with what is made to take much")
    args = parser.parse_args()
    args.tokenizer = args.tokenizer.absolute()
    if args.hours or args.memory or args.bombs:
        with tempfile.TemporaryDirectory() as name:
            measure = bombs if args.bombs else memory
            write(args, hours(args.tokenizer, args.mb, Path(name)) if args.hours else measure(args.tokenizer, Path(name)))
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
