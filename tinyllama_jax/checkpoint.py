"""The checkpoints of a run: written, sealed, found, restored; the only orbax file."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from tinyllama_jax import config as config_lib
from tinyllama_jax import dims, model, optim
from tinyllama_jax.config import Config
from tinyllama_jax.data import skip as skip_lib
from tinyllama_jax.errors import UserError, read_json
from tinyllama_jax.files import write
from tinyllama_jax.step import TrainState, new_state


class Checkpoints:
    """The checkpoints of one run: saved in the background, rotated, found again by number."""

    def __init__(self, config: Config):
        """Opens RUN/checkpoints, made if absent; half-written ones of a killed run are not seen, and removed."""
        self._folder = Path(config.workdir).resolve() / "checkpoints"
        self._folder.mkdir(parents=True, exist_ok=True)
        keep = [policies.LatestN(config.checkpoint.keep), policies.CustomSteps(config.checkpoint.kept)]
        if config.checkpoint.keep_every:
            keep.append(policies.EveryNSteps(config.checkpoint.keep_every))
        self._manager = _manager(self._folder, config, ("params", "train"), policies.AnyPreservationPolicy(keep))

    def latest(self) -> int | None:
        """The newest step that is whole, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Starts to save; returns as soon as `state` may be overwritten. An error of an earlier save is raised here."""
        if step == self._manager.latest_step():
            return
        # asked first, since Orbax meets a full disk in its threads, each of which prints its own traceback
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // jax.process_count()
        if shutil.disk_usage(self._folder).free < needed:
            raise OSError(errno.ENOSPC, f"{needed:,} bytes needed for step {step}", str(self._folder))
        params, rest = _parts(state)
        items = ocp.args.Composite(params=ocp.args.StandardSave(params), train=ocp.args.StandardSave(rest))
        with _disk_errors(self._folder):
            self._manager.save(step, args=items)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state after `step`, straight into the shardings of `abstract` (shapes with shardings)."""
        return _read_state(self._folder / str(step), abstract)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None or jax.process_count() == 1:  # after an error the others may never come to where they would meet
            self.close()

    def close(self) -> None:
        """Waits until what was saved is on disk."""
        with _disk_errors(self._folder):
            self._manager.wait_until_finished()
        self._manager.close()


logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's threads print the traceback of an error that it also raises


def _manager(folder: Path, config: Config, items: tuple[str, ...], keep: policies.PreservationPolicy | None = None):
    """Orbax's manager, with each checkpoint sealed by `_seal` before it gets its name."""
    seal = lambda: _seal(folder, config) if jax.process_index() == 0 else None
    options = ocp.CheckpointManagerOptions(
        preservation_policy=keep,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=seal),
    )
    return ocp.CheckpointManager(folder, options=options, item_names=items)


# -- whole, and unchanged -------------------------------------------------------------------------------------------------

SEAL = "seal.json"  # in a checkpoint: the sha256 of each of its files, and what of the config its batches depend on
UNSEALED = (SEAL, "_CHECKPOINT_METADATA", "commit_success.txt")  # what is written after it


def _seal(folder: Path, config: Config) -> None:
    """Writes the seal of the checkpoint that is being written, whose files are all there."""
    for partial in folder.glob("*.orbax-checkpoint-tmp*"):
        write(partial / SEAL, json.dumps({"skip": config.data.skip, "files": _checksums(partial)}, indent=1) + "\n")


def _checksums(checkpoint: Path, part: str = "") -> dict[str, str]:
    """Path within the checkpoint -> sha256, of all files (of one item, "params" say) that were there when it was sealed."""
    files = [f for f in (checkpoint / part).rglob("*") if f.is_file() and f.name not in UNSEALED]

    def checksum(file: Path) -> str:
        with file.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # hashlib lets other threads run: 2 GB/s a core
        return dict(zip((str(f.relative_to(checkpoint)) for f in files), pool.map(checksum, files), strict=True))


