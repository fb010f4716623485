"""Norm, rotary positions, attention and feed-forward against slow numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import config
from moe_jax.nn import feedforward, module, norms, rope
from moe_jax.nn.attention import auto, scores
from moe_jax.nn.attention.layer import Attention


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_rms_norm_by_hand(float64):
    norm = norms.RMSNorm(2, eps=0.5, dtype="float64", rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.array([2.0, -1.0])
    # Mean square of (3, 4) is 12.5; with eps 13.
    want = [3 / np.sqrt(13) * 2, -4 / np.sqrt(13)]
    np.testing.assert_allclose(norm(jnp.array([3.0, 4.0])), want, rtol=1e-12)
    np.testing.assert_array_equal(norm(jnp.zeros(2)), np.zeros(2))


def test_rms_norm_computes_in_float32_and_keeps_the_type():
    norm = norms.RMSNorm(256, eps=1e-6, dtype="float32", rngs=nnx.Rngs(0))
    x = jnp.linspace(-3, 5, 256).astype("bfloat16")
    y = norm(x)
    assert y.dtype == x.dtype
    wide = np.asarray(x, np.float64)
    want = wide / np.sqrt((wide**2).mean() + 1e-6)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2**-8)


def test_layer_norm_by_hand(float64):
    norm = norms.LayerNorm(2, eps=0.75, dtype="float64", rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(norm(jnp.ones(2)), np.zeros(2))
    norm.scale[...] = jnp.array([2.0, -1.0])
    norm.bias[...] = jnp.array([0.5, 0.0])
    # The mean of (3, 4) is 3.5 and its variance 0.25; with eps 1.
    np.testing.assert_allclose(norm(jnp.array([3.0, 4.0])), [-0.5, -0.5], rtol=1e-12)
    wide = norms.LayerNorm(4, eps=1e-5, dtype="float32", rngs=nnx.Rngs(0))
    assert wide(jnp.ones(4, "bfloat16")).dtype == jnp.bfloat16


def rotated(x, position, theta):
    """Pairs (i, i + half) as complex numbers, turned by position * theta^(-i/half)."""
    half = len(x) // 2
    turn = np.exp(1j * position * theta ** (-np.arange(half) / half))
    turned = (x[:half] + 1j * x[half:]) * turn
    return np.concatenate([turned.real, turned.imag])


B, S, D, H, G, W = 2, 7, 10, 4, 2, 6
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 0, 0]], np.int32)
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 0, 0]], np.int32)


def attention_by_hand(weights, x, qk_norm):
    """One query, one head at a time, over the keys that it may see."""

    def normed(v, scale):
        return v / np.sqrt((v**2).mean() + 1e-5) * scale if qk_norm == "head" else v

    out = np.zeros((B, S, D))
    for b, s, h in np.ndindex(B, S, H):
        g = h // (H // G)
        q = normed(x[b, s] @ weights["w_q"][:, h], weights["q_scale"])
        q = rotated(q, POSITIONS[b, s], 100.0)
        scores, values = [], []
        for m in range(s + 1):
            if SEGMENTS[b, m] != SEGMENTS[b, s] or POSITIONS[b, m] > POSITIONS[b, s]:
                continue
            k = normed(x[b, m] @ weights["w_k"][:, g], weights["k_scale"])
            scores.append(q @ rotated(k, POSITIONS[b, m], 100.0) / np.sqrt(W))
            values.append(x[b, m] @ weights["w_v"][:, g])
        share = np.exp(scores - np.max(scores))
        out[b, s] += (share / share.sum()) @ np.array(values) @ weights["w_o"][h]
    return out


@pytest.mark.parametrize("qk_norm", ["none", "head"])
def test_attention_matches_a_loop(float64, qk_norm):
    """Grouped queries, packed documents, causal."""
    layer = Attention(
        D,
        H,
        G,
        W,
        auto.Auto(),
        qk_norm=qk_norm,
        rope=rope.Rope(theta=100.0),
        norm_eps=1e-5,
        std=0.5,
        out_std=0.5,
        dtype="float64",
        rngs=nnx.Rngs(3),
    )
    rng = np.random.default_rng(2)
    weights = {n: np.asarray(getattr(layer, n)[...]) for n in ("w_q", "w_k", "w_v")}
    weights |= {"w_o": np.asarray(layer.w_o[...])}
    weights |= {n: 1 + rng.normal(size=W) / 4 for n in ("q_scale", "k_scale")}
    if qk_norm == "head":
        layer.q_norm.scale[...] = jnp.asarray(weights["q_scale"])
        layer.k_norm.scale[...] = jnp.asarray(weights["k_scale"])
    x = rng.normal(size=(B, S, D))
    found, cache = layer(jnp.asarray(x), POSITIONS, SEGMENTS)
    want = attention_by_hand(weights, x, qk_norm)
    text = SEGMENTS > 0
    np.testing.assert_allclose(found[text], want[text], rtol=1e-9, atol=1e-10)
    assert cache is None and np.isfinite(np.asarray(found)).all()


def test_a_query_that_sees_nothing_gives_a_finite_mean():
    v = jnp.arange(6.0).reshape(1, 3, 1, 2)
    q = jnp.ones((1, 1, 1, 2))
    out = scores.masked(q, v, v, jnp.zeros((1, 1, 3), bool))
    np.testing.assert_allclose(out.ravel(), [2.0, 3.0], rtol=1e-6)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "quick_gelu", "relu", "relu2"])
def test_feed_forward(float64, gated, activation):
    act = {
        "silu": lambda x: x * sigmoid(x),
        # tanh(u) = 2 sigmoid(2 u) - 1.
        "gelu": lambda x: x * sigmoid(np.sqrt(8 / np.pi) * (x + 0.044715 * x**3)),
        "quick_gelu": lambda x: x * sigmoid(1.702 * x),
        "relu": lambda x: x * (x > 0),
        "relu2": lambda x: x * x * (x > 0),
    }[activation]
    rng = np.random.default_rng(4)
    weights = {n: rng.normal(size=(3, 5)) for n in ("w_gate", "w_up")[not gated :]}
    weights["w_down"] = rng.normal(size=(5, 3))
    options = feedforward.Dense(d_ff=5, activation=activation, gated=gated)
    build = lambda rngs: feedforward.FeedForward(
        3, options, std=1.0, out_std=1.0, dtype="float64", rngs=rngs
    )
    template = module.Template(build)
    assert set(template.axes) == set(weights)
    x = rng.normal(size=(1, 4, 3))
    found = template.bind(weights)(jnp.asarray(x))
    hidden = x @ weights["w_up"]
    hidden = act(x @ weights["w_gate"]) * hidden if gated else act(hidden)
    np.testing.assert_allclose(found, hidden @ weights["w_down"], rtol=1e-10)


def test_dense_problems():
    root = config.Config(mesh=config.MeshConfig(tensor=3))
    problems = lambda **f: list(feedforward.Dense(**f).problems("config.ff", root))
    assert problems(d_ff=9) == []
    assert problems(d_ff=0)[0].startswith("config.ff.d_ff=0")
    assert "not divisible by config.mesh.tensor=3" in problems(d_ff=10)[0]
    assert "config.ff.activation='swish'" in problems(d_ff=9, activation="swish")[0]


class Two(nnx.Module):
    def __init__(self, rngs):
        self.w = module.param(rngs, (40, 30), ("embed", None), std=0.5)
        self.inner = norms.RMSNorm(3, eps=1e-6, dtype="bfloat16", rngs=rngs)

    def __call__(self, x):
        return x @ self.w[...]


def test_a_template_holds_axes_and_takes_weights():
    template = module.Template(Two)
    assert template.axes == {"w": ("embed", None), "inner": {"scale": (None,)}}
    params = template.init_stacked(jax.random.key(0), 4)
    w = np.asarray(params["w"])
    assert w.shape == (4, 40, 30) and params["inner"]["scale"].shape == (4, 3)
    assert params["inner"]["scale"].dtype == jnp.bfloat16
    assert module.stacked_axes(template.axes) == {
        "w": (None, "embed", None),
        "inner": {"scale": (None, None)},
    }
    np.testing.assert_allclose(w.std(), 0.9866 * 0.5, rtol=0.03)
    assert np.abs(w).max() <= 1.5 and np.abs(w[0] - w[1]).max() > 0.5
    one = template.init(jax.random.split(jax.random.key(0), 4)[2])
    np.testing.assert_array_equal(one["w"], w[2])
    weights = {"w": jnp.ones((40, 30)), "inner": one["inner"]}
    x = jnp.ones((1, 40))
    np.testing.assert_array_equal(template.bind(weights)(x), np.full((1, 30), 40.0))


def test_a_weight_with_the_wrong_number_of_axes_is_an_error():
    with pytest.raises(ValueError, match="differ in length"):
        module.param(nnx.Rngs(0), (2, 3), ("embed",), std=1.0)
