"""What a run begins with when it has no checkpoint of its own: the weights of `init.from`, or fresh ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from tinyllama_jax import checkpoint, hf, run_folder
from tinyllama_jax.config import Config
from tinyllama_jax.data import tokenizer
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.errors import UserError
from tinyllama_jax.step import Program, TrainState


def check_origin(config: Config, sources: list[Blocks]) -> tuple[Path | None, list[str]]:
    """The folder of `init.from`, or None if there is none; and what to say of it. Raises UserError if it does not fit."""
    if not config.init.from_:
        return None, []
    origin, init = Path(config.init.from_), config.init
    is_run = (origin / "checkpoints").is_dir()
    if not is_run and (init.step or init.state != "weights"):
        key, value = ("step", init.step) if init.step else ("state", init.state)
        raise UserError(f"--init.{key}={value}: {origin} is no run folder, and has weights only")
    theirs = checkpoint.load_config(origin).model if is_run else hf.load_model(origin)
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


def described(sources: list[Blocks]) -> list[dict]:
    """What data.json says of sources besides their paths and weights."""
    return [{"manifest_sha256": s.manifest_sha256, "bos": s.manifest["bos"], "sha256": s.sha256} for s in sources]


def first_step(config: Config) -> int:
    """The step that a run without a checkpoint of its own begins after: 0, or that of which it is a branch."""
    return _step(config) if config.init.state == "all" else 0


def resolved(config: Config, origin: Path | None) -> Config:
    """`config` with the step that it begins from said: killed early, it begins there again, whatever that run does then."""
    if not origin or config.init.step or not (origin / "checkpoints").is_dir():
        return config
    there = Path(config.workdir) / "config.json"
    before = checkpoint.load_config(config.workdir).init if there.is_file() else config.init
    step = before.step if before.from_ == config.init.from_ and before.step else _step(config)
    return dataclasses.replace(config, init=dataclasses.replace(config.init, step=step))


def _step(config: Config) -> int:
    return checkpoint.find_step(config.init.from_, config.init.step or None, "--init.step=")


def initial_state(config: Config, program: Program, origin: Path | None) -> tuple[TrainState, str]:
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
            return state, f"{said}, which goes on here"
        first = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), (state.step, state.skipped))
        return dataclasses.replace(state, step=first[0], skipped=first[1]), f"{said}, weights and moments"
    params, _ = hf.load_folder(origin)
    params = jax.tree.map(lambda a, s: jax.device_put(np.asarray(a, s.dtype), s.sharding), params, program.state.params)
    return program.start(params), f"{origin} (Hugging Face)"
