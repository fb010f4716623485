"""Every selector: against slow oracles in double precision, and what all must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import router_oracles as oracles
from selecting import (
    ASIDE,
    BATCH,
    BIASED,
    CONTINUOUS,
    DISCRETE,
    HASH,
    VALID,
    E,
    T,
    everyone,
    gates,
    logits_for,
    route,
    state_of,
    tokens_of,
)

from moe_jax.moe.routing import EVAL, TRAIN, Mixing, Override
from moe_jax.moe.selectors import LOSSES, SELECTORS, STATES, WEIGHTS
from moe_jax.moe.selectors.diff_moe import DiffMoE
from moe_jax.moe.selectors.expert_choice import ExpertChoice
from moe_jax.moe.selectors.global_top_k import GlobalTopK
from moe_jax.moe.selectors.group_limited import GroupLimited
from moe_jax.moe.selectors.hashing import Hash
from moe_jax.moe.selectors.mixture_of_tokens import MixtureOfTokens
from moe_jax.moe.selectors.pro_moe import ProMoE, ProMoEChoice
from moe_jax.moe.selectors.soft_moe import SoftMoE
from moe_jax.moe.selectors.sparse_mixer import SparseMixer
from moe_jax.moe.selectors.sparse_mixer_v2 import SparseMixerV2
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.moe.selectors.top_p import TopP

ORACLES = {
    TopK: oracles.top_k,
    GroupLimited: oracles.group_limited,
    TopP: oracles.top_p,
    ExpertChoice: oracles.expert_choice,
    GlobalTopK: oracles.global_top_k,
    ProMoE: oracles.pro_moe,
    ProMoEChoice: oracles.pro_moe_choice,
    DiffMoE: oracles.diff_moe,
    SparseMixer: oracles.sparse_mixer,
    SparseMixerV2: oracles.sparse_mixer_v2,
}


def test_every_selector_has_a_case():
    cases = {type(options) for options in [*DISCRETE, HASH, *CONTINUOUS]}
    assert cases == set(SELECTORS)
    for extra in (LOSSES, STATES, WEIGHTS):
        assert set(extra) <= set(SELECTORS)


@pytest.mark.parametrize("seed", [0, 1])
@everyone(DISCRETE)
def test_choice_and_weights_match_the_oracle(float64, options, seed):
    rng, z = np.random.default_rng(seed + 10), logits_for(options, seed)
    bias = np.zeros(z.shape[1])
    if isinstance(options, BIASED) and seed:
        bias = rng.normal(size=z.shape[1]) * 0.3
    routing = route(options, z, VALID, {"bias": jnp.asarray(bias)})
    want = ORACLES[type(options)](options, z, VALID, BATCH, bias)
    weight, served = gates(routing)
    np.testing.assert_array_equal(served, want[1])
    np.testing.assert_allclose(weight, want[0], rtol=1e-12, atol=1e-15)
    assert 0 < served.sum() and routing.expert_tk.dtype == jnp.int32


@everyone(DISCRETE)
def test_gradients_match_differences_of_the_oracle(float64, options):
    z = logits_for(options, seed=2)
    bias = np.zeros(z.shape[1])
    factors = np.random.default_rng(3).normal(size=(T, E))
    oracle = ORACLES[type(options)]
    value = lambda z: (oracle(options, z, VALID, BATCH, bias)[0] * factors).sum()

    def program(z):
        routing = route(options, z, VALID)
        factor_tk = jnp.take_along_axis(jnp.asarray(factors), routing.expert_tk, 1)
        return jnp.sum(jnp.where(routing.valid_tk, routing.weight_tk * factor_tk, 0))

    grad = np.asarray(jax.grad(program)(jnp.asarray(z)))
    assert np.abs(grad).max() > 1e-3
    step = 1e-6
    for t, e in np.random.default_rng(4).integers(0, z.shape, (24, 2)):
        up, down = z.copy(), z.copy()
        up[t, e] += step
        down[t, e] -= step
        want = (value(up) - value(down)) / (2 * step)
        np.testing.assert_allclose(grad[t, e], want, rtol=1e-6, atol=1e-8)


@everyone(CONTINUOUS)
def test_mixtures_match_the_oracle(float64, options):
    valid = VALID & (np.arange(T) >= BATCH[1])  # The first row is padding.
    z = logits_for(options, seed=5)
    mixing = route(options, z, valid)
    made = {SoftMoE: oracles.soft_moe, MixtureOfTokens: oracles.mixture_of_tokens}
    merge, emit = made[type(options)](options, z, valid, BATCH)
    np.testing.assert_allclose(mixing.merge_tep, merge, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(mixing.emit_tep, emit, rtol=1e-12, atol=1e-15)
    for number, group in enumerate(oracles.groups_of_mixing(options, BATCH)):
        inside = np.asarray(mixing.groups.of_tokens()) == number
        np.testing.assert_array_equal(np.nonzero(inside)[0], np.sort(group))
        sums = np.asarray(mixing.merge_tep)[group].sum(axis=0)
        want = np.ones_like(sums) if valid[group].any() else np.zeros_like(sums)
        np.testing.assert_allclose(sums, want, rtol=1e-12)


def leaves_of_valid(routing, valid):
    """What a routing says of the valid tokens; the choice of the others is free."""
    rows = ["weight_tk", "valid_tk", "expert_tk", "probs_te"]
    if isinstance(routing, Mixing):
        rows = ["merge_tep", "emit_tep"]
    return {n: np.asarray(getattr(routing, n))[valid] for n in rows}


@everyone([*DISCRETE, HASH, *CONTINUOUS])
def test_padding_is_never_served_and_never_seen(options):
    z = logits_for(options, seed=7).astype(np.float32)
    dirty = np.where(VALID[:, None], z, 80.0)
    one, other = route(options, z, VALID), route(options, dirty, VALID)
    for field, leaf in leaves_of_valid(one, VALID).items():
        np.testing.assert_array_equal(leaf, leaves_of_valid(other, VALID)[field])
    if isinstance(one, Mixing):
        assert np.all(np.asarray(other.merge_tep)[~VALID] == 0)
        assert np.all(np.asarray(other.emit_tep)[~VALID] == 0)
    else:
        assert not np.asarray(other.valid_tk)[~VALID].any()


@everyone([*DISCRETE[1::2], HASH])
def test_the_same_on_a_mesh(options, axes_mesh):
    """The whole routing, draws included, though the tokens lie on eight devices."""
    batch, key = (8, 4), jax.random.key(5)
    z = logits_for(options, seed=8, count=32).astype(np.float32)
    valid = np.arange(32) % 7 != 2

    @jax.jit
    def run(z, valid):
        tokens = tokens_of(valid, batch)
        select = SELECTORS[type(options)]
        return select(options, z, tokens, {}, TRAIN, None, key)

    want = run(z, valid)
    mesh = axes_mesh(data=2, expert=2, context=2)
    spec = jax.sharding.PartitionSpec(("data", "expert", "context"))
    place = jax.sharding.NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        found = run(*jax.device_put((z, valid), place))
    exact = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
    jax.tree.map(exact, found, want)


@everyone([*DISCRETE, HASH])
def test_pruned_experts_serve_nobody(options):
    z = logits_for(options, seed=9).astype(np.float32)
    mask = np.arange(E) % 3 != 1
    state, rows = {}, np.ones(T, bool)
    if isinstance(options, BIASED):
        state = {"bias": jnp.where(mask, 0.0, 9.0)[: z.shape[1]]}
    if isinstance(options, ASIDE):
        rows = ~oracles.without_condition(BATCH)
    for mode in (TRAIN, EVAL):
        override, key = Override(expert_mask=jnp.asarray(mask)), jax.random.key(0)
        routing = route(options, z, None, state, mode, override, key)
        weight, served = gates(routing)
        assert served[:, mask].any() and not served[:, ~mask].any()
        assert np.isfinite(weight).all()
        assert np.all(np.asarray(routing.probs_te)[rows][:, ~mask] == 0)
    # What is left is what a layer without them would do.
    other = (GroupLimited, Hash, ExpertChoice, TopP, DiffMoE, *ASIDE)
    if not isinstance(options, other):
        given = tokens_of(), state_of(options), EVAL, None, None
        left = SELECTORS[type(options)](options, jnp.asarray(z[:, mask]), *given)
        one, two = np.zeros((T, E)), np.zeros((T, int(mask.sum())))
        for t, k in np.argwhere(np.asarray(left.valid_tk)):
            two[t, left.expert_tk[t, k]] = left.weight_tk[t, k]
        one[:, mask] = two
        np.testing.assert_allclose(weight, one, rtol=2e-6)


@everyone(DISCRETE)
def test_a_shift_is_a_shift_of_the_logits(options):
    z = logits_for(options, seed=10).astype(np.float32)
    shift = np.linspace(-1, 1, E).astype(np.float32)
    found = route(options, z, override=Override(logit_shift=jnp.asarray(shift)))
    want = route(options, z + shift[: z.shape[1]])
    jax.tree.map(np.testing.assert_array_equal, found, want)


@everyone([*DISCRETE, HASH])
@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=["train", "eval"])
def test_a_replay_of_itself_changes_nothing(options, mode):
    z, key = logits_for(options, seed=11).astype(np.float32), jax.random.key(1)
    routing = route(options, z, VALID, mode=mode, key=key)
    replay = Override(expert_tk=routing.expert_tk, valid_tk=routing.valid_tk)
    again = route(options, z, VALID, mode=mode, override=replay, key=key)
    for one, two in zip(gates(routing), gates(again), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


@everyone([*DISCRETE, HASH])
def test_a_replay_is_obeyed(options):
    """Whatever the experts: the choice is the caller's, padding stays out."""
    rng, z = np.random.default_rng(12), logits_for(options).astype(np.float32)
    top_k = 1 if isinstance(options, SparseMixer) else 2
    top_k = getattr(options, "top_k", top_k)
    experts = np.stack([rng.permutation(E)[:top_k] for _ in range(T)])
    keep = rng.random((T, top_k)) < 0.7
    replay = Override(
        expert_tk=jnp.asarray(experts, jnp.int32), valid_tk=jnp.asarray(keep)
    )
    routing = route(options, z, VALID, override=replay)
    np.testing.assert_array_equal(routing.expert_tk, experts)
    np.testing.assert_array_equal(routing.valid_tk, keep & VALID[:, None])
    assert np.isfinite(np.asarray(routing.weight_tk)).all()
    with pytest.raises(ValueError, match="needs its valid_tk"):
        route(options, z, override=Override(expert_tk=replay.expert_tk))


