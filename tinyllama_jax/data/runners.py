"""Who does the work of data preparation: Apache Beam in processes on this machine, or on Dask, Dataflow, Flink or Spark.

Whatever runs it, this process only waits: for DIR.partial/done to fill, for a line in DIR.partial/failed, or for Beam to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import logging
import os
import pickle
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import rich.console
import rich.progress

from tinyllama_jax import cli
from tinyllama_jax.data import duplicates, shards, store
from tinyllama_jax.data.shards import Job, Shard
from tinyllama_jax.data.store import Place
from tinyllama_jax.errors import UserError

DIRECT = "direct"
RUNNERS = {  # what is said -> what Beam calls it, the module it needs, and what to install for it
    DIRECT: ("", "apache_beam", ""),
    "dask": ("apache_beam.runners.dask.dask_runner.DaskRunner", "distributed", "dask distributed"),
    "dataflow": ("DataflowRunner", "google.cloud.dataflow_v1beta3", "apache-beam[gcp]"),
    "flink": ("FlinkRunner", "apache_beam", ""),
    "spark": ("SparkRunner", "apache_beam", ""),
}
TITLES = {"looked": "looking for copies", "copies": "comparing", "done": "tokenising"}  # of the stages of a job
LINES = 10, 60  # seconds between lines where there is no terminal: in the first minute, and after it
ALONE = 60  # seconds that Dask may be without any worker
LATE = 90  # seconds until a file that was written on another machine is seen on this one, at the most


def options(runner: str, rest: list[str]) -> list[str]:
    """Beam's options for `runner`, `rest` among them; none if it is this machine.

    Raises UserError on a runner that is not known or not installed, and on an option that is not Beam's.
    """
    short = runner.lower().removesuffix("runner")  # Beam's own direct runner would first try to download another one
    runner = short if short in RUNNERS else runner
    if runner == DIRECT:
        if rest:
            raise UserError(f"{rest[0]}: no such option; see --help")
        return []
    if runner not in RUNNERS and "." not in runner and not runner.endswith("Runner"):
        raise UserError(f"--runner {runner}: no such runner; there are {', '.join(RUNNERS)}")
    name, module, packages = RUNNERS.get(runner, (runner, "apache_beam", ""))
    if not _installed(module):
        raise UserError(f"--runner {runner}: takes `pip install {packages}`, here and on its workers")
    if runner == "dask" and not any(o.startswith(("--dask_npartitions", "--dask_partition_size")) for o in rest):
        rest = ["--dask_partition_size=1", *rest]  # Beam gives a worker 128 at once, and all at once if there are fewer
    if runner not in ("flink", "spark"):  # whose job server knows options that Python does not
        _check(runner, name, rest)
    return [f"--runner={name}", *rest]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


def _check(runner: str, name: str, rest: list[str]) -> None:
    """Raises UserError on an option that Beam does not know, which it would leave out with a warning."""
    with _quiet():
        from apache_beam.options.pipeline_options import PipelineOptions

        if "." in name and _installed(name.rpartition(".")[0]):
            importlib.import_module(name.rpartition(".")[0])  # which brings options of its own
        try:
            parsed = PipelineOptions(rest)
            known = parsed.get_all_options()
        except SystemExit:  # argparse has said what is wrong
            raise UserError(f"--runner {runner}: Beam does not take {' '.join(rest)}") from None
        for option in sorted(set(parsed.get_all_options(retain_unknown_options=True)) - set(known)):
            raise UserError(f"--{option}: no such option, of this command or of Beam's with --runner {runner}; see --help")


def run(job: Job, left: list[Shard], workers: int, beam_options: list[str]) -> None:
    """Makes the shards, or does what comes before that (`job.stage`). Raises UserError with what stopped a worker."""
    # the names of SlimPajama's 59,166 files alone are 10 MB, all that Dataflow takes in a request; 2 MB so
    work = [zlib.compress(pickle.dumps(shard)) for shard in left]
    try:
        if workers > 1 or beam_options:
            _apart(job, work, workers, beam_options, {f"{shard.file}.json" for shard in left})
        else:
            with _quiet():
                pipeline(job, work, workers, [])
    except Exception:
        for name in sorted(store.names(job.failed)):
            raise UserError(store.read(job.failed / name).decode().strip()) from None
        raise


def pipeline(job: Job, work: list[bytes], workers: int, beam_options: list[str], died: str = "", alone: float = ALONE) -> None:
    """The Beam pipeline: on this machine in `workers` processes, or where `beam_options` say. Raises whatever Beam does.

    `died`: file that is written if one of those processes ends. `alone`: seconds that Dask may be without any worker.
    """
    import apache_beam as beam  # takes a second, and warns of what is not installed
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    runner, parsed = None, PipelineOptions(beam_options)
    if not beam_options:
        environment = None  # a worker in this process
        if workers > 1:
            environment = SubprocessSDKEnvironment.from_command_string(
                f"{shlex.quote(sys.executable)} -m apache_beam.runners.worker.sdk_worker_main || "
                f"echo a worker process died with exit code $?: out of memory, or killed > {shlex.quote(died)}"
            )
        # not "DirectRunner", which first tries to download another one
        runner, parsed = FnApiRunner(environment), PipelineOptions([], direct_num_workers=workers)
    p = beam.Pipeline(runner, parsed)
    work = p | beam.Create(work) | beam.Reshuffle()
    if job.stage == "copies":
        rows = work | "rows" >> beam.FlatMap(functools.partial(duplicates.rows_of, job)) | "keys" >> beam.GroupByKey()
        pairs = rows | "pairs" >> beam.FlatMap(functools.partial(duplicates.pairs_of, job)) | "shards" >> beam.GroupByKey()
        _ = pairs | beam.Map(functools.partial(duplicates.settle, job))
    else:
        _ = work | beam.Map(functools.partial(duplicates.make if job.stage == "looked" else shards.make, job))
    result = p.run()
    if f"--runner={RUNNERS['dask'][0]}" in beam_options:
        _wait_for_dask(result, alone)
    else:
        result.wait_until_finish()


def _wait_for_dask(result: object, alone: float) -> None:
    """Dask gives a lost worker's shards to the others, and would wait for ever if there are none."""
    seen = time.monotonic()
    while True:
        try:
            result.wait_until_finish(duration=min(5_000, alone * 500))
            lost = any(future.status != "finished" for future in result.futures)  # which Beam takes for the end, too
        except asyncio.CancelledError:
            lost = True
        except TimeoutError:
            if result.client.scheduler_info(n_workers=1)["workers"]:
                seen = time.monotonic()
            elif time.monotonic() > seen + alone:
                raise UserError(f"the cluster has had no worker for {alone:g} s: start some") from None
            continue
        if lost:
            raise UserError("lost the scheduler, or somebody cancelled the job")
        return


