"""A SentencePiece BPE model as tokenizer.json and tokenizer_config.json, with the same ids.

Transformers' own readers of `tokenizer.model` give other ids (a dummy prefix that is left out before a space, merges in another
order), so the files are written here and nothing is left to guess. How SentencePiece's rules are said in a tokenizer.json:

| SentencePiece                                   | tokenizer.json                                            |
|-------------------------------------------------|-----------------------------------------------------------|
| the pair that makes the best-scored piece joins | `merges`: each way to cut a piece in two, by score        |
| `remove_extra_whitespaces`                      | normalizer: three `Replace`                               |
| `add_dummy_prefix`, but not on an empty text    | normalizer: `Prepend` ▁                                   |
| `escape_whitespaces`                            | normalizer: `Replace` space by ▁                          |
| `byte_fallback`                                 | model: `byte_fallback`; decoder: `ByteFallback`           |

One difference is deliberate, since users of Transformers build prompts by it: a special token written out in a text ("</s>")
becomes its id, and the text after it is encoded as a text of its own. With `split_special_tokens=True`,
`AutoTokenizer.from_pretrained` reads it as plain characters, as SentencePiece does.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tinyllama_jax.errors import UserError

SPACE = "▁"  # U+2581, which stands for a space within pieces

# sentencepiece_model.proto: kinds of a piece, and the only kind of model that a list of merges can express
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2


class Piece(NamedTuple):
    """One entry of the vocabulary; its index is its id."""

    text: str
    score: float
    kind: int


class SentencePiece(NamedTuple):
    """What a `.model` file says, as far as encoding and decoding depend on it. An id of -1: there is none."""

    pieces: list[Piece]
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int
    byte_fallback: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message; sentencepiece's own reader wants a newer protobuf than Beam allows."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        field, wire = divmod(varint(), 8)
        if wire == 0:
            yield field, varint()
            continue
        size = {1: 8, 5: 4}[wire] if wire != 2 else varint()
        if at + size > len(message):
            raise ValueError("cut short")
        yield field, message[at : at + size]
        at += size


def _piece(message: bytes) -> Piece:
    values = dict(_fields(message))
    return Piece(values.get(1, b"").decode(), struct.unpack("<f", values.get(2, bytes(4)))[0], values.get(3, NORMAL))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def read(path: str | Path) -> SentencePiece:
    """Reads a SentencePiece `.model`. Raises UserError if it is none, or if a tokenizer.json cannot say the same."""
    pieces, parts = [], {}
    try:
        for field, value in _fields(Path(path).read_bytes()):
            if field == 1:
                pieces.append(_piece(value))
            else:
                parts[field] = value
        trainer, normalizer, denormalizer = (dict(_fields(parts.get(field, b""))) for field in (2, 3, 5))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        raise UserError(f"{path}: is not a SentencePiece model") from None
    if not pieces:
        raise UserError(f"{path}: is not a SentencePiece model: it has no pieces")
    _refuse(path, pieces, trainer, normalizer, denormalizer)
    return SentencePiece(
        pieces,
        bos_id=_signed(trainer.get(41, 1)),
        eos_id=_signed(trainer.get(42, 2)),
        unk_id=_signed(trainer.get(40, 0)),
        pad_id=_signed(trainer.get(43, (1 << 64) - 1)),
        byte_fallback=bool(trainer.get(35, 0)),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def _refuse(path: str | Path, pieces: list[Piece], trainer: dict, normalizer: dict, denormalizer: dict) -> None:
    by_score = Counter(piece.score for piece in pieces if piece.kind == NORMAL and len(piece.text) > 1)
    tied = {piece.text for piece in pieces if piece.kind == NORMAL and by_score[piece.score] > 1}
    tied -= {SPACE * n for n in range(1, len(tied) + 2)}  # Llama 2 ties the runs of spaces: see `merges`
    odd = [piece.text for piece in pieces if piece.kind in (USER_DEFINED, UNUSED)]
    name = normalizer.get(1, b"").decode(errors="replace")
    model_type = {UNIGRAM: "a unigram", 3: "a word", 4: "a character"}.get(trainer.get(3, UNIGRAM))
    for refused, what, remedy in (
        (model_type, f"is {model_type} model", "train with model_type=bpe"),
        (normalizer.get(2) or denormalizer.get(2), f"normalises by {name!r}", "train with normalization_rule_name=identity"),
        (not normalizer.get(5, 1), "does not escape spaces", "train with escape_whitespaces=true"),
        (trainer.get(24), "puts the space after a word", "train with treat_whitespace_as_suffix=false"),
        (odd, f"has {len(odd)} user-defined or unused pieces, {odd[0] if odd else ''!r} first", "train without them"),
        (
            tied,
            f"has pieces of equal score, {min(tied, default='')!r} among them",
            "train with model_type=bpe, which ranks them",
        ),
    ):
        if refused:
            raise UserError(f"{path}: {what}, which a tokenizer.json cannot express with the same ids; {remedy}")


def merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Each way to cut a piece into two pieces, best score first; at equal scores the longest piece and left part first.

    At equal scores SentencePiece joins what is leftmost in the text. In a run of spaces, whose pieces have one score in
    Llama 2, that lets the first piece grow one by one to the longest that there is, and so does "the longest first". Among
    the cuts of one piece it agrees as well: joining from the left leaves long parts left of short ones ("aaa": "aa" + "a").
    """
    rank = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    cuts = [
        (-score, -len(text), -cut, text[:cut], text[cut:])
        for text, score in rank.items()
        for cut in range(1, len(text))
        if text[:cut] in rank and text[cut:] in rank
    ]
    return [(left, right) for *_, left, right in sorted(cuts)]


