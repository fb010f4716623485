"""ProMoE: prototypes, the contrastive loss, and an expert apart.

Choices and weights are compared with oracles in `test_selectors.py`.
"""

import dataclasses
import math

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
from moe_jax.moe.routing import TRAIN, Override, among
from moe_jax.moe.scorers.cosine import Cosine, CosineScorer
from moe_jax.moe.selectors import LOSSES, SELECTORS
from moe_jax.moe.selectors.pro_moe import ProMoE, ProMoEChoice

D = 5
NONE = oracles.without_condition(BATCH)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def of_balance(options, routing):
    return balance.losses(options, routing, BATCH, {})


def scorer_of(prototypes):
    options = Cosine(proj_dim=0, temperature=1.0, learned=False, dtype="float64")
    scorer = CosineScorer(D, E - 1, options, nnx.Rngs(0))
    assert not hasattr(scorer, "log_scale")
    scorer.w[...] = prototypes
    return scorer


def drawn():
    rng = np.random.default_rng(3)
    return rng.normal(size=(T, D)), rng.normal(size=(D, E - 1))


def pro_moe(options, x, prototypes, valid=VALID, none=None):
    """The routing, its tokens and the scorer."""
    scorer = scorer_of(prototypes)
    tokens = dataclasses.replace(tokens_of(valid), features=jnp.asarray(x))
    if none is not None:
        told = dataclasses.replace(tokens.condition, none=none)
        tokens = dataclasses.replace(tokens, condition=told)
    z, _ = scorer(tokens, None, None, TRAIN)
    routing = SELECTORS[type(options)](options, z, tokens, {}, TRAIN, None, None)
    return routing, tokens, scorer


def contrastive(options, x, prototypes, **given):
    found = LOSSES[type(options)](options, *pro_moe(options, x, prototypes, **given))
    return found["contrastive_loss"]


def by_hand(options, served, x, prototypes):
    """The contrastive loss in numpy, of a choice (T, E - 1) that is held fixed."""
    unit = lambda a: a / np.sqrt((a * a).sum())
    groups = [np.arange(T)]
    if isinstance(options, ProMoEChoice):
        groups = np.arange(T).reshape(BATCH)
    values = []
    for group in groups:
        active = [e for e in range(E - 1) if served[group, e].any()]
        if len(active) < 2:
            continue
        means = {e: x[[t for t in group if served[t, e]]].mean(axis=0) for e in active}
        total = 0.0
        for e in active:
            z = [unit(prototypes[:, e]) @ unit(means[j]) / options.tau for j in active]
            total -= z[active.index(e)] - math.log(sum(math.exp(v) for v in z))
        values.append(total / len(active))
    return options.contrastive_weight * np.mean(values)


@pytest.mark.parametrize(
    "options",
    [
        ProMoE(contrastive_weight=0.5),
        ProMoE(top_k=2, tau=0.3, score="sigmoid"),
        ProMoEChoice(capacity_factor=2.0, tau=0.2),
    ],
    ids=["one", "two", "choice"],
)
def test_the_contrastive_loss_and_its_gradients(float64, options):
    x, prototypes = drawn()
    routing, *_ = pro_moe(options, x, prototypes)
    served = gates(routing)[1]
    assert not served[NONE, :-1].any() and served[NONE & VALID, -1].all()
    np.testing.assert_array_equal(gates(routing)[0][NONE & VALID, -1], 1)
    want = by_hand(options, served, x, prototypes)
    value = lambda x, p: contrastive(options, x, p)
    found, grads = jax.jit(jax.value_and_grad(value, (0, 1)))(x, prototypes)
    np.testing.assert_allclose(found, want, rtol=1e-9)
    rng = np.random.default_rng(4)
    for grad, which in zip(grads, (0, 1), strict=True):
        assert np.abs(grad).max() > 1e-3
        for place in zip(*(rng.integers(0, n, 12) for n in grad.shape), strict=True):
            moved = []
            for step in (1e-6, -1e-6):
                given = [x.copy(), prototypes.copy()]
                given[which][place] += step
                moved.append(by_hand(options, served, *given))
            difference = (moved[0] - moved[1]) / 2e-6
            np.testing.assert_allclose(grad[place], difference, rtol=1e-5, atol=1e-8)
    assert np.all(np.asarray(grads[0])[NONE | ~VALID] == 0)


