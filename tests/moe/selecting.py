"""Every selector as the tests run it: its cases, tokens, logits, and its gates."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import router_oracles as oracles

from moe_jax.moe.routing import EVAL, Condition, Tokens
from moe_jax.moe.selectors import SELECTORS, STATES
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

BATCH, E = (4, 6), 8
T = BATCH[0] * BATCH[1]
VALID = np.arange(T) % 5 != 3
DISCRETE = [
    TopK(),
    TopK(top_k=3, score="sigmoid", scale=2.5),
    TopK(top_k=1, score="sqrt_softplus", renormalize=False),
    TopK(top_k=4, softmax="after", scale=0.5),
    GroupLimited(top_k=3, num_groups=4, top_groups=2, scale=2.5),
    GroupLimited(
        top_k=3,
        num_groups=4,
        top_groups=2,
        score="softmax",
        group_score="max",
        renormalize=False,
        scale=16.0,
    ),
    TopP(p=0.5, k_max=8),
    TopP(p=0.35, k_max=4, score="sigmoid", renormalize=True, scale=2.0),
    ExpertChoice(),
    ExpertChoice(capacity_factor=1.1, group="batch", score="sigmoid", scale=3.0),
    GlobalTopK(),
    GlobalTopK(top_k=1, k_max=3, group="sequence", score="softmax", scale=2.0),
    ExpertChoice(rounding="down", capacity_factor=3.9),
    GlobalTopK(score="identity", k_max=5),
    GlobalTopK(threshold_decay=0.9, k_max=5),
    ProMoE(),
    ProMoE(top_k=3, score="sigmoid"),
    ProMoE(top_k=2, score="softmax"),
    ProMoEChoice(capacity_factor=2.5),
    ProMoEChoice(score="softmax"),
    DiffMoE(),
    DiffMoE(eval_group="batch"),
    SparseMixer(),
    SparseMixerV2(eps=0.4),
    SparseMixerV2(top_k=1, eps=0.3),
]
HASH = Hash(top_k=2, salt=3)
CONTINUOUS = [
    SoftMoE(),
    SoftMoE(slots_per_expert=2),
    MixtureOfTokens(group_size=2),
    MixtureOfTokens(group_size=3, across="positions", temperature=0.5, emit="softmax"),
]
# Those in which a bias of the router state takes part.
BIASED = (TopK, GroupLimited, TopP, GlobalTopK, ProMoE)
# Those whose last expert serves images without condition, and no others.
ASIDE = (ProMoE, ProMoEChoice)


def name(options):
    changed = [
        f"{f.name}={getattr(options, f.name)}"
        for f in dataclasses.fields(options)
        if getattr(options, f.name) != getattr(type(options)(), f.name)
    ]
    return f"{type(options).__name__}({','.join(changed)})"


def everyone(cases):
    return pytest.mark.parametrize("options", cases, ids=name)


def tokens_of(valid=None, batch=BATCH):
    count = batch[0] * batch[1]
    zeros = jnp.zeros((count, 1))
    return Tokens(
        features=zeros,
        valid=jnp.ones(count, bool) if valid is None else jnp.asarray(valid),
        batch_shape=batch,
        token_ids=jnp.arange(count, dtype=jnp.int32) % 7,
        condition=Condition(
            time=zeros[:, 0],
            time_embedding=zeros,
            embedding=zeros,
            none=jnp.asarray(oracles.without_condition(batch)),
        ),
        own=jnp.asarray(oracles.predictions(count, E)),
    )


def logits_for(options, seed=0, spread=2.0, count=T):
    width = options.num_routed(E) * getattr(options, "slots_per_expert", 1)
    return np.random.default_rng(seed).normal(size=(count, width)) * spread + 0.5


def route(options, logits, valid=None, state=None, mode=EVAL, override=None, key=None):
    logits, tokens = jnp.asarray(logits), tokens_of(valid)
    run = SELECTORS[type(options)]
    state = state_of(options) | (state or {})
    return run(options, logits, tokens, state, mode, override, key)


def state_of(options):
    """What a selector has learned without gradients."""
    state = STATES.get(type(options))
    learned = {} if state is None else state.init(options, E)
    return {name: jnp.asarray(oracles.thresholds(options)) for name in learned}


def gates(routing):
    """Weights (T, E) of a routing and what it serves, by scattering."""
    weight, served = np.zeros((T, E)), np.zeros((T, E), bool)
    for t, k in np.argwhere(np.asarray(routing.valid_tk)):
        e = int(routing.expert_tk[t, k])
        assert not served[t, e], "an expert twice"
        served[t, e], weight[t, e] = True, routing.weight_tk[t, k]
    return weight, served
