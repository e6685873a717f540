"""Reads conversations from jsonl, JSON, parquet and Arrow files, in the usual shapes.

| a row has                               | as in                                                              |
|-----------------------------------------|--------------------------------------------------------------------|
| `messages`                              | OpenAI, ultrachat_200k, `chat`'s /save: `role` and `content`       |
| `conversations`                         | ShareGPT: `from` (human, gpt, system) and `value`                  |
| `instruction`, `output`, maybe `input`  | Alpaca; also `response` and `context`, as in Dolly                 |
| `prompt`, `completion`                  | TRL: texts, or lists of messages; also `response`                  |
| `question`, `answer`; `input`, `output` | pairs                                                              |
| `text`                                  | turns within a text: `### Human:` (guanaco) or `<|im_start|>` (oasst_top1) |

A row that has none of these, or whose values do not fit, is an error that names it.
"""

import glob
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import check_local, listed, open_regular
from tinyllama_jax.data.chat import Message

KINDS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
PACKED = {".gz": "gzip", ".zst": "zstd"}
LONGEST = 1 << 26  # most bytes of a line, or of a .json file that is one list
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}
ROLES |= {"bot": "assistant", "model": "assistant", "system": "system"}
TOOLS = ("tool", "function", "function_call", "observation")  # roles of tool calls, in OpenAI's shape and ShareGPT's
# keys of the question, of the answer, and of more of the question. A row is read by the first line whose first two it has
PAIRS = (
    ("instruction", "output", "input"),
    ("instruction", "response", "context"),
    ("prompt", "completion", ""),
    ("prompt", "response", ""),
    ("question", "answer", ""),
    ("input", "output", ""),
)
TELLING = {"messages", "conversations", "conversation", "text", *(question for question, *_ in PAIRS)}  # keys of a row
TURNS = (r"### (Human|Assistant):", r"<\|im_start\|>(system|user|assistant)\n", r"(?:^|\n\n)(Human|Assistant):")
SHAPES = "messages; conversations; instruction and output; prompt and completion; question and answer; input and output; text"
ONLY_ANSWERS = "where chosen and rejected hold only answers, add a 'prompt'; see docs/dpo.md"
SPLITS = ("train", "test", "valid", "val", "eval", "dev")  # how the names of splits begin


class Row(NamedTuple):
    """A conversation, a pair of them, or a question with its answers, and where it was read."""

    where: str  # "FILE, line N"
    messages: list[Message] | tuple[list[Message], list[Message]] | tuple[list[Message], list[str]]


class _BadRow(Exception):
    pass


# -- files --------------------------------------------------------------------------------------------------------------


def files_of(source: str) -> list[Path]:
    """The conversation files of a file, a folder or a pattern such as data/train*.parquet, sorted. Raises UserError.

    A folder may be one that `datasets` saved. Files of several splits are refused: training on a test set would go unnoticed.
    """
    check_local("--data.sources", source)
    path, name = Path(source), f"--data.sources={source}"
    if path.is_file():
        if not _kind(path):
            raise UserError(f"{name}: is no {', '.join(KINDS)} file (also with .gz or .zst); see docs/sft.md")
        return [path]
    if (path / "config.json").is_file():
        raise UserError(f"{name}: is the folder of a run or a model; name conversations")
    if path.is_dir():
        files = [Path(folder, file) for folder, _, inside in os.walk(path) for file in inside if file in listed(folder)]
        files = [file for file in files if file.suffix != ".json" or file.name not in _DESCRIPTIONS]
    else:
        files = [Path(file) for file in glob.glob(source, recursive=True) if Path(file).is_file()]
    files = sorted(file for file in files if _kind(file))
    if not files:
        what = f"holds no {', '.join(KINDS)} file" if path.is_dir() else "no such file or folder"
        raise UserError(f"{name}: {what}; name a file, a folder or a pattern of conversations")
    splits = {_split(file, path): file for file in reversed(files)}
    if len(splits) > 1 and any(split.startswith(SPLITS) for split in splits):
        first = next((split for split in splits if split.startswith("train")), min(splits))
        one = splits[first].parent if splits[first].parent.name == first else splits[first].parent / f"{first}*"
        raise UserError(f"{name}: holds several splits ({', '.join(sorted(splits))}); name one, such as {one}")
    return files


_DESCRIPTIONS = ("dataset_info.json", "dataset_dict.json", "state.json", "dataset_infos.json")


def _kind(path: Path) -> str:
    """The ending that tells how to read a file, one of KINDS; "" for another."""
    name = path.name.removesuffix(path.suffix) if path.suffix in PACKED else path.name
    return next((kind for kind in KINDS if name.lower().endswith(kind)), "")


def _split(file: Path, folder: Path) -> str:
    """The split that a file belongs to: a folder of `datasets`' DatasetDict, or the beginning of a name on the hub."""
    if file.suffix == ".arrow" and file.parent != folder and (file.parent / "state.json").is_file():
        return file.parent.name
    return re.split(r"[-.]\d{5}-of-|\.", file.name)[0] if file.suffix != ".arrow" else "data"


