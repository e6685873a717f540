"""The step's bookkeeping: what is counted, what the checksum sees, what is sharded where."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.base import config as c
from tinyllama_jax.base import sharding
from tinyllama_jax.base.config import Bos
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import model, step
from tinyllama_jax.core.losses import Batch, NextToken, count_tokens
from tinyllama_jax.core.program import build
from tinyllama_jax.core.step import checksum
from tinyllama_jax.kernels.cross_entropy import Sums

MODEL = c.Model(2, 32, 4, 2, 64, 104, 16)
FP32 = dataclasses.replace(MODEL, precision="params=float32,compute=float32,output=float32", residual="float32")
EOS = 2


def loss_sums(params, batch, config, eos_id=None):
    """(summed loss, tokens that it counts)."""
    loss = NextToken(eos_id)
    return loss.sums(params, batch, config), loss.predicted(batch, config).sum()


def batch_of(shape, length=17, seed=0) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, 104, (*shape, 17)).astype(np.uint16)
    return Batch(tokens, np.full(shape, length, np.int32))


@pytest.mark.parametrize(("lengths", "tokens"), [([17, 17], 32), ([17, 1], 16), ([5, 0], 4), ([0, 0], 1), ([1, 1], 1)])
def test_tokens_that_are_predicted(lengths, tokens):
    """A block of n tokens predicts n - 1. The count is a divisor, and so never 0."""
    batch = Batch(np.zeros((1, 2, 17), np.uint16), np.array([lengths], np.int32))
    config = c.Config("x", FP32, c.Data({"x": 1}), c.Optim(1e-3, 1e-4, 2, 0.1, 1.0), c.Train(10, 16, 1), c.Checkpoint(1))
    assert int(count_tokens(NextToken().predicted(batch, config))) == tokens


def test_checksum_sees_tokens_and_places_but_no_split_and_no_padding():
    batch = batch_of((4, 2))
    same = Batch(batch.tokens.reshape(1, 8, 17), batch.length.reshape(1, 8))
    assert checksum(batch) == checksum(same) == checksum(Batch(batch.tokens.astype(np.int32), batch.length))
    for row, position in ((0, 0), (3, 5), (7, 16)):
        other = batch.tokens.copy().reshape(8, 17)
        other[row, position] += 1
        assert checksum(Batch(other.reshape(4, 2, 17), batch.length)) != checksum(batch)
    swapped = batch.tokens.reshape(8, 17)[[1, 0, 2, 3, 4, 5, 6, 7]].reshape(4, 2, 17)
    assert checksum(Batch(swapped, batch.length)) != checksum(batch)
    short = Batch(batch.tokens.copy(), np.full((4, 2), 9, np.int32))
    before = checksum(short)
    short.tokens[..., 9:] = 7
    assert checksum(short) == before != checksum(batch)


def test_checksums_of_a_thousand_batches_differ():
    sums = {int(checksum(batch_of((1, 4), seed=seed))) for seed in range(1_000)}
    assert len(sums) == 1_000  # by chance two of them would be equal once in 8,600 such tests


def test_state_is_split_as_its_parameters_and_the_batch_over_data_and_fsdp():
    config = c.Config(
        "x",
        MODEL,
        c.Data({"x": 1}),
        c.Optim(1e-3, 1e-4, 2, 0.1, 1.0),
        c.Train(10, 16 * 16, 2),
        c.Checkpoint(1),
        c.Mesh(2, 2, 2),
    )
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        state, _ = program.train(program.init(), batch_of(program.shape))
    assert program.shape == (2, 8)
    adam = state.opt_state[0]
    jax.tree.map(
        lambda p, m, v: (p.sharding == m.sharding == v.sharding) or pytest.fail(str(p)), state.params, adam.mu, adam.nu
    )
    for leaf in jax.tree.leaves((state.params, adam.mu, adam.nu)):
        assert leaf.addressable_shards[0].data.size <= leaf.size // 2  # nothing of theirs is whole on every device
    assert program.batch.tokens.shard_shape((2, 8, 17)) == (2, 2, 17)


@pytest.mark.parametrize("bad", ["loss", "gradient", "new weights", ""])
def test_what_is_not_finite_moves_nothing(monkeypatch, bad):
    optim = c.Optim(1e4 if bad == "new weights" else 1e-3, 1e-4, 0, 0.1, 1.0)
    config = c.Config("x", FP32, c.Data({"x": 1}), optim, c.Train(10, 16, 1), c.Checkpoint(1))
    state = step.new_state(model.init(jax.random.key(0), FP32), config)
    if bad == "new weights":  # less 10^4 x 0.1 times themselves
        state = state.replace(params=jax.tree.map(lambda p: jnp.full_like(p, 1e37), state.params))
    grads = jax.tree.map(jnp.ones_like, state.params)
    if bad == "gradient":
        grads["layers"]["q"]["kernel"] = grads["layers"]["q"]["kernel"].at[1, 2, 3, 4].set(jnp.nan)
    sums = Sums(jnp.float32(jnp.inf if bad == "loss" else 1.0), jnp.float32(0), jnp.float32(0), None)
    monkeypatch.setattr(step, "gradients", lambda *_: (sums, grads))
    new, metrics = step.train_step(state, batch_of((1, 1)), config)
    good = not bad
    assert bool(metrics["finite"]) == good and int(new.skipped) == (not good) and int(new.step) == 1
    for before, after in zip(
        *map(jax.tree.leaves, ((state.params, state.opt_state), (new.params, new.opt_state))), strict=True
    ):
        assert bool((before == after).all()) != good


@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_a_step_without_a_token_to_predict_changes_nothing(compute):
    """Neither weights nor moments nor Adam's count nor the loss scale; its loss is no number; it is not counted as skipped."""
    cfg = dataclasses.replace(FP32, precision=f"params=float32,compute={compute},output=float32")
    config = c.Config("x", cfg, c.Data({"x": 1}), c.Optim(1e-3, 1e-4, 0, 0.1, 1.0), c.Train(10, 32, 1), c.Checkpoint(1))
    train = jax.jit(lambda state, batch: step.train_step(state, batch, config))
    state, metrics = train(step.new_state(model.init(jax.random.key(0), cfg), config), batch_of((2, 1)))
    assert metrics["real_tokens"] == 32 and np.isfinite(metrics["loss"])
    for lengths in ([[1], [1]], [[0], [1]]):
        new, metrics = train(state, batch_of((2, 1))._replace(length=np.array(lengths, np.int32)))
        assert int(new.step) == int(state.step) + 1
        jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(new, step=state.step), state)
        assert metrics["finite"] and np.isnan(metrics["loss"]) and metrics["real_tokens"] == 0
    assert train(state, batch_of((2, 1))._replace(length=np.array([[1], [2]], np.int32)))[1]["real_tokens"] == 1


