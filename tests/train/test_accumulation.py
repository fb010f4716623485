"""MoE losses, counts and the bias where a step is cut into micro-batches."""

import jax
import numpy as np
import optax
import pytest

from moe_jax.check.rows import random_batch
from moe_jax.check.run import with_dtype
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.parallel import batches
from moe_jax.train import setup, step
from moe_jax.tree import named_leaves

PARTS = 2
# What does not depend on how a step is cut: sums over tokens or rows, and the load of
# the whole step.
INVARIANT = dict(
    load_balance_weight=0.0,
    sequence_weight=0.3,
    global_weight=0.5,
    z_weight=0.01,
    entropy_weight=0.1,
    bias_rate=0.01,
)
ALL = INVARIANT | dict(
    load_balance_weight=0.1,
    device_weight=0.1,
    device_groups=2,
    pooled_weight=0.1,
    importance_weight=0.1,
)


@pytest.fixture
def tiny64(tiny, float64):
    """Two layers, four experts, every token on every one of them."""
    config = with_dtype(tiny, "float64")
    config.model.feed_forward.dispatch = DenseDispatch()
    return config


@pytest.fixture(scope="module")
def states():
    """Fresh states by what they depend on: compiled once."""
    return {}


def fresh(config, states):
    key = config.model.feed_forward.balance.bias_rate
    if key not in states:
        parts = setup.make_parts(config, jax.devices()[:1])
        states[key] = jax.device_get(setup.fresh_state(parts))
    return states[key]


def ragged_batch(config):
    """Rows, and micro-batches, that hold different numbers of tokens."""
    batch = random_batch(config, "float64")
    for row, segments in enumerate(batch["segments"]):
        segments[len(segments) - 10 * (row % PARTS) - row :] = 0
        batch["weights"][row] *= segments > 0
    tokens = [(batch["segments"][i::PARTS] > 0).sum() for i in range(PARTS)]
    assert min(tokens) < 0.8 * max(tokens), "a mean of means would differ"
    return batch


def run(config, state, batch, accumulation):
    """Gradients, their norm, the router state after the step, and its figures."""
    config.train.accumulation = accumulation
    devices = jax.devices()[: config.mesh.fixed_devices()]
    parts = setup.make_parts(config, devices)

    def both(state, batch):
        found = step.compute_gradients(config, parts.model, state, batch)
        observed = found.observations
        after = parts.model.update_router_state(state.router_state, observed)
        norm = optax.tree.norm(found.grads)
        figures = step.step_metrics(parts.model, found, norm, norm, after)
        return found, norm, after, figures

    with jax.set_mesh(parts.mesh):
        placed = batches.put(batch, parts.mesh, config.train.batch_size, 0)
        state = jax.device_put(state, parts.shardings)
        return jax.device_get(jax.jit(both)(state, placed))


def same(found, want, tolerance=1e-11):
    want, found = named_leaves(want), named_leaves(found)
    assert want.keys() == found.keys()
    for name, value in want.items():
        gap = np.linalg.norm(found[name] - value)
        assert gap <= tolerance * np.linalg.norm(value), name


@pytest.mark.slow
def test_losses_over_tokens_and_steps_do_not_depend_on_accumulation(tiny64, states):
    tiny64.model.feed_forward.balance = Balance(**INVARIANT)
    state, batch = fresh(tiny64, states), ragged_batch(tiny64)
    whole, norm, after, metrics = run(tiny64, state, batch, 1)
    assert set(whole.aux.losses) == {
        *("sequence_balance_loss", "global_balance_loss"),
        *("router_z_loss", "router_entropy_loss"),
    }
    cut, cut_norm, cut_after, cut_metrics = run(tiny64, state, batch, PARTS)
    same(cut.aux.losses, whole.aux.losses)
    same(cut.grads, whole.grads)
    same(cut.aux.health, whole.aux.health)
    np.testing.assert_allclose(cut.loss, whole.loss, rtol=1e-12)
    np.testing.assert_allclose(cut_norm, norm, rtol=1e-12)
    # Counts are added and not averaged: the bias of both is the same to the bit.
    same(cut.observations, whole.observations, 0)
    same(cut_after, after, 0)
    assert all(np.any(v) for v in named_leaves(after).values())
    routing = ("max_violation", "changed_tokens", "dead_experts", "router_entropy")
    for name in (*routing, "load_max_over_mean", "bias_range", "straggler"):
        np.testing.assert_allclose(cut_metrics[name], metrics[name], rtol=1e-11)


@pytest.mark.slow
def test_all_losses_on_a_mesh_and_by_micro_batch(tiny64, states):
    """With accumulation: eight devices against one, and its parts one by one.

    Along no axis of the mesh does the scale of a loss grow, nor that of the experts'
    gradients or of their norm.
    """
    tiny64.model.feed_forward.balance = Balance(**ALL)
    state, batch = fresh(tiny64, states), ragged_batch(tiny64)
    one, norm, after, _ = run(tiny64, state, batch, PARTS)
    assert len(one.aux.losses) == 8

    for axis in ("expert", "context", "tensor"):
        setattr(tiny64.mesh, axis, 2)
    found, found_norm, found_after, _ = run(tiny64, state, batch, PARTS)
    np.testing.assert_allclose(found.loss, one.loss, rtol=1e-11)
    np.testing.assert_allclose(found_norm, norm, rtol=1e-10)
    same(found.aux.losses, one.aux.losses)
    same(found.grads, one.grads, 1e-9)
    same(found.observations, one.observations, 0)
    same(found_after, after, 0)

    # A loss with the statistics of a micro-batch: the mean, weighted by tokens.
    model = setup.make_parts(tiny64).model
    objective = step.OBJECTIVES[type(tiny64.objective)]

    @jax.jit
    def losses(params, router_state, micro):
        found = objective(
            *(tiny64.objective, model, params, router_state, micro),
            key=None,
            mode=step.TRAIN,
        )
        return found.aux.losses

    want, tokens = {}, (batch["segments"] > 0).sum()
    for i in range(PARTS):
        micro = {name: x[i::PARTS] for name, x in batch.items()}
        share = (micro["segments"] > 0).sum() / tokens
        for name, value in losses(state.params, state.router_state, micro).items():
            want[name] = want.get(name, 0) + share * value
    for name in ("load_balance_loss", "device_balance_loss", "pooled_balance_loss"):
        np.testing.assert_allclose(one.aux.losses[name], want[name], rtol=1e-11)
    gap = one.aux.losses["global_balance_loss"] - want["global_balance_loss"]
    assert np.abs(gap).min() > 1e-6, "its load is not that of the micro-batches"
