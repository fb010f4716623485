"""Selectors by hand: scores, groups of tokens, and what each paper says of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selecting import E, T, gates, logits_for, route, tokens_of

from moe_jax.moe.routing import EVAL, Groups, Tokens
from moe_jax.moe.selectors import SELECTORS, common
from moe_jax.moe.selectors.expert_choice import ExpertChoice
from moe_jax.moe.selectors.group_limited import GroupLimited
from moe_jax.moe.selectors.hashing import Hash
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.moe.selectors.top_p import TopP


@pytest.mark.parametrize("kind", list(common.SCORES))
def test_scores_by_hand(float64, kind):
    z = np.array([[-60.0, -40.1, -39.9, -3.0, 0.0, 2.0, 30.0, -np.inf]])
    want = {
        "softmax": np.exp(z - 30) / np.exp(z - 30).sum(),
        "sigmoid": 1 / (1 + np.exp(-z)),
        "sqrt_softplus": np.sqrt(np.log1p(np.exp(z))),
    }[kind]
    scores, probs = common.scores_and_probs(kind, jnp.asarray(z))
    np.testing.assert_allclose(scores, want, rtol=1e-13)
    np.testing.assert_allclose(probs, want / want.sum(), rtol=1e-13)
    grad = jax.grad(lambda z: jnp.sum(common.scores_and_probs(kind, z)[0] * z[:, 3]))
    assert np.isfinite(np.asarray(grad(jnp.asarray(z)))[0, :-1]).all()


def test_groups_split_and_join():
    x = np.arange(4 * 6).reshape(24, 1)
    for rows, positions in ((1, 6), (4, 6), (2, 1), (1, 3), (2, 3)):
        groups = Groups((4, 6), rows, positions)
        parts = groups.split(jnp.asarray(x))
        assert parts.shape == (24 // (rows * positions), rows * positions, 1)
        np.testing.assert_array_equal(groups.join(parts), x)
        number = np.asarray(groups.of_tokens())
        for g, part in enumerate(np.asarray(parts)[..., 0]):
            np.testing.assert_array_equal(np.nonzero(number == g)[0], part)
            row, position = part // 6, part % 6
            assert len(set(row)) == rows and len(set(position)) == positions


def hashed(ids, **fields):
    ids = jnp.asarray(ids, jnp.int32)
    tokens = Tokens(
        features=jnp.zeros((len(ids), 1)),
        valid=jnp.ones(len(ids), bool),
        batch_shape=(1, len(ids)),
        token_ids=ids,
    )
    select, zeros = SELECTORS[Hash], jnp.zeros((len(ids), E))
    return select(Hash(**fields), zeros, tokens, {}, EVAL, None, None)


def test_a_hash_depends_on_the_id_and_spreads_the_ids():
    ids = np.arange(8000)
    routing = hashed(ids, top_k=2)
    experts = np.asarray(routing.expert_tk)
    assert (experts[:, 0] != experts[:, 1]).all()
    np.testing.assert_array_equal(routing.weight_tk, np.full((8000, 2), 0.5))
    # Each of the 28 pairs of experts serves its share of the ids.
    pairs = np.bincount(np.sort(experts) @ [E, 1], minlength=E * E)
    pairs = pairs[pairs > 0]
    mean = 8000 / 28
    assert len(pairs) == 28 and np.abs(pairs - mean).max() < 5 * mean**0.5
    # Neighbouring ids, powers of two and other places in the batch are no pattern.
    turned = np.asarray(hashed(ids[::-1], top_k=2).expert_tk)[::-1]
    np.testing.assert_array_equal(turned, experts)
    follows = np.bincount(experts[:-1, 0] * E + experts[1:, 0], minlength=E * E)
    assert np.abs(follows - 125).max() < 5 * 125**0.5
    aligned = np.asarray(hashed(ids * 1024).expert_tk)[:, 0]
    assert np.abs(np.bincount(aligned, minlength=E) - 1000).max() < 5 * 1000**0.5
    other = np.asarray(hashed(ids, top_k=2, salt=1).expert_tk)
    same = (other[:, 0] == experts[:, 0]).mean()
    assert abs(same - 1 / E) < 5 * (1 / E / 8000) ** 0.5
    tokens = dataclasses.replace(tokens_of(), token_ids=None)
    with pytest.raises(ValueError, match="pass token_ids"):
        SELECTORS[Hash](Hash(), jnp.zeros((T, E)), tokens, {}, EVAL, None, None)


def test_dynamic_numbers_of_experts_by_hand():
    """Uniform over 16: 7 experts hold more than .4, 9 more than .5; 1 takes all."""
    z = np.zeros((T, 16), np.float32)
    for p, count in ((0.4, 7), (0.5, 9), (1.0, 16)):
        routing = route(TopP(p=p, k_max=16), z)
        np.testing.assert_array_equal(
            np.sum(routing.valid_tk, axis=1), np.full(T, count)
        )
        np.testing.assert_allclose(
            np.asarray(routing.weight_tk)[:, :count], np.full((T, count), 1 / 16)
        )
    sure = np.log(np.array([[0.01] * 5 + [0.9] + [0.005] * 10] * T, np.float32))
    routing = route(TopP(p=0.4, k_max=16), sure)
    np.testing.assert_array_equal(np.sum(routing.valid_tk, axis=1), np.ones(T))
    np.testing.assert_array_equal(routing.expert_tk[:, 0], np.full(T, 5))


def test_every_expert_takes_the_same_number_of_tokens(float64):
    """And with a factor of E all of them: the dense mixture."""
    z = logits_for(ExpertChoice())
    weight, served = gates(route(ExpertChoice(capacity_factor=2.0, group="batch"), z))
    np.testing.assert_array_equal(served.sum(axis=0), np.full(E, T * 2 // E))
    weight, served = gates(route(ExpertChoice(capacity_factor=8.0), z))
    assert served.all()
    np.testing.assert_allclose(weight.sum(axis=1), np.ones(T), rtol=1e-12)


def test_groups_of_one_and_all_groups_are_plain_top_k():
    z = logits_for(TopK()).astype(np.float32)
    plain = route(TopK(top_k=3, score="sigmoid"), z)
    for fields in (dict(num_groups=1, top_groups=1), dict(num_groups=4, top_groups=4)):
        for group_score in ("max", "top2"):
            limited = route(GroupLimited(top_k=3, group_score=group_score, **fields), z)
            for one, two in zip(gates(plain), gates(limited), strict=True):
                np.testing.assert_array_equal(one, two)
    scaled = route(GroupLimited(top_k=3, num_groups=4, top_groups=2, scale=2.5), z)
    np.testing.assert_allclose(
        np.sum(scaled.weight_tk, axis=1), np.full(T, 2.5), rtol=1e-6
    )
    groups = np.asarray(scaled.expert_tk) // 2
    assert max(len(set(row)) for row in groups.tolist()) <= 2


def test_v2_where_scores_underflow_weighs_as_its_code_does():
    """DeepSeek V2 masks with 0: what it picks outside of the groups has weight 0."""
    z = np.full((T, E), -200.0, np.float32)
    z[:, 3] = 0.0
    options = GroupLimited(
        top_k=4,
        num_groups=4,
        top_groups=2,
        score="softmax",
        group_score="max",
        renormalize=False,
        scale=16.0,
    )
    weight, served = gates(route(options, z))
    want = np.zeros((T, E))
    want[:, 3] = 16.0
    np.testing.assert_array_equal(weight, want)
    assert not served[:, 4:].any()
