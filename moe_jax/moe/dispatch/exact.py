"""Buckets of fixed capacity, one a (source shard, expert), in rounds: nothing is lost.

Each assignment (token, choice) has a position in its bucket, counted in token order.
Round 0 serves the positions [0, C): rows are gathered into (E, C, D), travel to the
shards that hold the experts by all_to_all, go through one batched matmul, travel back,
and are added to their tokens with their weights. Further rounds serve C / 4 positions
each: a load a little above C, which is common, then costs a quarter round more and not
a whole one, and the buffers of the loop stay small. All shards take part in as many
rounds as the fullest bucket of the mesh needs.

In the worst case, all T tokens of a shard on one expert, there are
`1 + ceil((T - C) / (C / 4))`, about `4 E / (1.25 K) - 3` rounds where C is 1.25 times
the mean T K / E, and memory is what it is with a balanced load.
"""

import functools

import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.dispatch.common import (
    Axes,
    LocalExperts,
    mean_fill,
    statistics,
)
from moe_jax.moe.dispatch.plan import (
    Plan,
    bucket_rows,
    capacity_problems,
    make_plan,
    rounds_needed,
    window,
)
from moe_jax.moe.dispatch.rounds import behind_first, in_rounds, serve_buckets
from moe_jax.moe.routing import Array, Assignments, DispatchStats, PyTree
from moe_jax.parallel.collectives import largest
from moe_jax.parallel.varying import vary


@config.node
class Exact(config.DispatchConfig):
    """As many rounds as it takes; nothing is dropped.

    Attributes:
      capacity_factor: rows per bucket in the first round over the mean of a uniform
        routing; later rounds have a quarter of them. 0: as many as an independent
        uniform routing needs (`plan.needed_rows`), so that it takes one round.
    """

    capacity_factor: float = 0.0

    def problems(self, path, root):
        yield from capacity_problems(self.capacity_factor, path)


def dispatch(
    options: Exact,
    rows: PyTree,
    routing: Assignments,
    experts: LocalExperts,
    axes: Axes,
) -> tuple[Array, DispatchStats]:
    """Rounds of buckets until all assignments are served; see `DISPATCHES`."""
    mean = mean_fill(routing)
    capacity = bucket_rows(mean, options.capacity_factor, routing.expert_tk.shape[0])
    plan = make_plan(routing.expert_tk, routing.valid_tk, routing.num_experts, capacity)
    fullest = largest(jnp.max(plan.counts_e), axes.tokens)
    rounds = rounds_needed(fullest, capacity)
    inputs = vary((rows, routing.weight_tk, experts.weights), axes.every)
    step = functools.partial(_step, experts.run, experts.bring, axes)
    given = behind_first(experts.bring, inputs, plan)
    y_td = in_rounds(step, experts.bring, *given, rounds)
    return y_td, statistics(
        routing,
        axes,
        rounds=rounds,
        counts=plan.counts_e,
        capacity=capacity,
        mean=mean,
    )


def _step(run, bring, axes: Axes, index, inputs, plan: Plan) -> Array:
    bring = bring if isinstance(index, int) else None
    return serve_buckets(run, bring, axes, window(index, plan.capacity), inputs, plan)