def _apart(job: Job, work: list[bytes], workers: int, beam_options: list[str], awaited: set[str]) -> None:
    """`pipeline` in a process of its own: Beam would wait for ever for a worker that died, and survive Ctrl-C.

    Ends when all files of the names `awaited` are in the folder of records.
    """
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    start = "import pickle, sys, tinyllama_jax.data.runners as m; m.pipeline(*pickle.load(sys.stdin.buffer))"
    with tempfile.TemporaryDirectory(prefix="prepare-") as scratch:
        log, died = Path(scratch, "log"), Path(scratch, "died")
        if beam_options:
            print(f"what Beam says goes to {log}", file=sys.stderr)
        with open(log, "wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-c", start],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "TMPDIR": scratch},  # Beam leaves folders behind
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            with child.stdin:
                pickle.dump((job, work, workers, beam_options, str(died), ALONE), child.stdin)
            import tensorflow_datasets  # noqa: F401  `folder.finish` wants it: now, while there is nothing to do but wait

            ended = None
            while not awaited.issubset(store.names(job.records)):
                if died.is_file() or store.names(job.failed):
                    raise UserError(died.read_text().strip() if died.is_file() else "see DIR.partial/failed")
                if ended and (child.returncode or not beam_options or time.monotonic() > ended + LATE):
                    raise _failure(job, log.read_text(errors="replace"), child.returncode, beam_options)
                if ended is None and child.poll() is not None:
                    ended = time.monotonic()
                    continue  # it may have written the last file after we looked
                time.sleep(_interval(job.folder, 0.05))
            if beam_options:  # it says to its cluster that all is well
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # nothing is lost: files appear when they are whole
            child.wait()


