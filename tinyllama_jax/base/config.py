"""Configuration: frozen dataclasses and their validation."""

import dataclasses
import functools
import itertools
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path

from tinyllama_jax.base import mixture_weights, rope, store
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.evals import Eval
from tinyllama_jax.base.files import check_local
from tinyllama_jax.base.log import Log
from tinyllama_jax.base.lora import NF4_BLOCK, Lora
from tinyllama_jax.base.mixture_weights import Weight, exact, knots_of, weight_at
from tinyllama_jax.base.values import LIMITS, Section, check, check_one_of

SCHEDULES = ("cosine", "linear", "constant")
REMAT = ("none", "save_matmuls_and_attention", "save_matmuls", "full")
ATTENTION = ("auto", "reference", "xla", "pallas_triton", "pallas_mosaic_gpu", "pallas_tpu", "cudnn")
TOKENS = 2**53  # 9.0e15, at most: every whole number up to this one is exact in a float


@dataclass(frozen=True)
class Model(Section):
    """A Llama 2 architecture. Fields without a default define the experiment."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int  # grouped-query attention: each serves n_heads / n_kv_heads query heads
    d_ff: int
    vocab_size: int  # rows of the embedding; at least the tokenizer's size
    seq_len: int  # S: positions of a training sequence; data blocks hold S + 1 tokens
    added_tokens: str = ""  # sft: "TOKEN,TOKEN" that the tokenizer of init.from gets besides; rows are filled up to 64 x n
    head_dim: int = 0  # H, the width of one head; 0: d_model / n_heads
    rope_theta: float = 10_000.0
    rope_scaling: float = 1.0  # how many times longer RoPE makes the context (4 in the original's 8k code model)
    rope_type: str = "linear"  # how: linear (positions are divided), ntk, llama3,KEY=NUMBER,... or yarn,KEY=NUMBER,...
    norm_eps: float = 1e-5
    init: str = "tinyllama"  # the scale of random weights: the original's, or "torch_default", PyTorch's for each layer
    precision: str = "params=float32,compute=bfloat16,output=float32"  # a jmp policy
    residual: str = "auto"  # dtype of the residual stream; auto: bfloat16 if that is the compute dtype, else float32
    reduce_dtype: str = "float32"  # in which gradients are added up over devices; "bfloat16": half the bytes on the wire
    remat: str = "none"  # what backward recomputes: see REMAT
    attention: str = "auto"  # see ATTENTION
    loss_chunk: int = 2_048  # tokens whose logits exist at one time on a device: 2,048 x 32,000 x 4 B = 262 MB

    def __post_init__(self):
        super().__post_init__()
        whole = self.head_dim or self.d_model % self.n_heads == 0
        check(whole, "model.n_heads", self.n_heads, f"must divide model.d_model={self.d_model}; or set model.head_dim")
        divides = self.n_heads % self.n_kv_heads == 0
        check(divides, "model.n_kv_heads", self.n_kv_heads, f"must divide model.n_heads={self.n_heads}")
        layer = 2 * self.d_head * (self.n_heads + self.n_kv_heads) + 3 * self.d_ff
        parameters = self.d_model * (self.n_layers * layer + 2 * self.vocab_size)
        check(parameters <= 1e13, "model.d_model", self.d_model, f"makes {parameters:.3g} parameters; at most 1e+13")
        object.__setattr__(self, "rope_type", rope.checked(self))  # its shortest form, so that equal models compare equal
        check_one_of("model.init", self.init, ("tinyllama", "torch_default"))
        check_one_of("model.residual", self.residual, ("auto", "float32", "bfloat16", "float16"))
        check_one_of("model.reduce_dtype", self.reduce_dtype, ("float32", "bfloat16"))
        check_one_of("model.remat", self.remat, REMAT)
        check_one_of("model.attention", self.attention, ATTENTION)
        policy = dict(part.partition("=")[::2] for part in self.precision.split(","))
        dtypes_fit = set(policy.values()) <= {"float32", "bfloat16", "float16"}
        remedy = 'is not a policy of the form "params=float32,compute=bfloat16,output=float32"'
        check(set(policy) == {"params", "compute", "output"} and dtypes_fit, "model.precision", self.precision, remedy)
        remedy = "params must be float32: in 16 bits most updates at a learning rate of 4e-5 round to zero"
        check(policy["params"] == "float32", "model.precision", self.precision, remedy)

    @property
    def d_head(self) -> int:
        """H, the width of one attention head."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def compute_dtype(self) -> str:
        """The policy's compute dtype, by name."""
        return dict(part.split("=") for part in self.precision.split(","))["compute"]

    @property
    def residual_dtype(self) -> str:
        """The residual stream's dtype, by name. `auto` never chooses fp16, whose largest number is 65,504."""
        return self.residual if self.residual != "auto" else "bfloat16" if self.compute_dtype == "bfloat16" else "float32"


