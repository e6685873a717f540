"""Kernels one by one: the device's matmul rate, every attention implementation, the loss head, what is bound by memory.

    python tools/bench_kernels.py [--only matmul,attention,loss,memory] [--size 1b|small] [--minutes 8] [--json OUT]

For each: whether it is right, then time, TFLOP/s, percent of the matmul rate measured first, bytes beside its arguments.
Attention is checked against fp64, output and gradients, at the very shape that is timed; PyTorch's fused attention runs at the
same shapes. bf16 on an accelerator, fp32 on a CPU. Needs neither grain nor tensorflow-datasets nor Beam; without torch its rows
are left out. Always ends within --minutes (8 unless said), and writes each row as it comes. `--only matmul,tune` times our
Triton kernel cut in other ways, for its TUNINGS. `--static` needs no GPU: it compiles that kernel for an A100 and an H100, and
prints what its loops execute (bench_static.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import bench_common as common
import bench_static
import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.base import config as c
from tinyllama_jax.core import model
from tinyllama_jax.kernels import attention as kernels
from tinyllama_jax.kernels import cross_entropy as head
from tinyllama_jax.planning import targets

MATMULS = {  # [M, K] x [K, N]: of the 1.1B model with 16,384 tokens, and a large square one
    "1b": [(16384, 2048, 5632), (16384, 5632, 2048), (16384, 2048, 32000), (8192, 8192, 8192)],
    "small": [(2048, 1024, 1024), (1024, 1024, 4096)],
    "tiny": [(256, 256, 256)],
}
ATTENTION = {  # B, S, N, K, H of causal self-attention, and documents packed into a sequence, each of which sees only itself
    "1b": [(8, 2048, 32, 4, 64, 0), (8, 2048, 32, 4, 64, 8), (8, 2048, 32, 1, 64, 0), (8, 2048, 32, 32, 64, 0),
           (8, 2048, 16, 4, 128, 0), (4, 4096, 32, 4, 64, 0), (2, 8192, 32, 4, 64, 0), (2, 8192, 32, 4, 64, 8)],
    "small": [(2, 512, 8, 2, 64, 0), (2, 512, 8, 2, 64, 4), (1, 1024, 4, 4, 64, 0)],
    "tiny": [(2, 48, 4, 2, 8, 0), (2, 48, 4, 2, 8, 3)],
}  # fmt: skip
CHECKED = (  # dtype on an accelerator, head, documents, standard deviation of the scores; the last three for our kernel alone
    ("bfloat16", 64, 0, 1), ("bfloat16", 64, 5, 1), ("bfloat16", 128, 0, 1), ("float16", 64, 0, 1), ("bfloat16", 64, 0, 8),
)  # fmt: skip
KERNELS = ("forward", "dq", "dkv")
CUTS = [  # triton.Tuning: own rows, other rows, warps, stages
    (128, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 4, 3), (128, 32, 4, 4),
    (128, 32, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3),
]  # fmt: skip
QUIET = 90  # seconds after which a cell hangs
LOSS = {"1b": (8, 2048, 2048, 32000), "small": (2, 512, 256, 8192), "tiny": (2, 32, 16, 64)}  # B, S, D, V
CHUNKS = (32, 16, 8, 4, 2)  # parts of the tokens, of one of which the logits exist at one time: 512 to 8,192 tokens at 1b
LOSS_ERROR = {"float32": 1e-4, "bfloat16": 1e-2}  # of gradients, relative as in bench_common.ATTENTION; of the loss a tenth
MEMORY = {"1b": (8, 2048, 2048, 5632), "small": (2, 512, 256, 704), "tiny": (1, 32, 64, 128)}  # B, S, D, F; heads of 64


def dtype_here() -> str:
    """What is computed in on this device."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def compiled(function, *arguments):
    """`function` compiled for `arguments`, and the bytes of its temporaries and results."""
    program = jax.jit(function).lower(*arguments).compile()
    memory = program.memory_analysis()
    return program, memory.temp_size_in_bytes + memory.output_size_in_bytes


def seconds_of(program, *arguments) -> float:
    """Seconds of one run; JAX returns before the device is done, so that the last result is waited for."""
    last = []

    def run():
        last[:] = [program(*arguments)]

    return common.seconds_of(run, lambda: jax.block_until_ready(last))


