"""Where a run's processes find one another, on which network interface, and which of a host's GPUs each of them takes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from tinyllama_jax.base.errors import UserError

BIND = "JAX_COORDINATOR_BIND_ADDRESS"  # JAX's own name: HOST or HOST:PORT, where process 0 listens


def one_machine(processes: int, env: Mapping[str, str] = os.environ) -> bool:
    """Whether all processes of this run are on one machine, so that none of them need listen on a network."""
    if address := env.get("JAX_COORDINATOR_ADDRESS"):
        return processes == 1 or _is_loopback(address.rpartition(":")[0])
    return processes == 1 or (processes > 1 and _on_this_host(env)[0] == processes)


def arguments(process: int, processes: int, seconds: int, env: Mapping[str, str] = os.environ) -> dict[str, object]:
    """Arguments for `jax.distributed.initialize`: number of processes, this one's number and GPUs, process 0's address.

    Process 0 listens where `BIND` says, else on the loopback if all are on one machine, else on all interfaces. Raises
    UserError if its address is not known.
    """
    if process < 0:  # on a TPU slice JAX finds all of this by itself
        return {}
    from jax._src import clusters

    out = {"num_processes": processes, "process_id": process, "local_device_ids": gpus(env)}
    address = env.get("JAX_COORDINATOR_ADDRESS")
    if address is None:  # JAX takes the job's first host, and a port computed from the job's number
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

    By itself JAX takes one GPU, number SLURM_LOCALID, under srun and mpirun, even if one process has the whole node.
    """
    if env.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    (here, mine), given = _on_this_host(env), env.get("SLURM_GPUS_ON_NODE", "")
    visible = [gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    seen = len(visible) or len(list(Path("/dev").glob("nvidia[0-9]*")))
    bound = seen < int(given) if given.isdecimal() else seen == 1  # Slurm shows each process only its own
    if here <= 1 or not seen or bound:
        return []
    if seen % here:
        raise UserError(
            f"{here} processes on this host cannot share its {seen} GPUs; start one a host (srun --ntasks-per-node=1) or {seen}"
        )
    each = seen // here
    return list(range(mine * each, (mine + 1) * each))


def check_gpus(platform: str, devices: int, env: Mapping[str, str] = os.environ) -> None:
    """Raises UserError if Slurm gave this host GPUs, but this process runs on a CPU or on fewer GPUs than its share.

    `devices`: how many this process has, of `platform`.
    """
    given, here = env.get("SLURM_GPUS_ON_NODE", ""), _on_this_host(env)[0]
    chosen = env.get("JAX_LOCAL_DEVICE_IDS") or env.get("JAX_PLATFORMS") == "cpu"
    if here and given.isdecimal() and not chosen and (platform == "cpu" or devices * here < int(given)):
        raise UserError(
            f"Slurm gave this host {given} GPUs, and its {here} processes see {0 if platform == 'cpu' else devices * here}; is "
            "jax[cuda12] installed, and what do CUDA_VISIBLE_DEVICES and --gpus-per-task say?"
        )


def listen_on_loopback(processes: int) -> None:
    """Makes the collectives of one machine listen on the loopback alone: NCCL's, and gloo's for CPUs."""
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if processes == 1:
        return
    from jax._src import distributed, xla_bridge
    from jax._src.lib import _jax

    def make_cpu_client():  # JAX has no option for it: by itself gloo listens where the host's name resolves to
        client = distributed.global_state.client
        return xla_bridge.make_cpu_client(_jax.make_gloo_tcp_collectives(client, hostname="127.0.0.1"))

    xla_bridge.register_backend_factory("cpu", make_cpu_client, priority=0, fail_quietly=False)


def _is_loopback(host: str) -> bool:
    return host.strip("[]") in ("localhost", "::1") or host.startswith("127.")


def _on_this_host(env: Mapping[str, str]) -> tuple[int, int]:
    """(number of processes on this host, this one's index among them), from srun or mpirun; (0, 0) without either."""
    try:
        if "JAX_COORDINATOR_ADDRESS" in env:
            return 0, 0
        if "SLURM_STEP_NUM_TASKS" in env:
            each: list[int] = []
            for n, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
                each += [int(n)] * int(times or 1)  # "2(x3),1"
            here = each[int(env.get("SLURM_NODEID", 0))] if each else int(env.get("SLURM_NTASKS_PER_NODE", 1))
            return here, int(env.get("SLURM_LOCALID", 0))
        return int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", 0)), int(env.get("OMPI_COMM_WORLD_LOCAL_RANK", 0))
    except (ValueError, IndexError):
        raise UserError("SLURM_STEP_TASKS_PER_NODE, SLURM_NODEID and SLURM_LOCALID do not fit one another") from None
