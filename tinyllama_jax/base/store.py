"""A place for files: a local folder, or one in an object store (s3://, gs://) through fsspec.

In both, a file appears when it is complete. Only a local folder is locked, synced to disk and renamed at the end; in an object
store a data set is complete once its manifest, which is written last, is there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import check_local, listed, open_regular, sha256

SCHEMES = {"s3": "s3fs", "gs": "gcsfs"}  # of a URL -> the package that fsspec reads it with


@dataclass(frozen=True)
class Remote:
    """A file or folder in an object store. Can be pickled."""

    url: str

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def with_name(self, name: str) -> Remote:
        return Remote(f"{self.url.rpartition('/')[0]}/{name}")


Place = Path | Remote


def place(path: str | Path, option: str) -> Place:
    """`path` as a place. Raises UserError naming `option` for an unknown kind of store, or a bucket without a folder."""
    scheme, is_url, path_in_store = str(path).partition("://")
    if not is_url and any(str(path).startswith(f"{s}:/") for s in SCHEMES):  # pathlib removes a slash, too
        raise UserError(f"{option} {path}: needs two slashes after the colon")
    if not is_url:
        return Path(path)
    if scheme not in SCHEMES:
        raise UserError(f"{option} {path}: can be a folder, {' or '.join(f'{s}://BUCKET/FOLDER' for s in SCHEMES)}")
    if not all(path_in_store.rstrip("/").partition("/")[::2]):
        raise UserError(f"{option} {path}: must name a folder in a bucket, such as {scheme}://BUCKET/FOLDER")
    return Remote(f"{scheme}://{path_in_store.rstrip('/')}")


def check_workdir(workdir: str) -> None:
    """Raises UserError unless `workdir` can name a run folder: a local path, or a folder in a bucket without odd characters."""
    if not workdir.startswith(tuple(f"{scheme}:/" for scheme in SCHEMES)):
        return check_local("--workdir", workdir)
    parts = place(workdir, "--workdir").url.partition("://")[2].split("/")
    if set("*?[]{}#\\") & set(workdir) or {"", ".", ".."} & set(parts):
        raise UserError(f"--workdir={workdir}: must not contain * ? [ ] {{ }} # \\, an empty part, . or ..; rename it")
    return None


def filesystem(url: str) -> Any:
    """fsspec's file system for `url`. Raises UserError if the package that it needs is not installed."""
    scheme = url.partition("://")[0]
    logging.getLogger(SCHEMES[scheme]).setLevel(logging.CRITICAL)  # it logs a traceback of every error that it raises
    try:
        import fsspec  # only object stores need it

        # 64 requests of S3 at once, where aiobotocore has 10: a batch is a thousand of 3 KB. Other machines write there too
        more = {"config_kwargs": {"max_pool_connections": 64}} if scheme == "s3" else {}
        return fsspec.filesystem(scheme, use_listings_cache=False, **more)
    except ImportError:
        raise UserError(f"{url}: needs `pip install {SCHEMES[scheme]}`") from None


def matcher(pattern: str) -> Callable[[str], object]:
    """Returns a function that says whether a path, local or in an object store, matches a pattern with * ? [ or **."""
    import fsspec.utils

    return re.compile(fsspec.utils.glob_translate(pattern)).match


@contextlib.contextmanager
def reaching(at: Remote | str, doing: str = "read", absent: bool = True) -> Iterator[Any]:
    """fsspec's file system for `at`. Its errors become UserError; with `absent`, FileNotFoundError is let through."""
    try:
        yield filesystem(str(at))
    except UserError:
        raise
    except Exception as error:  # the libraries raise many types, for credentials, names, the network
        if absent and isinstance(error, FileNotFoundError):
            raise
        hints = {PermissionError: "no permission; log in, or ask for access: ", FileNotFoundError: "no such bucket or object: "}
        hint = next((text for kind, text in hints.items() if isinstance(error, kind)), "")
        raise UserError(f"{at}: cannot be {doing}: {hint}{' '.join(str(error).split()) or type(error).__name__}") from None


def names(folder: Place, folders: bool = False) -> set[str]:
    """Names of the files in `folder`, and of its folders if asked for; none if it is absent. See `files.listed`."""
    try:
        if isinstance(folder, Path):
            names_there = {*listed(folder)}
            with os.scandir(folder) as entries:  # scandir gives types without reading each file's status
                return {entry.name for entry in entries if entry.name in names_there and (folders or entry.is_file())}
        with reaching(folder) as system:
            entries = system.ls(folder.url, detail=True)
        return {e["name"].rstrip("/").rpartition("/")[2] for e in entries if folders or e["type"] == "file"}
    except FileNotFoundError:
        return set()


def holds_something(folder: Place) -> bool:
    """Whether there is anything in `folder`, or a file in its place."""
    if isinstance(folder, Path):
        return folder.exists() and not (folder.is_dir() and not listed(folder))
    with reaching(folder) as system:
        return system.exists(folder.url)


