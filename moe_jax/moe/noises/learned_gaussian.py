"""Gaussian noise of a learned deviation (Shazeer et al. 2017)."""

import jax
from flax import nnx

from moe_jax import config
from moe_jax.moe.noises.base import Noise
from moe_jax.moe.routing import Array, Mode, Tokens
from moe_jax.nn import module
from moe_jax.parallel import rules


@config.node
class LearnedGaussian(config.NoiseConfig):
    """Noise of deviation `softplus(x W_noise) + floor`, W_noise = 0 at the start.

    With the selector `TopK(softmax="after")` this is the noisy top-k gating of the
    paper (equations 3-5).

    Attributes:
      floor: the deviation does not fall below; keeps the load loss finite.
      dtype: of the weights and the product.
    """

    floor: float = 0.01
    dtype: str = "float32"

    def problems(self, path, root):
        yield from config.dtype_problems(self, path, "dtype")
        if self.floor <= 0:
            yield f"{path}.floor={self.floor}: must be positive"


class LearnedGaussianNoise(Noise):
    """See `LearnedGaussian`."""

    def __init__(
        self, d_model: int, num_experts: int, options: LearnedGaussian, rngs: nnx.Rngs
    ):
        self.floor = options.floor
        self.dtype = options.dtype
        shape = (d_model, num_experts)
        self.w = module.param(rngs, shape, ("embed", None), dtype=options.dtype)

    def logits(
        self, logits_te: Array, tokens: Tokens, key: jax.Array, mode: Mode
    ) -> tuple[Array, Array]:
        x = tokens.features.astype(self.dtype)
        std_te = jax.nn.softplus(x @ rules.whole(self.w[...])) + self.floor
        std_te = std_te.astype(logits_te.dtype)
        if not mode.train:
            return logits_te, std_te
        draw_te = jax.random.normal(key, logits_te.shape, logits_te.dtype)
        return logits_te + std_te * draw_te, std_te
