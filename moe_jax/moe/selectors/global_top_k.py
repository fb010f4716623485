"""One top-K over tokens and experts together (Expert Race, Yuan et al. 2025)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.routing import Array, Groups, Mode, Override, Routing, Tokens
from moe_jax.moe.selectors import common, threshold


@config.node
class GlobalTopK(config.SelectorConfig):
    """The K * N largest scores of a group of N tokens are served.

    Without `threshold_decay` the choice depends on the other tokens in evaluation too.
    Expert Race is `GlobalTopK(score="identity", k_max=E, threshold_decay=0.95,
    similarity_weight=1e-4)`, E the number of experts.

    Attributes:
      top_k: experts per token on average, K.
      k_max: experts per token at most.
      group: tokens that compete: those of the whole "batch" or of a "sequence".
      score: "softmax", "sigmoid", "sqrt_softplus", or "identity": the logit itself; the
        weight is the score.
      scale: factor on the weights.
      threshold_decay: of the average of the K * N-th score that training keeps; in
        evaluation all scores from there on are served. 0: tokens compete there too.
      similarity_weight: of the router similarity loss; 0: none.
    """

    top_k: int = 2
    k_max: int = 4
    group: str = "batch"
    score: str = "sigmoid"
    scale: float = 1.0
    threshold_decay: float = 0.0
    similarity_weight: float = 0.0

    def problems(self, path, root):
        yield from common.least_problems(self, path, top_k=1, similarity_weight=0)
        yield from common.group_problems(self, path)
        yield from common.score_problems(self, path, raw=True)
        if not 0 <= self.threshold_decay < 1:
            yield f"{path}.threshold_decay={self.threshold_decay}: must lie in [0, 1)"
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

    A bias in the router state takes part in the choice, not in the weights, and in what
    a threshold is compared with. Every override is honoured; another K must not exceed
    `k_max`, and says nothing where there is a threshold.

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
        if options.threshold_decay and not mode.train:
            won_tk = best_tk >= router_state[threshold.STATE]
        else:
            won_tk = _won(top_k, best_tk, tokens, groups)
        valid_tk = valid_tk & won_tk
    weight_tk = common.gather(scores_te, expert_tk) * options.scale
    return Routing(
        expert_tk=expert_tk,
        # A logit of a pruned expert is -inf.
        weight_tk=jnp.where(jnp.isneginf(weight_tk), 0, weight_tk),
        valid_tk=valid_tk & tokens.valid[:, None],
        probs_te=probs_te,
        logits_te=logits_te,
        choice_te=choice_te,
        valid_t=tokens.valid,
        num_experts=logits_te.shape[-1],
        expected_k=float(top_k),
        group_t=groups.of_tokens(),
    )


def _won(top_k: int, best_tk: Array, tokens: Tokens, groups: Groups) -> Array:
    """(T, k_max) bool: what is among the `top_k` * N largest of its group."""
    width = best_tk.shape[-1]
    best_tk = jnp.where(tokens.valid[:, None], best_tk, -jnp.inf)
    best_gn = groups.split(best_tk).reshape(-1, width * groups.size)
    size_g = jnp.sum(groups.split(tokens.valid), axis=1, keepdims=True)
    won_gn = common.ranks(best_gn, axis=1) < top_k * size_g
    return groups.join(won_gn.reshape(-1, groups.size, width))


def losses(
    options: GlobalTopK, routing: Routing, tokens: Tokens, scorer: object
) -> dict[str, Array]:
    """The weighted router similarity loss; see `similarity`."""
    if not options.similarity_weight:
        return {}
    value = similarity(routing)
    return {"router_similarity_loss": options.similarity_weight * value}


def similarity(routing: Routing) -> Array:
    """`sum_ij W_ij (P^T P)_ij / T`, (): experts chosen together should differ.

    P (T, E) are the probabilities, M (T, E) who is served. W weighs by `M^T M` over its
    mean, of the diagonal and of all else; it has no gradient. The value is 1 where
    probabilities are uniform and the load is balanced.
    """
    exact = dict(precision=jax.lax.Precision.HIGHEST)
    probs_te = jnp.where(routing.valid_t[:, None], routing.probs_te, 0)
    served_te = common.served(routing).astype(probs_te.dtype)
    alike_ee = jnp.einsum("ti,tj->ij", probs_te, probs_te, **exact)
    both_ee = jnp.einsum("ti,tj->ij", served_te, served_te, **exact)
    num_experts = routing.num_experts
    same_ee = jnp.eye(num_experts, dtype=bool)
    mean = lambda x_ee, n: jnp.maximum(jnp.sum(x_ee) / max(n, 1), 1 / num_experts**2)
    own = mean(jnp.where(same_ee, both_ee, 0), num_experts)
    other = mean(jnp.where(same_ee, 0, both_ee), num_experts * (num_experts - 1))
    weight_ee = both_ee / jnp.where(same_ee, own, other)
    tokens = jnp.maximum(jnp.sum(routing.valid_t), 1).astype(probs_te.dtype)
    return jnp.sum(weight_ee * alike_ee) / tokens


class State:
    """The threshold of a layer, {"threshold": ()}, or nothing."""

    @staticmethod
    def init(options: GlobalTopK, num_experts: int) -> dict[str, Array]:
        """Zero."""
        return threshold.init(()) if options.threshold_decay else {}

    @staticmethod
    def observe(
        options: GlobalTopK, routing: Routing, tokens: Tokens
    ) -> dict[str, Array]:
        """The smallest value that was served, summed over groups with tokens."""
        if not options.threshold_decay:
            return {}
        groups = common.groups(options, tokens)
        value_tk = common.gather(routing.choice_te, routing.expert_tk)
        value_tk = jnp.where(routing.valid_tk, value_tk, jnp.inf)
        least_g = jnp.min(groups.split(jnp.min(value_tk, axis=1)), axis=1)
        found_g = jnp.isfinite(least_g)
        return threshold.seen(
            jnp.sum(jnp.where(found_g, least_g, 0)), jnp.sum(found_g, dtype=jnp.int32)
        )

    @staticmethod
    def update(options: GlobalTopK, state, sums) -> dict[str, Array]:
        """The running average."""
        if not options.threshold_decay:
            return {}
        return threshold.update(options.threshold_decay, state, sums)
