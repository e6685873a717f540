"""Blocks read back as they were written, in any order, from any process; damage is named and never returned."""

import concurrent.futures
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tinyllama_jax.base.dims import EXTRAS
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import blocks as blocks_lib
from tinyllama_jax.data.blocks import Blocks, Record
from tinyllama_jax.data.prepare import pipeline

S = 32


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, texts, model) -> Path:
    """`texts` in blocks of 33 tokens, in several shards; `validation` is a single block."""
    folder = tmp_path_factory.mktemp("prepared")
    for name, documents in {"train": texts, "validation": ["x"]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "SHARD", (1 << 14, 1 << 30))
        files = {name: [folder / f"{name}.jsonl"] for name in ("train", "validation")}
        pipeline.prepare(**files, tokenizer=model, output=folder / "out", seq_len=S, workers=1)
    return folder / "out"


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(prepared, tmp_path / "copy")


def tfds_source(folder, split):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "label.. is deprecated", DeprecationWarning)  # protobuf's, of what TFDS calls
        return tfds.builder_from_directory(folder).as_data_source(split)


def test_blocks_are_what_tensorflow_datasets_reads(prepared):
    blocks, theirs = Blocks(prepared, "train"), tfds_source(prepared, "train")
    assert len(blocks) == len(theirs) > 100 and len(blocks.manifest["splits"]["train"]["shards"]) > 4
    rng = np.random.default_rng(0)
    for indices in (np.arange(len(blocks)), rng.permutation(len(blocks)), rng.integers(0, len(blocks), 50)):
        tokens, length = blocks.read(indices)
        assert tokens.dtype == blocks.dtype == np.uint16 and length.dtype == np.int32
        assert tokens.shape == (len(indices), S + 1)
        records = theirs.__getitems__(indices.tolist())
        np.testing.assert_array_equal(tokens, [r["tokens"] for r in records])
        np.testing.assert_array_equal(length, [r["length"] for r in records])
    assert set(blocks.read(np.arange(len(blocks)))[1]) - {S + 1}  # padded blocks were among them
    assert tokens.flags.writeable and blocks.read([])[0].shape == (0, S + 1)


def test_attributes_of_a_source(prepared, model):
    import hashlib

    blocks = Blocks(prepared, "train")
    assert (blocks.seq_len, blocks.directory, blocks.split) == (S, prepared, "train")
    assert blocks.tokenizer_sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    assert blocks.manifest_sha256 == hashlib.sha256((prepared / "manifest.json").read_bytes()).hexdigest()
    assert blocks.manifest == json.loads((prepared / "manifest.json").read_text())


def test_a_single_block(prepared):
    blocks = Blocks(prepared, "validation")
    assert len(blocks) == 1
    tokens, length = blocks.read([0, 0])
    assert (tokens[0] == tokens[1]).all() and 0 < length[0] == length[1] < S
    assert not tokens[0, length[0] :].any()


@pytest.mark.parametrize("indices", [[-1], [0, 1], [10**12]])
def test_indices_out_of_range(prepared, indices):
    with pytest.raises(IndexError, match=f"of 1 in {prepared}, validation"):
        Blocks(prepared, "validation").read(indices)


def test_pickled_and_read_from_threads_and_another_process(prepared):
    blocks = Blocks(prepared, "train")
    want = blocks.read(np.arange(len(blocks)))
    again = pickle.loads(pickle.dumps(blocks))
    np.testing.assert_array_equal(again.read(np.arange(len(blocks)))[0], want[0])
    fresh = Blocks(prepared, "train")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        orders = [np.random.default_rng(i).permutation(len(blocks)) for i in range(32)]
        for order, (tokens, length) in zip(orders, pool.map(fresh.read, orders), strict=True):
            np.testing.assert_array_equal(tokens, want[0][order])
            np.testing.assert_array_equal(length, want[1][order])
    call = "import pickle, sys; b = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(b.read(range(len(b)))[0].tobytes())"
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", call], input=pickle.dumps(blocks), capture_output=True, cwd=root, check=True)
    assert out.stdout == want[0].tobytes()


