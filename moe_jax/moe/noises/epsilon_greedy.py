"""Epsilon-greedy exploration: some tokens go to random experts."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.moe.noises.base import Noise
from moe_jax.moe.routing import Array, Mode, Override, Routing, Tokens


@config.node
class EpsilonGreedy(config.NoiseConfig):
    """Each token, with some probability, gets experts drawn without replacement.

    It gets as many as were chosen for it, with the weights that its scores give them.

    Attributes:
      probability: of a token to explore, epsilon.
    """

    probability: float = 0.05

    def problems(self, path, root):
        if not 0 < self.probability <= 1:
            yield f"{path}.probability={self.probability}: must lie in (0, 1]"


class Explore(Noise):
    """See `EpsilonGreedy`."""

    def __init__(
        self, d_model: int, num_experts: int, options: EpsilonGreedy, rngs: nnx.Rngs
    ):
        self.probability = options.probability

    def choice(
        self,
        routing: Routing,
        tokens: Tokens,
        override: Override | None,
        key: jax.Array,
        mode: Mode,
    ) -> Array | None:
        """Of an override, a replay stays as it is, and pruned experts stay out."""
        if not mode.train or (override is not None and override.expert_tk is not None):
            return None
        token_key, expert_key = jax.random.split(key)
        num_tokens, top_k = routing.expert_tk.shape
        shape = (num_tokens, routing.num_experts)
        draw_te = jax.random.uniform(expert_key, shape)
        if override is not None and override.expert_mask is not None:
            draw_te = jnp.where(override.expert_mask, draw_te, -1.0)
        random_tk = jax.lax.top_k(draw_te, top_k)[1].astype(jnp.int32)
        explores_t = jax.random.uniform(token_key, (num_tokens,)) < self.probability
        return jnp.where(explores_t[:, None], random_tk, routing.expert_tk)
