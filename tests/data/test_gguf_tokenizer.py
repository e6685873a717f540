"""Tokenizers to GGUF and back: the ids are those of llama.cpp."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
from generated import texts as make_texts
from test_export_tokenizer import KINDS, LLAMA2, corpus, train
from test_hf import GQA, random_params

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import chat, tokenizer
from tinyllama_jax.data.export import gguf_tokenizer
from tinyllama_jax.data.export import tokenizer as exporter
from tinyllama_jax.hub import gguf, llama

pytest.importorskip("gguf", reason="the package that writes GGUF")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp, the package xllamacpp", exc_type=ImportError)
tokenizers = pytest.importorskip("tokenizers", reason="trains byte-level BPE")


def odd_texts() -> list[str]:
    """Strings of emoji, CJK, code, odd spaces, digits of other scripts, and what looks like a token but is not one."""
    rng = random.Random(0)
    characters = "aB1 9\t\n\r\u00a0\u2003\u3000\u200b\u0085é中あ👍🏽'sS.,!?_-<>|$+=~^٣Ⅷ½०\u0301"
    drawn = ["".join(rng.choice(characters) for _ in range(rng.randint(1, 30))) for _ in range(100)]
    whole = [text for text in corpus() if len(text) < 400]
    return [
        *whole[:60],
        *rng.sample(whole[60:], 60),
        *drawn,
        "I'LL we've 12345678 a<|im_end|>b<|tool|>c",
        "x = {'a': [1, 2]}  # ok\n",
    ]


TEXTS = odd_texts()


def in_llama_cpp(metadata: dict, path: Path) -> "llama_cpp.LlamaCpp":
    cfg = dataclasses.replace(GQA, vocab_size=len(metadata[gguf.TOKENS]), n_layers=1)
    gguf.write(path, llama.to_hf(random_params(cfg), cfg), cfg, metadata, "f16", "it")
    return llama_cpp.LlamaCpp(path)


def assert_same_ids(ours: tokenizer.Tokenizer, metadata: dict, folder: Path) -> None:
    """In llama.cpp, and in the tokenizer that is read back from the metadata."""
    theirs = in_llama_cpp(metadata, folder / "it.gguf")
    (folder / "back").mkdir()
    back = gguf_tokenizer.from_gguf(gguf.read(folder / "it.gguf").metadata, folder / "back", "it.gguf")
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text) == back.encode(text), text
    assert (back.bos_id, back.eos_id) == (ours.bos_id, ours.eos_id)
    begins = metadata["tokenizer.ggml.add_bos_token"]
    assert theirs.encode("a", bos=True) == [ours.bos_id] * begins + ours.encode("a")
    assert tokenizer.documents_begin_with_bos(folder / "back") is begins


# -- SentencePiece ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["demo", "prefix", "Llama 2", "symbols"])
def test_sentencepiece_gives_the_same_ids(kind, tmp_path):
    if kind == "Llama 2" and not LLAMA2.is_file():
        pytest.skip(f"{LLAMA2} is not here")
    options = KINDS["demo"] | {"user_defined_symbols": ["<|tool|>", "we've"]} if kind == "symbols" else KINDS.get(kind)
    ours = tokenizer.load(LLAMA2 if kind == "Llama 2" else train(tmp_path / "tokenizer.model", **options))
    metadata = gguf_tokenizer.to_gguf(ours, ours.vocab_size + 3, add_bos=kind != "demo")
    kinds = metadata["tokenizer.ggml.token_type"]
    assert kinds[:4] == [2, 3, 3, 4 if kind == "symbols" else 6] and len(kinds) == ours.vocab_size
    assert_same_ids(ours, metadata, tmp_path)


def test_a_tokenizer_json_made_of_sentencepiece_gives_the_same_ids(tmp_path):
    model = exporter.read(train(tmp_path / "m.model", **KINDS["prefix"]))
    content = exporter.tokenizer_json(model, add_bos=True)
    content["normalizer"]["normalizers"] = [{"type": "Prepend", "prepend": "▁"}, content["normalizer"]["normalizers"][-1]]
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "hf/tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    ours = tokenizer.load(tmp_path / "hf")
    metadata = gguf_tokenizer.to_gguf(ours, ours.vocab_size, add_bos=True)
    assert metadata["tokenizer.ggml.model"] == "llama" and metadata["tokenizer.ggml.unknown_token_id"] == 0
    assert_same_ids(ours, metadata, tmp_path)
    content["model"]["merges"].pop(5)
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="does not join .* and llama.cpp would; so ids would differ"):
        gguf_tokenizer.to_gguf(tokenizer.load(tmp_path / "hf"), 1_000, add_bos=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (KINDS["no bytes"], "has no pieces for bytes, .*byte_fallback=true"),
        (KINDS["collapsing"], "removes spaces, .*remove_extra_whitespaces=false"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises the text, .*normalization_rule_name=identity"),
        ({"model_type": "unigram"}, "is not a BPE model, .*model_type=bpe"),
        ({"user_defined_symbols": ["<a>"], "add_dummy_prefix": True}, "has user-defined symbols .*add_dummy_prefix=false"),
        ({"eos_id": -1}, "has no eos, and llama.cpp would take another token for it"),
    ],
)
def test_a_sentencepiece_model_that_llama_cpp_cannot_do_is_refused(options, says, tmp_path):
    with pytest.raises(UserError, match=says):
        gguf_tokenizer.to_gguf(tokenizer.load(train(tmp_path / "m.model", **options)), 2_000, add_bos=False)


# -- byte-level BPE -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_level() -> dict:
    """A tokenizer.json of 600 tokens whose parts all of `PRE` may cut further."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator([*make_texts(6), *TEXTS, " 12 123 1234" * 9, "。，" * 30], trainer)
    return json.loads(bpe.to_str())


