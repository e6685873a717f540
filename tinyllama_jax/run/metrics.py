"""The numbers of each step (metrics.jsonl, TensorBoard, Weights & Biases); starts, ends and samples (events.jsonl)."""

import contextlib
import json
import math
import mmap
import os
import secrets
import threading
import time
import typing
from collections.abc import Iterator
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event as Summaries
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from tinyllama_jax.base.config import Config, flat
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import Count, check_utf8, decode_json, exists, open_regular, read_json, write
from tinyllama_jax.run import bucket, goodput

LONGEST = 1 << 24  # bytes of a line of metrics.jsonl; the line of a skipped step lists its blocks
TAIL = 1 << 23  # bytes read from the end of metrics.jsonl: thousands of lines
Value = int | float | bool | str | list[float] | None

# The keys that are read from a line of metrics.jsonl, whether of a step, a validation or a save
_NUMBERS = dict.fromkeys(("loss", "grad_norm", "lr", "val_loss", "time"), float | None)
_COUNTS = dict.fromkeys(("checksum", "tokens", "skipping_since", "skipped_in_a_row"), Count)
_OTHERS = {"step": typing.Required[Count], "finite": bool, "recent_losses": list[float]}
Line = typing.TypedDict("Line", _NUMBERS | _COUNTS | _OTHERS, total=False)


class Event(typing.TypedDict):
    """A line of events.jsonl, which is only appended to: its steps go back where a run went back to a checkpoint."""

    step: Count
    time: float  # seconds since 1970
    event: str  # start; stop: what made it end early; end: of the process, unless it is killed; program; sample
    text: str


def parse_line(text: bytes) -> dict[str, Value]:
    """Decodes a line of metrics.jsonl. Raises ValueError if it is damaged."""
    values = decode_json(text, dict[str, Value]) | decode_json(text, Line)
    for name, value in values.items():
        if "/" in name and not isinstance(value, int | float | None):  # a value of one source
            raise ValueError(f"{name} is not a number")
    return values


def read(run: str | Path) -> list[dict[str, Value]]:
    """Reads the lines of RUN/metrics.jsonl in order, without an incomplete last one. Raises UserError, OSError."""
    out: list[dict] = []
    for number, _, row in each(run):
        if isinstance(row, ValueError):
            raise UserError(f"{Path(run) / 'metrics.jsonl'}, line {number}: is damaged ({row}); take it out")
        out.append(row)
    return out


def each(run: str | Path) -> Iterator[tuple[int, int, dict[str, Value] | ValueError]]:
    """(line number, bytes up to its end, line) of RUN/metrics.jsonl, in order, without an incomplete last one.

    A damaged line, or one of an earlier step than the line before it, is a ValueError. Raises UserError, OSError.
    """
    check_utf8(run)
    path = _file(run)
    if not exists(path):
        raise UserError(f"{run}: is not a run folder, or its first step is not done (it has no metrics.jsonl)")
    end = step = 0
    with open_regular(path) as f:
        for number, text in enumerate(iter(lambda: f.readline(LONGEST), b""), 1):
            if not text.endswith(b"\n") and len(text) < LONGEST:
                break
            end += len(text)
            try:
                row = parse_line(text)
                if row["step"] < step:
                    raise ValueError(f"step {row['step']:,} after step {step:,}")
                step = row["step"]
            except ValueError as error:
                row = error
            yield number, end, row


def _file(run: str | Path, name: str = "metrics.jsonl") -> Path:
    """RUN/`name`. Raises UserError if it is still in parts, as in a copy of a run in an object store."""
    path = Path(run) / name
    if not exists(path) and (parts := path.with_name(f"{name}.parts")).is_dir():
        raise UserError(f"{path}: is in parts, as a bucket holds it; first run: cat {parts}/* > {path}")
    return path


def tail(run: str | Path, name: str = "metrics.jsonl") -> list[dict[str, Value]]:
    """Reads the last lines of RUN/`name`, without incomplete or damaged ones; none if there is no such file."""
    path, out = _file(run, name), []
    if exists(path):
        with open_regular(path) as f:
            f.seek(max(f.seek(0, os.SEEK_END) - TAIL, 0))
            for text in f:
                with contextlib.suppress(ValueError):
                    out.append(parse_line(text))
    return out


def skipped(rows: list[dict]) -> str:
    """A line with the number of skipped steps of a run and their ranges; empty if there are none."""
    steps = dict.fromkeys(row["step"] for row in rows if row.get("finite") is False)
    spans = zip((s for s in steps if s - 1 not in steps), (s for s in steps if s + 1 not in steps), strict=True)
    named = [f"{first:,}" + (f" to {last:,}" if first < last else "") for first, last in spans]
    if len(named) > 10:
        named[5:-4] = [f"... ({len(named) - 9:,} more)"]
    return f"{len(steps):,} step{'s' * (len(steps) > 1)} skipped as not finite: {', '.join(named)}" if steps else ""


