"""The command line: `--config FILE --section.key=value ...`; config files are read here."""

import argparse
import dataclasses
import difflib
import runpy
import traceback
import typing
from pathlib import Path

from tinyllama_jax.base import mixture_weights
from tinyllama_jax.base.config import Config, Data, from_json, keys
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import open_regular
from tinyllama_jax.base.values import KINDS, check, shown

LARGEST = 1 << 20  # bytes of a config file


def _parse(key: str, text: str, kind: type) -> object:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if typing.get_origin(kind) is dict:  # DIR:WEIGHT,DIR:WEIGHT; a single DIR needs no weight
            parts = [part.rpartition(":") if ":" in part else (part, ":", "1") for part in text.split(",") if part]
            sources = {path: mixture_weights.parse(weight) for path, _, weight in parts}
            check(len(sources) == len(parts), key, text, "names a folder twice; add up its weights")
            return sources
        return kind(text)
    except (ValueError, KeyError, ArithmeticError) as error:
        what = str(error) if isinstance(error, OverflowError) else f"must be {KINDS[kind]}"
        raise UserError(f"--{key}={shown(text)}: {what}") from None


def override(config: Config, arguments: dict[str, str]) -> Config:
    """`config` with `{"section.key": "text"}` applied. Raises UserError on an unknown key, a wrong type, a bad value."""
    known = keys()
    changes: dict[str, dict[str, object]] = {}
    for key, text in arguments.items():
        if key not in known:
            same_name = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
            close = [difflib.get_close_matches(key, known, 1, cutoff) for cutoff in (0.95, 0.5)]
            near = (close[0] or same_name or close[1] or [""])[0]
            raise UserError(f"--{key}={text}: no such key" + (f"; did you mean --{near}?" if near else "; see --help"))
        section, _, name = key.rpartition(".")
        field_name = name + "_" if (section, name) == ("init", "from") else name
        changes.setdefault(section, {})[field_name] = _parse(key, text, known[key])
    top = changes.pop("", {})
    try:
        sections = {s: dataclasses.replace(getattr(config, s), **c) for s, c in changes.items()}
        return dataclasses.replace(config, **top, **sections)
    except UserError as error:
        raise UserError(_as_typed(str(error), arguments)) from None


def _as_typed(message: str, arguments: dict[str, str]) -> str:
    """The message of an error in a value, with the value as the user typed it.

    If the value is the config's, the message names the arguments that do not go with it.
    """
    blamed, _, value = message.removeprefix("--").partition("=")
    if blamed in arguments:
        text = arguments[blamed]
        parsed = shown(_parse(blamed, text, keys()[blamed]))
        return f"--{blamed}={shown(text)}{value.removeprefix(parsed)}" if value.startswith(f"{parsed}: ") else message
    if blamed not in keys():
        return message
    given = [f"--{key}={text}" for key, text in arguments.items() if key in message] or [f"--{key}" for key in arguments]
    return f"{' '.join(given)}: does not go with the config's {message[2:]}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> typing.NoReturn:
        """Raises UserError instead of printing the usage and exiting."""
        raise UserError(f"{message}; see --help")


def load(argv: list[str], description: str = "") -> Config:
    """Reads the config that a command line gives: `--config FILE --section.key=value ...`. Raises UserError."""
    parser = Parser(description=description, allow_abbrev=False, epilog="keys: " + " ".join(f"--{k}" for k in keys()))
    parser.add_argument("--config", required=True, help="a file such as configs/demo.py")
    args, options = parser.parse_known_args(argv)
    return override(read(args.config), pairs(options))


def pairs(arguments: list[str]) -> dict[str, str]:
    """`["--a.b=c", "--d", "e"]` -> `{"a.b": "c", "d": "e"}`. Raises UserError on anything else."""
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
    """`arguments` with a --data.skip that adds the batches of the steps `first` to `last` to `data.skip`."""
    pairs = zip(["", *arguments], arguments, strict=False)  # each word with the one before it
    others = [word for before, word in pairs if "--data.skip" not in (before, word.partition("=")[0])]
    return [*others, "--data.skip=" + f"{data.skip},{first}:{last}".removeprefix(",")]


def read(path: str) -> Config:
    """Reads the `config` that the Python file at `path` defines, or a run folder's config.json. Raises UserError."""
    try:
        with open_regular(path) as f:
            text = f.read(LARGEST + 1)
    except (FileNotFoundError, ValueError):  # ValueError: a NUL character in the path
        raise UserError(f"--config={path}: no such file" + _nearby_configs(path)) from None
    if len(text) > LARGEST:
        raise UserError(f"--config={path}: has more than {LARGEST:,} bytes, too many for a config")
    if path.endswith(".json"):
        return from_json(text, path)
    try:
        config = runpy.run_path(path).get("config")
    except KeyboardInterrupt:
        raise
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(path) else f"{path}: {error}") from None
    except BaseException as error:  # whatever the user's Python raised, sys.exit() included
        at = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else (at or ["?"])[-1]
        why = " ".join(str(error).split())[:500]
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {why}") from None
    if not isinstance(config, Config):
        raise UserError(f"{path}: defines no `config = Config(...)`")
    return config


def _nearby_configs(path: str) -> str:
    folder = Path(path).parent
    names = sorted(str(p) for p in folder.glob("*.py")) if folder.is_dir() else []
    near = difflib.get_close_matches(path, names, 1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}" if names else ""


def time_left(seconds: float) -> str:
    """A duration in a unit that fits: 3.2 days, 5.1 h, 12 min, under a minute."""
    for unit, size in (("days", 86_400), ("h", 3_600)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else "under a minute"
