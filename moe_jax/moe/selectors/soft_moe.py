"""Soft MoE (Puigcerver et al. 2023): every slot is a mixture of all tokens."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.routing import Array, Groups, Mixing, Mode, Override, Tokens
from moe_jax.moe.selectors import common


@config.node
class SoftMoE(config.SelectorConfig):
    """Slots that mix the tokens of a sequence, and tokens that mix all slots.

    The paper's logits are `scorer=Cosine(proj_dim=0, temperature=1.0)`.

    Attributes:
      slots_per_expert: P; the paper keeps E * P near the number of tokens.
    """

    slots_per_expert: int = 1

    def experts_per_token(self, num_experts, sequence_length=0):
        if not sequence_length:
            return float(num_experts)
        return num_experts * self.slots_per_expert / sequence_length

    def problems(self, path, root):
        yield from common.least_problems(self, path, slots_per_expert=1)


def select(
    options: SoftMoE,
    logits: Array,
    tokens: Tokens,
    router_state: Mapping[str, Array],
    mode: Mode,
    override: Override | None,
    key: Array | None,
) -> Mixing:
    """Merge weights: a softmax over the tokens; emit weights: over all slots (eq. 1-3).

    Of an override, pruned experts and shifted logits are honoured.

    Args:
      options: the config.
      logits: (T, E * P), slot p of expert e at e * P + p.
      tokens: for their validity and sequences.
      router_state: not used.
      mode: training and evaluation do not differ.
      override: see above.
      key: not used.
    """
    common.refuse_choices(override, "SoftMoE")
    slots = options.slots_per_expert
    logits_tep = logits.reshape(logits.shape[0], -1, slots)
    if override is not None and override.logit_shift is not None:
        logits_tep = logits_tep + override.logit_shift[:, None]
    num_tokens, num_experts, _ = logits_tep.shape
    groups = Groups(tokens.batch_shape, 1, tokens.batch_shape[1])
    merge_tep = common.softmax_over_group(logits_tep, tokens.valid, groups)
    flat_ts = logits_tep.reshape(num_tokens, -1)
    if override is not None and override.expert_mask is not None:
        flat_ts = jnp.where(jnp.repeat(override.expert_mask, slots), flat_ts, -jnp.inf)
    emit_tep = jax.nn.softmax(flat_ts, axis=-1).reshape(logits_tep.shape)
    return Mixing(
        merge_tep=merge_tep,
        emit_tep=jnp.where(tokens.valid[:, None, None], emit_tep, 0),
        logits_tep=logits_tep,
        valid_t=tokens.valid,
        num_experts=num_experts,
        groups=groups,
    )
