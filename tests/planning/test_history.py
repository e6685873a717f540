"""What `report` reads from a run folder: few points without loss of an extreme, faults, restarts, scores, differences."""

import json
import math

import numpy as np
import pytest

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.planning import chart, history
from tinyllama_jax.planning.chart import Curve, Scale
from tinyllama_jax.planning.history import Points


def write(path, rows, tail=""):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows) + tail)


def points(step, value):
    step, value = np.array(step, float), np.array(value, float)
    return Points(step, value, value, value, np.ones(len(step)))


def test_fewer_points_keep_the_extremes_and_the_mean():
    values = np.sin(np.arange(1_000) / 7)
    values[333], values[700] = 50, -50
    few = history.thinned(points(np.arange(1_000), values), 10)
    assert few.step.tolist() == [49.5 + 100 * i for i in range(10)] and few.count.tolist() == [100] * 10
    assert few.high.max() == 50 and few.low.min() == -50 and few.high.argmax() == 3 and few.low.argmin() == 7
    np.testing.assert_allclose(few.mean, values.reshape(10, 100).mean(1))
    again = history.thinned(few, 3)  # of unequal counts
    np.testing.assert_allclose((again.mean * again.count).sum(), values.sum())
    assert len(history.thinned(points([0, 1, 1_000], [1, 2, 3]), 2).step) == 2  # a range without a point has none
    alone = points([7], [1.0])
    assert history.thinned(alone, 10) is alone and history.thinned(points([5] * 20, range(20)), 4).high.tolist() == [19]


def test_a_long_file_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "POINTS", 50)
    rows = [{"step": s, "loss": 100.0 if s == 777 else 1.0, "tokens": 8 * s, "pad": "x" * 3_000} for s in range(1, 1_001)]
    write(tmp_path / "metrics.jsonl", rows)
    run = history.read(tmp_path)
    loss = run.points["loss"]
    assert len(loss.step) <= 51 and loss.count.sum() == 1_000 and loss.high.max() == 100 and run.last["tokens"] == 8_000
    assert run.tokens_at(np.array([0, 500, 1_000])) == pytest.approx([0, 4_000, 8_000], abs=1e-6)


def test_faults_restarts_and_samples(tmp_path):
    losses = [{"step": s, "loss": None if s in (3, 4) else 1.5, "finite": s not in (3, 4)} for s in range(1, 6)]
    damaged = ['{"step": 6, "loss": "low"}', "\x00\x00", '{"step": 2, "loss": 1.0}']
    spike = {"step": 7, "loss": 9.5, "finite": True, "blocks": "[[0], [1]]"}
    write(tmp_path / "metrics.jsonl", [*losses, *damaged, spike], tail='{"step": 8, "lo')
    said = lambda step, event, text: {"step": step, "time": 0.0, "event": event, "text": text}
    events = [said(0, "start", "a"), said(5, "sample", "once"), said(6, "end", "b"), said(4, "start", "c"), "half"]
    write(tmp_path / "events.jsonl", [*events, said(5, "sample", "twice"), said(4, "start", "d")], tail='{"ste')
    write(tmp_path / "processes/1.json", [{"process": 1, "host": "h", "step": 6, "ended": 1, "why": "process 0 is late"}])
    write(tmp_path / "config.json", ["{"])
    run = history.read(tmp_path)
    faults = dict(run.faults[::-1])
    assert run.steps == 7 and run.skipped == [3, 4] and run.spikes == [7] and run.points["loss"].count.sum() == 4
    assert [step for step, _ in run.faults if step] == [3, 6, 7] and faults[7] == "a spike: loss 9.5"
    assert faults[3].startswith("2 steps skipped as not finite: 3 to 4") and "exit code 1 process 0 is late" in faults[6]
    general = "\n".join(what for step, what in run.faults if step is None)
    assert (
        "3 damaged lines are left out: line 6: Expected `float | null`" in general and "line 8: step 2 after step 5" in general
    )
    assert "events.jsonl: 1 damaged" in general and "config.json cannot be read" in general
    killed = "the process before it did not end by itself: killed, or its machine failed"
    assert [what for _, _, what in run.events] == ["start: a", "end: b", "start: c", killed, "start: d"]
    assert run.starts == [4, 4] and run.samples == {5: "twice"} and run.events[0][1] == "1970-01-01 00:00:00 UTC"


