"""What combines with what in a MoE layer: one table, and the rules that follow.

A combination that means nothing, or an option that would be ignored, is refused with
its reason. A selector that is not in the table is taken to combine with everything.
"""

import dataclasses
from collections.abc import Callable, Iterator

from moe_jax import config
from moe_jax.moe import noises, scorers, selectors
from moe_jax.moe.balance.options import LOAD_BALANCE
from moe_jax.moe.noises.epsilon_greedy import EpsilonGreedy
from moe_jax.moe.noises.input_jitter import InputJitter
from moe_jax.moe.noises.sampled_experts import SampledExperts
from moe_jax.moe.scorers.cosine import Cosine
from moe_jax.moe.scorers.no_scores import NoScores
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Why something does not combine with a selector; "" where it does.

    Attributes:
      continuous: it mixes tokens into slots: no dispatch takes part.
      scores: why it takes no scorer, no noise, and no loss.
      bias: why a bias of the router state cannot act.
      load_balance: why the load-balance losses have nothing to move.
      load: why the load loss of noisy top-k is not defined.
      logit_noise: why it takes no noise on logits.
      explore: why it takes no random choice.
      not_causal: why a token's output depends on later ones, by its options.
      cosines: why it takes no scorer but `Cosine`.
      unconditional: why the model must know images without condition.
    """

    continuous: bool = False
    scores: str = ""
    bias: str = ""
    load_balance: str = ""
    load: str = "it is about the K-th largest noisy logit of plain top-k"
    logit_noise: str = ""
    explore: str = ""
    not_causal: Callable[[config.SelectorConfig], str] = lambda options: ""
    cosines: str = ""
    unconditional: str = ""


# Noises that replace the choice.
_RANDOM = (EpsilonGreedy, SampledExperts)

_MIXES = "every token goes to every expert"
_CONTINUOUS = dict(
    continuous=True,
    bias=f"{_MIXES}, so there is no choice to move",
    load_balance=_MIXES,
    logit_noise="it chooses nothing that noise could explore",
    explore="it chooses nothing",
)
_SAMPLES = dict(
    bias="its gradient is right only where experts are drawn from their probabilities",
    explore="its gradient is right only where experts are drawn from their "
    "probabilities",
)


_TAKES = "whether an expert takes a token depends on later ones"
_CHOOSE = dict(
    bias="it would shift all tokens of an expert alike",
    load_balance="every expert takes the same number of tokens",
    explore="it would give experts more tokens than they take",
)
_PROTOTYPES = dict(
    cosines="its contrastive loss moves prototypes, which only Cosine has",
    unconditional="the last expert serves images that are denoised without condition",
    logit_noise="its weights are the cosines themselves",
    explore="a random expert might be the last one, which is not for all tokens",
)


def _always(reason: str) -> Callable[[config.SelectorConfig], str]:
    return lambda options: reason


def _across_positions(options: MixtureOfTokens) -> str:
    if options.across == "rows":
        return ""
    return "a token is mixed with its neighbours in the row, later ones too"


CAPABILITIES: dict[type[config.SelectorConfig], Facts] = {
    TopK: Facts(load=""),
    GroupLimited: Facts(),
    TopP: Facts(),
    Hash: Facts(
        scores="the token id alone decides",
        bias="the token id alone decides",
        explore="the token id alone decides",
    ),
    ExpertChoice: Facts(not_causal=_always(_TAKES), **_CHOOSE),
    DiffMoE: Facts(not_causal=_always(_TAKES), **_CHOOSE),
    ProMoE: Facts(**_PROTOTYPES),
    ProMoEChoice: Facts(not_causal=_always(_TAKES), **_CHOOSE | _PROTOTYPES),
    SparseMixer: Facts(**_SAMPLES),
    SparseMixerV2: Facts(**_SAMPLES),
    GlobalTopK: Facts(
        not_causal=_always("how many experts a token gets depends on later ones")
    ),
    SoftMoE: Facts(
        not_causal=_always("every slot is a mixture of all tokens of the row"),
        **_CONTINUOUS,
    ),
    MixtureOfTokens: Facts(not_causal=_across_positions, **_CONTINUOUS),
}


def facts(selector: config.SelectorConfig) -> Facts:
    """The table's entry for a selector's config."""
    return CAPABILITIES.get(type(selector), Facts(load=""))


def not_causal(selector: config.SelectorConfig) -> str:
    """Why a token's output depends on later tokens; "" where it does not."""
    return facts(selector).not_causal(selector)


