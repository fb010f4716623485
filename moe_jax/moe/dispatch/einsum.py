"""One-hot einsums over groups of tokens (GShard, Lepikhin et al. 2020, algorithm 1).

Tokens are cut into groups of N. In each, every expert has room for C assignments, in
token order; the rest is dropped and counted. Dispatch and combination are matmuls with
(N, E, C) masks, which costs `2 N E C D` per group on top of the experts' work: with
512 tokens, 64 experts and K = 8 about a quarter of the experts' matmuls, growing with
N. Nothing is sorted or gathered.
"""

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.dispatch.common import (
    Axes,
    LocalExperts,
    from_experts,
    statistics,
    to_experts,
)
from moe_jax.moe.dispatch.plan import bucket_rows, capacity_problems
from moe_jax.moe.routing import Array, Assignments, DispatchStats, PyTree


@config.node
class Einsum(config.DispatchConfig):
    """Masks and matmuls in groups of tokens; what does not fit is dropped and counted.

    Attributes:
      capacity_factor: rows per (group, expert) over the mean of a uniform routing; 0:
        as many as an independent uniform routing needs.
      group_size: tokens of a group, N; a shard with fewer has one group.
    """

    capacity_factor: float = 1.25
    group_size: int = 512

    def problems(self, path, root):
        yield from capacity_problems(self.capacity_factor, path)
        if self.group_size < 1:
            yield f"{path}.group_size={self.group_size}: must be at least 1"


def dispatch(
    options: Einsum,
    rows: PyTree,
    routing: Assignments,
    experts: LocalExperts,
    axes: Axes,
) -> tuple[Array, DispatchStats]:
    """One round of masks and matmuls; see `DISPATCHES`."""
    num_tokens, num_experts = routing.expert_tk.shape[0], routing.num_experts
    size = min(options.group_size, num_tokens)
    groups = -(-num_tokens // size)
    mean = size * routing.expected_k / num_experts
    capacity = bucket_rows(mean, options.capacity_factor, size)

    def split(x):
        missing = groups * size - num_tokens
        x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(groups, size, *x.shape[1:])

    chosen_gne, weight_gne = map(split, _table(routing))
    position_gne = jnp.cumsum(chosen_gne, axis=1, dtype=jnp.int32) - 1
    slots_c = jnp.arange(capacity, dtype=jnp.int32)
    mask_gnec = (position_gne[..., None] == slots_c) & chosen_gne[..., None]

    def send(leaf):
        mask = mask_gnec.astype(leaf.dtype)
        slots = jnp.einsum("gnec,gn...->egc...", mask, split(leaf))
        shape = (num_experts, groups * capacity, *leaf.shape[1:])
        return to_experts(slots.reshape(shape), axes)

    with jax.named_scope("dispatch"):
        sent = jax.tree.map(send, rows)
    with jax.named_scope("experts"):
        out = experts.run(experts.whole(), sent, None)
    with jax.named_scope("combine"):
        back = from_experts(out, axes)
        back_egcd = back.reshape(num_experts, groups, capacity, back.shape[-1])
        part_gnec = jnp.where(mask_gnec, weight_gne[..., None], 0).astype(back.dtype)
        y_gnd = jnp.einsum("gnec,egcd->gnd", part_gnec, back_egcd)
    counts_ge = jnp.sum(chosen_gne, axis=1, dtype=jnp.int32)
    y_td = y_gnd.reshape(groups * size, -1)[:num_tokens]
    return y_td, statistics(
        routing,
        axes,
        rounds=1,
        counts=counts_ge,
        capacity=capacity,
        mean=mean,
        dropped=jnp.sum(jnp.maximum(counts_ge - capacity, 0)),
    )


def _table(routing: Assignments) -> tuple[Array, Array]:
    """Which experts a token chose and with which weight, (T, E) each."""
    experts = jnp.arange(routing.num_experts, dtype=jnp.int32)
    hit_tke = (routing.expert_tk[..., None] == experts) & routing.valid_tk[..., None]
    weight_te = jnp.sum(jnp.where(hit_tke, routing.weight_tk[..., None], 0), axis=1)
    return jnp.any(hit_tke, axis=1), weight_te
