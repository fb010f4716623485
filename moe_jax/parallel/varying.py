"""Over which mesh axes an array differs, inside `jax.shard_map`."""

from typing import Any

import jax

from moe_jax.parallel.mesh import AXES

Array = jax.Array
PyTree = Any


def vary(x: PyTree, names: tuple[str, ...]) -> PyTree:
    """Marks arrays as differing over mesh axes; the derivative sums over them.

    Done once outside of loops and custom derivatives, it keeps the sums over
    replicas that the reverse pass needs out of them.
    """

    def mark(leaf):
        # All processes must name the axes in one order.
        missing = tuple(a for a in AXES if a in names and a not in axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, x)


def vary_like(x: PyTree, other: Array) -> PyTree:
    """Marks arrays as differing over the axes over which `other` does.

    Done to a weight before it is gathered, its gradient is split before its copies are
    summed.
    """
    return vary(x, tuple(axes(other)))


def alike(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, each marked as differing over all axes over which one does."""
    names = frozenset().union(*(axes(a) for a in arrays))
    return tuple(vary(a, tuple(names)) for a in arrays)


def axes(x: Array) -> frozenset[str]:
    """Over which the array differs."""
    return jax.typeof(x).manual_axis_type.varying
