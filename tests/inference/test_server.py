"""The server: OpenAI's protocol with its own client, clients that disconnect, limits, other web pages, and how it ends."""

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import openai as client_library
import pytest
import serve_load
import serving
from serving import MODEL, Recorded, Running, ask, connect, events, head, read, until

from tinyllama_jax import serve
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import model as model_lib
from tinyllama_jax.data import chat
from tinyllama_jax.inference import answers, listen, openai, server, worker
from tinyllama_jax.inference import engine as engine_lib
from tinyllama_jax.inference.engine import CHUNK

pytestmark = pytest.mark.xdist_group("server")  # one for all tests
ROOT = Path(__file__).parents[2]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return serving.load_tiny(tmp_path_factory.mktemp("tiny"))


class Gated(Recorded):
    """An engine whose steps can be held back, so that what happens between two of them does not depend on time."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._open, self._permits, self.at_gate, self.steps = threading.Event(), threading.Semaphore(0), False, 0
        self._open.set()

    def step(self):
        self.at_gate = True
        while not self._open.is_set() and not self._permits.acquire(timeout=0.005):
            pass
        self.at_gate = False
        self.steps += 1
        return super().step()

    @contextlib.contextmanager
    def held(self):
        """No step begins, except those that `one` lets pass."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def one(self):
        """Lets one step pass."""
        until(lambda: self.at_gate)
        before = self.steps
        self._permits.release()
        until(lambda: self.steps > before and self.at_gate)


@pytest.fixture(scope="module")
def running(loaded):
    one = Running(loaded, Gated(loaded, 4))
    yield one
    one.stop()


@pytest.fixture(autouse=True)
def nothing_left(request):
    """After each test the server has no request left, and each that it ran has ended."""
    yield
    if "running" in request.fixturenames:
        one = request.getfixturevalue("running")
        until(lambda: not one.service._open and not one.service.worker._live and not one.engine.busy)
        assert all(r.finish for r in one.engine.requests)


@pytest.fixture
def client(running):
    return client_library.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=60)


def chat_ids(loaded, *contents):
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return chat.encode(chat.TEMPLATES["zephyr"], loaded.tokenizer, messages, begin_with_bos=True)


def text_of(loaded, prompt, tokens):
    """The text that continues a prompt."""
    eos = loaded.tokenizer.eos_id
    return answers.Text(loaded.tokenizer, (), prompt).add([t for t in tokens if t != eos], last=True)


# -- with OpenAI's client ----------------------------------------------------------------------------------------------


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "tinyllama_jax"
    with pytest.raises(client_library.NotFoundError, match="nobody"):
        client.models.retrieve("nobody")


