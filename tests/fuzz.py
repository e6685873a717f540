"""Damages every file that a command reads, and its arguments, from a seed; runs the command and says how it took it.

    python tests/fuzz.py --seed 1 --cases 500 [--only KIND] [--case K]

Imports once and forks for each case, so that a case takes a fraction of a second. Case K of a seed is always the same one.
What a command may do with what it cannot use: one clear line. Not: a traceback, a hang, an exit code 0 that it has not earned.
An exit code 0 is earned if the result is that of the undamaged files, or if the damage left what nobody can tell from a good
file (another learning rate in a config, say): see `plausible`.
"""

from __future__ import annotations

import argparse
import atexit
import collections
import gc
import gzip
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"fuzz-compiled-{os.getuid()}"))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import numpy as np
import safetensors.numpy
import sentencepiece
import tokenizers
import torch
import zstandard
from tiny import TINY, make_tiny_data

from tinyllama_jax import checkpoint, convert, errors, generate, plan, processes, replay, report, train
from tinyllama_jax.data import audit, blocks, litpkds, prepare

MEMORY = 6 << 30  # bytes that a case may add
SLOW = 30  # a case is a hang after so many times what the undamaged one took, and PATIENCE
LONGEST = 2_000  # characters of a clear line


class Target(NamedTuple):
    """A command on good files."""

    kind: str
    arguments: str
    folders: str  # of the stage, which it needs
    files: str  # patterns of what it reads, which are damaged
    result: Callable[[Path], str]  # what it made
    codes: tuple[int, ...] = (2,)  # that say in words that something is wrong
    share: float = 1.0  # of the cases, in proportion


def digest(*patterns: str) -> Callable[[Path], str]:
    """The result is the bytes of the files of `patterns`."""

    def of(folder: Path) -> str:
        files = sorted(f for pattern in patterns for f in folder.glob(pattern) if f.is_file())
        return hashlib.sha256(b"\0".join(f.name.encode() + f.read_bytes() for f in files)).hexdigest()

    return of


def printed(folder: Path) -> str:
    """The result is what was printed, without times."""
    return re.sub(r"[\d.,]+ (s|a second|seconds|min)\b", "", (folder / "stdout").read_text(errors="replace"))


def losses(folder: Path) -> str:
    """The result is the last step's numbers."""
    last = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[-1])
    return str([last.get(key) for key in ("step", "loss", "grad_norm", "checksum")])


def weights(run: str) -> Callable[[Path], str]:
    """The result is a run folder's weights and tokenizer."""

    def of(folder: Path) -> str:
        params, _, _ = checkpoint.load_params(folder / run)
        names = sorted(safetensors_names(params))
        return hashlib.sha256(b"".join(name.encode() + array.tobytes() for name, array in names)).hexdigest()

    return of


def safetensors_names(params: dict, prefix: str = "") -> list[tuple[str, np.ndarray]]:
    """(path, array) of each leaf."""
    out = []
    for key, value in params.items():
        out += safetensors_names(value, f"{prefix}{key}/") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return out


def import_(argv: list[str]) -> int:
    """tools/convert_from_torch.py, which is no module."""
    return _tool("convert_from_torch", argv)


def export(argv: list[str]) -> int:
    """tools/convert_to_torch.py."""
    return _tool("convert_to_torch", argv)


def _tool(name: str, argv: list[str]) -> int:
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(argv)


def watch(argv: list[str]) -> int:
    """The parent of process 1 of two; process 0 never comes."""
    os.environ |= {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9", "JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "2"}
    return processes._supervised("tinyllama_jax.train", argv)


