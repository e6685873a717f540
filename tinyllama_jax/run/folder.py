"""The run folder: its description, which settings of a run may change, and whether another run has the same past.

RUN/config.json      the resolved configuration          RUN/data.json        hash of each source's manifest
RUN/tokenizer/       the tokenizer of the data           RUN/versions.json    packages, Python, devices
RUN/checkpoints/N/   the state after step N              RUN/metrics.jsonl, RUN/tensorboard/   see metrics.py
RUN/set_aside/N-...  checkpoints no longer used          RUN/events.jsonl     starts, ends and samples: see metrics.py
RUN/processes/       see supervise.py                    RUN/newest.json      the newest step that was saved
RUN/lock             held by process 0 while it trains   RUN/wandb.json       the run at W&B: see metrics.py
RUN/programs.json    which compiled programs trained it  RUN/profile          asks for a profile: see profiler.py
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from tinyllama_jax.base import config as config_lib
from tinyllama_jax.base import mixture_weights, schedule
from tinyllama_jax.base.config import Config, Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import check_utf8, claim, exists, listed, make_folder, read_json, write
from tinyllama_jax.base.mixture_weights import Weight
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import MANIFEST, read_manifest
from tinyllama_jax.data.mixture import Mixture
from tinyllama_jax.run import bucket, cluster, seals
from tinyllama_jax.run.checkpoint import load_config

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "tensorflow-datasets", "sentencepiece",
    "jmp", "chex", "numpy",
)  # fmt: skip
FIXED = (  # a run cannot change these, or its config would no longer describe its past
    "model.n_layers", "model.d_model", "model.n_heads", "model.n_kv_heads", "model.d_ff", "model.vocab_size", "model.seq_len",
    "model.head_dim", "model.rope_theta", "model.rope_scaling", "model.rope_type", "model.norm_eps", "model.precision",
    "train.tokens_per_step", "train.seed", "lora.rank", "lora.alpha", "lora.targets", "lora.base",
)  # fmt: skip
FREE = (  # a change of these is not reported: it changes neither the batches nor, except for rounding, the losses
    "workdir", "data.sources", "data.cache", "data.workers", "data.verify", "data.eval_blocks", "train.spike", "train.give_up",
    "train.wait", "train.seqs_per_device", "mesh.", "log.", "eval.", "checkpoint.", "init.",
    "model.remat", "model.attention", "model.loss_chunk",
)  # fmt: skip


class Source(typing.TypedDict):
    """A source in data.json."""

    path: str
    weight: Weight
    manifest_sha256: str
    bos: bool
    sha256: str | None  # of its files, for LITPKDS files read under `data.verify`; else None


class Versions(typing.TypedDict):
    """versions.json. `before`: earlier versions, each with the last step that ran on it."""

    packages: dict[str, str]
    python: str
    platform: str
    devices: str
    processes: int
    before: typing.NotRequired[list[dict]]


@contextlib.contextmanager
def opened(config: Config, sources: list[dict], tokenizer: Path) -> Iterator[list[str]]:
    """Opens the run folder for training and locks it against other runs. All processes call it; process 0 does the work.

    Yields lines to print. Arguments and errors: see `open_run`, `seals.recover` and `files.claim`.
    """
    run, notes = config.folder, []
    with contextlib.ExitStack() as at_end:
        if jax.process_index() == 0:
            make_folder("--workdir", run, run)
            foreign = any(name != "processes" for name in listed(run))  # `processes` is created before the run folder
            if not foreign or exists(run / "config.json") or exists(run / "lock"):  # else `open_run` rejects the folder
                at_end.callback(os.close, claim(run / "lock", f"{run}: {cluster.BUSY}"))
            notes = open_run(config, sources, tokenizer) + seals.recover(config)
            bucket.push()
        multihost_utils.sync_global_devices("run folder")
        yield notes


def open_run(config: Config, sources: list[dict], tokenizer: Path) -> list[str]:
    """Creates the run folder, or checks that an existing one is of this run; returns lines on what has changed.

    `sources`: for each source, in order, the fields of `Source` besides path and weight. `tokenizer`: the folder or file of
    the data's tokenizer. Raises UserError if the run has another model, other data or other batches.
    """
    run = config.folder
    check_utf8(os.path.abspath(run))
    named = zip(config.data.sources.items(), sources, strict=True)
    data = [{"path": path, "weight": weight, **source} for (path, weight), source in named]
    if steps := seals.steps_in(run):  # a run without a checkpoint has nothing to lose
        notes = check_settings(config) + _check_data(run, config, data, tokenizer, steps[-1])
        if steps[-1] >= config.train.steps and load_config(run).data.skip == config.data.skip:
            return notes  # nothing left to train: the description stays that of the training
    else:
        notes = []
        _create_run(run, config, tokenizer)
    write(run / "data.json", json.dumps(data, indent=2) + "\n")
    notes += _write_versions(run, steps[-1] if steps else 0)
    write(run / "config.json", config_lib.to_json(config))
    return notes


def _create_run(run: Path, config: Config, tokenizer: Path) -> None:
    if config.init.from_ and Path(config.init.from_).resolve() == run.resolve():
        raise UserError(f"--workdir={run}: is also --init.from; name a new folder")
    run.mkdir(parents=True, exist_ok=True)
    seals.start_over(config)
    if exists(run / "config.json"):
        load_config(run)  # raises UserError unless a run wrote it
    elif any((run / name).is_dir() and name != "processes" for name in listed(run)):
        raise UserError(f"--workdir={run}: is not a run folder, and holds other folders; name a new one")
    write(run / "config.json", config_lib.to_json(config))  # marks the folder as a run's
    shutil.rmtree(run / "tokenizer", ignore_errors=True)
    tokenizer_lib.load(tokenizer).save(run / "tokenizer")


def check_settings(config: Config) -> list[str]:
    """Lines on what has changed in the settings of a run that has a checkpoint. Raises UserError if it is another run."""
    run, step = config.folder, seals.steps_in(config.folder)[-1]
    if not seals.has_state(run, step):  # an import
        raise UserError(f"{run}: holds weights only; start from it with --workdir=NEW --init.from={run}")
    return _compare(load_config(run), config, step)


def _check_data(run: Path, config: Config, data: list[dict], tokenizer: Path, step: int) -> list[str]:
    """As `check_settings`, of the data of a run whose newest checkpoint is of `step`."""
    recorded, notes = read_sources(run) or data, []
    if tokenizer_lib.load(run / "tokenizer").sha256 != tokenizer_lib.load(tokenizer).sha256:
        raise UserError(f"--data.sources: were not prepared with the tokenizer of the run in {run}, {run / 'tokenizer'}")
    weights = {s["path"]: s["weight"] for s in recorded}
    before = mixture_weights.sources_text(weights)
    if list(weights.values()) != list(config.data.sources.values()):  # paths may change
        notes.append(f"changed since this run was last started: data.sources from {before}")
    _keep_checksums(recorded, data)
    if not _same_until(recorded, data, config, step):
        what = f"the run in {run} was trained on {before}, and {_other(recorded, data)}"
        remedy = f"give it its own data, or start another run with --workdir=NEW --init.from={run}"
        raise UserError(f"--data.sources: {what} (see {run / 'data.json'}); {remedy}")
    return notes


def _other(recorded: list[Source], data: list[Source]) -> str:
    """How two lists of sources that give other batches differ."""
    for old, new in zip(recorded, data, strict=False):
        if old["manifest_sha256"] != new["manifest_sha256"]:
            before, after = (_files(source["path"]) for source in (old, new))
            files = [name for name in before if after.get(name, before[name]) != before[name]]
            return f"the contents of {', '.join(files)} have changed" if files else f"{new['path']} has other contents"
    return "these are other mixture weights, or fewer sources"


def _files(path: str) -> dict[str, str | None]:
    """Input file -> sha256 of a folder of blocks; none if it is not there, or is of another kind."""
    splits = read_manifest(path)[0]["splits"].values() if (Path(path) / MANIFEST).is_file() else ()
    return {file["file"]: file.get("sha256") for split in splits for file in split["sources"]}


def read_sources(run: Path) -> list[Source] | None:
    """Reads RUN/data.json; None if there is none, as in an import. Raises UserError or OSError if it cannot be read."""
    return read_json(run / "data.json", list[Source]) if exists(run / "data.json") else None


def other_past(origin: Path, step: int, config: Config, sources: list[dict]) -> str | None:
    """The first difference between the run `origin` up to `step` and a run of `config`, or None.

    `sources`: as in `open_run`. Of an import only the schedule is known.
    """
    old, recorded = load_config(origin), read_sources(origin)
    if _until(old, step) != _until(config, step):
        before, after = (schedule.in_steps(c).tokens_after(step) for c in (old, config))
        return f"train.tokens_per_step or train.batch_ramp: {before:,} tokens there, {after:,} here"
    if recorded is None:
        return None
    data = [{"weight": w, **s} for w, s in zip(config.data.sources.values(), sources, strict=True)]
    if not _same_until(recorded, data, config, step):
        return "data.sources: other shares or other contents"
    if (old.train.seed, old.model.seq_len) != (config.train.seed, config.model.seq_len):
        return "train.seed or model.seq_len"
    skip = seals.read_seal(origin / "checkpoints" / str(step))["skip"]
    same = schedule.same_batches(config.data, dataclasses.replace(config.data, skip=skip), step)
    return None if same else f"data.skip: {skip or 'none'} there"


def _keep_checksums(recorded: list[Source], data: list[dict]) -> None:
    """Copies the recorded sha256 of each source into `data`. Raises UserError if a new one was computed and differs."""
    for old, source in zip(recorded, data, strict=False):
        checksum = old["sha256"] if old["manifest_sha256"] == source["manifest_sha256"] else None
        source["sha256"] = source["sha256"] or checksum
        if checksum and source["sha256"] != checksum:
            raise UserError(f"{source['path']}: its files are not those that the run has trained on; restore the old files")


def _until(config: Config, step: int) -> list[tuple[int, int, int]]:
    return [stage for stage in schedule.in_steps(config).stages if stage[0] < step]


def _same_until(recorded: list[dict], data: list[dict], config: Config, step: int) -> bool:
    """Whether two lists of sources give the same batches up to `step`; `data` may have additional sources at its end."""
    contents = [[source["manifest_sha256"] for source in sources] for sources in (recorded, data)]
    old, new = (Mixture([s["weight"] for s in sources], config.model.seq_len) for sources in (recorded, data))
    batches = int(schedule.batch_of(np.int64(step), schedule.left_out(config.data)))
    samples = config.train.tokens_after(batches) // config.model.seq_len
    return contents[1][: len(recorded)] == contents[0] and old.same_until(new, samples)


def _compare(old: Config, new: Config, step: int) -> list[str]:
    """Lines on the settings that have changed. Raises UserError for one that would alter the steps up to `step`."""
    fixed = FIXED if _until(old, step) == _until(new, step) else (*FIXED, "train.batch_ramp")
    for key, (before, after) in _differences(old, new).items():
        if key in fixed:
            remedy = f"restore that value, or start another run with --workdir=NEW (--init.from={new.workdir} for its weights)"
            raise UserError(f"--{key}={after}: the run in {new.workdir} has {before if before != '' else 'none'}; {remedy}")
    return changed(old, new, "this run was last started")


def changed(old: Config, new: Config, since: str) -> list[str]:
    """A line for each changed key that affects training. `since`: a clause for the lines."""
    return [f"changed since {since}: {key} from {a} to {b}" for key, (a, b) in _differences(old, new).items()]


def _differences(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    before, after = config_lib.flat(old), config_lib.flat(new)
    return {k: (before[k], after[k]) for k in before if before[k] != after[k] and not k.startswith(FREE)}


def check_same_model(model: Model, origin_model: Model, origin: str) -> list[str]:
    """Raises UserError naming the first field in which the shapes of two models' weights differ.

    Returns a line for each difference that changes only the mathematics: RoPE (as for a longer context) and eps.
    """
    notes, names = [], [key.removeprefix("model.") for key in FIXED if key.startswith("model.")]
    for name in names:
        own, other = getattr(model, name), getattr(origin_model, name)
        same = own == other or (name == "head_dim" and model.d_head == origin_model.d_head)
        if name in ("seq_len", "precision") or same:
            continue
        if name not in ("rope_theta", "rope_scaling", "rope_type", "norm_eps"):
            raise UserError(f"--model.{name}={own}: {origin} is of a model with {name}={other}")
        notes.append(f"{origin} was trained with model.{name}={other}; here it is {own}")
    return notes


def versions() -> Versions:
    """The packages, Python, platform and devices of this process."""
    devices = jax.devices()
    return {
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
    }


def read_versions(run: Path) -> Versions:
    """Reads the versions that a run was last started on. Raises UserError."""
    return read_json(run / "versions.json", Versions, "delete it: nothing needs it but `replay`")


def version_differences(old: Versions, new: Versions) -> list[str]:
    """The differences between two versions, a few words each."""
    old, new = ({**v, **v["packages"], "packages": None, "before": None} for v in (old, new))
    return [f"{name} {old.get(name)} then, {value} now" for name, value in new.items() if old.get(name) != value]


def _write_versions(run: Path, step: int) -> list[str]:
    """Writes versions.json; if they have changed, keeps the old ones as those up to `step` and returns a line on it."""
    new, changes = versions(), []
    if step and exists(run / "versions.json"):
        old = read_versions(run)
        new["before"], changes = old.pop("before", []), version_differences(old, new)
        new["before"] += [{"until_step": step, **old}] if changes else []
    write(run / "versions.json", json.dumps(new, indent=2) + "\n")
    return [f"packages or devices have changed (see {run / 'versions.json'}): {'; '.join(changes)}"] if changes else []