def test_a_chat_answer_is_the_engines(client, running, loaded):
    prompt = chat_ids(loaded, "hello")
    tokens = running.alone(prompt, 40, stop_ids=(2,))
    greedy = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_completion_tokens": 40}
    answer = client.chat.completions.create(**greedy)
    assert answer.choices[0].message.content == text_of(loaded, prompt, tokens)
    assert answer.choices[0].finish_reason == ("length" if len(tokens) == 40 and 2 not in tokens else "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(tokens))
    chunks = list(client.chat.completions.create(**greedy, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == answer.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 3
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [answer.choices[0].finish_reason]
    assert not chunks[-1].choices and chunks[-1].usage.total_tokens == answer.usage.total_tokens
    assert {c.id for c in chunks} == {chunks[0].id} and chunks[0].usage is None
    without = list(client.chat.completions.create(**greedy, stream=True))
    assert all(c.choices and c.usage is None for c in without)


def test_seeds_and_several_answers(client):
    ask_for = lambda **more: [
        c.text for c in client.completions.create(model="tiny", prompt="x = ", max_tokens=20, temperature=1.5, **more).choices
    ]
    first = ask_for(seed=7, n=3)
    assert ask_for(seed=7, n=3) == first and len(set(first)) == 3
    assert ask_for(seed=7) == first[:1] and ask_for(seed=8) != first[:1]
    assert ask_for(seed=-(2**63)) and ask_for() != ask_for()  # without a seed another answer each time
    several = client.completions.create(model="tiny", prompt=["x = ", "def "], n=2, temperature=1.5, seed=7, max_tokens=20)
    assert [c.index for c in several.choices] == [0, 1, 2, 3] and [c.text for c in several.choices[:2]] == first[:2]
    streams = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(
        model="tiny", prompt=["x = ", "def "], n=2, temperature=1.5, seed=7, max_tokens=20, stream=True
    ):
        streams[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streams.values()) == [c.text for c in several.choices]


def test_log_probabilities_of_a_chat(client, loaded):
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_tokens=12, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert "".join(t.token for t in content) == answer.choices[0].message.content
    assert bytes(b for t in content for b in t.bytes).decode() == answer.choices[0].message.content
    assert all(len(t.top_logprobs) == 3 and t.logprob == t.top_logprobs[0].logprob for t in content)
    plain = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=12, logprobs=True)
    assert [t.logprob for t in plain.choices[0].logprobs.content] == pytest.approx([t.logprob for t in content], abs=1e-4)
    assert not any(t.top_logprobs for t in plain.choices[0].logprobs.content)
    streamed = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_tokens=12, logprobs=True, stream=True
    )
    parts = [t for chunk in streamed if chunk.choices[0].logprobs for t in chunk.choices[0].logprobs.content]
    assert [(t.token, t.bytes) for t in parts] == [(t.token, t.bytes) for t in content]


def reference(loaded, ids):
    """Log-probability of each token after the first, under the trainer's model, and whether it is the most likely."""
    padded = jnp.asarray([ids + [0] * (MODEL.seq_len - len(ids))])  # one program for all lengths
    logits = jax.jit(model_lib.logits, static_argnums=2)(serving.tiny_params(MODEL), padded, MODEL)
    p = np.asarray(jax.nn.log_softmax(logits[0, : len(ids) - 1]))
    at = np.arange(len(ids) - 1), np.asarray(ids[1:])
    return p[at], p.argmax(1) == at[1]


@pytest.mark.parametrize("form", ["texts", "ids", "text"])
def test_scores_as_lm_eval_reads_them(client, loaded, form):
    """Its local-completions asks for max_tokens 1, sums token_logprobs[context:-1] and compares them with the likeliest."""
    tokenizer, texts = loaded.tokenizer, ["def parse(self, text):", "return 1 + 2", "x"]
    ids = [tokenizer.encode(text) for text in texts]
    prompt = {"texts": texts, "ids": [[1, *one] for one in ids], "text": texts[0]}[form]
    answer = client.completions.create(model="tiny", prompt=prompt, echo=True, max_tokens=1, logprobs=1, temperature=0)
    assert len(answer.choices) == (1 if form == "text" else 3)
    for one, choice in zip(ids, answer.choices, strict=False):
        expected, likeliest = reference(loaded, [1, *one])
        log = choice.logprobs
        given = slice(1 if form == "ids" else 0, -1)  # a bos that the server puts in front is not listed
        assert log.token_logprobs[given] == pytest.approx(expected, abs=1e-3)
        tops = [max(top.values()) for top in log.top_logprobs[given]]
        assert [p == top for p, top in zip(log.token_logprobs[given], tops, strict=True)] == likeliest.tolist()
        assert "".join(log.tokens) == choice.text and choice.text.startswith(tokenizer.decode(one))
        assert all(choice.text[at:].startswith(token) for at, token in zip(log.text_offset, log.tokens, strict=True))
        assert form != "ids" or log.token_logprobs[0] is log.top_logprobs[0] is None
    alone = client.completions.create(model="tiny", prompt=prompt, echo=True, max_tokens=0, logprobs=0)
    assert [c.logprobs.tokens for c in alone.choices] == [c.logprobs.tokens[:-1] for c in answer.choices]
    assert {c.finish_reason for c in alone.choices} == {"length"} and alone.usage.completion_tokens == 0
    assert [c.text for c in client.completions.create(model="tiny", prompt=prompt, echo=True, max_tokens=0).choices] == [
        c.text for c in alone.choices
    ]


def test_a_prompt_that_fills_the_context_can_be_scored(client, loaded):
    ids = [1, *np.random.default_rng(0).integers(3, 420, MODEL.seq_len - 1).tolist()]
    answer = client.completions.create(model="tiny", prompt=ids, echo=True, max_tokens=0, logprobs=0)
    assert answer.choices[0].logprobs.token_logprobs[1:] == pytest.approx(reference(loaded, ids)[0], abs=1e-3)
    with pytest.raises(client_library.BadRequestError, match="has 512 tokens, .* context is 512; shorten it to 511") as error:
        client.completions.create(model="tiny", prompt=ids, max_tokens=1)
    assert error.value.code == "context_length_exceeded" and error.value.param == "prompt"
    full = client.completions.create(model="tiny", prompt=ids[:500], max_tokens=400, temperature=1.9, extra_body={"top_k": 400})
    assert full.usage.total_tokens <= 512 and full.choices[0].finish_reason in ("length", "stop")


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client):
    greedy = {"model": "tiny", "prompt": "def f(x", "temperature": 0, "max_tokens": 60}
    whole = client.completions.create(**greedy).choices[0].text
    stop = whole[20:26]
    expected = whole[: whole.index(stop)]
    for form in (stop, ["never seen", stop]):
        answer = client.completions.create(**greedy, stop=form, logprobs=0)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
        assert "".join(answer.choices[0].logprobs.tokens).startswith(expected) and answer.usage.completion_tokens < 60
        parts = [c.choices[0].text for c in client.completions.create(**greedy, stop=form, stream=True)]
        assert "".join(parts) == expected


