"""Low-rank adapters (LoRA, arXiv:2106.09685) over frozen weights, which may be in 4 bits (QLoRA, arXiv:2305.14314).

The parameters of a run with `lora.rank` are those of `dims.arrays`: beside the frozen kernel of a matrix W [in, out] stand
`lora_a` A [in, R] and `lora_b` B [R, out], and the layer computes x W + alpha / R x (x A) B. Only A and B train.
"""

import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tinyllama_jax.base import dims
from tinyllama_jax.base.config import Config, Lora, Model
from tinyllama_jax.core.linear import frozen, linear, swiglu
from tinyllama_jax.kernels import nf4

ADAPTERS = ("lora_a", "lora_b")


def project(einsum: str, reduce_dtype: str, x: jax.Array, weights: dict, lora: Lora) -> jax.Array:
    """x W + scale x (x A) B. `weights`: of one matrix, "kernel" and, if it has adapters, "lora_a" and "lora_b"."""
    y = frozen(einsum, x, weights["kernel"])
    if "lora_a" not in weights:
        return y
    inputs, y_dims = einsum.split("->")
    x_dims, kernel_dims = inputs.split(",")
    contracted = "".join(letter for letter in kernel_dims if letter not in y_dims)
    u_BSR = linear(f"{x_dims},{contracted}r->bsr", reduce_dtype, x, weights["lora_a"])
    return y + lora.scale * linear(f"bsr,r{kernel_dims[len(contracted) :]}->{y_dims}", reduce_dtype, u_BSR, weights["lora_b"])


def down(reduce_dtype: str, gate_BSF: jax.Array, up_BSF: jax.Array, weights: dict, lora: Lora) -> jax.Array:
    """SwiGLU's second half, [B, S, D], with adapters. Backward saves only gate and up, as `linear.down` does."""

    @functools.partial(jax.checkpoint, prevent_cse=False)  # this is in the scan over layers, where XLA does not undo it
    def second_half(gate_BSF: jax.Array, up_BSF: jax.Array, weights: dict) -> jax.Array:
        return project("bsf,fd->bsd", reduce_dtype, swiglu(gate_BSF, up_BSF), weights, lora)

    return second_half(gate_BSF, up_BSF, weights)


# -- the parameters -----------------------------------------------------------------------------------------------------


def split(params: dict) -> tuple[dict, dict]:
    """(what trains, what is frozen) of a run's parameters: without adapters, all of them and nothing."""
    layers = params.get("layers", {})
    trained = {name: {key: matrix[key] for key in ADAPTERS} for name, matrix in layers.items() if "lora_a" in matrix}
    if not trained:
        return params, {}
    others = {name: {key: w for key, w in matrix.items() if key not in ADAPTERS} for name, matrix in layers.items()}
    return {"layers": trained}, params | {"layers": others}


def join(trained: dict, others: dict) -> dict:
    """Inverse of `split`."""
    if not others:
        return trained
    return others | {"layers": {name: w | trained["layers"].get(name, {}) for name, w in others["layers"].items()}}


def start(params: dict, config: Config) -> dict:
    """The parameters that training begins with: `params` frozen as `lora.base` says, and new adapters, whose product is 0.

    As in PEFT, A is uniform in +-1/sqrt(inputs), kaiming_uniform_ with a = sqrt(5), and B is 0.
    """
    flat, by_name = {}, {array.name: array for array in dims.arrays(config.model, config.lora)}
    for p in dims.PARAMETERS:
        weight = functools.reduce(dict.__getitem__, p.name.split("/"), params)
        if p.name in by_name:
            flat[p.name] = weight.astype(by_name[p.name].dtype)
        else:
            flat[p.name] = jax.lax.map(functools.partial(nf4.quantize, n_inputs=len(p.fan_in)), weight)
        a, b = (by_name.get(f"{p.name.removesuffix('kernel')}{key}") for key in ADAPTERS)
        if a:
            key = jax.random.fold_in(jax.random.key(config.train.seed), zlib.crc32(a.name.encode()) >> 1)
            bound = dims.matrix(p, config.model)[0] ** -0.5
            flat[a.name] = jax.random.uniform(key, a.shape, a.dtype, -bound, bound)
            flat[b.name] = jnp.zeros(b.shape, b.dtype)
    return unflatten(flat)


def merge(params: dict, model: Model, lora: Lora, put: Callable[[jax.Array], jax.Array] = lambda a: a) -> dict:
    """The weights W + scale x A B, fp32, in the layout without adapters. `put`: applied to each array when it is computed."""
    flat = {}
    for p in dims.PARAMETERS:
        *parents, last = p.name.split("/")
        matrix = functools.reduce(dict.__getitem__, parents, params)
        flat[p.name] = put(_merged(matrix[last], *(matrix.get(key) for key in ADAPTERS), len(p.fan_in), lora.scale))
    return unflatten(flat)


@functools.partial(jax.jit, static_argnames=("n_inputs", "scale"))
def _merged(kernel: jax.Array | nf4.Nf4, a: jax.Array | None, b: jax.Array | None, n_inputs: int, scale: float) -> jax.Array:
    if a is None and not isinstance(kernel, dict):
        return kernel.astype(jnp.float32)
    of = lambda layer: of_layer(*layer, n_inputs=n_inputs, scale=scale)
    return jax.lax.map(of, (kernel,) if a is None else (kernel, a, b))


def of_layer(kernel: jax.Array | nf4.Nf4, *adapters: jax.Array, n_inputs: int, scale: float | jax.Array) -> jax.Array:
    """The weights W + scale x A B of one layer's matrix, fp32. `n_inputs`: how many of its dimensions are inputs."""
    w = nf4.dequantize(kernel, n_inputs, jnp.float32) if isinstance(kernel, dict) else kernel.astype(jnp.float32)
    return w + scale * jnp.tensordot(*adapters, axes=1, precision="highest") if adapters else w


def unflatten(flat: dict) -> dict:
    """A nested dict of `flat`, whose keys are paths such as "layers/q/kernel"."""
    out: dict = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return out