def _failure(job: Job, log: str, code: int, beam_options: list[str]) -> Exception:
    """What to raise when Beam has ended and shards are missing."""
    if not beam_options and code < 0:
        name = signal.Signals(-code).name
        return UserError(f"the process that leads the workers was killed by {name}: out of memory? Run this again to go on")
    if not beam_options:
        return RuntimeError(f"the pipeline failed:\n{log[-4_000:]}")
    where = job.folder / "log"
    store.write(where, log)
    ours = f"{UserError.__module__}.{UserError.__name__}: "  # which libraries may say more after
    said = [line for line in log.splitlines() if line.strip() and not line[0].isspace()] or [f"exit code {code}"]
    reason = next((line.removeprefix(ours) for line in said if line.startswith(ours)), said[-1])
    if not code:
        reason = f"it ended well, and shards are missing: do all its workers see {job.folder}?"
    runner = beam_options[0].removeprefix("--runner=")
    runner = next((short for short, (name, *_) in RUNNERS.items() if name == runner), runner)
    return UserError(f"--runner {runner}: {reason} (more in {where}; run this again to go on)")


def _interval(folder: Place, local: float) -> float:
    """Seconds between looks at a folder: an object store takes money for each."""
    return local if isinstance(folder, Path) else 2.0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what Beam logs off the terminal, without touching where an application sends its own logs."""
    root, silent = logging.getLogger(), logging.NullHandler()
    level = logging.getLogger("apache_beam").level
    root.addHandler(silent)  # with no handler at all, the first message would add one that writes to the terminal
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.removeHandler(silent)
        logging.getLogger("apache_beam").setLevel(level)


@contextlib.contextmanager
def progress(job: Job, planned: list[Shard]) -> Iterator[None]:
    """Counts finished shards by the text in them: a bar on the terminal, or now and then a line where there is none."""
    weights = {f"{shard.file}.json": sum(piece.weight for piece in shard.pieces) for shard in planned}
    console = rich.console.Console(stderr=True)
    stop = threading.Event()
    with rich.progress.Progress(
        TITLES[job.stage],
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        total = sum(weights.values())
        task = bar.add_task("", total=total)

        def done() -> int:
            return sum(weights.get(name, 0) for name in store.names(job.records))

        def watch() -> None:
            began = time.monotonic()
            before, line = done(), began + LINES[0]
            while not stop.wait(_interval(job.folder, 0.5)):
                now = time.monotonic()
                if console.is_terminal:
                    bar.update(task, completed=done())
                elif now >= line:
                    print(_line(done(), total, before, now - began, TITLES[job.stage]), file=sys.stderr, flush=True)
                    line = now + LINES[now > began + LINES[1]]

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _line(done: int, total: int, before: int, seconds: float, title: str = TITLES["done"]) -> str:
    """`done` of `total` bytes of text, of which `before` were there `seconds` ago, for a person who reads a log."""
    said = f"{title}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB ({100 * done // max(total, 1)}%)"
    if done == before:
        return f"{said}, no shard finished yet"
    rate = (done - before) / seconds
    return f"{said}, {rate / 1e6:,.1f} MB/s, {cli.time_left((total - done) / rate)} left"
