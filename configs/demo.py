"""The smallest run that shows the whole line: 1.8 M parameters on the text and code of Python's own library, on a CPU.

make demo
python -m tinyllama_jax.train --config configs/demo.py      its training alone, once the demo has prepared the data

Loss: 4.25 nats a token on the validation modules at the end (text 5.08, code 3.87; two thirds of their tokens are code, so that
the loss of training, which is 7:3, stands higher); a unigram model has 6.62. With Python 3.11.7: each has another library.
Cost: 200 s of processor time for the whole demo; 214 s on 2 cores (Xeon with AVX-512) that other work used too.
Figures below that compare were measured on 410,000 tokens: 800 steps with their own warm-up and cosine.
"""

from tinyllama_jax.base.config import Checkpoint, Config, Data, Log, Model, Optim, Train

config = Config(
    workdir="runs/demo/run",
    model=Model(
        n_layers=4,  # 3 layers of width 160 cost as much and end 0.1 higher
        d_model=128,  # 4 heads x 32
        n_heads=4,
        n_kv_heads=2,
        d_ff=384,  # 3 x 128: three matrices of it are as large as the usual two of 4 x 128, and a little
        vocab_size=4_096,  # embedding and head, 2 x 4,096 x 128 = 1,048,576 of 1,836,160 parameters
        seq_len=128,  # 256 ends 0.25 higher on as many tokens
        precision="params=float32,compute=float32,output=float32",  # bf16 is slower on a CPU
        residual="float32",
        loss_chunk=512,  # 4 sequences x 128: one chunk, 512 x 4,096 x 4 B = 8 MB of logits
    ),
    data=Data(sources={"runs/demo/data/text": 0.7, "runs/demo/data/code": 0.3}),  # 7:3, the original's
    optim=Optim(
        peak_lr=2e-3,  # ends at 4.61; 4e-3: 4.67, 8e-3: 4.93
        min_lr=2e-4,  # a tenth, as the original
        warmup_steps=50,  # 3%; the original's 0.14% of 1.4 M steps would be 2 here
        weight_decay=0.1,
        clip_norm=1.0,
    ),
    train=Train(
        steps=1_600,  # x 512 = 819,200 tokens: 573,440 of text (0.70 epochs), 245,760 of code (0.13 epochs)
        tokens_per_step=512,  # 4 x 128
        seqs_per_device=4,
    ),
    checkpoint=Checkpoint(every=200, keep=2),  # 22 MB each; kill -9 loses at most some 20 s of work, Ctrl-C none
    log=Log(eval_every=400),  # all 33,000 validation tokens each time: 3 s
)
