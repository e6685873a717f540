"""Trains a SentencePiece tokenizer on your own text.

python -m tinyllama_jax.train_tokenizer FILES --vocab-size 32000 --output DIR
"""

import argparse
import tempfile
from pathlib import Path

from tinyllama_jax.base.errors import UserError, run_main
from tinyllama_jax.base.files import check_local
from tinyllama_jax.data import tokenizer
from tinyllama_jax.data.prepare import inputs, vocabulary


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tinyllama_jax.train_tokenizer",
        description="Trains a SentencePiece model that decodes every text to what it was. "
        f"FILES: {' '.join(inputs.KINDS)}, folders or patterns.",
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", metavar="FILES", help="the text to learn from")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="pieces; Llama 2 has 32000")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder, for tokenizer.model")
    parser.add_argument("--text-key", default="text", metavar="NAME", help="key or column that holds the text (text)")
    parser.add_argument(
        "--sample-mb",
        type=int,
        default=100,
        metavar="M",
        help="millions of characters to learn from, 12 MB of memory each (100)",
    )
    args = parser.parse_args(argv)
    for option, value, most in (("vocab-size", args.vocab_size, 1 << 20), ("sample-mb", args.sample_mb, 1 << 14)):
        if not 1 <= value <= most:
            raise UserError(f"--{option} {value}: must lie in [1, {most:,}]")
    check_local("--output", args.output)
    if Path(args.output).exists():
        raise UserError(f"--output {args.output}: exists already; choose a new folder")
    sources, _ = inputs.find(args.files, "FILES")
    model = vocabulary.train(vocabulary.sample(sources, args.text_key, args.sample_mb * 10**6), args.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(model)
        tokenizer.load(folder).save(args.output)
    print(f"{args.output}: SentencePiece BPE, {args.vocab_size:,} pieces, of {len(sources):,} files")


if __name__ == "__main__":
    run_main(main)
