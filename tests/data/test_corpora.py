"""Each corpus by its name, what is held out and what is left out: the same whatever the shards, the type of file, the place."""

import functools
import hashlib
import json
import random
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from test_prepare import digests, expected, lines, stream

from tinyllama_jax import prepare as prepare_lib
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import tokenizer
from tinyllama_jax.data.prepare import documents, inputs, pipeline
from tinyllama_jax.data.prepare.pipeline import prepare

WORDS = ["the", "of", "a", "def", "return", "in", "self", "for", "import", "None"]


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def numbered(n: int) -> list[str]:
    rng = random.Random(n)
    return [f"document {i}: " + " ".join(rng.choices(WORDS, k=rng.randrange(1, 60))) for i in range(n)]


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def run(tmp_path, model):
    """`prepare` with the demo's tokenizer into a new folder `out`, by one worker."""
    return functools.partial(prepare, tokenizer=model, output=tmp_path / "out", seq_len=32, workers=1)


# -- by name ------------------------------------------------------------------------------------------------------------


def test_slimpajama_leaves_out_github(tmp_path, model, run, capsys):
    names = ["RedPajamaC4", "RedPajamaGithub", "RedPajamaBook", "RedPajamaGithub", "RedPajamaGithubX"]
    rows = [{"text": f"text {i}", "meta": {"redpajama_set_name": name}} for i, name in enumerate(names)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    put(tmp_path / "SlimPajama-627B/train/chunk1/example_train_0.jsonl.zst", zstd(data))
    put(tmp_path / "SlimPajama-627B/README.md", b"not data")
    manifest = run(train=[tmp_path / "SlimPajama-627B"], corpus="slimpajama", held_out=0)
    assert stream(tmp_path / "out") == expected(["text 0", "text 2", "text 4"], model)
    train = manifest["splits"]["train"]
    assert (train["documents"], train["dropped"]) == (3, {"meta.redpajama_set_name=RedPajamaGithub": 2})
    assert manifest["corpus"] == "slimpajama" and manifest["text_key"] == "text"
    assert "train: 2 documents left out: meta.redpajama_set_name=RedPajamaGithub" in capsys.readouterr().out

    with pytest.raises(UserError, match="corpus was slimpajama, now none; choose another --output"):
        run(train=[tmp_path / "SlimPajama-627B"], held_out=0)
    run(train=[tmp_path / "SlimPajama-627B"], held_out=0, output=tmp_path / "all")
    assert stream(tmp_path / "all") == expected([row["text"] for row in rows], model)
    put(tmp_path / "b.jsonl", lines(["no meta"]))
    with pytest.raises(UserError, match=r"b.jsonl, line 1: has no meta.redpajama_set_name, by which .* without --corpus"):
        run(train=[tmp_path / "b.jsonl"], corpus="slimpajama", output=tmp_path / "new")


def test_languages_of_starcoder_are_selected_by_exact_name(tmp_path, model, run):
    for language in ("c", "c-sharp", "cpp", "java", "javascript", "python"):
        (tmp_path / "code" / language).mkdir(parents=True)
        table = pyarrow.table({"max_stars_count": [1], "content": [f"in {language}"]})
        pyarrow.parquet.write_table(table, tmp_path / "code" / language / "train-00000-of-00001.parquet")
    (tmp_path / "code/notes").mkdir()
    options = {"train": [tmp_path / "code"], "corpus": "starcoder", "held_out": 0}
    manifest = run(**options, languages=["java", "c"])
    assert stream(tmp_path / "out") == expected(["in c", "in java"], model)
    assert [s["file"].split("/")[0] for s in manifest["splits"]["train"]["sources"]] == ["c", "java"]
    arguments = f"--train {tmp_path}/code --corpus starcoder --languages java c --held-out 0 --bad-files skip --workers 1"
    prepare_lib.main([*arguments.split(), "--tokenizer", str(model), "--output", str(tmp_path / "again"), "--seq-len", "32"])
    assert digests(tmp_path / "again") == digests(tmp_path / "out")
    run(**options, output=tmp_path / "all")
    assert len(stream(tmp_path / "all")) > len(stream(tmp_path / "out"))
    for language, says in (
        ("Javascript", "Javascript: there is no folder of that name with data; did you mean javascript?"),
        ("notes", "notes: there is no folder of that name with data; there are c, c-sharp, cpp, java, javascript, python"),
        ("code", "code: there is no folder"),
    ):
        with pytest.raises(UserError, match=f"--languages {says}"):
            run(**options, languages=["java", language], output=tmp_path / "new")
    with pytest.raises(UserError, match="--languages java: only --corpus starcoder has"):
        run(train=[tmp_path / "code"], languages=["java"], output=tmp_path / "new")


def test_proof_pile_and_skypile_as_they_are_published(tmp_path, model, run):
    for part in ("algebraic-stack", "arxiv", "open-web-math"):
        for split in ("train", "validation", "test"):
            put(tmp_path / f"proof-pile-2/{part}/{split}/0.jsonl.zst", zstd(lines([f"{part} {split}"])))
    pile = tmp_path / "proof-pile-2"
    run(train=[f"{pile}/*/train"], validation=[f"{pile}/*/validation"], corpus="proof_pile")
    assert stream(tmp_path / "out") == expected(["algebraic-stack train", "arxiv train", "open-web-math train"], model)
    assert len(stream(tmp_path / "out", "validation")) == len(
        expected(["algebraic-stack validation", "arxiv validation", "open-web-math validation"], model)
    )
    put(tmp_path / "SkyPile-150B/data/2020-40_zh_head_0000.jsonl", lines(["你好，世界", "再见"]))
    run(train=[tmp_path / "SkyPile-150B"], corpus="skypile", held_out=0, output=tmp_path / "sky")
    spm = tokenizer.load(model)
    assert spm.decode(stream(tmp_path / "sky")) == "你好，世界再见"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"corpus": "slimpyjama"}, r"--corpus slimpyjama: is not known \(.*; did you mean slimpajama\?"),
        (
            {"corpus": "c4"},
            r"c4: is not known \(other corpora need no --corpus\); there are proof_pile, skypile, slimpajama, starcoder",
        ),
        ({"corpus": "starcoder"}, "a.jsonl: is of no known type; known are .parquet"),
        ({"held_out": 1}, "--held-out 1: is a fraction of the documents, at least 0 and less than 1; 0.01 is 1%"),
        ({"held_out": -0.5}, "--held-out -0.5: is a fraction"),
        ({"held_out": float("nan")}, "--held-out nan: is a fraction"),
        ({"held_out": 0.1, "validation": ["b.jsonl"]}, "--held-out 0.1: .* give one"),
        ({"data_dir": "x"}, "--data-dir x: is for tfds:NAME"),
        ({"bad_files": "ignore"}, "--bad-files ignore: must be stop or skip"),
        ({"train": ["*.parquet"]}, r"--train \*.parquet: no file or folder matches"),
        ({"train": ["**/*.csv"]}, r"--train \*\*/\*.csv: there is no file of a known type"),
        ({"train": ["*.jsonl", "a.jsonl"]}, "a.jsonl is given 2 times"),
        ({"train": ["hdfs://x/y"]}, "hdfs://x/y: hdfs:// cannot be read; known are s3:// gs://"),
    ],
    ids=str,
)
def test_impossible_options_are_errors(tmp_path, run, monkeypatch, change, says):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "c.csv"):
        put(Path(name), lines([name]))
    with pytest.raises(UserError, match=says):
        run(**{"train": ["a.jsonl"], **change})
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_patterns(tmp_path, model, run, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.jsonl", "in/b/c.jsonl", "in/b/.hidden.jsonl", "in/b/[d].jsonl", "in/notes.md"):
        put(Path(name), lines([name]))
    everything = expected(["in/a.jsonl", "in/b/[d].jsonl", "in/b/c.jsonl"], model)
    for i, pattern in enumerate(("in/**", "i*", "in/**/*.jsonl", "in/*")):
        run(train=[pattern], held_out=0, output=f"out{i}")
        assert stream(Path(f"out{i}")) == everything, pattern
    assert "left out 1 files of other types, such as in/notes.md" in capsys.readouterr().err
    run(train=["in/b/[d].jsonl"], held_out=0, output="named")  # a name comes before a pattern
    assert stream(Path("named")) == expected(["in/b/[d].jsonl"], model)
    assert "warning" not in capsys.readouterr().err
    for name in ("more/train/a.jsonl", "more/test/b.jsonl"):
        put(Path(name), lines([name]))
    run(train=["more"], held_out=0, output="both")
    assert "--train: warning: holds folders named test, which are trained on" in capsys.readouterr().err
    with pytest.raises(UserError, match="--output out0: the input .*out0/.*json lies in it"):
        run(train=["out*/*", "in"], held_out=0, output="out0")


# -- held out -----------------------------------------------------------------------------------------------------------


def is_held_out(text: str, fraction: float) -> bool:
    """By the definition."""
    return int(hashlib.sha256(text[:65_536].encode()).hexdigest()[:16], 16) / 16**16 < fraction


def test_the_same_document_is_in_the_same_split_wherever_it_lies(tmp_path, model, run, monkeypatch):
    texts = numbered(2_000)
    held = [text for text in texts if is_held_out(text, 0.01)]
    assert 10 < len(held) < 30
    put(tmp_path / "a/a.jsonl", lines(texts))
    put(tmp_path / "b/a.jsonl.zst", zstd(lines(texts[1_000:])))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[:1_000]}), tmp_path / "b/b.parquet", row_group_size=99)
    for i, text in enumerate([*held, *texts[:20]]):
        put(tmp_path / f"c/{i:05}.txt", text.encode())
    rest = [text for text in texts if text not in held]
    manifest = run(train=[tmp_path / "a"])
    assert stream(tmp_path / "out", "validation") == expected(held, model)
    assert stream(tmp_path / "out") == expected(rest, model)
    assert {split: (c["documents"], len(c["sources"])) for split, c in manifest["splits"].items()} == {
        "train": (len(rest), 1),
        "validation": (len(held), 0),
    }
    monkeypatch.setattr(pipeline, "SHARD", (1 << 12, 1 << 30))
    manifest = run(train=[tmp_path / "b"], output=tmp_path / "b-out")
    files = {split: [s["blocks"] for s in counts["shards"]] for split, counts in manifest["splits"].items()}
    assert len(files["train"]) == len(files["validation"]) > 10 and 0 in files["validation"]  # some hold nothing
    order = [text for text in texts[1_000:] + texts[:1_000] if text in held]
    assert stream(tmp_path / "b-out", "validation") == expected(order, model)
    assert run(train=[tmp_path / "b"], output=tmp_path / "b-out") == manifest  # complete already
    run(train=[tmp_path / "c"], output=tmp_path / "c-out")
    assert stream(tmp_path / "c-out", "validation")[: len(expected(held, model))] == expected(held, model)