def test_padding_is_not_trained_on():
    """The loss of a padded block is that of its real tokens, by the logits; what the padding holds moves no gradient."""
    config = c.Config("x", FP32, c.Data({"x": 1}), c.Optim(1e-3, 1e-4, 2, 0.1, 1.0), c.Train(10, 16, 1), c.Checkpoint(1))
    params = model.init(jax.random.key(0), FP32)
    tokens = batch_of((1,)).tokens
    other = tokens.copy()
    other[:, 6:] = (other[:, 6:] + 7) % 104
    length = np.array([6], np.int32)

    def loss(params, tokens):
        sums, n = loss_sums(params, Batch(jnp.asarray(tokens), length), config)
        return sums.loss, n

    (value, n), grads = jax.value_and_grad(loss, has_aux=True)(params, tokens)
    logits = jax.nn.log_softmax(model.logits(params, tokens[:, :-1].astype(np.int32), FP32)[0])
    wanted = -sum(float(logits[s, int(tokens[0, s + 1])]) for s in range(5))
    assert int(n) == 5 and float(value) == pytest.approx(wanted, rel=1e-6)
    (again, _), same = jax.value_and_grad(loss, has_aux=True)(params, other)
    assert float(again) == float(value)
    for name, gradient in model.flatten(same).items():
        np.testing.assert_array_equal(gradient, model.flatten(grads)[name])


