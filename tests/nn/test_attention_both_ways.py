"""Attention without causality: each attention and its gradients by the formula."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attending import by_formula
from flax import nnx

from moe_jax.nn.attention import ATTENTIONS, auto, blocked, cudnn, sharded, splash
from moe_jax.nn.attention.auto import Auto
from moe_jax.nn.attention.blocked import Blocked
from moe_jax.nn.attention.common import Call, Scoring, Segments, mean_seen
from moe_jax.nn.attention.cudnn import CuDNN
from moe_jax.nn.attention.layer import Attention
from moe_jax.nn.attention.scores import Scores
from moe_jax.nn.attention.splash import Splash


def drawn(batch, length, heads, groups, values=8, dtype="float64"):
    """Queries, keys, values, sinks; the rows have some documents, the last padding."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    segments = 1 + np.cumsum(rng.random((batch, length)) < 3 / length, axis=1)
    segments[0] = 1
    segments[-1, length - length // 3 :] = 0
    return (
        2 * draw(batch, length, heads, 8),
        draw(batch, length, groups, 8),
        draw(batch, length, groups, values),
        draw(heads),
        jnp.asarray(segments, jnp.int32),
    )


def results(attend, given):
    """The output, and the gradients of q, k, v and sinks."""

    def loss(*floats):
        out = attend(*floats, given[4])
        return jnp.sum(jnp.sin(3 * out.astype(jnp.promote_types(out.dtype, "f4")))), out

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (_, out), grads = step(*given[:4])
    return [np.asarray(a, np.float64) for a in (out, *grads)]


def attention(options, softcap=0.0, sinks=True, run=None):
    """An attention of whole rows; `run` instead of it: `sharded.run`."""

    def attend(q, k, v, given, segments):
        used = given if sinks else None
        scoring = Scoring(softcap=softcap, sinks=used, causal=False)
        if run is not None:
            return run(options, q, k, v, segments, scoring)
        both = Segments(queries=segments, keys=segments)
        return ATTENTIONS[type(options)](options, q, k, v, both, scoring)

    return attend


def wanted(given, softcap=0.0, sinks=True):
    def attend(q, k, v, drawn, segments):
        used = drawn if sinks else None
        return by_formula(q, k, v, used, segments, 0, softcap, causal=False)

    return results(attend, given)


def close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert np.isfinite(a).all()
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("feature", [dict(sinks=False), dict(softcap=2.0)], ids=str)
@pytest.mark.parametrize("options", [Scores(), Blocked(block=4), Blocked()], ids=str)
def test_values_and_gradients(float64, options, feature):
    """29 positions fill no block: what fills the last one is seen by nobody."""
    given = drawn(3, 29, 4, 2, values=6)
    found = results(attention(options, **feature), given)
    close(found, wanted(given, **feature), 1e-12)


@pytest.mark.parametrize(
    "options, sizes",
    [
        (Scores(), dict(context=2, tensor=2, data=2)),
        (Blocked(block=4), dict(context=2, tensor=2, expert=2)),
        (Blocked(block=4), dict(context=4, fsdp=2)),
        (Auto(), dict(data=4, tensor=2)),
    ],
    ids=str,
)
def test_the_same_on_meshes(float64, axes_mesh, options, sizes):
    given = drawn(4, 40, 4, 2)
    expected = wanted(given)
    with jax.set_mesh(axes_mesh(**sizes)):
        close(results(attention(options, run=sharded.run), given), expected, 1e-12)


@pytest.mark.parametrize("sizes", [dict(data=2), dict(context=2)], ids=str)
def test_the_masks_for_cudnn(float64, axes_mesh, monkeypatch, sizes):
    """Its kernel needs a GPU; XLA's version of the same call takes the same masks."""
    given = drawn(2, 24, 4, 2)
    expected = wanted(given, sinks=False)
    by_xla = functools.partial(cudnn.attend, implementation="xla")
    monkeypatch.setitem(ATTENTIONS, CuDNN, by_xla)
    close(results(attention(CuDNN(), sinks=False), given), expected, 1e-6)
    attend = attention(CuDNN(), sinks=False, run=sharded.run)
    with jax.set_mesh(axes_mesh(**sizes)):
        close(results(attend, given), expected, 1e-6)


@pytest.mark.parametrize("options", [Splash(), CuDNN(), Auto()], ids=str)
def test_kernels_of_other_platforms_are_the_same_here(float64, options):
    given = drawn(3, 29, 4, 2)
    close(results(attention(options), given), wanted(given), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_the_kernel_of_tpus_interpreted(axes_mesh, monkeypatch, fused):
    given = drawn(2, 512, 2, 1, dtype="float32")
    expected = wanted(given, softcap=2.0)
    interpreted = functools.partial(splash.attend, interpret=True)
    monkeypatch.setitem(ATTENTIONS, Splash, interpreted)
    options = Splash(block_q=128, block_kv=128, fused_backward=fused)
    close(results(attention(options, softcap=2.0), given), expected, 3e-6)
    attend = attention(options, softcap=2.0, run=sharded.run)
    with jax.set_mesh(axes_mesh(context=2, data=2)):
        close(results(attend, given), expected, 3e-6)


def test_which_blocks_are_visited():
    """Blocks of 4 keys; documents of 6, 5 and 3 positions, then padding."""
    segments = jnp.asarray([[1] * 6 + [2] * 5 + [3] * 3 + [0] * 6], jnp.int32)

    def visited(segments, first=0, queries=slice(None)):
        of = Segments(queries=segments[:, queries], keys=segments, first=first)
        q = jnp.zeros((1, of.queries.shape[1], 2, 8))
        rows = blocked._both_rows(4, q, jnp.zeros((1, 20, 1, 8)), of)
        bounds = blocked._bounds(*rows, Scoring(causal=False))
        return [tuple(map(int, pair)) for pair in zip(*bounds, strict=True)]

    # Block 3 holds the end of document 3 and padding, so it may need any of them.
    assert visited(segments) == [(0, 4), (0, 4), (1, 4), (0, 5), (3, 5)]
    assert visited(jnp.ones((1, 20), jnp.int32)) == [(0, 5)] * 5
    assert visited(segments, 16, slice(16, 20)) == [(3, 5)]


def test_a_window_needs_causality():
    with pytest.raises(ValueError, match=r"window=3 reaches back .* causal=True; set"):
        Scoring(window=3, causal=False)


CALL = Call(
    queries=512, keys=512, width=64, value_width=64, dtype="bfloat16", causal=False
)


def test_what_auto_takes_and_says():
    assert type(auto.choose("tpu", CALL)) is Splash
    assert auto.choose("gpu", CALL) == CuDNN()
    q = jnp.zeros((1, 512, 2, 64), "bfloat16")
    assert Call.of(q, q, q, Scoring(causal=False)) == CALL
    (line,) = auto.describe(Auto(), CALL)
    assert line.endswith("bfloat16 heads of 64, without causality, on cpu")
    (line,) = auto.describe(Auto(), dataclasses.replace(CALL, causal=True))
    assert "causality" not in line


def test_keys_that_are_seen():
    assert mean_seen(100, causal=False) == 100


def layer(**given):
    return Attention(
        12,
        2,
        2,
        6,
        Scores(),
        norm_eps=1e-6,
        std=0.3,
        out_std=0.3,
        dtype="float64",
        rngs=nnx.Rngs(params=0),
        rope=None,
        causal=False,
        **given,
    )


def test_a_layer_without_positions(float64):
    """Permuted tokens give permuted outputs: nothing says where a token stands."""
    made = layer(bias=True, output_bias=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 7, 12)))
    ones, order = jnp.ones((1, 7), jnp.int32), np.array([3, 1, 6, 0, 5, 2, 4])
    y, cache = made(x, None, ones)
    assert cache is None
    np.testing.assert_allclose(made(x[:, order], None, ones)[0], y[:, order], 1e-11)
    with pytest.raises(ValueError, match="causal=False has none"):
        made(x, None, ones, made.init_cache(1, 9, "float64"))


def test_a_layer_norm_of_heads(float64):
    made = layer(qk_norm="layer")
    rng = np.random.default_rng(1)
    for norm in (made.q_norm, made.k_norm):
        norm.scale[...] = jnp.asarray(rng.normal(size=6))
        norm.bias[...] = jnp.asarray(rng.normal(size=6))
    x = rng.normal(size=(1, 5, 12))

    def normed(a, norm):
        a = a - a.mean(-1, keepdims=True)
        a = a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6)
        return a * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])

    q, k, v = (
        np.einsum("bsd,dhk->bshk", x, np.asarray(w[...]))
        for w in (made.w_q, made.w_k, made.w_v)
    )
    q, k = normed(q, made.q_norm) / np.sqrt(6), normed(k, made.k_norm)
    share = np.exp(np.einsum("bshk,bmhk->bhsm", q, k))
    share = share / share.sum(-1, keepdims=True)
    mixed = np.einsum("bhsm,bmhk->bshk", share, v)
    want = np.einsum("bshk,hkd->bsd", mixed, np.asarray(made.w_o[...]))
    found, _ = made(jnp.asarray(x), None, jnp.ones((1, 5), jnp.int32))
    np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-12)