def folder_of(content: dict, folder: Path, **config) -> tokenizer.Tokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return tokenizer.load(folder)


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPLITS = {  # as the models' own files say it
    "gpt-2": {**LEVEL, "use_regex": True},
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, {**LEVEL, "use_regex": True}],
    },
}


@pytest.mark.parametrize("pre", gguf_tokenizer.PRE)
def test_byte_level_bpe_gives_the_same_ids(pre, byte_level, tmp_path):
    pieces = [
        exporter.Piece(text, 0.0, 1) for text in sorted(byte_level["model"]["vocab"], key=byte_level["model"]["vocab"].get)
    ]
    merges = [" ".join(pair) for pair in byte_level["model"]["merges"]]
    content = gguf_tokenizer._tokenizer_json(pieces, merges, {}, False, pre, "it")
    content["added_tokens"] = byte_level["added_tokens"]
    if pre in SPLITS:
        content["pre_tokenizer"] = SPLITS[pre]
    ours = folder_of(content, tmp_path / "hf", pad_token="<|endoftext|>", chat_template=[{"name": "default", "template": "x"}])
    metadata = gguf_tokenizer.to_gguf(ours, 610, pre == "llama-bpe", chat.own_sources(tmp_path / "hf")["default"])
    assert metadata["tokenizer.ggml.pre"] == pre and metadata["tokenizer.ggml.padding_token_id"] == 0
    assert metadata["tokenizer.chat_template"] == "x"
    assert_same_ids(ours, metadata, tmp_path)
    assert (tmp_path / "back/chat_template.jinja").read_text() == "x"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"normalizer": {"type": "NFC"}}, r"normalises the text \(NFC\), which llama.cpp does not do; set normalizer to null"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits a text in a way that is none of gpt-2, smollm"),
        ({"pre_tokenizer": {**LEVEL, "add_prefix_space": True}}, "splits a text in a way that is none of gpt-2, smollm"),
    ],
)
def test_a_tokenizer_json_that_llama_cpp_cannot_do_is_refused(change, says, byte_level, tmp_path):
    with pytest.raises(UserError, match=says):
        gguf_tokenizer.to_gguf(folder_of(byte_level | change, tmp_path), 600, add_bos=False)


