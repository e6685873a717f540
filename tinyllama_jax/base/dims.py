"""The alphabet of dimensions (B S L D N K H F V) and the table of all parameters.

| letter | dimension          | | letter | dimension             |
|--------|--------------------|-|--------|-----------------------|
| B      | batch (sequences)  | | K      | key/value heads       |
| S      | sequence positions | | H      | width of one head     |
| L      | layers             | | F      | feed-forward width    |
| D      | model width        | | V      | vocabulary            |
| N      | query heads        | |        |                       |

The same letters stand in variable suffixes (`q_BSNH`), einsum strings, this table, the sharding rules and kernel shapes.
"""

import math
from typing import NamedTuple

# What a block of data has for each of its S + 1 tokens besides the token, by the kind of the data: field -> dtype.
# marks: LEARNED and FIRST, added up. reference: the log-probability of the token under DPO's reference model; 0 if not learned
EXTRAS = {"text": {}, "chat": {"marks": "uint8"}, "preferences": {"marks": "uint8", "reference": "float32"}}
LEARNED, FIRST = 1, 2  # the token is one to predict; it is the first of a conversation, before which attention does not look


class Parameter(NamedTuple):
    """One tensor of the model. `name`: its path in the parameter tree. A leading `L` in `dims`: the scan over layers."""

    name: str
    dims: str
    kind: str  # "norm": starts at one; "matrix", "residual" (a matrix that writes to the residual stream): random
    fan_in: str = ""  # the contracted letters, which set the standard deviation at initialisation


PARAMETERS = (
    Parameter("embed/embedding", "VD", "matrix"),
    Parameter("layers/attention_norm/scale", "LD", "norm"),
    Parameter("layers/q/kernel", "LDNH", "matrix", "D"),
    Parameter("layers/k/kernel", "LDKH", "matrix", "D"),
    Parameter("layers/v/kernel", "LDKH", "matrix", "D"),
    Parameter("layers/o/kernel", "LNHD", "residual", "NH"),
    Parameter("layers/mlp_norm/scale", "LD", "norm"),
    Parameter("layers/gate/kernel", "LDF", "matrix", "D"),
    Parameter("layers/up/kernel", "LDF", "matrix", "D"),
    Parameter("layers/down/kernel", "LFD", "residual", "F"),
    Parameter("final_norm/scale", "D", "norm"),
    Parameter("lm_head/kernel", "DV", "matrix", "D"),
)
BY_NAME = {p.name: p for p in PARAMETERS}


def sizes(model) -> dict[str, int]:
    """Letter -> size for a `config.Model` (all letters but B)."""
    return {
        "S": model.seq_len,
        "L": model.n_layers,
        "D": model.d_model,
        "N": model.n_heads,
        "K": model.n_kv_heads,
        "H": model.d_head,
        "F": model.d_ff,
        "V": model.vocab_size,
    }


def shape(parameter: Parameter, model) -> tuple[int, ...]:
    """Shape of the whole tensor, layers included."""
    size = sizes(model)
    return tuple(size[letter] for letter in parameter.dims)


def matrix(parameter: Parameter, model) -> tuple[int, int]:
    """(inputs, outputs) of one layer's matrix, heads joined."""
    size = sizes(model)
    letters = parameter.dims.removeprefix("L")
    n = len(parameter.fan_in)
    return math.prod(size[x] for x in letters[:n]), math.prod(size[x] for x in letters[n:])


def n_elements(parameter: Parameter, model) -> int:
    """Number of elements of one tensor, layers included."""
    return math.prod(shape(parameter, model))


class Array(NamedTuple):
    """One array of the weights as a run keeps them. A letter of `dims` may be "R", the rank, or "." (in no alphabet)."""

    name: str
    dims: str
    shape: tuple[int, ...]
    dtype: str
    trains: bool


def arrays(model, lora) -> list[Array]:
    """The arrays of the weights: with `lora.rank` 0 the `PARAMETERS`, otherwise the frozen ones and the adapters."""
    out, frozen = [], lora.rank > 0
    for p in PARAMETERS:
        whole, n = shape(p, model), 1 + len(p.fan_in)  # n: the leading dimensions of a layer's matrix, L and its inputs
        in_layer = p.dims.startswith("L") and bool(p.fan_in)
        if in_layer and lora.base == "nf4":  # see kernels/nf4.py
            blocks = math.prod(whole[1:]) // 64
            out += [
                Array(f"{p.name}/codes", p.dims, (*whole[: n - 1], whole[n - 1] // 2, *whole[n:]), "uint8", False),
                Array(f"{p.name}/scale", "L.", (whole[0], blocks), "uint8", False),
                Array(f"{p.name}/scale_scale", "L.", (whole[0], -(-blocks // 256)), "float32", False),
                Array(f"{p.name}/scale_mean", "L", whole[:1], "float32", False),
            ]
        else:
            out.append(Array(p.name, p.dims, whole, "bfloat16" if lora.base and p.kind != "norm" else "float32", not frozen))
        if in_layer and frozen and (name := p.name.split("/")[1]) in lora.names:
            out.append(Array(f"layers/{name}/lora_a", f"{p.dims[:n]}R", (*whole[:n], lora.rank), "float32", True))
            out.append(Array(f"layers/{name}/lora_b", f"LR{p.dims[n:]}", (whole[0], lora.rank, *whole[n:]), "float32", True))
    return out


def n_parameters(model) -> int:
    """Number of parameters: 1,100,048,384 for the 1.1B model."""
    return sum(n_elements(p, model) for p in PARAMETERS)


def flops_per_token(model) -> dict[str, float]:
    """FLOPs of forward and backward per token under the four conventions for MFU, which are often quoted without their name.

    6 N for the matmuls and 12 L N H S for attention's two; N with or without the embedding lookup (no multiplication),
    attention with or without the half that the causal mask removes. 7.708, 7.314, 7.154 and 6.760 GFLOP for the 1.1B.
    """
    everything = n_parameters(model)
    matmul = sum(n_elements(p, model) for p in PARAMETERS if p.fan_in)
    attention = 12 * model.n_layers * model.n_heads * model.d_head * model.seq_len
    return {
        "palm": 6 * everything + attention,  # TinyLlama's and lit-gpt's estimator, llm-foundry
        "matmul": 6 * matmul + attention,  # nanoGPT, nanochat; what TinyLlama's 56% is close to
        "palm_causal": 6 * everything + attention / 2,  # llm.c
        "matmul_causal": 6 * matmul + attention / 2,  # MaxText
    }


def init_std(parameter: Parameter, model) -> float:
    """Standard deviation at initialisation under the scheme `model.init`.

    "tinyllama": the original's HEAD (lit_gpt/model.py:40-54): N(0, sqrt(2/(5 D))), and N(0, 1/(sqrt(D) L)) for the two
    matrices that write to the residual stream. "torch_default": what the 2023 run most likely started from, since its own
    init never reached the sharded weights (reference: litgpt #1131): embedding N(0, 1), every other matrix uniform in
    +-1/sqrt(fan_in), which has this standard deviation.
    """
    size = sizes(model)
    if model.init == "torch_default":
        return 1 / math.sqrt(3 * math.prod(size[x] for x in parameter.fan_in)) if parameter.fan_in else 1.0
    if parameter.kind == "residual":
        return 1 / (math.sqrt(size["D"]) * size["L"])
    return math.sqrt(2 / (5 * size["D"]))
