"""The base model of the whole arc: 2.8M parameters on the demo's corpus and a text that states facts, on a CPU.

make arc
python -m tinyllama_jax.train --config configs/arc.py      the pre-training alone, once the arc has prepared the data

Loss: see docs/arc.md.
"""

from tinyllama_jax.base.config import Checkpoint, Config, Data, Log, Model, Optim, Train

config = Config(
    workdir="runs/arc/base",
    model=Model(
        n_layers=3,
        d_model=192,  # 6 heads x 32
        n_heads=6,
        n_kv_heads=2,
        d_ff=512,
        vocab_size=4_096,  # embedding and head, 2 x 4,096 x 192 = 1,572,864 of 2,753,856 parameters
        seq_len=256,  # a question, an answer and two turns that nobody asked for have 150 tokens
        precision="params=float32,compute=float32,output=float32",  # bf16 is slower on a CPU
        residual="float32",
        loss_chunk=512,
    ),
    # mostly facts: each of its statements has to be read more than ten times before a model of this size knows it
    data=Data(sources={"runs/arc/data/text": 0.1, "runs/arc/data/code": 0.05, "runs/arc/data/facts": 0.85}, eval_blocks=40),
    optim=Optim(peak_lr=2e-3, min_lr=2e-4, warmup_steps=100, weight_decay=0.1, clip_norm=1.0),
    train=Train(
        steps=3_200,  # x 512 = 1,638,400 tokens
        tokens_per_step=512,  # 2 x 256
        seqs_per_device=2,
    ),
    checkpoint=Checkpoint(every=500, keep=2),  # 33 MB each
    log=Log(eval_every=1_000),
)
