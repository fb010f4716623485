"""A selector's state through the train step: accumulated, guarded, saved, read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.check.rows import random_batch
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import CheckpointConfig
from moe_jax.moe.balance import Balance
from moe_jax.moe.routing import TRAIN
from moe_jax.moe.selectors.diff_moe import DiffMoE
from moe_jax.objectives import OBJECTIVES
from moe_jax.parallel import batches
from moe_jax.train import setup, step
from moe_jax.tree import named_leaves

STATE = "segment_0/block_0/threshold"
SEEN = "segment_0/block_0/sums/thresholds"


@pytest.fixture(scope="module")
def run(make_tiny):
    """Parts, a placed batch, the step, and a state whose thresholds are not zero."""
    config = make_tiny()
    ff = config.model.feed_forward
    ff.selector, ff.allow_noncausal = DiffMoE(decay=0.75), True
    ff.balance = Balance(load_balance_weight=0.0)
    config.train.accumulation = 2
    parts = setup.make_parts(config, jax.devices()[:1])

    @jax.jit
    def both(state, batch):
        found = step.compute_gradients(config, parts.model, state, batch)
        new, _ = step.apply_gradients(
            config, parts.model, parts.optimizer, state, found
        )
        return found, new

    state = setup.fresh_state(parts)
    (old,) = named_leaves(state.router_state).values()
    assert list(named_leaves(state.router_state)) == [STATE]
    shape = (config.model.num_layers, ff.num_experts)
    assert old.shape == shape and not np.any(old)
    with jax.set_mesh(parts.mesh):
        batch = random_batch(config, "float32")
        batch = batches.put(batch, parts.mesh, config.train.batch_size, 0)
    return parts, batch, both, jax.device_get(state)


@pytest.mark.slow
def test_thresholds_move_once_a_step_by_what_its_parts_saw(run):
    parts, batch, both, state = run
    config = parts.config

    @jax.jit
    def observed(micro):
        options, given = config.objective, (state.all_params, state.router_state)
        objective = OBJECTIVES[type(options)]
        given = (options, parts.model, *given, micro)
        return objective(*given, key=None, mode=TRAIN, override=None).observations

    with jax.set_mesh(parts.mesh):
        found, new = jax.device_get(both(state, batch))
        micros = step.micro_batches(batch, 2)
        seen = [observed(jax.tree.map(lambda a, i=i: a[i], micros)) for i in (0, 1)]
    seen = [named_leaves(s) for s in jax.device_get(seen)]
    values = [s[SEEN] for s in seen]
    assert not np.array_equal(*values) and min(v.min() for v in values) > 0
    after = named_leaves(new.router_state)[STATE]
    np.testing.assert_allclose(after, 0.25 * np.mean(values, axis=0), rtol=1e-5)
    counts = named_leaves(found.observations)[SEEN + "_seen"]
    np.testing.assert_array_equal(counts, np.full(after.shape, 2))
    # The predictor learns, and a second step adds to the first.
    grads = named_leaves(found.grads)
    assert np.abs(grads["segment_0/block_0/moe/selector/w_out"]).max() > 0
    with jax.set_mesh(parts.mesh):
        again, newer = jax.device_get(both(new, batch))
    value = named_leaves(again.observations)[SEEN] / 2
    want = 0.75 * after + 0.25 * value
    np.testing.assert_allclose(named_leaves(newer.router_state)[STATE], want, rtol=1e-5)


@pytest.mark.slow
def test_a_step_that_is_not_finite_leaves_them(run):
    parts, batch, both, state = run
    broken = jax.tree.map(np.copy, state)
    broken.params["embedding"][:] = np.nan
    broken.router_state["segment_0"]["block_0"]["threshold"][:] = 0.5
    with jax.set_mesh(parts.mesh):
        found, new = jax.device_get(both(broken, batch))
    assert not np.isfinite(found.loss)
    after = named_leaves(new.router_state)[STATE]
    np.testing.assert_array_equal(after, np.full(after.shape, 0.5))


def test_thresholds_are_saved_and_read(run, tmp_path):
    parts, *_ = run
    with jax.set_mesh(parts.mesh):
        state = setup.fresh_router_state(parts)
    state = jax.tree.map(lambda a: a + jnp.linspace(0, 1, a.shape[-1]), state)
    checkpoints = Checkpoints(str(tmp_path), CheckpointConfig(every=1))
    checkpoints.save(1, {"router_state": state}, {})
    found = checkpoints.restore({"router_state": state})
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, found.state["router_state"], state)
