"""Pieces of the dispatches: capacity, emulated exchange, choice, problems."""

import functools

import dispatching
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.moe.dispatch import DISPATCHES, auto, exchange, plan, ragged
from moe_jax.moe.dispatch.bucket import Bucket
from moe_jax.moe.dispatch.einsum import Einsum
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.moe.dispatch.gather import Gather
from moe_jax.moe.dispatch.ragged import Ragged


@pytest.mark.parametrize(
    ("mean", "factor", "most", "rows"),
    [
        (16, 1.0, 64, 16),
        (16, 1.25, 64, 24),  # 20, up to a multiple of 8
        (16, 0.01, 64, 8),
        (1, 1.0, 4, 4),  # never more than there are tokens
        (16, 100.0, 64, 64),
        (18.75, 1.0, 100, 24),
        (64, 0.0, 512, 112),  # 64 + 40 + 4
        (2048, 0.0, 16384, 2280),  # 2048 + 226.3 + 4
        (0.0, 0.0, 16, 8),
    ],
)
def test_capacity_by_hand(mean, factor, most, rows):
    assert plan.bucket_rows(mean, factor, most) == rows


@pytest.mark.parametrize(("capacity", "rows"), [(8, 8), (4, 4), (64, 16), (72, 24)])
def test_later_rounds_have_a_quarter(capacity, rows):
    assert plan.later_rows(capacity) == rows
    starts = [plan.window(r, capacity) for r in range(3)]
    assert starts == [(0, capacity), (capacity, rows), (capacity + rows, rows)]


@pytest.mark.parametrize("tokens", [16, 64, 512])
def test_the_default_capacity_serves_a_uniform_routing_in_one_round(tokens):
    """8 of 64 experts, 8 shards: 512 buckets a layer, hundreds of layers."""
    rng = np.random.default_rng(tokens)
    layers = 8 * 20480 // tokens // 10
    mean = tokens * 8 / 64
    fullest = []
    for _ in range(layers):
        scores = rng.random((8 * tokens, 64), np.float32)
        chosen = np.argpartition(scores, 8, axis=1)[:, :8].reshape(8, -1)
        counts = [np.bincount(shard, minlength=64).max() for shard in chosen]
        fullest.append(max(counts))
    assert max(fullest) <= plan.bucket_rows(mean, 0.0, tokens)
    # A factor of 1.25 is not enough, but where it is rounded up to 8 from 2.5.
    short = np.mean(np.array(fullest) > plan.bucket_rows(mean, 1.25, tokens))
    assert short > 0.5 or tokens == 16


def test_a_bucket_overflows_less_than_once_in_a_million():
    """The exact binomial tail beyond the rule's rows, for means from 1/2 to 4096."""
    for mean in (0.5, 1, 4, 16, 64, 512, 4096):
        rows = int(plan.needed_rows(mean))
        # Poisson, which is wider than the binomial: log pmf, summed beyond the rows.
        k = np.arange(rows + 1, rows + 400 + int(20 * mean**0.5))
        log_factorial = np.cumsum(np.log(np.arange(1, k[-1] + 1)))[k - 1]
        tail = np.exp(k * np.log(mean) - mean - log_factorial).sum()
        assert tail < 1e-6, (mean, tail)


