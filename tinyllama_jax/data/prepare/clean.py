"""Filters that drop documents, and scrubbing, which replaces patterns in them. Runs in the workers.

A filter reads only the first `HEAD` characters, so that memory stays bounded for a document of any size. `length` counts all
characters, and `python` gets the whole text.
"""

import functools
import hashlib
import importlib
import importlib.util
import ipaddress
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from tinyllama_jax.base import store
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.store import Place

HEAD = 1 << 20  # characters of a document that filters read, and that --keep-dropped keeps
WHOLE = 1 << 27  # most characters of a document that a Python function can get
SAMPLE = 1 << 16  # characters from which the language is detected
CHUNK, LONGEST = 1 << 20, 1 << 24  # characters of a chunk; most characters after them that are searched for a line's end
FILTERS = {
    "length": "length:MINIMUM:MAXIMUM (characters; empty: no limit)",
    "language": "language:CODE:MINIMUM (share of the text, 0 to 1)",
    "repetition": "repetition",
    "python": "python:MODULE_OR_FILE.py:FUNCTION",
    "fasttext": "fasttext:MODEL.bin:LABEL:MINIMUM (probability, 0 to 1)",
}
LIBRARIES = {"language": "pycld2", "minhash": "datasketch"}
# Rae et al. 2021 (Gopher), table A1: largest shares of lines that repeat another line, of characters in such lines, and of
# characters in the most frequent n-gram of words. Their rules for paragraphs and for repeated 5- to 10-grams are left out.
LINES, LINE_CHARACTERS, TOP_NGRAM = 0.30, 0.20, {2: 0.20, 3: 0.18, 4: 0.16}


class Filter(NamedTuple):
    """One --filter; `content` is the text of a Python file, which workers on other machines may not have."""

    spec: str
    name: str
    arguments: tuple
    sha256: str = ""  # of the file that it needs: with another file the output may differ
    content: str = ""


class Scrub(NamedTuple):
    """A pattern to replace; a match stays if `keep(text before it, match)` is true."""

    name: str
    pattern: str
    replacement: str
    keep: Callable[[str, str], bool] | None = None


class Cleaning(NamedTuple):
    """All options of cleaning. Can be pickled."""

    filters: tuple[Filter, ...] = ()
    scrubs: tuple[Scrub, ...] = ()
    dedup: str = ""  # of `duplicates.METHODS`
    threshold: float = 0.0
    keep: Place | None = None  # folder for what is dropped

    def settings(self) -> dict:
        """The settings that the output depends on; empty without cleaning."""
        filters = [filter_.spec + (f" sha256:{filter_.sha256}" if filter_.sha256 else "") for filter_ in self.filters]
        out = {"filter": filters, "dedup": self.dedup, "scrub": [scrub.name for scrub in self.scrubs]}
        out |= {"dedup_threshold": self.threshold if self.dedup == "minhash" else 0, "keep_dropped": self.keep is not None}
        used = [LIBRARIES[name] for name in (*(f.name for f in self.filters), self.dedup) if name in LIBRARIES]
        out["versions"] = {name: metadata.version(name) for name in used}  # another version may decide differently
        return {key: value for key, value in out.items() if value}


def parse(
    filters: Iterable[str], scrubs: Iterable[str], dedup: str, threshold: float | None, keep: str | Path | None
) -> Cleaning:
    """Parses the options. `scrubs`: each is regex:PATTERN=REPLACEMENT, or names separated by commas. Raises UserError."""
    names = itertools.chain.from_iterable([spec] if spec.startswith("regex:") else spec.split(",") for spec in scrubs)
    cleaning = Cleaning(tuple(map(parse_filter, filters)), tuple(map(parse_scrub, names)), dedup, threshold, None)
    for option, specs in (("filter", [f.spec for f in cleaning.filters]), ("scrub", [s.name for s in cleaning.scrubs])):
        if twice := [spec for spec, n in Counter(specs).items() if n > 1]:
            raise UserError(f"--{option} {twice[0]}: is given more than once")
    if keep is not None and not (filters or dedup):
        raise UserError(f"--keep-dropped {keep}: nothing is dropped without --filter or --dedup")
    return cleaning._replace(keep=store.place(keep, "--keep-dropped") if keep is not None else None)


