"""`tinyllama_jax.train` with the faults that the environment asks for.

CHAOS_NONFINITE: steps ("3,17") with a loss that is not finite      CHAOS_NONFINITE_FROM: from this step on no loss is finite
CHAOS_WRITE_ERROR: a file; while it exists, no checkpoint can be sealed      CHAOS_SEAL_SECONDS: the delay of each seal
CHAOS_STALE: the seconds after which the lock of a dead machine in an object store is taken over
"""

import errno
import os
import signal
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in train.py

from tinyllama_jax.run import supervise

if __name__ == "__main__":
    supervise.supervise("chaos_train")

import jax.numpy as jnp

from tinyllama_jax import train
from tinyllama_jax.core import step
from tinyllama_jax.run import lock, seals

gradients, seal = step.gradients, seals.seal


def poisoned(state, batch, cfg, loss):
    sums, grads = gradients(state, batch, cfg, loss)
    bad = jnp.isin(state.step + 1, jnp.array([int(s) for s in os.environ.get("CHAOS_NONFINITE", "0").split(",")]))
    bad |= state.step + 1 >= int(os.environ.get("CHAOS_NONFINITE_FROM", 2**31 - 1))
    return sums._replace(loss=jnp.where(bad, jnp.nan, sums.loss)), grads


def troubled(*args):
    if Path(os.environ.get("CHAOS_WRITE_ERROR", "/nonexistent")).exists():
        raise OSError(errno.EIO, os.strerror(errno.EIO), "seal.json")
    time.sleep(float(os.environ.get("CHAOS_SEAL_SECONDS", 0)))
    seal(*args)


if __name__ == "__main__":
    step.gradients, seals.seal = poisoned, troubled
    lock.STALE = float(os.environ.get("CHAOS_STALE", lock.STALE))
    lock.BEAT = lock.STALE / 4
    supervise.run(train.main)
