"""One prepared source: blocks of S + 1 tokens in ArrayRecord files, read in any order."""

import math
import os
import resource
import threading
import time
import typing
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
from array_record.python import array_record_module

from tinyllama_jax.base import store
from tinyllama_jax.base.dims import EXTRAS
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import Count, check_utf8, read_json, sha256
from tinyllama_jax.base.store import Place, Remote
from tinyllama_jax.data import bucket, riegeli
from tinyllama_jax.data.bucket import Damaged, Shards

FORMAT = 1  # of the manifest; raised when an older reader would misunderstand it
MANIFEST = "manifest.json"
LONGEST = 1 << 24  # tokens in a block
Name = typing.Annotated[str, msgspec.Meta(pattern=r"\A(?!\.\.?\Z)[^/\\\0]+\Z")]  # a file name, without a folder
Id = typing.Annotated[int, msgspec.Meta(ge=-1, lt=2**31)]  # a token id; -1: there is no such token


class Vocabulary(typing.TypedDict):
    """The tokenizer that made the tokens."""

    sha256: str
    vocab_size: typing.Annotated[int, msgspec.Meta(ge=1, le=2**24)]
    bos_id: Id
    eos_id: Id


class File(typing.TypedDict):
    """One ArrayRecord file."""

    file: Name
    blocks: Count
    tokens: Count
    bytes: Count
    sha256: str


class Input(typing.TypedDict, total=False):
    """A file that the data were made from, or one that could not be read."""

    file: typing.Required[str]
    bytes: typing.Required[Count]
    sha256: str
    reason: str


class Split(typing.TypedDict, total=False):
    """A split. The optional keys account for the input."""

    shards: typing.Required[typing.Annotated[list[File], msgspec.Meta(min_length=1)]]
    documents: typing.Required[Count]
    tokens: typing.Required[Count]
    blocks: typing.Required[Count]
    empty_documents: Count
    last_blocks_of_train: Count
    dropped: dict[str, Count]
    scrubbed: dict[str, Count]
    sources: typing.Required[list[Input]]
    bad_files: list[Input]


class Manifest(typing.TypedDict, total=False):
    """manifest.json. The optional keys record how the data were made."""

    format: typing.Required[typing.Literal[FORMAT]]
    kind: typing.Literal["text", "chat", "preferences"]  # text if it is left out
    reference: str  # of preferences: what their reference log-probabilities were computed from
    seq_len: typing.Required[typing.Annotated[int, msgspec.Meta(ge=1, le=LONGEST)]]
    dtype: typing.Required[typing.Literal["uint16", "int32"]]
    bos: typing.Required[bool]
    eos: typing.Required[bool]
    tokenizer: typing.Required[Vocabulary]
    splits: typing.Required[typing.Annotated[dict[str, Split], msgspec.Meta(min_length=1)]]
    text_key: str
    shard_mb: Count
    corpus: str
    held_out: float
    cleaning: dict


class Sequences(typing.NamedTuple):
    """Blocks: `tokens` [n, S + 1] as stored, `length` [n] int32, the number of real tokens, and the EXTRAS of their kind."""

    tokens: np.ndarray
    length: np.ndarray
    marks: np.ndarray | None = None
    reference: np.ndarray | None = None


class Record:
    """Encodes and decodes a block as TFDS serialises it: `tokens` [S + 1], `length`, and those of EXTRAS [S + 1]."""

    def __init__(self, seq_len: int, dtype: str, kind: str = "text"):
        """`dtype`: "uint16" or "int32", of the stored tokens."""
        import tensorflow_datasets as tfds  # takes a third of a second, which other commands save

        row = lambda dtype: tfds.features.Tensor(shape=(seq_len + 1,), dtype=dtype, encoding=tfds.features.Encoding.BYTES)
        extras = {name: row(np.dtype(dtype)) for name, dtype in EXTRAS[kind].items()}
        fields = {"tokens": row(np.dtype(dtype)), "length": tfds.features.Scalar(dtype=np.int32), **extras}
        self.features = tfds.features.FeaturesDict(fields)
        self._each = {name: tfds.features.FeaturesDict({name: field}) for name, field in fields.items()}
        # where the tokens are in the record of a full block, and the bytes before and after them
        self._dtype, self._width = np.dtype(dtype), seq_len + 1
        marks = np.full(seq_len + 1, 0x5A5A, dtype)
        probe, inside = self.encode(marks, seq_len + 1), marks.tobytes()
        self._start = probe.rindex(inside)  # from the right: the byte before the tokens is their length, and may equal 0x5A
        self._head, self._tail = probe[: self._start], probe[self._start + len(inside) :]
        self._end, self._size = self._start + len(inside), len(probe)

    def encode(self, tokens: np.ndarray, length: int, **extras: np.ndarray) -> bytes:
        """One record: a tf.train.Example."""
        values = {"tokens": tokens, "length": length, **extras}
        # one feature at a time: protobuf may write the entries of a map in any order, and concatenated messages are merged
        return b"".join(self._each[name].serialize_example({name: value}) for name, value in values.items())

    def decode(self, record: bytes, into: np.ndarray, **extras: np.ndarray) -> int:
        """Writes the tokens of `record` to `into` [S + 1], and each of `extras`, and returns its length.

        Raises ValueError if it is not a block.
        """
        whole = len(record) == self._size and not extras
        if whole and record.startswith(self._head) and record.endswith(self._tail):
            into[:] = np.frombuffer(record, self._dtype, self._width, self._start)
            return self._width
        try:  # a padded block, one with extras, or damage
            example = self.features.deserialize_example_np(record)
            into[:] = example["tokens"]
            for name, row in extras.items():
                row[:] = example[name]
            length = int(example["length"])
        except Exception as error:  # protobuf, TFDS and numpy raise different types
            raise ValueError(f"is not a block of {self._width} tokens of {self._dtype}: {error}") from None
        if not 0 < length <= self._width:
            raise ValueError(f"says that {length} of its {self._width} tokens are real")
        return length


