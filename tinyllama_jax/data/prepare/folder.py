"""The output folder of data preparation: begins, locks, resumes and finishes it."""

import concurrent.futures
import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tinyllama_jax.base import store
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.store import Place, Remote
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import MANIFEST, Record, read_manifest
from tinyllama_jax.data.prepare import shards
from tinyllama_jax.data.prepare.inputs import Source
from tinyllama_jax.data.prepare.shards import HELD_OUT, Job, Shard


def partial_of(output: Place) -> Place:
    """DIR.partial. Raises UserError if `output` cannot be a folder."""
    if isinstance(output, Remote):
        return output.with_name(output.name + ".partial")
    whole = Path(os.path.abspath(output))
    if output.is_file() or not whole.name:
        raise UserError(f"--output {output}: must be a new folder")
    return whole.with_name(whole.name + ".partial")


def check_keep(keep: Place | None, output: Place, partial: Place, inputs: tuple[str | Path, ...]) -> None:
    """Raises UserError if --keep-dropped lies within the output or an input."""
    if isinstance(keep, Path):
        for folder in (output, partial, *inputs):
            if "://" not in str(folder) and Path(os.path.abspath(keep)).is_relative_to(os.path.abspath(folder)):
                raise UserError(f"--keep-dropped {keep}: lies within {folder}; choose a folder outside")


def is_half(output: Place, partial: Place) -> bool:
    """Whether `output` is half made, where no rename is possible: it has files of ours, but no manifest yet."""
    ours = ("blocks-", "tokenizer", "features.json", "dataset_info.json")
    listed = store.names(output, folders=True)
    if isinstance(output, Path) and not all(name.startswith(ours) for name in listed):
        return False
    return MANIFEST not in listed and "settings.json" in store.names(partial)


def complete(output: Place, wanted: dict, sources: dict[str, list[Source]]) -> dict:
    """The manifest of the complete data set in `output`. Raises UserError if it was made with other settings or inputs."""
    if isinstance(output, Remote) and MANIFEST not in store.names(output):
        raise UserError(f"{output}: holds something that this command did not make; choose another --output")
    with store.local_copy(output, MANIFEST) as folder:
        manifest, _ = read_manifest(folder)
    made = store.modified_ns(output / MANIFEST)
    files = {split: counts["sources"] + counts.get("bad_files", []) for split, counts in manifest["splits"].items()}
    prepared = {split: {file["file"]: file["bytes"] for file in named} for split, named in files.items() if named}
    asked = {split: {source.name: source.size for source in present} for split, present in sources.items()}
    _same(output, {**{k: manifest.get(k) for k in wanted}, **prepared}, {**wanted, **asked})
    for split, present in sources.items():
        checksums = {file["file"]: file.get("sha256") for file in files[split]}  # a bad file has none
        for source in present:
            if source.mtime_ns > made and source.sha256() != checksums[source.name]:
                raise UserError(f"{output}: was prepared before {source.path} changed; choose another --output, or delete it")
    return manifest


def _same(folder: Place, old_settings: dict, new_settings: dict) -> None:
    """Raises UserError naming the first setting that has changed since `folder` was made."""
    for key in new_settings | old_settings:
        old, new = old_settings.get(key), new_settings.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            inner = next(k for k in old | new if old.get(k) != new.get(k))
            key, old, new = f"{key}: {inner}", old.get(inner), new.get(inner)
        old, new = ("absent" if value is None else "none" if value == "" else value for value in (old, new))
        old = old if str(old).isprintable() else repr(old)  # the folder's settings.json may be damaged
        raise UserError(
            f"{folder}: was made with other settings: {key} was {old}, now {new}; choose another --output, or delete it"
        )


def is_ours(partial: Place) -> bool:
    """Whether this module made the folder, or may use it: it has settings.json, or holds no names but ours."""
    names = store.names(partial, folders=True)
    return "settings.json" in names or all(
        name.startswith(("settings.json", "lock", "done", "failed", "whole", "looked", "copies", "numbers.json"))
        for name in names
    )


