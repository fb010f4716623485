"""Routings from even to one expert: what each promises."""

import numpy as np
import pytest

from moe_jax.bench import patterns
from moe_jax.bench.patterns import PATTERNS, Sizes

SIZES = Sizes(tokens=256, top_k=2, num_experts=8, token_shards=8, expert_shards=4)
ODD = [
    SIZES,
    Sizes(tokens=256, top_k=8, num_experts=8, token_shards=8, expert_shards=8),
    Sizes(tokens=24, top_k=3, num_experts=5),
    Sizes(tokens=4, top_k=1, num_experts=1, token_shards=4),
]


def made(name, sizes=SIZES, seed=0):
    """Choices, and how often each expert and each shard of experts was chosen."""
    choices = patterns.make(name, sizes, seed)
    load_e = patterns.loads(*choices, sizes.num_experts)
    return choices, load_e, load_e.reshape(sizes.expert_shards, -1).sum(axis=1)


@pytest.mark.parametrize("sizes", ODD, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_valid_experts_of_a_token_are_distinct_and_exist(name, sizes):
    expert_tk, valid_tk = patterns.make(name, sizes, 1)
    assert expert_tk.shape == valid_tk.shape == (sizes.tokens, sizes.top_k)
    assert expert_tk.dtype == np.int32 and valid_tk.dtype == bool
    assert expert_tk.min() >= 0 and expert_tk.max() < sizes.num_experts
    for experts, valid in zip(expert_tk, valid_tk, strict=True):
        assert len(set(experts[valid])) == valid.sum()


@pytest.mark.parametrize("name", PATTERNS)
def test_the_same_seed_makes_the_same(name):
    (first, valid), _, _ = made(name, seed=3)
    again, valid_again = patterns.make(name, SIZES, 3)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(valid, valid_again)
    # A caller may write into what it got.
    first[:], valid[:] = 0, False


def test_even_loads():
    for name in ("balanced", "bursty"):
        _, load_e, _ = made(name)
        assert (load_e == 64).all(), name
    # From every shard, or from few of them.
    by_shard = lambda name: made(name)[0][0].reshape(8, -1)
    assert all(len(set(row)) == 8 for row in by_shard("balanced"))
    assert all(len(set(row)) == 4 for row in by_shard("bursty"))


def test_drawn_loads_follow_their_shares():
    many = Sizes(tokens=20000, top_k=1, num_experts=8)
    share = lambda name: made(name, many)[1] / 20000
    rank = np.arange(1, 9)
    for name, want in (
        ("uniform", np.full(8, 1 / 8)),
        ("zipf", 1 / rank / (1 / rank).sum()),
        ("steep_zipf", 1 / rank**2 / (1 / rank**2).sum()),
        ("hot_expert", np.array([1 / 2] + [1 / 14] * 7)),
    ):
        np.testing.assert_allclose(share(name), want, atol=0.015, err_msg=name)


def test_what_is_in_use():
    loads = {name: made(name)[1:] for name in PATTERNS}
    used = {name: sorted(np.flatnonzero(load_e)) for name, (load_e, _) in loads.items()}
    assert used["one_expert"] == [3] and loads["one_expert"][0][3] == 256
    assert used["two_experts"] == [1, 6] and loads["two_experts"][0][1] == 256
    assert used["hot_shard"] == [0, 1] and list(loads["hot_shard"][1]) == [512, 0, 0, 0]
    assert used["empty"] == []
    halves = made("uneven_halves")[0][0]
    assert len(set(halves[:128].ravel())) == 2 and len(set(halves[128:].ravel())) == 8


def test_who_sends():
    by_shard = lambda name: made(name)[0][1].reshape(8, -1).sum(axis=1)
    assert list(by_shard("one_source")) == [64] + [0] * 7
    holes = by_shard("holes")
    assert list(holes[1:4]) == [0, 0, 0] and 0 < holes[0] < 64
    assert not by_shard("empty").any()
