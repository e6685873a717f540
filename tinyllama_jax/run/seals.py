"""The checkpoints of a run folder as files, without Orbax: list, seal with checksums, verify, set aside."""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path

from tinyllama_jax.base import files, schedule
from tinyllama_jax.base.config import Checkpoint, Config
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import exists

SEAL = "seal.json"
NEWEST = "newest.json"  # the newest step that ever had a whole checkpoint: tells lost checkpoints from a new run
PARTIAL = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written
OLD = f"{PARTIAL}-deleted"  # at the end of the name of a checkpoint that is being deleted
UNSEALED = (SEAL, "_CHECKPOINT_METADATA", "commit_success.txt")  # files written after the seal


class Seal(typing.TypedDict):
    """seal.json: the content of a checkpoint when it was written."""

    step: int
    skip: str  # data.skip, which determines its batches
    files: dict[str, str]  # path within the checkpoint -> sha256
    sha256: str  # of the seal itself: see `_checksum_of_seal`


# -- listed ---------------------------------------------------------------------------------------------------------------


def steps_in(run: str | Path) -> list[int]:
    """The steps of the sealed checkpoints in a run folder, in order. Other files and folders are ignored."""
    return [step for step in _numbered(run) if exists(Path(run) / "checkpoints" / str(step) / SEAL)]


def _names(run: str | Path) -> list[str]:
    folder = Path(run) / "checkpoints"
    return files.listed(folder) if folder.is_dir() else []


def _numbered(run: str | Path) -> list[int]:
    """The step numbers among the names in RUN/checkpoints, in order, sealed or not."""
    return sorted(int(name) for name in _names(run) if re.fullmatch("0|[1-9][0-9]{0,17}", name))


def _strays(run: str | Path) -> list[str]:
    """Names in RUN/checkpoints that are neither checkpoints nor left there by this program or a file manager."""
    steps = set(map(str, steps_in(run)))
    return [name for name in _names(run) if name not in steps and not unfinished(name)]


def expired(steps: list[int], keep: Checkpoint) -> list[int]:
    """Of the steps with a checkpoint, in order, those that `keep` does not keep."""
    return [s for s in steps[: -keep.keep] if s not in keep.kept and not (keep.keep_every and s % keep.keep_every == 0)]


def unfinished(name: str) -> bool:
    """Whether this is the name of a checkpoint that is being written or deleted."""
    return re.fullmatch(rf"[0-9]+{re.escape(PARTIAL)}.*", name) is not None


def find_step(run: str | Path, step: int | None = None, option: str = "--step ") -> int:
    """`step`, or the newest one if it is None. Raises UserError naming `option` and the steps that have a checkpoint."""
    files.check_utf8(os.path.abspath(run))
    if not exists(Path(run) / "config.json"):
        raise UserError(f"{run}: is not a run folder (it has no config.json)")
    steps, strays = steps_in(run), _strays(run)
    ignored = f" (not checkpoints, ignored: {', '.join(strays)})" if strays else ""
    if not steps:
        raise UserError(f"{run}: has no checkpoint" + (ignored or " yet"))
    if step is not None and step not in steps:
        raise UserError(f"{option}{step}: {run} has checkpoints of the steps {', '.join(map(str, steps))}{ignored}")
    if step is None and strays:
        print(f"{run}: its newest checkpoint is of step {steps[-1]:,}{ignored}", file=sys.stderr)
    return steps[-1] if step is None else step


# -- sealed and verified --------------------------------------------------------------------------------------------------


def seal(folder: Path, skip: str) -> None:
    """Writes the seal of the checkpoint in `folder` whose files are complete but which does not have its final name yet."""
    for partial in (path for path in folder.glob(f"*{PARTIAL}*") if not path.name.endswith(OLD)):
        paths = [f for f in partial.rglob("*") if f.is_file() and f.name not in UNSEALED]
        named = dict(zip((str(f.relative_to(partial)) for f in paths), _checksums(paths), strict=True))
        content = {"step": int(partial.name.partition(".")[0]), "skip": skip, "files": named}
        files.write(partial / SEAL, json.dumps(content | {"sha256": _checksum_of_seal(content)}, indent=1) + "\n")


def _checksum_of_seal(content: dict | Seal) -> str:
    text = json.dumps([content["step"], content["skip"], sorted(content["files"].items())])
    return hashlib.sha256(text.encode()).hexdigest()


def _checksums(paths: list[Path]) -> list[str | None]:
    """The sha256 of each path; None if it is no regular file. Raises OSError if one cannot be read."""

    def checksum(path: Path) -> str | None:
        try:
            return files.sha256(path)
        except (FileNotFoundError, NotADirectoryError, UserError):  # UserError: a folder, a pipe
            return None

    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # hashlib releases the GIL: 2 GB/s a core
        return list(pool.map(checksum, paths))


def read_seal(checkpoint: Path) -> Seal:
    """Reads the seal of a checkpoint. Raises UserError if it is missing, damaged or of another step; OSError if unreadable."""
    try:
        sealed = files.read_json(checkpoint / SEAL, Seal)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{SEAL} is missing") from None
    except UserError:
        sealed = None
    if sealed is None or sealed["sha256"] != _checksum_of_seal(sealed):
        raise UserError(f"{SEAL} is damaged")
    if str(sealed["step"]) != checkpoint.name:
        raise UserError(f"is of step {sealed['step']:,}")
    return sealed


def damage(checkpoint: Path, part: str = "") -> str | None:
    """The damage to a checkpoint, or to an item of it such as "params"; None if it is whole. Files not in its seal are ignored.

    Raises OSError if the disk cannot read it: the checkpoint itself may be whole.
    """
    try:
        sealed = read_seal(checkpoint)["files"]
    except UserError as error:
        return str(error)
    names = sorted(name for name in sealed if name.startswith(part and f"{part}/"))
    for name, checksum in zip(names, _checksums([checkpoint / name for name in names]), strict=True):
        if checksum != sealed[name]:
            return f"{name} is " + ("missing" if checksum is None else "not as it was written")
    return None


