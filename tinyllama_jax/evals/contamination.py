"""Looks for the items of tasks in prepared training sets, by n-grams of words.

The rule is that of GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C). Words are separated by white space, in lower case,
without punctuation. n is the 5th percentile of the items' lengths in words, at least 8 and at most 13. An item is dirty if one
of its n-grams stands in the data; a shorter item is compared whole. N-grams in more than 10 documents are phrases that everyone
uses, and do not count.

Words of the data are hashed once each, runs of n hashes at a time in NumPy, and what equals a hash of an item is compared word
by word. Windows of the data are independent of one another, so processes share them.
"""

import bisect
import concurrent.futures
import functools
import hashlib
import itertools
import multiprocessing
import os
import re
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import Blocks

SHORTEST, LONGEST = 8, 13  # limits of n
COMMON = 10  # documents
WINDOW = 1 << 18  # tokens read at a time
OVERLAP = 512  # tokens read again with the next window: an n-gram with more tokens is missed where windows meet
ONE_PROCESS = 1 << 23  # a set with fewer tokens is read in less time than processes take to start
EDGE = "\0"  # stands between documents; no word is equal to it, since words come from text without white space
_ODD = np.uint64(0x9E3779B97F4A7C15)  # factor of the rolling hash, modulo 2^64
_DROPPED = re.compile(r"[\W_]+")


class Place(NamedTuple):
    """Where an n-gram first stands, and in how many documents; a document longer than a window counts in each."""

    source: int  # index of the set
    block: int
    documents: int


class Scanned(NamedTuple):
    """The n-grams of items that stand in the data, and how many bytes of text these have."""

    places: dict[tuple[str, ...], Place]
    n_bytes: int


def words(text: str) -> list[str]:
    """The words that are compared."""
    return [word for raw in text.split() if (word := _normal(raw))]


def _normal(raw: str) -> str:
    lower = raw.lower()
    if lower.isascii() and lower.isalnum():  # most are: twice as fast
        return lower
    return _DROPPED.sub("", unicodedata.normalize("NFC", lower))


class _Hashes(dict):
    """Hash of each word as it is written; 0 for one of punctuation alone. Computed once."""

    def __missing__(self, raw: str) -> int:
        word = _normal(raw)
        # not Python's own hash, which differs between processes; odd, so never 0
        value = int.from_bytes(hashlib.blake2b(word.encode(errors="replace"), digest_size=8).digest(), "little") | 1
        value = 0 if not word and raw != EDGE else value
        if len(self) < 1 << 20:
            self[raw] = value
        return value


def _runs(hashes: np.ndarray, sizes: Mapping[int, object]) -> Iterator[tuple[int, np.ndarray]]:
    """(n, hash of each run of n words [len(hashes) - n + 1]) for each n of `sizes`."""
    run = hashes
    for n in range(1, max(sizes, default=0) + 1):
        run = run[:-1] * _ODD + hashes[n - 1 :] if n > 1 else run
        if n in sizes:
            yield n, run


# -- the items ----------------------------------------------------------------------------------------------------------


class Items:
    """The n-grams of a task's items. n: the task's n      each: item -> (its own n, hashes [k], words)"""

    def __init__(self, texts: Mapping[int, str]):
        """`texts`: item -> its prompt with the right answer."""
        lists = {item: words(text) for item, text in texts.items()}
        fifth = np.percentile([len(row) for row in lists.values()], 5, method="lower") if lists else 0
        self.n, self.each, known = int(np.clip(fifth, SHORTEST, LONGEST)), {}, _Hashes()
        for item, row in lists.items():
            size, hashes = max(min(self.n, len(row)), 1), np.array([known[word] for word in row], np.uint64)
            self.each.update((item, (size, run, row)) for _, run in _runs(hashes, {size: None}))

    def dirty(self, places: Mapping[tuple[str, ...], Place]) -> tuple[dict[int, tuple[str, Place]], list[int]]:
        """({item: (its first n-gram that stands in the data, where)}, the items of which only common n-grams do)."""
        out, common = {}, []
        for item, (n, _, row) in self.each.items():
            grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
            hits = [(" ".join(gram), place) for gram in grams if (place := places.get(gram))]
            rare = next((hit for hit in hits if hit[1].documents <= COMMON), None)
            if rare:
                out[item] = rare
            elif hits:
                common.append(item)
        return out, common


# -- the data -----------------------------------------------------------------------------------------------------------


def scan(sources: list[Blocks], tasks: list[Items], progress: Callable[[int, str], None]) -> Scanned:
    """Looks for the n-grams of `tasks` in `sources`. `progress`: is told of more tokens, and of the speed so far.

    Blocks are joined in their order on the disk, so a document is whole wherever its blocks follow one another; it ends at bos
    or eos. Raises UserError for damaged data.
    """
    by_size: dict[int, list[np.ndarray]] = {}
    for n, run, _ in itertools.chain.from_iterable(task.each.values() for task in tasks):
        by_size.setdefault(n, []).append(run)
    needles = {n: np.unique(np.concatenate(runs)) for n, runs in by_size.items()}
    started, read, out = time.perf_counter(), 0, {}
    for (source, first, end), (n_bytes, hits) in _searched(sources, needles):
        for gram, block in hits:
            before = out.get(gram, Place(source, block, 0))
            out[gram] = before._replace(documents=before.documents + 1)
        read += n_bytes
        speed = read / 1e6 / (time.perf_counter() - started)
        progress((end - first) * (sources[source].seq_len + 1), f"{read / 1e6:,.1f} MB of text, {speed:.1f} MB/s")
    return Scanned(out, read)


