"""Pre-training: `python -m tinyllama_jax.train --config configs/demo.py --section.key=value ...`."""

from __future__ import annotations

import contextlib
import math
import time

from tinyllama_jax import processes

if __name__ == "__main__":
    processes.supervise("tinyllama_jax.train")  # of several; before the imports that take seconds

import jax
import numpy as np

from tinyllama_jax import checkpoint, cli, dims, metrics, run_folder, seals, sharding, stages, weights, xla
from tinyllama_jax import config as config_lib
from tinyllama_jax.config import Config
from tinyllama_jax.data import feed
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.step import Ahead, Program, build, choose_attention, on_devices, within


def main(argv: list[str]) -> int:
    """Trains to `train.steps`, from the newest checkpoint of the run folder if there is one. Returns the exit code."""
    with contextlib.ExitStack() as at_end:
        stop = at_end.enter_context(processes.stop_on_signal())
        phases = [("imports", time.perf_counter())]
        config = cli.load(argv, __doc__)
        xla.reserve_memory()
        processes.join(config.train.wait)
        xla.keep_compiled(config)
        sources = feed.open_sources(config)
        held_out = feed.open_held_out(config, sources)
        mesh = sharding.make_mesh(config.mesh)
        xla.check_memory(config, mesh)
        at_end.enter_context(jax.set_mesh(mesh))
        program = build(config, mesh, feed.eos_id(config, sources))
        verified = feed.verify(config, [*sources, *held_out.values()], lambda: processes.at(0, "starting"))
        origin, notes = (None, []) if seals.steps_in(config.workdir) else weights.check_origin(config, sources)
        config = weights.resolved(config, origin)
        if first := jax.process_index() == 0:  # who writes what is written once
            at_end.enter_context(run_folder.locked(config.workdir))
            notes += run_folder.open_run(config, weights.described(sources), sources[0].tokenizer)
            notes += seals.recover(config)
        processes.barrier("run folder")
        phases.append(("data and devices", time.perf_counter()))
        checkpoints = at_end.enter_context(checkpoint.Checkpoints(config))
        if (newest := checkpoints.latest()) is None:
            state, came_from = weights.initial_state(config, program, origin)
        else:
            state, came_from = checkpoints.restore(newest, program.state), f"step {newest:,} of {config.workdir}"
        start = int(state.step)
        notes += verified + feed.check_batches(config, sources, start)
        phases.append(("weights", time.perf_counter()))
        writer = metrics.Writer(config, start) if first else metrics.Silent()
        at_end.callback(writer.close)
        progress = metrics.Progress(start, config.train.steps, stop) if first else metrics.Silent()
        at_end.callback(progress.close)
        progress.say("\n".join([*notes, *describe(config, mesh, program, sources, held_out), f"weights: {came_from}"]))
        if start >= config.train.steps:
            progress.say(f"nothing to do: the run is at step {start:,} of {config.train.steps:,}; a larger train.steps goes on")

        rows = feed.rows_here(program.batch.tokens, program.shape, axis=1)
        batches = feed.training(config, sources, program.shape[1], rows, start)
        clock = metrics.Clock(config, start, mesh.size, jax.devices()[0].device_kind)
        reporter = metrics.Reporter(config, sources, writer, progress, clock, start, argv)
        ahead = Ahead(program, config, mesh, np.result_type(*(s.dtype for s in sources)))
        if stop and jax.process_count() == 1:  # several agree on a step first
            progress.say(f"stopped by {stop[0].name} before its first step")
            return 128 + stop[0]
        agreement = processes.Agreement(mesh)
        if origin and held_out:  # the weights as they came
            with clock.spent_on("elsewhere"):
                scores = evaluate(program, config, state.params, held_out, start)
            writer.write(start, scores)
            progress.say(f"step {start:,}: validation loss {scores['val_loss']:.4f}, perplexity {scores['val_perplexity']:.2f}")
        for step in range(start + 1, config.train.steps + 1):
            doing = "starting" if step <= start + 2 else "training"  # the first step is done when the second is under way
            processes.at(step, doing)
            with clock.spent_on("data_wait"):
                batch = on_devices(next(batches), program.batch, program.shape[1])
            processes.at(step, doing)  # a second time: who waits for its data is behind those that wait for it
            state, now = ahead.train(step)(state, batch)
            reporter.report()  # of the step before: fetching its numbers does not hold this one up
            checkpoints.check()
            reporter.pending = (step, now)
            if step == start + 2:
                phases.append(("compilation and first step", time.perf_counter()))
                times = zip(phases, [processes.STARTED, *(at for _, at in phases)], strict=False)
                progress.say("started in: " + ", ".join(f"{what} {at - before:.1f} s" for (what, at), before in times))
            last = step == config.train.steps
            if held_out and (last or step % config.log.eval_every == 0):
                reporter.report(always=True)
                with clock.spent_on("elsewhere"):
                    scores = evaluate(program, config, state.params, held_out, step)
                writer.write(step, scores)
                loss, perplexity = scores["val_loss"], scores["val_perplexity"]
                progress.say(f"step {step:,}: validation loss {loss:.4f}, perplexity {perplexity:.2f}")
            # asked after validation, which can take long: what is left of a grace time is for saving
            stopping = agreement.stop(stop)
            if last or stopping or step % config.checkpoint.every == 0:
                processes.at(step, "saving")
                reporter.report(always=True)
                reporter.remember(step)
                writer.sync()  # what is on disk never lags behind the checkpoint
                with clock.spent_on("checkpoint"):
                    checkpoints.save(step, state)
            if stopping:
                progress.say(f"stopped by {stopping.name} after step {step:,}, which is saved; run the same command to go on")
                return 128 + stopping
        return reporter.end(max(start, config.train.steps))


