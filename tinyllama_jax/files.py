"""Files on a disk that nobody vouches for: typed JSON with limits, whole writes, checksums, locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import msgspec

from tinyllama_jax.errors import UserError

T = typing.TypeVar("T")
LARGEST_JSON = 1 << 28  # bytes; the manifest of SlimPajama's 5,000 shards is about 1 MB
Count = typing.Annotated[int, msgspec.Meta(ge=0, le=2**62)]  # a number of things, or bytes


def check_utf8(path: str | Path) -> None:
    """Raises UserError if a path is not UTF-8. Orbax, ArrayRecord, TensorBoard and matplotlib take no other."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: is a name that is not UTF-8; rename what is not, or move it elsewhere") from None


def check_local(option: str, path: str | Path) -> None:
    """Raises UserError if a path that must be local is a URL, such as gs://BUCKET/RUN: as a path that is the folder gs:/.

    Also if it is not UTF-8. `option`: what it was given with, such as "--workdir".
    """
    check_utf8(path)
    if url := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", str(path), re.DOTALL):
        cure = f"write /{url[3]}" if url[1].lower() == "file" else "mount it, or copy it to a disk, and name that folder"
        slashes = url[2] if len(url[2]) > 1 else "//"  # pathlib makes one of two
        raise UserError(f"{option}={url[1]}:{slashes}{url[3]}: is a URL, and must be a local path; {cure}")


def open_regular(path: str | Path) -> typing.BinaryIO:
    """Opens a file for reading. Raises UserError if it is a folder, pipe, device or socket; OSError as `open` does."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a named pipe would wait for a writer
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UserError(f"{path}: is not a regular file")
    return os.fdopen(file, "rb")


def read_json(path: str | Path, kind: type[T], remedy: str = "", largest: int = LARGEST_JSON) -> T:
    """The JSON in a file as `kind`: a TypedDict, `list[...]` or whatever else msgspec decodes; unknown keys are left out.

    Raises UserError that names the file and the key if it is something else, too large or too deep, and ends with `remedy`;
    OSError if it cannot be read.
    """
    with open_regular(path) as f:
        text = f.read(largest + 1)
    try:
        if len(text) > largest:
            raise ValueError(f"has more than {largest:,} bytes")
        return decode_json(text, kind)
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error})" + (f"; {remedy}" if remedy else "")) from None


def decode_json(text: bytes | str, kind: type[T]) -> T:
    """JSON as `kind`. Raises ValueError, of one line that names the key, if it is something else."""
    try:
        return msgspec.json.decode(text, type=kind)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


_LEFT = {"lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "system volume information", "$recycle.bin"}


def listed(folder: str | Path) -> list[str]:
    """Names in `folder`, sorted, without what file managers, NFS and servers leave: hidden ones, `lost+found`, `@eaDir`."""
    return sorted(n for n in os.listdir(folder) if not n.startswith((".", "@", "#")) and n.lower() not in _LEFT)


def write(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is either the old one or the new one, whole, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as f:
        f.write(content.encode() if isinstance(content, str) else content)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)


def sha256(path: str | Path) -> str:
    """Of a file's bytes, in hex."""
    with open_regular(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


Size = typing.Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]  # of a model's dimension
Positive = typing.Annotated[float, msgspec.Meta(gt=0, le=1e18)]


def typed(value: object, kind: type[T]) -> T:
    """A value that is no JSON any more as `kind`, with its other keys left out. Raises ValueError as `decode_json` does."""
    return msgspec.convert(value, kind)


def claim(path: Path, busy: str, seconds: float = 10.0) -> int:
    """Locks the file at `path`, made if absent, and returns its descriptor: close it to let go. The kernel does if we die.

    Raises UserError(busy) if another process has it for so many seconds: a killed one may still be ending. Where the file
    system has no locks nobody is kept out.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(file)
                raise UserError(busy) from None
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                os.close(file)
                raise
            return file


@contextlib.contextmanager
def locked(path: Path, busy: str, seconds: float = 10.0) -> Iterator[None]:
    """`claim` for the length of a block; the file stays."""
    file = claim(path, busy, seconds)
    try:
        yield
    finally:
        os.close(file)


MARK = ".tinyllama_jax"  # in a folder of half-made things: that it is one, and who holds its lock is at work there


@contextlib.contextmanager
def workplace(path: Path, busy: str) -> Iterator[Path]:
    """The folder `path` for half-made things, for this process alone; it is removed when the block ends.

    What a killed process left in it is still there. Raises UserError(busy) if another process works there, and UserError if
    something else made that folder, which stays as it is.
    """
    path.mkdir(parents=True, exist_ok=True)
    foreign = not (path / MARK).is_file() and any(not name.startswith(".nfs") for name in os.listdir(path))
    if path.is_symlink() or foreign:
        raise UserError(f"{path}: is needed for what is half made, and holds other things; move it away")
    file = claim(path / MARK, busy, seconds=1)
    try:
        mark = os.stat(path / MARK) if (path / MARK).exists() else None
        if not mark or not os.path.samestat(mark, os.fstat(file)):
            raise UserError(busy)  # it ended this very moment, and removed what we have locked
        try:
            yield path
        finally:
            rmtree(path, ignore_errors=True)
    finally:
        os.close(file)


def settle(folder: Path) -> None:
    """Waits until `folder` and all that is in it are on the disk: a power cut leaves no hollow file of that name."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
