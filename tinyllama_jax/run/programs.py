"""Which compiled program trained which steps (RUN/programs.json): a resumed run says if its step compiles differently."""

import json
import typing

import jax

from tinyllama_jax.base import schedule
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.files import Count, exists, read_json, write
from tinyllama_jax.core import xla
from tinyllama_jax.core.program import CompiledStep


class Trained(typing.TypedDict):
    """A program in programs.json, with `xla.fingerprint` of what XLA was given and of what it made of it."""

    step: Count  # the first that it trained
    tokens: Count  # of each step
    source: str
    program: str


def compare(config: Config, step: int, program: CompiledStep) -> tuple[str, bool, list[Trained]]:
    """Compares `program` with the last one that trained steps of as many tokens before `step`. Raises UserError.

    Returns (a line, empty if there was none; whether XLA made another program of the same step; programs.json's new content).
    """
    file, train = config.folder / "programs.json", schedule.in_steps(config)
    known = read_json(file, list[Trained], "delete it: it only tells whether the program changes") if exists(file) else []
    known = [trained for trained in known if trained["step"] < step]
    tokens = train.tokens_after(step) - train.tokens_after(step - 1)
    own = Trained(step=step, tokens=tokens, source=program.source, program=xla.fingerprint(program.compiled))
    last = next((trained for trained in reversed(known) if trained["tokens"] == tokens), None)
    if last is None:
        return "", False, [*known, own]
    since = f"trained from step {last['step']:,} on"
    if own["source"] != last["source"]:
        return f"the step is not the one that {since}: settings, devices, versions or code changed", False, [*known, own]
    if not own["program"]:
        return f"it is not known whether the compiled step is the one that {since}: the compiler gives no text", False, known
    if own["program"] == last["program"]:
        return f"the compiled step ({own['program']}) is the one that {since}", False, known
    why = "RUN/compiled was deleted or is not whole, or XLA or its flags changed"
    line = f"XLA made another program of the same step ({own['program']}) than the one that {since} ({last['program']}): {why}"
    return f"{line}; losses may differ in the last bits", True, [*known, own]


def record(config: Config, step: int, resumed: bool, program: CompiledStep) -> tuple[str, bool]:
    """Records that `program` trains from `step` on. Returns (a line to print, or none; whether it compiled differently).

    `resumed`: whether `step` is the first after a start, and not the run's first. GPUs promise the same bits only under
    `train.deterministic`; with it, a line is printed even if nothing changed.
    """
    line, otherwise, known = compare(config, step, program)
    write(config.folder / "programs.json", json.dumps(known) + "\n")
    wanted = (otherwise or resumed) if config.train.deterministic else otherwise and jax.default_backend() != "gpu"
    return f"step {step:,}: {line}" if line and wanted else "", otherwise
