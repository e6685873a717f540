"""The run folder: what describes a run, what of it may change, and whether another has its past.

RUN/config.json      the resolved configuration          RUN/data.json        hash of each source's manifest
RUN/tokenizer/       what the data were prepared with    RUN/versions.json    packages, Python, devices
RUN/checkpoints/N/   the state after step N              RUN/metrics.jsonl, RUN/tensorboard/   see metrics.py
RUN/set_aside/N-...  checkpoints no longer used          RUN/newest.json      the newest step that was saved
RUN/processes/       see supervise.py
"""

from __future__ import annotations

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

from tinyllama_jax.base import config as config_lib
from tinyllama_jax.base import schedule
from tinyllama_jax.base.config import Config, Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import check_utf8, claim, listed, read_json, write
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.mixture import Mixture
from tinyllama_jax.run import cluster, seals
from tinyllama_jax.run.checkpoint import load_config

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "array-record",
    "tensorflow-datasets",
    "sentencepiece",
    "jmp",
    "chex",
    "numpy",
)
# What a run cannot change on the way, since its past would no longer be what its config says.
FIXED = (
    "model.n_layers",
    "model.d_model",
    "model.n_heads",
    "model.n_kv_heads",
    "model.d_ff",
    "model.vocab_size",
    "model.seq_len",
    "model.rope_theta",
    "model.rope_scaling",
    "model.norm_eps",
    "model.precision",  # of the parameters' dtype and the loss scale in the state
    "train.tokens_per_step",
    "train.seed",
)
# What changes neither the losses (but for rounding) nor the batches: not worth a word.
FREE = (
    "workdir",
    "data.sources",
    "data.workers",
    "data.verify",
    "data.eval_blocks",
    "train.spike",
    "train.give_up",
    "train.wait",
    "train.seqs_per_device",
    "mesh.",
    "log.",
    "checkpoint.",
    "init.",
    "model.remat",
    "model.attention",
    "model.loss_chunk",
)


Number = int | float


class Source(typing.TypedDict):
    """A source in data.json."""

    path: str
    weight: Number | list[tuple[Number, Number]]
    manifest_sha256: str
    bos: bool
    sha256: str | None  # of its files, for LITPKDS files read under `data.verify`; else None


class Versions(typing.TypedDict):
    """versions.json. `before`: the earlier versions, each with the last step that ran on it."""

    packages: dict[str, str]
    python: str
    platform: str
    devices: str
    processes: int
    before: typing.NotRequired[list[dict]]


@contextlib.contextmanager
def opened(config: Config, sources: list[dict], tokenizer: Path) -> Iterator[list[str]]:
    """Opens the run folder for a run, and keeps others out. All processes call it; process 0 does the work.

    Gives lines to print. Arguments and errors: see `open_run` and `seals.recover`.
    """
    with contextlib.ExitStack() as at_end:
        notes = []
        if jax.process_index() == 0:
            at_end.enter_context(locked(config.workdir))
            notes = open_run(config, sources, tokenizer) + seals.recover(config)
        cluster.barrier("run folder")
        yield notes


@contextlib.contextmanager
def locked(run: str | Path) -> Iterator[None]:
    """Keeps a second run out of a run folder, made if absent: see `files.claim`.

    Raises UserError if there is one. Does nothing in a folder that is not a run's.
    """
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    foreign = any(name != "processes" for name in listed(run))  # `processes` is made before the run folder
    if foreign and not (run / "config.json").is_file() and not (run / "lock").is_file():
        yield
        return
    file = claim(run / "lock", f"{run}: {cluster.BUSY}")
    try:
        yield
    finally:
        os.close(file)


