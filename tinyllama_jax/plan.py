"""Predicts a run on a machine that you do not have: memory, network traffic, time and cost.

python -m tinyllama_jax.plan --config configs/3t.py --on a100-40g:2x8 [--section.key=value]
python -m tinyllama_jax.plan --config configs/3t.py --on v5e:4x4 --mesh.data=1 --mesh.fsdp=-1 --sweep
python -m tinyllama_jax.plan --law inference --inference-tokens 1e12
python -m tinyllama_jax.plan --here --config configs/3t.py

Compiles the run's own train step for that machine, on the CPU. Exit code 0: the step fits; 3: it does not; 2: a mistake in the
command, or a kernel that the machine cannot run. --here checks and measures the machine that the command runs on instead, in
every process of a job; exit code 0: all is as expected; 1: a line says what is not.
"""

import os
import sys

if __name__ == "__main__" and "--here" not in sys.argv:  # before jax is imported: its CUDA plugin fails without a driver
    os.environ["JAX_PLATFORMS"] = "cpu"
    stderr = os.dup(2)
    try:  # importing jax also prints several lines about that
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

from tinyllama_jax.base import cli
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError, run_main
from tinyllama_jax.data import feed
from tinyllama_jax.planning import law_report, laws, preflight, targets
from tinyllama_jax.planning.compiled import compile_step, gib, messages
from tinyllama_jax.planning.report import draw_sweep, offer, prediction, report, show
from tinyllama_jax.planning.search import nearest, recommended, sizes, sweep, whole_run
from tinyllama_jax.run import stages

DOES_NOT_FIT = 3  # exit code
PRICES = {"train_peak": "FLOP/s of a device in training", "train_price": "USD per device and hour in training",
          "train_mfu": "MFU of training", "inference_peak": "operations/s of a device in inference",
          "inference_price": "USD per device and hour in inference", "input_mfu": "MFU of reading a prompt",
          "output_mfu": "MFU of writing tokens", "input_share": "fraction of the tokens that are read"}  # fmt: skip


def main(argv: list[str]) -> int:
    """Prints the plan; returns the exit code."""
    args, overrides = _arguments(argv)
    if args.here:
        return preflight.main(args, overrides)
    if args.law:
        return law_report.law(args, overrides)
    if not args.config or not args.on:
        raise UserError("--config FILE and --on TARGET are needed (or --law, or --here); see --help")
    config = cli.override(cli.read(args.config), cli.pairs(overrides))
    jax.config.update("jax_enable_compilation_cache", False)  # a cached program has no record of its memory
    with messages():  # drops the plugin's lines about a missing driver
        machine = targets.machine(args.on)
    from rich.console import Console

    console = Console(stderr=args.json, highlight=False, soft_wrap=True)
    say = lambda line: console.print(line, markup=False) if isinstance(line, str) else console.print(line)
    if args.sweep:
        return _swept(args, config, machine, say)
    compiled = whole_run(compile_step(config, machine))
    out = report(compiled, args)
    if compiled.fits:
        offered = sizes(compiled)
        out["sizes"] = [offer(one, args.mfu) for one in offered]
        out["largest_seqs_per_device"] = offered[0].config.train.seqs_per_device
        out["recommended_seqs_per_device"] = recommended(offered).config.train.seqs_per_device
    else:
        out["nearest"] = None
        if smallest := nearest(compiled):
            change, changed = smallest
            out["nearest"] = {"change": change, "peak_bytes_per_device": changed.peak, **prediction(changed, args)}
    show(out, say)
    for line in [*stages.lines(config), *repeated_sources(config)]:
        say(line)
    if args.json:
        print(json.dumps(out, indent=1))
    return 0 if compiled.fits else DOES_NOT_FIT


def _swept(args: argparse.Namespace, config: Config, machine: targets.Machine, say: Callable) -> int:
    path = args.picture or Path(f"plan-{args.on.replace(':', '-')}.png")
    rows = sweep(config, machine, args.mfu, say)
    say("sorted: those that fit first, then by predicted tokens/s per device:")
    for r in rows:
        rates = r["tokens_per_second_per_device"]
        rate = "{middle:,.0f} ({low:,.0f} to {high:,.0f})".format(**rates) if rates else ""
        mesh = " ".join(f"--mesh.{axis}={size}" for axis, size in r["mesh"].items())
        say(f"{rate:>30} {gib(r['peak_bytes_per_device']):>12} {mesh} --model.remat={r['remat']} "
            f"--train.seqs_per_device={r['seqs_per_device']} {'' if r['fits'] else 'does not fit'}"
            + (f" XLA recomputes {r['recomputed']:.1%}" if r["recomputed"] else ""))  # fmt: skip
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
    parser.add_argument("--on", help=f"the machine to compile for: {known}, or cpu:8 (none)")
    parser.add_argument("--here", action="store_true", help="check and measure this machine, before a run pays for it (no)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout, and the lines on stderr (no)")
    parser.add_argument("--price", type=_number, help="USD per device and hour (the price in planning/targets.py)")
    parser.add_argument("--mfu", type=_part, help="achieved fraction of peak of matmuls (the range in planning/targets.py)")
    parser.add_argument(
        "--sweep", action="store_true", help="try meshes (with the config's mesh.tensor) x remat policies x sequences (no)"
    )
    parser.add_argument("--picture", type=_picture, help="picture of --sweep or --law (plan-MACHINE.png, plan-law.png)")
    parser.add_argument("--law", choices=("chinchilla", "inference"), help="scaling laws, for --config or the 1.1B (none)")
    parser.add_argument("--fit", choices=laws.LAWS, default="hoffmann", help="whose constants the law uses (hoffmann)")
    parser.add_argument("--flops", type=_number, help="--law: a budget of training FLOPs (those of the model)")
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
        raise argparse.ArgumentTypeError(f"{text}: must be a fraction above 0, at most 1")
    return float(text)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: must be a .png, .svg or .pdf in a folder that exists")
    return path


def repeated_sources(config: Config) -> list[str]:
    """Warns of sources that the run reads too often, if the data are on this machine."""
    with contextlib.suppress(UserError):
        return stages.epochs(config, feed.open_sources(config))
    return []


if __name__ == "__main__":
    run_main(main)