def damage(checkpoint: Path, part: str = "") -> str | None:
    """What is wrong with a checkpoint (or one item of it) on disk, or None."""
    try:
        sealed = read_json(checkpoint / SEAL, "skip", "files")["files"]
    except (UserError, OSError):
        return f"{SEAL} is missing or damaged"
    sealed = {name: checksum for name, checksum in sealed.items() if name.startswith(part)}
    there = _checksums(checkpoint, part)
    wrong = sorted(name for name in sealed | there if sealed.get(name) != there.get(name))
    return f"{wrong[0]} is not as it was written" if wrong else None


def unusable(checkpoint: Path, config: Config) -> str | None:
    """Why the run that `config` describes could not have come to a checkpoint, or None: damage, or other batches."""
    if reason := damage(checkpoint):
        return reason
    then = dataclasses.replace(config.data, skip=read_json(checkpoint / SEAL)["skip"])
    if skip_lib.same_batches(config.data, then, int(checkpoint.name)):
        return None
    return f"trained on other batches: --data.skip={then.skip}"


def _check_skip(run: Path, config: Config) -> None:
    """Raises UserError if the newest checkpoint has left out batches that `config` forgets: that is no wish to go back."""
    for step in reversed(steps_in(run)):
        try:
            skip = read_json(run / "checkpoints" / str(step) / SEAL, "skip")["skip"]
        except (UserError, OSError):  # for `recover`
            continue
        then = dataclasses.replace(config.data, skip=skip)
        if skip and not f"{config.data.skip},".startswith(f"{skip},") and not skip_lib.same_batches(config.data, then, step):
            raise UserError(
                f"--data.skip={config.data.skip}: checkpoint {step} was trained with --data.skip={skip}; give that, with more "
                f"behind it or not. To undo it, first move the checkpoints since then out of {run / 'checkpoints'}"
            )
        return


def recover(config: Config) -> list[str]:
    """Sets aside, in RUN/set_aside, the checkpoints after the newest one that the run can go on from; returns lines to print.

    That is the newest whose files are as they were written and whose batches were those of this config. To be called by
    one process, before the others look. Raises UserError, and moves nothing, if there are checkpoints but none is such.
    """
    run, aside = Path(config.workdir), {}
    _check_skip(run, config)
    for step in reversed(steps_in(run)):
        folder = run / "checkpoints" / str(step)
        reason = unusable(folder, config)
        if not reason:
            break
        aside[folder] = reason
    else:
        if aside:
            folder, reason = next(iter(aside.items()))
            raise UserError(
                f"{run}: has no checkpoint to go on from ({folder.name}: {reason}; {len(aside)} in all); mend --data.skip, "
                "restore one from a copy, or start again with --workdir=NEW"
            )
    notes = []
    for folder, reason in aside.items():
        to = run / "set_aside" / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        to.parent.mkdir(exist_ok=True)
        folder.rename(to)
        notes.append(f"checkpoint {folder.name} is not used ({reason}) and is now {to}")
    return notes


@contextlib.contextmanager
def _read_errors(checkpoint: Path) -> Iterator[None]:
    """What Orbax says of a checkpoint that it cannot read, in one line."""
    try:
        yield
    except Exception as error:  # of many types
        before = [s for s in steps_in(checkpoint.parent.parent) if s < int(checkpoint.name)]
        other = f"; step {before[-1]:,} is there too" if before else ""
        raise UserError(f"{checkpoint}: cannot be read: {damage(checkpoint) or str(error).splitlines()[0]}{other}") from error


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """What Orbax and TensorStore say of a full disk, in exceptions of several types, as the OSError that it was."""
    try:
        yield
    except Exception as error:
        said: BaseException | None = error
        while said:
            if "No space left on device" in str(said):
                raise OSError(errno.ENOSPC, "while saving", str(folder)) from None
            said = said.__cause__ or said.__context__
        raise


def _parts(state: TrainState) -> tuple[dict, dict]:
    """(parameters, the rest): apart, so that those who want the weights read nothing else."""
    rest = {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "params"}
    return state.params, rest


