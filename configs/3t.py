"""TinyLlama's 1.1B parameters on 3T tokens of SlimPajama and StarCoder.

python -m tinyllama_jax.train --config configs/3t.py

Loss: not yet run at this size here.
Cost: the original took 90 days on 16 A100-40G at 24,000 tokens/s each, 34,560 GPU-hours.
`plan` predicts 26,200 (23,000 to 28,900) for this config, 83 days, and 26,800 with --train.seqs_per_device=16, which takes
32.2 of 36.2 GiB.
"""

from tinyllama_jax.base.config import Checkpoint, Config, Data, Log, Mesh, Model, Optim, Train

config = Config(
    workdir="runs/3t",
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
    data=Data(sources={"data/slimpajama": 0.693584, "data/starcoder": 0.306416}),
    optim=Optim(
        peak_lr=4e-4,
        min_lr=4e-5,  # the original had 4e-4 until step 240,000, by mistake: --optim.min_lr=4e-4 until there reproduces it
        warmup_steps=2_000,  # 4.2B tokens
        weight_decay=0.1,
        clip_norm=1.0,
    ),
    train=Train(
        steps=1_430_512,  # x 2,097,152 = 3.0000T tokens
        tokens_per_step=2_097_152,  # 1,024 x 2,048
        seqs_per_device=8,  # on 16 devices 8 micro-batches: 8 x 16 x 8 = 1,024
        seed=3_407,
    ),
    # 16 devices = data 2 x fsdp 8 (hybrid sharding, as in v1.1): parameters, gradients and moments are sharded over the 8 GPUs
    # of a node, where links are fast; only gradients cross between nodes, once per micro-batch. v1.0 sharded over all 16,
    # --mesh.data=1 --mesh.fsdp=16: half the state on each device, but every layer's weights go over the network.
    mesh=Mesh(data=-1, fsdp=8, tensor=1),
    checkpoint=Checkpoint(
        every=5_000,  # 13.2 GB each
        keep=3,
        keep_every=50_000,  # 105B tokens apart: 28 checkpoints, 370 GB
        # the original's releases before its last: 105B, 503B, 1T, 1.5T, 2T, 2.5T tokens
        keep_steps="50_000,240_000,480_000,715_000,955_000,1_195_000",
    ),
    log=Log(every=10, eval_every=5_000),
)
