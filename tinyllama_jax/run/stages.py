"""The stages of a run (learning rate, batch size and mixture over its tokens), and the description printed at its start."""

import dataclasses
import itertools
import math
import os

import jax
import numpy as np

from tinyllama_jax.base import dims, mixture_weights, schedule
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.mixture_weights import knots_of, weight_at
from tinyllama_jax.core import optim, xla
from tinyllama_jax.core.program import Program, attention_scope, choose_attention
from tinyllama_jax.data import feed
from tinyllama_jax.data.blocks import Blocks


def stages(config: Config) -> list[dict]:
    """The stages of a run in order: within each, learning rate and shares change without a kink.

    Each: "steps" (first, last), "tokens" before and after it, "tokens_per_step", "lr" at its begin and end, and "shares":
    source name -> share of the sequences at its begin and end.
    """
    config = dataclasses.replace(config, train=schedule.in_steps(config))
    train, last = config.train, config.train.steps
    at = {0, last, *(first for first, _, _ in train.stages)}
    knots = {step_at(config, t): t for weight in config.data.sources.values() for t, _ in knots_of(weight)}
    at |= knots.keys()
    end = train.tokens // train.tokens_per_step
    base_steps = [config.optim.warmup_steps, config.optim.decay_steps or end, end - config.optim.cooldown_steps]
    at |= {step_at(config, steps * train.tokens_per_step) for steps in base_steps}
    edges = sorted(step for step in at if 0 <= step <= last)
    rate, out = optim.schedule(config.optim, train), []
    for edge in itertools.pairwise(edges):
        tokens = tuple(map(train.tokens_after, edge))
        begin, end = (shares(config, knots.get(step, t)) for step, t in zip(edge, tokens, strict=True))
        each = train.tokens_after(edge[0] + 1) - tokens[0]
        stage = {"steps": (edge[0] + 1, edge[1]), "tokens": tokens, "tokens_per_step": each}
        stage["lr"] = tuple(float(rate(step)) for step in edge)
        out.append(stage | {"shares": {name: (begin[name], end[name]) for name in begin}})
    return out


def step_at(config: Config, tokens: float) -> int:
    """The number of steps after which `tokens` have been seen."""
    first, before, each = next(stage for stage in reversed(config.train.stages) if stage[1] <= tokens)
    return first + math.ceil((tokens - before) / each)


def shares(config: Config, tokens: float) -> dict[str, float]:
    """Source name -> share of the sequences after `tokens` tokens."""
    weights = [weight_at(weight, tokens) for weight in config.data.sources.values()]
    return {n: float(w / sum(weights)) for n, w in zip(feed.names(config.data.sources), weights, strict=True)}


def lines(config: Config) -> list[str]:
    """A line of text about `lora`, if it is on, and one for each of `stages`."""
    out = adapters(config)
    for stage in stages(config):
        (a, b), (before, after) = stage["steps"], stage["tokens"]
        span = lambda ends, form: " to ".join(dict.fromkeys(form.format(x) for x in ends))
        rounded = {name: [round(share, 4) for share in ends] for name, ends in stage["shares"].items()}
        mixed = ", ".join(f"{name} {span(ends, '{:g}')}" for name, ends in rounded.items() if any(ends))
        out.append(
            f"steps {a:,} to {b:,}: {short(before)} to {short(after)} tokens, {stage['tokens_per_step']:,} a step; "
            f"learning rate {span(stage['lr'], '{:.3g}')}; {mixed}"
        )
    return out


def adapters(config: Config) -> list[str]:
    """A line on what trains and what is frozen; none without `lora`."""
    if not config.lora.rank:
        return []
    trained = sum(math.prod(a.shape) for a in dims.arrays(config.model, config.lora) if a.trains)
    kept = {"": "float32", "bfloat16": "bfloat16", "nf4": "nf4 (4.127 bits a number; embedding and head in bfloat16)"}
    return [
        f"lora: rank {config.lora.rank}, alpha {config.lora.alpha:g}, on {config.lora.targets}: {trained:,} parameters train; "
        f"the weights are frozen in {kept[config.lora.base]}"
    ]


def short(n: float) -> str:
    """A number of tokens in short: 1.5e12 as 1.5T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if n >= size:
            return f"{n / size:.4g}{unit}"
    return f"{n:,.0f}"


def epochs(config: Config, sources: list[Blocks]) -> list[str]:
    """A warning for each source that the run reads more than `feed.MANY_EPOCHS` times."""
    order = feed.order(config, sources)
    times = order.counts(config.train.steps) / np.array(order.sizes)
    return [
        f"warning: {path} is read {n:,.1f} times by the end; beyond {feed.MANY_EPOCHS} times repeated data are worth less and "
        "less (Muennighoff et al., arXiv:2305.16264)"
        for path, n in zip(config.data.sources, times.tolist(), strict=True)
        if n > feed.MANY_EPOCHS
    ]


def describe(
    config: Config, mesh: jax.sharding.Mesh, program: Program, sources: list[Blocks], held_out: dict[str, Blocks]
) -> list[str]:
    """Lines on model, attention and its reason, mesh, batch, data, stages, XLA's options: nothing falls back silently."""
    model, (accumulation, batch) = config.model, program.shape
    impl, reason = choose_attention(config, mesh.devices.flat[0])
    named = zip(config.data.sources.items(), sources, strict=True)
    data = ", ".join(f"{mixture_weights.text(w)} x {p} ({len(s):,} blocks)" for (p, w), s in named)
    splits = ", ".join(f"{p} ({len(b):,} blocks)" for p, b in held_out.items()) or "none: no source has that split"
    absent = [f"; {p} has no such split" for p in config.data.sources if held_out and p not in held_out]
    missing = [(s.directory, files) for s in sources if (files := s.missing())]
    given = os.environ.get("SLURM_GPUS_ON_NODE")
    return [
        f"model: {dims.n_parameters(model):,} parameters, {model.precision}, "
        f"residual {model.residual_dtype}, remat {model.remat}",
        f"attention: {impl} ({reason}), {attention_scope(config)} documents; "
        f"loss: xla, {model.loss_chunk:,} tokens' logits at a time",
        f"mesh: {dict(mesh.shape)}, {mesh.size} of {jax.device_count()} devices of {jax.devices()[0].device_kind}, "
        f"{jax.local_device_count()} a process" + (f"; Slurm gave each host {given} GPUs" if given else ""),
        f"step: {config.train.tokens_per_step:,} tokens = {accumulation} micro-batches x {batch} sequences x {model.seq_len:,}",
        f"data: {data}",
        *(f"warning: {folder}: {len(files):,} files are missing, such as {files[0]}" for folder, files in missing),
        f"validation: {splits}{''.join(absent)}",
        *lines(config),
        *epochs(config, sources),
        *xla.lines(config, mesh),
    ]