class Writer:
    """Writes each step's numbers to RUN/metrics.jsonl, RUN/tensorboard and, when asked, W&B."""

    def __init__(self, config: Config, start: int, began: float | None = None):
        """Removes the lines of steps after `start`, which will be trained again. Raises UserError.

        `began`: when the process did, seconds since 1970. `parts`: of the run's time before that, see `goodput.carried`.
        """
        run = config.folder
        lines = tail(run)
        last = max((row["step"] for row in lines), default=start)
        self._wandb = _wandb(config, start, last) if config.log.wandb else None
        truncate_after(run / "metrics.jsonl", start)
        truncate_after(run / "events.jsonl", math.inf)  # only what a kill cut short
        bucket.push()  # before the next line: a bucket learns of lines that are gone from the file's size
        self.parts = goodput.carried(lines, tail(run), tail(run, "events.jsonl"), began or time.time(), time.time())
        self._jsonl, self._happened = (run / "metrics.jsonl").open("a"), (run / "events.jsonl").open("a")
        again = f"; the steps up to {last:,}, which were not saved, are trained again" if last > start else ""
        self.event(start, "start", f"from step {start:,}{again}")
        threading.excepthook = _ignore_disk_errors
        self._events = EventFileWriter(str(run / "tensorboard"))
        # makes TensorBoard drop these steps from earlier event files
        self._events.add_event(
            Summaries(wall_time=time.time(), step=start + 1, session_log=SessionLog(status=SessionLog.START))
        )

    def write(self, step: int, values: dict[str, Value]) -> None:
        """Writes a line of metrics.jsonl, with its step and time. Floats read back bit for bit; NaN and inf become null."""
        values = {k.encode(errors="backslashreplace").decode(): v for k, v in values.items()}  # folder names not in UTF-8
        strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        strict["time"] = round(time.time(), 3)
        self._jsonl.write(json.dumps({"step": step, **strict}, allow_nan=False) + "\n")
        self._jsonl.flush()
        scalars = {k: float(v) for k, v in values.items() if k != "checksum" and isinstance(v, int | float)}
        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in scalars.items()])
        self._events.add_event(Summaries(wall_time=time.time(), step=step, summary=summary))
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def event(self, step: int, event: str, text: str) -> None:
        """Writes a line of events.jsonl: see `Event`."""
        text = text.encode(errors="backslashreplace").decode()
        self._happened.write(json.dumps(Event(step=step, time=time.time(), event=event, text=text)) + "\n")
        self._happened.flush()

    def sync(self) -> None:
        """Waits until all lines are on the disk."""
        self._jsonl.flush()
        os.fsync(self._jsonl.fileno())

    def close(self) -> None:
        """Flushes everything to disk."""
        self.sync()
        self._jsonl.close()
        self._happened.close()
        self._events.close()
        if self._wandb:
            self._wandb.finish()


def _ignore_disk_errors(error: threading.ExceptHookArgs) -> None:
    """Ignores an OSError (a full disk) in TensorBoard's thread: the next event raises it in the main thread."""
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


class _WandbRun(typing.TypedDict):
    """RUN/wandb.json: the run at W&B that gets the numbers of this run folder."""

    id: str
    skip: str  # data.skip
    group: str  # the id of the folder's first run there


def _wandb(config: Config, start: int, last: int):
    """The run at W&B. After a rewind from step `last` to `start` with another `data.skip` it is a new one, in the same group.

    Steps that are trained again without such a change are the same, and W&B keeps what it has.
    """
    try:
        import wandb
    except ImportError:
        raise UserError(f"--log.wandb={config.log.wandb}: W&B is not installed; pip install wandb") from None
    file, run, settings = config.folder / "wandb.json", _WandbRun(id="", skip=config.data.skip, group=""), flat(config)
    before = read_json(file, _WandbRun) if exists(file) else run
    if not before["id"] or (run["skip"] != before["skip"] and start < last):
        run["id"] = secrets.token_hex(8)  # not the folder's name, which another run may have too
        settings |= {"continues": before["id"], "from_step": start} if before["id"] else {}
    run |= {"id": run["id"] or before["id"], "group": before["group"] or run["id"]}
    try:
        started = wandb.init(
            project=config.log.wandb,
            name=Path(config.workdir).name,
            id=run["id"],
            group=run["group"],
            config=settings,
            resume="allow",
            dir=str(config.folder),
        )
        write(file, json.dumps(run) + "\n")
        return started
    except wandb.Error as error:
        what = " ".join(str(error).split())
        raise UserError(f"--log.wandb={config.log.wandb}: {what}; WANDB_MODE=offline needs no account") from None


def truncate_after(path: Path, step: int) -> None:
    """Removes the lines of steps after `step`, and an incomplete last line, from a metrics file. Reads only its end."""
    if not exists(path):
        return
    open_regular(path).close()  # rejects a pipe, which would be read without end
    with path.open("rb+") as f:
        keep, good, bad = f.seek(0, os.SEEK_END), 0, 0
        content = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if keep else b""
        while keep > 0:
            line_start = content.rfind(b"\n", 0, keep - 1) + 1
            line = content[line_start:keep]
            try:
                if line.endswith(b"\n") and parse_line(line)["step"] <= step:
                    break
                good += line.endswith(b"\n")
            except ValueError:
                bad += 1  # a line cut short by a full disk or a power cut is dropped
            keep = line_start
        if not keep and bad > 1 > good:
            raise UserError(f"{path}: none of its lines up to step {step:,} can be read; move it away, or repair it")
        f.truncate(keep)
