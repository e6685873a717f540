"""The device mesh, and which axis of it each letter of the alphabet is split over."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tinyllama_jax import dims
from tinyllama_jax.config import Mesh as MeshConfig
from tinyllama_jax.config import Model, UserError

BATCH = ("data", "fsdp")  # a batch is split over both; parameters, their gradients and moments over fsdp and tensor
PARAMETER_AXES = {"D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}
ACTIVATION_AXES = {"B": BATCH, "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh (data, fsdp, tensor) over all devices. Raises UserError if the axes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    axes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    said = math.prod(n for n in axes.values() if n > 0)
    text = " x ".join(f"{name}={n}" for name, n in axes.items())
    if len(devices) % said or (said != len(devices) and -1 not in axes.values()):
        raise UserError(f"--mesh: {text} does not come to the {len(devices)} devices here; set one axis to -1 for the rest")
    shape = tuple(len(devices) // said if n == -1 else n for n in axes.values())
    return jax.make_mesh(shape, tuple(axes), axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_devices(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """How many parts a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def parameter_shardings(mesh: jax.sharding.Mesh, model: Model) -> dict[str, NamedSharding]:
    """Parameter name -> sharding. Raises UserError where a dimension does not divide, with the shape and the remedy."""
    out = {}
    for p in dims.PARAMETERS:
        for letter, size in zip(p.dims, dims.shape(p, model), strict=True):
            axis = PARAMETER_AXES.get(letter)
            if axis and size % mesh.shape[axis]:
                raise UserError(
                    f"--mesh.{axis}={mesh.shape[axis]}: does not divide dimension {letter}={size} of {p.name} "
                    f"{dims.shape(p, model)}; choose a divisor of {size}"
                )
        out[p.name] = NamedSharding(mesh, PartitionSpec(*(PARAMETER_AXES.get(letter) for letter in p.dims)))
    return out


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """`x`, whose dimensions are `letters`, laid out as an activation on the mesh in force (`jax.set_mesh`), if there is one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return lax.with_sharding_constraint(x, PartitionSpec(*(ACTIVATION_AXES.get(letter) for letter in letters)))


# -- parameters that all of a batch reads at once -------------------------------------------------------------------------
#
# The compiler gathers a layer's matrix before its matmul and reduces its gradient into shards after. It does neither well for
# the embedding and the head: the gradient of a lookup is an all-reduce of the whole table, and a head read in a loop over
# chunks is gathered and reduced in every chunk. So each part of the batch has its own copy, and the copies' gradients are
# added up here. (X: the parts, data x fsdp.)


def parts() -> int:
    """X, the parts that the mesh in force splits a batch into: data x fsdp, or 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else batch_devices(mesh)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def copies(w: jax.Array, letters: str, dtype: str, reduce_dtype: str) -> jax.Array:
    """[X, *w.shape] in `dtype`: the parameter `w`, whose dimensions are `letters`, gathered for each part of a batch.

    Its gradient is `sum_of_parts` of theirs.
    """
    w = constrain(w.astype(dtype), letters)
    return constrain(jnp.broadcast_to(w, (parts(), *w.shape)), "B" + letters)


def _copies_forward(w, letters, dtype, reduce_dtype):
    return copies(w, letters, dtype, reduce_dtype), jnp.zeros((), w.dtype)


def _copies_backward(letters, dtype, reduce_dtype, like, d_X):
    return (sum_of_parts(d_X, letters, reduce_dtype).astype(like.dtype),)


copies.defvjp(_copies_forward, _copies_backward)


def sum_of_parts(d_X: jax.Array, letters: str, reduce_dtype: str) -> jax.Array:
    """The sum over X of `d_X` [X, `letters`], each device's part of a gradient, laid out as the parameter; in `reduce_dtype`.

    Over fsdp first, where each device keeps its shard of the sum (a reduce-scatter), then the shards over data (an all-reduce).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return d_X.astype(reduce_dtype).sum(axis=0)

    def add(d_X: jax.Array) -> jax.Array:  # on each device, where X is 1
        shard = lax.psum_scatter(d_X[0], "fsdp", scatter_dimension=letters.index("D"), tiled=True)
        return lax.psum(shard, "data")

    # said by hand: of a sum and a constraint, TPU compilers make an all-reduce of the whole
    parts_spec = PartitionSpec(BATCH, *(ACTIVATION_AXES.get(letter) for letter in letters))
    shard_spec = PartitionSpec(*(PARAMETER_AXES.get(letter) for letter in letters))
    return jax.shard_map(add, in_specs=parts_spec, out_specs=shard_spec)(d_X.astype(reduce_dtype))
