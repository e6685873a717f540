"""The keys of a GGUF file that describe a Llama's architecture: written from a `Model`, read as a config.json.

| Hugging Face                      | GGUF                                                                          |
|-----------------------------------|-------------------------------------------------------------------------------|
| a length before linear scaling    | `context_length`, the length after it: llama.cpp takes it for its context     |
| RoPE of Llama 3 as four numbers   | the tensor `rope_freqs.weight`, by which each frequency is divided            |
| YaRN's attention factor           | `attn_factor`, which multiplies the usual one, 0.1 ln(factor) + 1             |
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from tinyllama_jax.base.config import Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.hub import llama


def described(model: Model, name: str, file_type: int) -> dict[str, object]:
    """The keys that describe the architecture. `file_type`: llama.cpp's number. Raises UserError."""
    config = llama.to_hf_config(model, None, None, "float32")
    rope = config["rope_scaling"] or {}
    kind, head = rope.get("rope_type", rope.get("type", "default")), config["head_dim"]
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UserError(f"RoPE is of type {kind!r}, which is not written to GGUF")
    scaling = {"type": kind, "factor": float(rope["factor"])} if kind in ("linear", "yarn") else {}
    if kind == "yarn":
        scaling |= _yarn(rope)
    own_width = {"attention.key_length": head, "attention.value_length": head}
    keys = {
        "vocab_size": model.vocab_size,
        "context_length": model.seq_len,
        "embedding_length": model.d_model,
        "block_count": model.n_layers,
        "feed_forward_length": model.d_ff,
        "attention.head_count": model.n_heads,
        "attention.head_count_kv": model.n_kv_heads,
        **(own_width if head * model.n_heads != model.d_model else {}),
        "attention.layer_norm_rms_epsilon": float(model.norm_eps),
        "rope.dimension_count": head,
        "rope.freq_base": float(config["rope_theta"]),
        **{f"rope.scaling.{key}": value for key, value in scaling.items()},
    }
    general = {"type": "model", "name": name, "file_type": file_type, "quantization_version": 2}
    return {f"general.{k}": v for k, v in general.items()} | {f"llama.{k}": v for k, v in keys.items()}


def _yarn(rope: dict) -> dict[str, object]:
    """The keys of YaRN besides type and factor. For a Llama, llama.cpp reads neither `yarn_beta_fast` nor `yarn_beta_slow`."""
    for name, only in (("truncate", True), ("beta_fast", 32), ("beta_slow", 1)):
        if rope.get(name, only) != only:
            what = f"has {name}={rope[name]}, and llama.cpp computes only {only}"
            raise UserError(f"model.rope_type: {what}; so no GGUF of it is written")
    mscale = lambda times: 0.1 * times * math.log(rope["factor"]) + 1
    both = rope.get("mscale") and rope.get("mscale_all_dim")
    ratio = mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"]) if both else mscale(1)
    attention = (rope.get("attention_factor") or ratio) / mscale(1)  # llama.cpp multiplies by mscale(1) itself
    scaled = {"attn_factor": attention} if not math.isclose(attention, 1) else {}
    return {"original_context_length": rope["original_max_position_embeddings"], **scaled}


def factors_of(config: dict, head: int) -> np.ndarray | None:
    """The divisors [H / 2] of RoPE's frequencies in Llama 3's scaling; None for other types. Source: Transformers."""
    rope = config.get("rope_scaling") or {}
    if rope.get("rope_type") != "llama3":
        return None
    turns = rope["original_max_position_embeddings"] * config["rope_theta"] ** (-np.arange(0, head, 2) / head) / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


# config.json's key -> GGUF's, after "llama."; those of the second group may be absent
_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "seq_len": "context_length",
}
_OPTIONAL = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
}


