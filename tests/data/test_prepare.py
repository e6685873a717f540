"""Every token of every document, once; the same bytes whoever does the work and however often it is stopped."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import tensorflow_datasets as tfds
from cluster import PATIENCE

from tinyllama_jax import prepare as prepare_lib
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import tokenizer
from tinyllama_jax.data.blocks import Blocks, read_manifest
from tinyllama_jax.data.prepare import folder as folder_lib
from tinyllama_jax.data.prepare import pipeline, shards

ROOT = Path(__file__).parents[2]
prepare = functools.partial(pipeline.prepare, held_out=0)  # tests of what is held out are in test_corpora.py


def lines(texts) -> bytes:
    return "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()


def make_corpus(folder: Path, texts: list[str]) -> Path:
    """Writes `texts` in order to files of every type, with a few files without text between them."""
    n = len(texts) // 4
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(texts[:n]))
    (folder / "b-nothing.jsonl").write_bytes(b"")
    (folder / "b.jsonl.zst").write_bytes(pyarrow.compress(lines(texts[n : 2 * n]), codec="zstd", asbytes=True))
    (folder / "c-nothing.txt").write_bytes(b"")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[2 * n : 3 * n]}), folder / "c.parquet", row_group_size=5)
    (folder / "d").mkdir()
    for i, text in enumerate(texts[3 * n :]):
        (folder / "d" / f"{i:03}.txt").write_bytes(text.removeprefix("\ufeff").encode())
    return folder


@pytest.fixture
def corpus(tmp_path, texts) -> Path:
    return make_corpus(tmp_path / "corpus", texts)


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 16 kB of text, so that a test has many."""
    monkeypatch.setattr(pipeline, "SHARD", (1 << 14, 1 << 30))


def expected(texts, model, bos=False, eos=True) -> list[int]:
    """The ids of all documents one after another, by SentencePiece itself."""
    spm = sentencepiece.SentencePieceProcessor(model_file=str(model))
    out = []
    for text in texts:
        if text:
            out += [spm.bos_id()] * bos + spm.encode(text) + [spm.eos_id()] * eos
    return out


