"""TinyLlama-Chat v1.0, second half: the result of configs/sft_ultrachat.py on UltraFeedback's pairs.

python -m tinyllama_jax.dpo --config configs/dpo_ultrafeedback.py --init.from=RUN_OF_SFT

Data: the split train_prefs of the Hugging Face data set HuggingFaceH4/ultrafeedback_binarized (61,135 pairs), as
data/ultrafeedback_binarized. The reference is `init.from` itself; its log-probabilities are computed first, once.

Zephyr's recipe (alignment-handbook, 19f0345): beta 0.01, learning rate 5e-7, cosine, warm-up over 0.1 of the steps, one epoch,
at most 1,024 tokens of prompt and answer together and 512 of the prompt, 8 GPUs x 8 x 2 = 128 pairs a step. Here a block of
2,048 tokens holds as many pairs as fit, about two, so a step has 64 blocks.

Loss: 0.693 at the first step; not yet run at this size here.
Cost: `plan` predicts 26,400 (23,000 to 29,200) tokens/s a GPU on 8 A100-80G and 10.6 of 72.9 GiB for the step of `sft`; DPO
adds a pass over the head, and one pass over the data for the reference: 10 minutes, 5 USD, for 63M tokens.
"""

import dataclasses
from pathlib import Path

from tinyllama_jax.base.cli import read
from tinyllama_jax.base.config import Checkpoint, Data, Init, Log, Mesh, Optim, Train

base = read(str(Path(__file__).with_name("3t.py")))  # for its model; dpo takes the one of the weights if it differs
config = dataclasses.replace(
    base,
    workdir="runs/dpo_ultrafeedback",
    data=Data(sources={"data/ultrafeedback_binarized/data/train_prefs*": 1.0}, template="zephyr", document_mask=True),
    optim=Optim(
        peak_lr=5e-7,
        min_lr=0.0,
        warmup_steps=48,  # 0.1 of the steps, whatever the number of steps
        weight_decay=0.0,
        clip_norm=1.0,
        b2=0.999,
    ),
    train=Train(
        epochs=1,
        steps=480,  # for two pairs a block, an estimate; `epochs` replaces it by the number for the data at hand
        tokens_per_step=131_072,  # 64 x 2,048
        seqs_per_device=4,
        dpo_beta=0.01,
    ),
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=250, keep=2),  # 13.2 GB each
    log=Log(every=5, eval_every=250),
    init=Init(from_="runs/sft_ultrachat"),
)
