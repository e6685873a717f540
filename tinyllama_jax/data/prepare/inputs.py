"""Finds and opens the input files of data preparation: in folders, object stores and TensorFlow data sets."""

import functools
import glob
import hashlib
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import open_regular
from tinyllama_jax.base.store import SCHEMES, matcher, reaching

# end of a file's name -> (how it is read, roughly how many bytes of text are in a byte of it)
KINDS = {
    ".txt": ("text", 1),
    ".jsonl": ("jsonl", 1),
    ".json": ("jsonl", 1),
    ".jsonl.zst": ("zstd", 4),
    ".json.zst": ("zstd", 4),
    ".jsonl.gz": ("gzip", 3),
    ".json.gz": ("gzip", 3),
    ".parquet": ("parquet", 1),
}
MARKDOWN = {".md": ("text", 1)}  # for `retrieve` alone: folders of training data hold README.md files
ARRAY_RECORD = "array_record", 2  # the same, for `tfds:`
READ = 1 << 20  # bytes read at once
FETCH = 8 << 20  # bytes of an object fetched at once


class Source(NamedTuple):
    """An input file as it was when the shards were planned."""

    path: str  # absolute (bytes that are not UTF-8 as surrogates), or gs://... or s3://...
    name: str  # relative to the common folder of all inputs of its split, so the same wherever that folder lies
    kind: str  # how it is read
    factor: int  # roughly how many bytes of text are in a byte of it
    size: int
    mtime_ns: int
    etag: str  # what an object store calls this content; "" on this machine

    def unchanged(self) -> bool:
        """Whether the file's size, time and etag are still the same."""
        return _stat(self.path) == (self.size, self.mtime_ns, self.etag)

    def open(self) -> BinaryIO:
        """Opens the file for reading and seeking. An object is fetched in parts of `FETCH` bytes."""
        if not _scheme(self.path):
            return io.BufferedReader(open_regular(self.path).detach(), READ)
        with reaching(self.path, absent=False) as store:
            file = store.open(self.path, "rb", block_size=FETCH, cache_type="readahead")
        fetch = file.cache.fetcher

        def reached(start: int, end: int) -> bytes:
            with reaching(self.path, absent=False):  # an error here says nothing about the file: it may be readable later
                return fetch(start, end)

        file.cache.fetcher = reached
        return io.BufferedReader(file, READ)

    def sha256(self) -> str:
        """The hash of the file's bytes, which are read again."""
        with self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def find(
    paths: Iterable[str | Path], option: str, kinds: Iterable[str] = tuple(KINDS), data_dir: str | Path | None = None
) -> tuple[list[Source], list[str]]:
    """(the files at `paths` that are of `kinds`, sorted by name; the paths of those of other types).

    A path is a file, a folder (searched to the bottom), a pattern with * ? [ or **, one of these with gs:// or s3://, or
    tfds:NAME[/CONFIG][:VERSION][:SPLIT], prepared in `data_dir`. Hidden files are left out. Raises UserError naming `option`
    if a path does not exist, a file is of another type or given twice, or there is no file at all.
    """
    paths, kinds = [os.fspath(path) for path in paths], tuple(kinds)
    matches: list[tuple[str, tuple[str, int]]] = []  # (path, its entry in KINDS)
    stats: dict[str, tuple[int, int, str]] = {}  # of objects: a store lists these with the names
    others = []
    for path in paths:
        if path.startswith("tfds:"):
            matches += [(file, ARRAY_RECORD) for file in _tfds(path, option, data_dir)]
            continue
        places = _objects(path, stats) if _scheme(path) else _files(path)
        if not places:
            pattern = glob.has_magic(path)
            raise UserError(f"{option} {path}: no {'file or folder matches' if pattern else 'such file or folder'}")
        if places == {path: [path]} and not _scheme(path) and not os.path.isfile(path):
            raise UserError(f"{option} {path}: is not a regular file; read a pipe into one first")
        if places == {path: [path]} and not _type_of(path, kinds):
            raise UserError(f"{option} {path}: is of no known type; known are {' '.join(kinds)}")
        for file in dict.fromkeys(itertools.chain(*places.values())):  # a pattern can match a folder and what is in it
            if end := _type_of(file, kinds):
                if not _scheme(file) and os.path.exists(file) and not os.path.isfile(file):
                    raise UserError(f"{option} {file}: is not a regular file; read a pipe into one first, or move it away")
                matches.append((file, (KINDS | MARKDOWN)[end]))
            else:
                others.append(file)
    if not matches:
        raise UserError(f"{option} {' '.join(paths)}: there is no file of a known type; known are {' '.join(kinds)}")
    absolute = [file if _scheme(file) else os.path.abspath(file) for file, _ in matches]
    real, times = Counter(file if _scheme(file) else os.path.realpath(file) for file in absolute).most_common(1)[0]
    if times > 1:
        raise UserError(f"{option}: {real} is given {times} times (links count)")
    parents = zip(*(file.split("/")[:-1] for file in absolute), strict=False)
    depth = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, parents))  # of the common folder
    sources = []
    for path, (_, kind) in zip(absolute, matches, strict=True):
        # bytes that are not UTF-8 are written as \xe9, for manifests and messages
        name = os.fsencode("/".join(path.split("/")[depth:])).decode(errors="backslashreplace")
        sources.append(Source(path, name, *kind, *(stats.get(path) or _stat(path))))
    return sorted(sources, key=lambda source: source.name), sorted(others)


