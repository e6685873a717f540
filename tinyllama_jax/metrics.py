"""What a run writes down: metrics.jsonl, TensorBoard, W&B, the progress line."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import rich.console
import rich.progress
from jax.experimental import multihost_utils
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from tinyllama_jax import cli, dims, processes, report, targets
from tinyllama_jax.config import Config
from tinyllama_jax.data import feed
from tinyllama_jax.data import skip as skip_lib
from tinyllama_jax.errors import UserError, close_stream, disk_error
from tinyllama_jax.files import open_regular


class Clock:
    """Time of the steps between two reports, with evaluation left out and waits counted apart."""

    def __init__(self, config: Config, start: int, mesh_size: int, device_kind: str):
        self.tokens_after, self._devices = skip_lib.in_steps(config).tokens_after, mesh_size
        self._flops, target = dims.flops_per_token(config.model), targets.of(device_kind)
        self._peak = target.flops if target else None
        self._since, self._step = time.perf_counter(), start
        self._spent = {"data_wait": 0.0, "checkpoint": 0.0, "elsewhere": 0.0}

    @contextlib.contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        """Counts the time of the block as "data_wait", "checkpoint" (both part of a step) or "elsewhere" (not)."""
        before = time.perf_counter()
        yield
        self._spent[what] += time.perf_counter() - before

    def lap(self, step: int) -> dict[str, float]:
        """Means a step since the last lap: tokens/s, TFLOP/s (MFU where the peak is known), seconds, and of those waited."""
        now = time.perf_counter()
        steps = max(step - self._step, 1)
        seconds = max(now - self._since - self._spent["elsewhere"], 1e-9)
        rate = (self.tokens_after(step) - self.tokens_after(self._step)) / seconds
        out = {
            "tokens_per_second": rate,
            "step_seconds": seconds / steps,
            "data_wait_seconds": self._spent["data_wait"] / steps,
            "checkpoint_seconds": self._spent["checkpoint"] / steps,
        }
        for convention, flops in self._flops.items():
            out[f"tflops_per_device_{convention}"] = flops * rate / self._devices / 1e12
            if self._peak:
                out[f"mfu_{convention}"] = flops * rate / self._devices / self._peak
        self._since, self._step, self._spent = now, step, dict.fromkeys(self._spent, 0.0)
        return out


class Writer:
    """Writes each step's numbers to RUN/metrics.jsonl, RUN/tensorboard and, when asked, W&B."""

    def __init__(self, config: Config, start: int):
        """What an earlier process wrote of the steps after `start`, which will be done again, is taken out."""
        run = Path(config.workdir)
        self._wandb = _wandb(config) if config.log.wandb else None
        truncate_after(run / "metrics.jsonl", start)
        self._jsonl = (run / "metrics.jsonl").open("a")
        threading.excepthook = _in_thread
        self._events = EventFileWriter(str(run / "tensorboard"))
        # TensorBoard drops the later steps of the event files before this one
        self._events.add_event(Event(wall_time=time.time(), step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, report.Value]) -> None:
        """One line of metrics.jsonl: {"step": step, ...}. Floats read back to the same bits; NaN and inf are null."""
        values = {k.encode(errors="backslashreplace").decode(): v for k, v in values.items()}  # folder names not in UTF-8
        strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._jsonl.write(json.dumps({"step": step, **strict}, allow_nan=False) + "\n")
        self._jsonl.flush()
        scalars = {k: float(v) for k, v in values.items() if k != "checksum" and isinstance(v, int | float)}
        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in scalars.items()])
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def sync(self) -> None:
        """Returns when all lines are on the disk itself."""
        self._jsonl.flush()
        os.fsync(self._jsonl.fileno())

    def close(self) -> None:
        """Flushes everything to disk."""
        self.sync()
        self._jsonl.close()
        self._events.close()
        if self._wandb:
            self._wandb.finish()


def _in_thread(error: threading.ExceptHookArgs) -> None:
    """Ignores an OSError (a full disk) in TensorBoard's thread: the next event raises it in the main thread."""
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


def _wandb(config: Config):
    try:
        import wandb
    except ImportError:
        raise UserError(f"--log.wandb={config.log.wandb}: W&B is not installed; pip install wandb") from None
    name = Path(config.workdir).name
    return wandb.init(project=config.log.wandb, name=name, id=name, resume="allow", dir=config.workdir)


