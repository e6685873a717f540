"""Retrieval: an index of passages of text (BM25, by the library `bm25s`), and the best passages for a question in a budget."""

import array
import bisect
import contextlib
import hashlib
import json
import logging
import re
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from tinyllama_jax.base import files
from tinyllama_jax.base.errors import UserError, readable
from tinyllama_jax.data.prepare import documents, inputs
from tinyllama_jax.data.prepare.inputs import Source

LEAST, MOST = 50, 120  # words of a passage, about 100 on average as in Karpukhin et al. 2020, arXiv:2004.04906
SHORTEST = 8  # words of a passage that is cut to fit; a shorter piece is left out
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Chinese and Japanese have no spaces: each sign is a word
WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]{{1,64}}|\W{{64}}")  # so that 120 words are never more than 15,000 characters
TERM = rf"[{CJK}]|[^\W{CJK}]{{2,}}"  # what is indexed, in lower case
STOP_WORDS = "english_plus"  # of bm25s: they tell nothing of what a question is about
# where a passage may end, the best first: a paragraph, a sentence, a line, a word, anywhere
ENDS = [re.compile(end) for end in (r"\n\s*\n", r"[.!?][\"')\]]*\s|[\u3002\uff01\uff1f]", r"\n", r"\s", r"\Z")]
HASHED = 1 << 28  # bytes of a file whose hash is checked when an index is opened, which takes a second a GB
FORMAT = 1
INDEX = "index.json"  # written last
TEXTS, STARTS = "passages.jsonl", "starts.npy"  # where each line of it begins, in bytes, and where the last one ends
REMEDY = "build it again with `python -m tinyllama_jax.retrieve build`"


class Passage(typing.NamedTuple):
    """A piece of a document."""

    text: str
    source: str  # its file, the numbers of the document in it and of the passage, and the document's title or URL if it has one
    score: float = 0.0


class _File(typing.TypedDict):
    bytes: files.Count
    sha256: str


class Record(typing.TypedDict):
    """What an index was made from: its index.json."""

    format: int
    bm25s: str  # its version
    documents: files.Count
    passages: files.Count
    copies: files.Count  # passages left out, since an earlier one has the same text
    without_text: files.Count  # rows left out, whose text is null
    other_files: files.Count  # left out, since they are of no known type
    inputs: dict[str, files.Count]  # file -> bytes
    files: dict[str, _File]


def package() -> ModuleType:
    """The library `bm25s`. Raises UserError if it is not installed. It asks JAX for its devices."""
    try:
        import bm25s
    except ImportError as error:
        raise UserError(f"retrieval needs bm25s ({error}): pip install '.[retrieve]'") from None
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG
    return bm25s


# -- the index ------------------------------------------------------------------------------------------------------------


def build(paths: Iterable[str | Path], output: str | Path, text_key: str = "text") -> Record:
    """Writes an index of the documents at `paths` (as for `prepare`, and .md) into a new folder; returns its record.

    Its memory grows with the text: see docs/retrieve.md. Raises UserError.
    """
    library, counts, starts = package(), Counter(), array.array("q")
    sources, others = inputs.find(paths, "DIR", (*inputs.KINDS, *inputs.MARKDOWN))
    counts.update({"documents": 0, "passages": 0, "copies": 0, "without_text": 0, "other_files": len(others)})
    with files.new(output) as folder:
        with (folder / TEXTS).open("wb") as f:
            written = _written(sources, text_key, f, starts, counts)
            terms = library.tokenize(written, token_pattern=TERM, stopwords=STOP_WORDS, show_progress=False)
            starts.append(f.tell())
        if not terms.vocab:
            raise UserError(f"DIR {' '.join(map(str, paths))}: holds no words to look for")
        bm25 = library.BM25()
        bm25.index(terms, create_empty_token=False, show_progress=False)
        bm25.save(folder, show_progress=False)
        np.save(folder / STARTS, np.frombuffer(starts, np.int64))
        described = lambda path: _File(bytes=path.stat().st_size, sha256=files.sha256(path))
        made = {name: described(folder / name) for name in files.listed(folder)}
        read = {source.name: source.size for source in sources}
        record = Record(format=FORMAT, bm25s=library.__version__, **counts, inputs=read, files=made)
        files.write(folder / INDEX, json.dumps(record, indent=1) + "\n")
    return record


def _written(
    sources: list[Source], text_key: str, file: typing.BinaryIO, starts: array.array, counts: Counter[str]
) -> Iterator[str]:
    """Writes every passage as a line of `file`, and yields its text. Appends to `starts`, and counts."""
    seen: set[bytes] = set()
    for source in sources:
        (piece,) = documents.pieces(source, documents.units(source, text_key), 1 << 62)
        dropped: Counter[str] = Counter()
        for number, document in enumerate(documents.read(piece, text_key, {}, dropped), 1):
            counts["documents"] += 1
            title = f": {document.title:.100}" if getattr(document, "title", "") else ""
            for i, text in enumerate(passages(document), 1):
                digest = hashlib.blake2b(text.encode(), digest_size=12).digest()
                if digest in seen:
                    counts["copies"] += 1
                    continue
                seen.add(digest)
                where = readable(" ".join(f"{source.name}, document {number:,}, passage {i:,}{title}".split()))
                starts.append(file.tell())
                file.write(json.dumps([text, where], ensure_ascii=False).encode() + b"\n")
                counts["passages"] += 1
                yield text
        counts["without_text"] += dropped.total()


