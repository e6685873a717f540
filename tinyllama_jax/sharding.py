"""The device mesh, and which axis of it each letter of the alphabet is split over."""

from __future__ import annotations

import math

import jax
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


def batch_devices(mesh: jax.sharding.Mesh) -> int:
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
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(ACTIVATION_AXES.get(letter) for letter in letters)))
