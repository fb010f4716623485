"""Top-p: as many experts as it takes to reach a probability (Huang et al. 2024)."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax.scipy.special import entr

from moe_jax import config
from moe_jax.moe.routing import Array, Mode, Override, Routing, Tokens
from moe_jax.moe.selectors import common


@config.node
class TopP(config.SelectorConfig):
    """The smallest set of experts whose probability goes beyond p.

    An expert is taken while the ones before it hold at most p together, so that the
    one that crosses is in the set: 7 of 16 equal experts for p = 0.4.

    Attributes:
      p: probability to cross, in (0, 1]; 1 takes all up to `k_max`.
      k_max: experts per token at most.
      expected_k: experts per token on average; sizes buffers and counts of work.
      score: "softmax", or shares of "sigmoid" or "sqrt_softplus" scores.
      renormalize: divide the weights of the set by their sum; the paper does not.
      scale: factor on the weights.
      entropy_weight: of the mean entropy of the probabilities, which keeps the router
        from flattening them to get more experts (1e-4 in the paper).
    """

    p: float = 0.4
    k_max: int = 8
    expected_k: float = 2.0
    score: str = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    entropy_weight: float = 1e-4

    def experts_per_token(self, num_experts, sequence_length=0):
        return self.expected_k

    def problems(self, path, root):
        yield from common.least_problems(
            self, path, k_max=1, expected_k=1, entropy_weight=0
        )
        yield from common.score_problems(self, path)
        if not 0 < self.p <= 1:
            yield f"{path}.p={self.p}: must lie in (0, 1]"
        if self.expected_k > self.k_max >= 1:
            yield (
                f"{path}.expected_k={self.expected_k} is more than "
                f"{path}.k_max={self.k_max}"
            )
        if self.k_max == 1 and self.renormalize:
            yield (
                f"{path}.k_max=1 with renormalize=True makes every weight 1, so the "
                "router gets no gradient; set renormalize=False"
            )


def select(
    options: TopP,
    logits_te: Array,
    tokens: Tokens,
    router_state: Mapping[str, Array],
    mode: Mode,
    override: Override | None,
    key: Array | None,
) -> Routing:
    """Routes each valid token to the experts that hold p of its probability.

    A bias in the router state changes the order in which experts are taken, and
    not the probabilities that are added up. Of an override, another K is refused.

    Returns:
      Routing with K = `k_max`, best first; what is beyond the set is not valid.
    """
    common.refuse(override, "TopP", top_k="the number of experts follows from p")
    logits_te = common.adjusted(logits_te, override)
    _, probs_te = common.scores_and_probs(options.score, logits_te)
    choice_te = common.compared(probs_te, router_state, override)
    expert_tk, valid_tk = common.best(choice_te, options.k_max, override)
    if not common.replays(override) and options.p < 1:
        share_tk = common.gather(probs_te, expert_tk)
        before_tk = jnp.cumsum(share_tk, axis=-1) - share_tk
        # Not `before <= p`: a NaN has to reach the loss.
        valid_tk = valid_tk & ~(before_tk > options.p)
    return Routing(
        expert_tk=expert_tk,
        weight_tk=common.weights(options, logits_te, probs_te, expert_tk, valid_tk),
        valid_tk=valid_tk & tokens.valid[:, None],
        probs_te=probs_te,
        logits_te=logits_te,
        choice_te=choice_te,
        valid_t=tokens.valid,
        num_experts=logits_te.shape[-1],
        expected_k=options.expected_k,
    )


def losses(
    options: TopP, routing: Routing, tokens: Tokens, scorer: object
) -> dict[str, Array]:
    """The weighted mean over tokens of `-sum_e p log p`, in nats."""
    if not options.entropy_weight:
        return {}
    entropy_t = jnp.sum(entr(routing.probs_te), axis=-1)
    valid_t = routing.valid_t.astype(entropy_t.dtype)
    mean = jnp.sum(entropy_t * valid_t) / jnp.maximum(jnp.sum(valid_t), 1)
    return {"top_p_entropy_loss": options.entropy_weight * mean}