def passages(document: Iterable[str]) -> Iterator[str]:
    """Cuts a document, given in parts, into passages of `LEAST` to `MOST` words; the last one may be shorter.

    Between these bounds it ends at the last match of the first pattern of `ENDS` that matches.
    """
    text = ""
    for part in document:
        text, start, k = text + part, 0, 0
        words = [match.span() for match in WORD.finditer(text)]
        while len(words) - k > MOST:
            window = words[k + LEAST - 1][1], words[k + MOST][0]
            end = next(ends[-1] for pattern in ENDS if (ends := [match.end() for match in pattern.finditer(text, *window)]))
            if passage := text[start:end].strip():
                yield passage
            start, k = end, bisect.bisect_left(words, (end,), k)
        text = text[start:]
    if passage := text.strip():
        yield passage


class Index:
    """An index on a disk, mapped into memory, that puts at most `k` passages of at most `tokens` tokens before a question."""

    def __init__(self, folder: str | Path, k: int = 3, tokens: int | None = None):
        """`tokens`: None: a quarter of the context. Raises UserError for a number out of range or an incomplete index."""
        for option, value in (("passages", k), ("retrieve-tokens", tokens)):
            if value is not None and not 1 <= value <= 1_000_000:
                raise UserError(f"--{option} {value}: must lie between 1 and 1,000,000")
        files.check_local("--retrieve", folder)
        library, self._folder, self.k, self.tokens = package(), Path(folder), k, tokens
        if not (self._folder / INDEX).is_file():
            raise UserError(f"--retrieve {folder}: is no index; make one with `python -m tinyllama_jax.retrieve build`")
        self.record = files.read_json(self._folder / INDEX, Record, REMEDY)
        self.sha256 = files.sha256(self._folder / INDEX)  # and so of all its files
        if self.record["format"] != FORMAT:
            raise UserError(f"--retrieve {folder}: has the format {self.record['format']}, and {FORMAT} is read; {REMEDY}")
        for name, file in self.record["files"].items():
            path = self._folder / name
            if not path.is_file() or (size := path.stat().st_size) != file["bytes"]:
                what = f"{size:,} bytes" if path.is_file() else "not there"
                raise UserError(f"{path}: is damaged ({what} instead of {file['bytes']:,} bytes); {REMEDY}")
            if size <= HASHED and files.sha256(path) != file["sha256"]:
                raise UserError(f"{path}: is damaged (another sha256 than when it was built); {REMEDY}")
        with self._intact():
            self._bm25 = library.BM25.load(self._folder, mmap=True, show_progress=False, backend="numpy")
            self._starts = np.load(self._folder / STARTS, mmap_mode="r")
            self._texts = np.memmap(self._folder / TEXTS, np.uint8, "r")

    def settings(self, context: int) -> dict:
        """The index and its limits, as recorded with scores."""
        return {"index": str(self._folder), "sha256": self.sha256, "passages": self.k, "tokens": self.tokens or context // 4}

    @contextlib.contextmanager
    def _intact(self) -> Iterator[None]:
        """Says of an error that the index is damaged: what its files hold is not trusted."""
        try:
            yield
        except Exception as error:  # bm25s and numpy check little, so a wrong byte can fail in any way
            what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"{self._folder}: is damaged ({what}); {REMEDY}") from None

    def search(self, query: str) -> list[Passage]:
        """The `k` best passages for `query`, the best first; fewer if no more have a word of it."""
        (terms,) = package().tokenize([query], token_pattern=TERM, stopwords=STOP_WORDS, return_ids=False, show_progress=False)
        if not terms:
            return []
        with self._intact():
            scores = self._bm25.get_scores(terms)
            # of equal scores the first passage: bm25s's own choice depends on the processor
            least = np.partition(scores, -min(self.k, len(scores)))[-min(self.k, len(scores))]
            best = np.flatnonzero((scores >= least) & (scores > 0))
            best = best[np.argsort(-scores[best], kind="stable")[: self.k]]
            return [self._passage(i)._replace(score=float(scores[i])) for i in best]

    def _passage(self, i: int) -> Passage:
        line = self._texts[self._starts[i] : self._starts[i + 1]].tobytes()
        return Passage(*files.decode_json(line, tuple[str, str]))

    def before(self, query: str, count: Callable[[list[Passage]], int], room: int, context: int) -> list[Passage]:
        """The passages to put before a question. They may be none.

        `count`: the tokens of the whole prompt with the given passages; it may have at most `room`. What the passages add to it
        is at most `tokens`, or a quarter of `context`. The first passage that does not fit is cut at a word, and ends the list.
        """
        most = min(room, count([]) + (self.tokens or context // 4))
        out: list[Passage] = []
        for passage in self.search(query):
            if count([*out, passage]) > most:
                ends = [match.end() for match in WORD.finditer(passage.text)]
                shorter = lambda n, passage=passage, ends=ends: passage._replace(text=f"{passage.text[: ends[n - 1]]} ...")
                fits = lambda n, shorter=shorter: count([*out, shorter(n)]) <= most
                n = bisect.bisect_left(range(SHORTEST, len(ends)), True, key=lambda n, fits=fits: not fits(n)) + SHORTEST - 1
                return [*out, shorter(n)] if n >= SHORTEST else out
            out.append(passage)
        return out


# -- a prompt -------------------------------------------------------------------------------------------------------------


def block(passages: list[Passage]) -> str:
    """The text that stands before a question; "" without passages."""
    return "".join(["Context:\n", *(f"[{i}] {p.text}\n\n" for i, p in enumerate(passages, 1))]) if passages else ""


def asked(question: str, passages: list[Passage]) -> str:
    """A question as the text of a message, with its passages."""
    return f"{block(passages)}Question: {question}" if passages else question


def sources(passages: list[Passage]) -> str:
    """A numbered line for each passage: where it is from, and its score."""
    return "\n".join(f"[{i}] {p.source} (score {p.score:.1f})" for i, p in enumerate(passages, 1))
