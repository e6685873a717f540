"""Reads documents from text, jsonl (plain, zstd, gzip), parquet and ArrayRecord files, in pieces that are planned ahead.

A text file of any size is read in parts. In files of other types a whole document is held in memory, and a document of more
than `LONGEST` bytes makes its file a bad one. So memory is bounded even if a small file unpacks to a lot: see `shards.MEMORY`.
"""

import codecs
import contextlib
import functools
import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import BinaryIO, NamedTuple, TypedDict

import pyarrow
import pyarrow.parquet
from array_record.python import array_record_module

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import decode_json
from tinyllama_jax.data.prepare import inputs
from tinyllama_jax.data.prepare.inputs import READ, Source

ROWS = 64  # records in a unit of an ArrayRecord file
LONGEST = 1 << 27  # most bytes of a line of jsonl, or of a text in parquet or ArrayRecord
ANY_JSON = 1 << 23  # most bytes of a line that is decoded in full: nested lists take 30 times as many in memory
TITLES = ("title", "url")  # keys of a row of jsonl whose text names the document
START = 1 << 16  # characters at the beginning of a document, which decide its split


class BadFile(UserError):
    """A file that no retry can read: the fault is in its content, or in this machine's disk or permissions."""

    source: Source
    start: int = 0  # where the piece with the fault begins


class Piece(NamedTuple):
    """A part [start, end) of a file: bytes of plain jsonl, row groups of parquet, `ROWS` records of ArrayRecord; or all."""

    source: Source
    start: int
    end: int
    weight: int  # bytes of text, roughly


