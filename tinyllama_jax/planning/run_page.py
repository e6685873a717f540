"""One HTML page about one or several runs, which needs no other file. For `report`."""

import base64
import hashlib
import html
import os
import time
from pathlib import Path

import numpy as np

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.planning import chart
from tinyllama_jax.planning.chart import Curve, short
from tinyllama_jax.planning.history import Points, Run, differences, thinned
from tinyllama_jax.run import goodput

RUNS = 16  # at most on a page: more curves cannot be told apart
BUDGET = 600  # points of a picture, over its curves
OTHERS, ROWS, SAMPLES, LONG = (
    40,
    200,
    12,
    2_000,
)  # at most: pictures of other metrics; rows of a table; samples of a run; characters of a sample
# (title, unit, key, key of the validation, how it is drawn); the picture of a key that no run has is left out
LEARNING = (
    ("Loss", "nats a token", "loss", "val_loss", "cut"),
    ("Perplexity", "e to the loss", "loss", "val_loss", "exp log"),
    ("Accuracy", "share of tokens predicted", "accuracy", "val_accuracy", "zero"),
    ("Gradient norm", "before clipping", "grad_norm", "", "cut log"),
    ("Loss scale", "factor, fp16", "loss_scale", "", "changing log"),
)
SCHEDULE = (("Learning rate", "per step", "lr", "", "zero"), ("Batch size", "tokens a step", "batch", "", "zero"))
SPEED = (
    ("Throughput", "tokens a second, all devices", "tokens_per_second", "", "zero"),
    ("Model FLOPs utilization", "share of the peak, PaLM's convention", "mfu_palm", "", "zero"),
    ("Model FLOPs", "TFLOP/s a device, PaLM's convention", "tflops_per_device_palm", "", "zero"),
    ("Time of a step", "seconds", "step_seconds", "", "cut zero"),
    ("Waiting for data", "seconds a step", "data_wait_seconds", "", "cut zero"),
    ("Saving", "seconds a step", "checkpoint_seconds", "", "zero"),
    ("Memory", "GiB of the fullest device, at most so far", "memory_peak_gib", "", "zero"),
    ("Goodput", "share of the time that the run ran", "goodput", "", "zero"),
)
BY_SOURCE = (
    ("Mixture", "share of the sequences", "share/", "zero"),
    ("Validation loss by source", "nats a token", "val_loss/", ""),
)
USED = {"tokens", "real_tokens", "val_perplexity"}  # metrics that "Other numbers" need not show
USED |= {key for table in (LEARNING, SCHEDULE, SPEED) for row in table for key in row[2:4]}


def escape(value: object) -> str:
    """Text as HTML; what cannot be encoded is shown as an escape."""
    return html.escape(str(value).encode(errors="backslashreplace").decode())


def page(runs: list[Run]) -> str:
    """The page. Raises UserError for too many runs."""
    if len(runs) > RUNS:
        raise UserError(f"RUN: {len(runs)} runs; a page can show {RUNS}")
    common = os.path.commonpath([run.path.absolute().parent for run in runs])
    names = [os.path.relpath(run.path.absolute(), common) for run in runs] if len(runs) > 1 else [str(run.path) for run in runs]
    for run, name in zip(runs, names, strict=True):
        run.name = name
    sections = {
        "Summary": _summary(runs),
        "Learning": _charts(_known(runs, LEARNING)),
        "Schedule and mixture": _charts(_known(runs, SCHEDULE) + [c for row in BY_SOURCE for c in _by_source(runs, *row)]),
        "Speed": _charts(_known(runs, SPEED)),
        "Time": _time(runs),
        "Faults and restarts": _faults(runs),
        "Evaluation scores": _charts(_scores(runs)) or _note("No scores: no --eval.every, and no file in RUN/evals."),
        "Samples": _samples(runs),
        "Configuration": _configuration(runs),
        "Other numbers": _others(runs),
    }
    anchors = {title: title.split()[0].lower() for title in sections}
    head = f"<header><h1>{'Run' if len(runs) == 1 else 'Runs'}: {', '.join(map(escape, names))}</h1>"
    head += _note(
        f"Written {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC. Lines are means of neighbouring steps; bands reach "
        "from their least to their greatest value; dots are validations. Point at a picture to read its values."
    )
    head += "<nav>" + "".join(f'<a href="#{anchor}">{title}</a>' for title, anchor in anchors.items()) + "</nav>"
    if len(runs) > 1:
        box = '<label><input type="checkbox" id="show{}" checked>{}{}</label>'
        boxes = (box.format(i, _swatch(i), escape(name)) for i, name in enumerate(names))
        head += f"<fieldset><legend>Runs shown</legend>{''.join(boxes)}</fieldset>"
    if any("tokens" in run.points for run in runs):
        radio = '<label><input type="radio" name="by" {}> {}</label>'
        pair = radio.format('id="by-steps" checked', "steps") + radio.format('id="by-tokens"', "tokens")
        head += f'<fieldset class="axis"><legend>Horizontal axis</legend>{pair}</fieldset>'
        without = [escape(run.name) for run in runs if "tokens" not in run.points]
        head += _note(f"Without a count of tokens, and so not drawn by tokens: {', '.join(without)}.") if without else ""
    parts = [f'<section id="{anchors[title]}"><h2>{title}</h2>{content}</section>' for title, content in sections.items()]
    hiding = "\n".join(f"body:has(#show{i}:not(:checked)) .r{i} {{ display: none; }}" for i in range(len(runs)))
    template = Path(__file__).with_name("report.html").read_text()
    script = template.partition("<script>")[2].partition("</script>")[0]  # no other script can run, whatever a run's files hold
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = template.replace("<!-- hash -->", f"sha256-{digest}").replace("<!-- hiding -->", hiding)
    front, back = template.replace("<!-- title -->", f"Report: {', '.join(map(escape, names))}").split("<!-- body -->")
    return f"{front}{head}</header><main>{''.join(parts)}</main>{back}"


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + " ..."


