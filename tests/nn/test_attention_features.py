"""Windows, caps, sinks, widths: each attention and its gradients by the formula."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attending import by_formula

from moe_jax.nn.attention import ATTENTIONS, auto, blocked, cudnn, sharded, splash
from moe_jax.nn.attention.auto import Auto
from moe_jax.nn.attention.blocked import Blocked
from moe_jax.nn.attention.common import Call, Scoring, Segments, mean_seen
from moe_jax.nn.attention.cudnn import CuDNN
from moe_jax.nn.attention.scores import Scores
from moe_jax.nn.attention.splash import Splash

NAMES = ("q", "k", "v", "sinks")


def drawn(batch, length, heads, groups, width=8, values=8, dtype="float64", seed=0):
    """Queries, keys, values, sinks, and rows of some documents with padding."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    segments = 1 + np.cumsum(rng.random((batch, length)) < 4 / length, axis=1)
    segments[0] = 1
    for row in range(1, batch):
        segments[row, length - rng.integers(0, length // 3) :] = 0
    return (
        2 * draw(batch, length, heads, width),
        draw(batch, length, groups, width),
        draw(batch, length, groups, values),
        draw(heads),
        jnp.asarray(segments, jnp.int32),
    )


def results(attend, given, sinks=True):
    """The output, and the gradients of q, k, v and sinks."""
    *given, segments = given
    given = given if sinks else given[:3]

    def loss(*given):
        out = attend(*given[:3], given[3] if sinks else None, segments)
        wide = out.astype(jnp.promote_types(out.dtype, jnp.float32))
        return jnp.sum(jnp.sin(3 * wide)), out

    which = tuple(range(len(given)))
    step = jax.jit(jax.value_and_grad(loss, argnums=which, has_aux=True))
    (_, out), grads = step(*given)
    return [np.asarray(a, np.float64) for a in (out, *grads)]


def attention(options, window=0, softcap=0.0, run=None):
    """An attention of whole rows; `run` instead of it: `sharded.run`."""

    def attend(q, k, v, sinks, segments):
        scoring = Scoring(window=window, softcap=softcap, sinks=sinks)
        if run is not None:
            return run(options, q, k, v, segments, scoring)
        both = Segments(queries=segments, keys=segments)
        return ATTENTIONS[type(options)](options, q, k, v, both, scoring)

    return attend


def close(found, wanted, tolerance):
    for name, a, b in zip(("out", *NAMES), found, wanted, strict=False):
        assert np.isfinite(a).all(), name
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), name


FEATURES = {
    "window": dict(window=5),
    "window of one": dict(window=1, sinks=True),
    "softcap": dict(softcap=2.0),
    "sinks": dict(sinks=True),
    "all": dict(window=7, softcap=2.0, sinks=True, values=6),
    "values": dict(values=12),
}


@pytest.fixture(scope="module")
def wanted():
    """`wanted(name, batch, length, heads, groups)`: inputs and wanted results."""

    @functools.cache
    def make(name, *shape):
        feature = dict(FEATURES[name])
        values, sinks = feature.pop("values", 8), feature.pop("sinks", False)
        given = drawn(*shape, values=values)
        loops = functools.partial(by_formula, **dict(window=0, softcap=0) | feature)
        return given, feature, sinks, results(loops, given, sinks)

    return make


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize(
    "options, shape",
    [
        (Scores(), (2, 29, 4, 2)),
        (Blocked(block=4), (2, 29, 4, 2)),
    ],
    ids=str,
)
def test_values_and_gradients(float64, wanted, options, shape, name):
    given, feature, sinks, expected = wanted(name, *shape)
    close(results(attention(options, **feature), given, sinks), expected, 1e-12)


@pytest.mark.parametrize(
    "options, sizes, name",
    [
        (Scores(), dict(context=2, tensor=2, data=2), "all"),
        (Blocked(block=4), dict(context=2, tensor=2, expert=2), "all"),
        (Blocked(block=4), dict(context=4, fsdp=2), "window"),
    ],
    ids=str,
)
def test_the_same_on_meshes(float64, axes_mesh, wanted, options, sizes, name):
    given, feature, sinks, expected = wanted(name, 2, 40, 4, 2)
    attend = attention(options, **feature, run=sharded.run)
    with jax.set_mesh(axes_mesh(**sizes)):
        close(results(attend, given, sinks), expected, 1e-12)


def test_which_blocks_a_window_leaves():
    """Blocks of 4 keys, one document of 24; the window reaches back w - 1 places."""

    def visited(window, first=0, count=24):
        segments = jnp.ones((1, 24), jnp.int32)
        of = Segments(
            queries=segments[:, first : first + count], keys=segments, first=first
        )
        q, k = jnp.zeros((1, count, 2, 8)), jnp.zeros((1, 24, 1, 8))
        bounds = blocked._bounds(
            *blocked._both_rows(4, q, k, of), Scoring(window=window)
        )
        return [tuple(map(int, pair)) for pair in zip(*bounds, strict=True)]

    # With 5 places query 4 sees keys 0 to 4, query 8 keys 4 to 8.
    assert visited(5) == [(0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)]
    # With 6, query 8 sees key 3, which is in the first block.
    assert visited(6) == [(0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (3, 6)]
    assert visited(1) == [(i, i + 1) for i in range(6)]
    assert visited(5, first=12, count=12) == [(2, 4), (3, 5), (4, 6)]
    assert visited(0) == [(0, i + 1) for i in range(6)]


def test_a_large_softcap_and_a_low_sink_change_nothing(float64):
    given = drawn(2, 20, 2, 1)
    plain = results(attention(Scores()), given, sinks=False)
    low = (*given[:3], jnp.full(2, -60.0), given[4])
    for options in (Scores(), Blocked(block=8)):
        found = results(attention(options, window=20, softcap=1e7), low)
        close(found[:4], plain, 1e-11)
        assert np.abs(found[4]).max() < 1e-20


def test_in_bfloat16_sinks_are_as_exact_as_scores():
    given = drawn(2, 24, 2, 2, dtype="bfloat16")
    exact = [a.astype(jnp.float32) for a in given[:4]]
    expected = results(attention(Scores(), window=9), (*exact, given[4]))
    close(results(attention(Blocked(block=16), window=9), given), expected, 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["window", "softcap", "sinks", "all"])
def test_the_kernel_of_tpus_interpreted(monkeypatch, name, fused):
    feature = dict(FEATURES[name])
    values, sinks = feature.pop("values", 8), feature.pop("sinks", False)
    feature |= dict(window=150) if feature.get("window") else {}
    given = drawn(2, 512, 2, 1, values=values, dtype="float32")
    expected = results(attention(Scores(), **feature), given, sinks)
    interpreted = functools.partial(splash.attend, interpret=True)
    monkeypatch.setitem(ATTENTIONS, Splash, interpreted)
    options = Splash(block_q=128, block_kv=128, fused_backward=fused)
    close(results(attention(options, **feature), given, sinks), expected, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_the_kernel_of_tpus_on_a_split_row(axes_mesh, monkeypatch, fused):
    """A window's tables are narrower, and each shard takes its own part of them."""
    given = drawn(2, 1024, 2, 1, values=6, dtype="float32")
    feature = dict(window=150, softcap=2.0)
    expected = results(attention(Scores(), **feature), given)
    interpreted = functools.partial(splash.attend, interpret=True)
    monkeypatch.setitem(ATTENTIONS, Splash, interpreted)
    options = Splash(block_q=128, block_kv=128, fused_backward=fused)
    attend = attention(options, **feature, run=sharded.run)
    with jax.set_mesh(axes_mesh(context=4, tensor=1, data=2)):
        close(results(attend, given), expected, 2e-6)


@pytest.mark.parametrize("sizes", [dict(data=2), dict(context=2)], ids=str)
def test_a_window_for_cudnn(float64, axes_mesh, monkeypatch, wanted, sizes):
    """Its kernel needs a GPU; XLA's version of the same call takes the same window."""
    given, feature, sinks, expected = wanted("window", 2, 40, 4, 2)
    by_xla = functools.partial(cudnn.attend, implementation="xla")
    monkeypatch.setitem(ATTENTIONS, CuDNN, by_xla)
    close(results(attention(CuDNN(), **feature), given, sinks), expected, 1e-6)
    attend = attention(CuDNN(), **feature, run=sharded.run)
    with jax.set_mesh(axes_mesh(**sizes)):
        close(results(attend, given, sinks), expected, 1e-6)


@pytest.mark.parametrize("options", [Splash(), CuDNN(), Auto()], ids=str)
def test_nothing_is_ignored_elsewhere(float64, options):
    given, feature = drawn(2, 29, 4, 2, values=6), dict(window=7, softcap=2.0)
    attend = attention(options, **feature)
    np.testing.assert_allclose(attend(*given), by_formula(*given, 7, 2.0), rtol=1e-11)


CALL = Call(queries=512, keys=512, width=64, value_width=64, dtype="bfloat16")


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(), ""),
        (dict(window=16), ""),
        (dict(sinks=True), "it has no softcap and no sinks"),
        (dict(softcap=30.0), "it has no softcap and no sinks"),
        (dict(value_width=32), "values of 32 are not as wide as keys of 64"),
    ],
    ids=str,
)
def test_what_cudnn_does_not_take(change, reason):
    call = dataclasses.replace(CALL, **change)
    assert cudnn.misfit(call) == reason
    chosen = Blocked(block=auto.LARGE_BLOCK) if reason else CuDNN()
    assert auto.choose("gpu", call) == chosen
    assert type(auto.choose("tpu", call)) is Splash


def test_keys_that_are_seen():
    """Of the formula with halves: a window of w is w - w^2 / (2 S) of S."""
    assert mean_seen(100) == 50
    assert mean_seen(100, 100) == mean_seen(100, 1000) == 50
    assert mean_seen(100, 20) == 18
