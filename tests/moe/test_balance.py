"""Balance losses against numpy in double precision, one token after the other."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe import balance
from moe_jax.moe.balance import Balance
from moe_jax.moe.routing import Observation, Routing, counts_per_expert

B, S, E, K = 3, 8, 6, 2
T = B * S
NOISE = 0.4
WEIGHTS = {
    "load_balance_loss": "load_balance_weight",
    "sequence_balance_loss": "sequence_weight",
    "global_balance_loss": "global_weight",
    "device_balance_loss": "device_weight",
    "router_z_loss": "z_weight",
    "importance_loss": "importance_weight",
    "load_loss": "load_weight",
    "router_entropy_loss": "entropy_weight",
}


def make(seed=0, valid=None, logits=None):
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(T, E)) * 2
    logits = drawn if logits is None else logits
    valid_t = np.ones(T, bool) if valid is None else valid
    experts = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    slots = rng.random((T, K)) < 0.8
    noise = rng.normal(size=(T, E)) * NOISE
    logits = jnp.asarray(logits)
    return Routing(
        expert_tk=jnp.asarray(experts),
        weight_tk=jnp.ones((T, K)),
        valid_tk=jnp.asarray(slots & valid_t[:, None]),
        probs_te=jax.nn.softmax(logits),
        logits_te=logits,
        choice_te=logits + noise,
        valid_t=jnp.asarray(valid_t),
        num_experts=E,
        expected_k=float(K),
        noisy_te=logits + noise,
        noise_std=jnp.asarray(NOISE),
    )


def weights(**fields):
    """A balance with these losses and no other."""
    return Balance(**{"load_balance_weight": 0.0, "z_weight": 0.0, **fields})


@functools.partial(jax.jit, static_argnames="load_share")
def values(routing, state, load_share):
    """All losses with weight 1."""
    ones = dict.fromkeys(WEIGHTS.values(), 1.0)
    options = Balance(**ones, device_groups=3, load_share=load_share)
    return balance.losses(options, routing, (B, S), state)


def value(name, routing, state=None, load_share="assignments"):
    return values(routing, state or {}, load_share)[name]


@functools.partial(jax.jit, static_argnames=("what", "load_share"))
def gradients(routing, noise, what, load_share="assignments"):
    """Of all losses by the probabilities or by the logits, (T, E) each.

    The noise is added to the logits.
    """

    def of(x):
        moved = {"probs_te": x}
        if what == "logits":
            moved = {"logits_te": x, "probs_te": jax.nn.softmax(x)}
            moved["noisy_te"] = x + noise
        return values(dataclasses.replace(routing, **moved), {}, load_share)

    return jax.jacrev(of)(routing.probs_te if what == "probs" else routing.logits_te)


def probabilities(routing, t):
    powers = np.exp(np.asarray(routing.logits_te, np.float64)[t])
    return powers / powers.sum()


def tallies(routing, tokens, load_share):
    """What f counts and the summed probabilities of some tokens, and their number."""
    counts, probs, number = np.zeros(E), np.zeros(E), 0
    for t in tokens:
        if not routing.valid_t[t]:
            continue
        share = probabilities(routing, t)
        probs += share
        number += 1
        if load_share == "first":
            counts[np.argmax(share)] += 1
            continue
        for k in range(K):
            if routing.valid_tk[t, k]:
                counts[int(routing.expert_tk[t, k])] += 1
    return counts, probs, number


def switch_loss(counts, probs, tokens, load_share, counted_tokens=None):
    """`E * sum f P`, written out."""
    if load_share == "tokens":
        share = counts / (tokens if counted_tokens is None else counted_tokens)
    else:
        share = counts / counts.sum()
    return len(counts) * sum(share * probs / tokens)


def by_hand(routing, load_share="assignments"):
    """Every loss, one token after the other."""
    logits = np.asarray(routing.logits_te, np.float64)
    noisy = np.asarray(routing.noisy_te, np.float64)
    counts, probs, tokens = tallies(routing, range(T), load_share)
    batch = switch_loss(counts, probs, tokens, load_share)
    rows, z, entropy, stays = 0.0, 0.0, 0.0, np.zeros(E)
    for b in range(B):
        row = tallies(routing, range(b * S, (b + 1) * S), load_share)
        if row[2]:
            rows += row[2] * switch_loss(*row, load_share)
    for t in range(T):
        if not routing.valid_t[t]:
            continue
        share = probabilities(routing, t)
        z += np.log(np.exp(logits[t]).sum()) ** 2
        entropy -= (share * np.log(share)).sum()
        last = sorted(noisy[t])[-K]
        for e in range(E):
            missing = (last - logits[t, e]) / NOISE
            stays[e] += 0.5 * math.erfc(missing / math.sqrt(2))
    groups = lambda x: np.array([x[0] + x[1], x[2] + x[3], x[4] + x[5]])
    return {
        "load_balance_loss": batch,
        "sequence_balance_loss": rows / tokens,
        "global_balance_loss": batch,
        "device_balance_loss": switch_loss(
            groups(counts), groups(probs), tokens, load_share
        ),
        "router_z_loss": z / tokens,
        "importance_loss": (np.std(probs) / np.mean(probs)) ** 2,
        "load_loss": (np.std(stays) / np.mean(stays)) ** 2,
        "router_entropy_loss": entropy / tokens,
    }


# Half of each row but the last, which is nearly all padding.
SOME = (np.arange(T) % 2 == 0) & ((np.arange(T) < 2 * S) | (np.arange(T) == 2 * S))


@pytest.mark.parametrize("load_share", ["assignments", "tokens", "first"])
@pytest.mark.parametrize("valid", [None, SOME])
def test_losses_match_the_formulas(float64, valid, load_share):
    routing = make(valid=valid)
    want = by_hand(routing, load_share)
    assert want.keys() == WEIGHTS.keys()
    for name in WEIGHTS:
        found = value(name, routing, load_share=load_share)
        np.testing.assert_allclose(found, want[name], rtol=1e-12, err_msg=name)


def test_several_losses_are_weighted_and_the_others_left_out(float64):
    routing = make()
    want = by_hand(routing)
    some = weights(sequence_weight=0.25, z_weight=0.5, entropy_weight=2.0)
    found = balance.losses(some, routing, (B, S), {})
    assert set(found) == {
        "sequence_balance_loss",
        "router_z_loss",
        "router_entropy_loss",
    }
    for name, weight in zip(found, (0.25, 0.5, 2.0), strict=True):
        np.testing.assert_allclose(found[name], weight * want[name], rtol=1e-12)
    assert balance.losses(weights(), routing, (B, S), {}) == {}


def test_padding_changes_nothing(float64):
    """What stands in the padding's logits, noise and choices is never seen."""
    one = make(valid=SOME)
    dirty = lambda x: jnp.where(SOME[:, None], x, 50.0)
    other = make(valid=SOME, logits=dirty(one.logits_te))
    other = dataclasses.replace(other, noisy_te=dirty(one.noisy_te))
    found = gradients(other, jnp.zeros((T, E)), "logits")
    for name in WEIGHTS:
        np.testing.assert_allclose(value(name, one), value(name, other), rtol=1e-13)
        assert np.all(np.asarray(found[name])[~SOME] == 0), name
        assert name == "load_loss" or np.any(np.asarray(found[name])[SOME] != 0), name
    pools = [balance.statistics(weights(pooled_weight=1.0), r) for r in (one, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), *pools)


