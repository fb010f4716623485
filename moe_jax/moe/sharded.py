"""Dispatch and experts of a layer: the one `jax.shard_map` of the MoE layer.

Without a mesh (`jax.set_mesh`) the same code runs on the tokens at hand.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax import config
from moe_jax.moe.dispatch import DISPATCHES
from moe_jax.moe.dispatch.common import Axes, Bring, LocalExperts, vary
from moe_jax.moe.routing import Array, Assignments, DispatchStats, PyTree, Routing
from moe_jax.nn import module
from moe_jax.parallel import collectives, mesh, rules, whole


def run(
    options: config.DispatchConfig,
    experts: Any,
    expert_axes: tuple[str, ...],
    x: Array,
    routing: Routing | Assignments,
) -> tuple[Array, DispatchStats]:
    """Carries tokens to their experts and back, (B, S, D) -> (B, S, D).

    Args:
      options: of a dispatch.
      experts: module of one of `EXPERTS`.
      expert_axes: mesh axes over which the experts are split.
      x: (B, S, D).
      routing: of the B * S tokens.

    Returns:
      The experts' weighted outputs, zero for a token that no expert serves, and exact
      statistics of the dispatch.
    """
    split = lambda a: a.reshape(*x.shape[:2], a.shape[-1])
    tokens = (
        experts.before({"features": x}),
        split(routing.expert_tk),
        split(routing.weight_tk),
        split(routing.valid_tk),
    )

    def serve(tokens, given, axes):
        batch_shape = tokens[1].shape[:2]
        flat = lambda a: a.reshape(-1, *a.shape[2:])
        rows, expert_tk, weight_tk, valid_tk = jax.tree.map(flat, tokens)
        local = Assignments(
            expert_tk=expert_tk,
            weight_tk=weight_tk,
            valid_tk=valid_tk,
            num_experts=routing.num_experts,
            expected_k=routing.expected_k,
        )
        y_td, stats = DISPATCHES[type(options)](options, rows, local, given, axes)
        return y_td.reshape(*batch_shape, y_td.shape[-1]), stats

    return on_shards(serve, experts, expert_axes, tokens, x)


def on_shards(
    serve: Callable[[PyTree, LocalExperts, Axes], tuple[Array, DispatchStats]],
    experts: Any,
    expert_axes: tuple[str, ...],
    tokens: PyTree,
    x: Array,
) -> tuple[Array, DispatchStats]:
    """Runs `serve` on each shard's tokens with the experts at hand.

    Args:
      serve: one shard's tokens, experts and mesh axes to (b, s, D), which may be this
        shard's part of a sum over the experts' width, and statistics of the mesh.
      experts: module of one of `EXPERTS`.
      expert_axes: mesh axes over which the experts are split.
      tokens: pytree of (B, S, ...).
      x: (B, S, D), for its shape and type.

    Returns:
      (B, S, D) and the statistics.
    """
    length = x.shape[1]
    weights = {n: module.cast(w, x.dtype) for n, w in experts.weights().items()}
    body = lambda tokens, weights: _shard(serve, experts, expert_axes, tokens, weights)
    current = jax.sharding.get_abstract_mesh()
    if current.empty:
        y, stats = body(tokens, weights)
        return experts.after(y), stats
    # Decoding has one position, and may have fewer than there are shards.
    sequence = rules.grouped("sequence", expert_axes)
    missing = -length % rules.size(current, sequence)
    pad = lambda a: jnp.pad(a, [(0, 0), (0, missing)] + [(0, 0)] * (a.ndim - 2))
    token_spec = rules.spec(("batch", sequence))
    weight_specs = {n: whole.spec(weights[n], a) for n, a in experts.axes().items()}
    y, stats = jax.shard_map(
        body,
        in_specs=(token_spec, weight_specs),
        out_specs=(token_spec, PartitionSpec()),
    )(jax.tree.map(pad, tokens) if missing else tokens, weights)
    return experts.after(y[:, :length]), stats


def _axes(expert_axes: tuple[str, ...]) -> Axes:
    if jax.sharding.get_abstract_mesh().empty:
        return Axes()
    sequence = rules.mesh_axes(rules.grouped("sequence", expert_axes))
    tokens = rules.mesh_axes("batch") + sequence
    return Axes(tokens, expert_axes, mesh.AXES)


def _shard(serve, experts, expert_axes, tokens, weights):
    """One shard's part: (b, s, ...) in, (b, s, D) and exact statistics out."""
    axes = _axes(expert_axes)
    width = rules.mesh_axes(rules.grouped("expert_mlp", expert_axes))
    bring = Bring()
    if axes.every:
        # Before the gather: its reverse then splits gradients before it adds copies.
        weights = vary(weights, axes.tokens)
        weights = _add_once(weights, experts.output_biases, width)
        if any(map(whole.is_whole, weights.values())):
            weights = _gather_fsdp(weights, experts.axes())  # They are here already.
        else:
            bring = _bring(experts)
    given = LocalExperts(weights=weights, run=experts.rows, bring=bring)
    y, stats = serve(tokens, given, axes)
    # The experts' width may be split: each shard then holds a part of the sum.
    return collectives.total(y, width if axes.every else ()), stats


def _gather_fsdp(weights: dict[str, Any], axes: dict[str, rules.Axes]):
    """Brings back the dimensions that fsdp splits, inside `shard_map`.

    The derivative of this gather is a reduce-scatter of the gradient.
    """
    return {name: whole.bring(w, axes[name]) for name, w in weights.items()}


def _bring(experts: Any) -> Bring:
    """How a dispatch brings the weights together itself."""
    split = {axis for axes in experts.axes().values() for axis in axes}
    names = {
        n for axis in filter(rules.is_gathered, split) for n in rules.mesh_axes(axis)
    }
    return Bring(
        tuple(a for a in mesh.AXES if a in names and jax.lax.axis_size(a) > 1),
        lambda weights: _gather_fsdp(weights, experts.axes()),
        experts.first,
    )


def _add_once(weights: PyTree, biases: tuple[str, ...], width: tuple[str, ...]):
    """Zero on all shards but the first that hold parts of one expert's width.

    The outputs of these shards are summed, so what is added to an output must be there
    once.
    """
    if not width or not biases:
        return weights
    first = jax.lax.axis_index(width) == 0
    once = {name: jnp.where(first, weights[name], 0) for name in biases}
    return {**weights, **once}
