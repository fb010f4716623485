"""Normalisations of the last dimension: `NORMS` by their name in a config."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn import module


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` (Zhang and Sennrich 2019).

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


def standardized(x: jax.Array, eps: float) -> jax.Array:
    """`(x - mean(x)) / sqrt(var(x) + eps)` over the last dimension, float32 or wider.

    The variance divides by the width.
    """
    wide = x.astype(module.accumulation_dtype(x.dtype))
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return wide * jax.lax.rsqrt(variance + eps)


class LayerNorm(nnx.Module):
    """`(x - mean(x)) / sqrt(var(x) + eps) * scale + bias` (Ba et al. 2016).

    Args:
      width: size of the last dimension.
      eps: added to the variance, which divides by the width.
      dtype: of the scale and the bias.
      rngs: not drawn from; the scale begins at one, the bias at zero.
    """

    def __init__(self, width: int, *, eps: float, dtype: str, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = module.param(rngs, (width,), (None,), value=1.0, dtype=dtype)
        self.bias = module.param(rngs, (width,), (None,), dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = standardized(x, self.eps)
        wide = wide * self.scale[...].astype(wide.dtype)
        return (wide + self.bias[...].astype(wide.dtype)).astype(x.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
