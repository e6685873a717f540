"""What the arc measures after each stage, on held-out questions, and whether a stage improved what it is for."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from examples.arc_facts import Question

MOST_TOKENS = 64  # of an answer
SLOTS = 16  # answers written at a time


class Measure(NamedTuple):
    """A number for each held-out question, whose mean is shown."""

    title: str
    better: int  # 1: more is better; -1: less
    percent: bool = True


MEASURES = {
    "stops_sampled": Measure(f"stops within {MOST_TOKENS} tokens, sampled, %", 1),
    "stops_greedy": Measure(f"stops within {MOST_TOKENS} tokens, greedy, %", 1),
    "tokens": Measure(f"length, sampled, tokens (at most {MOST_TOKENS})", -1, percent=False),
    "nats": Measure("loss of the right answer, nats a token", -1, percent=False),
    "choice": Measure("right of four choices, %", 1),
    "prefers": Measure("prefers the end to running on, %", 1),
}
TASK = """\
task: arc_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: label
target_delimiter: {between}
metric_list:
  - metric: acc
"""
# stage -> (the stage before it, what it has to improve)
CLAIMS = {
    "sft": ("base", ("stops_sampled", "nats", "choice")),
    "dpo": ("sft", ("stops_sampled", "tokens", "prefers", "choice")),
}


def measure(run: Path, questions: list[Question]) -> dict[str, list[float]]:
    """A number of each of `MEASURES` for each question, and under "tokens_scored" the length of its right answer.

    The base model, too, is asked in Zephyr's template. Loss and choices are those of the answer's words alone, without the end:
    a model that has never seen an answer end would lose by that token alone. Choices are compared by log-probability: their
    lengths differ by less than a character on average.
    """
    from tinyllama_jax.data import chat
    from tinyllama_jax.evals.score import Scorer, Text
    from tinyllama_jax.inference import weights
    from tinyllama_jax.inference.sampling import Sampling

    loaded = weights.load(run)
    template = chat.choose(run, loaded.tokenizer, "zephyr")
    prompts = [chat.encode(template, loaded.tokenizer, asked(q), begin_with_bos=loaded.begin_with_bos) for q in questions]
    stops = chat.stop_ids(template, loaded.tokenizer)
    greedy, sampled = (answers(loaded, prompts, stops, Sampling(temperature=t)) for t in (0.0, 1.0))
    scorer, texts, parting = Scorer(loaded), [], []
    for question in questions:
        for answer in question.choices:
            ids, n = encoded(loaded, template, question, answer)
            texts.append(Text(ids[:-1], n - 1))
        chosen, rejected = (
            encoded(loaded, template, question, a)[0] for a in (question.choices[question.answer], question.run_on)
        )
        at = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        parting += [Text(chosen[: at + 1], 1), Text(rejected[: at + 1], 1)]
    sums = [float(score.logprobs.sum(dtype="float64")) for score in scorer(texts)]
    ends = [float(score.logprobs.sum()) for score in scorer(parting)]
    out: dict[str, list[float]] = {name: [] for name in (*MEASURES, "tokens_scored")}
    for i, question in enumerate(questions):
        right = 4 * i + question.answer
        out["stops_greedy"].append(float(greedy[i].finish == "stop"))
        out["stops_sampled"].append(float(sampled[i].finish == "stop"))
        out["tokens"].append(float(len(sampled[i].tokens)))
        out["nats"].append(-sums[right] / texts[right].n)
        out["tokens_scored"].append(float(texts[right].n))
        out["choice"].append(float(max(range(4 * i, 4 * i + 4), key=sums.__getitem__) == right))
        out["prefers"].append(float(ends[2 * i] > ends[2 * i + 1]))
    return out


def asked(question: Question) -> list[dict]:
    """The conversation before an answer."""
    return [{"role": "user", "content": question.text}]


def encoded(loaded, template, question: Question, answer: str) -> tuple[list[int], int]:
    """(ids up to the end of `answer`, how many of them the answer is, with its end)."""
    from tinyllama_jax.data import chat

    talk = [*asked(question), {"role": "assistant", "content": answer}]
    ids, mask = chat.encode_with_mask(template, loaded.tokenizer, talk, begin_with_bos=loaded.begin_with_bos)
    first = mask.index(True)
    end = first + mask[first:].index(False) if False in mask[first:] else len(mask)
    return ids[:end], end - first


def answers(loaded, prompts: list[list[int]], stops: tuple[int, ...], sampling) -> list:
    """The engine's finished requests, in the order of `prompts`."""
    from tinyllama_jax.inference.engine import Engine, Request

    engine = Engine(loaded, slots=SLOTS)
    requests = [Request(prompt, MOST_TOKENS, sampling, sample=i, stop_ids=stops) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.submit(request)
    while engine.busy:
        engine.step()
    return requests


def perplexity(measured: dict[str, list[float]]) -> float:
    """Of the words of all right answers together."""
    nats = sum(n * tokens for n, tokens in zip(measured["nats"], measured["tokens_scored"], strict=True))
    return math.exp(nats / sum(measured["tokens_scored"]))


def mean(values: list[float]) -> tuple[float, float]:
    """(mean, its standard error)."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def table(stages: dict[str, dict[str, list[float]]]) -> str:
    """A line for each measure, a column for each stage, with standard errors."""
    lines = [("", *stages)]
    for name, (title, _, percent) in MEASURES.items():
        cells = [mean(measured[name]) for measured in stages.values()]
        scale, digits = (100, 1) if percent else (1, 2)
        lines.append((title, *(f"{scale * value:.{digits}f} +- {scale * error:.{digits}f}" for value, error in cells)))
    lines.append(("perplexity of the right answers", *(f"{perplexity(measured):.1f}" for measured in stages.values())))
    first, *wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [[name.ljust(first), *(c.rjust(w) for c, w in zip(row, wide, strict=True))] for name, *row in lines]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def claims(stages: dict[str, dict[str, list[float]]]) -> list[tuple[bool, str]]:
    """(whether it holds, a line) for each claim: an improvement by more than two standard errors of the paired differences."""
    out = []
    for stage, (before, names) in CLAIMS.items():
        for name in names:
            better = MEASURES[name].better
            pairs = zip(stages[stage][name], stages[before][name], strict=True)
            gain, error = mean([better * (b - a) for b, a in pairs])
            holds = gain > 0 and gain > 2 * error
            size = f"{gain / error:.1f} standard errors" if error else "the same for all questions" if gain else "no difference"
            out.append((holds, f"{'pass' if holds else 'FAIL'}  {stage} against {before}: {MEASURES[name].title}: {size}"))
    return out


def write_task(folder: Path, run: Path, questions: list[Question]) -> None:
    """Writes the four-choice questions as a task of lm-evaluation-harness, arc_choices, for `evaluate --include`.

    A prompt ends with the question's eos, and the mark of the assistant's turn stands before each choice. The harness moves a
    prompt's last line end into the answer, where a tokenizer may join it with the mark's last character: the model would see
    another mark than in training. After a control token nothing is joined. The mark's own log-probability is the same for
    all choices, so the right ones are those of `measure`.
    """
    from tinyllama_jax.data import chat, control, tokenizer

    spm = tokenizer.load(run / "tokenizer")
    template = chat.choose(run, spm, "zephyr")
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as f:
        for question in questions:
            prompt = chat.render(template, spm, asked(question))
            before, eos, between = prompt.rpartition(control.named(spm)["eos_token"])
            row = {"prompt": before + eos, "choices": question.choices, "label": question.answer}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    file = json.dumps(str((folder / "questions.jsonl").absolute()))
    (folder / "arc_choices.yaml").write_text(TASK.format(file=file, between=json.dumps(between)))


def retrieved(folder: Path, run: Path) -> str:
    """A table: exact match and F1 of the model's own answers, without and with passages of an index of the facts.

    `folder`: what `arc_facts.write_retrieval` wrote; the index goes there, and the scores, as questions.json.
    """
    from tinyllama_jax.data import chat
    from tinyllama_jax.evals import questions as questions_lib
    from tinyllama_jax.inference import retrieval, weights

    if not (folder / "index").is_dir():
        retrieval.build([folder / "passages.jsonl"], folder / "index")
    if not (folder / "questions.json").is_file():
        loaded, rows = weights.load(run), questions_lib.read(folder / "questions.jsonl")
        template, index = chat.choose(run, loaded.tokenizer), retrieval.Index(folder / "index")
        ask = lambda index: questions_lib.summary(questions_lib.answered(loaded, rows, template, index, SLOTS))
        partial = folder / "questions.partial"
        partial.write_text(json.dumps({"without passages": ask(None), "with passages": ask(index)}))
        partial.replace(folder / "questions.json")
    return questions_lib.table(json.loads((folder / "questions.json").read_text()))


def saved(path: Path, run: Path, questions: list[Question]) -> dict[str, list[float]]:
    """What `measure` gives, kept in `path`."""
    if not path.is_file():
        measured = measure(run, questions)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(measured))
        partial.replace(path)
    return json.loads(path.read_text())
