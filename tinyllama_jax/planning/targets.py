"""The accelerators that a plan knows: speed, memory, price, and devices to compile for without having them."""

import difflib
import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import xla

PLUGINS = {"cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "tpu": ("libtpu",)}


class Sm(NamedTuple):
    """A GPU's multiprocessors, as XLA's compiler needs them (device_description.proto of XLA)."""

    capability: tuple[int, int]  # compute capability
    count: int
    lanes: int  # fp32 operations a clock, each
    clock: float  # GHz, boost
    l2: int  # bytes
    threads: int  # resident at once, each
    shared: int  # bytes of shared memory, each; a block can have at most 1 KB less


class Rates(NamedTuple):
    """The achieved rates of a target: the slowest, the middle and the fastest that can be expected."""

    matmul: tuple[float, float, float]  # achieved fraction of peak
    attention: dict[str, float]  # the middle TFLOP/s of each kernel, counting the matmuls that it executes, causal half
    error: float  # of `attention`, as a fraction of it
    memory: tuple[float, float, float]  # achieved fraction of the bandwidth
    links: tuple[float, float, float]  # achieved fraction of the links' bandwidth
    latency: tuple[float, float, float]  # seconds that a collective takes in addition to its transfer
    gap: tuple[float, float, float]  # seconds between two kernels
    source: str


class Target(NamedTuple):
    """A kind of accelerator. Bytes, bytes/s and FLOP/s of one device unless noted; 1 GB = 10^9 bytes."""

    kind: str  # the beginning of `jax.Device.device_kind`
    shape: str  # an example of the part after the colon: NODESxGPUS, or a TPU slice's chips along each axis
    memory: int  # what programs can use, as the driver or the TPU compiler reports it
    flops: float  # peak of dense bf16 matmuls with fp32 accumulation
    bandwidth: float  # of memory
    link: float  # one direction, all links to devices of the same node or slice together
    between: float  # one direction, from a whole NODE to other nodes; 0 for a TPU slice, which counts as one node
    price: float | None  # USD an hour, on demand; None: none is published
    rates: Rates
    source: str
    sm: Sm | None = None  # GPUs
    spot: str = ""  # what others ask, also for machines that they may take back; with source and date
    anchor: str = ""  # what others measured of a model of this size
    cores: int = 1  # devices of a chip; a TPU slice's shape counts chips

    @property
    def platform(self) -> str:
        """The PJRT plugin that compiles for it."""
        return "cuda" if self.sm else "tpu"


_A100 = "NVIDIA A100 datasheet and architecture whitepaper; CUDA programming guide, compute capability 8.0; "
_H100 = "NVIDIA Hopper whitepaper; CUDA programming guide, compute capability 9.0; "
_B200 = (
    "NVIDIA HGX B200 datasheet and Blackwell tuning guide; memory, bandwidth, multiprocessors: pytorch/ao pull request 4002; "
)
_RUNPOD = "RunPod, 2026-03 (deploybase.ai/articles/runpod-gpu-pricing): spot "
_EFA = "400 Gb/s of EFA a node"
_OURS = ("attention_forward", "attention_dq", "attention_dkv")
_CUDNN = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
_SPLASH = ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv")


def _gpu(matmul: tuple, ours: tuple, cudnn: tuple, error: float, source: str) -> Rates:
    attention = dict(zip(_OURS + _CUDNN, ours + cudnn, strict=True))
    source += ("; links: nccl-tests on p4d.24xlarge, 231 of 300 GB/s in a node, 30 of 50 between 4 (NVIDIA/nccl issue 527); "
               "gaps: 0.5 to 0.9 us (NVIDIA, Getting Started with CUDA Graphs), at worst 3 us; others assumed")  # fmt: skip
    memory, links, latency, gap = (0.75, 0.84, 0.90), (0.60, 0.77, 0.90), (50e-6, 30e-6, 15e-6), (3e-6, 1e-6, 0.5e-6)
    return Rates(matmul, attention, error, memory, links, latency, gap, source)


# Attention: TFLOP/s at B=8 S=2048 N=32 K=4 H=64, causal, in the order of _OURS, then of _CUDNN. Update with the kernels.
_SM80 = _gpu((0.68, 0.77, 0.85), (196, 199, 206), (152, 145), 0.10,
             "matmuls: at most 268 of 312 TFLOP/s (mamf-finder), so 212 to 265 assumed; attention: modelled from the compiled "
             "kernels, cuDNN's as FlashAttention-2's (benchmarks/attention.md)")  # fmt: skip
_SM90 = _gpu((0.58, 0.66, 0.80), (250, 200, 180), (320, 310), 0.20,
             "matmuls: at most 794 of 989 TFLOP/s (mamf-finder); attention: cuDNN's 395 TFLOP/s without a mask (the paper of "
             "FlashAttention-3), a fifth less with one; ours below a third of the peak, assumed")  # fmt: skip
_RTX3090 = _gpu((0.80, 0.90, 1.00), (53, 46, 46), (53, 46), 0.25, "matmuls and attention: assumed")
_RTX4090 = _gpu((0.80, 0.95, 1.05), (123, 107, 107), (123, 107), 0.25,
                "matmuls: at most 178 TFLOP/s, above the nominal 165 (mag-/gpu_benchmark); attention: assumed")  # fmt: skip
_RTX5090 = _gpu((0.80, 0.90, 1.00), (156, 136, 136), (156, 136), 0.30,
                "matmuls and attention: assumed, attention as that of the RTX 4090 by the ratio of their peaks")  # fmt: skip
_SM100 = _gpu((0.55, 0.68, 0.80), (400, 320, 290), (640, 620), 0.35,
              "matmuls and attention: assumed, attention at twice the H100's TFLOP/s")  # fmt: skip


def _tpu(flops: float) -> Rates:
    attention = dict.fromkeys(_SPLASH, flops / 4e12)  # heads of 64 fill half of the 128 lanes
    memory, links, latency = (0.70, 0.80, 0.90), (0.60, 0.80, 0.95), (5e-6, 2e-6, 1e-6)
    source = "nothing is measured, all rates are assumed: the range is wide, and its upper end is meant as a ceiling"
    return Rates((0.65, 0.80, 0.95), attention, 0.60, memory, links, latency, (0, 0, 0), source)


TARGETS = {
    "a100-40g": Target("NVIDIA A100", "2x8", 42_298_834_944, 312e12, 1.555e12, 300e9, 50e9, 2.745, _SM80,
        _A100 + f"AWS p4d.24xlarge: {_EFA}, 21.96 USD an hour for 8 (2026-09; 32.77 before 2025-06)",
        Sm((8, 0), 108, 64, 1.41, 41_943_040, 2_048, 167_936)),
    "a100-80g": Target("NVIDIA A100", "1x8", 85_100_068_864, 312e12, 2.039e12, 300e9, 50e9, 3.431, _SM80,
        _A100 + f"AWS p4de.24xlarge: {_EFA}, 27.45 USD an hour for 8 (2026)",
        Sm((8, 0), 108, 64, 1.41, 41_943_040, 2_048, 167_936), _RUNPOD + "1.39 USD; on demand 2.45"),
    "h100": Target("NVIDIA H100", "1x8", 84_942_979_072, 989e12, 3.352e12, 450e9, 400e9, 6.88, _SM90,
        _H100 + "AWS p5.48xlarge: 3,200 Gb/s a node, 55.04 USD an hour for 8 (2026-07)",
        Sm((9, 0), 132, 128, 1.98, 52_428_800, 2_048, 233_472), _RUNPOD + "2.69 USD; on demand 4.76"),
    "h200": Target("NVIDIA H200", "1x8", 150_109_000_000, 989e12, 4.8e12, 450e9, 400e9, 7.912, _SM90,
        _H100 + "NVIDIA H200 datasheet; AWS p5en.48xlarge: 3,200 Gb/s a node, 63.30 USD an hour for 8 (2026-08)",
        Sm((9, 0), 132, 128, 1.98, 52_428_800, 2_048, 233_472), _RUNPOD + "3.59 USD; on demand 6.35"),
    "rtx3090": Target("NVIDIA GeForce RTX 3090", "1x8", 25_286_672_384, 71e12, 0.936e12, 22e9, 1.25e9, 0.50, _RTX3090,
        "NVIDIA GA102 whitepaper; CUDA programming guide, compute capability 8.6; PCIe 4.0 x16, 20 to 23 GB/s as users measure "
        "it; between nodes 10 Gb/s: assumed; RunPod, 0.50 USD an hour (2026-09)",
        Sm((8, 6), 82, 128, 1.695, 6_291_456, 1_536, 102_400), _RUNPOD + "0.22 USD"),
    "rtx4090": Target("NVIDIA GeForce RTX 4090", "1x8", 25_250_627_584, 165e12, 1.008e12, 15.5e9, 1.25e9, 0.74, _RTX4090,
        "NVIDIA Ada whitepaper 2.02, appendix A; CUDA programming guide, compute capability 8.9; no NVLink nor peer-to-peer: "
        "31 GB/s both ways through the host (Puget Systems, 2023); between nodes 10 Gb/s: assumed; RunPod, 0.74 USD an "
        "hour (2026-10)",
        Sm((8, 9), 128, 128, 2.52, 75_497_472, 1_536, 102_400), _RUNPOD + "0.34 USD"),
    "rtx5090": Target("NVIDIA GeForce RTX 5090", "1x8", 33_670_000_000, 209.5e12, 1.792e12, 30e9, 1.25e9, 1.22, _RTX5090,
        "NVIDIA RTX Blackwell whitepaper; CUDA programming guide, compute capability 12.0; memory: assumed; no NVLink nor "
        "peer-to-peer: PCIe 5.0 x16 through the host at twice the RTX 4090's rate, assumed; between nodes 10 Gb/s: assumed; "
        "RunPod, 1.22 USD an hour (2026-03)",
        Sm((12, 0), 170, 128, 2.407, 100_663_296, 1_536, 102_400), _RUNPOD + "0.69 USD"),
    "b200": Target("NVIDIA B200", "1x8", 191_500_000_000, 2.25e15, 7.67e12, 900e9, 400e9, 14.24, _SM100,
        _B200 + "AWS p6-b200.48xlarge: 3,200 Gb/s a node, 113.93 USD an hour for 8 (2026-06)",
        Sm((10, 0), 148, 128, 1.965, 132_644_864, 2_048, 233_472), _RUNPOD + "5.98 USD; on demand 10.57; Spheron: 6.03"),
    "gb200": Target("NVIDIA GB200", "1x64", 197_000_000_000, 2.5e15, 8e12, 900e9, 3.2e12, 4.54, _SM100,
        _B200 + "datasheet of GB200 NVL72: 186 GB, 2,500 TFLOP/s; a node stands for the GPUs of one NVLink domain, up to 72; "
        "multiprocessors: the B200's, assumed; between domains 400 Gb/s a GPU; Spheron, 9.08 USD an hour for 2 (2026-03)",
        Sm((10, 0), 148, 128, 1.965, 132_644_864, 2_048, 233_472)),
    "v4": Target("TPU v4", "2x2x4", 33_014_415_360, 275e12, 1.2e12, 300e9, 0, 3.22, _tpu(275e12),
        "docs.cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB of which 30.75 can be used, 6 links of 50 GB/s; 3.22 USD an "
        "hour", anchor="13,300 tokens/s a chip, 1B by Levanter on v4-8 (marin issue 1826)"),
    "v5e": Target("TPU v5 lite", "4x4", 16_909_332_480, 197e12, 0.819e12, 200e9, 0, 1.20, _tpu(197e12),
        "docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 15.75 GiB to use, 400 GB/s both ways; 1.20 USD an hour"),
    "v5p": Target("TPU v5", "2x2x4", 102_800_000_000, 459e12, 2.765e12, 600e9, 0, 4.20, _tpu(459e12),
        "docs.cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95.74 GiB to use, 1,200 GB/s both ways; 4.20 USD an hour"),
    "v6e": Target("TPU v6 lite", "4x4", 33_550_237_696, 918e12, 1.638e12, 400e9, 0, 2.70, _tpu(918e12),
        "docs.cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 31.25 GiB to use, 800 GB/s both ways; 2.70 USD an hour",
        anchor="46,500 to 47,600 tokens/s a chip, 1.3B to 1.4B by nanochat-jax and nanocode (2026), about 24% MFU, which is "
        "29,700 for the 1.1B"),
    "tpu7x": Target("TPU7x", "2x2x2", 101_737_037_824, 1_153.5e12, 3.69e12, 300e9, 0, None, _tpu(1_153.5e12),
        "docs.cloud.google.com/tpu/docs/tpu7x: a chip is two devices, together 2,307 TFLOP/s, 7,380 GB/s and 1,200 GB/s both "
        "ways; 94.75 GiB of a device can be used, says its compiler; no price is published: give --price, an hour and device",
        cores=2),
}  # fmt: skip


# Cloud TPU's name of a slice says how many TensorCores it has: `v5p-32` are 16 chips (docs.cloud.google.com/tpu/docs/v5p).
CLOUD = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}  # its name, and TensorCores a chip


