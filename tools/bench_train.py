"""The train step here, in PyTorch at its best, and Transformers' Llama: same shape, weights, tokens, device and run.

    python tools/bench_train.py [--model 1b] [--seq-len 2048] [--seqs 16,8] [--remat none] [--attention auto] [--minutes 8]

Synthetic tokens, one device; bf16 compute over fp32 weights on an accelerator, fp32 on a CPU. Unless said, --model is 1b on an
accelerator of 16 GB or more and demo elsewhere, and --seqs (sequences per device) goes by its memory. For each row: whether it
is right, tokens/s, MFU under the four conventions of `dims.flops_per_token` as percent of the device's published peak | of its
matmul rate, measured first, memory. JSON in --json after each row. Always ends within --minutes. Needs neither grain nor
tensorflow-datasets nor Beam; without torch or transformers their rows are left out.

Right means: the first sequence's losses are those of the definition in fp32, the first loss is what it must be by hand, the
loss falls, and PyTorch's losses and first gradient norm are ours. bench_torch.py says what its rows' names mean.

Each row has a process of its own, one after another: starting one takes about 10 s on a GPU, and in return its peak of memory
is its own, all of the memory is free when it starts, and one that runs out of it or dies leaves the others alone.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
import time

import bench_common as common
import numpy as np

from tinyllama_jax.base import config as c
from tinyllama_jax.base import dims

ROWS = "jax,torch.compile,torch,transformers,torch.compile.chunk"
_HOW = [how + chunk + remat for how in ("", ".compile", ".max") for chunk in ("", ".chunk") for remat in ("", ".remat")]
KNOWN_ROWS = ("jax", *(family + how for family in ("torch", "transformers") for how in _HOW))  # bench_torch.py explains them
SEQS = (
    (100e9, "16,8,32"),
    (60e9, "8,16"),
    (30e9, "4,8"),
    (16e9, "2,4"),
    (0, "4"),
)  # by the device's bytes; the first is for all rows
# root mean square, nats: bf16's own is 0.009 at 120m; attention that sees one position ahead gives 0.23
TOKEN_LOSS = {"float32": 1e-3, "bfloat16": 3e-2}
FIRST_LOSS, LOSSES, GRAD_NORM = (
    1.0,
    {"float32": 5e-3, "bfloat16": 5e-2},
    {"float32": 1e-3, "bfloat16": 2e-2},
)  # between frameworks


def config_of(cell: dict, **fields) -> c.Config:
    """The configuration of the step that is timed: one micro-batch of `cell["seqs"]` sequences on one device."""
    import jax

    compute = fields.pop("compute", None) or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    fields = {"remat": cell["remat"], "attention": cell["attention"], "loss_chunk": cell["loss_chunk"]} | fields
    train = c.Train(1_000_000, cell["seqs"] * cell["seq_len"], cell["seqs"])
    model = common.model_of(cell, compute, **fields)
    return c.Config("unused", model, c.Data({"unused": 1}), common.OPTIM, train, c.Checkpoint(1), c.Mesh(1, 1, 1))


def prepare(config: c.Config, cell: dict):
    """The step that `train` runs, compiled before anything is on the device; its batch and weights; seconds of compiling."""
    import jax

    from tinyllama_jax.base import sharding
    from tinyllama_jax.core.losses import Batch
    from tinyllama_jax.core.program import build, shape_of_batch

    tokens = common.tokens(cell)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    jax.set_mesh(mesh)
    program, began = build(config, mesh), time.perf_counter()
    compiled = program.train.lower(program.state, shape_of_batch(program, cell["seq_len"])).compile()
    seconds = time.perf_counter() - began
    length = np.full(program.shape, cell["seq_len"] + 1, np.int32)
    batch = jax.device_put(Batch(tokens.reshape(*program.shape, -1), length), program.batch)
    params = jax.device_put(common.weights(config.model), jax.tree.map(lambda a: a.sharding, program.state.params))
    return program, compiled, batch, params, seconds


def token_losses(program, params: dict, cell: dict) -> np.ndarray:
    """Losses of the first sequence's tokens."""
    from tinyllama_jax.core.losses import Batch

    return np.asarray(program.token_losses(params, Batch(common.tokens(cell)[:1], np.int32([cell["seq_len"] + 1]))))