MAIN = {
    "train": train.main, "replay": replay.main, "report": report.main, "plan": plan.main, "generate": generate.main,
    "export": export, "import": import_, "prepare": prepare.main, "audit": audit.main, "litpkds": litpkds.main, "watch": watch,
}  # fmt: skip
ORBAX = "run/checkpoints/10/*/* run/checkpoints/10/* run/checkpoints/10/*/d/* run/checkpoints/10/*/*/d/*"
DONE = "--config tiny.py --workdir run --train.steps=10"  # opens and restores everything, and has nothing to do
HF = "hf/config.json hf/tokenizer.json hf/tokenizer_config.json hf/generation_config.json hf/special_tokens_map.json"
PREPARE = "--tokenizer tok.model --output out --seq-len 16 --workers 1"
TARGETS = [
    Target("train", f"{DONE} --train.spike=5", "data run", f"run/*.json run/metrics.jsonl run/lock run/tokenizer/* run/checkpoints "
           f"{ORBAX} run/tensorboard run/checkpoints/10 run/processes/*", losses, (2, 3), 3),
    Target("train", DONE, "data run", "tiny.py data/a/*.json data/b/*.array_record* data/a data/a/tokenizer/*", losses, (2, 3), 2),
    Target("train", "--config tiny.py --workdir run", "data run", "run/metrics.jsonl data/a/*.array_record* data/a/manifest.json",
           losses, (2, 3), 0.5),
    Target("train", "--config run/config.json --workdir run", "data run", "run/config.json", losses, (2, 3)),
    Target("train", "--config tiny.py --workdir new --init.from=run --train.steps=2", "data run", f"run/*.json run/tokenizer/* {ORBAX}",
           lambda f: (f / "new/metrics.jsonl").read_text().split("tokens_per")[0], (2, 3), 0.5),
    Target("train", "--config tiny.py --workdir run --data.sources=packed/train_a --train.steps=2", "packed run0",
           "packed/* packed/tokenizer/*", lambda f: "", (2, 3), 0.5),
    Target("replay", "--run run --step 9", "data run", f"run/*.json run/metrics.jsonl {ORBAX} run/tokenizer/* data/a/manifest.json",
           printed, (2, 1), 0.5),
    Target("report", "run", "run", "run/metrics.jsonl run/unigram.json", digest("run/loss.png")),
    Target("audit", "data/a data/b --allow duplicate,overlap", "data", "data/a/* data/b/* data/a/tokenizer/* data/a", printed, (2, 4)),
    Target("audit", "--allow duplicate,overlap --config tiny.py --processes 2 --train.seqs_per_device=4", "data", "tiny.py data/a/manifest.json data/a/*.array_record*", printed, (2, 4)),
    Target("audit", "packed/train_a --seq-len 16 --allow filling,duplicate,overlap", "packed", "packed/* packed/tokenizer/*", printed, (2, 4)),
    Target("litpkds", "--input data/a --prefix train_x --output out --chunk-size 500", "data",
           "data/a/* data/a/tokenizer/* data/a", digest("out/*.bin")),
    Target("prepare", f"--train text.jsonl {PREPARE}", "", "text.jsonl tok.model", digest("out/manifest.json")),
    Target("prepare", f"--train texts {PREPARE}", "texts", "texts/*", digest("out/manifest.json")),
    Target("prepare", f"--train texts/c.parquet {PREPARE}", "texts", "texts/c.parquet", digest("out/manifest.json")),
    Target("prepare", f"--train halves --dedup minhash {PREPARE}", "halves out.partial",
           "out.partial/* out.partial/*/*", digest("out/manifest.json")),
    Target("prepare", "--train text.jsonl --tokenizer hf --output out --seq-len 16 --workers 1", "hf",
           "hf/tokenizer.json hf/tokenizer_config.json hf/special_tokens_map.json", digest("out/manifest.json")),
    Target("export", "--checkpoint run --output out", "run", f"run/config.json run/data.json {ORBAX} run/tokenizer/*", digest("out/*")),
    Target("import", "--checkpoint hf --output out", "hf", f"{HF} hf/*.safetensors", weights("out")),
    Target("import", "--checkpoint sharded --output out", "sharded", "sharded/*", weights("out")),
    Target("import", "--checkpoint lit.pth --output out --config tiny.py --tokenizer tok.model", "", "lit.pth tok.model", weights("out")),
    Target("generate", "--checkpoint run --prompt x --max-new-tokens 2 --greedy", "run", f"run/config.json {ORBAX} run/tokenizer/*", printed),
    Target("generate", "--checkpoint hf --prompt x --max-new-tokens 2 --greedy", "hf", f"{HF} hf/*.safetensors", printed),
    Target("plan", "--config tiny.py --on cpu:1", "data", "tiny.py", printed, (2, 3), 0.3),
    Target("plan", "--law inference --inference-tokens 1e12", "", "", printed, (2, 3)),
    Target("watch", "--config tiny.py --workdir run --train.wait=0.5", "data run", "run/processes/*.json run/config.json",
           lambda f: "", (75, 2)),
]  # fmt: skip


# -- good files -----------------------------------------------------------------------------------------------------------


