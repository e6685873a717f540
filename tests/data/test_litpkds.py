"""LITPKDS files: read without losing a token or training on filling, written byte for byte, refused when they are not whole."""

import concurrent.futures
import dataclasses
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinyllama_jax import convert
from tinyllama_jax.base import config as c
from tinyllama_jax.base import files
from tinyllama_jax.base.config import Bos
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import feed, litpkds
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import Blocks, Damaged, may_open
from tinyllama_jax.data.export import litpkds as export_litpkds
from tinyllama_jax.data.litpkds import Packed

S = 16
BOS, EOS = 1, 2


def header(chunk: int, magic: bytes = b"LITPKDS", version: int = 1, code: int = 8) -> bytes:
    """From the format's description, field by field."""
    return magic + version.to_bytes(8, "little") + bytes([code]) + chunk.to_bytes(8, "little")


def as_the_builder_would(tokens: list[int], chunk: int, tail: str) -> list[bytes]:
    """The files of these tokens: each as full as the tokens allow, the last one filled up with bos, or not there at all."""
    files, rest = [], list(tokens)
    while len(rest) > chunk:
        files.append(rest[:chunk])
        rest = rest[chunk:]
    if tail == "fill":
        files.append(rest + [BOS] * (chunk - len(rest)))
    return [header(chunk) + b"".join(t.to_bytes(2, "little") for t in file) for file in files]


@pytest.fixture(scope="module")
def stream(tiny_data) -> np.ndarray:
    """All tokens of the training split of source a, one after another."""
    return np.concatenate(list(export_litpkds.stream(Blocks(tiny_data / "a", "train"))))


@pytest.fixture
def folder(tmp_path, tiny_data):
    """A folder with a tokenizer beside whatever files a test puts there."""
    shutil.copy(tiny_data / "512.model", tmp_path / "tokenizer.model")
    return tmp_path


def put(folder, *chunks, prefix="train_x", dtype="uint16"):
    """Writes one file for each of `chunks`, which have one size; returns the start of their names."""
    for i, chunk in enumerate(chunks):
        data = header(len(chunk), code=litpkds.WRITTEN[dtype]) + np.asarray(chunk, dtype).tobytes()
        (folder / f"{prefix}_{i:010d}.bin").write_bytes(data)
    return folder / prefix


def everything(blocks) -> list[list[int]]:
    tokens, length = blocks.read(np.arange(len(blocks)))
    return [row[:n] for row, n in zip(tokens.tolist(), length.tolist(), strict=True)]


# -- writing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["fill", "drop"])
@pytest.mark.parametrize("chunk", ["7", "8 blocks", "half", "all", "all and one"])
def test_files_equal_those_of_the_originals_builder(tiny_data, tmp_path, stream, chunk, tail, capsys):
    n = len(stream)
    chunk = {"7": 7, "8 blocks": 8 * (S + 1), "half": n // 2, "all": n, "all and one": n + 1}[chunk]
    want = as_the_builder_would(stream.tolist(), chunk, tail)
    arguments = ["--input", str(tiny_data / "a"), "--prefix", "train_slim", "--output", str(tmp_path / "out")]
    arguments += ["--chunk-size", str(chunk), "--tail", tail]
    if not want:
        with pytest.raises(UserError, match=f"--tail drop: would drop all {n:,} tokens, which do not fill one file; say"):
            convert.main(["to-litpkds", *arguments])
        return
    convert.main(["to-litpkds", *arguments])
    files = sorted((tmp_path / "out").glob("*.bin"))
    assert [file.name for file in files] == [f"train_slim_{i:010d}.bin" for i in range(len(want))]
    assert [file.read_bytes() for file in files] == want
    left = len(want) * chunk - n
    assert (
        f"{left:,} bos fill up" if tail == "fill" else f"{-left:,} tokens at the end are dropped"
    ) in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix != ".bin") == ["tokenizer"]


