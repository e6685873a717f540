"""The command line: `--config FILE --section.key=value ...`; config files are read here."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import runpy
import traceback
import typing
from fractions import Fraction
from pathlib import Path

from tinyllama_jax.config import KINDS, Config, Data, Weight, from_json, keys
from tinyllama_jax.errors import UserError


def _parse(key: str, text: str, kind: type) -> object:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if typing.get_origin(kind) is dict:  # DIR:WEIGHT,DIR:WEIGHT; a single DIR needs no weight
            parts = [part.rpartition(":") if ":" in part else (part, ":", "1") for part in text.split(",") if part]
            paths = [path for path, _, _ in parts]
            if len(set(paths)) < len(paths):
                raise UserError(f"--{key}={text}: names a folder twice; add up its weights")
            return {path: _parse_weight(weight) for path, _, weight in parts}
        value = kind(text)
        if kind is float and not math.isfinite(value) and key != "optim.clip_norm":
            raise ValueError
        return value
    except (ValueError, KeyError, ArithmeticError):
        wanted = KINDS.get(kind, "DIR:WEIGHT,DIR:WEIGHT (or WEIGHT@TOKENS..WEIGHT@TOKENS)")
        raise UserError(f"--{key}={text}: must be {wanted}") from None


def _parse_weight(text: str) -> Weight:
    number = lambda text: float(Fraction(text))  # a Fraction is finite
    if "@" not in text:
        return number(text)
    return tuple((number(tokens), number(weight)) for weight, tokens in (knot.split("@") for knot in text.split("..")))


def override(config: Config, arguments: dict[str, str]) -> Config:
    """`config` with `{"section.key": "text"}` applied. Raises UserError on an unknown key, a wrong type, a bad value."""
    known = keys()
    changes: dict[str, dict[str, object]] = {}
    for key, text in arguments.items():
        if key not in known:
            tail = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
            close = [difflib.get_close_matches(key, known, 1, cutoff) for cutoff in (0.95, 0.5)]
            near = (close[0] or tail or close[1] or [""])[0]
            raise UserError(f"--{key}={text}: no such key" + (f"; did you mean --{near}?" if near else "; see --help"))
        section, _, name = key.rpartition(".")
        field_name = name + "_" if (section, name) == ("init", "from") else name
        changes.setdefault(section, {})[field_name] = _parse(key, text, known[key])
    top = changes.pop("", {})
    return dataclasses.replace(config, **top, **{s: dataclasses.replace(getattr(config, s), **c) for s, c in changes.items()})


def load(argv: list[str], description: str = "") -> Config:
    """The config of a command line: `--config FILE --section.key=value ...`. Raises UserError."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, epilog="keys: " + " ".join(f"--{k}" for k in keys())
    )
    parser.add_argument("--config", required=True, help="a file such as configs/demo.py")
    known, rest = parser.parse_known_args(argv)
    return override(read(known.config), pairs(rest))


def pairs(arguments: list[str]) -> dict[str, str]:
    """`["--a.b=c", "--d", "e"]` -> `{"a.b": "c", "d": "e"}`. Raises UserError on what is neither."""
    out, words = {}, list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word}: an option is written --section.key=value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"{word}: has no value; an option is written --section.key=value")
            value = words.pop(0)
        out[key] = value
    return out


def skipping(arguments: list[str], data: Data, first: int, last: int) -> list[str]:
    """`arguments` with the batches of the steps `first` to `last` left out, besides those that `data` leaves out already."""
    pairs = zip(["", *arguments], arguments, strict=False)  # each word with the one before it
    rest = [word for before, word in pairs if "--data.skip" not in (before, word.partition("=")[0])]
    skip = f"{data.skip},{first}:{last}".removeprefix(",")
    return [*rest, f"--data.skip={skip}"]


def read(path: str) -> Config:
    """The `config` that the Python file at `path` defines, or a run folder's config.json. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"--config={path}: no such file" + _nearby_configs(path))
    if path.endswith(".json"):
        return from_json(Path(path).read_bytes(), path)
    try:
        config = runpy.run_path(path).get("config")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever the user's Python raised, with the line in their file
        at = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else (at or ["?"])[-1]
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    if not isinstance(config, Config):
        raise UserError(f"{path}: defines no `config = Config(...)`")
    return config


def _nearby_configs(path: str) -> str:
    folder = Path(path).parent
    names = sorted(str(p) for p in folder.glob("*.py")) if folder.is_dir() else []
    near = difflib.get_close_matches(path, names, 1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}" if names else ""


def time_left(seconds: float) -> str:
    """In units that fit: 3.2 days, 5.1 h, 12 min; under a minute."""
    for unit, size in (("days", 86_400), ("h", 3_600)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else "under a minute"
