"""Writes, rotates and restores the checkpoints of a run; the only file that uses Orbax."""

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from tinyllama_jax.base import config as config_lib
from tinyllama_jax.base import dims, files
from tinyllama_jax.base.config import Config, Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import exists
from tinyllama_jax.core import lora, model, optim
from tinyllama_jax.core.step import TrainState, new_state
from tinyllama_jax.run import bucket, cluster, seals
from tinyllama_jax.run.seals import damage, find_step, steps_in

# errors of a disk; in exceptions without an errno they are recognised by their text
DISK = "ENOSPC EDQUOT EIO EFBIG EROFS EACCES EPERM ESTALE ENODEV ENXIO ETIMEDOUT ENOTCONN EHOSTDOWN EMFILE ENFILE EREMOTEIO"

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's threads print the traceback of an error that Orbax also raises


def _without_closed_loops(hook: Callable[..., None]) -> Callable[..., None]:
    """`hook` without the errors of TensorStore's threads whose event loop is closed after a failed save."""
    value = lambda args: args[1] if len(args) > 1 else args[0].exc_value
    return lambda *args: None if str(value(args)) == "Event loop is closed" else hook(*args)


sys.excepthook, sys.unraisablehook = map(_without_closed_loops, (sys.excepthook, sys.unraisablehook))


class Checkpoints:
    """Saves the checkpoints of one run in the background, rotates and restores them."""

    def __init__(self, config: Config):
        """Opens or creates RUN/checkpoints. Removes checkpoints that a killed process left half written or half deleted."""
        self._run, self._keep = config.folder.resolve(), config.checkpoint
        self._folder = self._run / "checkpoints"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._last, self._saving, self._failed = self.latest(), False, False
        self._begun, self.seconds = time.monotonic(), 0.0  # `seconds`: that the last save took; 0: not known
        self._deleting: list[threading.Thread] = []
        self._first = jax.process_index() == 0
        for path in self._folder.iterdir() if self._first else ():
            if seals.unfinished(path.name):
                shutil.rmtree(path)
        self._writer = _writer(self._folder, config)

    def latest(self) -> int | None:
        """The newest step with a sealed checkpoint, or None."""
        return max(steps_in(self._run), default=None)

    def save(self, step: int, state: TrainState) -> None:
        """Starts to save; returns as soon as `state` may be overwritten. Raises the error of an earlier save."""
        if step == self._last:
            return
        self.check(wait=True)
        if self._first and exists(self._folder / str(step)):  # created by somebody else since the run began
            seals.set_aside(self._run, self._folder / str(step))
        params, other = _parts(state)
        with self._disk_errors():
            # checked here because Orbax would find the disk full only in its threads
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // jax.process_count()
            if shutil.disk_usage(self._folder).free < needed:
                raise OSError(errno.ENOSPC, f"{needed:,} bytes needed for step {step}", str(self._folder))
            self._writer.save(self._folder / str(step), args=_items(params=params, train=other))
        self._last, self._saving, self._begun = step, True, time.monotonic()

    def due(self) -> bool:
        """Whether `checkpoint.minutes` have passed since the last save began. Only the first process says so."""
        return self._first and 0 < self._keep.minutes <= (time.monotonic() - self._begun) / 60

    def fits(self) -> bool:
        """Whether a save would end before `checkpoint.grace` is over, if it takes as long as the last one."""
        needed = self.seconds * (2 if self._saving else 1)  # one that is under way comes first
        return not (self._keep.grace and needed) or cluster.seconds_since_signal() + needed < self._keep.grace

    def outcome(self, step: int) -> str:
        """Says, at the end of a run that was told to stop after `step`, what is saved."""
        if self._last == step:
            return "which is saved; the same command resumes"
        what = (
            f"which is not saved: that takes {self.seconds:.0f} s, more than is left of --checkpoint.grace={self._keep.grace:g}"
        )
        return f"{what}; the same command resumes from step {self._last or 0:,}"

    def check(self, wait: bool = False) -> None:
        """Raises the error of a save that failed in the background. `wait`: waits first until it is on disk or bucket."""
        bucket.check()
        with self._disk_errors():
            self._writer.wait_until_finished() if wait else self._writer.check_for_errors()
            done = self._saving and exists(self._folder / str(self._last) / seals.SEAL)
        if done and bucket.holds(self._last, wait):
            with self._disk_errors():
                self._saving, self.seconds = False, time.monotonic() - self._begun
                if self._first:
                    self._rotate()

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads the state after `step` into the shardings of `abstract` (shapes with shardings). `recover` has verified it."""
        return _read_state(self._folder / str(step), abstract)

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        # after an error, closing could wait for ever: for other processes, or for Orbax's deadlocked threads
        if kind is None or (jax.process_count() == 1 and not self._failed):
            self.close()

    def close(self) -> None:
        """Waits until all saves are on disk and all rotated checkpoints are deleted."""
        self.check(wait=True)
        for thread in self._deleting:
            thread.join()
        self._writer.close()

    def _rotate(self) -> None:
        """Records that the newest checkpoint is whole, and starts to delete those that are no longer kept."""
        seals.remember(self._run, self._last)
        for step in seals.expired(steps_in(self._run), self._keep):
            old = self._folder / f"{step}{seals.OLD}"
            (self._folder / str(step)).rename(old)  # atomic: a half-deleted checkpoint never has its name
            self._deleting.append(threading.Thread(target=shutil.rmtree, args=(old, True), daemon=True))
            self._deleting[-1].start()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Raises the OSError inside the exceptions of several types with which Orbax and TensorStore wrap disk errors."""
        try:
            yield
        except Exception as error:
            self._failed, cause = True, error
            while cause:
                numbers = [getattr(errno, name) for name in DISK.split() if hasattr(errno, name)]
                number = getattr(cause, "errno", None) or next((n for n in numbers if os.strerror(n) in str(cause)), None)
                if number:
                    where = getattr(cause, "filename", None) or str(self._folder)
                    raise OSError(number, os.strerror(number), where) from None
                cause = cause.__cause__ or cause.__context__
            raise


