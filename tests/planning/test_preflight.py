"""`plan --here`: what it compares and says, on facts and figures given by hand; on virtual devices; in two processes."""

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys

import jax
import pytest
from cluster import Cluster

from tinyllama_jax import plan
from tinyllama_jax.base import cli, dims, sharding
from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import xla
from tinyllama_jax.planning import measured, preflight, targets

assert len(jax.devices()) == 8
A100 = targets.TARGETS["a100-40g"]
SOFTWARE = {"python": "3.12.3", "jax": "0.12.0", "jaxlib": "0.12.0", "driver": "570.1", "runtime": "cuda 12090"}
FACTS = {"host": "node07", "devices": 8, "promised": 8, "software": SOFTWARE, "limit": 38_900_000_000, "in use": 0,
         "free": 10**11, "shm": 2**34, "interfaces": ["eth0"], "fabric": {}, "plugins": []}  # fmt: skip
OTHER = FACTS | {"host": "node08"}
GOOD = """node07:1:2 [0] NCCL INFO Using network AWS Libfabric
node07:1:2 [0] NCCL INFO Channel 04/0 : 1[1] -> 2[2] via P2P/CUMEM/read
node07:1:2 [0] NCCL INFO Channel 06/0 : 12[4] -> 4[4] [receive] via NET/AWS Libfabric/2/GDRDMA
"""
TCP = """node07:1:2 [0] NCCL INFO Using network Socket
node07:1:2 [7] NCCL INFO Channel 03/0 : 15[7] -> 6[6] [send] via NET/Socket/3
"""


@pytest.mark.parametrize(
    ("log", "fabric", "plugins", "between", "words"),
    [
        (GOOD, {"rdmap0": "efa"}, ["libnccl-net.so"], 50e9, ""),
        (GOOD.replace("/GDRDMA", ""), {"rdmap0": "efa"}, ["libnccl-net.so"], 50e9, "without GPUDirect"),
        (TCP, {"rdmap0": "efa"}, [], 50e9, "aws-ofi-nccl is not in LD_LIBRARY_PATH"),
        (TCP, {"mlx5_0": "mlx5_core"}, [], 1.25e9, "TCP, not the fabric"),
        (TCP, {}, [], 50e9, "TCP, not the fabric"),
        (TCP, {}, [], 1.25e9, ""),  # such a machine has nothing faster
    ],
)
def test_what_nccl_uses(log, fabric, plugins, between, words):
    networks, ways = measured.transport(log)
    assert networks == {"Socket" if "Socket" in log else "AWS Libfabric"}
    assert ("NET/Socket" in ways) == ("Socket" in log) and ("NET/AWS Libfabric/GDRDMA" in ways) == ("GDRDMA" in log)
    remedy = measured.slow_network(networks, ways, fabric, plugins, between)
    assert words in remedy and bool(words) == bool(remedy)


def test_each_fact_is_compared(monkeypatch, tiny_config_file):
    """Fewer devices than promised, other versions, less memory: each line names the host and the value."""
    for name in preflight.addresses.CHOOSE:
        monkeypatch.delenv(name, raising=False)
    line = preflight._devices(None, [FACTS])
    assert (
        line.expected == "8 by the scheduler or /dev and a GPU or TPU"
        and "is jax[cuda12] or jax[tpu] installed?" in line.remedy
    )
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    line = preflight._devices(None, [FACTS, OTHER])  # 8 virtual devices are here
    assert line.expected == "16 by the scheduler or /dev" and "CUDA_VISIBLE_DEVICES=0,1,2,3" in line.remedy
    assert preflight._devices(None, [FACTS]).remedy == "" and "node07 8" in str(line)
    older = OTHER | {"software": SOFTWARE | {"jax": "0.11.0"}}
    assert preflight._software([FACTS, older]).remedy == "node08 has jax 0.11.0: install the same"
    assert preflight._software([FACTS, OTHER]).remedy == ""
    remedies = lambda *facts: [line.remedy for line in preflight._memory(cli.read("configs/3t.py"), A100, facts)]
    assert remedies(FACTS, OTHER) == ["", ""]
    assert remedies(FACTS, OTHER | {"free": 10**9}) == ["node08 has less than a save needs: end what else runs there", ""]
    assert "another program holds 2.0 GB on node08" in remedies(FACTS, OTHER | {"in use": 2 * 10**9})[1]
    assert "a device of node08 offers less" in remedies(FACTS, OTHER | {"limit": 36 * 10**9})[1]


