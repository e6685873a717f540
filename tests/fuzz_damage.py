"""What `fuzz.py` does to files and arguments, and whether what is left could be meant."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pyarrow.parquet
import safetensors.numpy
import sentencepiece
import tokenizers
import torch
import zstandard

VALUES = [None, True, False, -1, 0, 1, 1.5, -1e308, 1e308, 1e-300, 10**30, -(2**63), 2**64, 17, "", "x", "../../x", "/dev/null"]
VALUES += ["a\0b", "\ud800", "9" * 400, "²", "\n", [], {}, [[]], [None], {"a": None}]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "[" * 20_000 + "]" * 20_000, '{"a":' * 5_000 + "1" + "}" * 5_000, "01", "'x'"]
RAW += ["9" * 5_000, '"\\ud800"', "tru", ""]
WORDS = [
    "",
    " ",
    "-1",
    "0",
    "1",
    "1e9",
    "1e308",
    "-1e-320",
    "1e999999999",
    "nan",
    "inf",
    "-inf",
    "9" * 400,
    "9" * 20,
    "1" + "0" * 9,
]
WORDS += [
    "..",
    ".",
    "/proc/x",
    "/dev/null",
    "data",
    "nonexistent",
    "text.jsonl",
    "tiny.py",
    "fifo",
    "loop",
    "dangling",
    "-",
    "--",
]
WORDS += [
    "{}",
    "null",
    "0x10",
    "1_000",
    "1,2",
    ":",
    "1:2",
    "2:1",
    "0:1e9",
    "D:1e999999999",
    "data/a:1e999999999",
    "data/a:0",
    "%s",
    "*",
]
WORDS += ["gs://x", "http://127.0.0.1:9/x", "a" * 300, "a" * 100_000, "\x1b[31m", "💥", "٣", "\udcff"]


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
    return rng.choice(
        [
            *(data[:at], data[:-1], data[1:], data[:at] + data[end:], b"", data + data),
            *(bytes(flipped), bytes(flipped), bytes(head), rng.randbytes(len(data)), data[:at] + rng.randbytes(9) + data[at:]),
            *(data[:at] + bytes(end - at) + data[end:], bytes(len(data)), data + b"\0", data[:at] + b"\0" + data[at + 1 :]),
            *(b"\xff\xfe" + data, b"\xef\xbb\xbf" + data, data[:at] + b"\xff\xfe\xed\xa0\x80" + data[at:]),
        ]
    )


def damage_json(rng: random.Random, text: str) -> str:
    """Another JSON text, or one that is nearly one."""
    lines = text.splitlines()
    if len(lines) > 1 and all(line.startswith("{") for line in lines[:2]) and lines[0].endswith("}"):  # of lines
        i = rng.choice([0, len(lines) - 1, len(lines) - 1, rng.randrange(len(lines))])
        new = rng.choice(
            [[damage_json(rng, lines[i])] * 5 + [lines[rng.randrange(len(lines))], "", lines[i] * 2, "null", "[]"]][0]
        )
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
        near = [] if isinstance(value, str) else [-value, value + 1, value * 1000, value + 0.5]
        other = [*near, str(value), [value], -1, 2**31]
        return json.dumps(_with(tree, path, rng.choice(other)))
    return json.dumps(_with(tree, path, rng.choice(VALUES)))


def _paths(tree: object, path: tuple = ()) -> Iterator[tuple]:
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
        return f"{what} {name!a}"
    other = rng.choice(others)
    kept = path if what == "unreadable" else other
    content = kept.read_bytes() if kept.is_file() else b""
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
        path.write_bytes(content)  # root can read it all the same, and then nothing is wrong with it
        path.chmod(0)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "other":
        path.write_bytes(content)
    return what


def damage_file(rng: random.Random, folder: Path, patterns: str) -> tuple[str, Callable[[], bool]]:
    """Damages one of the files; returns (what was done, whether what is there now could be a good file)."""
    files = sorted({f for pattern in patterns.split() for f in folder.glob(pattern)})
    path = rng.choice(files)
    name = path.relative_to(folder)
    before = b"" if path.is_dir() else path.read_bytes()
    if path.is_dir() or rng.randrange(5) == 0:
        what = odd_file(rng, path, files)
        optional = name.parts[0] == "texts" or name.name == "unigram.json"
        # a folder of texts may hold folders
        absent = what in ("gone", "folder") if name.parts[0] == "texts" else what == "gone"
        harmless = what.startswith("stray") or (optional and absent)
        # a copy of another good file: two LITPKDS files of one source, say, which differ only in their tokens
        return f"{name}: {what}", lambda: harmless or (what == "other" and plausible(path, before, path.read_bytes()))
    after, what = None, "bytes"
    if rng.randrange(4) and len(before) < 1 << 20:
        with contextlib.suppress(ValueError):  # it is not JSON
            after, what = damage_json(rng, before.decode()).encode(errors="surrogatepass"), "json"
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
    if name.endswith(".jsonl"):  # of a step, of a validation, or a document
        old = [json.loads(line) for line in before.splitlines()]
        new = [_strict(line) for line in after.removeprefix(b"\xef\xbb\xbf").splitlines() if line]
        must = {"step", "text"} & old[0].keys()
        return all((_alike(old[-1], line, True) or _alike(old[0], line, True)) and must <= line.keys() for line in new)
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
    if name.endswith(".gguf"):  # nothing in it is checked but its structure
        old, new = ([(t.name, t.shape.tolist(), t.tensor_type) for t in _gguf(path, data)] for data in (before, after))
        return old == new
    if name.endswith(".pth"):
        old, new = (torch.load(f, map_location="cpu", weights_only=True) for f in (io.BytesIO(before), io.BytesIO(after)))
        tensors = new["model"].items()
        return old["model"].keys() == new["model"].keys() and all(bool(torch.isfinite(t).all()) for _, t in tensors)
    if name.endswith(".gz"):
        return bool(gzip.decompress(after).decode())
    if name.endswith(".zst"):
        return bool(zstandard.ZstdDecompressor().decompressobj().decompress(after).decode())
    if name.endswith(".parquet"):
        return "text" in pyarrow.parquet.read_table(io.BytesIO(after)).column_names
    if name.endswith(".py"):
        return bool(compile(after, name, "exec"))
    return name.endswith(".txt") and after.decode() is not None


def _gguf(path: Path, data: bytes) -> list:
    path.with_suffix(".copy").write_bytes(data)
    return gguf.GGUFReader(path.with_suffix(".copy")).tensors


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
    words, what, word = list(arguments), rng.randrange(10), rng.choice(WORDS)
    i = rng.choice([j for j, w in enumerate(words) if not w.startswith("--") or "=" in w] if what > 4 else range(len(words)))
    if what == 0:
        return (
            [*words, rng.choice(["--zzz", "--zzz=1", "--model.zzz=1", "-z", "zzz", "--", "--config"])],
            "unknown option",
            False,
        )
    if what == 1:
        del words[i]
        return words, "a word less", True
    if what == 2:
        return [*words, *rng.choice([words[:2], words[-2:]])], "an option twice", True
    if what <= 4 and keys:
        key = rng.choice(keys)
        number = not key.startswith(("data.s", "init.", "log.wandb", "workdir", "train.batch_ramp", "checkpoint.keep_steps"))
        bad = number and word in ("", "nan", "1e999999999", "{}", ":", "fifo")
        return [*words, rng.choice([f"--{key}={word}", f"--{key}={word}", f"--{key}"])], f"--{key}", not bad
    if words[i].startswith("--") and "=" in words[i]:
        words[i] = f"{words[i].partition('=')[0]}={word}"
    else:
        words[i] = word
    return words, "another value", True
