"""Damages every file that a command reads, and its arguments, from a seed; runs the command and says how it took it.

    python tests/fuzz.py --seed 1 --cases 500 [--only KIND] [--case K]

Imports once and forks for each case, so that a case takes a fraction of a second. Case K of a seed is
nearly always the same one: what is damaged holds times and random names.
What a command may do with what it cannot use: one clear line. Not: a traceback, a hang, an exit code 0 that it has not earned.
An exit code 0 is earned if the result is that of the undamaged files, or if the damage left what nobody can tell from a good
file (another learning rate in a config, say): see `plausible`. Damage to metrics.jsonl, which has no
checksum, need not be noticed.
"""

from __future__ import annotations

import argparse
import atexit
import collections
import gc
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # and one device, whatever the caller has
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"fuzz-compiled-{os.getuid()}"))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
sys.path.append(str(Path(__file__).parents[1]))  # where it is not installed

from fuzz_commands import MAIN, TARGETS, Target, make_stage
from fuzz_damage import damage_arguments, damage_file

from tinyllama_jax.base import errors
from tinyllama_jax.data import blocks
from tinyllama_jax.run import supervise

MEMORY = 6 << 30  # bytes that a case may add
SLOW = 30  # a case is a hang after so many times what the undamaged one took, and PATIENCE
PASSED = "one clear line", "fine"
FAILED = "traceback", "hang", "wrong 0", "not one line"
LONGEST = 5_000  # characters of a clear line


class Case(NamedTuple):
    number: int
    target: Target
    argv: list[str]
    what: str
    could_be: Callable[[], bool]
    folder: Path


def make_case(seed: int, number: int, stage: Path, targets: list[Target], clean: bool = False) -> Case:
    """The files and arguments of a case, in a folder of its own."""
    rng = random.Random(f"{seed} {number}")
    target = targets[number] if clean else rng.choices(targets, [t.share for t in targets])[0]
    folder = stage.parent / f"case-{number}-{'clean' if clean else seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in {"tiny.py", "text.jsonl", "tok.model", "lit.pth", "it.gguf", *target.folders.split()}:
        copy = shutil.copytree if (stage / name).is_dir() else shutil.copy
        copy(stage / name, folder / name)
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    argv = target.arguments.split()
    if clean:
        return Case(number, target, argv, "undamaged", lambda: False, folder)
    if not target.files or (target.kind != "watch" and rng.randrange(4) == 0):
        keys = (Path(__file__).parent / "config_keys.txt").read_text().split() if "--config tiny" in target.arguments else []
        argv, what, could_be = damage_arguments(rng, argv, keys if target.kind != "import" else [])
        return Case(number, target, argv, what, lambda: could_be, folder)
    what, could_be = damage_file(rng, folder, target.files)
    return Case(number, target, argv, what, could_be, folder)