def test_an_answer_that_has_ended_does_not_run_on_beside_others(client, running):
    whole = client.completions.create(model="tiny", prompt=["def f(x", "import"], temperature=0, max_tokens=60)
    stop = next(c for i, c in enumerate(whole.choices[0].text) if i > 3 and c not in whole.choices[1].text)
    both = client.completions.create(model="tiny", prompt=["def f(x", "import"], temperature=0, max_tokens=60, stop=stop)
    assert both.choices[1] == whole.choices[1] and both.choices[0].text == whole.choices[0].text.partition(stop)[0]
    assert running.engine.requests[-2].finish == "cancelled"


def test_errors_as_the_client_knows_them(client):
    with pytest.raises(client_library.NotFoundError, match="'gpt-9' is not served; the model here is 'tiny'") as error:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert error.value.code == "model_not_found"
    with pytest.raises(client_library.BadRequestError, match="tools: is not supported; leave it out") as error:
        client.chat.completions.create(
            model="tiny", messages=HELLO, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]
        )
    assert (error.value.param, error.value.code) == ("tools", "unsupported_parameter")
    assert error.value.type == "invalid_request_error"
    with pytest.raises(client_library.BadRequestError, match="n: asks for 40 answers at once, and the most is 16"):
        client.completions.create(model="tiny", prompt="x", n=40)


# -- parsing -----------------------------------------------------------------------------------------------------------

BAD = [
    (CHAT, {"messages": HELLO, "temperature": "warm"}, "temperature", "expected `float`, got `str`"),
    (CHAT, {"messages": HELLO, "temperature": -1}, "temperature", "expected `float` >= 0"),
    (CHAT, {"messages": HELLO, "temperature": 1e-320}, "messages", "temperature 1e-320: must be 0"),
    (CHAT, {"messages": HELLO, "n": 10**9}, "n", "expected `int` <= 128"),
    (CHAT, {"messages": HELLO, "n": 0}, "n", "expected `int` >= 1"),
    (CHAT, {"messages": HELLO, "n": True}, "n", "expected `int`, got `bool`"),
    (CHAT, {"messages": HELLO, "max_tokens": -5}, "max_tokens", "expected `int` >= 1"),
    (CHAT, {"messages": HELLO, "max_tokens": 10**30}, "max_tokens", "expected `int` <= 2147483647"),
    (CHAT, {"messages": HELLO, "seed": 2**63}, "seed", "expected `int` <="),
    (CHAT, {"messages": HELLO, "top_p": 1.5}, "top_p", "expected `float` <= 1"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "expected `int` <= 20"),
    (CHAT, {"messages": HELLO, "stop": ["a"] * 5}, "stop", "expected `array` of length <= 4"),
    (CHAT, {"messages": HELLO, "stop": ""}, "stop", "expected `str` of length >= 1"),
    (CHAT, {"messages": HELLO, "stop": ["a", 1]}, "stop[1]", "expected `str`, got `int`"),
    (CHAT, {"messages": HELLO, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "expected `bool`"),
    (CHAT, {"messages": HELLO, "tempratur": 1}, "tempratur", "did you mean temperature?"),
    (CHAT, {"messages": HELLO, "logit_bias": {"5": 1}}, "logit_bias", "is not supported"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format", "is not supported"),
    (CHAT, {"messages": []}, "messages", "expected `array` of length >= 1"),
    (CHAT, {}, "messages", "is missing"),
    (CHAT, {"messages": None}, "messages", "is missing"),
    (CHAT, {"messages": ["hello"]}, "messages[0]", "expected `object`, got `str`"),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "expected `str | array`, got `int`"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role", "is missing"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "must be one of system, developer, user"),
    (CHAT, {"messages": [*HELLO, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls", "is not supported"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "'image_url' is not"),
    (TEXT, {"prompt": [1, "x"]}, "prompt", "not a mixture"),
    (TEXT, {"prompt": []}, "prompt", "length >= 1"),
    (TEXT, {"prompt": [[]]}, "prompt[0]", "length >= 1"),
    (TEXT, {"prompt": [1, -1]}, "prompt[1]", "expected `int` >= 0"),
    (TEXT, {"prompt": [[1, 420]]}, "prompt", "the token id 420 is outside the vocabulary of 420"),
    (TEXT, {"prompt": {"a": 1}}, "prompt", "expected `str | array`, got `object`"),
    (TEXT, {"prompt": "x", "logprobs": True}, "logprobs", "expected `int`, got `bool`"),
    (TEXT, {"prompt": "x", "best_of": 3}, "best_of", "is not supported"),
    (TEXT, {"prompt": "x", "messages": HELLO}, "messages", "is not a field of this request"),
]


@pytest.mark.parametrize(("path", "body", "param", "message"), BAD, ids=[f"{i}-{row[2]}" for i, row in enumerate(BAD)])
def test_a_wrong_field_is_named(running, path, body, param, message):
    status, _, answer = ask(running.port, path, body)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"
    assert message in answer["error"]["message"], answer
    assert answer["error"]["param"] in (param, None) and param.split("[")[0] in answer["error"]["message"] + param


ODD = [
    b"",
    b"[]",
    b"null",
    b"{",
    b'{"prompt": NaN}',
    b'{"prompt": "x", "temperature": Infinity}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "x", "max_tokens": ' + b"9" * 10_000 + b"}",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\udc00 x"}',
    b'{"prompt": "\xff"}',
    b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    b'{"user": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    b'{"prompt": "x"} {"prompt": "y"}',
    b'\xef\xbb\xbf{"prompt": "x"}',
    b"prompt=x&n=1",
    b'{"prompt": "x", "n": 1e0}',
    b'{"prompt": "x", "stop": ' + json.dumps(["y" * 600]).encode() + b"}",
    json.dumps({"prompt": "x", "a" * 100_000: 1}).encode(),
]


@pytest.mark.parametrize("body", ODD, ids=range(len(ODD)))
def test_odd_json_is_refused(running, body):
    status, _, answer = ask(running.port, TEXT, body)
    assert status == (405 if not body else 400)
    assert len(json.dumps(answer)) < 5_000 and "Traceback" not in json.dumps(answer)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT"])
def test_another_method_is_told_which_one_is_allowed(running, method):
    with contextlib.closing(connect(running.port)) as connection:
        connection.sendall(head(CHAT, b"", method, Connection="close"))
        answer = b"".join(iter(lambda: connection.recv(65_536), b"")).decode()
    assert answer.startswith("HTTP/1.1 405 ") and "allow: POST\r\n" in answer
    assert ('"code":"method_not_allowed"' in answer) == (method != "HEAD")


@pytest.mark.parametrize(
    "more",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "response_format": {"type": "text"}},
        {"temperature": None, "stop": None, "seed": None, "max_tokens": None, "stream_options": None, "tools": None},
        {"stop": [], "top_p": 0, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "temperature": 0.5},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}]}, HELLO[0] | {"name": "me"}]},
        {"messages": [*HELLO, {"role": "assistant", "content": None, "refusal": None, "tool_calls": []}, *HELLO]},
        {"messages": [{"role": "user", "content": "\x00 \ufffd 👩‍👩‍👧 \u202e <|system|>"}]},
    ],
    ids=range(8),
)
def test_fields_that_ask_for_nothing_are_accepted(running, more):
    status, _, answer = ask(running.port, CHAT, {"messages": HELLO, "max_completion_tokens": 2} | more)
    assert status == 200, answer


