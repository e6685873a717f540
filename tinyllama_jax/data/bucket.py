"""Data sets in a bucket (gs://, s3://): whole shards in a cache on local disk, and byte ranges of shards not yet in the cache.

A cached shard is CACHE/NAME-HASH/FILE.cached. It is written under another name, and renamed once its size and SHA-256 are
right. Processes of one host share the cache: each locks the shard that it downloads, and holds a shared lock on its data sets,
so that others do not remove them.
"""

import contextlib
import fcntl
import functools
import hashlib
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tinyllama_jax.base import store
from tinyllama_jax.base.errors import UserError, disk_error
from tinyllama_jax.base.files import MARK, check_local, claim, make_folder, sha256
from tinyllama_jax.base.store import Remote

SHARE = 0.8  # of the free disk: the limit of a cache without a size
PIECE = 1 << 25  # bytes of a shard in one request
GAP = 1 << 17  # most bytes between two ranges of one request: reading them takes 1.5 ms, as does a request on the CPU
THREADS = 4  # that download shards
WAITS = 1, 2, 4, 8, 15, 30  # seconds before each retry; s3fs and gcsfs themselves try about five times
OUTAGES = 10  # downloads of shards that may fail, after these retries, before the run ends
EVERY = 600  # most seconds between two lines on the cache
SMALL = 1 << 26  # most bytes of a manifest or a tokenizer's file


class Damaged(UserError):
    """A file of a data set has changed since it was written."""


def remote(path: str | Path) -> Remote | None:
    """The place of a source in an object store; None for a local one. Raises UserError for an unknown kind of store."""
    url = re.fullmatch(r"([A-Za-z][A-Za-z0-9]*):(/+)(.*)", str(path), re.DOTALL)  # pathlib turns two slashes into one
    return store.place(f"{url[1]}://{url[3]}", "--data.sources") if url else None


@functools.lru_cache(8)
def listing(folder: Remote) -> dict[str, tuple[int, str]]:
    """File -> (bytes, its ETag or MD5) of a folder. Listed once in a process, since a list takes a while."""
    try:
        with store.reaching(folder) as system:  # without retries: what fails at the start is a login or a name
            entries = system.ls(folder.url, detail=True)
    except FileNotFoundError:
        return {}
    mark = lambda entry: str(entry.get("ETag") or entry.get("md5Hash") or entry.get("etag") or "")
    path = folder.url.partition("://")[2]
    files = [e for e in entries if e["type"] == "file" and e["name"].rpartition("/")[0] == path]  # else `folder` is a file
    return {e["name"].rpartition("/")[2]: (e["size"], mark(e)) for e in files}


def _insist(at: str, work: Callable[[Any], Any]) -> Any:
    """Calls `work` with `at`'s file system; retries if the store cannot be reached. Raises UserError, FileNotFoundError."""
    for tried, wait in enumerate((*WAITS, None), 1):
        try:
            with store.reaching(at) as system:
                return work(system)
        except UserError as error:
            if isinstance(error, Damaged) or isinstance(error.__context__, PermissionError | ImportError):
                raise
            if wait is None:
                raise UserError(f"{error} (tried {tried} times in {sum(WAITS)} s); is the network up?") from None
            time.sleep(wait)
    raise AssertionError


# -- the cache --------------------------------------------------------------------------------------------------------------


