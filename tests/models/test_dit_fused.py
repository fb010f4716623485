"""Experts fused for one time: a dense model that does what the routed one does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dit import SINGLE, B, D, drawn, experts, given, options

from moe_jax.errors import UserError
from moe_jax.models.dit import DiTModel
from moe_jax.models.dit_config import mlp
from moe_jax.models.dit_fused import dense_model, fuse
from moe_jax.models.masks.switch_dit import SwitchDiT
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.noises.sampled_experts import SampledExperts
from moe_jax.moe.routing import EVAL
from moe_jax.moe.scorers.linear import Linear
from moe_jax.moe.scorers.timestep import Timestep, TimestepMLP
from moe_jax.moe.selectors.expert_choice import ExpertChoice
from moe_jax.moe.selectors.group_limited import GroupLimited
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.nn.feedforward import Dense

MODE = dict(
    scorer=TimestepMLP(),
    noise=SampledExperts(),
    shared_d_ff=0,
    selector=TopK(top_k=2),
)
BIASED = ExpertFeedForward(d_ff=24, activation="gelu", gated=False, bias=True)
CASES = {
    "shared, not renormalised": dict(scorer=Timestep()),
    "biases, output scale": dict(
        scorer=Timestep(), experts=BIASED, output_scale=True, shared_d_ff=16
    ),
    "three of a group, clamped": MODE
    | dict(
        selector=GroupLimited(top_k=3, num_groups=2, top_groups=2, scale=2.5),
        experts=ExpertFeedForward(d_ff=24, clamp=0.5, up_offset=1.0),
        shared_d_ff=8,
    ),
    "MoDE, moved by a bias": MODE | dict(balance=Balance(bias_rate=0.1)),
}


def layer(fields):
    return dataclasses.replace(experts(), dispatch=DenseDispatch(), **fields)


def both(model, dtype, time):
    """Predictions of the routed model and of the fused one."""
    params, state = drawn(model), model.init_router_state()
    # A bias that turns some choices round, where there is one.
    state = jax.tree.map(
        lambda a: jnp.asarray(np.linspace(1, -1, a.size).reshape(a.shape), a.dtype),
        state,
    )
    inputs = given(dtype, time=jnp.full(B, time, dtype))
    dense = dense_model(model)

    @jax.jit
    def step(params):
        fused = fuse(model, params, state, inputs.time[0])
        routed = model.apply(params, state, inputs, key=None, mode=EVAL)
        alike = dense.apply(fused, {}, inputs, key=None, mode=EVAL)
        return routed.prediction, alike.prediction

    return jax.tree.map(np.asarray, step(params))


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_fused_is_routed(float64, fields):
    ff = layer(fields)
    ff.scorer = dataclasses.replace(ff.scorer, dtype="float64")
    model = DiTModel(options(num_layers=2, feed_forward=ff))
    routed, fused = both(model, "float64", 500.0)
    assert np.abs(routed).max() > 0.1
    np.testing.assert_allclose(fused, routed, rtol=1e-10, atol=1e-10)


def test_in_single_precision_beside_a_mask():
    fields = dict(num_layers=2, input_mask=SwitchDiT(), **SINGLE)
    made = options(feed_forward=layer(MODE), **fields)
    model = DiTModel(made)
    params, state = drawn(model), model.init_router_state()
    fused = jax.eval_shape(lambda p: fuse(model, p, state, jnp.float32(3)), params)
    shapes = jax.eval_shape(dense_model(model).init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, fused) == jax.tree.map(jnp.shape, shapes)
    routed, fused = both(model, "float32", 900.0)
    scale = np.abs(routed).max()
    np.testing.assert_allclose(fused / scale, routed / scale, atol=1e-5)


def test_the_dense_model_has_the_experts_of_a_token():
    made = options(feed_forward=layer(dict(scorer=Timestep())), **SINGLE)
    dense = dense_model(DiTModel(made)).options.feed_forward
    assert dense == Dense(d_ff=2 * 4 * D + 2 * D, activation="silu", gated=True)
    made = options(
        feed_forward=layer(dict(scorer=Timestep(), experts=BIASED)), **SINGLE
    )
    dense = dense_model(DiTModel(made)).options.feed_forward
    assert (dense.d_ff, dense.bias, dense.gated) == (2 * 24 + 2 * D, True, False)


@pytest.mark.parametrize(
    ("ff", "words"),
    [
        (mlp(8), "Dense has no experts"),
        (
            layer(MODE | dict(scorer=Linear())),
            "scorer=Linear scores more than the time",
        ),
        (
            layer(MODE | dict(selector=ExpertChoice())),
            "selector=ExpertChoice does not give every token its own K experts",
        ),
        (layer(dict(scorer=Timestep(), first_dense=1, dense_d_ff=8)), "first_dense=1"),
        (layer(dict(scorer=Timestep(), every=2, dense_d_ff=8)), "every=2: some blocks"),
        (layer(dict(scorer=Timestep(), shared_gate=True)), "shared_gate=True weighs"),
    ],
)
def test_what_cannot_be_fused_is_refused(ff, words):
    model = DiTModel(options(feed_forward=ff, **SINGLE))
    with pytest.raises(UserError, match="feed_forward cannot be fused") as error:
        dense_model(model)
    assert words in str(error.value)
