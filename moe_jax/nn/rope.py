"""Rotary position embedding (Su et al. 2021), half-split layout."""

import jax
import jax.numpy as jnp

from moe_jax.nn import module


def rotate(
    x: jax.Array, positions: jax.Array, theta: float, scale: float = 1.0
) -> jax.Array:
    """Rotates pairs (i, i + Dh/2) of each head by `position * theta^(-2i/Dh)`.

    Args:
      x: (B, S, H, Dh) queries or keys, Dh even.
      positions: (B, S) int32, position within the document.
      theta: base of the wavelengths.
      scale: multiplies the result before it is rounded to the type of x.

    Returns:
      (B, S, H, Dh), in the type of x.
    """
    half = x.shape[-1] // 2
    dtype = module.accumulation_dtype(x.dtype)
    wavelengths = theta ** (-jnp.arange(half, dtype=dtype) / half)
    angles = positions[..., None, None].astype(dtype) * wavelengths
    cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
    first, second = x[..., :half].astype(dtype), x[..., half:].astype(dtype)
    turned = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return turned.astype(x.dtype)