def read(file: Place, start: int = 0, end: int | None = None) -> bytes:
    """Bytes [start, end) of a file. Raises FileNotFoundError."""
    if isinstance(file, Path):
        with open_regular(file) as local:
            local.seek(start)
            return local.read(-1 if end is None else end - start)
    with reaching(file) as system:
        return system.cat_file(file.url, start=start or None, end=end)


def write(file: Place, content: str | bytes) -> None:
    """Writes a file, which appears when it is complete."""
    content = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    if isinstance(file, Path):
        temporary = temporary_name(file)
        temporary.write_bytes(content)
        os.replace(temporary, file)
    else:
        with reaching(file, "written", absent=False) as system:
            system.pipe_file(file.url, content)


def create(file: Remote, content: str) -> bool:
    """Writes a file unless it is there; returns whether it did. A store without conditional writes always does."""
    with reaching(file, "written", absent=False) as system:
        with contextlib.suppress(FileExistsError):
            system.pipe_file(file.url, content.encode(), mode="create")
            return True
        return system.cat_file(file.url) == content.encode()  # a request is sent again if its answer was lost


def sizes(folder: Remote) -> dict[str, int]:
    """Bytes of every file below `folder`, by its path from there; none if it is absent. Raises UserError, also for a/../b."""
    with reaching(folder, absent=False) as system:
        below = system.find(folder.url, detail=True).items()
    start = len(folder.url.partition("://")[2]) + 1
    out = {path[start:]: entry["size"] for path, entry in below if path[start:] and not path.endswith("/")}
    if odd := [path for path in out if {"", ".", ".."} & set(path.split("/"))]:
        raise UserError(f"{folder}/{odd[0]}: has an empty part or .. in its name, which no run writes; remove it")
    return out


def get(file: Remote, local: Path) -> None:
    """Copies a file to this machine, where it appears when it is complete. Raises FileNotFoundError."""
    local.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(local)
    with reaching(file) as system:
        system.get_file(file.url, str(temporary))
    os.replace(temporary, local)


def working_copy(workdir: str) -> Path:
    """The run folder on this machine: `workdir` itself, or for one in an object store a folder of the user's cache.

    The cache is ~/.cache, or what XDG_CACHE_HOME names.
    """
    scheme, is_url, path = workdir.partition("://")
    if not is_url:
        return Path(workdir)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyllama_jax" / "runs"
    bucket, _, name = path.rstrip("/").partition("/")
    return cache / scheme / bucket / urllib.parse.quote(name, safe="")  # one folder each, also for runs below one another


def put(local: Path, file: Place, keep: bool = False) -> None:
    """Moves (with `keep`: copies) a local file from the folder `staging` to its place, where it appears when it is complete."""
    if isinstance(file, Path):
        os.replace(local, file)
        return
    with reaching(file, "written", absent=False) as system:
        system.put_file(str(local), file.url)
    if not keep:
        local.unlink()


def copy(local: Path, folder: Place) -> None:
    """Copies the files of a local folder into another folder, which may be new."""
    make_folder(folder)
    for file in sorted(local.iterdir()):
        write(folder / file.name, file.read_bytes())


def make_folder(folder: Place) -> None:
    if isinstance(folder, Path):  # an object store has none
        folder.mkdir(parents=True, exist_ok=True)


def staging(folder: Place) -> Path:
    """The local folder for files that are on their way to `folder`: itself, or TMPDIR."""
    return folder if isinstance(folder, Path) else Path(tempfile.gettempdir())


def remove(at: Place) -> None:
    """Removes a file, or a folder and what is in it, if it is there."""
    if isinstance(at, Remote):
        with contextlib.suppress(FileNotFoundError), reaching(at) as system:
            system.rm(at.url, recursive=True)
    elif at.is_dir():
        shutil.rmtree(at, ignore_errors=True)
    else:
        at.unlink(missing_ok=True)


def remove_object(file: Remote) -> None:
    """Removes a file if it is there; unlike `remove` it asks for no list."""
    with contextlib.suppress(FileNotFoundError), reaching(file) as system:
        system.rm_file(file.url)


def is_whole(file: Place, size: int, checksum: str) -> bool:
    """Whether a file is complete: by checksum here, since workers do not sync to disk; in an object store by size only."""
    try:
        if isinstance(file, Path):
            return sha256(file) == checksum
        return bytes_of(file) == size
    except FileNotFoundError:
        return False


def bytes_of(file: Place) -> int:
    """The size of a file. Raises FileNotFoundError."""
    if isinstance(file, Path):
        return file.stat().st_size
    with reaching(file) as system:
        return system.size(file.url)


def modified_ns(file: Place) -> int:
    if isinstance(file, Path):
        return file.stat().st_mtime_ns
    with reaching(file) as system:
        return int(system.modified(file.url).timestamp() * 1e9)


@contextlib.contextmanager
def local_copy(folder: Place, *files: str) -> Iterator[Path]:
    """A local folder with `files` of `folder` (all by default): `folder` itself, or a temporary copy."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        for name in files or names(folder):
            with contextlib.suppress(FileNotFoundError):
                Path(copy, name).write_bytes(read(folder / name))
        yield Path(copy)


def temporary_name(path: Path) -> Path:
    """A unique name beside `path`: a runner may give the same work to two workers."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}")
