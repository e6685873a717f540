"""Checkpoints of the original's trainer (lit-gpt .pth): weights, AdamW's moments and the step.

Its attention weight has the rows of queries, keys and values group by group: N/K query heads, one key head, one value head.
"""

import typing
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tinyllama_jax.base import files
from tinyllama_jax.base.config import Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.hub import llama, tensor_files

# lit-gpt's name -> Hugging Face's, except for the fused weight, which is three of Hugging Face's
NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.h.{}.norm_1.weight": "model.layers.{}.input_layernorm.weight",
    "transformer.h.{}.attn.proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "transformer.h.{}.norm_2.weight": "model.layers.{}.post_attention_layernorm.weight",
    "transformer.h.{}.mlp.swiglu.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "transformer.h.{}.mlp.swiglu.w2.weight": "model.layers.{}.mlp.up_proj.weight",
    "transformer.h.{}.mlp.swiglu.w3.weight": "model.layers.{}.mlp.down_proj.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
FUSED = "transformer.h.{}.attn.attn.weight"


class Checkpoint(typing.NamedTuple):
    """Contents of a .pth: parameters as `llama.from_hf` returns them, AdamW's two moments (or None), optimizer steps."""

    params: dict
    moments: tuple[dict, dict] | None
    step: int


def _names(model: Model) -> dict[str, str]:
    """lit-gpt's name -> Hugging Face's, for all tensors but the fused ones."""
    layers = [range(model.n_layers) if "{}" in name else [0] for name in NAMES]
    return {a.format(i): b.format(i) for (a, b), which in zip(NAMES.items(), layers, strict=True) for i in which}


def to_hf(
    tensors: Mapping[str, np.ndarray], model: Model, origin: str, allow_non_finite: bool = False
) -> dict[str, np.ndarray]:
    """The same tensors under Hugging Face's names, as views. Raises UserError as `llama.from_hf` does."""
    names, shapes = _names(model), llama.shapes(model)
    rows = (model.n_heads + 2 * model.n_kv_heads) * model.d_head
    fused = {FUSED.format(i): (rows, model.d_model) for i in range(model.n_layers)}
    tensor_files.check(tensors, {name: shapes[hf] for name, hf in names.items()} | fused, origin)
    for name in () if allow_non_finite else tensors:
        tensor_files.check_finite(name, tensors[name], origin)
    out = {hf: tensors[name] for name, hf in names.items()}
    heads = model.n_heads // model.n_kv_heads
    for i in range(model.n_layers):
        groups = tensors[FUSED.format(i)].reshape(model.n_kv_heads, heads + 2, model.d_head, model.d_model)
        for name, part in {"q": groups[:, :heads], "k": groups[:, heads], "v": groups[:, heads + 1]}.items():
            out[f"model.layers.{i}.self_attn.{name}_proj.weight"] = part.reshape(-1, model.d_model)
    return out


class _Optimizer(typing.TypedDict, total=False):
    state: dict[int | str, dict[str, object]]
    param_groups: list[dict[str, object]]


class _Content(typing.TypedDict, total=False):
    optimizer: _Optimizer | None
    step_count: files.Count


def read(path: Path, model: Model, allow_non_finite: bool = False) -> Checkpoint:
    """Reads {"model": weights, "optimizer": ..., "step_count": ...}, or weights alone. Raises UserError."""
    content = tensor_files.read_pickle(path)
    weights = content.get("model", content) if isinstance(content, dict) else content
    weights = tensor_files.to_arrays(weights, str(path))
    params, moments = _tree(weights, model, str(path), allow_non_finite), None
    try:
        content = files.typed(content, _Content) if "model" in content else {}
        step, optimizer = content.get("step_count", 0), content.get("optimizer") or {}
        *both, step = _adam(optimizer, list(weights), str(path)) if optimizer.get("state") else (step,)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if both:
        origins = [f"{path}, {name}" for name in _MOMENTS]
        both = [tensor_files.to_arrays(moment, origin) for moment, origin in zip(both, origins, strict=True)]
        for name, second in both[1].items():
            if (second < 0).any():
                raise UserError(f"{origins[1]}: {name} is negative in places, and a mean of squares is not")
        moments = tuple(_tree(moment, model, origin, allow_non_finite) for moment, origin in zip(both, origins, strict=True))
        if content.get("step_count", step) != step:
            raise UserError(f"{path}: step_count is {content['step_count']}, but AdamW has made {step} steps")
    if step >= 2**31:
        raise UserError(f"{path}: is at step {step:,}; steps are counted up to 2^31 - 1")
    return Checkpoint(params, moments, step)


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _tree(tensors: Mapping[str, np.ndarray], model: Model, origin: str, allow_non_finite: bool = False) -> dict:
    return llama.from_hf(to_hf(tensors, model, origin, allow_non_finite), model, origin, allow_non_finite=True)


def _adam(optimizer: _Optimizer, names: list[str], origin: str) -> tuple[dict, dict, int]:
    """(first moments by parameter, second moments by parameter, steps made).

    FSDP's full state names the parameters; plain PyTorch numbers them in the model's order.
    """
    state = optimizer["state"]
    numbers = [key for group in optimizer.get("param_groups", []) for key in files.typed(group.get("params"), list[int | str])]
    if all(isinstance(key, int) for key in state):
        if len(numbers) != len(names):
            raise UserError(f"{origin}: AdamW knows {len(numbers)} parameters, but the model has {len(names)}")
        if len(set(numbers)) < len(numbers) or not set(state) <= set(numbers):
            raise UserError(f"{origin}: AdamW's param_groups have a parameter twice, or its state has one that they do not")
        state = {name: state[number] for number, name in zip(numbers, names, strict=True) if number in state}
    elif all(isinstance(key, str) for key in state):
        state = {tensor_files.WRAPPERS.sub("", name): entry for name, entry in state.items()}
    try:
        steps = sorted({_whole(entry["step"], f"{origin}: AdamW's step of {name}") for name, entry in state.items()})
        first, second = ({name: entry[moment] for name, entry in state.items()} for moment in _MOMENTS)
    except KeyError as error:
        raise UserError(f"{origin}: the optimizer has no {error} for every parameter; only AdamW's state can be read") from None
    if len(steps) > 1:
        raise UserError(f"{origin}: AdamW's parameters are not at the same step: {steps}")
    return first, second, steps[0]


def _whole(step: object, what: str) -> int:
    """PyTorch's step, a number or a tensor with one, as int. Raises UserError if it is not a whole number from 0 up."""
    if hasattr(step, "detach"):
        unfit = tensor_files.unfit("step", step) or (None if step.numel() == 1 else f"has the shape {list(step.shape)}")
        if unfit:
            raise UserError(f"{what} {unfit}, and should be one number")
        step = step.item()
    if type(step) not in (int, float) or not 0 <= step < 2**31 or step != int(step):
        raise UserError(f"{what} is {step!r:.60}, and should be a whole number from 0 up")
    return int(step)
