"""Expert choice (Zhou et al. 2022): each expert takes its best tokens."""

from collections.abc import Mapping

import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.routing import Array, Mode, Override, Routing, Tokens
from moe_jax.moe.selectors import common


@config.node
class ExpertChoice(config.SelectorConfig):
    """Each expert takes the same number of tokens of a group; a token gets 0 to E.

    Attributes:
      capacity_factor: experts per token on average, c; each expert takes c * N / E of
        the N tokens of its group (without padding), at least one.
      rounding: of that number, "nearest" or "down" (EC-DiT).
      group: tokens that compete: those of a "sequence" or of the whole "batch".
      score: "softmax", "sigmoid" or "sqrt_softplus"; the weight is the score.
      scale: factor on the weights.
    """

    capacity_factor: float = 2.0
    group: str = "sequence"
    rounding: str = "nearest"
    score: str = "softmax"
    scale: float = 1.0

    def experts_per_token(self, num_experts, sequence_length=0):
        return self.capacity_factor

    def problems(self, path, root):
        yield from common.group_problems(self, path)
        yield from common.score_problems(self, path)
        yield from common.rounding_problems(self, path)
        if self.capacity_factor <= 0:
            yield f"{path}.capacity_factor={self.capacity_factor}: must be positive"

    def size_problems(self, path, num_experts):
        yield from common.capacity_problems(self, path, num_experts)


def select(
    options: ExpertChoice,
    logits_te: Array,
    tokens: Tokens,
    router_state: Mapping[str, Array],
    mode: Mode,
    override: Override | None,
    key: Array | None,
) -> Routing:
    """Routes to each expert the tokens that score highest with it.

    Of an override, another K is refused. A bias of the router state would shift all
    tokens of an expert alike, and is refused with the config.

    Returns:
      Routing with K = E: slot k is expert k.
    """
    common.refuse(override, "ExpertChoice", top_k="experts choose; see capacity_factor")
    logits_te = common.adjusted(logits_te, override)
    scores_te, probs_te = common.scores_and_probs(options.score, logits_te)
    choice_te = common.compared(scores_te, {}, override)
    groups = common.groups(options, tokens)
    num_experts = logits_te.shape[-1]
    if common.replays(override):
        expert_tk, valid_tk = common.replayed(override)
    else:
        share = options.capacity_factor, num_experts, options.rounding
        valid_tk = common.take_best(
            choice_te, tokens, groups, lambda size: common.portion(size, *share)
        )
        experts = jnp.arange(num_experts, dtype=jnp.int32)
        expert_tk = jnp.broadcast_to(experts, valid_tk.shape)
    return Routing(
        expert_tk=expert_tk,
        weight_tk=common.gather(scores_te, expert_tk) * options.scale,
        valid_tk=valid_tk & tokens.valid[:, None],
        probs_te=probs_te,
        logits_te=logits_te,
        choice_te=choice_te,
        valid_t=tokens.valid,
        num_experts=num_experts,
        expected_k=options.capacity_factor,
        group_t=groups.of_tokens(),
    )
