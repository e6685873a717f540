"""Training a tokenizer: the same text gives the same bytes, complete or not at all. Warnings of tokenizers that lose text."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tinyllama_jax import train_tokenizer
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import tokenizer
from tinyllama_jax.data.prepare import inputs, vocabulary

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory, texts) -> Path:
    """A folder with the same kind of documents in each kind of file."""
    folder = tmp_path_factory.mktemp("text")
    rows = "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts)
    (folder / "a.jsonl").write_text(rows)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (folder / "c.txt").write_text("\n".join(text.replace("\r", "") for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "d.parquet")
    return folder


def command(*arguments) -> subprocess.CompletedProcess:
    line = [sys.executable, "-W", "error", "-m", "tinyllama_jax.train_tokenizer", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_command_trains_a_tokenizer_that_loses_nothing(files, tmp_path, odd):
    done = command(files, "--vocab-size", 600, "--output", tmp_path / "new")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"{tmp_path / 'new'}: SentencePiece BPE, 600")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    ours = tokenizer.load(tmp_path / "new")
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (600, 1, 2)
    assert [ours.decode(ours.encode(text)) for text in odd] == [text.replace("▁", " ") for text in odd]
    train_tokenizer.main([str(files), "--vocab-size", "600", "--output", str(tmp_path / "again")])
    assert tokenizer.load(tmp_path / "again").sha256 == ours.sha256


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{files}", "--vocab-size", "100000"], "--vocab-size 100000: there is too little text: .* at most"),
        (["{files}", "--vocab-size", "20"], "--vocab-size 20: its bytes and characters alone take"),
        (["{files}", "--vocab-size", "0"], "--vocab-size 0: must lie in"),
        (["{files}", "--vocab-size", "9999999"], "--vocab-size 9999999: must lie in"),
        (["{files}", "--vocab-size", "500", "--sample-mb", "-1"], "--sample-mb -1: must lie in"),
        (["{tmp}/none", "--vocab-size", "500"], "none: no such file or folder"),
        (["{files}", "--vocab-size", "500", "--output", "gs://b/new"], "--output=gs://b/new: is a URL"),
        (["{tmp}/empty.txt", "--vocab-size", "500"], "there is no text to learn from"),
        (["{files}/a.jsonl", "--vocab-size", "500", "--text-key", "body"], "has no key 'body'"),
    ],
)
def test_a_mistake_leaves_no_files(files, tmp_path, arguments, says):
    (tmp_path / "empty.txt").touch()
    words = [word.format(files=files, tmp=tmp_path) for word in arguments]
    with pytest.raises(UserError, match=says) as error:
        train_tokenizer.main(["--output", str(tmp_path / "new"), *words])
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_an_existing_tokenizer_is_not_overwritten(files, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        train_tokenizer.main([str(files), "--vocab-size", "600", "--output", str(tmp_path)])


def test_a_sample_has_its_size_and_comes_from_all_files(files):
    sources, _ = inputs.find([files], "FILES")
    whole = list(vocabulary.sample(sources, "text", 10**9))
    assert sum(map(len, whole)) > 200_000
    part = list(vocabulary.sample(sources, "text", 20_000))
    assert 10_000 < sum(map(len, part)) < 30_000
    assert part == list(vocabulary.sample(sources, "text", 20_000))
    assert max(map(len, vocabulary.sample(sources, "text", 10**9, longest=50))) == 50


def test_a_sample_has_the_end_of_a_long_document_too(tmp_path):
    lines = [f"line {i}\n" for i in range(300_000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    sources, _ = inputs.find([tmp_path], "FILES")
    parts = list(vocabulary.sample(sources, "text", 10**9))
    assert "".join(parts) == "".join(lines) and max(map(len, parts)) <= vocabulary.LONGEST


def test_a_tokenizer_that_loses_text_is_warned_about(models, tmp_path):
    rows = [f"line {i}\nand another" if i % 4 else "one▁line" for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    sources, _ = inputs.find([tmp_path], "--train")
    told = lambda kind: vocabulary.warnings(tokenizer.load(models(kind)), sources, "text")
    assert told("demo") == told("prefix") == []
    (line,) = told("nfkc")
    assert (
        "warning: 75 of 100 documents of a sample (75.0%) are not decoded to the same" in line
        and r"becomes 'line 1 and" in line
    )
    line = told("suffix")[-1]
    assert "puts the space after a word" in line and "--tokenizer none" in line
