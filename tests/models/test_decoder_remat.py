"""What is kept for the backward pass changes no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import STEPS, TOKENS, B, E, S, drawn, inputs, options

from moe_jax.models import remat as remat_lib
from moe_jax.models.decoder import DecoderModel
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.routing import TRAIN
from moe_jax.tree import named_leaves

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_remat_policies_give_the_same_gradients():
    moe = MoE(
        num_experts=E,
        experts=ExpertFeedForward(d_ff=8),
        dispatch=DenseDispatch(),  # The one that compiles fastest.
    )
    given = inputs(TOKENS, STEPS, np.ones((B, S)))
    grads, compiled = {}, {}
    remats = ("none", "full", "dots", *remat_lib.NAMES, "+".join(remat_lib.NAMES))
    for remat in remats:
        model = DecoderModel(options(num_layers=2, feed_forward=moe, remat=remat))

        def value(params, model=model):
            hidden, _, aux = model.apply(
                params, {"segment_0": {"block_0": {}}}, given, key=None, mode=TRAIN
            )
            total = jnp.mean(jnp.square(model.logits(params, hidden)))
            return total + sum(jnp.sum(one) for one in aux.losses.values())

        params = drawn(model)
        traced = jax.jit(jax.grad(value)).trace(params)
        compiled[remat] = str(traced.jaxpr)
        grads[remat] = named_leaves(traced.lower().compile()(params))
    for remat in remats:
        for name, grad in grads[remat].items():
            np.testing.assert_allclose(
                grad, grads["none"][name], rtol=1e-3, atol=1e-6, err_msg=name
            )
            assert np.abs(grad).max() > 0, name
    dots = {remat: text.count("dot_general") for remat, text in compiled.items()}
    assert dots["none"] < dots["dots"] <= dots["full"]
    for remat in ("attention", "projections", "hidden"):
        assert dots["+".join(remat_lib.NAMES)] < dots[remat] < dots["full"], remat


def test_policies_in_turn_change_no_number():
    """Outputs keep the order of the layers; the parameters lie as before."""
    given = inputs(TOKENS, STEPS, np.ones((B, S)))
    found = {}
    for remat in ("none", "full,none"):
        # Blocks: dense, and twice (dense, MoE).
        model = DecoderModel(options(num_layers=5, remat=remat))
        model.options.feed_forward.dispatch = DenseDispatch()
        params, state = drawn(model), model.init_router_state()

        def value(params, model=model, state=state):
            hidden, seen, aux = model.apply(params, state, given, key=None, mode=TRAIN)
            total = jnp.sum(jnp.sin(hidden))
            return total + sum(map(jnp.sum, aux.losses.values())), (seen, aux)

        found[remat] = jax.jit(jax.grad(value, has_aux=True))(params)
    (want, sums), (got, new) = found.values()
    for name, grad in named_leaves(want).items():
        np.testing.assert_allclose(
            named_leaves(got)[name], grad, rtol=1e-3, atol=1e-5, err_msg=name
        )
    new = named_leaves(new)
    for name, value in named_leaves(sums).items():
        np.testing.assert_allclose(new[name], value, rtol=1e-4, atol=1e-5)
