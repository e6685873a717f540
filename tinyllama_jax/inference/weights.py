"""Loads weights for inference, one array per layer, from a run folder, a Hugging Face folder or a GGUF file."""

import atexit
import dataclasses
import functools
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from tinyllama_jax.base import dims, files, sharding
from tinyllama_jax.base.config import Lora, Mesh, Model
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import lora as lora_lib
from tinyllama_jax.core.model import NO_LORA
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.export import gguf_tokenizer
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.hub import gguf, llama, peft
from tinyllama_jax.inference.quantize import GROUP, Int4, Int8, int4, int8
from tinyllama_jax.run import checkpoint

KINDS = ("auto", "float32", "bfloat16", "int8", "int4")


class Stack(NamedTuple):
    """The layers as a trainer keeps them: [L, ...], in fp32, or frozen and with adapters."""

    arrays: dict[str, dict]  # "q", "attention_norm", ... -> what `dims.arrays` lists of it
    scale: float  # of the adapters
    one: float = 1.0  # see `in_stack`


class Weights(NamedTuple):
    """A model's parameters by layer. With the training layout [L, ...] each token would copy every layer out of the stack."""

    embed_VD: jax.Array | Int8 | Int4
    # "q", "attention_norm", ... of each layer; a matrix as [in, out], heads joined. Only scoring takes a `Stack`
    layers: tuple[dict[str, jax.Array | Int8 | Int4], ...] | Stack
    final_norm_D: jax.Array
    head_DV: jax.Array | Int8 | Int4


class Loaded(NamedTuple):
    """A checkpoint, ready for the engine."""

    weights: Weights
    model: Model
    tokenizer: Tokenizer
    begin_with_bos: bool
    folder: Path  # with the tokenizer's files, chat template included
    mesh: jax.sharding.Mesh


def load(path: str | Path, step: int | None = None, weights: str = "auto", option: str = "--checkpoint") -> Loaded:
    """Reads a run folder (its newest step, or `step`), a Hugging Face folder, a PEFT adapter folder or a GGUF file.

    Adapters are merged into the weights.

    `weights`: their type in memory, one of KINDS; auto: fp32 on a CPU, elsewhere the compute dtype. `option`: what error
    messages call `path`. Rows of the vocabulary without a token (padding) are left out. Needs the memory of the result and of
    one parameter. Raises UserError.
    """
    files.check_local(option, path)
    path, folder = Path(path), Path(path)
    if not path.exists():
        raise UserError(f"{option} {path}: no such file or folder; give a run folder, a Hugging Face folder or a GGUF file")
    if (path / "checkpoints").is_dir():
        params, config, _ = checkpoint.load_params(path, step)
        model, tokenizer, arrays = config.model, tokenizer_lib.load(path / "tokenizer"), _unstacked(params)
    elif step is not None:
        raise UserError(f"--step {step}: {path} is not a run folder, so it has no steps")
    elif gguf.is_gguf(path):
        whole, folder = gguf.read(path), _scratch()
        model, tokenizer = whole.model, gguf_tokenizer.from_gguf(whole.metadata, folder, str(path))
        arrays = llama.arrays(whole.tensors, model, str(path))
    else:
        gguf.check_named(path, option)
        (tensors, model), folder = peft.open_folder(path), peft.with_tokenizer(path)
        tokenizer = tokenizer_lib.load(folder)
        arrays = llama.arrays(tensors, model, str(path))
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(f"{path}: its tokenizer has {tokenizer.vocab_size:,} pieces, and its model only {model.vocab_size:,}")
    model = for_inference(dataclasses.replace(model, vocab_size=tokenizer.vocab_size), weights)
    mesh, begin_with_bos = make_mesh(model), tokenizer_lib.documents_begin_with_bos(folder)
    return Loaded(place(arrays, model, mesh, weights), model, tokenizer, begin_with_bos, folder, mesh)


def _scratch() -> Path:
    """A folder for a GGUF's tokenizer, removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="tinyllama_jax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def for_inference(model: Model, weights: str = "auto") -> Model:
    """`model` with the dtype in which this device computes with `weights`: fp32 on a CPU, which has no other units."""
    if jax.default_backend() == "cpu":
        compute = "float32"
    else:
        compute = weights if weights in ("float32", "bfloat16") else model.compute_dtype
    return dataclasses.replace(
        model,
        precision=f"params=float32,compute={compute},output=float32",
        residual="float32" if compute == "float32" else model.residual,
        attention="auto",  # the kernel of training may not run on this device
    )


def make_mesh(model: Model) -> jax.sharding.Mesh:
    """The mesh over this machine's devices: tensor parallel as far as the model's sizes allow; further devices hold copies."""
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


def place(
    arrays: Iterator[tuple[dims.Parameter, int | None, np.ndarray]],
    model: Model,
    mesh: jax.sharding.Mesh,
    weights: str = "auto",
) -> Weights:
    """Puts each array on the devices, without its padding, in the type `weights` (one of KINDS). Raises UserError."""

    def put(p: dims.Parameter, array: np.ndarray) -> jax.Array | Int8 | Int4:
        array = array[tuple(slice(dims.sizes(model)[letter]) for letter in p.dims.removeprefix("L"))]
        array, axes = _matrix(p, array, model)
        if p.kind != "norm" and weights in ("int8", "int4"):
            return _small(weights, *((array, axes) if p.fan_in else (array.T, axes[::-1])), mesh, p.name)
        # norms stay fp32: they are small, and the model multiplies by them in fp32
        stored = "float32" if p.kind == "norm" else weights if weights == "bfloat16" else model.compute_dtype
        array = np.asarray(array, jnp.dtype(stored), order="C")
        if stored == "bfloat16" and model.compute_dtype == "float32":
            array = array.view(np.uint16)  # see quantize.numbers
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))

    return _assembled(((p, layer, put(p, array)) for p, layer, array in arrays), model)


def of_trainer(params: dict, lora: Lora = NO_LORA) -> Weights:
    """A trainer's own parameters as `Weights`, not copied: a layer is merged and cast when it is computed."""
    stack = Stack(params["layers"], lora.scale if lora.rank else 0.0)
    return Weights(params["embed"]["embedding"], stack, params["final_norm"]["scale"], params["lm_head"]["kernel"])


