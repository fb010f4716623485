"""Over which mesh axes an array differs, inside `jax.shard_map`."""

from typing import Any

import jax

Array = jax.Array
PyTree = Any


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


def vary_like(x: PyTree, other: Array) -> PyTree:
    """Marks arrays as differing over the axes over which `other` does."""
    return vary(x, tuple(jax.typeof(other).manual_axis_type.varying))


def alike(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, each marked as differing over all axes over which one does."""
    axes = frozenset().union(*(_axes(a) for a in arrays))
    return tuple(vary(a, tuple(axes)) for a in arrays)


def _axes(x: Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
