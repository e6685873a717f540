"""Writes LITPKDS .bin shards, the original's packed files, from a prepared data set. `data/litpkds.py` reads them.

python -m tinyllama_jax.convert to-litpkds --input DIR --split train --prefix train_slim --output DIR2
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from tinyllama_jax.base import files
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.data.litpkds import HEADER, MAGIC, VERSION, WRITTEN, files_of, tokenizer_beside

CHUNK = 2049 * 1024  # tokens in a file
LARGEST_CHUNK = 1 << 28  # tokens of a file, all in memory while it is written
MOVED = "moved.json"  # lists the files of a finished export that are being moved to `output`


def write(
    tokens: Iterable[np.ndarray], folder: str | Path, prefix: str, chunk: int, dtype: str, fill: int | None
) -> tuple[int, int]:
    """Writes FOLDER/PREFIX_0000000000.bin, ... of `chunk` tokens each, from consecutive arrays of any length.

    `fill`: the token that pads the last file. None: the last file is dropped, even if it is full, as in the original's last
    version. Returns (files written, tokens in all, including those of a dropped file).
    """
    folder, buffer, at, files, n = Path(folder), np.empty(chunk, f"<{np.dtype(dtype).str[1:]}"), 0, 0, 0
    header = HEADER.pack(MAGIC, VERSION, WRITTEN[dtype], chunk)
    for part in tokens:
        n += len(part)
        while len(part) > chunk - at:  # a full file is written only when another token follows
            buffer[at:], part, at = part[: chunk - at], part[chunk - at :], 0
            (folder / f"{prefix}_{files:010d}.bin").write_bytes(header + buffer.tobytes())
            files += 1
        buffer[at : at + len(part)] = part
        at += len(part)
    if fill is not None:
        buffer[at:] = fill
        (folder / f"{prefix}_{files:010d}.bin").write_bytes(header + buffer.tobytes())
        files += 1
    return files, n


def stream(blocks: Blocks) -> Iterator[np.ndarray]:
    """Yields all tokens of a source in order, without padding."""
    for first in range(0, len(blocks), 1024):
        blocks.hold(first, min(first + 1024, len(blocks)))
        tokens, length = blocks.read(np.arange(first, min(first + 1024, len(blocks))))
        yield tokens[np.arange(tokens.shape[1]) < length[:, None]]


def export(source: Path, split: str, output: Path, prefix: str, chunk: int = CHUNK, tail: str = "fill") -> list[Path]:
    """Writes one split of a prepared data set as LITPKDS files, and its tokenizer beside them. Returns the files.

    The files appear once all are written. `tail`: "fill" pads the last file with bos, "drop" drops it. Raises UserError.
    """
    blocks = Blocks(source, split)
    vocabulary = blocks.manifest["tokenizer"]
    if not 1 <= chunk <= LARGEST_CHUNK:
        raise UserError(f"--chunk-size {chunk}: must be positive, and {LARGEST_CHUNK:,} at most; the original has {CHUNK:,}")
    if prefix.startswith(".") or not prefix or Path(prefix).name != prefix:
        raise UserError(f"--prefix {prefix}: must be the start of the files' names, such as train_slim")
    if tail == "fill" and vocabulary["bos_id"] < 0:
        raise UserError("--tail fill: fills up with bos, which this tokenizer does not have; say --tail drop")
    files.check_local("--output", output)
    busy = f"--output {output}: another process is writing {prefix}_*.bin there"
    with files.workplace(output / f".{prefix}.partial", busy) as place:
        _take_back(place, output)  # an earlier call may have been killed while it moved files
        if existing := _numbered(output, prefix):
            raise UserError(
                f"{existing[0]}: exists already; choose another --prefix or --output, or delete what begins with it"
            )
        if not (output / "tokenizer").is_dir():
            tokenizer_lib.load(blocks.tokenizer).save(output / "tokenizer")
        elif tokenizer_beside(output).sha256 != blocks.tokenizer_sha256:
            raise UserError(f"--output {output}: has the tokenizer of other data; choose another folder")
        folder = place / "whole"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        dtype = "uint16" if vocabulary["vocab_size"] < 65_500 else "int32"  # as the original's builder chooses
        n_files, n = write(stream(blocks), folder, prefix, chunk, dtype, vocabulary["bos_id"] if tail == "fill" else None)
        if not n_files:
            remedy = f"say --tail fill, or a --chunk-size below {n:,}"
            raise UserError(f"--tail drop: would drop all {n:,} tokens, which do not fill one file; {remedy}")
        files.settle(folder)
        _move(place, folder, output)
    missing = n_files * chunk - n
    end = "bos fill up the last one" if missing >= 0 else "tokens at the end are dropped (--tail fill keeps them)"
    print(f"{output / prefix}: {n:,} tokens in {n_files:,} files of {chunk:,}; {abs(missing):,} {end}")
    return _numbered(output, prefix)


def _numbered(output: Path, prefix: str) -> list[Path]:
    """Returns the existing files with exactly this prefix."""
    return [f for f in files_of(output / f"{prefix}_") if re.fullmatch(r"\d{10}\.bin", f.name[len(prefix) + 1 :])]


def _move(place: Path, folder: Path, output: Path) -> None:
    """Moves all files of `folder` to `output`, or none. If it is killed, `place` still has the list of moved files."""
    names = sorted(os.listdir(folder))
    files.write(place / MOVED, json.dumps({name: _identity(folder / name) for name in names}))
    try:
        for name in names:
            os.replace(folder / name, output / name)
    except BaseException:
        _take_back(place, output)
        raise


def _take_back(place: Path, output: Path) -> None:
    """Removes the files that `_move` put into `output`, as listed in `place`, unless they have been overwritten since."""
    record = place / MOVED
    for name, identity in (files.read_json(record, dict[str, list[int]]) if record.is_file() else {}).items():
        if (file := output / Path(name).name).is_file() and _identity(file) == identity:
            file.unlink()


def _identity(file: Path) -> list[int]:
    return [file.stat().st_ino, file.stat().st_size, file.stat().st_mtime_ns]