def _windows(sources: list[Blocks]) -> Iterator[tuple[int, int, int]]:
    """(set, first block, last block + 1) of each window."""
    for source, blocks in enumerate(sources):
        step = max(WINDOW // (blocks.seq_len + 1), 1)
        for first in range(0, len(blocks), step):
            yield source, first, min(first + step, len(blocks))


def _searched(sources: list[Blocks], needles: dict[int, np.ndarray]) -> Iterator[tuple[tuple[int, int, int], tuple[int, list]]]:
    """(window, what `_Search` gives for it), in order."""
    workers = os.cpu_count() or 1
    if workers == 1 or sum(len(blocks) * (blocks.seq_len + 1) for blocks in sources) <= ONE_PROCESS:
        search = _Search(sources, needles)
        for window in _windows(sources):
            yield window, search(*window)
        return
    context, waiting = multiprocessing.get_context("spawn"), deque()  # a fork of JAX's threads could hang
    with concurrent.futures.ProcessPoolExecutor(workers, context, _begin, (sources, needles)) as pool:
        for window in _windows(sources):
            waiting.append((window, pool.submit(_search_window, *window)))
            if len(waiting) > 4 * workers:
                yield waiting[0][0], waiting.popleft()[1].result()
        for window, result in waiting:
            yield window, result.result()


class _Search:
    """Searches one window of the data at a time."""

    def __init__(self, sources: list[Blocks], needles: dict[int, np.ndarray]):
        """`needles`: n -> sorted hashes of n-grams [k]."""
        self._sources, self._needles, self._known = sources, needles, _Hashes()
        self._tokenizers = [tokenizer_lib.load(blocks.tokenizer) for blocks in sources]
        # a table that says of the first bits of a hash whether an n-gram has them: one look-up a word, and few pass
        self._bits = max(16, (16 * max(map(len, needles.values()), default=0)).bit_length())
        self._tables = {n: np.zeros(1 << self._bits, bool) for n in needles}
        for n, table in self._tables.items():
            table[self._first_bits(needles[n])] = True

    def _first_bits(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes >> np.uint64(64 - self._bits)).astype(np.int64)

    def __call__(self, source: int, first: int, end: int) -> tuple[int, list[tuple[tuple[str, ...], int]]]:
        """(bytes of text, [n-gram, the block in which it begins], each once per document) of the blocks [first, end)."""
        blocks = self._sources[source]
        stop = min(end + -(-OVERLAP // (blocks.seq_len + 1)), len(blocks))
        tokens, length = blocks.read(np.arange(first, stop))
        ids, ends = tokens[np.arange(tokens.shape[1]) < length[:, None]], np.cumsum(length)
        vocabulary = blocks.manifest["tokenizer"]
        edges = np.flatnonzero((ids == vocabulary["bos_id"]) | (ids == vocabulary["eos_id"]))
        spans = list(zip([0, *(edges + 1).tolist()], [*edges.tolist(), len(ids)], strict=True))
        decoded = lambda start, end: self._tokenizers[source].decode(ids[start:end].tolist())
        raw, starts, n_bytes = [], [], 0  # starts: of each document in `raw`
        for start, last in spans:
            text = decoded(start, last)
            n_bytes += len(text.encode(errors="replace"))
            starts.append(len(raw))
            raw += [*text.split(), EDGE]
        # the halves of words where windows meet: the window before this one, or after it, has them whole
        for place in ([0] if first else []) + ([len(raw) - 2] if stop < len(blocks) else []):
            raw[place] = EDGE
        count = functools.cache(lambda start, end: len(decoded(start, end).split()))
        hits: dict[tuple[tuple[str, ...], int], int] = {}
        for at in self._matches(raw):
            document = bisect.bisect_right(starts, at[0]) - 1
            key = tuple(_normal(raw[i]) for i in at), document
            if key not in hits:
                start, last = spans[document]
                within = [*ends[(ends > start) & (ends < last)].tolist(), last]  # where its blocks end
                row = bisect.bisect_left(within, at[0] - starts[document] + 1, key=lambda end: count(start, end))
                hits[key] = first + int(np.searchsorted(ends, start, "right")) + row
        return n_bytes, [(gram, block) for (gram, _), block in hits.items()]

    def _matches(self, raw: list[str]) -> Iterator[list[int]]:
        """The indices in `raw` of the words of each n-gram that an item has too."""
        hashes = np.fromiter(map(self._known.__getitem__, raw), np.uint64, len(raw))
        kept = np.flatnonzero(hashes)
        for n, run in _runs(hashes[kept], self._needles):
            at = np.flatnonzero(self._tables[n][self._first_bits(run)])
            needles = self._needles[n]
            near = needles[np.searchsorted(needles, run[at]).clip(max=len(needles) - 1)]
            for i in at[near == run[at]].tolist():
                yield kept[i : i + n].tolist()


_search: _Search | None = None  # of this worker: sent once, not with each window


def _begin(sources: list[Blocks], needles: dict[int, np.ndarray]) -> None:
    global _search
    _search = _Search(sources, needles)


def _search_window(*window: int) -> tuple[int, list]:
    return _search(*window)


def described(item: int, gram: str, place: Place, against: list[Blocks]) -> dict:
    """A dirty item for the JSON."""
    blocks = against[place.source]
    file, record = blocks.place(place.block)
    where = {"source": str(blocks.directory), "block": place.block, "file": file.name, "record": record}
    return {"item": item, "ngram": gram, "documents": place.documents, **where}
