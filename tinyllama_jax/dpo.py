"""Direct preference optimisation: `python -m tinyllama_jax.dpo --config configs/dpo_ultrafeedback.py --init.from=RUN`.

The pairs of `data.sources` are written as blocks beside the run folder, with their log-probabilities under the weights of
`init.from`, and `train` learns from those.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends at once, without a traceback

from tinyllama_jax.run import supervise

if __name__ == "__main__":
    supervise.supervise("tinyllama_jax.dpo")  # of several processes; before the imports, which take seconds

from tinyllama_jax import sft, train
from tinyllama_jax.base import cli, mixture_weights
from tinyllama_jax.core import xla
from tinyllama_jax.run import bucket, initialize
from tinyllama_jax.run.references import with_references


def main(argv: list[str]) -> int:
    """Writes the pairs with their reference as blocks, unless an earlier run kept them, and trains; returns the exit code."""
    config = cli.load(argv, __doc__)
    with bucket.opened(config):
        argv = sft.as_training(config, argv, "preferences")
        config = cli.load(argv, __doc__)
        xla.reserve_memory()
        with_reference = with_references(initialize.resolved(config, None))  # of a resumed run: those that it started from
        sources = {with_reference.get(path, path): weight for path, weight in config.data.sources.items()}
        return train.main([*argv, f"--data.sources={mixture_weights.sources_text(sources)}"])


if __name__ == "__main__":
    supervise.run(main)
