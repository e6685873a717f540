"""Raw text to blocks of S+1 tokens: one Apache Beam pipeline that can be stopped and run again.

    python -m tinyllama_jax.data.prepare --train FILES --tokenizer FILE --output DIR --seq-len 2048

The unit of work is a shard: a list of pieces of the input files, planned from their names and sizes before anything runs, so
that the output does not depend on who does the work. Everything is made in DIR.partial, which becomes DIR when it is whole:

DIR.partial/settings.json   what was asked for              DIR.partial/done/     counts of each finished shard
DIR.partial/failed/         what stopped the last run       DIR.partial/whole/    what becomes DIR
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fcntl
import functools
import itertools
import json
import logging
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import rich.console
import rich.progress

from tinyllama_jax.config import UserError, read_json, run_main
from tinyllama_jax.data import corpora, documents, inputs, shards
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import FORMAT, MANIFEST, Record, read_manifest
from tinyllama_jax.data.inputs import Source
from tinyllama_jax.data.shards import HELD_OUT, Job, Shard

RECORD = ("identity", "files", "dropped", "sources", "bad")  # what there is in DIR.partial/done
SHARD = 1 << 20, 1 << 30  # least and most bytes of text in a shard if --shard-mb does not say; between, 1/1024 of the input


def plan(
    sources: dict[str, list[Source]], text_key: str, shard_mb: int, held_out: bool = False, bad: dict | None = None
) -> list[Shard]:
    """The shards. A function of the arguments and of the files' names, sizes and row groups alone.

    `held_out`: whether each has a file for what is held out too. `bad`: if it is given, a file that cannot be planned for is
    put there, (split, name) -> why, and is in no shard.
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
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # parquet files far away take a while to answer
        units = {each: found for each, found in zip(every, pool.map(weights, every), strict=True) if found is not None}
    total = sum(map(sum, units.values()))
    # a power of two, so that it stays when a file is mended
    target = shard_mb << 20 if shard_mb else min(max(1 << (total // 1024).bit_length(), SHARD[0]), SHARD[1])
    planned = []
    for split in sources:
        mine = {source: weights for (of, source), weights in units.items() if of == split}
        pieces = [piece for source, weights in mine.items() for piece in documents.pieces(source, weights, target)]
        spans = documents.spans([piece.weight for piece in pieces], target)
        hashed = set()
        for i, span in enumerate(spans):
            these = pieces[slice(*span)]
            first = [s for s in dict.fromkeys(piece.source for piece in these) if s not in hashed]
            hashed.update(first)
            name, other = (f"blocks-{of}.array_record-{i:05d}-of-{len(spans):05d}" for of in (split, HELD_OUT))
            planned.append(Shard(split, name, these, first, other if held_out else "", None if bad is None else {}))
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
    workers: int = 0,
    beam_options: list[str] = (),
) -> dict:
    """Makes the folder `output` as the command line of this module does, and returns its manifest.

    `corpus`: one of `corpora.CORPORA`, which says what `text_key` is and what is left out; `languages`: of it, these folders.
    `held_out`: fraction of the documents that go to the split "validation" (0.01, and 0 if `validation` is given).
    `bad_files`: "skip" leaves out files that cannot be read, wholly, and lists them in the manifest; "stop" is an error.
    `shard_mb`: MiB of text that make a file; 0: chosen by the size of the input. `workers`: processes on this machine; 0: one
    for each processor. `beam_options`: if any, the pipeline runs where they say, and all machines must see the same files.
    Raises UserError, and OSError from the file system. What was finished by then is kept for the next call.
    """
    output = Path(output)
    whole = Path(os.path.abspath(output))
    if output.is_file() or not whole.name:
        raise UserError(f"--output {output}: must be a new folder")
    partial = whole.with_name(whole.name + ".partial")
    spm = tokenizer_lib.load(tokenizer)
    dtype = "uint16" if spm.vocab_size <= 1 << 16 else "int32"
    if seq_len < 1 or shard_mb < 0 or workers < 0:
        raise UserError(f"--seq-len {seq_len} --shard-mb {shard_mb} --workers {workers}: must be positive")
    for option, on, id_ in (("bos", bos, spm.bos_id), ("eos", eos, spm.eos_id)):
        if on and id_ < 0:
            raise UserError(f"--{option}: {spm.path} has no {option} token; say --no-{option}")
    held_out = (0.0 if validation else 0.01) if held_out is None else float(held_out)
    if not 0 <= held_out < 1:
        raise UserError(f"--held-out {held_out:g}: is a fraction of the documents, at least 0 and less than 1; 0.01 is 1%")
    if held_out and validation:
        raise UserError(f"--held-out {held_out:g}: documents are held out of --train if there is no --validation; give one")
    if bad_files not in ("stop", "skip"):
        raise UserError(f"--bad-files {bad_files}: must be stop or skip")
    preset = corpora.known(corpus) if corpus else None
    text_key = text_key or (preset.text_key if preset else "text")
    for path in (*train, *validation):
        if partial.is_relative_to(os.path.abspath(path)):
            raise UserError(f"--output {output}: lies within the input {path}; choose a folder outside")
    sources = _find({"train": train, "validation": validation}, preset, languages, data_dir)
    for source in itertools.chain(*sources.values()):
        if any(Path(source.path).is_relative_to(folder) for folder in (whole, partial)):
            raise UserError(f"--output {output}: the input {source.path} lies in it; choose a folder outside")
    settings = {"seq_len": seq_len, "dtype": dtype, "bos": bos, "eos": eos, "text_key": text_key, "shard_mb": shard_mb}
    settings |= {"corpus": corpus, "held_out": held_out}
    vocabulary = {"sha256": spm.sha256, "vocab_size": spm.vocab_size, "bos_id": spm.bos_id, "eos_id": spm.eos_id}
    wanted = {"format": FORMAT, **settings, "tokenizer": vocabulary}
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        manifest = _complete(output, wanted, sources)
        if partial.is_dir() and _is_ours(partial):
            shutil.rmtree(partial, ignore_errors=True)  # there if a kill came between the last two lines of `_finish`
        print(f"{output}: complete already, nothing to do")
        return manifest
    started = time.monotonic()
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has no affinity
    bad = {} if bad_files == "skip" else None
    planned = plan(sources, text_key, shard_mb, held_out > 0, bad)
    partial.mkdir(parents=True, exist_ok=True)
    with _lock(partial):
        left = _begin(partial, wanted, planned, spm)
        n_before = len(planned) - len(left)
        drop, awaiting = dict(preset.drop) if preset else {}, 0 if beam_options else os.getpid()
        job = Job(partial, spm.sha256, seq_len, dtype, bos, eos, text_key, drop, held_out, awaiting)
        left = left or _again(partial, planned)
        while left:
            with _progress(partial, planned):
                _run(job, left, min(workers or n_cpus, len(left)), list(beam_options))
            left = _again(partial, planned)
        manifest = _finish(output, partial, wanted, sources, planned, bad or {})
    seconds = time.monotonic() - started
    for split, counts in manifest["splits"].items():
        print(f"{output}: {split}: " + ", ".join(f"{counts[k]:,} {k}" for k in ("documents", "tokens", "blocks")))
        for reason, n in counts["dropped"].items():
            print(f"{output}: {split}: {n:,} documents left out: {reason}")
        for file in counts["bad_files"][:3]:
            print(f"{output}: {split}: left out, one of {len(counts['bad_files'])} bad files: {file['reason']}")
    if held_out and HELD_OUT not in manifest["splits"]:
        print(f"{output}: no validation split: none of the few documents falls to the {held_out:g} that are held out")
    print(f"{output}: {len(planned) - n_before} shards in {seconds:.1f} s" + (f" ({n_before} before)" if n_before else ""))
    return manifest


def _find(
    paths: dict[str, list[str | Path]], preset: corpora.Corpus | None, languages: list[str], data_dir: str | Path | None
) -> dict[str, list[Source]]:
    """The files of each split that is given."""
    if languages and not (preset and preset.languages):
        raise UserError(f"--languages {' '.join(languages)}: only --corpus starcoder has a folder for each language")
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


def _complete(output: Path, wanted: dict, sources: dict[str, list[Source]]) -> dict:
    """The manifest of the data set in `output`, if it is the one that is asked for. Raises UserError otherwise."""
    manifest, _ = read_manifest(output)
    made = (output / MANIFEST).stat().st_mtime_ns
    files = {split: counts["sources"] + counts.get("bad_files", []) for split, counts in manifest["splits"].items()}
    there = {split: {file["file"]: file["bytes"] for file in named} for split, named in files.items() if named}
    here = {split: {source.name: source.size for source in found} for split, found in sources.items()}
    _same(output, {**{k: manifest.get(k) for k in wanted}, **there}, {**wanted, **here})
    for split, found in sources.items():
        checksums = {file["file"]: file.get("sha256") for file in files[split]}  # a bad file has none
        for source in found:
            if source.mtime_ns > made and source.sha256() != checksums[source.name]:
                raise UserError(f"{output}: was prepared before {source.path} changed; choose another --output, or delete it")
    return manifest


def _same(folder: Path, there: dict, here: dict) -> None:
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


def _is_ours(partial: Path) -> bool:
    """Whether this module made the folder, or would: it is empty, has its settings, or holds nothing but what it has."""
    names = {file.name for file in partial.iterdir()}
    return "settings.json" in names or all(
        name.startswith(("settings.json", "lock", "done", "failed", "whole")) for name in names
    )


def _begin(partial: Path, wanted: dict, planned: list[Shard], spm: tokenizer_lib.Tokenizer) -> list[Shard]:
    """Makes DIR.partial ready and returns the shards that are left to make. Raises UserError if it is for something else.

    Shards of files that have changed since (mended, say) are made again; the others are kept.
    """
    settings = partial / "settings.json"
    if not _is_ours(partial):
        raise UserError(f"{partial}: is in the way, and was not made by this command; move it or choose another --output")
    for file in partial.iterdir():
        if file.is_file() and file.name not in ("settings.json", "lock"):
            file.unlink()  # what a killed worker left
    if settings.is_file():
        _same(partial, read_json(settings, *wanted, remedy=f"delete {partial} and run this again"), wanted)
    else:  # before anything else, so that the folder is known as ours
        shards.write(settings, json.dumps(wanted))
        _sync(settings)
    shutil.rmtree(partial / "failed", ignore_errors=True)
    for name in ("failed", "done", "whole"):
        (partial / name).mkdir(exist_ok=True)
    if not (partial / "whole" / "tokenizer").is_dir():
        spm.save(partial / "whole" / "tokenizer")
    made = [shard for shard in planned if _is_made(partial, shard)]
    kept = {name for shard in made for name in (*shard.files().values(), f"{shard.file}.json")}
    for file in [*(partial / "done").iterdir(), *(partial / "whole").iterdir()]:
        if file.is_file() and file.name not in kept:
            file.unlink()
    return [shard for shard in planned if shard.file not in kept]


def _is_made(partial: Path, shard: Shard) -> bool:
    """Whether an earlier run made this very shard, and all of it is there: workers do not wait for the disk."""
    try:
        made = read_json(partial / "done" / f"{shard.file}.json", *RECORD)
        whole = all(shards.sha256(partial / "whole" / file["file"]) == file["sha256"] for file in made["files"].values())
    except (FileNotFoundError, UserError):
        return False
    return whole and made["identity"] == shard.identity() and not (made["bad"] and shard.bad is None)


def _again(partial: Path, planned: list[Shard]) -> list[Shard]:
    """The shards that hold parts of files which turned out bad in other shards; they are to be made again without.

    So a bad file is left out wholly, whatever the shards; and of what is wrong with it, the first is told.
    """
    if not planned or planned[0].bad is None:
        return []
    records = {shard.file: read_json(partial / "done" / f"{shard.file}.json", *RECORD) for shard in planned}
    bad = _bad_files(planned, records)
    left = []
    for shard in planned:
        mine = {p.source.name: bad[shard.split, p.source.name] for p in shard.pieces if (shard.split, p.source.name) in bad}
        if mine.keys() != records[shard.file]["bad"].keys():
            (partial / "done" / f"{shard.file}.json").unlink()
            left.append(shard._replace(bad=mine))
    return left


def _bad_files(planned: list[Shard], records: dict[str, dict]) -> dict[tuple[str, str], list]:
    """(split, name) -> [where the first bad piece begins, why] of all files that could not be read."""
    bad: dict[tuple[str, str], list] = {}
    for shard in planned:
        for name, found in records[shard.file]["bad"].items():
            bad[shard.split, name] = min(found, bad.get((shard.split, name), found))
    return bad


@contextlib.contextmanager
def _lock(partial: Path) -> Iterator[None]:
    """Keeps a second command out of DIR.partial. The kernel gives the lock back when the process ends, however it ends."""
    with open(partial / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{partial}: another command is preparing this; wait for it") from None
        yield


def _run(job: Job, left: list[Shard], workers: int, beam_options: list[str]) -> None:
    """Makes the shards. Raises UserError with what stopped a worker."""
    work = [pickle.dumps(shard) for shard in left]
    try:
        if workers > 1 and not beam_options:
            _run_apart(job, work, workers, {f"{shard.file}.json" for shard in left})
        else:
            with _quiet(not beam_options):
                pipeline(job, work, workers, beam_options)
    except Exception:
        for file in sorted((job.folder / "failed").iterdir()):
            raise UserError(file.read_text(encoding="utf-8").strip()) from None
        raise


def pipeline(job: Job, work: list[bytes], workers: int, beam_options: list[str]) -> None:
    """The Beam pipeline: on this machine in `workers` processes, or where `beam_options` say. Raises whatever Beam does."""
    import apache_beam as beam  # takes a second, and warns of what is not installed
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    runner, options = None, PipelineOptions(beam_options)
    if not beam_options:
        environment = None  # a worker in this process
        if workers > 1:
            failed = shlex.quote(str(job.folder / "failed" / "worker"))
            environment = SubprocessSDKEnvironment.from_command_string(
                f"{shlex.quote(sys.executable)} -m apache_beam.runners.worker.sdk_worker_main || "
                f"echo a worker process died with exit code $?: out of memory, or killed > {failed}"
            )
        # not "DirectRunner", which first tries to download another one
        runner, options = FnApiRunner(environment), PipelineOptions([], direct_num_workers=workers)
    with beam.Pipeline(runner, options) as p:
        _ = p | beam.Create(work) | beam.Reshuffle() | beam.Map(functools.partial(shards.make, job))


def _run_apart(job: Job, work: list[bytes], workers: int, awaited: set[str]) -> None:
    """`pipeline` in a process of its own: Beam would wait for ever for a worker that died, and survive Ctrl-C.

    Ends as soon as all files of the names `awaited` are in DIR.partial/done.
    """
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    start = "import pickle, sys, tinyllama_jax.data.prepare as m; m.pipeline(*pickle.load(sys.stdin.buffer))"
    log = job.folder / "workers.log"
    with open(log, "wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-c", start],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        with child.stdin:
            pickle.dump((job, work, workers, []), child.stdin)
        import tensorflow_datasets  # noqa: F401  `_finish` wants it: now, while there is nothing to do but wait

        while True:
            ended = child.poll() is not None
            if awaited.issubset(os.listdir(job.folder / "done")):
                break
            if ended or any((job.folder / "failed").iterdir()):
                raise RuntimeError(f"the pipeline failed:\n{log.read_text(errors='replace')[-4_000:]}")
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # nothing is lost: files appear when they are whole
        child.wait()


@contextlib.contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Keeps what Beam logs off the terminal, without touching where an application sends its own logs."""
    root, silent = logging.getLogger(), logging.NullHandler()
    level = logging.getLogger("apache_beam").level
    if quiet:
        root.addHandler(silent)  # with no handler at all, the first message would add one that writes to the terminal
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        if quiet:
            root.removeHandler(silent)
            logging.getLogger("apache_beam").setLevel(level)


@contextlib.contextmanager
def _progress(partial: Path, planned: list[Shard]) -> Iterator[None]:
    """A line on the terminal, if there is one, that counts finished shards by the text in them."""
    weights = {f"{shard.file}.json": sum(piece.weight for piece in shard.pieces) for shard in planned}
    console = rich.console.Console(stderr=True)
    stop = threading.Event()
    with rich.progress.Progress(
        "tokenising",
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=sum(weights.values()))

        def watch():
            while not stop.wait(0.5):
                progress.update(task, completed=sum(weights.get(name, 0) for name in os.listdir(partial / "done")))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _finish(
    output: Path, partial: Path, wanted: dict, sources: dict[str, list[Source]], planned: list[Shard], unplanned: dict
) -> dict:
    """Writes what describes the data, and moves all to its place. `unplanned`: bad files that are in no shard."""
    import tensorflow_datasets as tfds  # see `Record`

    whole, splits, infos = partial / "whole", {}, []
    records = {shard.file: json.loads((partial / "done" / f"{shard.file}.json").read_text()) for shard in planned}
    bad = unplanned | {key: why for key, (_, why) in _bad_files(planned, records).items()}
    for split in dict.fromkeys([*sources, *([HELD_OUT] if wanted["held_out"] else [])]):
        files = [file for shard in planned if (file := records[shard.file]["files"].get(split))]
        made = [records[shard.file] for shard in planned if shard.split == split]
        counts = {key: sum(file[key] for file in files) for key in ("documents", "empty_documents", "tokens", "blocks")}
        if not counts["blocks"] and split not in sources:  # a small input: no document fell to it
            for file in files:
                (whole / file["file"]).unlink()
            continue
        if not counts["blocks"]:
            n = sum(file["documents"] for record in made for file in record["files"].values())
            took = f"; all {n} documents were held out: give --held-out 0" if n else ""
            raise UserError(f"--{split}: there is no text in its {len(sources[split])} files{took}")
        checksums = {name: checksum for record in made for name, checksum in record["sources"].items()}
        named, left_out = [], []
        for source in sources.get(split, ()):
            if why := bad.get((split, source.name)):
                left_out.append({"file": source.name, "bytes": source.size, "reason": why})
            else:
                named.append({"file": source.name, "bytes": source.size, "sha256": checksums[source.name]})
        entries = [{key: file[key] for key in ("file", "blocks", "tokens", "bytes", "sha256")} for file in files]
        dropped = dict(sorted(sum((Counter(record["dropped"]) for record in made), Counter()).items()))
        splits[split] = {**counts, "dropped": dropped, "shards": entries, "sources": named, "bad_files": left_out}
        size, lengths = sum(entry["bytes"] for entry in entries), [entry["blocks"] for entry in entries]
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
    manifest = {**wanted, "splits": splits}
    features = Record(wanted["seq_len"], wanted["dtype"]).features
    tfds.folder_dataset.write_metadata(data_dir=whole, features=features, split_infos=infos, check_data=False)
    shards.write(whole / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    with concurrent.futures.ThreadPoolExecutor(32) as pool:  # the disk takes many at once in the time of one
        list(pool.map(_sync, [file for file in whole.rglob("*") if file.is_file()]))
    os.rename(whole, output)
    shutil.rmtree(partial)
    return manifest


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def main(argv: list[str]) -> None:
    """The command line. Options that are not its own go to Beam, which needs --runner among them."""
    parser = argparse.ArgumentParser(
        prog="python -m tinyllama_jax.data.prepare",
        description=f"PATH: a file ({' '.join(inputs.KINDS)}), a folder, which is searched to the bottom, a pattern in "
        "quotes ('data/**/*.txt'), any of these in gs:// or s3://, or tfds:NAME[/CONFIG][:VERSION][:SPLIT]. Options of Apache "
        "Beam, --runner first, make it run elsewhere: on machines that see the same files.",
        allow_abbrev=False,
    )
    parser.add_argument("--train", nargs="+", required=True, metavar="PATH", help="what to train on")
    parser.add_argument("--validation", nargs="+", default=[], metavar="PATH", help="what is held out, if it lies apart")
    parser.add_argument("--held-out", type=float, metavar="F", help="else: fraction held out by a hash of each document (0.01)")
    parser.add_argument("--corpus", default="", metavar="NAME", help=f"how it is stored: {', '.join(corpora.CORPORA)}")
    parser.add_argument("--languages", nargs="+", default=[], metavar="NAME", help="of starcoder: exact names of folders (all)")
    parser.add_argument("--bad-files", default="stop", metavar="stop|skip", help="skip: leave out what cannot be read (stop)")
    parser.add_argument("--data-dir", metavar="DIR", help="where tfds: data sets lie (~/tensorflow_datasets)")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="SentencePiece file, or a folder with a tokenizer")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder")
    parser.add_argument("--seq-len", type=int, required=True, metavar="S", help="positions of a training sequence")
    parser.add_argument("--text-key", default="", metavar="NAME", help="key or column that holds the text (by --corpus; text)")
    parser.add_argument("--bos", action=argparse.BooleanOptionalAction, default=False, help="begin documents with bos (no)")
    parser.add_argument("--eos", action=argparse.BooleanOptionalAction, default=True, help="end documents with eos (yes)")
    parser.add_argument("--shard-mb", type=int, default=0, metavar="N", help="MiB of text in an output file (by the input)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes here (one for each processor)")
    known, rest = parser.parse_known_args(argv)
    if rest and not any(option.startswith("--runner") for option in rest):
        raise UserError(f"{rest[0]}: no such option; see --help")
    prepare(**vars(known), beam_options=rest)


if __name__ == "__main__":
    run_main(main)