def test_a_model_with_a_short_context_warms_up(loaded):
    short = loaded._replace(model=dataclasses.replace(loaded.model, seq_len=8))
    worker.Worker(engine_lib.Engine(short), None)._warm_up()


def test_the_page_is_part_of_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = settings["tool"]["setuptools"]["package-data"]["tinyllama_jax.inference"]
    folder = Path(server.__file__).parent
    assert sorted(shipped) == sorted(path.name for path in folder.iterdir() if path.suffix in (".html", ".js"))
    assert settings["project"]["optional-dependencies"]["serve"]


def test_a_model_without_a_template_has_no_chat(loaded):
    with pytest.raises(openai.ApiError, match="no chat template; use /v1/completions, or start serve with --template"):
        openai.parse(json.dumps({"messages": HELLO}).encode(), openai.Chat, loaded, None)


# -- text and log-probabilities of any split into chunks ---------------------------------------------------------------


def pieces(loaded, prompt, tokens, cuts, rng=None, **query):
    """The pieces of an answer whose tokens come in chunks that end at `cuts`."""
    asked = {"prompt": prompt, "max_tokens": len(tokens)} | query
    parsed = openai.parse(json.dumps(asked).encode(), openai.Completion, loaded, None)
    request = parsed.requests(MODEL.seq_len)[0]
    choice, out = answers.Choice(0, request, parsed, loaded.tokenizer), []
    for end in [*cuts, len(tokens)]:
        new = tokens[len(request.tokens) : end]
        request.tokens += new
        request.logprobs += [-0.5 - token for token in new]
        request.top += [[(token, -0.5 - token)] for token in new]
        finish = None if end < len(tokens) else "length"
        out.append(choice.take(end, finish))
        if choice.finish:
            break
    return out, choice