def matmul(M: int, K: int, N: int) -> dict:
    """One matmul's error in 8 of its rows against fp64, and rate."""
    dtype, rng = dtype_here(), np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in ((M, K), (K, N)))
    program, n_bytes = compiled(lambda a, b: a @ b, a, b)
    error = common.relative(program(a, b)[:8], np.asarray(a[:8], np.float64) @ np.asarray(b, np.float64))
    seconds = seconds_of(program, a, b)
    ok = error <= {"float32": 1e-3, "bfloat16": 1e-2}[dtype]  # TF32, which is no less than bf16, has 1e-3
    return {"ok": ok, "error": error, "seconds": seconds, "flops": 2 * M * K * N, "bytes": n_bytes, "dtype": dtype}


def attend(q, k, v, segments, impl: str):
    """The one place that calls the package's attention."""
    return kernels.attention(q, k, v, segments, impl=impl)


def attention(impl: str, shape: dict) -> dict:
    """One implementation: errors of output and gradients, forward alone, forward and backward."""
    dtype = dtype_here()
    segments = None if (ids := common.segments(shape)) is None else jnp.asarray(ids)
    kernels.choose(impl, dtype, seq_len=shape["S"], head_dim=shape["H"], segments=segments is not None)
    q, k, v, do = (jnp.asarray(a, dtype) for a in common.qkv(shape))
    forward, _ = compiled(lambda q, k, v: attend(q, k, v, segments, impl), q, k, v)

    def both(q, k, v, do):  # the output too, or it need not be computed
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments, impl), q, k, v)
        return out, *pull(do)

    both, n_bytes = compiled(both, q, k, v, do)
    heads = jnp.asarray(common.few_heads(shape), dtype)[:, None]
    masked = jnp.zeros_like(do).at[-1].set(do[-1] * heads)
    measured = [np.asarray(x[-1:], np.float32) for x in both(q, k, v, masked)]
    return common.attention_errors(measured, shape, dtype) | {
        "forward_seconds": seconds_of(forward, q, k, v),
        "forward_backward_seconds": seconds_of(both, q, k, v, do),
        "bytes": n_bytes,
        "dtype": dtype,
    }


def check(impl: str, shape: dict, dtype: str) -> dict:
    """One implementation, not timed: errors of output and gradients, and whether a second call gives the same bits."""
    dtype = "float32" if jax.default_backend() == "cpu" else dtype
    segments = None if (ids := common.segments(shape)) is None else jnp.asarray(ids)
    kernels.choose(impl, dtype, seq_len=shape["S"], head_dim=shape["H"], segments=segments is not None)
    q, k, v, do = (jnp.asarray(a, dtype) for a in common.qkv(shape))
    do = jnp.zeros_like(do).at[-1].set(do[-1] * jnp.asarray(common.few_heads(shape), dtype)[:, None])

    @jax.jit
    def both(q, k, v, do):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments, impl), q, k, v)
        return out, *pull(do)

    first, second = ([np.asarray(x[-1:], np.float32) for x in both(q, k, v, do)] for _ in range(2))
    same = all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    return common.attention_errors(first, shape, dtype) | {"same_bits": same, "dtype": dtype}


def tune(impl: str, kernel: str, cut: list[int], shape: dict) -> dict:
    """`attention` by our Triton kernel with one of its three parts cut as `cut` says."""
    from tinyllama_jax.kernels.attention import triton

    as_it_is = triton.TUNINGS
    triton.TUNINGS = {width: of | {kernel: triton.Tuning(*cut)} for width, of in as_it_is.items()}
    try:
        return attention("pallas_triton", shape)
    finally:
        triton.TUNINGS = as_it_is


