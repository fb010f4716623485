"""The diffusion transformer's own routers through all of the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dit import CLASSES, E, drawn, experts, given, options

from moe_jax.models.dit import DiTModel
from moe_jax.moe.balance import Balance
from moe_jax.moe.routing import EVAL, TRAIN
from moe_jax.moe.scorers.cosine import Cosine
from moe_jax.moe.selectors.diff_moe import DiffMoE
from moe_jax.moe.selectors.pro_moe import ProMoE
from moe_jax.tree import named_leaves

TOKENS = 16


pytestmark = pytest.mark.usefixtures("quick_compilation")


def model_of(selector, scorer, **fields):
    ff = dataclasses.replace(
        experts(scorer=scorer),
        selector=selector,
        balance=Balance(load_balance_weight=0.0, z_weight=0.0),
    )
    ff.experts.d_ff = ff.shared_d_ff = 16
    single = dict(dtype="float32", param_dtype="float32", num_layers=2)
    return DiTModel(options(feed_forward=ff, **single | fields))


@pytest.mark.slow
def test_images_without_condition_go_to_the_last_expert():
    """By a label that is the null class, and by `none`."""
    cosine = Cosine(proj_dim=0, temperature=1.0, learned=False)
    model = model_of(ProMoE(), cosine, condition_dropout=0.4, remat="full")
    params, state = drawn(model), model.init_router_state()
    assert params["segment_0"]["block_0"]["moe"]["scorer"]["w"].shape[-1] == E - 1

    @jax.jit
    def gradient(params, inputs, key):
        def total(params):
            found = model.apply(params, state, inputs, key=key, mode=TRAIN)
            aux = found.aux
            loss = jnp.mean(found.prediction**2)
            return loss + sum(map(jnp.sum, aux.losses.values())), aux

        return jax.grad(total, has_aux=True)(params)

    inputs = given("float32")  # The second has the label of the null class.
    for none, images in (([False] * 3, 1), ([True, False, False], 2)):
        inputs = dataclasses.replace(inputs, none=jnp.asarray(none))
        grads, aux = gradient(params, inputs, jax.random.key(0))
        counts_le = np.asarray(aux.health["counts"])
        assert counts_le.shape == (2, E) and np.all(counts_le.sum(axis=1) == 3 * TOKENS)
        np.testing.assert_array_equal(counts_le[:, -1], images * TOKENS)
    assert all(np.all(np.isfinite(grad)) for grad in jax.tree.leaves(grads))
    # Where all are without condition, routed experts and prototypes learn nothing.
    alone = dataclasses.replace(inputs, none=jnp.ones(3, bool))
    grads, aux = gradient(params, alone, jax.random.key(0))
    np.testing.assert_array_equal(aux.losses["contrastive_loss"], 0)
    for name, grad in named_leaves(grads).items():
        if "/experts/" in name:
            assert np.all(np.asarray(grad)[:, :-1] == 0), name
            assert np.abs(np.asarray(grad)[:, -1]).max() > 0, name
        if "/scorer/" in name:
            assert np.all(np.asarray(grad) == 0), name


@pytest.mark.slow
def test_an_image_is_denoised_by_itself():
    """With learned thresholds, whatever else is in the batch."""
    model = model_of(DiffMoE(), Cosine())
    params = drawn(model)
    thresholds = {"threshold": jnp.full((2, E), 0.45)}
    state = model.init_router_state()
    assert jax.tree.map(jnp.shape, state) == {
        "segment_0": {"block_0": {"threshold": (2, E)}}
    }
    state = {"segment_0": {"block_0": thresholds}}
    run = jax.jit(lambda i: model.apply(params, state, i, key=None, mode=EVAL))
    inputs = given("float32")
    others = dataclasses.replace(
        inputs,
        x=inputs.x.at[1:].set(3.0),
        label=jnp.asarray([4, 1, CLASSES], jnp.int32),
    )
    one, two = run(inputs), run(others)
    np.testing.assert_array_equal(one.prediction[0], two.prediction[0])
    assert np.any(np.asarray(one.prediction[1]) != np.asarray(two.prediction[1]))
    served = np.asarray(one.aux.health["counts"])
    assert np.any(served > 0) and np.any(served < 3 * TOKENS)
