"""Items of tasks in prepared data: planted ones are seen, however they are written, and no others."""

import itertools
import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's library

import numpy as np
import pytest
from test_generate import folders  # noqa: F401
from tiny import train_tokenizer
from tokenizers_for_tests import make

from tinyllama_jax import evaluate
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import feed
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.data.export import litpkds
from tinyllama_jax.data.prepare.pipeline import prepare
from tinyllama_jax.evals import contamination

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval and its libraries warn
some = lambda name, n: [f"{name}{i}" for i in range(n)]  # words that no other item has
long = lambda name: " ".join(some(name, 12))
TEXTS = {
    0: long("exact"),
    1: long("Written"),
    2: long("clean"),
    3: long("apart"),
    4: long("almost"),
    5: long("common"),
    6: "five words are too few",
    7: long("cut"),
    8: "!? --",  # no word
    9: long("common") + " " + long("rare"),
    10: " ".join(some("half", 8)),
    11: " ".join(some("ask", 6)),
}
LETTERS = "abcdefghijklmnopq"
FILLER = " ".join(some("filler", 40))
DOCUMENTS = [
    f"{FILLER} {TEXTS[0]} {FILLER}",
    f"{FILLER} (wriTTen0, WRITTEN1 -- 'written2'; wri-tten3\n\n\twritten4: “written5” written_6 written7! * written8 …) end",
    f"{FILLER} apart0 apart1 apart2 apart3 apart4 apart5",
    f"apart6 apart7 apart8 apart9 apart10 apart11 {FILLER}",
    f"{FILLER} {' '.join(some('almost', 8))} or not {' '.join(some('almost', 12)[8:])}",  # runs of 8 and of 4 words
    *[f"{long('common')} {i}" for i in range(11)],
    "no, Five words: are too FEW!",
    f"{FILLER} x{TEXTS[7]}x",  # its first and last words are longer
    f"{FILLER} {' '.join(some('rare', 12)[2:])}",
    f"{FILLER} Question: {' '.join(some('ask', 5))} - Answer: ask5",  # as PIQA's prompts are, with the right answer
    *[f"{letter}{TEXTS[10]}" for letter in LETTERS],  # some blocks begin inside the first word
    *[f"{TEXTS[10]}{letter}" for letter in LETTERS],  # and some end inside the last
]
DIRTY = {
    0: ("exact", 0, 9, 1),
    1: ("Written", 0, 9, 1),
    7: ("cut", 1, 9, 1),
    9: ("rare", 2, 9, 1),
}  # item: (name of its words, first and number of words of its n-gram, documents)


def planted(folder: Path, name: str, tokenizer: Path, documents: list[str]) -> Path:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    prepare(train=[folder / f"{name}.jsonl"], tokenizer=tokenizer, output=folder / name, seq_len=16, workers=1, held_out=0)
    return folder / name


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """The documents, in blocks of 16 tokens, by two kinds of tokenizer, and as LITPKDS; and a set with none of the items."""
    folder = tmp_path_factory.mktemp("sets")
    spm = train_tokenizer(folder / "own.model", DOCUMENTS, 330)
    (folder / "bpe").mkdir()
    make("byte-level BPE", folder / "bpe")
    named = {"spm": (spm, DOCUMENTS), "hf": (folder / "bpe", DOCUMENTS), "clean": (spm, [FILLER] * 3)}
    out = {name: planted(folder, name, *each) for name, each in named.items()}
    litpkds.export(out["spm"], "train", folder / "packed", "train_x", 301)
    return out | {"packed": folder / "packed" / "train_x"}


def scanned(paths: list[Path], items: contamination.Items) -> contamination.Scanned:
    return contamination.scan([feed.open_source(path, "train", 16) for path in paths], [items], lambda *_: None)


@pytest.mark.parametrize("kind", ["spm", "hf", "packed"])
def test_planted_items_are_seen_and_no_others(kind, sets):
    items = contamination.Items({**TEXTS, **{i: long(f"other{i}_") for i in range(100, 250)}})
    assert items.n == 12
    items = contamination.Items({**TEXTS, **{i: " ".join(some(f"other{i}", 9)) for i in range(100, 250)}})
    assert items.n == 9 and items.each.keys() > TEXTS.keys()  # the 5th percentile; an item without words is clean
    result = scanned([sets["clean"], sets[kind]], items)
    dirty, common = items.dirty(result.places)
    wanted = {i: " ".join(some(name.lower(), 20)[a : a + n]) for i, (name, a, n, _) in DIRTY.items()}
    assert {item: gram for item, (gram, _) in dirty.items()} == wanted | {6: TEXTS[6]}
    assert common == [5]  # 11 documents
    assert {item: place.documents for item, (_, place) in dirty.items()} == dict.fromkeys(dirty, 1)
    assert result.n_bytes == sum(len(text.encode()) for text in DOCUMENTS + [FILLER] * 3)
    blocks = feed.open_source(sets[kind], "train", 16)
    tokenizer = tokenizer_lib.load(blocks.tokenizer)
    rows = [row[:n].tolist() for row, n in zip(*blocks.read(np.arange(len(blocks))), strict=True)]
    after = lambda block: " ".join(contamination.words(tokenizer.decode([*itertools.chain(*rows[block:])])))
    for gram, place in dirty.values():
        assert place.source == 1  # the clean set comes first
        inside = gram.split(" ", 1)[1]  # the first word may begin before the block
        assert inside in after(place.block - 1) and gram not in after(place.block + 1)
    assert items.dirty(scanned([sets["clean"]], items).places) == ({}, [])