def time_jax(cell: dict) -> dict:
    """One row: the step here."""
    import jax

    from tinyllama_jax.kernels import attention

    config = config_of(cell)
    program, compiled, batch, params, compile_seconds = prepare(config, cell)
    measured = token_losses(program, params, cell)
    state, metrics = [program.start(params)], []
    del params

    def run() -> None:
        state[0], out = compiled(state[0], batch)
        metrics.append({name: out[name] for name in ("loss", "grad_norm")})

    sync = lambda: jax.block_until_ready((state, metrics[-1]))  # a step returns before the device has begun it
    for _ in range(common.WARM_UP):
        last = common.windows(run, sync, 1, 1)[0]
    seconds = common.windows(run, sync, common.steps_of(cell, last))
    memory, stats = compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    planned = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    )
    return {
        "versions": {"jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "live": attention.choose(cell["attention"], config.model.compute_dtype),
        "compile_seconds": compile_seconds,
        "losses": [float(m["loss"]) for m in metrics],
        "grad_norm": float(metrics[0]["grad_norm"]),
        "seconds": seconds,
        "peak_bytes": stats.get("peak_bytes_in_use", resident),
        "planned_bytes": planned,
        **common.against_reference(measured, cell),
    }


def measure(cell: dict) -> dict:
    """What the device is, what to run on it where `cell` leaves that open, and its best matmul rate.

    And the first sequence's losses by the definition in fp32, into `cell["reference"]`.
    """
    import bench_kernels
    import jax

    from tinyllama_jax.base import sharding
    from tinyllama_jax.core.program import build
    from tinyllama_jax.planning import targets

    device, cpu = jax.devices()[0], jax.default_backend() == "cpu"
    target = targets.of(device.device_kind)
    memory = target.memory if target else (device.memory_stats() or {}).get("bytes_limit", 0)
    model = cell["model"] or ("demo" if cpu or memory < 16e9 else "1b")
    seq_len = cell["seq_len"] or (2048 if model == "1b" else 256)
    one = cell | {"model": model, "seq_len": seq_len, "seqs": 1, "attention": "reference", "remat": "none"}
    rows = [bench_kernels.matmul(*s) for s in bench_kernels.MATMULS["tiny" if model == "tiny" else "small" if cpu else "1b"]]
    right = [row["flops"] / row["seconds"] for row in rows if row["ok"]]
    jax.config.update("jax_default_matmul_precision", "highest")  # not TF32
    config = config_of(one, compute="float32")
    jax.set_mesh(mesh := sharding.make_mesh(config.mesh, [device]))
    np.save(cell["reference"], token_losses(build(config, mesh), common.weights(config.model), one))
    return {
        "run": {"model": model, "seq_len": seq_len, "seqs": cell["seqs"] or next(s for n, s in SEQS if memory >= n)},
        "device": {"kind": device.device_kind, "memory": memory, "peak_flops": target and target.flops, "dtype": "float32"
                   if cpu else "bfloat16", "matmul_flops": max(right, default=None), "matmuls": rows},
    }  # fmt: skip


# -- rows ---------------------------------------------------------------------------------------------------------------


def cells(args: argparse.Namespace) -> list[dict]:
    """What there is to do: every row at the first number of sequences, then the others; at each the first of a sweep first."""
    base = {"model": args.model, "seq_len": args.seq_len, "steps": args.steps, "loss_chunk": args.loss_chunk}
    out = []
    for seqs in map(int, common.parts(args.seqs)):
        sweep = [(remat, attention) for remat in common.parts(args.remat) for attention in common.parts(args.attention)]
        for row in common.parts(args.rows):
            how = sweep if row == "jax" else [("", "")]
            out += [base | {"row": row, "seqs": seqs, "remat": r, "attention": a, "late": i} for i, (r, a) in enumerate(how)]
    return sorted(out, key=lambda cell: (out[0]["seqs"] != cell["seqs"], cell["late"] > 0))


def judge(row: dict, ours: dict | None, args: argparse.Namespace, device: dict) -> dict:
    """The row with its correctness and rates. `ours`: JAX's row at the same number of sequences, if there is one."""
    model, tokens, dtype = common.model_of(vars(args), "float32"), row["seqs"] * args.seq_len, device["dtype"]
    expected, by = common.first_loss(model, tokens)
    losses = row["losses"]
    checks = {
        "token losses": row["token_loss_error"] <= TOKEN_LOSS[dtype],
        "first loss": abs(losses[0] - expected) <= by,
        "loss falls": losses[-1] < losses[0] and all(map(math.isfinite, losses)),
    }
    if ours and ours is not row:
        both = min(len(losses), len(ours["losses"]))
        apart = float(np.max(np.abs(np.subtract(losses[:both], ours["losses"][:both]))))  # NaN if one is, unlike Python's max
        checks["losses as jax"] = apart <= LOSSES[dtype]
        checks["gradient as jax"] = abs(row["grad_norm"] / ours["grad_norm"] - 1) <= GRAD_NORM[dtype]
        row |= {"losses_apart": apart, "grad_norm_apart": abs(row["grad_norm"] / ours["grad_norm"] - 1)}
    seconds = common.median(row["seconds"])
    rates = {name: flops * tokens / seconds for name, flops in dims.flops_per_token(model).items()}
    percent = lambda of: {name: 100 * rate / of for name, rate in rates.items()} if of else None
    return row | {
        "ok": all(checks.values()), "wrong": [name for name, right in checks.items() if not right], "step_seconds": seconds,
        "tokens_per_second": tokens / seconds, "tflops": {name: rate / 1e12 for name, rate in rates.items()},
        "percent_of_peak": percent(device["peak_flops"]), "percent_of_matmul": percent(device["matmul_flops"]),
    }  # fmt: skip


def line(row: dict) -> str:
    """A row as it is printed; MFU as percent of the published peak | of the measured matmul rate."""
    live = (row.get("live") or [row["attention"]])[0]  # what "auto" came to
    name = " ".join(filter(None, (f"{row['row']:20} {row['seqs']:4}", row["remat"], live)))
    if "left_out" in row:
        return f"  -- {name:44} {row['left_out']}"
    peak, matmul = row["percent_of_peak"] or {}, row["percent_of_matmul"] or {}
    mfu = " ".join(f"{peak.get(k, math.nan):5.1f}|{matmul.get(k, math.nan):5.1f}" for k in row["tflops"]).replace(
        "  nan", "   --"
    )
    wrong = f"  WRONG: {', '.join(row['wrong'])}" if row["wrong"] else ""
    rate = f"{row['tokens_per_second']:10,.0f} {row['step_seconds'] * 1e3:9.1f}"
    loss = f"{row['losses'][0]:6.3f} -> {row['losses'][-1]:6.3f}"
    cost = f"{row['peak_bytes'] / 2**30:7.2f} {row['compile_seconds']:6.1f}{wrong}"
    return f"{'  ok' if row['ok'] else ' BAD'} {name:44} {loss} {rate}  {mfu} {cost}"


def compared(rows: list[dict]) -> dict:
    """Our best row against PyTorch's best right one: tokens/s over all, and at each number of sequences; least peaks there."""
    right = [row for row in rows if row["ok"]]
    best = lambda family, some: max((r for r in some if r["row"].split(".")[0] == family),
                                    key=lambda r: r["tokens_per_second"], default=None)  # fmt: skip
    out = {}
    for seqs in ("best", *sorted({row["seqs"] for row in right})):
        some = [row for row in right if seqs in ("best", row["seqs"])]
        for family in ("torch", "transformers"):
            if (ours := best("jax", some)) and (other := best(family, some)):
                out[f"{seqs}, {family}"] = {"tokens_per_second": ours["tokens_per_second"] / other["tokens_per_second"],
                                            "of": [ours["row"], ours["seqs"], other["row"], other["seqs"]]}  # fmt: skip
                if seqs != "best":
                    least = min(r["peak_bytes"] for r in some if r["row"].split(".")[0] == family)
                    out[f"{seqs}, {family}"]["peak_bytes"] = ours["peak_bytes"] / other["peak_bytes"]
                    out[f"{seqs}, {family}"]["peak_bytes_of_least"] = ours["peak_bytes"] / least
    return out


def run(cell: dict, seconds: float) -> dict:
    """What the worker of `cell` says, or why it says nothing."""
    torch = cell["row"].split(".")[0] in ("torch", "transformers")
    command = [common.TORCH] if torch else [__file__, "--worker"]
    try:
        *_, last = common.stream([*command, json.dumps(cell)], seconds)
        return last
    except (common.Ended, ValueError) as e:  # ValueError: it printed nothing
        return {"left_out": str(e)}


def main() -> None:
    """Runs each row in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=common.SHAPES)
    parser.add_argument("--seq-len", type=int, help="2048 unless said; 256 for the small models")
    parser.add_argument("--seqs", type=common.counts, help="sequences per device, in the order in which they are tried")
    parser.add_argument("--steps", type=int, default=20, help="at most, timed; fewer if they would take more than 30 s")
    parser.add_argument("--remat", type=common.some_of(*c.REMAT), default="none", help=f"for jax, of {', '.join(c.REMAT)}")
    parser.add_argument(
        "--attention", type=common.some_of(*c.ATTENTION), default="auto", help=f"for jax, of {', '.join(c.ATTENTION)}"
    )
    parser.add_argument("--loss-chunk", type=int, default=2048, help="tokens whose logits exist at one time")
    parser.add_argument("--rows", type=common.some_of(*KNOWN_ROWS), default=ROWS, help=f"of {', '.join(KNOWN_ROWS)}")
    parser.add_argument("--minutes", type=common.positive, default=8)
    parser.add_argument("--json", type=common.output, default="runs/bench_train.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        cell = json.loads(args.worker)
        print(json.dumps({"jax": time_jax, "measure": measure}[cell["row"]](cell)))
        return
    common.end_on_sigterm()
    deadline, folder = time.monotonic() + 60 * args.minutes, tempfile.TemporaryDirectory()
    more = {"seconds": 30, "reference": f"{folder.name}/reference.npy"}
    probe = run(vars(args) | more | {"row": "measure", "json": ""}, 60 * args.minutes)
    if "left_out" in probe:
        sys.exit(f"no device, or no reference on it: {probe['left_out']}")
    vars(args).update(probe["run"])
    device, todo = probe["device"], cells(args)
    model = common.model_of(vars(args), "float32")
    report = common.header(args) | {"device": device, "parameters": dims.n_parameters(model), "rows": [], "whole": False}
    report["flops_per_token"] = dims.flops_per_token(model)
    common.save(args.json, report)
    say = lambda flops: f"{flops / 1e12:.2f}" if flops else "none"
    print(f"{report['parameters']:,} parameters, S = {args.seq_len}, {device['dtype']}, {device['kind']}: "
          f"{say(device['matmul_flops'])} TFLOP/s of matmuls measured, {say(device['peak_flops'])} published")  # fmt: skip
    print(f"     {'row, sequences, remat, attention':44} {'loss':16} {'tokens/s':>10} {'ms':>9}  "
          f"{' '.join(f'{name:11.11}' for name in report['flops_per_token'])} {'GiB':>7} {'first s':>6}")  # fmt: skip
    too_much: dict[tuple, int] = {}  # sequences that did not fit
    for i, cell in enumerate(todo):
        left, kind = deadline - time.monotonic(), (cell["row"], cell["remat"], cell["attention"])
        if left < 5:
            got = {"left_out": "no time left"}
        elif cell["seqs"] >= too_much.get(kind, math.inf):
            got = {"left_out": f"out of memory with {too_much[kind]} already"}
        else:  # a row that hangs takes three times its share; torch.compile of the 1.1B more than a minute
            got = run(cell | more, min(left, max(3 * left / (len(todo) - i), 150)))
        row = {name: cell[name] for name in ("row", "seqs", "remat", "attention")} | got
        if "left_out" in row:
            row["ok"] = None
            if common.is_oom(row["left_out"]):
                too_much[kind] = min(cell["seqs"], too_much.get(kind, cell["seqs"]))
        else:
            ours = next((r for r in report["rows"] if r["row"] == "jax" and r["seqs"] == row["seqs"] and r["ok"]), None)
            row = judge(row, ours, args, device)
        report["rows"].append(row)
        report["compared"] = compared(report["rows"])
        common.save(args.json, report)
        print(line(row), flush=True)
    report["whole"] = True
    common.save(args.json, report)
    for name, ratio in report["compared"].items():
        print(f"ours against theirs ({name}): " + ", ".join(f"{k} {v:.2f}" for k, v in ratio.items() if k != "of"), ratio["of"])
    print(f"{sum(row['ok'] is False for row in report['rows'])} rows are wrong. {args.json} has all")


if __name__ == "__main__":
    main()