def test_only_the_beginning_decides_the_split_and_a_smaller_fraction_holds_out_a_subset():
    rng = random.Random(0)
    texts = ["", "x", "é" * 70_000, *numbered(500), *("".join(rng.choices("ab", k=66_000)) for _ in range(20))]
    for text in texts:
        cuts = sorted(rng.choices(range(len(text) + 1), k=5))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        sides = []
        for fraction in (0.01, 0.3, 0.7):
            side, again = documents.held_out(iter(parts), fraction)
            assert "".join(again) == text
            assert side == is_held_out(text, fraction) == documents.held_out([text + "z" * (len(text) > 65_536)], fraction)[0]
            sides.append(side)
        assert sides == sorted(sides)


@pytest.mark.parametrize("side", [False, True], ids=["kept", "held out"])
@pytest.mark.parametrize("shards", [1, 30])
def test_with_few_documents_the_last_blocks_are_held_out(tmp_path, model, run, capsys, monkeypatch, side, shards):
    """Whichever split they all fall into, and also if the command was stopped on the way."""
    texts = [text for text in numbered(400) if is_held_out(text, 0.1) == side][:30]
    put(tmp_path / "few.jsonl", lines(texts))
    monkeypatch.setattr(pipeline, "SHARD", (1 << 9 if shards > 1 else 1 << 20, 1 << 30))
    manifest = run(train=[tmp_path / "few.jsonl"], held_out=0.1)
    train, held = (manifest["splits"][split] for split in ("train", "validation"))
    assert (train["documents"], held["documents"], held["last_blocks_of_train"]) == (30, 0, held["blocks"])
    assert (len(train["shards"]) > 9) == (shards > 1) and held["blocks"] == round(0.1 * (held["blocks"] + train["blocks"])) > 2
    assert f"validation: too few documents to hold any out; the last {held['blocks']} blocks are held out instead" in (
        capsys.readouterr().out
    )
    ids, validation = expected(texts, model), stream(tmp_path / "out", "validation")
    assert stream(tmp_path / "out") + validation == ids and len(validation) == held["tokens"]
    assert run(train=[tmp_path / "few.jsonl"], held_out=0.1) == manifest

    hold_out, calls = pipeline.folder_lib.shards.hold_out, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 2 - (shards == 1):
            raise KeyboardInterrupt
        return hold_out(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.folder_lib.shards, "hold_out", stopped)
        run(train=[tmp_path / "few.jsonl"], held_out=0.1, output=tmp_path / "again")
    assert run(train=[tmp_path / "few.jsonl"], held_out=0.1, output=tmp_path / "again") == manifest
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


