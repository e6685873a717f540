"""Cleaning through the whole command: what is dropped and replaced, counted and kept; the same bytes whoever does the work."""

import gzip
import json
import os
import random
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import test_runners
from test_duplicates import WORDS, planted
from test_prepare import command, digests, expected, finished, lines, stream

from tinyllama_jax import prepare as prepare_lib
from tinyllama_jax.base import store
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data.blocks import read_manifest
from tinyllama_jax.data.prepare import folder as folder_lib
from tinyllama_jax.data.prepare import pipeline
from tinyllama_jax.data.prepare.pipeline import prepare

# fixtures: an object store, Dask's scheduler, and what starts a worker of it
bucket, scheduler, start = test_runners.bucket, test_runners.scheduler, test_runners.start
ENGLISH = """the of and that with from which house river people water time year morning never always because through about they
would could another little people should before between mother father children country thought letter reading"""
GERMAN = """der die das und nicht mit von wird haben sein werden können Straße Haus Fluss Leute Wasser Zeit Jahr Morgen niemals
immer weil durch über andere kleine Leute sollten bevor zwischen Mutter Vater Kinder Land gedacht Brief lesen"""
CLEAN = ["length:20:", "language:en:0.5", "repetition", "python:rules.py:keep"]


def write(folder: Path, docs: list[str]) -> Path:
    """`docs` in order in files of every type."""
    n = len(docs) // 4
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(docs[:n]))
    (folder / "b.jsonl.zst").write_bytes(pyarrow.compress(lines(docs[n : 2 * n]), codec="zstd", asbytes=True))
    pyarrow.parquet.write_table(pyarrow.table({"text": docs[2 * n : 3 * n]}), folder / "c.parquet", row_group_size=4)
    for i, text in enumerate(docs[3 * n :]):
        (folder / f"d{i:03}.txt").write_text(text)
    return folder


def rows(folder: Path) -> list[dict]:
    """What --keep-dropped kept, in order."""
    return [json.loads(line) for file in sorted(folder.iterdir()) for line in gzip.decompress(file.read_bytes()).splitlines()]


def small_shards(monkeypatch, size: int = 1 << 11):
    monkeypatch.setattr(pipeline, "SHARD", (size, 1 << 30))


@pytest.fixture
def mixed(tmp_path, monkeypatch) -> tuple[list[str], list[tuple[str, str]]]:
    """The folder "corpus" of 80 documents; the 40 that stay, scrubbed; and (reason, text) of the others, in order."""
    rng = random.Random(0)
    stay, dropped, docs = [], [], []
    for i in range(80):
        text = " ".join(rng.choices((GERMAN if i % 8 == 1 else ENGLISH).split(), k=40))
        reason = {1: CLEAN[1], 3: CLEAN[0], 5: CLEAN[2], 7: CLEAN[3]}.get(i % 8)
        text = {CLEAN[0]: text[:15], CLEAN[2]: f"{text}\n" * 9, CLEAN[3]: f"{text} secret"}.get(reason, text)
        docs.append(f"{text} me{i}@mail.example.org and 8.8.4.4" if reason is None else text)
        if reason:
            dropped.append((reason, docs[-1]))
        else:
            stay.append(f"{text} <EMAIL> and <IP_ADDRESS>")
    write(tmp_path / "corpus", docs)
    (tmp_path / "rules.py").write_text("def keep(text):\n    return 'secret' not in text\n")
    monkeypatch.chdir(tmp_path)
    return stay, dropped


