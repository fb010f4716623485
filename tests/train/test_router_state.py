"""Counts, bias and MoE losses of a deep model, recomputed and accumulated.

One program: five layers of which the third and the fifth are MoE, full
rematerialisation, two micro-batches.
"""

import jax
import numpy as np
import pytest

from moe_jax.check.rows import random_batch
from moe_jax.moe.balance import Balance
from moe_jax.parallel import batches
from moe_jax.train import setup, step
from moe_jax.tree import named_leaves

RATE = 0.125
STATE = "segment_1/block_1/bias"
SCORER = "segment_1/block_1/moe/scorer/w"


@pytest.fixture(scope="module")
def run(make_tiny):
    """`call(state)`: a batch, its gradients, the next state; and a fresh state."""
    config = make_tiny()
    config.model.num_layers, config.model.remat = 5, "full"
    ff = config.model.feed_forward
    ff.first_dense, ff.every, ff.dense_d_ff = 1, 2, 32
    ff.balance = Balance(z_weight=0.0, global_weight=0.01, bias_rate=RATE)
    config.train.accumulation = 2
    parts = setup.make_parts(config, jax.devices()[:1])

    @jax.jit
    def both(state, batch):
        found = step.compute_gradients(config, parts.model, state, batch)
        new, _ = step.apply_gradients(
            config, parts.model, parts.optimizer, state, found
        )
        return found, new

    def call(state, scored=True):
        batch = random_batch(config, "float32")
        batch["weights"] *= scored
        with jax.set_mesh(parts.mesh):
            placed = batches.put(batch, parts.mesh, config.train.batch_size, 0)
            return batch, *jax.device_get(both(state, placed))

    return call, jax.device_get(setup.fresh_state(parts))


@pytest.mark.slow
def test_counts_are_taken_once_and_move_the_bias_of_every_layer(run):
    """Not again in the recomputation, nor in the first pass of the global loss."""
    call, state = run
    batch, found, new = call(state)
    counts_le = found.aux.health["counts"]
    assert counts_le.shape == (2, 4)
    tokens = (batch["segments"] > 0).sum()
    np.testing.assert_array_equal(counts_le.sum(axis=1), [2 * tokens] * 2)
    assert len(named_leaves(new.router_state)) == 1
    errors = np.sign(counts_le.mean(axis=1, keepdims=True) - counts_le)
    after = named_leaves(new.router_state)[STATE]
    np.testing.assert_array_equal(after, RATE * errors)
    assert np.all(np.any(after != 0, axis=1)), "of every layer"
    # Once per optimizer step: the second step adds to the first.
    _, found, newer = call(new)
    counts_le = found.aux.health["counts"]
    errors = np.sign(counts_le.mean(axis=1, keepdims=True) - counts_le)
    second = named_leaves(newer.router_state)[STATE]
    np.testing.assert_array_equal(second, after + RATE * errors)


@pytest.mark.slow
def test_the_gradient_of_the_losses_reaches_every_router(run):
    """With no token scored, all gradient is that of the MoE losses."""
    call, state = run
    _, found, _ = call(state, scored=False)
    assert found.reported == 0 and found.loss > 0
    grads = named_leaves(found.grads)
    per_layer = np.abs(grads[SCORER]).reshape(2, -1).max(axis=1)
    assert np.all(per_layer > 1e-8), per_layer
    assert np.all(grads["norm/scale"] == 0), "it stands behind the routers"
