"""The jitted functions of a run's model and step, with their shardings, donation and XLA options."""

import concurrent.futures
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tinyllama_jax.base import dims, schedule, sharding
from tinyllama_jax.base.config import Config
from tinyllama_jax.core import model, xla
from tinyllama_jax.core.losses import NEXT_TOKEN, Batch, Loss
from tinyllama_jax.core.step import TrainState, new_state, train_step
from tinyllama_jax.kernels import attention
from tinyllama_jax.kernels.cross_entropy import Sums


class Program(NamedTuple):
    """The compiled functions of a run and the shardings of their arguments."""

    init: Callable[[], TrainState]  # from scratch
    start: Callable[[dict], TrainState]  # from given parameters
    train: Callable[[TrainState, Batch], tuple[TrainState, dict]]
    evaluate: Callable[[dict, Batch], tuple[Sums, jax.Array]]  # sums, and the number of tokens they count (fp32)
    token_losses: Callable[[dict, Batch], jax.Array]
    state: TrainState  # of ShapeDtypeStructs with their shardings
    weights: dict  # the parameters that `start` takes, likewise: `state.params` without adapters
    batch: Batch  # of shardings
    eval_batch: Batch
    shape: tuple[int, int]  # (A, B) of a training batch; A of the first steps


def build(config: Config, mesh: jax.sharding.Mesh, loss: Loss = NEXT_TOKEN) -> Program:
    """Returns the functions of a run, jitted for `mesh`; each compiles at its first call. Raises UserError.

    `loss`: minimised by the train step and measured by `evaluate`, whose batches have no `source`. Call this and the functions
    under `jax.set_mesh(mesh)`: without it activations are not sharded.
    """
    impl, _ = choose_attention(config, mesh.devices.flat[0])
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, attention=impl), train=schedule.in_steps(config)
    )
    n_devices = sharding.batch_devices(mesh)
    accumulation = config.accumulation(n_devices)[0]
    by_name = sharding.parameter_shardings(mesh, config.model, config.lora)
    replicated = NamedSharding(mesh, PartitionSpec())

    def fresh() -> TrainState:
        return new_state(model.init(jax.random.key(config.train.seed), config.model), config)

    def place(path, leaf) -> NamedSharding:
        keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path]
        return sharding.state_sharding("/".join(keys), leaf.shape, by_name)

    shapes, whole = jax.eval_shape(fresh), sharding.parameter_shardings(mesh, config.model)
    abstract = lambda p: jax.ShapeDtypeStruct(dims.shape(p, config.model), jnp.float32, sharding=whole[p.name])
    state = jax.tree_util.tree_map_with_path(place, shapes)
    rows, eval_rows = (NamedSharding(mesh, PartitionSpec(*axes, sharding.BATCH)) for axes in ((None,), ()))
    batch = Batch(rows, rows, rows if len(config.data.sources) > 1 else None, **dict.fromkeys(loss.extras, rows))
    eval_batch = Batch(eval_rows, eval_rows, **dict.fromkeys(loss.extras, eval_rows))

    def evaluate(params: dict, micro: Batch) -> tuple[Sums, jax.Array]:
        return loss.sums(params, micro, config), loss.predicted(micro, config).sum().astype(jnp.float32)

    def token_losses(params: dict, micro: Batch) -> jax.Array:
        return loss.token_losses(params, micro, config)

    jit = partial(jax.jit, compiler_options=xla.compiler_options(config, mesh))
    return Program(
        init=jit(fresh, out_shardings=state),
        start=jit(lambda params: new_state(params, config), in_shardings=(model.unflatten(whole),), out_shardings=state),
        train=jit(
            lambda s, b: train_step(s, b, config, loss),
            in_shardings=(state, batch),
            out_shardings=(state, replicated),
            donate_argnums=0,
        ),
        evaluate=jit(evaluate, in_shardings=(state.params, eval_batch), out_shardings=replicated),
        token_losses=jit(token_losses, in_shardings=(state.params, eval_batch), out_shardings=replicated),
        state=jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, state),
        weights=model.unflatten({p.name: abstract(p) for p in dims.PARAMETERS}),
        batch=batch,
        eval_batch=eval_batch,
        shape=(accumulation, config.train.seqs_per_device * n_devices),
    )


