"""The progress line of a run, its speed, where its time goes, and the duration of its start."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator

import jax
import rich.console
import rich.progress

from tinyllama_jax.base import cli, dims, schedule
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import close_stream, disk_error
from tinyllama_jax.run import goodput


class Timer:
    """The speed of a run between two lines of its log, and where its time goes. Validation does not count in the speed."""

    def __init__(self, config: Config, start: int, devices: int, peak_flops: float | None, parts: dict | None = None):
        """`parts`: of the run's time until this moment, from `goodput.carried`; none in a process that writes no log."""
        self.tokens_after, self._devices = schedule.in_steps(config).tokens_after, devices
        self._flops, self._peak = dims.flops_per_token(config.model), peak_flops
        self._since = self._charged = time.perf_counter()
        self._step, self._spent = start, dict.fromkeys(goodput.PARTS, 0.0)
        self._parts = parts or dict.fromkeys(goodput.PARTS, 0.0)
        self._doing = "restarting" if self._parts["restarting"] else "starting"

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Counts the time of the block as "data_wait", "saving" (both part of a step) or "evaluating" (not)."""
        self._charge(self._doing)
        with jax.profiler.TraceAnnotation(what):
            yield
        before = self._charged
        self._charge(what if what == "evaluating" or self._doing == "productive" else self._doing)
        self._spent[what] += self._charged - before

    def _charge(self, part: str) -> None:
        """Counts the time since the last call as `part`."""
        before, self._charged = self._charged, time.perf_counter()
        self._parts[part] += self._charged - before

    def started(self) -> float:
        """Takes note that the first step is done; returns the seconds in which weights were scored before it."""
        self._charge(self._doing)
        self._doing = "productive"
        return self._spent["evaluating"]

    def account(self) -> dict[str, float]:
        """Where the time of the run went so far: see `goodput.keys`."""
        self._charge(self._doing)
        return goodput.keys(self._parts)

    def lap(self, step: int) -> dict[str, float]:
        """Tokens so far, tokens/s, TFLOP/s, MFU (if the peak is known), seconds a step and seconds of waiting a step."""
        at, steps = time.perf_counter(), max(step - self._step, 1)
        seconds = max(at - self._since - self._spent["evaluating"], 1e-9)
        rate = (self.tokens_after(step) - self.tokens_after(self._step)) / seconds
        out = {
            "tokens": self.tokens_after(step),
            "tokens_per_second": rate,
            "step_seconds": seconds / steps,
            "data_wait_seconds": self._spent["data_wait"] / steps,
            "checkpoint_seconds": self._spent["saving"] / steps,
        }
        for convention, flops in self._flops.items():
            out[f"tflops_per_device_{convention}"] = flops * rate / self._devices / 1e12
            if self._peak:
                out[f"mfu_{convention}"] = flops * rate / self._devices / self._peak
        self._since, self._step, self._spent = at, step, dict.fromkeys(self._spent, 0.0)
        return out


class Startup:
    """The duration of each part of a run's start."""

    def __init__(self, imports: float | None):
        """`imports`: seconds that the process's imports took; None if it began for something else."""
        self._parts = [] if imports is None else [("imports", imports)]
        self._since = time.perf_counter()
        self.began = time.time() - (imports or 0.0)

    def mark(self, what: str) -> None:
        """Ends the part `what`."""
        at = time.perf_counter()
        self._parts.append((what, at - self._since))
        self._since = at

    def line(self, scored: float) -> str:
        """Ends the last part, compilation and the first step; returns a line with the duration of each.

        `scored`: seconds of that part in which weights were scored, listed apart.
        """
        if scored:
            self._parts.append(("scores", scored))
            self._since += scored
        self.mark("compilation and first step")
        return "started in: " + ", ".join(f"{what} {seconds:.1f} s" for what, seconds in self._parts)


class Progress:
    """A live line on a terminal (step, loss, tokens/s, time left); elsewhere a plain line every ten seconds."""

    def __init__(self, start: int, steps: int, stop: list[signal.Signals]):
        """`stop`: the list of `cluster.stop_on_signal`; SIGPIPE is added to it when the output cannot be written any more."""
        self.console, self._stop, self._lost = rich.console.Console(highlight=False), stop, False
        self._steps, self._last = steps, 0.0
        self._first = self._bar = None  # (the first step shown, its time), for a time left without compilation
        if self.console.is_terminal:
            text, left = "{task.description}", rich.progress.TimeRemainingColumn(elapsed_when_finished=True)
            columns = rich.progress.TextColumn(text), rich.progress.BarColumn(), left
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
        """Prints a line above the live one, if there is one; on standard error once standard output fails."""
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
                self.say(f"standard output cannot be written: {disk_error(error)}")

    def close(self) -> None:
        """Leaves the last state on the screen."""
        if self._bar:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._bar.stop()
