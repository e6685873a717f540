"""One output file of data preparation: documents read, tokenised, cut into blocks and written. Runs in the workers."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python import array_record_module

from tinyllama_jax.config import UserError
from tinyllama_jax.data import documents, store, tokenizer
from tinyllama_jax.data.blocks import Record
from tinyllama_jax.data.documents import Piece, Source
from tinyllama_jax.data.store import Place, sha256

BATCH = 1 << 18  # characters tokenised at once


class Shard(NamedTuple):
    """What becomes one output file."""

    split: str
    file: str
    pieces: list[Piece]
    first: list[Source]  # the sources whose first piece is here: their checksums are computed here

    def identity(self) -> str:
        """Hash of what it is made of: a shard made earlier is good for as long as this is the same."""
        made_of = [(p.source.name, p.source.size, p.source.mtime_ns, *p[1:]) for p in self.pieces]
        return hashlib.sha256(json.dumps([made_of, [source.name for source in self.first]]).encode()).hexdigest()


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
    main: int  # process that waits for the result; workers stop when it is gone. 0: it is on another machine

    @property
    def failed(self) -> Place:
        return self.folder / "failed" / self.run


def make(job: Job, pickled: bytes) -> None:
    """Makes one output file and the record of what is in it. Does nothing if another shard has failed.

    A user's mistake (bad input, full disk) is written to DIR.partial/failed, where the main process looks for it, and raised.
    """
    shard: Shard = pickle.loads(zlib.decompress(pickled))
    # a runner gives work again that a lost worker had finished
    if store.names(job.failed) or made(job.folder, shard):
        return
    _check_awaited(job)
    try:
        _make(job, shard)
    except ProcessLookupError:  # nobody waits for this any more
        raise
    except (UserError, OSError) as error:
        store.write(job.failed / shard.file, " ".join(str(error).split()))
        raise


def made(folder: Place, shard: Shard) -> dict:
    """The record of this very shard in DIR.partial; empty if it has not been made yet."""
    keys = ("identity", "shard", "counts", "sources")
    try:
        record = json.loads(store.read(folder / "done" / f"{shard.file}.json"))
    except (FileNotFoundError, ValueError):
        return {}
    found = isinstance(record, dict) and all(key in record for key in keys) and record["identity"] == shard.identity()
    return record if found else {}


def _check_awaited(job: Job) -> None:
    """Raises ProcessLookupError if the main process is gone."""
    if job.main:
        os.kill(job.main, 0)


def _make(job: Job, shard: Shard) -> None:
    temporary = store.beside(store.room(job.folder) / shard.file)
    record = Record(job.seq_len, job.dtype)
    counts = {"documents": 0, "empty_documents": 0}
    tokens = blocks = 0
    try:
        writer = _written(temporary, array_record_module.ArrayRecordWriter, str(temporary), "group_size:1")
        texts = itertools.chain.from_iterable(documents.read(piece, job.text_key) for piece in shard.pieces)
        for block, length in _blocks(_tokens(texts, job, counts), job.seq_len + 1):
            _written(temporary, writer.write, record.encode(block, length))
            tokens, blocks = tokens + length, blocks + 1
        _written(temporary, writer.close)
        checksums = {source.name: sha256(source.path) for source in shard.first}
        for source in {piece.source for piece in shard.pieces}:
            if not source.unchanged():
                raise UserError(f"{source.path}: changed while it was read")
        entry = {"file": shard.file, "blocks": blocks, "tokens": tokens}
        entry |= {"bytes": temporary.stat().st_size, "sha256": sha256(temporary)}
        store.put(temporary, job.whole / shard.file)
    finally:
        temporary.unlink(missing_ok=True)
    done = {"identity": shard.identity(), "shard": entry, "counts": counts, "sources": checksums}
    store.write(job.folder / "done" / f"{shard.file}.json", json.dumps(done))


def _tokens(texts: Iterable[Iterable[str]], job: Job, counts: dict[str, int]) -> Iterator[np.ndarray]:
    """Ids of the documents one after another, with bos and eos as the job says, in arrays of any length; counts documents."""
    spm = _tokenizer(job.whole / "tokenizer", job.tokenizer_sha256)
    parts: list[str] = []
    begins: list[int] = []  # which parts begin a document, and which end one
    ends: list[int] = []
    size = 0

    def encoded() -> np.ndarray:
        ids = spm.encode_batch(parts)
        for i in begins if job.bos else ():
            ids[i].insert(0, spm.bos_id)
        for i in ends if job.eos else ():
            ids[i].append(spm.eos_id)
        return np.fromiter(itertools.chain.from_iterable(ids), job.dtype, sum(map(len, ids)))

    for text in texts:
        new = True
        for part in spm.parts(text):
            if size >= BATCH:
                _check_awaited(job)
                yield encoded()
                parts, begins, ends, size = [], [], [], 0
            if new:
                begins.append(len(parts))
            parts.append(part)
            size, new = size + len(part), False
        if new:
            counts["empty_documents"] += 1
        else:
            counts["documents"] += 1
            ends.append(len(parts) - 1)
    yield encoded()


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Place, _sha256: str) -> tokenizer.Tokenizer:  # once a worker, not once a shard
    with store.here(folder) as local:
        return tokenizer.load(local)


def _blocks(arrays: Iterable[np.ndarray], width: int) -> Iterator[tuple[np.ndarray, int]]:
    """All ids in blocks [width]; the last one is filled up with zeros, and its length says where they begin."""
    rest = None
    for ids in arrays:
        rest = ids if rest is None else np.concatenate([rest, ids])
        whole = len(rest) // width
        for block in rest[: whole * width].reshape(whole, width):
            yield block, width
        rest = rest[whole * width :]
    if len(rest):
        yield np.pad(rest, (0, width - len(rest))), len(rest)


def _written(path: Path, call: Callable, *args: object) -> object:
    try:
        return call(*args)
    except Exception as error:  # ArrayRecord's own, of no common type
        raise UserError(f"{path}: cannot be written: {error}") from None