def test_more_files_than_a_process_may_open(prepared, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        assert blocks_lib.may_open(500) == 500 and resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 756
        assert blocks_lib.may_open(10) == 10 and resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 756  # never lowered
        assert blocks_lib.may_open(hard) == hard - 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    monkeypatch.setattr(blocks_lib, "may_open", lambda n: n - 1)
    with pytest.raises(
        UserError, match=r"this process may open \d+: raise `ulimit -n`, or prepare the data with a larger --shard-mb"
    ):
        Blocks(prepared, "train").read([0])


# -- damage -------------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_named_or_harmless(copy, prepared):
    """In the headers, records and index of a file; what ArrayRecord pads its blocks with is left out."""
    rng = random.Random(0)
    file = copy / Blocks(copy, "train").manifest["splits"]["train"]["shards"][2]["file"]
    whole = file.read_bytes()
    good = Blocks(prepared, "train")
    everything = np.arange(len(good))
    want = good.read(everything)
    used = [i for i in range(len(whole)) if any(whole[max(i - 64, 0) : i + 64])]
    raised = 0
    for _ in range(60):
        at, bit = rng.choice(used), 1 << rng.randrange(8)
        file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            tokens, length = Blocks(copy, "train").read(everything)
        except UserError as error:
            raised += 1
            assert str(error).startswith(f"{file}, record ") and "is damaged; copy or prepare" in str(error)
            assert "\n" not in str(error)
        else:
            np.testing.assert_array_equal(tokens, want[0])
            np.testing.assert_array_equal(length, want[1])
    assert raised > 40


def test_the_error_names_the_damaged_record(copy):
    blocks = Blocks(copy, "train")
    start = blocks.manifest["splits"]["train"]["shards"][0]["blocks"]
    shard = blocks.manifest["splits"]["train"]["shards"][1]
    file = copy / shard["file"]
    whole = file.read_bytes()
    half = len(whole.rstrip(b"\0")) // 4
    file.write_bytes(whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :])
    bad = []
    for i in range(shard["blocks"]):
        try:
            Blocks(copy, "train").read([start + i])
        except UserError:
            bad.append(i)
    assert len(bad) == 1
    with pytest.raises(UserError, match=rf"{file}, record {bad[0]}: is damaged"):
        Blocks(copy, "train").read(np.arange(len(blocks)))
    others = [i for i in range(len(blocks)) if i != start + bad[0]]
    assert len(blocks.read(others)[1]) == len(others)


def test_a_file_that_is_truncated_missing_or_holds_other_records(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    shard = manifest["splits"]["train"]["shards"][0]
    file, n = copy / shard["file"], shard["blocks"]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"{file}: has {len(whole) - 1:,} bytes, and should have {len(whole):,}"):
        Blocks(copy, "train")
    file.unlink()
    with pytest.raises(UserError, match=f"{file}: is missing"):
        Blocks(copy, "train")
    file.write_bytes(bytes(len(whole)))
    with pytest.raises(UserError, match=f"{file}, record 0: is damaged"):
        Blocks(copy, "train").read([0])
    file.write_bytes(whole)
    manifest["splits"]["train"]["shards"][0]["blocks"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"{file}, record 0: is damaged.*{n} records, where {n + 1} were written"):
        Blocks(copy, "train").read([0])


def test_records_of_another_shape():
    record, into = Record(S, "uint16"), np.empty(S + 1, np.uint16)
    tokens = np.arange(S + 1, dtype=np.uint16)
    for length in (1, 5, S, S + 1):
        assert record.decode(record.encode(tokens, length), into) == length
        np.testing.assert_array_equal(into, tokens)
    longer = Record(S + 1, "uint16").encode(np.arange(S + 2, dtype=np.uint16), S + 2)
    for bad in (
        b"",
        b"garbage",
        record.encode(tokens, S + 1)[:-1],
        longer,
        Record(S, "int32").encode(tokens.astype("int32"), S + 1),
    ):
        with pytest.raises(ValueError, match="is not a block of 33 tokens of uint16"):
            record.decode(bad, into)
    for length in (0, S + 2):
        with pytest.raises(ValueError, match=f"says that {length} of its 33 tokens are real"):
            record.decode(record.encode(tokens, length), into)


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("seq_len", [1, 31, 62, 2048])
def test_every_width_and_value(dtype, seq_len):
    """Lengths of one and more bytes, and tokens that equal the bytes around them."""
    record, rng = Record(seq_len, dtype), np.random.default_rng(0)
    for high in (2, 256, 65_535):
        for length in {1, seq_len, seq_len + 1}:
            tokens = rng.integers(0, high, seq_len + 1).astype(dtype)
            into = np.empty_like(tokens)
            assert record.decode(record.encode(tokens, length), into) == length
            np.testing.assert_array_equal(into, tokens)


