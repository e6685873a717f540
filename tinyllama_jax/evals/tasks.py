"""Names of groups of tasks, TinyLlama's published scores on them, and local files in place of the hub's data."""

import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllama_jax.base import files
from tinyllama_jax.base.errors import UserError

COMMONSENSE = ("hellaswag", "openbookqa", "winogrande", "arc_challenge", "arc_easy", "boolq", "piqa")
SUITES = {
    "commonsense": COMMONSENSE,
    "knowledge": ("mmlu", "bbh", "drop", "humaneval"),
    "language": ("lambada_openai", "wikitext"),
}
METRIC = dict.fromkeys(COMMONSENSE, "acc_norm") | {"winogrande": "acc", "boolq": "acc"}  # what the original reports
# Scores of COMMONSENSE in per cent, 0-shot, fp32. Sources: EVAL.md of github.com/jzhang38/TinyLlama; for v1.1 the model card of
# huggingface.co/TinyLlama/TinyLlama_v1.1. The average is the original's. It names no version of lm-evaluation-harness, and its
# old `hf-causal` most likely put no bos in front
PUBLISHED = {
    "Pythia-1.0B, 300B tokens": (47.16, 31.40, 53.43, 27.05, 48.99, 60.83, 69.21, 48.30),
    "TinyLlama, 103B": (43.50, 29.80, 53.28, 24.32, 44.91, 59.66, 67.30, 46.11),
    "TinyLlama, 503B": (49.56, 31.40, 55.80, 26.54, 48.32, 56.91, 69.42, 48.28),
    "TinyLlama, 1T": (52.54, 33.40, 55.96, 27.82, 52.36, 59.54, 69.91, 50.22),
    "TinyLlama, 1.5T": (53.68, 35.20, 58.33, 29.18, 51.89, 59.08, 71.65, 51.29),
    "TinyLlama, 2T": (54.63, 33.40, 56.83, 28.07, 54.67, 63.21, 70.67, 51.64),
    "TinyLlama, 2.5T": (58.96, 34.40, 58.72, 31.91, 56.78, 63.21, 73.07, 53.86),
    "TinyLlama, 3T": (59.20, 36.00, 59.12, 30.12, 55.25, 57.83, 73.29, 52.99),
    "TinyLlama v1.1": (61.47, 36.80, 59.43, 32.68, 55.47, 55.99, 73.56, 53.63),
    "TinyLlama v1.1 math_code": (60.80, 36.40, 60.22, 33.87, 55.20, 57.09, 72.69, 53.75),
    "TinyLlama v1.1 chinese": (58.23, 35.20, 59.27, 31.40, 55.35, 61.41, 73.01, 53.41),
}


def named(text: str, section: str = "") -> list[str]:
    """The tasks of a list such as "commonsense,wikitext", each once. Raises UserError for an empty list."""
    names = [name for part in text.split(",") for name in SUITES.get(part.strip(), (part.strip(),)) if name]
    if not names:
        raise UserError(
            f"--{section}tasks {text!r}: names no task; choose of {', '.join(SUITES)}, or name tasks of lm-evaluation-harness"
        )
    return list(dict.fromkeys(names))


# -- local files --------------------------------------------------------------------------------------------------------


class Choices(typing.TypedDict):
    text: list[str]
    label: list[str]


class HellaSwag(typing.TypedDict):
    ctx_a: str
    ctx_b: str
    activity_label: str
    endings: list[str]
    label: str


class OpenBookQA(typing.TypedDict):
    question_stem: str
    choices: Choices
    answerKey: str


class Arc(typing.TypedDict):
    question: str
    choices: Choices
    answerKey: str


class WinoGrande(typing.TypedDict):
    sentence: str
    option1: str
    option2: str
    answer: typing.Literal["1", "2"]


class BoolQ(typing.TypedDict):
    passage: str
    question: str
    label: int


class Piqa(typing.TypedDict):
    goal: str
    sol1: str
    sol2: str
    label: int


def _asked(name: str) -> Callable[[dict], dict]:
    """Gives a row of AllenAI's own files, where `question` holds the choices, the hub's columns. `name`: the question's."""

    def rewritten(row: dict) -> dict:
        row = row | {"answerKey": str(row.get("answerKey")).strip()}
        question = row.get("question")
        if not isinstance(question, dict) or not isinstance(question.get("choices"), list):
            return row
        each = [choice if isinstance(choice, dict) else {} for choice in question["choices"]]
        choices = {key: [choice.get(key) for choice in each] for key in ("text", "label")}
        return row | {name: question.get("stem"), "choices": choices}

    return rewritten


def _yes_or_no(row: dict) -> dict:
    label = row.get("label", row.get("answer"))  # BoolQ's own files call it answer
    return row | {"label": int(label) if isinstance(label, bool) else label}


def _as_text(row: dict) -> dict:
    return row | {"label": str(row["label"])} if isinstance(row.get("label"), int) else row  # a text on the hub


class Local(typing.NamedTuple):
    """Where a task's local rows come from."""

    split: str  # that the task scores
    row: type  # with the hub's columns
    rewritten: Callable[[dict], dict] = lambda row: row
    answers: Callable[[dict], tuple[object, typing.Collection]] = lambda row: (int(row["label"]), range(2))  # (right one, all)


_by_letter = lambda row: (row["answerKey"], row["choices"]["label"])
_ARC = Local("test", Arc, _asked("question"), _by_letter)
LOCAL = {
    "hellaswag": Local("validation", HellaSwag, _as_text, lambda row: (int(row["label"]), range(len(row["endings"])))),
    "openbookqa": Local("test", OpenBookQA, _asked("question_stem"), _by_letter),
    "winogrande": Local("validation", WinoGrande, answers=lambda row: ("_", row["sentence"])),
    "arc_challenge": _ARC,
    "arc_easy": _ARC,
    "boolq": Local("validation", BoolQ, _yes_or_no),
    "piqa": Local("validation", Piqa),
}
_WORDS = {"validation": {"validation", "valid", "val", "dev"}, "test": {"test"}}


