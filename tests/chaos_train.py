"""`tinyllama_jax.train` whose loss is not finite at the steps in CHAOS_NONFINITE ("3,17"); all else is the real thing."""

import os

from tinyllama_jax import processes

if __name__ == "__main__":
    processes.supervise("chaos_train")

import jax.numpy as jnp

from tinyllama_jax import step, train

gradients = step.gradients


def poisoned(state, batch, cfg, eos_id):
    sums, grads = gradients(state, batch, cfg, eos_id)
    bad = jnp.isin(state.step + 1, jnp.array([int(s) for s in os.environ["CHAOS_NONFINITE"].split(",")]))
    return sums._replace(loss=jnp.where(bad, jnp.nan, sums.loss)), grads


if __name__ == "__main__":
    step.gradients = poisoned
    processes.run(train.main)
