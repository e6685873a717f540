"""Several processes as one run: they find one another, and a parent of each watches that none is waited for without end.

`supervise` turns a process that is one of several into a parent, which starts the same command again as its child. The child
trains and says where it is; the parent writes that to RUN/processes/N.json every second or so, reads what the others wrote,
and ends its child with one line when another is gone, late, or never came. It needs nothing of JAX, whose own end when its
coordinator dies is an abort without a name, and works as long as the run folder does.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from tinyllama_jax import cli, cluster
from tinyllama_jax import config as config_lib
from tinyllama_jax.errors import UserError, close_stream, run_main
from tinyllama_jax.files import claim, read_json

STARTED = time.perf_counter()  # this is the first module that `train` imports
TRY_AGAIN = 75  # exit code when another process was the cause (EX_TEMPFAIL of sysexits.h): the same command can be run again
SPIKE = 3  # exit code of train.spike and train.give_up: the same command would end in the same way
PATIENCE = {"starting": 6, "saving": 10}  # times train.wait; saving: without reading or writing
PROGRESS = 1 << 26  # bytes read and written that count as progress of a save
POLITE = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU  # save and end
TOGETHER = 2.0  # seconds in which all meet the same mistake
SETTLE = 5.0  # seconds in which a process that fails can be told from those that fail because of it
STOPPED = tuple(128 + number for number in (*POLITE, signal.SIGPIPE))  # exit codes of processes told to stop
MEANT = (None, 0, SPIKE, *STOPPED)  # None: not ended; the others: exit codes that all processes share
AGAIN = "; run the same command again"
BUSY = "another process is training in this folder; wait for it, or name another --workdir"
_CHANNEL = "TINYLLAMA_JAX_CHANNEL"  # environment of the child: a file descriptor that it shares with its parent
_PLACE = struct.Struct("<qqqq16s")  # process, processes, how often it has moved, step, what it does
_RECORD = 2_048  # bytes of a file in RUN/processes
_place: mmap.mmap | None = None  # in the child
_moves = 0


def several() -> bool:
    """Whether this process is one of several: JAX_*, srun, mpirun; TINYLLAMA_JAX_JOIN=1 where only JAX can tell, on a TPU."""
    return _identity()[1] != 1


def _identity() -> tuple[int, int]:
    """(this process, processes) as the environment says; (-1, -1) where only JAX can tell. Raises UserError."""
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env:
        names = "JAX_PROCESS_ID", "JAX_NUM_PROCESSES"
    elif "SLURM_STEP_NUM_TASKS" in env:
        names = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
    elif "OMPI_COMM_WORLD_SIZE" in env:
        names = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"
    else:
        return (-1, -1) if env.get("TINYLLAMA_JAX_JOIN") == "1" else (0, 1)
    try:
        index, count = (int(env[name]) for name in names)
    except (KeyError, ValueError):
        values = " and ".join(f"{name}={env.get(name)}" for name in names)
        raise UserError(f"the environment has {values}; both must be numbers") from None
    if not 0 <= index < count:
        raise UserError(f"the environment has {names[0]}={index}, which must lie in [0, {names[1]}={count})")
    return index, count


def run(main: Callable[[list[str]], int | None]) -> None:
    """`run_main`, but a process that fails ends at once, and waits neither for other processes nor for Orbax's threads."""
    try:
        run_main(main)
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        waits = any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
        if (_place is None and not waits) or code in (None, 0, *STOPPED):
            raise
        close_stream(sys.stdout)
        if _place is None:
            if not isinstance(error, SystemExit):
                traceback.print_exc()
        elif isinstance(error, SystemExit):  # its line is printed; JAX's would be about the others
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            time.sleep(TOGETHER)
        else:
            time.sleep(SETTLE)  # if another process was the cause the parent ends this one, with a better line
            traceback.print_exc()
        close_stream(sys.stderr)
        os._exit(code)


# -- in the child ---------------------------------------------------------------------------------------------------------


def join(wait: float) -> None:
    """Meets the other processes, if there are any. Nothing of JAX's devices may have been asked for before."""
    global _place
    process, processes = _identity()
    if cluster.one_machine(processes):
        cluster.listen_on_loopback(processes)
    if processes == 1:
        return
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from `train`
    seconds = int(wait * PATIENCE["starting"]) + 60  # longer than the parent's wait: its message names the missing process
    where = cluster.arguments(process, processes, seconds)
    jax.distributed.initialize(
        **where, initialization_timeout=seconds, heartbeat_timeout_seconds=seconds, shutdown_timeout_seconds=seconds
    )
    cluster.check_gpus(jax.default_backend(), jax.local_device_count())
    if _CHANNEL in os.environ:
        _place = mmap.mmap(int(os.environ[_CHANNEL]), _PLACE.size)
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    at(0, "starting")


