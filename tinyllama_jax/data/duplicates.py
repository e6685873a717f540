"""Which documents are copies, or nearly, of an earlier one: exact keys, MinHash bands, and a sketch that says how alike.

Exact: the same text but for the kind and number of white space, and canonical equivalence (Unicode NFC).
Nearly: the sets of 5-grams of words have a Jaccard similarity of at least the threshold. Words are lower case, without
punctuation; a character of a script that is written without spaces counts as a word. Candidates share a band of MinHashes
(Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3). They are compared by all 5-grams of documents that have
no more than `SKETCH` distinct ones, and by the `SKETCH` least of their hashes otherwise: so a document's similarity is exact
up to 4,096 5-grams, with an error of up to sqrt(0.25 / 4,096) = 0.008 (standard deviation) beyond.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from tinyllama_jax.config import UserError
from tinyllama_jax.data.clean import chunks

METHODS = ("exact", "minhash")
THRESHOLD = 0.8
N = 5  # words in a shingle
PERMUTATIONS = 256
RECALL = 0.99  # least share of the pairs at the threshold that come to be compared
SKETCH = 4_096
FIRST = 8  # documents of a bucket that the others are compared to: the earliest
ROW = np.dtype([("key", "u8"), ("same", "u8"), ("doc", "u8")])
PAIR = np.dtype([("doc", "u8"), ("of", "u8"), ("sure", "?")])
# Chinese, Japanese, Thai, Lao, Burmese, Khmer
_NO_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_WORD = re.compile(f"[{_NO_SPACES}]|[^\\W{_NO_SPACES}]+")
_SPACE = re.compile(r"\s")
# odd numbers by which hashes are multiplied and added up
_ODD = np.random.RandomState(0).randint(1 << 62, size=max(N, PERMUTATIONS), dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def bands(threshold: float) -> tuple[int, int]:
    """(bands, rows in each): the most rows with which pairs at the threshold share a band with probability `RECALL`."""
    rows = max(r for r in range(1, PERMUTATIONS + 1) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= RECALL or r == 1)
    return PERMUTATIONS // rows, rows


def check(method: str, threshold: float | None) -> float:
    """The threshold. Raises UserError on one that is impossible, or of no use, and if a library is missing."""
    if method not in ("", *METHODS):
        raise UserError(f"--dedup {method}: must be one of {' '.join(METHODS)}")
    if threshold is not None and method != "minhash":
        raise UserError(f"--dedup-threshold {threshold}: is for --dedup minhash")
    if method == "minhash":
        _minhash()
    threshold = THRESHOLD if threshold is None else threshold
    if not 0.5 <= threshold <= 0.99:
        raise UserError(f"--dedup-threshold {threshold}: must be from 0.5 to 0.99")
    return threshold


def look(method: str, threshold: float, document: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n] of `ROW`, of which copies have one in common (doc is 0), and the sketch, uint32 [at most `SKETCH`], sorted."""
    text, near = hashlib.blake2b(digest_size=16), method == "minhash"
    minhash = _minhash() if near else None
    sketch, tail = np.empty(0, np.uint32), np.empty(0, np.uint64)  # tail: the last words, whose shingles are not whole yet
    if near:
        minhash.clear()
    for chunk in chunks(document):
        chunk = chunk if chunk.isascii() else unicodedata.normalize("NFC", chunk)
        for part in _parts(chunk):
            if words := part.split():
                text.update((" ".join(words) + " ").encode())
            if near:
                words = np.array([_WORDS[word] for word in _WORD.findall(part.lower())], np.uint64)
                tail = np.concatenate([tail, words])
                new = np.unique(_shingles(tail))
                tail = tail[max(len(tail) - N + 1, 0) :]
                for i in range(0, len(new), 256):  # x 256 permutations x 4 B: 256 KiB, which a cache holds
                    minhash.update_batch(new[i : i + 256].tolist())
                sketch = np.union1d(sketch, new)[:SKETCH]
    if len(_WORDS) > 1 << 20:
        _WORDS.clear()
    if near and not len(sketch) and len(tail):  # fewer than N words are a shingle
        sketch = _short((tail * _ODD[: len(tail)]).sum(keepdims=True) + np.uint64(len(tail)))
        minhash.update_batch(sketch.tolist())
    n_bands, n_rows = bands(threshold) if len(sketch) else (0, 0)
    rows = np.zeros(1 + n_bands, ROW)
    rows["key"][0], rows["same"][0] = np.frombuffer(text.digest(), "<u8")
    if n_bands:
        hashes = minhash.hashvalues[: n_bands * n_rows].reshape(n_bands, n_rows).astype(np.uint64)
        rows["key"][1:] = _mix(hashes @ _ODD[:n_rows] + np.arange(1, n_bands + 1, dtype=np.uint64) * _ODD[n_rows])
        rows["same"][1:] = np.frombuffer(hashlib.blake2b(sketch, digest_size=8).digest(), "<u8")
    return rows, sketch


