"""The train step and the evaluation step: loss, accumulation, update, and both jitted for a mesh in one place."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import jmp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from tinyllama_jax import model, optim, sharding, xla
from tinyllama_jax.config import Bos, Config
from tinyllama_jax.data import skip as skip_lib
from tinyllama_jax.kernels import attention
from tinyllama_jax.kernels.cross_entropy import Sums, chunk_of, cross_entropy, none
from tinyllama_jax.kernels.cross_entropy import token_losses as head_losses

FIRST_LOSS_SCALE = 2.0**15  # fp16 only; halves on each overflow, doubles after 2,000 steps without one


@chex.dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step. The data need no state: the batch is a function of the step."""

    step: jax.Array  # int32: steps done
    params: dict
    opt_state: tuple
    loss_scale: dict  # fp16 compute only: jmp's dynamic loss scale and its counter; else empty
    skipped: jax.Array  # int32: steps that were not finite and so changed nothing


class Batch(NamedTuple):
    """One step's blocks: `tokens` [A, B, S + 1] and `length` [A, B], the real tokens in each (the rest is padding).

    A micro-batches of B sequences over all devices. Evaluation takes them without A.
    """

    tokens: jax.Array
    length: jax.Array
    source: jax.Array | None = None  # [A, B] int32: which source each is of, if there are several in training


def shape_of_batch(program: Program, seq_len: int, accumulation: int = 0, dtype: jnp.dtype = jnp.uint16) -> Batch:
    """What `program.train` takes, to compile it without data.

    `accumulation`: A; 0: of the first steps. `dtype` of tokens: uint16, as those of up to 65,536 pieces are stored, or int32.
    """
    shape = (accumulation or program.shape[0], program.shape[1])
    kinds = Batch(((*shape, seq_len + 1), dtype), (shape, jnp.int32), (shape, jnp.int32))
    make = lambda sharding, kind: jax.ShapeDtypeStruct(*kind, sharding=sharding) if sharding else None
    return Batch(*map(make, program.batch, kinds))


def on_devices(local: tuple[np.ndarray | None, ...], shardings: Batch, batch: int) -> Batch:
    """This process's rows (tokens, lengths, sources) as its part of the global (micro-)batch of `batch` sequences."""

    def place(sharding: NamedSharding | None, part: np.ndarray | None) -> jax.Array | None:
        if sharding is None:
            return None
        b = len(sharding.spec) - 1  # the axis of sequences
        return jax.make_array_from_process_local_data(sharding, part, (*part.shape[:b], batch, *part.shape[b + 1 :]))

    return Batch(*map(place, shardings, (*local, None)))


class Program(NamedTuple):
    """The compiled functions of a run and where their arguments live."""

    init: Callable[[], TrainState]  # from scratch
    start: Callable[[dict], TrainState]  # from given parameters
    train: Callable[[TrainState, Batch], tuple[TrainState, dict]]
    evaluate: Callable[[dict, Batch], tuple[Sums, jax.Array]]
    token_losses: Callable[[dict, Batch], jax.Array]
    state: TrainState  # of ShapeDtypeStructs with their shardings
    batch: Batch  # of shardings
    eval_batch: Batch
    shape: tuple[int, int]  # (A, B) of a training batch; A of the first steps


class Ahead:
    """The train step for each number of micro-batches that a run comes to (`train.batch_ramp`), compiled before it does."""

    NOTICE = 200  # steps before it is needed that one is compiled, in the background

    def __init__(self, program: Program, config: Config, mesh: jax.sharding.Mesh, dtype: np.dtype):
        """`dtype`: of the tokens."""
        self._program, self._seq_len, self._mesh, self._dtype = program, config.model.seq_len, mesh, dtype
        self._train = skip_lib.in_steps(config)
        self._pool = concurrent.futures.ThreadPoolExecutor(1)  # at its end Python waits for a compilation: a minute at most
        self._steps: dict[int, Callable | concurrent.futures.Future] = {}

    def train(self, step: int) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
        """What does `step`, as `Program.train`; what a step soon will need is begun."""
        now = self._accumulation(self._train.tokens_after(step) - self._train.tokens_after(step - 1))
        self._steps.setdefault(now, self._program.train)  # the first: compiled when it is called
        for first, _, tokens in self._train.stages:
            soon = self._accumulation(tokens)
            if step <= first < min(step + self.NOTICE, self._train.steps) and soon not in self._steps:
                self._steps[soon] = self._pool.submit(self._compile, soon)
        if isinstance(self._steps[now], concurrent.futures.Future):
            self._steps[now] = self._steps[now].result()
        return self._steps[now]

    def _accumulation(self, tokens: int) -> int:
        return tokens // (self._seq_len * self._program.shape[1])

    def _compile(self, accumulation: int) -> Callable:
        with jax.set_mesh(self._mesh):  # of each thread its own
            batch = shape_of_batch(self._program, self._seq_len, accumulation, self._dtype)
            return self._program.train.lower(self._program.state, batch).compile()


