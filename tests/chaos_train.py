"""`tinyllama_jax.train`, but losses are not finite at the steps in CHAOS_NONFINITE ("3,17"), seals CHAOS_SEAL_SECONDS late."""

import os
import time

from tinyllama_jax import processes

if __name__ == "__main__":
    processes.supervise("chaos_train")

import jax.numpy as jnp

from tinyllama_jax import checkpoint, step, train

gradients, seal = step.gradients, checkpoint._seal


def poisoned(state, batch, cfg, eos_id):
    sums, grads = gradients(state, batch, cfg, eos_id)
    bad = jnp.isin(state.step + 1, jnp.array([int(s) for s in os.environ.get("CHAOS_NONFINITE", "0").split(",")]))
    return sums._replace(loss=jnp.where(bad, jnp.nan, sums.loss)), grads


def late(*args):
    time.sleep(float(os.environ.get("CHAOS_SEAL_SECONDS", 0)))
    seal(*args)


if __name__ == "__main__":
    step.gradients, checkpoint._seal = poisoned, late
    processes.run(train.main)