def truncate_after(path: Path, step: int) -> None:
    """Cuts the lines of steps after `step`, and a last line cut short by a kill, off a metrics file. Reads only its end."""
    if not path.exists():
        return
    open_regular(path).close()  # refuses a pipe, which would be read without end
    with path.open("rb+") as f:
        keep, good, bad = f.seek(0, os.SEEK_END), 0, 0
        while keep > 0:
            line_start = _line_start(f, keep)
            f.seek(line_start)
            line = f.read(keep - line_start)
            try:
                if line.endswith(b"\n") and report.line(line)["step"] <= step:
                    break
                good += line.endswith(b"\n")
            except ValueError:
                bad += 1  # a line cut short by a full disk or a power cut is dropped
            keep = line_start
        if not keep and bad > 1 > good:
            raise UserError(f"{path}: none of its lines up to step {step:,} can be read; move it away, or mend it")
        f.truncate(keep)


def _line_start(f, end: int) -> int:
    """Where the line that ends at `end` (its newline included) begins."""
    block, at = 4096, end - 1  # not the line's own newline
    while at > 0:
        first = max(0, at - block)
        f.seek(first)
        newline = f.read(at - first).rfind(b"\n")
        if newline >= 0:
            return first + newline + 1
        at = first
    return 0


class Progress:
    """A live line on a terminal (step, loss, tokens/s, time left); elsewhere a plain line every ten seconds."""

    def __init__(self, start: int, steps: int, stop: list[signal.Signals]):
        """`stop`: the list of `processes.stop_on_signal`; SIGPIPE is added to it when the output can no longer be written."""
        self.console, self._stop, self._lost = rich.console.Console(highlight=False), stop, False
        self._steps, self._last = steps, 0.0
        self._first = self._bar = None  # (the first step shown, when), for the time left: it excludes compilation
        if self.console.is_terminal:
            columns = (
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
            )
            self._bar = rich.progress.Progress(*columns, console=self.console, speed_estimate_period=60)
            self._task = self._bar.add_task("starting", total=steps, completed=start)
            self._bar.start()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows the state of the run after `step`."""
        text = f"step {step:,}/{self._steps:,}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif not self._lost and (time.monotonic() - self._last > 10 or step == self._steps):
            self._last = time.monotonic()
            first, began = self._first = self._first or (step, self._last)
            if first < step < self._steps:
                text += f", {cli.time_left((self._last - began) / (step - first) * (self._steps - step))} left"
            self.say(text)

    def say(self, text: str) -> None:
        """Prints a line, above the live one if there is one; on standard error once standard output takes no more."""
        try:
            if self._bar and not self._lost:
                self.console.print(text, soft_wrap=True, markup=False)
            else:
                print(text, flush=True, file=sys.stderr if self._lost else sys.stdout)
        except OSError as error:
            close_stream(sys.stderr if self._lost else sys.stdout)
            if not self._lost:
                self._lost = True
                self._stop.append(signal.SIGPIPE)
                self.say(f"standard output: {disk_error(error)}: the run saves and ends")

    def close(self) -> None:
        """Leaves the last state on the screen."""
        if self._bar:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._bar.stop()


class Silent:
    """The `Writer` and the `Progress` of a process that writes nothing because another one does."""

    def write(self, step: int, values: dict) -> None: ...
    def update(self, step: int, loss: float, tokens_per_second: float) -> None: ...
    def say(self, text: str) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


BEFORE, LEAST = 100, 10  # finite steps that a loss is compared with, and how many there must be


class Spike(UserError):
    """Ends a run by `train.spike` or `train.give_up`. Only process 0 has a message."""

    code = processes.SPIKE


class Reporter:
    """Fetches the numbers of a finished step and writes them down."""

    def __init__(self, config, sources, writer, progress, clock, start: int, argv: list[str]):
        """`start`: the step before the first one here. `argv`: what the run was started with."""
        self.argv = argv
        self.losses, self.since, self.in_a_row = remembered(Path(config.workdir), start)
        self.config, self.sources, self.writer, self.progress, self.clock = config, sources, writer, progress, clock
        self.order, self.names = feed.order(config, sources), feed.names(config.data.sources)
        self.counts = self.order.counts(start)  # samples read of each source up to the last line written
        self.pending: tuple[int, dict] | None = None

    def report(self, always: bool = False) -> None:
        """Writes the pending step's line if `log.every` is due, the step was skipped or a spike, or `always`. Raises Spike."""
        if self.pending is None:
            return
        (step, on_device), self.pending = self.pending, None
        on_host = jax.device_get(on_device)
        values = {name: np.asarray(value).item() for name, value in on_host.items() if not name.startswith("source_")}
        finite, predicts = values["finite"], values["real_tokens"] > 0
        if not finite:
            self.since, self.in_a_row = (self.since if self.in_a_row else step), self.in_a_row + 1
        elif predicts:
            self.in_a_row = 0
        mean = math.fsum(self.losses) / len(self.losses) if len(self.losses) >= LEAST else math.inf  # exact: alike everywhere
        above = values["loss"] - mean if finite and predicts else 0.0
        spike = 0 < self.config.train.spike < above
        if finite and predicts and not spike:
            self.losses.append(values["loss"])
        if step % self.config.log.every and finite and not spike and not always:
            return
        values |= self.clock.lap(step) | {"tokens": self.clock.tokens_after(step)}
        before, self.counts = self.counts, self.order.counts(step)
        named = lambda what, numbers: {f"{what}/{name}": n for name, n in zip(self.names, numbers.tolist(), strict=True)}
        values |= named("epochs", self.counts / np.array(self.order.sizes))
        if "source_loss" in on_host:  # NaN: none in this step
            since = self.counts - before  # the last such line
            values |= named("share", since / since.sum()) | named("loss", on_host["source_loss"])
        if not finite or spike:
            source, block = self.order.at(step)
            values["blocks"] = json.dumps([source.tolist(), block.tolist()])
        if not finite:
            self.progress.say(
                f"step {step:,}: loss, gradient or new weights not finite (loss {values['loss']}); weights unchanged, "
                f"{values['skipped']} such steps so far; its blocks are in metrics.jsonl"
            )
        elif not predicts:
            self.progress.say(f"step {step:,}: has no token to predict; weights unchanged")
        self.writer.write(step, values)
        self.progress.update(step, values["loss"], values["tokens_per_second"])
        if spike:
            what = f"step {step:,}: loss {values['loss']:.4f}, {above:.4f} nats above the mean of the {len(self.losses)} finite"
            what += f" steps before it (train.spike={self.config.train.spike:g}); nothing was saved after step {step - 1:,}"
            raise Spike(self.how_to_go_on(what, step, step) if jax.process_index() == 0 else "")
        if self.in_a_row >= self.config.train.give_up:
            what = self.all_skipped(step, f"train.give_up={self.config.train.give_up}")
            raise Spike(what if jax.process_index() == 0 else "")

    def end(self, step: int) -> int:
        """The exit code of a run that ends at `step`: SPIKE, with a message, if its last steps were skipped, else 0."""
        if self.in_a_row < min(2, self.config.train.steps):  # a single one merely lowers fp16's loss scale
            return 0
        self.progress.say("error: " + self.all_skipped(step, "the run ends there"))
        return processes.SPIKE

    def all_skipped(self, step: int, why: str) -> str:
        """The message when all steps of late, up to `step`, were skipped."""
        what = f"since step {self.since:,} all {self.in_a_row:,} steps, up to {step:,}, were skipped as not finite ({why})"
        what += "; if the weights are bad, go on from an older checkpoint with a lower optim.peak_lr"
        return self.how_to_go_on(what, self.since, step)

    def remember(self, step: int) -> None:
        """Writes with a save what `train.spike` and `train.give_up` need to go on after a restart."""
        state = {"recent_losses": list(self.losses), "skipping_since": self.since, "skipped_in_a_row": self.in_a_row}
        self.writer.write(step, state)

    def how_to_go_on(self, what: str, first: int, last: int) -> str:
        """`what` happened in the steps `first` to `last`, and the commands for what to do about it."""
        again = [sys.executable, "-m", "tinyllama_jax.train"]
        again += cli.skipping(self.argv, self.config.data, first, last)
        look = [sys.executable, "-m", "tinyllama_jax.replay", "--run", self.config.workdir, "--step", str(first)]
        return (
            f"{what}. To look at {'it' if first == last else 'the first'}:\n    {shlex.join(look)}\n"
            f"To go on from the checkpoint before it without {'its batch' if first == last else 'these batches'}:\n"
            f"    {shlex.join(again)}"
        )