def stream(folder: Path, split: str = "train") -> list[int]:
    """The real tokens of all blocks in order, as TensorFlow Datasets reads them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "label.. is deprecated", DeprecationWarning)  # protobuf's, of what TFDS calls
        source = tfds.builder_from_directory(folder).as_data_source(split)
    return [int(i) for block in source.__getitems__(list(range(len(source)))) for i in block["tokens"][: block["length"]]]


def digests(folder: Path) -> dict[str, str]:
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def command(*arguments, shard: int = 1 << 20, first: str = "", **options) -> subprocess.Popen:
    """The command line in a process of its own, with shards of at least `shard` bytes of text; it runs `first` before."""
    start = f"{first}; " if first else ""
    start += "from tinyllama_jax import prepare; from tinyllama_jax.data.prepare import pipeline, runners; "
    start += f"pipeline.SHARD = ({shard}, 1 << 30); "
    start += "runners.LINES = (1e9, 1e9); " if "LINES" not in first else ""  # a slow machine would say how far it is
    start += "from tinyllama_jax.base.errors import run_main; run_main(prepare.main)"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", start, "--held-out", "0", *map(str, arguments)],
        **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


# -- what is in it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bos", "eos", "seq_len"), [(False, True, 64), (True, True, 255), (False, False, 1)])
def test_blocks_hold_every_token_once(corpus, texts, model, tmp_path, small_shards, bos, eos, seq_len):
    out = tmp_path / "out"
    manifest = prepare(train=[corpus], tokenizer=model, output=out, seq_len=seq_len, bos=bos, eos=eos, workers=1)
    without_mark = [t.removeprefix("\ufeff") if i >= 3 * (len(texts) // 4) else t for i, t in enumerate(texts)]
    ids = expected(without_mark, model, bos, eos)
    assert stream(out) == ids

    train = manifest["splits"]["train"]
    assert (train["tokens"], train["documents"], train["empty_documents"]) == (len(ids), len(texts) - 2, 3)
    assert (manifest["bos"], manifest["eos"], manifest["seq_len"], manifest["dtype"]) == (bos, eos, seq_len, "uint16")
    assert manifest["tokenizer"] == {
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "vocab_size": 700,
        "bos_id": 1,
        "eos_id": 2,
    }
    assert [s["file"] for s in train["sources"]] == sorted(f.relative_to(corpus).as_posix() for f in corpus.rglob("*.*"))
    for source in train["sources"]:
        content = (corpus / source["file"]).read_bytes()
        assert (source["bytes"], source["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert tokenizer.load(out / "tokenizer").sha256 == manifest["tokenizer"]["sha256"]
    assert {*(s["file"] for s in train["shards"]), "manifest.json", "features.json", "dataset_info.json"} == {
        f.name for f in out.iterdir() if f.is_file()
    }
    assert (manifest, hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()) == read_manifest(out)

    # only the last block of a shard is padded, with zeros, and never wholly
    blocks = Blocks(out, "train")
    tokens, length = blocks.read(np.arange(len(blocks)))
    assert len(train["shards"]) > 5 and len(blocks) == train["blocks"]
    at = 0
    for shard in train["shards"]:
        here = length[at : at + shard["blocks"]]
        assert here.sum() == shard["tokens"] and all(here[:-1] == seq_len + 1) and all(here > 0)
        assert not tokens[at + shard["blocks"] - 1, here[-1] :].any() if shard["blocks"] else shard["tokens"] == 0
        assert shards.sha256(out / shard["file"]) == shard["sha256"]
        at += shard["blocks"]


def test_the_type_of_file_makes_no_difference(tmp_path, texts, model):
    plain = [t for t in texts if not t.startswith("\ufeff")]
    for name, data in {
        "a.jsonl": lines(plain),
        "b.jsonl.zst": pyarrow.compress(lines(plain), codec="zstd", asbytes=True),
    }.items():
        (tmp_path / name).write_bytes(data)
    pyarrow.parquet.write_table(pyarrow.table({"content": plain}), tmp_path / "c.parquet", row_group_size=9)
    (tmp_path / "d").mkdir()
    for i, text in enumerate(plain):
        (tmp_path / "d" / f"{i:03}.txt").write_bytes(text.encode())
    found = []
    for name in ("a.jsonl", "b.jsonl.zst", "c.parquet", "d"):
        key = "content" if name == "c.parquet" else "text"
        out = tmp_path / f"out-{name}"
        prepare(train=[tmp_path / name], tokenizer=model, output=out, seq_len=32, text_key=key, workers=1)
        found.append(stream(out))
    assert found[0] == found[1] == found[2] == found[3] == expected(plain, model)


def test_validation_and_a_single_token(tmp_path, model):
    (tmp_path / "a.jsonl").write_bytes(lines(["x"]))
    (tmp_path / "b.jsonl").write_bytes(lines(["", "held out"]))
    options = {"tokenizer": model, "output": tmp_path / "out", "seq_len": 128, "eos": False, "workers": 1}
    manifest = prepare(train=[tmp_path / "a.jsonl"], validation=[tmp_path / "b.jsonl"], **options)
    assert stream(tmp_path / "out") == expected(["x"], model, eos=False) and len(stream(tmp_path / "out")) == 1
    assert stream(tmp_path / "out", "validation") == expected(["held out"], model, eos=False)
    assert manifest["splits"]["validation"]["empty_documents"] == 1
    assert Blocks(tmp_path / "out", "train").read([0])[1] == 1


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(70_000)}
    hf = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    (tmp_path / "hf").mkdir()
    hf.save(str(tmp_path / "hf/tokenizer.json"))
    (tmp_path / "a.jsonl").write_bytes(lines(["w69999 w3", "w65536 w65535"]))
    options = {"train": [tmp_path / "a.jsonl"], "tokenizer": tmp_path / "hf", "seq_len": 2, "workers": 1}
    with pytest.raises(UserError, match="--eos: .*tokenizer.json has no eos token; say --no-eos"):
        prepare(**options, output=tmp_path / "out")
    manifest = prepare(**options, output=tmp_path / "out", eos=False)
    assert stream(tmp_path / "out") == [69_999, 3, 65_536, 65_535] and manifest["dtype"] == "int32"
    tokens, _ = Blocks(tmp_path / "out", "train").read([0])
    assert tokens.dtype == np.int32 and tokens[0].tolist() == [69_999, 3, 65_536]


# -- who does the work, and how often it is stopped ---------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Processes below `pid`, at any depth."""
    direct = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended since
            direct += [int(child) for child in task.read_text().split()]
    return direct + [c for d in direct for c in children(d)]


