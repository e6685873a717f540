"""What a run needs of a machine that is not here: whether it fits, what goes over the wire, how long it takes, what it costs.

python -m tinyllama_jax.plan --config configs/3t.py --on a100-40g:2x8 [--section.key=value]
python -m tinyllama_jax.plan --config configs/3t.py --on v5e:4x4 --mesh.data=1 --mesh.fsdp=-1 --sweep
python -m tinyllama_jax.plan --law inference --inference-tokens 1e12

The very train step that would run is compiled for that machine; no accelerator is needed, and none is used. Exit code 0: it
fits; 3: it does not; 2: a user's mistake, or a kernel that the machine cannot run.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # before jax is imported: without a driver its CUDA plugin would stop it
    os.environ["JAX_PLATFORMS"] = "cpu"
    stderr = os.dup(2)
    try:  # nor need one read, from parts of it, that there is none
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        import jax
    finally:
        os.dup2(stderr, 2)

import argparse
import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import jax

from tinyllama_jax.base import cli, dims, sharding
from tinyllama_jax.base import config as config_lib
from tinyllama_jax.base.config import REMAT, Config
from tinyllama_jax.base.errors import UserError, run_main
from tinyllama_jax.data import feed
from tinyllama_jax.planning import law_report, laws, targets
from tinyllama_jax.planning.compiled import LARGE, Compiled, compile_step, gib, messages, step_seconds
from tinyllama_jax.run import stages

DOES_NOT_FIT = 3
PRICES = {"train_peak": "FLOP/s of a device in training", "train_price": "USD per device and hour in training",
          "train_mfu": "MFU of training", "inference_peak": "operations/s of a device in inference",
          "inference_price": "USD per device and hour in inference", "input_mfu": "MFU of reading a prompt",
          "output_mfu": "MFU of writing tokens", "input_share": "fraction of the tokens that are read"}  # fmt: skip
ORIGINAL = {"tokens_per_second_per_gpu": 24_000, "a100_hours_per_300b_tokens": 3_456, "days": 90, "usd": 140_000}


# -- what else would fit -------------------------------------------------------------------------------------------------


def _with(config: Config, **changes: object) -> Config:
    return cli.override(config, {key.replace("__", "."): str(value) for key, value in changes.items()})


def guess(compiled: Compiled, sequences: int) -> float:
    """Bytes that `sequences` a device would need: what does not depend on them, and the rest in proportion."""
    known = compiled.expected if compiled.memory["params"] is None else compiled.memory
    fixed = sum(known[kind] for kind in ("params", "optimizer", "gradients"))
    now = compiled.config.train.seqs_per_device
    guessed = fixed + max(compiled.peak - fixed, 0) * sequences / now
    most = compiled.config.fitting(sharding.batch_devices(compiled.mesh))[-1]
    alone = sequences == most  # without accumulation there is no sum of gradients
    return guessed + known["params"] * ((compiled.accumulation == 1) - alone)


def most_sequences(compiled: Compiled) -> tuple[int, Compiled | None]:
    """(the largest train.seqs_per_device that fits, the step compiled with it), or (0, None) if not even one does.

    What `guess` puts beyond the budget by a tenth or more is not compiled.
    """
    now, tried = compiled.config.train.seqs_per_device, [compiled]
    for n in reversed(compiled.config.fitting(sharding.batch_devices(compiled.mesh))):
        if n == now or (n < now and compiled.fits):
            continue
        near = min(tried, key=lambda t: abs(t.config.train.seqs_per_device - n))
        if n > 1 and guess(near, n) > 1.1 * compiled.machine.budget:
            continue
        tried.append(compile_step(_with(compiled.config, train__seqs_per_device=n), compiled.machine))
        if tried[-1].fits:
            return n, tried[-1]
    return (now, compiled) if compiled.fits else (0, None)


def nearest(compiled: Compiled) -> tuple[dict[str, object], Compiled] | None:
    """The nearest change with which a step that does not fit does, found by compiling: (keys and values, as compiled).

    Fewer sequences, which cost little; else a remat policy that keeps less; else parameters split over all devices.
    """
    config, machine = compiled.config, compiled.machine
    wider = {"mesh.data": 1, "mesh.fsdp": -1}
    remats = [{"model.remat": remat} for remat in REMAT[REMAT.index(config.model.remat) + 1 :]]
    for more in [{}, *remats, wider, {**wider, "model.remat": REMAT[-1]}]:
        for sequences in (config.train.seqs_per_device, 1):
            with contextlib.suppress(UserError):  # a number that does not come out even on another mesh
                keys = more | {"train.seqs_per_device": sequences}
                changed = cli.override(config, {key: str(value) for key, value in keys.items()})
                n, found = most_sequences(compile_step(changed, machine) if more else compiled)
                if found:
                    return more | ({"train.seqs_per_device": n} if n != config.train.seqs_per_device else {}), found
                break
    return None


def meshes(config: Config, machine: targets.Machine) -> list[tuple[int, int, int]]:
    """(data, fsdp, tensor) for a sweep: parameters whole on each node, on all nodes, and as the config has it."""
    n, per_node = len(machine.devices), machine.per_node
    own = sharding.make_mesh(config.mesh, machine.devices).shape
    found = [tuple(own[axis] for axis in ("data", "fsdp", "tensor")), (n // per_node, per_node, 1), (1, n, 1), (n, 1, 1)]
    return list(dict.fromkeys(found))


def sweep(config: Config, machine: targets.Machine, mfu: float | None, say: Callable[[str], None]) -> list[dict]:
    """Every mesh of `meshes` x remat policy x sequences a device (powers of two): those that fit first, then the fastest.

    Fastest if nothing overlaps: what is sent less often counts then too.
    """
    rows, tokens = [], config.train.tokens_per_step
    for data, fsdp, tensor in meshes(config, machine):
        for remat in REMAT:  # each keeps less than the one before
            last = None
            for n in (n for n in (1, 2, 4, 8, 16, 32, 64) if config.seqs_per_step % (n * data * fsdp) == 0):
                if last and guess(last, n) > (1.25 if last.fits else 1) * machine.budget:
                    continue
                changed = _with(config, mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor, model__remat=remat,
                                train__seqs_per_device=n)  # fmt: skip
                what = f"data={data} fsdp={fsdp} tensor={tensor} {remat} {n} a device"
                try:
                    last = compile_step(changed, machine)
                except UserError as error:
                    say(f"{what}: {error}")
                    break
                say(f"{what}: {gib(last.peak)}")
                seconds = (step_seconds(last, mfu) or {}).values()
                rows.append({"mesh": dict(last.mesh.shape), "remat": remat, "seqs_per_device": n, "fits": last.fits,
                             "peak_bytes_per_device": last.peak,
                             "tokens_per_second": tokens / max(seconds) if seconds else None,
                             "tokens_per_second_if_nothing_overlaps": tokens / sum(seconds) if seconds else None})  # fmt: skip
    if not rows:
        raise UserError(
            f"--sweep: {config.seqs_per_step} sequences a step do not divide into the {len(machine.devices)} devices; choose "
            "another train.tokens_per_step"
        )
    rate = lambda row: row["tokens_per_second_if_nothing_overlaps"] or 0
    return sorted(rows, key=lambda row: (not row["fits"], -rate(row), row["peak_bytes_per_device"]))


def whole_run(compiled: Compiled) -> Compiled:
    """`compiled` with the peak of a later stage, if only that has more than one micro-batch, and so a sum of gradients."""
    config = compiled.config
    more = [tokens for _, _, tokens in config.train.stages if tokens > config.train.tokens_per_step]
    if compiled.accumulation > 1 or not more:
        return compiled
    later = compile_step(_with(config, train__tokens_per_step=more[0], train__batch_ramp=""), compiled.machine)
    return compiled._replace(peak=later.peak, live=later.live, memory=later.memory, expected=later.expected)


def over_and_over(config: Config) -> list[str]:
    """`stages.epochs`, where the data are here."""
    with contextlib.suppress(UserError):
        return stages.epochs(config, feed.open_sources(config))
    return []


# -- reports --------------------------------------------------------------------------------------------------------------


def report(compiled: Compiled, args: argparse.Namespace) -> dict:
    """Everything that the command says, as JSON has it."""
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
    """Tokens a second if all that can overlap does, days and cost of the run, seconds of a step by part; None if unknown."""
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
    """`report`, for a person."""
    config, target = out["config"], out["target"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in out["mesh"].items())
    say(f"{out['parameters']:,} parameters on {target['on']}: {mesh}; compiled in {out['compile_seconds']:.1f} s")
    tokens, at_once = config["train.tokens_per_step"], config["train.tokens_per_step"] // out["accumulation"]
    say(f"step: {tokens:,} tokens = {out['accumulation']} x {at_once:,}, {out['seqs_per_device']} sequences a device at once")
    say(f"attention {out['attention']}, remat {config['model.remat']}")
    say(_memory_table(out))
    live, peak = out["memory"]["live"], out["peak_bytes_per_device"]
    if out["memory"]["measured"]["params"] is not None and live < 0.85 * peak:
        say(f"the kinds are known of {gib(live)}, what is alive at one time; the rest of the peak counts as temporaries")
    if out["memory"]["measured"]["params"] is None:
        say("the compiler stopped there: nothing is known of what the step would send")
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
            say("nothing near it does: take more devices, or ones with more memory")
            return
        say(f"the nearest that does: {keys}, {gib(change['peak_bytes_per_device'])}")
        _say_prediction(change, out, say)
        return
    say(f"the largest train.seqs_per_device that fits: {out['largest_seqs_per_device']}")
    say(f"fits: {needs}")


def _say_prediction(found: dict, out: dict, say: Callable) -> None:
    target, seconds = out["target"], found["seconds_per_step"]
    if not seconds:
        if "flops" in target:
            refused = found is out and out["memory"]["measured"]["params"] is None
            say("no rate is predicted: " + ("the compiler refused this step" if refused else "in fp32 the table has none"))
        return
    parts = ", ".join(f"{what} {s:.2f} s" for what, s in seconds.items())
    say(f"a step: {parts} (matmuls at {target['mfu']:.0%} of the peak, links and memory at their full rate)")
    span = lambda days: f"{days:,.1f} days" if days >= 2 else f"{24 * days:,.1f} hours"
    rate, price = found["tokens_per_second"], target["usd_per_device_hour"]
    say(f"if all of it overlaps: {rate:,.0f} tokens/s, {rate / target['devices']:,.0f} a device; {span(found['days'])}, "
        f"{found['cost']:,.0f} USD at {price:g} an hour and device")  # fmt: skip
    say(f"if nothing does: {span(found['days'] * sum(seconds.values()) / max(seconds.values()))}")
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
    """Memory against predicted throughput (or sequences a device, where none is predicted), one colour a remat policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    speed = "tokens_per_second_if_nothing_overlaps" if rows[0]["tokens_per_second"] else "seqs_per_device"
    meshes = list(dict.fromkeys("x".join(map(str, row["mesh"].values())) for row in rows))
    for i, remat in enumerate(REMAT):
        for j, mesh in enumerate(meshes):
            mine = [r for r in rows if r["remat"] == remat and "x".join(map(str, r["mesh"].values())) == mesh]
            mine.sort(key=lambda r: r["seqs_per_device"])
            x, y = [r["peak_bytes_per_device"] / 2**30 for r in mine], [r[speed] for r in mine]
            axes.plot(x, y, marker="os^D"[j % 4], color=f"C{i}", linewidth=0.7, label=f"{remat}, {mesh}")
            for r, *at in zip(mine, x, y, strict=True):
                axes.annotate(str(r["seqs_per_device"]), at, (3, 3), textcoords="offset points", fontsize=6)
    axes.axvline(limit / 2**30, color="black", linestyle="--", linewidth=1, label="budget")
    axes.set(
        xlabel="GiB a device", ylabel=speed.replace("_", " "), xlim=(0, None), title=f"{on}; sequences a device at the points"
    )
    figure.legend(loc="outside right center", fontsize=7, title="remat, data x fsdp x tensor", title_fontsize=7)
    figure.savefig(path, dpi=120)


