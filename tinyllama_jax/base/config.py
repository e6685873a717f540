"""Configuration: frozen dataclasses and their validation."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import json
import math
import typing
from dataclasses import dataclass, field
from fractions import Fraction

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import check_local

SCHEDULES = ("cosine", "linear", "constant")
REMAT = ("none", "save_matmuls_and_attention", "save_matmuls", "full")
ATTENTION = ("auto", "reference", "xla", "pallas_triton", "pallas_mosaic_gpu", "pallas_tpu", "cudnn")

# Limits of every number. One beyond them is a typing mistake, and would take all memory or never end.
LIMITS = {
    key: limits
    for limits, keys in {
        (1, 2**10): "model.n_layers model.n_heads model.n_kv_heads",
        (1, 2**20): "model.d_model model.d_ff model.seq_len model.loss_chunk train.seqs_per_device",
        (1, 2**24): "model.vocab_size",
        (1, 2**30): "train.tokens_per_step",
        (1, 2**31 - 1): "train.steps train.give_up checkpoint.every checkpoint.keep log.every log.eval_every",
        (0, 2**31 - 1): "train.seed checkpoint.keep_every init.step optim.warmup_steps optim.decay_steps optim.cooldown_steps "
        "init.start_over",
        (-1, 2**20): "mesh.data mesh.fsdp mesh.tensor",
        (0, 2**40): "data.eval_blocks",
        (1, 64): "data.workers",
        (1.0, 1e15): "model.rope_theta",
        (1.0, 1e6): "model.rope_scaling",
        (1e-30, 1.0): "model.norm_eps optim.eps",  # less is 0 in fp32
        (1e-30, 1e4): "optim.peak_lr",
        (0.0, 1e4): "optim.min_lr optim.cooldown_lr optim.weight_decay",
        (1e-30, math.inf): "optim.clip_norm",  # inf: no clipping
        (0.0, 0.999_999): "optim.b1 optim.b2",  # more is 1 in fp32
        (0.0, 1.0): "train.z_loss",
        (0.0, 1e6): "train.spike",
        (0.1, 1e6): "train.wait",
    }.items()
    for key in keys.split()
}
PARAMETERS = 10**13
LONGEST = 10_000  # characters of a value
TOKENS = 2**53  # 9.0e15: every whole number up to here is exact in a float


def _check(ok: bool, key: str, value: object, remedy: str) -> None:
    if not ok:
        try:
            text = str(value)
        except ValueError:
            text = "(thousands of digits)"  # which Python refuses to print
        raise UserError(f"--{key}={text if len(text) <= 300 else text[:300] + '...'}: {remedy}")


class _Typed:
    """Base of every section: checks the type, limits and length of each value, from a config file or the command line."""

    def __post_init__(self):
        section = "" if isinstance(self, Config) else type(self).__name__.lower() + "."
        for name, kind in typing.get_type_hints(type(self)).items():
            key, value = section + name.rstrip("_"), getattr(self, name)
            texts = [value] if kind is str else []
            if typing.get_origin(kind) is dict:
                texts = list(value) if isinstance(value, dict) else [None]
                fits = all(isinstance(text, str) for text in texts) and all(map(_is_a_weight, value.values()))
            else:
                fits = _is_a(value, kind)
            said = value if isinstance(value, (int, dict)) else repr(value)
            _check(fits, key, said, f"must be {KINDS.get(kind) or 'a ' + kind.__name__}")
            if key in LIMITS:
                least, most = (f"{limit:,}" if kind is int else f"{limit:g}" for limit in LIMITS[key])
                _check(LIMITS[key][0] <= value, key, value, f"must be at least {least}")
                _check(LIMITS[key][1] >= value, key, value, f"must be at most {most}")
            for text in texts:
                _check(len(text) <= LONGEST, key, text, f"has more than {LONGEST:,} characters")
                _check(not set("\0\r\n") & set(text), key, repr(text), "holds a NUL character or a line break")


def _is_a(value: object, kind: type) -> bool:
    if kind is float:
        return value == value if isinstance(value, float) else type(value) is int and abs(value) <= 2**63  # NaN is no number
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


Weight = float | tuple[tuple[float, float], ...]  # constant, or knots (tokens, weight): linear between them, constant outside
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
KINDS[dict[str, Weight]] = "DIR:WEIGHT,DIR:WEIGHT (or WEIGHT@TOKENS..WEIGHT@TOKENS)"


def _is_a_weight(value: object) -> bool:
    if not isinstance(value, (list, tuple)):
        return _is_a(value, float)
    knots = [knot for knot in value if isinstance(knot, (list, tuple)) and len(knot) == 2]
    return len(knots) == len(value) > 0 and all(_is_a(number, float) for knot in knots for number in knot)


@dataclass(frozen=True)
class Model(_Typed):
    """A Llama 2 architecture. Fields without a default define the experiment."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int  # grouped-query attention: each serves n_heads / n_kv_heads query heads
    d_ff: int
    vocab_size: int  # rows of the embedding; at least the tokenizer's size
    seq_len: int  # S: positions of a training sequence; data blocks hold S + 1 tokens
    rope_theta: float = 10_000.0
    rope_scaling: float = 1.0  # linear position interpolation: positions are divided by it (4 in the original's 8k code model)
    norm_eps: float = 1e-5
    init: str = "tinyllama"  # or "torch_default": see dims.init_std
    precision: str = "params=float32,compute=bfloat16,output=float32"  # a jmp policy
    residual: str = "auto"  # dtype of the residual stream; auto: bfloat16 if that is the compute dtype, else float32
    reduce_dtype: str = "float32"  # in which gradients are added up over devices; "bfloat16": half the bytes on the wire
    remat: str = "none"  # what backward recomputes: see REMAT
    attention: str = "auto"  # see ATTENTION
    loss_chunk: int = 2_048  # tokens whose logits exist at one time on a device: 2,048 x 32,000 x 4 B = 262 MB

    def __post_init__(self):
        super().__post_init__()
        _check(self.d_model % self.n_heads == 0, "model.n_heads", self.n_heads, f"must divide model.d_model={self.d_model}")
        _check(self.d_head % 2 == 0, "model.n_heads", self.n_heads, f"gives heads of odd width {self.d_head}; RoPE needs pairs")
        divides = self.n_heads % self.n_kv_heads == 0
        _check(divides, "model.n_kv_heads", self.n_kv_heads, f"must divide model.n_heads={self.n_heads}")
        layer = 2 * self.d_head * (self.n_heads + self.n_kv_heads) + 3 * self.d_ff
        parameters = self.d_model * (self.n_layers * layer + 2 * self.vocab_size)
        fits = parameters <= PARAMETERS
        _check(fits, "model.d_model", self.d_model, f"makes {parameters:.3g} parameters; at most {PARAMETERS:.0e}")
        _one_of("model.init", self.init, ("tinyllama", "torch_default"))
        _one_of("model.residual", self.residual, ("auto", "float32", "bfloat16", "float16"))
        _one_of("model.reduce_dtype", self.reduce_dtype, ("float32", "bfloat16"))
        _one_of("model.remat", self.remat, REMAT)
        _one_of("model.attention", self.attention, ATTENTION)
        policy = dict(part.partition("=")[::2] for part in self.precision.split(","))
        dtypes = ("float32", "bfloat16", "float16")
        _check(
            set(policy) == {"params", "compute", "output"} and set(policy.values()) <= set(dtypes),
            "model.precision",
            self.precision,
            'is not a policy of the form "params=float32,compute=bfloat16,output=float32"',
        )
        remedy = "params must be float32: in 16 bits most updates, of a learning rate of 4e-5, round to nothing"
        _check(policy["params"] == "float32", "model.precision", self.precision, remedy)

    @property
    def d_head(self) -> int:
        """H, the width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def compute_dtype(self) -> str:
        """The policy's compute dtype, by name."""
        return dict(part.split("=") for part in self.precision.split(","))["compute"]

    @property
    def residual_dtype(self) -> str:
        """The residual stream's dtype, by name. `auto` never chooses fp16, whose largest number is 65,504."""
        return self.residual if self.residual != "auto" else "bfloat16" if self.compute_dtype == "bfloat16" else "float32"