def open_run(config: Config, sources: list[dict], tokenizer: Path) -> list[str]:
    """Makes the run folder, or checks that the one there is of this run; returns lines to print about what changed.

    `sources`: for each, in order, {"manifest_sha256", "bos"}; what data.json says besides path and weight. `tokenizer`: the
    folder or file that the data carry. Raises UserError if the run there has another model, other data or other batches.
    """
    run = Path(config.workdir)
    check_utf8(os.path.abspath(run))
    notes = []
    named = zip(config.data.sources.items(), sources, strict=True)
    data = [{"path": path, "weight": weight, **source} for (path, weight), source in named]
    if steps := seals.steps_in(run):  # a run without a checkpoint has nothing to lose
        if not seals.has_state(run, steps[-1]):  # an import
            raise UserError(f"{run}: holds weights only; start from it with --workdir=NEW --init.from={run}")
        notes = _compare(load_config(run), config, steps[-1])
        described = run / "data.json"
        there = read_json(described, list[Source]) if described.is_file() else data
        ours = [tokenizer_lib.load(folder).sha256 for folder in (run / "tokenizer", tokenizer)]
        if ours[0] != ours[1]:
            raise UserError(f"--data.sources: were not prepared with the tokenizer of the run in {run}, {run / 'tokenizer'}")
        weights = {s["path"]: config_lib.as_weight(s["weight"]) for s in there}
        was = config_lib.sources_text(weights)
        if list(weights.values()) != list(config.data.sources.values()):  # paths may
            notes.append(f"changed since this run was last started: data.sources from {was}")
        _keep_checksums(there, data)
        if not _same_until(there, data, config, steps[-1]):
            raise UserError(
                f"--data.sources: the run in {run} was trained on {was}, and these are other weights or other contents "
                f"(see {run / 'data.json'}); give it its own data, or start another run with --workdir=NEW --init.from={run}"
            )
    else:
        if config.init.from_ and Path(config.init.from_).resolve() == run.resolve():
            raise UserError(f"--workdir={run}: is also --init.from; name a new folder")
        run.mkdir(parents=True, exist_ok=True)
        seals.start_over(config)
        if (run / "config.json").is_file():
            load_config(run)  # refused unless it is one of ours
        if not (run / "config.json").is_file() and any((run / n).is_dir() and n != "processes" for n in listed(run)):
            raise UserError(f"--workdir={run}: is not a run folder, and holds other folders; name a new one")
        write(run / "config.json", config_lib.to_json(config))  # from here on the folder is ours
        shutil.rmtree(run / "tokenizer", ignore_errors=True)
        tokenizer_lib.load(tokenizer).save(run / "tokenizer")
    if steps and steps[-1] >= config.train.steps and load_config(run).data.skip == config.data.skip:
        return notes  # nothing to do: what describes the run is what trained it
    write(run / "data.json", json.dumps(data, indent=2) + "\n")
    notes += _write_versions(run, steps[-1] if steps else 0)
    write(run / "config.json", config_lib.to_json(config))
    return notes


def other_past(origin: Path, step: int, config: Config, sources: list[dict]) -> str | None:
    """In what the run `origin` until `step` is not what `config` would have done, or None. `sources`: as `open_run` takes them.

    Of an import nothing is known but its schedule.
    """
    theirs, described = load_config(origin), origin / "data.json"
    if _until(theirs, step) != _until(config, step):
        then, now = (schedule.in_steps(c).tokens_after(step) for c in (theirs, config))
        return f"train.tokens_per_step or train.batch_ramp: {then:,} tokens there, {now:,} here"
    if not described.is_file():
        return None
    data = [{"weight": w, **s} for w, s in zip(config.data.sources.values(), sources, strict=True)]
    if not _same_until(read_json(described, list[Source]), data, config, step):
        return "data.sources: other shares or other contents"
    if (theirs.train.seed, theirs.model.seq_len) != (config.train.seed, config.model.seq_len):
        return "train.seed or model.seq_len"
    skip = seals.read_seal(origin / "checkpoints" / str(step))["skip"]
    same = schedule.same_batches(config.data, dataclasses.replace(config.data, skip=skip), step)
    return None if same else f"data.skip: {skip or 'none'} there"


def _keep_checksums(there: list[Source], data: list[dict]) -> None:
    """Copies the recorded sha256 of each source into `data`. Raises UserError if a new one was computed and differs."""
    for then, source in zip(there, data, strict=False):
        recorded = then["sha256"] if then["manifest_sha256"] == source["manifest_sha256"] else None
        source["sha256"] = source["sha256"] or recorded
        if recorded and source["sha256"] != recorded:
            raise UserError(f"{source['path']}: its files are not those that the run has trained on; put those back")