def _name(options: config.Node) -> str:
    return type(options).__name__


def problems(moe, path: str) -> Iterator[str]:
    """The combinations of a MoE config's parts that mean nothing."""
    yield from _unlisted(moe, path)
    yield from _scoring(moe, path)
    yield from _noise(moe, path)
    yield from _losses(moe, path)
    selector = _name(moe.selector)
    if facts(moe.selector).continuous and moe.dispatch != type(moe)().dispatch:
        yield (
            f"{path}.dispatch={_name(moe.dispatch)} would be ignored: {selector} mixes "
            "tokens into slots that are always full; leave it unset"
        )
    if moe.allow_noncausal and not not_causal(moe.selector):
        yield (
            f"{path}.allow_noncausal=True would be ignored: {selector} does not look "
            "at later tokens; set it to False"
        )


def _unlisted(moe, path) -> Iterator[str]:
    for name, known in (("scorer", scorers.SCORERS), ("selector", selectors.SELECTORS)):
        options = getattr(moe, name)
        if type(options) not in known:
            yield (
                f"{path}.{name} is a {_name(options)}, which is none of "
                f"{[cls.__name__ for cls in known]}"
            )
    if moe.noise is not None and type(moe.noise) not in noises.NOISES:
        yield f"{path}.noise is a {_name(moe.noise)}, which is not in NOISES"


def _scoring(moe, path) -> Iterator[str]:
    selector, silent = _name(moe.selector), isinstance(moe.scorer, NoScores)
    reason = facts(moe.selector).scores
    if reason and not silent:
        yield (
            f"{path}.scorer={_name(moe.scorer)} would be ignored by {selector}: "
            f"{reason}; set scorer=NoScores()"
        )
    if silent and not reason:
        yield (
            f"{path}.scorer=NoScores: {selector} chooses by scores; set another scorer"
        )
    reason = facts(moe.selector).cosines
    if reason and not silent and not isinstance(moe.scorer, Cosine):
        yield (
            f"{path}.scorer={_name(moe.scorer)} with {selector}: {reason}; set "
            "scorer=Cosine(proj_dim=0, temperature=1.0, learned=False)"
        )


def unconditional_problems(moe, path: str, has_unconditional: bool) -> Iterator[str]:
    """Of a selector that treats images without condition apart.

    Args:
      moe: the config of the layer.
      path: of it.
      has_unconditional: whether the model denoises images without condition.
    """
    reason = facts(moe.selector).unconditional
    if reason and not has_unconditional:
        yield (
            f"{path}.selector={_name(moe.selector)}: {reason}, and this model has "
            "none; choose another selector, or a DiT with num_classes or "
            "condition_width, and condition_dropout above 0"
        )


def _noise(moe, path) -> Iterator[str]:
    if moe.noise is None:
        return
    found = facts(moe.selector)
    reason = found.scores
    if isinstance(moe.noise, _RANDOM):
        reason = found.explore
    elif not isinstance(moe.noise, InputJitter):
        reason = reason or found.logit_noise
    if reason:
        yield (
            f"{path}.noise={_name(moe.noise)} does not combine with "
            f"{_name(moe.selector)}: {reason}; leave it unset"
        )


def _losses(moe, path) -> Iterator[str]:
    found, options = facts(moe.selector), moe.balance
    others = ("z_weight", "importance_weight", "entropy_weight")
    reasons = {
        "bias_rate": found.bias,
        "load_weight": found.scores or found.load,
        **dict.fromkeys(LOAD_BALANCE, found.scores or found.load_balance),
        **dict.fromkeys(others, found.scores),
    }
    for name, reason in reasons.items():
        if getattr(options, name) and reason:
            yield (
                f"{path}.balance.{name}={getattr(options, name)} means nothing with "
                f"{_name(moe.selector)}: {reason}; set it to 0"
            )
    if options.load_weight and not found.load and not _gaussian(moe.noise):
        yield (
            f"{path}.balance.load_weight={options.load_weight} needs noise on the "
            f"logits: set {path}.noise to Gaussian or LearnedGaussian, or it to 0"
        )


def _gaussian(noise: config.NoiseConfig | None) -> bool:
    return noise is not None and not isinstance(noise, (InputJitter, *_RANDOM))
