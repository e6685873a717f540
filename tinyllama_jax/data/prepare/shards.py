"""Makes one output file of data preparation: reads documents, tokenises them, writes blocks. Runs in the workers."""

import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import os
import pickle
import resource
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict, TypeVar

import numpy as np
from array_record.python import array_record_module

from tinyllama_jax.base import store
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import Count, decode_json, sha256
from tinyllama_jax.base.store import Place
from tinyllama_jax.data import tokenizer
from tinyllama_jax.data.blocks import Record
from tinyllama_jax.data.prepare import clean, documents
from tinyllama_jax.data.prepare.clean import Cleaning
from tinyllama_jax.data.prepare.documents import Piece
from tinyllama_jax.data.prepare.inputs import Source

BATCH = 1 << 18  # characters tokenised at once
HELD_OUT = "validation"
MEMORY = 2 << 30  # most bytes of memory that a worker may take; benchmarks/ has what it takes
T = TypeVar("T")


class Shard(NamedTuple):
    """The input of one output file, or of two if there is a second one for held-out documents."""

    split: str
    file: str
    pieces: list[Piece]
    first: list[Source]  # the sources whose first piece is here, with which their checksums are computed
    held_out: str = ""  # the second file, of the split "validation"
    # files left out because they cannot be read: name -> [where the first bad piece begins, why]; None: such files are errors
    bad: dict[str, list] | None = None
    copies: str = ""  # with --dedup: sha256 of the list of what is dropped, in DIR.partial/copies

    def files(self) -> dict[str, str]:
        """Split -> name of its output file."""
        return {self.split: self.file} | ({HELD_OUT: self.held_out} if self.held_out else {})

    def identity(self) -> str:
        """Hash of the shard's input: a shard that was made earlier is valid as long as this is the same."""
        made_of = [(p.source[1:], *p[1:]) for p in self.pieces]
        made_of = [made_of, [source.name for source in self.first], *([self.copies] if self.copies else [])]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


# the records that workers write for each shard, in DIR.partial: done/ (with an Entry for each output file), looked/, copies/
Entry = TypedDict(
    "Entry", {"file": str, "sha256": str} | dict.fromkeys(("documents", "empty_documents", "tokens", "blocks", "bytes"), Count)
)


class _Made(TypedDict):
    identity: str
    bad: dict[str, tuple[Count, str]]


class Done(_Made):
    files: dict[str, Entry]
    dropped: dict[str, Count]
    scrubbed: dict[str, Count]
    sources: dict[str, str]


class Looked(_Made):
    dropped: list[tuple[Count, str]]
    pieces: list[Count]  # documents in each piece


class Copies(TypedDict):
    plan: str
    dropped: list[tuple[Count, str, tuple[str, Count] | None]]  # number, why, (file, number in it) of the original


@dataclass(frozen=True)
class Job:
    """What all shards have in common."""

    folder: Place  # DIR.partial
    whole: Place  # where the output files go
    run: str  # name of this run of the main process, which a worker left over from an earlier run must not stop
    tokenizer_sha256: str
    seq_len: int
    dtype: str
    bos: bool
    eos: bool
    text_key: str
    drop: dict[str, str]  # see `documents.read`
    held_out: float  # fraction of the documents
    cleaning: Cleaning
    stage: str = "done"  # folder in DIR.partial for the record of each shard: "looked", "copies" (see duplicates.py) or "done"
    shards: tuple[str, ...] = ()  # for the stage "copies": the files of all shards, in order
    plan: str = ""  # for the stage "copies": a hash of all shards

    @property
    def records(self) -> Place:
        return self.folder / self.stage

    @property
    def failed(self) -> Place:
        return self.folder / "failed" / self.run


def make(job: Job, pickled: bytes) -> None:
    """Makes the output files of a shard and the record of their contents. See `attempt`."""
    attempt(job, pickled, _make)


def unpacked(pickled: bytes) -> Shard:
    return pickle.loads(zlib.decompress(pickled))