def at(step: int, what: str) -> None:
    """Tells the parent that this process has come to `what` ("training", say) of `step`. All processes say it alike."""
    global _moves
    if _place is not None:
        import jax

        _moves += 1
        _PLACE.pack_into(_place, 0, jax.process_index(), jax.process_count(), _moves, step, what.encode())


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)  # nobody watches any more


def heeded() -> list[signal.Signals]:
    """SIGINT, SIGTERM, and those of `POLITE` that are not ignored: under `nohup` SIGHUP is."""
    return [n for n in POLITE if n in POLITE[:2] or signal.getsignal(n) != signal.SIG_IGN]


@contextlib.contextmanager
def stop_on_signal() -> Iterator[list[signal.Signals]]:
    """A list that the first signal adds itself to: the loop then saves and ends. A second SIGINT or SIGTERM ends at once."""
    stop: list[signal.Signals] = []
    first = 0.0  # when the first SIGINT or SIGTERM came; a scheduler may send another signal before
    before = {number: signal.getsignal(number) for number in heeded()}

    def handler(number: int, _: FrameType | None) -> None:
        nonlocal first
        if not stop:
            stop.append(signal.Signals(number))
        if number in POLITE[:2]:
            if first and time.monotonic() - first > 1:  # within 1 s it is the same one, sent to parent and child
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            first = first or time.monotonic()

    for number in before:
        signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class Agreement:
    """Whether a process was told to stop, which all learn at the same step."""

    def __init__(self, mesh):
        """`mesh`: jax.sharding.Mesh over the devices of all processes."""
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        self._asked, self._flags = None, NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(lambda flags: flags.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def stop(self, mine: list[signal.Signals]) -> signal.Signals | None:
        """The signal that some process got, the largest; of several processes one call late, so as not to wait."""
        import jax
        import numpy as np

        if jax.process_count() == 1:
            return mine[0] if mine else None
        local = np.full(jax.local_device_count(), mine[0] if mine else 0, np.int32)
        before, flags = self._asked, jax.make_array_from_process_local_data(self._flags, local)
        self._asked = self._any(flags)
        number = int(before) if before is not None else 0
        return signal.Signals(number) if number else None


def barrier(name: str) -> None:
    """Returns when all processes have come to this point."""
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


# -- the parent -----------------------------------------------------------------------------------------------------------


def supervise(module: str) -> None:
    """Runs `python -m module` as a child, watches it, and ends with its exit code. Returns if it needs no parent."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # while it imports there is nothing to save
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if _CHANNEL not in os.environ and (not {"-h", "--help"} & set(sys.argv)):
        run_main(lambda argv: _supervised(module, argv) if several() else None, returns=True)


def _supervised(module: str, argv: list[str]) -> int:
    config = cli.load(argv)
    with tempfile.TemporaryFile() as shared:
        shared.write(_PLACE.pack(*_identity(), 0, 0, b"starting"))
        shared.flush()
        child = subprocess.Popen(
            [sys.executable, *(f"-W{option}" for option in sys.warnoptions), "-m", module, *argv],
            env=os.environ | {_CHANNEL: str(shared.fileno())},
            pass_fds=[shared.fileno()],
            start_new_session=True,  # so that Ctrl-C comes once, through us
        )

        def forward(number: int, _: FrameType | None) -> None:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

        for number in heeded():
            signal.signal(number, forward)
        try:
            return _Watch(config, child, mmap.mmap(shared.fileno(), _PLACE.size, access=mmap.ACCESS_READ)).until_the_end()
        finally:
            child.kill()
            child.wait()


_NUMBERS, _TEXTS = ("process", "processes", "moves", "step", "written", "beats"), ("doing", "host", "why")
_KINDS = dict.fromkeys(_NUMBERS, int) | dict.fromkeys(_TEXTS, str) | {"ended": int | None, "stopped": bool}
Record = typing.TypedDict("Record", _KINDS)  # RUN/processes/N.json. written: units of PROGRESS bytes, during a save


class _Process:
    """What is known of one process, from what it last wrote."""

    def __init__(self, index: int, first: Record | None):
        self.index, self.last, self.here = index, first, False
        self.heard = self.moved = time.monotonic()

    def hear(self, now: Record | None) -> None:
        if now is None or now == self.last:
            return
        self.here, self.heard = True, time.monotonic()
        if self.last is None or (now["moves"], now["written"]) != (self.last["moves"], self.last["written"]):
            self.moved = self.heard
        self.last = now

    @property
    def ended(self) -> int | None:
        return self.last["ended"] if self.here else None

    def __str__(self) -> str:
        return f"process {self.index}" + (f" ({self.last['host']})" if self.last else "")

    def where(self) -> str:
        return f"step {self.last['step']:,} ({self.last['doing']})"

    def end(self) -> str:
        code = self.ended
        name = next((s.name for s in signal.Signals if s == -code), f"signal {-code}")
        how = f"was killed by {name}" if code < 0 else f"ended with exit code {code}"
        return f"{self} {how} at {self.where()}"


class _Watch:
    def __init__(self, config: config_lib.Config, child: subprocess.Popen, place: mmap.mmap):
        self.folder, self.wait, self.child, self.place = Path(config.workdir) / "processes", config.train.wait, child, place
        self.folder.mkdir(parents=True, exist_ok=True)
        self.beat, self.started = min(1.0, self.wait / 10), time.monotonic()
        self.file: int | None = None
        self.others: list[_Process] = []
        self.own = _Process(self.now()["process"], None)
        self.trouble: float | None = None  # when another's end was first seen

    def now(self, ended: int | None = None, why: str = "") -> Record:
        process, processes, moves, step, doing = _PLACE.unpack_from(self.place)
        doing = doing.rstrip(b"\0").decode()
        place = {"process": process, "processes": processes, "moves": moves, "step": step, "doing": doing, "ended": ended}
        moved = sum(int(line.split()[1]) for line in _proc(self.child.pid, "io").splitlines() if "char:" in line)
        place["written"] = moved // PROGRESS * (doing == "saving")
        stopped = _proc(self.child.pid, "stat").rpartition(")")[2].split()[:1] in (["T"], ["t"])
        return place | {"host": socket.gethostname(), "beats": time.monotonic_ns(), "stopped": stopped, "why": why}

    def look(self, ended: int | None = None, why: str = "") -> None:
        """Writes down where this process is, and reads where the others are."""
        mine = self.now(ended, why)
        if mine["process"] < 0:  # not known yet
            return
        if not self.others:
            self.own.index = mine["process"]
            others = [i for i in range(mine["processes"]) if i != mine["process"]]
            self.others = [_Process(i, _read(self.folder / f"{i}.json")) for i in others]
        self.own.hear(mine)
        if self.file is None:  # held as long as this process lives: the same command given twice must not write there
            self.file = claim(self.folder / f"{mine['process']}.json", f"{self.folder.parent}: {BUSY}")
        with contextlib.suppress(OSError):  # a full disk or a lost one: the child will say so
            os.pwrite(self.file, json.dumps(mine).encode()[:_RECORD].ljust(_RECORD), 0)  # in place: a full disk takes it
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
        if code in (0, 2, SPIKE, -signal.SIGKILL) or -code in POLITE or code > 127:
            return ended
        while any(other.ended is None for other in self.others):  # did it fail because another one is gone?
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
        """(what is wrong with another process, the exit code), if something is."""
        failed = [p for p in self.others if p.ended not in MEANT]
        self.trouble = (self.trouble or time.monotonic()) if failed else None
        return self.absent() or (self.failed(failed, settled) if failed else self.stuck())

    def absent(self) -> tuple[str, int] | None:
        now = time.monotonic()
        for p in self.others:
            if not p.here and now - self.started > self.wait:
                return f"process {p.index} of {len(self.others) + 1} has not come within {self.wait:g} s{AGAIN}", TRY_AGAIN
            if p.here and p.ended is None and now - p.heard > self.wait:
                return f"{p} has not been heard of for {self.wait:g} s; it was at {p.where()}{AGAIN}", TRY_AGAIN
        return None

    def failed(self, failed: list[_Process], settled: bool) -> tuple[str, int] | None:
        if knew := [p for p in failed if p.last["why"]]:  # before us
            return knew[0].last["why"], knew[0].ended
        causes = [p for p in failed if p.ended not in (1, TRY_AGAIN, -signal.SIGABRT)]  # the others are consequences
        settled = settled or time.monotonic() - self.trouble > min(self.wait, SETTLE)
        worst = (causes or failed)[0]
        if worst.ended == 2:  # this process is about to say the same
            return (f"{worst} ended with an error, which it has printed", 2) if settled else None
        return (worst.end() + AGAIN, TRY_AGAIN) if causes or settled else None

    def stuck(self) -> tuple[str, int] | None:
        everyone = [self.own, *self.others]
        if not all(p.here for p in everyone) or self.own.ended is not None:
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
            disk = f"the save of step {late[0].last['step']:,} has neither read nor written for {patience:g} s"
            return f"{who}: {disk}; is the disk of {self.folder.parent} slow or gone?{AGAIN}", TRY_AGAIN
        if len(late) < len(running):
            return f"{who}: late, at {late[0].where()} for more than {patience:g} s; the others wait for it{AGAIN}", TRY_AGAIN
        hosts = ", ".join(sorted({p.last["host"] for p in everyone}))
        nobody = f"no process has moved for {patience:g} s: all are at {self.own.where()}"
        return f"{nobody}; is the network between {hosts} up?", TRY_AGAIN


def _proc(pid: int, name: str) -> str:
    """A file of /proc about a process; empty without /proc, or if the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def _read(file: Path) -> Record | None:
    try:
        return read_json(file, Record, largest=2 * _RECORD)
    except (OSError, UserError):  # not there yet
        return None
