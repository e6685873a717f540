"""Conversations packed into a block: only marked tokens are learned, and none sees another conversation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import FP32

from tinyllama_jax.base import config as c
from tinyllama_jax.base.dims import FIRST, LEARNED
from tinyllama_jax.core import losses, model, step
from tinyllama_jax.core.losses import Answers, Batch

SIZES = (6, 3, 5)  # of three conversations; 3 tokens of padding follow


@pytest.fixture(scope="module")
def config():
    cfg = dataclasses.replace(FP32, loss_chunk=8)
    data = c.Data({"a": 1}, document_mask=True)
    return c.Config("w", cfg, data, c.Optim(1e-3, 1e-4, 1, 0.1, 1.0), c.Train(3, 16, 1), c.Checkpoint(1))


@pytest.fixture(scope="module")
def params(config):
    return jax.tree.map(lambda w: 5 * w, model.init(jax.random.key(0), config.model))


def block() -> Batch:
    rng = np.random.default_rng(0)
    tokens, marks = rng.integers(0, 104, (1, 17)).astype(np.uint16), np.zeros((1, 17), np.uint8)
    marks[0, [2, 3, 5, 7, 8, 10, 13]] = LEARNED
    marks[0, np.cumsum((0, *SIZES[:-1]))] |= FIRST
    return Batch(tokens, np.full(1, sum(SIZES), np.int32), marks=marks)


def alone(batch: Batch):
    """Each conversation in a block of its own."""
    for start, size in zip(np.cumsum((0, *SIZES)), SIZES, strict=False):
        tokens, marks = np.zeros((1, 17), np.uint16), np.zeros((1, 17), np.uint8)
        tokens[0, :size], marks[0, :size] = batch.tokens[0, start : start + size], batch.marks[0, start : start + size]
        yield Batch(tokens, np.full(1, size, np.int32), marks=marks)


def test_packed_conversations_have_the_loss_and_gradient_of_each_alone(config, params):
    def total(params, batches):
        sums = [Answers().sums(params, batch, config) for batch in batches]
        return sum(s.loss for s in sums), sum(s.correct for s in sums)

    (packed, right), gradient = jax.value_and_grad(total, has_aux=True)(params, [block()])
    (apart, also_right), also_gradient = jax.value_and_grad(total, has_aux=True)(params, list(alone(block())))
    assert packed > 10 and right == also_right
    np.testing.assert_allclose(packed, apart, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(also_gradient), strict=True):
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b)


def test_only_marked_tokens_count(config, params):
    batch = block()
    assert Answers().predicted(batch, config).tolist() == [7]
    each = np.asarray(Answers().token_losses(params, batch, config))[0]
    loss = Answers().sums(params, batch, config).loss
    np.testing.assert_allclose(loss, each[np.flatnonzero(batch.marks[0] & LEARNED) - 1].sum(), rtol=1e-6)
    padded = batch._replace(marks=batch.marks | np.uint8(LEARNED))  # a mark on padding does not count
    assert Answers().predicted(padded, config).tolist() == [sum(SIZES) - 1]


def test_marks_are_part_of_the_checksum():
    batch, other = block(), block()
    other.marks[0, 9] ^= LEARNED
    plain = batch._replace(marks=None)
    assert len({int(step.checksum(b)) for b in (batch, other, plain)}) == 3


def test_each_kind_of_data_has_its_loss():
    assert type(losses.for_data("text", 2)) is losses.NextToken and type(losses.for_data("chat", 2)) is Answers
    assert jnp.array_equal(Answers().documents(block(), None)[0, :9], np.array([1, 1, 1, 1, 1, 1, 2, 2, 2]))