# -- the command ---------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Plans, prints; returns the exit code."""
    args, rest = _arguments(argv)
    if args.law:
        return law_report.law(args, rest)
    if not args.config or not args.on:
        raise UserError("--config FILE and --on TARGET are needed (or --law); see --help")
    config = cli.override(cli.read(args.config), cli.pairs(rest))
    jax.config.update("jax_enable_compilation_cache", False)  # a program from there leaves no record of its memory
    with messages():  # that there is no driver
        machine = targets.machine(args.on)
    from rich.console import Console

    console = Console(stderr=args.json, highlight=False, soft_wrap=True)
    say = lambda what: console.print(what, markup=False) if isinstance(what, str) else console.print(what)
    if args.sweep:
        return _swept(args, config, machine, say)
    compiled = whole_run(compile_step(config, machine))
    out = report(compiled, args)
    if compiled.fits:
        out["largest_seqs_per_device"] = most_sequences(compiled)[0]
    else:
        found = nearest(compiled)
        out["nearest"] = None
        if found:
            out["nearest"] = {"change": found[0], "peak_bytes_per_device": found[1].peak, **prediction(found[1], args)}
    show(out, say)
    for line in [*stages.lines(config), *over_and_over(config)]:
        say(line)
    if args.json:
        print(json.dumps(out, indent=1))
    return 0 if compiled.fits else DOES_NOT_FIT


