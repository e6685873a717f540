"""Names and shapes of this model's parameters in Hugging Face's Llama, a bijection; numpy only.

Hugging Face has one tensor per layer, and a matrix as [out, in]. This package has all layers in one array [L, in ..., out ...].
RoPE is half-split in both, so no row moves. Everything else follows from `dims.PARAMETERS`.
"""

import dataclasses
import functools
import itertools
import json
import math
import typing
from collections import ChainMap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tinyllama_jax.base import dims, files, rope
from tinyllama_jax.base.config import Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.values import LIMITS
from tinyllama_jax.hub import tensor_files
from tinyllama_jax.hub.tensor_files import DTYPES, Tensors

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
SHARD_BYTES = 2_000_000_000  # so an export needs 2 GB beside the weights
LARGEST_CONFIG = 1 << 20  # bytes of a config.json
MOST_LAYERS = 4_096  # more is a mistake in config.json, and the tensors' names alone would take too much memory


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
    """(name, tensor) of every tensor in Hugging Face's layout: views of `params` if these are numpy arrays."""
    for name, p, layer in _tensors(model):
        array = np.asarray(functools.reduce(dict.__getitem__, p.name.split("/"), params))
        array = array if layer is None else array[layer]
        yield name, array.reshape(-1, _hf_shape(p, model)[0]).T if p.fan_in else array


def arrays(
    tensors: Tensors, model: Model, origin: str = "checkpoint", allow_non_finite: bool = False
) -> Iterator[tuple[dims.Parameter, int | None, np.ndarray]]:
    """(parameter, layer, array of that layer in this package's shape) of every tensor, each read once; views where possible.

    Raises UserError naming the first tensor that is unknown, missing or of another shape, or that holds NaN or infinity unless
    `allow_non_finite`. Rotary tables of old checkpoints are ignored.
    """
    tensor_files.check(tensors, shapes(model), origin)  # before a tensor is read, or memory of the model's size is allocated
    for name, p, layer in _tensors(model):
        tensor = np.asarray(tensors[name])
        if not allow_non_finite:
            tensor_files.check_finite(name, tensor, origin)
        yield p, layer, (tensor.T if p.fan_in else tensor).reshape(_layer_shape(p, model))


def from_hf(tensors: Tensors, model: Model, origin: str = "checkpoint", allow_non_finite: bool = False) -> dict:
    """Inverse of `to_hf`: nested dict of fp32 arrays. Raises UserError as `arrays` does."""
    flat: dict[str, np.ndarray] = {}
    for p, layer, array in arrays(tensors, model, origin, allow_non_finite):
        if p.name not in flat:
            flat[p.name] = np.empty(dims.shape(p, model), np.float32)
        flat[p.name][... if layer is None else layer] = array
    params: dict = {}
    for name, array in flat.items():
        *parents, last = name.split("/")
        functools.reduce(lambda node, part: node.setdefault(part, {}), parents, params)[last] = array
    return params


# -- config.json --------------------------------------------------------------------------------------------------------

# Fields that change the computation, each with the values that do not change it. An absent field is harmless.
_COMPUTED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}


def _positions(model: Model) -> int:
    """The model's max_position_embeddings."""
    kind, numbers = rope.parse(model.rope_type)
    if kind == "yarn":  # Transformers 4 takes the factor from this ratio (5 from `factor`)
        return max(round(numbers[rope.LENGTH] * model.rope_scaling), 1)
    # before linear scaling: readers multiply it by the factor, and must not exceed the trained length
    return max(int(model.seq_len / model.rope_scaling), 1) if kind == "linear" else model.seq_len


def to_hf_config(model: Model, bos: int | None, eos: int | None, dtype: str) -> dict:
    """The contents of config.json, in the keys that both Transformers 4 and 5 read. NTK scaling is its changed rope_theta."""
    before, (kind, numbers) = _positions(model), rope.parse(model.rope_type)
    length = round(before * model.rope_scaling) if kind == "linear" else before
    inexact = {} if length == model.seq_len else {"seq_len": model.seq_len}
    scaling = None
    if kind == "linear" and model.rope_scaling != 1:
        scaling = {"type": kind, "factor": model.rope_scaling}  # "type" is the only name that Transformers before 4.43 read
    elif kind in ("llama3", "yarn"):
        given = {name: number for name, number in numbers.items() if number is not None and number is not True}
        scaling = {"rope_type": kind, "factor": model.rope_scaling, **given}
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
        "max_position_embeddings": before,
        **inexact,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": rope.theta(model),
        "rope_scaling": scaling,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }


_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "max_position_embeddings",
)
_NUMBERS = dict.fromkeys(_KEYS, files.Size) | dict.fromkeys(("rms_norm_eps", "rope_theta"), files.Positive)
_NUMBERS |= dict.fromkeys(("num_key_value_heads", "head_dim", rope.LENGTH), files.Size | None) | {"seq_len": object}
_ROPE = dict.fromkeys(("type", "rope_type"), str) | dict.fromkeys(("factor", "rope_theta"), files.Positive)
_ROPE |= dict.fromkeys(("partial_rotary_factor", *rope.TYPES["llama3"], *rope.TYPES["yarn"]), float | None)
_Rope = typing.TypedDict("_Rope", _ROPE | {rope.LENGTH: files.Size | None, "truncate": bool}, total=False)
_Described = typing.TypedDict(
    "_Described", _NUMBERS | dict.fromkeys(("rope_scaling", "rope_parameters"), _Rope | None), total=False
)


def from_hf_config(config: dict, origin: str = "config.json") -> Model:
    """The architecture that a config.json describes. Raises UserError for a feature that this model does not have."""
    if config.get("model_type") != "llama":
        raise UserError(f"{origin}: model_type is {config.get('model_type')!r:.200}; only 'llama' can be read")
    for key, harmless in _COMPUTED.items():
        if key in config and config[key] not in harmless:
            raise UserError(
                f"{origin}: {key} is {config[key]!r:.200}, which this model does not compute (only {harmless[0]!r})"
            )
    try:
        described = files.typed(config, _Described)
        table, raw = (c.get("rope_scaling") or c.get("rope_parameters") or {} for c in (described, config))
        kind, whole = table.get("rope_type", table.get("type", "default")), table.get("partial_rotary_factor") in (1, None)
        if kind == "ntk" or not whole or any(isinstance(value, dict) for value in raw.values()):
            raise UserError(
                f"RoPE is {json.dumps(raw):.200}; only linear, llama3 and yarn scaling of one table for all layers, "
                "on whole heads, are computed"
            )
        heads, width, before = (described[key] for key in ("num_attention_heads", "hidden_size", "max_position_embeddings"))
        if described["num_hidden_layers"] > MOST_LAYERS:
            raise UserError(f"num_hidden_layers is {described['num_hidden_layers']:,}, and {MOST_LAYERS:,} are the most")
        scaling = table["factor"] if kind in rope.TYPES else 1.0
        if kind == "default" or (kind in rope.TYPES and scaling == 1 and table.get("attention_factor") is None):
            kind = "linear"
        # to Transformers, 0 and null are a number that is not given
        numbers = {name: number for name, number in table.items() if number or name in ("truncate", "attention_factor")}
        numbers[rope.LENGTH] = described.get(rope.LENGTH) or table.get(rope.LENGTH) or before
        # of yarn, too, some folders give the length before scaling
        stretched = kind == "linear" or (kind == "yarn" and numbers[rope.LENGTH] == before)
        head_dim = described.get("head_dim") or 0
        model = Model(
            n_layers=described["num_hidden_layers"],
            d_model=width,
            n_heads=heads,
            n_kv_heads=described.get("num_key_value_heads") or heads,  # absent before grouped-query attention
            d_ff=described["intermediate_size"],
            vocab_size=described["vocab_size"],
            seq_len=round(before * scaling) if stretched else before,
            head_dim=0 if head_dim * heads == width else head_dim,
            rope_theta=table.get("rope_theta", described.get("rope_theta", 10_000.0)),
            rope_scaling=scaling,
            rope_type=rope.text_of(kind, numbers),
            norm_eps=described["rms_norm_eps"],
        )
        length = described.get("seq_len")
        if type(length) is int and 1 <= length <= LIMITS["model.seq_len"][1]:
            known = dataclasses.replace(model, seq_len=length)
            return known if _positions(known) == before else model  # written by `to_hf_config`
        return model
    except KeyError as error:
        raise UserError(f"{origin}: does not say {error}") from None
    except (UserError, ValueError) as error:
        raise UserError(f"{origin}: {error}") from None


