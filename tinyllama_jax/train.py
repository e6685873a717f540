"""Pre-training: `python -m tinyllama_jax.train --config configs/demo.py --section.key=value ...`."""

import contextlib
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends at once, without a traceback

from tinyllama_jax.run import supervise

if __name__ == "__main__":
    supervise.supervise("tinyllama_jax.train")  # of several processes; before the imports, which take seconds

from collections.abc import Iterator

import jax

from tinyllama_jax.base import cli, sharding
from tinyllama_jax.base.config import Config
from tinyllama_jax.core import xla
from tinyllama_jax.core.losses import Batch, for_data
from tinyllama_jax.core.program import Program, StepCompiler, build, on_devices
from tinyllama_jax.data import feed
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.evals import in_training
from tinyllama_jax.planning import targets
from tinyllama_jax.run import bucket, cluster, initialize
from tinyllama_jax.run import folder as run_folder
from tinyllama_jax.run.checkpoint import Checkpoints
from tinyllama_jax.run.log import Log
from tinyllama_jax.run.progress import Startup
from tinyllama_jax.run.stages import describe


def main(argv: list[str]) -> int:
    """Trains to `train.steps`, from the newest checkpoint of the run folder if there is one. Returns the exit code."""
    with contextlib.ExitStack() as at_end:
        # -- the configuration, and the other processes
        startup, stop = Startup(supervise.imports), at_end.enter_context(cluster.stop_on_signal())
        config = cli.load(argv, __doc__)
        xla.reserve_memory()
        cluster.join(config.train.wait)
        copied = at_end.enter_context(bucket.opened(config))
        xla.keep_compiled(config)

        # -- the data, the devices, the functions to compile, the run folder
        sources = feed.open_sources(config)
        config, notes = feed.in_epochs(config, sources)
        held_out = feed.open_held_out(config, sources)
        mesh = sharding.make_mesh(config.mesh)
        xla.check_memory(config, mesh)
        at_end.enter_context(jax.set_mesh(mesh))
        program = build(config, mesh, for_data(sources[0].kind, feed.eos_id(config, sources)))
        notes += feed.verify(config, [*sources, *held_out.values()], lambda: cluster.heartbeat(0, "starting"))
        config, origin, more = initialize.find_origin(config, sources)
        tasks = in_training.find_tasks(config, sources)
        notes += more + at_end.enter_context(run_folder.opened(config, initialize.described(sources), sources[0].tokenizer))
        startup.mark("data and devices")

        # -- the state: of the newest checkpoint, of another run, or from scratch
        checkpoints = at_end.enter_context(Checkpoints(config))
        state, came_from = initialize.restore_or_initialize(checkpoints, config, program, origin)
        start = int(state.step)
        notes += initialize.check_batches(config, sources, start)
        startup.mark("weights")
        log = at_end.enter_context(Log(config, sources, mesh.size, start, argv=argv, stop=stop, startup=startup,
                                       peak_flops=targets.peak_flops))  # fmt: skip
        log.say("\n".join([*copied, *notes, *describe(config, mesh, program, sources, held_out), f"weights: {came_from}"]))
        if start >= config.train.steps:
            log.say(f"nothing to do: the run is at step {start:,} of {config.train.steps:,}; raise train.steps or train.epochs")
        agreement = cluster.Agreement(mesh, stop, checkpoints, log.profiler.asked)
        scores = in_training.Scores(config, program, held_out, tasks, log, agreement)
        scores.before(start, state.params, came=bool(origin))
        if stopping := agreement.signal():
            log.say(f"{cluster.stopped_by(stopping)} before its first step", "stop")
            return 128 + stopping

        # -- the steps
        batches = training_batches(config, sources, program, start, log)
        compiler = StepCompiler(program, config, mesh, feed.dtype(sources))
        for step, batch in enumerate(batches, start + 1):
            state, metrics = compiler.train(step)(state, batch)
            log.step(step, metrics, compiler.train(step))
            checkpoints.check()
            scores.after(step, state.params)  # may take long, so that processes agree after it
            agreed = log.agreed(step, agreement.after(step == config.train.steps or step % config.checkpoint.every == 0))
            if agreed.save:
                cluster.heartbeat(step, "saving")
                log.sync(step)
                with log.timed("saving"):
                    checkpoints.save(step, state)
                    checkpoints.check(wait=bool(agreed.stopping) or step == config.train.steps)
            if agreed.stopping:
                log.say(f"{cluster.stopped_by(agreed.stopping)} after step {step:,}, {checkpoints.outcome(step)}", "stop")
                return 128 + agreed.stopping
        return log.end(max(start, config.train.steps))


def training_batches(config: Config, sources: list[Blocks], program: Program, start: int, log: Log) -> Iterator[Batch]:
    """The global batches of the steps after `start`, on the devices."""
    rows = feed.rows_here(program.batch.tokens, program.shape, axis=1)
    local = feed.training(config, sources, program.shape[1], rows, start)
    for step in range(start + 1, config.train.steps + 1):
        for line in feed.news(sources):
            log.say(line)
        doing = "starting" if step <= start + 2 else "training"  # the first step is done when the second is under way
        with log.profiler.step(step):  # until the next batch is asked for
            cluster.heartbeat(step, doing)
            with log.timed("data_wait"):
                batch = on_devices(next(local), program.batch, program.shape[1])
            cluster.heartbeat(step, doing)  # again: a process that waits for its data is behind those that wait for it
            yield batch
    for line in feed.news(sources, last=True):
        log.say(line)


if __name__ == "__main__":
    supervise.run(main)
