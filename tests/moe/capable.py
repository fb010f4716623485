"""A layer with each selector that nothing is to be said against."""

from selecting import ASIDE

from moe_jax import config
from moe_jax.moe.balance import Balance
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.scorers.cosine import Cosine
from moe_jax.moe.scorers.no_scores import NoScores
from moe_jax.moe.selectors.diff_moe import DiffMoE
from moe_jax.moe.selectors.expert_choice import ExpertChoice
from moe_jax.moe.selectors.global_top_k import GlobalTopK
from moe_jax.moe.selectors.group_limited import GroupLimited
from moe_jax.moe.selectors.hashing import Hash
from moe_jax.moe.selectors.mixture_of_tokens import MixtureOfTokens
from moe_jax.moe.selectors.pro_moe import ProMoEChoice
from moe_jax.moe.selectors.soft_moe import SoftMoE

SMALL = {GroupLimited: dict(top_k=3, num_groups=4, top_groups=2)}
SMALL[MixtureOfTokens] = dict(group_size=2)
CONTINUOUS = (SoftMoE, MixtureOfTokens)
CHOOSING = (ExpertChoice, DiffMoE, ProMoEChoice)
NONCAUSAL = (*CHOOSING, GlobalTopK, SoftMoE)
SILENT = dict(load_balance_weight=0.0, z_weight=0.0)


def make(selector, **fields):
    """A layer with this selector that nothing is to be said against."""
    options = selector(**SMALL.get(selector, {}))
    weights = {}
    if selector in ASIDE:
        fields = {"scorer": Cosine(), **fields}
    if selector in (*CONTINUOUS, *CHOOSING):
        weights = dict(load_balance_weight=0.0)
    if selector is Hash:
        fields = {"scorer": NoScores(), **fields}
        weights = dict(SILENT)
    weights |= fields.pop("balance", {})
    return MoE(
        num_experts=8,
        experts=ExpertFeedForward(d_ff=8),
        selector=options,
        balance=Balance(**weights),
        **fields,
    )


def problems(moe):
    root = config.Config()
    root.train.batch_size = 32
    return list(config.all_problems(moe, "config.ff", root))