@dataclass(frozen=True)
class Data(Section):
    """Where the blocks come from. Together with `train.seed` and the step, it determines every batch."""

    # PATH:WEIGHT,PATH:WEIGHT: folders written by `prepare`, or DIR/PREFIX of LITPKDS files, also on gs:// and s3://; for sft
    # and dpo files, folders or patterns of conversations. Weights are normalised to shares of the sequences;
    # W@TOKENS..W@TOKENS changes one over time
    sources: dict[str, Weight]
    eval_blocks: int = 0  # validation blocks read per source; 0: all of them
    document_mask: bool = False  # attention within each document: they end at eos or, where sources have none, begin at bos
    eod_mask_loss: bool = False  # no loss for the token after eos, the next document's first (Megatron's name)
    template: str = ""  # sft, dpo: guanaco, chatml, zephyr, or a .jinja file; in a config file only for weights that bring none
    skip: str = ""  # STEP:STEP,...: steps (both ends) whose batches are left out; a later part counts the steps without them
    workers: int = 2  # threads that read ahead; no effect on what is read
    cache: str = ""  # FOLDER or FOLDER:GB for shards from gs:// and s3://; without GB, 80% of the free disk; empty: in ~/.cache
    verify: bool = False  # compare the sha256 of each data file, at the start, with the one in the manifest or in RUN/data.json

    def __post_init__(self):
        super().__post_init__()
        check(len(self.sources) > 0, "data.sources", "", "needs at least one folder: --data.sources=DIR:WEIGHT,DIR:WEIGHT")
        weights, n = self.sources, sum(len(knots_of(weight)) for weight in self.sources.values())
        check(n <= 1_000, "data.sources", f"({n:,} weights)", "must be at most 1,000 weights")
        for path, weight in weights.items():
            source, knots = f"{path}:{mixture_weights.text(weight)}", knots_of(weight)
            check(len(knots) > 0, "data.sources", source, "has no weight")
            tokens, values = zip(*knots, strict=True)
            fits = all(value == 0 or 1e-15 <= value <= 1e15 for value in values) and max(values) > 0
            kind = "positive numbers" + (" (or 0 for a time)" if len(knots) > 1 else "") + ", from 1e-15 to 1e15"
            check(fits, "data.sources", source, f"weights must be {kind}")
            rising = 0 <= tokens[0] and tokens[-1] <= TOKENS and all(a < b for a, b in itertools.pairwise(tokens))
            check(rising, "data.sources", source, "the tokens must rise from one weight to the next")
        for at in sorted({tokens for weight in weights.values() for tokens, _ in knots_of(weight)}):
            positive = any(weight_at(weight, at) > 0 for weight in weights.values())
            everything = mixture_weights.sources_text(weights)
            check(positive, "data.sources", everything, f"at {at:,.0f} tokens no source has a positive weight")
        for a, b in self.skipped:
            check(1 <= a <= b < 2**31, "data.skip", f"{a}:{b}", "must be FIRST:LAST with 1 <= FIRST <= LAST < 2^31")
        steps = sum(last - first + 1 for first, last in self.skipped)
        fits = len(self.skipped) <= 100 and steps <= 10**6
        check(fits, "data.skip", self.skip, f"{steps:,} steps in {len(self.skipped)} parts; at most 1,000,000 in 100")

    @property
    def skipped(self) -> list[tuple[int, int]]:
        """`skip` as (first, last) steps."""
        try:
            return [(int(first), int(last)) for first, last in (p.split(":") for p in self.skip.split(",") if p)]
        except ValueError:
            raise UserError(f"--data.skip={self.skip}: must be STEP:STEP or STEP:STEP,STEP:STEP") from None


