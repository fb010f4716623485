"""Experts on slots: how a `Mixing` becomes an output.

Every slot is full, so there is nothing to choose: each shard sums its tokens into
slots, the slots travel to their experts in one exchange and back, and the way to the
tokens is a sum as well. The exchange stands in a `jax.shard_map`, as that of a
dispatch does: left to the compiler, slots that were laid over the experts' devices
came out wrong (XLA of jax 0.10.2, a mesh of expert and context axes).
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.moe import sharded
from moe_jax.moe.dispatch.common import from_experts, to_experts
from moe_jax.moe.routing import Array, DispatchStats, Groups, Mixing, Routing
from moe_jax.parallel import rules
from moe_jax.parallel.collectives import total


def mix(
    experts: Any, expert_axes: tuple[str, ...], x: Array, mixing: Mixing
) -> tuple[Array, DispatchStats]:
    """`y_t = sum_ep emit_tep * f_e(sum_t' merge_t'ep * x_t')` within each group.

    Args:
      experts: module of one of `EXPERTS`.
      expert_axes: mesh axes over which the experts are split.
      x: (B, S, D).
      mixing: of these tokens.

    Returns:
      (B, S, D), zero for padding, and statistics: nothing is ever dropped.

    Raises:
      UserError: a group that is not a whole row spans several shards.
    """
    split = lambda a: a.reshape(*x.shape[:2], *a.shape[1:])
    tokens = (
        experts.before({"features": x}),
        split(mixing.merge_tep.astype(x.dtype)),
        split(mixing.emit_tep.astype(x.dtype)),
        split(mixing.valid_t),
    )
    sequence = rules.mesh_axes(rules.grouped("sequence", expert_axes))
    whole = mixing.groups.positions == x.shape[1]
    per_expert = mixing.merge_tep.shape[-1] * (x.shape[0] * x.shape[1])
    per_expert //= mixing.groups.size

    def serve(tokens, given, axes):
        shared = sequence if whole and axes.every else ()
        y = _serve(tokens, given, axes, mixing.groups, whole, shared)
        count = total(jnp.sum(tokens[-1], dtype=jnp.int32), axes.tokens)
        return y, _stats(count * mixing.num_experts, per_expert)

    return sharded.on_shards(serve, experts, expert_axes, tokens, x)


def _serve(tokens, given, axes, groups, whole, shared):
    rows, merge, emit, valid = tokens
    groups = _local(groups, valid.shape, whole)
    flat = lambda a: groups.split(a.reshape(-1, *a.shape[2:]))
    merge_gnep, emit_gnep = flat(merge), flat(emit)

    def merged(leaf):
        slots = jnp.einsum("gnep,gn...->egp...", merge_gnep, flat(leaf))
        slots = slots.reshape(slots.shape[0], -1, *leaf.shape[2:])
        return to_experts(_divided(slots, shared), axes)

    with jax.named_scope("dispatch"):
        sent = jax.tree.map(merged, rows)
    with jax.named_scope("experts"):
        out = given.run(given.whole(), sent, None)
    with jax.named_scope("combine"):
        out = from_experts(out, axes)
        if shared:
            out = jax.lax.all_gather(out, shared, axis=1, tiled=True)
        num_groups, _, num_experts, slots = emit_gnep.shape
        out = out[:, : num_groups * slots]
        out_egpd = out.reshape(num_experts, num_groups, slots, out.shape[-1])
        y_td = groups.join(jnp.einsum("gnep,egpd->gnd", emit_gnep, out_egpd))
        return y_td.reshape(*valid.shape, y_td.shape[-1])


def _local(groups: Groups, batch_shape: tuple[int, int], whole: bool) -> Groups:
    """The groups of a shard's tokens; a whole row may be there in part."""
    rows, positions = groups.rows, batch_shape[1] if whole else groups.positions
    if batch_shape[0] % rows or batch_shape[1] % positions:
        raise UserError(
            f"tokens are mixed in groups of {rows} rows x {positions} positions, which "
            f"do not divide the {batch_shape[0]} x {batch_shape[1]} of a shard; take "
            "smaller groups, larger batches, or a mesh that splits them less"
        )
    return Groups(batch_shape, rows, positions)


def _divided(slots: Array, axes: tuple[str, ...]) -> Array:
    """Sums the shards' parts of slots (E, N, ...), and leaves each 1 / n of N."""
    if not axes:
        return slots
    missing = -slots.shape[1] % jax.lax.axis_size(axes)
    pad = [(0, 0), (0, missing)] + [(0, 0)] * (slots.ndim - 2)
    return jax.lax.psum_scatter(
        jnp.pad(slots, pad), axes, scatter_dimension=1, tiled=True
    )


def _stats(assignments: Array, per_expert: int) -> DispatchStats:
    return DispatchStats(
        assignments=assignments,
        dropped=jnp.int32(0),
        rounds=jnp.int32(1),
        peak_fill=jnp.int32(per_expert),
        capacity=jnp.int32(per_expert),
    )


def as_routing(mixing: Mixing) -> Routing:
    """What the losses and figures of a `Routing` see of a `Mixing`.

    Every token is on every expert. Its probabilities are the shares of the experts in
    its output, its logits `logsumexp_p logits_tep`, so that the z-loss is that of all
    slots.
    """
    num_tokens, num_experts, _ = mixing.emit_tep.shape
    emit_te = jnp.sum(mixing.emit_tep, axis=-1)
    total_t = jnp.sum(emit_te, axis=-1, keepdims=True)
    probs_te = emit_te / jnp.where(total_t == 0, 1, total_t)
    logits_te = jax.nn.logsumexp(mixing.logits_tep, axis=-1)
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    every = (num_tokens, num_experts)
    return Routing(
        expert_tk=jnp.broadcast_to(experts, every),
        weight_tk=emit_te,
        valid_tk=jnp.broadcast_to(mixing.valid_t[:, None], every),
        probs_te=probs_te,
        logits_te=logits_te,
        choice_te=jax.lax.stop_gradient(logits_te),
        valid_t=mixing.valid_t,
        num_experts=num_experts,
        expected_k=float(num_experts),
        group_t=mixing.groups.of_tokens(),
    )
