"""One suite for every dispatch: a new one is tested by being listed in DISPATCHES."""

import itertools

import dispatching
import jax
import numpy as np
import oracles
import pytest
from dispatching import FACTORS, KINDS, MESHES, D, E

from moe_jax.moe.dispatch import DISPATCHES, local, plan
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.dispatch.bucket import Bucket
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.dispatch.einsum import Einsum
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.moe.dispatch.gather import Gather
from moe_jax.moe.dispatch.ragged import Ragged
from moe_jax.moe.dispatch.ring import Ring


def cases():
    """Dispatch, mesh, kind, K, S: every dispatch on every mesh, the rest in turn."""
    kinds, widths = list(KINDS), (2, 3, 1)
    for (i, cls), (j, mesh) in itertools.product(
        enumerate(DISPATCHES), enumerate(MESHES)
    ):
        if cls is Auto and mesh not in ("alone", "data-expert"):
            continue  # It is one of the others.
        yield cls, mesh, kinds[(i + j) % 4], widths[(i + 2 * j) % 3], 32
    for cls in DISPATCHES:
        # One token a shard, fewer than experts; the context axis splits nothing.
        yield cls, "fsdp and expert", "gated", 2, 1


def name(value):
    return value.__name__ if isinstance(value, type) else str(value)


@pytest.mark.parametrize(
    ("cls", "mesh", "kind", "top_k", "length"), list(cases()), ids=name
)
def test_outputs_and_gradients_are_those_of_the_oracle(
    float64, axes_mesh, monkeypatch, cls, mesh, kind, top_k, length
):
    """Where no platform multiplies groups of rows: local rows in buckets."""
    monkeypatch.setattr(local, "uses_lists", lambda: False)
    equals_the_oracle(axes_mesh, cls, mesh, kind, top_k, length)


@pytest.mark.parametrize("cls", [Gather, Ragged], ids=name)
@pytest.mark.parametrize(
    ("mesh", "kind", "top_k"),
    [
        ("alone", "bias", 3),
        ("data-expert", "gated", 2),
        ("expert and tensor", "plain-bias", 1),
    ],
)
def test_lists_equal_the_oracle(
    float64, axes_mesh, monkeypatch, cls, mesh, kind, top_k
):
    """Local rows in lists, as they are by default."""
    # As small as buckets are, so that there are several rounds.
    monkeypatch.setattr(plan, "_LIST_MULTIPLE", 8)
    equals_the_oracle(axes_mesh, cls, mesh, kind, top_k, 32, in_lists=True)


def test_lists_in_a_ring_equal_the_oracle(float64, axes_mesh, monkeypatch):
    monkeypatch.setattr(plan, "_LIST_MULTIPLE", 8)
    equals_the_oracle(axes_mesh, Ring, "data-expert", "gated", 2, 32, in_lists=True)


def equals_the_oracle(axes_mesh, cls, mesh, kind, top_k, length, in_lists=False):
    """Under every pattern: output, gradients, counts."""
    floats, grad = dispatching.drawn(kind, 8, length, top_k)
    options = dispatching.options_of(cls)
    run = dispatching.differentiated(options, kind, mesh, float(top_k))
    for pattern, integers in dispatching.routings(8 * length, top_k).items():
        with dispatching.setting(axes_mesh, mesh):
            y, grads, stats = run(floats, integers, grad)
        oracle = dispatching.oracle(kind, float(top_k))
        want_y, want_grads, _ = oracle(floats, integers, grad)
        jax.tree.map(
            lambda a, b, p=pattern: np.testing.assert_allclose(
                a, b, rtol=1e-9, atol=1e-10, err_msg=p
            ),
            (y, grads),
            (want_y, want_grads),
        )
        assert stats.assignments == integers[1].sum()
        assert stats.dropped == 0
        check_statistics(cls, mesh, stats, *integers, in_lists)