def read_manifest(directory: str | Path) -> tuple[dict, str]:
    """The manifest in a local folder, and the sha256 of its bytes. Raises UserError if this is not a finished data set."""
    if url := bucket.remote(directory):
        how = "aws s3 sync" if url.url.startswith("s3:") else "gcloud storage rsync -r"
        raise UserError(f"{url}: must be a local folder here: copy it first, for example with `{how} {url} FOLDER`")
    check_utf8(directory)
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        _refuse(directory, store.names(directory) if directory.is_dir() else ())
    again = "copy or prepare the data again"
    written = read_json(path, typing.TypedDict("Format", {"format": int}), again)["format"]
    if written != FORMAT:
        raise UserError(f"{path}: has format {written}, and this version reads format {FORMAT}; prepare the data again")
    manifest = read_json(path, Manifest, again)
    named = [file for split in manifest["splits"].values() for file in split["shards"]]
    if len({file["file"] for file in named}) < len(named) or any(file["blocks"] > file["bytes"] for file in named):
        raise UserError(f"{path}: is damaged (it lists a file twice, or more blocks than bytes); {again}")
    return manifest, sha256(path)


def _refuse(folder: Place, names: Collection[str]) -> typing.NoReturn:
    """Raises UserError that says what is wrong with a folder without a manifest, whose files are `names`."""
    if not names and not (isinstance(folder, Path) and folder.is_dir()):
        half = folder.with_name(folder.name + ".partial")
        if half.is_dir() if isinstance(half, Path) else store.holds_something(half):
            raise UserError(f"{folder}: is half prepared; run `python -m tinyllama_jax.prepare` again to finish it")
        what = "folder" if isinstance(folder, Path) else "bucket or folder"
        raise UserError(f"{folder}: no such {what}; `python -m tinyllama_jax.prepare` makes it")
    if packed := sorted(name for name in names if name.endswith(".bin")):
        first = next((name for name in packed if name.startswith("train")), packed[0])
        start = first.rpartition("_")[0] or first.removesuffix(".bin")
        raise UserError(f"{folder}: holds .bin files: give the start of their names, such as {folder / start}")
    raise UserError(f"{folder}: has no {MANIFEST}; it was not made by `python -m tinyllama_jax.prepare`")


def _fetched(source: Remote, cache: str) -> Path:
    """A local folder with the manifest and the tokenizer of a data set in a bucket. Raises UserError."""
    names, tokenizer = bucket.listing(source), source / "tokenizer"
    if MANIFEST not in names:
        _refuse(source, names)
    small = [source / MANIFEST, *(tokenizer / name for name in bucket.listing(tokenizer))]
    return bucket.cache(cache).data_set(source, small)


