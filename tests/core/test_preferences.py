"""DPO's loss against its definition, written with all logits at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import FP32

from tinyllama_jax.base import config as c
from tinyllama_jax.base.dims import FIRST, LEARNED
from tinyllama_jax.core import model, step
from tinyllama_jax.core.losses import Batch, Preferences

# (prompt's tokens, answer's tokens) of chosen and rejected, for each pair of two blocks of 32 + 1 tokens
PAIRS = [[(3, 4, 3, 6), (2, 1, 2, 5)], [(5, 3, 5, 2)]]
BETA = 0.3


@pytest.fixture(scope="module")
def config():
    cfg = dataclasses.replace(FP32, loss_chunk=8, seq_len=32)
    train = c.Train(3, 64, 2, dpo_beta=BETA)
    return c.Config("w", cfg, c.Data({"a": 1}, document_mask=True), c.Optim(1e-3, 1e-4, 1, 0.1, 1.0), train, c.Checkpoint(1))


@pytest.fixture(scope="module")
def params(config):
    return jax.tree.map(lambda w: 5 * w, model.init(jax.random.key(0), config.model))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens, length = rng.integers(0, 104, (2, 33)).astype(np.uint16), np.zeros(2, np.int32)
    marks, reference = np.zeros((2, 33), np.uint8), np.zeros((2, 33), np.float32)
    for row, pairs in enumerate(PAIRS):
        for prompt, answer in np.reshape(pairs, (-1, 2)):
            start = length[row]
            marks[row, start] |= FIRST
            marks[row, start + prompt : start + prompt + answer] |= LEARNED
            length[row] += prompt + answer
        learned = marks[row] & LEARNED > 0
        reference[row, learned] = rng.normal(-4, 1, learned.sum())
    return Batch(tokens, length, marks=marks, reference=reference)


def defined(params, batch, config):
    """(the sum of the losses, the margins), each conversation in a forward pass of its own."""
    margins = []
    for row, pairs in enumerate(PAIRS):
        start, gains = 0, []
        for prompt, answer in np.reshape(pairs, (-1, 2)).tolist():
            tokens = jnp.asarray(batch.tokens[row, start : start + prompt + answer], jnp.int32)
            logp = jax.nn.log_softmax(model.logits(params, tokens[None, :-1], config.model)[0])
            own = logp[jnp.arange(prompt - 1, prompt + answer - 1), tokens[prompt:]]
            gains.append(own.sum() - batch.reference[row, start + prompt : start + prompt + answer].sum())
            start += prompt + answer
        margins += [gains[i] - gains[i + 1] for i in range(0, len(gains), 2)]
    margins = jnp.stack(margins)
    return -jax.nn.log_sigmoid(BETA * margins).sum(), margins


def test_loss_and_gradient_are_the_definition_s(config, params, batch):
    ours = lambda params: (sums := Preferences().sums(params, batch, config), sums)[0].loss
    (want, margins), want_gradient = jax.value_and_grad(lambda p: defined(p, batch, config), has_aux=True)(params)
    loss, gradient = jax.value_and_grad(ours)(params)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True):
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b)
    sums = Preferences().sums(params, batch, config)
    assert sums.correct == (margins > 0).sum() and {True, False} == set((margins > 0).tolist())
    np.testing.assert_allclose(sums.more["margin"], BETA * margins.sum(), rtol=1e-4)
    np.testing.assert_allclose(sums.more["chosen_reward"] - sums.more["rejected_reward"], sums.more["margin"], rtol=1e-4)
    assert (sums.more["chosen_tokens"], sums.more["rejected_tokens"]) == (8, 13)
    assert Preferences().predicted(batch, config).tolist() == [2, 1]
    empty = batch._replace(length=np.zeros(2, np.int32))  # the missing rows of a validation's last batch
    assert Preferences().sums(params, empty, config).loss == 0 and not Preferences().predicted(empty, config).any()


def test_a_step_is_the_same_in_one_micro_batch_and_in_two(config, params, batch):
    state = step.new_state(params, config)
    whole = jax.tree.map(lambda a: a[None], batch)
    split = jax.tree.map(lambda a: a[:, None], batch)
    (new, metrics), (also, also_metrics) = (step.train_step(state, b, config, Preferences()) for b in (whole, split))
    for name in ("loss", "accuracy", "margin", "chosen_tokens", "real_tokens"):
        np.testing.assert_allclose(metrics[name], also_metrics[name], rtol=1e-5)
    assert metrics["real_tokens"] == 3 and metrics["checksum"] == step.checksum(whole)
    for old, a, b in zip(*map(jax.tree.leaves, (params, new.params, also.params)), strict=True):
        assert 0 < np.linalg.norm(b - old) and np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(b - old)
