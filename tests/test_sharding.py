"""The mesh and what is split over it."""

import jax
import pytest
from jax.sharding import PartitionSpec

from tinyllama_jax import config as c
from tinyllama_jax import sharding

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
    with pytest.raises(c.UserError, match="does not come to the 8 devices here"):
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
    with pytest.raises(c.UserError, match=r"--mesh.tensor=4: does not divide dimension K=2 of layers/k/kernel \(2, 32, 2, 8\)"):
        sharding.parameter_shardings(mesh, MODEL)


def test_constrain_without_a_mesh_is_nothing():
    x = jax.numpy.ones((2, 3, 4))
    assert sharding.constrain(x, "BSD") is x
