"""The batch of each step and the tokens seen by then, given the batches that `data.skip` leaves out."""

import dataclasses
import itertools

import numpy as np

from tinyllama_jax.base.config import Config, Data, Train
from tinyllama_jax.base.errors import UserError

NONE = np.empty(0, np.int64)  # no batch is left out


def left_out(data: Data) -> np.ndarray:
    """The batches that `data.skip` leaves out, in order; batch b is the one that step b would have without any skip."""
    out = NONE
    for first, last in data.skipped:
        out = np.union1d(out, batch_of(np.arange(first, last + 1), out))
    return out


def batch_of(step: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """The batch of each step (both counted from 1): the step-th batch that is not left out."""
    return step + np.searchsorted(left_out - np.arange(len(left_out)), step, side="right")


def same_batches(data: Data, other: Data, steps: int) -> bool:
    """Whether two data sections that differ only in `skip` have the same batches from step 1 to `steps`."""
    a, b = left_out(data), left_out(other)
    end = max(batch_of(np.int64(steps), a), batch_of(np.int64(steps), b))
    return np.array_equal(a[a <= end], b[b <= end])


def in_steps(config: Config) -> Train:
    """`config.train` with the batch ramp counted in steps taken: each batch that `data.skip` leaves out moves the ramp forward.

    A stage whose batches are all left out is dropped. Raises UserError if it is the first: its steps are the schedule's unit.
    """
    skip, train, ramp, step, tokens = left_out(config.data), config.train, [], 0, 0
    for (_, _, each), (batches, _, later) in itertools.pairwise(train.stages):
        then = batches - int(np.searchsorted(skip, batches, side="right"))
        if not then:
            what = f"leaves out all {batches:,} steps of train.tokens_per_step={each} before train.batch_ramp"
            raise UserError(f"--data.skip={config.data.skip}: {what}; leave out fewer")
        if then == step:
            ramp.pop()
        tokens, step = tokens + (then - step) * each, then
        ramp.append(f"{tokens}:{later}")
    return dataclasses.replace(train, batch_ramp=",".join(ramp))
