"""Replays one step of a run: whether its bits are as recorded, what differs and where, and its documents by loss.

python -m tinyllama_jax.replay --run RUN --step N [--section.key=value]

Starts from the checkpoint before step N with the run's own config and data; writes nothing into RUN. Works with several
processes, as training does. Exit code 0: all is equal bit for bit; 1: something differs; 2: a user's mistake.
"""

import argparse
import itertools
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from tinyllama_jax.base import cli, sharding
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError, run_main
from tinyllama_jax.core import xla
from tinyllama_jax.core.losses import NextToken
from tinyllama_jax.core.program import Program, attention_scope, build, choose_attention, on_devices
from tinyllama_jax.core.step import TrainState, weight_of
from tinyllama_jax.data import feed
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.run import checkpoint, cluster, initialize, metrics, seals
from tinyllama_jax.run import folder as run_folder

COMPARED = "loss", "grad_norm", "checksum"
REACH = 10  # if something differs, a checkpoint at most this many steps after step N is compared too


class Run(NamedTuple):
    """The run that is replayed, and the program and mesh to replay it on."""

    folder: Path
    config: Config
    sources: list[Blocks]
    written: dict[int, dict]  # step -> its line in metrics.jsonl
    mesh: jax.sharding.Mesh
    program: Program
    checksums: Callable[[TrainState], jax.Array]
    base: int  # the step of the checkpoint to start from, or 0


Seen = dict[int, tuple[dict, np.ndarray]]  # step -> (values of `COMPARED`, checksums [tensor, device] of the state after it)


def main(argv: list[str]) -> int:
    """Replays, compares, prints; returns the exit code."""
    args, overrides = _arguments(argv)
    config, written = recorded(args.run, args.step, overrides)
    xla.reserve_memory()
    cluster.join(config.train.wait)
    say = lambda line: print(line, flush=True) if jax.process_index() == 0 else None
    sources = feed.open_sources(config)
    check_data(args.run, config, sources)
    mesh = mesh_of(args.run, config, overrides)
    with jax.set_mesh(mesh):
        program = build(config, mesh, NextToken(feed.eos_id(config, sources)))
        base = base_of(args.run, config, args.step, min(written))
        run = Run(args.run, config, sources, written, mesh, program, checksums(program, mesh), base)
        state, origin = begin(run)
        impl, reason = choose_attention(config, mesh.devices.flat[0])
        where = f"mesh: {dict(mesh.shape)} of {jax.devices()[0].device_kind}"
        say(f"{where}; attention: {impl} ({reason}), {attention_scope(config)} documents")
        say(f"{args.run}: steps {base + 1:,} to {args.step:,} again, from {origin.removeprefix('from ')}")
        state, seen = execute(run, state, base, args.step - 1)
        documents, n = by_loss(run, state.params, args.step, args.top)
        state, last = execute(run, state, args.step - 1, args.step)
        seen |= last
        differences = [d for step in sorted(seen) for d in differing(step, written.get(step), seen[step][0])]
        verdict = judge(run, args.step, state, seen, differences)
    n_compared = len(seen.keys() & written.keys())
    for line in verdict or [f"all equal, bit for bit: {', '.join(COMPARED)} of {n_compared:,} recorded steps"]:
        say(line)
    say(f"documents of step {args.step:,} by their loss before it, nats a token; {len(documents):,} of {n:,}:")
    for d in documents:
        where = f"{d['source']} block {d['block']:,} [{d['start']}:{d['end']}]"
        say(f"{d['loss']:9.4f}  {d['tokens']:6,} tokens  {where}  {d['text']}")
    say(f"to resume from before step {args.step:,} without its batch:\n    {how_to_skip(run, args.step, overrides)}")
    return 1 if verdict else 0


# -- the run ----------------------------------------------------------------------------------------------------------------


