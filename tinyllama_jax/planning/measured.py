"""Measures what `preflight` compares: the rates of a disk, of matmuls and of collectives, and NCCL's transports."""

import contextlib
import json
import math
import os
import re
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from tinyllama_jax.base import store

WAIT = 180  # seconds for the other processes to come, and for a collective to end
PAGE = "launch/RUNBOOK.md, The network between GPU hosts"


def end(line: str) -> None:
    """Ends this process with a line. An exception would not do: at exit JAX waits for the other processes, and then aborts."""
    print(f"error: after {WAIT} s {line}", file=sys.stderr, flush=True)
    os._exit(1)


@contextlib.contextmanager
def within(line: str) -> Iterator[None]:
    """Ends this process with `line` if the `with` block takes longer than `WAIT`."""
    watch = threading.Timer(WAIT, end, [line])
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def gather(name: str, value) -> list:
    """`value` (JSON) of every process, in their order. Ends this process if another does not arrive within `WAIT`."""
    if jax.process_count() == 1:
        return [value]
    from jax._src import distributed  # the coordinator's key-value store works where collectives do not; it has no public name

    client, out = distributed.global_state.client, []
    client.key_value_set(f"preflight/{name}/{jax.process_index()}", json.dumps(value))
    for i in range(jax.process_count()):
        try:
            out.append(json.loads(client.blocking_key_value_get(f"preflight/{name}/{i}", WAIT * 1_000)))
        except RuntimeError:
            end(f"process {i} has not reported its {name}; read what it printed")
    return out


def of_disk(place: store.Place, n_bytes: int, seconds: float = math.inf) -> tuple[float, float]:
    """Bytes/s at which a file in the folder `place` is written, fsync included, and then read from the disk or the bucket.

    It gets `n_bytes`, or what `seconds` allow, and is removed. Raises OSError or UserError.
    """
    path, block, written = place / f".preflight-{socket.gethostname()}-{os.getpid()}", bytearray(os.urandom(2**23)), 0
    began = time.perf_counter()
    try:
        if isinstance(path, store.Remote):
            written = len(content := bytes(block) * 8)
            store.write(path, content)
            write, began = written / (time.perf_counter() - began), time.perf_counter()
            return write, len(store.read(path)) / (time.perf_counter() - began)
        with path.open("wb", buffering=0) as file:
            while written < n_bytes and time.perf_counter() - began < seconds:
                written += file.write(block)
            os.fsync(file.fileno())
            write = written / (time.perf_counter() - began)
            if hasattr(os, "posix_fadvise"):  # not on macOS; without it the file is read from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with path.open("rb", buffering=0) as file:
            began = time.perf_counter()
            while file.readinto(block):
                pass
            return write, written / (time.perf_counter() - began)
    finally:
        store.remove(path)


def of_matmuls(size: int, times: int) -> tuple[float, str]:
    """(seconds of a bf16 matmul of `size` x `size` on the slowest of this process's devices, its name), with all at work."""
    many = jax.jit(lambda x: lax.fori_loop(0, times, lambda _, y: (x @ y) / size, x))

    def seconds(device: jax.Device) -> float:
        x = jax.device_put(jnp.ones((size, size), jnp.bfloat16), device)
        jax.block_until_ready(many(x))
        began = time.perf_counter()
        jax.block_until_ready(many(x))
        return (time.perf_counter() - began) / times

    devices = jax.local_devices()
    with ThreadPoolExecutor(len(devices)) as pool:
        return max(zip(pool.map(seconds, devices), map(str, devices), strict=True))


def of_collective(mesh: jax.sharding.Mesh, axis: str, kind: str, size: int) -> float:
    """The median seconds of all-gather (bf16), reduce-scatter or all-reduce (fp32) over an axis, the longest of all processes.

    `size`: bytes of the whole array. If it does not end within `WAIT`, this process ends with a line.
    """
    part, whole, dtype = PartitionSpec(axis), PartitionSpec(), jnp.dtype("bfloat16" if kind == "all-gather" else "float32")
    f, given, returned = {
        "all-gather": (lambda x: lax.all_gather(x, axis, tiled=True), part, whole),
        "reduce-scatter": (lambda x: lax.psum_scatter(x, axis, tiled=True), whole, part),
        "all-reduce": (lambda x: lax.psum(x, axis), whole, whole),
    }[kind]
    one = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=given, out_specs=returned, check_vma=False))
    x = jax.jit(lambda: jnp.ones(size // dtype.itemsize, dtype), out_shardings=NamedSharding(mesh, given))()

    def seconds(times: int) -> float:
        out = []
        for _ in range(times):
            began = time.perf_counter()
            jax.block_until_ready(one(x))
            out.append(time.perf_counter() - began)
        return max(gather(f"{times} x {kind} {axis}", statistics.median_low(out)))

    with within(f"{kind} over {axis} has not ended: do the hosts reach one another? {PAGE}"):
        seconds(1)  # compiles and connects
        return seconds(max(3, min(20, int(1 / seconds(2)))))


def transport(log: str) -> tuple[set[str], set[str]]:
    """The networks between hosts and the transports between two GPUs, from NCCL's log (NCCL_DEBUG=INFO)."""
    ways = re.findall(r"NCCL INFO Channel .* via (\S+(?: Libfabric\S*)?)", log)
    return set(re.findall(r"NCCL INFO Using network (.+)", log)), {re.sub(r"(?<=NET/)([^/]+)/\d+", r"\1", way) for way in ways}


def slow_network(networks: set[str], ways: set[str], fabric: dict[str, str], plugins: list[str], between: float) -> str:
    """Why NCCL is slow between hosts, and the remedy; empty if it is not. `between`: bytes/s that a node should have."""
    if "Socket" in networks and "efa" in fabric.values() and not plugins:
        return f"TCP, though this host has EFA: aws-ofi-nccl is not in LD_LIBRARY_PATH; {PAGE}"
    if "Socket" in networks and (fabric or between > 15e9):
        return f"TCP, not the fabric; {PAGE}"
    if any(way.startswith("NET/") and "GDRDMA" not in way for way in ways) and "Socket" not in networks:
        return "without GPUDirect all data pass through the host's memory: is nvidia_peermem loaded?"
    return ""