@pytest.mark.parametrize("dedup", ["", "exact", "minhash"])
def test_filters_and_scrubbing(mixed, model, monkeypatch, capsys, dedup):
    """With --dedup the filters run in an earlier pass, with the same result."""
    stay, dropped = mixed
    small_shards(monkeypatch)
    arguments = f"--train corpus --tokenizer {model} --seq-len 64 --held-out 0 --workers 1 --output out --keep-dropped dropped"
    for spec in CLEAN:
        arguments += f" --filter {spec}"
    prepare_lib.main([*arguments.split(), "--scrub", "email,ip", *(["--dedup", dedup] if dedup else [])])
    manifest = read_manifest(Path("out"))[0]
    train = manifest["splits"]["train"]
    assert stream(Path("out")) == expected(stay, model) and len(train["shards"]) > 4
    assert (train["documents"], train["empty_documents"]) == (40, 0)
    assert train["dropped"] == dict.fromkeys(sorted(CLEAN), 10) and train["scrubbed"] == {"email": 40, "ip": 40}
    assert [(row["reason"], row["text"]) for row in rows(Path("dropped"))] == dropped
    assert {row["file"] for row in rows(Path("dropped"))} >= {"a.jsonl", "b.jsonl.zst", "c.parquet", "d001.txt"}
    assert all(row["characters"] == len(row["text"]) and "copy_of" not in row for row in rows(Path("dropped")))
    settings = manifest["cleaning"]
    assert settings["filter"][:3] == CLEAN[:3] and re.fullmatch(f"{CLEAN[3]} sha256:[0-9a-f]{{64}}", settings["filter"][3])
    assert (settings["scrub"], settings.get("dedup", ""), settings["keep_dropped"]) == (["email", "ip"], dedup, True)
    assert settings["versions"].keys() == {"pycld2", *(["datasketch"] if dedup == "minhash" else [])}
    out = capsys.readouterr().out
    assert "out: train: 10 documents left out: length:20:\n" in out and "out: train: 40 replaced: email\n" in out


def test_exact_copies_across_files_shards_and_splits(tmp_path, model, monkeypatch):
    small_shards(monkeypatch, 1 << 12)
    rng = random.Random(1)
    unique = [" ".join(rng.choices(WORDS, k=60)) for _ in range(60)]
    copied = [unique[0], "\n".join(unique[30].split()), unique[59] + " ", "", ""]
    write(tmp_path / "train", [*unique, *copied])  # 16 documents a file; of the fourth type one a file
    (tmp_path / "validation.jsonl").write_bytes(lines(["held out", unique[17], "held out"]))
    options = {"train": [tmp_path / "train"], "validation": [tmp_path / "validation.jsonl"], "tokenizer": model, "seq_len": 64}
    manifest = prepare(
        **options, output=tmp_path / "out", dedup="exact", keep_dropped=tmp_path / "dropped", workers=1, filters=["length:3:"]
    )
    assert stream(tmp_path / "out") == expected(unique, model)
    assert stream(tmp_path / "out", "validation") == expected(["held out"], model)
    train, validation = (manifest["splits"][split] for split in ("train", "validation"))
    assert (train["documents"], train["dropped"], train["empty_documents"]) == (60, {"dedup:exact": 3}, 2)
    assert (validation["documents"], validation["dropped"]) == (1, {"dedup:exact": 2})
    assert [(row["file"], row["copy_of"], row["text"]) for row in rows(tmp_path / "dropped")] == [
        ("d012.txt", {"file": "a.jsonl", "document": 0}, copied[0]),
        ("d013.txt", {"file": "b.jsonl.zst", "document": 14}, copied[1]),
        ("d014.txt", {"file": "d011.txt", "document": 0}, copied[2]),
        ("validation.jsonl", {"file": "b.jsonl.zst", "document": 1}, unique[17]),
        ("validation.jsonl", {"file": "validation.jsonl", "document": 0}, "held out"),
    ]