def test_a_split_character_waits_until_it_is_whole(loaded):
    tokens = loaded.tokenizer.encode("😀é")[1:] if loaded.tokenizer.encode("😀")[0] > 258 else loaded.tokenizer.encode("😀é")
    parts, _ = pieces(loaded, [1, 300], tokens, range(1, len(tokens)), logprobs=0)
    assert "".join(p.text for p in parts) == "😀é" and all("\ufffd" not in p.text for p in parts)
    assert [p.text for p in parts].count("😀") == 1
    assert [(t.text, t.offset) for p in parts for t in p.tokens if t.text] == [("😀", 0), ("é", 1)]
    half, _ = pieces(loaded, [1, 300], tokens[:2], [1], logprobs=0)
    assert {c for p in half for c in p.text} == {"\ufffd"}  # nothing more comes
    assert "".join(t.text for p in half for t in p.tokens) == "".join(p.text for p in half)


def test_any_split_into_chunks_gives_the_same_text_and_no_part_of_a_stop_string(loaded):
    rng = random.Random(5)
    texts = ["def  f(x):\n    return 'END' + EN", "naïve 😀👩‍👩‍👧 你好 END of", "xEEENDx", "E N D ENEND", "  leading EN"]
    for _ in range(150):
        text = rng.choice(texts)
        tokens = loaded.tokenizer.encode(text)
        cuts = sorted(rng.sample(range(1, len(tokens)), rng.randint(0, min(6, len(tokens) - 1))))
        stop = rng.choice([None, "END", ["😀👩", "END"], ["ND", "turn"], "no such"])
        top = rng.choice([None, 0, 1])
        query = {"stop": stop} | ({} if top is None else {"logprobs": top})
        parts, choice = pieces(loaded, [1, *loaded.tokenizer.encode("x =")], tokens, cuts, **query)
        shown = "".join(p.text for p in parts)
        whole = answers.Text(loaded.tokenizer, (), [1, *loaded.tokenizer.encode("x =")]).add(tokens, last=True)
        stops = [stop] if isinstance(stop, str) else stop or []
        ends = [(whole.index(s) + len(s), whole.index(s)) for s in stops if s in whole]
        assert shown == whole[: min(ends)[1] if ends else None], (text, stop, cuts)  # that which is complete first
        assert choice.finish == ("stop" if ends else "length") and parts[-1].finish == choice.finish
        listed = [t for p in parts for t in p.tokens]
        if top is not None:
            assert "".join(t.text for t in listed).startswith(shown)
            assert all(t.offset < len(shown) or not t.text for t in listed)
            assert ends or "".join(t.text for t in listed) == shown
            assert all(whole[t.offset :].startswith(t.text) for t in listed)
        assert choice.n_tokens <= len(tokens) and (ends or choice.n_tokens == len(tokens))


def test_tokens_of_the_same_text_share_the_likeliest(loaded):
    query = openai.parse(b'{"prompt": "x", "logprobs": 3}', openai.Completion, loaded, None)
    top = [("\ufffd", -1.0), ("b", -2.0), ("\ufffd", -3.0)]
    form = answers.choice(query, 0, answers.Piece("\ufffd", (answers.Token("\ufffd", 0, -3.0, top),)))
    assert form["logprobs"]["top_logprobs"] == [{"\ufffd": -1.0, "b": -2.0}]  # lm-eval: the token was not the likeliest


# -- clients that go away ----------------------------------------------------------------------------------------------


def start(running, body, path=TEXT):
    connection = connect(running.port)
    connection.sendall(head(path, json.dumps(body).encode()))
    return connection


@pytest.fixture(scope="module")
def endless(loaded, running):
    """A prompt whose most likely continuation does not end."""
    prompts = ("x = ", "def f(", "import", "return", "a", "b", "c")
    return next(p for p in prompts if 2 not in running.alone([1, *loaded.tokenizer.encode(p)], 200))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["queued", "prefill", "decoding"])
def test_a_client_that_goes_away_frees_its_slot(running, endless, stream, phase, monkeypatch):
    engine, others = running.engine, []
    body = {"prompt": endless, "max_tokens": 400, "stream": stream, "temperature": 0}
    with engine.held():
        if phase == "queued":
            others = [start(running, body) for _ in range(4)]
            until(lambda: len(running.service._open) == 4)
            engine.one()
            until(lambda: len(running.service.worker._live) == 4)
        if phase == "prefill":
            monkeypatch.setattr(engine_lib, "PREFILL", (16,))
            body["prompt"] = [5] * 200  # 13 pieces
        connection = start(running, body)
        until(lambda: len(running.service._open) == len(others) + 1)
        engine.one()
        while phase == "decoding" and len(engine.requests[-1].tokens) < 20:
            engine.one()
        request = engine.requests[-1]
        n = len(request.tokens)
        assert n >= 20 if phase == "decoding" else n == 0
        connection.close()
        until(lambda: len(running.service._open) == len(others))
        assert request.finish is None
        engine.one() if others else None
        assert request.finish == "cancelled" if others else True
    until(lambda: request.finish)
    assert request.finish == "cancelled" and len(request.tokens) <= n + CHUNK
    for other in others:
        other.close()
    until(lambda: not engine.busy)
    assert ask(running.port, TEXT, {"prompt": "y", "max_tokens": 2})[0] == 200


