"""The exported tokenizer gives SentencePiece's ids, on real and on hand-made text."""

import inspect
import io
import itertools
import json
import random
import re
import struct
import textwrap
from pathlib import Path

import pytest
import sentencepiece

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import tokenizer
from tinyllama_jax.data.export import tokenizer as exporter

transformers = pytest.importorskip("transformers", reason="the independent reader of what is exported")

LLAMA2 = Path(__file__).parents[3] / "shared/data/llama2_tokenizer.model"
SPECIAL = ["<unk>", "<s>", "</s>"]
# what the demo trains, and each flag the other way
KINDS = {
    "demo": {"add_dummy_prefix": False, "allow_whitespace_only_pieces": True},
    "prefix": {"add_dummy_prefix": True},
    "prefix, runs of spaces": {"add_dummy_prefix": True, "allow_whitespace_only_pieces": True},
    "collapsing": {"add_dummy_prefix": True, "remove_extra_whitespaces": True},
    "collapsing, no prefix": {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    "no bytes": {"add_dummy_prefix": True, "byte_fallback": False},
}


def train(path: Path, **options) -> Path:
    """A small SentencePiece model, trained as the demo's is but for `options`, on sources of the standard library."""
    documents = [inspect.getsource(module) for module in (inspect, textwrap, json.decoder, random)]
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "vocab_size": 1_000,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "max_sentence_length": 1_000_000,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_writer=model, minloglevel=2, num_threads=1, **{**defaults, **options}
    )
    path.write_bytes(model.getvalue())
    return path


def corpus() -> list[str]:
    """1,500 strings and more: code, prose, many scripts, every kind of odd whitespace, what looks like a token but is none."""
    strings = ["", "▁", "▁▁ ▁", "Hello world", " Hello", "Hello ", "  two  spaces  ", "\t\ttabs\t", "\r\n\r\n", "a\0b", "\0"]
    strings += ["<0x0A>", "<0xFF>", "x<s>y", "</s>", "<s></s>", "a</s> b", " <unk>", "<s", "/s>", "▁</s>", "<pad>"]
    strings += [
        "zero\u200bwidth\u200d\ufeff",
        "\u202eabc\u202c",
        "שלום עולם",
        "مرحبا بالعالم",
        "नमस्ते दुनिया",
        "你好，世界。",
        "ｆｕｌｌ　ｗｉｄｔｈ",
    ]
    strings += [
        "👩‍👩‍👧‍👦 family",
        "🇨🇭🇫🇷",
        "👍🏽",
        "e\u0301 é \u212b Å ﬁ",
        "a\u0300\u0301\u0302\u0303",
        "\U0010fffd\ue000\x7f\x01\x1b[0m",
        "𝔘𝔫𝔦",
        "ꙮ",
    ]
    strings += ["3.14159265358979 1,000,000 0x7fffffff 1e-5", "https://example.org/a?b=c&d=%20#e", "x" * 400, "word " * 120]
    strings += [character * n for character in " -=*#._/a0\n\t▁" for n in range(1, 40)]
    strings += [" " * before + "x" + " " * after for before, after in itertools.product(range(9), range(9))]
    strings += inspect.getsource(textwrap).split("\n")
    strings += inspect.getsource(inspect).split("\n")[200:500]
    strings += [inspect.getsource(textwrap), inspect.cleandoc(inspect.__doc__)]
    rng = random.Random(0)
    planes = [
        (0x20, 0x7E),
        (0xA0, 0x24F),
        (0x370, 0x6FF),
        (0x900, 0xDFF),
        (0x2000, 0x2BFF),
        (0x3040, 0x9FFF),
        (0x1F300, 0x1FAFF),
    ]
    strings += ["".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(1, 30))) for _ in range(300)]
    parts = [
        "the",
        " ",
        "  ",
        "\n",
        "\t",
        "▁",
        "def f(x):",
        "aa",
        "aaa",
        "==",
        "é",
        "你",
        "👩‍👩‍👧",
        "\u00a0",
        "\u3000",
        "12",
        *SPECIAL,
    ]
    strings += ["".join(rng.choices(parts, k=rng.randint(2, 14))) for _ in range(400)]
    assert len(strings) >= 1_500
    return strings


CORPUS = corpus()