REFUSED = {
    TopP: ["top_k"],
    ExpertChoice: ["top_k"],
    ProMoEChoice: ["top_k"],
    DiffMoE: ["top_k"],
    SparseMixer: ["top_k"],
    Hash: ["logit_shift"],
    SoftMoE: ["top_k", "expert_tk"],
    MixtureOfTokens: ["top_k", "expert_tk", "logit_shift"],
}


@everyone([*DISCRETE, HASH, CONTINUOUS[0], CONTINUOUS[2]])
def test_what_an_override_cannot_ask_is_refused(options):
    z = logits_for(options).astype(np.float32)
    values = {
        "top_k": 2,
        "logit_shift": jnp.zeros(E),
        "expert_tk": jnp.zeros((T, 1), jnp.int32),
    }
    for field, value in values.items():
        override = Override(**{field: value})
        if field in REFUSED.get(type(options), []):
            with pytest.raises(ValueError, match=f"no override of {field}"):
                route(options, z, override=override)
        elif field == "top_k":
            if isinstance(options, SparseMixerV2 | GlobalTopK):
                with pytest.raises(ValueError, match="9"):
                    route(options, z, override=Override(top_k=9))
            routing = route(options, z, override=override)
            assert routing.expected_k == 2.0
            apart = oracles.without_condition(BATCH).sum()
            apart *= isinstance(options, ProMoE)
            if not getattr(options, "threshold_decay", 0):
                assert gates(routing)[1].sum() == 2 * T - apart


