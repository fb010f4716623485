"""What masks by time share: how noisy an image is, by what the network is told."""

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.nn import module


@config.node
class ByTime(config.InputMaskConfig):
    """Says at which times of the network there is nothing but data, or noise.

    They have to be those of the objective's process. The defaults are DDPM's with 1000
    steps; a flow with noise at 1 has 0 and 1 (or 1000, where the network sees 1000 t),
    one with data at 1 has 1 and 0.

    Attributes:
      data_time: the network's time of data, or of the least noise.
      noise_time: that of the most noise.
    """

    data_time: float = 0.0
    noise_time: float = 999.0

    def time_problems(self, path: str):
        if self.data_time == self.noise_time:
            yield (
                f"{path}.noise_time={self.noise_time} is {path}.data_time: they must "
                "differ, as data and noise do"
            )


def noise_level(options: ByTime, time: jax.Array) -> jax.Array:
    """The times' places between data, 0, and noise, 1; float32 or wider."""
    time = time.astype(module.accumulation_dtype(time.dtype))
    span = options.noise_time - options.data_time
    return jnp.clip((time - options.data_time) / span, 0, 1)
