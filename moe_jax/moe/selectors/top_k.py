"""Token choice: each token takes the K experts with the highest scores."""

from collections.abc import Mapping

import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.routing import Array, Mode, Override, Routing, Tokens
from moe_jax.moe.selectors import common


@config.node
class TopK(config.SelectorConfig):
    """The K experts with the highest scores.

    Attributes:
      top_k: experts per token, K.
      score: "softmax", "sigmoid" (DeepSeek V3) or "sqrt_softplus" of the logits.
      softmax: "before" the choice (Shazeer 2017, Switch, OLMoE): weights are
        scores among all experts; "after" (GPT-OSS): a softmax over the chosen ones.
      renormalize: with "before", divide the weights by their sum (Mixtral).
      scale: factor on the weights (DeepSeek's routed_scaling_factor).
    """

    top_k: int = 2
    score: str = "softmax"
    softmax: str = "before"
    renormalize: bool = True
    scale: float = 1.0

    def problems(self, path, root):
        yield from common.least_problems(self, path, top_k=1)
        yield from common.score_problems(self, path)
        if self.softmax not in ("before", "after"):
            yield f"{path}.softmax={self.softmax!r}: must be 'before' or 'after'"
        if self.softmax == "after" and self.score != "softmax":
            yield (
                f"{path}.score={self.score!r} would be ignored: softmax='after' weighs "
                "the chosen logits by a softmax; set softmax='before'"
            )
        if self.top_k == 1 and (self.softmax == "after" or self.renormalize):
            yield (
                f"{path}.top_k=1 with softmax='after' or renormalize=True makes every "
                "weight 1, so the router gets no gradient; set softmax='before' and "
                "renormalize=False"
            )


def select(
    options: TopK,
    logits_te: Array,
    tokens: Tokens,
    router_state: Mapping[str, Array],
    mode: Mode,
    override: Override | None,
    key: Array | None,
) -> Routing:
    """Routes each valid token to its K best experts.

    A bias in the router state (loss-free balancing) moves the choice only; the
    weights come from the scores without it.

    Args:
      options: the config.
      logits_te: (T, E).
      tokens: for their validity.
      router_state: see `routing.biased`.
      mode: training and evaluation do not differ.
      override: pruned experts, shifted logits, another K, or a routing to replay.
      key: not used; the choice is deterministic.

    Returns:
      Routing with K = `top_k`.
    """
    logits_te = common.adjusted(logits_te, override)
    scores_te, probs_te = common.scores_and_probs(options.score, logits_te)
    values_te = scores_te if options.softmax == "before" else logits_te
    choice_te = common.compared(values_te, router_state, override)
    top_k = common.number(options, override)
    expert_tk, valid_tk = common.best(choice_te, top_k, override)
    # Of a replay, an expert that does not serve still has its share of the weights.
    served_tk = jnp.ones_like(valid_tk)
    if options.softmax == "before":
        weight_tk = common.weights(options, logits_te, scores_te, expert_tk, served_tk)
    else:
        weight_tk = common.shares("softmax", logits_te, expert_tk, served_tk)
        weight_tk = weight_tk * options.scale
    return Routing(
        expert_tk=expert_tk,
        weight_tk=weight_tk,
        valid_tk=valid_tk & tokens.valid[:, None],
        probs_te=probs_te,
        logits_te=logits_te,
        choice_te=choice_te,
        valid_t=tokens.valid,
        num_experts=logits_te.shape[-1],
        expected_k=float(expert_tk.shape[-1]),
    )
