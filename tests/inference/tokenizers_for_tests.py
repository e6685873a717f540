"""One tokenizer of each kind: of 420 pieces, trained on a source of Python's library, or on bytes alone."""

import inspect
import json
from pathlib import Path

import pytest
from models import train_tokenizer

from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.export import tokenizer as export_tokenizer

TOKENIZERS = ("SentencePiece", "SentencePiece as Llama's", "Hugging Face", "byte-level BPE")


def make(kind: str, folder: Path) -> tokenizer_lib.Tokenizer:
    """A tokenizer of one of TOKENIZERS."""
    if kind.startswith("SentencePiece"):  # Llama's puts a space before each text
        return tokenizer_lib.load(train_tokenizer(folder / "tokenizer.model", add_dummy_prefix=kind.endswith("Llama's")))
    tokenizers = pytest.importorskip("tokenizers")
    if kind == "Hugging Face":
        export_tokenizer.write(train_tokenizer(folder / "tokenizer.model"), folder, add_bos=False, seq_len=64)
        (folder / "tokenizer.model").unlink()
        return tokenizer_lib.load(folder)
    whole = tokenizers.Tokenizer(tokenizers.models.BPE())  # SmolLM2's kind
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<unk>", "<s>", "</s>"],
    )
    whole.train_from_iterator(inspect.getsource(json.decoder).splitlines(), trainer)
    whole.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return tokenizer_lib.load(folder)
