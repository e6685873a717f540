"""What a run did, read from its folder for `report`: curves, faults and restarts, samples, scores, configuration."""

import contextlib
import dataclasses
import json
import os
import typing
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import Count, Nats, decode_json, exists, listed, open_regular, read_json
from tinyllama_jax.run import metrics

UNIGRAM = "unigram.json"  # optional: {"val_loss": ...} of a unigram model on the run's validation tokens
POINTS = 2_000  # kept of each metric of a run, however long the run is
KEYS = 300  # different metrics of a run; the page says how many more there are
NAME = 200  # characters of the name of a metric
LARGEST = 1e30  # numbers beyond it are not drawn, and those below 1 / LARGEST as 0
NOT_DRAWN = {"step", "time", "checksum", "skipped", "skipping_since", "skipped_in_a_row", "val_tokens"}


class Baseline(typing.TypedDict):
    """unigram.json."""

    val_loss: Nats


class Evaluated(typing.TypedDict):
    """RUN/evals/*.json: task -> metric -> value."""

    step: Count
    results: dict[str, dict[str, typing.Any]]


class Points(typing.NamedTuple):
    """A curve: for each group of neighbouring lines, mean step; mean, lowest and highest value; number of values."""

    step: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    count: np.ndarray


@dataclasses.dataclass
class Run:
    """A run as its folder describes it. `faults`: (step, what) in order of the steps; step None: it has no single step."""

    path: Path
    name: str = ""  # on the page
    points: dict[str, Points] = dataclasses.field(default_factory=dict)
    last: dict[str, float] = dataclasses.field(default_factory=dict)  # the last value of each number
    steps: int = 0
    skipped: list[int] = dataclasses.field(default_factory=list)
    spikes: list[int] = dataclasses.field(default_factory=list)
    faults: list[tuple[int | None, str]] = dataclasses.field(default_factory=list)
    events: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)  # (step, time, what), in order of time
    starts: list[int] = dataclasses.field(default_factory=list)  # the step from which each start but the first went on
    samples: dict[int, str] = dataclasses.field(default_factory=dict)
    scores: dict[tuple[str, str], list[tuple[int, float, float]]] = dataclasses.field(default_factory=dict)
    config: dict[str, str] = dataclasses.field(default_factory=dict)
    baseline: float | None = None

    def tokens_at(self, step: np.ndarray) -> np.ndarray | None:
        """Tokens of the steps up to each of `step`, or None if the run did not record them."""
        if (known := self.points.get("tokens")) is None:
            return None
        return np.interp(step, [0, *known.step, self.steps], [0, *known.mean, max(self.last["tokens"], known.mean[-1])])


def thinned(points: Points, n: int) -> Points:
    """Joins the points of each of `n` equal ranges of steps, if there are more than `n`; keeps lowest and highest values."""
    if len(points.step) <= n:
        return points
    first, last = points.step[0], points.step[-1]
    group = np.minimum((points.step - first) / max(last - first, 1) * n, n - 1).astype(int)
    at = np.flatnonzero(np.diff(group, prepend=-1))
    count = np.add.reduceat(points.count, at)
    mean = lambda values: np.add.reduceat(values * points.count, at) / count
    low, high = np.minimum.reduceat(points.low, at), np.maximum.reduceat(points.high, at)
    return Points(mean(points.step), np.clip(mean(points.mean), low, high), low, high, count)  # a sum may lose small values


def unigram(run: Path) -> float | None:
    """The unigram model's validation loss, or None if it was not computed."""
    return read_json(run / UNIGRAM, Baseline)["val_loss"] if exists(run / UNIGRAM) else None