def test_a_file_by_hand(tmp_path):
    parts = [np.array([5, 2]), np.array([], int), np.array([260, 7, 2])]
    assert export_litpkds.write(parts, tmp_path, "x", 4, "uint16", 1) == (2, 5)
    start = "4c495450 4b4453" + "01 00000000000000" + "08" + "04 00000000000000"
    assert (tmp_path / "x_0000000000.bin").read_bytes() == bytes.fromhex(start + "0500 0200 0401 0700")
    assert (tmp_path / "x_0000000001.bin").read_bytes() == bytes.fromhex(start + "0200 0100 0100 0100")
    assert export_litpkds.write(parts, tmp_path, "y", 4, "int32", None) == (1, 5)
    assert (tmp_path / "y_0000000000.bin").read_bytes()[15:] == struct.pack("<BQiiii", 4, 4, 5, 2, 260, 7)


def test_the_files_appear_when_all_are_written(tiny_data, tmp_path, monkeypatch):
    out, right = tmp_path / "out", export_litpkds.write
    export_litpkds.export(tiny_data / "a", "validation", out, "validation_x", 100)

    def killed(tokens, folder, *rest):
        right(tokens, folder, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(export_litpkds, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        export_litpkds.export(tiny_data / "a", "train", out, "train_x", 100)
    assert not litpkds.files_of(out / "train_x")
    monkeypatch.undo()
    files = export_litpkds.export(tiny_data / "a", "train", out, "train_x", 1_000)
    assert litpkds.files_of(out / "train_x") == files and not (out / ".train_x.partial").exists()
    with pytest.raises(UserError, match="train_x_0000000000.bin: exists already; choose another --prefix"):
        export_litpkds.export(tiny_data / "a", "train", out, "train_x", 1_000)
    with pytest.raises(UserError, match="has the tokenizer of other data"):
        export_litpkds.export(tiny_data / "other", "train", out, "train_y", 1_000)


KILLED = """
import os, sys
from tinyllama_jax.data.export import litpkds
right, left = os.replace, int(sys.argv[3])
def replace(source, target):
    global left
    if str(target).endswith(".bin"):
        if not left:
            os._exit(9)
        left -= 1
    right(source, target)
os.replace = replace
litpkds.export(sys.argv[1], "train", litpkds.Path(sys.argv[2]), "train", 1_000)
"""


def test_after_a_kill_during_the_move_only_moved_files_are_removed(tiny_data, tmp_path, stream):
    others = export_litpkds.export(tiny_data / "a", "train", tmp_path, "train_star", 5_000)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tiny_data / "a"), str(tmp_path), "3"], timeout=300)
    moved = sorted(tmp_path.glob("train_0*.bin"))
    assert killed.returncode == 9 and len(moved) == 3 and (tmp_path / ".train.partial" / files.MARK).is_file()
    moved[1].write_bytes(b"somebody's")  # since then
    with pytest.raises(UserError, match=f"{moved[1]}: exists already"):
        export_litpkds.export(tiny_data / "a", "train", tmp_path, "train", 1_000)
    assert [file.name for file in sorted(tmp_path.glob("train_0*.bin"))] == [moved[1].name]
    assert moved[1].read_bytes() == b"somebody's" and others and all(file.is_file() for file in others)
    moved[1].unlink()
    again = export_litpkds.export(tiny_data / "a", "train", tmp_path, "train", 1_000)
    assert [file.read_bytes() for file in again] == as_the_builder_would(stream.tolist(), 1_000, "fill")


