"""One output file of data preparation: documents read, tokenised, cut into blocks and written. Runs in the workers."""

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

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import Count, decode_json, sha256
from tinyllama_jax.data import tokenizer
from tinyllama_jax.data.blocks import Record
from tinyllama_jax.data.prepare import clean, documents, store
from tinyllama_jax.data.prepare.clean import Cleaning
from tinyllama_jax.data.prepare.documents import Piece
from tinyllama_jax.data.prepare.inputs import Source
from tinyllama_jax.data.prepare.store import Place

BATCH = 1 << 18  # characters tokenised at once
HELD_OUT = "validation"
MEMORY = 2 << 30  # bytes of memory that a worker takes at most; benchmarks/ has what it took
T = TypeVar("T")


class Shard(NamedTuple):
    """What becomes one output file, or one and another of what is held out of it."""

    split: str
    file: str
    pieces: list[Piece]
    first: list[Source]  # the sources whose first piece is here: their checksums are computed here
    held_out: str = ""  # the other file, of the split "validation"
    # files left out because they cannot be read: name -> [where the first bad piece begins, why]; None: they are errors
    bad: dict[str, list] | None = None
    copies: str = ""  # with --dedup: sha256 of the list of what is dropped, in DIR.partial/copies

    def files(self) -> dict[str, str]:
        """Split -> file of it."""
        return {self.split: self.file} | ({HELD_OUT: self.held_out} if self.held_out else {})

    def identity(self) -> str:
        """Hash of what it is made of: a shard made earlier is good for as long as this is the same."""
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
    pieces: list[Count]  # documents in each


class Copies(TypedDict):
    plan: str
    dropped: list[tuple[Count, str, tuple[str, Count] | None]]  # the last: (file, number in it) of the document that it copies


@dataclass(frozen=True)
class Job:
    """What all shards have in common."""

    folder: Place  # DIR.partial
    whole: Place  # where the output files go
    run: str  # name of this run of the main process: what is left of an earlier one elsewhere must not stop it
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
    shards: tuple[str, ...] = ()  # for the stage "copies": the files of all of them, in order
    plan: str = ""  # for it too: a hash of all of them

    @property
    def records(self) -> Place:
        return self.folder / self.stage

    @property
    def failed(self) -> Place:
        return self.folder / "failed" / self.run


def make(job: Job, pickled: bytes) -> None:
    """Makes one output file and the record of what is in it. See `attempt`."""
    attempt(job, pickled, _make)


def unpacked(pickled: bytes) -> Shard:
    return pickle.loads(zlib.decompress(pickled))


def attempt(job: Job, pickled: bytes, work: Callable[[Job, Shard], None]) -> None:
    """`work`, unless another shard has failed or this one is done. If a file cannot be read, once more without, if it may be.

    A user's mistake (bad input, full disk) is written to DIR.partial/failed, where the main process looks for it, and raised.
    """
    shard = unpacked(pickled)
    # a runner gives work again that a lost worker had finished
    if store.names(job.failed) or made(job.records, shard):
        return
    with telling(job, shard.file):
        while True:
            try:
                with _bounded():
                    work(job, shard)
                return
            except documents.BadFile as error:
                if shard.bad is None or shard.copies:  # what is a copy of what was settled with that file
                    raise
                source = error.source
                shard = shard._replace(
                    bad=shard.bad | {source.name: [error.start, str(error).replace(source.path, source.name)]}
                )


@contextlib.contextmanager
def telling(job: Job, name: str) -> Iterator[None]:
    """Writes what goes wrong to DIR.partial/failed, where the main process looks for it."""
    try:
        yield
    except (UserError, OSError, MemoryError) as error:
        if isinstance(error, MemoryError):
            error = UserError(f"{name}: took more memory than the {MEMORY >> 30} GiB that a worker may have")
        store.write(job.failed / name, " ".join(str(error).split()))
        raise error from None


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Limits this process to `MEMORY`, or to half of that beyond what it has now: a file need not tell how much it unpacks to.

    Linux counts the stacks of threads too, hence the allowance for each processor. Elsewhere there is no limit.
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
    """The documents of a shard, without those of bad files, each with its piece. Counts rows that a corpus leaves out."""
    for piece in shard.pieces:
        if piece.source.name not in (shard.bad or ()):
            try:
                for document in documents.read(piece, job.text_key, job.drop, dropped):
                    yield piece, document
            except documents.BadFile as error:
                error.start = piece.start
                raise


