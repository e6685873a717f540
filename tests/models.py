"""Small models with random weights, for the engine and for Transformers, and a tokenizer of 420 pieces."""

import dataclasses
import functools
import inspect
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece

from tinyllama_jax.base import config as c
from tinyllama_jax.base import dims, rope, sharding
from tinyllama_jax.core import model
from tinyllama_jax.hub import llama
from tinyllama_jax.inference import weights
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.sampling import Sampling
from tinyllama_jax.inference.weights import Loaded

FP32 = "params=float32,compute=float32,output=float32"
TINY = c.Model(2, 24, 6, 2, 40, 53, 128, precision=FP32, residual="float32")  # H = 4; every letter another size
GREEDY = Sampling(temperature=0.0)


@functools.cache
def some_params(cfg: c.Model, scale: float = 0.3) -> dict:
    """Random parameters, larger than at the start, so that every part of the model matters to the result."""
    rng = np.random.default_rng(1)
    arrays = {p.name: rng.normal(p.kind == "norm", scale, dims.shape(p, cfg)) for p in dims.PARAMETERS}
    return model.unflatten({name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()})


def loaded(cfg: c.Model = TINY, params: dict | None = None, **axes: int) -> Loaded:
    """A model ready for the engine, on one device or on a mesh with these axes."""
    mesh = c.Mesh(**({"data": 1, "fsdp": 1, "tensor": 1} | axes))
    mesh = sharding.make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])
    params = some_params(dataclasses.replace(cfg, precision=FP32, residual="float32")) if params is None else params
    return Loaded(weights.of_params(params, cfg, mesh), cfg, None, False, Path("none"), mesh)


def run(engine: Engine, *requests: Request) -> list[Request]:
    """Submits requests at once and steps until the engine has nothing left."""
    for request in requests:
        engine.submit(request)
    while engine.busy:
        engine.step()
    return list(requests)


def ids(n: int, seed: int = 0, vocab_size: int = 53) -> list[int]:
    """A random prompt."""
    return np.random.default_rng(seed).integers(0, vocab_size, n).tolist()


def transformers_model(cfg: c.Model, params: dict, **options):
    """The same model in Transformers, in fp32. `options`: of `LlamaConfig`."""
    import torch
    import transformers

    kind, numbers = rope.parse(cfg.rope_type)
    scaled = {"rope_type": kind, "factor": cfg.rope_scaling} | {k: v for k, v in numbers.items() if v is not None}
    config = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_ff,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads,
        head_dim=cfg.d_head,
        max_position_embeddings=cfg.seq_len,
        rms_norm_eps=cfg.norm_eps,
        rope_parameters={"rope_theta": cfg.rope_theta, **(scaled if cfg.rope_scaling > 1 else {"rope_type": "default"})},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,  # its embedding would get no gradient
        **options,
    )
    llama_model = transformers.LlamaForCausalLM(config).eval()
    tensors = {name: torch.tensor(np.array(a)) for name, a in llama.to_hf(params, cfg)}
    llama_model.load_state_dict(tensors, strict=True)
    return llama_model


def transformers_greedy(llama_model, prompt: list[int], n: int) -> list[int]:
    """The n tokens that Transformers' `generate` gives."""
    import torch

    tokens = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "max_new_tokens": n, "eos_token_id": None}
    return llama_model.generate(tokens, **options)[0, len(prompt) :].tolist()


def train_tokenizer(path: Path, **options) -> Path:
    """The demo's kind of SentencePiece model, from a source of Python's library."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(json.decoder).splitlines()),
        model_writer=written,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        **{"add_dummy_prefix": False, "minloglevel": 2, **options},
    )
    path.write_bytes(written.getvalue())
    return path