def workers_of(pid: int) -> list[int]:
    """Worker processes below `pid`."""
    found = []
    for child in children(pid):
        words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        if any(b"m.worker(" in word for word in words):
            found.append(child)
    return found


def wait_until(condition, process: subprocess.Popen):
    for _ in range(1_200):
        if value := condition():
            return value
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("waited for a minute")


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory, texts) -> Path:
    """3 MB in many shards, so that a command can be stopped half-way."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "a.jsonl").write_bytes(lines(texts * 15))
    return folder / "a.jsonl"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, long_corpus, model) -> dict[str, str]:
    """Digests of what one worker makes of `long_corpus` without interruption."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert finished(command(*long_options(long_corpus, model, out, 1), shard=1 << 16))[0] == 0
    return digests(out)


def long_options(corpus, model, out, workers):
    return ["--train", corpus, "--tokenizer", model, "--output", out, "--seq-len", 128, "--workers", workers]


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_the_number_of_workers_or_the_place(long_corpus, texts, model, tmp_path, uninterrupted, workers):
    process = command(
        *long_options(Path("..") / long_corpus.parent.name / "a.jsonl", model, "out", workers),
        shard=1 << 16,
        cwd=long_corpus.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    wait_until(lambda: len(workers_of(process.pid)) == workers, process)
    code, out, err = finished(process)
    assert (code, err) == (0, "")
    lines_out = out.splitlines()
    assert lines_out[0] == "out: a worker takes at most 2 GiB of memory"
    assert len(lines_out) == 3 and lines_out[1].startswith(f"out: train: {15 * (len(texts) - 2)} documents, ")
    assert digests(long_corpus.parent / "out") == uninterrupted
    assert not (long_corpus.parent / "out.partial").exists()
    (long_corpus.parent / "out").rename(tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_stopped_command_resumes_to_the_same_bytes(long_corpus, model, tmp_path, uninterrupted, number):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = command(*long_options(long_corpus, model, out, 2), shard=1 << 16)
    wait_until(lambda: len(list(partial.glob("done/*.json"))) >= 3, process)
    below = children(process.pid)
    assert not out.exists()
    with pytest.raises(UserError, match="is half prepared"):
        Blocks(out, "train")
    process.send_signal(number)
    code, printed, err = finished(process)
    assert code == (130 if number == signal.SIGINT else -9) and "Traceback" not in printed + err
    assert number == signal.SIGKILL or "finished shards are kept: run the same command again" in err
    for _ in range(100):  # the workers notice
        if gone(below):
            break
        time.sleep(0.1)
    assert gone(below) and not out.exists()
    kept = {f.name: f.stat().st_mtime_ns for f in partial.glob("whole/blocks-*") if (partial / f"done/{f.name}.json").exists()}
    total = len([name for name in uninterrupted if name.startswith("blocks-")])
    assert 3 <= len(kept) < total

    code, printed, err = finished(command(*long_options(long_corpus, model, out, 1), shard=1 << 16))
    assert (code, err) == (0, "") and f"out: {total - len(kept)} shards in " in printed and f"({len(kept)} before)" in printed
    assert digests(out) == uninterrupted and not partial.exists()
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept  # not made again


def test_a_worker_that_dies_is_an_error(long_corpus, model, tmp_path):
    process = command(*long_options(long_corpus, model, tmp_path / "out", 2), shard=1 << 16)
    wait_until(lambda: list((tmp_path / "out.partial").glob("done/*.json")), process)
    below = children(process.pid)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    code, _, err = finished(process)
    assert code == 2 and err.startswith("error: a worker process was killed by SIGKILL: ") and err.count("\n") == 1
    assert gone(below) and not (tmp_path / "out").exists()


def listening(pids: list[int]) -> set[str]:
    """Addresses, in the kernel's own form, on which these processes listen."""
    inodes = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                inodes[f"socket:[{words[9]}]"] = words[1]
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    found.add(inodes.get(os.readlink(link), ""))
    return found - {""}


@pytest.mark.parametrize("dies", ["a worker", "the command, and then a worker"])
def test_nothing_listens_on_a_port_and_no_process_is_left(long_corpus, model, tmp_path, dies):
    """Also if the command is killed with SIGKILL, and one of its workers before the others notice."""
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    options = long_options(long_corpus, model, tmp_path / "out", 2)
    process = command(*options, shard=1 << 16, env={**os.environ, "TMPDIR": str(scratch)})
    wait_until(lambda: list((tmp_path / "out.partial").glob("done/*.json")), process)
    below = children(process.pid)
    assert len(workers_of(process.pid)) == 2 and list(scratch.iterdir())
    assert not listening([process.pid, *below])
    if dies == "a worker":
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        assert finished(process)[0] == 2
    else:
        worker = workers_of(process.pid)[0]
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        finished(process)
    for _ in range(100):
        if gone(below) and not list(scratch.iterdir()):
            break
        time.sleep(0.1)
    assert gone(below) and not list(scratch.iterdir())


def test_a_worker_that_needs_too_much_memory_is_an_error(tmp_path, model, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"x")
    monkeypatch.setattr(shards, "MEMORY", 256 << 20)
    monkeypatch.setattr(shards.os, "cpu_count", lambda: 0)
    monkeypatch.setattr(shards.documents, "_text", lambda source: iter(["x" * (1 << 30)]))
    with pytest.raises(UserError, match="blocks-train.array_record-00000-of-00001: took more memory than the 0 GiB that"):
        prepare(train=[tmp_path / "a.txt"], tokenizer=model, output=tmp_path / "out", seq_len=8, workers=1)
    assert len("x" * (1 << 30)) == 1 << 30  # again allowed


def test_two_workers_that_cannot_read_their_input(tmp_path, model, texts):
    good, bad = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    good.write_bytes(lines(texts * 3))
    bad.write_bytes(lines(texts) + b"{}\n" + lines(texts))
    arguments = ["--train", good, bad, "--tokenizer", model, "--output", tmp_path / "out", "--seq-len", 64, "--workers", 2]
    code, out, err = finished(command(*arguments, shard=1 << 14))
    assert (code, out) == (2, f"{tmp_path / 'out'}: a worker takes at most 2 GiB of memory\n")
    assert err == f"error: {bad}, line {len(texts) + 1}: has no key 'text'; it has : choose one with --text-key\n"
    assert not (tmp_path / "out").exists()


# -- again, and otherwise -----------------------------------------------------------------------------------------------


def test_a_repeat_does_nothing_and_other_settings_are_an_error(corpus, model, models, tmp_path, capsys):
    options = {"train": [corpus], "tokenizer": model, "output": tmp_path / "out", "seq_len": 64, "workers": 1}
    first = prepare(**options)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*")}
    (tmp_path / "out.partial").mkdir()  # killed just before the end
    capsys.readouterr()
    assert prepare(**options) == first
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: complete already, nothing to do\n"
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*")} == before
    assert not (tmp_path / "out.partial").exists()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis.txt").write_text("mine")
    assert prepare(**options) == first
    with pytest.raises(UserError, match="new.partial: is in the way, and was not made by this command"):
        (tmp_path / "out.partial").rename(tmp_path / "new.partial")
        prepare(**{**options, "output": tmp_path / "new"})
    assert (tmp_path / "new.partial/thesis.txt").read_text() == "mine"

    for change, says in (
        ({"seq_len": 32}, "seq_len was 64, now 32"),
        ({"eos": False}, "eos was True, now False"),
        ({"tokenizer": models("prefix")}, "tokenizer: sha256 was "),
        ({"train": [corpus / "a.jsonl"]}, "train: b-nothing.jsonl was 0, now absent"),
        ({"train": [corpus / "a.jsonl"], "validation": [corpus / "d"]}, "train: "),
        ({"shard_mb": 7}, "shard_mb was 0, now 7"),
    ):
        with pytest.raises(UserError, match=f"out: was made with other settings: {says}.*choose another --output"):
            prepare(**{**options, **change})

    source = corpus / "a.jsonl"
    content = source.read_bytes()
    source.write_bytes(content)  # touched, but the same
    assert prepare(**options) == first
    source.write_bytes(content.replace(b"ba", b"ab"))
    with pytest.raises(UserError, match="was prepared before .*a.jsonl changed"):
        prepare(**options)
    source.write_bytes(content + b"\n")
    with pytest.raises(UserError, match=f"train: a.jsonl was {len(content)}, now {len(content) + 1};"):
        prepare(**options)


def test_only_a_repaired_file_is_read_again(corpus, model, texts, tmp_path, small_shards):
    options = {"train": [corpus], "tokenizer": model, "output": tmp_path / "out", "seq_len": 64, "workers": 1}
    bad = corpus / "d/004.txt"
    bad.write_bytes(b"\xff")
    with pytest.raises(UserError, match=f"{bad}, line 1: is not UTF-8"):
        prepare(**options)
    bad.write_bytes(b"mended")

    # all shards are made, but the last step is not taken
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.folder_lib, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(**options)
    partial, out = tmp_path / "out.partial", tmp_path / "out"
    made = sorted(partial.glob("whole/blocks*"))
    assert len(made) > 6
    times = {file.name: file.stat().st_mtime_ns for file in made}
    read_already = corpus / "a.jsonl"
    read_already.write_bytes(read_already.read_bytes().replace(b"ba", b"zz"))
    assert b"zz" in read_already.read_bytes()
    made[-1].write_bytes(bytes(made[-1].stat().st_size))  # as after a power cut: the name came to the disk, the content did not
    (partial / "done" / f"{made[-2].name}.json").write_bytes(b"")
    (partial / "whole/blocks-train.array_record-00000-of-00099").write_bytes(b"of another plan")
    (partial / "blocks-half-written").write_bytes(b"")
    (partial / "notes").write_bytes(b"mine")
    with pytest.raises(UserError, match="out.partial: was made with other settings: seq_len was 64, now 65"):
        prepare(**{**options, "seq_len": 65})
    assert not (partial / "blocks-half-written").exists() and (partial / "notes").exists()
    prepare(**options)
    kept = {name for name, time_ns in times.items() if (out / name).stat().st_mtime_ns == time_ns}
    assert len(kept) >= 3 and not {made[0].name, made[-2].name, made[-1].name} & kept
    prepare(**{**options, "output": tmp_path / "fresh"})
    assert digests(out) == digests(tmp_path / "fresh")


def test_a_file_that_changes_while_it_is_read(corpus, model, tmp_path, monkeypatch):
    read = shards.documents.read

    def meanwhile(piece, *more):
        os.utime(piece.source.path, ns=(0, 0))
        return read(piece, *more)

    monkeypatch.setattr(shards.documents, "read", meanwhile)
    with pytest.raises(UserError, match="corpus/.*: changed while it was read"):
        prepare(train=[corpus], tokenizer=model, output=tmp_path / "out", seq_len=64, workers=1)
    assert not (tmp_path / "out").exists()


def test_two_commands_cannot_prepare_one_output(corpus, model, tmp_path):
    (tmp_path / "out.partial").mkdir()
    with open(tmp_path / "out.partial/lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another command is preparing this"):
            prepare(train=[corpus], tokenizer=model, output=tmp_path / "out", seq_len=64, workers=1)
    prepare(train=[corpus], tokenizer=model, output=tmp_path / "out", seq_len=64, workers=1)


JUNK = (".DS_Store", "._x", "Thumbs.db", ".nfs000000", "lost+found/", "desktop.ini")


def test_files_of_file_managers_do_not_count(corpus, model, tmp_path):
    options = {"train": [corpus], "tokenizer": model, "seq_len": 64, "workers": 1}
    prepare(**options, output=tmp_path / "a")

    def leave(folder):
        for name in JUNK:
            (folder / name).mkdir(parents=True) if name.endswith("/") else (folder / name).write_bytes(b"junk")

    for folder in (tmp_path / "out", tmp_path / "out.partial"):
        folder.mkdir()
        leave(folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.folder_lib, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(**options, output=tmp_path / "out")
    for name in ("done", "whole", "whole/tokenizer"):
        (tmp_path / "out.partial" / name / ".DS_Store").write_bytes(b"junk")
    moved, move = [], pipeline.folder_lib.shutil.move

    def stopped(*arguments):
        moved.append(arguments)
        move(*arguments) if len(moved) < 5 else (_ for _ in ()).throw(KeyboardInterrupt)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.folder_lib.shutil, "move", stopped)
        prepare(**options, output=tmp_path / "out")
    manifest = prepare(**options, output=tmp_path / "out")
    assert prepare(**options, output=tmp_path / "out") == manifest and not (tmp_path / "out.partial").exists()
    assert all((tmp_path / "out" / name).exists() for name in JUNK)
    found = {name: hash_ for name, hash_ in digests(tmp_path / "out").items() if Path(name).name not in JUNK}
    assert found == digests(tmp_path / "a")


def test_names_that_are_not_utf_8_and_terminals_that_are_not(model, tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.makedirs(folder)
    for name, data in {b"\xff.jsonl": lines(["a b"]), b"\xe9.txt": b"c", b"\xe9.jsonl.zst": pyarrow.compress(
        lines(["d"]), codec="zstd", asbytes=True
    ), "\u5b57.jsonl".encode(): lines(["e"])}.items():  # fmt: skip
        with open(folder + b"/" + name, "wb") as file:
            file.write(data)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["f"]}), tmp_path / "f.parquet")
    os.rename(os.fsencode(tmp_path / "f.parquet"), folder + b"/\xf0.parquet")
    out = tmp_path / "\u5b57"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "LC_ALL": "C"}
    options = ["--train", os.fsdecode(folder), "--tokenizer", model, "--output", out, "--seq-len", 8, "--workers", 1]
    code, printed, err = finished(command(*options, env=environment))
    assert (code, err) == (0, "") and "\\u5b57: train: 5 documents" in printed
    names = [source["file"] for source in read_manifest(out)[0]["splits"]["train"]["sources"]]
    assert names == ["\\xe9.jsonl.zst", "\\xe9.txt", "\\xf0.parquet", "\\xff.jsonl", "\u5b57.jsonl"]
    with open(folder + b"/\xff.jsonl", "wb") as file:
        file.write(b"{}")
    code, printed, err = finished(command(*options[:4], "--output", tmp_path / "new", *options[6:], env=environment))
    assert code == 2 and err.count("\n") == 1 and "udcff.jsonl, line 1: has no key 'text'" in err
    with pytest.raises(UserError, match="--output .*: is not UTF-8; choose another name"):
        prepare(train=["."], tokenizer=model, output=os.fsdecode(folder) + "/out", seq_len=8)