def new_state(params: dict, config: Config) -> TrainState:
    """The state before the first step."""
    fp16 = config.model.compute_dtype == "float16"
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optim.adamw(config).init(params),
        loss_scale={"scale": jnp.float32(FIRST_LOSS_SCALE), "counter": jnp.int32(0)} if fp16 else {},
        skipped=jnp.int32(0),
    )


def scaler(state: TrainState) -> jmp.LossScale:
    """The loss scale in force: jmp's dynamic one for fp16, whose smallest number is 6e-8; none for bf16 and fp32."""
    if not state.loss_scale:
        return jmp.NoOpLossScale()
    return jmp.DynamicLossScale(state.loss_scale["scale"], state.loss_scale["counter"])


def loss_sums(
    params: dict, batch: Batch, config: Config, sequences_per_device: int, eos_id: int | None = None
) -> tuple[Sums, jax.Array]:
    """Summed next-token loss (nats, fp32; as `rows`, of each source) and hits of `batch` [B, S + 1], and the tokens predicted.

    Padding is neither counted nor trained on: position s counts if `counts` says so.
    """
    with jax.numpy_dtype_promotion("strict"):
        cfg, tokens_BS = config.model, batch.tokens.astype(jnp.int32)
        labels_BS = tokens_BS[:, 1:]
        real_BS = counts(batch, left_out(config, eos_id)).astype(jnp.float32)
        x_BSD = model.hidden(params, tokens_BS[:, :-1], cfg, documents(tokens_BS[:, :-1], config, eos_id))
        kernel_XDV = sharding.copies(params["lm_head"]["kernel"], "DV", cfg.compute_dtype, cfg.reduce_dtype)
        chunk = chunk_of(cfg.seq_len, sequences_per_device, cfg.loss_chunk)
        # a loss for each of the X parts of the batch: the head's gradient crosses devices once, not once in every chunk
        split = lambda a: a.reshape(len(kernel_XDV), -1, *a.shape[1:])
        head = partial(cross_entropy, chunk=chunk, z_loss=config.train.z_loss)
        losses = jax.vmap(head)(split(x_BSD), kernel_XDV, split(labels_BS), split(real_BS))
        by_source = sum_by_source(losses.rows.reshape(-1), batch.source, len(config.data.sources))
        return Sums(*map(jnp.sum, losses[:3]), by_source), real_BS.sum()


def sum_by_source(values: jax.Array, source: jax.Array | None, n_sources: int) -> jax.Array | None:
    """`values` of sequences added up for each source [n_sources], if it is known of which they are."""
    if source is None:
        return None
    return jnp.stack([jnp.where(source == j, values, 0).sum() for j in range(n_sources)])


def token_losses(params: dict, batch: Batch, config: Config, sequences_per_device: int, eos_id: int | None = None) -> jax.Array:
    """Loss (nats, fp32) of each next token of `batch` [B, S + 1]: [B, S]. That of padding is there too and means nothing."""
    with jax.numpy_dtype_promotion("strict"):
        cfg, tokens_BS = config.model, batch.tokens.astype(jnp.int32)
        x_BSD = model.hidden(params, tokens_BS[:, :-1], cfg, documents(tokens_BS[:, :-1], config, eos_id))
        kernel_DV = jmp.get_policy(cfg.precision).cast_to_compute(params["lm_head"]["kernel"])
        return head_losses(x_BSD, kernel_DV, tokens_BS[:, 1:], chunk_of(cfg.seq_len, sequences_per_device, cfg.loss_chunk))


def documents(tokens_BS: jax.Array, config: Config, eos_id: int | None) -> jax.Array | None:
    """Segment ids [B, S] for attention: of each token the number of documents that end before it in its block.

    `eos_id`: what ends a document, or a `Bos`, which begins one.
    """
    if eos_id is None or not config.data.document_mask:
        return None
    edges_BS = (tokens_BS == jnp.int32(eos_id)).astype(jnp.int32)
    return jnp.cumsum(edges_BS, axis=1) - (0 if isinstance(eos_id, Bos) else edges_BS)


