"""Experts on padded rows, on ragged rows, and one row at a time."""

import jax
import numpy as np
import oracles
import pytest
from flax import nnx

from moe_jax import config
from moe_jax.moe.experts.feed_forward import ExpertFeedForward, FeedForwardExperts
from moe_jax.moe.layer import MoE
from moe_jax.nn import feedforward

D, F, E, C = 6, 10, 3, 4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", sorted(feedforward.ACTIVATIONS))
def test_batched_and_ragged_rows_match_a_loop(float64, activation, gated, bias):
    options = ExpertFeedForward(d_ff=F, activation=activation, gated=gated, bias=bias)
    experts = FeedForwardExperts(
        D, E, options, std=0.5, out_std=0.5, dtype="float64", rngs=nnx.Rngs(1)
    )
    weights = jax.tree.map(np.asarray, experts.weights())
    matrices = {"up", "down"} | ({"gate"} if gated else set())
    letters = "wb" if bias else "w"
    assert set(weights) == {f"{letter}_{m}" for letter in letters for m in matrices}
    rng = np.random.default_rng(0)
    for name in weights:
        if name.startswith("b_"):
            assert not weights[name].any(), "a bias begins at zero"
            weights[name] = rng.normal(size=weights[name].shape)
    x = rng.normal(size=(E, C, D))
    batched = experts.rows(weights, {"features": x})
    for e in range(E):
        for c in range(C):
            want = oracles.expert(weights, e, x[e, c], activation)
            np.testing.assert_allclose(batched[e, c], want, rtol=1e-10, atol=1e-12)
    sizes = np.array([4, 0, 3], np.int32)
    beyond = np.full((2, D), 1e9)  # Rows of nobody.
    together = {"features": np.concatenate([x[0], x[2], beyond])}
    ragged = experts.rows(weights, together, sizes)
    scale = rng.normal(size=len(ragged))
    scaled = experts.rows(weights, together, sizes, scale)
    owners = [0] * 4 + [2] * 3
    rows = [*x[0], *x[2]]
    for row, e in enumerate(owners):
        want = oracles.expert(weights, e, rows[row], activation)
        np.testing.assert_allclose(ragged[row], want, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(
            scaled[row], scale[row] * want, rtol=1e-10, atol=1e-12
        )


def test_ragged_gradients_of_a_bias_are_sums_over_its_rows(float64):
    """`dy / db_down` of expert e counts its rows, and those beyond count for nobody."""
    options = ExpertFeedForward(d_ff=F, bias=True)
    experts = FeedForwardExperts(
        D, E, options, std=0.5, out_std=0.5, dtype="float64", rngs=nnx.Rngs(1)
    )
    rows = {"features": np.random.default_rng(0).normal(size=(9, D))}
    sizes = np.array([4, 0, 3], np.int32)
    total = lambda weights: experts.rows(weights, rows, sizes)[:7].sum()
    grad = jax.grad(total)(experts.weights())["b_down"]
    np.testing.assert_allclose(grad, np.repeat([[4.0], [0], [3]], D, axis=1))


def test_a_dense_feed_forward_may_have_biases(float64):
    """The shared expert is one expert of the same kind."""
    options = feedforward.Dense(d_ff=F, bias=True)
    layer = feedforward.FeedForward(
        D, options, std=0.5, out_std=0.5, dtype="float64", rngs=nnx.Rngs(0)
    )
    rng = np.random.default_rng(1)
    for name in ("b_gate", "b_up", "b_down"):
        param = getattr(layer, name)
        assert not np.any(param[...])
        param[...] = rng.normal(size=param.shape)
    names = [f"{a}_{b}" for a in "wb" for b in ("gate", "up", "down")]
    weights = {name: np.asarray(getattr(layer, name)[...])[None] for name in names}
    x = rng.normal(size=(1, 2, D))
    for s in range(2):
        want = oracles.expert(weights, 0, x[0, s])
        np.testing.assert_allclose(layer(x)[0, s], want, rtol=1e-10, atol=1e-12)


def test_clamped_units_with_an_offset(float64):
    """Those of GPT-OSS, in experts and in a dense feed-forward of their kind."""
    unit = dict(d_ff=F, activation="quick_gelu", clamp=0.6, up_offset=1.0)
    sizes = dict(std=0.5, out_std=0.5, dtype="float64", rngs=nnx.Rngs(1))
    experts = FeedForwardExperts(D, E, ExpertFeedForward(**unit), **sizes)
    options = MoE(experts=ExpertFeedForward(**unit)).dense(F)
    assert options == feedforward.Dense(**unit)
    dense = feedforward.FeedForward(D, options, **sizes)
    x = np.random.default_rng(0).normal(size=(E, C, D)) * 3
    weights = jax.tree.map(np.asarray, experts.weights())
    of_dense = {
        name: np.asarray(getattr(dense, name)[...])[None]
        for name in ("w_gate", "w_up", "w_down")
    }
    found, together = experts.rows(weights, {"features": x}), dense(x)
    gates, ups = (x[0] @ weights[name][0] for name in ("w_gate", "w_up"))
    for values in (gates, ups):
        assert np.any(values > 0.6) and np.any(values < -0.6) and np.ptp(values) > 0
    given = ("quick_gelu", 0.6, 1.0)
    for e, c in np.ndindex(E, C):
        want = oracles.expert(weights, e, x[e, c], *given)
        np.testing.assert_allclose(found[e, c], want, rtol=1e-10, atol=1e-12)
        want = oracles.expert(of_dense, 0, x[e, c], *given)
        np.testing.assert_allclose(together[e, c], want, rtol=1e-10, atol=1e-12)


def test_logical_axes():
    experts = FeedForwardExperts(
        D, E, ExpertFeedForward(d_ff=F, bias=True), std=1, out_std=1, dtype="float32",
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    into, out = ("expert_embed", "expert_mlp"), ("expert_mlp", "expert_embed")
    assert experts.axes() == {
        "w_gate": ("expert", *into),
        "b_gate": ("expert", "expert_mlp"),
        "w_up": ("expert", *into),
        "b_up": ("expert", "expert_mlp"),
        "w_down": ("expert", *out),
        "b_down": ("expert", "expert_embed"),
    }
    assert experts.output_biases == ("b_down",)


def test_rows_keep_their_type():
    experts = FeedForwardExperts(
        D,
        E,
        ExpertFeedForward(d_ff=F),
        std=0.1,
        out_std=0.1,
        dtype="float32",
        rngs=nnx.Rngs(0),
    )
    x = jax.numpy.ones((E, C, D), "bfloat16")
    assert experts.rows(experts.weights(), {"features": x}).dtype == x.dtype


def test_initial_weights_have_the_deviation_asked_for():
    experts = FeedForwardExperts(
        64,
        8,
        ExpertFeedForward(d_ff=64),
        std=0.2,
        out_std=0.05,
        dtype="float32",
        rngs=nnx.Rngs(0),
    )
    # A normal cut at three sigma has 0.9866 of the deviation.
    for name, std in (("w_gate", 0.2), ("w_up", 0.2), ("w_down", 0.05)):
        w = np.asarray(experts.weights()[name])
        np.testing.assert_allclose(w.std(), 0.9866 * std, rtol=0.02)
        assert np.abs(w).max() <= 3 * std
        # No expert is a copy of another.
        assert np.abs(w[0] - w[1]).max() > std


def test_problems():
    root = config.Config(mesh=config.MeshConfig(tensor=4))
    problems = lambda **f: list(ExpertFeedForward(**f).problems("config.experts", root))
    assert problems(d_ff=8) == []
    assert "must be at least 1" in problems(d_ff=0)[0]
    assert "not divisible by config.mesh.tensor=4" in problems(d_ff=6)[0]
    assert "clamp=-1: must not be negative" in problems(d_ff=8, clamp=-1)[0]
    for name in ("clamp", "up_offset"):
        found = problems(d_ff=8, gated=False, **{name: 1.0})[0]
        assert f"{name}=1.0 would be ignored" in found
    assert (
        "['gelu', 'quick_gelu', 'relu', 'relu2', 'silu']"
        in problems(activation="tanh", d_ff=8)[0]
    )