class Blocks:
    """The blocks of one split of a folder that `prepare` wrote. Files are opened when first read. Can be pickled.

    manifest: contents of manifest.json      kind: of EXTRAS      seq_len: S      dtype: of the tokens
    tokenizer: its folder or file
    manifest_sha256, tokenizer_sha256: hashes of both
    sha256: hash of all files, set by `verify` if no manifest has hashes
    shards: of a data set in a bucket
    """

    sha256: str | None = None
    kind: str = "text"
    shards: Shards | None = None

    def __init__(self, directory: str | Path, split: str, cache: str = ""):
        """`directory`: may be in a bucket; `cache` is then `data.cache`.

        Raises UserError if the folder is incomplete, has another format or has no `split`.
        """
        remote = bucket.remote(directory)
        self.directory, self.split = remote or Path(directory), split
        folder = _fetched(remote, cache) if remote else self.directory
        self.manifest, self.manifest_sha256 = read_manifest(folder)
        splits = self.manifest["splits"]
        if split not in splits:
            raise UserError(f"{directory}: has no split {split!r}, only {', '.join(splits)}; prepare it again with --{split}")
        self.seq_len, self.dtype = self.manifest["seq_len"], np.dtype(self.manifest["dtype"])
        self.kind = self.manifest.get("kind", "text")
        self.tokenizer, self.tokenizer_sha256 = folder / "tokenizer", self.manifest["tokenizer"]["sha256"]
        shards = splits[split]["shards"]
        self._files: list[Place] = [self.directory / shard["file"] for shard in shards]
        self._ends = np.cumsum([shard["blocks"] for shard in shards])
        sizes = {name: size for name, (size, _) in bucket.listing(remote).items()} if remote else {}
        for file, shard in zip(self._files, shards, strict=True):
            size = sizes.get(file.name) if remote else file.stat().st_size if file.is_file() else None
            if size != shard["bytes"]:
                state = "is missing" if size is None else f"has {size:,} bytes"
                raise Damaged(f"{file}: {state}, and should have {shard['bytes']:,}; copy or prepare the data again")
        if remote:
            bytes_, hashes = zip(*((shard["bytes"], shard["sha256"]) for shard in shards), strict=True)
            self.shards = Shards(remote, bucket.cache(cache), folder, self._files, bytes_, hashes)
        self._open()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock", "_record", "_offsets")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._readers: list = [None] * len(self._files)
        self._lock = threading.Lock()
        self._offsets: dict[int, np.ndarray] = {}  # of the records of shards that are still in a bucket
        self._record = Record(self.seq_len, self.dtype.name, self.kind)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, length) of `sequences`."""
        return self.sequences(indices)[:2]

    def sequences(self, indices: np.ndarray) -> Sequences:
        """Blocks by index [n]; `length` is S + 1 unless a block is padded.

        Thread-safe. Raises IndexError, and UserError naming a damaged file and record.
        """
        indices = self._checked(indices)
        tokens = np.empty((len(indices), self.seq_len + 1), self.dtype)
        length = np.empty(len(indices), np.int32)
        extras = {name: np.empty(tokens.shape, dtype) for name, dtype in EXTRAS[self.kind].items()}
        files = self.files_of(indices)
        order, began = np.argsort(files, kind="stable"), time.perf_counter()
        groups = np.split(order, np.flatnonzero(np.diff(files[order])) + 1) if len(indices) else ()
        begins = self._ends - np.diff(self._ends, prepend=0)
        wanted = {int(files[rows[0]]): (indices[rows] - begins[files[rows[0]]]).tolist() for rows in groups}
        far = [f for f in wanted if not (self._readers[f] or self.shards.whole(f))] if self.shards else []
        by_range = self._by_range({f: wanted[f] for f in far})
        for rows, (file, positions) in zip(groups, wanted.items(), strict=True):
            records = by_range.get(file) or self._records(file, positions)
            for row, position, record in zip(rows, positions, records, strict=True):
                try:
                    length[row] = self._record.decode(record, tokens[row], **{name: a[row] for name, a in extras.items()})
                except ValueError as error:
                    raise self._damaged(file, position, error) from None
        self._count(sum(map(len, by_range.values())), len(indices), began)
        return Sequences(tokens, length, **extras)

    def _count(self, by_range: int, n: int, began: float) -> None:
        if self.shards:
            self.shards.count(n - by_range, by_range, time.perf_counter() - began)

    def _by_range(self, wanted: dict[int, list[int]]) -> dict[int, list[bytes]]:
        """Shard -> records, of shards -> positions that are still in a bucket."""
        offsets = {f: known for f in wanted if (known := self._offsets.get(f)) is not None}
        counts, sizes = np.diff(self._ends, prepend=0).tolist(), self.shards.sizes if wanted else ()
        tails = [(f, riegeli.tail(sizes[f], counts[f]), sizes[f]) for f in wanted if f not in offsets]
        out, file = {}, 0
        try:
            for (file, start, _), tail in zip(tails, self.shards.ranges(tails) if tails else (), strict=True):
                offsets[file] = self._offsets[file] = riegeli.offsets(tail, start, counts[file])
            spans = [(f, *offsets[f][at : at + 2].tolist()) for f, positions in wanted.items() for at in positions]
            parts = iter(self.shards.ranges(spans) if spans else ())
            for file, positions in wanted.items():
                out[file] = [riegeli.record(next(parts), int(offsets[file][at])) for at in positions]
        except ValueError as error:
            raise self._damaged(file, wanted[file][0], error) from None
        return out

    def hold(self, first: int, last: int) -> None:
        """Brings the shards of the blocks [first, last) to the disk whole, if they are in a bucket and the cache has room."""
        begin, end = self.files_of([first, last - 1]).tolist() if self.shards else (0, -1)
        for file in range(begin, end + 1):
            self.shards.fetch(file, wait=60)

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"blocks {indices.min()} to {indices.max()} of {len(self)} in {self.directory}, {self.split}")
        return indices

    def place(self, index: int) -> tuple[Path, int]:
        """The file of a block, and the block's record in it."""
        file = int(self.files_of(index))
        return self._files[file], int(index - (self._ends[file - 1] if file else 0))

    def files_of(self, indices: np.ndarray) -> np.ndarray:
        """The number of the file that each block is in."""
        return np.searchsorted(self._ends, indices, side="right")

    def files(self) -> list[tuple[Path, int, int]]:
        """(file, its first block, its last block + 1) for each file, in order."""
        return list(zip(self._files, (self._ends - np.diff(self._ends, prepend=0)).tolist(), self._ends.tolist(), strict=True))

    def missing(self) -> list[str]:
        """Names of missing files; none for a prepared folder, where `__init__` checks every file of the manifest."""
        return []

    def verify(self, after_file: Callable[[], None]) -> None:
        """Reads all files, and calls `after_file` after each. Raises Damaged if a sha256 differs from the manifest's."""
        shards = self.manifest["splits"][self.split]["shards"]
        for file, shard, checksum in zip(self._files, shards, self._checksums(after_file), strict=True):
            if checksum != shard["sha256"]:
                raise Damaged(f"{file}: is not as it was prepared (its sha256 is {checksum}); copy or prepare the data again")

    def _checksums(self, after_file: Callable[[], None]) -> Iterator[str]:
        shards = self.shards
        with ThreadPoolExecutor(4 if shards else 16) as pool:  # hashlib releases the GIL
            for checksum in pool.map(*((shards.sha256, range(len(self._files))) if shards else (sha256, self._files))):
                after_file()
                yield checksum

    def _records(self, file: int, positions: list[int]) -> list[bytes]:
        reader = self._readers[file] or self._reader(file)
        try:
            return reader.read(positions)
        except Exception as error:  # ArrayRecord's errors have no common type; below, find the record
            for position in positions:
                try:
                    reader.read([position])
                except Exception as record_error:
                    raise self._damaged(file, position, record_error) from None
            raise self._damaged(file, positions[0], error) from None

    def _damaged(self, file: int, position: int, error: Exception) -> Damaged:
        reason, path = str(error).split("\n")[0], self.shards and self.shards.whole(file) and self.shards.path(file)
        cure = f"remove {path}, and it is downloaded again" if path else "copy or prepare the data again"
        return Damaged(f"{self._files[file]}, record {position}: is damaged; {cure} ({reason})")

    def _reader(self, file: int) -> array_record_module.ArrayRecordReader:
        with self._lock:
            if self._readers[file] is None:
                n, most = len(self._files), may_open(len(self._files))
                if most < n:
                    remedy = "raise `ulimit -n`, or prepare the data with a larger --shard-mb"
                    raise UserError(f"{n:,} data files, and this process may open {most:,}: {remedy}")
                options = "readahead_buffer_size:0,max_parallelism:0"  # for random access
                try:
                    reader = array_record_module.ArrayRecordReader(
                        os.fspath(self._local(file)), options, file_reader_buffer_size=1 << 15
                    )
                except Exception as error:
                    raise self._damaged(file, 0, error) from None
                if reader.num_records() != (blocks := int(np.diff(self._ends, prepend=0)[file])):
                    raise self._damaged(file, 0, ValueError(f"{reader.num_records()} records, where {blocks} were written"))
                self._readers[file] = reader
                self._offsets.pop(file, None)
            return self._readers[file]

    def _local(self, file: int) -> Path:
        """The path of a file that is on this disk."""
        if self.shards:
            os.utime(self.shards.path(file))  # the least recently opened are removed first
        return self.shards.path(file) if self.shards else self._files[file]


def may_open(n: int) -> int:
    """How many of `n` files this process may hold open, besides 256 others; raises the limit (often 1,024) if it can."""
    soft, hard = (
        math.inf if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    if soft < (wanted := min(n + 256, hard)):
        soft = wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return max(min(n, soft - 256), 1)
