"""The loss curve: which rows of metrics.jsonl it is drawn from, and what stands on it."""

import json
import re

import matplotlib.axes
import matplotlib.image
import pytest

from tinyllama_jax import report
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.run import metrics


def write(run, rows, tail=""):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


ROWS = [
    {"step": 1, "loss": 5.0, "lr": 0.1},
    {"step": 2, "loss": 4.0, "lr": 0.2},
    {"step": 2, "val_loss": 4.5},
    {"step": 3, "loss": None, "lr": 0.3, "finite": False},  # a step that was skipped
    {"step": 4, "loss": 3.0, "lr": 0.25},
    {"step": 4, "val_loss": 3.25},
]


def curves(run, monkeypatch):
    """label -> (x, y) of everything that `draw` plots."""
    seen = {}
    plot, axhline = matplotlib.axes.Axes.plot, matplotlib.axes.Axes.axhline

    def record_plot(self, x, y, *args, **kwargs):
        seen[kwargs["label"]] = (list(x), list(y))
        return plot(self, x, y, *args, **kwargs)

    def record_line(self, y, **kwargs):
        seen[kwargs["label"]] = y
        return axhline(self, y, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", record_plot)
    monkeypatch.setattr(matplotlib.axes.Axes, "axhline", record_line)
    path = report.draw(run)
    return seen, path


def test_draws_training_validation_baseline_and_learning_rate(tmp_path, monkeypatch):
    run = tmp_path / "run"
    write(run, ROWS, tail='{"step": 5, "los')  # the run is writing at this moment
    (run / report.UNIGRAM).write_text('{"val_loss": 6.5}')
    seen, path = curves(run, monkeypatch)
    assert seen["training"] == ([1, 2, 4], [5.0, 4.0, 3.0])  # a skipped step has no place on the curve
    assert seen["validation, 3.250 at the end"] == ([2, 4], [4.5, 3.25])
    assert seen["unigram model, 6.500"] == 6.5 and seen["skipped: 1"][0] == [3]
    assert seen["learning rate"] == ([1, 2, 4], [0.1, 0.2, 0.25])
    picture = matplotlib.image.imread(path)
    assert path == run / "loss.png" and picture.shape[0] > 300 and picture.min() < picture.max()
    assert sorted(p.name for p in run.iterdir()) == ["loss.png", "metrics.jsonl", report.UNIGRAM]


def test_a_run_without_validation_or_baseline(tmp_path, monkeypatch):
    write(tmp_path, ROWS[:2])
    seen, _ = curves(tmp_path, monkeypatch)
    assert set(seen) == {"training", "training, mean of 1", "learning rate"}


def test_mean_of_the_steps_up_to_each(tmp_path, monkeypatch):
    write(tmp_path, [{"step": i, "loss": float(i % 2), "lr": 0.1} for i in range(1, 101)])
    seen, _ = curves(tmp_path, monkeypatch)
    assert seen["training, mean of 2"] == (list(range(2, 101)), [0.5] * 99)


@pytest.mark.parametrize(
    ("rows", "message"), [(None, "is not a run folder"), ([], "no step"), ([{"step": 1, "val_loss": 2.0}], "no step")]
)
def test_nothing_to_draw_is_one_line(tmp_path, rows, message):
    if rows is not None:
        write(tmp_path, rows)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}.*{message}"):
        report.draw(tmp_path)
    assert not (tmp_path / "loss.png").exists()


def test_command_line(tmp_path, capsys):
    write(tmp_path, ROWS)
    assert report.main([str(tmp_path), "--png"]) == 0
    page, skipped = tmp_path / "report.html", "1 step skipped as not finite: 3; their weights stayed as they were"
    assert capsys.readouterr().out == f"{tmp_path / 'loss.png'}\n{page}\n{skipped}\n"
    (tmp_path / "loss.png").unlink()
    write(tmp_path, [{"step": 1, "loss": None, "finite": False}])  # no curve, and yet a page
    assert report.main([str(tmp_path)]) == 0 and "1 step skipped" in page.read_text()
    assert not (tmp_path / "loss.png").exists()


def test_skipped_steps_are_counted_and_named():
    rows = [{"step": step, "finite": step not in (2, 5, 6, 7, 11)} for step in range(1, 12)]
    assert metrics.skipped(rows) == "5 steps skipped as not finite: 2, 5 to 7, 11"
    assert metrics.skipped([{"step": 1, "finite": True, "loss": None}]) == ""  # nothing to predict
    many = metrics.skipped([{"step": 2 * step, "finite": False} for step in range(100)])
    assert many.startswith("100 steps skipped") and "(91 more)" in many and many.endswith("192, 194, 196, 198")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"step": 3, "loss": "low"}', r"Expected `float \| null`, got `str` - at `\$.loss`"),
        (b'{"step": -3}', "Expected `int` >= 0"),
        (b'{"loss": 3.0}', "missing required field `step`"),
        (b'{"step": 3, "share/a": true, "share/b": "x"}', "share/b is not a number"),
        (b'{"step": 3, "loss": {"a": 1}}', "got `object`"),
        (b'{"step": 3, "loss": 1e999}', "out of range"),
        (b"[" * 100_000, "Expected `object`"),
        (b"\xff\xfe", "malformed"),
        (b"", "truncated"),
        (b'{"step": 1, "loss": 3.0, "lr": 0.1}', "step 1 after step 4"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, says):
    write(tmp_path, ROWS)
    with (tmp_path / "metrics.jsonl").open("ab") as f:
        f.write(line + b"\n")
    with pytest.raises(UserError, match=f"metrics.jsonl, line 7: is damaged .*{says}"):
        report.draw(tmp_path)


def test_lines_of_other_keys_are_drawn_as_far_as_they_go(tmp_path, monkeypatch):
    write(tmp_path, [{"step": 1, "loss": 5, "tokens": 10}, {"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0, "new": [1, 2]}])
    seen, _ = curves(tmp_path, monkeypatch)
    assert seen["training"] == ([1, 2], [5.0, 4.0]) and "tokens a step" not in seen
    for value in ('"low"', "18446744073709551616", "-1e308", "null"):
        (tmp_path / report.UNIGRAM).write_text(f'{{"val_loss": {value}}}')
        with pytest.raises(UserError, match=r"unigram.json: is damaged .*val_loss"):
            report.draw(tmp_path)


@pytest.mark.parametrize("to", ["nowhere", report.UNIGRAM])
def test_a_baseline_that_cannot_be_read_is_not_taken_for_absent(tmp_path, to):
    write(tmp_path, ROWS)
    (tmp_path / report.UNIGRAM).symlink_to(to)
    with pytest.raises(OSError, match=report.UNIGRAM):  # one line and exit code 2 in `run_main`
        report.draw(tmp_path)
    assert not (tmp_path / "loss.png").exists()