def read(path: str | Path) -> Run:
    """Reads a run folder. What is damaged is left out and listed in `faults`. Raises UserError if it is no run folder."""
    run = Run(Path(path), baseline=unigram(Path(path)))
    _numbers(run)
    _scores_in_training(run)
    with _as_fault(run, "config.json"):
        if exists(run.path / "config.json"):
            with open_regular(run.path / "config.json") as f:
                run.config = flat(json.loads(f.read(1 << 24)))  # clip_norm=inf is Infinity in it, which msgspec refuses
    _events(run)
    _processes(run)
    with _as_fault(run, "versions.json"):
        _versions(run)
    for name in listed(run.path / "evals")[:POINTS] if (run.path / "evals").is_dir() else ():
        if name.endswith(".json"):
            with _as_fault(run, f"evals/{name}"):
                _scores(run, read_json(run.path / "evals" / name, Evaluated))
    for values in run.scores.values():
        values.sort()
    run.faults.sort(key=lambda fault: (fault[0] is not None, fault[0]))
    return run


@contextlib.contextmanager
def _as_fault(run: Run, name: str) -> Iterator[None]:
    """Turns an error while a file of the run is read into a line of the page."""
    try:
        yield
    except (UserError, OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        what = f"{name} cannot be read: {error}".encode(errors="backslashreplace").decode()
        run.faults.append((None, what))


def _numbers(run: Run) -> None:
    """Reads metrics.jsonl. Holds only the lines of one of `POINTS` parts of the file at a time."""
    parts: dict[str, list[tuple]] = {}
    group: list[dict[str, metrics.Value]] = []
    damaged, more = [], set()

    def flush() -> None:
        for key in {key: 0 for row in group for key in row if key not in NOT_DRAWN}:
            values = ((row["step"], row.get(key)) for row in group)
            pairs = [
                (s, v if abs(v) > 1 / LARGEST else 0.0) for s, v in values if type(v) in (float, int) and -LARGEST < v < LARGEST
            ]
            if pairs and len(key) <= NAME and (key in parts or len(parts) < KEYS):
                step, value = np.array(pairs, float).T
                low, high = value.min(), value.max()
                parts.setdefault(key, []).append((step.mean(), np.clip(value.mean(), low, high), low, high, len(pairs)))
                run.last[key] = pairs[-1][1]
            elif pairs:
                more.add(hash(key))
        group.clear()

    size = os.path.getsize(run.path / "metrics.jsonl") if exists(run.path / "metrics.jsonl") else 0
    edge = each = size / POINTS if size > 1 << 20 else 0  # of a small file every line is a point
    for number, end, row in metrics.each(run.path):
        if isinstance(row, ValueError):
            damaged.append(f"line {number:,}: {row}")
            continue
        step = run.steps = row["step"]
        if row.get("finite") is False:
            run.skipped.append(step)
        elif "blocks" in row:
            run.spikes.append(step)
            run.faults.append((step, f"a spike: loss {row.get('loss')}"))
        group.append(row)
        if end >= edge:
            flush()
            edge = end + each
    flush()
    run.points = {key: Points(*np.array(part).T) for key, part in parts.items()}
    if skipped := metrics.skipped([{"step": step, "finite": False} for step in run.skipped]):
        run.faults.append((run.skipped[0], f"{skipped}; their weights stayed as they were"))
    if damaged:
        some = "; ".join(damaged[:5]) + ("; ..." if len(damaged) > 5 else "")
        run.faults.append((None, f"metrics.jsonl: {len(damaged):,} damaged lines are left out: {some}"))
    if more:
        run.faults.append((None, f"metrics.jsonl: {len(more):,} numbers are left out: more than {KEYS}, or long names"))


def _events(run: Run) -> None:
    """Reads the end of events.jsonl: starts, ends, signals and samples."""
    if not exists(run.path / "events.jsonl"):
        return
    ended, damaged = True, 0
    with _as_fault(run, "events.jsonl"), open_regular(run.path / "events.jsonl") as f:
        if f.seek(0, os.SEEK_END) > metrics.TAIL:
            f.seek(-metrics.TAIL, os.SEEK_END)
            f.readline()
        else:
            f.seek(0)
        for line in f:
            try:
                event = decode_json(line, metrics.Event)
            except ValueError:
                damaged += line.endswith(b"\n")
                continue
            step, kind = event["step"], event["event"]
            if kind == "sample":
                run.samples[step] = event["text"]
                continue
            if kind == "start" and not ended:
                run.events.append((step, "", "the process before it did not end by itself: killed, or its machine failed"))
            if kind == "start" and run.events:
                run.starts.append(step)
            ended = kind == "end" if kind in ("start", "end") else ended
            run.events.append((step, _when(event["time"]), f"{kind}: {event['text']}"))
    if damaged:
        run.faults.append((None, f"events.jsonl: {damaged:,} damaged lines are left out"))


def _when(seconds: float) -> str:
    return str(np.datetime64(int(min(max(seconds, 0), 1e11)), "s")).replace("T", " ") + " UTC"


def _processes(run: Run) -> None:
    """What RUN/processes says of processes that failed, or reported that another one did."""
    folder = run.path / "processes"
    for name in listed(folder) if folder.is_dir() else ():
        if name.endswith(".json"):
            with contextlib.suppress(UserError, OSError, TypeError, KeyError):  # being written at this moment
                record = read_json(folder / name, dict[str, typing.Any])
                if record["why"] or record["ended"]:
                    code = f" with exit code {record['ended']}" if record["ended"] else ""
                    what = f"process {record['process']} on {record['host']} ended{code} {record['why']}".strip()
                    run.faults.append((record["step"] if type(record["step"]) is int else None, what))


def _versions(run: Run) -> None:
    if not exists(run.path / "versions.json"):
        return
    new = read_json(run.path / "versions.json", dict[str, typing.Any])
    earlier = new.get("before", [])
    if earlier:
        from tinyllama_jax.run.folder import version_differences  # imports JAX

        for old, later in zip(earlier, [*earlier[1:], new], strict=True):
            run.faults.append(
                (int(old["until_step"]), f"packages or devices changed: {'; '.join(version_differences(old, later))}")
            )


def _scores(run: Run, evaluated: Evaluated) -> None:
    """Adds the scores of one file: {task: {metric: value, metric_stderr: error}}, also with lm-eval's `metric,filter`."""
    number = lambda value: float(value) if type(value) in (int, float) and abs(value) < LARGEST else None
    for task, values in evaluated["results"].items():
        for metric, value in values.items():
            if "stderr" in metric or number(value) is None:
                continue
            name, comma, kind = metric.partition(",")
            error = abs(number(values.get(f"{name}_stderr{comma}{kind}", values.get("stderr"))) or 0.0)
            name = name if kind in ("", "none") else metric
            run.scores.setdefault((task[:NAME], name[:NAME]), []).append((evaluated["step"], float(value), error))


def _scores_in_training(run: Run) -> None:
    """Moves the numbers eval/TASK/METRIC and their _stderr from `points` to `scores`, apart from those of whole checkpoints."""
    own = {key.removeprefix("eval/"): run.points.pop(key) for key in list(run.points) if key.startswith("eval/")}
    for key, points in own.items():
        task, _, metric = key.partition("/")
        if not metric.endswith("_stderr"):
            errors = own.get(f"{key}_stderr")
            errors = dict(zip(*errors[:2], strict=True)) if errors else {}
            values = [(int(step), value, errors.get(step, 0.0)) for step, value in zip(*points[:2], strict=True)]
            run.scores[f"{task}, during training", metric] = values


def flat(config: dict) -> dict[str, str]:
    """`section.key` -> value as text, of a config.json of any version."""
    text = lambda value: value if isinstance(value, str) else json.dumps(value)
    out = {}
    for section, values in config.items():
        if isinstance(values, dict):
            out |= {f"{section}.{key.rstrip('_')}": text(value) for key, value in values.items()}
        else:
            out[section] = text(values)
    return out


def differences(configs: list[dict[str, str]]) -> dict[str, list[str | None]]:
    """Key -> its value in each config, None where it is absent, for the keys that differ; not the folder's own name."""
    keys = dict.fromkeys(key for config in configs for key in config if key != "workdir")
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}
