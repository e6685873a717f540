"""Makes an index of passages of your texts, and looks passages up in it, for `chat --retrieve` and `evaluate --retrieve`.

python -m tinyllama_jax.retrieve build DIR --output INDEX
python -m tinyllama_jax.retrieve search INDEX "words of a question"
"""

import argparse
import os
import time

from tinyllama_jax.base.errors import readable, run_main
from tinyllama_jax.data.prepare import inputs
from tinyllama_jax.inference import retrieval


def main(argv: list[str]) -> None:
    """Builds an index, or prints passages."""
    args = _arguments(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # bm25s asks JAX for its devices, and would take a GPU's memory
    started = time.perf_counter()
    if args.command == "build":
        record = retrieval.build(args.paths, args.output, args.text_key)
        kinds = {"copies": "copies of passages", "without_text": "rows without text", "other_files": "files of other types"}
        out = [f"{record[name]:,} {kind}" for name, kind in kinds.items() if record[name]]
        left = f" (left out: {', '.join(out)})" if out else ""
        size = sum(file["bytes"] for file in record["files"].values()) / 1e6
        print(f"{args.output}: {record['passages']:,} passages of {record['documents']:,} documents in "
              f"{len(record['inputs']):,} files{left}; {size:,.1f} MB, {time.perf_counter() - started:.1f} s")  # fmt: skip
        return
    index = retrieval.Index(args.index, args.passages)
    opened = time.perf_counter()
    passages = index.search(args.words)
    took = f"opened in {opened - started:.2f} s, searched in {1e3 * (time.perf_counter() - opened):.1f} ms"
    for passage, line in zip(passages, retrieval.sources(passages).splitlines(), strict=True):
        print(f"{line}\n{readable(passage.text)}\n")
    n = f"{len(passages)} of {index.record['passages']:,} passages"
    print(f"{n}; {took}" if passages else "no passage has any of these words")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tinyllama_jax.retrieve", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="make an index", allow_abbrev=False)
    kinds = " ".join((*inputs.KINDS, *inputs.MARKDOWN))
    build.add_argument("paths", nargs="+", metavar="DIR", help=f"files ({kinds}), folders or patterns")
    build.add_argument("--output", required=True, metavar="INDEX", help="new folder")
    build.add_argument("--text-key", default="text", metavar="NAME", help="key or column that holds the text (text)")
    search = commands.add_parser("search", help="print the best passages", allow_abbrev=False)
    search.add_argument("index", metavar="INDEX", help="a folder that `build` made")
    search.add_argument("words", metavar="WORDS", help="a question, or words")
    search.add_argument("--passages", type=int, default=3, metavar="K", help="how many at most (3)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main)
