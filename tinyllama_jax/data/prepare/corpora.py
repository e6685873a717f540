"""The published corpora of `prepare --corpus`: their file types, where the text is, and what is left out."""

import difflib
from collections.abc import Mapping
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import NamedTuple

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data.prepare.inputs import Source

JSONL = (".jsonl", ".jsonl.zst", ".jsonl.gz")  # as published, and as people unpack them


class Corpus(NamedTuple):
    """How a corpus is stored. docs/data.md says where to get each."""

    kinds: tuple[str, ...]  # of `inputs.KINDS`
    text_key: str
    drop: Mapping[str, str] = MappingProxyType({})  # see `documents.read`
    languages: bool = False  # whether each folder holds one language


CORPORA = {
    # StarCoder has more recent versions of its code
    "slimpajama": Corpus(JSONL, "text", drop={"meta.redpajama_set_name": "RedPajamaGithub"}),
    "starcoder": Corpus((".parquet",), "content", languages=True),
    "proof_pile": Corpus(JSONL, "text"),
    "skypile": Corpus(JSONL, "text"),
}


def corpus_named(name: str) -> Corpus:
    """The corpus `name`. Raises UserError with the nearest name."""
    if name not in CORPORA:
        raise UserError(f"--corpus {name}: is not known (other corpora need no --corpus); {_nearest(name, CORPORA)}")
    return CORPORA[name]


def in_languages(sources: list[Source], languages: list[str]) -> list[Source]:
    """The sources in folders with exactly these names. Raises UserError, with the nearest name, if a folder is missing."""
    folders = {PurePosixPath(source.path).parent.name for source in sources}
    for language in languages:
        if language not in folders:
            raise UserError(f"--languages {language}: there is no folder of that name with data; {_nearest(language, folders)}")
    return [source for source in sources if PurePosixPath(source.path).parent.name in languages]


def _nearest(name: str, known: set[str] | dict[str, Corpus]) -> str:
    near = difflib.get_close_matches(name.lower(), known, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
