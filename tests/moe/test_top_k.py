"""Top-k by hand: three tokens, four experts, logits that are logs of probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.moe.routing import EVAL, TRAIN, Override, Tokens
from moe_jax.moe.selectors.top_k import TopK, select

PROBS = np.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25] * 4])


def route(options=None, probs=PROBS, valid=None, state=None, override=None, **fields):
    logits = jnp.log(jnp.asarray(probs, jnp.float32))
    count = len(probs)
    valid = np.ones(count, bool) if valid is None else np.array(valid)
    tokens = Tokens(
        features=jnp.zeros((count, 2)), valid=jnp.asarray(valid), batch_shape=(1, count)
    )
    options = options or TopK(**fields)
    return select(options, logits, tokens, state or {}, TRAIN, override, None)


def check(routing, experts, weights):
    np.testing.assert_array_equal(routing.expert_tk, experts)
    np.testing.assert_allclose(routing.weight_tk, weights, rtol=2e-6, atol=1e-7)
    assert routing.expert_tk.dtype == jnp.int32


CHOSEN = [[0, 1], [3, 2], [0, 1]]  # Ties go to the lowest index.
SHARES = [[2 / 3, 1 / 3], [4 / 7, 3 / 7], [0.5, 0.5]]


def test_softmax_before_keeps_the_probabilities():
    routing = route(softmax="before", renormalize=False)
    check(routing, CHOSEN, [[0.5, 0.25], [0.4, 0.3], [0.25, 0.25]])
    np.testing.assert_allclose(routing.probs_te, PROBS, rtol=1e-6)
    np.testing.assert_allclose(routing.logits_te, np.log(PROBS), rtol=1e-6)
    assert routing.num_experts == 4 and routing.expected_k == 2.0
    assert np.all(routing.valid_tk) and routing.valid_tk.shape == (3, 2)


def test_renormalised_and_softmax_after_are_the_same():
    check(route(softmax="before", renormalize=True), CHOSEN, SHARES)
    check(route(softmax="after"), CHOSEN, SHARES)
    probs = np.random.default_rng(0).dirichlet(np.full(8, 0.3), size=50) + 1e-9
    before, after = route(probs=probs, top_k=3), route(probs=probs, softmax="after")
    np.testing.assert_array_equal(before.expert_tk[:, :2], after.expert_tk)
    after = route(probs=probs, top_k=3, softmax="after")
    check(after, before.expert_tk, before.weight_tk)


def test_scale_multiplies_the_weights_only():
    routing = route(scale=2.5)
    check(routing, CHOSEN, 2.5 * np.array(SHARES))
    np.testing.assert_allclose(routing.probs_te, PROBS, rtol=1e-6)


@pytest.mark.parametrize("softmax", ["before", "after"])
def test_experts_are_distinct_and_the_best(softmax):
    probs = np.random.default_rng(1).dirichlet(np.ones(16), size=64)
    routing = route(probs=probs, top_k=5, softmax=softmax)
    want = np.argsort(-probs.astype(np.float32), axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(routing.expert_tk, want)
    assert all(len(set(row)) == 5 for row in np.asarray(routing.expert_tk).tolist())


def test_invalid_tokens_are_never_served():
    routing = route(valid=[True, False, True])
    np.testing.assert_array_equal(routing.valid_tk, [[1, 1], [0, 0], [1, 1]])
    np.testing.assert_array_equal(routing.valid_t, [1, 0, 1])
    replay = Override(
        expert_tk=jnp.array([[3, 2], [0, 1], [2, 3]]), valid_tk=jnp.ones((3, 2), bool)
    )
    routing = route(valid=[True, False, True], override=replay)
    np.testing.assert_array_equal(routing.valid_tk, [[1, 1], [0, 0], [1, 1]])


def test_the_bias_moves_the_choice_and_not_the_weights():
    state = {"bias": jnp.array([0.0, 0.0, 0.0, 0.3])}
    routing = route(renormalize=False, state=state)
    check(routing, [[0, 3], [3, 2], [3, 0]], [[0.5, 0.1], [0.4, 0.3], [0.25, 0.25]])
    np.testing.assert_allclose(
        routing.choice_te, PROBS + np.array([0.0, 0.0, 0.0, 0.3]), rtol=1e-6
    )
    np.testing.assert_allclose(routing.probs_te, PROBS, rtol=1e-6)
    shifted = route(renormalize=False, state={"bias": state["bias"] + 7.0})
    check(shifted, routing.expert_tk, routing.weight_tk)
    # With the softmax after, the bias is added to the logits: log .1 + 1 > log .25.
    routing = route(softmax="after", state={"bias": jnp.array([0.0, 0.0, 0.0, 1.0])})
    check(
        routing, [[0, 3], [3, 2], [3, 0]], [[5 / 6, 1 / 6], [4 / 7, 3 / 7], [0.5] * 2]
    )


@pytest.mark.parametrize("softmax", ["before", "after"])
def test_gradients_reach_the_logits_and_not_the_bias(softmax):
    factors = np.array([[1.0, -2.0], [0.5, 3.0], [2.0, 1.0]])

    def value(logits, bias):
        tokens = Tokens(
            features=jnp.zeros((3, 1)), valid=jnp.ones(3, bool), batch_shape=(1, 3)
        )
        options = TopK(softmax=softmax)
        routing = select(options, logits, tokens, {"bias": bias}, TRAIN, None, None)
        return jnp.sum(routing.weight_tk * factors) + jnp.sum(routing.choice_te)

    logits = jnp.log(jnp.asarray(PROBS, jnp.float32))
    bias = jnp.array([0.0, 0.0, 0.0, 0.01])
    grad_logits, grad_bias = jax.grad(value, (0, 1))(logits, bias)
    np.testing.assert_array_equal(grad_bias, np.zeros(4))
    want = np.zeros((3, 4))
    chosen = [[0, 1], [3, 2], [3, 0]]
    for t, experts in enumerate(chosen):
        share = PROBS[t, experts] / PROBS[t, experts].sum()
        mean = share @ factors[t]
        want[t, experts] = share * (factors[t] - mean)
    np.testing.assert_allclose(grad_logits, want, rtol=1e-5, atol=1e-6)


def test_a_pruned_expert_serves_nobody():
    mask = jnp.array([True, False, True, True])
    routing = route(renormalize=False, override=Override(expert_mask=mask))
    check(
        routing,
        [[0, 2], [3, 2], [0, 2]],
        [[0.5 / 0.75, 0.15 / 0.75], [0.4 / 0.8, 0.3 / 0.8], [1 / 3, 1 / 3]],
    )
    np.testing.assert_array_equal(routing.probs_te[:, 1], np.zeros(3))
    # Not even where its bias says so.
    state = {"bias": jnp.array([0.0, 5.0, 0.0, 0.0])}
    for softmax in ("before", "after"):
        routing = route(
            softmax=softmax, state=state, override=Override(expert_mask=mask)
        )
        np.testing.assert_array_equal(routing.expert_tk, [[0, 2], [3, 2], [0, 2]])


@pytest.mark.parametrize("softmax", ["before", "after"])
def test_where_fewer_than_k_experts_are_left_only_those_serve(softmax):
    mask = jnp.array([False, False, True, False])
    routing = route(softmax=softmax, override=Override(expert_mask=mask))
    np.testing.assert_array_equal(routing.expert_tk[:, 0], [2, 2, 2])
    np.testing.assert_array_equal(routing.valid_tk, [[True, False]] * 3)
    np.testing.assert_allclose(routing.weight_tk[:, 0], np.ones(3), rtol=1e-6)


def test_a_shift_moves_the_logits():
    shift = jnp.log(jnp.array([1.0, 4.0, 1.0, 1.0]))
    routing = route(renormalize=False, override=Override(logit_shift=shift))
    check(
        routing,
        [[1, 0], [1, 3], [1, 0]],
        [[1 / 1.75, 0.5 / 1.75], [0.8 / 1.6, 0.4 / 1.6], [1 / 1.75, 0.25 / 1.75]],
    )


def test_a_replay_takes_the_choice_and_computes_the_weights():
    replay = Override(
        expert_tk=jnp.array([[3, 2], [0, 1], [2, 3]]),
        valid_tk=jnp.array([[True, False], [True, True], [False, True]]),
    )
    routing = route(renormalize=False, override=replay)
    check(routing, [[3, 2], [0, 1], [2, 3]], [[0.1, 0.15], [0.1, 0.2], [0.25, 0.25]])
    np.testing.assert_array_equal(routing.valid_tk, replay.valid_tk)
    check(
        route(softmax="after", override=replay),
        [[3, 2], [0, 1], [2, 3]],
        [[0.4, 0.6], [1 / 3, 2 / 3], [0.5, 0.5]],
    )


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_another_k(top_k):
    routing = route(renormalize=False, override=Override(top_k=top_k))
    order = [[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]]
    experts = np.array(order)[:, :top_k]
    check(routing, experts, np.take_along_axis(PROBS, experts, axis=1))
    assert routing.expected_k == float(top_k)


def test_training_and_evaluation_agree():
    tokens = Tokens(
        features=jnp.zeros((3, 1)), valid=jnp.ones(3, bool), batch_shape=(1, 3)
    )
    logits = jnp.log(jnp.asarray(PROBS, jnp.float32))
    one, two = (
        select(TopK(), logits, tokens, {}, mode, None, jax.random.key(n))
        for n, mode in enumerate((TRAIN, EVAL))
    )
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(top_k=0), ["must be at least 1"]),
        (dict(softmax="during"), ["'during'", "'before' or 'after'"]),
        (dict(top_k=1), ["the router gets no gradient", "renormalize=False"]),
        (dict(top_k=1, softmax="after", renormalize=False), ["no gradient"]),
        (dict(top_k=1, renormalize=False), []),
        (dict(top_k=2, softmax="after"), []),
    ],
)
def test_problems(fields, words):
    found = list(TopK(**fields).problems("config.selector", config.Config()))
    assert len(found) == bool(words)
    for word in words:
        assert word in found[0] and found[0].startswith("config.selector.")
