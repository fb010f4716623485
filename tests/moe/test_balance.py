"""Balance losses against numpy in double precision, and the bias without gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.moe import balance, health
from moe_jax.moe.balance import Balance
from moe_jax.moe.routing import TRAIN, Observation, Routing, Tokens, counts_per_expert
from moe_jax.moe.selectors.top_k import TopK, select

T, E, K = 24, 6, 2


def make(seed=0, valid=None, logits=None):
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(T, E)) * 2
    logits = drawn if logits is None else logits
    valid_t = np.ones(T, bool) if valid is None else valid
    experts = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    slots = rng.random((T, K)) < 0.8
    logits = jnp.asarray(logits)
    return Routing(
        expert_tk=jnp.asarray(experts),
        weight_tk=jnp.ones((T, K)),
        valid_tk=jnp.asarray(slots & valid_t[:, None]),
        probs_te=jax.nn.softmax(logits),
        logits_te=logits,
        choice_te=logits,
        valid_t=jnp.asarray(valid_t),
        num_experts=E,
        expected_k=float(K),
    )


def by_hand(routing):
    """Counts, load-balance loss, z-loss and entropy, one token after the other."""
    logits = np.asarray(routing.logits_te, np.float64)
    counts, mean, z, entropy, tokens = np.zeros(E), np.zeros(E), 0.0, 0.0, 0
    for t in range(T):
        for k in range(K):
            if routing.valid_tk[t, k]:
                counts[int(routing.expert_tk[t, k])] += 1
        if routing.valid_t[t]:
            powers = np.exp(logits[t])
            probs = powers / powers.sum()
            mean += probs
            z += np.log(powers.sum()) ** 2
            entropy -= (probs * np.log(probs)).sum()
            tokens += 1
    loss = E * (counts / counts.sum()) @ (mean / tokens)
    return counts, loss, z / tokens, entropy / tokens


HALF = np.arange(T) % 2 == 0


@pytest.mark.parametrize("valid", [None, HALF])
def test_losses_and_figures_match_the_formulas(float64, valid):
    routing = make(valid=valid)
    counts, load, z, entropy = by_hand(routing)
    np.testing.assert_array_equal(counts_per_expert(routing), counts)
    np.testing.assert_allclose(balance.load_balance_loss(routing), load, rtol=1e-12)
    np.testing.assert_allclose(balance.z_loss(routing), z, rtol=1e-12)
    figures = health.figures(routing)
    np.testing.assert_array_equal(figures["counts"], counts)
    np.testing.assert_allclose(figures["entropy"], entropy, rtol=1e-12)
    weighted = balance.losses(Balance(load_balance_weight=0.25, z_weight=0.5), routing)
    assert set(weighted) == {"load_balance_loss", "router_z_loss"}
    np.testing.assert_allclose(weighted["load_balance_loss"], 0.25 * load, rtol=1e-12)
    np.testing.assert_allclose(weighted["router_z_loss"], 0.5 * z, rtol=1e-12)
    seen = balance.observe(routing)
    np.testing.assert_array_equal(seen.sums["assignments"], counts)
    assert seen.count == (T if valid is None else T // 2)


def test_padding_changes_nothing(float64):
    """What stands in the padding's logits and choices is never seen."""
    one = make(valid=HALF)
    logits = np.where(HALF[:, None], one.logits_te, 50.0)
    other = make(valid=HALF, logits=logits)
    for loss in (balance.load_balance_loss, balance.z_loss):
        np.testing.assert_allclose(loss(one), loss(other), rtol=1e-14)
    for name, figure in health.figures(one).items():
        np.testing.assert_allclose(figure, health.figures(other)[name], rtol=1e-14)


def test_a_loss_without_weight_is_left_out():
    routing = make()
    assert balance.losses(Balance(load_balance_weight=0, z_weight=0), routing) == {}
    only = balance.losses(Balance(load_balance_weight=0, z_weight=1), routing)
    assert list(only) == ["router_z_loss"]


def test_uniform_routing_has_load_balance_loss_one():
    routing = make(logits=np.zeros((T, E)))
    experts = np.arange(T * K).reshape(T, K) % E
    routing = dataclasses.replace(
        routing,
        expert_tk=jnp.asarray(experts, jnp.int32),
        valid_tk=jnp.ones((T, K), bool),
    )
    np.testing.assert_allclose(balance.load_balance_loss(routing), 1.0, rtol=1e-6)
    # Everything on one expert: E times the uniform loss.
    skewed = jnp.full((T, E), -40.0).at[:, 2].set(40.0)
    worst = dataclasses.replace(
        routing,
        expert_tk=jnp.full((T, K), 2, jnp.int32),
        valid_tk=jnp.ones((T, K), bool) & (jnp.arange(K) == 0),
        probs_te=jax.nn.softmax(skewed),
    )
    np.testing.assert_allclose(balance.load_balance_loss(worst), float(E), rtol=1e-6)


