"""Routers of diffusion transformers: losses, state, and what depends on what.

Choices and weights are compared with oracles in `test_selectors.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import router_oracles as oracles
from flax import nnx
from selecting import BATCH, VALID, E, T, gates, logits_for, route, tokens_of

from moe_jax.moe import balance, state
from moe_jax.moe.balance import Balance
from moe_jax.moe.layer import MoE
from moe_jax.moe.routing import EVAL, TRAIN, Override
from moe_jax.moe.selectors import LOSSES, SELECTORS, STATES, global_top_k
from moe_jax.moe.selectors.diff_moe import CapacityPredictor, DiffMoE
from moe_jax.moe.selectors.expert_choice import ExpertChoice
from moe_jax.moe.selectors.global_top_k import GlobalTopK
from moe_jax.moe.selectors.pro_moe import ProMoE, ProMoEChoice
from moe_jax.moe.selectors.top_k import TopK

D = 5
SIGMOID = lambda x: 1 / (1 + np.exp(-x))


pytestmark = pytest.mark.usefixtures("quick_compilation")


def of_balance(options, routing):
    return balance.losses(options, routing, BATCH, {})


# DiT-MoE: top-k of a softmax over all experts, as it is.


def test_the_balance_loss_of_dit_moe(float64):
    """It is alpha for uniform probabilities, alpha E / k where k experts take all."""
    options = TopK(top_k=2, renormalize=False)
    alpha = Balance(load_balance_weight=0.01, z_weight=0.0)
    flat = route(options, np.zeros((T, E)))
    found = of_balance(alpha, flat)["load_balance_loss"]
    np.testing.assert_allclose(found, 0.01, rtol=1e-12)
    np.testing.assert_allclose(flat.weight_tk, 1 / E, rtol=1e-12)
    z = np.zeros((T, E))
    z[:, [1, 6]] = 80.0
    found = of_balance(alpha, route(options, z))["load_balance_loss"]
    np.testing.assert_allclose(found, 0.01 * E / 2, rtol=1e-12)


# EC-DiT: expert choice within an image.


@pytest.mark.parametrize(
    "factor, taken", [(1.0, 1), (1.34, 2), (3.9, 5), (4.0, 6), (0.1, 1)]
)
def test_each_expert_takes_whole_tokens_of_an_image(factor, taken):
    """Twelve tokens, eight experts: 1.5 times the factor, cut; at least one."""
    tokens = tokens_of(batch=(2, 12))
    options = ExpertChoice(capacity_factor=factor, rounding="down")
    z = jnp.asarray(logits_for(options, count=24))
    routing = SELECTORS[ExpertChoice](options, z, tokens, {}, EVAL, None, None)
    per_image = np.asarray(routing.valid_tk).reshape(2, 12, E).sum(axis=1)
    np.testing.assert_array_equal(per_image, taken)


@pytest.mark.parametrize(
    "options",
    [
        ExpertChoice(rounding="down"),
        ProMoE(top_k=2),
        ProMoEChoice(capacity_factor=2.0),
        DiffMoE(),
        GlobalTopK(score="identity", k_max=E, threshold_decay=0.9),
    ],
    ids=lambda o: type(o).__name__,
)
def test_an_image_is_evaluated_by_itself(options):
    """What is in the batch beside it changes nothing, bit for bit."""
    z = logits_for(options).astype(np.float32)
    other = logits_for(options, seed=9, spread=6.0).astype(np.float32)
    length = BATCH[1]
    other[2 * length : 3 * length] = z[2 * length : 3 * length]
    one, two = (gates(route(options, a, mode=EVAL)) for a in (z, other))
    same = slice(2 * length, 3 * length)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a[same], b[same])
    assert (one[1] != two[1]).any() and one[1][same].any()


# DiffMoE.


def test_in_training_experts_choose_from_the_whole_batch(float64):
    z = logits_for(DiffMoE())
    pool = ExpertChoice(capacity_factor=1.5, group="batch", rounding="down")
    found = route(DiffMoE(capacity_factor=1.5), z, VALID, mode=TRAIN)
    want = route(pool, z, VALID, mode=TRAIN)
    for one, two in zip(gates(found), gates(want), strict=True):
        np.testing.assert_array_equal(one, two)
    per_expert = gates(found)[1].sum(axis=0)
    np.testing.assert_array_equal(per_expert, int(VALID.sum() * 1.5 / E))


def test_the_predictor_learns_what_was_taken(float64):
    options = DiffMoE(predictor_weight=0.5)
    tokens = tokens_of(VALID)
    routing = route(options, logits_for(options), VALID, mode=TRAIN)
    served, said = gates(routing)[1], oracles.predictions(T, E)

    def value(own):
        given = dataclasses.replace(tokens, own=own)
        return LOSSES[DiffMoE](options, routing, given, None)["capacity_predictor_loss"]

    p = SIGMOID(said)
    lost = -np.where(served, np.log(p), np.log1p(-p))[VALID]
    found, grad = jax.value_and_grad(value)(jnp.asarray(said))
    np.testing.assert_allclose(found, 0.5 * lost.mean(), rtol=1e-12)
    want = 0.5 * (p - served) * VALID[:, None] / (VALID.sum() * E)
    np.testing.assert_allclose(grad, want, rtol=1e-9, atol=1e-15)


def test_the_predictor_takes_no_part_in_the_features(float64):
    rng = np.random.default_rng(0)
    predictor = CapacityPredictor(D, E, DiffMoE(dtype="float64"), nnx.Rngs(0))
    names = ("w_in", "b_in", "w_out", "b_out")
    weights = {n: rng.normal(size=getattr(predictor, n).shape) for n in names}
    for name, value in weights.items():
        getattr(predictor, name)[...] = value
    x = rng.normal(size=(T, D))
    call = lambda x: predictor(dataclasses.replace(tokens_of(), features=x))
    hidden = x @ weights["w_in"] + weights["b_in"]
    want = hidden * SIGMOID(hidden) @ weights["w_out"] + weights["b_out"]
    np.testing.assert_allclose(call(jnp.asarray(x)), want, rtol=1e-12)
    grad = jax.grad(lambda x: jnp.sum(jnp.sin(call(x))))(jnp.asarray(x))
    np.testing.assert_array_equal(grad, 0)


def seen_of(options, z, valid):
    routing = route(options, z, valid, mode=TRAIN)
    moe = MoE(num_experts=E, selector=options, balance=Balance(bias_rate=0.0))
    return state.observe(moe, routing, routing, tokens_of(valid)), moe


def test_thresholds_follow_the_last_one_taken(float64):
    """Two micro-batches and a third of padding alone: the mean of what two saw."""
    options = DiffMoE(capacity_factor=2.0, decay=0.75)
    z, others = logits_for(options), np.arange(T) % 4 != 1
    seen = [seen_of(options, z, valid)[0] for valid in (VALID, others, VALID & False)]
    _, moe = seen_of(options, z, VALID)
    summed = jax.tree.map(lambda *a: sum(a), *seen)
    p = SIGMOID(oracles.predictions(T, E))
    last = lambda v: np.sort(p[v], axis=0)[::-1][int(v.sum() * 2 / E) - 1]
    first = state.init_state(moe)
    assert set(first) == {"threshold"} and first["threshold"].shape == (E,)
    old = {"threshold": jnp.linspace(0, 1, E, dtype=jnp.float32)}
    after = state.update(moe, old, summed)["threshold"]
    mean = (last(VALID) + last(others)) / 2
    np.testing.assert_allclose(after, 0.75 * old["threshold"] + 0.25 * mean, rtol=1e-6)
    assert after.dtype == jnp.float32
    nothing = state.update(moe, old, seen[2])["threshold"]
    np.testing.assert_array_equal(nothing, old["threshold"])


# Expert Race.


@pytest.mark.parametrize("group", ["batch", "sequence"])
def test_the_threshold_of_the_race(float64, group):
    """The K N-th largest score of those that compete; one number for all experts."""
    options = GlobalTopK(
        k_max=E, score="identity", threshold_decay=0.9, group=group, top_k=1
    )
    z = logits_for(options)
    seen, moe = seen_of(options, z, VALID)
    groups = [np.arange(T)] if group == "batch" else np.arange(T).reshape(BATCH)
    values = [np.sort(z[g][VALID[g]].ravel())[::-1][VALID[g].sum() - 1] for g in groups]
    assert state.init_state(moe)["threshold"].shape == ()
    two = {"threshold": jnp.array([0.5, -1.0], jnp.float32)}  # Stacked layers.
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), seen)
    after = state.update(moe, two, stacked)["threshold"]
    want = 0.9 * np.array([0.5, -1.0]) + 0.1 * np.mean(values)
    np.testing.assert_allclose(after, want, rtol=1e-6)
    # With that very threshold, evaluation serves what training did.
    now = {"threshold": jnp.asarray(np.mean(values))}
    if group == "batch":
        one = route(options, z, VALID, mode=TRAIN)
        other = route(options, z, VALID, mode=EVAL, state=now)
        for a, b in zip(gates(one), gates(other), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_race_without_a_threshold_keeps_no_state():
    options = GlobalTopK()
    moe = MoE(num_experts=E, selector=options)
    assert state.init_state(moe) == {} == STATES[GlobalTopK].update(options, {}, {})


def similarity_by_hand(probs, served):
    num = served.shape[1]
    alike, both = probs.T @ probs, (served.T @ served).astype(float)
    own = np.trace(both)
    weight = both * (num * num - num) / max(both.sum() - own, 1)
    np.fill_diagonal(weight, num * np.diag(both) / own)
    return (weight * alike).sum() / len(probs)


def test_the_similarity_of_routers(float64):
    options = GlobalTopK(k_max=E, similarity_weight=0.5)
    z = logits_for(options)
    routing = route(options, z, VALID)
    served = gates(routing)[1]

    def by_hand(z):
        probs = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        if options.score == "sigmoid":
            probs = SIGMOID(z) / SIGMOID(z).sum(axis=1, keepdims=True)
        return 0.5 * similarity_by_hand(probs[VALID], served[VALID].astype(int))

    def value(z):
        found = LOSSES[GlobalTopK](options, route(options, z, VALID), None, None)
        return found["router_similarity_loss"]

    found, grad = jax.jit(jax.value_and_grad(value))(z)
    np.testing.assert_allclose(found, by_hand(z), rtol=1e-10)
    for t, e in np.random.default_rng(1).integers(0, (T, E), (12, 2)):
        up, down = z.copy(), z.copy()
        up[t, e] += 1e-6
        down[t, e] -= 1e-6
        want = (by_hand(up) - by_hand(down)) / 2e-6
        np.testing.assert_allclose(grad[t, e], want, rtol=1e-5, atol=1e-9)
    assert LOSSES[GlobalTopK](GlobalTopK(), routing, None, None) == {}


def test_the_similarity_of_known_routings(float64):
    """1: uniform and balanced. 2: one-hot, all on the same two of four experts."""
    pairs = np.array([(a, b) for a in range(4) for b in range(a)])
    choose = SELECTORS[TopK]

    def value(z, experts):
        tokens = tokens_of(batch=(1, len(z)))
        replay = Override(
            expert_tk=jnp.asarray(experts, jnp.int32),
            valid_tk=jnp.ones(experts.shape, bool),
        )
        routing = choose(TopK(), jnp.asarray(z), tokens, {}, EVAL, replay, None)
        return global_top_k.similarity(routing)

    np.testing.assert_allclose(value(np.zeros((6, 4)), pairs), 1, rtol=1e-12)
    hot = np.zeros((6, 4))
    hot[:, 1] = 100.0
    found = value(hot, np.tile([1, 3], (6, 1)))
    np.testing.assert_allclose(found, 2, rtol=1e-12)
    alone = value(hot, np.full((6, 1), 1))
    np.testing.assert_allclose(alone, 4, rtol=1e-12)  # No two are chosen together.
