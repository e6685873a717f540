"""Checkpoints of the original's trainer (lit-gpt .pth): weights, AdamW's moments and the step.

Its attention weight holds query, key and value rows group by group: the N/K query heads of a group, its key, its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllama_jax import hf
from tinyllama_jax.config import Model
from tinyllama_jax.errors import UserError

# lit-gpt's name -> Hugging Face's; the fused "transformer.h.{}.attn.attn.weight" stands for three and is not among them
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


class Checkpoint(NamedTuple):
    """What a .pth holds: parameters as `hf.from_hf` gives them, AdamW's two moments likewise (or None), optimizer steps."""

    params: dict
    moments: tuple[dict, dict] | None
    step: int


def _names(model: Model) -> dict[str, str]:
    """lit-gpt's name -> Hugging Face's, of all tensors but the fused ones."""
    layers = [range(model.n_layers) if "{}" in name else [0] for name in NAMES]
    return {a.format(i): b.format(i) for (a, b), which in zip(NAMES.items(), layers, strict=True) for i in which}


def to_hf(tensors: Mapping[str, np.ndarray], model: Model, origin: str) -> dict[str, np.ndarray]:
    """The same tensors under Hugging Face's names, as views. Raises UserError for an unknown, missing or misshapen one."""
    names, shapes = _names(model), hf.shapes(model)
    hf.check_names(tensors, [*names, *(FUSED.format(i) for i in range(model.n_layers))], origin)
    out = {theirs: hf.fetch(tensors, name, shapes[theirs], origin) for name, theirs in names.items()}
    heads = model.n_heads // model.n_kv_heads
    for i in range(model.n_layers):
        rows = (model.n_heads + 2 * model.n_kv_heads) * model.d_head
        fused = hf.fetch(tensors, FUSED.format(i), (rows, model.d_model), origin)
        groups = fused.reshape(model.n_kv_heads, heads + 2, model.d_head, model.d_model)
        for name, part in {"q": groups[:, :heads], "k": groups[:, heads], "v": groups[:, heads + 1]}.items():
            out[f"model.layers.{i}.self_attn.{name}_proj.weight"] = part.reshape(-1, model.d_model)
    return out


def read(path: Path, model: Model) -> Checkpoint:
    """Reads {"model": weights, "optimizer": ..., "step_count": ...}, or weights alone. Raises UserError."""
    held = hf.read_pickle(path)
    weights = held.get("model", held) if isinstance(held, dict) else None
    params, moments, step = _tree(weights, model, str(path)), None, 0
    if held.get("optimizer", {}).get("state"):
        *both, step = _adam(held["optimizer"], list(weights), str(path))
        moments = tuple(_tree(moment, model, f"{path}, {name}") for name, moment in zip(_MOMENTS, both, strict=True))
        if held.get("step_count", step) != step:
            raise UserError(f"{path}: step_count is {held['step_count']}, but AdamW has made {step} steps")
    return Checkpoint(params, moments, held.get("step_count", step))


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _tree(tensors: object, model: Model, origin: str) -> dict:
    return hf.from_hf(to_hf(hf.to_arrays(tensors, origin), model, origin), model, origin)


def _adam(optimizer: dict, names: list[str], origin: str) -> tuple[dict, dict, int]:
    """(first moments by parameter, second moments by parameter, steps made).

    FSDP's full state names the parameters; plain PyTorch numbers them, in the order in which the model lists its own.
    """
    state = optimizer["state"]
    numbers = [key for group in optimizer["param_groups"] for key in group["params"]]
    if all(isinstance(key, int) for key in state):
        if len(numbers) != len(names):
            raise UserError(f"{origin}: AdamW knows {len(numbers)} parameters, but the model has {len(names)}")
        state = {name: state[number] for number, name in zip(numbers, names, strict=True) if number in state}
    try:
        steps = sorted({int(entry["step"]) for entry in state.values()})
        first, second = ({name: entry[moment] for name, entry in state.items()} for moment in _MOMENTS)
    except KeyError as error:
        raise UserError(f"{origin}: the optimizer has no {error} for every parameter; only AdamW's state can be read") from None
    if len(steps) > 1:
        raise UserError(f"{origin}: AdamW's parameters are not at the same step: {steps}")
    return first, second, steps[0]
