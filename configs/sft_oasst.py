"""TinyLlama-Chat v0.2 to v0.4: the 503B, 1T and 1.5T checkpoints on oasst_top1, in ChatML with its two tokens.

python -m tinyllama_jax.sft --config configs/sft_oasst.py --init.from=HF_FOLDER_OR_RUN_OR_GGUF

Data: the training split of the Hugging Face data set OpenAssistant/oasst_top1_2023-08-25 (about 13,000 conversations), as the
folder data/oasst_top1. Weights: TinyLlama/TinyLlama-1.1B-intermediate-step-480k-1T for v0.3, -715k-1.5T for v0.4.

The original's recipe is that of sft_guanaco.py, with other data. It added [PAD], <|im_start|> and <|im_end|> to the
vocabulary, 32,003 rows in all; here the two tokens of ChatML get rows, each the mean of the old ones, and 62 more fill up to
32,064 = 501 x 64.
Without the tokens (--model.added_tokens=), the marks are plain text, and <|im_end|> is learned as such.

Loss: not yet run at this size here.
Cost: that of sft_guanaco.py for each token; 24 minutes and 1 USD on one A100-40G, if the conversations are as long.
"""

import dataclasses
from pathlib import Path

from tinyllama_jax.base.cli import read
from tinyllama_jax.base.config import Data, Init

base = read(str(Path(__file__).with_name("sft_guanaco.py")))
config = dataclasses.replace(
    base,
    workdir="runs/sft_oasst",
    model=dataclasses.replace(base.model, added_tokens="<|im_start|>,<|im_end|>", vocab_size=32_064),
    data=Data(sources={"data/oasst_top1": 1.0}, template="chatml", document_mask=True),
    train=dataclasses.replace(base.train, steps=4_060),  # 13,000 / 16 x 5
    init=Init(from_="runs/tinyllama-1t"),
)
