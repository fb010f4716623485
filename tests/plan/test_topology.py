"""Topologies by name."""

import importlib.util

import pytest

from moe_jax.errors import UserError
from moe_jax.plan import chips, topology

SHAPES = {"v4": "2x2x1", "v5p": "2x2x1", "tpu7x": "2x2x1"}
CORES = {"v2": 2, "v3": 2, "tpu7x": 2}  # Devices a chip; one of all others.


@pytest.mark.parametrize("kind", [chip.name for chip in chips.CHIPS])
def test_every_kind_is_there(find, kind):
    found = find(f"{kind}:{SHAPES.get(kind, '2x2')}")
    assert found.chip is chips.BY_NAME[kind]
    assert found.num_chips == 4
    assert len(found.devices) == 4 * CORES.get(kind, 1)
    assert {d.device_kind for d in found.devices} == {found.chip.kind}


@pytest.mark.parametrize(
    "name, count",
    [("v5e:1x1", 1), ("v5e:4x4", 16), ("v5p:4x4x4", 64), ("V4:2x2x2", 8)],
)
def test_shapes(find, name, count):
    found = find(name)
    assert (found.num_chips, len(found.devices)) == (count, count)
    assert str(found) == f"{name}, {count} chips"


def test_slices(find):
    found = find("v5e:2x4", 3)
    assert [d.slice_index for d in found.devices] == 8 * [0] + 8 * [1] + 8 * [2]
    assert (found.num_chips, found.slices) == (24, 3)
    assert str(found) == "3 x v5e:2x4, 24 chips"


@pytest.mark.parametrize("name", ["v9:2x2", "v5e:3x3", "v5e:4", "v5p:3x3x3"])
def test_what_libtpu_does_not_know(find, name):
    with pytest.raises(UserError) as error:
        find(name)
    assert f"--topology={name!r} is not a topology: " in str(error.value)
    assert "v2|v3|v4|v5e|v5p|v6e|tpu7x" in str(error.value)


@pytest.mark.parametrize(
    "name", ["v5e", "", "v5e:", ":4x4", "v5e:4x", "v5e:axb", "v5e:0x0", "cpu:0", "cpu"]
)
def test_what_is_no_name(name):
    with pytest.raises(UserError, match="is not KIND:SHAPE") as error:
        topology.find(name)
    assert "cpu:N" in str(error.value)


def test_the_host(host):
    assert (host.chip, len(host.devices), host.num_chips) == (None, 8, 8)
    with pytest.raises(UserError, match="--slices=2: cpu:8 has no slices"):
        topology.find("cpu:8", 2)
    with pytest.raises(UserError, match="--slices=0: must be at least 1"):
        topology.find("cpu:8", 0)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        topology.find("v5p:4x4x2")
    assert "pip install 'moe_jax[plan]'" in str(error.value)
    assert "--topology=cpu:32" in str(error.value)
    topology.find("cpu:8")
