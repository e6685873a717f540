"""DPO's reference: the log-probabilities of the answers under the weights that a run starts from, kept beside the pairs."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np

from tinyllama_jax.base import sharding
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.dims import LEARNED
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import claim, settle, sha256, write
from tinyllama_jax.core.losses import Answers
from tinyllama_jax.core.program import Program, build, on_devices
from tinyllama_jax.data import feed
from tinyllama_jax.data.blocks import MANIFEST, Blocks, Record, read_manifest
from tinyllama_jax.data.prepare import shards
from tinyllama_jax.run import cluster, initialize, seals


def with_references(config: Config) -> dict[str, str]:
    """Source of `config` without a reference -> folder of the same pairs with it, which is written unless it is there already.

    The key of a folder is a hash of the pairs, the weights and their precision. Raises UserError, also in one of several
    processes if a folder must be written.
    """
    weights, out = None, {}
    for path in config.data.sources:
        manifest, checksum = read_manifest(path)
        if manifest.get("kind") != "preferences" or "reference" in manifest:
            continue
        weights = weights or _identity(config)
        key = hashlib.sha256(json.dumps([checksum, weights, config.model.precision, config.lora.base]).encode()).hexdigest()
        out[path] = f"{path}-{key[:16]}"
    missing = {path: Path(folder) for path, folder in out.items() if not (Path(folder) / MANIFEST).is_file()}
    if missing and cluster.identity() != (0, 1):
        what = "the reference log-probabilities are not computed yet, which one process does alone"
        how = "--train.steps=1 --optim.warmup_steps=0 and another --workdir in the same folder"
        raise UserError(f"{what}: run the same command first in a single process with {how}, then this one")
    if missing:
        _compute(config, missing, weights)
    return out


def _identity(config: Config) -> str:
    """A hash of the weights of `init.from`."""
    origin = Path(config.init.from_)
    if (origin / "checkpoints").is_dir():
        step = seals.find_step(origin, config.init.step or None, "--init.step=")
        return seals.read_seal(origin / "checkpoints" / str(step))["sha256"]
    kinds = (".safetensors", ".bin", ".gguf")
    files = [origin] if origin.is_file() else sorted(path for path in origin.iterdir() if path.suffix in kinds)
    return " ".join(map(sha256, files))


def _compute(config: Config, missing: dict[str, Path], weights: str) -> None:
    sources = feed.open_sources(config)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = build(config, mesh, Answers())
        origin, _ = initialize.check_origin(config, sources)
        params = initialize.initial_state(config, program, origin)[0].params
        for path, output in missing.items():
            lock = claim(output.parent / ".lock", f"{output.parent}: another process writes there; wait for it to end")
            try:
                _write(path, output, program, params, f"{origin} {weights}")
            finally:
                os.close(lock)
            print(f"{path}: reference log-probabilities of {origin} written in {output}", flush=True)


def _write(path: str, output: Path, program: Program, params: dict, reference: str) -> None:
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    shutil.copytree(path, partial, ignore=shutil.ignore_patterns("*.array_record*", MANIFEST))
    manifest, _ = read_manifest(path)
    record, batch = Record(manifest["seq_len"], manifest["dtype"], "preferences"), program.shape[1]
    for split, content in manifest["splits"].items():
        (entry,) = content["shards"]  # of `data.prepare.chats`
        file = partial / entry["file"]
        writer = shards.writer(file)
        for tokens, length, _, marks, _ in feed.validation(Blocks(path, split), 0, batch, np.arange(batch)):
            losses_BS = program.token_losses(params, on_devices((tokens, length, None, marks), program.eval_batch, batch))
            learned = marks & LEARNED > 0
            logp = np.where(learned, -np.pad(np.asarray(losses_BS, np.float32), ((0, 0), (1, 0))), 0)
            if not np.isfinite(logp).all():
                raise UserError(f"{reference.split()[0]}: its log-probabilities of {path} are not finite")
            for row in np.flatnonzero(length):
                encoded = record.encode(tokens[row], int(length[row]), marks=marks[row], reference=logp[row])
                shards.written(file, writer.write, encoded)
        shards.written(file, writer.close)
        entry |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write(partial / MANIFEST, json.dumps(manifest | {"reference": reference}, indent=1) + "\n")
    settle(partial)
    os.rename(partial, output)