def remembered(run: Path, step: int) -> tuple[collections.deque[float], int, int]:
    """(the last finite losses up to `step`, the first of the skipped steps in a row, how many those are).

    Process 0 reads them from RUN/metrics.jsonl, where `Reporter.remember` wrote them, and sends them to all processes.
    """
    losses, row, path = np.full(BEFORE, np.nan, np.float32), np.zeros(2, np.int32), run / "metrics.jsonl"
    if jax.process_index() == 0 and step and path.is_file():
        last: list[float] = []
        with path.open("rb") as f:
            f.seek(max(f.seek(0, os.SEEK_END) - (1 << 20), 0))  # 100 lines and as many of validation are a tenth of it
            for text in f:
                with contextlib.suppress(ValueError):  # the first line may be cut
                    values = report.line(text)
                    if values.get("finite") and values.get("loss") is not None:  # all that older versions wrote
                        last.append(values["loss"])
                    if "recent_losses" in values:
                        last = values["recent_losses"]
                        row[:] = values["skipping_since"], values["skipped_in_a_row"]
        losses[: len(last[-BEFORE:])] = last[-BEFORE:]
    losses, (since, in_a_row) = multihost_utils.broadcast_one_to_all((losses, row))
    return collections.deque(losses[np.isfinite(losses)].tolist(), maxlen=BEFORE), int(since), int(in_a_row)
