"""A learned threshold: what the K-th largest value was in training, on average.

A router that lets tokens compete in training takes it in evaluation in place of the
competition. It is router state: after each optimizer step it becomes `decay * old +
(1 - decay) * seen`, with the mean of what the step's micro-batches saw.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.moe.routing import Array

STATE = "threshold"


def init(shape: tuple[int, ...]) -> dict[str, Array]:
    """Zeros."""
    return {STATE: jnp.zeros(shape, jnp.float32)}


def seen(value: Array, count: Array) -> dict[str, Array]:
    """Sums for an `Observation`.

    Args:
      value: float, a sum of values, of the state's shape.
      count: int, how many; 0: nothing was seen. Broadcasts to the state's shape.
    """
    value = jax.lax.stop_gradient(value).astype(jnp.float32)
    counts = jnp.broadcast_to(count, value.shape).astype(jnp.int32)
    return {"thresholds": value, "thresholds_seen": counts}


def update(
    decay: float, state: Mapping[str, Array], sums: Mapping[str, Array]
) -> dict[str, Array]:
    """This part of the state after an optimizer step; also stacked on leading axes."""
    old, counts = state[STATE], sums["thresholds_seen"]
    mean = sums["thresholds"] / jnp.maximum(counts, 1).astype(jnp.float32)
    return {STATE: jnp.where(counts > 0, decay * old + (1 - decay) * mean, old)}
