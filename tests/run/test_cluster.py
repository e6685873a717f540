"""How processes find one another: on which interface they listen, and which of a host's GPUs each takes."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch.commands import listening

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.run import addresses

ROOT = Path(__file__).parents[2]
GPUS = ",".join(map(str, range(8)))
# what srun gives a task of launch/slurm.sbatch, 2 nodes with 8 GPUs and one task each, as tests/slurm.sh sees it
SBATCH = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_GPUS_ON_NODE": "8",
    "CUDA_VISIBLE_DEVICES": GPUS,
}
EIGHT = {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NTASKS_PER_NODE": "8", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "3"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
ALL = []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SBATCH, ALL),  # one task a node
        (SBATCH | {"SLURM_STEP_TASKS_PER_NODE": ""}, ALL),
        (SBATCH | EIGHT, [3]),  # one a GPU, each of which sees all
        (SBATCH | EIGHT | {"CUDA_VISIBLE_DEVICES": "3"}, ALL),  # and each sees its own: --gpus-per-task=1
        (SBATCH | EIGHT | {"CUDA_VISIBLE_DEVICES": "3", "SLURM_GPUS_ON_NODE": ""}, ALL),
        (SBATCH | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"}, [4, 5, 6, 7]),
        (SBATCH | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "0,1"}, ALL),  # --gpus-per-task=2
        (SBATCH | {"SLURM_STEP_TASKS_PER_NODE": "1,4", "SLURM_LOCALID": "3"}, [6, 7]),
        (SBATCH | {"SLURM_STEP_TASKS_PER_NODE": "3(x2)"}, "3 processes on this host cannot share its 8 GPUs"),
        (SBATCH | {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "5"}, "do not fit one another"),
        (SBATCH | EIGHT | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "CUDA_VISIBLE_DEVICES": GPUS}, ALL),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": GPUS}, [4, 5, 6, 7]),
        (SBATCH | EIGHT | EXPLICIT, ALL),
        ({}, ALL),
    ],
)
def test_the_gpus_of_a_process(environment, expected):
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            addresses.gpus(environment)
    else:
        assert addresses.gpus(environment) == expected


PACKED = SBATCH | {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}  # both tasks on one node


@pytest.mark.parametrize(
    ("environment", "count", "address", "bind"),
    [
        (SBATCH, 2, "node07:61809", "[::]:61809"),  # 61440 + 70001 % 4096
        (SBATCH | {"JAX_COORDINATOR_PORT": "9000"}, 2, "node07:9000", "[::]:9000"),
        (SBATCH | {addresses.BIND: "10.1.0.7"}, 2, "node07:61809", "10.1.0.7:61809"),
        (SBATCH | {addresses.BIND: "[fd00::7]:9001"}, 2, "node07:61809", "[fd00::7]:9001"),
        (PACKED, 2, "127.0.0.1:61809", "127.0.0.1:61809"),
        (EXPLICIT, 2, "10.0.0.1:8476", "[::]:8476"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "localhost:1"}, 2, "localhost:1", "localhost:1"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "[::1]:1"}, 2, "[::1]:1", "[::1]:1"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "host"}, 2, "JAX_COORDINATOR_ADDRESS=host: must be HOST:PORT", ""),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 4, "JAX_COORDINATOR_ADDRESS=: must be HOST:PORT", ""),
        # as mpirun 4.1 sets it; 1531576320 / 4096 % 4096 = 1184, and 61440 + 1184 = 62624
        (MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}, 4, "10.96.0.1:62624", "[::]:62624"),
    ],
)
def test_where_process_0_listens(monkeypatch, environment, count, address, bind):
    """By JAX's own detection, which asks the environment for the job's first host and its number."""
    for name in list(os.environ):
        if name.startswith(("JAX_COORD", "SLURM_", "OMPI_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not bind:
        with pytest.raises(UserError, match=re.escape(address)):
            addresses.arguments(1, count, 1)
        return
    told = addresses.arguments(1, count, 1)
    assert (told["coordinator_address"], told["coordinator_bind_address"]) == (address, bind)
    assert (told["num_processes"], told["process_id"], told["local_device_ids"]) == (count, 1, addresses.gpus())


@pytest.mark.parametrize(
    ("environment", "ours", "alone"),
    [
        (SBATCH, ALL, [0]),  # the fault: one GPU of eight
        (SBATCH | EIGHT, [3], [3]),
        (SBATCH | EIGHT | {"CUDA_VISIBLE_DEVICES": "3"}, ALL, [3]),  # --gpu-bind=single:1: it has one, whose number is 0
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": GPUS}, [4, 5, 6, 7], [1]),
    ],
)
def test_jax_takes_the_devices_that_we_name(monkeypatch, environment, ours, alone):
    """JAX's own detection, as `jax.distributed.initialize` calls it, keeps our list; without one it takes the local number."""
    from jax._src import clusters

    for name in list(os.environ):
        if name.startswith(("JAX_COORD", "JAX_LOCAL", "SLURM_", "OMPI_")):
            monkeypatch.delenv(name)
    for name, value in ({"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.96.0.1:34911"} | environment).items():
        monkeypatch.setenv(name, value)
    if "SLURM_JOB_ID" in environment:
        monkeypatch.delenv("OMPI_MCA_orte_hnp_uri")
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    assert detect(None, None, None, addresses.gpus(), None, 1)[3] == ours
    assert detect(None, None, None, None, None, 1)[3] == alone