class Bos(int):
    """The id of bos in data whose documents begin with it and do not all end with eos."""


@dataclass(frozen=True)
class Optim(Section):
    """AdamW and its learning rate: warm-up, a schedule, and an optional cool-down.

    A step here is train.tokens_per_step tokens: a step that train.batch_ramp makes k times larger counts as k.
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
    schedule: str = "cosine"  # from peak_lr to min_lr: "cosine", "linear" or "constant" (with a cool-down: WSD)
    decay_steps: int = 0  # where the schedule reaches min_lr and stays; 0: the end of the run
    cooldown_steps: int = 0  # so many steps before the end the rate leaves the schedule; 0: never
    cooldown: str = "linear"  # from the rate at that step: "linear" to cooldown_lr, or "constant"
    cooldown_lr: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_one_of("optim.schedule", self.schedule, SCHEDULES)
        check_one_of("optim.cooldown", self.cooldown, SCHEDULES[1:])
        late = not self.decay_steps or self.decay_steps > self.warmup_steps
        check(late, "optim.decay_steps", self.decay_steps, f"must be more than optim.warmup_steps={self.warmup_steps}, or 0")
        for name, rate in ("min_lr", self.min_lr), ("cooldown_lr", self.cooldown_lr):
            check(rate <= self.peak_lr, f"optim.{name}", rate, f"must lie in [0, optim.peak_lr={self.peak_lr}]")
        check_one_of("optim.decay", self.decay, ("all", "matrices"))


@dataclass(frozen=True)
class Train(Section):
    """How long, and how much at once. Every quantity is global: no number here is per host."""

    steps: int
    tokens_per_step: int  # tokens of one optimizer step over all devices
    seqs_per_device: int  # sequences a device holds at once; the rest of a step is accumulated
    epochs: float = 0.0  # the run ends after so many passes over all sources, in place of train.steps; 0: after train.steps
    batch_ramp: str = ""  # TOKENS:TOKENS_PER_STEP,...: larger steps from the first one that begins at or after TOKENS
    seed: int = 0
    deterministic: bool = False  # on GPUs: only kernels with a fixed order of summation, so that a run resumes bit for bit
    z_loss: float = 0.0  # weight of the mean squared logsumexp of the logits in the objective (not in the loss shown)
    dpo_beta: float = 0.1  # of DPO alone: how strongly the margin counts; larger values stay nearer to the reference model
    spike: float = 0.0  # the run stops at a loss this many nats above the mean of the last 100 finite steps; 0: never
    give_up: int = 100  # the run stops after this many skipped (not finite) steps in a row; fp16 begins with up to 15
    wait: float = 300.0  # seconds that a process waits for the others before it ends and names the late one

    def __post_init__(self):
        super().__post_init__()
        for (_, before, _), (first, tokens, _) in itertools.pairwise(self.stages):
            check(tokens > before, "train.batch_ramp", self.batch_ramp, f"must rise by at least one step of tokens ({first:,})")

    @functools.cached_property
    def stages(self) -> list[tuple[int, int, int]]:
        """(steps before it, tokens before it, tokens of each of its steps), for each step size in order."""
        stages = [(0, 0, self.tokens_per_step)]
        parts = [part for part in self.batch_ramp.split(",") if part]
        check(len(parts) <= 100, "train.batch_ramp", self.batch_ramp, f"has {len(parts)} parts; at most 100")
        for part in parts:
            try:
                at, size = (exact(number) for number in part.split(":"))
                if size < 1 or size.denominator != 1:
                    raise ValueError
            except (ValueError, ArithmeticError) as error:
                remedy = error if isinstance(error, OverflowError) else "must be TOKENS:TOKENS_PER_STEP,..."
                check(False, "train.batch_ramp", self.batch_ramp, str(remedy))
            most = LIMITS["train.tokens_per_step"][1]
            check(0 <= at <= TOKENS, "train.batch_ramp", self.batch_ramp, f"its tokens must be at most {TOKENS:,}")
            check(size <= most, "train.batch_ramp", self.batch_ramp, f"its tokens per step must be at most {most:,}")
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
class Mesh(Section):
    """Devices per axis; -1: all that are left. data: replicas. fsdp: shards of parameters and optimizer. tensor: heads, ffn."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self):
        super().__post_init__()
        for name, value in dataclasses.asdict(self).items():
            check(value != 0, f"mesh.{name}", value, "must be a positive number of devices, or -1 for the rest")
        free = [name for name, value in dataclasses.asdict(self).items() if value == -1]
        if len(free) > 1:
            check(False, f"mesh.{free[-1]}", -1, f"only one axis can be -1, and mesh.{free[0]} is")