def cloud_type(on: str) -> str | None:
    """Returns Cloud TPU's accelerator type of a slice, such as "v5p-32" for "v5p:2x2x4"; None for what is not a TPU."""
    name, _, shape = on.partition(":")
    if name not in CLOUD:
        return None
    cloud, cores = CLOUD[name]
    return f"{cloud}-{cores * math.prod(map(int, shape.split('x')))}"


def of(device_kind: str) -> Target | None:
    """Returns the target of a device by its kind, and by its memory if the kind names it; None if the table lacks it."""
    known = [target for target in TARGETS.values() if device_kind.startswith(target.kind)]
    size = re.search(r"(\d+) ?GB", device_kind)
    nearness = lambda target: -abs(int(size[1]) * 1e9 - target.memory) if size else 0
    return max(known, key=lambda target: (len(target.kind), nearness(target)), default=None)


class Machine(NamedTuple):
    """A machine to compile for."""

    on: str  # the value of --on
    target: Target | None  # None for a CPU
    devices: list[jax.Device]  # in the order of nodes
    per_node: int  # devices of one node

    @property
    def budget(self) -> int:
        """The bytes of one device that a program may use. CPU devices share this machine's memory equally."""
        if self.target is None:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(self.devices)
        # a run reserves this fraction of a GPU's memory; a TPU's compiler may use all of the TPU's
        return int(self.target.memory * (xla.memory_fraction() if self.target.sm else 1.0))


