"""Converts a tokenizer's files to the metadata of a GGUF file, and back.

llama.cpp has its own code for two kinds of tokenizer (`tokenizer.ggml.model`). It gives the ids of training only for these:

| kind  | what llama.cpp does                                     | files                                              |
|-------|---------------------------------------------------------|----------------------------------------------------|
| llama | joins the pair whose piece scores best; unknown         | SentencePiece: BPE with byte fallback, and no      |
|       | characters become bytes; a space in front if            | normalisation; or a tokenizer.json made from such  |
|       | `add_space_prefix`                                      | a model                                            |
| gpt2  | byte-level BPE on the parts that the regular            | tokenizer.json with one of the splits in `PRE`,    |
|       | expressions of `tokenizer.ggml.pre` cut out             | and no normalisation                               |
"""

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import read_json
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.export import tokenizer as exporter
from tinyllama_jax.data.export.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Piece
from tinyllama_jax.data.tokenizer import SPACE, HuggingFaceTokenizer, Tokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# `tokenizer.ggml.pre` -> the regular expressions that split a text, one after the other. Source: llama-vocab.cpp
PRE = {
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (LLAMA3,),
    "qwen2": (LLAMA3.replace("{1,3}", ""),),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", None: "default", "": "default"}
WHOLE_WORDS = ("llama-bpe",)  # here a part of the text that is a token is taken whole, without merges
BYTES = [f"<0x{i:02X}>" for i in range(256)]
NOT_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))  # bytes that no UTF-8 text contains
KEY = "tokenizer.ggml."
_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


# -- files to metadata --------------------------------------------------------------------------------------------------


def to_gguf(tokenizer: Tokenizer, rows: int, add_bos: bool, chat_template: str | None = None) -> dict[str, object]:
    """The keys `tokenizer.*` of a GGUF. `rows`: of the model's embedding. `add_bos`: whether a text begins with bos.

    Raises UserError, which says why, if llama.cpp would give other ids.
    """
    if tokenizer.vocab_size > rows:
        raise UserError(f"{tokenizer.path}: has {tokenizer.vocab_size:,} tokens, and the model only {rows:,} rows for them")
    if add_bos and tokenizer.bos_id < 0:
        raise UserError(f"{tokenizer.path}: has no bos, but in the training data each document begins with bos")
    if tokenizer.eos_id < 0:
        raise UserError(f"{tokenizer.path}: has no eos, and llama.cpp would take another token for it; name eos_token")
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        keys, pieces, more = _from_json(tokenizer)
    else:
        model = exporter.read(tokenizer.path, _refuse)
        pieces, more = model.pieces, {"unk_token": model.unk_id, "pad_token": model.pad_id}
        keys = {"model": "llama", "pre": "default", "add_space_prefix": model.add_dummy_prefix}
    if not any(piece.kind in (NORMAL, BYTE) for piece in pieces):
        raise UserError(f"{tokenizer.path}: is empty: it has no tokens but special ones")
    keys |= {"tokens": [p.text for p in pieces], "token_type": [p.kind for p in pieces]} | keys.pop("merges", {})
    if keys["model"] == "llama":
        keys["scores"] = [float(p.score) for p in pieces]
        if missing := set(BYTES) - {p.text for p in pieces if p.kind == BYTE}:
            raise UserError(f"{tokenizer.path}: lacks the byte {min(missing)}; llama.cpp needs all 256 for unknown characters")
    keys |= {_IDS[name]: id_ for name, id_ in (ids | more).items() if id_ >= 0}
    keys |= {"add_bos_token": add_bos, "add_eos_token": False}
    template = {"tokenizer.chat_template": chat_template} if chat_template else {}
    return {KEY + name: value for name, value in keys.items()} | template


def _refuse(path: Path, pieces: list[Piece], trainer: dict, normalizer: dict, denormalizer: dict) -> None:
    symbols = [piece.text for piece in pieces if piece.kind == USER_DEFINED]
    for refused, what, remedy in (
        (trainer.get(3, exporter.UNIGRAM) != exporter.BPE, "is not a BPE model", "model_type=bpe"),
        (normalizer.get(2), "normalises the text", "normalization_rule_name=identity"),
        (normalizer.get(4, 1), "removes spaces", "remove_extra_whitespaces=false"),
        (not trainer.get(35, 0), "has no pieces for bytes", "byte_fallback=true"),
        (not normalizer.get(5, 1), "does not escape spaces", "escape_whitespaces=true"),
        (trainer.get(24), "puts the space after a word", "treat_whitespace_as_suffix=false"),
        (denormalizer.get(2), "changes the text when it decodes", "no denormalization_rule_tsv"),
        (symbols and normalizer.get(3, 1), "has user-defined symbols with no space after them", "add_dummy_prefix=false"),
    ):
        if refused:
            raise UserError(f"{path}: {what}, which llama.cpp cannot do with the same ids; train a tokenizer with {remedy}")


