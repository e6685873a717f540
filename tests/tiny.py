"""Small real data: a trained tokenizer, prepared sources, and the config of a run of a minute on them."""

import inspect
import io
import json
from pathlib import Path

from generated import texts as make_texts

TINY = '''"""A run of a minute for the tests."""

from tinyllama_jax.base.config import *

config = Config(
    workdir="unused",
    model=Model(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=64, vocab_size=512, seq_len=16,
                precision="params=float32,compute=float32,output=float32", residual="float32"),
    data=Data(sources={"DATA/a": 0.7, "DATA/b": 0.3}),
    optim=Optim(peak_lr=1e-2, min_lr=1e-3, warmup_steps=2, weight_decay=0.1, clip_norm=1.0),
    train=Train(steps=24, tokens_per_step=8 * 16, seqs_per_device=8),
    checkpoint=Checkpoint(every=5, keep=3),
    log=Log(eval_every=10),
)
'''


def train_tokenizer(path: Path, texts: list[str], vocab_size: int) -> Path:
    """A SentencePiece BPE model as the demo trains it."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines() if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def make_tiny_data(folder: Path) -> Path:
    """Writes the sources a and b (train and validation, S = 16), one of one block, one of another tokenizer, and tiny.py."""
    from tinyllama_jax.data.prepare.pipeline import prepare

    texts = make_texts(24)
    tokenizers = [train_tokenizer(folder / f"{size}.model", texts, size) for size in (512, 400)]

    def source(name: str, parts: dict[str, list[str]], tokenizer: Path) -> None:
        for split, documents in parts.items():
            lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
            (folder / f"{name}.{split}.jsonl").write_text(lines)
        files = {split: [folder / f"{name}.{split}.jsonl"] for split in parts}
        prepare(**files, tokenizer=tokenizer, output=folder / name, seq_len=16, workers=1)

    docstrings = [inspect.cleandoc(text[:1_500]) for text in texts]
    source("a", {"train": docstrings[:16], "validation": docstrings[16:18]}, tokenizers[0])
    source("b", {"train": [text[1_500:] for text in texts[:12]], "validation": [texts[20][1_500:]]}, tokenizers[0])
    source("one", {"train": ["x = 1"], "validation": ["y = 2"]}, tokenizers[0])
    source("other", {"train": texts[:2], "validation": texts[2:3]}, tokenizers[1])
    (folder / "tiny.py").write_text(TINY.replace("DATA", str(folder)))
    return folder
