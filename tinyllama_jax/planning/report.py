"""Reports a compiled step: as JSON, as lines and tables, as a picture."""

import argparse
from collections.abc import Callable
from pathlib import Path

from tinyllama_jax.base import config as config_lib
from tinyllama_jax.base import dims
from tinyllama_jax.base.config import REMAT
from tinyllama_jax.planning import laws, targets
from tinyllama_jax.planning.compiled import LARGE, Compiled, gib, no_prediction, step_milliseconds, tokens_per_second
from tinyllama_jax.planning.timing import LEVELS
from tinyllama_jax.run import stages

NAMES = {"matmuls": "matmuls", "attention": "attention kernels", "elementwise": "elementwise and reductions",
         "copies": "copies, casts, zeros", "exposed": "exposed communication", "gaps": "gaps between kernels",
         "total": "total"}  # fmt: skip
PREDICTED = ("tokens_per_second_per_device", "days", "cost", "milliseconds")
ORIGINAL = {"tokens_per_second_per_gpu": 24_000, "a100_hours_per_300b_tokens": 3_456, "days": 90, "usd": 140_000}


def report(compiled: Compiled, args: argparse.Namespace) -> dict:
    """Returns the whole report of the command, ready for JSON."""
    config, machine, target = compiled.config, compiled.machine, compiled.machine.target
    out = {
        "config": config_lib.flat(config),
        "target": {"on": args.on, "devices": len(machine.devices)} | (_facts(target, args) if target else {}),
        "mesh": dict(compiled.mesh.shape),
        "parameters": dims.n_parameters(config.model),
        "peak_bytes_per_device": compiled.peak,
        "budget_bytes": machine.budget,
        "fits": compiled.fits,
        "seqs_per_device": config.train.seqs_per_device,
        "accumulation": compiled.accumulation,
        "flops_per_token": dims.flops_per_token(config.model)
        | {"executed_matmuls": compiled.executed["flops"] / config.train.tokens_per_step},
        "collectives": [c._asdict() for c in compiled.collectives],
        **prediction(compiled, args),
        "stages": stages.stages(config),
        "memory": {"measured": compiled.memory, "expected": compiled.expected, "live": compiled.live},
        "attention": compiled.attention,
        "notes": [*compiled.notes, *_caveats(config)],
        "compile_seconds": compiled.seconds,
    }
    if dims.n_parameters(config.model) == laws.TINYLLAMA.size:
        out["original"] = ORIGINAL
    return out


def _caveats(config: config_lib.Config) -> list[str]:
    known = (config.model.d_head, config.model.seq_len, config.data.document_mask) == (64, 2_048, False)
    return [] if known else ["attention's rates are for heads of 64, 2,048 tokens and no document mask; this step has others"]


def prediction(compiled: Compiled, args: argparse.Namespace) -> dict:
    """Predicts a step's milliseconds by class, tokens/s per device, and days and USD of the run; None if it cannot.

    Each has a low, a middle and a high value: the high tokens/s belong to the low times and costs.
    """
    config, target, n = compiled.config, compiled.machine.target, len(compiled.machine.devices)
    if not compiled.fits:
        return dict.fromkeys(PREDICTED) | {"no_prediction": "the step does not fit a device's memory"}
    out = {"tokens_per_second_per_device": tokens_per_second(compiled, args.mfu), "days": None, "cost": None,
           "milliseconds": step_milliseconds(compiled, args.mfu), "no_prediction": no_prediction(compiled)}  # fmt: skip
    if rates := out["tokens_per_second_per_device"]:
        days = [config.train.tokens / rate / n / 86_400 for rate in reversed(rates.values())]
        out["days"] = dict(zip(LEVELS, days, strict=True))
        if price := args.price or target.price:
            out["cost"] = {level: d * 24 * n * price for level, d in out["days"].items()}
    return out


def offer(compiled: Compiled, mfu: float | None) -> dict:
    """Returns the report on one value of train.seqs_per_device."""
    count = lambda matmuls: {key: matmuls[key] for key in ("forward", "backward")}
    whole = compiled.machine.target is None or compiled.machine.target.sm  # TPU compilers split a matmul into a ring of them
    return {
        "seqs_per_device": compiled.config.train.seqs_per_device,
        "peak_bytes_per_device": compiled.peak,
        "matmuls_per_layer": count(compiled.executed) if whole else None,
        "matmuls_per_layer_asked": count(compiled.asked),
        "recomputed": compiled.recomputed,
        "tokens_per_second_per_device": tokens_per_second(compiled, mfu),
    }