def test_gradients_by_hand(float64):
    routing = make(valid=HALF)
    replaced = lambda **new: dataclasses.replace(routing, **new)
    tokens = HALF.sum()
    grad = jax.grad(lambda z: balance.z_loss(replaced(logits_te=z)))(routing.logits_te)
    logits = np.asarray(routing.logits_te)
    total = np.exp(logits).sum(axis=1, keepdims=True)
    want = 2 * np.log(total) * np.exp(logits) / total / tokens * HALF[:, None]
    np.testing.assert_allclose(grad, want, rtol=1e-12, atol=1e-15)
    # Through P only: dL/dp_te = E f_e / T.
    grad = jax.grad(lambda p: balance.load_balance_loss(replaced(probs_te=p)))(
        routing.probs_te
    )
    counts = by_hand(routing)[0]
    want = E * counts / counts.sum() / tokens * HALF[:, None]
    np.testing.assert_allclose(grad, want, rtol=1e-12, atol=1e-15)


def test_no_valid_token_gives_zero_and_no_nan():
    routing = make(valid=np.zeros(T, bool))
    values = [
        balance.load_balance_loss(routing),
        balance.z_loss(routing),
        health.figures(routing)["entropy"],
    ]
    np.testing.assert_array_equal(values, np.zeros(3))


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


def test_stacked_layers_are_updated_one_by_one():
    options = Balance(bias_rate=1.0)
    loads = np.array([[[4, 0]], [[1, 3]], [[2, 2]]], np.int32)
    new = balance.update(options, {"bias": jnp.zeros((3, 1, 2))}, seen(loads))
    np.testing.assert_array_equal(new["bias"], [[[-1, 1]], [[1, -1]], [[0, 0]]])


def test_state_only_where_there_is_a_rate():
    assert balance.init_state(Balance(), 4) == {}
    assert balance.update(Balance(), {}, seen(np.array([1, 2], np.int32))) == {}
    state = balance.init_state(Balance(bias_rate=1e-3), 4)
    np.testing.assert_array_equal(state["bias"], np.zeros(4, np.float32))


def test_the_bias_balances_skewed_scores():
    """Softmax scores of N(offset, 1), 512 fresh tokens a step, u = 1e-3."""
    num_experts, tokens = 8, 512
    options, rule = TopK(top_k=2), Balance(bias_rate=1e-3)
    offsets = jax.random.normal(jax.random.key(3), (num_experts,))
    everyone = Tokens(
        features=jnp.zeros((tokens, 1)),
        valid=jnp.ones(tokens, bool),
        batch_shape=(1, tokens),
    )

    def step(state, key):
        logits = offsets + jax.random.normal(key, (tokens, num_experts))
        routing = select(options, logits, everyone, state, TRAIN, None, None)
        state = balance.update(rule, state, balance.observe(routing))
        return state, counts_per_expert(routing)

    keys = jax.random.split(jax.random.key(0), 500)
    start = balance.init_state(rule, num_experts)
    counts = np.asarray(jax.jit(lambda: jax.lax.scan(step, start, keys))()[1])
    mean = tokens * 2 / num_experts
    violation = (counts.max(axis=1) - mean) / mean
    assert violation[:5].min() > 0.8
    assert violation[-50:].max() < 0.3


def test_load_figures_by_hand():
    counts = jnp.array([[4, 4, 4, 4], [8, 0, 0, 8]])
    assert health.max_over_mean(counts) == 2.0
    assert health.dead_experts(counts) == 2
    assert health.max_over_mean(jnp.zeros((1, 4), jnp.int32)) == 0.0


def test_problems():
    options = Balance(load_balance_weight=-1, z_weight=-2, bias_rate=-3)
    found = list(options.problems("config.balance", config.Config()))
    fields = ["load_balance_weight=-1", "z_weight=-2", "bias_rate=-3"]
    assert found == [f"config.balance.{f}: must not be negative" for f in fields]
    assert not list(Balance(bias_rate=0.1).problems("config", config.Config()))