def _swatch(color: int) -> str:
    return f'<i class="c{color % 8} d{color // 8 % 2}"></i>'


def _table(header: list[str], rows: list[list[object]], by_run: bool = False) -> str:
    """A table that scrolls by itself where it is too wide. `by_run`: row i is hidden with run i."""
    line = lambda cells, tag: "".join(f"<{tag}>{escape(_cut(str(cell), LONG))}</{tag}>" for cell in cells)
    body = "".join(f"<tr{f' class=r{i}' if by_run else ''}>{line(row, 'td')}</tr>" for i, row in enumerate(rows[:ROWS]))
    more = _note(f"... and {len(rows) - ROWS:,} more") if len(rows) > ROWS else ""
    head = (
        f'<div class="scroll" tabindex="0" role="group" aria-label="table"><table><thead><tr>{line(header, "th")}</tr></thead>'
    )
    return f"{head}<tbody>{body}</tbody></table></div>{more}"


def _charts(figures: list[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _figure(
    runs: list[Run],
    title: str,
    unit: str,
    curves: list[Curve],
    how: str = "",
    levels: dict[str, float] | None = None,
    marks: list[tuple] = (),
    key: str = "",
) -> str:
    """A picture by steps and one by tokens, its text, and a table of each curve. `key`: HTML below it.

    `levels`, `marks`: see `chart.svg`; the marks are steps.
    """
    levels, share = levels or {}, min(max(BUDGET // max(len(curves), 1), 24), 300)
    curves = [c._replace(points=thinned(c.points, share)) for c in curves]
    if "log" in how:
        curves = [c._replace(points=Points(*(column[c.points.low > 0] for column in c.points))) for c in curves]
        curves = [c for c in curves if len(c.points.step)]
    if not curves:
        return ""
    y, greatest = chart.y_scale(curves, list(levels.values()), "log" in how, "zero" in how, "cut" in how)
    rows, text = [], []
    for name, points in ((c.name, c.points) for c in curves):
        first, least, most, last = map(short, (points.mean[0], points.low.min(), points.high.max(), points.mean[-1]))
        rows.append([name, first, least, most, last])
        span = f"{first} at step {points.step[0]:,.0f}, {last} at step {points.step[-1]:,.0f}"
        text.append(f"{name}: {span}, least {least}, greatest {most}")
    text = f"{title}, {unit}. " + "; ".join(text[:6]) + ("; ..." if len(text) > 6 else "")
    by_step = [(c, c.points.step) for c in curves]
    by_tokens = [(c, x) for c in curves if (x := runs[c.run].tokens_at(c.points.step)) is not None]
    pictures = chart.svg(by_step, y, "step", unit, levels, marks, text)
    if by_tokens:
        of_tokens = [(i, kind, x) for i, kind, steps in marks if (x := runs[i].tokens_at(steps)) is not None]
        pictures += chart.svg(by_tokens, y, "tokens", unit, levels, of_tokens, text)
    caption = f"Higher values, up to {short(greatest)}, are cut off. " if greatest > y.high else ""
    caption += "Red: skipped steps, and thick ones spikes. Dotted: restarts." if marks else ""
    button = f'<button type="button" aria-pressed="false" aria-label="Larger: {escape(title)}">larger</button>'
    table = _table(["", "first", "least", "greatest", "last"], rows)
    return (
        f"<figure><h3>{escape(title)}</h3>{button}{pictures}{key}<output></output><figcaption>{caption}</figcaption>"
        f"<details><summary>In numbers</summary>{table}</details></figure>"
    )


def _points(run: Run, key: str) -> Points | None:
    """The curve of a metric. `batch`: the tokens of a step, from the tokens so far."""
    if key != "batch":
        return run.points.get(key)
    if (tokens := run.points.get("tokens")) is None or len(tokens.step) < 2 or not np.all(np.diff(tokens.step) > 0):
        return None
    size = np.diff(tokens.mean) / np.diff(tokens.step)
    size = np.concatenate([size[:1], size])
    return Points(tokens.step, size, size, size, tokens.count)


def _known(runs: list[Run], table: tuple) -> list[str]:
    """A picture for each row of `table` whose metric some run has."""
    out = []
    for title, unit, key, validation, how in table:
        curves = []
        for i, run in enumerate(runs):
            name = run.name if len(runs) > 1 else title.lower()
            for each, dots in ((key, False), (validation, True)):
                points = _points(run, each) if each else None
                if points is not None and ("changing" not in how or points.high.max() > points.low.min()):
                    if "exp" in how:
                        values = (np.exp(np.minimum(v, 60.0)) for v in points[1:4])
                        points = Points(points.step, *values, points.count)
                    curves.append(Curve(f"{name}, validation" if dots else name, i, i, points, dots))
        many = len(runs) > 1
        levels = {f"unigram model{f', {run.name}' if many else ''}": run.baseline for run in runs if run.baseline is not None}
        of_loss = (levels, _marks(runs)) if title == "Loss" else ()
        out += [_figure(runs, title, unit, curves, how, *of_loss)] if curves else []
    return out


def _marks(runs: list[Run]) -> list[tuple[int, str, np.ndarray]]:
    kinds = [{"skipped": run.skipped, "spike": run.spikes, "start": run.starts} for run in runs]
    return [(i, kind, np.array(steps)) for i, of in enumerate(kinds) for kind, steps in of.items() if steps]


def _by_source(runs: list[Run], title: str, unit: str, prefix: str, how: str) -> list[str]:
    """For each run a picture with a curve for each source."""
    out, dots = [], prefix.startswith("val")
    for i, run in enumerate(runs):
        keys = [key for key in run.points if key.startswith(prefix)][:16]
        curves = [Curve(key.removeprefix(prefix), i, j, run.points[key], dots) for j, key in enumerate(keys)]
        named = "".join(f"<li>{_swatch(c.color)} {escape(c.name)}</li>" for c in curves)
        own = f"{title}, {run.name}" if len(runs) > 1 else title
        picture = _figure(runs, own, unit, curves, how, key=f'<ul class="key">{named}</ul>')
        out += [picture.replace("<figure>", f'<figure class="r{i}">')] if picture else []
    return out


def _scores(runs: list[Run]) -> list[str]:
    """For each task and metric a picture of the scores of the runs' checkpoints, with one standard error up and down."""
    out = []
    for task, metric in list(dict.fromkeys(key for run in runs for key in run.scores))[:OTHERS]:
        curves = []
        for i, run in enumerate(runs):
            if values := run.scores.get((task, metric)):
                step, score, error = np.array(values, float).T
                points = Points(step, score, score - error, score + error, np.ones(len(step)))
                curves.append(Curve(run.name, i, i, points, True))
        out.append(_figure(runs, task, f"{metric}, with its standard error", curves))
    return out


def _others(runs: list[Run]) -> str:
    """Pictures of the numbers that no other section shows."""
    prefixes = (*(row[2] for row in BY_SOURCE), "seconds/")
    keys = dict.fromkeys(k for run in runs for k in run.points if k not in USED and not k.startswith(prefixes))
    rows = [(key, "as metrics.jsonl has it", key, "", "") for key in keys][:OTHERS]
    more = _note(f"... and {len(keys) - OTHERS} more in metrics.jsonl") if len(keys) > OTHERS else ""
    content = _charts(_known(runs, tuple(rows))) + more
    return f"<details><summary>{len(rows)} pictures</summary>{content}</details>" if rows else _note("None.")


def _summary(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        last = {key: short(value) for key, value in run.last.items()}
        validation, speed = run.points.get("val_loss"), run.points.get("tokens_per_second")
        total = run.config.get("train.steps", "")
        written = time.gmtime((run.path / "metrics.jsonl").stat().st_mtime)
        row = {
            "run": run.name,
            "step": f"{run.steps:,}" + (f" of {int(total):,}" if total.isdecimal() and len(total) < 20 else ""),
            "tokens": last.get("tokens"),
            "loss": last.get("loss"),
            "validation loss": last.get("val_loss"),
            "least validation loss": short(validation.low.min()) if validation else None,
            "validation perplexity": short(np.exp(min(run.last["val_loss"], 60))) if validation else None,
            "tokens/s, mean": short(np.average(speed.mean, weights=speed.count)) if speed else None,
            "MFU": last.get("mfu_palm"),
            "skipped steps": len(run.skipped),
            "spikes": len(run.spikes),
            "restarts": len(run.starts),
            "last line": time.strftime("%Y-%m-%d %H:%M UTC", written),
        }
        rows.append({name: "–" if value is None else value for name, value in row.items()})
    if len(rows) == 1:  # reads better from top to bottom, and fits a phone
        return _table(["", "at the end"], list(rows[0].items()))
    return _table(list(rows[0]), [list(row.values()) for row in rows], by_run=True)


def _time(runs: list[Run]) -> str:
    """For each run a bar and a table of where its time went."""
    out = ""
    for i, run in enumerate(runs):
        parts = goodput.seconds(run.last)
        if not (whole := sum(parts.values())):
            continue
        shares = {part: seconds / whole for part, seconds in parts.items()}
        bar = "".join(f'<i class="c{j}" style="width:{share:.3%}"></i>' for j, share in enumerate(shares.values()))
        named = "".join(f"<li>{_swatch(j)} {part}</li>" for j, part in enumerate(parts))
        rows = [[part, short(parts[part] / 3_600), f"{shares[part]:.1%}", what] for part, what in goodput.PARTS.items()]
        ran = short((whole - parts["down"]) / 3_600)
        text = f"Goodput {goodput.keys(parts)['goodput']:.1%}: the productive hours, of the {ran} that were not down."
        name = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        content = (
            f'<div class="bar">{bar}</div><ul class="key">{named}</ul>{_table(["part", "hours", "share of all", ""], rows)}'
        )
        out += f'<article class="r{i}">{name}{_note(text)}{content}</article>'
    return out or _note("No account: the runs were trained by a version that kept none.")


def _faults(runs: list[Run]) -> str:
    out = ""
    for i, run in enumerate(runs):
        rows = [["–" if step is None else f"{step:,}", what] for step, what in run.faults]
        content = _table(["step", "fault"], rows) if rows else _note("No fault is recorded.")
        if run.events:
            rows = [[f"{step:,}", when, what] for step, when, what in run.events[-ROWS:]]
            content += _table(["step", "time (UTC)", "starts and ends"], rows)
        else:
            content += _note("Starts and ends are not recorded: the run has no events.jsonl.")
        out += f'<article class="r{i}">{f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""}{content}</article>'
    return out


def _samples(runs: list[Run]) -> str:
    """Samples of a run, evenly spread over its steps, the last one included."""
    out = ""
    for i, run in enumerate(runs):
        steps = sorted(run.samples)
        for step in [steps[round(k)] for k in np.linspace(0, len(steps) - 1, min(len(steps), SAMPLES))]:
            text = _cut(run.samples[step], LONG)
            name = f"{run.name}, " if len(runs) > 1 else ""
            out += f'<article class="r{i}"><h3>{escape(name)}step {step:,}</h3><pre>{escape(text)}</pre></article>'
    return (
        _charts([out]) if out else _note("No sample: with --log.sample=TEXT the model continues a text after each validation.")
    )


def _configuration(runs: list[Run]) -> str:
    """What differs between the runs, then all keys."""
    out, cut = "", lambda value: "–" if value is None else _cut(value, 500)
    names = [run.name for run in runs]
    if len(runs) > 1:
        different = differences([run.config for run in runs])
        rows = [[key, *map(cut, values)] for key, values in different.items()]
        out = "<h3>Differences</h3>" + (_table(["key", *names], rows) if rows else _note("None: the configurations are equal."))
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [[key, *(cut(run.config.get(key)) for run in runs)] for key in keys]
    return out + f"<details><summary>All keys</summary>{_table(['key', *names], rows)}</details>"