def recorded(run: Path, step: int, overrides: dict[str, str]) -> tuple[Config, dict[int, dict]]:
    """(the run's config with `overrides`, the lines of its training steps up to `step`). Raises UserError."""
    config = checkpoint.load_config(run)
    for key in overrides:
        if key in (*run_folder.FIXED, "train.batch_ramp", "data.skip", "workdir") or key.startswith("init."):
            raise UserError(f"--{key}={overrides[key]}: is fixed by the run, which is replayed as it was")
    config = cli.override(config, {**overrides, "workdir": str(run)})
    if run_folder.read_sources(run) is None:
        raise UserError(f"{run}: has weights and no data (an import): it has no steps to replay")
    if not 1 <= step <= config.train.steps:
        raise UserError(f"--step {step}: the run's steps are 1 to {config.train.steps}")
    rows = {row["step"]: row for row in metrics.read(run) if "loss" in row}
    if step not in rows:
        near = ", ".join(map(str, sorted(sorted(rows, key=lambda s: abs(s - step))[:2])))
        raise UserError(f"--step {step}: is not in {run / 'metrics.jsonl'}, whose nearest steps are {near}")
    return config, {s: row for s, row in rows.items() if s <= step}


def check_data(run: Path, config: Config, sources: list[Blocks]) -> None:
    """Raises UserError unless the sources are those that the run was trained on."""
    for path, source, old in zip(config.data.sources, sources, run_folder.read_sources(run), strict=False):
        if source.manifest_sha256 != old["manifest_sha256"]:
            raise UserError(f"--data.sources: {path} is not what the run was trained on, {old['path']} as it was then")


def mesh_of(run: Path, config: Config, overrides: dict[str, str]) -> jax.sharding.Mesh:
    """The run's own mesh, on the first devices if there are more; or the mesh of `overrides`."""
    if any(key.startswith("mesh.") for key in overrides):
        return sharding.make_mesh(config.mesh)
    old = run_folder.read_versions(run)["devices"]
    n, devices = int(old.partition(" x ")[0]), jax.devices()
    if n > len(devices):
        own = f"{len(devices)} x {devices[0].device_kind}"
        remedy = "with --mesh.data, --mesh.fsdp and --mesh.tensor it is replayed on these, up to rounding"
        raise UserError(f"{run}: ran on {old}, and here are {own}; {remedy}")
    return sharding.make_mesh(config.mesh, devices[:n])


def base_of(run: Path, config: Config, step: int, first: int) -> int:
    """The newest undamaged checkpoint before `step` with the run's batches; else the step after which the run began."""
    for at in reversed([s for s in checkpoint.steps_in(run) if s < step]):
        if not seals.unusable(run / "checkpoints" / str(at), config):
            return at
    begun = initialize.first_step(config)
    if first > begun + config.log.every:
        what = f"{run} has no whole checkpoint before it, and its first step was not {begun + 1} but about {first}"
        raise UserError(f"--step {step}: {what}")
    return begun


def begin(run: Run) -> tuple[TrainState, str]:
    """(the state after step `base`, a description of its origin)."""
    if run.base in checkpoint.steps_in(run.folder):
        return checkpoint.restore_state(run.folder, run.base, run.program.state), f"its checkpoint of step {run.base:,}"
    return initialize.initial_state(run.config, run.program, initialize.check_origin(run.config, run.sources)[0])


# -- replayed ---------------------------------------------------------------------------------------------------------------


def execute(run: Run, state: TrainState, start: int, end: int) -> tuple[TrainState, Seen]:
    """Executes the steps `start` + 1 to `end`: (the state after them, what each gave). `state` is used up."""
    program, seen = run.program, {}
    rows = feed.rows_here(program.batch.tokens, program.shape, axis=1)
    batches = feed.training(run.config, run.sources, program.shape[1], rows, start)
    for step in range(start + 1, end + 1):
        state, on_device = program.train(state, on_devices(next(batches), program.batch, program.shape[1]))
        values = {name: np.asarray(on_device[name]).item() for name in COMPARED}
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}  # as in metrics.jsonl
        seen[step] = values, np.asarray(run.checksums(state))
    return state, seen


