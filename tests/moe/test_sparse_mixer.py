"""SparseMixer: what it samples, and that its gradient is right in expectation.

A loss of an expert's weight q is L_e(q). Training one token follows the gradient of
`sum_e p_e L_e(p_e)`: one part through L, and one through the probability of the sample,
`sum_e L_e(p_e) dp_e`, which the estimators get from L' at parts of p_e.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import router_oracles as oracles

from moe_jax import config
from moe_jax.moe.routing import TRAIN, Override, Tokens
from moe_jax.moe.selectors import sparse_mixer, sparse_mixer_v2
from moe_jax.moe.selectors.sparse_mixer import SparseMixer, masked
from moe_jax.moe.selectors.sparse_mixer_v2 import SparseMixerV2

LOGITS = np.array([0.3, 1.1, 0.9, -0.4])
E = len(LOGITS)
C = np.array([1.5, -2.0, 0.7, 3.0])
BEST = 1


def tokens_of(count):
    features, valid = jnp.zeros((count, 1)), jnp.ones(count, bool)
    return Tokens(features=features, valid=valid, batch_shape=(1, count))


def run(options, logits, override=None, key=0):
    logits = jnp.asarray(logits)
    count = len(logits)
    tokens = Tokens(
        features=jnp.zeros((count, 1)),
        valid=jnp.ones(count, bool),
        batch_shape=(1, count),
    )
    v1 = isinstance(options, SparseMixer)
    select = sparse_mixer.select if v1 else sparse_mixer_v2.select
    return select(options, logits, tokens, {}, TRAIN, override, jax.random.key(key))


def softmax_gradient(z):
    """P (E,) and dp_e / dz (E, E)."""
    probs = oracles.score("softmax", z)
    return probs, np.diag(probs) - np.outer(probs, probs)


def estimate(options, slope, copies=40):
    """Expected gradient (E,) of each sample D, by enumeration: (E, E), and factors.

    Every expert is replayed for some tokens with one row of logits; the tokens of an
    expert differ in the factor that was drawn, and count with its probability.
    """
    chosen = np.repeat(np.arange(E), copies)
    replay = Override(
        expert_tk=jnp.asarray(chosen[:, None], jnp.int32),
        valid_tk=jnp.ones((len(chosen), 1), bool),
    )
    rows = np.tile(LOGITS, (len(chosen), 1))

    def weights(z):
        return run(options, z, replay).weight_tk[:, 0]

    q, back = jax.vjp(weights, jnp.asarray(rows))
    grad = np.asarray(back(jnp.asarray(slope(chosen, np.asarray(q))))[0])
    return chosen, np.asarray(q), grad


def mean_gradient(options, slope, chances):
    """Sum over D of p_D times the mean over the factors, with their probabilities."""
    chosen, q, grad = estimate(options, slope)
    probs = oracles.score("softmax", LOGITS)
    parts = np.zeros((E, E))
    for e in range(E):
        mine = chosen == e
        factors = (q[mine] / probs[e]).round(9)
        for factor, chance in ({1.0: 1.0} if e == BEST else chances).items():
            drawn = grad[mine][np.isclose(factors, factor)]
            assert len(drawn), "the factor was never drawn"
            np.testing.assert_allclose(drawn, drawn[:1].repeat(len(drawn), 0))
            parts[e] += probs[e] * chance * drawn[0]
        assert set(factors) <= set(np.round([*chances, 1.0], 9))
    return parts


V1 = (SparseMixer(eps=100.0), {1.0: 0.5, 0.5: 0.5})
V2 = (SparseMixerV2(top_k=1, eps=100.0), {1.0: 0.25, 1 / 3: 0.75})


def test_v1_is_unbiased_for_linear_losses(float64):
    """L_e(q) = c_e q: the gradient of `sum_e c_e p_e^2`."""
    parts = mean_gradient(V1[0], lambda chosen, q: C[chosen], V1[1])
    probs, jacobian = softmax_gradient(LOGITS)
    np.testing.assert_allclose(
        parts.sum(axis=0), 2 * (C * probs) @ jacobian, rtol=1e-12
    )


def test_v2_is_half_of_v1_for_linear_losses(float64):
    one = mean_gradient(V1[0], lambda chosen, q: C[chosen], V1[1])
    two = mean_gradient(V2[0], lambda chosen, q: C[chosen], V2[1])
    np.testing.assert_allclose(two, one / 2, rtol=1e-12)


def test_v1_is_unbiased_for_quadratic_losses_off_the_best(float64):
    """Midpoint: `L(p) = p L'(p / 2)` for `L = c q + b q^2`."""
    slope = lambda chosen, q: C[chosen] + 2 * (1 + chosen) * q
    parts = mean_gradient(V1[0], slope, V1[1])
    probs, jacobian = softmax_gradient(LOGITS)
    for e in (e for e in range(E) if e != BEST):
        loss = C[e] * probs[e] + (1 + e) * probs[e] ** 2
        through = probs[e] * (C[e] + 2 * (1 + e) * probs[e])
        np.testing.assert_allclose(parts[e], (loss + through) * jacobian[e], rtol=1e-12)


def test_v2_is_exact_for_cubic_losses_off_the_best(float64):
    """Heun's third order: `L(p) = p (L'(p) / 4 + 3 L'(p / 3) / 4)` for cubics."""
    slope = lambda chosen, q: C[chosen] + 2 * q - 3 * (2 + chosen) * q**2
    parts = mean_gradient(V2[0], slope, V2[1])
    probs, jacobian = softmax_gradient(LOGITS)
    for e in (e for e in range(E) if e != BEST):
        loss = C[e] * probs[e] + probs[e] ** 2 - (2 + e) * probs[e] ** 3
        np.testing.assert_allclose(parts[e], loss * jacobian[e], rtol=1e-12)


