"""Published weights as a run folder: `python tools/convert_from_torch.py --checkpoint DIR_OR_FILE --output RUN`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # works in a checkout that is not installed
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed: leave the accelerator to whoever trains on it

from tinyllama_jax import convert
from tinyllama_jax.errors import run_main


def main(argv: list[str]) -> int:
    """Imports; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="a Hugging Face folder, a file of one, or a lit-gpt .pth")
    parser.add_argument("--output", required=True, help="the run folder to make")
    parser.add_argument("--config", help="the config to go on with, such as configs/3t.py; a .pth needs it")
    parser.add_argument(
        "--tokenizer", help="a SentencePiece model or a tokenizer's folder, if there is none beside the weights"
    )
    parser.add_argument("--allow-non-finite", action="store_true", help="take weights that are NaN or infinite as they are")
    arguments = parser.parse_args(argv)
    source, output, config, tokenizer = arguments.checkpoint, arguments.output, arguments.config, arguments.tokenizer
    print(convert.import_checkpoint(source, output, config, tokenizer, arguments.allow_non_finite))
    return 0


if __name__ == "__main__":
    run_main(main)
