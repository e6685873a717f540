"""What a plan says of a compiled step: as JSON, as lines and tables, as a picture."""

import argparse
from collections.abc import Callable
from pathlib import Path

from tinyllama_jax.base import config as config_lib
from tinyllama_jax.base import dims
from tinyllama_jax.base.config import REMAT
from tinyllama_jax.planning import laws, targets
from tinyllama_jax.planning.compiled import LARGE, Compiled, gib, step_seconds
from tinyllama_jax.run import stages

ORIGINAL = {"tokens_per_second_per_gpu": 24_000, "a100_hours_per_300b_tokens": 3_456, "days": 90, "usd": 140_000}


def report(compiled: Compiled, args: argparse.Namespace) -> dict:
    """Returns all that the command reports, ready for JSON."""
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
        | {"executed_matmuls": compiled.flops / config.train.tokens_per_step},
        "collectives": [c._asdict() for c in compiled.collectives],
        **prediction(compiled, args),
        "stages": stages.stages(config),
        "memory": {"measured": compiled.memory, "expected": compiled.expected, "live": compiled.live},
        "attention": compiled.attention,
        "notes": compiled.notes,
        "compile_seconds": compiled.seconds,
    }
    if dims.n_parameters(config.model) == laws.TINYLLAMA.size:
        out["original"] = ORIGINAL
    return out


def prediction(compiled: Compiled, args: argparse.Namespace) -> dict:
    """Predicts tokens/s with full overlap, days and USD of the run, and the seconds of each part of a step; None if unknown."""
    config, target = compiled.config, compiled.machine.target
    if not (seconds := step_seconds(compiled, args.mfu)):
        return dict.fromkeys(("tokens_per_second", "days", "cost", "seconds_per_step"))
    rate = config.train.tokens_per_step / max(seconds.values())
    days = config.train.tokens / rate / 86_400
    cost = days * 24 * len(compiled.machine.devices) * (args.price or target.price)
    return {"tokens_per_second": rate, "days": days, "cost": cost, "seconds_per_step": seconds}


def _facts(target: targets.Target, args: argparse.Namespace) -> dict:
    return {"kind": target.kind, "memory": target.memory, "flops": target.flops, "mfu": args.mfu or target.mfu,
            "usd_per_device_hour": args.price or target.price, "source": target.source}  # fmt: skip


def show(out: dict, say: Callable) -> None:
    """Prints a `report` for a person."""
    config, target = out["config"], out["target"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in out["mesh"].items())
    say(f"{out['parameters']:,} parameters on {target['on']}: {mesh}; compiled in {out['compile_seconds']:.1f} s")
    tokens, at_once = config["train.tokens_per_step"], config["train.tokens_per_step"] // out["accumulation"]
    say(f"step: {tokens:,} tokens = {out['accumulation']} x {at_once:,}, {out['seqs_per_device']} sequences a device at once")
    say(f"attention {out['attention']}, remat {config['model.remat']}")
    say(_memory_table(out))
    live, peak = out["memory"]["live"], out["peak_bytes_per_device"]
    if out["memory"]["measured"]["params"] is not None and live < 0.85 * peak:
        say(f"{gib(live)} of the peak is of known kinds; the remainder counts as temporaries")
    if out["memory"]["measured"]["params"] is None:
        say("the compiler stopped there, so what the step would send is unknown")
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
    say(f"the largest train.seqs_per_device that fits: {out['largest_seqs_per_device']}")
    say(f"fits: {needs}")


def _say_prediction(predicted: dict, out: dict, say: Callable) -> None:
    target, seconds = out["target"], predicted["seconds_per_step"]
    if not seconds:
        if "flops" in target:
            refused = predicted is out and out["memory"]["measured"]["params"] is None
            say("no rate is predicted: " + ("the compiler refused this step" if refused else "in fp32 the table has none"))
        return
    parts = ", ".join(f"{part} {s:.2f} s" for part, s in seconds.items())
    say(f"a step: {parts} (matmuls at {target['mfu']:.0%} of the peak, links and memory at their full rate)")
    span = lambda days: f"{days:,.1f} days" if days >= 2 else f"{24 * days:,.1f} hours"
    rate, price = predicted["tokens_per_second"], target["usd_per_device_hour"]
    say(f"with full overlap: {rate:,.0f} tokens/s, {rate / target['devices']:,.0f} a device; {span(predicted['days'])}, "
        f"{predicted['cost']:,.0f} USD at {price:g} an hour and device")  # fmt: skip
    say(f"without overlap: {span(predicted['days'] * sum(seconds.values()) / max(seconds.values()))}")
    say(f"source: {target['source']}")


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
    table = Table("a step sends", "dtype", "over", "arrays", "bytes of each once", "in a step")
    for key in sorted(sent, key=sent.__getitem__, reverse=True):
        if sent[key] >= LARGE:
            table.add_row(*key, str(len(groups[key])), gib(sum(c["bytes"] for c in groups[key])), gib(sent[key]))
    return table


def draw_sweep(rows: list[dict], on: str, limit: int, path: Path) -> None:
    """Draws memory against predicted throughput (or against sequences a device), one colour for each remat policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    speed = "tokens_per_second_if_nothing_overlaps" if rows[0]["tokens_per_second"] else "seqs_per_device"
    meshes = list(dict.fromkeys("x".join(map(str, row["mesh"].values())) for row in rows))
    for i, remat in enumerate(REMAT):
        for j, mesh in enumerate(meshes):
            line = [r for r in rows if r["remat"] == remat and "x".join(map(str, r["mesh"].values())) == mesh]
            line.sort(key=lambda r: r["seqs_per_device"])
            x, y = [r["peak_bytes_per_device"] / 2**30 for r in line], [r[speed] for r in line]
            axes.plot(x, y, marker="os^D"[j % 4], color=f"C{i}", linewidth=0.7, label=f"{remat}, {mesh}")
            for r, *at in zip(line, x, y, strict=True):
                axes.annotate(str(r["seqs_per_device"]), at, (3, 3), textcoords="offset points", fontsize=6)
    axes.axvline(limit / 2**30, color="black", linestyle="--", linewidth=1, label="budget")
    axes.set(
        xlabel="GiB a device", ylabel=speed.replace("_", " "), xlim=(0, None), title=f"{on}; sequences a device at the points"
    )
    figure.legend(loc="outside right center", fontsize=7, title="remat, data x fsdp x tensor", title_fontsize=7)
    figure.savefig(path, dpi=120)