@pytest.fixture(scope="module")
def similar(tmp_path_factory) -> tuple[Path, list[str], dict[int, int]]:
    """(a folder of 360 documents, the documents, number of each near copy -> number of its original)."""
    docs, truth = planted(random.Random(2), 360)
    docs = [" ".join(words) for words in docs]
    folder = write(tmp_path_factory.mktemp("similar") / "corpus", docs)
    return folder, docs, {doc: of for doc, (of, j) in truth.items() if j >= 0.8}


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory, similar, model) -> Path:
    """A folder with one worker's output, "out", and the documents that it dropped, "dropped"."""
    at = tmp_path_factory.mktemp("one")
    code, _, err = finished(command(*minhash(similar[0], model, at), "--workers", 1, shard=1 << 16))
    assert (code, err) == (0, "")
    return at


def minhash(corpus: Path, model: Path, at: Path) -> list:
    arguments = ["--train", corpus, "--tokenizer", model, "--output", at / "out", "--seq-len", 128, "--held-out", 0.2]
    return [*arguments, "--dedup", "minhash", "--keep-dropped", at / "dropped", "--scrub", "phone"]


def test_near_copies(similar, one_worker, model):
    """At least 95% of 80 pairs are found, and nothing that is not similar by the definition."""
    _, docs, copies = similar
    found = rows(one_worker / "dropped")
    number = {text: i for i, text in enumerate(docs)}
    got = {number[row["text"]]: row["copy_of"] for row in found}
    manifest = read_manifest(one_worker / "out")[0]
    assert len(copies) > 40 and len(got.keys() & copies.keys()) >= 0.95 * len(copies) and got.keys() <= copies.keys()
    for doc, of in got.items():
        n = copies[doc]
        file = f"d{n - 270:03}.txt" if n >= 270 else ["a.jsonl", "b.jsonl.zst", "c.parquet"][n // 90]
        assert of == {"file": file, "document": 0 if n >= 270 else n % 90}
    assert manifest["splits"]["train"]["dropped"] == {"dedup:minhash": len(got)}
    left = [text for i, text in enumerate(docs) if i not in got]
    parts = stream(one_worker / "out"), stream(one_worker / "out", "validation")
    assert sum(map(len, parts)) == len(expected(left, model)) and all(parts)
    assert sum(manifest["splits"][split]["documents"] for split in ("train", "validation")) == len(left)


def test_bytes_do_not_depend_on_the_runner(similar, one_worker, model, tmp_path, scheduler, start):
    start()
    start()
    for i, others in enumerate((["--workers", 2], ["--runner", "dask", "--dask_client_address", scheduler])):
        code, _, err = finished(command(*minhash(similar[0], model, tmp_path / str(i)), *others, shard=1 << 16))
        assert code == 0 and "Traceback" not in err, err
        assert digests(tmp_path / str(i)) == digests(one_worker) and len(digests(tmp_path / str(i) / "dropped")) > 4


def test_an_object_store(similar, model, tmp_path, bucket, monkeypatch):
    small_shards(monkeypatch, 1 << 17)
    options = {"train": [similar[0] / name for name in ("a.jsonl", "b.jsonl.zst")], "tokenizer": model, "seq_len": 128}
    options |= {"held_out": 0, "dedup": "minhash", "workers": 1}
    here = prepare(**options, output=tmp_path / "out", keep_dropped=tmp_path / "dropped")
    assert prepare(**options, output=f"{bucket}/out", keep_dropped=f"{bucket}/dropped") == here
    for file in (tmp_path / "dropped").iterdir():
        assert store.read(store.place(f"{bucket}/dropped/{file.name}", "")) == file.read_bytes()
    assert len(rows(tmp_path / "dropped")) > 5 and not store.names(store.place(f"{bucket}/out.partial", ""))


def test_a_killed_job_resumes_and_a_changed_file_changes_only_what_depends_on_it(tmp_path, model, monkeypatch):
    small_shards(monkeypatch, 1 << 13)
    rng = random.Random(3)
    docs = [" ".join(rng.choices(WORDS, k=150)) for _ in range(64)]
    docs[60] = docs[3]
    for i in range(8):
        (tmp_path / f"{i}.jsonl").write_bytes(lines(docs[8 * i : 8 * i + 8]))
    options = {"train": [*tmp_path.glob("*.jsonl")], "tokenizer": model, "seq_len": 64, "held_out": 0, "workers": 1}
    options |= {"output": tmp_path / "out", "dedup": "minhash", "keep_dropped": tmp_path / "dropped"}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.folder_lib, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(**options)
    partial = tmp_path / "out.partial"

    def times(name: str) -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in (partial / name).iterdir() if file.is_file()}

    before = {name: times(name) for name in ("looked", "copies", "whole")}
    assert len(before["copies"]) == 8 and len(before["looked"]) == 32
    for change in ({"dedup": "exact"}, {"dedup_threshold": 0.7}, {"filters": ["repetition"]}, {"scrub": ["ip"]}, {"dedup": ""}):
        with pytest.raises(UserError, match="out.partial: was made with other settings: cleaning: "):
            prepare(**{**options, **change} | ({"keep_dropped": None} if change == {"dedup": ""} else {}))
    (tmp_path / "dropped/dropped-train-00002-of-00008.jsonl.gz").unlink()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.folder_lib, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(**options)
    assert times("looked") == before["looked"] and times("copies") == before["copies"]
    again = {name for name, time in times("whole").items() if time != before["whole"][name]}
    assert again == {"blocks-train.array_record-00002-of-00008"}  # and nothing else is made again

    # what another job dropped is not written over
    with pytest.raises(UserError, match="--keep-dropped .*: holds dropped-train-00000-of-00008.jsonl.gz, not from this job"):
        prepare(**{**options, "output": tmp_path / "other"})

    # the first file no longer has what a document in the last was a copy of, so that one stays; in the sixth is a new copy
    (tmp_path / "0.jsonl").write_bytes(lines([*docs[:3], docs[3][::-1], *docs[4:8]]))
    (tmp_path / "5.jsonl").write_bytes(lines([*docs[40:47], docs[40]]))
    manifest = prepare(**options)
    same = {name for name, time in before["whole"].items() if (tmp_path / "out" / name).stat().st_mtime_ns == time}
    assert same == {f"blocks-train.array_record-{i:05}-of-00008" for i in (1, 3, 4, 6)}
    assert manifest["splits"]["train"]["dropped"] == {"dedup:minhash": 1} and not partial.exists()
    prepare(**{**options, "output": tmp_path / "fresh", "keep_dropped": tmp_path / "fresh-dropped"})
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
    assert digests(tmp_path / "dropped") == digests(tmp_path / "fresh-dropped")