def test_other_files_are_kept_and_a_second_writer_is_refused(tiny_data, tmp_path):
    export = lambda: export_litpkds.export(tiny_data / "a", "validation", tmp_path, "x", 500)
    for foreign in ("x.partial", ".x.partial"):
        (tmp_path / foreign).mkdir()
        (tmp_path / foreign / "precious").touch()
    (tmp_path / "x_0000000000.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"\.x\.partial: is needed as a scratch folder, and holds other files; move it away"):
        export()
    shutil.rmtree(tmp_path / ".x.partial")
    with pytest.raises(UserError, match=r"x_0000000000\.bin: exists already"):
        export()
    assert (tmp_path / "x_0000000000.bin").read_bytes() == b"precious" and (tmp_path / "x.partial/precious").is_file()
    (tmp_path / "x_0000000000.bin").unlink()
    (tmp_path / ".DS_Store").touch()
    with files.workplace(tmp_path / ".x.partial", ""):
        export_litpkds.export(tiny_data / "a", "train", tmp_path, "y", 5_000)  # another prefix is another output
        with pytest.raises(UserError, match=r"--output .*: another process is writing x_\*\.bin there"):
            export()
    assert len(export()) == 4 and not (tmp_path / ".x.partial").exists()


def test_if_one_file_cannot_be_moved_all_are_taken_back(tiny_data, tmp_path, monkeypatch):
    right = os.replace

    def full(source, target):
        if str(target).endswith("2.bin"):
            raise OSError(28, "No space left on device", str(target))
        right(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        export_litpkds.export(tiny_data / "a", "train", tmp_path, "train", 1_000)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"chunk": 0}, "--chunk-size 0: must be positive"),
        ({"chunk": 10**12}, "--chunk-size 1000000000000: must be positive, and 268,435,456 at most"),
        ({"prefix": "a/b"}, "--prefix a/b: must be the start of the files' names"),
        ({"output": Path("gs://bucket/x")}, "--output=gs://bucket/x: is a URL, and must be a local path"),
        ({"prefix": ".."}, "--prefix ..: must be the start of the files' names"),
        ({"source": "nowhere"}, "nowhere: no such folder"),
        ({"split": "test"}, "has no split 'test'"),
    ],
)
def test_impossible_exports_are_errors(tiny_data, tmp_path, changed, words):
    asked = {"source": tiny_data / "a", "split": "train", "output": tmp_path / "out", "prefix": "x"} | changed
    with pytest.raises(UserError, match=words):
        export_litpkds.export(**asked)


