"""121M parameters (lit-gpt's tiny_LLaMA_120M) on 2.5B tokens: a complete pre-training in an afternoon on one node.

python -m tinyllama_jax.train --config configs/120m.py

On one GPU:  --mesh.data=1
Loss: not yet run at this size here.
Cost: 6 x 121,129,728 x 2.5B tokens = 1.8e18 FLOP in matmuls; 4 GPU-hours at 40% of an A100's 312 TFLOP/s. Not yet run here.
"""

from tinyllama_jax.base.config import Checkpoint, Config, Data, Log, Mesh, Model, Optim, Train

config = Config(
    workdir="runs/120m",
    model=Model(
        n_layers=12,
        d_model=768,  # 12 heads x 64
        n_heads=12,
        n_kv_heads=1,  # one key/value head for all query heads: multi-query attention
        d_ff=2_048,
        vocab_size=32_000,
        seq_len=2_048,
    ),
    data=Data(sources={"data/slimpajama": 0.7, "data/starcoder": 0.3}),
    optim=Optim(
        peak_lr=6e-4,  # GPT-3's for 125M parameters at 0.5M tokens a step (Brown et al. 2020, table 2.1)
        min_lr=6e-5,
        warmup_steps=715,  # 375M tokens, as in GPT-3
        weight_decay=0.1,
        clip_norm=1.0,
    ),
    train=Train(
        steps=4_768,  # x 524,288 = 2.5B tokens = 20.6 x 121M parameters
        tokens_per_step=524_288,  # 256 x 2,048
        seqs_per_device=8,  # on 8 devices 4 micro-batches: 4 x 8 x 8 = 256
    ),
    mesh=Mesh(data=-1, fsdp=1, tensor=1),  # a replica on each device: 121M x 16 bytes = 1.9 GB
    checkpoint=Checkpoint(every=500, keep=3),  # 1.5 GB each
    log=Log(every=10, eval_every=500),
)
