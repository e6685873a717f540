"""Turns raw text into blocks of S + 1 tokens, in one Apache Beam pipeline that can be stopped and resumed.

    python -m tinyllama_jax.prepare --train FILES --tokenizer FILE --output DIR --seq-len 2048

The unit of work is a shard: a list of pieces of the input files, planned from their names and sizes before anything runs. So
the output does not depend on which worker makes a shard. Everything is written to DIR.partial:

DIR.partial/settings.json   the settings                    DIR.partial/done/     counts of each finished shard
DIR.partial/failed/         what stopped the last run       DIR.partial/whole/    is renamed to DIR when it is complete

An object store cannot rename: there whole/ is DIR from the start, and the manifest, written last, completes the data set.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from tinyllama_jax.base import store
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.store import Place, Remote
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import FORMAT
from tinyllama_jax.data.prepare import clean, corpora, documents, duplicates, inputs, runners
from tinyllama_jax.data.prepare import folder as folder_lib
from tinyllama_jax.data.prepare import vocabulary as vocabulary_lib
from tinyllama_jax.data.prepare.inputs import Source
from tinyllama_jax.data.prepare.shards import HELD_OUT, MEMORY, Job, Shard

MOST = 1 << 24  # tokens in a block
NOT_TRAIN = ("validation", "valid", "val", "dev", "test")  # usual names of folders of other splits
SHARD = 1 << 20, 1 << 30  # least and most bytes of text in a shard without --shard-mb; between them, 1/1024 of the input


def plan(
    sources: dict[str, list[Source]], text_key: str, shard_mb: int, held_out: bool = False, bad: dict | None = None
) -> list[Shard]:
    """Plans the shards, which depend only on the arguments and the files' names, sizes and row groups.

    `held_out`: whether each shard has a second file for held-out documents. `bad`: if given, a file that cannot be read is left
    out of the shards, and added here: (split, name) -> why.
    """

    def weights(split_and_source: tuple[str, Source]) -> list[int] | None:
        split, source = split_and_source
        try:
            return documents.units(source, text_key)
        except documents.BadFile as error:
            if bad is None:
                raise
            bad[split, source.name] = str(error).replace(source.path, source.name)
            return None

    every = [(split, source) for split, files in sources.items() for source in files]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # remote parquet files take a while to answer
        units = {each: weighed for each, weighed in zip(every, pool.map(weights, every), strict=True) if weighed is not None}
    total = sum(map(sum, units.values()))
    # a power of two, so that it stays the same when a file is repaired
    target = shard_mb << 20 if shard_mb else min(max(1 << (total // 1024).bit_length(), SHARD[0]), SHARD[1])
    planned = []
    for split in sources:
        of_split = {source: weights for (of, source), weights in units.items() if of == split}
        pieces = [piece for source, weights in of_split.items() for piece in documents.pieces(source, weights, target)]
        spans = documents.spans([piece.weight for piece in pieces], target)
        hashed = set()
        for i, span in enumerate(spans):
            of_shard = pieces[slice(*span)]
            first = [s for s in dict.fromkeys(piece.source for piece in of_shard) if s not in hashed]
            hashed.update(first)
            name, other = (f"blocks-{of}.array_record-{i:05d}-of-{len(spans):05d}" for of in (split, HELD_OUT))
            planned.append(Shard(split, name, of_shard, first, other if held_out else "", None if bad is None else {}))
    return planned


def prepare(
    *,
    train: list[str | Path],
    validation: list[str | Path] = (),
    tokenizer: str | Path,
    output: str | Path,
    seq_len: int,
    corpus: str = "",
    languages: list[str] = (),
    data_dir: str | Path | None = None,
    held_out: float | None = None,
    bad_files: str = "stop",
    text_key: str = "",
    bos: bool = False,
    eos: bool = True,
    shard_mb: int = 0,
    filters: list[str] = (),
    dedup: str = "",
    dedup_threshold: float | None = None,
    scrub: list[str] = (),
    keep_dropped: str | Path | None = None,
    workers: int = 0,
    runner: str = runners.DIRECT,
    beam_options: list[str] = (),
) -> dict:
    """Turns text into blocks in the folder `output`, local or in an object store; returns its manifest.

    `corpus`: one of `corpora.CORPORA`, which sets `text_key` and what is left out; `languages`: which of its folders to read.
    `held_out`: fraction of the documents that go to the split "validation" (0.01, and 0 if `validation` is given).
    `bad_files`: "skip" leaves out whole files that cannot be read, and lists them in the manifest; "stop" raises an error.
    `shard_mb`: MiB of text for each file; 0: chosen by the size of the input. `workers`: processes on this machine; 0: one
    for each processor. `runner`: direct, dask, or Beam's name for a runner, whose machines must all see the same files.
    `beam_options`: options of that runner. `filters`, `dedup`, `dedup_threshold`, `scrub`, `keep_dropped`: see clean.py and
    docs/cleaning.md. Raises UserError, and OSError from the file system. The next call resumes from the finished shards.
    """
    for option, words in {"output": [output], "text-key": [text_key], "filter": filters, "scrub": scrub}.items():
        for word in words:  # JSON and the libraries that write there take only UTF-8
            if re.search("[\ud800-\udfff]", str(word)):
                raise UserError(f"--{option} {word}: is not UTF-8; choose another name")
    output = store.place(output, "--output")
    partial = folder_lib.partial_of(output)
    beam_options = runners.options(runner, list(beam_options))
    if beam_options and workers:
        raise UserError(f"--workers {workers}: is for --runner {runners.DIRECT}; with {runner} the cluster decides")
    spm = tokenizer_lib.load(tokenizer)
    dtype = "uint16" if spm.vocab_size <= 1 << 16 else "int32"
    _check_numbers(seq_len, shard_mb, workers)
    _check_edges(spm, bos, eos)
    held_out = _fraction(held_out, validation)
    if bad_files not in ("stop", "skip"):
        raise UserError(f"--bad-files {bad_files}: must be stop or skip")
    preset = corpora.corpus_named(corpus) if corpus else None
    text_key = text_key or (preset.text_key if preset else "text")
    cleaning = clean.parse(filters, scrub, dedup, duplicates.check(dedup, dedup_threshold), keep_dropped)
    folder_lib.check_keep(cleaning.keep, output, partial, (*train, *validation))
    for path in (*train, *validation):
        if isinstance(partial, Path) and partial.is_relative_to(os.path.abspath(path)):
            raise UserError(f"--output {output}: lies within the input {path}; choose a folder outside")
    sources = _find({"train": train, "validation": validation}, preset, languages, data_dir)
    for source in itertools.chain(*sources.values()) if isinstance(output, Path) else ():
        if any(Path(source.path).is_relative_to(folder) for folder in (os.path.abspath(output), partial)):
            raise UserError(f"--output {output}: the input {source.path} lies in it; choose a folder outside")
    settings = {"seq_len": seq_len, "dtype": dtype, "bos": bos, "eos": eos, "text_key": text_key, "shard_mb": shard_mb}
    settings |= {"corpus": corpus, "held_out": held_out, "cleaning": cleaning.settings()}
    vocabulary = {"sha256": spm.sha256, "vocab_size": spm.vocab_size, "bos_id": spm.bos_id, "eos_id": spm.eos_id}
    wanted = {"format": FORMAT, **settings, "tokenizer": vocabulary}
    if store.holds_something(output) and not folder_lib.is_half(output, partial):
        return _complete_already(output, partial, wanted, sources, bad_files)
    _warn(spm, sources["train"], text_key)
    bad = {} if bad_files == "skip" else None
    planned = plan(sources, text_key, shard_mb, held_out > 0, bad)
    store.make_folder(partial)
    whole = output if isinstance(output, Remote) else partial / "whole"
    drop = dict(preset.drop) if preset else {}
    job = Job(partial, whole, uuid.uuid4().hex, spm.sha256, seq_len, dtype, bos, eos, text_key, drop, held_out, cleaning)
    print(f"{output}: a worker takes at most {MEMORY >> 30} GiB of memory", flush=True)
    return _execute(output, job, wanted, spm, sources, planned, bad or {}, workers, beam_options)


def _check_numbers(seq_len: int, shard_mb: int, workers: int) -> None:
    limits = ("seq-len", seq_len, 1, MOST), ("shard-mb", shard_mb, 0, 1 << 20), ("workers", workers, 0, 4_096)
    for option, value, least, most in limits:
        if not least <= value <= most:
            raise UserError(f"--{option} {value}: must be from {least} to {most:,}")


def _check_edges(spm: tokenizer_lib.Tokenizer, bos: bool, eos: bool) -> None:
    for option, on, id_ in (("bos", bos, spm.bos_id), ("eos", eos, spm.eos_id)):
        if on and id_ < 0:
            raise UserError(f"--{option}: {spm.path} has no {option} token; say --no-{option}")


def _fraction(held_out: float | None, validation: list[str | Path]) -> float:
    """The fraction of documents to hold out. Raises UserError."""
    fraction = (0.0 if validation else 0.01) if held_out is None else float(held_out)
    if not 0 <= fraction < 1:
        raise UserError(f"--held-out {fraction:g}: is a fraction of the documents, at least 0 and less than 1; 0.01 is 1%")
    if fraction and validation:
        raise UserError(f"--held-out {fraction:g}: documents are held out of --train if there is no --validation; give one")
    return fraction


def _complete_already(output: Place, partial: Place, wanted: dict, sources: dict[str, list[Source]], bad_files: str) -> dict:
    """The manifest of a complete data set. Raises UserError if it was made for something else."""
    manifest = folder_lib.complete(output, wanted, sources)
    if folder_lib.is_ours(partial):
        store.remove(partial)  # left by a kill just before the end of `folder.finish`
    if bad_files == "stop" and (left_out := [f for counts in manifest["splits"].values() for f in counts["bad_files"]]):
        what = f"{len(left_out)} bad files, such as {left_out[0]['file']}"
        raise UserError(f"{output}: was prepared without {what}; say --bad-files=skip too, or choose another --output")
    print(f"{output}: complete already, nothing to do")
    return manifest


def _warn(spm: tokenizer_lib.Tokenizer, train: list[Source], text_key: str) -> None:
    """Warns of folders that look like other splits, and of what the tokenizer loses."""
    others = {part for source in train for part in source.name.split("/")[:-1] if part.lower() in NOT_TRAIN}
    if others:
        what = f"holds folders named {', '.join(sorted(others))}, which are trained on"
        print(f"--train: warning: {what}; a pattern such as '*/train' leaves them out", file=sys.stderr)
    for line in vocabulary_lib.warnings(spm, train, text_key):
        print(line, file=sys.stderr)


def _execute(
    output: Place,
    job: Job,
    wanted: dict,
    spm: tokenizer_lib.Tokenizer,
    sources: dict[str, list[Source]],
    planned: list[Shard],
    bad: dict,
    workers: int,
    beam_options: list[str],
) -> dict:
    """Makes the shards that are not made yet, then finishes the data set; returns its manifest."""
    started = time.monotonic()
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has no affinity

    def run(job: Job, left: list[Shard]) -> None:
        while left:
            with runners.progress(job, planned):
                runners.run(job, left, min(workers or n_cpus, len(left)), beam_options)
            left = _again(job, planned)

    with folder_lib.lock(job.folder):
        folder_lib.begin(job, wanted, spm)
        if job.cleaning.dedup:
            planned = _find_copies(job, planned, run)
        left = folder_lib.unmade(job, planned)
        n_before = len(planned) - len(left)
        run(job, left or _again(job, planned))
        manifest = folder_lib.finish(output, job, wanted, sources, planned, bad)
    seconds = time.monotonic() - started
    _say(output, manifest)
    if job.held_out and HELD_OUT not in manifest["splits"]:
        print(f"{output}: no validation split: there is only one block of text; give more text, or --validation")
    print(f"{output}: {len(planned) - n_before} shards in {seconds:.1f} s" + (f" ({n_before} before)" if n_before else ""))
    return manifest


def _say(output: Place, manifest: dict) -> None:
    """Prints the counts of each split."""
    for split, counts in manifest["splits"].items():
        print(f"{output}: {split}: " + ", ".join(f"{counts[k]:,} {k}" for k in ("documents", "tokens", "blocks")))
        if n := counts.get("last_blocks_of_train"):
            print(f"{output}: {split}: too few documents to hold any out; the last {n:,} blocks are held out instead")
        for reason, n in counts["dropped"].items():
            print(f"{output}: {split}: {n:,} documents left out: {reason}")
        for name, n in counts["scrubbed"].items():
            print(f"{output}: {split}: {n:,} replaced: {name}")
        for file in counts["bad_files"][:3]:
            of = f"one of {len(counts['bad_files'])} bad files, which the manifest lists"
            print(f"{output}: {split}: left out, {of}: {file['reason']}")


def _find(
    paths: dict[str, list[str | Path]], preset: corpora.Corpus | None, languages: list[str], data_dir: str | Path | None
) -> dict[str, list[Source]]:
    """The input files of each split that the user gave."""
    if languages and not (preset and preset.languages):
        raise UserError(f"--languages {' '.join(languages)}: only --corpus starcoder has a folder for each language")
    if data_dir and not any(str(path).startswith("tfds:") for path in itertools.chain(*paths.values())):
        raise UserError(f"--data-dir {data_dir}: is for tfds:NAME, and no path is one")
    kinds = preset.kinds if preset else inputs.KINDS
    sources: dict[str, list[Source]] = {}
    for split in ("train", *(["validation"] if paths["validation"] else [])):
        sources[split], others = inputs.find(paths[split], f"--{split}", kinds, data_dir)
        if others:
            print(f"--{split}: left out {len(others)} files of other types, such as {others[0]}", file=sys.stderr)
        if languages:
            sources[split] = corpora.in_languages(sources[split], languages)
    train_files = {os.path.realpath(source.path) for source in sources["train"]}
    for source in sources.get("validation", ()):
        if os.path.realpath(source.path) in train_files:
            raise UserError(f"--validation: {source.path} is among the files of --train too")
    return sources


def _find_copies(job: Job, planned: list[Shard], run: Callable[[Job, list[Shard]], None]) -> list[Shard]:
    """Lists what is dropped of each shard (see duplicates.py); returns the shards with the hashes of their lists."""
    looking = dataclasses.replace(job, stage="looked")
    kept = {file for file, record in folder_lib.records_of(looking, planned).items() if record}
    for name in store.names(looking.records):
        if name.rpartition(".")[0] not in kept:
            store.remove(looking.records / name)
    left = [shard for shard in planned if shard.file not in kept]
    run(looking, left or _again(looking, planned))
    records = folder_lib.records_of(looking, planned)
    planned = [s if s.bad is None else s._replace(bad=records[s.file]["bad"]) for s in planned]
    plan = hashlib.sha256(json.dumps([[shard.identity(), sorted(shard.bad or ())] for shard in planned]).encode()).hexdigest()
    store.write(job.folder / duplicates.NUMBERS, json.dumps(duplicates.numbers(planned, records)))
    comparing = dataclasses.replace(job, stage="copies", shards=tuple(shard.file for shard in planned), plan=plan)
    if not all(duplicates.dropped_of(comparing, shard) is not None for shard in planned):
        store.remove(comparing.records)
        store.make_folder(comparing.records)
        run(comparing, planned)
    lists = [json.dumps(duplicates.dropped_of(comparing, shard)).encode() for shard in planned]
    return [s._replace(copies=hashlib.sha256(list_).hexdigest()) for s, list_ in zip(planned, lists, strict=True)]


def _again(job: Job, planned: list[Shard]) -> list[Shard]:
    """The shards that must be made again without a file that turned out to be bad in another shard.

    So a bad file is left out as a whole, however it is cut into shards, and its first fault is the one reported.
    """
    if not planned or planned[0].bad is None or job.stage == "copies":
        return []
    records = folder_lib.records_of(job, planned)
    bad = folder_lib.bad_files_of(planned, records)
    left = []
    for shard in planned:
        own = {p.source.name: bad[shard.split, p.source.name] for p in shard.pieces if (shard.split, p.source.name) in bad}
        if own.keys() != records[shard.file]["bad"].keys():
            store.remove(job.records / f"{shard.file}.json")
            left.append(shard._replace(bad=own))
    return left