def differing(step: int, written: dict | None, replayed: dict) -> list[dict]:
    """The values of a step that are not as recorded, to the bit; none if it was not recorded (log.every)."""
    if written is None:
        return []
    pairs = {name: {"recorded": written.get(name), "replayed": replayed[name]} for name in COMPARED}
    return [{"step": step, "name": name, **pair} for name, pair in pairs.items() if pair["recorded"] != pair["replayed"]]


def checksums(program: Program, mesh: jax.sharding.Mesh) -> Callable[[TrainState], jax.Array]:
    """State -> uint32 [tensor, device], the checksum of each device's shard of each tensor."""

    def of_shard(shard: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * shard.dtype.itemsize}")
        bits = lax.bitcast_convert_type(shard.reshape(-1), unsigned).astype(jnp.uint32)
        return (bits * weight_of(lax.iota(jnp.uint32, bits.size))).sum(dtype=jnp.uint32).reshape(1)

    def of_leaf(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        over = PartitionSpec(mesh.axis_names)
        return jax.shard_map(of_shard, mesh=mesh, in_specs=spec, out_specs=over, check_vma=False)(leaf)

    def of_state(state: TrainState) -> jax.Array:
        leaves = zip(jax.tree.leaves(state), jax.tree.leaves(program.state), strict=True)
        return jnp.stack([of_leaf(leaf, abstract.sharding.spec) for leaf, abstract in leaves])

    return jax.jit(of_state, out_shardings=NamedSharding(mesh, PartitionSpec()))


# -- what differs, and where ------------------------------------------------------------------------------------------------


def judge(run: Run, last: int, state: TrainState, seen: Seen, differences: list[dict]) -> list[str]:
    """Lines on what differs from the record or between executions; none if nothing differs.

    `seen`: of the steps up to `last`. `state`, after it, is used up: the devices may have room for only one.
    """
    lines = [f"step {d['step']:,}: {d['name']} recorded {d['recorded']!r}, replayed {d['replayed']!r}" for d in differences]
    reach = last + (max(REACH, last - run.base) if lines else 0)
    after = next((s for s in checkpoint.steps_in(run.folder) if last <= s <= reach), None)
    if after and seals.unusable(run.folder / "checkpoints" / str(after), run.config):
        after = None
    state, more = execute(run, state, last, after or last)
    seen |= more
    jax.tree.map(lambda a: a.delete(), state)
    if after:
        saved = np.asarray(run.checksums(checkpoint.restore_state(run.folder, after, run.program.state)))
    if apart := after and first_apart(run, seen[after][1] != saved):
        lines.append(f"step {after:,}: another {apart[0]} in the run's checkpoint, first in the shard of {apart[1]}")
    if not lines:
        return []
    until = min([after or last, *(d["step"] for d in differences)])
    if own := disagreement(run, until, seen):
        step, tensor, devices = own
        lines.append(f"this machine does not agree with itself: step {step:,}, {devices}, {tensor}")
        if jax.default_backend() == "gpu":
            lines.append("(nor does a sound GPU, unless its run has train.deterministic)")
        return lines
    lines.append(f"this machine agrees with itself: three times the same bits up to step {until:,}")
    if after and not apart:
        lines.append(f"and with the run's checkpoint of step {after:,}, bit for bit: only the record differs")
    else:
        new = run_folder.versions() | {"devices": f"{run.mesh.size} x {jax.devices()[0].device_kind}"}
        changes = run_folder.version_differences(run_folder.read_versions(run.folder), new)
        cause = "the recorded run differed: a fault then, another mesh, a setting changed since, or other versions"
        lines.append("; ".join([cause, *changes]))
    if any(d["name"] == "checksum" for d in differences):
        lines.append("its batches differ too: the data files changed, or --data.skip did")
    return lines


def first_apart(run: Run, apart: np.ndarray) -> tuple[str, str] | None:
    """(tensor, devices) of the first True in [tensor, device], parameters first; None if there is none."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(run.program.state)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    differ = sorted(np.flatnonzero(apart.any(axis=1)), key=lambda i: (not names[i].startswith("params"), i))
    if not differ:
        return None
    devices = [f"{d.id} (process {d.process_index})" for d in run.mesh.devices.flat[apart[differ[0]]]]
    every = 1 < len(devices) == run.mesh.size
    return names[differ[0]], "every device" if every else f"device{'s' * (len(devices) > 1)} {', '.join(devices)}"


def disagreement(run: Run, until: int, seen: Seen) -> tuple[int, str, str] | None:
    """(step, tensor, devices) where one of two more executions first differs from `seen`; or None."""
    for _ in range(2):
        again = execute(run, begin(run)[0], run.base, until)[1]
        for step, (values, table) in again.items():
            if where := first_apart(run, table != seen[step][1]):
                return step, *where
            if values != seen[step][0]:
                return step, "loss, gradient norm or checksum", "no device's state"
    return None


# -- documents --------------------------------------------------------------------------------------------------------------


def by_loss(run: Run, params: dict, step: int, top: int) -> tuple[list[dict], int]:
    """(the `top` documents in the blocks of `step` by mean loss a token under `params`, the number of all documents).

    Evaluates one micro-batch of sequences at a time, and fetches only the loss of each token.
    """
    batch = run.program.shape[1]
    source, block = feed.order(run.config, run.sources).at(step)
    tokens, length = feed.gather(run.sources, source, block)
    tokenizer = tokenizer_lib.load(run.folder / "tokenizer")
    rows = feed.rows_here(run.program.eval_batch.length, (batch,), axis=0)
    documents = []
    for first in range(0, len(block), batch):
        micro = on_devices((tokens[first + rows], length[first + rows]), run.program.eval_batch, batch)
        losses = np.asarray(run.program.token_losses(params, micro), np.float64)
        for row in range(first, first + batch):
            for start, end in spans(tokens[row, : length[row]], tokenizer.bos_id, tokenizer.eos_id):
                predicted = losses[row - first, max(start, 1) - 1 : end - 1]  # the block's first token is not predicted
                if predicted.size:
                    documents.append((float(np.nan_to_num(predicted.mean(), nan=np.inf)), predicted.size, row, start, end))
    paths, out = list(run.config.data.sources), []
    for loss, size, row, start, end in sorted(documents, reverse=True)[:top]:
        place = {"source": paths[source[row]], "block": int(block[row]), "start": start, "end": end}
        text = one_line(tokenizer.decode(tokens[row, start:end][:200].tolist()))
        out.append({**place, "tokens": size, "loss": loss, "text": text})
    return out, len(documents)


def spans(tokens: np.ndarray, bos: int, eos: int) -> list[tuple[int, int]]:
    """[start, end) of each document in a block: it begins with bos or after eos."""
    begins = (tokens[1:] == bos) | (tokens[:-1] == eos)
    return list(itertools.pairwise([0, *(np.flatnonzero(begins) + 1).tolist(), len(tokens)]))


def one_line(text: str, width: int = 80) -> str:
    """`text` without anything that moves a terminal's cursor, shortened."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= width else text[: width - 1] + "…"


def how_to_skip(run: Run, step: int, overrides: dict[str, str]) -> str:
    """The command that resumes from before `step` without its batch; in a new folder if no checkpoint is from before it."""
    checkpoints = checkpoint.steps_in(run.folder)
    workdir = run.folder if run.base in checkpoints or not checkpoints else f"{run.folder}-without-{step}"
    options = [f"--workdir={workdir}", *(f"--{key}={value}" for key, value in overrides.items())]
    command = ["--config", str(run.folder / "config.json"), *options]
    return shlex.join([sys.executable, "-m", "tinyllama_jax.train", *cli.skipping(command, run.config.data, step, step)])


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = argparse.ArgumentParser(prog="tinyllama_jax.replay", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--run", required=True, type=Path, help="a run folder")
    parser.add_argument("--step", required=True, type=int)
    parser.add_argument("--top", type=int, default=10, help="documents to show (10)")
    args, options = parser.parse_known_args(argv)
    return args, cli.pairs(options)


if __name__ == "__main__":
    run_main(main)