class CompiledStep(NamedTuple):
    """`Program.train`, compiled."""

    compiled: jax.stages.Compiled
    source: str  # `xla.fingerprint` of what was compiled

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        """The state after a step, and its metrics."""
        return self.compiled(state, batch)


class StepCompiler:
    """Compiles the train step for each batch size of `train.batch_ramp`, in the background before the run gets there."""

    NOTICE = 200  # steps ahead

    def __init__(self, program: Program, config: Config, mesh: jax.sharding.Mesh, dtype: np.dtype):
        """`dtype`: of the tokens."""
        self._program, self._seq_len, self._mesh, self._dtype = program, config.model.seq_len, mesh, dtype
        self._train = schedule.in_steps(config)
        # on exit Python waits for a running compilation, a minute at most
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._steps: dict[int, CompiledStep | concurrent.futures.Future] = {}

    def train(self, step: int) -> CompiledStep:
        """Returns the compiled function for `step`, like `Program.train`. Starts to compile the one that is needed next."""
        accumulation = self._accumulation(self._train.tokens_after(step) - self._train.tokens_after(step - 1))
        if accumulation not in self._steps:  # the first one
            self._steps[accumulation] = self._compile(accumulation)
        for first, _, tokens in self._train.stages:
            soon = self._accumulation(tokens)
            if step <= first < min(step + self.NOTICE, self._train.steps) and soon not in self._steps:
                self._steps[soon] = self._pool.submit(self._compile, soon)
        if isinstance(self._steps[accumulation], concurrent.futures.Future):
            self._steps[accumulation] = self._steps[accumulation].result()
        return self._steps[accumulation]

    def _accumulation(self, tokens: int) -> int:
        return tokens // (self._seq_len * self._program.shape[1])

    def _compile(self, accumulation: int) -> CompiledStep:
        with jax.set_mesh(self._mesh):  # each thread has its own mesh
            batch = shape_of_batch(self._program, self._seq_len, accumulation, self._dtype)
            lowered = self._program.train.lower(self._program.state, batch)
            return CompiledStep(lowered.compile(), xla.fingerprint(lowered))


def shape_of_batch(program: Program, seq_len: int, accumulation: int = 0, dtype: jnp.dtype = jnp.uint16) -> Batch:
    """Returns the shapes of a batch of `program.train`, to compile it without data.

    `accumulation`: A; 0: that of the first steps. `dtype` of tokens: uint16 for vocabularies of up to 65,536, or int32.
    """
    shape = (accumulation or program.shape[0], program.shape[1])
    wide = (*shape, seq_len + 1)
    kinds = Batch((wide, dtype), (shape, jnp.int32), (shape, jnp.int32), (wide, jnp.uint8), (wide, jnp.float32))
    make = lambda sharding, kind: jax.ShapeDtypeStruct(*kind, sharding=sharding) if sharding else None
    return Batch(*map(make, program.batch, kinds))


def on_devices(local: tuple[np.ndarray | None, ...], shardings: Batch, batch: int) -> Batch:
    """Makes the global (micro-)batch of `batch` sequences from this process's rows of each field."""

    def place(sharding: NamedSharding | None, part: np.ndarray | None) -> jax.Array | None:
        if sharding is None:
            return None
        b = len(sharding.spec) - 1  # the axis of sequences
        return jax.make_array_from_process_local_data(sharding, part, (*part.shape[:b], batch, *part.shape[b + 1 :]))

    return Batch(*map(place, shardings, Batch(*local)))


def choose_attention(config: Config, device: jax.Device) -> tuple[str, str]:
    """Chooses the attention of `config` on `device`; returns it with the reason. Raises UserError."""
    model, shape = config.model, {"seq_len": config.model.seq_len, "head_dim": config.model.d_head}
    return attention.choose(model.attention, model.compute_dtype, device, **shape, segments=config.data.document_mask)


def attention_scope(config: Config) -> str:
    """Whether attention crosses document boundaries: "within" or "across"."""
    return "within" if config.data.document_mask else "across"