def check_unchanged(shard: Shard) -> None:
    """Raises UserError if a file is not as it was when the work was planned."""
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
    """Holds out the last `n` blocks of a shard, and no others; returns its new record."""
    done = made(job.records, shard)
    entries = [done["files"][split] for split in (shard.split, HELD_OUT)]
    tokens, blocks = (sum(entry[key] for entry in entries) for key in ("tokens", "blocks"))
    temporaries = [store.beside(store.room(job.folder) / entry["file"]) for entry in entries]
    try:
        with store.here(job.whole, *(entry["file"] for entry in entries)) as folder:
            every = itertools.chain(*[_records(folder / entry["file"], entry["blocks"]) for entry in entries])
            for entry, temporary, size in zip(entries, temporaries, (blocks - n, n), strict=True):
                writer = _written(temporary, array_record_module.ArrayRecordWriter, str(temporary), "group_size:1")
                for block in itertools.islice(every, size):
                    _written(temporary, writer.write, block)
                _written(temporary, writer.close)
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
    """Number of each document that is dropped -> (why, [file, number] of what it is a copy of); None if nobody has looked."""
    if not shard.copies:
        return None
    return {n: (why, of) for n, why, of in record(job.folder / "copies" / f"{shard.file}.json", Copies)["dropped"]}


def dropped_file(shard: Shard) -> str:
    return f"dropped-{shard.file.removeprefix('blocks-').replace('.array_record', '')}.jsonl.gz"


class _Dropped:
    """What is dropped of a shard, for a person to look at."""

    def __init__(self, job: Job, shard: Shard):
        self.place = job.cleaning.keep / dropped_file(shard)
        self.temporary = store.beside(store.room(job.folder) / dropped_file(shard))
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
    """An output file: documents go in, blocks of their ids come out, in batches of about `BATCH` characters."""

    def __init__(self, job: Job, name: str):
        self.name, self.place, self.temporary = name, job.whole / name, store.beside(store.room(job.folder) / name)
        self._job, self._record = job, Record(job.seq_len, job.dtype)
        self._spm = _tokenizer(job.whole / "tokenizer", job.tokenizer_sha256)
        self._counts = {"blocks": 0, "tokens": 0, "documents": 0, "empty_documents": 0}
        self._rest = np.empty(0, job.dtype)  # ids that do not fill a block yet
        self._parts: list[str] = []
        self._begins: list[int] = []  # which parts begin a document, and which end one
        self._ends: list[int] = []
        self._size = 0  # characters
        self._writer = _written(self.temporary, array_record_module.ArrayRecordWriter, str(self.temporary), "group_size:1")

    def add(self, document: Iterable[str]) -> None:
        """A document, in parts: its ids, with bos and eos as the job says."""
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
        """What is in the file; its last block is filled up with zeros, and its length says where they begin."""
        self._flush()
        if n := len(self._rest):
            self._write(np.pad(self._rest, (0, self._job.seq_len + 1 - n)), n)
        _written(self.temporary, self._writer.close)
        return {"file": self.name, **self._counts, "bytes": self.temporary.stat().st_size, "sha256": sha256(self.temporary)}

    def _flush(self) -> None:
        ids = self._spm.encode_batch(self._parts)
        for i in self._begins if self._job.bos else ():
            ids[i].insert(0, self._spm.bos_id)
        for i in self._ends if self._job.eos else ():
            ids[i].append(self._spm.eos_id)
        new = np.fromiter(itertools.chain.from_iterable(ids), self._job.dtype, sum(map(len, ids)))
        ids, width = np.concatenate([self._rest, new]), self._job.seq_len + 1
        whole = len(ids) // width
        for block in ids[: whole * width].reshape(whole, width):
            self._write(block, width)
        self._rest = ids[whole * width :]
        self._parts, self._begins, self._ends, self._size = [], [], [], 0

    def _write(self, block: np.ndarray, length: int) -> None:
        _written(self.temporary, self._writer.write, self._record.encode(block, length))
        self._counts["tokens"] += length
        self._counts["blocks"] += 1


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Place, _sha256: str) -> tokenizer.Tokenizer:  # once a worker, not once a shard
    with store.here(folder) as local:
        return tokenizer.load(local)


def _written(path: Path, call: Callable, *args: object) -> object:
    try:
        return call(*args)
    except Exception as error:  # ArrayRecord's own, of no common type
        raise UserError(f"{path}: cannot be written: {error}") from None
