"""Where the time of a run went, over all its starts: training that was kept, work that was lost, waits, pauses.

The clock of a process is `progress.Timer`; each line of metrics.jsonl has the seconds of each part so far.
"""

import itertools

PARTS = {
    "productive": "training: steps that were kept",
    "data_wait": "waiting for data",
    "saving": "saves, while training waits for them",
    "evaluating": "validation, samples, scores; writing a profile",
    "starting": "from the first start of the process to the end of its first step",
    "restarting": "the same for each later start",
    "lost": "work that was thrown away: a later start resumed from an earlier checkpoint",
    "down": "no process ran",
}
UNDONE = ("productive", "data_wait", "saving", "evaluating")  # become "lost" where a run goes back to a checkpoint


def seconds(line: dict) -> dict[str, float]:
    """Part -> seconds so far, as a line of metrics.jsonl has them; 0 where it has none."""
    return {part: float(line.get(f"seconds/{part}") or 0.0) for part in PARTS}


def keys(parts: dict[str, float]) -> dict[str, float]:
    """What a line of metrics.jsonl has of `parts`: goodput = productive / (all - down), and the seconds of each part."""
    ran = sum(parts.values()) - parts["down"]
    return {"goodput": parts["productive"] / max(ran, 1e-9)} | {f"seconds/{part}": round(n, 3) for part, n in parts.items()}


def carried(lines: list[dict], kept: list[dict], events: list[dict], begun: float, at: float) -> dict[str, float]:
    """The parts of a run up to `at`, where a process that began at `begun` has gone back to the last line of `kept`.

    Both are seconds since 1970. `lines`, `kept`: of metrics.jsonl before and after the lines of later steps were removed.
    `events`: of events.jsonl. What ran after the last line of a killed process is not known: it counts as `down`.
    """
    marks = [event for event in events if event.get("event") in ("start", "end") and event.get("time") is not None]
    last = lines[-1] if lines else {"time": marks[0]["time"]} if marks else {}
    parts, before = seconds(last), seconds(kept[-1] if kept else {})
    parts["restarting" if last else "starting"] += at - begun
    if last.get("time") is None:  # a new run, or one of a version that kept no such account
        return parts
    for part in UNDONE:
        lost = max(parts[part] - before[part], 0.0)
        parts[part], parts["lost"] = parts[part] - lost, parts["lost"] + lost
    pairs = itertools.pairwise(mark for mark in marks if mark["time"] >= last["time"])
    failed = sum(b["time"] - a["time"] for a, b in pairs if (a["event"], b["event"]) == ("start", "end"))
    parts["restarting"] += failed  # starts that ended before they wrote a line
    parts["down"] += max(begun - last["time"] - failed, 0.0)
    return parts