@pytest.mark.parametrize("kind", ["chat", "preferences"])
@pytest.mark.parametrize("length", [5, S + 1])
def test_marks_and_reference_stand_beside_each_token(kind, length):
    record, rng = Record(S, "uint16", kind), np.random.default_rng(0)
    values = {"marks": rng.integers(0, 4, S + 1).astype(np.uint8), "reference": rng.normal(size=S + 1).astype(np.float32)}
    extras = {name: values[name] for name in EXTRAS[kind]}
    tokens, into = rng.integers(0, 65_535, S + 1).astype(np.uint16), np.zeros(S + 1, np.uint16)
    back = {name: np.zeros_like(value) for name, value in extras.items()}
    encoded = record.encode(tokens, length, **extras)
    assert record.decode(encoded, into, **back) == length
    for want, got in ((tokens, into), *((extras[name], back[name]) for name in extras)):
        np.testing.assert_array_equal(want, got)
    with pytest.raises(ValueError, match="is not a block"):  # of another kind
        record.decode(Record(S, "uint16").encode(tokens, length), into, **back)


# -- what is no data set ------------------------------------------------------------------------------------------------


def test_folders_that_are_not_data_sets(copy, tmp_path):
    with pytest.raises(UserError, match="gone: no such folder; `python -m tinyllama_jax.prepare` makes it"):
        Blocks(tmp_path / "gone", "train")
    (tmp_path / "gone.partial").mkdir()
    with pytest.raises(UserError, match="gone: is half prepared; run .* again to finish it"):
        Blocks(tmp_path / "gone", "train")
    with pytest.raises(UserError, match="has no manifest.json; it was not made by"):
        Blocks(tmp_path, "train")
    with pytest.raises(UserError, match="copy: has no split 'test', only train, validation; prepare it again with --test"):
        Blocks(copy, "test")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="manifest.json: has format 99, and this version reads format 1"):
        Blocks(copy, "train")
    for text in (
        "{",
        "[]",
        "{}",
        '{"format": 1}',
        "[" * 100_000,
        '{"format": ' + "1" * 5_000 + "}",
        "\xff",
        '{"format": "\\ud800"}',
    ):
        (copy / "manifest.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="manifest.json: is damaged .*; copy or prepare the data again"):
            Blocks(copy, "train")


SHARD = ("splits", "train", "shards", 0)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ((*SHARD, "blocks"), -1, r"Expected `int` >= 0 - at `\$.splits\[...\].shards\[0\].blocks`"),
        ((*SHARD, "blocks"), 10**30, "blocks"),
        ((*SHARD, "blocks"), 2**60, "more blocks than bytes"),
        ((*SHARD, "bytes"), "4", "Expected `int`, got `str`"),
        ((*SHARD, "file"), "../train", "matching regex"),
        ((*SHARD, "file"), "/etc/passwd", "matching regex"),
        ((*SHARD, "file"), "..", "matching regex"),
        ((*SHARD, "file"), "a\0b", "matching regex"),
        (("splits", "train", "shards"), [], "length >= 1"),
        (("splits", "train", "shards"), {}, "Expected `array`, got `object`"),
        (("splits", "train"), None, "Expected `object`, got `null`"),
        (("splits",), {}, "length >= 1"),
        (("seq_len",), 10**12, "<= 16777216"),
        (("seq_len",), 0, ">= 1"),
        (("seq_len",), 32.5, "Expected `int`, got `float`"),
        (("dtype",), "float64", "Invalid enum value 'float64'"),
        (("bos",), 1, "Expected `bool`, got `int`"),
        (("tokenizer",), [], "Expected `object`, got `array`"),
        (("tokenizer", "eos_id"), -2, ">= -1"),
        (("tokenizer", "vocab_size"), 2**40, "<= "),
    ],
)
def test_a_manifest_with_an_impossible_value(copy, path, value, words):
    manifest = json.loads((copy / "manifest.json").read_text())
    at = manifest
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=words) as raised:
        blocks_lib.read_manifest(copy)
    assert str(raised.value).startswith(f"{copy}/manifest.json: is damaged (") and "\n" not in str(raised.value)


def test_a_manifest_that_names_a_file_twice(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"] += manifest["splits"]["train"]["shards"][:1]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="it lists a file twice"):
        Blocks(copy, "train")


def test_a_manifest_that_is_not_a_regular_file(copy):
    (copy / "manifest.json").unlink()
    os.mkfifo(copy / "manifest.json")  # a writer would be waited for without end
    with pytest.raises(UserError, match="has no manifest.json"):
        Blocks(copy, "train")


@pytest.mark.parametrize("seq_len", [44, 5_759, 5_790, 5_822])  # the byte that says how long the tokens are is like the tokens
def test_records_whose_length_looks_like_their_tokens_come_back(seq_len):
    record = Record(seq_len, "uint16")
    tokens = np.arange(seq_len + 1, dtype=np.uint16) * 7 + 1
    tokens[-1] = 23_100
    into = np.empty_like(tokens)
    assert record.decode(record.encode(tokens, seq_len + 1), into) == seq_len + 1
    np.testing.assert_array_equal(into, tokens)
