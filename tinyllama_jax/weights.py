"""What a run begins with when it has no checkpoint of its own: the weights of `init.from`, or fresh ones."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from tinyllama_jax import checkpoint, hf
from tinyllama_jax.config import Config, UserError
from tinyllama_jax.data import tokenizer
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.step import Program, TrainState


def check_origin(config: Config, sources: list[Blocks]) -> tuple[Path | None, list[str]]:
    """The folder of `init.from`, or None if there is none; and what to say of it. Raises UserError if it does not fit."""
    if not config.init.from_:
        return None, []
    origin = Path(config.init.from_)
    is_run = (origin / "checkpoints").is_dir()
    theirs = checkpoint.load_config(origin).model if is_run else hf.load_model(origin)
    notes = checkpoint.check_same_model(config.model, theirs, str(origin))
    if tokenizer.load(origin / "tokenizer" if is_run else origin).sha256 != sources[0].tokenizer_sha256:
        raise UserError(f"--init.from={origin}: its tokenizer is not the one that the data were prepared with")
    return origin, notes


def initial_state(config: Config, program: Program, origin: Path | None) -> tuple[TrainState, str]:
    """The state before step 1, and where it is from: `origin`, of which it has the weights only, or scratch."""
    if origin is None:
        return program.init(), f"from scratch (init {config.model.init}, seed {config.train.seed})"
    if (origin / "checkpoints").is_dir():
        params, step = checkpoint.restore_params(origin, program.state.params)
        return program.start(params), f"step {step:,} of {origin}, weights only"
    params, _ = hf.load_folder(origin)
    params = jax.tree.map(lambda a, s: jax.device_put(np.asarray(a, s.dtype), s.sharding), params, program.state.params)
    return program.start(params), f"{origin} (Hugging Face)"
