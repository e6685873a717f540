"""Writes the adapters of a run as a folder for Hugging Face's PEFT."""

import os
from pathlib import Path

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import lora
from tinyllama_jax.core.model import flatten
from tinyllama_jax.data.export import tokenizer
from tinyllama_jax.hub import llama, peft, tensor_files
from tinyllama_jax.run import checkpoint


def write(run: Path, folder: Path, step: int | None = None, allow_non_finite: bool = False) -> str:
    """Writes the adapters after `step` (the newest) and the tokenizer into `folder`; returns a line about them.

    The folder names the run's `init.from` as its base model; the line says so if PEFT cannot read that. Raises UserError.
    """
    if not (run / "checkpoints").is_dir() or not checkpoint.load_config(run).lora.rank:
        raise UserError(f"--checkpoint {run}: is no run with adapters (lora.rank); --format hf writes all weights")
    params, config, step = checkpoint.load_params(run, step, merge=False)
    for name, array in flatten(lora.split(params)[0]).items() if not allow_non_finite else ():
        tensor_files.check_finite(name, array, f"{run}, step {step:,}")
    base, line = Path(os.path.abspath(config.init.from_)), f"the adapters of step {step:,} of {run}"
    peft.save_folder(params, config.model, config.lora, str(base), folder)
    tokenizer.copy_of(run / "tokenizer", folder)
    if (base / "config.json").is_file() and llama.describes(base):
        return line
    return f"{line}; its base model {base} is no Hugging Face folder: export it, and write its place into {peft.CONFIG}"