def test_answers_are_right_after_cancel_edit_and_regenerate(running, loaded):
    """The engine reuses a prefix of what a slot holds; a wrong prefix would change the answer."""
    said = running.alone(chat_ids(loaded, "hello"), 30, stop_ids=(2,))
    first = text_of(loaded, chat_ids(loaded, "hello"), said)
    conversations = [
        ("hello",),
        ("hello", first, "more"),
        ("hello", first, "edited"),
        ("hello", first, "more"),
        ("hellp",),
        ("hello",),
    ]
    cached = []
    for turns in conversations:
        messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(turns)]
        body = {"messages": messages, "temperature": 0, "max_tokens": 30}
        dropped = start(running, body | {"stream": True, "max_tokens": 300}, CHAT)
        dropped.recv(400)  # it has begun
        dropped.close()
        until(lambda: not running.service._open)
        status, _, answer = ask(running.port, CHAT, body)
        prompt = chat_ids(loaded, *turns)
        expected = running.alone(prompt, 30, stop_ids=(2,))
        assert status == 200 and answer["choices"][0]["message"]["content"] == text_of(loaded, prompt, expected)
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"] / len(prompt))
    assert all(share > 0.5 for share in cached[1:])  # the beginning was there, so the test can see a wrong one


def test_many_clients_at_once_some_of_whom_go_away(running, loaded):
    texts = serve_load.prompts(12, 0)
    ids = {text: [1, *loaded.tokenizer.encode(text)] for text in texts}
    expected = {t: text_of(loaded, ids[t], running.alone(ids[t], 40, stop_ids=(2,))) for t in texts}
    before = len(running.engine.requests)
    gone = serve_load.load(running.port, expected, clients=16, requests=100, seed=1)
    assert 0 < gone < 30 and len(running.engine.requests) - before >= 100 - gone
    assert any(r.cached > 5 for r in running.engine.requests[before:])


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_full_queue_is_refused_until_there_is_room(running):
    engine = running.engine
    with engine.held():
        connections = [start(running, {"prompt": f"{i}", "max_tokens": 2}) for i in range(16)]
        until(lambda: len(running.service._open) == 16)
        status, headers, answer = ask(running.port, TEXT, {"prompt": "x", "max_tokens": 1})
        assert status == 503 and 1 <= int(headers["retry-after"]) <= 60 and answer["error"]["code"] == "queue_full"
        metrics = ask(running.port, "/metrics")[2].decode()
        assert "serve_requests_running 4\n" in metrics and "serve_requests_waiting 12\n" in metrics
        connections.pop().close()
        until(lambda: len(running.service._open) == 15)
        connections.append(start(running, {"prompt": "x", "max_tokens": 1}))
        until(lambda: len(running.service._open) == 16)
    assert [read(c)[0] for c in connections] == [200] * 16
    for c in connections:
        c.close()