@everyone(DISCRETE)
def test_the_bias_has_no_gradient_and_moves_no_probability(options):
    z = jnp.asarray(logits_for(options, seed=13), jnp.float32)
    bias = jnp.linspace(-0.5, 0.5, z.shape[1])

    def total(bias):
        routing = route(options, z, state={"bias": bias})
        logits_te = routing.logits_te[:, : z.shape[1]]
        values = (routing.weight_tk, routing.probs_te, logits_te)
        return sum(
            jnp.sum(v * jnp.cos(jnp.arange(v.size).reshape(v.shape))) for v in values
        )

    np.testing.assert_array_equal(jax.grad(total)(bias), np.zeros(bias.shape))
    one, two = route(options, z), route(options, z, state={"bias": bias})
    np.testing.assert_array_equal(one.probs_te, two.probs_te)
    moved = (gates(one)[1] != gates(two)[1]).any()
    assert moved == isinstance(options, BIASED)
    # A constant shift of all biases is nothing, where its rounding decides nothing.
    if isinstance(options, BIASED) and not state_of(options):
        shifted = route(options, z, state={"bias": bias + 1.0})
        np.testing.assert_array_equal(gates(shifted)[1], gates(two)[1])


OTHERS = Override(expert_mask=np.arange(E) != 5)


@everyone([*DISCRETE, HASH])
def test_extreme_logits_give_finite_weights_and_gradients(options):
    """Also where every score of a token underflows; the probabilities sum to 1."""
    z = np.zeros((T, options.num_routed(E)), np.float32)
    z[0], z[1], z[2, 0], z[3, 0] = -500.0, 500.0, 500.0, -500.0
    z += np.random.default_rng(0).normal(size=z.shape).astype(np.float32)

    def total(z):
        routing = route(options, z, override=OTHERS)
        weight_tk = jnp.where(routing.valid_tk, routing.weight_tk, 0)
        return jnp.sum(weight_tk) + jnp.sum(routing.probs_te**2), routing

    grad, routing = jax.grad(total, has_aux=True)(jnp.asarray(z))
    assert np.isfinite(np.asarray(grad)).all()
    assert np.isfinite(gates(routing)[0]).all()
    probs = np.asarray(routing.probs_te)
    assert probs.min() >= 0 and probs.dtype == routing.weight_tk.dtype == np.float32
    np.testing.assert_allclose(probs.sum(axis=1), np.ones(T), rtol=1e-5)
    assert routing.expected_k > 0 and routing.num_experts == E


@everyone(DISCRETE)
def test_a_nan_is_not_hidden(options):
    if isinstance(options, ExpertChoice | GlobalTopK | ProMoEChoice | DiffMoE):
        pytest.skip("a token that loses is served by nobody; the losses show it")
    z = logits_for(options).astype(np.float32)
    z[4] = np.nan
    assert np.isnan(gates(route(options, z))[0]).any()