def test_what_only_gpus_have(monkeypatch, tmp_path):
    """NCCL's lines of a file, /dev/shm of a container, and what nvidia-smi says of the GPUs that this process sees."""
    (tmp_path / "nccl.node07.1").write_text(TCP)
    line = preflight._nccl(tmp_path, A100, [FACTS, OTHER | {"fabric": {"rdmap0": "efa"}}])
    assert "between hosts Socket; fabric rdmap0" in line.value and "aws-ofi-nccl" in line.remedy
    assert preflight._nccl(tmp_path, A100, [FACTS, FACTS]) == ("NCCL", "between GPUs NET/Socket", "", "")  # one host
    monkeypatch.setattr(preflight.jax, "devices", lambda: [argparse.Namespace(platform="gpu")] * 16)
    *_, line = preflight._memory(None, A100, [FACTS, OTHER | {"shm": 2**26}])
    assert line.value == "0.1 GB free" and "--shm-size=16g" in line.remedy
    monkeypatch.setenv("PATH", str(tmp_path))
    assert preflight._smi() == []  # a host without it
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\necho "570.1, 3"\necho "$@" >&2\n[ "$4" != 5,6 ] || echo "570.1, 2048"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    assert preflight._smi() == [["570.1", "3"], ["570.1", "2048"]]


def test_the_bytes_of_a_checkpoint():
    config = cli.read("configs/3t.py")
    assert xla.state_bytes(config) == 12 * dims.n_parameters(config.model)  # 4 each of weight and two moments


def test_the_disk_is_compared_with_a_save(monkeypatch, tmp_path):
    config = dataclasses.replace(cli.read("configs/3t.py"), workdir=str(tmp_path / "no" / "run"))
    every, gigabyte = [FACTS | {"host": socket.gethostname()}], 1e9
    monkeypatch.setattr(measured, "of_disk", lambda place, n, seconds: (gigabyte / 8, gigabyte))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: free_bytes(600e9))
    disk, room = preflight._disk(config, 2**23, every)
    assert f"{tmp_path}: 125 MB/s" in disk.value and "119 s to save 13.2 GB" in disk.value and disk.remedy == room.remedy == ""
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: free_bytes(400e9))
    monkeypatch.setattr(measured, "of_disk", lambda place, n, seconds: (gigabyte / 9, gigabyte))
    disk, room = preflight._disk(config, 2**23, every)
    assert "a preemption costs --checkpoint.minutes and 132 s" in disk.remedy and "keep fewer" in room.remedy
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # a run in a bucket has a working copy there, and sends it
    disk, room = preflight._disk(dataclasses.replace(config, workdir="s3://bucket/run"), 2**23, every)
    assert f"{tmp_path}: 111 MB/s" in disk.value and "111 MB/s sent to s3://bucket/run, so 251 s to save" in disk.value
    assert "keep fewer" in room.remedy
    monkeypatch.undo()
    monkeypatch.setattr(measured, "of_disk", failing)
    [line] = preflight._disk(config, 2**23, every)
    assert "the disk is full" in line.remedy and str(tmp_path) in line.value


def free_bytes(n):
    return argparse.Namespace(free=n)


def failing(*_):
    raise OSError(28, "No space left on device", "x")


