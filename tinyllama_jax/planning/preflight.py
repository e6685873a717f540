"""Checks and measures the machine that this process runs on, before a run pays for its first step."""

import argparse
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from tinyllama_jax.base import cli, sharding, store
from tinyllama_jax.base import config as config_lib
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError, disk_error
from tinyllama_jax.core import xla
from tinyllama_jax.planning import hlo, measured, targets, timing
from tinyllama_jax.planning.measured import PAGE, WAIT, gather
from tinyllama_jax.run import addresses, cluster, folder

FAILED = 1  # exit code
DISK_SECONDS = 8.0  # after which a process stops writing, however little it has written
SAVE = 120.0  # seconds of a save: with --checkpoint.minutes=8 a preemption then costs at most 10 minutes
COPIES = 2  # of its part of the state, in a host's memory during a save (benchmarks/cpu.md)
SHARED_MEMORY = 2**30  # bytes of /dev/shm for NCCL; a container has 64 MiB unless it asks for more
OTHERS = 10**9  # bytes of a device's memory in use before the run; a driver alone takes less
COLLECTIVES = "all-gather", "reduce-scatter", "all-reduce"
PLUGINS = "/opt/amazon/ofi-nccl/lib /opt/amazon/ofi-nccl/lib/x86_64-linux-gnu /usr/local/gib/lib64 /usr/local/nvidia/lib64"


class Line(NamedTuple):
    """A line of the report."""

    name: str
    value: str
    expected: str = ""  # empty: nothing to compare with
    remedy: str = ""  # empty: it is as expected

    def __str__(self) -> str:
        expected, remedy = self.expected and f" (expected: {self.expected})", self.remedy and f"; {self.remedy}"
        return f"{'CHECK' if remedy else 'ok   '} {self.name}: {self.value}{expected}{remedy}"


def main(args: argparse.Namespace, overrides: list[str]) -> int:
    """Prints the report; returns 0, or `FAILED` if a line is not as expected. Every process of a job calls it alike."""
    wrong = [f"--{name}" for name in ("on", "sweep", "law", "price", "mfu", "picture", "flops") if getattr(args, name)]
    if wrong:
        raise UserError(f"{wrong[0]}: does not go with --here, which measures the machine that the command runs on")
    if overrides and not args.config:
        raise UserError(f"{overrides[0]}: needs --config FILE")
    config = cli.override(cli.read(args.config), cli.pairs(overrides)) if args.config else None
    began, lines, out = time.perf_counter(), [], sys.stderr if args.json else sys.stdout
    with tempfile.TemporaryDirectory() as scratch:
        logs = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET,P2P,SHM", "NCCL_DEBUG_FILE": f"{scratch}/nccl.%h.%p"}
        os.environ.update(logs)  # before NCCL starts
        for line in _lines(config, Path(scratch)):
            lines.append(line)
            if jax.process_index() == 0:
                print(line, file=out, flush=True)
    failed = sum(bool(line.remedy) for line in lines)
    if jax.process_index() == 0:
        print(f"{failed} of {len(lines)} lines need attention, after {time.perf_counter() - began:.0f} s", file=out)
        if args.json:
            print(json.dumps([line._asdict() for line in lines], indent=1))
    return FAILED if failed else 0


def _lines(config: Config | None, scratch: Path) -> Iterator[Line]:
    smi = _smi()
    xla.reserve_memory()
    process, processes = cluster.identity()
    where = addresses.arguments(process, processes, WAIT).get("coordinator_address") if processes > 1 else "one another"
    with measured.within(f"the processes have not met: does each host run this command, and do they reach {where}?"):
        cluster.join(2 * WAIT / cluster.STARTING)  # longer than WAIT: JAX would abort
        every = gather("facts", _facts(smi))
    target = targets.of(jax.devices()[0].device_kind)
    yield _devices(config, every)
    mesh = sharding.make_mesh(config.mesh if config else config_lib.Mesh())
    yield _software(every)
    yield from _memory(config, target, every)
    yield from _disk(config, 2**29 if target else 2**26, every)
    yield _clocks(every)
    yield _matmul(target, every)
    yield from _collectives(mesh, target, every)
    if jax.devices()[0].platform == "gpu":
        yield _nccl(scratch, target, every)


