"""N real processes of `tinyllama_jax.train` on this machine, for the tests and for chaos.py."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tinyllama_jax.base.store import working_copy

PATIENCE = 600  # seconds: nothing may take longer, on however busy a machine


class Cluster:
    """N processes with the same command, each with a parent that watches it (see run/supervise.py) and its own output file."""

    def __init__(
        self,
        config_file,
        workdir,
        n,
        devices,
        prefix=lambda i: (),
        address="127.0.0.1",
        module="tinyllama_jax.train",
        out=None,
        flags=(),
        **keys,
    ):
        """`devices`: virtual devices a process. `prefix`: words before the command of process i. `keys`: a__b=c for --a.b=c.

        `out`: folder for what they print, beside the run folder by default.
        """
        self.workdir = working_copy(str(workdir))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        options = [f"--{k.replace('__', '.')}={v}" for k, v in ({"mesh__fsdp": -1, "workdir": workdir} | keys).items()]
        argv = [sys.executable, "-m", module, *flags, "--config", str(config_file), *options]
        self.files = [Path(out or self.workdir.parent) / f"{self.workdir.name}.{i}.out" for i in range(n)]
        self.processes = []
        xla = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
        xla.append(f"--xla_force_host_platform_device_count={devices}")
        for i, file in enumerate(self.files):
            env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(xla)}
            if n > 1:
                env |= {"JAX_COORDINATOR_ADDRESS": f"{address}:{port}", "JAX_NUM_PROCESSES": str(n), "JAX_PROCESS_ID": str(i)}
            with file.open("w") as out:
                self.processes.append(subprocess.Popen([*prefix(i), *argv], env=env, stdout=out, stderr=out))

    def wait(self, seconds=PATIENCE):
        """Exit codes of all; kills what is left after `seconds`, which then has the code -9."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                self.kill()
        return [process.wait() for process in self.processes]

    def kill(self):
        """Ends everything at once, children first."""
        for i, process in enumerate(self.processes):
            if process.poll() is None:
                for pid in (self.child(i), process.pid):
                    if pid:
                        signal_to(pid, signal.SIGKILL)

    def child(self, i):
        """Pid of the training process of process i: the child of its watching parent, or None if that has ended."""
        while self.processes[i].poll() is None:
            if pids := children(self.processes[i].pid):
                return pids[0]
            time.sleep(0.01)  # it has not started it yet
        return None

    def output(self, i):
        return self.files[i].read_text(errors="replace")

    def steps(self):
        """The last training step in metrics.jsonl, 0 if there is none."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        return max((json.loads(line)["step"] for line in lines), default=0)

    def until(self, step, seconds=PATIENCE):
        """Waits until `step` is done; returns whether it is while the processes still run."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and all(p.poll() is None for p in self.processes):
            if self.steps() >= step:
                return True
            time.sleep(0.01)
        return False


def children(pid):
    """Pids of the direct children of a process (Linux)."""
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def signal_to(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
