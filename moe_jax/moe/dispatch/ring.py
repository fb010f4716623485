"""Tokens travel round the expert group, one shard's at a time; their sums follow.

In each of n hops a shard serves the tokens of one shard (`local`), while the next ones
arrive and the sum over the shards so far goes on behind its tokens: transfers run
beside the experts' work. A shard sends what it sends under `gather`, `2 T D (n - 1)`
elements, and holds the tokens of two shards, not of n.

The reverse goes the same way once more, with the tokens and the gradients of their
results in hand; a hop computes its rows again, and the tokens' gradients follow. That
is `3 T D (n - 1)` elements, as many as `gather` sends where it is rematerialised. Of
the forward pass nothing is kept but what went in, so "exchanges", "hidden" and
"weights" in `model.remat` change nothing here.

The price: n products of T rows in place of one of n T, n gradients of the experts'
weights that are added in the type of the computation, and a program that grows with n.

Rounds are local, as in `gather`, and a hop has as many as its tokens need.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.dispatch import local
from moe_jax.moe.dispatch.common import Axes, Bring, LocalExperts, mean_fill, statistics
from moe_jax.moe.dispatch.permute import valid_first
from moe_jax.moe.dispatch.plan import capacity_problems
from moe_jax.moe.dispatch.rounds import behind_first
from moe_jax.moe.routing import Array, Assignments, DispatchStats, PyTree
from moe_jax.parallel.collectives import largest
from moe_jax.parallel.varying import vary


@config.node
class Ring(config.DispatchConfig):
    """Tokens go round, sums follow; exact by local rounds.

    Attributes:
      capacity_factor: rows per expert in the first round of a hop over the mean of a
        uniform routing of one shard's tokens; 0: as many as an independent uniform
        routing needs.
    """

    capacity_factor: float = 0.0

    def problems(self, path, root):
        yield from capacity_problems(self.capacity_factor, path)


def dispatch(
    options: Ring,
    rows: PyTree,
    routing: Assignments,
    experts: LocalExperts,
    axes: Axes,
) -> tuple[Array, DispatchStats]:
    """Hops of local rounds; see `DISPATCHES`."""
    shards = axes.expert_shards()
    num_local = routing.num_experts // shards
    served = mean_fill(routing) * num_local
    rows, weight_tk, weights = vary(
        (rows, routing.weight_tk, experts.weights), axes.every
    )
    plans, weight_h = [], []
    with jax.named_scope("dispatch"):
        choices = routing.expert_tk, weight_tk, routing.valid_tk
        for expert_tk, weight_tk, valid_tk in _of_hops(choices, num_local, axes):
            kept = (num_local, served, options.capacity_factor)
            plans.append(local.make_local(expert_tk, valid_tk, *kept))
            weight_h.append(weight_tk)
    given = behind_first(experts.bring, (rows, weight_h, weights), plans)
    y_td = _around(experts.run, experts.bring, axes.expert, *given)
    over_hops = lambda of: jnp.max(jnp.stack([jnp.max(of(here)) for here in plans]))
    return y_td, statistics(
        routing,
        axes,
        rounds=largest(over_hops(lambda here: here.rounds), axes.tokens),
        counts=over_hops(lambda here: here.counts),
        capacity=plans[0].plan.capacity,
        mean=local.mean_rows(served, num_local),
    )


def _of_hops(choices: PyTree, num_local: int, axes: Axes):
    """Choices among the experts at hand, of the tokens of each hop: (T, K) each."""
    if not axes.expert:
        yield valid_first(*choices, num_local)
        return
    me = jax.lax.axis_index(axes.expert)
    gather = lambda leaf: jax.lax.all_gather(leaf, axes.expert)
    choices_n = jax.tree.map(gather, choices)
    for hop in range(axes.expert_shards()):
        source = (me - hop) % axes.expert_shards()
        expert_tk, weight_tk, valid_tk = (
            jax.lax.dynamic_index_in_dim(leaf, source, keepdims=False)
            for leaf in choices_n
        )
        expert_tk = expert_tk - num_local * me
        valid_tk = valid_tk & (expert_tk >= 0) & (expert_tk < num_local)
        expert_tk = jnp.where(valid_tk, expert_tk, 0)
        yield valid_first(expert_tk, weight_tk, valid_tk, num_local)


def _on(x: PyTree, names: tuple[str, ...]) -> PyTree:
    """To the next shard of the group."""
    shards = jax.lax.axis_size(names)
    pairs = [(i, (i + 1) % shards) for i in range(shards)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, names, pairs), x)


def _travel(names: tuple[str, ...], shards: int, chunk: PyTree, serve) -> PyTree:
    """Chunks go round; `serve(hop, chunk)` of all shards is summed and comes home.

    A hop ends when its work and its transfers are done: else XLA would send everything
    first.
    """
    own = total = None
    for hop in range(shards):
        following = None
        if hop < shards - 1:
            with jax.named_scope("dispatch"):
                following = _on(chunk, names)
        if total is not None:
            with jax.named_scope("combine"):
                total = _on(total, names)
        out = serve(hop, chunk)
        if shards > 1:
            out, following, total = jax.lax.optimization_barrier(
                (out, following, total)
            )
        if hop == 0:
            own = out
        else:
            total = out if total is None else jax.tree.map(jnp.add, total, out)
        chunk = following
    if total is None:
        return own
    with jax.named_scope("combine"):
        return jax.tree.map(jnp.add, own, _on(total, names))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _around(run, bring: Bring, names: tuple[str, ...], inputs, plans) -> Array:
    """`y_td` of this shard's tokens.

    Args:
      run: the experts.
      bring: makes their weights whole.
      names: axes of the expert group.
      inputs: (rows (T, ...), combine weights of each hop, weights of the experts),
        varying alike.
      plans: of each hop.
    """
    rows, weight_h, weights = inputs
    whole = bring.gather(weights)

    def serve(hop, chunk):
        given = chunk, weight_h[hop], whole
        return local.serve(run, Bring(), given, plans[hop])

    return _travel(names, len(plans), rows, serve)


def _reverse(run, bring, names, saved, grad):
    (rows, weight_h, weights), plans = saved
    whole, apart = jax.vjp(bring.gather, weights)
    grad_weight_h, total = [], None

    def serve(hop, chunk):
        nonlocal total
        rows, grad = chunk
        forward = lambda *given: local.serve(run, Bring(), given, plans[hop])
        _, pull = jax.vjp(forward, rows, weight_h[hop], whole)
        grad_rows, grad_weight, grad_whole = pull(grad)
        grad_weight_h.append(grad_weight)
        add = lambda: jax.tree.map(jnp.add, total, grad_whole)
        total = grad_whole if total is None else add()
        return grad_rows

    grad_rows = _travel(names, len(plans), (rows, grad), serve)
    return (grad_rows, grad_weight_h, apart(total)[0]), None


_around.defvjp(
    lambda run, bring, names, *given: (_around(run, bring, names, *given), given),
    _reverse,
)
