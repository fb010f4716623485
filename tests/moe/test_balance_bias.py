"""The bias that balances without a loss: its steps by hand, and what it does."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe import balance, health
from moe_jax.moe.balance import Balance
from moe_jax.moe.routing import TRAIN, Observation, Tokens, biased
from moe_jax.moe.selectors.top_k import TopK, select
from moe_jax.parallel import rules

VARIANTS = list(
    itertools.product(["sign", "proportional"], ["additive", "multiplicative"])
)
STATE = {"additive": "bias", "multiplicative": "factor"}


def seen(load):
    return Observation(sums={"assignments": jnp.asarray(load)}, count=jnp.int32(1))


@pytest.mark.parametrize(
    ("load", "signs"),
    [
        ([4, 0, 2, 2], [-1, 1, 0, 0]),
        # The mean is 2.25: those at 2 are below it, however close.
        ([3, 2, 2, 2], [-1, 1, 1, 1]),
        ([1, 2, 2, 2], [1, -1, -1, -1]),
        ([5, 5, 5, 5], [0, 0, 0, 0]),
        # float32 does not tell these apart, and 4 * c overflows int32.
        ([500000001, 500000000, 500000000, 500000000], [-1, 1, 1, 1]),
        ([0, 0, 0, 2**31 - 1], [1, 1, 1, -1]),
    ],
)
def test_the_bias_takes_a_step_by_the_exact_sign(load, signs):
    options = Balance(bias_rate=0.25)
    state = {"bias": jnp.array([0.5, -1.0, 0.0, 2.0])}
    new = balance.update(options, state, seen(np.array(load, np.int32)))
    want = np.array([0.5, -1.0, 0.0, 2.0]) + 0.25 * np.array(signs)
    np.testing.assert_array_equal(new["bias"], want)


@pytest.mark.parametrize(
    ("load", "errors"),
    [
        ([4, 0, 2, 2], [-1, 1, 0, 0]),
        ([6, 1, 1, 0], [-2, 0.5, 0.5, 1]),
        ([0, 0, 0, 2**31 - 4], [1, 1, 1, -3]),
        ([5, 5, 5, 5], [0, 0, 0, 0]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("form", ["additive", "multiplicative"])
def test_the_proportional_rule_steps_by_the_relative_error(load, errors, form):
    options = Balance(bias_rate=0.25, bias_rule="proportional", bias_form=form)
    name = STATE[form]
    state = {name: jnp.array([0.5, -1.0, 0.0, 2.0])}
    new = balance.update(options, state, seen(np.array(load, np.int32)))
    assert set(new) == {name}
    want = np.array([0.5, -1.0, 0.0, 2.0]) + 0.25 * np.array(errors)
    np.testing.assert_allclose(new[name], want, rtol=1e-6, atol=1e-7)


def test_stacked_layers_are_updated_one_by_one():
    loads = np.array([[[4, 0]], [[1, 3]], [[2, 2]]], np.int32)
    zeros = {"bias": jnp.zeros((3, 1, 2))}
    new = balance.update(Balance(bias_rate=1.0), zeros, seen(loads))
    np.testing.assert_array_equal(new["bias"], [[[-1, 1]], [[1, -1]], [[0, 0]]])
    options = Balance(bias_rate=1.0, bias_rule="proportional")
    new = balance.update(options, zeros, seen(loads))
    np.testing.assert_array_equal(new["bias"], [[[-1, 1]], [[0.5, -0.5]], [[0, 0]]])


def test_state_only_where_there_is_a_rate():
    assert balance.init_state(Balance(), 4) == {}
    assert balance.update(Balance(), {}, seen(np.array([1, 2], np.int32))) == {}
    state = balance.init_state(Balance(bias_rate=1e-3), 4)
    np.testing.assert_array_equal(state["bias"], np.zeros(4, np.float32))
    options = Balance(bias_rate=1e-3, bias_form="multiplicative")
    np.testing.assert_array_equal(balance.init_state(options, 4)["factor"], np.ones(4))


def everyone(tokens):
    return Tokens(
        features=jnp.zeros((tokens, 1)),
        valid=jnp.ones(tokens, bool),
        batch_shape=(1, tokens),
    )


def route(logits, state, **fields):
    options = TopK(**{"top_k": 2, "renormalize": False, **fields})
    tokens = everyone(logits.shape[0])
    return select(options, logits, tokens, state, TRAIN, None, None)


def test_a_factor_moves_the_choice_and_not_the_weights():
    probs = np.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]])
    state = {"factor": jnp.array([1.0, 1.0, 1.0, 3.0])}
    routing = route(jnp.log(jnp.asarray(probs)), state)
    np.testing.assert_array_equal(routing.expert_tk, [[0, 3], [3, 2]])
    np.testing.assert_allclose(routing.weight_tk, [[0.5, 0.1], [0.4, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(routing.probs_te, probs, rtol=1e-6)
    np.testing.assert_allclose(
        biased(jnp.asarray(probs), state), probs * [1, 1, 1, 3], rtol=1e-6
    )


@pytest.mark.parametrize(("_", "form"), VARIANTS[:2])
def test_no_gradient_meets_the_bias(_, form):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))

    def total(state):
        routing = route(logits, state)
        losses = balance.losses(Balance(sequence_weight=1.0), routing, (2, 3), state)
        return sum(losses.values()) + jnp.sum(routing.weight_tk**2)

    start = balance.init_state(Balance(bias_rate=0.1, bias_form=form), 4)
    (grad,) = jax.grad(total)(start).values()
    np.testing.assert_array_equal(grad, np.zeros(4))


@pytest.mark.parametrize(("rule", "form"), VARIANTS)
def test_every_variant_balances_skewed_scores(rule, form):
    """Sigmoid scores of N(offset, 1), 512 fresh tokens a step.

    Near the balance a proportional step is small: it needs a larger rate.
    """
    num_experts, tokens = 8, 512
    rate = {"sign": 1e-3, "proportional": 1e-2}[rule]
    options = Balance(bias_rate=rate, bias_rule=rule, bias_form=form)
    offsets = jax.random.normal(jax.random.key(3), (num_experts,))

    def step(state, key):
        logits = offsets + jax.random.normal(key, (tokens, num_experts))
        routing = route(logits, state, score="sigmoid")
        counts = balance.observe(options, routing)
        state = balance.update(options, state, counts)
        return state, health.max_violation(counts.sums["assignments"][None])

    keys = jax.random.split(jax.random.key(0), 600)
    start = balance.init_state(options, num_experts)
    violation = np.asarray(jax.jit(lambda: jax.lax.scan(step, start, keys))()[1])
    assert violation[:5].min() > 0.8
    assert violation[500:].max() < 0.3, violation[500:].max()


@pytest.mark.parametrize(("rule", "form"), VARIANTS)
def test_the_same_bits_on_every_mesh(axes_mesh, rule, form):
    """Three steps of a router whose choices hang on the bias."""
    options = Balance(bias_rate=3e-3, bias_rule=rule, bias_form=form)
    logits = np.random.default_rng(0).normal(size=(3, 8, 16, 6)).astype(np.float32)

    def steps(logits):
        state = balance.init_state(options, 6)
        for x in logits:
            x = rules.constrain(x, "batch", "sequence", None)
            routing = route(x.reshape(-1, 6) + jnp.arange(6), state)
            state = balance.update(options, state, balance.observe(options, routing))
        return state[STATE[form]]

    want = np.asarray(jax.jit(steps)(logits))
    assert len(set(want.tolist())) > 1
    for sizes in (dict(data=2, expert=4), dict(data=1, fsdp=2, expert=2, context=2)):
        with jax.set_mesh(axes_mesh(**sizes)):
            found = np.asarray(jax.jit(steps)(logits))
        assert found.tobytes() == want.tobytes(), sizes