def _parts(text: str) -> Iterator[str]:
    """`text` in parts of about a million characters that end before white space."""
    at = 0
    while at < len(text):
        space = _SPACE.search(text, at + (1 << 20))
        end = space.start() if space else len(text)
        yield text[at:end]
        at = end


class _Words(dict):
    """Hash of each word, computed once."""

    def __missing__(self, word: str) -> int:
        value = self[word] = zlib.crc32(word.encode())
        return value


_WORDS = _Words()


def _shingles(words: np.ndarray) -> np.ndarray:
    """Hashes, uint32 [n - N + 1], of each N words in a row; words: uint64 [n]."""
    n = max(len(words) - N + 1, 0)
    return _short(sum(words[i : i + n] * _ODD[i] for i in range(N)))


def _short(x: np.ndarray) -> np.ndarray:
    return (_mix(x) >> np.uint64(32)).astype(np.uint32)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 after which each bit depends on all (MurmurHash3's last step)."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


@functools.lru_cache(maxsize=1)
def _minhash():
    try:
        import datasketch
    except ImportError:
        raise UserError("--dedup minhash: needs datasketch: pip install 'datasketch>=2'") from None
    return datasketch.MinHash(PERMUTATIONS, hashfunc=int, scheme="affine32")


def pairs(method: str, rows: np.ndarray) -> np.ndarray:
    """[n] of `PAIR`: the documents with a key in common, each with the earliest that have it; sure: no need to compare them.

    Their number is at most `FIRST` times that of the rows, however many share a key.
    """
    rows, new = _sorted(rows, "key", "same", "doc")
    new = new["key"] | new["same"]
    first = np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))
    found = [_pairs(rows["doc"][~new], rows["doc"][first[~new]], True)]
    if method == "minhash":
        rows, new = _sorted(rows[new], "key", "doc")
        at = np.arange(len(rows))
        first = np.maximum.accumulate(np.where(new["key"], at, 0))
        for i in range(FIRST):
            later = first + i < at
            found.append(_pairs(rows["doc"][later], rows["doc"][first[later] + i], False))
    return unique(np.concatenate(found))


def unique(found: np.ndarray) -> np.ndarray:
    """`PAIR`s without those that are there twice, sorted."""
    found, new = _sorted(found, *PAIR.names)
    return found[np.logical_or.reduce([*new.values()])]


def _sorted(rows: np.ndarray, *names: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rows sorted by the fields of these names, and for each field whether it differs from the row before.

    NumPy's own sort of records is forty times slower.
    """
    rows = rows[np.lexsort([rows[name] for name in reversed(names)])]
    return rows, {name: np.append(True, rows[name][1:] != rows[name][:-1])[: len(rows)] for name in names}


def _pairs(doc: np.ndarray, of: np.ndarray, sure: bool) -> np.ndarray:
    out = np.empty(len(doc), PAIR)
    out["doc"], out["of"], out["sure"] = doc, of, sure
    return out[doc != of]


def copies(found: np.ndarray, sketch: Callable[[int], np.ndarray], threshold: float) -> dict[int, int]:
    """Each document that is a copy of an earlier one, and the earliest of those. `found`: `PAIR`s; `sketch`: of a document."""
    out: dict[int, int] = {}
    for doc, of, sure in unique(found).tolist():
        if doc not in out and (sure or similarity(sketch(doc), sketch(of)) >= threshold):
            out[doc] = of
    return out


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of the sets of which `a` and `b` are sketches: exact if they hold all, else an estimate."""
    if cut := [s[-1] for s in (a, b) if len(s) == SKETCH]:  # up to the lesser of these, both hold all
        a, b = (s[: np.searchsorted(s, min(cut), "right")] for s in (a, b))
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
