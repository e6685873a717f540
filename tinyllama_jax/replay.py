"""Replays a recorded step: is it the same bit for bit, what differs and where, and which of its documents have a high loss.

python -m tinyllama_jax.replay --run RUN --step N [--section.key=value]

It starts from the checkpoint before step N, with the run's own config and data, and writes nothing into RUN. Several processes
work as in training. Exit code 0: everything is equal bit for bit; 1: something differs; 2: a user's mistake.
"""

import argparse
import itertools
import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from tinyllama_jax.base import cli, sharding, store
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.dims import FIRST, LEARNED
from tinyllama_jax.base.errors import UserError, run_main
from tinyllama_jax.base.files import check_local, read_json
from tinyllama_jax.core import xla
from tinyllama_jax.core.losses import for_data
from tinyllama_jax.core.program import Program, StepCompiler, attention_scope, build, choose_attention, on_devices
from tinyllama_jax.core.step import TrainState, weight_of
from tinyllama_jax.data import feed
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.run import checkpoint, cluster, initialize, metrics, programs, seals
from tinyllama_jax.run import folder as run_folder

COMPARED = "loss", "grad_norm", "checksum"
REACH = 10  # least number of steps after N in which it looks for a checkpoint to compare with


class Run(NamedTuple):
    """The run that is replayed, and the mesh and program that replay it."""

    folder: Path
    config: Config
    sources: list[Blocks]
    written: dict[int, dict]  # step -> its line in metrics.jsonl
    mesh: jax.sharding.Mesh
    program: Program
    checksums: Callable[[TrainState], jax.Array]
    base: int  # the step whose state is on disk, or 0


def main(argv: list[str]) -> int:
    """Replays, compares, prints; returns the exit code."""
    args, overrides = _arguments(argv)
    config, written = recorded(args.run, args.step, overrides)
    xla.reserve_memory()
    cluster.join(config.train.wait)
    first = jax.process_index() == 0
    say = lambda line: print(line, flush=True, file=sys.stderr if args.json else sys.stdout) if first else None
    sources = feed.open_sources(config)
    check_data(args.run, config, sources)
    mesh = mesh_of(args.run, config, overrides)
    with jax.set_mesh(mesh):
        program = build(config, mesh, for_data(sources[0].kind, feed.eos_id(config, sources)))
        base = base_of(args.run, config, args.step, min(written))
        run = Run(args.run, config, sources, written, mesh, program, checksums(program, mesh), base)
        state, origin = begin(run)
        impl, reason = choose_attention(config, mesh.devices.flat[0])
        say(
            f"mesh: {dict(mesh.shape)} of {jax.devices()[0].device_kind}; "
            f"attention: {impl} ({reason}), {attention_scope(config)} documents"
        )
        say(f"{args.run}: steps {base + 1:,} to {args.step:,} again, from {origin.removeprefix('from ')}")
        differences, seen = [], {}
        for start, end in ((base, args.step - 1), (args.step - 1, args.step)):
            if start == args.step - 1:
                documents, n = by_loss(run, state.params, args.step, args.top)
            for step, after, values, table in execute(run, state, start, end):
                state, seen[step] = after, (values, table)
                differences += differing(step, written.get(step), values)
        verdict = judge(run, args.step, state, seen, differences)
    skip = how_to_skip(run, args.step, overrides)
    out = {"run": str(args.run), "step": args.step, "from": base, "compared": [s for s in sorted(seen) if s in written]}
    out |= {"differences": differences, "verdict": verdict, "loss": values["loss"], "documents": documents, "skip": skip}
    for line in verdict or [f"all equal, bit for bit: {', '.join(COMPARED)} of {len(out['compared']):,} recorded steps"]:
        say(line)
    say(f"documents of step {args.step:,} by their loss before it, nats a token; {len(documents):,} of {n:,}:")
    for d in documents:
        where = f"{d['source']} block {d['block']:,} [{d['start']}:{d['end']}]"
        say(f"{d['loss']:9.4f}  {d['tokens']:6,} tokens  {where}  {d['text']}")
    say(f"to resume before step {args.step:,} without its batch:\n    {skip}")
    if args.json and first:
        print(json.dumps(out, indent=1))
    return 1 if verdict else 0


# -- the recorded run -------------------------------------------------------------------------------------------------------


