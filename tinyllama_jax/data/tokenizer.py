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
from tinyllama_jax.data import hf_tokenizer

SPACE = "▁"  # U+2581, which stands for a space within SentencePiece's pieces
PART = 2_048  # characters: encoding slows down with the length of a text (by a fifth at 16 k), and takes 50 bytes a character
LONGEST = 1 << 20  # characters of a part at most; longer text is cut, if possible at white space, and ids may change there
WINDOW = 32  # characters looked at on each side of a cut
# other files of a folder, on which no id depends, but which the model's users need
BESIDE = ("chat_template*", "additional_chat_templates/*.jinja", "generation_config.json", "vocab.json", "merges.txt")


# the keys read here of tokenizer_config.json, special_tokens_map.json, tokenizer.json and a run's data.json
class Token(typing.TypedDict, total=False):
    content: typing.Required[str]
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class Added(typing.TypedDict):
    content: str
    id: Count


class Named(typing.TypedDict, total=False):
    bos_token: str | Token | None
    eos_token: str | Token | None
    unk_token: str | Token | None
    pad_token: str | Token | None
    additional_special_tokens: list[str | Token] | None


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

    ids: dict[str, int]  # of every token listed in one of the files
    added: dict[int, tuple[Token, str]]  # tokens that tokenizer.json does not list, each with the file that lists it
    tokens: dict[str, str | None]  # bos_token and eos_token, where a file names them
    begin_with_bos: bool  # whether a text gets bos in front
    whole: bool  # whether there is a tokenizer.json, so that `ids` is complete


NAMING = {"tokenizer_config.json": Config, "special_tokens_map.json": Named, "added_tokens.json": dict[str, Count]}


