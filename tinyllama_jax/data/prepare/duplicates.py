"""Finds documents that are exact or near copies of an earlier one, by exact keys, MinHash bands and sketches.

Exact copies have the same text up to white space and Unicode's canonical equivalence (NFC).
Near copies have sets of word 5-grams with a Jaccard similarity of at least the threshold. Words are lower case, without
punctuation; a character of a script that is written without spaces counts as a word. Candidates share a band of MinHashes
(Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3). A document with at most `SKETCH` distinct 5-grams is
compared by all of them, so its similarity is exact. A longer one is compared by their `SKETCH` smallest hashes, with a standard
deviation of at most sqrt(0.25 / 4,096) = 0.008.

Two passes come before the shards are made. The first writes to DIR.partial/looked which documents of a shard its filters drop,
and rows (see `look`) and sketches of the others. The second groups rows by key into pairs of documents, groups the pairs by the
shard of the later document, and writes to DIR.partial/copies what is dropped: each document that is similar to an earlier one,
whether or not that one is kept.
"""

import functools
import hashlib
import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from tinyllama_jax.base import store
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.store import Place
from tinyllama_jax.data.prepare import clean, shards
from tinyllama_jax.data.prepare.shards import Job, Shard

METHODS = ("exact", "minhash")
THRESHOLD = 0.8
N = 5  # words in a shingle
PERMUTATIONS = 256
RECALL = 0.99  # least share of the pairs at the threshold that become candidates
SKETCH = 4_096
FIRST = 8  # the earliest documents of a bucket, with which the others are compared
NUMBERS = "numbers.json"  # see `numbers`
LOW = (1 << 32) - 1  # a document's number is its shard's number << 32 | its place in the shard
ROW = np.dtype([("key", "u8"), ("same", "u8"), ("doc", "u8")])
PAIR = np.dtype([("doc", "u8"), ("of", "u8"), ("sure", "?")])
# Chinese, Japanese, Thai, Lao, Burmese, Khmer
_NO_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_WORD = re.compile(f"[{_NO_SPACES}]|[^\\W{_NO_SPACES}]+")
_SPACE = re.compile(r"\s")
# odd factors for sums of hashes
_ODD = np.random.RandomState(0).randint(1 << 62, size=max(N, PERMUTATIONS), dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def bands(threshold: float) -> tuple[int, int]:
    """(bands, rows in each): the most rows with which pairs at the threshold share a band with probability `RECALL`."""
    rows = max(r for r in range(1, PERMUTATIONS + 1) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= RECALL or r == 1)
    return PERMUTATIONS // rows, rows


def check(method: str, threshold: float | None) -> float:
    """Returns the threshold. Raises UserError if it is impossible or not used, or if a library is missing."""
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
    """(rows [n] of `ROW` with doc 0, of which copies share at least one; the sorted sketch, uint32 [at most `SKETCH`])."""
    text, near, empty = hashlib.blake2b(digest_size=16), method == "minhash", True
    minhash = _minhash() if near else None  # one per call: a worker may have threads
    sketch, tail = np.empty(0, np.uint32), np.empty(0, np.uint64)  # tail: the last words, whose shingles are incomplete
    for chunk in clean.chunks(document):
        empty = False
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
    if len(_WORDS) == 1 << 20:
        _WORDS.clear()
    if near and not len(sketch) and len(tail):  # a document of fewer than N words is one shingle
        sketch = _short((tail * _ODD[: len(tail)]).sum(keepdims=True) + np.uint64(len(tail)))
        minhash.update_batch(sketch.tolist())
    n_bands, n_rows = bands(threshold) if len(sketch) else (0, 0)
    rows = np.zeros(0 if empty else 1 + n_bands, ROW)
    if empty:  # no copy: it is counted as empty
        return rows, sketch
    rows["key"][0], rows["same"][0] = np.frombuffer(text.digest(), "<u8")
    if n_bands:
        hashes = minhash.hashvalues[: n_bands * n_rows].reshape(n_bands, n_rows).astype(np.uint64)
        rows["key"][1:] = _mix(hashes @ _ODD[:n_rows] + np.arange(1, n_bands + 1, dtype=np.uint64) * _ODD[n_rows])
        rows["same"][1:] = np.frombuffer(hashlib.blake2b(sketch, digest_size=8).digest(), "<u8")
    return rows, sketch


def _parts(text: str) -> Iterator[str]:
    """Cuts `text` into parts of about a million characters, before white space where there is any."""
    at = 0
    while at < len(text):
        longest = at + (1 << 20) + (1 << 16)
        space = _SPACE.search(text, at + (1 << 20), longest)
        end = space.start() if space else min(longest, len(text))
        yield text[at:end]
        at = end


class _Words(dict):
    """Hash of each word, computed once."""

    def __missing__(self, word: str) -> int:
        value = zlib.crc32(word.encode())
        if len(self) < 1 << 20 and len(word) < 32:
            self[word] = value
        return value


_WORDS = _Words()


def _shingles(words: np.ndarray) -> np.ndarray:
    """Hashes, uint32 [n - N + 1], of all runs of N words; words: uint64 [n]."""
    n = max(len(words) - N + 1, 0)
    return _short(sum(words[i : i + n] * _ODD[i] for i in range(N)))


def _short(x: np.ndarray) -> np.ndarray:
    return (_mix(x) >> np.uint64(32)).astype(np.uint32)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that makes each bit depend on all bits (MurmurHash3's last step)."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def _minhash():
    try:
        import datasketch
    except ImportError:
        raise UserError("--dedup minhash: needs datasketch: pip install 'datasketch>=2'") from None
    scheme = "affine32"
    if not _PERMUTATIONS:  # drawing them takes longer than a short document
        _PERMUTATIONS.append(datasketch.MinHash(PERMUTATIONS, scheme=scheme).permutations)
    return datasketch.MinHash(PERMUTATIONS, hashfunc=int, scheme=scheme, permutations=_PERMUTATIONS[0])


_PERMUTATIONS: list[np.ndarray] = []


def pairs(method: str, rows: np.ndarray) -> np.ndarray:
    """Candidates, [n] of `PAIR`: each document with the earliest ones that share a key; `sure` pairs need no comparison.

    There are at most `FIRST` times as many as rows, however many documents share a key.
    """
    rows, new = _sorted(rows, "key", "same", "doc")
    new = new["key"] | new["same"]
    first = np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))
    pieces = [_pairs(rows["doc"][~new], rows["doc"][first[~new]], True)]
    if method == "minhash":
        rows, new = _sorted(rows[new], "key", "doc")
        at = np.arange(len(rows))
        first = np.maximum.accumulate(np.where(new["key"], at, 0))
        for i in range(FIRST):
            later = first + i < at
            pieces.append(_pairs(rows["doc"][later], rows["doc"][first[later] + i], False))
    return unique(np.concatenate(pieces))


