"""The audit finds and names each fault that is planted in a real data set, and finds none in a clean one."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module
from generated import texts

from tinyllama_jax import audit
from tinyllama_jax.base import cli, files
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import feed, litpkds
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.audit import report, survey
from tinyllama_jax.data.blocks import Blocks, Record
from tinyllama_jax.data.export import litpkds as export_litpkds
from tinyllama_jax.data.prepare import pipeline

S = 16
BOS, EOS = 1, 2


def words(n: int, seed: int) -> str:
    """A random text of `n` words, in which no two blocks are the same."""
    rng = random.Random(seed)
    known = sorted(set(re.findall(r"[A-Za-z]{4,}", texts(1)[0])))
    return " ".join(f"{rng.choice(known)} {rng.randrange(10**6)}" for _ in range(n))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_data) -> Path:
    """A data set in several files: 40 documents to train on, 5 to validate on."""
    folder = tmp_path_factory.mktemp("prepared")
    for split, seeds in {"train": range(40), "validation": range(40, 45)}.items():
        lines = (json.dumps({"text": words(seed % 7 * 20 + 11, seed)}) + "\n" for seed in seeds)
        (folder / f"{split}.jsonl").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "SHARD", (1 << 13, 1 << 30))
        files = {split: [folder / f"{split}.jsonl"] for split in ("train", "validation")}
        pipeline.prepare(**files, tokenizer=tiny_data / "512.model", output=folder / "data", seq_len=S, workers=1)
    assert len(Blocks(folder / "data", "train").files()) > 2
    return folder / "data"


@pytest.fixture
def data(prepared, tmp_path, monkeypatch) -> Path:
    """A copy that a test may damage; the page is written beside it."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(prepared, tmp_path / "data")


def rewrite(folder: Path, change, split: str = "train", **says) -> str:
    """Rewrites the first file with `change(tokens, length)` applied, and the manifest to match it; returns its name."""
    file, first, last = Blocks(folder, split).files()[0]
    tokens, length = Blocks(folder, split).read(np.arange(first, last))
    change(tokens, length)
    writer, record = array_record_module.ArrayRecordWriter(str(file), "group_size:1"), Record(S, "uint16")
    for row, n in zip(tokens, length.tolist(), strict=True):
        writer.write(record.encode(row, n))
    writer.close()

    def fits(manifest):
        entry = manifest["splits"][split]["shards"][0]
        entry |= {"bytes": file.stat().st_size, "sha256": files.sha256(file)}
        manifest["splits"][split] |= says

    edit(folder, fits)
    return file.name


