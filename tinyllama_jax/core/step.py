"""The train step: gradients over micro-batches, update, and what happens to numbers that are not finite."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import jmp
from jax import lax

from tinyllama_jax.base.config import Config
from tinyllama_jax.core import lora, optim
from tinyllama_jax.core.losses import NEXT_TOKEN, Batch, Loss, count_tokens, sum_by_source
from tinyllama_jax.kernels.cross_entropy import Sums

FIRST_LOSS_SCALE = 2.0**15  # fp16 only; halves on each overflow, doubles after 2,000 steps without one


@chex.dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step. The data need no state: a batch is a function of the step."""

    step: jax.Array  # int32: steps taken
    params: dict
    opt_state: tuple  # with the moments of the parameters that train: see `lora.split`
    loss_scale: dict  # for fp16 compute: jmp's dynamic loss scale and its counter; otherwise empty
    skipped: jax.Array  # int32: steps that were not finite and changed nothing


def new_state(params: dict, config: Config) -> TrainState:
    """Returns the state before the first step. `params`: in the layout of `dims.PARAMETERS`, also with `lora.rank`."""
    params = lora.start(params, config) if config.lora.rank else params
    fp16 = config.model.compute_dtype == "float16"
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optim.adamw(config).init(lora.split(params)[0]),
        loss_scale={"scale": jnp.float32(FIRST_LOSS_SCALE), "counter": jnp.int32(0)} if fp16 else {},
        skipped=jnp.int32(0),
    )


def scaler(state: TrainState) -> jmp.LossScale:
    """The current loss scale: jmp's dynamic one for fp16, whose smallest number is 6e-8; none for bf16 and fp32."""
    if not state.loss_scale:
        return jmp.NoOpLossScale()
    return jmp.DynamicLossScale(state.loss_scale["scale"], state.loss_scale["counter"])


def gradients(state: TrainState, batch: Batch, config: Config, loss: Loss = NEXT_TOKEN) -> tuple[Sums, dict]:
    """Returns the loss sums over all micro-batches, and the gradient of the mean of loss + z (times the loss scale).

    The gradient is that of the parameters that train (see `lora.split`). The mean is over all counted tokens of the step, so
    every token has the same weight, whatever its micro-batch's padding.
    """
    n_tokens = count_tokens(loss.predicted(batch, config))
    trained, frozen = lora.split(state.params)

    def micro_batch(trained: dict, micro: Batch) -> tuple[jax.Array, Sums]:
        sums = loss.sums(lora.join(trained, frozen), micro, config)
        return scaler(state).scale((sums.loss + sums.z) / n_tokens), sums

    differentiate = jax.value_and_grad(micro_batch, has_aux=True)
    if batch.tokens.shape[0] == 1:
        (_, sums), grads = differentiate(trained, jax.tree.map(lambda a: a[0], batch))
        return sums, grads

    def add(total, micro):
        (_, sums), grads = differentiate(trained, micro)
        return jax.tree.map(jnp.add, total, (sums, grads)), None

    sums = jax.eval_shape(lambda micro: loss.sums(state.params, micro, config), jax.tree.map(lambda a: a[0], batch))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (sums, trained))
    return lax.scan(add, zeros, batch)[0]


def train_step(
    state: TrainState, batch: Batch, config: Config, loss: Loss = NEXT_TOKEN
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one optimizer step over all A micro-batches; returns the new state and the metrics as scalars.

    If the loss, a gradient or a new parameter is not finite, weights and moments stay unchanged, `skipped` grows by one, and
    the next step takes the next batch. A step without a token to predict changes nothing either; its loss is NaN, and `skipped`
    does not count it.
    """
    sums, grads = gradients(state, batch, config, loss)
    scale = scaler(state)
    grads = scale.unscale(grads)
    predicted = loss.predicted(batch, config)
    n_tokens, predicts = count_tokens(predicted), (predicted > 0).any()
    mean = lambda total: jnp.where(predicts, total / n_tokens, jnp.nan)
    step, (trained, frozen) = state.step + 1, lora.split(state.params)
    updated, opt_state, metrics = optim.update(grads, state.opt_state, trained, step, config)
    # finite gradients can have squares that overflow
    finite = jmp.all_finite((sums.loss, grads, metrics["grad_norm"], updated)) | ~predicts
    learns, scale_after = finite & predicts, scale.adjust(finite)
    loss_scale = {"scale": scale_after.loss_scale, "counter": scale_after.counter} if state.loss_scale else {}
    new = TrainState(
        step=step,
        params=lora.join(jmp.select_tree(learns, updated, trained), frozen),
        opt_state=jmp.select_tree(learns, opt_state, state.opt_state),
        loss_scale=jmp.select_tree(predicts, loss_scale, state.loss_scale),
        skipped=state.skipped + jnp.int32(~finite),
    )
    metrics |= {
        "loss": mean(sums.loss),
        "accuracy": mean(sums.correct),
        "finite": finite,
        "skipped": new.skipped,
        "loss_scale": jnp.float32(scale.loss_scale),
        "real_tokens": jnp.where(predicts, n_tokens, 0),
        **({"z_loss": mean(sums.z)} if config.train.z_loss else {}),
        **{name: mean(total) for name, total in (sums.more or {}).items()},
        **({} if batch.source is None else by_source(sums.rows, predicted, batch.source)),
        "checksum": checksum(batch),
    }
    return new, metrics


def by_source(losses: jax.Array, predicted: jax.Array, source: jax.Array) -> dict[str, jax.Array]:
    """Mean loss and number of predicted tokens of each source [n_sources]; the mean of no tokens is NaN."""
    tokens = sum_by_source(predicted.astype(jnp.float32), source, len(losses))
    return {"source_loss": losses / tokens, "source_tokens": tokens}


def checksum(batch: Batch) -> jax.Array:
    """A uint32 of the batch's real tokens, their marks and their places; the same however it is split over devices."""
    tokens = batch.tokens.astype(jnp.uint32)
    if batch.marks is not None:
        tokens ^= batch.marks.astype(jnp.uint32) << 24
    width = tokens.shape[-1]
    # in the shape [A, B, W]: a reshape to [A B, W] would gather all tokens on every device
    iota = partial(lax.broadcasted_iota, jnp.uint32, tokens.shape)
    row = sum(iota(i) * jnp.uint32(math.prod(tokens.shape[i + 1 : -1])) for i in range(tokens.ndim - 1))
    place = row * jnp.uint32(width) + iota(tokens.ndim - 1)
    real = jnp.arange(width) < batch.length[..., None]
    return jnp.where(real, (tokens + 1) * weight_of(place), jnp.uint32(0)).sum(dtype=jnp.uint32)


def weight_of(place: jax.Array) -> jax.Array:
    """An odd uint32 for each place: changing one element always changes a sum of elements times these."""
    place = (place ^ (place >> 15)) * jnp.uint32(0x2C1B3C6D)  # spread the bits (constants: hash prospector, C. Wellons)
    place = (place ^ (place >> 12)) * jnp.uint32(0x297A2D39)
    return place | jnp.uint32(1)
