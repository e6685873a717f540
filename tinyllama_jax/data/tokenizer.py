"""Text to token ids and back, with a SentencePiece model or a Hugging Face tokenizer.json."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from tinyllama_jax.errors import UserError, read_json

SPACE = "▁"  # U+2581, which stands for a space within SentencePiece's pieces
PART = 2_048  # characters: encoding slows down with the length of a text (by a fifth at 16 k), and takes 50 bytes a character
LONGEST = 1 << 20  # characters of a part at most; a longer one is cut, where ids may change: at white space if there is some
WINDOW = 32  # characters looked at on each side of a cut
# what a Hugging Face tokenizer folder may hold; the first is the tokenizer, the others name bos and eos
HUGGING_FACE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def load(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`: a SentencePiece file, or a folder with tokenizer.model or (Hugging Face) tokenizer.json.

    Raises UserError if there is none, or if the file is something else.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such tokenizer; give a SentencePiece .model file or a folder with a tokenizer")
    if path.is_dir():
        files = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
        if not files:
            raise UserError(f"{path}: holds neither tokenizer.model (SentencePiece) nor tokenizer.json (Hugging Face)")
        path = files[0]
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


class Tokenizer:
    """What the two kinds have in common. Can be pickled. An id of -1 says that the tokenizer has no such token.

    path: the file it came from      sha256: of that file's bytes      vocab_size: one more than the largest id
    """

    vocab_size: int
    bos_id: int
    eos_id: int

    def __init__(self, path: Path):
        self.path = path
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

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
        of more than `LONGEST` is cut whatever comes of it.
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

    def files(self) -> list[Path]:
        """What has to be copied for `load` to give the same tokenizer."""
        return [self.path]

    def save(self, folder: str | Path) -> None:
        """Writes a new folder that `load` reads; it appears when it is whole. Raises UserError if it exists."""
        folder = Path(folder)
        if folder.exists():
            raise UserError(f"{folder}: exists already; a tokenizer is saved into a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.partial-", dir=folder.parent) as partial:
            inner = Path(partial) / "tokenizer"
            inner.mkdir()
            for file in self.files():
                shutil.copyfile(file, inner / self._name_in_folder(file))
            os.rename(inner, folder)

    def _name_in_folder(self, file: Path) -> str:
        return file.name


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model of any type."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError:
            raise UserError(f"{path}: is not a SentencePiece model") from None
        self.vocab_size, self.bos_id, self.eos_id = self._sp.vocab_size(), self._sp.bos_id(), self._sp.eos_id()
        self._dummy_prefix = self._sp.normalize("a").startswith(SPACE)
        self._can_cut = self._merges_stop_at_spaces()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._sp.encode(texts, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        return self._sp.decode([int(i) for i in ids])

    def _name_in_folder(self, file: Path) -> str:
        return "tokenizer.model"

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
                if cut < 0:  # the model's own pieces may be cut in two
                    cut = max(rest.rfind("\n", start + PART, start + LONGEST), 0) or start + LONGEST
                yield rest[start:cut]
                # encoding puts a space back
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
    """A tokenizer.json; bos and eos are what tokenizer_config.json or special_tokens_map.json beside it say."""

    def __init__(self, path: Path):
        try:
            import tokenizers  # only who brings such a tokenizer needs it
        except ImportError:
            raise UserError(f"{path}: reading a Hugging Face tokenizer takes `pip install tokenizers`") from None
        super().__init__(path)
        try:
            self._hf = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path}: is not a Hugging Face tokenizer: {str(error).splitlines()[0]}") from None
        self._hf.no_truncation()
        self._hf.no_padding()
        self._hf.encode_special_tokens = True  # as text
        self.vocab_size = max(self._hf.get_vocab().values()) + 1
        self.bos_id, self.eos_id = self._id_of("bos_token"), self._id_of("eos_token")

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._hf.encode_special_tokens = True  # the one setting that the library does not pickle

    def _id_of(self, name: str) -> int:
        for file in self.files()[1:]:
            token = read_json(file).get(name)
            if token is not None:
                found = self._hf.token_to_id(token["content"] if isinstance(token, dict) else str(token))
                return -1 if found is None else found
        return -1

    def files(self) -> list[Path]:
        beside = [self.path.with_name(name) for name in HUGGING_FACE[1:]]
        return [self.path, *(file for file in beside if file.is_file())]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._hf.encode(text, add_special_tokens=False).ids for text in texts]

    def decode(self, ids: list[int]) -> str:
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise IndexError(f"ids must lie in [0, {self.vocab_size})")
        return self._hf.decode([int(i) for i in ids])
