"""One top-K over tokens and experts together (Expert Race, Yuan et al. 2025)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.routing import Array, Mode, Override, Routing, Tokens
from moe_jax.moe.selectors import common


@config.node
class GlobalTopK(config.SelectorConfig):
    """The K * N largest scores of a group of N tokens are served.

    The choice depends on the other tokens in evaluation too: the threshold that Expert
    Race learns for it is not here.

    Attributes:
      top_k: experts per token on average, K.
      k_max: experts per token at most.
      group: tokens that compete: those of the whole "batch" or of a "sequence".
      score: "softmax", "sigmoid" or "sqrt_softplus"; the weight is the score.
      scale: factor on the weights.
    """

    top_k: int = 2
    k_max: int = 4
    group: str = "batch"
    score: str = "sigmoid"
    scale: float = 1.0

    def problems(self, path, root):
        yield from common.least_problems(self, path, top_k=1)
        yield from common.group_problems(self, path)
        yield from common.score_problems(self, path)
        if self.k_max < self.top_k:
            yield (
                f"{path}.k_max={self.k_max} is less than {path}.top_k={self.top_k}: "
                "a token's bound below the mean"
            )


def select(
    options: GlobalTopK,
    logits_te: Array,
    tokens: Tokens,
    router_state: Mapping[str, Array],
    mode: Mode,
    override: Override | None,
    key: Array | None,
) -> Routing:
    """Routes the best pairs of a token and an expert, at most `k_max` a token.

    A bias in the router state takes part in the choice, not in the weights.
    Every override is honoured; another K must not exceed `k_max`.

    Returns:
      Routing with K = `k_max`, best first.
    """
    top_k = common.number(options, override)
    if top_k > options.k_max:
        raise ValueError(f"GlobalTopK: top_k={top_k} is more than {options.k_max=}")
    logits_te = common.adjusted(logits_te, override)
    scores_te, probs_te = common.scores_and_probs(options.score, logits_te)
    choice_te = common.compared(scores_te, router_state, override)
    groups = common.groups(options, tokens)
    expert_tk, valid_tk = common.best(choice_te, options.k_max, override)
    if not common.replays(override):
        best_tk = jax.lax.top_k(choice_te, options.k_max)[0]
        best_tk = jnp.where(tokens.valid[:, None], best_tk, -jnp.inf)
        best_gn = groups.split(best_tk).reshape(-1, options.k_max * groups.size)
        size_g = jnp.sum(groups.split(tokens.valid), axis=1, keepdims=True)
        won_gn = common.ranks(best_gn, axis=1) < top_k * size_g
        won_gnk = won_gn.reshape(-1, groups.size, options.k_max)
        valid_tk = valid_tk & groups.join(won_gnk)
    return Routing(
        expert_tk=expert_tk,
        weight_tk=common.gather(scores_te, expert_tk) * options.scale,
        valid_tk=valid_tk & tokens.valid[:, None],
        probs_te=probs_te,
        logits_te=logits_te,
        choice_te=choice_te,
        valid_t=tokens.valid,
        num_experts=logits_te.shape[-1],
        expected_k=float(top_k),
        group_t=groups.of_tokens(),
    )
