"""Reading and writing files safely: typed JSON with limits, regular files only, atomic writes, checksums, locks."""

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

from tinyllama_jax.base.errors import UserError, disk_error

T = typing.TypeVar("T")
LARGEST_JSON = 1 << 28  # bytes; the manifest of SlimPajama's 5,000 shards is about 1 MB
Count = typing.Annotated[int, msgspec.Meta(ge=0, le=2**62)]  # a number of things, or bytes


def check_utf8(path: str | Path) -> None:
    """Raises UserError if a path is not UTF-8: Orbax, ArrayRecord, TensorBoard and matplotlib accept no other."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: is a name that is not UTF-8; rename it, or move it elsewhere") from None


def check_local(option: str, path: str | Path) -> None:
    """Raises UserError if a path is empty, a URL, or not UTF-8. Without this, gs://BUCKET/RUN would create a local folder gs:/.

    `option`: the option that gave the path, such as "--workdir".
    """
    check_utf8(path)
    if path == "":  # as from an unset variable of a shell; pathlib takes it for the current folder
        raise UserError(f"{option} is empty; give a path")
    if url := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", str(path), re.DOTALL):
        cure = f"write /{url[3]}" if url[1].lower() == "file" else "mount it, or copy it to a disk, and name that folder"
        tools = {"s3": "aws s3 cp --recursive", "gs": "gcloud storage cp -r"}
        cure += f" ({tools[url[1]]} URL FOLDER)" if url[1] in tools else ""
        slashes = url[2] if len(url[2]) > 1 else "//"  # pathlib turns two into one
        raise UserError(f"{option}={url[1]}:{slashes}{url[3]}: is a URL, and must be a local path; {cure}")


def make_folder(option: str, path: str | Path, folder: Path) -> None:
    """Makes `folder`, which the value `path` of an option needs. Raises UserError naming the option if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}={path}: {disk_error(error)}; name a folder that can be made") from None


def open_regular(path: str | Path) -> typing.BinaryIO:
    """Opens a file for reading. Raises UserError if it is a folder, pipe, device or socket; OSError as `open` does."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: opening a named pipe would wait for a writer
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UserError(f"{path}: is not a regular file")
    return os.fdopen(file, "rb")


def exists(path: str | Path) -> bool:
    """Whether a directory has the entry `path`, even a dangling link. Raises OSError if the disk cannot tell."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_json(path: str | Path, kind: type[T], remedy: str = "", largest: int = LARGEST_JSON) -> T:
    """Decodes a JSON file as `kind`: a TypedDict, `list[...]` or any other type that msgspec decodes; unknown keys are ignored.

    Raises UserError if the file does not fit, is too large or too deep; the message names file and key and ends with
    `remedy`. Raises OSError if the file cannot be read.
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
    """Decodes JSON as `kind`. Raises ValueError, one line that names the key, if it does not fit."""
    try:
        return msgspec.json.decode(text, type=kind)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


_SYSTEM_FILES = {"lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "system volume information", "$recycle.bin"}


def listed(folder: str | Path) -> list[str]:
    """Names in `folder`, sorted, without files of file managers, NFS and servers: hidden ones, `lost+found`, `@eaDir`."""
    return sorted(n for n in os.listdir(folder) if not n.startswith((".", "@", "#")) and n.lower() not in _SYSTEM_FILES)


def write(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: even after a power cut, the path holds all of the old content or all of the new."""
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
Nats = typing.Annotated[float, msgspec.Meta(ge=0, le=1e4)]  # of a loss


def typed(value: object, kind: type[T]) -> T:
    """Converts a decoded value to `kind`; unknown keys are ignored. Raises ValueError as `decode_json` does."""
    return msgspec.convert(value, kind)


def claim(path: Path, busy: str, seconds: float = 10.0) -> int:
    """Locks the file at `path`, created if absent, and returns its descriptor. Closing it or ending the process unlocks it.

    Raises UserError(busy) if another process still holds the lock after `seconds`, in which a killed process can end.
    On a file system without locks no process is kept out.
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


MARK = ".tinyllama_jax"  # the file that marks a workplace; the process that holds its lock works there


@contextlib.contextmanager
def workplace(path: Path, busy: str) -> Iterator[Path]:
    """A scratch folder `path` for this process alone; it is removed when the `with` block ends.

    At the start it may hold files of a killed process. Raises UserError(busy) if another process works there, and UserError,
    leaving the folder as it is, if this function did not create it.
    """
    path.mkdir(parents=True, exist_ok=True)
    foreign = not (path / MARK).is_file() and any(not name.startswith(".nfs") for name in os.listdir(path))
    if path.is_symlink() or foreign:
        raise UserError(f"{path}: is needed as a scratch folder, and holds other files; move it away")
    file = claim(path / MARK, busy, seconds=1)
    try:
        mark = os.stat(path / MARK) if (path / MARK).exists() else None
        if not mark or not os.path.samestat(mark, os.fstat(file)):
            raise UserError(busy)  # the other process has just ended, and removed the file that this one has locked
        try:
            yield path
        finally:
            rmtree(path, ignore_errors=True)
    finally:
        os.close(file)


def settle(folder: Path) -> None:
    """Syncs `folder` and everything in it to the disk, so that a power cut leaves no empty or partial files."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def new(output: str | Path, is_file: bool = False) -> Iterator[Path]:
    """A folder (or file) to write into, which is renamed to `output` if the `with` block succeeds, and removed otherwise."""
    check_local("--output", output)
    output = Path(os.path.abspath(output))
    usable = not is_file and output.is_dir() and not output.is_symlink() and not listed(output) and output != Path.cwd()
    if os.path.lexists(output) and not usable:
        raise UserError(f"--output {output}: exists already; name a new {'file' if is_file else 'folder'}, or remove it")
    with workplace(output.with_name(f".{output.name}.partial"), f"--output {output}: another process is writing it") as place:
        folder = place / "whole"
        rmtree(folder, ignore_errors=True)  # left by a process that was killed
        if not is_file:
            folder.mkdir()
        yield folder
        for name in os.listdir(output) if output.is_dir() else ():  # files of a file manager: see `listed`
            os.replace(output / name, folder / name)
        settle(folder)
        os.replace(folder, output)