def machine(on: str) -> Machine:
    """Returns the machine `on`: "a100-40g:2x8" (NODESxGPUS), "v5e:4x4" (a TPU slice) or "cpu:8" (virtual devices).

    Programs can be compiled for its devices, but only CPU devices can run them. Raises UserError if the target is unknown, its
    compiler is not installed or the size does not exist. With jax's CUDA plugin but no driver, JAX_PLATFORMS=cpu must be set
    before jax is imported.
    """
    name, _, shape = on.partition(":")
    most, shape = 1_024 if name == "cpu" else 16_384, shape[:100]
    if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) and (n := math.prod(map(int, shape.split("x")))) > most:
        raise UserError(f"--on={on[:100]}: {n:,} devices; at most {most:,}")
    if name == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
        return Machine(on, None, _virtual(on, int(shape)), int(shape))
    if name not in TARGETS or not re.fullmatch(r"[1-9]\d*x[1-9]\d*" if TARGETS[name].sm else r"[1-9]\d*(x[1-9]\d*)+", shape):
        known = ", ".join(f"{n}:{t.shape}" for n, t in TARGETS.items())
        size = "NODESxGPUS" if name in TARGETS and TARGETS[name].sm else "the chips along each axis of a slice"
        near = [n for n in TARGETS if name and n.startswith(name)] or difflib.get_close_matches(name, TARGETS, 1)
        write = f"write {near[0]}:{TARGETS[near[0]].shape}" + (f", {size}" if name in TARGETS else "") + "; " if near else ""
        raise UserError(f"--on={on}: not a known target and its size; {write}choose one like {known}, cpu:8")
    target = TARGETS[name]
    if not any(importlib.util.find_spec(plugin) for plugin in PLUGINS[target.platform]):
        raise UserError(f"--on={on}: the compiler for {target.platform} is not installed; pip install '.[plan]'")
    try:
        if target.sm:
            nodes, _, per_node = shape.partition("x")
            description = topologies.get_topology_desc(
                platform="cuda", target_config=_target_config(target), topology=f"1x{int(nodes)}x{int(per_node)}"
            )
            return Machine(on, target, list(description.devices), int(per_node))
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server
        devices = _slice(name, shape)
        return Machine(on, target, devices, len(devices))
    except (RuntimeError, ValueError) as e:  # jax's errors of the plugin are RuntimeErrors
        raise UserError(f"--on={on}: no such machine, says the compiler ({str(e).splitlines()[0]})") from e


