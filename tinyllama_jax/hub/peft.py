"""Adapter folders of Hugging Face's PEFT: writes the adapters of a run, and reads a folder merged into its base model.

A folder holds adapter_config.json and adapter_model.safetensors. For a matrix [out, in] the file has lora_A [r, in] and lora_B
[out, r], and the model computes with W + scale x B A.
"""

import json
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from tinyllama_jax.base import dims, files
from tinyllama_jax.base.config import Lora, Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.hub import llama, tensor_files
from tinyllama_jax.hub.tensor_files import Tensors

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# settings that we cannot compute, each with the values that leave it off
_PLAIN = {"bias": ("none", None), "use_dora": (False, None), "fan_in_fan_out": (False, None), "modules_to_save": (None, []),
          "rank_pattern": (None, {}), "alpha_pattern": (None, {}), "trainable_token_indices": (None,),
          "layer_replication": (None,), "alora_invocation_tokens": (None,)}  # fmt: skip


class _Config(typing.TypedDict):
    peft_type: str
    r: files.Size
    lora_alpha: float
    base_model_name_or_path: typing.NotRequired[str | None]
    use_rslora: typing.NotRequired[bool]


# -- writing ------------------------------------------------------------------------------------------------------------


def save_folder(params: dict, model: Model, lora: Lora, base: str, folder: Path) -> None:
    """Writes the adapters among `params` (the arrays of `dims.arrays`) into `folder`. `base`: the folder of the base model."""
    tensors = {}
    for p in dims.PARAMETERS:
        name = p.name.split("/")[1]
        if not p.name.startswith("layers/") or not p.fan_in or name not in lora.names:
            continue
        a, b = (np.asarray(params["layers"][name][key]) for key in ("lora_a", "lora_b"))
        for layer in range(model.n_layers):
            key = PREFIX + llama.NAMES[p.name].format(layer).removesuffix(".weight")
            tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(a[layer].reshape(-1, lora.rank).T)
            tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(b[layer].reshape(lora.rank, -1).T)
    tensor_files.write(folder / WEIGHTS, tensors)
    modules = [llama.NAMES[f"layers/{name}/kernel"].split(".")[-2] for name in lora.names]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": lora.rank,
              "lora_alpha": lora.alpha, "lora_dropout": 0.0, "target_modules": modules, "bias": "none",
              "fan_in_fan_out": False, "inference_mode": True}  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


# -- reading: functions as in `llama`, which also take an adapter folder -----------------------------------------------


def load_model(path: str | Path) -> Model:
    """The architecture of a Hugging Face folder, or of an adapter's base. Raises UserError."""
    return llama.load_model(base_of(path))


def load_folder(path: str | Path, allow_non_finite: bool = False) -> tuple[dict, Model]:
    """(parameters as fp32 numpy arrays in a nested dict, model) of what `open_folder` opens. Raises UserError."""
    tensors, model = open_folder(path)
    return llama.from_hf(tensors, model, str(path), allow_non_finite), model


def open_folder(path: str | Path) -> tuple[Tensors, Model]:
    """(tensors, model) of a Hugging Face folder; an adapter folder's are merged, each when it is read. Raises UserError."""
    if (base := base_of(path)) == Path(path):
        return llama.open_folder(path)
    tensors, model = llama.open_folder(base)
    config = _read_config(Path(path))
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    return _Merged(tensors, _pairs(Path(path), model, config["r"]), scale), model


def base_of(path: str | Path) -> Path:
    """The folder of the base model of an adapter folder; `path` itself if it is none. Raises UserError if it is missing."""
    path = Path(path)
    if not (path / CONFIG).is_file():
        return path
    name = _read_config(path).get("base_model_name_or_path") or ""
    base = Path(name) if Path(name).is_absolute() else path / name
    if not name or not (base / "config.json").is_file() or not llama.describes(base):
        shown = tensor_files.shown(name) if name else "(none)"
        what = f"names the base model {shown}, which is no Hugging Face folder on this machine"
        remedy = "write the folder of the base model (for a run: convert --format hf) into base_model_name_or_path"
        raise UserError(f"{path / CONFIG}: {what}; {remedy}")
    return base


def with_tokenizer(path: str | Path) -> Path:
    """The folder that holds the tokenizer of `path`: an adapter folder itself, if it has one, or that of its base."""
    own = any((Path(path) / f"tokenizer.{end}").is_file() for end in ("model", "json"))
    return Path(path) if own else base_of(path)


def _read_config(path: Path) -> _Config:
    raw = files.read_json(path / CONFIG, dict, largest=llama.LARGEST_CONFIG)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path / CONFIG}: peft_type is {raw.get('peft_type')!r:.200}; only 'LORA' can be read")
    for key, plain in _PLAIN.items():
        if key in raw and raw[key] not in plain:
            raise UserError(f"{path / CONFIG}: {key} is {raw[key]!r:.200}, which is not computed (only {plain[0]!r})")
    return files.read_json(path / CONFIG, _Config, largest=llama.LARGEST_CONFIG)


def _pairs(path: Path, model: Model, rank: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name of a weight -> its (A, B), fp32. Raises UserError for a tensor that is missing, unknown or of another shape."""
    tensors, shapes = tensor_files.read(path / WEIGHTS), llama.shapes(model)
    matrices = {n: llama.shapes(model)[n] for n in shapes if n.startswith("model.layers.") and "norm" not in n}
    weight_of = lambda name: re.sub(r"\.lora_[AB]\.weight$", ".weight", name.removeprefix(PREFIX))
    adapted = [name for name in matrices if name in set(map(weight_of, tensors))]
    expected = {}
    for name in adapted:
        key = PREFIX + name.removesuffix(".weight")
        expected |= {f"{key}.lora_A.weight": (rank, matrices[name][1]), f"{key}.lora_B.weight": (matrices[name][0], rank)}
    origin = str(path / WEIGHTS)
    if not expected:
        raise UserError(f"{origin}: holds no adapter of a matrix of the model in {base_of(path)}")
    tensor_files.check(tensors, expected, origin)
    of = lambda name: np.asarray(tensors[name]).astype(np.float32)
    keys = {name: PREFIX + name.removesuffix(".weight") for name in adapted}
    return {name: (of(f"{key}.lora_A.weight"), of(f"{key}.lora_B.weight")) for name, key in keys.items()}


class _Merged(Mapping):
    """Tensors of a base model, with W + scale x B A in place of each W that has an adapter."""

    def __init__(self, base: Tensors, pairs: dict[str, tuple[np.ndarray, np.ndarray]], scale: float):
        self._base, self._pairs, self._scale = base, pairs, scale

    def __getitem__(self, name: str) -> object:
        return _Sum(self._base[name], *self._pairs[name], self._scale) if name in self._pairs else self._base[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


class _Sum:
    """W + scale x B A, fp32; `np.asarray` computes it."""

    dtype = np.dtype(np.float32)

    def __init__(self, base: object, a: np.ndarray, b: np.ndarray, scale: float):
        self._base, self._a, self._b, self._scale, self.shape = base, a, b, np.float32(scale), tuple(base.shape)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._base).astype(np.float32) + self._scale * (self._b @ self._a)
