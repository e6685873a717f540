"""What a run is about to do, in a few lines printed at its start."""

from __future__ import annotations

import jax

from tinyllama_jax.base import config as config_lib
from tinyllama_jax.base import dims
from tinyllama_jax.base.config import Config
from tinyllama_jax.core import xla
from tinyllama_jax.core.program import Program, attention_scope, choose_attention
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.run import stages


def describe(
    config: Config, mesh: jax.sharding.Mesh, program: Program, sources: list[Blocks], held_out: dict[str, Blocks]
) -> list[str]:
    """The lines: model, attention and its reason, mesh, batch, data, schedule, XLA's options. Nothing falls back silently."""
    model, (accumulation, batch) = config.model, program.shape
    impl, reason = choose_attention(config, mesh.devices.flat[0])
    named = zip(config.data.sources.items(), sources, strict=True)
    data = ", ".join(f"{config_lib.weight_text(w)} x {p} ({len(s):,} blocks)" for (p, w), s in named)
    return [
        f"model: {dims.n_parameters(model):,} parameters, {model.precision}, "
        f"residual {model.residual_dtype}, remat {model.remat}",
        f"attention: {impl} ({reason}), {attention_scope(config)} documents; "
        f"loss: xla, {model.loss_chunk:,} tokens' logits at a time",
        f"mesh: {dict(mesh.shape)}, {mesh.size} of {jax.device_count()} devices of {jax.devices()[0].device_kind}, "
        f"{jax.local_device_count()} a process",
        f"step: {config.train.tokens_per_step:,} tokens = {accumulation} micro-batches x {batch} sequences x {model.seq_len:,}",
        f"data: {data}",
        *(
            f"warning: of {s.directory} {len(gone):,} files are not there, such as {gone[0]}"
            for s in sources
            if (gone := s.missing())
        ),
        "validation: "
        + (", ".join(f"{p} ({len(b):,} blocks)" for p, b in held_out.items()) or "none: no source has that split")
        + "".join(f"; {p} has no such split" for p in config.data.sources if held_out and p not in held_out),
        *stages.lines(config),
        *stages.epochs(config, sources),
        *xla.lines(config, mesh),
    ]