def start(case: Case, seconds: float) -> int:
    """Forks; the child runs the command in the case's folder and ends as it would by itself. Returns its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    os.setsid()
    os.chdir(case.folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.argv = [case.target.kind, *case.argv]
    try:
        (supervise.run if case.target.kind == "train" else errors.run_main)(MAIN[case.target.kind])
    except SystemExit as end:
        if end.code == 0:
            sys.stdout.flush()
            try:
                Path("result").write_text(case.target.result(Path()), errors="replace")
            except Exception:
                Path("result").write_text("none: " + traceback.format_exc())
        _end(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        _end(1)


def _end(code: int) -> None:
    """As the interpreter ends, but for giving the memory back, which takes as long as many a case."""
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def warm_up() -> None:
    """Imports what the commands import when they need it, and starts no thread."""
    import apache_beam.runners.portability.fn_api_runner
    import matplotlib.figure
    import pyarrow.parquet

    assert apache_beam and pyarrow
    matplotlib.figure.Figure(layout="constrained").savefig(io.BytesIO())
    blocks.Record(16, "uint16")
    gc.freeze()


def verdict(case: Case, status: int, late: bool, right: str | None) -> tuple[str, str]:
    """(how the command took it, why one says so). `right`: the result of the undamaged files."""
    said = (case.folder / "stderr").read_text(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    if late or code == -signal.SIGXCPU:
        out = case.folder / "stdout"
        trains = out.is_file() and re.search(r"^step [\d,]+/[\d,]{7,} ", out.read_text(errors="replace"), re.M)
        return ("fine", "a million steps or more take longer") if trains else ("hang", f"exit {code}")
    if "Traceback (most recent" in said or code < 0 or code == 99:
        return "traceback", f"exit {code}: {(said.strip().splitlines() or [''])[-1][:200]}"
    if code == 0:
        result = case.folder / "result"
        if right is None or (result.is_file() and result.read_text(errors="replace") == right):
            return "fine", ""
        if "passed over, as no checkpoints" in said:  # without its seal the newest is none, and this says so
            return "fine", ""
        if case.what.startswith("run/metrics.jsonl"):  # it has no checksum: what it has lost cannot be known
            return "fine", ""
        return ("fine", "") if case.could_be() else ("wrong 0", result.read_text(errors="replace")[:200])
    if code not in case.target.codes and not (case.target.kind == "train" and code == 130):
        return "traceback", f"exit {code}: {said[-200:]}"
    if code in (1, 3, 4):
        return "one clear line", ""
    lines = [line for line in said.splitlines() if line.strip()]
    usage = next((i for i, line in enumerate(lines) if ": error: " in line), 0) if said.startswith("usage:") else 0
    lines = [line for line in lines[usage:] if "warning: " not in line and ": left out " not in line]
    if len(lines) != 1 or "error: " not in lines[0]:
        return "not one line", f"exit {code}, {len(lines)} lines: {said[:300]!r}"
    if not said.startswith("usage:") and (len(lines[0]) > LONGEST or not lines[0].isprintable()):
        return "not one line", f"{len(lines[0]):,} characters, printable: {lines[0].isprintable()}: {lines[0][:150]!r}"
    return "one clear line", lines[0]


def run_all(cases, jobs: int, patience: Callable[[Case], float], done: Callable[[Case, int, bool, float], None]) -> None:
    """Runs the cases, `jobs` at once; calls `done` with (case, wait status, whether it was ended for being late, seconds)."""
    running: dict[int, tuple[Case, float]] = {}
    cases = iter(cases)
    while True:
        while len(running) < jobs and (case := next(cases, None)):
            running[start(case, patience(case))] = case, time.monotonic()
        if not running:
            return
        for child, (case, began) in list(running.items()):
            late = time.monotonic() - began > patience(case)
            if late:
                os.killpg(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0 if late else os.WNOHANG)
            if ended:
                del running[child]
                done(case, status, late, time.monotonic() - began)
        time.sleep(0.01)


def good_files(stage: Path) -> None:
    """Makes them, if they are not there, in a process of its own: JAX, once it has its devices, can be in no fork."""
    if (stage / "made").exists():
        return
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    if (child := os.fork()) == 0:
        sys.stdout.flush()
        os.dup2(2, 1)
        make_stage(stage)
        (stage / "made").touch()
        _end(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the good files could not be made")


def results(stage: Path, targets: list[Target], jobs: int) -> tuple[dict[Target, str | None], dict[Target, float]]:
    """(what each command makes of the good files, the seconds that it takes)."""
    right: dict[Target, str | None] = {}
    took: dict[Target, float] = {}

    def done(case: Case, status: int, _: bool, seconds: float) -> None:
        code, result, target = os.waitstatus_to_exitcode(status), case.folder / "result", case.target
        if code != (75 if target.kind == "watch" else 0) or (code == 0 and result.read_text().startswith("none: ")):
            raise SystemExit(f"{target.kind} {target.arguments}: exit {code} on good files: see {case.folder}")
        right[target], took[target] = result.read_text() if code == 0 else None, seconds
        shutil.rmtree(case.folder)

    clean = (make_case(0, i, stage, targets, clean=True) for i in range(len(targets)))
    run_all(clean, jobs, lambda _: 900, done)
    return right, took


def main(argv: list[str]) -> int:
    """Prints each case that failed and a table by kind; returns 1 if one did."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--only", help="commands, of " + ",".join(MAIN))
    parser.add_argument("--case", type=int, help="this one alone; its folder is kept")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--patience", type=float, default=120, help="seconds that a case may take, and 30 times what it should")
    parser.add_argument("--stage", help="a folder for the good files, kept and used again")
    parser.add_argument("--verbose", action="store_true", help="print each case")
    args = parser.parse_args(argv)
    base = Path(args.stage or tempfile.mkdtemp(prefix="fuzz-"))
    good_files(base / "good")
    warm_up()
    targets = [t for t in TARGETS if not args.only or t.kind in args.only.split(",")]
    numbers = range(args.cases) if args.case is None else [args.case]
    needed = targets if args.case is None else [make_case(args.seed, args.case, base / "good", targets).target]
    right, took = results(base / "good", needed, args.jobs)
    table: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    began = time.monotonic()

    def done(case: Case, status: int, late: bool, seconds: float) -> None:
        how, why = verdict(case, status, late, right[case.target])
        table[case.target.kind][how] += 1
        if args.verbose or how not in PASSED:
            command = ascii(" ".join([case.target.kind, *case.argv]))[:300]
            print(f"case {case.number}: {how}: {command} ({seconds:.1f} s): {case.what}: {why!a}", flush=True)
        if args.case is None:
            shutil.rmtree(case.folder, ignore_errors=True)
        else:
            print(case.folder)

    cases = (make_case(args.seed, number, base / "good", targets) for number in numbers)
    run_all(cases, args.jobs, lambda case: args.patience + SLOW * took[case.target], done)
    total = sum(table.values(), collections.Counter())
    print(" " * 10 + "".join(f"{how:>16}" for how in (*PASSED, *FAILED)))
    for kind, counts in [*sorted(table.items()), ("all", total)]:
        print(f"{kind:10}" + "".join(f"{counts[how]:16,}" for how in (*PASSED, *FAILED)))
    failed = sum(total[how] for how in FAILED)
    print(f"seed {args.seed}: {len(numbers):,} cases in {time.monotonic() - began:.0f} s, {failed} failed")
    if not args.stage and args.case is None:
        shutil.rmtree(base)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
