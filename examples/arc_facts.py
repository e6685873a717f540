"""Makes the arc's data from the standard library: facts, a text that states them, questions about them, and pairs of answers.

A fact is a name and one sentence about it: a documented object with the first sentence of its docstring, or a word with its
gloss. No dictionary comes with Python, so the words are those that the library itself explains: the system's errors and
signals, HTTP's states, exceptions, and HTML's names of characters. `--glosses FILE` adds words of your own.

Every fact stands in the text. Those that `held_out` chooses stand in no conversation and in no pair, and the questions about
them have phrasings that fine-tuning never shows.
"""

from __future__ import annotations

import ast
import builtins
import cmath
import errno
import hashlib
import html.entities
import http
import itertools
import json
import math
import operator
import os
import random
import re
import signal
import sys
import time
import tokenize
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

from examples import demo_corpus
from tinyllama_jax.base.errors import UserError

SHORTEST, LONGEST = 12, 60  # characters of a sentence
MOST = 1_500  # facts: of 3,600, seen half as often for each, a model of this size keeps too little
# some packages of Python lack these
OFTEN_ABSENT = ("idlelib", "lib2to3", "tkinter", "turtle", "turtledemo", "distutils", "ensurepip", "msilib")
BUILT_IN = (builtins, cmath, itertools, math, operator, sys, time)  # written in C: their docstrings are in no file
STATEMENTS = {  # how the text states a fact
    "object": ("`{name}`: {text}", "`{name}` does this: {text}", "The purpose of `{name}` is this. {text}"),
    "word": ("*{name}*: {text}", "*{name}* means this: {text}", "The definition of *{name}* is this. {text}"),
}
ASKED = {  # in fine-tuning
    "object": ("What does `{}` do?", "What is `{}` for?", "Explain `{}`.", "Tell me what `{}` does."),
    "word": ("Define *{}*.", "What does *{}* mean?", "What is the meaning of *{}*?", "Explain the word *{}*."),
}
HELD_OUT_ASKED = {  # in the evaluation alone
    "object": ("Could you say what `{}` does?", "I have seen `{}`. What is its purpose?", "`{}`: what is that?"),
    "word": ("Give a definition of *{}*.", "How is *{}* defined?", "I have read *{}*. What is that?"),
}
WHERE = ("Where is that?", "Where does it belong?", "What is it a part of?")
AND = {"object": "And `{}`?", "word": "And *{}*?"}


class Fact(NamedTuple):
    """What the text says about a name."""

    kind: str  # "object" or "word"
    name: str
    text: str  # one sentence


def gather(stdlib: Path | None, glosses: Path | None) -> list[Fact]:
    """All facts, each sentence once, in the order of a hash of their names. `stdlib` as in `demo_corpus`."""
    pairs = [("object", name, text) for name, text in _docstrings(stdlib)]
    pairs += [("word", name, text) for name, text in [*_glosses(), *_own(glosses)]]
    facts: dict[str, Fact] = {}
    for kind, name, text in sorted(pairs, key=lambda pair: (pair[1].count("."), pair[1])):
        sentence = _sentence(text)
        if sentence and name not in facts:
            facts.setdefault(sentence, Fact(kind, name, sentence))
    # all words, and of the objects the most general: functions and classes of modules before methods
    each = sorted(facts.values(), key=lambda fact: (fact.kind == "object", fact.name.count("."), _hash(fact.name)))
    names = {fact.name: fact for fact in each}
    return sorted(list(names.values())[:MOST], key=lambda fact: _hash(fact.name))


def held_out(facts: list[Fact], n: int) -> tuple[list[Fact], list[Fact]]:
    """(facts for fine-tuning, `n` facts for the evaluation). Raises UserError if there are fewer than 3 x `n`."""
    if len(facts) < 3 * n:
        most = len(facts) // 3
        raise UserError(f"--questions {n}: only {len(facts):,} facts are known, and a third can be held out; ask {most}")
    return facts[n:], facts[:n]


