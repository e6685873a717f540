"""Compiles other steps to see which fit a machine: more sequences, the smallest change, a sweep."""

import contextlib
from collections.abc import Callable

from tinyllama_jax.base import cli, sharding
from tinyllama_jax.base.config import REMAT, Config
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.planning import targets
from tinyllama_jax.planning.compiled import Compiled, compile_step, gib, tokens_per_second


def _with(config: Config, **changes: object) -> Config:
    return cli.override(config, {key.replace("__", "."): str(value) for key, value in changes.items()})


def guess(compiled: Compiled, sequences: int) -> float:
    """Estimates the bytes that a device needs for `sequences`: a fixed part, and a part in proportion to them."""
    known = compiled.expected if compiled.memory["params"] is None else compiled.memory
    fixed = sum(known[kind] for kind in ("params", "optimizer", "gradients"))
    scaled = max(compiled.peak - fixed, 0) * sequences / compiled.config.train.seqs_per_device
    most = compiled.config.fitting(sharding.batch_devices(compiled.mesh))[-1]
    no_accumulation = sequences == most  # then there is no sum of gradients in memory
    a_copy = compiled.expected["gradients"] / (1 if compiled.accumulation == 1 else 2)
    return fixed + scaled + a_copy * ((compiled.accumulation == 1) - no_accumulation)


def sizes(compiled: Compiled) -> list[Compiled]:
    """Returns the step compiled with every train.seqs_per_device that is worth offering; empty if not even 1 fits.

    The first is the largest that fits. If XLA recomputes matmuls there to save memory, smaller ones follow, down to the first
    at which it does not. Values that `guess` puts more than a tenth above the budget are not compiled.
    """
    tried, out = {compiled.config.train.seqs_per_device: compiled}, []
    for n in reversed(compiled.config.fitting(sharding.batch_devices(compiled.mesh))):
        near = min(tried, key=lambda m: abs(m - n))
        if n not in tried and n > 1 and guess(tried[near], n) > 1.1 * compiled.machine.budget:
            continue
        if n not in tried:
            tried[n] = compile_step(_with(compiled.config, train__seqs_per_device=n), compiled.machine)
        if tried[n].fits:
            out.append(tried[n])
            if not tried[n].recomputed:
                break
    return out


def recommended(offered: list[Compiled]) -> Compiled:
    """Returns the largest of `sizes` at which XLA recomputes nothing, or the largest of all if it always recomputes."""
    return offered[-1] if not offered[-1].recomputed else offered[0]


def nearest(compiled: Compiled) -> tuple[dict[str, object], Compiled] | None:
    """Returns the smallest change with which a step fits: (config keys and values, the step compiled with them).

    Tried in order: fewer sequences a device, which costs little; a remat policy that keeps less; parameters sharded over all
    devices. Returns None if none of them fits.
    """
    config, machine = compiled.config, compiled.machine
    wider = {"mesh.data": 1, "mesh.fsdp": -1}
    remats = [{"model.remat": remat} for remat in REMAT[REMAT.index(config.model.remat) + 1 :]]
    for more in [{}, *remats, wider, {**wider, "model.remat": REMAT[-1]}]:
        for sequences in (config.train.seqs_per_device, 1):
            with contextlib.suppress(UserError):  # a number of sequences that does not divide on another mesh
                keys = more | {"train.seqs_per_device": sequences}
                changed = cli.override(config, {key: str(value) for key, value in keys.items()})
                if offered := sizes(compile_step(changed, machine) if more else compiled):
                    n = (best := recommended(offered)).config.train.seqs_per_device
                    return more | ({"train.seqs_per_device": n} if n != config.train.seqs_per_device else {}), best
                break
    return None


def meshes(config: Config, machine: targets.Machine) -> list[tuple[int, int, int]]:
    """Returns a sweep's meshes (data, fsdp, tensor): the config's own, fsdp within a node, fsdp over all devices, data only."""
    n, per_node = len(machine.devices), machine.per_node
    own = sharding.make_mesh(config.mesh, machine.devices).shape
    configured = tuple(own[axis] for axis in ("data", "fsdp", "tensor"))
    return list(dict.fromkeys([configured, (n // per_node, per_node, 1), (1, n, 1), (n, 1, 1)]))


def sweep(config: Config, machine: targets.Machine, mfu: float | None, say: Callable[[str], None]) -> list[dict]:
    """Compiles every mesh x remat policy x sequences a device (powers of two). Returns first what fits, then the fastest.

    Speeds are compared by the middle of the prediction.
    """
    rows = []
    for data, fsdp, tensor in meshes(config, machine):
        for remat in REMAT:  # each policy keeps less than the one before
            last = None
            for n in (n for n in (1, 2, 4, 8, 16, 32, 64) if config.seqs_per_step % (n * data * fsdp) == 0):
                if last and guess(last, n) > (1.25 if last.fits else 1) * machine.budget:
                    continue
                changed = _with(config, mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor, model__remat=remat,
                                train__seqs_per_device=n)  # fmt: skip
                name = f"data={data} fsdp={fsdp} tensor={tensor} {remat} {n} a device"
                try:
                    last = compile_step(changed, machine)
                except UserError as error:
                    say(f"{name}: {error}")
                    break
                say(f"{name}: {gib(last.peak)}")
                rows.append({"mesh": dict(last.mesh.shape), "remat": remat, "seqs_per_device": n, "fits": last.fits,
                             "peak_bytes_per_device": last.peak, "recomputed": last.recomputed,
                             "tokens_per_second_per_device": tokens_per_second(last, mfu)})  # fmt: skip
    if not rows:
        raise UserError(
            f"--sweep: {config.seqs_per_step} sequences a step do not divide into the {len(machine.devices)} devices; choose "
            "another train.tokens_per_step"
        )
    rate = lambda row: (row["tokens_per_second_per_device"] or {"middle": 0})["middle"]
    return sorted(rows, key=lambda row: (not row["fits"], -rate(row), row["peak_bytes_per_device"]))


def whole_run(compiled: Compiled) -> Compiled:
    """Returns `compiled`, with a later stage's peak if only later stages accumulate gradients, which takes more memory."""
    config = compiled.config
    more = [tokens for _, _, tokens in config.train.stages if tokens > config.train.tokens_per_step]
    if compiled.accumulation > 1 or not more:
        return compiled
    later = compile_step(_with(config, train__tokens_per_step=more[0], train__batch_ramp=""), compiled.machine)
    return compiled._replace(peak=later.peak, live=later.live, memory=later.memory, expected=later.expected)