def begin(job: Job, wanted: dict, spm: tokenizer_lib.Tokenizer) -> None:
    """Makes DIR.partial ready. Raises UserError if it was made with other settings."""
    partial, whole = job.folder, job.whole
    settings = partial / "settings.json"
    if not is_ours(partial):
        raise UserError(f"{partial}: is in the way, and was not made by this command; move it or choose another --output")
    for name in store.names(partial):
        if name.startswith(("blocks-", "dropped-", "settings.json.", "numbers.json", "log")):
            store.remove(partial / name)  # left by a killed worker
    if "settings.json" in store.names(partial):
        _same(partial, shards.record(settings, dict[str, typing.Any]), wanted)
    else:  # written first, so that the folder is known as ours
        _dropped(job, set())
        store.write(settings, json.dumps(wanted))
        if isinstance(settings, Path):
            _sync(settings)
    store.remove(partial / "failed")
    passes = ("looked", "copies", "done") if job.cleaning.dedup else ("done",)
    for folder in (job.failed, whole, *(partial / name for name in passes)):
        store.make_folder(folder)
    with tempfile.TemporaryDirectory() as folder:
        spm.save(Path(folder, "tokenizer"))
        store.copy(Path(folder, "tokenizer"), whole / "tokenizer")


def unmade(job: Job, planned: list[Shard]) -> list[Shard]:
    """The shards that are still to be made; those whose input files have changed (repaired, for example) are made again."""
    dropped = _dropped(job, {shards.dropped_file(shard) for shard in planned})
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        made = [s for s, is_made in zip(planned, pool.map(lambda s: _is_made(job, s), planned), strict=True) if is_made]
    if job.cleaning.keep:
        store.make_folder(job.cleaning.keep)
        made = [shard for shard in made if shards.dropped_file(shard) in dropped]
    kept = {name for shard in made for name in (*shard.files().values(), f"{shard.file}.json")}
    for folder in (job.records, job.whole):
        for name in store.names(folder) - kept:
            store.remove(folder / name)
    return [shard for shard in planned if shard.file not in kept]


def _dropped(job: Job, own: set[str]) -> set[str]:
    """Names of the files in --keep-dropped. Raises UserError if it holds any that is not in `own`."""
    listed = store.names(job.cleaning.keep, folders=True) if job.cleaning.keep else set()
    if others := sorted(listed - own):
        raise UserError(f"--keep-dropped {job.cleaning.keep}: holds {others[0]}, not from this job; choose a new folder")
    return listed


def _is_made(job: Job, shard: Shard) -> bool:
    """Whether an earlier run made exactly this shard, and its files are complete."""
    files = shards.made(job.records, shard).get("files", {}).values()
    return bool(files) and all(store.is_whole(job.whole / file["file"], file["bytes"], file["sha256"]) for file in files)


def records_of(job: Job, planned: list[Shard]) -> dict[str, dict]:
    """File of each shard -> its record, which is empty if the shard has not been made."""
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        loaded = pool.map(lambda shard: shards.made(job.records, shard), planned)
        return {shard.file: record for shard, record in zip(planned, loaded, strict=True)}


def bad_files_of(planned: list[Shard], records: dict[str, dict]) -> dict[tuple[str, str], list]:
    """(split, name) -> [where the first bad piece begins, why], for all files that could not be read."""
    bad: dict[tuple[str, str], list] = {}
    for shard in planned:
        for name, reason in records[shard.file]["bad"].items():
            bad[shard.split, name] = min(reason, bad.get((shard.split, name), reason))
    return bad