@pytest.mark.parametrize("dedup", ["exact", "minhash"])
def test_nothing_is_dropped_as_a_copy_of_a_document_in_a_bad_file(tmp_path, model, monkeypatch, dedup):
    small_shards(monkeypatch, 1 << 10)
    rng = random.Random(4)
    docs = [" ".join(rng.choices(WORDS, k=100)) for _ in range(8)]
    (tmp_path / "a.jsonl").write_bytes(lines(docs) + b"{\n" + lines(docs))  # in several shards
    (tmp_path / "b.jsonl").write_bytes(lines([docs[0], docs[5], docs[5]]))
    options = {"train": [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], "tokenizer": model, "seq_len": 64, "held_out": 0}
    options |= {"output": tmp_path / "out", "dedup": dedup, "workers": 1}
    with pytest.raises(UserError, match="a.jsonl, line 9: is not JSON"):
        prepare(**options)
    manifest = prepare(**options, bad_files="skip")
    assert stream(tmp_path / "out") == expected([docs[0], docs[5]], model)
    assert manifest["splits"]["train"]["dropped"] == {f"dedup:{dedup}": 1}
    assert [file["file"] for file in manifest["splits"]["train"]["bad_files"]] == ["a.jsonl"]


def test_a_file_that_turns_bad_after_the_first_pass_is_an_error(tmp_path, model, monkeypatch):
    """A document was already dropped as a copy of one in this file, so the file can no longer be left out."""
    source = tmp_path / "a.jsonl"
    source.write_bytes(lines(["some text"]))
    (tmp_path / "b.jsonl").write_bytes(lines(["some text", "other"]))
    time, left = source.stat().st_mtime_ns, folder_lib.unmade

    def meanwhile(*arguments):
        source.write_bytes(b"{" * source.stat().st_size)
        os.utime(source, ns=(time, time))
        return left(*arguments)

    monkeypatch.setattr(folder_lib, "unmade", meanwhile)
    options = {"train": [source, tmp_path / "b.jsonl"], "tokenizer": model, "seq_len": 8, "held_out": 0, "workers": 1}
    with pytest.raises(UserError, match="a.jsonl, line 1: is not JSON"):
        prepare(**options, output=tmp_path / "out", dedup="exact", bad_files="skip")


