"""Distributions of the times of training, as noise times: 0 is data, 1 is noise.

Each is `(options, key, shape) -> noise_time`, float32; `process.from_noise_time` gives
the time in the process's unit, for DDPM an index.
"""

import jax
import jax.numpy as jnp

from moe_jax import config


def shifted(noise_time, shift: float):
    """More noise for shift > 1: `s t / (1 + (s - 1) t)` (SD3, Esser et al. 2024)."""
    return shift * noise_time / (1 + (shift - 1) * noise_time)


@config.node
class BaseTimes(config.TimesConfig):
    """Attributes: shift, of `s t / (1 + (s - 1) t)`; 1 changes nothing, 3 is SD3's."""

    shift: float = 1.0

    def problems(self, path, root):
        if self.shift <= 0:
            yield f"{path}.shift={self.shift}: must be more than 0"


@config.node
class Uniform(BaseTimes):
    """Even over (0, 1): with a schedule, every index as often."""


@config.node
class LogitNormal(BaseTimes):
    """`t = 1 / (1 + exp(-n))`, n ~ N(mean, std^2) (SD3, Esser et al. 2024).

    Attributes:
      mean: above 0 more noise.
      std: width.
    """

    mean: float = 0.0
    std: float = 1.0

    def problems(self, path, root):
        yield from BaseTimes.problems(self, path, root)
        if self.std <= 0:
            yield f"{path}.std={self.std}: must be more than 0"


def _uniform(options: Uniform, key, shape):
    # Draws are multiples of 2^-23. Neither 0 nor 1, where some weights divide by 0.
    return jax.random.uniform(key, shape, jnp.float32) + 2.0**-24


def _logit_normal(options: LogitNormal, key, shape):
    normal = jax.random.normal(key, shape, jnp.float32)
    return jax.nn.sigmoid(options.mean + options.std * normal)


TIMES = {Uniform: _uniform, LogitNormal: _logit_normal}


def draw(options: BaseTimes, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise times of `shape`, float32 in [0, 1], shifted."""
    return shifted(TIMES[type(options)](options, key, shape), options.shift)