@dataclass(frozen=True)
class Data(_Typed):
    """Where the blocks come from. With `train.seed` and the step it determines every batch."""

    # folder written by `prepare`, or DIR/PREFIX of LITPKDS files -> its share of the sequences, or its shares over time:
    # ((tokens, share), ...), linear between these and constant outside. The shares are normalised.
    sources: dict[str, Weight]
    eval_blocks: int = 0  # validation blocks read per source; 0: all of them
    document_mask: bool = False  # attention within each document: they end at eos or, where sources have none, begin at bos
    eod_mask_loss: bool = False  # no loss for the token after eos, the next document's first (Megatron's name)
    skip: str = ""  # STEP:STEP,...: steps (both ends) whose batches are left out, each in the numbers that those before it gave
    workers: int = 2  # threads that read ahead; no effect on what is read
    verify: bool = False  # compare the sha256 of each data file, at the start, with the one in the manifest or in RUN/data.json

    def __post_init__(self):
        super().__post_init__()
        _check(len(self.sources) > 0, "data.sources", "", "needs at least one folder: --data.sources=DIR:WEIGHT,DIR:WEIGHT")
        n = sum(len(weight) if isinstance(weight, (list, tuple)) else 1 for weight in self.sources.values())
        _check(n <= 1_000, "data.sources", f"({n:,} weights)", "must be at most 1,000 weights")
        object.__setattr__(self, "sources", {path: as_weight(weight) for path, weight in self.sources.items()})
        for path, weight in self.sources.items():
            said, knots = f"{path}:{weight_text(weight)}", knots_of(weight)
            tokens, weights = zip(*knots, strict=True)
            fits = all(weight == 0 or 1e-15 <= weight <= 1e15 for weight in weights) and max(weights) > 0
            kind = "positive numbers" + (" (or 0 for a time)" if len(knots) > 1 else "") + ", from 1e-15 to 1e15"
            _check(fits, "data.sources", said, f"weights must be {kind}")
            rising = 0 <= tokens[0] and tokens[-1] <= TOKENS and all(a < b for a, b in itertools.pairwise(tokens))
            _check(rising, "data.sources", said, "the tokens must rise from one weight to the next")
        for at in sorted({tokens for weight in self.sources.values() for tokens, _ in knots_of(weight)}):
            there = any(weight_at(weight, at) > 0 for weight in self.sources.values())
            _check(there, "data.sources", sources_text(self.sources), f"at {at:,.0f} tokens no source has a weight")
        for first, last in self.skipped:
            fits = 1 <= first <= last < 2**31
            _check(fits, "data.skip", f"{first}:{last}", "must be FIRST:LAST with 1 <= FIRST <= LAST < 2^31")
        steps = sum(last - first + 1 for first, last in self.skipped)
        fits = len(self.skipped) <= 100 and steps <= 10**6
        _check(fits, "data.skip", self.skip, f"{steps:,} steps in {len(self.skipped)} parts; at most 1,000,000 in 100")

    @property
    def skipped(self) -> list[tuple[int, int]]:
        """`skip` as (first, last) steps."""
        parts = [part.split(":") for part in self.skip.split(",") if part]
        try:
            return [(int(first), int(last)) for first, last in parts]
        except ValueError:
            raise UserError(f"--data.skip={self.skip}: must be STEP:STEP or STEP:STEP,STEP:STEP") from None


