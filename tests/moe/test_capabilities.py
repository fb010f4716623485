"""What combines with what: every refusal with its reason, and nothing else refused."""

import dataclasses
import pathlib

import numpy as np
import pytest
from capable import CHOOSING, CONTINUOUS, NONCAUSAL, make, problems
from selecting import ASIDE, logits_for, route

from moe_jax import config
from moe_jax.models.decoder_config import Decoder
from moe_jax.models.dit_config import DiT
from moe_jax.moe import capabilities
from moe_jax.moe.dispatch.bucket import Bucket
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.layer import MoE
from moe_jax.moe.noises import NOISES
from moe_jax.moe.noises.epsilon_greedy import EpsilonGreedy
from moe_jax.moe.noises.gaussian import Gaussian
from moe_jax.moe.noises.input_jitter import InputJitter
from moe_jax.moe.noises.learned_gaussian import LearnedGaussian
from moe_jax.moe.noises.sampled_experts import SampledExperts
from moe_jax.moe.routing import Mixing
from moe_jax.moe.scorers import SCORERS
from moe_jax.moe.scorers.cosine import Cosine
from moe_jax.moe.scorers.no_scores import NoScores
from moe_jax.moe.selectors import SELECTORS
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
from moe_jax.objectives.next_token import NextToken


def test_the_table_names_every_selector():
    assert set(capabilities.CAPABILITIES) == set(SELECTORS)


def test_the_methods_page_names_every_part():
    page = (pathlib.Path(__file__).parents[2] / "docs/methods.md").read_text("utf-8")
    for cls in (*SELECTORS, *SCORERS, *NOISES):
        assert f"{cls.__name__}(" in page, f"no config line of {cls.__name__}"


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: s.__name__)
def test_a_plain_layer_is_accepted(selector):
    assert problems(make(selector)) == []


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: s.__name__)
def test_scorers_and_noises_combine_as_the_table_says(selector):
    for scorer in SCORERS:
        refused = (scorer is NoScores) != (selector is Hash)
        refused |= selector in ASIDE and scorer is not Cosine
        assert bool(problems(make(selector, scorer=scorer()))) == refused
    no_choice = (*CONTINUOUS, Hash, *CHOOSING, SparseMixer, SparseMixerV2, ProMoE)
    refusing = {
        InputJitter: (Hash,),
        Gaussian: (*CONTINUOUS, Hash, *ASIDE),
        LearnedGaussian: (*CONTINUOUS, Hash, *ASIDE),
        EpsilonGreedy: no_choice,
        SampledExperts: no_choice,
    }
    assert set(refusing) == set(NOISES)
    for noise, selectors in refusing.items():
        found = problems(make(selector, noise=noise()))
        assert len(found) == (selector in selectors), found
        assert all("does not combine" in problem for problem in found)


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: s.__name__)
def test_losses_and_bias_combine_as_the_table_says(selector):
    loads = dict.fromkeys(
        ("load_balance_weight", "sequence_weight", "global_weight", "pooled_weight"),
        (*CONTINUOUS, Hash, *CHOOSING),
    )
    others = dict.fromkeys(("z_weight", "importance_weight", "entropy_weight"), (Hash,))
    samples = (SparseMixer, SparseMixerV2)
    bias = {"bias_rate": (*CONTINUOUS, Hash, *CHOOSING, *samples)}
    for name, selectors in {**loads, **others, **bias}.items():
        found = problems(make(selector, balance={name: 0.1}))
        assert len(found) == (selector in selectors), (name, found)
        assert all(f"balance.{name}=0.1" in problem for problem in found)
    noises = (
        []
        if selector in (*CONTINUOUS, Hash, *ASIDE)
        else [Gaussian(), LearnedGaussian()]
    )
    for noise in noises:
        found = problems(make(selector, noise=noise, balance={"load_weight": 0.1}))
        assert len(found) == (selector is not TopK)
    found = problems(make(selector, balance={"load_weight": 0.1}))
    assert len(found) == 1 and "load_weight=0.1" in found[0]
    assert ("needs noise" in found[0]) == (selector is TopK)


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: s.__name__)
def test_a_continuous_router_has_no_dispatch(selector):
    for dispatch in (
        Bucket(),
        DenseDispatch(),
        type(MoE().dispatch)(capacity_factor=2.0),
    ):
        found = problems(make(selector, dispatch=dispatch))
        assert len(found) == (selector in CONTINUOUS)
        assert all("slots that are always full" in problem for problem in found)


