"""Noise in a router: what it draws, that it combines, and that evaluation has none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import config
from moe_jax.moe.noises import NOISES
from moe_jax.moe.noises.epsilon_greedy import EpsilonGreedy
from moe_jax.moe.noises.gaussian import Gaussian
from moe_jax.moe.noises.input_jitter import InputJitter
from moe_jax.moe.noises.learned_gaussian import LearnedGaussian
from moe_jax.moe.noises.sampled_experts import SampledExperts
from moe_jax.moe.route import route
from moe_jax.moe.routing import EVAL, TRAIN, Override, Tokens
from moe_jax.moe.scorers.linear import Linear, LinearScorer
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.moe.selectors.top_p import TopP
from moe_jax.nn.module import Template

T, D, E = 4000, 3, 6
CASES = [InputJitter(eps=0.2), Gaussian(sigma=3.0), LearnedGaussian(), EpsilonGreedy()]
CASES.append(SampledExperts())
SELECTOR = TopK(top_k=2, renormalize=False)


def scorer():
    options = Linear(init_std=1.0)
    made = Template(lambda rngs: LinearScorer(D, E, options, rngs))
    return made.bind(made.init(jax.random.key(0)))


def noise_of(options, weights=None):
    made = Template(lambda rngs: NOISES[type(options)](D, E, options, rngs))
    return made.bind(made.init(jax.random.key(0)) if weights is None else weights)


def run(noise, mode=TRAIN, selector=SELECTOR, override=None, key=7, dtype="float32"):
    x = np.random.default_rng(0).normal(size=(T, D))
    tokens = Tokens(
        features=jnp.asarray(x, dtype), valid=jnp.ones(T, bool), batch_shape=(40, 100)
    )
    key = None if key is None else jax.random.key(key)
    made = scorer()
    return route(made, noise, selector, tokens, {}, None, key, mode, override)[0]


def test_every_noise_has_a_case():
    assert {type(options) for options in CASES} == set(NOISES)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_noise_acts_in_training_only(options):
    noise, clean = noise_of(options), run(None, EVAL, key=None)
    for key in (None, 7):
        found = run(noise, EVAL, key=key)
        found = dataclasses.replace(found, noisy_te=None, noise_std=None)
        jax.tree.map(np.testing.assert_array_equal, found, clean)
    one, same, other = run(noise), run(noise), run(noise, key=8)
    jax.tree.map(np.testing.assert_array_equal, one, same)
    for found in (clean, other):
        assert (one.expert_tk != found.expert_tk).any()
    with pytest.raises(ValueError, match="draws in training: pass a key"):
        run(noise, key=None)


def test_jitter_multiplies_what_the_router_sees():
    """The logits over those of the clean tokens: each feature by its own factor."""
    noise, eps = noise_of(InputJitter(eps=0.2)), 0.2
    x = np.random.default_rng(0).normal(size=(T, D)).astype(np.float32)
    tokens = Tokens(
        features=jnp.asarray(x), valid=jnp.ones(T, bool), batch_shape=(1, T)
    )
    seen = noise.features(tokens, jax.random.key(0), TRAIN).features
    factor = np.asarray(seen) / x
    assert 1 - eps - 1e-5 <= factor.min() and factor.max() <= 1 + eps + 1e-5
    # Mean 1 and deviation eps / sqrt(3), within five standard errors.
    np.testing.assert_allclose(factor.mean(), 1, atol=5 * eps / 3**0.5 / (T * D) ** 0.5)
    np.testing.assert_allclose(factor.std(), eps / 3**0.5, rtol=0.03)
    # A factor rounded to bfloat16 would take three values or so.
    low = dataclasses.replace(tokens, features=tokens.features.astype(jnp.bfloat16))
    fine = noise_of(InputJitter(eps=0.004)).features(low, jax.random.key(0), TRAIN)
    assert fine.features.dtype == jnp.float32
    factor = fine.features / low.features.astype(jnp.float32)
    assert len(np.unique(np.asarray(factor).round(5))) > 100


def test_gaussian_noise_of_the_configured_deviation():
    routing = run(noise_of(Gaussian(sigma=3.0)))
    clean = run(None)
    np.testing.assert_array_equal(routing.logits_te, clean.logits_te)
    np.testing.assert_allclose(routing.noise_std, 3.0 / E, rtol=1e-6)
    drawn = np.asarray(routing.noisy_te - routing.logits_te)
    np.testing.assert_allclose(drawn.mean(), 0, atol=5 * 0.5 / (T * E) ** 0.5)
    np.testing.assert_allclose(drawn.std(), 0.5, rtol=0.03)
    correlation = np.corrcoef(drawn.T) - np.eye(E)
    assert np.abs(correlation).max() < 5 / T**0.5
    # Choice, weights and probabilities are those of the noisy logits.
    probs = np.exp(np.asarray(routing.noisy_te, np.float64))
    probs /= probs.sum(axis=1, keepdims=True)
    best = np.argsort(-probs, axis=1)[:, :2]
    np.testing.assert_array_equal(routing.expert_tk, best)
    weight = np.take_along_axis(probs, best, axis=1)
    np.testing.assert_allclose(routing.weight_tk, weight, rtol=1e-4)
    np.testing.assert_allclose(routing.probs_te, probs, rtol=1e-4)
    # In evaluation the load loss sees no noise, and its deviation.
    calm = run(noise_of(Gaussian(sigma=3.0)), EVAL)
    np.testing.assert_array_equal(calm.noisy_te, calm.logits_te)
    np.testing.assert_allclose(calm.noise_std, 0.5, rtol=1e-6)


def test_learned_noise_has_a_deviation_for_each_token():
    w = np.random.default_rng(3).normal(size=(D, E)).astype(np.float32)
    noise = noise_of(LearnedGaussian(floor=0.25), {"w": jnp.asarray(w)})
    routing = run(noise)
    x = np.random.default_rng(0).normal(size=(T, D))
    std = np.log1p(np.exp(x @ w)) + 0.25
    np.testing.assert_allclose(routing.noise_std, std, rtol=1e-4)
    drawn = np.asarray(routing.noisy_te - routing.logits_te) / std
    np.testing.assert_allclose(drawn.std(axis=0), np.ones(E), rtol=0.06)
    assert np.all(np.asarray(noise_of(LearnedGaussian()).w[...]) == 0)

    def total(w):
        routing = run(noise_of(LearnedGaussian(), {"w": w}))
        return jnp.sum(routing.weight_tk) + jnp.sum(routing.noise_std)

    assert np.abs(jax.grad(total)(jnp.asarray(w))).min() > 0


def test_epsilon_greedy_explores_with_its_probability():
    """Explorers get two experts of six at random: the two best for 1 of 15."""
    clean, found = run(None), run(noise_of(EpsilonGreedy(probability=0.3)))
    same = np.sort(np.asarray(clean.expert_tk)) == np.sort(np.asarray(found.expert_tk))
    rate = 0.3 * (1 - 1 / 15)
    moved = ~same.all(axis=1)
    np.testing.assert_allclose(moved.mean(), rate, atol=5 * (rate / T) ** 0.5)
    experts = np.asarray(found.expert_tk)
    assert (experts[:, 0] != experts[:, 1]).all()
    # The weights are what the scores give to the experts that were drawn.
    want = np.take_along_axis(np.asarray(clean.probs_te), experts, axis=1)
    np.testing.assert_allclose(found.weight_tk, want, rtol=1e-6)
    everyone = run(noise_of(EpsilonGreedy(probability=1.0)))
    counts = np.bincount(np.asarray(everyone.expert_tk).ravel(), minlength=E)
    mean = 2 * T / E
    assert np.abs(counts - mean).max() < 5 * mean**0.5


def test_epsilon_greedy_keeps_to_the_override_and_the_number():
    noise = noise_of(EpsilonGreedy(probability=1.0))
    mask = jnp.array([True, True, False, True, True, True])
    found = run(noise, override=Override(expert_mask=mask))
    assert not (np.asarray(found.expert_tk) == 2).any() and np.all(found.valid_tk)
    replay = Override(
        expert_tk=jnp.tile(jnp.array([[4, 1]], jnp.int32), (T, 1)),
        valid_tk=jnp.ones((T, 2), bool),
    )
    np.testing.assert_array_equal(
        run(noise, override=replay).expert_tk, replay.expert_tk
    )
    selector = TopP(p=0.5, k_max=4)
    clean, found = run(None, selector=selector), run(noise, selector=selector)
    np.testing.assert_array_equal(found.valid_tk, clean.valid_tk)


def test_experts_are_drawn_without_replacement():
    """P(i, then j) = p_i p_j / (1 - p_i), for each image once."""
    rows, length = 4000, 3
    logits = np.array([2.0, 1.0, 0.0, -1.0, -40.0])

    class Constant(LinearScorer):
        def __call__(self, tokens, carry, key, mode):
            return jnp.tile(jnp.asarray(logits, "float32"), (rows * length, 1)), carry

    tokens = Tokens(
        features=jnp.zeros((rows * length, D)),
        valid=jnp.ones(rows * length, bool),
        batch_shape=(rows, length),
    )
    constant = Constant(D, 5, Linear(), nnx.Rngs(0))
    noise = NOISES[SampledExperts](D, 5, SampledExperts(), nnx.Rngs(0))
    given = (tokens, {}, None, jax.random.key(3), TRAIN)
    routing, _ = route(constant, noise, TopK(top_k=2), *given, None)
    chosen = np.asarray(routing.expert_tk).reshape(rows, length, 2)
    assert (chosen == chosen[:, :1]).all()
    p = np.exp(logits) / np.exp(logits).sum()
    for i in range(4):
        for j in range(4):
            want = 0 if i == j else p[i] * p[j] / (1 - p[i])
            rate = (chosen[:, 0] == [i, j]).all(axis=1).mean()
            assert abs(rate - want) < 5 * (want / rows) ** 0.5 + 1e-9, (i, j)
    # Weights are the clean probabilities, renormalised.
    weights = p[routing.expert_tk]
    weights /= weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(routing.weight_tk, weights, rtol=1e-5)
    pruned = Override(expert_mask=jnp.array([False, True, True, True, True]))
    routing, _ = route(constant, noise, TopK(top_k=4), *given, pruned)
    assert not (np.asarray(routing.expert_tk) == 0).any()
    # The least probable comes last, and is taken where nothing else is left.
    np.testing.assert_array_equal(routing.expert_tk[:, 3], 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (InputJitter(eps=0.0), "eps=0.0: must lie in (0, 1)"),
        (Gaussian(sigma=0.0), "sigma=0.0: must be positive"),
        (LearnedGaussian(floor=0.0), "floor=0.0: must be positive"),
        (LearnedGaussian(dtype="int"), "dtype='int'"),
        (EpsilonGreedy(probability=1.5), "probability=1.5: must lie in (0, 1]"),
        *((options, "") for options in CASES),
    ],
)
def test_problems(options, words):
    found = list(options.problems("config.noise", config.Config()))
    assert any(words in problem for problem in found) if words else found == []
