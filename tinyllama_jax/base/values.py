"""Types and limits of configuration values, and the checks that reject others with one line: key, value, remedy."""

import dataclasses
import difflib
import math
import typing

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import typed
from tinyllama_jax.base.mixture_weights import Weight

# Limits of every number. One beyond them is a typing mistake, and would take all memory or never end.
LIMITS = {
    key: limits
    for limits, keys in {
        (1, 2**10): "model.n_layers model.n_heads model.n_kv_heads",
        (1, 2**20): "model.d_model model.d_ff model.seq_len model.loss_chunk train.seqs_per_device",
        (0, 2**16): "model.head_dim lora.rank",
        (1, 2**24): "model.vocab_size",
        (1, 2**30): "train.tokens_per_step",
        (1, 2**31 - 1): "train.steps train.give_up checkpoint.every checkpoint.keep log.every log.eval_every",
        (0, 2**31 - 1): "train.seed checkpoint.keep_every init.step init.start_over optim.warmup_steps optim.decay_steps "
        "optim.cooldown_steps eval.every eval.limit",
        (-1, 2**20): "mesh.data mesh.fsdp mesh.tensor",
        (0, 2**40): "data.eval_blocks",
        (1, 64): "data.workers",
        (1.0, 1e15): "model.rope_theta",
        (1.0, 1e6): "model.rope_scaling",
        (1e-30, 1.0): "model.norm_eps optim.eps",  # less is 0 in fp32
        (1e-30, 1e4): "optim.peak_lr lora.alpha",
        (0.0, 1e4): "optim.min_lr optim.cooldown_lr optim.weight_decay",
        (1e-30, math.inf): "optim.clip_norm",  # inf: no clipping
        (0.0, 0.999_999): "optim.b1 optim.b2",  # more is 1 in fp32
        (0.0, 1.0): "train.z_loss",
        (1e-6, 100.0): "train.dpo_beta",
        (0.0, 1e6): "train.spike train.epochs checkpoint.minutes checkpoint.grace",
        (0.1, 1e6): "train.wait",
    }.items()
    for key in keys.split()
}
LONGEST = 10_000  # characters of a value
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
KINDS[dict[str, Weight]] = "DIR:WEIGHT,DIR:WEIGHT (or WEIGHT@TOKENS..WEIGHT@TOKENS)"


def shown(value: object) -> str:
    """A value for an error message, in at most 303 characters."""
    try:
        text = str(value)
    except ValueError:  # Python refuses to print a number of more than 4,300 digits
        return "(thousands of digits)"
    return text if len(text) <= 300 else text[:300] + "..."


def check(ok: bool, key: str, value: object, remedy: str) -> None:
    """Raises UserError naming key, value and remedy unless `ok`."""
    if not ok:
        raise UserError(f"--{key}={shown(value)}: {remedy}")


def check_one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    """Raises UserError, with the nearest valid value, unless `value` is one of `known`."""
    near = difflib.get_close_matches(value, known, 1)
    check(value in known, key, value, f"must be one of {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else ""))


def checked(key: str, value: object, kind: type) -> object:
    """`value` as `kind`. Raises UserError unless it has that type, lies within the `LIMITS` of `key` and is short enough."""
    try:
        out = typed(value, kind)
        if out != out:
            raise ValueError("NaN")
    except ValueError:
        as_typed = value if isinstance(value, (int, dict)) else repr(value)
        raise UserError(f"--{key}={shown(as_typed)}: must be {KINDS[kind]}") from None
    if key in LIMITS:
        least, most = (f"{limit:,}" if kind is int else f"{limit:g}" for limit in LIMITS[key])
        check(LIMITS[key][0] <= out, key, out, f"must be at least {least}")
        check(LIMITS[key][1] >= out, key, out, f"must be at most {most}")
    for text in [out] if kind is str else out if isinstance(out, dict) else []:
        check(len(text) <= LONGEST, key, text, f"has more than {LONGEST:,} characters")
        check(not set("\0\r\n") & set(text), key, repr(text), "holds a NUL character or a line break")
    return out


class Section:
    """Base of every section: checks the type, limits and length of each value, from a config file or the command line."""

    def __post_init__(self):
        section = "" if type(self).__name__ == "Config" else type(self).__name__.lower() + "."
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if dataclasses.is_dataclass(kind):
                check(isinstance(value, kind), name, value, f"must be a {kind.__name__}")
            else:
                object.__setattr__(self, name, checked(section + name.rstrip("_"), value, kind))
