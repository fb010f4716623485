"""Scorers against numpy, and what all of them must keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import ACTIVATIONS

from moe_jax import config
from moe_jax.models.decoder_config import Decoder
from moe_jax.moe.layer import MoE
from moe_jax.moe.routing import EVAL, Condition, Tokens
from moe_jax.moe.scorers import SCORERS
from moe_jax.moe.scorers.cosine import Cosine
from moe_jax.moe.scorers.linear import Linear
from moe_jax.moe.scorers.mlp import MLP
from moe_jax.moe.scorers.no_scores import NoScores
from moe_jax.moe.scorers.timestep import Timestep, TimestepMLP
from moe_jax.nn.module import Template

T, D, E = 9, 6, 5
WIDE = dict(init_std=0.5, dtype="float64")
CASES = [
    Linear(**WIDE),
    Linear(bias=True, **WIDE),
    Cosine(proj_dim=4, temperature=0.25, **WIDE),
    Cosine(proj_dim=0, temperature=1.0, **WIDE),
    MLP(hidden=7, **WIDE),
    MLP(hidden=3, activation="relu", **WIDE),
    Timestep(**WIDE),
    TimestepMLP(**WIDE),
    TimestepMLP(hidden=3, activation="relu", **WIDE),
    NoScores(),
]


def cosine(options, weights, x):
    out = np.zeros((T, E))
    scale = np.exp(min(weights["log_scale"], -np.log(options.min_temperature)))
    for t in range(T):
        row = x[t] @ weights["w_proj"] if options.proj_dim else x[t]
        for e in range(E):
            column = weights["w"][:, e]
            length = np.linalg.norm(row) * np.linalg.norm(column)
            out[t, e] = scale * (row @ column) / length
    return out


def mlp(options, weights, x):
    return ACTIVATIONS[options.activation](x @ weights["w_in"]) @ weights["w_out"]


EXPECTED = {
    Linear: lambda options, weights, x: x @ weights["w"] + weights.get("b", 0),
    Cosine: cosine,
    MLP: mlp,
    Timestep: lambda options, weights, x: (
        x / (1 + np.exp(-x)) @ weights["w"] + weights["b"]
    ),
    TimestepMLP: mlp,
    NoScores: lambda options, weights, x: np.zeros((T, E)),
}


def made(options):
    return Template(lambda rngs: SCORERS[type(options)](D, E, options, rngs))


def score(template, weights, x):
    """Each token is an image; to scorers by time x is the embedding of its time."""
    valid = jnp.ones(T, bool)
    condition = Condition(time=jnp.zeros(T), time_embedding=x, embedding=-x)
    tokens = Tokens(features=x, valid=valid, batch_shape=(T, 1), condition=condition)
    return template.bind(weights)(tokens, None, None, EVAL)


def test_every_scorer_has_a_case():
    assert {type(options) for options in CASES} == set(SCORERS) == set(EXPECTED)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_logits_match_numpy(float64, options):
    template, x = made(options), np.random.default_rng(0).normal(size=(T, D))
    weights = template.init(jax.random.key(1))
    assert set(template.axes) == set(weights)
    if "b" in weights:
        assert not np.any(weights["b"])
        weights["b"] = jnp.arange(1.0, E + 1)
    logits, carry = score(template, weights, jnp.asarray(x))
    want = EXPECTED[type(options)](options, jax.tree.map(np.asarray, weights), x)
    np.testing.assert_allclose(logits, want, rtol=1e-10, atol=1e-13)
    assert carry is None and logits.dtype == jnp.float64
    assert SCORERS[type(options)].init_carry(options, T) is None


@pytest.mark.parametrize("options", CASES[:-1], ids=str)
def test_gradients_reach_every_weight(float64, options):
    template, x = made(options), np.random.default_rng(0).normal(size=(T, D))
    weights = template.init(jax.random.key(1))
    factors = np.random.default_rng(2).normal(size=(T, E))
    value = lambda weights, x: jnp.sum(score(template, weights, x)[0] * factors)
    grads, _ = jax.grad(value, (0, 1))(weights, jnp.asarray(x))
    step = 1e-6
    for name, grad in grads.items():
        place = np.unravel_index(np.abs(grad).argmax(), grad.shape)
        assert np.abs(np.asarray(grad)[place]) > 1e-3
        moved = lambda sign, n=name, p=place: (
            weights | {n: weights[n].at[p].add(sign * step)}
        )
        up, down = (float(value(moved(sign), jnp.asarray(x))) for sign in (1, -1))
        want = (up - down) / (2 * step)
        np.testing.assert_allclose(np.asarray(grad)[place], want, rtol=1e-6)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_low_precision_tokens_are_scored_in_the_routers_precision(options):
    """Experts flip on differences that bfloat16 does not hold."""
    if not isinstance(options, NoScores):
        options = type(options)(init_std=0.5)
    template = made(options)
    weights = template.init(jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(T, D)).astype(jnp.bfloat16)
    logits = score(template, weights, jnp.asarray(x))[0]
    assert logits.dtype == jnp.float32
    wide = score(template, weights, jnp.asarray(x, jnp.float32))[0]
    np.testing.assert_array_equal(logits, wide)


def test_the_cosine_sees_directions_only():
    options = Cosine(proj_dim=0, temperature=0.5)
    template = made(options)
    weights = template.init(jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(T, D)).astype(np.float32)
    logits = np.asarray(score(template, weights, jnp.asarray(x))[0])
    assert np.abs(logits).max() <= 2.0 + 1e-5
    same = score(template, weights, jnp.asarray(x * 37))[0]
    np.testing.assert_allclose(same, logits, rtol=1e-4, atol=1e-6)
    # The temperature does not fall below its bound, whatever is learned.
    cold = weights | {"log_scale": jnp.float32(50.0)}
    bounded = score(template, cold, jnp.asarray(x))[0]
    np.testing.assert_allclose(bounded, logits * 50, rtol=1e-4, atol=1e-5)
    # A token of zeros has a gradient, and no NaN.
    grad = jax.grad(lambda x: jnp.sum(score(template, weights, x)[0]))(
        jnp.zeros((T, D))
    )
    assert np.isfinite(np.asarray(grad)).all()


@pytest.mark.parametrize("options", [Timestep(**WIDE), TimestepMLP(**WIDE)], ids=str)
def test_tokens_of_an_image_share_the_logits_of_its_time(float64, options):
    template, rng = made(options), np.random.default_rng(0)
    weights = template.init(jax.random.key(0))
    time_bd, features = rng.normal(size=(3, D)), rng.normal(size=(3 * 4, D))

    def tokens_at(time_bd):
        time_td = jnp.repeat(time_bd, 4, axis=0)
        told = Condition(
            time=jnp.zeros(12), time_embedding=time_td, embedding=2 * time_td
        )
        return Tokens(
            features=jnp.asarray(features),
            valid=jnp.ones(12, bool),
            batch_shape=(3, 4),
            condition=told,
        )

    scorer = template.bind(weights)
    found, _ = scorer(tokens_at(jnp.asarray(time_bd)), None, None, EVAL)
    want = EXPECTED[type(options)](options, jax.tree.map(np.asarray, weights), time_bd)
    np.testing.assert_allclose(found, np.repeat(want, 4, axis=0), rtol=1e-10)
    # The image's embedding gets the gradients of all its tokens.
    factors = rng.normal(size=(12, E))
    value = lambda t: jnp.sum(scorer(tokens_at(t), None, None, EVAL)[0] * factors)
    grad, way = jax.grad(value)(jnp.asarray(time_bd)), rng.normal(size=(3, D))
    moved = [value(jnp.asarray(time_bd + sign * 1e-6 * way)) for sign in (1, -1)]
    want = (moved[0] - moved[1]) / 2e-6
    np.testing.assert_allclose(np.sum(grad * way), want, rtol=1e-6)
    alone = dataclasses.replace(tokens_at(jnp.asarray(time_bd)), condition=None)
    with pytest.raises(ValueError, match="scores the time of a noisy image"):
        scorer(alone, None, None, EVAL)


def test_text_has_no_time():
    model = Decoder(feed_forward=MoE(scorer=Timestep()))
    (found,) = model.problems("config.model", config.Config())
    assert "feed_forward.scorer=Timestep scores the time of a noisy image" in found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Cosine(proj_dim=-1), "proj_dim=-1: must not be negative"),
        (Cosine(temperature=0.0), "temperature=0.0: must be positive"),
        (Cosine(temperature=0.001), "is below"),
        (Cosine(init_std=0.0), "init_std=0.0: must be positive"),
        (Cosine(dtype="float8"), "dtype='float8'"),
        (MLP(hidden=0), "hidden=0: must be at least 1"),
        (MLP(activation="step"), "activation='step'"),
        (MLP(init_std=-1.0), "init_std=-1.0: must be positive"),
        (Timestep(init_std=-1.0), "init_std=-1.0: must not be negative"),
        (TimestepMLP(hidden=-1), "hidden=-1: must not be negative"),
        (TimestepMLP(activation="step"), "activation='step'"),
        (TimestepMLP(init_std=0.0), "init_std=0.0: must be positive"),
        (Timestep(init_std=0.0), ""),
        (TimestepMLP(), ""),
        (Cosine(), ""),
        (MLP(), ""),
        (NoScores(), ""),
    ],
)
def test_problems(options, words):
    found = list(options.problems("config.scorer", config.Config()))
    assert any(words in problem for problem in found) if words else found == []