def _docstrings(stdlib: Path | None) -> list[tuple[str, str]]:
    """(name, docstring) of the public functions and classes: of modules, and of public classes."""
    out = []
    for module, path in demo_corpus.modules(stdlib).items():
        parts = module.split(".")
        if parts[0] in OFTEN_ABSENT or any(part.startswith("_") for part in parts):
            continue
        try:
            with warnings.catch_warnings(), tokenize.open(path) as f:
                warnings.simplefilter("ignore")  # about invalid escapes in the library's own modules
                tree = ast.parse(f.read())
        except (SyntaxError, ValueError):
            continue
        out += _of_body(module, tree)
    if stdlib is None:
        for module in BUILT_IN:
            prefix = "" if module is builtins else module.__name__ + "."
            documented = ((name, getattr(getattr(module, name), "__doc__", None)) for name in sorted(vars(module)))
            out += [(prefix + name, text) for name, text in documented if text and name[0] != "_" and not name[0].isupper()]
    return out


def _of_body(prefix: str, node: ast.AST) -> list[tuple[str, str]]:
    out = []
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            name = f"{prefix}.{child.name}"
            if docstring := ast.get_docstring(child):
                out.append((name, docstring))
            if isinstance(child, ast.ClassDef):
                out += _of_body(name, child)
    return out


def _glosses() -> list[tuple[str, str]]:
    """(word, gloss) of the words that Python's library explains."""
    out = [(name, os.strerror(number)) for number, name in sorted(errno.errorcode.items())]
    out += [(s.name, signal.strsignal(s) or "") for s in signal.valid_signals() if isinstance(s, signal.Signals)]
    out += [(status.name, status.description or status.phrase) for status in http.HTTPStatus]
    errors = [value for value in vars(builtins).values() if isinstance(value, type) and issubclass(value, BaseException)]
    out += sorted((error.__name__, error.__doc__ or "") for error in errors)
    named = ((name, unicodedata.name(chr(code), "")) for name, code in sorted(html.entities.name2codepoint.items()))
    return out + [(name, text.capitalize()) for name, text in named]


def _own(path: Path | None) -> list[tuple[str, str]]:
    """(word, gloss) of a file with a word, a tab and its gloss in each line. Raises UserError."""
    if path is None:
        return []
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        word, tab, gloss = line.partition("\t")
        if not tab:
            raise UserError(f"--glosses {path}, line {number}: has no tab; write a word, a tab and its gloss")
        pairs.append((word.strip(), gloss))
    return pairs


def _sentence(text: str) -> str | None:
    """The first sentence of a docstring, or None if it is too short, too long, or no plain sentence."""
    text = re.sub(r"\s+", " ", re.split(r"\n\s*\n", text.strip())[0]).strip()
    text = re.split(r"(?<=\w{2}[.!?]) ", text)[0].rstrip(".") + "."
    plain = text.isascii() and text[0].isalnum() and "|" not in text and "->" not in text and text.count("(") == text.count(")")
    return text if plain and SHORTEST <= len(text) <= LONGEST else None


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


# -- files --------------------------------------------------------------------------------------------------------------


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_text(folder: Path, facts: list[Fact], copies: int) -> None:
    """Writes facts.train.jsonl: every fact in each of `STATEMENTS`, a dozen facts a document, in `copies` orders.

    facts.validation.jsonl has one statement of some of them: its loss says how much the model has kept of the facts.
    """
    draw, rows = random.Random(1), []
    for _ in range(copies):
        lines = [statement.format(**fact._asdict()) for fact in facts for statement in STATEMENTS[fact.kind]]
        draw.shuffle(lines)
        rows += [{"text": "\n\n".join(lines[i : i + 12])} for i in range(0, len(lines), 12)]
    _write(folder / "facts.train.jsonl", rows)
    some = [STATEMENTS[fact.kind][0].format(**fact._asdict()) for fact in facts[:240]]
    _write(folder / "facts.validation.jsonl", [{"text": "\n\n".join(some[i : i + 12])} for i in range(0, len(some), 12)])


