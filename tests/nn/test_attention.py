"""Attentions against `Scores`: values and gradients, on one device and on meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from moe_jax import config
from moe_jax.errors import UserError
from moe_jax.nn.attention import ATTENTIONS, auto, blocked, cudnn, sharded, splash
from moe_jax.nn.attention.auto import Auto
from moe_jax.nn.attention.blocked import Blocked
from moe_jax.nn.attention.common import ATTENDED, Call, Segments
from moe_jax.nn.attention.cudnn import CuDNN
from moe_jax.nn.attention.scores import Scores
from moe_jax.nn.attention.splash import Splash


def packed(batch, length, heads, groups, width=8, dtype="float64", seed=0):
    """Queries, keys, values, and rows of some documents with padding at the end.

    The first row is one document; where there are three, the last is all padding.
    """
    rng = np.random.default_rng(seed)
    draw = lambda n: jnp.asarray(rng.normal(size=(batch, length, n, width)), dtype)
    segments = 1 + np.cumsum(rng.random((batch, length)) < 4 / length, axis=1)
    segments[0] = 1
    for row in range(1, batch):
        padding = length if row == 2 else rng.integers(0, length // 3)
        segments[row, length - padding :] = 0
    return draw(heads), draw(groups), draw(groups), jnp.asarray(segments, jnp.int32)


def results(attend, q, k, v, segments):
    """The output, and the gradients of q, k and v."""

    def loss(q, k, v):
        out = attend(q, k, v, segments)
        wide = out.astype(jnp.promote_types(out.dtype, jnp.float32))
        return jnp.sum(jnp.sin(3 * wide)), out

    (_, out), grads = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    )(q, k, v)
    return [np.asarray(a, np.float64) for a in (out, *grads)]


def alone(options, **given):
    """The attention of options, on whole rows."""
    attend = functools.partial(ATTENTIONS[type(options)], options, **given)
    return lambda q, k, v, segments: attend(
        q, k, v, Segments(queries=segments, keys=segments)
    )


def close(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        assert np.isfinite(a).all()
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize(
    "block, batch, length, heads, groups",
    [
        (64, 3, 128, 2, 2),  # whole blocks
        (16, 3, 53, 4, 2),  # the last block is not full
        (8, 2, 17, 8, 1),  # one query in the last
        (64, 2, 23, 2, 1),  # a block beyond the row
    ],
)
def test_blocks_give_the_same(float64, block, batch, length, heads, groups):
    given = packed(batch, length, heads, groups)
    wanted = results(alone(Scores()), *given)
    close(results(alone(Blocked(block=block)), *given), wanted, 1e-13)


def test_blocks_in_bfloat16_round_as_the_formula_does():
    given = packed(2, 40, 2, 2, dtype="bfloat16")
    exact = [a.astype(jnp.float32) for a in given[:3]]
    wanted = results(alone(Scores()), *exact, given[3])
    close(results(alone(Blocked(block=16)), *given), wanted, 1e-2)


def test_which_blocks_are_visited():
    """Blocks of 4 keys; documents of 6, 5 and 3 positions, then padding."""
    segments = jnp.asarray([[1] * 6 + [2] * 5 + [3] * 3 + [0] * 6], jnp.int32)

    def visited(segments, first=0, queries=slice(None)):
        of = Segments(queries=segments[:, queries], keys=segments, first=first)
        q = jnp.zeros((1, of.queries.shape[1], 2, 8))
        k = jnp.zeros((1, 20, 1, 8))
        bounds = blocked._bounds(*blocked._both_rows(4, q, k, of))
        return [list(map(int, pair)) for pair in zip(*bounds, strict=True)]

    # The block that begins in document 2 and ends in 3 needs keys from place 4 on.
    assert visited(segments) == [[0, 1], [0, 2], [1, 3], [0, 4], [3, 5]]
    assert visited(segments, 8, slice(8, 16)) == [[1, 3], [0, 4]]
    one = jnp.ones((1, 20), jnp.int32)
    assert visited(one) == [[0, i + 1] for i in range(5)]
    # Another row's document may lie anywhere: what one row needs, all visit.
    assert visited(one, 12, slice(12, 20)) == [[0, 4], [0, 5]]


def largest(jaxpr):
    """Entries of the largest array that a program makes, loops included."""
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
    below = [largest(sub) for e in jaxpr.eqns for sub in jaxprs_in_params(e.params)]
    return max(sizes + below, default=0)


def test_no_array_holds_all_scores():
    given = packed(2, 256, 4, 2, dtype="float32")

    def entries(options):
        loss = lambda q, k, v: jnp.sum(alone(options)(q, k, v, given[3]))
        made = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*given[:3])
        return largest(made.jaxpr)

    all_scores = 2 * 4 * 256 * 256
    assert entries(Scores()) == all_scores
    assert entries(Blocked(block=32)) == given[0].size == all_scores / 32
    assert entries(Auto()) <= all_scores / 16


@pytest.mark.parametrize(
    "options, sizes",
    [
        (Scores(), dict(context=4, tensor=2)),
        (Blocked(block=16), dict(data=2, tensor=2)),
        (Blocked(block=16), dict(context=2, tensor=2, expert=2)),
        (Blocked(block=16), dict(context=4, fsdp=2)),
    ],
    ids=str,
)
def test_the_same_on_meshes(float64, axes_mesh, options, sizes):
    given = packed(4, 56, 4, 2)
    wanted = results(alone(Scores()), *given)
    with jax.set_mesh(axes_mesh(**sizes)):
        found = results(functools.partial(sharded.run, options), *given)
    close(found, wanted, 1e-13)


def test_a_split_row_gathers_few_heads(axes_mesh):
    """Of all collectives there are keys, values, segments; and the sums' way back."""
    q, k, v, segments = packed(2, 64, 4, 2, dtype="float32")
    run = functools.partial(sharded.run, Blocked(block=16))
    grads = jax.grad(lambda *a: jnp.sum(run(*a, segments)), argnums=(0, 1, 2))

    def count(**sizes):
        with jax.set_mesh(axes_mesh(**sizes)):
            text = jax.jit(grads).lower(q, k, v).as_text()
        return [text.count(f"stablehlo.{c}") for c in ("all_gather", "reduce_scatter")]

    assert count(context=2, tensor=2) == [3, 2]
    assert count(data=2, tensor=2) == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_the_kernel_of_tpus_interpreted(fused):
    given = packed(2, 256, 2, 1, dtype="float32")
    wanted = results(alone(Scores()), *given)
    options = Splash(block_q=128, block_kv=128, fused_backward=fused)
    close(results(alone(options, interpret=True), *given), wanted, 1e-6)


