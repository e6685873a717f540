"""Continues from published weights: TinyLlama's 3T model, which had no cool-down, with a learning rate that falls to zero.

python -m tinyllama_jax.convert from-torch --checkpoint DOWNLOADED --output runs/tinyllama-3t
python -m tinyllama_jax.train --config configs/continue.py --init.from=runs/tinyllama-3t

The weights are validated before the first step, and the first loss logged is theirs. Other ways to continue:
- from a Hugging Face folder: --init.from=FOLDER. Only a run folder can have AdamW's moments, from a lit-gpt checkpoint.
- with moments, on another schedule or other data: --init.state=moments --optim.peak_lr=2e-4 --data.sources=data/mine:1
- with moments, along the remainder of the original cosine: use the config of that run and a new folder,
  python -m tinyllama_jax.train --config configs/3t.py --workdir=runs/rest --init.from=runs/tinyllama-2.5t --init.state=all

Loss: not yet run at this size here.
Cost: 30B tokens at the original's 24,000 tokens/s per GPU: 22 hours on 16 A100-40G, 347 GPU-hours.
"""

import dataclasses
from pathlib import Path

from tinyllama_jax.base.cli import read
from tinyllama_jax.base.config import Checkpoint, Init, Log, Optim

base = read(str(Path(__file__).with_name("3t.py")))
config = dataclasses.replace(
    base,
    workdir="runs/continue",
    optim=Optim(
        peak_lr=4e-5,  # the end of the 3T run's cosine
        min_lr=4e-5,
        warmup_steps=200,  # the weights come without AdamW's moments, which b2=0.95 rebuilds in about 100 steps
        weight_decay=0.1,
        clip_norm=1.0,
        schedule="constant",
        cooldown_steps=14_104,  # all other steps, linear to 0
    ),
    train=dataclasses.replace(base.train, steps=14_304),  # x 2,097,152 = 30.0B tokens, 1% of the 3T run
    checkpoint=Checkpoint(every=1_000, keep=3),
    log=Log(every=1, eval_every=1_000),
    init=Init(from_="runs/tinyllama-3t"),
)
