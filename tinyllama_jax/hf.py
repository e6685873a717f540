"""The bijective name and shape table between this and Llama in Hugging Face; numpy only.

Hugging Face keeps one tensor a layer, and a matrix as [out, in]; here all layers of a kind are one array [L, in ..., out ...].
RoPE is half-split on both sides, so that no row moves. Everything else follows from `dims.PARAMETERS`.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import struct
import zipfile
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from tinyllama_jax import dims
from tinyllama_jax.config import Model
from tinyllama_jax.errors import UserError, read_json

NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
SHARD_BYTES = 5_000_000_000  # Hugging Face's "5GB"


# -- names and shapes ---------------------------------------------------------------------------------------------------


def _tensors(model: Model) -> Iterator[tuple[str, dims.Parameter, int | None]]:
    """(Hugging Face's name, our parameter, layer), in the order in which a forward pass uses them."""
    for layered, group in itertools.groupby(dims.PARAMETERS, key=lambda p: p.dims.startswith("L")):
        for layer, p in itertools.product(range(model.n_layers) if layered else [None], group):
            yield NAMES[p.name].format(layer), p, layer


def _hf_shape(parameter: dims.Parameter, model: Model) -> tuple[int, ...]:
    ours = _layer_shape(parameter, model)
    n = len(parameter.fan_in)
    return (math.prod(ours[n:]), math.prod(ours[:n])) if n else ours


def _layer_shape(parameter: dims.Parameter, model: Model) -> tuple[int, ...]:
    return dims.shape(parameter, model)[parameter.dims.startswith("L") :]


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name -> shape, of every tensor of `model`."""
    return {name: _hf_shape(p, model) for name, p, _ in _tensors(model)}


def to_hf(params: dict, model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of every tensor as Hugging Face has it: views of `params` where they are numpy arrays."""
    for name, p, layer in _tensors(model):
        array = np.asarray(functools.reduce(dict.__getitem__, p.name.split("/"), params))
        array = array if layer is None else array[layer]
        yield name, array.reshape(-1, _hf_shape(p, model)[0]).T if p.fan_in else array


def from_hf(tensors: Mapping[str, np.ndarray], model: Model, origin: str = "checkpoint") -> dict:
    """Inverse of `to_hf`: nested dict of fp32 arrays. Each tensor is asked for once.

    Raises UserError naming the first unknown, missing or misshapen tensor; rotary tables of old checkpoints are left out.
    """
    expected = shapes(model)
    check_names([name for name in tensors if not name.endswith("rotary_emb.inv_freq")], expected, origin)
    flat = {p.name: np.empty(dims.shape(p, model), np.float32) for p in dims.PARAMETERS}
    for name, p, layer in _tensors(model):
        tensor = fetch(tensors, name, expected[name], origin)
        ours = (tensor.T if p.fan_in else tensor).reshape(_layer_shape(p, model))
        flat[p.name][... if layer is None else layer] = ours
    params: dict = {}
    for name, array in flat.items():
        *parents, last = name.split("/")
        functools.reduce(lambda node, part: node.setdefault(part, {}), parents, params)[last] = array
    return params


def check_names(names: Iterable[str], expected: Iterable[str], origin: str) -> None:
    """Raises UserError naming the first tensor that is too much or that is not there."""
    names, expected = list(names), list(expected)
    for what, wrong in (("no", [n for n in expected if n not in set(names)]), ("unknown", sorted(set(names) - set(expected)))):
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise UserError(f"{origin}: {what} tensor {wrong[0]}{more}; the tensors do not fit the model's description")


def fetch(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], origin: str) -> np.ndarray:
    """The tensor `name`. Raises UserError if its shape is another or its numbers are not fp32, bf16 or fp16."""
    tensor = tensors[name]
    if tensor.shape != shape:
        raise UserError(f"{origin}: {name} has shape {list(tensor.shape)}, but the model's description says {list(shape)}")
    if tensor.dtype not in DTYPES.values():
        raise UserError(f"{origin}: {name} is of dtype {tensor.dtype}; only {', '.join(DTYPES)} can be read")
    return tensor


# -- config.json --------------------------------------------------------------------------------------------------------

# Fields that would change what is computed, and their values that do not (the default of an absent one is among them).
_COMPUTED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}


def to_hf_config(model: Model, bos: int | None, eos: int | None, dtype: str) -> dict:
    """The contents of config.json, in words that Transformers 4 and 5 both read."""
    scaled = model.rope_scaling != 1
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.d_head,
        "hidden_act": "silu",
        # with linear scaling, the length before it: readers multiply by the factor
        "max_position_embeddings": round(model.seq_len / model.rope_scaling),
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": {"type": "linear", "factor": model.rope_scaling} if scaled else None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }


