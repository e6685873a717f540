"""Raw text to blocks of S+1 tokens: one Apache Beam pipeline that can be stopped and run again.

    python -m tinyllama_jax.data.prepare --train FILES --validation FILES --tokenizer FILE --output DIR --seq-len 2048

The unit of work is a shard: a list of pieces of the input files, planned from their names and sizes before anything runs, so
that the output does not depend on who does the work. Everything is made in DIR.partial, which becomes DIR when it is whole:

DIR.partial/settings.json   what was asked for              DIR.partial/done/     counts of each finished shard
DIR.partial/failed/         what stopped the last run       DIR.partial/whole/    what becomes DIR

An object store renames nothing: there whole/ is DIR itself from the start, and the manifest, written last, makes it a data set.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fcntl
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from tinyllama_jax.config import UserError, read_json, run_main
from tinyllama_jax.data import documents, runners, shards, store
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import FORMAT, MANIFEST, Record, read_manifest
from tinyllama_jax.data.documents import Source
from tinyllama_jax.data.shards import Job, Shard
from tinyllama_jax.data.store import Place, Remote

SHARD = 1 << 20, 1 << 30  # least and most bytes of text in a shard if --shard-mb does not say; between, 1/1024 of the input


def plan(sources: dict[str, list[Source]], text_key: str, shard_mb: int) -> list[Shard]:
    """The shards. A function of the arguments and of the files' names and sizes alone."""
    units = {source: documents.units(source, text_key) for files in sources.values() for source in files}
    total = sum(map(sum, units.values()))
    # a power of two, so that it stays when a file is mended
    target = shard_mb << 20 if shard_mb else min(max(1 << (total // 1024).bit_length(), SHARD[0]), SHARD[1])
    planned = []
    for split, files in sources.items():
        pieces = [piece for source in files for piece in documents.pieces(source, units[source], target)]
        spans = documents.spans([piece.weight for piece in pieces], target)
        hashed = set()
        for i, span in enumerate(spans):
            mine = pieces[slice(*span)]
            first = [s for s in dict.fromkeys(piece.source for piece in mine) if s not in hashed]
            hashed.update(first)
            planned.append(Shard(split, f"blocks-{split}.array_record-{i:05d}-of-{len(spans):05d}", mine, first))
    return planned


def prepare(
    *,
    train: list[str | Path],
    validation: list[str | Path] = (),
    tokenizer: str | Path,
    output: str | Path,
    seq_len: int,
    text_key: str = "text",
    bos: bool = False,
    eos: bool = True,
    shard_mb: int = 0,
    workers: int = 0,
    runner: str = runners.DIRECT,
    beam_options: list[str] = (),
) -> dict:
    """Makes the folder `output`, here or in an object store, as the command line of this module does; returns its manifest.

    `shard_mb`: MiB of text that make a file; 0: chosen by the size of the input. `workers`: processes on this machine; 0: one
    for each processor. `runner`: one of `runners.RUNNERS`, or Beam's name of one; its machines must all see the same files.
    `beam_options`: its options. Raises UserError, and OSError from the file system. What was finished is kept for a next call.
    """
    output = store.place(output, "--output")
    partial = _partial(output)
    beam_options = runners.options(runner, list(beam_options))
    if beam_options and workers:
        raise UserError(f"--workers {workers}: is for --runner {runners.DIRECT}; {runner} has as many as its cluster gives it")
    spm = tokenizer_lib.load(tokenizer)
    dtype = "uint16" if spm.vocab_size <= 1 << 16 else "int32"
    if seq_len < 1 or shard_mb < 0 or workers < 0:
        raise UserError(f"--seq-len {seq_len} --shard-mb {shard_mb} --workers {workers}: must be positive")
    for option, on, id_ in (("bos", bos, spm.bos_id), ("eos", eos, spm.eos_id)):
        if on and id_ < 0:
            raise UserError(f"--{option}: {spm.path} has no {option} token; say --no-{option}")
    for path in (*train, *validation):
        if isinstance(partial, Path) and partial.is_relative_to(os.path.abspath(path)):
            raise UserError(f"--output {output}: lies within the input {path}; choose a folder outside")
    sources = _find(train, validation)
    settings = {"seq_len": seq_len, "dtype": dtype, "bos": bos, "eos": eos, "text_key": text_key, "shard_mb": shard_mb}
    vocabulary = {"sha256": spm.sha256, "vocab_size": spm.vocab_size, "bos_id": spm.bos_id, "eos_id": spm.eos_id}
    wanted = {"format": FORMAT, **settings, "tokenizer": vocabulary}
    if store.holds_something(output) and not _is_half(output, partial):
        manifest = _complete(output, wanted, sources)
        if _is_ours(partial):
            store.remove(partial)  # there if a kill came between the last two lines of `_finish`
        print(f"{output}: complete already, nothing to do")
        return manifest
    started = time.monotonic()
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has no affinity
    planned = plan(sources, text_key, shard_mb)
    store.make_folder(partial)
    whole = output if isinstance(output, Remote) else partial / "whole"
    main = 0 if beam_options else os.getpid()
    job = Job(partial, whole, uuid.uuid4().hex, spm.sha256, seq_len, dtype, bos, eos, text_key, main)
    with _lock(partial):
        left = _begin(job, wanted, planned, spm)
        with runners.progress(partial, planned):
            if left:
                runners.run(job, left, min(workers or n_cpus, len(left)), beam_options)
        manifest = _finish(output, job, wanted, sources, planned)
    seconds = time.monotonic() - started
    for split, counts in manifest["splits"].items():
        print(f"{output}: {split}: " + ", ".join(f"{counts[k]:,} {k}" for k in ("documents", "tokens", "blocks")))
    before = f" ({len(planned) - len(left)} before)" if len(left) < len(planned) else ""
    print(f"{output}: {len(left)} shards in {seconds:.1f} s{before}")
    return manifest


def _partial(output: Place) -> Place:
    """DIR.partial. Raises UserError if `output` can be no folder."""
    if isinstance(output, Remote):
        return output.with_name(output.name + ".partial")
    whole = Path(os.path.abspath(output))
    if output.is_file() or not whole.name:
        raise UserError(f"--output {output}: must be a new folder")
    return whole.with_name(whole.name + ".partial")


def _is_half(output: Place, partial: Place) -> bool:
    """Whether `output`, in an object store, is being made: of our settings, and still without a manifest."""
    return isinstance(output, Remote) and MANIFEST not in store.names(output) and "settings.json" in store.names(partial)


def _find(train: list[str | Path], validation: list[str | Path]) -> dict[str, list[Source]]:
    sources = {}
    for split, paths in {"train": train, "validation": validation}.items():
        if paths or split == "train":
            sources[split], others = documents.find(paths, f"--{split}")
            if others:
                print(f"--{split}: left out {len(others)} files of other types, such as {others[0]}", file=sys.stderr)
    train_files = {os.path.realpath(source.path) for source in sources["train"]}
    for source in sources.get("validation", ()):
        if os.path.realpath(source.path) in train_files:
            raise UserError(f"--validation: {source.path} is among the files of --train too")
    return sources


def _complete(output: Place, wanted: dict, sources: dict[str, list[Source]]) -> dict:
    """The manifest of the data set in `output`, if it is the one that is asked for. Raises UserError otherwise."""
    if isinstance(output, Remote) and MANIFEST not in store.names(output):
        raise UserError(f"{output}: holds something that this command did not make; choose another --output")
    with store.here(output, MANIFEST) as folder:
        manifest, _ = read_manifest(folder)
    made = store.modified_ns(output / MANIFEST)
    there = {split: {s["file"]: s["bytes"] for s in counts["sources"]} for split, counts in manifest["splits"].items()}
    here = {split: {source.name: source.size for source in files} for split, files in sources.items()}
    _same(output, {**{k: manifest[k] for k in wanted}, **there}, {**wanted, **here})
    for split, files in sources.items():
        checksums = {s["file"]: s["sha256"] for s in manifest["splits"][split]["sources"]}
        for source in files:
            if source.mtime_ns > made and store.sha256(source.path) != checksums[source.name]:
                raise UserError(f"{output}: was prepared before {source.path} changed; choose another --output, or delete it")
    return manifest


def _same(folder: Place, there: dict, here: dict) -> None:
    """Raises UserError naming the first thing in which what `folder` was made for differs from what is asked for now."""
    for key in here | there:
        old, new = there.get(key), here.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            inner = next(k for k in old | new if old.get(k) != new.get(k))
            key, old, new = f"{key}: {inner}", old.get(inner), new.get(inner)
        old, new = ("absent" if value is None else value for value in (old, new))
        raise UserError(
            f"{folder}: was made for something else: {key} was {old}, now {new}; choose another --output, or delete it"
        )


def _is_ours(partial: Place) -> bool:
    """Whether this module made the folder, or would: it is empty, has its settings, or holds nothing but what it has."""
    names = store.names(partial, folders=True)
    return "settings.json" in names or all(
        name.startswith(("settings.json", "lock", "done", "failed", "whole")) for name in names
    )


def _begin(job: Job, wanted: dict, planned: list[Shard], spm: tokenizer_lib.Tokenizer) -> list[Shard]:
    """Makes DIR.partial ready and returns the shards that are left to make. Raises UserError if it is for something else.

    Shards of files that have changed since (mended, say) are made again; the others are kept.
    """
    partial, whole = job.folder, job.whole
    settings = partial / "settings.json"
    if not _is_ours(partial):
        raise UserError(f"{partial}: is in the way, and was not made by this command; move it or choose another --output")
    for name in store.names(partial) - {"settings.json", "lock"}:
        store.remove(partial / name)  # what a killed worker left
    if "settings.json" in store.names(partial):
        with store.here(partial, "settings.json") as folder:
            there = read_json(folder / "settings.json", *wanted, remedy=f"delete {partial} and run this again")
        _same(partial, there, wanted)
    else:  # before anything else, so that the folder is known as ours
        store.write(settings, json.dumps(wanted))
        if isinstance(settings, Path):
            _sync(settings)
    store.remove(partial / "failed")
    for folder in (job.failed, partial / "done", whole):
        store.make_folder(folder)
    with tempfile.TemporaryDirectory() as folder:
        spm.save(Path(folder, "tokenizer"))
        store.copy(Path(folder, "tokenizer"), whole / "tokenizer")
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        made = pool.map(lambda shard: _is_made(job, shard), planned)
        kept = {name for shard, is_ in zip(planned, made, strict=True) if is_ for name in (shard.file, f"{shard.file}.json")}
    for folder in (partial / "done", whole):
        for name in store.names(folder) - kept:
            store.remove(folder / name)
    return [shard for shard in planned if shard.file not in kept]


def _is_made(job: Job, shard: Shard) -> bool:
    """Whether an earlier run made this very shard, and all of it is there."""
    entry = shards.made(job.folder, shard).get("shard")
    return bool(entry) and store.is_whole(job.whole / shard.file, entry["bytes"], entry["sha256"])


@contextlib.contextmanager
def _lock(partial: Place) -> Iterator[None]:
    """Keeps a second command out of DIR.partial. The kernel gives the lock back when the process ends, however it ends.

    An object store has no locks: two commands that make the same there write the same bytes; one of them may fail at the end.
    """
    if isinstance(partial, Remote):
        yield
        return
    with open(partial / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{partial}: another command is preparing this; wait for it") from None
        yield


def _finish(output: Place, job: Job, wanted: dict, sources: dict[str, list[Source]], planned: list[Shard]) -> dict:
    """Writes what describes the data, and moves all to its place."""
    import tensorflow_datasets as tfds  # see `Record`

    whole, splits, infos = job.whole, {}, []
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        records = {r["shard"]["file"]: r for r in pool.map(lambda shard: shards.made(job.folder, shard), planned)}
    for split, files in sources.items():
        made = [records[s.file] for s in planned if s.split == split]
        entries = [m["shard"] for m in made]
        counts = {key: sum(m["counts"][key] for m in made) for key in ("documents", "empty_documents")}
        counts |= {key: sum(entry[key] for entry in entries) for key in ("tokens", "blocks")}
        if not counts["blocks"]:
            raise UserError(f"--{split}: there is no text in its {len(files)} files")
        checksums = {name: checksum for m in made for name, checksum in m["sources"].items()}
        named = [{"file": source.name, "bytes": source.size, "sha256": checksums[source.name]} for source in files]
        splits[split] = {**counts, "shards": entries, "sources": named}
        size, lengths = sum(entry["bytes"] for entry in entries), [entry["blocks"] for entry in entries]
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
    manifest = {**wanted, "splits": splits}
    features = Record(wanted["seq_len"], wanted["dtype"]).features
    with tempfile.TemporaryDirectory() as folder:
        data = [Path(folder, shard.file) for shard in planned]
        for file in data:
            file.touch()  # it looks at their names
        tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=infos, check_data=False)
        for file in data:
            file.unlink()
        store.copy(Path(folder), whole)
    store.write(whole / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    if isinstance(whole, Path):
        with concurrent.futures.ThreadPoolExecutor(32) as pool:  # the disk takes many at once in the time of one
            list(pool.map(_sync, [file for file in whole.rglob("*") if file.is_file()]))
        os.rename(whole, output)
    store.remove(job.folder)
    return manifest


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def main(argv: list[str]) -> None:
    """The command line. Options that are not its own go to Beam, if --runner says that it runs elsewhere."""
    parser = argparse.ArgumentParser(
        prog="python -m tinyllama_jax.data.prepare",
        description=f"Files: {' '.join(documents.KINDS)}; folders are searched to the bottom. With --runner, options of Apache "
        "Beam can follow: see docs/runners.md.",
        allow_abbrev=False,
    )
    parser.add_argument("--train", nargs="+", required=True, metavar="PATH", help="files or folders")
    parser.add_argument("--validation", nargs="+", default=[], metavar="PATH", help="held out; none by default")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="SentencePiece file, or a folder with a tokenizer")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder, here or s3://... gs://...")
    parser.add_argument("--seq-len", type=int, required=True, metavar="S", help="positions of a training sequence")
    parser.add_argument("--text-key", default="text", metavar="NAME", help="key or column that holds the text (text)")
    parser.add_argument("--bos", action=argparse.BooleanOptionalAction, default=False, help="begin documents with bos (no)")
    parser.add_argument("--eos", action=argparse.BooleanOptionalAction, default=True, help="end documents with eos (yes)")
    parser.add_argument("--shard-mb", type=int, default=0, metavar="N", help="MiB of text in an output file (by the input)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes here (one for each processor)")
    parser.add_argument(
        "--runner", default=runners.DIRECT, help=f"{', '.join(runners.RUNNERS)}, or Beam's name of one (direct)"
    )
    known, rest = parser.parse_known_args(argv)
    prepare(**vars(known), beam_options=rest)


if __name__ == "__main__":
    run_main(main)
