"""XLA's settings, each with its reason: compiler options, the reserved part of a GPU's memory, the compilation cache."""

import hashlib
import math
import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tinyllama_jax.base import dims
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError

# The fraction of a GPU's memory that JAX reserves at its start; JAX's own default is 0.75. The remainder, 3.4 of an A100's 42.3
# GB, is for memory outside XLA's allocator: CUDA's context, cuDNN and cuBLAS handles, NCCL buffers. NVIDIA's JAX-Toolbox uses
# 0.8 or 0.9 for any model.
MEMORY, MEMORY_NAMES = 0.92, ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second: its older name


# Since JAX 0.11.1 a mode replaces XLA's flag (openxla/xla, pull request 45836); XLA_FLAGS takes both names.
PIPELINE = {"xla_gpu_enable_pipelined_all_reduce": True, "xla_gpu_pipeline_all_reduce": "COLLECTIVE_PIPELINING_MODE_ON"}


class Option(NamedTuple):
    """One of XLA's debug options. If a later XLA does not know the name, it refuses to compile: remove the option then."""

    name: str
    value: bool | int | str
    reason: str


def options(config: Config, mesh: jax.sharding.Mesh) -> list[Option]:
    """Returns the compiler options for the devices of `mesh`, without those that the user's own flags set.

    Milliseconds: how long a step of configs/3t.py on a100-40g:2x8 sends while no matmul runs, as read from the compiled
    program; 830 without options. docs/log.md says how, and which options did not help. libtpu overlaps sends and matmuls by
    default.
    """
    if mesh.devices.flat[0].platform != "gpu":
        return []
    cfg, size = config.model, lambda dtype: jnp.dtype(dtype).itemsize
    layer = sum(dims.n_elements(p, cfg) for p in dims.PARAMETERS if p.dims[0] == "L") // cfg.n_layers // mesh.shape["tensor"]
    a_layer, half = layer * size(cfg.reduce_dtype), layer * size(cfg.compute_dtype) * 11 // 20  # 176 and 48 MB of the 1.1B's
    gradients = "a layer's gradients in one message, or they queue; 461 ms to 134 with fsdp 4, 639 to 118 with 2"
    chosen = [
        Option("xla_gpu_enable_latency_hiding_scheduler", True, "overlaps sends and matmuls; 830 ms to 789; the next needs it"),
        Option(*list(PIPELINE.items())[jax.__version_info__ >= (0, 11, 1)],
               "overlaps sending a layer's gradients with the next layer's matmuls; 789 ms to 197"),
        Option("xla_gpu_all_gather_combine_threshold_bytes", half,
               "two messages for a layer's weights, the second overlaps the first's matmuls; 197 ms to 127, 152 with one"),
        Option("xla_gpu_reduce_scatter_combine_threshold_bytes", a_layer, gradients),
        Option("xla_gpu_all_reduce_combine_threshold_bytes", a_layer, gradients),
        Option("xla_gpu_enable_dus_accumulator_zero_init_elimination", True,
               "the arrays that layers save for backward are not filled with zeros first; 133 ms less compute per step"),
    ]  # fmt: skip
    if config.train.deterministic:
        chosen.append(Option("xla_gpu_deterministic_ops", True, "train.deterministic: only kernels that sum in a fixed order"))
    own = {name for flag in users_own() for name in (PIPELINE if flag in PIPELINE else (flag,))}
    return [option for option in chosen if option.name not in own]


def compiler_options(config: Config, mesh: jax.sharding.Mesh) -> dict[str, bool | int | str]:
    """Returns `options` in the form that jax.jit takes."""
    return {option.name: option.value for option in options(config, mesh)}


