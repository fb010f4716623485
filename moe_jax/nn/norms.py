"""Root mean square normalisation (Zhang and Sennrich 2019)."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn import module


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last dimension, or the last ones.

    Args:
      width: size of the last dimension, or sizes of the last ones.
      eps: added to the mean square.
      dtype: of the scale.
      rngs: not drawn from; the scale begins at one.
      axes: logical, of the scale; None: all whole.
    """

    def __init__(
        self,
        width: int | tuple[int, ...],
        *,
        eps: float,
        dtype: str,
        rngs: nnx.Rngs,
        axes: tuple[str | None, ...] | None = None,
    ):
        self.eps = eps
        shape = (width,) if isinstance(width, int) else width
        axes = axes or (None,) * len(shape)
        self.scale = module.param(rngs, shape, axes, value=1.0, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        # The mean of squares loses too much in bfloat16.
        wide = x.astype(module.accumulation_dtype(x.dtype))
        last = tuple(range(-self.scale[...].ndim, 0))
        mean_square = jnp.mean(jnp.square(wide), axis=last, keepdims=True)
        wide = wide * jax.lax.rsqrt(mean_square + self.eps)
        return (wide * self.scale[...].astype(wide.dtype)).astype(x.dtype)
