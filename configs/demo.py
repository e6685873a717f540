"""The smallest run that shows every stage: 1.8M parameters on the text and code of Python's own library, on a CPU.

make demo
python -m tinyllama_jax.train --config configs/demo.py      the training alone, once the demo has prepared the data

Loss: 4.256 nats a token on the validation modules (text 5.08, code 3.87); a unigram model has 6.623. Two thirds of the
validation tokens are code, but the training mixture is 7:3 text, so training loss is higher. With Python 3.11.7; other
versions differ.
Cost: 200 s of processor time for the whole demo; 214 s on 2 cores (Xeon with AVX-512) shared with other work.
The losses in the comments below are from shorter runs: 410,000 tokens, 800 steps with their own warm-up and cosine.
"""

from tinyllama_jax.base.config import Checkpoint, Config, Data, Log, Model, Optim, Train

config = Config(
    workdir="runs/demo/run",
    model=Model(
        n_layers=4,  # 3 layers of width 160 cost the same and end 0.1 nats higher
        d_model=128,  # 4 heads x 32
        n_heads=4,
        n_kv_heads=2,
        d_ff=384,  # 3 x 128: SwiGLU's three matrices are slightly larger than the usual two of 4 x 128
        vocab_size=4_096,  # embedding and head, 2 x 4,096 x 128 = 1,048,576 of 1,836,160 parameters
        seq_len=128,  # 256 ends 0.25 nats higher on the same number of tokens
        precision="params=float32,compute=float32,output=float32",  # bf16 is slower on a CPU
        residual="float32",
        loss_chunk=512,  # 4 sequences x 128: one chunk, 512 x 4,096 x 4 B = 8 MB of logits
    ),
    data=Data(sources={"runs/demo/data/text": 0.7, "runs/demo/data/code": 0.3}),  # 7:3, as the original
    optim=Optim(
        peak_lr=2e-3,  # ends at 4.61; 4e-3: 4.67, 8e-3: 4.93
        min_lr=2e-4,  # a tenth, as the original
        warmup_steps=50,  # 3%; the original's 0.14% would be 2 steps here
        weight_decay=0.1,
        clip_norm=1.0,
    ),
    train=Train(
        steps=1_600,  # x 512 = 819,200 tokens: 573,440 of text (0.70 epochs), 245,760 of code (0.13 epochs)
        tokens_per_step=512,  # 4 x 128
        seqs_per_device=4,
    ),
    checkpoint=Checkpoint(every=200, keep=2),  # 22 MB each; kill -9 loses about 20 s of work at most, Ctrl-C none
    log=Log(eval_every=400),  # on all 33,000 validation tokens, which takes 3 s
)
