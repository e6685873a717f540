"""`convert --format web` in a real Chromium of a phone's size: llama.cpp's answers, a conversation, no connection, faults."""

import contextlib
import dataclasses
import functools
import http.server
import io
import json
import re
import shutil
import threading
import time
from pathlib import Path

import kept
import pytest
from browser import chromium
from test_convert import config_for
from test_convert_gguf import WIDE, main, rounded
from test_export_tokenizer import KINDS, train
from test_hf import random_params

from tinyllama_jax import convert
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import chat
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.inference import web
from tinyllama_jax.run import checkpoint

pytest.importorskip("gguf", reason="the package that writes GGUF")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp, the package xllamacpp", exc_type=ImportError)

CONTEXT = 200
SEED = 14  # on the prompts below its most likely token leads by 0.1, in llama.cpp; fp16 moves logits by about 0.01
PHONE = {"viewport": {"width": 360, "height": 640}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
SLOW = 60_000  # milliseconds for 10 MB of WebAssembly to be compiled on a busy machine


@pytest.fixture(scope="module")
def packages():
    """The folder with wllama's packages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(kept.FOLDER))
        try:
            return web.packages()
        except UserError as error:
            if "--wllama DIR" not in str(error):  # what it says where npm or the network is missing
                raise
            pytest.skip(str(error))


def save(folder: Path, template: str | None) -> Path:
    """A run folder of a tiny model, for documents that begin with bos. It writes neither eos nor single bytes."""
    model = dataclasses.replace(WIDE, seq_len=CONTEXT)
    params = rounded(random_params(model, seed=SEED))
    params["lm_head"]["kernel"][:, :259] = 0
    checkpoint.save_import(folder, config_for(model, folder), params, step=7)
    (folder / "tokenizer").mkdir()
    train(folder / "tokenizer/tokenizer.model", **KINDS["demo"])
    if template:
        (folder / "tokenizer/chat_template.jinja").write_text(template)
    (folder / "data.json").write_text(json.dumps([{"path": "somewhere", "bos": True}]))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save(tmp_path_factory.mktemp("runs") / "story", chat.ZEPHYR)


@pytest.fixture(scope="module")
def exported(run, packages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("web") / "chat"
    convert.export_web(run, folder, "f16", shard_bytes=600_000, wllama=packages)
    return folder


@pytest.fixture(scope="module")
def base(packages, tmp_path_factory):
    """(run without a chat template, its export as the command makes it)."""
    folder = tmp_path_factory.mktemp("base")
    run, output, printed = save(folder / "run", None), folder / "web", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main("--checkpoint", run, "--format", "web", "--output", output, "--wllama", packages) == 0
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    says = f"{output}: {run} in q4_0, {size:,} bytes in 11 files; try it: python -m http.server --bind 127.0.0.1 -d {output}\n"
    assert printed.getvalue() == says
    return run, output


@pytest.fixture(scope="module")
def browser():
    with chromium("--host-resolver-rules=MAP phone.test 127.0.0.1") as one:
        yield one


class Served:
    """A folder in a plain web server: no header is added."""

    def __init__(self, folder: Path):
        handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder))
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def served(exported):
    one = Served(exported)
    yield one
    one.stop()


@pytest.fixture
def page(browser):
    """A page on a phone, in which no script may fail, and which must ask one server alone."""
    context = browser.new_context(**PHONE)
    one, wrong, hosts = context.new_page(), [], set()
    one.on("pageerror", lambda error: wrong.append(str(error)))
    one.on("console", lambda message: "Security Policy" in message.text and wrong.append(message.text))
    one.on("request", lambda asked: hosts.add(re.sub(r"^blob:|(?<=\d)/.*|(?<=test)/.*", "", asked.url)))
    yield one
    context.close()
    assert not wrong and len({host.split("://")[1] for host in hosts}) <= 1


def opened(page, url, n=16):
    """Opens the page and waits for the model; then the most likely tokens, `n` of an answer."""
    page.goto(url)
    loaded(page)
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Tokens of an answer").fill(str(n))
    page.get_by_text("Settings").click()


def loaded(page, says="Enter sends"):
    page.locator("#status").filter(has_text=says).wait_for(timeout=SLOW)


def send(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()
    page.get_by_role("button", name="Send").wait_for(timeout=SLOW)
    return page.locator("article p").all_text_contents()


class Reference:
    """llama.cpp with the same files, given the ids that our own template makes."""

    def __init__(self, run, folder):
        self.tokenizer = tokenizer_lib.load(run / "tokenizer")
        self.template = chat.of_folder(run, self.tokenizer)
        self.engine = llama_cpp.LlamaCpp(sorted((folder / "model").glob("*.gguf"))[0], CONTEXT)

    def ids(self, *contents):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        return chat.encode(self.template, self.tokenizer, messages, begin_with_bos=True)

    def greedy(self, *contents, n=16):
        return self.engine.greedy(self.ids(*contents), n)

    def text(self, *contents, n=16):
        return self.tokenizer.decode(self.greedy(*contents, n=n))


@pytest.fixture(scope="module")
def reference(run, exported):
    return Reference(run, exported)


# (ids of the answer, number of ids of the prompt), through the function by which the page asks. wllama 3.13 fails with
# log-probabilities of tokens that are part of a character, so these answers have none.
ASK = """async content => {
  const asked = { messages: [{ role: "user", content }], temperature: 0, max_tokens: 16, logprobs: true, top_logprobs: 1,
    stream: true, stream_options: { include_usage: true } };
  const ids = [];
  let n = 0;
  for await (const event of ask(asked, undefined)) {
    n = event.usage ? event.usage.prompt_tokens : n;
    for (const choice of event.choices) ids.push(...(choice.logprobs ? choice.logprobs.content : []).map(token => token.id));
  }
  return [ids, n];
}"""


def test_it_answers_as_llama_cpp(page, served, reference, exported):
    assert len(list((exported / "model").iterdir())) > 1  # in shards
    opened(page, served.url)
    for prompt in ("Once upon a", "你好 👍🏽"):
        ids, n = page.evaluate(ASK, prompt)
        assert ids == reference.greedy(prompt) and len(ids) == 16 and n == len(reference.ids(prompt)), prompt
    first = reference.text("Once upon a")
    assert send(page, "Once upon a") == ["Once upon a", first]
    second = reference.text("Once upon a", first, "<b>more</b>")
    assert send(page, "<b>more</b>")[2:] == ["<b>more</b>", second] and not page.locator("article b").count()
    page.get_by_role("button", name="New chat").click()
    assert send(page, "Once upon a") == ["Once upon a", first]
    page.get_by_role("button", name="New chat").click()
    stop = next(first[i : i + 5] for i in range(20, len(first)) if first.find(first[i : i + 5]) == i)
    page.evaluate("stop => EXPORT.stop.push(stop)", stop)  # as for guanaco, whose end of an answer is no token
    assert send(page, "Once upon a")[1] == first.split(stop)[0]


def test_it_works_without_a_connection_and_with_safaris_program(page, exported, reference):
    page.add_init_script("delete WebAssembly.Suspending")  # as in Safari
    served = Served(exported)
    asked = []
    page.on("request", lambda request: asked.append(request.url.removeprefix(served.url)))
    opened(page, served.url)
    loaded(page, "It works without a connection")
    assert page.evaluate(ASK, "Once upon a")[0] == reference.greedy("Once upon a")
    assert "wllama/compat.wasm" in asked and "wllama/wllama.wasm" not in asked
    served.stop()
    page.reload()
    loaded(page)
    assert page.evaluate(ASK, "Once upon a")[0] == reference.greedy("Once upon a")
    manifest = page.context.new_cdp_session(page).send("Page.getAppManifest")
    assert manifest["errors"] == [] and json.loads(manifest["data"])["display"] == "standalone"
    errors = page.context.new_cdp_session(page).send("Page.getInstallabilityErrors")["installabilityErrors"]
    assert [error["errorId"] for error in errors if error["errorId"] != "in-incognito"] == []


def test_it_streams_and_stops(page, served):
    opened(page, served.url, n=100)
    page.evaluate("""() => {
      const work = wllama.proxy.wllamaAction.bind(wllama.proxy);
      let n = 0;
      wllama.proxy.wllamaAction = async (name, ...more) => {
        if (name === "get_result" && ++n === 10) await new Promise(go => { window.go = go; });
        return work(name, ...more);
      };
    }""")
    page.get_by_label("Message", exact=True).fill("Once upon a")
    page.keyboard.press("Enter")
    answer = page.locator("article.assistant p")
    until(lambda: page.evaluate("() => !!window.go"))
    beginning = answer.text_content()
    assert beginning and page.get_by_role("button", name="Send").is_hidden()
    page.keyboard.press("Escape")
    page.evaluate("() => window.go()")
    page.get_by_text("Stopped.").wait_for()
    assert answer.text_content().startswith(beginning) and len(answer.text_content()) < 3 * len(beginning)
    page.reload()
    loaded(page)
    page.get_by_label("Tokens of an answer").evaluate("box => { box.value = 5; }")
    page.get_by_label("Temperature").evaluate("box => { box.value = 0; }")
    for i in range(8):  # more than the context takes
        texts = send(page, f"question {i} " + "word " * 12)
    assert len(texts) == 16 and "The oldest" in page.locator("#status").text_content()
    send(page, "word " * 400)
    page.get_by_text(f"the text is too long: the model takes {CONTEXT} tokens").wait_for()


def until(condition, seconds=600.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_base_model_continues_text_and_http_is_enough(page, base):
    run, folder = base
    served = Served(folder)
    page.goto(served.url.replace("127.0.0.1", "phone.test"))  # no secure context: without cache and service worker
    loaded(page, "This model has no chat template: it continues your text. It needs a connection the next time")
    page.get_by_label("Temperature").evaluate("box => { box.value = 0; }")
    page.get_by_label("Tokens of an answer").evaluate("box => { box.value = 4; }")
    engine, tokenizer = llama_cpp.LlamaCpp(folder / "model/model.gguf", CONTEXT), tokenizer_lib.load(run / "tokenizer")
    text = tokenizer.decode(engine.greedy([tokenizer.bos_id, *tokenizer.encode("for x in")], 4))  # q4_0: they lead by 0.8
    assert send(page, "for x in") == ["for x in", text]
    served.stop()


def test_a_new_export_takes_the_place_of_the_old_one(page, exported, base, tmp_path):
    shutil.copytree(exported, tmp_path / "web")
    served = Served(tmp_path / "web")
    opened(page, served.url)
    (before,) = page.evaluate("() => caches.keys()")
    shutil.rmtree(tmp_path / "web")
    shutil.copytree(base[1], tmp_path / "web")
    page.reload()  # still the old page, from the cache
    loaded(page)
    until(lambda: before not in page.evaluate("() => caches.keys()"))
    page.reload()
    loaded(page, "This model has no chat template: it continues your text. It works without a connection.")
    (after,) = page.evaluate("() => caches.keys()")
    assert after != before
    served.stop()


def fulfil(page, pattern, **answer):
    page.route(re.compile(pattern), lambda route: route.fulfill(**answer))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("delete window.WebAssembly", "This browser has no WebAssembly, which runs the model. Update it"),
        ((r"0002-of-\d+.gguf$", {"status": 404}), r"model/model-00002-of-0000\d.gguf is missing: the server answers 404"),
        ((r"0001-of-\d+.gguf$", {"body": b"GGUF"}), r"model-00001-of-0000\d.gguf is damaged: it has 4 bytes, not \d{5,}"),
        ((r"0001-of-\d+.gguf$", {"body": None}), "The model's files are damaged. Reload the page to load them again"),
        ((r"index.min.js$", {"status": 404}), "wllama/index.min.js cannot be loaded. It belongs beside this page"),
        ((r"wllama.wasm$", {"body": b""}), "wllama/wllama.wasm is damaged: it has 0 bytes"),
    ],
    ids=["no WebAssembly", "shard missing", "shard cut", "shard damaged", "module missing", "program cut"],
)
def test_what_goes_wrong_is_said_in_plain_words(fault, says, browser, served, exported):
    if fault[1] == {"body": None}:  # as many bytes as there are
        first = sorted((exported / "model").iterdir())[0].read_bytes()
        fault = (fault[0], {"body": b"\0" * 2_000 + first[2_000:]})
    context = browser.new_context(**PHONE, service_workers="block")
    page = context.new_page()
    page.add_init_script(fault) if isinstance(fault, str) else fulfil(page, fault[0], **fault[1])
    page.goto(served.url)
    page.locator("#status.bad").wait_for(timeout=SLOW)
    assert re.search(says, page.locator("#status").text_content())
    context.close()


def test_too_little_memory_is_said(browser, served, exported):
    context = browser.new_context(**PHONE, service_workers="block", bypass_csp=True)
    page = context.new_page()
    text = (exported / "index.html").read_text().replace(f'"context": {CONTEXT}', '"context": 2000000000')
    fulfil(page, r"/$", body=text, content_type="text/html")
    page.goto(served.url)
    page.locator("#status.bad").wait_for(timeout=SLOW)
    assert "This device has too little free memory for the model of 0.8 MB" in page.locator("#status").text_content()
    context.close()


# -- the command ----------------------------------------------------------------------------------------------------------


def test_what_is_written(exported):
    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    own = {"index.html", "sw.js", "manifest.json", "icon-192.png", "icon-512.png"}
    theirs = {f"wllama/{name}" for name in ("index.min.js", "wllama.wasm", "compat.js", "compat.wasm", "LICENCE")}
    assert names == own | theirs | {f"model/model-0000{i}-of-00002.gguf" for i in (1, 2)}
    assert "Permission is hereby granted, free of charge" in (exported / "wllama/LICENCE").read_text()
    assert (exported / "icon-512.png").read_bytes()[:24] == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\2\0\0\0\2\0"
    assert "</script" not in web._index({"name": "</script><b>"}).split("const EXPORT")[1].split("\n")[0]


def test_packages_that_are_missing_or_others_are_refused(packages, run, tmp_path, monkeypatch):
    words = ("--checkpoint", run, "--format", "web", "--output", tmp_path / "web", "--wllama", tmp_path / "npm")
    with pytest.raises(
        UserError, match=r"npm: has no wllama-wllama-3.13.0.tgz; make the folder with: npm pack @wllama/wllama@3"
    ):
        main(*words)
    shutil.copytree(packages, tmp_path / "npm")
    with open(tmp_path / "npm/wllama-wllama-compat-3.13.0.tgz", "ab") as f:
        f.write(b"more")
    with pytest.raises(UserError, match=r"compat-3.13.0.tgz: is not wllama-compat 3.13.0: sha512 .*; remove it; npm pack"):
        main(*words)
    assert not (tmp_path / "web").exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    if shutil.which("npm"):
        with pytest.raises(
            UserError, match="npm gets no wllama: .*; without network or npm: where there are both, run: npm pack"
        ):
            web.packages()
        assert list((tmp_path / "cache/tinyllama_jax").iterdir()) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no npm is here; where there are both, run: npm pack .* DIR; then add --wllama DIR"):
        web.packages()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--format web --output {tmp}/it --dtype float16", "--dtype float16: has no meaning with --format web"),
        ("--format gguf --output {tmp}/it.gguf --wllama x", "--wllama x: has no meaning with --format gguf"),
        ("--format web --output {tmp}/it --shard-size 0", "--shard-size 0: must lie between 1 and 1,000,000 megabytes"),
        ("--format web --output {tmp}/it --wllama s3://bucket/it", "--wllama=s3://bucket/it: is a URL"),
    ],
)
def test_mistakes_are_one_line(words, says, run, tmp_path):
    with pytest.raises(UserError, match=re.escape(says)):
        main("--checkpoint", run, *words.format(tmp=tmp_path).split())
    assert list(tmp_path.iterdir()) == []
