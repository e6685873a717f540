"""The report of `plan --law`: the scaling laws of `laws.py` for a budget and for a model."""

import argparse
import json
from pathlib import Path

import numpy as np

from tinyllama_jax.base import cli, dims
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.planning import laws


def law(args: argparse.Namespace, overrides: list[str]) -> int:
    """Prints what the laws predict for a budget and for a model, and draws the curve; returns the exit code."""
    for name in ("on", "sweep", "price", "mfu"):
        if getattr(args, name):
            raise UserError(f"--{name}: is not an option of --law; its prices are --train-price and so on, see --help")
    if overrides:
        raise UserError(f"{overrides[0]}: is not an option of --law")
    prices = laws.Prices(**{name: getattr(args, name) for name in vars(laws.Prices())})
    own = laws.TINYLLAMA
    if args.config:
        config = cli.read(args.config)
        own = laws.Run(dims.n_parameters(config.model), config.train.tokens)
    fit, tokens = laws.LAWS[args.fit], args.inference_tokens if args.law == "inference" else 0.0
    if tokens * prices.weight > 1e30:
        each = f"at these prices each counts for {prices.weight:.3g} of training"
        raise UserError(f"--inference-tokens={tokens:g}: {each}, more than 1e30 in all; correct a price, or give fewer tokens")
    flops, picture = args.flops or own.flops(), args.picture or Path("plan-law.png")
    best, past = laws.compute_optimal(fit, flops), laws.overtrained(fit, *own)
    curve = laws.tradeoff(fit, past.loss, tokens, own.size * 2.0 ** np.arange(-1, 6, 0.05))
    money = laws.money_optimal(fit, past.loss, tokens, prices)
    draw_law(curve, own, tokens, picture)
    if args.json:
        out = {"fit": args.fit, "source": fit.source, "flops": flops, "compute_optimal": best._asdict(),
               "model": own._asdict() | {"loss": past.loss, "over_training": past.factor},
               "model_is_optimal_from_inference_tokens": past.inference_tokens,
               "same_loss_cheapest": past.cheapest._asdict(), "inference_tokens": tokens,
               "same_loss_optimum": curve.optimum._asdict(), "same_loss_dollar_optimum": money._asdict()}  # fmt: skip
        print(json.dumps(out | {"picture": str(picture)}, indent=1))
        return 0
    text = lambda run: f"{run.size / 1e9:.2f}B parameters on {run.tokens / 1e9:,.0f}B tokens"
    print(f"{fit.source}: E={fit.E} A={fit.A} B={fit.B} alpha={fit.alpha} beta={fit.beta}")
    print(f"the lowest loss for {flops:.3g} training FLOPs: {text(best)}, loss {fit.loss(*best):.3f}")
    print(f"this model: {text(own)}, {own.tokens / own.size:,.0f} a parameter; loss {past.loss:.3f} by the law")
    print(f"the fewest training FLOPs for that loss: {text(past.cheapest)}; this model takes {past.factor:.2f} times as many")
    if tokens:
        print(f"the fewest FLOPs for that loss with {tokens:.3g} inference tokens: {text(curve.optimum)}")
        costs = [f"{prices.dollars(run, tokens):,.0f} USD" for run in (money, own)]
        print(f"the fewest dollars: {text(money)}, {costs[0]}; this model {costs[1]}")
    if past.inference_tokens is not None:
        dollars = past.inference_tokens / prices.weight
        print(f"it is optimal for its loss at {past.inference_tokens:.3g} inference tokens by FLOPs, {dollars:.3g} by dollars")
    print(f"picture: {picture}")
    return 0


def draw_law(curve: laws.Tradeoff, own: laws.Run, tokens: float, path: Path) -> None:
    """Draws FLOPs of training and inference against size, at the loss of the model `own`, a point on the curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    label = f"with {tokens:.3g} inference tokens" if tokens else "training"
    axes.plot(curve.sizes / 1e9, curve.flops, label=f"the same loss, {label}")
    axes.plot(own.size / 1e9, own.flops(tokens), "o", color="C3", label=f"{own.size / 1e9:.2f}B on {own.tokens / 1e12:.2f}T")
    axes.plot(curve.optimum.size / 1e9, curve.optimum.flops(tokens), "*", color="C2", markersize=12,
              label=f"optimum: {curve.optimum.size / 1e9:.2f}B on {curve.optimum.tokens / 1e12:.2f}T")  # fmt: skip
    axes.set(xlabel="parameters, 10^9", ylabel="FLOPs", xscale="log", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