def loss(tokens: int, B: int, S: int, D: int, V: int) -> dict:
    """The loss head with `tokens` tokens' logits at one time (0: all, by the definition): errors of loss and gradients, time.

    The errors are of 64 positions, the others having no weight, against fp64.
    """
    dtype, rng = dtype_here(), np.random.default_rng(0)
    x, kernel = rng.standard_normal((B, S, D), np.float32), rng.standard_normal((D, V), np.float32) * np.float32(2 / D**0.5)
    x, kernel, labels = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype), rng.integers(0, V, (B, S))
    labels_BS, chunk = jnp.asarray(labels, jnp.int32), head.chunk_of(S, B, tokens)

    def both(x, kernel, labels, weights):
        sums = lambda x, kernel: (head.cross_entropy(x, kernel, labels, weights, chunk) if tokens else
                                  head.reference(x, kernel, labels, weights)).loss  # fmt: skip
        return jax.value_and_grad(sums, (0, 1))(x, kernel)

    weights = np.zeros((B, S), np.float32)
    some = rng.choice(B * S, min(64, B * S), replace=False)
    weights.flat[some] = 1
    program, n_bytes = compiled(both, x, kernel, labels_BS, jnp.asarray(weights))
    value, (dx, dkernel) = program(x, kernel, labels_BS, jnp.asarray(weights))

    want = common.loss_values(x.reshape(-1, D)[some], kernel, labels.ravel()[some])
    dx = np.asarray(dx.reshape(-1, D), np.float64)
    elsewhere = float(np.abs(np.delete(dx, some, 0)).max(initial=0))
    errors = {
        "loss": abs(float(value) / want["loss"] - 1),
        "dx": common.relative(dx[some], want["dx"]),
        "dkernel": common.relative(dkernel, want["dkernel"]),
        "elsewhere": elsewhere,  # positions without weight
    }
    ok = max(errors["dx"], errors["dkernel"], 10 * errors["loss"]) <= LOSS_ERROR[dtype] and elsewhere == 0
    seconds = seconds_of(program, x, kernel, labels_BS, jnp.ones((B, S), jnp.float32))
    more = {"chunk": chunk if tokens else S, "flops": 6 * B * S * D * V, "bytes": n_bytes, "dtype": dtype}
    return {"ok": bool(ok), "errors": errors, "seconds": seconds, **more}


def memory(name: str, B: int, S: int, D: int, F: int) -> dict:
    """What is bound by memory: bytes that must move (each argument and result once) a second, forward."""
    dtype, rng = dtype_here(), np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
    if name == "rms_norm":
        arguments, run = (draw(B, S, D), jnp.ones(D)), lambda x, scale: model.rms_norm(x, scale, 1e-5).astype(dtype)
        definition = lambda x, scale: x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * scale[0]
    else:
        arguments, run = (draw(B, S, F), draw(B, S, F)), lambda gate, up: jax.nn.silu(gate) * up
        definition = lambda gate, up: gate / (1 + np.exp(-gate)) * up
    program, _ = compiled(run, *arguments)
    got = program(*arguments)
    n_bytes = sum(a.nbytes for a in jax.tree.leaves((arguments, got)))
    error = common.relative(got[:1], definition(*(np.asarray(a[:1], np.float64) for a in arguments)))
    seconds, ok = seconds_of(program, *arguments), error <= {"float32": 1e-4, "bfloat16": 1e-2}[dtype]
    return {"ok": bool(ok), "error": error, "seconds": seconds, "bytes_per_second": n_bytes / seconds, "dtype": dtype}


# -- rows -----------------------------------------------------------------------------------------------------------------


