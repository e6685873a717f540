"""A run as a Hugging Face folder: `python tools/convert_to_torch.py --checkpoint RUN --output DIR`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # works in a checkout that is not installed
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed: leave the accelerator to whoever trains on it

from tinyllama_jax import convert, hf
from tinyllama_jax.errors import run_main


def main(argv: list[str]) -> int:
    """Exports; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="a run folder")
    parser.add_argument("--step", type=int, help="which of its checkpoints; the newest if absent")
    parser.add_argument("--output", required=True, help="the folder to make: safetensors, configuration, tokenizer")
    parser.add_argument(
        "--dtype", choices=list(hf.DTYPES), default="float32", help="float32 (default) loses nothing; the others halve the size"
    )
    parser.add_argument("--allow-non-finite", action="store_true", help="take weights that are NaN or infinite as they are")
    arguments = parser.parse_args(argv)
    step = convert.export(
        arguments.checkpoint,
        arguments.output,
        arguments.step,
        arguments.dtype,
        allow_non_finite=arguments.allow_non_finite,
    )
    print(f"{arguments.output}: step {step:,} of {arguments.checkpoint} in {arguments.dtype}")
    return 0


if __name__ == "__main__":
    run_main(main)
