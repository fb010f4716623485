"""The cosine router of X-MoE (Chi et al. 2022): angles, not lengths."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.moe.routing import Array, Mode, Tokens
from moe_jax.nn import module
from moe_jax.parallel import rules

# Added to a squared length: the length of a zero vector has no derivative.
_TINY = 1e-12


@config.node
class Cosine(config.ScorerConfig):
    """Cosines of projected tokens and expert embeddings over a learnable temperature.

    Soft MoE's logits are those of proj_dim=0, temperature=1.0.

    Attributes:
      proj_dim: width of the space in which they are compared; 0: that of the tokens,
        without a projection.
      temperature: its initial value.
      learned: learn it; False: it stays (ProMoE, with temperature=1.0, proj_dim=0).
      min_temperature: it does not fall below.
      init_std: deviation of the initial weights.
      dtype: of the weights and the products.
    """

    proj_dim: int = 256
    temperature: float = 0.5
    learned: bool = True
    min_temperature: float = 0.01
    init_std: float = 0.02
    dtype: str = "float32"

    def problems(self, path, root):
        yield from config.dtype_problems(self, path, "dtype")
        if self.proj_dim < 0:
            yield f"{path}.proj_dim={self.proj_dim}: must not be negative"
        for name in ("temperature", "min_temperature", "init_std"):
            if getattr(self, name) <= 0:
                yield f"{path}.{name}={getattr(self, name)}: must be positive"
        if not self.learned and self.min_temperature != 0.01:
            yield (
                f"{path}.min_temperature={self.min_temperature} would be ignored: the "
                "temperature is not learned; leave it out"
            )
        elif self.temperature < self.min_temperature:
            yield (
                f"{path}.temperature={self.temperature} is below "
                f"{path}.min_temperature={self.min_temperature}"
            )


def unit(x: Array, axis: int) -> Array:
    """Vectors along an axis, divided by their length; zero stays zero."""
    squares = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(squares + _TINY)


class CosineScorer(nnx.Module):
    """`logits_te = cos(x_t W, w_e) / temperature`.

    The weight is the logarithm of 1 / temperature, so that it stays positive.
    """

    def __init__(self, d_model: int, num_experts: int, options: Cosine, rngs: nnx.Rngs):
        self.dtype = options.dtype
        self.largest = -math.log(options.min_temperature)
        normal = dict(std=options.init_std, dtype=options.dtype)
        width = options.proj_dim or d_model
        if options.proj_dim:
            axes = ("embed", None)
            self.w_proj = module.param(rngs, (d_model, width), axes, **normal)
        axes = (None if options.proj_dim else "embed", None)
        self.w = module.param(rngs, (width, num_experts), axes, **normal)
        self.temperature = options.temperature
        if options.learned:
            start = -math.log(options.temperature)
            self.log_scale = module.param(
                rngs, (), (), value=start, dtype=options.dtype
            )

    @staticmethod
    def init_carry(options: Cosine, num_tokens: int) -> None:
        """Nothing passes from layer to layer."""
        return None

    def __call__(
        self, tokens: Tokens, carry: None, key: jax.Array | None, mode: Mode
    ) -> tuple[Array, None]:
        """Returns logits (T, E)."""
        cosine_te = self.cosines(tokens.features)
        if not hasattr(self, "log_scale"):
            return cosine_te / self.temperature, carry
        scale = jnp.exp(jnp.minimum(self.log_scale[...], self.largest))
        return cosine_te * scale, carry

    def cosines(self, x: Array) -> Array:
        """Cosines (..., E) of features (..., D) and the experts' embeddings."""
        x = x.astype(self.dtype)
        if hasattr(self, "w_proj"):
            x = x @ rules.whole(self.w_proj[...])
        return unit(x, axis=-1) @ unit(rules.whole(self.w[...]), axis=0)
