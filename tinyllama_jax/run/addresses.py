"""The addresses at which the processes of a run meet, the network interface, and the GPUs that each process takes."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from tinyllama_jax.base.errors import UserError

DEVICE_FILES = "nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*"  # in /dev: an NVIDIA GPU, a TPU chip
CHOOSE = ("CUDA_VISIBLE_DEVICES", "JAX_CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS", "JAX_PLATFORMS", "SLURM_GPUS_ON_NODE")
BIND = "JAX_COORDINATOR_BIND_ADDRESS"  # JAX's name for the address where process 0 listens: HOST or HOST:PORT


def one_machine(processes: int, env: Mapping[str, str] = os.environ) -> bool:
    """Whether all processes of this run are on one machine, so that none needs to listen on a network."""
    if address := env.get("JAX_COORDINATOR_ADDRESS"):
        return processes == 1 or _is_loopback(address.rpartition(":")[0])
    return processes == 1 or (processes > 1 and _on_this_host(env)[0] == processes)


def arguments(process: int, processes: int, seconds: int, env: Mapping[str, str] = os.environ) -> dict[str, object]:
    """Arguments for `jax.distributed.initialize`: number of processes, this one's number and GPUs, process 0's address.

    Process 0 listens at `BIND`, else on the loopback if all processes are on one machine, else on all interfaces. Raises
    UserError if its address is unknown.
    """
    if process < 0:  # on a TPU slice JAX detects all of this
        return {}
    from jax._src import clusters

    out = {"num_processes": processes, "process_id": process, "local_device_ids": gpus(env)}
    address = env.get("JAX_COORDINATOR_ADDRESS")
    if address is None:  # JAX takes the job's first host, and a port computed from the job id
        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        address, *_ = detect(None, processes, process, [], None, seconds)
    if not re.fullmatch(r".+:\d{1,5}", address or ""):
        names = "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address or ''}: must be HOST:PORT of process 0; set it, {names}")
    host, _, port = address.rpartition(":")
    if one_machine(processes, env) and not _is_loopback(host):
        address = f"127.0.0.1:{port}"
    bind = env.get(BIND) or (address if one_machine(processes, env) else f"[::]:{port}")
    bind = bind if re.fullmatch(r".*[^:]:\d+|\[.*\]:\d+", bind) else f"{bind}:{port}"
    return out | {"coordinator_address": address, "coordinator_bind_address": bind}


def gpus(env: Mapping[str, str] = os.environ) -> list[int] | None:
    """The numbers of this process's GPUs; []: all that it sees; None: JAX_LOCAL_DEVICE_IDS decides.

    Without this, JAX takes one GPU per process under srun and mpirun, even if one process has the whole node.
    """
    if env.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    (processes, index), given = _on_this_host(env), env.get("SLURM_GPUS_ON_NODE", "")
    visible = [gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    n = len(visible) or len(list(Path("/dev").glob("nvidia[0-9]*")))
    bound = n < int(given) if given.isdecimal() else n == 1  # Slurm shows each process only its own GPUs
    if processes <= 1 or not n or bound:
        return []
    if n % processes:
        remedy = f"start one a host (srun --ntasks-per-node=1) or {n}"
        raise UserError(f"{processes} processes on this host cannot share its {n} GPUs; {remedy}")
    return list(range(index * n // processes, (index + 1) * n // processes))


def promised(env: Mapping[str, str] = os.environ) -> int:
    """How many devices this host should have: as Slurm says, or by its device files; 0: not known, or JAX_* chooses fewer."""
    given = env.get("SLURM_GPUS_ON_NODE", "")
    if env.get("JAX_LOCAL_DEVICE_IDS") or env.get("JAX_CUDA_VISIBLE_DEVICES") or env.get("JAX_PLATFORMS") == "cpu":
        return 0
    return int(given) if given.isdecimal() else max(len(list(Path("/dev").glob(name))) for name in DEVICE_FILES)


def check_gpus(platform: str, devices: int, env: Mapping[str, str] = os.environ) -> None:
    """Raises UserError if Slurm gave this host GPUs, but this process runs on a CPU or on fewer GPUs than its share.

    `devices`: how many this process has, of `platform`.
    """
    processes = 0 if "JAX_COORDINATOR_ADDRESS" in env else max(1, _on_this_host(env)[0])
    given = promised(env) if processes and env.get("SLURM_GPUS_ON_NODE") else 0
    seen = 0 if platform == "cpu" else devices * processes
    if seen < given:
        visible, one = env.get("CUDA_VISIBLE_DEVICES", ""), "--gpu-bind=single:1 shows each task one"
        why = "is jax[cuda12] installed?"
        if not visible and "SLURM_STEP_GPUS" not in env:
            why = f"this step has none (no SLURM_STEP_GPUS): leave out --gpus-per-task; {one}"
        elif platform != "cpu" and visible.count(",") < devices:
            why = f"CUDA_VISIBLE_DEVICES={visible} hides the others"
        fewer = f"to take fewer, set {'JAX_CUDA_VISIBLE_DEVICES' if processes == 1 else 'JAX_LOCAL_DEVICE_IDS'}"
        raise UserError(f"Slurm gave this host {given} GPUs, and its {processes} processes see {seen}; {why}; {fewer}")


def listen_on_loopback(processes: int) -> None:
    """Makes the collectives of one machine (NCCL, and gloo on CPUs) listen on the loopback only."""
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if processes == 1:
        return
    from jax._src import distributed, xla_bridge
    from jax._src.lib import _jax

    def make_cpu_client():  # no option of JAX: by default gloo listens at the address of the host's name
        client = distributed.global_state.client
        return xla_bridge.make_cpu_client(_jax.make_gloo_tcp_collectives(client, hostname="127.0.0.1"))

    xla_bridge.register_backend_factory("cpu", make_cpu_client, priority=0, fail_quietly=False)


def _is_loopback(host: str) -> bool:
    return host.strip("[]") in ("localhost", "::1") or host.startswith("127.")


def _on_this_host(env: Mapping[str, str]) -> tuple[int, int]:
    """(number of processes on this host, index of this one), from srun or mpirun; (0, 0) without either."""
    try:
        if "JAX_COORDINATOR_ADDRESS" in env:
            return 0, 0
        if "SLURM_STEP_NUM_TASKS" in env:
            each: list[int] = []
            for n, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
                each += [int(n)] * int(times or 1)  # "2(x3),1"
            processes = each[int(env.get("SLURM_NODEID", 0))] if each else int(env.get("SLURM_NTASKS_PER_NODE", 1))
            return processes, int(env.get("SLURM_LOCALID", 0))
        return int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", 0)), int(env.get("OMPI_COMM_WORLD_LOCAL_RANK", 0))
    except (ValueError, IndexError):
        raise UserError("SLURM_STEP_TASKS_PER_NODE, SLURM_NODEID and SLURM_LOCALID do not fit one another") from None
