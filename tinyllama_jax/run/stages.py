"""What changes over a run's tokens: learning rate, batch size and mixture, stage by stage."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from tinyllama_jax.base import schedule
from tinyllama_jax.base.config import Config, knots_of, weight_at
from tinyllama_jax.core import optim
from tinyllama_jax.data import feed
from tinyllama_jax.data.blocks import Blocks


def stages(config: Config) -> list[dict]:
    """The run in parts within which all that changes changes steadily, in order.

    Each: "steps" (first, last), "tokens" before and after it, "tokens_per_step", and the "lr" and "shares" of the sources (name
    -> share of the sequences) at its begin and end.
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
    for first, then in itertools.pairwise(edges):
        tokens = train.tokens_after(first), train.tokens_after(then)
        ends = [shares(config, knots.get(step, t)) for step, t in zip((first, then), tokens, strict=True)]
        out.append(
            {
                "steps": (first + 1, then),
                "tokens": tokens,
                "tokens_per_step": train.tokens_after(first + 1) - tokens[0],
                "lr": (float(rate(first)), float(rate(then))),
                "shares": {name: (ends[0][name], ends[1][name]) for name in ends[0]},
            }
        )
    return out


def step_at(config: Config, tokens: float) -> int:
    """How many steps are done when `tokens` have been seen."""
    first, before, each = next(stage for stage in reversed(config.train.stages) if stage[1] <= tokens)
    return first + math.ceil((tokens - before) / each)


def shares(config: Config, tokens: float) -> dict[str, float]:
    """The share of each source after so many tokens, by name."""
    weights = [weight_at(weight, tokens) for weight in config.data.sources.values()]
    return {n: float(w / sum(weights)) for n, w in zip(feed.names(config.data.sources), weights, strict=True)}


def lines(config: Config) -> list[str]:
    """`stages` for a person, a line each."""
    out = []
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


def short(n: float) -> str:
    """1.5e12 as 1.5T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if n >= size:
            return f"{n / size:.4g}{unit}"
    return f"{n:,.0f}"


def epochs(config: Config, sources: list[Blocks]) -> list[str]:
    """How often each source is read over by the end of the run, a line for those of more than `feed.MANY_EPOCHS` times."""
    order = feed.order(config, sources)
    times = order.counts(config.train.steps) / np.array(order.sizes)
    return [
        f"warning: {path} is read {n:,.1f} times over by the end; beyond {feed.MANY_EPOCHS} times data are worth ever less "
        "than new ones (Muennighoff et al., arXiv:2305.16264)"
        for path, n in zip(config.data.sources, times.tolist(), strict=True)
        if n > feed.MANY_EPOCHS
    ]