# -- writing a folder ---------------------------------------------------------------------------------------------------


def save_folder(
    params: dict, model: Model, folder: Path, dtype: str, bos: int | None, eos: int | None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes config.json, generation_config.json and safetensors files of at most `shard_bytes` each into `folder`.

    Needs the memory of one shard beside `params`. Raises UserError for a number that `dtype` cannot hold.
    """
    sizes = {name: math.prod(shape) * DTYPES[dtype].itemsize for name, shape in shapes(model).items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    n, tensors = len(shards), to_hf(params, model)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if n == 1 else f"model-{i:05}-of-{n:05}.safetensors"
        tensor_files.write(folder / file, {name: _cast(name, next(tensors)[1], dtype) for name in shard})
        weight_map |= dict.fromkeys(shard, file)
    documents = {
        "config.json": to_hf_config(model, bos, eos, dtype),
        "generation_config.json": {"_from_model_config": True, "bos_token_id": bos, "eos_token_id": eos},
    }
    if n > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        documents["model.safetensors.index.json"] = index
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _cast(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # the error below names the tensor
        cast = tensor.astype(DTYPES[dtype], order="C", copy=False)
    too_large = np.isinf(cast) & np.isfinite(tensor)
    if too_large.any():
        largest = np.abs(tensor[too_large]).max()
        raise UserError(f"--dtype={dtype}: {name} holds {largest:g}, which {dtype} cannot; use --dtype=bfloat16 or float32")
    return cast


# -- reading a folder ---------------------------------------------------------------------------------------------------


def load_model(path: str | Path) -> Model:
    """The architecture of a Hugging Face folder, or of a file beside its config.json. Raises UserError."""
    return from_hf_config(_read_config(Path(path)), str(path))


def open_folder(path: str | Path) -> tuple[Tensors, Model]:
    """(tensors, model) of a Hugging Face folder, or of a file beside its config.json; a tensor is read when it is asked for.

    Tied embeddings become two equal tables. Raises UserError.
    """
    path = Path(path)
    model, tensors = load_model(path), tensor_files.read(path)
    if _read_config(path).get("tie_word_embeddings"):
        tensors = _untie(tensors, model, str(path))
    return tensors, model


def load_folder(path: str | Path, allow_non_finite: bool = False) -> tuple[dict, Model]:
    """(parameters as fp32 numpy arrays in a nested dict, model) of what `open_folder` opens. Raises UserError."""
    tensors, model = open_folder(path)
    return from_hf(tensors, model, str(path), allow_non_finite), model


def _read_config(path: Path) -> dict:
    described = (path.parent if path.is_file() else path) / "config.json"
    if not path.is_dir() and not path.is_file():
        raise UserError(f"{path}: is neither a file nor a folder" if path.exists() else f"{path}: no such folder")
    if not described.is_file():
        raise UserError(f"{described}: no such file; it describes the model")
    return files.read_json(described, dict, largest=LARGEST_CONFIG)


def describes(folder: Path) -> bool:
    """Whether `folder` is a Hugging Face folder: its config.json has a model_type."""
    return (folder / "config.json").is_file() and "model_type" in _read_config(folder)


def _untie(tensors: Tensors, model: Model, origin: str) -> Tensors:
    head, embedding = NAMES["lm_head/kernel"], NAMES["embed/embedding"]
    both = {name: shapes(model)[name] for name in (head, embedding)}
    if set(both) <= set(tensors):
        tensor_files.check({name: tensors[name] for name in both}, both, origin)
        if not np.array_equal(*(np.asarray(tensors[name], np.float32) for name in both), equal_nan=True):
            raise UserError(f"{origin}: tie_word_embeddings is true, but {head} and {embedding} differ")
    print(f"{origin}: its embedding is also its head (tie_word_embeddings); here they become two tables, and train apart")
    return ChainMap({head: tensors[embedding]}, tensors) if embedding in tensors else tensors