@pytest.fixture(scope="module", params=[*KINDS, "llama2"])
def exported(request, tmp_path_factory):
    """(SentencePiece, folder, name of the kind) for each kind of tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "llama2":
        if not LLAMA2.is_file():
            pytest.skip("the Llama 2 tokenizer is not at ../shared/data")
        model = LLAMA2
    else:
        model = train(folder / "trained.model", **KINDS[request.param])
    out = folder / "out"
    out.mkdir()
    exporter.write(model, out, add_bos=False, seq_len=2_048)
    return sentencepiece.SentencePieceProcessor(model_file=str(model)), out, request.param


def test_ids_equal_sentencepiece_on_every_string(exported):
    ours, folder, _ = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    different = [text for text in CORPUS if tokenizer(text)["input_ids"] != ours.encode(text)]
    assert different == []


def test_special_tokens_in_a_text_are_special_and_nothing_else_differs(exported):
    ours, folder, _ = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is transformers.PreTrainedTokenizerFast
    special = {token: ours.piece_to_id(token) for token in SPECIAL}

    def expected(text: str) -> list[int]:
        parts = re.split(f"({'|'.join(SPECIAL)})", text)
        return [i for part in parts for i in ([special[part]] if part in special else ours.encode(part))]

    assert sum(any(token in text for token in SPECIAL) for text in CORPUS) > 100
    different = [text for text in CORPUS if tokenizer(text)["input_ids"] != expected(text)]
    assert different == []


def test_decoding_equals_sentencepiece(exported):
    ours, folder, kind = exported
    if kind == "no bytes":
        pytest.skip("an unknown character decodes to ' ⁇ ' in SentencePiece and to '<unk>' in Transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # with remove_extra_whitespaces SentencePiece drops more than one leading ▁ of a text that begins with a written ▁
    texts = [text for text in CORPUS if not ("collapsing" in kind and text.lstrip(" ").startswith("▁"))]
    different = [text for text in texts if tokenizer.decode(ours.encode(text)) != ours.decode(ours.encode(text))]
    assert different == []
    if kind == "demo":  # lossless, but for a written ▁, which SentencePiece cannot tell from a space
        assert all(tokenizer.decode(ours.encode(text)) == text for text in CORPUS if "▁" not in text)


@pytest.mark.parametrize("kind", ["prefix", "demo"])
def test_texts_begin_with_bos_if_those_of_the_data_did(tmp_path, kind):
    exporter.write(train(tmp_path / "a.model", **KINDS[kind]), tmp_path, add_bos=True, seq_len=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model"))
    assert tokenizer("def f(x):")["input_ids"] == [1, *ours.encode("def f(x):")]
    assert tokenizer("def f(x):", add_special_tokens=False)["input_ids"] == ours.encode("def f(x):")
    raw = json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"]  # Transformers 4 reads it from here
    assert raw["single"][0] == {"SpecialToken": {"id": "<s>", "type_id": 0}}


def test_special_ids_and_length_are_exported(exported):
    _, folder, _ = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 2_048 and tokenizer.pad_token is None
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
    assert tokenizer.decode([1, *tokenizer("ab")["input_ids"], 2], skip_special_tokens=True) == "ab"


def test_reads_what_sentencepiece_reads(exported):
    ours, folder, kind = exported
    model = exporter.read(folder / "tokenizer.model")
    assert [piece.text for piece in model.pieces] == [ours.id_to_piece(i) for i in range(len(ours))]
    assert [piece.score for piece in model.pieces] == [ours.get_score(i) for i in range(len(ours))]
    assert [piece.kind == exporter.BYTE for piece in model.pieces] == [ours.is_byte(i) for i in range(len(ours))]
    assert model.add_dummy_prefix is (KINDS.get(kind, {"add_dummy_prefix": True})["add_dummy_prefix"])
    assert model.remove_extra_whitespaces is ("collapsing" in kind) and model.byte_fallback is (kind != "no bytes")
    assert (model.unk_id, model.bos_id, model.eos_id, model.pad_id) == (0, 1, 2, -1)


def test_merges_by_score_then_longest_left_part():
    letters = [exporter.Piece(c, -9, exporter.NORMAL) for c in "ab"]
    made = [exporter.Piece(text, score, exporter.NORMAL) for text, score in (("aab", -3), ("ab", -2), ("aa", -1))]
    other = [exporter.Piece("bb", -1, exporter.CONTROL)]
    assert exporter.merges(letters + made + other) == [("a", "a"), ("a", "b"), ("aa", "b"), ("a", "ab")]


# what SentencePiece makes unless it is told otherwise, and other kinds that are no list of merges alone
OTHERS = {
    "defaults": {},
    "unigram, bytes": {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "BPE, nmt_nfkc": {"model_type": "bpe"},
    "BPE, nmt_nfkc, all spaces": {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False},
    "nfkc_cf": {"normalization_rule_name": "nfkc_cf", "byte_fallback": True},
    "symbols": {"user_defined_symbols": ["<|x|>", "<|xy|>"], "control_symbols": ["<ctl>", "[PAD]"]},
    "BPE, symbols": {"model_type": "bpe", "user_defined_symbols": ["<|x|>", "<|xy|>"], "byte_fallback": True},
    "BPE, symbols of spaces": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "user_defined_symbols": ["  \n", "e e"],
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "control": {"model_type": "bpe", "normalization_rule_name": "identity", "control_symbols": ["<ctl>", "[PAD]"]},
}
OTHER_OPTIONS = {
    "model_type": "unigram",
    "byte_fallback": False,
    "split_digits": False,
    "normalization_rule_name": "nmt_nfkc",
    "remove_extra_whitespaces": True,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_have_sentencepiece_s_ids_too(tmp_path, kind):
    tokenizers = pytest.importorskip("tokenizers", reason="the reader of what is exported")
    path = train(tmp_path / "a.model", **{**OTHER_OPTIONS, "vocab_size": 700, **OTHERS[kind]})
    ours = sentencepiece.SentencePieceProcessor(model_file=str(path))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(exporter.tokenizer_json(exporter.read(path), add_bos=False)))
    theirs.encode_special_tokens = True
    rng = random.Random(1)
    atoms = ["the", "def ", "<|x|>", "<|xy|>", "<ctl>", "<unk>", "[PAD]", " ", "  ", "\n", "  \n", "e e", "\t", "\r\n", "é"]
    atoms += [
        "e\u0301",
        "ñ",
        "ﬁ",
        "①",
        "ａ",
        "你好",
        "。",
        "😀",
        "👩‍👩‍👧",
        "12",
        "x=1",
        "\u00a0",
        "\u3000",
        "▁",
        "\0",
        "\x01",
        "\x7f",
        "か",
    ]
    texts = ["", "\x01", *exporter.TEXTS, *inspect.getsource(textwrap).split("\n")]
    texts += ["".join(rng.choices(atoms, k=rng.randint(1, 12))) for _ in range(1_500)]
    # two ways to cut a long run score the same in unigram, and a part between two symbols may be what a special token is called
    texts = [text for text in texts if "----" not in text and not ("<unk>" in text and "BPE, symbols" in kind)]
    encoded = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
    assert [text for text, ids in zip(texts, encoded, strict=True) if ids != ours.encode(text)] == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model_type": "word", "hard_vocab_limit": False}, "is a word model"),
        ({"model_type": "char", "hard_vocab_limit": False}, "is a character model"),
        ({"normalization_rule_name": "nmt_nfkc", "user_defined_symbols": ["ＡＢ"]}, "that its normalisation changes, 'ＡＢ'"),
        ({"normalization_rule_name": "nmt_nfkc_cf", "user_defined_symbols": ["<A>"]}, "that its normalisation changes, '<A>'"),
        ({"treat_whitespace_as_suffix": True}, "puts the space after a word"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path, options, says):
    path = train(tmp_path / "a.model", **options)
    with pytest.raises(UserError, match=re.escape(says)):
        exporter.read(path)


def test_equal_scores_are_refused_unless_they_are_runs_of_spaces(tmp_path):
    def with_scores(*pieces: tuple[str, float]) -> Path:
        message = b"".join(
            b"\n" + bytes([len(text.encode()) + 7, 10, len(text.encode())]) + text.encode() + b"\x15" + struct.pack("<f", score)
            for text, score in pieces
        )
        (tmp_path / "a.model").write_bytes(message + b"\x12\x02\x18\x02")  # trainer_spec { model_type: BPE }
        return tmp_path / "a.model"

    assert len(exporter.read(with_scores(("▁▁", -5), ("▁▁▁", -5), ("▁", -5))).pieces) == 3
    for pieces in ([("▁▁", -5), ("▁▁▁▁", -5)], [("ab", -5), ("bc", -5)]):
        with pytest.raises(UserError, match="pieces of equal score"):
            exporter.read(with_scores(*pieces))


@pytest.mark.parametrize("content", [b"", b"hello, this is no model", bytes(100), None, "cut"])
def test_a_file_that_is_not_a_model_gives_one_clear_line(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    if content in (None, "cut"):
        train(path)
        path.write_bytes(path.read_bytes()[: -1 if content else 5_000])
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model: is not a SentencePiece model"):
        exporter.read(path)


def test_bos_without_a_bos_piece_is_refused(tmp_path):
    model = tokenizer.load(train(tmp_path / "a.model", bos_id=-1))
    with pytest.raises(UserError, match="has no bos, but in the training data each document begins with bos"):
        exporter.export(model, tmp_path, add_bos=True, seq_len=8)
