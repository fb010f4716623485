"""Gradients come out of the weights' slots, in the types of the computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import models
from moe_jax.check.rows import random_batch
from moe_jax.config import MeshConfig
from moe_jax.nn import module
from moe_jax.objectives import OBJECTIVES
from moe_jax.parallel import batches
from moe_jax.train import setup, step
from moe_jax.tree import named_leaves


@pytest.fixture(params=["bfloat16"])
def parts(request, tiny):
    """Two layers, with shared experts and a dense block; on four devices."""
    tiny.model.dtype = request.param
    tiny.model.feed_forward.first_dense = 1
    tiny.model.feed_forward.dense_d_ff = tiny.model.feed_forward.shared_d_ff = 32
    tiny.mesh = MeshConfig(fsdp=2, expert=2)
    return setup.make_parts(tiny, jax.devices()[:4])


def test_gradients_are_those_of_the_weights(parts):
    """And where the slot is narrower, nothing was there to be lost."""
    config, model = parts.config, parts.model

    def plain(state, batch):
        def total(params):
            found = OBJECTIVES[type(config.objective)](
                config.objective,
                model,
                params,
                state.router_state,
                batch,
                key=jax.random.fold_in(jax.random.key(config.seed), state.step),
                mode=step.TRAIN,
                override=None,
            )
            return found.sum / jnp.sum(batch["weights"]) + step.aux_loss(found.aux)

        return jax.grad(total)(state.params)

    def slotted(state, batch):
        return step.compute_gradients(config, model, state, batch).grads

    state = setup.fresh_state(parts)
    batch = random_batch(config, "float32")
    with jax.set_mesh(parts.mesh):
        placed = batches.put(batch, parts.mesh, config.train.batch_size, 0)
        want, got = (
            named_leaves(jax.device_get(jax.jit(run)(state, placed)))
            for run in (plain, slotted)
        )
    slots = module.slots(state.params, model.rounded, model.dtype)
    narrow = {n for n, s in named_leaves(slots).items() if s.dtype == jnp.bfloat16}
    # Attention's four, twice, and three each of dense, shared and experts.
    assert len(narrow) == 17
    for name, grad in want.items():
        assert got[name].dtype == np.float32 and np.any(grad), name
        np.testing.assert_array_equal(got[name], grad, err_msg=name)


@pytest.mark.parametrize("parts", ["bfloat16", "float32"], indirect=True)
def test_no_wide_gradient_is_stacked_over_layers(parts):
    """The scan over layers returns gradients of matrices in the computation's type."""
    config, model = parts.config, parts.model
    run = lambda state, batch: step.compute_gradients(config, model, state, batch)
    batch = batches.abstract(
        parts.mesh, config.train.batch_size, config.model.row_shapes(config.data)
    )
    with jax.set_mesh(parts.mesh):
        program = jax.make_jaxpr(run)(parts.abstract, batch)
    outputs = [
        out.aval
        for eqn in program.eqns
        if eqn.primitive.name == "scan"
        for out in eqn.outvars
    ]
    experts = named_leaves(parts.abstract.params)["segment_1/block_0/moe/experts/w_up"]
    stacked = {str(a.dtype) for a in outputs if a.shape == experts.shape}
    assert stacked == {config.model.dtype}


def test_a_weight_that_is_used_twice(float64):
    value = jnp.arange(3.0)
    slot = jnp.zeros(3, jnp.bfloat16)

    def square(slot):
        weight = module.Slotted(value=value, slot=slot).weight()
        return jnp.sum(weight * weight)

    grad = jax.grad(square)(slot)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grad.astype(float), 2 * np.arange(3.0))


def test_rounded_covers_the_parameters(tiny):
    model = models.build(tiny.model)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rounded = named_leaves(model.rounded)
    assert set(rounded) == set(named_leaves(shapes))
    assert not rounded["embedding"]
    assert not any(yes for name, yes in rounded.items() if "scorer" in name)
