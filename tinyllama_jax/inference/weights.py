"""Weights for inference: one array a layer, on the devices, from a run folder, a Hugging Face folder or a GGUF file."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tinyllama_jax.base import dims, files, sharding
from tinyllama_jax.base.config import Mesh, Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import model as model_lib
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.hub import llama
from tinyllama_jax.run import checkpoint

KINDS = ("auto", "float32", "bfloat16")


class Weights(NamedTuple):
    """A model's parameters. The training layout [L, ...] would have every layer copied out of the stack at each token."""

    embed_VD: jax.Array
    layers: tuple[dict[str, jax.Array], ...]  # "q", "attention_norm", ... -> array
    final_norm_D: jax.Array
    head_DV: jax.Array


class Loaded(NamedTuple):
    """A checkpoint, ready for the engine."""

    weights: Weights
    model: Model
    tokenizer: Tokenizer
    begin_with_bos: bool
    folder: Path
    mesh: jax.sharding.Mesh


def load(path: str | Path, step: int | None = None, weights: str = "auto") -> Loaded:
    """Reads a run folder (its newest step, or `step`), or a Hugging Face folder.

    `weights`: one of KINDS. auto: fp32 on a CPU, since XLA's bf16 is many times slower on it; elsewhere the model's compute
    dtype. Rows of the vocabulary without a token (padding) are left out. Beside the result, memory for one parameter is
    needed. Raises UserError.
    """
    files.check_local("--checkpoint", path)
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run folder or a Hugging Face folder")
    if (path / "checkpoints").is_dir():
        params, config, _ = checkpoint.load_params(path, step)
        model, tokenizer, arrays = config.model, tokenizer_lib.load(path / "tokenizer"), _unstacked(params)
    elif step is not None:
        raise UserError(f"--step {step}: {path} is not a run folder, so it has no steps")
    else:
        (tensors, model), tokenizer = llama.open_folder(path), tokenizer_lib.load(path)
        arrays = llama.arrays(tensors, model, str(path))
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(f"{path}: its tokenizer has {tokenizer.vocab_size:,} pieces, and its model only {model.vocab_size:,}")
    model = for_inference(dataclasses.replace(model, vocab_size=tokenizer.vocab_size), weights)
    mesh = make_mesh(model)
    return Loaded(
        place(arrays, model, mesh), model, tokenizer, tokenizer_lib.documents_begin_with_bos(path), path, mesh
    )


def for_inference(model: Model, weights: str = "auto") -> Model:
    """`model` with the dtype in which `weights` are computed on this device."""
    compute = weights
    if weights == "auto":
        compute = "float32" if jax.default_backend() == "cpu" else model.compute_dtype
    return dataclasses.replace(
        model,
        precision=f"params=float32,compute={compute},output=float32",
        residual="float32" if compute == "float32" else model.residual,
        attention="auto",  # the kernel of training may not run on this device
    )


def make_mesh(model: Model) -> jax.sharding.Mesh:
    """The mesh over this machine's devices: tensor parallel as far as the heads allow, and copies beyond that."""
    sizes, n = dims.sizes(model), len(jax.devices())
    tensor = math.gcd(n, *(sizes[letter] for letter, axis in sharding.PARAMETER_AXES.items() if axis == "tensor"))
    return sharding.make_mesh(Mesh(data=n // tensor, fsdp=1, tensor=tensor))


def _unstacked(params: dict) -> Iterator[tuple[dims.Parameter, int | None, np.ndarray]]:
    """(parameter, layer, array) of a run's parameters, which are removed from `params` one by one."""
    for p in dims.PARAMETERS:
        *parents, last = p.name.split("/")
        array = functools.reduce(dict.__getitem__, parents, params).pop(last)
        if p.dims.startswith("L"):
            for layer in range(len(array)):
                yield p, layer, array[layer]
        else:
            yield p, None, array


def place(arrays: Iterator[tuple[dims.Parameter, int | None, np.ndarray]], model: Model, mesh: jax.sharding.Mesh) -> Weights:
    """Puts each array on the devices, without its padding."""
    layers, whole = [{} for _ in range(model.n_layers)], {}
    for p, layer, array in arrays:
        letters = p.dims.removeprefix("L")
        array = array[tuple(slice(dims.sizes(model)[letter]) for letter in letters)]
        # norms stay fp32: they are small, and the model multiplies by them in fp32
        array = np.asarray(array, np.float32 if p.kind == "norm" else jnp.dtype(model.compute_dtype), order="C")
        where = NamedSharding(mesh, PartitionSpec(*(sharding.PARAMETER_AXES.get(letter) for letter in letters)))
        (whole if layer is None else layers[layer])[p.name.split("/")[-2]] = jax.device_put(array, where)
    return Weights(whole["embed"], tuple(layers), whole["final_norm"], whole["lm_head"])


def of_params(params: dict, model: Model, mesh: jax.sharding.Mesh) -> Weights:
    """The weights of a trainer's parameters, which stay as they are; both then take memory."""
    return place(_unstacked(model_lib.unflatten(model_lib.flatten(params))), model, mesh)
