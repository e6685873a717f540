"""Reads named tensors from untrusted safetensors and PyTorch files, and writes safetensors."""

import errno
import re
import typing
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from tinyllama_jax.base import files
from tinyllama_jax.base.errors import UserError

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
LARGEST = 1 << 24  # bytes of an index or a header; a 405B model's are 0.1 MB
# prefixes that torch.compile, DDP, FSDP and Fabric put into tensor names
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
ROTARY = "rotary_emb.inv_freq"  # how the names of rotary tables end; old checkpoints have them, and nothing needs them


class _Index(typing.TypedDict):
    weight_map: dict[str, str]


class Stored:
    """A tensor in a safetensors file, with the header's shape and dtype; `np.asarray` reads it."""

    def __init__(self, file: object, name: str):
        self._file, self._name, header = file, name, file.get_slice(name)
        self.shape, code = tuple(header.get_shape()), header.get_dtype()
        self.dtype = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(code, code)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return self._file.get_tensor(self._name)


Tensors = Mapping[str, np.ndarray | Stored]


# -- checks of tensors --------------------------------------------------------------------------------------------------


def check(tensors: Tensors, expected: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Raises UserError naming the first tensor that is unknown or missing, of another shape, or not fp32, bf16 or fp16."""
    check_names([name for name in tensors if not name.endswith(ROTARY)], expected, origin)
    for name, shape in expected.items():
        if (tensor := tensors[name]).shape != shape:
            raise UserError(f"{origin}: {name} has shape {list(tensor.shape)}, but the model's description says {list(shape)}")
        if str(tensor.dtype) not in DTYPES:
            raise UserError(f"{origin}: {name} is of dtype {tensor.dtype}; only {', '.join(DTYPES)} can be read")


def check_names(names: Iterable[str], expected: Iterable[str], origin: str) -> None:
    """Raises UserError naming the first tensor that is unknown or missing."""
    names, expected = dict.fromkeys(names), dict.fromkeys(expected)
    missing, unknown = [n for n in expected if n not in names], sorted(n for n in names if n not in expected)
    for what, wrong in (("no", missing), ("unknown", unknown)):
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise UserError(f"{origin}: {what} tensor {shown(wrong[0])}{more}; the tensors do not fit the model's description")


def check_finite(name: str, array: np.ndarray, origin: str) -> None:
    """Raises UserError if a number in `array` is NaN or infinite."""
    if n := array.size - np.count_nonzero(np.isfinite(array)):
        remedy = "take an older checkpoint (with --allow-non-finite the converters in tools/ take it as it is)"
        raise UserError(f"{origin}: {name} has {n:,} numbers that are NaN or infinite; {remedy}")


def shown(name: object) -> str:
    """A name from a file, escaped and cut for a message of one line."""
    return " ".join((name if isinstance(name, str) and name.strip() and name.isprintable() else ascii(name)).split())[:200]


def _unwrapped(tensors: Tensors, origin: str) -> Tensors:
    out = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if wrappers := ", ".join(sorted({part for name in tensors for part in WRAPPERS.findall(name)})):
        if len(out) < len(tensors):
            raise UserError(f"{origin}: without {wrappers} two of its tensors have the same name; take one of them out")
        print(f"{origin}: took {wrappers} out of the names of its tensors")
    return out


def _read_safetensors(path: Path) -> Tensors:
    with files.open_regular(path) as f:
        header = int.from_bytes(f.read(8), "little")
    try:
        if header > LARGEST:
            raise safetensors.SafetensorError(f"its header would have {header:,} bytes")
        file = safetensors.safe_open(path, framework="np")  # checks offsets and sizes against the file's size
        return {name: Stored(file, name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: is not a whole safetensors file: {shown(str(error))}") from None


def read_pickle(path: Path) -> object:
    """The contents of a .bin, .pt or .pth file, tensors memory-mapped. No code in it is run. Raises UserError."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: is a pickle, which needs PyTorch to read: pip install torch") from None
    with files.open_regular(path) as f:
        zipped = zipfile.is_zipfile(f)
    try:
        if zipped:
            _check_zip(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except Exception as error:  # torch raises many types for a damaged file
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = "is not a whole PyTorch file"
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"was not loaded: it holds {code[1]}, which is neither tensor nor number; a pickle can run any code"
        raise UserError(f"{path}: {reason}") from None


def _check_zip(path: Path) -> None:
    """Raises UserError if the entries of a zip file could take more memory than the file's size."""
    with zipfile.ZipFile(path) as zipped:
        entries = zipped.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(f"{path}: is compressed, which PyTorch's files are not")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(f"{path}: is not a whole PyTorch file: its parts overlap")
    if any(entry.filename.endswith("data.pkl") and entry.file_size > LARGEST for entry in entries):
        raise UserError(f"{path}: has more than {LARGEST:,} bytes beside its tensors")


def to_arrays(table: object, origin: str) -> dict[str, np.ndarray]:
    """A dict of torch tensors as numpy arrays over the same memory. Raises UserError naming the first other entry."""
    import torch

    if not isinstance(table, dict):
        raise UserError(f"{origin}: is not a table of tensors by name")
    arrays = {}
    for name, tensor in table.items():
        if reason := unfit(name, tensor):
            raise UserError(f"{origin}: is not a table of tensors by name: {shown(name)} {reason}")
        tensor = tensor.detach()
        if f"{tensor.dtype}".removeprefix("torch.") not in DTYPES:
            raise UserError(f"{origin}: {shown(name)} is of dtype {tensor.dtype}; only {', '.join(DTYPES)} can be read")
        is_bf16 = tensor.dtype == torch.bfloat16  # numpy itself has no bf16
        arrays[name] = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if is_bf16 else tensor.numpy()
    return _unwrapped(arrays, origin)


def unfit(name: object, tensor: object) -> str | None:
    """Why a table's entry is not a named, dense tensor in main memory whose elements share none; None if it is."""
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        return f"is of type {type(tensor).__name__}" if isinstance(name, str) else "is no name"
    if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_nested:
        return "is quantised" if tensor.is_quantized else f"is sparse or nested ({tensor.layout})"
    if tensor.device.type != "cpu":
        return "is a meta tensor, which has no numbers" if tensor.is_meta else f"is on the device {tensor.device}"
    if tensor.is_conj() or tensor.is_neg():
        return "is a view that conjugates or negates; save what .resolve_conj().resolve_neg() gives"
    reach = 1  # elements spanned by the dimensions with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return "has elements that share memory, as `expand` makes them; save what .contiguous() gives"
        reach += (size - 1) * stride
    return None


# -- files and folders --------------------------------------------------------------------------------------------------


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file, which Transformers reads."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}  # the library writes raw buffers
    path.touch()
    mode = path.stat().st_mode
    safetensors.numpy.save_file(contiguous, path, metadata={"format": "pt"})  # Transformers refuses a file without a format
    path.chmod(mode)  # the library's file could be read by nobody else


def read(path: Path) -> Tensors:
    """Name -> tensor of one file, or of a Hugging Face folder (safetensors before .bin). Raises UserError.

    Prints which files of a folder it reads if there are several kinds, and which wrappers' prefixes it removes from names.
    """
    if path.is_file():
        return _read(path)
    order = [name + more for name in ("model.safetensors", "pytorch_model.bin") for more in ("", ".index.json")]
    first, *others = [name for name in order if (path / name).is_file()] or [None]
    if first is None:
        raise UserError(f"{path}: holds neither model.safetensors nor pytorch_model.bin, whole or in shards with an index")
    if others:
        print(f"{path}: its weights are read from {first}, as Transformers does, and not from {', '.join(others)}")
    return _read_indexed(path, path / first) if first.endswith(".json") else _read(path / first)


def _read(path: Path) -> Tensors:
    if path.suffix == ".safetensors":
        return _unwrapped(_read_safetensors(path), str(path))
    return to_arrays(read_pickle(path), str(path))


def _read_indexed(folder: Path, index: Path) -> Tensors:
    """The tensors of the files in an index. Each must be in the file that the index names, and in no other."""
    weight_map = files.read_json(index, _Index, largest=LARGEST)["weight_map"]
    tensors, place = {}, {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not (folder / file).is_file():
            raise UserError(f"{folder}: its index names {shown(file)}, which is not in it")
        for name, tensor in _read(folder / file).items():
            if name in place:
                raise UserError(f"{folder}: {shown(name)} is in {place[name]} and in {file}; take it out of one of them")
            tensors[name], place[name] = tensor, file
    listed = {WRAPPERS.sub("", name): file for name, file in weight_map.items()}
    for name, file in listed.items():
        if place.get(name, file) != file:
            raise UserError(f"{index}: says that {shown(name)} is in {file}, but it is in {place[name]}")
    check_names(*([name for name in names if not name.endswith(ROTARY)] for names in (place, listed)), str(index))
    return tensors
