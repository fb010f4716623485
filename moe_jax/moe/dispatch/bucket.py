"""Buckets of fixed capacity, one a (source shard, expert); the rest is dropped."""

import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.dispatch.common import Axes, LocalExperts, mean_fill, statistics
from moe_jax.moe.dispatch.plan import bucket_rows, capacity_problems, make_plan
from moe_jax.moe.dispatch.rounds import serve_buckets
from moe_jax.moe.routing import Array, Assignments, DispatchStats, PyTree
from moe_jax.parallel.varying import vary

_DROPS = ("position", "weight")


@config.node
class Bucket(config.DispatchConfig):
    """One round of `Exact`; what does not fit is dropped and counted.

    Attributes:
      capacity_factor: rows per bucket over the mean of a uniform routing; 0: as many
        as an independent uniform routing needs.
      drop: which assignments of a full bucket stay: "position", the first tokens of
        the shard (GShard, Switch), or "weight", those with the largest combine
        weight (batch prioritised routing, Riquelme et al. 2021, with each
        assignment's own weight as its priority).
    """

    capacity_factor: float = 1.25
    drop: str = "position"

    def problems(self, path, root):
        yield from capacity_problems(self.capacity_factor, path)
        if self.drop not in _DROPS:
            yield f"{path}.drop={self.drop!r}: must be one of {list(_DROPS)}"


def dispatch(
    options: Bucket,
    rows: PyTree,
    routing: Assignments,
    experts: LocalExperts,
    axes: Axes,
) -> tuple[Array, DispatchStats]:
    """One round of buckets; see `DISPATCHES`."""
    mean = mean_fill(routing)
    capacity = bucket_rows(mean, options.capacity_factor, routing.expert_tk.shape[0])
    plan = make_plan(
        routing.expert_tk,
        routing.valid_tk,
        routing.num_experts,
        capacity,
        routing.weight_tk if options.drop == "weight" else None,
    )
    inputs = vary((rows, routing.weight_tk, experts.weights), axes.every)
    of_experts = (experts.run, experts.bring)
    y_td = serve_buckets(*of_experts, axes, (0, capacity), inputs, plan)
    dropped = jnp.sum(jnp.maximum(plan.counts_e - capacity, 0))
    return y_td, statistics(
        routing,
        axes,
        rounds=1,
        counts=plan.counts_e,
        capacity=capacity,
        mean=mean,
        dropped=dropped,
    )
