"""The log of a run: the progress line, the line of each step in metrics.jsonl, and the clocks."""

import contextlib
import json
import signal
import typing
from collections.abc import Callable

import jax
import numpy as np

from tinyllama_jax.base.config import Config
from tinyllama_jax.core import xla
from tinyllama_jax.core.program import CompiledStep
from tinyllama_jax.data import feed
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.run import cluster, metrics, profiler, programs, progress, spikes
from tinyllama_jax.run.cluster import EXIT_SPIKE


class Log:
    """The log of a run. Process 0 prints and writes; the others only follow the losses, so that all stop together.

    The metrics of a step are fetched one step later: fetching them at once would leave the devices idle.
    """

    def __init__(
        self,
        config: Config,
        sources: list[Blocks],
        devices: int,
        start: int,
        *,
        argv: list[str],
        stop: list[signal.Signals],
        startup: progress.Startup,
        peak_flops: Callable[[str], float | None] = lambda device_kind: None,
    ):
        """`start`: the step before the first one here. `devices`: their number. `argv`: the command's arguments.

        `stop`: from `cluster.stop_on_signal`. `peak_flops`: device_kind -> FLOP/s, for the MFU. Raises UserError.
        """
        first = jax.process_index() == 0
        self._config, self._start, self._startup = config, start, startup
        self._writer = metrics.Writer(config, start, startup.began) if first else None
        self._progress = progress.Progress(start, config.train.steps, stop) if first else None
        parts = self._writer.parts if self._writer else None
        self._timer = progress.Timer(config, start, devices, peak_flops(jax.devices()[0].device_kind), parts)
        self._watch = spikes.Watch(config, start, argv)
        self._order, self._names = feed.order(config, sources), feed.names(config.data.sources)
        self._counts = self._order.counts(start)  # samples of each source up to the last line written
        self._pending: tuple[int, dict] | None = None
        self._step, self._memory, self._program = start, 0, None
        self.timed = self._timer.timed
        self.profiler = profiler.Profiler(config, start, self.say, lambda: jax.block_until_ready(self._pending), self.timed)

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(self, _: type | None, error: BaseException | None, *__: object) -> None:
        self.profiler.end(self._step)
        if self._writer:
            what = f"{type(error).__name__}: {error}".partition("\n")[0] if error else f"after step {self._step:,}"
            with contextlib.suppress(OSError):  # a full disk may be the error itself
                self._writer.event(self._step, "end", what)
                if self._step > self._start:
                    self._write(self._step, {})  # the account up to the end
            self._progress.close()
            self._writer.close()

    def say(self, text: str, event: str = "") -> None:
        """Prints lines above the progress line; records them as an `event` too (see `metrics.Event`) if it is given."""
        if self._progress:
            self._progress.say(text)
            if event:
                self._writer.event(self._step, event, text)

    def sample(self, step: int, text: str) -> None:
        """Prints and records the text that the model wrote after `step`."""
        if self._writer:
            self._writer.event(step, "sample", text)
        self.say(f"step {step:,}: {text}")

    def step(self, step: int, on_device: dict[str, jax.Array], program: CompiledStep) -> None:
        """Takes the metrics of a step that `program` has started, and records those of the step before. Raises Spike."""
        self.record_pending()
        self._step, self._pending = step, (step, on_device)
        if program is not self._program and self._writer:
            line, otherwise = programs.record(self._config, step, 0 < self._start == step - 1, program)
            if line:
                self.say(line, "program" if otherwise else "")
        self._program = program

    def agreed(self, step: int, agreed: cluster.Agreed) -> cluster.Agreed:
        """Takes note of what the processes agreed on after `step`: a profile of the next steps, and the most memory in use."""
        self._memory = max(self._memory, agreed.memory)
        if agreed.profile:
            self.profiler.next_steps(step)
        return agreed

    def scores(self, step: int, values: dict[str, metrics.Value], line: str) -> None:
        """Records what the weights after `step` are worth, and prints a line about it."""
        self._write(step, values)
        self.say(f"step {step:,}: {line}")

    def sync(self, step: int) -> None:
        """Waits until all lines up to `step` are on the disk: a checkpoint must not be ahead of them. Raises Spike."""
        self.record_pending(always=True)
        self._write(step, self._watch.state())
        if self._writer:
            self._writer.sync()

    def end(self, step: int) -> int:
        """The exit code of a run that ends at `step`: EXIT_SPIKE, with a message, if its last steps were skipped; else 0."""
        if self._watch.skipped_in_a_row < min(2, self._config.train.steps):  # one skipped step only lowers fp16's loss scale
            return 0
        self.say("error: " + self._watch.all_skipped(step, "the run ends there"))
        return EXIT_SPIKE

    def _write(self, step: int, values: dict[str, metrics.Value]) -> None:
        if self._writer:
            memory = {"memory_peak_gib": round(self._memory / 1_024, 3)} if self._memory else {}
            self._writer.write(step, values | memory | self._timer.account())

    def record_pending(self, always: bool = False) -> None:
        """Writes the line of the last step if `log.every` is due, it was skipped, is a spike, or `always`. Raises Spike."""
        if self._pending is None:
            return
        (step, on_device), self._pending = self._pending, None
        on_host = jax.device_get(on_device)
        if step == self._start + 1:  # the first step is done
            self.say(self._startup.line(self._timer.started()))
            self._say_memory()
        values = {name: np.asarray(value).item() for name, value in on_host.items() if not name.startswith("source_")}
        finite, predicts = values["finite"], values["real_tokens"] > 0
        spike = self._watch.step(step, values["loss"], finite, predicts)
        if step % self._config.log.every and finite and not spike and not always:
            return
        values |= self._timer.lap(step) | self._by_source(step, on_host)
        if not finite or spike:
            source, block = self._order.at(step)
            values["blocks"] = json.dumps([source.tolist(), block.tolist()])
        if not finite:
            what = f"loss, gradient or new weights not finite (loss {values['loss']}); weights unchanged"
            self.say(f"step {step:,}: {what}, {values['skipped']} such steps so far; its blocks are in metrics.jsonl")
        elif not predicts:
            self.say(f"step {step:,}: has no token to predict; weights unchanged")
        self._write(step, values)
        if self._progress:
            self._progress.update(step, values["loss"], values["tokens_per_second"])
        self._watch.check(step, values["loss"], spike)

    def _say_memory(self) -> None:
        """Prints the memory in use beside what the compiler counted, as `plan` does; nothing on devices that do not tell."""
        counted, (peak, limit) = self._program.compiled.memory_analysis(), xla.memory()
        if counted and peak:
            peak, limit, counted = (n / 2**30 for n in (peak, limit, counted.peak_memory_in_bytes))
            self.say(
                f"memory: {peak:.2f} GiB of {limit:.2f} in use at most so far; the compiler counted {counted:.2f} for a step"
            )

    def _by_source(self, step: int, on_host: dict[str, np.ndarray]) -> dict[str, float]:
        """Epochs of each source; with several sources also its share of the samples since the last line, and its loss."""
        before, self._counts = self._counts, self._order.counts(step)
        named = lambda key, numbers: {f"{key}/{name}": n for name, n in zip(self._names, numbers.tolist(), strict=True)}
        values = named("epochs", self._counts / np.array(self._order.sizes))
        if "source_loss" in on_host:  # NaN: the step had no token of this source
            since = self._counts - before
            values |= named("share", since / since.sum()) | named("loss", on_host["source_loss"])
        return values