@pytest.mark.slow
def test_the_kernel_of_tpus_on_a_split_row(axes_mesh, monkeypatch):
    given = packed(2, 512, 2, 1, dtype="float32")
    wanted = results(alone(Scores()), *given)
    interpreted = functools.partial(splash.attend, interpret=True)
    monkeypatch.setitem(ATTENTIONS, Splash, interpreted)
    with jax.set_mesh(axes_mesh(context=2, data=2)):
        run = functools.partial(sharded.run, Splash(block_q=128, block_kv=128))
        close(results(run, *given), wanted, 1e-6)


@pytest.mark.parametrize("sizes", [dict(data=2), dict(context=2)], ids=str)
def test_the_masks_for_cudnn(float64, axes_mesh, monkeypatch, sizes):
    """Its kernel needs a GPU; XLA's version of the same call takes the same masks."""
    given = packed(2, 24, 4, 2)
    wanted = results(alone(Scores()), *given)
    by_xla = functools.partial(cudnn.attend, implementation="xla")
    monkeypatch.setitem(ATTENTIONS, CuDNN, by_xla)
    close(results(alone(CuDNN()), *given), wanted, 1e-6)
    with jax.set_mesh(axes_mesh(**sizes)):
        found = results(functools.partial(sharded.run, CuDNN()), *given)
    close(found, wanted, 1e-6)


def test_kernels_of_other_platforms_are_blocks_here(monkeypatch):
    given = packed(2, 48, 4, 2, dtype="float32")
    wanted = alone(Blocked())(*given)
    for options in (Splash(), CuDNN()):
        np.testing.assert_array_equal(alone(options)(*given), wanted)
    monkeypatch.setattr(cudnn, "platform", lambda: "gpu")
    with pytest.raises(UserError, match="=CuDNN: float32 is not bfloat16; set"):
        alone(CuDNN())(*given)


