"""`tinyllama_jax.train` as it is, but for what the environment asks for.

CHAOS_NONFINITE: steps ("3,17") whose loss is not finite      CHAOS_NONFINITE_FROM: the first of those from which on none is
CHAOS_WRITE_ERROR: a file; while it is there, no checkpoint can be sealed
"""

import errno
import os
from pathlib import Path

from tinyllama_jax import processes

if __name__ == "__main__":
    processes.supervise("chaos_train")

import jax.numpy as jnp

from tinyllama_jax import checkpoint, step, train

gradients = step.gradients


def poisoned(state, batch, cfg, eos_id):
    sums, grads = gradients(state, batch, cfg, eos_id)
    bad = jnp.isin(state.step + 1, jnp.array([int(s) for s in os.environ["CHAOS_NONFINITE"].split(",")]))
    bad |= state.step + 1 >= int(os.environ["CHAOS_NONFINITE_FROM"])
    return sums._replace(loss=jnp.where(bad, jnp.nan, sums.loss)), grads


seal = checkpoint._seal


def failing(*args):
    if Path(os.environ["CHAOS_WRITE_ERROR"]).exists():
        raise OSError(errno.EIO, os.strerror(errno.EIO), "seal.json")
    seal(*args)


if __name__ == "__main__":
    step.gradients, checkpoint._seal = poisoned, failing
    processes.run(train.main)
