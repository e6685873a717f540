"""Runs data preparation with Apache Beam: in processes on this machine, on Dask, or on any other Beam runner.

On this machine each worker process runs its own Beam pipeline and claims one free shard after another, so that nothing listens
on a port. The main process only waits: for DIR.partial/done to fill, for a file in DIR.partial/failed, or for Beam to end.
"""

import asyncio
import contextlib
import functools
import importlib.util
import logging
import os
import pickle
import shutil
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

from tinyllama_jax.base import cli, store
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.store import Place
from tinyllama_jax.data.prepare import duplicates, shards
from tinyllama_jax.data.prepare.shards import Job, Shard

DIRECT = "direct"
DASK = "apache_beam.runners.dask.dask_runner.DaskRunner"
TITLES = {"looked": "looking for copies", "copies": "comparing", "done": "tokenising"}  # of the stages of a job
LINES = 10, 60  # seconds between lines of progress without a terminal: in the first minute, and after it
ALONE = 60  # seconds that Dask may be without any worker
LATE = 90  # most seconds until a file written on another machine is visible here


def options(runner: str, beam_options: list[str]) -> list[str]:
    """All options for Beam, with `runner` and `beam_options`; none if the runner is this machine.

    Raises UserError for a runner that is unknown or not installed, and for an option that Beam does not have.
    """
    if runner.lower() in (DIRECT, "directrunner"):  # Beam's own DirectRunner would first try to download another runner
        if beam_options:
            raise UserError(f"{beam_options[0]}: no such option; see --help")
        return []
    if runner.lower() in ("dask", "daskrunner"):
        if not _installed("distributed"):
            raise UserError(f"--runner {runner}: needs `pip install dask distributed`, here and on its workers")
        runner = DASK
        if not any(o.startswith(("--dask_npartitions", "--dask_partition_size")) for o in beam_options):
            # by default Beam gives one worker 128 shards at once, or all if there are fewer
            beam_options = ["--dask_partition_size=1", *beam_options]
    elif "." not in runner and not runner.endswith("Runner"):
        raise UserError(f"--runner {runner}: no such runner; there are {DIRECT}, dask, and Beam's own, such as FlinkRunner")
    if not runner.startswith(("Flink", "Spark")):  # Flink's and Spark's job servers know options that Python does not
        _check(runner, beam_options)
    return [f"--runner={runner}", *beam_options]


def _short(runner: str) -> str:
    return "dask" if runner == DASK else runner


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is not installed either
        return False


def _check(runner: str, beam_options: list[str]) -> None:
    """Raises UserError for an option that Beam does not have, and would ignore with a warning."""
    with _quiet():
        from apache_beam.options.pipeline_options import PipelineOptions

        if "." in runner and _installed(runner.rpartition(".")[0]):
            importlib.import_module(runner.rpartition(".")[0])  # importing it registers the runner's own options
        try:
            parsed = PipelineOptions(beam_options)
            known = parsed.get_all_options()
        except SystemExit:  # argparse has printed what is wrong
            raise UserError(f"--runner {_short(runner)}: Beam does not take {' '.join(beam_options)}") from None
        for option in sorted(set(parsed.get_all_options(retain_unknown_options=True)) - set(known)):
            raise UserError(f"--{option}: no such option of this command, or of Beam with --runner {_short(runner)}")


def run(job: Job, left: list[Shard], workers: int, beam_options: list[str]) -> None:
    """Runs one stage of the job (`job.stage`) for the shards `left`. Raises UserError with the error that stopped a worker."""
    # the names of SlimPajama's 59,166 files alone are 10 MB, Dataflow's limit for a request; compressed they are 2 MB
    work = [zlib.compress(pickle.dumps(shard)) for shard in left]
    try:
        if workers > 1 or beam_options:
            n = 1 if beam_options or job.stage == "copies" else workers  # one process compares all shards
            _in_processes(job, work, n, beam_options, {f"{shard.file}.json" for shard in left})
        else:
            with _quiet():
                pipeline(job, work, [])
    except Exception:
        for name in sorted(store.names(job.failed)):
            raise UserError(store.read(job.failed / name).decode().strip()) from None
        raise


