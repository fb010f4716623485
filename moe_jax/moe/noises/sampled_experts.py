"""Experts drawn by their probabilities in place of the best ones."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.moe.noises.base import Noise
from moe_jax.moe.routing import Array, Mode, Override, Routing, Tokens

# Bounds of a probability (MoDE).
_LEAST = 1e-9


@config.node
class SampledExperts(config.NoiseConfig):
    """In training experts are drawn, without replacement, by their probabilities.

    MoDE (Reuss et al. 2024, arXiv:2412.12953). There is one draw for each row of the
    batch: tokens of an image with the same probabilities get the same experts. They
    are as many as would have been chosen, with the weights that their scores give them.
    """


class Sample(Noise):
    """See `SampledExperts`."""

    def __init__(
        self, d_model: int, num_experts: int, options: SampledExperts, rngs: nnx.Rngs
    ):
        pass

    def choice(
        self,
        routing: Routing,
        tokens: Tokens,
        override: Override | None,
        key: jax.Array,
        mode: Mode,
    ) -> Array | None:
        """The K largest of `log p + g` with Gumbel's g are such a draw.

        Of an override, a replay stays as it is, and pruned experts stay out.
        """
        if not mode.train or (override is not None and override.expert_tk is not None):
            return None
        (rows, length), num_experts = tokens.batch_shape, routing.num_experts
        probs_te = jnp.clip(routing.probs_te, _LEAST, 1 - _LEAST)
        draw_be = jax.random.gumbel(key, (rows, num_experts), probs_te.dtype)
        shape = (rows, length, num_experts)
        draw_te = jnp.broadcast_to(draw_be[:, None], shape).reshape(probs_te.shape)
        noisy_te = jax.lax.stop_gradient(jnp.log(probs_te)) + draw_te
        if override is not None and override.expert_mask is not None:
            noisy_te = jnp.where(override.expert_mask, noisy_te, -jnp.inf)
        top_k = routing.expert_tk.shape[1]
        return jax.lax.top_k(noisy_te, top_k)[1].astype(jnp.int32)