def _from_json(tokenizer: HuggingFaceTokenizer) -> tuple[dict, list[Piece], dict[str, int]]:
    """(metadata without tokens and ids, pieces, ids of the unknown and the padding token) of a tokenizer.json."""
    path, content = tokenizer.path, read_json(tokenizer.path, dict)
    model, added = content["model"], content.get("added_tokens") or []
    if model.get("type", "BPE") != "BPE" or not isinstance(model["vocab"], dict):
        raise UserError(f"{path}: is of type {model.get('type')!r:.50}; for llama.cpp only BPE can be written")
    merges = [tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in model.get("merges") or ()]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(f"{path}: marks the parts of words, which llama.cpp does not do")
    for token in added:
        flags = [flag for flag in ("single_word", "lstrip", "rstrip", "normalized") if token.get(flag)]
        if flags and not token.get("special") and (flags != ["normalized"] or content.get("normalizer")):
            raise UserError(f"{path}: {token['content']!r:.100} has {flags[0]}, which llama.cpp does not do; set it to false")
    texts = {id_: text for text, id_ in model["vocab"].items()}
    kinds = {token["id"]: CONTROL if token.get("special") else USER_DEFINED for token in added}
    texts |= {token["id"]: token["content"] for token in added}
    config = path.parent / "tokenizer_config.json"
    named = read_json(config, dict) if config.is_file() else {}
    named = {name: t.get("content") if isinstance(t, dict) else t for name, t in named.items() if name in _IDS}
    by_text = {text: id_ for id_, text in texts.items()}
    unknown = model.get("unk_token") or named.get("unk_token")
    ids = {"unk_token": by_text.get(unknown, -1), "pad_token": by_text.get(named.get("pad_token"), -1)}
    if model.get("byte_fallback"):
        keys, scores = _llama_keys(path, content, merges)
        kinds |= {by_text[byte]: BYTE for byte in BYTES if byte in by_text}
        kinds |= {ids["unk_token"]: UNKNOWN}
    else:
        keys, scores = _gpt2_keys(path, content) | {"merges": {"merges": [" ".join(pair) for pair in merges]}}, {}
        missing = {letter for byte, letter in _byte_letters().items() if byte not in NOT_UTF8} - by_text.keys()
        if missing and model.get("unk_token"):
            raise UserError(
                f"{path}: makes unknown bytes such as {min(missing)!r} {model['unk_token']!r}; llama.cpp drops them"
            )
    unused = lambda i: Piece(f"[PAD{i}]", 0.0, UNUSED)  # for an id that has no token in any file
    used = lambda i: Piece(texts[i], scores.get(texts[i], 0.0), kinds.get(i, NORMAL))
    return keys, [used(i) if i in texts else unused(i) for i in range(tokenizer.vocab_size)], ids


def _llama_keys(path: Path, content: dict, merges: list[tuple[str, str]]) -> tuple[dict, dict[str, float]]:
    """(metadata, score of each piece) of a tokenizer.json that was made of SentencePiece's BPE."""
    parts = lambda one, key: one.get(key, [one]) if one else []
    rules = [{k: v for k, v in part.items() if k != "type"} for part in parts(content.get("normalizer"), "normalizers")]
    prefix, escape = {"prepend": SPACE}, {"pattern": {"String": " "}, "content": SPACE}
    if content.get("pre_tokenizer") or rules not in ([escape], [prefix, escape]):
        what = f'splits or normalises the text otherwise than by Prepend "{SPACE}" and Replace " " by "{SPACE}"'
        raise UserError(f"{path}: {what}; with byte fallback llama.cpp does only these")
    vocabulary, score, listed = content["model"]["vocab"], {}, set(merges)
    for left, right in merges:
        score.setdefault(left + right, -float(len(score)))
    special = {token["content"] for token in content.get("added_tokens") or ()} | set(BYTES)
    for text in vocabulary.keys() - special:
        for pair in ((text[:cut], text[cut:]) for cut in range(1, len(text))):
            if (pair in listed) != (pair[0] in vocabulary and pair[1] in vocabulary):
                raise UserError(f"{path}: does not join {pair[0]!r} and {pair[1]!r}, and llama.cpp would; so ids would differ")
    return {"model": "llama", "pre": "default", "add_space_prefix": rules[0] == prefix}, score