@pytest.mark.parametrize("residual", ["bfloat16", "float32"])
def test_every_gradient_in_bf16_is_close_to_fp32s_also_of_a_token_that_is_half_the_text(residual):
    """An embedding row's gradient is a sum over its occurrences: summed in bf16 it stops growing."""
    S = 1_024
    shape = dataclasses.replace(FP32, seq_len=S)
    tokens = np.random.default_rng(0).integers(0, 104, (2, S + 1))
    tokens[:, ::2] = 5
    batch = Batch(jnp.asarray(tokens), np.full(2, S + 1, np.int32))
    grads = []
    for compute, stream in (("float32", "float32"), ("bfloat16", residual)):
        cfg = dataclasses.replace(shape, precision=f"params=float32,compute={compute},output=float32", residual=stream)
        config = c.Config("x", cfg, c.Data({"x": 1}), c.Optim(1e-3, 1e-4, 2, 0.1, 1.0), c.Train(10, 2 * S, 2), c.Checkpoint(1))
        params = model.init(jax.random.key(0), cfg)
        grads.append(model.flatten(jax.grad(lambda p, config=config: loss_sums(p, batch, config)[0].loss)(params)))
    for name, exact in grads[0].items():
        error = np.linalg.norm(np.asarray(grads[1][name] - exact)) / np.linalg.norm(exact)
        assert error < 0.03, (name, error)


def test_a_step_too_large_for_the_devices_is_refused():
    config = c.Config("x", MODEL, c.Data({"x": 1}), c.Optim(1e-3, 1e-4, 2, 0.1, 1.0), c.Train(10, 3 * 16, 1), c.Checkpoint(1))
    with pytest.raises(UserError, match="choose train.tokens_per_step as a multiple of 128"):
        build(config, sharding.make_mesh(config.mesh))


@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_with_the_document_mask_each_document_is_as_if_alone(impl):
    """Its tokens' losses are those that it has in a block of its own: RoPE knows distances alone."""
    config = c.Config("w", FP32, c.Data({"a": 1}, document_mask=True), c.Optim(1e-3, 1e-4, 1, 0.1, 1.0), c.Train(3, 16, 1),
                      c.Checkpoint(1))  # fmt: skip
    cfg = dataclasses.replace(FP32, attention=impl, loss_chunk=8)
    config = dataclasses.replace(config, model=cfg)
    params = jax.tree.map(lambda w: 5 * w, model.init(jax.random.key(0), cfg))
    tokens = np.random.default_rng(0).integers(3, 104, (1, 17)).astype(np.int32)
    tokens[0, [4, 5, 11]] = EOS  # documents of 5, 1, 6 and 5 tokens
    whole = Batch(np.pad(tokens, ((0, 0), (0, 1))), jnp.full((1,), 17))
    assert NextToken(EOS).documents(whole, config).tolist() == [[0] * 5 + [1] + [2] * 6 + [3] * 5]
    assert NextToken(Bos(EOS)).documents(whole, config).tolist() == [[0] * 4 + [1] + [2] * 6 + [3] * 6]
    batch = Batch(jnp.asarray(tokens), jnp.full((1,), 17))
    losses = np.asarray(NextToken(EOS).token_losses(params, batch, config))
    for first, end in ((0, 5), (5, 6), (6, 12), (12, 16)):
        logits = jax.nn.log_softmax(model.logits(params, tokens[:, first:end], cfg)[0])
        alone = [-logits[i, tokens[0, first + i + 1]] for i in range(end - first)]
        np.testing.assert_allclose(losses[0, first:end], alone, rtol=1e-5, atol=1e-5)
    sums, _ = loss_sums(params, batch, config, EOS)
    assert float(sums.loss) == pytest.approx(losses.sum(), rel=1e-6)
    across = np.asarray(NextToken().token_losses(params, batch, config))
    assert np.abs(across - losses)[0, 5:].min() > 1e-4 and np.abs(across - losses)[0, :5].max() < 1e-5


def test_the_mask_reaches_the_jitted_step_and_only_if_it_is_asked_for():
    config = c.Config("x", FP32, c.Data({"x": 1}), c.Optim(1e-3, 1e-4, 2, 0.1, 1.0), c.Train(10, 16 * 16, 1), c.Checkpoint(1))
    batch = batch_of((2, 8))
    batch.tokens[..., 7] = EOS
    losses = {}
    mesh = sharding.make_mesh(config.mesh)
    for mask in (False, True):
        with jax.set_mesh(mesh):
            asked = dataclasses.replace(config, data=dataclasses.replace(config.data, document_mask=mask))
            program = build(asked, mesh, NextToken(EOS))
            state = program.start(jax.tree.map(lambda w: 5 * w, program.init().params))
            micro = Batch(batch.tokens[0], batch.length[0])
            found = float(program.evaluate(state.params, micro)[0].loss), float(program.token_losses(state.params, micro).sum())
            _, metrics = program.train(state, Batch(*map(jax.device_put, batch, program.batch)))
            losses[mask] = float(metrics["loss"]), *found
    assert all(abs(a - b) > 1e-3 for a, b in zip(losses[False], losses[True], strict=True))


