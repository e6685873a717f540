"""TinyLlama's 1.1B parameters on the 22B tokens of Chinchilla's rule, on one node: the original's "32 hours".

python -m tinyllama_jax.train --config configs/chinchilla.py

Loss: not yet run at this size here.
Cost: 22B tokens / (8 x 24,000 tokens/s, the original's A100-40G) = 31.8 hours on one node, 255 GPU-hours. Not yet run here.
The data are those of the 3T run, SlimPajama and StarCoder; this run reads 2.4% of an epoch.
"""

from tinyllama_jax.base.config import Checkpoint, Config, Data, Log, Mesh, Model, Optim, Train

config = Config(
    workdir="runs/chinchilla",
    model=Model(
        n_layers=22,
        d_model=2_048,  # 32 heads x 64
        n_heads=32,
        n_kv_heads=4,
        d_ff=5_632,
        vocab_size=32_000,
        seq_len=2_048,
        remat="save_matmuls_and_attention",
    ),
    data=Data(sources={"data/slimpajama": 0.693584, "data/starcoder": 0.306416}),  # as in 3t.py
    optim=Optim(
        peak_lr=4e-4,
        min_lr=4e-5,
        warmup_steps=2_000,  # as in 3t.py; 19% of this run
        weight_decay=0.1,
        clip_norm=1.0,
    ),
    train=Train(
        steps=10_491,  # x 2,097,152 = 22.0B tokens = 20 x 1.1B parameters
        tokens_per_step=2_097_152,  # 1,024 x 2,048
        seqs_per_device=8,  # on 8 devices 16 micro-batches: 16 x 8 x 8 = 1,024
    ),
    mesh=Mesh(data=1, fsdp=8, tensor=1),
    checkpoint=Checkpoint(every=500, keep=3, keep_every=2_500),  # 13.2 GB each; a failure loses at most 91 minutes
    log=Log(every=10, eval_every=500),
)
