"""Samples during training, from the trainer's own parameters on its own mesh."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from tinyllama_jax.base import dims, sharding
from tinyllama_jax.base.config import Config, Model
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.sampling import Sampling
from tinyllama_jax.inference.text import first_tokens
from tinyllama_jax.inference.weights import Loaded, Weights

TOKENS = 64  # of a sample


def continued(config: Config, params: dict, step: int) -> str:
    """`log.sample` and what the model makes of it, drawn at temperature 0.8; `step` is the seed. All processes call this."""
    run = Path(config.workdir)
    tokenizer = tokenizer_lib.load(run / "tokenizer")
    model = dataclasses.replace(config.model, attention="auto")
    begin_with_bos = tokenizer_lib.documents_begin_with_bos(run)
    loaded = Loaded(_unstacked(params, model), model, tokenizer, begin_with_bos, run, jax.sharding.get_mesh())
    prompt = first_tokens(tokenizer, begin_with_bos, config.log.sample)
    request = Request(prompt, TOKENS, Sampling(0.8), seed=step, stop_ids=(tokenizer.eos_id,) * (tokenizer.eos_id >= 0))
    for _ in Engine(loaded).stream(request):
        pass
    return tokenizer.decode([id_ for id_ in request.prompt + request.tokens if id_ < tokenizer.vocab_size])  # not padding rows


@partial(jax.jit, static_argnames="model")
def _unstacked(params: dict, model: Model) -> Weights:
    """The weights in the compute dtype, one array a layer, sharded as the parameters are."""
    layers, whole = [{} for _ in range(model.n_layers)], {}
    for p in dims.PARAMETERS:
        *parents, last = p.name.split("/")
        array = params
        for name in (*parents, last):
            array = array[name]
        layered, letters = p.dims.startswith("L"), p.dims.removeprefix("L")
        for layer, each in enumerate(array) if layered else [(None, array)]:
            each = each.astype(jnp.float32 if p.kind == "norm" else model.compute_dtype)
            axes = [sharding.PARAMETER_AXES.get(letter) for letter in letters]
            if n := len(p.fan_in):
                each, axes = each.reshape(*dims.matrix(p, model)), [axes[0], axes[n]]
            each = jax.lax.with_sharding_constraint(each, jax.sharding.PartitionSpec(*axes))
            (whole if layer is None else layers[layer])[parents[-1]] = each
    return Weights(whole["embed"], tuple(layers), whole["final_norm"], whole["lm_head"])