UNIFORM = np.arange(T * K).reshape(T, K) % E


def test_a_uniform_load_has_loss_one_or_k():
    """In any scope; Hugging Face's value is K."""
    routing = dataclasses.replace(
        make(logits=np.zeros((T, E))),
        expert_tk=jnp.asarray(UNIFORM, jnp.int32),
        valid_tk=jnp.ones((T, K), bool),
    )
    for name in list(WEIGHTS)[:4]:
        np.testing.assert_allclose(value(name, routing), 1.0, rtol=1e-6)
        per_token = value(name, routing, load_share="tokens")
        np.testing.assert_allclose(per_token, float(K), rtol=1e-6)
    np.testing.assert_allclose(value("importance_loss", routing), 0.0, atol=1e-6)
    most = value("router_entropy_loss", routing)
    np.testing.assert_allclose(most, math.log(E), rtol=1e-6)


def test_one_expert_for_all_has_loss_e():
    skewed = jnp.full((T, E), -40.0).at[:, 2].set(40.0)
    worst = dataclasses.replace(
        make(logits=skewed),
        expert_tk=jnp.full((T, K), 2, jnp.int32),
        valid_tk=jnp.ones((T, K), bool) & (jnp.arange(K) == 0),
    )
    for name in ("load_balance_loss", "sequence_balance_loss", "global_balance_loss"):
        np.testing.assert_allclose(value(name, worst), float(E), rtol=1e-6)
    # Three groups of experts, of which one does everything.
    np.testing.assert_allclose(value("device_balance_loss", worst), 3.0, rtol=1e-6)
    # The variance over the mean squared of (T, 0, ..., 0).
    np.testing.assert_allclose(value("importance_loss", worst), E - 1, rtol=1e-5)


