"""Documents out of text, jsonl (plain, zstd, gzip) and parquet files, in pieces that are planned ahead."""

from __future__ import annotations

import codecs
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet

from tinyllama_jax.config import UserError

# type of a file -> how it is read, and bytes of text in a byte of it, roughly
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
READ = 1 << 20  # bytes read at once
ROWS = 64  # rows of parquet decoded at once


class Source(NamedTuple):
    """An input file, as it was when the work was planned."""

    path: str  # absolute
    name: str  # relative to the folder that all inputs of its split have in common, so the same wherever that folder lies
    size: int
    mtime_ns: int

    def unchanged(self) -> bool:
        """Whether the file is still as it was then, by size and time."""
        stat = os.stat(self.path)
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


class Piece(NamedTuple):
    """A part of a file: bytes [start, end) of plain jsonl, row groups [start, end) of parquet, else the whole file."""

    source: Source
    kind: str
    start: int
    end: int
    weight: int  # bytes of text, roughly


def find(paths: list[str | Path], option: str) -> tuple[list[Source], list[str]]:
    """The files at `paths`, folders searched to the bottom, sorted by name; and the files in those folders of other types.

    Hidden files are left out. Raises UserError that names `option`: a path that is not there, a file of another type, a file
    given twice, no file at all.
    """
    files, others = [], []
    for path in map(Path, paths):
        if path.is_dir():
            below = [Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names]
            seen = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
            files += [file for file in seen if _type_of(file)]
            others += [str(file) for file in seen if not _type_of(file)]
        elif not path.is_file():
            raise UserError(f"{option} {path}: no such file or folder")
        elif not _type_of(path):
            raise UserError(f"{option} {path}: is of no known type; known are {' '.join(KINDS)}")
        else:
            files.append(path)
    if not files:
        raise UserError(f"{option} {' '.join(map(str, paths))}: there is no file of a known type; known are {' '.join(KINDS)}")
    real, times = max(Counter(map(os.path.realpath, files)).items(), key=lambda item: item[1])
    if times > 1:
        raise UserError(f"{option}: {real} is given {times} times")
    absolute = [os.path.abspath(file) for file in files]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    sources = []
    for file, path in zip(files, absolute, strict=True):
        stat = file.stat()
        sources.append(Source(path, Path(path).relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns))
    return sorted(sources, key=lambda source: source.name), sorted(others)


def _type_of(path: Path) -> str:
    name = path.name.lower()
    return max((end for end in KINDS if name.endswith(end)), key=len, default="")


def units(source: Source, text_key: str) -> list[int]:
    """Weight of each part that a file can be cut into: row groups of parquet; plain jsonl is cut anywhere. Raises UserError."""
    kind, factor = KINDS[_type_of(Path(source.path))]
    if kind != "parquet":
        return [source.size * factor]
    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            column = file.schema_arrow.get_field_index(text_key)
            if column < 0:
                there = ", ".join(file.schema_arrow.names)
                raise UserError(f"{source.path}: has no column {text_key!r}; it has {there}: choose one with --text-key")
            type_ = file.schema_arrow.field(column).type
            value = type_.value_type if pyarrow.types.is_dictionary(type_) else type_
            if not (pyarrow.types.is_string(value) or pyarrow.types.is_large_string(value)):
                raise UserError(f"{source.path}: column {text_key!r} holds {type_}, not text; choose one with --text-key")
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            columns = [[group.column(i) for i in range(group.num_columns)] for group in groups]
            return [sum(c.total_uncompressed_size for c in group if c.path_in_schema == text_key) for group in columns]
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"{source.path}: is not a whole parquet file: {error}") from None


