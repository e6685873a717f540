"""Writes a tokenizer as tokenizer.json and tokenizer_config.json, with which Transformers gives the ids of training.

Transformers' own readers of `tokenizer.model` give other ids (no dummy prefix before a space, another order of merges). So this
module writes a tokenizer.json itself, and `check` compares ids. How a tokenizer.json expresses SentencePiece's rules:

| SentencePiece                                   | tokenizer.json                                            |
|-------------------------------------------------|-----------------------------------------------------------|
| pairs join in order of their piece's score      | `merges`: each way to cut a piece in two, by score        |
| unigram                                         | model: `Unigram`; pieces never to choose: score `NEVER`   |
| a normalisation rule such as nmt_nfkc           | normalizer: `Precompiled`, which knows fewer combinations |
| `remove_extra_whitespaces`                      | normalizer: three `Replace`                               |
| `add_dummy_prefix`, but not on an empty text    | normalizer: `Prepend` ▁                                   |
| `escape_whitespaces`                            | normalizer: `Replace` space by ▁                          |
| user-defined symbols                            | pre-tokenizer: `Split` keeps each symbol whole            |
| `byte_fallback`                                 | model: `byte_fallback`; decoder: `ByteFallback`           |

One difference is deliberate, since users of Transformers build prompts with it: a special token written out in a text ("</s>")
becomes its id, and the text after it is encoded as a separate text. With `split_special_tokens=True`,
`AutoTokenizer.from_pretrained` reads it as plain characters, as SentencePiece does.
"""

import base64
import json
import re
import shutil
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import read_json
from tinyllama_jax.data.tokenizer import SPACE, HuggingFaceTokenizer, Tokenizer, load, processors

# sentencepiece_model.proto: the kinds of piece, and the kinds of model that a tokenizer.json can express
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
# this class of Transformers uses tokenizer.json unchanged; LlamaTokenizer and others replace its normalizer
AS_WRITTEN = "PreTrainedTokenizerFast"
# Llama takes no token_type_ids
PLAIN = {"clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"]}
REMEDY = "; --tokenizer none writes the weights, and beside them the tokenizer unchanged"
TEXTS = (  # separated by ¦
    "¦a¦ a¦a ¦  two  spaces   here ¦" + " " * 40 + "¦\n¦line\n\n\nline\r\n\tx\t\t y¦#########¦def f(x):\n    return  x¦"
    "naïve e\u0301 n\u0303¦日本語、한국어 你好。¦नमस्ते שלום¦👩‍👩‍👧 👍🏽 🇨🇭¦▁ a▁b ▁▁¦a\0b\x01\x7f¦3.14 1,000¦\ufeffx¦"
    "<s>a</s> b<unk>¦<|im_start|>user\n<|im_end|>¦[INST] <0x0A> [PAD]¦ﬁ ① ｆｕｌｌ　ｗｉｄｔｈ\u00a0x"
).split("¦")
TALKS = (
    [{"role": "user", "content": " a  b\n"}],
    [{"role": r, "content": t} for r, t in (("user", "</s>👍🏽"), ("assistant", "日本語\t"), ("user", ""))],
)
NEVER = -1e6  # score of a piece that must never be chosen: any other way to write its text scores better


class Piece(NamedTuple):
    """One entry of the vocabulary; its index is its id."""

    text: str
    score: float
    kind: int


class SentencePiece(NamedTuple):
    """The contents of a `.model` file that encoding and decoding depend on. An id of -1: the model has no such piece."""

    pieces: list[Piece]
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int
    byte_fallback: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    model_type: int
    rule: str  # name of the normalisation rule
    charsmap: bytes  # the rule, compiled; b"" if there is none


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (field number, value) of a protobuf message: sentencepiece's reader needs a newer protobuf than Beam allows."""
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


