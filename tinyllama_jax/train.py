"""Pre-training: `python -m tinyllama_jax.train --config configs/demo.py --section.key=value ...`."""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path

from tinyllama_jax import processes

if __name__ == "__main__":
    processes.supervise("tinyllama_jax.train")  # of several; before the imports that take seconds

import jax
import numpy as np

from tinyllama_jax import checkpoint, dims, hf, metrics, sharding
from tinyllama_jax import config as config_lib
from tinyllama_jax.config import Config, UserError
from tinyllama_jax.data import feed, tokenizer
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.kernels import attention
from tinyllama_jax.step import Batch, Program, TrainState, build


def main(argv: list[str]) -> int:
    """Trains to `train.steps`, from the newest checkpoint of the run folder if there is one. Returns the exit code."""
    with contextlib.ExitStack() as at_end:
        stop = at_end.enter_context(processes.stop_on_signal())
        phases = [("imports", time.perf_counter())]
        config = config_lib.load(argv, __doc__)
        if config.train.deterministic:  # JAX reads it when it first looks for devices
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
        processes.join(config.train.wait)
        keep_compiled(config)
        sources = feed.open_sources(config)
        held_out = feed.open_held_out(config, sources)
        mesh = sharding.make_mesh(config.mesh)
        at_end.enter_context(jax.set_mesh(mesh))
        program, (origin, notes) = build(config, mesh), check_origin(config, sources)
        described = [{"manifest_sha256": s.manifest_sha256, "bos": s.manifest["bos"]} for s in sources]
        if first := jax.process_index() == 0:  # who writes what is written once
            notes += checkpoint.open_run(config, described, Path(next(iter(config.data.sources))) / "tokenizer")
            notes += checkpoint.recover(config)
        processes.barrier("run folder")
        phases.append(("data and devices", time.perf_counter()))
        checkpoints = at_end.enter_context(checkpoint.Checkpoints(config))
        state, came_from = first_state(config, program, checkpoints, origin)
        start = int(state.step)
        phases.append(("weights", time.perf_counter()))
        writer = metrics.Writer(config, start) if first else metrics.Silent()
        at_end.callback(writer.close)
        progress = metrics.Progress(start, config.train.steps) if first else metrics.Silent()
        at_end.callback(progress.close)
        for line in [*notes, *describe(config, mesh, program, sources, held_out), f"weights: {came_from}"]:
            progress.say(line)
        if start >= config.train.steps:
            progress.say(
                f"nothing to do: this run is at step {start:,} of {config.train.steps:,}; a larger train.steps goes on"
            )

        rows = feed.rows_here(program.batch.tokens, program.shape, axis=1)
        batches = feed.training(config, sources, program.shape, rows, start)
        clock = metrics.Clock(config, start, mesh.size, jax.devices()[0].device_kind)
        reporter = metrics.Reporter(config, sources, writer, progress, clock, program.shape)
        if stop and jax.process_count() == 1:  # several agree on a step first
            progress.say(f"stopped by {stop[0].name} before its first step")
            return 128 + stop[0]
        agreement = processes.Agreement(mesh)
        for step in range(start + 1, config.train.steps + 1):
            doing = "starting" if step <= start + 2 else "training"  # the first step is done when the second is under way
            processes.at(step, doing)
            with clock.spent_on("data_wait"):
                batch = on_devices(next(batches), program.batch, program.shape)
            processes.at(step, doing)  # a second time: who waits for its data is behind those that wait for it
            state, now = program.train(state, batch)
            reporter.report()  # of the step before: fetching its numbers does not hold this one up
            reporter.pending = (step, now)
            if step == start + 2:
                phases.append(("compilation and first step", time.perf_counter()))
                times = zip(phases, [processes.STARTED, *(at for _, at in phases)], strict=False)
                progress.say("started in: " + ", ".join(f"{what} {at - before:.1f} s" for (what, at), before in times))
            last = step == config.train.steps
            if held_out and (last or step % config.log.eval_every == 0):
                reporter.report()
                with clock.spent_on("elsewhere"):
                    scores = evaluate(program, config, state.params, held_out, step)
                writer.write(step, scores)
                progress.say(
                    f"step {step:,}: validation loss {scores['val_loss']:.4f}, perplexity {scores['val_perplexity']:.2f}"
                )
            stopping = agreement.stop(
                stop
            )  # asked after validation, which can take long: what is left of a grace time is for saving
            if last or stopping or step % config.checkpoint.every == 0:
                reporter.report()
                writer.sync()  # what is on disk never lags behind the checkpoint
                with clock.spent_on("checkpoint"):
                    checkpoints.save(step, state)
            if stopping:
                progress.say(
                    f"stopped by {stopping.name} after step {step:,}, which is saved; the same command goes on from it"
                )
                return 128 + stopping
    return 0


def keep_compiled(config: Config) -> None:
    """Has compiled programs kept in RUN/compiled, but for a CPU's; to be called once the devices are known.

    With them a run keeps the kernels that XLA chose by timing them, and so its bits, and starts without choosing again.
    """
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(Path(config.workdir).resolve() / "compiled"))
        jax.config.update("jax_persistent_cache_enable_xla_caches", "all")


