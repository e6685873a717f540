"""The parent of each process of a run: ends its child when another process is gone, late, or never came.

`supervise` turns one of several processes into a parent, which starts the same command again as its child. The child trains
and reports its progress; the parent writes that to RUN/processes/N.json about every second, reads the others' records, and ends
its child with one line that names the process at fault. It works without JAX, which aborts without naming a process when its
coordinator dies.
"""

import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from tinyllama_jax.base import cli
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError, close_stream, run_main
from tinyllama_jax.base.files import claim, make_folder, read_json
from tinyllama_jax.run import cluster
from tinyllama_jax.run.cluster import CHANNEL, EXIT_SPIKE, HEARTBEAT, STOP_SIGNALS

STARTED = time.perf_counter()  # `train` imports this module first
imports: float | None = None  # seconds from then until `run`; None where another program calls `train.main`
TRY_AGAIN = 75  # exit code when another process was the cause (EX_TEMPFAIL of sysexits.h): the same command can be run again
PATIENCE = {"starting": cluster.STARTING, "saving": 10}  # times train.wait; saving: without reading or writing
PROGRESS = 1 << 26  # bytes read and written that count as progress of a save
SHARED_MISTAKE_SECONDS = 2.0  # in which all processes meet the same mistake
SETTLE_SECONDS = 5.0  # in which a process that fails can be told from those that fail because of it
STOPPED = tuple(128 + number for number in (*STOP_SIGNALS, signal.SIGPIPE))  # exit codes of processes told to stop
EXPECTED_EXIT_CODES = (None, 0, EXIT_SPIKE, *STOPPED)  # None: not ended; the others: exit codes that all processes share
AGAIN = "; run the same command again"
_RECORD = 2_048  # bytes of a file in RUN/processes


def run(main: Callable[[list[str]], int | None]) -> None:
    """`run_main`, but a process that fails ends at once, without waiting for other processes or Orbax's threads."""
    global imports
    imports = time.perf_counter() - STARTED
    try:
        run_main(main)
    except BaseException as error:
        exits, code = isinstance(error, SystemExit), error.code if isinstance(error, SystemExit) else 1
        waits = any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
        if (not cluster.has_parent() and not waits) or code in (None, 0, *STOPPED):
            raise
        close_stream(sys.stdout)
        if cluster.has_parent() and exits:  # its line is printed; JAX's would be about the others
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            time.sleep(SHARED_MISTAKE_SECONDS)
        elif cluster.has_parent():
            time.sleep(SETTLE_SECONDS)  # if another process was the cause the parent ends this one, with a better line
        if not exits:
            traceback.print_exc()
        close_stream(sys.stderr)
        os._exit(code)


def supervise(module: str) -> None:
    """Runs `python -m module` as a child, watches it, and exits with its exit code. Returns if no parent is needed."""
    if CHANNEL not in os.environ and (not {"-h", "--help"} & set(sys.argv)):
        run_main(lambda argv: _supervised(module, argv) if cluster.several() else None, returns=True)


def _supervised(module: str, argv: list[str]) -> int:
    config = cli.load(argv)
    with tempfile.TemporaryFile() as shared:
        shared.write(HEARTBEAT.pack(*cluster.identity(), 0, 0, b"starting"))
        shared.flush()
        child = subprocess.Popen(
            [sys.executable, *(f"-W{option}" for option in sys.warnoptions), "-m", module, *argv],
            env=os.environ | {CHANNEL: str(shared.fileno())},
            pass_fds=[shared.fileno()],
            start_new_session=True,  # so that Ctrl-C reaches the child once, through the parent
        )

        def forward(number: int, _: FrameType | None) -> None:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

        for number in cluster.caught_signals():
            signal.signal(number, forward)
        try:
            return _Watch(config, child, mmap.mmap(shared.fileno(), HEARTBEAT.size, access=mmap.ACCESS_READ)).until_the_end()
        finally:
            child.kill()
            child.wait()


class Record(typing.TypedDict):
    """RUN/processes/N.json."""

    process: int
    processes: int
    moves: int
    step: int
    doing: str
    written: int  # units of PROGRESS bytes read and written during a save
    stopped: bool  # by SIGSTOP
    host: str
    beats: int
    ended: int | None  # the exit code
    why: str  # the line that named another process


class _Process:
    """A process as known from its last record."""

    def __init__(self, index: int, first: Record | None):
        self.index, self.last, self.started = index, first, False
        self.heard = self.moved = time.monotonic()

    def hear(self, record: Record | None) -> None:
        if record is None or record == self.last:
            return
        self.started, self.heard = True, time.monotonic()
        if self.last is None or (record["moves"], record["written"]) != (self.last["moves"], self.last["written"]):
            self.moved = self.heard
        self.last = record

    @property
    def ended(self) -> int | None:
        return self.last["ended"] if self.started else None

    def __str__(self) -> str:
        return f"process {self.index}" + (f" ({self.last['host']})" if self.last else "")

    def where(self) -> str:
        return f"step {self.last['step']:,} ({self.last['doing']})"

    def end(self) -> str:
        code = self.ended
        name = next((s.name for s in signal.Signals if s == -code), f"signal {-code}")
        return f"{self} {f'was killed by {name}' if code < 0 else f'ended with exit code {code}'} at {self.where()}"