def edit(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def findings(capsys, monkeypatch):
    """`findings(*arguments)`: the findings that the command prints; checks that its exit code fits them."""
    monkeypatch.setattr(report, "draw", lambda _: b"")  # half a second, and looked at in the test of clean data

    def run(*arguments) -> list[str]:
        code = audit.main([str(argument) for argument in arguments])
        printed = capsys.readouterr().out.splitlines()
        found = [line.removeprefix("wrong: ") for line in printed if line.startswith("wrong: ")]
        assert code == (4 if found else 0)
        assert re.fullmatch(r"\d+ findings? \(audit.html\)" if found else r"nothing wrong found \(audit.html\)", printed[-1])
        return found

    return run


def packed(data: Path, chunk: int = 40 * (S + 1), tail: str = "drop") -> str:
    """Writes the training split as LITPKDS files; returns the start of their names."""
    export_litpkds.export(data, "train", data.parent / "packed", "train_x", chunk, tail)
    return str(data.parent / "packed" / "train_x")


def test_clean_data_have_no_findings(data, findings, capsys, tmp_path, monkeypatch):
    path = packed(data)
    capsys.readouterr()
    assert findings(path, "--seq-len", S) == []
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert audit.main([str(data)]) == 0
    printed = capsys.readouterr().out
    manifest = Blocks(data, "train").manifest["splits"]
    for split in ("train", "validation"):
        counts = manifest[split]
        assert f"({split}): {counts['blocks']:,} blocks, {counts['tokens']:,} tokens" in printed
        assert f"{counts['documents']:,} documents" in printed
    page = (tmp_path / "audit.html").read_text()
    assert "nothing wrong found" in page and page.count("<img src='data:image/png;base64,iVBOR") == 2
    shown = re.findall("<pre>(.*?)</pre>", page, re.S)
    assert len(shown) == 6
    documents = [words(seed % 7 * 20 + 11, seed) for seed in range(45)]
    for part in (part for text in shown for part in text.split("\n---\n")):
        assert any(part.strip() in document for document in documents)
    assert not re.search("src='http|href=", page)


def test_counts_are_those_of_the_documents(data):
    found = survey.survey(Blocks(data, "train"), survey.Findings(), lambda _: None)
    spm = tokenizer_lib.load(data / "tokenizer")
    lengths = [len(spm.encode(words(seed % 7 * 20 + 11, seed))) + 1 for seed in range(40)]
    assert found.n_documents() == 40 and found.tokens == sum(lengths)
    bins = np.bincount((np.log2(lengths) * survey.OCTAVE).astype(int), minlength=len(found.documents))
    np.testing.assert_array_equal(found.documents, bins)
    blocks = Blocks(data, "train")
    tokens, length = blocks.read(np.arange(len(blocks)))
    real = tokens[np.arange(S + 1) < length[:, None]]
    np.testing.assert_array_equal(found.counts_V, np.bincount(real, minlength=512))
    np.testing.assert_array_equal(found.lengths, np.bincount(length, minlength=S + 2))


# -- faults of what `prepare` wrote -------------------------------------------------------------------------------------


def test_ids_out_of_the_vocabulary(data, findings):
    def plant(tokens, _):
        tokens[5, 7], tokens[5, 8], tokens[11, 0] = 600, 512, 65_535

    file = rewrite(data, plant)
    assert findings(data) == [
        f"{data} (train): {file}, record 5: 2 ids out of the vocabulary of 512: 600",
        f"{data} (train): {file}, record 11: 1 ids out of the vocabulary of 512: 65535",
    ]


def test_duplicate_blocks_within_and_across(data, findings):
    file = rewrite(data, lambda tokens, _: tokens.__setitem__(slice(8, 10), tokens[3]), documents=0)
    (stolen,), _ = Blocks(data, "train").read([1])
    other = rewrite(data, lambda tokens, _: tokens.__setitem__(2, stolen), "validation")
    printed = [line for line in findings(data) if "has the same tokens" in line]
    assert printed == [
        f"{data} (train): {file}, record 8: has the same tokens as {file}, record 3",
        f"{data} (train): {file}, record 9: has the same tokens as {file}, record 3",
        f"{data} (validation): {other}, record 2: has the same tokens as {data} (train), {file}, record 1",
    ]
    assert [line for line in findings(data, "--allow=duplicate") if "has the same tokens" in line] == printed[2:]


def test_allowed_findings_are_warnings(data, capsys):
    def twice(tokens, length):
        tokens[2] = tokens[1]
        tokens[3, 4] = 600

    rewrite(data, twice)
    assert audit.main([str(data), "--allow=duplicate,filling"]) == 4  # for the id out of the vocabulary
    printed = capsys.readouterr().out.splitlines()
    (allowed,) = [line for line in printed if "has the same tokens as" in line]
    assert allowed.startswith("allowed: ") and "record 2:" in allowed
    wrong = [line for line in printed if line.startswith("wrong: ")]
    assert any("record 3: 1 ids out of the vocabulary" in line for line in wrong)
    n = f"{len(wrong)} finding{'s' * (len(wrong) > 1)}"
    assert printed[-1] == f"{n} (audit.html)"
    assert f"<h1>{n}</h1>" in Path("audit.html").read_text()


def test_many_findings_are_counted(data, findings):
    rewrite(data, lambda tokens, _: tokens.__setitem__(slice(0, 31), tokens[3]))
    printed = findings(data)
    assert sum("has the same tokens" in line for line in printed) == survey.MOST
    assert f"{data} (train): duplicate blocks: 20 more" in printed


@pytest.mark.parametrize(("id_", "name"), [(BOS, "bos"), (EOS, "eos"), (0, "0")])
def test_padding_that_is_trained_on_is_found(data, findings, id_, name):
    file = rewrite(data, lambda tokens, _: tokens[6].__setitem__(slice(12, None), id_))
    assert f"{data} (train): {file}, record 6: {name} ({id_}) after {name}, 4 times: padding?" in findings(data)


def test_a_padded_block_with_the_length_of_a_full_one(data, findings):
    last = Blocks(data, "train").files()[0][2] - 1
    (length,) = Blocks(data, "train").read([last])[1]
    assert length < S
    rewrite(data, lambda _, length: length.__setitem__(-1, S + 1))
    printed = findings(data)
    assert any(f"record {last}: 0 (0) after 0, {S - length} times: padding?" in line for line in printed)
    assert any("manifest.json: says " in line and " tokens; there are " in line for line in printed)


def test_missing_eos(data, findings):
    def plant(tokens, _):
        tokens[tokens == EOS] = 300

    rewrite(data, plant)
    (line,) = findings(data)
    assert re.fullmatch(rf"{data} \(train\): manifest.json: says 40 documents, each with eos \(2\); there are [1-3]?\d", line)


def test_bos_and_eos_that_should_not_be_there(data, findings):
    blocks = Blocks(data, "train")
    tokens, _ = blocks.read(np.arange(len(blocks)))
    row = int(np.flatnonzero((tokens == EOS).any(axis=1))[0])
    file, record = blocks.place(row)
    edit(data, lambda manifest: manifest.update(eos=False))
    printed = findings(data)
    line = f"{data} (train): {file.name}, record {record}: is the first of 40 eos (2); there should be none"
    assert line in printed and len(printed) == 2  # of validation too
    edit(data, lambda manifest: manifest.update(eos=True))
    file = rewrite(data, lambda tokens, _: tokens[4].__setitem__(0, BOS))
    assert f"{data} (train): {file}, record 4: is the first of 1 bos (1); there should be none" in findings(data)


def test_data_with_bos_as_in_the_manifest_are_clean(tmp_path, tiny_data, findings, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": words(30, seed)}) + "\n" for seed in range(5)))
    made = {"train": [tmp_path / "x.jsonl"], "tokenizer": tiny_data / "512.model", "seq_len": S, "workers": 1, "bos": True}
    for eos in (False, True):
        pipeline.prepare(**made, eos=eos, output=tmp_path / f"last{eos}")  # the last blocks are held out
        assert findings(tmp_path / f"last{eos}") == []
        pipeline.prepare(**made, eos=eos, held_out=0, output=tmp_path / f"data{eos}")
        assert findings(tmp_path / f"data{eos}") == []
        found = survey.survey(Blocks(tmp_path / f"data{eos}", "train"), survey.Findings(), lambda _: None)
        assert found.n_documents() == 5 and found.documents.sum() == 5 - (not eos)  # where the last one ends nothing says
    both = tmp_path / "dataTrue"
    edit(both, lambda manifest: manifest["splits"]["train"].update(documents=6))
    assert len(findings(both)) == 2
    # one token that does both: twice in a row between documents, and that is right
    rewrite(both, lambda tokens, _: np.putmask(tokens, tokens == BOS, EOS), documents=5)
    edit(both, lambda manifest: manifest["tokenizer"].update(bos_id=EOS))
    assert findings(both) == [] and survey.survey(Blocks(both, "train"), survey.Findings(), lambda _: None).n_documents() == 5


def test_damage_is_named_and_all_other_blocks_are_read(data, findings):
    file, first, last = Blocks(data, "train").files()[1]
    whole = file.read_bytes()
    at = len(whole.rstrip(b"\0")) // 4
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    printed = findings(data)
    assert printed[0] == f"{data} (train): {file.name}: is not the file that was written (sha256)"
    assert len(printed) == 2 and re.search(rf"{file}, record \d+: is damaged; copy or prepare", printed[1])
    file.write_bytes(bytes(len(whole)))
    printed = findings(data)
    assert (
        sum("is damaged" in line for line in printed) == survey.MOST
        and f"{data} (train): damage: {last - first - 10} more" in printed
    )


@pytest.mark.parametrize("content", [bytes, lambda n: b"\xff" * n], ids=["zeros", "ones"])
def test_a_split_whose_every_file_is_damaged(data, tmp_path, capsys, content):
    files = Blocks(data, "train").files()
    for file, _, _ in files:
        file.write_bytes(content(file.stat().st_size))
    n, held_out = len(Blocks(data, "train")), len(Blocks(data, "validation"))
    assert audit.main([str(data)]) == 4
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{data} (train): {n:,} blocks, 0 tokens (0.00% full), 0 documents")
    assert printed[1].startswith(f"{data} (validation): {held_out:,} blocks, ")
    assert sum("is not the file that was written (sha256)" in line for line in printed) == len(files)
    assert sum("is damaged; copy or prepare" in line for line in printed) == survey.MOST
    assert f"wrong: {data} (train): damage: {n - survey.MOST:,} more" in printed
    page = (tmp_path / "audit.html").read_text()
    assert f"{data} (train)" in page and page.count("<img") == 1  # there is nothing of it to draw


def test_findings_are_printed_even_if_a_run_could_not_read_the_data(data, config_file, findings):
    file = Blocks(data, "train").files()[0][0]
    file.write_bytes(file.read_bytes()[:-1])
    printed = findings("--config", config_file)
    assert printed[0].startswith(f"{data} (train): {file}: has ")


def test_an_unreadable_source_is_a_finding_and_the_other_is_audited(data, tiny_data, findings):
    (data / "tokenizer" / "tokenizer.model").write_bytes(b"damaged")
    tokens = Blocks(tiny_data / "one", "train").manifest["splits"]["train"]["tokens"]
    edit(
        other := Path(shutil.copytree(tiny_data / "one", data.parent / "one")), lambda m: m["splits"]["train"].update(tokens=99)
    )
    printed = findings(data, other)
    assert printed[:2] == [
        f"{data} ({s}): {data}/tokenizer/tokenizer.model: is not a SentencePiece model" for s in ("train", "validation")
    ]
    assert printed[2:] == [f"{other} (train): manifest.json: says 99 tokens; there are {tokens}"]


def test_findings_are_printed_even_if_the_page_cannot_be_written(data, capsys, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda _: b"")
    edit(data, lambda manifest: manifest["splits"]["train"].update(tokens=1))
    monkeypatch.setattr(report, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device", "audit.html")))
    with pytest.raises(OSError, match="No space left"):
        audit.main([str(data)])
    assert "wrong: " in capsys.readouterr().out


def test_a_wrong_checksum_is_found_even_if_the_blocks_are_valid(data, findings):
    manifest = (data / "manifest.json").read_bytes()
    size = Blocks(data, "train").files()[0][0].stat().st_size
    file = rewrite(data, lambda tokens, _: tokens.__setitem__((3, 3), tokens[3, 3] ^ 1))
    assert (data / file).stat().st_size == size
    (data / "manifest.json").write_bytes(manifest)
    assert findings(data) == [f"{data} (train): {file}: is not the file that was written (sha256)"]


def test_a_split_that_cannot_be_opened(data, findings):
    file = Blocks(data, "train").files()[0][0]
    file.write_bytes(file.read_bytes()[:-1])
    (line,) = findings(data)
    assert line.startswith(f"{data} (train): {file}: has ") and " bytes, and should have " in line
    (data / "manifest.json").write_text("{")
    (line,) = findings(data)
    assert line.startswith(f"{data}: {data}/manifest.json: is damaged")


def test_another_tokenizer(data, tiny_data, findings):
    shutil.copy(tiny_data / "400.model", data / "tokenizer" / "tokenizer.model")
    assert f"{data} (train): {data}/tokenizer: is not the manifest's tokenizer" in findings(data)


def test_a_vocabulary_size_that_differs_from_the_tokenizers(data, findings):
    edit(data, lambda manifest: manifest["tokenizer"].update(vocab_size=600))
    line = f"{data} (train): manifest.json: says 600 pieces; the tokenizer has 512"
    assert findings(data) == [line, line.replace("train", "validation")]


def test_counts_that_differ_from_the_manifest(data, findings):
    n = Blocks(data, "train").manifest["splits"]["train"]["tokens"]
    edit(data, lambda manifest: manifest["splits"]["train"].update(tokens=n + 1))
    assert findings(data) == [f"{data} (train): manifest.json: says {n + 1:,} tokens; there are {n:,}"]


# -- faults of the original's files ---------------------------------------------------------------------------------------


def test_filling_is_right_in_the_last_exported_file_only(data, findings, capsys):
    path = packed(data, 100 * (S + 1), "fill")
    n = Blocks(data, "train").manifest["splits"]["train"]["tokens"]
    filling = -n % (100 * (S + 1))
    assert filling > 2 * S
    capsys.readouterr()
    assert audit.main([path, "--seq-len", str(S)]) == 0
    assert f"{n:,} tokens" in (out := capsys.readouterr().out) and f"; {filling:,} tokens of filling left out" in out
    last = litpkds.files_of(path)[-1]
    record = n % (100 * (S + 1)) // (S + 1)
    last.rename(last.with_name("train_x_0000000000-first.bin"))  # as another process of the original's builder leaves it
    first = f"{path} (train): train_x_0000000000-first.bin, record {record}: is the first of {100 - record} blocks that end in"
    assert f"{first} repeated bos or eos, {filling:,} in all, which are not trained on" in findings(path, "--seq-len", S)
    assert audit.main([path, "--seq-len", str(S)]) == 4


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        ({70: BOS}, "record 4: is the first of 1 bos (1); there should be none"),
        ({70: BOS, 71: BOS}, "record 4: bos (1) after bos, 1 times: padding?"),
        ({5: 600}, "record 0: 1 ids out of the vocabulary of 512: 600"),
        ("no eos", "all files: have no eos (2), which should end each document"),
        ("twice", "record 1: has the same tokens as {file}, record 0"),
    ],
)
def test_faults_in_packed_files(data, findings, plant, words, capsys):
    path = packed(data)
    file = litpkds.files_of(path)[0]
    for one in litpkds.files_of(path) if plant == "no eos" else [file]:
        tokens = np.memmap(one, "<u2", "r+", 24)
        if plant == "no eos":
            tokens[tokens == EOS] = 300
        elif plant == "twice":
            tokens[S + 1 : 2 * (S + 1)] = tokens[: S + 1]
        else:
            tokens[list(plant)] = list(plant.values())
        tokens.flush()
    capsys.readouterr()
    where = "" if plant == "no eos" else f"{file.name}, "
    assert f"{path} (train): {where}{words.format(file=file.name)}" in findings(path, "--seq-len", S)


def test_a_packed_file_that_is_missing(data, findings, capsys):
    path = packed(data)
    files = litpkds.files_of(path)
    assert litpkds.Packed(path, "train", S).missing() == []
    files[1].unlink()
    capsys.readouterr()
    printed = f"{path} (train): {files[1].name} is missing from the numbered files; 1 are missing"
    assert printed in findings(path, "--seq-len", S)


def test_a_packed_file_that_is_a_pipe(data, findings):
    path = packed(data)
    (Path(path).parent / "train_x_0000000001.bin").unlink()
    os.mkfifo(Path(path).parent / "train_x_0000000001.bin")  # a writer would be waited for without end
    printed = findings(path, "--seq-len", S)
    assert printed == [f"{path} (train): {path}_0000000001.bin: is not a regular file"]


def test_packed_files_that_cannot_be_opened(data, findings, capsys):
    path = packed(data)
    file = litpkds.files_of(path)[1]
    file.write_bytes(file.read_bytes()[:-2])
    capsys.readouterr()
    (line,) = findings(path, "--seq-len", S)
    assert line.startswith(f"{path} (train): {file}: has ") and "its header says" in line


# -- what a run would read ------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(data, tiny_config_file) -> Path:
    """The config of a run that reads that data set one and a half times, and another one."""
    other = shutil.copytree(tiny_config_file.parent / "b", data.parent / "b")
    text = tiny_config_file.read_text().replace(str(tiny_config_file.parent / "a"), str(data)).replace("/b", "/b")
    text = text.replace(str(tiny_config_file.parent / "b"), str(other)).replace("seqs_per_device=8", "seqs_per_device=2")
    path = data.parent / "run.py"
    path.write_text(text)
    return path


def test_each_block_once_an_epoch_over_all_processes(data, config_file, findings, capsys):
    arguments = [str(data), "--config", str(config_file), "--train.steps", "900", "--processes", "4", "--data.skip=3:4"]
    assert findings(*arguments) == []
    audit.main(arguments)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("order: ")]
    assert printed[0] == "order: all 7,200 samples of the run, including those that data.skip=3:4 leaves out"
    n = len(Blocks(data, "train"))
    assert printed[1] == f"order: 5,040 from {data}, {5_040 / n:.2f} epochs" and n < 2_520
    config = cli.override(cli.read(str(config_file)), {"train.steps": "900"})
    sources = feed.open_sources(config)
    source, block = feed.order(config, sources).locate(np.arange(7_200))
    for p in range(4):
        mine = np.flatnonzero(np.arange(7_200) % 8 // 2 == p)
        first = ", ".join(f"{['data', 'b'][source[i]]} {block[i]:,}" for i in mine[:4])
        counts = np.bincount(source[mine])
        assert printed[3 + p] == f"order: process {p} of 4 reads {counts[0]:,} of data, {counts[1]:,} of b; first {first}"


def test_only_a_part_of_a_large_run_is_checked(data, config_file, findings, capsys, monkeypatch):
    monkeypatch.setattr(report, "SAMPLES", 1_000)
    assert findings("--config", config_file, "--data.sources", data, "--train.steps", 9_000) == []  # the value is no DIR
    audit.main([str(data), "--config", str(config_file), "--train.steps=9000"])
    assert "order: the first 1,000 of 72,000 samples of the run\n" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["ranks that overlap", "files left out", "blocks that are not there"])