def _type_of(path: str, kinds: tuple[str, ...]) -> str:
    return max((end for end in kinds if path.lower().endswith(end)), key=len, default="")


def _scheme(path: str) -> str:
    """ "gs" or "s3"; "" for a path on this machine. Raises UserError on another scheme."""
    scheme, place, _ = path.partition("://")
    if place and scheme not in SCHEMES:
        raise UserError(f"{path}: {scheme}:// cannot be read; known are {' '.join(f'{s}://' for s in SCHEMES)}")
    return scheme if place else ""


def _stat(path: str) -> tuple[int, int, str]:
    """(size, mtime_ns, etag)."""
    if _scheme(path):
        with reaching(path, absent=False) as store:
            return _stat_of(store.info(path))
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, ""


# -- on this machine ----------------------------------------------------------------------------------------------------


def _files(path: str) -> dict[str, list[str]]:
    """Each file or folder that `path` names or matches -> itself, or the files below it."""
    if not os.path.exists(path) and "**" in path.split("/"):
        return _deep(os.path.normpath(os.path.expanduser(path)))
    names = [path] if os.path.exists(path) else sorted(glob.glob(os.path.expanduser(path)))
    seen: set[tuple[int, int]] = set()
    out = {}
    for name in names:
        if os.path.isdir(name):
            out[name] = [file for file in _below(name, seen) if not os.path.isdir(file)]
        elif name == path or os.path.isfile(name):
            out[name] = [name]
    return out


def _deep(pattern: str) -> dict[str, list[str]]:
    """`_files` of a pattern with **. Python's own glob would follow circular links."""
    pattern = "/".join(name if name == "**" else re.sub(r"\*+", "*", name) for name in pattern.split("/"))
    matches = matcher(pattern)
    top = pattern.partition("**")[0].rpartition("/")[0] or ("/" if pattern.startswith("/") else ".")
    seen: set[tuple[int, int]] = set()
    below = [os.path.normpath(name) for folder in sorted(glob.glob(top)) for name in (folder, *_below(folder, seen))]
    matching = {name for name in below if matches(name) or matches(f"{name}/")}
    folders = tuple(f"{name}/" for name in matching if os.path.isdir(name))
    files = [name for name in below if not os.path.isdir(name) and (name in matching or name.startswith(folders))]
    return {pattern: files} if matching else {}


def _below(top: str, seen: set[tuple[int, int]]) -> list[str]:
    """The folders and files below a folder, except hidden ones and folders already `seen`.

    Without `seen`, links to parents would be followed for ever.
    """
    names_below = []
    _is_new(top, seen)
    for parent, folders, files in os.walk(top, onerror=_unreadable, followlinks=True):
        folders[:] = [name for name in sorted(folders) if not name.startswith(".")]
        folders[:] = [name for name in folders if _is_new(os.path.join(parent, name), seen)]
        names_below += [os.path.join(parent, name) for name in (*folders, *files) if not name.startswith(".")]
    return names_below


def _unreadable(error: OSError) -> None:
    raise error  # os.walk would leave the folder out silently