class _Watch:
    def __init__(self, config: Config, child: subprocess.Popen, place: mmap.mmap):
        self.folder, self.wait, self.child, self.place = config.folder / "processes", config.train.wait, child, place
        make_folder("--workdir", config.workdir, self.folder)
        self.beat, self.started = min(1.0, self.wait / 10), time.monotonic()
        self.file: int | None = None
        self.others: list[_Process] = []
        self.own = _Process(self.record()["process"], None)
        self.trouble: float | None = None  # when the end of another process was first seen

    def record(self, ended: int | None = None, why: str = "") -> Record:
        process, processes, moves, step, text = HEARTBEAT.unpack_from(self.place)
        doing = text.rstrip(b"\0").decode()
        n_bytes = sum(int(line.split()[1]) for line in _proc(self.child.pid, "io").splitlines() if "char:" in line)
        stopped = _proc(self.child.pid, "stat").rpartition(")")[2].split()[:1] in (["T"], ["t"])
        place = {"process": process, "processes": processes, "moves": moves, "step": step, "doing": doing, "ended": ended}
        place |= {"written": n_bytes // PROGRESS * (doing == "saving"), "stopped": stopped, "why": why}
        return place | {"host": socket.gethostname(), "beats": time.monotonic_ns()}

    def look(self, ended: int | None = None, why: str = "") -> None:
        """Writes the record of this process, and reads those of the others."""
        own = self.record(ended, why)
        if own["process"] < 0:  # not known yet
            return
        if not self.others:
            self.own.index = own["process"]
            others = [i for i in range(own["processes"]) if i != own["process"]]
            self.others = [_Process(i, _read(self.folder / f"{i}.json")) for i in others]
        self.own.hear(own)
        if self.file is None:  # locked while this process lives, so that the same command given twice does not write there
            self.file = claim(self.folder / f"{own['process']}.json", f"{self.folder.parent}: {cluster.BUSY}")
        with contextlib.suppress(OSError):  # a full or lost disk: the child will report it
            os.pwrite(self.file, json.dumps(own).encode()[:_RECORD].ljust(_RECORD), 0)  # in place, which a full disk accepts
        for other in self.others:
            other.hear(_read(self.folder / f"{other.index}.json"))

    def until_the_end(self) -> int:
        while (code := self.child.poll()) is None:
            self.look()
            if verdict := self.verdict():
                return self.give_up(*verdict)
            time.sleep(self.beat)
        self.look(code)
        ended = code if code >= 0 else 128 - code
        if code in (0, 2, EXIT_SPIKE, -signal.SIGKILL) or -code in STOP_SIGNALS or code > 127:
            return ended
        while any(other.ended is None for other in self.others):  # it may have failed because another one is gone
            if verdict := self.verdict():
                return self.give_up(*verdict)
            time.sleep(self.beat)
            self.look(code)
        verdict = self.verdict(settled=True)
        return self.give_up(*verdict) if verdict else ended

    def give_up(self, line: str, code: int) -> int:
        print(f"error: {line}", file=sys.stderr, flush=True)
        self.child.kill()
        self.look(code, line)
        return code

    def verdict(self, settled: bool = False) -> tuple[str, int] | None:
        """(what is wrong with another process, the exit code), or None."""
        failed = [p for p in self.others if p.ended not in EXPECTED_EXIT_CODES]
        self.trouble = (self.trouble or time.monotonic()) if failed else None
        return self.absent() or (self.failed(failed, settled) if failed else self.stuck())

    def absent(self) -> tuple[str, int] | None:
        for p in self.others:
            if not p.started and time.monotonic() - self.started > self.wait:
                return f"process {p.index} of {len(self.others) + 1} has not come within {self.wait:g} s{AGAIN}", TRY_AGAIN
            if p.started and p.ended is None and time.monotonic() - p.heard > self.wait:
                return f"{p} has not been heard of for {self.wait:g} s; it was at {p.where()}{AGAIN}", TRY_AGAIN
        return None

    def failed(self, failed: list[_Process], settled: bool) -> tuple[str, int] | None:
        if knew := [p for p in failed if p.last["why"]]:  # it has already named the cause
            return knew[0].last["why"], knew[0].ended
        causes = [p for p in failed if p.ended not in (1, TRY_AGAIN, -signal.SIGABRT)]  # the others are consequences
        settled = settled or time.monotonic() - self.trouble > min(self.wait, SETTLE_SECONDS)
        worst = (causes or failed)[0]
        if worst.ended == 2:  # this process is about to print the same error
            return (f"{worst} ended with an error, which it has printed", 2) if settled else None
        return (worst.end() + AGAIN, TRY_AGAIN) if causes or settled else None

    def stuck(self) -> tuple[str, int] | None:
        everyone = [self.own, *self.others]
        if not all(p.started for p in everyone) or self.own.ended is not None:
            return None
        running = [p for p in everyone if p.ended is None]
        least = min(p.last["moves"] for p in running)
        late = [p for p in running if p.last["moves"] == least]
        late = [p for p in late if p.last["stopped"]] or late
        doing = "stopped" if late[0].last["stopped"] else late[0].last["doing"]
        patience = self.wait * PATIENCE.get(doing, 1)
        if time.monotonic() - max(p.moved for p in (self.own, *late)) <= patience:
            return None
        who = " and ".join(map(str, late))
        if doing == "saving":
            save = f"the save of step {late[0].last['step']:,} has neither read nor written for {patience:g} s"
            return f"{who}: {save}; is the disk of {self.folder.parent} slow or gone?{AGAIN}", TRY_AGAIN
        if len(late) < len(running):
            return f"{who}: late, at {late[0].where()} for more than {patience:g} s; the others wait for it{AGAIN}", TRY_AGAIN
        hosts, at = ", ".join(sorted({p.last["host"] for p in everyone})), self.own.where()
        return f"no process has moved for {patience:g} s: all are at {at}; is the network between {hosts} up?", TRY_AGAIN


def _proc(pid: int, name: str) -> str:
    """Reads a file of /proc about a process; empty without /proc, or if the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def _read(file: Path) -> Record | None:
    try:
        return read_json(file, Record, largest=2 * _RECORD)
    except (OSError, UserError):  # not written yet
        return None
