"""Root mean square normalisation (Zhang and Sennrich 2019)."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn import module


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last dimension.

    Args:
      width: size of the last dimension.
      eps: added to the mean square.
      dtype: of the scale.
      rngs: not drawn from; the scale begins at one.
    """

    def __init__(self, width: int, *, eps: float, dtype: str, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = module.param(rngs, (width,), (None,), value=1.0, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        # The mean of squares loses too much in bfloat16.
        wide = x.astype(module.accumulation_dtype(x.dtype))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(mean_square + self.eps)
        return (wide * self.scale[...].astype(wide.dtype)).astype(x.dtype)