def attempt(job: Job, pickled: bytes, work: Callable[[Job, Shard], None]) -> None:
    """Runs `work`, unless another shard has failed or this one is done; again without a file that cannot be read, if allowed.

    A user's mistake (bad input, full disk) is written to DIR.partial/failed, where the main process looks for it, and raised.
    """
    shard = unpacked(pickled)
    # a runner may repeat work that a lost worker had finished
    if store.names(job.failed) or made(job.records, shard):
        return
    with recording_failure(job, shard.file):
        while True:
            try:
                with _bounded():
                    work(job, shard)
                return
            except documents.BadFile as error:
                if shard.bad is None or shard.copies:  # the list of copies was made with that file
                    raise
                source = error.source
                shard = shard._replace(
                    bad=shard.bad | {source.name: [error.start, str(error).replace(source.path, source.name)]}
                )


@contextlib.contextmanager
def recording_failure(job: Job, name: str) -> Iterator[None]:
    """Writes an error to DIR.partial/failed, where the main process looks for it."""
    try:
        yield
    except (UserError, OSError, MemoryError) as error:
        if isinstance(error, MemoryError):
            error = UserError(f"{name}: took more memory than the {MEMORY >> 30} GiB that a worker may have")
        store.write(job.failed / name, " ".join(str(error).split()))
        raise error from None


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Limits this process to `MEMORY`, or to half of that more than it uses now, since a file may unpack to any size.

    Linux counts the stacks of threads too, hence the allowance for each processor. Other systems set no limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        _, resident, _, _, _, data, _ = (int(n) * resource.getpagesize() for n in Path("/proc/self/statm").read_text().split())
    except OSError:
        yield
        return
    most = data + max(MEMORY - resident, MEMORY // 2) + (os.cpu_count() or 1) * (16 << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (min(n for n in (most, soft, hard) if n != resource.RLIM_INFINITY), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def record(file: Place, kind: type[T]) -> T:
    """The JSON record that a worker wrote into `file`. Raises UserError if it is damaged, FileNotFoundError if it is absent."""
    try:
        return decode_json(store.read(file), kind)
    except ValueError as error:
        raise UserError(f"{file}: is damaged ({error}); delete it and run this again") from None


def made(records: Place, shard: Shard) -> dict:
    """The record of exactly this shard in a folder of records; empty if there is none yet, or if it is damaged."""
    try:
        value = record(records / f"{shard.file}.json", Looked if records.name == "looked" else Done)
    except (FileNotFoundError, UserError):
        return {}
    if value["identity"] != shard.identity() or (value["bad"] and shard.bad is None):
        return {}
    if "pieces" in value:
        return value if len(value["pieces"]) == len(shard.pieces) else {}
    read_whole = {source.name for source in shard.first} - value["bad"].keys()
    files = {split: entry["file"] for split, entry in value["files"].items()}
    return value if files == shard.files() and read_whole <= value["sources"].keys() else {}


def read(job: Job, shard: Shard, dropped: Counter[str]) -> Iterator[tuple[Piece, Iterable[str]]]:
    """(piece, document) of all documents of a shard, except those of bad files. Counts rows left out in `dropped`."""
    for piece in shard.pieces:
        if piece.source.name not in (shard.bad or ()):
            try:
                for document in documents.read(piece, job.text_key, job.drop, dropped):
                    yield piece, document
            except documents.BadFile as error:
                error.start = piece.start
                raise


def check_unchanged(shard: Shard) -> None:
    """Raises UserError if a file has changed since the shards were planned."""
    for source in {piece.source for piece in shard.pieces if piece.source.name not in (shard.bad or ())}:
        if not source.unchanged():
            raise UserError(f"{source.path}: changed while it was read")


def _make(job: Job, shard: Shard) -> None:
    """Makes the files of a shard. Raises BadFile, UserError and OSError."""
    files: dict[str, _File | _Dropped] = {}
    dropped, scrubbed = Counter(), Counter()
    copies = _copies(job, shard)
    try:
        files |= {split: _File(job, name) for split, name in shard.files().items()}
        if job.cleaning.keep:
            files["dropped"] = _Dropped(job, shard)
        for n, (piece, document) in enumerate(read(job, shard, dropped)):
            if copies is None:
                reason, of = clean.rejected_by(job.cleaning.filters, document), None
            else:
                reason, of = copies.get(n, ("", None))
            if reason:
                dropped[reason] += 1
                if job.cleaning.keep:
                    files["dropped"].add(document, reason, piece.source.name, of)
                continue
            if job.cleaning.scrubs:
                document = clean.scrubbed(job.cleaning.scrubs, document, scrubbed)
            held_out = False
            if shard.held_out:
                held_out, document = documents.held_out(document, job.held_out)
            files[HELD_OUT if held_out else shard.split].add(document)
        entries = {split: file.close() for split, file in files.items()}
        checksums = {source.name: source.sha256() for source in shard.first if source.name not in (shard.bad or ())}
        check_unchanged(shard)
        for file in files.values():
            store.put(file.temporary, file.place)
    finally:
        for file in files.values():
            file.temporary.unlink(missing_ok=True)
    entries.pop("dropped", None)
    done = {"identity": shard.identity(), "files": entries, "dropped": dropped, "scrubbed": scrubbed, "sources": checksums}
    store.write(job.records / f"{shard.file}.json", json.dumps(done | {"bad": shard.bad or {}}))


def hold_out(job: Job, shard: Shard, n: int) -> dict:
    """Makes the last `n` blocks of a shard its held-out ones, and no others; returns its new record."""
    done = made(job.records, shard)
    entries = [done["files"][split] for split in (shard.split, HELD_OUT)]
    tokens, blocks = (sum(entry[key] for entry in entries) for key in ("tokens", "blocks"))
    temporaries = [store.temporary_name(store.staging(job.folder) / entry["file"]) for entry in entries]
    try:
        with store.local_copy(job.whole, *(entry["file"] for entry in entries)) as folder:
            every = itertools.chain(*[_records(folder / entry["file"], entry["blocks"]) for entry in entries])
            for entry, temporary, size in zip(entries, temporaries, (blocks - n, n), strict=True):
                out = writer(temporary)
                for block in itertools.islice(every, size):
                    written(temporary, out.write, block)
                written(temporary, out.close)
                n_tokens = min(size * (job.seq_len + 1), tokens)  # the very last block may be shorter
                entry |= {"blocks": size, "tokens": n_tokens, "bytes": temporary.stat().st_size, "sha256": sha256(temporary)}
                tokens -= n_tokens
        for entry, temporary in zip(entries, temporaries, strict=True):
            store.put(temporary, job.whole / entry["file"])
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    store.write(job.records / f"{shard.file}.json", json.dumps(done))
    return done


def _records(file: Path, n: int) -> Iterator[bytes]:
    reader = array_record_module.ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")
    for start in range(0, n, 1_024):
        yield from reader.read(start, min(start + 1_024, n))
    reader.close()


def _copies(job: Job, shard: Shard) -> dict[int, tuple[str, list | None]] | None:
    """Number of each dropped document -> (why, [file, number] of its original); None without --dedup."""
    if not shard.copies:
        return None
    return {n: (why, of) for n, why, of in record(job.folder / "copies" / f"{shard.file}.json", Copies)["dropped"]}


def dropped_file(shard: Shard) -> str:
    return f"dropped-{shard.file.removeprefix('blocks-').replace('.array_record', '')}.jsonl.gz"


class _Dropped:
    """The file of a shard's dropped documents, for a person to read."""

    def __init__(self, job: Job, shard: Shard):
        self.place = job.cleaning.keep / dropped_file(shard)
        self.temporary = store.temporary_name(store.staging(job.folder) / dropped_file(shard))
        self._raw = open(self.temporary, "wb")  # noqa: SIM115  closed by `close`
        self._file = gzip.GzipFile("", "wb", fileobj=self._raw, mtime=0)  # no name and time: the same bytes each time

    def add(self, document: Iterable[str], reason: str, file: str, of: list | None) -> None:
        text, characters = clean.head(document)
        row = {"reason": reason, "file": file, "characters": characters, "text": text}
        if of:
            row["copy_of"] = {"file": of[0], "document": of[1]}
        self._file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())

    def close(self) -> None:
        self._file.close()
        self._raw.close()


