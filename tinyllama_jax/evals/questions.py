"""Questions with known answers: a model's own answers to them, compared by exact match and F1 as in SQuAD.

The measures are those of Rajpurkar et al. 2016 (arXiv:1606.05250), with its normalisation, best over a question's answers.
"""

import math
import re
import statistics
import string
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import chat, conversations
from tinyllama_jax.data.conversations import Row
from tinyllama_jax.inference import retrieval
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.sampling import Sampling
from tinyllama_jax.inference.text import eos_ids, first_tokens
from tinyllama_jax.inference.weights import Loaded

MOST_NEW_TOKENS = 64
MEASURES = {"exact_match": "exact match, %", "f1": "F1, %", "in_passages": "a right answer is in the passages, %"}


class Answered(NamedTuple):
    """What a model said to one question, and how right it is."""

    text: str
    exact_match: float
    f1: float
    in_passages: float | None  # whether the passages hold the words of a right answer; None: there is no index
    passages: list[retrieval.Passage]


def read(path: Path) -> list[Row]:
    """The questions of a file: `conversations.question_of`. Raises UserError, naming a wrong row."""
    if not path.is_file():
        raise UserError(f"--questions {path}: no such file; name one with a question and its answer in each line")
    rows = list(conversations.read([path], "questions"))
    if not rows:
        raise UserError(f"--questions {path}: is empty; it must hold a question and its answer in each line")
    return rows


# -- measures -------------------------------------------------------------------------------------------------------------


def normalised(text: str) -> list[str]:
    """The words of an answer: in lower case, without (ASCII) punctuation and without a, an, the."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def compared(answer: str, right: list[str]) -> tuple[float, float]:
    """(exact match, F1 of words) of an answer, each with the right answer that it fits best."""
    given, scores = normalised(answer), []
    for words in map(normalised, right):
        common, same = sum((Counter(given) & Counter(words)).values()), float(given == words)
        # without any words only an answer without any is right, as in SQuAD 2.0
        scores.append((same, 2 * common / (len(given) + len(words)) if given and words else same))
    return max(em for em, _ in scores), max(f1 for _, f1 in scores)


def held(passages: list[retrieval.Passage], right: list[str]) -> float:
    """1 if the words of one of the answers `right` stand in a passage, in their order; else 0."""
    within = [f" {' '.join(normalised(passage.text))} " for passage in passages]
    return float(any(f" {' '.join(normalised(answer))} " in text for text in within for answer in right))


def summary(answers: list[Answered]) -> dict[str, dict[str, float | None]]:
    """Measure -> its mean over the questions, and the standard error of that (None for one question)."""
    out = {}
    for name in MEASURES:
        values = [getattr(answer, name) for answer in answers]
        if None in values:
            continue
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        out[name] = {"value": statistics.fmean(values), "stderr": error}
    return out


def table(columns: dict[str, dict[str, dict[str, float | None]]]) -> str:
    """A line for each measure and a column for each of `summary`."""
    error = lambda score: "" if score["stderr"] is None else f" +- {100 * score['stderr']:.1f}"
    cell = lambda score: f"{100 * score['value']:.1f}{error(score)}" if score else "-"
    lines = [("", *columns)]
    lines += [(title, *(cell(scores.get(name)) for scores in columns.values())) for name, title in MEASURES.items()]
    return "\n".join(first.ljust(36) + "".join(c.rjust(18) for c in cells) for first, *cells in lines)


# -- answers --------------------------------------------------------------------------------------------------------------


def answered(
    loaded: Loaded, rows: list[Row], template: chat.Template | None, index: retrieval.Index | None = None, slots: int = 8
) -> list[Answered]:
    """The model's most likely answer to each question, of at most `MOST_NEW_TOKENS` tokens, with passages of `index` before it.

    Without a template the question is "Question: ...", and what follows "Answer:" up to the line's end is the answer. Raises
    UserError for a question that does not fit the context; passages are left out before that.
    """
    tokenizer, context = loaded.tokenizer, loaded.model.seq_len
    new = min(MOST_NEW_TOKENS, max(context // 4, 1))
    stops = chat.stop_ids(template, tokenizer) if template else eos_ids(tokenizer)
    engine, requests, used = Engine(loaded, slots), [], []
    for where, (messages, _) in rows:
        encode = lambda passages, messages=messages: _encoded(loaded, template, messages, passages)
        count = lambda passages, encode=encode: len(encode(passages))
        used.append(index.before(messages[-1]["content"], count, context - new, context) if index else [])
        requests.append(Request(encode(used[-1]), new, Sampling(temperature=0.0), stop_ids=stops))
        if (n := len(requests[-1].prompt)) > context - new:
            raise UserError(f"{where}: the question has {n:,} tokens, and there is room for {context - new:,}; shorten it")
        engine.submit(requests[-1])
    while engine.busy:
        if any(request.finish for request in engine.step()) and (n := sum(r.finish is not None for r in requests)) % 50 == 0:
            print(f"{n:,} of {len(rows):,} questions answered", file=sys.stderr, flush=True)
    ends = chat.stop_texts(template, tokenizer) if template else ("\n",)
    out = []
    for row, request, passages in zip(rows, requests, used, strict=True):
        text = tokenizer.decode([token for token in request.tokens if token not in stops]).strip()
        text = text[: min([at for end in ends if (at := text.find(end)) >= 0], default=len(text))].strip()
        right = row.messages[1]
        out.append(Answered(text, *compared(text, right), held(passages, right) if index else None, passages))
    return out


def _encoded(loaded: Loaded, template: chat.Template | None, messages: list, passages: list[retrieval.Passage]) -> list[int]:
    *before, question = messages
    if template:
        last = {"role": "user", "content": retrieval.asked(question["content"], passages)}
        return chat.encode(template, loaded.tokenizer, [*before, last], begin_with_bos=loaded.begin_with_bos)
    last = f"{retrieval.block(passages)}Question: {question['content']}\nAnswer:"
    text = "\n\n".join([*(message["content"] for message in before), last])
    return first_tokens(loaded.tokenizer, loaded.begin_with_bos, text)
