"""Gaussian noise on the logits (V-MoE, Riquelme et al. 2021)."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.moe.noises.base import Noise
from moe_jax.moe.routing import Array, Mode, Tokens


@config.node
class Gaussian(config.NoiseConfig):
    """Noise of deviation sigma / E; choice and weights are those of noisy logits.

    With the selector `TopK(renormalize=False)` this is V-MoE's noisy top-k.

    Attributes:
      sigma: the deviation times E.
    """

    sigma: float = 1.0

    def problems(self, path, root):
        if self.sigma <= 0:
            yield f"{path}.sigma={self.sigma}: must be positive"


class GaussianNoise(Noise):
    """See `Gaussian`."""

    def __init__(
        self, d_model: int, num_experts: int, options: Gaussian, rngs: nnx.Rngs
    ):
        self.std = options.sigma / num_experts

    def logits(
        self, logits_te: Array, tokens: Tokens, key: jax.Array, mode: Mode
    ) -> tuple[Array, Array]:
        std = jnp.asarray(self.std, logits_te.dtype)
        if not mode.train:
            return logits_te, std
        draw_te = jax.random.normal(key, logits_te.shape, logits_te.dtype)
        return logits_te + std * draw_te, std