class Cache:
    """A folder for shards of any number of data sets, with a limit on their size. Can be pickled."""

    def __init__(self, text: str):
        """`text`: the value of `data.cache`. Raises UserError."""
        folder, _, size = text.rpartition(":") if ":" in text else (text, "", "")
        form = "must be FOLDER or FOLDER:GB, such as /mnt/ssd/cache:500"
        try:
            check_local("--data.cache", text or "-")
            number = float(size or 0)
            if not 0 <= number <= 1e9 or re.fullmatch(r"[\d.]+([kKmMgGtT][bB]?)?", folder):
                raise ValueError
        except ValueError:
            raise UserError(f"--data.cache={text}: {form}") from None
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyllama_jax" / "data"
        self.text, self.folder = text, Path(os.path.abspath(os.path.expanduser(folder) or home))
        self._limit = int(number * 1e9) if size else None
        self._lock, self._used, self._next_look = threading.Lock(), 0, -math.inf

    def __reduce__(self) -> tuple:
        return cache, (self.text,)

    @functools.cached_property
    def limit(self) -> int:
        """Bytes that the shards may take: as configured, or 80% of the free space."""
        free = shutil.disk_usage(self.folder).free
        return int(SHARE * (free + sum(entry[1] for entry in self._entries()))) if self._limit is None else self._limit

    def data_set(self, source: Remote, small: list[Remote], identity: str = "") -> Path:
        """The folder of a data set, with copies of its `small` files. Nobody empties it while this process lives.

        These files and `identity` distinguish it from another data set of the same name.
        """
        contents = [_insist(file.url, lambda system, url=file.url: system.cat_file(url, end=SMALL)) for file in small]
        digest = hashlib.sha256(b"\0".join([f"{source} {identity}".encode(), *contents])).hexdigest()
        folder = self.folder / f"{source.name}-{digest[:16]}"
        make_folder("--data.cache", self.text or self.folder, folder)
        if folder not in _HELD:
            self.room(0)  # a lower limit than in an earlier run
            _HELD[folder] = os.open(folder / MARK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            with contextlib.suppress(OSError):  # a file system without locks: nothing is removed there
                fcntl.flock(_HELD[folder], fcntl.LOCK_SH)
        for file, content in zip(small, contents, strict=True):
            local = folder / ("manifest.json" if file.name == "manifest.json" else f"tokenizer/{file.name}")
            local.parent.mkdir(exist_ok=True)
            if not local.is_file() or local.read_bytes() != content:
                store.write(local, content)
        return folder

    def room(self, size: int, file: BinaryIO | None = None) -> bool:
        """Evicts shards if `size` more bytes need their room; returns whether these bytes then fit.

        Data sets that a process reads keep theirs; the least recently opened go first. The empty `file` gets a size that fits.
        """
        with self._lock:
            if time.monotonic() >= self._next_look:
                began = time.monotonic()
                self._used = sum(entry[1] for entry in self._entries())
                self._next_look = time.monotonic() + 20 * (time.monotonic() - began)  # of 400,000 files it takes a second
            if self._used + size > self.limit:
                self._remove(size)
            fits = self._used + size <= self.limit
            if fits and file:
                file.truncate(size)
                self._used += size
            return fits

    def _entries(self) -> list[tuple[int, int, Path]]:
        """(time of use, bytes, path) of every file that a cache has made here."""
        out = []
        for folder in self.folder.iterdir() if self.folder.is_dir() else ():
            with contextlib.suppress(OSError):  # other processes remove files too
                if re.fullmatch(r".*-[0-9a-f]{16}", folder.name) and (folder / MARK).is_file():
                    with os.scandir(folder) as entries:
                        for entry in entries:
                            if entry.name.endswith((".cached", ".partial")) and entry.is_file(follow_symlinks=False):
                                out.append((entry.stat().st_mtime_ns, entry.stat().st_size, Path(entry.path)))
        return out

    def _remove(self, size: int) -> None:
        entries = sorted(self._entries())
        self._used = sum(entry[1] for entry in entries)
        with contextlib.ExitStack() as locks:
            free = {}
            for folder in {path.parent for _, _, path in entries}:
                mark = os.open(folder / MARK, os.O_RDWR | os.O_CLOEXEC)
                locks.callback(os.close, mark)
                try:
                    fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    free[folder] = True
                except OSError:  # a process reads this data set
                    free[folder] = False
            for _, length, path in entries:
                if self._used + size <= self.limit:
                    return
                if free[path.parent]:
                    path.unlink(missing_ok=True)
                    self._used -= length


_HELD: dict[Path, int] = {}  # folder of a data set -> the file that this process has locked there


@functools.lru_cache(8)
def cache(text: str) -> Cache:
    """The cache of a value of `data.cache`, one in a process. Raises UserError."""
    return Cache(text)


# -- the shards of a split ----------------------------------------------------------------------------------------------------


class Shards:
    """The files of one split in a bucket. Thread-safe. Can be pickled."""

    def __init__(self, source: Remote, cache: Cache, folder: Path, files: list[Remote], sizes: list[int], sha256: list[str]):
        """`folder`: from `Cache.data_set`. `sha256`: of each file, or empty."""
        self.source, self.cache, self.folder, self.files, self.sizes = source, cache, folder, files, sizes
        self._sha256 = sha256
        self.header = b""  # with which every file begins
        for i, size in enumerate(sizes):
            if (path := self.path(i)).exists() and path.stat().st_size != size:  # a crash of the machine
                path.unlink(missing_ok=True)
        self._start()

    def _start(self) -> None:
        self.full = ""  # why no more shards are downloaded
        self.error: UserError | None = None  # of a download
        self.notes: list[str] = []
        self.whole_bytes = self.range_bytes = self.whole_blocks = self.range_blocks = 0
        self.seconds = 0.0  # in which blocks were read, of all threads together
        self._began = time.monotonic()
        self._next_line, self._lock = -math.inf, threading.Lock()

    def __getstate__(self) -> dict:
        return {k: getattr(self, k) for k in ("source", "cache", "folder", "files", "sizes", "_sha256", "header")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start()

    def path(self, i: int) -> Path:
        """The path of a shard in the cache."""
        return self.folder / f"{self.files[i].name}.cached"

    def whole(self, i: int) -> bool:
        """Whether a shard is in the cache. Raises the error of a download."""
        if self.error:
            raise self.error
        return self.path(i).exists()

    def count(self, whole: int, by_range: int, seconds: float) -> None:
        """Counts blocks that were read."""
        with self._lock:
            self.whole_blocks += whole
            self.range_blocks += by_range
            self.seconds += seconds

    def ranges(self, wanted: list[tuple[int, int, int]]) -> list[bytes]:
        """The bytes of each (shard, start, end); ranges close together are one request. Raises UserError, Damaged."""
        order, spans, places = sorted(range(len(wanted)), key=wanted.__getitem__), [], {}
        for k in order:
            i, start, end = wanted[k]
            if spans and spans[-1][0] == i and start - spans[-1][2] <= GAP:
                spans[-1][2] = max(spans[-1][2], end)
            else:
                spans.append([i, start, end])
            places[k] = len(spans) - 1
        parts = self._read(spans)
        with self._lock:
            self.range_bytes += sum(map(len, parts))
        cut = lambda span, start, end: parts[span][start - spans[span][1] : end - spans[span][1]]
        return [cut(places[k], start, end) for k, (_, start, end) in enumerate(wanted)]

    def _read(self, spans: list) -> list[bytes]:
        """The bytes of each (shard, start, end), all requested together. Raises UserError, Damaged."""
        out: list[bytes | None] = [None] * len(spans)

        def ask(system: Any) -> None:
            left = [k for k, part in enumerate(out) if part is None]
            files, starts, ends = map(list, zip(*(spans[k] for k in left), strict=True))
            parts = system.cat_ranges([self.files[i].url for i in files], starts, ends, on_error="return")
            for k, part in zip(left, parts, strict=True):
                i, start, end = spans[k]
                if isinstance(part, FileNotFoundError):
                    raise Damaged(f"{self.files[i]}: is not there any more; put it back, or prepare the data again")
                if isinstance(part, bytes) and len(part) != end - start:
                    what = f"bytes {start:,} to {end:,} came as {len(part):,} bytes"
                    raise Damaged(f"{self.files[i]}: has changed: {what}; put the old one back, or start again")
                out[k] = part if isinstance(part, bytes) else None
            if failed := next((part for part in parts if isinstance(part, BaseException)), None):
                raise failed

        if spans:
            _insist(str(self.files[spans[0][0]]) if len(spans) == 1 else self.source.url, ask)
        return out

    def fetch(self, i: int, wait: float = 0.0) -> bool:
        """Downloads a shard. Returns False if the cache is full, or another process still downloads it after `wait` s.

        Raises UserError, and Damaged if it is not what the manifest says.
        """
        if self.whole(i) or self.full:
            return self.whole(i)
        partial = self.path(i).with_suffix(".partial")
        try:
            with os.fdopen(claim(partial, "busy", wait), "rb+") as file:
                return self._fetched(i, partial, file)
        except OSError as error:
            self.full = disk_error(error)
            self.notes.append(f"warning: --data.cache={self.cache.text or self.cache.folder}: {self.full}")
            return False
        except UserError as error:
            if str(error) != "busy":
                raise
            return False

    def _fetched(self, i: int, partial: Path, file: BinaryIO) -> bool:
        """Fills `partial`, locked as `file`, and renames it."""
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed it
            if os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                try:
                    if not self.whole(i):
                        self._fill(i, file)
                        os.replace(partial, self.path(i))
                finally:
                    partial.unlink(missing_ok=True)
        return self.whole(i)

    def _fill(self, i: int, file: BinaryIO) -> None:
        """Writes a shard to the empty `file`, if there is room. Raises Damaged, and FileNotFoundError if there is none."""
        file.truncate(0)
        if not self.cache.room(self.sizes[i], file):
            self.full = "the cache is full"
            self.notes.append(f"data.cache: {self.source}: {self.full}; blocks of the other shards are read one by one")
            raise FileNotFoundError
        hashed = hashlib.sha256()
        for start in range(0, self.sizes[i], PIECE):
            (piece,) = self._read([(i, start, min(start + PIECE, self.sizes[i]))])
            with self._lock:
                self.whole_bytes += len(piece)
            self.check_header(i, piece if not start else self.header)
            hashed.update(piece)
            file.write(piece)
        if self._sha256 and (checksum := hashed.hexdigest()) != self._sha256[i]:
            what = f"is not as it was prepared (its sha256 is {checksum})"
            raise Damaged(f"{self.files[i]}: {what}; copy or prepare the data again")
        file.flush()
        os.fsync(file.fileno())

    def check_header(self, i: int, begin: bytes) -> None:
        """Raises Damaged if `begin`, the first bytes of a file, are not those of all files."""
        if not begin.startswith(self.header):
            raise Damaged(f"{self.files[i]}: does not begin as {self.files[0]} does ({begin[:24]!r}); copy it again")

    def sha256(self, i: int) -> str:
        """SHA-256 of a shard: of the cached one, downloaded again if it is damaged; else of the bytes in the bucket."""
        for _ in range(2):
            if self.fetch(i, wait=60):
                checksum = sha256(self.path(i))
                if not self._sha256 or checksum == self._sha256[i]:
                    return checksum
                self.notes.append(f"warning: {self.path(i)}: was damaged on this disk, and is downloaded again")
                self.path(i).unlink()
        hashed = hashlib.sha256()
        for start in range(0, self.sizes[i], PIECE):
            hashed.update(self._read([(i, start, min(start + PIECE, self.sizes[i]))])[0])
        return hashed.hexdigest()

    def news(self, last: bool = False) -> list[str]:
        """Warnings, and a line on the cache: at the start, less and less often until all shards are there, and at the end."""
        notes, self.notes = list(dict.fromkeys(self.notes)), []  # several threads meet the same full disk
        if time.monotonic() < self._next_line and not last:
            return notes
        names = {path.name for path in self.folder.glob("*.cached")}
        held = [size for i, size in enumerate(self.sizes) if self.path(i).name in names]
        gb, total, limit = (n / 1e9 for n in (sum(held), sum(self.sizes), self.cache.limit))
        line = f"data.cache: {self.source}: {len(held):,} of {len(self.sizes):,} shards, {gb:,.3f} of {total:,.3f} GB, are in "
        line += f"{self.folder} (limit {limit:,.1f} GB)"
        if self._next_line < 0 and len(held) < len(self.sizes):
            line += "; a block of another shard is read alone until that shard is there"
            line += f"; they do not all fit: {1 - limit / total:.0%} of the blocks will always be read alone" * (total > limit)
        if blocks := self.whole_blocks + self.range_blocks:
            rate = (self.whole_bytes + self.range_bytes) / 1e6 / (time.monotonic() - self._began)
            line += f"; downloaded {self.whole_bytes / 1e9:,.3f} GB of shards and {self.range_bytes / 1e9:,.3f} GB of single "
            line += f"blocks, {rate:,.1f} MB/s; of {blocks:,} blocks {self.whole_blocks / blocks:.1%} were on the disk; "
            line += f"{blocks / max(self.seconds, 1e-9):,.0f} blocks a second per thread"
        wait = math.inf if len(held) == len(self.sizes) else min(max(2 * (time.monotonic() - self._began), 10), EVERY)
        self._next_line = time.monotonic() + wait
        return [*notes, line]


def ahead(needed: Iterator[tuple[Shards, int]]) -> None:
    """Downloads shards in the background, in this order. Errors are raised where the blocks are read."""
    lock, later = threading.Lock(), []

    def fetch() -> None:
        outages = 0
        while True:
            with lock:
                one = next(needed, None) or (later.pop(0) if later else None)
            if one is None:
                return
            shards, i = one
            try:
                if not shards.fetch(i) and not shards.full:  # another process is at it
                    later.append(one)
                    time.sleep(0.2)
            except UserError as error:
                outages += 1
                if isinstance(error, Damaged) or outages >= OUTAGES:
                    shards.error = error
                    return
                later.append(one)
                shards.notes.append(f"warning: {error}; its shard is downloaded later")

    for _ in range(THREADS):
        threading.Thread(target=fetch, daemon=True).start()
