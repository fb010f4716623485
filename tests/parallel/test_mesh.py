"""The mesh: five axes in one order, sizes that multiply to the devices."""

import jax
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.errors import UserError
from moe_jax.parallel import mesh


def test_all_axes_are_there_in_order_and_auto():
    made = mesh.make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    assert made.axis_names == ("data", "fsdp", "expert", "context", "tensor")
    assert made.devices.shape == (2, 1, 2, 1, 2)
    assert set(made.axis_types) == {jax.sharding.AxisType.Auto}
    assert mesh.AXES == made.axis_names
    assert mesh.TOKEN_AXES == ("data", "fsdp", "expert", "context")


def test_neighbours_share_the_last_axis():
    made = mesh.make_mesh(MeshConfig(data=4, tensor=2))
    ids = np.vectorize(lambda d: d.id)(made.devices).reshape(4, 2)
    first = min(d.id for d in jax.devices())
    np.testing.assert_array_equal(ids, first + np.arange(8).reshape(4, 2))


@pytest.mark.parametrize(("expert", "data"), [(1, 8), (2, 4), (8, 1)])
def test_data_takes_the_devices_that_remain(expert, data):
    made = mesh.make_mesh(MeshConfig(expert=expert))
    assert made.shape["data"] == data


def test_devices_can_be_chosen():
    made = mesh.make_mesh(MeshConfig(expert=2), jax.devices()[2:4])
    assert list(made.devices.flat) == jax.devices()[2:4]


@pytest.mark.parametrize(
    ("sizes", "product"),
    [(dict(data=3), "data=3"), (dict(expert=3), "expert=3"), (dict(data=16), "16")],
)
def test_a_product_that_does_not_fit_says_how_many_there_are(sizes, product):
    with pytest.raises(UserError) as caught:
        mesh.make_mesh(MeshConfig(**sizes))
    message = str(caught.value)
    assert product in message and "there are 8" in message
    assert "--xla_force_host_platform_device_count" in message


def test_the_mesh_says_for_which_platform_is_traced(absent_gpus):
    assert mesh.platform() == "cpu"
    with absent_gpus(expert=4):
        assert mesh.platform() == "gpu"
