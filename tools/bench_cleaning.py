"""Cleaning at speed: near-copies planted among many documents, how many are found, and what each option costs.

    python tools/bench_cleaning.py [--tokenizer PATH] [--documents 100000] [--json OUT]

The words are those of Debian's documentation, drawn by how frequent they are, so that nothing but what is planted is alike. Two
thirds of the documents come in pairs of a similarity from 0.5 to 1, some of 0.8 exactly. The pairs are made and compared by
the definition of Jaccard similarity; the command is run as a person would.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import re
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
from bench_data import documents, watched

FILES = 20
OPTIONS = {
    "exact": ["--dedup", "exact"],
    "minhash": ["--dedup", "minhash"],
    "length": ["--filter", "length:200:100000"],
    "language": ["--filter", "language:en:0.1"],
    "repetition": ["--filter", "repetition"],
    "scrub": ["--scrub", "email,ip,phone"],
}


def jaccard(a: list[str], b: list[str]) -> float:
    a, b = ({tuple(x[i : i + 5]) for i in range(len(x) - 4)} for x in (a, b))
    return len(a & b) / len(a | b)


def plant(n: int, words: list[str], weights: np.ndarray) -> tuple[list[list[str]], list[tuple[int, int, float]]]:
    """Documents of 40 to 2,000 words, and (earlier, later, similarity) of the pairs among them."""
    rng = np.random.default_rng(0)

    def draw(size: int) -> list[str]:
        return [words[i] for i in rng.choice(len(words), size, p=weights)]

    docs, pairs = [], []
    for i in range(n // 3):
        size = 184 if i % 6 == 0 else int(np.exp(rng.uniform(np.log(40), np.log(2_000))))
        text = draw(size)
        if i % 6 == 0:  # 160 of 200
            other = text[:164] + draw(20)
        elif i % 2:
            other = list(text)
            for at in rng.choice(size, int(size * rng.uniform(0, 0.08)), replace=False):
                other[at] = f"{other[at]}x"
        else:
            cut = int(size * rng.uniform(0.65, 1))
            other = text[:cut] + draw(size - cut)
        pairs.append((len(docs), len(docs) + 1, jaccard(text, other)))
        docs += [text, other, draw(int(np.exp(rng.uniform(np.log(40), np.log(2_000)))))]
    order = rng.permutation(len(docs))
    place = np.argsort(order)
    pairs = [(*sorted((int(place[a]), int(place[b]))), j) for a, b, j in pairs]
    return [docs[i] for i in order], pairs


def write(folder: Path, docs: list[list[str]]) -> int:
    """The documents in order in `FILES` files; returns their bytes of text."""
    folder.mkdir()
    size, each = 0, -(-len(docs) // FILES)
    for i in range(FILES):
        with (folder / f"{i:02}.jsonl").open("w") as out:
            for words in docs[i * each : (i + 1) * each]:
                text = " ".join(words)
                size += len(text.encode())
                out.write(json.dumps({"text": text}) + "\n")
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="runs/demo/tokenizer")
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--json")
    args = parser.parse_args()
    counts = Counter(word for text in documents("prose", 20_000_000) for word in re.findall(r"\w+", text))
    words, times = zip(*counts.most_common(50_000), strict=True)
    docs, pairs = plant(args.documents, list(words), np.array(times) / sum(times))
    alike = {later: earlier for earlier, later, j in pairs if j >= 0.8}
    out = {"documents": len(docs), "pairs": len(pairs), "at least 0.8": len(alike), "0.8": sum(j == 0.8 for *_, j in pairs)}
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        out["bytes"] = write(folder / "all", docs)
        small = write(folder / "few", docs[: len(docs) // 5])
        words = ["--tokenizer", args.tokenizer, "--seq-len", 2_048, "--workers", 1, "--held-out", 0]
        run = watched(
            "--train",
            folder / "all",
            *words,
            "--output",
            folder / "out",
            *OPTIONS["minhash"],
            "--keep-dropped",
            folder / "dropped",
        )
        each, got = -(-len(docs) // FILES), {}
        place = {" ".join(docs[later]): later for later in range(len(docs))}
        for file in (folder / "dropped").iterdir():
            for line in gzip.decompress(file.read_bytes()).splitlines():
                row = json.loads(line)
                got[place[row["text"]]] = int(row["copy_of"]["file"][:2]) * each + row["copy_of"]["document"]
        out["minhash"] = run | {
            "dropped": len(got),
            "recall": len(got.keys() & alike.keys()) / len(alike),
            "recall at 0.8": np.mean([later in got for _, later, j in pairs if j == 0.8]),
            "precision": np.mean([jaccard(docs[a], docs[b]) >= 0.8 for a, b in got.items()]),
        }
        print(json.dumps(out, indent=1))
        plain = watched("--train", folder / "few", *words, "--output", folder / "plain")
        out["plain"] = plain | {"bytes": small}
        for name, option in OPTIONS.items():
            run = watched("--train", folder / "few", *words, "--output", folder / name, *option)
            more = run["cpu seconds"] - plain["cpu seconds"]
            out[f"{name}, a fifth of them"] = run | {"more cpu seconds": more, "bytes/s per core": small / max(more, 0.1)}
            print(name, json.dumps(out[f"{name}, a fifth of them"]))
    libraries = ("apache-beam", "datasketch", "numpy", "pycld2")
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in libraries}
    out |= {"platform": platform.platform(), "cpus": os.cpu_count(), "versions": versions}
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