def test_what_is_read_at_a_time_changes_nothing(sets, monkeypatch):
    """Windows of one block, so each n-gram is cut by some; and two processes."""
    items = contamination.Items(TEXTS)
    whole = scanned([sets["spm"]], items)
    assert items.n == 8 and items.dirty(whole.places)[0].keys() == {0, 1, 4, 6, 7, 9}
    monkeypatch.setattr(contamination, "WINDOW", 17)
    monkeypatch.setattr(contamination, "OVERLAP", 17 * 8)
    parts = scanned([sets["spm"]], items)
    blocks, tokenizer = Blocks(sets["spm"], "train"), tokenizer_lib.load(sets["spm"] / "tokenizer")
    tokens, _ = blocks.read(np.arange(len(blocks)))
    decoded = lambda part: [tokenizer.decode(row.tolist()) for row in part]
    cuts = set(zip(decoded(tokens[:-1, -2:]), decoded(tokens[1:, :1]), strict=True))
    assert cuts & {(letter, "half") for letter in LETTERS} and cuts & {("half7", letter) for letter in LETTERS}
    first = lambda result: {gram: place.block for gram, place in result.places.items()}
    assert first(parts) == first(whole)
    monkeypatch.setattr(contamination, "ONE_PROCESS", 0)
    monkeypatch.setattr(contamination, "WINDOW", 17 * 40)  # processes read the constants of the file
    assert first(scanned([sets["spm"]], items)) == first(whole)


def test_evaluate_scores_clean_and_dirty_items(folders, sets, tmp_path, capsys):  # noqa: F811
    """With a model of another tokenizer than the data's."""
    pytest.importorskip("lm_eval", reason="of the extra dev")
    (tmp_path / "piqa").mkdir()
    rows = [
        {"goal": " ".join(text.split()[:-1]), "sol1": "no", "sol2": text.split()[-1], "label": 1} for text in TEXTS.values()
    ]
    (tmp_path / "piqa" / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["--checkpoint", str(folders["hf"]), "--tasks", "piqa", "--data", str(tmp_path)]
    line += ["--against", f"{sets['clean']}, {sets['spm']}", "--output", str(tmp_path / "out.json")]
    assert evaluate.main(line) == 0
    record, out = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    piqa = record["contamination"]["tasks"]["piqa"]
    assert [row["path"] for row in record["contamination"]["against"]] == [str(sets["clean"]), str(sets["spm"])]
    ids = [row["item"] for row in piqa["dirty_items"]]
    # a question begins with "Question: " and has "\nAnswer:" before the answer, which an item in the data has not
    assert piqa["n"] == 8 and {0, 1, 11} <= {*ids} and 2 not in ids and piqa["dirty"] == len(ids)
    assert piqa["items"] == 12 and piqa["share"] == len(ids) / 12
    row = piqa["dirty_items"][0]
    assert row["ngram"] == " ".join(some("exact", 8)) and row["source"] == str(sets["spm"]) and row["documents"] == 1
    assert (sets["spm"] / row["file"]).is_file() and row["block"] == row["record"]
    for metric, score in record["tasks"]["piqa"]["metrics"].items():
        groups = piqa["scores"][metric]
        assert groups["all"] == score
        weighted = groups["clean"]["value"] * (12 - len(ids)) + groups["dirty"]["value"] * len(ids)
        assert weighted == pytest.approx(12 * score["value"])
        assert f"piqa: {metric} {score['value']:.4f} on all items, {groups['clean']['value']:.4f} on clean items, " in out
    assert f"piqa: n-grams of 8 words of {len(ids)} of 12 items ({len(ids) / 12:.1%}) stand there" in out and " MB/s" in out


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--tasks", "piqa", "--against", "nowhere"], "nowhere: no such folder; `python -m tinyllama_jax.prepare` makes it"),
        (["--tasks", "piqa", "--against", "{hf}"], "/hf.*: has no manifest.json; it was not made by"),
        (["--tasks", "piqa", "--against", "x,"], "--against is empty; give a path"),
        (["--tasks", "piqa", "--against", ""], "--against is empty; give a path"),
        (["--tasks", "piqa", "--against", "s3://a/b"], "--against=s3://a/b: is a URL"),
        (["--passkey", "1", "--against", "x"], "--against x: looks for the items of tasks; name them with --tasks"),
    ],
)
def test_wrong_sets_are_named(folders, more, error):  # noqa: F811
    with pytest.raises(UserError, match=error):
        evaluate.main(["--checkpoint", str(folders["hf"]), *(word.format(hf=folders["hf"]) for word in more)])


def test_damaged_data_are_named(sets, tmp_path, monkeypatch):
    """Also from another process."""
    shutil.copytree(sets["spm"], tmp_path / "spm")
    ((file, _, _),) = Blocks(tmp_path / "spm", "train").files()
    content = bytearray(file.read_bytes())
    content[2_000:2_100] = bytes(100)
    file.write_bytes(content)
    for size in (contamination.ONE_PROCESS, 0):
        monkeypatch.setattr(contamination, "ONE_PROCESS", size)
        monkeypatch.setattr(contamination, "WINDOW", 17 * 40)
        with pytest.raises(UserError, match="is damaged; copy or prepare the data again"):
            scanned([tmp_path / "spm"], contamination.Items(TEXTS))