def pieces(source: Source, weights: list[int], target: int) -> list[Piece]:
    """`source` in pieces of about `target` bytes of text, where its type can be cut. `weights`: of its `units`."""
    kind, _ = KINDS[_type_of(Path(source.path))]
    if kind == "parquet":
        return [Piece(source, kind, *span, sum(weights[slice(*span)])) for span in spans(weights, target)]
    n = max(-(-source.size // target), 1) if kind == "jsonl" else 1
    ends = itertools.pairwise(source.size * i // n for i in range(n + 1))
    return [Piece(source, kind, start, end, sum(weights) // n) for start, end in ends]


def spans(weights: list[int], target: int) -> list[tuple[int, int]]:
    """Items in a row, [start, end), so that each span weighs about `target`."""
    total = max(sum(weights), 1)
    n = max(round(total / target), 1)
    out: list[list[int]] = []
    done, last = 0, -1
    for i, weight in enumerate(weights):
        here = min((2 * done + weight) * n // (2 * total), n - 1)  # where the middle of the item falls
        done += weight
        if here != last or not out:
            out.append([i, i])
        out[-1][1], last = i + 1, here
    return [(start, end) for start, end in out]


def read(piece: Piece, text_key: str) -> Iterator[Iterable[str]]:
    """The documents of a piece in order, each a text in one or more parts. Raises UserError naming file and line."""
    if piece.kind == "text":
        return iter([_text(piece.source.path)])
    if piece.kind == "parquet":
        return _parquet(piece, text_key)
    return _jsonl(piece, text_key)


def _text(path: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = 0
    with open(path, "rb") as file:
        while True:
            data = file.read(READ)
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line = lines + error.object[: error.start].count(b"\n") + 1
                raise UserError(f"{path}, line {line}: is not UTF-8 (byte {error.object[error.start]:#04x})") from None
            if not data:
                return
            lines += data.count(b"\n")


def _jsonl(piece: Piece, text_key: str) -> Iterator[Iterable[str]]:
    """The lines whose first byte lies in the piece."""
    path, lines = piece.source.path, 0
    at, end = piece.start, piece.end if piece.kind == "jsonl" else float("inf")
    try:
        with _open(path, piece.kind) as file:
            if at:  # the line that runs into the piece belongs to the one before
                file.seek(at - 1)
                at += len(file.readline()) - 1
            while at < end and (line := file.readline()):
                at, lines = at + len(line), lines + 1
                if line := line.strip():
                    yield (_parse(line, text_key),)
    except (_BadDocument, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the file system's, which has words of its own
        if isinstance(error, OSError):
            lines += 1  # the line that could not be read
        raise UserError(f"{path}, line {_lines_before(piece) + lines}: {error}") from None


def _open(path: str, kind: str) -> BinaryIO:
    if kind == "jsonl":
        return open(path, "rb", buffering=READ)
    # unlike the zstandard package, pyarrow notices when a file ends within a frame
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), kind), READ)


class _BadDocument(Exception):
    pass


def _parse(line: bytes, text_key: str) -> str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _BadDocument(f"is not UTF-8 (byte {line[error.start]:#04x} at {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise _BadDocument(f"is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise _BadDocument(f"is not an object with the key {text_key!r}, but {_short(row)}")
    if text_key not in row:
        raise _BadDocument(f"has no key {text_key!r}; it has {', '.join(map(repr, row))}: choose one with --text-key")
    return _checked(row[text_key], text_key)


def _checked(text: object, text_key: str) -> str:
    if not isinstance(text, str):
        raise _BadDocument(f"{text_key!r} is not a text, but {_short(text)}")
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise _BadDocument(f"{text_key!r} holds half of a surrogate pair at {error.start}, which is no character") from None
    return text


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _lines_before(piece: Piece) -> int:
    if not piece.start:
        return 0
    with open(piece.source.path, "rb") as file:
        lines, left = 0, piece.start
        while data := file.read(min(READ, left)):
            lines, left = lines + data.count(b"\n"), left - len(data)
        file.seek(piece.start - 1)
        return lines + (file.read(1) != b"\n")


def _parquet(piece: Piece, text_key: str) -> Iterator[Iterable[str]]:
    path = piece.source.path
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:  # of the files that have checksums
            row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
            groups = range(piece.start, piece.end)
            for batch in file.iter_batches(ROWS, row_groups=groups, columns=[text_key], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    yield (_checked(value.as_py(), text_key),)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, row {row}: {text_key!r} is not UTF-8 (at {error.start})") from None
    except _BadDocument as error:
        raise UserError(f"{path}, row {row}: {error}") from None
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"{path}, after row {row}: is damaged: {error}") from None
