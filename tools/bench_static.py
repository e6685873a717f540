"""Compiles our Triton attention kernels for other GPUs: registers, spills, and the instructions of their inner loops.

    python tools/bench_kernels.py --static [--json OUT]

Needs the extra "plan" and `pip install nvidia-cuda-nvdisasm`, but no GPU. It measures no time. ptxas compiles XLA's PTX to
machine code (SASS), and nvdisasm lists it. A warp scheduler has one issue slot per clock. An A100's HMMA.16816 keeps the
tensor cores busy for 8 clocks, an H100's HGMMA.64xNx16 for N/2: with more than one instruction per tensor core clock they must
wait. An LDSM.x4 in all four schedulers of an SM keeps its shared memory busy for 16 clocks.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_common as common

from tinyllama_jax.planning import targets

ON = ("a100-40g", "h100")
CASES = {  # B, S, N, K, H, dtype, documents
    "plain": (8, 2048, 32, 4, 64, "bfloat16", False),
    "documents": (8, 2048, 32, 4, 64, "bfloat16", True),
    "fp16": (8, 2048, 32, 4, 64, "float16", False),
    "wide": (8, 2048, 16, 4, 128, "bfloat16", False),
    "wide, documents": (8, 2048, 16, 4, 128, "bfloat16", True),
}
COUNTED = {  # kind of instruction -> the beginnings of its names
    "ldsm": "LDSM",
    "fp32": "FFMA FMUL FADD",
    "mufu": "MUFU",
    "mask": "FSEL FSETP ISETP PLOP3",
    "spills": "LDL STL",
}
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvdisasm")
REGISTERS = 65_536  # of an SM; a thread gets a multiple of 8


def program(name: str) -> str | None:
    """Returns the path of ptxas or nvdisasm, from its wheel or PATH; None if there is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else ()
    return next((str(file) for folder in folders for file in Path(folder).glob(f"*/bin/{name}")), shutil.which(name))


def lacks(on: str) -> str:
    """Returns why this machine cannot compile for the target `on`; empty if it can."""
    if not any(importlib.util.find_spec(plugin) for plugin in targets.PLUGINS["cuda"]):
        return f"no compiler for {on} here: pip install '.[plan]'"
    packages = {"ptxas": "nvidia-cuda-nvcc-cu12", "nvdisasm": "nvidia-cuda-nvdisasm"}
    return "; ".join(f"no {name} here: pip install {package}" for name, package in packages.items() if not program(name))