def test_a_single_block_is_trained_on(tmp_path, model, run, capsys):
    kept, held = (next(text for text in numbered(99) if is_held_out(text, 0.1) == side) for side in (False, True))
    put(tmp_path / "kept.txt", kept.encode())
    put(tmp_path / "held.txt", held.encode())
    manifest = run(train=[tmp_path / "kept.txt"], held_out=0.1, seq_len=1_000)
    assert list(manifest["splits"]) == ["train"] and stream(tmp_path / "out") == expected([kept], model)
    assert not [f.name for f in (tmp_path / "out").iterdir() if "validation" in f.name]
    assert "no validation split: there is only one block of text; give more text, or --validation" in capsys.readouterr().out
    with pytest.raises(UserError, match="held_out was 0.1, now 0.01"):
        run(train=[tmp_path / "kept.txt"], seq_len=1_000)
    with pytest.raises(UserError, match="no text in its 1 files; its only block was held out: give --held-out 0"):
        run(train=[tmp_path / "held.txt"], held_out=0.1, seq_len=1_000, output=tmp_path / "new")


def test_a_large_document_is_not_held_in_memory(tmp_path):
    """50 MB, on one line of jsonl, which is read whole, and in a text file, which is read in parts."""
    text = "fifty megabytes \0 " * 2_800_000
    put(tmp_path / "a.txt", text.encode())
    put(tmp_path / "b.jsonl", lines(["", text, "x"]))
    (big, one), _ = inputs.find([tmp_path], "--train")

    def read(source):
        (piece,) = documents.pieces(source, documents.units(source, "text"), 1 << 40)
        for document in documents.read(piece, "text", {}, {}):
            yield sum(map(len, documents.held_out(document, 0.01)[1]))

    assert list(read(one)) == [0, len(text), 1]
    tracemalloc.start()
    assert list(read(big)) == [len(text)]
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


