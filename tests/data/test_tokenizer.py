"""The same ids as the libraries give, whole or in parts; what is not a tokenizer is refused in one line."""

import inspect
import json
import pickle
import random
import sys

import pytest
import sentencepiece

from tinyllama_jax.data import tokenizer
from tinyllama_jax.errors import UserError


def reference(path):
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_ids_are_sentencepiece_s(any_model, odd):
    _, path = any_model
    ours, theirs = tokenizer.load(path), reference(path)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (theirs.vocab_size(), theirs.bos_id(), theirs.eos_id())
    strings = ["", *odd, inspect.getsource(inspect)[:5_000]]
    assert ours.encode_batch(strings) == [ours.encode(s) for s in strings] == [theirs.encode(s) for s in strings]
    assert [ours.decode(ours.encode(s)) for s in strings] == [theirs.decode(theirs.encode(s)) for s in strings]


def test_the_demo_s_kind_loses_nothing(model, odd):
    ours = tokenizer.load(model)
    for text in odd:  # but for U+2581, which is SentencePiece's own sign for a space
        assert ours.decode(ours.encode(text)) == text.replace("▁", " ")


def test_control_tokens_in_a_text_are_text(any_model):
    ours = tokenizer.load(any_model[1])
    assert not {ours.bos_id, ours.eos_id} & set(ours.encode("<s> a</s>b </s>"))


# -- parts --------------------------------------------------------------------------------------------------------------

# where merges stop at spaces, and a text can be cut there
CUT = {"demo", "prefix", "collapsing", "nfkc", "no bytes", "llama2"}


def adversarial(rng: random.Random) -> str:
    """Words, all kinds of space and marks that normalisation joins, at random."""
    atoms = [
        "the",
        "Wort",
        "x=1",
        "ﬁ",
        "e",
        "\u0301",
        "▁",
        "▁▁",
        "\u00a0",
        "\u3000",
        "\t",
        "\n",
        "é",
        "👩‍👩‍👧",
        "0123",
        "</s>",
        "<|x|>",
        "e e",
    ]
    return "".join(rng.choice(atoms) + rng.choice(["", " ", " ", " ", "  ", "   "]) for _ in range(2_000))


def test_parts_have_the_ids_of_the_whole(any_model, monkeypatch):
    kind, path = any_model
    monkeypatch.setattr(tokenizer, "PART", 100)  # many cuts
    ours, theirs, rng = tokenizer.load(path), reference(path), random.Random(1)
    cuts = 0
    for text in [inspect.getsource(inspect), "a b " * 500, " " * 1_000 + "x " * 300, *(adversarial(rng) for _ in range(30))]:
        parts = list(ours.parts([text]))
        assert all(parts)
        assert [i for ids in ours.encode_batch(parts) for i in ids] == theirs.encode(text)
        cuts += len(parts) - 1
    assert (cuts > 1_000) == (kind in CUT), cuts


def test_parts_do_not_depend_on_how_the_text_arrives_and_are_small(model):
    ours, text = tokenizer.load(model), inspect.getsource(inspect) * 20
    whole = list(ours.parts([text]))
    assert max(map(len, whole)) < 2 * tokenizer.PART
    for size in (777, 100_000):
        arriving = list(ours.parts(text[i : i + size] for i in range(0, len(text), size)))
        assert "".join(arriving) == "".join(whole) == text
        assert max(map(len, arriving)) < 3 * tokenizer.PART


def test_a_short_text_is_one_part_and_an_empty_one_is_none(model):
    ours = tokenizer.load(model)
    assert list(ours.parts(["a b"])) == list(ours.parts(["", "a", " b", ""])) == ["a b"]
    assert list(ours.parts([])) == list(ours.parts(["", ""])) == []


# -- files --------------------------------------------------------------------------------------------------------------


