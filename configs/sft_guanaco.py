"""TinyLlama-Chat v0.1: the 503B checkpoint on openassistant-guanaco, in guanaco's template.

python -m tinyllama_jax.sft --config configs/sft_guanaco.py --init.from=HF_FOLDER_OR_RUN_OR_GGUF

Data: `openassistant_best_replies_train.jsonl` of the Hugging Face data set timdettmers/openassistant-guanaco (9,846
conversations), as data/guanaco.jsonl. Weights: TinyLlama/TinyLlama-1.1B-intermediate-step-240k-503b.

The original (sft/script.sh of github.com/jzhang38/TinyLlama): learning rate 1e-5, constant, 5 epochs, 16 conversations a step,
512 tokens of each. It trained on the users' turns too, padded every conversation, and cut off the end of long ones, eos
included, so that the model did not stop. Here the loss is on the answers, whole conversations are packed, and one of more
than 1,024 tokens is cut after an answer. A step has as many tokens as the original's, 16 x 512.

Loss: not yet run at this size here.
Cost: `plan` predicts 23,800 (20,900 to 26,000) tokens/s on one A100-40G, and 23.4 of 36.2 GiB: 18 minutes, 1 USD. On 8 GPUs
add --train.seqs_per_device=1.
"""

import dataclasses
from pathlib import Path

from tinyllama_jax.base.cli import read
from tinyllama_jax.base.config import Checkpoint, Data, Init, Log, Mesh, Optim, Train

base = read(str(Path(__file__).with_name("3t.py")))  # for its model; sft takes the one of the weights if it differs
config = dataclasses.replace(
    base,
    workdir="runs/sft_guanaco",
    model=dataclasses.replace(base.model, seq_len=1_024),
    data=Data(sources={"data/guanaco.jsonl": 1.0}, template="guanaco", document_mask=True),
    optim=Optim(
        peak_lr=1e-5,
        min_lr=1e-5,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        clip_norm=1.0,
        b2=0.999,
    ),
    train=Train(
        epochs=5,
        steps=3_077,  # 9,846 / 16 x 5, the original's; `epochs` replaces it by the number for the packed data, which is printed
        tokens_per_step=8_192,  # 8 x 1,024
        seqs_per_device=8,
    ),
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=500, keep=2),  # 13.2 GB each
    log=Log(every=10, eval_every=500),
    init=Init(from_="runs/tinyllama-503b"),
)
