"""The page at /, in a real Chromium: type, stream, stop, send again, edit, regenerate, a phone's width, the keyboard alone."""

import re

import pytest
import serving
from browser import chromium
from test_server import HELLO, Gated, chat_ids, text_of

pytestmark = pytest.mark.xdist_group("page")  # one server and one browser for all tests


@pytest.fixture(scope="module")
def browser():
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    loaded = serving.load_tiny(tmp_path_factory.mktemp("page"))
    one = serving.Running(loaded, Gated(loaded, 2), slots=2)
    yield one
    one.stop()


@pytest.fixture
def page(browser, running, request):
    """The page on a phone, whose console must stay empty, and which must ask this server alone."""
    options = {"viewport": {"width": 360, "height": 640}, "color_scheme": "light"} | getattr(request, "param", {})
    context = browser.new_context(**options)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: "status of 400" in message.text or wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith(running.url + "/") or wrong.append(asked.url))
    page.goto(running.url)
    page.get_by_text("Enter sends").wait_for()
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Tokens of an answer").fill("30")
    page.get_by_text("Settings").click()
    yield page
    context.close()
    assert not wrong


def turns(page):
    return [p.text_content() for p in page.locator("article p").all()]


def finished(page):
    page.get_by_role("button", name="Send").wait_for()
    return turns(page)


def expected(running, *contents, n=30):
    prompt = chat_ids(running.loaded, *contents)
    return text_of(running.loaded, prompt, running.alone(prompt, n, stop_ids=(2,)))


def send(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def test_a_conversation(page, running):
    first = expected(running, "hello")
    send(page, "hello")
    assert finished(page) == ["hello", first]
    send(page, "<b>more</b>")
    second = expected(running, "hello", first, "<b>more</b>")
    assert finished(page) == ["hello", first, "<b>more</b>", second] and not page.locator("article b").count()
    page.get_by_role("button", name="Write this answer again").click()
    assert finished(page)[3] == second
    page.get_by_role("button", name="Edit this message").first.click()
    assert page.get_by_label("Message", exact=True).input_value() == "hello"
    send(page, "hellp")
    assert finished(page) == ["hellp", expected(running, "hellp")]
    page.get_by_role("button", name="New chat").click()
    assert turns(page) == []


def test_it_streams_and_stops(page, running):
    engine = running.engine
    page.get_by_text("Settings").click()
    page.get_by_label("Tokens of an answer").fill("400")
    page.get_by_text("Settings").click()
    with engine.held():
        send(page, "hello")
        for _ in range(8):
            engine.one()
        page.wait_for_function("document.querySelectorAll('article p')[1]?.textContent.length > 2")
        beginning = turns(page)[1]  # while the rest has not been computed
        request = engine.requests[-1]
        assert request.finish is None and expected(running, "hello", n=400).startswith(beginning)
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").wait_for()
        serving.until(lambda: not running.service._open)
        n = len(request.tokens)
    serving.until(lambda: request.finish == "cancelled")
    assert len(request.tokens) <= n + 16 and turns(page)[1].startswith(beginning)
    page.get_by_role("button", name="Write this answer again").click()
    serving.until(lambda: engine.requests[-1] is not request)
    page.get_by_role("button", name="New chat").click()  # while it writes
    serving.until(lambda: engine.requests[-1].finish)
    send(page, "again")
    assert finished(page)[0] == "again"


def test_the_keyboard_is_enough(page, running):
    press, focus = page.keyboard.press, lambda: page.evaluate("document.activeElement.id || document.activeElement.textContent")
    page.reload()
    page.get_by_text("Enter sends").wait_for()
    assert focus() == "text"
    page.keyboard.type("one")
    press("Shift+Enter")
    page.keyboard.type("two")
    engine = running.engine
    with engine.held():
        press("Enter")
        engine.one()
        page.get_by_role("button", name="Stop").wait_for()
        press("Escape")
        page.get_by_text("Stopped.").wait_for()
    assert turns(page)[0] == "one\ntwo" and focus() == "text"
    seen = []
    for _ in range(12):
        press("Shift+Tab")
        seen.append(focus())
        if seen[-1] == "Edit":
            break
    press("Enter")
    assert focus() == "text" and page.get_by_label("Message", exact=True).input_value() == "one\ntwo"
    press("Escape")
    assert page.get_by_label("Message", exact=True).input_value() == ""
    for _ in range(12):
        press("Shift+Tab")
        if focus() == "new":
            break
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    press("Enter")
    assert turns(page) == [] and outline == "solid"


def light(color):
    """The relative luminance of a CSS color, as WCAG 2.2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return sum(v * weight for v, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


@pytest.mark.parametrize(
    "page", [{}, {"color_scheme": "dark"}, {"viewport": {"width": 1280, "height": 720}}], ids=str, indirect=True
)
def test_it_fits_and_can_be_read(page, running):
    send(page, "w" * 120 + " " + "two words " * 15)
    finished(page)
    assert page.evaluate(
        "document.documentElement.scrollWidth <= innerWidth && document.documentElement.scrollHeight <= innerHeight"
    )
    for element in page.locator("button:visible, #text").all():
        box = element.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"] and box["height"] >= 30
    color = lambda query, name="color": page.evaluate(f"getComputedStyle(document.querySelector('{query}')).{name}")
    back, button = light(color("body", "backgroundColor")), light(color("#send", "backgroundColor"))
    pairs = [(color("body"), back), (color("h2"), back), (color("#status"), back), (color("#send"), button)]
    ratios = [(max(light(front), behind) + 0.05) / (min(light(front), behind) + 0.05) for front, behind in pairs]
    assert min(ratios) >= 4.5  # WCAG 2.2, 1.4.3
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (back < 0.1) == dark


def test_an_error_is_shown_and_nothing_is_lost(page, running):
    send(page, "word " * 600)
    page.get_by_text("Error: messages: has").wait_for()
    assert finished(page) == ["word " * 600]
    page.get_by_role("button", name="Edit this message").click()
    send(page, HELLO[0]["content"])
    assert finished(page) == ["hello", expected(running, "hello")]


def test_a_base_model_continues_a_text(browser, running, monkeypatch):
    monkeypatch.setattr(running.service, "options", running.service.options._replace(template=None))
    with browser.new_page() as page:
        page.goto(running.url)
        page.get_by_text("it continues your text").wait_for()
        page.get_by_text("Settings").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Tokens of an answer").fill("20")
        assert not page.get_by_label("System message").is_visible()
        send(page, "def f(")
        prompt = [1, *running.loaded.tokenizer.encode("def f(")]
        assert finished(page) == ["def f(", text_of(running.loaded, prompt, running.alone(prompt, 20, stop_ids=(2,)))]
