"""The state that a run starts from: its newest checkpoint, the weights of `init.from`, or a random initialisation."""

import dataclasses
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from tinyllama_jax.base import store
from tinyllama_jax.base.config import Config, Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import exists
from tinyllama_jax.core.program import Program
from tinyllama_jax.core.step import TrainState
from tinyllama_jax.data import feed, tokenizer
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.data.export import added_tokens, gguf_tokenizer
from tinyllama_jax.hub import gguf, peft
from tinyllama_jax.run import checkpoint, metrics, seals
from tinyllama_jax.run import folder as run_folder

READ_AGAIN = 1 << 22  # tokens of the last batches, read again on resume: a second or two from a disk


def find_origin(config: Config, sources: list[Blocks]) -> tuple[Config, Path | None, list[str]]:
    """(`config` with `init.step` filled in, the folder of `init.from` or None, lines to print).

    A run with a checkpoint of its own has no origin. Raises UserError if the origin does not fit `config`.
    """
    origin, notes = (None, []) if seals.steps_in(config.folder) else check_origin(config, sources)
    return resolved(config, origin), origin, notes


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


class Origin(NamedTuple):
    """What a run folder, a Hugging Face folder or a GGUF file holds besides its weights."""

    model: Model
    tokenizer: tokenizer.Tokenizer
    begin_with_bos: bool  # whether each text begins with bos
    rows: int  # of the vocabulary, that have a token in the weights' own tokenizer