def describe(
    config: Config, mesh: jax.sharding.Mesh, program: Program, sources: list[Blocks], held_out: dict[str, Blocks]
) -> list[str]:
    """What is about to run, in a few lines: nothing falls back silently."""
    model, (accumulation, batch) = config.model, program.shape
    impl, reason = choose_attention(config, mesh.devices.flat[0])
    said = zip(config.data.sources.items(), sources, strict=True)
    data = ", ".join(f"{config_lib.weight_text(w)} x {p} ({len(s):,} blocks)" for (p, w), s in said)
    return [
        f"model: {dims.n_parameters(model):,} parameters, {model.precision}, "
        f"residual {model.residual_dtype}, remat {model.remat}",
        f"attention: {impl} ({reason}), {within(config)} documents; loss: xla, {model.loss_chunk:,} tokens' logits at a time",
        f"mesh: {dict(mesh.shape)}, {mesh.size} of {jax.device_count()} devices of {jax.devices()[0].device_kind}, "
        f"{jax.local_device_count()} a process",
        f"step: {config.train.tokens_per_step:,} tokens = {accumulation} micro-batches x {batch} sequences x {model.seq_len:,}",
        f"data: {data}",
        *(
            f"warning: of {s.directory} {len(gone):,} files are not there, such as {gone[0]}"
            for s in sources
            if (gone := s.missing())
        ),
        "validation: "
        + (", ".join(f"{p} ({len(b):,} blocks)" for p, b in held_out.items()) or "none: no source has that split")
        + "".join(f"; {p} has no such split" for p in config.data.sources if held_out and p not in held_out),
        *stages.lines(config),
        *stages.epochs(config, sources),
        *xla.lines(config, mesh),
    ]


def evaluate(program: Program, config: Config, params: dict, held_out: dict[str, Blocks], step: int) -> dict[str, float]:
    """Loss (nats a token), perplexity and next-token accuracy over all held-out tokens, and the loss of each source."""
    batch = program.shape[1]
    rows = feed.rows_here(program.eval_batch.length, (batch,), axis=0)
    totals, out = np.zeros(3), {}
    for name, blocks in zip(feed.names(held_out), held_out.values(), strict=True):
        local = feed.validation(blocks, config.data.eval_blocks, batch, rows)
        parts = []
        for part in local:
            parts.append(program.evaluate(params, on_devices(part, program.eval_batch, batch)))
            processes.at(step, "validating")
        loss, correct, tokens = np.sum([[s.loss, s.correct, n] for s, n in jax.device_get(parts)], axis=0, dtype=np.float64)
        totals += loss, correct, tokens
        out[f"val_loss/{name}"] = loss / tokens if tokens else math.nan
    loss, correct, tokens = totals
    if not tokens:  # blocks of a single token
        return {"val_loss": math.nan, "val_perplexity": math.nan, "val_accuracy": math.nan, "val_tokens": 0}
    scores = {"val_loss": loss / tokens, "val_perplexity": math.exp(min(loss / tokens, 700)), "val_accuracy": correct / tokens}
    return {**scores, "val_tokens": int(tokens), **(out if len(out) > 1 else {})}


if __name__ == "__main__":
    processes.run(main)
