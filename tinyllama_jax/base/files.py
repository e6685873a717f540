"""Reading and writing files safely: typed JSON with limits, regular files only, atomic writes, checksums, locks."""

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

from tinyllama_jax.base.errors import UserError

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
    """Raises UserError if a path that must be local is a URL. Without this gs://BUCKET/RUN would be made as a folder gs:/.

    Also if it is not UTF-8. `option`: the option that gave the path, such as "--workdir".
    """
    check_utf8(path)
    if url := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", str(path), re.DOTALL):
        cure = f"write /{url[3]}" if url[1].lower() == "file" else "mount it, or copy it to a disk, and name that folder"
        slashes = url[2] if len(url[2]) > 1 else "//"  # pathlib turns two into one
        raise UserError(f"{option}={url[1]}:{slashes}{url[3]}: is a URL, and must be a local path; {cure}")


def open_regular(path: str | Path) -> typing.BinaryIO:
    """Opens a file for reading. Raises UserError if it is a folder, pipe, device or socket; OSError as `open` does."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: opening a named pipe would wait for a writer
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UserError(f"{path}: is not a regular file")
    return os.fdopen(file, "rb")


def read_json(path: str | Path, kind: type[T], remedy: str = "", largest: int = LARGEST_JSON) -> T:
    """The JSON in a file as `kind`: a TypedDict, `list[...]` or any other type that msgspec decodes; unknown keys are left out.

    Raises UserError if the file holds something else, or is too large or too deep; the message names file and key and ends
    with `remedy`. Raises OSError if the file cannot be read.
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
    """JSON as `kind`. Raises ValueError with one line that names the key if the JSON does not fit."""
    try:
        return msgspec.json.decode(text, type=kind)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


_LEFT = {"lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "system volume information", "$recycle.bin"}


def listed(folder: str | Path) -> list[str]:
    """Names in `folder`, sorted, without those of file managers, NFS and servers: hidden ones, `lost+found`, `@eaDir`."""
    return sorted(n for n in os.listdir(folder) if not n.startswith((".", "@", "#")) and n.lower() not in _LEFT)


def write(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: even after a power cut it is whole, either the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as f:
        f.write(content.encode() if isinstance(content, str) else content)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)


def sha256(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open_regular(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


Size = typing.Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]  # of a model's dimension
Positive = typing.Annotated[float, msgspec.Meta(gt=0, le=1e18)]


def typed(value: object, kind: type[T]) -> T:
    """A decoded value as `kind`; unknown keys are left out. Raises ValueError as `decode_json` does."""
    return msgspec.convert(value, kind)


def claim(path: Path, busy: str, seconds: float = 10.0) -> int:
    """Locks the file at `path`, made if absent, and returns its descriptor. Closing it, or the end of the process, unlocks it.

    Raises UserError(busy) if another process still holds the lock after `seconds`, which give a killed process time to end.
    On a file system without locks nobody is kept out.
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


MARK = ".tinyllama_jax"  # a file that marks a workplace; the process that holds its lock is at work there


@contextlib.contextmanager
def workplace(path: Path, busy: str) -> Iterator[Path]:
    """The folder `path`, for this process alone, to make things in; it is removed when the `with` block ends.

    At its start it may hold what a killed process left. Raises UserError(busy) if another process works there, and UserError,
    leaving the folder as it is, if it was not made by this function.
    """
    path.mkdir(parents=True, exist_ok=True)
    foreign = not (path / MARK).is_file() and any(not name.startswith(".nfs") for name in os.listdir(path))
    if path.is_symlink() or foreign:
        raise UserError(f"{path}: is needed for what is half made, and holds other things; move it away")
    file = claim(path / MARK, busy, seconds=1)
    try:
        mark = os.stat(path / MARK) if (path / MARK).exists() else None
        if not mark or not os.path.samestat(mark, os.fstat(file)):
            raise UserError(busy)  # the other process ended this very moment, and removed the file that we have locked
        try:
            yield path
        finally:
            rmtree(path, ignore_errors=True)
    finally:
        os.close(file)


def settle(folder: Path) -> None:
    """Waits until `folder` and everything in it are on the disk, so that a power cut leaves no empty or partial files."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