def read(path: str | Path, refuse: Callable | None = None) -> SentencePiece:
    """Reads a SentencePiece `.model`. Raises UserError if it is not one, or if a tokenizer.json cannot express it.

    `refuse`: checks another form, instead of a tokenizer.json, with the arguments of `_refuse`.
    """
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
    (refuse or _refuse)(path, pieces, trainer, normalizer, denormalizer)
    return SentencePiece(
        pieces,
        bos_id=_signed(trainer.get(41, 1)),
        eos_id=_signed(trainer.get(42, 2)),
        unk_id=_signed(trainer.get(40, 0)),
        pad_id=_signed(trainer.get(43, (1 << 64) - 1)),
        byte_fallback=bool(trainer.get(35, 0)),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        model_type=trainer.get(3, UNIGRAM),
        rule=normalizer.get(1, b"").decode(errors="replace"),
        charsmap=normalizer.get(2, b""),
    )


def _refuse(path: str | Path, pieces: list[Piece], trainer: dict, normalizer: dict, denormalizer: dict) -> None:
    model_type = trainer.get(3, UNIGRAM)
    by_score = Counter(piece.score for piece in pieces if piece.kind == NORMAL and len(piece.text) > 1)
    tied = {piece.text for piece in pieces if piece.kind == NORMAL and by_score[piece.score] > 1 and model_type == BPE}
    tied -= {SPACE * n for n in range(1, len(tied) + 2)}  # Llama 2 ties the runs of spaces: see `merges`
    # SentencePiece matches symbols before normalisation, a tokenizer.json after it: the same if it leaves symbols unchanged
    symbols = [piece.text for piece in pieces if piece.kind == USER_DEFINED]
    plain = re.compile("[!-~]+" if normalizer.get(2) else f"[^{SPACE}]+" if normalizer.get(4, 1) else ".+", re.DOTALL)
    odd = [text for text in symbols if not plain.fullmatch(text) or (b"cf" in normalizer.get(1, b"") and text != text.lower())]
    unused = [piece.text for piece in pieces if piece.kind == UNUSED]
    for refused, what, remedy in (
        (model_type not in (UNIGRAM, BPE), f"is a {'word' if model_type == 3 else 'character'} model", "model_type=bpe"),
        (denormalizer.get(2), "changes the text when it decodes", "no denormalization_rule_tsv"),
        (not normalizer.get(5, 1), "does not escape spaces", "escape_whitespaces=true"),
        (trainer.get(24), "puts the space after a word", "treat_whitespace_as_suffix=false"),
        (odd, f"has user-defined symbols that its normalisation changes, {min(odd, default='')!r} among them", "other symbols"),
        (unused, f"has {len(unused)} unused pieces, {min(unused, default='')!r} among them", "no unused pieces"),
        (tied, f"has pieces of equal score, {min(tied, default='')!r} among them", "model_type=bpe, which ranks them"),
    ):
        if refused:
            raise UserError(f"{path}: {what}, which a tokenizer.json cannot express with the same ids; train one with {remedy}")


def merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Returns all cuts of a piece into two pieces, best score first; at equal scores the longest piece and left part first.

    At equal scores SentencePiece joins the leftmost pair in the text. In a run of spaces, whose pieces share one score in
    Llama 2, the first piece then grows space by space to the longest one; "longest piece first" has the same effect. Among the
    cuts of one piece, "longest left part first" also has it: joining from the left gives "aaa" as "aa" + "a".
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
    """Returns the contents of tokenizer.json. `add_bos`: each text begins with bos, unless the caller turns that off."""
    strip = model.add_dummy_prefix or model.remove_extra_whitespaces
    decoders = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    symbols = sorted((p.text for p in model.pieces if p.kind == USER_DEFINED), key=len, reverse=True)
    split = {"pattern": {"Regex": "|".join(map(re.escape, symbols))}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id_, **token} for id_, token in added_tokens(model).items()],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": {"type": "Split", **split} if symbols else None,
        "post_processor": _bos_template(model.pieces[model.bos_id].text, model.bos_id) if add_bos else None,
        "decoder": {
            "type": "Sequence",
            "decoders": decoders + ([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if strip else []),
        },
        "model": _unigram(model) if model.model_type == UNIGRAM else _bpe(model, bool(symbols)),
    }


