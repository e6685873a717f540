"""The mesh and what is split over it."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tinyllama_jax.base import config as c
from tinyllama_jax.base import dims, sharding
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core.program import build

MODEL = c.Model(2, 32, 4, 2, 64, 100, 16)


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        (c.Mesh(), (1, 8, 1)),
        (c.Mesh(data=-1, fsdp=2), (4, 2, 1)),
        (c.Mesh(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    ],
)
def test_minus_one_is_what_is_left(mesh, shape):
    assert tuple(sharding.make_mesh(mesh).shape.values()) == shape


@pytest.mark.parametrize("mesh", [c.Mesh(data=3), c.Mesh(data=2, fsdp=2, tensor=1), c.Mesh(data=16, fsdp=1)])
def test_a_mesh_that_is_not_the_devices(mesh):
    with pytest.raises(UserError, match=r"needs (a multiple of )?\d+ devices, and 8 are here; set one axis to -1 for the rest"):
        sharding.make_mesh(mesh)


def test_every_parameter_is_split_over_fsdp_and_the_wide_ones_over_tensor():
    mesh = sharding.make_mesh(c.Mesh(data=2, fsdp=2, tensor=2))
    specs = {name: s.spec for name, s in sharding.parameter_shardings(mesh, MODEL).items()}
    assert specs["layers/q/kernel"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert specs["layers/down/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["embed/embedding"] == PartitionSpec("tensor", "fsdp")
    assert all("fsdp" in spec for spec in specs.values())


def test_what_does_not_divide_is_refused_with_the_shape():
    mesh = sharding.make_mesh(c.Mesh(data=1, fsdp=2, tensor=4))
    with pytest.raises(UserError, match=r"tensor 4 does not divide dimension K=2 of layers/k/kernel \(2, 32, 2, 8\)") as error:
        sharding.parameter_shardings(mesh, MODEL)
    assert str(error.value).endswith("; 8 devices fit as --mesh.data=1 --mesh.fsdp=4 --mesh.tensor=2")
    sharding.parameter_shardings(sharding.make_mesh(c.Mesh(1, 4, 2)), MODEL)
    with pytest.raises(UserError, match=r"^--mesh: fsdp 3 does not divide .*3 devices fit as --mesh.data=3 --mesh.fsdp=1 "):
        sharding.parameter_shardings(sharding.make_mesh(c.Mesh(1, -1, 1), jax.devices()[:3]), MODEL)


def test_every_rule_has_a_parameter_and_splits_one_of_its_dimensions():
    assert sharding.PARAMETER_AXES.keys() <= set("".join(p.dims for p in dims.PARAMETERS))
    for p in dims.PARAMETERS:
        axes = [sharding.PARAMETER_AXES[letter] for letter in p.dims if letter in sharding.PARAMETER_AXES]
        assert len(set(axes)) == len(axes), p.name


def test_every_leaf_of_the_state_is_a_scalar_a_parameter_or_a_moment_of_one(monkeypatch):
    mesh = sharding.make_mesh(c.Mesh(2, 2, 2))
    table = sharding.parameter_shardings(mesh, MODEL)
    assert sharding.state_sharding("opt_state/0/mu/layers/q/kernel", (2, 32, 4, 8), table) == table["layers/q/kernel"]
    assert sharding.state_sharding("skipped", (), table).spec == PartitionSpec()
    for unknown in ("params/layers/bias", "params/unembed/embedding", "embedding"):
        with pytest.raises(UserError, match=rf"^{unknown} \(32,\): no such parameter.*PARAMETERS of dims.py"):
            sharding.state_sharding(unknown, (32,), table)
    config = c.Config("x", MODEL, c.Data({"x": 1}), c.Optim(1e-3, 1e-4, 2, 0.1, 1.0), c.Train(2, 64, 1), c.Checkpoint(1))
    build(config, mesh)
    monkeypatch.setattr(dims, "PARAMETERS", tuple(p for p in dims.PARAMETERS if p.name != "layers/gate/kernel"))
    with pytest.raises(UserError, match=r"/layers/gate/kernel \(2, 32, 64\): no such parameter"):
        build(config, mesh)


@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_copies_are_gathered_and_their_gradients_summed_into_shards(reduce_dtype):
    w = jax.random.normal(jax.random.key(0), (8, 6))
    scale = np.arange(1, 5, dtype=np.float32)  # one number for each of the 4 parts of the batch; their sum is 10
    mesh = sharding.make_mesh(c.Mesh(2, 2, 2))

    @jax.jit
    def f(w):
        total = lambda w: (sharding.gather_per_part(w, "DV", "float32", reduce_dtype) * scale[:, None, None]).sum()
        return sharding.gather_per_part(w, "DV", "float32", reduce_dtype), jax.grad(total)(w)

    with jax.set_mesh(mesh):
        copies, gradient = f(jax.device_put(w, NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))))
    np.testing.assert_array_equal(copies, np.broadcast_to(w, (4, 8, 6)))
    assert copies.sharding.shard_shape(copies.shape) == (1, 8, 3) and gradient.sharding.shard_shape((8, 6)) == (4, 3)
    np.testing.assert_array_equal(gradient, np.full((8, 6), 10.0))
    assert gradient.dtype == np.float32
    np.testing.assert_array_equal(jax.grad(lambda w: sharding.gather_per_part(w, "DV", "float32", reduce_dtype).sum())(w), 1)


def test_gradients_of_copies_are_not_rounded_to_the_dtype_that_these_are_gathered_in():
    """Each of 4 parts gives 1 + 2^-12, which is 1 in bf16."""
    w, mesh = np.ones((8, 6), np.float32), sharding.make_mesh(c.Mesh(2, 2, 2))
    with jax.set_mesh(mesh):
        for reduce_dtype, want in (("float32", 4 + 2.0**-10), ("bfloat16", 4)):
            total = lambda w, to=reduce_dtype: (sharding.gather_per_part(w, "DV", "bfloat16", to) * (1 + 2.0**-12)).sum()
            where = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
            np.testing.assert_array_equal(jax.jit(jax.grad(total))(jax.device_put(w, where)), want)


def test_constrain_without_a_mesh_is_nothing():
    x = jax.numpy.ones((2, 3, 4))
    assert sharding.constrain(x, "BSD") is x


def test_an_axis_can_split_one_dimension_of_a_parameter(monkeypatch):
    monkeypatch.setitem(sharding.PARAMETER_AXES, "V", "fsdp")
    with pytest.raises(UserError, match=r"embed/embedding \(100, 32\): .* V and D both go over the mesh axis fsdp"):
        sharding.parameter_shardings(sharding.make_mesh(c.Mesh(2, 2, 2)), MODEL)


def test_a_rule_that_no_parameter_uses(monkeypatch):
    monkeypatch.setitem(sharding.PARAMETER_AXES, "E", "tensor")
    with pytest.raises(UserError, match=r"PARAMETER_AXES\['E'\]='tensor': no parameter has .*D, F, H, K, L, N, V"):
        sharding.parameter_shardings(sharding.make_mesh(c.Mesh(2, 2, 2)), MODEL)