def from_hf_config(config: dict, origin: str = "config.json") -> Model:
    """The architecture that a config.json describes. Raises UserError for what this model does not compute."""
    if config.get("model_type") != "llama":
        raise UserError(f"{origin}: model_type is {config.get('model_type')!r}; only 'llama' can be read")
    for key, harmless in _COMPUTED.items():
        if key in config and config[key] not in harmless:
            raise UserError(f"{origin}: {key} is {config[key]!r}, which this model does not compute (only {harmless[0]!r})")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{origin}: rope_scaling is {json.dumps(rope)}, not a table")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear") or rope.get("partial_rotary_factor") not in (1, None):
        raise UserError(
            f"{origin}: RoPE is {json.dumps(rope)}; only the types 'default' and 'linear' are computed, on whole heads"
        )
    for key in ("num_attention_heads", "hidden_size", "head_dim", "num_key_value_heads", "max_position_embeddings"):
        if not isinstance(config.get(key) or 0, int):
            raise UserError(f"{origin}: {key} is {json.dumps(config[key])}, not a whole number")
    heads, width = config.get("num_attention_heads", 0), config.get("hidden_size")
    if config.get("head_dim") and config["head_dim"] * heads != width:
        raise UserError(
            f"{origin}: head_dim is {config['head_dim']}, but only hidden_size / heads = {width} / {heads} is computed"
        )
    try:
        scaling = float(rope["factor"]) if kind == "linear" else 1.0
        return Model(
            n_layers=config["num_hidden_layers"],
            d_model=config["hidden_size"],
            n_heads=config["num_attention_heads"],
            # absent in checkpoints from before grouped-query attention
            n_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            d_ff=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            seq_len=round(config["max_position_embeddings"] * scaling),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
            rope_scaling=scaling,
            norm_eps=float(config["rms_norm_eps"]),
        )
    except KeyError as error:
        raise UserError(f"{origin}: does not say {error}") from None
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{origin}: {error}") from None


# -- writing a folder ---------------------------------------------------------------------------------------------------


