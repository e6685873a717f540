"""What a run starts from: its newest checkpoint, the weights of `init.from`, or fresh ones."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import typing
from pathlib import Path

import jax
import numpy as np

from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import decode_json
from tinyllama_jax.core.program import Program
from tinyllama_jax.core.step import TrainState
from tinyllama_jax.data import feed, tokenizer
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.hub import llama
from tinyllama_jax.run import checkpoint, seals
from tinyllama_jax.run import folder as run_folder

READ_AGAIN = 1 << 22  # tokens of the last batches, read again on resume: a second or two from a disk


def find_origin(config: Config, sources: list[Blocks]) -> tuple[Config, Path | None, list[str]]:
    """(`config` with `init.step` filled in, the folder of `init.from` or None, lines to print).

    A run that has a checkpoint of its own has no origin. Raises UserError if the origin does not fit `config`.
    """
    origin, notes = (None, []) if seals.steps_in(config.workdir) else _check_origin(config, sources)
    return _resolved(config, origin), origin, notes


def restore_or_initialize(
    checkpoints: checkpoint.Checkpoints, config: Config, program: Program, origin: Path | None
) -> tuple[TrainState, str]:
    """The state to start from: the newest checkpoint's if there is one; and where it comes from, in words."""
    if (newest := checkpoints.latest()) is None:
        return _initial_state(config, program, origin)
    return checkpoints.restore(newest, program.state), f"step {newest:,} of {config.workdir}"


def described(sources: list[Blocks]) -> list[dict]:
    """What data.json says of sources besides their paths and weights."""
    return [{"manifest_sha256": s.manifest_sha256, "bos": s.manifest["bos"], "sha256": s.sha256} for s in sources]


def first_step(config: Config) -> int:
    """The step that a run without a checkpoint of its own begins after: 0, or that of which it is a branch."""
    return _step(config) if config.init.state == "all" else 0


def _check_origin(config: Config, sources: list[Blocks]) -> tuple[Path | None, list[str]]:
    """The folder of `init.from`, or None if there is none; and what to say of it. Raises UserError if it does not fit."""
    if not config.init.from_:
        return None, []
    origin, init = Path(config.init.from_), config.init
    is_run = (origin / "checkpoints").is_dir()
    if not is_run and (init.step or init.state != "weights"):
        key, value = ("step", init.step) if init.step else ("state", init.state)
        raise UserError(f"--init.{key}={value}: {origin} is no run folder, and has weights only")
    theirs = checkpoint.load_config(origin).model if is_run else llama.load_model(origin)
    notes = run_folder.check_same_model(config.model, theirs, str(origin))
    if tokenizer.load(origin / "tokenizer" if is_run else origin).sha256 != sources[0].tokenizer_sha256:
        raise UserError(f"--init.from={origin}: its tokenizer is not the one that the data were prepared with")
    if init.state != "weights":
        step = _step(config)
        if not (origin / "checkpoints" / str(step) / "train").is_dir():
            raise UserError(
                f"--init.state={init.state}: {origin} was imported without AdamW's moments; take --init.state=weights"
            )
        if init.state == "all" and step > config.train.steps:
            raise UserError(f"--init.state=all: step {step:,} of {origin} is more than train.steps={config.train.steps:,}")
        if init.state == "all" and (what := run_folder.other_past(origin, step, config, described(sources))):
            raise UserError(
                f"--init.state=all: until step {step:,} the run in {origin} was another than this would have been ({what}); "
                "give this one the same past, or begin anew with --init.state=moments"
            )
        if init.state == "all":
            notes += run_folder.changed(checkpoint.load_config(origin), config, f"the run in {origin}")
    return origin, notes


def _resolved(config: Config, origin: Path | None) -> Config:
    """`config` with the step that it begins from said: killed early, it begins there again, whatever that run does then."""
    if not origin or config.init.step or not (origin / "checkpoints").is_dir():
        return config
    there = Path(config.workdir) / "config.json"
    before = checkpoint.load_config(config.workdir).init if there.is_file() else config.init
    step = before.step if before.from_ == config.init.from_ and before.step else _step(config)
    return dataclasses.replace(config, init=dataclasses.replace(config.init, step=step))


def _step(config: Config) -> int:
    return checkpoint.find_step(config.init.from_, config.init.step or None, "--init.step=")


def _initial_state(config: Config, program: Program, origin: Path | None) -> tuple[TrainState, str]:
    """The state that a run begins with, and where it is from: scratch, or what `init.state` says of `origin`."""
    if origin is None:
        return program.init(), f"from scratch (init {config.model.init}, seed {config.train.seed})"
    if (origin / "checkpoints").is_dir():
        step = _step(config)
        said = f"step {step:,} of {origin}"
        if config.init.state == "weights":
            return program.start(checkpoint.restore_params(origin, step, program.state.params)), f"{said}, weights only"
        state = checkpoint.restore_state(origin, step, program.state)
        if config.init.state == "all":
            return state, f"{said}, which continues here"
        first = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), (state.step, state.skipped))
        return dataclasses.replace(state, step=first[0], skipped=first[1]), f"{said}, weights and moments"
    params, _ = llama.load_folder(origin)
    params = jax.tree.map(lambda a, s: jax.device_put(np.asarray(a, s.dtype), s.sharding), params, program.state.params)
    return program.start(params), f"{origin} (Hugging Face)"


# -- the data of a resumed run ----------------------------------------------------------------------------------------------


class Line(typing.TypedDict):
    """The part of a line of metrics.jsonl that tells the batch of a step."""

    step: int
    checksum: int


def check_batches(config: Config, sources: list[Blocks], step: int) -> list[str]:
    """Reads the batches of the last recorded steps up to `step` again: 3, or up to 64 if they have few tokens.

    Returns a line that says so. Raises UserError if a checksum is not the recorded one.
    """
    path, checked, data_order = Path(config.workdir) / "metrics.jsonl", 0, feed.order(config, sources)
    lines = _recorded(path, step) if path.is_file() and step else []
    for line in reversed(lines[-64:]):
        source, block = data_order.at(line["step"])
        if checked >= 3 and (checked + 1) * len(block) * config.model.seq_len > READ_AGAIN:
            break
        checksum_now = feed.checksum(*feed.gather(sources, source, block))
        if checksum_now != line["checksum"]:
            places = {sources[j].place(b)[0] for j, b in zip(source.tolist(), block.tolist(), strict=True)}
            newest = max(places, key=lambda file: file.stat().st_mtime)
            raise UserError(
                f"step {line['step']:,}: its batch is not the one that the run in {config.workdir} was trained on (checksum "
                f"{line['checksum']}, and now {checksum_now}); a data file has changed, probably {newest}, the newest of them: "
                f"put the old one back, or start another run with --workdir=NEW --init.from={config.workdir}"
            )
        checked += 1
    if step and not checked:
        return [f"{path} records none of the steps up to {step:,}: whether the data are the same was not checked"]
    return [f"the last {checked} recorded batches are as they were"] if checked else []


def _recorded(path: Path, step: int) -> list[Line]:
    """The last lines of training steps up to `step` in a metrics file; a line cut short by a kill is left out."""
    lines = []
    with path.open("rb") as f:
        f.seek(max(f.seek(0, os.SEEK_END) - (1 << 23), 0))
        for text in f:
            with contextlib.suppress(ValueError):
                lines.append(decode_json(text, Line))
    return [line for line in lines if 1 <= line["step"] <= step]