def _writer(folder: Path, config: Config) -> ocp.AsyncCheckpointer:
    """The Orbax checkpointer, which writes in the background and seals a checkpoint before it gets its name."""
    seal = lambda: seals.seal(folder, config.data.skip) if jax.process_index() == 0 else None
    options = ocp.AsyncOptions(timeout_secs=4 * 3_600, post_finalization_callback=seal)  # supervise.py ends a save that hangs
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)


def _items(**items: dict) -> ocp.args.Composite:
    return ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in items.items()})


@contextlib.contextmanager
def _read_errors(checkpoint: Path) -> Iterator[None]:
    """Raises Orbax's error on reading a checkpoint as a UserError of one line."""
    try:
        yield
    except Exception as error:  # Orbax raises many types
        raise UserError(f"{checkpoint}: cannot be read: {damage(checkpoint) or str(error).splitlines()[0]}") from error


def _parts(state: TrainState) -> tuple[dict, dict]:
    """(parameters, the other fields): saved separately, so that the weights can be read alone."""
    return state.params, {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "params"}


def load_config(run: str | Path) -> Config:
    """Reads the configuration of a run folder. Raises UserError or OSError."""
    path = Path(run) / "config.json"
    if not exists(path):
        raise UserError(f"{run}: is not a run folder (it has no config.json)")
    with files.open_regular(path) as f:
        return config_lib.from_json(f.read(1 << 20), str(path))


def load_params(run: str | Path, step: int | None = None, merge: bool = True) -> tuple[dict, Config, int]:
    """Reads (parameters as a nested dict of fp32 numpy arrays, config, step) of a run folder. Raises UserError.

    Adapters are merged into the weights; `merge=False` returns the arrays of `dims.arrays` instead.
    """
    step, config = find_step(run, step), load_config(run)
    path = _undamaged(run, step, "params")
    as_numpy = {a.name: ocp.RestoreArgs(restore_type=np.ndarray) for a in dims.arrays(config.model, config.lora)}
    with ocp.PyTreeCheckpointer() as reader, _read_errors(path.parent):
        params = reader.restore(path, restore_args=model.unflatten(as_numpy))
    if merge and config.lora.rank:
        params = lora.merge(params, config.model, config.lora, np.asarray)
    return params, config, step


def restore_params(run: str | Path, step: int, abstract: dict) -> dict:
    """Reads the parameters after `step` of a run folder, with its adapters merged, into the shardings of `abstract`."""
    if load_config(run).lora.rank:
        return jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), load_params(run, step)[0], abstract)
    path = _undamaged(run, step, "params")
    with ocp.StandardCheckpointer() as reader, _read_errors(path.parent):
        return reader.restore(path, abstract)


def restore_state(run: str | Path, step: int, abstract: TrainState) -> TrainState:
    """Reads the state after `step` as `Checkpoints.restore` does, after verifying it; RUN is not changed."""
    return _read_state(_undamaged(run, step), abstract)


def _read_state(checkpoint: Path, abstract: TrainState) -> TrainState:
    params, other = _parts(abstract)
    with ocp.StandardCheckpointer() as reader, _read_errors(checkpoint):
        return TrainState(params=reader.restore(checkpoint / "params", params), **reader.restore(checkpoint / "train", other))


def _undamaged(run: str | Path, step: int, part: str = "") -> Path:
    """The folder of a checkpoint or of an item of it. Raises UserError if it is damaged, naming a whole one before it."""
    checkpoint = Path(run).resolve() / "checkpoints" / str(step)
    if reason := damage(checkpoint, part):
        before = [s for s in steps_in(run) if s < step and not damage(checkpoint.parent / str(s), part)]
        raise UserError(f"{checkpoint}: is damaged: {reason}" + (f"; step {before[-1]} is whole" if before else ""))
    return checkpoint / part


def save_import(run: Path, config: Config, params: dict, moments: tuple[dict, dict] | None = None, step: int = 0) -> None:
    """Writes a run folder with the config and one checkpoint of imported weights (nested dict of fp32 arrays).

    With Adam's `moments` (first, second) training can resume at `step`; without, the folder is for `--init.from`.
    """
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    items = {"params": params}
    if moments:
        state = new_state({}, config)
        state = dataclasses.replace(state, step=np.int32(step), opt_state=optim.from_moments(*moments, step, config))
        items["train"] = _parts(state)[1]
    folder = (run / "checkpoints").resolve()
    with contextlib.closing(_writer(folder, config)) as writer:
        writer.save(folder / str(step), args=_items(**items))
    if moments:
        seals.remember(run, step)
    files.write(run / "config.json", config_lib.to_json(config))


def unscheduled(model: Model) -> Config:
    """The config of a run of which only the model is known; the other sections are placeholders that nothing reads."""
    return Config(
        workdir="unknown",
        model=model,
        data=config_lib.Data(sources={"unknown": 1.0}),
        optim=config_lib.Optim(peak_lr=4e-4, min_lr=4e-5, warmup_steps=0, weight_decay=0.1, clip_norm=1.0),
        train=config_lib.Train(steps=1, tokens_per_step=model.seq_len, seqs_per_device=1),
        checkpoint=config_lib.Checkpoint(every=1),
    )
