"""Experts cut into parts: the same layer where the parts of an expert go together."""

import functools

import dispatching
import jax
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.fine_grained import fine_grained
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.expert_choice import ExpertChoice
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.moe.selectors.top_p import TopP


def test_numbers_by_hand():
    given = MoE(
        num_experts=16, experts=ExpertFeedForward(d_ff=96), selector=TopK(top_k=2)
    )
    cut = fine_grained(given, 4)
    assert (cut.num_experts, cut.experts.d_ff, cut.selector.top_k) == (64, 24, 8)
    assert (given.num_experts, given.experts.d_ff, given.selector.top_k) == (16, 96, 2)
    choice = MoE(experts=given.experts, selector=ExpertChoice(capacity_factor=2.0))
    assert fine_grained(choice, 2).selector.capacity_factor == 4.0


def test_all_parts_of_an_expert_are_the_expert(float64):
    """An expert is the sum of its parts: hidden units in groups."""
    parts, top_k = 3, 2
    (weights, x, weight_tk), _ = dispatching.drawn("gated", 2, 8, top_k)
    expert_tk, valid_tk = dispatching.routings(16, top_k)["holes"]
    dense = functools.partial(dispatching.run, DenseDispatch(), "gated", "alone")
    whole, _ = dense(weights, x, weight_tk, expert_tk, valid_tk, 2.0)
    e, d, f = weights["w_up"].shape
    into = lambda w: w.reshape(e, d, parts, f // parts).swapaxes(1, 2)
    cut = {n: into(weights[n]).reshape(e * parts, d, -1) for n in ("w_gate", "w_up")}
    cut["w_down"] = weights["w_down"].reshape(e * parts, f // parts, d)
    repeat = lambda a: np.repeat(a, parts, axis=1)
    part_tk = repeat(expert_tk * parts) + np.tile(np.arange(parts), top_k)
    y, _ = dense(
        cut, x, repeat(weight_tk), part_tk.astype(np.int32), repeat(valid_tk), 6.0
    )
    np.testing.assert_allclose(y, whole, rtol=1e-10, atol=1e-12)
    assert sum(w.size for w in jax.tree.leaves(cut)) == sum(
        w.size for w in jax.tree.leaves(weights)
    )


@pytest.mark.parametrize(
    ("fields", "parts", "words"),
    [
        (dict(experts=ExpertFeedForward(d_ff=10)), 4, "d_ff=10 cannot be cut in 4"),
        (dict(experts=ExpertFeedForward(d_ff=10)), 0, "cannot be cut in 0"),
        (dict(selector=TopP()), 2, "TopP has no number of experts"),
    ],
)
def test_what_cannot_be_cut(fields, parts, words):
    with pytest.raises(UserError, match=words):
        fine_grained(MoE(**fields), parts)