def naming(folder: Path, main: str = "tokenizer.json") -> Naming:
    """The tokens that the files of `folder` define. Raises UserError naming two files that disagree.

    As in Transformers, special_tokens_map.json overrules tokenizer_config.json unless that has `added_tokens_decoder`, and the
    post-processor of tokenizer.json overrules `add_bos_token`.
    """
    read = lambda name, kind: read_json(folder / name, kind) if (folder / name).is_file() else {}
    config, mapped, added = (read(*each) for each in NAMING.items())
    whole = read(main, Json) if main.endswith(".json") else {}
    named = config if "added_tokens_decoder" in config else {**config, **mapped}
    text = lambda token: token["content"] if isinstance(token, dict) else token
    tokens = {name: text(named[name]) for name in ("bos_token", "eos_token") if name in named}
    values = [named[name] for name in Named.__annotations__ if named.get(name)]
    special = {text(token) for value in values for token in (value if isinstance(value, list) else [value])}
    vocabulary = whole["model"]["vocab"] if whole else {}
    ids = {piece: i for i, (piece, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else dict(vocabulary)
    ids |= {token["content"]: token["id"] for token in whole.get("added_tokens", ())}
    llama = (config.get("tokenizer_class") or "").startswith(("Llama", "CodeLlama"))
    extra, origin = {}, dict.fromkeys(ids, main)
    contents = {id_: content for content, id_ in ids.items()}
    listed = [("tokenizer_config.json", token, id_) for id_, token in config.get("added_tokens_decoder", {}).items()]
    for content, id_ in added.items():
        token = {"content": content, "special": content in special, "normalized": content not in special}
        listed.append(("added_tokens.json", token, id_))
    for file, token, id_ in listed:
        content = token["content"]
        if ids.setdefault(content, id_) != id_ or contents.setdefault(id_, content) != content:
            other = content if ids[content] != id_ else contents[id_]
            what = f"{other!r} the id {ids[other]}, and {file} gives {content!r} the id {id_}"
            raise UserError(f"{folder}: {origin[other]} gives {what}; keep the file that is right")
        if origin.setdefault(content, file) != main:
            extra[id_] = token, file
    if llama:  # the defaults of its class
        tokens = {name: t for name, t in (("bos_token", "<s>"), ("eos_token", "</s>")) if t in ids or not whole} | tokens
    bos = tokens.get("bos_token")
    begin = bool(bos) and hf_tokenizer.puts_in_front(whole.get("post_processor"), bos)
    return Naming(ids, extra, tokens, begin if whole else bool(config.get("add_bos_token", llama)), bool(whole))


def load(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`: a SentencePiece file, or a folder with tokenizer.model or (Hugging Face) tokenizer.json.

    A folder that adds tokens to its tokenizer.model, or names another bos or eos, is read as Transformers would: its
    tokenizer.json if it has one. Raises UserError if there is no tokenizer, if it cannot be read, or if its files disagree.
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
            if spm.agrees(naming(path)):
                return spm
    return HuggingFaceTokenizer(files[0], path)


def documents_begin_with_bos(folder: Path) -> bool:
    """Whether bos stands before each document: as the data of a run had it, else as the tokenizer's files say.

    `folder`: a run, or one of Hugging Face's.
    """
    if (folder / "data.json").is_file():
        return any(source["bos"] for source in read_json(folder / "data.json", list[Source]))
    return naming(folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder).begin_with_bos


class Tokenizer:
    """What the two kinds have in common. Can be pickled. An id of -1 says that the tokenizer has no such token.

    path: the file it came from      sha256: of all that its ids depend on      vocab_size: one more than the largest id
    """

    vocab_size: int
    bos_id: int
    eos_id: int

    def __init__(self, path: Path, folder: Path | None = None):
        with open_regular(path) as f:
            self._content = f.read()
        self.path, self._folder = path, folder
        self.sha256 = hashlib.sha256(self._content).hexdigest()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_content"}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos. A control token spelt out in the text ("</s>") is text like any other."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, on one thread."""
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; control tokens have none. Raises IndexError on an id outside the vocabulary."""
        raise NotImplementedError

    def parts(self, texts: Iterable[str]) -> Iterator[str]:
        """Parts of the document "".join(texts) whose ids, one after another, are those of the whole document.

        With SentencePiece they have about `PART` characters, where the text and the vocabulary allow it. None is empty. A part
        never has more than `LONGEST`: a longer one is cut even if that changes ids.
        """
        rest = ""
        for text in texts:
            rest, at = rest + text, 0
            while len(rest) - at > LONGEST:
                end = at + LONGEST
                at, start = max(rest.rfind("\n", at + 1, end), rest.rfind(" ", end - PART, end), 0) or end, at
                yield rest[start:at]
            rest = rest[at:]
        if rest:
            yield rest

    def files(self) -> dict[str, Path]:
        """The files to copy, by name in a folder: those that `load` needs for the same tokenizer, and those that users need."""
        both = {name: self._folder / name for name in ("tokenizer.model", "tokenizer.json", *NAMING)} if self._folder else {}
        others = (
            {str(p.relative_to(self._folder)): p for glob in BESIDE for p in self._folder.glob(glob)} if self._folder else {}
        )
        return {name: p for name, p in (both | others).items() if p.is_file()} | {self.name: self.path}

    def save(self, folder: str | Path) -> None:
        """Writes a new folder that `load` reads; it appears when it is whole. Raises UserError if it exists."""
        folder = Path(folder)
        if folder.exists():
            raise UserError(f"{folder}: exists already; a tokenizer is saved into a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.partial-", dir=folder.parent) as partial:
            inner = Path(partial) / "tokenizer"
            self.copy(inner)
            os.rename(inner, folder)

    def copy(self, folder: Path) -> None:
        """Copies `files` into a folder, which is made if absent."""
        for name, file in self.files().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)

    def export(self, folder: Path, add_bos: bool, seq_len: int) -> None:
        """Copies `files` into a folder, changed so that Transformers gives the ids of `encode`, after bos if `add_bos`.

        Raises UserError if no tokenizer.json can give these ids.
        """
        raise NotImplementedError


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model of any type."""

    name = "tokenizer.model"

    def __init__(self, path: Path, folder: Path | None = None):
        super().__init__(path, folder)
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(self._content)
        except RuntimeError:
            raise UserError(f"{path}: is not a SentencePiece model") from None
        self.vocab_size, self.bos_id, self.eos_id = self._sp.vocab_size(), self._sp.bos_id(), self._sp.eos_id()
        self._dummy_prefix = self._sp.normalize("a").startswith(SPACE)
        self._can_cut = self._merges_stop_at_spaces()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._sp.encode(texts, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        return self._sp.decode([int(i) for i in ids])

    def agrees(self, named: Naming) -> bool:
        """Whether the JSON files beside the model list no other tokens, and name no other bos and eos."""
        pieces = dict(zip(self._sp.id_to_piece(list(range(self.vocab_size))), range(self.vocab_size), strict=True))
        mine = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        listed = named.ids == pieces if named.whole else named.ids.items() <= pieces.items()
        return listed and all(pieces.get(token, -1) == mine[name] for name, token in named.tokens.items())

    def export(self, folder: Path, add_bos: bool, seq_len: int) -> None:
        self.copy(folder)
        hf_tokenizer.write(self.path, folder, add_bos, seq_len)

    def parts(self, texts: Iterable[str]) -> Iterator[str]:
        if not self._can_cut:
            yield from super().parts(texts)
            return
        rest = ""
        for text in texts:
            rest += text
            if len(rest) < 2 * PART:
                continue
            start = 0
            while True:
                cut = self._cut(rest, start + PART, start + LONGEST + 1)
                if cut < 0 and len(rest) - start <= LONGEST + WINDOW:
                    break
                if cut < 0:  # no clean place: a piece may be cut in two here
                    cut = max(rest.rfind("\n", start + PART, start + LONGEST), 0) or start + LONGEST
                yield rest[start:cut]
                # encoding adds the space again, as the dummy prefix
                start = cut + (self._dummy_prefix and rest[cut] == " ")
            rest = rest[start:]
        if rest:
            yield rest

    def _merges_stop_at_spaces(self) -> bool:
        """Whether nothing is merged across the edge between a character and a space after it.

        True for BPE (its scores are whole numbers: ranks of merges) if no piece has a space after another character. Unigram
        models add up scores over the whole text, so that a cut can change their rounding.
        """
        ids = list(range(self.vocab_size))
        return (
            self._sp.piece_to_id(SPACE) != self._sp.unk_id()  # unknown characters in a row become one token
            and all(score.is_integer() for score in self._sp.get_score(ids))
            and not any(c in piece.lstrip(SPACE) for piece in self._sp.id_to_piece(ids) for c in (SPACE, " "))
        )

    def _cut(self, text: str, start: int, end: int) -> int:
        """The first place in [start, end) where `text` can be cut before a space; -1 if there is none.

        The model's own normalisation, looked at in a window, must not reach across the cut, and must leave one space there.
        """
        end = min(end, len(text) - WINDOW)
        at = text.find(" ", start, end)
        while at >= 0:
            before = self._sp.normalize(text[at - WINDOW : at])
            after = self._sp.normalize(text[at + self._dummy_prefix : at + WINDOW])
            clean = before and not before.endswith(SPACE) and after.startswith(SPACE)
            if clean and self._sp.normalize(text[at - WINDOW : at + WINDOW]) == before + after:
                return at
            at = text.find(" ", at + 1, end)
        return -1


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, or a tokenizer.model converted to one, with the tokens that the files beside it add and name."""

    def __init__(self, path: Path, folder: Path | None = None):
        try:
            import tokenizers  # only who brings such a tokenizer needs it
        except ImportError:
            raise UserError(f"{path}: reading a Hugging Face tokenizer takes `pip install tokenizers`") from None
        super().__init__(path, folder or path.parent)
        self.name = "tokenizer.model" if path.suffix == ".model" else "tokenizer.json"
        names, content = {}, self._content
        if path.suffix == ".model":
            model = hf_tokenizer.read(path)
            names = {n: model.pieces[i].text for n, i in (("bos_token", model.bos_id), ("eos_token", model.eos_id)) if i >= 0}
            content = json.dumps(hf_tokenizer.tokenizer_json(model, add_bos=False)).encode()
        try:
            self._hf = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path}: is not a Hugging Face tokenizer: {str(error).splitlines()[0]}") from None
        if dropout := getattr(self._hf.model, "dropout", None):
            raise UserError(f"{path}: has a dropout of {dropout:g}, so that a text has other ids each time; set it to null")
        self._hf.no_truncation()
        self._hf.no_padding()
        self._hf.encode_special_tokens = True  # as text
        named = naming(path.parent, path.name)
        for id_, (token, file) in sorted(named.added.items()):
            self._hf.add_tokens([tokenizers.AddedToken(**token)])  # it gets the next free id, as in Transformers
            if (got := self._hf.token_to_id(token["content"])) != id_:
                what = f"{file} gives {token['content']!r} the id {id_}, and beside {path.name} it is {got}"
                raise UserError(f"{path.parent}: {what}; keep the file that is right")
        names |= named.tokens
        for name, token in names.items():
            if token is not None and self._hf.token_to_id(token) is None:
                raise UserError(f"{path.parent}: {name} is {token!r}, which {path.name} does not have; name one that it has")
        self._names = [names.get(name) for name in ("bos_token", "eos_token")]
        self.vocab_size = max(self._hf.get_vocab().values()) + 1
        self.bos_id, self.eos_id = (-1 if token is None else self._hf.token_to_id(token) for token in self._names)
        self._whole = path.suffix == ".json" and not named.added  # tokenizer.json lists every token
        # a hash of all that ids, bos and eos depend on, and so not of the post-processor, which an export may change
        parts = json.loads(content if self._whole else self._hf.to_str())
        parts = {key: value for key, value in parts.items() if key not in ("post_processor", "truncation", "padding")}
        self.sha256 = hashlib.sha256(json.dumps([parts, self._names], sort_keys=True).encode()).hexdigest()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._hf.encode_special_tokens = True  # the one setting that the library does not pickle

    def export(self, folder: Path, add_bos: bool, seq_len: int) -> None:
        if add_bos and self.bos_id < 0:
            raise UserError(f"{self.path}: names no bos, but the data was written with one in front of each document")
        self.copy(folder)
        bos, eos = self._names
        content = read_json(self.path, dict) if self._whole else json.loads(self._hf.to_str())
        hf_tokenizer.rewrite(folder, content, bos and (bos, self.bos_id), eos, add_bos)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._hf.encode(text, add_special_tokens=False).ids for text in texts]

    def decode(self, ids: list[int]) -> str:
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise IndexError(f"ids must lie in [0, {self.vocab_size})")
        return self._hf.decode([int(i) for i in ids])
