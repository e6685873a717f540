"""TinyLlama v1.1: 2T tokens of SlimPajama, the last 150B of them in batches four times as large.

python -m tinyllama_jax.train --config configs/v1_1.py

Loss: not yet run at this size here.
Cost: at the first run's 24,000 tokens/s per GPU, 60 days on 16 A100-40G, 23,148 GPU-hours.

The model card (huggingface.co/TinyLlama/TinyLlama_v1.1) has three stages: up to 1.5T tokens; up to 1.85T tokens, where the
variants (v1_1_math_code.py, v1_1_chinese.py) mix in other data; and a cool-down to 2T tokens, with larger batches on the same
cosine, which here is a function of the tokens seen. The card gives 1.8M and 7.2M tokens per batch, but not the number of
sequences.
"""

import dataclasses
from pathlib import Path

from tinyllama_jax.base.cli import read
from tinyllama_jax.base.config import Checkpoint, Data, Mesh

TOKENS_PER_STEP = 1_802_240  # 880 x 2,048
COOLDOWN = 1_026_501  # steps before the cool-down, which starts at the first step after 1.85T tokens

base = read(str(Path(__file__).with_name("3t.py")))  # the same model, learning rate and seed
config = dataclasses.replace(
    base,
    workdir="runs/v1_1",
    data=Data(sources={"data/slimpajama": 1.0}),
    train=dataclasses.replace(
        base.train,
        steps=COOLDOWN + 20_807,  # 1.85T + 20,807 x 7,208,960 = 2.0000T tokens
        tokens_per_step=TOKENS_PER_STEP,
        batch_ramp=f"{COOLDOWN * TOKENS_PER_STEP}:{4 * TOKENS_PER_STEP}",
        seqs_per_device=11,  # on 16 devices 5 micro-batches: 5 x 16 x 11 = 880; then 20
    ),
    # v1.1 ran on nodes of 4 GPUs, and sharded parameters, gradients and moments within a node
    mesh=Mesh(data=-1, fsdp=4, tensor=1),
    checkpoint=Checkpoint(
        every=5_000,  # 13.2 GB each
        keep=3,
        keep_every=50_000,  # 90B tokens apart: 20 checkpoints, 270 GB
        keep_steps="830_000,1_025_000",  # the last before 1.5T tokens, where the variants fork, and before 1.85T
    ),
)
