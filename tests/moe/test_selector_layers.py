"""Layers with each selector: gradients of the router, work, shapes, scale, entropy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capable import make, problems
from selecting import ASIDE, VALID, logits_for, route, tokens_of

from moe_jax.moe.layer import MoELayer
from moe_jax.moe.noises import NOISES
from moe_jax.moe.noises.learned_gaussian import LearnedGaussian
from moe_jax.moe.selectors import SELECTORS, top_p
from moe_jax.moe.selectors.diff_moe import DiffMoE
from moe_jax.moe.selectors.expert_choice import ExpertChoice
from moe_jax.moe.selectors.global_top_k import GlobalTopK
from moe_jax.moe.selectors.group_limited import GroupLimited
from moe_jax.moe.selectors.hashing import Hash
from moe_jax.moe.selectors.mixture_of_tokens import MixtureOfTokens
from moe_jax.moe.selectors.pro_moe import ProMoE, ProMoEChoice
from moe_jax.moe.selectors.soft_moe import SoftMoE
from moe_jax.moe.selectors.sparse_mixer import SparseMixer
from moe_jax.moe.selectors.sparse_mixer_v2 import SparseMixerV2
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.moe.selectors.top_p import TopP
from moe_jax.nn.module import Template

ONE_EXPERT = [
    TopK(top_k=1, renormalize=False),
    TopK(top_k=1, renormalize=False, score="sigmoid"),
    GroupLimited(top_k=1, num_groups=4, top_groups=2, renormalize=False),
    TopP(k_max=1, expected_k=1.0),
    GlobalTopK(top_k=1, k_max=1),
    SparseMixerV2(top_k=1, eps=0.5),
]


@pytest.mark.parametrize("options", ONE_EXPERT, ids=str)
def test_one_expert_teaches_its_router(options):
    """A softmax over the one that was chosen is 1 whatever the score: no gradient."""
    z = jnp.asarray(logits_for(options), jnp.float32)
    total = lambda z: jnp.sum(route(options, z).weight_tk)
    assert np.abs(jax.grad(total)(z)).max() > 1e-3


def test_work_and_active_parameters_follow_the_selector():
    served = {
        TopK: (2.0, 2.0),
        GroupLimited: (3.0, 3.0),
        TopP: (2.0, 2.0),
        Hash: (1.0, 1.0),
        ExpertChoice: (2.0, 2.0),
        SparseMixer: (1.0, 1.0),
        SparseMixerV2: (2.0, 2.0),
        GlobalTopK: (2.0, 2.0),
        ProMoE: (1.0, 1.0),
        ProMoEChoice: (1.0, 1.0),
        DiffMoE: (1.0, 1.0),
        SoftMoE: (8.0, 8 / 64),
        MixtureOfTokens: (8.0, 8 / 2),
    }
    for selector in SELECTORS:
        options = make(selector).selector
        pair = (options.experts_per_token(8), options.experts_per_token(8, 64))
        assert pair == served[selector]


def test_the_layer_carries_noise_entropy_and_scale():
    """Every selector and noise that combine go through the layer as they stand."""
    for selector, noise in itertools.product(SELECTORS, [None, *NOISES]):
        moe = make(selector, noise=noise and noise(), output_scale=noise is None)
        if problems(moe):
            continue
        made = Template(lambda rngs, m=moe: MoELayer(6, m, rngs=rngs))
        weights = jax.eval_shape(made.init, jax.random.key(0))
        assert ("output_scale" in weights) == (noise is None)
        assert ("noise" in weights) == (noise is LearnedGaussian)
        x = jax.ShapeDtypeStruct((2, 8, 6), jnp.bfloat16)
        ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        split = lambda a: a.reshape(2, 8, *a.shape[1:])
        told = jax.tree.map(split, tokens_of(batch=(2, 8)).condition)
        given = dict(condition=told, key=jax.random.key(0))
        y, _, aux = jax.eval_shape(
            lambda w, x, ids, made=made, given=given: made.bind(w)(
                x, token_ids=ids, **given
            ),
            weights,
            x,
            ids,
        )
        assert y.shape == x.shape and y.dtype == x.dtype
        assert ("top_p_entropy_loss" in aux.losses) == (selector is TopP)
        assert ("contrastive_loss" in aux.losses) == (selector in ASIDE)
        assert ("capacity_predictor_loss" in aux.losses) == (selector is DiffMoE)
        assert all(v.dtype == jnp.float32 for v in aux.losses.values())


def test_the_scale_multiplies_the_routed_experts():
    moe = make(TopK, output_scale=True)
    moe.shared_d_ff = 4
    made = Template(lambda rngs: MoELayer(6, moe, rngs=rngs))
    shapes = jax.eval_shape(made.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda a: rng.normal(size=a.shape).astype("f4"), shapes)
    run = jax.jit(lambda w, x: made.bind(w)(x)[0])
    x = rng.normal(size=(2, 8, 6)).astype("f4")
    scaled = run(weights, x)
    shared = run({**weights, "output_scale": np.zeros(6, "f4")}, x)
    plain = run({**weights, "output_scale": np.ones(6, "f4")}, x)
    want = shared + (plain - shared) * weights["output_scale"]
    np.testing.assert_allclose(scaled, want, rtol=1e-4, atol=1e-5)
    assert np.abs(shared).max() > 0.1


def test_the_entropy_loss_by_hand(float64):
    """Uniform over E: log E; its gradient reaches the scorer."""
    options = TopP(entropy_weight=0.5)
    flat = route(options, np.zeros((24, 8)))
    found = top_p.losses(options, flat, None, None)["top_p_entropy_loss"]
    np.testing.assert_allclose(found, 0.5 * np.log(8), rtol=1e-12)
    z = logits_for(options)
    probs = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    want = -0.5 * (probs * np.log(probs)).sum(axis=1)[VALID].mean()
    value = lambda z: top_p.losses(options, route(options, z, VALID), None, None)
    np.testing.assert_allclose(value(z)["top_p_entropy_loss"], want, rtol=1e-12)
    grad = jax.grad(lambda z: value(z)["top_p_entropy_loss"])(jnp.asarray(z))
    # dH/dz_e = -p_e (log p_e + H).
    entropy = -(probs * np.log(probs)).sum(axis=1, keepdims=True)
    want = -0.5 * probs * (np.log(probs) + entropy) * VALID[:, None] / VALID.sum()
    np.testing.assert_allclose(grad, want, rtol=1e-9, atol=1e-15)
    assert top_p.losses(TopP(entropy_weight=0.0), flat, None, None) == {}
