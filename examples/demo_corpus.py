"""Makes the demo's corpus and tokenizer from the standard library: docstrings and comments as text, everything else as code.

Every computer that can run the demo has that library, so nothing is downloaded. Each module gives one document per source.
Whole modules are held out of both sources, so that no training text explains validation code.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import itertools
import json
import re
import sys
import sysconfig
import tokenize
import warnings
from pathlib import Path
from typing import NamedTuple

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data.prepare import vocabulary

SOURCES = ("text", "code")
SPLITS = ("train", "validation")
HELD_OUT = 0.01  # of the modules
# Installed packages are not part of the library. Many distributions leave out the tests, so with them the corpus would depend
# on who packaged Python. The last two are generated tables.
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
NOT_TEXT = re.compile(r"!|.*coding[:=]\s*[-\w.]+|\W*$")  # a shebang, an encoding, a ruler


class Document(NamedTuple):
    """The text and the code of one module."""

    text: str  # docstrings and comments, in order, a blank line between
    code: str  # everything else, which still parses


def modules(stdlib: Path | None = None) -> dict[str, Path]:
    """Returns dotted name -> file for all modules in `stdlib` (default: that of this Python), sorted by name."""
    stdlib = Path(sysconfig.get_path("stdlib")) if stdlib is None else stdlib
    files = {path.relative_to(stdlib).with_suffix("").parts: path for path in stdlib.rglob("*.py")}
    return {".".join(parts): files[parts] for parts in sorted(files) if not LEFT_OUT.intersection(parts)}


def fingerprint(stdlib: Path | None = None) -> dict[str, str]:
    """Returns what the corpus depends on: the Python version, its modules by name and size, and this file."""
    listing = "".join(f"{name} {path.stat().st_size}\n" for name, path in modules(stdlib).items())
    return {
        "python": sys.version.split()[0],
        "modules": hashlib.sha256(listing.encode()).hexdigest()[:16],
        "demo_corpus.py": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16],
    }


def held_out(names: list[str]) -> set[str]:
    """Returns the 1% of `names` (at least one) with the smallest SHA-256, so that adding a module hardly changes the others."""
    return set(sorted(names, key=_hash)[: max(1, round(HELD_OUT * len(names)))])


def gather(folder: Path, stdlib: Path | None = None) -> dict[str, int]:
    """Writes `folder`/SOURCE.SPLIT.jsonl, lines of {"module": name, "text": document}; returns counts to print.

    Files that cannot be decoded or parsed are skipped and counted. Raises UserError if too few remain for two splits.
    """
    files, documents = modules(stdlib), {}
    for name, path in files.items():
        try:
            with tokenize.open(path) as f:  # decodes by the file's own declaration
                document = take_apart(f.read())
            "".join(document).encode()  # fails for half of a surrogate pair, which a docstring can contain as an escape
        except (SyntaxError, ValueError, tokenize.TokenError):
            continue
        documents[name] = document
    complete = [name for name, document in documents.items() if all(document)]
    if len(complete) < 2:
        raise UserError(
            f"{stdlib or sysconfig.get_path('stdlib')}: holds {len(complete)} documented modules; 2 are needed at least"
        )
    validation = held_out(complete)
    for source in SOURCES:
        lines: dict[str, list[str]] = {split: [] for split in SPLITS}
        for name, document in documents.items():
            if content := getattr(document, source):
                line = json.dumps({"module": name, "text": content}, ensure_ascii=False)
                lines[SPLITS[name in validation]].append(line + "\n")
        for split, rows in lines.items():
            (folder / f"{source}.{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    return {"modules": len(documents), "held out": len(validation), "skipped": len(files) - len(documents)}


def take_apart(source: str) -> Document:
    """Splits a module into its documentation and its code. Raises SyntaxError if it does not parse."""
    lines = io.StringIO(source).readlines()  # not splitlines, which also splits at form feeds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escapes in the library's own modules
        tree = ast.parse(source)
    paragraphs: list[tuple[int, str]] = []  # line number, paragraph
    spans = []  # (first line, column, last line, column, replacement)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring is not None:
                paragraphs.append((node.body[0].lineno, inspect.cleandoc(docstring).strip()))
                spans.append(_docstring_span(node.body, lines, keep=not isinstance(node, ast.Module)))
    comments = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    paragraphs += _paragraphs(comments)
    spans += [(*t.start, *t.end, "") for t in comments]
    text = "\n\n".join(paragraph for _, paragraph in sorted(paragraphs, key=lambda pair: pair[0]) if paragraph)
    return Document(text, _without(lines, spans))


def train_tokenizer(corpus: Path, shares: dict[str, float], vocab_size: int) -> bytes:
    """Returns a SentencePiece BPE model of `vocab_size` pieces, trained on `corpus` mixed by `shares` of characters.

    See `vocabulary.train`. The same corpus gives the same bytes.
    """
    documents = {source: _documents(corpus / f"{source}.train.jsonl") for source in SOURCES}
    total = min(sum(map(len, documents[source])) / share for source, share in shares.items())
    sentences: list[str] = []
    for source, share in shares.items():
        ends = itertools.accumulate(map(len, documents[source]))
        sentences += [d for d, end in zip(documents[source], ends, strict=True) if end <= share * total]
    return vocabulary.train(sentences, vocab_size)


def _documents(path: Path) -> list[str]:
    """Returns the texts in a file of `gather`, in an order that separates related modules."""
    with path.open(encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return [row["text"] for row in sorted(rows, key=lambda row: _hash(row["module"]))]


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _docstring_span(body: list[ast.stmt], lines: list[str], keep: bool) -> tuple[int, int, int, int, str]:
    """Returns the span of the docstring that opens `body`, and `pass` as its replacement if the grammar needs a statement."""
    node = body[0]
    first, last = lines[node.lineno - 1], lines[node.end_lineno - 1]
    start = len(first.encode()[: node.col_offset].decode())  # ast counts bytes of UTF-8
    end = len(last.encode()[: node.end_col_offset].decode())
    alone = re.match(r"\s*(#|$)", last[end:]) and (len(body) > 1 or not keep)
    return node.lineno, start, node.end_lineno, end, "" if alone else "pass"


def _paragraphs(comments: list[tokenize.TokenInfo]) -> list[tuple[int, str]]:
    """Returns (line number, paragraph): comments on consecutive lines that start in the same column form one paragraph."""
    runs: list[list[tokenize.TokenInfo]] = []
    for comment in comments:
        if runs and (runs[-1][-1].start[0] + 1, runs[-1][-1].start[1]) == comment.start:
            runs[-1].append(comment)
        else:
            runs.append([comment])
    out = []
    for run in runs:
        words = [c.string.lstrip("#").removeprefix(" ").rstrip() for c in run]
        out.append((run[0].start[0], "\n".join(w for w in words if not NOT_TEXT.match(w)).strip()))
    return out


def _without(lines: list[str], spans: list[tuple[int, int, int, int, str]]) -> str:
    """Returns the joined lines with each span replaced; lines that become empty are removed, all others are unchanged."""
    out = list(lines)
    outside: list[tuple[int, int, int, int, str]] = []
    for span in sorted(spans):
        if not outside or span[:2] >= outside[-1][2:4]:  # a comment between the parts of a docstring is removed with it
            outside.append(span)
    for first, start, last, end, instead in reversed(outside):
        head, tail = out[first - 1][:start] + instead, out[last - 1][end:]
        line = head + tail if tail.strip() else head.rstrip() + "\n"
        out[first - 1 : last] = [line] if line.strip() else []
    return "".join(out).strip("\n")