def _facts(target: targets.Target, args: argparse.Namespace) -> dict:
    return {"kind": target.kind, "memory": target.memory, "flops": target.flops,
            "rates": target.rates._asdict() | ({"matmul": [args.mfu] * 3} if args.mfu else {}),
            "usd_per_device_hour": args.price or target.price, "source": target.source, "spot": target.spot,
            "measured_by_others": target.anchor, "ceiling": not target.sm}  # fmt: skip


def show(out: dict, say: Callable) -> None:
    """Prints a `report` for a person."""
    config, target = out["config"], out["target"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in out["mesh"].items())
    say(f"{out['parameters']:,} parameters on {target['on']}: {mesh}; compiled in {out['compile_seconds']:.1f} s")
    if cloud := targets.cloud_type(target["on"]):
        say(f"Cloud TPU calls this slice TYPE={cloud} (launch/tpu_pod.sh)")
    tokens, at_once = config["train.tokens_per_step"], config["train.tokens_per_step"] // out["accumulation"]
    say(f"step: {tokens:,} tokens = {out['accumulation']} x {at_once:,}, {out['seqs_per_device']} sequences a device at once")
    say(f"attention {out['attention']}, remat {config['model.remat']}")
    say(_memory_table(out))
    live, peak = out["memory"]["live"], out["peak_bytes_per_device"]
    if out["memory"]["measured"]["params"] is not None and live < 0.85 * peak:
        say(f"only {gib(live)} of the peak are known buffers; the remainder counts as temporaries")
    if out["memory"]["measured"]["params"] is None:
        say("the compiler stopped there, so the traffic of the step is unknown")
    elif out["collectives"]:
        say(_wire_table(out["collectives"]))
    flops = ", ".join(f"{name} {value / 1e9:.3f}" for name, value in out["flops_per_token"].items())
    say(f"GFLOP a token: {flops}")
    for note in out["notes"]:
        say(f"warning: {note}")
    _say_prediction(out, out, say)
    if original := out.get("original"):
        say(f"the original: {original['tokens_per_second_per_gpu']:,} tokens/s a GPU on 16 A100-40G, "
            f"{original['a100_hours_per_300b_tokens']:,} A100-hours per 300B tokens, {original['days']} days, "
            f"about {original['usd']:,} USD")  # fmt: skip
    needs = f"{gib(out['peak_bytes_per_device'])} of {gib(out['budget_bytes'])}"
    if not out["fits"]:
        say(f"does not fit: {needs}")
        change = out["nearest"] or {"change": {}}
        keys = " ".join(f"--{key}={value}" for key, value in change["change"].items())
        if not keys:
            say("no small change helps: take more devices, or devices with more memory")
            return
        say(f"the smallest change that fits: {keys}, {gib(change['peak_bytes_per_device'])}")
        _say_prediction(change, out, say)
        return
    _say_sizes(out, say)
    say(f"fits: {needs}")


def _say_prediction(predicted: dict, out: dict, say: Callable) -> None:
    from rich.table import Table

    target, rate = out["target"], predicted["tokens_per_second_per_device"]
    if not rate:
        if "flops" in target:
            say(f"no time is predicted: {predicted['no_prediction']}")
        return
    table = Table("ms of a step, predicted", *LEVELS)
    parts = predicted["milliseconds"]
    for name, part in (parts | {"total": {level: sum(p[level] for p in parts.values()) for level in LEVELS}}).items():
        table.add_row(NAMES[name], *(f"{part[level]:,.0f}" for level in LEVELS))
    say(table)
    days = predicted["days"]
    unit, scale = ("days", 1) if days["middle"] >= 2 else ("hours", 24)
    span = lambda of, form=",.0f", by=1: f"{of['middle'] * by:{form}} ({of['low'] * by:{form}} to {of['high'] * by:{form}})"
    name = "ceiling, as no rate of a TPU is measured" if target["ceiling"] else "predicted"
    say(f"{name}: {span(rate)} tokens/s a device, {rate['middle'] * target['devices']:,.0f} in all")
    if target["measured_by_others"]:
        say(f"measured by others: {target['measured_by_others']}")
    price, cost = target["usd_per_device_hour"], predicted["cost"]
    costs = f"{span(cost)} USD at {price:g} an hour and device" if cost else "no price is known, give --price"
    say(f"the run: {span(days, ',.1f', scale)} {unit}, {costs}; low and high: all rates at their best or worst at once")
    if target["spot"]:
        say(f"other prices an hour and device: {target['spot']}")
    say(f"rates: {target['rates']['source']}")
    say(f"machine: {target['source']}")


