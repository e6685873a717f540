"""Text to token ids and back, with a SentencePiece model or a Hugging Face tokenizer.json."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import Count, open_regular, read_json

SPACE = "▁"  # U+2581, which stands for a space within SentencePiece's pieces
PART = 2_048  # characters of a part: longer ones encode more slowly (by a fifth at 16 k) and take 50 bytes a character
LONGEST = 1 << 20  # most characters of a part; a longer text is cut, at white space if possible, and ids may change there
WINDOW = 32  # characters examined on each side of a cut
# files in a tokenizer's folder that ids do not depend on, but that users of the model need
BESIDE = ("chat_template*", "additional_chat_templates/*.jinja", "generation_config.json", "vocab.json", "merges.txt")


# the keys that are read from tokenizer_config.json, special_tokens_map.json, tokenizer.json and a run's data.json
class Token(typing.TypedDict):
    content: str


class Added(Token):
    id: Count


NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Named = typing.TypedDict("Named", dict.fromkeys(NAMES, "str | Token | None"), total=False)


class Config(Named, total=False):
    tokenizer_class: str | None
    add_bos_token: bool | None
    added_tokens_decoder: dict[Count, Token]


class Model(typing.TypedDict):
    vocab: dict[str, Count] | list[tuple[str, float]]


class Processor(typing.TypedDict, total=False):
    processors: list[Processor]
    single: list[dict[str, dict]]
    cls: tuple[str, Count]


class Json(typing.TypedDict, total=False):
    model: typing.Required[Model]
    added_tokens: list[Added]
    post_processor: Processor | None


class Source(typing.TypedDict):
    bos: bool


class Naming(typing.NamedTuple):
    """The tokens that the JSON files of a folder define, read as Transformers 5 reads them."""

    ids: dict[str, int] | None  # every token of tokenizer.json; None if there is no such file
    listed: list[tuple[str, str, int]]  # (file, token, id) of the tokens that the other files list
    tokens: dict[str, str | None]  # bos_token and eos_token, if a file names them
    special: dict[str, str]  # each of `NAMES` that a file names
    begin_with_bos: bool  # whether each text begins with bos


NAMING = {"tokenizer_config.json": Config, "special_tokens_map.json": Named, "added_tokens.json": dict[str, Count]}


def naming(folder: Path, main: str = "tokenizer.json") -> Naming:
    """The tokens that the files of `folder` define. Raises UserError for a file that is damaged.

    As in Transformers, special_tokens_map.json overrules tokenizer_config.json unless that has `added_tokens_decoder`, and the
    post-processor of tokenizer.json overrules `add_bos_token`.
    """
    read = lambda name, kind: read_json(folder / name, kind) if (folder / name).is_file() else {}
    config, mapped, added = (read(*each) for each in NAMING.items())
    whole = read(main, Json)
    named = config if "added_tokens_decoder" in config else {**config, **mapped}
    text = lambda token: token["content"] if isinstance(token, dict) else token
    tokens = {name: text(named[name]) for name in ("bos_token", "eos_token") if name in named}
    vocabulary = whole["model"]["vocab"] if whole else {}
    ids = {piece: i for i, (piece, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else dict(vocabulary)
    ids |= {token["content"]: token["id"] for token in whole.get("added_tokens", ())}
    decoder = config.get("added_tokens_decoder", {}).items()
    listed = [("tokenizer_config.json", token["content"], id_) for id_, token in decoder]
    listed += [("added_tokens.json", token, id_) for token, id_ in added.items()]
    llama = (config.get("tokenizer_class") or "").startswith(("Llama", "CodeLlama"))
    if llama:  # the defaults of its class
        tokens = {name: t for name, t in (("bos_token", "<s>"), ("eos_token", "</s>")) if t in ids or not whole} | tokens
    bos = tokens.get("bos_token")
    begin = bool(bos) and puts_in_front(whole.get("post_processor"), bos)
    special = {name: text(named[name]) for name in NAMES if named.get(name)} | {name: t for name, t in tokens.items() if t}
    return Naming(ids if whole else None, listed, tokens, special, begin if whole else bool(config.get("add_bos_token", llama)))


def puts_in_front(processor: dict | None, token: str) -> bool:
    """Whether the post-processor of a tokenizer.json puts `token` before a text."""
    each = processors(processor)
    first = [[*p.get("single", ()), {}][0].get("SpecialToken", {}).get("id") for p in each]
    return token in first or token in [p["cls"][0] for p in each if "cls" in p]


def processors(processor: dict | None) -> list[dict]:
    """The parts of the post-processor of a tokenizer.json, in order."""
    return processor.get("processors", [processor]) if processor else []


def _disagreement(named: Naming, ids: dict[str, int], main: str) -> str | None:
    """The first listed token that `main`, with the tokens `ids`, lacks or numbers otherwise; None if all agree."""
    for file, token, id_ in named.listed:
        if ids.get(token) != id_:
            other = f"gives it the id {ids[token]}" if token in ids else "does not have it"
            return f"{file} gives {token!r} the id {id_}, and {main} {other}"
    return None


def load(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`: a SentencePiece file, or a folder with tokenizer.model or (Hugging Face) tokenizer.json.

    A folder with both is read as SentencePiece if both have the same tokens, bos and eos, and from tokenizer.json otherwise.
    Raises UserError if there is no tokenizer, if it cannot be read, or if its files disagree.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such tokenizer; give a SentencePiece .model file or a folder with a tokenizer")
    if not path.is_dir():
        return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)
    files = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
    if not files:
        raise UserError(f"{path}: holds neither tokenizer.model (SentencePiece) nor tokenizer.json (Hugging Face)")
    if files[-1].suffix == ".model":
        try:
            spm = SentencePieceTokenizer(files[-1], path)
        except UserError:  # TikToken's files have the same name
            if len(files) == 1:
                raise
        else:
            if (difference := spm.difference(naming(path))) is None:
                return spm
            if len(files) == 1:
                remedy = "add the tokenizer.json that Transformers' save_pretrained writes"
                raise UserError(f"{path}: {difference}; {remedy}")
    return HuggingFaceTokenizer(files[0], path)


def documents_begin_with_bos(folder: Path) -> bool:
    """Whether each document begins with bos: as the data of a run say, otherwise as the tokenizer's files say.

    `folder`: a run folder or a Hugging Face folder.
    """
    if (folder / "data.json").is_file():
        return any(source["bos"] for source in read_json(folder / "data.json", list[Source]))
    return naming(folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder).begin_with_bos


class Tokenizer:
    """Base class of the two kinds. Can be pickled. An id of -1 means that the tokenizer has no such token.

    path: the file it was read from      folder: with its other files, or None      vocab_size: largest id + 1
    sha256: hash of everything that ids depend on
    """

    vocab_size: int
    bos_id: int
    eos_id: int

    def __init__(self, path: Path, folder: Path | None = None):
        with open_regular(path) as f:
            self._content = f.read()
        self.path, self.folder = path, folder
        self.sha256 = hashlib.sha256(self._content).hexdigest()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_content"}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos. A control token written out in the text ("</s>") is encoded as plain text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, on one thread."""
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; control tokens give no text. Raises IndexError for an id outside the vocabulary."""
        raise NotImplementedError

    def pieces(self) -> list[str | None]:
        """The token of each id; None where there is none."""
        raise NotImplementedError

    def parts(self, texts: Iterable[str]) -> Iterator[str]:
        """Cuts the document "".join(texts) into parts whose ids, concatenated, are those of the whole document.

        With SentencePiece a part has about `PART` characters, if text and vocabulary allow it. No part is empty or longer than
        `LONGEST` + `WINDOW`: a longer document is cut even if that changes ids.
        """
        text = ""
        for more in texts:
            text, start = text + more, 0
            while (cut := self._next_cut(text, start)) > 0:
                yield text[start:cut]
                start = cut + (self._skips_space and text[cut] == " ")
            text = text[start:]
        if text:
            yield text

    _skips_space = False  # whether a part leaves out the space at its start, because encoding adds one

    def _next_cut(self, text: str, start: int) -> int:
        """Where to cut the part of `text` that begins at `start`; 0 if not yet."""
        end = start + LONGEST
        if len(text) <= end:
            return 0
        return max(text.rfind("\n", start + 1, end), text.rfind(" ", end - PART, end), 0) or end

    def files(self) -> dict[str, Path]:
        """Name in a new folder -> file to copy: what `load` needs to read the same tokenizer, and what users need."""
        globs = ("tokenizer.model", "tokenizer.json", *NAMING, *BESIDE) if self.folder else ()
        paths = [path for glob in globs for path in self.folder.glob(glob) if path.is_file()]
        return {str(path.relative_to(self.folder)): path for path in paths} | {self.name: self.path}

    def save(self, folder: str | Path) -> None:
        """Writes a new folder for `load`, which appears when it is complete. Raises UserError if it exists."""
        folder = Path(folder)
        if folder.exists():
            raise UserError(f"{folder}: exists already; a tokenizer is saved into a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.partial-", dir=folder.parent) as partial:
            inner = Path(partial) / "tokenizer"
            self.copy(inner)
            os.rename(inner, folder)

    def copy(self, folder: Path) -> None:
        """Copies `files` into a folder, created if absent."""
        for name, file in self.files().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model of any type."""

    name = "tokenizer.model"

    def __init__(self, path: Path, folder: Path | None = None):
        super().__init__(path, folder)
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(self._content)
            self._can_cut = self._merges_stop_at_spaces()
            self._skips_space = self._can_cut and self._sp.normalize("a").startswith(SPACE)  # the dummy prefix
            self._sp.decode([self._sp.unk_id()])
        except (RuntimeError, UnicodeDecodeError):  # a damaged piece, rule or text for unknown characters is not UTF-8
            raise UserError(f"{path}: is not a SentencePiece model") from None
        self.vocab_size, self.bos_id, self.eos_id = self._sp.vocab_size(), self._sp.bos_id(), self._sp.eos_id()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._sp.encode(texts, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        return self._sp.decode([*map(int, ids)])

    def pieces(self) -> list[str | None]:
        return self._sp.id_to_piece(list(range(self.vocab_size)))

    def difference(self, named: Naming) -> str | None:
        """How the tokens, bos or eos of the JSON files beside the model differ from the model's; None if they agree."""
        pieces = dict(zip(self._sp.id_to_piece(list(range(self.vocab_size))), range(self.vocab_size), strict=True))
        ours = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        if named.ids not in (None, pieces):
            return "tokenizer.json and tokenizer.model have different tokens"
        for name, token in named.tokens.items():
            if pieces.get(token, -1) != ours[name]:
                return f"{name} is {token!r}, and tokenizer.model has another {name}"
        return _disagreement(named, pieces, "tokenizer.model")

    def _next_cut(self, text: str, start: int) -> int:
        if not self._can_cut:
            return super()._next_cut(text, start)
        if len(text) - start < 2 * PART:
            return 0
        cut = self._cut(text, start + PART, start + LONGEST + 1)
        if cut < 0 and len(text) - start <= LONGEST + WINDOW:
            return 0
        if cut < 0:  # no clean place: this may cut a piece in two
            cut = max(text.rfind("\n", start + PART, start + LONGEST), 0) or start + LONGEST
        return cut

    def _merges_stop_at_spaces(self) -> bool:
        """Whether no merge joins a character with a space after it.

        True for BPE (whose scores are whole numbers, the ranks of merges) if no piece has a space after another character.
        Unigram models add up scores over the whole text, so a cut can change their rounding.
        """
        ids = list(range(self._sp.vocab_size()))
        return (
            self._sp.piece_to_id(SPACE) != self._sp.unk_id()  # unknown characters in a row become one token
            and all(score.is_integer() for score in self._sp.get_score(ids))
            and not any(c in piece.lstrip(SPACE) for piece in self._sp.id_to_piece(ids) for c in (SPACE, " "))
        )

    def _cut(self, text: str, start: int, end: int) -> int:
        """The first place in [start, end) where `text` can be cut before a space; -1 if there is none.

        In a window around the cut, the model's normalisation must not reach across the cut and must leave one space after it.
        """
        end = min(end, len(text) - WINDOW)
        at = text.find(" ", start, end)
        while at >= 0:
            before = self._sp.normalize(text[at - WINDOW : at])
            after = self._sp.normalize(text[at + self._skips_space : at + WINDOW])
            clean = before and not before.endswith(SPACE) and after.startswith(SPACE)
            if clean and self._sp.normalize(text[at - WINDOW : at + WINDOW]) == before + after:
                return at
            at = text.find(" ", at + 1, end)
        return -1


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, with the bos and eos that the files beside it name."""

    name = "tokenizer.json"

    def __init__(self, path: Path, folder: Path | None = None):
        try:
            import tokenizers  # an optional dependency
        except ImportError:
            raise UserError(f"{path}: reading a Hugging Face tokenizer needs `pip install tokenizers`") from None
        super().__init__(path, folder or path.parent)
        try:
            self._hf = tokenizers.Tokenizer.from_buffer(self._content)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path}: is not a Hugging Face tokenizer: {str(error).splitlines()[0]}") from None
        if dropout := getattr(self._hf.model, "dropout", None):
            raise UserError(f"{path}: has a dropout of {dropout:g}, so a text gets different ids each time; set it to null")
        self._hf.no_truncation()
        self._hf.no_padding()
        self._hf.encode_special_tokens = True  # as plain text
        named = naming(path.parent, path.name)
        if difference := _disagreement(named, self._hf.get_vocab(), path.name):
            raise UserError(f"{path.parent}: {difference}; keep the file that is right")
        for name, token in named.tokens.items():
            if token is not None and self._hf.token_to_id(token) is None:
                raise UserError(f"{path.parent}: {name} is {token!r}, which {path.name} does not have; name one that it has")
        self.names = [named.tokens.get(name) for name in ("bos_token", "eos_token")]
        if not (vocabulary := self._hf.get_vocab()):
            raise UserError(f"{path}: is empty: it has no tokens")
        self.vocab_size = max(vocabulary.values()) + 1
        self.bos_id, self.eos_id = (-1 if token is None else self._hf.token_to_id(token) for token in self.names)
        # a hash of everything that ids, bos and eos depend on: not of the post-processor, which an export may change
        parts = json.loads(self._content)
        parts = {key: value for key, value in parts.items() if key not in ("post_processor", "truncation", "padding")}
        self.sha256 = hashlib.sha256(json.dumps([parts, self.names], sort_keys=True).encode()).hexdigest()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._hf.encode_special_tokens = True  # the library does not pickle this setting

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._hf.encode(text, add_special_tokens=False).ids for text in texts]

    def decode(self, ids: list[int]) -> str:
        ids = [*map(int, ids)]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise IndexError(f"ids must lie in [0, {self.vocab_size})")
        return self._hf.decode(ids)

    def pieces(self) -> list[str | None]:
        return [self._hf.id_to_token(i) for i in range(self.vocab_size)]
