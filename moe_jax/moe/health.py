"""Figures about a layer's routing for people; bounded in number."""

import jax.numpy as jnp
from jax.scipy.special import entr

from moe_jax.moe.routing import Array, Routing, counts_per_expert


def figures(routing: Routing) -> dict[str, Array]:
    """Health of one layer.

    Returns:
      counts: (E,) int32, assignments per expert.
      entropy: () float, mean over tokens of the entropy of the probabilities, nats.
    """
    entropy_t = jnp.sum(entr(routing.probs_te), axis=-1)
    valid_t = routing.valid_t.astype(entropy_t.dtype)
    entropy = jnp.sum(entropy_t * valid_t) / jnp.maximum(jnp.sum(valid_t), 1)
    return {"counts": counts_per_expert(routing), "entropy": entropy}


def max_over_mean(counts_le: Array) -> Array:
    """Load of the fullest expert over the mean load, worst layer, ()."""
    counts_le = counts_le.astype(jnp.float32)
    mean_l = jnp.maximum(jnp.mean(counts_le, axis=-1), 1e-9)
    return jnp.max(jnp.max(counts_le, axis=-1) / mean_l)


def dead_experts(counts_le: Array) -> Array:
    """Experts that served nobody, over all layers, () int32."""
    return jnp.sum(counts_le == 0, dtype=jnp.int32)
