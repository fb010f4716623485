"""Switch-DiT's diffusion prior: golden numbers, the matching, the loss and its key."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dit_numpy import silu, softmax, two_layers, waves
from scipy.optimize import linear_sum_assignment
from test_dit import E, drawn, given, options

from moe_jax.models.dit import DiTModel
from moe_jax.models.masks import diffusion_prior
from moe_jax.models.masks.switch_dit import SwitchDiT
from moe_jax.moe.routing import EVAL, TRAIN
from moe_jax.tree import named_leaves

L, T = 3, 40
SWITCH = SwitchDiT(num_experts=E, prior_steps=T, prior_weight=2.0, dtype="float64")


@pytest.fixture(scope="module")
def model():
    with jax.enable_x64(True):
        made = dict(image_size=4, condition_dropout=0.0, num_layers=L)
        return DiTModel(options(input_mask=SWITCH, **made))


def inputs(**fields):
    made = given(label=jnp.asarray([4, 2, 0]), time=jnp.asarray([0, 700.0, 999]))
    return dataclasses.replace(made, x=made.x[:, :4, :4], **fields)


def losses(model, params, told, key=3, mode=TRAIN):
    key = None if key is None else jax.random.key(key)
    step = lambda p: model.apply(p, {}, told, key=key, mode=mode).losses
    return jax.jit(step)(params)


@pytest.mark.parametrize(
    ("layers", "count", "top_k", "want"),
    [(12, 3, 2, [0, 1, 5, 12]), (4, 8, 1, None)],
)
def test_the_prior(layers, count, top_k, want):
    made = SwitchDiT(num_experts=count, top_k=top_k)
    found = np.asarray(diffusion_prior.prior(made, layers))
    assert found.shape == (1000, layers * count)
    assert (found.sum(axis=1) == layers * top_k).all()
    free = layers * (count - top_k)
    start = np.round((np.arange(1000) / 999) ** 4 * free)
    np.testing.assert_array_equal(found.argmax(axis=1), start)
    if want:
        np.testing.assert_array_equal(start[[0, 500, 800, 999]], want)
    np.testing.assert_allclose(diffusion_prior.times(made), np.arange(1000), rtol=1e-12)


def test_the_best_matching(float64):
    """As good as that of another program; exact where the choice is a prior."""
    rng = np.random.default_rng(0)
    prior = np.asarray(diffusion_prior.prior(SWITCH, L))
    find = jax.jit(diffusion_prior.matched)
    for seed in range(4):
        chosen = rng.random(prior.shape) < 0.5
        found = np.asarray(find(chosen, prior, jax.random.key(seed)))
        columns = lambda a: sorted(map(tuple, a.T.tolist()))
        assert columns(found) == columns(prior)
        cost = np.abs(chosen[:, :, None] * 1 - prior[:, None] * 1).sum(axis=0)
        want = cost[linear_sum_assignment(cost)].sum()
        assert np.abs(found * 1 - chosen * 1).sum() == want
        mixed = prior[:, rng.permutation(prior.shape[1])]
        found = find(mixed, prior, jax.random.key(seed))
        np.testing.assert_array_equal(found, mixed)


def test_the_key_decides_between_equal_matchings():
    prior = np.asarray(diffusion_prior.prior(SWITCH, L))
    find = jax.jit(diffusion_prior.matched)
    of = lambda key: np.asarray(find(jnp.ones_like(prior), prior, jax.random.key(key)))
    np.testing.assert_array_equal(of(0), of(0))
    assert (of(0) != of(1)).any()


def test_the_divergence():
    a = jnp.asarray([[0.5, 0.5, 0, 0], [0.25, 0.25, 0.5, 0], [0.1, 0.2, 0.3, 0.4]])
    b = jnp.asarray([[0, 0, 0.5, 0.5], [0.25, 0.25, 0, 0.5], [0.1, 0.2, 0.3, 0.4]])
    want = [np.log(2), np.log(2) / 2, 0]
    np.testing.assert_allclose(diffusion_prior.divergence(a, b), want, atol=1e-5)


def by_hand(params, told, prior):
    """The loss, with the matched prior given."""
    w = params["segment_0"]["block_0"]["mask"]["scorer"]
    total = []
    for t in np.asarray(told.time):
        e = silu(two_layers(params["time"], waves(t)))
        p = np.concatenate([softmax(e @ w["w"][i] + w["b"][i]) for i in range(L)]) / L
        q = prior[round(t / 999 * (T - 1))] / (L * SWITCH.top_k)
        log = lambda x: np.log(x + 1e-6)
        m = log((p + q) / 2)
        total.append(0.5 * (p * (log(p) - m)).sum() + 0.5 * (q * (log(q) - m)).sum())
    return np.array(total)


def matched_by_hand(params, key=3):
    """The routers' choice at all times by numpy; the key as the model folds it."""
    w = params["segment_0"]["block_0"]["mask"]["scorer"]
    chosen = np.zeros((T, L, E))
    for n, t in enumerate(np.arange(T) / (T - 1) * 999):
        e = silu(two_layers(params["time"], waves(t)))
        for i in range(L):
            best = np.argsort(-(e @ w["w"][i] + w["b"][i]))[: SWITCH.top_k]
            chosen[n, i, best] = 1
    own = jax.random.fold_in(jax.random.key(key), L + 1)
    prior = diffusion_prior.prior(SWITCH, L)
    return np.asarray(diffusion_prior.matched(chosen.reshape(T, -1), prior, own))