# -- reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [S + 1, 8 * (S + 1), 100, 1_003])
@pytest.mark.parametrize("seq_len", [S, 31])
def test_no_token_is_lost_and_no_filling_read(tiny_data, tmp_path, stream, chunk, seq_len):
    export_litpkds.export(tiny_data / "a", "train", tmp_path, "train_x", chunk)
    blocks = Packed(tmp_path / "train_x", "train", seq_len)
    n_files = -(-len(stream) // chunk)
    assert len(blocks) == n_files * -(-chunk // (seq_len + 1)) and blocks.dtype == np.uint16
    tokens, length = blocks.read(np.arange(len(blocks)))
    assert tokens.shape == (len(blocks), seq_len + 1) and length.dtype == np.int32 and tokens.flags.writeable
    assert np.concatenate([row[:n] for row, n in zip(tokens, length, strict=True)]).tolist() == stream.tolist()
    stored = blocks.stored(np.arange(len(blocks)))
    assert stored.sum() == n_files * chunk and not tokens[np.arange(seq_len + 1) >= stored[:, None]].any()
    order = np.random.default_rng(0).permutation(len(blocks))
    np.testing.assert_array_equal(blocks.read(order)[0], tokens[order])
    np.testing.assert_array_equal(blocks.read(order)[1], length[order])
    assert blocks.read([])[0].shape == (0, seq_len + 1)
    with pytest.raises(IndexError):
        blocks.read([len(blocks)])


def test_filling_is_cut_by_hand(folder):
    path = put(
        folder,
        [7, 8, 9, 2, 5, 6, 7, 8, 3, 3],  # repeats of what is no separator stay
        [7, 8, 9, 2, 1, 1, 1, 1, 1, 1],  # a run over a block's edge, and a last one with nothing else
        [7, 8, 9, 1, 5, 6, 7, 2, 2, 2],  # one bos stays, and the eos that ends a text does
        [1, 1, 9, 8, 2, 2, 2, 2, 2, 2],  # bos twice where a block begins is none of it
    )
    want = [
        [[7, 8, 9, 2], [5, 6, 7, 8], [3, 3]],
        [[7, 8, 9, 2], [], []],
        [[7, 8, 9, 1], [5, 6, 7, 2], []],
        [[1, 1, 9, 8], [], []],
    ]
    assert everything(Packed(path, "train", 3)) == [block for file in want for block in file]
    assert everything(Packed(path, "train", 9)) == [
        [7, 8, 9, 2, 5, 6, 7, 8, 3, 3], [7, 8, 9, 2], [7, 8, 9, 1, 5, 6, 7, 2], [1, 1, 9, 8, 2]
    ]  # fmt: skip


def test_packed_files_are_a_source_like_any_other(tiny_config, tiny_data, tmp_path):
    """The same order and batches as from a prepared source, beside which it is read, and its validation split."""
    for split in ("train", "validation"):
        export_litpkds.export(tiny_data / "a", split, tmp_path, f"{split}_a", 40 * (S + 1))
    both = {f"{tmp_path}/train_a*": 0.7, str(tiny_data / "b"): 0.3}
    config = dataclasses.replace(tiny_config, data=c.Data(both))
    sources = feed.open_sources(config)
    assert [type(s) for s in sources] == [Packed, Blocks] and feed.eos_id(config, sources) == EOS
    assert tokenizer_lib.load(sources[0].tokenizer).sha256 == sources[0].tokenizer_sha256 == sources[1].tokenizer_sha256
    held_out = feed.open_held_out(config, sources)
    assert list(held_out) == list(both)
    want = np.concatenate(list(export_litpkds.stream(Blocks(tiny_data / "a", "validation")))).tolist()
    assert [t for block in everything(held_out[f"{tmp_path}/train_a*"]) for t in block] == want
    tokens, length, *_ = next(feed.training(config, sources, 8, np.arange(8), 17))
    source, block = feed.order(config, sources).locate(np.arange(17 * 8, 18 * 8))
    for row, (j, index) in enumerate(zip(source, block, strict=True)):
        (one,), (n,) = sources[j].read([index])
        assert one.tolist() == tokens[0, row].tolist() and n == length[0, row]
    assert set(source) == {0, 1}


def test_a_folder_is_not_a_name_of_packed_files(folder, stream):
    put(folder, stream[:100], prefix="train_slim")
    put(folder, stream[:100], prefix="validation_slim")
    put(folder, stream[:100], prefix="other")
    (folder / "train_slim.partial").mkdir()
    (folder / "train_slim_notes.txt").touch()
    names = lambda *args: [file.name for file in litpkds.files_of(*args)]
    for path in (folder / "train_slim", f"{folder}/train_slim*", f"{folder}/train_slim_0000000000.bin", f"{folder}/train*.bin"):
        assert names(path) == ["train_slim_0000000000.bin"] and names(path, "validation") == ["validation_slim_0000000000.bin"]
    assert names(folder / "other", "validation") == names(folder / "gone") == names(folder) == names(folder / "no" / "x") == []
    with pytest.raises(UserError, match=f"holds .bin files: give the start of their names, such as {folder / 'train'}"):
        feed.open_source(str(folder), "train", S)
    with pytest.raises(UserError, match="other: has no split 'validation'"):
        Packed(folder / "other", "validation", S)


def test_a_source_is_identified_by_names_sizes_and_headers(folder, stream):
    path = put(folder, stream[:100], stream[100:200])
    first = Packed(path, "train", S).manifest_sha256
    assert Packed(path, "train", 31).manifest_sha256 == first
    (folder / "train_x_0000000001.bin").rename(folder / "train_x_0000000007.bin")
    second = Packed(path, "train", S).manifest_sha256
    (folder / "train_x_0000000007.bin").unlink()
    third = Packed(path, "train", S).manifest_sha256
    put(folder, stream[:50], stream[50:100])
    fourth = Packed(path, "train", S).manifest_sha256
    put(folder, [5] * 25, [5] * 25, dtype="int32")  # of the same sizes
    assert len({first, second, third, fourth, Packed(path, "train", S).manifest_sha256}) == 5


def test_pickled_threads_and_few_files_at_once(folder, stream, monkeypatch):
    path = put(folder, *(stream[i * 100 : (i + 1) * 100] for i in range(20)))
    want = Packed(path, "train", S).read(np.arange(120))
    again = pickle.loads(pickle.dumps(Packed(path, "train", S)))
    np.testing.assert_array_equal(again.read(np.arange(120))[0], want[0])
    monkeypatch.setattr(litpkds, "MAPPED", 3)
    blocks = Packed(path, "train", S)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        orders = [np.random.default_rng(i).permutation(120) for i in range(32)]
        for order, (tokens, length) in zip(orders, pool.map(blocks.read, orders), strict=True):
            np.testing.assert_array_equal(tokens, want[0][order])
            np.testing.assert_array_equal(length, want[1][order])
    assert len(blocks._readers) == 3
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        assert may_open(2) == 2 and resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 258
        assert may_open(10**9) == hard - 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- where documents end -----------------------------------------------------------------------------------------------------


EDGES = {  # tokens of a file: whether documents begin with bos, whether they end with eos
    "eos": ([5, 6, EOS, 7, 8, EOS, 9, 9, 9, EOS] * 8, (False, True)),
    "bos": ([BOS, 5, 6, BOS, 7, 8, BOS, 9, 9, 9] * 8, (True, False)),
    "both": ([BOS, 5, EOS, BOS, 7, 8, EOS, BOS, 9, EOS] * 8, (True, True)),
    "neither": ([5, 6, 7, 8, 9] * 16, (False, False)),
    "bos everywhere, eos at times": ([BOS, 5, EOS, BOS, 6, 7, BOS, 8, 9, 9] * 8, (True, False)),
    "eos everywhere, bos at times": ([BOS, 5, EOS, 6, 7, EOS, 8, 9, 9, EOS] * 8, (False, True)),
    "some with bos alone, some with eos alone": ([BOS, 5, 6, 7, EOS, 8, 9, BOS, 9, 9] * 8, (False, False)),
    "eos, filled up with one bos": ([5, 6, EOS, 7, 8, EOS, 9, 9, 9, EOS] * 6 + [5, 6, 7, 8, 9, 9, EOS, BOS], (False, True)),
    "eos, filled up": ([5, 6, EOS, 7, 8, EOS, 9, 9, 9, EOS] * 6 + [BOS] * 60, (False, True)),
}


@pytest.mark.parametrize("what", EDGES)
def test_bos_and_eos_are_detected(folder, what):
    tokens, want = EDGES[what]
    manifest = Packed(put(folder, tokens), "train", S).manifest
    assert (manifest["bos"], manifest["eos"]) == want


def test_bos_and_eos_are_searched_for_in_blocks_spread_over_the_source(folder, monkeypatch):
    path = put(folder, [5] * 17 * 299 + [5, 6, EOS] * 5 + [5, 6])
    assert not Packed(path, "train", S).manifest["bos"] and Packed(path, "train", S).manifest["eos"]
    read = []
    monkeypatch.setattr(Packed, "read", lambda self, at, right=Packed.read: (read.append(at), right(self, at))[1])
    Packed(path, "train", S)
    assert len(read) == 1 and len(read[0]) == 64 and (read[0][0], read[0][-1]) == (0, 299)


def test_more_blocks_are_searched_if_a_few_have_no_document_end(folder):
    book = [5] * 17 * 7 + [5, EOS, 6] + [5] * 17 * 992  # a single end in the block 7 of 1,000
    manifest = Packed(put(folder, book), "train", S).manifest
    assert manifest["eos"] and not manifest["bos"]


def test_the_mask_uses_the_token_that_all_sources_have(tiny_config, tmp_path, tiny_data):
    shutil.copy(tiny_data / "512.model", tmp_path / "tokenizer.model")
    names = {key: str(put(tmp_path, EDGES[key][0], prefix=f"train_{key}")) for key in ("eos", "bos", "both", "neither")}
    bos, neither = (names[key] for key in ("bos", "neither"))

    def mark(*keys, **options):
        config = dataclasses.replace(tiny_config, data=c.Data({names[key]: 1.0 for key in keys}, **options))
        return feed.eos_id(config, feed.open_sources(config))

    mask = {"document_mask": True}
    for keys, want in ((("eos",), EOS), (("eos", "both"), EOS), (("both", "bos"), Bos(BOS)), (("bos",), Bos(BOS))):
        found = mark(*keys, **mask)
        assert found == want and type(found) is type(want)
    assert mark("neither") == mark("bos") == EOS  # nobody asks
    seen = "has 0 bos and 0 eos, 0 of them together, in a sample of 5 blocks"
    with pytest.raises(
        UserError, match=rf"^--data.document_mask=true: needs eos after every document, or bos .*: {neither} {seen};"
    ):
        mark("neither", **mask)
    with pytest.raises(UserError, match=rf"in all sources: {bos} has \d+ bos and 0 eos,"):
        mark("eos", "bos", **mask)
    assert mark("eos", "both", eod_mask_loss=True) == EOS
    with pytest.raises(
        UserError, match=rf"^--data.eod_mask_loss=true: needs eos after every document in all sources: {bos} has"
    ):
        mark("bos", eod_mask_loss=True, **mask)


# -- what is not whole --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header(100)[:-1], "is truncated: 23 bytes, and its header alone takes 24"),
        (b"", "is truncated: 0 bytes"),
        (header(100) + bytes(199), "has 223 bytes, and its header says 224 \\(100 tokens\\)"),
        (header(100) + bytes(201), "has 225 bytes, and its header says 224"),
        (header(0), "has 24 bytes, and its header says 24 \\(0 tokens\\)"),
        (header(100, magic=b"LITPKDX") + bytes(200), "begins with b'LITPKDX', not b'LITPKDS'"),
        (header(100, version=2) + bytes(200), "is of version 2; only version 1 is known"),
        (header(100, code=9) + bytes(900), "holds dtype 9; tokens are uint16 or int32"),
        (header(100, code=6) + bytes(400), "holds float32; tokens are uint16 or int32"),
        (header(50) + bytes(100), "has 50 tokens of uint16, and .*_0000000000.bin has 100 of uint16"),
        (header(100, code=4) + bytes(400), "has 100 tokens of int32, and .*_0000000000.bin has 100 of uint16"),
    ],
)
def test_one_bad_header_gives_one_line_that_names_the_file(folder, content, words):
    path = put(folder, *[[5] * 100] * 600)  # more than one thread reads
    bad = folder / "train_x_0000000555.bin"
    bad.write_bytes(content)
    with pytest.raises(Damaged, match=f"^{bad}: {words}[^\n]*$"):
        Packed(path, "train", S)


def test_int32(folder):
    blocks = Packed(put(folder, [5, 70_000, 2, 1, 1], dtype="int32"), "train", 1)
    assert blocks.dtype == np.int32 and everything(blocks) == [[5, 70_000], [2, 1], [1]]


def test_a_file_that_shrinks_while_it_is_read(folder, stream):
    blocks = Packed(put(folder, stream[:100], stream[:100]), "train", S)
    (folder / "train_x_0000000001.bin").write_bytes(header(100))
    with pytest.raises(Damaged, match=r"train_x_0000000001.bin, record 0: is damaged"):
        blocks.read([0, len(blocks) - 1])


def test_the_tokenizer_lies_beside_them(folder, tiny_data):
    path = put(folder, [5] * 100)
    shutil.copytree(tiny_data / "other" / "tokenizer", folder / "tokenizer")  # before the file
    vocabulary = Packed(path, "train", S).manifest["tokenizer"]
    assert vocabulary == json.loads((tiny_data / "other" / "manifest.json").read_text())["tokenizer"]
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=f"has no tokenizer beside its LITPKDS files; copy it to {folder}/tokenizer.model"):
        Packed(path, "train", S)