def test_gradients_by_hand(float64):
    routing = make(valid=SOME)
    tokens = SOME.sum()
    noise = routing.noisy_te - routing.logits_te
    logits = np.asarray(routing.logits_te)
    total = np.exp(logits).sum(axis=1, keepdims=True)
    probs = np.exp(logits) / total
    found = gradients(routing, noise, "logits")["router_z_loss"]
    want = 2 * np.log(total) * probs / tokens * SOME[:, None]
    np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-15)
    # Through P only: dL/dp_te = E f_e / T.
    for share in ("assignments", "tokens", "first"):
        counts = tallies(routing, range(T), share)[0]
        f = counts / (tokens if share == "tokens" else counts.sum())
        want = E * f / tokens * SOME[:, None]
        found = gradients(routing, noise, "probs", share)
        for name in ("load_balance_loss", "global_balance_loss"):
            np.testing.assert_allclose(found[name], want, rtol=1e-12, atol=1e-15)
    # In a row the tokens of the row cancel: E f_be / T too, with the row's f.
    want = np.zeros((T, E))
    for b in range(B):
        row = np.arange(b * S, (b + 1) * S)
        counts = tallies(routing, row, "assignments")[0]
        want[row] = E * counts / counts.sum() / tokens * SOME[row, None]
    found = gradients(routing, noise, "probs")
    row_loss = found["sequence_balance_loss"]
    np.testing.assert_allclose(row_loss, want, rtol=1e-12, atol=1e-15)
    # d(-p log p)/dp = -log p - 1.
    want = -(np.log(probs) + 1) / tokens * SOME[:, None]
    entropy = found["router_entropy_loss"]
    np.testing.assert_allclose(entropy, want, rtol=1e-12, atol=1e-15)


def test_gradients_of_variations_match_differences(float64):
    """Of the losses by hand, in two directions through logits and noisy logits."""
    routing = make(valid=SOME)
    noise = routing.noisy_te - routing.logits_te
    found = gradients(routing, noise, "logits")
    for seed in range(2):
        step = np.random.default_rng(seed).normal(size=(T, E))
        ends = []
        for h in (1e-6, -1e-6):
            logits = routing.logits_te + h * step
            moved = dict(logits_te=logits, noisy_te=logits + noise)
            ends.append(by_hand(dataclasses.replace(routing, **moved)))
        for name in ("importance_loss", "load_loss"):
            want = (ends[0][name] - ends[1][name]) / 2e-6
            np.testing.assert_allclose(np.sum(found[name] * step), want, rtol=1e-6)


def test_losses_see_no_constant_shift_but_the_z_loss_does(float64):
    one, other = make(), make(logits=np.asarray(make().logits_te) + 3.0)
    for name in WEIGHTS:
        same = np.isclose(value(name, one), value(name, other), rtol=1e-9)
        assert same == (name != "router_z_loss"), name


def test_no_valid_token_gives_zero_and_no_nan():
    routing = make(valid=np.zeros(T, bool))
    found = gradients(routing, jnp.zeros((T, E)), "logits")
    for name in WEIGHTS:
        assert value(name, routing) == 0, name
        assert np.all(np.asarray(found[name]) == 0), name


def test_the_global_loss_takes_the_load_of_the_step(float64):
    """The f of three batches, P of the one at hand; the others' P never enters."""
    micros = [make(seed, valid) for seed, valid in ((0, None), (1, SOME), (2, None))]
    for share in ("assignments", "tokens", "first"):
        options = weights(global_weight=1.0, load_share=share)
        seen = [balance.observe(options, m) for m in micros]
        summed = jax.tree.map(lambda *x: sum(x), *seen)
        state = balance.with_step_load(options, {"bias": jnp.ones(E)}, summed)
        assert set(state) == {"bias", "step_load", "step_tokens"}
        parts = [tallies(m, range(T), share) for m in micros]
        counts, tokens = sum(p[0] for p in parts), sum(p[2] for p in parts)
        np.testing.assert_array_equal(state["step_load"], counts)
        for micro, (_, probs, number) in zip(micros, parts, strict=True):
            want = switch_loss(counts, probs, number, share, tokens)
            found = value("global_balance_loss", micro, state, load_share=share)
            np.testing.assert_allclose(found, want, rtol=1e-12)
    assert balance.with_step_load(Balance(), {}, summed) == {}


