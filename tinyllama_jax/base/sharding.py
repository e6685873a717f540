"""The device mesh, and which axis of it each letter of the alphabet is split over."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tinyllama_jax.base import dims
from tinyllama_jax.base.config import Lora, Model
from tinyllama_jax.base.config import Mesh as MeshConfig
from tinyllama_jax.base.errors import UserError

NO_LORA = Lora()
BATCH = ("data", "fsdp")  # a batch is split over both; parameters, their gradients and moments over fsdp and tensor
PARAMETER_AXES = {"D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}
ACTIVATION_AXES = {"B": BATCH, "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh (data, fsdp, tensor) over all devices. Raises UserError if the axes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    axes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    product, free = math.prod(n for n in axes.values() if n > 0), -1 in axes.values()
    if len(devices) % product or (product != len(devices) and not free):
        text, processes = " x ".join(f"{name}={n}" for name, n in axes.items()), len({d.process_index for d in devices})
        own = f"{len(devices)} are here" + (f", in {processes} processes" if processes > 1 else "")
        remedy = "set one axis to -1 for the rest, such as --mesh.data=1 --mesh.fsdp=-1 --mesh.tensor=1"
        raise UserError(f"--mesh: {text} needs {'a multiple of ' * free}{product} devices, and {own}; {remedy}")
    shape = tuple(len(devices) // product if n == -1 else n for n in axes.values())
    try:
        return jax.make_mesh(shape, tuple(axes), axis_types=(AxisType.Auto,) * 3, devices=devices)
    except NotImplementedError:  # on a TPU slice whose physical axes are not products of these
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(placed, tuple(axes), axis_types=(AxisType.Auto,) * 3)


def batch_devices(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """How many parts a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def parameter_shardings(mesh: jax.sharding.Mesh, model: Model, lora: Lora = NO_LORA) -> dict[str, NamedSharding]:
    """Name of an array of the weights -> sharding, from `PARAMETER_AXES`. Raises UserError, with a remedy.

    Errors: an axis does not divide a dimension, two dimensions of a parameter use one axis, or a rule has no parameter.
    """
    out = {}
    for p in dims.arrays(model, lora):
        shape, axes = p.shape, [PARAMETER_AXES.get(letter) for letter in p.dims]
        for letter, size, axis in zip(p.dims, shape, axes, strict=True):
            if axis and axes.count(axis) > 1:
                both = " and ".join(other for other in p.dims if PARAMETER_AXES.get(other) == axis)
                what = f"its dimensions {both} both go over the mesh axis {axis}, which can split one of them"
                raise UserError(f"{p.name} {shape}: {what}; change PARAMETER_AXES in sharding.py or the letters in dims.py")
            if axis and size % mesh.shape[axis]:
                what = f"{axis} {mesh.shape[axis]} does not divide dimension {letter}={size} of {p.name} {shape}"
                raise UserError(f"--mesh: {what}; {mesh.size} devices fit as {_fitting(mesh, model)}")
        out[p.name] = NamedSharding(mesh, PartitionSpec(*axes))
    letters = sorted({letter for p in dims.PARAMETERS for letter in p.dims})
    for letter, axis in PARAMETER_AXES.items():
        if letter not in letters:
            what = f"no parameter has this dimension (there are {', '.join(letters)})"
            raise UserError(f"PARAMETER_AXES[{letter!r}]={axis!r}: {what}; remove the rule from sharding.py")
    return out


