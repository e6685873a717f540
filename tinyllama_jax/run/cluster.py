"""Several processes as one run: how they join, report their progress and agree to stop."""

import contextlib
import mmap
import os
import signal
import struct
import threading
import time
import typing
from collections.abc import Callable, Iterator
from types import FrameType

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.run import addresses

EXIT_SPIKE = 3  # exit code of train.spike and train.give_up: the same command would end in the same way
STOP_SIGNALS = (  # save and end; no library here uses the timers' three (ALRM, VTALRM, PROF)
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
    signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF
)  # fmt: skip
STARTING = 6  # times train.wait: how long processes wait for one another at the start
BUSY = "another process is training in this folder; wait for it, or name another --workdir"
CHANNEL = "TINYLLAMA_JAX_CHANNEL"  # environment variable of the child: a file descriptor shared with its parent
HEARTBEAT = struct.Struct("<qqqq16s")  # process, processes, number of moves, step, what it does
_shared: mmap.mmap | None = None  # memory shared with the parent; None without a parent
_moves = 0
_told: float | None = None  # time.monotonic() of the first signal to stop


def several() -> bool:
    """Whether this process is one of several, from JAX_*, srun, mpirun, or TINYLLAMA_JAX_JOIN=1 on a TPU slice."""
    return identity()[1] != 1


def has_parent() -> bool:
    """Whether a parent process watches this one."""
    return _shared is not None


def identity() -> tuple[int, int]:
    """(this process, processes) from the environment; (-1, -1) on a TPU slice, where only JAX knows. Raises UserError."""
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


def join(wait: float) -> None:
    """Joins the other processes, if there are any. Must come before any use of JAX's devices."""
    global _shared
    process, processes = identity()
    if addresses.one_machine(processes):
        addresses.listen_on_loopback(processes)
    if processes == 1 and not os.environ.get("SLURM_GPUS_ON_NODE"):
        return
    import jax

    if processes == 1:
        addresses.check_gpus(jax.default_backend(), jax.local_device_count())
        return

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from `train`
    seconds = int(wait * STARTING) + 60  # longer than the parent's wait: its message names the missing process
    where = addresses.arguments(process, processes, seconds)
    jax.distributed.initialize(
        **where, initialization_timeout=seconds, heartbeat_timeout_seconds=seconds, shutdown_timeout_seconds=seconds
    )
    addresses.check_gpus(jax.default_backend(), jax.local_device_count())
    if CHANNEL in os.environ:
        _shared = mmap.mmap(int(os.environ[CHANNEL]), HEARTBEAT.size)
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    heartbeat(0, "starting")


def heartbeat(step: int, what: str) -> None:
    """Tells the parent that this process has reached `what` (such as "training") of `step`; all processes call it alike."""
    global _moves
    if _shared is not None:
        import jax

        _moves += 1
        HEARTBEAT.pack_into(_shared, 0, jax.process_index(), jax.process_count(), _moves, step, what.encode())


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)  # without its parent nothing would end it


def caught_signals() -> list[signal.Signals]:
    """SIGINT, SIGTERM, and those of `STOP_SIGNALS` that are not ignored, as SIGHUP is under `nohup`."""
    return [n for n in STOP_SIGNALS if n in STOP_SIGNALS[:2] or signal.getsignal(n) != signal.SIG_IGN]


def stopped_by(number: signal.Signals) -> str:
    """Says what stopped a run. SIGPIPE stands for a standard output that cannot be written, for whatever reason."""
    return f"stopped by {'a failed standard output' if number == signal.SIGPIPE else number.name}"


@contextlib.contextmanager
def stop_on_signal() -> Iterator[list[signal.Signals]]:
    """A list that receives the first signal: the loop then saves and ends. A second SIGINT or SIGTERM ends at once."""
    global _told
    stop: list[signal.Signals] = []
    _told = None
    first = 0.0  # time of the first SIGINT or SIGTERM; a scheduler may send another signal before it
    before = {number: signal.getsignal(number) for number in caught_signals()}

    def handler(number: int, _: FrameType | None) -> None:
        global _told
        nonlocal first
        if not stop:
            stop.append(signal.Signals(number))
            _told = time.monotonic()
        if number in STOP_SIGNALS[:2]:
            if first and time.monotonic() - first > 1:  # within 1 s it is the same signal, sent to parent and child
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


def seconds_since_signal() -> float:
    """Seconds since the first signal to stop; 0 before it."""
    return 0.0 if _told is None else time.monotonic() - _told


class Agreed(typing.NamedTuple):
    """What all processes do after the same step."""

    stopping: signal.Signals | None  # the signal to stop for
    save: bool  # because it is time, or because it is the last chance and fits in what is left of `checkpoint.grace`
    profile: bool  # the next steps
    memory: int  # MiB that any device has had in use so far; 0: not known


class Agreement:
    """Makes all processes save, stop or profile after the same step, once one of them is due to or has received a signal."""

    def __init__(self, mesh, stop: list[signal.Signals], checkpoints, profile: Callable[[], bool]):
        """`mesh`: over all processes' devices. `stop`: of `stop_on_signal`. `checkpoints`: `Checkpoints`. `profile`: asked?"""
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        self._stop, self._checkpoints, self._profile, self._asked = stop, checkpoints, profile, None
        self._flags = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(lambda flags: flags.max(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def signal(self) -> signal.Signals | None:
        """The signal to stop for, as `after` gives it."""
        return self.after(step_saved=None).stopping

    def after(self, step_saved: bool | None) -> Agreed:
        """What to do after this step: the strongest wish of any process; of several, that of the call before, to avoid a wait.

        `step_saved`: whether this step is saved anyway; None: nothing may be saved or begin.
        """
        import jax
        import numpy as np

        from tinyllama_jax.core import xla

        # 0: nothing; 1: profile; 2: save; 2 + 2 x signal: stop and save; 3 + 2 x signal: stop, and do not save
        wish, memory = 0, xla.memory()[0] >> 20
        if step_saved is not None:
            wish = 2 * self._checkpoints.due() or int(self._profile())
        if self._stop:
            wish = 2 + 2 * self._stop[0] + (not self._checkpoints.fits())
        if jax.process_count() > 1:
            local = np.tile(np.array([wish, memory], np.int32), (jax.local_device_count(), 1))
            before, self._asked = self._asked, self._any(jax.make_array_from_process_local_data(self._flags, local))
            wish, memory = (0, memory) if before is None else np.asarray(before).tolist()
            self._asked = None if wish else self._asked  # the same wish, which was still there when this call began
        stopping = signal.Signals(wish // 2 - 1) if wish > 3 else None
        return Agreed(stopping, wish % 2 == 0 if stopping else wish == 2 or bool(step_saved), wish == 1, memory)