@pytest.mark.parametrize("name", ["settings.json", "done/blocks-train.array_record-00000-of-00001.json"])
@pytest.mark.parametrize("damage", [b"", b"null", b"[" * 100_000, b'{"identity": 3}', b'{"files": []}', b"\xff"])
def test_files_of_an_earlier_run_are_not_trusted(model, tmp_path, name, damage):
    (tmp_path / "a.txt").write_bytes(b"some text")
    options = {"train": [tmp_path / "a.txt"], "tokenizer": model, "output": tmp_path / "out", "seq_len": 8, "workers": 1}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.folder_lib, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(**options)
    (tmp_path / "out.partial" / name).write_bytes(damage)
    if name == "settings.json":
        with pytest.raises(UserError, match=r"out.partial(/settings.json: is damaged|: was made with other settings: )"):
            prepare(**options)
    else:
        assert prepare(**options)["splits"]["train"]["documents"] == 1


def test_options_of_beam_are_passed_on(corpus, model, tmp_path, capfd):
    here = {"train": [corpus], "tokenizer": model, "seq_len": 64}
    prepare(**here, output=tmp_path / "a", workers=1)
    arguments = ["--train", corpus, "--tokenizer", model, "--seq-len", 64, "--output", tmp_path / "b", "--held-out", 0]
    runner = "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"
    prepare_lib.main([*map(str, arguments), runner, "--direct_running_mode", "multi_threading", "--direct_num_workers=2"])
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    with pytest.raises(UserError, match="--seqlen: no such option; see --help"):
        prepare_lib.main([*map(str, arguments), "--seqlen", "3"])