def config(metadata: Mapping[str, object], vocab_size: int, factors: np.ndarray | None, origin: str) -> dict:
    """The contents of Hugging Face's config.json for the model. `factors`: the tensor rope_freqs.weight. Raises UserError."""
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise UserError(f"{origin}: general.architecture is {architecture!r:.200}; only 'llama' can be read")
    get = lambda key, default=None: metadata.get(f"llama.{key}", default)
    for key in _KEYS.values():
        if get(key) is None:
            raise UserError(f"{origin}: its metadata lack llama.{key}")
    if get("expert_count", 0) != 0:
        raise UserError(f"{origin}: is a mixture of {get('expert_count')} experts, which this model does not compute")
    described = {hf: get(key) for hf, key in (_KEYS | _OPTIONAL).items() if get(key) is not None}
    described |= {key: f"an array of {len(v)}" for key, v in described.items() if isinstance(v, (list, np.ndarray))}
    described |= {"model_type": "llama", "vocab_size": vocab_size}
    try:
        head = described.get("head_dim") or described["hidden_size"] // described["num_attention_heads"]
        differ = {get("attention.value_length", head), get("rope.dimension_count", head), head} - {head}
        rope, length = _rope(get, factors, described, head, origin), described["seq_len"]
        described["max_position_embeddings"] = max(int(length / rope["factor"]), 1) if rope.get("type") == "linear" else length
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{origin}: a number in its metadata is of a wrong type or size ({error})") from None
    if differ:
        what = f"{head} numbers per head, but attention.value_length or rope.dimension_count is {next(iter(differ))}"
        raise UserError(f"{origin}: has {what}; only equal ones are computed")
    return described | ({"rope_scaling": rope} if rope else {})


def _rope(get: Callable, factors: np.ndarray | None, config: dict, head: int, origin: str) -> dict:
    """`rope_scaling` of config.json; {} if nothing is scaled."""
    kind, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor", 1.0)
    if (older := get("rope.scale_linear", 1.0)) != 1:  # in files from before October 2023
        kind, factor = "linear", older
    if factors is not None:
        if kind != "none":
            raise UserError(f"{origin}: has both rope_freqs.weight and rope.scaling.type={kind!r:.100}, which is not computed")
        return _llama3(factors, config, head, origin)
    if kind == "none" or (kind == "linear" and factor == 1):
        return {}
    if kind != "yarn":
        return {"type": kind, "rope_type": kind, "factor": factor}
    rope = {"rope_type": kind, "factor": factor}
    rope["original_max_position_embeddings"] = get("rope.scaling.original_context_length", config["seq_len"])
    rope |= {key: get(f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow") if get(f"rope.scaling.yarn_{key}")}
    if (attention := get("rope.scaling.attn_factor", 1.0)) != 1:
        rope["attention_factor"] = float(f"{attention * (0.1 * math.log(factor) + 1):.7g}")
    return rope


def _llama3(factors: np.ndarray, config: dict, head: int, origin: str) -> dict:
    """The four numbers of Llama 3's RoPE that give `factors`.

    1 / factor is linear in a frequency's turns over the old length, between two bounds. The old length and the bounds can be
    scaled together: the lower one is taken as 1, as in all published models, and the higher as 4 if one frequency is between.
    """
    theta, top = config.get("rope_theta", 10_000.0), float(factors.max())
    between = (factors > 1) & (factors < top) & (factors.shape == (head // 2,))
    rope = {"rope_type": "llama3", "factor": top, "low_freq_factor": 1.0}
    if between.any() and top > 1:
        smooth = (1 / factors[between] - 1 / top) / (1 - 1 / top)  # old * turns / (high - 1) - 1 / (high - 1)
        turns = (theta ** (-np.arange(0, head, 2) / head) / (2 * np.pi))[between]  # of a head's pair in one position
        slope, start = np.polyfit(turns, smooth, 1) if turns.size > 1 else ((smooth[0] + 1 / 3) / turns[0], -1 / 3)
        rope["high_freq_factor"] = float(np.round(1 - 1 / start, 3))
        rope["original_max_position_embeddings"] = round(slope * (rope["high_freq_factor"] - 1))
        again = factors_of({"rope_scaling": rope, "rope_theta": theta}, head)
        if np.allclose(again, factors, rtol=1e-5):
            return rope
    raise UserError(f"{origin}: rope_freqs.weight is not of Llama 3's form, and no other is computed")
