"""Stops a run by itself: at a loss far above the losses before it, or after too many skipped steps in a row."""

import collections
import math
import shlex
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from tinyllama_jax.base import cli
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.run import metrics
from tinyllama_jax.run.cluster import EXIT_SPIKE

WINDOW, LEAST = 100, 10  # a loss is compared with at most and at least so many finite steps before it


class Spike(UserError):
    """Ends a run because of `train.spike` or `train.give_up`. Only process 0 has a message."""

    code = EXIT_SPIKE


class Watch:
    """Follows the losses of a run, in the same way in every process, so that all stop at the same step."""

    def __init__(self, config: Config, start: int, argv: list[str]):
        """`start`: the step before the first one here. `argv`: the arguments of the command, for the advice."""
        self.config, self.argv = config, argv
        self.losses, self.skipping_since, self.skipped_in_a_row = remembered(config.folder, start)
        self._above = 0.0

    def step(self, step: int, loss: float, finite: bool, predicts: bool) -> bool:
        """Records a step; returns whether its loss is a spike. `predicts`: whether the step had a token to predict."""
        if not finite:
            self.skipping_since = self.skipping_since if self.skipped_in_a_row else step
            self.skipped_in_a_row += 1
        elif predicts:
            self.skipped_in_a_row = 0
        learns = finite and predicts
        enough = len(self.losses) >= LEAST
        mean = math.fsum(self.losses) / len(self.losses) if enough else math.inf  # fsum is exact, so all processes agree
        self._above = loss - mean if learns else 0.0
        spike = 0 < self.config.train.spike < self._above
        if learns and not spike:
            self.losses.append(loss)
        return spike

    def check(self, step: int, loss: float, spike: bool) -> None:
        """Raises Spike if the run must stop after `step`, whose line is already written."""
        if spike:
            what = f"step {step:,}: loss {loss:.4f}, {self._above:.4f} nats above the mean of the {len(self.losses)} finite"
            what += f" steps before it (train.spike={self.config.train.spike:g}); nothing was saved after step {step - 1:,}"
            message = self._advice(what, step, step)
        elif self.skipped_in_a_row >= self.config.train.give_up:
            message = self.all_skipped(step, f"train.give_up={self.config.train.give_up}")
        else:
            return
        raise Spike(message if jax.process_index() == 0 else "")

    def all_skipped(self, step: int, reason: str) -> str:
        """The message after every step from `skipping_since` to `step` was skipped."""
        what = f"since step {self.skipping_since:,} all {self.skipped_in_a_row:,} steps, up to {step:,}, were skipped as not "
        what += f"finite ({reason}); if the weights are bad, resume from an older checkpoint with a lower optim.peak_lr"
        return self._advice(what, self.skipping_since, step)

    def state(self) -> dict[str, metrics.Value]:
        """The state that `remembered` reads back after a restart."""
        state = {"skipping_since": self.skipping_since, "skipped_in_a_row": self.skipped_in_a_row}
        return {"recent_losses": list(self.losses), **state}

    def _advice(self, what: str, first: int, last: int) -> str:
        """The message `what`, with the commands to replay the steps `first` to `last` and to train without them."""
        again = [sys.executable, "-m", "tinyllama_jax.train", *cli.skipping(self.argv, self.config.data, first, last)]
        look = [sys.executable, "-m", "tinyllama_jax.replay", "--run", str(self.config.folder), "--step", str(first)]
        return (
            f"{what}. To look at {'it' if first == last else 'the first'}:\n    {shlex.join(look)}\n"
            f"To resume from the checkpoint before it without {'its batch' if first == last else 'these batches'}:\n"
            f"    {shlex.join(again)}"
        )


def remembered(run: str, step: int) -> tuple[collections.deque[float], int, int]:
    """(the last finite losses up to `step`, the first of the skipped steps in a row, the number of these).

    Process 0 reads them from RUN/metrics.jsonl, where each save writes `Watch.state`, and broadcasts them.
    """
    losses, row = np.full(WINDOW, np.nan, np.float32), np.zeros(2, np.int32)
    if jax.process_index() == 0 and step:
        last: list[float] = []
        for values in metrics.tail(run):
            if values.get("finite") and values.get("loss") is not None:
                last.append(values["loss"])
            if "recent_losses" in values:
                last = values["recent_losses"]
                row[:] = values["skipping_since"], values["skipped_in_a_row"]
        losses[: len(last[-WINDOW:])] = last[-WINDOW:]
    losses, (since, in_a_row) = multihost_utils.broadcast_one_to_all((losses, row))
    return collections.deque(losses[np.isfinite(losses)].tolist(), maxlen=WINDOW), int(since), int(in_a_row)
