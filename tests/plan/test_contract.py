"""The performance contract: what breaks it, and that real regressions do."""

import json
import pathlib

import jax
import pytest

import moe_jax
from moe_jax.cli import config_file
from moe_jax.moe import layer
from moe_jax.moe import sharded as moe_sharded
from moe_jax.plan import contract, report, topology

ROOT = pathlib.Path(moe_jax.__file__).parents[1]
RECORDED = {
    "compiler": "libtpu 1, jax 1",
    "topology": "v5e:2x4",
    "allocated_bytes": 1000,
    "executed_flops": 3e9,
    "model_flops": 2e9,
    "hbm_bytes": 5000,
    "collectives": {"all-gather over fsdp": [8, 4096]},
}


def test_equal_costs_hold():
    assert contract.differences(RECORDED, dict(RECORDED)) == []


def test_a_cost_within_the_tolerance_holds():
    assert contract.differences(RECORDED, RECORDED | {"allocated_bytes": 1004}) == []


@pytest.mark.parametrize("name", ["allocated_bytes", "executed_flops", "hbm_bytes"])
def test_a_dearer_and_a_cheaper_step_are_both_shown(name):
    for factor, word in ((1.02, "dearer"), (0.98, "cheaper")):
        found = RECORDED | {name: RECORDED[name] * factor}
        (line,) = contract.differences(RECORDED, found)
        assert line.startswith(name) and word in line


def test_collectives_that_come_go_or_grow_are_shown():
    change = lambda rows: contract.differences(
        RECORDED, RECORDED | dict(collectives=rows)
    )
    (doubled,) = change({"all-gather over fsdp": [16, 8192]})
    assert "8 of 0.00 MB" in doubled and "16 of 0.01 MB" in doubled
    gone, new = change({"all-gather over data": [8, 4096]})[::-1]
    assert "gone" in gone and "new" in new


def test_costs_of_other_versions_are_not_compared():
    found = RECORDED | {"compiler": "libtpu 2, jax 1", "allocated_bytes": 9}
    (line,) = contract.differences(RECORDED, found)
    assert "cannot be compared" in line


def broken_by(config):
    pytest.importorskip("libtpu")
    recorded = json.loads((ROOT / "benchmarks/contract/sharded.json").read_text())
    where = topology.find(recorded["topology"])
    plan = report.make_plan(config, where)
    found = contract.costs(plan.to_json())
    if found["compiler"] != recorded["compiler"]:
        pytest.skip(f"recorded with {recorded['compiler']}")
    return "\n".join(contract.differences(recorded, found))


@pytest.fixture
def sharded():
    return config_file.load(f"{ROOT}/configs/bench/contract.py:sharded")


@pytest.mark.soak
def test_a_lost_remat_policy_breaks_the_contract(sharded):
    sharded.model.remat = "none"
    lines = broken_by(sharded)
    assert "allocated_bytes" in lines and "executed_flops" in lines


@pytest.mark.soak
def test_a_doubled_all_gather_breaks_the_contract(sharded, monkeypatch):
    once = moe_sharded._gather_fsdp

    def twice(weights, axes):
        # Summed halves: the compiler cannot drop one of the two.
        later = jax.lax.optimization_barrier(weights)
        first, second = once(weights, axes), once(later, axes)
        return jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, first, second)

    monkeypatch.setattr(moe_sharded, "_gather_fsdp", twice)
    assert "all-gather over fsdp:" in broken_by(sharded)


@pytest.mark.soak
def test_a_replicated_weight_gather_breaks_the_contract(sharded, monkeypatch):
    # Gathered by hand before `shard_map`, the weights cross the links once more.
    dispatch = layer.MoELayer._dispatch

    def replicated(self, x, routing):
        for name in ("w_gate", "w_up", "w_down"):
            param = getattr(self.experts, name)
            spec = jax.sharding.PartitionSpec("expert")
            param[...] = jax.lax.with_sharding_constraint(param[...], spec)
        return dispatch(self, x, routing)

    monkeypatch.setattr(layer.MoELayer, "_dispatch", replicated)
    assert "all-gather over fsdp:" in broken_by(sharded)
