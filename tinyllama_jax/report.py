"""A page about one or several runs: losses, speed, faults and restarts, scores, samples, and what differs between them.

python -m tinyllama_jax.report RUN [RUN ...]      writes the first RUN's report.html
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tinyllama_jax.base import cli
from tinyllama_jax.base.errors import UserError, run_main
from tinyllama_jax.base.files import check_local, write
from tinyllama_jax.planning import history, run_page
from tinyllama_jax.planning.history import UNIGRAM, unigram
from tinyllama_jax.run import metrics

__all__ = ["UNIGRAM", "curves_of", "draw", "main", "unigram"]


def draw(run: str | Path) -> Path:
    """Writes RUN/loss.png atomically and returns its path. Raises UserError if there is nothing to draw.

    Draws training and validation loss by step, the unigram model's loss, skipped steps, and below them `curves_of`.
    """
    run, rows = Path(run), metrics.read(run)
    train = list({row["step"]: row for row in rows if row.get("loss") is not None}.values())
    if not train:
        raise UserError(f"{run}: no step with a finite loss yet; {metrics.skipped(rows)}".removesuffix("; "))

    from matplotlib.figure import Figure  # half a second, which a mistaken command need not wait for

    steps, train_losses = np.array([(r["step"], r["loss"]) for r in train]).T
    tokens = [r["tokens"] for r in train if "tokens" in r]
    tokens = np.array(tokens if len(tokens) == len(train) else [])
    window = max(1, len(steps) // 50)  # the loss of one step is noisy
    mean = lambda values: np.convolve(values, np.full(window, 1 / window), "valid")
    curves = curves_of(train, steps, tokens, mean)

    figure = Figure(figsize=(8, 4 + 1.5 * len(curves)), layout="constrained")
    losses, *others = figure.subplots(1 + len(curves), 1, sharex=True, height_ratios=(4, *[1] * len(curves)))
    losses.plot(steps, train_losses, color="C0", alpha=0.25, linewidth=0.5, label="training")
    losses.plot(steps[window - 1 :], mean(train_losses), color="C0", linewidth=1.5, label=f"training, mean of {window}")
    if validation := [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]:
        label = f"validation, {validation[-1][1]:.3f} at the end"
        losses.plot(*zip(*validation, strict=True), "o-", color="C1", label=label)
    if (baseline := unigram(run)) is not None:
        losses.axhline(baseline, color="C3", linestyle="--", linewidth=1, label=f"unigram model, {baseline:.3f}")
    if left_out := [row["step"] for row in rows if row.get("finite") is False]:
        near_the_axis = {"transform": losses.get_xaxis_transform(), "label": f"skipped: {len(left_out):,}"}
        losses.plot(left_out, [0.02] * len(left_out), "|", color="C3", **near_the_axis)
    if len(tokens) > 1:
        _add_tokens(losses, steps, tokens)
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


def curves_of(train: list[dict], steps: np.ndarray, tokens: np.ndarray, mean: Callable) -> dict[str, dict]:
    """Label -> name -> values: the learning rate; tokens a step if they change; shares (`mean` of steps) of several sources."""
    curves = {"learning rate": {"": [row.get("lr", np.nan) for row in train]}}
    sizes = (np.diff(tokens) / np.diff(steps)).tolist() if len(tokens) else []  # of the steps since the line before
    if len(set(sizes)) > 1:
        curves["tokens a step"] = {"": [sizes[0], *sizes]}
    if names := dict.fromkeys(key for row in train for key in row if key.startswith("share/")):
        curves["share"] = {name.removeprefix("share/"): mean([row.get(name, np.nan) for row in train]) for name in names}
    return curves


def _add_tokens(axes, steps: np.ndarray, tokens: np.ndarray) -> None:
    """Adds an axis of tokens at the top of `axes`."""
    from matplotlib.ticker import EngFormatter

    rate = (tokens[-1] - tokens[-2]) / (steps[-1] - steps[-2])
    at = np.array([0, *steps, 2 * steps[-1]]), np.array([0, *tokens, tokens[-1] + steps[-1] * rate])
    axes.set_xlim(0, steps[-1])
    top = axes.secondary_xaxis("top", functions=(lambda x: np.interp(x, *at), lambda x: np.interp(x, *reversed(at))))
    top.set(xlabel="tokens")
    top.xaxis.set_major_formatter(EngFormatter(sep=""))


def main(argv: list[str]) -> int:
    """Writes the page, and the curves as pictures if asked; returns the exit code."""
    parser = cli.Parser("python -m tinyllama_jax.report", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run folder; several are laid over one another")
    parser.add_argument("--output", metavar="FILE", help="where to write the page (the first RUN's report.html)")
    parser.add_argument("--png", action="store_true", help="also write the curves as a picture, each RUN's loss.png")
    args = parser.parse_args(argv)
    for run in args.runs:
        check_local("RUN", run)
    if args.output is not None:
        check_local("--output", args.output)
    paths = list(dict.fromkeys(map(Path, args.runs)))
    for path in paths if args.png else ():
        print(draw(path))
    runs = [history.read(path) for path in paths]
    output = Path(args.output or paths[0] / "report.html")
    write(output, run_page.page(runs))
    print(output)
    for run in runs:
        for _, what in run.faults:
            print(f"{run.path}: {what}" if len(runs) > 1 else what)
    return 0


if __name__ == "__main__":
    run_main(main)