def test_a_policy_may_keep_the_results():
    """Then nothing is attended again: no exponential but the derivative's own."""
    q, k, v, segments = packed(1, 64, 2, 1, dtype="float32")
    attend = alone(Blocked(block=16))

    def exponentials(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        kept = jax.checkpoint(lambda q: attend(q, k, v, segments), policy=policy)
        text = str(jax.make_jaxpr(jax.grad(lambda q: jnp.sum(kept(q))))(q))
        return text.count(" exp ")

    # Two of the forward pass (weights, and what shrinks the sums), one backward.
    assert exponentials("other") == 5
    assert exponentials(ATTENDED) == 3


def called(queries, keys, width, dtype, **rest):
    """The facts of a call whose values are as wide as its keys."""
    sizes = dict(queries=queries, keys=keys, width=width, value_width=width)
    return Call(**sizes | dict(dtype=dtype) | rest)


@pytest.mark.parametrize(
    "where, queries, keys, width, dtype, expected",
    [
        ("cpu", 64, 128, 32, "float32", Scores()),
        ("cpu", 64, 256, 32, "float32", Blocked()),
        ("tpu", 256, 256, 128, "bfloat16", Scores()),
        ("tpu", 1024, 1024, 128, "bfloat16", Splash(fused_backward=True)),
        ("tpu", 1024, 1152, 128, "bfloat16", Splash()),
        ("tpu", 128, 512, 64, "float32", Splash(fused_backward=True)),
        ("tpu", 1000, 1000, 128, "bfloat16", Blocked(block=512)),
        ("tpu", 64, 512, 128, "bfloat16", Blocked(block=512)),
        ("gpu", 256, 256, 128, "bfloat16", Scores()),
        ("gpu", 1024, 1024, 128, "bfloat16", CuDNN()),
        ("gpu", 1024, 1024, 128, "float32", Blocked(block=512)),
        ("gpu", 1024, 1024, 192, "bfloat16", Blocked(block=512)),
        ("gpu", 1024, 1024, 36, "bfloat16", Blocked(block=512)),
        ("gpu", 1001, 1001, 128, "bfloat16", Blocked(block=512)),
    ],
)
def test_what_auto_takes(where, queries, keys, width, dtype, expected):
    given = where, called(queries, keys, width, dtype)
    assert auto.choose(*given) == auto.resolve(Auto(), *given) == expected


def test_a_line_says_what_it_became():
    assert auto.describe(Auto(), called(256, 512, 32, "float32")) == [
        "auto attention: Blocked for rows of 512 tokens over 2 shards, float32 "
        "heads of 32, on cpu"
    ]
    call = called(128, 128, 32, "float32")
    (line,) = auto.describe(Splash(), call)
    assert line.startswith("Splash attention: Blocked for rows")
    assert auto.describe(Blocked(block=8), call) == []
    more = dict(value_width=24, window=64, softcap=30.0, sinks=True)
    (line,) = auto.describe(Splash(), dataclasses.replace(call, **more))
    assert line.endswith(
        "heads of 32 with values of 24, a window of 64, a softcap of 30, sinks, on cpu"
    )


def test_problems():
    root = config.Config(mesh=config.MeshConfig(context=2))
    root.data.sequence_length = 1024
    problems = lambda options: list(options.problems("config.model.attention", root))
    assert problems(Splash()) == problems(Blocked()) == []
    (block,) = problems(Splash(block_q=100))
    assert block == "config.model.attention.block_q=100: must be a multiple of 128"
    assert "block=0: must be at least 1" in problems(Blocked(block=0))[0]
    root.data.sequence_length = 1000
    (length,) = problems(Splash())
    assert length == (
        "config.model.attention=Splash takes multiples of 128 positions on a shard, "
        "but 1000 over config.mesh.context=2 is 500; take rows of a multiple of 256 "
        "(config.data.sequence_length), or set config.model.attention to Auto()"
    )


def test_block_sizes_divide_the_row():
    sizes = [splash.block_size(512, n) for n in (128, 384, 640, 1024, 1280, 4096)]
    assert sizes == [128, 384, 128, 512, 256, 512]