def left_out(config: Config, eos_id: int | None) -> int | None:
    """The token after which the prediction does not count: eos under `data.eod_mask_loss`, else None."""
    return eos_id if config.data.eod_mask_loss else None


def counts(batch: Batch, left_out: int | None = None) -> jax.Array:
    """Whether position s counts, bool [..., S]: if token s + 1 is real and token s is not `left_out`."""
    tokens = batch.tokens[..., :-1]
    real = jnp.arange(1, tokens.shape[-1] + 1, dtype=jnp.int32) < batch.length[..., None]
    return real if left_out is None else real & (tokens != left_out)


def gradients(state: TrainState, batch: Batch, config: Config, eos_id: int | None = None) -> tuple[Sums, dict]:
    """Loss sums over all micro-batches, and the gradient of the mean loss over the step's real tokens (times the loss scale).

    The mean is over the whole step: a micro-batch with padding does not weigh more per token than another.
    """
    n_tokens = count_tokens(batch, left_out(config, eos_id))

    def micro_batch(params: dict, micro: Batch) -> tuple[jax.Array, Sums]:
        sums, _ = loss_sums(params, micro, config, config.train.seqs_per_device, eos_id)
        return scaler(state).scale((sums.loss + sums.z) / n_tokens), sums

    differentiate = jax.value_and_grad(micro_batch, has_aux=True)
    if batch.tokens.shape[0] == 1:
        (_, sums), grads = differentiate(state.params, jax.tree.map(lambda a: a[0], batch))
        return sums, grads

    def add(total, micro):
        (_, sums), grads = differentiate(state.params, micro)
        return jax.tree.map(jnp.add, total, (sums, grads)), None

    no_sums = none(len(config.data.sources))
    zeros = jax.tree.map(jnp.zeros_like, (no_sums if batch.source is not None else no_sums._replace(rows=None), state.params))
    return lax.scan(add, zeros, batch)[0]


