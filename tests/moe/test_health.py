"""Figures of routing, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe import health
from moe_jax.moe.routing import DispatchStats, MoEAux, Observation, Routing

LOGITS = np.array(
    [
        [3.0, 2.0, 1.0, 0.0],
        [0.0, 1.0, 2.0, 3.0],
        [1.0, 1.0, 0.0, 0.0],
        [5.0, 0.0, 4.0, 1.0],
        [9.0, 8.0, 0.0, 0.0],
    ]
)


def routing(expert_tk, valid_tk=None, valid_t=None):
    expert_tk = jnp.asarray(expert_tk, jnp.int32)
    valid_t = np.ones(len(LOGITS), bool) if valid_t is None else np.array(valid_t)
    valid_tk = np.ones(expert_tk.shape, bool) if valid_tk is None else valid_tk
    return Routing(
        expert_tk=expert_tk,
        weight_tk=jnp.ones(expert_tk.shape),
        valid_tk=jnp.asarray(valid_tk) & valid_t[:, None],
        probs_te=jax.nn.softmax(jnp.asarray(LOGITS)),
        logits_te=jnp.asarray(LOGITS),
        choice_te=jnp.asarray(LOGITS),
        valid_t=jnp.asarray(valid_t),
        num_experts=4,
        expected_k=2.0,
    )


BEST = [[0, 1], [2, 3], [0, 1], [2, 0], [0, 1]]


def test_figures_of_a_layer(float64):
    padding = [True, True, True, True, False]
    found = health.figures(routing(BEST, valid_t=padding))
    np.testing.assert_array_equal(found["counts"], [3, 2, 2, 1])
    assert found["changed"] == 0
    powers = np.exp(LOGITS[:4])
    probs = powers / powers.sum(axis=1, keepdims=True)
    want = -(probs * np.log(probs)).sum(axis=1).mean()
    np.testing.assert_allclose(found["entropy"], want, rtol=1e-12)


@pytest.mark.parametrize(
    ("row", "experts", "valid", "changed"),
    [
        (0, [1, 0], [True, True], 0),  # the order of the choices does not matter
        (0, [0, 2], [True, True], 1),
        (0, [0, 2], [True, False], 0),  # one expert, the best
        (0, [1, 2], [True, False], 1),
        (2, [0, 1], [True, True], 0),
        (2, [1, 0], [True, False], 0),  # equal logits
        (2, [1, 3], [True, True], 1),
        (3, [0, 1], [False, False], 0),  # nobody serves it
        (4, [2, 3], [True, True], 1),
    ],
)
def test_tokens_whose_choice_was_changed(row, experts, valid, changed):
    chosen, counted = np.array(BEST), np.ones((5, 2), bool)
    chosen[row], counted[row] = experts, valid
    assert health.changed_tokens(routing(chosen, counted)) == changed
    # Padding is not a token.
    only_others = np.arange(5) != row
    found = health.changed_tokens(routing(chosen, counted, only_others))
    assert found == 0


def test_a_bias_changes_the_choice_of_the_tokens_it_turns():
    """Expert 3 gets 2.5 more: tokens 0 and 2 take it, 1 had it, 3 and 4 do not."""
    choice = LOGITS + np.array([0, 0, 0, 2.5])
    chosen = np.argsort(-choice, axis=1, kind="stable")[:, :2]
    np.testing.assert_array_equal([3 in row for row in chosen], [1, 1, 1, 0, 0])
    assert health.changed_tokens(routing(chosen)) == 2


def test_load_figures():
    counts = jnp.array([[4, 4, 4, 4], [8, 0, 0, 8], [1, 2, 3, 10]])
    assert health.max_over_mean(counts) == 2.5
    # Mean over layers of 0, 1 and 1.5.
    np.testing.assert_allclose(health.max_violation(counts), 2.5 / 3, rtol=1e-6)
    assert health.dead_experts(counts) == 2
    none = jnp.zeros((1, 4), jnp.int32)
    assert health.max_over_mean(none) == 0.0
    assert health.max_violation(none) == 0.0


def test_straggler():
    counts = jnp.array([[4, 4, 4, 4], [8, 0, 0, 8], [1, 2, 3, 10]])
    np.testing.assert_allclose(health.straggler(counts, 1), 1.0)
    # Shards of experts (0, 1) and (2, 3): 8, 8 then 8, 8 then 3, 13 of mean 8.
    np.testing.assert_allclose(health.straggler(counts, 2), (1 + 1 + 13 / 8) / 3)
    np.testing.assert_allclose(health.straggler(counts, 4), (1 + 2 + 2.5) / 3)


def stats(peak, capacity):
    return DispatchStats(
        assignments=jnp.array([16] * len(peak)),
        dropped=jnp.array([1, 2][: len(peak)]),
        rounds=jnp.array([1, 3][: len(peak)]),
        peak_fill=jnp.array(peak),
        capacity=jnp.array(capacity),
        mean_fill=jnp.array([4.0] * len(peak)),
    )


def test_buffer_fill():
    assert health.buffer_fill(stats([4, 12], [8, 8])) == 1.5
    assert health.buffer_fill(stats([0, 0], [0, 0])) == 0, "there are no buffers"


def test_bias_range_is_that_of_the_worst_layer():
    state = {
        "segment_0": {
            "block_0": {"bias": jnp.array([[0.0, 0.5], [-1.0, 2.0]])},
            "block_1": {"factor": jnp.array([[1.0, 1.5]])},
        }
    }
    assert health.bias_range(state) == 3.0
    assert health.bias_range({"segment_0": {"block_0": {}}}) is None


def aux(experts=4, layers=2):
    counts = np.zeros((layers, experts), np.int32)
    counts[:, 0], counts[:, -1] = 12, 4
    return MoEAux(
        losses={},
        health={
            "counts": jnp.asarray(counts),
            "changed": jnp.array([1, 3]),
            "entropy": jnp.array([0.5, 1.5]),
        },
        stats=stats([4, 12], [8, 8]),
        observation=Observation(sums={}, count=jnp.array([8, 8])),
    )


def test_what_a_step_reports(axes_mesh):
    state = {"bias": jnp.array([[0.0, 0.25]])}
    report = lambda: health.of_step(aux(), state, ("data", "expert"))
    found = report()
    np.testing.assert_array_equal(found.pop("expert_counts"), [[12, 0, 0, 4]] * 2)
    want = {
        "load_max_over_mean": 3.0,
        "max_violation": 2.0,
        "dead_experts": 4,
        "experts_per_token": 2.0,
        "straggler": 1.0,
        "router_entropy": 1.0,
        "changed_tokens": 4 / 16,
        "dropped": 3,
        "dispatch_rounds": 3,
        "buffer_fill": 1.5,
        "bias_range": 0.25,
        "peak_fill": 12,
        "mean_fill": 4.0,
    }
    assert {name: float(value) for name, value in found.items()} == want
    with jax.set_mesh(axes_mesh(data=2, expert=2, fsdp=2)):
        assert jax.jit(report)()["straggler"] == 3.0, "four shards of one expert"
        found = jax.jit(lambda: health.of_step(aux(), {}, ("expert",)))()
    assert found["straggler"] == 1.5 and "bias_range" not in found
    no_buckets = dataclasses.replace(
        aux(), stats=dataclasses.replace(aux().stats, mean_fill=None)
    )
    assert "peak_fill" not in health.of_step(no_buckets, {}, ())


def test_their_number_does_not_grow_with_the_model():
    small, large = (
        jax.eval_shape(lambda a=a: health.of_step(a, {}, ()))
        for a in (aux(), aux(experts=256))
    )
    assert small.keys() == large.keys() and len(small) <= 16
    assert [name for name, value in large.items() if value.shape] == ["expert_counts"]
