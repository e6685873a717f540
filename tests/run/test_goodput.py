"""Where the time of a run went: every case by hand."""

import json

import pytest

from tinyllama_jax.base import config as c
from tinyllama_jax.run import goodput, metrics, progress

BEGUN = 1_000_000.0


def line(step, time, **parts):
    return {"step": step, "time": BEGUN + time} | {f"seconds/{part}": seconds for part, seconds in parts.items()}


def event(name, time):
    return {"step": 0, "time": BEGUN + time, "event": name, "text": ""}


def carried(lines, kept, events, begun):
    parts = goodput.carried(lines, lines[:kept], events, BEGUN + begun, BEGUN + begun)
    return {part: round(seconds, 6) for part, seconds in parts.items() if seconds}


FIRST = [  # 30 s of start, then 10 s a step, of which 1 s waits for data; a save after step 2 and a validation after 3
    line(1, 30, starting=30),
    line(2, 40, starting=30, productive=9, data_wait=1),
    line(2, 45, starting=30, productive=9, data_wait=1, saving=5),
    line(3, 55, starting=30, productive=18, data_wait=2, saving=5),
    line(3, 62, starting=30, productive=18, data_wait=2, saving=5, evaluating=7),
]
STARTED = [event("start", 20)]


def test_a_run_that_was_never_restarted():
    assert sum(goodput.seconds(FIRST[-1]).values()) == 62
    keys = goodput.keys(goodput.seconds(FIRST[-1]))
    assert keys["goodput"] == pytest.approx(18 / 62) and keys["seconds/evaluating"] == 7


def test_killed_and_gone_back_to_an_older_checkpoint():
    """From step 2 on all is lost: 9 + 1 + 7 s. The next process began 38 s after the last line."""
    parts = carried(FIRST, 3, STARTED, begun=100)
    assert parts == {"starting": 30, "productive": 9, "data_wait": 1, "saving": 5, "lost": 17, "down": 38}
    assert sum(parts.values()) == 100
    assert carried(FIRST, 0, STARTED, begun=100) == {"starting": 30, "lost": 32, "down": 38}  # no checkpoint was left


def test_stopped_by_a_signal_and_started_again_a_day_later():
    ended = [*STARTED, {**event("stop", 61)}, event("end", 62.5)]
    parts = carried(FIRST, 5, ended, begun=62 + 86_400)
    assert parts == {"starting": 30, "productive": 18, "data_wait": 2, "saving": 5, "evaluating": 7, "down": 86_400}
    assert goodput.keys(goodput.seconds({}) | parts)["goodput"] == pytest.approx(18 / 62)  # nobody waited for that day


def test_a_rewind_past_an_earlier_restart_keeps_what_was_lost_before():
    second = [*FIRST[:3], line(3, 160, starting=30, restarting=50, productive=18, data_wait=2, saving=5, lost=17, down=38)]
    parts = carried(second, 2, STARTED, begun=160)  # by data.skip, to step 2 before it was saved
    assert parts == {"starting": 30, "restarting": 50, "productive": 9, "data_wait": 1, "lost": 17 + 15, "down": 38}
    assert sum(parts.values()) == 160


def test_starts_that_reach_no_step_are_restarts_if_they_ended_by_themselves():
    events = [*STARTED, event("start", 70), event("end", 75), event("start", 80), event("start", 90), event("end", 93)]
    parts = carried(FIRST, 5, events, begun=100)  # the one at 80 was killed: what it did is not known
    assert (parts["restarting"], parts["down"]) == (5 + 3, 38 - 8)


def test_without_an_account():
    assert carried([], 0, [], begun=100) == {}
    assert carried([{"step": 3, "loss": 1.0}], 1, STARTED, begun=100) == {}  # of an earlier version
    damaged = [{"step": 1}, {"step": 1, "event": "end", "time": None}]
    assert carried([{"step": 3, "time": None}], 1, damaged, begun=100) == {}
    assert carried([], 0, [event("start", 10), event("end", 30)], begun=100) == {"restarting": 20, "down": 70}


def test_the_clock_of_two_processes(tmp_path, monkeypatch):
    """5 s of imports, 20 to the first step, 10 a step; killed 3 s into step 4, after a save of step 2; 7 s later again."""
    now = [BEGUN]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])  # the same module for `metrics`
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0] - BEGUN)
    config = c.Config(
        str(tmp_path),
        c.Model(2, 32, 4, 2, 64, 100, 16),
        c.Data({"a": 1}),
        c.Optim(4e-4, 4e-5, 10, 0.1, 1.0),
        c.Train(100, 128, 2),
        c.Checkpoint(10),
    )

    def live(start, end):
        startup = progress.Startup(5.0)
        now[0] += 20
        writer = metrics.Writer(config, start, startup.began)
        timer = progress.Timer(config, start, 1, None, writer.parts)
        with timer.timed("evaluating"):  # weights that came from elsewhere
            now[0] += 4
        for step in range(start + 1, end + 1):
            with timer.timed("data_wait"):
                now[0] += 1
            now[0] += 9
            assert step > start + 1 or timer.started() == 4
            writer.write(step, timer.account())
            if step == 2:
                with timer.timed("saving"):
                    now[0] += 2
                writer.write(step, timer.account())
        return writer

    now[0] += 5
    live(0, 3).close()  # what is on the disk is what a kill leaves, too
    now[0] += 3
    now[0] += 7 + 5
    live(2, 4).close()
    rows = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = {"starting": 5 + 20 + 10, "restarting": 5 + 20 + 10, "evaluating": 4 + 4, "saving": 2, "data_wait": 1 + 1}
    expected |= {"productive": 9 + 9, "lost": 10, "down": 3 + 7}
    assert goodput.seconds(rows[-1]) == pytest.approx(expected)
    assert sum(expected.values()) == rows[-1]["time"] - BEGUN and rows[-1]["goodput"] == pytest.approx(18 / (120 - 10))
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4]
