"""The smallest run that shows the whole line: 1.8 M parameters on the text and code of Python's own library, on a CPU.

make demo
python -m tinyllama_jax.train --config configs/demo.py      its training alone, once the demo has prepared the data

Loss: TODO
Cost: TODO
"""

from tinyllama_jax.config import Checkpoint, Config, Data, Log, Model, Optim, Train

config = Config(
    workdir="runs/demo/run",
    model=Model(
        n_layers=4,
        d_model=128,  # 4 heads x 32
        n_heads=4,
        n_kv_heads=2,
        d_ff=384,  # 3 x 128: three matrices of it are as large as the usual two of 4 x 128, and a little
        vocab_size=4_096,  # embedding and head, 2 x 4,096 x 128 = 1,048,576 of 1,836,160 parameters
        seq_len=128,
        precision="params=float32,compute=float32,output=float32",  # bf16 is slower on a CPU
        residual="float32",
        loss_chunk=512,  # 4 sequences x 128: one chunk, 512 x 4,096 x 4 B = 8 MB of logits
    ),
    data=Data(sources={"runs/demo/data/text": 0.7, "runs/demo/data/code": 0.3}),  # 7:3, the original's
    optim=Optim(
        peak_lr=2e-3,  # after 800 steps 4.61; 4e-3: 4.67, 8e-3: 4.93
        min_lr=2e-4,  # a tenth, as the original
        warmup_steps=50,
        weight_decay=0.1,
        clip_norm=1.0,
    ),
    train=Train(
        steps=1_600,  # x 512 = 819,200 tokens: 573,440 of text (0.70 epochs), 245,760 of code (0.13 epochs)
        tokens_per_step=512,  # 4 x 128; fewer, larger steps of 1,024 learn less in the same time
        seqs_per_device=4,
    ),
    checkpoint=Checkpoint(every=200, keep=2),  # some ten seconds lost to a kill -9; nothing to Ctrl-C, which saves
    log=Log(eval_every=400),
)