def steps_in(run: str | Path) -> list[int]:
    """The steps that a run folder has checkpoints of, in order; whole ones only, since Orbax gives them their name last."""
    folder = Path(run) / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def find_step(run: str | Path, step: int | None = None, option: str = "--step ") -> int:
    """`step`, or the latest one if it is None. Raises UserError naming `option` and those that there are."""
    if not (Path(run) / "config.json").is_file():
        raise UserError(f"{run}: is not a run folder (it has no config.json)")
    steps = steps_in(run)
    if not steps:
        raise UserError(f"{run}: has no checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(f"{option}{step}: {run} has checkpoints of the steps {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def load_config(run: str | Path) -> Config:
    """The configuration of a run folder. Raises UserError."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise UserError(f"{run}: is not a run folder (it has no config.json)")
    return config_lib.from_json(path.read_bytes(), str(path))


def load_params(run: str | Path, step: int | None = None) -> tuple[dict, Config, int]:
    """(parameters as fp32 numpy arrays in a nested dict, config, step) of a run folder, on the host. Raises UserError."""
    step, config = find_step(run, step), load_config(run)
    path = _undamaged(run, step, "params")
    as_numpy = {p.name: ocp.RestoreArgs(restore_type=np.ndarray) for p in dims.PARAMETERS}
    with ocp.PyTreeCheckpointer() as reader, _read_errors(path.parent):
        return reader.restore(path, restore_args=model.unflatten(as_numpy)), config, step


def restore_params(run: str | Path, step: int, abstract: dict) -> dict:
    """The parameters of a run folder after `step`, straight into the shardings of `abstract`."""
    path = _undamaged(run, step, "params")
    with ocp.StandardCheckpointer() as reader, _read_errors(path.parent):
        return reader.restore(path, abstract)


def restore_state(run: str | Path, step: int, abstract: TrainState) -> TrainState:
    """The state after `step`, as `Checkpoints.restore` gives it, by one who only looks: nothing in RUN is touched."""
    return _read_state(_undamaged(run, step), abstract)


def _read_state(checkpoint: Path, abstract: TrainState) -> TrainState:
    params, rest = _parts(abstract)
    with ocp.StandardCheckpointer() as reader, _read_errors(checkpoint):
        return TrainState(params=reader.restore(checkpoint / "params", params), **reader.restore(checkpoint / "train", rest))


def _undamaged(run: str | Path, step: int, part: str = "") -> Path:
    """The folder of a checkpoint or of an item of it. Raises UserError if it is damaged, naming the newest whole one before."""
    checkpoint = Path(run).resolve() / "checkpoints" / str(step)
    if reason := damage(checkpoint, part):
        before = [s for s in steps_in(run) if s < step and not damage(checkpoint.parent / str(s), part)]
        raise UserError(f"{checkpoint}: is damaged: {reason}" + (f"; step {before[-1]} is whole" if before else ""))
    return checkpoint / part


def save_import(run: Path, config: Config, params: dict, moments: tuple[dict, dict] | None = None, step: int = 0) -> None:
    """Writes config and checkpoint of weights that come from elsewhere (nested dict of fp32 arrays, as `load_params` gives).

    With Adam's `moments` (first, second) the run can be gone on with at `step`; without, it is for `--init.from`.
    """
    run.mkdir(parents=True, exist_ok=True)
    items = {"params": ocp.args.StandardSave(params)}
    if moments:
        state = new_state({}, config)
        state = dataclasses.replace(state, step=np.int32(step), opt_state=optim.from_moments(*moments, step, config))
        items["train"] = ocp.args.StandardSave(_parts(state)[1])
    (run / "checkpoints").mkdir(exist_ok=True)
    with _manager((run / "checkpoints").resolve(), config, tuple(items)) as manager:
        manager.save(step, args=ocp.args.Composite(**items))
    write(run / "config.json", config_lib.to_json(config))