def test_fewer_gpus_than_slurm_gave_are_refused():
    addresses.check_gpus("gpu", 8, SBATCH)
    addresses.check_gpus("gpu", 1, SBATCH | EIGHT)
    addresses.check_gpus("cpu", 1, SBATCH | {"JAX_PLATFORMS": "cpu"})
    addresses.check_gpus("gpu", 2, SBATCH | {"JAX_LOCAL_DEVICE_IDS": "0,1"})
    addresses.check_gpus("cpu", 1, {})
    alone = {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0"}  # of one process, started without srun
    addresses.check_gpus("gpu", 1, alone | {"JAX_CUDA_VISIBLE_DEVICES": "0"})
    for platform, devices, environment, words in (
        ("gpu", 1, SBATCH, "gave this host 8 GPUs, and its 1 processes see 1"),
        ("cpu", 2, SBATCH, "gave this host 8 GPUs, and its 1 processes see 0; is jax.cuda12. installed"),
        ("gpu", 1, alone, "CUDA_VISIBLE_DEVICES=0 hides the others; to take fewer, set JAX_CUDA_VISIBLE_DEVICES"),
        ("cpu", 1, SBATCH | EIGHT | {"CUDA_VISIBLE_DEVICES": ""}, "this step has none .*--gpu-bind=single:1"),
    ):
        with pytest.raises(UserError, match=words):
            addresses.check_gpus(platform, devices, environment)


JOIN = """
import json, jax
from jax._src import xla_bridge
from tinyllama_jax.run import cluster
cluster.join(20)
print(json.dumps([xla_bridge.CUDA_VISIBLE_DEVICES.value, jax.process_index(), jax.process_count(), jax.device_count()]))
"""


def test_one_process_checks_its_gpus_too():
    """Without it a job of one process trains on a CPU beside eight GPUs that are paid for."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "JAX_"))} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", JOIN], env=env | {"SLURM_GPUS_ON_NODE": "999"}, capture_output=True, text=True)
    assert "UserError: Slurm gave this host 999 GPUs, and its 1 processes see " in done.stderr


def test_one_task_a_node_as_slurm_starts_it_has_all_the_devices():
    """Two real processes that meet by Slurm's variables, as two nodes of the loopback."""
    with_port = SBATCH | {"SLURM_STEP_NODELIST": "localhost", "JAX_COORDINATOR_PORT": str(free_port())}
    processes = []
    for i in range(2):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_COORD"))} | with_port
        env |= {"SLURM_PROCID": str(i), "SLURM_NODEID": str(i), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        env |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
        processes.append(subprocess.Popen([sys.executable, "-c", JOIN], env=env, stdout=subprocess.PIPE, text=True))
    out = [process.communicate()[0].splitlines()[-1:] for process in processes]
    assert [json.loads(line) for [line] in out] == [["all", 0, 2, 16], ["all", 1, 2, 16]]  # and not "0", JAX's own guess


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# -- what listens ---------------------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(not Path("/proc/net/tcp").is_file(), reason="/proc does not say who listens here")
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def tree(pid: int) -> list[int]:
    """A process and all that it started."""
    out = [pid]
    for parent in out:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            out += map(int, task.read_text().split())
    return out


@linux
def test_several_processes_on_one_machine_listen_on_the_loopback_alone(tiny_config_file, tmp_path):
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [ROOT / "launch" / "local.sh", "2", "--", "--config", tiny_config_file, f"--workdir={tmp_path / 'run'}"]
    command += ["--train.steps=100000", "--train.seqs_per_device=4"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found: set[str] = set()
    try:
        while process.poll() is None and not (tmp_path / "run" / "metrics.jsonl").is_file():  # training: all is open
            found |= listening(tree(process.pid))
            time.sleep(0.05)
        found |= listening(tree(process.pid))
    finally:
        process.terminate()
        process.wait(120)
    assert found, "it trained without any port, or not at all"
    assert found <= LOOPBACK


@linux
def test_one_process_listens_nowhere(tiny_config_file, tmp_path):
    """Every command but `prepare`, one after the other, in one process."""
    run, config = str(tmp_path / "run"), str(tiny_config_file)
    commands = [
        ["tinyllama_jax.train", "--config", config, f"--workdir={run}", "--train.steps=6", "--checkpoint.every=3"],
        ["tinyllama_jax.generate", "--checkpoint", run, "--prompt", "a", "--max-new-tokens", "2"],
        ["tinyllama_jax.replay", "--run", run, "--step", "5"],
        ["tinyllama_jax.report", run],
        ["tinyllama_jax.plan", "--law", "chinchilla", "--picture", str(tmp_path / "law.png")],
        ["tinyllama_jax.audit", str(tiny_config_file.with_name("a")), "--page", str(tmp_path / "audit.html")],
        [str(ROOT / "tools" / "convert_to_torch.py"), "--checkpoint", run, "--output", str(tmp_path / "hf")],
        [str(ROOT / "tools" / "convert_from_torch.py"), "--checkpoint", str(tmp_path / "hf"), "--output", str(tmp_path / "in")],
    ]
    (tmp_path / "commands").write_text(json.dumps(commands))
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-W", "ignore", ROOT / "tests" / "launch" / "commands.py", tmp_path / "commands"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    out = json.loads(done.stdout.splitlines()[-1])
    assert [code for code in out["codes"] if code not in (0, 4)] == [], done.stdout + done.stderr  # 4: what audit has to say
    assert len(out["codes"]) == len(commands) and out["ever"] == []