def train_step(
    state: TrainState, batch: Batch, config: Config, eos_id: int | None = None
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step over all A micro-batches, and its metrics as scalars.

    If the loss, any gradient or any parameter after the update is not finite, weights and moments stay as they were, `skipped`
    counts it, and the step counter moves on to the next batch. A step without a token to predict changes nothing either; its
    loss is NaN, and `skipped` does not count it.
    """
    sums, grads = gradients(state, batch, config, eos_id)
    scale = scaler(state)
    grads = scale.unscale(grads)
    after = left_out(config, eos_id)
    n_tokens, predicts = count_tokens(batch, after), (predicted(batch, after) > 0).any()
    mean = lambda total: jnp.where(predicts, total / n_tokens, jnp.nan)
    step = state.step + 1
    params, opt_state, metrics = optim.update(grads, state.opt_state, state.params, step, config)
    # squares of finite gradients can still overflow
    finite = jmp.all_finite((sums.loss, grads, metrics["grad_norm"], params)) | ~predicts
    learns, scale_after = finite & predicts, scale.adjust(finite)
    loss_scale = {"scale": scale_after.loss_scale, "counter": scale_after.counter} if state.loss_scale else {}
    new = TrainState(
        step=step,
        params=jmp.select_tree(learns, params, state.params),
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
        **({} if batch.source is None else by_source(sums.rows, batch, after)),
        "checksum": checksum(batch),
    }
    return new, metrics


def by_source(losses: jax.Array, batch: Batch, left_out: int | None) -> dict[str, jax.Array]:
    """Mean loss and tokens predicted of each source [n_sources]; NaN where there are none."""
    tokens = sum_by_source(predicted(batch, left_out).astype(jnp.float32), batch.source, len(losses))
    return {"source_loss": losses / tokens, "source_tokens": tokens}


def predicted(batch: Batch, left_out: int | None = None) -> jax.Array:
    """Tokens predicted in each sequence, int32 [A, B]: how many positions of it count."""
    return jnp.maximum(batch.length - 1, 0) if left_out is None else counts(batch, left_out).sum(-1, dtype=jnp.int32)


def count_tokens(batch: Batch, left_out: int | None = None) -> jax.Array:
    """Tokens predicted in the batch, at least 1, as fp32 (exact below 2^24 = 16.8 M)."""
    return jnp.maximum(predicted(batch, left_out).sum(), 1).astype(jnp.float32)


def checksum(batch: Batch) -> jax.Array:
    """uint32 over the real tokens of the global batch and their places in it; the same for any split over devices."""
    tokens = batch.tokens.astype(jnp.uint32)
    width = tokens.shape[-1]
    # [A, B, W] as it lies, for [A B, W] would bring all tokens to every device
    iota = partial(lax.broadcasted_iota, jnp.uint32, tokens.shape)
    row = sum(iota(i) * jnp.uint32(math.prod(tokens.shape[i + 1 : -1])) for i in range(tokens.ndim - 1))
    place = row * jnp.uint32(width) + iota(tokens.ndim - 1)
    real = jnp.arange(width) < batch.length[..., None]
    return jnp.where(real, (tokens + 1) * weight_of(place), jnp.uint32(0)).sum(dtype=jnp.uint32)


def weight_of(place: jax.Array) -> jax.Array:
    """An odd uint32 for each place, for checksums: no change of one element leaves a sum of such products as it was."""
    place = (place ^ (place >> 15)) * jnp.uint32(0x2C1B3C6D)  # spread the bits (constants: hash prospector, C. Wellons)
    place = (place ^ (place >> 12)) * jnp.uint32(0x297A2D39)
    return place | jnp.uint32(1)


def choose_attention(config: Config, device: jax.Device) -> tuple[str, str]:
    """The implementation of attention that a step of `config` has on `device`, and why. Raises UserError."""
    model, shape = config.model, {"seq_len": config.model.seq_len, "head_dim": config.model.d_head}
    return attention.choose(model.attention, model.compute_dtype, device, **shape, segments=config.data.document_mask)


def within(config: Config) -> str:
    """How attention stands to documents, for a line that says so."""
    return "within" if config.data.document_mask else "across"


def build(config: Config, mesh: jax.sharding.Mesh, eos_id: int | None = None) -> Program:
    """Jit everything for `mesh`: the one place where shardings, donation and XLA's options are put on. Raises UserError.

    `eos_id`: what ends or begins a document, for `data.document_mask` and `data.eod_mask_loss`.
    """
    impl, _ = choose_attention(config, mesh.devices.flat[0])
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, attention=impl), train=skip_lib.in_steps(config)
    )
    n_devices = sharding.batch_devices(mesh)
    accumulation = config.accumulation(n_devices)[0]
    by_name = sharding.parameter_shardings(mesh, config.model)
    replicated = NamedSharding(mesh, PartitionSpec())

    def fresh() -> TrainState:
        return new_state(model.init(jax.random.key(config.train.seed), config.model), config)

    def place(path, leaf) -> NamedSharding:
        keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path]
        return sharding.state_sharding("/".join(keys), leaf.shape, by_name)

    shapes = jax.eval_shape(fresh)
    state = jax.tree_util.tree_map_with_path(place, shapes)
    rows, eval_rows = (NamedSharding(mesh, PartitionSpec(*axes, sharding.BATCH)) for axes in ((None,), ()))
    batch = Batch(rows, rows, rows if len(config.data.sources) > 1 else None)
    eval_batch = Batch(eval_rows, eval_rows)

    def evaluate(params: dict, micro: Batch) -> tuple[Sums, jax.Array]:
        return loss_sums(params, micro, config, config.train.seqs_per_device, eos_id)

    def losses(params: dict, micro: Batch) -> jax.Array:
        return token_losses(params, micro, config, config.train.seqs_per_device, eos_id)

    jit = partial(jax.jit, compiler_options=xla.compiler_options(config, mesh))
    return Program(
        init=jit(fresh, out_shardings=state),
        start=jit(lambda params: new_state(params, config), in_shardings=(state.params,), out_shardings=state),
        train=jit(
            lambda s, b: train_step(s, b, config, eos_id),
            in_shardings=(state, batch),
            out_shardings=(state, replicated),
            donate_argnums=0,
        ),
        evaluate=jit(evaluate, in_shardings=(state.params, eval_batch), out_shardings=replicated),
        token_losses=jit(losses, in_shardings=(state.params, eval_batch), out_shardings=replicated),
        state=jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, state),
        batch=batch,
        eval_batch=eval_batch,
        shape=(accumulation, config.train.seqs_per_device * n_devices),
    )