def recorded(run: Path, step: int, overrides: dict[str, str]) -> tuple[Config, dict[int, dict]]:
    """(the run's config with `overrides`, the lines of its training steps up to `step`). Raises UserError."""
    config = checkpoint.load_config(run)
    for key in overrides:
        if key in (*run_folder.FIXED, "train.batch_ramp", "data.skip", "workdir") or key.startswith("init."):
            raise UserError(f"--{key}={overrides[key]}: may not change: a run is replayed as it was trained")
    config = cli.override(config, {**overrides, "workdir": str(run)})
    if not (run / "data.json").is_file():
        raise UserError(f"{run}: has weights and no data (an import): it has no steps to replay")
    if not 1 <= step <= config.train.steps:
        raise UserError(f"--step {step}: the run's steps are 1 to {config.train.steps}")
    lines = {row["step"]: row for row in metrics.read(run) if "loss" in row}
    if step not in lines:
        near = sorted(lines, key=lambda s: abs(s - step))[:2]
        raise UserError(
            f"--step {step}: is not in {run / 'metrics.jsonl'}, whose nearest steps are {', '.join(map(str, sorted(near)))}"
        )
    return config, {s: row for s, row in lines.items() if s <= step}


def check_data(run: Path, config: Config, sources: list[Blocks]) -> None:
    """Raises UserError unless the sources are those that the run was trained on."""
    recorded = read_json(run / "data.json", list[run_folder.Source])
    for path, source, old in zip(config.data.sources, sources, recorded, strict=False):
        if source.manifest_sha256 != old["manifest_sha256"]:
            raise UserError(f"--data.sources: {path} is not the data that the run was trained on, {old['path']} at that time")


def mesh_of(run: Path, config: Config, overrides: dict[str, str]) -> jax.sharding.Mesh:
    """The run's own mesh, on the first devices if there are more here; the mesh of `--mesh...` if it is given."""
    if any(key.startswith("mesh.") for key in overrides):
        return sharding.make_mesh(config.mesh)
    then = run_folder.read_versions(run)["devices"]
    n, devices = int(then.partition(" x ")[0]), jax.devices()
    if n > len(devices):
        raise UserError(
            f"{run}: ran on {then}, and here are {len(devices)} x {devices[0].device_kind}; give --mesh.data, --mesh.fsdp and "
            "--mesh.tensor to replay it on these; their sums are rounded differently, so not all bits will be equal"
        )
    return sharding.make_mesh(config.mesh, devices[:n])


def base_of(run: Path, config: Config, step: int, first: int) -> int:
    """The newest complete checkpoint before `step` with the same batches; without any, the step that the run started from."""
    for at in reversed([s for s in checkpoint.steps_in(run) if s < step]):
        if not seals.unusable(run / "checkpoints" / str(at), config):
            return at
    begun = initialize.first_step(config)
    if first > begun + config.log.every:
        raise UserError(
            f"--step {step}: {run} has no whole checkpoint before it, and its first step was not {begun + 1} but about {first}"
        )
    return begun


def begin(run: Run) -> tuple[TrainState, str]:
    """The state after step `base`, and where it comes from."""
    if run.base in checkpoint.steps_in(run.folder):
        return checkpoint.restore_state(run.folder, run.base, run.program.state), f"its checkpoint of step {run.base:,}"
    origin, _ = initialize.check_origin(run.config, run.sources)
    return initialize.initial_state(run.config, run.program, origin)


# -- replaying --------------------------------------------------------------------------------------------------------------


def execute(run: Run, state: TrainState, start: int, end: int) -> Iterator[tuple[int, TrainState, dict, np.ndarray]]:
    """Steps `start` + 1 to `end`: (step, state after it, its numbers as metrics.jsonl has them, checksums [tensor, device])."""
    program = run.program
    rows = feed.rows_here(program.batch.tokens, program.shape, axis=1)
    batches = feed.training(run.config, run.sources, program.shape[1], rows, start)
    for step in range(start + 1, end + 1):
        state, metrics_of_step = program.train(state, on_devices(next(batches), program.batch, program.shape[1]))
        values = {name: np.asarray(metrics_of_step[name]).item() for name in COMPARED}
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        yield step, state, values, np.asarray(run.checksums(state))


def differing(step: int, recorded: dict | None, replayed: dict) -> list[dict]:
    """The numbers of a step that differ from the recorded ones in any bit; none if it was not recorded (log.every)."""
    if recorded is None:
        return []
    pairs = {name: {"recorded": recorded.get(name), "replayed": replayed[name]} for name in COMPARED}
    return [{"step": step, "name": name, **pair} for name, pair in pairs.items() if pair["recorded"] != pair["replayed"]]


def checksums(program: Program, mesh: jax.sharding.Mesh) -> Callable[[TrainState], jax.Array]:
    """Returns a function: state -> uint32 [tensor, device], a checksum of the part of each tensor that each device holds."""

    def of_part(part: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * part.dtype.itemsize}")
        bits = lax.bitcast_convert_type(part.reshape(-1), unsigned).astype(jnp.uint32)
        return (bits * weight_of(lax.iota(jnp.uint32, bits.size))).sum(dtype=jnp.uint32).reshape(1)

    def of_state(state: TrainState) -> jax.Array:
        leaves = zip(jax.tree.leaves(state), jax.tree.leaves(program.state), strict=True)
        split = lambda leaf, spec: jax.shard_map(
            of_part, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(mesh.axis_names), check_vma=False
        )(leaf)
        return jnp.stack([split(leaf, shape.sharding.spec) for leaf, shape in leaves])

    return jax.jit(of_state, out_shardings=NamedSharding(mesh, PartitionSpec()))