def cells(size: str, only: list[str]) -> list[tuple[str, dict]]:
    """What there is to do, most wanted first: (function, its arguments)."""
    impls = [impl for impl in c.ATTENTION if impl != "auto"]
    first, *others = [[("attention", {"impl": i, "shape": shape}) for i in impls] for shape in shapes(size)]
    B, S, D, V = LOSS[size]
    seq_len, heads = (1024, (8, 2)) if size == "1b" else (48, (4, 2))
    letters = (*"BSNKH", "documents", "spread")
    out = [("check", {"impl": i, "dtype": dtype, "shape": dict(zip(letters, (2, seq_len, *heads, *case), strict=True))})
           for i in sorted(impls, key=lambda i: i != "pallas_triton")
           for dtype, *case in CHECKED[: None if i == "pallas_triton" else 2]]  # fmt: skip
    out += [("matmul", dict(zip("MKN", shape, strict=True))) for shape in MATMULS[size]] + first
    out += [("loss", {"tokens": n, "B": B, "S": S, "D": D, "V": V}) for n in (0, *(B * S // part for part in CHUNKS))]
    named = lambda kernel, cut: f"{kernel} {' '.join(map(str, cut))}"
    out += [("tune", {"impl": named(kernel, cut), "kernel": kernel, "cut": cut, "shape": shapes(size)[0]})
            for kernel in KERNELS for cut in CUTS]  # fmt: skip
    out += [("memory", {"name": name, **dict(zip("BSDF", MEMORY[size], strict=True))}) for name in ("rms_norm", "swiglu")]
    return [cell for cell in out + [cell for shape in others for cell in shape] if cell[0] in only]


def shapes(size: str) -> list[dict]:
    """Those of `ATTENTION` by their letters."""
    return [dict(zip((*"BSNKH", "documents"), shape, strict=True)) for shape in ATTENTION[size]]


def work(todo: list) -> None:
    """A worker: a row for each cell. It ends at an error that may have spoilt the device for those after it."""
    device = jax.devices()[0]
    target = targets.of(device.device_kind)
    about = {"platform": device.platform, "kind": device.device_kind, "dtype": dtype_here(), "jax": jax.__version__}
    about |= {"peak_flops": target and target.flops, "peak_bandwidth": target and target.bandwidth}
    about["auto"] = kernels.choose("auto", dtype_here())
    print(json.dumps({"device": about}), flush=True)
    for at, kind, arguments in todo:
        print(json.dumps({"begins": at}), flush=True)
        row, spoilt = {"kind": kind, "at": at, **arguments}, False
        try:
            row |= globals()[kind](**arguments)
        except Exception as e:
            row |= {"ok": None, "left_out": common.why(e)}
            spoilt = isinstance(e, jax.errors.JaxRuntimeError) and not common.is_oom(e)
        print(json.dumps(row), flush=True)
        if spoilt:
            sys.exit("stopped after an error of the device")
        jax.clear_caches()


def rows(todo: list, deadline: float):
    """What the device is, and the rows of `todo` [(at, kind, arguments)], in one process: starting one takes 10 s.

    Buffers and programs of a cell are dropped after it. A cell that kills the process, or hangs, is left out and those after it
    go on in another.
    """
    while todo and (left := deadline - time.monotonic()) > 3:
        at = todo[0][0]
        try:
            for row in common.stream([__file__, "--worker", json.dumps(todo)], left, QUIET):
                if "begins" in row:
                    at = row["begins"]
                    continue
                if "at" in row:
                    todo = [cell for cell in todo if cell[0] > row["at"]]
                yield row
        except common.Ended as e:
            for cell in todo:
                if cell[0] == at:
                    yield {"kind": cell[1], "at": at, **cell[2], "ok": None, "left_out": str(e)}
            todo = [cell for cell in todo if cell[0] > at]
        else:
            return
    for at, kind, arguments in todo:
        yield {"kind": kind, "at": at, **arguments, "ok": None, "left_out": "no time left"}


def derive(row: dict, device: dict, best: float | None) -> dict:
    """Rates, for a row that has times."""
    if row["kind"] in ("attention", "tune") and "forward_seconds" in row:
        s = row["shape"]
        flops = 4 * s["N"] * s["H"] * common.visible_pairs(s)  # two matmuls; backward has five
        for name, times in (("forward", 1), ("forward_backward", 3.5)):
            row[f"{name}_tflops"] = times * flops / row[f"{name}_seconds"] / 1e12
        row["tflops"], row["seconds"] = row["forward_backward_tflops"], row["forward_backward_seconds"]
    elif "flops" in row:
        row["tflops"] = row["flops"] / row["seconds"] / 1e12
    if best and "tflops" in row and row["kind"] != "matmul":
        row["percent_of_matmul"] = row["tflops"] * 1e14 / best
    if device.get("peak_bandwidth") and "bytes_per_second" in row:
        row["percent_of_bandwidth"] = 100 * row["bytes_per_second"] / device["peak_bandwidth"]
    return row


def line(row: dict) -> str:
    """A row as it is printed."""
    s = row.get("shape", row)
    shape = " ".join(f"{x}={s[x]}" for x in ("B", "S", "N", "K", "H", "M", "D", "F", "V", "documents", "spread") if s.get(x))
    name = row.get("impl") or row.get("name") or (f"{row['tokens']:,} tokens" if row.get("tokens") else "all at once")
    name = f"{row['kind']:9} {name if row['kind'] != 'matmul' else '':18} {shape:40}"
    if "left_out" in row:
        return f"  -- {name} {row['left_out']}"
    of_attention = row["kind"] in ("attention", "tune", "check")
    worst = max(e["relative"] for e in row["errors"].values()) if of_attention else None
    worst = worst or row.get("error") or max(row["errors"].values())
    if row["kind"] == "check":
        bits = "same bits again" if row["same_bits"] else "OTHER BITS the second time"
        return f"{'  ok' if row['ok'] else ' BAD'} {name} error {worst:7.1e} {row['dtype']}, {bits}"
    of_matmul = f"{row['percent_of_matmul']:5.1f}%" if "percent_of_matmul" in row else "      "
    rate = f"{row['tflops']:8.2f} TFLOP/s {of_matmul}" if "tflops" in row else ""
    rate = rate or f"{row['bytes_per_second'] / 1e9:8.1f} GB/s    {row.get('percent_of_bandwidth', 0):5.1f}%"
    forward = f"  forward {row['forward_seconds'] * 1e3:8.3f} ms" if "forward_seconds" in row else ""
    size = f"  {row['bytes'] / 2**20:9.1f} MiB" if row.get("bytes") else ""
    return f"{'  ok' if row['ok'] else ' BAD'} {name} error {worst:7.1e} {row['seconds'] * 1e3:9.3f} ms {rate}{size}{forward}"


def compared(rows: list[dict]) -> list[str]:
    """Forward and backward of the fastest right implementation of ours, against cuDNN's and PyTorch's in the same run."""
    out, libraries = [], ("cudnn", "torch flash", "torch cudnn")
    for shape in {json.dumps(r["shape"]): r["shape"] for r in rows if r["kind"] == "attention"}.values():
        seconds = {r["impl"]: r["seconds"] for r in rows if r.get("shape") == shape and r["ok"]}
        ours = min((impl for impl in seconds if impl not in libraries), key=seconds.get, default=None)
        if ours and (timed := [other for other in libraries if other in seconds]):
            ratios = ", ".join(f"{seconds[other] / seconds[ours]:.2f} of {other}'s" for other in timed)
            out.append(f"{' '.join(f'{k}={v}' for k, v in shape.items() if v)}: the rate of {ours} is {ratios}")
    return out


def first_size() -> str:
    """What is sensible on the device here."""
    try:
        row = next(common.stream([__file__, "--worker", "[]"], 120))
    except (common.Ended, StopIteration) as e:
        sys.exit(f"no device: {e}")
    return "small" if row["device"]["platform"] == "cpu" else "1b"


def main() -> None:
    """Runs the workers one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = ("matmul", "attention", "loss", "memory")
    parser.add_argument("--only", type=common.some_of(*what, "tune", "check"), default=",".join(what))
    parser.add_argument("--size", choices=LOSS, help="unless said: 1b, and small without an accelerator")
    parser.add_argument("--minutes", type=common.positive, default=8)
    parser.add_argument("--json", type=common.output, default="runs/bench_kernels.json")
    parser.add_argument("--static", action="store_true", help="what our Triton kernels are compiled to; runs nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return
    if args.static:
        bench_static.report(args.json, common.header(args))
        return
    common.end_on_sigterm()
    deadline = time.monotonic() + 60 * args.minutes
    report: dict = common.header(args) | {"device": {}, "matmul_flops": None, "rows": [], "whole": False}

    def take(row: dict) -> None:
        if "device" in row:
            report.update(row)
            return
        row = derive(row, report["device"], report["matmul_flops"])
        if row["kind"] == "matmul" and row["ok"]:
            report["matmul_flops"] = max(report["matmul_flops"] or 0, row["tflops"] * 1e12)
        report["rows"].append(row)
        common.save(args.json, report)
        print(line(row), flush=True)

    common.save(args.json, report)
    size = args.size or first_size()
    todo = [(at, *cell) for at, cell in enumerate(cells(size, common.parts(args.only)))]
    later = [cell for cell in todo if cell[1] == "attention" and cell[2]["shape"] != shapes(size)[0]]
    for row in rows([cell for cell in todo if cell not in later], deadline):
        take(row)
    if "attention" in args.only:  # in a process of its own, after JAX's has given the memory back
        cell = {"what": "attention", "shapes": shapes(size)}
        try:
            for row in common.stream([common.TORCH, json.dumps(cell)], (deadline - time.monotonic()) / 2):
                take(row)
        except common.Ended as e:
            take({"kind": "attention", "impl": "torch", "shape": shapes(size)[0], "ok": None, "left_out": str(e)})
    for row in rows(later, deadline):
        take(row)
    report["whole"] = True
    common.save(args.json, report)
    wrong, right, left = (sum(row["ok"] is ok for row in report["rows"]) for ok in (False, True, None))
    print(f"{wrong} rows are wrong, {right} are right, {left} were left out. {args.json} has all")
    print("\n".join(compared(report["rows"])))


if __name__ == "__main__":
    main()
