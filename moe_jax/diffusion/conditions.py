"""What training does to the condition: labels dropped, embeddings perturbed."""

import math

import jax
import jax.numpy as jnp

from moe_jax import config

Array = jax.Array


def drop_labels(
    key: Array, labels: Array, num_classes: int, probability: float
) -> Array:
    """Each label with that probability replaced by the null class (Ho & Salimans 2022).

    Args:
      key: for the draw.
      labels: (B,) int32 in [0, num_classes].
      num_classes: of the data; also the index of the null class.
      probability: 0.1 in DiT.
    """
    dropped = jax.random.bernoulli(key, probability, labels.shape)
    return jnp.where(dropped, num_classes, labels)


@config.node
class Perturbation(config.Node):
    """Noise on the embedded condition, in training only.

    Chen et al. 2024 (2405.20494), "conditional embedding perturbation".

    Attributes:
      strength: g; every entry of a D-vector moves by g / sqrt(D): the half width of a
        "uniform", the standard deviation of a "normal" draw. (The paper leaves open
        whether the latter is a variance.) 0: none.
      distribution: "uniform" or "normal".
    """

    strength: float = 0.0
    distribution: str = "uniform"

    def problems(self, path, root):
        if self.strength < 0:
            yield f"{path}.strength={self.strength}: must not be negative"
        if self.distribution not in ("uniform", "normal"):
            yield (
                f"{path}.distribution={self.distribution!r}: must be 'uniform' or "
                "'normal'"
            )


def perturb(options: Perturbation, key: Array | None, condition: Array) -> Array:
    """The condition (B, D) with noise; as it is where key is None (evaluation)."""
    if key is None or not options.strength:
        return condition
    size = options.strength / math.sqrt(condition.shape[-1])
    shape, dtype = condition.shape, condition.dtype
    if options.distribution == "normal":
        return condition + size * jax.random.normal(key, shape, dtype)
    return condition + jax.random.uniform(key, shape, dtype, -size, size)