def _is_new(folder: str, seen: set[tuple[int, int]]) -> bool:
    """Adds a folder to those `seen`; returns whether it is new."""
    before, stat = len(seen), os.stat(folder)
    seen.add((stat.st_dev, stat.st_ino))
    return len(seen) > before


# -- in object stores ---------------------------------------------------------------------------------------------------


def _objects(path: str, stats: dict[str, tuple[int, int, str]]) -> dict[str, list[str]]:
    """As `_files`, for a path in a store; also adds the files' sizes, times and etags to `stats`."""
    scheme = _scheme(path)
    files_at = {}
    with reaching(path, absent=False) as store:
        try:
            listed = store.glob(path, detail=True) if glob.has_magic(path) else {path: store.info(path)}
        except FileNotFoundError:
            return {}
        for place, info in listed.items():
            inside = store.find(place, detail=True) if info["type"] == "directory" else {place: info}
            start = len(store._strip_protocol(place))
            objects = {name: info for name, info in inside.items() if "/." not in name[start:] and info["type"] == "file"}
            full = {name if _scheme(name) else f"{scheme}://{name}": info for name, info in objects.items()}
            stats |= {name: _stat_of(info) for name, info in full.items()}
            files_at[place] = list(full)
    return files_at


def _stat_of(info: dict) -> tuple[int, int, str]:
    seconds = int((info.get("LastModified") or info["mtime"]).timestamp())  # S3 gives fractions only in listings
    return info["size"], seconds * 10**9, info.get("ETag") or info["etag"]


# -- in TensorFlow data sets --------------------------------------------------------------------------------------------


def _tfds(path: str, option: str, data_dir: str | Path | None) -> list[str]:
    """The files of tfds:NAME[/CONFIG][:VERSION][:SPLIT]; SPLIT is "train" by default."""
    import tensorflow_datasets as tfds

    name, *parts = path.removeprefix("tfds:").split(":")
    if parts and re.fullmatch(r"\d+\.\d+\.\d+", parts[0]):
        name = f"{name}:{parts.pop(0)}"
    split = ":".join(parts) or "train"
    where = os.fspath(data_dir or tfds.core.constants.DATA_DIR)
    if _scheme(where):
        raise UserError(f"--data-dir {where}: ArrayRecord files are read from this machine alone; copy the data set here")
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=where, file_format="array_record")
        if split not in (known := list(builder.info.splits)):  # such as "train[:10%]", which is not a set of whole files
            raise UserError(f"{option} {path}: has no split {split!r}; it has {', '.join(known)}")
        return [os.fspath(file) for file in builder.info.splits[split].filepaths]
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"{option} {path}: no such data set, configuration or version is prepared in {where}; "
            "say where with --data-dir, or prepare it with `tfds build --file_format=array_record`"
        ) from None
    except ValueError as error:
        if "file format" not in str(error):
            raise UserError(f"{option} {path}: {str(error).splitlines()[0]}") from None
        raise UserError(
            f"{option} {path}: is not stored as ArrayRecord; convert it with `tfds convert_format "
            "--dataset_version_dir=DIR --out_file_format=array_record --out_dir=NEW` where TensorFlow is installed"
        ) from None


@functools.lru_cache(maxsize=4)
def _described(folder: str) -> tuple[dict, dict[str, int]]:
    """The description of the TensorFlow data set in `folder`: (name -> feature, file -> number of records)."""
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(folder, file_format="array_record").info
    splits = [zip(split.filepaths, split.shard_lengths, strict=True) for split in info.splits.values()]
    return dict(info.features), {os.fspath(file): length for split in splits for file, length in split}


def records(source: Source) -> int:
    """How many records a file of a TensorFlow data set should have."""
    return _described(os.path.dirname(source.path))[1][source.path]


def text_feature(source: Source, name: str):
    """The decoder of the text feature `name` of a TensorFlow data set. Raises UserError if there is no such text feature."""
    import tensorflow_datasets as tfds

    folder = os.path.dirname(source.path)
    features, _ = _described(folder)
    texts = sorted(key for key, feature in features.items() if isinstance(feature, tfds.features.Text))
    if name not in texts:
        known = ", ".join(texts) or "none"
        raise UserError(f"{folder}: has no text feature {name!r}; it has {known}: choose one with --text-key")
    return tfds.features.FeaturesDict({name: features[name]})