@dataclass(frozen=True)
class Checkpoint(Section):
    """When to save, and what to keep. The last step is always saved."""

    every: int
    keep: int = 3  # the newest ones kept
    keep_every: int = 0  # steps divisible by it are kept for ever; 0: none
    keep_steps: str = ""  # "50_000,240_000": these are kept for ever too
    minutes: float = 0.0  # save, too, when so many minutes have passed since the last save; 0: only every `every` steps
    grace: float = 0.0  # seconds from the signal to stop until the machine is gone; 0: not known, so a save is always tried

    def __post_init__(self):
        super().__post_init__()
        for key, text, steps in (("every", self.keep_every, [self.keep_every]), ("steps", self.keep_steps, self.kept)):
            for step in steps:
                check(0 <= step < 2**31, f"checkpoint.keep_{key}", text, "must be steps of at least 0 and less than 2^31")
                remedy = f"no checkpoint is made at {step:,}: checkpoint.every is {self.every:,}"
                check(step % self.every == 0, f"checkpoint.keep_{key}", text, remedy)

    @property
    def kept(self) -> list[int]:
        """`keep_steps` as numbers."""
        try:
            return [int(step) for step in self.keep_steps.split(",") if step]
        except ValueError:
            raise UserError(f"--checkpoint.keep_steps={self.keep_steps}: must be STEP,STEP,...") from None


@dataclass(frozen=True)
class Init(Section):
    """Where the weights of a new run come from."""

    from_: str = ""  # a run folder, a Hugging Face folder or a GGUF file; empty: from scratch
    step: int = 0  # which checkpoint of the run folder; 0: the newest
    state: str = "weights"  # weights only; "moments": with optimizer state; "all": with the step too, a full fork of the run
    start_over: int = 0  # starts again a run whose checkpoints are gone; the value: the newest step that it saved

    def __post_init__(self):
        super().__post_init__()
        if self.from_:
            check_local("--init.from", self.from_)
        check_one_of("init.state", self.state, ("weights", "moments", "all"))
        alone = not self.from_ and (self.step, self.state) != (0, "weights")
        check(not alone, "init.from", "", "is needed with --init.step and --init.state")


