"""Reads and writes a Llama's weights, architecture and metadata as GGUF, the file format of llama.cpp.

What differs from Hugging Face's folder:

| here                                      | GGUF                                                                          |
|-------------------------------------------|-------------------------------------------------------------------------------|
| heads of q and k half-split for RoPE      | interleaved: row 2i of a head is row i here, row 2i + 1 is row i + H/2 here     |
| `lm_head.weight` equal to the embedding   | no `output.weight`                                                            |
| rows of the vocabulary without a token    | none: llama.cpp wants as many rows as tokens                                  |

Sources: llama.cpp's docs/gguf.md, convert_hf_to_gguf.py and llama-model.cpp. The package `gguf` writes files and converts
numbers. `gguf_header` reads headers instead: the package's reader trusts an array's length, and a damaged one takes all memory.
"""

import dataclasses
import errno
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from tinyllama_jax.base import files
from tinyllama_jax.base.config import Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.hub import gguf_header, gguf_keys, llama
from tinyllama_jax.hub.tensor_files import shown

# type -> (llama.cpp's number for the file, general.file_type; the largest magnitude that the type holds: scales are fp16)
TYPES = {
    "f32": (0, math.inf),
    "f16": (1, 65_504.0),
    "bf16": (32, 3.389e38),
    "q8_0": (7, 65_504.0 * 127),
    "q4_0": (2, 65_504.0 * 8),
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.layers.{}.input_layernorm.weight": "blk.{}.attn_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "blk.{}.attn_q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "blk.{}.attn_k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "blk.{}.attn_v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "blk.{}.attn_output.weight",
    "model.layers.{}.post_attention_layernorm.weight": "blk.{}.ffn_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "blk.{}.ffn_gate.weight",
    "model.layers.{}.mlp.up_proj.weight": "blk.{}.ffn_up.weight",
    "model.layers.{}.mlp.down_proj.weight": "blk.{}.ffn_down.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
EMBEDDING, HEAD, FREQUENCIES = "model.embed_tokens.weight", "lm_head.weight", "rope_freqs.weight"
TOKENS = "tokenizer.ggml.tokens"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def package() -> ModuleType:
    """The package `gguf`. Raises UserError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package `gguf`: pip install gguf") from None
    return gguf


def _rows(array: np.ndarray, name: str, model: Model, interleave: bool) -> np.ndarray:
    """`array` with the rows of q and k in GGUF's order (`interleave`) or in Hugging Face's; others unchanged."""
    heads = {"q_proj": model.n_heads, "k_proj": model.n_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return array
    half = array.shape[0] // heads // 2
    return array.reshape(heads, *((2, half) if interleave else (half, 2)), -1).swapaxes(1, 2).reshape(array.shape)


def _names(model: Model) -> dict[str, str]:
    """Hugging Face's name -> GGUF's."""
    return {hf.format(i): name.format(i) for hf, name in NAMES.items() for i in range(model.n_layers)}


# -- writing ------------------------------------------------------------------------------------------------------------


def write(
    path: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    model: Model,
    vocabulary: Mapping[str, object],
    quantize: str,
    name: str,
    tied: bool = False,
    shard_bytes: int | None = None,
) -> list[Path]:
    """Writes `tensors`, as `llama.to_hf` yields them, to `path`; returns the files. Norms stay fp32.

    vocabulary: the keys `tokenizer.*`, whose tokens are the first rows of the embedding; more rows are left out.
    tied: the head is the embedding, and is not written again.
    shard_bytes: the most bytes of a file. If one does not suffice, there are several: NAME-00001-of-0000N.gguf beside `path`.
    Needs the memory of one tensor beside `tensors`. Raises UserError for a tensor that `quantize` cannot hold.
    """
    gguf = package()
    model = dataclasses.replace(model, vocab_size=len(vocabulary[TOKENS]))
    names = _names(model)
    shapes = {n: shape for n, shape in llama.shapes(model).items() if not (tied and n == HEAD)}
    kinds = {n: gguf.GGMLQuantizationType[quantize.upper() if len(shape) > 1 else "F32"] for n, shape in shapes.items()}
    sizes = {n: _bytes(n, shapes[n], kind, quantize) for n, kind in kinds.items()}
    factors = gguf_keys.factors_of(llama.to_hf_config(model, None, None, "float32"), model.d_head)
    limit = shard_bytes and _limit(vocabulary, sizes, shard_bytes)
    writer = gguf.GGUFWriter(path, "llama", split_max_size=limit if limit and sum(sizes.values()) > limit else 0)
    for key, value in (gguf_keys.described(model, name, TYPES[quantize][0]) | dict(vocabulary)).items():
        kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)
    if factors is not None:
        writer.add_tensor_info(FREQUENCIES, factors.shape, np.dtype(np.float32), factors.nbytes)
    for hf_name, shape in shapes.items():
        writer.add_tensor_info(names[hf_name], shape, np.dtype(np.float32), sizes[hf_name], kinds[hf_name])
    made = writer.format_shard_names(path)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for hf_name, tensor in tensors:
            if hf_name in shapes:
                writer.write_tensor_data(_quantized(hf_name, tensor[: shapes[hf_name][0]], model, kinds[hf_name], quantize))
    except OSError as error:
        if error.errno is None:  # numpy's, "N requested and M written"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise
    finally:
        writer.close()
    return made


def _bytes(name: str, shape: tuple[int, ...], kind: object, quantize: str) -> int:
    block, size = package().GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        what = f"{name} has rows of {shape[-1]:,} numbers, and {quantize} takes blocks of {block}"
        raise UserError(f"--quantize {quantize}: {what}; use f16 or bf16")
    return math.prod(shape) // block * size


def _quantized(name: str, tensor: np.ndarray, model: Model, kind: object, quantize: str) -> np.ndarray:
    tensor = np.ascontiguousarray(_rows(np.asarray(tensor, np.float32), name, model, interleave=True))
    largest = max(tensor.max(), -tensor.min())
    if tensor.ndim > 1 and TYPES[quantize][1] < largest < math.inf:
        raise UserError(f"--quantize {quantize}: {name} holds {largest:g}, which {quantize} cannot; use bf16 or f32")
    with np.errstate(all="ignore"):  # blocks of zeros, and of numbers too small for an fp16 scale, become zeros
        return package().quants.quantize(tensor, kind)


def _limit(vocabulary: Mapping[str, object], sizes: Mapping[str, int], shard_bytes: int) -> int:
    """The most bytes of tensors in a file of `shard_bytes`: the first one also holds the vocabulary and the names."""
    texts = [text for value in vocabulary.values() for text in (value if isinstance(value, list) else [value])]
    header = 65_536 + 160 * len(sizes) + sum(8 + (len(t.encode()) if isinstance(t, str) else 0) for t in texts)
    largest = max(sizes, key=sizes.__getitem__)
    if sizes[largest] + header > shard_bytes:
        least = math.ceil((sizes[largest] + header) / 1e6)
        what = f"{largest} and the vocabulary have {sizes[largest] + header:,} bytes, and a tensor cannot be split"
        raise UserError(f"--shard-size {shard_bytes / 1e6:g}: {what}; use {least} or more, or a smaller --quantize")
    return shard_bytes - header


# -- reading ------------------------------------------------------------------------------------------------------------


class Stored:
    """A tensor of a GGUF file with its shape in Hugging Face's layout; `np.asarray` reads it as fp32."""

    dtype = "float32"

    def __init__(self, name: str, shape: tuple[int, ...], kind: object, raw: np.ndarray):
        self.name, self.shape, self.kind, self.raw, self.model = name, shape, kind, raw, None

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        with np.errstate(all="ignore"):  # a damaged scale; NaN and infinity are refused later, by name
            array = package().quants.dequantize(self.raw.reshape(*self.shape[:-1], -1), self.kind).reshape(self.shape)
        return _rows(array, self.name, self.model, interleave=False) if self.model else array


class Gguf(NamedTuple):
    """A model in GGUF. `tensors` suits `llama.from_hf`; with a tied head it has the embedding under both names."""

    model: Model
    tensors: dict[str, Stored]
    metadata: dict[str, object]  # lists of texts, numpy arrays of numbers, texts and numbers
    tied: bool


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file by its name, there or not, or by its first bytes: other programs leave out the .gguf."""
    if path.suffix == ".gguf" or not path.is_file():
        return path.suffix == ".gguf" and not path.is_dir()
    with files.open_regular(path) as f:
        return f.read(4) == b"GGUF"


def check_named(path: Path, option: str = "--checkpoint") -> None:
    """Raises UserError for a folder whose weights are GGUF files: `option` must name one of them."""
    if path.is_dir() and not (path / "config.json").is_file() and (inside := sorted(path.glob("*.gguf"))):
        raise UserError(f"{option} {path}: name the GGUF file in it, such as {inside[0]}")


def load(path: str | Path, allow_non_finite: bool = False) -> tuple[dict, Model, dict[str, object]]:
    """(parameters as fp32 numpy arrays in a nested dict, model, metadata). Raises UserError."""
    whole = read(path)
    if whole.tied:
        print(f"{path}: its embedding is also its head; here they become two tables, and train apart")
    return llama.from_hf(whole.tensors, whole.model, str(path), allow_non_finite), whole.model, whole.metadata


def read(path: str | Path) -> Gguf:
    """Reads the description of a GGUF file, or of all files of a split one, given any of them; tensors are read when used.

    Raises UserError for a file that is not a whole GGUF, or has an unsupported architecture, feature or type of numbers.
    """
    path = Path(path)
    metadata, tensors = _read_file(path)
    if (parts := str(metadata.get("split.count", 1))) not in ("0", "1"):
        metadata, tensors = _joined(path, parts)
    factors = tensors.pop(FREQUENCIES, None)
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: has no tensor token_embd.weight")
    rows = tensors["token_embd.weight"].shape[0]
    config = gguf_keys.config(metadata, rows, None if factors is None else np.asarray(factors), str(path))
    model = llama.from_hf_config(config, str(path))
    known = {name: hf for hf, name in _names(model).items()}
    named = {known.get(name, name): tensor for name, tensor in tensors.items()}
    if tied := HEAD not in named:
        named[HEAD] = named[EMBEDDING]
    for name, tensor in named.items():
        tensor.name, tensor.model = (name, model) if tensor is not named[EMBEDDING] else (EMBEDDING, model)
    return Gguf(model, named, metadata, tied)


def _joined(path: Path, count: str) -> tuple[dict[str, object], dict[str, Stored]]:
    """(metadata of the first file, tensors of all files) of a split GGUF."""
    match = _SHARD.fullmatch(path.name)
    if not match or count != str(int(match[3])):
        raise UserError(f"{path}: is one of {count:.20} parts; llama.cpp's name for such is NAME-00001-of-0000N.gguf")
    first, tensors = {}, {}
    for i in range(int(count)):
        part = path.with_name(f"{match[1]}-{i + 1:05}-of-{match[3]}.gguf")
        if not part.is_file():
            raise UserError(f"{part}: no such file; {path.name} is one of {count} parts, which must be in one folder")
        own, more = _read_file(part)
        first = first or own
        if (which := f"{own.get('split.no')} of {own.get('split.count')}") != f"{i} of {count}":
            raise UserError(f"{part}: says that it is part {which}, counted from 0")
        if twice := tensors.keys() & more.keys():
            raise UserError(f"{part}: {shown(min(twice))} is also in an earlier part")
        tensors |= more
    if (n := str(first.get("split.tensors.count", len(tensors)))) != str(len(tensors)):
        raise UserError(f"{path}: its {count} parts hold {len(tensors)} tensors, not {n:.20}")
    return first, tensors


def _read_file(path: Path) -> tuple[dict[str, object], dict[str, Stored]]:
    """(metadata, GGUF's name -> tensor) of one file."""
    with files.open_regular(path) as f:
        size = os.fstat(f.fileno()).st_size
        data = np.memmap(f, np.uint8, "r") if size else np.zeros(0, np.uint8)
    package()
    try:
        header = gguf_header.parse(data)
        return header.metadata, _tensors(header)
    except ValueError as error:
        raise UserError(f"{path}: is not a whole GGUF file: {shown(str(error))}") from None


def _tensors(header: gguf_header.Header) -> dict[str, "Stored"]:
    """GGUF's name -> tensor. Raises ValueError for tensors that are not in the file, or of a type that is not converted."""
    tensors = {}
    for name, place in header.places.items():
        kind, size = _kind(name, place.shape, place.kind)
        if place.offset + size > header.body.size:
            raise ValueError(f"it ends within or before the tensor {name}")
        tensors[name] = Stored(name, place.shape, kind, header.body[place.offset : place.offset + size])
    if sum(tensor.raw.size for tensor in tensors.values()) > header.body.size:
        raise ValueError("its tensors overlap")
    return tensors


def _kind(name: str, shape: tuple[int, ...], code: int) -> tuple[object, int]:
    """(type, bytes) of a tensor. Raises ValueError for a type that the package cannot convert to fp32."""
    gguf = package()
    kind = gguf.GGMLQuantizationType(code)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        raise ValueError(f"the tensor {name} is of type {kind.name}, which the package gguf does not convert") from None
    if shape[-1] % block:
        raise ValueError(f"the tensor {name} has rows of {shape[-1]:,} numbers, and {kind.name} has blocks of {block}")
    return kind, math.prod(shape) // block * size