def unique(candidates: np.ndarray) -> np.ndarray:
    """The pairs of `candidates`, sorted, each once."""
    candidates, new = _sorted(candidates, *PAIR.names)
    return candidates[np.logical_or.reduce([*new.values()])]


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


def copies(candidates: np.ndarray, sketch: Callable[[int], np.ndarray], threshold: float) -> dict[int, int]:
    """Document -> the earliest one that it copies. `candidates`: [n] of `PAIR`; `sketch`: gives the sketch of a document."""
    out: dict[int, int] = {}
    for doc, of, sure in unique(candidates).tolist():
        if doc not in out and (sure or similarity(sketch(doc), sketch(of)) >= threshold):
            out[doc] = of
    return out


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of the sets of which `a` and `b` are sketches: exact if they hold all, else an estimate."""
    if cut := [s[-1] for s in (a, b) if len(s) == SKETCH]:  # both sketches are complete up to the smaller of these
        a, b = (s[: np.searchsorted(s, min(cut), "right")] for s in (a, b))
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


# -- the passes ---------------------------------------------------------------------------------------------------------


def make(job: Job, pickled: bytes) -> None:
    """The first pass over a shard. See `shards.attempt`."""
    shards.attempt(job, pickled, _make)


def _make(job: Job, shard: Shard) -> None:
    name, dropped, rows = job.records / shard.file, [], []
    pieces: Counter[tuple[str, int]] = Counter()  # documents in each
    ends = [0]  # of the sketches, in numbers
    local = store.temporary_name(store.staging(job.folder) / shard.file)
    try:
        with open(local, "wb") as sketches:
            for n, (piece, document) in enumerate(shards.read(job, shard, Counter())):
                pieces[piece.source.name, piece.start] += 1
                if reason := clean.rejected_by(job.cleaning.filters, document):
                    dropped.append([n, reason])
                    ends.append(ends[-1])
                    continue
                keys, sketch = look(job.cleaning.dedup, job.cleaning.threshold, document)
                keys["doc"] = n
                rows.append(keys)
                sketches.write(sketch.tobytes())
                ends.append(ends[-1] + len(sketch))
        shards.check_unchanged(shard)
        store.put(local, name.with_name(f"{shard.file}.sketches"))
    finally:
        local.unlink(missing_ok=True)
    store.write(name.with_name(f"{shard.file}.ends"), np.array(ends, "<u8").tobytes())
    store.write(name.with_name(f"{shard.file}.rows"), np.concatenate(rows or [np.empty(0, ROW)]).tobytes())
    record = {"identity": shard.identity(), "bad": shard.bad or {}, "dropped": dropped}
    record["pieces"] = [pieces[piece.source.name, piece.start] for piece in shard.pieces]
    store.write(name.with_name(f"{shard.file}.json"), json.dumps(record))


def rows_of(job: Job, pickled: bytes) -> Iterator[tuple[int, bytes]]:
    """Splits the rows of a shard by key into as many parts as there are shards: (part, bytes of `ROW`s)."""
    shard = shards.unpacked(pickled)
    with shards.recording_failure(job, shard.file):
        rows = _array(job.folder / "looked" / f"{shard.file}.rows", ROW).copy()
    rows["doc"] |= np.uint64(job.shards.index(shard.file) << 32)
    n = len(job.shards)
    part = rows["key"] % np.uint64(n)
    rows = rows[np.argsort(part, kind="stable")]
    ends = np.searchsorted(np.sort(part), np.arange(n + 1, dtype=np.uint64))
    for i in range(n):
        yield i, rows[ends[i] : ends[i + 1]].tobytes()


def pairs_of(job: Job, part: tuple[int, Iterable[bytes]]) -> Iterator[tuple[int, bytes]]:
    """The pairs to compare in one part of all rows: (number of the later document's shard, bytes of `PAIR`s)."""
    i, rows = part
    with shards.recording_failure(job, f"part {i}"):
        candidates = pairs(job.cleaning.dedup, np.frombuffer(b"".join(rows), ROW))
    yield i, b""  # so that `settle` gets every shard
    number, start = np.unique(candidates["doc"] >> np.uint64(32), return_index=True)  # they are sorted
    for i, own in zip(number.tolist(), np.split(candidates, start[1:]), strict=True) if len(candidates) else ():
        yield i, own.tobytes()


def settle(job: Job, pairs_of_shard: tuple[int, Iterable[bytes]]) -> None:
    """Writes the documents of a shard to drop: [[number, why, [file, number in it] of the original, or null]].

    The original is written only with --keep-dropped, since it makes the list long.
    """
    i, candidates = pairs_of_shard
    name = job.shards[i]
    with shards.recording_failure(job, name):
        sketch = functools.lru_cache(1 << 12)(functools.partial(_sketch, job))
        same = copies(np.frombuffer(b"".join(candidates), PAIR), sketch, job.cleaning.threshold)
        filtered = shards.record(job.folder / "looked" / f"{name}.json", shards.Looked)["dropped"]
        why = f"dedup:{job.cleaning.dedup}"
        dropped = [[n, reason, None] for n, reason in filtered]
        where = shards.record(job.folder / NUMBERS, list[list[tuple[str, int, int]]]) if same and job.cleaning.keep else None
        dropped += [[doc & LOW, why, where and _place(where[of >> 32], of & LOW)] for doc, of in same.items()]
        store.write(job.records / f"{name}.json", json.dumps({"plan": job.plan, "dropped": sorted(dropped)}))


def dropped_of(job: Job, shard: Shard) -> list | None:
    """The list that `settle` wrote for a shard; None if there is none for this plan."""
    try:
        record = shards.record(job.records / f"{shard.file}.json", shards.Copies)
    except (FileNotFoundError, UserError):
        return None
    return record["dropped"] if record["plan"] == job.plan else None


def numbers(planned: list[Shard], records: dict[str, dict]) -> list[list]:
    """For each shard, of its pieces, [[file, number in it of the first document, documents]]. `records`: of the first pass."""
    seen: Counter[tuple[str, str]] = Counter()
    out = []
    for shard in planned:
        out.append([])
        for piece, n in zip(shard.pieces, records[shard.file]["pieces"], strict=True):
            out[-1].append([piece.source.name, seen[shard.split, piece.source.name], n])
            seen[shard.split, piece.source.name] += n
    return out


def _place(pieces: list, n: int) -> list:
    for file, first, documents in pieces:
        if n < documents:
            return [file, first + n]
        n -= documents
    raise IndexError(n)


def _sketch(job: Job, doc: int) -> np.ndarray:
    file, n = job.folder / "looked" / job.shards[doc >> 32], doc & LOW
    start, end = _array(file.with_name(f"{file.name}.ends"), np.dtype("<u8"), n, n + 2).tolist()
    return _array(file.with_name(f"{file.name}.sketches"), np.dtype("<u4"), start, end)


def _array(file: Place, dtype: np.dtype, start: int = 0, end: int | None = None) -> np.ndarray:
    """Numbers [start, end) in a file. Raises UserError if the file is shorter."""
    data = store.read(file, start * dtype.itemsize, end and end * dtype.itemsize)
    if len(data) % dtype.itemsize or (end is not None and len(data) != (end - start) * dtype.itemsize):
        raise UserError(f"{file}: is truncated; delete the folder that it is in and run this again")
    return np.frombuffer(data, dtype)