def test_scores_in_the_shapes_of_files(tmp_path):
    write(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    write(tmp_path / "evals/b.json", [{"step": 9, "results": {"piqa": {"acc": 0.75, "stderr": 0.01, "n": "x"}}}])
    ours = {"piqa": {"acc,none": 0.5, "acc_stderr,none": 0.02, "alias": "piqa", "f1,strict": True, "acc,strict": 0.25}}
    write(tmp_path / "evals/a.json", [{"step": 10, "results": ours}])
    write(tmp_path / "evals/broken.json", ['{"step": 1'])
    run = history.read(tmp_path)
    assert run.scores == {("piqa", "acc"): [(9, 0.75, 0.01), (10, 0.5, 0.02)], ("piqa", "acc,strict"): [(10, 0.25, 0.0)]}
    assert len(run.faults) == 1 and "evals/broken.json cannot be read" in run.faults[0][1]


def test_differences_between_configurations():
    one = history.flat({"workdir": "a", "optim": {"peak_lr": 1.0, "clip_norm": math.inf}, "init": {"from_": ""}})
    two = history.flat({"workdir": "b", "optim": {"peak_lr": 2.0, "clip_norm": math.inf}, "data": {"sources": {"x": 1}}})
    assert history.differences([one, two]) == {
        "optim.peak_lr": ["1.0", "2.0"], "init.from": ["", None], "data.sources": [None, '{"x": 1}']
    }  # fmt: skip
    assert history.differences([one, one | {"workdir": "elsewhere"}]) == {}


def test_no_run_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        history.read(tmp_path / "nothing")


def test_scales_and_ticks():
    assert Scale(0, 10, 0, 100).ticks() == [0, 5, 10] and Scale(1, 3, 0, 1, whole=True).ticks() == [1, 2, 3]
    assert Scale(1, 1e6, 0, 60, True).ticks() == [10.0**e for e in range(7)]
    assert Scale(8, 300, 0, 1, True).ticks() == pytest.approx([10, 20, 50, 100, 200])
    assert Scale(1, 1e6, 0, 60, True)(np.array([1, 1e3, 1e9])).tolist() == [0, 30, 60]
    shown = [chart.short(v) for v in (0, 4e-4, 4e-5, 2.34567, 9_999, 12_345, 35.65e9, 3e12, -2e6)]
    assert shown == ["0", "0.0004", "4e-5", "2.346", "9999", "12.35k", "35.65B", "3T", "-2M"]


def test_a_few_far_values_do_not_flatten_the_curve():
    values = np.full(200, 2.0) + np.arange(200) / 1_000
    values[100] = 1e9
    curve = Curve("a", 0, 0, points(range(200), values))
    cut, greatest = chart.y_scale([curve], [], False, False, True)
    assert cut.high < 3 and greatest == 1e9
    assert chart.y_scale([curve], [], False, False, False)[0].high > 1e9
    level = np.full(200, 2.0)  # as of a long run: means that hardly change, and noise around them
    noisy = Curve("a", 0, 0, Points(np.arange(200.0), level + np.arange(200) / 1e6, level - 1, level + 3, level))
    assert all(chart.y_scale([noisy], [], log, False, True)[0].high >= 5 for log in (False, True))


@pytest.mark.parametrize("value", [0.0, 1e-300, 3.0, -1e29, 2.0**62])
@pytest.mark.parametrize("log", [False, True])
def test_one_value_has_a_scale(value, log):
    if log and value < 1e-30:
        return  # left out of such a picture
    curve = Curve("<a>", 0, 0, points([2.0**62], [abs(value) if log else value]))
    scale, _ = chart.y_scale([curve], [], log, not log, False)
    assert scale.low < scale.high and scale.ticks()
    assert "nan" not in chart.svg([(curve, curve.points.step)], scale, "step", "<u>", {}, [], "<t>")
