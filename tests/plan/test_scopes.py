"""The parts of the model, and that a real step's seconds and traffic add up."""

import pytest

from moe_jax.plan import hlo, schedule
from moe_jax.plan.collectives import Network


@pytest.mark.parametrize(
    "op_name, expected",
    [
        ("jit(train_step)/jvp()/while/body/closed_call/attention/dot", "attention"),
        ("jit(f)/transpose(jvp())/while/body/shard_map/experts/dot", "experts"),
        ("jit(f)/transpose(jvp(attention))/dot_general", "attention"),
        ("jit(f)/feed_forward/router/top_k", "router"),
        ("jit(f)/expertsx/add", "other"),
        ("", "other"),
    ],
)
def test_scope(op_name, expected):
    assert schedule.scope(op_name) == expected


@pytest.fixture(scope="module")
def totals(tpu_step):
    network = Network.of(tpu_step.parts.mesh, tpu_step.topology.chip)
    return schedule.Walk(hlo.parse(tpu_step.text), network).run()


def test_bounds_add_up_to_the_step(totals):
    bounds = totals.matmul_seconds + totals.memory_seconds + totals.exposed_seconds
    assert totals.seconds == pytest.approx(bounds)
    assert 0 < sum(totals.scopes.values()) <= totals.seconds * (1 + 1e-9)
    assert {"attention", "experts", "router", "logits"} <= set(totals.scopes)


def test_exchanges_of_a_step(tpu_step, totals):
    layers = tpu_step.parts.config.model.num_layers
    one = totals.traffic[("all-to-all", ("expert",))]
    # A layer sends rows to the experts and back, forward and backward; the embedding
    # sends the rows of 32 tokens, forward and backward.
    assert one.count == 4 * layers + 2
    # 64 assignments of a device to 4 experts: 16 each, for which a bucket would have
    # 16 + 5 * 4 + 4 = 40 rows were there more than 32 tokens; of width 32. What meets
    # a product next goes as bfloat16.
    rows = 32 * 32
    assert one.payload == 2 * layers * 4 * rows * (4 + 2) + 2 * rows * 4
    assert one.wire == one.payload / 2
    # Rounds for what does not fit wait for data, forward and backward: a loop that runs
    # once if any shard has some, for it brings the weights, and in it their loop.
    assert [met for met, _ in totals.dynamic.values()] == [layers, 0, layers, 0]