@pytest.mark.parametrize(
    ("top_k", "experts", "shards"), [(8, 64, 4), (2, 8, 8), (1, 8, 2), (8, 64, 64)]
)
def test_destinations_of_a_uniform_routing(top_k, experts, shards):
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((20000, experts)), axis=1)[:, :top_k]
    shard = np.sort(chosen // (experts // shards), axis=1)
    distinct = 1 + (np.diff(shard, axis=1) > 0).sum(axis=1)
    found = ragged.destinations(float(top_k), experts, shards)
    assert abs(found - distinct.mean()) < 0.02
    if (top_k, shards) == (8, 4):
        assert 3.6 < found < 3.7


@pytest.mark.parametrize("axes", [("expert",), ("expert", "tensor")])
def test_the_emulated_exchange_moves_slices(axes_mesh, axes):
    """Random sizes at random offsets, against a loop over pairs."""
    mesh = axes_mesh(expert=4, tensor=2)
    n = 4 if len(axes) == 1 else 8
    rng = np.random.default_rng(n)
    sizes = rng.integers(0, 4, (n, n))  # from, to
    sizes[1] = 0
    inputs = np.cumsum(sizes + 1, axis=1) - sizes  # a gap before each
    outputs = (np.cumsum(sizes + 2, axis=0) - sizes).astype(np.int32)
    x = rng.normal(size=(n, 64, 3)).astype(np.float32)
    start = rng.normal(size=(n, 64, 3)).astype(np.float32)
    want = start.copy()
    for source in range(n):
        for target in range(n):
            size = sizes[source, target]
            a, b = inputs[source, target], outputs[source, target]
            want[target, b : b + size] = x[source, a : a + size]

    def body(*given):
        return exchange.ragged_all_to_all(*(g[0] for g in given), axes)[None]

    whole = P(axes)
    ints = [np.int32(a) for a in (inputs, sizes, outputs, sizes.T)]
    with jax.set_mesh(mesh):
        run = jax.jit(jax.shard_map(body, in_specs=(whole,) * 6, out_specs=whole))
        found = run(x, start, *ints)
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(
    ("where", "shards", "tokens", "top_k", "experts", "cls"),
    [
        ("cpu", 1, 4096, 8, 64, Ragged),
        ("gpu", 1, 4096, 8, 64, Ragged),
        ("tpu", 1, 4096, 8, 64, Ragged),
        # One shard: nothing to gather. Top-2 over 4: 2 * 1.1 < 4.
        ("cpu", 4, 16384, 2, 64, Exact),
        ("cpu", 4, 4096, 8, 64, Gather),  # 8 * 1.2 > 4
        ("gpu", 16, 4096, 8, 64, Exact),
        ("tpu", 4, 4096, 8, 64, Gather),  # 3.6 * 1.25 > 4
        ("tpu", 8, 4096, 8, 64, Ragged),  # 5.4 * 1.25 < 8
        ("tpu", 4, 4096, 2, 16, Ragged),  # 1.8 * 1.25 < 4
    ],
)
def test_auto_chooses_by_bytes(where, shards, tokens, top_k, experts, cls):
    assert type(auto.choose(where, shards, tokens, float(top_k), experts)) is cls


@pytest.mark.parametrize(("top_k", "chosen"), [(1, "Exact"), (6, "Gather")])
def test_auto_says_what_it_chose(axes_mesh, monkeypatch, top_k, chosen):
    ran = []
    for cls, call in auto._DISPATCHES.items():
        seen = lambda *given, cls=cls, call=call: (
            ran.append(cls.__name__) or call(*given)
        )
        monkeypatch.setitem(auto._DISPATCHES, cls, seen)
    floats, _ = dispatching.drawn("plain", 8, 256, top_k)
    integers = dispatching.routings(2048, top_k)["balanced"]
    run = functools.partial(dispatching.run, auto.Auto(), "plain", "data-expert")
    with dispatching.setting(axes_mesh, "data-expert"):
        jax.eval_shape(lambda: run(*floats, *integers, float(top_k)))
        line = auto.describe(dispatching.ONE, 2048, float(top_k), 8)
    assert set(ran) == {chosen}
    assert line == (
        f"auto dispatch: {chosen} for 256 tokens a shard, K={top_k} of 8 experts over "
        "4 shards on cpu"
    )


@pytest.mark.parametrize("cls", [Bucket, Exact, Einsum, Ragged, Gather])
def test_capacity_problems(cls):
    problems = lambda factor: list(
        cls(capacity_factor=factor).problems("config.dispatch", config.Config())
    )
    assert problems(0.0) == problems(0.1) == []
    assert "capacity_factor=-1.0: must not be negative" in problems(-1.0)[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Bucket(drop="oldest"), "must be one of ['position', 'weight']"),
        (Einsum(group_size=0), "group_size=0: must be at least 1"),
    ],
)
def test_problems(options, words):
    (problem,) = options.problems("config.dispatch", config.Config())
    assert words in problem


def test_every_dispatch_has_a_file_of_its_own():
    assert len({cls.__module__ for cls in DISPATCHES}) == len(DISPATCHES)
