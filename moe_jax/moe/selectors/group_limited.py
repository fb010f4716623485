"""Group-limited top-k: the experts of a token lie in a few groups (DeepSeek V2, V3)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.routing import Array, Mode, Override, Routing, Tokens
from moe_jax.moe.selectors import common


@config.node
class GroupLimited(config.SelectorConfig):
    """Top-k among the experts of the best groups.

    V2 (DeepSeek-AI 2024a) is score="softmax", group_score="max"; V3 (2024b) is
    score="sigmoid", group_score="top2", renormalize=True, scale=2.5 and a bias in the
    router state. V2's code leaves out the scale where it normalises; here both apply.

    Attributes:
      top_k: experts per token, K.
      num_groups: groups of E / num_groups neighbouring experts each.
      top_groups: groups that a token's experts may lie in.
      score: "softmax", "sigmoid" or "sqrt_softplus".
      group_score: of a group: its "max", or the sum of its best two, "top2".
      renormalize: divide the weights by their sum (norm_topk_prob).
      scale: factor on the weights (routed_scaling_factor).
    """

    top_k: int = 8
    num_groups: int = 8
    top_groups: int = 4
    score: str = "sigmoid"
    group_score: str = "top2"
    renormalize: bool = True
    scale: float = 1.0

    def problems(self, path, root):
        yield from common.least_problems(
            self, path, top_k=1, num_groups=1, top_groups=1
        )
        yield from common.score_problems(self, path)
        yield from common.one_expert_problems(self, path)
        if self.group_score not in ("max", "top2"):
            yield f"{path}.group_score={self.group_score!r}: must be 'max' or 'top2'"
        if self.top_groups > self.num_groups:
            yield (
                f"{path}.top_groups={self.top_groups} is more than "
                f"{path}.num_groups={self.num_groups}"
            )

    def size_problems(self, path, num_experts):
        yield from config.SelectorConfig.size_problems(self, path, num_experts)
        if self.num_groups < 1:
            return
        size, rest = divmod(num_experts, self.num_groups)
        if rest:
            yield (
                f"{path}.num_groups={self.num_groups} does not divide the "
                f"{num_experts} experts; it takes one of {config.divisors(num_experts)}"
            )
        elif self.group_score == "top2" and size < 2:
            yield (
                f"{path}.group_score='top2' needs two experts in a group, "
                f"num_groups={self.num_groups} leaves {size}; set group_score='max'"
            )
        if not rest and self.top_groups * size < self.top_k <= num_experts:
            yield (
                f"{path}.top_k={self.top_k} is more than the {self.top_groups * size} "
                f"experts of top_groups={self.top_groups} groups"
            )


def limited(options: GroupLimited, choice_te: Array) -> Array:
    """The scores to compare, -inf outside of the best groups of each token, (T, E).

    V2's code puts 0 where this has -inf. What it then chooses there has weight 0, so
    the output is the same; with -inf nobody serves it.
    """
    num_tokens, num_experts = choice_te.shape
    shape = (num_tokens, options.num_groups, num_experts // options.num_groups)
    choice_tge = choice_te.reshape(shape)
    if options.group_score == "max":
        score_tg = jnp.max(choice_tge, axis=-1)
    else:
        two = jax.lax.top_k(choice_tge, 2)[0]
        # A pruned expert adds nothing, but a group of pruned ones stays out.
        score_tg = jnp.sum(jnp.where(jnp.isneginf(two), 0, two), axis=-1)
        score_tg = jnp.where(jnp.isneginf(two[..., 0]), -jnp.inf, score_tg)
    kept = jax.lax.top_k(score_tg, options.top_groups)[1]
    mask_tg = jnp.any(kept[..., None] == jnp.arange(options.num_groups), axis=1)
    return jnp.where(mask_tg[..., None], choice_tge, -jnp.inf).reshape(choice_te.shape)


def select(
    options: GroupLimited,
    logits_te: Array,
    tokens: Tokens,
    router_state: Mapping[str, Array],
    mode: Mode,
    override: Override | None,
    key: Array | None,
) -> Routing:
    """Routes each valid token to the K best experts of its best groups.

    A bias in the router state takes part in the groups' scores and in the
    choice, not in the weights. Every override is honoured; a replay may name experts
    of any group.
    """
    logits_te = common.adjusted(logits_te, override)
    scores_te, probs_te = common.scores_and_probs(options.score, logits_te)
    choice_te = limited(options, common.compared(scores_te, router_state, override))
    top_k = common.number(options, override)
    expert_tk, valid_tk = common.best(choice_te, top_k, override)
    replay = common.replays(override)
    served_tk = jnp.ones_like(valid_tk) if replay else valid_tk
    return Routing(
        expert_tk=expert_tk,
        weight_tk=common.weights(options, logits_te, scores_te, expert_tk, served_tk),
        valid_tk=valid_tk & tokens.valid[:, None],
        probs_te=probs_te,
        logits_te=logits_te,
        choice_te=choice_te,
        valid_t=tokens.valid,
        num_experts=logits_te.shape[-1],
        expected_k=float(expert_tk.shape[-1]),
    )
