"""What bf16 costs in loss: the same 1,000 steps of a small model in fp32, and in bf16 with either residual stream.

    python tools/bench_precision.py --data runs/demo/data/text,runs/demo/data/code [--steps 1000] [--json OUT]

Same weights, same batches; the loss is the mean over the last tenth of the steps, and the distance from fp32 is given with the
spread that another seed's initial weights make, so that one can see which differences mean anything.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from tinyllama_jax.base import config as c
from tinyllama_jax.base import sharding
from tinyllama_jax.core import model
from tinyllama_jax.core.program import build, on_devices
from tinyllama_jax.core.step import new_state
from tinyllama_jax.data import feed
from tinyllama_jax.run import folder as run_folder

VARIANTS = {  # name -> (compute, residual stream, seed of the initial weights)
    "fp32 throughout": ("float32", "float32", 0),
    "bf16, residual fp32": ("bfloat16", "float32", 0),
    "bf16, residual bf16": ("bfloat16", "bfloat16", 0),
    "fp32, another seed": ("float32", "float32", 1),
}


def losses(data: str, steps: int, compute: str, residual: str, seed: int) -> list[float]:
    """The loss of each step."""
    blocks = feed.Blocks(data.split(",")[0], "train")
    vocabulary = -(-blocks.manifest["tokenizer"]["vocab_size"] // 64) * 64
    shape = c.Model(
        4,
        128,
        4,
        2,
        384,
        vocabulary,
        blocks.seq_len,
        residual=residual,
        precision=f"params=float32,compute={compute},output=float32",
    )
    config = c.Config(
        "unused",
        shape,
        c.Data(dict.fromkeys(data.split(","), 1.0)),
        c.Optim(1e-3, 1e-4, steps // 20, 0.1, 1.0),
        c.Train(steps, 8 * blocks.seq_len, 8),
        c.Checkpoint(1),
        c.Mesh(1, 1, 1),
    )
    sources = feed.open_sources(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    out = []
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        state = jax.jit(lambda: new_state(model.init(jax.random.key(seed), shape), config))()
        for batch in feed.training(config, sources, program.shape[1], np.arange(program.shape[1]), 0):
            state, metrics = program.train(state, on_devices(batch, program.batch, program.shape[1]))
            out.append(metrics["loss"])
    return [float(x) for x in out]


def main() -> None:
    """Runs the variants one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="prepared folders, separated by commas")
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = {}
    for name, (compute, residual, seed) in VARIANTS.items():
        began = time.perf_counter()
        curve = losses(args.data, args.steps, compute, residual, seed)
        end = float(np.mean(curve[-args.steps // 10 :]))
        rows[name] = {
            "first": curve[0],
            "end": end,
            "seconds": time.perf_counter() - began,
            "losses": curve[:: args.steps // 100],
        }
        fp32 = rows["fp32 throughout"]["end"]
        print(f"{name:22} {curve[0]:.4f} -> {end:.4f}  {100 * (end / fp32 - 1):+.3f}% of fp32's  {rows[name]['seconds']:.0f} s")
    if args.json:
        args.json.write_text(
            json.dumps({"versions": run_folder.versions(), "steps": args.steps, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