class _File:
    """An output file, which tokenises documents in batches of about `BATCH` characters and writes blocks."""

    def __init__(self, job: Job, name: str):
        self.name, self.place, self.temporary = name, job.whole / name, store.temporary_name(store.staging(job.folder) / name)
        self._job, self._record = job, Record(job.seq_len, job.dtype)
        self._spm = _tokenizer(job.whole / "tokenizer", job.tokenizer_sha256)
        self._counts = {"blocks": 0, "tokens": 0, "documents": 0, "empty_documents": 0}
        self._pending = np.empty(0, job.dtype)  # ids that do not fill a block yet
        self._parts: list[str] = []
        self._begins: list[int] = []  # indices of the parts that begin a document, and below, that end one
        self._ends: list[int] = []
        self._size = 0  # characters
        self._writer = writer(self.temporary)

    def add(self, document: Iterable[str]) -> None:
        """Adds a document, given in parts, with bos and eos as the job says."""
        new = True
        for part in self._spm.parts(document):
            if self._size >= BATCH:
                self._flush()
            if new:
                self._begins.append(len(self._parts))
            self._parts.append(part)
            self._size, new = self._size + len(part), False
        if new:
            self._counts["empty_documents"] += 1
        else:
            self._counts["documents"] += 1
            self._ends.append(len(self._parts) - 1)

    def close(self) -> dict:
        """Finishes the file; returns its counts. The last block is padded with zeros; its length says where they begin."""
        self._flush()
        if n := len(self._pending):
            self._write(np.pad(self._pending, (0, self._job.seq_len + 1 - n)), n)
        written(self.temporary, self._writer.close)
        return {"file": self.name, **self._counts, "bytes": self.temporary.stat().st_size, "sha256": sha256(self.temporary)}

    def _flush(self) -> None:
        ids = self._spm.encode_batch(self._parts)
        for i in self._begins if self._job.bos else ():
            ids[i].insert(0, self._spm.bos_id)
        for i in self._ends if self._job.eos else ():
            ids[i].append(self._spm.eos_id)
        new = np.fromiter(itertools.chain.from_iterable(ids), self._job.dtype, sum(map(len, ids)))
        ids, width = np.concatenate([self._pending, new]), self._job.seq_len + 1
        whole = len(ids) // width
        for block in ids[: whole * width].reshape(whole, width):
            self._write(block, width)
        self._pending = ids[whole * width :]
        self._parts, self._begins, self._ends, self._size = [], [], [], 0

    def _write(self, block: np.ndarray, length: int) -> None:
        written(self.temporary, self._writer.write, self._record.encode(block, length))
        self._counts["tokens"] += length
        self._counts["blocks"] += 1


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Place, _sha256: str) -> tokenizer.Tokenizer:  # once a worker, not once a shard
    with store.local_copy(folder) as local:
        return tokenizer.load(local)


def writer(path: Path) -> array_record_module.ArrayRecordWriter:
    """A new ArrayRecord file of records that can be read in any order."""
    return written(path, array_record_module.ArrayRecordWriter, str(path), "group_size:1")


def written(path: Path, call: Callable, *args: object) -> object:
    """What `call` returns. Raises UserError naming the file if it fails."""
    try:
        return call(*args)
    except Exception as error:  # ArrayRecord's own, of no common type
        raise UserError(f"{path}: cannot be written: {error}") from None
