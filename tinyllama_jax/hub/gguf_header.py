"""Reads the header of a GGUF file: keys, values, and where its tensors are. Nothing in it is trusted.

Layout (llama.cpp's docs/gguf.md): "GGUF", version, number of tensors and of keys, keys with typed values, tensors' names with
dimensions (the fastest first), type and offset, and, at a multiple of `general.alignment`, the numbers.
"""

from typing import NamedTuple

import numpy as np

MOST_ENTRIES = 1 << 22  # in an array of texts; the largest vocabularies have 2^18 tokens
MOST_NAMES = 1 << 16  # tensors, or keys, of one file
# the number of a value's type -> how numpy writes the type
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_TEXT, _ARRAY = 8, 9


class Place(NamedTuple):
    """Where a tensor is. `shape`: the slowest dimension first. `kind`: llama.cpp's number of its type."""

    shape: tuple[int, ...]
    kind: int
    offset: int  # bytes after the beginning of the numbers


class Header(NamedTuple):
    """metadata: lists of texts, numpy arrays of numbers, texts and numbers    body: the bytes of all tensors"""

    metadata: dict[str, object]
    places: dict[str, Place]
    body: np.ndarray


def parse(data: np.ndarray) -> Header:
    """The header of a file whose bytes are `data`. Raises ValueError."""
    cursor = _Cursor(data)
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := cursor.number("<u4")) not in (2, 3):
        raise ValueError(f"it is of version {version}, or big-endian; only 2 and 3 are read")
    n_tensors, n_keys = cursor.count(MOST_NAMES, "tensors"), cursor.count(MOST_NAMES, "keys")
    metadata: dict[str, object] = {}
    for _ in range(n_keys):
        if (key := cursor.text()) in metadata:
            raise ValueError(f"it has the key {key} twice")
        metadata[key] = cursor.value()
    places: dict[str, Place] = {}
    for _ in range(n_tensors):
        if (name := cursor.text()) in places:
            raise ValueError(f"it has the tensor {name} twice")
        places[name] = Place(cursor.shape(), cursor.number("<u4"), cursor.number("<u8"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise ValueError(f"general.alignment is {alignment}")
    return Header(metadata, places, data[-(-cursor.at // alignment) * alignment :])


class _Cursor:
    """Reads values one after the other. Raises ValueError at the end of the data, before any memory is allocated."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = memoryview(data), 0

    def take(self, n: int) -> memoryview:
        if n > len(self.data) - self.at:
            raise ValueError(f"it ends after {len(self.data):,} bytes, within its header")
        self.at += n
        return self.data[self.at - n : self.at]

    def numbers(self, dtype: str, n: int) -> np.ndarray:
        return np.frombuffer(bytes(self.take(n * np.dtype(dtype).itemsize)), dtype)

    def number(self, dtype: str) -> int | float | bool:
        (value,) = self.numbers(dtype, 1)
        return float(str(value)) if dtype == "<f4" else value.item()  # 1e-05, not 9.99999974e-06

    def count(self, most: int, what: str) -> int:
        if (n := self.number("<u8")) > most:
            raise ValueError(f"it says that it has {n:,} {what}")
        return n

    def text(self) -> str:
        return str(self.take(int.from_bytes(self.take(8), "little")), "utf-8")

    def value(self) -> object:
        kind = self.number("<u4")
        if kind == _TEXT:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        inner = self.number("<u4") if kind == _ARRAY else kind
        if kind == _ARRAY and inner == _TEXT:
            return [self.text() for _ in range(self.count(MOST_ENTRIES, "texts in one array"))]
        if kind != _ARRAY or inner not in _SCALARS:
            raise ValueError(f"a value has the unknown type {inner}")
        return self.numbers(_SCALARS[inner], self.number("<u8"))

    def shape(self) -> tuple[int, ...]:
        n = self.number("<u4")
        shape = tuple(self.number("<u8") for _ in range(n if n <= 4 else 0))[::-1]
        if not shape or 0 in shape:
            raise ValueError(f"a tensor has {n} dimensions, {list(shape)}")
        return shape