def check_origin(config: Config, sources: list[Blocks]) -> tuple[Path | None, list[str]]:
    """The folder of `init.from` if this run is to begin with its weights, or None; and what to say of it. Raises UserError."""
    if not config.init.from_ or checkpoint.steps_in(config.workdir):
        return None, []
    origin = Path(config.init.from_)
    is_run = (origin / "checkpoints").is_dir()
    theirs = checkpoint.load_config(origin).model if is_run else hf.load_model(origin)
    notes = checkpoint.check_same_model(config.model, theirs, str(origin))
    if tokenizer.load(origin / "tokenizer" if is_run else origin).sha256 != sources[0].tokenizer_sha256:
        raise UserError(f"--init.from={origin}: its tokenizer is not the one that the data were prepared with")
    return origin, notes


def first_state(
    config: Config, program: Program, checkpoints: checkpoint.Checkpoints, origin: Path | None
) -> tuple[TrainState, str]:
    """The state to begin with, and where it is from: the newest checkpoint, else `init.from` (weights only), else scratch."""
    step = checkpoints.latest()
    if step is not None:
        return checkpoints.restore(step, program.state), f"step {step:,} of {config.workdir}"
    if origin is None:
        return program.init(), f"from scratch (init {config.model.init}, seed {config.train.seed})"
    if (origin / "checkpoints").is_dir():
        params, step = checkpoint.restore_params(origin, program.state.params)
        return program.start(params), f"step {step:,} of {origin}, weights only"
    params, _ = hf.load_folder(origin)
    params = jax.tree.map(lambda a, s: jax.device_put(np.asarray(a, s.dtype), s.sharding), params, program.state.params)
    return program.start(params), f"{origin} (Hugging Face)"


def describe(
    config: Config, mesh: jax.sharding.Mesh, program: Program, sources: list[Blocks], held_out: dict[str, Blocks]
) -> list[str]:
    """What is about to run, in a few lines: nothing falls back silently."""
    model, (accumulation, batch) = config.model, program.shape
    impl, reason = attention.choose(model.attention, model.compute_dtype)
    data = ", ".join(f"{w:g} x {p} ({len(s):,} blocks)" for (p, w), s in zip(config.data.sources.items(), sources, strict=True))
    return [
        f"model: {dims.n_parameters(model):,} parameters, {model.precision}, residual {model.residual}, remat {model.remat}",
        f"attention: {impl} ({reason}); norm: xla; loss: xla, {model.loss_chunk:,} tokens' logits at a time",
        f"mesh: {dict(mesh.shape)} of {jax.devices()[0].device_kind}",
        f"step: {config.train.tokens_per_step:,} tokens = {accumulation} micro-batches x {batch} sequences x {model.seq_len:,}",
        f"data: {data}",
        "validation: "
        + (", ".join(f"{p} ({len(b):,} blocks)" for p, b in held_out.items()) or "none: no source has that split"),
    ]


def on_devices(local: tuple[np.ndarray, np.ndarray], shardings: Batch, shape: tuple[int, ...]) -> Batch:
    """This process's rows (tokens, lengths) as its part of the global batch, whose leading dimensions are `shape`."""
    tokens, length = local
    return Batch(
        jax.make_array_from_process_local_data(shardings.tokens, tokens, (*shape, tokens.shape[-1])),
        jax.make_array_from_process_local_data(shardings.length, length, shape),
    )


def evaluate(program: Program, config: Config, params: dict, held_out: dict[str, Blocks], step: int) -> dict[str, float]:
    """Loss (nats a token), perplexity and next-token accuracy over all held-out tokens, and the loss of each source."""
    batch = program.shape[1]
    rows = feed.rows_here(program.eval_batch.length, (batch,), axis=0)
    totals, out = np.zeros(3), {}
    for path, blocks in held_out.items():
        local = feed.validation(blocks, config.data.eval_blocks, batch, rows)
        parts = []
        for part in local:
            parts.append(program.evaluate(params, on_devices(part, program.eval_batch, (batch,))))
            processes.at(step, "validating")
        loss, correct, tokens = np.sum([[s.loss, s.correct, n] for s, n in jax.device_get(parts)], axis=0, dtype=np.float64)
        totals += loss, correct, tokens
        same_name = [p for p in held_out if Path(p).name == Path(path).name]
        out[f"val_loss/{Path(path).name if len(same_name) == 1 else path}"] = loss / tokens if tokens else math.nan
    loss, correct, tokens = totals
    if not tokens:  # blocks of a single token
        return {"val_loss": math.nan, "val_perplexity": math.nan, "val_accuracy": math.nan, "val_tokens": 0}
    scores = {"val_loss": loss / tokens, "val_perplexity": math.exp(min(loss / tokens, 700)), "val_accuracy": correct / tokens}
    return {**scores, "val_tokens": int(tokens), **(out if len(out) > 1 else {})}


if __name__ == "__main__":
    processes.run(main)
