"""The command line: `--config FILE --section.key=value ...`. Reads config files and writes the help of every key."""

import argparse
import dataclasses
import difflib
import inspect
import re
import runpy
import sys
import traceback
import typing
from pathlib import Path

from tinyllama_jax.base import config as config_lib
from tinyllama_jax.base import mixture_weights
from tinyllama_jax.base.config import Config, Data, from_json, keys
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import open_regular
from tinyllama_jax.base.values import KINDS, check, shown

LARGEST = 1 << 20  # bytes of a config file
INSTALLED = Path(__file__).parents[1] / "configs"  # of a wheel; a checkout has them beside the package


def _parse(key: str, text: str, kind: type) -> object:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if typing.get_origin(kind) is dict:  # DIR:WEIGHT,DIR:WEIGHT; a single DIR needs no weight
            weighted = lambda part: not part.rpartition(":")[2].startswith("//")  # the colon of a URL
            parts = [
                part.rpartition(":") if ":" in part and weighted(part) else (part, ":", "1") for part in text.split(",") if part
            ]
            sources = {path: _weight(key, text, path, weight) for path, _, weight in parts}
            check(len(sources) == len(parts), key, text, "names a folder twice; add up its weights")
            return sources
        return kind(text)
    except (ValueError, KeyError, ArithmeticError) as error:
        what = str(error) if isinstance(error, OverflowError) else f"must be {KINDS[kind]}"
        raise UserError(f"--{key}={shown(text)}: {what}") from None


def _weight(key: str, text: str, path: str, weight: str) -> mixture_weights.Weight:
    try:
        return mixture_weights.parse(weight)
    except OverflowError:
        raise
    except (ValueError, ArithmeticError):
        what = f"{shown(weight)} is no weight for {shown(path)}; it must be {KINDS[keys()[key]]}"
        raise UserError(f"--{key}={shown(text)}: {what}") from None


def override(config: Config, arguments: dict[str, str]) -> Config:
    """Returns `config` with `{"section.key": "text"}` applied. Raises UserError for an unknown key, wrong type or bad value."""
    known = keys()
    if "train.steps" in arguments:  # what is typed wins over the config's epochs
        arguments = {"train.epochs": "0", **arguments}
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
    """Returns the config of a command line `--config FILE --section.key=value ...`. Raises UserError."""
    parser = Parser(usage="%(prog)s --config FILE [--section.key=value ...]", description=description, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="a file such as configs/demo.py, or RUN/config.json")
    if {"-h", "--help"} & set(argv):  # the keys are shown here, and parsed by `override`
        group = parser.add_argument_group("keys of the config, each an option", "in parentheses: the default of the key")
        for key, line in key_lines().items():
            group.add_argument(f"--{key}", metavar="VALUE", help=line.replace("%", "%%"))
    args, overrides = parser.parse_known_args(argv)
    return override(read(args.config), pairs(overrides))


# keys without a comment beside their field
LINES = {
    "workdir": "folder of the run",
    "model.n_layers": "layers (L)",
    "model.d_model": "width of the model (D)",
    "model.n_heads": "query heads (N)",
    "model.d_ff": "width of the feed-forward layer (F)",
    "model.rope_theta": "base of the rotary positions",
    "model.norm_eps": "added to the mean square in RMSNorm",
    "optim.peak_lr": "learning rate at the end of the warm-up",
    "optim.warmup_steps": "steps in which the learning rate rises linearly from 0",
    "optim.weight_decay": "AdamW's decoupled weight decay",
    "optim.clip_norm": "largest norm of the gradient; a larger gradient is scaled down to it; inf: no clipping",
    "optim.b1": "AdamW's decay of the first moment",
    "optim.b2": "AdamW's decay of the second moment",
    "optim.eps": "AdamW's epsilon",
    "optim.cooldown_lr": "learning rate at the end of a linear cool-down",
    "train.steps": "optimizer steps of the run",
    "train.seed": "seed of the initial weights and of the order of the data",
    "checkpoint.every": "steps between checkpoints",
    "mesh.data": "devices along `data`, which hold replicas; -1: all that the other axes leave",
    "mesh.fsdp": "devices along `fsdp`, over which parameters and optimizer state are sharded; -1 as above",
    "mesh.tensor": "devices along `tensor`, over which heads and feed-forward layers are split; -1 as above",
}


def key_lines() -> dict[str, str]:
    """Returns one line of help for every key: the comment beside its field in config.py, or above it, and its default."""
    out = {}
    for path in keys():
        section, _, name = path.rpartition(".")
        hints = typing.get_type_hints(Config)
        owner = hints[section] if section else Config
        field = next(f for f in dataclasses.fields(owner) if f.name.rstrip("_") == name)
        line = _comment(owner, field.name) or LINES[path]
        # a comment may refer to a tuple of choices in config.py, such as REMAT
        line = re.sub(r"see ([A-Z]+)\b", lambda match: ", ".join(getattr(config_lib, match[1])), line)
        required = field.default is dataclasses.MISSING
        default = "set by the config" if required else "empty" if field.default == "" else str(field.default)
        out[path] = f"{line} ({default.lower() if keys()[path] is bool else default})"
    return out


def _comment(owner: type, name: str) -> str:
    """Returns the comment at the end of a field's line, or else the comment lines above it."""
    above: list[str] = []
    for line in inspect.getsource(owner).splitlines():
        code, _, comment = line.partition("  # ") if not line.lstrip().startswith("#") else ("", "", line.strip(" #"))
        if re.match(rf"    {name}: ", code):
            return comment or " ".join(above)
        above = [*above, comment] if comment and not code else []
    return ""


def pairs(arguments: list[str]) -> dict[str, str]:
    """Returns `{"a.b": "c", "d": "e"}` for `["--a.b=c", "--d", "e"]`. Raises UserError for a word that is no option."""
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
    """Returns `arguments` with a --data.skip that adds the steps `first` to `last` to those that `data` skips already."""
    pairs = zip(["", *arguments], arguments, strict=False)  # each word with the one before it
    others = [word for before, word in pairs if "--data.skip" not in (before, word.partition("=")[0])]
    skip = f"{data.skip},{first}:{last}".removeprefix(",")
    return [*others, f"--data.skip={skip}"]


def read(path: str) -> Config:
    """Returns the `config` that the Python file at `path` defines, or a run folder's config.json. Raises UserError.

    configs/NAME.py, in a folder that has none, is the one that was installed with the package; a line says so.
    """
    if (installed := _installed_config(path)) is not None:
        print(f"--config={path}: {installed}", file=sys.stderr)
        path = str(installed)
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


def _installed_config(path: str) -> Path | None:
    wanted = Path(path)
    own = INSTALLED / wanted.name
    return own if wanted.parent == Path("configs") and not wanted.parent.exists() and own.is_file() else None


def _nearby_configs(path: str) -> str:
    folder = Path(path).parent
    held_in = INSTALLED if folder == Path("configs") and not folder.exists() else folder
    names = sorted(str(folder / p.name) for p in held_in.glob("[!_]*.py")) if held_in.is_dir() else []
    near = difflib.get_close_matches(path, names, 1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}" if names else ""


def time_left(seconds: float) -> str:
    """Returns a duration in a suitable unit: 3.2 days, 5.1 h, 12 min, under a minute."""
    for unit, size in (("days", 86_400), ("h", 3_600)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else "under a minute"