@pytest.mark.parametrize(("options", "chances"), [V1, V2], ids=["v1", "v2"])
def test_samples_follow_the_probabilities(options, chances):
    count = 20000
    routing = run(options, np.tile(LOGITS, (count, 1)).astype(np.float32))
    probs = oracles.score("softmax", LOGITS)
    experts = np.asarray(routing.expert_tk)[:, 0]
    share = np.bincount(experts, minlength=E) / count
    np.testing.assert_allclose(share, probs, atol=5 * 0.5 / count**0.5)
    factor = np.asarray(routing.weight_tk)[:, 0] / probs[experts]
    np.testing.assert_allclose(factor[experts == BEST], 1.0, rtol=1e-5)
    others = factor[experts != BEST]
    for value, chance in chances.items():
        found = np.isclose(others, value, rtol=1e-4).mean()
        np.testing.assert_allclose(found, chance, atol=5 * 0.5 / len(others) ** 0.5)
    again = run(options, np.tile(LOGITS, (count, 1)).astype(np.float32), key=1)
    assert (again.expert_tk != routing.expert_tk).any()


def test_the_second_expert_is_another_and_has_a_softmax_of_its_own():
    count = 20000
    options = SparseMixerV2(eps=100.0)
    routing = run(options, np.tile(LOGITS, (count, 1)).astype(np.float32))
    experts = np.asarray(routing.expert_tk)
    assert (experts[:, 0] != experts[:, 1]).all()
    first = experts[:, 0] == 0
    left = np.array([-np.inf, *LOGITS[1:]])
    probs = oracles.score("softmax", left)
    share = np.bincount(experts[first, 1], minlength=E) / first.sum()
    np.testing.assert_allclose(share, probs, atol=5 * 0.5 / first.sum() ** 0.5)
    # The best of those left is 1: its factor is always 1.
    second = first & (experts[:, 1] == BEST)
    weight = np.asarray(routing.weight_tk)[second, 1]
    np.testing.assert_allclose(weight, probs[BEST], rtol=1e-5)


def test_masks_by_hand():
    z = jnp.array([[2.0, 1.7, 1.0, -5.0], [-1.0, -1.1, -3.0, -1.0], [0.0, 0.0, -1, -2]])
    keep = lambda eps: np.asarray(masked(z, eps) == z).astype(int).tolist()
    # (2 - 1.7) / 2 = .15, (2 - 1) / 2 = .5, 7 / 5 = 1.4; .1 / 1.1 = .09, 2 / 3;
    # 1 / 1 and 2 / 2 for the last row.
    assert keep(0.04) == [[1, 0, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0]]
    assert keep(0.1) == [[1, 1, 0, 0], [1, 1, 0, 1], [1, 1, 0, 0]]
    assert keep(0.26) == [[1, 1, 1, 0], [1, 1, 0, 1], [1, 1, 0, 0]]
    assert keep(0.0) == [[1, 0, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0]]
    assert keep(50.0) == [[1] * 4] * 3
    assert np.all(np.isneginf(masked(z, 0.0)[0, 1:]))
    # Sampled experts are never masked ones.
    routing = run(SparseMixer(eps=0.1), np.tile(np.asarray(z[0]), (2000, 1)))
    assert set(np.unique(routing.expert_tk)) == {0, 1}


def test_a_key_is_needed_and_makes_the_sample():
    tokens = Tokens(
        features=jnp.zeros((2, 1)), valid=jnp.ones(2, bool), batch_shape=(1, 2)
    )
    for options, module in (
        (SparseMixer(), sparse_mixer),
        (SparseMixerV2(), sparse_mixer_v2),
    ):
        with pytest.raises(ValueError, match="samples in training: pass a key"):
            module.select(options, jnp.zeros((2, E)), tokens, {}, TRAIN, None, None)


def test_problems():
    found = list(SparseMixer(eps=-1).problems("config.s", config.Config()))
    assert found == ["config.s.eps=-1: must be at least 0"]
    found = list(SparseMixerV2(top_k=3).problems("config.s", config.Config()))
    assert found == ["config.s.top_k=3: must be 1 or 2"]