def parse_filter(spec: str) -> Filter:
    """Parses a --filter, written as in `FILTERS`. Raises UserError for an unknown filter, a bad value or a missing file."""
    name, _, value = spec.partition(":")
    if name not in FILTERS:
        raise UserError(f"--filter {spec}: no such filter; there are {', '.join(FILTERS.values())}")
    colons = {"length": 1, "language": 1, "repetition": -1, "python": 1, "fasttext": 2}[name]
    arguments = value.rsplit(":", colons) if value else []  # a path may hold colons, what comes after it does not
    if len(arguments) != colons + 1 or not any(arguments + ["-"] * (colons < 0)):
        raise UserError(f"--filter {spec}: must be {FILTERS[name]}")
    if name == "length":
        low, high = _number(spec, arguments[0] or "0", int), _number(spec, arguments[1] or "inf", int)
        if not 0 <= low <= high:
            raise UserError(f"--filter {spec}: no document is that long; must be {FILTERS[name]}")
        return Filter(spec, name, (low, high))
    if name == "language":
        codes = sorted(code for _, code in _cld2().LANGUAGES)
        if arguments[0] not in codes:
            raise UserError(f"--filter {spec}: {arguments[0]!r} is no language that CLD2 knows; it knows {' '.join(codes)}")
        return Filter(spec, name, (arguments[0], _number(spec, arguments[1], float)))
    if name == "python":
        return _parse_python(spec, *arguments)
    if name == "fasttext":
        path, label, least = arguments
        if not Path(path).is_file():
            raise UserError(f"--filter {spec}: there is no file {path}")
        filter_ = Filter(spec, name, (os.path.abspath(path), label, _number(spec, least, float)))
        labels = _fasttext(filter_.arguments[0]).predict("", k=-1)[0]  # all, the likeliest first
        if labels and _label(label) not in labels:
            known = " ".join(name.removeprefix("__label__") for name in labels[:20])
            raise UserError(f"--filter {spec}: {path} has no label {label!r}; it has {known}")
        with open(path, "rb") as file:
            return filter_._replace(sha256=hashlib.file_digest(file, "sha256").hexdigest())
    return Filter(spec, name, ())


def _number(spec: str, text: str, kind: type) -> float:
    try:
        value = math.inf if kind is int and text == "inf" else kind(text)
    except ValueError:
        value = math.nan
    if math.isnan(value) or (kind is float and not 0 <= value <= 1):
        what = "a whole number" if kind is int else "a number from 0 to 1"
        raise UserError(f"--filter {spec}: {text!r} is not {what}; must be {FILTERS[spec.split(':')[0]]}")
    return value


def _parse_python(spec: str, where: str, function: str) -> Filter:
    path, content = where, ""
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise UserError(f"--filter {spec}: there is no file {where}")
        try:
            content = Path(where).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"--filter {spec}: {where} is not UTF-8") from None
    else:
        try:
            path = importlib.util.find_spec(where).origin
        except (ImportError, AttributeError, ValueError):
            raise UserError(f"--filter {spec}: there is no module {where} (a file's name ends in .py)") from None
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path or "").is_file() else ""
    filter_ = Filter(spec, "python", (where, function), sha256, content)
    _predicate(filter_)  # raises errors now, before the workers start
    return filter_


def parse_scrub(spec: str) -> Scrub:
    """Parses a --scrub: a key of `SCRUBS`, or regex:PATTERN=REPLACEMENT. Raises UserError."""
    if spec in SCRUBS:
        return SCRUBS[spec]
    known = f"there are {', '.join(SCRUBS)}, regex:PATTERN=REPLACEMENT"
    pattern, equals, replacement = spec.removeprefix("regex:").rpartition("=")
    if not spec.startswith("regex:") or not equals:
        raise UserError(f"--scrub {spec}: no such pattern; {known}")
    try:
        if re.compile(pattern).search(""):
            raise UserError(f"--scrub {spec}: matches an empty text, and so matches everywhere")
    except re.error as error:
        raise UserError(f"--scrub {spec}: {pattern!r} is not a regular expression: {error}") from None
    return Scrub(spec, pattern, replacement)