# -- rows ---------------------------------------------------------------------------------------------------------------


def read(files: list[Path], kind: str = "chat") -> Iterator[Row]:
    """The conversations of `files`, in order; with "preferences" the pairs, with "questions" what `question_of` gives.

    Raises UserError, naming a wrong row.
    """
    parsed = {"chat": messages_of, "preferences": pair_of, "questions": question_of}[kind]
    for file in files:
        for where, row in _rows(file):
            try:
                yield Row(where, parsed(row))
            except _BadRow as error:
                raise UserError(f"{where}: {error}") from None


def messages_of(row: object) -> list[Message]:
    """The messages of a row of any known shape. Raises _BadRow, which says what does not fit."""
    if not isinstance(row, dict):
        raise _BadRow(f"is no object with keys, but {_short(row)}; known shapes: {SHAPES}")
    given = {key: value for key, value in row.items() if value is not None}
    for key in ("messages", "conversations", "conversation"):
        if key in given:
            return _turns(given[key], key)
    for question, answer, more in PAIRS:
        if question in given and answer in given:
            if isinstance(given[question], list) or isinstance(given[answer], list):
                return _turns(given[question], question) + _turns(given[answer], answer)
            texts = [_text(given[question], question), _text(given.get(more, ""), more)]
            system = [_message("system", _text(given["system"], "system"))] if given.get("system") else []
            content = "\n\n".join(text for text in texts if text)
            return [*system, _message("user", content), _message("assistant", _text(given[answer], answer))]
    if "text" in given:
        return _split_text(_text(given["text"], "text"), "text")
    for key, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and TELLING & value[0].keys():
            raise _BadRow(f"is one object with the list {key!r}; write this list alone, as jq '.{key}' FILE does")
    keys = ", ".join(map(repr, row)) or "no keys"
    raise _BadRow(f"has {keys:.300}, and fits no known shape ({SHAPES}); see docs/sft.md to convert it in one line")


def pair_of(row: object) -> tuple[list[Message], list[Message]]:
    """(chosen, rejected) conversations of a row: `chosen` and `rejected`, each whole or what follows `prompt`."""
    if not isinstance(row, dict) or row.get("chosen") is None or row.get("rejected") is None:
        raise _BadRow(f"is no pair: it needs 'chosen' and 'rejected', and has {_short(row)}; see docs/dpo.md")
    prompt, out = row.get("prompt"), []
    asked = _turns(prompt, "prompt") if isinstance(prompt, list) else prompt and [_message("user", _text(prompt, "prompt"))]
    for key in ("chosen", "rejected"):
        if isinstance(row[key], list) and row[key] and isinstance(row[key][0], dict):
            turns = _turns(row[key], key)
        elif asked:
            turns = [_message("assistant", _text(row[key], key))]
        else:
            turns = _split_text(_text(row[key], key), key, ONLY_ANSWERS)
        if not asked and all(turn["role"] == "assistant" for turn in turns):
            raise _BadRow(f"{key!r} begins with no question; {ONLY_ANSWERS}")
        out.append(turns if any(turn["role"] == "user" for turn in turns) else [*(asked or ()), *turns])
    return out[0], out[1]


def question_of(row: object) -> tuple[list[Message], list[str]]:
    """(the messages up to a question, the answers of which each is right) of a row of any known shape.

    `answer` or `answers` may be a list of texts, also within `text` as in SQuAD. Raises _BadRow.
    """
    answers = None
    if isinstance(row, dict) and row.get("question") is not None:
        answers = row.get("answer", row.get("answers"))
        answers = answers.get("text") if isinstance(answers, dict) else answers
        if answers == []:
            raise _BadRow("has an empty list of answers")
        if isinstance(answers, list):
            answers = [_text(answer, "answer") for answer in answers]
            row = {"question": row["question"], "answer": answers[0]}
    *messages, last = messages_of(row)
    if last["role"] != "assistant" or not messages or messages[-1]["role"] != "user":
        raise _BadRow("must end with a question and its answer")
    answers = answers if isinstance(answers, list) else [last["content"]]
    if not all(answer.strip() for answer in answers):
        raise _BadRow("has an empty answer")
    return messages, answers