def test_what_is_in_no_table_is_refused():
    @config.node
    class Odd(config.SelectorConfig):
        pass

    found = problems(MoE(selector=Odd()))
    assert any("selector is a Odd, which is none of ['TopK'" in p for p in found)


def predicting(moe, objective=None):
    root = config.Config(objective=objective)
    root.data.sequence_length = 32
    model = Decoder(feed_forward=moe)
    return [p for p in model.problems("config.model", root) if "allow_noncausal" in p]


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: s.__name__)
def test_only_causal_routers_predict_the_next_token(selector):
    found = predicting(make(selector), NextToken())
    assert len(found) == (selector in NONCAUSAL)
    for problem in found:
        assert "depend" in problem or "mixture of all tokens" in problem
        assert selector.__name__ in problem
    assert predicting(make(selector)) == []
    moe = make(selector, allow_noncausal=True)
    assert predicting(moe, NextToken()) == []
    found = problems(moe)
    assert len(found) == (selector not in NONCAUSAL)
    assert all("allow_noncausal=True would be ignored" in problem for problem in found)


def test_tokens_mixed_across_positions_are_not_causal():
    moe = make(MixtureOfTokens)
    moe.selector.across = "positions"
    (problem,) = predicting(moe, NextToken())
    assert "later ones too" in problem
    moe.allow_noncausal = True
    assert predicting(moe, NextToken()) == [] == problems(moe)


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: s.__name__)
def test_the_table_is_right_about_causality(selector):
    """Whether earlier positions change where the last token of each row does."""
    options = make(selector).selector
    if selector is TopP:
        options.p = 0.9
    z = logits_for(options).astype(np.float32)
    one, changed = gates(route(options, z)), False
    for seed in range(4):
        other = z.reshape(4, 6, -1).copy()
        other[:, -1] = logits_for(options, seed, spread=9.0)[:4]
        two = gates(route(options, other.reshape(z.shape)))
        changed |= any(
            (a[:, :-1] != b[:, :-1]).any() for a, b in zip(one, two, strict=True)
        )
    assert changed == (selector in NONCAUSAL)


