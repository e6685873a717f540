"""One training step here and in PyTorch (eager and compiled), same shape, same machine, same run: tokens/s, side by side.

    python tools/bench_train.py [--model demo|120m|1b] [--seq-len 256] [--seqs 8] [--steps 20] [--json OUT]

Synthetic tokens; fp32 on a CPU, bf16 compute on an accelerator. Needs neither grain nor tensorflow-datasets nor Beam; without
torch its rows are left out. Each framework runs in a process of its own, so that their thread pools do not meet.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama_jax import config as c
from tinyllama_jax import dims, metrics

SHAPES = {  # layers, width, heads, kv heads, ffn, vocabulary
    "demo": (4, 256, 8, 4, 704, 4096),
    "15m": (6, 288, 6, 6, 768, 32000),
    "120m": (12, 768, 12, 1, 2048, 32000),
    "1b": (22, 2048, 32, 4, 5632, 32000),
}
PEAK_LR, MIN_LR, WEIGHT_DECAY, CLIP = 4e-4, 4e-5, 0.1, 1.0


def config_of(args: argparse.Namespace, compute: str, residual: str) -> c.Config:
    """The configuration of the step that is timed: one micro-batch of `args.seqs` sequences on one device."""
    model = c.Model(
        *SHAPES[args.model],
        args.seq_len,
        precision=f"params=float32,compute={compute},output=float32",
        residual=residual,
        remat=args.remat,
        attention=args.attention,
    )
    return c.Config(
        "unused",
        model,
        c.Data({"unused": 1}),
        c.Optim(PEAK_LR, MIN_LR, 10, WEIGHT_DECAY, CLIP),
        c.Train(1_000_000, args.seqs * args.seq_len, args.seqs),
        c.Checkpoint(1),
        c.Mesh(1, 1, 1),
    )


def time_jax(args: argparse.Namespace) -> dict:
    """The step that `train` runs."""
    import jax
    import numpy as np

    from tinyllama_jax import sharding, step

    on_cpu = jax.default_backend() == "cpu"
    config = config_of(args, *(("float32", "float32") if on_cpu else ("bfloat16", "bfloat16")))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = step.build(config, mesh)
        state = program.init()
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (*program.shape, args.seq_len + 1))
        batch = jax.device_put(
            step.Batch(tokens.astype(np.uint16), np.full(program.shape, args.seq_len + 1, np.int32)), program.batch
        )
        began = time.perf_counter()
        state, out = program.train(state, batch)
        first = float(out["loss"])
        compile_seconds = time.perf_counter() - began
        seconds = []
        for _ in range(args.steps):
            began = time.perf_counter()
            state, out = program.train(state, batch)
            loss = float(out["loss"])
            seconds.append(time.perf_counter() - began)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "versions": {"jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "compile_seconds": compile_seconds,
        "losses": [first, loss],
        "seconds": seconds,
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


def time_torch(args: argparse.Namespace, compiled: bool) -> dict:
    """The same model written plainly in PyTorch: SDPA, fused AdamW, autocast to bf16 on a GPU."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    layers, D, N, K, ff, vocab = SHAPES[args.model]
    H, device = D // N, "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)
            self.q, self.k, self.v = (nn.Linear(D, n * H, bias=False) for n in (N, K, K))
            self.o = nn.Linear(N * H, D, bias=False)
            self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((D, ff), (D, ff), (ff, D)))

        def forward(self, x, cos, sin):
            B, S, _ = x.shape
            h = self.norm1(x)
            q, k, v = (f(h).view(B, S, -1, H).transpose(1, 2) for f in (self.q, self.k, self.v))
            q, k = (self.rotate(t, cos, sin) for t in (q, k))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + self.o(a.transpose(1, 2).reshape(B, S, N * H))
            h = self.norm2(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

        @staticmethod
        def rotate(x, cos, sin):
            first, second = x.float().chunk(2, -1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(vocab, D), nn.Linear(D, vocab, bias=False)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(layers)), nn.RMSNorm(D, eps=1e-5)
            angles = torch.arange(args.seq_len)[:, None] / 10000 ** (torch.arange(0, H, 2) / H)
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())

        def forward(self, tokens):
            x = self.embed(tokens[:, :-1])
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), tokens[:, 1:].flatten())

    torch.manual_seed(0)
    model = Llama().to(device)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=(2 / (5 * D)) ** 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR, (0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    forward = torch.compile(model) if compiled else model
    tokens = torch.randint(vocab, (args.seqs, args.seq_len + 1), device=device)
    losses, seconds = [], []
    for _ in range(args.steps + 1):
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = forward(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "versions": {"torch": torch.__version__},
        "device": device,
        "compile_seconds": seconds[0],
        "losses": [losses[0], losses[-1]],
        "seconds": seconds[1:],
        "peak_bytes": peak,
    }


def main() -> None:
    """Runs each row in its own process, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="15m")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seqs", type=int, default=8, help="sequences at once")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--remat", choices=c.REMAT, default="none")
    parser.add_argument("--attention", choices=c.ATTENTION, default="auto")
    parser.add_argument("--rows", default="jax,torch,torch.compile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        run = {
            "jax": lambda: time_jax(args),
            "torch": lambda: time_torch(args, False),
            "torch.compile": lambda: time_torch(args, True),
        }[args.only]
        print(json.dumps(run()))
        return
    model = config_of(args, "float32", "float32").model
    flops, tokens, rows = metrics.flops_per_token(model), args.seqs * args.seq_len, {}
    print(f"{dims.n_parameters(model):,} parameters, {args.seqs} x {args.seq_len} tokens a step, {platform.machine()}")
    for name in args.rows.split(","):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name], capture_output=True, text=True)
        if done.returncode:
            print(f"{name:14} left out: {done.stderr.strip().splitlines()[-1]}")
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        median = sorted(row["seconds"])[len(row["seconds"]) // 2]
        row |= {"tokens_per_second": tokens / median, "tflops": {k: f * tokens / median / 1e12 for k, f in flops.items()}}
        rows[name] = row
        print(
            f"{name:14} {row['tokens_per_second']:10,.0f} tokens/s  {row['tflops']['matmul_causal']:8.3f} TFLOP/s  "
            f"first step {row['compile_seconds']:5.1f} s  loss {row['losses'][0]:.3f} -> {row['losses'][1]:.3f}"
        )
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "arguments": {k: str(v) for k, v in vars(args).items() if k != "json"},
                    "platform": platform.platform(),
                    "flops_per_token": flops,
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
