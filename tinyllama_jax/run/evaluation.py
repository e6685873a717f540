"""Held-out loss during training."""

import math

import jax
import numpy as np

from tinyllama_jax.base.config import Config
from tinyllama_jax.core.program import Program, on_devices
from tinyllama_jax.data import feed
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.run import cluster


def evaluate(program: Program, config: Config, params: dict, held_out: dict[str, Blocks], step: int) -> dict[str, float]:
    """Held-out loss (nats a token), perplexity and next-token accuracy; with several sources also the loss of each.

    Of preferences the loss of a pair, and the share of pairs with a positive margin; `val_tokens` then counts pairs.
    `step`: the step of the parameters.
    """
    batch = program.shape[1]
    rows = feed.rows_here(program.eval_batch.length, (batch,), axis=0)
    totals, out = np.zeros(3), {}
    for name, blocks in zip(feed.names(held_out), held_out.values(), strict=True):
        local = feed.validation(blocks, config.data.eval_blocks, batch, rows)
        parts = []
        for part in local:
            parts.append(program.evaluate(params, on_devices(part, program.eval_batch, batch)))
            cluster.heartbeat(step, "validating")
        loss, correct, tokens = np.sum([[s.loss, s.correct, n] for s, n in jax.device_get(parts)], axis=0, dtype=np.float64)
        totals += loss, correct, tokens
        out[f"val_loss/{name}"] = loss / tokens if tokens else math.nan
    loss, correct, tokens = totals
    if not tokens:  # blocks of a single token
        return {"val_loss": math.nan, "val_perplexity": math.nan, "val_accuracy": math.nan, "val_tokens": 0}
    scores = {"val_loss": loss / tokens, "val_perplexity": math.exp(min(loss / tokens, 700)), "val_accuracy": correct / tokens}
    if any(blocks.kind == "preferences" for blocks in held_out.values()):
        del scores["val_perplexity"]
    return {**scores, "val_tokens": int(tokens), **(out if len(out) > 1 else {})}
