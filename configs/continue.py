"""On from published weights: TinyLlama's 3T model, which was never cooled down, with its learning rate brought to zero.

python tools/convert_from_torch.py --checkpoint DOWNLOADED --output runs/tinyllama-3t
python -m tinyllama_jax.train --config configs/continue.py --init.from=runs/tinyllama-3t

The weights are validated before the first step, and the first loss logged is theirs. What else can be gone on with, and how:
- a Hugging Face folder as it is: --init.from=FOLDER; only a run folder can have AdamW's moments, from a lit-gpt checkpoint
- with moments, another schedule or other data: --init.state=moments --optim.peak_lr=2e-4 --data.sources=data/mine:1
- with moments, the rest of its own cosine: no config of its own, but the one that it was made with and another folder,
  python -m tinyllama_jax.train --config configs/3t.py --workdir=runs/rest --init.from=runs/tinyllama-2.5t --init.state=all

Loss: not yet run at this size here.
Cost: 30B tokens at the original's 24,000 tokens/s a GPU: 22 hours of 16 A100-40G, 347 GPU-hours.
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
        peak_lr=4e-5,  # where the 3T run's cosine ended
        min_lr=4e-5,
        warmup_steps=200,  # the weights come without AdamW's moments, whose mean over steps b2=0.95 has back in some 100 steps
        weight_decay=0.1,
        clip_norm=1.0,
        schedule="constant",
        cooldown_steps=14_104,  # the rest, in a line to 0
    ),
    train=dataclasses.replace(base.train, steps=14_304),  # x 2,097,152 = 30.0B tokens, 1% of the run before
    checkpoint=Checkpoint(every=1_000, keep=3),
    log=Log(every=1, eval_every=1_000),
    init=Init(from_="runs/tinyllama-3t"),
)