def test_the_loss_and_its_gradients_are_those_of_numpy(float64, model):
    params, told = drawn(model), inputs()
    numbers = jax.tree.map(np.asarray, params)
    prior = matched_by_hand(numbers)
    want = 2.0 * by_hand(numbers, told, prior).mean()
    assert want > 0.01
    (found,) = losses(model, params, told).values()
    np.testing.assert_allclose(found, want, rtol=1e-10)
    some = dataclasses.replace(told, valid=jnp.asarray([True, False, True]))
    (found,) = losses(model, params, some).values()
    want = 2.0 * by_hand(numbers, told, prior)[[0, 2]].mean()
    np.testing.assert_allclose(found, want, rtol=1e-10)
    value = lambda p: losses(model, p, some)["diffusion_prior_loss"]
    grads = named_leaves(jax.grad(value)(params))
    leaves, tree = jax.tree.flatten(numbers)
    rng = np.random.default_rng(1)
    for i, name in enumerate(named_leaves(numbers)):
        if not ("scorer" in name or name.startswith("time/")):
            assert not np.any(grads[name]), name
            continue
        way, moved = rng.normal(size=leaves[i].shape), []
        for sign in (1, -1):
            other = leaves[i] + sign * 1e-6 * way
            other = tree.unflatten([*leaves[:i], other, *leaves[i + 1 :]])
            moved.append(2.0 * by_hand(other, told, prior)[[0, 2]].mean())
        want = (moved[0] - moved[1]) / 2e-6
        assert abs(want) > 1e-6, name
        np.testing.assert_allclose(np.sum(way * grads[name]), want, rtol=1e-5)


def test_when_there_is_no_loss(float64, model):
    params, told = drawn(model), inputs()
    assert losses(model, params, told, mode=EVAL) == {}
    with pytest.raises(ValueError, match="prior draws in training: pass a key"):
        losses(model, params, told, key=None)
    off = dataclasses.replace(
        model.options, input_mask=dataclasses.replace(SWITCH, prior_weight=0.0)
    )
    assert losses(DiTModel(off), params, told, key=None) == {}
    nobody = dataclasses.replace(told, valid=jnp.zeros(3, bool))
    assert float(losses(model, params, nobody)["diffusion_prior_loss"]) == 0