def rejected_by(filters: list[Filter], document: Iterable[str]) -> str:
    """The spec of the first filter that drops a document; "" if none does, or if the document is empty.

    `document`: the text in parts. Raises UserError if a user's function raises.
    """
    if not filters:
        return ""
    start, length = head(document)
    if not length:  # empty documents are counted as empty, not as dropped
        return ""
    for filter_ in filters:
        if filter_.name == "length":
            keep = filter_.arguments[0] <= length <= filter_.arguments[1]
        else:
            if filter_.name == "python" and length > WHOLE:
                raise UserError(f"--filter {filter_.spec}: needs a whole document, and one has more than {WHOLE:,} characters")
            keep = _predicate(filter_)(start if filter_.name != "python" else "".join(document))
        if not keep:
            return filter_.spec
    return ""


def head(document: Iterable[str]) -> tuple[str, int]:
    """(the first `HEAD` characters of a document, its length in characters)."""
    kept, length = [], 0
    for part in document:
        if length < HEAD:
            kept.append(part[: HEAD - length])
        length += len(part)
    return "".join(kept), length


@functools.lru_cache(maxsize=64)  # each filter is made once per worker
def _predicate(filter_: Filter) -> Callable[[str], bool]:
    if filter_.name == "repetition":
        return _is_varied
    if filter_.name == "language":
        return functools.partial(_is_in_language, *filter_.arguments)
    if filter_.name == "fasttext":
        path, label, least = filter_.arguments
        return functools.partial(_has_label, _fasttext(path), _label(label), least)
    where, function = filter_.arguments
    try:
        if filter_.content:
            names = {"__name__": Path(where).stem, "__file__": where}
            exec(compile(filter_.content, where, "exec"), names)
            call = names[function]
        else:
            call = getattr(importlib.import_module(where), function)
    except (KeyError, AttributeError):
        raise UserError(f"--filter {filter_.spec}: {where} has no function {function}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"--filter {filter_.spec}: {where} cannot be run: {type(error).__name__}: {error}") from None
    if not callable(call):
        raise UserError(f"--filter {filter_.spec}: {function} of {where} is not a function")

    def guarded(text: str) -> bool:
        try:
            return bool(call(text))
        except (Exception, SystemExit) as error:
            failure = f"{type(error).__name__}: {error}"
            raise UserError(f"--filter {filter_.spec}: {failure}, for the text that begins with {text[:40]!r}") from None

    return guarded


def _is_varied(text: str) -> bool:
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    counts = Counter(lines)
    if len(lines) - len(counts) > LINES * len(lines):
        return False
    repeated = sum(len(line) * (n - 1) for line, n in counts.items() if n > 1)
    if repeated > LINE_CHARACTERS * sum(map(len, lines)):
        return False
    words = text.split()
    total = sum(map(len, words))
    for n, most in TOP_NGRAM.items():
        grams = Counter(zip(*(itertools.islice(words, i, None) for i in range(n)), strict=False))
        # if several n-grams are the most frequent, the longest of them counts
        times = max(grams.values(), default=1)
        if times > 1 and times * max(sum(map(len, gram)) for gram, k in grams.items() if k == times) > most * total:
            return False
    return True


# CLD2 takes only what it calls interchange-valid: neither control characters nor noncharacters
_NONE = "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
_NO_TEXT = re.compile(f"[\0-\x08\x0b\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef{_NONE}]")


def _is_in_language(code: str, least: float, text: str) -> bool:
    _, _, detected = _cld2().detect(_NO_TEXT.sub(" ", text[:SAMPLE]).encode(), isPlainText=True, bestEffort=True)
    return any(code == known and percent >= 100 * least for _, known, percent, _ in detected)


def _cld2():
    try:
        import pycld2
    except ImportError:
        raise UserError("--filter language: needs CLD2: pip install pycld2") from None
    return pycld2


def _has_label(model: object, label: str, least: float, text: str) -> bool:
    labels, probabilities = model.predict(text.replace("\n", " "), k=-1)  # fastText reads one line
    return bool(dict(zip(labels, probabilities, strict=True)).get(label, 0) >= least)


def _label(name: str) -> str:
    return name if name.startswith("__label__") else f"__label__{name}"


@functools.lru_cache(maxsize=4)
def _fasttext(path: str) -> object:
    try:
        import fasttext
    except ImportError:
        raise UserError("--filter fasttext: needs fastText: pip install fasttext-predict") from None
    try:
        model = fasttext.load_model(path)
        model.predict("", k=-1)
        return model
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--filter fasttext: {path}: is not a fastText classifier: {error}") from None


def chunks(document: Iterable[str]) -> Iterator[str]:
    """Cuts a document into chunks of `CHUNK` characters and the remainder of their last line, wherever its own parts end.

    If that remainder is longer than `LONGEST`, it is cut at a space, if there is one.
    """
    waiting = ""
    for part in document:
        waiting, at = waiting + part, 0
        while len(waiting) - at > CHUNK and (cut := _cut(waiting, at + CHUNK)):
            yield waiting[at:cut]
            at = cut
        waiting = waiting[at:]
    if waiting:
        yield waiting


def _cut(text: str, begin: int) -> int:
    """Where to end a chunk, at `begin` or later; 0 if that depends on text that follows `text`."""
    end = begin + LONGEST
    line_end = text.find("\n", begin, end) + 1
    if line_end or len(text) < end:
        return line_end
    return text.rfind(" ", begin, end) + 1 or end


def scrubbed(scrubs: list[Scrub], document: Iterable[str], counts: Counter) -> Iterator[str]:
    """The document with every match replaced; counts replacements by name."""
    for text in chunks(document):
        for scrub in scrubs:
            text, n = _replace(scrub, text)
            counts[scrub.name] += n
        yield text


def _replace(scrub: Scrub, text: str) -> tuple[str, int]:
    if scrub.keep is None:
        return re.subn(scrub.pattern, scrub.replacement.replace("\\", r"\\"), text)
    n = 0

    def replacement(match: re.Match) -> str:
        nonlocal n
        if scrub.keep(text[max(match.start() - 24, 0) : match.start()], match[0]):
            return match[0]
        n += 1
        return scrub.replacement

    return re.sub(scrub.pattern, replacement, text), n


def _is_no_users_ip(before: str, address: str) -> bool:
    """Whether an address is private, reserved or impossible, or is a version number, by the text before it."""
    try:
        public = ipaddress.ip_address(address).is_global
    except ValueError:
        return True
    return not public or bool(_VERSION.search(before))


_VERSION = re.compile(r"(?i)(?:\b(?:v|ver|versions?|release|rev|build|section)|[=<>~!]=)[\s.:='\"(]*$|\w[-_/@^]$")
SCRUBS = {
    # begins where a word begins, so that a long run of letters is searched only once
    "email": (
        r"(?<![\w.%+-])[\w%+-][\w.%+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w@-])",
        "<EMAIL>",
    ),
    "ip": (
        r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)|(?<![\w:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?<!:)(?![\w:])",
        "<IP_ADDRESS>",
        _is_no_users_ip,
    ),
    # +49 30 1234567, (555) 234-5678, 555-234-5678; not a bare row of digits, which is usually something else
    "phone": (
        r"(?<![\w+.-])(?:\+(?=[1-9](?:[ ().-]{0,2}\d){7})\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){1,2}(?:[ .-]?\d{2,4}){1,4}"
        r"|(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4})(?![\w-]|\.\d)",
        "<PHONE>",
    ),
}
SCRUBS = {name: Scrub(name, *how) for name, how in SCRUBS.items()}