def units(source: Source, text_key: str) -> list[int]:
    """Weight of each unit that a file can be cut into (see `Piece`); jsonl can be cut anywhere. Raises BadFile, UserError."""
    if source.kind == "array_record":
        inputs.text_feature(source, text_key)
        with _reading(source):
            n = -(-_array_record_reader(source).num_records() // ROWS)
        return [source.size * source.factor // max(n, 1)] * n
    if source.kind != "parquet":
        with _reading(source):
            if source.kind in ("zstd", "gzip") and not source.size:
                raise _BadDocument(f"is empty, and so is not a whole {source.kind} file")
        return [source.size * source.factor]
    with _reading(source, damaged="is not a whole parquet file: "), _parquet_file(source) as file:
        column = file.schema_arrow.get_field_index(text_key)
        if column < 0:
            names = file.schema_arrow.names
            known = ", ".join(names)
            if text_key in names:
                raise _BadDocument(f"has {names.count(text_key)} columns {text_key!r}; it has {known}: rename one")
            raise _BadDocument(f"has no column {text_key!r}; it has {known}: choose one with --text-key")
        type_ = file.schema_arrow.field(column).type
        if not _holds_text(type_):
            raise _BadDocument(f"column {text_key!r} holds {type_}, not text; choose one with --text-key")
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        columns = [[group.column(i) for i in range(group.num_columns)] for group in groups]
        return [sum(c.total_uncompressed_size for c in group if c.path_in_schema == text_key) for group in columns]


def _holds_text(type_: pyarrow.DataType) -> bool:
    """Whether a column of this type can hold text. Bytes can: Spark and DuckDB may store UTF-8 text as bytes."""
    while isinstance(type_, pyarrow.DictionaryType | pyarrow.BaseExtensionType):
        type_ = type_.value_type if isinstance(type_, pyarrow.DictionaryType) else type_.storage_type
    name = str(type_).removeprefix("large_").removesuffix("_view")
    return name in ("string", "binary", "null")


def pieces(source: Source, weights: list[int], target: int) -> list[Piece]:
    """Cuts `source` into pieces of about `target` bytes of text, if its type can be cut. `weights`: of its `units`."""
    if source.kind in ("parquet", "array_record"):
        return [Piece(source, *span, sum(weights[slice(*span)])) for span in spans(weights, target) or [(0, 0)]]
    n = max(-(-source.size // target), 1) if source.kind == "jsonl" else 1
    ends = itertools.pairwise(source.size * i // n for i in range(n + 1))
    return [Piece(source, start, end, sum(weights) // n) for start, end in ends]


def spans(weights: list[int], target: int) -> list[tuple[int, int]]:
    """Groups consecutive items into spans [start, end) that weigh about `target` each."""
    total = max(sum(weights), 1)
    n = max(round(total / target), 1)
    out: list[list[int]] = []
    done, last = 0, -1
    for i, weight in enumerate(weights):
        span = min((2 * done + weight) * n // (2 * total), n - 1)  # the span of the item's middle
        done += weight
        if span != last or not out:
            out.append([i, i])
        out[-1][1], last = i + 1, span
    return [(start, end) for start, end in out]


def read(piece: Piece, text_key: str, drop: Mapping[str, str], dropped: Counter[str]) -> Iterator[Iterable[str]]:
    """The documents of a piece in order, each in one or more parts that can be read again.

    `drop`: rows of jsonl with this value at this key ("meta.source": "x") are left out and counted in `dropped`; so are rows
    of jsonl and parquet whose text is null. A document of jsonl also has a `title`. Raises BadFile naming file and line.
    """
    if piece.source.kind == "text":
        return iter([_Text(piece.source)])
    if piece.source.kind == "parquet":
        return _parquet(piece, text_key, dropped)
    if piece.source.kind == "array_record":
        return _array_record(piece, text_key)
    return _jsonl(piece, text_key, drop, dropped)


def held_out(document: Iterable[str], fraction: float) -> tuple[bool, Iterable[str]]:
    """(whether a document belongs to the `fraction` that is held out, the document again).

    Only its first `START` characters decide: the same document is in the same split wherever and however it is stored; a larger
    fraction holds out all that a smaller one does; and a file of any size is read once.
    """
    parts, start, size = iter(document), [], 0
    while size < START and (part := next(parts, None)) is not None:
        start.append(part)
        size += len(part)
    digest = hashlib.sha256("".join(start)[:START].encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64, itertools.chain(start, parts)


class _BadDocument(Exception):
    pass


@contextlib.contextmanager
def _reading(source: Source, where: Callable[[], str] = str, damaged: str = "") -> Iterator[None]:
    """Turns errors in reading a file into BadFile with its line (`where`). A store's errors are UserError, and stay so."""
    try:
        yield
        return
    except _BadDocument as error:
        message = f"{where()}: {error}"
    except MemoryError:
        message = f"{where()}: unpacks to more than a worker may hold in memory"
    except (OSError, pyarrow.ArrowException) as error:
        if "Frame requires too much memory" in str(error):  # zstd's own limit
            damaged = "was compressed with a window of more than 128 MiB; unpack it with `zstd -d --long=31`: "
        number = error.errno if isinstance(error, OSError) else None  # pyarrow's OSErrors have no number
        message = f": cannot be read: {error.strerror}" if number else f"{where()}: {damaged}{' '.join(str(error).split())}"
    bad = BadFile(source.path + message)
    bad.source = source
    raise bad


class _Text(NamedTuple):
    """A whole text file, of any size, as one document."""

    source: Source

    def __iter__(self) -> Iterator[str]:
        return _text(self.source)


class _Row(NamedTuple):
    """A row of jsonl as one document, in one part."""

    text: str
    row: dict

    def __iter__(self) -> Iterator[str]:
        yield self.text

    @property
    def title(self) -> str:
        """What names the document: the text at a key of `TITLES`; "" if there is none."""
        return next((self.row[key] for key in TITLES if isinstance(self.row.get(key), str)), "")


def _text(source: Source) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    with _reading(source, lambda: f", line {line}"), source.open() as file:
        while True:
            data = file.read(READ)
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise _BadDocument(f"is not UTF-8 (byte {error.object[error.start]:#04x})") from None
            if not data:
                return
            line += data.count(b"\n")


def _jsonl(piece: Piece, text_key: str, drop: Mapping[str, str], dropped: Counter[str]) -> Iterator[Iterable[str]]:
    """The lines whose first byte lies in the piece."""
    source, lines = piece.source, 0
    at, end = piece.start, piece.end if source.kind == "jsonl" else float("inf")
    with _reading(source, lambda: f", line {_lines_before(piece) + lines}"), _open(source) as file:
        if at:  # a line that begins before the piece belongs to the piece before
            at -= 1
            file.seek(at)
            while at < end and (part := file.readline(READ)):  # the line may end after the piece
                at += len(part)
                if part.endswith(b"\n"):
                    break
        while at < end:
            lines += 1
            if not (line := file.readline(LONGEST + 1)):
                return
            if len(line) > LONGEST:
                raise _BadDocument(f"{_too_long('is')}; a document of any length can be a .txt file")
            at += len(line)
            if line := line.strip():
                row = _row(line, text_key, drop)
                if drop and (reason := _reason(row, drop)):
                    dropped[reason] += 1
                    continue
                if text_key not in row:
                    keys = ", ".join(map(repr, row))
                    raise _BadDocument(f"has no key {text_key!r}; it has {keys}: choose one with --text-key")
                if row[text_key] is None:
                    dropped[_null(text_key)] += 1
                    continue
                yield _Row(_checked(row[text_key], text_key), row)


def _open(source: Source) -> BinaryIO:
    if source.kind == "jsonl":
        return source.open()
    # unlike the zstandard package, pyarrow notices when a file ends within a frame
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(source.open(), "r"), source.kind), READ)


def _too_long(is_: str) -> str:
    return f"{is_} longer than {LONGEST:,} bytes: cut it into several documents"


def _row(line: bytes, text_key: str, drop: Mapping[str, str]) -> dict:
    if len(line) > ANY_JSON:
        return _long_row(line, text_key, drop)
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _BadDocument(f"is not UTF-8 (byte {line[error.start]:#04x} at {error.start})") from None
    except RecursionError:
        raise _BadDocument("is not JSON: is nested too deeply") from None
    except ValueError as error:
        if "digits" in str(error):  # a number has more digits than Python converts, and is not needed
            return _long_row(line, text_key, drop)
        several = "; a value over several lines is not read: write one object a line (jsonl)" if line.strip() in b"{[" else ""
        raise _BadDocument(f"is not JSON: {error}{several}") from None
    if not isinstance(row, dict):
        raise _BadDocument(f"is not an object with the key {text_key!r}, but {_short(row)}")
    return row


def _long_row(line: bytes, text_key: str, drop: Mapping[str, str]) -> dict:
    """Decodes only the text and the values at the keys of `drop`, so that a long line does not fill the memory."""
    kinds = {text_key: str | None}
    for key in drop:
        kind: type = str | float | bool | None
        for name in reversed(key.split(".")[1:]):
            kind = TypedDict("Row", {name: kind}, total=False)
        kinds[key.partition(".")[0]] = kind
    try:
        return decode_json(line.removeprefix(codecs.BOM_UTF8), TypedDict("Row", kinds, total=False))
    except ValueError as error:
        raise _BadDocument(f"is not JSON with a text at {text_key!r}: {error}") from None


def _reason(row: dict, drop: Mapping[str, str]) -> str:
    """Why a row is left out; "" if it is not."""
    for key, value in drop.items():
        node: object = row
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        if node is None:
            raise _BadDocument(f"has no {key}, by which documents of this corpus are left out; without --corpus all are kept")
        if node == value:
            return f"{key}={value}"
    return ""


def _null(text_key: str) -> str:
    return f"{text_key}=null"


def _checked(text: object, text_key: str) -> str:
    if not isinstance(text, str):
        raise _BadDocument(f"{text_key!r} is not a text, but {_short(text)}")
    for start in range(0, 0 if text.isascii() else len(text), READ):
        try:
            text[start : start + READ].encode()
        except UnicodeEncodeError as error:
            where = start + error.start
            raise _BadDocument(f"{text_key!r} holds half of a surrogate pair at {where}, which is no character") from None
    return text


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _lines_before(piece: Piece) -> int:
    if not piece.start:
        return 0
    with piece.source.open() as file:
        lines, left = 0, piece.start
        while data := file.read(min(READ, left)):
            lines, left = lines + data.count(b"\n"), left - len(data)
        file.seek(piece.start - 1)
        return lines + (file.read(1) != b"\n")


@contextlib.contextmanager
def _parquet_file(source: Source) -> Iterator[pyarrow.parquet.ParquetFile]:
    # with a buffer pyarrow reads a page at a time, not a row group; checksums are verified if the file has any
    options = {"buffer_size": READ, "pre_buffer": False, "page_checksum_verification": True}
    with source.open() as raw, pyarrow.parquet.ParquetFile(raw, **options) as file:
        yield file


def _parquet(piece: Piece, text_key: str, dropped: Counter[str]) -> Iterator[Iterable[str]]:
    source, row = piece.source, 0
    with _reading(source, lambda: f", row {row}", "what follows is damaged: "), _parquet_file(source) as file:
        row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
        groups = range(piece.start, piece.end)
        # a row at a time costs 4 us more than 64 at once, but 64 rows of a dictionary would be 64 copies of one long text
        for batch in file.iter_batches(1, row_groups=groups, columns=[text_key], use_threads=False):
            row += 1
            column = batch.column(0)
            if column.null_count or column.type == pyarrow.null():
                dropped[_null(text_key)] += 1
                continue
            yield (_decoded(column[0].as_py, text_key),)


def _decoded(get: Callable[[], str | bytes], text_key: str) -> str:
    """The text that `get` returns. Raises _BadDocument if it is not UTF-8, or too long to be held in memory."""
    try:
        text = get()
        if len(text) > LONGEST:
            raise _BadDocument(_too_long(f"{text_key!r} is"))
        return _checked(text.decode() if isinstance(text, bytes) else text, text_key)
    except UnicodeDecodeError as error:
        raise _BadDocument(f"{text_key!r} is not UTF-8 (at {error.start})") from None


def _array_record_reader(source: Source) -> array_record_module.ArrayRecordReader:
    try:
        reader = array_record_module.ArrayRecordReader(source.path, "readahead_buffer_size:0,max_parallelism:0")
    except Exception as error:  # ArrayRecord's own, of no common type
        raise _BadDocument(f"is not a whole ArrayRecord file: {str(error).splitlines()[0]}") from None
    n, written = reader.num_records(), inputs.records(source)
    if n != written:  # ArrayRecord reports 0 records for a truncated file
        raise _BadDocument(f"is not a whole ArrayRecord file: it has {n} records of {written}")
    return reader


def _array_record(piece: Piece, text_key: str) -> Iterator[Iterable[str]]:
    source, record = piece.source, piece.start * ROWS
    feature = inputs.text_feature(source, text_key)
    with _reading(source, lambda: f", record {record}"):
        reader = _array_record_reader(source)
        reader.seek(record)
        for _ in range(record, min(piece.end * ROWS, reader.num_records())):
            try:
                row = feature.deserialize_example_np(reader.read())
            except Exception as error:  # ArrayRecord's, protobuf's and TFDS's own
                if isinstance(error, MemoryError) or "Could not allocate" in str(error):
                    raise MemoryError from None
                raise _BadDocument(f"is damaged: {str(error).splitlines()[0]}") from None
            record += 1
            yield (_decoded(functools.partial(row.get, text_key), text_key),)