def test_metrics_count(running):
    def read_all():
        lines = ask(running.port, "/metrics")[2].decode().splitlines()
        return {name: int(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    before = read_all()
    usage = ask(running.port, TEXT, {"prompt": "x", "max_tokens": 5, "temperature": 0})[2]["usage"]
    ask(running.port, TEXT, {"prompt": "x", "n": 0})
    after = read_all()
    new = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert new.pop("serve_cached_tokens_total", 0) == usage["prompt_tokens_details"]["cached_tokens"]
    assert new == {
        'serve_responses_total{status="200"}': 2,  # the first look at the metrics is the other
        'serve_responses_total{status="400"}': 1,
        "serve_prompt_tokens_total": usage["prompt_tokens"],
        "serve_completion_tokens_total": usage["completion_tokens"],
    }


def test_a_large_body_is_refused(running):
    large = server.BODY + 1
    with contextlib.closing(connect(running.port)) as connection:  # refused before it is sent
        connection.sendall(head(TEXT, b"", "POST", Content_Length=str(large)))
        assert read(connection)[0] == 413
    with contextlib.closing(connect(running.port)) as connection:
        connection.sendall(head(TEXT, b"", "POST", Content_Length=None, Transfer_Encoding="chunked"))
        for _ in range(large // 65_536 + 1):
            connection.sendall(b"10000\r\n" + b" " * 65_536 + b"\r\n")
        status, _, answer = read(connection)
        assert status == 413 and json.loads(answer)["error"]["code"] == "body_too_large"
    status, _, answer = ask(running.port, TEXT, b'{"prompt": "' + b"x " * 400_000 + b'"}')
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"


def test_slow_clients_are_cut_off(running, monkeypatch):
    for module in (server, listen):
        monkeypatch.setattr(module, "PATIENCE", 0.3)
    for beginning in (b"", b"POST /v1/compl", head(TEXT, b"{}")[:-20]):  # nothing, half a request line, half a head
        with contextlib.closing(connect(running.port)) as connection:
            connection.sendall(beginning)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100) == b""
    with contextlib.closing(connect(running.port)) as connection:
        connection.sendall(head(TEXT, b'{"prompt": "x"', "POST", Content_Length="100"))
        status, _, answer = read(connection)
        assert status == 408 and json.loads(answer)["error"]["code"] == "timeout"


def test_a_client_that_does_not_read_is_cut_off(running, monkeypatch):
    monkeypatch.setattr(listen, "PATIENCE", 0.3)
    with contextlib.closing(connect(running.port)) as connection:
        asked = head("/", b"", "GET")
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for _ in range(2_000):  # 20 MB of answers, which nobody takes
                connection.sendall(asked)
        until(lambda: not running.server.server_state.connections)


def test_an_answer_has_at_most_max_tokens(running, monkeypatch):
    monkeypatch.setattr(running.service, "options", running.service.options._replace(max_tokens=5))
    answer = ask(running.port, TEXT, {"prompt": "x", "max_tokens": 100, "temperature": 0})[2]
    assert answer["usage"]["completion_tokens"] <= 5 and answer["choices"][0]["finish_reason"] == "length"


# -- other web pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:1"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "192.168.0.7"}, 200),  # an address cannot be pointed elsewhere
        ({"Host": "x.localhost"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "friend.example"}, 200),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost:81", "Origin": "http://localhost"}, 403),
        ({"Host": "localhost", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "localhost", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "localhost", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "localhost", "Origin": "https://mine.example"}, 200),
    ],
    ids=str,
)
def test_another_page_cannot_drive_it(running, monkeypatch, headers, status):
    options = running.service.options._replace(hosts=("friend.example",), origins=("https://mine.example",))
    monkeypatch.setattr(running.service, "options", options)
    before = len(running.engine.requests)
    got, sent, answer = ask(running.port, TEXT, {"prompt": "x", "max_tokens": 1}, **headers)
    assert got == status and len(running.engine.requests) - before == (status == 200)
    mine = headers.get("Origin") == "https://mine.example"
    assert sent.get("access-control-allow-origin") == ("https://mine.example" if mine else None)
    assert status == 200 or answer["error"]["code"] == "forbidden"


def test_preflight(running, monkeypatch):
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
    raw = lambda: head(TEXT, b"", "OPTIONS", Origin="https://mine.example", **asked)
    for origins, status in (((), 403), (("https://mine.example",), 204), (("*",), 204)):
        monkeypatch.setattr(running.service, "options", running.service.options._replace(origins=origins))
        with contextlib.closing(connect(running.port)) as connection:
            connection.sendall(raw())
            got, headers, _ = read(connection)
        assert got == status
        assert headers.get("access-control-allow-headers") == ("authorization" if origins else None)


def test_the_page_can_connect_to_this_server_alone(running):
    _, headers, page = ask(running.port, "/")
    assert "default-src 'none'; connect-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert not re.search(rb"https?://|innerHTML|insertAdjacent|document\.write| style=| on[a-z]+=\"", page)


# -- beginning and end -------------------------------------------------------------------------------------------------


def test_it_is_ready_after_warm_up_and_ends_its_streams(loaded, endless):
    engine = Gated(loaded, 2)
    STARTED.clear()
    with engine.held():
        waiting = threading.Thread(target=lambda: holder.append(Running(loaded, engine, slots=2)))
        holder: list[Running] = []
        waiting.start()
        port = until(lambda: next((getattr(r, "port", 0) for r in STARTED), 0))
        until(lambda: engine.at_gate)
        assert ask(port, "/health")[0] == 503 and ask(port, "/health")[2] == {"status": "warming up"}
        status, headers, answer = ask(port, TEXT, {"prompt": "x"})
        assert status == 503 and int(headers["retry-after"]) >= 1 and answer["error"]["code"] == "not_ready"
    waiting.join(120)
    one = holder[0]
    assert ask(port, "/health")[0] == 200
    with engine.held():
        body = {"prompt": endless, "max_tokens": 400, "temperature": 0}
        streams = [start(one, body | {"stream": True}) for _ in range(2)]
        until(lambda: len(one.service._open) == 2)
        engine.one()
        whole = start(one, body)
        until(lambda: len(one.service._open) == 3)
        while min(len(r.tokens) for r in engine.requests[-3:-1]) < 3:
            engine.one()
        one.server.should_exit = True
        until(lambda: one.service.state == "shutting down")
    one.stop()
    for stream in streams:
        status, _, body = read(stream)
        assert status == 200 and body.endswith(b"0\r\n\r\n")  # ended as HTTP ends
        assert b"[DONE]" not in body and events(body)[-1]["error"]["code"] == "shutting_down"
    assert read(whole)[0] == 503
    for connection in (*streams, whole):
        connection.close()
    with pytest.raises(ConnectionRefusedError):
        connect(port)