def _swept(args: argparse.Namespace, config: Config, machine: targets.Machine, say: Callable) -> int:
    path = args.picture or Path(f"plan-{args.on.replace(':', '-')}.png")
    rows = sweep(config, machine, args.mfu, say)
    say("best first, those that fit before the others:")
    for r in rows:
        rates = r["tokens_per_second_if_nothing_overlaps"], r["tokens_per_second"]
        rate = f"{rates[0]:,.0f} to {rates[1]:,.0f} tokens/s" if rates[0] else ""
        mesh = " ".join(f"--mesh.{axis}={size}" for axis, size in r["mesh"].items())
        say(f"{rate:>30} {gib(r['peak_bytes_per_device']):>12} {mesh} --model.remat={r['remat']} "
            f"--train.seqs_per_device={r['seqs_per_device']} {'' if r['fits'] else 'does not fit'}")  # fmt: skip
    if args.json:
        print(json.dumps(rows, indent=1))
    draw_sweep(rows, args.on, machine.budget, path)
    say(f"picture: {path}")
    return 0 if any(r["fits"] for r in rows) else DOES_NOT_FIT


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = cli.Parser(prog="python -m tinyllama_jax.plan", description=__doc__, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    known = ", ".join(f"{name}:{t.shape}" for name, t in targets.TARGETS.items())
    parser.add_argument("--config", help="a file such as configs/3t.py (none)")
    parser.add_argument("--on", help=f"the machine: {known}, or cpu:8 (none)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout, and the lines on stderr (no)")
    parser.add_argument("--price", type=_number, help="USD per device and hour (that of planning/targets.py)")
    parser.add_argument("--mfu", type=_part, help="fraction of the peak that matmuls reach (that of planning/targets.py)")
    parser.add_argument(
        "--sweep", action="store_true", help="try meshes (with the config's mesh.tensor) x remat policies x sequences (no)"
    )
    parser.add_argument("--picture", type=_picture, help="picture of --sweep or --law (plan-MACHINE.png, plan-law.png)")
    parser.add_argument("--law", choices=("chinchilla", "inference"), help="scaling laws, for --config or the 1.1B (none)")
    parser.add_argument("--fit", choices=laws.LAWS, default="hoffmann", help="whose constants the law uses (hoffmann)")
    parser.add_argument("--flops", type=_number, help="--law: a budget of training FLOPs (that of the model)")
    parser.add_argument("--inference-tokens", type=_number, default=1e12, help="--law inference: tokens in all (1e12)")
    for name, value in vars(laws.Prices()).items():
        kind = _part if name.endswith(("mfu", "share")) else _number
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=value, help=f"--law inference: {PRICES[name]} ({value:.3g})"
        )
    return parser.parse_known_args(argv)


def _number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 1e-30 <= float(text) <= 1e30:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: must be a number above 0, from 1e-30 to 1e30")


def _part(text: str) -> float:
    if _number(text) > 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a part, above 0 and at most 1")
    return float(text)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: must be a .png, .svg or .pdf in a folder that exists")
    return path


if __name__ == "__main__":
    run_main(main)
