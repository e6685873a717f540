"""LITPKDS .bin shards, the original's packed files, read without conversion.

A file is a header of 24 bytes (b"LITPKDS", version 1 as u64, code of the dtype as u8, tokens in the file as u64, little-endian)
and the tokens. A source is named by the start of its files' names, DIR/train_slim; a tokenizer is beside them in DIR.
"""

import hashlib
import itertools
import mmap
import os
import re
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tinyllama_jax.base import files, store
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.store import Place, Remote
from tinyllama_jax.data import bucket
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import Blocks, Damaged, Sequences, may_open

HEADER = struct.Struct("<7sQBQ")
MAGIC, VERSION = b"LITPKDS", 1
CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float32", 7: "float64", 8: "uint16"}
WRITTEN = {"uint16": 8, "int32": 4}  # the codes that the original's builder uses for tokens
MAPPED = 1 << 14  # files mapped at once, at most: Linux allows a process 65,530 maps, and the corpus has 430,000 files
SAMPLES = 64, 4_096  # blocks searched for bos and eos (64 of 2,049 tokens have about 100 ends of documents)
AHEAD = 256  # headers that a thread reads in one task


def files_of(path: str | Path, split: str = "train") -> list[Place]:
    """The .bin files of `split` whose names begin with the name of `path` (without a * at its end), in order.

    Files of another split have its name in place of "train". Empty if `path` is a folder.
    """
    remote = bucket.remote(path)
    folder, prefix = os.path.split(str(remote or path).removesuffix(".bin").removesuffix("*"))
    if split != "train":
        if "train" not in prefix:
            return []
        prefix = prefix.replace("train", split, 1)
    if remote:
        names = bucket.listing(Remote(folder)) if prefix and not bucket.listing(remote) else ()
        return [Remote(folder) / name for name in sorted(names) if name.startswith(prefix) and name.endswith(".bin")]
    folder = folder or "."
    if not prefix or os.path.isdir(path) or not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(prefix) and entry.name.endswith(".bin")]
    return [Path(folder, name) for name in sorted(names)]


def edges(blocks: Blocks) -> tuple[bool, bool, str]:
    """(whether every document begins with bos, whether each ends with eos, the counts in words) in `SAMPLES` blocks."""
    begins, ends = (blocks.manifest["tokenizer"][name] for name in ("bos_id", "eos_id"))
    for sample in SAMPLES:  # the large one is for books, whose ends are far apart
        indices = np.unique(np.linspace(0, len(blocks) - 1, sample).astype(np.int64))
        tokens, length = blocks.read(indices)
        inside = np.arange(blocks.seq_len) + 2 < length[:, None]  # not a block's last token: it may begin a file's padding
        bos, eos = (tokens[:, 1:] == begins) & inside & (begins != ends), (tokens[:, :-1] == ends) & inside
        n_bos, n_eos, both = (int(hits.sum()) for hits in (bos, eos, bos & eos))
        if n_bos or n_eos:
            break
    counts = f"{n_bos:,} bos and {n_eos:,} eos, {both:,} of them together, in a sample of {len(indices):,} blocks"
    return n_bos > 0 and both == n_eos, n_eos > 0 and both == n_bos, counts


