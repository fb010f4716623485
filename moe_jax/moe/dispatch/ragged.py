"""Rows cross once per destination shard, as many as there are, for the experts there.

A token that chose several experts of one shard is sent there once, with its choices
and weights beside it, and the shard sends back one row, the weighted sum over its
experts: with 8 of 64 experts on 4 shards 3.6 rows a token cross, and not 8. Rows are
sorted by destination; `ragged_all_to_all` moves those that are there and no padding.
On the shard they are served as `local` lays them out.

All buffers are bounded. A round of exchange serves a window of C rows of each pair
(source, destination), so that sizes are clipped alike on both sides; pairs average
over the experts of a shard, so C lies close to the mean. Within an exchange the rows
for the local experts are served in local rounds. At worst (all tokens to one shard,
and there to one expert) there are `1 + ceil((T - C) / (C / 4))` exchanges with C about
T n' / n where a token has n' destinations of n, and each has about n T / (T K) local
rounds.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.dispatch import exchange, local
from moe_jax.moe.dispatch.common import Axes, LocalExperts, statistics
from moe_jax.moe.dispatch.permute import collect, fill, valid_first
from moe_jax.moe.dispatch.plan import (
    Plan,
    bucket_round,
    bucket_rows,
    capacity_problems,
    make_plan,
    rounds_needed,
    window,
)
from moe_jax.moe.dispatch.rounds import behind_first, in_rounds
from moe_jax.moe.routing import Array, Assignments, DispatchStats, PyTree
from moe_jax.parallel.collectives import largest
from moe_jax.parallel.varying import vary
from moe_jax.tree import struct


@config.node
class Ragged(config.DispatchConfig):
    """Deduplicated rows and a ragged exchange; nothing is dropped.

    Attributes:
      capacity_factor: rows per (source, destination) in the first round over the mean
        of a uniform routing; later rounds have a quarter of them. 0: as many as an
        independent uniform routing needs.
    """

    capacity_factor: float = 0.0

    def problems(self, path, root):
        yield from capacity_problems(self.capacity_factor, path)


def destinations(expected_k: float, num_experts: int, shards: int) -> float:
    """Shards that a token visits, in the mean of a uniform routing.

    `n (1 - (1 - 1/n)^K)`, with K of E experts drawn without replacement:
    `n (1 - prod_{i < K} (E - E/n - i) / (E - i))`.
    """
    others = num_experts - num_experts / shards
    missed, whole = 1.0, int(expected_k)
    for drawn in range(whole):
        missed *= max(0.0, others - drawn) / (num_experts - drawn)
    rest = expected_k - whole
    if rest:
        missed *= 1 - rest * (1 - max(0.0, others - whole) / (num_experts - whole))
    return shards * (1 - missed)


@struct
class Pairs:
    """Which rows go where.

    Attributes:
      plan: of (token, destination) pairs, in buckets by destination.
      received_n: (n,) int32, rows that come from each shard.
      chosen_tk: (T, K) int32, the expert plus one; 0 where the choice is not valid.
    """

    plan: Plan
    received_n: Array
    chosen_tk: Array


def dispatch(
    options: Ragged,
    rows: PyTree,
    routing: Assignments,
    experts: LocalExperts,
    axes: Axes,
) -> tuple[Array, DispatchStats]:
    """Exchanges of deduplicated rows, each served by local rounds; see `DISPATCHES`."""
    num_tokens, shards = routing.expert_tk.shape[0], axes.expert_shards()
    inputs = vary((rows, routing.weight_tk, experts.weights), axes.every)
    # A shard serves as many as it sends: the group's tokens are n T, its experts E / n.
    served = num_tokens * routing.expected_k
    if shards == 1:
        return _alone(options.capacity_factor, served, inputs, routing, experts, axes)
    mean = num_tokens / shards
    mean *= destinations(routing.expected_k, routing.num_experts, shards)
    capacity = bucket_rows(mean, options.capacity_factor, num_tokens)
    pairs = _make_pairs(routing, shards, capacity, axes)
    fullest = largest(jnp.max(pairs.plan.counts_e), axes.tokens)
    rounds = rounds_needed(fullest, capacity)
    num_local = routing.num_experts // shards
    size_of = (served, options.capacity_factor)
    of_experts = (experts.run, experts.bring)
    step = functools.partial(_exchange, *of_experts, axes, num_local, size_of)
    given = behind_first(experts.bring, inputs, pairs)
    return in_rounds(step, experts.bring, *given, rounds), statistics(
        routing,
        axes,
        rounds=rounds,
        counts=pairs.plan.counts_e,
        capacity=capacity,
        mean=mean,
    )


def _alone(factor, mean, inputs, routing, experts, axes):
    """All experts are here, and nothing is exchanged."""
    choices = (routing.expert_tk, routing.valid_tk, routing.num_experts)
    here = local.make_local(*choices, mean, factor)
    return local.serve(experts.run, experts.bring, inputs, here), statistics(
        routing,
        axes,
        rounds=largest(here.rounds, axes.tokens),
        counts=here.counts,
        capacity=here.plan.capacity,
        mean=local.mean_rows(mean, routing.num_experts),
    )


def _make_pairs(routing: Assignments, shards: int, capacity: int, axes: Axes) -> Pairs:
    expert_tk, valid_tk = routing.expert_tk, routing.valid_tk
    target_tk = expert_tk // (routing.num_experts // shards)
    top_k = expert_tk.shape[1]
    if top_k <= shards:
        # A column goes where no earlier one went.
        same_tkj = (target_tk[:, :, None] == target_tk[:, None, :]) & valid_tk[:, None]
        earlier_kj = jnp.tri(top_k, k=-1, dtype=bool)
        goes_tn = valid_tk & ~jnp.any(same_tkj & earlier_kj, axis=-1)
        target_tn = target_tk
    else:
        shard_n = jnp.arange(shards, dtype=jnp.int32)
        hit_tkn = (target_tk[..., None] == shard_n) & valid_tk[..., None]
        goes_tn = jnp.any(hit_tkn, axis=1)
        target_tn = jnp.broadcast_to(shard_n, goes_tn.shape)
    plan = make_plan(target_tn, goes_tn, shards, capacity)
    return Pairs(
        plan=plan,
        received_n=jax.lax.all_to_all(plan.counts_e, axes.expert, 0, 0, tiled=True),
        chosen_tk=jnp.where(valid_tk, expert_tk + 1, 0),
    )


def _exchange(run, bring, axes, num_local, size_of, index, inputs, pairs) -> Array:
    """One round of exchange: (T, D), zero for what it does not serve."""
    rows, weight_tk, weights = inputs
    first, size = window(index, pairs.plan.capacity)
    turn = bucket_round(pairs.plan, first, size)
    clipped = lambda counts_n: jnp.clip(counts_n - first, 0, size)
    sent_n, received_n = clipped(pairs.plan.counts_e), clipped(pairs.received_n)
    send = lambda leaf: exchange.swap(axes.expert, fill(leaf, turn), sent_n, received_n)
    with jax.named_scope("dispatch"):
        rows = jax.tree.map(send, rows)
        # Choices ride beside the weights, as floats: one exchange more and not two.
        wide = jnp.promote_types(weight_tk.dtype, jnp.float32)
        ticket_tk = jnp.concatenate([weight_tk, pairs.chosen_tk], axis=1, dtype=wide)
        weight_rk, chosen_rk = jnp.split(send(ticket_tk), 2, axis=1)
        expert_rk = chosen_rk.astype(jnp.int32) - 1
        expert_rk = expert_rk - num_local * jax.lax.axis_index(axes.expert)
        valid_rk = (expert_rk >= 0) & (expert_rk < num_local)
        expert_rk, weight_rk, valid_rk = valid_first(
            jnp.where(valid_rk, expert_rk, 0), weight_rk, valid_rk, num_local
        )
    here = local.make_local(expert_rk, valid_rk, num_local, *size_of)
    inputs = (rows, weight_rk, weights)
    if isinstance(index, int):
        y_rd = local.serve(run, bring, inputs, here)
    else:
        y_rd = local.serve_later(run, inputs, here)
    with jax.named_scope("combine"):
        back_sd = exchange.swap(axes.expert, y_rd, received_n, sent_n)
        return collect(back_sd, turn)