def _normalizers(model: SentencePiece) -> list[dict]:
    normalizers, prefix = [], SPACE
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        normalizers = [{"type": "Precompiled", "precompiled_charsmap": charsmap}]
    if model.rule.startswith("nmt"):  # Precompiled works on grapheme clusters: U+0001 splits \r\n, then the rule removes it
        normalizers.insert(0, _replace({"String": "\r\n"}, "\r\x01\n"))
        prefix += "\x01"
    if model.remove_extra_whitespaces:
        regexes = {r"\A +": "", " +": " ", rf"[ {SPACE}]+\z": ""}
        normalizers += [_replace({"Regex": regex}, content) for regex, content in regexes.items()]
    if model.add_dummy_prefix:  # `late`: prepended after normalisation; else to the raw text, if not empty
        late = model.remove_extra_whitespaces or prefix == SPACE
        normalizers.insert(len(normalizers) if late else 0, {"type": "Prepend", "prepend": SPACE if late else prefix})
    return [*normalizers, _replace({"String": " "}, SPACE)]


def _bpe(model: SentencePiece, symbols: bool) -> dict:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[model.unk_id].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": symbols,  # no merge makes a user-defined symbol
        "vocab": {piece.text: id_ for id_, piece in enumerate(model.pieces)},
        # "left right", because releases before 2024 cannot read [left, right]; no piece contains a space
        "merges": [f"{left} {right}" for left, right in merges(model.pieces)],
    }


def _unigram(model: SentencePiece) -> dict:
    scores = {NORMAL: lambda piece: piece.score, USER_DEFINED: lambda piece: 0.0}
    vocabulary = [[piece.text, scores.get(piece.kind, lambda piece: NEVER)(piece)] for piece in model.pieces]
    return {"type": "Unigram", "unk_id": model.unk_id, "vocab": vocabulary, "byte_fallback": model.byte_fallback}