def gates(routing):
    rows = lambda a: np.asarray(a).reshape(4, 6, *a.shape[1:])
    if isinstance(routing, Mixing):
        return rows(routing.merge_tep), rows(routing.emit_tep)
    valid = rows(routing.valid_tk)
    return valid, np.where(valid, rows(routing.weight_tk), 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (TopK(score="tanh"), "score='tanh': must be one of ['softmax', 'sigmoid'"),
        (TopK(softmax="after", score="sigmoid"), "score='sigmoid' would be ignored"),
        (TopK(top_k=1, score="sigmoid"), "the router gets no gradient"),
        (TopK(top_k=9), "selector.top_k=9 is more than config.ff.num_experts=8"),
        (GroupLimited(top_k=9, top_groups=8), "selector.top_k=9 is more than"),
        (GroupLimited(top_k=1, num_groups=4), "the router gets no gradient"),
        (
            GroupLimited(num_groups=3, top_groups=1),
            "num_groups=3 does not divide",
        ),
        (GroupLimited(num_groups=8), "needs two experts in a group"),
        (GroupLimited(num_groups=4, top_groups=5), "top_groups=5 is more than"),
        (GroupLimited(top_k=5, num_groups=4, top_groups=2), "more than the 4 experts"),
        (GroupLimited(group_score="sum"), "must be 'max' or 'top2'"),
        (GroupLimited(num_groups=0), "num_groups=0: must be at least 1"),
        (TopP(p=0.0), "p=0.0: must lie in (0, 1]"),
        (TopP(k_max=9), "selector.k_max=9 is more than"),
        (TopP(k_max=0), "k_max=0: must be at least 1"),
        (TopP(expected_k=9.0), "is more than config.ff.selector.k_max=8"),
        (TopP(expected_k=1.0, k_max=1, renormalize=True), "gets no gradient"),
        (TopP(entropy_weight=-1.0), "entropy_weight=-1.0: must be at least 0"),
        (ExpertChoice(capacity_factor=0.0), "must be positive"),
        (ExpertChoice(capacity_factor=9.0), "more tokens than there are"),
        (ExpertChoice(group="row"), "must be 'sequence' or 'batch'"),
        (ExpertChoice(rounding="up"), "rounding='up': must be one of"),
        (ExpertChoice(score="identity"), "score='identity': must be one of"),
        (DiffMoE(eval_group="row"), "eval_group='row': must be 'sequence'"),
        (DiffMoE(capacity_factor=9.0), "more tokens than there are"),
        (DiffMoE(predictor_weight=0.0), "predictor_weight=0.0: must be positive"),
        (DiffMoE(decay=1.0), "decay=1.0: must lie in [0, 1)"),
        (ProMoE(top_k=8), "top_k=8 is more than the 7 routed experts"),
        (ProMoE(tau=0.0), "tau=0.0: must be positive"),
        (ProMoE(score="cosine"), "score='cosine': must be one of"),
        (ProMoEChoice(capacity_factor=8.0), "at most the 7 experts"),
        (ProMoEChoice(contrastive_weight=-1.0), "must not be negative"),
        (GlobalTopK(threshold_decay=1.0), "threshold_decay=1.0: must lie in [0, 1)"),
        (GlobalTopK(similarity_weight=-1.0), "similarity_weight=-1.0: must be at"),
        (GlobalTopK(k_max=1), "k_max=1 is less than"),
        (GlobalTopK(k_max=16), "selector.k_max=16 is more than"),
        (GlobalTopK(group="all"), "must be 'sequence' or 'batch'"),
        (Hash(salt=-1), "salt=-1: must lie in"),
        (Hash(top_k=0), "top_k=0: must be at least 1"),
        (SoftMoE(slots_per_expert=0), "slots_per_expert=0: must be at least 1"),
        (MixtureOfTokens(group_size=0), "group_size=0: must be at least 1"),
        (MixtureOfTokens(temperature=0.0), "temperature=0.0: must be positive"),
        (MixtureOfTokens(emit="sum"), "must be 'merge' or 'softmax'"),
        (MixtureOfTokens(across="time"), "must be 'rows' or 'positions'"),
        (MixtureOfTokens(group_size=5), "group_size=5 does not divide config.train"),
        (
            MixtureOfTokens(group_size=5, across="positions"),
            "does not divide config.data.sequence_length / context = 256",
        ),
    ],
    ids=str,
)
def test_problems_of_selectors(options, words):
    moe = dataclasses.replace(make(type(options)), selector=options)
    assert any(words in problem for problem in problems(moe)), problems(moe)


def test_groups_of_rows_fit_the_shards():
    moe = make(MixtureOfTokens)
    moe.selector.group_size = 8
    root = config.Config(mesh=config.MeshConfig(data=2, expert=4))
    root.train.batch_size, root.train.accumulation = 128, 2
    assert list(moe.selector.problems("config.s", root)) == []
    root.eval.samples = 3
    root.train.batch_size = 32
    found = list(moe.selector.problems("config.s", root))
    assert len(found) == 2 and "= 2: a group stays on one shard" in found[0]
    assert "config.eval.samples = 3" in found[1]
    assert Decoder(feed_forward=moe).rows_together() == 8
    moe.selector.across = "positions"
    assert Decoder(feed_forward=moe).rows_together() == 1


def of_model(model):
    """What is said of images without condition."""
    found = model.problems("config.model", config.Config())
    return [p for p in found if "images that are denoised without" in p]


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: s.__name__)
def test_an_expert_for_images_without_condition_needs_some(selector):
    refused = int(selector in ASIDE)
    moe = make(selector)
    assert of_model(DiT(feed_forward=moe)) == []
    vectors = dict(num_classes=0, condition_width=4)
    assert of_model(DiT(feed_forward=moe, **vectors)) == []
    never = DiT(feed_forward=moe, condition_dropout=0.0)
    for model in (Decoder(feed_forward=moe), never):
        found = of_model(model)
        assert len(found) == refused
        assert all("condition_dropout above 0" in problem for problem in found)


def test_raw_scores_take_no_factor():
    for selector in (GlobalTopK, ProMoE):
        moe = make(selector, balance=dict(bias_rate=0.1, bias_form="multiplicative"))
        moe.selector.score = "identity"
        (problem,) = problems(moe)
        assert "a factor raises positive scores only" in problem
        moe.selector.score = "sigmoid"
        assert problems(moe) == []
