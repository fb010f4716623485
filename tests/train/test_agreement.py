"""Copies of replicated state that differ are found, and named."""

# ruff: noqa: I001
import moe_jax  # noqa: F401  Before jax.
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

from moe_jax.errors import RunError
from moe_jax.parallel import host
from moe_jax.train import agreement
from moe_jax.train.agreement import Agreement, odd_ones


@pytest.fixture
def mesh():
    auto = (AxisType.Auto,) * 2
    return jax.make_mesh((4, 2), ("data", "expert"), axis_types=auto)


def state_of(mesh, w=None):
    """A leaf on all devices, one split over `expert`, one split over both."""
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    x = np.arange(48, dtype=np.float32).reshape(8, 6)
    return {
        "all": place(x),
        "scalar": place(np.int32(3)),
        "experts": w if w is not None else place(x, "expert"),
        "own": place(x, ("data", "expert")),
    }


def of(mesh, state, every=2):
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    return Agreement(types.SimpleNamespace(mesh=mesh, abstract=abstract), every)


def with_copies(array, changed):
    """The same array, its copies on the devices `changed` with one other bit."""
    pieces = []
    for shard in array.addressable_shards:
        block = np.array(shard.data)
        if shard.device.id in changed:
            block.reshape(-1).view(np.uint32)[-1] ^= 1
        kind = array.sharding.memory_kind
        place = jax.sharding.SingleDeviceSharding(shard.device, memory_kind=kind)
        pieces.append(jax.device_put(block, place))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, pieces)


def test_equal_copies_agree(mesh):
    state = state_of(mesh)
    compared = of(mesh, state)
    assert [s for s in range(1, 7) if compared.due(s)] == [2, 4, 6]
    compared.check(2, state)
    assert not of(mesh, state, every=0).due(2)
    assert not of(mesh, {"own": state["own"]}).due(2), "nothing has a copy"


def test_one_changed_copy_is_named(mesh):
    state = state_of(mesh)
    compared = of(mesh, state)
    state["all"] = with_copies(state["all"], {5})
    with pytest.raises(RunError) as caught:
        compared.check(4, state)
    message = str(caught.value)
    assert (
        message.startswith("step 4: copies") and "config.train.agree_every" in message
    )
    lines = [line for line in message.splitlines() if line.startswith("  ")]
    assert len(lines) == 1 and lines[0].startswith("  all: device 5 of ")
    assert lines[0].endswith(" process 0")


def test_a_changed_copy_of_a_block(mesh):
    """Of the four devices with the second half of the experts, one differs."""
    state = state_of(mesh)
    compared = of(mesh, state)
    third = mesh.devices[2, 1].id
    state["experts"] = with_copies(state["experts"], {third})
    with pytest.raises(RunError, match=rf"experts: device {third} of \S+ process 0\n"):
        compared.check(2, state)


def test_leaves_in_the_memory_of_the_host_come_one_by_one(mesh, monkeypatch):
    away = NamedSharding(mesh, P("expert"), memory_kind=host.KIND)
    state = state_of(mesh)
    state["mu"], state["nu"] = (jax.device_put(np.ones((8, 6)), away) for _ in "mn")
    program, together = agreement._block_sums, []

    def noted(mesh, specs):
        together.append(len(specs))
        return program(mesh, specs)

    monkeypatch.setattr(agreement, "_block_sums", noted)
    compared = of(mesh, state)
    compared.check(2, state)
    assert together == [3, 1, 1]
    state["nu"] = with_copies(state["nu"], {0})
    assert host.is_there(state["nu"])
    with pytest.raises(RunError, match=r"  nu: device 0 of \S+ process 0\n"):
        compared.check(4, state)


def test_a_missing_sum_is_found(mesh):
    """Each shard of the batch makes an update of its own; nothing adds them up."""

    def update(w, x, summed):
        grad = x.sum()
        return w - (jax.lax.psum(grad, "data") if summed else grad)

    def step(w, x, summed):
        specs = (P("expert"), P("data")), P("expert")
        f = jax.shard_map(
            lambda w, x: update(w, x, summed),
            mesh=mesh,
            in_specs=specs[0],
            out_specs=specs[1],
            check_vma=False,
        )
        return jax.jit(f)(w, x)

    state, x = state_of(mesh), jnp.arange(8.0)
    compared = of(mesh, state)
    compared.check(2, state_of(mesh, step(state["experts"], x, True)))
    with pytest.raises(RunError) as caught:
        compared.check(2, state_of(mesh, step(state["experts"], x, False)))
    line = next(s for s in str(caught.value).splitlines() if s.startswith("  "))
    # Four unlike copies of each half: no most are alike, so all eight are named.
    assert line.startswith("  experts: ") and line.count("device ") == 8


def test_the_odd_ones(mesh):
    sums = np.zeros((8, 2), np.uint32)
    assert odd_ones(mesh, P(), sums) == []
    sums[3, 1] = 1
    assert odd_ones(mesh, P(), sums) == [3]
    # Devices 1, 3, 5, 7 hold the second half.
    assert odd_ones(mesh, P("expert"), sums) == [3]
    sums[5, 1] = 1
    assert odd_ones(mesh, P("expert"), sums) == [1, 3, 5, 7], "two against two"
    assert odd_ones(mesh, P(None, "data"), sums) == [2, 3, 4, 5], "pairs: one each"
    assert odd_ones(mesh, P(("data", "expert")), sums) == []