def tokenizer_json(model: SentencePiece, add_bos: bool) -> dict:
    """The contents of tokenizer.json. `add_bos`: texts are encoded with bos in front unless the caller says otherwise."""
    strip = model.add_dummy_prefix or model.remove_extra_whitespaces
    normalizers = []
    if model.remove_extra_whitespaces:
        normalizers += [
            _replace({"Regex": r"\A +"}, ""),
            _replace({"Regex": " +"}, " "),
            _replace({"Regex": rf"[ {SPACE}]+\z"}, ""),
        ]
    if model.add_dummy_prefix:
        normalizers += [{"type": "Prepend", "prepend": SPACE}]
    normalizers += [_replace({"String": " "}, SPACE)]
    decoders = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id_, **token} for id_, token in added_tokens(model).items()],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": _bos_template(model) if add_bos else None,
        "decoder": {
            "type": "Sequence",
            "decoders": decoders + ([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if strip else []),
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.unk_id].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.text: id_ for id_, piece in enumerate(model.pieces)},
            # "left right" and not [left, right], which releases before 2024 cannot read; no piece holds a space
            "merges": [f"{left} {right}" for left, right in merges(model.pieces)],
        },
    }


def _replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _bos_template(model: SentencePiece) -> dict:
    bos = model.pieces[model.bos_id].text

    def sequence(name: str, type_id: int) -> list[dict]:
        return [{"SpecialToken": {"id": bos, "type_id": type_id}}, {"Sequence": {"id": name, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {bos: {"id": bos, "ids": [model.bos_id], "tokens": [bos]}},
    }


def added_tokens(model: SentencePiece) -> dict[int, dict]:
    """Id -> description, for the control pieces and the unknown piece."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {id_: {"content": piece.text, **flags} for id_, piece in enumerate(model.pieces) if piece.kind in (UNKNOWN, CONTROL)}


def tokenizer_config(model: SentencePiece, add_bos: bool, seq_len: int) -> dict:
    """The contents of tokenizer_config.json: the class, the special tokens, and the longest text it is made for."""
    named = {"unk_token": model.unk_id, "bos_token": model.bos_id, "eos_token": model.eos_id, "pad_token": model.pad_id}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # LlamaTokenizer would make its own normalizer from what it reads
        **{name: model.pieces[id_].text for name, id_ in named.items() if id_ >= 0},
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "added_tokens_decoder": {str(id_): token for id_, token in added_tokens(model).items()},
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # without token_type_ids, which Llama does not take
        "model_max_length": seq_len,
    }


def write(model_file: Path, folder: Path, add_bos: bool, seq_len: int) -> SentencePiece:
    """Writes tokenizer.json, tokenizer_config.json and tokenizer.model (for llama.cpp) into `folder`. Raises UserError."""
    model = read(model_file)
    if add_bos and model.bos_id < 0:
        raise UserError(f"{model_file}: has no bos piece, but the data was written with one in front of each document")
    for name, content in {
        "tokenizer.json": tokenizer_json(model, add_bos),
        "tokenizer_config.json": tokenizer_config(model, add_bos, seq_len),
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copyfile(model_file, folder / "tokenizer.model")
    return model