def test_the_contrastive_loss_of_equal_cosines(float64):
    """It is log |A| where cosines are equal; 0 where at most one expert is active."""
    x, prototypes = drawn()
    same = np.repeat(prototypes[:, :1], E - 1, axis=1)
    options = ProMoE(top_k=3)
    routing, tokens, _ = pro_moe(options, x, prototypes)
    flat = LOSSES[ProMoE](options, routing, tokens, scorer_of(same))
    # Each prototype sees the same means: -mean_e log p_e of one distribution.
    assert flat["contrastive_loss"] > math.log(E - 1) - 1e-12
    equal = dataclasses.replace(tokens, features=jnp.ones((T, D)))
    flat = LOSSES[ProMoE](options, routing, equal, scorer_of(prototypes))
    np.testing.assert_allclose(flat["contrastive_loss"], math.log(E - 1), rtol=1e-9)
    assert contrastive(ProMoE(), x, same) == 0, "all on the first"
    nobody = contrastive(ProMoE(), x, prototypes, none=jnp.ones(T, bool))
    assert nobody == 0
    grad = jax.grad(lambda p: contrastive(ProMoE(), x, p, none=jnp.ones(T, bool)))
    np.testing.assert_array_equal(jax.jit(grad)(prototypes), 0)


def test_the_length_of_a_token_says_nothing(float64):
    x, prototypes = drawn()
    one, _, _ = pro_moe(ProMoE(top_k=2), x, prototypes)
    two, _, _ = pro_moe(ProMoE(top_k=2), 3 * x, prototypes)
    np.testing.assert_array_equal(one.expert_tk, two.expert_tk)
    np.testing.assert_allclose(one.weight_tk, two.weight_tk, atol=6e-8)
    assert np.abs(one.weight_tk).max() <= 1
    cosines = x @ prototypes / np.linalg.norm(x, axis=1)[:, None]
    cosines /= np.linalg.norm(prototypes, axis=0)
    np.testing.assert_allclose(one.logits_te[:, :-1], cosines, rtol=1e-9)
    odd = Cosine(learned=False, min_temperature=0.1)
    (problem,) = odd.problems("scorer", None)
    assert "min_temperature=0.1 would be ignored" in problem


def test_balance_knows_nothing_of_the_last_expert(float64):
    """As if the images without condition were padding, and the expert not there."""
    x, prototypes = drawn()
    options, weights = ProMoE(top_k=2, score="softmax"), Balance(entropy_weight=0.1)
    apart, tokens, _ = pro_moe(options, x, prototypes)
    never = jnp.zeros(T, bool)
    alone, *_ = pro_moe(options, x, prototypes, valid=VALID & ~NONE, none=never)
    one, two = among(apart, E - 1), among(alone, E - 1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        of_balance(weights, one),
        of_balance(weights, two),
    )
    moe = MoE(num_experts=E, selector=options, balance=Balance(bias_rate=0.1))
    assert state.init_state(moe)["bias"].shape == (E - 1,)
    seen = state.observe(moe, apart, one, tokens)
    assert seen.sums["assignments"].sum() == 2 * (VALID & ~NONE).sum()
    assert seen.count == VALID.sum()
    after = state.update(moe, state.init_state(moe), seen)
    assert set(after) == {"bias"} and np.any(after["bias"] != 0)


def test_what_pro_moe_refuses():
    options = ProMoE()
    bare = dataclasses.replace(tokens_of(), condition=None)
    with pytest.raises(ValueError, match=r"needs tokens with a routing\.Condition"):
        SELECTORS[ProMoE](options, jnp.zeros((T, 7)), bare, {}, TRAIN, None, None)
    mask = jnp.arange(E) != E - 1
    pruned = route(options, logits_for(options), override=Override(expert_mask=mask))
    assert not gates(pruned)[1][NONE].any() and gates(pruned)[1][~NONE].any()