def read_origin(path: Path, scratch: Path, added: str = "") -> Origin:
    """Reads the description of `init.from`. `added`: see `model.added_tokens`; the model then has rows for them, 64 x n.

    `scratch`: an empty folder, where files of the tokenizer may lie. Raises UserError.
    """
    folder = path
    if (path / "checkpoints").is_dir():
        model, tokens = checkpoint.load_config(path).model, tokenizer.load(path / "tokenizer")
    elif gguf.is_gguf(path):
        folder, whole = scratch, gguf.read(path)
        model, tokens = whole.model, gguf_tokenizer.from_gguf(whole.metadata, folder, str(path))
    else:
        gguf.check_named(path, "--init.from")
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UserError(f"--init.from={path}: is neither a run folder, a Hugging Face folder nor a GGUF file")
        folder = peft.with_tokenizer(path)
        model, tokens = peft.load_model(path), tokenizer.load(folder)
    rows, begin_with_bos = tokens.vocab_size, tokenizer.documents_begin_with_bos(folder)
    tokens = added_tokens.extended(tokens, added, scratch / "added")
    if tokens.vocab_size > rows:
        model = dataclasses.replace(model, vocab_size=max(model.vocab_size, -(-tokens.vocab_size // 64) * 64))
    return Origin(model, tokens, begin_with_bos, rows)


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
    with tempfile.TemporaryDirectory() as scratch:
        model, tokens, _, rows = read_origin(origin, Path(scratch), config.model.added_tokens)
    notes = run_folder.check_same_model(config.model, model, str(origin))
    if config.model.seq_len > model.seq_len:
        what = f"{origin} was trained at {model.seq_len:,} tokens, and positions beyond have yet to be learned"
        notes.append(f"model.seq_len={config.model.seq_len}: {what}; --model.seq_len={model.seq_len} keeps to its own")
    if tokens.sha256 != sources[0].tokenizer_sha256:
        raise UserError(f"--init.from={origin}: its tokenizer is not the one that the data were prepared with")
    if tokens.vocab_size > rows and init.state != "weights":
        raise UserError(f"--init.state={init.state}: with new rows for model.added_tokens only the weights can be taken over")
    if tokens.vocab_size > rows and config.lora.rank:
        what = "the rows of new tokens are not part of any adapter, and would not be trained"
        raise UserError(f"--model.added_tokens={config.model.added_tokens}: {what}; leave it empty, or set --lora.rank=0")
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


def resolved(config: Config, origin: Path | None) -> Config:
    """`config` with `init.step` filled in, so that a run killed early starts again from that step of its origin.

    A run with a checkpoint of its own keeps all that is recorded of its origin.
    """
    recorded = exists(config.folder / "config.json")
    before = checkpoint.load_config(config.folder).init if recorded else config.init
    if seals.steps_in(config.folder):
        return dataclasses.replace(config, init=dataclasses.replace(before, start_over=config.init.start_over))
    if not origin or config.init.step or not (origin / "checkpoints").is_dir():
        return config
    step = before.step if before.from_ == config.init.from_ and before.step else _step(config)
    return dataclasses.replace(config, init=dataclasses.replace(config.init, step=step))


def _step(config: Config) -> int:
    return checkpoint.find_step(config.init.from_, config.init.step or None, "--init.step=")


def initial_state(config: Config, program: Program, origin: Path | None) -> tuple[TrainState, str]:
    """(the state that a run begins with, a description of its origin): random, or from `origin` as `init.state` asks."""
    if origin is None:
        return program.init(), f"from scratch (init {config.model.init}, seed {config.train.seed})"
    is_run, source = (origin / "checkpoints").is_dir(), f"{origin} (Hugging Face)"
    if is_run:
        step = _step(config)
        source = f"step {step:,} of {origin}"
    if is_run and not config.model.added_tokens:
        if config.init.state == "weights":
            return program.start(checkpoint.restore_params(origin, step, program.weights)), f"{source}, weights only"
        state = checkpoint.restore_state(origin, step, program.state)
        if config.init.state == "all":
            return state, f"{source}, which continues here"
        first = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), (state.step, state.skipped))
        return dataclasses.replace(state, step=first[0], skipped=first[1]), f"{source}, weights and moments"
    if is_run:
        params, *_ = checkpoint.load_params(origin, step)
    elif gguf.is_gguf(origin):
        (params, *_), source = gguf.load(origin), f"{origin} (GGUF)"
    else:
        params, _ = peft.load_folder(origin)
    params, more = _with_rows(params, origin, config)
    params = jax.tree.map(lambda a, s: jax.device_put(np.asarray(a, s.dtype), s.sharding), params, program.weights)
    return program.start(params), f"{source}, weights only{more}"


def _with_rows(params: dict, origin: Path, config: Config) -> tuple[dict, str]:
    """(`params` with rows for `model.added_tokens`, words about them): each is the mean of the old ones, as in the original."""
    with tempfile.TemporaryDirectory() as scratch:
        model, tokens, _, rows = read_origin(origin, Path(scratch), config.model.added_tokens)
    if tokens.vocab_size == rows:
        return params, ""
    grown = lambda table: np.concatenate([table[:rows], np.tile(table[:rows].mean(0), (model.vocab_size - rows, 1))])
    embedding, head = params["embed"]["embedding"], params["lm_head"]["kernel"]
    params = params | {"embed": {"embedding": grown(embedding)}, "lm_head": {"kernel": grown(head.T).T}}
    return params, f", with {tokens.vocab_size - rows} new tokens in {model.vocab_size:,} rows"


# -- the data of a resumed run ----------------------------------------------------------------------------------------------


def check_batches(config: Config, sources: list[Blocks], step: int) -> list[str]:
    """Compares the last recorded batches up to `step` with their checksums: 3, or up to 64 if they have few tokens.

    Returns a line on the result. Raises UserError if a checksum differs.
    """
    run, data_order, checked = config.workdir, feed.order(config, sources), 0
    rows = [row for row in metrics.tail(config.folder) if "checksum" in row and 1 <= row["step"] <= step]
    for row in reversed(rows[-64:]):
        source, block = data_order.at(row["step"])
        if checked >= 3 and (checked + 1) * len(block) * config.model.seq_len > READ_AGAIN:
            break
        checksum = feed.checksum(feed.gather(sources, source, block))
        if checksum != row["checksum"]:
            files = {sources[j].place(b)[0] for j, b in zip(source.tolist(), block.tolist(), strict=True)}
            newest = max(files, key=store.modified_ns)
            what = f"its batch is not the one that the run in {run} was trained on ({row['checksum']}, and now {checksum})"
            remedy = f"put the old one back, or start another run with --workdir=NEW --init.from={run}"
            cause = f"a data file has changed, probably {newest}, the newest of them"
            raise UserError(f"step {row['step']:,}: {what}; {cause}: {remedy}")
        checked += 1
    if step and not checked:
        return [f"{run}/metrics.jsonl records none of the steps up to {step:,}: whether the data are the same was not checked"]
    return [f"the last {checked} recorded batches are as they were"] if checked else []