def _fitting(mesh: jax.sharding.Mesh, model: Model) -> str:
    """The options of a mesh with as many devices whose axes divide the parameters, as close to `mesh` as possible."""
    sizes = dims.sizes(model)
    common = lambda axis: math.gcd(*(sizes.get(letter, 0) for letter, over in PARAMETER_AXES.items() if over == axis))
    tensor = math.gcd(mesh.shape["tensor"], common("tensor"))
    fsdp = math.gcd(mesh.size // tensor, common("fsdp"))
    return f"--mesh.data={mesh.size // tensor // fsdp} --mesh.fsdp={fsdp} --mesh.tensor={tensor}"


def state_sharding(path: str, shape: tuple[int, ...], table: dict[str, NamedSharding]) -> NamedSharding:
    """The sharding of the leaf at `path` of a train state: that of the parameter whose name ends `path`; none for a scalar.

    `table`: from `parameter_shardings`. Raises UserError for an array that is neither a parameter nor a moment of one.
    """
    if not shape:
        return NamedSharding(next(iter(table.values())).mesh, PartitionSpec())
    for name, where in table.items():
        if f"/{path}".endswith(f"/{name}"):
            return where
    raise UserError(f"{path} {shape}: no such parameter, and would be replicated; add it to PARAMETERS of dims.py")


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """`x`, whose dimensions are `letters`, with the sharding of an activation on the current mesh (`jax.set_mesh`), if any.

    A dimension that its axes do not divide is not split: a single row of inference, for one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    axes = [ACTIVATION_AXES.get(letter, ()) for letter in letters]
    n = lambda over: math.prod(mesh.shape[axis] for axis in ((over,) if isinstance(over, str) else over))
    fits = [over if over and size % n(over) == 0 else None for over, size in zip(axes, x.shape, strict=True)]
    return lax.with_sharding_constraint(x, PartitionSpec(*fits))


def per_device(f: Callable, inputs: tuple[str, ...], output: str) -> Callable:
    """`f` under shard_map, on each device's shard of activations, whose dimensions are the letters `inputs` and `output`."""
    if jax.sharding.get_abstract_mesh().empty:
        return f
    spec = lambda letters: PartitionSpec(*(ACTIVATION_AXES.get(letter) for letter in letters))
    return jax.shard_map(f, in_specs=tuple(map(spec, inputs)), out_specs=spec(output), check_vma=False)


# -- parameters read by the whole batch at once ----------------------------------------------------------------------------
#
# The compiler all-gathers a layer's matrix before its matmul and reduce-scatters its gradient afterwards. It does neither well
# for the embedding and the head: the gradient of a lookup is an all-reduce of the whole table, and a head read in a loop over
# chunks is gathered and reduced in every chunk. So each part of the batch gets its own copy, and the gradients of the copies
# are summed here. (X: the parts, data x fsdp.)


def parts() -> int:
    """X, the number of parts that the current mesh splits a batch into: data x fsdp, or 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else batch_devices(mesh)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_per_part(w: jax.Array, letters: str, dtype: str, reduce_dtype: str) -> jax.Array:
    """[X, *w.shape]: the parameter `w`, whose dimensions are `letters`, all-gathered in `dtype` for each part of a batch.

    The copies are cast back to w's dtype, so that their gradients have it; w's gradient is `sum_of_parts` of theirs.
    """
    gathered = constrain(w.astype(dtype), letters)
    return constrain(jnp.broadcast_to(gathered, (parts(), *w.shape)), "B" + letters).astype(w.dtype)


def _gather_forward(w, letters, dtype, reduce_dtype):
    return gather_per_part(w, letters, dtype, reduce_dtype), jnp.zeros((), w.dtype)


def _gather_backward(letters, dtype, reduce_dtype, like, d_X):
    return (sum_of_parts(d_X, letters, reduce_dtype).astype(like.dtype),)


gather_per_part.defvjp(_gather_forward, _gather_backward)


def sum_of_parts(d_X: jax.Array, letters: str, reduce_dtype: str) -> jax.Array:
    """The sum over X of the gradient parts `d_X` [X, `letters`], sharded as the parameter, in `reduce_dtype`.

    A reduce-scatter over fsdp, then an all-reduce of the shards over data.
    """
    if parts() == 1:
        return d_X[0].astype(reduce_dtype)

    def add(d_X: jax.Array) -> jax.Array:  # on each device, where X is 1
        shard = lax.psum_scatter(d_X[0], "fsdp", scatter_dimension=letters.index("D"), tiled=True)
        return lax.psum(shard, "data")

    # explicit, because compilers turn a sum and a constraint into an all-reduce of the whole array over data x fsdp
    parts_spec = PartitionSpec(BATCH, *(ACTIVATION_AXES.get(letter) for letter in letters))
    shard_spec = PartitionSpec(*(PARAMETER_AXES.get(letter) for letter in letters))
    return jax.shard_map(add, in_specs=parts_spec, out_specs=shard_spec)(d_X.astype(reduce_dtype))