def loops(listing: str) -> list[dict]:
    """Returns the innermost loops with tensor core instructions of a listing by `nvdisasm -c`, the leanest first."""
    code, labels = [], {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := INSTRUCTION.match(line):
            code.append(instruction.groups()[1:])
    jumps = ((labels.get(target[1]), end) for end, (name, operands) in enumerate(code) if name.startswith("BRA")
             if (target := re.search(r"\((\.L\w+)\)", operands)))  # fmt: skip
    spans = [(start, end) for start, end in jumps if start is not None and start <= end]
    out = []
    for start, end in spans:
        if any(start <= a and b <= end for a, b in spans if (a, b) != (start, end)):
            continue
        names = [name for name, _ in code[start : end + 1]]
        tensor = [name for name in names if name.startswith(("HMMA", "HGMMA"))]
        if tensor:
            counts = {kind: sum(n.startswith(tuple(which.split())) for n in names) for kind, which in COUNTED.items()}
            clocks = sum(8 if n.startswith("HMMA") else int(re.search(r"64x(\d+)x", n)[1]) // 2 for n in tensor)
            out.append({"instructions": len(names), "tensor": len(tensor), "tensor_clocks": clocks, **counts})
    return sorted(out, key=lambda loop: loop["instructions"] / loop["tensor"])


def kernel(ptx: Path, shared: dict[str, tuple[int, int]], sm: targets.Sm) -> dict:
    """Returns the row of one kernel. `shared`: name -> threads and bytes of shared memory of a block."""
    text, cubin = ptx.read_text(), ptx.with_suffix(".cubin")
    name = re.search(r"\.entry attention_(\w+)\(", text)[1]
    arch = re.search(r"\.target (\w+)", text)[1]
    command = [program("ptxas"), "-v", f"-arch={arch}", str(ptx), "-o", str(cubin)]
    report_of_ptxas = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    command = [program("nvdisasm"), "-c", str(cubin)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, (threads, n_bytes) = int(re.search(r"Used (\d+) reg", report_of_ptxas)[1]), shared[name]
    blocks = (REGISTERS // (-(-registers // 8) * 8 * threads), sm.threads // threads, sm.shared // (n_bytes + 1024))
    spilled = int(re.search(r"(\d+) bytes spill stores", report_of_ptxas)[1])
    out = {
        "kernel": name,
        "arch": arch,
        "registers": registers,
        "spilled": spilled,
        "shared": n_bytes,
        "blocks_an_sm": min(blocks),
    }
    return out | {"loops": loops(listing)}


def kernels(on: str, case: str) -> list[dict]:
    """Returns the rows of forward, dq and dkv of a case, compiled for the target `on`."""
    import jax
    import jax.numpy as jnp

    from tinyllama_jax.kernels.attention import triton

    B, S, N, K, H, dtype, documents = CASES[case]
    machine = targets.machine(f"{on}:1x1")
    where = jax.sharding.SingleDeviceSharding(machine.devices[0])
    q, k = (jax.ShapeDtypeStruct((B, S, heads, H), dtype, sharding=where) for heads in (N, K))
    ids = jax.ShapeDtypeStruct((B, S), jnp.int32, sharding=where)

    def both(q, k, v, do, ids):
        out, pull = jax.vjp(lambda *qkv: triton.flash(*qkv, ids if documents else None), q, k, v)
        return out, pull(do)

    with tempfile.TemporaryDirectory() as folder:
        jax.jit(both).lower(q, k, k, q, ids).compile(compiler_options={"xla_dump_to": folder})
        (thunks,) = Path(folder).glob("*thunk_sequence.txt")
        launched = re.findall(r"attention_(\w+) grid: .* threads: \[(\d+),.*shared_memory: (\d+)", thunks.read_text())
        shared = {name: (int(threads), int(n_bytes)) for name, threads, n_bytes in launched}
        files = [file for file in Path(folder).glob("*.ptx") if ".entry attention_" in file.read_text()]
        rows = [kernel(file, shared, machine.target.sm) for file in files]
    for row in rows:
        row |= {"on": on, "case": case, "cut": list(triton._cut(row["kernel"], S, H, documents))}
    return sorted(rows, key=lambda row: ("forward", "dq", "dkv").index(row["kernel"]))


def table(rows: list[dict]) -> str:
    """Returns the rows as Markdown. Two numbers in a cell: the loop without a mask; that over the diagonal, if separate."""
    per = lambda row, of, base="tensor": "; ".join(f"{loop[of] / loop[base]:.2f}" for loop in row["loops"])
    plain = lambda row, of: "; ".join(str(loop[of]) for loop in row["loops"])
    head = "kernel | own, other, warps, stages | registers | spilled bytes | of them in loops | KiB shared | blocks an SM | "
    head += "instructions per MMA | per tensor clock | LDSM per MMA | FP32 per MMA"
    out = [f"| on | case | {head} |", "|---" * (head.count("|") + 3) + "|"]
    for row in rows:
        cells = [row["on"], row["case"], row["kernel"], ", ".join(map(str, row["cut"])), row["registers"], row["spilled"]]
        cells += [plain(row, "spills"), row["shared"] // 1024, row["blocks_an_sm"]]
        cells += [per(row, "instructions"), per(row, "instructions", "tensor_clocks"), per(row, "ldsm"), per(row, "fp32")]
        out.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(out)


def compiled(on: str, cases: list[str]) -> list[dict]:
    """Returns the rows of all kernels, from a new process: compilers reuse one GPU's description for the next GPU."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, __file__, on, *cases], capture_output=True, text=True, env=env, timeout=600)
    if done.returncode:
        raise common.Ended(f"{on}: {done.stderr.strip()[-2_000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(path: Path, header: dict) -> None:
    """Prints the table and writes the rows to `path`; leaves a target out, with the reason, if its compiler is missing."""
    rows, out = [], []
    for on in ON:
        if reason := lacks(on):
            print(f"  -- {on} left out: {reason}")
            out.append({"on": on, "left_out": reason})
            continue
        rows += compiled(on, list(CASES))
    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES}
    common.save(path, header | {"versions": versions, "rows": rows, "left_out": out})
    print(table(rows) if rows else "nothing was compiled")


if __name__ == "__main__":
    print(json.dumps([row for case in sys.argv[2:] for row in kernels(sys.argv[1], case)]))