def _replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _bos_template(bos: str, id_: int) -> dict:
    def sequence(name: str, type_id: int) -> list[dict]:
        return [{"SpecialToken": {"id": bos, "type_id": type_id}}, {"Sequence": {"id": name, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {bos: {"id": bos, "ids": [id_], "tokens": [bos]}},
    }


def added_tokens(model: SentencePiece) -> dict[int, dict]:
    """Returns id -> description of the control pieces and the unknown piece."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {id_: {"content": piece.text, **flags} for id_, piece in enumerate(model.pieces) if piece.kind in (UNKNOWN, CONTROL)}


def tokenizer_config(model: SentencePiece, add_bos: bool, seq_len: int) -> dict:
    """Returns the contents of tokenizer_config.json: the class, the special tokens, and the longest text (`seq_len`)."""
    named = {"unk_token": model.unk_id, "bos_token": model.bos_id, "eos_token": model.eos_id, "pad_token": model.pad_id}
    return {
        "tokenizer_class": AS_WRITTEN,
        **{name: model.pieces[id_].text for name, id_ in named.items() if id_ >= 0},
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "added_tokens_decoder": {str(id_): token for id_, token in added_tokens(model).items()},
        "model_max_length": seq_len,
    }


def export(tokenizer: Tokenizer, folder: Path, add_bos: bool, seq_len: int) -> None:
    """Copies a tokenizer's files into a folder, changed so that Transformers gives bos (if `add_bos`) and the ids of `encode`.

    `seq_len`: the longest text. Raises UserError if no tokenizer.json can give these ids.
    """
    if add_bos and tokenizer.bos_id < 0:
        raise UserError(f"{tokenizer.path}: has no bos, but in the training data each document begins with bos")
    tokenizer.copy(folder)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        bos, eos = tokenizer.names
        rewrite(folder, read_json(tokenizer.path, dict), bos and (bos, tokenizer.bos_id), eos, add_bos)
    else:
        write(tokenizer.path, folder, add_bos, seq_len)


def export_from(source: Path, folder: Path, add_bos: bool, seq_len: int) -> Tokenizer:
    """Writes the files for the tokenizer in the folder `source`; returns it. Raises UserError, which says `REMEDY`."""
    if not any((source / f"tokenizer.{end}").is_file() for end in ("model", "json")):
        what = "holds neither tokenizer.model nor tokenizer.json, so there is no tokenizer to export"
        raise UserError(f"{source}: {what}{REMEDY}")
    ours = load(source)
    try:
        export(ours, folder, add_bos, seq_len)
    except UserError as error:
        raise UserError(f"{error}{REMEDY}") from None
    return ours


def copy_of(source: Path, folder: Path) -> Tokenizer | None:
    """Copies a run's tokenizer unchanged; returns it, for the ids of bos and eos, if it can be read."""
    if source.is_dir():
        shutil.copytree(source, folder, dirs_exist_ok=True)
    try:
        return load(source)
    except UserError as error:
        print(f"no bos and eos in the model's config.json: {error}")
        return None


def write(model_file: Path, folder: Path, add_bos: bool, seq_len: int) -> None:
    """Writes tokenizer.json and tokenizer.model (for llama.cpp) into `folder`, and updates its tokenizer_config.json.

    Raises UserError.
    """
    model = read(model_file)
    _write_json(folder / "tokenizer.json", tokenizer_json(model, add_bos))
    _update_config(folder, tokenizer_config(model, add_bos, seq_len))
    (folder / "tokenizer.model").write_bytes(Path(model_file).read_bytes())


def rewrite(folder: Path, content: dict, bos: tuple[str, int] | None, eos: str | None, add_bos: bool) -> None:
    """Changes a copied Hugging Face tokenizer in `folder` so that any release of Transformers gives the ids of training.

    `content`: its tokenizer.json. `bos`: token and id.
    """
    others = [p for p in processors(content.get("post_processor")) if "single" not in p and "cls" not in p]
    wanted = [*others, *([_bos_template(*bos)] if add_bos else [])]
    content["post_processor"] = {"type": "Sequence", "processors": wanted} if len(wanted) > 1 else (wanted or [None])[0]
    if not (folder / "tokenizer.json").is_file() or content != read_json(folder / "tokenizer.json", dict):
        _write_json(folder / "tokenizer.json", content)
    named = {"bos_token": bos and bos[0], "eos_token": eos, "add_bos_token": add_bos, "add_eos_token": False}
    _update_config(folder, {"tokenizer_class": AS_WRITTEN, **named})


def _update_config(folder: Path, values: dict) -> None:
    path = folder / "tokenizer_config.json"
    present = read_json(path, dict) if path.is_file() else {}
    content = lambda token: token.get("content") if isinstance(token, dict) and "__type" in token else token
    changed = {key: value for key, value in values.items() if key not in present or content(present[key]) != value}
    # auto_map names code that is not in the folder
    config = {key: value for key, value in (PLAIN | present | changed).items() if key != "auto_map"}
    if config != present:
        _write_json(path, config)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check(
    folder: Path, encode: Callable[[str], list[int]], bos: int, eos: int, add_bos: bool, talk: Callable | None = None
) -> bool:
    """Loads a folder with Transformers and compares ids; returns False if Transformers is not installed.

    `encode`: gives the ids of training, without bos. `bos` or `eos` of -1: no such token. `talk`: gives the ids of messages,
    by the chat template. Raises UserError if ids differ.
    """
    try:
        import transformers
    except ImportError:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some releases warn about other releases
        try:
            loaded = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # Transformers raises many types
            raise UserError(f"Transformers cannot load the exported tokenizer: {str(error).splitlines()[0]}{REMEDY}") from error
        special = [loaded.convert_ids_to_tokens(id_) for id_ in (bos, eos) if id_ >= 0]
        for text in (*TEXTS, "".join(f" x{token}\n{token}y" for token in special)):
            got = loaded(text, split_special_tokens=True, verbose=False)["input_ids"]  # no warning about long texts
            want = [bos] * add_bos + encode(text)
            if got != want:
                what = f"gives {text!r} the ids {got[:20]}, and training gave it {want[:20]}"
                raise UserError(f"Transformers {transformers.__version__}, reading the exported tokenizer, {what}{REMEDY}")
        for messages in TALKS if talk else ():
            try:
                want = talk(messages)
            except UserError:  # the template takes no such conversation
                continue
            got = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            if got != want:
                what = f"gives the chat {messages} the ids {got[:40]}, and here it has {want[:40]}"
                raise UserError(f"Transformers {transformers.__version__}, reading the exported tokenizer, {what}{REMEDY}")
        ids = [-1 if id_ is None else id_ for id_ in (loaded.bos_token_id, loaded.eos_token_id)]
    if ids != [bos, eos]:
        what = f"takes {ids} for bos and eos of the exported tokenizer, and training took {[bos, eos]}"
        raise UserError(f"Transformers {what}{REMEDY}")
    return True