def _turns(value: object, key: str) -> list[Message]:
    if isinstance(value, str):
        raise _BadRow(f"{key!r} is a text, and must be a list of turns: {_short(value)}")
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        n = max(map(len, value.values()))  # a sequence of structs, as `datasets` stores it by column
        value = [{name: column[i] for name, column in value.items() if i < len(column)} for i in range(n)]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise _BadRow(f"{key!r} must be a list of turns with role and content, or from and value, but is {_short(value)}")
    out = []
    for i, turn in enumerate(value):
        role, content = ("from", "value") if turn.get("from") is not None else ("role", "content")
        name = f"{key}[{i}]"
        if turn.get("tool_calls") or turn.get("function_call") or turn.get(role) in TOOLS:
            raise _BadRow(f"{name} is of a tool call, which is not supported; leave the row out, or write the call as text")
        if turn.get(role) is None or turn.get(content) is None:
            raise _BadRow(f"{name} needs role and content, or from and value; it has {_short(turn)}")
        if (spoken := ROLES.get(_text(turn[role], f"{name}.{role}").lower())) is None:
            raise _BadRow(f"{name}.{role} is {_short(turn[role])}; known are {', '.join(ROLES)}")
        out.append(_message(spoken, _text(turn[content], f"{name}.{content}")))
    if not out:
        raise _BadRow(f"{key!r} is an empty list")
    return out


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(value: object, key: str) -> str:
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        value = "".join(part["text"] for part in value)  # parts of a message, as OpenAI writes them
    if not isinstance(value, str):
        raise _BadRow(f"{key!r} is not a text, but {_short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRow(f"{key!r} holds half of a surrogate pair at {error.start}, which is no character") from None
    return value


def _split_text(text: str, key: str, remedy: str = f"known shapes: {SHAPES}") -> list[Message]:
    for pattern in TURNS:
        before, *parts = re.split(pattern, text)
        if parts:
            turns = zip(parts[::2], parts[1::2], strict=True)
            system = [_message("system", before.strip())] if before.strip() else []
            return system + [
                _message(ROLES[role.lower()], content.strip().removesuffix("<|im_end|>")) for role, content in turns
            ]
    marks = "none of '### Human:', '<|im_start|>user' and 'Human:'"
    raise _BadRow(f"{key!r} has no turns: {marks} is in {_short(text)}; {remedy}")


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


# -- kinds of file ------------------------------------------------------------------------------------------------------


def _rows(file: Path) -> Iterator[tuple[str, object]]:
    """(where, row) of a file."""
    read = {".parquet": _parquet, ".arrow": _arrow}.get(_kind(file), _json)
    at = _Place("line" if read is _json else "row", 0)
    try:
        for row in read(file, at):
            yield f"{file}, {at}", row
    except _BadRow as error:
        raise UserError(f"{file}, {at}: {error}") from None
    except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}, after {at}: cannot be read: {' '.join(str(error).split())}") from None


@dataclass
class _Place:
    """Where in a file a row is."""

    unit: str
    number: int  # from 1

    def __str__(self) -> str:
        return f"{self.unit} {self.number}"


def _json(file: Path, at: _Place) -> Iterator[object]:
    """The rows of a file: one object a line, or one list if a .json file begins with [."""
    with open_regular(file) as raw:
        packed = PACKED.get(file.suffix)
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), packed) if packed else raw
        lines = io.BufferedReader(stream, 1 << 20)
        while line := lines.readline(LONGEST + 1):
            at.number += 1
            if len(line) > LONGEST:
                raise _BadRow(f"is longer than {LONGEST:,} bytes")
            if not (line := line.removeprefix(b"\xef\xbb\xbf").strip()):
                continue
            if line.startswith(b"[") and _kind(file) == ".json":
                whole = line + b"\n" + lines.read(LONGEST + 1)
                if len(whole) > LONGEST:
                    raise _BadRow(f"is one list of more than {LONGEST:,} bytes; write one object a line (.jsonl)")
                at.unit, rows = "row", _decoded(whole)
                for at.number, row in enumerate(rows, 1):
                    yield row
                return
            yield _decoded(line)


def _decoded(text: bytes) -> object:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        remedy = "convert the file, for example with `iconv -f latin1 -t utf-8`"
        raise _BadRow(f"is not UTF-8 (byte {text[error.start]:#04x} at {error.start}); {remedy}") from None
    except RecursionError:
        raise _BadRow("is not JSON: is nested too deeply") from None
    except ValueError as error:
        several = "; write one object a line, or one list alone in a .json file" if text.endswith((b"{", b"[")) else ""
        raise _BadRow(f"is not JSON: {error}{several}") from None


def _parquet(file: Path, at: _Place) -> Iterator[object]:
    with open_regular(file) as raw, pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True) as opened:
        for batch in opened.iter_batches(256, use_threads=False):
            yield from _counted(batch, at)


def _arrow(file: Path, at: _Place) -> Iterator[object]:
    """As `datasets` saves it, a stream; or an Arrow file."""
    with open_regular(file) as raw:
        whole = raw.read(6) == b"ARROW1"
        raw.seek(0)
        opened = pyarrow.ipc.open_file(raw) if whole else pyarrow.ipc.open_stream(raw)
        batches = (opened.get_batch(i) for i in range(opened.num_record_batches)) if whole else opened
        for batch in batches:
            yield from _counted(batch, at)


def _counted(batch: pyarrow.RecordBatch, at: _Place) -> Iterator[object]:
    batch.validate(full=True)  # Arrow trusts its offsets: a damaged one would end this process
    for start in range(0, batch.num_rows, 256):  # a batch of `datasets` has 1,000 rows or more
        for row in batch.slice(start, 256).to_pylist():
            at.number += 1
            yield row
