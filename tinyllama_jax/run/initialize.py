"""The state that a run starts from: its newest checkpoint, the weights of `init.from`, or a random initialisation."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import exists
from tinyllama_jax.core.program import Program
from tinyllama_jax.core.step import TrainState
from tinyllama_jax.data import feed, tokenizer
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.hub import peft
from tinyllama_jax.run import checkpoint, metrics, seals
from tinyllama_jax.run import folder as run_folder

READ_AGAIN = 1 << 22  # tokens of the last batches, read again on resume: a second or two from a disk


def find_origin(config: Config, sources: list[Blocks]) -> tuple[Config, Path | None, list[str]]:
    """(`config` with `init.step` filled in, the folder of `init.from` or None, lines to print).

    A run with a checkpoint of its own has no origin. Raises UserError if the origin does not fit `config`.
    """
    origin, notes = (None, []) if seals.steps_in(config.workdir) else check_origin(config, sources)
    return _resolved(config, origin), origin, notes


def restore_or_initialize(
    checkpoints: checkpoint.Checkpoints, config: Config, program: Program, origin: Path | None
) -> tuple[TrainState, str]:
    """The state to start from, of the newest checkpoint if there is one, and a description of its origin."""
    if (newest := checkpoints.latest()) is None:
        return initial_state(config, program, origin)
    return checkpoints.restore(newest, program.state), f"step {newest:,} of {config.workdir}"


def described(sources: list[Blocks]) -> list[dict]:
    """The fields of sources in data.json besides path and weight."""
    return [{"manifest_sha256": s.manifest_sha256, "bos": s.manifest["bos"], "sha256": s.sha256} for s in sources]


def first_step(config: Config) -> int:
    """The step after which a run without a checkpoint of its own begins: 0, or the step at which it was forked."""
    return _step(config) if config.init.state == "all" else 0


def check_origin(config: Config, sources: list[Blocks]) -> tuple[Path | None, list[str]]:
    """(the folder of `init.from` or None, lines to print). Raises UserError if it does not fit `config`."""
    if not config.init.from_:
        if config.lora.rank:
            raise UserError(f"--lora.rank={config.lora.rank}: adapters need trained weights; add --init.from=RUN_OR_FOLDER")
        return None, []
    origin, init = Path(config.init.from_), config.init
    is_run = (origin / "checkpoints").is_dir()
    if not is_run and (init.step or init.state != "weights"):
        key, value = ("step", init.step) if init.step else ("state", init.state)
        raise UserError(f"--init.{key}={value}: {origin} is no run folder, and has weights only")
    model = checkpoint.load_config(origin).model if is_run else peft.load_model(origin)
    notes = run_folder.check_same_model(config.model, model, str(origin))
    if tokenizer.load(origin / "tokenizer" if is_run else peft.with_tokenizer(origin)).sha256 != sources[0].tokenizer_sha256:
        raise UserError(f"--init.from={origin}: its tokenizer is not the one that the data were prepared with")
    if init.state != "weights":
        step = _step(config)
        if not (origin / "checkpoints" / str(step) / "train").is_dir():
            what = f"{origin} was imported without AdamW's moments"
            raise UserError(f"--init.state={init.state}: {what}; use --init.state=weights")
        if (lora := checkpoint.load_config(origin).lora) != config.lora:
            what = f"{origin} has {lora}, and this run {config.lora}, so AdamW's moments are of other arrays"
            raise UserError(f"--init.state={init.state}: {what}; use --init.state=weights")
    if init.state == "all":
        if step > config.train.steps:
            raise UserError(f"--init.state=all: step {step:,} of {origin} is more than train.steps={config.train.steps:,}")
        if what := run_folder.other_past(origin, step, config, described(sources)):
            remedy = "give this one the same past, or start with --init.state=moments"
            raise UserError(f"--init.state=all: until step {step:,} the run in {origin} was another ({what}); {remedy}")
        notes += run_folder.changed(checkpoint.load_config(origin), config, f"the run in {origin}")
    return origin, notes


def _resolved(config: Config, origin: Path | None) -> Config:
    """`config` with `init.step` filled in, so that a run killed early starts again from that step of its origin."""
    if not origin or config.init.step or not (origin / "checkpoints").is_dir():
        return config
    recorded = exists(Path(config.workdir) / "config.json")
    before = checkpoint.load_config(config.workdir).init if recorded else config.init
    step = before.step if before.from_ == config.init.from_ and before.step else _step(config)
    return dataclasses.replace(config, init=dataclasses.replace(config.init, step=step))


def _step(config: Config) -> int:
    return checkpoint.find_step(config.init.from_, config.init.step or None, "--init.step=")


def initial_state(config: Config, program: Program, origin: Path | None) -> tuple[TrainState, str]:
    """(the state that a run begins with, a description of its origin): random, or from `origin` as `init.state` asks."""
    if origin is None:
        return program.init(), f"from scratch (init {config.model.init}, seed {config.train.seed})"
    if (origin / "checkpoints").is_dir():
        step = _step(config)
        source = f"step {step:,} of {origin}"
        if config.init.state == "weights":
            return program.start(checkpoint.restore_params(origin, step, program.weights)), f"{source}, weights only"
        state = checkpoint.restore_state(origin, step, program.state)
        if config.init.state == "all":
            return state, f"{source}, which continues here"
        first = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), (state.step, state.skipped))
        return dataclasses.replace(state, step=first[0], skipped=first[1]), f"{source}, weights and moments"
    params, _ = peft.load_folder(origin)
    params = jax.tree.map(lambda a, s: jax.device_put(np.asarray(a, s.dtype), s.sharding), params, program.weights)
    return program.start(params), f"{origin} (Hugging Face)"


# -- the data of a resumed run ----------------------------------------------------------------------------------------------


def check_batches(config: Config, sources: list[Blocks], step: int) -> list[str]:
    """Compares the last recorded batches up to `step` with their checksums: 3, or up to 64 if they have few tokens.

    Returns a line on the result. Raises UserError if a checksum differs.
    """
    run, data_order, checked = config.workdir, feed.order(config, sources), 0
    rows = [row for row in metrics.tail(run) if "checksum" in row and 1 <= row["step"] <= step]
    for row in reversed(rows[-64:]):
        source, block = data_order.at(row["step"])
        if checked >= 3 and (checked + 1) * len(block) * config.model.seq_len > READ_AGAIN:
            break
        checksum = feed.checksum(feed.gather(sources, source, block))
        if checksum != row["checksum"]:
            files = {sources[j].place(b)[0] for j, b in zip(source.tolist(), block.tolist(), strict=True)}
            newest = max(files, key=lambda file: file.stat().st_mtime)
            what = f"its batch is not the one that the run in {run} was trained on ({row['checksum']}, and now {checksum})"
            remedy = f"put the old one back, or start another run with --workdir=NEW --init.from={run}"
            cause = f"a data file has changed, probably {newest}, the newest of them"
            raise UserError(f"step {row['step']:,}: {what}; {cause}: {remedy}")
        checked += 1
    if step and not checked:
        return [f"{run}/metrics.jsonl records none of the steps up to {step:,}: whether the data are the same was not checked"]
    return [f"the last {checked} recorded batches are as they were"] if checked else []