def test_a_long_text_file_is_filtered_and_scrubbed_in_parts(tmp_path, model):
    text = "\n".join(f"{i} of a very long file, by someone{i}@mail.example.org" for i in range(60_000))  # 3 MB
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(text)
    options = {
        "train": [tmp_path / "a.txt", tmp_path / "b.txt"],
        "tokenizer": model,
        "seq_len": 2_048,
        "held_out": 0,
        "workers": 1,
    }
    options |= {"filters": ["length:1000000:9000000"], "scrub": ["email"], "dedup": "minhash"}
    manifest = prepare(**options, output=tmp_path / "out", keep_dropped=tmp_path / "dropped")
    assert stream(tmp_path / "out") == expected([re.sub(r"someone\d+@mail.example.org", "<EMAIL>", text)], model)
    assert manifest["splits"]["train"]["scrubbed"] == {"email": 60_000}
    (row,) = rows(tmp_path / "dropped")
    assert (
        row["characters"] == len(text) and row["text"] == text[: 1 << 20] and row["copy_of"] == {"file": "a.txt", "document": 0}
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dedup": "fuzzy"}, "--dedup fuzzy: must be one of exact minhash"),
        ({"dedup_threshold": 0.8}, "--dedup-threshold 0.8: is for --dedup minhash"),
        ({"filters": ["lenght:3"]}, "--filter lenght:3: no such filter"),
        ({"filters": ["repetition", "repetition"]}, "--filter repetition: is given more than once"),
        ({"scrub": ["email,iban"]}, "--scrub iban: no such pattern; there are email, ip, phone, regex"),
        ({"keep_dropped": "dropped"}, "--keep-dropped dropped: nothing is dropped without --filter or --dedup"),
        (
            {"keep_dropped": "corpus/x", "dedup": "exact"},
            "--keep-dropped corpus/x: lies within corpus; choose a folder outside",
        ),
        ({"keep_dropped": "out", "dedup": "exact"}, "--keep-dropped out: lies within out; choose a folder outside"),
        ({"keep_dropped": "mine", "dedup": "exact"}, "--keep-dropped mine: holds thesis.txt, not from this job"),
        ({"filters": ["length::2"]}, "--train: there is no text in its 1 files; 2 documents were dropped"),
        ({"filters": ["python:rules.py:keep"]}, "--filter python:rules.py:keep: ZeroDivisionError: .* begins with 'some text'"),
    ],
    ids=str,
)
def test_impossible_options_are_errors(tmp_path, model, monkeypatch, change, says):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("mine")
    Path("corpus").mkdir()
    Path("corpus/a.jsonl").write_bytes(lines(["some text", "other"]))
    Path("rules.py").write_text("def keep(text):\n    return 1 / 0\n")
    with pytest.raises(UserError, match=says) as error:
        prepare(train=["corpus"], tokenizer=model, output="out", seq_len=8, held_out=0, workers=1, **change)
    assert "\n" not in str(error.value) and not Path("out").exists() and Path("mine/thesis.txt").exists()
