"""The same ids as the libraries give, whole or in parts; what is not a tokenizer is refused in one line."""

import inspect
import json
import pickle
import random
import sys

import pytest
import sentencepiece

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import tokenizer
from tinyllama_jax.data.export import tokenizer as export_tokenizer


def reference(path):
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_ids_equal_sentencepieces(any_model, odd):
    _, path = any_model
    ours, theirs = tokenizer.load(path), reference(path)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (theirs.vocab_size(), theirs.bos_id(), theirs.eos_id())
    strings = ["", *odd, inspect.getsource(inspect)[:5_000]]
    assert ours.encode_batch(strings) == [ours.encode(s) for s in strings] == [theirs.encode(s) for s in strings]
    assert [ours.decode(ours.encode(s)) for s in strings] == [theirs.decode(theirs.encode(s)) for s in strings]


def test_the_demos_tokenizer_loses_nothing(model, odd):
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


@pytest.mark.parametrize("text", ["<0x41>", "<s>", "<unk>"])
def test_a_model_with_a_piece_that_is_not_utf_8(model, tmp_path, text):
    """As a flipped bit makes it: the library loads it, and raises UnicodeDecodeError when the piece is asked for."""
    content, at = model.read_bytes(), model.read_bytes().index(text.encode())
    (tmp_path / "a.model").write_bytes(content[:at] + bytes([content[at] | 0x80]) + content[at + 1 :])
    with pytest.raises(UserError, match=r"a\.model: is not a SentencePiece model"):
        tokenizer.load(tmp_path / "a.model")


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
def test_files_that_are_not_tokenizers(tmp_path, name, content, says):
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