def has_state(run: Path, step: int) -> bool:
    """Whether a checkpoint holds the whole training state, not only weights; True if its seal is damaged."""
    try:
        return any(name.startswith("train/") for name in read_seal(run / "checkpoints" / str(step))["files"])
    except UserError:  # `recover` handles it
        return True


def unusable(checkpoint: Path, config: Config) -> str | None:
    """Why a run of `config` cannot resume from a checkpoint (damaged, or trained on other batches), or None."""
    if reason := damage(checkpoint):
        return reason
    data = dataclasses.replace(config.data, skip=read_seal(checkpoint)["skip"])
    if schedule.same_batches(config.data, data, int(checkpoint.name)):
        return None
    return f"trained on other batches: --data.skip={data.skip}"


def _check_skip(run: Path, config: Config) -> None:
    """Raises UserError if the newest checkpoint skipped batches that `config` does not: `data.skip` was probably forgotten."""
    for step in reversed(steps_in(run)):
        try:
            skip = read_seal(run / "checkpoints" / str(step))["skip"]
        except UserError:  # `recover` handles it
            continue
        data = dataclasses.replace(config.data, skip=skip)
        if skip and not f"{config.data.skip},".startswith(f"{skip},") and not schedule.same_batches(config.data, data, step):
            what = f"checkpoint {step} was trained with --data.skip={skip}; give that, with or without more behind it"
            undo = f"to undo it, first move the checkpoints since then out of {run / 'checkpoints'}"
            raise UserError(f"--data.skip={config.data.skip}: {what}; {undo}")
        return


# -- resumed from, and set aside ---------------------------------------------------------------------------------------------


def recover(config: Config) -> list[str]:
    """Moves to RUN/set_aside the checkpoints after the newest one that the run can resume from; returns lines to print.

    The run can resume from a checkpoint that is undamaged and was trained on the batches of `config`. If it goes back, its
    metrics are copied to RUN/set_aside too. Only process 0 calls it, before the others look. Raises UserError, and moves
    nothing, if the run had checkpoints and can resume from none.
    """
    run, aside, newest = config.folder, {}, None
    _check_skip(run, config)
    for step in reversed(_numbered(run)):
        path = run / "checkpoints" / str(step)
        if not (reason := unusable(path, config)):
            newest = step
            break
        aside[path] = reason
    saved, notes, metrics = last_saved(run), [], run / "metrics.jsonl"
    if aside and newest is None and (saved or steps_in(run)):
        path, reason = next(iter(aside.items()))
        why = f"({path.name}: {reason}; {len(aside)} in all)"
        remedy = "correct --data.skip, restore one from a copy, or start again with --workdir=NEW"
        raise UserError(f"{run}: has no checkpoint to resume from {why}; {remedy}")
    if (newest is None or newest < saved) and exists(metrics) and metrics.stat().st_size:
        back = f"step {saved:,} was saved once, and the run resumes from {newest or 0:,}"
        why = "the run has no checkpoint" if newest is None else back
        notes.append(f"{why}; its metrics so far are now in {set_aside(run, metrics, shutil.copyfile)}")
    for path, reason in aside.items():
        notes.append(f"checkpoint {path.name} is not used ({reason}) and is now {set_aside(run, path)}")
    if strays := _strays(run):
        notes.append(f"not checkpoints, ignored in {run / 'checkpoints'}: {', '.join(strays)}")
    if newest not in (None, saved):
        remember(run, newest)
    return notes


def start_over(config: Config) -> None:
    """Sets aside the remains of a run whose checkpoints are gone, if `init.start_over` is the newest step that it saved.

    Does nothing if no step was ever saved. Raises UserError, and moves nothing, if `init.start_over` is another step.
    """
    run, given = config.folder, config.init.start_over
    if not (saved := last_saved(run)):
        return
    if given != saved:
        option = f"--init.start_over={given}: " if given else ""
        restart = f"start again with --init.start_over={saved}, which moves the rest to {run / 'set_aside'}"
        remedy = f"mount or restore {run / 'checkpoints'}, or {restart}"
        raise UserError(f"{option}{run}: its checkpoints are gone, the newest of step {saved:,}; {remedy}")
    stay = ["lock", "processes", "set_aside", "config.json", NEWEST]
    stay += ["checkpoints"] if (run / "checkpoints").is_dir() and not _names(run) else []  # a disk may be mounted there
    for name in files.listed(run):
        if name not in stay:
            set_aside(run, run / name)
    set_aside(run, run / "config.json", shutil.copyfile)
    set_aside(run, run / NEWEST)  # last, so that a killed command does all of this again


def set_aside(run: Path, path: Path, move: Callable[[Path, Path], object] = os.rename) -> Path:
    """Moves `path` into RUN/set_aside under its name and the time, and returns the new path."""
    name = f"{path.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    (run / "set_aside").mkdir(exist_ok=True)
    places = (run / "set_aside" / (name + (f".{i}" if i else "")) for i in itertools.count())
    to = next(place for place in places if not exists(place))
    move(path, to)
    return to


def remember(run: Path, step: int) -> None:
    """Records in the run folder that `step` has a whole checkpoint."""
    files.write(run / NEWEST, f"{step}\n")


def last_saved(run: Path) -> int:
    """The newest step that ever had a whole checkpoint, as recorded in the run folder; 0 if there was none."""
    if not exists(run / NEWEST):
        return 0
    return files.read_json(run / NEWEST, files.Count, f"if no checkpoint of {run} is missing, delete it")