def local_rows(data: Path, task: str, section: str = "") -> tuple[str, list[dict]]:
    """(split, rows with the hub's columns) of DATA/TASK. Raises UserError that names the file, the line and what is wrong.

    Reads the hub's parquet or jsonl files, or those that the authors of the data publish.
    """
    if task not in LOCAL:
        raise UserError(f"--{section}data {data}: holds no {task}: only {', '.join(LOCAL)} can be read from local files")
    local, folder = LOCAL[task], data / task
    paths = _files(folder, local, f"--{section}data")
    rows, last = [], None
    for path in paths:
        labels = _labels(path)
        for number, row in enumerate(_read(path), start=1):
            last = f"{path}, row {number}"
            try:
                if labels is not None:
                    row = row | {"label": labels[number - 1]}
                row = files.typed(local.rewritten(row), local.row)
                right, every = local.answers(row)
                if right not in every:
                    raise ValueError(f"its answer {right!r} is none of {', '.join(map(str, every))}")
            except (ValueError, IndexError, TypeError) as error:
                raise UserError(f"{last}: {error}; it must hold {_held(local)}") from None
            rows.append(row)
        if labels is not None and len(labels) != number:
            raise UserError(f"{path}: has {number:,} rows, and its labels are {len(labels):,}; copy both files again")
    if not rows:
        raise UserError(f"{paths[0]}: is empty; it must hold rows with {_held(local)}")
    return local.split, rows


def _held(local: Local) -> str:
    return ", ".join(local.row.__annotations__)


def _files(folder: Path, local: Local, option: str) -> list[Path]:
    """The parquet files of the split, or its one jsonl file."""
    wanted = f"{folder}/{local.split}.jsonl (or .parquet), whose rows hold {_held(local)}"
    if not folder.is_dir():
        remedy = f"say {option} {folder.parent.parent}" if folder.parent.name == folder.name else f"{option} needs {wanted}"
        raise UserError(f"{folder}: no such folder; {remedy}")
    fits = lambda path: set(re.split("[^a-z]+", path.stem.lower())) & _WORDS[local.split]
    paths = [folder / name for name in files.listed(folder)]
    parquet, lines = ([p for p in paths if p.suffix == end and fits(p)] for end in (".parquet", ".jsonl"))
    if len(lines) > 1 and not parquet:
        raise UserError(f"{folder}: holds {', '.join(p.name for p in lines)}; keep one file of the split {local.split}")
    if not parquet and not lines:
        raise UserError(f"{folder}: holds no file of the split {local.split}; {option} needs {wanted}")
    return parquet or lines


def _labels(path: Path) -> list[int] | None:
    """The numbers in the file of labels that PIQA has beside its rows."""
    beside = path.with_name(path.stem + "-labels.lst")
    if not beside.is_file():
        return None
    with files.open_regular(beside) as f:
        words = f.read(files.LARGEST_JSON).split()
    if wrong := [word for word in words if not word.isdigit()]:
        raise UserError(f"{beside}: holds {wrong[0][:40]!r}; each line must be a number")
    return list(map(int, words))


def _read(path: Path) -> typing.Iterator[dict]:
    if path.suffix == ".parquet":
        import pyarrow.lib
        import pyarrow.parquet

        try:
            yield from pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.lib.ArrowException as error:
            raise UserError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]}); copy it again") from None
        return
    with files.open_regular(path) as f:
        for number, line in enumerate(f, start=1):
            if line.strip():
                try:
                    yield files.decode_json(line, dict)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: is no JSON object ({error}); copy the file again") from None


def has_right_answer(task: Any, doc: dict) -> bool:
    """Whether an item of a task with choices has its right answer among them; the harness only counts it as answered wrong."""
    if task.OUTPUT_TYPE != "multiple_choice" or getattr(task, "multiple_input", 0) or getattr(task, "multiple_target", 0):
        return True
    right, choices = task.doc_to_target(doc), task.doc_to_choice(doc)
    return 0 <= right < len(choices) if isinstance(right, int) else right in choices


# -- the table ----------------------------------------------------------------------------------------------------------


def table(name: str, scores: dict[str, tuple[float, float | None]]) -> str:
    """The original's scores with those of the model `name` below: task -> (score, standard error), as fractions."""
    known = [task for task in COMMONSENSE if task in scores]
    columns = [COMMONSENSE.index(task) for task in known]
    whole = len(known) == len(COMMONSENSE)
    cells = {label: [f"{row[i]:.2f}" for i in columns] + [f"{row[-1]:.2f}"] * whole for label, row in PUBLISHED.items()}
    ours = [100 * scores[task][0] for task in known]
    cells[name] = [f"{value:.2f}" for value in ours] + [f"{sum(ours) / len(ours):.2f}"] * whole
    cells["  standard error"] = [f"{100 * error:.2f}" if (error := scores[task][1]) else "" for task in known] + [""] * whole
    wide = max(map(len, cells))
    heads = known + ["average"] * whole
    lines = [" ".join([" " * wide, *(head.rjust(max(8, len(head))) for head in heads)])]
    for label, row in cells.items():
        lines.append(" ".join([label.ljust(wide), *(c.rjust(max(8, len(h))) for c, h in zip(row, heads, strict=True))]))
    return "\n".join(line.rstrip() for line in lines)
