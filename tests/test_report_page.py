"""The page of `report`, opened in a real Chromium: nothing runs or loads that is not its own, and it fits and can be read."""

import json
import math

import pytest
from browser import chromium
from test_page import light

from tinyllama_jax import report

EVIL = "<img src=x onerror=alert(1)>&'\""
SECTIONS = (
    "Summary, Learning, Schedule and mixture, Speed, Time, Faults and restarts, Evaluation scores, Samples, Configuration"
)


def make(run, steps, rate=1e-3):
    """A run folder with hostile names, skipped steps, and a last line that is being written."""
    (run / "evals").mkdir(parents=True)
    lines, tokens = [], 0
    for step in range(1, steps + 1):
        tokens += 100 if step <= steps / 2 else 200
        loss = 2 + 5 / step
        row = {"step": step, "loss": loss if step % 50 else None, "finite": step % 50 > 0, "lr": rate, "grad_norm": 1 / step}
        row |= {"tokens": tokens, "tokens_per_second": 1e6, "mfu_palm": 0.5, "share/a": 0.7, f"share/{EVIL}": 0.3, EVIL: step}
        row |= {"seconds/productive": 6.0 * step, "seconds/lost": 2.0 * step, "seconds/down": 2.0 * step, "goodput": 0.75}
        lines.append(row | {"time": 1.7e9 + step, "memory_peak_gib": 3.5})
        if step % 20 == 0:
            lines.append({"step": step, "val_loss": loss, "val_perplexity": math.exp(loss)})
    text = "".join(json.dumps(line) + "\n" for line in lines) + "damaged\n" + '{"step": 9999, "lo'
    (run / "metrics.jsonl").write_text(text)
    events = [(0, "start", "from step 0"), (steps, "sample", f"{EVIL}\n<script>alert(2)</script>"), (steps, "end", EVIL)]
    text = "".join(json.dumps({"step": s, "time": 1.7e9, "event": event, "text": what}) + "\n" for s, event, what in events)
    (run / "events.jsonl").write_text(text)
    (run / "config.json").write_text(json.dumps({"optim": {"peak_lr": rate}, "log": {"sample": "</script>" + EVIL * 50}}))
    scores = {"step": steps, "results": {EVIL: {"acc": 0.5, "acc_stderr": 0.1}}}
    (run / "evals/1.json").write_text(json.dumps(scores))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    long, short = folder / f"<b>{EVIL}", folder / "short"
    make(long, 400)
    make(short, 3, rate=2e-3)
    (short / report.UNIGRAM).write_text('{"val_loss": 6.5}')
    assert report.main([str(long), str(short)]) == 0
    return long, short, long / "report.html"


@pytest.fixture(scope="module")
def browser():
    with chromium() as one:
        yield one


@pytest.fixture
def page(browser, written, request):
    options = {"viewport": {"width": 360, "height": 640}, "color_scheme": "dark"} | getattr(request, "param", {})
    context = browser.new_context(**options)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda asked: asked.url.startswith("file:") and wrong.append(asked.url))
    page.goto(written[2].as_uri())
    assert wrong.pop(0).startswith("file:")  # the page itself, and nothing else
    yield page
    context.close()
    assert not wrong


