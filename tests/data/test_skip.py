"""`data.skip`: the batches that a run leaves out, compared with a count step by step."""

import numpy as np
import pytest

from tinyllama_jax.base import cli, schedule
from tinyllama_jax.base.config import Data
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import feed
from tinyllama_jax.data.mixture import Mixture


def data(skip):
    return Data({"x": 1}, skip=skip)


def by_hand(skip, steps):
    """The batch of each step, by taking the ranges out of a list one after another."""
    batches = list(range(1, steps + 1_000))
    for first, last in data(skip).skipped:
        del batches[first - 1 : last]
    return batches[:steps]


@pytest.mark.parametrize("skip", ["", "1:1", "5:5", "5:9,5:9", "5:9,20:22", "20:22,5:9", "7:30,3:10,40:40", "3:4,2:6,1:1"])
def test_batches_left_out(skip):
    out = schedule.left_out(data(skip))
    assert schedule.batch_of(np.arange(1, 101), out).tolist() == by_hand(skip, 100)
    kept = set(schedule.batch_of(np.arange(1, 1_001), out).tolist())
    assert len(kept) == 1_000 and not kept & set(out.tolist())


@pytest.mark.parametrize(
    ("a", "b"), [("", "5:9"), ("5:9", "5:9,20:22"), ("20:22,5:9", "5:9,15:17"), ("5:9", "5:10"), ("7:8", "8:9")]
)
def test_the_first_step_at_which_two_skips_differ(a, b):
    same = [x == y for x, y in zip(by_hand(a, 60), by_hand(b, 60), strict=True)]
    for steps in range(1, 61):
        assert schedule.same_batches(data(a), data(b), steps) == all(same[:steps]), steps


def test_the_order_leaves_out_skipped_batches():
    order = lambda skip: feed.Order([100], Mixture([1.0]), 0, [(0, 0, 4)], schedule.left_out(data(skip)))
    plain, skipping = order(""), order("3:4")
    for step in range(1, 11):
        np.testing.assert_array_equal(skipping.at(step), plain.at(step if step < 3 else step + 2))


@pytest.mark.parametrize("skip", ["", "2:3", "5:9", "1:1,4:4,9:12", "5:6,5:6", "9:9,2:2"])
def test_a_larger_batch_comes_earlier_by_what_is_left_out_before_it(skip, tiny_config):
    """The clock of tokens, and with it the learning rate, follows the batches that are trained on."""
    ramp = {"train.batch_ramp": "1024:256,2048:1024", "train.steps": "40", "data.skip": skip}
    config = cli.override(tiny_config, ramp)
    order, clock = feed.order(config, feed.open_sources(config)), schedule.in_steps(config)
    sizes = [order.size(step) * 16 for step in range(1, 41)]
    assert sizes[0] == 128 and sizes[-1] == 1_024
    assert [clock.tokens_after(step) for step in range(1, 41)] == np.cumsum(sizes).tolist()


def test_a_stage_of_which_every_step_is_skipped(tiny_config):
    """The run is as if there were no such stage; for the first stage, whose steps the learning rate counts, it is refused."""
    ramp = {"train.batch_ramp": "1024:256,2048:1024", "train.steps": "40"}  # steps 1 to 8, 9 to 12, and on
    config = cli.override(tiny_config, ramp | {"data.skip": "9:12"})
    assert schedule.in_steps(config).stages == [(0, 0, 128), (8, 1024, 1024)]
    order = feed.order(config, feed.open_sources(config))
    assert [order.size(step) for step in (8, 9)] == [8, 64]
    assert schedule.in_steps(cli.override(config, {"data.skip": "2:500"})).stages == [(0, 0, 128), (1, 128, 1024)]
    for skip in ("1:8", "1:40", "1:4,1:4"):
        with pytest.raises(UserError, match=rf"--data.skip={skip}: leaves out all 8 steps of train.tokens_per_step=128"):
            schedule.in_steps(cli.override(config, {"data.skip": skip}))


@pytest.mark.parametrize("skip", ["3", "3:", "a:b", "0:3", "5:3", "1:2000000", "1:2:3"])
def test_invalid_ranges_are_errors(skip):
    with pytest.raises(UserError, match=r"--data\.skip="):
        data(skip)
