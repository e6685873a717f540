"""Profiles of some steps, for xprof and TensorBoard: those of `log.profile`, or the next ones once RUN/profile appears.

They are asked for by a file because jax.profiler.start_server (JAX 0.10.2) listens on all interfaces, [::], without a password.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator

import jax

from tinyllama_jax.base.config import Config

REQUEST, STEPS, EVERY = "profile", 5, 5.0  # the file; steps that it asks for; seconds between looks for it


class Profiler:
    """Profiles the steps of some ranges; all processes call it alike, and each writes the file of its own devices."""

    def __init__(self, config: Config, start: int, say: Callable, idle: Callable[[], object], timed: Callable):
        """`start`: the step before the first one here. `say`, `timed`: of `Log`. `idle`: waits until all devices are."""
        self._run, self._steps, self._say, self._idle = config.folder, config.train.steps, say, idle
        self._timed = timed
        self._partial = self._run / f".profile-{jax.process_index()}"
        self._from = self._until = 0  # of the profile that is being made
        self._looked, self._asked = 0.0, False
        first, last = config.log.profiled
        self._ranges = [(first, last)] if last else []
        what = f"log.profile={config.log.profile}: "
        if 0 < last <= start:
            say(f"{what}these steps are past, and are not profiled: the run goes on from step {start:,}")
        elif first > self._steps:
            say(f"{what}nothing will be profiled: the run ends at step {self._steps:,}")
        elif last and first <= start + 1:
            say(f"{what}profiled from step {start + 1:,} on, the first of this start, with its compilation")

    def asked(self) -> bool:
        """Whether somebody made RUN/profile. The first process looks for it every few seconds, and removes it."""
        if jax.process_index() == 0 and time.monotonic() > self._looked + EVERY:
            self._looked = time.monotonic()
            with contextlib.suppress(OSError):  # usually it does not exist
                (self._run / REQUEST).unlink()
                self._asked = True
        return self._asked

    def next_steps(self, step: int) -> None:
        """Profiles the steps after `step`, as RUN/profile asked."""
        self._ranges.append((step + 1, min(step + STEPS, self._steps)))
        self._asked = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Names all the work of `step` in a trace; begins and ends a profile where a range does."""
        until = max((last for first, last in self._ranges if first <= step <= last), default=0)
        if until and not self._from:
            self._begin(step, until)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self._from and step == self._until:
            self._idle()
            self.end(step)

    def _begin(self, step: int, until: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python's frames are most of a trace, and slow it down
        options.raise_error_on_start_failure = True
        options.session_id = "profile"
        self._idle()
        shutil.rmtree(self._partial, ignore_errors=True)  # of a process that was killed
        try:
            jax.profiler.start_trace(self._partial, profiler_options=options)
            self._from, self._until = step, until
        except RuntimeError as error:
            self._ranges.clear()
            self._say(f"steps {step:,} to {until:,} cannot be profiled: {str(error).splitlines()[0]}")

    def end(self, step: int) -> None:
        """Writes the profile that is being made, if there is one; `step` is its last."""
        if not self._from:
            return
        name, self._from = f"steps_{self._from}-{step}", 0
        folder = self._run / "tensorboard" / "plugins" / "profile" / name
        try:
            with self._timed("evaluating"):
                jax.profiler.stop_trace()
            folder.mkdir(parents=True, exist_ok=True)
            of = f"{jax.process_index():04}-" if jax.process_count() > 1 else ""  # two may run on one host
            for file in (self._partial / "plugins" / "profile" / "profile").iterdir():
                file.replace(folder / f"{of}{file.name}")
            self._say(f"steps {name[6:]} are profiled: pip install xprof; tensorboard --logdir {self._run / 'tensorboard'}")
        except (RuntimeError, OSError) as error:
            self._say(f"{name}: the profile cannot be written: {str(error).splitlines()[0]}")
        shutil.rmtree(self._partial, ignore_errors=True)