def test_what_follows_eos_is_not_counted_if_it_is_left_out():
    """Of 16 predictions, 3 of them from eos, one of these of padding; in the loss, its gradient, and every mean."""
    config = c.Config("x", FP32, c.Data({"x": 0.5, "y": 0.5}, eod_mask_loss=True), c.Optim(1e-3, 1e-4, 0, 0.1, 1.0),
                      c.Train(10, 2 * 16, 2), c.Checkpoint(1))  # fmt: skip
    off = dataclasses.replace(config, data=dataclasses.replace(config.data, eod_mask_loss=False))
    tokens = np.random.default_rng(0).integers(3, 104, (1, 2, 17)).astype(np.uint16)
    tokens[0, 0, [4, 15]] = tokens[0, 1, [0, 9]] = EOS
    length, source = np.array([[17, 10]], np.int32), np.array([[0, 1]], np.int32)  # the last real token of the second is eos
    batch = Batch(*map(jnp.asarray, (tokens, length, source)))
    predicted = [NextToken(EOS).predicted(batch, of).tolist() for of in (off, config)]
    assert predicted == [[[16, 9]], [[14, 8]]]
    params = jax.tree.map(lambda w: 5 * w, model.init(jax.random.key(0), FP32))
    micro = jax.tree.map(lambda a: a[0], batch)
    losses = np.asarray(NextToken(EOS).token_losses(params, micro, config))
    np.testing.assert_array_equal(losses, NextToken().token_losses(params, micro, off))  # attention is as it was
    rows = losses[0].sum() - losses[0, [4, 15]].sum(), losses[1, 1:9].sum()
    sums, n = loss_sums(params, micro, config, EOS)
    assert int(n) == 22 and float(sums.loss) == pytest.approx(sum(rows), rel=1e-5)
    state = step.new_state(params, config)
    metrics = jax.device_get(step.train_step(state, batch, config, NextToken(EOS))[1])
    assert metrics["real_tokens"] == 22 and metrics["loss"] == pytest.approx(sum(rows) / 22, rel=1e-5)
    assert metrics["source_tokens"].tolist() == [14, 8]
    assert metrics["source_loss"] == pytest.approx([rows[0] / 14, rows[1] / 8], rel=1e-5)
    before = jax.device_get(step.train_step(state, batch, off, NextToken(EOS))[1])
    assert before["real_tokens"] == 25 and before["checksum"] == metrics["checksum"]
    other = batch._replace(tokens=batch.tokens.at[0, 0, 16].set(51))  # it follows eos, and is read by none
    head = lambda *of: np.asarray(step.gradients(state, *of, NextToken(EOS))[1]["lm_head"]["kernel"])
    np.testing.assert_array_equal(head(batch, config), head(other, config))
    assert (head(batch, off) != head(other, off)).any()