def users_own() -> list[str]:
    """Returns the names of XLA flags in the environment. They have precedence over our options."""
    return re.findall(r"--(xla_\w+)", " ".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")))


def memory_fraction() -> float:
    """Returns the fraction of a GPU's memory to reserve: the user's, or MEMORY. Raises UserError if it is not in (0, 1]."""
    name, text = next(((name, os.environ[name]) for name in MEMORY_NAMES if os.environ.get(name)), ("", str(MEMORY)))
    if not re.fullmatch(r"0*\.\d+|1(\.0*)?", text) or float(text) == 0:
        raise UserError(f"{name}={text}: must be a fraction of a GPU's memory, above 0 and at most 1")
    return float(text)


def reserve_memory() -> None:
    """Makes JAX reserve `memory_fraction`. Call it before JAX looks for devices."""
    fraction = memory_fraction()
    if not any(os.environ.get(name) for name in MEMORY_NAMES):
        os.environ[MEMORY_NAMES[0]] = str(fraction)


def state_bytes(config: Config) -> int:
    """Returns the bytes of the weights and of the two moments of those that train: of a checkpoint, too."""
    size = lambda array: math.prod(array.shape) * jnp.dtype(array.dtype).itemsize
    return sum(size(array) * (3 if array.trains else 1) for array in dims.arrays(config.model, config.lora))


def check_memory(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError if a device lacks the memory for its part of the weights and the two moments of those that train.

    A run with adapters starts from all weights in fp32. Virtual CPU devices share the machine's memory. `plan` tells how much
    more a step needs.
    """
    first = mesh.local_devices[0]
    if stats := first.memory_stats() if first.platform != "cpu" else None:
        has = stats.get("bytes_limit", 2**62)
    else:
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(mesh.local_devices)
    parameters, split = dims.n_parameters(config.model), mesh.shape["fsdp"] * mesh.shape["tensor"]
    needs = (state_bytes(config) + (4 * parameters if config.lora.rank else 0)) // split
    if needs > has:
        raise UserError(
            f"the weights and moments of {parameters:,} parameters over fsdp x tensor = {split} devices take "
            f"{needs / 2**30:,.1f} GiB of each, which has {has / 2**30:,.1f}; split them over more, or choose a smaller --model"
        )


def keep_compiled(config: Config) -> None:
    """Caches compiled programs in RUN/compiled, except on CPUs. Call it once the devices are known.

    XLA chooses GPU kernels by timing them. The cache keeps its choice: a resumed run has the same bits and starts faster.
    """
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(config.folder.resolve() / "compiled"))
        jax.config.update("jax_persistent_cache_enable_xla_caches", "all")


SOURCES = re.compile(r"^(?:FileNames|FunctionNames|FileLocations|StackFrames)\n(?:.+\n)*|, metadata=\{[^}]*\}", re.MULTILINE)


def fingerprint(program: jax.stages.Lowered | jax.stages.Compiled) -> str:
    """16 hex digits of a program, without the places in the source that its instructions come from; "" if it has no text.

    Of a compiled one they tell which kernels XLA chose, also those that it chose for a GPU by timing them: the optimised
    program has their tiles and algorithms. The 1.1B's step, for 16 A100, has 1.2 MB of text: 0.2 s on one core.
    """
    text = program.as_text()
    return hashlib.sha256(SOURCES.sub("", text).encode()).hexdigest()[:16] if text else ""


def memory() -> tuple[int, int]:
    """(the most bytes that a device of this process has had in use so far, what it may use); 0 where not known, as on CPUs."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((of.get("peak_bytes_in_use", 0), of.get("bytes_limit", 0)) for of in stats)


def lines(config: Config, mesh: jax.sharding.Mesh) -> list[str]:
    """Returns lines that say which settings a run has."""
    chosen, own, kept = options(config, mesh), users_own(), jax.config.jax_compilation_cache_dir
    gpu = mesh.devices.flat[0].platform == "gpu"
    settings = [
        *([f"{memory_fraction():g} of a device's memory"] if gpu else []),
        *([] if chosen else ["no options of ours"]),
        *([f"the environment's own {' '.join(own)}"] if own else []),
        f"compiled programs kept in {kept}" if kept else "compiled programs not kept",
    ]
    return ["xla: " + ", ".join(settings), *(f"xla: {o.name}={str(o.value).lower()} ({o.reason})" for o in chosen)]
