"""Hash routing (Roller et al. 2021): the token id alone decides the experts."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.routing import Array, Mode, Override, Routing, Tokens
from moe_jax.moe.selectors import common


@config.node
class Hash(config.SelectorConfig):
    """K distinct experts by a hash of the token id; every weight is 1 / K.

    All MoE layers of a model choose alike. It takes no scorer: `scorer=NoScores()`.

    Attributes:
      top_k: experts per token, K.
      salt: another salt gives another assignment of ids to experts.
    """

    top_k: int = 1
    salt: int = 0

    def problems(self, path, root):
        yield from common.least_problems(self, path, top_k=1)
        if not 0 <= self.salt < 2**31:
            yield f"{path}.salt={self.salt}: must lie in [0, 2**31)"


def _mix(x: Array) -> Array:
    """A bijection of uint32 that scatters neighbours (MurmurHash3's finalizer)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def hashes(token_ids: Array, num_experts: int, salt: int) -> Array:
    """A pseudo-random number for each token id and expert, (T, E) in [0, 2^24)."""
    seed = _mix(jnp.uint32(salt) + jnp.uint32(0x9E3779B9))
    id_t = _mix(token_ids.astype(jnp.uint32) ^ seed)
    expert_e = _mix(jnp.arange(num_experts, dtype=jnp.uint32) + seed)
    # 24 bits, so that a float32 holds them all.
    return _mix(id_t[:, None] ^ expert_e) >> 8


def select(
    options: Hash,
    logits_te: Array,
    tokens: Tokens,
    router_state: Mapping[str, Array],
    mode: Mode,
    override: Override | None,
    key: Array | None,
) -> Routing:
    """Routes each valid token to the K experts with the largest hashes.

    Of an override, shifted logits are refused: no score decides.

    Raises:
      ValueError: there are no token ids.
    """
    common.refuse(override, "Hash", logit_shift="no score decides")
    if tokens.token_ids is None:
        raise ValueError("Hash routes by token ids: pass token_ids to the layer")
    num_experts = logits_te.shape[-1]
    hash_te = hashes(tokens.token_ids, num_experts, options.salt)
    choice_te = common.pruned(hash_te.astype(logits_te.dtype), override)
    top_k = common.number(options, override)
    expert_tk, valid_tk = common.best(choice_te, top_k, override)
    share = 1 / expert_tk.shape[-1]
    chosen_te = jnp.sum(jax.nn.one_hot(expert_tk, num_experts), axis=1)
    return Routing(
        expert_tk=expert_tk,
        weight_tk=jnp.full(expert_tk.shape, share, logits_te.dtype),
        valid_tk=valid_tk & tokens.valid[:, None],
        probs_te=(chosen_te * share).astype(logits_te.dtype),
        logits_te=logits_te,
        choice_te=choice_te,
        valid_t=tokens.valid,
        num_experts=num_experts,
        expected_k=float(expert_tk.shape[-1]),
    )