@pytest.mark.parametrize("S", [251, 17])
def test_a_prime_number_of_positions(S):
    """The loss of chunks that do not divide them is that of all positions at one time."""
    cfg = dataclasses.replace(FP32, n_layers=1, seq_len=S)
    config = c.Config("w", cfg, c.Data({"a": 1}), c.Optim(1e-3, 1e-4, 1, 0.1, 1.0), c.Train(3, S, 1), c.Checkpoint(1))
    params, tokens = model.init(jax.random.key(0), cfg), np.random.default_rng(0).integers(0, 104, (1, S + 1))
    batch, out = Batch(jnp.asarray(tokens), jnp.full(1, S)), []
    for chunk in (S // 2, S):
        config = dataclasses.replace(config, model=dataclasses.replace(cfg, loss_chunk=chunk))
        sums, n = loss_sums(params, batch, config)
        assert int(n) == S - 1
        out.append((float(sums.loss), NextToken().token_losses(params, batch, config)))
    assert out[0][0] == pytest.approx(out[1][0], rel=1e-6)
    np.testing.assert_allclose(out[0][1], out[1][1], rtol=1e-5)


def test_z_loss_is_minimised_and_not_shown():
    config = c.Config("x", FP32, c.Data({"x": 1}), c.Optim(1e-3, 1e-4, 2, 0.1, 1.0), c.Train(10, 16 * 16, 1), c.Checkpoint(1))
    mesh, batch, out = sharding.make_mesh(config.mesh), batch_of((2, 8)), {}
    for z_loss in (0.0, 0.5):
        with jax.set_mesh(mesh):
            program = build(dataclasses.replace(config, train=dataclasses.replace(config.train, z_loss=z_loss)), mesh)
            out[z_loss] = jax.device_get(program.train(program.init(), Batch(*map(jax.device_put, batch, program.batch)))[1])
    assert out[0.5]["loss"] == out[0.0]["loss"] and "z_loss" not in out[0.0]
    assert out[0.5]["z_loss"] == pytest.approx(0.5 * np.log(104) ** 2, rel=0.1)  # of logits near 0
    assert out[0.5]["grad_norm"] > 1.5 * out[0.0]["grad_norm"]


def test_losses_of_tokens_are_those_of_all_logits():
    config = c.Config("w", FP32, c.Data({"a": 1}), c.Optim(1e-3, 1e-4, 1, 0.1, 1.0), c.Train(3, 32, 2), c.Checkpoint(1))
    config = dataclasses.replace(config, model=dataclasses.replace(FP32, loss_chunk=8))  # 4 positions of 2 sequences
    params, batch = model.init(jax.random.key(0), FP32), batch_of((2,), length=9)
    losses = NextToken().token_losses(params, batch, config)
    logits = model.logits(params, batch.tokens[:, :-1].astype(np.int32), FP32)
    labels = batch.tokens[:, 1:, None].astype(np.int32)
    np.testing.assert_allclose(losses, -np.take_along_axis(jax.nn.log_softmax(logits), labels, -1)[..., 0], atol=1e-5)
    sums, n = loss_sums(params, batch, config)
    assert n == 16 and np.asarray(losses)[:, :8].sum() == pytest.approx(float(sums.loss), rel=1e-6)  # padding left out


class Answers(NextToken):
    """Fine-tuning's loss: only tokens after the first 3 in a block count."""

    def counted(self, batch, config):
        answer = jnp.cumsum(batch.tokens[..., :-1] == 3, axis=-1) > 0
        return super().counted(batch, config) & answer


def test_another_loss_needs_to_say_only_what_it_counts():
    """In the step, in evaluation and in the gradient, over two micro-batches and two sources."""
    config = c.Config("x", FP32, c.Data({"x": 0.5, "y": 0.5}), c.Optim(1e-3, 1e-4, 0, 0.1, 1.0),
                      c.Train(steps=10, tokens_per_step=2 * 8 * 16, seqs_per_device=1), c.Checkpoint(1))  # fmt: skip
    batch = batch_of((2, 8))
    batch.tokens[:] = np.where(batch.tokens == 3, 4, batch.tokens)
    batch.tokens[:, :4, 9], batch.tokens[:, 4:, 12] = 3, 3  # 7 and 4 of 16 predictions count
    batch = batch._replace(source=np.tile([[0] * 4 + [1] * 4], (2, 1)).astype(np.int32))
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = build(config, mesh, Answers())
        state = program.start(jax.tree.map(lambda w: 5 * w, program.init().params))
        micro = Batch(batch.tokens[0], batch.length[0])
        losses = np.stack([program.token_losses(state.params, micro._replace(tokens=tokens)) for tokens in batch.tokens])
        sums, n = program.evaluate(state.params, micro)
        _, metrics = program.train(state, Batch(*map(jax.device_put, batch, program.batch)))
    answers = [losses[:, :4, 9:].sum(), losses[:, 4:, 12:].sum()]
    assert metrics["real_tokens"] == 88 and metrics["source_tokens"].tolist() == [56, 32]
    assert float(metrics["loss"]) == pytest.approx(sum(answers) / 88, rel=1e-5)
    np.testing.assert_allclose(metrics["source_loss"], [answers[0] / 56, answers[1] / 32], rtol=1e-5)
    assert n == 44 and float(sums.loss) == pytest.approx(losses[0, :4, 9:].sum() + losses[0, 4:, 12:].sum(), rel=1e-5)
