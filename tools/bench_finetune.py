"""The step of fine-tuning against that of pre-training: same shape, weights and number of tokens, by turns in one process.

    python tools/bench_finetune.py [--model 120m] [--seq-len 1024] [--seqs 1] [--repeats 7] [--output FILE]

Rows: text (pre-training), chat (`sft`: within conversations of 250 tokens, half of them learned), preferences (`dpo`).
Tokens/s count the positions of a batch. Right means: a block that is one conversation, all of it learned, has the loss of text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import bench_common as common
import numpy as np
from bench_train import config_of

from tinyllama_jax.base.dims import FIRST, LEARNED

CONVERSATION = 250  # tokens; ultrachat_200k's have about 1,400, oasst_top1's about 400


def batches(cell: dict) -> dict[str, tuple]:
    """Kind of data -> the fields of its batch [1, B, S + 1]."""
    tokens = common.tokens(cell)[None]
    length = np.full(tokens.shape[:2], tokens.shape[2], np.int32)
    place = np.arange(tokens.shape[2])
    marks = np.where(place % CONVERSATION >= CONVERSATION // 2, LEARNED, 0) | np.where(place % CONVERSATION == 0, FIRST, 0)
    marks = np.broadcast_to(marks.astype(np.uint8), tokens.shape)
    reference = np.where(marks & LEARNED, -10.0, 0.0).astype(np.float32)
    return {
        "text": (tokens, length),
        "chat": (tokens, length, None, marks),
        "preferences": (tokens, length, None, marks, reference),
    }


def measure(cell: dict, repeats: int) -> dict:
    """tokens/s of each kind, medians of the ratios to text within one turn, and whether the losses agree."""
    import dataclasses

    import jax

    from tinyllama_jax.base import sharding
    from tinyllama_jax.core.losses import Batch, for_data
    from tinyllama_jax.core.program import build, on_devices

    plain = config_of(cell)
    config = dataclasses.replace(plain, data=dataclasses.replace(plain.data, document_mask=True))
    mesh = sharding.make_mesh(plain.mesh, jax.devices()[:1])
    jax.set_mesh(mesh)
    runs, seconds = {}, {}
    params = common.weights(plain.model)
    for kind, fields in batches(cell).items():
        program = build(plain if kind == "text" else config, mesh, for_data(kind, 2))
        batch = on_devices(fields, program.batch, program.shape[1])
        placed = jax.device_put(params, jax.tree.map(lambda a: a.sharding, program.state.params))
        if kind == "text":
            want = program.evaluate(placed, Batch(*(a[0] for a in fields)))[0].loss
        if kind == "chat":
            whole = np.full_like(fields[3], LEARNED)
            whole[..., 0] = FIRST
            got = program.evaluate(placed, Batch(fields[0][0], fields[1][0], None, whole[0]))[0].loss
        runs[kind], seconds[kind] = [program.train, program.start(placed), batch], []
    for _ in range(common.WARM_UP + repeats):
        for kind, (train, state, batch) in runs.items():
            began = time.perf_counter()
            runs[kind][1], metrics = train(state, batch)
            jax.block_until_ready((runs[kind][1], metrics))
            seconds[kind].append(time.perf_counter() - began)
    n = cell["seqs"] * cell["seq_len"]
    timed = {kind: values[common.WARM_UP :] for kind, values in seconds.items()}
    ratio = lambda kind: statistics.median(a / b for a, b in zip(timed["text"], timed[kind], strict=True))
    return {
        "right": bool(np.isclose(got, want, rtol=1e-3)),
        "rows": {kind: {"tokens_per_second": n / statistics.median(values), "least": n / max(values), "most": n / min(values),
                        "against_text": ratio(kind)} for kind, values in timed.items()},
        "device": jax.devices()[0].device_kind, "versions": {"jax": jax.__version__},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=common.SHAPES, default="120m")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--seqs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    cell = {
        "model": args.model,
        "seq_len": args.seq_len,
        "seqs": args.seqs,
        "remat": "none",
        "attention": "auto",
        "loss_chunk": 2048,
    }
    out = {"cell": cell, **measure(cell, args.repeats)}
    print("right" if out["right"] else "WRONG: the loss of one whole conversation is not that of text")
    for kind, row in out["rows"].items():
        rate = f"{row['tokens_per_second']:,.0f} tokens/s ({row['least']:,.0f} to {row['most']:,.0f})"
        print(f"{kind:12} {rate:40} {row['against_text']:.3f} of text")
    if args.output:
        args.output.write_text(json.dumps(out, indent=1) + "\n")
    return int(not out["right"])


if __name__ == "__main__":
    sys.exit(main())