@contextlib.contextmanager
def lock(partial: Place) -> Iterator[None]:
    """Keeps a second command out of DIR.partial. The kernel releases the lock when the process ends, however it ends.

    An object store has no locks: two commands with one output write the same bytes there, and one may fail at the end.
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


def _hold_out(job: Job, planned: list[Shard], records: dict[str, dict]) -> int:
    """If all documents fell into one split, holds out the last blocks instead; returns how many, else 0."""
    sides: Counter[str] = Counter()
    for shard in planned:
        for split, file in records[shard.file]["files"].items():
            sides[split] += file["blocks"]
            sides[f"documents {split}"] += file["documents"]
    total = sum(sides[split] for split in ("train", HELD_OUT))
    if not job.held_out or total < 2 or (sides["documents train"] and sides[f"documents {HELD_OUT}"]):
        return 0
    left = n = min(max(round(job.held_out * total), 1), total - 1)
    for shard in reversed(planned):
        files = records[shard.file]["files"]
        n_blocks = min(left, sum(file["blocks"] for file in files.values()))
        if n_blocks != files[HELD_OUT]["blocks"]:
            records[shard.file] = shards.hold_out(job, shard, n_blocks)
        left -= n_blocks
    return n


def finish(
    output: Place, job: Job, wanted: dict, sources: dict[str, list[Source]], planned: list[Shard], unplanned: dict
) -> dict:
    """Writes the manifest and TFDS's metadata, and moves everything to its place. `unplanned`: bad files in no shard."""
    whole, splits = job.whole, {}
    records = records_of(job, planned)
    last = _hold_out(job, planned, records)
    bad = unplanned | {key: why for key, (_, why) in bad_files_of(planned, records).items()}
    for split in dict.fromkeys([*sources, *([HELD_OUT] if wanted["held_out"] else [])]):
        files = [file for shard in planned if (file := records[shard.file]["files"].get(split))]
        made = [records[shard.file] for shard in planned if shard.split == split]
        counts = {key: sum(file[key] for file in files) for key in ("documents", "empty_documents", "tokens", "blocks")}
        if last:  # both splits hold blocks of the same documents
            every = [file for shard in planned for file in records[shard.file]["files"].values()] if split in sources else []
            counts |= {key: sum(file[key] for file in every) for key in ("documents", "empty_documents")}
        if not counts["blocks"] and split not in sources:  # a small input: no document fell into this split
            for file in files:
                store.remove(whole / file["file"])
            continue
        if not counts["blocks"]:
            n = sum(file["documents"] for record in made for file in record["files"].values())
            why = "; its only block was held out: give --held-out 0" if n else ""
            n = sum(sum(record["dropped"].values()) for record in made)
            why += f"; {n} documents were dropped" if n else ""
            raise UserError(f"--{split}: there is no text in its {len(sources[split])} files{why}")
        checksums = {name: checksum for record in made for name, checksum in record["sources"].items()}
        named, left_out = [], []
        for source in sources.get(split, ()):
            if why := bad.get((split, source.name)):
                left_out.append({"file": source.name, "bytes": source.size, "reason": why})
            else:
                named.append({"file": source.name, "bytes": source.size, "sha256": checksums[source.name]})
        entries = [{key: file[key] for key in ("file", "blocks", "tokens", "bytes", "sha256")} for file in files]
        sums = {key: sum((Counter(record[key]) for record in made), Counter()) for key in ("dropped", "scrubbed")}
        counts |= {key: dict(sorted(total.items())) for key, total in sums.items()}
        counts |= {"last_blocks_of_train": last} if last and split == HELD_OUT else {}
        splits[split] = {**counts, "shards": entries, "sources": named, "bad_files": left_out}
    manifest = {**wanted, "splits": splits}
    features = Record(wanted["seq_len"], wanted["dtype"]).features
    write_metadata(whole, features, {split: counts["shards"] for split, counts in splits.items()})
    store.write(whole / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    if isinstance(whole, Path):
        with concurrent.futures.ThreadPoolExecutor(32) as pool:  # many files at once take a disk no longer than one
            list(pool.map(_sync, [file for file in whole.rglob("*") if file.is_file()]))
        _move(whole, output)
    store.remove(job.folder)
    return manifest


def write_metadata(whole: Place, features: object, splits: dict[str, list[dict]]) -> None:
    """Writes what TensorFlow Datasets needs to read the folder. `splits`: the manifest's files of each split."""
    import tensorflow_datasets as tfds  # see `Record`

    infos = []
    with tempfile.TemporaryDirectory() as folder:
        for split, entries in splits.items():
            size, lengths = sum(entry["bytes"] for entry in entries), [entry["blocks"] for entry in entries]
            infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
        data = [Path(folder, file["file"]) for entries in splits.values() for file in entries]
        for file in data:
            file.touch()  # `write_metadata` reads the files' names
        tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=infos, check_data=False)
        for file in data:
            file.unlink()
        store.copy(Path(folder), whole)


def _move(whole: Path, output: Path) -> None:
    """Renames `whole` to `output`; moves the files into it if it is a mount, or has a file manager's files."""
    if not output.exists() or not os.listdir(output):
        with contextlib.suppress(OSError):  # a mount
            os.rename(whole, output)
            return
    for name in sorted(os.listdir(whole), key=lambda name: (name == MANIFEST, name)):
        if (output / name).is_dir():  # left by a move that was killed
            shutil.rmtree(output / name)
        shutil.move(whole / name, output / name)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