def test_file_folder_copy_and_pickle_are_the_same_tokenizer(model, tmp_path, odd):
    ours = tokenizer.load(model)
    ours.save(tmp_path / "new" / "copy")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["copy"]  # nothing else is left behind
    for other in (tokenizer.load(tmp_path / "new" / "copy"), pickle.loads(pickle.dumps(ours))):
        assert other.sha256 == ours.sha256
        assert (other.vocab_size, other.bos_id, other.eos_id) == (ours.vocab_size, ours.bos_id, ours.eos_id)
        assert other.encode_batch(odd) == ours.encode_batch(odd)
    with pytest.raises(UserError, match="copy: exists already"):
        ours.save(tmp_path / "new" / "copy")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone.model", None, "no such tokenizer"),
        ("empty.model", b"", "is not a SentencePiece model"),
        ("text.model", b"version https://git-lfs.github.com/spec/v1\n", "is not a SentencePiece model"),
        ("tokenizer.json", b'{"model": 1}', "is not a Hugging Face tokenizer"),
        ("folder/readme.txt", b"", "holds neither tokenizer.model"),
    ],
)
def test_what_is_not_a_tokenizer(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    if name == "tokenizer.json":
        pytest.importorskip("tokenizers")
    with pytest.raises(UserError, match=says) as error:
        tokenizer.load(path.parent if "/" in name else path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# -- Hugging Face -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hugging_face(tmp_path):
    """A folder with a byte-level BPE tokenizer that adds bos and truncates unless it is told not to."""
    tokenizers = pytest.importorskip("tokenizers")
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    hf.train_from_iterator([inspect.getsource(inspect)], trainer)
    hf.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    hf.enable_truncation(8)
    hf.add_tokens(["far"])
    folder = tmp_path / "hf"
    folder.mkdir()
    hf.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_hugging_face_folder(hugging_face, tmp_path, odd):
    ours = tokenizer.load(hugging_face)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (0, 1, 401)
    strings = ["", *odd, inspect.getsource(inspect)[:2_000]]
    ids = ours.encode_batch(strings)
    assert ids[0] == [] and not {0, 1} & {i for text in ids for i in text} and max(map(len, ids)) > 8
    assert [ours.decode(i) for i in ids] == strings
    assert ours.decode([0, *ids[-1], 1]) == strings[-1]
    with pytest.raises(IndexError):
        ours.decode([401])
    assert list(ours.parts(["a ", "b"])) == ["a b"]
    ours.save(tmp_path / "copy")
    for other in (tokenizer.load(tmp_path / "copy"), pickle.loads(pickle.dumps(ours))):
        assert (other.sha256, other.bos_id, other.eos_id, other.encode_batch(strings)) == (ours.sha256, 0, 1, ids)


def test_hugging_face_folder_that_names_no_bos(hugging_face):
    (hugging_face / "tokenizer_config.json").write_text('{"bos_token": null}')
    (hugging_face / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    ours = tokenizer.load(hugging_face)
    assert (ours.bos_id, ours.eos_id) == (-1, 1)


def test_of_a_folder_with_both_transformers_choice_is_read(hugging_face, model, models, tmp_path):
    (hugging_face / "tokenizer.model").write_bytes(model.read_bytes())  # of another tokenizer
    assert tokenizer.load(hugging_face).encode("a far b") == tokenizer.load(hugging_face / "tokenizer.json").encode("a far b")
    tokenizer.load(model).export(tmp_path / "same", add_bos=False, seq_len=64)
    assert (tmp_path / "same/tokenizer.json").is_file()
    assert tokenizer.load(tmp_path / "same").sha256 == tokenizer.load(model).sha256  # the other files add nothing


def test_without_the_tokenizers_package(hugging_face, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # what an import finds where it is not installed
    with pytest.raises(UserError, match="pip install tokenizers"):
        tokenizer.load(hugging_face)


def test_a_text_without_a_space_is_cut(any_model, monkeypatch):
    monkeypatch.setattr(tokenizer, "LONGEST", 5_000)
    ours = tokenizer.load(any_model[1])
    for text in ("字" * 20_000, "line\n" * 4_000, "x" * 20_000 + " y", "word " * 200 + "z" * 9_000 + " " * 9_000):
        parts = list(ours.parts([text]))
        assert max(map(len, parts)) <= 5_000 + tokenizer.WINDOW and len(parts) > 2
        skipped = len(text) - sum(map(len, parts))
        assert skipped == 0 or (skipped < len(parts) and "".join(parts).replace(" ", "") == text.replace(" ", ""))
        again = list(ours.parts(text[i : i + 777] for i in range(0, len(text), 777)))
        ids, ids_again = ([i for ids in ours.encode_batch(each) for i in ids] for each in (parts, again))
        assert ids == ids_again