# -- what cannot be -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train": []}, "--train : there is no file of a known type"),
        ({"train": ["gone"]}, "--train gone: no such file or folder"),
        ({"train": ["empty.jsonl", "empty.txt"]}, "--train: there is no text in its 2 files"),
        ({"validation": ["empty.txt"]}, "--validation: there is no text in its 1 files"),
        ({"validation": ["sub/../a.jsonl"]}, "--validation: .*a.jsonl is among the files of --train too"),
        ({"seq_len": 0}, "--seq-len 0: must be from 1 to 16,777,216"),
        ({"seq_len": 99_999_999_999}, "--seq-len 99999999999: must be from 1 to 16,777,216"),
        ({"shard_mb": 10**9}, "--shard-mb 1000000000: must be from 0 to 1,048,576"),
        ({"workers": 10**6}, "--workers 1000000: must be from 0 to 4,096"),
        ({"workers": -1}, "--workers -1: must be from 0 to 4,096"),
        ({"tokenizer": "gone.model"}, "gone.model: no such tokenizer"),
        ({"output": "there"}, "there: has no manifest.json"),
        ({"output": "a.jsonl"}, "a.jsonl: must be a new folder"),
        ({"train": ["."]}, "--output out: lies within the input .; choose a folder outside"),
        ({"text_key": "body"}, "a.jsonl, line 1: has no key 'body'; it has 'text': choose one with --text-key"),
    ],
    ids=str,
)
def test_impossible_options_are_errors(tmp_path, model, monkeypatch, change, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_bytes(lines(["x"]))
    (tmp_path / "empty.jsonl").write_bytes(b'\n{"text": ""}\n')
    (tmp_path / "empty.txt").write_bytes(b"")
    options = {"train": ["a.jsonl"], "tokenizer": model, "output": "out", "seq_len": 8, "workers": 1, **change}
    with pytest.raises(UserError, match=says) as error:
        prepare(**options)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_full_disk_gives_one_line_and_loses_nothing(tmp_path, model, texts):
    """A limit on the size of files stands in for the disk: the writes fail in the same place."""
    random.seed(0)
    (tmp_path / "a.jsonl").write_bytes(lines(texts))
    (tmp_path / "b.jsonl").write_bytes(lines(["".join(random.choices("abcdefghij \n", k=1_000_000))]))
    arguments = [
        "--train",
        *tmp_path.glob("*.jsonl"),
        "--tokenizer",
        model,
        "--output",
        tmp_path / "out",
        "--seq-len",
        512,
        "--workers",
        1,
    ]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    code, _, err = finished(command(*arguments, shard=1 << 17, first=limit))
    assert code == 2 and err.count("\n") == 1 and "cannot be written: " in err
    assert not (tmp_path / "out").exists() and not [f for f in (tmp_path / "out.partial").iterdir() if "blocks" in f.name]
    kept = list((tmp_path / "out.partial/done").iterdir())
    code, out, err = finished(command(*arguments, shard=1 << 17))
    assert (code, err) == (0, "") and (f"({len(kept)} before)" in out) == bool(kept)
    assert stream(tmp_path / "out")


def test_a_damaged_setting_is_printed_on_one_line():
    with pytest.raises(UserError, match=r"out: was made with other settings: text_key was '\\n', now text; ") as error:
        folder_lib._same(Path("out"), {"text_key": "\n"}, {"text_key": "text"})
    assert str(error.value).isprintable()