class Packed(Blocks):
    """The blocks of one split of LITPKDS files. Files are mapped when first read. Can be pickled.

    A block is the next S + 1 tokens of a file, or fewer at its end: no token is dropped. Padding at the end of a file (the
    original's builder pads with bos) is not read: a block that ends in two or more bos is cut before them, one that ends in two
    or more eos after the first. This loses no text: between two of them is an empty document. A block that is all padding has
    length 0.
    """

    def __init__(self, path: str | Path, split: str, seq_len: int, cache: str = ""):
        """`path`: as in `files_of`. `cache`: as in `Blocks`.

        Raises UserError if a file's header or size is wrong, or there is no tokenizer.
        """
        splits = {name: files_of(path, name) for name in ("train", "validation")}
        if not splits.get(split):
            raise UserError(f"{path}: has no split {split!r}: there is no file of that name in {os.path.dirname(path) or '.'}")
        remote = bucket.remote(path)
        self.directory, self.split, self.seq_len = remote or Path(path), split, seq_len
        self._files = splits[split]
        self._stored, self._chunk, headers = _headers(self._files)
        self.dtype = np.dtype(self._stored.name)
        identity = hashlib.sha256()
        for file, header in zip(self._files, headers, strict=True):
            identity.update(f"{file.name} {HEADER.size + self._chunk * self._stored.itemsize} ".encode() + header)
        self.manifest_sha256 = identity.hexdigest()
        spm = self._fetched(remote, cache, headers[0]) if remote else tokenizer_beside(self._files[0].parent)
        self.tokenizer, self.tokenizer_sha256 = spm.path, spm.sha256
        vocabulary = {"sha256": spm.sha256, "vocab_size": spm.vocab_size, "bos_id": spm.bos_id, "eos_id": spm.eos_id}
        self.manifest = {"seq_len": seq_len, "dtype": self.dtype.name, "tokenizer": vocabulary}
        self.manifest["splits"] = {name: {"files": len(paths)} for name, paths in splits.items() if paths}
        self._per_file = -(-self._chunk // (seq_len + 1))
        self._ends = np.arange(1, len(self._files) + 1) * self._per_file
        self._open()
        self.manifest["bos"], self.manifest["eos"], _ = edges(self)  # the format does not record them
        self._open()

    def _fetched(self, source: Remote, cache: str, header: bytes) -> tokenizer_lib.Tokenizer:
        """The tokenizer beside the files in a bucket. Sets up the cache of the files."""
        folder = Remote(source.url.rpartition("/")[0])
        inside, beside = (folder / "tokenizer"), bucket.listing(folder)
        small = [inside / n for n in bucket.listing(inside)] or [folder / n for n in beside if n.endswith((".json", ".model"))]
        identity = str([(file.name, beside[file.name]) for file in self._files])
        copy = bucket.cache(cache).data_set(source, small, identity)
        sizes = [beside[file.name][0] for file in self._files]
        self.shards = bucket.Shards(source, bucket.cache(cache), copy, self._files, sizes, [])
        self.shards.header = header
        try:
            return tokenizer_beside(copy)
        except UserError as error:
            raise UserError(str(error).replace(str(copy), str(folder))) from None

    def _open(self) -> None:
        self._checked_headers: set[int] = set()
        self._readers: dict[int, tuple[mmap.mmap, np.ndarray]] = {}
        self._lock = threading.Lock()

    def sequences(self, indices: np.ndarray) -> Sequences:
        """As `Blocks.sequences`."""
        indices, width = self._checked(indices), self.seq_len + 1
        file, block = np.divmod(indices, self._per_file)
        tokens, length = np.empty((len(indices), width), self.dtype), self.stored(indices)
        begin, began = HEADER.size + block * (width * self.dtype.itemsize), time.perf_counter()
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        closed = set(file.tolist()) - self._readers.keys() if self.shards else ()
        away = {f for f in closed if not self.shards.whole(f)}
        far = [row for row, f in enumerate(file.tolist()) if f in away] if away else []
        parts = dict(zip(far, self._by_range(file[far].tolist(), begin[far].tolist(), length[far].tolist()), strict=True))
        readers = [None if row in parts else self._readers.get(f) or self._reader(f) for row, f in enumerate(file.tolist())]
        need = (begin + width * self.dtype.itemsize - page).tolist()
        for reader, at, size in zip(readers, page.tolist(), need, strict=True):
            if reader:
                reader[0].madvise(mmap.MADV_WILLNEED, at, size)  # all at once: three times as fast from a disk
        for row, (reader, at) in enumerate(zip(readers, (block * width).tolist(), strict=True)):
            part = reader[1][at : at + width] if reader else parts[row]
            if len(part) == width:
                tokens[row] = part
            else:
                tokens[row, : len(part)], tokens[row, len(part) :] = part, 0
        for row in np.flatnonzero(self._padded(tokens, length)):
            length[row] = self._without_padding(tokens[row, : length[row]])
        self._count(len(far), len(indices), began)
        return Sequences(tokens, length)

    def _by_range(self, files: list[int], begins: list[int], lengths: list[int]) -> list[np.ndarray]:
        """Parts of files that are still in a bucket, in tokens; of each file its header is read and checked, too."""
        new = [f for f in dict.fromkeys(files) if f not in self._checked_headers]
        wanted = [(f, at, at + n * self.dtype.itemsize) for f, at, n in zip(files, begins, lengths, strict=True)]
        read = self.shards.ranges(wanted + [(f, 0, HEADER.size) for f in new]) if wanted else []
        for f, header in zip(new, read[len(wanted) :], strict=True):
            self.shards.check_header(f, header)
            self._checked_headers.add(f)
        return [np.frombuffer(part, self._stored) for part in read[: len(wanted)]]

    def stored(self, indices: np.ndarray) -> np.ndarray:
        """How many tokens the blocks [n] have on the disk [n] int32, padding included."""
        left = self._chunk - np.asarray(indices, np.int64) % self._per_file * (self.seq_len + 1)
        return np.minimum(self.seq_len + 1, left).astype(np.int32)

    def missing(self) -> list[str]:
        """Names that are missing between the files' numbers; the original's builder counts from NAME_0000000000.bin."""
        numbered = [match for file in self._files if (match := re.fullmatch(r"(.*_)(\d{10})\.bin", file.name))]
        pairs = itertools.pairwise((match[1], int(match[2])) for match in numbered)
        return [f"{name}{i:010d}.bin" for (before, a), (name, b) in pairs if before == name for i in range(a + 1, b)]

    def verify(self, after_file: Callable[[], None]) -> None:
        """Reads all files, calls `after_file` after each, and sets `sha256` to a hash of them all, which a run records."""
        self.sha256 = hashlib.sha256("".join(self._checksums(after_file)).encode()).hexdigest()

    def _padded(self, tokens: np.ndarray, length: np.ndarray) -> np.ndarray:
        rows = np.arange(len(tokens))
        last, before = (tokens[rows, np.maximum(length - back, 0)] for back in (1, 2))
        vocabulary = self.manifest["tokenizer"]
        return (length > 1) & (last == before) & ((last == vocabulary["bos_id"]) | (last == vocabulary["eos_id"]))

    def _without_padding(self, tokens: np.ndarray) -> int:
        others = np.flatnonzero(tokens != tokens[-1])
        end = int(others[-1]) + 1 if others.size else 0
        return end + int(end and tokens[-1] == self.manifest["tokenizer"]["eos_id"])

    def _reader(self, file: int) -> tuple[mmap.mmap, np.ndarray]:
        with self._lock:
            if file not in self._readers:
                if len(self._readers) >= may_open(min(len(self._files), MAPPED)):
                    self._readers.pop(next(iter(self._readers)))  # it stays mapped while another thread still copies from it
                try:
                    with files.open_regular(self._local(file)) as opened:
                        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
                    mapped.madvise(mmap.MADV_RANDOM)  # else each fault reads 128 KiB
                    self._readers[file] = mapped, np.frombuffer(mapped, self._stored, self._chunk, HEADER.size)
                except (OSError, ValueError) as error:
                    raise self._damaged(file, 0, error) from None
            return self._readers[file]


def _headers(files: list[Place]) -> tuple[np.dtype, int, list[bytes]]:
    """(dtype, tokens per file, headers). Raises UserError naming the first file that is truncated or unlike the others.

    In a bucket only the first header is read: the others must be the same, and are checked with the first bytes of each file.
    """
    if isinstance(files[0], Remote):
        first, sizes = store.read(files[0], 0, HEADER.size), bucket.listing(Remote(files[0].url.rpartition("/")[0]))
        headers = [(first, sizes[file.name][0]) for file in files]
    else:
        with ThreadPoolExecutor(16) as pool:  # over a network 16 headers arrive in the time of one
            parts = pool.map(lambda i: [_header(file) for file in files[i : i + AHEAD]], range(0, len(files), AHEAD))
            headers = [header for part in parts for header in part]
    checked = None
    for file, (header, size) in zip(files, headers, strict=True):
        if (header, size) == checked:
            continue
        if len(header) < HEADER.size:
            raise Damaged(f"{file}: is truncated: {size} bytes, and its header alone takes {HEADER.size}; copy it again")
        magic, version, code, chunk = HEADER.unpack(header)
        if magic != MAGIC:
            raise Damaged(f"{file}: begins with {magic!r}, not {MAGIC!r}: not LITPKDS, or damaged; move it or copy it again")
        if version != VERSION:
            raise Damaged(f"{file}: is of version {version}; only version {VERSION} is known")
        if CODES.get(code) not in WRITTEN:
            raise Damaged(f"{file}: holds {CODES.get(code, f'dtype {code}')}; tokens are {' or '.join(WRITTEN)}")
        dtype = np.dtype(CODES[code]).newbyteorder("<")
        if size != (whole := HEADER.size + chunk * dtype.itemsize) or not chunk:
            raise Damaged(f"{file}: has {size:,} bytes, and its header says {whole:,} ({chunk:,} tokens); copy it again")
        if checked is not None:
            first = HEADER.unpack(checked[0])
            raise Damaged(
                f"{file}: has {chunk:,} tokens of {CODES[code]}, and {files[0]} has {first[3]:,} of {CODES[first[2]]}; "
                "all files of a source must have the same: move those of another source away"
            )
        checked = header, size
    return dtype, chunk, [header for header, _ in headers]


def _header(path: Path) -> tuple[bytes, int]:
    try:
        with files.open_regular(path) as file:  # unbuffered: reads the header alone, of up to 430,000 files
            return file.raw.read(HEADER.size), os.fstat(file.fileno()).st_size
    except UserError as error:
        raise Damaged(str(error)) from None


def tokenizer_beside(folder: Path) -> tokenizer_lib.Tokenizer:
    """The tokenizer in FOLDER/tokenizer or FOLDER. Raises UserError if there is none."""
    for place in (folder / "tokenizer", folder):
        if any((place / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
            return tokenizer_lib.load(place)
    raise UserError(f"{folder}: has no tokenizer beside its LITPKDS files; copy it to {folder / 'tokenizer.model'}")
