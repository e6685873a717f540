"""A run as a picture, from its metrics.jsonl: its losses, its learning rate, and the batch and mixture if they change.

python -m tinyllama_jax.report RUN      writes RUN/loss.png
"""

from __future__ import annotations

import argparse
import typing
from pathlib import Path

import numpy as np

from tinyllama_jax.base.errors import UserError, run_main
from tinyllama_jax.base.files import check_local, read_json
from tinyllama_jax.run import metrics

UNIGRAM = "unigram.json"  # {"val_loss": ...} of a unigram model on the run's validation tokens, where somebody computed it


class Baseline(typing.TypedDict):
    """unigram.json."""

    val_loss: float


def draw(run: str | Path) -> Path:
    """Writes RUN/loss.png: training and validation loss by step, the unigram model's line, and the learning rate.

    Tokens a step and the sources' shares (means of as many steps as the loss's) too, where there is more than one of them;
    and a mark for each step that was skipped.

    Returns its path. The old picture stays until the new one is whole. Raises UserError if there is nothing to draw.
    """
    run = Path(run)
    everything = metrics.read(run)
    of_steps = {row["step"]: row for row in everything if row.get("loss") is not None}  # without the rows of validations
    train = list(of_steps.values())
    validation = [row for row in everything if row.get("val_loss") is not None]
    if not train:
        raise UserError(f"{run}: no step with a finite loss yet; {metrics.skipped(everything)}".removesuffix("; "))

    from matplotlib.figure import Figure  # half a second, which a mistaken command need not wait for
    from matplotlib.ticker import EngFormatter

    steps, train_losses = np.array([(r["step"], r["loss"]) for r in train]).T
    curves = {"learning rate": {"": [r.get("lr", np.nan) for r in train]}}
    tokens = [r["tokens"] for r in train if "tokens" in r]
    tokens = tokens if len(tokens) == len(train) else []
    if tokens:
        sizes = np.diff(tokens) / np.diff(steps)  # of the steps since the line before
        curves |= {"tokens a step": {"": [*sizes[:1], *sizes]}} if len(set(sizes)) > 1 else {}
    window = max(1, len(steps) // 50)  # a step of few tokens says little by itself
    mean = lambda values: np.convolve(values, np.full(window, 1 / window), "valid")
    if names := dict.fromkeys(key for r in train for key in r if key.startswith("share/")):
        curves["share"] = {name.removeprefix("share/"): mean([r.get(name, np.nan) for r in train]) for name in names}
    figure = Figure(figsize=(8, 4 + 1.5 * len(curves)), layout="constrained")
    losses, *others = figure.subplots(1 + len(curves), 1, sharex=True, height_ratios=(4, *[1] * len(curves)))
    losses.plot(steps, train_losses, color="C0", alpha=0.25, linewidth=0.5, label="training")
    losses.plot(steps[window - 1 :], mean(train_losses), color="C0", linewidth=1.5, label=f"training, mean of {window}")
    if validation:
        label = f"validation, {validation[-1]['val_loss']:.3f} at the end"
        losses.plot([r["step"] for r in validation], [r["val_loss"] for r in validation], "o-", color="C1", label=label)
    baseline = unigram(run)
    if baseline is not None:
        losses.axhline(baseline, color="C3", linestyle="--", linewidth=1, label=f"unigram model, {baseline:.3f}")
    if left_out := [row["step"] for row in everything if row.get("finite") is False]:
        near_the_axis = {"transform": losses.get_xaxis_transform(), "label": f"skipped: {len(left_out):,}"}
        losses.plot(left_out, [0.02] * len(left_out), "|", color="C3", **near_the_axis)
    if len(tokens) > 1:
        at, there = [0, *steps, 2 * steps[-1]], [0, *tokens, tokens[-1] + steps[-1] * sizes[-1]]
        losses.set_xlim(0, steps[-1])
        top = losses.secondary_xaxis("top", functions=(lambda x: np.interp(x, at, there), lambda x: np.interp(x, there, at)))
        top.set(xlabel="tokens")
        top.xaxis.set_major_formatter(EngFormatter(sep=""))
    losses.set(ylabel="loss, nats a token", title=str(run))
    losses.legend()
    for axes, (what, lines) in zip(others, curves.items(), strict=True):
        for i, (name, values) in enumerate(lines.items()):
            axes.plot(steps[len(steps) - len(values) :], values, color=f"C{2 + i}", linewidth=1, label=name or what)
        axes.set(ylabel=what, ylim=(0, None))
        if len(lines) > 1:
            axes.legend(fontsize=7)
    others[-1].set(xlabel="step")
    for axes in (losses, *others):
        axes.grid(alpha=0.3)

    path, partial = run / "loss.png", run / ".loss.partial.png"
    figure.savefig(partial, dpi=120)
    partial.replace(path)
    return path


def unigram(run: Path) -> float | None:
    """The unigram model's validation loss, or None where nobody computed it."""
    path = run / UNIGRAM
    return read_json(path, Baseline)["val_loss"] if path.exists() else None


def main(argv: list[str]) -> int:
    """Draws; returns the exit code."""
    parser = argparse.ArgumentParser("python -m tinyllama_jax.report", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", help="a run folder")
    run = parser.parse_args(argv).run
    check_local("RUN", run)
    print(*filter(None, (draw(run), metrics.skipped(metrics.read(run)))), sep="\n")
    return 0


if __name__ == "__main__":
    run_main(main)