WIDE = {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"}


@pytest.mark.parametrize("page", [{}, WIDE], ids=["phone", "desktop"], indirect=True)
def test_it_fits_and_can_be_read(page, written):
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert ", ".join(page.locator("h2").all_inner_texts()) == f"{SECTIONS}, Other numbers"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("h1").inner_text() == f"Runs: {written[0].name}, short"
    assert not page.locator("img, b").count() and page.locator("script").count() == 1
    text = page.locator("main").inner_text()
    for part in ("8 steps skipped", "1 damaged line", EVIL, "<script>alert(2)</script>", "optim.peak_lr", "400", "unigram"):
        assert part in text or part in page.locator("body").text_content(), part
    assert "Goodput 75.0%: the productive hours, of the 0.8889 that were not down." in text  # 400 x 8 s
    bar = [box["width"] for box in (part.bounding_box() for part in page.locator(".r0 .bar i").all())]
    assert [width / sum(bar) for width in bar] == pytest.approx([0.6, 0, 0, 0, 0, 0, 0.2, 0.2], abs=0.01)
    assert sum(bar) == pytest.approx(page.locator(".r0 .bar").bounding_box()["width"], rel=0.01)
    titles = ("Loss", "Perplexity", "Learning rate", "Batch size", "Throughput", "Gradient norm", "Memory", "Goodput", EVIL)
    for title in titles:
        figure = page.locator("figure", has=page.get_by_role("heading", name=title, exact=True)).first
        picture = figure.locator("svg.step")
        assert picture.is_visible() and title in picture.get_attribute("aria-label")
        assert picture.locator("text", has_text="step").count() and picture.bounding_box()["width"] > 250
        size = picture.locator("text").first.bounding_box()["height"]
        assert size >= 9  # CSS pixels
    color = lambda query, name="color": page.evaluate(f"getComputedStyle(document.querySelector({query!r})).{name}")
    back = light(color("body", "backgroundColor"))
    ratio = lambda front: (max(light(front), back) + 0.05) / (min(light(front), back) + 0.05)
    assert min(ratio(color(query)) for query in ("body", "figcaption", "a", "th")) >= 4.5  # WCAG 2.2, 1.4.3
    assert min(ratio(color(f"path.line.c{i}", "stroke")) for i in (0, 1)) >= 3  # 1.4.11
    assert (back < 0.1) == page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")


@pytest.mark.parametrize("page", [WIDE], ids=["desktop"], indirect=True)
def test_axis_runs_values_and_size_can_be_chosen(page):
    figure = page.locator("figure").first
    steps, tokens = figure.locator("svg.step"), figure.locator("svg.tokens")
    assert steps.is_visible() and not tokens.is_visible()
    box = steps.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 342 / 360, box["y"] + box["height"] / 2)  # the right end
    long = tokens.locator("title").first.text_content()
    assert (
        figure.locator("output").inner_text() == f"step 400: {long} 2.013 · {long}, validation 2.013"
    )  # the mean of two steps
    page.get_by_role("radio", name="tokens").check()
    assert tokens.is_visible() and not steps.is_visible()
    assert tokens.get_attribute("data-x") == "0 60000.0"  # 200 steps of 100, 200 of 200
    curve = tokens.locator("path.line.r0").first
    assert curve.is_visible()
    page.get_by_role("checkbox").first.uncheck()
    assert not curve.is_visible() and tokens.locator("path.line.r1").first.is_visible()
    figure.get_by_role("button").click()
    assert tokens.bounding_box()["width"] > 1_000
    page.emulate_media(media="print")
    assert not page.get_by_role("navigation").is_visible() and tokens.is_visible()


def test_what_is_typed_wrongly_is_named(tmp_path, written, capsys):
    short = written[1]
    for argv, says in (
        ([], "RUN"),
        ([str(tmp_path)], "is not a run folder"),
        ([str(short), str(short) + "x"], "is not a run folder"),
        ([str(short), "--output="], "--output is empty"),
        ([""], "RUN is empty"),
        ([str(short), "--outptu=x"], "--outptu"),
    ):
        with pytest.raises(report.UserError, match=says):
            report.main(argv)
    many = [tmp_path / str(i) for i in range(17)]
    for run in many:
        run.symlink_to(short)
    with pytest.raises(report.UserError, match="17 runs; a page can show 16"):
        report.main(list(map(str, many)))
    capsys.readouterr()
    assert report.main([str(short), str(short), "--output", str(tmp_path / "one.html")]) == 0  # named twice, shown once
    assert (
        capsys.readouterr().out.startswith(f"{tmp_path / 'one.html'}\n")
        and "Runs shown" not in (tmp_path / "one.html").read_text()
    )