STARTED: list[Running] = []


@pytest.fixture(autouse=True)
def note_servers(monkeypatch):
    """Servers are listed before they are ready."""
    real = Running.__init__

    def init(self, *args, **kwargs):
        STARTED.append(self)
        real(self, *args, **kwargs)

    monkeypatch.setattr(Running, "__init__", init)


def test_a_failure_of_the_engine_is_an_error_and_the_end(loaded, capfd):
    class Failing(Recorded):
        broken = False

        def step(self):
            if self.broken:
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return super().step()

    engine = Failing(loaded, 1)
    one = Running(loaded, engine, slots=1)
    engine.broken = True
    status, _, answer = ask(one.port, TEXT, {"prompt": "x", "max_tokens": 5})
    assert status == 500 and answer["error"]["message"] == "the engine failed: RESOURCE_EXHAUSTED: out of memory"
    until(lambda: not one._thread.is_alive())
    assert one.service.worker.failed and "Traceback" in capfd.readouterr().err


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory):
    """A Hugging Face folder of the tiny model, whose name tells its template."""
    folder = tmp_path_factory.mktemp("served") / "Tiny-Chat-v1.0"
    folder.mkdir()
    serving.save_tiny(folder, loaded.tokenizer.path)
    return folder


def command(*arguments, code=None):
    line = [sys.executable, "-W", "error", *(["-c", code] if code else ["-m", "tinyllama_jax.serve"]), *map(str, arguments)]
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)


@pytest.mark.parametrize(("end", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_command(folder, loaded, end, code, running):
    process = command("--checkpoint", folder, "--port", 0, "--host", "127.0.0.1" if code else "0.0.0.0", "--slots", 2)
    try:
        lines = []
        while not lines or "/v1 is the API" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        port = int(re.search(r":(\d+)/v1", lines[-1])[1])
        assert ("warning: --host 0.0.0.0: everybody" in "".join(lines)) == (code == 0)
        assert any("template zephyr" in line for line in lines)
        until(lambda: ask(port, "/health")[0] == 200, 120)
        body = {"messages": HELLO, "temperature": 0, "max_tokens": 20, "model": "Tiny-Chat-v1.0"}
        prompt = chat_ids(loaded, "hello")
        expected = text_of(loaded, prompt, running.alone(prompt, 20, stop_ids=(2,)))
        assert ask(port, CHAT, body)[2]["choices"][0]["message"]["content"] == expected
        with contextlib.closing(connect(port)) as connection:
            connection.sendall(head(TEXT, json.dumps({"prompt": "x", "stream": True, "max_tokens": 400}).encode()))
            connection.recv(10)
            process.send_signal(end)
            out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (code, "") and "Traceback" not in err, err
    finally:
        process.kill()
        process.wait()


def test_without_the_extra_it_says_what_to_install(folder):
    code = "import sys; sys.modules['starlette'] = None; from tinyllama_jax.serve import *; run_main(main)"
    _, err = (process := command("--checkpoint", folder, code=code)).communicate(timeout=120)
    assert process.returncode == 2 and err == "error: serve needs starlette, which is not installed: pip install '.[serve]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port 70000: must lie between 0 and 65,535"),
        (["--slots", "0"], "--slots 0: must lie between 1 and 1,024"),
        (["--queue", "-1"], "--queue -1: must lie between"),
        (["--max-tokens", "-1"], "--max-tokens -1: must lie between"),
        (["--host", "no such host"], "--host no such host --port 8000: .*; choose another address"),
        (["--host", "203.0.113.1", "--port", "0"], "--host 203.0.113.1 --port 0: .*; choose another address"),
        (["--allow-host", "example.com:80"], "--allow-host example.com:80: must be a name alone"),
        (["--allow-origin", "example.com"], "--allow-origin example.com: must be a scheme and a host"),
        (["--allow-origin", "https://example.com/"], "--allow-origin https://example.com/: must be a scheme and a host"),
        (["--template", "nobody", "--port", "0"], "--template nobody: is none of"),
    ],
    ids=str,
)
def test_mistakes_are_told_in_a_line(folder, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        serve.main(["--checkpoint", str(folder), *arguments])
    assert "\n" not in str(error.value)


def test_a_port_in_use(folder, running):
    with pytest.raises(UserError, match=f"--port {running.port}: Address already in use; choose another address, or --port 0"):
        serve.main(["--checkpoint", str(folder), "--port", str(running.port)])