def check_statistics(cls, mesh, stats, expert_tk, valid_tk, in_lists=False):
    """Fullest bucket and rounds, counted by numpy, where shards hold whole rows."""
    if cls not in FACTORS or mesh not in ("alone", "expert", "data-expert"):
        return
    shards = MESHES[mesh][2]
    group = MESHES[mesh][0].get("expert", 1)
    tokens, top_k = len(expert_tk), expert_tk.shape[1]
    _, counts_se = oracles.positions(expert_tk, valid_tk, E, shards)
    alone = cls is Ragged and group == 1
    if cls is Gather or alone:
        counts = counts_se.reshape(shards // group, group, E).sum(axis=1)
        if in_lists:
            counts = counts.reshape(-1, group, E // group).sum(axis=2)
    elif cls is Ragged:
        counts = rows_sent(expert_tk, valid_tk, shards, group)
    else:
        counts = counts_se
        if cls is Ring and in_lists:
            counts = counts.reshape(-1, group, E // group).sum(axis=2)
    assert stats.peak_fill == counts.max()
    if cls in (Exact, Gather, Ring) or (alone and not in_lists):
        held = tokens // shards * (group if cls is Gather else 1)
        if not in_lists:
            capacity = oracles.capacity(held, top_k, E, FACTORS[cls])
            assert stats.capacity == capacity
    capacity = int(stats.capacity)
    later = min(capacity, (-(-capacity // 4) + 7) // 8 * 8)
    needed = 1 + max(0, -(-(counts.max() - capacity) // later))
    assert stats.rounds == (1 if cls in (Bucket, Einsum) else needed)


def rows_sent(expert_tk, valid_tk, shards, group):
    """Rows from each shard to each of its group: one a token and destination."""
    sent = np.zeros((shards, group), int)
    for t, (experts, valid) in enumerate(zip(expert_tk, valid_tk, strict=True)):
        for target in {e // (E // group) for e in experts[valid]}:
            sent[t * shards // len(expert_tk), target] += 1
    return sent


def test_the_patterns_do_what_they_are_here_for():
    """Several rounds for what is skewed, one for what is balanced."""
    expert_tk, valid_tk = dispatching.routings(256, 2)["one_expert"]
    assert set(expert_tk[valid_tk]) == {3}
    assert oracles.positions(expert_tk, valid_tk, E, 8)[1].max() == 32
    assert rows_sent(expert_tk, valid_tk, 8, 8).max() == 32
    expert_tk, valid_tk = dispatching.routings(256, 2)["balanced"]
    assert oracles.positions(expert_tk, valid_tk, E, 8)[1].max() == 8


def test_the_oracle_itself_matches_numpy(float64):
    floats, grad = dispatching.drawn("gated", 4, 8, 3)
    weights, x, weight_tk = floats
    for pattern, integers in dispatching.routings(32, 3).items():
        y, grads, _ = dispatching.oracle("gated", 3.0)(floats, integers, grad)
        want, want_grads = oracles.mixture(
            weights, x.reshape(-1, D), integers[0], weight_tk, integers[1],
            grad.reshape(-1, D),
        )  # fmt: skip
        close = lambda a, b, p=pattern: np.testing.assert_allclose(
            np.reshape(a, np.shape(b)), b, rtol=1e-9, atol=1e-10, err_msg=p
        )
        jax.tree.map(close, (y, grads), (want, want_grads))


def ranks(expert_tk, valid_tk, order_t, blocks):
    """Position of each assignment in its (block, expert), in the order given."""
    place = np.full(expert_tk.size, 10**6)
    counts = np.zeros((blocks, E), int)
    top_k, tokens = expert_tk.shape[1], len(expert_tk)
    for n in order_t:
        t, k = divmod(n, top_k)
        if valid_tk[t, k]:
            block = t * blocks // tokens
            place[n] = counts[block, expert_tk[t, k]]
            counts[block, expert_tk[t, k]] += 1
    return place.reshape(expert_tk.shape)


DROPS = {
    "position": Bucket(capacity_factor=1.0),
    "weight": Bucket(capacity_factor=1.0, drop="weight"),
    "groups": Einsum(capacity_factor=1.0, group_size=16),
}


@pytest.mark.parametrize("case", DROPS)
@pytest.mark.parametrize("mesh", ["alone", "data-expert"])
def test_what_has_no_room_is_dropped_and_counted(float64, axes_mesh, case, mesh):
    options, shards = DROPS[case], MESHES[mesh][2]
    floats, grad = dispatching.drawn("gated", 8, 32, 2)
    run = dispatching.differentiated(options, "gated", mesh, 2.0)
    blocks = 256 // 16 if case == "groups" else shards
    capacity = oracles.capacity(256 // blocks, 2, E, 1.0)
    order = np.argsort(-floats[2].reshape(-1)) if case == "weight" else range(512)
    for pattern, (expert_tk, valid_tk) in dispatching.routings(256, 2).items():
        with dispatching.setting(axes_mesh, mesh):
            y, grads, stats = run(floats, (expert_tk, valid_tk), grad)
        keep_tk = valid_tk & (ranks(expert_tk, valid_tk, order, blocks) < capacity)
        want = oracles.mixture(
            floats[0], floats[1].reshape(-1, D), expert_tk, floats[2], keep_tk,
            grad.reshape(-1, D),
        )  # fmt: skip
        close = lambda a, b, p=pattern: np.testing.assert_allclose(
            np.reshape(a, np.shape(b)), b, rtol=1e-9, atol=1e-10, err_msg=p
        )
        jax.tree.map(close, (y, grads), want)
        assert stats.dropped == (valid_tk & ~keep_tk).sum()
        assert stats.capacity == capacity
        if pattern == "one_expert":
            assert stats.dropped == 256 - blocks * capacity > 0


@pytest.mark.parametrize("cls", [Bucket, Exact, Ragged, Gather], ids=name)
def test_single_precision(float64, axes_mesh, cls):
    """1e-5 of the norm, also with all tokens on one expert."""
    floats, grad = dispatching.drawn("gated", 8, 32, 2)
    run = dispatching.differentiated(
        dispatching.options_of(cls), "gated", "data-expert", 2.0
    )
    single = lambda tree: jax.tree.map(np.float32, tree)
    for pattern in ("uniform", "one_expert"):
        integers = dispatching.routings(256, 2)[pattern]
        with dispatching.setting(axes_mesh, "data-expert"):
            found = run(single(floats), integers, single(grad))[:2]
        want = dispatching.oracle("gated", 2.0)(floats, integers, grad)[:2]

        def close(a, b):
            assert a.dtype == np.float32
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)

        jax.tree.map(close, found, want)


MANY = 24  # Experts, and choices of which few are valid: more than are unrolled.


@pytest.mark.parametrize(
    "cls", [c for c in DISPATCHES if c not in (Auto, DenseDispatch)], ids=name
)
def test_many_choices_of_which_few_are_valid(float64, axes_mesh, cls):
    """Expert choice and top-p: K as large as E, two experts a token in the mean."""
    shape = dict(num_experts=MANY)
    floats, grad = dispatching.drawn("gated", 8, 8, MANY, **shape)
    expert_tk = dispatching.routings(64, MANY, MANY)["uniform"][0]
    rng = np.random.default_rng(5)
    valid_tk = rng.random((64, MANY)) < 2 / MANY
    valid_tk[7] = True  # One token takes all,
    valid_tk[8:16] = False  # a shard none.
    run = dispatching.differentiated(
        dispatching.options_of(cls), "gated", "data-expert", 2.0
    )
    with dispatching.setting(axes_mesh, "data-expert"):
        found = run(floats, (expert_tk, valid_tk), grad)
    want = dispatching.oracle("gated", 2.0)(floats, (expert_tk, valid_tk), grad)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10),
        found[:2],
        want[:2],
    )
    assert found[2].dropped == 0 and found[2].assignments == valid_tk.sum()