class Bos(int):
    """The id of bos in data whose documents begin with it and do not all end with eos."""


def as_weight(value: float | list) -> Weight:
    """A weight as JSON has it, with tuples for lists."""
    return tuple(map(tuple, value)) if isinstance(value, (list, tuple)) else value


def knots_of(weight: Weight) -> tuple[tuple[float, float], ...]:
    """A weight over the run as (tokens, weight)."""
    return weight if isinstance(weight, tuple) else ((0, weight),)


def weight_at(weight: Weight, tokens: float) -> Fraction:
    """What a weight is after so many tokens, exactly: 0.7 means 7/10, not the nearest binary fraction."""
    knots = [(Fraction(str(t)), Fraction(str(w))) for t, w in knots_of(weight)]
    at = min(max(Fraction(tokens), knots[0][0]), knots[-1][0])
    for (t0, w0), (t1, w1) in itertools.pairwise(knots):
        if at <= t1:
            return w0 + (w1 - w0) * (at - t0) / (t1 - t0)
    return knots[-1][1]


def exact(text: str) -> Fraction:
    """A number as people write it, such as 1.5e12 or 7/10. Raises ValueError or ArithmeticError if it is none or too long."""
    if len(text) > 100 or len(text.lower().partition("e")[2]) > 4:  # Fraction("1e999999999") would never end
        raise ValueError(text)
    return Fraction(text)


