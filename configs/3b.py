"""3.0B parameters on 60B tokens: the shape of Llama 3.2 3B with Llama 2's vocabulary. The largest size that this code is for.

python -m tinyllama_jax.train --config configs/3b.py

Loss: not yet run at this size here.
Cost: 6 x 3.0B x 60B tokens = 1.1e21 FLOP in matmuls; 2,400 GPU-hours at 40% of an A100's 312 TFLOP/s, 6.3 days on 16.
Not yet run here.
"""

from tinyllama_jax.base.config import Checkpoint, Config, Data, Log, Mesh, Model, Optim, Train

config = Config(
    workdir="runs/3b",
    model=Model(
        n_layers=28,
        d_model=3_072,  # 24 heads x 128
        n_heads=24,
        n_kv_heads=8,
        d_ff=8_192,
        vocab_size=32_000,
        seq_len=2_048,
        remat="full",
    ),
    data=Data(sources={"data/slimpajama": 0.7, "data/starcoder": 0.3}),
    optim=Optim(
        peak_lr=3e-4,  # Llama 2's for 7B (Touvron et al. 2023); smaller models usually take a higher rate
        min_lr=3e-5,
        warmup_steps=2_000,
        weight_decay=0.1,
        clip_norm=1.0,
    ),
    train=Train(
        steps=28_750,  # x 2,097,152 = 60.3B tokens = 20 x 3.0B parameters
        tokens_per_step=2_097_152,  # 1,024 x 2,048
        seqs_per_device=4,  # on 16 devices 16 micro-batches: 16 x 16 x 4 = 1,024
    ),
    mesh=Mesh(data=1, fsdp=-1, tensor=1),  # sharded over all devices: 3.0B x 16 bytes / 16 = 3 GB of state on each
    checkpoint=Checkpoint(every=500, keep=3, keep_every=5_000),  # 36 GB each
    log=Log(every=10, eval_every=500),
)