# -- files that cannot be read ------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path, monkeypatch) -> dict[str, list[str]]:
    """A folder `in` of good and bad files, in many shards; the texts of the good ones."""
    monkeypatch.setattr(pipeline, "SHARD", (1 << 12, 1 << 30))
    texts = numbered(200)
    good = {"a.jsonl": texts[:80], "e.jsonl": texts[80:160], "g.txt": ["text"]}
    for name in ("a.jsonl", "e.jsonl"):
        put(tmp_path / "in" / name, lines(good[name]))
    put(tmp_path / "in/g.txt", b"text")
    bad = lines(texts).splitlines(keepends=True)
    bad[100], bad[180] = b'{"text": 3}\n', b"\xff\n"
    put(tmp_path / "in/b.jsonl", b"".join(bad))  # cut over several shards, of which two see that it is bad
    put(tmp_path / "in/c.jsonl.zst", zstd(lines(texts))[:-9])
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "in/d.parquet")
    put(tmp_path / "in/f.txt", "é".encode("latin-1"))
    return good


REASONS = {
    "b.jsonl": "b.jsonl, line 101: 'text' is not a text, but 3",
    "c.jsonl.zst": "c.jsonl.zst, line 1: Truncated compressed stream",
    "d.parquet": "d.parquet: has no column 'text'; it has body: choose one with --text-key",
    "f.txt": "f.txt, line 1: is not UTF-8 (byte 0xe9)",
}


