"""What the dispatches share: mesh axes, the experts at hand, collectives."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.moe.routing import Array, PyTree
from moe_jax.tree import struct


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


@struct(static=("run",))
class LocalExperts:
    """The experts of one shard.

    Attributes:
      weights: pytree, each with a leading e.
      run: `(weights, rows (e, C, ...), group_sizes) -> (e, C, D)`.
    """

    weights: PyTree
    run: Callable[..., Array]


def vary(x: PyTree, axes: tuple[str, ...]) -> PyTree:
    """Marks arrays as differing over mesh axes; the derivative sums over them.

    Done once outside of loops and custom derivatives, it keeps the sums over
    replicas that the reverse pass needs out of them.
    """

    def mark(leaf):
        varying = jax.typeof(leaf).manual_axis_type.varying
        missing = tuple(a for a in axes if a not in varying)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, x)


def total(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(x, axes) if axes else x


def largest(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.pmax(x, axes) if axes else x


def to_experts(buckets_ecd: Array, axes: Axes) -> Array:
    """(E, C, ...) by destination -> (e, n * C, ...): rows for this shard's experts."""
    if not axes.expert:
        return buckets_ecd
    return jax.lax.all_to_all(buckets_ecd, axes.expert, 0, 1, tiled=True)


def from_experts(rows_ecd: Array, axes: Axes) -> Array:
    """The way back: (e, n * C, ...) -> (E, C, ...)."""
    if not axes.expert:
        return rows_ecd
    return jax.lax.all_to_all(rows_ecd, axes.expert, 1, 0, tiled=True)


def local_counts(expert_tk: Array, valid_tk: Array, num_experts: int) -> Array:
    """Valid assignments of this shard's tokens per expert, (E,) int32."""
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    hit_tke = (expert_tk[..., None] == experts) & valid_tk[..., None]
    return jnp.sum(hit_tke, axis=(0, 1), dtype=jnp.int32)