@dataclass(frozen=True)
class Config(Section):
    """All settings of a run. Each of `configs/*.py` defines one, named `config`."""

    workdir: str
    model: Model
    data: Data
    optim: Optim
    train: Train
    checkpoint: Checkpoint
    mesh: Mesh = field(default_factory=Mesh)
    log: Log = field(default_factory=Log)
    eval: Eval = field(default_factory=Eval)
    init: Init = field(default_factory=Init)
    lora: Lora = field(default_factory=Lora)

    def __post_init__(self):
        super().__post_init__()
        check(bool(self.workdir), "workdir", self.workdir, "must name a folder for the run")
        store.check_workdir(self.workdir)
        for i, (_, _, tokens) in enumerate(self.train.stages):
            key = "batch_ramp" if i else "tokens_per_step"
            remedy = f"must be a multiple of model.seq_len={self.model.seq_len}"
            check(tokens % self.model.seq_len == 0, f"train.{key}", getattr(self.train, key), remedy)
        model, most = self.model, max(tokens for _, _, tokens in self.train.stages)
        wide = max(model.seq_len * model.n_heads, model.n_layers * max(model.d_model, model.d_ff, model.n_heads * model.d_head))
        check(most * wide <= 2**55, "train.tokens_per_step", most, f"with {wide:,} numbers a token arrays exceed 2^55 numbers")
        for key, inputs in (("d_model", model.d_model), ("n_heads", model.n_heads * model.d_head), ("d_ff", model.d_ff)):
            whole = self.lora.base != "nf4" or inputs % NF4_BLOCK == 0
            remedy = f"{inputs:,} inputs are not whole blocks of {NF4_BLOCK}, which --lora.base=nf4 needs; use bfloat16"
            check(whole, f"model.{key}", getattr(model, key), remedy)
        sides = {"q": model.n_heads, "o": model.n_heads, "k": model.n_kv_heads, "v": model.n_kv_heads}
        sides = {name: (model.d_model, n * model.d_head) for name, n in sides.items()}
        self.lora.check_fits(dict.fromkeys(("gate", "up", "down"), (model.d_model, model.d_ff)) | sides)
        past = self.log.profiled[1] > self.train.steps and not self.train.epochs
        check(not past, "log.profile", self.log.profile, f"the run ends at train.steps={self.train.steps}")
        steps, optim = self.train.tokens / self.train.tokens_per_step, self.optim
        warmup, cooldown = optim.warmup_steps, optim.cooldown_steps
        too_many = f"is more than train.steps={self.train.steps}"
        check(warmup <= steps, "optim.warmup_steps", warmup, too_many)
        check(cooldown <= steps - warmup, "optim.cooldown_steps", cooldown, f"{too_many} less optim.warmup_steps={warmup}")

    @property
    def folder(self) -> Path:
        """The run folder on this machine: `workdir`, or the working copy of one in an object store."""
        return store.working_copy(self.workdir)

    @property
    def seqs_per_step(self) -> int:
        """Sequences of one optimizer step over all devices, before any `train.batch_ramp`."""
        return self.train.tokens_per_step // self.model.seq_len

    def fitting(self, n_batch_devices: int) -> list[int]:
        """The values of `train.seqs_per_device` that divide every step on `n_batch_devices` = mesh data x fsdp."""
        common = math.gcd(*(tokens // self.model.seq_len for _, _, tokens in self.train.stages))
        n, left = divmod(common, n_batch_devices)
        small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0 and not left]
        return sorted({*small, *(n // k for k in small)})

    def accumulation(self, n_batch_devices: int) -> list[int]:
        """Micro-batches (gradient accumulation) of a step of each of `train.stages`. Raises UserError if none fit."""
        each = self.train.seqs_per_device
        at_once, per_step = each * n_batch_devices, [tokens // self.model.seq_len for _, _, tokens in self.train.stages]
        for sequences in per_step:
            if sequences % at_once:
                near = sorted(sorted(self.fitting(n_batch_devices), key=lambda n: abs(n - each))[:20])
                multiple = f"train.tokens_per_step as a multiple of {at_once * self.model.seq_len}, or other devices"
                remedy = f"choose train.seqs_per_device among {near}" if near else f"choose {multiple}"
                what = f"{sequences} sequences a step do not divide into {n_batch_devices} devices x {each}; {remedy}"
                check(False, "train.seqs_per_device", each, what)
        return [sequences // at_once for sequences in per_step]


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
    """The resolved config as JSON, the content of RUN/config.json."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str | bytes, origin: str = "config.json") -> Config:
    """Inverse of `to_json`. Raises UserError naming `origin` if `text` is damaged or has other keys."""

    def build(kind, values):
        hints = typing.get_type_hints(kind)
        return kind(**{k: build(hints[k], v) if dataclasses.is_dataclass(hints[k]) else v for k, v in values.items()})

    try:
        return build(Config, json.loads(text))  # clip_norm=inf is Infinity there, which msgspec refuses
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{origin}: is not a config of this version: {error}") from None