def _smi() -> list[list[str]]:
    """[driver, MiB in use] of each of this process's GPUs, before JAX reserves their memory; [] without nvidia-smi."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", "--query-gpu=driver_version,memory.used", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command + (["-i", chosen] if chosen else []), capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.split(", ") for line in text.splitlines() if re.fullmatch(r"[\d.]+, \d+", line)]


def _facts(smi: list[list[str]]) -> dict:
    """What this process knows of its host, in JSON."""
    devices, versions, system = jax.local_devices(), folder.versions(), Path("/sys/class")
    software = {"python": versions["python"], "runtime": devices[0].client.platform_version.splitlines()[0]}
    paths = [*os.environ.get("LD_LIBRARY_PATH", "").split(":"), *PLUGINS.split()]
    return {
        "host": socket.gethostname(),
        "devices": len(devices),
        "promised": addresses.promised(),
        "software": software | {"driver": smi[0][0] if smi else ""} | versions["packages"],
        "limit": min((d.memory_stats() or {}).get("bytes_limit", 0) for d in devices),
        "in use": max((int(used) * 2**20 for _, used in smi), default=0),
        "free": _free_memory(),
        "shm": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        "interfaces": sorted(p.name for p in (system / "net").glob("*")),
        "fabric": {p.name: (p / "device" / "driver").resolve().name for p in (system / "infiniband").glob("*")},
        "plugins": sorted({p.name for folder in paths if folder for p in Path(folder).glob("libnccl-net*.so")}),
    }


def _free_memory() -> int:
    """Free bytes of this host's memory, or of this container's, whose limit counts cached files that can be dropped."""
    info, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    free = [1_024 * int(kib) for kib in re.findall(r"MemAvailable: +(\d+)", info.read_text() if info.is_file() else "")]
    if (limit := group / "memory.max").is_file() and (most := limit.read_text().strip()).isdecimal():
        cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        free.append(int(most) - int((group / "memory.current").read_text()) + int(cached[1]))
    return min(free, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


# -- what the hosts have --------------------------------------------------------------------------------------------------


def _hosts(every: list[dict], fact: str) -> dict[str, list]:
    """Host -> a fact of each of its processes."""
    return {facts["host"]: [other[fact] for other in every if other["host"] == facts["host"]] for facts in every}


def _devices(config: Config | None, every: list[dict]) -> Line:
    promised = sum(map(max, _hosts(every, "promised").values()))
    mesh = math.prod((config.mesh.data, config.mesh.fsdp, config.mesh.tensor)) if config else -1
    n, where = len(jax.devices()), ", ".join(f"{host} {sum(of)}" for host, of in _hosts(every, "devices").items())
    wanted = [f"{promised} by the scheduler or /dev"] * (promised > 0) + [f"{mesh} by --mesh"] * (mesh > 0)
    chosen = " ".join(f"{name}={os.environ[name]}" for name in addresses.CHOOSE if name in os.environ)
    wanted += ["a GPU or TPU"] * (only_cpu := jax.devices()[0].platform == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu")
    remedy = f"is jax[cuda12] or jax[tpu] installed? {chosen}" if only_cpu or n < max(promised, mesh) else ""
    value = f"{n} x {jax.devices()[0].device_kind} ({where}) in {len(every)} processes"
    return Line("devices", value, " and ".join(wanted), remedy)


def _software(every: list[dict]) -> Line:
    first, remedy = every[0]["software"], ""
    for facts in every:
        if other := [f"{name} {version}" for name, version in facts["software"].items() if version != first[name]]:
            remedy = f"{facts['host']} has {', '.join(other)}: install the same"
    value = ", ".join(f"{name} {first[name]}" for name in ("python", "jax", "jaxlib", "driver", "runtime") if first[name])
    return Line("software", value, "the same on all hosts", remedy)


def _memory(config: Config | None, target: targets.Target | None, every: list[dict]) -> Iterator[Line]:
    """Memory of the hosts and of the devices, and /dev/shm."""
    least, host = min((facts["free"], facts["host"]) for facts in every)
    needs = COPIES * xla.state_bytes(config) // len(_hosts(every, "free")) if config else 0
    remedy = f"{host} has less than a save needs: end what else runs there" if least < needs else ""
    yield Line("host memory", f"at least {gb(least)} free", f"{gb(needs)} for a save" if config else "", remedy)
    least, host = min((facts["limit"], facts["host"]) for facts in every)
    if least:
        used, busy = max((facts["in use"], facts["host"]) for facts in every)
        known = int(0.97 * target.memory * (xla.memory_fraction() if target.sm else 1)) if target else 0
        remedy = f"a device of {host} offers less: is it another kind?" if least < known else ""
        remedy = f"another program holds {gb(used)} on {busy}: nvidia-smi names it" if used > OTHERS else remedy
        yield Line("device memory", f"{gb(least)} usable on each, {gb(used)} in use before", gb(known) if known else "", remedy)
    if jax.devices()[0].platform == "gpu" and len(jax.devices()) > len(_hosts(every, "shm")):
        shm = min(facts["shm"] for facts in every)
        remedy = "docker run --shm-size=16g; in Kubernetes an emptyDir of medium Memory" if shm < SHARED_MEMORY else ""
        yield Line("/dev/shm", f"{gb(shm)} free", gb(SHARED_MEMORY), remedy)


def gb(n: float) -> str:
    """Bytes as text in GB."""
    return f"{n / 1e9:,.1f} GB"


def _disk(config: Config | None, n_bytes: int, every: list[dict]) -> Iterator[Line]:
    """The rates of the run folder's disk, to which the processes of a host write `n_bytes` together, and its room."""
    run = store.place(config.workdir if config else ".", "--workdir")
    folder = place = (config.folder if config else Path(".")).absolute()  # of a run in a bucket: the working copy
    while not place.is_dir():
        place = place.parent
    host, sends = socket.gethostname(), isinstance(run, store.Remote) and jax.process_index() == 0
    try:
        result = [*measured.of_disk(place, n_bytes // len(_hosts(every, "host")[host]), DISK_SECONDS)]
        result += [shutil.disk_usage(place).free, measured.of_disk(run, n_bytes, DISK_SECONDS)[0] if sends else math.inf]
    except (OSError, UserError) as error:
        why = disk_error(error) if isinstance(error, OSError) else error
        result = f"process {jax.process_index()} on {host}: {why}"
    results = gather("disk", result)
    if failed := [text for text in results if isinstance(text, str)]:
        yield Line("disk", str(run if sends else place), "each process can write there", failed[0])
        return
    write, read, free, sent = sum(one[0] for one in results), results[0][1], min(one[2] for one in results), results[0][3]
    value = f"{place}: {write / 1e6:,.0f} MB/s written by all, {read / 1e6:,.0f} MB/s read by process 0"
    value += f", {sent / 1e6:,.0f} MB/s sent to {run}" if sends else ""
    if not config:
        yield Line("disk", f"{value}, {gb(free)} free")
        return
    keep, state = config.checkpoint, xla.state_bytes(config)
    seconds, most = state / write + state / read + state / sent, keep.grace or SAVE  # process 0 reads all of it, to seal it
    remedy = f"take a faster disk: a preemption costs --checkpoint.minutes and {seconds:,.0f} s" if seconds > most else ""
    yield Line("disk", f"{value}, so {seconds:,.0f} s to save {gb(state)}", f"at most {most:.0f} s", remedy)
    n = keep.keep + 1 + len(keep.kept) + (config.train.steps // keep.keep_every if keep.keep_every else 0)
    used = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    remedy = "free room, or keep fewer (--checkpoint.keep, keep_every)" if free + used < n * state else ""
    yield Line("room", f"{gb(free + used)} free, or taken by its checkpoints", f"{gb(n * state)} for {n} checkpoints", remedy)


def _clocks(every: list[dict]) -> Line:
    gather("arrival", None)  # all go on from here within milliseconds
    times = [(at, facts["host"]) for at, facts in zip(gather("clock", time.time()), every, strict=True)]
    (early, behind), (late, ahead) = min(times), max(times)
    remedy = f"{ahead} is ahead of {behind}: does chrony or systemd-timesyncd run there?" if late - early > 1 else ""
    return Line("clocks", f"{late - early:.2f} s apart", "at most 1 s", remedy)


# -- what the devices reach -----------------------------------------------------------------------------------------------


def _matmul(target: targets.Target | None, every: list[dict]) -> Line:
    """The rate of bf16 matmuls of the slowest device while all are at work."""
    size, times = (8_192, 20) if target else (512, 2)
    every = zip(gather("matmul", measured.of_matmuls(size, times)), every, strict=True)
    (slowest, device), host = max((one, facts["host"]) for one, facts in every)
    rate, peak = 2 * size**3 / slowest / 1e12, target.flops / 1e12 if target else 0
    low = target.rates.matmul[0] * peak if target else 0
    remedy = f"is {device} of {host} throttled or shared? nvidia-smi -q -d PERFORMANCE" if rate < low else ""
    expected = f"{low:,.0f}; {peak:,.0f} at peak" if target else ""
    return Line("matmul", f"{rate:,.3g} TFLOP/s in bf16, the slowest: {device} of {host}", expected, remedy)


def _collectives(mesh: jax.sharding.Mesh, target: targets.Target | None, every: list[dict]) -> Iterator[Line]:
    """A line for each collective over each axis of the mesh, beside the slowest that `plan` expects."""
    order = sorted(mesh.devices.flat, key=lambda d: (every[d.process_index]["host"], d.process_index, d.id))
    nodes = len(_hosts(every, "host")) if target and target.sm else 1  # a TPU slice counts as one
    machine = targets.Machine("", target, order, len(order) // nodes)
    for axis, n in mesh.shape.items():
        for kind in COLLECTIVES if n > 1 else ():
            name, size = f"{kind} over {axis} ({n})", (2**27 if target else 2**20) // (4 * n) * 4 * n
            seconds = measured.of_collective(mesh, axis, kind, size)
            sent = size * (n - 1) / n * (2 if kind == "all-reduce" else 1) / 1e9
            value = f"{sent / seconds:,.3g} GB/s a device ({seconds * 1e3:,.2f} ms for {size >> 20} MiB)"
            if target:
                wire = timing.wire_seconds([hlo.Collective(kind, "", size, (axis,), n, 1, False, "")], mesh, machine)
                longest = wire / target.rates.links[0] + target.rates.latency[0]
                remedy = f"slow links: see the lines on NCCL, and {PAGE}" if seconds > longest else ""
                yield Line(name, value, f"{sent / longest:,.3g}; {sent / wire:,.3g} at full rate", remedy)
            else:
                yield Line(name, value)


# -- the network ----------------------------------------------------------------------------------------------------------


def _nccl(scratch: Path, target: targets.Target | None, every: list[dict]) -> Line:
    own = measured.transport("".join(path.read_text(errors="replace") for path in scratch.glob("nccl.*")))
    both = gather("transport", [sorted(names) for names in own])
    networks, ways = ({name for one in both for name in one[i]} for i in range(2))
    named = lambda names: ", ".join(sorted(names)) or "not known"
    if len(_hosts(every, "host")) == 1:
        return Line("NCCL", f"between GPUs {named(ways)}")
    facts = max(every, key=lambda facts: len(facts["fabric"]))
    remedy = measured.slow_network(networks, ways, facts["fabric"], facts["plugins"], target.between if target else 0)
    value = f"between GPUs {named(ways)}, between hosts {named(networks)}; fabric {named(facts['fabric'])}"
    value += f", plug-ins {named(facts['plugins'])}, interfaces {named(facts['interfaces'])}"
    asked = f", NCCL_SOCKET_IFNAME={name}" if (name := os.environ.get("NCCL_SOCKET_IFNAME")) else ""
    return Line("NCCL", value + asked, "the fabric's network, with GDRDMA", remedy)