# -- what differs, and where --------------------------------------------------------------------------------------------------


def judge(run: Run, last: int, state: TrainState, seen: dict[int, tuple[dict, np.ndarray]], differences: list) -> list[str]:
    """Lines that say what differs: from the record, between replicas, between executions here; none if nothing does.

    `seen`: step -> (numbers, checksums) up to `last`. `state`, after `last`, is deleted: devices may have room for only one.
    """
    lines = [f"step {d['step']:,}: {d['name']} recorded {d['recorded']!r}, replayed {d['replayed']!r}" for d in differences]
    split = [(step, *apart) for step in sorted(seen) if (apart := replicas_apart(run, seen[step][1]))][:1]
    lines += [f"step {step:,}: {tensor} on {devices} differs from its replicas" for step, tensor, devices in split]
    reach = last + (max(REACH, last - run.base) if lines else 0)
    after = next((s for s in checkpoint.steps_in(run.folder) if last <= s <= reach), None)
    if after and seals.unusable(run.folder / "checkpoints" / str(after), run.config):
        after = None
    for step, next_state, values, table in execute(run, state, last, after or last):
        state, seen[step] = next_state, (values, table)
    jax.tree.map(lambda a: a.delete(), state)
    apart = after and first_apart(run, seen[after][1] != saved(run, after))
    if apart:
        lines.append(f"step {after:,}: {apart[0]} on {apart[1]} differs from the run's checkpoint; it is the first that does")
    if not lines:
        return []
    until = min([d["step"] for d in differences] + [s[0] for s in split] + [after or last])
    if own := disagreement(run, until, seen):
        step, tensor, devices = own
        lines.append(f"this machine does not agree with itself: step {step:,}, {devices}, {tensor}")
        if jax.default_backend() == "gpu":
            lines.append("(nor does a sound GPU, unless its run has train.deterministic)")
        return lines
    lines.append(f"this machine agrees with itself: three executions gave the same bits up to step {until:,}")
    if after and not apart:
        lines.append(f"and with the run's checkpoint of step {after:,}, bit for bit: only what was written down differs")
    else:
        causes = "a fault then, another mesh, a setting changed since, or other versions or devices"
        lines.append(f"the recorded run differed: {causes}{ran_on(run)}")
        compiled = StepCompiler(run.program, run.config, run.mesh, feed.dtype(run.sources)).train(last)
        lines += filter(None, [programs.compare(run.config, last + 1, compiled)[0]])
    if any(d["name"] == "checksum" for d in differences):
        lines.append("its batches too: the data files changed, or --data.skip did")
    return lines


def saved(run: Run, step: int) -> np.ndarray:
    """The checksums of the run's checkpoint of `step`."""
    return np.asarray(run.checksums(checkpoint.restore_state(run.folder, step, run.program.state)))