def weight_text(weight: Weight) -> str:
    """A weight as the command line has it: 0.7, or WEIGHT@TOKENS..WEIGHT@TOKENS."""
    short = lambda x: f"{x:.6g}" if float(f"{x:.6g}") == x else repr(float(x))
    return "..".join(f"{short(w)}@{short(t)}" for t, w in weight) if isinstance(weight, tuple) else short(weight)


def sources_text(sources: dict[str, Weight]) -> str:
    """`data.sources` as the command line has it."""
    return ",".join(f"{path}:{weight_text(weight)}" for path, weight in sources.items())


@dataclass(frozen=True)
class Optim(_Typed):
    """AdamW, and its learning rate: warm-up, then a schedule, then a cool-down if one is asked for.

    Steps are of train.tokens_per_step tokens: when train.batch_ramp makes them larger, one counts for as many.
    """

    peak_lr: float
    min_lr: float  # where the schedule ends
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    decay: str = "all"  # which parameters decay: "all", as the original did, or "matrices" (no norms, no embedding)
    schedule: str = "cosine"  # from the peak to the minimum: "cosine", "linear" or "constant" (with a cool-down: WSD)
    decay_steps: int = 0  # where the schedule reaches the minimum, where it stays; 0: at the end of the run
    cooldown_steps: int = 0  # the last so many steps leave the schedule; 0: none do
    cooldown: str = "linear"  # from what the rate is then: "linear" to cooldown_lr, or "constant"
    cooldown_lr: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _one_of("optim.schedule", self.schedule, SCHEDULES)
        _one_of("optim.cooldown", self.cooldown, SCHEDULES[1:])
        late = not self.decay_steps or self.decay_steps > self.warmup_steps
        _check(late, "optim.decay_steps", self.decay_steps, f"must be more than optim.warmup_steps={self.warmup_steps}, or 0")
        for name in ("min_lr", "cooldown_lr"):
            value, remedy = getattr(self, name), f"must lie in [0, optim.peak_lr={self.peak_lr}]"
            _check(value <= self.peak_lr, f"optim.{name}", value, remedy)
        _one_of("optim.decay", self.decay, ("all", "matrices"))


@dataclass(frozen=True)
class Train(_Typed):
    """How long, and how much at once. Every quantity is global: no number here is per host."""

    steps: int
    tokens_per_step: int  # tokens of one optimizer step over all devices
    seqs_per_device: int  # sequences a device holds at once; the rest of a step is accumulated
    batch_ramp: str = ""  # TOKENS:TOKENS_PER_STEP,...: from the first step on that begins at or after so many tokens
    seed: int = 0
    deterministic: bool = False  # on GPUs: only kernels whose sums have one order, so that a resumed run has the same bits
    z_loss: float = 0.0  # times the mean square of the logits' logsumexp, added to what is minimised (not to the loss shown)
    spike: float = 0.0  # the run stops at a loss so many nats above the mean of the 100 finite steps before; 0: it does not
    give_up: int = 100  # the run stops after so many steps in a row skipped as not finite; fp16 begins with up to 15
    wait: float = 300.0  # seconds that a process waits for the others before it ends and says which is late

    def __post_init__(self):
        super().__post_init__()
        for (_, before, _), (first, tokens, _) in itertools.pairwise(self.stages):
            _check(
                tokens > before, "train.batch_ramp", self.batch_ramp, f"its tokens must rise, by a step at least ({first:,})"
            )

    @functools.cached_property
    def stages(self) -> list[tuple[int, int, int]]:
        """(steps before it, tokens before it, tokens of each of its steps), for each size that steps have."""
        stages = [(0, 0, self.tokens_per_step)]
        parts = [part for part in self.batch_ramp.split(",") if part]
        _check(len(parts) <= 100, "train.batch_ramp", self.batch_ramp, f"has {len(parts)} parts; at most 100")
        for part in parts:
            try:
                at, size = (exact(number) for number in part.split(":"))
                if size < 1 or size.denominator != 1:
                    raise ValueError
            except (ValueError, ArithmeticError):
                raise UserError(f"--train.batch_ramp={self.batch_ramp}: must be TOKENS:TOKENS_PER_STEP,...") from None
            most = LIMITS["train.tokens_per_step"][1]
            _check(0 <= at <= TOKENS, "train.batch_ramp", self.batch_ramp, f"its tokens must be at most {TOKENS:,}")
            _check(size <= most, "train.batch_ramp", self.batch_ramp, f"its tokens per step must be at most {most:,}")
            first, tokens, each = stages[-1]
            n = max(math.ceil((at - tokens) / each), 0)
            stages.append((first + n, tokens + n * each, int(size)))
        return stages

    def tokens_after(self, step: int) -> int:
        """Tokens of the steps 1 to `step`."""
        first, tokens, each = next(stage for stage in reversed(self.stages) if stage[0] <= step)
        return tokens + (step - first) * each

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.tokens_after(self.steps)


