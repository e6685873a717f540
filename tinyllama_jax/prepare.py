"""Turns raw text into training data.

python -m tinyllama_jax.prepare --train FILES --tokenizer FILE --output DIR --seq-len 2048
"""

import argparse
import sys

from tinyllama_jax.base.errors import run_main
from tinyllama_jax.data.prepare import clean, corpora, inputs, runners
from tinyllama_jax.data.prepare.pipeline import prepare


def main(argv: list[str]) -> None:
    """The command line. Options that it does not have go to Beam, if --runner names another runner than direct."""
    parser = argparse.ArgumentParser(
        prog="python -m tinyllama_jax.prepare",
        description=f"PATH: a file ({' '.join(inputs.KINDS)}), a folder, which is searched to the bottom, a pattern in "
        "quotes ('data/**/*.txt'), any of these in gs:// or s3://, or tfds:NAME[/CONFIG][:VERSION][:SPLIT]. --runner also "
        "takes the options of Apache Beam: see docs/runners.md.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--train", nargs="+", required=True, metavar="PATH", help="what to train on")
    add("--validation", nargs="+", default=[], metavar="PATH", help="text to hold out, if it is stored separately (none)")
    add("--held-out", type=float, metavar="F", help="without --validation: fraction of documents to hold out (0.01)")
    add("--corpus", default="", metavar="NAME", help=f"a published corpus: {', '.join(corpora.CORPORA)} (none)")
    add("--languages", nargs="+", default=[], metavar="NAME", help="languages of starcoder: names of its folders (all)")
    add("--bad-files", default="stop", metavar="stop|skip", help="skip: leave out files that cannot be read (stop)")
    add("--data-dir", metavar="DIR", help="folder of tfds: data sets (~/tensorflow_datasets)")
    add("--tokenizer", required=True, metavar="PATH", help="SentencePiece file, or a folder with a tokenizer")
    add("--output", required=True, metavar="DIR", help="new folder, here or s3://... gs://...")
    add("--seq-len", type=int, required=True, metavar="S", help="positions of a training sequence")
    add("--text-key", default="", metavar="NAME", help="key or column of the text (that of --corpus, or text)")
    add("--bos", action=argparse.BooleanOptionalAction, default=False, help="begin each document with bos (no)")
    add("--eos", action=argparse.BooleanOptionalAction, default=True, help="end each document with eos (yes)")
    several = {"action": "append", "default": []}
    add("--filter", **several, dest="filters", metavar="FILTER", help=f"{', '.join(clean.FILTERS.values())} (none)")
    add("--dedup", default="", metavar="exact|minhash", help="keep only the first of equal, or similar, documents (no)")
    add("--dedup-threshold", type=float, metavar="J", help="Jaccard similarity that counts as similar (0.8)")
    add("--scrub", **several, metavar="NAMES", help=f"{','.join(clean.SCRUBS)}, or regex:PATTERN=REPLACEMENT (none)")
    add("--keep-dropped", metavar="DIR", help="folder for the documents that --filter and --dedup drop (none)")
    add("--shard-mb", type=int, default=0, metavar="N", help="MiB of text in an output file (by the size of the input)")
    add("--workers", type=int, default=0, metavar="N", help="processes on this machine (one for each processor)")
    add("--runner", default=runners.DIRECT, help="direct, dask, or the name of one of Beam's runners (direct)")
    known, beam_options = parser.parse_known_args(argv)
    try:
        prepare(**vars(known), beam_options=beam_options)
    except KeyboardInterrupt:
        print("\nfinished shards are kept: run the same command again to resume", end="", file=sys.stderr)
        raise


if __name__ == "__main__":
    run_main(main)