def pipeline(job: Job, work: list[bytes], beam_options: list[str], alone: float = ALONE, claims: str = "") -> None:
    """Runs the Beam pipeline in this process, or where `beam_options` say. Raises whatever Beam raises.

    `alone`: seconds that Dask may be without any worker. `claims`: a folder with a file for each claimed shard.
    """
    import apache_beam as beam  # takes a second, and warns of what is not installed
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    if f"--runner={DASK}" in beam_options and not any(o.startswith(("--dask_client", "--dask_sched")) for o in beam_options):
        import distributed

        cluster = distributed.LocalCluster(host="127.0.0.1", dashboard_address=None)  # no dashboard: anyone could look at it
        beam_options = [*beam_options, f"--dask_client_address={cluster.scheduler_address}"]
    # not "DirectRunner", which first tries to download another runner
    runner = None if beam_options else FnApiRunner()
    parsed = PipelineOptions(beam_options)
    p = beam.Pipeline(runner, parsed)
    if claims:
        work = p | beam.Create(list(enumerate(work))) | "claim" >> beam.FlatMap(functools.partial(_claimed, claims))
    else:
        work = p | beam.Create(work) | beam.Reshuffle()
    if job.stage == "copies":
        rows = work | "rows" >> beam.FlatMap(functools.partial(duplicates.rows_of, job)) | "keys" >> beam.GroupByKey()
        pairs = rows | "pairs" >> beam.FlatMap(functools.partial(duplicates.pairs_of, job)) | "shards" >> beam.GroupByKey()
        _ = pairs | beam.Map(functools.partial(duplicates.settle, job))
    else:
        _ = work | beam.Map(functools.partial(duplicates.make if job.stage == "looked" else shards.make, job))
    result = p.run()
    if f"--runner={DASK}" in beam_options:
        _wait_for_dask(result, alone)
    else:
        result.wait_until_finish()


def _wait_for_dask(result: object, alone: float) -> None:
    """Waits for Dask, which gives a lost worker's shards to the others, and would wait for ever without any worker."""
    seen = time.monotonic()
    while True:
        try:
            result.wait_until_finish(duration=min(5_000, alone * 500))
            lost = any(future.status != "finished" for future in result.futures)  # Beam takes this for the end, too
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