def test_ignore_merges_must_be_as_in_llama_cpp(byte_level, tmp_path):
    content = byte_level | {"model": byte_level["model"] | {"ignore_merges": True}}
    with pytest.raises(UserError, match="ignore_merges is True, and for gpt-2 llama.cpp takes False; ids would differ"):
        gguf_tokenizer.to_gguf(folder_of(content, tmp_path), 600, add_bos=False)


def test_an_empty_tokenizer_is_refused(byte_level, tmp_path):
    model = byte_level["model"] | {"vocab": {}, "merges": []}
    ours = folder_of(byte_level | {"model": model}, tmp_path)  # as Transformers 5 writes one for a missing vocabulary
    with pytest.raises(UserError, match="is empty: it has no tokens but special ones"):
        gguf_tokenizer.to_gguf(ours, 600, add_bos=False)
    with pytest.raises(UserError, match="is empty: it has no tokens"):
        folder_of(byte_level | {"model": model, "added_tokens": []}, tmp_path, bos_token=None, eos_token=None)
    with pytest.raises(UserError, match="has 600 tokens, and the model only 599 rows for them"):
        gguf_tokenizer.to_gguf(folder_of(byte_level, tmp_path), 599, add_bos=False)


# -- from metadata ------------------------------------------------------------------------------------------------------


def small(kind: str) -> dict:
    tokens = ["<unk>", "<s>", "</s>", *gguf_tokenizer.BYTES, "a", "b", "ab", "[PAD262]"]
    metadata = {"model": kind, "tokens": tokens, "token_type": np.array([2, 3, 3, *[6] * 256, 1, 1, 1, 5], np.int32)}
    more = {"scores": np.zeros(len(tokens), np.float32)} if kind == "llama" else {"merges": ["a b"], "pre": "gpt-2"}
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | more).items()}


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("llama", {"tokens": []}, r"holds no tokenizer \(tokenizer.ggml.tokens is empty\)"),
        ("llama", {"tokens": None}, r"holds no tokenizer \(tokenizer.ggml.tokens is absent\)"),
        ("llama", {"model": "t5"}, "tokenizer.ggml.model is 't5'; only 'llama' and 'gpt2' can be read"),
        ("llama", {"scores": np.zeros(3, np.float32)}, "tokenizer.ggml.scores has 3 entries for 263 tokens"),
        ("llama", {"token_type": np.full(263, 9)}, "tokenizer.ggml.token_type holds 9; only 1 to 6 have a meaning"),
        ("llama", {"token_type": np.full(263, 1)}, "lacks the byte token <0x00>"),
        ("llama", {"bos_token_id": 262}, "tokenizer.ggml.bos_token_id is 262, and there are 262 tokens"),
        ("llama", {"bos_token_id": "1"}, "tokenizer.ggml.bos_token_id is '1', and there are 262 tokens"),
        ("llama", {"unknown": 0, "tokens": [*small("llama")[gguf.TOKENS][:-2], "a", "z"]}, "holds 'a' twice"),
        ("llama", {"tokens": [*small("llama")[gguf.TOKENS][:-2], "", "z"]}, r"holds '' \(a token of no text\)"),
        (
            "gpt2",
            {"pre": "tekken"},
            "tokenizer.ggml.pre is 'tekken'; only gpt-2, smollm, llama-bpe, qwen2, default can",
        ),
        ("gpt2", {"merges": ["a c"]}, "its tokenizer is damaged: tokenizer.json: is not a Hugging Face tokenizer"),
        ("gpt2", {"merges": []}, "tokenizer.ggml.merges has 0 entries"),
    ],
)
def test_a_damaged_tokenizer_is_one_line(kind, change, says, tmp_path):
    assert gguf_tokenizer.from_gguf(small(kind), tmp_path, "it.gguf").vocab_size == 262  # without the padding at the end
    changed = small(kind) | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=f"^it.gguf: .*{says}") as caught:
        gguf_tokenizer.from_gguf(changed, tmp_path / "other", "it.gguf")
    assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)