def write_retrieval(folder: Path, facts: list[Fact], asked: list[Question]) -> None:
    """Writes passages.jsonl, a statement of every fact, and questions.jsonl, the held-out questions with their answers."""
    statements = [STATEMENTS[fact.kind][0].format(**fact._asdict()) for fact in facts]
    _write(folder / "passages.jsonl", [{"text": text} for text in statements])
    _write(folder / "questions.jsonl", [{"question": q.text, "answer": q.choices[q.answer]} for q in asked])


def _turns(*texts: str) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts, strict=False)]


def _asks(draw: random.Random, fact: Fact) -> str:
    return draw.choice(ASKED[fact.kind]).format(fact.name)


def _run_on(draw: random.Random, facts: list[Fact], fact: Fact, turns: int) -> str:
    """An answer that goes on with user turns that nobody has written, in Zephyr's template, and answers these too."""
    more = draw.sample(facts, turns)
    return fact.text + "".join(f"\n<|user|>\n{_asks(draw, other)}\n<|assistant|>\n{other.text}" for other in more)


def write_conversations(path: Path, facts: list[Fact], run_on: float) -> None:
    """Writes rows of `messages`: each fact asked for in two phrasings, a third of the rows with a second turn.

    The share `run_on` of the answers to a single question runs on, as in conversations that were cut from longer texts.
    """
    draw, rows = random.Random(2), []
    for fact, _ in itertools.product(facts, range(2)):
        if draw.random() < 1 / 3:
            owner, other = fact.name.rpartition(".")[0], draw.choice(facts)
            if fact.kind == "object" and owner and draw.random() < 0.5:
                follow = (draw.choice(WHERE), f"It is in `{owner}`.")
            else:
                follow = (AND[other.kind].format(other.name), other.text)
            rows.append({"messages": _turns(_asks(draw, fact), fact.text, *follow)})
        elif draw.random() < run_on:
            rows.append({"messages": _turns(_asks(draw, fact), _run_on(draw, facts, fact, 2))})
        else:
            rows.append({"messages": _turns(_asks(draw, fact), fact.text)})
    draw.shuffle(rows)
    _write(path, rows)


def write_pairs(path: Path, facts: list[Fact], n: int, wrong: float) -> None:
    """Writes `n` pairs of a right answer that stops and one that runs on, or, in the share `wrong`, that is another's."""
    draw, rows = random.Random(3), []
    for fact in itertools.islice(itertools.cycle(facts), n):
        other = draw.choice([f for f in draw.sample(facts, min(8, len(facts))) if f.kind == fact.kind] or [facts[0]])
        rejected = other.text if draw.random() < wrong else _run_on(draw, facts, fact, 1)
        if rejected != fact.text:
            rows.append({"prompt": _asks(draw, fact), "chosen": fact.text, "rejected": rejected})
    draw.shuffle(rows)
    _write(path, rows)


class Question(NamedTuple):
    """A held-out question; the answer is one of `choices`."""

    text: str
    choices: list[str]  # four; the others are answers to other held-out questions of about the same length
    answer: int
    run_on: str  # the answer, running on


def questions(facts: list[Fact]) -> list[Question]:
    """One question for each fact, in a phrasing that fine-tuning does not show."""
    draw, out = random.Random(4), []
    for fact in facts:
        others = [f for f in facts if f.kind == fact.kind and f != fact]
        others = others if len(others) > 2 else [f for f in facts if f != fact]
        near = sorted((abs(len(f.text) - len(fact.text)), f.name, f.text) for f in others)
        choices = [fact.text, *(text for _, _, text in draw.sample(near[:8], 3))]
        draw.shuffle(choices)
        text = draw.choice(HELD_OUT_ASKED[fact.kind]).format(fact.name)
        run_on = _run_on(draw, facts, fact, 1)
        out.append(Question(text, choices, choices.index(fact.text), run_on))
    return out