def _until(config: Config, step: int) -> list[tuple[int, int, int]]:
    return [stage for stage in schedule.in_steps(config).stages if stage[0] < step]


def _same_until(there: list[dict], data: list[dict], config: Config, step: int) -> bool:
    """Whether the batches until `step` are the same of two sets of sources, of which the second may have more to come."""
    contents = [[source["manifest_sha256"] for source in sources] for sources in (there, data)]
    old, new = (Mixture([config_lib.as_weight(s["weight"]) for s in side], config.model.seq_len) for side in (there, data))
    batches = int(schedule.batch_of(np.int64(step), schedule.left_out(config.data)))
    samples = config.train.tokens_after(batches) // config.model.seq_len
    return contents[1][: len(there)] == contents[0] and old.same_until(new, samples)


def _compare(old: Config, new: Config, step: int) -> list[str]:
    """What has changed since `step`, in lines. Raises UserError if it would change what was done until then."""
    fixed = FIXED if _until(old, step) == _until(new, step) else (*FIXED, "train.batch_ramp")
    for key, (before, after) in _differ(old, new).items():
        if key in fixed:
            raise UserError(
                f"--{key}={after}: the run in {new.workdir} has {before if before != '' else 'none'}; give it back that value, "
                f"or start another run with --workdir=NEW (and --init.from={new.workdir} for its weights)"
            )
    return changed(old, new, "this run was last started")


def changed(old: Config, new: Config, since: str) -> list[str]:
    """A line for each key that has another value `since` then and changes what is trained."""
    return [f"changed since {since}: {key} from {before} to {after}" for key, (before, after) in _differ(old, new).items()]


def _differ(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    before, after = config_lib.flat(old), config_lib.flat(new)
    return {k: (before[k], after[k]) for k in before if before[k] != after[k] and not k.startswith(FREE)}


def check_same_model(ours: Model, theirs: Model, origin: str) -> list[str]:
    """Raises UserError naming the first field in which the shapes of two models' weights differ.

    Returns what differs in the mathematics alone (RoPE, as when the context is made longer, and eps), a line each.
    """
    differ = {}
    for key in FIXED:
        section, _, name = key.partition(".")
        if section == "model" and name not in ("seq_len", "precision") and getattr(ours, name) != getattr(theirs, name):
            differ[name] = (getattr(ours, name), getattr(theirs, name))
    for name, (here, there) in differ.items():
        if name not in ("rope_theta", "rope_scaling", "norm_eps"):
            raise UserError(f"--model.{name}={here}: {origin} is of a model with {name}={there}")
    return [f"{origin} was trained with model.{name}={there}; here it is {here}" for name, (here, there) in differ.items()]


def versions() -> Versions:
    """What the run runs on: packages, Python, platform, devices."""
    devices = jax.devices()
    return {
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
    }


def read_versions(run: Path) -> Versions:
    """The versions that a run was last started on. Raises UserError."""
    return read_json(run / "versions.json", Versions, "delete it: nothing needs it but `replay`")


def versions_apart(then: Versions, now: Versions) -> list[str]:
    """What differs between two versions, a few words each."""
    then, now = ({**v, **v["packages"], "packages": None, "before": None} for v in (then, now))
    return [f"{name} {then.get(name)} then, {value} now" for name, value in now.items() if then.get(name) != value]


def _write_versions(run: Path, step: int) -> list[str]:
    """Writes versions.json; if something has changed, keeps the old versions as those until `step` and returns a line on it."""
    now, apart = versions(), []
    if step and (run / "versions.json").is_file():
        then = read_versions(run)
        now["before"], apart = then.pop("before", []), versions_apart(then, now)
        now["before"] += [{"until_step": step, **then}] if apart else []
    write(run / "versions.json", json.dumps(now, indent=2) + "\n")
    return [f"packages or devices have changed (see {run / 'versions.json'}): {'; '.join(apart)}"] if apart else []
