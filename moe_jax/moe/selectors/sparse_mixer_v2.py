"""SparseMixer-v2 (GRIN, Liu et al. 2024; Phi-3.5-MoE): one or two sampled experts."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.routing import Array, Mode, Override, Routing, Tokens
from moe_jax.moe.selectors import common
from moe_jax.moe.selectors.sparse_mixer import drawn, masked, multiplier


@config.node
class SparseMixerV2(config.SelectorConfig):
    """Experts sampled one after the other, with Heun's third-order estimate.

    Attributes:
      top_k: 1 or 2 experts per token.
      eps: experts whose logit is relatively more than 2 eps below the largest are out.
    """

    top_k: int = 2
    eps: float = 0.01

    def problems(self, path, root):
        yield from common.least_problems(self, path, eps=0)
        if self.top_k not in (1, 2):
            yield f"{path}.top_k={self.top_k}: must be 1 or 2"


def _weight(options, masked_te, expert_t, uniform_t, mode) -> Array:
    gate_tk = common.gather(jax.nn.softmax(masked_te, axis=-1), expert_t[:, None])
    if not mode.train:
        return gate_tk
    # The rest of f(1) - f(0) = f'(1) / 4 + 3 f'(1/3) / 4.
    factor_tk = jnp.where((uniform_t == 0) | (uniform_t > 0.75), 1.0, 1 / 3)[:, None]
    return multiplier(gate_tk, factor_tk.astype(gate_tk.dtype), 1.0)


def select(
    options: SparseMixerV2,
    logits_te: Array,
    tokens: Tokens,
    router_state: Mapping[str, Array],
    mode: Mode,
    override: Override | None,
    key: Array | None,
) -> Routing:
    """Routes each valid token to experts sampled from masked softmaxes.

    The second is sampled among the others, masked by their own largest logit, and its
    weight is the softmax over them. In training a weight is the gate p_D, or p_D / 3
    with probability 3/4 where D is not the best, and its derivative by the logits is
    that of p_D. In evaluation the best are taken with their gates. Of an override,
    another K must be 1 or 2.
    """
    top_k = common.number(options, override)
    if top_k not in (1, 2):
        raise ValueError(f"SparseMixerV2 takes 1 or 2 experts, not {top_k}")
    logits_te = common.adjusted(logits_te, override)
    num_experts = logits_te.shape[-1]
    left_te, experts, weights, compared = logits_te, [], [], []
    for k in range(top_k):
        masked_te = masked(left_te, options.eps)
        chosen_t = override.expert_tk[:, k] if common.replays(override) else None
        folded = None if key is None else jax.random.fold_in(key, k)
        expert_t, choice_te, uniform_t = drawn(masked_te, chosen_t, mode, folded)
        weights.append(_weight(options, masked_te, expert_t, uniform_t, mode))
        taken_te = expert_t[:, None] == jnp.arange(num_experts)
        left_te = jnp.where(taken_te, -jnp.inf, left_te)
        experts.append(expert_t)
        compared.append(choice_te)
    expert_tk = jnp.stack(experts, axis=1)
    valid_tk = jnp.ones(expert_tk.shape, bool)
    if common.replays(override):
        valid_tk = common.replayed(override)[1]
    elif override is not None and override.expert_mask is not None:
        # Where fewer than K are left.
        valid_tk = jnp.take(override.expert_mask, expert_tk)
    return Routing(
        expert_tk=expert_tk,
        weight_tk=jnp.concatenate(weights, axis=1),
        valid_tk=valid_tk & tokens.valid[:, None],
        probs_te=jax.nn.softmax(logits_te, axis=-1),
        logits_te=logits_te,
        choice_te=jax.lax.stop_gradient(compared[0]),
        valid_t=tokens.valid,
        num_experts=num_experts,
        expected_k=float(top_k),
    )