def test_hugging_face_folder_with_bpe_dropout(hugging_face):
    content = json.loads((hugging_face / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.1
    (hugging_face / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="tokenizer.json: has a dropout of 0.1, .* set it to null"):
        tokenizer.load(hugging_face)


def test_hugging_face_folder_that_names_no_bos(hugging_face):
    (hugging_face / "tokenizer_config.json").write_text('{"bos_token": null}')
    (hugging_face / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    ours = tokenizer.load(hugging_face)
    assert (ours.bos_id, ours.eos_id) == (-1, 1)


def test_a_folder_with_both_files_is_read_as_transformers_reads_it(hugging_face, model, models, tmp_path):
    (hugging_face / "tokenizer.model").write_bytes(model.read_bytes())  # of another tokenizer
    assert tokenizer.load(hugging_face).encode("a far b") == tokenizer.load(hugging_face / "tokenizer.json").encode("a far b")
    export_tokenizer.export(tokenizer.load(model), tmp_path / "same", add_bos=False, seq_len=64)
    assert (tmp_path / "same/tokenizer.json").is_file()
    assert tokenizer.load(tmp_path / "same").sha256 == tokenizer.load(model).sha256  # the other files add nothing


CHAT = {"[PAD]": 700, "<|im_start|>": 701, "<|im_end|>": 702}


@pytest.fixture
def chat(models, tmp_path):
    """`chat(tokenizer.json?)`: a folder like TinyLlama-Chat v0.3's, which adds three tokens, one of them eos."""
    pytest.importorskip("tokenizers")

    def make(whole: bool):
        folder = tmp_path / f"chat {whole}"
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(models("prefix").read_bytes())
        (folder / "added_tokens.json").write_text(json.dumps(CHAT))
        named = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "[PAD]", "unk_token": "<unk>"}
        (folder / "special_tokens_map.json").write_text(json.dumps(named))
        config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        if whole:
            content = export_tokenizer.tokenizer_json(export_tokenizer.read(models("prefix")), add_bos=True)
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            content["added_tokens"] += [{"id": id_, "content": token, **flags} for token, id_ in CHAT.items()]
            (folder / "tokenizer.json").write_text(json.dumps(content))
        return folder

    return make


def test_tokens_that_files_add_to_a_sentencepiece_model(chat, models, tmp_path, odd):
    folder = chat(True)
    ours = tokenizer.load(folder)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (703, 1, 702)  # as special_tokens_map.json says
    assert ours.encode_batch(odd) == reference(models("prefix")).encode(odd)
    assert ours.decode([*ours.encode("Hello"), 702]) == "Hello" and "⁇" not in ours.decode([701])
    ours.save(tmp_path / "copy")
    assert (tmp_path / "copy/chat_template.jinja").read_text() == "{{ messages }}"
    for other in (tokenizer.load(tmp_path / "copy"), pickle.loads(pickle.dumps(ours))):
        assert (other.sha256, other.eos_id, other.encode_batch(odd)) == (ours.sha256, 702, ours.encode_batch(odd))
    transformers = pytest.importorskip("transformers", reason="the reader to agree with")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert (loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (1, 702, 703)


def test_a_sentencepiece_model_that_other_files_change_needs_a_tokenizer_json(chat):
    folder = chat(False)
    for says in (
        r"eos_token is '<\|im_end\|>', and tokenizer.model has another eos_token; add the tokenizer.json",
        r"added_tokens.json gives '\[PAD\]' the id 700, and tokenizer.model does not have it; add the tokenizer.json",
    ):
        with pytest.raises(UserError, match=says):
            tokenizer.load(folder)
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "added_tokens.json").unlink()
    assert tokenizer.load(folder).vocab_size == 700


def test_every_file_of_a_folder_is_read(chat, models):
    folder = chat(True)
    first = tokenizer.load(folder).sha256
    assert first != tokenizer.load(models("prefix")).sha256
    (folder / "chat_template.jinja").unlink()
    assert tokenizer.load(folder).sha256 == first  # no id depends on it
    (folder / "special_tokens_map.json").write_text("{}")
    other = tokenizer.load(folder)
    assert (other.eos_id, other.sha256 == first) == (2, False)  # now tokenizer_config.json has the word


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("added_tokens.json", {"[PAD]": 701}, "gives '[PAD]' the id 701, and tokenizer.json gives it the id 700; keep"),
        (
            "added_tokens.json",
            {"<new>": 5},
            "added_tokens.json gives '<new>' the id 5, and tokenizer.json does not have it; keep",
        ),
        ("special_tokens_map.json", {"eos_token": "<|end|>"}, "eos_token is '<|end|>', which tokenizer.json does not have"),
        ("tokenizer_config.json", {"eos_token": 7}, "tokenizer_config.json: is damaged .*eos_token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "tokenizer_config.json: is damaged"),
        ("added_tokens.json", [], "added_tokens.json: is damaged"),
        ("tokenizer.json", {"model": {"vocab": 3}}, "tokenizer.json: is damaged .*vocab"),
        ("tokenizer.json", {"model": {"vocab": {}}, "post_processor": {"type": "Sequence", "processors": 3}}, "is damaged"),
    ],
)
def test_files_of_a_folder_that_disagree(chat, file, content, says):
    folder = chat(True)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=says.replace("[PAD]", r"\[PAD\]")) as error:
        tokenizer.load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("config", "processor", "begins"),
    [
        ({"add_bos_token": True}, None, False),  # where there is a tokenizer.json Transformers 5 does as that says
        ({"add_bos_token": False}, "<s>", True),
        ({"add_bos_token": True}, "</s>", False),
        ({"add_bos_token": True}, "absent", True),
        ({"tokenizer_class": "LlamaTokenizer"}, "absent", True),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "absent", False),
        ({}, "absent", False),
    ],
)
def test_whether_texts_begin_with_bos(models, tmp_path, config, processor, begins):
    (tmp_path / "tokenizer.model").write_bytes(models("prefix").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", **config}))
    if processor != "absent":
        content = export_tokenizer.tokenizer_json(export_tokenizer.read(models("prefix")), add_bos=processor == "<s>")
        if processor == "</s>":
            content["post_processor"] = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["</s>", 2]}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer.documents_begin_with_bos(tmp_path) is begins
    (tmp_path / "data.json").write_text(json.dumps([{"bos": False}, {"bos": not begins}]))  # a run's data has the first word
    assert tokenizer.documents_begin_with_bos(tmp_path) is not begins


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
