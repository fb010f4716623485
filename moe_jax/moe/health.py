"""Figures about routing for people; bounded in number, whatever the model.

`figures` are those of one layer that need its `Routing`; the others are computed
once a step from what the layers counted.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.moe.balance.losses import entropy
from moe_jax.moe.routing import (
    Array,
    DispatchStats,
    MoEAux,
    Routing,
    counts_per_expert,
)
from moe_jax.tree import named_leaves


def figures(routing: Routing) -> dict[str, Array]:
    """Health of one layer.

    Returns:
      counts: (E,) int32, assignments per expert.
      changed: () int32, see `changed_tokens`.
      entropy: () float, mean over tokens of the entropy of the probabilities, nats.
    """
    return {
        "counts": counts_per_expert(routing),
        "changed": changed_tokens(routing),
        "entropy": entropy(routing),
    }


def changed_tokens(routing: Routing) -> Array:
    """Tokens whose experts are not those of the highest logits, () int32.

    What the bias, noise, sampling, a limit on groups, or the experts' own choice
    changed: an expert that is left out has a higher logit than one that serves. Equal
    logits change nothing.
    """
    experts = jnp.arange(routing.num_experts, dtype=jnp.int32)
    hit_tke = (routing.expert_tk[..., None] == experts) & routing.valid_tk[..., None]
    serves_te = jnp.any(hit_tke, axis=1)
    logits_te = routing.logits_te
    worst_t = jnp.min(jnp.where(serves_te, logits_te, jnp.inf), axis=-1)
    best_t = jnp.max(jnp.where(serves_te, -jnp.inf, logits_te), axis=-1)
    return jnp.sum((best_t > worst_t) & routing.valid_t, dtype=jnp.int32)


def of_step(
    aux: MoEAux, router_state: Any, expert_axes: tuple[str, ...]
) -> dict[str, Array]:
    """What one optimizer step reports: scalars, and the counts (L, E).

    Args:
      aux: stacked on (L,), of all micro-batches.
      router_state: after the step.
      expert_axes: mesh axes over which experts are split.
    """
    counts_le, stats = aux.health["counts"], aux.stats
    tokens = jnp.maximum(jnp.sum(aux.observation.count), 1)
    found = {
        "expert_counts": counts_le,
        "load_max_over_mean": max_over_mean(counts_le),
        "max_violation": max_violation(counts_le),
        "dead_experts": dead_experts(counts_le),
        "experts_per_token": jnp.sum(counts_le) / tokens,
        "straggler": straggler(counts_le, _shards(expert_axes)),
        "router_entropy": jnp.mean(aux.health["entropy"]),
        "changed_tokens": jnp.sum(aux.health["changed"]) / tokens,
        "dropped": jnp.sum(stats.dropped),
        "dispatch_rounds": jnp.max(stats.rounds),
        "buffer_fill": buffer_fill(stats),
        "bias_range": bias_range(router_state),
    }
    if stats.mean_fill is not None:
        found |= {
            "peak_fill": jnp.max(stats.peak_fill),
            "mean_fill": jnp.max(stats.mean_fill),
        }
    return {name: value for name, value in found.items() if value is not None}


def _shards(axes: tuple[str, ...]) -> int:
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in axes)


def _over_mean(counts_le: Array) -> Array:
    counts_le = counts_le.astype(jnp.float32)
    mean_l = jnp.maximum(jnp.mean(counts_le, axis=-1), 1e-9)
    return jnp.max(counts_le, axis=-1) / mean_l


def max_over_mean(counts_le: Array) -> Array:
    """Load of the fullest expert over the mean load, worst layer, ()."""
    return jnp.max(_over_mean(counts_le))


def max_violation(counts_le: Array) -> Array:
    """MaxVio: `(max_e c_e - mean) / mean`, mean over layers (Wang et al. 2024), ()."""
    return jnp.mean(jnp.maximum(_over_mean(counts_le) - 1, 0))


def dead_experts(counts_le: Array) -> Array:
    """Experts that served nobody, over all layers, () int32."""
    return jnp.sum(counts_le == 0, dtype=jnp.int32)


def straggler(counts_le: Array, shards: int) -> Array:
    """How much longer than the mean the step waits for the fullest shard, ().

    Rows of the fullest expert shard over the mean, summed over layers, because all
    wait for it in each layer. An estimate: shards that hold the same experts (along
    `data`, `fsdp` and `context`) are taken together.
    """
    rows_ls = jnp.sum(counts_le.reshape(counts_le.shape[0], shards, -1), axis=-1)
    return jnp.mean(_over_mean(rows_ls))


def buffer_fill(stats: DispatchStats) -> Array:
    """Fullest bucket over its capacity, worst layer, (); above 1: more rounds."""
    capacity = jnp.maximum(stats.capacity, 1).astype(jnp.float32)
    return jnp.max(jnp.where(stats.capacity > 0, stats.peak_fill / capacity, 0))


def bias_range(router_state: Any) -> Array | None:
    """Largest minus smallest bias of a layer, worst layer, (); None without one."""
    ranges = [
        jnp.max(jnp.ptp(leaf, axis=-1))
        for name, leaf in named_leaves(router_state).items()
        if name.split("/")[-1] in ("bias", "factor")
    ]
    return jnp.max(jnp.stack(ranges)) if ranges else None