def test_faults_in_the_order_are_found(data, config_file, findings, monkeypatch, fault):
    """The original's bugs, planted in the order that training uses."""
    right = feed.Order.locate
    n = len(Blocks(data, "train"))

    def wrong(self, samples):
        source, block = right(self, samples)
        if fault == "ranks that overlap":
            return source, np.where(block == 7, 8, block)
        return source, np.where(block == 7, n if fault == "blocks that are not there" else 9, block)

    monkeypatch.setattr(feed.Order, "locate", wrong)
    printed = findings(data, "--config", config_file, "--data.sources", data, "--train.steps", -(-n // 8))
    file = Blocks(data, "train").files()[0][0].name
    if fault == "blocks that are not there":
        assert f"{data} (train): epoch 1: block {n:,} is read, and there are only {n:,}" in printed
    else:
        twice = 8 if fault == "ranks that overlap" else 9
        assert f"{data} (train): {file}, record {twice}: is read more than once in epoch 1" in printed
    assert f"{data} (train): {file}, record 7: is not read in epoch 1" in printed


# -- a user's mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a data set: "),
        (["gone"], "gone: no such folder"),
        (["data", "--train.steps=5"], "--train.steps=5: is about a training run; give its --config too"),
        (["data", "--processes=2"], "--processes: is about a training run"),
        (["data", "--config=gone.py"], "--config=gone.py: no such file"),
        (["data", "--config=run.py", "--processes=3"], "do not divide into 3 devices"),
        (["data", "--config=run.py", "--processes=0"], "--processes 0: must be 1 to 1,048,576"),
        (["data", "--seq-len=0"], "--seq-len 0: must be 1 to 16,777,216"),
        (["data", "--seq-len=99999999999"], "--seq-len 99999999999: must be 1 to 16,777,216"),
        (["data", "--samples=20000000"], "--samples 20000000: must be 0 to 1,000"),
        (["data", "--page=gone/page.html"], "--page gone/page.html: is a folder, or its folder does not exist"),
        (["data", "--samples=-1"], "--samples -1: must be 0 to 1,000"),
        (["data", "--config=run.py", "--train.stepz=3"], "--train.stepz=3: no such key; did you mean --train.steps"),
        (["."], "has no manifest.json"),
        (["data", "--allow=duplicates"], "--allow duplicates: duplicates is none of duplicate, overlap, filling"),
        (["data", "--page=page.png"], "--page page.png: the page is HTML, and its name must end in .html"),
    ],
)
def test_wrong_options_are_errors(data, config_file, arguments, words):
    with pytest.raises(UserError, match=re.escape(words)):
        audit.main(arguments)


def test_a_book_counts_in_both_of_its_splits(tmp_path, tiny_data, capsys):
    (tmp_path / "book.txt").write_text(words(3_000, 1))
    made = {"tokenizer": tiny_data / "512.model", "seq_len": S, "workers": 1}
    pipeline.prepare(train=[tmp_path / "book.txt"], **made, output=tmp_path / "out")
    capsys.readouterr()
    report.audit([str(tmp_path / "out")], tmp_path / "audit.html", allow=report.ALLOWED)
    lines = [line for line in capsys.readouterr().out.splitlines() if "blocks, " in line]
    assert len(lines) == 2 and all(", 1 documents" in line for line in lines), lines
