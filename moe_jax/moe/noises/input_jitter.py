"""Input jitter (Switch, Fedus et al. 2021): the router sees tokens a little changed."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.moe.noises.base import Noise
from moe_jax.moe.routing import Mode, Tokens


@config.node
class InputJitter(config.NoiseConfig):
    """Each feature times a uniform number in [1 - eps, 1 + eps].

    Attributes:
      eps: half the width.
    """

    eps: float = 0.01

    def problems(self, path, root):
        if not 0 < self.eps < 1:
            yield f"{path}.eps={self.eps}: must lie in (0, 1)"


class Jitter(Noise):
    """See `InputJitter`."""

    def __init__(
        self, d_model: int, num_experts: int, options: InputJitter, rngs: nnx.Rngs
    ):
        self.eps = options.eps

    def features(self, tokens: Tokens, key: jax.Array, mode: Mode) -> Tokens:
        if not mode.train:
            return tokens
        x = tokens.features
        # In bfloat16 the factor itself would be rounded by as much as it changes.
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        low, high = 1 - self.eps, 1 + self.eps
        factor = jax.random.uniform(key, x.shape, x.dtype, low, high)
        return dataclasses.replace(tokens, features=x * factor)
