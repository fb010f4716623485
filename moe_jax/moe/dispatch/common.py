"""What the dispatches share: mesh axes, the experts at hand, collectives, statistics.

Results of the exchanges of tokens carry the name `EXCHANGED`: a rematerialisation
policy that saves it does not repeat them.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.moe.routing import Array, Assignments, DispatchStats, PyTree
from moe_jax.parallel.collectives import largest, total
from moe_jax.parallel.varying import vary
from moe_jax.tree import struct

EXCHANGED = "moe_exchanged"


@dataclasses.dataclass(frozen=True)
class Axes:
    """Names of the mesh axes by what they split; empty outside `shard_map`.

    Attributes:
      tokens: split T (the expert axes among them).
      expert: split E.
      every: all axes of the mesh.
    """

    tokens: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()
    every: tuple[str, ...] = ()

    def expert_shards(self) -> int:
        """Shards that E is split over; inside `shard_map`."""
        return math.prod(jax.lax.axis_size(axis) for axis in self.expert)

    def token_shards(self) -> int:
        """Shards that T is split over; inside `shard_map`."""
        return math.prod(jax.lax.axis_size(axis) for axis in self.tokens)


@dataclasses.dataclass(frozen=True)
class Bring:
    """Brings together the weights of which the shards of `names` hold parts.

    Attributes:
      names: mesh axes of more than one shard; where there are none the weights are
        whole.
      gather: of the weights; its derivative sums the gradient and splits it again.
      first: name of the weight that rows meet first; "" if none is asked for early.
    """

    names: tuple[str, ...] = ()
    gather: Callable[[PyTree], PyTree] = lambda weights: weights
    first: str = ""


@struct(static=("run", "bring"))
class LocalExperts:
    """The experts of one shard.

    Attributes:
      weights: pytree, each with a leading e; parts, of which `bring` makes whole ones.
      run: `(weights, rows (e, C, ...), None) -> (e, C, D)`, and with group sizes (e,)
        `(weights, rows (R, ...), sizes, scale (R,)) -> (R, D)`, where the scale
        multiplies the results and rows beyond the sum of the sizes belong to nobody.
    """

    weights: PyTree
    run: Callable[..., Array]
    bring: Bring = Bring()

    def whole(self) -> PyTree:
        """The weights that `run` takes."""
        return self.bring.gather(self.weights)


def exchanged(x: Array) -> Array:
    """Names the result of an exchange for rematerialisation."""
    return checkpoint_name(x, EXCHANGED)


def to_experts(buckets_ecd: Array, axes: Axes) -> Array:
    """(E, C, ...) by destination -> (e, n * C, ...): rows for this shard's experts."""
    if not axes.expert:
        return buckets_ecd
    sent = jax.lax.all_to_all(buckets_ecd, axes.expert, 0, 1, tiled=True)
    return exchanged(sent)


def from_experts(rows_ecd: Array, axes: Axes) -> Array:
    """The way back: (e, n * C, ...) -> (E, C, ...)."""
    if not axes.expert:
        return rows_ecd
    return exchanged(jax.lax.all_to_all(rows_ecd, axes.expert, 1, 0, tiled=True))


def local_counts(expert_tk: Array, valid_tk: Array, num_experts: int) -> Array:
    """Valid assignments of this shard's tokens per expert, (E,) int32."""
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    hit_tke = (expert_tk[..., None] == experts) & valid_tk[..., None]
    return jnp.sum(hit_tke, axis=(0, 1), dtype=jnp.int32)


def mean_fill(routing: Assignments) -> float:
    """Rows of a (source shard, expert) bucket where the routing is uniform."""
    num_tokens = routing.expert_tk.shape[0]
    return num_tokens * routing.expected_k / routing.num_experts


def statistics(
    routing: Assignments,
    axes: Axes,
    *,
    rounds: Array | int,
    counts: Array,
    capacity: int,
    mean: float,
    dropped: Array | int = 0,
) -> DispatchStats:
    """Exact integers over the mesh.

    Args:
      routing: of this shard.
      axes: of the mesh.
      rounds: agreed upon by all shards.
      counts: rows that this shard's buckets were to hold.
      capacity: rows that one holds.
      mean: rows that one would hold were the routing uniform.
      dropped: of this shard.
    """
    assignments = jnp.sum(routing.valid_tk, dtype=jnp.int32)
    as_total = lambda x: total(vary(jnp.int32(x), axes.tokens), axes.tokens)
    return DispatchStats(
        assignments=as_total(assignments),
        dropped=as_total(dropped),
        rounds=jnp.int32(rounds),
        peak_fill=largest(vary(jnp.max(counts), axes.tokens), axes.tokens),
        capacity=jnp.int32(capacity),
        mean_fill=jnp.float32(mean),
    )