def _gpt2_keys(path: Path, content: dict) -> dict:
    """The metadata of a byte-level tokenizer.json: `pre` names how it splits a text."""
    if content.get("normalizer"):
        kind = content["normalizer"].get("type")
        raise UserError(f"{path}: normalises the text ({kind}), which llama.cpp does not do; set normalizer to null")
    splits, whole = _splits(content.get("pre_tokenizer")), bool(content["model"].get("ignore_merges"))
    names = [name for name, regexes in PRE.items() if regexes == splits]
    if not names:
        raise UserError(f"{path}: its pre_tokenizer splits a text in a way that is none of {', '.join(PRE)} of llama.cpp")
    if whole != (names[0] in WHOLE_WORDS):
        raise UserError(f"{path}: ignore_merges is {whole}, and for {names[0]} llama.cpp takes {not whole}; ids would differ")
    return {"model": "gpt2", "pre": names[0], "add_space_prefix": False}


def _splits(pre: dict | None) -> tuple[str, ...] | None:
    """The regular expressions of a byte-level pre-tokenizer; None if it does something else."""
    out, parts = (), (pre.get("pretokenizers", [pre]) if pre else [])
    for i, part in enumerate(parts):
        if part["type"] == "ByteLevel" and i == len(parts) - 1 and not part.get("add_prefix_space"):
            return out + ((GPT2,) if part.get("use_regex", True) else ())
        if part["type"] == "Digits":
            out += (r"\p{N}" if part.get("individual_digits") else r"\p{N}+",)
        elif part["type"] == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            out += (part["pattern"].get("Regex"),)
        else:
            break
    return None


def _byte_letters() -> dict[int, str]:
    """Byte -> the letter for it in byte-level tokens: printable ones stand for themselves. Source: GPT-2's encoder.py."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# -- metadata to files --------------------------------------------------------------------------------------------------


def from_gguf(metadata: Mapping[str, object], folder: Path, origin: str) -> Tokenizer:
    """Writes the tokenizer of a GGUF's metadata into `folder`, for `tokenizer.load`, and loads it.

    Unused tokens at the end, with which some writers fill up the vocabulary, are left out. Raises UserError if there is no
    tokenizer, if it is damaged, or if these files cannot express it.
    """
    kind, tokens = metadata.get(f"{KEY}model"), metadata.get(f"{KEY}tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"{origin}: holds no tokenizer ({KEY}tokens is {'empty' if tokens == [] else 'absent'})")
    if kind not in ("llama", "gpt2"):
        raise UserError(f"{origin}: {KEY}model is {kind!r:.100}; only 'llama' and 'gpt2' can be read")
    needed = {"llama": ("token_type", "scores"), "gpt2": ("token_type", "merges")}[kind]
    columns = {name: list(metadata.get(f"{KEY}{name}", ())) for name in needed}
    for name, column in columns.items():
        if not column or (name != "merges" and len(column) != len(tokens)):
            raise UserError(f"{origin}: {KEY}{name} has {len(column):,} entries for {len(tokens):,} tokens")
    kinds = [int(k) for k in columns["token_type"]]
    if wrong := set(kinds) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}:
        raise UserError(f"{origin}: {KEY}token_type holds {min(wrong)}; only 1 to 6 have a meaning")
    while kinds and kinds[-1] == UNUSED:
        kinds.pop()
    ids = _ids(metadata, len(kinds), kind, origin)
    for id_ in {ids.get("bos_token"), ids.get("eos_token")} - {None}:  # llama.cpp too takes them for control tokens
        kinds[id_] = CONTROL
    pieces = [Piece(t, float(s), k) for t, s, k in zip(tokens, columns.get("scores", [0.0] * len(tokens)), kinds, strict=False)]
    if len({piece.text for piece in pieces}) < len(pieces) or any(not piece.text for piece in pieces):
        seen: set[str] = {""}
        twice = next(piece.text for piece in pieces if piece.text in seen or seen.add(piece.text))
        raise UserError(f"{origin}: {KEY}tokens holds {twice!r:.100} " + ("twice" if twice else "(a token of no text)"))
    pre = metadata.get(f"{KEY}pre")
    add_bos = bool(metadata.get(f"{KEY}add_bos_token", kind == "llama" or ALIASES.get(pre, pre) == "llama-bpe"))
    if metadata.get(f"{KEY}add_eos_token"):
        print(f"{origin}: asks for eos after a text ({KEY}add_eos_token), which is not added: the text would end there")
    named = {name: pieces[id_].text for name, id_ in ids.items()}
    config = {"tokenizer_class": exporter.AS_WRITTEN, **named, "add_bos_token": add_bos, "add_eos_token": False}
    exporter._write_json(folder / "tokenizer_config.json", config)
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if kind == "llama":
        if missing := set(BYTES) - {piece.text for piece in pieces if piece.kind == BYTE}:
            raise UserError(f"{origin}: lacks the byte token {min(missing)}, which a tokenizer of kind 'llama' needs")
        if kinds.count(UNKNOWN) != 1:
            raise UserError(f"{origin}: has {kinds.count(UNKNOWN)} unknown tokens; a tokenizer of kind 'llama' has one")
        prefix = bool(metadata.get(f"{KEY}add_space_prefix", True))
        (folder / "tokenizer.model").write_bytes(_sentencepiece(pieces, ids, prefix))
    else:
        exporter._write_json(folder / "tokenizer.json", _tokenizer_json(pieces, columns["merges"], named, add_bos, pre, origin))
    try:
        tokenizer = tokenizer_lib.load(folder)
    except UserError as error:
        raise UserError(f"{origin}: its tokenizer is damaged: {str(error).replace(f'{folder}', '').lstrip('/')}") from None
    if [tokenizer.bos_id, tokenizer.eos_id] != [ids.get("bos_token", -1), ids.get("eos_token", -1)]:
        raise UserError(f"{origin}: its bos and eos, {named}, are not single control tokens")
    return tokenizer


def _ids(metadata: Mapping[str, object], n: int, kind: str, origin: str) -> dict[str, int]:
    """Name in tokenizer_config.json -> id. llama.cpp's defaults hold for the kind 'llama' alone."""
    usual = {"bos_token": 1, "eos_token": 2, "unk_token": 0} if kind == "llama" else {}
    ids = {name: metadata.get(KEY + key, usual.get(name)) for name, key in _IDS.items()}
    ids = {name: id_ for name, id_ in ids.items() if id_ is not None}
    for name, id_ in ids.items():
        if type(id_) is not int or not 0 <= id_ < n:
            raise UserError(f"{origin}: {KEY}{_IDS[name]} is {id_!r:.100}, and there are {n:,} tokens")
    return ids