def test_pooled_over_layers_is_the_loss_of_the_joined_layers(float64):
    """Two layers of different tokens in one batch of twice the tokens."""
    layers = [make(0), make(1, SOME)]
    for share in ("assignments", "tokens", "first"):
        options = weights(pooled_weight=0.5, load_share=share)
        stacked = jax.tree.map(
            lambda *x: jnp.stack(x),
            *(balance.statistics(options, routing) for routing in layers),
        )
        aux = dataclasses.make_dataclass("Aux", ["losses", "statistics"])
        found = balance.pooled(options, aux({"other": jnp.ones(2)}, stacked))
        assert set(found.losses) == {"other", "pooled_balance_loss"}
        assert found.statistics == {}
        parts = [tallies(layer, range(T), share) for layer in layers]
        want = 0.5 * switch_loss(*(sum(x) for x in zip(*parts, strict=True)), share)
        np.testing.assert_allclose(found.losses["pooled_balance_loss"], want, 1e-12)
    assert balance.statistics(Balance(), layers[0]) == {}


def test_hugging_faces_formula(float64):
    """Its code in numpy: one-hots (T, K, E) of all layers joined, no division by K."""
    layers = [make(seed) for seed in (3, 4)]
    layers = [dataclasses.replace(r, valid_tk=jnp.ones((T, K), bool)) for r in layers]
    joined = np.concatenate([np.asarray(r.logits_te) for r in layers])
    probs = np.exp(joined) / np.exp(joined).sum(axis=1, keepdims=True)
    chosen = np.concatenate([np.asarray(r.expert_tk) for r in layers])
    tokens_per_expert = np.eye(E)[chosen].mean(axis=0)
    want = E * (tokens_per_expert * probs.mean(axis=0)[None]).sum()
    options = weights(pooled_weight=1.0, load_share="tokens")
    stacked = jax.tree.map(
        lambda *x: jnp.stack(x), *(balance.statistics(options, r) for r in layers)
    )
    aux = dataclasses.make_dataclass("Aux", ["losses", "statistics"])({}, stacked)
    found = balance.pooled(options, aux).losses["pooled_balance_loss"]
    np.testing.assert_allclose(found, want, rtol=1e-12)


def test_deepseeks_formulas(float64):
    """DeepSeekMoE eq. 12-17: f with E / (K T), device f a mean, device P a sum."""
    routing = dataclasses.replace(make(), valid_tk=jnp.ones((T, K), bool))
    counts, probs, _ = tallies(routing, range(T), "assignments")
    f, p = counts * E / (K * T), probs / T
    np.testing.assert_allclose(value("load_balance_loss", routing), f @ p, rtol=1e-12)
    device_f, device_p = f.reshape(3, 2).mean(axis=1), p.reshape(3, 2).sum(axis=1)
    found = value("device_balance_loss", routing)
    np.testing.assert_allclose(found, device_f @ device_p, rtol=1e-12)
    # V3 per sequence: f_b with E / (K S), P_b a mean, then the mean over rows.
    rows = [tallies(routing, range(b * S, b * S + S), "assignments") for b in range(B)]
    want = np.mean([(c * E / (K * S)) @ (p / S) for c, p, _ in rows])
    found = value("sequence_balance_loss", routing)
    np.testing.assert_allclose(found, want, rtol=1e-12)


def test_what_is_observed():
    routing = make(valid=SOME)
    counts, _, tokens = tallies(routing, range(T), "assignments")
    seen = balance.observe(Balance(), routing)
    assert isinstance(seen, Observation) and set(seen.sums) == {"assignments"}
    np.testing.assert_array_equal(seen.sums["assignments"], counts)
    np.testing.assert_array_equal(counts_per_expert(routing), counts)
    assert seen.count == tokens == SOME.sum()
    first = weights(global_weight=1.0, load_share="first")
    seen = balance.observe(first, routing)
    np.testing.assert_array_equal(
        seen.sums["load"], tallies(routing, range(T), "first")[0]
    )
    np.testing.assert_array_equal(seen.sums["assignments"], counts)
    assert all(x.dtype == jnp.int32 for x in jax.tree.leaves(seen))