def _virtual(on: str, n: int) -> list[jax.Device]:
    try:
        jax.config.update("jax_num_cpu_devices", n)
    except RuntimeError:  # too late: JAX has its devices already
        if len(jax.devices("cpu")) < n:
            raise UserError(f"--on={on}: this process has {len(jax.devices('cpu'))} devices") from None
    return jax.devices("cpu")[:n]


def _slice(name: str, shape: str) -> list[jax.Device]:
    devices = math.prod(int(n) for n in shape.split("x")) * TARGETS[name].cores
    if name in ("v5e", "v6e") and shape == "1x1":  # the smallest slice that the compiler knows has four chips
        shape = "2x2"
    more = {"chip_config_name": "megacore"} if name == "v4" else {}  # a chip's two cores as one device
    return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape}", **more).devices)[:devices]


def _target_config(target: Target) -> str:
    """Returns XLA's GpuTargetConfigProto as text."""
    sm = target.sm
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {sm.capability[0]} minor: {sm.capability[1]} }}
          core_count: {sm.count} fpus_per_core: {sm.lanes} clock_rate_ghz: {sm.clock}
          memory_bandwidth: {round(target.bandwidth)} l2_cache_size: {sm.l2} device_memory_size: {target.memory}
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {sm.threads}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_block: 49152 shared_memory_per_core: {sm.shared}
          shared_memory_per_block_optin: {sm.shared - 1_024}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 8 }}
    """  # cuDNN: the oldest version that jax's CUDA plugin accepts


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak bf16 FLOP/s of a device by `jax.Device.device_kind`, or None if it is not in `TARGETS`."""
    target = of(device_kind)
    return target.flops if target else None