def test_bad_files_are_left_out_wholly_and_listed(tmp_path, model, run, damaged, capsys):
    options = {"train": [tmp_path / "in"], "held_out": 0.1}
    with pytest.raises(UserError, match=f"{tmp_path}/in/[bcdf]"):
        run(**options)
    manifest = run(**options, bad_files="skip")
    train = manifest["splits"]["train"]
    assert {file["file"]: file["reason"] for file in train["bad_files"]} == REASONS
    assert all(file["bytes"] == (tmp_path / "in" / file["file"]).stat().st_size for file in train["bad_files"])
    assert [source["file"] for source in train["sources"]] == list(damaged)
    texts = [text for file in damaged.values() for text in file]
    for split, side in (("train", False), ("validation", True)):
        assert stream(tmp_path / "out", split) == expected([t for t in texts if is_held_out(t, 0.1) == side], model)
    assert "left out, one of 4 bad files, which the manifest lists: b.jsonl, line 101" in capsys.readouterr().out
    assert run(**options, bad_files="skip") == manifest  # complete already

    # whoever does the work, and wherever it is stopped: here between the two rounds, and in the second
    run(**options, bad_files="skip", output=tmp_path / "two", workers=2)
    assert digests(tmp_path / "two") == digests(tmp_path / "out")
    again, rounds = pipeline._again, []

    def interrupted(*arguments):
        rounds.append(again(*arguments) if rounds else None)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pipeline, "_again", interrupted)
            run(**options, bad_files="skip", output=tmp_path / "three")
    assert len(rounds[1]) > 1
    run(**options, bad_files="skip", output=tmp_path / "three")
    assert digests(tmp_path / "three") == digests(tmp_path / "out")


def test_a_bad_file_is_an_error_again_and_is_read_when_it_is_repaired(tmp_path, model, run, damaged):
    options = {"train": [tmp_path / "in"], "held_out": 0}
    (tmp_path / "in/d.parquet").unlink()  # would be found before anything runs
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.folder_lib, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(**options, bad_files="skip")
    with pytest.raises(UserError, match="in/[bcf].*, line "):
        run(**options)
    put(tmp_path / "in/b.jsonl", lines(["mended"]))
    put(tmp_path / "in/c.jsonl.zst", zstd(lines(["mended too"])))
    (tmp_path / "in/f.txt").unlink()
    manifest = run(**options, bad_files="skip")
    assert not manifest["splits"]["train"]["bad_files"]
    texts = [*damaged["a.jsonl"], "mended", "mended too", *damaged["e.jsonl"], "text"]
    assert stream(tmp_path / "out") == expected(texts, model)


def test_nothing_but_bad_files(tmp_path, run):
    put(tmp_path / "in/a.txt", b"\xff")
    put(tmp_path / "in/b.parquet", b"PAR1")
    with pytest.raises(UserError, match="--train: there is no text in its 2 files"):
        run(train=[tmp_path / "in"], bad_files="skip")
