"""Reads ArrayRecord files by byte ranges: where each record lies, and its content. The C++ library reads only paths.

Format: github.com/google/riegeli, doc/riegeli_records_file_format.md, and ArrayRecord's footer as `group_size:1` writes it. A
file is a sequence of chunks of one record each. Its last 64 KiB begin with a chunk that says where the footer is; the footer
says where each chunk begins. The chunks' own hashes (HighwayHash) are not computed; data/bucket.py checks the SHA-256 of files.
"""

import struct

import numpy as np
import pyarrow

BLOCK, BLOCK_HEADER = 1 << 16, 24  # each 64 KiB begin with a header of 24 bytes, even inside a chunk
CHUNK = struct.Struct("<4Q8x")  # hash, bytes, hash of the bytes, 1 byte of type and 7 of the number of records


def tail(size: int, records: int) -> int:
    """Where in a file of `size` bytes to begin reading for `offsets`: 15 bytes a record (zstd leaves 3 to 12), then padding."""
    return max(size - 3 * BLOCK - 15 * records, 0)  # of each: 3 tags, length, offset below 2^42, size below 2^28, number


def offsets(data: bytes, start: int, records: int) -> np.ndarray:
    """The position of each record's chunk, and the end of the last one [records + 1]. Raises ValueError if it is damaged.

    `data`: the bytes of the file from position `start`, from `tail`, to its end.
    """
    end = start + len(data)
    sizes, values = _chunk(data[-BLOCK:], end - BLOCK)
    footer = int([*_varints(values[: sizes[0]]), -1, -1][1])  # field 1 of a message
    if not start <= footer < end - BLOCK:
        raise ValueError(f"its footer is at {footer:,} of {end:,} bytes, where none was expected")
    sizes, values = _chunk(data[footer - start : -BLOCK], footer)
    fields = _varints(values[sizes[0] :])  # the first message is about the file; the others: 1: offset, 2: bytes, 3: records
    if fields.size != 6 * records or (fields.reshape(-1, 6)[:, [0, 2, 4, 5]] != (8, 16, 24, 1)).any():
        raise ValueError(f"its footer does not list {records:,} records of one chunk each")
    out = np.append(fields[1::6], footer)
    if (np.diff(out) <= 0).any():
        raise ValueError("its footer lists records that do not follow one another")
    return out.astype(np.uint32 if footer < 1 << 32 else np.int64)


def record(data: bytes, start: int) -> bytes:
    """The record of a chunk of one record, whose bytes are `data` from position `start`. Raises ValueError if it is damaged."""
    sizes, values = _chunk(data, start)
    if len(sizes) != 1:
        raise ValueError(f"its chunk has {len(sizes)} records")
    return values


def _chunk(data: bytes, start: int) -> tuple[list[int], bytes]:
    """(sizes of the records, the records joined) of the chunk that begins at `data`, position `start` of the file."""
    cuts = range(-start % BLOCK, len(data), BLOCK)
    data = b"".join([data[: cuts.start], *(data[cut + BLOCK_HEADER : cut + BLOCK] for cut in cuts)])
    try:
        _, size, _, kind = CHUNK.unpack_from(data)
        inside = data[CHUNK.size : CHUNK.size + size]
        if chr(kind & 255) != "r" or len(inside) != size:
            raise IndexError("cut short, or not one whose records are stored one by one")
        n, at = _varint(inside, 1)
        unpacked = {0: bytes, ord("z"): _zstd}[inside[0]]
        packed, values = unpacked(inside[at : at + n]), unpacked(inside[at + n :])
        sizes = [_varint(packed, 0)[0]] if kind >> 8 == 1 else _varints(packed).tolist()
    except (struct.error, IndexError, KeyError, OSError, ValueError) as error:  # OSError: pyarrow's
        raise ValueError(f"chunk at {start:,}: {error}") from None
    if not 0 < len(sizes) == kind >> 8 or sum(sizes) != len(values):
        raise ValueError(f"chunk at {start:,}: the sizes of its records do not add up")
    return sizes, values


def _zstd(data: bytes) -> bytes:
    """A decoded size and a frame."""
    size, at = _varint(data, 0)
    if size > 1 << 28:
        raise ValueError(f"would be {size:,} bytes")
    return pyarrow.decompress(data[at:], size, "zstd", asbytes=True) if size else b""


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(the number at `at`, where it ends)."""
    number = shift = 0
    while data[at] > 127:
        number, shift, at = number | (data[at] & 127) << shift, shift + 7, at + 1
    return number | data[at] << shift, at + 1


def _varints(data: bytes) -> np.ndarray:
    """All the numbers in `data` [n] int64: seven bits a byte, the lowest first; the last byte of each is below 128."""
    raw = np.frombuffer(data, np.uint8)
    first = np.flatnonzero(np.append(True, raw[:-1] < 128)) if raw.size else np.zeros(0, np.int64)
    if raw.size and (raw[-1] > 127 or np.diff(np.append(first, raw.size)).max() > 9):
        raise ValueError("a number has no end")
    place = np.arange(raw.size) - np.repeat(first, np.diff(np.append(first, raw.size)))
    return np.add.reduceat((raw & 127).astype(np.int64) << 7 * place, first) if raw.size else np.zeros(0, np.int64)
