"""Token choice: each token takes the K experts with the highest scores."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.routing import Array, Mode, Override, Routing, Tokens, biased


@config.node
class TopK(config.SelectorConfig):
    """Top-k of softmax scores.

    Attributes:
      top_k: experts per token, K.
      softmax: "before" the choice (Shazeer 2017, Switch, OLMoE): weights are
        probabilities over all experts; "after" (GPT-OSS): over the chosen ones.
      renormalize: with "before", divide the weights by their sum (Mixtral).
      scale: factor on the weights (DeepSeek's routed_scaling_factor).
    """

    top_k: int = 2
    softmax: str = "before"
    renormalize: bool = True
    scale: float = 1.0

    def problems(self, path, root):
        if self.top_k < 1:
            yield f"{path}.top_k={self.top_k}: must be at least 1"
        if self.softmax not in ("before", "after"):
            yield f"{path}.softmax={self.softmax!r}: must be 'before' or 'after'"
        if self.top_k == 1 and (self.softmax == "after" or self.renormalize):
            yield (
                f"{path}.top_k=1 with softmax='after' or renormalize=True makes every "
                "weight 1, so the router gets no gradient; set softmax='before' and "
                "renormalize=False"
            )


def choose(
    options: TopK, choice_te: Array, num_tokens: int, override: Override | None
) -> tuple[Array, Array]:
    """The chosen experts (T, K) and which of them count (T, K) bool."""
    if override is not None and override.expert_tk is not None:
        return override.expert_tk, override.valid_tk
    top_k = options.top_k
    if override is not None and override.top_k is not None:
        top_k = override.top_k
    chosen = jax.lax.top_k(choice_te, top_k)[1]
    return chosen.astype(jnp.int32), jnp.ones((num_tokens, top_k), bool)


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
    if override is not None and override.logit_shift is not None:
        logits_te = logits_te + override.logit_shift
    if override is not None and override.expert_mask is not None:
        logits_te = jnp.where(override.expert_mask, logits_te, -jnp.inf)
    probs_te = jax.nn.softmax(logits_te, axis=-1)
    choice_te = jax.lax.stop_gradient(
        probs_te if options.softmax == "before" else logits_te
    )
    choice_te = biased(choice_te, router_state)
    if override is not None and override.expert_mask is not None:
        # After the bias, which would lift a pruned expert's probability of zero.
        choice_te = jnp.where(override.expert_mask, choice_te, -jnp.inf)
    expert_tk, valid_tk = choose(options, choice_te, logits_te.shape[0], override)
    if override is not None and override.expert_mask is not None:
        # Where fewer than K are left, or a replay names a pruned one.
        valid_tk = valid_tk & jnp.take(override.expert_mask, expert_tk)
    if options.softmax == "before":
        weight_tk = jnp.take_along_axis(probs_te, expert_tk, axis=-1)
        if options.renormalize:
            weight_tk = weight_tk / jnp.sum(weight_tk, axis=-1, keepdims=True)
    else:
        chosen = jnp.take_along_axis(logits_te, expert_tk, axis=-1)
        weight_tk = jax.nn.softmax(chosen, axis=-1)
    return Routing(
        expert_tk=expert_tk,
        weight_tk=weight_tk * options.scale,
        valid_tk=valid_tk & tokens.valid[:, None],
        probs_te=probs_te,
        logits_te=logits_te,
        choice_te=choice_te,
        valid_t=tokens.valid,
        num_experts=logits_te.shape[-1],
        expected_k=float(expert_tk.shape[-1]),
    )