def first_apart(run: Run, apart: np.ndarray) -> tuple[str, str] | None:
    """(tensor, devices) of the first difference of [tensor, device], parameters first; None if there is none."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(run.program.state)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    for i in sorted(np.flatnonzero(apart.any(axis=1)), key=lambda i: (not names[i].startswith("params"), i)):
        where = [f"{d.id} (process {d.process_index})" for d in run.mesh.devices.flat[apart[i]]]
        if 1 < len(where) == run.mesh.size:
            return names[i], "every device"
        return names[i], ("device " if len(where) == 1 else "devices ") + ", ".join(where)
    return None


def replicas_apart(run: Run, table: np.ndarray) -> tuple[str, str] | None:
    """(tensor, the devices in the minority) where replicas of one part of a tensor differ; None if they are all equal."""
    apart, devices = np.zeros(table.shape, bool), list(run.mesh.devices.flat)
    for i, leaf in enumerate(jax.tree.leaves(run.program.state)):
        index = leaf.sharding.devices_indices_map(leaf.shape)
        parts = [str(index[device]) for device in devices]
        for part in set(parts):
            holders = np.array([p == part for p in parts])
            (common, most), *others = Counter(table[i, holders].tolist()).most_common()
            if others:  # without a majority nobody knows which is right: all are named
                apart[i] |= holders & ((table[i] != common) | (most == others[0][1]))
    return first_apart(run, apart)


def disagreement(run: Run, until: int, seen: dict[int, tuple[dict, np.ndarray]]) -> tuple[int, str, str] | None:
    """(step, tensor, devices) where one of two more executions first differs from the first one (`seen`); or None."""
    for _ in range(2):
        state, _ = begin(run)
        for step, after, values, table in execute(run, state, run.base, until):
            state = after
            if apart := first_apart(run, table != seen[step][1]):
                return step, *apart
            if values != seen[step][0]:
                return step, "loss, gradient norm or checksum", "no device's state"
        del state, after  # the devices may have room for only one
    return None


def ran_on(run: Run) -> str:
    """The versions and devices that differ from RUN/versions.json."""
    own = run_folder.versions() | {"devices": f"{run.mesh.size} x {jax.devices()[0].device_kind}"}
    return "".join(f"; {line}" for line in run_folder.version_differences(run_folder.read_versions(run.folder), own))


# -- documents ----------------------------------------------------------------------------------------------------------------


def by_loss(run: Run, params: dict, step: int, top: int) -> tuple[list[dict], int]:
    """(the `top` documents of `step` with the highest mean loss a token under `params`, the number of documents in all).

    Computes one micro-batch at a time on the devices, from which only the loss of each token comes back.
    """
    batch = run.program.shape[1]
    source, block = feed.order(run.config, run.sources).at(step)
    read = feed.gather(run.sources, source, block)
    fields = (read.tokens, read.length, None, read.marks, read.reference)
    tokenizer = tokenizer_lib.load(run.folder / "tokenizer")
    rows = feed.rows_here(run.program.eval_batch.length, (batch,), axis=0)
    documents = []
    for first in range(0, len(block), batch):
        local = tuple(a if a is None else a[first + rows] for a in fields)
        micro = on_devices(local, run.program.eval_batch, batch)
        losses = np.asarray(run.program.token_losses(params, micro), np.float64)
        for row in range(first, first + batch):
            marks = None if read.marks is None else read.marks[row]
            for start, end in spans(read.tokens[row, : read.length[row]], tokenizer.bos_id, tokenizer.eos_id, marks):
                predicted = losses[row - first, max(start, 1) - 1 : end - 1]  # the block's first token is not predicted
                if marks is not None:
                    predicted = predicted[marks[max(start, 1) : end] & LEARNED > 0]
                if predicted.size:
                    documents.append((float(np.nan_to_num(predicted.mean(), nan=np.inf)), predicted.size, row, start, end))
    paths, out = list(run.config.data.sources), []
    for loss, size, row, start, end in sorted(documents, reverse=True)[:top]:
        text = one_line(tokenizer.decode(read.tokens[row, start:end][:200].tolist()))
        place = {"source": paths[source[row]], "block": int(block[row]), "start": start, "end": end}
        out.append({**place, "tokens": size, "loss": loss, "text": text})
    return out, len(documents)


def spans(tokens: np.ndarray, bos: int, eos: int, marks: np.ndarray | None = None) -> list[tuple[int, int]]:
    """[start, end) of each document in a block: it ends with eos, and begins with bos. With `marks`: of each conversation."""
    begins = (tokens[1:] == bos) | (tokens[:-1] == eos) if marks is None else marks[1 : len(tokens)] & FIRST > 0
    edges = [0, *(np.flatnonzero(begins) + 1).tolist(), len(tokens)]
    return list(itertools.pairwise(edges))


def one_line(text: str, width: int = 80) -> str:
    """`text`, shortened, with escapes for all that would move a terminal's cursor."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= width else text[: width - 1] + "…"


def how_to_skip(run: Run, step: int, overrides: dict[str, str]) -> str:
    """The command that resumes before `step` without its batch; in a new folder if no checkpoint is old enough."""
    steps = checkpoint.steps_in(run.folder)
    begun = run.base in steps or not steps
    given = checkpoint.load_config(run.folder).workdir  # a bucket, if this is its working copy
    place = given if "://" in given and store.working_copy(given).resolve() == run.folder.resolve() else run.folder
    options = [f"--workdir={place}" if begun else f"--workdir={place}-without-{step}"]
    options += [f"--{key}={value}" for key, value in overrides.items()]
    command = ["--config", str(run.folder / "config.json"), *options]
    return shlex.join([sys.executable, "-m", "tinyllama_jax.train", *cli.skipping(command, run.config.data, step, step)])


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = argparse.ArgumentParser("python -m tinyllama_jax.replay", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--run", required=True, type=Path, help="a run folder")
    parser.add_argument("--step", required=True, type=int, help="the step to replay, which metrics.jsonl must have")
    parser.add_argument("--top", type=int, default=10, help="documents to show (10)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout, and the lines on stderr (no)")
    args, overrides = parser.parse_known_args(argv)
    check_local("--run", args.run)
    return args, cli.pairs(overrides)


if __name__ == "__main__":
    run_main(main)