def _sentencepiece(pieces: Iterable[Piece], ids: Mapping[str, int], prefix: bool) -> bytes:
    """A SentencePiece model. The numbers are those of sentencepiece_model.proto."""
    pieces = list(pieces)
    texts = {"unk_token": 45, "bos_token": 46, "eos_token": 47, "pad_token": 48}
    numbers = {"unk_token": 40, "bos_token": 41, "eos_token": 42, "pad_token": 43}
    trainer = _message({3: exporter.BPE, 4: len(pieces), 35: 1})
    trainer += _message({numbers[name]: ids.get(name, (1 << 64) - 1) for name in numbers})  # -1: no such piece
    trainer += _message({texts[name]: pieces[id_].text for name, id_ in ids.items()})
    normalizer = _message({1: "identity", 3: int(prefix), 4: 0, 5: 1})
    each = b"".join(_message({1: _message({1: p.text, 2: p.score, 3: p.kind})}) for p in pieces)
    return each + _message({2: trainer, 3: normalizer})


def _message(fields: Mapping[int, int | float | str | bytes]) -> bytes:
    """A protobuf message of numbers, fp32 and texts."""

    def varint(n: int) -> bytes:
        return bytes([n & 0x7F | 0x80]) + varint(n >> 7) if n > 0x7F else bytes([n])

    out = b""
    for field, value in fields.items():
        if isinstance(value, int):
            out += varint(field << 3) + varint(value)
        elif isinstance(value, float):
            out += varint(field << 3 | 5) + struct.pack("<f", value)
        else:
            value = value.encode() if isinstance(value, str) else value
            out += varint(field << 3 | 2) + varint(len(value)) + value
    return out


def _tokenizer_json(
    pieces: list[Piece], merges: list[str], named: Mapping[str, str], add_bos: bool, pre: object, origin: str
) -> dict:
    """The contents of tokenizer.json for byte-level BPE."""
    name = ALIASES.get(pre, pre) if isinstance(pre, str | None) else pre
    if name not in PRE:
        raise UserError(f"{origin}: {KEY}pre is {pre!r:.100}; only {', '.join(PRE)} can be read")
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    vocabulary = {piece.text: i for i, piece in enumerate(pieces)}
    bos = named.get("bos_token")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": piece.text, **flags, "special": piece.kind in (CONTROL, UNKNOWN)}
            for i, piece in enumerate(pieces)
            if piece.kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                *({**split, "pattern": {"Regex": regex}} for regex in PRE[name]),
                {**level, "use_regex": False},
            ],
        },
        "post_processor": exporter._bos_template(bos, vocabulary[bos]) if add_bos and bos else None,
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": name in WHOLE_WORDS,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
