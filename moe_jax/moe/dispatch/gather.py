"""All tokens of the expert group on each of its shards; results are summed back.

Rows are gathered over the expert axes (all_gather), each shard puts those that chose
its experts in order (`local`), and the weighted outputs are summed and split again
(psum_scatter). Further rounds are local: no collective stands in their loop, and no
shard waits for another's imbalance but at the end, and, where fsdp splits the experts'
weights, when these are gathered for the rounds after the first.

With n shards it moves `2 T D (n - 1)` elements a shard and pass, whatever K is; an
exchange of rows moves `2 T K D (n - 1) / n`. So it pays where n is small or K large.
Its buffers of n T rows grow with n.

In the worst case, all n T tokens of a group on one expert, there are
`1 + ceil((n T - C) / (C / 4))` local rounds, with C about n T K / E.
"""

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.dispatch import local
from moe_jax.moe.dispatch.common import (
    Axes,
    LocalExperts,
    exchanged,
    mean_fill,
    statistics,
)
from moe_jax.moe.dispatch.permute import valid_first
from moe_jax.moe.dispatch.plan import capacity_problems
from moe_jax.moe.routing import Array, Assignments, DispatchStats, PyTree
from moe_jax.parallel.collectives import largest
from moe_jax.parallel.varying import vary


@config.node
class Gather(config.DispatchConfig):
    """Tokens are gathered, results summed; exact by local rounds.

    Attributes:
      capacity_factor: rows per expert in the first round over the mean of a uniform
        routing of the group's tokens; 0: as many as an independent uniform routing
        needs.
    """

    capacity_factor: float = 0.0

    def problems(self, path, root):
        yield from capacity_problems(self.capacity_factor, path)


def dispatch(
    options: Gather,
    rows: PyTree,
    routing: Assignments,
    experts: LocalExperts,
    axes: Axes,
) -> tuple[Array, DispatchStats]:
    """Local rounds on gathered tokens; see `DISPATCHES`."""
    shards = axes.expert_shards()
    num_local = routing.num_experts // shards
    served = mean_fill(routing) * routing.num_experts
    rows, weight_tk, weights = vary(
        (rows, routing.weight_tk, experts.weights), axes.every
    )
    with jax.named_scope("dispatch"):
        rows = jax.tree.map(lambda leaf: _gathered(leaf, axes), rows)
        weight_tk = _gathered(weight_tk, axes)
        expert_tk = _gathered(routing.expert_tk, axes)
        valid_tk = _gathered(routing.valid_tk, axes)
    if axes.expert:
        expert_tk = expert_tk - num_local * jax.lax.axis_index(axes.expert)
        valid_tk = valid_tk & (expert_tk >= 0) & (expert_tk < num_local)
        expert_tk = jnp.where(valid_tk, expert_tk, 0)
    expert_tk, weight_tk, valid_tk = valid_first(
        expert_tk, weight_tk, valid_tk, num_local
    )
    here = local.make_local(
        expert_tk, valid_tk, num_local, served, options.capacity_factor
    )
    inputs = (rows, weight_tk, weights)
    y_td = local.serve(experts.run, experts.bring, inputs, here)
    if axes.expert:
        with jax.named_scope("combine"):
            y_td = jax.lax.psum_scatter(y_td, axes.expert, tiled=True)
            y_td = exchanged(y_td)
    return y_td, statistics(
        routing,
        axes,
        rounds=largest(here.rounds, axes.tokens),
        counts=here.counts,
        capacity=here.plan.capacity,
        mean=local.mean_rows(served, num_local),
    )


def _gathered(x: Array, axes: Axes) -> Array:
    """(T, ...) -> (n T, ...), in the order of the shards."""
    if not axes.expert:
        return x
    return exchanged(jax.lax.all_gather(x, axes.expert, tiled=True))
