"""Samples text during training, from the trainer's own parameters on its own mesh."""

import dataclasses

import jax

from tinyllama_jax.base.config import Config
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.inference import weights
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.sampling import Sampling
from tinyllama_jax.inference.text import eos_ids, first_tokens
from tinyllama_jax.inference.weights import Loaded

TOKENS = 64  # of a sample


def continued(config: Config, params: dict, step: int) -> str:
    """`log.sample` and the model's continuation, drawn at temperature 0.8; `step` is the seed. All processes call this."""
    run = config.folder
    tokenizer = tokenizer_lib.load(run / "tokenizer")
    model, mesh = dataclasses.replace(config.model, attention="auto"), jax.sharding.get_mesh()
    begin_with_bos = tokenizer_lib.documents_begin_with_bos(run)
    loaded = Loaded(weights.of_params(params, model, mesh, config.lora), model, tokenizer, begin_with_bos, run, mesh)
    prompt = first_tokens(tokenizer, begin_with_bos, config.log.sample)
    request = Request(prompt, TOKENS, Sampling(0.8), seed=step, stop_ids=eos_ids(tokenizer))
    for _ in Engine(loaded).stream(request):
        pass
    return tokenizer.decode([id_ for id_ in request.prompt + request.tokens if id_ < tokenizer.vocab_size])  # not padding rows