def _claimed(claims: str, numbered: tuple[int, bytes]) -> list[bytes]:
    """[the shard], or [] if another process has claimed it."""
    try:
        os.close(os.open(f"{claims}/{numbered[0]}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return []
    return [numbered[1]]


def worker(arguments: str) -> None:
    """Runs `pipeline` with the pickled arguments in a file, in a process that `_in_processes` started."""

    def end() -> None:
        sys.stdin.buffer.read()  # returns when the parent has ended, for any reason
        shutil.rmtree(Path(arguments).parent, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)  # nothing is lost: a file gets its name only when it is whole

    threading.Thread(target=end, daemon=True).start()
    pipeline(*pickle.loads(Path(arguments).read_bytes()))


def _in_processes(job: Job, work: list[bytes], n: int, beam_options: list[str], awaited: set[str]) -> None:
    """Runs `pipeline` in `n` processes. Returns when all files of `awaited` are in the folder of records.

    Raises UserError if a process dies. No process outlives this one.
    """
    path = [str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    start = "import sys, tinyllama_jax.data.prepare.runners as m; m.worker(sys.argv[1])"
    children: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory(prefix="prepare-", ignore_cleanup_errors=True) as scratch:
        log, arguments, claims = Path(scratch, "log"), Path(scratch, "arguments"), Path(scratch, "claims")
        claims.mkdir()
        arguments.write_bytes(pickle.dumps((job, work, beam_options, ALONE, str(claims) if n > 1 else "")))
        if beam_options:
            print(f"Beam's output goes to {log}", file=sys.stderr)
        try:
            with open(log, "ab") as output:
                words = [sys.executable, "-c", start, str(arguments)]
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TMPDIR": scratch}  # Beam leaves folders
                pipes = {"stdin": subprocess.PIPE, "stdout": output, "stderr": output}
                for _ in range(n):
                    children.append(subprocess.Popen(words, env=environment, start_new_session=True, **pipes))
            import tensorflow_datasets  # noqa: F401  `folder.finish` needs it; this process has nothing else to do now

            ended = None
            while not awaited.issubset(store.names(job.records)):
                codes = [child.poll() for child in children]
                if store.names(job.failed):
                    raise UserError("see DIR.partial/failed")
                if ended and (any(codes) or not beam_options or time.monotonic() > ended + LATE):
                    raise _failure(job, log.read_text(errors="replace"), next(filter(None, codes), 0), beam_options)
                if ended is None and (any(codes) or None not in codes):
                    ended = time.monotonic()
                    continue  # it may have written the last file after we listed them
                time.sleep(_interval(job.folder, 0.05))
            if beam_options:  # it still tells its cluster that the job is done
                with contextlib.suppress(subprocess.TimeoutExpired):
                    children[0].wait(timeout=60)
        finally:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            for child in children:
                child.wait()
                child.stdin.close()


def _failure(job: Job, log: str, code: int, beam_options: list[str]) -> Exception:
    """The error to raise when Beam has ended and shards are missing."""
    if not beam_options and (code < 0 or "MemoryError" in log):
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "ended"
        return UserError(f"a worker process {how}: out of memory? Run this again to resume, perhaps with fewer --workers")
    if not beam_options:
        return RuntimeError(f"the pipeline failed:\n{log[-4_000:]}")
    where = job.folder / "log"
    store.write(where, log)
    ours = f"{UserError.__module__}.{UserError.__name__}: "  # libraries may log more lines after it
    lines = [line for line in log.splitlines() if line.strip() and not line[0].isspace()] or [f"exit code {code}"]
    reason = next((line.removeprefix(ours) for line in lines if line.startswith(ours)), lines[-1])
    if not code:
        reason = f"it reported success, but shards are missing: do all its workers see {job.folder}?"
    runner = _short(beam_options[0].removeprefix("--runner="))
    return UserError(f"--runner {runner}: {reason} (more in {where}; run this again to resume)")


def _interval(folder: Place, local: float) -> float:
    """Seconds between listings of a folder: an object store charges for each listing."""
    return local if isinstance(folder, Path) else 2.0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Beam's logs off the terminal, and leaves an application's own logs alone."""
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
    """Shows how much text the finished shards hold: as a bar on a terminal, otherwise as a line from time to time."""
    weights = {f"{shard.file}.json": sum(piece.weight for piece in shard.pieces) for shard in planned}
    console = rich.console.Console(stderr=True)
    stop = threading.Event()
    columns = (getattr(rich.progress, f"{name}Column")() for name in ("Bar", "Download", "TransferSpeed", "TimeRemaining"))
    options = {"console": console, "transient": True, "disable": not console.is_terminal}
    with rich.progress.Progress(TITLES[job.stage], *columns, **options) as bar:
        total = sum(weights.values())
        task = bar.add_task("", total=total)

        def done() -> int:
            return sum(weights.get(name, 0) for name in store.names(job.records))

        def watch() -> None:
            began = time.monotonic()
            before, line = done(), began + LINES[0]
            while not stop.wait(_interval(job.folder, 0.5)):
                time_now = time.monotonic()
                if console.is_terminal:
                    bar.update(task, completed=done())
                elif time_now >= line:
                    print(_line(done(), total, before, time_now - began, TITLES[job.stage]), file=sys.stderr, flush=True)
                    line = time_now + LINES[time_now > began + LINES[1]]

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _line(done: int, total: int, before: int, seconds: float, title: str = TITLES["done"]) -> str:
    """A line of progress for a log: `done` of `total` bytes of text, of which `before` were done `seconds` ago."""
    line = f"{title}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB ({100 * done // max(total, 1)}%)"
    if done == before:
        return f"{line}, no shard finished yet"
    rate = (done - before) / seconds
    return f"{line}, {rate / 1e6:,.1f} MB/s, {cli.time_left((total - done) / rate)} left"
