"""RoPE: its types of scaling, the string that names one in a config, and its frequencies."""

import math

from tinyllama_jax.base.values import LIMITS, check, check_one_of

KEY, LENGTH = "model.rope_type", "original_max_position_embeddings"
# Type -> its numbers besides the factor (model.rope_scaling), with their defaults. `...`: must be given. None: not set.
TYPES = {
    "linear": {},  # every frequency divided by the factor
    "ntk": {},  # theta x factor^(H / (H - 2)): the lowest frequency divided by the factor, the highest left as it is
    "llama3": {"low_freq_factor": ..., "high_freq_factor": ..., LENGTH: ...},
    "yarn": {
        LENGTH: ...,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": None,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    },
}


def parse(text: str) -> tuple[str, dict]:
    """(type, all its numbers by name) of a string such as "yarn,original_max_position_embeddings=2048". Raises UserError."""
    kind, *parts = text.replace(" ", "").split(",")
    remedy = "its frequencies depend on the text's length, so cached keys would be wrong; use ntk or yarn"
    check(kind != "dynamic", KEY, text, remedy)
    check_one_of(KEY, kind, tuple(TYPES))
    pairs = [part.partition("=")[::2] for part in parts]
    names = f"{', '.join(TYPES[kind]) or 'none'}; the factor is --model.rope_scaling"
    for name, _ in pairs:
        check(name in TYPES[kind], KEY, text, f"{kind} has no number {name!r}, only {names}")
        check([key for key, _ in pairs].count(name) == 1, KEY, text, f"names {name} twice")
    numbers = TYPES[kind] | {name: _number(name, value, text) for name, value in pairs}
    missing = [name for name, number in numbers.items() if number is ...]
    check(not missing, KEY, text, f"{kind} needs {', '.join(missing)}, as in {kind},{','.join(n + '=NUMBER' for n in missing)}")
    return kind, numbers


def _number(name: str, value: str, text: str) -> float | int | bool:
    if name == "truncate":
        check(value in ("true", "false"), KEY, text, f"{name} must be true or false")
        return value == "true"
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    whole = name == LENGTH
    fits = 1e-6 <= number <= 2**30 and (not whole or number.is_integer())
    check(fits, KEY, text, f"{name} must be a {'whole' if whole else 'positive'} number of at most 2^30")
    return int(number) if whole else number


def text_of(kind: str, numbers: dict) -> str:
    """The shortest string for these numbers: in the order of TYPES, without defaults."""
    written = [(name, numbers.get(name)) for name, default in TYPES.get(kind, {}).items() if numbers.get(name) != default]
    return ",".join([kind, *(f"{name}={str(n).lower().removesuffix('.0')}" for name, n in written if n is not None)])


def checked(model) -> str:
    """`model.rope_type` in its shortest form. Raises UserError for a type, number or width of heads that is impossible."""
    kind, n = parse(model.rope_type)
    key = "model.head_dim" if model.head_dim else "model.n_heads"
    value = model.head_dim or model.n_heads
    check(model.d_head % 2 == 0, key, value, f"gives heads of odd width {model.d_head}; RoPE needs pairs")
    scaled = kind == "linear" or model.rope_scaling > 1
    check(scaled, "model.rope_scaling", model.rope_scaling, f"must be more than 1 for --{KEY}={kind}: 1 scales nothing")
    if kind == "llama3":
        rising = n["low_freq_factor"] < n["high_freq_factor"]
        check(rising, KEY, model.rope_type, "low_freq_factor must be less than high_freq_factor")
    elif kind == "yarn":
        check(n["beta_slow"] <= n["beta_fast"], KEY, model.rope_type, "beta_slow must be at most beta_fast")
        check(model.rope_theta > 1, "model.rope_theta", model.rope_theta, "must be more than 1: yarn divides by its logarithm")
    elif kind == "ntk":
        check(model.d_head > 2, KEY, kind, "needs heads wider than 2")
        most = LIMITS["model.rope_theta"][1]
        check(theta(model) <= most, "model.rope_scaling", model.rope_scaling, f"makes theta {theta(model):g}; at most {most:g}")
    return text_of(kind, n)


def theta(model) -> float:
    """The base of the frequencies: `model.rope_theta`, raised by the type ntk."""
    if parse(model.rope_type)[0] != "ntk":
        return model.rope_theta
    return model.rope_theta * model.rope_scaling ** (model.d_head / (model.d_head - 2))


def frequencies(model):
    """(radians per position of each pair, numpy fp32 [H/2]; the factor of cos and sin).

    Step by step as Transformers 5.24 does in fp32 (modeling_rope_utils.py), so that far positions have the same angles.
    Sources: yarn, arXiv:2309.00071; llama3, the reference code of Llama 3.1.
    """
    import numpy as np  # not above: config.py imports this file, and a config needs no numpy

    kind, n = parse(model.rope_type)
    H, factor, base = model.d_head, model.rope_scaling, theta(model)
    exponent = np.arange(0, H, 2, dtype=np.float32) / np.float32(H)
    power = (base ** exponent.astype(np.float64)).astype(np.float32)  # numpy's fp32 power is off by 1 ulp in 1 of 7
    plain = 1 / power
    if kind in ("linear", "ntk"):
        return plain / np.float32(factor if kind == "linear" else 1), 1.0
    if kind == "llama3":
        low, high, length = n["low_freq_factor"], n["high_freq_factor"], n[LENGTH]
        wavelength = (1 / plain) * (2 * math.pi)  # torch, too, takes a reciprocal first
        share = ((1 / wavelength) * length - low) / (high - low)
        between = (1 - share) * plain / factor + share * plain
        short, long = wavelength < length / high, wavelength > length / low
        return np.where(short, plain, np.where(long, plain / factor, between)), 1.0
    low, high = (H * math.log(n[LENGTH] / (n[b] * 2 * math.pi)) / (2 * math.log(base)) for b in ("beta_fast", "beta_slow"))
    if n["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    high += 0.001 if low == high else 0
    kept = 1 - np.clip((np.arange(H // 2, dtype=np.float32) - low) / (high - low), 0, 1)  # the share that is not scaled
    mscale = lambda times: 0.1 * times * math.log(factor) + 1
    scale = mscale(n["mscale"]) / mscale(n["mscale_all_dim"]) if n["mscale"] and n["mscale_all_dim"] else mscale(1)
    return 1 / (factor * power) * (1 - kept) + plain * kept, n["attention_factor"] or scale
