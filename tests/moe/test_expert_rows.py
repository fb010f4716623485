"""Experts on padded rows, on ragged rows, and one row at a time."""

import jax
import numpy as np
import oracles
import pytest
from flax import nnx

from moe_jax import config
from moe_jax.moe.experts.feed_forward import ExpertFeedForward, FeedForwardExperts
from moe_jax.nn import feedforward

D, F, E, C = 6, 10, 3, 4


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", sorted(feedforward.ACTIVATIONS))
def test_batched_and_ragged_rows_match_a_loop(float64, activation, gated):
    options = ExpertFeedForward(d_ff=F, activation=activation, gated=gated)
    experts = FeedForwardExperts(
        D, E, options, std=0.5, out_std=0.5, dtype="float64", rngs=nnx.Rngs(1)
    )
    weights = jax.tree.map(np.asarray, experts.weights())
    assert set(weights) == {"w_up", "w_down"} | ({"w_gate"} if gated else set())
    x = np.random.default_rng(0).normal(size=(E, C, D))
    batched = experts.rows(weights, {"features": x})
    for e in range(E):
        for c in range(C):
            want = oracles.expert(weights, e, x[e, c], activation)
            np.testing.assert_allclose(batched[e, c], want, rtol=1e-10, atol=1e-12)
    sizes = np.array([4, 0, 3], np.int32)
    ragged = experts.rows(weights, {"features": np.concatenate([x[0], x[2]])}, sizes)
    owners = [0] * 4 + [2] * 3
    rows = [*x[0], *x[2]]
    for row, e in enumerate(owners):
        want = oracles.expert(weights, e, rows[row], activation)
        np.testing.assert_allclose(ragged[row], want, rtol=1e-10, atol=1e-12)


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
    assert "['gelu', 'relu', 'relu2', 'silu']" in problems(activation="tanh", d_ff=8)[0]
