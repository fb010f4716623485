"""No router: for selectors that decide without scores, such as `Hash`."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.moe.routing import Array, Mode, Tokens


@config.node
class NoScores(config.ScorerConfig):
    """Zeros, and no weights."""


class NoScorer(nnx.Module):
    """`logits_te = 0`."""

    def __init__(
        self, d_model: int, num_experts: int, options: NoScores, rngs: nnx.Rngs
    ):
        self.num_experts = num_experts

    @staticmethod
    def init_carry(options: NoScores, num_tokens: int) -> None:
        """Nothing passes from layer to layer."""
        return None

    def __call__(
        self, tokens: Tokens, carry: None, key: jax.Array | None, mode: Mode
    ) -> tuple[Array, None]:
        """Returns zeros (T, E), float32 or wider."""
        dtype = jnp.promote_types(tokens.features.dtype, jnp.float32)
        return jnp.zeros((tokens.features.shape[0], self.num_experts), dtype), carry
