"""Every expert on every token: slow and obvious, the oracle of all others."""

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.dispatch.common import Axes, LocalExperts, local_counts
from moe_jax.moe.routing import Array, Assignments, DispatchStats, PyTree
from moe_jax.parallel.collectives import total


@config.node
class DenseDispatch(config.DispatchConfig):
    """Costs E / K times the work of any other dispatch; never drops."""


def dispatch(
    options: DenseDispatch,
    rows: PyTree,
    routing: Assignments,
    experts: LocalExperts,
    axes: Axes,
) -> tuple[Array, DispatchStats]:
    """`y_t = sum_e w_te f_e(x_t)` over all experts; see `DISPATCHES`."""
    weights = experts.whole()
    if axes.expert:
        gather = lambda w: jax.lax.all_gather(w, axes.expert, axis=0, tiled=True)
        weights = jax.tree.map(gather, weights)
    num_experts = routing.num_experts
    spread = lambda x: jnp.broadcast_to(x, (num_experts, *x.shape))
    out_etd = experts.run(weights, jax.tree.map(spread, rows), None)
    one_hot_tke = jax.nn.one_hot(routing.expert_tk, num_experts, dtype=out_etd.dtype)
    weight_tk = jnp.where(routing.valid_tk, routing.weight_tk, 0).astype(out_etd.dtype)
    weight_te = jnp.einsum("tk,tke->te", weight_tk, one_hot_tke)
    counts_e = local_counts(routing.expert_tk, routing.valid_tk, num_experts)
    zero = jnp.zeros((), jnp.int32)
    stats = DispatchStats(
        assignments=total(jnp.sum(counts_e), axes.tokens),
        dropped=zero,
        rounds=zero + 1,
        peak_fill=zero,
        capacity=zero,
    )
    return jnp.einsum("te,etd->td", weight_te, out_etd), stats
