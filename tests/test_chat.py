"""The chat command: what goes into the model, what comes out, what is kept, in a pipe and in a terminal."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import train_tokenizer

from tinyllama_jax import chat
from tinyllama_jax.base import config as c
from tinyllama_jax.base import dims
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import model
from tinyllama_jax.data import chat as templates
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.export import tokenizer as exporter
from tinyllama_jax.inference import engine
from tinyllama_jax.run import checkpoint

ROOT = Path(__file__).parents[1]
ZEPHYR = templates.TEMPLATES["zephyr"]


def make_run(folder: Path, follows: dict[str, str], seq_len: int, added: str = "", source: str = ZEPHYR.source) -> Path:
    """A run whose next token depends on the token before it alone: `follows`, and otherwise "a".

    `added`: a token that its tokenizer.json has besides, which is not special. `source`: its chat template.
    """
    inner = folder / "run/tokenizer"
    inner.mkdir(parents=True)
    spm = train_tokenizer(inner / "tokenizer.model", ["a"] * 9 + [chr(n) for n in range(33, 127)] * 2, 360)
    ids = {piece: i for i, (piece, *_) in enumerate(exporter.read(spm).pieces)}
    (inner / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    if added:
        exporter.write(spm, inner, True, seq_len)
        spm.unlink()
        content = json.loads((inner / "tokenizer.json").read_text())
        ids[added] = len(ids)
        content["added_tokens"].append({**content["added_tokens"][0], "id": ids[added], "content": added, "special": False})
        (inner / "tokenizer.json").write_text(json.dumps(content))
    (inner / "chat_template.jinja").write_text(source)
    V = len(ids)
    fp32 = {"precision": "params=float32,compute=float32,output=float32", "residual": "float32"}
    cfg = c.Model(1, V, 1, 1, 8, V, seq_len, head_dim=8, **fp32)
    flat = {p.name: np.full(dims.shape(p, cfg), float(p.kind == "norm"), np.float32) for p in dims.PARAMETERS}
    flat["embed/embedding"] = np.eye(V, dtype=np.float32)
    head = flat["lm_head/kernel"]
    head[:, ids["a"]] = 1
    for before, after in follows.items():
        head[ids[before]] = 0
        head[ids[before], ids[after]] = 1
    config = c.Config(str(folder), cfg, c.Data({"a": 1}), c.Optim(1e-3, 0, 0, 0, 1), c.Train(9, seq_len, 1), c.Checkpoint(1))
    checkpoint.save_import(folder / "run", config, model.unflatten(flat), step=1)
    return folder / "run"


HI = {"<0x0A>": "h", "h": "i", "i": "</s>"}  # every answer is "hi"


@pytest.fixture(scope="module")
def hi(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("hi"), HI, 256)


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """Every answer is "hahaha..." to the end of the context."""
    return make_run(tmp_path_factory.mktemp("endless"), {"<0x0A>": "h", "h": "a", "a": "h"}, 60_000)


def talk(capsys, monkeypatch, run: Path, lines, *options: str):
    """(standard output, standard error, the ids of each prompt) of a conversation through a pipe."""
    text = lines if isinstance(lines, bytes) else "".join(line + "\n" for line in lines).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
    assert chat.main(["--checkpoint", str(run), "--greedy", "--show-prompt", *options]) == 0
    out, err = capsys.readouterr()
    return out, err, [json.loads(ids) for ids in re.findall(r"prompt: (\[.*\])", err)]


def prompt(run: Path, *turns, template=ZEPHYR):
    conversation = [{"role": role, "content": content} for role, content in turns]
    return templates.encode(template, tokenizer_lib.load(run / "tokenizer"), conversation, begin_with_bos=True)


def test_a_conversation_through_a_pipe(hi, tmp_path, capsys, monkeypatch):
    file, user, answer = tmp_path / "talk.jsonl", lambda text: ("user", text), ("assistant", "hi")
    commands = ["", "/system Be  kind: é", "", f"/save {file}", f"/save {file}", "/system", "Three"]
    out, err, prompts = talk(capsys, monkeypatch, hi, ["One", "Two", *commands, "/reset", "//four", "/help", "/quit", "Five"])
    assert out == "hi\n" * 4
    assert prompts == [
        prompt(hi, user("One")),
        prompt(hi, user("One"), answer, user("Two")),
        prompt(hi, user("One"), answer, user("Two"), answer, user("Three")),
        prompt(hi, user("/four")),
    ]
    assert all(ids.count(1) == 1 and ids[0] == 1 for ids in prompts)
    (line,) = file.read_text(encoding="utf-8").splitlines()
    roles = ["system", "user", "assistant", "user", "assistant"]
    texts = ["Be  kind: é", "One", "hi", "Two", "hi"]
    assert json.loads(line) == {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]}
    assert "template zephyr (its own chat_template); greedy, seed 0" in err and err.count(f"[{file}: 2 turns]") == 2
    assert "/save FILE" in err and "[stopped" not in err


@pytest.mark.parametrize("draft", ["ngram", "itself"])
def test_a_draft_is_used_and_changes_no_answer(draft, hi, capsys, monkeypatch):
    requests, start = [], engine.Engine.submit
    monkeypatch.setattr(engine.Engine, "submit", lambda self, request: (requests.append(request), start(self, request)))
    out, _, prompts = talk(capsys, monkeypatch, hi, ["One", "One"], "--draft", str(hi) if draft == "itself" else draft)
    assert out == "hi\n" * 2 and len(prompts) == 2
    assert requests[-1].rounds < len(requests[-1].tokens)  # one pass gave several tokens


def test_the_system_message_goes_first(hi, capsys, monkeypatch):
    _, _, prompts = talk(capsys, monkeypatch, hi, ["One"], "--system", "S")
    assert prompts == [prompt(hi, ("system", "S"), ("user", "One"))]


def test_the_end_of_an_answer_is_not_shown(tmp_path, capsys, monkeypatch):
    follows = {"<0x0A>": "h", "h": "i", "i": "<|im_end|>"}
    run = make_run(tmp_path, follows, 64, "<|im_end|>", templates.TEMPLATES["chatml"].source)
    out, _, prompts = talk(capsys, monkeypatch, run, ["One"])
    tokenizer = tokenizer_lib.load(run / "tokenizer")
    assert out == "hi\n" and tokenizer.decode([tokenizer.vocab_size - 1]) == "<|im_end|>"  # not special, so it is text
    assert prompts == [prompt(run, ("user", "One"), template=templates.TEMPLATES["chatml"])]


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_a_named_template_replaces_its_own(name, hi, capsys, monkeypatch):
    _, err, prompts = talk(capsys, monkeypatch, hi, ["One"], "--template", name, "--max-new-tokens", "3")
    assert prompts == [prompt(hi, ("user", "One"), template=templates.TEMPLATES[name])]
    why = "--template" if name == "zephyr" else "--template; the weights bring zephyr"
    assert f"template {name} ({why})" in err


def test_whole_oldest_turns_are_cut_when_the_context_is_full(hi, capsys, monkeypatch):
    questions = [letter * 20 for letter in "bcdefgh"]
    out, err, prompts = talk(capsys, monkeypatch, hi, [*questions, "x" * 300, "end"], "--system", "S", "--max-new-tokens", "9")
    assert out == "hi\n" * 8
    turns = [part for q in questions for part in (("user", q), ("assistant", "hi"))]
    said = [int(n) for n in re.findall(r"the context of 256 tokens is full: the oldest (\d+) turns are left out", err)]
    cuts = [0] * (8 - len(said)) + said
    assert cuts[0] == 0 and cuts[-1] >= 3 and cuts == sorted(cuts)
    for i, (ids, cut) in enumerate(zip(prompts, cuts, strict=True)):
        last = ("user", questions[i] if i < 7 else "end")
        assert ids == prompt(hi, ("system", "S"), *turns[2 * cut : 2 * i], last) and len(ids) <= 256 - 9
        if cut:  # one fewer would not fit
            assert len(prompt(hi, ("system", "S"), *turns[2 * cut - 2 : 2 * i], last)) > 256 - 9
    assert "error: the last message and any system message have" in err


def test_an_answer_that_is_cut_short_is_not_saved(endless, tmp_path, capsys, monkeypatch):
    lines = ["One", f"/save {tmp_path}/a.jsonl"]
    out, err, _ = talk(capsys, monkeypatch, endless, lines, "--max-new-tokens", "6")
    assert out == "hahaha\n" and "[stopped: --max-new-tokens]" in err and "no question has a whole answer" in err
    out, err, _ = talk(capsys, monkeypatch, endless, lines, "--stop", "aha")
    assert out == "h\n" and "[stopped" not in err and "a.jsonl: 1 turns]" in err


def test_mistakes_in_a_conversation_do_not_end_it(hi, tmp_path, capsys, monkeypatch):
    (tmp_path / "there").write_text("x")
    lines = [
        "/nope",
        "/save",
        f"/save {tmp_path}/new",
        "One",
        f"/save {tmp_path}/there",
        f"/save {tmp_path}/no/such",
        "/reset it",
    ]
    out, err, _ = talk(capsys, monkeypatch, hi, [*lines, "/save gs://b/x", "Two"])
    assert out == "hi\n" * 2 and (tmp_path / "there").read_text() == "x" and not (tmp_path / "new").exists()
    for message in (
        "/nope: is not a command; /help lists them",
        "/save needs the name of a file",
        "no question has a whole answer yet",
        "there: exists already; name a new file",
        "such.partial: no such file or folder",
        "/reset it: is not a command",
        "/save=gs://b/x: is a URL",
    ):
        assert f"error: {message}" in err or message in err, message
    out, err, prompts = talk(capsys, monkeypatch, hi, b"\xff\xfe\nOne\r\nTwo")  # without a line end
    assert out == "hi\n" * 2 and "not UTF-8, and was not sent" in err
    assert prompts[0] == prompt(hi, ("user", "One")) and len(prompts) == 2


def test_a_system_message_that_the_template_refuses(hi, tmp_path, capsys, monkeypatch):
    (tmp_path / "t.jinja").write_text(
        "{{ raise_exception('no system') if messages[0].role == 'system' }}{{ messages[0].content }}"
    )
    line = ["--template", str(tmp_path / "t.jinja")]
    with pytest.raises(UserError, match="refuses this conversation: no system"):
        talk(capsys, monkeypatch, hi, ["x"], *line, "--system", "S")
    _, err, prompts = talk(capsys, monkeypatch, hi, ["/system S", "x"], *line, "--max-new-tokens", "2")
    assert "error: the chat template" in err and len(prompts) == 1


def test_a_base_model_needs_a_template(hi, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    run.symlink_to(hi)
    base = tmp_path / "base"
    base.mkdir()
    for name in os.listdir(hi):
        if name != "tokenizer":
            (base / name).symlink_to(hi / name)
    (base / "tokenizer").mkdir()
    (base / "tokenizer/tokenizer.model").write_bytes((hi / "tokenizer/tokenizer.model").read_bytes())
    with pytest.raises(UserError, match=r"base: has no chat template.*--template NAME \(guanaco, chatml, zephyr, or a .jinja"):
        talk(capsys, monkeypatch, base, ["x"])
    for option, value, message in (
        ("--template", "zefyr", "--template zefyr: is none of guanaco, chatml, zephyr"),
        ("--template", "no.jinja", "No such file"),
        ("--top-p", "0", "--top-p 0.0"),
        ("--system", "\udcff", "--system .* is not UTF-8"),
        ("--checkpoint", str(tmp_path / "nowhere"), "no such file or folder"),
    ):
        with pytest.raises((UserError, FileNotFoundError), match=message):
            chat.main(["--checkpoint", str(hi), option, value])


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *arguments: str):
        self.screen, slave = pty.openpty()
        # without a terminal that controls it Ctrl-C would send no signal
        take = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
        line = [sys.executable, "-c", take, sys.executable, "-W", "error", "-m", "tinyllama_jax.chat", *arguments]
        env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb", "XLA_FLAGS": ""}
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        self.process = subprocess.Popen(line, **streams, cwd=ROOT, env=env, start_new_session=True)
        os.close(slave)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def until(self, pattern: str) -> str:
        """What is shown up to `pattern`, which must come within a minute."""
        end = time.monotonic() + 60
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < end, self.text[-2_000:]
            if select.select([self.screen], [], [], 1)[0]:
                self.text += os.read(self.screen, 65_536).decode(errors="replace")
        shown, self.text = self.text[: match.end()], self.text[match.end() :]
        return shown


@pytest.fixture
def terminal(endless):
    terminal = Terminal("--checkpoint", str(endless), "--greedy", "--max-new-tokens", "1000000")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.screen)


def test_in_a_terminal(terminal, tmp_path):
    assert "/help lists the commands" in terminal.until("> ")
    terminal.type("first question\n")
    terminal.until("hahahaha")  # it comes while it is computed
    terminal.type("\x03")
    terminal.until(r"\[stopped: Ctrl-C\]")
    terminal.until("> ")
    time.sleep(0.3)  # Python loses a Ctrl-C in the moment between the prompt and its waiting for a key
    terminal.type("\x03")  # at the prompt it does not leave
    terminal.until("Ctrl-D or /quit leaves")
    terminal.until("> ")
    terminal.type("\x1b[A")  # the line before, which a terminal without readline would not know
    terminal.until("first question")
    terminal.type(" again\n")
    terminal.until("hahahaha")
    terminal.type("\x03")
    terminal.until(r"\[stopped: Ctrl-C\]")
    terminal.until("> ")
    terminal.type(f"/save {tmp_path}/x.jsonl\n")
    terminal.until("no question has a whole answer")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