def in_stack(stack: Stack, model: Model) -> dict[str, jax.Array]:
    """The weights of one layer of a `Stack`, as one of `Weights.layers`. `stack`: with the arrays of this layer."""
    layer, arrays = {}, stack.arrays
    for p in (p for p in dims.PARAMETERS if p.dims.startswith("L")):
        _, name, last = p.name.split("/")
        adapters = [arrays[name][key] for key in lora_lib.ADAPTERS if key in arrays[name]]
        merged = lora_lib.of_layer(arrays[name][last], *adapters, n_inputs=len(p.fan_in), scale=stack.scale)
        # times a 1 that the compiler does not know: else XLA for TPUs casts the whole stack before the loop, as a second copy,
        # whatever optimization barriers are in the loop
        layer[name] = _gathered(*_matrix(p, (merged * stack.one).astype(_dtype(p, model)), model))
    return layer


def _gathered(part: jax.Array, axes: list[str | None]) -> jax.Array:
    """A norm or matrix that is split over mesh `axes`, gathered over fsdp.

    Left to XLA for GPUs, an all-gather of columns has the whole stack transposed before the loop: a third of a second copy.
    """
    if "fsdp" not in axes or jax.sharding.get_abstract_mesh().shape["fsdp"] == 1:
        return part
    at = axes.index("fsdp")

    def gather(part: jax.Array) -> jax.Array:
        parts = lax.all_gather(part, "fsdp")  # [X, ...]
        return jnp.moveaxis(parts, 0, at).reshape(*part.shape[:at], -1, *part.shape[at + 1 :])

    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in axes))
    return jax.shard_map(gather, in_specs=PartitionSpec(*axes), out_specs=whole, check_vma=False)(part)


def of_params(params: dict, model: Model, mesh: jax.sharding.Mesh, lora: Lora = NO_LORA) -> Weights:
    """A copy of a trainer's parameters as `Weights` in the compute dtype, sharded as these are; both are then in memory."""
    with jax.set_mesh(mesh):
        return _of_params(params, model, lora)


@functools.partial(jax.jit, static_argnames=("model", "lora"))
def _of_params(params: dict, model: Model, lora: Lora) -> Weights:
    params = lora_lib.merge(params, model, lora) if lora.rank else params
    copy = jax.tree.map(lambda a: a, params)  # new dicts, which `_unstacked` empties
    return _assembled(((p, layer, _weight(p, array, model)) for p, layer, array in _unstacked(copy)), model)


def _dtype(p: dims.Parameter, model: Model) -> str:
    return "float32" if p.kind == "norm" else model.compute_dtype


def _weight(p: dims.Parameter, array: jax.Array, model: Model) -> jax.Array:
    array, axes = _matrix(p, array.astype(_dtype(p, model)), model)
    return lax.with_sharding_constraint(array, PartitionSpec(*axes))


def _matrix(p: dims.Parameter, array: np.ndarray | jax.Array, model: Model) -> tuple[np.ndarray | jax.Array, list[str | None]]:
    """The array of one layer, a matrix as [in, out], and the mesh axes of its dimensions.

    If heads were a dimension of their own, XLA's CPU backend would transpose o's matrix at each token.
    """
    axes = [sharding.PARAMETER_AXES.get(letter) for letter in p.dims.removeprefix("L")]
    return (array.reshape(dims.matrix(p, model)), [axes[0], axes[len(p.fan_in)]]) if p.fan_in else (array, axes)


def _assembled(arrays: Iterator[tuple[dims.Parameter, int | None, jax.Array]], model: Model) -> Weights:
    layers, whole = [{} for _ in range(model.n_layers)], {}
    for p, layer, array in arrays:
        (whole if layer is None else layers[layer])[p.name.split("/")[-2]] = array
    return Weights(whole["embed"], tuple(layers), whole["final_norm"], whole["lm_head"])


def _small(weights: str, array_IO: np.ndarray, axes: list[str | None], mesh: jax.sharding.Mesh, name: str) -> Int8 | Int4:
    """A matrix in 8 or 4 bits on the devices; it is rounded on the first one."""
    if weights == "int4" and len(array_IO) % GROUP:
        raise UserError(
            f"--weights int4: {name} has {len(array_IO)} inputs, which are not whole groups of {GROUP}; use --weights int8"
        )
    small = (int8 if weights == "int8" else int4)(np.asarray(array_IO, np.float32))
    specs = Int8((axes[0], axes[1]), (axes[1],)) if weights == "int8" else Int4((axes[0], None, axes[1]), (axes[0], axes[1]))

    def put(a: jax.Array, spec: tuple[str | None, ...]) -> jax.Array:
        fits = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, a.shape, strict=True)]
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*fits)))

    return type(small)(*map(put, small, specs))