def _say_sizes(out: dict, say: Callable) -> None:
    from rich.table import Table

    table = Table("sequences a device", "peak", "matmuls per layer", "as traced", "recomputed", "tokens/s")
    count = lambda matmuls: f"{matmuls['forward']:.3g} + {matmuls['backward']:.3g}" if matmuls else ""
    for row in out["sizes"]:
        rate, again = row["tokens_per_second_per_device"], f"{row['recomputed']:.1%}" if row["recomputed"] else "none"
        table.add_row(str(row["seqs_per_device"]), gib(row["peak_bytes_per_device"]), count(row["matmuls_per_layer"]),
                      count(row["matmuls_per_layer_asked"]), again, f"{rate['middle']:,.0f}" if rate else "")  # fmt: skip
    say(table)
    most, n, part = out["largest_seqs_per_device"], out["recommended_seqs_per_device"], out["sizes"][0]["recomputed"]
    if not part:
        say(f"the largest train.seqs_per_device that fits: {most}")
        return
    say(f"warning: {most} is the largest train.seqs_per_device that fits, but XLA then recomputes matmuls to save memory, "
        f"{part:.1%} of the step's FLOPs")  # fmt: skip
    reason = "the largest at which it does not" if n != most else "because it does so at every number that fits"
    say(f"recommended: --train.seqs_per_device={n}, {reason}")


def _memory_table(out: dict):
    from rich.table import Table

    table = Table("memory of a device", "as compiled", "by arithmetic")
    for kind, measured in out["memory"]["measured"].items():
        table.add_row(kind, gib(measured), gib(out["memory"]["expected"].get(kind)))
    table.add_row("peak", gib(out["peak_bytes_per_device"]), "")
    table.add_row("budget", gib(out["budget_bytes"]), "")
    return table


def _wire_table(collectives: list[dict]):
    from rich.table import Table

    groups: dict[tuple[str, ...], list[dict]] = {}
    for c in collectives:
        groups.setdefault((c["kind"], c["dtype"], " x ".join(c["axes"])), []).append(c)
    sent = {key: sum(c["bytes"] * c["trips"] for c in group) for key, group in groups.items()}
    table = Table("a step sends", "dtype", "over", "arrays", "bytes, each once", "bytes in a step")
    for key in sorted(sent, key=sent.__getitem__, reverse=True):
        if sent[key] >= LARGE:
            table.add_row(*key, str(len(groups[key])), gib(sum(c["bytes"] for c in groups[key])), gib(sent[key]))
    return table


def draw_sweep(rows: list[dict], on: str, limit: int, path: Path) -> None:
    """Draws memory against predicted throughput (or against sequences a device), one colour for each remat policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    rate = lambda row: (row["tokens_per_second_per_device"] or {"middle": row["seqs_per_device"]})["middle"]
    speed = "tokens/s a device, predicted" if rows[0]["tokens_per_second_per_device"] else "sequences a device"
    meshes = list(dict.fromkeys("x".join(map(str, row["mesh"].values())) for row in rows))
    for i, remat in enumerate(REMAT):
        for j, mesh in enumerate(meshes):
            line = [r for r in rows if r["remat"] == remat and "x".join(map(str, r["mesh"].values())) == mesh]
            line.sort(key=lambda r: r["seqs_per_device"])
            x, y = [r["peak_bytes_per_device"] / 2**30 for r in line], [rate(r) for r in line]
            axes.plot(x, y, marker="os^D"[j % 4], color=f"C{i}", linewidth=0.7, label=f"{remat}, {mesh}")
            for r, *at in zip(line, x, y, strict=True):
                axes.annotate(str(r["seqs_per_device"]), at, (3, 3), textcoords="offset points", fontsize=6)
    axes.axvline(limit / 2**30, color="black", linestyle="--", linewidth=1, label="budget")
    axes.set(xlabel="GiB a device", ylabel=speed, xlim=(0, None), title=f"{on}; sequences a device at the points")
    figure.legend(loc="outside right center", fontsize=7, title="remat, data x fsdp x tensor", title_fontsize=7)
    figure.savefig(path, dpi=120)
