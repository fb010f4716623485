"""Denoising Task Routing (Park et al. 2023): each time has channels of its own."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.models.masks.by_time import ByTime, noise_level
from moe_jax.moe.routing import Condition


@config.node
class TaskRouting(ByTime):
    """A window of channels that moves with the noise, in all blocks (2310.07138).

    Of D channels `n = floor(beta D)` are 1, from `round(level^alpha (D - n))` on: times
    with much noise have more channels of their own. There is nothing to learn.

    Attributes:
      alpha: how late the window moves.
      beta: share of the channels.
    """

    alpha: float = 4.0
    beta: float = 0.8

    def problems(self, path, root):
        yield from self.time_problems(path)
        if self.alpha <= 0:
            yield f"{path}.alpha={self.alpha}: must be positive"
        if not 0 < self.beta < 1:
            yield f"{path}.beta={self.beta}: must lie in (0, 1)"

    def size_problems(self, path, d_model):
        if 0 < self.beta < 1 and math.floor(self.beta * d_model) < 1:
            yield (
                f"{path}.beta={self.beta} leaves no channel of d_model={d_model}; it "
                f"must be at least 1 / {d_model}"
            )


def window_starts(level: jax.Array, alpha: float, free: int) -> jax.Array:
    """First channel of the window, of `free` + 1 places; int32, like `level`."""
    return jnp.round(level**alpha * free).astype(jnp.int32)


def windows(level: jax.Array, alpha: float, channels: int, width: int) -> jax.Array:
    """(B,) levels -> (B, channels) bool, True for `width` neighbours."""
    start_b1 = window_starts(level, alpha, channels - width)[:, None]
    channel = jnp.arange(channels, dtype=jnp.int32)
    return (channel >= start_b1) & (channel < start_b1 + width)


class ChannelMask(nnx.Module):
    """See `TaskRouting`; it has no weights."""

    def __init__(
        self, d_model: int, options: TaskRouting, *, dtype: str, rngs: nnx.Rngs
    ):
        self.options = options

    def __call__(self, x: jax.Array, condition: Condition) -> jax.Array:
        """(B, 1, D), 0 or 1."""
        options, channels = self.options, x.shape[-1]
        width = math.floor(options.beta * channels)
        level = noise_level(options, condition.time)
        return windows(level, options.alpha, channels, width)[:, None].astype(x.dtype)