def test_a_disk_is_measured_and_left_as_it_was(tmp_path):
    write, read = measured.of_disk(tmp_path, 2**23)
    assert write > 0 and read > 0 and list(tmp_path.iterdir()) == []
    with pytest.raises(OSError):
        measured.of_disk(tmp_path / "nowhere", 2**23)


def test_a_collective_is_compared_by_hand(monkeypatch):
    """128 MiB over 8 devices at 300 GB/s take 391 us; at 0.6 of that and with 50 us of latency 702."""
    mesh = sharding.make_mesh(c.Mesh(1, 8, 1))
    for seconds, remedies in ((700e-6, 0), (704e-6, 1)):
        monkeypatch.setattr(measured, "of_collective", lambda *_, seconds=seconds: seconds)
        gather, scatter, reduce = preflight._collectives(mesh, A100, [FACTS])
        assert gather.name == "all-gather over fsdp (8)" and gather.expected == "167; 300 at full rate"
        assert bool(gather.remedy) == bool(scatter.remedy) == bool(remedies)
        assert reduce.remedy == "" and reduce.value.startswith(
            f"{2 * 2**27 * 7 / 8 / seconds / 1e9:.3g} GB/s"
        )  # it sends twice as much
    monkeypatch.setattr(measured, "of_matmuls", lambda size, times: (2 * 8_192**3 / 200e12, "cuda:3"))
    line = preflight._matmul(A100, [FACTS])
    assert line.expected == "212; 312 at peak" and line.remedy.startswith("is cuda:3 of node07 throttled")


def test_on_virtual_devices(tiny_config_file, tmp_path, monkeypatch, capsys):
    for name in ("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, os.environ.get(name, "0.5"))  # so that it is put back afterwards
    argv = ["--here", "--config", str(tiny_config_file), f"--workdir={tmp_path / 'run'}", "--mesh.data=2"]
    assert plan.main([*argv, "--json"]) == 0
    out = capsys.readouterr()
    lines = {line["name"]: line for line in json.loads(out.out)}
    assert "8 x cpu" in lines["devices"]["value"] and list(tmp_path.iterdir()) == []
    kinds = [f"{kind} over {axis}" for axis in ("data (2)", "fsdp (4)") for kind in preflight.COLLECTIVES]
    assert {"software", "host memory", "disk", "room", "clocks", "matmul", *kinds} <= set(lines)
    assert f"0 of {len(lines)} lines need attention" in out.err
    monkeypatch.setattr(preflight, "SAVE", 0.0)
    assert plan.main(argv) == 1
    assert "CHECK disk: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--on", "cpu:8"], "--on: does not go with --here"),
        (["--law", "chinchilla"], "--law: does not go with --here"),
        (["--mesh.fsdp=2"], "--mesh.fsdp=2: needs --config FILE"),
        (["--config", "CONFIG", "--mesh.fsdp=16"], "--mesh: data=1 x fsdp=16 x tensor=1 needs 16 devices, and 8 are here"),
    ],
)
def test_wrong_use(argv, words, tiny_config_file, monkeypatch):
    for name in ("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, os.environ.get(name, "0.5"))
    with pytest.raises(UserError, match=words):
        plan.main(["--here", *(str(tiny_config_file) if word == "CONFIG" else word for word in argv)])


def test_two_processes(tiny_config_file, tmp_path):
    two = Cluster(tiny_config_file, tmp_path / "run", 2, 2, module="tinyllama_jax.plan", flags=["--here"], mesh__data=2)
    assert two.wait(300) == [0, 0], two.output(0) + two.output(1)
    report = two.output(0)
    assert f"4 x cpu ({socket.gethostname()} 4) in 2 processes" in report
    assert "s apart" in report and "all-reduce over data (2)" in report and "ok    " not in two.output(1)


def test_a_process_that_waits_in_vain_ends_with_a_line(tmp_path):
    code = "import time\nfrom tinyllama_jax.planning import measured\nmeasured.WAIT = 0.2\n"
    code += "with measured.within('nothing'): time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "error: after 0.2 s nothing\n")
