"""The numbers of each step: RUN/metrics.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import threading
import time
import typing
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import Count, check_utf8, decode_json, open_regular

LONGEST = 1 << 24  # bytes of a line of metrics.jsonl; the line of a skipped step lists its blocks
Value = int | float | bool | str | list[float] | None


# The keys that are read from a line of metrics.jsonl, whether of a step, a validation or a save
_NUMBERS = dict.fromkeys(("loss", "grad_norm", "lr", "val_loss"), float | None)
_COUNTS = dict.fromkeys(("checksum", "tokens", "skipping_since", "skipped_in_a_row"), Count)
_OTHERS = {"step": typing.Required[Count], "finite": bool, "recent_losses": list[float]}
Line = typing.TypedDict("Line", _NUMBERS | _COUNTS | _OTHERS, total=False)


def parse_line(text: bytes) -> dict[str, Value]:
    """Decodes a line of metrics.jsonl. Raises ValueError if it is damaged."""
    values = decode_json(text, dict[str, Value]) | decode_json(text, Line)
    for name, value in values.items():
        if "/" in name and not isinstance(value, int | float | None):  # a value of one source
            raise ValueError(f"{name} is not a number")
    return values


def read(run: str | Path) -> list[dict[str, Value]]:
    """Reads the lines of RUN/metrics.jsonl, in order, without a last one that is still being written. Raises UserError."""
    check_utf8(run)
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{run}: is not a run folder, or its first step is not done (it has no metrics.jsonl)")
    out: list[dict] = []
    with open_regular(path) as f:
        for number, text in enumerate(iter(lambda: f.readline(LONGEST), b""), 1):
            if not text.endswith(b"\n") and len(text) < LONGEST:
                break
            try:
                out.append(parse_line(text))
                if out[-1]["step"] < out[max(len(out) - 2, 0)]["step"]:
                    raise ValueError(f"step {out[-1]['step']:,} after step {out[-2]['step']:,}")
            except ValueError as error:
                raise UserError(f"{path}, line {number}: is damaged ({error}); take it out") from None
    return out


def skipped(everything: list[dict]) -> str:
    """Says in a line how many steps of a run were skipped, and which; an empty line if none were."""
    steps = dict.fromkeys(row["step"] for row in everything if row.get("finite") is False)
    spans = zip((s for s in steps if s - 1 not in steps), (s for s in steps if s + 1 not in steps), strict=True)
    named = [f"{first:,}" + (f" to {last:,}" if first < last else "") for first, last in spans]
    if len(named) > 10:
        named[5:-4] = [f"... ({len(named) - 9:,} more)"]
    return f"{len(steps):,} step{'s' * (len(steps) > 1)} skipped as not finite: {', '.join(named)}" if steps else ""


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

    def write(self, step: int, values: dict[str, Value]) -> None:
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
                if line.endswith(b"\n") and parse_line(line)["step"] <= step:
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