@dataclass(frozen=True)
class Mesh(_Typed):
    """Devices by axis; -1 for "what is left". data: replicas. fsdp: parameters and optimizer sharded. tensor: heads, ffn."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self):
        super().__post_init__()
        for name, value in dataclasses.asdict(self).items():
            _check(value != 0, f"mesh.{name}", value, "must be a positive number of devices, or -1 for the rest")
        left = [name for name, value in dataclasses.asdict(self).items() if value == -1]
        _check(len(left) <= 1, f"mesh.{(left or [''])[-1]}", -1, f"only one axis can be -1, and mesh.{(left or [''])[0]} is")


@dataclass(frozen=True)
class Checkpoint(_Typed):
    """When to save, and what to keep. The last step is always saved."""

    every: int
    keep: int = 3  # the newest ones kept
    keep_every: int = 0  # steps divisible by it are kept for ever; 0: none
    keep_steps: str = ""  # "50_000,240_000": these are kept for ever too

    def __post_init__(self):
        super().__post_init__()
        for key, said, steps in (
            ("keep_every", self.keep_every, [self.keep_every]),
            ("keep_steps", self.keep_steps, self.kept),
        ):
            for step in steps:
                _check(0 <= step < 2**31, f"checkpoint.{key}", said, "must be steps of at least 0 and less than 2^31")
                remedy = f"no checkpoint is made at {step:,}: checkpoint.every is {self.every:,}"
                _check(step % self.every == 0, f"checkpoint.{key}", said, remedy)

    @property
    def kept(self) -> list[int]:
        """`keep_steps` as numbers."""
        try:
            return [int(step) for step in self.keep_steps.split(",") if step]
        except ValueError:
            raise UserError(f"--checkpoint.keep_steps={self.keep_steps}: must be STEP,STEP,...") from None


@dataclass(frozen=True)
class Log(_Typed):
    """What is written down while it runs."""

    every: int = 1  # steps between lines of metrics.jsonl
    eval_every: int = 1_000  # steps between validations; the last step is always validated
    wandb: str = ""  # Weights & Biases project; empty: off


@dataclass(frozen=True)
class Init(_Typed):
    """Where the weights of a new run come from."""

    from_: str = ""  # a run folder or a Hugging Face folder; empty: from scratch. Said as --init.from
    step: int = 0  # which checkpoint of the run folder; 0: the newest
    state: str = "weights"  # or "moments": AdamW's too; or "all": the step too, so that this run is a branch of that one
    start_over: int = 0  # begins again a run whose checkpoints are gone; its value: the newest step that was saved

    def __post_init__(self):
        super().__post_init__()
        check_local("--init.from", self.from_)
        _one_of("init.state", self.state, ("weights", "moments", "all"))
        _check(
            bool(self.from_) or (self.step, self.state) == (0, "weights"),
            "init.from",
            "",
            "is needed with --init.step and --init.state",
        )


@dataclass(frozen=True)
class Config(_Typed):
    """Everything that a run is. `configs/*.py` each define one, named `config`."""

    workdir: str
    model: Model
    data: Data
    optim: Optim
    train: Train
    checkpoint: Checkpoint
    mesh: Mesh = field(default_factory=Mesh)
    log: Log = field(default_factory=Log)
    init: Init = field(default_factory=Init)

    def __post_init__(self):
        super().__post_init__()
        _check(bool(self.workdir), "workdir", self.workdir, "must name a folder for the run")
        check_local("--workdir", self.workdir)
        for i, (_, _, tokens) in enumerate(self.train.stages):
            key = "batch_ramp" if i else "tokens_per_step"
            remedy = f"must be a multiple of model.seq_len={self.model.seq_len}"
            _check(tokens % self.model.seq_len == 0, f"train.{key}", getattr(self.train, key), remedy)
        model, most = self.model, max(tokens for _, _, tokens in self.train.stages)
        wide = max(model.seq_len * model.n_heads, model.n_layers * max(model.d_model, model.d_ff))
        _check(most * wide <= 2**55, "train.tokens_per_step", most, f"with {wide:,} numbers a token arrays exceed 2^55 numbers")
        steps = self.train.tokens / self.train.tokens_per_step
        for name, most in (("warmup_steps", steps), ("cooldown_steps", steps - self.optim.warmup_steps)):
            less = f" less optim.warmup_steps={self.optim.warmup_steps}" if name == "cooldown_steps" else ""
            said, value = f"is more than train.steps={self.train.steps}{less}", getattr(self.optim, name)
            _check(value <= most, f"optim.{name}", value, said)

    @property
    def seqs_per_step(self) -> int:
        """Sequences of one optimizer step over all devices, before any `train.batch_ramp`."""
        return self.train.tokens_per_step // self.model.seq_len

    def fitting(self, n_batch_devices: int) -> list[int]:
        """The values of `train.seqs_per_device` that come out even on `n_batch_devices` = mesh data x fsdp."""
        common = math.gcd(*(tokens // self.model.seq_len for _, _, tokens in self.train.stages))
        n, left = divmod(common, n_batch_devices)
        small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0 and not left]
        return sorted({*small, *(n // k for k in small)})

    def accumulation(self, n_batch_devices: int) -> list[int]:
        """Micro-batches of a step on `n_batch_devices` = mesh data x fsdp, for each of `train.stages`.

        Raises UserError if they do not come out even.
        """
        at_once = self.train.seqs_per_device * n_batch_devices
        per_step = [tokens // self.model.seq_len for _, _, tokens in self.train.stages]
        for sequences in per_step:
            if sequences % at_once:
                fits = self.fitting(n_batch_devices)
                near = sorted(sorted(fits, key=lambda n: abs(n - self.train.seqs_per_device))[:20])
                remedy = (
                    f"choose train.seqs_per_device among {near}"
                    if fits
                    else f"choose train.tokens_per_step as a multiple of {at_once * self.model.seq_len}, or other devices"
                )
                raise UserError(
                    f"--train.seqs_per_device={self.train.seqs_per_device}: {sequences} sequences a step do not "
                    f"divide into {n_batch_devices} devices x {self.train.seqs_per_device}; {remedy}"
                )
        return [sequences // at_once for sequences in per_step]


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    near = difflib.get_close_matches(value, known, 1)
    _check(value in known, key, value, f"must be one of {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else ""))


# -- as keys and values, as JSON ------------------------------------------------------------------------------------------


def keys(config_type: type = Config, prefix: str = "") -> dict[str, type]:
    """Every `section.key` with its type, in order."""
    out = {}
    for name, kind in typing.get_type_hints(config_type).items():
        path = prefix + name.rstrip("_")
        out.update(keys(kind, path + ".") if dataclasses.is_dataclass(kind) else {path: kind})
    return out


def flat(config: Config) -> dict[str, object]:
    """`section.key` -> value, for every key."""
    values = dataclasses.asdict(config)
    values["init"]["from"] = values["init"].pop("from_")
    return {k: values[k] if k in values else values[k.partition(".")[0]][k.partition(".")[2]] for k in keys()}


def to_json(config: Config) -> str:
    """The resolved config, as it is kept in a run folder."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str | bytes, origin: str = "config.json") -> Config:
    """Inverse of `to_json`. Raises UserError naming `origin` if it was written for other keys."""

    def build(kind, values):
        hints = typing.get_type_hints(kind)
        return kind(**{k: build(hints[k], v) if dataclasses.is_dataclass(hints[k]) else v for k, v in values.items()})

    try:
        return build(Config, json.loads(text))  # clip_norm=inf is Infinity there, which msgspec refuses
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{origin}: is not a config of this version: {error}") from None
