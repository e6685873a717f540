"""One pass over a data set, which counts what is in it and finds what is wrong: see audit.py."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable

import numpy as np

from tinyllama_jax.base.dims import FIRST
from tinyllama_jax.base.files import sha256
from tinyllama_jax.data import litpkds
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import MANIFEST, Blocks, Damaged

MOST = 10  # lines printed for one kind of finding in one source; the others are counted
AT_ONCE = 1 << 22  # tokens read into memory at once
OCTAVE = 4  # bins of document lengths per factor of two


class Findings:
    """Lines that say what is wrong; more than `MOST` of a kind in a source are only counted."""

    def __init__(self):
        self.lines: list[tuple[str, str]] = []  # kind and line
        self.times: Counter = Counter()

    def add(self, kind: str, source: str, line: str, times: int = 1) -> None:
        """Adds `times` findings of a kind, of which `line` describes one."""
        if self.times[kind, source] < MOST:
            self.lines.append((kind, f"{source}: {line}"))
        self.times[kind, source] += times

    def add_blocks(self, kind: str, blocks: Blocks, indices: np.ndarray, what: Callable[[int], str]) -> None:
        """Adds a finding for each block of `indices`; `what(i)` says what is wrong with the i-th of them."""
        for i, index in enumerate(indices[:MOST]):
            file, record = blocks.place(int(index))
            self.add(kind, name_of(blocks), f"{file.name}, record {record}: {what(i)}")
        self.times[kind, name_of(blocks)] += max(len(indices) - MOST, 0)

    def all(self, allowed: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
        """All lines to print: (of what is wrong, of kinds that begin with one of `allowed`)."""
        more = [(kind, f"{source}: {kind}: {n - MOST:,} more") for (kind, source), n in self.times.items() if n > MOST]
        sorted_out: tuple[list[str], list[str]] = [], []
        for kind, line in self.lines + more:
            sorted_out[kind.startswith(allowed)].append(line)
        return sorted_out


def name_of(blocks: Blocks) -> str:
    """The name of a split of a source in findings."""
    return f"{blocks.directory} ({blocks.split})"


class Survey:
    """What one pass over a split counts."""

    def __init__(self, blocks: Blocks, findings: Findings):
        self.blocks, self.findings, self.name = blocks, findings, name_of(blocks)
        self.manifest, vocabulary = blocks.manifest, blocks.manifest["tokenizer"]
        self.vocab_size, self.bos, self.eos = (vocabulary[key] for key in ("vocab_size", "bos_id", "eos_id"))
        self.tokenizer = tokenizer_lib.load(blocks.tokenizer)
        if self.tokenizer.sha256 != vocabulary["sha256"]:
            findings.add("tokenizer", self.name, f"{blocks.tokenizer}: is not the manifest's tokenizer")
        elif (size := self.tokenizer.vocab_size) != self.vocab_size:
            findings.add("tokenizer", self.name, f"{MANIFEST}: says {self.vocab_size:,} pieces; the tokenizer has {size:,}")
        self.apart = {self.bos: "bos", self.eos: "eos"}  # ids that never come twice in a row
        self.edges = sum(self.manifest[name] for name in ("bos", "eos")) if self.bos == self.eos else 1  # per document
        if self.edges == 2 or blocks.kind != "text":
            self.apart = {}
        if self.tokenizer.decode([0]).strip(" ⁇") == "":  # otherwise it is a character, which text may repeat
            self.apart.setdefault(0, "0")
        self.apart.pop(-1, None)
        self.tokens = self.damaged = self.filling = 0
        self.counts_V = np.zeros(self.vocab_size, np.int64)
        self.lengths = np.zeros(blocks.seq_len + 2, np.int64)
        self.documents = np.zeros(64 * OCTAVE, np.int64)  # by length
        self.conversations = 0  # of data with marks
        self.open = 0  # tokens since a document last began
        self.first: dict[int, int] = {}  # bos and eos -> the block that first has it
        self.hashes = np.zeros(len(blocks), np.uint64)  # of each block; 0: damaged or empty

    def read(self, first: int, end: int) -> None:
        """Reads and counts the blocks [first, end); damaged blocks are findings."""
        indices = np.arange(first, end)
        try:
            tokens, length, marks, _ = self.blocks.sequences(indices)
        except Damaged:
            good = []
            for i in indices:
                try:
                    self.blocks.read([i])
                    good.append(i)
                except Damaged as error:
                    self.findings.add("damage", self.name, str(error))
            self.damaged += len(indices) - len(good)
            indices = np.array(good, np.int64)
            tokens, length, marks, _ = self.blocks.sequences(indices)
        self.lengths += np.bincount(length, minlength=len(self.lengths))
        hashed = [hashlib.blake2b(row[:n], digest_size=8).digest() for row, n in zip(tokens, length.tolist(), strict=True)]
        self.hashes[indices] = np.where(length > 0, np.frombuffer(b"".join(hashed), np.uint64), 0)
        if isinstance(self.blocks, litpkds.Packed):
            self._count_filling(indices, length)
        flat = tokens.ravel() if (length == tokens.shape[1]).all() else tokens[np.arange(tokens.shape[1]) < length[:, None]]
        self._count(flat, np.cumsum(length), indices)
        if marks is not None:
            begins = np.flatnonzero(marks[np.arange(marks.shape[1]) < length[:, None]] & FIRST)
            self.conversations += begins.size
            self._documents(begins, len(flat))

    def _count(self, flat: np.ndarray, ends: np.ndarray, indices: np.ndarray) -> None:
        """`flat`: all tokens. `ends`: where each of the blocks `indices` ends in them."""
        self.tokens += len(flat)
        outside = (flat >= self.vocab_size) | (flat < 0)
        if outside.any():
            at = np.flatnonzero(outside)
            rows, firsts, times = np.unique(np.searchsorted(ends, at, "right"), return_index=True, return_counts=True)
            what = lambda i: f"{times[i]} ids out of the vocabulary of {self.vocab_size}: {flat[at[firsts[i]]]}"
            self.findings.add_blocks("ids out of the vocabulary", self.blocks, indices[rows], what)
            self.counts_V += np.bincount(flat[~outside], minlength=self.vocab_size)
        else:
            self.counts_V += np.bincount(flat, minlength=self.vocab_size)
        for id_, name in self.apart.items():
            at = np.flatnonzero(flat == id_)
            if at.size:
                self.first.setdefault(id_, int(indices[np.searchsorted(ends, at[0], "right")]))
            second = at[1:][np.diff(at) == 1]
            rows, times = np.unique(np.searchsorted(ends, second, "right"), return_counts=True)
            what = lambda i, times=times, name=name, id_=id_: f"{name} ({id_}) after {name}, {times[i]} times: padding?"
            self.findings.add_blocks(f"runs of {name}", self.blocks, indices[rows], what)
            if id_ == self._edge():
                self._documents(at + 1 if self.manifest["eos"] else at, len(flat))

    def _edge(self) -> int | None:
        """The id that stands between documents, if there is one."""
        return self.eos if self.manifest["eos"] else self.bos if self.manifest["bos"] else None

    def _documents(self, edges: np.ndarray, size: int) -> None:
        if edges.size:
            lengths = np.diff(edges, prepend=-self.open)
            lengths = lengths[lengths > 0]
            self.documents += np.bincount((np.log2(lengths) * OCTAVE).astype(int), minlength=len(self.documents))
        self.open = size - int(edges[-1]) if edges.size else self.open + size

    def _count_filling(self, indices: np.ndarray, length: np.ndarray) -> None:
        """Counts the filling in blocks of one file. An export fills up its last file; filling in another is a finding."""
        filling = self.blocks.stored(indices) - length
        rows = np.flatnonzero(filling)
        if rows.size and self.blocks.place(int(indices[-1]))[0] != self.blocks.place(len(self.blocks) - 1)[0]:
            file, record = self.blocks.place(int(indices[rows[0]]))
            line = f"{file.name}, record {record}: is the first of {rows.size:,} blocks that end in repeated bos or eos"
            line += f", {filling.sum():,} in all, which are not trained on"
            self.findings.add("filling (the original's issue #83)", self.name, line)
        self.filling += int(filling.sum())

    def n_documents(self) -> int:
        """The number of documents, by their eos or bos. A document that is cut between two splits counts in both."""
        if self.blocks.kind != "text":
            return self.conversations
        edge = self._edge()
        cut = self.manifest["eos"] and self.open > 0
        return int(self.counts_V[edge]) // self.edges + cut if edge is not None else 0

    def compare(self) -> None:
        """Adds a finding for each count that differs from the manifest."""
        packed, listed = isinstance(self.blocks, litpkds.Packed), self.manifest["splits"][self.blocks.split]
        add = lambda kind, where, line: self.findings.add(kind, self.name, f"{where}: {line}")
        # blocks were held out instead of documents (`last_blocks_of_train`): documents of --train reach into them
        cut = any(split.get("blocks") and not split.get("documents", 1) for split in self.manifest["splits"].values())
        if self.blocks.kind != "text" and not self.damaged and self.conversations != listed["documents"]:
            add("counts", MANIFEST, f"says {listed['documents']:,} conversations; there are {self.conversations:,}")
        for id_ in {self.bos, self.eos} - {-1} if self.blocks.kind == "text" else ():  # the two may be the same
            names = [name for name in ("bos", "eos") if self.manifest["tokenizer"][f"{name}_id"] == id_]
            name, per_document, counted = "/".join(names), sum(self.manifest[n] for n in names), int(self.counts_V[id_])
            guessed = packed and not (self.manifest["bos"] or self.manifest["eos"])  # a sample showed neither
            if not per_document and counted and not guessed:
                file, record = self.blocks.place(self.first[id_])
                add(
                    f"{name} policy",
                    f"{file.name}, record {record}",
                    f"is the first of {counted:,} {name} ({id_}); there should be none",
                )
            elif id_ == self.eos and packed and not self.manifest["bos"] and not counted:
                add(f"{name} policy", "all files", f"have no {name} ({id_}), which should end each document")
            elif per_document and not (packed or cut or self.damaged) and counted != per_document * listed["documents"]:
                should = f"{listed['documents']:,} documents, each with {name} ({id_})"
                add(f"{name} policy", MANIFEST, f"says {should}; there are {counted:,}")
        if not packed and not self.damaged and self.tokens != listed["tokens"]:
            add("counts", MANIFEST, f"says {listed['tokens']:,} tokens; there are {self.tokens:,}")

    def summary(self) -> str:
        """The counts in one line."""
        n, real = self.n_documents(), self.tokens / max(len(self.blocks) * (self.blocks.seq_len + 1), 1)
        mean = f", {self.tokens / n:,.0f} tokens each" if n else ""
        filling = f"; {self.filling:,} tokens of filling left out" if self.filling else ""
        return f"{len(self.blocks):,} blocks, {self.tokens:,} tokens ({real:.2%} full), {n:,} documents{mean}{filling}"

    def text(self, ids: np.ndarray) -> str:
        """The text of those ids that the tokenizer knows."""
        return self.tokenizer.decode(ids[(ids >= 0) & (ids < self.tokenizer.vocab_size)].tolist())

    def samples(self, n: int) -> list[tuple[str, str]]:
        """`n` random blocks: (place, the beginning of the text, with a line between documents)."""
        chosen, out = np.random.default_rng(0).choice(len(self.blocks), min(n, len(self.blocks)), replace=False), []
        for index in sorted(chosen.tolist()):
            file, record = self.blocks.place(index)
            with contextlib.suppress(Damaged):  # named already
                (tokens,), (length,) = self.blocks.read([index])
                ids = tokens[: min(length, 300)]
                parts = np.split(ids, np.flatnonzero(ids == self._edge()) + 1)
                out.append((f"{file.name}, record {record}", "\n---\n".join(map(self.text, parts))))
        return out


def survey(blocks: Blocks, findings: Findings, advance: Callable[[int], None]) -> Survey:
    """Reads all of a split, and all bytes of its files; calls `advance` with the number of blocks read since the last call."""
    surveyed = Survey(blocks, findings)
    entries = blocks.manifest["splits"][blocks.split].get("shards", ())
    checksums = {entry["file"]: entry["sha256"] for entry in entries}
    step = max(AT_ONCE // (blocks.seq_len + 1), 1)
    for file, first, last in blocks.files():
        if (
            file.name in checksums and sha256(file) != checksums[file.name]
        ):  # read now, it stays in the page cache for the blocks
            findings.add("checksums", surveyed.name, f"{file.name}: is not the file that was written (sha256)")
        for start in range(first, last, step):
            surveyed.read(start, min(start + step, last))
            advance(min(start + step, last) - start)
    surveyed.compare()
    if gone := blocks.missing():
        findings.add("missing files", surveyed.name, f"{gone[0]} is missing from the numbered files; {len(gone):,} are missing")
    return surveyed


def duplicates(surveys: list[Survey], findings: Findings) -> int:
    """Finds duplicate blocks within and between sources and splits; returns how many. Takes 24 bytes of memory a block."""
    hashes = np.concatenate([s.hashes for s in surveys])
    ordered = np.sort(hashes)
    again = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    again = again[again > 0]
    starts = np.cumsum([0, *(len(s.blocks) for s in surveys)])
    first: dict[int, int] = {}
    n = 0
    for begin in range(0, len(hashes) if again.size else 0, 1 << 20):
        part = hashes[begin : begin + (1 << 20)]
        near = np.minimum(np.searchsorted(again, part), len(again) - 1)
        for index in (np.flatnonzero(again[near] == part) + begin).tolist():
            one = first.setdefault(int(hashes[index]), index)
            if one == index:
                continue
            (a, i), (b, k) = (((j := int(np.searchsorted(starts, x, "right")) - 1), int(x - starts[j])) for x in (one, index))
            n += 1
            (file, record), (other, where) = surveys[b].blocks.place(k), surveys[a].blocks.place(i)
            same = "" if a == b else f"{surveys[a].name}, "
            line = f"{file.name}, record {record}: has the same tokens as {same}{other.name}, record {where}"
            kind = "duplicate blocks" if surveys[a].blocks.split == surveys[b].blocks.split else "overlap of splits"
            findings.add(kind, surveys[b].name, line)
    return n
