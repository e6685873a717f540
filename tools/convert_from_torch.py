"""Published weights as a run folder: `python tools/convert_from_torch.py --checkpoint DIR_OR_FILE --output RUN`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # works in a checkout that is not installed
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed: leave the accelerator to the run that trains on it

from tinyllama_jax import convert
from tinyllama_jax.base.errors import run_main


def main(argv: list[str]) -> int:
    """`python -m tinyllama_jax.convert from-torch`; returns the exit code."""
    return convert.main(["from-torch", *argv])


if __name__ == "__main__":
    run_main(main)
