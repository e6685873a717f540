"""TinyLlama-Chat v1.0, first half: the 3T checkpoint on UltraChat, in Zephyr's template.

The second half is configs/dpo_ultrafeedback.py.

python -m tinyllama_jax.sft --config configs/sft_ultrachat.py --init.from=HF_FOLDER_OR_RUN_OR_GGUF

Data: the split train_sft of the Hugging Face data set HuggingFaceH4/ultrachat_200k (207,865 conversations, three parquet
files), as data/ultrachat_200k. Weights: TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T.

The original says "exactly the same setting as Zephyr", and has no code for it. Zephyr's recipe (alignment-handbook,
19f0345): learning rate 2e-5, cosine, warm-up over 0.1 of the steps, one epoch, 2,048 tokens, 16 sequences on each of 8 GPUs,
packed. There the loss was on all tokens, and a block held parts of conversations; here it is on the answers, and blocks hold
whole conversations.

Loss: not yet run at this size here.
Cost: `plan` predicts 27,500 (24,200 to 30,400) tokens/s a GPU on 8 A100-80G, and 17.9 of 72.9 GiB: 22 minutes, 10 USD, for
288M tokens. One such GPU takes 2.9 hours and 34.8 GiB.
"""

import dataclasses
from pathlib import Path

from tinyllama_jax.base.cli import read
from tinyllama_jax.base.config import Checkpoint, Data, Init, Log, Mesh, Optim, Train

base = read(str(Path(__file__).with_name("3t.py")))  # for its model; sft takes the one of the weights if it differs
config = dataclasses.replace(
    base,
    workdir="runs/sft_ultrachat",
    data=Data(sources={"data/ultrachat_200k/data/train_sft*": 1.0}, template="zephyr", document_mask=True, eval_blocks=500),
    optim=Optim(
        peak_lr=2e-5,
        min_lr=0.0,
        warmup_steps=110,  # 0.1 of the steps, whatever the number of steps
        weight_decay=0.0,
        clip_norm=1.0,
        b2=0.999,
    ),
    train=Train(
        epochs=1,
        steps=1_100,  # for 1,390 tokens a conversation, an estimate; `epochs` replaces it by the number for the data at hand
        tokens_per_step=262_144,  # 8 x 16 x 2,048
        seqs_per_device=8,
    ),
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=250, keep=2),  # 13.2 GB each
    log=Log(every=5, eval_every=250),
    init=Init(from_="runs/tinyllama-3t"),
)