def save_folder(
    params: dict, model: Model, folder: Path, dtype: str, bos: int | None, eos: int | None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes config.json, generation_config.json and safetensors of at most `shard_bytes` each into `folder`.

    Holds one tensor more than `params` at a time. Raises UserError for a number that `dtype` cannot hold.
    """
    sizes = {name: math.prod(shape) * DTYPES[dtype].itemsize for name, shape in shapes(model).items()}
    shards: list[dict[str, int]] = [{}]
    for name, size in sizes.items():
        if shards[-1] and sum(shards[-1].values()) + size > shard_bytes:
            shards.append({})
        shards[-1][name] = size
    n = len(shards)
    files = ["model.safetensors"] if n == 1 else [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    tensors = to_hf(params, model)
    for file, shard in zip(files, shards, strict=True):
        _write_safetensors(folder / file, shard, tensors, dtype, shapes(model))
    documents = {
        "config.json": to_hf_config(model, bos, eos, dtype),
        "generation_config.json": {"_from_model_config": True, "bos_token_id": bos, "eos_token_id": eos},
    }
    if n > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        documents["model.safetensors.index.json"] = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": weight_map,
        }
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _write_safetensors(
    path: Path,
    sizes: dict[str, int],
    tensors: Iterator[tuple[str, np.ndarray]],
    dtype: str,
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """The next `len(sizes)` of `tensors`, one by one; the library's writer wants all of a file in memory at once."""
    kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # Transformers refuses a file that does not say it
    end = 0
    for name, size in sizes.items():
        header[name] = {"dtype": kind, "shape": shapes[name], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for expected, (name, tensor) in zip(sizes, tensors, strict=False):
            assert expected == name
            f.write(np.ascontiguousarray(_cast(name, tensor, dtype)).reshape(-1).view(np.uint8))


def _cast(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # told below, by name
        cast = tensor.astype(DTYPES[dtype], copy=False)
    too_large = np.isinf(cast) & np.isfinite(tensor)
    if too_large.any():
        largest = np.abs(tensor[too_large]).max()
        raise UserError(f"--dtype={dtype}: {name} holds {largest:g}, which {dtype} cannot; use --dtype=bfloat16 or float32")
    return cast


# -- reading a folder ---------------------------------------------------------------------------------------------------


class Shards(Mapping):
    """The tensors of safetensors files by name, each read when it is asked for."""

    def __init__(self, files: list[Path]):
        """Raises UserError for a file that is not whole."""
        self._file = {}
        for file in files:
            with self._open(file) as f:
                self._file |= dict.fromkeys(f.keys(), file)

    @staticmethod
    def _open(file: Path):
        try:
            return safetensors.safe_open(file, framework="np")
        except safetensors.SafetensorError as error:
            raise UserError(f"{file}: is not a whole safetensors file: {error}") from None

    def __getitem__(self, name: str) -> np.ndarray:
        with self._open(self._file[name]) as f:
            return f.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)


def read_pickle(path: Path) -> object:
    """What a .bin, .pt or .pth file holds, its tensors memory-mapped; no code in it is run. Raises UserError."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: is a pickle, which needs PyTorch to read: pip install torch") from None
    path.open("rb").close()  # a file that cannot be opened says so itself
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch has no type of its own for a file that is not its own
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{path}: was not loaded: it holds {code[1]}, which is neither tensor nor number; a pickle can run any code"
            ) from None
        raise UserError(f"{path}: is not a whole PyTorch file") from None


def to_arrays(held: object, origin: str) -> dict[str, np.ndarray]:
    """A dict of torch tensors as numpy arrays over the same memory. Raises UserError if `held` is anything else."""
    import torch

    if not isinstance(held, dict) or not all(isinstance(t, torch.Tensor) for t in held.values()):
        raise UserError(f"{origin}: is not a table of tensors by name")
    bf16 = lambda t: t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)  # which numpy itself does not have
    return {name: bf16(t.detach()) if t.dtype == torch.bfloat16 else t.detach().numpy() for name, t in held.items()}


def _read_pickles(files: list[Path]) -> Mapping[str, np.ndarray]:
    return ChainMap(*(to_arrays(read_pickle(file), str(file)) for file in files))


def read_tensors(path: Path) -> Mapping[str, np.ndarray]:
    """Name -> tensor of a Hugging Face folder (safetensors before .bin) or of one file. Raises UserError."""
    if path.is_file():
        return Shards([path]) if path.suffix == ".safetensors" else _read_pickles([path])
    for name, read in (("model.safetensors", Shards), ("pytorch_model.bin", _read_pickles)):
        index = path / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index, "weight_map")["weight_map"]
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise UserError(f"{index}: is damaged (its weight_map does not name a file for each tensor)")
            tensors = read([_shard(path, file) for file in sorted(set(weight_map.values()))])
            check_names(tensors, weight_map, str(index))
            return tensors
        if (path / name).is_file():
            return read([path / name])
    raise UserError(f"{path}: holds neither model.safetensors nor pytorch_model.bin, whole or in shards with an index")


def _shard(folder: Path, name: str) -> Path:
    if Path(name).name != name or not (folder / name).is_file():
        raise UserError(f"{folder}: its index names {name}, which is not in it")
    return folder / name


def load_model(path: str | Path) -> Model:
    """The architecture of a Hugging Face folder, or of a file beside its config.json. Raises UserError."""
    return from_hf_config(_read_config(Path(path)), str(path))


def load_folder(path: str | Path) -> tuple[dict, Model]:
    """(parameters as fp32 numpy arrays in a nested dict, model) of a Hugging Face folder, or of a file beside its config.json.

    Tied embeddings come as two equal tables. Raises UserError.
    """
    path = Path(path)
    model, tensors = load_model(path), read_tensors(path)
    if _read_config(path).get("tie_word_embeddings"):
        tensors = _untie(tensors, str(path))
    return from_hf(tensors, model, str(path)), model


def _read_config(path: Path) -> dict:
    described = (path.parent if path.is_file() else path) / "config.json"
    if not described.is_file():
        raise UserError(
            f"{path}: no such folder" if not path.exists() else f"{described}: no such file; it describes the model"
        )
    return read_json(described, "model_type")


def describes(folder: Path) -> bool:
    """Whether `folder` says of itself that it is one of Hugging Face's."""
    return (folder / "config.json").is_file() and "model_type" in read_json(folder / "config.json")


def _untie(tensors: Mapping[str, np.ndarray], origin: str) -> Mapping[str, np.ndarray]:
    head, embedding = NAMES["lm_head/kernel"], NAMES["embed/embedding"]
    if head in tensors and embedding in tensors and not np.array_equal(tensors[head], tensors[embedding]):
        raise UserError(f"{origin}: tie_word_embeddings is true, but {head} and {embedding} differ")
    print(f"{origin}: its embedding is also its head (tie_word_embeddings); here they become two tables, and train apart")
    return ChainMap({head: tensors[embedding]}, tensors) if embedding in tensors else tensors