def make_stage(stage: Path) -> None:
    """Writes, with the commands themselves, one good file of each kind. Runs in a process of its own."""
    os.chdir(stage)
    make_tiny_data(stage)
    (stage / "data").mkdir()
    for name in "ab":
        (stage / name).rename(stage / "data" / name)
    (stage / "512.model").rename("tok.model")
    (stage / "a.train.jsonl").rename("text.jsonl")
    (stage / "tiny.py").write_text(TINY.replace("DATA", "data").replace("steps=24", "steps=12").replace("every=5", "every=5"))
    lines = Path("text.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    Path("texts").mkdir()
    Path("texts/a.txt").write_text(texts[0])
    Path("texts/b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:4]).encode(), mtime=0))
    Path("texts/d.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines[4:8]).encode()))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts[8:12]}), "texts/c.parquet", compression="zstd")
    Path("halves").mkdir()
    Path("halves/a.jsonl").write_text("\n".join(lines[:8]))
    Path("halves/b.jsonl").write_text("{")
    half = f"--train halves --dedup minhash {PREPARE}".split()
    try:
        prepare.main(half)
    except errors.UserError:
        Path("halves/b.jsonl").write_text("\n".join(lines[8:]))
    for split, file in (("train", "train_a"), ("validation", "validation_a")):
        litpkds.export(Path("data/a"), split, Path("packed"), file, 500)
    train.main("--config tiny.py --workdir run --train.steps=10".split())
    Path("run/unigram.json").write_text('{"val_loss": 5.5}')
    Path("run/processes").mkdir(exist_ok=True)
    there = {"process": 0, "processes": 2, "moves": 3, "step": 1, "doing": "training", "ended": None}
    Path("run/processes/0.json").write_text(json.dumps(there | {"host": "a", "beats": 4, "stopped": False, "why": ""}))
    convert.export("run", "hf")
    tensors = safetensors.numpy.load_file("hf/model.safetensors")
    shutil.copytree("hf", "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        safetensors.numpy.save_file({n: tensors[n] for n in names if names[n] == file}, Path("sharded") / file)
    Path("sharded/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    torch.save({"model": _as_lit(tensors), "iter_num": 3, "step_count": 3}, "lit.pth")
    for path in Path().glob("*"):
        if path.name in ("one", "other", "400.model") or path.name.startswith(("a.", "b.", "one.", "other.")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    Path("run0").mkdir()


def _as_lit(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    from tinyllama_jax import lit

    out, K = {}, 2
    for theirs, ours in lit.NAMES.items():
        for i in range(2) if "{}" in theirs else [0]:
            out[theirs.format(i)] = torch.from_numpy(tensors[ours.format(i)].copy())
    for i in range(2):
        parts = [tensors[f"model.layers.{i}.self_attn.{n}_proj.weight"].reshape(K, -1, 8, 32) for n in "qkv"]
        out[lit.FUSED.format(i)] = torch.from_numpy(np.concatenate(parts, 1).reshape(-1, 32).copy())
    return out


# -- damage ---------------------------------------------------------------------------------------------------------------

VALUES = [None, True, False, -1, 0, 1, 1.5, -1e308, 1e308, 10**30, -(2**63), 2**64, "", "x", "../../x", "/dev/null", "a\0b", "\ud800",
          [], {}, [[]], [None], {"a": None}, "9" * 400, "²", 17, "\n", 1e-300]  # fmt: skip
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "[" * 20_000 + "]" * 20_000, '{"a":' * 5_000 + "1" + "}" * 5_000, "01", "'x'", "9" * 5_000,
       '"\\ud800"', "tru", ""]  # fmt: skip
WORDS = ["", " ", "-1", "0", "1", "1e999999999", "nan", "inf", "-inf", "9" * 400, "1e308", "-1e-320", "٣", "\udcff", "a" * 100_000, "..", ".",
         "/proc/x", "/dev/null", "data", "nonexistent", "text.jsonl", "fifo", "loop", "dangling", "💥", "a\nb", "-", "--", "{}", "null",
         "0x10", "1_000", "1,2", ":", "D:1e999999999", "%s", "*", "1e9", "1000000000", "99999999999999999999", "a" * 300, "data/a:1e999999999",
         "data/a:0", "tiny.py", "gs://x/y", "http://127.0.0.1:9/x", "\x1b[31m", "1:2", "2:1", "0:1e9"]  # fmt: skip


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Another sequence of bytes."""
    if not data:
        return rng.choice([b"\0", b"{}", b"x\n"])
    at, end = sorted((rng.randrange(len(data)), rng.randrange(len(data) + 1)))
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    head = bytearray(data)
    head[rng.randrange(min(len(data), 64))] ^= 1 << rng.randrange(8)
    return rng.choice([
        data[:at], data[:-1], bytes(flipped), bytes(flipped), bytes(head), data[:at] + data[end:], data[:at] + rng.randbytes(9) + data[at:],
        data[:at] + bytes(end - at) + data[end:], b"\0" * len(data), data + b"\0", b"\xff\xfe" + data, data[:at] + b"\xff\xfe\xed\xa0\x80" + data[at:],
        b"", data + data, data[1:], b"\xef\xbb\xbf" + data, rng.randbytes(len(data)), data[:at] + b"\0" + data[at + 1 :],
    ])  # fmt: skip


def damage_json(rng: random.Random, text: str) -> str:
    """Another JSON text, or one that is nearly one."""
    lines = text.splitlines()
    if len(lines) > 1 and all(line.startswith("{") for line in lines[:2]) and lines[0].endswith("}"):  # of lines
        i = rng.choice([0, len(lines) - 1, len(lines) - 1, rng.randrange(len(lines))])
        new = rng.choice([[damage_json(rng, lines[i])] * 5 + [lines[rng.randrange(len(lines))], "", lines[i] * 2, "null", "[]"]][0])
        return "\n".join([*lines[:i], new, *lines[i + 1 :]]) + "\n"
    tree = json.loads(text)
    paths = list(_paths(tree))
    path = rng.choice(paths)
    key = "@damaged@"
    what = rng.randrange(8)
    if what == 0 and path:  # a key less
        parent = _at(tree, path[:-1])
        del parent[path[-1]]
        return json.dumps(tree)
    if what == 1 and isinstance(_at(tree, path), dict):  # a key more, or twice
        inside = json.dumps(_at(tree, path))[1:-1]
        name = rng.choice([*_at(tree, path), "extra"])
        tree = _with(tree, path, key)
        more = f"{json.dumps(name)}: {json.dumps(rng.choice(VALUES))}"
        return json.dumps(tree).replace(f'"{key}"', "{" + ", ".join(filter(None, [inside, more])) + "}")
    if what == 2:
        return json.dumps(_with(tree, path, key)).replace(f'"{key}"', rng.choice(RAW))
    if what == 3:
        return json.dumps(_with(tree, path, _at(tree, rng.choice(paths))))
    if what == 4 and isinstance(value := _at(tree, path), int | float | str) and not isinstance(value, bool):
        other = [str(value), [value], -1, 2**31] if isinstance(value, str) else [-value, value + 1, value * 1000, str(value), [value], value + 0.5]
        return json.dumps(_with(tree, path, rng.choice(other)))
    return json.dumps(_with(tree, path, rng.choice(VALUES)))


def _paths(tree: object, path: tuple = ()):
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree[:20]) if isinstance(tree, list) else ():
        yield from _paths(value, (*path, key))


def _at(tree: object, path: tuple) -> object:
    for key in path:
        tree = tree[key]
    return tree


def _with(tree: object, path: tuple, value: object) -> object:
    if not path:
        return value
    tree = json.loads(json.dumps(tree))
    _at(tree, path[:-1])[path[-1]] = value
    return tree


def odd_file(rng: random.Random, path: Path, others: list[Path]) -> str:
    """Puts something else in place of a file or folder; says what."""
    what = rng.choice(["gone", "folder", "fifo", "loop", "dangling", "socket", "unreadable", "device", "other", "stray"])
    if what == "stray":  # beside it
        name = rng.choice([".DS_Store", "18", "0019", "²", "x.tmp", "caf\udce9", ".nfs0001", "Thumbs.db", "a" * 200])
        stray = path.parent / name
        if not stray.exists():
            stray.mkdir() if rng.randrange(2) else stray.write_bytes(b"stray")
        return f"{what} {ascii(name)}"
    other = rng.choice(others)
    content = other.read_bytes() if what == "other" and other.is_file() else b""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "dangling":
        path.symlink_to("nowhere")
    elif what == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # its name may have 108 bytes
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(here)
    elif what == "unreadable":
        path.touch(0)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "other":
        path.write_bytes(content)
    return what


def damage_file(rng: random.Random, folder: Path, target: Target) -> tuple[str, Callable[[], bool]]:
    """Damages one of the files; returns (what was done, whether what is there now could be a good file)."""
    files = sorted({f for pattern in target.files.split() for f in folder.glob(pattern)})
    path = rng.choice(files)
    name = path.relative_to(folder)
    if path.is_dir() or rng.randrange(5) == 0:
        what = odd_file(rng, path, files)
        return f"{name}: {what}", lambda: what.startswith("stray")
    before = path.read_bytes()
    after, what = None, "bytes"
    if rng.randrange(4) and len(before) < 1 << 20:
        try:
            after, what = damage_json(rng, before.decode()).encode(errors="surrogatepass"), "json"
        except (ValueError, RecursionError):
            pass
    after = damage_bytes(rng, before) if after is None else after
    path.write_bytes(after)
    return f"{name}: {what}", lambda: plausible(path, before, after)


def plausible(path: Path, before: bytes, after: bytes) -> bool:
    """Whether nobody could tell that `after` is not what was to be written to `path`."""
    try:
        return before == after or _plausible(path, before, after)
    except Exception:  # of each library its own: it cannot read it
        return False


def _plausible(path: Path, before: bytes, after: bytes) -> bool:
    name = path.name
    if name == "tokenizer.json":
        return bool(tokenizers.Tokenizer.from_str(after.decode()))
    if name.endswith(".jsonl"):
        old = [json.loads(line) for line in before.splitlines()]
        return all(_alike(old[-1], _strict(line)) or _alike(old[0], _strict(line)) for line in after.splitlines() if line)
    if name.endswith(".json"):
        free = name in ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
        return _alike(json.loads(before), _strict(after), free)
    if name.endswith(".model"):
        return sentencepiece.SentencePieceProcessor(model_proto=after).vocab_size() > 0
    if name.endswith(".bin"):
        return len(before) == len(after) and before[:24] == after[:24]
    if name.endswith(".safetensors"):
        old, new = safetensors.numpy.load(before), safetensors.numpy.load(after)
        same = {k: (v.dtype, v.shape) for k, v in old.items()} == {k: (v.dtype, v.shape) for k, v in new.items()}
        return same and all(np.isfinite(v).all() for v in new.values())
    if name.endswith(".pth"):
        old, new = (torch.load(f, map_location="cpu", weights_only=True) for f in (io.BytesIO(before), io.BytesIO(after)))
        tensors = new["model"].items()
        return old["model"].keys() == new["model"].keys() and all(bool(torch.isfinite(t).all()) for _, t in tensors)
    if name.endswith(".gz"):
        return bool(gzip.decompress(after).decode())
    if name.endswith(".zst"):
        return bool(zstandard.ZstdDecompressor().decompressobj().decompress(after).decode())
    if name.endswith(".parquet"):
        import pyarrow.parquet

        return "text" in pyarrow.parquet.read_table(io.BytesIO(after)).column_names
    if name.endswith(".py"):
        return bool(compile(after, name, "exec"))
    return name.endswith(".txt") and after.decode() is not None


def _strict(text: bytes) -> object:
    def refuse(constant: str):
        raise ValueError(constant)

    return json.loads(text.decode(), parse_constant=refuse)


def _alike(old: object, new: object, free: bool = False) -> bool:
    """Whether two JSON values are of one shape and kind. `free`: keys may be absent, and null."""
    if free and (old is None or new is None):
        return True
    if isinstance(old, dict):
        return isinstance(new, dict) and all(_alike(old[k], new[k], free) if k in new else free for k in old)
    if isinstance(old, list):
        return isinstance(new, list) and all(any(_alike(o, n, free) for o in old) or not old for n in new)
    number = lambda v: isinstance(v, int | float) and not isinstance(v, bool)
    if old is None or (number(old) and number(new)):
        return old is None or (abs(new) < 2**53 and (old < 0 or new >= 0 or isinstance(old, float)))
    return type(old) is type(new)


def damage_arguments(rng: random.Random, arguments: list[str], keys: list[str]) -> tuple[list[str], str, bool]:
    """(other arguments, what was done, whether they could be meant)."""
    words, what = list(arguments), rng.randrange(8)
    i, word = rng.randrange(len(words)), rng.choice(WORDS)
    if what == 0:
        return [*words, rng.choice(["--zzz", "--zzz=1", "--model.zzz=1", "-z", "zzz", "--", "--config"])], "unknown option", False
    if what == 1:
        del words[i]
        return words, "a word less", True
    if what == 2:
        return [*words, *rng.choice([words[:2], words[-2:]])], "an option twice", True
    if what <= 4 and keys:
        key = rng.choice(keys)
        bad = word in ("", "nan", "1e999999999", "{}", ":") and not key.startswith(("data.skip", "init", "log.wandb", "workdir"))
        return [*words, rng.choice([f"--{key}={word}", f"--{key}"])], f"--{key}", not bad or "ramp" in key or "keep_steps" in key
    if words[i].startswith("--") and "=" in words[i]:
        words[i] = f"{words[i].partition('=')[0]}={word}"
    else:
        words[i] = word
    return words, "another value", True


# -- running --------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    number: int
    target: Target
    argv: list[str]
    what: str
    could_be: Callable[[], bool]
    folder: Path


def make_case(seed: int, number: int, stage: Path, targets: list[Target], clean: bool = False) -> Case:
    """The files and arguments of a case, in a folder of its own."""
    rng = random.Random(f"{seed} {number}")
    target = targets[number] if clean else rng.choices(targets, [t.share for t in targets])[0]
    folder = stage.parent / f"case-{number}-{'clean' if clean else seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in {"tiny.py", "text.jsonl", "tok.model", "lit.pth", *target.folders.split()}:
        copy = shutil.copytree if (stage / name).is_dir() else shutil.copy
        copy(stage / name, folder / name)
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    argv = target.arguments.split()
    if clean:
        return Case(number, target, argv, "undamaged", lambda: False, folder)
    if not target.files or rng.randrange(4) == 0:
        keys = (Path(__file__).parent / "config_keys.txt").read_text().split() if "--config tiny" in target.arguments else []
        argv, what, could_be = damage_arguments(rng, argv, keys if target.kind != "import" else [])
        return Case(number, target, argv, what, lambda: could_be, folder)
    what, could_be = damage_file(rng, folder, target)
    return Case(number, target, argv, what, could_be, folder)


def start(case: Case, seconds: float) -> int:
    """Forks; the child runs the command in the case's folder and ends as it would by itself. Returns its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    os.setsid()
    os.chdir(case.folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.argv = [case.target.kind, *case.argv]
    try:
        errors.run_main(MAIN[case.target.kind])
    except SystemExit as end:
        if end.code == 0:
            sys.stdout.flush()
            try:
                Path("result").write_text(case.target.result(Path()), errors="replace")
            except Exception:
                Path("result").write_text("none: " + traceback.format_exc())
        _end(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        _end(1)


def _end(code: int) -> None:
    """As the interpreter ends, but for giving the memory back, which takes as long as many a case."""
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def warm_up() -> None:
    """Imports what the commands import when they need it, and starts no thread."""
    import apache_beam.runners.portability.fn_api_runner
    import matplotlib.figure
    import pyarrow.parquet

    assert apache_beam and pyarrow
    matplotlib.figure.Figure(layout="constrained").savefig(io.BytesIO())
    blocks.Record(16, "uint16")
    gc.freeze()


def verdict(case: Case, status: int, late: bool, right: str | None) -> tuple[str, str]:
    """(how the command took it, why one says so). `right`: the result of the undamaged files."""
    said = (case.folder / "stderr").read_text(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    if late or code == -signal.SIGXCPU:
        return "hang", f"exit {code}"
    if "Traceback (most recent" in said or code < 0 or code == 99:
        return "traceback", f"exit {code}: {(said.strip().splitlines() or [''])[-1][:200]}"
    if code == 0:
        result = case.folder / "result"
        if right is None or (result.is_file() and result.read_text(errors="replace") == right):
            return "fine", ""
        return ("fine", "") if case.could_be() else ("wrong 0", result.read_text(errors="replace")[:200])
    if code not in case.target.codes and not (case.target.kind == "train" and code == 130):
        return "traceback", f"exit {code}: {said[-200:]}"
    if code in (1, 3, 4):
        return "one clear line", ""
    lines = [line for line in said.splitlines() if line.strip()]
    usage = next((i for i, line in enumerate(lines) if ": error: " in line), 0) if said.startswith("usage:") else 0
    lines = [line for line in lines[usage:] if "warning: " not in line and ": left out " not in line]
    if len(lines) != 1 or "error: " not in lines[0]:
        return "not one line", f"exit {code}, {len(lines)} lines: {said[:300]!r}"
    if len(lines[0]) > LONGEST or not lines[0].isprintable():
        return "not one line", f"{len(lines[0]):,} characters, printable: {lines[0].isprintable()}: {lines[0][:150]!r}"
    return "one clear line", lines[0]


def run_all(cases, jobs: int, patience: Callable[[Case], float], done: Callable[[Case, int, bool, float], None]) -> None:
    """Runs the cases, `jobs` at once; calls `done` with (case, wait status, whether it was ended for being late, seconds)."""
    running: dict[int, tuple[Case, float]] = {}
    cases = iter(cases)
    while True:
        while len(running) < jobs and (case := next(cases, None)):
            running[start(case, patience(case))] = case, time.monotonic()
        if not running:
            return
        for child, (case, began) in list(running.items()):
            late = time.monotonic() - began > patience(case)
            if late:
                os.killpg(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0 if late else os.WNOHANG)
            if ended:
                del running[child]
                done(case, status, late, time.monotonic() - began)
        time.sleep(0.01)


def main(argv: list[str]) -> int:
    """Prints a table by kind, and each case that failed; returns 1 if one did."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--only", help="kinds of command: " + ",".join(MAIN))
    parser.add_argument("--case", type=int, help="this one alone; its folder is kept")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--patience", type=float, default=120, help="seconds, besides a multiple of what the good files take")
    parser.add_argument("--stage", help="a folder for the good files, kept and used again")
    parser.add_argument("--verbose", action="store_true", help="print each case")
    args = parser.parse_args(argv)
    base = Path(args.stage or tempfile.mkdtemp(prefix="fuzz-"))
    stage = base / "good"
    if not (stage / "run0").is_dir():
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        if (child := os.fork()) == 0:
            sys.stdout.flush()
            os.dup2(2, 1)
            make_stage(stage)
            sys.stdout.flush()
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise SystemExit("the good files could not be made")
    warm_up()
    targets = [t for t in TARGETS if not args.only or t.kind in args.only.split(",")]
    right: dict[Target, str] = {}
    took: dict[Target, float] = {}

    def calibrated(case: Case, status: int, late: bool, seconds: float) -> None:
        code, result = os.waitstatus_to_exitcode(status), case.folder / "result"
        meant = 75 if case.target.kind == "watch" else 0
        if code != meant or (code == 0 and result.read_text().startswith("none: ")):
            raise SystemExit(f"{case.target.kind} {case.target.arguments}: exit {code} on good files: see {case.folder}")
        text = result.read_text() if code == 0 else None
        took[case.target] = seconds
        right[case.target] = text
        print(f"{seconds:6.1f} s  {case.target.kind} {case.target.arguments}", flush=True)
        shutil.rmtree(case.folder)

    clean = (make_case(0, i, stage, targets, clean=True) for i in range(len(targets)))
    run_all(clean, args.jobs, lambda case: 600, calibrated)
    table: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    bad = []

    def judged(case: Case, status: int, late: bool, seconds: float) -> None:
        how, why = verdict(case, status, late, right[case.target])
        table[case.target.kind][how] += 1
        told = f"case {case.number}: {how}: {case.target.kind} ({seconds:.1f} s): {case.what}: {ascii(' '.join(case.argv))[:300]}: {ascii(why)}"
        if how not in ("fine", "one clear line"):
            bad.append(told)
            print(told, flush=True)
        elif args.verbose:
            print(told, flush=True)
        if args.case is None:
            shutil.rmtree(case.folder, ignore_errors=True)
        else:
            print(case.folder)

    numbers = range(args.cases) if args.case is None else [args.case]
    began = time.monotonic()
    run_all((make_case(args.seed, k, stage, targets) for k in numbers), args.jobs, lambda c: args.patience + SLOW * took[c.target], judged)
    hows = ["one clear line", "fine", "traceback", "hang", "wrong 0", "not one line"]
    print(f"{'':10}" + "".join(f"{how:>16}" for how in hows))
    for kind, counts in [*sorted(table.items()), ("all", sum(table.values(), collections.Counter()))]:
        print(f"{kind:10}" + "".join(f"{counts[how]:16,}" for how in hows))
    print(f"seed {args.seed}: {len(numbers):,} cases in {time.monotonic() - began:.0f} s, {len(bad)} failed")
    if not args.stage and args.case is None:
        shutil.rmtree(base)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
